"""The oracle: what the library's own processor makes of a conversation."""

from typing import Any

from PIL import Image as PilImage
from transformers import BatchFeature

from data_formats.chat import Conversation, Image


def stock_inputs(
    processor: Any,
    conversation: Conversation,
    images: list[PilImage.Image],
    *,
    generation_prompt: bool,
    **variables: Any,
) -> BatchFeature:
    """Ids and tensors, with the template in use; `variables` are for it."""
    remaining = iter(images)
    messages = [
        {
            "role": message.role,
            "content": [
                {"type": "image", "image": next(remaining)}
                if isinstance(part, Image)
                else {"type": "text", "text": part.text}
                for part in message.content
            ],
        }
        for message in conversation.messages
    ]
    return processor.apply_chat_template(
        messages,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=generation_prompt,
        **variables,
    )
