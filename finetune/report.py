"""`report.html`: what a run reached, on one self-contained page, the answer first.

Reads only the run directory, takes what is there and says what is not: a run that was stopped, or
is still going, gets a report too. Answers and recipes are text from outside: the template escapes
all of it, and words and numbers are shaped there too; this module only decides what is shown.
"""

import base64
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from finetune import __version__
from finetune.charts import curve, draw_charts, number
from finetune.errors import RunDirError
from finetune.metrics import lower_is_better, title_of, with_interval
from finetune.rundir import RunDir, read_json, write_text

HEADLINE_METRIC = "exact_match"  # where it was measured; otherwise the first metric of the recipe
CARDS_PER_STATUS = 48
SKIPPED_SHOWN = 10
CHARACTERS_SHOWN = 500
MAX_IMAGE_BYTES = (
    1_000_000  # thumbnails are far below; anything larger would make the page too heavy for a phone
)
SIDES = ("base", "adapter")
IMAGE_KINDS = {
    b"\x89PNG": "image/png",
    b"\xff\xd8\xff": "image/jpeg",
    b"GIF8": "image/gif",
    b"RIFF": "image/webp",
}
STATUSES = {
    "broken": "Broken: right before, wrong now",
    "wrong": "Still wrong",
    "fixed": "Fixed: wrong before, right now",
    "right": "Right both times",
    "unscored": "Not scored",
}
STATUS_OF: dict[tuple[bool | None, bool | None], str] = {  # base right, adapter right
    (False, True): "fixed",
    (True, False): "broken",
    (False, False): "wrong",
    (True, True): "right",
}
Row = dict[str, Any]


def write_report(run: RunDir) -> Path:
    """Write `report.html` from what the run directory holds by now; returns its path."""
    page = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = files("finetune").joinpath("report.html.j2").read_text(encoding="utf-8")
    write_text(run.report, page.from_string(template).render(gather(run)))
    return run.report


def gather(run: RunDir) -> dict[str, Any]:
    """Everything the template shows, by name."""
    notes: list[str] = []
    summary = read_mapping(run.summary, notes)
    figures = summary or {}
    log = read_rows(run.metrics, notes)
    skipped = read_rows(run.skipped, notes)
    predictions = read_rows(run.predictions, notes)
    recipe = run.recipe.read_text("utf-8", errors="replace") if run.recipe.is_file() else ""
    environment = read_mapping(run.environment, notes) or {}
    cards = [make_card(row) for row in predictions]
    counts = Counter(card.status for card in cards)
    if num_bad := sum(number(row["loss"]) is None for row in log if "loss" in row):
        notes.append(
            f"The loss was no number at {num_bad} logged steps; the curve leaves them out."
        )
    return {
        "name": run.path.resolve().name,
        "subtitle": describe_recipe(recipe),
        "version": __version__,
        "finished": summary is not None,
        "verdict": judge(figures, predictions),
        "figures": run_figures(figures, log),
        "device": text_of(figures.get("device")),
        "charts": [(title, Markup(svg)) for title, svg in draw_charts(log)],
        "base": numbers(figures.get("base")),
        "adapter": numbers(figures.get("adapter")),
        "gain_of": gain_of,
        "intervals": mapping(figures.get("intervals")),
        "differences": mapping(figures.get("differences")),
        "lower_is_better": lower_is_better,
        "title_of": title_of,
        "with_interval": with_interval,
        "interval_of": interval_of,
        "filters": [(status, title, counts[status]) for status, title in STATUSES.items()],
        "num_cards": len(cards),
        "cards": first_of_each_status(cards, run.evaluation),
        "cards_per_status": CARDS_PER_STATUS,
        "skipped": skipped[:SKIPPED_SHOWN],
        "num_skipped": int(number(figures.get("num_skipped_rows")) or len(skipped)),
        "recipe": recipe,
        "environment": flatten(environment),
        "notes": notes,
    }


# Reading: a torn line or a missing file costs its own part of the page, and a note, never the page.


def read_mapping(path: Path, notes: list[str]) -> Row | None:
    """A JSON object, or None where the file is missing or (with a note) broken."""
    if not path.is_file():
        return None
    try:
        value = read_json(path)
    except (RunDirError, UnicodeDecodeError) as error:
        notes.append(f"{path.name} was left out: {error}")
        return None
    return value if isinstance(value, dict) else {}


