"""What rows cost in a batch, and which stay together because they ask about one picture.

Shape letters: N rows of the data, n rows of an epoch, U units.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class RowSizes:
    """What the rows to be trained cost, a line a row [N].

    `pictures` has the same number for rows that are the same up to the end of their first picture,
    and are to be gathered; of their tokens and patches, `shared_tokens` and `shared_patches` are
    that picture's. None where rows stay apart.
    """

    tokens: np.ndarray
    patches: np.ndarray
    pictures: np.ndarray | None = None
    shared_tokens: np.ndarray | None = None
    shared_patches: np.ndarray | None = None

    @classmethod
    def of_counts(
        cls,
        counts: np.ndarray,
        *,
        patch_px: int = 1,
        picture_keys: np.ndarray | None = None,
        tokens_a_view: int = 0,
    ) -> "RowSizes":
        """From an examination's counts. A patch has `patch_px` x `patch_px` pixels.

        `picture_keys` [N] name each row's beginning, up to the end of its first picture, 0 for
        none. How much of a row is its first picture is known where it is the only one; of other
        rows nothing counts as shared, so that they are thought to cost more than they do.
        """
        tokens = counts["num_tokens"].astype(np.int64)
        patches = counts["num_view_pixels"].astype(np.int64) // patch_px**2
        if picture_keys is None:
            return cls(tokens, patches)
        single = counts["num_images"] == 1
        in_text = np.where(single, counts["num_views"].astype(np.int64) * tokens_a_view, 0)
        return cls(
            tokens,
            patches,
            _numbered(picture_keys),
            np.minimum(in_text, tokens),
            np.where(single, patches, 0),
        )

    def telling_pictures(self, picture_keys: np.ndarray) -> "RowSizes":
        """The same, with rows of one picture known even if they are not gathered; then nothing
        counts as shared.
        """
        if self.pictures is not None:
            return self
        return RowSizes(self.tokens, self.patches, _numbered(picture_keys))

    def of_rows(self, rows_n: np.ndarray) -> "RowSizes":
        """The lines of these rows, in their order."""
        lines = (self.pictures, self.shared_tokens, self.shared_patches)
        rest = (None if line is None else line[rows_n] for line in lines)
        return RowSizes(self.tokens[rows_n], self.patches[rows_n], *rest)

    def sums(self, starts_U: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and patches of units [U], each the lines from one start to the next; what their
        rows share counts once.
        """

        def summed(of_N: np.ndarray, shared_N: np.ndarray | None) -> np.ndarray:
            if shared_N is None:
                return np.add.reduceat(of_N, starts_U)
            own = np.add.reduceat(of_N - shared_N, starts_U)
            return own + np.maximum.reduceat(shared_N, starts_U)

        return (
            summed(self.tokens, self.shared_tokens),
            summed(self.patches, self.shared_patches),
        )


def _numbered(picture_keys: np.ndarray) -> np.ndarray:
    """The same number for rows of one key; a number of its own for each row without, 0."""
    _, pictures = np.unique(picture_keys, return_inverse=True)
    alone = np.flatnonzero(picture_keys == 0)
    pictures[alone] = len(picture_keys) + alone
    return pictures


@dataclass(frozen=True)
class Limits:
    """What a batch may hold: `rows`, or else as many as its tokens, padding included, and the
    patches of its pictures allow. With `packs` there is no padding.

    A row over a budget makes a batch by itself.
    """

    rows: int | None = None
    tokens: int | None = None
    patches: int | None = None
    packs: bool = False

    @property
    def most(self) -> tuple[float, float]:
        """Tokens and patches."""
        return self.tokens or np.inf, self.patches or np.inf


