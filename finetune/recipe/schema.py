"""The sections and fields of a recipe."""

from typing import Annotated, Any, Literal

from annotated_types import Gt
from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from finetune.recipe.conflicts import conflicts
from finetune.recipe.fields import (
    Alpha,
    AutoOrOff,
    BestMetric,
    Chosen,
    Count,
    Edge,
    Engine,
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
    Rank,
    Scheduler,
    Seed,
    SizeOrOff,
    Text,
    Tracker,
    Upscale,
    num_bytes,
)


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
    """Hold the language weights in 4 bits (nf4) or 8 bits (int8); the rest stays as dtype says."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """Attention kernel. auto takes the fastest one that the machine has."""
    packed_vision: bool = True
    """Compute views at their own size, each once. false pads them to the largest, as the library
    does."""


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
    """Kind of adapter. full trains the weights themselves, frozen trains nothing: a baseline."""
    rank: Rank = 8
    """Width of the adapter matrices, or a mapping by part. Memory and capacity grow with it."""
    alpha: Alpha = 8.0
    """Scale of the adapter's output, or a mapping by part. Divided by rank (rslora: its root)."""
    dropout: Fraction = 0.1
    """Share of the adapter's inputs zeroed at random in training."""
    parts: Annotated[Chosen[Part], Field(min_length=1)] = ("language", "connector")
    """Parts of the model that are trained."""
    modules_to_save: Chosen[Text] = ()
    """Modules trained whole beside the adapters and saved with them, such as lm_head."""
    extra_tokens: Chosen[Text] = ()
    """Words added to the vocabulary as tokens of their own, trained and saved with the adapter."""


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
    random_upscale: Upscale = 1.0
    """Pictures of training rows are enlarged at random, by up to this factor. 1 leaves them."""
    shuffle_turns: bool = False
    """Show the exchanges of training rows in another order each time."""
    max_megapixels: PositiveNumber = 100
    """Larger pictures are bad rows. A small file may unpack to more than the memory holds."""
    reduced_decode: bool = False
    """Decode large JPEG files at a part of their size that still holds every view. Less time, and
    pixels a little different."""
    fast_resize: bool = False
    """Resize with torch in place of Pillow: less time, some pixels differ by one or two of 255."""
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
    read_timeout_seconds: PositiveNumber | None = None
    """Longest time for reading one picture's file, for drives that stall. Without it, any."""
    read_retries: Annotated[int, Field(ge=0)] = 3
    """Times that a picture's file is read again where the drive fails or stalls. It waits 1, 2, 4
    ... seconds before. Files of rows (JSON Lines, Parquet, tar) are read once.
    """


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
    batch_size: Count | None = 2
    """Rows per device in one pass. Excludes batch_tokens and batch_patches."""
    batch_tokens: Count | None = None
    """Tokens per device in one pass, padding included: as many rows as they allow."""
    batch_patches: Count | None = None
    """Vision patches per device in one pass: as many rows as they allow. A picture counts once."""
    group_by_cost: bool = False
    """Batches of rows of like length, and steps of like work, within a shuffled window. Not where
    length tells the answer."""
    gradient_accumulation: Count = 8
    """Passes per optimizer step. The batch is batch_size x gradient_accumulation x devices."""
    learning_rate: LearningRate = 1e-4
    """Peak rate, or a mapping with one for each trained part."""
    lora_plus_ratio: PositiveNumber = 1
    """The rate of every matrix B is this times that of A (LoRA+). 1 is plain LoRA."""
    neftune_alpha: NonNegative = 0
    """Noise on the embeddings of the text in training (NEFTune). 0 adds none; the paper has 5."""
    optimizer: Optimizer = "adamw_torch"
    """Optimizer, by its transformers name. Many need a package, which is named if missing."""
    scheduler: Scheduler = "cosine"
    """Course of the learning rate after the warm-up, by its transformers name."""
    warmup_ratio: Fraction = 0.03
    """Share of the steps over which the learning rate rises from zero."""
    weight_decay: NonNegative = 0.01
    """Pull of the trained weights towards zero."""
    max_grad_norm: NonNegative = 1.0
    """Gradients are scaled down to this norm. 0 leaves them as they are."""
    bad_loss: Literal["stop", "skip"] = "stop"
    """What a step does whose loss is no number, or a spike. skip leaves it out, counts and lists
    it; ten in a row stop the run all the same."""
    spike_factor: Annotated[PositiveNumber, Gt(1)] | None = None
    """A loss over this many times the median of the last 50 steps is a spike. Without it, none
    is."""
    on_oom: Literal["stop", "split"] = "stop"
    """What a batch does that does not fit into the GPU's memory. split computes its halves one
    after the other, and counts it."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass. Less memory, about a third more time."""
    compile: bool = False
    """Compile the layers of the language model with torch. The first step takes minutes more,
    the others less."""
    distributed: Engine | None = None
    """What several processes train with: ddp, fsdp, zero2 or zero3. Without it, ddp, or what the
    launcher says."""
    loss_kernel: Literal["auto", "torch", "liger"] = "auto"
    """What computes head and loss. auto takes liger on a GPU, where it is installed. With liger
    metrics.jsonl has no entropy and no mean_token_accuracy."""
    packing: bool = False
    """Rows of a batch side by side in one sequence, kept apart by the mask, without padding."""
    vision_cache: SizeOrOff = "off"
    """Disk space for features of a frozen vision part, such as 20GiB: computed once, then read."""
    share_images: AutoOrOff = "auto"
    """auto gathers rows about one picture and trains them as one sequence; losses are as apart."""
    num_workers: Annotated[int, Field(ge=0)] = 2
    """Processes that prepare the data. 0 prepares it in the main process."""
    seed: Seed = 0
    """Seed of the adapter's start, the order of the rows and dropout."""

    @model_validator(mode="before")
    @classmethod
    def _defaults_step_aside(cls, value: Any) -> Any:
        """That of epochs where max_steps is given, that of batch_size where a budget is."""
        if not isinstance(value, dict):
            return value
        if value.get("max_steps") is not None:
            value = {"epochs": None} | value
        if any(value.get(budget) is not None for budget in ("batch_tokens", "batch_patches")):
            value = {"batch_size": None} | value
        return value

    @property
    def vision_cache_bytes(self) -> int | None:
        """The size in bytes; None where the cache is off."""
        return None if self.vision_cache == "off" else num_bytes(self.vision_cache)


