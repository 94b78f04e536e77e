"""nano's tokenizer, processor and untrained weights, and how it is saved and asked."""

import random
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GenerationConfig,
    Idefics2Config,
    Idefics2ForConditionalGeneration,
    Idefics2Processor,
    PreTrainedTokenizerFast,
)
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil

from scripts.drawing import MAX_CHARS, MAX_LINES, PATCH_PX
from scripts.reading import BPE_CORPUS, draw_reading

NUM_LATENTS = MAX_LINES * MAX_CHARS  # latent 8 * line + i is taught to hold character i of the line
HIDDEN = 128

# Idefics2's own template: no space after "User:" when an image comes first, no BOS.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% elif part['type'] == 'image' %}{{ '<image>' }}{% endif %}"
    "{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE whose merges come from question words and JSON punctuation only.

    No merge joins capitals or digits, so every character of a picture's text is its own token.
    """
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=448,
        special_tokens=["<unk>", "<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=1,
    )
    core.train_from_iterator(BPE_CORPUS, trainer)
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A",
        pair="<s> $A <s> $B",
        special_tokens=[("<s>", core.token_to_id("<s>"))],
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        padding_side="left",
        model_max_length=2048,
    )
    tokenizer.add_special_tokens(
        {
            "additional_special_tokens": [
                "<fake_token_around_image>",
                "<image>",
                "<end_of_utterance>",
            ]
        }
    )
    return tokenizer


def build_processor(tokenizer: PreTrainedTokenizerFast) -> Idefics2Processor:
    image_processor = Idefics2ImageProcessorPil(
        do_image_splitting=False,
        # A larger shortest edge would enlarge the little pictures nano is trained on.
        size={"longest_edge": 224, "shortest_edge": 28},
    )
    return Idefics2Processor(
        image_processor, tokenizer, image_seq_len=NUM_LATENTS, chat_template=CHAT_TEMPLATE
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> Idefics2ForConditionalGeneration:
    config = Idefics2Config(
        image_token_id=cast(int, tokenizer.convert_tokens_to_ids("<image>")),
        text_config={
            "model_type": "mistral",
            "vocab_size": len(tokenizer),
            "hidden_size": HIDDEN,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "max_position_embeddings": 2048,
            "sliding_window": None,
            "rms_norm_eps": 1e-5,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
        vision_config={
            "hidden_size": HIDDEN,
            "intermediate_size": 4 * HIDDEN,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "patch_size": PATCH_PX,
            "image_size": 224,
        },
        perceiver_config={
            "hidden_size": HIDDEN,
            "resampler_n_latents": NUM_LATENTS,
            "resampler_depth": 2,
            "resampler_n_heads": 4,
            "resampler_head_dim": 32,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-5,
        },
        tie_word_embeddings=False,
    )
    # On a CPU in bfloat16 the fused attention's backward alone took 43% of a step.
    model: Any = Idefics2ForConditionalGeneration._from_config(config, attn_implementation="eager")
    with torch.no_grad():
        # The library starts the latents as ones; all alike, they would stay alike.
        model.model.connector.perceiver_resampler.latents.normal_(0, 1.0)
        model.model.vision_model.embeddings.position_embedding.weight.copy_(
            0.4 * sinusoids_2d(side=16, width=HIDDEN)
        )
    eos = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<end_of_utterance>")]
    markers = ("<fake_token_around_image>", "<image>")
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=eos,
        pad_token_id=tokenizer.pad_token_id,
        bad_words_ids=[[tokenizer.convert_tokens_to_ids(token)] for token in markers],
    )
    return model


def sinusoids_2d(side: int, width: int) -> torch.Tensor:
    """[side * side, width]: half of them for the row, half for the column; a start only."""
    angles = torch.arange(side)[:, None] / 16 ** (torch.arange(width // 4) / (width // 4))[None]
    axis = torch.cat((angles.sin(), angles.cos()), dim=1)
    rows = axis[:, None].expand(side, side, -1)
    columns = axis[None, :].expand(side, side, -1)
    return torch.cat((rows, columns), dim=2).reshape(side * side, width)


def save(
    model: Idefics2ForConditionalGeneration, processor: Idefics2Processor, folder: Path
) -> None:
    """bfloat16 weights and the processor's files, laid out as on the Hub."""
    rounded: Any = Idefics2ForConditionalGeneration(model.config)
    rounded.to(torch.bfloat16)
    rounded.load_state_dict(model.state_dict())
    spread_unwritten_rows(rounded, processor.tokenizer)
    rounded.generation_config = model.generation_config
    rounded.save_pretrained(folder)
    processor.save_pretrained(folder)


@torch.no_grad()
def spread_unwritten_rows(
    model: Idefics2ForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, seed: int = 0
) -> None:
    """Tell apart, in the head, the pieces that no answer of the training holds.

    They are only ever pushed down, all in one direction (cosine 0.996 between them), and an adapter
    that leaves the head frozen could then write the right one but never be sure of it: its loss
    stayed near ln 30 on every such piece. Noise as large as a trained row parts them; what is read
    stays the same, since they stay as far down as they were.
    """
    rng = random.Random(seed)
    answers = [" " + draw_reading(rng, 3, MAX_CHARS).answer for _ in range(2000)]
    written = {i for ids in tokenizer(answers, add_special_tokens=False).input_ids for i in ids}
    written.add(tokenizer.convert_tokens_to_ids("<end_of_utterance>"))
    unwritten = [i for i in range(len(tokenizer)) if i not in written]
    rows = model.lm_head.weight
    size = rows[sorted(written)].float().norm(dim=1).mean() / rows.shape[1] ** 0.5
    noise = torch.randn(
        len(unwritten), rows.shape[1], generator=torch.Generator().manual_seed(seed)
    )
    rows[unwritten] = (rows[unwritten].float() + size * noise).to(rows.dtype)


def render_prompt(processor: Any, question: str) -> str:
    content = [{"type": "image"}, {"type": "text", "text": question}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )


def read(
    model: Any, processor: Any, pictures: list[Image.Image], questions: list[str]
) -> list[str]:
    """Answers in words, through the processor and greedy `generate()`."""
    inputs = processor(
        text=[render_prompt(processor, question) for question in questions],
        images=[[picture] for picture in pictures],
        padding=True,
        return_tensors="pt",
    )
    output = model.generate(**inputs, max_new_tokens=48, do_sample=False)
    new = output[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]
