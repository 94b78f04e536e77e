from typing import Any

import pytest
import torch

from data_formats.chat import parse_chat
from finetune.data.examples import Encoder
from finetune.data.images import ImageAccess
from finetune.data.sources import Row
from finetune.errors import ModelError
from finetune.model.load import load_processor
from finetune.model.vocabulary import add_extra_tokens, extend_vocabulary
from finetune.recipe import Recipe
from tests.conftest import NANO, NANO_IMAGES, chat_row


def recipe_with(*tokens: str, method: str = "lora") -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"name": "nano", "dtype": "float32"},
            "adapter": {"extra_tokens": list(tokens), "method": method},
            "data": {"train": [{"hub": "user/name"}], "eval": [{"hub": "user/name"}]},
        }
    )


@pytest.fixture
def processor() -> Any:
    return load_processor(NANO, NANO_IMAGES)[0]


def test_an_extra_token_is_one_id_that_is_learnt_and_shown(
    processor: Any, encoder: Encoder, tmp_path: Any
) -> None:
    add_extra_tokens(processor, recipe_with("<price>", "naïve"))
    tokenizer = processor.tokenizer
    ids = tokenizer.convert_tokens_to_ids(["<price>", "naïve"])
    assert len(set(ids)) == 2
    ours = Encoder(processor, encoder.family, encoder.images)
    row = Row("x:1", parse_chat(chat_row("a naïve one?", "is<price>3")), ImageAccess(tmp_path))
    example = ours.encode(row)
    learnt = [i for i, mask in zip(example.input_ids, example.loss_mask, strict=True) if mask]
    assert ids[0] in learnt
    assert ids[1] in example.input_ids
    assert "is<price>3" in tokenizer.decode(learnt, skip_special_tokens=True)


def test_a_token_that_is_there_already_is_refused(processor: Any) -> None:
    with pytest.raises(ModelError, match=r"'<image>' is in the vocabulary of nano already"):
        add_extra_tokens(processor, recipe_with("<image>", "<price>"))


@pytest.mark.parametrize("word", ["User:", "Assistant:", "r:", "System: "])
def test_a_word_that_the_chat_template_writes_is_refused(processor: Any, word: str) -> None:
    with pytest.raises(
        ModelError, match=rf"'{word}' is in the text that the chat template of nano"
    ):
        add_extra_tokens(processor, recipe_with("<price>", word))


def test_a_word_within_a_special_token_of_the_template_is_no_part_of_its_text(
    processor: Any,
) -> None:
    add_extra_tokens(processor, recipe_with("utterance"))
    ids = processor.tokenizer("<end_of_utterance>", add_special_tokens=False)["input_ids"]
    assert processor.tokenizer.convert_tokens_to_ids("utterance") not in ids


def test_a_frozen_model_gets_no_tokens(processor: Any, nano_model: Any) -> None:
    before = len(processor.tokenizer)
    recipe = recipe_with("<price>", method="frozen")
    add_extra_tokens(processor, recipe)
    assert len(processor.tokenizer) == before
    assert extend_vocabulary(nano_model, processor, recipe) == []


def test_new_rows_start_as_the_mean_and_the_old_ones_stay(processor: Any, nano_model: Any) -> None:
    tables = ("get_input_embeddings", "get_output_embeddings")
    before = [getattr(nano_model, table)().weight.detach().clone() for table in tables]
    recipe = recipe_with("<price>", "<date>")
    add_extra_tokens(processor, recipe)
    ids = extend_vocabulary(nano_model, processor, recipe)
    num_rows = len(before[0])
    assert ids == [num_rows, num_rows + 1]
    for table, old in zip(tables, before, strict=True):
        weight = getattr(nano_model, table)().weight
        assert torch.equal(weight[:num_rows], old)
        torch.testing.assert_close(weight[num_rows:], old.mean(0).expand(2, -1))


def test_a_head_of_another_size_than_the_embeddings_is_refused(
    processor: Any, nano_model: Any
) -> None:
    """As in Llama 3.2 Vision, whose image token has an embedding and no row in the head."""
    recipe = recipe_with("<price>")
    add_extra_tokens(processor, recipe)
    nano_model.lm_head = torch.nn.Linear(128, 400, bias=False)
    with pytest.raises(ModelError, match="the vocabulary of nano cannot be extended"):
        extend_vocabulary(nano_model, processor, recipe)
