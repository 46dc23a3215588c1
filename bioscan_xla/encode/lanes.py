"""Batches side by side on a CPU: one thread a core, each with a batch of its own.

Input: what computes a batch. Output: futures of its results. Invariants: torch has as many threads
as before once the lanes are closed; an error in a lane is raised where its result is asked for.

All cores on one batch wait for each other after every layer; with a batch each they never do.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from .packing import Batch


class Lanes:
    """Computes batches one by one, or side by side on a CPU with several threads."""

    def __init__(self, kind: str, compute: Callable[[Batch], torch.Tensor]):
        """Start nothing yet.

        Args:
            kind: of device.
            compute: starts or does the computation of a batch.
        """
        self.count = torch.get_num_threads() if kind == "cpu" else 1
        self._compute = compute
        self._pool: ThreadPoolExecutor | None = None

    def start(self, batch: Batch, *, side_by_side: bool) -> Any:
        """The result of a batch, or with `side_by_side` its future.

        Nothing may be computing side by side when a batch is not.
        """
        if not side_by_side or self.count == 1:
            return self._compute(batch)
        if self._pool is None:
            # For torch this is a setting of the thread; for MKL, of the process until `close`.
            self._pool = ThreadPoolExecutor(self.count, "lane", torch.set_num_threads, (1,))
        return self._pool.submit(self._compute, batch)

    def close(self) -> None:
        """Finish what was begun, and give torch its threads back."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
            torch.set_num_threads(self.count)


def result(value: Any) -> torch.Tensor:
    """What `Lanes.start` promised."""
    return value.result() if isinstance(value, Future) else value
