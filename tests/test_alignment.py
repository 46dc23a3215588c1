"""Alignment against an exact oracle, and by hand."""

import numpy as np
import pytest

from bioscan_xla.classification import alignment
from bioscan_xla.classification.alignment import (
    GAP_EXTEND,
    GAP_OPEN,
    MATCH,
    MISMATCH,
    align,
    draw,
)


def random_pair(rng, length):
    letters = rng.choice(list("ACGT"), length)
    other = [
        str(rng.choice(list("ACGT"))) if rng.random() < 0.08 else letter
        for letter in letters
        if rng.random() > 0.01
    ]
    start, end = sorted(rng.integers(0, length, 2))
    if end - start < 60:
        start, end = 0, length
    return "".join(letters[start:end]), "".join(other)


@pytest.mark.parametrize("seed", range(30))
def test_scores_are_those_of_the_oracle(seed):
    parasail = pytest.importorskip("parasail")
    rng = np.random.default_rng(seed)
    query, reference = random_pair(rng, int(rng.integers(80, 400)))
    matrix = parasail.matrix_create("ACGT", MATCH, MISMATCH)
    exact = parasail.sg_trace(query, reference, GAP_OPEN, GAP_EXTEND, matrix)
    (found,) = align(query, [reference])
    assert found.score == exact.score
    pairs = list(zip(exact.traceback.query, exact.traceback.ref, strict=True))
    inner = [at for at, pair in enumerate(pairs) if "-" not in pair]
    columns = pairs[inner[0] : inner[-1] + 1]
    identity = sum(a == b for a, b in columns) / len(columns)
    assert found.identity == pytest.approx(identity, abs=0.02)


def test_drawn_rows_hold_the_bases_and_give_the_score():
    rng = np.random.default_rng(5)
    for _ in range(20):
        query, reference = random_pair(rng, 200)
        (found,) = align(query, [reference])
        rows = draw(found.operations, query[found.query_start :], reference[found.target_start :])
        assert len(rows[0]) == len(rows[1]) == found.columns
        assert rows[0].replace("-", "") in query
        assert rows[1].replace("-", "") in reference
        matches = sum(a == b for a, b in zip(*rows, strict=True))
        assert found.identity == pytest.approx(matches / found.columns)


def test_end_gaps_are_free_and_coverage_is_the_query_s():
    core = "ACGTTGCAAGGCTTACCATGGATCCA"
    (inside,) = align(core, ["TTTTTTTT" + core + "GGGGGGG"])
    assert (inside.identity, inside.coverage, inside.target_start) == (1.0, 1.0, 8)
    (overlap,) = align("C" * 26 + core, [core + "T" * 26])
    assert overlap.identity == 1.0
    assert overlap.coverage == 0.5
    assert overlap.query_start == 26


def test_n_is_neither_match_nor_mismatch():
    query = "ACGTTGCAAGGCTTACCATGGATCCA"
    (same,) = align(query[:10] + "N" + query[11:], [query])
    assert same.identity == 1.0
    (both,) = align(query[:10] + "N" + query[11:], [query[:10] + "N" + query[11:]])
    assert both.identity == 1.0
    (other,) = align(query[:10] + "N" + query[11:], [query[:14] + "G" + query[15:]])
    assert other.identity == pytest.approx(24 / 25)


def test_best_first_and_only_so_many_traced():
    rng = np.random.default_rng(1)
    query = "".join(rng.choice(list("ACGT"), 120))
    worse = query[:30] + "AC" + query[32:60] + "GT" + query[62:]
    found = align(query, [worse, "ACGT" * 20, query, query], num_traced=3)
    assert [hit.number for hit in found] == [2, 3, 0]
    assert found[0].score > found[2].score
    assert align(query, []) == []


def test_of_long_sequences_only_the_best_are_filled(monkeypatch):
    rng = np.random.default_rng(7)
    letters = list("ACGT")
    query = "".join(rng.choice(letters, 200))
    others = [
        "".join(str(rng.choice(letters)) if rng.random() < share else c for c in query)
        for share in (0.3, 0.1, 0.2, 0.0)
    ]
    alignment = "bioscan_xla.classification.alignment"
    monkeypatch.setattr(f"{alignment}.guess_trace", lambda *_: None)
    assert len(align(query, others, num_traced=3)) == 3
    monkeypatch.setattr(f"{alignment}._MOST_CELLS", 1)
    assert [hit.number for hit in align(query, others, num_traced=3)] == [3, 1]


