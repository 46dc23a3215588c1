"""The queue in front of the device, counted in tokens.

Input: the windows of each request. Output: windows for the next batch.
Invariants: the tokens of all places never exceed the limit; the windows that wait are served in
proportion to tokens, so a long request does not hold up a short one; who has left or is past the
deadline takes no more of the device.

Reference: start-time fair queueing, Goyal, Vin and Cheng (1996),
https://doi.org/10.1145/248157.248171
"""

import heapq
import itertools
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..encode.encoder import Encoder
from ..encode.inference import Job
from ..encode.packing import Batch, Window
from .refusals import Refused, deadline_passed

_BACKGROUND_TURN = 8  # batches of requests between two of background work, while both wait
_LOOK_AHEAD = 8  # requests whose next window does not fit, before a batch is closed
_MOST_SECONDS = 60  # that a refused client is asked to wait


@dataclass(eq=False)
class Place:
    """A request's place in the queue.

    Attributes:
        tokens: that it takes up.
        deadline: on `time.monotonic`.
        left: the request is over: answered, refused, or its client is gone.
        futures: what its threads wait for.
    """

    tokens: int
    deadline: float
    left: bool = False
    futures: "list[Future[np.ndarray]]" = field(default_factory=list)

    @property
    def is_over(self) -> bool:
        """True if nobody waits for the result any more."""
        return self.left or time.monotonic() > self.deadline

    def check(self) -> None:
        """Raise what ends the work of a request that is over."""
        if self.is_over:
            raise deadline_passed()


@dataclass(eq=False)
class Ticket:
    """Sequences that wait for the device.

    Attributes:
        encoder: the model they are for.
        number: of the job, in the owner of its windows.
        job: the windows, and the vectors so far.
        place: of the request.
        future: gets the vectors, (sequences, hidden).
        handed_out: windows that were given to the device.
    """

    encoder: Encoder
    number: int
    job: Job[None]
    place: Place
    future: "Future[np.ndarray]" = field(default_factory=Future)
    handed_out: int = 0

    def fail(self, error: BaseException) -> None:
        """Tell whoever waits, if anybody still does."""
        with suppress(InvalidStateError):  # the request has ended meanwhile
            self.future.set_exception(error)


@dataclass(eq=False)
class Work:
    """What the device does next: windows of tickets, a packed batch, or any other call."""

    encoder: Encoder | None = None
    tickets: dict[int, Ticket] = field(default_factory=dict)
    windows: list[Window] = field(default_factory=list)
    batch: Batch | None = None
    call: Callable[[], Any] | None = None
    future: "Future[Any]" = field(default_factory=Future)


class _Line:
    """The tickets that wait for one model."""

    def __init__(self) -> None:
        self.heap: list[tuple[float, int, Ticket]] = []
        self.virtual_tokens = 0.0  # how far a request that began with the first would be


