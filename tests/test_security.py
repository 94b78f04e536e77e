"""What is promised in docs/security.md: what was written by others is data, and never runs, fills
the memory, leads out of its folder, or comes to stand in a page as more than text.
"""

import ast
import base64
import io
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from markdown_it import MarkdownIt
from PIL import Image as PilImage

from data_formats import mmmu
from data_formats.chat import FormatError, parse_chat
from data_formats.mmmu import MAX_LIST_CHARACTERS
from finetune import chat
from finetune.card import Publication, card_of
from finetune.check_page import write_check_page
from finetune.checkpoints import fault_of, settle
from finetune.data.images import ImageAccess, load_image, name_of
from finetune.data.render import Renderer
from finetune.data.signatures import why_no_image
from finetune.data.sources import open_source
from finetune.errors import DataError, HubError, ModelError, RecipeError, RunDirError
from finetune.evaluate import evaluate
from finetune.families import FAMILIES
from finetune.hub import fetch_run
from finetune.merge import merge
from finetune.model.checkpoint_files import weight_files
from finetune.model.load import load_config, load_model, load_processor, model_location
from finetune.model.methods import load_checkpoint, load_trainable, load_trained
from finetune.patterns import written_out
from finetune.preview_page import write_preview
from finetune.push import _licence_of, push
from finetune.recipe import DataSection, DataSource, ModelSection, Recipe, load_recipe, make_source
from finetune.recipe.syntax import MAX_BYTES, MAX_DEPTH, MAX_DIGITS, MAX_VALUES, parse_yaml
from finetune.report import write_report
from finetune.rundir import RunDir, write_json, write_jsonl
from finetune.serving import Served
from tests.browser import needs_browser, run_chromium
from tests.conftest import NANO_IMAGES, chat_row, noise
from tests.hub_server import Hub, Repo
from tests.test_check_page import bad, found
from tests.test_merge import QUIET, Made, made_run
from tests.test_preview_page import make_row, talk
from tests.test_train import train

ROOT = Path(__file__).parent.parent
HERE = ImageAccess(Path())
RECIPE = "model: {name: nano}\ndata: {train: [{hub: user/name}]}\n"


# The source.


def calls_in(tree: ast.AST) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def name_of_call(call: ast.Call) -> str:
    """`torch.load`; of a method of what a call gave, `.method`."""
    called = call.func
    if isinstance(called, ast.Attribute):
        return ast.unparse(called) if isinstance(called.value, ast.Name) else f".{called.attr}"
    return called.id if isinstance(called, ast.Name) else ""


UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
UNSAFE_CALLS = {
    *("eval", "exec", "compile", "__import__"),
    *("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"),
    *("yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load"),
    *("shutil.unpack_archive", "urllib.request.urlopen", "importlib.import_module"),
}
UNSAFE_METHODS = {"extract", "extractall"}
# What these keywords must be, wherever they are given
KEYWORDS = {
    "trust_remote_code": "False",
    "use_safetensors": "True",
    "weights_only": "True",
    "allow_pickle": "False",
    "shell": "False",
    "autoescape": "True",
}


def faults_of(source: str) -> list[str]:
    """Calls that run, or may run, what they read: `line: what`."""
    tree = ast.parse(source)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules = UNSAFE_MODULES & {name.partition(".")[0] for name in names}
            found += [f"{node.lineno}: import of {module}" for module in sorted(modules)]
    for call in calls_in(tree):
        name = name_of_call(call)
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        if name in UNSAFE_CALLS or name.rpartition(".")[2] in UNSAFE_METHODS:
            found.append(f"{call.lineno}: {name}")
        found += [
            f"{call.lineno}: {name}({key}={given[key]})"
            for key, right in KEYWORDS.items()
            if key in given and given[key] != right
        ]
        needed = {
            "torch.load": "weights_only",
            "Environment": "autoescape",
            "AutoConfig.from_pretrained": "trust_remote_code",
            "AutoProcessor.from_pretrained": "trust_remote_code",
            "AutoTokenizer.from_pretrained": "trust_remote_code",
            "AutoModelForImageTextToText.from_pretrained": "trust_remote_code",
        }.get(name)
        if needed and needed not in given:
            found.append(f"{call.lineno}: {name} without {needed}")
    return found


def sources() -> list[Path]:
    return [file for part in SOURCE_FOLDERS for file in sorted((ROOT / part).rglob("*.py"))]


SOURCE_FOLDERS = ("finetune", "data_formats", "scripts")


@pytest.mark.parametrize("file", sources(), ids=lambda file: file.relative_to(ROOT).as_posix())
def test_no_source_runs_what_it_reads(file: Path) -> None:
    found = faults_of(file.read_text(encoding="utf-8"))
    if file.parent.name == "scripts":  # which load models that they made themselves
        found = [fault for fault in found if not fault.endswith("without trust_remote_code")]
    assert not found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from dill import loads",
        "from torch import load\nimport joblib.numpy_pickle",
        "eval('1')",
        "os.system('ls')",
        "subprocess.run('ls', shell=True)",
        "torch.load(file)",
        "torch.load(file, weights_only=False)",
        "np.load(file, allow_pickle=True)",
        "yaml.load(text, Loader=yaml.UnsafeLoader)",
        "tarfile.open(file).extractall()",
        "archive.extract(member)",
        "AutoConfig.from_pretrained(folder)",
        "AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=trusted)",
        "AutoModelForImageTextToText.from_pretrained(folder, use_safetensors=None, **settings)",
        "Environment(undefined=StrictUndefined)",
        "Environment(autoescape=False)",
    ],
)
def test_the_search_finds_what_it_looks_for(source: str) -> None:
    assert faults_of(source)


