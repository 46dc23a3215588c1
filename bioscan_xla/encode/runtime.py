"""The device: open it, put arrays on it, fetch results. The only file that imports torch_xla.

Input: a device name (`auto`, `xla`, `cuda`, `cpu`) and numpy arrays. Output: a `Device` record and
numpy arrays. Invariants: XLA runs as one process per host with an SPMD mesh over all devices of the
host or the slice; the first axis of an array is divided over the mesh axis `data`; fetching
compiles nothing.
"""

import atexit
import ctypes
import functools
import logging
import os
import platform
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import ConfigError, DeviceError
from .choice import choose, cpu_has_bfloat16
from .peaks import TPU_NAMES, TPU_PEAK_FLOPS

log = logging.getLogger(__name__)

_SLOW_FLOPS = 20e9  # a large product would take a second; some CPUs lack a type
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "int8": torch.float32}
"""Type of weights and activations by name; with int8, of all but the linear layers."""


@dataclass(frozen=True)
class Device:
    """An opened device.

    Attributes:
        kind: `cpu`, `cuda` or `xla`.
        torch_device: where tensors live.
        dtype: dtype of the weights and activations.
        mesh: the SPMD mesh on XLA, else None.
        num_devices: how many devices the batch is divided over.
        why: one line that says why this device was chosen.
        process_index: which host of a TPU slice this is.
        process_count: hosts of the slice that compute together.
        is_int8: the linear layers multiply int8.
    """

    kind: str
    torch_device: torch.device
    dtype: torch.dtype
    mesh: Any
    num_devices: int
    why: str
    process_index: int = 0
    process_count: int = 1
    is_int8: bool = False

    @property
    def dtype_name(self) -> str:
        """`bfloat16`, `float32` or `int8`."""
        return "int8" if self.is_int8 else str(self.dtype).removeprefix("torch.")


def open_device(
    name: str = "auto", dtype: str | None = None, *, whole_slice: bool = False
) -> Device:
    """Open a device.

    Args:
        name: `auto` (TPU, then CUDA, then CPU), `xla`, `cuda` or `cpu`.
        dtype: `bfloat16`, `float32`, or `int8` (linear layers, inference, CPU only; `auto` then
            means the CPU); None uses bfloat16 on XLA and CUDA, and on a CPU that multiplies it
            natively.
        whole_slice: the caller runs the same steps on every host of a TPU slice; the hosts are
            joined by a gloo process group of torch.distributed.

    Raises:
        ConfigError: an unknown name or dtype.
        DeviceError: the device is not usable on this machine; the message says why.
    """
    kind, why = choose(name)
    if dtype == "int8" and name == "auto":
        kind, why = "cpu", "int8 needs one"
    if dtype is None:
        dtype = "bfloat16" if kind != "cpu" or cpu_has_bfloat16() else "float32"
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is unknown; choose {', '.join(DTYPES)}")
    if dtype == "int8" and kind != "cpu":
        raise ConfigError(
            f"dtype int8 is computed on CPUs only, and the device is {kind}; use bfloat16 there"
        )
    if kind == "xla":
        device = _open_xla(DTYPES[dtype], why, whole_slice)
    elif kind == "cuda":
        if not torch.cuda.is_available():
            raise DeviceError("no usable CUDA GPU here; use --device cpu or --device auto")
        device = Device(kind, torch.device("cuda"), DTYPES[dtype], None, 1, why)
    else:
        is_int8 = dtype == "int8"
        device = Device(kind, torch.device("cpu"), DTYPES[dtype], None, 1, why, is_int8=is_int8)
    log.info("computing on %s in %s: %s", _words(device), dtype, why)
    return device


def _words(device: Device) -> str:
    if device.kind == "xla":
        return f"{device.num_devices} XLA device{'s' if device.num_devices > 1 else ''}"
    return "a CUDA GPU" if device.kind == "cuda" else "the CPU"


