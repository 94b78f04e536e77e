"""Rows -> examples: the token ids, loss mask and views of one row, what it costs, and the reasons
why a row cannot become one.
"""

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Literal

from PIL import Image
from xxhash import xxh3_64_intdigest

from data_formats.chat import Conversation
from finetune.data.augment import Draws, plan_enlarged
from finetune.data.images import decode_image, page_of, quoted_name, read_image_file
from finetune.data.pictures import EXACT, Picture, Pictures, Shortcuts
from finetune.data.render import Rendered, Renderer
from finetune.data.sequences import Layouting
from finetune.data.shorten import Shortened, with_fewer_views, without_oldest_exchanges
from finetune.data.sources import Row
from finetune.data.views import ImagePlan, Size
from finetune.data.vision_cache import VisionCache
from finetune.errors import DataError
from finetune.families.family import Family
from finetune.recipe import DataSection, ImagesSection

Overlong = Literal["stop", "skip", "drop_turns", "fewer_views"]


class OverlongError(DataError):
    """A row over `data.max_tokens`, which `data.overlong` decides about rather than
    `data.bad_rows`.
    """


@dataclass(frozen=True, slots=True)
class Example:
    """A row, ready to be put into a batch.

    `views` are those of all images, one after the other, as `plans` says: uint8 [3, H, W], each at
    its own size in pixels, or `KeyedView`s where there is a vision cache.
    """

    where: str
    input_ids: list[int]
    loss_mask: list[bool]
    views: list[Any] = field(repr=False)
    plans: Sequence[ImagePlan] = ()


@dataclass(frozen=True, slots=True)
class RowCounts:
    """What a row costs, and keys to find it again by, without its pixels.

    Keys are 64-bit digests: of everything the model sees, of what is asked, of the tokens before
    the first image and how that is cut, and of each image's file. `kind` and `change` say how an
    overlong row was made to fit, and are empty otherwise.
    """

    num_tokens: int
    num_learnt_tokens: int
    num_turns: int
    num_images: int
    num_views: int
    num_view_pixels: int
    row_key: int
    question_key: int
    prefix_key: int
    image_keys: tuple[int, ...]
    kind: str = ""
    change: str = ""


@dataclass(frozen=True, slots=True)
class Fitted:
    """A row as it is trained: what is left of it, size and plan of each image left, and its ids."""

    conversation: Conversation
    image_numbers: Sequence[int]
    sizes_px: Sequence[Size]
    plans: Sequence[ImagePlan]
    rendered: Rendered
    kind: str = ""
    change: str = ""


