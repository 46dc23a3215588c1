"""Fine-tuning: the Accelerate loop. The only file that imports accelerate.

Enters: a config. Leaves: a model folder (adapter, heads, labels, report). Guaranteed: a run that
is killed and started again ends as one that was never interrupted, bit for bit on a CPU.
"""

import dataclasses
import importlib.util
import logging
import math
import signal
import uuid
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DataLoaderConfiguration,
    broadcast_object_list,
    gather_object,
    is_torch_xla_available,
)

from ..embedding.tracking import TrainingTracker
from ..encode import hosts, runtime
from ..encode.model import hash_weights, load_model
from ..encode.model_files import resolve_commit
from ..encode.packing import FIRST_POSITION
from ..errors import ConfigError, DeviceError, InputError
from ..options import FinetuneConfig
from ..reads.labels import learn_labels
from ..reads.lineages import RANKS, known_lineage
from ..reads.raw import read_options
from ..reads.tokens import tokenize
from ..stopping import stop_on_signal
from .checkpoint import Checkpoints, Cursor, register_hooks
from .classifier import TaxonomyClassifier
from .data import plan_epoch, read_examples
from .evaluation import predict
from .folder import History, push_to_hub, write_model_folder, write_tables
from .loop import Data, Loop
from .lora import attach_adapter, count_parameters
from .metrics import evaluate
from .splits import EVAL, NOVEL, TRAIN, split_rows

log = logging.getLogger("bioscan_xla.training.run")

_CONFLICTS_SHOWN = 5


def prepare_data(config: FinetuneConfig) -> Data:
    """Read, split and label; conflicts in the lineages are returned and logged."""
    reading = read_options(config)
    examples = read_examples(config.train, reading, config.taxonomy)
    lineages = [known_lineage(raw) for raw in examples.lineages]
    space, conflicts = learn_labels(lineages, config.min_sequences)
    for conflict in conflicts[:_CONFLICTS_SHOWN]:
        rows = conflict.rows[:_CONFLICTS_SHOWN]
        log.warning("%s (%s)", conflict, ", ".join(examples.ids[row] for row in rows))
    if len(conflicts) > _CONFLICTS_SHOWN:
        log.warning("%d names in all have two lineages: see conflicts.csv", len(conflicts))
    labels = space.encode(examples.lineages)
    if config.eval:
        held = read_examples(config.eval, reading, config.taxonomy)
        parts = np.full(len(examples), TRAIN)
    else:
        parts = split_rows(
            examples.sequences,
            labels,
            eval_fraction=config.eval_fraction,
            identity=config.identity,
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
        train,
        held,
        space,
        space.encode(train.lineages),
        space.encode(held.lineages),
        split,
        [
            (c.rank, c.name, examples.ids[row], ";".join(name or "" for name in lineages[row]))
            for c in conflicts
            for row in c.rows
        ],
    )


def finetune(config: FinetuneConfig) -> dict[str, Any]:
    """Run a config; returns what `run_finetuning_pipeline` returns.

    On a TPU slice of several hosts every host calls this; see `hosts`.
    """
    device = runtime.open_device(config.device, config.dtype, whole_slice=True)
    if is_torch_xla_available() != (device.kind == "xla"):
        wanted = "1" if device.kind == "xla" else "0"
        raise DeviceError(
            f"accelerate was imported before the device {device.kind} was chosen; set "
            f"USE_TORCH_XLA={wanted} in the environment, or start with launch/finetune.py"
        )
    if config.tracker == "tensorboard" and importlib.util.find_spec("tensorboard") is None:
        raise ConfigError("tensorboard is not installed: pip install 'bioscan_xla[tensorboard]'")
    hosts.check_same(device, "the options", repr(config))
    if device.process_index:
        logging.getLogger("bioscan_xla").setLevel(logging.ERROR)  # the first host says it all
        config = dataclasses.replace(config, tracker="none", push_to_hub=None)
    with hosts.own_folder(device, config.output) as folder:
        result = _finetune(dataclasses.replace(config, output=folder), device)
    index = device.process_index or PartialState().process_index
    return result | {"model_path": config.output, "process_index": index}


