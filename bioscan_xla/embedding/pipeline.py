"""From records to committed rows: reader, device and writer run in parallel.

Input: an encoder, a store and chunks of records. Output: rows in the table, and the outcome.
Invariants: queues are bounded; rows are committed in whole appends only; whatever ends the run (a
damaged file, a signal, a full disk), all vectors computed so far are committed first if the table
can still be written. If most vectors of a model are not finite, the run stops and their records
stay to be done.
"""

import functools
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa

from ..encode.encoder import Encoder
from ..encode.inference import prepare_for, run_jobs
from ..errors import InputError
from ..reads.cleaning import Code
from ..reads.records import Chunk, Rejection
from ..table.rows import make_rows, storable
from ..table.store import Store
from .threads import NORM_SAMPLE, Outcome, Part, Reader, Writer


def run(
    encoder: Encoder,
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
    """Embed chunks into the store.

    Args:
        encoder: the loaded model.
        store: the open table.
        chunks: from the reader.
        commit_rows: commit when this many rows are waiting.
        commit_seconds: commit at least this often.
        max_sequences: stop after this many sequences.
        max_errors: stop when more records than this were rejected.
        stop: set it to finish early, with a commit.
        on_progress: called after each chunk.
        on_commit: called after each commit, on the writer's thread.

    Raises:
        TableError: rows could not be written.
        ModelError: most vectors are not finite.
    """
    stop = stop or threading.Event()
    outcome = Outcome()
    jobs = (
        prepare_for(encoder, number, chunk, chunk.sequences)
        for number, chunk in enumerate(limited(chunks, max_sequences, max_errors))
    )
    reader = Reader(jobs, stop)
    writer = Writer(store, store.append, outcome, commit_rows, commit_seconds, on_commit)
    schema = store.table.schema
    try:
        results = run_jobs(
            encoder, reader.items(), outcome.totals, lambda: stop.is_set() or writer.failed
        )
        for chunk, vectors, ready in results:
            outcome.count(chunk, sample_norms(vectors, ready))
            writer.put(functools.partial(make_part, chunk, vectors, ready, schema))
            on_progress(outcome)
    finally:
        reader.close()
        writer.close()
    reader.end(outcome)
    return outcome


def sample_norms(vectors: np.ndarray, ready: np.ndarray) -> np.ndarray:
    """Euclidean norms of some of a chunk's vectors."""
    return np.linalg.norm(vectors[ready][:NORM_SAMPLE], axis=1)


def make_part(
    chunk: Chunk, vectors: np.ndarray, ready: np.ndarray, schema: pa.Schema
) -> Part[pa.Table]:
    """Rows of a computed chunk in the table's schema, and its rejected records.

    Args:
        chunk: records.
        vectors: (kept, hidden) float32.
        ready: (kept,) False for those that were not computed.
        schema: of the table.
    """
    values, finite = storable(vectors, schema)
    good = np.flatnonzero(ready & finite)
    rejected = tuple(
        Rejection(
            chunk.source,
            int(chunk.rows[at]),
            chunk.ids[at],
            "its vector is not finite",
            Code.VECTOR_NOT_FINITE,
        )
        for at in np.flatnonzero(ready & ~finite)
    )
    metadata = chunk.metadata
    if len(good) < len(ready):
        metadata, values = metadata.take(pa.array(good)), values[good]
    rows = make_rows(
        [chunk.ids[at] for at in good],
        [chunk.sequences[at] for at in good],
        metadata,
        chunk.source,
        chunk.rows[good],
        values,
        schema,
    )
    return Part([rows] if len(good) else [], len(good), chunk.rejected + rejected)


def limited(
    chunks: Iterator[Chunk], max_sequences: int | None, max_errors: int | None
) -> Iterator[Chunk]:
    """Chunks until there are enough sequences; InputError once too many records were rejected."""
    left, errors = max_sequences, 0
    for chunk in chunks:
        if left is not None and len(chunk.ids) >= left:
            yield _head(chunk, left)
            return
        left = left - len(chunk.ids) if left is not None else None
        yield chunk
        errors += len(chunk.rejected)
        if max_errors is not None and errors > max_errors:
            last = chunk.rejected[-1]
            raise InputError(
                f"{errors} records were rejected, more than max_errors {max_errors}; "
                f"the last is row {last.row} of {last.source}: {last.reason}. All are in "
                "rejected.parquet beside the table"
            )


def _head(chunk: Chunk, count: int) -> Chunk:
    """The first `count` kept rows of a chunk and what was rejected among them."""
    last = int(chunk.rows[count - 1])
    rejected = tuple(item for item in chunk.rejected if item.row < last)
    return Chunk(
        chunk.source,
        count + len(rejected),
        chunk.rows[:count],
        chunk.ids[:count],
        chunk.sequences[:count],
        chunk.metadata.slice(0, count),
        rejected,
        {rule: rows[rows <= last] for rule, rows in chunk.cleaned.items()},
    )
