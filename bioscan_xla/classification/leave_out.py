"""Trials: known sequences named as if they were queries, left out alone or with their whole taxon.

Input: a `Namer`. Output: `Trials`. Invariants: a trial never sees its own record, nor an identical
one; the same seed gives the same trials.

Sequences that occur once come first: one that is not in a reference is most like these. One that
occurs under contradicting names is not tried: without one of its records the others remain, and
each such trial would be wrong, while a query gets both names and a tie.
"""

import hashlib
import json
import logging
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ..reads.labels import UNKNOWN
from ..reads.lineages import RANKS
from ..training.heldout import NEW_TO_THE_MODEL
from .calibration import ALONE, GENUS, HIGHER_SHARES, Trials
from .evidence import RANK_FEATURES, Decision
from .naming import Named, Namer, in_threads

log = logging.getLogger(__name__)

RULES = 13
"""Counts up when evidence, features or votes change: kept trials are then run again, and results of
other rules are not added to."""

_FEWEST_REFERENCES = 100
_HIGHER_TRIALS = 0.2  # of all trials; of these two fifths leave a family out


def run_trials(namer: Namer, num_trials: int, seed: int = 0) -> Trials | None:
    """Leave sequences out, one by one and by whole taxa, and name them.

    References are left out, except where the heads decide alone: then the sequences that the model
    was not trained on are named, and a whole genus is left out by taking its classes away. Where
    heads and references decide together, the references that the model was not trained on are.

    Args:
        namer: references, indexed.
        num_trials: at most; two fifths leave a single sequence out, as many its genus, the rest
            its family, order, class or phylum.
        seed: of the choice.

    Returns:
        The trials; None where there are too few sequences.
    """
    rng = np.random.default_rng(seed)
    if namer.method in ("heads", "argmax"):
        return _try_heads(namer, num_trials, rng)
    reference = namer.reference
    paths = reference.tree.paths[reference.leaves]
    same: dict[str, list[int]] = defaultdict(list)
    for row, sequence in enumerate(reference.sequences):
        same[sequence].append(row)
    rows = _like_queries(same, paths, namer.nameless, rng)
    if len(rows) < _FEWEST_REFERENCES:
        log.warning(
            "%d different references are too few for calibration: confidence is the share of the "
            "votes, and novelty is not reported",
            len(rows),
        )
        return None
    shares_of = _held_out_shares(namer, rows)
    if shares_of:
        rows = np.array([row for row in rows if row in shares_of])

    def possible(row: int, rank: int) -> bool:
        # A taxon that is not known, or that is the whole reference, cannot be left out.
        node = paths[row, rank]
        return not namer.nameless[rank][node] and bool((paths[:, rank] != node).any())

    jobs = [
        (row, rank)
        for row, rank in _jobs(rows, paths[rows], num_trials)
        if rank == ALONE or possible(row, rank)
    ]
    log.info("calibrating with %d trials of left-out references", len(jobs))
    return _try_references(namer, jobs, same, shares_of)


