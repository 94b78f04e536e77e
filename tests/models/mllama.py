"""Llama 3.2 Vision without a download: a tiny one as the Hub stores it, and the 11B on the meta
device.
"""

import json
from functools import cache, partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    MllamaConfig,
    MllamaForConditionalGeneration,
    MllamaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

from finetune.families.mllama import DATE
from tests.models import stock

PARAMETERS = {
    "vision": 863_567_379,
    "connector": 1_776_359_440,
    "language": 8_030_294_016,
    "total": 10_670_220_835,
}
LORA = {
    ("language",): 20_971_520,
    ("connector",): 5_337_088,
    ("vision",): 7_372_800,
    ("language", "connector"): 26_308_608,
    ("language", "connector", "vision"): 33_681_408,
}

SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|finetune_right_pad_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
)
IMAGE = "<|image|>"

_USER_SYSTEM = """\
{%- if messages[0]['role'] == 'system' %}
    {%- if messages[0]['content'] is string %}
        {%- set system_message = messages[0]['content']|trim %}
    {%- else %}
        {%- set system_message = messages[0]['content'][0]['text']|trim %}
    {%- endif %}
    {%- set messages = messages[1:] %}
    {%- set has_system = true %}
{%- else %}
    {%- set system_message = "" %}
    {%- set has_system = false %}
{%- endif %}
"""
_FIRST_USER_SYSTEM = """\
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
    {%- set has_system = true %}
{%- else %}
    {%- set system_message = "" %}
    {%- set has_system = false %}
{%- endif %}
"""


def _template(system: str) -> str:
    """The chat template of Llama-3.2-11B-Vision-Instruct, but for its tools: a system turn with the
    date where there is no image, or where one was given.
    """
    return (
        "{{- bos_token }}\n"
        "{%- if not date_string is defined %}\n"
        '    {%- if strftime_now is defined %}{%- set date_string = strftime_now("%d %b %Y") %}\n'
        '    {%- else %}{%- set date_string = "26 Jul 2024" %}{%- endif %}\n'
        "{%- endif %}\n" + system + "{%- set found = namespace(images=false) %}\n"
        "{%- for message in messages %}{%- for part in message['content'] %}\n"
        "    {%- if part['type'] == 'image' %}{%- set found.images = true %}{%- endif %}\n"
        "{%- endfor %}{%- endfor %}\n"
        "{%- if has_system or not found.images %}\n"
        '    {{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}\n'
        '    {{- "Cutting Knowledge Date: December 2023\\n" }}\n'
        '    {{- "Today Date: " + date_string + "\\n\\n" }}\n'
        '    {{- system_message + "<|eot_id|>" }}\n'
        "{%- endif %}\n"
        "{%- for message in messages %}\n"
        "    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}\n"
        "    {%- for part in message['content'] %}\n"
        "        {%- if part['type'] == 'image' %}{{- '<|image|>' }}\n"
        "        {%- else %}{{- part['text'] }}{%- endif %}\n"
        "    {%- endfor %}\n"
        "    {{- '<|eot_id|>' }}\n"
        "{%- endfor %}\n"
        "{%- if add_generation_prompt %}\n"
        "    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}\n"
        "{%- endif %}\n"
    )


TEMPLATE = _template(_USER_SYSTEM)
FIRST_TEMPLATE = _template(_FIRST_USER_SYSTEM)
"""As in the first revisions on the Hub, before typed parts of a system turn were read."""


