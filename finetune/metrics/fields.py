"""Figures for answers that are JSON: extraction of fields.

A prediction with a code fence counts as what its first fence holds, in whatever language that says
it is; text around the fence does not count. One that is no JSON scores as if it were empty; a
reference that is none is compared as text. Composed letters are decomposed ones, in keys and in
values, however JSON writes them.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from rapidfuzz.distance import Levenshtein

from finetune.metrics.text import composed

_FENCE = re.compile(r"```(?:[a-z][^\s{\[`]*(?=[\s{\[]))?\s*", re.IGNORECASE)
_DECODER = json.JSONDecoder()
_LEAF = "<leaf>"
_DEEPEST = 50  # what nests deeper counts as no JSON: the figures recurse, and would fail


def json_f1(prediction: str, references: Sequence[str]) -> tuple[float, float]:
    """Twice the fields shared with the nearest reference, and the fields of both: the F1 over rows
    is the sum of the first over that of the second.

    A field is a path of keys and its value as text, lists without their order. Two that are empty
    agree in one. Source: Donut's cal_f1 (arXiv 2111.15664, donut/util.py).
    """
    pairs = (_shared_fields(*_parsed(prediction, each)) for each in references)
    return max(pairs, key=lambda pair: pair[0] / pair[1], default=(0, 1))


def _shared_fields(said: Any, wanted: Any) -> tuple[int, int]:
    left, right = Counter(_fields(_tidy(said))), Counter(_fields(_tidy(wanted)))
    num_fields = left.total() + right.total()
    return (2 * (left & right).total(), num_fields) if num_fields else (2, 2)


def _fields(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _fields(inner, (*path, key))
    elif isinstance(value, list):
        for inner in value:
            yield from _fields(inner, path)
    else:
        yield path, value


def nted(prediction: str, references: Sequence[str]) -> float:
    """1 - the tree edit distance to the nearest reference over that of the empty tree; at least 0.

    Inner nodes cost 1, leaves their characters, and leaves are exchanged at the Levenshtein
    distance. Source: Donut's cal_acc (arXiv 2111.15664, donut/util.py), on zss's Zhang-Shasha,
    whose time grows steeply with the number of nodes.
    """
    return max((_tree_likeness(*_parsed(prediction, each)) for each in references), default=0.0)


def _tree_likeness(said: Any, wanted: Any) -> float:
    if _tidy(said) == _tidy(wanted):
        return 1.0
    reference = _tree(_tidy(wanted))
    whole = _distance(_tree({}), reference)
    distance = _distance(_tree(_tidy(said)), reference)
    return max(0.0, 1 - distance / whole) if whole else float(not distance)


def _distance(left: Any, right: Any) -> float:
    import zss

    distance: Any = zss.distance(
        left,
        right,
        get_children=zss.Node.get_children,
        insert_cost=_cost,
        remove_cost=_cost,
        update_cost=_exchange,
    )
    return distance


def _cost(node: Any) -> int:
    return len(node.label) - len(_LEAF) if node.label.startswith(_LEAF) else 1


def _exchange(left: Any, right: Any) -> int:
    leaves = left.label.startswith(_LEAF), right.label.startswith(_LEAF)
    if all(leaves):
        return Levenshtein.distance(left.label, right.label)
    if any(leaves):
        return 1 + (_cost(left) if leaves[0] else _cost(right))
    return int(left.label != right.label)


def _tree(value: Any, label: str = "<root>") -> Any:
    import zss

    node = zss.Node(label)
    if isinstance(value, dict):
        for key, inner in value.items():
            node.addkid(_tree(inner, key))
    else:
        for inner in value:
            leaf = isinstance(inner, str)
            node.addkid(zss.Node(_LEAF + inner) if leaf else _tree(inner, "<subtree>"))
    return node


def anls_star(prediction: str, references: Sequence[str]) -> float:
    """ANLS* with the nearest reference: ANLS by field, lists matched at their best. Source: arXiv
    2402.03848, by its authors' package anls-star 1.0.
    """
    from anls_star import anls_score

    pairs = (_parsed(prediction, each) for each in references)
    # The package takes a list for so many possible answers where the prediction is one text.
    scores = (
        anls_score(wanted, {} if isinstance(wanted, list) and isinstance(said, str) else said)
        for said, wanted in pairs
    )
    return max((float(score) for score in scores if isinstance(score, float | int)), default=0.0)


def _parsed(prediction: str, reference: str) -> tuple[Any, Any]:
    """Both as JSON; as texts where the reference is none."""
    wanted, is_json = _json(reference)
    if not is_json or not isinstance(wanted, dict | list):
        return composed(prediction.strip()), composed(reference.strip())
    said, is_json = _json(prediction)
    return (said if is_json else {}), wanted


def _json(text: str) -> tuple[Any, bool]:
    for read in (json.loads, _fenced):
        try:
            value = read(text)
        except (ValueError, RecursionError):
            continue
        return (None, False) if _is_deep(value) else (_composed(value), True)
    return None, False


def _fenced(text: str) -> Any:
    """What the first code fence holds; a fence in one of its texts does not end it."""
    opening = _FENCE.search(text)
    if opening is None:
        raise ValueError("no fence")
    value, end = _DECODER.raw_decode(text, opening.end())
    if not text[end:].lstrip().startswith("```"):
        raise ValueError("no end of the fence")
    return value


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(_DEEPEST):
        dicts = (each.values() for each in level if isinstance(each, dict))
        lists = (each for each in level if isinstance(each, list))
        level = [inner for each in (*dicts, *lists) for inner in each]
    return bool(level)


def _composed(value: Any) -> Any:
    if isinstance(value, dict):
        return {composed(key): _composed(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_composed(inner) for inner in value]
    return composed(value) if isinstance(value, str) else value


def _tidy(value: Any) -> Any:
    """As Donut compares: every value a list, of texts and objects; what is empty is left out, and
    keys stand in one order. Zero, false and lists in lists, which Donut loses, count.
    """
    if value is None or (isinstance(value, str | list | dict) and not value):
        return {}
    if isinstance(value, dict):
        found = {}
        for key in sorted(value, key=lambda key: (len(key), key)):
            inner = _tidy(value[key])
            if inner:
                found[key] = inner if isinstance(inner, list) else [inner]
        return found
    if not isinstance(value, list):
        return [text] if (text := _text(value)) else {}
    items = (_tidy(item) if isinstance(item, list | dict) else _text(item) for item in value)
    return [item for item in items if item]


def _text(value: Any) -> str:
    """A value as JSON writes it, a text without quotes; empty for none."""
    if value is None:
        return ""
    return value.strip() if isinstance(value, str) else json.dumps(value)
