"""What is printed on a terminal."""

import sys
from pathlib import Path

import pytest

from finetune.tables import command_here


def test_a_command_that_can_be_run_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever this process was started as: in several, as finetune/__main__.py."""
    folder = tmp_path / "my env" / "bin"
    folder.mkdir(parents=True)
    monkeypatch.setattr(sys, "argv", ["/somewhere/finetune/__main__.py", "eval"])
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert command_here() == "'my env/bin/python' -m finetune"
    (folder / "finetune").touch()
    assert command_here() == "'my env/bin/finetune'"
    monkeypatch.chdir(folder)
    assert command_here() == "./finetune"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert command_here() == f"'{folder / 'finetune'}'"
    (tmp_path / "finetune").touch(0o755)
    assert command_here() == "finetune"
