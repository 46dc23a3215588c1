"""How good predicted lineages are. Pure functions of numpy arrays."""

from collections.abc import Sequence

import numpy as np

from ..reads.labels import UNKNOWN, LabelSpace
from ..reads.lineages import RANKS

_BINS = 15


def accuracy(predicted: np.ndarray, truth: np.ndarray) -> float:
    """Share of equal entries among those whose truth is known; NaN if none is."""
    known = truth != UNKNOWN
    return float((predicted[known] == truth[known]).mean()) if known.any() else float("nan")


def macro_f1(predicted: np.ndarray, truth: np.ndarray) -> float:
    """Mean F1 over the classes that occur in the truth; NaN if none does."""
    known = truth != UNKNOWN
    predicted, truth = predicted[known], truth[known]
    classes = np.unique(truth)
    if not len(classes):
        return float("nan")
    scores = []
    for number in classes:
        hits = np.sum((predicted == number) & (truth == number))
        scores.append(2 * hits / (np.sum(predicted == number) + np.sum(truth == number)))
    return float(np.mean(scores))


def top_k_accuracy(probabilities: np.ndarray, truth: np.ndarray, k: int = 3) -> float:
    """Share of known rows whose class is among the k best of probabilities (rows, classes)."""
    known = truth != UNKNOWN
    if not known.any():
        return float("nan")
    k = min(k, probabilities.shape[1])
    best = np.argpartition(-probabilities[known], k - 1, axis=1)[:, :k]
    return float((best == truth[known, None]).any(1).mean())


def calibration_error(confidence: np.ndarray, correct: np.ndarray) -> float:
    """Expected calibration error over 15 bins of equal width.

    Reference: Guo et al. (2017), https://arxiv.org/abs/1706.04599
    """
    if not len(confidence):
        return float("nan")
    bins = np.minimum((confidence * _BINS).astype(int), _BINS - 1)
    total = 0.0
    for number in np.unique(bins):
        inside = bins == number
        total += inside.sum() * abs(confidence[inside].mean() - correct[inside].mean())
    return float(total / len(confidence))


def hierarchical_distance(predicted: np.ndarray, truth: np.ndarray) -> float:
    """Mean number of known ranks from the first wrong one down, over rows known anywhere.

    0 is a lineage that is right at every known rank; a wrong kingdom costs all known ranks.
    """
    known = truth != UNKNOWN
    wrong = known & (predicted != truth)
    below_first_wrong = np.cumsum(wrong, axis=1) > 0
    ranks = (below_first_wrong & known).sum(1)
    rows = known.any(1)
    return float(ranks[rows].mean()) if rows.any() else float("nan")


def inconsistent_share(predicted: np.ndarray, labels: LabelSpace) -> float:
    """Share of rows in which a predicted class lies under another parent than the predicted."""
    bad = np.zeros(len(predicted), bool)
    for rank in range(1, len(RANKS)):
        parents = labels.parents(rank)
        if not len(parents):
            continue
        parent = parents[predicted[:, rank]]
        bad |= (parent != UNKNOWN) & (parent != predicted[:, rank - 1])
    return float(bad.mean()) if len(bad) else float("nan")


def evaluate(
    probabilities: Sequence[np.ndarray], truth: np.ndarray, labels: LabelSpace
) -> dict[str, float]:
    """All metrics of a set of predictions.

    Args:
        probabilities: for each rank (rows, classes).
        truth: (rows, 7) class numbers, -1 where unknown.
        labels: the label space.

    Returns:
        `<rank>/accuracy`, `<rank>/macro_f1`, `<rank>/top3`, `<rank>/calibration_error` for ranks
        that have known rows, `hierarchical_distance`, `inconsistent`, and `mean_accuracy` over
        the ranks.
    """
    predicted = np.stack(
        [p.argmax(1) if p.shape[1] else np.full(len(p), UNKNOWN) for p in probabilities], axis=1
    )
    result: dict[str, float] = {}
    for rank, name in enumerate(RANKS):
        known = truth[:, rank] != UNKNOWN
        if not known.any() or not probabilities[rank].shape[1]:
            continue
        result[f"{name}/accuracy"] = accuracy(predicted[:, rank], truth[:, rank])
        result[f"{name}/macro_f1"] = macro_f1(predicted[:, rank], truth[:, rank])
        result[f"{name}/top3"] = top_k_accuracy(probabilities[rank], truth[:, rank])
        confidence = probabilities[rank][known].max(1)
        correct = predicted[known, rank] == truth[known, rank]
        result[f"{name}/calibration_error"] = calibration_error(confidence, correct)
    accuracies = [value for key, value in result.items() if key.endswith("/accuracy")]
    result["mean_accuracy"] = float(np.mean(accuracies)) if accuracies else float("nan")
    result["hierarchical_distance"] = hierarchical_distance(predicted, truth)
    result["inconsistent"] = inconsistent_share(predicted, labels)
    return result
