"""The wheel, installed where no checkout is in reach."""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel; the dependencies are this environment's own."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder / "dist"],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv" / "bin" / "python"
    (wheel,) = (folder / "dist").glob("*.whl")
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", wheel], check=True)
    # A folder named in a .pth file has its own .pth files left unread, so the checkout that is
    # installed there for editing stays out of reach
    site = next((folder / "venv" / "lib").glob("python*/site-packages"))
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"])
    return folder


def run(installed: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [installed / "venv" / "bin" / "finetune", *arguments],
        cwd=installed,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
def test_the_wheel_carries_recipes_data_model_and_page(installed: Path) -> None:
    listed = run(installed, "recipes", "list")
    assert "quickstart" in listed.stdout.splitlines(), listed.stderr
    copied = run(installed, "recipes", "copy", "quickstart", "mine.yaml")
    assert copied.returncode == 0, copied.stderr
    steps = ["training.max_steps=2", "evaluation.max_rows=4"]
    for recipe in ("mine.yaml", "quickstart"):  # the copy, and beside it the one it came from
        done = run(installed, "train", recipe, *steps, "--overwrite")
        assert done.returncode == 0, done.stderr
    assert (installed / "runs" / "quickstart" / "report.html").is_file()
    package = subprocess.run(
        [installed / "venv" / "bin" / "python", "-c", "import finetune; print(finetune.__file__)"],
        cwd=installed,
        capture_output=True,
        text=True,
        check=True,
    )
    assert str(installed) in package.stdout
