"""What the server does, without HTTP: vectors, names, neighbours, models.

Input: sequences as clients sent them, a version, a deadline. Output: arrays and records.
Invariants: sequences are cleaned and refused by the reader's rules; everything that is accepted has
a place in the queue, and gives it up whatever happens.
"""

import asyncio
import functools
import logging
import os
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from ..encode.inference import Job, prepare_for
from ..errors import BioscanError, first_line
from ..options import ServeConfig
from ..reads.cleaning import clean_sequences
from .conditions import check_condition
from .device import DeviceThread
from .jobs import Jobs
from .loading import Wanted, load_version, wanted_at_start
from .metrics import Metrics
from .refusals import Refused, deadline_passed
from .token_queue import Place, Ticket, TokenQueue
from .versions import Version, Versions

log = logging.getLogger(__name__)

_INLINE_BP = 20_000  # prepared on the event loop, in well under a millisecond
_NAMED_AT_ONCE = 16
_MOST_REPORTED = 100
_BP_PER_TOKEN = 6

T = TypeVar("T")


class ClientGone(Exception):
    """Nobody is there any more to get the answer."""


@dataclass(frozen=True)
class Caller:
    """The client of a request.

    Attributes:
        deadline: on `time.monotonic`.
        gone: waits until the client has left.
    """

    deadline: float
    gone: Callable[[], Awaitable[Any]]


@dataclass(frozen=True)
class Embedded:
    """Vectors of a request, (sequences, hidden) float32, and its tokens."""

    vectors: np.ndarray
    tokens: int


@dataclass(frozen=True)
class _Prepared:
    """Sequences, cleaned and tokenized."""

    sequences: list[str]
    number: int
    job: Job[None]
    tokens: int


