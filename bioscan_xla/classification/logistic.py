"""The probability of an outcome from evidence, by a logistic model that respects what evidence is.

Input: features of `RANK_FEATURES`. Output: a `Logistic`. Invariants: better evidence never makes a
name less probable: identity, margin, agreement of the votes, similarity, coverage and what the
heads say raise it or do nothing, mismatches lower it or do nothing. Where few were tried, as far
from all references, an unconstrained model may well say the opposite.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from .evidence import RANK_FEATURES

_IDENTITY = RANK_FEATURES.index("identity")
_NOT_FITTED = ("identity", "tied_others")  # cut at the knots; a limit of the confidence
_OTHERS = [at for at, name in enumerate(RANK_FEATURES) if name not in _NOT_FITTED]

_KNOTS = (0.0, 0.75, 0.85, 0.90, 0.97, 1.0)  # the log-odds are linear in identity between them
_DIRECTIONS = {"mismatches": -1, "log_length": 0, "evidence": 0}  # all others 1
_PENALTY = 1.0  # of the squared coefficients, against the log-likelihood of one trial
FEWEST_TRIALS = 50
FEWEST_OF_A_KIND = 5


@dataclass(frozen=True)
class Logistic:
    """A logistic regression on standardised inputs.

    Attributes:
        mean: (inputs,) subtracted.
        scale: (inputs,) divided by.
        coefficients: (inputs,).
        intercept: log-odds of the mean.
    """

    mean: np.ndarray
    scale: np.ndarray
    coefficients: np.ndarray
    intercept: float

    def probability(self, features: np.ndarray) -> np.ndarray:
        """(rows,) for features (rows, features)."""
        inputs = (_inputs(features) - self.mean) / self.scale
        return _sigmoid(inputs @ self.coefficients + self.intercept)


def fit_logistic(
    features: np.ndarray, target: np.ndarray, weights: np.ndarray, *, rising: bool
) -> Logistic | None:
    """Fit a model by penalised maximum likelihood under bounds on the coefficients.

    Args:
        features: (rows, features).
        target: (rows,) True where it came out so.
        weights: (rows,) of each.
        rising: True if better evidence makes the outcome more probable, False if less.

    Returns:
        The model; a constant one where one outcome hardly occurs, None where there are few rows.
    """
    if len(target) < FEWEST_TRIALS:
        return None
    inputs = _inputs(features)
    mean, scale = inputs.mean(0), inputs.std(0)
    scale = np.where(scale > 1e-9, scale, 1.0)
    num = len(mean)
    if min(target.sum(), (~target).sum()) < FEWEST_OF_A_KIND:
        rate = ((weights * target).sum() + 0.5) / (weights.sum() + 1)
        return Logistic(mean, scale, np.zeros(num), float(np.log(rate / (1 - rate))))
    from scipy.optimize import minimize

    standardised = np.column_stack([(inputs - mean) / scale, np.ones(len(inputs))])
    penalty = np.append(np.full(num, _PENALTY), 0.0)  # none for the intercept

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        scores = standardised @ parameters
        value = weights @ (np.logaddexp(0, scores) - target * scores)
        gradient = standardised.T @ (weights * (_sigmoid(scores) - target))
        squares = 0.5 * penalty @ parameters**2
        return float(value + squares), gradient + penalty * parameters

    sign = 1 if rising else -1
    bounds = [_BOUNDS[sign * direction] for direction in _input_directions()] + [_BOUNDS[0]]
    found = minimize(loss, np.zeros(num + 1), jac=True, bounds=bounds, method="L-BFGS-B")
    return Logistic(mean, scale, found.x[:num], float(found.x[num]))


_BOUNDS = {1: (0.0, None), 0: (None, None), -1: (None, 0.0)}


def _inputs(features: np.ndarray) -> np.ndarray:
    """Features with identity cut at the knots, so that each part has its slope."""
    identity = features[:, _IDENTITY]
    parts = [np.clip(identity, low, high) - low for low, high in pairwise(_KNOTS)]
    return np.column_stack([*parts, features[:, _OTHERS]])


def _input_directions() -> list[int]:
    """1 where an input may only raise the probability of a name, -1 lower, 0 both."""
    others = [_DIRECTIONS.get(RANK_FEATURES[at], 1) for at in _OTHERS]
    return [1] * (len(_KNOTS) - 1) + others


def _sigmoid(scores: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(scores, -30, 30)))
