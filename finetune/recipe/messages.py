"""Recipe problems in plain words: what was found, what was expected, and the nearest right name."""

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

# What other tools call it. Only names too far from ours for a spelling match stand here.
NAMES_ELSEWHERE = {
    "base_model": "model.name",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "load_in_4bit": "model.quantize",
    "load_in_8bit": "model.quantize",
    "model_name_or_path": "model.name",
    "torch_dtype": "model.dtype",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "lora_r": "adapter.rank",
    "r": "adapter.rank",
    "target_modules": "adapter.parts",
    "max_length": "data.max_tokens",
    "max_seq_length": "data.max_tokens",
    "cutoff_len": "data.max_tokens",
    "dataset": "data.train",
    "lr": "training.learning_rate",
    "lr_scheduler_type": "training.scheduler",
    "num_train_epochs": "training.epochs",
    "optim": "training.optimizer",
    "per_device_train_batch_size": "training.batch_size",
    "per_device_eval_batch_size": "evaluation.batch_size",
    "save_total_limit": "training.keep_checkpoints",
    "eval_steps": "evaluation.every_steps",
    "report_to": "output.trackers",
    "output_dir": "output.dir",
}

# Pydantic marks where in a union or a mapping key an error lies; no user wrote these words.
MARKS = {"number", "by_part", "[key]"}

EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "string_unicode": "text of whole characters",
    "bool_type": "true or false",
    "dict_type": "a mapping (key: value)",
    "model_type": "a mapping (key: value)",
    "tuple_type": "a list (each entry on a line of its own after '- ', or [a, b])",
}

LIMITS = {
    "greater_than": ("more than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
}


@dataclass(frozen=True)
class Problem:
    """One thing to mend; `reads` names the keys that a check across fields looked at."""

    loc: tuple[str | int, ...]
    text: str
    reads: tuple[str, ...] = ()

    def __str__(self) -> str:
        """The line the user sees."""
        parts = [part if len(part) <= 60 else f"{part[:57]}..." for part in map(str, self.loc)]
        return f"{'.'.join(parts)}: {self.text}" if parts else self.text


def nearest(name: str, choices: Iterable[str]) -> str | None:
    """The choice most like `name`, whatever its case, or None when none is near."""
    by_lower = {choice.lower(): choice for choice in choices}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    return by_lower[close[0]] if close else None


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """`; did you mean 'rank'?`, or nothing when no choice is near."""
    near = nearest(name, choices)
    return f"; did you mean {near!r}?" if near else ""


def in_words(value: Any) -> str:
    """A value as the user would recognise it in the file."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    if isinstance(value, str):
        return repr(value if len(value) <= 60 else value[:57] + "...")
    return str(value)


def problems_of(error: ValidationError, root: type[BaseModel]) -> list[Problem]:
    """Every problem pydantic found, reworded; checks across fields arrive as ready `Problem`s."""
    problems: list[Problem] = []
    for details in error.errors(include_url=False):
        ready = details.get("ctx", {}).get("problems")
        problems += ready if ready else [_reword(details, root)]
    return problems


def _reword(details: Any, root: type[BaseModel]) -> Problem:
    loc = tuple(part for part in details["loc"] if part not in MARKS)
    return Problem(loc, _text(details, loc, root))


def _text(details: Any, loc: tuple[str | int, ...], root: type[BaseModel]) -> str:
    kind, value, ctx = details["type"], details["input"], details.get("ctx", {})
    found = in_words(value)
    if kind == "extra_forbidden":
        return _unknown_key(loc, root)
    if kind == "missing":
        return f"is missing{_purpose(loc, root)}"
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", ctx["expected"])
        hint = did_you_mean(value, choices) if isinstance(value, str) else ""
        return f"expected {one_of(choices)}, found {found}{hint}"
    if kind in LIMITS:
        words, limit = LIMITS[kind]
        return f"must be {words} {ctx[limit]:g}, found {found}"
    if kind == "value_error":
        return str(ctx["error"])
    if kind == "too_short":
        return "is empty; give at least one"
    if kind == "invalid_key":
        return f"the key {found} is not text; put it in quotes if it is meant"
    if kind in EXPECTED:
        quotes = kind == "string_type" and not isinstance(value, dict | list | None)
        return f"expected {EXPECTED[kind]}, found {found}" + (
            "; put it in quotes" if quotes else ""
        )
    return f"{details['msg']}, found {found}"


def one_of(choices: Sequence[str]) -> str:
    """`a`, `a or b`, `one of a, b, c`."""
    if len(choices) <= 2:
        return " or ".join(choices)
    return "one of " + ", ".join(choices)


def _purpose(loc: Sequence[str | int], root: type[BaseModel]) -> str:
    owner = _model_at(loc[:-1], root)
    field = owner.model_fields.get(str(loc[-1])) if owner else None
    description = " ".join((field.description or "").split()) if field else ""
    return f"; expected: {description.partition('. ')[0].rstrip('.')}" if description else ""


def _unknown_key(loc: Sequence[str | int], root: type[BaseModel]) -> str:
    owner = _model_at(loc[:-1], root)
    known = list(owner.model_fields) if owner else []
    key = str(loc[-1])
    # A dotted key is right on the command line and a common slip in the file.
    plain = key.rpartition(".")[2] if len(loc) == 1 else key
    homes = [home for home, name in _all_keys(root) if name == plain]
    if homes:
        return f"unknown key; {plain!r} belongs under {' or '.join(homes)}"
    if near := nearest(key, known):
        return f"unknown key; did you mean {near!r}?"
    if key in NAMES_ELSEWHERE:
        return f"unknown key; here it is called {NAMES_ELSEWHERE[key]}"
    dotted = {name: f"{home}.{name}" for home, name in _all_keys(root)}
    if near := nearest(key, dotted):
        return f"unknown key; did you mean {dotted[near]!r}?"
    return f"unknown key; known here: {', '.join(known)}"


def _all_keys(root: type[BaseModel]) -> Iterator[tuple[str, str]]:
    for section, field in root.model_fields.items():
        for model in _models_in(field.annotation):
            for name in model.model_fields:
                yield section, name


def _model_at(loc: Sequence[str | int], root: type[BaseModel]) -> type[BaseModel] | None:
    model: type[BaseModel] | None = root
    for part in loc:
        if isinstance(part, int):
            continue
        field = model.model_fields.get(part) if model else None
        model = next(_models_in(field.annotation), None) if field else None
    return model


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)
