"""What stands before transformers' own server: one model under one name, a key, and pictures that
are what they say they are.

transformers' server would load any model that a request names, fetch any URL, read any file, and
answer a broken picture with a fault of its own.
"""

import hmac
import json
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from time import time
from typing import Any

from finetune.data.images import ImageAccess, decode_image, read_image_file
from finetune.errors import DataError

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

CHAT, MODELS, HEALTH = "/v1/chat/completions", "/v1/models", "/health"
MAX_BODY_BYTES = 64 * 2**20


class RefusedError(Exception):
    """A request that is answered here, with a status and a message."""

    def __init__(self, status: int, message: str, code: str = "invalid_request_error"):
        super().__init__(message)
        self.status, self.code = status, code


@dataclass
class Gate:
    """An ASGI application that lets through to `app` what it may be asked.

    `model` is the one name that is served, under which `app` knows it too. Errors have OpenAI's
    form.
    """

    app: App
    model: str
    api_key: str | None = None
    allow_remote_images: bool = False
    max_new_tokens: int | None = None
    """Of an answer whose request sets no limit; the server's own is 1,024."""
    access: ImageAccess = field(default_factory=lambda: ImageAccess(Path.cwd()))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Source: asgi.readthedocs.io, HTTP & WebSocket protocol, version 2.3."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        try:
            await self._let_through(scope, receive, send)
        except RefusedError as error:
            body = {"message": str(error), "type": error.code, "code": error.status}
            await _answer(send, error.status, {"error": body})

    async def _let_through(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, method = scope["path"], scope["method"]
        if path == HEALTH:
            await self.app(scope, receive, send)
            return
        self._check_key(scope)
        if (path, method) == (MODELS, "GET"):
            served = {"id": self.model, "object": "model", "created": int(time())}
            listed = [served | {"owned_by": "vlm-recipes"}]
            await _answer(send, 200, {"object": "list", "data": listed})
        elif (path, method) == (CHAT, "POST"):
            body = self._checked(await _whole_body(receive))
            await self.app(scope, _again(json.dumps(body).encode(), receive), send)
        else:
            raise RefusedError(404, f"{method} {path} is not served; there are {CHAT} and {MODELS}")

    def _check_key(self, scope: Scope) -> None:
        if self.api_key is None:
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        given = headers.get(b"authorization", b"").removeprefix(b"Bearer ")
        if not hmac.compare_digest(given, self.api_key.encode()):
            raise RefusedError(401, "the API key is missing or wrong", "authentication_error")

    def _checked(self, data: bytes) -> dict[str, Any]:
        """The body of a request for an answer, which names the model as `app` knows it."""
        try:
            body = json.loads(data)
        except ValueError as error:
            raise RefusedError(400, f"the body is not JSON: {error}") from error
        if not isinstance(body, dict) or not isinstance(body.get("messages"), list):
            raise RefusedError(400, "the body has no list of messages")
        if (asked := body.get("model", self.model)) != self.model:
            message = f"there is no model {asked!r}; {self.model} is served"
            raise RefusedError(404, message, "model_not_found")
        for url in _image_urls(body["messages"]):
            self._check_image(url)
        # nothing else of the server's own: not another configuration, not code of a template's
        for name in ("generation_config", "chat_template_kwargs", "tools"):
            if body.pop(name, None):
                raise RefusedError(400, f"{name} is not served")
        if not body.get("max_tokens") and not body.get("max_completion_tokens"):
            body["max_tokens"] = self.max_new_tokens
        return body | {"model": self.model}

    def _check_image(self, url: Any) -> None:
        if not isinstance(url, str):
            raise RefusedError(400, "an image_url has no url")
        if url[:8].lower().startswith(("http://", "https://")) and self.allow_remote_images:
            return
        if not url.lower().startswith("data:"):
            raise RefusedError(
                400,
                f"{url[:60]!r} is no data URI, and pictures from elsewhere are not fetched; send "
                "data:image/png;base64,...",
            )
        try:
            decode_image(*read_image_file(url, self.access), self.access)
        except DataError as error:
            raise RefusedError(400, f"{error}") from error


def _image_urls(messages: list[Any]) -> Iterator[Any]:
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else ():
            kind = part.get("type") if isinstance(part, dict) else None
            if kind == "image_url":
                value = part.get("image_url")
                yield value.get("url") if isinstance(value, dict) else value
            elif kind != "text":
                raise RefusedError(400, f"a part of type {kind!r}; expected text or image_url")


async def _whole_body(receive: Receive) -> bytes:
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise RefusedError(400, "the client hung up")
        body += message.get("body", b"")
        if len(body) > MAX_BODY_BYTES:
            raise RefusedError(413, f"the request is larger than {MAX_BODY_BYTES / 2**20:.0f} MiB")
        if not message.get("more_body"):
            return bytes(body)


def _again(body: bytes, receive: Receive) -> Receive:
    """The body once more, and whatever comes after it: the client that hangs up."""
    is_told = False

    async def received() -> dict[str, Any]:
        nonlocal is_told
        if is_told:
            return await receive()
        is_told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return received


async def _answer(send: Send, status: int, value: Any) -> None:
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(value).encode()})
