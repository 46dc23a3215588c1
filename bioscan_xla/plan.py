"""Will it fit, and how fast can it be: `python -m bioscan_xla.plan embed --topology v5e-8`.

Traces the programs that a run would compile, has Google's TPU compiler compile them for a TPU
that is not there, and adds up what it says. Enters: options of a run. Leaves: a table or JSON.
Figures are the compiler's estimate; nothing is computed and no speed is measured.
"""

import argparse
import dataclasses
import itertools
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

from .cli import parse
from .encode.encoder import check_options, choose_reading, forward_flops
from .encode.inference import prepare
from .encode.model import read_config
from .encode.model_files import resolve_base
from .encode.packing import FIRST_POSITION, Batch, Packer, Totals, layout
from .errors import BioscanError, ConfigError, InputError, ModelError
from .options import DEFAULT_MODEL, EmbedConfig
from .planning.compiler import (
    GIB,
    TOPOLOGIES,
    Compiled,
    Topology,
    check_compiler,
    compile_for,
    find_topology,
)
from .planning.dry_run import describe_reading
from .reads.files import metadata_schema
from .reads.inputs import expand_inputs
from .reads.raw import ReadOptions
from .reads.records import read_chunks
from .reads.tokens import tokenize
from .sample import esm_config
from .training.data import plan_epoch
from .training.options import FinetuneConfig

log = logging.getLogger("bioscan_xla.plan")

_SAMPLE_SEQUENCES = 20_000
_UTILISATION = 0.6
_NUM_CLASSES = (8, 60, 200, 600, 1_500, 4_000, 8_000)  # of the heads, where no data are given


@dataclasses.dataclass(frozen=True)
class Program:
    """One program of a run.

    Attributes:
        rows: of a batch, over all cores.
        width: tokens of a row.
        segments: sequences that a row can hold.
        batches: how often it runs for the sequences looked at.
        useful_flops: what one batch needs for its real tokens, on average.
        compiled: what the compiler says.
    """

    rows: int
    width: int
    segments: int
    batches: int
    useful_flops: float
    compiled: Compiled


