"""The sections and fields of a recipe, and which settings exclude each other."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from finetune.recipe.fields import (
    PARTS,
    AutoOrOff,
    Chosen,
    Count,
    Edge,
    Format,
    Fraction,
    HubId,
    LearningRate,
    Listed,
    Metric,
    NonNegative,
    Optimizer,
    Part,
    PositiveNumber,
    Quantize,
    Scheduler,
    Seed,
    SizeOrOff,
    Text,
    Tracker,
    num_bytes,
)
from finetune.recipe.messages import Problem


class Section(BaseModel):
    """Strict and frozen, as all of the recipe is."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )

    @model_validator(mode="before")
    @classmethod
    def _empty_section(cls, value: Any) -> Any:
        return {} if value is None else value


class ModelSection(Section):
    """The weights that training starts from, and how they are held in memory."""

    name: Text
    """Hub id, local folder, or nano (the small model that comes with the package)."""
    revision: Text = "main"
    """Branch, tag or commit on the Hub. A commit keeps a run repeatable."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Number format of the weights. Adapters are always trained in float32."""
    quantize: Quantize = "none"
    """Hold the base weights in 4 bits (nf4) or 8 bits (int8). Refused by this version, but none."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """Attention kernel. auto takes the fastest one that the machine has."""


class ImagesSection(Section):
    """How a picture becomes the views that the model sees, in training and after."""

    split: Literal["always", "never", "auto"] = "always"
    """Show four quarters beside the whole. auto does so only for pictures larger than one view."""
    longest_edge_px: Edge = 980
    """Larger pictures are scaled down until their longer edge has this many pixels."""
    shortest_edge_px: Edge = 378
    """Smaller pictures are scaled up until their shorter edge has this many pixels."""


class AdapterSection(Section):
    """What is trained."""

    method: Literal["lora", "dora", "rslora", "pissa", "full", "frozen"] = "lora"
    """Kind of adapter. This version trains lora, dora and rslora, and refuses the others."""
    rank: Count = 8
    """Width of the adapter matrices. Memory and capacity grow with it."""
    alpha: PositiveNumber = 8
    """Scale of the adapter's output. It is divided by rank, or by its square root with rslora."""
    dropout: Fraction = 0.1
    """Share of the adapter's inputs zeroed at random in training."""
    parts: Annotated[Chosen[Part], Field(min_length=1)] = ("language", "connector")
    """Parts of the model that are trained."""


class DataSource(Section):
    """One file, folder or Hub dataset."""

    path: Text | None = None
    """File or folder, looked up from the current folder and from the recipe's. Excludes hub."""
    hub: HubId | None = None
    """Hub dataset, as user/name. Excludes path."""
    split: Text = "train"
    """Split of the Hub dataset."""
    revision: Text = "main"
    """Branch, tag or commit of the Hub dataset."""
    format: Format = "auto"
    """Shape of the rows. auto tells it from the first ones."""
    image_root: Text | None = None
    """Folder that image paths in the rows start from. Without it, the folder of the file."""
    weight: PositiveNumber = 1.0
    """How often the rows are drawn, relative to other entries. This version takes 1 alone."""

    @model_validator(mode="after")
    def _one_origin(self) -> "DataSource":
        if (self.path is None) == (self.hub is None):
            raise ValueError("set either path or hub" + (", not both" if self.path else ""))
        return self


class DataSection(Section):
    """The rows, and what happens to those that cannot be used as they are."""

    train: Annotated[Listed[DataSource], Field(min_length=1)]
    """Where the rows to train on come from."""
    eval: Listed[DataSource] = ()
    """Where the held-out rows come from, which are never trained on."""
    max_tokens: Count = 2048
    """Longest row, image tokens included."""
    bad_rows: Literal["stop", "skip"] = "stop"
    """What an unreadable row does. skip counts and lists it."""
    overlong: Literal["stop", "skip", "drop_turns", "fewer_views"] = "stop"
    """What a row longer than max_tokens does. This version takes stop and skip."""


class TrainingSection(Section):
    """The steps, and what fits on the card."""

    epochs: PositiveNumber | None = 1
    """Times each row is seen. Excludes max_steps."""
    max_steps: Count | None = None
    """Optimizer steps. Excludes epochs."""
    logging_steps: Count = 10
    """Steps between two lines of metrics.jsonl."""
    save_steps: Count = 200
    """Steps between two checkpoints."""
    keep_checkpoints: Count = 2
    """Newest checkpoints kept; older ones are deleted."""
    batch_size: Count = 2
    """Rows per device in one pass."""
    gradient_accumulation: Count = 8
    """Passes per optimizer step. The batch is batch_size x gradient_accumulation x devices."""
    learning_rate: LearningRate = 1e-4
    """Peak rate, or a mapping with one for each trained part (refused by this version)."""
    optimizer: Optimizer = "adamw_torch"
    """Optimizer, by its transformers name. Names with bnb or paged need bitsandbytes."""
    scheduler: Scheduler = "cosine"
    """Course of the learning rate after the warm-up, by its transformers name."""
    warmup_ratio: Fraction = 0.03
    """Share of the steps over which the learning rate rises from zero."""
    weight_decay: NonNegative = 0.01
    """Pull of the trained weights towards zero."""
    max_grad_norm: NonNegative = 1.0
    """Gradients are scaled down to this norm. 0 leaves them as they are."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass. Less memory, about a third more time."""
    packing: bool = False
    """Several short rows in one sequence, kept apart by the mask. Refused by this version."""
    vision_cache: SizeOrOff = "off"
    """Disk space for features of a frozen vision part, such as 20GiB. Refused by this version."""
    share_images: AutoOrOff = "auto"
    """Train rows about one picture as one sequence, losses as apart. Not yet: both mean off."""
    num_workers: Annotated[int, Field(ge=0)] = 2
    """Processes that prepare the data. 0 prepares it in the main process."""
    seed: Seed = 0
    """Seed of the adapter's start, the order of the rows and dropout."""

    @model_validator(mode="before")
    @classmethod
    def _max_steps_for_epochs(cls, value: Any) -> Any:
        """The default of epochs steps aside where max_steps is given."""
        if isinstance(value, dict) and value.get("max_steps") is not None:
            return {"epochs": None} | value
        return value

    @property
    def vision_cache_bytes(self) -> int | None:
        """The size in bytes; None where the cache is off."""
        return None if self.vision_cache == "off" else num_bytes(self.vision_cache)


