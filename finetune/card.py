"""The model card of a run: what was trained on what, what came out, and how to use it.

Nothing in it is of one machine: files are named without their folders, and no row is shown. Names
are text wherever they stand, also where they hold what Markdown, HTML or Python would understand.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from finetune.metrics import title_of, with_interval
from finetune.model.load import EMBEDDED
from finetune.recipe import DataSource, Recipe
from finetune.recipe.loading import dump_recipe
from finetune.rundir import RunDir, read_json

PLOT = "loss.png"


@dataclass(frozen=True)
class Publication:
    """Where a run goes, and what is said of its base: `base` as the Hub knows it, and its licence,
    if that is known there.
    """

    repo: str
    base: str
    licence: str | None = None
    merged: bool = False
    base_class: str = ""


def card_of(run: RunDir, recipe: Recipe, publication: Publication) -> str:
    """The card as Markdown, with the Hub's metadata at its head."""
    summary = read_json(run.summary) if run.summary.is_file() else {}
    made_with = read_json(run.environment)
    name = publication.repo.partition("/")[2]
    what = "Merged weights" if publication.merged else f"A {recipe.adapter.method} adapter"
    sections = [
        f"---\n{_metadata(publication, recipe, summary)}\n---",
        f"# {name}",
        f"{what} for {_linked(publication.base, recipe.model.revision)}, trained on "
        f"{' and '.join(recipe.adapter.parts)} by vlm-recipes {made_with['vlm_recipes']}.",
        _results(summary),
        f"## How to use it\n\n```python\n{usage(publication, recipe)}\n```",
        _image_settings(recipe),
        _training(recipe, summary, made_with),
        f"## Loss\n\n![Loss by step]({PLOT})" if run.metrics.is_file() else "",
        _licence(publication),
        f"## Recipe\n\n{_block(dump_recipe(portable(recipe, publication.base)).strip(), 'yaml')}",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def portable(recipe: Recipe, base: str) -> Recipe:
    """The recipe with the base's name on the Hub, and every file and folder named without the
    folders that it is in.
    """

    def without_folders(source: DataSource) -> DataSource:
        changes: dict[str, Any] = {"image_root": None}
        if source.path:
            changes["path"] = Path(source.path).name
        return source.model_copy(update=changes)

    data = recipe.data.model_copy(
        update={
            part: tuple(map(without_folders, getattr(recipe.data, part)))
            for part in ("train", "eval")
        }
    )
    output = recipe.output.model_copy(update={"dir": Path(recipe.output.dir).name})
    model = recipe.model.model_copy(update={"name": base})
    return recipe.model_copy(update={"data": data, "output": output, "model": model})


def usage(publication: Publication, recipe: Recipe) -> str:
    """Code that answers a question about a picture, with plain transformers and PEFT."""
    head = ["from PIL import Image", "from transformers import AutoModelForImageTextToText"]
    lines = []
    dtype = f'dtype="{recipe.model.dtype}"'
    if publication.merged:
        lines.append(f'name = "{publication.repo}"')
        lines.append(f"model = AutoModelForImageTextToText.from_pretrained(name, {dtype})")
    else:
        head.insert(0, "from peft import PeftModel")
        lines.append(f'name = "{publication.repo}"')
        if publication.base == EMBEDDED:
            head.insert(0, "from finetune.model.load import model_location")
            base = f'model_location("{EMBEDDED}")'
        else:
            # JSON's quotes are Python's, too
            base = f"{json.dumps(publication.base)}, revision={json.dumps(recipe.model.revision)}"
        if publication.base_class.startswith("Idefics2"):
            head[-1] = "from transformers import AutoConfig, AutoModelForImageTextToText"
            lines.append(f"config = AutoConfig.from_pretrained({base})")
            lines.append("# it was trained with the text model's epsilon; the library's is another")
            lines.append("config.perceiver_config.rms_norm_eps = config.text_config.rms_norm_eps")
            base += ", config=config"
        lines.append(f"base = AutoModelForImageTextToText.from_pretrained({base}, {dtype})")
    lines.append("processor = AutoProcessor.from_pretrained(name)")
    if not publication.merged:
        if recipe.adapter.extra_tokens:
            lines.append("# the adapter brings the rows of its own tokens")
            lines.append("base.resize_token_embeddings(len(processor.tokenizer))")
        lines.append("model = PeftModel.from_pretrained(base, name)")
    lines += [
        "",
        'image = Image.open("scan.png").convert("RGB")',
        'content = [{"type": "image"}, {"type": "text", "text": "What is written?"}]',
        'messages = [{"role": "user", "content": content}]',
        "prompt = processor.apply_chat_template(messages, add_generation_prompt=True)",
        'inputs = processor(text=prompt, images=[image], return_tensors="pt")',
        "answer = model.generate(**inputs, max_new_tokens=64, do_sample=False)",
        'new = answer[0, inputs["input_ids"].shape[1] :]',
        "print(processor.decode(new, skip_special_tokens=True))",
    ]
    head[-1] += ", AutoProcessor"
    return "\n".join([*head, "", *lines])


def _metadata(publication: Publication, recipe: Recipe, summary: Mapping[str, Any]) -> str:
    figures = [
        EvalResult(
            task_type="image-text-to-text",
            dataset_type="held-out-rows",
            dataset_name=f"{summary['num_eval_rows']} held-out rows",
            metric_type=metric,
            metric_name=title_of(metric),
            metric_value=round(value, 4),
        )
        for metric, value in summary.get("adapter", {}).items()
    ]
    on_hub = publication.base != EMBEDDED
    data = ModelCardData(
        base_model=publication.base if on_hub else None,
        library_name="transformers" if publication.merged else "peft",
        pipeline_tag="image-text-to-text",
        license=publication.licence,
        tags=["vlm-recipes", recipe.adapter.method],
        model_name=publication.repo.partition("/")[2] if figures else None,
        eval_results=figures or None,
    )
    return data.to_yaml().strip()


def _linked(base: str, revision: str) -> str:
    if base == EMBEDDED:
        return "`nano`, the small model that comes with vlm-recipes"
    return f"[{base}](https://huggingface.co/{base}) (revision {code(revision)})"


def code(text: str) -> str:
    """As code, whatever it holds: the fence is longer than any run of backticks within."""
    shown = re.sub(r"[\x00-\x1f\x7f\x85\u2028\u2029]", " ", text).replace("|", r"\|")
    fence = "`" * (1 + max(map(len, re.findall("`+", shown)), default=0))
    space = " " if shown[:1] in ("", "`", " ") or shown.endswith(("`", " ")) else ""
    return f"{fence}{space}{shown}{space}{fence}"


def _block(text: str, language: str) -> str:
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def _results(summary: Mapping[str, Any]) -> str:
    figures = summary.get("adapter")
    if not figures:
        return "## Results\n\nNot measured: the run had no held-out rows."
    lines = [
        "## Results",
        "",
        f"On {summary['num_eval_rows']:,} rows that were held out from training, the base and this "
        "model asked the same; in brackets 95% bootstrap intervals, of the difference paired:",
        "",
        "| metric | base | this model | difference | |",
        "| --- | --- | --- | --- | --- |",
    ]
    for metric, value in figures.items():
        before = summary["base"].get(metric)
        intervals = summary.get("intervals", {"base": {}, "adapter": {}})
        found = summary.get("differences", {}).get(metric, {})
        cells = [
            title_of(metric),
            with_interval(before, intervals["base"].get(metric)),
            with_interval(value, intervals["adapter"].get(metric)),
            "" if before is None else with_interval(value - before, found.get("interval"), "+"),
            found.get("verdict", ""),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _image_settings(recipe: Recipe) -> str:
    settings = {k: v for k, v in recipe.images.model_dump().items() if v is not None}
    told = code(json.dumps(settings)) if settings else "those of the base's own processor"
    text = f"Pictures are cut as in training: {told}; the processor here is set so."
    if settings.get("split") == "auto":
        text += (
            " With `split: auto` each picture decided for itself whether it was split, which a "
            "plain processor cannot: here it does not split."
        )
    return text


def _training(recipe: Recipe, summary: Mapping[str, Any], made_with: Mapping[str, Any]) -> str:
    # held-out rows may have been drawn from the entries that are trained on
    held_out = recipe.data.eval or recipe.data.train
    rows = [
        ("training data", _data(recipe.data.train, summary, "train")),
        ("held-out data", _data(held_out, summary, "eval")),
        ("parts trained", ", ".join(recipe.adapter.parts)),
        ("method", f"{recipe.adapter.method}, rank {recipe.adapter.rank}"),
    ]
    if "trainable_parameters" in summary:
        trained, total = (summary[f"{what}_parameters"] for what in ("trainable", "total"))
        rows.append(("trained parameters", f"{trained:,} of {total:,}"))
    for key, title, unit in (
        ("steps", "steps", ""),
        ("train_seconds", "time", " s"),
        ("peak_memory_gib", "peak memory", " GiB"),
        ("device", "device", ""),
    ):
        if key in summary:
            rows.append((title, f"{summary[key]}{unit}"))
    versions = ("torch", "transformers", "trl", "peft")
    rows.append(("versions", ", ".join(f"{each} {made_with[each]}" for each in versions)))
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return f"## Training\n\n| | |\n| --- | --- |\n{table}\n\nEnergy and carbon were not measured."


def _data(sources: Sequence[DataSource], summary: Mapping[str, Any], part: str) -> str:
    """Each source with the number of its rows; all together where they are not known one by one."""
    total = summary.get(f"num_{part}_rows", 0)
    if not total:
        return "none"
    names = [code(_source_name(source)) for source in sources]
    counts = summary.get(f"{part}_rows_by_source", [])
    if len(counts) != len(names):
        return f"{', '.join(names)}: {total:,} rows"
    each = [f"{name}: {count:,} rows" for name, count in zip(names, counts, strict=True)]
    return "; ".join([*each, f"together {total:,}"] if len(each) > 1 else each)


def _source_name(source: DataSource) -> str:
    if not source.hub:
        return Path(str(source.path)).name
    return " ".join(filter(None, (source.hub, source.config, source.split, source.revision)))


def _licence(publication: Publication) -> str:
    if publication.licence:
        return f"## Licence\n\nThat of the base, as its page gives it: {publication.licence}."
    return "## Licence\n\nThat of the base; its page on the Hub gives none that could be read here."
