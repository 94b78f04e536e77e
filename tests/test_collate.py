from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_formats.chat import parse_chat
from finetune.data.collate import IGNORED_LABEL, Collator, collate
from finetune.data.examples import Encoder, Example
from finetune.data.images import ImageAccess, decode_image, load_image
from finetune.data.sources import Row
from finetune.errors import DataError
from finetune.families import FAMILIES
from finetune.recipe import ImagesSection
from tests.conftest import chat_row


@pytest.fixture
def rows(tmp_path: Path, picture: Any) -> list[Row]:
    """Pictures of many sizes, none, one or three to a row, short and long answers."""
    for i, size in enumerate([(30, 200), (200, 30), (90, 90), (224, 112), (57, 143)]):
        picture(*size, seed=i).save(tmp_path / f"{i}.png")
    specs = [
        ("What?", "A", ["0.png"]),
        ("No picture here.", "Right, none at all.", []),
        ("Compare these three.", "They differ", ["1.png", "2.png", "3.png"]),
        ("And this one?", "B", ["4.png"]),
    ]
    return [
        Row(f"rows.jsonl:{i + 1}", parse_chat(chat_row(q, a, *files)), ImageAccess(tmp_path))
        for i, (q, a, files) in enumerate(specs)
    ]


def row_losses(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The summed loss of each row, by the stock forward."""
    labels = batch.pop("labels")
    with torch.no_grad():
        logits = model(**batch).logits
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none", ignore_index=IGNORED_LABEL
    )
    return losses.sum(dim=1)


@pytest.mark.parametrize("split", ["never", "always", "auto"])
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_a_batch_gives_each_row_the_loss_it_has_alone(
    nano_model: Any, nano_processor: Any, rows: list[Row], split: Any, padding_side: Any
) -> None:
    images = ImagesSection(split=split, longest_edge_px=112, shortest_edge_px=28)
    nano_processor.image_processor.do_image_splitting = split == "always"
    try:
        encoder = Encoder(nano_processor, FAMILIES["idefics2"], images)
        examples = [encoder.encode(row) for row in rows]
        together = collate(
            examples, nano_processor, FAMILIES["idefics2"], padding_side=padding_side
        )
        alone = [collate([example], nano_processor, FAMILIES["idefics2"]) for example in examples]
    finally:
        nano_processor.image_processor.do_image_splitting = False
    nano_model.eval()
    expected = torch.cat([row_losses(nano_model, batch) for batch in alone])
    # of float32, whose sums are added in other orders on other processors
    torch.testing.assert_close(row_losses(nano_model, together), expected, atol=1e-5, rtol=1e-4)


def test_tensors_are_the_processors(encoder: Encoder, rows: list[Row]) -> None:
    """One batch of rows with images, against the library's processor on the same pictures."""
    processor, chosen = encoder.processor, [rows[0], rows[2], rows[3]]
    ours = collate(
        [encoder.encode(row) for row in chosen], processor, encoder.family, padding_side="left"
    )
    messages, pictures = [], []
    for row in chosen:
        user, assistant = row.conversation.messages
        content = [{"type": "image"} for _ in row.conversation.images()]
        messages.append(
            [
                {"role": "user", "content": [*content, {"type": "text", "text": user.text}]},
                {"role": "assistant", "content": [{"type": "text", "text": assistant.text}]},
            ]
        )
        pictures.append(
            [load_image(part.source, row.image_access) for part in row.conversation.images()]
        )
    texts = processor.apply_chat_template(messages, tokenize=False)
    stock = processor(
        text=texts, images=pictures, padding=True, padding_side="left", return_tensors="pt"
    )
    torch.testing.assert_close(ours["input_ids"], stock["input_ids"])
    torch.testing.assert_close(ours["attention_mask"], stock["attention_mask"])
    torch.testing.assert_close(ours["pixel_values"], stock["pixel_values"], atol=2e-6, rtol=0)
    assert torch.equal(ours["pixel_attention_mask"], stock["pixel_attention_mask"].bool())


def test_labels_are_the_learnt_ids_and_nothing_else(encoder: Encoder, rows: list[Row]) -> None:
    example = encoder.encode(rows[0])
    labels = collate([example], encoder.processor, encoder.family)["labels"][0].tolist()
    expected = [
        token if learnt else IGNORED_LABEL
        for token, learnt in zip(example.input_ids, example.loss_mask, strict=True)
    ]
    assert labels == expected
    assert encoder.processor.image_token_id not in labels


def test_a_text_only_batch_has_no_pixels(encoder: Encoder, rows: list[Row]) -> None:
    batch = collate([encoder.encode(rows[1])] * 2, encoder.processor, encoder.family)
    assert "pixel_values" not in batch


def test_image_tokens_that_do_not_match_the_views_name_the_row(encoder: Encoder) -> None:
    token = encoder.processor.image_token_id
    plan = encoder.family.plan_image(28, 28, encoder.images, encoder.processor.image_processor)
    pixels = np.zeros((3, 28, 28), np.uint8)
    short = Example("data/train.jsonl:7", [1, token, 5], [False] * 3, [pixels], [plan])
    with pytest.raises(DataError, match=r"^data/train\.jsonl:7: 1 image tokens for 1 views"):
        collate([short], encoder.processor, encoder.family)


def test_an_image_that_broke_after_the_check_names_its_row(
    encoder: Encoder, rows: list[Row], tmp_path: Path
) -> None:
    collator = Collator(encoder, rows)
    (tmp_path / "4.png").write_bytes(b"gone")
    with pytest.raises(DataError, match=r"^rows\.jsonl:4: image '4\.png' is text, not an image"):
        collator([{"row": 0}, {"row": 3}])


def test_a_picture_of_several_rows_is_decoded_once(
    encoder: Encoder, rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = []

    def noting(name: str, *args: Any, **kwargs: Any) -> Any:
        decoded.append(name)
        return decode_image(name, *args, **kwargs)

    monkeypatch.setattr("finetune.data.pictures.decode_image", noting)
    Collator(encoder, [rows[0], rows[3], rows[0]])([{"row": 0}, {"row": 1}, {"row": 2}])
    assert len(decoded) == 2