def test_no_page_lets_text_through_unescaped() -> None:
    templates = list((ROOT / "finetune").glob("*.j2"))
    assert len(templates) == 3
    for template in templates:
        text = template.read_text(encoding="utf-8")
        assert not re.search(r"\|\s*safe\b|autoescape|<script|\bon\w+\s*=\s*[\"']", text), template


# The recipe.


def load(folder: Path, text: str, *overrides: str) -> Recipe:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return load_recipe(path, overrides)


def laughs(levels: int = 9) -> str:
    """A few lines that stand for ten to the power of `levels` values."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    for i in range(1, levels):
        lines.append(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]")
    return "\n".join(lines)


MANY_KEYS = ", ".join(f"key{i}: {i}" for i in range(1000))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (laughs(), f"line 4: holds more than {MAX_VALUES:,} values up to here"),
        (
            f"a: &a {{{MANY_KEYS}}}\nb: {{<<: [{', '.join(['*a'] * 1000)}]}}",
            f"line 2: holds more than {MAX_VALUES:,} values up to here",
        ),
        ("- x\n" * 2 * MAX_VALUES, f"line {MAX_VALUES + 1}: holds more than {MAX_VALUES:,} values"),
        ("a: &a [*a]", "line 1: *a stands within &a"),
        ("a: &a {<<: *a}", "line 1: *a stands within &a"),
        ("[" * 100_000, f"line 1: is nested more than {MAX_DEPTH} levels deep"),
        ("? " * 100_000, f"line 1: is nested more than {MAX_DEPTH} levels deep"),
        (
            "a0: &a0 [x]\n" + "\n".join(f"a{i}: &a{i} [*a{i - 1}]" for i in range(1, 100)),
            f"is nested more than {MAX_DEPTH} levels deep",
        ),
        ("a: 1" + ":1" * 100_000, "line 1: holds a number of 200,001 characters"),
        ("a: 0x" + "f" * MAX_DIGITS, f"line 1: holds a number of {MAX_DIGITS + 2} characters"),
    ],
)
def test_yaml_that_stands_for_more_than_a_recipe_holds_is_refused_at_once(
    tmp_path: Path, text: str, message: str
) -> None:
    began = time.perf_counter()
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, text)
    assert time.perf_counter() - began < 20
    assert message in str(caught.value)
    with pytest.raises(RecipeError, match=r"adapter\.rank: the value after '=': "):
        load(tmp_path, RECIPE, f"adapter.rank={text}")


@pytest.mark.parametrize(
    "text",
    [
        "a: !!bool maybe",
        "a: !!timestamp soon",
        "a: !!int ''",
        "a: !!float x",
        "a: 1" + ":1" * 49 + ".5",
        "a: !!python/object/apply:os.system ['touch marker']",
        "a: !!python/name:os.system",
    ],
)
def test_a_tag_that_leads_the_parser_astray_is_a_message(
    tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError):
        load(tmp_path, text)
    assert not (tmp_path / "marker").exists()


def test_a_file_too_large_for_a_recipe_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "rows.yaml"
    with path.open("wb") as file:
        file.truncate(2**40)  # a hole: to read it would take hours
    with pytest.raises(
        RecipeError, match=rf"rows.yaml: is no recipe: .*1,099,511,627,776 .*{MAX_BYTES:,}; give"
    ):
        load_recipe(path)


def test_anchors_and_merges_are_of_use_all_the_same(tmp_path: Path) -> None:
    text = (
        "model: {name: nano}\n"
        "data:\n"
        "  train: [&source {hub: user/name, split: train}]\n"
        "  eval: [{<<: *source, split: test}, *source]\n"
    )
    recipe = load(tmp_path, text, "data.eval.1.split=validation")
    splits = [source.split for source in (*recipe.data.train, *recipe.data.eval)]
    assert splits == ["train", "test", "validation"]  # the override changed no other


def test_braces_stand_for_no_more_files_than_a_list_can_hold() -> None:
    assert len(written_out("{0..999999}{0..999999}")) == len(written_out("{a,b}" * 50)) == 100_001
    assert written_out("{a,b}" * 5000) == ["{a,b}" * 5000]


def test_a_place_of_many_digits_is_no_place(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="is a list of 1 entry, numbered from 0"):
        load(tmp_path, RECIPE, f"data.train.{'9' * 5000}=x")


@pytest.mark.parametrize(
    ("text", "override"),
    [
        (f'{RECIPE}"\\ud800": 1', "adapter.rank=8"),
        ("model: nano\ndata: 1", "\udcef.rank=8"),
        (RECIPE, "model.\udcef=8"),
    ],
)
def test_half_a_character_in_a_key_is_refused_whatever_else_is_wrong(
    tmp_path: Path, text: str, override: str
) -> None:
    with pytest.raises(RecipeError, match="expected text of whole characters, found"):
        load(tmp_path, text, override)


def test_a_key_of_any_length_has_a_message_of_one_line(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, f"{RECIPE}? {'k' * 100_000}\n: x")
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("name", ["https://me:a-password@host/model", "hf_" + "aB3" * 12])
def test_a_recipe_that_holds_a_secret_is_refused_without_saying_it(
    tmp_path: Path, name: str
) -> None:
    for arguments in ((f"{RECIPE}output: {{dir: '{name}'}}",), (RECIPE, f"model.revision={name}")):
        with pytest.raises(RecipeError, match="looks like a password or token") as caught:
            load(tmp_path, *arguments)
        assert name not in str(caught.value)
    assert parse_yaml(f"model: {name}")[0]  # it is readable YAML


# Rows and their pictures.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("[{[]: 1}]", "is no list"),
        ("[{{}}]", "is no list"),
        ("[" * 50_000, "is no list"),
        ("[1" + "+1" * 40_000 + "]", "is no list"),
        (f"['{'x' * MAX_LIST_CHARACTERS}']", "more than the 100,000 of a list"),
        ("[__import__('os').system('touch marker')]", "is no list"),
    ],
)
def test_a_list_written_as_python_is_read_and_never_run(
    options: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    row = {"question": "Which?", "image_1": "a.png", "options": options, "answer": "A"}
    with pytest.raises(FormatError, match=message):
        mmmu.parse(row)
    assert not (tmp_path / "marker").exists()


def test_a_picture_of_a_number_without_end_is_none() -> None:
    row = {"question": f"<image {'1' * 5000}>", "image_1": "a.png", "options": [], "answer": "A"}
    assert mmmu.parse(row).messages[0].text == row["question"]


@pytest.mark.parametrize("comment", [b"<!--", b"<!---->", b"<!-- -->\n", b"<?xml"])
def test_what_is_no_image_is_told_in_a_time_that_does_not_double(comment: bytes) -> None:
    began = time.perf_counter()
    for end in (b"x", b"<html>", b"<svg>"):
        why_no_image(comment * 500 + end)
    assert time.perf_counter() - began < 20


def test_a_web_page_and_a_drawing_are_known_behind_comments() -> None:
    assert "(HTML)" in why_no_image(b" <!-- a --> <!-- b --><!doctype html>")
    for start in (b"<?xml version='1.0'?><!-- a -->", b" <!-- a -->", b""):
        assert "is an SVG drawing" in why_no_image(start + b"<svg/>")


def test_a_tiff_that_names_its_strips_a_thousand_times_is_read_once() -> None:
    num_tags, num_strips = 65_535, 500_000
    entry = struct.pack("<HHII", 273, 1, num_strips, 8)
    head = b"II*\0" + struct.pack("<I", 8 + num_strips) + bytes(num_strips)
    data = head + struct.pack("<H", num_tags) + entry * num_tags + bytes(4)
    began = time.perf_counter()
    with pytest.raises(DataError):
        load_image(data, HERE)
    assert time.perf_counter() - began < 20


def test_an_icon_whose_pictures_are_all_the_same_bytes_is_refused() -> None:
    empty = struct.pack(">I4sI", 0, b"none", 0)
    end = struct.pack(">I4sI", 0, b"IEND", zlib.crc32(b"IEND"))
    png = b"\x89PNG\r\n\x1a\n" + empty * 20_000 + end
    count, first = 65_535, 6 + 16 * 65_535
    entry = struct.pack("<BBBBHHII", 1, 1, 0, 0, 1, 32, len(png), first)
    began = time.perf_counter()
    with pytest.raises(DataError, match="its pictures lie over one another"):
        load_image(b"\0\0\1\0" + struct.pack("<H", count) + entry * count + png, HERE)
    assert time.perf_counter() - began < 20


def test_a_sixteen_bit_picture_is_not_held_many_times_over() -> None:
    """A flat one of 200 KB may be one of 100 megapixels."""
    file = io.BytesIO()
    PilImage.new("I;16", (4000, 1000), 30_000).save(file, "PNG")
    tracemalloc.start()
    try:
        image = load_image(file.getvalue(), HERE)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert image.getpixel((0, 0)) == (117, 117, 117)
    assert peak < 10 * image.width * image.height  # three copies of eight bytes a pixel before


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("https://me:pw@host:8/a@2.png?sig=pw", "https://...@host:8/a@2.png?..."),
        ("https://host/a.png?X-Amz-Signature=pw", "https://host/a.png?..."),
        ("s3://pw@host/a.png", "s3://...@host/a.png"),
        ("https://host/a?pw=a@b", "https://host/a?..."),
        ("scans/pw?.png", "scans/pw?.png"),
        ("data:image/png;base64,pw", "(data URI)"),
        (b"pw", "(bytes in the row)"),
    ],
)
def test_a_picture_s_name_shows_where_it_is_and_not_what_lets_one_in(
    source: str | bytes, shown: str
) -> None:
    assert name_of(source) == shown
    if isinstance(source, str) and "://" in source:
        with pytest.raises(DataError) as caught:
            load_image(source, HERE)
        assert repr(shown) in str(caught.value)
        assert "pw" not in str(caught.value)


# Checkpoints and adapters, pickles among them.


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    """A file that is written only where something ran that should not; looked for at the end."""
    path = tmp_path / "something-ran"
    yield path
    assert not path.exists()


class Trap:
    """Writes the file once it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.marker), "w")


