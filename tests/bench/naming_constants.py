"""The constants of naming, fitted anew and set beside those in use.

`python tests/bench/naming_constants.py REFERENCES.parquet ...` leaves references out and fits

- the weights of a hit (`VOTE_WEIGHTS`) for each file: those under which the votes for the right
  taxon have the highest likelihood, on half of the sequences; beside them the share of the other
  half whose taxon with the most votes is right, with these weights and with those in use;
- the curves by identity (`IDENTITY_CURVES`) over all files together: log-odds that a name is
  right, where half of the sequences lack their taxon.

`--models` gives the encoder of each file. One that was trained on what is left out makes vectors
look better evidence than they are.
"""

import argparse

import numpy as np
from scipy.optimize import minimize
from scipy.special import logsumexp

from bioscan_xla.classification.calibration import IDENTITY_CURVES
from bioscan_xla.classification.evidence import HIT_FEATURES, RANK_FEATURES, VOTE_WEIGHTS
from bioscan_xla.classification.leave_out import run_trials
from bioscan_xla.classification.naming import in_threads
from bioscan_xla.classification.opening import open_namer
from bioscan_xla.options import ClassifyConfig
from bioscan_xla.reads.lineages import RANKS


def left_out_hits(namer, number, rng):
    """Of some sequences the hits among the others.

    Returns:
        For each (features (hits, features), right (ranks, hits), True where the name is known).
    """
    reference = namer.reference
    paths = reference.tree.paths[reference.leaves]
    same = {}
    for row, sequence in enumerate(reference.sequences):
        same.setdefault(sequence, []).append(row)
    rows = rng.permutation([rows[0] for rows in same.values() if len(rows) == 1])[:number]

    def hits_of(row):
        excluded = np.zeros(len(paths), bool)
        excluded[row] = True
        cosines = None if reference.vectors is None else reference.vectors @ reference.vectors[row]
        hits = namer.name(reference.sequences[row], "plus", cosines, excluded).hits
        known = [not namer.nameless[rank][paths[row, rank]] for rank in range(len(RANKS))]
        return hits.features(), (paths[hits.numbers] == paths[row]).T, known

    return [found for found in in_threads(hits_of, rows) if len(found[0])]


def fit_votes(found, rank):
    """Weights, none below zero, of the highest likelihood; where no hit is right nothing counts."""
    rows = [(x, right[rank]) for x, right, known in found if known[rank] and right[rank].any()]

    def loss(weights):
        total, slope = 0.0, 0.01 * weights
        for x, right in rows:
            scores = x @ weights
            all_hits, own = logsumexp(scores), logsumexp(scores[right])
            total += all_hits - own
            slope = slope + np.exp(scores - all_hits) @ x - np.exp(scores[right] - own) @ x[right]
        return total + 0.005 * weights @ weights, slope

    bounds = [(0, None)] * len(HIT_FEATURES)
    return minimize(loss, VOTE_WEIGHTS[rank], jac=True, bounds=bounds, method="L-BFGS-B").x


def share_right(found, rank, weights):
    """Share of sequences of which the taxon with the most votes is right, and how many they are.

    Votes for other taxa are counted by hit, so the share is a lower bound, the same for all
    weights.
    """
    right = []
    for x, own, known in found:
        if known[rank]:
            votes = np.exp(x @ weights - logsumexp(x @ weights))
            right.append(votes[own[rank]].sum() > 0.5)
    return np.mean(right), len(right)


def fit_curve(trials, rank):
    """Slope and intercept of the log-odds of right names by identity, over several references."""
    parts = []
    for each in trials:
        rows = each.named[:, rank] & (each.correct[:, rank] >= 0)
        novel = each.novel[rows, rank]
        if novel.any():
            weights = np.where(novel, 1 / novel.sum(), 1 / (~novel).sum())
            identity = each.features[rows, rank, RANK_FEATURES.index("identity")]
            parts.append((identity, each.correct[rows, rank] == 1, weights))
    identity, right, weights = (np.concatenate(part) for part in zip(*parts, strict=True))

    def loss(curve):
        odds = curve[0] * identity + curve[1]
        return weights @ (np.logaddexp(0, odds) - right * odds)

    return minimize(loss, (30.0, -28.0), method="Nelder-Mead", options={"maxiter": 4000}).x


def main():
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+")
    parser.add_argument("--models", nargs="+", default=[])
    parser.add_argument("--sequences", type=int, default=2000)
    parser.add_argument("--trials", type=int, default=3000)
    options = parser.parse_args()
    models = options.models or [None] * len(options.files)
    print(f"weights of {', '.join(HIT_FEATURES)}")
    trials = []
    for file, model in zip(options.files, models, strict=True):
        config = ClassifyConfig(input=file, reference=file, model=model, output="unused")
        _, namer = open_namer(config)
        found = left_out_hits(namer, options.sequences, np.random.default_rng(0))
        half = len(found) // 2
        for rank in range(2, len(RANKS)):
            fitted = fit_votes(found[:half], rank)
            new, number = share_right(found[half:], rank, fitted)
            old, _ = share_right(found[half:], rank, VOTE_WEIGHTS[rank])
            print(f"{file} {RANKS[rank]:8}{fitted.round(2)}, in use {VOTE_WEIGHTS[rank]}; ", end="")
            print(f"right of {number} others {new:.3f}, in use {old:.3f}", flush=True)
        trials.append(run_trials(namer, options.trials))
    print("slope and intercept by identity")
    for name, curve in IDENTITY_CURVES.items():
        print(f"{name:8}{fit_curve(trials, RANKS.index(name)).round(1)}, in use {curve}")


if __name__ == "__main__":
    main()
