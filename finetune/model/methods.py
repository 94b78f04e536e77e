"""What each `adapter.method` means: a model made ready to train, saved, loaded again, and gone on
with.

lora, dora, rslora and pissa are PEFT adapters, full trains the parts' own weights, frozen nothing.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict

from finetune.families.family import Family
from finetune.model import pissa
from finetune.model.adapters import (
    IMAGE_SETTINGS,
    add_adapter,
    load_adapter,
    part_of_weight,
    refuse_foreign_adapter,
    refuse_unfinished,
)
from finetune.model.load import EMBEDDED, load_model
from finetune.model.sharding import is_sharded, put_adapter, put_weights, reshard
from finetune.model.vocabulary import extend_vocabulary
from finetune.recipe import ModelSection, Recipe
from finetune.rundir import RunDir, read_json, write_json


class Loaded(NamedTuple):
    """A model and its family."""

    model: Any
    family: Family


def is_adapter(recipe: Recipe) -> bool:
    """Whether the recipe trains a PEFT adapter, not the weights themselves, or nothing."""
    return recipe.adapter.method not in ("full", "frozen")


def mixes_dtypes(recipe: Recipe) -> bool:
    """Whether whole modules in float32 stand among a half-precision base's."""
    adapter, half = recipe.adapter, recipe.model.dtype != "float32"
    return half and bool(adapter.modules_to_save) and is_adapter(recipe)


def pissa_start(run: RunDir) -> Path:
    """Where the adapter that a PiSSA run started from is kept."""
    return run.checkpoints / "pissa-start.safetensors"


def load_trainable(recipe: Recipe, processor: Any, *, go_on_from: Path | None = None) -> Loaded:
    """The recipe's model with what it trains requiring grad, in float32, and nothing else.

    `processor` has the recipe's extra tokens. `go_on_from` is what `pissa.save_start` wrote for the
    run that is resumed. Raises `ModelError`.
    """
    adapter = recipe.adapter
    # Steps of full training are too small for half precision: all of the model is held in float32,
    # and a GPU computes it under autocast
    section = recipe.model
    if adapter.method == "full":
        section = section.model_copy(update={"dtype": "float32"})
    model, family = load_model(section)
    ids = extend_vocabulary(model, processor, recipe)
    model = make_trainable(model, family, recipe, new_token_ids=ids)
    if adapter.method == "pissa" and go_on_from:
        pissa.go_on_from_start(model, go_on_from)
    elif adapter.method == "pissa":
        pissa.decompose(model)
    return Loaded(model, family)


def make_trainable(
    model: Any, family: Family, recipe: Recipe, *, new_token_ids: Sequence[int] = ()
) -> Any:
    """The model, adapted where the method adapts it, with what is trained requiring grad; weights
    are not looked at, so that it may be on the meta device.

    For full the model is to be in float32 already. Raises `ModelError`.
    """
    adapter = recipe.adapter
    if is_adapter(recipe):
        rate = recipe.training.learning_rate
        return add_adapter(
            model,
            family,
            adapter,
            recipe.model.name,
            new_token_ids=new_token_ids,
            rated_parts=rate if isinstance(rate, dict) else None,
        )
    trained = adapter.parts if adapter.method == "full" else ()
    part_of = part_of_weight(model, family)
    for name, parameter in model.named_parameters():
        # quantised weights are whole numbers, which could not even be asked
        if parameter.is_floating_point():
            parameter.requires_grad_(part_of(name) in trained)
    return model


def save_trained(
    model: Any,
    processor: Any,
    recipe: Recipe,
    folder: Path,
    *,
    start: Path | None = None,
    weights: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """What was trained, the processor, and the image settings that it was trained with.

    An adapter comes in PEFT's format, and full as a whole checkpoint in the recipe's dtype, to
    which the model is brought; of frozen there is nothing. `start` is the file of a PiSSA run.
    `weights` are the `whole_weights` of a model that is held in shares.
    """
    folder.mkdir(parents=True, exist_ok=True)
    dtype = getattr(torch, recipe.model.dtype)
    if recipe.adapter.method == "full":
        if weights is None:
            model.to(dtype).save_pretrained(str(folder))
        else:
            weights = {name: _brought_to(dtype, each) for name, each in weights.items()}
            model.save_pretrained(str(folder), state_dict=weights)
            config = folder / "config.json"  # which would name the dtype of the shares
            write_json(config, read_json(config) | {"dtype": recipe.model.dtype})
    elif is_adapter(recipe):
        if weights is None:
            for name, parameter in model.named_parameters():
                if ".modules_to_save." in name:  # as PEFT loads them, so that answers stay the same
                    parameter.data = parameter.data.to(dtype)
        else:
            weights = {
                name: _brought_to(dtype, each) if ".modules_to_save." in name else each
                for name, each in weights.items()
            }
        # Embeddings are in it as modules to save or rows of new tokens, where they are trained;
        # asking PEFT to look for others would ask the Hub for the base's vocabulary
        model.save_pretrained(str(folder), state_dict=weights, save_embedding_layers=False)
        if recipe.adapter.method == "pissa":
            assert start
            pissa.convert_to_lora(folder, start)
        if recipe.model.name == EMBEDDED:
            _name_embedded_base(folder / "adapter_config.json")
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty card; `push` writes one
    processor.save_pretrained(folder)
    write_json(folder / IMAGE_SETTINGS, recipe.images.model_dump())


def _brought_to(dtype: torch.dtype, weight: torch.Tensor) -> torch.Tensor:
    return weight.to(dtype) if weight.is_floating_point() else weight


def _name_embedded_base(file: Path) -> None:
    """Or else PEFT's configuration would name the folder in which the package is installed."""
    config = json.loads(file.read_text(encoding="utf-8"))
    write_json(file, config | {"base_model_name_or_path": EMBEDDED})


def load_trained(recipe: Recipe, folder: Path, processor: Any) -> Loaded:
    """The model that `save_trained` left, for inference; `processor` has the extra tokens.

    Raises `RunDirError` where there is none, or where it was trained with other image settings than
    the recipe's.
    """
    if recipe.adapter.method == "full":
        refuse_unfinished(folder, "config.json", recipe)
        section = recipe.model.model_copy(update={"name": str(folder), "revision": "main"})
        return Loaded(*load_model(section))
    if not is_adapter(recipe):
        refuse_unfinished(folder, IMAGE_SETTINGS, recipe)
        return Loaded(*load_model(recipe.model))
    model, family = load_model(recipe.model)
    extend_vocabulary(model, processor, recipe)
    return Loaded(load_adapter(model, folder, recipe), family)


def load_checkpoint(model: Any, checkpoint: Path) -> None:
    """Put a checkpoint's trained weights into a model that `load_trainable` made.

    Raises `RunDirError` or `ModelError` where they are none of ours.
    """
    if isinstance(model, PeftModel):
        refuse_foreign_adapter(checkpoint)
        if is_sharded(model):
            put_adapter(model, checkpoint)
        else:
            set_peft_model_state_dict(model, load_peft_weights(str(checkpoint), device="cpu"))
        return
    # Loaded as a model and not as a file: checkpoints keep the layout that the Hub has, which the
    # library maps to its own
    section = ModelSection(name=str(checkpoint), dtype="float32")
    weights = load_model(section)[0].state_dict()
    if is_sharded(model):
        reshard(model)
        put_weights(model.state_dict(), weights)
    else:
        model.load_state_dict(weights)
