"""`finetune merge`: an adapter put into its base's weights, and proof that both are the same."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig

from finetune.data.examples import Encoder
from finetune.environment import environment
from finetune.errors import ModelError, RecipeError, RunDirError
from finetune.model.adapters import IMAGE_SETTINGS, refuse_unfinished
from finetune.model.checkpoint_files import stored_tensors
from finetune.model.generate import stopping
from finetune.model.load import best_device, load_model, load_processor, quiet_libraries
from finetune.model.merging import AdapterPart, MergePlan, Merger, load_adapters
from finetune.model.quantize import keep_weights_as_loaded
from finetune.model.vocabulary import add_extra_tokens, extend_vocabulary
from finetune.preparation import cache_of
from finetune.recipe import ModelSection, Recipe, load_recipe
from finetune.rundir import open_run_dir, replacing, write_json
from finetune.sides import free_memory
from finetune.tables import merge_table, messages_console
from finetune.verifying import Asked, Likeness, Said, ask, rows_to_ask

PROOF = "merge.json"
"""How a folder was merged and what came out when it was verified."""

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Merged:
    """What was done, or would be."""

    plan: MergePlan
    needed_bytes: int
    asked: Asked | None = None
    likeness: Likeness | None = None
    quantised: Likeness | None = None
    """Of the quantised folder to the merged weights in 16 bits."""


def merge(
    path: str | Path,
    out: str | Path,
    *,
    added: Sequence[tuple[str, float]] = (),
    weight: float = 1.0,
    dtype: str | None = None,
    quantize: str = "none",
    num_rows: int = 8,
    dry_run: bool = False,
    console: Console | None = None,
) -> Merged:
    """Merge a run's adapter, and those of `added` runs by their weights, into a folder that plain
    transformers loads, and verify it. The folder is there whole, or not at all.

    `dtype` is the recipe's where it is None; `quantize` is nf4 or int8. Raises `FinetuneError`.
    """
    console = console or messages_console()
    quiet_libraries()
    parts = [_part(path, weight), *(_part(other, share) for other, share in added)]
    if dtype is not None and dtype not in DTYPES:
        raise RecipeError(f"--dtype: {dtype!r} is none of {', '.join(DTYPES)}")
    if quantize not in ("none", "nf4", "int8"):
        raise RecipeError(f"--quantize: {quantize!r} is none of nf4, int8")
    if quantize != "none" and not dry_run and find_spec("bitsandbytes") is None:
        raise RecipeError(
            f"--quantize {quantize}: needs the package bitsandbytes, which is not installed; "
            "pip install bitsandbytes"
        )
    parts = [replace(part, recipe=_on_plain_base(part.recipe, dtype)) for part in parts]
    recipe, folder = parts[0].recipe, Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunDirError(f"{folder}: is there already; give --out a new folder")
    processor, images = load_processor(recipe.model, recipe.images)
    add_extra_tokens(processor, recipe)
    merger = Merger(parts, processor)
    plan = merger.plan(getattr(torch, recipe.model.dtype))
    # the quantised copy is the smaller one, and stands beside the other while it is written
    needed = plan.num_bytes * (1 if quantize == "none" else 2) + 2**26
    if dry_run:
        return Merged(plan, needed)
    _refuse_full_disk(folder, needed)
    encoder = Encoder.of_recipe(processor, merger.family, images, recipe.data)
    asked = rows_to_ask(recipe, cache_of(path), console, num_rows)
    with _whole(folder) as temporary:
        merger.write(plan, temporary, lambda file: console.print(f"merging {file}"))
        _write_rest(merger, processor, recipe, parts[0].folder, temporary)
        del merger
        console.print(f"asking base and adapter ({asked.origin})")
        limit = recipe.evaluation.max_new_tokens
        expected = ask(_base_and_adapters(parts, processor), encoder, asked, max_new_tokens=limit)
        free_memory()
        console.print("asking the merged folder")
        model = _reloaded(temporary, plan, recipe, encoder)
        _warn_of_lost_template(temporary, processor, console)
        said = ask(model, encoder, asked, max_new_tokens=limit)
        likeness = Likeness.of(expected, said)
        likeness.refuse_unlike(plan.dtype)
        del model
        free_memory()
        proof: dict[str, Any] = {
            "base": recipe.model.name,
            "revision": recipe.model.revision,
            "weights": [part.weight for part in parts],
            "dtype": recipe.model.dtype,
            "verified_on": asked.origin,
            "likeness": asdict(likeness),
            "environment": environment(),
        }
        quantised = None
        if quantize != "none":
            console.print(f"quantising to {quantize}")
            quantised = _quantise(temporary, quantize, recipe, encoder, asked, said)
            proof |= {"quantize": quantize, "quantised_likeness": asdict(quantised)}
        write_json(temporary / PROOF, proof)
    return Merged(plan, needed, asked, likeness, quantised)


def print_merged(merged: Merged, out: Path, console: Console) -> None:
    """What was done, and how far it is from what was trained."""
    title = f"{out}: {'merged' if merged.likeness else 'planned, nothing was written'}"
    console.print(merge_table(title, merged.plan, merged.needed_bytes))
    if merged.likeness and merged.asked:
        console.print(
            f"verified on {merged.asked.origin}, base and adapter against the folder:\n"
            f"  {merged.likeness.in_words()}",
            soft_wrap=True,
        )
    if merged.quantised:
        console.print(
            f"quantised, against the merged weights before:\n  {merged.quantised.in_words()}",
            soft_wrap=True,
        )


def _part(path: str | Path, weight: float) -> AdapterPart:
    run = open_run_dir(path)
    recipe = load_recipe(run.recipe, check_paths=False)
    method = recipe.adapter.method
    if method == "full":
        raise RunDirError(
            f"{path}: has nothing to merge: adapter.method full trains the weights themselves, and "
            f"{run.adapter} is a whole checkpoint"
        )
    if method == "frozen":
        raise RunDirError(f"{path}: has nothing to merge: adapter.method frozen trains nothing")
    refuse_unfinished(run.adapter, "adapter_config.json", recipe)
    return AdapterPart(recipe, run.adapter, weight)


def _on_plain_base(recipe: Recipe, dtype: str | None) -> Recipe:
    """The recipe on a base that is not quantised, with the library's own vision."""
    changes: dict[str, Any] = {"quantize": "none", "packed_vision": False}
    changes["dtype"] = dtype or recipe.model.dtype
    return recipe.model_copy(update={"model": recipe.model.model_copy(update=changes)})


