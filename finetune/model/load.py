"""Models and processors, from the Hub, a folder, or the embedded one. Safetensors only; code from
the Hub is never run.
"""

import json
import logging
import warnings
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME

from finetune.errors import ModelError
from finetune.families import FAMILIES, family_of
from finetune.families.family import Family
from finetune.model.attention import follow_layouts
from finetune.model.quantize import (
    keep_weights_as_loaded,
    quantization_config,
    refuse_other_modules,
)
from finetune.model.vision import take_packed_views
from finetune.recipe import ImagesSection, ModelSection

EMBEDDED = "nano"


def model_location(name: str) -> str:
    """What transformers is to load: the package's own folder for `nano`, anything else as it
    stands.
    """
    return str(files("finetune") / "nano") if name == EMBEDDED else name


def load_config(model: ModelSection) -> tuple[Any, Family]:
    """The model's configuration, mended, and its family. Raises `ModelError`."""
    location = model_location(model.name)
    folder = Path(location)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ModelError(f"{model.name}: config.json is missing, so it is no model folder")
    try:
        config = AutoConfig.from_pretrained(
            location, revision=model.revision, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model.name: {model.name!r} cannot be loaded: {_first_line(error)}; give a Hub id "
            "that this machine can "
            "reach, a local folder, or nano"
        ) from error
    family = family_of(config)
    if family is None:
        supported = dict.fromkeys(each.model_type for each in FAMILIES.values())
        raise ModelError(
            f"{model.name}: model_type {config.model_type!r} is not supported; expected one of "
            f"{', '.join(supported)}"
        )
    if reason := _quantized_for_good(config) or family.untrainable(config):
        raise ModelError(f"{model.name}: {reason}")
    # A checkpoint may name attention code of the Hub, where the library would fetch it
    config._attn_implementation = None
    family.adjust_config(config)
    return config, family


