"""Which process embeds which rows when several share an input.

Input: the stored name of a source, row numbers, and which process of how many this is.
Output: the owner of each row; which rows some batches hold.
Invariants: the owner of a row depends only on the file's name and content, the row number and the
number of processes, not on device, options, progress, file order or start time. The shares of all
processes together hold each row once.
"""

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

BLOCK_ROWS = 8192
"""Rows of a source that one process embeds together. Changing it changes the owner of every row:
finish tables that several processes are filling first."""


@dataclass(frozen=True)
class Share:
    """The part of every source that one process embeds.

    Attributes:
        index: which process this is, from 0.
        count: how many processes share the input.
    """

    index: int = 0
    count: int = 1

    def of(self, key: str, first_row: int, num_rows: int) -> np.ndarray:
        """For each of these rows of a source, whether it is this process's, (num_rows,) bool.

        Args:
            key: what identifies the source, as from `inputs.source_key`.
            first_row: row number in the source.
            num_rows: how many rows from there.
        """
        return self.owns(key, np.arange(first_row, first_row + num_rows))

    def owns(self, key: str, rows: np.ndarray) -> np.ndarray:
        """For each of these row numbers of a source, whether it is this process's, bool."""
        blocks = rows // BLOCK_ROWS
        # Round robin by block; sources start at different processes, so that many small files are
        # spread too.
        digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
        return (blocks + int.from_bytes(digest, "big") % self.count) % self.count == self.index


ALL = Share()
"""The share of a single process."""


def split_at_blocks(first_row: int, num_rows: int) -> list[slice]:
    """Cut consecutive rows at block boundaries; slices relative to `first_row`."""
    last_row = first_row + num_rows
    inner = range((first_row // BLOCK_ROWS + 1) * BLOCK_ROWS, last_row, BLOCK_ROWS)
    edges = [first_row, *inner, last_row]
    return [
        slice(start - first_row, stop - first_row)
        for start, stop in itertools.pairwise(edges)
        if stop > start
    ]


def by_source(batch: pa.RecordBatch) -> Iterator[tuple[str, np.ndarray]]:
    """Each source of some rows and its row numbers."""
    sources = batch["source"].dictionary_encode()
    numbers, which = batch["row"].to_numpy(), sources.indices.to_numpy()
    for code, source in enumerate(sources.dictionary.to_pylist()):
        yield source, numbers[which == code]


def mark(parts: Sequence[np.ndarray]) -> np.ndarray:
    """A bool by row: True where one of the parts has its number."""
    result = np.zeros(max((int(part.max()) + 1 for part in parts if len(part)), default=0), bool)
    for part in parts:
        result[part] = True
    return result
