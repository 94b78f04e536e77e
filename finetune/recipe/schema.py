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

    split: Literal["always", "never", "auto"] | None = None
    """Show parts beside the whole; auto: only of pictures larger than one view. Without it, the
    model's own."""
    longest_edge_px: Edge | None = None
    """Larger pictures are scaled down until their longer edge has this many pixels. Without it, the
    model's own."""
    shortest_edge_px: Edge | None = None
    """Smaller pictures are scaled up until their shorter edge has this many pixels. Without it, the
    model's own."""


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


class Columns(Section):
    """Which columns of a table hold what, for `format: columns`."""

    image: Text | None = None
    """Column with the picture: a path, bytes, base64 or a data URI."""
    images: Text | None = None
    """Column with a list of pictures. Excludes image."""
    question: Text | None = None
    """Column with the question. Without it, the entry's own question is asked of every row."""
    answer: Text
    """Column with the answer, or with a list: the first is learnt, all of them count as right."""
    system: Text | None = None
    """Column with a system turn."""

    @model_validator(mode="after")
    def _one_picture_column(self) -> "Columns":
        if self.image and self.images:
            raise ValueError("set either image or images, not both")
        return self


class DataSource(Section):
    """One file, folder or Hub dataset."""

    path: Text | None = None
    """File, folder or pattern, from the current folder or the recipe's. Excludes hub."""
    hub: HubId | None = None
    """Hub dataset, as user/name. Excludes path."""
    config: Text | None = None
    """Configuration of the Hub dataset, where it has several."""
    split: Text = "train"
    """Split of the Hub dataset."""
    revision: Text = "main"
    """Branch, tag or commit of the Hub dataset."""
    format: Format = "auto"
    """Shape of the rows. auto tells it from the first ones."""
    columns: Columns | None = None
    """Columns of a table with one picture, question and answer a row."""
    question: Text | None = None
    """What is asked where rows hold no question: cord, coco-captions, columns."""
    image_root: Text | None = None
    """Folder that image paths in the rows start from. Without it, the folder of the file."""
    weight: PositiveNumber = 1.0
    """Times that each row is trained in an epoch, or, while streaming, share in the mix."""
    streaming: bool = False
    """Read the rows while training, not before. They are checked as they come."""

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
    eval_fraction: Fraction = 0
    """Share of the training rows held out instead of eval. Rows about one picture stay together."""
    eval_seed: Seed = 0
    """Seed of the choice that eval_fraction makes."""
    max_tokens: Count = 2048
    """Longest row, image tokens included."""
    bad_rows: Literal["stop", "skip"] = "stop"
    """What an unreadable row does. skip counts and lists it."""
    overlong: Literal["stop", "skip", "drop_turns", "fewer_views"] = "stop"
    """What a row over max_tokens does. drop_turns and fewer_views shorten it, and list how."""
    max_megapixels: PositiveNumber = 100
    """Larger pictures are bad rows. A small file may unpack to more than the memory holds."""
    pdf_dpi: Annotated[int, Field(ge=18, le=1200)] = 144
    """Dots per inch at which pages of PDF files are drawn."""
    allow_outside_root: bool = False
    """Take pictures that stand outside image_root, or that links lead there."""
    allow_urls: bool = False
    """Download pictures that rows name by URL. Addresses inside your network stay refused."""
    url_max_mib: PositiveNumber = 20
    """Larger downloads are broken off."""
    url_timeout_seconds: PositiveNumber = 10
    """Longest time for one download."""


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
    yield from _data_conflicts(recipe)
    yield from _adapter_conflicts(recipe)
    yield from _training_conflicts(recipe)


def _conflict(text: str, *reads: str) -> Problem:
    """A problem shown at the first of the keys it read."""
    return Problem(tuple(reads[0].split(".")), text, reads)


def _image_conflicts(recipe: Recipe) -> Iterator[Problem]:
    images, model = recipe.images, recipe.model
    if (
        images.shortest_edge_px
        and images.longest_edge_px
        and images.shortest_edge_px > images.longest_edge_px
    ):
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


def _data_conflicts(recipe: Recipe) -> Iterator[Problem]:
    data = recipe.data
    if data.eval and data.eval_fraction:
        yield _conflict("set either eval or eval_fraction, not both", "data.eval_fraction")
    for part, sources in (("train", data.train), ("eval", data.eval)):
        for number, source in enumerate(sources):
            place = f"data.{part}.{number}"
            if source.columns and source.format not in ("auto", "columns"):
                yield _conflict(
                    f"is for format: columns, and format is {source.format}; leave one out",
                    f"{place}.columns",
                )
            if source.format == "columns" and not source.columns:
                yield _conflict(
                    "needs columns, such as columns: {image: scan, question: q, answer: a}",
                    f"{place}.format",
                )
            if source.columns and not source.columns.question and not source.question:
                yield _conflict(
                    "names no question column; name one, or set question: to ask every row the "
                    "same",
                    f"{place}.columns",
                )
    streamed = [source for source in data.train if source.streaming]
    if not streamed:
        yield from _streamed_eval(recipe)
        return
    if len(streamed) < len(data.train):
        yield _conflict("stream all entries or none: they cannot be mixed", "data.train")
    if data.eval_fraction:
        yield _conflict(
            "needs all rows before training, and streamed ones come later; name data.eval, or "
            "leave streaming out",
            "data.eval_fraction",
        )
    if recipe.training.max_steps is None:
        yield _conflict(
            "streamed rows are not counted beforehand, so an epoch has no known length; set "
            "training.max_steps",
            "training.epochs",
        )
    yield from _streamed_eval(recipe)


def _streamed_eval(recipe: Recipe) -> Iterator[Problem]:
    for number, source in enumerate(recipe.data.eval):
        if source.streaming:
            yield _conflict(
                "held-out rows are read whole; leave streaming out",
                f"data.eval.{number}.streaming",
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
