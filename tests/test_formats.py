"""Rows of every dataset, as they are on the Hub, and the conversations they mean."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_formats import coco_captions
from data_formats.chat import (
    Conversation,
    FormatError,
    Image,
    Message,
    Text,
    dump_chat,
    parse_chat,
)
from data_formats.formats import FORMATS, Recognised, converter, recognise
from data_formats.rules import refuse_odd_turns

PNG = {"bytes": b"\x89PNG", "path": None}
COLUMNS = {"image": "scan", "question": "asked", "answer": "given"}


def said(*turns: tuple[str, str | list[str]], references: tuple[str, ...] = ()) -> Conversation:
    """Turns whose parts are text, or images where they begin with `@`; references are the last
    one's.
    """
    messages = []
    for role, content in turns:
        parts = [content] if isinstance(content, str) else content
        messages.append(
            Message(
                role,  # type: ignore[arg-type]
                tuple(Image(part[1:]) if part.startswith("@") else Text(part) for part in parts),
            )
        )
    last = messages.pop()
    return Conversation((*messages, Message(last.role, last.content, True, references)))


def exchange(question: str | list[str], answer: str, *references: str) -> Conversation:
    return said(("user", question), ("assistant", answer), references=references)


TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
CAT = exchange(["@a.png", "What?"], "A cat.")
TEN = ["nokia", "Nokia", "toshiba", "toshiba", "nokia", "x", "y", "z", "toshiba", "nokia"]

# name -> (row, its meaning, the name it is recognised by, the others that read it the same)
TYPICAL: dict[str, tuple[dict[str, Any], Conversation, str, tuple[str, ...]]] = {
    "chat": (
        {
            "messages": [
                {"role": "system", "content": " "},
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "image": "a.png"},
                        {"type": "text", "text": "What?"},
                    ],
                },
                {"role": "assistant", "content": "A cat."},
            ]
        },
        CAT,
        "chat",
        (),
    ),
    "chat, by TRL": (
        {
            "images": ["a.png"],
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "text": None},
                        {"type": "text", "text": "What?"},
                    ],
                },
                {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
            ],
        },
        CAT,
        "chat",
        (),
    ),
    "chat, text alone": (
        {
            "messages": [
                {"role": "user", "content": "What?"},
                {"role": "assistant", "content": "That."},
            ]
        },
        exchange("What?", "That."),
        "chat",
        ("openai", "llama-factory", "ms-swift"),
    ),
    "openai": (
        {
            "messages": [
                {"role": "developer", "content": "Be short."},
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "What?"},
                        {"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}},
                    ],
                },
                {"role": "assistant", "content": "A cat.", "weight": 1},
            ],
            "parallel_tool_calls": False,
        },
        said(
            ("system", "Be short."),
            ("user", ["What?", "@a.png"]),
            ("assistant", "A cat."),
        ),
        "openai",
        (),
    ),
    "llava": (
        {"id": "0", "image": "a.png", "conversations": TURNS},
        CAT,
        "llava",
        ("sharegpt",),
    ),
    "llava, text alone": (
        {
            "id": "0",
            "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}],
        },
        exchange("Hi", "Hello"),
        "llava",
        ("sharegpt", "llama-factory", "mantis"),
    ),
    "sharegpt": (
        {
            "images": ["a.png", "b.png"],
            "conversations": [
                {"from": "system", "value": "Be short."},
                {"from": "human", "value": "Is <image> like <image> ?"},
                {"from": "chatgpt", "value": "Yes."},
            ],
        },
        said(
            ("system", "Be short."),
            ("user", ["Is", "@a.png", "like", "@b.png", "?"]),
            ("assistant", "Yes."),
        ),
        "sharegpt",
        ("llama-factory", "mantis"),
    ),
    "llama-factory": (
        {
            "messages": [
                {"role": "user", "content": "<image>What?"},
                {"role": "assistant", "content": "A cat."},
            ],
            "images": ["a.png"],
            "videos": [],
        },
        CAT,
        "llama-factory",
        ("ms-swift",),
    ),
    "llama-factory, conversations": (
        {"conversations": TURNS, "images": ["a.png"], "system": "", "tools": "[]"},
        CAT,
        "sharegpt",
        ("llama-factory", "mantis"),
    ),
    "llama-factory, alpaca": (
        {
            "instruction": "<image>What?",
            "input": "In a word.",
            "output": "Cat.",
            "history": [["Hello", "Hi."]],
            "system": "Be short.",
            "images": ["a.png"],
        },
        said(
            ("system", "Be short."),
            ("user", "Hello"),
            ("assistant", "Hi."),
            ("user", ["@a.png", "What?\nIn a word."]),
            ("assistant", "Cat."),
        ),
        "llama-factory",
        (),
    ),
    "ms-swift": (
        {
            "query": "What?",
            "response": "Cat.",
            "history": [["Hello", "Hi."]],
            "system": None,
            "images": "a.png",
        },
        said(
            ("user", ["@a.png", "Hello"]),
            ("assistant", "Hi."),
            ("user", "What?"),
            ("assistant", "Cat."),
        ),
        "ms-swift",
        (),
    ),
    "ms-swift, without placeholders": (
        {
            "messages": [
                {"role": "user", "content": "What?"},
                {"role": "assistant", "content": "A cat.", "loss": True},
            ],
            "images": ["a.png"],
        },
        CAT,
        "ms-swift",
        (),
    ),
    "ms-swift, pairs": (
        {"conversation": [{"human": "<image>What?", "assistant": "A cat."}], "images": ["a.png"]},
        CAT,
        "ms-swift",
        (),
    ),
    "mantis": (
        {
            "id": "nlvr2_0",
            "images": [{"bytes": None, "path": "a.png"}, {"path": "b.png"}],
            "conversation": [
                {"role": "user", "content": "<image> <image> Alike?"},
                {"role": "assistant", "content": "Yes"},
            ],
            "source": "nlvr2",
        },
        exchange(["@a.png", "@b.png", "Alike?"], "Yes"),
        "mantis",
        (),
    ),
    "cauldron": (
        {
            "images": [{"bytes": None, "path": "a.png"}],
            "texts": [
                {"user": "What?", "assistant": "A cat.", "source": "VQAv2"},
                {"user": "Its colour?", "assistant": "Black.", "source": "VQAv2"},
            ],
        },
        said(
            ("user", ["@a.png", "What?"]),
            ("assistant", "A cat."),
            ("user", "Its colour?"),
            ("assistant", "Black."),
        ),
        "cauldron",
        (),
    ),
    "docvqa": (
        {
            "questionId": "337",
            "question": "When?",
            "question_types": ["handwritten"],
            "image": "documents/a.png",
            "docId": 279,
            "ucsf_document_id": "xnbl0037",
            "ucsf_document_page_no": "1",
            "answers": ["1/8/93", "1.8.93"],
            "data_split": "val",
        },
        exchange(["@documents/a.png", "When?"], "1/8/93", "1/8/93", "1.8.93"),
        "docvqa",
        (),
    ),
    "docvqa, by nielsr": (
        {
            "id": "train_0",
            "image": {"bytes": None, "path": "a.png"},
            "query": {"de": "Wann?", "en": "When?"},
            "answers": ["1/8/93"],
            "words": ["a"],
            "bounding_boxes": [[0, 0, 1, 1]],
        },
        exchange(["@a.png", "When?"], "1/8/93"),
        "docvqa",
        (),
    ),
    "textvqa": (
        {
            "image_id": "0054c91397f2fe05",
            "question_id": 0,
            "question": "Brand?",
            "image": {"bytes": None, "path": "a.jpg"},
            "ocr_tokens": ["nokia"],
            "answers": TEN,
        },
        exchange(["@a.jpg", "Brand?"], "nokia", *TEN),
        "textvqa",
        (),
    ),
    "textvqa, without the images": (
        {"image_id": "0054c91397f2fe05", "question": "Brand?", "answers": ["b", "a", "a", "b"]},
        exchange(["@0054c91397f2fe05.jpg", "Brand?"], "b", "b", "a", "a", "b"),
        "textvqa",
        (),
    ),
    "vqav2": (
        {
            "question_type": "none of the above",
            "multiple_choice_answer": "down",
            "answers": [
                {"answer": "down", "answer_confidence": "yes", "answer_id": 1},
                {"answer": "at table", "answer_confidence": "yes", "answer_id": 2},
                {"answer": "down", "answer_confidence": "maybe", "answer_id": 3},
            ],
            "image_id": 262148,
            "answer_type": "other",
            "question_id": 262148000,
            "question": "Where is he looking?",
            "image": "a.jpg",
        },
        exchange(["@a.jpg", "Where is he looking?"], "down", "down", "at table", "down"),
        "vqav2",
        (),
    ),
    "chartqa": (
        {"image": "a.png", "query": "How many?", "label": ["14", "15"], "human_or_machine": 0},
        exchange(["@a.png", "How many?"], "14", "14", "15"),
        "chartqa",
        (),
    ),
    "chartqa, by lmms-lab": (
        {"type": "human_test", "question": "How many?", "answer": "14", "image": "a.png"},
        exchange(["@a.png", "How many?"], "14"),
        "chartqa",
        (),
    ),
    "chartqa, its repository": (
        {"imgname": "a.png", "query": "How many?", "label": "14"},
        exchange(["@a.png", "How many?"], "14"),
        "chartqa",
        (),
    ),
    "mmmu": (
        {
            "question": "Is <image 2> in <image 1>?",
            "options": "['yes', \"it's not\"]",
            "answer": "B",
            "question_type": "multiple-choice",
            "image_1": "a.png",
            "image_2": "b.png",
            "image_3": "c.png",
            "image_4": None,
        },
        exchange(["@c.png", "Is", "@b.png", "in", "@a.png", "?\nA. yes\nB. it's not"], "B"),
        "mmmu",
        (),
    ),
    "mmmu, options that are images": (
        {
            "question": "Which?",
            "options": ["<image 1>", "<image 2>"],
            "answer": "A",
            "image_1": "a.png",
            "image_2": "b.png",
        },
        exchange(["Which?\nA.", "@a.png", "B.", "@b.png"], "A"),
        "mmmu",
        (),
    ),
    "mmmu, open": (
        {"question": "How far?", "options": "[]", "answer": "['24.5', '24.50']", "image_1": "a"},
        exchange(["@a", "How far?"], "24.5", "24.5", "24.50"),
        "mmmu",
        (),
    ),
    "cord": (
        {
            "image": "a.png",
            "ground_truth": '{"gt_parse": {"total": {"price": "45,500"}, "menü": [{"nm": "é"}]}, '
            '"meta": {"version": "2.0.0"}}',
        },
        exchange(
            ["@a.png", "Extract the fields as JSON."],
            '{"total":{"price":"45,500"},"menü":[{"nm":"é"}]}',
        ),
        "cord",
        (),
    ),
    "coco-captions": (
        {"image": "a.jpg", "captions": ["A man on a moped.", "A man riding."]},
        exchange(
            ["@a.jpg", "Describe the image briefly."],
            "A man on a moped.",
            "A man on a moped.",
            "A man riding.",
        ),
        "coco-captions",
        (),
    ),
    "coco-captions, a row a caption": (
        {"image": "a.jpg", "filename": "b.jpg", "cocoid": 7, "caption": "A man."},
        exchange(["@a.jpg", "Describe the image briefly."], "A man."),
        "coco-captions",
        (),
    ),
    "coco-captions, by Karpathy": (
        {
            "filepath": "val2014",
            "filename": "a.jpg",
            "imgid": 0,
            "sentids": [770337],
            "sentences": [{"tokens": ["a", "man"], "raw": "A man.", "imgid": 0}],
        },
        exchange(["@val2014/a.jpg", "Describe the image briefly."], "A man."),
        "coco-captions",
        (),
    ),
    "coco-captions, by HuggingFaceM4": (
        {
            "filepath": "a.jpg",
            "filename": "a.jpg",
            "sentences": {"tokens": ["a", "man"], "raw": "A man.", "imgid": 0},
        },
        exchange(["@a.jpg", "Describe the image briefly."], "A man."),
        "coco-captions",
        (),
    ),
}


def named(example: str) -> str:
    return example.split(",")[0]


def tried(function: Callable[..., Any], *arguments: Any) -> tuple[Any, str]:
    """What a function gives, and what it says if it refuses."""
    try:
        return function(*arguments), ""
    except FormatError as error:
        return None, str(error)


def parse(name: str, row: Any) -> Conversation:
    return converter(name, columns=COLUMNS if name == "columns" else None)(row)


def test_every_format_has_a_typical_row() -> None:
    assert {named(example) for example in TYPICAL} | {"columns"} == set(FORMATS)


@pytest.mark.parametrize("example", TYPICAL)
def test_a_typical_row_means_what_its_dataset_says(example: str) -> None:
    row, meaning, _, _ = TYPICAL[example]
    assert parse(named(example), row) == meaning
    refuse_odd_turns(meaning)


@pytest.mark.parametrize("example", TYPICAL)
def test_a_typical_row_is_recognised_with_those_who_read_it_the_same(example: str) -> None:
    row, meaning, name, same_as = TYPICAL[example]
    assert recognise([row]) == Recognised(name, same_as)
    assert named(example) in (name, *same_as)
    assert all(parse(other, row) == meaning for other in (name, *same_as))


@pytest.mark.parametrize("example", TYPICAL)
def test_columns_that_hold_nothing_change_nothing(example: str) -> None:
    """Tables written as JSON have every column in every row."""
    row, meaning, name, same_as = TYPICAL[example]
    every = {key: None for other, *_ in TYPICAL.values() for key in other if key not in row}
    for filled in (row | every, every | row):
        assert recognise([filled]) == Recognised(name, same_as)
        assert parse(named(example), filled) == meaning


@pytest.mark.parametrize("example", TYPICAL)
def test_a_converted_row_reads_back_from_json_as_it_was(example: str) -> None:
    _, meaning, _, _ = TYPICAL[example]
    assert parse_chat(json.loads(json.dumps(dump_chat(meaning)))) == meaning


@pytest.mark.parametrize("first", TYPICAL)
@pytest.mark.parametrize("second", ["chat", "llava", "llama-factory", "vqav2", "cord"])
def test_rows_of_two_datasets_in_a_file_are_refused_or_mean_the_same(
    first: str, second: str
) -> None:
    rows = [TYPICAL[first][0], TYPICAL[second][0]]
    recognised, refusal = tried(recognise, rows)
    if recognised:
        meanings = [parse(recognised.name, row) for row in rows]
        assert meanings == [TYPICAL[first][1], TYPICAL[second][1]]
    else:
        assert "some rows look like" in refusal
        assert "keep rows of one format in a file" in refusal


def test_rows_with_and_without_images_are_one_format() -> None:
    text_alone = TYPICAL["chat, text alone"][0]
    assert recognise([text_alone, TYPICAL["openai"][0]]).name == "openai"
    assert recognise([text_alone, TYPICAL["llama-factory"][0]]).name == "llama-factory"
    assert recognise([TYPICAL["llava, text alone"][0], TYPICAL["sharegpt"][0]]).name == "sharegpt"


def test_a_docvqa_row_stays_one_beside_an_id_of_its_image_and_words() -> None:
    row = TYPICAL["docvqa"][0] | {"image_id": "a", "ocr_tokens": ["1/8/93"]}
    assert recognise([row]) == Recognised("docvqa")


def test_a_placeholder_in_messages_is_never_read_as_a_word() -> None:
    """Its images may stand in a misspelt column."""
    row = TYPICAL["llama-factory"][0]
    misspelt = {"messages": row["messages"], "image_paths": ["a.png"]}
    assert recognise([misspelt]) == Recognised("llama-factory", ("ms-swift",))
    with pytest.raises(FormatError, match="1 <image> placeholder but no images"):
        parse("llama-factory", misspelt)


def test_two_formats_that_read_a_file_differently_are_both_named() -> None:
    row, _, _, _ = TYPICAL["llama-factory"]
    one_short = row | {"images": ["a.png", "b.png"]}  # refused by one, put first by the other
    message = "fits both 'llama-factory' and 'ms-swift', which read it differently; set format"
    with pytest.raises(FormatError, match=message):
        recognise([row, one_short])


def test_rows_that_fit_nothing_are_left_to_the_reader_while_they_are_few() -> None:
    good = TYPICAL["llava"][0]
    assert recognise([good, {"id": "1"}, "text", good]).name == "llava"
    with pytest.raises(FormatError, match="no known format has the keys 'id'"):
        recognise([good, {"id": "1"}, {"id": "2"}])


@pytest.mark.parametrize("rows", [[], ["text", 3, None, []]])
def test_rows_that_are_no_objects_have_no_format(rows: list[Any]) -> None:
    with pytest.raises(FormatError, match="no row is an object"):
        recognise(rows)


@pytest.mark.parametrize(
    ("row", "advice"),
    [
        (
            {"photo": "a.png", "frage": 1, "question": "What?", "replies": ["x"], "answer": "y"},
            "columns: {image: photo, question: question, answer: answer}",
        ),
        (
            {"images": ["a.png"], "problem": "What?", "gold_answer": "x", "answer_id": None},
            "columns: {images: images, question: problem, answer: gold_answer}",
        ),
        (
            {"image": PNG, "label": 3},
            "columns: {image: image, answer: label}, question: the text to ask with",
        ),
        ({"answer": "x", "id": 1}, "set format to the one that made the rows"),
        (
            {"converstations": [], "image": "a.png"},
            "is 'converstations' meant to be 'conversations'",
        ),
        ({"messages": "x"}, "as 'chat', 'messages' must be a list with at least one message"),
        ({"messages": [{"role": "usr", "content": "x"}]}, "as 'chat', messages[0].role is 'usr'"),
        ({"images": ["a.png"], "id": 1}, "set format to the one that made the rows"),
        ({"texts": "x"}, "as 'cauldron', 'texts' must be a list of exchanges, found a string"),
        ({"response": 5}, "set format to the one that made the rows"),
    ],
)
def test_an_unknown_table_is_answered_with_the_mapping_to_write(
    row: dict[str, Any], advice: str
) -> None:
    with pytest.raises(FormatError) as refused:
        recognise([row])
    assert advice in str(refused.value)
    assert next(iter(row)) in str(refused.value)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (
            {"image": "a.png", "conversations": [{"from": "human", "value": 5}]},
            "as 'llava', conversations[0].value must be",
        ),
        ({"images": ["a.png"], "texts": "q"}, "as 'cauldron', 'texts' must be a list"),
    ],
)
def test_what_is_wrong_under_a_known_key_comes_before_guesses_about_others(
    row: dict[str, Any], told: str
) -> None:
    with pytest.raises(FormatError) as refused:
        recognise([row])
    assert told in str(refused.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "shargpt"}, "format 'shargpt' is unknown; did you mean 'sharegpt'"),
        ({"name": "xyz"}, "expected 'chat', 'openai'"),
        ({"name": "chat", "columns": COLUMNS}, "columns has no effect with format 'chat'"),
        ({"name": "docvqa", "question": "Why?"}, "question has no effect with format 'docvqa'"),
        ({"name": "columns"}, r"needs the names of the columns; add columns: \{image"),
        ({"name": "columns", "columns": {"question": "q"}}, r"columns\.answer is missing"),
        ({"name": "columns", "columns": {"answer": "a"}}, r"columns\.question is missing"),
        ({"name": "columns", "columns": COLUMNS, "question": "Why?"}, "are both given"),
        ({"name": "columns", "columns": COLUMNS | {"images": "b"}}, "both 'image' and 'images'"),
        ({"name": "columns", "columns": COLUMNS | {"anwser": "b"}}, "did you mean 'answer'"),
        ({"name": "columns", "columns": COLUMNS | {"answer": 3}}, "must be a column's name"),
    ],
)
def test_a_name_and_its_settings_must_go_together(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        converter(**arguments)


def test_a_question_of_the_recipe_is_asked_in_place_of_the_usual_one() -> None:
    row = TYPICAL["cord"][0]
    assert converter("cord", question="Fields?")(row).messages[0].text == "Fields?"
    row = TYPICAL["coco-captions"][0]
    assert converter("coco-captions", question="Say.")(row).messages[0].text == "Say."


@pytest.mark.parametrize("empty", [None, "", []])
def test_an_empty_picture_cell_is_no_row_without_a_picture(empty: Any) -> None:
    row = {"scan": empty, "asked": "Sum?", "given": "3"}
    with pytest.raises(FormatError, match="'scan' holds no picture; give one"):
        converter("columns", columns=COLUMNS)(row)


@pytest.mark.parametrize(
    ("row", "columns", "question", "meaning"),
    [
        (
            {"scan": "a.png", "asked": "Sum?", "given": ["12,50", "12.50"], "rest": 1},
            COLUMNS,
            None,
            exchange(["@a.png", "Sum?"], "12,50", "12,50", "12.50"),
        ),
        (
            {"scan": ["a.png", "b.png"], "asked": "Sum of <image> and <image>?", "given": 3},
            {"images": "scan", "question": "asked", "answer": "given"},
            None,
            exchange(["Sum of", "@a.png", "and", "@b.png", "?"], "3"),
        ),
        (
            {"scan": None, "told": "Be short.", "given": 0.1},
            {"answer": "given", "system": "told"},
            "Sum?",
            said(("system", "Be short."), ("user", "Sum?"), ("assistant", "0.1")),
        ),
    ],
)
def test_columns_are_read_as_the_recipe_names_them(
    row: Any, columns: dict[str, str], question: str | None, meaning: Conversation
) -> None:
    assert converter("columns", columns=columns, question=question)(row) == meaning


def test_a_missing_column_is_answered_with_those_there_are() -> None:
    with pytest.raises(FormatError, match=r"has no column 'asked' .found 'scan', 'askd'.*'askd'"):
        parse("columns", {"scan": "a.png", "askd": "Sum?", "given": "1"})


def test_an_annotation_document_gives_a_row_an_image_in_its_order() -> None:
    document = {
        "images": [{"id": 9, "file_name": "b.jpg"}, {"id": 2, "file_name": "a.jpg"}],
        "annotations": [
            {"image_id": 2, "id": 1, "caption": "A man."},
            {"image_id": 9, "id": 2, "caption": "A dog."},
            {"image_id": 2, "id": 3, "caption": "Someone."},
        ],
    }
    assert coco_captions.rows_of(document) == [
        {"image": "b.jpg", "captions": ["A dog."]},
        {"image": "a.jpg", "captions": ["A man.", "Someone."]},
    ]
    document["annotations"].append({"image_id": 3, "caption": "Lost."})
    with pytest.raises(FormatError, match=r"annotations\[3\]\.image_id is 3, but no image"):
        coco_captions.rows_of(document)


WITHOUT_TURNS = {"id": 1, "question": "What?", "image": "a.png"}


def changed(example: str, **cells: Any) -> dict[str, Any]:
    return TYPICAL[example][0] | cells


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("sharegpt", {"converstations": TURNS}, "'conversations' is missing .*'converstations' m"),
        ("sharegpt", {"conversations": [1]}, r"conversations\[0\] must be an object with 'from'"),
        ("sharegpt", {"conversations": [{"from": "me", "value": "x"}]}, r"\[0\]\.from is 'me'"),
        ("sharegpt", {"conversations": [{"from": "human"}]}, r"\[0\]\.value must be a string"),
        (
            "sharegpt",
            {"conversations": [{"from": "observation", "value": "x"}]},
            "part of a tool call",
        ),
        ("sharegpt", {"conversations": TURNS, "images": [3]}, r"images\[0\] must be a path"),
        ("sharegpt", {"conversations": TURNS, "image": "a", "images": ["b"]}, "has both 'image'"),
        ("sharegpt", {"conversations": TURNS, "videos": ["a.mp4"]}, "'videos' holds videos"),
        ("sharegpt", {"conversations": TURNS, "chosen": {"x": 1}}, "'chosen' holds preferences"),
        ("llava", {"conversations": TURNS, "images": ["a"]}, "set format: sharegpt"),
        ("llava", WITHOUT_TURNS, "'conversations' is missing .found 'id', 'question', 'image'"),
        ("llama-factory", changed("llama-factory", tools='[{"name": "x"}]'), "holds tool calls"),
        ("llama-factory", changed("llama-factory", images=[]), "1 <image> placeholder but no im"),
        ("llama-factory", {"instruction": "x"}, "'output' must be a string, found nothing"),
        ("llama-factory", {"input": "x"}, "expected messages, conversations, or instruction"),
        (
            "llama-factory",
            changed("llama-factory, alpaca", history=[["one"]]),
            r"history\[0\] must be a question and its answer",
        ),
        ("ms-swift", changed("ms-swift", rejected_response="no"), "holds preferences"),
        ("ms-swift", changed("ms-swift", objects={"bbox": []}), "boxes to be filled in"),
        ("ms-swift", changed("ms-swift", label=False), "a good or bad answer .KTO."),
        ("ms-swift", {"query": "x"}, "'response' must be a string, found nothing"),
        ("ms-swift", {"conversation": [{"human": "x"}]}, r"conversation\[0\] must be an object"),
        (
            "ms-swift",
            {"messages": [{"role": "assistant", "content": "x", "loss": "no"}]},
            r"messages\[0\]\.loss must be true or false, found a string",
        ),
        ("mantis", {"images": ["a.png"]}, "'conversation' is missing"),
        ("cauldron", {"images": ["a.png"]}, "'texts' is missing"),
        ("cauldron", {"texts": [{"user": "x"}]}, r"texts\[0\]\.assistant must be a string"),
        ("docvqa", changed("docvqa", answers=None), "test splits come without answers"),
        ("docvqa", changed("docvqa", image=None), "has no image .*column 'image'"),
        ("docvqa", changed("docvqa", question=""), "'question' must be a text, found nothing"),
        ("textvqa", changed("textvqa", answers=[]), "the test split comes without answers"),
        ("vqav2", changed("vqav2", multiple_choice_answer=None), "come without answers"),
        ("vqav2", changed("vqav2", answers=["x"]), r"answers\[0\] must be an object with a text"),
        ("chartqa", changed("chartqa", label=[]), "'label' is missing|the answer there"),
        ("chartqa", changed("chartqa", label=[True]), r"label\[0\] is true; write it as a text"),
        ("mmmu", changed("mmmu", options="['yes', no]"), "which is no list as Python or JSON"),
        ("mmmu", changed("mmmu", options="__import__('os')"), "which is no list as Python or JSON"),
        ("mmmu", changed("mmmu", options="3"), "'options' must be a list, found a number"),
        ("mmmu", changed("mmmu", options=[1]), "'options' must be a list of texts"),
        ("mmmu", changed("mmmu", options=["x"] * 27), "only 26 letters"),
        ("mmmu", changed("mmmu", answer="C"), "'answer' is 'C', .* letters A, B; write one"),
        ("mmmu", changed("mmmu", answer="?"), "test splits come without answers"),
        ("mmmu", changed("mmmu", image_2=None), "<image 2> is mentioned, and 'image_2' holds no"),
        ("cord", changed("cord", ground_truth='{"gt_parse": '), "'ground_truth' is not JSON"),
        ("cord", changed("cord", ground_truth="[" * 100_000), "nested too deeply"),
        ("cord", changed("cord", ground_truth='{"gt": 1}'), "neither 'gt_parse' nor 'gt_parses'"),
        ("cord", changed("cord", ground_truth='{"gt_parse": NaN}'), "cannot be written as JSON"),
        ("cord", changed("cord", ground_truth="[]"), "must hold an object, found an empty list"),
        ("coco-captions", {"image": "a.png"}, "has no caption; expected one in the column"),
        ("coco-captions", {"image": "a", "sentences": [{"tokens": []}]}, "must be a text, found n"),
        ("columns", {"scan": "a", "asked": "x", "given": []}, "'given' holds no answer"),
        ("columns", {"scan": "a", "asked": " ", "given": "x"}, "must hold the question's text"),
        ("columns", {"scan": 3, "asked": "x", "given": "y"}, "'scan' must be a path"),
        ("columns", {"scan": "a", "asked": "x", "given": float("inf")}, "a text or a number"),
        ("columns", {"scan": "a", "asked": "<image><image>", "given": "x"}, "2 <image> placehold"),
        ("openai", {"messages": []}, "an openai row has a list of messages"),
        ("openai", changed("openai", tools=[{"type": "function"}]), "'tools' is about tool calls"),
        ("openai", changed("openai", images=["a.png"]), "'images' stands beside 'messages'"),
        ("openai", {"messages": [{"role": "tool", "content": "x"}]}, "part of a tool call"),
        ("openai", {"messages": [{"role": "gpt", "content": "x"}]}, r"\[0\]\.role is 'gpt'"),
        (
            "openai",
            {"messages": [{"role": "assistant", "content": None, "refusal": "No."}]},
            r"messages\[0\]\.refusal cannot be learnt",
        ),
        (
            "openai",
            {"messages": [{"role": "assistant", "content": "x", "wieght": 0}]},
            "'wieght'; did you mean 'weight'",
        ),
        (
            "openai",
            {"messages": [{"role": "assistant", "content": "x", "weight": 2}]},
            "weight must be 0 or 1",
        ),
        (
            "openai",
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "", "image": 1}]}]},
            r"content\[0\] has an unknown key 'image'; expected type, text",
        ),
        (
            "openai",
            {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
            "type is 'input_audio'; expected 'text' or 'image_url'",
        ),
        (
            "openai",
            {"messages": [{"role": "user", "content": [{"type": "image", "image": "a"}]}]},
            "set format: chat for such parts",
        ),
    ],
)
def test_a_row_of_another_shape_says_where_and_what_to_do(
    name: str, row: Any, message: str
) -> None:
    with pytest.raises(FormatError, match=message):
        parse(name, row)


@pytest.mark.parametrize(
    ("value", "source"),
    [
        ("scans/a.png", "scans/a.png"),
        (b"\x89PNG", b"\x89PNG"),
        ({"bytes": b"\x89PNG", "path": "a.png"}, b"\x89PNG"),
        ({"bytes": None, "path": "a.png"}, "a.png"),
        ({"url": "https://example.com/a.png"}, "https://example.com/a.png"),
    ],
)
def test_an_image_is_written_alike_in_every_format(value: Any, source: str | bytes) -> None:
    part = {"type": "image", "image": value}
    rows = {
        "chat": {"messages": [{"role": "user", "content": [part]}]},
        "chat, by TRL": changed("chat, by TRL", images=[value]),
        "sharegpt": {"conversations": TURNS, "images": [value]},
        "llava": {"conversations": TURNS, "image": value},
        "ms-swift": changed("ms-swift", images=value),
        "cauldron": changed("cauldron", images=[value]),
        "docvqa": changed("docvqa", image=value),
        "cord": changed("cord", image=value),
        "columns": {"scan": value, "asked": "x", "given": "y"},
    }
    for example, row in rows.items():
        assert next(parse(named(example), row).images()) == Image(source), example


# hypothesis: whatever a file holds, a fault is a FormatError, and telling formats apart is safe

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["", " ", "user", "human", "<image>", "a.png", "text", "image", "{}"])
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "from", "value", "type", "text", "image", "en"])
            | st.sampled_from(["user", "assistant", "answer", "raw", "path", "bytes", "gt_parse"])
            | st.text(max_size=3),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


def mutations(name: str) -> st.SearchStrategy[Any]:
    """Typical rows of a format with any of their values, however deep, replaced by any other."""
    rows = [row for example, (row, *_) in TYPICAL.items() if named(example) == name]
    rows = rows or [{"scan": "a.png", "asked": "x", "given": "y"}]

    def mutated(value: Any, draw: Callable[[st.SearchStrategy[Any]], Any]) -> Any:
        if draw(st.integers(0, 7)) == 0:
            return draw(json_values)
        if isinstance(value, dict):
            return {key: mutated(inner, draw) for key, inner in value.items()}
        return [mutated(inner, draw) for inner in value] if isinstance(value, list) else value

    @st.composite
    def row(draw: Any) -> Any:
        return {k: mutated(v, draw) for k, v in draw(st.sampled_from(rows)).items()}

    return row()


@settings(max_examples=60, deadline=None)
@given(st.data())
@pytest.mark.parametrize("name", FORMATS)
def test_whatever_a_row_holds_it_is_read_or_refused_in_words(
    name: str, data: st.DataObject
) -> None:
    row = data.draw(mutations(name) | json_values)
    assert all(format_.fits(row) in (True, False) for format_ in FORMATS.values())
    conversation, refusal = tried(parse, name, row)
    assert conversation or refusal
    if conversation and tried(refuse_odd_turns, conversation) == (None, ""):
        written = json.dumps(dump_chat(conversation))
        assert parse_chat(json.loads(written)) == conversation


@settings(max_examples=100, deadline=None)
@given(st.lists(json_values | st.sampled_from([row for row, *_ in TYPICAL.values()]), max_size=4))
def test_first_rows_of_any_kind_are_recognised_or_refused_in_words(rows: list[Any]) -> None:
    recognised, refusal = tried(recognise, rows)
    assert refusal or recognised.name in FORMATS
