"""The loss: cross-entropy at each rank over the rows known there, weighted by rank."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

RANK_WEIGHTS = (2.0, 1.8, 1.5, 1.2, 1.0, 0.8, 0.6)
"""Kingdom to species."""


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
    parents: Sequence[torch.Tensor] | None = None,
    consistency: float = 0.0,
) -> RankLoss:
    """Rank-weighted cross-entropy.

    total = sum of w_r * L_r over the ranks with a known row / sum of their w_r, where L_r is the
    sum of cross-entropies at rank r / rows known there. Unknown ranks do not change the scale.

    Args:
        logits: for each rank (rows, classes), float32.
        labels: (rows, 7), -1 where unknown.
        known: (7,) rows known at each rank in the whole batch, where `labels` are only this
            process's part of it; None counts `labels`.
        weights: one a rank.
        label_smoothing: share of the target spread over all classes.
        log_priors: for each rank (classes,): added to the logits in training, so that rare classes
            are not forgotten.
        parents: for each rank (classes,) the class above, -1 where unknown; for `consistency`.
        consistency: weight of a term that draws ranks together: see `rank_disagreement`.

    Reference: logit adjustment after Menon et al. (2021), https://arxiv.org/abs/2007.07314
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
    parents: Sequence[torch.Tensor],
) -> torch.Tensor:
    """How far each rank's head is from what the head below it says of the same rank.

    The mean over the ranks but the lowest of KL(p_r || q_r): p_r is the head's distribution,
    q_r(c) the sum of the next head's probabilities over the children of c. Rows count where the
    child is known. It is 0 where all heads agree.
    """
    terms = []
    for rank in range(1, len(logits)):
        parent = parents[rank]
        if not len(parent):
            continue
        upper = torch.log_softmax(logits[rank - 1], -1)
        children = torch.softmax(logits[rank], -1) * (parent >= 0)
        implied = torch.zeros_like(upper).index_add(1, parent.clamp(min=0), children)
        implied = implied / implied.sum(-1, keepdim=True).clamp(min=1e-6)
        distance = (upper.exp() * (upper - implied.clamp(min=1e-6).log())).sum(-1)
        counted = torch.where(labels[:, rank] >= 0, distance, 0.0).sum()
        terms.append(counted / known[rank].clamp(min=1))
    return torch.stack(terms).mean() if terms else torch.zeros((), device=labels.device)
