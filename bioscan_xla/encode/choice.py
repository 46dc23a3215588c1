"""Which device a name means on this machine; nothing is opened.

Input: a device name (`auto`, `xla`, `cuda`, `cpu`). Output: a kind of device, and why it was taken.
Invariants: torch_xla is looked for, not imported.
"""

import importlib.util
import os
from pathlib import Path

import torch

from ..errors import ConfigError
from ..options import DEVICES

_TPU_PCI_DEVICES = ("0x0027", "0x005e", "0x0063", "0x006f", "0x0076")
"""v2 and v3, v4, v5e, v6e, 7x. Reference: torch_xla/_internal/tpu.py."""


def cpu_has_bfloat16() -> bool:
    """True if the processor multiplies bfloat16 natively (AVX512-BF16, AMX or Arm BF16)."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return any(word in flags for word in ("avx512_bf16", "amx_bf16", " bf16"))


def _has_tpu() -> bool:
    if importlib.util.find_spec("torch_xla") is None:
        return False
    named = os.environ.get("PJRT_DEVICE", "").upper()
    return named == "TPU" or (not named and has_tpu_chip())


def has_tpu_chip(devices: Path = Path("/sys/bus/pci/devices")) -> bool:
    """True if a TPU is attached; v5e and later may appear only under /dev/vfio, as others do."""
    if any(Path("/dev").glob("accel[0-9]*")):
        return True
    google = (path.parent for path in devices.glob("*/vendor") if path.read_text() == "0x1ae0\n")
    return any((chip / "device").read_text().strip() in _TPU_PCI_DEVICES for chip in google)


def choose(name: str) -> tuple[str, str]:
    """The kind of device that a name means on this machine, and why; nothing is opened."""
    if name not in DEVICES:
        raise ConfigError(f"device {name!r} is unknown; choose {', '.join(DEVICES)}")
    if name != "auto":
        return name, "as requested"
    if _has_tpu():
        return "xla", "a TPU was found"
    if torch.cuda.is_available():
        return "cuda", "a CUDA GPU was found, and no TPU"
    return "cpu", "neither a TPU nor a CUDA GPU was found"
