"""The loop of fine-tuning: batches, updates, skipped updates, saving, counting.

Input: a `Run`. Output: a trained model and lines of figures.
Invariants: sums are taken in the order of the steps, however often they are read, so that a resumed
run has exactly the figures of an uninterrupted one.
"""

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import distributed
from tqdm import tqdm

from ..encode import hosts, runtime
from ..encode.encoder import forward_flops
from ..encode.packing import Batch
from ..errors import BioscanError
from ..options.training import LOWER_IS_BETTER
from ..reads.lineages import RANKS
from .batches import TrainingBatch, augmentation_of, find_shapes, make_batch, plan_epoch
from .evaluation import evaluate_part
from .setup import Run
from .step import train_step

log = logging.getLogger(__name__)

_READ_STEPS = 20  # updates between reads of what the device has accumulated
_LOG_SECONDS = 60.0
_NOT_FINITE_IN_A_ROW = 3


class TrainingStopped(BioscanError, RuntimeError):
    """The gradient was not finite three times in a row."""


@dataclass(frozen=True)
class _Update:
    """An update in progress, one entry per batch.

    Attributes:
        figures: what `train_step` gave, on the device; the last has the gradient norm.
        counts: sequences of each.
    """

    figures: list[torch.Tensor]
    counts: list[int]


