"""ChartQA in its shapes on the Hub and in its repository.

    {"image": {"bytes": ..., "path": null}, "query": "How many items are shown?", "label": ["14"],
     "human_or_machine": 0}
    {"imgname": "41699051005347.png", "query": "How many items are shown?", "label": "14"}
    {"type": "human_test", "question": "How many items are shown?", "answer": "14", "image": {...}}

Source: huggingface.co/datasets/HuggingFaceM4/ChartQA, ahmed-masry/ChartQA, lmms-lab/ChartQA and
github.com/vis-nlp/ChartQA (imgname). The (first) label is learnt.
"""

from typing import Any

from data_formats.cells import answers_of, as_object, ask, image_at, text_at
from data_formats.chat import Conversation, FormatError
from data_formats.wording import missing

_TYPES = ("human", "augmented", "human_test", "augmented_test")


def fits(row: Any) -> bool:
    """Whether a row has a query and a label, or a question and an answer of ChartQA's types."""
    if not isinstance(row, dict):
        return False
    if isinstance(row.get("query"), str):
        return isinstance(row.get("label"), str | list) and row.get("response") is None
    return (
        isinstance(row.get("question"), str)
        and isinstance(row.get("answer"), str)
        and row.get("type") in _TYPES
    )


def parse(row: Any) -> Conversation:
    """The query and its first label. Raises `FormatError`, naming the first fault."""
    row = as_object(row)
    asked, answered = ("query", "label") if row.get("query") is not None else ("question", "answer")
    question = text_at(row, asked)
    if row.get(answered) in (None, "", []):
        raise FormatError(missing(row, answered, "a chartqa row has the answer there"))
    answers = answers_of(row[answered], answered)
    return ask([image_at(row, "image", "imgname")], question, answers[0], answers)