def pickled(marker: Path) -> bytes:
    return pickle.dumps(Trap(marker))


def saved_by_torch(marker: Path) -> bytes:
    file = io.BytesIO()
    torch.save({"weight": Trap(marker)}, file)
    return file.getvalue()


def test_the_trap_is_one(tmp_path: Path) -> None:
    marker = tmp_path / "something-ran"
    for load in (
        lambda: pickle.loads(pickled(marker)),
        lambda: torch.load(io.BytesIO(saved_by_torch(marker)), weights_only=False),
    ):
        load()
        assert marker.exists()
        marker.unlink()
    with pytest.raises(pickle.UnpicklingError):
        torch.load(io.BytesIO(saved_by_torch(marker)), weights_only=True)
    assert not marker.exists()


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A copy of the embedded model, to be tampered with."""
    folder = tmp_path / "model"
    shutil.copytree(model_location("nano"), folder)
    return folder


def set_in(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.mark.parametrize("shard", ["shard.bin", "../shard.safetensors", "/shard.safetensors", 3])
def test_an_index_that_names_more_than_safetensors_beside_it_is_refused(
    model_folder: Path, marker: Path, shard: Any
) -> None:
    (model_folder / WEIGHTS).rename(model_folder / "other.safetensors")
    (model_folder / "shard.bin").write_bytes(saved_by_torch(marker))
    (model_folder / INDEX).write_text(json.dumps({"weight_map": {"weight": shard}}))
    message = f"names {shard!r}, and weights are read only from"
    with pytest.raises(ModelError, match=re.escape(message)):
        load_model(ModelSection(name=str(model_folder)))
    with pytest.raises(ModelError, match=re.escape(message)):
        weight_files(model_folder)
    with pytest.raises(ModelError, match=re.escape(message)):
        Served.load(model_folder, "model")


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"weight_map": 1}', '{"weight_map": {"a": []}}']
)
def test_an_index_that_is_none_is_refused(model_folder: Path, text: str) -> None:
    (model_folder / INDEX).write_text(text)
    with pytest.raises(ModelError, match=r"index\.json is no list of weights"):
        load_model(ModelSection(name=str(model_folder)))


def test_a_checkpoint_of_pickles_alone_is_refused(model_folder: Path, marker: Path) -> None:
    (model_folder / WEIGHTS).rename(model_folder / "other.safetensors")
    for name in ("pytorch_model.bin", "model.pt", "model.bin", "model.pth"):
        (model_folder / name).write_bytes(saved_by_torch(marker))
    with pytest.raises(ModelError, match="its weights cannot be loaded"):
        load_model(ModelSection(name=str(model_folder)))
    (model_folder / "other.safetensors").unlink()
    with pytest.raises(ModelError, match=r"holds no \*\.safetensors weights; .*convert"):
        load_model(ModelSection(name=str(model_folder)))


def test_code_that_comes_with_a_checkpoint_does_not_run(model_folder: Path, marker: Path) -> None:
    (model_folder / "theirs.py").write_text(f"open({str(marker)!r}, 'w')\nclass Theirs: ...\n")
    names = ("Config", "Model", "ModelForImageTextToText", "Processor", "Tokenizer")
    own = {f"Auto{name}": "theirs.Theirs" for name in (*names, "ImageProcessor")}
    for name in ("config", "processor_config", "tokenizer_config"):
        set_in(model_folder / f"{name}.json", auto_map=own)
    (model_folder / "preprocessor_config.json").write_text(json.dumps({"auto_map": own}))
    section = ModelSection(name=str(model_folder), dtype="float32")
    assert load_model(section)[0].config.model_type == "idefics2"
    load_processor(section, NANO_IMAGES)
    Served.load(model_folder, "model")
    set_in(model_folder / "config.json", model_type="theirs")  # which no code but theirs knows
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(section)


def test_attention_code_that_a_checkpoint_names_is_not_fetched(model_folder: Path) -> None:
    config = json.loads((model_folder / "config.json").read_text())
    kernel = {"attn_implementation": "somebody/kernel", "_attn_implementation": "somebody/kernel"}
    for part in (config, config["text_config"], config["vision_config"]):
        part |= kernel
    (model_folder / "config.json").write_text(json.dumps(config))
    found, _ = load_config(ModelSection(name=str(model_folder)))
    parts = (found, found.text_config, found.vision_config)
    assert {part._attn_implementation for part in parts} == {None}
    load_model(ModelSection(name=str(model_folder), dtype="float32"))


def test_an_adapter_within_a_base_is_not_applied_unseen(model_folder: Path, marker: Path) -> None:
    (model_folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    (model_folder / "adapter_model.bin").write_bytes(saved_by_torch(marker))
    with pytest.raises(ModelError, match="holds an adapter beside the model"):
        load_model(ModelSection(name=str(model_folder)))


@pytest.fixture
def made(dataset: Callable[..., Path], tmp_path: Path) -> Made:
    return made_run(dataset(), tmp_path / "run")


def uses_of(made: Made, out: Path) -> list[Callable[[], Any]]:
    """Everything that loads an adapter."""
    adapter = made.run / "adapter"
    picture = made.run.parent / "eval0.png"
    model = load_trainable(made.recipe, made.processor)[0]
    return [
        lambda: load_trained(made.recipe, adapter, made.processor),
        lambda: load_checkpoint(model, adapter),
        lambda: merge(made.run, out / "merged", console=QUIET),
        lambda: chat.answer(made.run, [picture], "What is written?"),
        lambda: evaluate(made.run),
        lambda: push(made.run, "user/name", dry_run=True, console=QUIET),
    ]


def test_a_pickled_adapter_is_refused_by_every_verb(
    made: Made, marker: Path, tmp_path: Path
) -> None:
    uses = uses_of(made, tmp_path)
    (made.run / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(RunDirError, match=r"adapter: adapter_model\.safetensors is missing"):
        uses[0]()
    (made.run / "adapter" / "adapter_model.bin").write_bytes(saved_by_torch(marker))
    for use in uses:
        with pytest.raises(RunDirError, match=r"adapter_model\.bin is a pickle, .* never read"):
            use()


def test_an_adapter_that_would_load_more_than_matrices_is_refused(
    made: Made, tmp_path: Path
) -> None:
    uses = uses_of(made, tmp_path)
    for others in (
        {"peft_type": "PROMPT_TUNING", "tokenizer_kwargs": {"trust_remote_code": True}},
        {"peft_type": "XLORA", "adapters": {"a": "somebody/adapter"}},
        {"peft_type": None},
    ):
        set_in(made.run / "adapter" / "adapter_config.json", **others)
        for use in uses:
            with pytest.raises(RunDirError, match=rf"peft_type is {others['peft_type']!r}, and"):
                use()


def test_of_an_adapter_on_the_hub_only_data_are_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    safe = {"adapter_config.json", "adapter_model.safetensors", "chat_template.jinja"}
    unsafe = ("adapter_model.bin", "theirs.py", "optimizer.pt", "training_args.bin", "a.pkl")
    with Hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        repo = hub.repos.setdefault("user/name", Repo(private=False))
        repo.branches["main"] |= dict.fromkeys((*safe, *unsafe, "recipe.yaml"), b"{}")
        run = fetch_run("hub://user/name")
    assert {file.name for file in (run / "adapter").iterdir()} == safe
    assert not [path for name in unsafe for path in tmp_path.rglob(name)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_tampered_checkpoint_is_not_gone_on_from_and_a_pickle_in_it_never_runs(
    dataset: Callable[..., Path], tmp_path: Path, marker: Path, name: str
) -> None:
    recipe = str(dataset(num_eval=0, training={"save_steps": 2, "max_steps": 4}))
    train(recipe)
    (last,) = sorted((tmp_path / "run" / "checkpoints").glob("checkpoint-4"))
    set_in(last / "trainer_state.json", global_step=3)  # so that there is something left to do
    (last / name).write_bytes(saved_by_torch(marker))
    assert fault_of(last)
    # whoever can write there can write the manifest, too
    aside = last.with_name("aside")
    last.rename(aside)
    (aside / "manifest.json").unlink()
    settle(aside, last)
    assert fault_of(last) is None
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        train(recipe, resume=True)


def test_the_library_loads_what_it_saved_for_resuming_as_weights_alone() -> None:
    """Optimizer, schedule and random numbers of our own checkpoints."""
    library = Path(transformers.__file__).parent
    found = 0
    for file in ("trainer.py", "trainer_utils.py", "modeling_utils.py"):
        for call in calls_in(ast.parse((library / file).read_text(encoding="utf-8"))):
            if name_of_call(call) != "torch.load":
                continue
            found += 1
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            assert given["weights_only"] in ("True", "weights_only"), f"{file}:{call.lineno}"
    assert found >= 10


# Data files.


ROW = {"question": "What?", "answer": "A7"}


def tar_of(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def table_of(data: bytes, metadata: dict[bytes, bytes] | None = None) -> pa.Table:
    field = pa.field("image", pa.binary(), metadata=metadata)
    schema = pa.schema([field, pa.field("question", pa.string()), pa.field("answer", pa.string())])
    return pa.table([[data], ["What?"], ["A7"]], schema=schema)


def arrow_files(trap: bytes) -> dict[str, bytes]:
    """A pickle as a picture, and one in the place where pyarrow once kept pickled types."""
    extension = {b"ARROW:extension:name": b"arrow.py_extension_type"}
    extension[b"ARROW:extension:metadata"] = trap
    found = {}
    for name, table in (("picture", table_of(trap)), ("type", table_of(trap, extension))):
        sink = io.BytesIO()
        pq.write_table(table, sink)
        found[f"{name}.parquet"] = sink.getvalue()
        sink = io.BytesIO()
        with pa.ipc.new_stream(sink, table.schema) as out:
            out.write_table(table)
        found[f"{name}.arrow"] = sink.getvalue()
    return found


def object_array(marker: Path) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([Trap(marker)], dtype=object), allow_pickle=True)
    return file.getvalue()


def data_files(marker: Path) -> dict[str, bytes]:
    """Traps under every name that a reader might open, and within what is read."""
    traps = {"pickle": pickled(marker), "torch": saved_by_torch(marker)}
    traps["numpy"] = object_array(marker)
    foreign = (".pkl", ".pickle", ".pt", ".pth", ".npy", ".npz", ".bin", ".joblib", ".png")
    known = (".jsonl", ".json", ".csv", ".parquet", ".arrow", ".tar", ".tgz", ".jsonl.gz")
    files = {
        f"{kind}{suffix}": trap for kind, trap in traps.items() for suffix in (*foreign, *known)
    }
    members = {
        f"0.{name}": trap
        for name in ("pyd", "pickle", "pkl", "pth", "pt", "npy", "npz", "cbor", "mp", "ten", "cls")
        for trap in (traps["pickle"],)
    }
    row = json.dumps(ROW | {"image": "0.png"}).encode()
    for kind, trap in traps.items():
        members |= {f"0.{kind}.npy": traps["numpy"], "0.json": row, "0.png": trap}
        files[f"{kind}-members.tar"] = tar_of(members)
        encoded = base64.b64encode(trap).decode()
        for how, image in (("uri", f"data:image/png;base64,{encoded}"), ("path", f"{kind}.png")):
            files[f"{kind}-{how}.jsonl"] = json.dumps(ROW | {"image": image}).encode()
        files |= {f"{kind}-{name}": data for name, data in arrow_files(trap).items()}
    files["code.py"] = f"open({str(marker)!r}, 'w')".encode()
    return files


def test_no_data_file_is_unpickled_or_run_whatever_it_is_called(
    tmp_path: Path, marker: Path
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    files = data_files(marker)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    read = 0
    for name in files:
        columns = {"image": "image", "question": "question", "answer": "answer"}
        settings = {"path": str(folder / name), "format": "columns", "columns": columns}
        data = DataSection(train=(make_source(settings),))
        try:
            source = open_source(data.train[0], data, tmp_path / "cache")
        except DataError:
            continue
        for where, row in source.rows(0, len(source)):
            if isinstance(row, DataError):
                continue
            (image,) = row.conversation.images()
            with pytest.raises(DataError, match=r"pickle|PyTorch file|NumPy array"):
                load_image(image.source, row.image_access)
            read += 1
            assert where
    assert read == 3 * 7  # a tar, two .jsonl, two .parquet and two .arrow of each


def test_a_script_in_place_of_a_dataset_is_not_run(
    tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "theirs.py").write_text(f"open({str(marker)!r}, 'w')\n")
    data = DataSection(train=(DataSource(hub="theirs", split="train"),))
    with pytest.raises(DataError):
        open_source(data.train[0], data, tmp_path / "cache")


# Chat templates.


TALK = parse_chat(chat_row("What?", "A7"))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "reaches for Python's insides"),
        ("{{ '{0.__class__.__mro__}'.format('') }}", "reaches for Python's insides"),
        ("{{ cycler.__init__.__globals__.os.system('touch MARK') }}", "Python's insides"),
        ("{{ lipsum.__globals__.os.system('touch MARK') }}", "Python's insides"),
        ("{{ messages.append(1) }}", "reaches for Python's insides"),
        ("{% for i in range(999999999) %}{% endfor %}", "fails (OverflowError: Range too big"),
        ("{% include '/etc/passwd' %}", "fails (TypeError: no loader"),
        ("{{ 1 / 0 }}", "fails (ZeroDivisionError"),
        ("{{ messages[99].role.x }}", "refuses this order of turns"),
        ("{% if %}", "refuses this order of turns"),
    ],
)
def test_a_template_that_wants_more_than_text_is_refused(
    template: str, message: str, model_folder: Path, marker: Path
) -> None:
    (model_folder / "chat_template.jinja").write_text(template.replace("MARK", str(marker)))
    section = ModelSection(name=str(model_folder), dtype="float32")
    processor, _ = load_processor(section, NANO_IMAGES)
    with pytest.raises(DataError, match=re.escape(message)):
        Renderer(processor, FAMILIES["idefics2"]).render(TALK, ())


# Pages and cards.


HOSTILE = " ".join(
    (
        "<script>alert(1)</script>",
        "\"><img src=x onerror='alert(1)'>",
        "</script></style></pre></title></textarea><svg onload=alert(1)>",
        "' onmouseover='alert(1)",
        "[a](javascript:alert(1))",
        "<!-- ]]> &lt;b&gt; &amp; {{ 7 * 7 }} {% raw %}",
        "`<b>` ``` | a | \\| # *b* _c_",
    )
)
FILE_NAME = "<img src=x onerror=alert(1)>\"'`|"
LETTERS = str.maketrans("<>\"'&`|[]()#*_\\\n{}", "‹›“’＆‵¦⁅⁆⁽⁾＃∗‗⧵⏎❴❵")


class Elements(HTMLParser):
    """A page's elements with the names of their attributes, and its text."""

    def __init__(self, page: str):
        super().__init__()
        self.found: list[tuple[str, tuple[str, ...]]] = []
        self.links: list[str] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, tuple(name for name, _ in attrs)))
        self.links += [value or "" for name, value in attrs if name.endswith(("href", "src"))]

    def handle_comment(self, data: str) -> None:
        self.found.append(("comment", ()))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def assert_same_elements(page: str, harmless: str) -> None:
    """Of text that is full of markup as of text that has none."""
    found, expected = Elements(page), Elements(harmless)
    assert found.found == expected.found
    assert not [name for _, names in found.found for name in names if name.startswith("on")]
    assert all(link.startswith(("#", "data:")) for link in found.links)


