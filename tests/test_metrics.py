"""Metrics against small cases by hand."""

import numpy as np
import pytest

from bioscan_xla.reads.labels import learn_labels
from bioscan_xla.training.metrics import (
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
    probabilities = np.array([[0.4, 0.3, 0.2, 0.1], [0.4, 0.3, 0.2, 0.1]])
    assert top_k_accuracy(probabilities, np.array([2, 3]), 3) == 0.5
    assert top_k_accuracy(probabilities[:, :2], np.array([1, -1]), 3) == 1.0


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
