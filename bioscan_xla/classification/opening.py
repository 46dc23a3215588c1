"""Everything that names sequences, loaded: encoder, references, confidence.

Input: a config. Output: a `Namer` with its encoder, and a `Calibration`; names for sequences.
Invariants: whoever names sequences, a run over files or a server, gets the same from the same
options.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..options import ClassifyConfig
from ..reads.lineages import RANKS
from .calibration import Calibration, calibrate
from .evidence import NO_HITS
from .heads import check_names, load_heads
from .leave_out import kept_trials
from .naming import Named, Namer
from .reference import load_reference
from .vectors import cache_folder, prepare_vectors

if TYPE_CHECKING:
    from ..encode.encoder import Encoder

log = logging.getLogger(__name__)

_ENOUGH_TRIALS = 500


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
    )
    if trials is not None and calibration.num_trials < _ENOUGH_TRIALS:
        log.warning(
            "confidence rests on %d left-out sequences only; below %d the precision of %g may not "
            "hold. Raise --num-trials, or take a larger reference",
            calibration.num_trials,
            _ENOUGH_TRIALS,
            config.precision,
        )
    return calibration


def tell_thresholds(calibration: Calibration) -> dict[str, float]:
    """The least confidence that keeps a name, by rank."""
    return {rank: round(float(t), 3) for rank, t in zip(RANKS, calibration.thresholds, strict=True)}


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
    oriented = [namer.orient(sequence, strand) for sequence in distinct]
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
    place = {sequence: at for at, sequence in enumerate(distinct)}
    which = [place[sequence] for sequence in sequences]
    return [named[at] for at in which], None if vectors is None else vectors[which]
