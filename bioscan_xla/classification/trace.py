"""The columns of an alignment whose score is known, mostly without filling a matrix.

Input: two sequences, the score of their best alignment and where it ends. Output: its columns.
Invariants: exact. A guess is taken only if its score is the best score, so that it is one of the
best alignments; None says that no guess was as good and the matrix has to be filled.

The first guess has no gap: the diagonal on which the best alignment ends. The second goes from
diagonal to diagonal by words that occur once in each sequence, with one gap between two diagonals,
at the place where it costs least. Near relatives differ like this. Filling a matrix takes
milliseconds for a pair of 600 bp and half a second for one of 7,000; a guess a tenth.
"""

from itertools import pairwise
from typing import NamedTuple

import numpy as np

MATCH, MISMATCH = 2, -4
GAP_OPEN, GAP_EXTEND = 20, 2
"""A gap of n bases costs GAP_OPEN + GAP_EXTEND * (n - 1)."""

_WORD_BP = 12
_N = ord("N")


class Trace(NamedTuple):
    """Columns of an alignment, and where they begin in both sequences.

    `operations` has a letter a column: M match, X mismatch, I base of the query alone, D base of
    the reference alone.
    """

    query_start: int
    target_start: int
    operations: str


def as_letters(sequence: str) -> np.ndarray:
    """(bases,) uint8."""
    return np.frombuffer(sequence.encode(), np.uint8)


def guess_trace(
    query: np.ndarray, target: np.ndarray, score: int, query_end: int, target_end: int
) -> Trace | None:
    """Columns of one of the best alignments, or None.

    Args:
        query: from `as_letters`.
        target: likewise.
        score: of the best alignment.
        query_end: its last base of the query.
        target_end: its last base of the target.
    """
    end = target_end - query_end
    straight = _walk(query, target, [end], [], score)
    if straight is not None:
        return straight
    diagonals, borders = _shared_diagonals(query, target)
    return _walk(query, target, diagonals, borders, score) if len(diagonals) > 1 else None


def _column_scores(query: np.ndarray, target: np.ndarray, diagonal: int, first: int, last: int):
    """Scores of the query's bases `first` to `last` on a diagonal, (bases,) int64."""
    ours, theirs = query[first:last], target[first + diagonal : last + diagonal]
    unsure = (ours == _N) | (theirs == _N)
    return np.where(unsure, 0, np.where(ours == theirs, MATCH, MISMATCH))


def _walk(
    query: np.ndarray,
    target: np.ndarray,
    diagonals: list[int],
    borders: list[tuple[int, int]],
    score: int,
) -> Trace | None:
    """The alignment along diagonals if it has the wanted score.

    Args:
        query: letters.
        target: letters.
        diagonals: target place minus query place, along the query.
        borders: between two diagonals, the first and last query base where the gap may be.
        score: that is wanted.
    """
    start = max(0, -diagonals[0])
    end = min(len(query), len(target) - diagonals[-1])
    total, parts, place = 0, [], start
    for (here, there), (low, high) in zip(pairwise(diagonals), borders, strict=True):
        gap = there - here
        skipped = max(0, -gap)  # bases of the query that the gap takes
        low, high = max(low, place), min(high, end, len(target) - here, len(query) - skipped)
        first = max(low, -there - skipped)
        last = min(high, len(target) - there - skipped)
        if last < first:
            return None
        # Up to `cut` on the old diagonal, from `cut + skipped` on the new one.
        old = _column_scores(query, target, here, first, last)
        new = _column_scores(query, target, there, first + skipped, last + skipped)
        gain = np.concatenate([[0], np.cumsum(old)]) - np.concatenate([[0], np.cumsum(new)])
        cut = first + int(gain.argmax())
        parts.append((here, place, cut, gap))
        total -= GAP_OPEN + GAP_EXTEND * (abs(gap) - 1)
        place = cut + skipped
    if end < place:
        return None
    parts.append((diagonals[-1], place, end, 0))
    total += sum(int(_column_scores(query, target, d, a, b).sum()) for d, a, b, _ in parts)
    if total != score:
        return None
    text = []
    for diagonal, first, last, gap in parts:
        same = query[first:last] == target[first + diagonal : last + diagonal]
        text.append(np.where(same, ord("M"), ord("X")).astype(np.uint8).tobytes().decode())
        text.append("D" * gap if gap > 0 else "I" * -gap)
    return Trace(start, start + diagonals[0], "".join(text))


def _words(letters: np.ndarray) -> np.ndarray:
    """A number for each word of `_WORD_BP` bases, (words,) int64; words with N are numbers too."""
    codes = ((letters >> 1) & 3).astype(np.int64)
    pairs = codes[:-1] << 2 | codes[1:]
    fours = pairs[:-2] << 4 | pairs[2:]
    return fours[:-8] << 16 | fours[4:-4] << 8 | fours[8:]


def _single(words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Words that occur once, sorted, and their places."""
    order = np.argsort(words, kind="stable")
    ordered = words[order]
    new = np.append(True, ordered[1:] != ordered[:-1])
    alone = new & np.append(new[1:], True)
    return ordered[alone], order[alone]


def _shared_diagonals(
    query: np.ndarray, target: np.ndarray
) -> tuple[list[int], list[tuple[int, int]]]:
    """Diagonals of the words that occur once in each, in their order along the query.

    Returns:
        The diagonals, and between two of them the range of query places for the gap.
    """
    if min(len(query), len(target)) < _WORD_BP:
        return [], []
    ours, ours_at = _single(_words(query))
    theirs, theirs_at = _single(_words(target))
    _, left, right = np.intersect1d(ours, theirs, assume_unique=True, return_indices=True)
    if not len(left):
        return [], []
    order = np.argsort(ours_at[left])
    at = ours_at[left][order]
    diagonal = theirs_at[right][order] - at
    changes = np.flatnonzero(np.append(True, diagonal[1:] != diagonal[:-1]))
    sizes = np.diff(np.append(changes, len(at)))
    # A word alone between others is mostly chance.
    kept = [n for n, size in enumerate(sizes.tolist()) if size > 1]
    diagonals: list[int] = []
    borders: list[tuple[int, int]] = []
    last = 0
    for n in kept:
        first, end = changes[n], changes[n] + sizes[n] - 1
        if diagonals and diagonals[-1] == diagonal[first]:
            last = int(at[end]) + _WORD_BP
            continue
        if diagonals:
            # The new word may begin before the old one ends, at most by its length.
            borders.append((max(last - _WORD_BP, 0), int(at[first]) + _WORD_BP))
        diagonals.append(int(diagonal[first]))
        last = int(at[end]) + _WORD_BP
    return diagonals, borders
