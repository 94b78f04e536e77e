"""Idefics2: SigLIP, a perceiver that pools each view to a fixed number of latents, Mistral.

Source: arXiv 2405.02246 and transformers v5.23, models/idefics2.
"""

from typing import Any

from finetune.families.family import Family, Part

_MLP = ("gate_proj", "up_proj", "down_proj")


def copy_text_eps_to_perceiver(config: Any) -> None:
    """Give the perceiver the text model's epsilon, with which it was trained.

    The configuration on the Hub does not name it, and the library's default has since become 1e-6
    instead of 1e-5.
    """
    config.perceiver_config.rms_norm_eps = config.text_config.rms_norm_eps


def position_table_edge(config: Any) -> int:
    """The side of the square that the table of patch positions was trained on, in pixels."""
    return config.vision_config.image_size


IDEFICS2 = Family(
    model_type="idefics2",
    parts={
        "language": Part(
            prefixes=("model.text_model",),
            linears=("q_proj", "k_proj", "v_proj", "o_proj", *_MLP),
        ),
        "connector": Part(
            prefixes=("model.connector.modality_projection", "model.connector.perceiver_resampler"),
            linears=("q_proj", "k_proj", "v_proj", "o_proj", *_MLP),
        ),
        "vision": Part(
            prefixes=("model.vision_model",),
            linears=("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
        ),
    },
    turn_end_token="<end_of_utterance>",
    image_tokens=("<image>", "<fake_token_around_image>"),
    views_when_split=5,
    adjust_config=copy_text_eps_to_perceiver,
    trained_edge_px=position_table_edge,
)
