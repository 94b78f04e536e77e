"""Batches for nano: pictures drawn ahead in another process, with targets for every loss."""

import multiprocessing
import os
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from scripts.drawing import CHARSET, MAX_CHARS, MAX_LINES, PATCH_PX, PlacedLine, Style, draw_label
from scripts.nano_model import render_prompt
from scripts.reading import draw_reading

# Shape letters: B batch, H and W patch rows and columns, T text length.


@dataclass
class Batch:
    """What the drawing process hands over; one picture size, so nothing is padded."""

    pixels: np.ndarray  # uint8 [B, height, width, 3]
    questions: list[str]
    answers: list[str]
    column_chars: np.ndarray  # int [B, H, W, 2], 0 for none, -100 where nobody should say
    column_slots: np.ndarray  # int [B, H, W, 2], 1 + 8 * line + i
    slot_chars: np.ndarray  # int [B, NUM_LATENTS]


def column_targets(
    lines: list[PlacedLine], rows: int, columns: int
) -> tuple[np.ndarray, np.ndarray]:
    """Which character, and which slot, stands at each half patch (7 px) of a line's middle row.

    Two to a patch, because narrow characters share one. Rows that a line only grazes are ignored.
    """
    chars = np.zeros((rows, columns, 2), dtype=np.int64)
    slots = np.zeros((rows, columns, 2), dtype=np.int64)
    for line in lines:
        grazed = slice(
            max(0, int(line.top_px - 3) // PATCH_PX), int(line.bottom_px + 2) // PATCH_PX + 1
        )
        chars[grazed], slots[grazed] = -100, -100
    for number, line in enumerate(lines):
        row = min(rows - 1, int((line.top_px + line.bottom_px) / 2) // PATCH_PX)
        chars[row], slots[row] = 0, 0
        for index, char in enumerate(line.text):
            for half in range(2 * columns):
                centre = (half + 0.5) * PATCH_PX / 2
                if line.edges_px[index] <= centre < line.edges_px[index + 1]:
                    chars[row, half // 2, half % 2] = 1 + CHARSET.index(char)
                    slots[row, half // 2, half % 2] = 1 + MAX_CHARS * number + index
    return chars, slots


def draw_batch(seed: int, size: int, level: float, max_chars: int) -> Batch:
    """A quarter of the batches are easier than `level`, so that nothing learnt is forgotten."""
    rng = random.Random(seed)
    easier = rng.uniform(0, level) if rng.random() < 0.25 else level
    style = Style.at_level(easier)
    num_lines = rng.choice((1, 2, 3, 3, 3))
    width = rng.randrange(max(70, 14 * (max_chars + 1)), 197, PATCH_PX)
    height = rng.randrange(28 * num_lines, min(140, 28 * num_lines + 42) + 1, PATCH_PX)
    readings, pictures, chars, slots, slot_chars = [], [], [], [], []
    for _ in range(size):
        reading = draw_reading(rng, num_lines, max_chars)
        picture, placed = draw_label(rng, reading.lines, (width, height), style)
        target = column_targets(placed, height // PATCH_PX, width // PATCH_PX)
        readings.append(reading)
        pictures.append(np.asarray(picture))
        chars.append(target[0])
        slots.append(target[1])
        padded = [line.ljust(MAX_CHARS) for line in reading.lines]
        padded += [" " * MAX_CHARS] * (MAX_LINES - num_lines)
        slot_chars.append([1 + CHARSET.find(char) for char in "".join(padded)])
    return Batch(
        pixels=np.stack(pictures),
        questions=[reading.question for reading in readings],
        answers=[reading.answer for reading in readings],
        column_chars=np.stack(chars),
        column_slots=np.stack(slots),
        slot_chars=np.array(slot_chars),
    )


def _draw_on_request(requests, batches) -> None:
    os.nice(5)
    while (request := requests.get()) is not None:
        batches.put(draw_batch(*request))


class Artist:
    """Draws ahead in another process. A request fixes seed and level, so timing changes nothing."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.requests, self.batches = context.Queue(), context.Queue()
        self.process = context.Process(
            target=_draw_on_request, args=(self.requests, self.batches), daemon=True
        )
        self.process.start()

    def ask(self, seed: int, size: int, level: float, max_chars: int) -> None:
        self.requests.put((seed, size, level, max_chars))

    def take(self) -> Batch:
        return self.batches.get(timeout=120)

    def close(self) -> None:
        self.requests.put(None)
        self.process.join(timeout=10)


class Prompts:
    """Prompt ids out of the real processor: it puts a space after the closing fake token."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.ids: dict[str, list[int]] = {}

    def __call__(self, question: str) -> list[int]:
        if question not in self.ids:
            text = render_prompt(self.processor, question)
            blank = Image.new("RGB", (112, 56))
            ids = self.processor(text=[text], images=[[blank]], return_tensors="pt").input_ids
            self.ids[question] = ids[0].tolist()
        return self.ids[question]


def language_inputs(batch: Batch, prompts: Prompts) -> dict[str, torch.Tensor]:
    """Ids, mask and labels [B, T]; learnt are the answer and the end of the utterance."""
    tokenizer = prompts.processor.tokenizer
    end = tokenizer.convert_tokens_to_ids("<end_of_utterance>")
    rows = []
    for question, answer in zip(batch.questions, batch.answers, strict=True):
        ids = tokenizer(" " + answer, add_special_tokens=False).input_ids
        rows.append((prompts(question), [*ids, end]))
    length = max(len(prompt) + len(answer) for prompt, answer in rows)
    input_ids = torch.full((len(rows), length), tokenizer.pad_token_id)
    labels = torch.full((len(rows), length), -100)
    for row, (prompt, answer) in enumerate(rows):
        stop = len(prompt) + len(answer)
        input_ids[row, :stop] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : stop] = torch.tensor(answer)
    mask = (input_ids != tokenizer.pad_token_id).long()
    return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}


def pixel_inputs(batch: Batch) -> torch.Tensor:
    """[B, 1, 3, height, width] as the processor scales it: mean and deviation 0.5."""
    pixels = torch.from_numpy(batch.pixels).permute(0, 3, 1, 2).unsqueeze(1)
    return pixels.float() / 127.5 - 1
