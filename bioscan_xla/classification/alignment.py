"""Alignment of a query to its candidates, as evidence for a name.

Input: upper-case ACGTN sequences. Output: an `Aligned` for each candidate. Invariants: gaps at the
ends of either sequence are free; identity is vsearch's definition 2, matches over columns without
end gaps, where a column with N on either side does not count.

Reference: Sosic (2015), Opal, https://github.com/Martinsos/opal; vsearch's --iddef 2,
    https://github.com/torognes/vsearch
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from .trace import GAP_EXTEND, GAP_OPEN, MATCH, MISMATCH, Trace, as_letters, guess_trace

_MOST_CELLS = 40_000_000
"""Of the matrices filled for a query, a quarter of a second; two are filled in any case."""

_AS_SAM = str.maketrans("ID", "DI")  # Opal names gaps by the sequence that has them


@dataclass(frozen=True)
class Aligned:
    """A query laid on one reference.

    Attributes:
        number: of the reference among those given.
        score: of the alignment.
        identity: share of matches, 0 to 1.
        coverage: share of the query's bases that lie between the alignment's ends.
        overlap: the same of the shorter of the two sequences: 1 where one lies within the other.
        columns: of the alignment without end gaps.
        query_start: first base of the query in it, from 0.
        target_start: first base of the reference in it, from 0.
        operations: a letter a column: M match, X mismatch, I base of the query alone, D base of
            the reference alone.
    """

    number: int
    score: int
    identity: float
    coverage: float
    overlap: float
    columns: int
    query_start: int
    target_start: int
    operations: str


@functools.lru_cache(maxsize=1)
def _aligner() -> tuple[Any, Any]:
    import pyopal
    from scoring_matrices import ScoringMatrix

    scores = np.full((5, 5), float(MISMATCH))
    np.fill_diagonal(scores, MATCH)
    scores[4, :] = scores[:, 4] = 0  # N says nothing
    matrix = ScoringMatrix(scores.tolist(), alphabet="ACGTN", name="nucleotides")
    aligner = pyopal.Aligner(matrix, gap_open=GAP_OPEN, gap_extend=GAP_EXTEND)
    return aligner, pyopal.Alphabet("ACGTN")


def align(query: str, references: Sequence[str], num_traced: int | None = None) -> list[Aligned]:
    """Align a query to references, best score first, ties by number.

    Args:
        query: cleaned.
        references: cleaned.
        num_traced: only this many of the best scores get an alignment, and this many of the best
            scores per base of the shorter sequence, so that short references have their chance.
            Of very long ones that need a filled matrix, only the first of both. All by default. A
            score costs a tenth of a filled matrix.
    """
    import pyopal

    if not references:
        return []
    aligner, alphabet = _aligner()
    database = pyopal.Database(references, alphabet=alphabet)
    ends = sorted(
        aligner.align(query, database, mode="end", algorithm="ov"), key=lambda r: r.target_index
    )
    chosen = list(range(len(references)))
    if num_traced is not None and num_traced < len(references):
        scores = np.array([result.score for result in ends], float)
        shorter = np.array([min(len(query), len(text)) for text in references])
        best = np.argsort(-scores, kind="stable")[:num_traced].tolist()
        dense = np.argsort(-scores / shorter, kind="stable")[:num_traced].tolist()
        # In turn, for where not all can be afforded.
        chosen = list(dict.fromkeys(chain.from_iterable(zip(best, dense, strict=True))))
    letters = as_letters(query)
    traces: dict[int, Trace] = {}
    for number in chosen:
        end = ends[number]
        target = as_letters(references[number])
        found = guess_trace(letters, target, end.score, end.query_end, end.target_end)
        if found is not None:
            traces[number] = found
    rest = [number for number in chosen if number not in traces]
    if num_traced is not None:
        rest = _affordable(query, references, rest)
        chosen = [number for number in chosen if number in traces or number in rest]
    if rest:
        database = pyopal.Database([references[number] for number in rest], alphabet=alphabet)
        for result in aligner.align(query, database, mode="full", algorithm="ov"):
            traces[rest[result.target_index]] = Trace(
                result.query_start, result.target_start, result.alignment.translate(_AS_SAM)
            )
    aligned = [
        _measure(query, references[number], number, ends[number].score, traces[number])
        for number in chosen
    ]
    return sorted(aligned, key=lambda found: (-found.score, found.number))


def _affordable(query: str, references: Sequence[str], numbers: Sequence[int]) -> list[int]:
    """The first references whose matrices together stay below a size, and two at least."""
    cells = np.cumsum([len(query) * len(references[number]) for number in numbers])
    return list(numbers[: max(2, int((cells <= _MOST_CELLS).sum()))])


def _measure(query: str, reference: str, number: int, score: int, trace: Trace) -> Aligned:
    operations = trace.operations
    # It may begin or end with a free gap.
    inner = operations.strip("ID")
    lead = operations[: len(operations) - len(operations.lstrip("ID"))]
    query_start = trace.query_start + lead.count("I")
    target_start = trace.target_start + lead.count("D")
    if not inner or score <= 0:
        return Aligned(number, int(score), 0.0, 0.0, 0.0, 0, 0, 0, "")
    covered = len(inner) - inner.count("D")
    counted, matches = len(inner), inner.count("M")
    target_covered = len(inner) - inner.count("I")
    if "N" in query[query_start : query_start + covered] or (
        "N" in reference[target_start : target_start + target_covered]
    ):
        rows = draw(inner, query[query_start:], reference[target_start:])
        unsure = [i for i, pair in enumerate(zip(*rows, strict=True)) if "N" in pair]
        counted -= len(unsure)
        matches -= sum(inner[place] == "M" for place in unsure)
    identity = matches / counted if counted else 0.0
    shorter = covered if len(query) <= len(reference) else target_covered
    return Aligned(
        number,
        int(score),
        identity,
        covered / len(query),
        shorter / min(len(query), len(reference)),
        len(inner),
        query_start,
        target_start,
        inner,
    )


def draw(operations: str, query: str, reference: str) -> tuple[str, str]:
    """The two rows of an alignment, gaps as `-`; the sequences begin where the alignment does."""
    top, bottom = [], []
    at_query = at_reference = 0
    for letter in operations:
        top.append("-" if letter == "D" else query[at_query])
        bottom.append("-" if letter == "I" else reference[at_reference])
        at_query += letter != "D"
        at_reference += letter != "I"
    return "".join(top), "".join(bottom)
