"""What a run ran on: versions, commit, device, memory."""

import platform
import resource
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import finetune


def environment() -> dict[str, Any]:
    """What somebody needs to make the figures again; no paths, no names of people or machines."""
    packages = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "pillow", "numpy")
    on_gpu = torch.cuda.is_available()
    return {
        "vlm_recipes": finetune.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        **{name: _version(name) for name in packages},
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "num_devices": torch.cuda.device_count() if on_gpu else 1,
        "cpu_threads": torch.get_num_threads(),
        "cuda": torch.version.cuda if on_gpu else None,
    }


def peak_memory_gib() -> float:
    """The most memory in use at once: the GPU's, or on a CPU this process's resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the checkout that this code runs from; None for an installed wheel."""
    checkout = Path(finetune.__file__).parent.parent
    if not (checkout / ".git").exists():
        return None
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=checkout, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()