def test_nothing_in_common_is_no_alignment():
    (found,) = align("A" * 50, ["C" * 50])
    assert found.identity == 0.0
    assert found.coverage == 0.0


def relative(rng, sequence, gaps):
    """A relative of a sequence: 3 % of its bases differ, and some are lost or gained."""
    other = [str(rng.choice(list("ACGT"))) if rng.random() < 0.03 else c for c in sequence]
    for place in sorted(rng.integers(60, len(sequence) - 60, gaps), reverse=True):
        if rng.random() < 0.5:
            del other[place : place + int(rng.integers(1, 6))]
        else:
            other[place:place] = rng.choice(list("ACGT"), int(rng.integers(1, 6))).tolist()
    if rng.random() < 0.3:
        other[int(rng.integers(len(other)))] = "N"
    start, end = int(rng.integers(0, 30)), len(other) - int(rng.integers(0, 30))
    return "".join(other[start:end])


def score_of(query, reference, trace):
    """From the definition, base by base."""
    score, at, there = 0, trace.query_start, trace.target_start
    before = ""
    for letter in trace.operations:
        if letter in "MX":
            pair = query[at], reference[there]
            assert (pair[0] == pair[1]) == (letter == "M")
            score += 0 if "N" in pair else MATCH if letter == "M" else MISMATCH
        else:
            score -= GAP_EXTEND if letter == before else GAP_OPEN
        at += letter != "D"
        there += letter != "I"
        before = letter
    assert at == len(query) or there == len(reference)
    assert min(trace.query_start, trace.target_start) == 0
    return score


@pytest.mark.parametrize("gaps", [0, 1, 3])
def test_a_guessed_alignment_is_one_of_the_best(gaps):
    import pyopal

    from bioscan_xla.classification.alignment import _aligner
    from bioscan_xla.classification.trace import as_letters, guess_trace

    rng = np.random.default_rng(gaps)
    aligner, alphabet = _aligner()
    guessed = 0
    for _ in range(40):
        query = "".join(rng.choice(list("ACGT"), 400))
        reference = relative(rng, query, gaps)
        database = pyopal.Database([reference], alphabet=alphabet)
        (best,) = aligner.align(query, database, mode="end", algorithm="ov")
        letters = as_letters(query), as_letters(reference)
        trace = guess_trace(*letters, best.score, best.query_end, best.target_end)
        assert guess_trace(*letters, best.score + 2, best.query_end, best.target_end) is None
        if trace is not None:
            guessed += 1
            assert score_of(query, reference, trace) == best.score
    assert guessed >= 28  # the others have gaps too close to each other or to an end


def test_sequences_too_short_or_too_foreign_for_a_guess_are_aligned_all_the_same():
    rng = np.random.default_rng(2)
    letters = list("ACGT")
    query = "".join(rng.choice(letters, 200))
    far = "".join(c if rng.random() < 0.75 else str(rng.choice(letters)) for c in query)
    found = align(query, [query[:9], far[:80] + far[83:150] + "AC" + far[150:]])
    assert {hit.number for hit in found} == {0, 1}
    assert all(hit.columns for hit in found)


def test_a_short_reference_is_traced_where_not_all_can_be(monkeypatch):
    """A gene within a long query is among longer sequences that match it less well."""
    monkeypatch.setattr(alignment, "_MOST_CELLS", 1)  # two matrices
    monkeypatch.setattr(alignment, "guess_trace", lambda *_: None)
    rng = np.random.default_rng(3)
    query = "".join(rng.choice(list("ACGT"), 1500))
    letters = np.array(list(query))
    gene = query[300:900]
    longer = []
    for _ in range(9):
        changed = letters.copy()
        places = rng.choice(len(letters), len(letters) // 10, replace=False)
        changed[places] = rng.choice(list("ACGT"), len(places))
        longer.append("".join(changed[np.sort(rng.permutation(len(changed))[:-40])]))
    found = align(query, [*longer, gene], num_traced=3)
    assert 9 in [hit.number for hit in found]
