"""Fine-tuning: the Accelerate loop. The only file that imports accelerate.

Enters: a config. Leaves: a model folder (adapter, heads, labels, report). Guaranteed: a run that
is killed and started again ends as one that was never interrupted, bit for bit on a CPU.
"""

import dataclasses
import logging
import math
import time
import uuid
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, is_torch_xla_available
from tqdm import tqdm

from . import runtime
from .batches import FIRST_POSITION
from .checkpoint import Checkpoints, Cursor, register_hooks
from .classifier import TaxonomyClassifier, initial_log_priors
from .config import FinetuneConfig
from .encoder import load_model, resolve_commit
from .errors import BioscanError, DeviceError, InputError
from .evaluation import predict
from .labels import LabelSpace, learn_labels
from .lora import attach_adapter, count_parameters
from .loss import rank_loss
from .metrics import evaluate
from .model_folder import History, write_model_folder
from .sources import ReadOptions
from .splits import EVAL, NOVEL, TRAIN, split_rows
from .stopping import stop_on_signal
from .taxonomy import RANKS
from .tokens import tokenize
from .tracking import TrainingTracker
from .training_data import Augmentation, Examples, make_batch, plan_epoch, read_examples

log = logging.getLogger("bioscan_xla.train")

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


def prepare_data(config: FinetuneConfig) -> Data:
    """Read, split and label; conflicts in the lineages are logged."""
    reading = ReadOptions(columns=config.columns, header_taxonomy=config.header_taxonomy)
    examples = read_examples(config.train, reading, config.taxonomy)
    space, conflicts = learn_labels(examples.lineages, config.min_sequences)
    for conflict in conflicts:
        log.warning("conflicting lineages: %s", conflict)
    labels = space.encode(examples.lineages)
    if config.eval:
        held = read_examples(config.eval, reading, config.taxonomy)
        parts = np.full(len(examples), TRAIN)
    else:
        parts = split_rows(
            examples.sequences,
            labels,
            eval_fraction=config.eval_fraction,
            novel_rank=RANKS.index(config.novel_rank) if config.novel_rank else None,
            novel_fraction=config.novel_fraction,
            seed=config.seed,
        )
        held = examples.select(np.flatnonzero(parts == EVAL))
    split = list(zip(examples.ids, parts.tolist(), strict=True))
    if (parts == NOVEL).any():
        log.info("%d sequences of held-out taxa are left for novelty", (parts == NOVEL).sum())
    train = examples.select(np.flatnonzero(parts == TRAIN))
    if not len(train):
        raise InputError(f"{config.train}: no training sequence is left after the split")
    space, _ = learn_labels(train.lineages, config.min_sequences)
    if not any(space.num_classes):
        raise InputError(
            f"{config.train}: no class has {config.min_sequences} sequences; lower --min-sequences"
        )
    return Data(
        train, held, space, space.encode(train.lineages), space.encode(held.lineages), split
    )


