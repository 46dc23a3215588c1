"""From a config to a run that is ready to train: data, model, optimizer, checkpoint.

Input: a config, an opened device, an Accelerator. Output: a `Run`.
Invariants: data, split and initial weights follow from the config and the seed alone; if the
output folder has a checkpoint of this run, the run resumes from it.
"""

import dataclasses
import logging
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import get_cosine_schedule_with_warmup

from ..embedding.tracking import TrainingTracker
from ..encode import hosts, runtime
from ..encode.model import hash_base, load_model, read_config
from ..encode.model_files import absolute, resolve_commit
from ..encode.packing import FIRST_POSITION
from ..errors import InputError
from ..options import FinetuneConfig
from ..reads.labels import UNKNOWN, learn_labels
from ..reads.lineages import RANKS, known_lineage
from ..reads.raw import ReadOptions
from ..reads.tokens import tokenize
from .batches import plan_epoch
from .checkpoint import Checkpoints, Cursor, recorded_commit
from .classifier import (
    TaxonomyClassifier,
    build_classifier,
    count_parameters,
    fit_to_model,
    initial_log_priors,
)
from .data import Data, Examples, read_examples
from .folder import History, write_tables
from .loss import parent_links
from .splits import EVAL, NOVEL, TRAIN, split_rows
from .start import base_of_start, fit_to_start, given_labels, load_start
from .step import Learner, make_optimizer

log = logging.getLogger(__name__)

