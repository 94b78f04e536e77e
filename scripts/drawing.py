"""Pictures of small labels, tickets and receipts, drawn with PIL and the fonts matplotlib ships.

`make_nano` learns to read from them and `make_receipts` writes the quickstart dataset with them.
Every function takes its own `random.Random`, so that a seed gives the same picture each time.
"""

import random
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

PATCH_PX = 14
MAX_LINES = 3
MAX_CHARS = 8
CHARSET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.-/:$#"

# At this size DejaVu Sans Mono advances by exactly one 14 px patch a character.
GRID_FONT_PX = 23.25
MONO = "DejaVuSansMono"
FONTS = (MONO, "DejaVuSansMono-Bold")

# (paper, ink): thermal paper, card, kraft, pale blue, pale green, pink, yellow.
PAPERS = (
    ((250, 249, 245), (30, 30, 34)),
    ((240, 234, 218), (52, 40, 30)),
    ((214, 190, 152), (46, 32, 22)),
    ((214, 228, 242), (18, 38, 84)),
    ((220, 238, 218), (16, 62, 36)),
    ((246, 218, 222), (104, 18, 38)),
    ((250, 236, 160), (44, 40, 20)),
)
DESKS = ((92, 74, 58), (62, 66, 72), (128, 130, 134), (36, 52, 60), (150, 118, 86))


@dataclass(frozen=True)
class Style:
    """How far a picture is from the easiest one: monospaced text on the patch grid, plain paper."""

    jitter_px: int = 0  # most distance of a line from its place on the patch grid
    fonts: tuple[str, ...] = FONTS[:1]
    decoration: float = 0.0  # chance of each ornament
    wear: float = 0.0  # chance of blur, shadow and noise
    most_noise: float = 6.0  # standard deviation, of 255

    @classmethod
    def at_level(cls, level: float) -> "Style":
        """From 0, the plain grid, to 1, what the quickstart's pictures look like."""
        return cls(
            jitter_px=round(2 * level),
            fonts=FONTS if level else FONTS[:1],
            decoration=level,
            wear=level,
        )


@dataclass(frozen=True)
class PlacedLine:
    """A line of text as drawn: `edges_px[i]` to `edges_px[i + 1]` is the advance of character i."""

    text: str
    edges_px: tuple[float, ...]
    top_px: float
    bottom_px: float


@cache
def load_font(name: str, size_px: float) -> ImageFont.FreeTypeFont:
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return ImageFont.truetype(str(folder / f"{name}.ttf"), size_px)


def draw_label(
    rng: random.Random, lines: list[str], size_px: tuple[int, int], style: Style
) -> tuple[Image.Image, list[PlacedLine]]:
    """One picture of `size_px` (width, height) with up to three lines of text, top to bottom.

    A character takes 14 px across and a line 28 px down; longer or more lines do not fit.
    """
    paper, ink = _colours(rng, style)
    image = Image.new("RGB", size_px, paper)
    draw = ImageDraw.Draw(image)
    margin = _draw_paper(rng, draw, size_px, paper, ink, style)

    placed = _place_lines(rng, lines, size_px, style)
    for line, font, x, y in placed:
        draw.text((x, y), line.text, font=font, fill=ink, anchor="ls")
    lines_placed = [line for line, _, _, _ in placed]
    _draw_ornaments(rng, draw, size_px, ink, lines_placed, margin, style)
    return _wear(rng, image, style), lines_placed


def _colours(rng: random.Random, style: Style) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if style.decoration and rng.random() < 0.8:
        paper, ink = rng.choice(PAPERS)
    else:
        grey, dark = rng.randint(217, 255), rng.randint(0, 45)
        paper, ink = (grey,) * 3, (dark,) * 3
    shift = [rng.randint(-8, 8) for _ in range(6)]
    paper = tuple(max(0, min(255, p + s)) for p, s in zip(paper, shift[:3], strict=True))
    ink = tuple(max(0, min(255, i + s)) for i, s in zip(ink, shift[3:], strict=True))
    return (ink, paper) if rng.random() < 0.12 else (paper, ink)