class _Rate:
    """Speed of this process since the last report."""

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
        """Rates and use of the device; then resets."""
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
    """One epoch after the other, from the cursor on."""

    def __init__(self, run: Run):
        """Set up for a run."""
        self.run, self.config, self.device = run, run.config, run.device
        self.accelerator, self.cursor = run.accelerator, run.cursor
        config = run.config
        self.first_epoch = run.start.get("epochs", 0)
        self.augmentation = augmentation_of(config)
        self.shapes = None
        if run.device.kind == "xla":
            self.shapes = find_shapes(
                run.data.train,
                run.num_tokens,
                max_tokens=run.max_tokens,
                batch_size=config.batch_size,
                num_devices=run.device.num_devices,
                augmentation=self.augmentation,
                seed=config.seed,
                frames=config.frames_trained,
            )
        self.pending: list[_Update] = []
        self.group: Any = None
        if run.accelerator.num_processes > 1:  # through the hosts: no device waits
            self.group = distributed.new_group(backend="gloo")
        self.is_first = run.accelerator.is_main_process and run.device.process_index == 0
        self.rate = _Rate(run.device, run.classifier.encoder)
        self.bad_in_a_row = 0
        self.saved = time.monotonic()

    def run_epoch(self, stop: Any) -> None:
        """Train to the end of the cursor's epoch, or until `stop` is set; saves either way."""
        config, cursor = self.config, self.cursor
        drawn = self.first_epoch + cursor.epoch
        plan = plan_epoch(
            self.run.num_tokens, self.run.max_tokens, config.batch_size, config.seed, drawn
        )
        self.run.learner.model.train()
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
            batches = plan[cursor.step : cursor.step + config.accumulate]
            self._update(batches)
            cursor.step += len(batches)
            cursor.updates += 1
            bar.update(len(batches))
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
                self.run.learner.model.train()
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
        values = torch.tensor(flags, dtype=torch.uint8)
        distributed.all_reduce(values, distributed.ReduceOp.MAX, self.group)
        return values.bool().tolist()

    def _update(self, batches: Sequence[tuple[int, np.ndarray]]) -> None:
        """Train on several batches, (group, examples) each, and update once."""
        update = _Update([], [])
        for number, (group, rows) in enumerate(batches, 1):
            made = self._make_batch(group, rows)
            figures = train_step(
                self.run.learner,
                made,
                share=1 / len(batches),
                is_update=number == len(batches),
            )
            update.figures.append(runtime.launch(self.device, figures))
            update.counts.append(made.num_sequences)
            self.rate.add(made.batch)
        self.run.scheduler.step()
        self.pending.append(update)

    def _make_batch(self, group: int, rows: np.ndarray) -> TrainingBatch:
        config, data = self.config, self.run.data
        return make_batch(
            data.train,
            data.train_labels,
            group,
            rows,
            shapes=self.shapes,
            max_tokens=self.run.max_tokens,
            augmentation=self.augmentation,
            seed=config.seed,
            epoch=self.first_epoch + self.cursor.epoch,
            frames=config.frames_trained,
            process_index=self.accelerator.process_index,
            process_count=self.accelerator.num_processes,
        )

    def _read(self) -> None:
        """Fetch and count what the device has computed since the last read."""
        if not self.pending:
            return
        pending, self.pending = self.pending, []
        values = self._fetch([each for update in pending for each in update.figures])
        read = 0
        for update in pending:
            of_update = values[read : (read := read + len(update.counts))]
            self._count(of_update[:, 0], of_update[-1, 1], update.counts)
        if self.run.tracker.is_on:
            self._track(*values[-1].tolist())

    def _fetch(self, figures: list[torch.Tensor]) -> np.ndarray:
        """Figures of several steps on the host, (steps, 9), summed over the processes."""
        if self.device.kind == "xla":  # stacking would compile a program for every number of them
            return np.stack([runtime.fetch(each) for each in figures])
        stacked = torch.stack(figures)
        if self.accelerator.num_processes > 1:
            norms = stacked[:, 1].clone()  # the same in all
            stacked = self.accelerator.reduce(stacked)
            stacked[:, 1] = norms
        return runtime.fetch(stacked)

    def _count(self, losses: np.ndarray, norm: float, counts: list[int]) -> None:
        """Add the losses of an update's batches, or leave it out if its gradient is not finite."""
        cursor = self.cursor
        if math.isfinite(norm):
            self.bad_in_a_row = 0
            for loss, count in zip(losses.tolist(), counts, strict=True):
                cursor.loss_sum += loss * count
                cursor.loss_count += count
            return
        cursor.skipped += 1
        self.bad_in_a_row += 1
        log.warning("update %d: the gradient is not finite; the update is skipped", cursor.updates)
        if self.bad_in_a_row >= _NOT_FINITE_IN_A_ROW:
            raise TrainingStopped(
                f"the gradient was not finite {self.bad_in_a_row} times in a row; the last "
                f"good checkpoint is {self.run.checkpoints.latest()}. Lower --learning-rate"
            )

    def _track(self, loss: float, norm: float, *per_rank: float) -> None:
        line = {
            "train/loss": loss,
            "train/gradient_norm": norm,
            "train/learning_rate": self.run.scheduler.get_last_lr()[0],
            "system/compiles": runtime.counters(self.device)["compiles"],
            **self.rate.figures(),
        }
        line |= {f"train/{rank}/loss": value for rank, value in zip(RANKS, per_rank, strict=True)}
        self.run.tracker.log(line, self.cursor.updates)

    def save(self, best: bool = False) -> None:
        """Save a checkpoint of the current state."""
        self._read()
        self.run.checkpoints.save(self.cursor.updates, best)
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
        figures = self._evaluate()
        loss = cursor.loss_sum / max(1, cursor.loss_count)
        line = {
            "epoch": epoch,
            "updates": cursor.updates,
            "train/loss": loss,
            "system/compiles": runtime.counters(self.device)["compiles"],
            **{f"valid/{key}": value for key, value in figures.items()},
        }
        if self.accelerator.is_main_process:
            self.run.history.add(line)
            log.info("epoch %g: loss %.4f%s", epoch, loss, _accuracies(figures))
        self.run.tracker.log(line, cursor.updates)
        value = figures.get(self.config.monitor, math.nan)
        if self.config.monitor.endswith(LOWER_IS_BETTER):
            value = -value
        is_best = value > cursor.best
        cursor.best = value if is_best else cursor.best
        cursor.stale = 0 if is_best else cursor.stale + 1
        return is_best

    def _evaluate(self) -> dict[str, float]:
        run = self.run
        return evaluate_part(run.accelerator, run.classifier, run.device, run.data, run.max_tokens)

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
