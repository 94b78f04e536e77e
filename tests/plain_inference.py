"""Asks a run's adapter its held-out questions through plain transformers and PEFT alone.

    python plain_inference.py BASE_FOLDER RUN IMAGE_FOLDER

Prints a JSON list of [the answer here, the answer in the run's predictions.jsonl].
"""

import json
import sys
from pathlib import Path

import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor


def main(base_folder: str, run: str, image_folder: str) -> None:
    torch.set_num_threads(1)
    base = AutoModelForImageTextToText.from_pretrained(base_folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, f"{run}/adapter").eval()
    processor = AutoProcessor.from_pretrained(f"{run}/adapter")
    answers = []
    for line in Path(run, "evaluation", "predictions.jsonl").read_text().splitlines():
        row = json.loads(line)
        number = int(row["where"].rpartition(":")[2]) - 1
        content = [{"type": "image"}, {"type": "text", "text": row["question"]}]
        prompt = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        image = Image.open(Path(image_folder, f"eval{number}.png"))
        inputs = processor(text=[prompt], images=[[image]], return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        new_tokens = output[:, inputs["input_ids"].shape[1] :]
        text = processor.batch_decode(new_tokens, skip_special_tokens=True)[0]
        answers.append([text.strip(), row["adapter"]])
    assert "finetune" not in sys.modules
    print(json.dumps(answers))


if __name__ == "__main__":
    main(*sys.argv[1:])
