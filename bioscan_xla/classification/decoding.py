"""One lineage from probabilities at seven ranks: the best path through the tree of lineages.

Input: for some paths of the tree, the evidence for each node. Output: the best path.
Invariants: the result is a path of the tree, so it never contradicts itself. A rank that is not
known is neutral.

The score of a path is the sum over its known ranks of log P(node | names above), where
P(node | names above) is the node's share of the evidence for all named nodes of its rank whose own
names above agree with these. Names agree where both are known, so that what lies below an unknown
rank competes with all that this rank might be. A rank that is not known costs nothing. So that this
is no advantage, a path that ends where others go on counts as much as the best of these, which is
then taken, since it knows more.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

_LEAST = 1e-12
_TIED = 1e-9


@dataclass(frozen=True)
class Rivalry:
    """Nodes whose share is sought, and nodes that compete with them.

    Attributes:
        nodes: (sought,) local nodes.
        place: (sought,) what they have in common with their rivals, a number below `count`.
        rivals: (rivals,) local nodes.
        place_of_rival: (rivals,) likewise.
        count: of the numbers.
    """

    nodes: np.ndarray
    place: np.ndarray
    rivals: np.ndarray
    place_of_rival: np.ndarray
    count: int


@dataclass(frozen=True)
class Level:
    """The nodes of one rank that some paths go through.

    Attributes:
        nodes: (local nodes,) numbers in the tree, ascending.
        of_path: (paths,) local node of each path.
        named: (local nodes,) False where the rank is not known.
        rivalries: which nodes compete.
    """

    nodes: np.ndarray
    of_path: np.ndarray
    named: np.ndarray
    rivalries: tuple[Rivalry, ...]


def make_levels(paths: np.ndarray, nameless: Sequence[np.ndarray]) -> list[Level]:
    """Describe paths by rank.

    Args:
        paths: (paths, ranks) node numbers. A node has one set of ancestors.
        nameless: for each rank, (nodes of the tree,) bool.
    """
    num_ranks = paths.shape[1]
    named = np.stack([~nameless[rank][paths[:, rank]] for rank in range(num_ranks)], axis=1)
    levels: list[Level] = []
    for rank in range(num_ranks):
        nodes, first, of_path = np.unique(paths[:, rank], return_index=True, return_inverse=True)
        is_named = named[first, rank]
        rivalries = _find_rivals(paths[first, :rank], named[first, :rank], is_named)
        levels.append(Level(nodes, of_path, is_named, tuple(rivalries)))
    return levels


def _find_rivals(above: np.ndarray, known: np.ndarray, is_named: np.ndarray) -> Iterator[Rivalry]:
    """Which named nodes of a rank have names above that agree.

    Nodes are taken together by which ranks above them are known. Two agree if they have the same
    node at the deepest rank that is known of both, as a node has one set of ancestors.

    Args:
        above: (local nodes, ranks above) nodes of the tree.
        known: (local nodes, ranks above).
        is_named: (local nodes,).
    """
    rows = np.flatnonzero(is_named)
    masks, of_row = np.unique(known[rows], axis=0, return_inverse=True)
    members = [rows[of_row.ravel() == number] for number in range(len(masks))]
    for ours, nodes in zip(masks, members, strict=True):
        for theirs, rivals in zip(masks, members, strict=True):
            common = np.flatnonzero(ours & theirs)
            if not len(common):
                nothing = np.zeros(len(nodes), np.int64), np.zeros(len(rivals), np.int64)
                yield Rivalry(nodes, nothing[0], rivals, nothing[1], 1)
                continue
            mine, other = above[nodes, common[-1]], above[rivals, common[-1]]
            shared = np.intersect1d(mine, other)
            if len(shared):
                here, there = np.isin(mine, shared), np.isin(other, shared)
                yield Rivalry(
                    nodes[here],
                    np.searchsorted(shared, mine[here]),
                    rivals[there],
                    np.searchsorted(shared, other[there]),
                    len(shared),
                )


def score_paths(level: Level, values: np.ndarray) -> np.ndarray:
    """P(node | names above) of each path at one rank, (paths,); 1 where the rank is not known.

    Args:
        level: the rank.
        values: (local nodes,) evidence, not negative; that of nameless nodes does not count.
    """
    total = np.zeros(len(values))
    for rivalry in level.rivalries:
        sums = np.bincount(rivalry.place_of_rival, values[rivalry.rivals], rivalry.count)
        total[rivalry.nodes] += sums[rivalry.place]
    shares = np.where(level.named, values / np.where(total > 0, total, 1.0), 1.0)
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
