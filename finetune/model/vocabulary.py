"""Words that a recipe adds to the vocabulary: tokens of their own, with rows of their own in the
embeddings and the head.
"""

from contextlib import suppress
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import AddedToken

from finetune.data.render import TEMPLATE_FAULTS
from finetune.errors import ModelError
from finetune.model.load import load_config
from finetune.recipe import Recipe


def extra_tokens_of(recipe: Recipe) -> tuple[str, ...]:
    """The words that are added; none for a frozen model, which could not learn what they mean."""
    return () if recipe.adapter.method == "frozen" else recipe.adapter.extra_tokens


def add_extra_tokens(processor: Any, recipe: Recipe) -> None:
    """Give a freshly loaded processor the words, as ordinary tokens, found anywhere in the text.

    Ordinary, so that rows may hold them and answers show them. Raises `ModelError` for a word that
    is a token already, or that the chat template writes.
    """
    tokens = extra_tokens_of(recipe)
    known = processor.tokenizer.get_vocab()
    if taken := [token for token in tokens if token in known]:
        raise ModelError(
            f"adapter.extra_tokens: {', '.join(map(repr, taken))} is in the vocabulary of "
            f"{recipe.model.name} already; leave it out"
        )
    # Not normalised, or a SentencePiece vocabulary would look for them with a space in front
    processor.tokenizer.add_tokens(
        [AddedToken(token, normalized=False, special=False) for token in tokens]
    )
    if tokens:
        _refuse_words_of_template(processor, recipe)


def _refuse_words_of_template(processor: Any, recipe: Recipe) -> None:
    """Raise `ModelError` where an added word is found in the template's own text: every prompt
    would then hold a token that the model never saw.
    """
    variables = load_config(recipe.model)[1].template_variables
    say = {"type": "text", "text": "\ue000"}  # of private use, so no word of anybody's
    texts = []
    for start in ([], [{"role": "system", "content": [say]}]):
        for question in ([say], [{"type": "image"}, say], [say, {"type": "image"}]):
            user, answer = (
                {"role": role, "content": content}
                for role, content in (("user", question), ("assistant", [say]))
            )
            for asks in (False, True):
                with suppress(TemplateError, *TEMPLATE_FAULTS):  # many templates know no system
                    texts.append(
                        processor.apply_chat_template(
                            [*start, user, answer, user] if asks else [*start, user, answer],
                            tokenize=False,
                            add_generation_prompt=asks,
                            **variables,
                        )
                    )
    tokenizer = processor.tokenizer
    seen = {i for text in texts for i in tokenizer(text, add_special_tokens=False)["input_ids"]}
    words = [word for word in extra_tokens_of(recipe) if tokenizer.get_vocab()[word] in seen]
    if words:
        raise ModelError(
            f"adapter.extra_tokens: {', '.join(map(repr, words))} is in the text that the chat "
            f"template of {recipe.model.name} puts around every turn, where it would become a "
            "token that the model never saw; take another word"
        )


def extend_vocabulary(model: Any, processor: Any, recipe: Recipe) -> list[int]:
    """Give the model rows for the words that the processor was given; their ids.

    Each row starts as the mean of all old ones, so that no answer changes by much and nothing is
    left to chance. Raises `ModelError` where the embeddings and the head are not one row a token.
    """
    tokens = extra_tokens_of(recipe)
    if not tokens:
        return []
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if (
        type(embeddings) is not torch.nn.Embedding
        or type(head) is not torch.nn.Linear
        or embeddings.num_embeddings != head.out_features
        or head.bias is not None  # PEFT would leave it out
    ):
        raise ModelError(
            f"adapter.extra_tokens: the vocabulary of {recipe.model.name} cannot be extended: its "
            "embeddings and its head are not plain tables with one row for each token; leave them "
            "out"
        )
    ids: list[int] = processor.tokenizer.convert_tokens_to_ids(list(tokens))
    # Some checkpoints have more rows than tokens; those are taken first
    if max(ids) >= embeddings.num_embeddings:
        model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        with torch.no_grad():
            layer.weight[ids] = layer.weight[: min(ids)].float().mean(dim=0).to(layer.weight.dtype)
    return ids
