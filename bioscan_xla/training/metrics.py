"""How good predicted lineages are.

Input: class probabilities, a batch at a time, and the true class numbers. Output: figures by name.
Invariants: 140 bytes are kept per sequence, whatever the number of classes; the figures do not
depend on how the sequences were batched.

F1 is scikit-learn's. Its top-k accuracy and the calibration error of torchmetrics want the whole
(sequences, classes) matrix or a further dependency, so these two are our own.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.exceptions import UndefinedMetricWarning
from sklearn.metrics import f1_score

from ..reads.labels import UNKNOWN, LabelSpace, nearest_rank
from ..reads.lineages import RANKS

_BINS = 15
_TOP = 3


@dataclass(frozen=True)
class Predictions:
    """What the figures need of the probabilities of some sequences.

    Attributes:
        classes: (sequences, 7) int32, the most probable class, -1 at a rank without classes.
        confidence: (sequences, 7), its probability.
        top3: (sequences, 7, 3) int32, the three most probable classes in no order, -1 for none.
    """

    classes: np.ndarray
    confidence: np.ndarray
    top3: np.ndarray

    def __len__(self) -> int:
        """Return the number of sequences."""
        return len(self.classes)

    @classmethod
    def of(cls, probabilities: Sequence[np.ndarray]) -> "Predictions":
        """Keep what the figures need of a batch: for each rank (sequences, classes).

        >>> found = Predictions.of([np.array([[0.1, 0.9]])] + [np.zeros((1, 0))] * 6)
        >>> found.classes.tolist(), found.confidence[0].tolist()
        ([[1, -1, -1, -1, -1, -1, -1]], [0.9, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
        """
        num = len(probabilities[0])
        classes = np.full((num, len(RANKS)), UNKNOWN, np.int32)
        top3 = np.full((num, len(RANKS), _TOP), UNKNOWN, np.int32)
        confidence = np.zeros((num, len(RANKS)), np.result_type(*probabilities))
        for rank, values in enumerate(probabilities):
            if values.shape[1]:
                classes[:, rank] = values.argmax(1)
                confidence[:, rank] = values.max(1)
                top3[:, rank, : values.shape[1]] = _best(values, _TOP)
        return cls(classes, confidence, top3)

    @classmethod
    def join(cls, parts: Sequence["Predictions"]) -> "Predictions":
        """The predictions of several batches, in their order."""
        if not parts:
            return cls.of([np.zeros((0, 0), np.float32)] * len(RANKS))
        return cls(
            np.concatenate([part.classes for part in parts]),
            np.concatenate([part.confidence for part in parts]),
            np.concatenate([part.top3 for part in parts]),
        )

    def take(self, rows: np.ndarray) -> "Predictions":
        """Those of these rows, in this order."""
        return Predictions(self.classes[rows], self.confidence[rows], self.top3[rows])


def _best(values: np.ndarray, k: int) -> np.ndarray:
    k = min(k, values.shape[1])
    return np.argpartition(-values, k - 1, axis=1)[:, :k]


def accuracy(predicted: np.ndarray, truth: np.ndarray) -> float:
    """Share of equal entries among those whose truth is known; NaN if none is."""
    known = truth != UNKNOWN
    return float((predicted[known] == truth[known]).mean()) if known.any() else float("nan")


def macro_f1(predicted: np.ndarray, truth: np.ndarray) -> float:
    """Mean F1 over the classes that occur in the truth; NaN if none does."""
    known = truth != UNKNOWN
    if not known.any():
        return float("nan")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UndefinedMetricWarning)
        score = f1_score(
            truth[known],
            predicted[known],
            labels=np.unique(truth[known]),
            average="macro",
            zero_division=0,
        )
    return float(score)


def top_k_accuracy(best: np.ndarray, truth: np.ndarray) -> float:
    """Share of known rows whose class is among those of `best` (rows, k)."""
    known = truth != UNKNOWN
    return float((best[known] == truth[known, None]).any(1).mean()) if known.any() else float("nan")


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
    """Share of rows in which a predicted class lies outside what is predicted above it.

    Each class is held against the rank of its nearest known ancestor.
    """
    bad = np.zeros(len(predicted), bool)
    for rank, table in enumerate(labels.ancestors()):
        if not rank or not len(table):
            continue
        nearest = nearest_rank(table)[predicted[:, rank]]
        rows = np.flatnonzero((predicted[:, rank] != UNKNOWN) & (nearest != UNKNOWN))
        ancestor = table[predicted[rows, rank], nearest[rows]]
        bad[rows] |= ancestor != predicted[rows, nearest[rows]]
    return float(bad.mean()) if len(bad) else float("nan")


def evaluate(
    predictions: Predictions | Sequence[np.ndarray], truth: np.ndarray, labels: LabelSpace
) -> dict[str, float]:
    """All figures of a set of predictions.

    Args:
        predictions: of the sequences, or for each rank their probabilities (rows, classes).
        truth: (rows, 7) class numbers, -1 where unknown.
        labels: the label space.

    Returns:
        `<rank>/accuracy`, `<rank>/macro_f1`, `<rank>/top3`, `<rank>/calibration_error` for ranks
        that have known rows, `hierarchical_distance`, `inconsistent`, and `mean_accuracy` over
        the ranks.
    """
    if not isinstance(predictions, Predictions):
        predictions = Predictions.of(predictions)
    predicted = predictions.classes
    result: dict[str, float] = {}
    for rank, name in enumerate(RANKS):
        wanted = truth[:, rank]
        known = wanted != UNKNOWN
        if not known.any() or not labels.num_classes[rank]:
            continue
        result[f"{name}/accuracy"] = accuracy(predicted[:, rank], wanted)
        result[f"{name}/macro_f1"] = macro_f1(predicted[:, rank], wanted)
        result[f"{name}/top3"] = top_k_accuracy(predictions.top3[:, rank], wanted)
        result[f"{name}/calibration_error"] = calibration_error(
            predictions.confidence[known, rank], predicted[known, rank] == wanted[known]
        )
    accuracies = [value for key, value in result.items() if key.endswith("/accuracy")]
    result["mean_accuracy"] = float(np.mean(accuracies)) if accuracies else float("nan")
    result["hierarchical_distance"] = hierarchical_distance(predicted, truth)
    result["inconsistent"] = inconsistent_share(predicted, labels)
    return result
