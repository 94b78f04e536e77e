"""The preview, from examples made without files."""

import base64
import html
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PilImage

from data_formats.chat import Conversation, parse_chat
from finetune.data.examples import Example, Fitted
from finetune.data.render import Renderer
from finetune.data.views import ImagePlan, View, cut_views
from finetune.errors import RunDirError
from finetune.families import FAMILIES
from finetune.families.idefics2 import plan_image
from finetune.preview_page import (
    PreviewImage,
    PreviewRow,
    cut_text,
    embed,
    make_spans,
    place_in_picture,
    preview_row,
    visible_parts,
    write_preview,
)
from finetune.recipe import ImagesSection
from tests.browser import needs_browser, run_chromium
from tests.conftest import NANO, NANO_IMAGES, chat_row, noise

SPLIT = ImagesSection(split="always", longest_edge_px=224, shortest_edge_px=28)
MIXED = "这张图片 größer e\u0301 👩🏽\u200d🚀 𠮷\n\n\t  two,  spaces عربي نص\u200cها \u202e fin."
HOSTILE = "</script><b>x</b> &amp; \" ' \x00 \r\n \x85 <!-- ]]> \u2028 \ufeff"
TEXTS = [
    MIXED,
    HOSTILE,
    "\ufffd",
    "a\ufffd\ufffdé\ufffd",
    "\n",
    "    ",
    "漢字" * 20,
    "🧑‍🧑‍🧒‍🧒" * 3,
]


def make_row(
    processor: Any,
    conversation: Conversation,
    pictures: Sequence[PilImage.Image] = (),
    *,
    images: ImagesSection = NANO_IMAGES,
    where: str = "data/train.jsonl:7",
    change: str = "",
) -> PreviewRow:
    plans = [plan_image(*picture.size, images) for picture in pictures]
    renderer = Renderer(processor, FAMILIES["idefics2"])
    rendered = renderer.render(conversation, plans)
    views = [
        view
        for picture, plan in zip(pictures, plans, strict=True)
        for view in cut_views(picture, plan)
    ]
    example = Example(where, rendered.input_ids, rendered.loss_mask, views)
    numbers = range(len(pictures))
    fitted = Fitted(
        conversation,
        numbers,
        [picture.size for picture in pictures],
        plans,
        rendered,
        "fewer_views" if change else "",
        change,
    )
    return PreviewRow.of_fitted(example, fitted)


def talk(question: str, answer: str, *images: str) -> Conversation:
    return parse_chat(chat_row(question, answer, *images))


@pytest.fixture(params=["nano", "idefics2"])
def processor(request: pytest.FixtureRequest) -> Any:
    """A byte-level vocabulary, and one of pieces with bytes to fall back on."""
    return request.getfixturevalue(f"{request.param}_processor")


@pytest.fixture
def write(nano_processor: Any, tmp_path: Path):
    """Writes a page of rows; gives its text."""

    def write(*rows: PreviewRow, images: ImagesSection = NANO_IMAGES, **extra: Any) -> str:
        title, out = "recipes/mine.yaml", tmp_path / "preview.html"
        path = write_preview(
            rows, nano_processor, out, title=title, model=NANO.name, images=images, **extra
        )
        return path.read_text(encoding="utf-8")

    return write


def raw_texts(page: str) -> list[str]:
    """What the page says that each span of text is."""
    return [json.loads(html.unescape(raw)) for raw in re.findall(r'\bdata-raw="([^"]*)"', page)]


def words_of(page: str) -> str:
    """The page's text as a reader sees it, on one line."""
    body = re.sub(r"(?s)^.*<body>", "", page)
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]*>", "", body)))


# The text, cut by token.


