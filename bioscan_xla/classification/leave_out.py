"""Trials: references named as if they were queries, with themselves or their genus left out.

Input: a `Namer`. Output: `Trials`. Invariants: a trial never sees its own
sequence or an identical one; the same seed gives the same trials.
"""

import hashlib
import json
import logging
import os
from collections import defaultdict
from pathlib import Path

import numpy as np

from ..reads.lineages import RANKS
from .calibration import GENUS, Trials
from .evidence import RANK_FEATURES
from .naming import Named, Namer, in_threads

log = logging.getLogger(__name__)

_FEWEST_REFERENCES = 100
_FORM = 3  # counts up when features or votes change: kept trials are then run again


def run_trials(namer: Namer, num_trials: int = 1500, seed: int = 0) -> Trials | None:
    """Leave references out, one by one and by whole genera, and name them.

    Args:
        namer: references, indexed.
        num_trials: at most; half leave a single sequence out, half its genus.
        seed: of the choice.

    Returns:
        The trials; None where there are fewer than 100 references.
    """
    reference = namer.reference
    num = len(reference.ids)
    if num < _FEWEST_REFERENCES:
        log.warning(
            "%d references are too few for calibration: confidence is the share of the votes, "
            "and novelty is not reported",
            num,
        )
        return None
    rng = np.random.default_rng(seed)
    rows = rng.permutation(num)[: max(num_trials // 2, 1)]
    same: dict[str, list[int]] = defaultdict(list)
    for row, sequence in enumerate(reference.sequences):
        same[sequence].append(row)
    genera = reference.tree.paths[reference.leaves, GENUS]
    log.info("calibrating with %d left-out references", 2 * len(rows))

    def left_out(job: tuple[int, bool]) -> tuple[Named, np.ndarray]:
        row, whole_genus = job
        excluded = np.zeros(num, bool)
        excluded[same[reference.sequences[row]]] = True
        if whole_genus:
            excluded |= genera == genera[row]
        cosines = None
        if namer.use_vectors and reference.vectors is not None:
            cosines = reference.vectors @ reference.vectors[row]
        return namer.name(reference.sequences[row], "plus", cosines, excluded), excluded

    jobs = [(int(row), False) for row in rows]
    # A genus that is not known cannot be left out.
    jobs += [(int(row), True) for row in rows if not namer.nameless[GENUS][genera[row]]]
    known_after: list[np.ndarray] = []
    found: list[Named] = []
    counts = [np.bincount(reference.tree.paths[reference.leaves, r]) for r in range(len(RANKS))]
    for (row, _), (named, excluded) in zip(jobs, in_threads(left_out, jobs), strict=True):
        found.append(named)
        gone = reference.tree.paths[reference.leaves[excluded]]
        path = reference.tree.paths[reference.leaves[row]]
        left = [counts[r][path[r]] - (gone[:, r] == path[r]).sum() for r in range(len(RANKS))]
        known_after.append(np.array(left) > 0)
    truth = reference.tree.paths[reference.leaves[[row for row, _ in jobs]]]
    return _judge(namer, found, truth, np.stack(known_after))


def _judge(
    namer: Namer, decided: list[Named], truth: np.ndarray, known_after: np.ndarray
) -> Trials:
    shape = len(decided), len(RANKS)
    features = np.zeros((*shape, len(RANK_FEATURES)))
    named = np.zeros(shape, bool)
    correct = np.full(shape, -1, np.int8)
    known = np.stack([~namer.nameless[r][truth[:, r]] for r in range(len(RANKS))], axis=1)
    for at, item in enumerate(decided):
        if item.decision is None or item.features is None:
            continue
        features[at] = item.features
        for rank in range(len(RANKS)):
            node = item.decision.path[rank]
            named[at, rank] = not namer.nameless[rank][node]
            if named[at, rank] and known[at, rank]:
                correct[at, rank] = node == truth[at, rank]
    lengths = np.array([len(item.sequence) for item in decided])
    return Trials(features, named, correct, known & ~known_after, known, lengths)


def kept_trials(namer: Namer, num_trials: int, folder: Path) -> Trials | None:
    """The trials of a reference, run once and kept in a folder."""
    reference = namer.reference
    told = [
        reference.content_hash,
        reference.fingerprint if namer.use_vectors else None,
        namer.use_words,
        namer.num_candidates,
        namer.min_coverage,
        num_trials,
        _FORM,
    ]
    key = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]
    path = folder / f"trials-{key}.npz"
    if path.is_file():
        with np.load(path) as arrays:
            return Trials(**arrays)
    trials = run_trials(namer, num_trials)
    if trials is not None:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".part")
        with open(temporary, "wb") as file:
            np.savez_compressed(file, **vars(trials))
        os.replace(temporary, path)
    return trials
