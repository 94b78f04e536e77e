"""Build and train nano, the embedded default model: a real Idefics2 of 2.4 million parameters.

    python -m scripts.make_nano

It reads up to three short lines of drawn text. One process draws, one trains, each on one core.
nano_model.py builds it, nano_batches.py draws for it; here are the losses, the curriculum, the
loop, and the check of each saved checkpoint through the processor and `generate()`.
docs/nano.md has the log's key lines and says what came out.
"""

import argparse
import json
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForImageTextToText, AutoProcessor

from scripts.drawing import CHARSET, MAX_CHARS, PATCH_PX, Style, draw_label
from scripts.nano_batches import Artist, Batch, Prompts, language_inputs, pixel_inputs
from scripts.nano_model import (
    HIDDEN,
    NUM_LATENTS,
    build_model,
    build_processor,
    build_tokenizer,
    read,
    save,
)
from scripts.reading import QUESTIONS, draw_reading

# Shape letters: B batch, N patches, L latents, D hidden size.
# (first step, level of the pictures).
LEVELS = ((1800, 1.0),)


class Teacher(nn.Module):
    """Training-only heads: what stands in each half patch, and what each latent should hold."""

    def __init__(self) -> None:
        super().__init__()
        self.column_char = nn.Linear(HIDDEN, 2 * (1 + len(CHARSET)))
        self.column_slot = nn.Linear(HIDDEN, 2 * (1 + NUM_LATENTS))
        self.latent_char = nn.Linear(HIDDEN, 1 + len(CHARSET))

    def forward(
        self, vision_BND: torch.Tensor, latents_BLD: torch.Tensor, batch: Batch
    ) -> tuple[torch.Tensor, dict[str, float]]:
        chars = torch.from_numpy(batch.column_chars).flatten()
        slots = torch.from_numpy(batch.column_slots).flatten()
        held = torch.from_numpy(batch.slot_chars).flatten()
        char_logits = self.column_char(vision_BND).float().view(len(chars), -1)
        slot_logits = self.column_slot(vision_BND).float().view(len(slots), -1)
        held_logits = self.latent_char(latents_BLD).float().view(len(held), -1)
        # Most of a picture is paper: "nothing here" counts a fifth, or it drowns the letters.
        paper = torch.ones(1 + len(CHARSET)).index_fill_(0, torch.tensor([0]), 0.2)
        loss = (
            cross_entropy(char_logits, chars, weight=paper)
            + cross_entropy(slot_logits, slots, weight=paper[: 1 + NUM_LATENTS])
            + cross_entropy(held_logits, held)
        )
        text, shown = chars > 0, held > 0
        return loss, {
            "column": (char_logits.argmax(-1) == chars)[text].float().mean().item(),
            "order": (slot_logits.argmax(-1) == slots)[text].float().mean().item(),
            "latent": (held_logits.argmax(-1) == held)[shown].float().mean().item(),
        }


@dataclass
class Curriculum:
    """Longer lines, each earned by what the latents hold; then harder pictures, by the step."""

    max_chars: int = 4
    level: float = 0.0
    reads: bool = False  # the language loss joins once the latents hold something to read
    since: int = 0
    latent: float = 0.0

    def advance(self, step: int, latent: float) -> None:
        self.latent += 0.04 * (latent - self.latent)
        self.since += 1
        self.reads = self.reads or self.latent > 0.5
        if self.max_chars < MAX_CHARS and self.latent > 0.7 and self.since >= 40:
            self.max_chars, self.since = self.max_chars + 1, 0
        self.level = max([level for first, level in LEVELS if step >= first], default=0.0)