class Service:
    """Models, the device and the requests that wait for it."""

    def __init__(self, config: ServeConfig):
        """Start the device's thread; `load` loads the models."""
        self.config = config
        self.metrics = Metrics()
        self.queue = TokenQueue(config.max_queue_tokens)
        self.device = DeviceThread(self.queue, self.metrics)
        self.versions = Versions(config.max_models)
        self.jobs = Jobs(config.jobs_folder, config.job_roots, self.versions)
        self.failure: BaseException | None = None
        self.is_loaded, self.is_draining = False, False
        self.active = 0  # requests that were let in and are not answered yet
        cores = os.cpu_count() or 1
        self._quick = ThreadPoolExecutor(4, "quick")
        self._naming = ThreadPoolExecutor(max(2, cores), "naming")
        self._loading = threading.Lock()
        self.metrics.queue_tokens.set_function(lambda: self.queue.tokens)
        self.metrics.queue_requests.set_function(lambda: self.queue.places)
        self.metrics.models.set_function(lambda: len(self.versions.all()))

    @property
    def is_ready(self) -> bool:
        """True while requests are accepted."""
        return self.is_loaded and not self.is_draining and self.device.is_well

    def load(self) -> None:
        """Load the models of the options; an error is left in `failure`."""
        try:
            for wanted in wanted_at_start(self.config):
                self.versions.install(load_version(self.config, wanted, self.queue))
            self.jobs.start()
            self.is_loaded = True
        except BaseException as error:  # raised again by whoever runs the server
            self.failure = error

    def load_another(self, wanted: Wanted) -> Version:
        """Load a model beside the others and make it the current one of its name."""
        if not self._loading.acquire(blocking=False):
            raise Refused(
                409, "loading", "another model is being loaded; try again when it is ready"
            )
        try:
            self.versions.check_room()
            version = load_version(self.config, wanted, self.queue)
            self._check_it_does_as_much(version)
            self.versions.install(version)
            return version
        except BioscanError as error:
            log.warning("%s is not loaded: %s", wanted.name, first_line(error))
            raise Refused(400, "model_not_loaded", str(error)) from error
        except Refused as refused:
            log.warning("%s is not loaded: %s", wanted.name, refused.message)
            raise
        finally:
            self._loading.release()

    def _check_it_does_as_much(self, version: Version) -> None:
        """Refuse a version for which requests would fail that its predecessor answers."""
        before = self.versions.current(version.name)
        for path, old, new in (
            ("search", before and before.table, version.table),
            ("classify", before and before.naming, version.naming),
        ):
            if old is not None and not isinstance(old, str) and isinstance(new, str):
                raise Refused(
                    409,
                    "does_less",
                    f"{before.id if before else ''} answers /v1/{path} and {version.id} would not: "
                    f"{new}. Pass a `reference` that fits it, or load it under another name",
                    param="reference",
                )

    def drain(self) -> None:
        """Accept nothing more."""
        self.is_draining = True
        if self.active:
            log.warning("finishing %d requests; send the signal again to stop at once", self.active)

    def close(self) -> None:
        """Finish what was accepted and end all threads."""
        self.jobs.close()
        self._naming.shutdown(cancel_futures=True)
        self._quick.shutdown(cancel_futures=True)
        self.device.close()

    async def embed(self, version: Version, texts: Sequence[str], caller: Caller) -> Embedded:
        """Vectors of sequences."""
        prepared = await self._prepare(version, texts)
        with self._placed(prepared, caller) as place:
            vectors = await self._vectors(version, prepared, place, caller)
        return Embedded(vectors, prepared.tokens)

    async def classify(
        self, version: Version, texts: Sequence[str], strand: str, caller: Caller
    ) -> tuple[list[dict[str, Any]], int]:
        """A row of `classification.record.SCHEMA` for each sequence, and the tokens."""
        if isinstance(version.naming, str):
            raise Refused(400, "no_reference", version.naming)
        prepared = await self._prepare(version, texts)
        rows: list[dict[str, Any]] = []
        with self._placed(prepared, caller) as place:
            # In parts, between which the names of other requests get their turn.
            for first in range(0, len(texts), _NAMED_AT_ONCE):
                part = prepared.sequences[first : first + _NAMED_AT_ONCE]
                work = functools.partial(self._name, version, part, strand, place)
                named = asyncio.get_running_loop().run_in_executor(self._naming, work)
                found = await until_gone(named, caller)
                rows += found
        return rows, prepared.tokens

    async def search(
        self, version: Version, texts: Sequence[str], k: int, where: str | None, caller: Caller
    ) -> tuple[list[list[dict[str, Any]]], int]:
        """The nearest rows of each sequence, and the tokens."""
        table = version.table
        if isinstance(table, str):
            raise Refused(400, "no_table", table)
        if where is not None:
            check_condition(where, table.columns)
        prepared = await self._prepare(version, texts)
        with self._placed(prepared, caller) as place:
            vectors = await self._vectors(version, prepared, place, caller)
            work = functools.partial(table.nearest, vectors, k, where)
            found = asyncio.get_running_loop().run_in_executor(self._quick, work)
            return await until_gone(found, caller), prepared.tokens

    @contextmanager
    def _placed(self, prepared: _Prepared, caller: Caller) -> Iterator[Place]:
        """A place in the queue, which is given up at the end."""
        place = self.queue.enter(sum(map(len, prepared.job.windows)), caller.deadline)
        try:
            yield place
        finally:
            self.queue.leave(place)

    async def _vectors(
        self, version: Version, prepared: _Prepared, place: Place, caller: Caller
    ) -> np.ndarray:
        ticket = Ticket(version.encoder, prepared.number, prepared.job, place)
        self.queue.put(ticket)
        vectors = await until_gone(asyncio.wrap_future(ticket.future), caller)
        finite = np.isfinite(vectors).all(axis=1)
        if not finite.all():
            index = int(np.argmin(finite))
            raise Refused(
                500,
                "vector_not_finite",
                f"input[{index}]: the model gives no finite vector for it",
                param=f"input[{index}]",
            )
        return vectors

    def _name(
        self, version: Version, sequences: Sequence[str], strand: str, place: Place
    ) -> list[dict[str, Any]]:
        """Name sequences, on a thread for that."""
        from ..classification.opening import name_sequences
        from ..classification.record import make_records

        opened = version.naming
        assert not isinstance(opened, str)
        place.check()
        embed = functools.partial(self._embed_now, version, place) if opened.encoder else None
        named, vectors = name_sequences(opened.namer, sequences, strand, embed)
        numbers = range(len(sequences))
        ids = [str(number) for number in numbers]
        reference = opened.namer.reference
        return make_records(
            ids, "", numbers, named, vectors, reference, opened.calibration
        ).to_pylist()

    def _embed_now(self, version: Version, place: Place, sequences: list[str]) -> np.ndarray:
        """Vectors for a request that has its place; waits for them."""
        number = self.queue.next_number()
        ticket = Ticket(
            version.encoder, number, prepare_for(version.encoder, number, None, sequences), place
        )
        self.queue.put(ticket)
        return ticket.future.result()

    async def _prepare(self, version: Version, texts: Sequence[str]) -> _Prepared:
        """Clean and tokenize; on another thread where that takes long."""
        total_bp = sum(map(len, texts))
        self._check_tokens(total_bp // _BP_PER_TOKEN)
        work = functools.partial(self._prepare_now, version, texts)
        if total_bp > _INLINE_BP:
            prepared = await asyncio.get_running_loop().run_in_executor(self._quick, work)
        else:
            prepared = work()
        self._check_tokens(prepared.tokens)
        return prepared

    def _prepare_now(self, version: Version, texts: Sequence[str]) -> _Prepared:
        sequences, number = self._clean(texts), self.queue.next_number()
        job = prepare_for(version.encoder, number, None, sequences)
        return _Prepared(sequences, number, job, _tokens_of(job))

    def _clean(self, texts: Sequence[str]) -> list[str]:
        sequences, complaints, _ = clean_sequences(texts)
        if complaints:
            found = [
                {"index": index, "code": item.code.value, "reason": item.reason}
                for index, item in sorted(complaints.items())
            ]
            first, more = found[0], len(found) - 1
            rest = f"; {more} more cannot be used either" if more else ""
            raise Refused(
                422,
                str(first["code"]),
                f"input[{first['index']}]: {first['reason']}{rest}",
                param=f"input[{first['index']}]",
                sequences=found[:_MOST_REPORTED],
            )
        return sequences

    def _check_tokens(self, tokens: int) -> None:
        if tokens > self.config.max_request_tokens:
            raise Refused(
                413,
                "too_many_tokens",
                f"the request has {tokens:,} tokens or more, and the limit is "
                f"{self.config.max_request_tokens:,}; send fewer sequences at once",
                param="input",
            )


def _tokens_of(job: Job[None]) -> int:
    """Tokens of a request, those of equal sequences each time."""
    owners = np.fromiter((window.owner[1] for window in job.windows), np.int64, len(job.windows))
    lengths = np.fromiter(map(len, job.windows), np.int64, len(job.windows))
    return int(np.bincount(owners, lengths, minlength=len(job.missing))[job.inverse].sum())


async def until_gone(future: "asyncio.Future[T]", caller: Caller) -> T:
    """The result of a future, unless the client leaves or the deadline passes first.

    Raises:
        ClientGone: the client has left.
        Refused: 504, the deadline has passed.
    """
    gone = asyncio.ensure_future(caller.gone())
    try:
        left = caller.deadline - time.monotonic()
        await asyncio.wait({future, gone}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        if future.done():
            return future.result()
        if gone.done():
            raise ClientGone
        raise deadline_passed()
    finally:
        gone.cancel()
        future.cancel()
