"""Tensors of several sites to those of one model.

Input: checked sites in their canonical order. Output: adapter and heads.
Invariants: sums are taken in float64 in the order of the sites' names, so that the result is the
same to the last bit in whatever order the sites were given.

A tensor is averaged by the sequences of the sites, and a head by those with a name at its rank.
Where every site shares the factor A, the average of B is the average of the products BA. The row of
a class in a head is averaged over the sites that have the class. Elsewhere it is only pushed down,
through the softmax, by every sequence of a site, and such pushes of many sites would drown what the
others learned of it.

So if each site takes one step of SGD from the same weights, and every sequence has a name at every
rank, the average is the step over the sequences of all sites; and in the row of a class it is the
step over the sequences of all sites that have the class.

Reference: federated averaging, McMahan et al. (2017), https://arxiv.org/abs/1602.05629; a frozen
    A, Sun et al. (2024), https://arxiv.org/abs/2403.12313; stacking, Wang et al. (2024),
    https://arxiv.org/abs/2409.05976
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from ..reads.lineages import RANKS
from .share import SiteModel

Tensors = dict[str, torch.Tensor]


def average_adapters(sites: Sequence[SiteModel]) -> Tensors:
    """The mean adapter; exact where all sites share A."""
    weights = np.array([site.sequences for site in sites], np.float64)
    return _average([site.adapter for site in sites], lambda name: weights)


def stack_adapters(sites: Sequence[SiteModel]) -> Tensors:
    """All adapters beside each other: the product is the mean of the sites' products.

    The rank is the sum of the ranks; alpha has to grow with it.
    """
    total = sum(site.sequences for site in sites)
    adapters = [site.adapter() for site in sites]
    result = {}
    for name in adapters[0]:
        is_a = ".lora_A" in name or ".lora_embedding_A" in name
        parts = [
            tensors[name].double() * (1.0 if is_a else site.sequences / total)
            for site, tensors in zip(sites, adapters, strict=True)
        ]
        result[name] = torch.cat(parts, 0 if is_a else 1).float().contiguous()
    return result


def class_weights(counts: np.ndarray, sequences: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights of the sites in the head of a rank: for the rows of its classes, and for the rest.

    Args:
        counts: (sites, classes) sequences of each class.
        sequences: (sites,) of each site, used where no name is known.

    Returns:
        (sites, classes) and (sites,).

    >>> class_weights(np.array([[3, 0], [2, 1]]), np.array([9, 9]))
    (array([[3., 0.],
           [3., 3.]]), array([3., 3.]))
    """
    known = counts.sum(1).astype(np.float64)
    if not known.any():
        known = sequences.astype(np.float64)
    by_class = np.where(counts > 0, known[:, None], 0.0)
    return np.where(by_class.any(0), by_class, known[:, None]), known


def average_heads(sites: Sequence[SiteModel]) -> Tensors:
    """The mean of each head, and of each class of it; see `class_weights`."""
    sequences = np.array([site.sequences for site in sites])
    weights = {
        rank: class_weights(np.stack([site.classes[number] for site in sites]), sequences)
        for number, rank in enumerate(RANKS)
    }

    def of(name: str) -> np.ndarray:
        rank, part = name.split(".", 1)
        by_class, by_site = weights[rank]
        return by_class if part.startswith("2.") and by_class.shape[1] else by_site

    return _average([site.heads for site in sites], of)


def _average(
    sources: Sequence[Callable[[], Tensors]], weights_of: Callable[[str], np.ndarray]
) -> Tensors:
    """Weighted means; one site's tensors are in memory at a time."""
    sums: dict[str, torch.Tensor] = {}
    for number, load in enumerate(sources):
        for name, tensor in load().items():
            weights = torch.from_numpy(weights_of(name))
            share = weights[number] / weights.sum(0)  # a number, or one for each row
            part = tensor.double() * share.view(*share.shape, *[1] * (tensor.ndim - share.ndim))
            sums[name] = sums[name] + part if name in sums else part
    return {name: value.float().contiguous() for name, value in sums.items()}
