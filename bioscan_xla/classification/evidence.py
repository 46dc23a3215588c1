"""Evidence for a name: the candidates of a query, aligned, and how they vote at each rank.

Input: a query and its candidates among the references. Output: `Hits`, votes, and one decision.
Invariants: a hit whose alignment covers too little of the shorter sequence, or matches in too few
bases, does not count; equal evidence for several lineages is reported, never resolved silently.

The weight of a hit at a rank is softmax(features @ VOTE_WEIGHTS[rank]).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..reads.lineages import RANKS
from .alignment import Aligned, align
from .decoding import best_path, make_levels, score_paths
from .tree import LineageTree

HIT_FEATURES = ("identity", "word_similarity", "coverage", "mismatches", "vector_similarity")

# Fitted on 12S of fishes and rRNA, the mean of both. Refitting them for each reference gained
# nothing on either.
VOTE_WEIGHTS = np.array(
    [[0.7, 1.2, 1.0, 0.0, 1.0]] * 4
    + [[0.25, 1.8, 0.7, 0.55, 0.5], [0.15, 2.0, 0.5, 1.0, 0.5], [0.0, 1.2, 0.1, 2.0, 0.5]]
)
"""(ranks, hit features)"""

NUM_TRACED = 7

FEWEST_MATCHES = 30
"""Bases of an alignment that must match: some reference has 20 bases like any 20 others."""


@dataclass(frozen=True)
class Hits:
    """Candidates that are evidence, most identical first.

    Attributes:
        numbers: (hits,) of the references.
        word_similarity: (hits,) shared 8-mers, 0 to 1.
        vector_similarity: (hits,) cosine of the vectors, 0 where there are none.
        aligned: the alignments.
        num_candidates: candidates before the alignment.
    """

    numbers: np.ndarray
    word_similarity: np.ndarray
    vector_similarity: np.ndarray
    aligned: tuple[Aligned, ...]
    num_candidates: int

    @property
    def identity(self) -> np.ndarray:
        """(hits,) 0 to 1."""
        return np.array([hit.identity for hit in self.aligned], float)

    @property
    def coverage(self) -> np.ndarray:
        """(hits,) of the query."""
        return np.array([hit.coverage for hit in self.aligned], float)

    @property
    def tied(self) -> np.ndarray:
        """(hits,) True for those that are aligned as well as the first, itself included."""
        fits = [(hit.identity, hit.coverage) for hit in self.aligned]
        return np.array([fit == fits[0] for fit in fits], bool)

    def features(self) -> np.ndarray:
        """What votes are weighed by, (hits, features) in the order of `HIT_FEATURES`."""
        columns = np.array([hit.columns for hit in self.aligned], float)
        mismatches = (1 - self.identity) * columns
        return np.stack(
            [
                100 * self.identity,
                10 * self.word_similarity,
                10 * self.coverage,
                -np.log1p(mismatches),
                10 * self.vector_similarity,
            ],
            axis=1,
        )


def collect_hits(
    query: str,
    numbers: np.ndarray,
    word_similarity: np.ndarray,
    vector_similarity: np.ndarray,
    sequences: Sequence[str],
    min_coverage: float,
) -> Hits:
    """Align a query to its candidates and keep those that are evidence.

    Args:
        query: cleaned, on the strand of the references.
        numbers: (candidates,) of the references.
        word_similarity: (candidates,).
        vector_similarity: (candidates,).
        sequences: of all references.
        min_coverage: share of the shorter sequence that the alignment must cover.
    """
    found = align(query, [sequences[number] for number in numbers], NUM_TRACED)
    kept = [
        hit
        for hit in found
        if hit.overlap >= min_coverage and hit.operations.count("M") >= FEWEST_MATCHES
    ]
    kept.sort(key=lambda hit: (-hit.identity, -hit.score, hit.number))
    places = np.array([hit.number for hit in kept], np.int64)
    return Hits(
        numbers[places],
        word_similarity[places],
        vector_similarity[places],
        tuple(kept),
        len(numbers),
    )


NO_HITS = Hits(np.zeros(0, np.int64), np.zeros(0), np.zeros(0), (), 0)


def vote_weights(hits: Hits) -> np.ndarray:
    """Weight of each hit at each rank, (ranks, hits); each rank sums to 1."""
    scores = VOTE_WEIGHTS @ hits.features().T
    scores = np.exp(scores - scores.max(1, keepdims=True))
    return scores / scores.sum(1, keepdims=True)


@dataclass(frozen=True)
class Decision:
    """One lineage and what it rests on.

    Attributes:
        path: (ranks,) nodes of the tree; -1 where a rank that was decided by itself has no name.
        leaf: the path's number in the tree; -1 where each rank was decided by itself and the
            ranks contradict each other.
        agreement: (ranks,) share of the votes for each node.
        equal: leaves of all paths that are as good.
        head: (ranks,) probability that the heads give each node, if there are heads.
    """

    path: np.ndarray
    leaf: int
    agreement: np.ndarray
    equal: tuple[int, ...]
    head: np.ndarray | None = None


def decide(
    tree: LineageTree,
    nameless: Sequence[np.ndarray],
    leaves: np.ndarray,
    votes: np.ndarray,
) -> Decision:
    """The best path through the lineages of the hits.

    Args:
        tree: of all lineages.
        nameless: for each rank `tree.nameless(rank)`.
        leaves: (hits,) leaf of each hit.
        votes: (ranks, hits).
    """
    distinct, of_hit = np.unique(leaves, return_inverse=True)
    levels = make_levels(tree.paths[distinct], nameless)
    scores, sums = [], []
    for level, vote in zip(levels, votes, strict=True):
        total = np.bincount(level.of_path[of_hit], vote, minlength=len(level.nodes))
        sums.append(total)
        scores.append(score_paths(level, total))
    best, equal = best_path(levels, scores)
    agreement = np.array(
        [total[level.of_path[best]] for total, level in zip(sums, levels, strict=True)]
    )
    return Decision(
        tree.paths[distinct[best]],
        int(distinct[best]),
        agreement,
        tuple(distinct[equal].tolist()),
    )


RANK_FEATURES = (
    "identity",
    "mismatches",
    "margin",
    "agreement",
    "word_similarity",
    "vector_similarity",
    "log_length",
    "coverage",
    "evidence",
    "head",
    "tied_others",
)


def rank_features(
    tree: LineageTree,
    nameless: Sequence[np.ndarray],
    hits: Hits,
    leaves: np.ndarray,
    decision: Decision,
    length_bp: int,
) -> np.ndarray:
    """What the confidence at each rank is computed from, (ranks, features) of `RANK_FEATURES`.

    Args:
        tree: of all lineages.
        nameless: for each rank `tree.nameless(rank)`.
        hits: of the query.
        leaves: (hits,) leaf of each.
        decision: the path that was taken.
        length_bp: of the query.
    """
    identity, coverage, head = hits.identity, hits.coverage, decision.head
    result = np.zeros((len(RANKS), len(RANK_FEATURES)))
    lowest = identity.min() if len(identity) else 0.0
    tied, equal = tree.paths[leaves[hits.tied]], tree.paths[list(decision.equal)]
    for rank in range(len(RANKS)):
        nodes = tree.paths[leaves, rank]
        own = np.flatnonzero(nodes == decision.path[rank])
        other = np.flatnonzero((nodes != decision.path[rank]) & ~nameless[rank][nodes])
        best = identity[own].max() if len(own) else 0.0
        # Where only one taxon was aligned, others are at most as near as the last of its hits.
        rival = identity[other].max() if len(other) else min(lowest, best - 0.01)
        share = np.clip(decision.agreement[rank], 0.001, 0.999)
        if len(leaves):  # some doubt, so that a single hit does not look unanimous
            share = (len(leaves) * decision.agreement[rank] + 0.05) / (len(leaves) + 0.1)
        at = own[0] if len(own) else None
        columns = hits.aligned[at].columns if at is not None else 0
        probability = np.clip(head[rank], 0.001, 0.999) if head is not None else 0.5
        result[rank] = (
            best,
            np.log1p((1 - best) * columns),
            np.clip(best - rival, -0.05, 0.1),
            np.log(share / (1 - share)),
            hits.word_similarity[own].max() if len(own) else 0.0,
            hits.vector_similarity[own].max() if len(own) else 0.0,
            np.log10(max(length_bp, 1)),
            coverage[at] if at is not None else 0.0,
            len(identity) / max(hits.num_candidates, 1),
            np.log(probability / (1 - probability)),
            max(
                _others(tied[:, rank], nameless[rank], decision.path[rank]),
                _others(np.unique(equal[:, rank]), nameless[rank], decision.path[rank]),
            ),
        )
    return result


def _others(nodes: np.ndarray, nameless: np.ndarray, own: int) -> float:
    """Share of equally good names of a rank that are not the decision's.

    0 where the decision is not among them: what another taxon fits better is no tie.

    Args:
        nodes: of the rank, one for each that is as good.
        nameless: of the rank.
        own: node of the decision.
    """
    named = nodes[~nameless[nodes]]
    same = (named == own).sum()
    return 1 - same / len(named) if same else 0.0
