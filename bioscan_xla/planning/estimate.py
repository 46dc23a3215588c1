"""The totals of the compiled programs of a run, as figures and as text.

Input: compiled programs. Output: what `--json` prints, or a table. Invariants: if a program
does not fit, there are no figures of speed.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from ..encode.packing import Totals
from .compiler import GIB, Compiled, Topology

_UTILISATION = 0.6


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


def describe_numbers(program: Program, topology: Topology) -> dict[str, Any]:
    """One program's figures, as `--json` prints them."""
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


def summarise(
    programs: Sequence[Program], topology: Topology, num_sequences: int, totals: Totals
) -> dict[str, Any]:
    """All programs together: whether they fit, and the speed that the compiler's figures allow."""
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
    lines = [describe_numbers(program, topology) for program in programs]
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
    """The plan as text."""
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
    evaluation = result.get("evaluation")
    if evaluation is not None:
        lines.append(f"an evaluation of {evaluation['sequences']:,} sequences:")
        lines += map(_describe_program, evaluation["programs"])
        seconds, tokens = evaluation["compile_seconds"], evaluation["useful_token_fraction"]
        lines.append(
            f"{len(evaluation['programs'])} program(s), {seconds:.0f} s to compile here; "
            f"real tokens {tokens:.1%}"
        )
    if result["sequences_per_hour_bound"] and result["fits"]:
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
