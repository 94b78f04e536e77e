"""Language models and vision towers of a few hundred thousand parameters, each trained alone.

A language model learns to answer questions about digits that its prompt spells out, a tower to tell
for each patch which digit it belongs to. Neither has seen what the other knows: that is left to the
connector.

    python -m scripts.finding_backbones NAME FOLDER      # one of them, such as language-2

Shape letters: B rows, T tokens, C channels (3), H and W pixels, P patches, D width, K digits (10).
"""

import argparse
import json
import random
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import (
    AddedToken,
    CLIPVisionConfig,
    CLIPVisionModel,
    Idefics2VisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
)
from transformers.models.idefics2.modeling_idefics2 import Idefics2VisionTransformer

from scripts.finding_boards import BOARD_PX, QUESTIONS, Digits
from scripts.nano_model import sinusoids_2d

WIDTH = 64
NUM_HEADS = 4
SPECIALS = ("<fake_token_around_image>", "<image>", "<end_of_utterance>")
VOCAB_SIZE = 448  # the tokenizer's, filled up to a multiple of 64

LANGUAGE_MLP = 168  # of three matrices
VISION_MLP = 246  # of two, so that layers of both kinds have as many weights within 0.2%
CLIP_PATCH_PX = 14
FINE_PATCH_PX = 7  # for a sequence that is worth pooling

STEPS = 1000
IGNORED = -100


def build_tokenizer() -> LlamaTokenizer:
    """Llama's kind: pieces with a mark for the space before, bytes for the rest."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", *string.printable[:94]]
    merges = []
    words = " ".join(QUESTIONS).replace("?", "").split()
    for word in (*(f"▁{word}" for word in words), "User", "Assistant", "USER", "▁ASSISTANT"):
        for end in range(2, len(word) + 1):
            if word[:end] not in pieces:
                pieces.append(word[:end])
                merges.append((word[: end - 1], word[end - 1]))
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = LlamaTokenizer(vocab=vocabulary, merges=merges, add_bos_token=True)
    added = [AddedToken(token, normalized=False, special=True) for token in SPECIALS]
    tokenizer.add_tokens(added, special_tokens=True)  # type: ignore[arg-type]
    tokenizer.pad_token = "<unk>"
    return tokenizer


def train_language(num_layers: int, *, steps: int = STEPS, seed: int = 0) -> LlamaForCausalLM:
    """A Llama that answers questions about digits spelt out, in prompts of LLaVA and of Idefics."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=WIDTH,
            intermediate_size=LANGUAGE_MLP,
            num_hidden_layers=num_layers,
            num_attention_heads=NUM_HEADS,
            max_position_embeddings=512,
            rms_norm_eps=1e-5,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    )
    rng = random.Random(seed)

    def loss() -> torch.Tensor:
        ids_BT, labels_BT = _texts(rng, tokenizer, 64)
        logits = model(input_ids=ids_BT).logits[:, :-1]
        return cross_entropy(logits.flatten(0, 1), labels_BT[:, 1:].flatten(), ignore_index=IGNORED)

    _train(model, loss, steps=steps)
    model.score = language_score(model)  # type: ignore[assignment]
    return model


def language_score(model: LlamaForCausalLM, *, num_texts: int = 500, seed: int = 1) -> float:
    """Share of fresh texts whose answer it would give letter by letter."""
    ids_BT, labels_BT = _texts(random.Random(seed), build_tokenizer(), num_texts, held_out=True)
    with torch.no_grad():
        said_BT = model(input_ids=ids_BT).logits[:, :-1].argmax(-1)
    wanted_BT = labels_BT[:, 1:]
    return ((said_BT == wanted_BT) | (wanted_BT == IGNORED)).all(dim=1).float().mean().item()


