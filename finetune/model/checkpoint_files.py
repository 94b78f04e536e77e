"""The files of a checkpoint, tensor by tensor: what they hold and what the model calls it, without
loading the model.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import safe_open
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from finetune.errors import ModelError
from finetune.model.load import model_location, shards_of
from finetune.recipe import ModelSection

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a file: `key` is its name there, `name` the model's own."""

    key: str
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """As it is stored."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def checkpoint_folder(model: ModelSection) -> Path:
    """The checkpoint on this disk, fetched from the Hub if need be. Raises `ModelError`."""
    location = Path(model_location(model.name))
    if location.is_dir():
        return location
    try:
        return Path(
            snapshot_download(
                model.name,
                revision=model.revision,
                allow_patterns=["*.json", "*.safetensors"],
                ignore_patterns=["*/*"],
            )
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(f"{model.name}: cannot be fetched from the Hub: {error}") from error


def weight_files(folder: Path) -> list[str]:
    """The names of a checkpoint's weight files, in the order of its index. Raises `ModelError`."""
    index = folder / INDEX
    names = shards_of(index, str(folder)) if index.is_file() else [WEIGHTS]
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise ModelError(f"{folder}: {missing[0]} is missing; download the whole model")
    return names


def stored_tensors(folder: Path, model: Any) -> dict[str, list[StoredTensor]]:
    """What each weight file holds, under the names of `model`, which may be on the meta device.

    Raises `ModelError` where the library would compute a weight of several stored ones, rather than
    call it another name.
    """
    name_of = _Names(model)
    files: dict[str, list[StoredTensor]] = {}
    for file in weight_files(folder):
        with safe_open(folder / file, framework="pt") as opened:
            held = []
            for key in opened.keys():  # noqa: SIM118  # it is no mapping
                piece = opened.get_slice(key)
                dtype = _DTYPES.get(piece.get_dtype())
                if dtype is None:
                    raise ModelError(
                        f"{folder / file}: {key} is stored as {piece.get_dtype()}, which cannot be "
                        "merged into; use the 16-bit checkpoint"
                    )
                held.append(StoredTensor(key, name_of(key), tuple(piece.get_shape()), dtype))
            files[file] = held
    return files


def copy_tensors(
    source: Path,
    out: Path,
    written: Mapping[str, tuple[torch.dtype, torch.Size]],
    change: Callable[[str, torch.Tensor], torch.Tensor],
) -> None:
    """Write a file of the tensors that `change` makes of those of another file, one after the
    other: one at a time is in memory, where the library's own writing holds all, twice.

    `written` says dtype and shape of each beforehand, since they stand at the head of the file.
    Source of the format: huggingface/safetensors, README.md.
    """
    # the wide ones first, as the library has them: readers map them where they stand
    keys = sorted(written, key=lambda key: (-written[key][0].itemsize, key))
    names = {dtype: name for name, dtype in _DTYPES.items()}
    head: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key in keys:
        dtype, shape = written[key]
        start, end = end, end + shape.numel() * dtype.itemsize
        head[key] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with safe_open(source, framework="pt") as opened, out.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key in keys:
            dtype, shape = written[key]
            tensor = change(key, opened.get_tensor(key)).to(dtype)
            assert tensor.shape == shape, f"{key}: {tensor.shape} is not {shape}"
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


class _Names:
    """What the library calls a stored tensor once it is loaded."""

    def __init__(self, model: Any):
        transforms = get_model_conversion_mapping(model)
        self._renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
        self._converters = [each for each in transforms if isinstance(each, WeightConverter)]
        self._prefix = model.base_model_prefix
        self._known = dict(model.state_dict())

    def __call__(self, key: str) -> str:
        name, computed = rename_source_key(
            key, self._renamings, self._converters, self._prefix, self._known
        )
        if computed is not None:
            raise ModelError(
                f"{key}: is not a weight of the model but a part of one; save the model anew with "
                "this version of transformers, and merge into that"
            )
        return name
