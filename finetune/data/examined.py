"""Examinations kept from one command to the next, beside the runs they were made for.

One holds as long as the data files and the pictures keep their size and time, and nothing that
shapes a row has changed: image settings, tokenizer, limits, this package. Rows with pictures that
were bad are looked at again each time, since what was wrong may have been mended.
"""

import atexit
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

import data_formats
from finetune import __version__, data, families
from finetune.data.examination import Examination, examine, is_stale
from finetune.data.examples import Encoder
from finetune.data.sources import Source
from finetune.rundir import replacing

NUM_KEPT = 16  # of a million rows each, one takes 50 MB


def examine_once(
    sources: Sequence[Source],
    encoder: Encoder,
    cache: Path,
    *,
    again: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Examination, bool]:
    """The examination of the sources, and whether it was found in `cache`.

    With `again` it is made anew whatever is there. Where `cache` cannot be written to, it is made
    for this command alone.
    """
    folder = cache / f"rows-{_key(sources, encoder)}"
    if not again and (kept := _load(folder, sources)) and not is_stale(kept, sources, encoder):
        return kept, True
    try:
        with replacing(folder) as temporary:
            temporary.mkdir(parents=True)
            made = examine(
                sources,
                encoder,
                findings_file=temporary / "findings.jsonl",
                on_progress=on_progress,
            )
            np.save(temporary / "counts.npy", made.counts)
            np.save(temporary / "image_keys.npy", made.image_keys)
    except OSError:
        findings_file = folder_for_this_command() / "findings.jsonl"
        return examine(
            sources, encoder, findings_file=findings_file, on_progress=on_progress
        ), False
    _prune(cache)
    loaded = _load(folder, sources)
    assert loaded
    return loaded, False


def folder_for_this_command() -> Path:
    """A temporary folder that goes when the command ends."""
    folder = Path(tempfile.mkdtemp(prefix="finetune-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _prune(cache: Path) -> None:
    """Take away all but the newest, since every change of a setting leaves one behind, and what
    killed commands left unfinished.
    """
    kept = sorted(cache.glob("rows-*"), key=_time_of, reverse=True)
    day_ago = time.time() - 24 * 3600
    unfinished = [left for left in cache.glob(".rows-*.tmp") if _time_of(left) < day_ago]
    for folder in [*kept[NUM_KEPT:], *unfinished]:
        shutil.rmtree(folder, ignore_errors=True)


def _time_of(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # taken away by another command
        return 0.0


def _load(folder: Path, sources: Sequence[Source]) -> Examination | None:
    """What stands there, or None where it is missing or damaged."""
    lengths = tuple(len(source) for source in sources)
    try:
        counts = np.load(folder / "counts.npy", mmap_mode="r")
        image_keys = np.load(folder / "image_keys.npy", mmap_mode="r")
    except (OSError, ValueError):
        return None
    findings = folder / "findings.jsonl"
    if len(counts) != sum(lengths) or not findings.is_file():
        return None
    return Examination(counts, image_keys, findings, lengths)


@lru_cache(maxsize=1)
def code_digest() -> str:
    """A digest of the code that reads, converts and renders rows: a fault mended there must not
    live on in what was found with it.
    """
    digest = sha256(__version__.encode())
    for package in (data, data_formats, families):
        for file in sorted(Path(package.__path__[0]).rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _key(sources: Sequence[Source], encoder: Encoder) -> str:
    depends_on: list[Any] = [code_digest(), [source.identity() for source in sources]]
    depends_on += [encoder.images.model_dump(), encoder.max_tokens, encoder.overlong]
    processor = encoder.processor
    depends_on += [
        processor.tokenizer.backend_tokenizer.to_str(),
        processor.chat_template,
        processor.image_processor.to_dict(),
        encoder.family.name,
        getattr(processor, "image_seq_len", None),
    ]
    return sha256(json.dumps(depends_on, default=str).encode()).hexdigest()[:32]
