"""Shared words, against counting them one by one."""

import numpy as np
import pytest

from bioscan_xla.classification.kmers import KmerIndex, best_numbers


def test_words_are_counted_exactly():
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("ACGTN"), 200, p=[0.24] * 4 + [0.04])) for _ in range(20)]

    def words(text):
        return {text[at : at + 8] for at in range(len(text) - 7) if "N" not in text[at : at + 8]}

    index = KmerIndex(texts)
    query = texts[3][20:150]
    wanted = [
        len(words(query) & words(t)) / max(min(len(words(query)), len(words(t))), 30) for t in texts
    ]
    assert index.scores(query) == pytest.approx(wanted)
    assert best_numbers(index.scores(query), 5)[0] == 3
    assert best_numbers(np.array([0.0, 1, 1, 0.5]), 2).tolist() == [1, 2]
    assert index.scores("ACG").tolist() == [0.0] * 20
    long = "".join(np.random.default_rng(1).choice(list("ACGT"), 900))
    related = KmerIndex(
        [long, long[:500], long[400:], *texts]
    )  # more common words than a byte counts
    wanted = [
        len(words(long) & words(t)) / max(min(len(words(long)), len(words(t))), 30)
        for t in (long, long[:500], long[400:], *texts)
    ]
    assert related.scores(long) == pytest.approx(wanted)
