"""docs/data.md and its example files: every row, message and command on the page is true."""

import json
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from data_formats.chat import Conversation, FormatError, Image, Text
from data_formats.formats import FORMATS, converter, recognise
from data_formats.rules import refuse_odd_turns
from finetune.check import check
from finetune.cli import app
from finetune.convert import convert
from finetune.data.images import ImageAccess, read_image_file
from finetune.data.sources import Row, open_source
from finetune.preview import preview, write_page
from finetune.recipe import DataSection, DataSource, load_recipe, make_source
from scripts.make_format_examples import write_examples

DOCS = Path(__file__).parent.parent / "docs"
EXAMPLES = DOCS / "examples" / "data"
PAGE = (DOCS / "data.md").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Block:
    """A row of the page, and the answers that the line below it promises."""

    format_name: str
    columns: dict[str, str] | None
    row: dict[str, Any]
    learnt: list[str]
    right: list[str]


def blocks() -> list[Block]:
    found = []
    pattern = (
        r"^```json format=(\S+)(?: columns=(\S+))?\n(.*?)^```\n\n"
        r"Learnt: ([^\n]*?)\.(?: Right: ([^\n]*)\.)?$"
    )
    for name, columns, row, learnt, right in re.findall(pattern, PAGE, re.MULTILINE | re.DOTALL):
        pairs = dict(pair.split(":") for pair in columns.split(",")) if columns else None
        in_quotes = [re.findall(r"`(.*?)`", line) for line in (learnt, right)]
        found.append(Block(name, pairs, json.loads(row), *in_quotes))
    return found


BLOCKS = blocks()


def fenced(info: str) -> list[str]:
    """The lines of all blocks of the page with this info string."""
    found = re.findall(rf"^```{info}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    return [line for block in found for line in block.splitlines()]


# File under EXAMPLES -> its format, rows, and settings of the entry that it cannot do without
FILES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "chat/rows.jsonl": ("chat", 3, {}),
    "openai.jsonl": ("openai", 3, {}),
    "openai.jsonl.gz": ("openai", 3, {}),
    "llava/rows.json": ("llava", 4, {}),
    "sharegpt/rows.json": ("sharegpt", 3, {}),
    "llama-factory/rows.json": ("llama-factory", 3, {}),
    "ms-swift/rows.jsonl": ("ms-swift", 3, {}),
    "mantis.parquet": ("mantis", 3, {}),
    "cauldron": ("cauldron", 3, {}),
    "docvqa.parquet": ("docvqa", 3, {}),
    "textvqa/rows.json": ("textvqa", 3, {}),
    "vqav2.parquet": ("vqav2", 3, {}),
    "chartqa/rows.json": ("chartqa", 3, {"image_root": str(EXAMPLES / "chartqa" / "png")}),
    "mmmu.parquet": ("mmmu", 3, {}),
    "cord": ("cord", 3, {}),
    "coco-captions/captions.json": ("coco-captions", 3, {}),
    "captions-000.tar": ("coco-captions", 3, {}),
    "columns/table.csv": (
        "columns",
        3,
        {"columns": {"image": "scan", "question": "asked", "answer": "given"}},
    ),
    "labels": (
        "columns",
        3,
        {"columns": {"image": "image", "answer": "label"}, "question": "Which shape is this?"},
    ),
}


def recipe_of(name: str, folder: Path, **data: Any) -> Any:
    settings = {"path": str(EXAMPLES / name), **FILES.get(name, ("", 0, {}))[2]}
    overrides = [f"data.train={json.dumps([settings])}", f"output.dir={folder / 'runs' / 'x'}"]
    overrides += [f"data.{key}={json.dumps(value)}" for key, value in data.items()]
    return load_recipe(str(EXAMPLES / "recipe.yaml"), overrides)


def quiet() -> Console:
    return Console(quiet=True)


def conversations(settings: DataSource, cache: Path) -> list[list[Any]]:
    """Each row of an entry as its roles, texts, references and the bytes of its pictures."""
    source = open_source(settings, DataSection(train=(settings,)), cache)
    rows = [row for _, row in source.rows(0, len(source))]
    assert all(isinstance(row, Row) for row in rows)
    return [contents(row.conversation, row.image_access) for row in rows if isinstance(row, Row)]


def contents(conversation: Conversation, access: ImageAccess) -> list[Any]:
    found = []
    for message in conversation.messages:
        parts = [
            part.text if isinstance(part, Text) else read_image_file(part.source, access)[1]
            for part in message.content
        ]
        found.append((message.role, message.train, message.references, parts))
    return found