@dataclass(frozen=True)
class Encoder:
    """Turns rows into examples with one processor and one set of image settings.

    Rows over `max_tokens` are made to fit as `overlong` says, or refused.
    """

    processor: Any
    family: Family
    images: ImagesSection
    max_tokens: int | None = None
    overlong: Overlong = "stop"
    packed_vision: bool = False
    """Whether batches hold views as they are, or the library's padded tensors."""
    shortcuts: Shortcuts = EXACT
    """To the pixels of the views."""
    layouting: Layouting | None = None
    """Which rows of a batch to be trained become one sequence; None keeps them apart."""
    vision_cache: VisionCache | None = None
    """Where views are looked up before their picture is decoded."""

    @classmethod
    def of_recipe(
        cls,
        processor: Any,
        family: Family,
        images: ImagesSection,
        data: DataSection,
        *,
        packed_vision: bool = False,
        layouting: Layouting | None = None,
    ) -> "Encoder":
        """The encoder that a recipe's settings make."""
        shortcuts = Shortcuts(data.reduced_decode, data.fast_resize)
        return cls(
            processor,
            family,
            images,
            data.max_tokens,
            data.overlong,
            packed_vision,
            shortcuts,
            layouting,
        )

    @cached_property
    def renderer(self) -> Renderer:
        """Renders for this processor."""
        return Renderer(self.processor, self.family)

    def new_pictures(self) -> Pictures:
        """A memory for rows that are encoded one after the other, as those of a batch: what they
        show is decoded and cut once, and their examples hold the same views.
        """
        resample = Image.Resampling(self.processor.image_processor.resample)
        return Pictures(resample, self.shortcuts, self.vision_cache)

    def encode(
        self, row: Row, draws: Draws | None = None, pictures: Pictures | None = None
    ) -> Example:
        """The row with everything in it, to be learnt from, as `draws` changes it, if there are
        any. `pictures` are those of the rows before it. Raises `DataError`.
        """
        return self.encode_fitted(row, draws, pictures)[0]

    def encode_fitted(
        self, row: Row, draws: Draws | None = None, pictures: Pictures | None = None
    ) -> tuple[Example, Fitted]:
        """As `encode`, and what had to be done to the row for it to fit."""
        images = (pictures or self.new_pictures()).of_row(row)
        fitted = self._fit(row.conversation, [image.size_px for image in images])
        if draws:
            fitted = self._augmented(fitted, draws)
        views = _cut([images[i] for i in fitted.image_numbers], fitted.plans)
        rendered = fitted.rendered
        example = Example(row.where, rendered.input_ids, rendered.loss_mask, views, fitted.plans)
        return example, fitted

    def encode_prompt(self, row: Row, pictures: Pictures | None = None) -> Example:
        """The row up to its last answer, to be answered; nothing is learnt. Raises `DataError`."""
        images = (pictures or self.new_pictures()).of_row(row)
        fitted = self._fit(row.conversation, [image.size_px for image in images])
        prompt = fitted.conversation.before_last_answer()
        num_images = sum(1 for _ in prompt.images())
        plans = fitted.plans[:num_images]
        ids = self.renderer.render_prompt(prompt, plans)
        shown = [images[i] for i in fitted.image_numbers[:num_images]]
        return Example(row.where, ids, [False] * len(ids), _cut(shown, plans), plans)

    def count_many(self, rows: Sequence[Row]) -> list[RowCounts | DataError]:
        """What each row costs, or why it cannot be trained; every image is decoded, so a row that
        can be counted can be trained.
        """
        results: list[RowCounts | DataError | None] = [None] * len(rows)
        loaded: list[tuple[int, list[Size], tuple[int, ...], list[ImagePlan]]] = []
        for i, row in enumerate(rows):
            try:
                sizes, keys = _measure_images(row)
                loaded.append((i, sizes, keys, self._plan(row.conversation, sizes)))
            except DataError as error:
                results[i] = error
        rendered = self.renderer.render_many(
            [(rows[i].conversation, plans) for i, _, _, plans in loaded]
        )
        for (i, sizes, keys, plans), each in zip(loaded, rendered, strict=True):
            try:
                if isinstance(each, DataError):
                    raise each
                fitted = self._fit_rendered(rows[i].conversation, sizes, plans, each)
                results[i] = self._counts(fitted, keys)
            except DataError as error:
                results[i] = error
        return [result for result in results if result is not None]

    def _counts(self, fitted: Fitted, image_keys: tuple[int, ...]) -> RowCounts:
        ids, mask = fitted.rendered.input_ids, fitted.rendered.loss_mask
        messages = fitted.conversation.messages
        keys = tuple(image_keys[i] for i in fitted.image_numbers)
        asked = " ".join(m.text for m in messages if m.role == "user").casefold().split()
        before = ids[: ids.index(self.processor.image_token_id)] if keys else []
        first = repr(fitted.plans[:1]).encode()
        seen = array("q", ids).tobytes() + array("Q", keys).tobytes()
        return RowCounts(
            num_tokens=len(ids),
            num_learnt_tokens=sum(mask),
            num_turns=len(messages),
            num_images=len(keys),
            num_views=sum(len(plan.views) for plan in fitted.plans),
            num_view_pixels=sum(plan.num_pixels for plan in fitted.plans),
            row_key=xxh3_64_intdigest(seen),
            question_key=xxh3_64_intdigest(" ".join(asked).encode()),
            prefix_key=xxh3_64_intdigest(array("q", before).tobytes() + first),
            image_keys=keys,
            kind=fitted.kind,
            change=fitted.change,
        )

    def _plan(
        self,
        conversation: Conversation,
        sizes_px: Sequence[Size],
        settings: Sequence[ImagesSection] | None = None,
    ) -> list[ImagePlan]:
        """The views of each image, under the settings of each, if they are not the same for all.
        Raises `DataError`, naming the image that cannot be shown.
        """
        settings = settings or [self.images] * len(sizes_px)
        plans = []
        for part, size, images in zip(conversation.images(), sizes_px, settings, strict=True):
            try:
                plan = self.family.plan_image(*size, images, self.processor.image_processor)
            except DataError as error:
                raise DataError(f"image {quoted_name(part.source)} {error}") from error
            plans.append(plan)
        return plans

    def _fit(self, conversation: Conversation, sizes_px: Sequence[Size]) -> Fitted:
        plans = self._plan(conversation, sizes_px)
        rendered = self.renderer.render(conversation, plans)
        return self._fit_rendered(conversation, sizes_px, plans, rendered)

    def _fit_rendered(
        self,
        conversation: Conversation,
        sizes_px: Sequence[Size],
        plans: list[ImagePlan],
        rendered: Rendered,
    ) -> Fitted:
        """The row as it is, or shortened until it fits. Raises `OverlongError` where it cannot."""
        if self.max_tokens is None or len(rendered.input_ids) <= self.max_tokens:
            return Fitted(conversation, range(len(plans)), sizes_px, plans, rendered)
        for shorter in self._ways_to_shorten(conversation, sizes_px, plans):
            kept = [sizes_px[i] for i in shorter.image_numbers]
            left = self._plan(shorter.conversation, kept, shorter.settings)
            ids = self.renderer.render(shorter.conversation, left)
            if len(ids.input_ids) <= self.max_tokens:
                numbers = shorter.image_numbers
                kind, change = shorter.kind, shorter.change
                return Fitted(shorter.conversation, numbers, kept, left, ids, kind, change)
        raise OverlongError(self._too_long(len(rendered.input_ids), conversation, plans))

    def _augmented(self, fitted: Fitted, draws: Draws) -> Fitted:
        """The row as drawn; where it would be too long so, without the pictures that cost more
        tokens when enlarged; and where it still is, as it was. A shortened row is not enlarged.
        """
        conversation, order = draws.order(fitted.conversation)
        own = [fitted.plans[i] for i in order]
        sizes_px = [fitted.sizes_px[i] for i in order]
        enlarged = own
        if not fitted.kind:
            factors = draws.factors(len(own))
            enlarged = [
                plan_enlarged(self._plan_of, size, plan, factors[i])
                for i, size, plan in zip(order, sizes_px, own, strict=True)
            ]
        if conversation == fitted.conversation and enlarged == own:
            return fitted
        tokens = partial(self.family.num_image_tokens, self.processor)
        as_long = [
            after if tokens(after) <= tokens(before) else before
            for before, after in zip(own, enlarged, strict=True)
        ]
        numbers = [fitted.image_numbers[i] for i in order]
        for plans in (enlarged, as_long):
            try:
                rendered = self.renderer.render(conversation, plans)
            except DataError:  # a template may accept the turns in their own order alone
                break
            if self.max_tokens is None or len(rendered.input_ids) <= self.max_tokens:
                kind, change = fitted.kind, fitted.change
                return Fitted(conversation, numbers, sizes_px, plans, rendered, kind, change)
        return fitted

    def _plan_of(self, width_px: int, height_px: int) -> ImagePlan:
        return self.family.plan_image(
            width_px, height_px, self.images, self.processor.image_processor
        )

    def _ways_to_shorten(
        self, conversation: Conversation, sizes_px: Sequence[Size], plans: Sequence[ImagePlan]
    ) -> Iterator[Shortened]:
        if self.overlong == "drop_turns":
            yield from without_oldest_exchanges(conversation)
        if self.overlong == "fewer_views":
            yield from with_fewer_views(conversation, sizes_px, self._cheaper_settings(sizes_px))

    def _cheaper_settings(self, sizes_px: Sequence[Size]) -> list[list[ImagesSection]]:
        """For each image the settings it is planned by, then those under which it has fewer views,
        step by step.
        """
        ladders = []
        for size in sizes_px:
            ladder, fewest = [self.images], self._num_views(size, self.images)
            for images in self.family.cheaper_images(self.images):
                if (num := self._num_views(size, images)) < fewest:
                    ladder.append(images)
                    fewest = num
            ladders.append(ladder)
        return ladders

    def _num_views(self, size_px: Size, images: ImagesSection) -> int:
        plan = self.family.plan_image(*size_px, images, self.processor.image_processor)
        return len(plan.views)

    def _too_long(
        self, num_tokens: int, conversation: Conversation, plans: Sequence[ImagePlan]
    ) -> str:
        num_views = sum(len(plan.views) for plan in plans)
        views = f"{num_views:,} view{'' if num_views == 1 else 's'}"
        found = f"is too long ({num_tokens:,} > {self.max_tokens:,} tokens, {views})"
        tried = {
            "drop_turns": ", even its last exchange alone",
            "fewer_views": ", even with every picture in one view",
        }
        ways = {
            "drop_turns": next(without_oldest_exchanges(conversation), None) is not None,
            "fewer_views": num_views > len(plans)
            and next(self.family.cheaper_images(self.images), None) is not None,
        }
        others = [way for way, helps in ways.items() if helps and way != self.overlong]
        if self.overlong != "skip":
            others.insert(0, "skip")
        listed = " or ".join(filter(None, [", ".join(others[:-1]), *others[-1:]]))
        other = f", or set data.overlong: {listed}" if others else ""
        return f"{found}{tried.get(self.overlong, '')}; raise data.max_tokens{other}"


def _cut(pictures: Sequence[Picture], plans: Sequence[ImagePlan]) -> list[Any]:
    return [
        view for picture, plan in zip(pictures, plans, strict=True) for view in picture.views(plan)
    ]


def _measure_images(row: Row) -> tuple[list[Size], tuple[int, ...]]:
    """Size and key of each image; the pixels are let go of one image after the other."""
    sizes, keys = [], []
    for part in row.conversation.images():
        page = page_of(part.source)
        name, data = read_image_file(part.source, row.image_access)
        image = decode_image(name, data, row.image_access, page=page, keep_grey=True)
        sizes.append(image.size)
        # of the file: a digest of the pixels costs a fifth of decoding a JPEG
        keys.append(xxh3_64_intdigest(data, seed=page or 0))
    return sizes, tuple(keys)
