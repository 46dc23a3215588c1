"""Runs sequences through the encoder: identical ones once, vectors in input order.

Input: jobs (lists of sequences). Output: each job with its (sequences, hidden) float32 vectors, in
the order of the jobs. Invariants: one vector per sequence, whatever its neighbours in the batch.
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch

from ..errors import InputError
from ..reads.cleaning import clean_sequences
from ..reads.tokens import tokenize
from . import runtime
from .encoder import Encoder
from .lanes import Lanes, result
from .packing import Batch, Layout, Packer, Totals, Window, cut_windows, readings
from .transform import Transform

T = TypeVar("T")
_IN_FLIGHT = 2  # batches sent to the device before the oldest result is fetched


class SegmentEncoder(Protocol):
    """Computes the vectors of a batch's segments, as an `Encoder` does."""

    @property
    def layout(self) -> Layout: ...  # noqa: D102
    @property
    def device(self) -> Any: ...  # noqa: D102
    @property
    def pooling(self) -> str: ...  # noqa: D102
    @property
    def hidden(self) -> int: ...  # noqa: D102
    def encode(self, batch: Batch) -> Any: ...  # noqa: D102


@dataclass
class Job(Generic[T]):
    """Sequences that belong together, and their vectors while they come in.

    Attributes:
        item: the caller's reference to the job.
        inverse: (sequences,) which distinct sequence each is.
        windows: all windows of the distinct sequences.
        num_windows: (distinct,) windows of each.
        missing: (distinct,) windows not computed yet.
        weights: (distinct,) tokens computed so far, of sequences of several windows.
        num_windowed: sequences that took more than one window.
        vectors: (distinct, hidden) float32, made by `begin`.
        transform: of the finished vectors; None for none.
    """

    item: T
    inverse: np.ndarray
    windows: list[Window]
    num_windows: np.ndarray
    missing: np.ndarray
    weights: np.ndarray
    num_windowed: int
    vectors: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    transform: Transform | None = None

    def begin(self, hidden: int) -> None:
        """Make room for the vectors."""
        self.vectors = np.zeros((len(self.missing), hidden), np.float32)


def prepare(
    number: int,
    item: T,
    sequences: Sequence[str],
    max_tokens: int,
    overlap: int,
    frames: int = 1,
    strands: str = "given",
) -> Job[T]:
    """Tokenize the distinct sequences of a job and cut them into windows.

    The windows of all frames and strands of a sequence have one owner, so that its vector is the
    token-weighted mean over them.

    Args:
        number: of the job.
        item: the caller's reference to the job.
        sequences: cleaned.
        max_tokens: the model's longest window.
        overlap: tokens that neighbouring windows of a long sequence share.
        frames: see `packing.readings`.
        strands: see `packing.readings`.
    """
    distinct: dict[str, int] = {}
    inverse = np.fromiter(
        (distinct.setdefault(sequence, len(distinct)) for sequence in sequences),
        np.int64,
        len(sequences),
    )
    windows: list[Window] = []
    counts = np.zeros(len(distinct), np.int64)
    num_windowed = 0
    for at, texts in enumerate(readings(list(distinct), frames, strands)):
        cut = cut_windows(tokenize(texts), number, max_tokens, overlap)
        if at:  # a sequence shorter than its frame offset is skipped
            cut = [window for window in cut if len(window.tokens)]
        owners = np.fromiter((window.owner[1] for window in cut), np.int64, len(cut))
        here = np.bincount(owners, minlength=len(distinct))
        if not at:
            num_windowed = int((here > 1)[inverse].sum())
        windows += cut
        counts += here
    weights = np.zeros(len(distinct), np.float32)
    return Job(item, inverse, windows, counts, counts.copy(), weights, num_windowed)


def prepare_for(encoder: Encoder, number: int, item: T, sequences: Sequence[str]) -> Job[T]:
    """`prepare` with an encoder's settings."""
    job = prepare(
        number,
        item,
        sequences,
        encoder.max_tokens,
        encoder.overlap_tokens,
        encoder.frames,
        encoder.strands,
    )
    job.transform = encoder.transform
    return job


