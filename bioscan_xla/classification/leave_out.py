"""Trials: known sequences named as if they were queries, left out alone or with their whole taxon.

Input: a `Namer`. Output: `Trials`. Invariants: a trial never sees its own record, nor an identical
one; the same seed gives the same trials.
"""

import hashlib
import json
import logging
import os
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from ..reads.labels import UNKNOWN
from ..reads.lineages import RANKS
from ..training.heldout import NEW_TO_THE_MODEL
from .calibration import ALONE, GENUS, Trials
from .evidence import RANK_FEATURES, Decision
from .naming import Named, Namer, in_threads
from .trial_jobs import (
    FEWEST_NEW,
    SPECIES,
    choose_jobs,
    first_new_rank,
    like_queries,
    without_species,
)

log = logging.getLogger(__name__)

RULES = 15
"""Counts up when evidence, features or votes change: kept trials are then run again, and results of
other rules are not added to."""

_FEWEST_REFERENCES = 100


def run_trials(namer: Namer, num_trials: int, seed: int = 0) -> Trials | None:
    """Leave sequences out, one by one and by whole taxa, and name them.

    References are left out, except where the heads decide alone: then the sequences that the model
    was not trained on are named. Where heads and references decide together, the references that
    the model was not trained on are. In place of a whole taxon, a sequence of a taxon that the
    model was not trained on is taken; where there are too few, its classes are taken away.

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
    rows = like_queries(same, paths, namer.nameless, rng)
    if len(rows) < _FEWEST_REFERENCES:
        log.warning(
            "%d different references are too few for calibration: confidence is the share of the "
            "votes, and novelty is not reported",
            len(rows),
        )
        return None
    shares_of = _held_out_shares(namer, rows)

    def possible(row: int, rank: int) -> bool:
        # A taxon that is not known, or that is the whole reference, cannot be left out.
        node = paths[row, rank]
        return not namer.nameless[rank][node] and bool((paths[:, rank] != node).any())

    if shares_of:
        jobs = _held_out_jobs(namer, rows, shares_of, num_trials, rng)
    else:
        jobs = choose_jobs(rows, paths, num_trials)
    jobs = [(row, rank) for row, rank in jobs if rank == ALONE or possible(row, rank)]
    log.info("calibrating with %d trials of left-out references", len(jobs))
    return _try_references(namer, jobs, same, shares_of)


def _held_out_jobs(
    namer: Namer,
    rows: np.ndarray,
    held_out: Collection[int],
    num_trials: int,
    rng: np.random.Generator,
) -> list[tuple[int, int]]:
    """What to leave out for heads and references together; `rows` are like queries."""
    assert namer.heads is not None
    assert namer.heads.heldout is not None
    assert namer.decoder is not None
    reference = namer.reference
    paths = reference.tree.paths[reference.leaves]
    held = np.array([row for row in rows if row in held_out])
    places = namer.heads.heldout.places([reference.sequences[row] for row in held])
    first_new = _new_to_heads(namer.heads.heldout.classes[places])
    # Of some genera that the references have the heads know nothing, and queries are of these, too.
    genus = paths[rows, GENUS]
    learnt = np.isin(genus, namer.decoder.class_nodes(GENUS))
    learnt &= ~np.isin(genus, paths[held[first_new <= GENUS], GENUS])
    named = ~namer.nameless[GENUS][genus]
    unknown = 1 - float(learnt[named].mean()) if named.any() else 0.0
    jobs = choose_jobs(held, paths, num_trials, first_new, unknown)
    return without_species(jobs, rows, paths, namer.nameless[SPECIES], rng)


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


def _new_to_heads(classes: np.ndarray) -> np.ndarray:
    """`first_new_rank` of held-out sequences; a warning if hardly any is of a new genus."""
    first_new = first_new_rank(classes)
    if (first_new == GENUS).sum() < FEWEST_NEW:
        log.warning(
            "fewer than %d held-out sequences are of genera that the model was not trained on, so "
            "what its heads say of unknown genera is estimated by taking genera out of them; "
            "fine-tune with --novel-rank genus to have it measured",
            FEWEST_NEW,
        )
    return first_new


def _held_out_shares(namer: Namer, rows: np.ndarray) -> dict[int, list[np.ndarray]]:
    """What the heads say of the references they were not trained on; empty without heads."""
    if namer.heads is None:
        return {}
    heldout = namer.heads.heldout
    places = np.zeros(0, np.int64)
    if heldout is not None:
        places = heldout.places([namer.reference.sequences[row] for row in rows])
    num_known = 0 if heldout is None else _num_of_known_genera(heldout.classes[places[places >= 0]])
    if heldout is None or num_known < _FEWEST_REFERENCES:
        log.warning(
            "%d of the references are known not to have been trained on and of a genus that was; "
            "calibrating heads needs %d. Confidence is calibrated as if the heads said nothing; "
            "--method neighbours is safer, or fine-tune with a larger --eval-fraction",
            num_known,
            _FEWEST_REFERENCES,
        )
        return {}
    return {
        int(row): [shares[0] for shares in namer.heads.probabilities(heldout.vectors[[place]])]
        for row, place in zip(rows[places >= 0], places[places >= 0], strict=True)
    }


def _num_of_known_genera(classes: np.ndarray) -> int:
    """How many held-out sequences are like queries whose genus the heads know.

    Those of new genera, however many, do not tell how often the others are named right.
    """
    return int((first_new_rank(classes) > GENUS).sum())


def _try_heads(namer: Namer, num_trials: int, rng: np.random.Generator) -> Trials | None:
    """Trials of the heads alone."""
    assert namer.heads is not None
    assert namer.decoder is not None
    heads, decoder, held = namer.heads, namer.decoder, namer.heads.heldout
    num_known = 0 if held is None else _num_of_known_genera(held.classes)
    if held is None or num_known < _FEWEST_REFERENCES:
        log.warning(
            "the model keeps %d held-out sequences of genera that it was trained on; calibration "
            "needs %d. Confidence is the heads' own probability, which is not calibrated; "
            "fine-tune with a larger --eval-fraction",
            num_known,
            _FEWEST_REFERENCES,
        )
        return None
    truth = decoder.nodes(held.classes.astype(np.int64))
    rows = rng.permutation(len(held.vectors))
    jobs = [
        (row, rank)
        for row, rank in choose_jobs(rows, truth, num_trials, _new_to_heads(truth[rows]))
        if rank == ALONE or truth[row, rank] != UNKNOWN
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
    novel = (truth <= NEW_TO_THE_MODEL) | (below & (truth >= 0))
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
    unknown = of_genus.min(initial=0) - 1 - np.arange(len(truth))  # one each
    genus = np.where(of_genus == UNKNOWN, unknown, of_genus)
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
