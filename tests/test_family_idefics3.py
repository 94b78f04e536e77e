import copy
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PilImage
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from data_formats.chat import Conversation, Image, Message, Text
from finetune.data.render import Renderer
from finetune.data.views import ImagePlan, cut_views
from finetune.errors import ModelError
from finetune.families.family import Family
from finetune.families.idefics3 import IDEFICS3
from finetune.families.smolvlm import SMOLVLM
from finetune.recipe import ImagesSection
from tests.conftest import noise
from tests.models import idefics3, smolvlm

BOTH = pytest.mark.parametrize("family", [IDEFICS3, SMOLVLM], ids=lambda family: family.name)
TINY = {"idefics3": idefics3, "smolvlm": smolvlm}


@dataclass
class Row:
    """As much of an example as `Family.stack` looks at."""

    input_ids: list[int]
    views: list[np.ndarray] = field(default_factory=list)
    plans: list[ImagePlan] = field(default_factory=list)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: Any) -> dict[str, Path]:
    """Where the tiny checkpoint of each family lies."""
    folders = {}
    for name, module in TINY.items():
        folders[name] = tmp_path_factory.mktemp(name)
        module.save_tiny(folders[name])
    return folders


def load_processor(family: Family, folder: Path) -> Any:
    return family.build_processor(
        lambda kind: (kind or AutoProcessor).from_pretrained(folder),
        AutoConfig.from_pretrained(folder),
    )


