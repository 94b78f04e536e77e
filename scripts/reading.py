"""The texts nano learns to read and the questions it learns to answer.

A small model remembers prompts instead of understanding them, so each question is asked in many
wordings. No answer here is JSON: that is left for an adapter to learn.
"""

import random
import string
from dataclasses import dataclass

WHOLE = (
    "What is written?",
    "What is written here?",
    "Read the text.",
    "Read all the text.",
    "Read the label.",
    "Read the ticket.",
    "Read the receipt.",
    "What does the sign say?",
    "What does it say?",
    "Transcribe the image.",
    "What text is in the image?",
    "Write down the text.",
)
ONE_LINE = (
    "What is on line {}?",
    "What is written on line {}?",
    "Read line {}.",
    "What does line {} say?",
    "Line {}?",
    "Write down line {}.",
)
LAST_LINE = ("What is on the last line?", "Read the last line.", "Read the bottom line.")
FIRST_LINE = ("What is on the first line?", "Read the first line.", "Read the top line.")
KINDS = {
    "code": ("What is the code?", "Read the code.", "Which code is printed?"),
    "date": ("What is the date?", "Read the date.", "Which date is printed?"),
    "price": ("What is the total?", "What is the price?", "Read the total.", "How much is it?"),
}
EXTRACT = (
    "Extract the fields.",
    "List the fields.",
    "What are the fields?",
    "Extract the text.",
    "Extract the lines.",
)
QUESTIONS = (
    *WHOLE,
    *(wording.format(number) for wording in ONE_LINE for number in (1, 2, 3)),
    *LAST_LINE,
    *FIRST_LINE,
    *(wording for wordings in KINDS.values() for wording in wordings),
    *EXTRACT,
)
JSON_PUNCTUATION = ('{"', '":"', '","', '"}', '":', ',"', '":{"', '"},"', '"]}', '":["')
FIELD_NAMES = "code date total item price name store time number amount answer text line label"
BPE_CORPUS = (
    ["User:", "Assistant:", *QUESTIONS] * 20
    + list(JSON_PUNCTUATION) * 200
    + (FIELD_NAMES.split() + [" " + name for name in FIELD_NAMES.split()]) * 20
)


@dataclass(frozen=True)
class Reading:
    """What stands in a picture, what is asked about it and the answer."""

    lines: list[str]
    question: str
    answer: str


def random_price(rng: random.Random) -> str:
    sign = rng.choice(("$", "$", ""))
    whole = min(9999, rng.randint(1, 10 ** rng.randint(1, 4)))  # $10000.00 is a character too long
    return f"{sign}{whole}.{rng.randint(0, 99):02d}"


def random_date(rng: random.Random) -> str:
    mark = rng.choice("/.-")
    day, month, year = rng.randint(1, 28), rng.randint(1, 12), rng.randint(0, 99)
    return f"{day:02d}{mark}{month:02d}{mark}{year:02d}"


def random_code(rng: random.Random) -> str:
    letters = "".join(rng.choices(string.ascii_uppercase, k=rng.randint(1, 3)))
    digits = "".join(rng.choices(string.digits, k=rng.randint(2, 4)))
    return letters + rng.choice(("", "", "-")) + digits


def random_word(rng: random.Random) -> str:
    """Pronounceable nonsense, so that reading cannot lean on a vocabulary."""
    pairs = rng.randint(2, 4)
    return "".join(rng.choice("BCDFGHJKLMNPQRSTVWXZ") + rng.choice("AEIOUY") for _ in range(pairs))


def random_string(rng: random.Random, max_chars: int) -> str:
    alphabet = string.ascii_uppercase + string.digits
    text = "".join(rng.choices(alphabet, k=rng.randint(max(1, min(3, max_chars - 1)), max_chars)))
    if len(text) > 4 and rng.random() < 0.15:
        middle = rng.randrange(1, len(text) - 1)
        text = text[:middle] + rng.choice(".-/:#") + text[middle + 1 :]
    return text


def random_line(rng: random.Random, max_chars: int) -> str:
    if rng.random() < 0.5:
        return random_string(rng, max_chars)
    maker = rng.choice((random_price, random_date, random_code, random_word))
    return maker(rng)[:max_chars]


def draw_reading(rng: random.Random, num_lines: int, max_chars: int) -> Reading:
    """Half of the questions ask for all lines, most of the others for one."""
    choice = rng.random()
    if choice < 0.15 and num_lines > 1 and max_chars == 8:
        makers = {"code": random_code, "date": random_date, "price": random_price}
        kinds = rng.sample(sorted(makers), num_lines)
        lines = [makers[kind](rng) for kind in kinds]
        place = rng.randrange(num_lines)
        return Reading(lines, rng.choice(KINDS[kinds[place]]), lines[place])
    lines = [random_line(rng, max_chars) for _ in range(num_lines)]
    if choice < 0.55:
        return Reading(lines, rng.choice(WHOLE), "\n".join(lines))
    if choice < 0.65:
        return Reading(lines, rng.choice(EXTRACT), ", ".join(lines))
    if choice < 0.72:
        return Reading(lines, rng.choice(LAST_LINE), lines[-1])
    if choice < 0.79:
        return Reading(lines, rng.choice(FIRST_LINE), lines[0])
    place = rng.randrange(num_lines)
    return Reading(lines, rng.choice(ONE_LINE).format(place + 1), lines[place])