def _finetune(config: FinetuneConfig, device: runtime.Device) -> dict[str, Any]:
    started = datetime.now(timezone.utc)
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(
        cpu=device.kind == "cpu",
        mixed_precision="no",
        project_dir=str(output),
        log_with=None if config.tracker == "none" else config.tracker,
        # The batch is one over all processes, so a step of the scheduler is one step.
        dataloader_config=DataLoaderConfiguration(split_batches=True),
    )
    data = prepare_data(config)
    hosts.check_same(device, "the sequences", *data.train.sequences, *data.eval.sequences)
    if accelerator.is_main_process:
        write_tables(output, data.split, data.conflicts)
    commit = resolve_commit(config.model, config.revision)
    base = load_model(config.model, device.dtype, commit or None)
    base_hash = hash_weights(base)
    hosts.check_same(device, "the model", base_hash)
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
    optimizer = torch.optim.AdamW(parameter_groups(classifier, config), lr=config.learning_rate)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, _Schedule(min(config.warmup_steps, updates // 10), updates)
    )
    model, optimizer, scheduler = accelerator.prepare(classifier, optimizer, scheduler)
    register_hooks(accelerator)
    cursor = Cursor(run_id=uuid.uuid4().hex[:12])
    accelerator.register_for_checkpointing(cursor)
    checkpoints = Checkpoints(accelerator, config, data.space)
    torch.manual_seed(config.seed + 1 + accelerator.process_index)
    history = History(output / "metrics.jsonl")
    if not config.resume:
        checkpoints.clear()
    if (latest := checkpoints.latest()) is not None:
        checkpoints.load(latest)
        log.info("resuming from %s: epoch %d, batch %d", latest, cursor.epoch + 1, cursor.step)
    history.keep_until(cursor.updates)
    tracker = TrainingTracker(
        accelerator, config.tracker, config.wandb_project, dataclasses.asdict(config), cursor.run_id
    )
    loop = Loop(
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
        history,
        lambda: _evaluate(accelerator, classifier, device, data, max_tokens),
    )
    with stop_on_signal() as stop:
        while not cursor.finished:
            loop.run_epoch(stop.event)
            if stop.event.is_set():
                log.warning("saved %s; run the same command to go on", checkpoints.latest())
                tracker.finish()
                # It may have been another process that was told to.
                return {"interrupted": stop.signal_number or signal.SIGTERM}
            loop.end_epoch()
    if len(data.eval):
        checkpoints.load_best(classifier)
    result: dict[str, Any] = {
        "start_time": started.isoformat(),
        "end_time": datetime.now(timezone.utc).isoformat(),
        "total_loss": float(np.mean(cursor.losses)),
        "num_epochs": len(cursor.losses),
        **{f"epoch_{n}_loss": loss for n, loss in enumerate(cursor.losses, 1)},
        "skipped_updates": cursor.skipped,
        "model_path": str(output),
        "compiles": runtime.counters(device)["compiles"],
        "interrupted": None,
        "evaluation": {},
    }
    probabilities, vectors = _predict_eval(accelerator, classifier, device, data, max_tokens)
    if accelerator.is_main_process:
        if len(data.eval):
            result["evaluation"] = evaluate(probabilities, data.eval_labels, data.space)
        facts = {
            "train": len(data.train),
            "eval": len(data.eval),
            "epochs": len(cursor.losses),
            "trainable": trainable,
            "parameters": parameters,
            "base_hash": base_hash,
        }
        write_model_folder(
            config,
            classifier,
            data.space,
            result,
            facts,
            history.lines(),
            (probabilities, data.eval_labels, vectors),
        )
        if config.push_to_hub:
            push_to_hub(config.output, config.push_to_hub)
    tracker.log(
        {f"final/{key}": value for key, value in result["evaluation"].items()}, cursor.updates
    )
    pictures = ("curves", "confusion", "vectors")
    tracker.log_pictures(
        {f"final/{name}": output / f"{name}.png" for name in pictures}, cursor.updates
    )
    tracker.finish()
    return result


def _evaluate(
    accelerator: Any,
    classifier: TaxonomyClassifier,
    device: runtime.Device,
    data: Data,
    max_tokens: int,
) -> dict[str, float]:
    """Figures of the evaluation part, the same in every process."""
    figures: list[dict[str, float]] = [{}]
    probabilities, vectors = _predict_eval(accelerator, classifier, device, data, max_tokens)
    if accelerator.is_main_process and len(data.eval):
        # Vectors that shrink to a point or blow up are seen here before the accuracy falls.
        figures[0] = evaluate(probabilities, data.eval_labels, data.space) | {
            "vector_norm": float(np.linalg.norm(vectors, axis=1).mean()),
            "vector_variance": float(vectors.var(0).mean()),
        }
    if accelerator.num_processes > 1:
        broadcast_object_list(figures)
    return figures[0]


def _predict_eval(
    accelerator: Any,
    classifier: TaxonomyClassifier,
    device: runtime.Device,
    data: Data,
    max_tokens: int,
) -> tuple[list[np.ndarray], np.ndarray]:
    """Probabilities and vectors of the evaluation part; each process computes its share."""
    index, count = accelerator.process_index, accelerator.num_processes
    own = predict(classifier, device, data.eval.sequences[index::count], max_tokens)
    if count == 1:
        return own
    parts = [part for part in gather_object([own]) if len(part[1])]
    if not parts:
        return own
    order = np.concatenate([np.arange(at, len(data.eval), count) for at in range(len(parts))])
    back = np.argsort(order)
    probabilities = [
        np.concatenate(rank)[back] for rank in zip(*(part[0] for part in parts), strict=True)
    ]
    return probabilities, np.concatenate([part[1] for part in parts])[back]


def parameter_groups(module: torch.nn.Module, config: FinetuneConfig) -> list[dict[str, Any]]:
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
