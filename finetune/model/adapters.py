"""LoRA and its kin on named parts of the model, by PEFT, in PEFT's own format."""

import json
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer

from finetune.errors import ModelError, RunDirError
from finetune.families.family import Family, Part
from finetune.model.parts import part_of, target_pattern
from finetune.model.quantize import is_quantized
from finetune.recipe import AdapterSection, Recipe
from finetune.rundir import read_json

IMAGE_SETTINGS = "image_settings.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def add_adapter(
    model: Any,
    family: Family,
    adapter: AdapterSection,
    model_name: str,
    *,
    new_token_ids: Sequence[int] = (),
    rated_parts: Collection[str] | None = None,
) -> PeftModel:
    """The model with fresh adapters, in float32 whatever the base's dtype, and everything else
    frozen but the modules to save and the rows of new tokens.

    A mapping of ranks or alphas becomes PEFT's patterns. `rated_parts` have a learning rate; None
    means that all have. Raises `ModelError` where a part's pattern matches no linear layer, a name
    no module, or a module to save has no rate.
    """
    parts = family.parts_of(model.config)
    whole = find_modules(model, adapter.modules_to_save, model_name)
    if rated_parts is not None:
        _refuse_modules_without_rate(model, family, whole, rated_parts)
    _refuse_parts_without_layers(model, parts, adapter.parts, whole, model_name)
    ranks, alphas = (
        {part: _of(value, part) for part in adapter.parts}
        for value in (adapter.rank, adapter.alpha)
    )
    patterns = {part: target_pattern([parts[part]]) for part in adapter.parts}
    first = adapter.parts[0]
    rows = _trained_rows(model, new_token_ids, whole)
    config = LoraConfig(
        r=ranks[first],
        lora_alpha=alphas[first],
        rank_pattern={patterns[p]: r for p, r in ranks.items() if r != ranks[first]},
        alpha_pattern={patterns[p]: a for p, a in alphas.items() if a != alphas[first]},
        lora_dropout=adapter.dropout,
        use_dora=adapter.method == "dora",
        use_rslora=adapter.method == "rslora",
        target_modules=target_pattern(parts[part] for part in adapter.parts),
        modules_to_save=whole or None,
        trainable_token_indices=rows or None,
    )
    adapted = get_peft_model(model, config)
    if any(name == name_of(model, model.get_output_embeddings()) for name in rows):
        model.get_output_embeddings().bias = None  # TRL asks for it, and PEFT's wrapper has none
    # PEFT leaves the modules to save in half precision, where small steps round to nothing
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted  # type: ignore[return-value]  # PEFT declares its mixed model, too


def _of(value: Any, part: str) -> Any:
    """A setting of the recipe for one part: a number is for all."""
    return value[part] if isinstance(value, dict) else value


def _refuse_parts_without_layers(
    model: Any,
    parts: Mapping[str, Part],
    names: Sequence[str],
    whole: Sequence[str],
    model_name: str,
) -> None:
    linears = [
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)
    ]
    for part in names:
        pattern = re.compile(target_pattern([parts[part]]))
        matched = [name for name in linears if pattern.fullmatch(name)]
        if not matched:
            raise ModelError(
                f"adapter.parts: no linear layer of {model_name} matches {part!r} "
                f"({', '.join(parts[part].prefixes)}); the checkpoint is laid out "
                "differently"
            )
        if all(any(f"{name}.".startswith(f"{each}.") for each in whole) for name in matched):
            raise ModelError(
                f"adapter.parts: all of {part!r} is in adapter.modules_to_save, where it is "
                "trained whole; leave it out of one of them"
            )


def _refuse_modules_without_rate(
    model: Any, family: Family, names: Sequence[str], rated_parts: Collection[str]
) -> None:
    part_of = part_of_weight(model, family)
    for module in names:
        for weight, _ in model.get_submodule(module).named_parameters():
            part = part_of(f"{module}.{weight}")
            if part not in rated_parts:
                raise ModelError(
                    f"adapter.modules_to_save: {module} has weights in {part}, which "
                    "training.learning_rate has no rate for; give one rate for all, or add "
                    f"{part} to adapter.parts"
                )


def _trained_rows(model: Any, ids: Sequence[int], whole: Sequence[str]) -> dict[str, list[int]]:
    """The rows that new tokens have in embeddings and head, by the names of these; a table that is
    trained whole needs none.
    """
    if not ids:
        return {}
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    names = [name_of(model, table) for table in tables]
    return {name: list(ids) for name in names if name and name not in whole}


def find_modules(model: Any, names: Iterable[str], model_name: str) -> list[str]:
    """Full names of the modules to save, each given by its name or the end of it, from a dot on.

    Modules inside others that are named too are left out. Raises `ModelError` that lists the names
    which mean nothing, or quantised weights.
    """
    modules = dict(model.named_modules())
    found: list[str] = []
    unknown = []
    for name in names:
        meant = [each for each in modules if each == name or each.endswith(f".{name}")]
        found += meant
        if not meant:
            unknown.append(name)
    if unknown:
        tops = sorted(each for each in modules if each and each.count(".") <= 1)
        raise ModelError(
            f"adapter.modules_to_save: {model_name} has no module called {', '.join(unknown)}; "
            f"it has {', '.join(tops)} and those inside of them"
        )
    for name in found:
        if any(is_quantized(module) for module in modules[name].modules()):
            raise ModelError(
                f"adapter.modules_to_save: {name} of {model_name} is quantised, and such weights "
                "cannot be trained; leave it out, or set model.quantize: none"
            )
    return [
        each
        for each in dict.fromkeys(found)
        if not any(each.startswith(f"{other}.") for other in found)
    ]


