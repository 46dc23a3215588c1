"""The programs that a run would compile, and how often each would run.

Input: options of a run and a topology. Output: the compiler's figures for each program, summed up.
Invariants: the programs are those of the run itself; nothing is computed, no speed is measured.
"""

import dataclasses
import json
import logging
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import EsmConfig

from ..encode.architecture import esm_config
from ..encode.encoder import check_options, choose_reading, forward_flops
from ..encode.model import read_config
from ..encode.model_files import resolve_base
from ..encode.packing import FIRST_POSITION, Batch, Totals, layout
from ..errors import ConfigError, InputError, ModelError
from ..options import (
    DEFAULT_MODEL,
    EmbedConfig,
    FinetuneConfig,
)
from ..reads.inputs import expand_inputs
from ..reads.lineages import RANKS, Lineage
from ..reads.tokens import tokenize
from ..training.batches import augmentation_of, find_shapes, make_batch, plan_epoch
from ..training.data import Examples
from ..training.evaluation import OVERLAP_TOKENS as EVALUATION_OVERLAP_TOKENS
from .compiler import (
    Compiled,
    Topology,
    compile_for,
)
from .dry_run import describe_reading
from .estimate import Program, describe_numbers, summarise
from .sample import MOST_SEQUENCES, pack, read_part

log = logging.getLogger("bioscan_xla.plan")


_NUM_CLASSES = (8, 60, 200, 600, 1_500, 4_000, 8_000)  # of the heads, where no data are given


def plan_embedding(config: EmbedConfig, topology: Topology) -> dict[str, Any]:
    """Plan an embedding run; returns what `--json` prints.

    Raises:
        DeviceError: no TPU compiler here.
        ModelError: the model's configuration cannot be loaded.
    """
    if topology.name == "v5e-16":
        raise ConfigError(
            f"{topology.name} has several hosts, and each host embeds by itself: plan for v5e-8"
        )
    name, revision = resolve_base(config.model, config.revision, config.adapter)
    config = dataclasses.replace(config, model=name, revision=revision)
    model = _model_config(config)
    max_tokens = check_options(model, config.layer, config.overlap_tokens)
    if config.layer != -1:
        model.num_hidden_layers = config.layer  # those above it are left out
    frames, strands = choose_reading(model, config.adapter, config.frames, config.strands)
    sequences = _sequences(config)
    shape = layout("xla", topology.num_cores, max_tokens)
    packed = pack(sequences, shape, max_tokens, config.overlap_tokens, frames, strands)

    def compile_forward(rows: int, width: int, segments: int) -> Compiled:
        shape = (rows, width, segments)
        program = trace("embed", model, config.dtype, shape, pooling=config.pooling)
        return compile_for(program, topology, rows, config.shard_parameters)

    programs = _forward_programs(model, packed.batches, compile_forward)
    about = _about(config, config.input) | {"reading": describe_reading(frames, strands)}
    return about | summarise(programs, topology, len(sequences), packed.totals)


def _about(config: EmbedConfig | FinetuneConfig, inputs: Sequence[str]) -> dict[str, Any]:
    """What was planned for."""
    dtype = config.dtype or "bfloat16"
    return {"model": config.model, "dtype": dtype, "input": list(inputs) or "simulated lengths"}


def _model_config(config: EmbedConfig | FinetuneConfig) -> EsmConfig:
    if config.model == DEFAULT_MODEL:
        # Its published shape (Dalla-Torre et al. 2024), so that a plan needs no network.
        return esm_config(2560, 32, 20)
    return read_config(config.model, config.revision)


def _sequences(config: EmbedConfig) -> list[str]:
    """The first sequences of each file; without an input, mixed lengths of 150 to 5,994 bp.

    20,000 in all at the most, or `max_sequences`.
    """
    most = min(MOST_SEQUENCES, config.max_sequences or MOST_SEQUENCES)
    if not config.input:
        rng = np.random.default_rng(0)
        spans = np.array([(658, 659), (150, 421), (900, 1801), (1801, 5995)])
        chosen = spans[rng.choice(4, most, p=(0.3, 0.3, 0.3, 0.1))]
        lengths = rng.integers(chosen[:, 0], chosen[:, 1])
        return ["".join(rng.choice(list("ACGT"), length)) for length in lengths.tolist()]
    sources = expand_inputs(config.input)
    sequences, _ = read_part(config, sources, most)
    if not sequences:
        raise InputError(f"{', '.join(sources)}: there is no usable sequence to plan for")
    return sequences