def run_of(folder: Path, text: str, name: str) -> RunDir:
    """A finished run in which everything that can be text is this one."""
    run = RunDir(folder / name)
    run.thumbnails.mkdir(parents=True)
    noise(40, 20).save(run.thumbnails / f"{name}.png")
    scores = {side: {"exact_match": right} for side, right in (("base", 0.0), ("adapter", 1.0))}
    row = {"where": f"{text}:1", "question": text, "references": [text, text], "scores": scores}
    row |= {"base": text, "adapter": f"{text}!", "images": [f"images/{name}.png"]}
    row |= {"views": [[[0, 0, 20, 20, 56, 42], [0, 0, 40, 20, 112, 84]]]}
    write_jsonl(run.predictions, [row, row | {"base": None, "references": []}])
    write_jsonl(run.skipped, [{"where": text, "reason": text}])
    write_jsonl(run.metrics, [{"step": i, "loss": 1.0 / i, text: 1.0} for i in (1, 2, 3)])
    write_json(run.environment, {text: text, "versions": {text: [text]}})
    figures = {"exact_match": 0.5, text: 0.25}
    found = {"interval": [0.1, 0.2], "verdict": text}
    summary = {"base": figures, "adapter": figures, "device": text, "num_eval_rows": 2}
    summary |= {"differences": dict.fromkeys(figures, found)}
    write_json(run.summary, summary)
    write_json(run.data, {"train": {"num_rows": 2, text: 2}, text: {"num_rows": 2}})
    (run.evaluations / name).mkdir(parents=True)
    write_json(
        run.evaluations / name / "summary.json",
        summary | {"paper": {"metric": text, "figure": text}},
    )
    run.recipe.write_text(json.dumps({"model": {"name": text}, "adapter": {"method": text}}))
    return run


