"""Peak memory of training steps, predicted without weights and measured with them, on a CPU.

Models of 40 to 60 million parameters, one of each family, with random weights:
`python -m scripts.bench_memory --out docs/memory.md` writes the table.
"""

import argparse
import gc
import platform
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import torch
import transformers
import trl
from peft import LoraConfig, get_peft_model
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForImageTextToText, PretrainedConfig

from finetune.data.views import ImagePlan, View
from finetune.families import FAMILIES
from finetune.families.mllama import arrangements
from finetune.model.memory import (
    StepMemory,
    set_up_training,
    step_loss,
    step_memory,
    tensors_of,
)
from finetune.model.vision import take_packed_views

IMAGE = 7  # the id of the image token in all of these models
VOCABULARY = 4000
_TEXT = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_VISION = {
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "patch_size": 14,
}


@dataclass(frozen=True)
class Case:
    """One step of one model."""

    family: str
    views: int
    batch_size: int
    checkpointing: bool
    num_tokens: int = 400
    dtype: torch.dtype = torch.float32
    attention: str = "sdpa"
    packed_vision: bool = True

    def __str__(self) -> str:
        return f"{self.family} {self.views} views, batch {self.batch_size}"


@dataclass(frozen=True)
class Compared:
    """Bytes at the peak of a step; `resting` of them are there before it begins."""

    case: Case
    predicted: StepMemory
    measured: int
    resting: int

    @property
    def error(self) -> float:
        """Of all bytes, relative to what was measured."""
        return self.predicted.peak_bytes / self.measured - 1

    @property
    def error_above_rest(self) -> float:
        """Of the bytes that come and go within the step, which are the hard part."""
        above = self.measured - self.resting
        return (self.predicted.peak_bytes - self.resting) / above - 1


def config_of(family: str) -> PretrainedConfig:
    """A model of middle size."""
    settings: dict[str, Any]
    if family == "idefics2":
        settings = {
            "text_config": {"model_type": "mistral", **_TEXT},
            "vision_config": {**_VISION, "image_size": 448},
            "perceiver_config": {
                "hidden_size": 512,
                "resampler_n_latents": 64,
                "resampler_depth": 3,
                "resampler_n_heads": 8,
                "resampler_head_dim": 64,
                "num_key_value_heads": 4,
            },
            "image_token_id": IMAGE,
        }
    elif family == "llava":
        settings = {
            "text_config": {"model_type": "llama", **_TEXT},
            "vision_config": {"model_type": "clip_vision_model", **_VISION, "image_size": 224},
            "image_token_index": IMAGE,
            "vision_feature_layer": -2,
        }
    elif family == "idefics3":
        settings = {
            "text_config": {"model_type": "llama", **_TEXT},
            "vision_config": {**_VISION, "image_size": 364},
            "scale_factor": 2,
            "image_token_id": IMAGE,
        }
    elif family == "mllama":
        settings = {
            "text_config": {
                **_TEXT,
                "cross_attention_layers": [2, 5],
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            },
            "vision_config": {
                **_VISION,
                "attention_heads": 6,
                "num_global_layers": 2,
                "intermediate_layers_indices": [2, 4],
                "vision_output_dim": 384 * 3,
                "image_size": 224,
                "max_num_tiles": 4,
                "supported_aspect_ratios": list(map(list, arrangements(4))),
            },
            "image_token_index": IMAGE,
        }
    elif family == "idefics":
        settings = {
            **{name: value for name, value in _TEXT.items() if name != "num_key_value_heads"},
            "cross_layer_interval": 2,
            "qk_layer_norms": False,
            "use_resampler": True,
            "additional_vocab_size": 0,
            "vision_config": {
                "embed_dim": 384,
                "image_size": 224,
                "patch_size": 14,
                "num_hidden_layers": 6,
                "num_attention_heads": 6,
                "intermediate_size": 1536,
            },
            "perceiver_config": {
                "use_resampler": True,
                "resampler_n_latents": 64,
                "resampler_depth": 3,
                "resampler_n_heads": 8,
                "resampler_head_dim": 64,
            },
        }
    else:
        raise ValueError(family)
    return AutoConfig.for_model(family, **settings)