class EvaluationSection(Section):
    """How the held-out rows are judged."""

    every_steps: Count = 200
    """Steps between two evaluations."""
    metrics: Annotated[Chosen[Metric], Field(min_length=1)] = ("anls", "exact_match")
    """Figures to compute."""
    max_new_tokens: Count = 64
    """Longest answer that is generated."""
    batch_size: Count = 8
    """Rows per device answered at once."""
    max_rows: Count | None = None
    """Held-out rows judged, the first ones. Without it, all."""


class OutputSection(Section):
    """Where the results go."""

    dir: Text = "runs/my-run"
    """Run directory, from the current folder."""
    trackers: Chosen[Tracker] = ()
    """Experiment trackers that receive the metrics."""


class Recipe(Section):
    """One fine-tuning run of a vision-language model."""

    model: ModelSection
    """The weights that training starts from, and how they are held in memory."""
    images: ImagesSection = Field(default_factory=ImagesSection)
    """How a picture becomes the views that the model sees, in training and after."""
    adapter: AdapterSection = Field(default_factory=AdapterSection)
    """What is trained."""
    data: DataSection
    """The rows, and what happens to those that cannot be used as they are."""
    training: TrainingSection = Field(default_factory=TrainingSection)
    """The steps, and what fits on the card."""
    evaluation: EvaluationSection = Field(default_factory=EvaluationSection)
    """How the held-out rows are judged."""
    output: OutputSection = Field(default_factory=OutputSection)
    """Where the results go."""

    @model_validator(mode="after")
    def _holds_together(self) -> "Recipe":
        if problems := list(_conflicts(self)):
            lines = "; ".join(map(str, problems))
            raise PydanticCustomError("conflict", "{lines}", {"lines": lines, "problems": problems})
        return self


def _conflicts(recipe: Recipe) -> Iterator[Problem]:
    """Settings that are right one by one but not together."""
    yield from _image_conflicts(recipe)
    yield from _adapter_conflicts(recipe)
    yield from _training_conflicts(recipe)


def _conflict(text: str, *reads: str) -> Problem:
    """A problem shown at the first of the keys it read."""
    return Problem(tuple(reads[0].split(".")), text, reads)


def _image_conflicts(recipe: Recipe) -> Iterator[Problem]:
    images, model = recipe.images, recipe.model
    if images.shortest_edge_px > images.longest_edge_px:
        yield _conflict(
            f"{images.shortest_edge_px} is more than "
            f"images.longest_edge_px: {images.longest_edge_px}",
            "images.shortest_edge_px",
            "images.longest_edge_px",
        )
    if model.attention == "flash_attention_2" and model.dtype == "float32":
        yield _conflict(
            "flash_attention_2 cannot work in float32; set model.dtype: bfloat16, "
            "or model.attention: sdpa",
            "model.attention",
            "model.dtype",
        )


def _adapter_conflicts(recipe: Recipe) -> Iterator[Problem]:
    adapter, quantize = recipe.adapter, recipe.model.quantize
    if quantize != "none" and adapter.method == "full":
        yield _conflict(
            f"full trains the weights themselves, which model.quantize: {quantize} freezes; "
            "set adapter.method: lora, or model.quantize: none",
            "adapter.method",
            "model.quantize",
        )
    if quantize != "none" and adapter.method == "pissa":
        yield _conflict(
            f"pissa splits the exact weights, which model.quantize: {quantize} rounds; "
            "set adapter.method: lora, or model.quantize: none",
            "adapter.method",
            "model.quantize",
        )
    if (
        "vision" in adapter.parts
        and adapter.method != "frozen"
        and recipe.training.vision_cache != "off"
    ):
        yield _conflict(
            "features of a vision part that is trained change at every step; "
            "set it to off, or leave vision out of adapter.parts",
            "training.vision_cache",
            "adapter.parts",
            "adapter.method",
        )


def _training_conflicts(recipe: Recipe) -> Iterator[Problem]:
    training, parts = recipe.training, recipe.adapter.parts
    if training.epochs is not None and training.max_steps is not None:
        yield _conflict(
            "set either max_steps or epochs, not both", "training.max_steps", "training.epochs"
        )
    if training.epochs is None and training.max_steps is None:
        yield _conflict("set epochs or max_steps", "training.epochs", "training.max_steps")
    if not isinstance(training.learning_rate, dict) or recipe.adapter.method == "frozen":
        return
    for part in PARTS:
        if part in training.learning_rate and part not in parts:
            text = (
                f"has a rate for {part}, which is not trained; "
                f"leave it out, or add {part} to adapter.parts"
            )
        elif part in parts and part not in training.learning_rate:
            text = (
                f"has no rate for {part}, which is trained; add one, or give one rate for all parts"
            )
        else:
            continue
        yield _conflict(text, "training.learning_rate", "adapter.parts")
