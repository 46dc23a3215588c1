"""Google's TPU compiler on a machine without a TPU. The only file that imports jax.

Input: a traced program and a topology. Output: what the compiler reports for each core.
Invariants: nothing is computed. It shows that a program compiles and fits; it measures no speed.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..encode.peaks import TPU_PEAK_FLOPS
from ..errors import ConfigError, DeviceError

GIB = 2**30
_NOT_INSTALLED = (
    "the TPU compiler is not installed ({}): pip install 'bioscan_xla[plan]', in a checkout "
    "pip install -e '.[plan]'; it exists for Linux on x86-64"
)


@dataclass(frozen=True)
class Topology:
    """A TPU slice.

    Attributes:
        name: as people call it.
        layout: as the compiler calls it.
        num_cores: devices that a program sees.
        hbm_bytes: memory of a core.
        peak_flops: of a core, bfloat16 FLOP/s.
        bandwidth: of a core's memory, bytes/s.
    """

    name: str
    layout: str
    num_cores: int
    hbm_bytes: int
    peak_flops: float
    bandwidth: float


# https://cloud.google.com/tpu/docs/system-architecture-tpu-vm; a v3 chip has two cores, a v4 chip
# is one device (megacore).
TOPOLOGIES = {
    item.name: item
    for item in (
        Topology("v3-8", "v3:2x2", 8, 16 * GIB, TPU_PEAK_FLOPS["v3"], 450e9),
        Topology("v4-8", "v4:2x2x1", 4, 32 * GIB, TPU_PEAK_FLOPS["v4"], 1228e9),
        Topology("v5e-1", "v5e:1x1", 1, 16 * GIB, TPU_PEAK_FLOPS["v5e"], 819e9),
        Topology("v5e-8", "v5e:2x4", 8, 16 * GIB, TPU_PEAK_FLOPS["v5e"], 819e9),
        Topology("v5e-16", "v5e:4x4", 16, 16 * GIB, TPU_PEAK_FLOPS["v5e"], 819e9),  # four hosts
        Topology("v6e-8", "v6e:2x4", 8, 32 * GIB, TPU_PEAK_FLOPS["v6e"], 1640e9),
    )
}

_COLLECTIVE = re.compile(
    r"= (\(?[a-z0-9]+\[[^=]*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)"
    r"(?:-start)?\("
)
_HOST = re.compile(r" (?:infeed|outfeed)\(| (?:send|recv)\(.*is_host_transfer=true|\"MoveToHost\"")
_COMMENT = re.compile(r"/\*.*?\*/")
_ARRAY = re.compile(r"(pred|[a-z]+\d+)\[([\d,]*)\]")


@dataclass(frozen=True)
class Compiled:
    """What the compiler says of a program on one core.

    Attributes:
        seconds: to compile, on this machine.
        argument_bytes: weights and inputs.
        temporary_bytes: live at once besides arguments and results.
        peak_bytes: all together; None where it does not fit.
        flops: floating-point operations of a core.
        bytes_accessed: read and written in its memory.
        collectives: number and bytes of results of each kind, {kind: (count, bytes)}.
        host_transfers: transfers to or from the host inside the program.
        error: why it does not compile or fit; empty if it does.
    """

    seconds: float
    argument_bytes: int = 0
    temporary_bytes: int = 0
    peak_bytes: int | None = None
    flops: float = 0.0
    bytes_accessed: float = 0.0
    collectives: dict[str, tuple[int, int]] | None = None
    host_transfers: int = 0
    error: str = ""


def find_topology(name: str) -> Topology:
    """A topology by its name; ConfigError where it is unknown."""
    if name not in TOPOLOGIES:
        raise ConfigError(f"topology {name!r} is unknown; choose one of {', '.join(TOPOLOGIES)}")
    return TOPOLOGIES[name]


def check_compiler() -> None:
    """DeviceError where the compiler is not installed, before anything is traced for it."""
    missing = [name for name in ("jax", "libtpu") if importlib.util.find_spec(name) is None]
    if missing:
        raise DeviceError(_NOT_INSTALLED.format(f"no {' and no '.join(missing)}"))


def compile_for(
    program: bytes,
    topology: Topology,
    batch_rows: int,
    shard_parameters: bool = False,
    in_place: bool = False,
) -> Compiled:
    """Compile a program that was traced on one device for all cores of a topology.

    In a process of its own: the compiler keeps gigabytes until its process ends.

    Args:
        program: serialized HloModuleProto.
        topology: what for.
        batch_rows: integer matrices with so many rows are the batch, divided over the cores;
            all else is replicated.
        shard_parameters: divide large weights over the cores too.
        in_place: results take the place of arguments of the same type, as in a training step.

    Raises:
        DeviceError: the compiler is not installed, or does not run on this platform.
    """
    options = (topology.name, batch_rows, shard_parameters, in_place)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "program").write_bytes(program)
        Path(folder, "options.json").write_text(json.dumps(options))
        done = subprocess.run(
            [sys.executable, "-m", __name__, folder], capture_output=True, text=True, check=False
        )
        said = Path(folder, "said.json")
        if not said.is_file():
            how = done.stderr.strip()[-800:] or "killed; is there enough memory (16 GiB)?"
            raise DeviceError(f"the TPU compiler ended with status {done.returncode}: {how}")
        result = json.loads(said.read_text())
    if "device_error" in result:
        raise DeviceError(result["device_error"])
    kinds = (result["collectives"] or {}).items()
    return Compiled(**result | {"collectives": {kind: tuple(pair) for kind, pair in kinds}})


def _compile(
    program: bytes, topology: Topology, batch_rows: int, shard_parameters: bool, in_place: bool
) -> Compiled:
    jax, ir, xla_client, mlir = _import_compiler()
    from jax.experimental import topologies

    try:
        # A compiler alone takes no lock and asks no metadata server.
        target = topologies.get_topology_desc(
            platform="tpu", topology_name=topology.layout, **_chips(topology)
        )
    except Exception as error:
        raise DeviceError(
            f"the TPU compiler did not start for {topology.name} ({error})"
        ) from error
    cores: list[Any] = target.devices
    if len(cores) != topology.num_cores:
        raise DeviceError(
            f"the TPU compiler sees {len(cores)} devices in {topology.name}, which has "
            f"{topology.num_cores}; install the release that bioscan_xla[plan] names"
        )
    context = mlir.make_ir_context()
    with context, ir.Location.unknown(context):
        module = ir.Module.parse(xla_client._xla.mlir.hlo_to_stablehlo(program), context=context)
        _annotate(ir, module, topology.num_cores, batch_rows, shard_parameters, in_place)
        code = mlir.module_to_bytecode(module)
    options = xla_client.CompileOptions()
    options.num_replicas, options.num_partitions = 1, topology.num_cores
    build = options.executable_build_options
    build.num_replicas, build.num_partitions = 1, topology.num_cores
    build.use_spmd_partitioning, build.use_shardy_partitioner = True, False
    build.device_assignment = xla_client.DeviceAssignment.create(
        np.array([core.id for core in cores]).reshape(1, topology.num_cores)
    )
    start = time.monotonic()
    try:
        executable = cores[0].client.compile(
            code, executable_devices=xla_client.DeviceList(tuple(cores)), compile_options=options
        )
    except jax.errors.JaxRuntimeError as error:
        return Compiled(time.monotonic() - start, error=str(error).split("\n")[0][:300])
    seconds = time.monotonic() - start
    return _read_figures(executable, seconds)


def _read_figures(executable: Any, seconds: float) -> Compiled:
    cost = executable.cost_analysis()
    cost = cost[0] if isinstance(cost, list) else cost
    memory = executable.get_compiled_memory_stats()
    text = executable.hlo_modules()[0].to_string()
    peak = getattr(memory, "peak_memory_in_bytes", 0) or (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )
    return Compiled(
        seconds=seconds,
        argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        peak_bytes=peak,
        flops=float(cost.get("flops", 0.0)),
        bytes_accessed=float(cost.get("bytes accessed", 0.0)),
        collectives=find_collectives(text),
        host_transfers=len(_HOST.findall(text)),
    )


def find_collectives(text: str) -> dict[str, tuple[int, int]]:
    """Number and bytes of the collectives in a compiled program's text, by kind."""
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for shapes, kind in _COLLECTIVE.findall(_COMMENT.sub("", text)):
        counts[kind] += 1
        sizes[kind] += sum(_num_bytes(*array) for array in _ARRAY.findall(shapes))
    return {kind: (counts[kind], sizes[kind]) for kind in sorted(counts)}


