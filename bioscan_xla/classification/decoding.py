"""One lineage from probabilities at seven ranks: the best path through the tree of lineages.

Input: for some paths of the tree, the evidence for each node. Output: the best path.
Invariants: the result is a path of the tree, so it never contradicts itself. A rank that is not
known is neutral.

The score of a path is the sum over its known ranks of log P(node | nearest named node above), where
P(node | above) is the node's share of the evidence for all named nodes of its rank below that one.
A rank that is not known costs nothing. So that this is no advantage, a path that ends where others
go on counts as much as the best of these, which is then taken, since it knows more.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_LEAST = 1e-12
_TIED = 1e-9
_ROOT = -1


@dataclass(frozen=True)
class Level:
    """The nodes of one rank that some paths go through.

    Attributes:
        nodes: (local nodes,) numbers in the tree, ascending.
        of_path: (paths,) local node of each path.
        named: (local nodes,) False where the rank is not known.
        above: for each rank above, and last for the root: (local nodes,) the local node there.
        nearest: (local nodes,) rank of the nearest named node above, -1 for the root.
    """

    nodes: np.ndarray
    of_path: np.ndarray
    named: np.ndarray
    above: tuple[np.ndarray, ...]
    nearest: np.ndarray


def make_levels(paths: np.ndarray, nameless: Sequence[np.ndarray]) -> list[Level]:
    """Describe paths by rank.

    Args:
        paths: (paths, ranks) node numbers.
        nameless: for each rank, (nodes of the tree,) bool.
    """
    num_paths, num_ranks = paths.shape
    named = np.stack([~nameless[rank][paths[:, rank]] for rank in range(num_ranks)], axis=1)
    levels: list[Level] = []
    nearest = np.full(num_paths, _ROOT)
    for rank in range(num_ranks):
        nodes, first, of_path = np.unique(paths[:, rank], return_index=True, return_inverse=True)
        above = [level.of_path[first] for level in levels] + [np.zeros(len(nodes), np.int64)]
        levels.append(Level(nodes, of_path, named[first, rank], tuple(above), nearest[first]))
        nearest = np.where(named[:, rank], rank, nearest)
    return levels


def score_paths(level: Level, values: np.ndarray) -> np.ndarray:
    """P(node | nearest named node above) of each path at one rank, (paths,).

    Args:
        level: the rank.
        values: (local nodes,) evidence, not negative; that of nameless nodes does not count.
    """
    values = np.where(level.named, values, 0.0)
    shares = np.ones(len(values))
    for rank in np.unique(level.nearest):
        groups = level.above[rank]  # the last for the root
        sums = np.bincount(groups, values)
        here = level.named & (level.nearest == rank)
        total = sums[groups[here]]
        shares[here] = values[here] / np.where(total > 0, total, 1.0)
    return shares[level.of_path]


def ends_early(levels: Sequence[Level]) -> np.ndarray:
    """(paths,) True where a path ends at a node below which another goes on."""
    named = np.stack([level.named[level.of_path] for level in levels], axis=1)
    depth = np.where(named, np.arange(1, len(levels) + 1), 0).max(1)
    result = np.zeros(len(depth), bool)
    for rank, level in enumerate(levels):
        deepest = np.zeros(len(level.nodes), np.int64)
        np.maximum.at(deepest, level.of_path, depth)
        here = depth == rank + 1
        result[here] = deepest[level.of_path[here]] > rank + 1
    return result


def best_path(levels: Sequence[Level], scores: Sequence[np.ndarray]) -> tuple[int, np.ndarray]:
    """The path whose product of probabilities is largest.

    Args:
        levels: from `make_levels`.
        scores: for each rank (paths,), from `score_paths`.

    Returns:
        Its number, and the numbers of all that are as good and do not end early. Of equals the
        one with the most named ranks is taken, then the first.
    """
    total = np.log(np.maximum(np.stack(scores), _LEAST)).sum(0)
    total[ends_early(levels)] = -np.inf
    named = np.sum([level.named[level.of_path] for level in levels], axis=0)
    equal = np.flatnonzero(total >= total.max() - _TIED)
    return int(equal[np.argmax(named[equal])]), equal
