"""The tree of known lineages.

Input: lineages as people write them. Output: a `LineageTree`, and for each lineage its leaf.
Invariants: every leaf is a path of seven nodes, one a rank; where a rank is not known the node has
no name, so a taxon known only to family is a complete path. A node has one parent, so a path can
not contradict itself. A name with two sets of ancestors is two nodes; ranks that one lineage leaves
out and another of the same taxon knows are filled in.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..reads.labels import UNKNOWN, Conflict, LabelSpace, learn_labels
from ..reads.lineages import RANKS, Lineage, known_lineage


@dataclass(frozen=True)
class LineageTree:
    """Nodes of each rank, and the paths through them.

    Attributes:
        names: for each rank the name of each node, None where the rank is not known.
        paths: (leaves, 7) node numbers, highest rank first.
    """

    names: tuple[tuple[str | None, ...], ...]
    paths: np.ndarray

    def lineage(self, leaf: int) -> Lineage:
        """The seven names of a leaf."""
        return tuple(names[node] for names, node in zip(self.names, self.paths[leaf], strict=True))

    def names_along(self, path: np.ndarray) -> Lineage:
        """The names of seven nodes, which need not be a path; None for -1."""
        pairs = zip(self.names, path, strict=True)
        return tuple(names[node] if node != UNKNOWN else None for names, node in pairs)

    def nameless(self, rank: int) -> np.ndarray:
        """(nodes,) True where a node of this rank has no name."""
        return np.array([name is None for name in self.names[rank]], bool)


def build_tree(
    lineages: Sequence[Sequence[str | None]],
) -> tuple[LineageTree, np.ndarray, list[Conflict]]:
    """Build the tree.

    Args:
        lineages: seven names each, highest rank first.

    Returns:
        The tree; (lineages,) the leaf of each, -1 for one without any usable name; and the names
        that have several sets of ancestors.
    """
    space, conflicts = learn_labels(lineages)
    whole = [known_lineage(names) for names in lineages]
    for _ in RANKS:  # what a taxon's own ancestors leave out may be known of its parent
        filled = _fill(whole, space)
        if filled == whole:
            break
        whole = filled
    nothing: Lineage = (None,) * len(RANKS)
    distinct = sorted(set(whole) - {nothing}, key=lambda chain: [name or "" for name in chain])
    index: list[dict[Lineage, int]] = [{} for _ in RANKS]
    paths = np.empty((len(distinct), len(RANKS)), np.int64)
    for leaf, chain in enumerate(distinct):
        for rank in range(len(RANKS)):
            known_nodes = index[rank]
            paths[leaf, rank] = known_nodes.setdefault(chain[: rank + 1], len(known_nodes))
    names = tuple(tuple(prefix[-1] for prefix in nodes) for nodes in index)
    place = {chain: leaf for leaf, chain in enumerate(distinct)}
    leaves = np.array([place.get(chain, UNKNOWN) for chain in whole], np.int64)
    return LineageTree(names, paths), leaves, conflicts


def _fill(lineages: Sequence[Lineage], space: LabelSpace) -> list[Lineage]:
    """Fill unknown ranks from the classes of the known ones; what is ambiguous becomes unknown."""
    result = []
    for lineage, row in zip(lineages, space.encode(lineages), strict=True):
        names: list[str | None] = [
            name if number != UNKNOWN else None for name, number in zip(lineage, row, strict=True)
        ]
        for rank in np.flatnonzero(row != UNKNOWN)[::-1].tolist():
            chain = space.lineages[rank][row[rank]]
            for above, name in enumerate(chain):
                names[above] = names[above] or name
        result.append(tuple(names))
    return result