def batch_of(case: Case, config: Any) -> dict[str, Any]:
    """Rows of noise: one of two asks a shorter question, so that there is padding."""
    B, T, N = case.batch_size, case.num_tokens, case.views
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, VOCABULARY, (B, T), generator=generator)
    mask = torch.ones(B, T, dtype=torch.long)
    for row in range(1, B, 2):
        mask[row, T - 50 :] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, : T // 2] = -100
    edge = getattr(config.vision_config, "image_size", 224)
    tokens_a_view = {"idefics2": 64, "llava": 256, "idefics3": (edge // 14 // 2) ** 2}
    ids[:, : tokens_a_view.get(case.family, 1) * N] = IMAGE
    tiles = 4 if case.family == "mllama" else 1
    rows = []
    for _ in range(B):
        # for idefics2, the first view is half as high
        halves = [case.family == "idefics2" and n == 0 for n in range(N)]
        sizes = [(edge, edge // 2 if is_half else edge) for is_half in halves for _ in range(tiles)]
        plan = ImagePlan(tuple(View((0, 0, *size), *size) for size in sizes), rows=2, cols=2)
        views = [
            torch.randint(256, (3, *size[::-1]), generator=generator, dtype=torch.uint8).numpy()
            for size in sizes
        ]
        rows.append(SimpleNamespace(views=views, plans=[plan] * bool(N)))
    processor = SimpleNamespace(
        image_token_id=IMAGE,
        image_processor=SimpleNamespace(
            size={"height": edge},
            max_image_tiles=tiles,
            rescale_factor=1 / 255,
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
        ),
    )
    family = FAMILIES[case.family]
    images = (family.pack if case.packed_vision else family.stack)(rows, processor, ids)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, **images}


def build(case: Case, device: str) -> Any:
    """The model as a training run sets it up, on `cpu` with weights or on `meta` without."""
    config = config_of(case.family)
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = AutoModelForImageTextToText.from_config(
            config, dtype=case.dtype, attn_implementation=case.attention
        )
    if case.packed_vision:
        take_packed_views(model, FAMILIES[case.family])
    stacks = "layers|blocks|connector|projector|perceiver|projection"
    targets = rf".*({stacks}).*(_proj|fc1|fc2|proj|linear_1|linear_2)"
    frozen = re.compile(r".*vision.*")
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and re.fullmatch(targets, name)
        and not frozen.fullmatch(name)
    ]
    lora = LoraConfig(r=8, lora_alpha=8, lora_dropout=0.1, target_modules=names)
    adapted: Any = get_peft_model(model, lora)
    set_up_training(adapted, checkpointing=case.checkpointing)
    return adapted


def compare(case: Case) -> Compared:
    """Predict, then measure, one step."""
    batch = batch_of(case, config_of(case.family))
    predicted = step_memory(
        build(case, "meta"),
        batch,
        term_of=lambda name: "vision" if "vision" in name else "language" if name else None,
        optimizer="adamw_torch",
        device="cpu",
        half=None,
    )
    measured, resting = measure(build(case, "cpu"), batch)
    return Compared(case, predicted, measured, resting)


def measure(model: Any, batch: Mapping[str, Any]) -> tuple[int, int]:
    """Bytes at the peak of the second training step, and before it, as torch's allocator tells."""
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def step() -> None:
        loss = step_loss(model, batch)
        loss.backward()
        del loss
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    step()  # afterwards there is a state of the optimizer
    gc.collect()
    resting = num_bytes(
        [*model.parameters(), *model.buffers(), *tensors_of(list(batch.values()))]
        + [each for state in optimizer.state.values() for each in state.values()]
    )
    return resting + peak_above(step), resting


def num_bytes(tensors: list[torch.Tensor]) -> int:
    """Of all storages behind them, each once."""
    storages = {each.untyped_storage()._cdata: each.untyped_storage().nbytes() for each in tensors}
    return sum(storages.values())


def peak_above(run: Callable[[], object]) -> int:
    """The most bytes that torch's CPU allocator had given out within `run`, above the beginning.

    They come from torch's profiler, which sees every allocation, those inside of kernels too.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    assert profiled.profiler is not None
    events: Any = profiled.profiler.kineto_results
    changes = sorted(
        (each.start_ns(), number, each.nbytes())
        for number, each in enumerate(events.events())
        if each.name() == "[memory]"
    )
    now = peak = 0
    for _, _, change in changes:
        now += change
        peak = max(peak, now)
    return peak


def cases() -> Iterator[Case]:
    """Every family with and without images and checkpointing, and batches of 1, 2 and 4."""
    for family in ("idefics2", "idefics3", "llava", "mllama", "idefics"):
        for checkpointing in (True, False):
            yield Case(family, 0, 2, checkpointing)
            for batch_size in (1, 2, 4):
                yield Case(family, 1, batch_size, checkpointing)
    for family in ("idefics2", "mllama"):
        yield Case(family, 1, 2, True, packed_vision=False)
    yield Case("idefics2", 2, 2, False, attention="eager")
    yield Case("idefics2", 2, 2, False, dtype=torch.bfloat16)


def table(compared: list[Compared]) -> str:
    """Markdown, a line a case."""
    lines = [
        "| model | views a row | batch | checkpointing | measured MiB | predicted MiB | all | above"
        " rest |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for each in compared:
        case = each.case
        other = "" if case.attention == "sdpa" else f", {case.attention}"
        other += "" if case.packed_vision else ", stock vision"
        other += "" if case.dtype is torch.float32 else f", {str(case.dtype)[6:]}"
        lines.append(
            f"| {case.family}{other} | {case.views} | {case.batch_size} | "
            f"{'yes' if case.checkpointing else 'no'} | {each.measured / 2**20:,.0f} | "
            f"{each.predicted.peak_bytes / 2**20:,.0f} | {each.error:+.1%} | "
            f"{each.error_above_rest:+.1%} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Print the table, or put it between the marks of a page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="a page with the marks <!-- measured -->")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    options = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    compared = []
    for case in cases():
        if options.only in str(case):
            compared.append(compare(case))
            print(table(compared[-1:]).splitlines()[-1], flush=True)
    versions = (
        f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"trl {trl.__version__}, peft {peft.__version__}; CPU ({platform.machine()}), one thread; "
        f"{date.today()}; {time.perf_counter() - start:.0f} s"
    )
    if options.out:
        page = options.out.read_text(encoding="utf-8")
        head, mark, rest = page.partition("<!-- measured -->\n")
        _, end, tail = rest.partition("<!-- end -->\n")
        body = f"{versions}\n\n{table(compared)}\n"
        options.out.write_text(head + mark + body + end + tail, encoding="utf-8")


if __name__ == "__main__":
    main()
