"""Classified rows to what the report page shows.

Input: the rows of a classification, one at a time. Output: an `Overview`.
Invariants: one pass; memory grows with lineages and samples, not with rows. Of more sequences than
the page can draw, a random part (the same in each run) is drawn; all are counted.
"""

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np

from ..reads.lineages import RANKS, Lineage
from .counts import Counts
from .record import is_unplaced
from .samples import Sample

NUM_BINS = 25
_NUM_IDENTITIES = 1000
_MOST_POINTS = 100_000
_MOST_NUMBERS = 50_000_000  # of the vectors that are kept for the projection
_NUM_NOVEL = 30
_NUM_CONTROLS = 50
_COLUMNS = 80  # of an alignment, on one line


@dataclass(frozen=True)
class NovelSequence:
    """A sequence that looks new, and why.

    Attributes:
        sequence_id: its id.
        says: a phrase such as "probably a new genus in Comatulida".
        score: novelty, 0 to 1.
        evidence: a sentence on its nearest reference.
        alignment: lines in threes: query, marks (`|` equal, `*` different, `-` gap), reference.
    """

    sequence_id: str
    says: str
    score: float
    evidence: str
    alignment: tuple[str, ...]


@dataclass
class Points:
    """Sequences that are drawn, with their vectors.

    Attributes:
        lineage: of each, its number.
        novelty: of each, 0 to 1.
        is_novel: True where the row says that it looks new.
        ids: of each.
        vectors: of each, (hidden,).
    """

    lineage: list[int] = field(default_factory=list)
    novelty: list[float] = field(default_factory=list)
    is_novel: list[bool] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    vectors: list[np.ndarray] = field(default_factory=list)


@dataclass
class Overview:
    """Counted rows.

    Attributes:
        samples: columns of the count table.
        num_sequences: rows.
        num_named: (ranks,) rows with a name.
        num_novel: rows that look new.
        num_unplaced: rows without any evidence.
        num_taxa: for each rank its distinct names, with their ancestors.
        lineages: number of each distinct lineage, as truncated.
        reads: reads of each lineage in samples that are no controls; 1 a sequence without counts.
        sequences: rows of each lineage.
        kept: (ranks, bins) confidence of the names that were kept.
        cut: (ranks, bins) confidence of the names that were not.
        identities: (ranks, steps) identity of the rows that are named at a rank.
        by_sample: for (sample, lineage) its reads and sequences.
        controls: id, name, reads in controls and elsewhere, most in controls first.
        num_in_controls: rows that occur in a negative control.
        novel: the most novel rows, most novel first.
        points: what is drawn.
    """

    samples: Sequence[Sample] = ()
    num_sequences: int = 0
    num_named: np.ndarray = field(default_factory=lambda: np.zeros(len(RANKS), np.int64))
    num_novel: int = 0
    num_unplaced: int = 0
    num_taxa: list[set[Lineage]] = field(default_factory=lambda: [set() for _ in RANKS])
    lineages: dict[Lineage, int] = field(default_factory=dict)
    reads: list[float] = field(default_factory=list)
    sequences: list[int] = field(default_factory=list)
    kept: np.ndarray = field(default_factory=lambda: np.zeros((len(RANKS), NUM_BINS), np.int64))
    cut: np.ndarray = field(default_factory=lambda: np.zeros((len(RANKS), NUM_BINS), np.int64))
    identities: np.ndarray = field(
        default_factory=lambda: np.zeros((len(RANKS), _NUM_IDENTITIES + 1), np.int64)
    )
    by_sample: dict[tuple[int, int], tuple[float, int]] = field(default_factory=dict)
    controls: list[tuple[str, str, float, float]] = field(default_factory=list)
    num_in_controls: int = 0
    novel: list[NovelSequence] = field(default_factory=list)
    points: Points = field(default_factory=Points)


def summarise(
    rows: Iterable[Mapping[str, Any]],
    samples: Sequence[Sample] = (),
    counts: Counts | None = None,
    row_of: Mapping[str, int] = MappingProxyType({}),
) -> Overview:
    """Count rows of `record.SCHEMA`.

    Args:
        rows: as dicts.
        samples: in the order of `counts`.
        counts: reads by sequence and sample.
        row_of: row of `counts` by sequence_id.
    """
    result = Overview(samples)
    random = np.random.default_rng(0)
    novel: list[tuple[float, int, Mapping[str, Any]]] = []
    controls: list[tuple[float, int, tuple[str, str, float, float]]] = []
    matrix = counts.matrix.tocsr() if counts else None
    for number, row in enumerate(rows):
        lineage = tuple(row[rank] for rank in RANKS)
        at = _count_lineage(result, lineage, row)
        _count_confidence(result, row)
        result.num_unplaced += is_unplaced(row)
        if row["novelty_rank"] is not None:
            result.num_novel += 1
            _keep_largest(novel, (row["novelty"] or 0.0, -number, row), _NUM_NOVEL)
        if matrix is not None:
            place = row_of.get(row["sequence_id"])
            if place is not None:
                _count_samples(result, at, matrix[place])
        if row["control_reads"]:
            result.num_in_controls += 1
            names = ", ".join([name for name in lineage if name][-2:]) or "no name"
            inside = float(row["control_reads"])
            line = (row["sequence_id"], names, inside, float(row["reads"] or 0))
            _keep_largest(controls, (inside, -number, line), _NUM_CONTROLS)
        if row.get("vector") is not None:
            _draw_point(result.points, at, row, number, random)
    result.novel = [_describe_novel(row) for _, _, row in sorted(novel, reverse=True)]
    result.controls = [line for _, _, line in sorted(controls, reverse=True)]
    return result


