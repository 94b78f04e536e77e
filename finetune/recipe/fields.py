"""What single values of a recipe may look like, and the slips of YAML 1.1 that are forgiven."""

import re
from typing import Annotated, Any, Literal, TypeVar, get_args

from annotated_types import Ge, Gt, Le, Lt
from pydantic import AfterValidator, BeforeValidator, Discriminator, Strict, Tag, WithJsonSchema

from finetune.recipe.files import HUB_ID
from finetune.recipe.messages import in_words

Part = Literal["language", "connector", "vision"]
Metric = Literal[
    "exact_match",
    "contains",
    "anls",
    "vqa_accuracy",
    "relaxed_accuracy",
    "cer",
    "wer",
    "token_f1",
    "bleu",
    "rouge_l",
    "cider",
    "json_f1",
    "nted",
    "anls_star",
    "multiple_choice",
    "count",
]
FormatName = Literal[
    "auto",
    "chat",
    "openai",
    "sharegpt",
    "llava",
    "llama-factory",
    "ms-swift",
    "cauldron",
    "docvqa",
    "textvqa",
    "vqav2",
    "cord",
    "mantis",
    "coco-captions",
    "chartqa",
    "mmmu",
    "columns",
]
Tracker = Literal["tensorboard", "trackio", "wandb"]
Scheduler = Literal[
    "cosine",
    "linear",
    "constant",
    "constant_with_warmup",
    "cosine_with_restarts",
    "polynomial",
    "inverse_sqrt",
]
# ddp: whole models; fsdp, zero3: weights in shares; zero2: the optimizer's state in shares.
Engine = Literal["ddp", "fsdp", "zero2", "zero3"]
# Those of transformers; a test holds the two lists equal.
Optimizer = Literal[
    "adamw_torch",
    "adamw_torch_fused",
    "adamw_torch_xla",
    "adamw_torch_npu_fused",
    "adafactor",
    "adamw_anyprecision",
    "adamw_torch_4bit",
    "adamw_torch_8bit",
    "ademamix",
    "sgd",
    "adagrad",
    "adamw_bnb_8bit",
    "adamw_8bit",
    "ademamix_8bit",
    "lion_8bit",
    "lion_32bit",
    "paged_adamw_32bit",
    "paged_adamw_8bit",
    "paged_ademamix_32bit",
    "paged_ademamix_8bit",
    "paged_lion_32bit",
    "paged_lion_8bit",
    "rmsprop",
    "rmsprop_bnb",
    "rmsprop_bnb_8bit",
    "rmsprop_bnb_32bit",
    "galore_adamw",
    "galore_adamw_8bit",
    "galore_adafactor",
    "galore_adamw_layerwise",
    "galore_adamw_8bit_layerwise",
    "galore_adafactor_layerwise",
    "lomo",
    "adalomo",
    "grokadamw",
    "schedule_free_radam",
    "schedule_free_adamw",
    "schedule_free_sgd",
    "apollo_adamw",
    "apollo_adamw_layerwise",
    "stable_adamw",
]

BestMetric = Literal["loss"] | Metric

PARTS: tuple[str, ...] = get_args(Part)
METRICS: tuple[str, ...] = get_args(Metric)
FORMATS: tuple[str, ...] = get_args(FormatName)

# Supported models cut their pictures into patches of 14 pixels, SmolVLM's small ones into 16. Which
# of the two a model takes is checked once its configuration is known.
PATCH_SIZES_PX = (14, 16)

SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([KMGT])(i?)B", re.IGNORECASE)

Item = TypeVar("Item")


