"""Examples -> one batch of tensors for the stock forward.

Shape letters: B rows, T tokens, N views of the row that has most, C channels (3), H and W pixels of
the largest view.
"""

import signal
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import get_worker_info

from finetune.data.examples import Encoder, Example
from finetune.data.sources import Row
from finetune.errors import DataError

IGNORED_LABEL = -100  # what torch's cross-entropy and TRL's fused head both leave out


def collate(
    examples: Sequence[Example], processor: Any, *, padding_side: Literal["left", "right"] = "right"
) -> dict[str, torch.Tensor]:
    """Pad rows to one length and views to one size, each with the mask that says what is padding.

    Gives `input_ids`, `attention_mask` and `labels` [B, T], and where there are views
    `pixel_values` [B, N, C, H, W] (rescaled and normalised, float32) and `pixel_attention_mask` [B,
    N, H, W] (bool; a byte a pixel, where the processor's int64 takes eight). Rows without a view,
    or with fewer than others, get views of zeros, which the model drops. Raises `DataError`, naming
    the row, where image tokens and views disagree.
    """
    for example in examples:
        refuse_token_mismatch(example, processor)
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
    if any(example.views for example in examples):
        batch |= _stack_views([example.views for example in examples], processor.image_processor)
    return batch


def refuse_token_mismatch(example: Example, processor: Any) -> None:
    """Raise `DataError` where the ids do not hold exactly one token for every latent of every
    view.
    """
    num_tokens = example.input_ids.count(processor.image_token_id)
    expected = len(example.views) * processor.image_seq_len
    if num_tokens != expected:
        raise DataError(
            f"{example.where}: {num_tokens} image tokens for {len(example.views)} views of "
            f"{processor.image_seq_len} latents each (expected {expected}); the row was not "
            "rendered for its images"
        )


def _stack_views(
    views: Sequence[Sequence[np.ndarray]], image_processor: Any
) -> dict[str, torch.Tensor]:
    flat = [view for row in views for view in row]
    num_views = max(len(row) for row in views)
    height = max(view.shape[1] for view in flat)
    width = max(view.shape[2] for view in flat)
    pixels_BNCHW = torch.zeros((len(views), num_views, 3, height, width))
    mask_BNHW = torch.zeros((len(views), num_views, height, width), dtype=torch.bool)
    mean = torch.tensor(image_processor.image_mean).view(3, 1, 1)
    std = torch.tensor(image_processor.image_std).view(3, 1, 1)
    for i, row in enumerate(views):
        for n, view in enumerate(row):
            _, h, w = view.shape
            scaled = torch.from_numpy(view).float() * image_processor.rescale_factor
            pixels_BNCHW[i, n, :, :h, :w] = (scaled - mean) / std
            mask_BNHW[i, n, :h, :w] = True
    return {"pixel_values": pixels_BNCHW, "pixel_attention_mask": mask_BNHW}


def leave_interrupts_to_the_main_process() -> None:
    """In a loading process: Ctrl-C reaches every process of the terminal, but the main one stops in
    good order, and needs its loaders until then.
    """
    if get_worker_info() is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


class Collator:
    """The trainer's collator: its dataset holds row numbers, and the rows are encoded here, in the
    loading process.
    """

    def __init__(self, encoder: Encoder, rows: Sequence[Row]):
        self.encoder = encoder
        self.rows = rows

    def __call__(self, features: Sequence[dict[str, int]]) -> dict[str, torch.Tensor]:
        """A batch of the rows whose numbers are given as `row`. Raises `DataError`, naming the
        row.
        """
        leave_interrupts_to_the_main_process()
        examples = []
        for feature in features:
            row = self.rows[feature["row"]]
            try:
                examples.append(self.encoder.encode(row))
            except DataError as error:  # checked before training, so a file changed since
                raise DataError(
                    f"{row.where}: {error} (it was checked, and changed since then)"
                ) from error
        return collate(examples, self.encoder.processor)
