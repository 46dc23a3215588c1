"""The two ends of a run, each on its own thread: the reader ahead, the writer behind.

Input: an iterator of what is to be computed; what makes the parts that are to be committed.
Output: items in order; rows in the table, and the outcome.
Invariants: queues are bounded; a failure causes no deadlock; rows are committed in whole appends
only. If most vectors of a model are not finite, the run stops and their records stay to be done.
"""

import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np

from ..encode.packing import Totals
from ..errors import InputError, ModelError
from ..reads.cleaning import Code
from ..reads.records import Chunk, Rejection
from ..table.neighbours import read_fingerprint
from ..table.store import Store

NORM_SAMPLE = 512
"""Vectors whose norms are kept for the tracker."""

_QUEUED_CHUNKS = 2  # between reader and device, and between device and writer
_POLL_SECONDS = 0.2
_MANY_BAD = 10  # vectors that are not finite; fewer may be chance

T = TypeVar("T")


@dataclass
class Outcome:
    """What a run did.

    Attributes:
        rows_read: records looked at, rejected ones included.
        embedded: rows committed.
        rejected: records rejected by the reader, by code.
        not_finite: records rejected because of the model.
        cleaned: records changed, by cleaning rule.
        totals: what was computed.
        norms: Euclidean norms of some of the last vectors.
        last_commit: when rows were last committed (`time.time()`), None before.
        failure: files that could not be read to their end, or too many records rejected.
    """

    rows_read: int = 0
    embedded: int = 0
    rejected: Counter[Code] = field(default_factory=Counter)
    not_finite: int = 0
    cleaned: Counter[str] = field(default_factory=Counter)
    totals: Totals = field(default_factory=Totals)
    norms: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    last_commit: float | None = None
    failure: InputError | None = None

    @property
    def num_rejected(self) -> int:
        """Records rejected."""
        return self.rejected.total() + self.not_finite

    def count(self, chunk: Chunk, norms: np.ndarray) -> None:
        """Count a chunk that is done; `norms` as from `sample_norms`."""
        self.rows_read += chunk.num_rows
        self.cleaned.update({rule: len(rows) for rule, rows in chunk.cleaned.items()})
        self.rejected.update(item.code for item in chunk.rejected)
        self.norms = np.concatenate([self.norms, norms])[-NORM_SAMPLE:]


@dataclass(frozen=True)
class Part(Generic[T]):
    """What a chunk leaves: rows to commit (tables or fragments), how many, and what is rejected."""

    rows: list[T]
    num_rows: int
    rejected: tuple[Rejection, ...]


class Reader(Generic[T]):
    """Prefetches items (chunks, prepared jobs) from an iterator on a thread."""

    def __init__(self, items: Iterator[T], stop: threading.Event):
        self.error: BaseException | None = None
        self._source, self._stop = items, stop
        self._queue: queue.Queue[tuple[T] | None] = queue.Queue(_QUEUED_CHUNKS)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, name="reader", daemon=True)
        self._thread.start()

    def items(self) -> Iterator[T]:
        """Yield items until they end, fail (`error`), or the run is stopped."""
        while not self._stop.is_set():
            try:
                item = self._queue.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                continue
            if item is None:
                return
            yield item[0]

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        self._thread.join()

    def end(self, outcome: Outcome) -> None:
        """Record what ended the input early; raise errors that are not the input's fault."""
        if isinstance(self.error, InputError):
            outcome.failure = self.error
        elif self.error is not None:
            raise self.error

    def _work(self) -> None:
        try:
            for item in self._source:
                if not self._put((item,)):
                    return
        except BaseException as error:  # see `end`, after the commit
            self.error = error
        self._put(None)

    def _put(self, item: tuple[T] | None) -> bool:
        while not self._closed.is_set():
            try:
                self._queue.put(item, timeout=_POLL_SECONDS)
            except queue.Full:
                continue
            return True
        return False


class Writer(Generic[T]):
    """Collects parts and commits them by number of rows and by time, on its own thread."""

    def __init__(
        self,
        store: Store,
        append: Callable[[list[T]], None],
        outcome: Outcome,
        commit_rows: int,
        commit_seconds: float,
        on_commit: Callable[[], None],
    ):
        self.error: BaseException | None = None
        self._store, self._append = store, append
        self._outcome, self._on_commit = outcome, on_commit
        self._commit_rows, self._commit_seconds = commit_rows, commit_seconds
        self._queue: queue.Queue[Callable[[], Part[T]] | None] = queue.Queue(_QUEUED_CHUNKS)
        self._rows: list[T] = []
        self._rejections: list[Rejection] = []
        self._waiting = 0
        self._computed = 0
        self._thread = threading.Thread(target=self._work, name="writer", daemon=True)
        self._thread.start()

    @property
    def failed(self) -> bool:
        """True once a commit has failed."""
        return self.error is not None

    def put(self, make: Callable[[], Part[T]]) -> None:
        """Hand over what makes a part, on this thread; waits while the writer is behind."""
        self._queue.put(make)

    def close(self) -> None:
        """Commit what is waiting and end the thread; raises any error from it."""
        self._queue.put(None)
        self._thread.join()
        if self.error is not None:
            raise self.error

    def _work(self) -> None:
        due = time.monotonic() + self._commit_seconds
        while True:
            try:
                make = self._queue.get(timeout=max(0.0, min(due - time.monotonic(), 60.0)))
                if make is None:
                    self._guard(self._check_model, True)
                    self._guard(self._commit)
                    return
                self._guard(self._take, make)
            except queue.Empty:
                pass
            if self._waiting >= self._commit_rows or time.monotonic() >= due:
                self._guard(self._commit)
                due = time.monotonic() + self._commit_seconds

    def _guard(self, function: Callable[..., None], *arguments: object) -> None:
        """After a failure, keep emptying the queue so that nothing blocks on it."""
        if self.error is None:
            try:
                function(*arguments)
            except BaseException as error:  # raised again by `close`
                self.error = error

    def _take(self, make: Callable[[], Part[T]]) -> None:
        part = make()
        num_bad = sum(item.code is Code.VECTOR_NOT_FINITE for item in part.rejected)
        self._rows += part.rows
        self._rejections += part.rejected
        self._waiting += part.num_rows
        self._computed += part.num_rows + num_bad
        self._outcome.not_finite += num_bad
        self._check_model()

    def _check_model(self, is_end: bool = False) -> None:
        """Stop, after committing the good ones, if most vectors are not finite."""
        num_bad = self._outcome.not_finite
        if 2 * num_bad <= self._computed or not (num_bad >= _MANY_BAD or is_end):
            return
        if num_bad < _MANY_BAD and (self._waiting or self._store.count_rows()):
            return  # the model has made good ones
        self._rejections = [
            item for item in self._rejections if item.code is not Code.VECTOR_NOT_FINITE
        ]
        self._commit()
        model = read_fingerprint(self._store.table).get("model", "")
        raise ModelError(
            f"model {model!r} gives no usable vectors: {num_bad} of {self._computed} are not "
            "finite. Their records are left for the next run. Check its weights, use another "
            "model, or use --dtype float32 and --vector-dtype float32 if its numbers are too large"
        )

    def _commit(self) -> None:
        if self._rows:
            self._append(self._rows)
            self._outcome.embedded += self._waiting
            self._outcome.last_commit = time.time()
            self._rows, self._waiting = [], 0
        self._store.reject(self._rejections)
        self._rejections = []
        self._on_commit()