def report_of(folder: Path, text: str, name: str) -> str:
    return write_report(run_of(folder, text, name)).read_text(encoding="utf-8")


def test_markup_in_rows_answers_names_and_recipes_is_text_in_the_report(tmp_path: Path) -> None:
    page = report_of(tmp_path, HOSTILE, FILE_NAME)
    harmless = HOSTILE.translate(LETTERS)
    assert_same_elements(page, report_of(tmp_path, harmless, FILE_NAME.translate(LETTERS)))
    text = "".join(Elements(page).texts)
    assert text.count(HOSTILE) >= 12
    assert FILE_NAME in text
    assert "49" not in text  # {{ 7 * 7 }}


def check_page_of(folder: Path, text: str) -> str:
    folder.mkdir()
    result = found(folder, [bad(1, text), bad(2, f"image {text!r} is cut short")], [bad(1, text)])
    result.recipe_name = text
    model = result.recipe.model.model_copy(update={"name": text, "revision": text})
    result.recipe = result.recipe.model_copy(update={"model": model})
    part = result.parts[0]
    entry = replace(part.entries[0], shown=text, format_name=text, same_as=(text,))
    longest = [replace(part.longest[0], where=text)]
    result.parts[0] = replace(part, entries=[entry], longest=longest, changes={text: 1})
    return write_check_page(result, folder / "check.html").read_text(encoding="utf-8")


