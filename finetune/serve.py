"""`finetune serve`: a merged model behind an OpenAI-compatible endpoint, by transformers."""

import contextlib
import hashlib
import signal
import socket
import sys
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console

from finetune.errors import ModelError, RunDirError
from finetune.merge import merge
from finetune.model.load import quiet_libraries
from finetune.preparation import cache_of
from finetune.rundir import open_run_dir
from finetune.serving import Gate, Served, is_loopback
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
    if not api_key and not is_loopback(host):
        raise ModelError(
            f"--host {host}: would let everybody on the network ask the model; give --api-key"
        )
    address = _bound(host, port)
    quiet_libraries()
    folder = servable(Path(path), console)
    served = Served.load(folder, Path(path).resolve().name)
    gate = Gate(served, api_key=api_key or None, allow_remote_images=allow_remote_images)
    import uvicorn

    shown = f"[{host}]" if ":" in host else host
    console.print(
        f"serving {served.name} at http://{shown}:{port}/v1 (Ctrl-C ends it)",
        soft_wrap=True,
        markup=False,
    )
    # uvicorn shuts down and then hands the signal on, to whoever waits for it
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    config = uvicorn.Config(gate, lifespan="off", log_level="warning", timeout_graceful_shutdown=5)
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[address])


def _bound(host: str, port: int) -> socket.socket:
    """The address taken, before minutes are spent on a merge; nobody can connect to it yet."""
    address = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    address.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        address.bind((host, port))
    except OSError as error:
        address.close()
        raise RunDirError(
            f"--host {host} --port {port}: cannot be listened at ({error.strerror}); give another"
        ) from error
    return address


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
