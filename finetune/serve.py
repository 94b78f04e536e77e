"""`finetune serve`: a merged model behind an OpenAI-compatible endpoint, by transformers."""

import contextlib
import hashlib
import os
import signal
import sys
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import GenerationConfig

from finetune.errors import ModelError, RunDirError
from finetune.merge import merge
from finetune.model.load import quiet_libraries
from finetune.preparation import cache_of
from finetune.rundir import open_run_dir
from finetune.serving import Gate
from finetune.tables import messages_console

NEEDED = ("fastapi", "uvicorn", "openai")


def serve(
    path: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    allow_remote_images: bool = False,
    console: Console | None = None,
) -> None:
    """Serve a run, merged first if it has not been, or a merged folder, until a signal ends it.

    Raises `FinetuneError`.
    """
    console = console or messages_console()
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise ModelError(
            f"finetune serve: needs {', '.join(missing)}; pip install 'vlm-recipes[serve]'"
        )
    if not api_key and not _is_loopback(host):
        raise ModelError(
            f"--host {host}: would let everybody on the network ask the model; give --api-key"
        )
    quiet_libraries()
    folder = servable(Path(path), console)
    gate = build_gate(folder, api_key=api_key, allow_remote_images=allow_remote_images)
    import uvicorn

    console.print(
        f"serving {gate.model} at http://{host}:{port}/v1 (Ctrl-C ends it)", soft_wrap=True
    )
    # uvicorn shuts down and then hands the signal on, to whoever waits for it
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.run(gate, host=host, port=port, log_level="warning", timeout_graceful_shutdown=5)


def servable(path: Path, console: Console) -> Path:
    """The folder to serve: a merged one as it stands, of a run one that is merged once and kept in
    the cache beside it. Raises `FinetuneError`.
    """
    if (path / "config.json").is_file() and any(path.glob("*.safetensors")):
        return path
    if (path / "adapter_config.json").is_file():
        raise RunDirError(
            f"{path}: is an adapter, which is served merged alone; give the run it belongs to, or "
            "a folder that finetune merge wrote"
        )
    run = open_run_dir(path)
    if (run.adapter / "config.json").is_file():  # of full training
        return run.adapter
    digest = hashlib.sha256(run.recipe.read_bytes())
    for file in sorted(run.adapter.glob("adapter_*")):
        digest.update(file.read_bytes())
    name = run.path.resolve().name
    folder = cache_of(run.path) / "merged" / digest.hexdigest()[:16] / name
    if not folder.is_dir():
        console.print(f"{path}: merging once, into {folder}", soft_wrap=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        merge(path, folder, console=console)
    return folder


def build_gate(
    folder: Path, *, api_key: str | None = None, allow_remote_images: bool = False
) -> Gate:
    """transformers' server of this one model, loaded, behind the gate.

    The current folder becomes the one that holds it, so that requests and answers name the model
    and not where it is.
    """
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.completion import CompletionHandler
    from transformers.cli.serving.model_manager import ModelManager
    from transformers.cli.serving.response import ResponseHandler
    from transformers.cli.serving.server import build_server
    from transformers.cli.serving.systemone import SystemOneHandler
    from transformers.cli.serving.transcription import TranscriptionHandler
    from transformers.cli.serving.utils import GenerationState

    folder = folder.resolve()
    os.chdir(folder.parent)
    manager = ModelManager(force_model=folder.name, trust_remote_code=False)
    state = GenerationState()
    handlers: list[Any] = [
        kind(model_manager=manager, generation_state=state)
        for kind in (ChatCompletionHandler, CompletionHandler, ResponseHandler, SystemOneHandler)
    ]
    chat, completion, response, decision = handlers
    app = build_server(
        manager,
        chat,
        completion_handler=completion,
        response_handler=response,
        transcription_handler=TranscriptionHandler(manager, state),
        systemone_handler=decision,
        generation_state=state,
    )
    settings = GenerationConfig.from_pretrained(folder)
    return Gate(
        app,  # type: ignore[arg-type]
        folder.name,
        api_key,
        allow_remote_images,
        max_new_tokens=settings.max_new_tokens,
    )


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
