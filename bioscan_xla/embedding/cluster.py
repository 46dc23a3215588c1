"""Chunks over the workers of a Ray cluster: `--engine ray` runs it in place of `pipeline.run`.

Input: a store and chunks of records. Output: rows in the table, and the outcome. Invariants: only
the driver reads, checks and commits, so rows and rejections are those of one process; workers
compute vectors and write them as Lance fragments that no version of the table refers to until the
driver commits them; if a worker dies, another computes its chunk, and fragments that the dead one
left are never committed; the number of chunks in progress is bounded.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.exceptions import RayActorError, RayTaskError

from ..encode.encoder import forward_flops
from ..encode.fingerprint import compare, describe
from ..encode.packing import Totals
from ..errors import BioscanError, ConfigError, DeviceError
from ..reads.records import Chunk
from ..table.store import Store
from .pipeline import limited
from .ray_nodes import find_resources, join_cluster
from .threads import Outcome, Part, Reader, Writer
from .worker import Computed, Description, Worker

log = logging.getLogger(__name__)

_IN_FLIGHT = 2  # chunks a worker has: one on the device, one being tokenized or written
_ATTEMPTS = 5  # workers that may die over one chunk, or starts of one worker that may fail
_START_SECONDS = 120.0  # a worker that fails to start for so long is abandoned
_POLL_SECONDS = 0.2
_WARN_SECONDS = 60.0


@dataclass
class _Member:
    """A worker as the driver sees it."""

    actor: Any
    number: int
    ready: bool = False
    busy: int = 0  # chunks given to it
    down_since: float = field(default_factory=time.monotonic)
    failed_starts: int = 0
    compiles: int = 0


@dataclass
class _Task:
    """A chunk in progress; `chunk` None asks the worker to describe itself."""

    member: _Member
    chunk: Chunk | None = None
    deaths: int = 0


@dataclass
class Workers:
    """The workers of one run, and what is true of all of them.

    Attributes:
        kind: `cpu`, `cuda` or `xla`.
        dtype: see `runtime.open_device`.
        count: how many workers there should be.
        hidden: length of a vector.
        fingerprint: all that decides what a vector is.
    """

    kind: str
    dtype: str | None
    count: int
    _request: dict[str, Any]
    _threads: int
    _owns_cluster: bool
    hidden: int = 0
    fingerprint: dict[str, str] = field(default_factory=dict)
    _members: list[_Member] = field(default_factory=list)
    _tasks: dict[Any, _Task] = field(default_factory=dict)
    _again: deque[_Task] = field(default_factory=deque)
    _first: Description | None = None

    @classmethod
    def connect(cls, device: str, dtype: str | None, count: int | None) -> "Workers":
        """Join the cluster of this host or the one that RAY_ADDRESS names, else start one here.

        Args:
            device: `auto` (TPU, then GPU, then CPU, as the cluster has them) or one of these.
            dtype: see `runtime.open_device`.
            count: how many workers; None takes one for each TPU host, each GPU, or each CPU host.

        Raises:
            ConfigError: no cluster answers, or it has no such device.
        """
        owns = not ray.is_initialized()
        if owns:
            join_cluster()
        kind, options, threads, found = find_resources(device, count)
        return cls(kind, dtype, count or found, options, threads, owns)

    def load(self, model: str, **options: Any) -> "Workers":
        """Start the workers and wait for the first; the others join when they are ready.

        Args:
            model: see `load_encoder`.
            **options: as `load_encoder` takes them.

        Raises:
            ModelError: the model cannot be loaded on a worker.
            DeviceError: the device cannot be used on a worker, or none would start.
        """
        actor = ray.remote(Worker).options(
            **self._request,
            max_restarts=-1,
            max_concurrency=_IN_FLIGHT + 1,
            scheduling_strategy="SPREAD",
        )
        for number in range(self.count):
            started = actor.remote(self.kind, self.dtype, self._threads, {"model": model} | options)
            self._members.append(_Member(started, number))
            self._describe(self._members[-1])
        log.info("%d workers on %s, %d threads each", self.count, self.kind, self._threads)
        said = time.monotonic()
        while self._first is None:
            self._collect(None)
            if time.monotonic() - said > _WARN_SECONDS:
                said = time.monotonic()
                has = ray.cluster_resources()
                log.warning("no worker is ready; each needs %s of %s", self._request, has)
        return self

    @property
    def compiles(self) -> int:
        """Programs compiled so far, by all workers."""
        return sum(member.compiles for member in self._members)

    def utilisation(self, totals: Totals, seconds: float) -> float | None:
        """Model FLOP/s over the peak of all workers, counting only real tokens; None if unknown."""
        first = self._first
        if first is None or not first.peak_flops:
            return None
        flops = forward_flops(
            first.config, first.layers, totals.useful_tokens, totals.squared_tokens
        )
        return flops / seconds / (first.peak_flops * self.count)

    def run(
        self,
        store: Store,
        chunks: Iterator[Chunk],
        *,
        commit_rows: int,
        commit_seconds: float,
        max_sequences: int | None = None,
        max_errors: int | None = None,
        stop: threading.Event | None = None,
        on_progress: Callable[[Outcome], None] = lambda _: None,
        on_commit: Callable[[], None] = lambda: None,
    ) -> Outcome:
        """Embed chunks into the store; see `pipeline.run`, which this does on many devices.

        Raises:
            TableError: rows could not be written, by a worker or by the driver.
            ModelError: as `pipeline.run`.
            DeviceError: no worker is left, or one chunk killed several.
        """
        stop = stop or threading.Event()
        outcome = Outcome()
        reader = Reader(limited(chunks, max_sequences, max_errors), stop)
        writer = Writer(
            store, store.append_fragments, outcome, commit_rows, commit_seconds, on_commit
        )
        schema = store.table.schema
        failure: BaseException | None = None
        told = False

        def done(chunk: Chunk, computed: Computed | None) -> None:
            norms = computed.norms if computed else np.zeros(0, np.float32)
            outcome.count(chunk, norms)
            part = computed.part if computed else Part([], 0, ())
            if computed:
                outcome.totals.add(computed.totals)
            whole = replace(part, rejected=chunk.rejected + part.rejected)
            writer.put(lambda: whole)
            on_progress(outcome)

        incoming = reader.items()
        is_open = True
        try:
            while True:
                ending = stop.is_set() or writer.failed or failure is not None
                if ending:
                    is_open = False
                    self._again.clear()
                if ending and not told:
                    told = True
                    for each in self._members:
                        each.actor.stop.remote()
                while is_open or self._again:
                    member = self._idlest()
                    if member is None:
                        break
                    task = self._again.popleft() if self._again else None
                    chunk = task.chunk if task else next(incoming, None)
                    if chunk is None:
                        is_open = False
                    elif not chunk.ids:
                        done(chunk, None)  # nothing but rejections
                    else:
                        self._give(member, chunk, task.deaths if task else 0, store, schema)
                if not any(task.chunk for task in self._tasks.values()) and not (
                    is_open or self._again
                ):
                    break
                try:
                    self._collect(done)
                except BioscanError as error:
                    failure = failure or error  # first collect what the others have
        finally:
            reader.close()
            writer.close()
        if failure:
            raise failure
        reader.end(outcome)
        return outcome

    def close(self) -> None:
        """Stop the workers, and the cluster if `connect` started or joined it."""
        for member in self._members:
            ray.kill(member.actor)
        if self._owns_cluster:
            ray.shutdown()

    def _idlest(self) -> _Member | None:
        free = [member for member in self._members if member.ready and member.busy < _IN_FLIGHT]
        return min(free, key=lambda member: member.busy, default=None)

    def _describe(self, member: _Member) -> None:
        member.ready, member.busy = False, 0
        self._tasks[member.actor.describe.remote()] = _Task(member)

    def _give(
        self, member: _Member, chunk: Chunk, deaths: int, store: Store, schema: pa.Schema
    ) -> None:
        # What is rejected already is the driver's to record.
        work = replace(chunk, rejected=())
        reference = member.actor.embed.remote(work, store.table.uri, schema)
        self._tasks[reference] = _Task(member, chunk, deaths)
        member.busy += 1

    def _collect(self, done: Callable[[Chunk, Computed], None] | None) -> None:
        """Wait briefly for workers and collect their results."""
        ready, _ = ray.wait(
            list(self._tasks), num_returns=len(self._tasks), timeout=0, fetch_local=True
        )
        if not ready:
            ready, _ = ray.wait(list(self._tasks), timeout=_POLL_SECONDS)
        for reference in ready:
            task = self._tasks.pop(reference)
            try:
                result = ray.get(reference)
            except RayActorError as error:
                self._bury(task, error)
            except RayTaskError as error:
                task.member.busy = max(0, task.member.busy - 1)
                if isinstance(error.cause, BioscanError):
                    raise error.cause from None
                raise DeviceError(
                    f"worker {task.member.number} failed{_where(task.chunk)}: {error.cause!r}; "
                    "committed rows are kept: run again to resume"
                ) from error
            else:
                if task.chunk is None:
                    self._welcome(task.member, result)
                else:
                    task.member.busy = max(0, task.member.busy - 1)
                    task.member.compiles = result.compiles
                    assert done is not None
                    done(task.chunk, result)

    def _welcome(self, member: _Member, described: Description) -> None:
        if self._first is None:
            self._first = described
            self.hidden, self.fingerprint = described.hidden, described.fingerprint
        compared = compare(self.fingerprint, described.fingerprint)
        if unlike := compared.different + compared.unknown:
            names = self._first.host, described.host
            raise ConfigError(
                f"host {described.host} would give other vectors than {self._first.host}:\n"
                + "\n".join(describe(unlike, self.fingerprint, described.fingerprint, names))
                + "\nGive all hosts the same model, packages and --dtype"
            )
        member.ready, member.failed_starts = True, 0
        log.info(
            "worker %d is ready: host %s, process %d",
            member.number,
            described.host,
            described.process,
        )

    def _bury(self, task: _Task, error: RayActorError) -> None:
        """A worker died: its chunk goes to another, and it is started again."""
        member = task.member
        if task.chunk is None:
            # Also while Ray is still starting its process again, several times.
            member.failed_starts += 1
            down = time.monotonic() - member.down_since
            if member.failed_starts >= _ATTEMPTS and down > _START_SECONDS:
                self._members.remove(member)
                log.warning("worker %d is abandoned: down for %.0f s", member.number, down)
                if not self._members:
                    raise DeviceError(f"no worker is left; the last died with: {error}") from error
                return
            self._describe(member)
            return
        log.warning("worker %d died%s; another takes over", member.number, _where(task.chunk))
        if task.deaths + 1 >= _ATTEMPTS:
            raise DeviceError(
                f"{_ATTEMPTS} workers died{_where(task.chunk)}, the last with: {error}; is their "
                "memory too small? Committed rows are kept: run again to resume"
            ) from error
        self._again.append(_Task(member, task.chunk, task.deaths + 1))
        if member.ready:
            member.down_since = time.monotonic()
            self._describe(member)


def _where(chunk: Chunk | None) -> str:
    if chunk is None or not len(chunk.rows):
        return ""
    return f" with rows {chunk.rows[0]} to {chunk.rows[-1]} of {chunk.source}"
