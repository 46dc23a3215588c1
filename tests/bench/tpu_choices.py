"""The choices behind embedding on a TPU, by what Google's compiler says of each.

`python tests/bench/tpu_choices.py [--topology v5e-8] [--only batch]` compiles the embedding program
of Nucleotide Transformer 2.5B in bfloat16 for rows of 1,024 and 512 tokens with one thing
changed at a time, and prints a line each: memory, operations and bytes of a core for each token
slot, collectives, compile time, and the most sequences of 658 bp (112 tokens) an hour that its
arithmetic and memory allow. Nothing is computed and no speed is measured. Needs bioscan_xla[plan].
"""

import argparse
import os
import sys

from bioscan_xla.encode.architecture import esm_config
from bioscan_xla.encode.packing import layout
from bioscan_xla.planning.compiler import GIB, compile_for, find_topology
from bioscan_xla.planning.programs import trace

SEQUENCE_TOKENS = 112


def use_flash_attention():
    """Have the model attend by torch_xla's Pallas kernel, which knows segments."""
    import jax
    import jax.experimental.pallas.ops.tpu.flash_attention
    import numpy as np
    import torch
    import torch_xla.distributed.spmd as xs
    import torch_xla.runtime as xr
    from jax._src.interpreters.mlir import LoweringParameters
    from torch_xla.experimental import custom_kernel
    from transformers import AttentionInterface

    from bioscan_xla.encode import attention

    def trace_for_tpu(kernel, *given, static_argnums=None, static_argnames=None, **more):
        # As torch_xla's own, which lowers for the device that is there.
        described = [
            custom_kernel.to_jax_shape_dtype_struct(x) if torch.is_tensor(x) else x for x in given
        ]
        more.pop("use_cache", None)
        function = jax.jit(kernel, static_argnums=static_argnums, static_argnames=static_argnames)
        # For export: in the version of the kernel language that the compiler beside it reads.
        module = function.trace(*described, **more).lower(
            lowering_platforms=("tpu",), _private_parameters=LoweringParameters(for_export=True)
        )
        payload = custom_kernel._extract_backend_config(module.compiler_ir())
        return payload, [x for x in given if torch.is_tensor(x)]

    custom_kernel.trace_pallas = trace_for_tpu
    xr.use_spmd()
    count = xr.global_runtime_device_count()
    mesh = xs.Mesh(np.arange(count), (count,), ("data",))

    def flash(module, query, key, value, attention_mask, segments=None, scaling=None, **_):
        # Each core runs the kernel on its own rows; without the specification all are gathered.
        states = custom_kernel.flash_attention(
            query,
            key,
            value,
            False,
            segments,
            segments,
            scaling,
            partition_spec=("data", None, None, None) if mesh.size() > 1 else None,
            mesh=mesh,
        )
        return states.transpose(1, 2), None

    AttentionInterface.register(attention.NAME, flash)


def report(name, topology, rows, width, command=None, shard=False):
    """Compile one form and print its line."""
    segments = layout("xla", topology.num_cores).max_segments * width // 1024
    more = {"command": command} if command else {}
    program = trace(
        "embed",
        esm_config(2560, 32, 20),
        "bfloat16",
        (rows, width, segments),
        pooling="mean",
        **more,
    )
    made = compile_for(program, topology, rows, shard)
    if made.peak_bytes is None:
        print(f"{name:34} does not compile: {made.error}", flush=True)
        return
    tokens = rows * width / topology.num_cores
    seconds = max(made.flops / topology.peak_flops, made.bytes_accessed / topology.bandwidth)
    rate = topology.num_cores * tokens / SEQUENCE_TOKENS / seconds * 3600
    bound = "arithmetic" if made.flops / topology.peak_flops >= seconds else "memory"
    collectives = ", ".join(f"{n} {kind}" for kind, (n, _) in (made.collectives or {}).items())
    print(
        f"{name:34} {made.peak_bytes / GIB:6.2f} GiB  {made.flops / tokens / 1e9:6.2f} GFLOP  "
        f"{made.bytes_accessed / tokens / 2**20:6.2f} MiB a token  {made.seconds:4.0f} s  "
        f"{rate:12,.0f}/h, {bound}  {collectives or 'none'}",
        flush=True,
    )


def main():
    """Print a line for each choice."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--topology", default="v5e-8")
    parser.add_argument("--only", choices=["batch", "sharding", "attention"])
    options = parser.parse_args()
    topology = find_topology(options.topology)
    cores = topology.num_cores
    print(f"{topology.name}, by the compiler's estimate", flush=True)
    if options.only in (None, "batch"):
        for each in (2, 4, 8, 16):
            report(f"{each} rows of 1,024 a core", topology, each * cores, 1024)
        report("16 rows of 512 a core", topology, 16 * cores, 512)
        report("32 rows of 256 a core", topology, 32 * cores, 256)
    if options.only in (None, "sharding") and cores > 1:
        report("8 rows, parameters sharded", topology, 8 * cores, 1024, shard=True)
    if options.only in (None, "attention"):
        command = (__file__, "--trace-flash", str(cores))
        report("8 rows of 1,024, flash attention", topology, 8 * cores, 1024, command)
        report("16 rows of 512, flash attention", topology, 16 * cores, 512, command)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--trace-flash"]:
        os.environ["CPU_NUM_DEVICES"] = sys.argv[2]
        from bioscan_xla.planning import trace as trace_program

        use_flash_attention()
        sys.argv = sys.argv[2:]
        trace_program.main()
    else:
        main()
