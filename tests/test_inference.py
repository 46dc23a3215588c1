"""Jobs through the encoder: order, equal sequences, stopping early."""

import itertools
import threading

import numpy as np
import pytest
import torch

from bioscan_xla.encode.encoder import Encoder, load_encoder
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


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_batches_side_by_side_give_the_same_vectors(
    model_folder, sequences, two_threads, monkeypatch, dtype
):
    encoder = load_encoder(model_folder, device=open_device("cpu", dtype))
    names = set()

    def noted(self, batch):
        names.add(threading.current_thread().name)
        return self.trace(batch)

    monkeypatch.setattr(Encoder, "encode", noted)
    vectors = embed_sequences(encoder, sequences)
    assert names == {"lane_0", "lane_1"}
    assert torch.get_num_threads() == 2
    names.clear()
    few = embed_sequences(encoder, sequences[-4:])
    assert names == {threading.current_thread().name}  # all cores on the one batch
    np.testing.assert_allclose(few, vectors[-4:], atol=1e-5 if dtype == "float32" else 0.1)
    torch.set_num_threads(1)
    alone = embed_sequences(encoder, sequences)
    np.testing.assert_allclose(vectors, alone, atol=1e-5 if dtype == "float32" else 0.1)


def test_an_error_in_a_lane_is_raised_and_the_threads_are_given_back(
    model_folder, sequences, two_threads, monkeypatch
):
    encoder = load_encoder(model_folder, device=open_device("cpu", "float32"))
    calls = itertools.count()

    def failing(self, batch):
        if next(calls) == 5:
            raise MemoryError("no room for the scores")
        return self.trace(batch)

    monkeypatch.setattr(Encoder, "encode", failing)
    with pytest.raises(MemoryError, match="no room"):
        embed_sequences(encoder, sequences)
    assert torch.get_num_threads() == 2
