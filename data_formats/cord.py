"""CORD and other data for Donut: an image, and its fields as JSON in a string.

    {"image": {"bytes": ..., "path": null},
     "ground_truth": "{\\"gt_parse\\": {\\"total\\": {\\"total_price\\": \\"45,500\\"}}, ...}"}

Source: huggingface.co/datasets/naver-clova-ix/cord-v2, and github.com/clovaai/donut, README
(gt_parse, or gt_parses where several readings are right). The answer is the JSON of gt_parse,
without spaces, its keys in their order.
"""

import json
from typing import Any

from data_formats.cells import as_object, ask, image_at, text_at
from data_formats.chat import Conversation, FormatError
from data_formats.wording import keys, must_be

QUESTION = "Extract the fields as JSON."


def fits(row: Any) -> bool:
    """Whether a row has a ground_truth with a gt_parse in it."""
    if not isinstance(row, dict):
        return False
    truth = row.get("ground_truth")
    return (isinstance(truth, str) and '"gt_parse' in truth) or (
        isinstance(truth, dict) and ("gt_parse" in truth or "gt_parses" in truth)
    )


def parse(row: Any, *, question: str | None = None) -> Conversation:
    """The fields of an image, asked for with `question`. Raises `FormatError`."""
    row = as_object(row)
    truth = row.get("ground_truth")
    if not isinstance(truth, dict):
        truth = _read(text_at(row, "ground_truth"))
    if truth.get("gt_parse"):
        parses = [truth["gt_parse"]]
    elif isinstance(truth.get("gt_parses"), list) and truth["gt_parses"]:
        parses = truth["gt_parses"]
    else:
        raise FormatError(
            f"'ground_truth' has neither 'gt_parse' nor 'gt_parses' (found {keys(truth)}); give "
            "the fields under one of them"
        )
    answers = [_write(fields) for fields in parses]
    return ask([image_at(row, "image")], question or QUESTION, answers[0], answers)


def _read(text: str) -> dict[str, Any]:
    try:
        truth = json.loads(text)
    except RecursionError as error:
        raise FormatError(
            "'ground_truth' is nested too deeply to be read; write it flatter"
        ) from error
    except ValueError as error:
        raise FormatError(
            f"'ground_truth' is not JSON ({str(error)[:80]}); write the fields as JSON in a string"
        ) from error
    if not isinstance(truth, dict):
        raise FormatError(must_be("'ground_truth'", "an object", truth, verb="hold"))
    return truth


def _write(fields: Any) -> str:
    try:
        return json.dumps(fields, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except RecursionError as error:
        raise FormatError("'ground_truth' is nested too deeply; write it flatter") from error
    except (ValueError, TypeError) as error:
        raise FormatError(
            "the fields cannot be written as JSON, which has no NaN, infinite numbers or bytes; "
            "write null or a string instead"
        ) from error
