"""Everything that names sequences, loaded: encoder, references, confidence.

Input: a config. Output: a `Namer` with its encoder, and a `Calibration`; names for sequences.
Invariants: whoever names sequences, a run over files or a server, gets the same from the same
options.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from ..options import ClassifyConfig
from ..reads.lineages import RANKS
from .calibration import ENOUGH_TRIALS, Calibration, calibrate
from .evidence import NO_HITS
from .heads import check_names, load_heads
from .leave_out import kept_trials
from .naming import Named, Namer, in_threads
from .reference import load_reference
from .vectors import cache_folder, prepare_vectors

if TYPE_CHECKING:
    from ..encode.encoder import Encoder

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Opened:
    """What names sequences, for several runs with the same options.

    Attributes:
        config: the options that it was opened with.
        encoder: None where only words find candidates.
        namer: the references.
        calibration: their confidence.
    """

    config: ClassifyConfig
    encoder: "Encoder | None"
    namer: Namer
    calibration: Calibration


def open_namer(
    config: ClassifyConfig, encoder: "Encoder | None" = None
) -> tuple["Encoder | None", Namer]:
    """Read the references and index them.

    Args:
        config: options.
        encoder: the model, where it is loaded already.

    Returns:
        The encoder, None where only words find candidates, and the references.
    """
    heads = load_heads(config.model or "") if config.method != "neighbours" else None
    reference = load_reference(
        config.reference,
        table=config.reference_table,
        name=config.reference_name,
        version=config.reference_version,
        columns=config.reference_columns,
        columns_option="reference_columns",
        header_taxonomy=config.header_taxonomy,
        heads=heads,
    )
    if heads and reference.ids:
        check_names(heads, reference.lineages, config.model or "", reference.name)
    encoder, reference = prepare_vectors(config, reference, encoder)
    if encoder and not reference.ids and encoder.strands == "given" and config.strand == "both":
        log.warning(
            "without a reference the strand of a sequence is not found, and each is named as it "
            "is given; pass --reference, or --strand minus for sequences on the other strand"
        )
    namer = Namer(
        reference,
        num_candidates=config.num_candidates,
        candidates=config.candidates,
        min_coverage=config.min_coverage,
        method=config.method,
        heads=heads,
    )
    return encoder, namer


def calibrate_namer(config: ClassifyConfig, namer: Namer) -> Calibration:
    """Confidence by left-out sequences, and the least that keeps a name at each rank."""
    trials = kept_trials(namer, config.num_trials, cache_folder(config))
    calibration = calibrate(
        trials,
        novel_share=config.novel_share,
        precision=config.precision,
        fixed_thresholds=config.threshold,
        single=_single_ranks(namer),
    )
    if calibration.untested:
        ranks = [RANKS[rank] for rank in calibration.untested]
        log.warning(
            "the reference has one %s: whether a sequence belongs to it cannot be tested. "
            "Confidence there is what such an identity gave in other references; add relatives",
            " and one ".join(ranks),
        )
    if calibration.has_few_trials:
        remedy = "A larger reference would allow more"
        if calibration.has_heads:
            remedy = "Fine-tuning with a larger --eval-fraction would allow more"
        if config.num_trials < ENOUGH_TRIALS:
            remedy = "Raise --num-trials"
        log.warning(
            "confidence rests on %d left-out sequences only; below %d the precision of %g may not "
            "hold. %s",
            calibration.num_trials,
            ENOUGH_TRIALS,
            config.precision,
            remedy,
        )
    return calibration


def _single_ranks(namer: Namer) -> list[str]:
    """Ranks of which the references have one taxon; none where the heads decide alone."""
    if namer.method in ("heads", "argmax"):
        return []
    nameless = zip(RANKS, namer.nameless, strict=True)
    return [rank for rank, without in nameless if (~without).sum() == 1]


def tell_thresholds(calibration: Calibration) -> dict[str, float | None]:
    """The least confidence that keeps a name, by rank; None where no name holds the precision."""
    return {
        rank: round(least, 3) if least <= 1 else None
        for rank, least in zip(RANKS, calibration.thresholds.tolist(), strict=True)
    }


def name_sequences(
    namer: Namer,
    sequences: Sequence[str],
    strand: str,
    embed: Callable[[list[str]], np.ndarray] | None,
) -> tuple[list[Named], np.ndarray | None]:
    """Name sequences, equal ones once.

    Args:
        namer: the references.
        sequences: cleaned.
        strand: `both`, `plus` or `minus`.
        embed: gives vectors of sequences; None where only words find candidates.

    Returns:
        What was decided for each, and the vectors, (sequences, hidden).
    """
    distinct = list(dict.fromkeys(sequences))
    oriented = list(in_threads(lambda sequence: namer.orient(sequence, strand), distinct))
    texts, strands = [text for text, _ in oriented], [taken for _, taken in oriented]
    vectors = embed(texts) if embed is not None and distinct else None
    broken = np.zeros(len(distinct), bool)
    if vectors is not None:
        broken = ~np.isfinite(vectors).all(axis=1)
        vectors = np.where(broken[:, None], 0, vectors)  # no neighbours by vector, only by words
    named = namer.name_all(texts, strands, vectors)
    if broken.any():
        log.warning("the model gives no finite vector for %d sequences", broken.sum())
        if namer.heads is not None:  # which read nothing else
            for at in np.flatnonzero(broken):
                named[at] = Named(texts[at], strands[at], NO_HITS, None, None)
    if strand == "both":
        vectors = _forget_strands(named, distinct, vectors, embed)
    place = {sequence: at for at, sequence in enumerate(distinct)}
    which = [place[sequence] for sequence in sequences]
    return [named[at] for at in which], None if vectors is None else vectors[which]


def _forget_strands(
    named: list[Named],
    given: Sequence[str],
    vectors: np.ndarray | None,
    embed: Callable[[list[str]], np.ndarray] | None,
) -> np.ndarray | None:
    """Show what aligns to nothing as it was given: shared words alone do not tell its strand."""
    places = [at for at, item in enumerate(named) if item.decision is None]
    turned = [at for at in places if named[at].sequence != given[at]]
    for at in places:
        named[at] = replace(named[at], sequence=given[at], strand=None)
    if turned and embed is not None and vectors is not None:
        vectors = vectors.copy()
        vectors[turned] = embed([given[at] for at in turned])
    return vectors
