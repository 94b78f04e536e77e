"""Pages written by hand, with places for what a script measured."""

from collections.abc import Iterable


def fill(text: str, part: str, lines: Iterable[str]) -> str:
    """The page with `lines` between `<!-- measured: part -->` and `<!-- end: part -->`."""
    head, begin, rest = text.partition(f"<!-- measured: {part} -->\n")
    _, end, tail = rest.partition(f"<!-- end: {part} -->\n")
    assert begin, f"the page has no marks for {part}"
    assert end, f"the page has no end of {part}"
    return head + begin + "\n" + "\n".join(lines) + "\n" + end + tail


def table(*titles: str) -> list[str]:
    """The head of a table."""
    return [row(*titles), row(*["---"] * len(titles))]


def row(*cells: object) -> str:
    """A line of a table."""
    return f"| {' | '.join(map(str, cells))} |"