def plan_embedding(config: EmbedConfig, topology: Topology) -> dict[str, Any]:
    """Plan an embedding run; returns what `--json` prints.

    Raises:
        DeviceError: no TPU compiler here.
        ModelError: the model's configuration cannot be had.
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
    packer = Packer(layout("xla", topology.num_cores, max_tokens))
    job = prepare(0, None, sequences, max_tokens, config.overlap_tokens, frames, strands)
    batches: dict[tuple[int, int, int], list[Batch]] = defaultdict(list)
    totals = Totals()
    for batch in [*packer.add(job.windows), *packer.flush()]:
        rows, width = batch.input_ids.shape
        batches[rows, width, batch.num_segments].append(batch)
        totals.count(batch)
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
    return about | _summary(programs, topology, len(sequences), totals)


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
    most = min(_SAMPLE_SEQUENCES, config.max_sequences or _SAMPLE_SEQUENCES)
    if not config.input:
        rng = np.random.default_rng(0)
        spans = np.array([(658, 659), (150, 421), (900, 1801), (1801, 5995)])
        chosen = spans[rng.choice(4, most, p=(0.3, 0.3, 0.3, 0.1))]
        lengths = rng.integers(chosen[:, 0], chosen[:, 1])
        return ["".join(rng.choice(list("ACGT"), length)) for length in lengths.tolist()]
    sources = expand_inputs(config.input)
    reading = ReadOptions(
        columns=config.columns,
        header_taxonomy=config.header_taxonomy,
        min_length_bp=config.min_length_bp,
        max_n_fraction=config.max_n_fraction,
    )
    schema = metadata_schema(sources, reading)
    each = -(-most // len(sources))
    sequences: list[str] = []
    for source in sources:
        of_source = (text for c in read_chunks([source], reading, schema) for text in c.sequences)
        sequences += itertools.islice(of_source, each)
    if not sequences:
        raise InputError(f"{', '.join(sources)}: there is no usable sequence to plan for")
    return sequences[:most]


def _useful_flops(model: EsmConfig, batch: Batch) -> float:
    squared = sum(len(window) ** 2 for _, _, window in batch.places)
    return forward_flops(model, model.num_hidden_layers, batch.num_useful, squared)


def plan_finetuning(config: FinetuneConfig, topology: Topology) -> dict[str, Any]:
    """Plan fine-tuning: its steps, without evaluation; returns what `--json` prints.

    Raises:
        DeviceError: no TPU compiler here.
        ModelError: the model's configuration cannot be had.
    """
    model = _model_config(config)
    max_tokens = model.max_position_embeddings - FIRST_POSITION
    num_classes = list(_NUM_CLASSES)
    if config.train:
        from .training.run import prepare_data

        data = prepare_data(config)
        sequences, num_classes = data.train.sequences, list(data.space.num_classes)
    else:
        sequences = _sequences(EmbedConfig())
    num_tokens = np.diff(tokenize(sequences).offsets)
    rows = -(-config.batch_size // topology.num_cores) * topology.num_cores
    steps: dict[int, list[np.ndarray]] = defaultdict(list)
    for width, members in plan_epoch(num_tokens, max_tokens, config.batch_size, config.seed, 0):
        steps[width].append(members)

    def compile_step(width: int, gradient_checkpointing: bool) -> Compiled:
        how = "with" if gradient_checkpointing else "without"
        log.info("tracing and compiling %d rows of %d tokens %s checkpointing", rows, width, how)
        options = dataclasses.asdict(config) | {"gradient_checkpointing": gradient_checkpointing}
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
        totals.useful_tokens += int(sum(part.sum() for part in lengths))
        totals.computed_tokens += len(made) * rows * width
        # Forward, and backward through activations: the base has no weight gradients.
        useful = 2 * sum(
            forward_flops(
                model, model.num_hidden_layers, part.sum(), (part.astype(float) ** 2).sum()
            )
            for part in lengths
        )
        programs.append(Program(rows, width, 1, len(made), useful / len(made), compiled))
    # The widest step the other way: what checkpointing would save or cost.
    widest, other = programs[-1], not config.gradient_checkpointing
    twin = dataclasses.replace(widest, compiled=compile_step(widest.width, other))
    result = _about(config, config.train) | _summary(programs, topology, len(sequences), totals)
    return result | {
        "num_classes": num_classes,
        "gradient_checkpointing": config.gradient_checkpointing,
        "widest_otherwise": _line(twin, topology),
    }


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


def _line(program: Program, topology: Topology) -> dict[str, Any]:
    compiled = program.compiled
    return {
        "rows": program.rows,
        "tokens": program.width,
        "segments": program.segments,
        "batches": program.batches,
        "fits": compiled.peak_bytes is not None and compiled.peak_bytes <= topology.hbm_bytes,
        "error": compiled.error,
        "argument_gib": compiled.argument_bytes / GIB,
        "temporary_gib": compiled.temporary_bytes / GIB,
        "peak_gib": None if compiled.peak_bytes is None else compiled.peak_bytes / GIB,
        "peak_share": compiled.peak_bytes and compiled.peak_bytes / topology.hbm_bytes,
        "flops": compiled.flops,
        "flops_over_ideal": compiled.flops * topology.num_cores / program.useful_flops,
        "bytes": compiled.bytes_accessed,
        "collectives": compiled.collectives or {},
        "host_transfers": compiled.host_transfers,
        "compile_seconds": compiled.seconds,
    }


def _summary(
    programs: Sequence[Program], topology: Topology, num_sequences: int, totals: Totals
) -> dict[str, Any]:
    seconds, flops, useful = 0.0, 0.0, 0.0
    bottlenecks: dict[str, float] = defaultdict(float)
    for program in programs:
        compiled = program.compiled
        compute = compiled.flops / topology.peak_flops
        memory = compiled.bytes_accessed / topology.bandwidth
        least = max(compute, memory)
        seconds += program.batches * least
        bottlenecks["arithmetic" if compute >= memory else "memory"] += program.batches * least
        flops += program.batches * compiled.flops * topology.num_cores
        useful += program.batches * program.useful_flops
    lines = [_line(program, topology) for program in programs]
    fits = all(line["fits"] for line in lines)
    bound = 3600 * num_sequences / seconds if fits and seconds else None
    return {
        "topology": topology.name,
        "cores": topology.num_cores,
        "hbm_gib": topology.hbm_bytes / GIB,
        "peak_flops": topology.peak_flops,
        "bandwidth": topology.bandwidth,
        "sequences": num_sequences,
        "programs": lines,
        "fits": fits,
        "compile_seconds": sum(program.compiled.seconds for program in programs),
        "useful_token_fraction": totals.useful_fraction,
        "flops_over_ideal": flops / useful if fits else None,
        "sequences_per_hour_bound": bound,
        "utilisation": _UTILISATION,
        "sequences_per_hour": bound * _UTILISATION if bound else None,
        "bottleneck": max(bottlenecks, key=lambda key: bottlenecks[key]) if bottlenecks else None,
    }


def describe(result: dict[str, Any]) -> str:
    """The plan as people read it."""
    lengths = result["input"]
    lines = [
        f"{result['topology']}: {result['cores']} core(s) of {result['hbm_gib']:.0f} GiB; "
        f"{result['model']} in {result['dtype']}",
        f"{result['sequences']:,} sequences of "
        f"{lengths if isinstance(lengths, str) else ', '.join(lengths)}",
        *([result["reading"]] if "reading" in result else []),
        "the compiler's estimate, for one core and one batch (rows: over all cores):",
        f"{'rows x tokens':>14} {'batches':>8} {'fits':>5} {'args GiB':>8} {'temp GiB':>8} "
        f"{'peak GiB':>13} {'TFLOP':>7} {'/ideal':>7} {'GiB moved':>10} {'compile':>8}  "
        "collectives",
    ]
    lines += map(_describe_program, result["programs"])
    if (twin := result.get("widest_otherwise")) is not None:
        how = "without" if result["gradient_checkpointing"] else "with"
        lines.append(f"the widest {how} --gradient-checkpointing:\n{_describe_program(twin)}")
    lines.append(
        f"{len(result['programs'])} program(s), {result['compile_seconds']:.0f} s to compile here; "
        f"real tokens {result['useful_token_fraction']:.1%}"
        + (
            f"; {result['flops_over_ideal']:.2f} times the FLOPs they need"
            if result["fits"]
            else ""
        )
    )
    if result["sequences_per_hour_bound"]:
        lines.append(
            f"at most {result['sequences_per_hour_bound']:,.0f} sequences/h, bound by "
            f"{result['bottleneck']}; at {result['utilisation']:.0%} of that "
            f"{result['sequences_per_hour']:,.0f}"
        )
    else:
        remedy = {
            None: "--shard-parameters true",
            False: "--gradient-checkpointing true",
            True: "a smaller --batch-size with --accumulate",
        }[result.get("gradient_checkpointing")]
        lines.append(f"does not fit: take {remedy}, or a larger topology")
    return "\n".join(lines)


def _describe_program(item: dict[str, Any]) -> str:
    head = f"{item['rows']:>6} x {item['tokens']:<5} {item['batches']:>8}"
    if item["error"]:
        return f"{head} {'NO':>5}  {item['error']}"
    collectives = ", ".join(
        f"{count} {kind} ({size / 2**20:.1f} MiB)"
        for kind, (count, size) in item["collectives"].items()
    )
    return (
        f"{head} {'yes' if item['fits'] else 'NO':>5} "
        f"{item['argument_gib']:8.2f} {item['temporary_gib']:8.2f} "
        f"{item['peak_gib']:6.2f} ({item['peak_share']:4.0%}) {item['flops'] / 1e12:7.2f} "
        f"{item['flops_over_ideal']:7.2f} {item['bytes'] / GIB:10.1f} "
        f"{item['compile_seconds']:6.0f} s  {collectives or 'none'}"
        + (f"; {item['host_transfers']} host transfers" if item["host_transfers"] else "")
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; exit status 0 if all programs fit, 1 on an error, 3 if not."""
    parser = argparse.ArgumentParser(
        prog="python -m bioscan_xla.plan",
        description="Compile the programs of a run for a TPU that is not there. Further options "
        "are those of python -m bioscan_xla.embed or of launch/finetune.py, --config included.",
        epilog="Exit status: 0 if all programs fit, 3 if not, 1 after an error.",
    )
    parser.add_argument("job", choices=["embed", "finetune"])
    parser.add_argument("--topology", default="v5e-8", help=f"{', '.join(TOPOLOGIES)}")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options, rest = parser.parse_known_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    log.setLevel(logging.INFO)
    try:
        check_compiler()
        topology = find_topology(options.topology)
        if options.job == "embed":
            result = plan_embedding(parse(EmbedConfig, rest, parser.prog), topology)
        else:
            result = plan_finetuning(parse(FinetuneConfig, rest, parser.prog), topology)
    except BioscanError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(result, indent=1) if options.json else describe(result))
    return 0 if result["fits"] else 3


if __name__ == "__main__":
    sys.exit(main())
