"""A merged model behind OpenAI's chat completions: what a request may ask, what the model is given
for it, and transformers' own server, which computes and streams the answer.

That server would load any model that a request names, fetch any URL, read any file, and answer what
is broken with a fault of its own. So it is given neither names nor pictures, but a loaded model and
tensors: those of `finetune chat`.
"""

import asyncio
import copy
import hmac
import json
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from time import time
from typing import Any, Literal, cast
from urllib.parse import urlsplit
from uuid import uuid4

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, GenerationConfig

from data_formats import openai
from data_formats.chat import Conversation, FormatError, Message
from finetune.data.collate import collate
from finetune.data.examples import Encoder, OverlongError
from finetune.data.images import ImageAccess
from finetune.data.sources import Row
from finetune.errors import DataError, ModelError
from finetune.families import family_of
from finetune.model.adapters import IMAGE_SETTINGS
from finetune.model.generate import stopping
from finetune.model.load import refuse_foreign_weights
from finetune.model.quantize import keep_weights_as_loaded
from finetune.recipe import ImagesSection, ModelSection
from finetune.rundir import read_json

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

CHAT, MODELS, HEALTH = "/v1/chat/completions", "/v1/models", "/health"
MAX_BODY_BYTES = 64 * 2**20
NUM_READERS = 2
"""Requests whose pictures are decoded at once: a large one takes hundreds of megabytes."""


class RefusedError(Exception):
    """A request that is answered with a status and a message, in OpenAI's form."""

    def __init__(self, status: int, message: str, code: str = "invalid_request_error"):
        super().__init__(message)
        self.status, self.code = status, code


class Asked(BaseModel):
    """What a request may hold. Fields that would change the answer and are not carried out have to
    say nothing; those after `n` are about other things.
    """

    model_config = ConfigDict(extra="forbid")

    model: str
    messages: list[Any]
    stream: bool = False
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    presence_penalty: float | None = Field(default=None, ge=0, le=0)
    frequency_penalty: float | None = Field(default=None, ge=0, le=0)
    response_format: dict[Literal["type"], Literal["text"]] | None = None
    logprobs: Literal[False] | None = None
    n: Literal[1] | None = None
    stream_options: Any = None
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None

    @classmethod
    def of_body(cls, data: bytes) -> "Asked":
        """Raises `RefusedError`."""
        try:
            body = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise RefusedError(400, f"the body is not JSON: {error}") from error
        if not isinstance(body, dict):
            raise RefusedError(400, "the body must be a JSON object with 'model' and 'messages'")
        try:
            # clients write null or [] for what they do not ask
            return cls(**{key: value for key, value in body.items() if value not in (None, [])})
        except ValidationError as error:
            faults = [
                f"{'.'.join(map(str, each['loc']))} is not served; leave it out"
                if each["type"] == "extra_forbidden"
                else f"{'.'.join(map(str, each['loc']))}: {each['msg']}"
                for each in error.errors()
            ]
            raise RefusedError(400, "; ".join(faults)) from error

    def conversation(self, *, allow_remote_images: bool) -> Conversation:
        """Raises `RefusedError`."""
        try:
            found = openai.parse({"messages": self.messages})
        except FormatError as error:
            raise RefusedError(400, str(error)) from error
        if found.messages[-1].role != "user":
            raise RefusedError(400, "the last message must be the user's")
        schemes = ("data:", "http://", "https://") if allow_remote_images else ("data:",)
        for image in found.images():
            if not str(image.source).lower().startswith(schemes):
                raise RefusedError(
                    400,
                    f"{str(image.source)[:60]!r} is no data URI, and pictures from elsewhere are "
                    "not fetched; send data:image/png;base64,...",
                )
        return found


