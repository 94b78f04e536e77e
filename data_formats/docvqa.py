"""DocVQA in the shapes it has on the Hub and in its own annotation file.

    {"questionId": "337", "question": "what is the date?", "image": {"bytes": ..., "path": null},
     "docId": 279, "ucsf_document_id": "xnbl0037", "answers": ["1/8/93"], "data_split": "val"}
    {"id": "train_0", "image": {...}, "query": {"de": "...", "en": "what is the date?"},
     "answers": ["1/8/93"], "words": [...], "bounding_boxes": [...]}

Source: huggingface.co/datasets/lmms-lab/DocVQA and HuggingFaceM4/DocumentVQA (with question_types),
nielsr/docvqa_1200_examples, and rrc.cvc.uab.es/?ch=17 (image as a path). The first answer is
learnt; all of them count as right.
"""

from typing import Any

from data_formats.cells import answers_of, as_object, ask, image_at, text_at
from data_formats.chat import Conversation, FormatError
from data_formats.wording import kind

_MARKS = ("questionId", "docId", "ucsf_document_id", "ucsf_document_page_no", "question_types")


def fits(row: Any) -> bool:
    """Whether a row has a question with DocVQA's own columns, or a query in several languages."""
    if not isinstance(row, dict) or not isinstance(row.get("answers"), list | None):
        return False
    query = row.get("query")
    if isinstance(query, dict):
        return isinstance(query.get("en"), str)
    return isinstance(row.get("question"), str) and any(
        row.get(mark) is not None for mark in _MARKS
    )


def parse(row: Any) -> Conversation:
    """The question and its first answer. Raises `FormatError`, naming the first fault."""
    row = as_object(row)
    if isinstance(row.get("query"), dict):
        question = text_at(row["query"], "en")
    else:
        question = text_at(row, "question")
    if not row.get("answers"):
        raise FormatError(
            f"'answers' holds {kind(row.get('answers'))}: test splits come without answers; use "
            "the training or validation split"
        )
    answers = answers_of(row["answers"], "answers")
    return ask([image_at(row, "image")], question, answers[0], answers)
