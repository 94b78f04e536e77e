"""Answers: greedy generation in batches that give what each row gives alone."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from finetune.data.collate import collate
from finetune.data.examples import Example
from finetune.families.family import Family


def generate_answers(
    model: Any,
    processor: Any,
    family: Family,
    prompts: Sequence[Example],
    *,
    max_new_tokens: int,
    batch_size: int,
    packed_vision: bool = False,
    on_batch: Callable[[int], None] = lambda _num_rows: None,
    streamer: BaseStreamer | None = None,
) -> list[str]:
    """The model's answer to each prompt, in the order given; `on_batch` hears how many rows each
    batch held. A `streamer` hears the tokens of a single prompt as they come.

    Prompts of like length go together, padded on the left. An answer ends at the end of the text or
    of the turn, and never holds an image token.
    """
    tokenizer, stop = processor.tokenizer, stopping(model, processor, family)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].input_ids))
    answers = [""] * len(prompts)
    model.eval()
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = collate(
            [prompts[i] for i in chosen],
            processor,
            family,
            padding_side="left",
            packed_vision=packed_vision,
        )
        del batch["labels"]
        inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
        with torch.inference_mode():
            output = model.generate(
                **inputs,
                do_sample=False,
                max_new_tokens=max_new_tokens,
                **stop,
                streamer=streamer,
            )
        new_tokens = output[:, inputs["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(new_tokens, skip_special_tokens=True)
        for i, text in zip(chosen, texts, strict=True):
            answers[i] = text.strip()
        on_batch(len(chosen))
    return answers


def stopping(model: Any, processor: Any, family: Family) -> dict[str, Any]:
    """Settings of generation: an answer ends with the text or the turn, and holds no image."""
    tokenizer = processor.tokenizer
    turn_end = family.template_of(processor).turn_end_token
    # mllama's head has no row for its image token, and so cannot say it
    head_size = model.get_output_embeddings().weight.shape[0]
    image_ids = tokenizer.convert_tokens_to_ids(list(family.image_tokens))
    return {
        "eos_token_id": sorted({tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(turn_end)}),
        "pad_token_id": tokenizer.pad_token_id,
        "bad_words_ids": [[token] for token in image_ids if token < head_size] or None,
    }
