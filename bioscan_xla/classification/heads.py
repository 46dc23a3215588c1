"""The heads of a fine-tuned model beside the votes of the references.

Input: vectors of the model's encoder. Output: a path through the whole tree, from the heads alone
or from heads and votes together. Invariants: the classes are nodes of the tree, so heads never
contradict each other; a model whose names the reference does not know is refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import ModelError
from ..reads.labels import LabelSpace
from ..reads.lineages import RANKS, Lineage
from .decoding import best_path, make_levels, score_paths
from .evidence import Decision
from .tree import LineageTree

HEAD_SHARE = 0.3
"""Weight of the heads where they decide together with the votes; not tuned."""

_COMPARED = RANKS[3:]


@dataclass(frozen=True)
class Heads:
    """Seven linear heads behind a LayerNorm each.

    Attributes:
        labels: the classes of each rank.
        layers: for each rank the LayerNorm's weight and bias, and the linear weight and bias.
    """

    labels: LabelSpace
    layers: tuple[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray], ...]

    def probabilities(self, vectors: np.ndarray) -> list[np.ndarray]:
        """For each rank (sequences, classes), of vectors (sequences, hidden)."""
        centred = vectors - vectors.mean(1, keepdims=True)
        unit = centred / np.sqrt((centred**2).mean(1, keepdims=True) + 1e-5)
        result = []
        for (scale, shift, weight, bias), count in zip(
            self.layers, self.labels.num_classes, strict=True
        ):
            logits = ((unit * scale + shift) @ weight.T + bias)[:, :count]
            shares = np.exp(logits - logits.max(1, keepdims=True)) if count else logits
            result.append(shares / shares.sum(1, keepdims=True) if count else shares)
        return result

    def lineages(self) -> list[Lineage]:
        """All classes as lineages, by rank, in their order."""
        nothing: Lineage = (None,) * len(RANKS)
        chains = [tuple(chain) for classes in self.labels.lineages for chain in classes]
        return [(*chain, *nothing[len(chain) :]) for chain in chains]


def load_heads(folder: str) -> Heads:
    """Load the heads of a fine-tuned model; ModelError where a file is missing or does not fit."""
    from safetensors.numpy import load_file

    labels = LabelSpace.load(Path(folder) / "labels.json")
    values = load_file(Path(folder) / "heads.safetensors")
    names = ("0.weight", "0.bias", "2.weight", "2.bias")
    try:
        layers = tuple(
            tuple(values[f"{rank}.{name}"].astype(np.float32) for name in names) for rank in RANKS
        )
    except KeyError as error:
        raise ModelError(
            f"{folder}: heads.safetensors has no {error}; name the output folder of fine-tuning"
        ) from error
    for rank, layer, count in zip(RANKS, layers, labels.num_classes, strict=True):
        if len(layer[3]) != max(1, count):
            raise ModelError(
                f"{folder}: the head of {rank} has {len(layer[3])} classes and labels.json "
                f"{count}; the folder is mixed from two runs"
            )
    return Heads(labels, layers)  # type: ignore[arg-type]


def check_names(heads: Heads, lineages: Sequence[Lineage], model: str, reference: str) -> None:
    """Refuse a model that shares no name with the reference from order down."""
    first = []
    for name in _COMPARED:
        rank = RANKS.index(name)
        ours = set(heads.labels.names(rank))
        theirs = {text for row in lineages if (text := row[rank])}
        if ours & theirs:
            return
        if ours and theirs:
            first.append(f"  {name}: the model knows {min(ours)!r}, the reference {min(theirs)!r}")
    raise ModelError(
        f"{model}: its heads share no name with the reference {reference}:\n"
        + "\n".join(first)
        + "\nTake the model and the reference of one marker and taxonomy, or --method neighbours"
    )


class HeadDecoder:
    """The whole tree, ready for the heads' probabilities."""

    def __init__(self, tree: LineageTree, nameless: Sequence[np.ndarray], class_leaves: np.ndarray):
        """Find the node of each class.

        Args:
            tree: of the reference's lineages and `Heads.lineages`.
            nameless: for each rank `tree.nameless(rank)`.
            class_leaves: leaf of each of `Heads.lineages`.
        """
        self.tree, self._levels = tree, make_levels(tree.paths, nameless)
        self._class_leaves = class_leaves

    def decide(
        self, shares: Sequence[np.ndarray], leaves: np.ndarray, votes: np.ndarray | None
    ) -> Decision:
        """The best path.

        Args:
            shares: for each rank (classes,), from `Heads.probabilities`.
            leaves: (hits,) leaf of each hit.
            votes: (ranks, hits), or None for the heads alone.
        """
        scores, agreement_of = [], []
        first = 0
        for rank, (level, share) in enumerate(zip(self._levels, shares, strict=True)):
            of_class = self._class_leaves[first : first + len(share)]
            first += len(share)
            size = len(level.nodes)
            here = self.tree.paths[of_class, rank]
            values = np.bincount(here[of_class >= 0], share[of_class >= 0], minlength=size)
            score = score_paths(level, values)
            if votes is not None and len(leaves):
                values = np.bincount(self.tree.paths[leaves, rank], votes[rank], minlength=size)
                score = HEAD_SHARE * score + (1 - HEAD_SHARE) * score_paths(level, values)
            scores.append(score)
            agreement_of.append(values)
        best, equal = best_path(self._levels, scores)
        path = self.tree.paths[best]
        agreement = np.array(
            [values[node] for values, node in zip(agreement_of, path, strict=True)]
        )
        return Decision(path, best, agreement, tuple(equal.tolist()))