class TokenQueue:
    """Places, tickets and what the device does next; used from many threads."""

    def __init__(self, max_tokens: int):
        """Start empty.

        Args:
            max_tokens: that may wait at once.
        """
        self.max_tokens = max_tokens
        self.tokens = 0
        self.places = 0
        self.tokens_per_second = 0.0  # the device's, kept up to date by its thread
        self._lines: dict[int, _Line] = {}  # by id of the encoder, in the order of their turns
        self._background: deque[Work] = deque()
        self._calls: deque[Work] = deque()
        self._since_background = 0
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        self._closed = False

    def next_number(self) -> int:
        """A number for a job."""
        return next(self._numbers)

    def enter(self, tokens: int, deadline: float) -> Place:
        """Take a place.

        Raises:
            Refused: 429, there is no room for so many tokens.
        """
        with self._changed:
            if self.tokens + tokens > self.max_tokens:
                raise Refused(
                    429,
                    "queue_full",
                    f"{self.tokens:,} tokens are waiting and this request has {tokens:,}; the "
                    f"limit is {self.max_tokens:,}. Try again later",
                    retry_after_seconds=self._wait_seconds(tokens),
                )
            self.tokens += tokens
            self.places += 1
        return Place(tokens, deadline)

    def _wait_seconds(self, tokens: int) -> int:
        """How long until there is room, at the device's present speed."""
        excess = self.tokens + tokens - self.max_tokens
        rate = self.tokens_per_second
        return max(1, min(_MOST_SECONDS, math.ceil(excess / rate))) if rate else 1

    def leave(self, place: Place) -> None:
        """Give a place up; what is not computed yet is dropped. A second call does nothing."""
        with self._changed:
            if not place.left:
                place.left = True
                self.tokens -= place.tokens
                self.places -= 1
        for future in place.futures:
            future.cancel()

    def put(self, ticket: Ticket) -> None:
        """Let a ticket wait for the device."""
        ticket.place.futures.append(ticket.future)
        ticket.job.begin(ticket.encoder.hidden)
        with self._changed:
            line = self._lines.setdefault(id(ticket.encoder), _Line())
            heapq.heappush(line.heap, (line.virtual_tokens, ticket.number, ticket))
            self._changed.notify()

    def put_batch(self, encoder: Encoder, batch: Batch) -> "Future[np.ndarray]":
        """Let a packed batch of background work wait; gets (rows, segments, hidden)."""
        work = Work(encoder, batch=batch)
        with self._changed:
            self._background.append(work)
            self._changed.notify()
        return work.future

    def call(self, function: Callable[[], Any]) -> Any:
        """Run a function on the device's thread, before all else, and return its result."""
        work = Work(call=function)
        with self._changed:
            if self._closed:
                raise Refused(503, "shutting_down", "the server is shutting down")
            self._calls.append(work)
            self._changed.notify()
        return work.future.result()

    def close(self) -> None:
        """Let `take` return None once nothing waits."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def take(self, wait: bool = True) -> Work | None:
        """What to do next; None when there is nothing, after `close` or if not to `wait`."""
        with self._changed:
            while True:
                work = self._next()
                if work is not None or not wait or self._closed:
                    return work
                self._changed.wait()

    def _next(self) -> Work | None:
        if self._calls:
            return self._calls.popleft()
        if self._background and self._since_background >= _BACKGROUND_TURN:
            self._since_background = 0
            return self._background.popleft()
        for key in list(self._lines):
            line = self._lines.pop(key)
            work = _deal(line)
            if line.heap:
                self._lines[key] = line  # behind the others
            if work is not None:
                self._since_background += 1
                return work
        if self._background:
            self._since_background = 0
            return self._background.popleft()
        return None


def _deal(line: _Line) -> Work | None:
    """Windows for one batch, from those who have had the fewest tokens; None if nobody waits."""
    work = Work()
    aside: list[tuple[float, int, Ticket]] = []
    room, places = math.inf, math.inf
    while line.heap and room > 1 and places and len(aside) < _LOOK_AHEAD:
        had, number, ticket = heapq.heappop(line.heap)
        if ticket.place.is_over:
            ticket.fail(deadline_passed())
            continue
        if work.encoder is None:
            work.encoder = ticket.encoder
            layout = ticket.encoder.layout
            room, places = layout.batch_tokens, layout.batch_segments or math.inf
        window = ticket.job.windows[ticket.handed_out]
        if len(window) > room and work.windows:
            aside.append((had, number, ticket))
            continue
        work.windows.append(window)
        work.tickets[number] = ticket
        line.virtual_tokens = max(line.virtual_tokens, had)
        room -= len(window)
        places -= 1
        ticket.handed_out += 1
        if ticket.handed_out < len(ticket.job.windows):
            heapq.heappush(line.heap, (had + len(window), number, ticket))
    for item in aside:
        heapq.heappush(line.heap, item)
    return work if work.windows else None
