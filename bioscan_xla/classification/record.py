"""One row of `classified.parquet`.

Input: what was decided for some queries. Output: an Arrow table of `SCHEMA`.
Invariants: `<rank>` is null from the first rank that does not hold its threshold downwards, and
where the reference knows no name; confidence never rises downwards.

| column | what |
|---|---|
| sequence_id, source, row | of the input |
| dna_sequence, length_bp, strand | the cleaned sequence on the strand that was taken; as given,
  and null, where no alignment tells the strand |
| `<rank>` | name as truncated |
| `best_<rank>` | name before truncation |
| `confidence_<rank>` | 0 to 1, of `best_<rank>`; null where it has no name |
| assigned_rank, confidence | deepest rank that was kept, and its confidence; null if unassigned |
| novelty | probability that its genus is not in the reference; null without calibration |
| novelty_rank | highest rank at which it looks new, null where it does not |
| novelty_statement | in words: "probably a new genus in Comatulida" |
| novelty_trust | area under the ROC curve of novelty at this length, from left-out references |
| identity, query_coverage | of the most identical reference, 0 to 1; null without evidence |
| num_candidates, num_evidence | candidates, and those whose alignment is evidence |
| tied_rank, tied_lineages | equally good lineages, and the highest rank at which they differ |
| contradiction | True where heads that decided apart contradict each other |
| hits | up to 10, the most identical first: id, lineage, identity, coverage; of the first three
  also the aligned rows (`query_row`, `reference_row`, gaps as `-`) |
| vector | of the query, float16; null without a model |
| reads, num_samples | over all samples that are no controls; null without counts |
| control_reads | over the negative controls; null without counts |
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from ..reads.lineages import RANKS
from .alignment import draw
from .calibration import GENUS, Calibration, length_band
from .evidence import RANK_FEATURES
from .naming import Named
from .reference import Reference

_NUM_HITS = 10
_NUM_DRAWN = 3
_TRUSTED = 0.8  # area under the ROC curve from which novelty is stated without a caveat
_NEW_RANKS = tuple(range(RANKS.index("order"), RANKS.index("species") + 1))

HIT = pa.struct(
    [
        ("reference_id", pa.string()),
        ("lineage", pa.string()),
        ("identity", pa.float32()),
        ("query_coverage", pa.float32()),
        ("overlap", pa.float32()),
        ("columns", pa.int32()),
        ("score", pa.int32()),
        ("word_similarity", pa.float32()),
        ("vector_similarity", pa.float32()),
        ("query_start", pa.int32()),
        ("reference_start", pa.int32()),
        ("query_row", pa.string()),
        ("reference_row", pa.string()),
    ]
)

SCHEMA = pa.schema(
    [
        ("sequence_id", pa.string()),
        ("dna_sequence", pa.string()),
        ("source", pa.string()),
        ("row", pa.int64()),
        ("length_bp", pa.int32()),
        ("strand", pa.string()),
        *[(rank, pa.string()) for rank in RANKS],
        *[(f"best_{rank}", pa.string()) for rank in RANKS],
        *[(f"confidence_{rank}", pa.float32()) for rank in RANKS],
        ("assigned_rank", pa.string()),
        ("confidence", pa.float32()),
        ("novelty", pa.float32()),
        ("novelty_rank", pa.string()),
        ("novelty_statement", pa.string()),
        ("novelty_trust", pa.float32()),
        ("identity", pa.float32()),
        ("query_coverage", pa.float32()),
        ("num_candidates", pa.int32()),
        ("num_evidence", pa.int32()),
        ("tied_rank", pa.string()),
        ("tied_lineages", pa.list_(pa.string())),
        ("contradiction", pa.bool_()),
        ("hits", pa.list_(HIT)),
        ("vector", pa.list_(pa.float16())),
        ("reads", pa.int64()),
        ("num_samples", pa.int32()),
        ("control_reads", pa.int64()),
    ]
)


def lineage_text(names: Sequence[str | None]) -> str:
    """Names with `;` between, down to the last known one; `?` for a gap."""
    last = max((at for at, name in enumerate(names) if name), default=-1)
    return ";".join(name or "?" for name in names[: last + 1])


def is_unplaced(row: Mapping[str, Any]) -> bool:
    """True where nothing tells the lineage: no reference aligns to it, and no heads name it."""
    nameless = all(row[f"confidence_{rank}"] is None for rank in RANKS)
    return nameless and not row["num_evidence"]


def make_records(
    ids: Sequence[str],
    source: str,
    rows: Sequence[int],
    named: Sequence[Named],
    vectors: np.ndarray | None,
    reference: Reference,
    calibration: Calibration,
) -> pa.Table:
    """Rows of `SCHEMA`; vectors (queries, hidden) or None."""
    num = len(ids)
    features = np.zeros((num, len(RANKS), len(RANK_FEATURES)))
    has_name = np.zeros((num, len(RANKS)), bool)
    for at, item in enumerate(named):
        if item.decision is not None and item.features is not None:
            features[at] = item.features
            names = reference.tree.names_along(item.decision.path)
            has_name[at] = [name is not None for name in names]
    confidence = calibration.confidences(features, has_name)
    novelty = calibration.novelties(features) if calibration.num_trials else None
    records = []
    for at, item in enumerate(named):
        record = {
            "sequence_id": ids[at],
            "dna_sequence": item.sequence,
            "source": source,
            "row": int(rows[at]),
            "length_bp": len(item.sequence),
            "strand": item.strand,
            "num_candidates": item.hits.num_candidates,
            "num_evidence": len(item.hits.numbers),
            "tied_lineages": [],
            "contradiction": item.decision is not None and item.decision.leaf < 0,
            "hits": _describe_hits(item, reference),
            "vector": None if vectors is None else vectors[at].astype(np.float16),
        }
        if item.decision is not None:
            record |= _describe_name(item, confidence[at], reference, calibration)
            record |= _describe_ties(item, reference)
        if item.hits.aligned:
            record["identity"] = item.hits.aligned[0].identity
            record["query_coverage"] = item.hits.aligned[0].coverage
        if novelty is not None:
            record |= _describe_novelty(record, novelty[at], item, calibration)
        records.append(record)
    return pa.Table.from_pylist(records, schema=SCHEMA)


def _describe_name(
    item: Named, confidence: np.ndarray, reference: Reference, calibration: Calibration
) -> dict:
    assert item.decision is not None
    names = reference.tree.names_along(item.decision.path)
    record: dict = {}
    kept = True
    for rank, name, value, threshold in zip(
        RANKS, names, confidence.tolist(), calibration.thresholds.tolist(), strict=True
    ):
        record[f"best_{rank}"] = name
        if name is None:
            continue
        record[f"confidence_{rank}"] = value
        # Half a millionth: rounding must not part equal confidences.
        kept = kept and value >= threshold - 5e-7
        if kept:
            record |= {rank: name, "assigned_rank": rank, "confidence": value}
    return record


def _describe_ties(item: Named, reference: Reference) -> dict:
    """Lineages that nothing tells from the one taken: equal paths, and equal alignments."""
    assert item.decision is not None
    tree = reference.tree
    own = tree.names_along(item.decision.path)
    leaves = set(item.decision.equal)
    if not item.by_heads:
        leaves.update(reference.leaves[item.hits.numbers[item.hits.tied]].tolist())
    others = sorted({tree.lineage(leaf) for leaf in leaves} - {own}, key=lineage_text)
    # One that knows fewer ranks is no other taxon.
    others = [
        other
        for other in others
        if any(a and b and a != b for a, b in zip(own, other, strict=True))
    ]
    if not others:
        return {}
    differs = [
        next(at for at, (a, b) in enumerate(zip(own, other, strict=True)) if a and b and a != b)
        for other in others
    ]
    return {
        "tied_rank": RANKS[min(differs)],
        "tied_lineages": [lineage_text(other) for other in others],
    }


def _describe_hits(item: Named, reference: Reference) -> list[dict]:
    result = []
    for at, (number, hit) in enumerate(zip(item.hits.numbers, item.hits.aligned, strict=True)):
        if at == _NUM_HITS:
            break
        rows: tuple[str | None, str | None] = (None, None)
        if at < _NUM_DRAWN:
            target = reference.sequences[number]
            rows = draw(
                hit.operations, item.sequence[hit.query_start :], target[hit.target_start :]
            )
        result.append(
            {
                "reference_id": reference.ids[number],
                "lineage": lineage_text(reference.tree.lineage(reference.leaves[number])),
                "identity": hit.identity,
                "query_coverage": hit.coverage,
                "overlap": hit.overlap,
                "columns": hit.columns,
                "score": hit.score,
                "word_similarity": float(item.hits.word_similarity[at]),
                "vector_similarity": float(item.hits.vector_similarity[at]),
                "query_start": hit.query_start,
                "reference_start": hit.target_start,
                "query_row": rows[0],
                "reference_row": rows[1],
            }
        )
    return result


def _describe_novelty(
    record: dict, novelty: np.ndarray, item: Named, calibration: Calibration
) -> dict:
    band = int(length_band(np.array([len(item.sequence)]))[0])
    trust = float(calibration.novelty_trust[band])
    result: dict = {
        "novelty": float(novelty[GENUS]) if item.decision is not None else 1.0,
        "novelty_trust": None if np.isnan(trust) else trust,
    }
    if item.decision is None:
        return result | {"novelty_statement": "nothing like it in the reference"}
    new = [rank for rank in _NEW_RANKS if novelty[rank] > 0.5]
    # What is named at a rank is not new there.
    new = [rank for rank in new if record.get(RANKS[rank]) is None]
    # Where the best references have no name, or several that fit, the taxon may well be theirs.
    tied = RANKS.index(record["tied_rank"]) if record.get("tied_rank") else len(RANKS)
    if not new or new[0] >= tied or record.get(f"best_{RANKS[new[0]]}") is None:
        return result
    parent = RANKS[new[0] - 1]
    above = [rank for rank in RANKS[: new[0]] if record.get(rank)]
    words = f"probably a new {RANKS[new[0]]}"
    if above:
        words += f" in {record[above[-1]]}"
    if record.get(f"best_{parent}") and record.get(parent) is None:
        words += f", {parent} uncertain"
    if np.isnan(trust) or trust < _TRUSTED:
        words += "; at this length novelty is hard to tell"
    return result | {"novelty_rank": RANKS[new[0]], "novelty_statement": words}
