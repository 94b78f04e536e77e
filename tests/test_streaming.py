import gzip
import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from torch.utils.data import DataLoader

from finetune.data import streaming
from finetune.data.augment import Augmentation
from finetune.data.containers import streams
from finetune.data.examination import Finding
from finetune.data.examples import Encoder
from finetune.data.sources import open_stream_source
from finetune.data.streaming import ExampleStream, Position, StreamCollator, StreamedExample
from finetune.errors import DataError, RecipeError, RunDirError
from finetune.recipe import Columns, DataSection, DataSource, load_recipe
from finetune.rundir import RunDir, read_json, read_jsonl
from finetune.stream_lists import StreamLists
from finetune.train import train
from tests.conftest import chat_row, noise, write_rows


@pytest.fixture(autouse=True)
def _small_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "WINDOW", 8)


@pytest.fixture
def make_stream(encoder: Encoder, tmp_path: Path) -> Callable[..., ExampleStream]:
    """A stream of the files' rows, whole or as questions; one that asks `bad` is no row."""

    def make(files: dict[str, list[Any]], **settings: Any) -> ExampleStream:
        sources = []
        weights = settings.pop("weights", [1.0] * len(files))
        for (name, questions), weight in zip(files.items(), weights, strict=True):
            write_rows(
                tmp_path / f"{name}.jsonl",
                [
                    q
                    if isinstance(q, dict)
                    else chat_row(q, "x")
                    if q != "bad"
                    else {"messages": []}
                    for q in questions
                ],
            )
            entry = DataSource(
                path=str(tmp_path / f"{name}.jsonl"), format="chat", streaming=True, weight=weight
            )
            sources.append(open_stream_source(entry, DataSection(train=(entry,)), tmp_path / "c"))
        defaults = {"seed": 0, "skip_bad": True, "skip_overlong": True}
        return ExampleStream(sources, encoder, **(defaults | settings))

    return make


def wheres(items: Iterable[StreamedExample]) -> list[str]:
    return [item.example.where.rpartition("/")[2] for item in items]


def names(prefix: str, count: int) -> list[str]:
    return [f"{prefix}{i}" for i in range(count)]


def test_every_row_comes_once_an_epoch_in_another_order_each(
    make_stream: Callable[..., ExampleStream],
) -> None:
    both = wheres(islice(make_stream({"a": names("q", 30)}), 60))
    first, second = both[:30], both[30:]
    assert sorted(first) == sorted(second) == sorted(f"a.jsonl:{i + 1}" for i in range(30))
    assert first != second


