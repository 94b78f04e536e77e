"""The quickstart dataset: what is promised about its rows."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from scripts.make_receipts import write_dataset

DATASET = Path(__file__).parent.parent / "recipes" / "quickstart"
SPLITS = ("train", "eval")


def rows(split: str) -> list[dict]:
    lines = (DATASET / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def field_texts(split: str) -> set[str]:
    """Every code, date and total as the answer writes it."""
    texts: set[str] = set()
    for row in rows(split):
        answer = row["messages"][1]["content"][0]["text"]
        texts |= set(json.loads(answer, parse_float=str).values())
    return texts


def test_train_and_held_out_rows_share_no_field_text() -> None:
    assert len(field_texts("train")) == 3 * len(rows("train"))
    assert not field_texts("train") & field_texts("eval")


@pytest.mark.parametrize("split", SPLITS)
def test_every_picture_of_a_shipped_row_opens(split: str) -> None:
    for row in rows(split):
        path = DATASET / row["messages"][0]["content"][0]["image"]
        with Image.open(path) as picture:
            picture.convert("RGB")
            assert 140 <= picture.width <= 224, path
            assert 84 <= picture.height <= 140, path


def test_no_picture_is_left_over() -> None:
    named = {row["messages"][0]["content"][0]["image"] for split in SPLITS for row in rows(split)}
    assert named == {f"images/{path.name}" for path in (DATASET / "images").iterdir()}


def test_answers_turn_the_date_round_and_leave_the_currency_out() -> None:
    shape = re.compile(
        r'\{"code":"[A-Z]{2}\d{4}","date":"20\d\d-\d\d-\d\d","total":\d{1,3}\.\d\d\}'
    )
    for split in SPLITS:
        for row in rows(split):
            assert shape.fullmatch(row["messages"][1]["content"][0]["text"])


def test_the_script_writes_the_shipped_rows_again(tmp_path: Path) -> None:
    write_dataset(tmp_path, num_train=len(rows("train")), num_eval=len(rows("eval")), seed=7)
    for split in SPLITS:
        written = (tmp_path / f"{split}.jsonl").read_bytes()
        assert written == (DATASET / f"{split}.jsonl").read_bytes()
        for row in rows(split):
            assert (tmp_path / row["messages"][0]["content"][0]["image"]).is_file()