def test_the_page_has_a_row_of_every_format() -> None:
    assert {block.format_name for block in BLOCKS} == set(FORMATS)
    assert len(BLOCKS) == PAGE.count("```json format=")


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.format_name)
def test_a_row_of_the_page_is_recognised_as_its_format(block: Block) -> None:
    if block.columns:
        with pytest.raises(FormatError, match="no known format"):
            recognise([block.row])
    else:
        assert recognise([block.row]).name == block.format_name


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.format_name)
def test_a_row_of_the_page_teaches_what_the_page_says(block: Block) -> None:
    conversation = converter(block.format_name, columns=block.columns)(block.row)
    refuse_odd_turns(conversation)
    answers = [m.text for m in conversation.messages if m.role == "assistant" and m.train]
    assert answers == block.learnt
    assert list(conversation.references()) == (block.right or block.learnt[-1:])
    assert all(isinstance(part, Image) for part in conversation.images())


def test_the_refusals_of_the_page_are_those_of_the_code() -> None:
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    placed = [{"role": "user", "content": "<image>a"}, {"role": "assistant", "content": "b"}]
    llava = next(block.row for block in BLOCKS if block.format_name == "llava")
    rows = {
        "ambiguous.jsonl": [{"messages": placed, "images": ["1.png", "2.png"]}],
        "mixed.jsonl": [chat, llava],
        "table.jsonl": [{"photo": "1.png", "question": "a", "answer": "b"}],
    }
    said = []
    for name, of_file in rows.items():
        with pytest.raises(FormatError) as refused:
            recognise(of_file)
        said.append(f"{name}: {refused.value}")
    assert said == fenced("refusals")


def test_every_format_has_an_example_file_and_all_are_small() -> None:
    assert {name for name, _, _ in FILES.values()} == set(FORMATS)
    files = [path for path in EXAMPLES.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 150_000


@pytest.mark.parametrize("name", FILES)
def test_check_finds_every_row_of_an_example_usable(name: str, tmp_path: Path) -> None:
    format_name, num_rows, _ = FILES[name]
    found = check(recipe_of(name, tmp_path), name, console=quiet()).to_json()
    assert (found["rows"], found["usable"], found["problems"]) == (num_rows, num_rows, [])
    assert list(found["formats"].values()) == [format_name]
    assert Path(found["report"]).is_file()


@pytest.mark.parametrize("name", FILES)
def test_preview_shows_every_row_of_an_example(name: str, tmp_path: Path) -> None:
    recipe = recipe_of(name, tmp_path)
    shown = preview(recipe, console=quiet())
    page = write_page(shown, recipe, name, tmp_path / "preview.html").read_text(encoding="utf-8")
    assert shown.problems == []
    assert len(shown.rows) == FILES[name][1]
    assert all(row["where"] in page for row in shown.to_json())


@pytest.mark.parametrize("name", FILES)
def test_a_converted_example_reads_back_as_the_same_conversations(
    name: str, tmp_path: Path
) -> None:
    format_name, num_rows, settings = FILES[name]
    given = {key: value for key, value in settings.items() if key != "image_root"}
    done = convert(EXAMPLES / name, tmp_path / "rows.jsonl", format_name=format_name, **given)
    assert (done.format_name, done.num_rows, done.problems) == (format_name, num_rows, [])
    root = settings.get("image_root") or (str(done.image_root) if done.image_root else None)
    before = make_source({"path": str(EXAMPLES / name), "format": format_name, **settings})
    after = make_source({"path": str(done.out), "image_root": root})
    read = conversations(after, tmp_path / "cache")
    assert read == conversations(before, tmp_path / "cache")
    assert len(read) == num_rows


def test_the_faulty_rows_get_the_messages_on_the_page(tmp_path: Path) -> None:
    recipe = recipe_of("faulty/rows.jsonl", tmp_path, max_tokens=300)
    found = check(recipe, "recipe.yaml", console=quiet()).to_json()
    said = [f"{problem['where']}: {problem['reason']}" for problem in found["problems"]]
    # the page shortens folders to what a person in the repository would write
    shortened = [line.replace(f"{DOCS.parent}/", "") for line in said]
    assert shortened == fenced("problems")
    assert found["rows"] == found["usable"] + len(said)


def test_every_command_on_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(EXAMPLES, tmp_path / "docs" / "examples" / "data")
    monkeypatch.chdir(tmp_path)
    commands = fenced("bash")
    assert len(commands) == 4
    for command in commands:
        program, *arguments = shlex.split(command)
        result = CliRunner().invoke(app, arguments)
        assert program == "finetune"
        assert result.exit_code == (2 if "faulty" in command else 0), (command, result.output)
    converted = json.loads((tmp_path / "docvqa.jsonl").read_text().splitlines()[0])
    assert converted in [block.row for block in BLOCKS]


def test_the_script_makes_the_shipped_examples(tmp_path: Path) -> None:
    write_examples(tmp_path)
    made, shipped = (
        sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        for folder in (tmp_path, EXAMPLES)
    )
    assert made == shipped
    # pictures, and so what holds them, may be compressed otherwise by another Pillow; the datasets
    # library writes its version into its own files
    text = (".json", ".csv", "rows.jsonl", "metadata.jsonl", ".yaml", ".txt")
    for name in made:
        if name.endswith(text) and not name.startswith("cauldron/"):
            assert (tmp_path / name).read_bytes() == (EXAMPLES / name).read_bytes(), name
