"""One training, measured: by plain TRL, or by `finetune train`.

    python -m scripts.bench_sides JOB.json

prints one line of JSON. `scripts.bench_train` calls it, a process a training, so that no side finds
what another left in memory.
"""

import json
import sys
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import yaml
from datasets import Dataset, Image, List
from peft import LoraConfig
from rich.console import Console
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    PrinterCallback,
)
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling, SFTTrainer

import finetune.train
import finetune.training
from finetune.data.packed_views import PackedViews
from finetune.families.idefics2 import PARTS
from finetune.model.load import quiet_libraries
from finetune.model.parts import target_pattern
from finetune.recipe import load_recipe
from scripts.bench_clocks import Clock, Figures, peak_memory, tensor_memory
from scripts.mid_model import LONGEST_EDGE_PX, SHORTEST_EDGE_PX

RANK = 8
LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Job:
    """What is trained, and how."""

    side: str
    """stock: `SFTTrainer` as it comes; ours: `finetune train`."""
    model: str
    rows: str
    batch_size: int
    epochs: int = 1
    max_steps: int | None = None
    seed: int = 0
    threads: int = 1
    split: bool = True
    longest_edge_px: int = LONGEST_EDGE_PX
    shortest_edge_px: int = SHORTEST_EDGE_PX
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Keys of the recipe, with a dot, that differ from its defaults. For ours alone."""
    without: tuple[str, ...] = ()
    """Names in `TAKEN_OUT`. For ours alone."""
    tensors: bool = False
    """Whether tensors are counted, byte by byte; that takes time."""
    told: str = ""
    """A file to which ours writes which rows it trained and what it learnt of each, and which stock
    then follows."""


# What has no key in a recipe, and what to put in its place to see what it is worth
TAKEN_OUT: dict[str, dict[str, Any]] = {
    # the library asks for gradients on the patches of a frozen tower
    "no gradient through a frozen tower": {
        "finetune.trainer.require_grad_on_language_inputs_only": lambda model: None,
        "finetune.model.vision._learns": lambda inner, part: True,
    },
    "connector computed again, not kept": {
        "finetune.model.vision._recomputes": lambda inner: False,
    },
    # TRL's fused head, which on a CPU scores all tokens, stays in its place
    "loss of learnt tokens alone": {
        "finetune.trainer.learn_from_labels": lambda model, kernel: None,
    },
    "LoRA added in place": {"finetune.trainer.add_in_place": lambda model: None},
}


def run(job: Job) -> Figures:
    """Train, and give the figures."""
    torch.set_num_threads(job.threads)
    quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        return (run_stock if job.side == "stock" else run_ours)(job, Path(folder))


def run_ours(job: Job, folder: Path) -> Figures:
    """`finetune train` itself, up to the last step."""
    figures = Figures()
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_of(job, folder)))
    recipe, quiet = load_recipe(path), Console(quiet=True)
    trainer = clocked(finetune.training.VisionSFTTrainer, figures, job)
    with ExitStack() as stack:
        stack.enter_context(patch("finetune.training.VisionSFTTrainer", trainer))
        for name in job.without:
            for target, stand_in in TAKEN_OUT[name].items():
                stack.enter_context(patch(target, stand_in))
        try:
            finetune.train.train(recipe, str(path), console=quiet, results=quiet)
        except _StepsTaken:
            return figures
    raise AssertionError("trained without the trainer that was put in")


def recipe_of(job: Job, folder: Path) -> dict[str, Any]:
    """As a user would write it, for what stock does: float32, LoRA without dropout, AdamW."""
    recipe: dict[str, Any] = {
        "model": {"name": job.model, "dtype": "float32"},
        "images": {
            "split": "always" if job.split else "never",
            "longest_edge_px": job.longest_edge_px,
            "shortest_edge_px": job.shortest_edge_px,
        },
        "adapter": {"rank": RANK, "alpha": RANK, "dropout": 0.0},
        "data": {"train": [{"path": job.rows}], "max_tokens": 32768},
        "training": {
            **({"max_steps": job.max_steps} if job.max_steps else {"epochs": job.epochs}),
            "batch_size": job.batch_size,
            "gradient_accumulation": 1,
            "learning_rate": LEARNING_RATE,
            "scheduler": "constant",
            "warmup_ratio": 0,
            "weight_decay": 0,
            "num_workers": 0,
            "logging_steps": 1,
            "save_steps": 1_000_000,
            "seed": job.seed,
        },
        "output": {"dir": str(folder / "run")},
    }
    for key, value in job.settings.items():
        section, name = key.split(".")
        recipe.setdefault(section, {})[name] = value
    return recipe


def run_stock(job: Job, folder: Path) -> Figures:
    """TRL as its users call it: `messages` rows, its own collator, LoRA by PEFT."""
    figures = Figures()
    torch.manual_seed(job.seed)
    processor: Any = AutoProcessor.from_pretrained(job.model)
    # on the object: a per-call setting cuts the pictures and leaves the text as it was
    processor.image_processor.do_image_splitting = job.split
    processor.image_processor.size = {
        "longest_edge": job.longest_edge_px,
        "shortest_edge": job.shortest_edge_px,
    }
    told = json.loads(Path(job.told).read_text()) if job.told else None
    rows = read_rows(Path(job.rows))
    if told:
        rows = [rows[number] | {"row": number} for number in told["order"]]
    trainer: Any = clocked(SFTTrainer, figures, replace(job, told=""))(
        model=AutoModelForImageTextToText.from_pretrained(job.model, dtype=torch.float32),
        processing_class=processor,
        train_dataset=Dataset.from_list(rows).cast_column("images", List(Image())),
        data_collator=ToldLabels(processor, told["examples"]) if told else None,
        args=SFTConfig(
            output_dir=str(folder),
            use_cpu=True,
            bf16=False,
            num_train_epochs=job.epochs,
            max_steps=job.max_steps or -1,
            per_device_train_batch_size=job.batch_size,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            max_length=None,  # or image tokens are cut
            gradient_checkpointing=True,
            train_sampling_strategy="sequential" if told else "random",
            remove_unused_columns=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=job.seed,
        ),
        peft_config=LoraConfig(
            r=RANK,
            lora_alpha=RANK,
            target_modules=target_pattern([PARTS["language"], PARTS["connector"]]),
        ),
    )
    trainer.remove_callback(PrinterCallback)
    try:
        trainer.train()
    except _StepsTaken:
        return figures
    raise AssertionError("TRL did not train")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Chat rows as TRL wants them: the pictures in a column of their own."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        messages, images = [], []
        for message in json.loads(line)["messages"]:
            parts = message["content"]
            images += [str(path.parent / part["image"]) for part in parts if "image" in part]
            content = [{"type": part["type"], "text": part.get("text")} for part in parts]
            messages.append({"role": message["role"], "content": content})
        rows.append({"messages": messages, "images": images})
    return rows


class ToldLabels(DataCollatorForVisionLanguageModeling):
    """TRL's collator, whose rows begin with BOS and learn the answer alone, as ours do.

    TRL by itself leaves BOS out and learns the question and the image tokens, too: another loss,
    which would be no measure for ours.
    """

    def __init__(self, processor: Any, examples: Sequence[Mapping[str, Any]]):
        super().__init__(processor)
        self.examples = examples

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch with the pixels of TRL's processor."""
        batch = super().torch_call(examples)
        told = [self.examples[example["row"]] for example in examples]
        for row, ids in zip(told, batch["input_ids"].tolist(), strict=True):
            ours = row["input_ids"]
            assert ours[1:] == ids[: len(ours) - 1], "the two sides render a row differently"
        length = max(len(row["input_ids"]) for row in told)
        pad = self.processor.tokenizer.pad_token_id  # type: ignore[union-attr]

        def padded(name: str, fill: int) -> torch.Tensor:
            return torch.tensor([row[name] + [fill] * (length - len(row[name])) for row in told])

        learnt = padded("loss_mask", 0).bool()
        batch["input_ids"] = padded("input_ids", pad)
        batch["labels"] = batch["input_ids"].masked_fill(~learnt, -100)
        counts = torch.tensor([[len(row["input_ids"])] for row in told])
        batch["attention_mask"] = (torch.arange(length) < counts).long()
        return batch


