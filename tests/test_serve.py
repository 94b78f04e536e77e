"""The server as its users meet it: started by the command, asked by OpenAI's own client."""

import asyncio
import base64
import io
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from rich.console import Console

from finetune import chat
from finetune.errors import ModelError, RunDirError
from finetune.merge import merge
from finetune.serve import servable, serve
from finetune.serving import CHAT, HEALTH, MAX_BODY_BYTES, MODELS, Gate
from tests.conftest import noise, write_dataset
from tests.test_merge import made_run

QUIET = Console(quiet=True)
KEY = "a-key-of-the-test"
QUESTION = "What is written?"


def data_uri(width: int = 84, height: int = 28, seed: int = 1, kind: str = "PNG") -> str:
    file = io.BytesIO()
    noise(width, height, seed).save(file, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def user(text: str, *urls: str) -> dict[str, Any]:
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"role": "user", "content": [*images, {"type": "text", "text": text}]}


class Served(NamedTuple):
    process: subprocess.Popen[str]
    url: str
    run: Path

    def client(self, key: str = KEY) -> Any:
        openai = pytest.importorskip("openai")
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=120)

    def answer(self, *messages: dict[str, Any], **settings: Any) -> str:
        asked = self.client().chat.completions.create(
            model="run", messages=list(messages), **settings
        )
        return asked.choices[0].message.content.strip()  # a space begins every answer


def start(run: Path, *options: str) -> Served:
    pytest.importorskip("fastapi")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "finetune", "serve", str(run), "--port", str(port), *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    url = f"http://127.0.0.1:{port}"
    until = time.monotonic() + 120
    while time.monotonic() < until and process.poll() is None:
        try:
            httpx.get(f"{url}{HEALTH}", timeout=5)
            return Served(process, url, run)
        except httpx.TransportError:
            time.sleep(0.2)
    process.kill()
    raise AssertionError(process.communicate()[1][-3000:])


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    recipe = write_dataset(folder, evaluation={"max_new_tokens": 8})
    served = start(made_run(recipe, folder / "run", seed=3).run, "--api-key", KEY)
    yield served
    served.process.kill()
    served.process.wait()


@pytest.mark.slow
def test_the_answer_is_the_one_of_finetune_chat(served: Served, tmp_path: Path) -> None:
    answers = set()
    for seed, size in enumerate([(84, 28), (56, 56), (200, 140)]):
        noise(*size, seed).save(tmp_path / "picture.png")
        expected = chat.answer(served.run, [tmp_path / "picture.png"], QUESTION)
        assert served.answer(user(QUESTION, data_uri(*size, seed))) == expected
        answers.add(expected)
    assert len(answers) == 3


@pytest.mark.slow
def test_two_turns_and_two_pictures(served: Served, tmp_path: Path) -> None:
    noise(84, 28, 1).save(tmp_path / "1.png")
    noise(56, 56, 2).save(tmp_path / "2.png")
    heard: list[str] = []
    lines = iter([QUESTION, f"/image {tmp_path / '2.png'}", "And here?"])

    def ask() -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    stock = chat.Talk.take

    def take(self: Any, line: str) -> None:
        stock(self, line)
        heard.extend(m.text for m in self.messages[-1:] if not line.startswith("/"))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(chat.Talk, "take", take)
        chat.talk(served.run, [tmp_path / "1.png"], compare=False, ask=ask, console=QUIET)
    first = user(QUESTION, data_uri())
    answer = served.answer(first)
    said = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    second = served.answer(first, said, user("And here?", data_uri(56, 56, 2)))
    assert [answer, second] == heard


@pytest.mark.slow
def test_a_stream_says_what_the_whole_answer_says(served: Served) -> None:
    message = user(QUESTION, data_uri())
    chunks = served.client().chat.completions.create(model="run", messages=[message], stream=True)
    words = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(words).strip() == served.answer(message)
    assert len(list(filter(None, words))) > 1


@pytest.mark.slow
def test_eight_at_once_are_answered_as_one_by_one(served: Served) -> None:
    messages = [user(QUESTION, data_uri(56 + 14 * (i % 3), 56, seed=i)) for i in range(8)]
    alone = [served.answer(message) for message in messages]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(served.answer, messages)) == alone
    assert len(set(alone)) > 2


@pytest.mark.slow
def test_a_client_that_hangs_up_leaves_the_server_to_others(served: Served) -> None:
    body = {"model": "run", "messages": [user(QUESTION, data_uri())], "stream": True}
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx.stream("POST", f"{served.url}{CHAT}", json=body, headers=headers) as stream:
        next(stream.iter_bytes())
    assert served.answer(user(QUESTION, data_uri()))
    assert served.process.poll() is None