def _open_xla(dtype: torch.dtype, why: str, whole_slice: bool) -> Device:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # the compiler warns about every fusion
    try:
        import torch_xla
        import torch_xla.backends
        import torch_xla.distributed.spmd as xs
        import torch_xla.runtime as xr
    except ImportError as error:
        raise DeviceError(
            f"torch_xla cannot be imported ({error}); it exists for Linux on x86-64 and pairs with "
            "the torch of the same version. Use --device cpu or cuda elsewhere"
        ) from error
    try:
        xr.use_spmd()  # must come before anything touches a device
        is_first = not torch_xla._XLAC._xla_computation_cache_is_initialized()
        if os.environ.get("PJRT_DEVICE", "").upper() != "CPU" and is_first:
            # The CPU backend can write this cache but not read it back. It is set once per process.
            cache = os.environ.get("XLA_CACHE_DIR") or str(Path.home() / ".cache/bioscan_xla/xla")
            xr.initialize_cache(cache, readonly=False)
        hosts = xr.process_count()
        if hosts > 1 and not whole_slice:
            # Each host would supply its own batch where SPMD expects a shared one: wrong vectors.
            raise DeviceError(
                f"this host is one of {hosts} of a TPU slice, but each host embeds "
                "by itself; use slices of one host (v5e-8: ct5lp-hightpu-8t, 2x4) and share the "
                "input by --process-index and --process-count, or by --engine ray"
            )
        count = xr.global_runtime_device_count()
        mesh = xs.Mesh(np.arange(count), (count,), ("data",))
        if dtype == torch.float32:
            torch_xla.backends.set_mat_mul_precision("highest")  # the default is bfloat16
        if hosts > 1 and not torch.distributed.is_initialized():
            import torch_xla.distributed.xla_backend  # registers xla://

            # Each host may have to download the model before it responds.
            patience = timedelta(hours=2)
            torch.distributed.init_process_group("gloo", "xla://", patience)
            # Otherwise its threads outlive the interpreter and sometimes abort the process.
            atexit.register(torch.distributed.destroy_process_group)
        return Device("xla", torch_xla.device(), dtype, mesh, count, why, xr.process_index(), hosts)
    except DeviceError:
        raise
    except RuntimeError as error:
        raise DeviceError(
            f"XLA did not start ({error}); is another process holding the TPU? "
            "PJRT_DEVICE=CPU runs the same programs on this machine's processor"
        ) from error


