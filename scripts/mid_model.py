"""A random Idefics2 of middle size, its processor, and pictures with questions: what is benched
where no checkpoint and no dataset can be downloaded.

    python -m scripts.mid_model OUT

writes OUT/model, OUT/mixed (a question a picture) and OUT/docvqa (four questions a page), and
prints how the arithmetic of a row is spread over the parts, beside idefics2-8b's.

All edges are half of what the 8B sees (490 and 196 pixels for 980 and 378), and the pictures are
half as large, so that a picture is cut into views of the same proportions.
"""

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.utils.flop_counter import FlopCounterMode
from transformers import Idefics2Config, Idefics2ForConditionalGeneration, Idefics2Processor
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil

from finetune.families.idefics2 import plan_image
from finetune.recipe import ImagesSection
from scripts.drawing import load_font
from scripts.nano_model import CHAT_TEMPLATE, build_tokenizer

LONGEST_EDGE_PX, SHORTEST_EDGE_PX = 490, 196
QUESTIONS = (
    "What is the number in line {} of the {}?",
    "Which value stands at the end of line {} on this {}?",
    "Read the first word of line {} in the {} aloud.",
    "How much is shown in line {} of this {}, and is it the largest one?",
)
ANSWERS = (
    "{:x}",
    "The value is {:,}.",
    "It says {:x}.",
    "It shows {:,}, and it is not the largest.",
)
PAPER, INK = (250, 250, 245), (25, 25, 30)


@dataclass(frozen=True)
class Build:
    """Widths and depths of an Idefics2."""

    text: tuple[int, int, int]
    """Hidden, intermediate, layers."""
    text_heads: tuple[int, int]
    """Of queries, of keys and values."""
    vision: tuple[int, int, int]
    """Hidden, intermediate, layers."""
    vision_heads: int
    perceiver: tuple[int, int, int, int]
    """Latents, depth, heads of queries, of keys and values."""
    perceiver_head_dim: int
    vocabulary: int


# A vocabulary with which the head's share of the text model is near the 8B's
MID = Build((512, 1536, 10), (8, 4), (384, 1536, 6), 6, (64, 3, 8, 4), 64, 1024)
TINY = Build((32, 64, 2), (2, 1), (32, 64, 2), 2, (8, 1, 2, 1), 16, 1024)
FULL = Build((4096, 14336, 32), (32, 8), (1152, 4304, 27), 16, (64, 3, 16, 4), 96, 32003)


def config_of(build: Build, image_token_id: int = 0, pad_token_id: int = 0) -> Idefics2Config:
    """The library's configuration; positions are known for pictures of 980 pixels."""
    hidden, intermediate, layers = build.text
    vision_hidden, vision_intermediate, vision_layers = build.vision
    latents, depth, heads, kv_heads = build.perceiver
    return Idefics2Config(
        image_token_id=image_token_id,
        tie_word_embeddings=False,
        text_config={
            "model_type": "mistral",
            "vocab_size": build.vocabulary,
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": build.text_heads[0],
            "num_key_value_heads": build.text_heads[1],
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-5,
            "pad_token_id": pad_token_id,
        },
        vision_config={
            "hidden_size": vision_hidden,
            "intermediate_size": vision_intermediate,
            "num_hidden_layers": vision_layers,
            "num_attention_heads": build.vision_heads,
            "patch_size": 14,
            "image_size": 980,
        },
        perceiver_config={
            "hidden_size": hidden,
            "resampler_n_latents": latents,
            "resampler_depth": depth,
            "resampler_n_heads": heads,
            "resampler_head_dim": build.perceiver_head_dim,
            "num_key_value_heads": kv_heads,
            "rms_norm_eps": 1e-5,
        },
    )


