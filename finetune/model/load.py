"""Models and processors, from the Hub, a folder, or the embedded one. Safetensors only; code from
the Hub is never run.
"""

import logging
import warnings
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging as transformers_logging

from finetune.errors import ModelError
from finetune.families import FAMILIES
from finetune.families.family import Family
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
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ModelError(
            f"{model.name}: model_type {config.model_type!r} is not supported; expected one of "
            f"{', '.join(FAMILIES)}"
        )
    family.adjust_config(config)
    return config, family


def load_processor(model: ModelSection, images: ImagesSection) -> Any:
    """The processor, set to the recipe's image sizes and splitting.

    The settings are made on the object, because a per-call `do_image_splitting` changes the views
    but not the number of image tokens. With `split: auto` the processor itself does not split: each
    image decides for itself. Raises `ModelError`.
    """
    config, family = load_config(model)
    edge = family.trained_edge_px(config)
    if images.longest_edge_px > edge:
        raise ModelError(
            f"images.longest_edge_px: {images.longest_edge_px} is more than the {edge} pixels that "
            "the vision tower "
            f"of {model.name} knows positions for; set {edge} or less"
        )
    try:
        processor = AutoProcessor.from_pretrained(
            model_location(model.name), revision=model.revision, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{model.name}: its processor cannot be loaded: {_first_line(error)}"
        ) from error
    if getattr(processor, "chat_template", None) is None:
        raise ModelError(f"{model.name}: has no chat template; use a checkpoint that ships one")
    processor.image_processor.do_image_splitting = images.split == "always"
    processor.image_processor.size = {
        "longest_edge": images.longest_edge_px,
        "shortest_edge": images.shortest_edge_px,
    }
    return processor


def load_model(model: ModelSection) -> tuple[Any, Family]:
    """The model in the recipe's dtype, on the CPU, with every weight from the files. Raises
    `ModelError`.
    """
    config, family = load_config(model)
    location = model_location(model.name)
    folder = Path(location)
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"{model.name}: holds no *.safetensors weights; download the whole model, or convert "
            "its weights"
        )
    try:
        # a pair because of output_loading_info, which the declared type does not know
        loaded, info = cast(Any, AutoModelForImageTextToText).from_pretrained(
            location,
            config=config,
            revision=model.revision,
            dtype=getattr(torch, model.dtype),
            attn_implementation=None if model.attention == "auto" else model.attention,
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
    return loaded, family


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


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:300] or type(error).__name__
