"""The heads of a fine-tuned model beside the votes of the references.

Input: vectors of the model's encoder. Output: a path through the whole tree, from the heads alone
or from heads and votes together; on request the best class of each head by itself. Invariants: the
classes are nodes of the tree, so heads that decide together never contradict each other; a model
whose names the reference does not know is refused.

Probabilities are softened by a temperature for each rank, fitted on sequences that the model was
not trained on.

Reference: Guo et al. (2017), https://arxiv.org/abs/1706.04599
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..errors import ModelError
from ..reads.labels import UNKNOWN, LabelSpace
from ..reads.lineages import RANKS, Lineage
from ..training.heldout import HELDOUT, HeldOut, read_heldout
from .decoding import best_path, make_levels, score_paths
from .evidence import Decision
from .tree import LineageTree

HEAD_SHARE = 0.3
"""Weight of the heads where they decide together with the votes.

On 12S of fishes (tests/bench/naming.py, seed 31) 0.1 and 0.3 name as many genera and species right;
0.5 and 0.7 lose 2 and 6 points at species.
"""

_COMPARED = RANKS[3:]
_FEWEST_HELD_OUT = 50
_MOST_FOR_TEMPERATURE = 1000


@dataclass(frozen=True)
class Heads:
    """Seven linear heads behind a LayerNorm each.

    Attributes:
        labels: the classes of each rank.
        layers: for each rank the LayerNorm's weight and bias, and the linear weight and bias.
        temperatures: by which the logits of each rank are divided.
        heldout: sequences that the model was not trained on; None in folders without any.
        content_hash: of the weights.
    """

    labels: LabelSpace
    layers: tuple[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray], ...]
    temperatures: tuple[float, ...] = (1.0,) * len(RANKS)
    heldout: HeldOut | None = None
    content_hash: str = ""

    def logits(self, vectors: np.ndarray) -> list[np.ndarray]:
        """For each rank (sequences, classes), of vectors (sequences, hidden)."""
        centred = vectors - vectors.mean(1, keepdims=True)
        unit = centred / np.sqrt((centred**2).mean(1, keepdims=True) + 1e-5)
        return [
            ((unit * scale + shift) @ weight.T + bias)[:, :count]
            for (scale, shift, weight, bias), count in zip(
                self.layers, self.labels.num_classes, strict=True
            )
        ]

    def probabilities(self, vectors: np.ndarray) -> list[np.ndarray]:
        """For each rank (sequences, classes), of vectors (sequences, hidden)."""
        return [
            softmax(values / temperature)
            for values, temperature in zip(self.logits(vectors), self.temperatures, strict=True)
        ]

    def lineages(self) -> list[Lineage]:
        """All classes as lineages, by rank, in their order."""
        nothing: Lineage = (None,) * len(RANKS)
        chains = [tuple(chain) for classes in self.labels.lineages for chain in classes]
        return [(*chain, *nothing[len(chain) :]) for chain in chains]


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities of the last axis, which may be empty."""
    if not logits.shape[-1]:
        return logits
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    return shares / shares.sum(-1, keepdims=True)


