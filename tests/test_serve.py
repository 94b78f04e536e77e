"""The server as its users meet it: started by the command, asked by OpenAI's own client."""

import base64
import io
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import pytest
from PIL import Image as PilImage
from rich.console import Console

from finetune import chat
from finetune.errors import ModelError, RunDirError
from finetune.merge import merge
from finetune.serve import servable, serve
from finetune.serving import (
    CHAT,
    HEALTH,
    MODELS,
)
from tests.commands import free_port
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


class Running(NamedTuple):
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
        return asked.choices[0].message.content


def start(run: Path, *options: str) -> Running:
    pytest.importorskip("fastapi")
    port = free_port()
    command = [sys.executable, "-m", "finetune", "serve", str(run), "--port", str(port), *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    url = f"http://127.0.0.1:{port}"
    until = time.monotonic() + 300
    while time.monotonic() < until and process.poll() is None:
        try:
            httpx.get(f"{url}{HEALTH}", timeout=5)
            return Running(process, url, run)
        except httpx.TransportError:
            time.sleep(0.2)
    process.kill()
    raise AssertionError(process.communicate()[1][-3000:])


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("served")
    recipe = write_dataset(folder, evaluation={"max_new_tokens": 8})
    served = start(made_run(recipe, folder / "run", seed=3).run, "--api-key", KEY)
    yield served
    served.process.kill()
    served.process.wait()


@pytest.mark.slow
def test_the_answer_is_the_one_of_finetune_chat(served: Running, tmp_path: Path) -> None:
    answers = set()
    for seed, size in enumerate([(84, 28), (56, 56), (200, 140)]):
        noise(*size, seed).save(tmp_path / "picture.png")
        expected = chat.answer(served.run, [tmp_path / "picture.png"], QUESTION)
        assert served.answer(user(QUESTION, data_uri(*size, seed))) == expected
        answers.add(expected)
    assert len(answers) == 3


@pytest.mark.slow
def test_pictures_of_other_modes_are_answered_as_by_finetune_chat(
    served: Running, tmp_path: Path
) -> None:
    """transformers' server drops transparency and clips 16-bit greys, which training does not."""
    values = np.asarray(noise(84, 56, 4))
    ink = np.zeros((56, 84, 4), np.uint8)
    ink[..., 3] = values[..., 0]  # black where it is not transparent
    grey = values[..., 0].astype(np.uint16) * 257
    answers = set()
    for number, array in enumerate([ink, grey]):
        file = tmp_path / f"{number}.png"
        PilImage.fromarray(array).save(file)
        uri = f"data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}"
        answers.add(chat.answer(served.run, [file], QUESTION))
        assert served.answer(user(QUESTION, uri)) == chat.answer(served.run, [file], QUESTION)
    assert len(answers) == 2


@pytest.mark.slow
def test_a_picture_is_split_as_in_the_training(tmp_path: Path) -> None:
    """Of which no processor knows: with `auto` it depends on the picture."""
    images = {"split": "auto", "longest_edge_px": 56, "shortest_edge_px": 28}
    recipe = write_dataset(tmp_path, images=images, evaluation={"max_new_tokens": 8})
    run = made_run(recipe, tmp_path / "run@2", seed=3).run  # not the revision of a Hub id
    own = start(run)
    try:
        noise(200, 140, 1).save(tmp_path / "picture.png")
        asked = own.client().chat.completions.create(
            model="run@2", messages=[user(QUESTION, data_uri(200, 140, 1))]
        )
        said = chat.answer(run, [tmp_path / "picture.png"], QUESTION)
        assert (asked.model, asked.choices[0].message.content) == ("run@2", said)
        assert asked.usage.prompt_tokens > 5 * 8  # of five views
    finally:
        own.process.kill()
        own.process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_an_answer_ends_where_the_request_says(served: Running, name: str) -> None:
    asked = served.client().chat.completions.create(
        model="run", messages=[user(QUESTION, data_uri())], **{name: 2}
    )
    assert asked.usage.completion_tokens == 2
    assert asked.choices[0].finish_reason == "length"


@pytest.mark.slow
def test_a_temperature_is_heeded(served: Running) -> None:
    message = user(QUESTION, data_uri())
    drawn = {served.answer(message, temperature=2, seed=seed) for seed in range(4)}
    assert len(drawn) > 1
    assert len({served.answer(message, temperature=t) for t in (0, None, 0)}) == 1


@pytest.mark.slow
def test_two_turns_and_two_pictures(served: Running, tmp_path: Path) -> None:
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
def test_a_stream_says_what_the_whole_answer_says(served: Running) -> None:
    message = user(QUESTION, data_uri())
    chunks = served.client().chat.completions.create(model="run", messages=[message], stream=True)
    words = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(words) == served.answer(message)
    assert len(list(filter(None, words))) > 1


@pytest.mark.slow
def test_eight_at_once_are_answered_as_one_by_one(served: Running) -> None:
    messages = [user(QUESTION, data_uri(56 + 14 * (i % 3), 56, seed=i)) for i in range(8)]
    alone = [served.answer(message) for message in messages]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(served.answer, messages)) == alone
    assert len(set(alone)) > 2