class _StepsTaken(Exception):  # noqa: N818 - nothing went wrong
    """Ends a training whose figures are complete, before it saves and judges."""


def clocked(trainer_class: type, figures: Figures, job: Job) -> type:
    """A trainer that fills in the figures and ends with the last step."""

    class Clocked(trainer_class):
        def train(self, *args: Any, **kwargs: Any) -> Any:
            start_adapters(self.model)
            figures.trainable = sum(
                each.numel() for each in self.model.parameters() if each.requires_grad
            )
            if encoder := getattr(self.data_collator, "encoder", None):
                counts: Any = encoder.count_many(self.data_collator.rows)
                figures.num_rows = len(counts)
                figures.row_tokens = sum(each.num_tokens for each in counts)
                figures.row_pixels = sum(each.num_view_pixels for each in counts)
            if job.told:
                self.data_collator = TellingCollator(self.data_collator)
            clock = Clock()
            self.add_callback(clock)
            for parameter in self.model.parameters():
                # weights are mapped from their file and read in at first use
                parameter.detach().sum().item()
            with peak_memory(figures), tensor_memory(figures) if job.tensors else nullcontext():
                super().train(*args, **kwargs)
            clock.fill_in(figures)
            figures.samples = getattr(self, "num_samples_seen", figures.samples)
            if job.told:
                self.data_collator.write(Path(job.told))
            raise _StepsTaken

        def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kw: Any) -> Any:
            figures.samples += len(inputs["input_ids"])
            figures.tokens += inputs["input_ids"].numel()
            figures.pixels += num_pixels(inputs)
            loss = super().training_step(model, inputs, *args, **kw)
            figures.losses.append(loss.item())
            return loss

    return Clocked


