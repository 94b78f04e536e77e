"""Write docs/bad-rows.md: every kind of bad row that the tests hold, and the message it gets.

python -m scripts.bad_rows_table [--check]
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

from tests.bad_rows import BAD_FILES, BAD_ROWS, BadFile, BadRow

PAGE = Path(__file__).parent.parent / "docs" / "bad-rows.md"

INTRODUCTION = """\
# Bad rows, and what is said of them

<!-- Written by `python -m scripts.bad_rows_table`; edit tests/bad_rows.py instead. -->

`finetune check` reads every row and names each bad one as `file:line: message`; `finetune train`
does the same before it loads a model. With `data.bad_rows: skip` they are left out, counted, and
listed in the run's `skipped.jsonl`. Find your message below by a few of its words.

The tests write each of these {num_kinds} kinds to disk and hold it to its very message; a good row
in the same file stays usable. In the messages, `/data` stands for the folder of the data file.
"""


def page_text() -> str:
    """The page as it should be."""
    num_kinds = sum(map(len, BAD_ROWS.values())) + len(BAD_FILES)
    parts = [INTRODUCTION.format(num_kinds=num_kinds)]
    for title, group in BAD_ROWS.items():
        parts.append(f"## {title}\n\n{_table(group)}")
    parts.append(
        "## Files that are refused as a whole\n\n"
        "Before any row is read, and whatever `data.bad_rows` says.\n\n" + _table(BAD_FILES)
    )
    return "\n".join(parts)


def _table(group: Iterable[BadRow | BadFile]) -> str:
    rows = [f"| {_cell(bad.kind)} | {_code(bad.message)} |\n" for bad in group]
    return "| what | message |\n| --- | --- |\n" + "".join(rows)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def _code(text: str) -> str:
    """As code, whatever it holds: the fence is longer than any run of backticks within."""
    fence = "``" if "`" in text else "`"
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{space}{text.replace('|', chr(92) + '|')}{space}{fence}"


def is_stale() -> bool:
    """Whether the page is missing, or differs from what would be written now."""
    return not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != page_text()


def main() -> int:
    """Write the page, or with --check say whether it is stale."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.bad_rows_table", description=main.__doc__
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if stale")
    if parser.parse_args().check:
        if is_stale():
            print(f"{PAGE}: is stale; run python -m scripts.bad_rows_table", file=sys.stderr)
        return int(is_stale())
    PAGE.write_text(page_text(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
