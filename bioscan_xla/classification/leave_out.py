"""Trials: known sequences named as if they were queries, with themselves or their genus left out.

Input: a `Namer`. Output: `Trials`. Invariants: a trial never sees its own
sequence or an identical one; the same seed gives the same trials.
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
from .calibration import GENUS, Trials
from .evidence import RANK_FEATURES, Decision
from .naming import Named, Namer, in_threads

log = logging.getLogger(__name__)

_FEWEST_REFERENCES = 100
_FORM = 7  # counts up when features or votes change: kept trials are then run again


def run_trials(namer: Namer, num_trials: int = 1500, seed: int = 0) -> Trials | None:
    """Leave sequences out, one by one and by whole genera, and name them.

    References are left out, except where the heads decide alone: then the sequences that the model
    was not trained on are named, and a whole genus is left out by taking its classes away. Where
    heads and references decide together, the references that the model was not trained on are.

    Args:
        namer: references, indexed.
        num_trials: at most; half leave a single sequence out, half its genus.
        seed: of the choice.

    Returns:
        The trials; None where there are too few sequences.
    """
    rng = np.random.default_rng(seed)
    if namer.method in ("heads", "argmax"):
        return _try_heads(namer, num_trials, rng)
    reference = namer.reference
    num = len(reference.ids)
    if num < _FEWEST_REFERENCES:
        log.warning(
            "%d references are too few for calibration: confidence is the share of the votes, "
            "and novelty is not reported",
            num,
        )
        return None
    # A query that is no reference is like a reference whose sequence occurs once.
    same: dict[str, list[int]] = defaultdict(list)
    for row, sequence in enumerate(reference.sequences):
        same[sequence].append(row)
    rows = np.array([rows[0] for rows in same.values()])
    shares_of = _held_out_shares(namer, rows)
    if shares_of:
        rows = np.array(sorted(shares_of))
    rows = rng.permutation(rows)[: max(num_trials // 2, 1)]
    log.info("calibrating with %d left-out references", 2 * len(rows))
    return _try_references(namer, rows, same, shares_of)


def _try_references(
    namer: Namer,
    rows: np.ndarray,
    same: Mapping[str, Sequence[int]],
    shares_of: Mapping[int, Sequence[np.ndarray]],
) -> Trials:
    """Trials of some references.

    Args:
        namer: references, indexed.
        rows: of the references to leave out.
        same: rows of each sequence.
        shares_of: what the heads say of a row, where they say anything.
    """
    reference = namer.reference
    num = len(reference.ids)
    genera = reference.tree.paths[reference.leaves, GENUS]

    def left_out(job: tuple[int, bool]) -> tuple[Named, np.ndarray]:
        row, whole_genus = job
        excluded = np.zeros(num, bool)
        excluded[same[reference.sequences[row]]] = True
        if whole_genus:
            excluded |= genera == genera[row]
        cosines = None
        if namer.use_vectors and reference.vectors is not None:
            cosines = reference.vectors @ reference.vectors[row]
        shares = shares_of.get(row)
        if shares is not None and whole_genus:
            assert namer.decoder is not None
            shares = namer.decoder.without(shares, int(genera[row]))
        named = namer.name(reference.sequences[row], "plus", cosines, excluded, shares)
        return named, excluded

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
    known = np.stack([~namer.nameless[r][truth[:, r]] for r in range(len(RANKS))], axis=1)
    return _judge(
        namer,
        [(item.decision, item.features, len(item.sequence)) for item in found],
        np.where(known, truth, UNKNOWN),
        known & ~np.stack(known_after),
        np.array([whole for _, whole in jobs]),
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
        "The confidence is that of the references alone; --method neighbours is safer",
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
            "own probability, which is not calibrated",
            0 if held is None else len(held.vectors),
            _FEWEST_REFERENCES,
        )
        return None
    rows = rng.permutation(len(held.vectors))[: max(num_trials // 2, 1)]
    truth = decoder.nodes(held.classes.astype(np.int64))
    jobs = [(int(row), False) for row in rows]
    jobs += [(int(row), True) for row in rows if truth[row, GENUS] >= 0]
    log.info("calibrating with %d sequences that the model was not trained on", len(rows))

    def name(job: tuple[int, bool]) -> tuple[Decision, np.ndarray, int]:
        row, whole_genus = job
        shares = [values[0] for values in heads.probabilities(held.vectors[[row]])]
        if whole_genus:
            shares = decoder.without(shares, int(truth[row, GENUS]))
        length_bp = int(held.length_bp[row])
        return *namer.decide_by_heads(shares, length_bp), length_bp

    decided = list(in_threads(name, jobs))
    whole = np.array([whole_genus for _, whole_genus in jobs])
    truth = truth[[row for row, _ in jobs]]
    novel = truth == NEW_TO_THE_MODEL
    novel[:, GENUS:] |= whole[:, None] & (truth[:, GENUS:] >= 0)
    return _judge(namer, decided, truth, novel, whole)


def _judge(
    namer: Namer,
    decided: Sequence[tuple[Decision | None, np.ndarray | None, int]],
    truth: np.ndarray,
    novel: np.ndarray,
    whole_genus: np.ndarray,
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
    return Trials(features, named, correct, novel, truth != UNKNOWN, lengths, whole_genus)


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