def run_jobs(
    encoder: SegmentEncoder,
    jobs: Iterable[Job[T]],
    totals: Totals,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[T, np.ndarray, np.ndarray]]:
    """Compute jobs on the device.

    Args:
        encoder: the loaded model.
        jobs: numbered from 0 in their windows, as `prepare` makes them.
        totals: updated in place.
        should_stop: called after every batch; once True, batches on the device are finished and
            no more are started.

    Yields:
        (item, vectors, ready) in the order of the jobs: vectors (sequences, hidden) float32, and
        ready (sequences,) bool, all True unless stopped.
    """
    packer = Packer(encoder.layout)
    open_jobs: dict[int, Job[T]] = {}
    in_flight: deque[tuple[Batch, Any]] = deque()
    lanes = Lanes(encoder.device.kind, encoder.encode)

    def collect() -> None:
        batch, promised = in_flight.popleft()
        values = runtime.fetch(result(promised))
        for number, places in places_by_job(batch).items():
            accept(open_jobs[number], places, values, encoder.pooling)

    def finished() -> Iterator[tuple[T, np.ndarray, np.ndarray]]:
        while open_jobs:
            first = next(iter(open_jobs))  # a dict keeps the order of insertion
            if open_jobs[first].missing.any():
                return
            yield result_of(open_jobs.pop(first), encoder.pooling)

    try:
        for number, job in enumerate(itertools.chain(jobs, [None])):
            if job is None:
                batches = list(packer.flush())
            else:
                job.begin(encoder.hidden)
                open_jobs[number] = job
                totals.sequences += len(job.inverse)
                totals.distinct += len(job.missing)
                totals.windowed += job.num_windowed
                batches = list(packer.add(job.windows))
            # A few batches, such as those of a search, are done sooner by all cores together.
            side_by_side = len(batches) >= lanes.count > 1
            while in_flight and lanes.count > 1 and not side_by_side:
                collect()
            for batch in batches:
                if should_stop():
                    break
                totals.count(batch)
                in_flight.append((batch, lanes.start(batch, side_by_side=side_by_side)))
                if len(in_flight) >= _IN_FLIGHT * (lanes.count if side_by_side else 1):
                    collect()
                yield from finished()
            if job is None or should_stop():
                while in_flight:
                    collect()
            yield from finished()
            if should_stop():
                for begun in open_jobs.values():
                    yield result_of(begun, encoder.pooling)
                return
    finally:
        lanes.close()


def places_by_job(batch: Batch) -> dict[int, list[tuple[int, int, Window]]]:
    """The places of a batch's windows, by the number of their job."""
    by_job: dict[int, list[tuple[int, int, Window]]] = {}
    for place in batch.places:
        by_job.setdefault(place[2].owner[0], []).append(place)
    return by_job


def accept(
    job: Job, places: list[tuple[int, int, Window]], values: np.ndarray, pooling: str
) -> None:
    """Store the vectors of one job's windows; values (rows, segments, hidden)."""
    rows, segments, indices, tokens = (
        np.fromiter(numbers, np.int64, len(places))
        for numbers in (
            (row for row, _, _ in places),
            (segment for _, segment, _ in places),
            (window.owner[1] for _, _, window in places),
            (len(window) for _, _, window in places),
        )
    )
    whole = job.num_windows[indices] == 1
    job.vectors[indices[whole]] = values[rows[whole], segments[whole]]
    several = np.flatnonzero(~whole)
    if pooling != "max":
        # The token-weighted mean over the windows, in a fixed order, so that it is reproducible.
        parts = values[rows[several], segments[several]]
        parts *= tokens[several, None].astype(np.float32)
        owners = torch.from_numpy(indices[several])
        torch.from_numpy(job.vectors).index_add_(0, owners, torch.from_numpy(parts))
        np.add.at(job.weights, indices[several], tokens[several].astype(np.float32))
    else:
        for at in several:
            vector, index = values[rows[at], segments[at]], indices[at]
            if job.weights[index]:
                np.maximum(job.vectors[index], vector, out=job.vectors[index])
            else:
                job.vectors[index] = vector
            job.weights[index] += tokens[at]
    np.subtract.at(job.missing, indices, 1)


def result_of(job: Job[T], pooling: str) -> tuple[T, np.ndarray, np.ndarray]:
    """A job's item, its vectors, and for each sequence whether all its windows are computed."""
    ready = job.missing == 0
    if pooling != "max":
        several = np.flatnonzero((job.num_windows > 1) & ready)
        job.vectors[several] /= job.weights[several, None]
    if job.transform is not None:
        job.vectors = job.transform.apply(job.vectors)
    if len(job.inverse) == len(ready):
        return job.item, job.vectors, ready  # all distinct, and in order
    return job.item, job.vectors[job.inverse], ready[job.inverse]


def embed_sequences(encoder: Encoder, sequences: Sequence[str]) -> np.ndarray:
    """Vectors of cleaned sequences, (sequences, hidden) float32, in their order."""
    job = prepare_for(encoder, 0, None, sequences)
    ((_, vectors, _),) = run_jobs(encoder, [job], Totals())
    return vectors


def embed_text(encoder: Encoder, texts: Sequence[str]) -> np.ndarray:
    """Vectors of sequences as typed: cleaned first, (sequences, hidden) float32.

    Raises:
        InputError: one cannot be used; the message says which and why.
    """
    sequences, complaints, _ = clean_sequences(texts)
    for number, complaint in complaints.items():
        raise InputError(f"sequence {number + 1} of {len(texts)}: {complaint.reason}")
    return embed_sequences(encoder, sequences)
