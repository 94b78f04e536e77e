import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from finetune.data import examined
from finetune.data.examination import BAD, LEFT_OUT, OVERLONG, USABLE, Examination, examine
from finetune.data.examined import examine_once
from finetune.data.examples import Encoder
from finetune.data.sources import Source, open_source
from finetune.errors import DataError
from finetune.recipe import DataSection, DataSource
from tests.conftest import chat_row, noise, write_rows


@pytest.fixture
def make_source(tmp_path: Path) -> Callable[[int], Source]:
    """Rows with a picture and without, every seventh bad, every fifth too long."""

    def make(count: int) -> Source:
        noise(56, 28).save(tmp_path / "a.png")
        rows = []
        for i in range(count):
            question = "long " * 100 if i % 5 == 4 else f"What is {i}?"
            row = chat_row(question, f"A{i}", *(["a.png"] if i % 2 else []))
            rows.append({"messages": []} if i % 7 == 6 else row)
        write_rows(tmp_path / "rows.jsonl", rows)
        entry = DataSource(path=str(tmp_path / "rows.jsonl"))
        return open_source(entry, DataSection(train=(entry,)), tmp_path / "cache")

    return make


@pytest.fixture
def short(encoder: Encoder) -> Encoder:
    return Encoder(encoder.processor, encoder.family, encoder.images, max_tokens=120)


def test_counts_are_those_of_the_rows_encoded_one_by_one(
    make_source: Callable[[int], Source], short: Encoder, tmp_path: Path
) -> None:
    source = make_source(40)
    found = examine([source], short, findings_file=tmp_path / "f.jsonl", num_processes=1)
    states = []
    for i, line in enumerate(found.counts):
        try:
            example = short.encode(source.row(i))
        except DataError as error:
            states.append(OVERLONG if "too long" in str(error) else BAD)
            continue
        states.append(USABLE)
        assert line["num_tokens"] == len(example.input_ids)
        assert line["num_learnt_tokens"] == sum(example.loss_mask)
        assert line["num_views"] == line["num_images"] == len(example.views)
        assert line["num_view_pixels"] == sum(v.shape[1] * v.shape[2] for v in example.views)
        assert line["num_turns"] == 2
    assert found.counts["state"].tolist() == states
    assert {USABLE, BAD, OVERLONG} == set(states)
    wheres = [finding.where.rpartition(":")[2] for finding in found.findings(*LEFT_OUT)]
    assert wheres == [str(i + 1) for i, state in enumerate(states) if state != USABLE]


def test_processes_find_the_same_as_one(
    make_source: Callable[[int], Source], short: Encoder, tmp_path: Path
) -> None:
    source = make_source(60)
    one = examine([source, source], short, findings_file=tmp_path / "1.jsonl", num_processes=1)
    two = examine([source, source], short, findings_file=tmp_path / "2.jsonl", num_processes=2)
    assert (one.counts == two.counts).all()
    assert (one.image_keys == two.image_keys).all()
    assert list(one.findings()) == list(two.findings())
    assert one.digest() == two.digest()


def test_the_same_picture_has_the_same_key_whatever_its_name(
    encoder: Encoder, tmp_path: Path
) -> None:
    noise(20, 10).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes())
    noise(20, 10, seed=1).save(tmp_path / "c.png")
    rows = [chat_row("q", "a", "a.png"), chat_row("Q ", "b", "b.png"), chat_row("r", "a", "c.png")]
    write_rows(tmp_path / "rows.jsonl", rows)
    entry = DataSource(path=str(tmp_path / "rows.jsonl"))
    source = open_source(entry, DataSection(train=(entry,)), tmp_path / "cache")
    found = examine([source], encoder, findings_file=tmp_path / "f.jsonl")
    assert found.image_keys[0] == found.image_keys[1] != found.image_keys[2]
    questions = found.counts["question_key"]
    assert questions[0] == questions[1] != questions[2]  # case and spaces do not count
    assert len(np.unique(found.counts["row_key"])) == 3