def num_pixels(inputs: Mapping[str, Any]) -> int:
    """That the vision tower computes: views of nothing but padding are dropped by the model."""
    pixels = inputs.get("pixel_values")
    if isinstance(pixels, PackedViews):
        views = [group for group in pixels.groups if group.ndim == 4]  # else kept features
        return sum(len(group) * group.shape[-1] * group.shape[-2] for group in views)
    if not isinstance(pixels, torch.Tensor):
        return 0
    num_views = inputs["pixel_attention_mask"].flatten(2).any(dim=2).sum().item()
    return int(num_views) * pixels.shape[-1] * pixels.shape[-2]


def start_adapters(model: Any) -> None:
    """The same adapters on both sides: A by the weight's name, B zero."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_A" in name:
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            bound = parameter.shape[1] ** -0.5
            with torch.no_grad():
                parameter.uniform_(-bound, bound, generator=generator)


class TellingCollator:
    """A collator that remembers which rows it was asked for."""

    def __init__(self, collator: Any):
        self.collator = collator
        self.order: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.collator, name)

    def __call__(self, features: Sequence[dict[str, int]]) -> Any:
        self.order += [feature["row"] for feature in features]
        return self.collator(features)

    def write(self, path: Path) -> None:
        """Their order, and ids and loss mask of each."""
        examples = map(self.collator.encoder.encode, self.collator.rows)
        told = [
            {"input_ids": each.input_ids, "loss_mask": list(map(int, each.loss_mask))}
            for each in examples
        ]
        path.write_text(json.dumps({"order": self.order, "examples": told}))


def main() -> None:
    """Run the job of a file."""
    job = Job(**json.loads(Path(sys.argv[1]).read_text()))
    print(json.dumps(asdict(run(job))))


if __name__ == "__main__":
    main()