def finetune(config: FinetuneConfig) -> dict[str, Any]:
    """Run a config; returns what `run_finetuning_pipeline` returns."""
    started = datetime.now(timezone.utc)
    device = runtime.open_device(config.device, config.dtype)
    if is_torch_xla_available() != (device.kind == "xla"):
        wanted = "1" if device.kind == "xla" else "0"
        raise DeviceError(
            f"accelerate was imported before the device {device.kind} was chosen; set "
            f"USE_TORCH_XLA={wanted} in the environment, or start with launch/finetune.py"
        )
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(
        cpu=device.kind == "cpu",
        mixed_precision="no",
        project_dir=str(output),
        log_with=None if config.tracker == "none" else config.tracker,
    )
    data = prepare_data(config)
    commit = resolve_commit(config.model, config.revision)
    base = load_model(config.model, device.dtype, commit or None)
    max_tokens = base.config.max_position_embeddings - FIRST_POSITION
    torch.manual_seed(config.seed)
    if config.gradient_checkpointing:
        runtime.enable_gradient_checkpointing(device, base)
    adapted = attach_adapter(
        base,
        rank=config.rank,
        alpha=config.alpha,
        dropout=config.dropout,
        targets=tuple(config.targets),
    )
    adapted.peft_config["default"].base_model_name_or_path = (
        str(Path(config.model).resolve()) if Path(config.model).is_dir() else config.model
    )
    adapted.peft_config["default"].revision = commit or None
    classifier = TaxonomyClassifier(
        adapted, base.config.hidden_size, data.space, dropout=config.dropout
    )
    trainable, parameters = count_parameters(classifier)
    in_adapter = count_parameters(adapted)[0]
    log.info(
        "training %s of %s parameters (%.2f %%): %s in the adapter (%.2f %% of the encoder), the "
        "rest in the heads",
        f"{trainable:,}",
        f"{parameters:,}",
        100 * trainable / parameters,
        f"{in_adapter:,}",
        100 * in_adapter / count_parameters(adapted)[1],
    )
    classifier.to(device.torch_device).train()
    num_tokens = np.diff(tokenize(data.train.sequences).offsets)
    per_epoch = len(plan_epoch(num_tokens, max_tokens, config.batch_size, config.seed, 0))
    updates = config.num_epochs * -(-per_epoch // config.accumulate)
    optimizer = torch.optim.AdamW(_parameter_groups(classifier, config), lr=config.learning_rate)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, _Schedule(min(config.warmup_steps, updates // 10), updates)
    )
    model, optimizer = accelerator.prepare(classifier, optimizer)
    register_hooks(accelerator)
    cursor = Cursor(run_id=uuid.uuid4().hex[:12])
    accelerator.register_for_checkpointing(cursor, scheduler)
    checkpoints = Checkpoints(accelerator, config, data.space)
    torch.manual_seed(config.seed + 1 + accelerator.process_index)
    history = History(output / "metrics.jsonl")
    if (latest := checkpoints.latest()) is not None:
        checkpoints.load(latest)
        history.keep_until(cursor.updates)
        log.info("resuming from %s: epoch %d, batch %d", latest, cursor.epoch + 1, cursor.step)
    tracker = TrainingTracker(
        accelerator, config.tracker, config.wandb_project, dataclasses.asdict(config), cursor.run_id
    )
    loop = _Loop(
        config,
        device,
        accelerator,
        model,
        optimizer,
        scheduler,
        cursor,
        checkpoints,
        tracker,
        data,
        num_tokens,
        max_tokens,
        per_epoch,
    )
    with stop_on_signal() as stop:
        while not cursor.finished:
            loop.run_epoch(stop.event)
            if stop.event.is_set():
                log.warning("saved %s; run the same command to go on", checkpoints.latest())
                tracker.finish()
                return {"interrupted": stop.signal_number, "model_path": str(output)}
            figures = [
                evaluate(*_predict_eval(classifier, device, data, max_tokens)[:2], data.space)
                if accelerator.is_main_process and len(data.eval)
                else {}
            ]
            broadcast_object_list(figures)
            loop.end_epoch(figures[0], history)
    if len(data.eval):
        checkpoints.load_best(classifier)
    result: dict[str, Any] = {
        "start_time": started.isoformat(),
        "end_time": datetime.now(timezone.utc).isoformat(),
        "total_loss": float(np.mean(cursor.losses)),
        "num_epochs": len(cursor.losses),
        **{f"epoch_{n}_loss": loss for n, loss in enumerate(cursor.losses, 1)},
        "model_path": str(output),
        "skipped_updates": cursor.skipped,
        "compiles": runtime.counters(device)["compiles"],
        "interrupted": None,
        "evaluation": {},
    }
    if accelerator.is_main_process:
        probabilities, truth, vectors = _predict_eval(classifier, device, data, max_tokens)
        result["evaluation"] = evaluate(probabilities, truth, data.space) if len(data.eval) else {}
        facts = {
            "train": len(data.train),
            "eval": len(data.eval),
            "epochs": len(cursor.losses),
            "trainable": trainable,
            "parameters": parameters,
        }
        write_model_folder(
            config,
            classifier,
            data.space,
            data.split,
            result,
            facts,
            history.lines(),
            (probabilities, truth, vectors),
        )
    tracker.log(
        {f"final/{key}": value for key, value in result["evaluation"].items()}, cursor.updates
    )
    tracker.finish()
    return result


def _predict_eval(
    classifier: TaxonomyClassifier, device: runtime.Device, data: Data, max_tokens: int
) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    probabilities, vectors = predict(classifier, device, data.eval.sequences, max_tokens)
    return probabilities, data.eval_labels, vectors


def _parameter_groups(module: torch.nn.Module, config: FinetuneConfig) -> list[dict[str, Any]]:
    """Matrices decay, biases and norms do not."""
    trained = [p for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]


class _Schedule:
    """Share of the peak learning rate: a linear rise, then a cosine to zero."""

    def __init__(self, warmup: int, total: int):
        self.warmup, self.total = warmup, total

    def __call__(self, update: int) -> float:
        if update < self.warmup:
            return (update + 1) / (self.warmup + 1)
        done = (update - self.warmup) / max(1, self.total - self.warmup)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


class _Loop:
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
        per_epoch: int,
    ):
        self.config, self.device, self.accelerator = config, device, accelerator
        self.model, self.optimizer, self.scheduler = model, optimizer, scheduler
        self.cursor, self.checkpoints, self.tracker = cursor, checkpoints, tracker
        self.data, self.num_tokens, self.max_tokens = data, num_tokens, max_tokens
        self.per_epoch = per_epoch
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.augmentation = Augmentation(config.reverse_complement, config.frame_shift, config.crop)
        self.log_priors = None
        if config.class_balance:
            priors = initial_log_priors(data.space, config.class_balance)
            self.log_priors = [prior.to(device.torch_device) for prior in priors]
        self.pending: list[tuple[torch.Tensor, torch.Tensor, int]] = []
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
            disable=None if self.accelerator.is_main_process else True,
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
            if self._any(stop.is_set()):
                stop.set()
                break
            if self._any(time.monotonic() - self.saved > 60 * config.checkpoint_minutes):
                self.save()
        bar.close()
        if stop.is_set():
            self.save()

    def _any(self, flag: bool) -> bool:
        """Whether it is so in any process: all must save at the same step."""
        if self.accelerator.num_processes == 1:
            return flag
        value = torch.tensor(float(flag), device=self.device.torch_device)
        return bool(self.accelerator.reduce(value, "sum").item() > 0)

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
        norm = self._update() if is_update else torch.zeros(())
        runtime.end_step(self.device)
        self.pending.append((self.last_loss, norm, made.num_sequences))

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
        )
        # Each process has a part of the sum; gradients are averaged over the processes.
        scale = self.accelerator.num_processes / config.accumulate
        self.accelerator.backward(loss.total * scale)
        self.last_loss = loss.total.detach()

    def _update(self) -> torch.Tensor:
        norm = torch.nn.utils.clip_grad_norm_(self.trained, self.config.max_grad_norm)
        if self.device.kind == "cpu":
            if torch.isfinite(norm):
                self.optimizer.step()
        else:
            # Asking would wait for the device: there a bad gradient becomes none at all.
            good = torch.isfinite(norm)
            for parameter in self.trained:
                parameter.grad = torch.where(good, parameter.grad, 0.0)  # type: ignore[arg-type]
            self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        return norm.detach()

    def _read(self) -> None:
        """Fetch what the device has accumulated since the last look."""
        cursor = self.cursor
        for loss, norm, count in self.pending:
            value = loss if self.accelerator.num_processes == 1 else self.accelerator.reduce(loss)
            if math.isfinite(float(norm)):
                self.bad_in_a_row = 0
                cursor.loss_sum += float(value) * count
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
        if self.pending:
            self.tracker.log(
                {
                    "train/loss": float(self.pending[-1][0]),
                    "train/gradient_norm": float(self.pending[-1][1]),
                    "train/learning_rate": self.scheduler.get_last_lr()[0],
                },
                cursor.updates,
            )
        self.pending.clear()

    def save(self, best: bool = False) -> None:
        """Save a checkpoint of this moment."""
        self._read()
        self.checkpoints.save(self.cursor.updates, best)
        self.saved = time.monotonic()

    def end_epoch(self, figures: dict[str, float], history: History) -> None:
        """Count the epoch, write its line, decide whether it was the best or the last."""
        self._read()
        cursor, config = self.cursor, self.config
        loss = cursor.loss_sum / max(1, cursor.loss_count)
        cursor.losses = [*cursor.losses, loss]
        line = {
            "epoch": cursor.epoch + 1,
            "updates": cursor.updates,
            "train/loss": loss,
            **{f"valid/{key}": value for key, value in figures.items()},
        }
        if self.accelerator.is_main_process:
            history.add(line)
            log.info("epoch %d: loss %.4f%s", cursor.epoch + 1, loss, _accuracies(figures))
        self.tracker.log(line, cursor.updates)
        accuracy = figures.get("mean_accuracy", float("nan"))
        is_best = accuracy > cursor.best
        cursor.best = accuracy if is_best else cursor.best
        cursor.stale_epochs = 0 if is_best else cursor.stale_epochs + 1
        cursor.epoch += 1
        cursor.step, cursor.loss_sum, cursor.loss_count = 0, 0.0, 0
        enough = config.patience is not None and cursor.stale_epochs >= config.patience
        cursor.finished = cursor.epoch >= config.num_epochs or enough
        self.save(best=is_best)


def _accuracies(figures: dict[str, float]) -> str:
    found = [
        f"{rank} {figures[f'{rank}/accuracy']:.3f}"
        for rank in RANKS
        if f"{rank}/accuracy" in figures
    ]
    return f"; accuracy {', '.join(found)}" if found else ""