@dataclass(frozen=True)
class Served:
    """A merged model, loaded, with the image settings and prompts of its training."""

    name: str
    model: Any
    encoder: Encoder
    generation: GenerationConfig

    @classmethod
    def load(cls, folder: Path, name: str) -> "Served":
        """The model of a folder, stored in 4 or 8 bits or not. Raises `ModelError`."""
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        family = family_of(config)
        if family is None:
            raise ModelError(f"{folder}: model_type {config.model_type!r} is not supported")
        config._attn_implementation = None  # see load_config
        refuse_foreign_weights(ModelSection(name=str(folder)))
        family.adjust_config(config)
        processor = family.build_processor(
            lambda kind: cast(Any, kind or AutoProcessor).from_pretrained(
                folder, trust_remote_code=False
            ),
            config,
        )
        template = folder / "chat_template.jinja"
        if processor.chat_template is None and template.is_file():
            # some of the library's processors save a template and do not read it again
            processor.chat_template = template.read_text(encoding="utf-8")
        settings = folder / IMAGE_SETTINGS
        trained = read_json(settings) if settings.is_file() else {}
        own = family.own_images(processor)
        images = ImagesSection(**{key: trained.get(key) or value for key, value in own.items()})
        family.set_images(processor, images)
        model: Any = AutoModelForImageTextToText.from_pretrained(
            folder,
            config=config,
            dtype="auto",
            device_map="auto",
            use_safetensors=True,
            trust_remote_code=False,
        )
        family.adjust_model(model)
        keep_weights_as_loaded(model)
        model.eval()
        generation = copy.deepcopy(model.generation_config)
        generation.update(**stopping(model, processor, family))
        longest = getattr(config.get_text_config(), "max_position_embeddings", None)
        return cls(name, model, Encoder(processor, family, images, longest), generation)

    def inputs(self, conversation: Conversation, access: ImageAccess) -> dict[str, torch.Tensor]:
        """What the model is asked, as `finetune chat` asks it. Raises `RefusedError`."""
        open_ended = Conversation((*conversation.messages, Message("assistant", ())))
        try:
            prompt = self.encoder.encode_prompt(Row("the request", open_ended, access))
        except OverlongError as error:
            raise RefusedError(
                400, f"the request is longer than the {self.encoder.max_tokens:,} tokens it may be"
            ) from error
        except DataError as error:
            raise RefusedError(400, str(error)) from error
        processor, family = self.encoder.processor, self.encoder.family
        batch = collate([prompt], processor, family, padding_side="left")
        del batch["labels"]
        return {name: tensor.to(self.model.device) for name, tensor in batch.items()}

    def settings(self, asked: Asked) -> GenerationConfig:
        """Greedy, as the training judged it, unless a temperature is asked for."""
        found = copy.deepcopy(self.generation)
        if limit := asked.max_completion_tokens or asked.max_tokens:
            found.max_new_tokens = limit
        if asked.temperature:
            found.update(do_sample=True, temperature=asked.temperature, top_p=asked.top_p or 1.0)
        return found


