"""COCO's captions, a row an image, in the shapes they have on the Hub; Flickr30k has the same.

    {"image": "000000391895.jpg", "captions": ["A man on a moped.", "A man riding.", ...]}
    {"image": {"bytes": ..., "path": null}, "caption": "A man on a moped.", "cocoid": 391895}
    {"filepath": "val2014", "filename": "COCO_val2014_000000391895.jpg",
     "sentences": [{"raw": "A man on a moped.", "tokens": [...]}, ...]}

Source: cocodataset.org (the annotation document, see `rows_of`), huggingface.co/datasets/
jxie/coco_captions (caption), yerevann/coco-karpathy and HuggingFaceM4/COCO (sentences), cs.stanford
.edu/people/karpathy/deepimagesent (raw sentences). The first caption is learnt; all count.
"""

from typing import Any

from data_formats.cells import answers_of, as_object, ask, image_at
from data_formats.chat import Conversation, FormatError, Image
from data_formats.wording import listed, must_be

QUESTION = "Describe the image briefly."

_CAPTIONS = ("captions", "caption", "sentences_raw", "sentences")
_IMAGES = ("image", "file_name", "filename")
_ANOTHERS = ("messages", "conversations", "conversation", "question", "query", "texts", "answers")


def fits(row: Any) -> bool:
    """Whether a row has an image and captions, and no question."""
    return (
        isinstance(row, dict)
        and any(row.get(key) for key in _IMAGES)
        and any(_are_captions(row.get(key)) for key in _CAPTIONS)
        and not any(row.get(key) for key in _ANOTHERS)
    )


def parse(row: Any, *, question: str | None = None) -> Conversation:
    """An image's first caption, asked for with `question`. Raises `FormatError`."""
    row = as_object(row)
    key = next((key for key in _CAPTIONS if row.get(key)), None)
    if key is None:
        raise FormatError(
            f"has no caption; expected one in the column {listed(_CAPTIONS, 'or')}; add "
            "it, or leave the row out"
        )
    captions = answers_of(_raw(row[key], key), key)
    return ask([_image(row)], question or QUESTION, captions[0], captions)


def rows_of(document: Any) -> list[dict[str, Any]]:
    """The rows of an official annotation document, `{"images": [{"id", "file_name"}, ...],
    "annotations": [{"image_id", "caption"}, ...]}`: one an image, in the document's order.

    An image that nobody described has no captions, for `parse` to complain about. Raises
    `FormatError` for captions of images that are not listed.
    """
    document = as_object(document)
    for key in ("images", "annotations"):
        if not isinstance(document.get(key), list):
            raise FormatError(must_be(repr(key), "a list", document.get(key)))
    rows: dict[Any, dict[str, Any]] = {}
    for i, image in enumerate(document["images"]):
        if not isinstance(image, dict) or not isinstance(image.get("file_name"), str):
            raise FormatError(must_be(f"images[{i}]", "an object with 'id' and 'file_name'", image))
        rows[_id(image.get("id"), f"images[{i}].id")] = {
            "image": image["file_name"],
            "captions": [],
        }
    for i, annotation in enumerate(document["annotations"]):
        if not isinstance(annotation, dict) or not isinstance(annotation.get("caption"), str):
            raise FormatError(
                must_be(f"annotations[{i}]", "an object with 'image_id' and 'caption'", annotation)
            )
        id_ = _id(annotation.get("image_id"), f"annotations[{i}].image_id")
        if id_ not in rows:
            raise FormatError(
                f"annotations[{i}].image_id is {id_}, but no image has that id; add it to 'images'"
            )
        rows[id_]["captions"].append(annotation["caption"])
    return list(rows.values())


def _id(value: Any, place: str) -> int | str:
    if isinstance(value, int | str):
        return value
    raise FormatError(must_be(place, "a number or a text", value))


def _are_captions(value: Any) -> bool:
    if isinstance(value, str):
        return bool(value)
    if isinstance(value, dict):
        return isinstance(value.get("raw"), str)
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(v, str) or (isinstance(v, dict) and "raw" in v) for v in value)
    )


def _raw(value: Any, key: str) -> list[Any]:
    """Captions as texts: Karpathy's sentences are objects, and one alone may stand without a
    list.
    """
    sentences = value if isinstance(value, list) else [value]
    texts = []
    for i, sentence in enumerate(sentences):
        text = sentence.get("raw") if isinstance(sentence, dict) else sentence
        if not isinstance(text, str):
            raise FormatError(must_be(f"{key}[{i}]", "a text", text))
        texts.append(text)
    return texts


def _image(row: dict[Any, Any]) -> Image:
    folder, name = row.get("filepath"), row.get("filename")
    if row.get("image") or row.get("file_name") or not isinstance(folder, str) or not folder:
        return image_at(row, *_IMAGES)
    if not isinstance(name, str) or not name or folder.endswith(name):
        return Image(folder)
    return Image(f"{folder}/{name}")
