"""Training, evaluation and novel parts of labelled sequences.

Input: sequences and their class numbers. Output: one of `train`, `eval`, `novel` for each.
Invariants: a group of similar sequences, at least the identical ones, is in one part; each stratum
gives its share, rounded up or down; the same seed gives the same split.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from ..reads.labels import UNKNOWN

_K = 16
_HASHES = 96
_BAND = 2  # hashes that must agree before two sequences are compared

TRAIN, EVAL, NOVEL = "train", "eval", "novel"


def split_rows(
    sequences: Sequence[str],
    labels: np.ndarray,
    *,
    eval_fraction: float = 0.1,
    identity: float = 1.0,
    novel_rank: int | None = None,
    novel_fraction: float = 0.0,
    seed: int = 0,
) -> np.ndarray:
    """Split by sequence identity, stratified by the deepest known rank.

    Args:
        sequences: cleaned.
        labels: (sequences, 7) class numbers, -1 where unknown.
        eval_fraction: share of the distinct sequences for evaluation. A class with one distinct
            sequence stays in training.
        identity: sequences about this alike are kept together; 1 is equal ones only.
        novel_rank: rank (5 genus, 4 family) of which whole taxa are held out as `novel`.
        novel_fraction: share of that rank's taxa held out.
        seed: of the random choice.

    Returns:
        (sequences,) of `train`, `eval`, `novel`.
    """
    rng = np.random.default_rng(seed)
    result = np.full(len(sequences), TRAIN, dtype="<U5")
    kin = groups_of_kin(sequences, identity)
    if novel_rank is not None and novel_fraction > 0:
        taxa = np.unique(labels[:, novel_rank])
        taxa = taxa[taxa != UNKNOWN]
        held = rng.choice(taxa, max(1, round(novel_fraction * len(taxa))), replace=False)
        rows_held = np.flatnonzero(np.isin(labels[:, novel_rank], held)).tolist()
        novel = {kin[row] for row in rows_held}
        result[[number in novel for number in kin]] = NOVEL
    groups: dict[int, list[int]] = defaultdict(list)
    for row in np.flatnonzero(result == TRAIN).tolist():
        groups[kin[row]].append(row)
    for rows in _draw_eval(list(groups.values()), labels, eval_fraction, rng):
        result[rows] = EVAL
    return result


def _draw_eval(
    groups: list[list[int]], labels: np.ndarray, fraction: float, rng: np.random.Generator
) -> list[list[int]]:
    """Draw groups of rows for evaluation, each stratum its share of them, rounded up or down.

    The strata stand in a random order and every 1/fraction-th group is drawn (systematic sampling:
    Madow 1949, https://doi.org/10.1214/aoms/1177729988), so that the total is right as well. What
    a stratum cannot give, no other has to: each keeps a group for training, as does each class of
    a group of several.
    """
    deepest = _deepest_classes(labels)
    classes = [Counter(deepest[row] for row in rows) for rows in groups]
    left = Counter(key for found in classes for key in found)  # groups that hold a class
    by_class: dict[tuple[int, int], list[int]] = defaultdict(list)
    for number, found in enumerate(classes):
        by_class[found.most_common(1)[0][0]].append(number)
    strata = list(by_class.values())
    drawn = []
    share = Fraction(fraction).limit_denominator(10**6)  # exact, or sums would drift
    due = Fraction(1, 2)  # rounds the total to the nearest number
    for at in rng.permutation(len(strata)).tolist():
        members = strata[at]
        due += min(share * len(members), Fraction(len(members) - 1))
        take = math.floor(due)
        due -= take
        for number in rng.permutation(members).tolist():
            if take and all(left[key] > 1 for key in classes[number]):
                left.subtract(classes[number].keys())
                drawn.append(groups[number])
                take -= 1
    return drawn


def _deepest_classes(labels: np.ndarray) -> list[tuple[int, int]]:
    """Deepest known rank of each row and its class there; (-1, -1) where none is known."""
    known = labels != UNKNOWN
    rank = np.where(known.any(1), labels.shape[1] - 1 - known[:, ::-1].argmax(1), -1)
    number = np.where(rank >= 0, labels[np.arange(len(labels)), rank], UNKNOWN)
    return list(zip(rank.tolist(), number.tolist(), strict=True))


def groups_of_kin(sequences: Sequence[str], identity: float = 1.0) -> list[int]:
    """Number sequences so that those about as alike as `identity` have the same number.

    Likeness is the Jaccard index of their 16-mers, either strand, estimated from 96 minimal
    hashes; an identity i of sequences of like length means an index of 1 / (2 exp(16 (1 - i)) - 1)
    (Ondov et al. 2016, https://doi.org/10.1186/s13059-016-0997-x). Groups are transitive: if
    a is like b and b like c, all three are one group. With `identity` 1 only equal ones are.

    >>> groups_of_kin(["ACGT", "ACGA", "ACGT"])
    [0, 1, 0]
    """
    numbers = {text: number for number, text in enumerate(dict.fromkeys(sequences))}
    group = np.arange(len(numbers))
    if identity < 1 and numbers:
        group = _join_alike(list(numbers), 1 / (2 * math.exp(_K * (1 - identity)) - 1))
    return [int(group[numbers[text]]) for text in sequences]


def _join_alike(distinct: list[str], least: float) -> np.ndarray:
    """Group number of each sequence, by locality-sensitive hashing.

    Within a bucket each sequence is compared with the first and with the one before. The LSH of
    datasketch compares all pairs: 24 s instead of 0.3 s for 4,000 near-identical sequences.
    """
    sketches = np.stack([_sketch(text) for text in distinct])
    usable = np.flatnonzero(sketches[:, 0] != _NO_HASH)
    edges = [np.zeros((2, 0), np.int64)]
    for band in range(0, _HASHES, _BAND):
        _, bucket = np.unique(sketches[usable, band : band + _BAND], axis=0, return_inverse=True)
        order = np.argsort(bucket.ravel(), kind="stable")
        bucket, members = bucket.ravel()[order], usable[order]
        later = np.flatnonzero(bucket[1:] == bucket[:-1]) + 1
        first = np.searchsorted(bucket, bucket[later])
        for other in (first, later - 1):
            pairs = np.stack([members[other], members[later]])
            alike = np.zeros(len(later))
            for column in range(_HASHES):
                alike += sketches[pairs[0], column] == sketches[pairs[1], column]
            edges.append(pairs[:, alike >= least * _HASHES])
    source, target = np.concatenate(edges, axis=1)
    graph = coo_array((np.ones(len(source), bool), (source, target)), (len(distinct),) * 2)
    return connected_components(graph, directed=False)[1]


_NO_HASH = np.uint64(2**64 - 1)
_FACTORS = np.random.default_rng(0).integers(1, 2**63, _HASHES, dtype=np.uint64) * 2 + 1
_DIGITS = np.full(256, 4, np.uint64)
_DIGITS[np.frombuffer(b"ACGT", np.uint8)] = range(4)


def _sketch(text: str) -> np.ndarray:
    """Minimal hash of the 16-mers for each of the hash functions, (96,) uint64."""
    digits = _DIGITS[np.frombuffer(text.encode(), np.uint8)]
    if len(digits) < _K:
        return np.full(_HASHES, _NO_HASH)
    windows = np.lib.stride_tricks.sliding_window_view(digits, _K)
    windows = windows[(windows < 4).all(1)]
    if not len(windows):
        return np.full(_HASHES, _NO_HASH)
    powers = np.uint64(4) ** np.arange(_K, dtype=np.uint64)
    codes = np.minimum(windows @ powers, (3 - windows) @ powers[::-1])  # either strand
    codes = np.unique(codes) + np.uint64(1)
    # Multiply and shift (Dietzfelbinger et al. 1997), twice: near codes must not stay near.
    hashes = codes[:, None] * _FACTORS
    hashes ^= hashes >> np.uint64(29)
    hashes *= np.uint64(0xBF58476D1CE4E5B9)
    hashes ^= hashes >> np.uint64(32)
    return hashes.min(0)
