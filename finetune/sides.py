"""The models that are compared on held-out rows: the plain base, and what was trained of it."""

import gc
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from xxhash import xxh3_128

from finetune.data.examples import Encoder
from finetune.model.adapters import IMAGE_SETTINGS, refuse_unfinished
from finetune.model.load import best_device, load_model, load_processor
from finetune.model.methods import is_adapter, load_trained
from finetune.model.vocabulary import extra_tokens_of
from finetune.recipe import Recipe


@dataclass(frozen=True)
class Side:
    """One of the models that are compared: a way to have it for as long as it is asked, and what
    its prompts are made with.

    Sides of one `key` give the same answers.
    """

    opened: Callable[[], AbstractContextManager[Any]]
    encoder: Encoder
    key: str


@dataclass(frozen=True)
class Sides:
    """The plain base, and what was trained; None where nothing was, so that all stays the same."""

    base: Side
    adapter: Side | None


def sides_of_adapted(model: Any, encoder: Encoder, recipe: Recipe, folder: Path) -> Sides:
    """Both sides of a model with an adapter, which is saved in `folder`, on a plain base: the base
    is asked without it.
    """
    tokens = extra_tokens_of(recipe)
    plain = encoder
    if tokens:
        # The base never saw the new tokens, so its prompts hold none, and its answers must not
        processor, _ = load_processor(recipe.model, encoder.images)
        plain = replace(encoder, processor=processor)
    ids = encoder.processor.tokenizer.convert_tokens_to_ids(list(tokens))

    @contextmanager
    def base() -> Iterator[Any]:
        generation = model.get_base_model().generation_config
        before = generation.suppress_tokens
        generation.suppress_tokens = [*(before or []), *ids] or None
        try:
            with model.disable_adapter():
                yield model
        finally:
            generation.suppress_tokens = before

    @contextmanager
    def adapter() -> Iterator[Any]:
        yield model

    return Sides(
        Side(base, plain, _key(recipe, plain)),
        Side(adapter, encoder, _key(recipe, encoder, folder)),
    )


def sides_of_run(recipe: Recipe, folder: Path, encoder: Encoder) -> Sides:
    """Both sides as a finished run left them in `folder`: loaded once where the base is in the
    adapted model, otherwise one after the other.

    Raises `RunDirError`.
    """
    if is_adapter(recipe):
        model, _ = load_trained(recipe, folder, encoder.processor)
        return sides_of_adapted(model.to(best_device()), encoder, recipe, folder)
    base = side_of_base(recipe, encoder)
    if recipe.adapter.method == "frozen":
        refuse_unfinished(folder, IMAGE_SETTINGS, recipe)
        return Sides(base, None)
    trained = lambda: load_trained(recipe, folder, encoder.processor).model  # noqa: E731
    key = _key(recipe, encoder, folder)
    return Sides(base, Side(lambda: _loaded(trained), encoder, key))


def side_of_base(recipe: Recipe, encoder: Encoder) -> Side:
    """The plain base by itself."""
    plain = replace(encoder, processor=load_processor(recipe.model, encoder.images)[0])
    key = _key(recipe, plain)
    return Side(lambda: _loaded(lambda: load_model(recipe.model)[0]), plain, key)


def side_of_merged(recipe: Recipe, folder: Path, encoder: Encoder) -> Side:
    """The weights that were merged into `folder`, with the vision and the prompts of the run."""
    model = recipe.model.model_copy(update={"name": str(folder)})
    merged = recipe.model_copy(update={"model": model})
    key = _key(merged, encoder, folder)
    return Side(lambda: _loaded(lambda: load_model(model)[0]), encoder, key)


def _key(recipe: Recipe, encoder: Encoder, folder: Path | None = None) -> str:
    """Of everything that an answer depends on but the row and how long it may be."""
    settings = {
        "model": recipe.model.model_dump(),
        "images": encoder.images.model_dump(),
        "trained": folder is not None,
        "data": [encoder.max_tokens, encoder.overlong, repr(encoder.shortcuts)],
    }
    digest = xxh3_128(json.dumps(settings, sort_keys=True).encode())
    for file in sorted(folder.glob("*.safetensors")) if folder else ():
        with file.open("rb") as opened:
            while block := opened.read(2**24):
                digest.update(block)
    return digest.hexdigest()


@contextmanager
def _loaded(load: Callable[[], Any]) -> Iterator[Any]:
    model = load()
    if model.device != best_device():  # quantised ones are there, and some refuse to be moved
        model.to(best_device())
    try:
        yield model
    finally:
        del model
        free_memory()


def free_memory() -> None:
    """Let go of models that nothing refers to any more but themselves."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
