import copy
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image as PilImage

from data_formats.chat import Conversation, Image, Message, Text
from finetune.data.render import Renderer
from finetune.data.views import ImagePlan, View
from finetune.errors import DataError
from finetune.families import FAMILIES

IDEFICS2 = FAMILIES["idefics2"]
BLANK = PilImage.new("RGB", (56, 56))

# What the model's special tokens look like is refused, and has a test of its own.
words = st.text(
    st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="<>"), max_size=12
)
texts = words.map(Text)
images = st.just(Image("picture.png"))
user = st.lists(texts | images, min_size=1, max_size=4).map(lambda c: Message("user", tuple(c)))
assistant = st.builds(lambda t, train: Message("assistant", (t,), train), texts, st.booleans())
system = texts.map(lambda t: Message("system", (t,)))


@st.composite
def conversations(draw: st.DrawFn) -> Conversation:
    messages = [draw(system)] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages += [draw(user), draw(assistant)]
    return Conversation(tuple(messages))


@pytest.fixture(params=["nano", "real vocabulary"])
def processor(request: Any) -> Any:
    name = "nano_processor" if request.param == "nano" else "idefics2_processor"
    return request.getfixturevalue(name)


def stock_ids(processor: Any, conversation: Conversation, *, generation_prompt: bool) -> list[int]:
    """The oracle: the processor's own rendering, with real images handed to it."""
    messages = [
        {
            "role": m.role,
            "content": [
                {"type": "image", "image": BLANK}
                if isinstance(p, Image)
                else {"type": "text", "text": p.text}
                for p in m.content
            ],
        }
        for m in conversation.messages
    ]
    out = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, add_generation_prompt=generation_prompt
    )
    return list(out["input_ids"][0])


def plan_of(num_views: int) -> ImagePlan:
    tiles = 2 if num_views > 1 else 0
    return ImagePlan((View((0, 0, 56, 56), 56, 56),) * num_views, rows=tiles, cols=tiles)


def plans(conversation: Conversation, num_views: int = 1) -> list[ImagePlan]:
    return [plan_of(num_views) for _ in conversation.images()]


relaxed = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@relaxed
@given(conversation=conversations(), split=st.booleans())
def test_ids_are_the_processors_own(
    processor: Any, conversation: Conversation, split: bool
) -> None:
    processor.image_processor.do_image_splitting = split
    try:
        ours = Renderer(processor, IDEFICS2).render(
            conversation, plans(conversation, 5 if split else 1)
        )
        assert ours.input_ids == stock_ids(processor, conversation, generation_prompt=False)
    finally:
        processor.image_processor.do_image_splitting = False


@relaxed
@given(conversation=conversations())
def test_the_training_prefix_is_the_inference_prefix(
    processor: Any, conversation: Conversation
) -> None:
    whole = Renderer(processor, IDEFICS2).render(conversation, plans(conversation)).input_ids
    for i, message in enumerate(conversation.messages):
        if message.role != "assistant":
            continue
        before = Conversation(conversation.messages[:i])
        prompt = Renderer(processor, IDEFICS2).render_prompt(before, plans(before))
        assert prompt == stock_ids(processor, before, generation_prompt=True)
        assert whole[: len(prompt)] == prompt


@relaxed
@given(conversation=conversations())
def test_exactly_the_answers_and_their_turn_ends_are_learnt(
    processor: Any, conversation: Conversation
) -> None:
    rendered = Renderer(processor, IDEFICS2).render(conversation, plans(conversation))
    end = processor.tokenizer.convert_tokens_to_ids("<end_of_utterance>")
    spans: list[list[int]] = [[]]
    for token, learnt in zip(rendered.input_ids, rendered.loss_mask, strict=True):
        if learnt:
            spans[-1].append(token)
            if token == end:
                spans.append([])
    assert spans.pop() == []  # every learnt stretch is closed by its turn end
    expected = []
    for i, message in enumerate(conversation.messages):
        if message.role == "assistant" and message.train:
            through = Conversation(conversation.messages[: i + 1])
            before = Conversation(conversation.messages[:i])
            start = len(stock_ids(processor, before, generation_prompt=True))
            ids = stock_ids(processor, through, generation_prompt=False)
            stop = len(ids) - 1 - ids[::-1].index(end)
            expected.append(ids[start : stop + 1])
    assert spans == expected


@relaxed
@given(conversation=conversations())
def test_the_sequence_begins_with_one_bos(processor: Any, conversation: Conversation) -> None:
    ids = Renderer(processor, IDEFICS2).render(conversation, plans(conversation)).input_ids
    assert ids[0] == processor.tokenizer.bos_token_id
    assert ids.count(processor.tokenizer.bos_token_id) == 1