def keep_large_buffers() -> None:
    """Ask glibc to keep large freed buffers, so that activations do not page-fault again.

    For inference on a CPU, whose batches are all alike; those of training are not, and would
    fragment the heap to three times the size.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    m_trim_threshold, m_mmap_threshold = -1, -3  # malloc.h
    libc.mallopt(m_mmap_threshold, 1 << 30)
    libc.mallopt(m_trim_threshold, 2 << 30)


def enable_gradient_checkpointing(device: Device, module: torch.nn.Module) -> None:
    """Have a Hugging Face model compute activations again in the backward pass.

    On XLA the compiler optimises the library's own version away, but not torch_xla's.
    """
    module.gradient_checkpointing_enable({"use_reentrant": device.kind == "xla"})  # type: ignore[operator]
    if device.kind == "xla":
        from torch_xla.utils.checkpoint import checkpoint

        # preserve_rng_state stays on: without it dropout replays differently.
        part: Any
        for part in module.modules():
            if hasattr(part, "_gradient_checkpointing_func"):
                part._gradient_checkpointing_func = functools.partial(
                    checkpoint, use_reentrant=True
                )


def shard_parameters(device: Device, module: torch.nn.Module) -> None:
    """Divide each parameter over the mesh along its first dimension, if it divides evenly."""
    if device.kind != "xla":
        raise ConfigError(f"shard_parameters needs an XLA mesh, and the device is {device.kind}")
    import torch_xla.distributed.spmd as xs

    for parameter in module.parameters():
        if parameter.ndim > 1 and parameter.shape[0] % device.num_devices == 0:
            xs.mark_sharding(parameter, device.mesh, ("data", *(None,) * (parameter.ndim - 1)))


def put(device: Device, array: np.ndarray) -> torch.Tensor:
    """Start moving an array to the device; on XLA its first axis is divided over the mesh.

    On a slice of several hosts each passes the whole array, and its own devices take their part.
    """
    tensor = torch.from_numpy(array)
    if device.kind == "cpu":
        return tensor
    if device.kind == "cuda":
        return tensor.pin_memory().to(device.torch_device, non_blocking=True)
    import torch_xla.distributed.spmd as xs

    tensor = tensor.to(device.torch_device)
    xs.mark_sharding(tensor, device.mesh, ("data", *(None,) * (tensor.ndim - 1)))
    return tensor


def launch(device: Device, result: torch.Tensor) -> torch.Tensor:
    """Start computing `result` without waiting for it; ends one step of the program."""
    if device.kind == "xla":
        import torch_xla
        import torch_xla.distributed.spmd as xs

        # Replicated inside the program: fetching a sharded tensor compiles a gather every time.
        xs.mark_sharding(result, device.mesh, (None,) * result.ndim)
        torch_xla.sync()
    return result


def traced_program(tensors: Sequence[torch.Tensor]) -> bytes:
    """The program that would compute these XLA tensors, a serialized HloModuleProto; not run."""
    import torch_xla

    return torch_xla._XLAC._get_xla_tensors_hlo_proto(list(tensors))


def fetch(result: torch.Tensor) -> np.ndarray:
    """Wait for a launched result and bring it to the host."""
    return result.cpu().numpy()


def random_state(device: Device) -> dict[str, torch.Tensor]:
    """State of the random generators that a step on this device draws from."""
    state = {"cpu": torch.get_rng_state()}
    if device.kind == "cuda":
        state["cuda"] = torch.cuda.get_rng_state()
    elif device.kind == "xla":
        import torch_xla.core.xla_model as xm

        state["xla"] = torch.from_numpy(np.array(xm.get_rng_state(), np.uint64))
    return state


def set_random_state(device: Device, state: dict[str, torch.Tensor]) -> bool:
    """Restore what `random_state` returned; False if it is of another kind of device."""
    if not {"cpu", device.kind} <= state.keys():
        return False
    torch.set_rng_state(state["cpu"])
    if device.kind == "cuda":
        torch.cuda.set_rng_state(state["cuda"])
    elif device.kind == "xla":
        import torch_xla.core.xla_model as xm

        xm.set_rng_state(int(state["xla"].numpy()))
    return True


@functools.cache
def peak_flops(device: Device) -> float | None:
    """Peak FLOP/s of all devices: a TPU's from its data sheet, else of a large product.

    None if unknown.
    """
    if device.kind == "xla":
        import torch_xla.runtime as xr

        if xr.device_type() != "TPU":
            return None
        kind = str(xr.global_runtime_device_attributes()[0].get("device_kind", "")).lower()
        names = [name for name in (*TPU_PEAK_FLOPS, *TPU_NAMES) if name in kind]
        if not names:
            return None
        longest = max(names, key=len)
        return TPU_PEAK_FLOPS[TPU_NAMES.get(longest, longest)] * device.num_devices
    small = _flops_of_product(device, 512)
    if device.kind == "cpu" and small < _SLOW_FLOPS:
        return small
    return _flops_of_product(device, 2048 if device.kind == "cpu" else 8192)


def _flops_of_product(device: Device, size: int) -> float:
    """FLOP/s of the best of four products of square matrices."""
    # A separate generator: dropout must not depend on whether this was called.
    random = torch.Generator(device.torch_device).manual_seed(0)
    a = torch.randn(size, size, dtype=device.dtype, device=device.torch_device, generator=random)
    multiply = torch._int_mm if device.is_int8 else torch.mm
    if device.is_int8:
        a = a.to(torch.int8)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        multiply(a, a)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def memory_bytes(device: Device) -> int | None:
    """Peak memory in use, in bytes; None if the device does not report it.

    On a CPU it is this process's, on CUDA what torch has allocated, on XLA one core's.
    """
    if device.kind == "cuda":
        return torch.cuda.max_memory_allocated()
    if device.kind == "cpu":
        kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return kilobytes if platform.system() == "Darwin" else 1024 * kilobytes
    import torch_xla.core.xla_model as xm

    try:
        found: dict[str, Any] = dict(xm.get_memory_info(torch.device("xla:0")))
    except RuntimeError:
        return None
    return found.get("peak_bytes_used", found.get("bytes_used"))


def counters(device: Device) -> dict[str, int]:
    """Number of programs compiled and of operations that fell back to the host, so far."""
    if device.kind != "xla":
        return {"compiles": 0, "host_fallbacks": 0}
    import torch_xla.debug.metrics as met

    compiled = met.metric_data("CompileTime")
    fallbacks = sum(met.counter_value(n) for n in met.counter_names() if n.startswith("aten::"))
    return {"compiles": compiled[0] if compiled else 0, "host_fallbacks": fallbacks}
