"""Memory and speed of training Idefics2-8B on a GPU, with what `finetune plan` says beside it.

Random weights, made on the card: memory and time do not depend on their values, and nothing is
downloaded. `python -m scripts.bench_gpu --out FOLDER` takes some minutes on a card of 80 GB and
writes bench_gpu.json and bench_gpu.md there ($OUT without the option); `--tiny` runs the same code
on a CPU in seconds.
"""

import argparse
import gc
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText, Idefics2Config

from finetune.families.idefics2 import PARTS
from finetune.model.kernels import Device
from finetune.model.memory import TERMS, quantise, set_up_training, step_loss, step_memory
from finetune.model.parts import target_pattern
from scripts.bench_memory import num_bytes, peak_above

# Torch's own fused kernels, which `model.attention: auto` takes too
ATTENTION = "sdpa"
TEXT_TOKENS, LEARNT_TOKENS = 60, 20
TIMED_STEPS = 3
LANGUAGE = re.compile(target_pattern([PARTS["language"]]))
ADAPTED = re.compile(target_pattern([PARTS["language"], PARTS["connector"]]))


@dataclass(frozen=True)
class Case:
    """One way to train: the published LoRA of rank 8 on language and connector."""

    quantize: str
    views: int
    batch_size: int
    checkpointing: bool = True


@dataclass
class Line:
    """What a case took, in GiB and seconds; `error` where it did not run."""

    case: Case
    predicted_gib: float
    terms_gib: dict[str, float] = field(default_factory=dict)
    measured_gib: float | None = None
    reserved_gib: float | None = None
    """With the gaps that torch's allocator keeps."""
    on_card_gib: float | None = None
    """As the driver tells, CUDA's own share included."""
    seconds_a_step: float | None = None
    error: str = ""


def config_of(*, tiny: bool) -> Any:
    """idefics2-8b as on the Hub, or one of the same build that trains on a CPU in seconds."""
    text = {"model_type": "mistral", "vocab_size": 32003, "pad_token_id": 0}
    vision = {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "patch_size": 14,
        "image_size": 980,
    }
    perceiver = {
        "hidden_size": 4096,
        "resampler_n_latents": 64,
        "resampler_depth": 3,
        "resampler_n_heads": 16,
        "resampler_head_dim": 96,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-5,
    }
    if tiny:
        text |= {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
        text |= {"num_attention_heads": 4, "num_key_value_heads": 2}
        vision |= {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
        vision |= {"num_attention_heads": 4, "image_size": 112}
        perceiver |= {"hidden_size": 64, "resampler_n_heads": 4, "resampler_head_dim": 16}
        perceiver |= {"num_key_value_heads": 2}
    return Idefics2Config(text_config=text, vision_config=vision, perceiver_config=perceiver)


def cases() -> Iterator[Case]:
    """bf16 LoRA and QLoRA, split and unsplit, batches of 1, 2 and 4; one without checkpointing."""
    for quantize in ("none", "nf4"):
        for views in (1, 5):
            for batch_size in (1, 2, 4):
                yield Case(quantize, views, batch_size)
        yield Case(quantize, 1, 1, checkpointing=False)


def build(config: Any, quantize: str, device: str, dtype: torch.dtype) -> Any:
    """The adapted model; on meta, quantised as planned, elsewhere by bitsandbytes."""
    with torch.device(device):
        model: Any = AutoModelForImageTextToText.from_config(
            config, dtype=dtype, attn_implementation=ATTENTION
        )
    if quantize == "nf4" and device == "meta":
        quantise(model, lambda name: bool(LANGUAGE.fullmatch(name)), "nf4")
    elif quantize == "nf4":
        quantise_by_bitsandbytes(model, device, dtype)
    lora = LoraConfig(r=8, lora_alpha=8, lora_dropout=0.1, target_modules=ADAPTED.pattern)
    return get_peft_model(model, lora)


def quantise_by_bitsandbytes(model: Any, device: str, dtype: torch.dtype) -> None:
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
            compute_dtype=dtype,
            compress_statistics=True,
            quant_type="nf4",
            device="meta",
        )
        weight = module.weight.data.to("cpu" if device == "cpu" else device)
        held.weight = packed(
            weight, requires_grad=False, compress_statistics=True, quant_type="nf4"
        )
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, held.to(device))
    model.is_loaded_in_4bit = True


def batch_of(case: Case, config: Any) -> dict[str, torch.Tensor]:
    """Rows of one picture whose views all have the largest size, and a short question."""
    B, N, edge = case.batch_size, case.views, config.vision_config.image_size
    num_latents = config.perceiver_config.resampler_n_latents
    generator = torch.Generator().manual_seed(0)
    T = N * (num_latents + 1) + 1 + TEXT_TOKENS
    ids = torch.randint(10, 30000, (B, T), generator=generator)
    ids[:, : N * num_latents] = config.image_token_id
    labels = torch.full_like(ids, -100)
    labels[:, -LEARNT_TOKENS:] = ids[:, -LEARNT_TOKENS:]
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
        "pixel_values": torch.rand(B, N, 3, edge, edge, generator=generator) - 0.5,
        "pixel_attention_mask": torch.ones(B, N, edge, edge, dtype=torch.bool),
    }


