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
from collections.abc import Sequence
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
from ..reads.tokens import tokenize
from ..training.data import plan_epoch
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
    batches: dict[tuple[int, int, int], list[Batch]] = defaultdict(list)
    for batch in packed.batches:
        rows, width = batch.input_ids.shape
        batches[rows, width, batch.num_segments].append(batch)
    programs = []
    for (rows, width, segments), made in sorted(batches.items(), key=lambda item: item[0][1]):
        log.info("tracing and compiling %d rows of %d tokens", rows, width)
        compiled = compile_for(
            trace("embed", model, config.dtype, (rows, width, segments), pooling=config.pooling),
            topology,
            rows,
            config.shard_parameters,
        )
        useful = sum(_useful_flops(model, batch) for batch in made) / len(made)
        programs.append(Program(rows, width, segments, len(made), useful, compiled))
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


def plan_finetuning(config: FinetuneConfig, topology: Topology) -> dict[str, Any]:
    """Plan fine-tuning: its steps, without evaluation; returns what `--json` prints.

    Raises:
        DeviceError: no TPU compiler here.
        ModelError: the model's configuration cannot be loaded.
    """
    from ..training.classifier import fit_to_model

    model = _model_config(config)
    config = fit_to_model(config, model)
    frames = config.frames_trained
    max_tokens = model.max_position_embeddings - FIRST_POSITION
    num_classes = list(_NUM_CLASSES)
    if config.train:
        from ..training.setup import prepare_data

        data = prepare_data(config)
        sequences, num_classes = data.train.sequences, list(data.space.num_classes)
    else:
        sequences = _sequences(EmbedConfig())
    num_tokens = np.diff(tokenize(sequences).offsets)
    rows = -(-config.batch_size // topology.num_cores) * topology.num_cores * frames
    steps: dict[int, list[np.ndarray]] = defaultdict(list)
    for width, members in plan_epoch(num_tokens, max_tokens, config.batch_size, config.seed, 0):
        steps[width].append(members)

    def compile_step(width: int, gradient_checkpointing: bool) -> Compiled:
        how = "with" if gradient_checkpointing else "without"
        log.info("tracing and compiling %d rows of %d tokens %s checkpointing", rows, width, how)
        options = _finetuning_options(config) | {"gradient_checkpointing": gradient_checkpointing}
        program = trace(
            "finetune",
            model,
            config.dtype,
            (rows, width, 1),
            options=options,
            num_classes=num_classes,
        )
        return compile_for(program, topology, rows, in_place=True)

    programs, totals = [], Totals()
    for width, made in sorted(steps.items()):
        compiled = compile_step(width, config.gradient_checkpointing)
        lengths = [np.minimum(num_tokens[members], max_tokens) for members in made]
        totals.useful_tokens += frames * int(sum(part.sum() for part in lengths))
        totals.computed_tokens += len(made) * rows * width
        useful = frames * sum(_step_flops(model, part) for part in lengths)
        programs.append(Program(rows, width, 1, len(made), useful / len(made), compiled))
    # The widest step the other way: what checkpointing would save or cost.
    widest, other = programs[-1], not config.gradient_checkpointing
    twin = dataclasses.replace(widest, compiled=compile_step(widest.width, other))
    result = _about(config, config.train) | summarise(programs, topology, len(sequences), totals)
    return result | {
        "reading": describe_reading(config.frames_read, config.strands or "given"),
        "num_classes": num_classes,
        "gradient_checkpointing": config.gradient_checkpointing,
        "widest_otherwise": describe_numbers(twin, topology),
    }


def _step_flops(model: EsmConfig, num_tokens: np.ndarray) -> float:
    """Forward, and backward through activations: the base has no weight gradients."""
    squared = (num_tokens.astype(float) ** 2).sum()
    return 2 * forward_flops(model, model.num_hidden_layers, num_tokens.sum(), squared)


def _finetuning_options(config: FinetuneConfig) -> dict[str, Any]:
    names = [field.name for field in dataclasses.fields(FinetuneConfig)]
    return {name: getattr(config, name) for name in names}


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
