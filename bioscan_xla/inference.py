"""Sequences through the encoder: identical ones once, vectors back in the order they came.

Enters: jobs (lists of sequences). Leaves: each job with its (sequences, hidden) float32 vectors,
in the order of the jobs. Guaranteed: one vector a sequence, the same whatever its neighbours.
"""

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np
import torch

from . import runtime
from .batches import Batch, Packer, Window, cut_windows, layout
from .encoder import Encoder
from .tokens import tokenize

T = TypeVar("T")
_IN_FLIGHT = 2  # batches given to the device before the oldest result is asked for


@dataclass
class Job(Generic[T]):
    """Sequences that belong together, and their vectors while they come in."""

    item: T
    inverse: np.ndarray  # (sequences,) which distinct sequence each is
    windows: list[Window]
    num_distinct: int
    num_windowed: int
    vectors: np.ndarray | None = None
    weights: np.ndarray | None = None
    waiting: int = 0


@dataclass
class Totals:
    """What was computed so far: tokens, rows of tokens, and operations."""

    sequences: int = 0
    distinct: int = 0
    windowed: int = 0
    useful_tokens: int = 0
    computed_tokens: int = 0
    squared_tokens: int = 0
    batches: int = 0
    shapes: set[tuple[int, ...]] = field(default_factory=set)

    @property
    def useful_fraction(self) -> float:
        """Real tokens over computed ones; 1 before the first batch."""
        return self.useful_tokens / self.computed_tokens if self.computed_tokens else 1.0

    def count(self, batch: Batch) -> None:
        """Add a batch."""
        self.useful_tokens += batch.num_useful
        self.computed_tokens += batch.input_ids.size
        self.squared_tokens += sum(len(window) ** 2 for _, _, window in batch.places)
        self.batches += 1
        self.shapes.add(batch.input_ids.shape)


def prepare(number: int, item: T, sequences: Sequence[str], max_tokens: int, overlap: int) -> Job[T]:
    """Tokenize the distinct sequences of a job and cut them into windows."""
    distinct: dict[str, int] = {}
    inverse = np.fromiter(
        (distinct.setdefault(sequence, len(distinct)) for sequence in sequences),
        np.int64, len(sequences),
    )
    tokens = tokenize(list(distinct))
    windows = cut_windows(tokens, number, max_tokens, overlap)
    many = np.diff(tokens.offsets) > max_tokens
    return Job(item, inverse, windows, len(distinct), int(many[inverse].sum()) if len(inverse) else 0)


def run_jobs(encoder: Encoder, jobs: Iterable[Job[T]], totals: Totals) -> Iterator[tuple[T, np.ndarray]]:
    """Compute jobs on the device.

    Args:
        encoder: the loaded model.
        jobs: numbered from 0 in their windows, as `prepare` makes them.
        totals: is added to.

    Yields:
        (item, vectors) in the order of the jobs; vectors (sequences, hidden) float32.
    """
    device = encoder.device
    packer = Packer(layout(device.kind, device.num_devices, encoder.max_tokens))
    open_jobs: dict[int, Job[T]] = {}
    in_flight: deque[tuple[Batch, torch.Tensor]] = deque()
    first = 0

    def collect() -> None:
        batch, result = in_flight.popleft()
        values = runtime.fetch(result)
        for row, segment, window in batch.places:
            number, index = window.owner
            _accept(open_jobs[number], index, len(window), values[row, segment], encoder.pooling)

    def finished() -> Iterator[tuple[T, np.ndarray]]:
        nonlocal first
        while first in open_jobs and open_jobs[first].waiting == 0:
            job = open_jobs.pop(first)
            first += 1
            assert job.vectors is not None and job.weights is not None
            if encoder.pooling != "max":
                job.vectors /= np.maximum(job.weights, 1)[:, None]
            yield job.item, job.vectors[job.inverse]

    for number, job in enumerate(itertools.chain(jobs, [None])):
        if job is None:
            batches = packer.flush()
        else:
            job.vectors = np.zeros((job.num_distinct, encoder.hidden), np.float32)
            job.weights = np.zeros(job.num_distinct, np.float32)
            job.waiting = len(job.windows)
            open_jobs[number] = job
            totals.sequences += len(job.inverse)
            totals.distinct += job.num_distinct
            totals.windowed += job.num_windowed
            batches = packer.add(job.windows)
        for batch in batches:
            totals.count(batch)
            in_flight.append((batch, encoder.encode(batch)))
            if len(in_flight) >= _IN_FLIGHT:
                collect()
            yield from finished()
        if job is None:
            while in_flight:
                collect()
        yield from finished()


def _accept(job: Job, index: int, tokens: int, vector: np.ndarray, pooling: str) -> None:
    assert job.vectors is not None and job.weights is not None
    if pooling == "max":
        known = job.weights[index] > 0
        job.vectors[index] = np.maximum(job.vectors[index], vector) if known else vector
    else:
        # The token-weighted mean over the windows of a long sequence.
        job.vectors[index] += tokens * vector
    job.weights[index] += tokens
    job.waiting -= 1


def embed_sequences(encoder: Encoder, sequences: Sequence[str]) -> np.ndarray:
    """Vectors of some sequences, (sequences, hidden) float32, in their order."""
    job = prepare(0, None, sequences, encoder.max_tokens, encoder.overlap_tokens)
    ((_, vectors),) = run_jobs(encoder, [job], Totals())
    return vectors