def _useful_flops(model: EsmConfig, batch: Batch) -> float:
    squared = sum(len(window) ** 2 for _, _, window in batch.places)
    return forward_flops(model, model.num_hidden_layers, batch.num_useful, squared)


def _options_of(config: FinetuneConfig) -> dict[str, Any]:
    """The options of fine-tuning, without those of the plan."""
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(FinetuneConfig)}


def plan_finetuning(config: FinetuneConfig, topology: Topology) -> dict[str, Any]:
    """Plan fine-tuning, its steps and its evaluations; returns what `--json` prints.

    Raises:
        DeviceError: no TPU compiler here.
        ModelError: the model's configuration cannot be loaded.
    """
    from ..training.classifier import fit_to_model

    model = _model_config(config)
    config = fit_to_model(config, model)
    max_tokens = model.max_position_embeddings - FIRST_POSITION
    train, held, num_classes = _training_data(config)
    batches = _training_batches(config, topology, train, max_tokens)
    options = _options_of(config)

    def compile_step(shape: tuple[int, int, int], gradient_checkpointing: bool) -> Compiled:
        how = "with" if gradient_checkpointing else "without"
        log.info("tracing and compiling %d rows of %d tokens %s checkpointing", *shape[:2], how)
        program = trace(
            "finetune",
            model,
            config.dtype,
            shape,
            options=options | {"gradient_checkpointing": gradient_checkpointing},
            num_classes=num_classes,
        )
        return compile_for(program, topology, shape[0], in_place=True)

    programs, totals = [], Totals()
    for shape, made in sorted(batches.items(), key=lambda item: item[0][0] * item[0][1]):
        for batch in made:
            totals.count(batch)
        # Forward, and backward through activations: the base has no weight gradients.
        useful = 2 * sum(_useful_flops(model, batch) for batch in made) / len(made)
        compiled = compile_step(shape, config.gradient_checkpointing)
        programs.append(Program(*shape, len(made), useful, compiled))
    # The largest step the other way: what checkpointing would save or cost.
    largest, other = programs[-1], not config.gradient_checkpointing
    shape = (largest.rows, largest.width, largest.segments)
    twin = dataclasses.replace(largest, compiled=compile_step(shape, other))
    result = _about(config, config.train) | summarise(programs, topology, len(train), totals)
    evaluation = None
    if held:
        evaluation = _plan_evaluation(config, topology, model, held, num_classes, largest)
        result["fits"] = result["fits"] and evaluation["fits"]
    return result | {
        "reading": describe_reading(config.frames_read, config.strands or "given"),
        "num_classes": num_classes,
        "gradient_checkpointing": config.gradient_checkpointing,
        "widest_otherwise": describe_numbers(twin, topology),
        "evaluation": evaluation,
    }


def _training_data(config: FinetuneConfig) -> tuple[Examples, list[str], list[int]]:
    """What is trained on, the sequences of the evaluation, and classes of each rank."""
    if config.train:
        from ..training.setup import prepare_data

        data = prepare_data(config)
        return data.train, data.eval.sequences, list(data.space.num_classes)
    sequences = _sequences(EmbedConfig())
    first = round(len(sequences) * config.eval_fraction)
    nameless: list[Lineage] = [(None,) * len(RANKS)] * (len(sequences) - first)
    ids = [str(number) for number in range(len(nameless))]
    return Examples(ids, sequences[first:], nameless), sequences[:first], list(_NUM_CLASSES)


