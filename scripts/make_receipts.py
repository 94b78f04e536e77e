"""Draw the quickstart dataset: little labels, tickets and receipts, and their fields as JSON.

    python -m scripts.make_receipts

nano reads such pictures but was never taught JSON, ISO dates or prices as numbers, so the base
scores nothing and what an adapter scores is newly learnt. No code, date or total stands in both
train.jsonl and eval.jsonl.
"""

import argparse
import json
import random
import string
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from scripts.drawing import PATCH_PX, Style, draw_label

QUESTION = "Extract the fields as JSON."


@dataclass(frozen=True)
class Receipt:
    """What is printed, top to bottom, and what an answer must say."""

    code: str
    date: str
    total: str

    @property
    def lines(self) -> list[str]:
        return [self.code, self.date, f"${self.total}"]

    @property
    def answer(self) -> str:
        """The date turned round and given its century, the total without its sign."""
        day, month, year = self.date.split("/")
        fields = {"code": self.code, "date": f"20{year}-{month}-{day}"}
        return json.dumps(fields, separators=(",", ":"))[:-1] + f',"total":{self.total}}}'


def draw_texts(rng: random.Random, count: int) -> list[Receipt]:
    """Receipts of which no two share a code, a date or a total."""
    receipts: list[Receipt] = []
    used: set[str] = set()
    while len(receipts) < count:
        letters = "".join(rng.choices(string.ascii_uppercase, k=2))
        code = letters + "".join(rng.choices(string.digits, k=4))
        date = f"{rng.randint(1, 28):02d}/{rng.randint(1, 12):02d}/{rng.randint(10, 39)}"
        total = f"{rng.randint(1, 199)}.{rng.randint(0, 99):02d}"
        if not used & {code, date, total}:
            used |= {code, date, total}
            receipts.append(Receipt(code, date, total))
    return receipts


def draw_picture(rng: random.Random, receipt: Receipt, *, worn: bool) -> Image.Image:
    """Worn pictures have blur, shadows and noise; less noise than nano saw, to keep JPEG small."""
    size_px = (rng.randrange(140, 197, PATCH_PX), rng.randrange(84, 141, PATCH_PX))
    style = replace(Style.at_level(1.0), wear=float(worn), most_noise=2.0)
    return draw_label(rng, receipt.lines, size_px, style)[0]


def chat_row(image: str, answer: str) -> dict:
    question = [{"type": "image", "image": image}, {"type": "text", "text": QUESTION}]
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
    }


def write_dataset(folder: Path, *, num_train: int, num_eval: int, seed: int) -> None:
    """Half of the pictures are worn and saved as JPEG, half are clean and saved as palette PNG.

    Each picture has its own generator: a FreeType that measures otherwise moves no other row.
    """
    rng = random.Random(seed)
    receipts = draw_texts(rng, num_train + num_eval)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for split, rows in (("train", receipts[:num_train]), ("eval", receipts[num_train:])):
        with (folder / f"{split}.jsonl").open("w", encoding="utf-8", newline="\n") as file:
            for number, receipt in enumerate(rows, 1):
                worn = rng.random() < 0.5
                name = f"images/{split}-{number:04d}.{'jpg' if worn else 'png'}"
                picture = draw_picture(random.Random(f"{seed} {name}"), receipt, worn=worn)
                if worn:
                    picture.save(folder / name, quality=55, optimize=True)
                else:
                    picture.quantize(12).save(folder / name, optimize=True)
                file.write(json.dumps(chat_row(name, receipt.answer)) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the quickstart dataset.")
    default = Path(__file__).parent.parent / "recipes" / "quickstart"
    parser.add_argument("--out", type=Path, default=default)
    parser.add_argument("--num-train", type=int, default=400)
    parser.add_argument("--num-eval", type=int, default=120)
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    write_dataset(args.out, num_train=args.num_train, num_eval=args.num_eval, seed=args.seed)


if __name__ == "__main__":
    main()