@pytest.mark.parametrize(("num_ranks", "num_workers"), [(1, 2), (2, 1), (3, 0), (2, 2)])
def test_no_row_is_read_twice_by_any_number_of_processes(
    make_stream: Callable[..., ExampleStream], num_ranks: int, num_workers: int
) -> None:
    """Each rank's loader is stopped after its share of one epoch, with real loading processes."""
    files = {"a": names("q", 24), "b": names("r", 12)}
    seen: Counter[str] = Counter()
    for rank in range(num_ranks):
        stream = make_stream(files, rank=rank, num_ranks=num_ranks)
        loader = DataLoader(stream, batch_size=None, num_workers=num_workers)
        seen.update(wheres(islice(iter(loader), 36 // num_ranks)))
    assert set(seen.values()) == {1}
    assert len(seen) == 36


def test_sources_are_mixed_by_their_weights_while_both_last(
    make_stream: Callable[..., ExampleStream],
) -> None:
    stream = make_stream({"a": names("q", 80), "b": names("r", 80)}, weights=[3.0, 1.0])
    drawn = wheres(islice(stream, 80))
    assert sum(where.startswith("a") for where in drawn) == 60
    rest = wheres(islice(stream, 160))
    assert len(set(rest)) == 160  # and still each row once


@pytest.mark.parametrize("stop", [1, 7, 8, 20, 39, 40, 41, 75])
def test_going_on_from_a_position_gives_what_would_have_come(
    make_stream: Callable[..., ExampleStream], stop: int
) -> None:
    questions = names("q", 21)
    questions[3] = questions[12] = "bad"
    files = {"a": questions, "b": names("r", 22)}
    unbroken = list(islice(make_stream(files, weights=[2.0, 1.0]), 90))
    position = Position.from_json(unbroken[stop - 1].position.to_json())
    resumed = make_stream(files, weights=[2.0, 1.0], positions={0: position})
    assert wheres(islice(resumed, 90 - stop)) == wheres(unbroken[stop:])


def write_shards(kind: str, folder: Path, num_rows: int = 90, num_shards: int = 3) -> Path:
    """So many rows with pictures, over files of one kind."""
    folder.mkdir()
    each = num_rows // num_shards
    for shard in range(num_shards):
        questions = [f"q{i}" for i in range(shard * each, (shard + 1) * each)]
        file = folder / f"part-{shard}"
        match kind:
            case "jsonl":
                write_rows(file.with_suffix(".jsonl"), [chat_row(q, "x") for q in questions])
            case "jsonl, gzip":
                lines = "".join(json.dumps(chat_row(q, "x")) + "\n" for q in questions)
                file.with_suffix(".jsonl.gz").write_bytes(gzip.compress(lines.encode()))
            case "parquet":
                rows = [chat_row(question, "x") for question in questions]
                table = pa.Table.from_pylist(rows)
                pq.write_table(table, file.with_suffix(".parquet"), row_group_size=7)
            case "tar":
                with tarfile.open(file.with_suffix(".tar"), "w") as archive:
                    for question in questions:
                        add(archive, f"{question}.png", png(28, 28))
                        add(archive, f"{question}.json", json.dumps(tar_row(question)).encode())
    return folder


def tar_row(question: str) -> dict[str, Any]:
    return {"image": f"{question}.png", "question": question, "answer": "x"}


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


def png(width_px: int, height_px: int) -> bytes:
    file = io.BytesIO()
    noise(width_px, height_px).save(file, "PNG")
    return file.getvalue()


SHARDS = ("jsonl", "jsonl, gzip", "parquet", "tar")
TAR_COLUMNS = Columns(image="image", question="question", answer="answer")


def stream_of(path: Path, encoder: Encoder, **settings: Any) -> ExampleStream:
    columns = TAR_COLUMNS if next(path.iterdir()).suffix == ".tar" else None
    entry = DataSource(path=str(path), columns=columns, streaming=True)
    source = open_stream_source(entry, DataSection(train=(entry,)), path / "cache")
    return ExampleStream([source], encoder, seed=0, skip_bad=False, skip_overlong=False, **settings)


@pytest.mark.parametrize("num_consumers", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", SHARDS)
def test_an_epoch_of_all_processes_has_each_row_of_all_shards_once(
    kind: str, num_consumers: int, encoder: Encoder, tmp_path: Path
) -> None:
    """Three shards: dealt out whole to one and to three, shared by two and by four."""
    path = write_shards(kind, tmp_path / "rows")
    seen: Counter[str] = Counter()
    for rank in range(num_consumers):
        stream = stream_of(path, encoder, rank=rank, num_ranks=num_consumers)
        mine = wheres(takewhile(lambda item: item.position.epoch == 0, stream))
        assert len(mine) <= streams.UNEVEN * 90 / num_consumers
        seen.update(mine)
    assert len(seen) == 90
    assert set(seen.values()) == {1}


@pytest.mark.parametrize("num_consumers", [1, 4])
@pytest.mark.parametrize("kind", SHARDS)
def test_going_on_mid_shard_gives_what_would_have_come(
    kind: str, num_consumers: int, encoder: Encoder, tmp_path: Path
) -> None:
    path = write_shards(kind, tmp_path / "rows")
    for rank in range(num_consumers):
        processes = {"rank": rank, "num_ranks": num_consumers}
        unbroken = list(islice(stream_of(path, encoder, **processes), 200 // num_consumers))
        for stop in (1, 8, 13, 30, 31, 44):
            position = Position.from_json(
                json.loads(json.dumps(unbroken[stop - 1].position.to_json()))
            )
            resumed = stream_of(path, encoder, positions={rank: position}, **processes)
            rest = wheres(islice(resumed, len(unbroken) - stop))
            assert rest == wheres(unbroken[stop:])


@pytest.mark.parametrize("kind", SHARDS)
def test_going_on_reads_no_shard_before(kind: str, encoder: Encoder, tmp_path: Path) -> None:
    path = write_shards(kind, tmp_path / "rows")
    unbroken = list(islice(stream_of(path, encoder), 90))
    resumed = stream_of(path, encoder, positions={0: unbroken[75].position})
    for file in sorted(path.iterdir())[:2]:
        file.unlink()
    assert wheres(islice(resumed, 14)) == wheres(unbroken[76:])
    resumed.positions = {}
    with pytest.raises(DataError, match=r"part-0.* cannot be read"):
        next(iter(resumed))


def write_over(file: Path, span: slice, byte: bytes) -> None:
    """Without a trace in the file's size and time."""
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns
    content = bytearray(file.read_bytes())
    content[span] = byte * len(content[span])
    file.write_bytes(content)
    os.utime(file, ns=times)


def test_one_parquet_file_is_dealt_out_by_its_row_groups(encoder: Encoder, tmp_path: Path) -> None:
    """The first group is damaged, which only its reader can notice."""
    path = write_shards("parquet", tmp_path / "rows", num_rows=84, num_shards=1)  # 12 groups
    first, second = (stream_of(path, encoder, rank=rank, num_ranks=3) for rank in range(2))
    (file,) = path.iterdir()
    write_over(file, slice(4, 60), b"\xff")
    rows = wheres(takewhile(lambda item: item.position.epoch == 0, second))
    groups = (range(8, 15), range(29, 36), range(50, 57), range(71, 78))
    expected = [f"part-0.parquet:{i}" for group in groups for i in group]
    assert sorted(rows) == sorted(expected)
    with pytest.raises(DataError, match="damaged"):
        next(iter(first))


def test_going_on_in_lines_begins_at_the_line(encoder: Encoder, tmp_path: Path) -> None:
    """Those before are written over, which only their reader can notice."""
    path = write_shards("jsonl", tmp_path / "rows", num_shards=1)
    unbroken = list(islice(stream_of(path, encoder), 90))
    resumed = stream_of(path, encoder, positions={0: unbroken[48].position})
    (file,) = path.iterdir()
    num_bytes = sum(map(len, file.read_bytes().splitlines(keepends=True)[:48]))
    write_over(file, slice(num_bytes), b"\n")
    assert wheres(islice(resumed, 41)) == wheres(unbroken[49:])


def test_a_changed_row_is_changed_the_same_way_after_going_on(
    make_stream: Callable[..., ExampleStream], tmp_path: Path
) -> None:
    """Each draw is of the row's place in its stream: epochs differ, interrupted runs do not."""
    noise(30, 40).save(tmp_path / "a.png")
    rows = [chat_row(question, "x", "a.png") for question in names("q", 11)]
    for row in rows:
        row["messages"] += chat_row("more?", "y")["messages"]
    augmentation = Augmentation(3.0, shuffle_turns=True, seed=0)
    stream = make_stream({"a": rows}, augmentation=augmentation)
    unbroken = list(islice(stream, 30))
    shapes: dict[str, set[Any]] = {}
    for item in unbroken:
        seen = (item.example.views[0].shape, tuple(item.example.input_ids))
        shapes.setdefault(item.example.where, set()).add(seen)
    assert all(len(seen) > 1 for seen in shapes.values())
    for stop in (1, 9, 14):
        position = Position.from_json(unbroken[stop - 1].position.to_json())
        stream.positions = {0: position}
        for now, before in zip(islice(stream, 30 - stop), unbroken[stop:], strict=True):
            assert now.example.input_ids == before.example.input_ids
            assert np.array_equal(now.example.views[0], before.example.views[0])


def test_rows_taken_are_rows_trained_plus_rows_listed(
    make_stream: Callable[..., ExampleStream],
) -> None:
    questions = names("q", 20)
    questions[0] = questions[7] = questions[19] = "bad"
    items = list(islice(make_stream({"a": questions}), 17 * 3))
    listed = [finding for item in items for finding in item.findings]
    assert sum(item.num_taken for item in items) == len(items) + len(listed)
    assert {f.where.rpartition(":")[2] for f in listed} <= {"1", "8", "20"}


def test_a_bad_row_stops_a_stream_that_may_not_skip(
    make_stream: Callable[..., ExampleStream],
) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl:2: .*'messages'"):
        list(islice(make_stream({"a": ["q", "bad"]}, skip_bad=False), 4))


def test_a_stream_without_a_usable_row_ends_in_an_error_and_not_in_a_loop(
    make_stream: Callable[..., ExampleStream],
) -> None:
    with pytest.raises(DataError, match="no usable row for loading process 0 of 1"):
        next(iter(make_stream({"a": ["bad", "bad"]})))


def test_a_process_without_a_row_leaves_the_rows_to_the_others(
    make_stream: Callable[..., ExampleStream],
) -> None:
    loader = DataLoader(make_stream({"a": ["q0"]}), batch_size=None, num_workers=2)
    assert wheres(islice(iter(loader), 5)) == ["a.jsonl:1"] * 5


def test_lists_go_on_after_a_line_that_was_not_finished(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    StreamLists(run).add([Finding("bad", "a.jsonl:1", "is no row")])
    run.skipped.write_text(run.skipped.read_text() + '{"where": "a.js')
    StreamLists(run).add([Finding("bad", "a.jsonl:2", "is no row")])
    assert [line["where"] for line in read_jsonl(run.skipped)] == ["a.jsonl:1", "a.jsonl:2"]


def test_a_stream_whose_file_changed_is_not_resumed(
    dataset: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = load_recipe(stream_recipe(dataset, max_steps=2))
    assert train(recipe) == 0
    lines = (tmp_path / "train.jsonl").read_text().splitlines()
    (tmp_path / "train.jsonl").write_text("\n".join(lines[2:]))
    with pytest.raises(RunDirError, match="the rows in the data files"):
        train(recipe, resume=True)


def test_a_batch_tells_where_its_last_row_stood(
    make_stream: Callable[..., ExampleStream], encoder: Encoder
) -> None:
    items = list(islice(make_stream({"a": names("q", 5)}), 4))
    batch = StreamCollator(encoder)(items)
    assert batch["input_ids"].shape[0] == 4
    assert batch["stream"]["num_taken"] == 4
    assert Position.from_json(batch["stream"]["position"]) == items[-1].position


def stream_recipe(dataset: Callable[..., Path], **training: Any) -> Path:
    recipe = dataset(training={"max_steps": 6, "batch_size": 2, "num_workers": 1} | training)
    text = recipe.read_text().replace('train.jsonl"}', 'train.jsonl", "streaming": true}')
    recipe.write_text(text)
    assert load_recipe(recipe).data.train[0].streaming
    return recipe


def test_a_streamed_run_resumed_ends_as_an_unbroken_one(
    dataset: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = load_recipe(stream_recipe(dataset), ["data.bad_rows=skip", "adapter.dropout=0.2"])
    lines = (tmp_path / "train.jsonl").read_text().splitlines()
    lines[5] = "{"
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    assert train(recipe) == 0
    run = RunDir(tmp_path / "run")
    summary = read_json(run.summary)
    assert (summary["num_train_rows"], summary["num_skipped_rows"]) == (12, 1)
    assert [row["where"].rpartition("/")[2] for row in read_jsonl(run.skipped)] == ["train.jsonl:6"]
    unbroken = (run.adapter / "adapter_model.safetensors").read_bytes()
    # as if it had been killed after the checkpoint at step 4
    for checkpoint in run.checkpoints.iterdir():
        if checkpoint.name == "checkpoint-6":
            for file in sorted(checkpoint.rglob("*"), reverse=True):
                file.unlink()
            checkpoint.rmdir()
    assert train(recipe, resume=True) == 0
    assert (run.adapter / "adapter_model.safetensors").read_bytes() == unbroken
    assert read_json(run.summary)["num_train_rows"] == 12
    assert len(read_jsonl(run.skipped)) == 1


def test_a_row_left_out_in_every_epoch_is_listed_once(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    bad = Finding("bad", "a.jsonl:1", "is no row")
    changed = Finding("changed", "a.jsonl:2", "1 of 2 exchanges dropped", "dropped")
    for _ in range(2):
        lists = StreamLists(run)  # a resumed run knows what the one before has listed
        lists.add([bad, changed])
        lists.add([changed, bad])
    assert [line["where"] for line in read_jsonl(run.skipped)] == ["a.jsonl:1"]
    assert [line["where"] for line in read_jsonl(run.changed)] == ["a.jsonl:2"]


def test_a_stream_is_not_resumed_with_another_number_of_processes(
    dataset: Callable[..., Path], tmp_path: Path
) -> None:
    path = stream_recipe(dataset, num_workers=2, max_steps=3)
    assert train(load_recipe(path)) == 0
    state = next(RunDir(tmp_path / "run").checkpoints.glob("*-2/stream-0.json"))
    assert set(read_json(state)["positions"]) == {"0", "1"}
    last = tmp_path / "run" / "checkpoints" / "checkpoint-3"
    (last / "trainer_state.json").unlink()  # not whole, so the one before it counts
    changed = load_recipe(path, ["training.num_workers=1"])
    (tmp_path / "run" / "recipe.yaml").write_text(
        (tmp_path / "run" / "recipe.yaml").read_text().replace("num_workers: 2", "num_workers: 1")
    )
    with pytest.raises(RunDirError, match="another number of loading or training processes"):
        train(changed, resume=True)


def test_streams_need_a_number_of_steps_and_cannot_be_mixed_or_carved(
    dataset: Callable[..., Path],
) -> None:
    recipe = dataset(training={"epochs": 1, "max_steps": None}, num_eval=0)
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe, ["data.train.0.streaming=true", "data.eval_fraction=0.1"])
    assert "set training.max_steps" in str(caught.value)
    assert "data.eval_fraction: needs all rows before training" in str(caught.value)
