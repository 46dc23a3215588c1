"""The loss of fine-tuning: cross-entropy at each rank, weighted by rank.

    total = sum_r w_r L_r / sum_r w_r  +  consistency * D,

over the ranks r with a known row, where L_r is the mean cross-entropy of the rows known at r and D
is `rank_disagreement`. Dividing by the weights in use keeps the scale when a rank is unknown.

Input: logits and class numbers of a batch. Output: a `RankLoss`.
Invariants: a row that is unknown at a rank has no gradient there; the parts of a batch add up to
the whole.

Reference: label smoothing, Szegedy et al. (2016), https://doi.org/10.1109/CVPR.2016.308; logit
    adjustment, Menon et al. (2021), https://arxiv.org/abs/2007.07314; heads at every level, with
    a loss weight for each, as in B-CNN, Zhu and Bain (2017), https://arxiv.org/abs/1709.09890.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..options.training import RANK_WEIGHTS
from ..reads.labels import LabelSpace, nearest_rank


@dataclass(frozen=True)
class ParentLink:
    """Two ranks of which some class of the lower has its nearest known ancestor in the upper.

    Attributes:
        upper: rank of the ancestors.
        lower: rank of the classes.
        ancestor: (classes of lower,) int64, each one's class at `upper`, -1 where unknown.
        nearest: (classes of lower,) bool, True where that is the nearest known ancestor.
    """

    upper: int
    lower: int
    ancestor: torch.Tensor
    nearest: torch.Tensor


def parent_links(labels: LabelSpace, device: torch.device | str = "cpu") -> list[ParentLink]:
    """The links of a label space, on the device; one for each pair of neighbouring ranks.

    A lineage with a name missing in the middle adds a link that spans the gap.
    """
    links = []
    for lower, table in enumerate(labels.ancestors()):
        nearest = nearest_rank(table)
        links += [
            ParentLink(
                upper,
                lower,
                torch.from_numpy(table[:, upper].copy()).to(device),
                torch.from_numpy(nearest == upper).to(device),
            )
            for upper in range(lower)
            if (nearest == upper).any()
        ]
    return links


@dataclass(frozen=True)
class RankLoss:
    """A loss and its parts, on the device.

    Attributes:
        total: scalar.
        per_rank: (7,), mean cross-entropy over the known rows; 0 where none is known.
        known: (7,), rows known at each rank.
    """

    total: torch.Tensor
    per_rank: torch.Tensor
    known: torch.Tensor


def rank_loss(
    logits: Sequence[torch.Tensor],
    labels: torch.Tensor,
    known: torch.Tensor | None = None,
    *,
    weights: Sequence[float] = RANK_WEIGHTS,
    label_smoothing: float = 0.0,
    log_priors: Sequence[torch.Tensor] | None = None,
    parents: Sequence[ParentLink] | None = None,
    consistency: float = 0.0,
) -> RankLoss:
    """Cross-entropy weighted by rank; see the formula at the top of this file.

    Args:
        logits: for each rank (rows, classes), float32.
        labels: (rows, 7), -1 where unknown.
        known: (7,) rows known at each rank in the whole batch, where `labels` are only this
            process's part of it; None counts `labels`.
        weights: one a rank.
        label_smoothing: share of the target spread over all classes.
        log_priors: for each rank (classes,), added to the logits in training, so that rare classes
            are not forgotten.
        parents: what `parent_links` gave; needed for `consistency`.
        consistency: weight of `rank_disagreement`.
    """
    if known is None:
        known = (labels >= 0).sum(0)
    sums = []
    for rank, values in enumerate(logits):
        if log_priors is not None:
            values = values + log_priors[rank]
        target = labels[:, rank]
        losses = F.cross_entropy(
            values, target.clamp(min=0), reduction="none", label_smoothing=label_smoothing
        )
        sums.append(torch.where(target >= 0, losses, 0.0).sum())
    per_rank = torch.stack(sums) / known.clamp(min=1)
    rank_weights = torch.tensor(weights, device=labels.device, dtype=torch.float32)
    rank_weights = torch.where(known > 0, rank_weights, 0.0)
    total = (rank_weights * per_rank).sum() / rank_weights.sum().clamp(min=1e-6)
    if consistency and parents is not None:
        total = total + consistency * rank_disagreement(logits, labels, known, parents)
    return RankLoss(total, per_rank.detach(), known)


def rank_disagreement(
    logits: Sequence[torch.Tensor],
    labels: torch.Tensor,
    known: torch.Tensor,
    parents: Sequence[ParentLink],
) -> torch.Tensor:
    """How far each head is from what the head of a lower rank implies for its rank.

    A row counts at each rank r where it is known, against the rank q of its class's nearest known
    ancestor: KL(p_q || p_r -> q), where p_q is the distribution of head q and (p_r -> q)(c) the
    sum of head r's probabilities over the descendants of c, scaled to sum to one. The result is
    the mean over the rows of a rank, then over the ranks; 0 where all heads agree.

    Args:
        logits: for each rank (rows, classes).
        labels: (rows, 7), -1 where unknown.
        known: (7,) rows known at each rank in the whole batch.
        parents: what `parent_links` gave.
    """
    if not parents:
        return torch.zeros((), device=labels.device)
    sums: dict[int, torch.Tensor] = {}
    for link in parents:
        upper = torch.log_softmax(logits[link.upper], -1)
        below = torch.softmax(logits[link.lower], -1) * (link.ancestor >= 0)
        implied = torch.zeros_like(upper).index_add(1, link.ancestor.clamp(min=0), below)
        implied = implied / implied.sum(-1, keepdim=True).clamp(min=1e-6)
        distance = (upper.exp() * (upper - implied.clamp(min=1e-6).log())).sum(-1)
        target = labels[:, link.lower]
        counted = (target >= 0) & link.nearest[target.clamp(min=0)]
        part = torch.where(counted, distance, 0.0).sum() / known[link.lower].clamp(min=1)
        sums[link.lower] = sums[link.lower] + part if link.lower in sums else part
    return torch.stack(list(sums.values())).mean()