def _num_bytes(dtype: str, shape: str) -> int:
    bits = 8 if dtype == "pred" else int(re.sub(r"\D", "", dtype))
    return int(np.prod([int(n) for n in shape.split(",") if n], dtype=np.int64)) * bits // 8


def _chips(topology: Topology) -> dict[str, Any]:
    """Compiler settings besides the layout."""
    if topology.num_cores == 1:
        return {"chips_per_host_bounds": [1, 1, 1]}
    return {"chip_config_name": "megacore"} if topology.layout.startswith("v4") else {}


def _import_compiler() -> tuple[Any, Any, Any, Any]:
    os.environ["JAX_PLATFORMS"] = "cpu"
    quiet = {"TPU_SKIP_MDS_QUERY": "1", "TPU_MIN_LOG_LEVEL": "3", "TF_CPP_MIN_LOG_LEVEL": "3"}
    # It is a compiler here, not a worker of a slice.
    quiet |= {"TPU_ACCELERATOR_TYPE": "v5litepod-8", "TPU_WORKER_HOSTNAMES": "localhost"}
    quiet["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    for key, value in quiet.items():
        os.environ.setdefault(key, value)
    try:
        import jax
        import libtpu  # noqa: F401
        from jax._src.interpreters import mlir
        from jax._src.lib import xla_client
        from jax._src.lib.mlir import ir
    except ImportError as error:
        raise DeviceError(_NOT_INSTALLED.format(error)) from error
    return jax, ir, xla_client, mlir


def _annotate(
    ir: Any, module: Any, cores: int, batch_rows: int, shard_parameters: bool, in_place: bool
) -> None:
    """Say how arguments are divided: the batch by rows, weights whole or by their first axis."""
    main = next(
        item
        for item in module.body.operations
        if item.operation.name == "func.func"
        and ir.StringAttr(item.attributes["sym_name"]).value == "main"
    )
    attributes = []
    results = list(main.type.results) if in_place else []
    for kind in main.type.inputs:
        array = ir.RankedTensorType(kind)
        shape, element = list(array.shape), str(array.element_type)
        is_batch = element.startswith(("i", "ui")) and len(shape) == 2 and shape[0] == batch_rows
        is_weight = shard_parameters and len(shape) == 2 and shape[0] % cores == 0
        divided = is_batch or (is_weight and not element.startswith("i"))
        words = f"{{devices=[{cores},1]<=[{cores}]}}" if divided and cores > 1 else "{replicated}"
        said = {"mhlo.sharding": ir.StringAttr.get(words)}
        if shape and element == "f32" and kind in results:
            number = results.index(kind)
            results[number] = None
            integer = ir.IntegerType.get_signless(32)
            said["tf.aliasing_output"] = ir.IntegerAttr.get(integer, number)
        attributes.append(ir.DictAttr.get(said))
    main.attributes["arg_attrs"] = ir.ArrayAttr.get(attributes)
    whole = ir.DictAttr.get({"mhlo.sharding": ir.StringAttr.get("{replicated}")})
    main.attributes["res_attrs"] = ir.ArrayAttr.get([whole for _ in main.type.results])


def _main() -> None:
    """What the process of `compile_for` does; argument: its folder."""
    folder = Path(sys.argv[1])
    name, *options = json.loads((folder / "options.json").read_text())
    try:
        compiled = _compile((folder / "program").read_bytes(), find_topology(name), *options)
        result = asdict(compiled)
    except DeviceError as error:
        result = {"device_error": str(error)}
    (folder / "said.json").write_text(json.dumps(result))


if __name__ == "__main__":
    _main()
