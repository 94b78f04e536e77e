"""Write a small file of every format, each in the container it is met in most, with its pictures.

    python -m scripts.make_format_examples [--out docs/examples/data]

docs/data.md stands on them, and the tests run `check`, `preview` and `convert` on each.
"""

import argparse
import base64
import gzip
import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset
from PIL import Image, ImageDraw, ImageFont

Rows = list[dict[str, Any]]

PRICES = {"tea": "2.40", "milk": "1.10", "rice": "3.75"}
SHAPES = ("circle", "square", "triangle")
HEIGHTS = {"a": 4, "b": 7, "c": 2}

RECIPE = """\
# finetune check docs/examples/data/recipe.yaml data.train.0.path=docs/examples/data/docvqa.parquet
#
# For the files beside it: any of them by data.train.0.path, with nano, which needs no download.

model:
  name: nano
  dtype: float32

images:
  split: never
  longest_edge_px: 224
  shortest_edge_px: 28

data:
  train:
    - path: chat/rows.jsonl

output:
  dir: runs/format-examples
"""


def draw_tag(name: str) -> Image.Image:
    """A price tag, 98 x 56 px."""
    picture = Image.new("RGB", (98, 56), "white")
    draw = ImageDraw.Draw(picture)
    draw.rectangle((2, 2, 95, 53), outline="black", width=2)
    font = ImageFont.load_default(16)
    draw.text((10, 7), name, fill="black", font=font)
    draw.text((10, 29), PRICES[name], fill="black", font=font)
    return picture


def draw_shape(name: str) -> Image.Image:
    """A filled shape, 70 x 70 px."""
    picture = Image.new("RGB", (70, 70), "white")
    draw = ImageDraw.Draw(picture)
    if name == "circle":
        draw.ellipse((10, 10, 60, 60), fill="red")
    elif name == "square":
        draw.rectangle((12, 12, 58, 58), fill="blue")
    else:
        draw.polygon(((35, 8), (62, 60), (8, 60)), fill="green")
    return picture


def draw_chart() -> Image.Image:
    """Three bars with their names, 112 x 84 px."""
    picture = Image.new("RGB", (112, 84), "white")
    draw = ImageDraw.Draw(picture)
    draw.line((8, 66, 104, 66), fill="black")
    for i, (name, height) in enumerate(HEIGHTS.items()):
        left = 16 + 32 * i
        draw.rectangle((left, 66 - 8 * height, left + 18, 65), fill="steelblue")
        draw.text((left + 6, 67), name, fill="black", font=ImageFont.load_default(13))
    return picture


def png(picture: Image.Image) -> bytes:
    """The picture as a PNG file."""
    file = io.BytesIO()
    picture.quantize(16).save(file, "PNG", optimize=True)
    return file.getvalue()


TAGS = {name: png(draw_tag(name)) for name in PRICES}
FIGURES = {name: png(draw_shape(name)) for name in SHAPES}
CHART = png(draw_chart())


def write_examples(out: Path) -> None:
    """All files under `out`: those that name their pictures by path have a folder of their own."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    chat(out / "chat")
    openai(out)
    llava(out / "llava")
    sharegpt(out / "sharegpt")
    llama_factory(out / "llama-factory")
    ms_swift(out / "ms-swift")
    mantis(out)
    cauldron(out)
    docvqa(out)
    textvqa(out / "textvqa")
    vqav2(out)
    chartqa(out / "chartqa")
    mmmu(out)
    cord(out / "cord")
    coco_captions(out / "coco-captions")
    columns(out / "columns")
    containers(out)
    faulty(out / "faulty")


def chat(folder: Path) -> None:
    """JSON Lines, pictures beside them by path."""
    write_pictures(folder / "scans", TAGS, ".png")
    rows = [ask_price(f"scans/{name}.png", price) for name, price in PRICES.items()]
    write_lines(folder / "rows.jsonl", rows)


def openai(folder: Path) -> None:
    """A training file of OpenAI's, pictures as data URIs; plain and gzip-compressed."""
    rows = []
    for name, price in PRICES.items():
        uri = "data:image/png;base64," + base64.b64encode(TAGS[name]).decode()
        content = [
            {"type": "text", "text": "What does it cost?"},
            {"type": "image_url", "image_url": {"url": uri}},
        ]
        rows.append(
            {
                "messages": [
                    {"role": "system", "content": "You read price tags."},
                    {"role": "user", "content": content},
                    {"role": "assistant", "content": price, "weight": 1},
                ]
            }
        )
    write_lines(folder / "openai.jsonl", rows)
    text = (folder / "openai.jsonl").read_bytes()
    (folder / "openai.jsonl.gz").write_bytes(gzip.compress(text, mtime=0))