def read_rows(path: Path, notes: list[str]) -> list[Row]:
    """The rows of a JSONL file, without broken lines such as the torn last one of a killed run."""
    if not path.is_file():
        return []
    rows, bad = [], []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for line_number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            bad.append(line_number)
    if bad:
        notes.append(
            f"{path.name}: unreadable lines left out: {len(bad)}, the first is line {bad[0]}."
        )
    return rows


def mapping(value: Any) -> Row:
    """The value where it is a JSON object, otherwise an empty one."""
    return value if isinstance(value, dict) else {}


def numbers(value: Any) -> dict[str, float]:
    """The numbers of a JSON object, by name."""
    figures = {name: number(figure) for name, figure in mapping(value).items()}
    return {name: figure for name, figure in figures.items() if figure is not None}


def listed(value: Any) -> list[Any]:
    """The value where it is a list, otherwise an empty one."""
    return value if isinstance(value, list) else []


def text_of(value: Any) -> str:
    """The value as text, empty for None, cut at a length that nobody reads beyond."""
    text = "" if value is None else str(value)
    if len(text) <= CHARACTERS_SHOWN:
        return text
    return f"{text[:CHARACTERS_SHOWN]} … ({len(text):,} characters)"


def flatten(values: Row, prefix: str = "") -> list[tuple[str, str]]:
    """Nested mappings as ("outer.inner", text) pairs."""
    pairs = []
    for key, value in values.items():
        if isinstance(value, dict):
            pairs += flatten(value, f"{prefix}{key}.")
        else:
            shown = ", ".join(map(str, value)) if isinstance(value, list) else text_of(value)
            pairs.append((f"{prefix}{key}", shown))
    return pairs


# The answer.


@dataclass(frozen=True)
class Share:
    """How many held-out rows were right, with the 95% Wilson interval of that share."""

    right: int
    total: int

    @property
    def percent(self) -> float:
        """Of all rows, 0 to 100."""
        return 100 * self.right / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """Percent, low and high."""
        low, high = wilson_interval(self.right, self.total)
        return 100 * low, 100 * high


@dataclass(frozen=True)
class Verdict:
    """Did it get better: one word for it, the figures behind it, and how far to trust them."""

    word: str
    tone: str  # good, bad or unsure: the colour
    metric: str
    base: float
    adapter: float
    num_rows: int
    num_better: int  # rows on which the adapter scored above the base, by this metric
    num_worse: int
    interval: tuple[float, float] | None  # of the difference; None where none was kept
    shares: tuple[Share, Share] | None


def judge(summary: Row, predictions: Sequence[Row]) -> Verdict | None:
    """The verdict on the headline metric; None before base and adapter were both measured on it."""
    before, after = numbers(summary.get("base")), numbers(summary.get("adapter"))
    both = [metric for metric in after if metric in before]
    if not both:
        return None
    metric = HEADLINE_METRIC if HEADLINE_METRIC in both else both[0]
    num_better, num_worse = count_changes(metric, predictions)
    num_rows = int(number(summary.get("num_eval_rows")) or len(predictions))
    found = mapping(mapping(summary.get("differences")).get(metric))
    words = {
        "better": ("Better", "good"),
        "worse": ("Worse", "bad"),
        "cannot tell": (f"Cannot tell at n = {num_rows:,}", "unsure"),
        "no change": ("No change", "unsure"),
    }
    gain = gain_of(metric, before[metric], after[metric])
    seems = "No change" if not gain else f"{'Better' if gain > 0 else 'Worse'}, it seems"
    word, tone = words.get(str(found.get("verdict")), (seems, "unsure"))
    return Verdict(
        word=word,
        tone=tone,
        metric=metric,
        base=before[metric],
        adapter=after[metric],
        num_rows=num_rows,
        num_better=num_better,
        num_worse=num_worse,
        interval=interval_of(found.get("interval")),
        shares=count_right(predictions),
    )


def interval_of(value: Any) -> tuple[float, float] | None:
    """Low and high, where the value is that."""
    ends = [number(end) for end in listed(value)]
    return (ends[0], ends[1]) if len(ends) == 2 and None not in ends else None  # type: ignore[return-value]


def gain_of(metric: str, base: float, adapter: float) -> float:
    """How much better the adapter is, positive for better, whichever way the metric points."""
    return base - adapter if lower_is_better(metric) else adapter - base


def is_right(row: Row, side: str) -> bool | None:
    """Whether an answer counts as right; None where not scored. An error rate is right at 0."""
    scores = mapping(mapping(row.get("scores")).get(side))
    metric = HEADLINE_METRIC if HEADLINE_METRIC in scores else next(iter(scores), "")
    score = number(scores.get(metric))
    if score is None:
        return None
    return score <= 0 if lower_is_better(metric) else score >= 1