def build_tokenizer() -> Tokenizer:
    """A small stand-in with the special tokens at the end, as in Llama 3, and the image token one
    past the rows of the head.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    sample = (
        "What is written on the sign? Describe this image. The total is 12.50 and a cat sleeps."
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, min_frequency=1, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([sample], trainer)
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in SPECIAL_TOKENS])
    tokenizer.add_special_tokens([AddedToken(IMAGE, normalized=False)])
    tokenizer.post_processor = _begins_with(tokenizer, SPECIAL_TOKENS[0])
    return tokenizer


@cache
def real_processor() -> Any:
    """The processor of Llama-3.2-11B-Vision-Instruct, with its vocabulary from llama-models and the
    numbers that the Hub gives to special tokens.
    """
    converter = TikTokenConverter(str(files("llama_models") / "llama3/tokenizer.model"))
    special = [*SPECIAL_TOKENS[:2], *(f"<|reserved_special_token_{i}|>" for i in range(2))]
    special += [SPECIAL_TOKENS[2], "<|step_id|>", *SPECIAL_TOKENS[3:]]
    special += [f"<|reserved_special_token_{i}|>" for i in range(2, 2 + 256 - len(special))]
    converter.extra_special_tokens = [*special, IMAGE]
    backend = converter.converted()
    bos = SPECIAL_TOKENS[0]
    backend.post_processor = _begins_with(backend, bos)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=bos,
        eos_token="<|eot_id|>",
        pad_token="<|finetune_right_pad_id|>",
    )
    images = MllamaImageProcessorPil(size={"height": 560, "width": 560})
    return MllamaProcessor(images, tokenizer, chat_template=TEMPLATE)


def _begins_with(tokenizer: Tokenizer, bos: str) -> Any:
    return processors.TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos} $B",
        special_tokens=[(bos, tokenizer.token_to_id(bos))],
    )


def save_tiny(folder: Path, *, template: str | None = TEMPLATE) -> None:
    """A tiny random Llama-3.2-Vision-Instruct, laid out as on the Hub; the base without a template.

    Its gates are open: as the library initialises them, no image would be seen.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    token_id = tokenizer.token_to_id
    pad = token_id("<|finetune_right_pad_id|>")
    ids = {"bos_token_id": token_id(SPECIAL_TOKENS[0]), "pad_token_id": pad}
    ends = [token_id(t) for t in ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")]
    if template is None:
        ends = ends[:1]
    config = {
        "architectures": ["MllamaForConditionalGeneration"],
        "image_token_index": token_id(IMAGE),
        "model_type": "mllama",
        "text_config": {
            "model_type": "mllama_text_model",
            "vocab_size": token_id(IMAGE),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 4,
            "cross_attention_layers": [1, 3],
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "hidden_act": "silu",
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "rope_scaling": {
                "factor": 8.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
            "eos_token_id": ends,
            "tie_word_embeddings": False,
            "use_cache": True,
            **ids,
        },
        "torch_dtype": "float32",
        "transformers_version": "4.45.0.dev0",
        "vision_config": {
            "model_type": "mllama_vision_model",
            "hidden_size": 16,
            "intermediate_size": 32,
            "attention_heads": 2,
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "intermediate_layers_indices": [0, 1],
            "vision_output_dim": 48,
            "image_size": 28,
            "patch_size": 14,
            "max_num_tiles": 4,
            "hidden_act": "gelu",
            "norm_eps": 1e-5,
        },
    }
    _write(folder / "config.json", config)
    _write(folder / "generation_config.json", {"eos_token_id": ends, **ids})
    names = {
        "bos_token": SPECIAL_TOKENS[0],
        "eos_token": "<|eot_id|>" if template else "<|end_of_text|>",
        "pad_token": "<|finetune_right_pad_id|>",
    }
    _write(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 131072, **names},
    )
    _write(folder / "special_tokens_map.json", names)
    _write(
        folder / "preprocessor_config.json",
        {
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_pad": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_processor_type": "MllamaImageProcessor",
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "max_image_tiles": 4,
            "resample": 2,
            "rescale_factor": 0.00392156862745098,
            "size": {"height": 28, "width": 28},
        },
    )
    if template:
        _write(folder / "chat_template.json", {"chat_template": template})
    torch.manual_seed(0)
    model: Any = MllamaForConditionalGeneration(MllamaConfig.from_pretrained(folder))
    weights = {}
    for name, tensor in model.state_dict().items():
        opened = torch.full_like(tensor, 0.7) if name.endswith("gate") else tensor * 4
        weights[_old_name(name)] = tensor.clone() if "norm" in name else opened
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def full_size() -> Any:
    """Llama-3.2-11B-Vision-Instruct on the meta device: the library's defaults, which are those of
    the base, and tiles of 560 pixels instead of its 448.

    The total is the one that the Hub shows for the checkpoint.
    """
    config = MllamaConfig(vision_config={"image_size": 560}, text_config={"vocab_size": 128256})
    with torch.device("meta"):
        return MllamaForConditionalGeneration(config)


stock_inputs = partial(stock.stock_inputs, date_string=DATE)


def old_adapter_keys(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """An adapter's weights under the names that PEFT gave them before transformers 4.52."""
    root = "base_model.model."
    return {root + _old_name(key.removeprefix(root)): value for key, value in weights.items()}


def _old_name(name: str) -> str:
    for new, old in (
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
        ("model.vision_model.", "vision_model."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
    ):
        if name.startswith(new):
            return old + name.removeprefix(new)
    raise AssertionError(f"no old name for {name}")


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")
