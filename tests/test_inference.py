"""Jobs through the encoder: order, equal sequences, stopping early."""

import numpy as np
import pytest

from bioscan_xla.encode.encoder import load_encoder
from bioscan_xla.encode.inference import embed_sequences, prepare, run_jobs
from bioscan_xla.encode.packing import Totals
from bioscan_xla.encode.runtime import open_device


@pytest.fixture(scope="module")
def encoder(model_folder):
    return load_encoder(model_folder, device=open_device("cpu", "float32"))


def _jobs(groups):
    return [prepare(n, f"job {n}", group, 1000, 100) for n, group in enumerate(groups)]


def test_jobs_come_back_in_order(encoder, sequences, expected):
    groups = [sequences[:10], sequences[10:11], [], sequences[11:]]
    results = list(run_jobs(encoder, _jobs(groups), Totals()))
    assert [item for item, _, _ in results] == ["job 0", "job 1", "job 2", "job 3"]
    assert all(ready.all() for _, _, ready in results)
    vectors = np.concatenate([vectors for _, vectors, _ in results])
    np.testing.assert_allclose(vectors, expected, atol=1e-5)


def test_equal_sequences_are_computed_once(encoder, sequences):
    totals = Totals()
    group = [sequences[0], sequences[1], sequences[0], sequences[0]]
    ((_, vectors, _),) = run_jobs(encoder, _jobs([group]), totals)
    assert (totals.sequences, totals.distinct) == (4, 2)
    np.testing.assert_array_equal(vectors[0], vectors[2])
    np.testing.assert_array_equal(vectors[0], vectors[3])
    np.testing.assert_allclose(vectors[:2], embed_sequences(encoder, group[:2]), atol=1e-6)


def test_windowed_sequences_are_counted_once_each(encoder):
    totals = Totals()
    rng = np.random.default_rng(0)
    group = ["".join(rng.choice(list("ACGT"), n)) for n in (100, 9000, 5994, 5995)]
    list(run_jobs(encoder, _jobs([[*group, group[1]]]), totals))
    assert totals.windowed == 3
    assert totals.useful_fraction == 1


def test_stopped_run_gives_what_is_ready(encoder, sequences, expected):
    totals = Totals()
    results = list(
        run_jobs(encoder, _jobs([sequences, sequences]), totals, lambda: totals.batches >= 2)
    )
    _, vectors, ready = results[0]
    assert 0 < ready.sum() < len(sequences)
    np.testing.assert_allclose(vectors[ready], expected[ready], atol=1e-5)
    assert not any(ready.any() for _, _, ready in results[1:])


def test_nothing_at_all(encoder):
    assert list(run_jobs(encoder, [], Totals())) == []
    assert embed_sequences(encoder, []).shape == (0, 64)
