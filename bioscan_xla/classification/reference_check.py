"""Problems and gaps of a reference: suspected mislabels, shared barcodes, contradictions.

Input: a `Reference`. Output: `Problem` records, coverage by taxon, figures of lengths and N.
Invariants: nothing is changed; every suspicion comes with the ids and identities it rests on.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..reads.lineages import RANKS
from .alignment import align
from .kmers import KmerIndex, best_numbers
from .naming import in_threads
from .record import lineage_text
from .reference import Reference

_NEIGHBOURS = 5
_FEWEST_NEIGHBOURS = 2
_NEAR_IDENTITY = 0.95
_NEAR_OVERLAP = 0.7
_RANKS_JUDGED = range(RANKS.index("phylum"), RANKS.index("species"))
_SOLE_RANKS = (RANKS.index("family"), RANKS.index("genus"))


@dataclass(frozen=True)
class Problem:
    """A possible problem.

    Attributes:
        kind: `mislabel`, `shared_barcode` or `contradiction`.
        rank: the highest rank at which names disagree.
        sequence_ids: the references concerned; of a mislabel the suspect alone.
        labels: the names that disagree.
        evidence: in words.
    """

    kind: str
    rank: str
    sequence_ids: tuple[str, ...]
    labels: tuple[str, ...]
    evidence: str


def check_reference(reference: Reference) -> list[Problem]:
    """All problems, by kind and then from the highest rank down."""
    problems = [
        *find_contradictions(reference),
        *find_shared_barcodes(reference),
        *find_mislabels(reference),
    ]
    kinds = ("mislabel", "shared_barcode", "contradiction")
    return sorted(problems, key=lambda p: (kinds.index(p.kind), RANKS.index(p.rank)))


def find_contradictions(reference: Reference) -> Iterator[Problem]:
    """Names that lie under several sets of ancestors: homonyms, or lineages that contradict."""
    for conflict in reference.conflicts:
        yield Problem("contradiction", conflict.rank, (), (conflict.name,), str(conflict))


def find_shared_barcodes(reference: Reference) -> Iterator[Problem]:
    """Identical sequences under several names; the highest rank at which these differ."""
    groups: dict[str, list[int]] = defaultdict(list)
    for row, sequence in enumerate(reference.sequences):
        groups[sequence].append(row)
    for rows in groups.values():
        lineages = [reference.tree.lineage(reference.leaves[row]) for row in rows]
        for rank, name in enumerate(RANKS):
            labels = sorted({text for lineage in lineages if (text := lineage[rank])})
            if len(labels) > 1:
                yield Problem(
                    "shared_barcode",
                    name,
                    tuple(reference.ids[row] for row in rows),
                    tuple(labels),
                    f"{len(rows)} identical sequences of {len(reference.sequences[rows[0]])} bp",
                )
                break


def find_mislabels(reference: Reference) -> Iterator[Problem]:
    """References whose name disagrees with all near neighbours, which agree with each other.

    The only sequence of a genus or family, identical ones counted once, is not suspected for that
    rank: its nearest neighbours are of another one of necessity.
    """
    index = KmerIndex(reference.sequences)
    lineages = [reference.tree.lineage(leaf) for leaf in reference.leaves]
    distinct = set(zip(reference.sequences, lineages, strict=True))
    sizes = Counter((rank, lineage[: rank + 1]) for _, lineage in distinct for rank in _SOLE_RANKS)

    def suspect(row: int) -> Problem | None:
        problem = _suspect(reference, index, lineages, row)
        if problem is None:
            return None
        rank = RANKS.index(problem.rank)
        return None if sizes[rank, lineages[row][: rank + 1]] == 1 else problem

    found = in_threads(suspect, range(len(reference.ids)))
    yield from (problem for problem in found if problem is not None)


def _suspect(reference: Reference, index: KmerIndex, lineages: list, row: int) -> Problem | None:
    sequence = reference.sequences[row]
    near = [
        int(other)
        for other in best_numbers(index.scores(sequence), 4 * _NEIGHBOURS)
        if reference.sequences[other] != sequence
    ][:_NEIGHBOURS]
    rank = _rank_of_disagreement(lineages[row], [lineages[other] for other in near])
    if rank is None:
        return None  # most references: nothing is aligned
    hits = align(sequence, [reference.sequences[other] for other in near])
    kept = [hit for hit in hits if hit.identity >= _NEAR_IDENTITY and hit.overlap >= _NEAR_OVERLAP]
    rank = _rank_of_disagreement(lineages[row], [lineages[near[hit.number]] for hit in kept])
    if rank is None:
        return None
    others = Counter(lineages[near[hit.number]][rank] for hit in kept)
    seen = ", ".join(
        f"{reference.ids[near[hit.number]]} {100 * hit.identity:.1f} % "
        f"({lineage_text(lineages[near[hit.number]])})"
        for hit in kept
    )
    (label, _), *_ = others.most_common()
    return Problem(
        "mislabel",
        RANKS[rank],
        (reference.ids[row],),
        (str(lineages[row][rank]), str(label)),
        f"{lineage_text(lineages[row])}; near it: {seen}",
    )


def _rank_of_disagreement(own: tuple, others: list[tuple]) -> int | None:
    """The highest rank at which all others have one name, and it differs from its own."""
    for rank in _RANKS_JUDGED:
        names = [other[rank] for other in others if other[rank]]
        if own[rank] and len(names) >= _FEWEST_NEIGHBOURS:
            if own[rank] in names:
                continue
            if len(set(names)) == 1:
                return rank
    return None


def coverage(reference: Reference) -> list[dict[str, object]]:
    """For each taxon its sequences, distinct sequences, genera, species, and lengths."""
    rows: dict[tuple[int, int], list[int]] = defaultdict(list)
    for row, leaf in enumerate(reference.leaves):
        for rank, node in enumerate(reference.tree.paths[leaf]):
            if reference.tree.names[rank][node] is not None:
                rows[rank, int(node)].append(row)
    result: list[dict[str, object]] = []
    for (rank, node), members in sorted(rows.items()):
        paths = reference.tree.paths[reference.leaves[members]]
        lengths = [len(reference.sequences[row]) for row in members]
        result.append(
            {
                "rank": RANKS[rank],
                "taxon": reference.tree.names[rank][node],
                "sequences": len(members),
                "distinct": len({reference.sequences[row] for row in members}),
                "genera": _named(reference, paths[:, 5], 5),
                "species": _named(reference, paths[:, 6], 6),
                "median_length_bp": int(np.median(lengths)),
            }
        )
    return result


def _named(reference: Reference, nodes: np.ndarray, rank: int) -> int:
    return sum(reference.tree.names[rank][node] is not None for node in set(nodes.tolist()))


def figures(reference: Reference) -> dict[str, object]:
    """Counts, lengths and N of the whole reference."""
    lengths = np.array([len(text) for text in reference.sequences])
    unsure = np.array([text.count("N") for text in reference.sequences]) / lengths
    return {
        "sequences": len(lengths),
        "distinct sequences": len(set(reference.sequences)),
        "left out (no usable name)": reference.num_left_out,
        **{
            f"length, {share} %, bp": int(np.percentile(lengths, share))
            for share in (0, 5, 50, 95, 100)
        },
        "sequences with N": int((unsure > 0).sum()),
        "sequences with more than 1 % N": int((unsure > 0.01).sum()),
    }
