"""Confidence, novelty and thresholds, fitted on left-out references.

Input: `Trials`, what was decided for left-out references and whether it was right.
Output: a `Calibration`. Invariants: confidence never exceeds that of the rank above; at each
threshold the precision that was asked for held on the trials, and at genus at most the remaining
share of sequences of unknown genera got a name. A threshold is chosen on the trials that judge it,
so precision holds with one more wrong name, and the share with 1.64 standard errors.

References: Angelopoulos et al. (2022), https://arxiv.org/abs/2208.02814, for the one more; Cochran
(1977), Sampling Techniques, chapter 9A, for the standard error of a share over clusters, which are
genera here.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np

from ..reads.lineages import RANKS
from .evidence import RANK_FEATURES
from .logistic import FEWEST_OF_A_KIND, FEWEST_TRIALS, Logistic, fit_logistic

_TIED_OTHERS = RANK_FEATURES.index("tied_others")
GENUS = RANKS.index("genus")
ALONE = len(RANKS)
"""In place of the rank that was left out whole: the sequence alone was."""
HIGHER_SHARES = {"family": 0.03, "order": 0.01, "class": 0.005, "phylum": 0.005}
"""Share of the sequences of unknown genera whose family, order ... the references lack too, beside
those of genera that are the only one of theirs. An assumption: what it is depends on the sample."""
LENGTH_BANDS_BP = (150, 300, 600, 1200)
"""Upper ends of the length bands that novelty is judged by; the last is open."""

IDENTITY_CURVES = {
    "order": (23.4, -20.8),
    "family": (21.5, -19.4),
    "genus": (50.3, -48.2),
    "species": (70.3, -68.6),
}
"""Slope and intercept of the log-odds that a name is right, by the best identity, where half of the
sequences lack their taxon. For ranks of which a reference has one taxon only, which cannot be left
out. Fitted on the left-out trials of 12S of fishes and COI of annelids, three splits each."""

ENOUGH_TRIALS = 500
"""From which the precision can be relied on."""
_NEVER = 2.0  # a threshold that no confidence reaches
_ERRORS = 1.64  # standard errors that leave a chance of 5 %
_LEAST_THRESHOLD = 0.7  # names that are this unsure are not kept, however right the others are


@dataclass(frozen=True)
class Trials:
    """Left-out references, named as if they were queries.

    Attributes:
        features: (trials, ranks, features).
        named: (trials, ranks) True where the decision has a name.
        correct: (trials, ranks) 1 right, 0 wrong, -1 where the truth is not known.
        novel: (trials, ranks) True where the true taxon was not among the references.
        known: (trials, ranks) True where the true taxon is known at this rank.
        length_bp: (trials,).
        left_out: (trials,) the rank whose whole taxon was left out, or `ALONE`.
        genus: (trials,) equal for sequences of one genus.
    """

    features: np.ndarray
    named: np.ndarray
    correct: np.ndarray
    novel: np.ndarray
    known: np.ndarray
    length_bp: np.ndarray
    left_out: np.ndarray
    genus: np.ndarray

    @property
    def higher(self) -> np.ndarray:
        """(trials,) True where more than a genus was left out."""
        return self.left_out < GENUS

    def weights(self, novel_share: float) -> np.ndarray:
        """Weight of each trial, so that those of unknown genera have `novel_share` of all.

        Of these, trials without the family, order, class or phylum have `HIGHER_SHARES`.
        """
        higher = {RANKS.index(name): share for name, share in HIGHER_SHARES.items()}
        counts = {rank: int((self.left_out == rank).sum()) for rank in higher}
        beyond = novel_share * sum(share for rank, share in higher.items() if counts[rank])
        weights = np.zeros(len(self.left_out))
        rest = ~self.higher
        share = (novel_share - beyond) / (1 - beyond)
        weights[rest] = (1 - beyond) * self._weights_to_genus(rest, share)
        for rank, count in counts.items():
            weights[self.left_out == rank] = novel_share * higher[rank] / max(count, 1)
        return weights * len(weights)

    def _weights_to_genus(self, rows: np.ndarray, novel_share: float) -> np.ndarray:
        """Weights, 1 in all, of sequences left out alone or with their genus.

        Some sequences left out alone are of unknown genera already, those that are the only one
        of theirs. Where more are expected, sequences left out with their genus are mixed in; where
        fewer, those of unknown genera count less.
        """
        novel, whole = self.novel[rows, GENUS], self.left_out[rows] == GENUS
        weights = np.ones(len(novel))
        singles, lonely = (~whole).sum(), (novel & ~whole).sum()
        if not novel.any() or lonely == singles:
            return weights / len(weights)
        by_chance = lonely / singles
        if novel_share > by_chance and whole.any():
            mixed = (novel_share - by_chance) / (1 - by_chance)
            weights[whole] = mixed / whole.sum()
            weights[~whole] = (1 - mixed) / singles
        else:
            weights[whole] = 0.0
            if lonely:
                weights[novel & ~whole] = min(novel_share / by_chance, 1.0)
                weights[~novel & ~whole] = (1 - min(novel_share, by_chance)) / (1 - by_chance)
        return weights / weights.sum()


@dataclass(frozen=True)
class Calibration:
    """The models that turn evidence into confidence.

    Attributes:
        confidence: for each rank a model, None where there were too few trials.
        novelty: for each rank the probability that the taxon is not among the references.
        thresholds: (ranks,) least confidence of a name that is kept.
        novelty_trust: for each length band the area under the ROC curve of the novelty score, NaN
            where there were too few trials.
        num_trials: left-out references it rests on.
        untested: for each rank below class of which no taxon could be left out, slope and intercept
            of the log-odds by identity.
        has_heads: True where the trials have something to say of heads.
    """

    confidence: tuple[Logistic | None, ...]
    novelty: tuple[Logistic | None, ...]
    thresholds: np.ndarray
    novelty_trust: np.ndarray
    num_trials: int
    untested: Mapping[int, tuple[float, float]] = field(default_factory=dict)
    has_heads: bool = False

    @property
    def has_few_trials(self) -> bool:
        """True where it is calibrated, and the precision may not hold all the same."""
        return 0 < self.num_trials < ENOUGH_TRIALS

    def confidences(self, features: np.ndarray, named: np.ndarray) -> np.ndarray:
        """Confidence at each rank, NaN where there is no name, (rows, ranks).

        Args:
            features: (rows, ranks, features).
            named: (rows, ranks).
        """
        result = np.full(named.shape, np.nan)
        above = np.ones(len(named))
        for rank, model in enumerate(self.confidence):
            values = _probability(model, features[:, rank], default=_agreement(features[:, rank]))
            values = np.minimum(values, self._by_identity(features[:, rank], rank))
            values = np.minimum(values, 1 - features[:, rank, _TIED_OTHERS])
            above = np.where(named[:, rank], np.minimum(values, above), above)
            result[named[:, rank], rank] = above[named[:, rank]]
        return result

    def novelties(self, features: np.ndarray) -> np.ndarray:
        """Probability that the taxon at each rank is new, (rows, ranks), rising downwards."""
        values = [
            _probability(model, features[:, rank], default=np.zeros(len(features)))
            for rank, model in enumerate(self.novelty)
        ]
        for rank in self.untested:
            values[rank] = np.maximum(values[rank], 1 - self._by_identity(features[:, rank], rank))
        return np.maximum.accumulate(np.stack(values, axis=1), axis=1)

    def _by_identity(self, features: np.ndarray, rank: int) -> np.ndarray:
        """Upper limit of the confidence at a rank, 1 where it was tested or nothing is aligned."""
        identity = features[:, RANK_FEATURES.index("identity")]
        if rank not in self.untested:
            return np.ones(len(identity))
        slope, intercept = self.untested[rank]
        limit = 1 / (1 + np.exp(-np.clip(slope * identity + intercept, -30, 30)))
        return np.where(identity > 0, limit, 1.0)


def _probability(model: Logistic | None, features: np.ndarray, default: np.ndarray) -> np.ndarray:
    return default if model is None else model.probability(features)


def _agreement(features: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-features[:, RANK_FEATURES.index("agreement")]))


def length_band(length_bp: np.ndarray) -> np.ndarray:
    """Number of the length band of each length."""
    return np.searchsorted(LENGTH_BANDS_BP, length_bp, side="left")


def calibrate(
    trials: Trials | None,
    *,
    novel_share: float,
    precision: float,
    fixed_thresholds: dict[str, float] | None = None,
    single: Collection[str] = (),
) -> Calibration:
    """Fit confidence, novelty and thresholds.

    Args:
        trials: left-out references; None where there are too few to try.
        novel_share: share of the queries that are expected to be of unknown genera.
        precision: share of right names that is wanted among those kept.
        fixed_thresholds: by rank, instead of what `precision` gives.
        single: ranks of which there is one taxon, which no trial can lack.
    """
    fixed = fixed_thresholds or {}
    nothing: tuple[Logistic | None, ...] = (None,) * len(RANKS)
    bands = len(LENGTH_BANDS_BP) + 1
    if trials is None or len(trials.length_bp) < FEWEST_TRIALS:
        # Agreement of the votes is then the confidence.
        thresholds = np.array([fixed.get(rank, precision) for rank in RANKS])
        return Calibration(nothing, nothing, thresholds, np.full(bands, np.nan), 0)
    weights = trials.weights(novel_share)
    confidence, novelty = [], []
    for rank in range(len(RANKS)):
        rows = trials.named[:, rank] & (trials.correct[:, rank] >= 0)
        confidence.append(
            fit_logistic(
                trials.features[rows, rank],
                trials.correct[rows, rank] == 1,
                weights[rows],
                rising=True,
            )
        )
        rows = trials.known[:, rank]
        novelty.append(
            fit_logistic(
                trials.features[rows, rank],
                trials.novel[rows, rank],
                weights[rows],
                rising=False,
            )
        )
    unfinished = Calibration(
        tuple(confidence),
        tuple(novelty),
        np.zeros(len(RANKS)),
        np.full(bands, np.nan),
        len(weights),
        _curves(single, novel_share),
    )
    scores = unfinished.confidences(trials.features, trials.named)
    thresholds = np.array(
        [
            fixed.get(name, _threshold(trials, scores[:, rank], rank, weights, precision))
            for rank, name in enumerate(RANKS)
        ]
    )
    return Calibration(
        tuple(confidence),
        tuple(novelty),
        thresholds,
        _trust(trials, unfinished.novelties(trials.features)[:, GENUS]),
        len(weights),
        unfinished.untested,
        bool(trials.features[:, :, RANK_FEATURES.index("head")].any()),
    )


def _curves(single: Collection[str], novel_share: float) -> dict[int, tuple[float, float]]:
    """`IDENTITY_CURVES` of some ranks for the expected share of sequences that lack their taxon."""
    share = min(max(novel_share, 0.02), 0.98)
    odds = float(np.log((1 - share) / share))
    return {
        RANKS.index(name): (slope, intercept + odds)
        for name, (slope, intercept) in IDENTITY_CURVES.items()
        if name in single
    }


def _threshold(
    trials: Trials, scores: np.ndarray, rank: int, weights: np.ndarray, precision: float
) -> float:
    """The least confidence above which the precision held."""
    rows = trials.named[:, rank] & (trials.correct[:, rank] >= 0)
    if not rows.any():
        return precision
    order = np.argsort(-scores[rows], kind="stable")
    values = scores[rows][order]
    right = (weights * (trials.correct[:, rank] == 1))[rows][order]
    held = np.cumsum(right) / (np.cumsum(weights[rows][order]) + 1) >= precision
    if rank == GENUS:
        # Sequences without their family, too, are easily told and would hide the others.
        novel = weights * (trials.novel[:, GENUS] & ~trials.higher)
        ordered = np.flatnonzero(rows)[order]
        held &= _most_named(novel, trials.genus, ordered) <= 1 - precision
    # Equal confidences are kept or cut together.
    last = np.append(values[1:] < values[:-1], True)
    good = np.flatnonzero(held & last)
    if len(good) and good[-1] == len(values) - 1:
        return _LEAST_THRESHOLD  # every name may be kept
    return max(float(values[good[-1]]), _LEAST_THRESHOLD) if len(good) else _NEVER


def _most_named(weights: np.ndarray, genus: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Share of the weight that is named after each row, and `_ERRORS` of its standard error.

    Sequences of a genus are named together or not at all, so that genera count, not sequences.

    Args:
        weights: (trials,) 0 where the genus is not new.
        genus: (trials,).
        order: (names,) trials that have a name, the surest first.
    """
    genera, of = np.unique(genus, return_inverse=True)
    sizes = np.bincount(of, weights, minlength=len(genera))
    total, squares, num = max(sizes.sum(), 1e-9), (sizes**2).sum(), max((sizes > 0).sum(), 2)
    named = np.zeros(len(genera))
    share, own, product = 0.0, 0.0, 0.0  # sums of named, named squared, and named times size
    result = np.zeros(len(order))
    for at, row in enumerate(order):
        of_row, weight = of[row], weights[row]
        own += weight * (2 * named[of_row] + weight)
        product += weight * sizes[of_row]
        named[of_row] += weight
        share += weight / total
        variance = (own - 2 * share * product + share**2 * squares) * num / (num - 1)
        result[at] = share + _ERRORS * np.sqrt(max(variance, 0.0)) / total
    return result


def _trust(trials: Trials, scores: np.ndarray) -> np.ndarray:
    from sklearn.metrics import roc_auc_score

    bands = length_band(trials.length_bp)
    result = np.full(len(LENGTH_BANDS_BP) + 1, np.nan)
    for band in range(len(result)):
        rows = (bands == band) & trials.known[:, GENUS] & ~trials.higher
        novel = trials.novel[rows, GENUS]
        if min(novel.sum(), (~novel).sum()) >= FEWEST_OF_A_KIND:
            result[band] = roc_auc_score(novel, scores[rows])
    return result
