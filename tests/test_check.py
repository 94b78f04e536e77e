import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from data_formats.chat import parse_chat
from finetune import cli
from finetune.check import CheckResult, check, print_check
from finetune.recipe import load_recipe
from finetune.rundir import read_jsonl
from finetune.train import train
from tests.conftest import chat_row, noise, write_rows

QUIET = Console(quiet=True)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit code of the command line, in this process."""
    monkeypatch.setattr(sys, "argv", ["finetune", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)


def checked(recipe: Path, *overrides: str) -> CheckResult:
    return check(load_recipe(recipe, overrides), "recipe", console=QUIET)


def break_rows(folder: Path) -> None:
    lines = (folder / "train.jsonl").read_text().splitlines()
    lines[4] = "{"
    (folder / "train.jsonl").write_text("\n".join(lines))
    (folder / "train7.png").unlink()


def test_a_good_recipe_exits_0_and_says_so(
    dataset: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(monkeypatch, "check", str(dataset())) == 0
    printed = capsys.readouterr().out
    assert "all 16 rows can be used" in printed
    assert (tmp_path / "run-check" / "check.html").is_file()
    assert (tmp_path / "run-check" / "skipped.jsonl").read_text() == ""
    assert not (tmp_path / "run").exists()


def test_bad_rows_exit_2_and_are_named_and_listed(
    dataset: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = dataset()
    break_rows(tmp_path)
    assert run(monkeypatch, "check", str(recipe)) == 2
    printed = capsys.readouterr().out
    assert "2 of 16 rows cannot be used as they are" in printed
    assert f"{tmp_path}/train.jsonl:5: is cut short" in printed
    assert f"{tmp_path}/train.jsonl:8: image 'train7.png' not found" in printed
    listed = read_jsonl(tmp_path / "run-check" / "skipped.jsonl")
    assert [row["where"] for row in listed] == [f"{tmp_path}/train.jsonl:{i}" for i in (5, 8)]


def test_json_has_the_keys_of_the_contract(
    dataset: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = dataset()
    break_rows(tmp_path)
    assert run(monkeypatch, "check", str(recipe), "--json") == 2
    found = json.loads(capsys.readouterr().out)
    assert (found["rows"], found["usable"]) == (16, 14)
    assert [set(problem) for problem in found["problems"]] == [{"where", "reason", "kind"}] * 2
    assert set(found["formats"].values()) == {"chat"}
    train_part = found["parts"]["train"]
    assert train_part["num_rows"] == 12
    assert sum(train_part["tokens"]["counts"]) == train_part["num_usable"] == 10


def test_rows_in_are_usable_rows_plus_listed_ones(
    dataset: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = dataset(data={"max_tokens": 45, "bad_rows": "skip", "overlong": "skip"})
    rows = read_jsonl(tmp_path / "train.jsonl")
    rows[2]["messages"][0]["content"].append({"type": "text", "text": "long " * 50})
    write_rows(tmp_path / "train.jsonl", rows)
    break_rows(tmp_path)
    result = checked(recipe)
    usable = sum(part.num_usable for part in result.parts)
    assert result.num_rows == 16 == usable + len(list(result.problems())) == usable + 3
    assert result.num_problems == 3
    # and training does what the check said
    assert train(load_recipe(recipe, ["training.max_steps=1"]), console=QUIET, results=QUIET) == 0
    listed = read_jsonl(tmp_path / "run" / "skipped.jsonl")
    assert listed == read_jsonl(tmp_path / "run-check" / "skipped.jsonl")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["num_train_rows"] + summary["num_skipped_rows"] == 12


def test_changed_rows_are_counted_by_kind_and_listed(
    dataset: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = dataset(data={"max_tokens": 60, "overlong": "drop_turns"}, num_eval=0)
    rows = read_jsonl(tmp_path / "train.jsonl")
    long = chat_row("long " * 20, "x")["messages"]
    rows[3] = {"messages": [*long, *rows[3]["messages"]]}
    write_rows(tmp_path / "train.jsonl", rows)
    result = checked(recipe)
    assert result.num_problems == 0
    assert result.parts[0].changes == {"oldest exchanges dropped": 1}
    (line,) = read_jsonl(tmp_path / "run-check" / "changed.jsonl")
    assert line == {
        "where": f"{tmp_path}/train.jsonl:4",
        "reason": "1 of 2 exchanges dropped",
        "kind": "oldest exchanges dropped",
    }
    assert train(load_recipe(recipe, ["training.max_steps=1"]), console=QUIET, results=QUIET) == 0
    assert read_jsonl(tmp_path / "run" / "changed.jsonl") == [line]


def test_what_training_has_seen_of_held_out_rows_is_counted(
    dataset: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = dataset()
    shutil.copy(tmp_path / "train3.png", tmp_path / "other-name.png")
    noise(33, 44, seed=99).save(tmp_path / "new.png")
    rows = [
        chat_row("What is written?", "A37", "other-name.png"),  # picture and question
        chat_row("Another question?", "no", "train5.png"),  # the picture alone
        chat_row("What is written?", "no", "new.png"),  # the question alone
        chat_row("Something else?", "no", "new.png"),
    ]
    write_rows(tmp_path / "eval.jsonl", rows)
    result = checked(recipe)
    assert result.duplicates
    assert result.duplicates.num_same_image == 2
    assert result.duplicates.num_same_question == 2
    assert result.duplicates.num_same_both == 1
    assert result.duplicates.examples == [f"{tmp_path}/eval.jsonl:1"]
    assert result.num_problems == 0  # a warning: somebody may mean it


def test_the_longest_row_and_repeated_rows_are_named(
    dataset: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = dataset(num_eval=0)
    rows = read_jsonl(tmp_path / "train.jsonl")
    rows[6]["messages"][0]["content"].append({"type": "text", "text": "more words"})
    write_rows(tmp_path / "train.jsonl", [*rows, rows[0], rows[0]])
    (part,) = checked(recipe).parts
    assert part.longest[0].where == f"{tmp_path}/train.jsonl:7"
    assert part.num_repeated == 2


def test_training_after_a_check_does_not_check_again(
    dataset: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = dataset()
    checked(recipe)

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("examined again")

    monkeypatch.setattr("finetune.data.examined.examine", never)
    assert train(load_recipe(recipe), dry_run=True, console=QUIET, results=QUIET) == 0


def test_streamed_rows_are_checked_too(dataset: Callable[..., Path], tmp_path: Path) -> None:
    recipe = dataset()
    break_rows(tmp_path)
    plain = checked(recipe)
    streamed = checked(recipe, "data.train.0.streaming=true")
    assert [str(f) for f in streamed.problems()] == [str(f) for f in plain.problems()]
    assert streamed.parts[0].num_tokens == plain.parts[0].num_tokens


@pytest.mark.parametrize("content", ["recipe.yaml", "notes.txt"])
def test_a_folder_with_other_things_is_not_written_to(
    dataset: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    content: str,
) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / content).write_text("mine")
    arguments = ("check", str(dataset()), "--out", str(tmp_path / "there"))
    assert run(monkeypatch, *arguments) == 2
    assert "holds other things than a check" in capsys.readouterr().err


def test_a_print_of_many_problems_says_how_many_more(
    dataset: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = dataset(num_train=30, num_eval=0)
    for i in range(25):
        (tmp_path / f"train{i}.png").unlink()
    print_check(checked(recipe))
    printed = capsys.readouterr().out
    assert "25 of 30 rows cannot be used as they are; training stops at them:" in printed
    assert "train.jsonl:1: image … not found" in printed
    assert "(and 24 like it)" in printed


def test_held_out_rows_are_carved_out_and_kept_apart_from_training(
    dataset: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = load_recipe(dataset(num_eval=0), ["data.eval_fraction=0.25", "training.max_steps=1"])
    assert train(recipe, console=QUIET, results=QUIET) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["num_train_rows"], summary["num_eval_rows"]) == (9, 3)
    judged = [row["where"] for row in read_jsonl(tmp_path / "run/evaluation/predictions.jsonl")]
    from finetune.evaluate import evaluate

    assert evaluate(tmp_path / "run", console=QUIET).figures["num_eval_rows"] == 3
    again = [row["where"] for row in read_jsonl(tmp_path / "run/evaluation/predictions.jsonl")]
    assert again == judged


def test_rows_trained_on_are_not_judged_as_held_out_once_the_file_has_grown(
    dataset: Callable[..., Path], tmp_path: Path
) -> None:
    from finetune.errors import DataError
    from finetune.evaluate import evaluate

    recipe = load_recipe(dataset(num_eval=0), ["data.eval_fraction=0.25", "training.max_steps=1"])
    assert train(recipe, console=QUIET, results=QUIET) == 0
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write(json.dumps(chat_row("one", "more")) + "\n")
    with pytest.raises(DataError, match="have changed since the training"):
        evaluate(tmp_path / "run", console=QUIET)


def test_check_counts_both_sides_of_a_carved_set(
    dataset: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = dataset(num_eval=0)
    break_rows(tmp_path)
    result = checked(recipe, "data.eval_fraction=0.3")
    train_part, eval_part = result.parts
    assert (train_part.num_rows, eval_part.num_rows) == (9, 3)
    assert train_part.num_bad == result.num_problems == 2
    assert result.duplicates
    assert result.duplicates.num_same_question == 3
    assert result.duplicates.num_same_image == 0
    assert eval_part.longest[0].where.startswith(f"{tmp_path}/train.jsonl:")


def test_problems_are_listed_even_where_nothing_can_be_held_out(
    dataset: Callable[..., Path], tmp_path: Path
) -> None:
    from finetune.errors import DataError

    recipe = dataset(num_eval=0)
    rows = [chat_row(f"q{i}", "a", "train0.png") for i in range(5)]
    write_rows(tmp_path / "train.jsonl", [*rows, chat_row("q", "a", "missing.png")])
    with pytest.raises(DataError, match="rows that share pictures stay together"):
        checked(recipe, "data.eval_fraction=0.2")
    assert len(read_jsonl(tmp_path / "run-check" / "skipped.jsonl")) == 1


def test_preview_shows_held_out_rows_of_a_carved_set(
    dataset: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    recipe = str(dataset(num_eval=0))
    arguments = ("preview", recipe, "data.eval_fraction=0.25", "--held-out", "--json")
    assert run(monkeypatch, *arguments) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_a_check_goes_on_where_a_killed_one_left_its_half_written_page(
    dataset: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "run-check").mkdir()
    (tmp_path / "run-check" / ".check.html.123.tmp").write_text("half")
    assert checked(dataset()).num_problems == 0


def test_preview_shows_rows_and_prints_ids_and_masks(
    dataset: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    encoder: Any,
) -> None:
    recipe = str(dataset())
    assert run(monkeypatch, "preview", recipe, "--out", str(tmp_path / "p.html")) == 0
    assert "<!doctype html" in (tmp_path / "p.html").read_text().lower()
    capsys.readouterr()
    arguments = ("--row", "train.jsonl:3", "--row", "train.jsonl:1", "--json")
    assert run(monkeypatch, "preview", recipe, *arguments) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["where"] for line in lines] == [f"{tmp_path}/train.jsonl:{i}" for i in (3, 1)]
    for line in lines:
        assert set(line) == {"where", "input_ids", "loss_mask", "text", "views"}
        assert len(line["input_ids"]) == len(line["loss_mask"])
        assert line["text"] == encoder.processor.tokenizer.decode(line["input_ids"])
    assert lines[0]["views"] == [[112, 28]]
    assert run(monkeypatch, "preview", recipe, "--rows", "3", "--json") == 0
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_preview_of_a_bad_row_says_why_and_of_no_row_which_were_meant(
    dataset: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = str(dataset())
    break_rows(tmp_path)
    page = ("--out", str(tmp_path / "p.html"))
    assert run(monkeypatch, "preview", recipe, "--row", "train.jsonl:8", *page) == 2
    assert "train.jsonl:8: image 'train7.png' not found" in capsys.readouterr().err
    assert run(monkeypatch, "preview", recipe, "--row", ":99", *page) == 2
    assert "0 rows have a place that ends so" in capsys.readouterr().err


def test_convert_writes_chat_rows_that_mean_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "This."}]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "rows.json").write_text(
        json.dumps([{"id": "1", "image": "a.png", "conversations": turns}])
    )
    source, out = str(tmp_path / "in" / "rows.json"), tmp_path / "out.jsonl"
    assert run(monkeypatch, "convert", source, "--from", "llava", "--out", str(out)) == 0
    printed = capsys.readouterr().out
    assert f"{out}: 1 rows, read as llava" in printed
    assert f"image_root: {tmp_path / 'in'}" in printed
    (row,) = read_jsonl(out)
    assert row == chat_row("What?", "This.", "a.png")
    assert run(monkeypatch, "convert", source, "--from", "llava", "--out", str(out)) == 2
    assert "is there already" in capsys.readouterr().err
    other = str(tmp_path / "other.jsonl")
    assert run(monkeypatch, "convert", source, "--from", "lava", "--out", other) == 2
    assert "did you mean 'llava'" in capsys.readouterr().err


def test_convert_puts_pictures_of_the_rows_into_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import io

    from datasets import Dataset

    from finetune.data.images import ImageAccess, load_image

    buffer = io.BytesIO()
    noise(30, 20).save(buffer, "PNG")
    table = {"image": [{"bytes": buffer.getvalue(), "path": None}], "q": ["What?"], "a": ["This."]}
    Dataset.from_dict(table).to_parquet(tmp_path / "rows.parquet")
    out = tmp_path / "out.jsonl"
    columns = ("--columns", "image=image,question=q,answer=a")
    arguments = ("convert", str(tmp_path / "rows.parquet"), "--out", str(out), *columns)
    assert run(monkeypatch, *arguments) == 0
    (row,) = read_jsonl(out)
    (image,) = parse_chat(row).images()
    assert load_image(image.source, ImageAccess(tmp_path)).tobytes() == noise(30, 20).tobytes()


def test_convert_puts_all_pictures_into_the_folder_where_rows_hold_both_kinds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No image_root would serve paths of the old folder and files of the new one."""
    import io

    from finetune.data.images import ImageAccess, load_image

    (tmp_path / "in").mkdir()
    noise(30, 20, seed=1).save(tmp_path / "in" / "a.png")
    buffer = io.BytesIO()
    noise(30, 20, seed=2).save(buffer, "PNG")
    held = {"bytes": buffer.getvalue(), "path": None}
    rows = [{"image": {"bytes": None, "path": "a.png"}, "q": "What?", "a": "x"}]
    rows += [{"image": held, "q": "What?", "a": "y"}]
    from datasets import Dataset

    Dataset.from_list(rows).to_parquet(tmp_path / "in" / "rows.parquet")
    out = tmp_path / "out" / "rows.jsonl"
    columns = ("--columns", "image=image,question=q,answer=a")
    arguments = ("convert", str(tmp_path / "in" / "rows.parquet"), "--out", str(out), *columns)
    assert run(monkeypatch, *arguments) == 0
    sources = [image.source for row in read_jsonl(out) for image in parse_chat(row).images()]
    assert [Path(str(source)).parent.name for source in sources] == ["rows-images"] * 2
    for seed, source in enumerate(sources, start=1):
        loaded = load_image(source, ImageAccess(out.parent))
        assert loaded.tobytes() == noise(30, 20, seed=seed).tobytes()


def test_convert_writes_nothing_where_a_row_is_bad_unless_told_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(chat_row("q", "a")) + "\n{\n")
    out = tmp_path / "out.jsonl"
    arguments = ("convert", str(tmp_path / "rows.jsonl"), "--from", "chat", "--out", str(out))
    assert run(monkeypatch, *arguments) == 2
    assert "rows.jsonl:2: " in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl"]
    assert run(monkeypatch, *arguments, "--skip-bad") == 0
    assert len(read_jsonl(out)) == 1
