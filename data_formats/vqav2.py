"""VQAv2: ten people's answers, and the one that most of them gave.

    {"question": "Where is he looking?", "image": {"bytes": ..., "path": "COCO_val2014_...jpg"},
     "multiple_choice_answer": "down", "question_type": "none of the above",
     "answers": [{"answer": "down", "answer_confidence": "yes", "answer_id": 1}, ...],
     "answer_type": "other", "image_id": 262148, "question_id": 262148000}

Source: huggingface.co/datasets/HuggingFaceM4/VQAv2 and lmms-lab/VQAv2 (from visualqa.org). The
multiple_choice_answer is learnt; all ten answers count, for VQA accuracy.
"""

from typing import Any

from data_formats.cells import as_object, ask, image_at, text_at
from data_formats.chat import Conversation, FormatError
from data_formats.wording import must_be


def fits(row: Any) -> bool:
    """Whether a row has a question with a multiple_choice_answer, or answers with their giver."""
    if not isinstance(row, dict) or not isinstance(row.get("question"), str):
        return False
    answers = row.get("answers")
    if isinstance(answers, list) and answers:
        return all(isinstance(answer, dict) and "answer" in answer for answer in answers)
    # the test splits have the columns, with nothing in them
    return row.get("multiple_choice_answer") is not None or (
        "multiple_choice_answer" in row
        and row.get("question_id") is not None
        and row.get("answer") is None
    )


def parse(row: Any) -> Conversation:
    """The question and its multiple_choice_answer. Raises `FormatError`, naming the first fault."""
    row = as_object(row)
    question = text_at(row, "question")
    if row.get("multiple_choice_answer") in (None, ""):
        raise FormatError(
            "'multiple_choice_answer' holds nothing: the test splits come without answers; use the "
            "training or validation split"
        )
    answers = row.get("answers") or []
    if not isinstance(answers, list):
        raise FormatError(must_be("'answers'", "a list", answers))
    references = []
    for i, answer in enumerate(answers):
        if not isinstance(answer, dict) or not isinstance(answer.get("answer"), str):
            raise FormatError(must_be(f"answers[{i}]", "an object with a text 'answer'", answer))
        references.append(answer["answer"])
    learnt = text_at(row, "multiple_choice_answer")
    return ask([image_at(row, "image")], question, learnt, references)
