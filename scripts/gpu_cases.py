"""What `scripts.bench_gpu` trains: rows of pictures at idefics2-8b's own sizes, the model with
random weights, and the two ways to train it.

Shape letters: B rows, T tokens, N views, C channels (3), H height, W width in pixels.
"""

import functools
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText
from trl.trainer.utils import add_fused_lm_head

from finetune.data.collate import IGNORED_LABEL, collate
from finetune.data.examples import Example
from finetune.data.sequences import Layouting
from finetune.families.idefics2 import IDEFICS2, PARTS, plan_image
from finetune.model.attention import follow_layouts
from finetune.model.kernels import Device
from finetune.model.lora import add_apart
from finetune.model.memory import quantise, set_up_training, step_memory
from finetune.model.parts import target_pattern
from finetune.model.vision import take_packed_views
from finetune.recipe import ImagesSection
from scripts.mid_model import FULL, TINY, config_of

Quantize = Literal["none", "nf4"]
Side = Literal["stock", "ours"]
Work = Literal["page split", "page whole", "mixed split", "docvqa split"]

# Torch's own fused kernels, which `model.attention: auto` takes too
ATTENTION = "sdpa"
LANGUAGE = re.compile(target_pattern([PARTS["language"]]))
ADAPTED = re.compile(target_pattern([PARTS["language"], PARTS["connector"]]))

BATCH_SIZES = (4, 8, 1, 2)
PAGE_PX = (1700, 2200)
# Photos, charts, receipts and a scan, as scripts/mid_model.py draws them at half the size
MIXED_PX = (
    *((640, 480), (480, 360), (700, 1500), PAGE_PX),
    *((640, 480), (600, 1200), (800, 500), (480, 640)),
)
QUESTIONS_A_PAGE = 4
QUESTION_TOKENS, LEARNT_TOKENS = (20, 60), 20
EDGES_PX = (980, 378)
TINY_EDGES_PX, TINY_PART = (140, 56), 7
"""And by how much pictures are smaller then."""


@dataclass(frozen=True)
class Case:
    """Steps of the published LoRA of rank 8 on language and connector."""

    work: Work
    batch_size: int
    quantize: Quantize
    side: Side
    checkpointing: bool = True

    def __str__(self) -> str:
        weights = "16 bits" if self.quantize == "none" else self.quantize
        kept = "" if self.checkpointing else ", without checkpointing"
        return f"{weights}, {self.work}, batch {self.batch_size}, {self.side}{kept}"


@dataclass(frozen=True)
class Traced:
    """What a step was seen to compute on torch's meta device, in floating-point operations."""

    computed_flops: int
    """With what checkpointing computes twice, padding, and gradients that nothing learns from."""
    needed_flops: int | None = None
    """Forward and backward without these; of ours alone, as it is the same for both."""
    planned_bytes: int | None = None
    """At the peak, as `finetune plan` has it; of ours alone."""


def cases(*, tiny: bool = False) -> list[Case]:
    """The most telling first, stock and ours side by side; weights change seldom, since the model
    is then built anew.
    """
    first, *others = BATCH_SIZES
    telling: list[tuple[Work, int]] = [
        ("page split", first),
        ("docvqa split", first),
        ("mixed split", first),
        ("page whole", first),
    ]
    rest: list[tuple[Work, int]] = [
        (work, batch_size)
        for batch_size in others
        for work, _ in telling
        # fewer rows would show nothing of several questions, or of several sizes
        if batch_size > first or work.startswith("page")
    ]
    weights: tuple[Quantize, ...] = ("none", "nf4")
    sides: tuple[Side, ...] = ("stock", "ours")
    ordered = [
        Case(work, batch_size, quantize, side)
        for some in (telling, [] if tiny else rest)
        for quantize in weights
        for work, batch_size in (some[:1] if tiny and quantize == "nf4" else some)
        for side in sides
    ]
    return [*ordered, Case("page whole", 1, "nf4", "ours", checkpointing=False)]


