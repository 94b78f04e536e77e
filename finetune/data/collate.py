"""Examples -> one batch of tensors for the stock forward.

Shape letters: B rows, S sequences (rows, or several laid out as one), T tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from finetune.data.augment import Augmentation, Draws
from finetune.data.examples import Encoder, Example
from finetune.data.patience import DriveError
from finetune.data.sampling import EpochSampler
from finetune.data.sequences import Layout, Layouting, PackedRows, lay_out
from finetune.data.sources import Row
from finetune.errors import DataError
from finetune.families.family import Family

IGNORED_LABEL = -100  # what torch's cross-entropy and TRL's fused head both leave out


@dataclass(frozen=True, slots=True)
class BatchRow:
    """A row of a batch, as a message names it. `feature` is what the collator made it of, and None
    where the row was streamed.
    """

    where: str
    num_tokens: int
    num_views: int
    feature: Mapping[str, int] | None = None

    @classmethod
    def of_example(cls, example: Example, feature: Mapping[str, int] | None = None) -> "BatchRow":
        """Without the pixels."""
        return cls(example.where, len(example.input_ids), len(example.views), feature)


def collate(
    examples: Sequence[Example],
    processor: Any,
    family: Family,
    *,
    padding_side: Literal["left", "right"] = "right",
    packed_vision: bool = False,
    layouting: Layouting | None = None,
) -> dict[str, Any]:
    """Pad rows to one length: `input_ids`, `attention_mask` and `labels` [B, T], and what the
    family's model takes for their images: the library's tensors, or with `packed_vision` the views
    as they are.

    With `layouting`, rows that become one sequence make a batch of sequences (`collate_sequences`).
    Raises `DataError`, naming the row, where image tokens and views disagree.
    """
    for example in examples:
        refuse_token_mismatch(example, processor, family)
    if layouting and padding_side == "right":
        sequences = lay_out(examples, processor, family, layouting)
        if any(sequence.num_rows > 1 for sequence in sequences):
            return collate_sequences(sequences, processor, family, packed_vision=packed_vision)
    length = max(len(example.input_ids) for example in examples)
    input_ids_BT = torch.full((len(examples), length), processor.tokenizer.pad_token_id)
    attention_mask_BT = torch.zeros((len(examples), length), dtype=torch.long)
    labels_BT = torch.full((len(examples), length), IGNORED_LABEL)
    for i, example in enumerate(examples):
        num_tokens = len(example.input_ids)
        start = length - num_tokens if padding_side == "left" else 0
        span = slice(start, start + num_tokens)
        ids = torch.tensor(example.input_ids)
        input_ids_BT[i, span] = ids
        attention_mask_BT[i, span] = 1
        learnt = torch.tensor(example.loss_mask)
        labels_BT[i, span] = torch.where(learnt, ids, IGNORED_LABEL)
    batch = {"input_ids": input_ids_BT, "attention_mask": attention_mask_BT, "labels": labels_BT}
    prepare = family.pack if packed_vision else family.stack
    return batch | prepare(examples, processor, input_ids_BT)


def collate_sequences(
    sequences: Sequence[PackedRows], processor: Any, family: Family, *, packed_vision: bool = False
) -> dict[str, Any]:
    """As `collate`, of [S, T] tokens, with `position_ids` as each row alone has them, and `layout`,
    which says which tokens see which (`finetune.model.attention`).

    Where a learnt token stands for another number of rows than one, `label_weights` [S, T] holds
    these numbers (float32).
    """
    length = max(len(each.input_ids) for each in sequences)
    shape = (len(sequences), length)
    input_ids_ST = torch.full(shape, processor.tokenizer.pad_token_id)
    attention_mask_ST = torch.zeros(shape, dtype=torch.long)
    position_ids_ST = torch.zeros(shape, dtype=torch.long)
    weights_ST = torch.zeros(shape)
    for s, each in enumerate(sequences):
        span = slice(len(each.input_ids))
        input_ids_ST[s, span] = torch.tensor(each.input_ids)
        attention_mask_ST[s, span] = 1
        position_ids_ST[s, span] = torch.tensor(each.positions)
        weights_ST[s, span] = torch.tensor(each.weights, dtype=torch.float32)
    batch: dict[str, Any] = {
        "input_ids": input_ids_ST,
        "attention_mask": attention_mask_ST,
        "labels": torch.where(weights_ST > 0, input_ids_ST, IGNORED_LABEL),
        "position_ids": position_ids_ST,
        "layout": Layout.of_sequences(sequences, length),
    }
    if weights_ST.max() > 1:
        batch["label_weights"] = weights_ST
    prepare = family.pack if packed_vision else family.stack
    return batch | prepare(sequences, processor, input_ids_ST)


def refuse_token_mismatch(example: Example, processor: Any, family: Family) -> None:
    """Raise `DataError` where the ids do not hold exactly the image tokens that the views need."""
    num_tokens = example.input_ids.count(processor.image_token_id)
    expected = sum(family.num_image_tokens(processor, plan) for plan in example.plans)
    num_views = sum(len(plan.views) for plan in example.plans)
    if num_tokens != expected or num_views != len(example.views):
        raise DataError(
            f"{example.where}: {num_tokens} image tokens for {len(example.views)} views "
            f"(expected {expected} for {num_views}); the row was not rendered for its images"
        )


class Collator:
    """The trainer's collator: its dataset holds row numbers, and the rows are encoded here, in the
    loading process.

    With `names_rows` a batch holds its `BatchRow`s as `rows`, which no model takes.
    The first `num_train_rows` (None: all) are shown as `augmentation` says, if there is one, and
    laid out as the encoder says; the others, held out, as they are and apart. The epoch is the
    sampler's, which a loading process finds as it was when it started: each epoch starts new ones.
    """

    def __init__(
        self,
        encoder: Encoder,
        rows: Sequence[Row],
        *,
        augmentation: Augmentation | None = None,
        sampler: EpochSampler | None = None,
        num_train_rows: int | None = None,
        names_rows: bool = False,
    ):
        self.encoder = encoder
        self.rows = rows
        self.augmentation = augmentation
        self.sampler = sampler
        self.num_train_rows = len(rows) if num_train_rows is None else num_train_rows
        self.names_rows = names_rows

    def __call__(self, features: Sequence[dict[str, int]]) -> dict[str, Any]:
        """A batch of the rows whose numbers are given as `row`; nothing is learnt from one that is
        there `again`. Raises `DataError`, or `DriveError`, naming the row.
        """
        encoder, examples = self.encoder, []
        pictures = encoder.new_pictures()
        for feature in features:
            row = self.rows[feature["row"]]
            try:
                examples.append(encoder.encode(row, self._draws(feature["row"]), pictures))
            except DriveError as error:
                raise DriveError(f"{row.where}: {error}") from error
            except DataError as error:  # checked before training, so a file changed since
                raise DataError(
                    f"{row.where}: {error} (it was checked, and changed since then)"
                ) from error
        is_trained = all(feature["row"] < self.num_train_rows for feature in features)
        batch = collate(
            examples,
            encoder.processor,
            encoder.family,
            packed_vision=encoder.packed_vision,
            layouting=encoder.layouting if is_trained else None,
        )
        for number, feature in enumerate(features):
            if feature.get("again"):
                batch["labels"][number] = IGNORED_LABEL
        if self.names_rows:
            batch["rows"] = tuple(map(BatchRow.of_example, examples, features))
        return batch

    def _draws(self, row: int) -> Draws | None:
        if not self.augmentation or row >= self.num_train_rows:
            return None
        assert self.sampler, "an augmentation needs the epoch"
        return self.augmentation.draws(self.sampler.epoch, row)