def llava(folder: Path) -> None:
    """A JSON list, as llava_v1_5_mix665k.json; the last row is text alone."""
    write_pictures(folder / "images", FIGURES, ".png")
    rows: Rows = [
        {
            "id": f"{number:012d}",
            "image": f"images/{name}.png",
            "conversations": [
                {"from": "human", "value": "<image>\nWhich shape is this?"},
                {"from": "gpt", "value": f"It is a {name}."},
            ],
        }
        for number, name in enumerate(SHAPES)
    ]
    text = [
        {"from": "human", "value": "How many corners has a square?"},
        {"from": "gpt", "value": "Four."},
    ]
    write_document(folder / "rows.json", [*rows, {"id": "text_0", "conversations": text}])


def sharegpt(folder: Path) -> None:
    """A JSON list with a column of pictures, and a system turn."""
    write_pictures(folder / "images", FIGURES, ".png")
    rows = [
        {
            "images": [f"images/{name}.png"],
            "conversations": [
                {"from": "system", "value": "Answer in one word."},
                {"from": "human", "value": "<image>Which shape is this?"},
                {"from": "gpt", "value": name},
            ],
        }
        for name in SHAPES
    ]
    write_document(folder / "rows.json", rows)


def llama_factory(folder: Path) -> None:
    """A JSON list as mllm_demo.json: two exchanges a row."""
    write_pictures(folder / "images", TAGS, ".png")
    rows = [
        {
            "messages": [
                {"role": "user", "content": "<image>What is sold here?"},
                {"role": "assistant", "content": name},
                {"role": "user", "content": "What does it cost?"},
                {"role": "assistant", "content": price},
            ],
            "images": [f"images/{name}.png"],
        }
        for name, price in PRICES.items()
    ]
    write_document(folder / "rows.json", rows)


def ms_swift(folder: Path) -> None:
    """JSON Lines of query and response, with a history whose answers are learnt too."""
    write_pictures(folder / "images", TAGS, ".png")
    rows = [
        {
            "query": "What does it cost?",
            "response": price,
            "history": [["What is sold here?", name]],
            "images": [f"images/{name}.png"],
        }
        for name, price in PRICES.items()
    ]
    write_lines(folder / "rows.jsonl", rows)


def mantis(folder: Path) -> None:
    """Parquet with two pictures a row, as bytes."""
    rows = []
    for first, second in (("circle", "square"), ("square", "triangle"), ("triangle", "circle")):
        turns = [
            {"role": "user", "content": "<image> <image> Which shape is in the first picture?"},
            {"role": "assistant", "content": first},
        ]
        images = [as_cell(FIGURES[name], f"{name}.png") for name in (first, second)]
        rows.append({"id": f"{first}_{second}", "images": images, "conversation": turns})
    write_parquet(folder / "mantis.parquet", rows)


def cauldron(folder: Path) -> None:
    """A folder as `Dataset.save_to_disk` writes it: several exchanges about one picture."""
    rows = [
        {
            "images": [as_cell(TAGS[name], None)],
            "texts": [
                {"user": "What is sold here?", "assistant": name, "source": "tags"},
                {"user": "What does it cost?", "assistant": price, "source": "tags"},
            ],
        }
        for name, price in PRICES.items()
    ]
    Dataset.from_list(rows).save_to_disk(str(folder / "cauldron"))


def docvqa(folder: Path) -> None:
    """Parquet as on the Hub: several answers count as right."""
    rows = [
        {
            "questionId": str(300 + number),
            "question": "what does it cost?",
            "image": as_cell(TAGS[name], None),
            "docId": 10 + number,
            "ucsf_document_id": f"tag{number:04d}",
            "answers": [price, f"${price}"],
            "data_split": "train",
        }
        for number, (name, price) in enumerate(PRICES.items())
    ]
    write_parquet(folder / "docvqa.parquet", rows)


def textvqa(folder: Path) -> None:
    """The official annotation file, whose photos are IMAGE_ID.jpg beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, name in enumerate(PRICES):
        image_id = f"{0xA0 + number:016x}"
        file = io.BytesIO()
        draw_tag(name).save(file, "JPEG", quality=80)
        (folder / f"{image_id}.jpg").write_bytes(file.getvalue())
        row = {"question": "what is sold here?", "image_id": image_id, "question_id": number}
        rows.append({**row, "answers": [name, "food", name, name, "food"]})
    document = {"dataset_type": "train", "dataset_name": "textvqa", "data": rows}
    write_document(folder / "rows.json", document)


def vqav2(folder: Path) -> None:
    """Parquet as on the Hub: ten people's answers and the most common one."""
    rows = []
    for number, name in enumerate(SHAPES):
        given = [name] * 8 + ["shape"] * 2
        answers = [
            {"answer": answer, "answer_confidence": "yes", "answer_id": i}
            for i, answer in enumerate(given, start=1)
        ]
        row = {"question": "What is this?", "image": as_cell(FIGURES[name], f"{name}.png")}
        row |= {"multiple_choice_answer": name, "answers": answers, "answer_type": "other"}
        rows.append({**row, "image_id": number, "question_id": number * 1000})
    write_parquet(folder / "vqav2.parquet", rows)


def chartqa(folder: Path) -> None:
    """The repository's JSON list, whose pictures are in the folder `png`."""
    write_pictures(folder / "png", {"41699": CHART}, ".png")
    rows = [
        {"imgname": "41699.png", "query": f"How high is bar {name}?", "label": str(height)}
        for name, height in HEIGHTS.items()
    ]
    write_document(folder / "rows.json", rows)


