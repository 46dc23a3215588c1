"""Lineages to class numbers: the label space that a classifier learns.

Input: lineages as written by the user. Output: a `LabelSpace` and, for any lineage, one class
number for each rank, -1 where it is unknown.
Invariants: a class is a name with its ancestors, so a homonym is two classes; the order is stable;
a taxon too rare to be a class at its rank still counts at the ranks above.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import InputError
from .lineages import RANKS, Lineage, known_lineage

UNKNOWN = -1
"""Class number of a rank that is not known."""

_MOST_SEQUENCES = 2**53
"""Larger counts are no longer exact as floating-point numbers."""


def compatible(a: Lineage, b: Lineage) -> bool:
    """Whether two chains of names differ only where one of them is unknown."""
    return all(x is None or y is None or x == y for x, y in zip(a, b, strict=True))


@dataclass(frozen=True)
class Conflict:
    """One name with several sets of ancestors: a homonym, or contradicting lineages.

    Attributes:
        rank: of the name.
        name: the taxon.
        ancestors: the lineages above it.
        rows: which of the lineages given to `learn_labels` hold it.
    """

    rank: str
    name: str
    ancestors: tuple[Lineage, ...]
    rows: tuple[int, ...]

    def __str__(self) -> str:
        """One line for a log."""
        return f"{self.rank} {self.name!r} appears in {' | '.join(self.ways)}"

    @property
    def ways(self) -> list[str]:
        """Each set of ancestors as text, highest rank first."""
        return [";".join(name or "?" for name in chain) for chain in self.ancestors]


@dataclass(frozen=True)
class LabelSpace:
    """The classes of each rank.

    Attributes:
        lineages: for each rank, highest first, its classes as lineages down to that rank.
        counts: for each rank, sequences of each class.
    """

    lineages: tuple[tuple[Lineage, ...], ...]
    counts: tuple[tuple[int, ...], ...]

    @property
    def num_classes(self) -> tuple[int, ...]:
        """Classes of each rank."""
        return tuple(len(classes) for classes in self.lineages)

    def names(self, rank: int) -> list[str]:
        """Names of the classes of a rank."""
        return [lineage[-1] or "" for lineage in self.lineages[rank]]

    def ancestors(self) -> list[np.ndarray]:
        """For each rank its classes' known ancestors, (classes, ranks above it) int64.

        Column q holds the class at rank q, -1 where that ancestor is unknown or ambiguous. A name
        missing in the middle of a lineage leaves only its own column unknown: ranks above it are
        found by name, or through the nearest ancestor that knows them.

        >>> rows = [("Animalia", None, "Polychaeta"), ("Animalia", "Annelida", "Clitellata")]
        >>> space, _ = learn_labels([row + (None,) * 4 for row in rows])
        >>> space.names(2), space.ancestors()[2].tolist()
        (['Polychaeta', 'Clitellata'], [[0, -1], [0, 0]])
        """
        by_name: list[dict[str, list[int]]] = [defaultdict(list) for _ in RANKS]
        tables: list[np.ndarray] = []
        for rank, classes in enumerate(self.lineages):
            table = np.full((len(classes), rank), UNKNOWN, np.int64)
            for number, chain in enumerate(classes):
                for above in reversed(range(rank)):
                    fitting = [
                        other
                        for other in by_name[above].get(chain[above] or "", ())
                        if compatible(self.lineages[above][other], chain[: above + 1])
                    ]
                    if len(fitting) == 1:
                        # The ancestor may know what the lineage itself leaves open.
                        own = table[number, :above]
                        own[own == UNKNOWN] = tables[above][fitting[0]][own == UNKNOWN]
                        table[number, above] = fitting[0]
                by_name[rank][chain[-1] or ""].append(number)
            tables.append(table)
        return tables

    def encode(self, lineages: Sequence[Sequence[str | None]]) -> np.ndarray:
        """Class numbers, (lineages, 7) int64, -1 where unknown or not in the space.

        >>> rows = [("Animalia", name) + (None,) * 5 for name in ("Annelida", "Mollusca")]
        >>> space, _ = learn_labels(rows)
        >>> space.encode([rows[1], ("Animalia", "Cnidaria") + (None,) * 5])[:, :3].tolist()
        [[0, 1, -1], [0, -1, -1]]
        """
        index: dict[tuple[int, str], list[tuple[int, Lineage]]] = defaultdict(list)
        for rank, classes in enumerate(self.lineages):
            for number, chain in enumerate(classes):
                index[rank, chain[-1] or ""].append((number, chain))
        seen: dict[Lineage, list[int]] = {}
        result = np.full((len(lineages), len(RANKS)), UNKNOWN, np.int64)
        for row, raw in enumerate(lineages):
            lineage = known_lineage(raw)
            if lineage not in seen:
                numbers = [UNKNOWN] * len(RANKS)
                for rank, name in enumerate(lineage):
                    fitting = [
                        number
                        for number, chain in index.get((rank, name or ""), ())
                        if name and compatible(chain[:-1], lineage[:rank])
                    ]
                    if len(fitting) == 1:  # several: the name alone is ambiguous
                        numbers[rank] = fitting[0]
                seen[lineage] = numbers
            result[row] = seen[lineage]
        return result

    def save(self, path: str | Path) -> None:
        """Write as JSON."""
        ranks = [
            [
                {"lineage": list(lineage), "count": count}
                for lineage, count in zip(*pair, strict=True)
            ]
            for pair in zip(self.lineages, self.counts, strict=True)
        ]
        text = json.dumps(dict(zip(RANKS, ranks, strict=True)), indent=1)
        Path(path).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "LabelSpace":
        """Read what `save` wrote; InputError if it is something else."""
        try:
            ranks = json.loads(Path(path).read_text(encoding="utf-8"))
            lineages = tuple(tuple(tuple(c["lineage"]) for c in ranks[rank]) for rank in RANKS)
            counts = tuple(tuple(int(c["count"]) for c in ranks[rank]) for rank in RANKS)
            for rank, classes in enumerate(lineages):
                for chain, count in zip(classes, counts[rank], strict=True):
                    _check_class(chain, rank, count)
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(f"{path}: not a label space ({error})") from error
        return cls(lineages, counts)


def _check_class(chain: Lineage, rank: int, count: int) -> None:
    """ValueError if a class of a file is not a lineage down to its rank."""
    names = all(name is None or isinstance(name, str) for name in chain)
    if not names or len(chain) != rank + 1 or not chain[-1]:
        raise ValueError(f"{list(chain)} is not a lineage down to {RANKS[rank]}")
    if not 0 <= count <= _MOST_SEQUENCES:
        raise ValueError(f"{chain[-1]} has the count {count}")


def nearest_rank(ancestors: np.ndarray) -> np.ndarray:
    """Rank of each class's nearest known ancestor, (classes,) int64, -1 where none is known.

    >>> nearest_rank(np.array([[4, 2], [4, -1], [-1, -1]])).tolist()
    [1, 0, -1]
    """
    depth = np.arange(1, ancestors.shape[1] + 1)
    return ((ancestors != UNKNOWN) * depth).max(1, initial=0) - 1


def learn_labels(
    lineages: Sequence[Sequence[str | None]], min_sequences: int = 1
) -> tuple[LabelSpace, list[Conflict]]:
    """Learn the classes from lineages.

    Args:
        lineages: seven names each, highest rank first.
        min_sequences: a class with fewer becomes unknown at its rank.

    Returns:
        The label space, classes sorted by lineage, and the names with conflicting ancestors.
    """
    counts = Counter(known_lineage(raw) for raw in lineages)
    rows: dict[Lineage, list[int]] = defaultdict(list)
    for row, raw in enumerate(lineages):
        rows[known_lineage(raw)].append(row)
    kept, sizes, conflicts = [], [], []
    for rank in range(len(RANKS)):
        chains: dict[str, Counter[Lineage]] = defaultdict(Counter)
        for lineage, count in counts.items():
            if (name := lineage[rank]) is not None:
                chains[name][lineage[:rank]] += count
        classes, several = _classes_of(chains, min_sequences)
        kept.append(tuple(classes))
        sizes.append(tuple(classes.values()))
        for name, ancestors in several.items():
            places = [row for lineage in rows if lineage[rank] == name for row in rows[lineage]]
            conflicts.append(Conflict(RANKS[rank], name, ancestors, tuple(sorted(places))))
    return LabelSpace(tuple(kept), tuple(sizes)), conflicts


def join_labels(
    spaces: Sequence[LabelSpace], min_sequences: int = 1
) -> tuple[LabelSpace, list[Conflict]]:
    """The classes of several label spaces together; their counts add up.

    Of complete lineages it gives what `learn_labels` gives of all sequences at once. The order of
    the spaces does not matter.

    Args:
        spaces: each with all its classes, however few sequences they have.
        min_sequences: a class with fewer in all spaces together is left out.

    Returns:
        The label space, and the names with conflicting ancestors; the `rows` of these are the
        numbers of the spaces that have the name.
    """
    kept, sizes, conflicts = [], [], []
    for rank in range(len(RANKS)):
        chains: dict[str, Counter[Lineage]] = defaultdict(Counter)
        holders: dict[str, set[int]] = defaultdict(set)
        for number, space in enumerate(spaces):
            for (*above, name), count in zip(space.lineages[rank], space.counts[rank], strict=True):
                chains[name or ""][tuple(above)] += count
                holders[name or ""].add(number)
        classes, several = _classes_of(chains, min_sequences)
        kept.append(tuple(classes))
        sizes.append(tuple(classes.values()))
        for name, ancestors in several.items():
            conflicts.append(Conflict(RANKS[rank], name, ancestors, tuple(sorted(holders[name]))))
    return LabelSpace(tuple(kept), tuple(sizes)), conflicts


def _classes_of(
    chains: Mapping[str, Counter[Lineage]], min_sequences: int
) -> tuple[dict[Lineage, int], dict[str, tuple[Lineage, ...]]]:
    """Classes of one rank with their counts, sorted; and the names with several ancestors.

    Args:
        chains: for each name its chains of ancestors, with the sequences of each.
        min_sequences: the fewest that make a class.
    """
    classes: Counter[Lineage] = Counter()
    several = {}
    for name, found in chains.items():
        merged = _merge(found)
        classes.update({(*chain, name): count for chain, count in merged.items()})
        if len(merged) > 1:
            several[name] = tuple(sorted(merged, key=_sortable))
    enough = [chain for chain, count in classes.items() if count >= min_sequences]
    enough.sort(key=_sortable)
    return {chain: classes[chain] for chain in enough}, several


def _sortable(lineage: Lineage) -> tuple[str, ...]:
    return tuple(name or "" for name in lineage)


def _merge(chains: Counter[Lineage]) -> Counter[Lineage]:
    """Merge chains of ancestors that differ only in unknown ranks; counts add up."""
    merged: Counter[Lineage] = Counter()
    # Most complete first, then most frequent, then by name, so that the order is stable.
    order = sorted(chains, key=lambda c: (-sum(map(bool, c)), -chains[c], _sortable(c)))
    for chain in order:
        fitting = [other for other in merged if compatible(chain, other)]
        if not fitting:
            merged[chain] = chains[chain]
            continue
        best = max(fitting, key=lambda other: (merged[other], _sortable(other)))
        joined = tuple(a or b for a, b in zip(best, chain, strict=True))
        count = merged.pop(best) + chains[chain]
        merged[joined] += count
    return merged
