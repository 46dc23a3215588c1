"""Which known sequences to leave out, alone or with which taxon, so that they are like queries.

Input: the sequences of a reference and their lineages, as nodes of the tree. Output: (row, rank)
pairs. Invariants: none is drawn twice at a rank; the same generator gives the same draw.

Sequences that occur once come first: one that is not in a reference is most like these. One that
occurs under contradicting names is not tried: without one of its records the others remain, and
each such trial would be wrong, while a query gets both names and a tie.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from ..reads.lineages import RANKS
from ..training.heldout import NEW_TO_THE_MODEL
from .calibration import ALONE, GENUS, HIGHER_SHARES

SPECIES = RANKS.index("species")

FEWEST_NEW = 50
_HIGHER_TRIALS = 0.2  # of all trials; of these two fifths leave a family out


def like_queries(
    same: Mapping[str, Sequence[int]],
    paths: np.ndarray,
    nameless: Sequence[np.ndarray],
    rng: np.random.Generator,
) -> np.ndarray:
    """A row of each sequence that has one name, in random order, those that occur once first."""
    once = [rows[0] for rows in same.values() if len(rows) == 1]
    several = [
        rows[0]
        for rows in same.values()
        if len(rows) > 1 and not _contradict(paths[rows], nameless)
    ]
    return np.concatenate([rng.permutation(once), rng.permutation(several)]).astype(np.int64)


def choose_jobs(
    rows: np.ndarray,
    taxa: np.ndarray,
    num_trials: int,
    first_new: np.ndarray | None = None,
    unknown: float = 0.0,
) -> list[tuple[int, int]]:
    """Which sequence to leave out, and with which rank's taxon.

    Of the sequences that are left out with their taxon, one of each taxon comes first: a taxon that
    a reference lacks is most like one that it has few sequences of.

    Args:
        rows: numbers of the sequences, in random order.
        taxa: (sequences, ranks) of all.
        num_trials: at most.
        first_new: (rows,) of `first_new_rank`: a sequence that is new to the heads from a rank
            down is left out with the taxon of that rank only.
        unknown: share of those left out alone that are to be of genera that are new to the heads.
    """
    if first_new is None:
        first_new = np.full(len(rows), SPECIES + 1)
    num_higher = int(_HIGHER_TRIALS * num_trials)
    half = max((num_trials - num_higher) // 2, 1)
    counts = {ALONE: half, GENUS: half}
    for name in HIGHER_SHARES:
        times = 2 if name == "family" else 1
        counts[RANKS.index(name)] = num_higher * times // (len(HIGHER_SHARES) + 1)
    jobs = []
    for rank, count in counts.items():
        if rank == ALONE:
            some = _mixed(rows[first_new > GENUS], rows[first_new <= GENUS], unknown, count)
        else:
            new = rows[first_new == rank]
            some = new if len(new) >= FEWEST_NEW else rows[first_new > GENUS]
            some = some[_in_turn(taxa[some, rank])]
        jobs += [(int(row), rank) for row in some[:count]]
    return jobs


def _mixed(known: np.ndarray, new: np.ndarray, share: float, count: int) -> np.ndarray:
    """At most `count` rows, of which a share is new, or less where there are not as many."""
    if share < 1:
        count = min(count, round(len(known) / (1 - share)))
    num_new = min(round(share * count), len(new))
    return np.concatenate([new[:num_new], known[: count - num_new]])


def first_new_rank(classes: np.ndarray) -> np.ndarray:
    """The highest rank at which each sequence is new to the heads, 7 for none, (sequences,)."""
    new = classes <= NEW_TO_THE_MODEL
    return np.where(new.any(1), new.argmax(1), len(RANKS))


def without_species(
    jobs: Sequence[tuple[int, int]],
    rows: np.ndarray,
    taxa: np.ndarray,
    nameless: np.ndarray,
    rng: np.random.Generator,
) -> list[tuple[int, int]]:
    """The jobs, of which as many lack their species as if any of the rows were left out alone.

    Fine-tuning holds out no sequence that is the only one of its species, but queries may be such.

    Args:
        jobs: of rows that the model was not trained on.
        rows: of all sequences, in random order.
        taxa: (sequences, ranks) of all.
        nameless: of the species.
        rng: chooses.
    """
    species = taxa[:, SPECIES]
    sizes = np.bincount(species[rows], minlength=len(nameless))
    only, named = sizes[species] == 1, ~nameless[species]
    alone = [row for row, rank in jobs if rank == ALONE and named[row]]
    first = rows[named[rows]][: len(alone)]
    if not alone:
        return list(jobs)
    wanted, found = only[first].mean(), only[alone].mean()
    chance = max(wanted - found, 0.0) / max(1 - found, 1e-9)
    others = named & ~only
    return [
        (row, SPECIES if rank == ALONE and others[row] and rng.random() < chance else rank)
        for row, rank in jobs
    ]


def _in_turn(taxa: np.ndarray) -> np.ndarray:
    """Places of the first of each taxon, then of the second, and so on."""
    order = np.argsort(taxa, kind="stable")
    _, first, sizes = np.unique(taxa[order], return_index=True, return_counts=True)
    turn = np.empty(len(taxa), np.int64)
    turn[order] = np.arange(len(taxa)) - np.repeat(first, sizes)
    return np.argsort(turn, kind="stable")


def _contradict(paths: np.ndarray, nameless: Sequence[np.ndarray]) -> bool:
    """True if some paths have different names at a rank; a name that is not known agrees."""
    return any(
        len(np.unique(nodes[~nameless[rank][nodes]])) > 1 for rank, nodes in enumerate(paths.T)
    )