def mmmu(folder: Path) -> None:
    """Parquet as on the Hub: options as Python writes a list, seven columns for images."""
    options = [f"a {name}" for name in SHAPES]
    rows = []
    for number, name in enumerate(SHAPES):
        row = {"id": f"validation_Shapes_{number + 1}", "question": "Which is <image 1>?"}
        row |= {"options": str(options), "answer": "ABC"[number]}
        row |= {"question_type": "multiple-choice", "subfield": "Shapes"}
        row |= {"image_1": as_cell(FIGURES[name], f"{name}.png"), "image_2": None}
        rows.append(row)
    write_parquet(folder / "mmmu.parquet", rows)


def cord(folder: Path) -> None:
    """A folder of pictures with metadata.jsonl, as Donut's README asks for."""
    write_pictures(folder, TAGS, ".png")
    rows = [
        {
            "file_name": f"{name}.png",
            "ground_truth": json.dumps({"gt_parse": {"item": name, "price": price}}),
        }
        for name, price in PRICES.items()
    ]
    write_lines(folder / "metadata.jsonl", rows)


def coco_captions(folder: Path) -> None:
    """The official annotation document: pictures and captions in two lists."""
    write_pictures(folder, FIGURES, ".png")
    colours = dict(zip(SHAPES, ("red", "blue", "green"), strict=True))
    images = [{"id": i, "file_name": f"{name}.png"} for i, name in enumerate(SHAPES)]
    captions = [
        {"id": 2 * i + k, "image_id": i, "caption": caption}
        for i, name in enumerate(SHAPES)
        for k, caption in enumerate((f"A {colours[name]} {name}.", f"A {name} on white."))
    ]
    write_document(folder / "captions.json", {"images": images, "annotations": captions})


def columns(folder: Path) -> None:
    """A CSV table with names of its own."""
    write_pictures(folder / "scans", TAGS, ".png")
    lines = ["scan,asked,given"]
    lines += [f"scans/{name}.png,What does it cost?,{price}" for name, price in PRICES.items()]
    (folder / "table.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def containers(out: Path) -> None:
    """Two more containers: tar shards of pictures and captions, and a folder for each label."""
    with tarfile.open(out / "captions-000.tar", "w") as archive:
        for number, name in enumerate(SHAPES):
            for suffix, data in ((".png", FIGURES[name]), (".txt", f"A {name}.".encode())):
                member = tarfile.TarInfo(f"{number:06d}{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    for name in SHAPES:
        write_pictures(out / "labels" / name, {"0": FIGURES[name]}, ".png")


def faulty(folder: Path) -> None:
    """Rows as they should not be, and two good ones: for the walk through their messages."""
    write_pictures(folder, TAGS, ".png")
    (folder / "notes.txt").write_text("tea is out of stock\n", encoding="utf-8")
    good = ask_price("tea.png", "2.40")
    misspelt = ask_price("milk.png", "1.10")
    misspelt["messages"][0]["rol"] = misspelt["messages"][0].pop("role")
    lines = [
        json.dumps(good),
        json.dumps(ask_price("tae.png", "2.40")),
        json.dumps(good)[:-20],
        json.dumps(ask_price("https://example.com/tea.png", "2.40")),
        json.dumps(ask_price("../chat/scans/tea.png", "2.40")),
        json.dumps(ask_price("notes.txt", "2.40")),
        json.dumps(ask_price("rice.png", "")),
        json.dumps(misspelt),
        repr(good),
        json.dumps(ask_price("rice.png", "3.75 " * 100)),
        json.dumps(ask_price("rice.png", "3.75")),
    ]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def ask_price(image: str, answer: str) -> dict[str, Any]:
    """A chat row about one picture."""
    asked = [{"type": "image", "image": image}, {"type": "text", "text": "What does it cost?"}]
    return {
        "messages": [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": answer},
        ]
    }


def as_cell(data: bytes, path: str | None) -> dict[str, Any]:
    """An undecoded image as the datasets library stores it."""
    return {"bytes": data, "path": path}


def write_pictures(folder: Path, pictures: dict[str, bytes], suffix: str) -> None:
    """`FOLDER/NAME.SUFFIX` for each picture."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in pictures.items():
        (folder / f"{name}{suffix}").write_bytes(data)


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_document(path: Path, value: Any) -> None:
    """One JSON document, indented."""
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def write_parquet(path: Path, rows: Rows) -> None:
    """A table of the rows; the types are told from them."""
    pq.write_table(pa.Table.from_pylist(rows), path)


def main() -> None:
    """Parse the command line, write, and say where."""
    parser = argparse.ArgumentParser(description="Write a small file of every data format.")
    parser.add_argument("--out", type=Path, default=Path("docs/examples/data"))
    args = parser.parse_args()
    write_examples(args.out)
    print(f"examples in {args.out}")


if __name__ == "__main__":
    main()