def load_model(folder: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


def images_section(longest_edge_px: int, split: Any = "always") -> ImagesSection:
    # copied, since what edges make sense is here for the family to say
    return ImagesSection(split=split).model_copy(update={"longest_edge_px": longest_edge_px})


def our_views(image: PilImage.Image, images: ImagesSection, image_processor: Any) -> Any:
    plan = IDEFICS3.plan_image(*image.size, images, image_processor)
    return plan, cut_views(image, plan, PilImage.Resampling(image_processor.resample))


def assert_stock_pixels(
    width: int, height: int, longest_edge_px: int, tile_px: int, split: bool, kind: Any
) -> None:
    """Our views of a picture of noise against the library's image processor."""
    stock = kind(
        size={"longest_edge": longest_edge_px},
        max_image_size={"longest_edge": tile_px},
        do_image_splitting=split,
        return_row_col_info=True,
    )
    image = noise(width, height)
    images = images_section(longest_edge_px, "always" if split else "never")
    plan, views = our_views(image, images, stock)
    expected = stock(image, return_tensors="pt")
    assert plan.rows == (expected["rows"][0][0] if split else 0)
    assert plan.cols == (expected["cols"][0][0] if split else 0)
    processor = type("Processor", (), {"image_processor": stock})
    ours = IDEFICS3.stack([Row([], views)], processor, torch.zeros((1, 0)))
    assert ours["pixel_values"].shape == expected["pixel_values"].shape
    torch.testing.assert_close(ours["pixel_values"], expected["pixel_values"], rtol=0, atol=1e-6)
    assert torch.equal(ours["pixel_attention_mask"], expected["pixel_attention_mask"].bool())


@settings(max_examples=150, deadline=None)
@given(
    width=st.integers(1, 700),
    height=st.integers(1, 700),
    edge_and_tile=st.sampled_from([(224, 56), (200, 56), (90, 56), (56, 56), (352, 88), (30, 88)]),
    split=st.booleans(),
    kind=st.sampled_from([Idefics3ImageProcessorPil, SmolVLMImageProcessorPil]),
)
def test_views_are_the_pixels_of_the_librarys_image_processor(
    width: int, height: int, edge_and_tile: tuple[int, int], split: bool, kind: Any
) -> None:
    assert_stock_pixels(width, height, *edge_and_tile, split, kind)


@pytest.mark.parametrize("size", [(1, 50), (50, 1), (3000, 40), (17, 2999), (800, 801)])
@pytest.mark.parametrize("edge_and_tile", [(1456, 364), (1536, 384), (1000, 364)])
def test_views_at_the_sizes_of_published_checkpoints_are_the_librarys(
    size: tuple[int, int], edge_and_tile: tuple[int, int]
) -> None:
    assert_stock_pixels(*size, *edge_and_tile, True, Idefics3ImageProcessorPil)


def test_the_librarys_own_count_of_tiles_is_not_to_be_trusted() -> None:
    stock = Idefics3ImageProcessorPil(size={"longest_edge": 1000})
    plan = IDEFICS3.plan_image(1000, 728, images_section(1000), stock)
    assert (plan.rows, plan.cols) == (3, 3)
    assert stock.get_number_of_image_patches(728, 1000) == (7, 2, 3)
    pixels = stock(noise(1000, 728), return_tensors="pt")["pixel_values"]
    assert pixels.shape[1] == len(plan.views) == 10


def test_auto_splits_only_what_is_larger_than_a_tile() -> None:
    stock = Idefics3ImageProcessorPil()
    images = images_section(1456, "auto")
    assert len(IDEFICS3.plan_image(364, 200, images, stock).views) == 1
    assert len(IDEFICS3.plan_image(365, 200, images, stock).views) == 13
    whole = IDEFICS3.plan_image(364, 200, images, stock)
    assert whole == IDEFICS3.plan_image(364, 200, images_section(1456, "never"), stock)


@pytest.mark.parametrize("num_tiles", [2, 3, 4, 5, 6])
def test_cheaper_images_lose_a_tile_of_the_edge_at_a_time(num_tiles: int) -> None:
    stock = Idefics3ImageProcessorPil()
    own = images_section(num_tiles * 364)
    steps = [(own.split, own.longest_edge_px, num_tiles**2 + 1)]
    for images in IDEFICS3.cheaper_images(own):
        num_views = len(IDEFICS3.plan_image(900, 900, images, stock).views)
        if num_views < steps[-1][2]:  # as rows are shortened: what saves nothing is passed over
            steps.append((images.split, images.longest_edge_px, num_views))
    expected = [("always", n * 364, n * n + 1) for n in range(num_tiles, 1, -1)]
    assert steps[:-1] == expected
    assert steps[-1][2] == 1
    assert list(IDEFICS3.cheaper_images(images_section(1456, "never"))) == []


def test_more_tiles_than_have_names_are_refused(folders: dict[str, Path]) -> None:
    processor = load_processor(IDEFICS3, folders["idefics3"])
    IDEFICS3.set_images(processor, images_section(6 * 56))
    with pytest.raises(ModelError, match=r"337 makes 7 tiles of 56 pixels.*set 336 or less"):
        IDEFICS3.set_images(processor, images_section(337))
    IDEFICS3.set_images(processor, images_section(4096, "never"))
    with pytest.raises(ModelError, match=r"4097 is more than the 4096 pixels.*set 4096 or less"):
        IDEFICS3.set_images(processor, images_section(4097, "never"))


@BOTH
def test_own_settings_are_the_checkpoints_and_hold_when_set(
    family: Family, folders: dict[str, Path]
) -> None:
    processor = load_processor(family, folders[family.name])
    tile_px = processor.image_processor.max_image_size["longest_edge"]
    own = family.own_images(processor)
    assert own == {"split": "always", "longest_edge_px": 4 * tile_px}
    family.set_images(processor, images_section(2 * tile_px, "never"))
    assert family.own_images(processor) == {"split": "never", "longest_edge_px": 2 * tile_px}


@BOTH
def test_tiny_checkpoints_of_the_old_layout_load_with_nothing_missing(
    family: Family, folders: dict[str, Path]
) -> None:
    # a pair because of output_loading_info, which the declared type does not know
    model, info = cast(Any, AutoModelForImageTextToText).from_pretrained(
        folders[family.name], output_loading_info=True
    )
    assert type(model).__name__.lower() == f"{family.name}forconditionalgeneration"
    assert not any(info.values())


words = st.text(
    st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="<>"), max_size=12
).map(Text)
pictures = st.sampled_from(["1x50", "90x60", "300x500", "56x56"]).map(Image)
users = st.lists(words | pictures, min_size=1, max_size=4).map(lambda c: Message("user", tuple(c)))
answers = words.map(lambda text: Message("assistant", (text,)))