def _quantized_for_good(config: Any) -> str | None:
    """Why a checkpoint whose weights are stored quantised cannot be trained; None where it can."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    settings = settings if isinstance(settings, dict) else settings.to_dict()
    method = str(settings.get("quant_method", "unknown"))
    if method == "bitsandbytes":
        return (
            "its weights are stored in 4 or 8 bits, vision and connector perhaps among them; train "
            "on the 16-bit checkpoint it was made from, with model.quantize: nf4 or int8"
        )
    return (
        f"its weights are stored as {method.upper()}, packed integers that only serve inference: "
        "no gradient passes through their kernels, and an adapter could not be merged into them; "
        "train on the checkpoint it was made from, with model.quantize: nf4 for the same memory"
    )


def load_processor(model: ModelSection, images: ImagesSection) -> tuple[Any, ImagesSection]:
    """The processor, set to the recipe's image settings, and these with the checkpoint's own where
    the recipe leaves them open.

    Settings that the family has no use for come out as None. Raises `ModelError`.
    """
    config, family = load_config(model)

    def load(kind: type | None) -> Any:
        # AutoProcessor and the library's processor classes load alike
        return cast(Any, kind or AutoProcessor).from_pretrained(
            model_location(model.name), revision=model.revision, trust_remote_code=False
        )

    try:
        processor = family.build_processor(load, config)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{model.name}: its processor cannot be loaded: {_first_line(error)}"
        ) from error
    own = family.own_images(processor)
    resolved = ImagesSection(**{key: getattr(images, key) or value for key, value in own.items()})
    _refuse_edges(model, resolved, family.trained_edge_px(config), config)
    family.set_images(processor, resolved)
    template = family.own_template
    if not template and getattr(processor, "chat_template", None) is None:
        template = family.lent_template
        if not template:
            raise ModelError(f"{model.name}: has no chat template; use a checkpoint that ships one")
    if template:
        processor.chat_template = template.text
    return processor, resolved


def _refuse_edges(
    model: ModelSection, images: ImagesSection, trained_edge_px: int | None, config: Any
) -> None:
    """Raise `ModelError` for views that the vision tower was not made for."""
    longest, shortest = images.longest_edge_px, images.shortest_edge_px
    if longest and shortest and shortest > longest:
        raise ModelError(
            f"images.shortest_edge_px: {shortest} is more than images.longest_edge_px: {longest}; "
            "both are the model's own where the recipe leaves them open"
        )
    if trained_edge_px is None:
        return
    patch = config.vision_config.patch_size
    for key, edge in (("longest_edge_px", longest), ("shortest_edge_px", shortest)):
        if edge and edge % patch:
            below = edge // patch * patch
            raise ModelError(
                f"images.{key}: {edge} is not a multiple of the patch size {patch} of "
                f"{model.name}; use {f'{below} or ' if below else ''}{below + patch}"
            )
    if longest and longest > trained_edge_px:
        raise ModelError(
            f"images.longest_edge_px: {longest} is more than the {trained_edge_px} pixels that "
            f"the vision tower of {model.name} knows positions for; set {trained_edge_px} or less"
        )


def load_model(model: ModelSection) -> tuple[Any, Family]:
    """The model in the recipe's dtype with every weight from the files: on the CPU, or, quantised,
    where it is to be used. Raises `ModelError`.
    """
    config, family = load_config(model)
    location = model_location(model.name)
    folder = Path(location)
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"{model.name}: holds no *.safetensors weights; download the whole model, or convert "
            "its weights"
        )
    refuse_foreign_weights(model)
    try:
        # a pair because of output_loading_info, which the declared type does not know
        loaded, info = cast(Any, AutoModelForImageTextToText).from_pretrained(
            location,
            config=config,
            revision=model.revision,
            dtype=getattr(torch, model.dtype),
            attn_implementation=None if model.attention == "auto" else model.attention,
            quantization_config=quantization_config(model, family, config),
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise ModelError(
            f"{model.name}: its weights cannot be loaded: {_first_line(error)}"
        ) from error
    except Exception as error:
        # safetensors' own error class derives from Exception alone
        if (
            type(error).__module__.startswith("safetensors")
            or "SafetensorError" in type(error).__name__
        ):
            raise ModelError(
                f"{model.name}: its weights are damaged ({_first_line(error)}); download them again"
            ) from error
        raise
    if missing := sorted(info["missing_keys"]):
        raise ModelError(
            f"{model.name}: {len(missing)} weights are missing and would be random, {missing[0]} "
            "first; "
            "use a complete checkpoint"
        )
    if model.quantize != "none":
        refuse_other_modules(loaded, family, model.name)
        keep_weights_as_loaded(loaded)
    family.adjust_model(loaded)
    if model.packed_vision:
        take_packed_views(loaded, family)
    follow_layouts(loaded)
    return loaded, family


def refuse_foreign_weights(model: ModelSection) -> None:
    """Raise `ModelError` where the library would read more than safetensors of the checkpoint,
    although it is told to: shards that the index calls otherwise, and an adapter beside them.
    """

    def find(name: str) -> str | None:
        return cached_file(
            model_location(model.name),
            name,
            revision=model.revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
        )

    if find(ADAPTER_CONFIG_NAME):
        raise ModelError(
            f"{model.name}: holds an adapter beside the model ({ADAPTER_CONFIG_NAME}), which would "
            "be part of the base unseen; merge it first, or take a copy without it"
        )
    if index := find(SAFE_WEIGHTS_INDEX_NAME):
        shards_of(Path(index), model.name)


def shards_of(index: Path, shown: str) -> list[str]:
    """The weight files that an index names, each once. Raises `ModelError` for any that is not a
    safetensors file beside it: others are pickles, or lead out of the folder.
    """
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        names = list(dict.fromkeys(found))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{shown}: {index.name} is no list of weights ({_first_line(error)}); download it again"
        ) from error
    for name in names:
        if not (
            isinstance(name, str) and name.endswith(".safetensors") and name == Path(name).name
        ):
            raise ModelError(
                f"{shown}: {index.name} names {name!r}, and weights are read only from "
                "*.safetensors beside it: other files may hold code; convert the weights"
            )
    return names


def best_device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def quiet_libraries() -> None:
    """Leave standard error to our own progress: no bars or advice of transformers, errors still
    come through.
    """
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers|trl|peft")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("trl").setLevel(logging.ERROR)
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # int8 tells of every layer it casts


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:300] or type(error).__name__