def predict(case: Case, planned: Any, config: Any, device: Device, dtype: torch.dtype) -> Line:
    """As `finetune plan` does."""
    set_up_training(planned, checkpointing=case.checkpointing)
    memory = step_memory(
        planned,
        batch_of(case, config),
        term_of=_term_of,
        optimizer="adamw_torch_fused",
        device=device,
        half=dtype if device == "cuda" else None,
    )
    terms = {term: round(memory.terms[term] / 2**30, 3) for term in TERMS}
    return Line(case, round(memory.peak_bytes / 2**30, 3), terms)


def _term_of(module: str) -> str | None:
    name = module.removeprefix("base_model.model").removeprefix(".")
    if not name or name == "lm_head":
        return "logits"
    for part in ("vision", "connector"):
        if name.startswith(PARTS[part].prefixes):
            return part
    return "language"


def measure(line: Line, model: Any, config: Any, device: Device, dtype: torch.dtype) -> None:
    """Train a few steps and write down what they took."""
    case = line.case
    set_up_training(model, checkpointing=case.checkpointing)
    batch = {name: each.to(device) for name, each in batch_of(case, config).items()}
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    on_gpu = device == "cuda"

    def step() -> None:
        with torch.autocast("cuda", dtype) if on_gpu else nullcontext():
            loss = step_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    step()  # afterwards kernels are chosen and the optimizer has its state
    if not on_gpu:
        states = [each for state in optimizer.state.values() for each in state.values()]
        resting = num_bytes([*model.parameters(), *model.buffers(), *batch.values(), *states])
        line.measured_gib = round((resting + peak_above(step)) / 2**30, 3)
    else:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    for _ in range(TIMED_STEPS):
        step()
    if on_gpu:
        torch.cuda.synchronize()
        line.measured_gib = round(torch.cuda.max_memory_allocated() / 2**30, 3)
        line.reserved_gib = round(torch.cuda.max_memory_reserved() / 2**30, 3)
        free, total = torch.cuda.mem_get_info()
        line.on_card_gib = round((total - free) / 2**30, 3)
    line.seconds_a_step = round((time.perf_counter() - start) / TIMED_STEPS, 3)


def machine(device: Device) -> dict[str, str]:
    """The card, and the versions that matter."""
    card = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    packages = ("torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes")
    versions: dict[str, str] = {}
    for name in packages:
        try:
            versions[name] = version(name)
        except ModuleNotFoundError:
            versions[name] = "missing"
    return {"card": card, "date": datetime.now(UTC).date().isoformat(), **versions}


def table(lines: list[Line], told: dict[str, str]) -> str:
    """Markdown, a line a case."""
    rows = [
        ", ".join(f"{name} {value}" if name != "card" else value for name, value in told.items()),
        "",
        "| weights | views a row | rows | checkpointing | measured GiB | planned GiB | off | with"
        " gaps GiB | on the card GiB | s a step |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for line in lines:
        case, measured = line.case, line.measured_gib
        off = f"{line.predicted_gib / measured - 1:+.1%}" if measured else ""
        shown = [
            "nf4" if case.quantize == "nf4" else "16 bits",
            case.views,
            case.batch_size,
            "yes" if case.checkpointing else "no",
            line.error or measured,
            line.predicted_gib,
            off,
            line.reserved_gib or "",
            line.on_card_gib or "",
            line.seconds_a_step or "",
        ]
        rows.append("| " + " | ".join(map(str, shown)) + " |")
    return "\n".join(rows) + "\n"


def main() -> int:
    """Run all cases and write the two files after each, so that a cut-off run leaves its part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=os.environ.get("OUT") or ".")
    parser.add_argument("--tiny", action="store_true", help="a dry run on a CPU")
    options = parser.parse_args()
    if not options.tiny and not torch.cuda.is_available():
        print("no CUDA device here; --tiny runs the same code on a CPU", file=sys.stderr)
        return 2
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    device: Device = "cpu" if options.tiny else "cuda"
    dtype = torch.float32 if options.tiny else torch.bfloat16
    config, told = config_of(tiny=options.tiny), machine(device)
    lines: list[Line] = []
    for quantize in ("none", "nf4"):
        planned = build(config, quantize, "meta", dtype)
        mine = [
            predict(case, planned, config, device, dtype)
            for case in cases()
            if case.quantize == quantize
        ]
        try:
            model: Any = build(config, quantize, device, dtype)
        except ImportError as error:
            model = None
            print(f"{quantize}: {error}", file=sys.stderr)
        for line in mine:
            try:
                if model is None:
                    line.error = "bitsandbytes is missing"
                else:
                    measure(line, model, config, device, dtype)
            except torch.cuda.OutOfMemoryError:
                line.error = "out of memory"
            lines.append(line)
            print(table([line], told).splitlines()[-1], flush=True)
            shown = {"machine": told, "cases": [asdict(each) for each in lines]}
            (out / "bench_gpu.json").write_text(json.dumps(shown, indent=2), encoding="utf-8")
            (out / "bench_gpu.md").write_text(table(lines, told), encoding="utf-8")
            gc.collect()
        del model
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
