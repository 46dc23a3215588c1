"""What a fine-tuned model's folder tells people: model card, curves, confusion."""

import csv
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..reads.labels import UNKNOWN, LabelSpace
from ..reads.lineages import RANKS
from .options import FinetuneConfig

_LICENCES = {"InstaDeepAI/nucleotide-transformer": "cc-by-nc-sa-4.0"}
_MOST_CLASSES = 30


def write_card(
    folder: Path,
    config: FinetuneConfig,
    labels: LabelSpace,
    evaluation: Mapping[str, float],
    facts: Mapping[str, Any],
) -> None:
    """Write `README.md` in the Hub's model card format."""
    licence = next(
        (name for prefix, name in _LICENCES.items() if config.model.startswith(prefix)), "other"
    )
    rows = [
        f"| {rank} | {labels.num_classes[number]} | "
        + " | ".join(
            _figure(evaluation.get(f"{rank}/{key}"))
            for key in ("accuracy", "macro_f1", "top3", "calibration_error")
        )
        + " |"
        for number, rank in enumerate(RANKS)
    ]
    (folder / "README.md").write_text(
        f"""---
base_model: {config.model}
library_name: peft
license: {licence}
tags: [biology, genomics, environmental-dna, taxonomy, lora]
---

# Taxonomy adapter for {config.model}

A LoRA adapter (r {config.rank}, alpha {config.alpha}, on
{", ".join(config.targets)}) and seven heads that name the kingdom, phylum,
class, order, family, genus and species of DNA sequences.

Trained on {facts["train"]:,} sequences for {facts["epochs"]} epochs; evaluated on
{facts["eval"]:,} others. {facts["trainable"]:,} of {facts["parameters"]:,} parameters were trained.

| rank | classes | accuracy | macro-F1 | top-3 | calibration error |
|---|---|---|---|---|---|
{chr(10).join(rows)}

Wrong ranks a sequence: {_figure(evaluation.get("hierarchical_distance"))}. Lineages whose ranks
contradict each other: {_figure(evaluation.get("inconsistent"))}. Figures are shares of the
evaluation sequences whose truth is known at the rank; classes with fewer than
{config.min_sequences} training sequences were not learned.

## Use

```python
import bioscan_xla

classifier = bioscan_xla.load_classifier("{config.output}")
```

`python -m bioscan_xla.embed --adapter {config.output} ...` makes vectors with it.

## Licence

The base model's licence holds for what is derived from it (CC BY-NC-SA 4.0 for Nucleotide
Transformer: no commercial use, share alike).
""",
        encoding="utf-8",
    )


def _figure(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.3f}"


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
        shown = np.sort(classes[np.argsort(-counts)[:_MOST_CLASSES]])
        matrix = np.array(
            [
                [np.sum((truth[:, rank] == a) & (predicted[:, rank] == b)) for b in shown]
                for a in shown
            ],
            float,
        ).reshape(len(shown), len(shown))
        totals = np.array([np.sum(truth[:, rank] == a) for a in shown], float)
        if len(shown):
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
    """Write which taxa are taken for which, most often first, as CSV."""
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
    """Vectors on their first two principal components, coloured by phylum, as PNG."""
    plt = _pyplot()
    centred = vectors - vectors.mean(0)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    plane = centred @ axes[:2].T
    figure, axis = plt.subplots(figsize=(7, 6), layout="constrained")
    for number in np.unique(phylum):
        at = phylum == number
        label = "unknown" if number == UNKNOWN else names[number]
        axis.scatter(plane[at, 0], plane[at, 1], s=9, label=label)
    axis.set(xlabel="first principal component", ylabel="second principal component")
    axis.legend(fontsize="small", markerscale=2)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