def bytes_of_tokens(tokenizer: Any, ids: Sequence[int]) -> list[bytes]:
    """The oracle: the bytes of each token, from the vocabulary alone."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # as GPT-2 maps bytes
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable}
    byte_of |= {chr(256 + i): byte for i, byte in enumerate(others)}
    is_byte_level = len(tokenizer) < 10_000
    special = set(tokenizer.all_special_ids) | {
        i for i, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    result = []
    for i, token in zip(ids, tokenizer.convert_ids_to_tokens(list(ids)), strict=True):
        if i in special:
            result.append(token.encode())
        elif is_byte_level:
            result.append(bytes(byte_of[character] for character in token))
        elif re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            result.append(bytes([int(token[3:5], 16)]))
        else:
            result.append(token.replace("▁", " ").encode())
    return result


def is_whole(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


@pytest.mark.parametrize("text", TEXTS)
def test_the_text_is_cut_where_tokens_meet_and_never_within_a_character(processor: Any, text: str):
    ids = make_row(processor, talk(text, "Answer: " + text)).example.input_ids
    pieces = cut_text(processor.tokenizer, ids)
    assert sum(num_tokens for num_tokens, _ in pieces) == len(ids)
    shown = "".join(piece for _, piece in pieces)
    assert shown == processor.tokenizer.decode(ids, skip_special_tokens=False)
    known = bytes_of_tokens(processor.tokenizer, ids)
    position = 0
    for num_tokens, piece in pieces:
        data = known[position : position + num_tokens]
        assert b"".join(data) == piece.encode()
        # as fine as it can be: no shorter run of these tokens is whole characters
        assert not any(is_whole(b"".join(data[:k])) for k in range(1, num_tokens))
        position += num_tokens


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=30))
def test_any_text_is_shown_exactly(nano_processor: Any, text: str):
    tokenizer = nano_processor.tokenizer
    ids = tokenizer(text)["input_ids"]
    assert "".join(piece for _, piece in cut_text(tokenizer, ids)) == tokenizer.decode(ids)


def test_tokens_that_end_within_a_character_are_shown_too(nano_processor: Any):
    tokenizer = nano_processor.tokenizer
    ids = tokenizer("a漢")["input_ids"][:-1]
    assert [piece for _, piece in cut_text(tokenizer, ids)] == ["<s>", "a", "\ufffd"]


def test_a_span_is_learnt_where_its_tokens_are(processor: Any):
    example = make_row(processor, talk(MIXED, MIXED)).example
    spans = make_spans(example, processor)
    mask = [span.learnt for span in spans for _ in span.ids]
    assert mask == example.loss_mask
    assert [i for span in spans for i in span.ids] == example.input_ids
    learnt = "".join(span.text for span in spans if span.learnt)
    assert learnt.strip() == MIXED + "<end_of_utterance>"


def test_image_tokens_are_one_span_a_view(processor: Any):
    pictures = [noise(56, 56), noise(84, 28)]
    row = make_row(processor, talk("Compare.", "No.", "a.png", "b.png"), pictures, images=SPLIT)
    repeats = [s.repeats for s in make_spans(row.example, processor) if s.is_image]
    assert repeats == [processor.image_seq_len] * 10


def test_a_repeated_token_is_parted_where_learning_starts(nano_processor: Any):
    end = nano_processor.tokenizer.convert_tokens_to_ids("<end_of_utterance>")
    example = Example("data/train.jsonl:1", [end] * 3, [False, False, True], [])
    assert [(s.ids, s.learnt) for s in make_spans(example, nano_processor)] == [
        ([end, end], False),
        ([end], True),
    ]


def test_what_is_not_seen_is_named():
    assert list(visible_parts("  a b \n")) == [
        ("space", " "),
        ("space", " "),
        ("text", "a b "),
        ("newline", "\n"),
    ]
    assert list(visible_parts("x\u202e\u00a0\t")) == [
        ("text", "x"),
        ("code", "U+202E"),
        ("code", "U+00A0"),
        ("tab", "\t"),
    ]
    assert list(visible_parts(" ")) == [("space", " ")]


def test_the_line_of_json_holds_all_that_the_model_reads(processor: Any):
    row = make_row(processor, talk(MIXED, "Yes.", "a.png"), [noise(84, 56)], images=SPLIT)
    line = json.loads(json.dumps(preview_row(row.example, processor)))
    assert list(line) == ["where", "input_ids", "loss_mask", "text", "views"]
    assert line["where"] == "data/train.jsonl:7"
    assert len(line["input_ids"]) == len(line["loss_mask"])
    assert line["text"].count("<image>") == 5 * processor.image_seq_len
    assert line["text"].startswith("<s>")
    assert line["views"] == [[42, 28]] * 4 + [[84, 56]]


# The views.


def test_a_light_view_keeps_its_pixels_and_a_heavy_one_its_size():
    view = np.asarray(noise(70, 42)).transpose(2, 0, 1)
    uri, quality = embed(view, 100_000)
    assert quality is None
    assert np.array_equal(np.asarray(picture_in(uri)).transpose(2, 0, 1), view)
    uri, quality = embed(view, 5_000)
    assert quality == 90
    assert picture_in(uri).format == "JPEG"
    assert picture_in(uri).size == (70, 42)
    assert embed(view, 10)[1] == 50


def picture_in(uri: str) -> PilImage.Image:
    return PilImage.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def test_views_are_named_by_their_place_in_the_picture():
    quarters = plan_image(7, 5, SPLIT)
    assert [place_in_picture(quarters, number) for number in range(5)] == [
        "upper left quarter",
        "upper right quarter",
        "lower left quarter",
        "lower right quarter",
        "whole",
    ]
    assert place_in_picture(plan_image(7, 5, NANO_IMAGES), 0) == "whole"
    tiles = ImagePlan((), rows=2, cols=3)
    assert place_in_picture(tiles, 4) == "row 2, column 2"
    assert place_in_picture(tiles, 6) == "whole"


def test_views_stand_in_the_model_s_order_with_their_true_pixels(write, nano_processor: Any):
    pictures = [noise(84, 56, seed=1), noise(30, 60, seed=2)]
    row = make_row(
        nano_processor, talk("Compare.", "No.", "a.png", "b.png"), pictures, images=SPLIT
    )
    page = write(row, images=SPLIT)
    uris = re.findall(r'<img src="([^"]*)"', page)
    shown = [np.asarray(picture_in(uri)).transpose(2, 0, 1) for uri in uris]
    assert len(shown) == 10
    assert all(np.array_equal(a, b) for a, b in zip(shown, row.example.views, strict=True))
    alts = re.findall(r' alt="([^"]*)"', page)
    assert alts[1] == "image 1, view 2 of 5: upper right quarter, 42 x 28"
    assert alts[9] == "image 2, view 5 of 5: whole, 30 x 60"
    assert "image 2: b.png, 30 x 60 px, in 5 views" in words_of(page)


def test_views_are_made_lighter_where_there_are_many_and_the_page_says_so(
    write, nano_processor: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("finetune.preview_page.MAX_VIEWS_BYTES", 60_000)
    row = make_row(nano_processor, talk("What?", "A7", "a.png"), [noise(112, 112)])
    assert "as JPEG" not in write(row)
    words = words_of(write(row, row))
    assert "2 views would take more than 30 kB as PNG and are shown as JPEG (quality 90)" in words
    assert "112 x 112, JPEG 90" in words


# The page.


def test_counts_and_settings_stand_at_the_top(write, nano_processor: Any):
    row = make_row(nano_processor, talk("What?", "A7", "a.png"), [noise(56, 56)])
    tokens, learnt = len(row.example.input_ids), sum(row.example.loss_mask)
    page = write(row, row, num_rows=1234)
    words = words_of(page)
    for fact in ("recipes/mine.yaml", "nano · every picture whole · edges 28 to 224 px"):
        assert fact in words
    assert re.sub(r"(?<=[a-z])(?=\d)", " ", words).count(f"tokens {2 * tokens}") == 1
    assert "2 of 1,234" in words
    assert f"{tokens} tokens, {learnt} learnt ({100 * learnt / tokens:.1f}%), 1 image, 1 view" in (
        words
    )


def test_the_page_holds_the_exact_text_whatever_stands_in_it(write, nano_processor: Any):
    for text in TEXTS:
        row = make_row(nano_processor, talk(text, text))
        assert "".join(raw_texts(write(row))) == preview_row(row.example, nano_processor)["text"]


def test_text_from_outside_is_escaped(write, nano_processor: Any):
    hostile = "</script><b>x"
    row = make_row(
        nano_processor, talk(hostile, hostile, '"><svg onload=1>'), [noise(56, 56)], where="<i>:1"
    )
    page = write(row, problems=[("<u>:2", "image '<em>' not found")])
    assert not re.search(r"<(?:script|b>x|svg|i>|u>|em>)", page)
    assert "&lt;i&gt;:1" in page
    assert "image &#39;&lt;em&gt;&#39; not found" in page


def test_nothing_is_fetched_from_outside_the_page(write, nano_processor: Any):
    page = write(make_row(nano_processor, talk("What?", "A7", "a.png"), [noise(56, 56)]))
    assert not re.search(r"https?://|@import|<link|<script|url\(", page)
    assert all(source.startswith("data:") for source in re.findall(r'\bsrc="([^"]*)', page))
    links = re.findall(r'\bhref="([^"]*)', page)
    assert links == ["#row-1-view-1"]
    assert 'id="row-1-view-1"' in page
    assert "default-src 'none'" in page


def test_a_changed_row_an_unlearnt_row_and_a_bad_row_are_pointed_out(write, nano_processor: Any):
    changed = make_row(nano_processor, talk("What?", "A7"), change="2 turns dropped")
    ids = changed.example.input_ids
    unlearnt = PreviewRow(Example("data/train.jsonl:8", ids, [False] * len(ids), []), [])
    words = words_of(write(changed, unlearnt, problems=[("data/train.jsonl:9", "is torn")]))
    assert "2 turns dropped" in words
    assert words.count("Nothing is learnt from this row.") == 1
    assert "1 row could not be shown data/train.jsonl:9 is torn" in words


def test_a_file_name_that_is_no_utf_8_is_shown_as_far_as_it_can(write, nano_processor: Any):
    row = make_row(
        nano_processor,
        talk("What?", "A7"),
        where=b"caf\xe9.jsonl:1".decode(errors="surrogateescape"),
    )
    assert "caf?.jsonl:1" in write(row)


def test_a_page_without_rows_says_so(write):
    assert "No rows to show." in words_of(write())


def test_an_image_given_in_the_row_itself_is_not_named_by_its_bytes(nano_processor: Any):
    conversation = talk("What?", "A7", "data:image/png;base64,AAAA")
    images = make_row(nano_processor, conversation, [noise(56, 56)]).images
    assert images == [
        PreviewImage("(data URI)", (56, 56), ImagePlan((View((0, 0, 56, 56), 56, 56),)))
    ]


def test_only_a_page_is_replaced(write, tmp_path: Path):
    out = tmp_path / "preview.html"
    write()
    assert "No rows" in write()  # a page of ours
    out.write_text("")
    write()
    out.write_text("model: {name: nano}")
    with pytest.raises(RunDirError, match="holds something else than a page"):
        write()
    assert out.read_text() == "model: {name: nano}"
    out.unlink()
    out.mkdir()
    with pytest.raises(RunDirError, match="give a file with --out"):
        write()
    assert out.is_dir()


def test_a_folder_that_cannot_be_made_is_told(nano_processor: Any, tmp_path: Path):
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "preview.html"
    with pytest.raises(RunDirError, match="cannot be written"):
        write_preview([], nano_processor, out, title="t", model="nano", images=NANO_IMAGES)


# In a browser. The script writes what it measures into the dumped page.

MEASURE = """
<script>
addEventListener("load", () => {
  const luminance = (rgb) => {
    const [r, g, b] = rgb.map((v) => v / 255).map(
      (v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const isClear = (colour) => numbers(colour)[3] === 0;
  const backdrop = (element) => {
    for (; element; element = element.parentElement) {
      const colour = getComputedStyle(element).backgroundColor;
      if (!isClear(colour)) return numbers(colour).slice(0, 3);
    }
  };
  const contrast = (element, pseudo) => {
    const colours = [numbers(getComputedStyle(element, pseudo).color).slice(0, 3),
                     backdrop(element)];
    const [low, high] = colours.map(luminance).sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  };
  document.querySelector("#show-ids").click();
  const tokens = [...document.querySelectorAll(".text .t")].map((t) => ({
    raw: JSON.parse(t.dataset.raw), count: +t.dataset.count, at: +t.dataset.at,
    ids: t.dataset.ids, shown: t.textContent, label: getComputedStyle(t, "::before").content,
    special: t.classList.contains("special"), code: !!t.querySelector(".code"),
    background: getComputedStyle(t).backgroundColor,
    line: getComputedStyle(t).borderBottomWidth, weight: +getComputedStyle(t).fontWeight,
    contrast: Math.min(contrast(t), contrast(t, "::before")),
  }));
  const images = [...document.images].map((i) => [i.naturalWidth, i.naturalHeight]);
  const texts = [...document.querySelectorAll("p, h1, h2, h3, dt, dd, label, .view span, .which")];
  const lowest = Math.min(...texts.map((element) => contrast(element)));
  document.querySelector("#only-learnt").click();
  const visible = [...document.querySelectorAll(".text .t")].map((t) => t.offsetWidth > 0);
  const scripts = document.querySelectorAll("script").length;
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const overflow = document.documentElement.scrollWidth - innerWidth;
  const found = {tokens, images, lowest, visible, scripts, dark, overflow};
  document.body.append(Object.assign(document.createElement("pre"),
    {id: "found", textContent: encodeURIComponent(JSON.stringify(found))}));
});
</script>
"""


def measure(page: str, path: Path) -> dict[str, Any]:
    probed = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page, count=1)
    path.write_text(probed.replace("</head>", MEASURE + "</head>", 1), encoding="utf-8")
    found = re.search(r'<pre id="found">([^<]*)</pre>', run_chromium("--dump-dom", path))
    assert found, "the script did not run"
    return json.loads(unquote(found.group(1)))


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_the_views_and_colours_what_is_learnt(
    write, nano_processor: Any, tmp_path: Path, scheme: str
):
    pictures = [noise(84, 56, seed=1), noise(300, 120, seed=2)]
    conversation = talk(MIXED, f"{MIXED} </script><b>x", "a.png", "b.png")
    row = make_row(nano_processor, conversation, pictures, images=SPLIT)
    page = write(row, images=SPLIT)
    if scheme == "dark":  # the system's wish cannot be set by a flag that every version knows
        page = page.replace("(prefers-color-scheme: dark)", "all")
    found = measure(page, tmp_path / "probed.html")
    example = row.example

    assert found["scripts"] == 1  # the measuring one alone
    assert found["images"] == [[view.shape[2], view.shape[1]] for view in example.views]

    tokens = found["tokens"]
    line = preview_row(example, nano_processor)
    assert "".join(token["raw"] for token in tokens) == line["text"]
    positions = [p for t in tokens for p in range(t["at"], t["at"] + t["count"])]
    assert positions == list(range(len(example.input_ids)))
    assert all(t["shown"] == t["raw"] for t in tokens if not (t["special"] or t["code"]))
    assert sum("24 × <image>" in token["shown"] for token in tokens) == 10

    learnt = [example.loss_mask[token["at"]] for token in tokens]
    of_learnt = {t["background"] for t, is_learnt in zip(tokens, learnt, strict=True) if is_learnt}
    of_context = {t["background"] for t, yes in zip(tokens, learnt, strict=True) if not yes}
    assert len(of_learnt) == 1
    assert not of_learnt & of_context
    # not by colour alone
    assert all((t["weight"] > 500) == yes for t, yes in zip(tokens, learnt, strict=True))
    assert all((t["line"] == "2px") == yes for t, yes in zip(tokens, learnt, strict=True))
    assert found["visible"] == learnt  # with the box "Only learnt text" ticked
    assert [t["label"] for t in tokens] == [f'"{t["ids"]}"' for t in tokens]
    assert min(found["lowest"], *(token["contrast"] for token in tokens)) >= 4.5  # WCAG 2.1 AA


@pytest.mark.slow
@needs_browser
def test_the_page_fits_a_phone(write, nano_processor: Any, tmp_path: Path):
    row = make_row(
        nano_processor, talk("W" * 200, "A7", "a" * 90), [noise(300, 200)], where="d" * 90
    )
    probed = tmp_path / "probed.html"
    write(row)
    page = (tmp_path / "preview.html").read_text(encoding="utf-8")
    # A window of headless Chromium is 500 px wide at least; a frame may be as narrow as a phone
    script = (
        '<body onload="document.title = frames[0].document.documentElement.scrollWidth">'
        '<iframe width="390" height="800" srcdoc="' + html.escape(page) + '"></iframe>'
    )
    probed.write_text(script, encoding="utf-8")
    title = re.search(r"<title>(\d+)</title>", run_chromium("--dump-dom", probed))
    assert title
    assert 0 < int(title.group(1)) <= 390