def test_one_exchange_reads_as_expected(nano_processor: Any) -> None:
    conversation = Conversation(
        (
            Message("user", (Image("a.png"), Text("What is this?"))),
            Message("assistant", (Text("A cat."),)),
        )
    )
    rendered = Renderer(nano_processor, IDEFICS2).render(conversation, [plan_of(1)])
    latents = "<image>" * nano_processor.image_seq_len
    assert nano_processor.tokenizer.decode(rendered.input_ids) == (
        f"<s>User:<fake_token_around_image>{latents}<fake_token_around_image> What is this?"
        "<end_of_utterance>\nAssistant: A cat.<end_of_utterance>\n"
    )
    learnt = [t for t, m in zip(rendered.input_ids, rendered.loss_mask, strict=True) if m]
    assert nano_processor.tokenizer.decode(learnt) == " A cat.<end_of_utterance>"


def test_images_that_differ_in_views_get_the_tokens_of_each(nano_processor: Any) -> None:
    conversation = Conversation(
        (
            Message("user", (Image("large.png"), Image("small.png"), Text("Compare."))),
            Message("assistant", (Text("Same."),)),
        )
    )
    ids = (
        Renderer(nano_processor, IDEFICS2).render(conversation, [plan_of(5), plan_of(1)]).input_ids
    )
    assert ids.count(nano_processor.image_token_id) == 6 * nano_processor.image_seq_len
    fake = nano_processor.tokenizer.convert_tokens_to_ids("<fake_token_around_image>")
    assert ids.count(fake) == 7  # adjacent views share one


def test_an_image_in_an_answer_is_shown_but_not_learnt(nano_processor: Any) -> None:
    conversation = Conversation(
        (
            Message("user", (Text("Draw."),)),
            Message("assistant", (Image("a.png"), Text("Done."))),
        )
    )
    rendered = Renderer(nano_processor, IDEFICS2).render(conversation, [plan_of(1)])
    never = nano_processor.tokenizer.convert_tokens_to_ids(list(IDEFICS2.image_tokens))
    learnt = {t for t, m in zip(rendered.input_ids, rendered.loss_mask, strict=True) if m}
    assert learnt
    assert not learnt & set(never)


@pytest.mark.parametrize(
    "token", ["<image>", "<end_of_utterance>", "<fake_token_around_image>", "</s>"]
)
@pytest.mark.parametrize("role", ["user", "assistant"])
def test_text_that_holds_a_special_token_is_refused(
    nano_processor: Any, token: str, role: str
) -> None:
    texts = {"user": "What?", "assistant": "This."} | {role: f"see {token} here"}
    conversation = Conversation(
        (Message("user", (Text(texts["user"]),)), Message("assistant", (Text(texts["assistant"]),)))
    )
    with pytest.raises(DataError, match="special token"):
        Renderer(nano_processor, IDEFICS2).render(conversation, [])


@relaxed
@given(many=st.lists(conversations(), min_size=1, max_size=5))
def test_many_rows_at_once_read_as_one_by_one(processor: Any, many: list[Conversation]) -> None:
    renderer = Renderer(processor, IDEFICS2)
    refused = Conversation((Message("user", (Text("</s>"),)), Message("assistant", (Text("x"),))))
    rows = [(c, plans(c, 5)) for c in many]
    results = renderer.render_many([*rows[:1], (refused, []), *rows[1:]])
    assert isinstance(results.pop(1), DataError)
    assert results == [renderer.render(c, planned) for c, planned in rows]


def test_a_tokenizer_left_cutting_and_padding_by_others_does_neither(nano_processor: Any) -> None:
    renderer = Renderer(nano_processor, IDEFICS2)
    conversation = Conversation((Message("user", (Text("q"),)), Message("assistant", (Text("a"),))))
    expected = renderer.render(conversation, [])
    backend = nano_processor.tokenizer.backend_tokenizer
    backend.enable_truncation(4)
    backend.enable_padding(length=50)
    try:
        assert renderer.render(conversation, []) == expected
    finally:
        backend.no_truncation()
        backend.no_padding()


def test_a_template_that_changes_earlier_turns_is_refused(nano_processor: Any) -> None:
    """Train and inference prefixes would differ: here a turn is written otherwise once answered."""
    processor = copy.copy(nano_processor)
    processor.chat_template = (
        "{% for m in messages %}{{ 'A' if loop.last and m.role == 'user' else 'B' }}"
        "<end_of_utterance>{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
    )
    conversation = Conversation((Message("user", (Text("q"),)), Message("assistant", (Text("a"),))))
    with pytest.raises(DataError, match="does not continue its own prompt"):
        Renderer(processor, IDEFICS2).render(conversation, [])


def test_the_template_is_the_one_of_idefics2(nano_processor: Any) -> None:
    """FACTS of the public template: no space after `User:` before an image, one before text."""
    image_first = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hi"}]}]
    text_first = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    template = nano_processor.apply_chat_template
    assert template(image_first) == "User:<image>Hi<end_of_utterance>\n"
    assert template(text_first, add_generation_prompt=True) == (
        "User: Hi<end_of_utterance>\nAssistant:"
    )
    assert json.dumps(template(text_first)).isascii()