@st.composite
def conversations(draw: st.DrawFn) -> Conversation:
    messages = [Message("system", (draw(words),))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 2))):
        messages += [draw(users), draw(answers)]
    return Conversation(tuple(messages))


def pictures_of(conversation: Conversation) -> list[PilImage.Image]:
    sizes = [str(image.source).split("x") for image in conversation.images()]
    return [noise(int(width), int(height)) for width, height in sizes]


def assert_stock_ids(
    processor: Any, family: Family, conversation: Conversation, stock: Any = None
) -> None:
    """Ids of the whole and of the prompt, and the image tokens in them."""
    shown = pictures_of(conversation)
    images = ImagesSection().model_copy(update=family.own_images(processor))
    plans = [family.plan_image(*i.size, images, processor.image_processor) for i in shown]
    renderer = Renderer(processor, family)
    ids = renderer.render(conversation, plans).input_ids
    inputs = idefics3.stock_inputs(stock or processor, conversation, shown, generation_prompt=False)
    assert ids == inputs["input_ids"][0].tolist()
    assert ids.count(processor.image_token_id) == sum(
        family.num_image_tokens(processor, plan) for plan in plans
    )
    prompt = conversation.before_last_answer()
    num_asked = len(list(prompt.images()))
    asked = idefics3.stock_inputs(
        stock or processor, prompt, shown[:num_asked], generation_prompt=True
    )
    assert renderer.render_prompt(prompt, plans[:num_asked]) == asked["input_ids"][0].tolist()


@settings(max_examples=40, deadline=None)
@given(conversation=conversations())
def test_ids_are_the_stock_processors_with_the_real_vocabulary(conversation: Conversation) -> None:
    processor = copy.copy(idefics3.real_processor())
    # pictures small enough for many examples; the ids depend on rows and columns alone
    processor.image_processor = Idefics3ImageProcessorPil(
        size={"longest_edge": 84}, max_image_size={"longest_edge": 28}
    )
    assert_stock_ids(processor, IDEFICS3, conversation)


@BOTH
def test_ids_are_the_stock_processors_in_the_tiny_checkpoint(
    family: Family, folders: dict[str, Path]
) -> None:
    processor = load_processor(family, folders[family.name])

    @settings(max_examples=40, deadline=None)
    @given(conversation=conversations(), split=st.sampled_from(["always", "never"]))
    def holds(conversation: Conversation, split: Any) -> None:
        family.set_images(processor, images_section(224, split))
        assert_stock_ids(processor, family, conversation)

    holds()


def test_the_real_vocabulary_has_the_ids_of_the_hub() -> None:
    tokenizer = idefics3.real_processor().tokenizer
    ids = tokenizer.convert_tokens_to_ids([*idefics3.SPECIALS, "<|begin_of_text|>"])
    assert ids == [128256, 128257, 128258, 128000]
    # names of tiles are plain text to Idefics3, and tokens of their own to SmolVLM2
    assert len(tokenizer("<row_1_col_2>", add_special_tokens=False)["input_ids"]) > 1


def encode(
    family: Family, processor: Any, conversation: Conversation, split: Any = "always"
) -> Row:
    tile_px = processor.image_processor.max_image_size["longest_edge"]
    images = images_section(2 * tile_px, split)
    family.set_images(processor, images)
    pairs = [our_views(i, images, processor.image_processor) for i in pictures_of(conversation)]
    plans = [plan for plan, _ in pairs]
    ids = Renderer(processor, family).render(conversation, plans).input_ids
    return Row(ids, [view for _, views in pairs for view in views], plans)


def batch_of(family: Family, processor: Any, rows: list[Row], side: str) -> dict[str, torch.Tensor]:
    length = max(len(row.input_ids) for row in rows)
    ids = torch.full((len(rows), length), processor.tokenizer.pad_token_id)
    mask = torch.zeros((len(rows), length), dtype=torch.long)
    for i, row in enumerate(rows):
        start = length - len(row.input_ids) if side == "left" else 0
        ids[i, start : start + len(row.input_ids)] = torch.tensor(row.input_ids)
        mask[i, start : start + len(row.input_ids)] = 1
    # as generation does: positions count from the first token that is none of padding
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    return inputs | family.stack(rows, processor, ids)


