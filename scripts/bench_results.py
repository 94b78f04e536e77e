"""Records of what was measured, and of what it ran on."""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any


def machine(threads: int) -> str:
    """What it ran on, and when."""
    packages = ("torch", "transformers", "trl", "peft")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return (
        f"{_processor()}, {os.cpu_count()} cores, {threads} used; Python "
        f"{platform.python_version()}, {versions}; {date.today()}"
    )


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


class Results:
    """Records of all parts in one file, written after each."""

    def __init__(self, path: Path):
        self.path = path
        self.records: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []

    def drop(self, keys: Sequence[Mapping[str, Any]]) -> None:
        """Forget what is to be measured again."""
        self.records = [
            each for each in self.records if not any(key.items() <= each.items() for key in keys)
        ]

    def add(self, record: dict[str, Any]) -> None:
        """Keep a record."""
        self.records.append(record)
        lines = ",\n".join(map(json.dumps, self.records))
        self.path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
