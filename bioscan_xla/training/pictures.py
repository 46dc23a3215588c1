"""Pictures and tables of a fine-tuned model: curves, confusion, vectors.

Input: the history of a run, and predicted and true class numbers. Output: PNG and CSV files.
Invariants: drawing needs no display.
"""

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.decomposition import PCA

from ..reads.labels import UNKNOWN, LabelSpace
from ..reads.lineages import RANKS

_MOST_CLASSES = 30
_MOST_PHYLA = 10  # as many as matplotlib has colours


def draw_curves(path: Path, history: Sequence[Mapping[str, Any]]) -> None:
    """Loss and accuracy by epoch, as PNG."""
    plt = _pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    epochs = [line["epoch"] for line in history]
    left.plot(epochs, [line["train/loss"] for line in history], marker="o")
    left.set(xlabel="epoch", ylabel="training loss")
    for rank in RANKS:
        values = [line.get(f"valid/{rank}/accuracy", float("nan")) for line in history]
        right.plot(epochs, values, marker=".", label=rank)
    right.set(xlabel="epoch", ylabel="accuracy", ylim=(0, 1.02))
    right.legend(fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_confusion(
    path: Path, predicted: np.ndarray, truth: np.ndarray, labels: LabelSpace
) -> None:
    """Truth against prediction at each rank, its most frequent classes, as PNG."""
    plt = _pyplot()
    figure, axes = plt.subplots(2, 4, figsize=(18, 9), layout="constrained")
    for rank, axis in enumerate(axes.flat):
        if rank >= len(RANKS):
            axis.axis("off")
            continue
        known = truth[:, rank] != UNKNOWN
        classes, counts = np.unique(truth[known, rank], return_counts=True)
        most = np.sort(np.argsort(-counts, kind="stable")[:_MOST_CLASSES])
        shown, totals = classes[most], counts[most]
        if len(shown):
            matrix = np.zeros((len(shown), len(shown)))
            both = np.isin(truth[:, rank], shown) & np.isin(predicted[:, rank], shown)
            pairs = (np.searchsorted(shown, each[both, rank]) for each in (truth, predicted))
            np.add.at(matrix, tuple(pairs), 1)
            axis.imshow(matrix / totals[:, None], vmin=0, vmax=1, cmap="viridis")
        names = labels.names(rank)
        ticks = range(len(shown))
        axis.set_yticks(ticks, [names[n] for n in shown], fontsize=5)
        axis.set_xticks(ticks, [names[n] for n in shown], fontsize=5, rotation=90)
        axis.set_title(f"{RANKS[rank]} (share of each true class)", fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write_confusions(
    path: Path, predicted: np.ndarray, truth: np.ndarray, labels: LabelSpace, most: int = 100
) -> None:
    """Write which taxa are confused with which, most frequent first, as CSV."""
    pairs: Counter[tuple[int, int, int]] = Counter()
    for rank in range(len(RANKS)):
        wrong = (truth[:, rank] != UNKNOWN) & (predicted[:, rank] != truth[:, rank])
        found = zip(truth[wrong, rank].tolist(), predicted[wrong, rank].tolist(), strict=True)
        pairs.update((rank, *pair) for pair in found)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("rank", "truth", "predicted", "sequences"))
        for (rank, right, said), count in pairs.most_common(most):
            names = labels.names(rank)
            writer.writerow((RANKS[rank], names[right], names[said], count))


def draw_vectors(path: Path, vectors: np.ndarray, phylum: np.ndarray, names: Sequence[str]) -> None:
    """Vectors on their first two principal components, coloured by phylum, as PNG.

    The most frequent phyla have a colour, all others together grey. Fewer than two vectors are not
    drawn.
    """
    if min(vectors.shape) < 2:
        return
    plt = _pyplot()
    plane = PCA(2, random_state=0).fit_transform(vectors)
    found, counts = np.unique(phylum[phylum != UNKNOWN], return_counts=True)
    shown = np.sort(found[np.argsort(-counts, kind="stable")[:_MOST_PHYLA]])
    groups = [("unknown", phylum == UNKNOWN, "0.8")]
    groups.append(("other", (phylum != UNKNOWN) & ~np.isin(phylum, shown), "0.5"))
    groups += [(names[n], phylum == n, f"C{at}") for at, n in enumerate(shown)]
    figure, axis = plt.subplots(figsize=(7, 6), layout="constrained")
    for label, rows, colour in groups:
        if rows.any():
            axis.scatter(plane[rows, 0], plane[rows, 1], s=9, label=label, color=colour)
    axis.set(xlabel="first principal component", ylabel="second principal component")
    axis.legend(fontsize="small", markerscale=2)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
