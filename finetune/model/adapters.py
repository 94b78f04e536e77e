"""LoRA on named parts of the model, by PEFT, in PEFT's own format."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from finetune.errors import ModelError, RunDirError
from finetune.families.family import Family
from finetune.model.load import EMBEDDED
from finetune.model.parts import target_pattern
from finetune.recipe import AdapterSection, Recipe
from finetune.rundir import write_json

IMAGE_SETTINGS = "image_settings.json"


def add_adapter(model: Any, family: Family, adapter: AdapterSection, model_name: str) -> PeftModel:
    """The model with fresh adapters, in float32 whatever the base's dtype, and everything else
    frozen.

    Raises `ModelError` where a part's pattern matches no linear layer.
    """
    parts = family.parts_of(model.config)
    linears = [
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)
    ]
    for part in adapter.parts:
        pattern = re.compile(target_pattern([parts[part]]))
        if not any(pattern.fullmatch(name) for name in linears):
            raise ModelError(
                f"adapter.parts: no linear layer of {model_name} matches {part!r} "
                f"({', '.join(parts[part].prefixes)}); the checkpoint is laid out "
                "differently"
            )
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,  # type: ignore[arg-type]  # declared whole, used as a factor
        lora_dropout=adapter.dropout,
        use_dora=adapter.method == "dora",
        use_rslora=adapter.method == "rslora",
        target_modules=target_pattern(parts[part] for part in adapter.parts),
    )
    adapted = get_peft_model(model, config)  # adapters of half-precision bases become float32 here
    return adapted  # type: ignore[return-value]  # PEFT declares its mixed model, too


def require_grad_on_language_inputs_only(model: Any) -> None:
    """Keep gradient checkpointing from back-propagating a frozen vision tower.

    For reentrant checkpointing the library makes the output of *every* embedding require grad, the
    vision tower's patches included, and the trainer and PEFT each do so again. That runs the
    tower's whole backward pass for nothing. The language model's inputs alone are enough; the
    tower's own adapters need no hook, since the checkpointing that we ask for is not reentrant.
    """

    def enable_input_require_grads() -> None:
        if not getattr(model, "_require_grads_hooks", None):
            embeddings = model.get_input_embeddings()
            model._require_grads_hooks = [
                embeddings.register_forward_hook(
                    lambda _module, _inputs, output: output.requires_grad_(True)
                )
            ]

    model.enable_input_require_grads = enable_input_require_grads


def save_adapter(model: PeftModel, processor: Any, recipe: Recipe, folder: Path) -> None:
    """PEFT weights and configuration, the processor, and the image settings that the adapter was
    trained with.
    """
    # The embeddings are never trained here; asking PEFT to look for them would ask the Hub for the
    # base's vocabulary
    model.save_pretrained(str(folder), save_embedding_layers=False)
    if recipe.model.name == EMBEDDED:
        # or else PEFT's configuration would name the folder in which the package happens to be
        # installed
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        write_json(folder / "adapter_config.json", config | {"base_model_name_or_path": EMBEDDED})
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty card; `push` writes a real one
    processor.save_pretrained(folder)
    write_json(folder / IMAGE_SETTINGS, recipe.images.model_dump())


def load_adapter(model: Any, folder: Path, recipe: Recipe) -> PeftModel:
    """The base model with a saved adapter, for inference.

    Raises `RunDirError` where there is none, or where it was trained with other image settings than
    the recipe's.
    """
    if not (folder / "adapter_config.json").is_file():
        raise RunDirError(
            f"{folder}: no adapter there; the run has not finished (finetune train ... --resume)"
        )
    settings_file = folder / IMAGE_SETTINGS
    if settings_file.is_file():
        trained = json.loads(settings_file.read_text(encoding="utf-8"))
        if trained != recipe.images.model_dump():
            raise RunDirError(
                f"{folder}: was trained with images {trained}, but the recipe says "
                f"{recipe.images.model_dump()}; "
                "use the settings it was trained with"
            )
    return PeftModel.from_pretrained(model, folder)


def count_parameters(model: Any) -> tuple[int, int]:
    """Trainable and total parameters."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trainable, sum(p.numel() for p in model.parameters())