def _keep_largest(heap: list, item: Any, most: int) -> None:
    """Keep the largest; the second number of an item is unique, so that rows are not compared."""
    if len(heap) < most:
        heapq.heappush(heap, item)
    else:
        heapq.heappushpop(heap, item)


def _count_lineage(result: Overview, lineage: Lineage, row: Mapping[str, Any]) -> int:
    at = result.lineages.setdefault(lineage, len(result.lineages))
    if at == len(result.sequences):
        result.sequences.append(0)
        result.reads.append(0.0)
        for rank, name in enumerate(lineage):
            if name is not None:
                result.num_taxa[rank].add(lineage[: rank + 1])
    result.num_sequences += 1
    result.sequences[at] += 1
    result.reads[at] += float(row["reads"] or 0) if result.samples else 1.0
    return at


def _count_confidence(result: Overview, row: Mapping[str, Any]) -> None:
    for rank, name in enumerate(RANKS):
        is_named = row[name] is not None
        result.num_named[rank] += is_named
        if (value := row[f"confidence_{name}"]) is not None:
            place = min(int(value * NUM_BINS), NUM_BINS - 1)
            (result.kept if is_named else result.cut)[rank, place] += 1
        if is_named and row["identity"] is not None:
            result.identities[rank, round(row["identity"] * _NUM_IDENTITIES)] += 1


def _count_samples(result: Overview, lineage: int, line: Any) -> None:
    for sample, value in zip(line.indices.tolist(), line.data.tolist(), strict=True):
        if value:
            reads, sequences = result.by_sample.get((sample, lineage), (0.0, 0))
            result.by_sample[sample, lineage] = reads + float(value), sequences + 1


def _draw_point(
    points: Points, lineage: int, row: Mapping[str, Any], number: int, random: np.random.Generator
) -> None:
    """Keep the row, or, where there are enough, put it in the place of a random one or of none.

    Reference: J. S. Vitter (1985), algorithm R, https://doi.org/10.1145/3147.3165
    """
    vector = np.asarray(row["vector"], np.float16)
    most = min(_MOST_POINTS, _MOST_NUMBERS // max(1, len(vector)))
    values = (
        lineage,
        row["novelty"] or 0.0,
        row["novelty_rank"] is not None,
        row["sequence_id"],
        vector,
    )
    lists = (points.lineage, points.novelty, points.is_novel, points.ids, points.vectors)
    if len(points.ids) < most:
        for items, value in zip(lists, values, strict=True):
            items.append(value)  # type: ignore[attr-defined]
    elif (place := int(random.integers(number + 1))) < most:
        for items, value in zip(lists, values, strict=True):
            items[place] = value  # type: ignore[index]


def _describe_novel(row: Mapping[str, Any]) -> NovelSequence:
    says = row["novelty_statement"] or "looks new"
    if not row["hits"]:  # named by heads alone
        evidence = "No reference could be aligned."
        return NovelSequence(row["sequence_id"], says, float(row["novelty"] or 0), evidence, ())
    best = row["hits"][0]
    evidence = (
        f"Nearest reference: {best['reference_id']} ({best['lineage'] or 'no name'}), identity "
        f"{100 * best['identity']:.1f} % over {100 * best['query_coverage']:.0f} % of "
        f"{row['length_bp']:,} bp."
    )
    lines: tuple[str, ...] = ()
    if best["query_row"]:
        lines = _draw_alignment(best)
    return NovelSequence(row["sequence_id"], says, float(row["novelty"] or 0), evidence, lines)


def _draw_alignment(hit: Mapping[str, Any]) -> tuple[str, ...]:
    """The aligned bases, `_COLUMNS` on a line, with the position of the first of each."""
    query, reference = hit["query_row"], hit["reference_row"]
    starts = [hit["query_start"] + 1, hit["reference_start"] + 1]
    lines: list[str] = []
    for first in range(0, len(query), _COLUMNS):
        pair = query[first : first + _COLUMNS], reference[first : first + _COLUMNS]
        marks = "".join(
            "-" if "-" in (a, b) else "|" if a == b else "*" for a, b in zip(*pair, strict=True)
        )
        lines += [
            f"query     {starts[0]:>5} {pair[0]}",
            f"{'':16}{marks}",
            f"reference {starts[1]:>5} {pair[1]}",
            "",
        ]
        starts = [at + len(text.replace("-", "")) for at, text in zip(starts, pair, strict=True)]
    return tuple(lines[:-1])
