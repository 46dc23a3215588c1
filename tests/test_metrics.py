"""Metrics against small cases by hand."""

import itertools

import numpy as np
import pytest

from bioscan_xla.reads.labels import learn_labels
from bioscan_xla.reads.lineages import RANKS
from bioscan_xla.training.metrics import (
    Predictions,
    accuracy,
    calibration_error,
    evaluate,
    hierarchical_distance,
    inconsistent_share,
    macro_f1,
    top_k_accuracy,
)


def test_accuracy_and_f1_leave_the_unknown_out():
    truth, predicted = np.array([0, 0, 1, -1]), np.array([0, 1, 1, 0])
    assert accuracy(predicted, truth) == pytest.approx(2 / 3)
    assert macro_f1(predicted, truth) == pytest.approx((2 / 3 + 2 / 3) / 2)
    assert np.isnan(accuracy(predicted, np.full(4, -1)))


def test_top_k():
    best = np.array([[0, 1, 2], [2, 1, 0]])
    assert top_k_accuracy(best, np.array([2, 3])) == 0.5
    assert top_k_accuracy(best[:, :2], np.array([1, -1])) == 1.0
    assert np.isnan(top_k_accuracy(best, np.array([-1, -1])))


def test_calibration():
    assert calibration_error(np.array([0.9, 0.9]), np.array([True, False])) == pytest.approx(0.4)
    assert calibration_error(np.array([1.0, 1.0]), np.array([True, True])) == 0


def test_hierarchical_distance_counts_from_the_first_wrong_rank():
    truth = np.array([[0, 1, 2, 3, 4, 5, 6], [0, 1, -1, 3, -1, -1, -1]])
    predicted = truth.copy()
    assert hierarchical_distance(predicted, truth) == 0
    predicted[0, 5] = 9  # genus wrong: genus and species count
    predicted[1, 0] = 9  # kingdom wrong: the three known ranks count
    assert hierarchical_distance(predicted, truth) == (2 + 3) / 2


def test_inconsistent_lineages():
    space, _ = learn_labels([("A", "X") + (None,) * 5, ("B", "Y") + (None,) * 5])
    predicted = np.full((2, 7), -1)
    predicted[:, 0], predicted[:, 1] = [0, 0], [0, 1]
    assert inconsistent_share(predicted, space) == 0.5


def test_a_gap_in_a_lineage_hides_no_contradiction():
    rows = [("A", "X", None, "O"), ("A", "Y", "C", "P")]
    space, _ = learn_labels([row + (None,) * 3 for row in rows])
    predicted = np.full((2, 7), -1)
    # Order O under its phylum X, then under Y: no class stands between them.
    predicted[:, 0], predicted[:, 1], predicted[:, 3] = 0, [0, 1], 0
    assert space.names(3)[0] == "O"
    assert inconsistent_share(predicted, space) == 0.5


def _whole(probabilities, truth, space):
    """The figures from the whole matrix, by their definitions."""
    predicted = np.stack([p.argmax(1) for p in probabilities], 1)
    figures = {}
    for rank, name in enumerate(RANKS):
        known = truth[:, rank] >= 0
        said, right, p = predicted[known, rank], truth[known, rank], probabilities[rank][known]
        figures[f"{name}/accuracy"] = (said == right).mean()
        scores = [
            2 * ((said == c) & (right == c)).sum() / ((said == c).sum() + (right == c).sum())
            for c in np.unique(right)
        ]
        figures[f"{name}/macro_f1"] = np.mean(scores)
        figures[f"{name}/top3"] = (np.argsort(-p)[:, :3] == right[:, None]).any(1).mean()
        bins = np.minimum((p.max(1) * 15).astype(int), 14)
        figures[f"{name}/calibration_error"] = sum(
            abs(p.max(1)[bins == b].mean() - (said == right)[bins == b].mean()) * (bins == b).mean()
            for b in np.unique(bins)
        )
    return figures


def test_streamed_figures_are_those_of_the_whole_matrix():
    rng = np.random.default_rng(0)
    names = [
        tuple(f"{'KPCOFGS'[rank]}{'abcdefghij'[n % (rank + 2)]}" for rank in range(7))
        for n in range(60)
    ]
    space, _ = learn_labels(names)
    rows = rng.integers(0, 60, 400)
    truth = space.encode([names[row] for row in rows])
    truth[rng.random(truth.shape) < 0.2] = -1
    probabilities = [
        rng.dirichlet(np.full(n, 0.3), 400).astype(np.float32) for n in space.num_classes
    ]
    for rank, values in enumerate(probabilities):  # right now and then
        values[np.arange(0, 400, 2), truth[::2, rank]] += 1
        values /= values.sum(1, keepdims=True)
    edges = [0, 1, 7, 150, 400]
    parts = [
        Predictions.of([values[first:end] for values in probabilities])
        for first, end in itertools.pairwise(edges)
    ]
    streamed = evaluate(Predictions.join(parts), truth, space)
    assert streamed == evaluate(probabilities, truth, space)
    for name, value in _whole(probabilities, truth, space).items():
        assert streamed[name] == pytest.approx(value, rel=1e-5), name


def test_what_is_kept_does_not_grow_with_the_classes():
    kept = Predictions.of([np.zeros((10, 500), np.float32)] * 7)
    assert sum(array.nbytes for array in vars(kept).values()) == 10 * 140


def test_nothing_to_evaluate():
    space, _ = learn_labels([("A",) + (None,) * 6])
    figures = evaluate(Predictions.join([]), np.zeros((0, 7), int), space)
    assert np.isnan(figures["mean_accuracy"])


def test_all_together():
    space, _ = learn_labels([("A", "X") + (None,) * 5, ("B", "Y") + (None,) * 5])
    truth = np.array([[0, 0] + [-1] * 5, [1, 1] + [-1] * 5])
    probabilities = [np.eye(2), np.array([[0.9, 0.1], [0.8, 0.2]])] + [np.zeros((2, 0))] * 5
    figures = evaluate(probabilities, truth, space)
    assert figures["kingdom/accuracy"] == 1
    assert figures["phylum/accuracy"] == 0.5
    assert figures["mean_accuracy"] == 0.75
    assert figures["inconsistent"] == 0.5
    assert "class/accuracy" not in figures