def _like_queries(
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


def _jobs(rows: np.ndarray, taxa: np.ndarray, num_trials: int) -> list[tuple[int, int]]:
    """Which sequence to leave out, and with which rank's taxon.

    Of the sequences that are left out with their taxon, one of each taxon comes first: a taxon that
    a reference lacks is most like one that it has few sequences of.

    Args:
        rows: numbers of the sequences, in random order.
        taxa: (rows, ranks) of each.
        num_trials: at most.
    """
    num_higher = int(_HIGHER_TRIALS * num_trials)
    half = max((num_trials - num_higher) // 2, 1)
    counts = {ALONE: half, GENUS: half}
    for name in HIGHER_SHARES:
        times = 2 if name == "family" else 1
        counts[RANKS.index(name)] = num_higher * times // (len(HIGHER_SHARES) + 1)
    return [
        (int(row), rank)
        for rank, count in counts.items()
        for row in (rows if rank == ALONE else rows[_in_turn(taxa[:, rank])])[:count]
    ]


def _in_turn(taxa: np.ndarray) -> np.ndarray:
    """Places of the first of each taxon, then of the second, and so on."""
    order = np.argsort(taxa, kind="stable")
    _, first, sizes = np.unique(taxa[order], return_index=True, return_counts=True)
    turn = np.empty(len(taxa), np.int64)
    turn[order] = np.arange(len(taxa)) - np.repeat(first, sizes)
    return np.argsort(turn, kind="stable")


def _try_references(
    namer: Namer,
    jobs: Sequence[tuple[int, int]],
    same: Mapping[str, Sequence[int]],
    shares_of: Mapping[int, Sequence[np.ndarray]],
) -> Trials:
    """Trials of some references.

    Args:
        namer: references, indexed.
        jobs: rows of the references to leave out, each with the rank of the taxon or `ALONE`.
        same: rows of each sequence.
        shares_of: what the heads say of a row, where they say anything.
    """
    reference = namer.reference
    paths = reference.tree.paths[reference.leaves]

    def left_out(job: tuple[int, int]) -> tuple[Named, np.ndarray]:
        row, rank = job
        excluded = np.zeros(len(paths), bool)
        excluded[same[reference.sequences[row]]] = True
        shares = shares_of.get(row)
        if rank != ALONE:
            excluded |= paths[:, rank] == paths[row, rank]
            if shares is not None:
                assert namer.decoder is not None
                shares = namer.decoder.without(shares, rank, int(paths[row, rank]))
        cosines = None
        if namer.use_vectors and reference.vectors is not None:
            cosines = reference.vectors @ reference.vectors[row]
        named = namer.name(reference.sequences[row], "plus", cosines, excluded, shares)
        return named, excluded

    known_after: list[np.ndarray] = []
    found: list[Named] = []
    counts = [np.bincount(paths[:, r]) for r in range(len(RANKS))]
    for (row, _), (named, excluded) in zip(jobs, in_threads(left_out, jobs), strict=True):
        found.append(named)
        gone, path = paths[excluded], paths[row]
        left = [counts[r][path[r]] - (gone[:, r] == path[r]).sum() for r in range(len(RANKS))]
        known_after.append(np.array(left) > 0)
    truth = paths[[row for row, _ in jobs]]
    known = np.stack([~namer.nameless[r][truth[:, r]] for r in range(len(RANKS))], axis=1)
    return _judge(
        namer,
        [(item.decision, item.features, len(item.sequence)) for item in found],
        np.where(known, truth, UNKNOWN),
        known & ~np.stack(known_after),
        np.array([rank for _, rank in jobs]),
    )


def _contradict(paths: np.ndarray, nameless: Sequence[np.ndarray]) -> bool:
    """True if some paths have different names at a rank; a name that is not known agrees."""
    return any(
        len(np.unique(nodes[~nameless[rank][nodes]])) > 1 for rank, nodes in enumerate(paths.T)
    )


def _held_out_shares(namer: Namer, rows: np.ndarray) -> dict[int, list[np.ndarray]]:
    """What the heads say of the references they were not trained on; empty without heads."""
    if namer.heads is None:
        return {}
    heldout = namer.heads.heldout
    found = {}
    if heldout is not None:
        places = heldout.places([namer.reference.sequences[row] for row in rows])
        for row, place in zip(rows[places >= 0], places[places >= 0], strict=True):
            found[int(row)] = [
                shares[0] for shares in namer.heads.probabilities(heldout.vectors[[place]])
            ]
    if len(found) >= _FEWEST_REFERENCES:
        return found
    log.warning(
        "%d of the references are known not to have been trained on; calibrating heads needs %d. "
        "Confidence is calibrated as if the heads said nothing; --method neighbours is safer, or "
        "fine-tune with a larger --eval-fraction",
        len(found),
        _FEWEST_REFERENCES,
    )
    return {}


def _try_heads(namer: Namer, num_trials: int, rng: np.random.Generator) -> Trials | None:
    """Trials of the heads alone."""
    assert namer.heads is not None
    assert namer.decoder is not None
    heads, decoder, held = namer.heads, namer.decoder, namer.heads.heldout
    if held is None or len(held.vectors) < _FEWEST_REFERENCES:
        log.warning(
            "the model keeps %d held-out sequences; calibration needs %d. Confidence is the heads' "
            "own probability, which is not calibrated; fine-tune with a larger --eval-fraction",
            0 if held is None else len(held.vectors),
            _FEWEST_REFERENCES,
        )
        return None
    truth = decoder.nodes(held.classes.astype(np.int64))
    rows = rng.permutation(len(held.vectors))
    jobs = [
        (row, rank)
        for row, rank in _jobs(rows, truth[rows], num_trials)
        if rank == ALONE or truth[row, rank] >= 0
    ]
    log.info("calibrating with %d trials of sequences that the model was not trained on", len(jobs))

    def name(job: tuple[int, int]) -> tuple[Decision, np.ndarray, int]:
        row, rank = job
        shares = [values[0] for values in heads.probabilities(held.vectors[[row]])]
        if rank != ALONE:
            shares = decoder.without(shares, rank, int(truth[row, rank]))
        length_bp = int(held.length_bp[row])
        return *namer.decide_by_heads(shares, length_bp), length_bp

    decided = list(in_threads(name, jobs))
    left_out = np.array([rank for _, rank in jobs])
    truth = truth[[row for row, _ in jobs]]
    below = np.arange(len(RANKS)) >= left_out[:, None]
    novel = (truth == NEW_TO_THE_MODEL) | (below & (truth >= 0))
    return _judge(namer, decided, truth, novel, left_out)


def _judge(
    namer: Namer,
    decided: Sequence[tuple[Decision | None, np.ndarray | None, int]],
    truth: np.ndarray,
    novel: np.ndarray,
    left_out: np.ndarray,
) -> Trials:
    """Trials of decisions; truth (trials, ranks) has nodes, -1 where no name is known."""
    shape = len(decided), len(RANKS)
    features = np.zeros((*shape, len(RANK_FEATURES)))
    named = np.zeros(shape, bool)
    correct = np.full(shape, -1, np.int8)
    for at, (decision, values, _) in enumerate(decided):
        if decision is None or values is None:
            continue
        features[at] = values
        named[at] = [name is not None for name in namer.reference.tree.names_along(decision.path)]
        judged = named[at] & (truth[at] != UNKNOWN)
        correct[at, judged] = (decision.path == truth[at])[judged]
    lengths = np.array([length_bp for _, _, length_bp in decided])
    of_genus = truth[:, GENUS]
    genus = np.where(of_genus >= 0, of_genus, -1 - np.arange(len(truth)))  # unknown: one each
    return Trials(features, named, correct, novel, truth != UNKNOWN, lengths, left_out, genus)


def kept_trials(namer: Namer, num_trials: int, folder: Path) -> Trials | None:
    """The trials of a reference, run once and kept in a folder."""
    reference = namer.reference
    told = [
        reference.content_hash,
        reference.fingerprint if namer.use_vectors else None,
        namer.use_words,
        namer.num_candidates,
        namer.min_coverage,
        namer.method,
        namer.heads.content_hash if namer.heads else None,
        num_trials,
        RULES,
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