def rows_of(work: Work, batch_size: int, *, tiny: bool) -> list[Example]:
    """Rows of a picture each, of noise, and a short question; with `docvqa` four about one page."""
    build, part = (TINY, TINY_PART) if tiny else (FULL, 1)
    longest, shortest = TINY_EDGES_PX if tiny else EDGES_PX
    images = ImagesSection(
        split="never" if work == "page whole" else "always",
        longest_edge_px=longest,
        shortest_edge_px=shortest,
    )
    image_token = image_token_of(build.vocabulary)
    fake_token = image_token - 1
    rng, noise = random.Random(0), np.random.default_rng(0)
    questions = QUESTIONS_A_PAGE if work.startswith("docvqa") else 1
    pictures = []
    for number in range(-(-batch_size // questions)):
        sizes = MIXED_PX if work.startswith("mixed") else (PAGE_PX,)
        width, height = sizes[number % len(sizes)]
        plan = plan_image(width // part, height // part, images)
        shapes = [(3, view.height_px, view.width_px) for view in plan.views]
        views = [noise.integers(0, 256, shape, dtype=np.uint8) for shape in shapes]
        pictures.append((plan, views))
    rows = []
    for number in range(batch_size):
        plan, views = pictures[number // questions]
        ids = [1, 11, 12]  # BOS and the beginning of a turn
        for _ in plan.views:
            ids += [fake_token, *[image_token] * build.perceiver[0]]
        ids.append(fake_token)
        num_text = rng.randint(*QUESTION_TOKENS) + LEARNT_TOKENS
        ids += [rng.randrange(13, fake_token) for _ in range(num_text)]
        learnt = [False] * (len(ids) - LEARNT_TOKENS) + [True] * LEARNT_TOKENS
        rows.append(Example(f"row {number}", ids, learnt, views, [plan]))
    return rows


def image_token_of(vocabulary: int) -> int:
    """Last but one of the vocabulary, as in idefics2-8b; the fake token stands before it."""
    return vocabulary - 2


def batch_of(case: Case, *, tiny: bool) -> dict[str, Any]:
    """A batch as the side's own collator gives it: TRL's learns every token, and has masks in
    int64.
    """
    build = TINY if tiny else FULL
    processor = SimpleNamespace(
        image_token_id=image_token_of(build.vocabulary),
        image_seq_len=build.perceiver[0],
        tokenizer=SimpleNamespace(pad_token_id=0),
        image_processor=SimpleNamespace(
            rescale_factor=1 / 255, image_mean=[0.5] * 3, image_std=[0.5] * 3
        ),
    )
    rows = rows_of(case.work, case.batch_size, tiny=tiny)
    if case.side == "ours":
        sharing = Layouting(share_images=True)
        return collate(rows, processor, IDEFICS2, packed_vision=True, layouting=sharing)
    batch = collate(rows, processor, IDEFICS2)
    ids_BT, is_padding_BT = batch["input_ids"], batch["attention_mask"] == 0
    batch["labels"] = ids_BT.masked_fill(is_padding_BT, IGNORED_LABEL)
    batch["pixel_attention_mask"] = batch["pixel_attention_mask"].long()
    return batch


def build_adapted(quantize: str, device: str, *, tiny: bool) -> Any:
    """The adapted model: idefics2-8b, or `tiny` one of the same build.

    On meta it is quantised as planned, elsewhere by bitsandbytes. Raises `ImportError` without it.
    """
    build = TINY if tiny else FULL
    config = config_of(build, image_token_of(build.vocabulary))
    with torch.device(device):
        model: Any = AutoModelForImageTextToText.from_config(
            config, dtype=dtype_of(tiny=tiny), attn_implementation=ATTENTION
        )
    take_packed_views(model, IDEFICS2)
    follow_layouts(model)
    if quantize == "nf4" and device == "meta":
        quantise(model, lambda name: bool(LANGUAGE.fullmatch(name)), "nf4")
    elif quantize == "nf4":
        quantise_by_bitsandbytes(model, device)
    lora = LoraConfig(r=8, lora_alpha=8, lora_dropout=0.1, target_modules=ADAPTED.pattern)
    return get_peft_model(model, lora)


def dtype_of(*, tiny: bool) -> torch.dtype:
    """Of the weights; and of autocast, on a GPU."""
    return torch.float32 if tiny else torch.bfloat16


def quantise_by_bitsandbytes(model: Any, device: str) -> None:
    """What loading with our `quantization_config` does to the language part's layers."""
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    packed: Any = Params4bit  # declared as a plain parameter
    for name, module in list(model.named_modules()):
        if type(module) is not torch.nn.Linear or not LANGUAGE.fullmatch(name):
            continue
        held = Linear4bit(
            module.in_features,
            module.out_features,
            bias=False,
            compute_dtype=module.weight.dtype,
            compress_statistics=True,
            quant_type="nf4",
            device="meta",
        )
        held.weight = packed(
            module.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4"
        )
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, held.to(device))
    model.is_loaded_in_4bit = True


def set_up(model: Any, case: Case) -> None:
    """Make a model ready for the case, whatever case it was ready for before."""
    if case.side == "ours":
        _remove_hooks(model)
        set_up_training(model, checkpointing=case.checkpointing)
    else:
        set_up_stock(model, checkpointing=case.checkpointing)
    is_stock_qlora = case.side == "stock" and case.quantize == "nf4"
    for parameter in trained_of(model):
        parameter.data = parameter.data.to(torch.bfloat16 if is_stock_qlora else torch.float32)


def set_up_stock(model: Any, *, checkpointing: bool) -> None:
    """What PEFT, the library's trainer and TRL's do to a model before the first step.

    Source: trl 1.16, trl/trainer/sft_trainer.py, SFTTrainer.__init__.
    """
    base = model.get_base_model()
    vars(base).pop("forward", None)  # TRL's head, from before
    vars(base).pop("enable_input_require_grads", None)  # ours
    _remove_hooks(model)
    add_apart(model)
    model.train()
    if checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        base.enable_input_require_grads()
    else:
        base.gradient_checkpointing_disable()
    add_fused_lm_head(base, outputs=("log_probs", "entropy", "is_top1"))


def _remove_hooks(model: Any) -> None:
    """Those that ask for gradients: the library sets some twice, and knows of the second alone."""
    base = model.get_base_model()
    for module in base.modules():
        module._forward_hooks.clear()
    base._require_grads_hooks = []


def trained_of(model: Any) -> Sequence[torch.nn.Parameter]:
    """The adapters' weights."""
    return [each for each in model.parameters() if each.requires_grad]


def trace(case: Case, *, tiny: bool) -> Traced:
    """Follow a step of the case without weights; takes seconds, on a CPU."""
    torch.set_num_threads(1)
    model, batch = _planned_model(case.quantize, tiny), batch_of(case, tiny=tiny)
    device: Device = "cpu" if tiny else "cuda"

    def step(*, checkpointing: bool) -> Any:
        (set_up_training if case.side == "ours" else set_up_stock)(
            model, checkpointing=checkpointing
        )
        return step_memory(
            model,
            batch,
            term_of=lambda name: "language" if name else None,  # terms are not told apart here
            optimizer="adamw_torch_fused",
            device=device,
            half=None if tiny else dtype_of(tiny=tiny),
        )

    as_it_is = step(checkpointing=case.checkpointing)
    if case.side == "stock":
        return Traced(as_it_is.flops)
    kept = step(checkpointing=False)
    return Traced(as_it_is.flops, kept.flops, as_it_is.peak_bytes)


@functools.cache
def _planned_model(quantize: str, tiny: bool) -> Any:
    return build_adapted(quantize, "meta", tiny=tiny)