def test_markup_in_rows_and_names_is_text_in_the_page_of_a_check(tmp_path: Path) -> None:
    page = check_page_of(tmp_path / "a", HOSTILE)
    assert_same_elements(page, check_page_of(tmp_path / "b", HOSTILE.translate(LETTERS)))
    assert "".join(Elements(page).texts).count(HOSTILE) >= 6


def preview_of(processor: Any, folder: Path, text: str) -> str:
    row = make_row(processor, talk(text, text, text), [noise(56, 56)], where=text, change=text)
    path = write_preview(
        [row],
        processor,
        folder / "preview.html",
        title=text,
        model=text,
        images=NANO_IMAGES,
        problems=[(text, text)],
    )
    return path.read_text(encoding="utf-8")


def test_markup_in_rows_and_names_is_text_in_the_preview(
    nano_processor: Any, tmp_path: Path
) -> None:
    """Its elements follow the tokens, so that their kinds are compared, not their number."""
    page = Elements(preview_of(nano_processor, tmp_path, HOSTILE))
    harmless = Elements(preview_of(nano_processor, tmp_path, HOSTILE.translate(LETTERS)))
    assert set(page.found) <= set(harmless.found)
    assert all(link.startswith(("#", "data:")) for link in page.links)
    assert "".join(page.texts).count(HOSTILE) >= 6