class EvaluationSection(Section):
    """How the held-out rows are judged."""

    every_steps: Count = 200
    """Steps between two evaluations in training: loss, and answers to some held-out rows."""
    rows_in_training: Annotated[int, Field(ge=0)] = 100
    """Held-out rows answered in training, the first ones. 0 leaves the loss alone."""
    metrics: Annotated[Chosen[Metric], Field(min_length=1)] = ("anls", "exact_match")
    """Figures to compute."""
    max_new_tokens: Count = 64
    """Longest answer that is generated."""
    prompt_suffix: Text | None = None
    """A line added to every question that is judged, such as: Give a very brief answer."""
    batch_size: Count = 8
    """Rows per device answered at once."""
    batch_tokens: Count | None = None
    """Tokens per device answered at once, padding and answer included: fewer rows where long."""
    max_rows: Count | None = None
    """Held-out rows judged, the first ones. Without it, all."""
    best_metric: BestMetric = "loss"
    """What tells which evaluation in training was the best."""
    load_best: bool = False
    """End with the weights of the best evaluation, not with the last ones."""
    patience: Count | None = None
    """Stop after so many evaluations without a better one. Without it, never."""


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
        if problems := list(conflicts(self)):
            lines = "; ".join(map(str, problems))
            raise PydanticCustomError("conflict", "{lines}", {"lines": lines, "problems": problems})
        return self
