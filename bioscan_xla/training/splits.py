"""Training, evaluation and novel parts of labelled sequences.

Enters: sequences and their class numbers. Leaves: one word a row. Guaranteed: equal sequences are
never on both sides; the same seed gives the same split.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

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
    for row, number in enumerate(kin):
        if result[row] == TRAIN:
            groups[number].append(row)
    strata: dict[tuple[int, int], list[list[int]]] = defaultdict(list)
    for rows in groups.values():
        known = np.flatnonzero(labels[rows[0]] != UNKNOWN)
        deepest = int(known[-1]) if len(known) else -1
        strata[deepest, int(labels[rows[0], deepest]) if len(known) else 0].append(rows)
    owed = 0.0
    for key in sorted(strata):
        members = strata[key]
        # Fractions carry over from stratum to stratum, so that the whole has the right share.
        owed += eval_fraction * len(members)
        take = min(int(owed), len(members) - 1)
        if take > 0:
            owed -= take
            for at in rng.permutation(len(members))[:take]:
                result[members[at]] = EVAL
    return result


def groups_of_kin(sequences: Sequence[str], identity: float = 1.0) -> list[int]:
    """Number sequences so that those about as alike as `identity` have the same number.

    Likeness is the Jaccard index of their 16-mers, either strand, estimated from 96 minimal
    hashes; an identity i of sequences of like length means an index of 1 / (2 exp(16 (1 - i)) - 1)
    (Ondov et al. 2016, https://doi.org/10.1186/s13059-016-0997-x). Groups are closed: if a
    is like b and b like c, all three are one group. With `identity` 1 only equal sequences are.
    """
    numbers = {text: number for number, text in enumerate(dict.fromkeys(sequences))}
    group = list(range(len(numbers)))
    if identity < 1:
        _join_alike(list(numbers), 1 / (2 * math.exp(_K * (1 - identity)) - 1), group)
    return [_root(group, numbers[text]) for text in sequences]


def _root(group: list[int], number: int) -> int:
    while group[number] != number:
        group[number] = group[group[number]]
        number = group[number]
    return number


def _join_alike(distinct: list[str], least: float, group: list[int]) -> None:
    sketches = np.stack([_sketch(text) for text in distinct])
    for band in range(0, _HASHES, _BAND):
        members: dict[bytes, list[int]] = defaultdict(list)
        for number in np.flatnonzero(sketches[:, 0] != _NO_HASH).tolist():
            members[sketches[number, band : band + _BAND].tobytes()].append(number)
        for found in members.values():
            for before, number in itertools.pairwise(found):
                for other in {found[0], before}:
                    a, b = _root(group, other), _root(group, number)
                    if a != b and (sketches[other] == sketches[number]).mean() >= least:
                        group[max(a, b)] = min(a, b)


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