@pytest.mark.slow
@needs_browser
def test_a_browser_runs_nothing_that_stands_in_a_row(nano_processor: Any, tmp_path: Path) -> None:
    """Without the policy that forbids all scripts: a hole would then be one."""
    title = HOSTILE.replace("alert(1)", "document.title=/ran/.source")
    pages = {
        "report": report_of(tmp_path, title, FILE_NAME),
        "check": check_page_of(tmp_path / "a", title),
        "preview": preview_of(nano_processor, tmp_path, title),
    }
    for name, page in pages.items():
        policy = re.search(r'<meta http-equiv="Content-Security-Policy"[^>]*>', page)
        assert policy
        looked = tmp_path / "pages" / f"{name}.html"
        looked.parent.mkdir(exist_ok=True)
        looked.write_text(page.replace(policy[0], ""), encoding="utf-8")
        dom = run_chromium("--dump-dom", looked, "--virtual-time-budget=2000")
        assert "<title>ran</title>" not in dom
        assert Elements(dom).found.count(("script", ())) == 0


def card_of_recipe(folder: Path, text: str, name: str) -> str:
    source = {"path": f"data/{name}", "format": "cord", "question": text}
    recipe = {
        "model": {"name": "user/base", "revision": text},
        "data": {"train": [source], "eval": [source | {"path": f"data/held-out-{name}"}]},
        "output": {"dir": f"runs/{name}"},
    }
    path = folder / "card.yaml"
    path.write_text(json.dumps(recipe))
    run = RunDir(folder / "card")
    run.path.mkdir(exist_ok=True)
    write_json(run.environment, dict.fromkeys(("vlm_recipes", *PACKAGES), "1.0"))
    write_json(run.summary, {"num_train_rows": 3, "num_eval_rows": 2})
    publication = Publication("user/name", "user/base", base_class="Idefics2")
    return card_of(run, load_recipe(path, check_paths=False), publication)


