"""What a request may ask and what the model is given for it, without a server."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from finetune import chat
from finetune.data.images import ImageAccess
from finetune.merge import merge
from finetune.serving import CHAT, MAX_BODY_BYTES, Asked, Gate, RefusedError, Served
from tests.conftest import noise
from tests.families import CHECKPOINTS
from tests.test_merge import made_run
from tests.test_serve import KEY, QUESTION, QUIET, data_uri, user


def asked_gate(gate: Gate, body: bytes, **headers: str) -> int:
    """The status of the answer to a question whose body comes in one piece."""
    sent: list[Any] = []
    sender = [(name.encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "path": CHAT, "method": "POST", "headers": sender}

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    asyncio.run(gate(scope, receive, send))
    assert json.loads(sent[1]["body"])["error"]["message"]
    return sent[0]["status"]


def named_gate(**options: Any) -> Gate:
    """A gate of a model that is never asked."""
    pytest.importorskip("fastapi")
    return Gate(cast(Any, SimpleNamespace(name="run")), **options)


def test_a_request_that_is_too_large_is_refused_before_it_is_read() -> None:
    assert asked_gate(named_gate(), b" " * (MAX_BODY_BYTES + 1)) == 413


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "127.0.0.1:8000"}, 400),
        ({"host": "[::1]:8000", "origin": "http://localhost:3000"}, 400),
        ({"host": "elsewhere.example"}, 403),  # a name that was made to point here
        ({"host": "localhost:8000", "origin": "http://elsewhere.example"}, 403),
        ({"host": "localhost:8000", "origin": "null"}, 403),
    ],
)
def test_without_a_key_no_web_page_from_elsewhere_may_ask(
    headers: dict[str, str], status: int
) -> None:
    assert asked_gate(named_gate(), b"{}", **headers) == status


@pytest.mark.parametrize("given", ["", "Bearer", "Bearer ", KEY, f"Basic {KEY}", f"Bearer {KEY}x"])
def test_a_key_is_asked_for_as_a_bearer(given: str) -> None:
    gate = named_gate(api_key=KEY)
    assert asked_gate(gate, b"{}", authorization=given) == 401
    assert asked_gate(gate, b"{}", authorization=f"bearer {KEY}", host="a.example") == 400


FAULTY = [
    (b"{", "not JSON"),
    (b"\xff", "not JSON"),
    (b"[" * 100_000, "not JSON"),
    (b"[]", "a JSON object"),
    ({"messages": None}, "messages: "),
    ({"messages": 5}, "messages: "),
    ({"messages": ["Hello"]}, r"messages\[0\] must be an object"),
    ({"messages": [{"content": "Hello"}]}, "role"),
    ({"messages": [{"role": "user"}]}, "content"),
    ({"messages": [{"role": "user", "content": [{"type": "video_url"}]}]}, "video_url"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "image_url"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}, "a string"),
    ({"messages": [{"role": "assistant", "content": "Hello"}]}, "last message"),
    ({"model": None}, "model: "),
    ({"generation_config": "{}"}, "generation_config is not served"),
    ({"chat_template_kwargs": {"a": 1}}, "chat_template_kwargs is not served"),
    ({"tools": [{"type": "function"}]}, "tools is not served"),
    ({"stop": ["."]}, "stop is not served"),
    ({"n": 2}, "n: "),
    ({"max_tokens": 0}, "max_tokens: "),
    ({"max_tokens": "many"}, "max_tokens: "),
    ({"temperature": float("nan")}, "temperature: "),
    ({"temperature": "hot"}, "temperature: "),
    ({"seed": 2**70}, "seed: "),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"frequency_penalty": 0.5}, "frequency_penalty"),
]


@pytest.mark.parametrize(("changes", "words"), FAULTY)
def test_what_is_no_question_is_refused(changes: Any, words: str) -> None:
    body = changes
    if isinstance(changes, dict):
        body = json.dumps({"model": "run", "messages": [user(QUESTION)]} | changes).encode()
    with pytest.raises(RefusedError, match=words) as refused:
        Asked.of_body(body).conversation(allow_remote_images=False)
    assert refused.value.status == 400


def test_what_clients_send_unasked_is_let_through() -> None:
    usual = {"stop": None, "tools": [], "n": 1, "frequency_penalty": 0.0, "user": "me", "stream": 0}
    body = {"model": "run", "messages": [user(QUESTION, data_uri())], **usual}
    asked = Asked.of_body(json.dumps(body).encode())
    assert len(list(asked.conversation(allow_remote_images=False).images())) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_family_is_asked_as_finetune_chat_asks(
    dataset: Callable[..., Path], folder_of: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    recipe = dataset(model={"name": str(folder_of(name)), "dtype": "float32"})
    recipe.write_text(json.dumps({**json.loads(recipe.read_text()), "images": {}}))
    made = made_run(recipe, tmp_path / "run")
    merge(made.run, tmp_path / "merged", console=QUIET)
    served = Served.load(tmp_path / "merged", "merged")
    noise(84, 28, 1).save(tmp_path / "picture.png")
    expected = chat.answer(made.run, [tmp_path / "picture.png"], QUESTION)
    asked = Asked(model="merged", messages=[user(QUESTION, data_uri())])
    conversation = asked.conversation(allow_remote_images=False)
    inputs = served.inputs(conversation, ImageAccess(tmp_path))
    output = served.model.generate(**inputs, generation_config=served.settings(asked))
    words = output[0, inputs["input_ids"].shape[1] :]
    assert served.encoder.processor.decode(words, skip_special_tokens=True).strip() == expected


def test_a_folder_in_four_bits_is_loaded(dataset: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    made = made_run(dataset(), tmp_path / "run")
    merge(made.run, tmp_path / "merged", quantize="nf4", console=QUIET)
    assert Served.load(tmp_path / "merged", "merged").model.is_loaded_in_4bit


def test_a_request_longer_than_the_models_positions_is_refused(
    dataset: Callable[..., Path], tmp_path: Path
) -> None:
    made = made_run(dataset(), tmp_path / "run")
    merge(made.run, tmp_path / "merged", console=QUIET)
    served = Served.load(tmp_path / "merged", "merged")
    assert served.encoder.max_tokens
    asked = Asked(model="merged", messages=[user("a b " * served.encoder.max_tokens)])
    conversation = asked.conversation(allow_remote_images=False)
    with pytest.raises(RefusedError, match="longer than the"):
        served.inputs(conversation, ImageAccess(tmp_path))