def train(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer()
    processor = build_processor(tokenizer)
    model, teacher, curriculum = build_model(tokenizer), Teacher(), Curriculum()
    parameters = [*model.parameters(), *teacher.parameters()]
    optimizer = torch.optim.AdamW(
        parameters, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    first = 0
    if args.resume:
        state = torch.load(args.resume, weights_only=True)
        model.load_state_dict(state["model"])
        teacher.load_state_dict(state["teacher"])
        optimizer.load_state_dict(state["optimizer"])
        curriculum, first = Curriculum(**state["curriculum"]), state["step"]
    num_parameters = sum(p.numel() for p in model.parameters())
    log(f"{num_parameters:,} parameters, {len(tokenizer)} pieces, {len(QUESTIONS)} questions")

    seen: dict[str, torch.Tensor] = {}
    model.model.vision_model.register_forward_hook(
        lambda module, inputs, output: seen.update(vision=output.last_hidden_state)
    )
    prompts, artist, means = Prompts(processor), Artist(), {}
    ahead = 4
    for step in range(first, first + ahead):
        artist.ask(
            args.seed * 10**6 + step, args.batch_size, curriculum.level, curriculum.max_chars
        )
    started = time.monotonic()
    model.train()
    for step in range(first, args.steps):
        batch = artist.take()
        seed = args.seed * 10**6 + step + ahead
        artist.ask(seed, args.batch_size, curriculum.level, curriculum.max_chars)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * lr_share(step, args.steps, args.decay_from)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            losses = {}
            # The library types these loosely: a tuple, or what the forward really gives
            features: Any = model.get_image_features(pixel_inputs(batch))
            latents = torch.stack(list(features.pooler_output))
            # Seeing is the bottleneck: until the decay, reading is practised every third step.
            if curriculum.reads and (step % 3 == 0 or step >= args.decay_from * args.steps):
                inputs = language_inputs(batch, prompts)
                labels = inputs.pop("labels")
                output = model(**inputs, mm_encoder_outputs={"image": features}, use_cache=False)
                losses["language"] = cross_entropy(
                    output.logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten()
                )
            losses["teacher"], accuracies = teacher(seen["vision"], latents, batch)
            loss = torch.stack(list(losses.values())).sum()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        curriculum.advance(step, accuracies["latent"])
        for name, value in {**{k: v.item() for k, v in losses.items()}, **accuracies}.items():
            means[name] = means.get(name, value) + 0.05 * (value - means.get(name, value))
        if (step + 1) % 50 == 0:
            minutes = (time.monotonic() - started) / 60
            figures = " ".join(f"{name} {value:.3f}" for name, value in means.items())
            log(
                f"step {step + 1} min {minutes:.1f} chars {curriculum.max_chars} "
                f"level {curriculum.level:.2f} {figures}"
            )
        if (step + 1) % args.check_every == 0 or step + 1 == args.steps:
            torch.save(
                {
                    "model": model.state_dict(),
                    "teacher": teacher.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "curriculum": dict(vars(curriculum)),
                    "step": step + 1,
                },
                args.work / "state.pt",
            )
            if curriculum.reads:
                save(model, processor, args.out)
                log(f"step {step + 1} read back: {check(args.out, curriculum.level)}")
    artist.close()


def lr_share(step: int, steps: int, decay_from: float) -> float:
    """Warmup over 100 steps, then flat, then from `decay_from` on a cosine down to 2%."""
    done = step / steps
    if done < decay_from:
        return min(1.0, (step + 1) / 100)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (done - decay_from) / (1 - decay_from)))


@torch.no_grad()
def check(folder: Path, level: float, num_pictures: int = 64) -> str:
    """Exact match of the saved folder, loaded by plain transformers, now and at level 1."""
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    scores = {}
    for name, style in {"now": Style.at_level(level), "full": Style.at_level(1.0)}.items():
        rng = random.Random(f"check {name}")
        right = {"all": 0, "one": 0}
        asked = {"all": 0, "one": 0}
        for _ in range(num_pictures // 16):
            pictures, readings = [], []
            for _ in range(16):
                reading = draw_reading(rng, 3, MAX_CHARS)
                size = (rng.randrange(126, 197, PATCH_PX), rng.randrange(84, 127, PATCH_PX))
                pictures.append(draw_label(rng, reading.lines, size, style)[0])
                readings.append(reading)
            answers = read(model, processor, pictures, [r.question for r in readings])
            for reading, answer in zip(readings, answers, strict=True):
                kind = "one" if reading.answer in reading.lines else "all"
                asked[kind] += 1
                right[kind] += answer == reading.answer
        scores[name] = {kind: round(right[kind] / asked[kind], 3) for kind in asked}
    return json.dumps(scores)


def log(line: str) -> None:
    print(line, flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Build and train nano, the embedded model.")
    package = Path(__file__).parent.parent / "finetune"
    parser.add_argument("--out", type=Path, default=package / "nano")
    parser.add_argument("--work", type=Path, default=Path("runs/make_nano"), help="state.pt")
    parser.add_argument("--resume", type=Path, help="a state.pt to go on from")
    parser.add_argument("--steps", type=int, default=6150)
    parser.add_argument("--decay-from", type=float, default=0.715, help="share of steps at full lr")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--check-every", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    return args


if __name__ == "__main__":
    train(parse_arguments())