@pytest.mark.slow
def test_forty_megapixels_are_answered(served: Served) -> None:
    file = io.BytesIO()
    noise(400, 250).resize((8000, 5000)).save(file, "JPEG", quality=30)
    uri = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
    assert isinstance(served.answer(user(QUESTION, uri)), str)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("data:image/png;base64,bm8gcGljdHVyZQ==", "is text, not an image"),
        (data_uri()[:-400], "cut short"),
        ("data:image/png;base64,!!!", "base64"),
        ("file:///etc/passwd", "no data URI"),
        ("/etc/passwd", "no data URI"),
    ],
)
def test_a_broken_picture_is_the_clients_fault(served: Served, url: str, words: str) -> None:
    openai = pytest.importorskip("openai")
    with pytest.raises(openai.BadRequestError, match=words):
        served.answer(user(QUESTION, url))


@pytest.mark.slow
def test_pictures_from_elsewhere_are_not_fetched(served: Served) -> None:
    openai = pytest.importorskip("openai")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.settimeout(0.5)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/picture.png"
        with pytest.raises(openai.BadRequestError, match="not fetched"):
            served.answer(user(QUESTION, url))
        with pytest.raises(TimeoutError):
            listener.accept()


@pytest.mark.slow
def test_one_model_is_served_under_its_name(served: Served) -> None:
    openai = pytest.importorskip("openai")
    assert [model.id for model in served.client().models.list()] == ["run"]
    with pytest.raises(openai.NotFoundError, match="no model 'HuggingFaceM4/idefics2-8b'"):
        served.client().chat.completions.create(
            model="HuggingFaceM4/idefics2-8b", messages=[user(QUESTION)]
        )
    for path in ("/load_model", "/reset", "/v1/completions", "/v1/responses", "/docs"):
        headers = {"Authorization": f"Bearer {KEY}"}
        found = httpx.post(f"{served.url}{path}", json={"model": "x"}, headers=headers)
        assert found.status_code == 404


@pytest.mark.slow
def test_a_wrong_key_is_refused(served: Served) -> None:
    openai = pytest.importorskip("openai")
    for key in ("wrong", KEY + "x", "é"):
        with pytest.raises((openai.AuthenticationError, UnicodeEncodeError)):
            served.client(key).models.list()
    assert httpx.get(f"{served.url}{MODELS}").status_code == 401


@pytest.mark.slow
def test_it_is_merged_once_and_stops_on_sigterm(served: Served) -> None:
    again = start(served.run)
    started = time.monotonic()
    again.process.send_signal(signal.SIGTERM)
    _, messages = again.process.communicate(timeout=30)
    assert again.process.returncode == 0, messages
    assert time.monotonic() - started < 10
    assert "merging" not in messages
    assert "Traceback" not in messages


def test_a_merged_folder_is_served_as_it_is_and_an_adapter_is_not(
    dataset: Callable[..., Path], tmp_path: Path
) -> None:
    made = made_run(dataset(), tmp_path / "run")
    merge(made.run, tmp_path / "merged", console=QUIET)
    assert servable(tmp_path / "merged", QUIET) == tmp_path / "merged"
    with pytest.raises(RunDirError, match="is an adapter"):
        servable(made.run / "adapter", QUIET)
    first = servable(made.run, QUIET)
    made_run(dataset(), tmp_path / "run", seed=5)
    assert servable(made.run, QUIET) != first  # trained again


def test_the_network_is_let_in_with_a_key_alone() -> None:
    pytest.importorskip("fastapi")
    with pytest.raises(ModelError, match="--api-key"):
        serve("anything", host="0.0.0.0")


def asked_gate(gate: Gate, body: bytes, path: str = CHAT, method: str = "POST") -> list[Any]:
    """What the gate sends, of a request whose body comes in one piece."""
    sent: list[Any] = []
    scope = {"type": "http", "path": path, "method": method, "headers": []}

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    asyncio.run(gate(scope, receive, send))
    return sent


async def never(*_: Any) -> None:
    raise AssertionError("was let through")


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{", 400),
        (b"[]", 400),
        (b'{"messages": 5}', 400),
        (json.dumps({"messages": [{"content": [{"type": "video_url"}]}]}).encode(), 400),
        (json.dumps({"messages": [{"content": [{"type": "image_url"}]}]}).encode(), 400),
        (json.dumps({"messages": [{"content": ["text"]}]}).encode(), 400),
        (json.dumps({"messages": [], "generation_config": "{}"}).encode(), 400),
        (b" " * (MAX_BODY_BYTES + 1), 413),
    ],
)
def test_what_is_no_question_is_not_let_through(body: bytes, status: int) -> None:
    start, answer = asked_gate(Gate(never, "run"), body)
    assert start["status"] == status
    assert json.loads(answer["body"])["error"]["message"]
