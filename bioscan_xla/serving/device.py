"""The thread that owns the device.

Input: a token queue. Output: vectors for the tickets that wait in it.
Invariants: everything on the device is started and fetched by this thread; a batch is what embed
would compute, and a vector depends on its own sequence only; if a batch fails, each request in it
is tried alone, so that one cannot spoil another.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import numpy as np
import torch

from ..encode import runtime
from ..encode.encoder import Encoder
from ..encode.inference import accept, places_by_job, result_of
from ..encode.packing import Batch, Packer
from ..errors import first_line
from .metrics import Metrics
from .refusals import Refused
from .token_queue import Ticket, TokenQueue, Work

log = logging.getLogger(__name__)

_IN_FLIGHT = {"cpu": 1, "cuda": 2, "xla": 2}  # a CPU has computed a batch once it is started
_MANY_FAILURES = 3  # batches in a row
_SMOOTHING = 0.1


class DeviceThread:
    """Computes what waits in a queue until the queue is closed and empty."""

    def __init__(self, queue: TokenQueue, metrics: Metrics):
        """Start the thread."""
        self.queue, self.metrics = queue, metrics
        self.failures = 0
        self._in_flight: deque[tuple[Work, Batch, torch.Tensor, float]] = deque()
        self._thread = threading.Thread(target=self._run, name="device", daemon=True)
        self._thread.start()

    @property
    def is_well(self) -> bool:
        """False once the thread has ended or batch after batch failed."""
        return self._thread.is_alive() and self.failures < _MANY_FAILURES

    def close(self) -> None:
        """Finish what waits and end the thread."""
        self.queue.close()
        self._thread.join()

    def _run(self) -> None:
        while True:
            work = self.queue.take(wait=not self._in_flight)
            if work is not None:
                self._start(work)
            elif not self._in_flight:
                return
            while self._in_flight and (work is None or len(self._in_flight) >= self._most(work)):
                self._collect()

    def _most(self, work: Work) -> int:
        return _IN_FLIGHT[work.encoder.device.kind] if work.encoder is not None else 1

    def _start(self, work: Work) -> None:
        if work.call is not None:
            _settle(work.future, work.call)
            return
        encoder = work.encoder
        assert encoder is not None
        if work.batch is not None:
            batches = [work.batch]
        else:
            packer = Packer(encoder.layout)
            batches = [*packer.add(work.windows), *packer.flush()]
        for batch in batches:
            begun = time.perf_counter()
            try:
                result = encoder.encode(batch)
            except Exception as error:  # whatever a device can throw
                self._fail(work, batch, error)
                continue
            self._in_flight.append((work, batch, result, begun))

    def _collect(self) -> None:
        work, batch, result, begun = self._in_flight.popleft()
        assert work.encoder is not None
        try:
            values = runtime.fetch(result)
        except Exception as error:
            self._fail(work, batch, error)
            return
        self.failures = 0
        self._measure(work.encoder, batch, time.perf_counter() - begun)
        if work.batch is not None:
            _settle(work.future, lambda: values)
            return
        for number, places in places_by_job(batch).items():
            ticket = work.tickets[number]
            if ticket.place.left:
                continue
            accept(ticket.job, places, values, work.encoder.pooling)
            if not ticket.job.missing.any():
                _settle(ticket.future, partial(_vectors, ticket, work.encoder.pooling))

    def _measure(self, encoder: Encoder, batch: Batch, seconds: float) -> None:
        tokens = batch.num_useful
        rate = tokens / max(seconds, 1e-6)
        known = self.queue.tokens_per_second or rate
        self.queue.tokens_per_second = known + _SMOOTHING * (rate - known)
        self.metrics.count_batch(tokens, tokens / encoder.layout.batch_tokens, seconds)

    def _fail(self, work: Work, batch: Batch, error: Exception) -> None:
        log.error("a batch failed on the device: %s", first_line(error))
        tickets = [work.tickets[number] for number in places_by_job(batch) if work.tickets]
        if len(tickets) > 1:
            for number, places in places_by_job(batch).items():
                windows = [window for _, _, window in places]
                alone = {number: work.tickets[number]}
                self._start(Work(work.encoder, alone, windows))
            return
        self.failures += 1
        refused = Refused(
            500, "device_error", "the device failed on this request; try again, or report it"
        )
        for ticket in tickets:
            ticket.fail(refused)
        if work.batch is not None:
            work.future.set_exception(error)


def _vectors(ticket: Ticket, pooling: str) -> np.ndarray:
    return result_of(ticket.job, pooling)[1]


def _settle(future: "Future[Any]", function: Callable[[], Any]) -> None:
    """Give a future what a function returns or raises."""
    try:
        future.set_result(function())
    except InvalidStateError:  # the request has ended meanwhile
        pass
    except BaseException as error:  # raised again where it is waited for
        future.set_exception(error)


@dataclass(frozen=True)
class SharedEncoder(Encoder):
    """An encoder whose batches are computed by the device's thread, behind those of requests.

    For work of many batches: jobs, and the vectors of a reference.
    """

    queue: TokenQueue | None = None
    whole: Encoder | None = None

    def encode(self, batch: Batch) -> torch.Tensor:
        """Compute a batch; waits for it."""
        assert self.queue is not None
        assert self.whole is not None
        values: np.ndarray = self.queue.put_batch(self.whole, batch).result()
        return torch.from_numpy(values)


def share(encoder: Encoder, queue: TokenQueue) -> SharedEncoder:
    """The encoder for use on other threads than the device's."""
    values = {item.name: getattr(encoder, item.name) for item in fields(Encoder)}
    return SharedEncoder(**values, queue=queue, whole=encoder)