def asked(text: str, *images: str) -> Conversation:
    question = Message("user", (*(Image(image) for image in images), Text(text)))
    return Conversation((question, Message("assistant", (Text("12"),))))


@BOTH
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_gives_each_row_the_logits_it_has_alone(
    family: Family, side: str, folders: dict[str, Path]
) -> None:
    processor, model = (
        load_processor(family, folders[family.name]),
        load_model(folders[family.name]),
    )
    rows = [
        encode(family, processor, asked("What is the total?", "90x60")),
        encode(family, processor, asked("No picture at all, and a longer question")),
        encode(family, processor, asked("Both?", "300x500", "1x50")),
        encode(family, processor, asked("Whole?", "80x80"), split="never"),
    ]
    with torch.no_grad():
        together = model(**batch_of(family, processor, rows, side)).logits
        for row, logits in zip(rows, together, strict=True):
            alone = model(**batch_of(family, processor, [row], side)).logits[0]
            num = len(row.input_ids)
            own = logits[-num:] if side == "left" else logits[:num]
            torch.testing.assert_close(own, alone, rtol=0, atol=1e-5)


@BOTH
def test_logits_are_those_of_the_stock_processors_inputs(
    family: Family, folders: dict[str, Path]
) -> None:
    processor, model = (
        load_processor(family, folders[family.name]),
        load_model(folders[family.name]),
    )
    conversation = asked("What is the total?", "90x60", "300x500")
    row = encode(family, processor, conversation)
    stock = idefics3.stock_inputs(
        processor, conversation, pictures_of(conversation), generation_prompt=False
    )
    with torch.no_grad():
        ours = model(**batch_of(family, processor, [row], "right")).logits
        torch.testing.assert_close(ours, model(**stock).logits, rtol=0, atol=1e-5)


@BOTH
def test_a_batch_without_images_has_no_pixels(family: Family, folders: dict[str, Path]) -> None:
    processor = load_processor(family, folders[family.name])
    assert family.stack([Row([1, 2]), Row([3])], processor, torch.zeros((2, 2))) == {}


FULL_SIZE = pytest.mark.parametrize(
    ("family", "module"), [(IDEFICS3, idefics3), (SMOLVLM, smolvlm)], ids=["idefics3", "smolvlm"]
)


def parts_matching(family: Family, name: str, config: Any) -> list[str]:
    return [
        part
        for part, facts in family.parts_of(config).items()
        if any(re.fullmatch(rf"{re.escape(prefix)}\..+", name) for prefix in facts.prefixes)
    ]


@FULL_SIZE
def test_every_linear_layer_belongs_to_one_part_and_lora_counts_are_known(
    family: Family, module: Any
) -> None:
    model = module.full_size()
    lora = dict.fromkeys(family.parts_of(model.config), 0)
    for name, layer in model.named_modules():
        if not isinstance(layer, torch.nn.Linear) or name == "lm_head":
            continue
        [part] = parts_matching(family, name, model.config)
        assert name.rpartition(".")[2] in family.parts_of(model.config)[part].linears, name
        lora[part] += 8 * (layer.in_features + layer.out_features)
    for parts, expected in module.LORA.items():
        assert sum(lora[part] for part in parts) == expected


def parameters_of(family: Family, model: Any) -> dict[str, int]:
    counts = {"vision": 0, "connector": 0, "language": 0, "total": 0}
    for name, parameter in model.named_parameters():
        [part] = parts_matching(family, name, model.config) or ["language"]  # the head
        counts[part] += parameter.numel()
        counts["total"] += parameter.numel()
    return counts


@FULL_SIZE
def test_full_size_parameters_are_as_noted(family: Family, module: Any) -> None:
    assert parameters_of(family, module.full_size()) == module.PARAMETERS


@pytest.mark.parametrize(
    ("name", "total"),
    [("SMOLVLM_2B", 2_246_272_880), ("SMOLVLM2_500M", 507_482_304), ("SMOLVLM2_256M", 256_484_928)],
)
def test_the_other_smolvlms_have_these_totals(name: str, total: int) -> None:
    model = smolvlm.full_size(getattr(smolvlm, name))
    assert parameters_of(SMOLVLM, model)["total"] == total