@dataclass(frozen=True)
class Units:
    """Rows that stay in one batch, those of one picture or one alone: the rows, unit after unit
    [n], and where each unit begins, with its tokens and patches [U].
    """

    rows: np.ndarray
    starts: np.ndarray
    tokens: np.ndarray
    patches: np.ndarray

    @property
    def num_rows(self) -> np.ndarray:
        """How many rows each has."""
        return np.diff(self.starts, append=len(self.rows))

    def in_order(self, order_U: np.ndarray) -> "Units":
        """The same units, in another order."""
        rows, starts = in_order_of(self.rows, self.starts, order_U)
        return Units(rows, starts, self.tokens[order_U], self.patches[order_U])


def gather(rows_n: np.ndarray, sizes: RowSizes, limits: Limits, rng: np.random.Generator) -> Units:
    """Units of the rows of an epoch: those of one picture, as many as `limits` allow.

    A unit takes the place of one of its rows, whichever the `rng` says, so that rows whose picture
    is theirs alone keep their order. A row that comes twice is in two units.
    """
    if sizes.pictures is None or limits.rows == 1:
        lines = sizes.of_rows(rows_n)
        return Units(rows_n, np.arange(len(rows_n)), lines.tokens, lines.patches)
    pictures_n = sizes.pictures[rows_n]
    again_n = _times_before(rows_n)
    by_picture = np.lexsort((rng.random(len(rows_n)), again_n, pictures_n))
    pictures_n, again_n, gathered = pictures_n[by_picture], again_n[by_picture], rows_n[by_picture]
    is_first = np.ones(len(rows_n), bool)
    is_first[1:] = (pictures_n[1:] != pictures_n[:-1]) | (again_n[1:] != again_n[:-1])
    lines = sizes.of_rows(gathered)
    if limits.rows:
        first_of = np.maximum.accumulate(np.where(is_first, np.arange(len(rows_n)), 0))
        is_first |= (np.arange(len(rows_n)) - first_of) % limits.rows == 0
    else:
        _part_over_budget(is_first, lines, limits)
    starts = np.flatnonzero(is_first)
    units = Units(gathered, starts, *lines.sums(starts))
    return units.in_order(np.argsort(by_picture[starts]))


def _times_before(rows_n: np.ndarray) -> np.ndarray:
    """How often each row came before its place [n]."""
    order = np.argsort(rows_n, kind="stable")
    ordered = rows_n[order]
    is_first = np.ones(len(rows_n), bool)
    is_first[1:] = ordered[1:] != ordered[:-1]
    places = np.arange(len(rows_n))
    times = np.empty(len(rows_n), np.int64)
    times[order] = places - np.maximum.accumulate(np.where(is_first, places, 0))
    return times


def _part_over_budget(is_first: np.ndarray, lines: RowSizes, limits: Limits) -> None:
    """Mark further first rows, where the rows of one picture are over a budget together."""
    assert lines.shared_tokens is not None
    assert lines.shared_patches is not None
    most_tokens, most_patches = limits.most
    tokens = patches = shared_tokens = shared_patches = 0
    each = zip(
        is_first.tolist(),
        (lines.tokens - lines.shared_tokens).tolist(),
        (lines.patches - lines.shared_patches).tolist(),
        lines.shared_tokens.tolist(),
        lines.shared_patches.tolist(),
        strict=True,
    )
    for place, (first, own_tokens, own_patches, their_tokens, their_patches) in enumerate(each):
        tokens, patches = tokens + own_tokens, patches + own_patches
        shared_tokens = max(shared_tokens, their_tokens)
        shared_patches = max(shared_patches, their_patches)
        over = tokens + shared_tokens > most_tokens or patches + shared_patches > most_patches
        if first or over:
            is_first[place] = True
            tokens, patches = own_tokens, own_patches
            shared_tokens, shared_patches = their_tokens, their_patches


def in_order_of(
    values_n: np.ndarray, starts: np.ndarray, order: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Pieces of unequal length in another order: their values, and where each begins then."""
    lengths = np.diff(starts, append=len(values_n))[order]
    new_starts = np.cumsum(lengths) - lengths
    places = np.repeat(starts[order] - new_starts, lengths) + np.arange(len(values_n))
    return values_n[places], new_starts
