"""Windows and packed rows: every token in exactly one place, shapes few, little filler."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bioscan_xla.encode.packing import (
    FIRST_POSITION,
    Packer,
    Totals,
    best_fit,
    cut_windows,
    layout,
)
from bioscan_xla.reads.tokens import CLS_ID, PAD_ID, tokenize

lengths = st.lists(st.integers(0, 2500), min_size=1, max_size=40)


def _sequences(bases, seed=0):
    rng = np.random.default_rng(seed)
    return ["".join(rng.choice(list("ACGT"), n)) for n in bases]


@settings(max_examples=60, deadline=None)
@given(lengths, st.integers(0, 40))
def test_windows_cover_every_token_and_overlap_as_asked(bases, overlap):
    tokens = tokenize(_sequences(bases))
    windows = cut_windows(tokens, 7, 100, overlap)
    for index, values in enumerate(tokens):
        own = [window.tokens for window in windows if window.owner == (7, index)]
        assert all(len(part) <= 99 for part in own)
        rebuilt = [own[0], *(part[overlap:] for part in own[1:])]
        np.testing.assert_array_equal(np.concatenate(rebuilt), values[1:])


@settings(max_examples=40, deadline=None)
@given(st.lists(lengths, min_size=1, max_size=4), st.sampled_from(["cpu", "cuda", "xla"]))
def test_each_window_lies_in_exactly_one_place(jobs, kind):
    packer = Packer(layout(kind, 2, 200))
    expected, seen = Counter(), Counter()
    batches = []
    for number, bases in enumerate(jobs):
        windows = cut_windows(tokenize(_sequences(bases)), number, 200, 10)
        expected.update((w.owner, w.tokens.tobytes()) for w in windows)
        batches += packer.add(windows)
    batches += packer.flush()
    for batch in batches:
        used = np.zeros(batch.input_ids.shape, bool)
        for row, segment, window in batch.places:
            seen[(window.owner, window.tokens.tobytes())] += 1
            assert segment < batch.num_segments
            at = np.flatnonzero(batch.segments[row] == segment)
            assert len(at) == len(window)
            assert at[-1] - at[0] == len(at) - 1
            np.testing.assert_array_equal(batch.input_ids[row, at[1:]], window.tokens)
            assert batch.input_ids[row, at[0]] == CLS_ID
            np.testing.assert_array_equal(
                batch.positions[row, at], FIRST_POSITION + np.arange(len(at))
            )
            used[row, at] = True
        assert (batch.input_ids[~used] == PAD_ID).all()
        assert (batch.segments[~used] == -1).all()
        assert batch.num_useful == used.sum()
        if kind == "xla":
            assert batch.runs is None
        else:
            assert used.all()
            assert sum(count * length for count, length in batch.runs) == used.size
    assert seen == expected


def test_xla_shapes_are_few_and_rows_divide_over_the_mesh():
    rng = np.random.default_rng(0)
    shape = layout("xla", 8, 1000)
    packer, shapes = Packer(shape), set()
    for job in range(6):
        sequences = _sequences(rng.integers(60, 6000, 300), job)
        for batch in packer.add(cut_windows(tokenize(sequences), job, 1000, 100)):
            shapes.add(batch.input_ids.shape)
    shapes |= {batch.input_ids.shape for batch in packer.flush()}
    assert len(shapes) <= 8
    assert all(rows % 8 == 0 and width in shape.row_tokens for rows, width in shapes)


# Lengths in bp of 12S, COI and rRNA amplicons and full genes, as they lie mixed in real files.
MIXED = [168] * 25 + [658] * 17 + [1300] * 20 + [1504] * 28 + [2903] * 10


@pytest.mark.parametrize(("kind", "least"), [("cpu", 0.99), ("cuda", 0.99), ("xla", 0.93)])
def test_few_tokens_are_filler_on_mixed_lengths(kind, least):
    rng = np.random.default_rng(1)
    bases = (rng.choice(MIXED, 6000) * rng.uniform(0.8, 1.2, 6000)).astype(int)
    packer, totals = Packer(layout(kind, 8, 1000)), Totals()
    sequences = ["A" * n for n in bases]
    for batch in packer.add(cut_windows(tokenize(sequences), 0, 1000, 100)):
        totals.count(batch)
    assert totals.batches > 0
    assert totals.useful_fraction >= least


def test_best_fit_fills_the_fullest_row_that_has_room():
    windows = cut_windows(tokenize(["A" * 6 * n for n in (7, 5, 4, 2, 1)]), 0, 100, 0)
    windows.sort(key=len, reverse=True)  # 8, 6, 5, 3, 2 tokens
    rows = best_fit(windows, 10, 8)
    assert [[len(window) for window in row] for row in rows] == [[8, 2], [6, 3], [5]]
    assert all(len(row) == 1 for row in best_fit(windows, 100, 1))