def _texts(
    rng: random.Random, tokenizer: LlamaTokenizer, count: int, *, held_out: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [B, T], padded on the right, and labels of the answers alone. Held-out texts are of four
    digits, as a board has them.
    """
    texts = [
        _text(rng, 4 if held_out or rng.random() < 0.6 else rng.randint(1, 6)) for _ in range(count)
    ]
    prompts = tokenizer([prompt for prompt, _ in texts]).input_ids
    answers = tokenizer([answer for _, answer in texts], add_special_tokens=False).input_ids
    longest = max(
        len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True)
    )
    ids_BT = torch.zeros((count, longest), dtype=torch.long)
    labels_BT = torch.full((count, longest), IGNORED)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        end = len(prompt) + len(answer)
        ids_BT[row, :end] = torch.tensor(prompt + answer)
        labels_BT[row, len(prompt) : end] = torch.tensor(answer)
    return ids_BT, labels_BT


def _text(rng: random.Random, num_digits: int) -> tuple[str, str]:
    digits = tuple(rng.randrange(10) for _ in range(num_digits))
    question = rng.choice(list(QUESTIONS))
    answer = QUESTIONS[question](digits)
    shown = rng.choice((" ", " ", "  ", "\n")).join(map(str, digits))
    if rng.random() < 0.5:
        return f"USER: {shown}\n{question} ASSISTANT:", f" {answer}</s>"
    # the markers of a picture stand there at times, so that they are known and mean nothing yet
    markers = rng.choice(("", f"{SPECIALS[0]}{SPECIALS[1]}{SPECIALS[0]}"))
    prompt = f"User:{markers} {shown} {question}<end_of_utterance>\nAssistant:"
    return prompt, f" {answer}<end_of_utterance>"


def train_clip(num_layers: int, *, steps: int = STEPS, seed: int = 0) -> CLIPVisionModel:
    """A CLIP tower for boards of 4 x 4 patches."""
    torch.manual_seed(seed)
    model = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=WIDTH,
            intermediate_size=VISION_MLP,
            num_hidden_layers=num_layers,
            num_attention_heads=NUM_HEADS,
            image_size=BOARD_PX,
            patch_size=CLIP_PATCH_PX,
            projection_dim=WIDTH,
        )
    )
    _train_tower(
        model,
        lambda pixels_BCHW: model(pixel_values=pixels_BCHW).last_hidden_state[:, 1:],
        patches_a_side=BOARD_PX // CLIP_PATCH_PX,
        steps=steps,
        seed=seed,
    )
    return model


def train_fine_tower(num_layers: int, *, steps: int = STEPS, seed: int = 0) -> Any:
    """Idefics2's kind of tower for boards of 8 x 8 patches."""
    torch.manual_seed(seed)
    model: Any = Idefics2VisionTransformer(
        Idefics2VisionConfig(
            hidden_size=WIDTH,
            intermediate_size=VISION_MLP,
            num_hidden_layers=num_layers,
            num_attention_heads=NUM_HEADS,
            image_size=BOARD_PX,
            patch_size=FINE_PATCH_PX,
        )
    )
    side = BOARD_PX // FINE_PATCH_PX
    with torch.no_grad():  # as the library starts them, places take ten times as long to be learnt
        table = sinusoids_2d(side=side, width=WIDTH)
        model.embeddings.position_embedding.weight.copy_(0.4 * table)

    def features(pixels_BCHW: torch.Tensor) -> torch.Tensor:
        is_patch = torch.ones((len(pixels_BCHW), side, side), dtype=torch.bool)
        return model(pixel_values=pixels_BCHW, patch_attention_mask=is_patch).last_hidden_state

    _train_tower(model, features, patches_a_side=side, steps=steps, seed=seed)
    return model


def _train_tower(
    model: nn.Module,
    features: Callable[[torch.Tensor], torch.Tensor],
    *,
    patches_a_side: int,
    steps: int,
    seed: int,
) -> None:
    """Each patch [B, P, D] is to tell which digit it is part of, by a layer that is thrown away."""
    head = nn.Linear(WIDTH, 10)
    digits, rng = Digits(held_out=False), random.Random(seed)

    def loss() -> torch.Tensor:
        pixels_BCHW, labels_BP = _boards(digits, rng, 64, patches_a_side)
        logits_BPK = head(features(pixels_BCHW))
        return cross_entropy(logits_BPK.flatten(0, 1), labels_BP.flatten())

    _train(nn.ModuleList([model, head]), loss, steps=steps)
    pixels_BCHW, labels_BP = _boards(Digits(held_out=True), random.Random(1), 250, patches_a_side)
    with torch.no_grad():
        right = (head(features(pixels_BCHW)).argmax(-1) == labels_BP).float().mean().item()
    model.score = right  # type: ignore[assignment]


def _boards(
    digits: Digits, rng: random.Random, count: int, patches_a_side: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels [B, C, H, W] from -1 to 1 and the digit under each patch [B, P]."""
    boards = [digits.board(rng) for _ in range(count)]
    grey_BHW = torch.from_numpy(np.stack([board.pixels for board in boards])).float() / 127.5 - 1
    labels = torch.tensor([board.digits for board in boards]).view(count, 2, 2)
    scale = patches_a_side // 2
    labels_BP = labels.repeat_interleave(scale, 1).repeat_interleave(scale, 2).flatten(1)
    return grey_BHW[:, None].expand(-1, 3, -1, -1), labels_BP


def _train(model: nn.Module, loss: Callable[[], torch.Tensor], *, steps: int) -> None:
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, step / 50) * max(0.02, 1 - step / steps)
    )
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


# Kind and number of layers of each backbone
BACKBONES: dict[str, tuple[Callable[..., Any], int]] = {
    "language-1": (train_language, 1),
    "language-2": (train_language, 2),
    "language-3": (train_language, 3),
    "clip-1": (train_clip, 1),
    "clip-2": (train_clip, 2),
    "clip-3": (train_clip, 3),
    "fine-2": (train_fine_tower, 2),
}
SCORE = "score.json"


def save_backbone(name: str, folder: Path, *, steps: int = STEPS) -> None:
    """Train it and save it as the library does; how well it knows its own part, last."""
    train, num_layers = BACKBONES[name]
    torch.set_num_threads(1)
    model = train(num_layers, steps=steps)
    model.save_pretrained(folder)
    figures = {"score": model.score, "parameters": sum(p.numel() for p in model.parameters())}
    (folder / SCORE).write_text(json.dumps(figures) + "\n", encoding="utf-8")


def main() -> None:
    """Parse the command line, train, save."""
    parser = argparse.ArgumentParser(description="Train one backbone of the findings' models.")
    parser.add_argument("name", choices=BACKBONES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args()
    save_backbone(args.name, args.folder, steps=args.steps)


if __name__ == "__main__":
    main()