def test_a_worker_that_dies_is_an_error_and_not_a_hang(
    make_source: Callable[[int], Source],
    short: Encoder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import os

    monkeypatch.setattr(Encoder, "count_many", lambda self, rows: os._exit(9))
    with pytest.raises(DataError, match="was killed, most often for want of memory"):
        examine([make_source(40)], short, findings_file=tmp_path / "f.jsonl", num_processes=2)


def times_examined(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    times: list[int] = []

    def counting(*args: object, **kwargs: object) -> Examination:
        times.append(1)
        return examine(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(examined, "examine", counting)
    return times


def test_rows_are_examined_once_until_their_file_changes(
    make_source: Callable[[int], Source],
    short: Encoder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    times = times_examined(monkeypatch)
    cache = tmp_path / "cache"
    first, was_kept = examine_once([make_source(20)], short, cache)
    assert not was_kept
    kept, was_kept = examine_once([make_source_again(tmp_path)], short, cache)
    assert was_kept
    assert (kept.counts == first.counts).all()
    assert list(kept.findings()) == list(first.findings())
    assert len(times) == 1
    examine_once([make_source_again(tmp_path)], short, cache, again=True)
    assert len(times) == 2
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write(json.dumps(chat_row("one", "more")) + "\n")
    longer, was_kept = examine_once([make_source_again(tmp_path)], short, cache)
    assert not was_kept
    assert len(longer.counts) == 21


def make_source_again(folder: Path) -> Source:
    entry = DataSource(path=str(folder / "rows.jsonl"))
    return open_source(entry, DataSection(train=(entry,)), folder / "cache")


@pytest.mark.parametrize("change", [{"max_tokens": 60}, {"overlong": "drop_turns"}])
def test_other_settings_are_examined_anew(
    make_source: Callable[[int], Source], short: Encoder, tmp_path: Path, change: dict[str, object]
) -> None:
    source = make_source(20)
    examine_once([source], short, tmp_path / "cache")
    settings = {"max_tokens": 120, "overlong": "stop"} | change
    other = Encoder(short.processor, short.family, short.images, **settings)  # type: ignore[arg-type]
    assert not examine_once([source], other, tmp_path / "cache")[1]


@pytest.mark.parametrize("file", ["counts.npy", "image_keys.npy", "findings.jsonl"])
def test_a_damaged_examination_is_made_again(
    make_source: Callable[[int], Source], short: Encoder, tmp_path: Path, file: str
) -> None:
    source = make_source(20)
    made = examine_once([source], short, tmp_path / "cache")[0].counts.copy()
    (folder,) = (tmp_path / "cache").glob("rows-*")
    (folder / file).unlink() if file.endswith("jsonl") else (folder / file).write_bytes(b"x")
    again, was_kept = examine_once([source], short, tmp_path / "cache")
    assert not was_kept
    assert (again.counts == made).all()


def test_a_cache_that_cannot_be_written_stops_nothing(
    make_source: Callable[[int], Source], short: Encoder, tmp_path: Path
) -> None:
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where the folder should be")
    found, was_kept = examine_once([make_source(20)], short, blocked)
    assert not was_kept
    assert found.num_of(USABLE)


def test_what_older_code_found_is_not_believed(
    make_source: Callable[[int], Source],
    short: Encoder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = make_source(20)
    examine_once([source], short, tmp_path / "cache")
    assert examine_once([source], short, tmp_path / "cache")[1]
    monkeypatch.setattr(examined, "code_digest", lambda: "another")
    assert not examine_once([source], short, tmp_path / "cache")[1]


def picture_source(folder: Path) -> Source:
    write_rows(folder / "p.jsonl", [chat_row("q", f"a{i}", f"p{i}.png") for i in range(6)])
    entry = DataSource(path=str(folder / "p.jsonl"))
    return open_source(entry, DataSection(train=(entry,)), folder / "cache")


def test_a_picture_that_was_mended_is_no_longer_bad(short: Encoder, tmp_path: Path) -> None:
    for i in range(5):
        noise(28, 28, seed=i).save(tmp_path / f"p{i}.png")
    source = picture_source(tmp_path)
    found, _ = examine_once([source], short, tmp_path / "cache")
    assert found.num_of(BAD) == 1
    noise(28, 28, seed=5).save(tmp_path / "p5.png")
    mended, was_kept = examine_once([source], short, tmp_path / "cache")
    assert not was_kept
    assert mended.num_of(BAD) == 0
    assert examine_once([source], short, tmp_path / "cache")[1]


def test_a_picture_that_was_exchanged_is_seen(short: Encoder, tmp_path: Path) -> None:
    for i in range(6):
        noise(28, 28, seed=i).save(tmp_path / f"p{i}.png")
    source = picture_source(tmp_path)
    before = examine_once([source], short, tmp_path / "cache")[0]
    digest = before.digest()
    noise(56, 28, seed=9).save(tmp_path / "p3.png")
    after, was_kept = examine_once([source], short, tmp_path / "cache")
    assert not was_kept
    assert after.digest() != digest


def test_some_of_the_rows_have_their_own_pictures_and_findings(
    make_source: Callable[[int], Source], short: Encoder, tmp_path: Path
) -> None:
    found = examine([make_source(40)], short, findings_file=tmp_path / "f.jsonl")
    rows = np.array([0, 1, 3, 4, 6, 9, 13])
    some = found.of_rows(rows)
    assert (some.counts == found.counts[rows]).all()
    assert len(some.image_keys) == some.counts["num_images"].sum() == 2
    assert [finding.row for finding in some.findings()] == [4, 6, 9, 13]
