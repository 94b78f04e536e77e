"""Odd recipes, rows and pictures are read, or refused by the error that is promised: a short look
every time, always at the same inputs; `make fuzz` is the long one.
"""

import argparse
import json
import math
import os
import random
import signal
import string
import subprocess
import time
import warnings
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scripts import fuzz
from scripts.fuzz_targets import TARGETS, Target, mutated

SEEDS = {name: list(target.seeds()) for name, target in TARGETS.items()}
NUM_MUTATED = {"recipe": 150, "converters": 1200, "images": 1200}
# the same inputs at every call: a fault that a pull request did not make would be none of its own
ALWAYS_THE_SAME = settings(
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@pytest.fixture(autouse=True)
def _limits_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """None: what it ever had in memory is of the tests before."""
    monkeypatch.setattr(fuzz, "MAX_MEMORY_MIB", math.inf)


@pytest.fixture(autouse=True)
def _no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("name", TARGETS)
def test_what_mutation_starts_from_is_mostly_good(name: str) -> None:
    read = [TARGETS[name].attempt(seed) for seed in SEEDS[name]]
    assert sum(read) > 0.8 * len(read)


@pytest.mark.parametrize("name", TARGETS)
def test_what_was_good_before_a_change_is_read_or_refused(name: str) -> None:
    rng = random.Random(0)
    read = 0
    for _ in range(NUM_MUTATED[name]):
        data = mutated(rng, TARGETS[name], SEEDS[name])
        try:
            read += TARGETS[name].attempt(data)
        except Exception as error:
            error.add_note(repr(data))
            raise
    assert NUM_MUTATED[name] > read > NUM_MUTATED[name] / 20  # and both ways were gone


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["<image>", "a.png", "user", "human", "['a']", '{"gt_parse": {}}']),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                [word.decode().strip('"') for word in TARGETS["converters"].words if b'"' in word]
            )
            | st.text(max_size=5),
            inner,
            max_size=6,
        )
    ),
    max_leaves=20,
)


@settings(ALWAYS_THE_SAME, max_examples=400)
@given(row=JSON)
def test_any_row_at_all_is_read_or_refused(row: Any) -> None:
    TARGETS["converters"].attempt(json.dumps(row).encode())


@settings(ALWAYS_THE_SAME, max_examples=150)
@given(
    text=st.text(max_size=80)
    | st.text(alphabet=string.punctuation + " \nab01", max_size=80)
    | JSON.map(lambda value: json.dumps({"model": {"name": "nano"}, "data": value})),
    overrides=st.lists(
        st.builds(
            "{}={}".format,
            st.sampled_from(["adapter.rank", "data.train.0", "model", "a..b", "training.epochs.x"]),
            st.text(max_size=20) | JSON.map(json.dumps),
        )
        | st.text(max_size=20),
        max_size=3,
    ),
)
def test_any_recipe_at_all_is_read_or_refused(text: str, overrides: list[str]) -> None:
    data = "\0".join([text.replace("\0", ""), *overrides])
    TARGETS["recipe"].attempt(data.encode("utf-8", "surrogatepass"))


@settings(ALWAYS_THE_SAME, max_examples=400)
@given(start=st.sampled_from([seed[:30] for seed in SEEDS["images"]]), rest=st.binary(max_size=300))
def test_any_bytes_at_all_are_a_picture_or_refused(start: bytes, rest: bytes) -> None:
    TARGETS["images"].attempt(start + rest)
    TARGETS["images"].attempt(rest)


def broken(data: bytes) -> bool:
    """Fails in the ways that are looked for."""
    if data == b"raise":
        raise KeyError
    if data == b"wait":
        time.sleep(60)
    if data == b"crash":
        os.kill(os.getpid(), signal.SIGKILL)
    return True


def fuzz_in_a_fork(command: list[str], **_: Any) -> Any:
    """In place of `subprocess.run`, for a target that only this process knows."""
    given = dict(zip(command[3::2], command[4::2], strict=True))
    limits = {"seconds": float(given["--seconds"]), "inputs": int(given["--inputs"]), "seed": 0}
    process = get_context("fork").Process(
        target=fuzz.fuzz, args=("images", "random", Path(given["--work"])), kwargs=limits
    )
    process.start()
    process.join()
    return SimpleNamespace(returncode=process.exitcode)


@pytest.mark.parametrize(
    ("word", "told"),
    [
        (b"fine", None),
        (b"raise", "KeyError at tests/test_fuzz.py:"),
        (b"wait", "took longer than 1 s at tests/test_fuzz.py:"),
        (b"crash", "the process ended with -9"),
    ],
)
def test_a_fault_is_counted_and_kept_with_its_input(
    word: bytes, told: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = Target("x", broken, lambda: iter([word]), b"a b")
    monkeypatch.setitem(fuzz.TARGETS, "images", target)
    if word == b"wait":  # the others would be late, too, where the machine stands still meanwhile
        monkeypatch.setattr(fuzz, "SECONDS_PER_INPUT", 1)
    monkeypatch.setattr(subprocess, "run", fuzz_in_a_fork)
    args = argparse.Namespace(seconds=30.0, inputs=1 if word == b"wait" else 20, seed=0)
    found = fuzz.in_own_process("images", "random", tmp_path, args)
    if told is None:
        assert (found["inputs"], found["read"], found["faults"]) == (20, 20, {})
        return
    [(fault, kept), *_] = found["faults"].items()
    assert fault.startswith(told)
    assert Path(kept["input"]).read_bytes() == word


def test_a_fault_at_line_1_hides_none_at_line_12_and_its_repeats_are_no_refusals(
    tmp_path: Path,
) -> None:
    code = {
        word: compile("\n" * (int(word) - 1) + "raise KeyError", fuzz.ROOT / "odd.py", "exec")
        for word in (b"1", b"12")
    }

    def attempt(data: bytes) -> bool:
        if data in code:
            exec(code[data])
        return data == b"good"

    target = Target("odd ones", attempt, lambda: iter([]), b"a b")
    run = fuzz.Run(target, tmp_path, seconds=60, inputs=99)
    for data in (b"12", b"1", b"12", b"1", b"12", b"good", b"bad"):
        run.one(data)
    run.write()
    found = json.loads((tmp_path / "result.json").read_text())
    assert list(found["faults"]) == ["KeyError at odd.py:12", "KeyError at odd.py:1"]
    kept = [Path(each["input"]).read_bytes() for each in found["faults"].values()]
    assert kept == [b"12", b"1"]
    line = fuzz.page_lines({"images": found}, "random")[2]
    assert line.startswith("| pictures and pages of PDFs | 7 | 1 | 1 |")
    assert line.endswith("| 2 |")