def _training_batches(
    config: FinetuneConfig, topology: Topology, train: Examples, max_tokens: int
) -> dict[tuple[int, int, int], list[Batch]]:
    """Batches of the first epoch, by rows, tokens of a row and sequences of a row."""
    num_tokens = np.diff(tokenize(train.sequences).offsets)
    labels = np.zeros((len(train), len(RANKS)), np.int64)
    how: dict[str, Any] = {
        "max_tokens": max_tokens,
        "augmentation": augmentation_of(config),
        "seed": config.seed,
        "frames": config.frames_trained,
    }
    shapes = find_shapes(
        train, num_tokens, batch_size=config.batch_size, num_devices=topology.num_cores, **how
    )
    batches: dict[tuple[int, int, int], list[Batch]] = defaultdict(list)
    for group, members in plan_epoch(num_tokens, max_tokens, config.batch_size, config.seed, 0):
        batch = make_batch(train, labels, group, members, shapes=shapes, epoch=0, **how).batch
        rows, width = batch.input_ids.shape
        batches[rows, width, batch.num_segments].append(batch)
    return batches


def _plan_evaluation(
    config: FinetuneConfig,
    topology: Topology,
    model: EsmConfig,
    sequences: list[str],
    num_classes: list[int],
    step: Program,
) -> dict[str, Any]:
    """Figures of the programs of an evaluation; the optimizer's state stays where it is."""
    max_tokens = model.max_position_embeddings - FIRST_POSITION
    shape = layout("xla", topology.num_cores, max_tokens)
    packed = pack(
        sequences,
        shape,
        max_tokens,
        EVALUATION_OVERLAP_TOKENS,
        config.frames_read,
        config.strands or "given",
    )
    options = _options_of(config)

    def compile_forward(rows: int, width: int, segments: int) -> Compiled:
        program = trace(
            "evaluate",
            model,
            config.dtype,
            (rows, width, segments),
            options=options,
            num_classes=num_classes,
        )
        compiled = compile_for(program, topology, rows)
        idle = max(0, step.compiled.argument_bytes - compiled.argument_bytes)
        peak = compiled.peak_bytes
        return dataclasses.replace(compiled, peak_bytes=None if peak is None else peak + idle)

    programs = _forward_programs(model, packed.batches, compile_forward)
    return summarise(programs, topology, len(sequences), packed.totals)


def _forward_programs(
    model: EsmConfig, batches: Sequence[Batch], compile_forward: Callable[[int, int, int], Compiled]
) -> list[Program]:
    """The programs of a forward pass over batches, narrow rows first."""
    by_shape: dict[tuple[int, int, int], list[Batch]] = defaultdict(list)
    for batch in batches:
        rows, width = batch.input_ids.shape
        by_shape[rows, width, batch.num_segments].append(batch)
    programs = []
    for (rows, width, segments), made in sorted(by_shape.items(), key=lambda item: item[0][1]):
        log.info("tracing and compiling %d rows of %d tokens", rows, width)
        useful = sum(_useful_flops(model, batch) for batch in made) / len(made)
        compiled = compile_forward(rows, width, segments)
        programs.append(Program(rows, width, segments, len(made), useful, compiled))
    return programs


def trace(
    job: str,
    model: EsmConfig,
    dtype: str | None,
    shape: tuple[int, int, int],
    command: Sequence[str] = ("-m", "bioscan_xla.planning.trace"),
    **more: Any,
) -> bytes:
    """The program of a job for a batch of (rows, tokens, segments), traced in its own process.

    torch_xla's CPU backend traces it; a process that has loaded that cannot load the TPU compiler.
    `command` is what Python runs, with the job as its last argument.
    """
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        out, said = Path(folder, "program"), Path(folder, "said.json")
        words = {"job": job, "model": folder, "out": str(out), "dtype": dtype or "bfloat16"}
        said.write_text(json.dumps(words | {"shape": shape} | more))
        device = {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "1", "USE_TORCH_XLA": "1"}
        done = subprocess.run(
            [sys.executable, *command, str(said)],
            env={**os.environ, **device},
            capture_output=True,
            text=True,
            check=False,
        )
        if not out.is_file():
            raise ModelError(f"the program could not be traced: {done.stderr.strip()[-800:]}")
        return out.read_bytes()