def _number(value: Any) -> Any:
    """YAML 1.1 reads 1e-4 as text, for want of a dot; nobody means that."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _off(value: Any) -> Any:
    """YAML 1.1 reads a bare off as false, and nothing at all as null."""
    return "off" if str(value).lower() in {"off", "none", "false"} else value


def _auto_or_off(value: Any) -> Any:
    return "auto" if value is True else _off(value)


def _none(value: Any) -> Any:
    return "none" if _off(value) == "off" else value


def _format_name(value: Any) -> Any:
    """llama_factory for llama-factory, as their files are called."""
    return value.replace("_", "-") if isinstance(value, str) else value


def _size_or_off(value: Any) -> str:
    value = _off(value)
    if value == "off" or (isinstance(value, str) and num_bytes(value)):
        return value
    raise ValueError(f"expected off or a size such as 20GiB, found {in_words(value)}")


def num_bytes(size: str) -> int:
    """Bytes of a size such as 20GiB or 1.5 TB; 0 where it is none."""
    match = SIZE.fullmatch(size.strip())
    if not match:
        return 0
    number, prefix, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** ("KMGT".index(prefix.upper()) + 1))


def _printable(text: str) -> str:
    if not text.strip() or not text.isprintable():
        raise ValueError(f"expected a line of text, found {text!r}")
    return text


def _hub_id(text: str) -> str:
    if not HUB_ID.fullmatch(text):
        raise ValueError(f"expected a Hub id such as user/name, found {text!r}")
    return text


def _on_patch_grid(edge_px: int) -> int:
    if all(edge_px % size for size in PATCH_SIZES_PX):
        size = PATCH_SIZES_PX[0]
        below = edge_px // size * size
        use = f"{below} or {below + size}" if below else f"{size}"
        raise ValueError(f"{edge_px} is not a multiple of the patch size {size}; use {use}")
    return edge_px


def _no_repeats(items: tuple[Item, ...]) -> tuple[Item, ...]:
    if repeated := [str(item) for number, item in enumerate(items) if item in items[:number]]:
        raise ValueError(f"{repeated[0]!r} is given twice; keep one")
    return items


def _or_empty(value: Any) -> Any:
    """A heading with nothing under it, as when all its lines are commented out."""
    return () if value is None else value


PositiveNumber = Annotated[float, Gt(0), BeforeValidator(_number)]
NonNegative = Annotated[float, Ge(0), BeforeValidator(_number)]
Fraction = Annotated[float, Ge(0), Lt(1), BeforeValidator(_number)]
# by more, a picture in memory for a moment may be larger than the memory
Upscale = Annotated[float, Ge(1), Le(4), BeforeValidator(_number)]
Count = Annotated[int, Ge(1)]
Edge = Annotated[
    int,
    Ge(1),
    AfterValidator(_on_patch_grid),
    WithJsonSchema(
        {"type": "integer", "minimum": 1, "anyOf": [{"multipleOf": n} for n in PATCH_SIZES_PX]}
    ),
]
Text = Annotated[str, AfterValidator(_printable)]
HubId = Annotated[str, AfterValidator(_hub_id)]
Seed = Annotated[int, Ge(0), Lt(2**32)]
Format = Annotated[FormatName, BeforeValidator(_format_name)]
Quantize = Annotated[Literal["none", "nf4", "int8"], BeforeValidator(_none)]
AutoOrOff = Annotated[Literal["auto", "off"], BeforeValidator(_auto_or_off)]
SizeOrOff = Annotated[
    str,
    BeforeValidator(_size_or_off),
    WithJsonSchema({"type": "string", "pattern": "^(off|[0-9.]+ ?[KMGTkmgt]i?[Bb])$"}),
]
# Strict tuples would refuse the lists that YAML has.
Listed = Annotated[tuple[Item, ...], Strict(False), BeforeValidator(_or_empty)]
Chosen = Annotated[Listed[Item], AfterValidator(_no_repeats)]
_by_part_or_number = Discriminator(lambda v: "by_part" if isinstance(v, dict) else "number")
LearningRate = Annotated[
    Annotated[PositiveNumber, Tag("number")]
    | Annotated[dict[Part, PositiveNumber], Tag("by_part")],
    _by_part_or_number,
]
Alpha = LearningRate
Rank = Annotated[
    Annotated[Count, Tag("number")] | Annotated[dict[Part, Count], Tag("by_part")],
    _by_part_or_number,
]
