"""The training step: the one function that the loop runs and the planner traces.

Input: a `Learner` and one batch. Output: the figures of the step, still on the device.
Invariants: nothing here waits for the device; an update whose gradient is not finite changes no
weight.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..encode import runtime
from ..options import FinetuneConfig
from .batches import TrainingBatch
from .loss import ParentLink, rank_loss


@dataclass(frozen=True)
class Learner:
    """What a step computes with.

    Attributes:
        config: options of the run.
        device: where it computes.
        model: the classifier, or what exchanges its gradients between processes.
        optimizer: of the parameters that are trained.
        trained: these parameters.
        log_priors: see `loss.rank_loss`.
        parents: see `loss.rank_loss`.
        num_processes: processes that share each batch.
    """

    config: FinetuneConfig
    device: runtime.Device
    model: Any
    optimizer: Any
    trained: list[nn.Parameter]
    log_priors: Sequence[torch.Tensor] | None = None
    parents: Sequence[ParentLink] | None = None
    num_processes: int = 1


def train_step(
    learner: Learner, made: TrainingBatch, *, share: float = 1.0, is_update: bool = True
) -> torch.Tensor:
    """Forward, loss, backward; with the last batch of a group also clip and update.

    Args:
        learner: what is trained.
        made: this process's part of the batch.
        share: of this batch's gradient in the update: one over the batches of its group.
        is_update: the batch is the last of its group.

    Returns:
        (9,) float32: loss, gradient norm (0 without an update), loss of each rank.
    """
    config, device, batch = learner.config, learner.device, made.batch
    ids, positions, segments, labels = (
        runtime.put(device, array)
        for array in (batch.input_ids, batch.positions, batch.segments, made.labels)
    )
    known = torch.from_numpy(made.known).to(device.torch_device)
    # Several processes exchange the gradients of a group once, with its last batch.
    waits = not is_update and learner.num_processes > 1
    with learner.model.no_sync() if waits else nullcontext():
        logits = learner.model(
            ids, positions, segments, batch.num_segments, batch.runs, frames=made.frames
        )
        loss = rank_loss(
            logits,
            labels,
            known,
            weights=config.rank_weights,
            label_smoothing=config.label_smoothing,
            log_priors=learner.log_priors,
            parents=learner.parents,
            consistency=config.consistency,
        )
        # Each process has a part of the sum; gradients are averaged over the processes.
        (loss.total * (learner.num_processes * share)).backward()
    norm = torch.zeros((), device=device.torch_device)
    if is_update:
        norm = nn.utils.clip_grad_norm_(learner.trained, config.max_grad_norm).detach()
        _update_where(torch.isfinite(norm), learner)
        learner.optimizer.zero_grad()
    return torch.cat([loss.total.detach()[None], norm[None], loss.per_rank])


@torch.no_grad()
def _update_where(good: torch.Tensor, learner: Learner) -> None:
    """Update if `good`, else change nothing; testing it on the host would wait for the device."""
    if learner.device.kind == "cpu":
        if good:
            learner.optimizer.step()
        return
    # New optimizer state starts at zero, and a zero gradient leaves it there.
    for parameter in learner.trained:
        parameter.grad = torch.where(good, parameter.grad, 0.0)  # type: ignore[arg-type]
    kept = [*learner.trained, *device_state(learner.optimizer)]
    before = [value.clone() for value in kept]
    learner.optimizer.step()
    for value, old in zip(kept, before, strict=True):
        value.copy_(torch.where(good, value, old))


def device_state(optimizer: Any) -> list[torch.Tensor]:
    """The tensors of an optimizer's state that are not on the host."""
    return [
        value
        for values in optimizer.state.values()
        for value in values.values()
        if torch.is_tensor(value) and value.device.type != "cpu"
    ]


def make_optimizer(module: nn.Module, config: FinetuneConfig) -> torch.optim.Optimizer:
    """AdamW or SGD over what is trained; matrices decay, biases and norms do not."""
    trained = [p for p in module.parameters() if p.requires_grad]
    peak = {"lr": config.learning_rate, "initial_lr": config.learning_rate}  # for a scheduler
    matrices = {"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay}
    others = {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0}
    kind = torch.optim.SGD if config.optimizer == "sgd" else torch.optim.AdamW
    return kind([matrices | peak, others | peak])
