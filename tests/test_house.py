"""The order of the floors, as the docstring of `finetune` states it, against the imports in the
code.
"""

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

import finetune

PACKAGE = Path(finetune.__file__).parent
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path != PACKAGE / "__init__.py"
}
FLOORS = [line.split() for line in (finetune.__doc__ or "").splitlines() if line.startswith("    ")]
ORDER = [module for floor in FLOORS for module in floor]


def imports_of(path: Path) -> set[str]:
    """Modules of the package that a file imports, at its top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            if not all(name.removeprefix("finetune.") in MODULES for name in names):
                names.append(node.module)
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {name.removeprefix("finetune.") for name in names}
    return found & MODULES.keys()


def test_every_module_stands_in_the_order_once() -> None:
    assert sorted(ORDER) == sorted(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module: str) -> None:
    above = {
        name for name in imports_of(MODULES[module]) if ORDER.index(name) > ORDER.index(module)
    }
    assert not above


def test_verbs_do_not_import_one_another() -> None:
    verbs = {"train", "evaluate", "chat", "check", "preview", "convert", "plan"}
    for verb in verbs:
        assert not imports_of(MODULES[verb]) & verbs


def test_data_formats_needs_nothing_but_python() -> None:
    """Converters must be usable, and fast, without torch and transformers."""
    code = (
        "import sys, data_formats.formats; "
        "print([m for m in ('torch', 'transformers', 'PIL', 'finetune') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["recipes", "list"]])
def test_help_does_not_import_torch(arguments: list[str]) -> None:
    code = (
        f"import sys; sys.argv = ['finetune', *{arguments!r}]\n"
        "from finetune.cli import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "print([m for m in ('torch', 'transformers', 'pydantic') if m in sys.modules][:1])"
    )
    printed = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert "torch" not in printed.splitlines()[-1]
    assert "transformers" not in printed.splitlines()[-1]


def test_help_is_there_in_four_tenths_of_a_second() -> None:
    """The best of five, since other tests run beside this one."""
    command = [str(Path(sys.executable).parent / "finetune"), "--help"]

    def seconds() -> float:
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        return time.perf_counter() - start

    assert min(seconds() for _ in range(5)) < 0.4