class _Trimmed:
    """The library's generation, without the space that begins an answer: what `finetune chat` says.

    Source: transformers 5.23, cli/serving/utils.py, GenerateManager.
    """

    def __init__(self, manager: Any):
        self._manager = manager

    async def generate_non_streaming(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        text, *rest = await self._manager.generate_non_streaming(*args, **kwargs)
        return text.strip(), *rest

    def generate_streaming(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        queue, streamer = self._manager.generate_streaming(*args, **kwargs)
        return _TrimmedQueue(queue), streamer


class _TrimmedQueue:
    """An answer's words as they come; None is its end, and what is no text is told as it is."""

    def __init__(self, queue: asyncio.Queue[Any]):
        self._queue = queue
        self._is_blank = True

    async def get(self) -> Any:
        return self._trimmed(await self._queue.get())

    def get_nowait(self) -> Any:
        return self._trimmed(self._queue.get_nowait())

    def _trimmed(self, item: Any) -> Any:
        if not self._is_blank or not isinstance(item, str):
            return item
        words = item.lstrip()
        self._is_blank = not words
        return words


class Gate:
    """An ASGI application: the routes, the key, and each request read before it is computed.

    Without a key, requests of web pages are refused, which a browser on this machine would send.
    Source: asgi.readthedocs.io, HTTP & WebSocket protocol, version 2.3.
    """

    def __init__(
        self, served: Served, *, api_key: str | None = None, allow_remote_images: bool = False
    ):
        from transformers.cli.serving.chat_completion import ChatCompletionHandler
        from transformers.cli.serving.model_manager import ModelManager
        from transformers.cli.serving.utils import GenerateManager, GenerationState

        self.served = served
        self.api_key = api_key
        self.access = ImageAccess(Path.cwd(), allow_urls=allow_remote_images)
        self._handler = ChatCompletionHandler(ModelManager(), GenerationState())
        self._generation: Any = _Trimmed(GenerateManager())
        self._readers = ThreadPoolExecutor(NUM_READERS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return
        try:
            answer = await self._answer(scope, receive)
        except RefusedError as error:
            body = {"message": str(error), "type": error.code, "code": error.status}
            answer = _json(error.status, {"error": body})
        await answer(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive) -> Any:
        path, method = scope["path"], scope["method"]
        if path == HEALTH:
            return _json(200, {"status": "ok"})
        headers = {name.lower(): value for name, value in scope["headers"]}
        self._check_sender(headers)
        if (method, path) == ("POST", CHAT):
            return await self._completion(await _whole_body(receive))
        name = self.served.name
        listed = {"id": name, "object": "model", "created": int(time()), "owned_by": "vlm-recipes"}
        if (method, path) == ("GET", MODELS):
            return _json(200, {"object": "list", "data": [listed]})
        if (method, path) == ("GET", f"{MODELS}/{name}"):
            return _json(200, listed)
        raise RefusedError(404, f"{method} {path} is not served; there are {CHAT} and {MODELS}")

    def _check_sender(self, headers: dict[bytes, bytes]) -> None:
        if self.api_key is not None:
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            right = hmac.compare_digest(given.strip(), self.api_key.encode())
            if scheme.lower() != b"bearer" or not right:
                raise RefusedError(401, "the API key is missing or wrong", "authentication_error")
            return
        origin = headers.get(b"origin", b"").decode("latin-1")
        for url in (f"//{headers.get(b'host', b'').decode('latin-1')}", origin):
            if url.strip("/") and not _names_this_machine(url):
                raise RefusedError(
                    403, f"{url.strip('/')!r} is another machine; serve with --api-key for that"
                )

    async def _completion(self, data: bytes) -> Any:
        loop = asyncio.get_running_loop()
        asked, inputs = await loop.run_in_executor(self._readers, self._read, data)
        if asked.seed is not None:
            torch.manual_seed(asked.seed)
        serve = self._handler._streaming if asked.stream else self._handler._non_streaming
        answer: Any = serve(
            f"chatcmpl-{uuid4().hex}",
            self.served.model,
            self.served.encoder.processor,
            self.served.name,
            inputs,
            self.served.settings(asked),
            gen_manager=self._generation,
        )
        return answer if asked.stream else await answer

    def _read(self, data: bytes) -> tuple[Asked, dict[str, torch.Tensor]]:
        asked = Asked.of_body(data)
        if asked.model != self.served.name:
            message = f"there is no model {asked.model!r}; {self.served.name} is served"
            raise RefusedError(404, message, "model_not_found")
        conversation = asked.conversation(allow_remote_images=self.access.allow_urls)
        return asked, self.served.inputs(conversation, self.access)


def is_loopback(host: str) -> bool:
    """Whether a name or address is this machine's own, which no other can reach."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _names_this_machine(url: str) -> bool:
    try:
        return is_loopback(urlsplit(url).hostname or "")
    except ValueError:
        return False


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


def _json(status: int, value: Any) -> Any:
    from starlette.responses import JSONResponse

    return JSONResponse(value, status_code=status)