@pytest.mark.slow
def test_a_client_that_hangs_up_leaves_the_server_to_others(served: Running) -> None:
    body = {"model": "run", "messages": [user(QUESTION, data_uri())], "stream": True}
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx.stream("POST", f"{served.url}{CHAT}", json=body, headers=headers) as stream:
        next(stream.iter_bytes())
    assert served.answer(user(QUESTION, data_uri()))
    assert served.process.poll() is None


@pytest.mark.slow
def test_forty_megapixels_are_answered(served: Running) -> None:
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
def test_a_broken_picture_is_the_clients_fault(served: Running, url: str, words: str) -> None:
    openai = pytest.importorskip("openai")
    with pytest.raises(openai.BadRequestError, match=words):
        served.answer(user(QUESTION, url))


@contextmanager
def unasked_address() -> Iterator[str]:
    """The address of a picture on loopback that nobody may have asked for at the end."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.settimeout(0.5)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/picture.png"
        with pytest.raises(TimeoutError):
            listener.accept()


@pytest.mark.slow
def test_pictures_from_elsewhere_are_not_fetched(served: Running) -> None:
    openai = pytest.importorskip("openai")
    with unasked_address() as url, pytest.raises(openai.BadRequestError, match="not fetched"):
        served.answer(user(QUESTION, url))


@pytest.mark.slow
def test_pictures_that_may_be_fetched_come_from_public_addresses_alone(served: Running) -> None:
    openai = pytest.importorskip("openai")
    own = start(served.run, "--allow-remote-images")
    try:
        with unasked_address() as url, pytest.raises(openai.BadRequestError, match="address"):
            own.answer(user(QUESTION, url))
    finally:
        own.process.kill()
        own.process.wait()


@pytest.mark.slow
def test_one_model_is_served_under_its_name(served: Running) -> None:
    openai = pytest.importorskip("openai")
    assert [model.id for model in served.client().models.list()] == ["run"]
    assert served.client().models.retrieve("run").id == "run"
    with pytest.raises(openai.NotFoundError, match="no model 'HuggingFaceM4/idefics2-8b'"):
        served.client().chat.completions.create(
            model="HuggingFaceM4/idefics2-8b", messages=[user(QUESTION)]
        )
    for path in ("/load_model", "/reset", "/v1/completions", "/v1/responses", "/docs"):
        headers = {"Authorization": f"Bearer {KEY}"}
        found = httpx.post(f"{served.url}{path}", json={"model": "x"}, headers=headers)
        assert found.status_code == 404


@pytest.mark.slow
def test_a_wrong_key_is_refused(served: Running) -> None:
    openai = pytest.importorskip("openai")
    for key in ("wrong", KEY + "x", "é"):
        with pytest.raises((openai.AuthenticationError, UnicodeEncodeError)):
            served.client(key).models.list()
    assert httpx.get(f"{served.url}{MODELS}").status_code == 401


@pytest.mark.slow
def test_it_is_merged_once_and_stops_on_sigterm(served: Running) -> None:
    again = start(served.run)
    try:
        again.process.send_signal(signal.SIGTERM)
        _, messages = again.process.communicate(timeout=120)
    finally:
        again.process.kill()
    assert again.process.returncode == 0, messages
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


def test_a_port_that_is_taken_is_told_before_anything_is_read() -> None:
    pytest.importorskip("fastapi")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(RunDirError, match="in use"):
            serve("anything", port=taken.getsockname()[1])
