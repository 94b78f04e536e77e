"""TextVQA: ten people's answers to a question about text in a photo.

    {"image_id": "0054c91397f2fe05", "question_id": 0, "question": "what is the brand of phone?",
     "image": {"bytes": ..., "path": null}, "image_classes": [...], "ocr_tokens": [...],
     "answers": ["nokia", "nokia", "nokia", "toshiba", ...]}

Source: huggingface.co/datasets/lmms-lab/textvqa (from textvqa.org/dataset). The answer given most
often is learnt, the first of them on a tie; all ten count, for VQA accuracy. Without an image
column, the file is IMAGE_ID.jpg, as in the archive of the photos.
"""

from typing import Any

from data_formats.cells import answers_of, as_object, ask, image_at, most_common, text_at
from data_formats.chat import Conversation, FormatError, Image
from data_formats.docvqa import fits as fits_docvqa
from data_formats.wording import kind


def fits(row: Any) -> bool:
    """Whether a row has a question, a photo's id and plain answers, and is not DocVQA's."""
    if not isinstance(row, dict) or not isinstance(row.get("question"), str) or fits_docvqa(row):
        return False
    answers = row.get("answers")
    return (
        (isinstance(row.get("image_id"), str) or isinstance(row.get("ocr_tokens"), list))
        and "answers" in row
        and (answers is None or isinstance(answers, list))
        and all(isinstance(answer, str) for answer in answers or [])
        and row.get("multiple_choice_answer") is None
    )


def parse(row: Any) -> Conversation:
    """The question and its most common answer. Raises `FormatError`, naming the first fault."""
    row = as_object(row)
    question = text_at(row, "question")
    if not row.get("answers"):
        raise FormatError(
            f"'answers' holds {kind(row.get('answers'))}: the test split comes without answers; "
            "use the training or validation split"
        )
    answers = answers_of(row["answers"], "answers")
    name = row.get("image_id")
    if not row.get("image") and isinstance(name, str) and name:
        image = Image(f"{name}.jpg")
    else:
        image = image_at(row, "image")
    return ask([image], question, most_common(answers), answers)