_CONFLICTS_SHOWN = 5


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything that makes up a training run.

    Attributes:
        config: its options.
        device: where it computes.
        accelerator: the processes that compute it together.
        data: what it learns and is evaluated on.
        num_tokens: (train,) tokens of each training sequence.
        max_tokens: the model's longest window.
        base_hash: of the weights of the base model.
        start: hash and epochs of the model it goes on from; empty without one.
        classifier: the model.
        learner: what a step computes with; its model wraps the classifier.
        scheduler: of the learning rate, one step an update.
        cursor: where the run stands.
        checkpoints: where it is saved.
        history: the figures of its evaluations.
        tracker: where figures are sent.
    """

    config: FinetuneConfig
    device: runtime.Device
    accelerator: Any
    data: Data
    num_tokens: np.ndarray
    max_tokens: int
    base_hash: str
    start: Mapping[str, Any]
    classifier: TaxonomyClassifier
    learner: Learner
    scheduler: Any
    cursor: Cursor
    checkpoints: Checkpoints
    history: History
    tracker: TrainingTracker


def set_up(config: FinetuneConfig, device: runtime.Device, accelerator: Any) -> Run:
    """Read the data, make the model, and restore the last checkpoint."""
    # A wrong model is reported before the data are read.
    config = base_of_start(config)
    recorded = recorded_commit(config)
    base = read_config(config.model, recorded or config.revision)
    config = fit_to_start(config, lambda options: fit_to_model(options, base))
    commit = recorded or resolve_commit(config.model, config.revision)
    data = prepare_data(config)
    hosts.check_same(device, "the sequences", *data.train.sequences, *data.eval.sequences)
    if accelerator.is_main_process:
        write_tables(Path(config.output), data.split, data.conflicts)
    classifier, max_tokens, base_hash = _make_classifier(config, device, data, commit)
    start = load_start(classifier, Path(config.start), base_hash) if config.start else {}
    num_tokens = np.diff(tokenize(data.train.sequences).offsets)
    optimizer = make_optimizer(classifier, config)
    per_epoch = len(plan_epoch(num_tokens, max_tokens, config.batch_size, config.seed, 0))
    updates = config.num_epochs * -(-per_epoch // config.accumulate)
    model, prepared = accelerator.prepare(classifier, optimizer)
    learner = _make_learner(config, device, accelerator, data, model, prepared)

    cursor = Cursor(run_id=uuid.uuid4().hex[:12], base_commit=commit)
    origin = _describe_origin(data, base_hash, start)
    checkpoints = Checkpoints(accelerator, config, data.space, learner, cursor, origin)
    torch.manual_seed(config.seed + 1 + accelerator.process_index)
    if not config.resume:
        checkpoints.clear()
    if (latest := checkpoints.latest()) is not None:
        checkpoints.load(latest)
        log.info("resuming from %s: epoch %d, batch %d", latest, cursor.epoch + 1, cursor.step)
    # The schedule's first rate is 0, which would waste an update: begin with its second.
    scheduler = get_cosine_schedule_with_warmup(
        optimizer,
        num_warmup_steps=min(config.warmup_steps, updates // 10) + 1,
        num_training_steps=updates + 1,
        last_epoch=cursor.updates,
    )
    history = History(Path(config.output) / "metrics.jsonl")
    history.keep_until(cursor.updates)
    tracker = TrainingTracker(
        accelerator, config.tracker, config.wandb_project, dataclasses.asdict(config), cursor.run_id
    )
    return Run(
        config,
        device,
        accelerator,
        data,
        num_tokens,
        max_tokens,
        base_hash,
        start,
        classifier,
        learner,
        scheduler,
        cursor,
        checkpoints,
        history,
        tracker,
    )


def prepare_data(config: FinetuneConfig) -> Data:
    """Read, split and label; conflicts in the lineages are returned and logged."""
    given = given_labels(config)
    reading = ReadOptions(columns=config.columns, header_taxonomy=config.header_taxonomy)
    examples = read_examples(config.train, reading, config.taxonomy)
    lineages = [known_lineage(raw) for raw in examples.lineages]
    space, conflicts = learn_labels(lineages, config.min_sequences)
    for conflict in conflicts[:_CONFLICTS_SHOWN]:
        rows = conflict.rows[:_CONFLICTS_SHOWN]
        log.warning("%s (%s)", conflict, ", ".join(examples.ids[row] for row in rows))
    if len(conflicts) > _CONFLICTS_SHOWN:
        log.warning("%d names in all have two lineages: see conflicts.csv", len(conflicts))
    labels = space.encode(examples.lineages)
    parts = split_rows(
        examples.sequences,
        labels,
        eval_fraction=0.0 if config.eval else config.eval_fraction,
        identity=config.identity,
        novel_rank=RANKS.index(config.novel_rank) if config.novel_rank else None,
        novel_fraction=config.novel_fraction,
        seed=config.seed,
    )
    if config.eval:
        held = read_examples(config.eval, reading, config.taxonomy)
    else:
        held = examples.select(np.flatnonzero(parts == EVAL))
    novel = examples.select(np.flatnonzero(parts == NOVEL))
    split = list(zip(examples.ids, parts.tolist(), strict=True))
    if len(novel):
        log.info("%d sequences of held-out taxa are not trained on", len(novel))
    train = examples.select(np.flatnonzero(parts == TRAIN))
    if not len(train):
        raise InputError(f"{config.train}: no training sequence is left after the split")
    space = given or learn_labels(train.lineages, config.min_sequences)[0]
    if not any(space.num_classes):
        raise InputError(
            f"{config.train}: no class has {config.min_sequences} sequences; lower --min-sequences"
        )
    train_labels = space.encode(train.lineages)
    if given:
        _count_unknown(train, train_labels, config)
    return Data(
        train,
        held,
        novel,
        space,
        train_labels,
        space.encode(held.lineages),
        split,
        [
            (c.rank, c.name, examples.ids[row], ";".join(name or "" for name in lineages[row]))
            for c in conflicts
            for row in c.rows
        ],
    )


def _count_unknown(train: Examples, labels: np.ndarray, config: FinetuneConfig) -> None:
    """Log how many names the given classes lack; InputError if they lack all."""
    place = config.labels or f"{config.start}/labels.json"
    if (labels == UNKNOWN).all():
        raise InputError(f"{config.train}: no name of these sequences is a class of {place}")
    named = np.array([[bool(name) for name in known_lineage(raw)] for raw in train.lineages])
    lacking = (named & (labels == UNKNOWN)).sum(0).tolist()
    if any(lacking):
        told = ", ".join(f"{rank} {n}" for rank, n in zip(RANKS, lacking, strict=True) if n)
        log.warning("names that %s lacks count as unknown: %s sequences", place, told)


def _make_classifier(
    config: FinetuneConfig, device: runtime.Device, data: Data, commit: str
) -> tuple[TaxonomyClassifier, int, str]:
    """The classifier on the device, the model's longest window in tokens, its weights' hash."""
    base = load_model(config.model, device.dtype, commit or None)
    base_hash = hash_base(base)
    hosts.check_same(device, "the model", base_hash)
    torch.manual_seed(config.seed)
    classifier = build_classifier(base, device, data.space, config)
    encoder: Any = classifier.encoder
    encoder.peft_config["default"].base_model_name_or_path = absolute(config.model)
    encoder.peft_config["default"].revision = commit or None
    trainable, parameters = count_parameters(classifier)
    in_adapter, in_encoder = count_parameters(encoder)
    log.info(
        "training %s of %s parameters (%.2f %%): %s in the adapter (%.2f %% of the encoder), the "
        "rest in the heads",
        f"{trainable:,}",
        f"{parameters:,}",
        100 * trainable / parameters,
        f"{in_adapter:,}",
        100 * in_adapter / in_encoder,
    )
    max_tokens = base.config.max_position_embeddings - FIRST_POSITION
    return classifier.to(device.torch_device), max_tokens, base_hash


def _describe_origin(data: Data, base_hash: str, start: Mapping[str, Any]) -> dict[str, str]:
    """Hashes of what a run begins with, which must be the same when it is resumed."""
    return {
        "the base model": base_hash,
        "the model to start from": start.get("hash", ""),
        "the training sequences": data.train.content_hash(),
        "the evaluation sequences": data.eval.content_hash(),
    }


def _make_learner(
    config: FinetuneConfig,
    device: runtime.Device,
    accelerator: Any,
    data: Data,
    model: Any,
    optimizer: Any,
) -> Learner:
    log_priors = parents = None
    if config.class_balance:
        priors = initial_log_priors(data.space, config.class_balance)
        log_priors = [prior.to(device.torch_device) for prior in priors]
    if config.consistency:
        parents = parent_links(data.space, device.torch_device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return Learner(
        config,
        device,
        model,
        optimizer,
        trained,
        log_priors,
        parents,
        accelerator.num_processes,
    )
