"""`python -m finetune.recipe.docs [--check]` writes recipes/schema.json and docs/recipe.md."""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from finetune.recipe import Recipe, recipes_dir

INTRO = """\
# The recipe

<!-- Written by `python -m finetune.recipe.docs`; edit finetune/recipe/schema.py instead. -->

One YAML file says what is trained, on what, and how it is judged. Two things must stand in it:
`model.name` and `data.train`. All else has a default.

- **It is checked whole before anything is loaded.** Unknown keys, wrong values, settings that
  exclude each other and missing files are listed together, each with what to write instead.
- **Any key can be set on the command line**, lists by number from 0:
  `finetune train mine.yaml adapter.rank=16 data.train.0.path=data/other.jsonl`.
  Setting `training.max_steps` there replaces `training.epochs` of the file, and the reverse; so do
  `training.batch_tokens` and `batch_patches` with `batch_size`.
- **Relative data paths** are looked up from the current folder and from the recipe's own folder.
  If these are two different files, the recipe is refused: write the path in full.
- **Forgiven slips of YAML 1.1**: `1e-4` is a number with or without a dot, and a bare `off` or
  `none` is not mistaken for `false` where it is a choice.
- **Editors** complete and check keys when the first line points to the schema, such as
  `# yaml-language-server: $schema=schema.json` for a recipe beside it.

Each run keeps the recipe it ran with, defaults written out, as `recipe.yaml` in its run directory.
"""

# What the sample shows where a default would show little.
SAMPLE: dict[str, Any] = {
    "model.name": "HuggingFaceM4/idefics2-8b",
    "data.train": [
        {"path": "data/train.jsonl", "format": "auto", "image_root": "data/images", "weight": 1.0}
    ],
    "data.eval": [{"path": "data/eval.jsonl", "image_root": "data/images"}],
}

# Keys left empty by default, shown as comments.
SAMPLE_ASIDE: dict[str, Any] = {"training.max_steps": 1000, "evaluation.max_rows": 500}


def schema_text() -> str:
    """The JSON schema that editors read."""
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema"
    } | Recipe.model_json_schema()
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def docs_text() -> str:
    """docs/recipe.md: the introduction, a sample with every key, a table a section."""
    schema = Recipe.model_json_schema()
    parts = [INTRO, f"## All of it\n\n```yaml\n{sample_text()}```\n"]
    for name, part in schema["properties"].items():
        parts.append("\n".join(_section(f"`{name}`", _target(schema, part), schema)))
    for title, name in (
        ("Entries of `data.train` and `data.eval`", "DataSource"),
        ("`columns` of an entry", "Columns"),
    ):
        parts.append("\n".join(_section(title, schema["$defs"][name], schema)))
    return "\n".join(parts)


def sample_text() -> str:
    """A recipe with every key in its place, each with its meaning beside it."""
    schema = Recipe.model_json_schema()
    lines: list[str] = []
    for name, part in schema["properties"].items():
        lines.append(f"{name}:")
        for key, field in _target(schema, part)["properties"].items():
            lines += _sample_lines(f"{name}.{key}", field)
    return "\n".join(lines) + "\n"


def _sample_lines(path: str, field: dict[str, Any]) -> Iterator[str]:
    key = path.partition(".")[2]
    meaning = field["description"].partition(". ")[0].rstrip(".")
    if path in SAMPLE_ASIDE:
        yield f"{f'  # {key}: {SAMPLE_ASIDE[path]}':<34}# {meaning}"
        return
    value = SAMPLE.get(path, field.get("default"))
    if path in SAMPLE and isinstance(value, list):
        yield f"{f'  {key}:':<34}# {meaning}"
        for entry in value:
            entry_lines = yaml.safe_dump(entry, sort_keys=False).splitlines()
            yield from (
                f"    {'- ' if n == 0 else '  '}{line}" for n, line in enumerate(entry_lines)
            )
        return
    yield f"{f'  {key}: {_inline(value)}':<34}# {meaning}"


def _section(title: str, section: dict[str, Any], schema: dict[str, Any]) -> Iterator[str]:
    yield f"## {title}\n"
    yield f"{_flat(section['description'])}\n"
    yield "| key | value | default | meaning |"
    yield "| --- | --- | --- | --- |"
    for key, field in section["properties"].items():
        if key in section.get("required", []):
            default = "required"
        else:
            default = "" if field.get("default") is None else f"`{_inline(field['default'])}`"
        yield f"| `{key}` | {_kind(field, schema)} | {default} | {_flat(field['description'])} |"
    yield ""


def _kind(field: dict[str, Any], schema: dict[str, Any]) -> str:
    """What may be written there, in words."""
    if "enum" in field:
        return ", ".join(f"`{choice}`" for choice in field["enum"])
    if alternatives := field.get("anyOf") or field.get("oneOf"):
        kinds = [_kind(each, schema) for each in alternatives if each.get("type") != "null"]
        return ", or ".join(kinds)
    if "$ref" in field:
        return "a mapping, see the end"
    match field.get("type"):
        case "array":
            items = field["items"]
            return (
                "list of entries, see below"
                if "$ref" in items
                else f"list of {_kind(items, schema)}"
            )
        case "object":
            return "a mapping by part"
        case "integer" | "number" as kind:
            return ", ".join(["whole number" if kind == "integer" else "number", *_limits(field)])
        case "boolean":
            return "`true`, `false`"
    return "`off` or a size" if "pattern" in field else "text"


def _limits(field: dict[str, Any]) -> Iterator[str]:
    if "multipleOf" in field:
        yield f"a multiple of {field['multipleOf']}"
        return
    for name, words in (
        ("minimum", "at least"),
        ("exclusiveMinimum", "more than"),
        ("maximum", "at most"),
        ("exclusiveMaximum", "less than"),
    ):
        if name in field:
            yield f"{words} {field[name]:,}"


def _target(schema: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    return schema["$defs"][part["$ref"].rpartition("/")[2]]


def _inline(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=1000)
    # YAML 1.1 puts quotes around 'off'; the recipe reads it either way.
    return text.removesuffix("\n").removesuffix("\n...").replace("'off'", "off")


def _flat(text: str) -> str:
    return " ".join(text.split())


def outputs() -> dict[Path, str]:
    """The files of a checkout and what should stand in them."""
    root = recipes_dir().parent
    return {recipes_dir() / "schema.json": schema_text(), root / "docs" / "recipe.md": docs_text()}


def stale() -> list[Path]:
    """The files that differ from what would be written now."""
    return [
        path
        for path, text in outputs().items()
        if not path.is_file() or path.read_text(encoding="utf-8") != text
    ]


def main() -> int:
    """Write the files, or with --check say which are stale."""
    parser = argparse.ArgumentParser(
        prog="python -m finetune.recipe.docs", description=main.__doc__
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 if any is stale"
    )
    if parser.parse_args().check:
        for path in stale():
            print(f"{path}: is stale; run python -m finetune.recipe.docs", file=sys.stderr)
        return 1 if stale() else 0
    for path, text in outputs().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