def _place_lines(
    rng: random.Random, lines: list[str], size_px: tuple[int, int], style: Style
) -> list[tuple[PlacedLine, ImageFont.FreeTypeFont, float, float]]:
    """Two patch rows a line and one patch column a character, moved by up to the jitter."""
    width, height = size_px
    font_name = rng.choice(style.fonts)
    align = rng.choice(("left", "centre", "free", "free"))
    shared_left = rng.uniform(0, 0.3)
    top = PATCH_PX * rng.randint(0, height // PATCH_PX - 2 * len(lines))

    placed = []
    for index, text in enumerate(lines):
        name = font_name if rng.random() < 0.7 else rng.choice(style.fonts)
        font = load_font(name, GRID_FONT_PX)
        share = {"left": shared_left, "centre": 0.5, "free": rng.random()}[align]
        spare = width // PATCH_PX - len(text)
        edge = 1 if spare >= 2 and style.decoration else 0  # keeps clear of frames, if it can
        x = PATCH_PX * (edge + round(share * (spare - 2 * edge)))
        x += rng.randint(-style.jitter_px, style.jitter_px)
        x = min(max(x, 0), round(width - font.getlength(text)))
        y = top + 2 * PATCH_PX * index + 22 + rng.randint(-style.jitter_px, style.jitter_px)
        edges = tuple(x + font.getlength(text[:i]) for i in range(len(text) + 1))
        placed.append((PlacedLine(text, edges, y - 0.73 * GRID_FONT_PX, y), font, x, y))
    return placed


def _draw_paper(
    rng: random.Random,
    draw: ImageDraw.ImageDraw,
    size_px: tuple[int, int],
    paper: tuple[int, ...],
    ink: tuple[int, ...],
    style: Style,
) -> int:
    """The sheet's edge: a frame, perforations, a torn zigzag, a desk; returns the margin in px."""
    width, height = size_px
    if rng.random() >= 0.8 * style.decoration:
        return 0
    kind = rng.choice(("frame", "double", "rounded", "perforated", "torn", "desk"))
    desk = rng.choice(DESKS)
    if kind == "frame":
        draw.rectangle((1, 1, width - 2, height - 2), outline=ink, width=rng.randint(1, 2))
    elif kind == "double":
        draw.rectangle((0, 0, width - 1, height - 1), outline=ink)
        draw.rectangle((2, 2, width - 3, height - 3), outline=ink)
    elif kind == "rounded":
        draw.rectangle((0, 0, width, height), fill=desk)
        draw.rounded_rectangle((1, 1, width - 2, height - 2), radius=rng.randint(5, 9), fill=paper)
    elif kind == "perforated":
        for y in range(rng.randint(0, 6), height, 9):
            for x in (0, width - 1):
                draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=desk)
    elif kind == "torn":
        for x in range(0, width, 6):
            draw.polygon(((x, 0), (x + 3, 3), (x + 6, 0)), fill=desk)
            draw.polygon(((x, height), (x + 3, height - 4), (x + 6, height)), fill=desk)
    else:
        draw.rectangle((0, 0, width, height), fill=desk)
        inset = [rng.randint(0, 4) for _ in range(4)]
        corners = ((inset[0], inset[1]), (width - inset[2], inset[3]))
        draw.polygon(
            (
                corners[0],
                corners[1],
                (width - inset[3], height - inset[0]),
                (inset[1], height - inset[2]),
            ),
            fill=paper,
        )
    return 5


def _draw_ornaments(
    rng: random.Random,
    draw: ImageDraw.ImageDraw,
    size_px: tuple[int, int],
    ink: tuple[int, ...],
    lines: list[PlacedLine],
    margin: int,
    style: Style,
) -> None:
    """Rules, a barcode and a logo, only where no text stands."""
    width, height = size_px
    if rng.random() < 0.4 * style.decoration:
        for above, below in pairwise(lines):
            gap = below.top_px - above.bottom_px
            if gap >= 7 and rng.random() < 0.6:
                y = round(above.bottom_px + gap / 2)
                step = rng.choice((1, 4, 6))
                for x in range(margin + 2, width - margin - 2, step):
                    draw.line((x, y, x + max(0, step - 3), y), fill=ink)
    below = lines[-1].bottom_px + 5
    if height - margin - below >= 8 and rng.random() < 0.7 * style.decoration:
        bottom = min(height - margin - 2, below + rng.randint(8, 16))
        x = margin + 4 + rng.randint(0, 10)
        end = x + rng.randint(40, max(41, width - 2 * margin - 20))
        while x < min(end, width - margin - 4):
            bar = rng.randint(1, 3)
            draw.rectangle((x, below, x + bar - 1, bottom), fill=ink)
            x += bar + rng.randint(1, 3)
    for line in lines:
        room_right = width - margin - line.edges_px[-1]
        if room_right >= 26 and rng.random() < 0.25 * style.decoration:
            tint = rng.choice(((196, 60, 48), (40, 96, 168), (46, 132, 80), (222, 150, 30)))
            left, middle, radius = line.edges_px[-1] + 8, (line.top_px + line.bottom_px) / 2, 7
            box = (left, middle - radius, left + 2 * radius, middle + radius)
            (draw.ellipse if rng.random() < 0.6 else draw.rectangle)(box, fill=tint)
            break


def _wear(rng: random.Random, image: Image.Image, style: Style) -> Image.Image:
    """A shadow across the sheet, a soft focus and sensor noise; no geometry changes."""
    worn = style.wear
    if not worn:
        return image
    if rng.random() < 0.3 * worn:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.6)))
    shadow, noise = rng.random() < 0.4 * worn, rng.random() < 0.5 * worn
    if not (shadow or noise):
        return image
    pixels = np.asarray(image, dtype=np.float32)
    if shadow:
        ramp = np.linspace(1.0, 1.0 - rng.uniform(0.05, 0.3), image.width, dtype=np.float32)
        pixels = pixels * (ramp if rng.random() < 0.5 else ramp[::-1])[None, :, None]
    if noise:
        generator = np.random.default_rng(rng.getrandbits(32))
        shape = (image.height, image.width, 1)
        pixels = pixels + generator.normal(0, rng.uniform(1, style.most_noise), shape).astype(
            np.float32
        )
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
