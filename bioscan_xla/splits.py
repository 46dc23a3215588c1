"""Training, evaluation and novel parts of labelled sequences.

Enters: sequences and their class numbers. Leaves: one word a row. Guaranteed: equal sequences are
never on both sides; the same seed gives the same split.
"""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from .labels import UNKNOWN

TRAIN, EVAL, NOVEL = "train", "eval", "novel"


def split_rows(
    sequences: Sequence[str],
    labels: np.ndarray,
    *,
    eval_fraction: float = 0.1,
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
        novel_rank: rank (5 genus, 4 family) of which whole taxa are held out as `novel`.
        novel_fraction: share of that rank's taxa held out.
        seed: of the random choice.

    Returns:
        (sequences,) of `train`, `eval`, `novel`.
    """
    rng = np.random.default_rng(seed)
    result = np.full(len(sequences), TRAIN, dtype="<U5")
    if novel_rank is not None and novel_fraction > 0:
        taxa = np.unique(labels[:, novel_rank])
        taxa = taxa[taxa != UNKNOWN]
        held = rng.choice(taxa, max(1, round(novel_fraction * len(taxa))), replace=False)
        rows_held = np.flatnonzero(np.isin(labels[:, novel_rank], held)).tolist()
        novel = {sequences[row] for row in rows_held}
        result[[sequence in novel for sequence in sequences]] = NOVEL
    groups: dict[str, list[int]] = defaultdict(list)
    for row, sequence in enumerate(sequences):
        if result[row] == TRAIN:
            groups[sequence].append(row)
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
