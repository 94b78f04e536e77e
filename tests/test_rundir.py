from pathlib import Path

import pytest

from finetune.errors import RunDirError
from finetune.rundir import RunDir, read_jsonl, replacing, write_jsonl, write_text


def test_what_fails_half_way_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "summary.json"
    write_text(file, "old")

    def fail_half_way() -> None:
        with replacing(file) as temporary:
            temporary.write_text("half of the n")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_half_way()
    assert file.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    for name in ("old", "new"):
        with replacing(folder) as temporary:
            temporary.mkdir()
            (temporary / name).touch()
    assert [path.name for path in folder.iterdir()] == ["new"]


def test_rows_with_any_line_separator_read_back(tmp_path: Path) -> None:
    rows = [{"answer": "a\u2028b\u2029c\u0085d\ne\r"}, {"answer": ""}]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    assert read_jsonl(tmp_path / "rows.jsonl") == rows


def test_a_line_that_was_being_written_does_not_count(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert read_jsonl(file) == [{"step": 1}, {"step": 2}]
    file.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(RunDirError, match=r"metrics\.jsonl:2: is not JSON"):
        read_jsonl(file)


def test_the_last_whole_checkpoint_is_the_one_to_resume_from(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert run.last_checkpoint() is None
    for step, is_whole in ((90, True), (100, True), (110, False)):
        folder = run.checkpoints / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        if is_whole:
            (folder / "trainer_state.json").touch()
    last = run.last_checkpoint()
    assert last is not None
    assert last.name == "checkpoint-100"  # neither the newest, nor the last in alphabetical order