def fit_temperature(logits: np.ndarray, truth: np.ndarray) -> float:
    """The temperature under which the true classes are most likely; 1 without any.

    Args:
        logits: (sequences, classes).
        truth: (sequences,) class numbers; those below 0 do not count.
    """
    from scipy.optimize import minimize_scalar

    rows = np.flatnonzero(truth >= 0)
    if len(rows) < _FEWEST_HELD_OUT or logits.shape[1] < 2:
        return 1.0
    logits, truth = logits[rows], truth[rows]

    def loss(log_temperature: float) -> float:
        shares = softmax(logits / np.exp(log_temperature))[np.arange(len(truth)), truth]
        return float(-np.log(np.maximum(shares, 1e-30)).mean())

    return float(np.exp(minimize_scalar(loss, bounds=(-3.0, 3.0), method="bounded").x))


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
    heads = Heads(
        labels,
        layers,  # type: ignore[arg-type]
        heldout=read_heldout(Path(folder)),
        content_hash=_hash(Path(folder)),
    )
    if heads.heldout is None or heads.heldout.vectors.shape[1:] != layers[0][0].shape:
        return replace(heads, heldout=None)
    some = slice(0, None, -(-len(heads.heldout.vectors) // _MOST_FOR_TEMPERATURE))
    logits = heads.logits(heads.heldout.vectors[some])
    fitted = zip(logits, heads.heldout.classes[some].T, strict=True)
    return replace(heads, temperatures=tuple(fit_temperature(*pair) for pair in fitted))


def _hash(folder: Path) -> str:
    """Of the heads, their classes, and what they are calibrated on."""
    digest = hashlib.sha256()
    for name in ("heads.safetensors", "labels.json", HELDOUT):
        if (folder / name).is_file():
            digest.update((folder / name).read_bytes())
    return digest.hexdigest()


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

    def __init__(
        self,
        tree: LineageTree,
        nameless: Sequence[np.ndarray],
        class_leaves: np.ndarray,
        num_classes: Sequence[int],
    ):
        """Find the node of each class.

        Args:
            tree: of the reference's lineages and `Heads.lineages`.
            nameless: for each rank `tree.nameless(rank)`.
            class_leaves: leaf of each of `Heads.lineages`.
            num_classes: of each rank.
        """
        self.tree, self._levels = tree, make_levels(tree.paths, nameless)
        self._class_leaves, self._num_classes = class_leaves, num_classes

    def decide(
        self, shares: Sequence[np.ndarray], leaves: np.ndarray, votes: np.ndarray | None
    ) -> Decision:
        """The best path.

        Args:
            shares: for each rank (classes,), from `Heads.probabilities`.
            leaves: (hits,) leaf of each hit.
            votes: (ranks, hits), or None for the heads alone.
        """
        by_head = self._of_nodes(shares)
        scores = [score_paths(*pair) for pair in zip(self._levels, by_head, strict=True)]
        agreement_of = by_head
        if votes is not None and len(leaves):
            agreement_of = [
                np.bincount(self.tree.paths[leaves, rank], votes[rank], minlength=len(values))
                for rank, values in enumerate(by_head)
            ]
            scores = [
                HEAD_SHARE * score + (1 - HEAD_SHARE) * score_paths(level, values)
                for score, level, values in zip(scores, self._levels, agreement_of, strict=True)
            ]
        best, equal = best_path(self._levels, scores)
        path = self.tree.paths[best]
        return Decision(
            path,
            best,
            _along(agreement_of, path),
            tuple(equal.tolist()),
            _along(by_head, path),
        )

    def decide_apart(self, shares: Sequence[np.ndarray]) -> Decision:
        """The best class of each head by itself; the names may contradict each other.

        A rank whose head has no class has no name.
        """
        by_head = self._of_nodes(shares)
        path = np.full(len(RANKS), UNKNOWN)
        for rank, (level, values) in enumerate(zip(self._levels, by_head, strict=True)):
            values = np.where(level.named, values, 0.0)
            if values.any():
                path[rank] = values.argmax()
        named = path != UNKNOWN
        agreeing = np.flatnonzero((self.tree.paths[:, named] == path[named]).all(1))
        leaf = int(agreeing[0]) if len(agreeing) else -1
        share = _along(by_head, path)
        return Decision(path, leaf, share, tuple(agreeing[:1].tolist()), share)

    def without(self, shares: Sequence[np.ndarray], rank: int, node: int) -> list[np.ndarray]:
        """What the heads would say if they did not have a taxon and what is below it."""
        result, first = [], 0
        for at, share in enumerate(shares):
            of_class = self._class_leaves[first : first + len(share)]
            first += len(share)
            gone = (of_class >= 0) & (self.tree.paths[of_class, rank] == node)
            left = np.where(gone, 0.0, share) if at >= rank else share
            result.append(left / max(left.sum(), 1e-12))
        return result

    def class_nodes(self, rank: int) -> np.ndarray:
        """Nodes of the classes of a rank, those that are in the tree."""
        first = sum(self._num_classes[:rank])
        leaves = self._class_leaves[first : first + self._num_classes[rank]]
        return self.tree.paths[leaves[leaves >= 0], rank]

    def nodes(self, classes: np.ndarray) -> np.ndarray:
        """Nodes of class numbers, (sequences, ranks); numbers below 0 are kept."""
        result, first = classes.copy(), 0
        for rank in range(len(RANKS)):
            of_rank = np.flatnonzero(classes[:, rank] >= 0)
            leaves = self._class_leaves[first + classes[of_rank, rank]]
            result[of_rank, rank] = np.where(leaves >= 0, self.tree.paths[leaves, rank], UNKNOWN)
            first += self._num_classes[rank]
        return result

    def _of_nodes(self, shares: Sequence[np.ndarray]) -> list[np.ndarray]:
        """For each rank the probability of each node."""
        result, first = [], 0
        for rank, (level, share) in enumerate(zip(self._levels, shares, strict=True)):
            of_class = self._class_leaves[first : first + len(share)]
            first += len(share)
            here = self.tree.paths[of_class, rank]
            known = of_class >= 0
            result.append(np.bincount(here[known], share[known], minlength=len(level.nodes)))
        return result


def _along(values_of: Sequence[np.ndarray], path: np.ndarray) -> np.ndarray:
    pairs = zip(values_of, path, strict=True)
    return np.array([values[node] if node != UNKNOWN else 0.0 for values, node in pairs])
