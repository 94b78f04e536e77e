"""The vision cache on a model: which of its parts is frozen, what shapes its features, and the
keeping of what it computes.

Shape letters: n views of one call, P places of a view's features, D their width.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import PIL
import torch
import transformers
from rich.console import Console
from transformers import TrainerCallback
from xxhash import xxh3_128

from finetune.data.examined import code_digest
from finetune.data.examples import Encoder
from finetune.data.vision_cache import CacheWriter, VisionCache
from finetune.errors import ModelError
from finetune.model import vision
from finetune.model.adapters import base_of
from finetune.model.vision import Stage, frozen_stage
from finetune.processes import sum_of_all, wait_for_all
from finetune.recipe import Recipe


class Keeper:
    """Stands on a model as its `feature_keeper`, and counts what became of the views of its
    batches.
    """

    def __init__(self, stage: Stage, writer: CacheWriter):
        self.stage: Stage = stage
        self.writer = writer
        self.num_read = 0
        self.num_computed = 0

    def keep(self, keys: Sequence[str | None], features_nPD: torch.Tensor) -> torch.Tensor:
        """The features rounded to bfloat16, as they will be read, in the dtype that they have;
        those with a key are written.
        """
        rounded_nPD = features_nPD.detach().to(torch.bfloat16)
        # off a GPU at once: what waits to be written is not to take its memory
        for key, features_PD in zip(keys, rounded_nPD.cpu(), strict=True):
            if key:
                self.num_computed += 1
                self.writer.put(key, features_PD)
        return rounded_nPD.to(features_nPD.dtype)

    def in_words(self, device: torch.device) -> str:
        """One line for the console, of all processes, which all have to ask."""
        counts = (self.num_read, self.num_computed, self.writer.num_kept)
        num_read, num_computed, kept = (sum_of_all(count, device) for count in counts)
        computed = f"{num_computed:,} computed"
        computed += " and kept" if kept == num_computed else f", {kept:,} of them kept"
        used, limit = (size / 2**30 for size in (self.writer.num_bytes(), self.writer.limit_bytes))
        return f"vision cache: {num_read:,} views read, {computed}; {used:,.2f} of {limit:,g} GiB"

    def __deepcopy__(self, memo: Any) -> "Keeper":
        """Itself: a copied model keeps its features in the same place."""
        return self


class WaitForFeatures(TrainerCallback):
    """An epoch begins when all that the one before computed can be read, in any process."""

    def __init__(self, model: Any):
        self.inner = getattr(model, "model", None)

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        """Before the loading processes of the next epoch look for features."""
        if keeper := getattr(self.inner, "feature_keeper", None):
            keeper.writer.wait()
            wait_for_all()


@contextmanager
def keeping_features(
    model: Any, encoder: Encoder, recipe: Recipe, cache: Path, console: Console
) -> Iterator[Encoder]:
    """An encoder that finds the views of a model in `cache`, and the model keeping them there, as
    long as the block lasts; where the recipe has the cache off, the encoder as it is.

    Tells at the end how many were found, where there was no error. Raises `ModelError`.
    """
    limit_bytes, stage = recipe.training.vision_cache_bytes, stage_to_keep(model, recipe)
    if limit_bytes is None or stage is None:
        yield encoder
        return
    inner = _inner_of(model)
    kept = VisionCache(cache / "vision", settings_key(inner, encoder, stage))
    writer = CacheWriter(
        kept, limit_bytes, lambda problem: console.print(f"warning: {problem}", style="yellow")
    )
    keeper = inner.feature_keeper = Keeper(stage, writer)
    try:
        yield replace(encoder, vision_cache=kept)
    finally:
        del inner.feature_keeper
        writer.close()
    console.print(keeper.in_words(inner.device))


def stage_to_keep(model: Any, recipe: Recipe) -> Stage | None:
    """What the recipe's cache keeps of this model, None where it is off. Raises `ModelError` where
    nothing stays the same from step to step.
    """
    if recipe.training.vision_cache_bytes is None:
        return None
    if stage := frozen_stage(_inner_of(model)):
        return stage
    raise ModelError(
        f"training.vision_cache: some of the vision part of {recipe.model.name} is trained "
        "(adapter.modules_to_save), so its features change at every step; set it to off"
    )


def _inner_of(model: Any) -> Any:
    return base_of(model).model


def settings_key(inner: Any, encoder: Encoder, stage: Stage) -> str:
    """A digest of everything that shapes the features of a view but its picture and its plan.

    Features that another kernel or device computes differ by rounding alone, and count as the same.
    """
    image_processor = encoder.processor.image_processor
    config = inner.config.to_dict()
    for name in ("text_config", "_name_or_path", "transformers_version"):
        config.pop(name, None)
    parts = ("vision",) if stage == "tower" else ("vision", "connector")
    depends_on: list[Any] = [
        [stage, encoder.family.name, str(inner.dtype), weights_digest(inner, parts), config],
        [int(image_processor.resample), image_processor.rescale_factor],
        [list(image_processor.image_mean), list(image_processor.image_std)],
        [encoder.shortcuts.reduced_decode, encoder.shortcuts.fast_resize],
        [transformers.__version__, PIL.__version__],
        [code_digest(), sha256(Path(vision.__file__).read_bytes()).hexdigest()],
    ]
    text = json.dumps(depends_on, default=str, sort_keys=True)
    return sha256(text.encode()).hexdigest()[:32]


def weights_digest(inner: Any, parts: Sequence[str]) -> str:
    """Of all weights of some parts, with their names, shapes and dtypes."""
    digest = xxh3_128()
    for part in parts:
        for prefix in inner.view_modules[part]:
            for name, tensor in inner.get_submodule(prefix).state_dict().items():
                digest.update(f"{prefix}.{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
                data = tensor.detach().cpu().contiguous().flatten()
                digest.update(data.view(torch.uint8).numpy())
    return digest.hexdigest()
