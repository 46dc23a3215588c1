"""Results of a device on their way to the host.

Input: what a device computes. Output: what `runtime.fetch` turns into an array.
Invariants: nothing here waits for the device.
"""

from dataclasses import dataclass
from typing import Any

import torch

from . import runtime


@dataclass(frozen=True)
class OnItsWay:
    """A result that a GPU copies to pinned memory: it is there once `copied` has happened."""

    values: torch.Tensor
    copied: Any

    def cpu(self) -> torch.Tensor:
        """Wait for the copy; the result on the host."""
        self.copied.synchronize()
        return self.values


def send_back(device: runtime.Device, result: torch.Tensor) -> Any:
    """Start computing a result that will be fetched later: a tensor, or what stands for it.

    On CUDA its copy to the host is queued at once. Queued when it is fetched, it would wait for all
    batches that were started in the meantime.
    """
    result = runtime.launch(device, result)
    if device.kind != "cuda":
        return result
    values = torch.empty(result.shape, dtype=result.dtype, pin_memory=True)
    values.copy_(result, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()
    return OnItsWay(values, copied)
