"""The steps of fine-tuning: batches, updates, skipped updates, saving, counting.

Enters: a prepared model and data. Leaves: a trained model and lines of figures. Guaranteed: what
is summed is summed in the order of the steps, however often it is looked at, so that a resumed run
has the very figures of an uninterrupted one.
"""

import dataclasses
import logging
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ..embedding.tracking import TrainingTracker
from ..encode import hosts, runtime
from ..encode.encoder import forward_flops
from ..encode.packing import Batch
from ..errors import BioscanError
from ..options import FinetuneConfig
from ..options.training import LOWER_IS_BETTER
from ..reads.labels import LabelSpace
from ..reads.lineages import RANKS
from .checkpoint import Checkpoints, Cursor
from .classifier import initial_log_priors
from .data import Augmentation, Examples, make_batch, plan_epoch
from .folder import History
from .loss import parent_links, rank_loss

log = logging.getLogger(__name__)

_READ_STEPS = 20  # updates between looks at what the device has accumulated
_LOG_SECONDS = 60.0
_NOT_FINITE_IN_A_ROW = 3


class TrainingStopped(BioscanError, RuntimeError):
    """The gradient was not finite three times in a row."""


@dataclasses.dataclass(frozen=True)
class Data:
    """Split and labelled examples, and the label space learned from the training part."""

    train: Examples
    eval: Examples
    space: LabelSpace
    train_labels: np.ndarray
    eval_labels: np.ndarray
    split: list[tuple[str, str]]  # (id, part)
    conflicts: list[tuple[str, str, str, str]]  # (rank, name, id, lineage), of conflicting lineages


class _Rate:
    """How fast this process was since the last look."""

    def __init__(self, device: runtime.Device, encoder: torch.nn.Module) -> None:
        self._device, self._config = device, encoder.config
        self._begin()

    def _begin(self) -> None:
        self._since, self._sequences, self._tokens, self._squared = time.monotonic(), 0, 0, 0

    def add(self, batch: Batch) -> None:
        """Count a batch."""
        lengths = [len(window) for _, _, window in batch.places]
        self._sequences += len(lengths)
        self._tokens += batch.num_useful
        self._squared += sum(length**2 for length in lengths)

    def figures(self) -> dict[str, float]:
        """Rates and use of the device, and begin anew."""
        seconds = max(1e-9, time.monotonic() - self._since)
        result = {
            "train/sequences_per_second": self._sequences / seconds,
            "train/tokens_per_second": self._tokens / seconds,
        }
        config: Any = self._config
        if peak := runtime.peak_flops(self._device):
            forward = forward_flops(config, config.num_hidden_layers, self._tokens, self._squared)
            # Twice: the backward pass needs the gradients of activations, not of frozen weights.
            result["system/model_flop_utilisation"] = 2 * forward / seconds / peak
        if memory := runtime.memory_bytes(self._device):
            result["system/memory_gib"] = memory / 2**30
        self._begin()
        return result