def save_model(folder: Path, build: Build = MID, shard_size: str = "50GB") -> None:
    """Weights in float32, drawn from one seed, and the processor's files."""
    corpus = [
        text.format(number, kind)
        for kind in DRAWN
        for number in range(40)
        for text in ("User:", "Assistant:", *QUESTIONS, *ANSWERS)
    ]
    tokenizer: Any = build_tokenizer().train_new_from_iterator(
        corpus, vocab_size=build.vocabulary, show_progress=False
    )
    assert len(tokenizer) <= build.vocabulary
    size = {"longest_edge": LONGEST_EDGE_PX, "shortest_edge": SHORTEST_EDGE_PX}
    images = Idefics2ImageProcessorPil(
        do_image_splitting=True, size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    processor: Any = Idefics2Processor(
        images, tokenizer, image_seq_len=build.perceiver[0], chat_template=CHAT_TEMPLATE
    )
    processor.save_pretrained(folder)
    image_token_id = cast(int, tokenizer.convert_tokens_to_ids("<image>"))
    config = config_of(build, image_token_id, tokenizer.pad_token_id)
    torch.manual_seed(0)
    Idefics2ForConditionalGeneration(config).save_pretrained(folder, max_shard_size=shard_size)


def draw_photo(rng: random.Random, width_px: int, height_px: int) -> Image.Image:
    """Soft colours and some round things."""
    coarse = np.random.default_rng(rng.getrandbits(32)).integers(
        0, 256, (height_px // 16 + 1, width_px // 16 + 1, 3), dtype=np.uint8
    )
    picture = Image.fromarray(coarse).resize((width_px, height_px), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(picture)
    for _ in range(8):
        x, y, size = rng.randrange(width_px), rng.randrange(height_px), rng.randrange(10, 80)
        draw.ellipse((x, y, x + size, y + size), fill=_colour(rng))
    return picture


def draw_chart(rng: random.Random, width_px: int, height_px: int) -> Image.Image:
    """Ten bars."""
    picture = Image.new("RGB", (width_px, height_px), "white")
    draw = ImageDraw.Draw(picture)
    for bar in range(10):
        left, top = 10 + bar * width_px // 11, rng.randrange(10, height_px - 20)
        draw.rectangle((left, top, left + width_px // 16, height_px - 10), fill=_colour(rng))
    return picture


def draw_page(rng: random.Random, width_px: int, height_px: int) -> Image.Image:
    """Lines of words and numbers, as on a receipt or a scanned page."""
    picture = Image.new("RGB", (width_px, height_px), PAPER)
    draw, font = ImageDraw.Draw(picture), load_font("DejaVuSansMono", 10)
    for y in range(12, height_px - 12, 15):
        words = " ".join(f"{rng.getrandbits(24):x}" for _ in range(width_px // 48))
        draw.text((12, y), words, font=font, fill=INK)
    return picture


def _colour(rng: random.Random) -> tuple[int, ...]:
    return tuple(rng.randrange(256) for _ in range(3))


DRAWN = {"photo": draw_photo, "chart": draw_chart, "receipt": draw_page, "scan": draw_page}
# Eight of twenty-four pictures are photos, seven charts, six receipts, three scans
KINDS = ("photo", "chart", "receipt", "photo", "chart", "receipt", "photo", "scan") * 2 + (
    ("photo", "chart", "receipt", "photo", "chart", "receipt", "chart", "scan")
)


def size_of(rng: random.Random, kind: str) -> tuple[int, int]:
    """Half of 640 x 480, of charts and receipts as they come, of a page at 200 dots per inch."""
    if kind == "photo":
        return rng.choice(((320, 240), (320, 240), (240, 320)))
    if kind == "chart":
        return rng.randint(150, 450), rng.randint(150, 450)
    if kind == "receipt":
        return rng.randint(200, 450), rng.randint(450, 1000)
    return rng.randint(800, 900), rng.randint(1050, 1150)


def write_rows(
    folder: Path,
    kinds: Sequence[str],
    *,
    questions: int = 1,
    pictures: int = 1,
    size_px: tuple[int, int] | None = None,
    seed: int = 0,
) -> Path:
    """Chat rows with their pictures: of each kind `questions` rows, about the same `pictures`.

    Photos and receipts are JPEG, charts and scans PNG. Gives the path of the rows.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    lines = []
    for number, kind in enumerate(kinds):
        content: list[dict[str, str]] = []
        for part in range(pictures):
            picture = DRAWN[kind](rng, *(size_px or size_of(rng, kind)))
            file = f"{number:03d}-{part}.{'jpg' if kind in ('photo', 'receipt') else 'png'}"
            picture.save(folder / file, quality=85)
            content.append({"type": "image", "image": file})
        for question in range(questions):
            which = (number + question) % len(QUESTIONS)
            asked = QUESTIONS[which].format(rng.randrange(40), kind)
            answer = ANSWERS[which].format(rng.randrange(1 << 20))
            user = {"role": "user", "content": [*content, {"type": "text", "text": asked}]}
            told = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
            lines.append(json.dumps({"messages": [user, told]}) + "\n")
    (folder / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder / "rows.jsonl"


def forward_flops(
    build: Build, views_px: Sequence[tuple[int, int]], text_tokens: int = 40
) -> dict[str, int]:
    """Floating-point operations of the forward pass over one row, by part of the model.

    `views_px` are width and height of its views. Counted by torch on the meta device, each part
    called as the model's own forward does.
    """
    with torch.device("meta"):
        model: Any = Idefics2ForConditionalGeneration(config_of(build))
        inner, vision = model.model, model.model.vision_model
        flops: dict[str, int] = dict.fromkeys(("vision", "connector", "language"), 0)
        for width, height in views_px:
            with FlopCounterMode(display=False) as counted:
                patches = vision.embeddings.patch_embedding(torch.empty(1, 3, height, width))
                hidden = patches.flatten(2).transpose(1, 2)
                hidden = vision.encoder(inputs_embeds=hidden).last_hidden_state
            flops["vision"] += counted.get_total_flops()
            with FlopCounterMode(display=False) as counted:
                context = inner.connector.modality_projection(hidden)
                resampler = inner.connector.perceiver_resampler
                latents = resampler.latents[None]
                for layer in resampler.layers:  # its own forward looks at values of the mask
                    latents = layer(latents, context, attention_mask=None, position_ids=None)
            flops["connector"] += counted.get_total_flops()
        num_tokens = len(views_px) * (build.perceiver[0] + 1) + 1 + text_tokens
        with FlopCounterMode(display=False) as counted:
            embedded = torch.empty(1, num_tokens, build.text[0])
            model.lm_head(inner.text_model(inputs_embeds=embedded).last_hidden_state)
        flops["language"] += counted.get_total_flops()
    return flops


def shares_table() -> str:
    """Where the arithmetic of a row goes, in the 8B and in the model of middle size: Markdown.

    A stock step computes each part three times as much (forward, again for the backward pass, and
    that), so these are its shares, too.
    """
    lines = ["| row | model | parameters | GFLOP forward | vision | connector | language |"]
    lines += ["| --- | --- | --- | --- | --- | --- | --- |"]
    halved = ImagesSection(
        split="always", longest_edge_px=LONGEST_EDGE_PX, shortest_edge_px=SHORTEST_EDGE_PX
    )
    whole = ImagesSection(split="always", longest_edge_px=980, shortest_edge_px=378)
    for row, width, height in (("photo", 640, 480), ("page", 1700, 2200)):
        for model, build, images, part in (
            ("idefics2-8b", FULL, whole, 1),
            ("mid-size", MID, halved, 2),
        ):
            plan = plan_image(width // part, height // part, images)
            flops = forward_flops(build, [(view.width_px, view.height_px) for view in plan.views])
            of_all = sum(flops.values())
            shares = " | ".join(f"{each / of_all:.0%}" for each in flops.values())
            lines.append(
                f"| {row}, {width // part} x {height // part} | {model} | "
                f"{num_parameters(build):,} | {of_all / 1e9:,.0f} | {shares} |"
            )
    return "\n".join(lines)


def num_parameters(build: Build) -> int:
    """Of the whole model."""
    with torch.device("meta"):
        return Idefics2ForConditionalGeneration(config_of(build)).num_parameters()


def main() -> None:
    """Write model and pictures, print the shares."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    folder = parser.parse_args().out
    save_model(folder / "model")
    write_rows(folder / "mixed", KINDS)
    write_rows(folder / "docvqa", ["scan"] * 8, questions=4)
    print(shares_table())


if __name__ == "__main__":
    main()