def _refuse_full_disk(folder: Path, needed_bytes: int) -> None:
    parent = folder.resolve().parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < needed_bytes:
        raise RunDirError(
            f"{folder}: {free / 2**30:,.1f} GiB free, but the merged weights need "
            f"{needed_bytes / 2**30:,.1f} GiB; make room, or give --out on another disk"
        )


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """A folder that stands under its name once the block ends without an error."""
    try:
        with replacing(folder) as temporary:
            temporary.mkdir()
            yield temporary
    except OSError as error:
        if isinstance(error, RunDirError):
            raise
        raise RunDirError(
            f"{folder}: cannot be written ({error.strerror}); nothing was kept"
        ) from error


def _write_rest(
    merger: Merger, processor: Any, recipe: Recipe, adapter: Path, folder: Path
) -> None:
    """Everything but the weights: configuration, processor, generation settings, image settings."""
    config = merger.base.config
    config._name_or_path = ""  # or it would be the path of a folder of this machine
    config.dtype = recipe.model.dtype
    config.save_pretrained(folder)
    processor.save_pretrained(folder)
    shutil.copy(adapter / IMAGE_SETTINGS, folder / IMAGE_SETTINGS)
    try:
        generation = GenerationConfig.from_pretrained(merger.folder)
    except OSError:
        generation = GenerationConfig.from_model_config(config)
    stop = stopping(merger.base, processor, merger.family)
    generation.update(
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        max_new_tokens=recipe.evaluation.max_new_tokens,
        **stop,
    )
    generation.save_pretrained(folder)


def _base_and_adapters(parts: Sequence[AdapterPart], processor: Any) -> Any:
    model, _ = load_model(parts[0].recipe.model)
    extend_vocabulary(model, processor, parts[0].recipe)
    return load_adapters(model, parts).to(best_device())


def _reloaded(folder: Path, plan: MergePlan, recipe: Recipe, encoder: Encoder) -> Any:
    """The folder as any program loads it. Raises `ModelError` where it is not the base's."""
    # a pair because of output_loading_info, which the declared type does not know
    model, info = cast(Any, AutoModelForImageTextToText).from_pretrained(
        folder,
        dtype=plan.dtype,
        output_loading_info=True,
        attn_implementation=_attention(recipe),
        use_safetensors=True,
        trust_remote_code=False,
    )
    held = {
        each.key: torch.Size(each.shape)
        for tensors in stored_tensors(folder, model).values()
        for each in tensors
    }
    wrong = [
        *info["missing_keys"],
        *info["mismatched_keys"],
        *(held.items() ^ plan.written.items()),
    ]
    if wrong:
        raise ModelError(
            f"the merged folder does not hold the weights of {recipe.model.name}: {wrong[0]} is "
            f"missing or of another shape ({len(wrong)} in all). Nothing was kept"
        )
    encoder.family.adjust_model(model)
    return model.to(best_device())


def _warn_of_lost_template(folder: Path, processor: Any, console: Console) -> None:
    """Some of the library's processors save a template and do not read it again."""
    again = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    if again.chat_template != processor.chat_template:
        console.print(
            f"warning: the library's {type(processor).__name__} does not read its chat template "
            "again; give chat_template.jinja of the folder to apply_chat_template yourself",
            style="yellow",
            soft_wrap=True,
        )


def _attention(recipe: Recipe) -> str | None:
    return None if recipe.model.attention == "auto" else recipe.model.attention


def _quantise(
    folder: Path, quantize: Any, recipe: Recipe, encoder: Encoder, asked: Asked, said: Said
) -> Likeness:
    """Put a quantised copy in the folder's place. Raises `ModelError` where, loaded again, it is
    another one than was saved.
    """
    section = ModelSection(
        name=str(folder), dtype=recipe.model.dtype, quantize=quantize, packed_vision=False
    )
    model, _ = load_model(section)
    limit = recipe.evaluation.max_new_tokens
    before = ask(model, encoder, asked, max_new_tokens=limit)
    weights = [*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")]
    with replacing(folder / "quantised") as smaller:
        model.config._name_or_path = ""
        model.save_pretrained(smaller)
    del model
    free_memory()
    for file in weights:
        file.unlink()
    for file in (folder / "quantised").iterdir():
        file.replace(folder / file.name)
    (folder / "quantised").rmdir()
    again = AutoModelForImageTextToText.from_pretrained(
        folder, use_safetensors=True, trust_remote_code=False
    )
    encoder.family.adjust_model(again)
    keep_weights_as_loaded(again)
    after = ask(again, encoder, asked, max_new_tokens=limit)
    Likeness.of(before, after).refuse_unlike(getattr(torch, recipe.model.dtype))
    return Likeness.of(said, after)
