"""Rows as the trainer knows them, by their numbers, shared out over processes without one twice."""

import numpy as np
from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset
from torch.utils.data import DataLoader
from trl.trainer.sft_config import SFTConfig

from finetune.data.sampling import EpochBatches


def trained_rows(count: int) -> Dataset:
    """Row numbers, and after them the idle one, see `EpochBatches.idle_row`."""
    numbers = np.arange(count + 1)
    return Dataset.from_dict({"row": numbers % count, "again": numbers == count})


def held_out_rows(numbers: range, args: SFTConfig) -> Dataset:
    """Row numbers, filled up with the last one `again` until every process has as many batches:
    accelerate would fill up with the first ones, and the loss count them twice.
    """
    all_at_once = args.per_device_eval_batch_size * args.world_size
    num_again = -len(numbers) % all_at_once if args.world_size > 1 else 0
    return Dataset.from_dict(
        {
            "row": [*numbers, *[numbers[-1]] * num_again],
            "again": [False] * len(numbers) + [True] * num_again,
        }
    )


def tell_epoch_to_resumed(loader: DataLoader, batches: EpochBatches) -> None:
    """Let a loader that was shared out over processes know its epoch also once its first batches
    are skipped: accelerate wraps it once more then, and looks for the one that is to be told under
    the name `sampler` alone (data_loader.py, DataLoaderShard.set_epoch).
    """
    if isinstance(loader.batch_sampler, BatchSamplerShard):
        loader.batch_sampler.sampler = batches.sampler
