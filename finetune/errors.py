"""What went wrong, in words for the person who can mend it.

Every class derives from `FinetuneError`, which the command line prints without a traceback (exit
2), and from the builtin it refines, so that callers of the Python functions can catch what they
expect.
"""

from collections.abc import Sequence


class FinetuneError(Exception):
    """Something the user can mend; the message says where, what was found, what was expected, what
    to do.
    """

    def __init__(self, *args: object, resume_with: tuple[str, ...] | None = ()):
        super().__init__(*args)
        self.resume_with = resume_with
        """Settings with which a run that it ended goes on by `--resume`; None where none helps."""


class RecipeError(FinetuneError, ValueError):
    """The recipe cannot be read, or does not hold together."""


class DataError(FinetuneError, ValueError):
    """Rows or images that cannot be used."""


class ModelError(FinetuneError, ValueError):
    """The model folder or Hub id cannot be used."""


class RunDirError(FinetuneError, OSError):
    """The output folder is taken, full, unwritable or no run."""


def message_of(error: FinetuneError) -> str:
    """The message alone, without the worker's traceback that PyTorch wraps around an error of a
    loading process.
    """
    text = str(error)
    marker = f"{type(error).__module__}.{type(error).__name__}: "
    return text.rpartition(marker)[2].strip() if text.startswith("Caught ") else text


def summarise_problems(
    title: str, problems: Sequence[str], *, shown: int = 20, total: int | None = None
) -> str:
    """One message for many problems: the title with their number, then each on a line of its own,
    `shown` at most. `total` counts those that are not in `problems`, too.
    """
    total = len(problems) if total is None else total
    lines = [f"{title}: {total:,} problem" + ("" if total == 1 else "s")]
    lines += [f"  {problem}" for problem in problems[:shown]]
    if total > len(lines) - 1:
        lines.append(f"  ... and {total - len(lines) + 1:,} more")
    return "\n".join(lines)


class HubError(FinetuneError, OSError):
    """The Hub cannot be reached, or does not let in what was sent."""