def base_of(model: Any) -> Any:
    """The model within PEFT's wrapper, or the model where it has none."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def name_of(model: torch.nn.Module, module: torch.nn.Module | None) -> str | None:
    """Where a module stands in the model; None for None."""
    return next((name for name, each in model.named_modules() if each is module), None)


def part_of_weight(model: Any, family: Family) -> Callable[[str], str]:
    """Gives the part of a weight by its name, wrapped by PEFT or not. What stands in neither vision
    nor connector is of language: embeddings, norms, head.
    """
    base = base_of(model)
    find = part_of(family, base.config)
    return lambda name: find(name.removeprefix("base_model.model.")) or "language"


def load_adapter(model: Any, folder: Path, recipe: Recipe) -> PeftModel:
    """The base model with a saved adapter, for inference. Its vocabulary has the extra tokens.

    A base on the meta device stays there, with the adapter's weights on the CPU.

    Raises `RunDirError` where there is none, where it was trained with other image settings than
    the recipe's, or where weights of it are missing or of another shape than the model's.
    """
    refuse_unfinished(folder, ADAPTER_CONFIG, recipe)
    with warnings.catch_warnings():
        # with a warning alone PEFT leaves adapters random that it does not find
        warnings.filterwarnings("error", message="Found missing adapter keys")
        try:
            with _left_off_meta(model) as settings:
                return PeftModel.from_pretrained(model, folder, **settings)
        except UserWarning as warning:
            missing = re.findall(r"'([^']+)'", str(warning))
            raise RunDirError(
                f"{folder}: {len(missing)} weights of the adapter are missing and would be random, "
                f"{missing[0]} first; it is not whole, or belongs to another model"
            ) from warning
        except RuntimeError as error:
            # as torch's load_state_dict says it; anything else is no fault of the folder
            other = re.findall(r"size mismatch for ([^:]+):", str(error))
            if not other:
                raise
            raise RunDirError(
                f"{folder}: {len(other)} weights of the adapter have another shape than "
                f"{recipe.model.name} and adapter_config.json give them, {other[0]} first; it "
                "belongs to another model, or was changed; train it again with --overwrite"
            ) from error


def add_saved_adapter(adapted: PeftModel, name: str, folder: Path) -> None:
    """One more adapter, beside those that `load_adapter` gave, under a name of its own."""
    with _left_off_meta(adapted) as settings:
        adapted.load_adapter(str(folder), adapter_name=name, **settings)


@contextmanager
def _left_off_meta(model: torch.nn.Module) -> Iterator[dict[str, Any]]:
    """What PEFT is to be told for an adapter's weights to be in memory where the base's are not.

    It brings them to the device of the base, whatever it is told: within, it does not.
    """
    if not any(parameter.is_meta for parameter in model.parameters()):
        yield {}
        return
    with patch.object(BaseTunerLayer, "_move_adapter_to_device_of_base_layer", lambda *_: None):
        yield {"low_cpu_mem_usage": True, "torch_device": "cpu"}


def refuse_unfinished(folder: Path, file: str, recipe: Recipe) -> None:
    """Raise `RunDirError` where what was trained is not there, or was trained with other image
    settings than the recipe's.
    """
    if not (folder / file).is_file():
        raise RunDirError(
            f"{folder}: no adapter there; the run has not finished (finetune train ... --resume)"
        )
    if file == ADAPTER_CONFIG:
        refuse_foreign_adapter(folder)
    settings_file = folder / IMAGE_SETTINGS
    if settings_file.is_file():
        trained = json.loads(settings_file.read_text(encoding="utf-8"))
        if trained != recipe.images.model_dump():
            raise RunDirError(
                f"{folder}: was trained with images {trained}, but the recipe says "
                f"{recipe.images.model_dump()}; "
                "use the settings it was trained with"
            )


def refuse_foreign_adapter(folder: Path) -> None:
    """Raise `RunDirError` where PEFT would read more than LoRA matrices from safetensors: it takes
    a pickle where there are none, and other methods name further files, models and tokenizers.
    """
    if not (folder / ADAPTER_WEIGHTS).is_file():
        found = "adapter_model.bin is a pickle, which may hold code and is never read; "
        raise RunDirError(
            f"{folder}: {found if (folder / 'adapter_model.bin').is_file() else ''}"
            f"{ADAPTER_WEIGHTS} is missing; save the adapter again by a PEFT of today"
        )
    config = read_json(folder / ADAPTER_CONFIG)
    method = config.get("peft_type") if isinstance(config, dict) else None
    if method != "LORA":
        raise RunDirError(
            f"{folder / ADAPTER_CONFIG}: peft_type is {method!r}, and only LORA is loaded, which "
            "finetune train makes; train it again"
        )


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


def count_parameters(model: Any) -> tuple[int, int]:
    """Trainable and total parameters, quantised ones as many as there were before."""
    parameters = list(model.parameters())
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    return trainable, sum(map(_num_weights, parameters))


def _num_weights(parameter: Any) -> int:
    # bitsandbytes packs several 4-bit weights into an element, and keeps the shape beside them
    packed = getattr(parameter, "quant_state", None)
    return (packed.shape if packed is not None else parameter.shape).numel()
