"""Paths that stand for several files: globs, and the braces of a shell."""

import glob
import os
import re
from collections.abc import Iterator
from itertools import islice

_BRACES = re.compile(r"\{(\d{1,9})\.\.(\d{1,9})\}|\{([^{}]*,[^{}]*)\}")
_MAX_FILES = 100_000  # a slip such as {0..999999999} must not fill the memory
_MAX_BRACES = 50


def is_pattern(path: str | os.PathLike[str]) -> bool:
    """Whether the path stands for several files; one that is there under its very name does not."""
    text = os.fspath(path)
    return not os.path.lexists(text) and (
        glob.has_magic(text) or len(list(islice(_each(text), 2))) > 1
    )


def written_out(text: str) -> list[str]:
    """`a-{00..02}` and `{a,b}` written out, from left to right; leading zeros are kept, as the
    webdataset library does it. Of more than 100,000 only the first.
    """
    if len(_BRACES.findall(text)) > _MAX_BRACES:
        return [text]
    return list(islice(_each(text), _MAX_FILES + 1))


def _each(text: str) -> Iterator[str]:
    match = _BRACES.search(text)
    if match is None:
        yield text
        return
    first, last, listed = match.groups()
    if listed is not None:
        middles = listed.split(",")
    else:
        width = len(first) if first.startswith("0") else 1
        middles = (f"{n:0{width}}" for n in range(int(first), int(last) + 1))
    for middle in middles:
        for end in _each(text[match.end() :]):
            yield text[: match.start()] + middle + end


def globbed(text: str) -> list[str]:
    """The files that a glob finds, sorted; the path itself where it is none, there or not."""
    # Path.glob takes no absolute pattern
    return sorted(glob.glob(text, recursive=True)) if glob.has_magic(text) else [text]  # noqa: PTH207