def count_right(predictions: Sequence[Row]) -> tuple[Share, Share] | None:
    """The shares of right answers, base and adapter, over the rows where both were scored."""
    pairs = [(is_right(row, "base"), is_right(row, "adapter")) for row in predictions]
    scored = [pair for pair in pairs if None not in pair]
    if not scored:
        return None
    base, adapter = (sum(map(bool, side)) for side in zip(*scored, strict=True))
    return Share(base, len(scored)), Share(adapter, len(scored))


def count_changes(metric: str, predictions: Sequence[Row]) -> tuple[int, int]:
    """On how many rows the adapter scored better than the base, and on how many worse."""
    gains = []
    for row in predictions:
        scores = mapping(row.get("scores"))
        base, adapter = (number(mapping(scores.get(side)).get(metric)) for side in SIDES)
        if base is not None and adapter is not None:
            gains.append(gain_of(metric, base, adapter))
    return sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)


def wilson_interval(right: int, total: int) -> tuple[float, float]:
    """The 95% interval of a share (Wilson 1927); at 0 and 1 too it has a width."""
    z = 1.959964
    share, spread = right / total, z * z / total
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    return max(0.0, middle - half), min(1.0, middle + half)


# The rest of the page.


def run_figures(summary: Row, log: Sequence[Row]) -> dict[str, float]:
    """The summary's numbers by name; what it lacks is taken from the log where that knows it."""
    losses, speeds = curve(log, "loss"), curve(log, "samples_per_second")
    figures = {}
    if losses:
        figures = {"first_loss": losses[0][1], "last_loss": losses[-1][1], "steps": losses[-1][0]}
    if speeds:
        figures["samples_per_second"] = speeds[-1][1]
    return figures | numbers(summary)


@dataclass
class Card:
    """One held-out row in the gallery."""

    where: str
    question: str
    references: list[str]
    answers: list[tuple[str, str, bool | None]]  # side, text, right
    status: str  # a key of STATUSES
    image_paths: list[str]
    images: list[str] = field(default_factory=list)  # data URIs


def make_card(row: Row) -> Card:
    """A row of predictions.jsonl, judged, its pictures not yet read."""
    base, adapter = (is_right(row, side) for side in SIDES)
    return Card(
        where=text_of(row.get("where")),
        question=text_of(row.get("question")),
        references=[text_of(reference) for reference in listed(row.get("references"))],
        answers=[
            ("base", text_of(row.get("base")), base),
            ("adapter", text_of(row.get("adapter")), adapter),
        ],
        status=STATUS_OF.get((base, adapter), "unscored"),
        image_paths=[str(path) for path in listed(row.get("images"))],
    )


def first_of_each_status(cards: Sequence[Card], folder: Path) -> list[Card]:
    """The cards to show, in file order, with their pictures; no status crowds out another."""
    seen: Counter[str] = Counter()
    shown = []
    for card in cards:
        seen[card.status] += 1
        if seen[card.status] <= CARDS_PER_STATUS:
            uris = (data_uri(folder, path) for path in card.image_paths)
            card.images = [uri for uri in uris if uri]
            shown.append(card)
    return shown


def data_uri(folder: Path, relative: str) -> str | None:
    """A picture as a data URI; None if missing, no picture, too large, or outside `folder`."""
    path = (folder / relative).resolve()
    if not path.is_relative_to(folder.resolve()) or not path.is_file():
        return None
    content = path.read_bytes()
    kind = next((kind for magic, kind in IMAGE_KINDS.items() if content.startswith(magic)), None)
    if kind is None or len(content) > MAX_IMAGE_BYTES:
        return None
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def describe_recipe(recipe: str) -> str:
    """Model, method and parts in a line; empty where the recipe is no readable YAML."""
    try:
        settings = mapping(yaml.safe_load(recipe))
    except yaml.YAMLError:
        return ""
    adapter = mapping(settings.get("adapter"))
    words = [mapping(settings.get("model")).get("name"), adapter.get("method")]
    if (rank := adapter.get("rank")) and adapter.get("method") not in ("full", "frozen"):
        by_part = mapping(rank).items()
        ranks = ", ".join(f"{each} ({part})" for part, each in by_part)
        words.append(f"rank {ranks or rank}")
    if isinstance(adapter.get("parts"), list):
        words.append("on " + ", ".join(map(str, adapter["parts"])))
    return " · ".join(str(word) for word in words if word)