class Loop:
    """One epoch after the other, from wherever the cursor stands."""

    def __init__(
        self,
        config: FinetuneConfig,
        device: runtime.Device,
        accelerator: Any,
        model: torch.nn.Module,
        optimizer: Any,
        scheduler: Any,
        cursor: Cursor,
        checkpoints: Checkpoints,
        tracker: TrainingTracker,
        data: Data,
        num_tokens: np.ndarray,
        max_tokens: int,
        history: History,
        evaluate: Callable[[], dict[str, float]],
    ):
        """Take the prepared parts; `evaluate` gives the figures, equal in all processes."""
        self.config, self.device, self.accelerator = config, device, accelerator
        self.model, self.optimizer, self.scheduler = model, optimizer, scheduler
        self.cursor, self.checkpoints, self.tracker = cursor, checkpoints, tracker
        self.data, self.num_tokens, self.max_tokens = data, num_tokens, max_tokens
        self.history, self.evaluate = history, evaluate
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.augmentation = Augmentation(config.reverse_complement, config.frame_shift, config.crop)
        self.log_priors = None
        if config.class_balance:
            priors = initial_log_priors(data.space, config.class_balance)
            self.log_priors = [prior.to(device.torch_device) for prior in priors]
        self.parents = None
        if config.consistency:
            self.parents = parent_links(data.space, device.torch_device)
        self.pending: list[tuple[torch.Tensor, int]] = []  # figures of a step, its sequences
        self.is_first = accelerator.is_main_process and device.process_index == 0
        self.rate = _Rate(device, accelerator.unwrap_model(model).encoder)
        self.bad_in_a_row = 0
        self.saved = time.monotonic()
        self.saved_at = -1

    def run_epoch(self, stop: Any) -> None:
        """Train to the end of the cursor's epoch, or until `stop` is set; either way saved."""
        config, cursor = self.config, self.cursor
        plan = plan_epoch(
            self.num_tokens, self.max_tokens, config.batch_size, config.seed, cursor.epoch
        )
        self.model.train()
        logged = time.monotonic()
        bar = tqdm(
            total=len(plan),
            initial=cursor.step,
            unit="batch",
            leave=False,
            desc=f"epoch {cursor.epoch + 1}/{config.num_epochs}",
            disable=None if self.is_first else True,
        )
        while cursor.step < len(plan):
            is_update = (cursor.step + 1) % config.accumulate == 0 or cursor.step + 1 == len(plan)
            self._step(*plan[cursor.step], is_update)
            cursor.step += 1
            bar.update()
            if not is_update:
                continue
            cursor.updates += 1
            if self.device.kind == "cpu" or cursor.updates % _READ_STEPS == 0:
                self._read()
            if cursor.loss_count:
                bar.set_postfix(loss=f"{cursor.loss_sum / cursor.loss_count:.3f}", refresh=False)
            if bar.disable and time.monotonic() - logged > _LOG_SECONDS:
                logged = time.monotonic()
                log.info("epoch %d: batch %d of %d", cursor.epoch + 1, cursor.step, len(plan))
            is_whole = cursor.step == len(plan)
            if config.eval_steps and cursor.updates % config.eval_steps == 0 and not is_whole:
                if self._judge(cursor.epoch + round(cursor.step / len(plan), 3)):
                    self.save(best=True)
                if self._enough():
                    break
                self.model.train()
            is_due = time.monotonic() - self.saved > 60 * config.checkpoint_minutes
            to_stop, is_due = self._in_any(stop.is_set(), is_due)
            if to_stop:
                stop.set()
                break
            if is_due:
                self.save()
        bar.close()
        if stop.is_set():
            self.save()

    def _in_any(self, *flags: bool) -> list[bool]:
        """Which are set in any process: all must save at the same step."""
        if self.accelerator.num_processes == 1:
            return hosts.in_any(self.device, list(flags))
        values = torch.tensor(flags, dtype=torch.float32, device=self.device.torch_device)
        return (self.accelerator.reduce(values, "sum") > 0).tolist()

    def _step(self, width: int, rows: np.ndarray, is_update: bool) -> None:
        config, accelerator = self.config, self.accelerator
        made = make_batch(
            self.data.train,
            self.data.train_labels,
            width,
            rows,
            kind=self.device.kind,
            batch_size=config.batch_size,
            num_devices=self.device.num_devices,
            max_tokens=self.max_tokens,
            augmentation=self.augmentation,
            seed=config.seed,
            epoch=self.cursor.epoch,
            process_index=accelerator.process_index,
            process_count=accelerator.num_processes,
        )
        batch = made.batch
        ids, positions, segments, labels = (
            runtime.put(self.device, array)
            for array in (batch.input_ids, batch.positions, batch.segments, made.labels)
        )
        known = torch.from_numpy(made.known).to(self.device.torch_device)
        if is_update or accelerator.num_processes == 1:
            self._backward(ids, positions, segments, labels, known, batch)
        else:
            with accelerator.no_sync(self.model):
                self._backward(ids, positions, segments, labels, known, batch)
        norm = self._update() if is_update else torch.zeros((), device=self.device.torch_device)
        self.pending.append((runtime.launch(self.device, self._figures(norm)), made.num_sequences))
        self.rate.add(batch)

    def _backward(
        self, ids: Any, positions: Any, segments: Any, labels: Any, known: Any, batch: Any
    ) -> None:
        config = self.config
        logits = self.model(ids, positions, segments, batch.num_segments, batch.runs)
        loss = rank_loss(
            logits,
            labels,
            known,
            weights=config.rank_weights,
            label_smoothing=config.label_smoothing,
            log_priors=self.log_priors,
            parents=self.parents,
            consistency=config.consistency,
        )
        # Each process has a part of the sum; gradients are averaged over the processes.
        scale = self.accelerator.num_processes / config.accumulate
        self.accelerator.backward(loss.total * scale)
        self.last_loss = loss

    def _update(self) -> torch.Tensor:
        norm = torch.nn.utils.clip_grad_norm_(self.trained, self.config.max_grad_norm)
        if self.device.kind == "cpu":
            if torch.isfinite(norm):
                self.optimizer.step()
        else:
            self._step_where(torch.isfinite(norm))
        self.scheduler.step()
        self.optimizer.zero_grad()
        return norm.detach()

    def _figures(self, norm: torch.Tensor) -> torch.Tensor:
        """Loss, gradient norm and loss of each rank in one tensor: one fetch instead of nine."""
        loss = self.last_loss
        return torch.cat([loss.total.detach()[None], norm[None], loss.per_rank.detach()])

    @torch.no_grad()
    def _step_where(self, good: torch.Tensor) -> None:
        """Update where `good` holds, else change nothing; asking it would wait for the device."""
        state = [
            value
            for values in self.optimizer.state.values()
            for value in values.values()
            if torch.is_tensor(value) and value.device.type != "cpu"
        ]
        # State that this step makes anew begins at zero, which a gradient of zero leaves.
        for parameter in self.trained:
            parameter.grad = torch.where(good, parameter.grad, 0.0)  # type: ignore[arg-type]
        kept = [*self.trained, *state]
        before = [value.clone() for value in kept]
        self.optimizer.step()
        for value, old in zip(kept, before, strict=True):
            value.copy_(torch.where(good, value, old))

    def _read(self) -> None:
        """Fetch what the device has accumulated since the last look."""
        cursor = self.cursor
        fetched = [(runtime.fetch(figures), count) for figures, count in self.pending]
        self.pending.clear()
        for figures, count in fetched:
            loss, norm = figures[:2].tolist()
            if self.accelerator.num_processes > 1:  # each has the loss of its share
                loss = self.accelerator.reduce(torch.tensor(loss, device=self.device.torch_device))
            if math.isfinite(norm):
                self.bad_in_a_row = 0
                cursor.loss_sum += float(loss) * count
                cursor.loss_count += count
                continue
            cursor.skipped += 1
            self.bad_in_a_row += 1
            log.warning("update %d: the gradient is not finite and is left out", cursor.updates)
            if self.bad_in_a_row >= _NOT_FINITE_IN_A_ROW:
                raise TrainingStopped(
                    f"the gradient was not finite {self.bad_in_a_row} times in a row; the last "
                    f"good checkpoint is {self.checkpoints.latest()}. Lower --learning-rate"
                )
        if fetched and self.tracker.is_on:
            loss, norm, *per_rank = fetched[-1][0].tolist()
            line = {
                "train/loss": loss,
                "train/gradient_norm": norm,
                "train/learning_rate": self.scheduler.get_last_lr()[0],
                "system/compiles": runtime.counters(self.device)["compiles"],
                **self.rate.figures(),
            }
            ranks = zip(RANKS, per_rank, strict=True)
            line |= {f"train/{rank}/loss": value for rank, value in ranks}
            self.tracker.log(line, cursor.updates)

    def save(self, best: bool = False) -> None:
        """Save a checkpoint of this moment."""
        self._read()
        self.checkpoints.save(self.cursor.updates, best)
        self.saved = time.monotonic()

    def end_epoch(self) -> None:
        """Evaluate, write the epoch's line, decide whether it was the best or the last."""
        self._read()
        cursor = self.cursor
        is_best = self._judge(cursor.epoch + 1)
        cursor.losses = [*cursor.losses, cursor.loss_sum / max(1, cursor.loss_count)]
        cursor.epoch += 1
        cursor.step, cursor.loss_sum, cursor.loss_count = 0, 0.0, 0
        cursor.finished = cursor.epoch >= self.config.num_epochs or self._enough()
        self.save(best=is_best)

    def _judge(self, epoch: float) -> bool:
        """Evaluate and write a line; whether it is the best so far."""
        self._read()
        cursor = self.cursor
        figures = self.evaluate()
        loss = cursor.loss_sum / max(1, cursor.loss_count)
        line = {
            "epoch": epoch,
            "updates": cursor.updates,
            "train/loss": loss,
            "system/compiles": runtime.counters(self.device)["compiles"],
            **{f"valid/{key}": value for key, value in figures.items()},
        }
        if self.accelerator.is_main_process:
            self.history.add(line)
            log.info("epoch %g: loss %.4f%s", epoch, loss, _accuracies(figures))
        self.tracker.log(line, cursor.updates)
        value = figures.get(self.config.monitor, math.nan)
        if self.config.monitor.endswith(LOWER_IS_BETTER):
            value = -value
        is_best = value > cursor.best
        cursor.best = value if is_best else cursor.best
        cursor.stale = 0 if is_best else cursor.stale + 1
        return is_best

    def _enough(self) -> bool:
        patience = self.config.patience
        return patience is not None and self.cursor.stale >= patience


def _accuracies(figures: dict[str, float]) -> str:
    found = [
        f"{rank} {figures[f'{rank}/accuracy']:.3f}"
        for rank in RANKS
        if f"{rank}/accuracy" in figures
    ]
    return f"; accuracy {', '.join(found)}" if found else ""
