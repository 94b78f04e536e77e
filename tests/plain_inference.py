"""Asks a run's trained model its held-out questions through plain transformers and PEFT alone.

    python plain_inference.py BASE_FOLDER RUN IMAGE_FOLDER

Prints a JSON list of [the answer here, the answer in the run's predictions.jsonl].
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor


def load_trained(base_folder: str, adapter: Path, dtype: Any = torch.float32) -> Any:
    """What a user of the adapter writes: two lines, and a third where it has tokens of its own."""
    if (adapter / "config.json").is_file():
        return AutoModelForImageTextToText.from_pretrained(adapter, dtype=dtype).eval()
    base: Any = AutoModelForImageTextToText.from_pretrained(base_folder, dtype=dtype)
    tokenizer = AutoProcessor.from_pretrained(adapter).tokenizer
    if len(tokenizer) > base.get_input_embeddings().weight.shape[0]:
        base.resize_token_embeddings(len(tokenizer))
    if not (adapter / "adapter_config.json").is_file():
        return base.eval()
    return PeftModel.from_pretrained(base, adapter).eval()


def answer_all(model: Any, processor: Any, run: Path, image_folder: Path) -> list[str]:
    """The model's answers to the questions of predictions.jsonl."""
    answers = []
    for line in (run / "evaluation" / "predictions.jsonl").read_text().splitlines():
        row = json.loads(line)
        number = int(row["where"].rpartition(":")[2]) - 1
        content = [{"type": "image"}, {"type": "text", "text": row["question"]}]
        prompt = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        image = Image.open(image_folder / f"eval{number}.png")
        inputs = processor(text=[prompt], images=[[image]], return_tensors="pt")
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        output = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        new_tokens = output[:, inputs["input_ids"].shape[1] :]
        answers.append(processor.batch_decode(new_tokens, skip_special_tokens=True)[0].strip())
    return answers


def main(base_folder: str, run: str, image_folder: str) -> None:
    torch.set_num_threads(1)
    adapter = Path(run, "adapter")
    model = load_trained(base_folder, adapter)
    processor = AutoProcessor.from_pretrained(adapter)
    here = answer_all(model, processor, Path(run), Path(image_folder))
    assert "finetune" not in sys.modules
    lines = Path(run, "evaluation", "predictions.jsonl").read_text().splitlines()
    there = [json.loads(line)["adapter"] for line in lines]
    print(json.dumps([list(pair) for pair in zip(here, there, strict=True)]))


if __name__ == "__main__":
    main(*sys.argv[1:])