PACKAGES = ("torch", "transformers", "trl", "peft")


def test_markup_in_names_and_recipes_is_text_in_the_card(tmp_path: Path) -> None:
    card = card_of_recipe(tmp_path, HOSTILE, FILE_NAME)
    harmless = card_of_recipe(tmp_path, HOSTILE.translate(LETTERS), FILE_NAME.translate(LETTERS))

    def elements(card: str) -> list[Any]:
        tokens = MarkdownIt("commonmark").enable("table").parse(card.split("---\n", 2)[2])
        flat = [inner for token in tokens for inner in (token, *(token.children or ()))]
        return [(token.type, token.tag, token.attrs) for token in flat]

    assert elements(card) == elements(harmless)
    assert not [kind for kind, *_ in elements(card) if kind.startswith("html")]
    (code,) = re.findall(r"```python\n(.*?)\n```\n", card, re.S)
    constants = [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]
    assert HOSTILE in constants


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("apache-2.0", "apache-2.0"), ("<b>mit", None), ("[a](b)", None), (["mit"], None), (7, None)],
)
def test_a_licence_is_taken_from_the_base_s_page_where_it_is_a_name(theirs: Any, ours: Any) -> None:
    page = SimpleNamespace(card_data={"license": theirs})
    api: Any = SimpleNamespace(model_info=lambda base: page)
    assert _licence_of(api, "user/base") == ours


@pytest.mark.parametrize("base", ["a](javascript:x)", '"+x+"', "../base", "https://me:pw@host/a"])
def test_a_base_is_named_as_on_the_hub_or_not_at_all(made: Made, base: str) -> None:
    with pytest.raises(HubError, match="is no name of a base on the Hub"):
        push(made.run, "user/name", base=base, dry_run=True, console=QUIET)


# Secrets.


@pytest.mark.slow
def test_no_secret_of_the_environment_or_of_a_url_comes_to_stand_anywhere(
    dataset: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = dataset(data={"bad_rows": "skip"}, training={"max_steps": 2})
    urls = ("https://me:in-url-1@host/a.png", "https://host/a.png?X-Amz-Signature=in-url-2")
    with (tmp_path / "train.jsonl").open("a") as file:
        file.writelines(json.dumps(chat_row("What?", "A", url)) + "\n" for url in urls)
    names = ("HF_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY", "MY_PASSWORD")
    secrets = {name: f"in-environment-{i}" for i, name in enumerate(names)}
    environment = os.environ | secrets | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    run = tmp_path / "run"
    said = b""
    for command in (
        ["check", str(recipe), "--out", str(tmp_path / "checked")],
        ["train", str(recipe)],
        ["push", str(run), "--to", "user/name", "--dry-run"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "finetune", *command],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            check=False,
        )
        said += done.stdout + done.stderr
    written = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    written |= {path: path.read_bytes() for path in tmp_path.glob("checked*/**/*.*")}
    assert b"https://...@host/a.png" in written[run / "skipped.jsonl"]
    assert (run / "report.html") in written
    assert b"would go to" in said
    for path, data in (written | {Path("standard error"): said}).items():
        for secret in (*secrets.values(), "in-url-1", "in-url-2"):
            assert secret.encode() not in data, (path, secret)
