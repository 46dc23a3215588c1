"""Raw records to clean ones: the reader used by the whole program.

Input: files, and which part of them is wanted.
Output: `Chunk` records in the order of the files, their sequences upper-case ACGTN only, and for
each record that cannot be used a `Rejection` with its reason.
Invariants: every record is either kept or rejected; of several with one id the first is kept,
however many processes read; no chunk crosses a block boundary (see `shares`); an unreadable file
does not stop the files after it, unless several processes share them (one that lacks the ids of a
file cannot tell which later records repeat them, while another can); memory does not grow with the
file, except for 8 bytes per id.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..errors import InputError, first_line
from .cleaning import Code, Complaint, clean_sequences
from .files import read_records
from .inputs import source_key
from .raw import POSITIONS, ReadOptions, Records
from .shares import ALL, Share, split_at_blocks

log = logging.getLogger(__name__)

_LIMITS = {"latitude": 90.0, "longitude": 180.0}
_NO_ID = Complaint(Code.NO_ID, "no id")
_SEEN_BEFORE = Complaint(Code.ID_SEEN_BEFORE, "id seen before")


@dataclass(frozen=True)
class Rejection:
    """An unusable record: where it is, a sentence to read and a code to count by."""

    source: str
    row: int
    sequence_id: str | None
    reason: str
    code: Code


@dataclass(frozen=True)
class Chunk:
    """Consecutive records of one file.

    Attributes:
        source: the name under which the file is stored.
        num_rows: rows looked at, rejected ones included.
        rows: (kept,) int64, row numbers in the source.
        ids: (kept,) sequence ids.
        sequences: (kept,) upper-case ACGTN.
        metadata: (kept,) the columns of `metadata_schema`.
        rejected: the records that were rejected.
        cleaned: row numbers of the records changed, by rule of `cleaning.CLEANING`.
    """

    source: str
    num_rows: int
    rows: np.ndarray
    ids: list[str]
    sequences: list[str]
    metadata: pa.Table
    rejected: tuple[Rejection, ...]
    cleaned: Mapping[str, np.ndarray]


class _SeenIds:
    """A growing set of ids, 8 bytes each: sorted arrays of 64-bit hashes, merged when alike.

    If two different ids had the same hash, the second would be rejected; among 10 million ids
    the chance of any collision is 3 in a million.
    """

    def __init__(self) -> None:
        self._arrays: list[np.ndarray] = []

    def add(self, ids: Sequence[str | None]) -> np.ndarray:
        """Add ids; True for each seen before, also earlier in `ids`. None is never seen."""
        hashes = np.fromiter(map(hash, ids), np.int64, len(ids))
        known = np.zeros(len(ids), bool)
        for array in self._arrays:
            at = np.searchsorted(array, hashes)
            known |= array[np.minimum(at, len(array) - 1)] == hashes
        distinct, first = np.unique(hashes, return_index=True)
        repeated = np.ones(len(ids), bool)
        repeated[first] = False
        result = known | repeated
        new = distinct[~known[first]]
        while len(new) and self._arrays and len(self._arrays[-1]) <= 2 * len(new):
            new = np.concatenate([self._arrays.pop(), new])
            new.sort(kind="stable")
        if len(new):
            self._arrays.append(new)
        missing = [number for number, name in enumerate(ids) if name is None]
        result[missing] = False
        return result


def read_chunks(
    sources: Sequence[str],
    options: ReadOptions,
    schema: pa.Schema,
    *,
    done: Mapping[str, np.ndarray] | None = None,
    known_ids: Iterable[Sequence[str]] = (),
    share: Share = ALL,
    names: Mapping[str, str] | None = None,
) -> Iterator[Chunk]:
    """Read and clean files.

    Args:
        sources: what `expand_inputs` gave.
        options: names, limits, rows at a time.
        schema: what `metadata_schema` gave.
        done: per source, a bool for each row that needs no more work.
        known_ids: ids that count as seen before.
        share: the part of every source that is wanted. Only ids are read of the other rows, so
            that every process treats repeated ids in the same way.
        names: the stored name of each source; by default the source itself.

    Raises:
        InputError: files could not be read, or not in full; everything readable in these and in
            the others has been yielded. With several processes, the files after the first
            unreadable one are left for a later run.
    """
    seen = _SeenIds()
    for ids in known_ids:
        seen.add(ids)
    nothing = np.zeros(0, bool)
    failures: list[InputError] = []
    for source in sources:
        name = (names or {}).get(source, source)
        finished = (done or {}).get(source, nothing)
        try:
            yield from _read_source(source, name, options, schema, finished, seen, share)
        except InputError as error:
            if share.count > 1:
                raise stop_at(error, share) from error
            failures.append(error)  # told in full at the end; meanwhile, the others are read
            if source != sources[-1]:
                log.warning("%s: could not be read in full; going on with the next file", source)
    if failures:
        raise join_failures(failures)


def stop_at(error: InputError, share: Share) -> InputError:
    """The error of one of several processes that reads no further than a broken file."""
    return InputError(
        f"{error}\nProcess {share.index} of {share.count} stops before the files after it: without "
        "its ids it cannot tell which of their records repeat one. Mend this file or leave it out "
        "of --input for all processes, then run again to go on"
    )


def join_failures(failures: Sequence[InputError]) -> InputError:
    """One error for several files."""
    if len(failures) == 1:
        return failures[0]
    return InputError(
        "\n  ".join([f"{len(failures)} files could not be read in full:", *map(str, failures)])
    )


def _read_source(
    source: str,
    name: str,
    options: ReadOptions,
    schema: pa.Schema,
    done: np.ndarray,
    seen: _SeenIds,
    share: Share,
) -> Iterator[Chunk]:
    key = source_key(name)

    def todo(first_row: int, num_rows: int) -> np.ndarray:
        part = done[first_row : first_row + num_rows]
        result = np.ones(num_rows, bool)
        result[: len(part)] = ~part
        return result

    def is_wanted(first_row: int, num_rows: int) -> bool:
        mine = share.of(key, first_row, num_rows)
        return bool((mine & todo(first_row, num_rows)).any())

    for records in read_records(source, options, is_wanted, done):
        first_row, num_rows = records.first_row, len(records.ids)
        # The ids of rows that are done are among the known ids.
        missing = todo(first_row, num_rows)
        ids = [(text.strip() or None) if text else None for text in records.ids]
        duplicate = np.zeros(num_rows, bool)
        duplicate[missing] = seen.add([ids[place] for place in np.flatnonzero(missing)])
        wanted = missing & share.of(key, first_row, num_rows)
        for block in split_at_blocks(first_row, num_rows):
            places = block.start + np.flatnonzero(wanted[block])
            if len(places):
                yield _clean(name, records, ids, places, duplicate[places], options, schema)


def _clean(
    name: str,
    records: Records,
    ids: list[str | None],
    places: np.ndarray,
    duplicate: np.ndarray,
    options: ReadOptions,
    schema: pa.Schema,
) -> Chunk:
    """Check the records at these positions of what was read."""
    assert records.sequences is not None
    raw = [records.sequences[place] or "" for place in places]
    sequences, complaints, cleaned = clean_sequences(raw, options)
    metadata = records.metadata
    if len(places) < len(ids) and metadata.num_columns:
        metadata = metadata.take(pa.array(places))
    try:
        metadata, wrong_values, is_nan = _shape_metadata(metadata, len(places), schema)
    except pa.ArrowInvalid as error:
        raise InputError(
            f"{name}: a kept column does not fit the type that all files share, from row "
            f"{records.first_row} on ({first_line(error)}); convert it, or leave it out of --keep"
        ) from error
    stripped: list[int] = []
    kept: list[int] = []
    rejected: list[Rejection] = []
    for number, place in enumerate(places.tolist()):
        sequence_id = ids[place]
        if sequence_id is not None and sequence_id != records.ids[place]:
            stripped.append(number)
        if sequence_id is None:
            complaint: Complaint | None = _NO_ID
        elif duplicate[number]:
            complaint = _SEEN_BEFORE
        else:
            complaint = complaints.get(number) or wrong_values.get(number)
            if problem := records.problems.get(place):
                complaint = Complaint(Code.WRONG_QUALITY, problem)
        if complaint is None:
            kept.append(number)
        else:
            row = records.first_row + place
            rejected.append(Rejection(name, row, sequence_id, complaint.reason, complaint.code))
    changes = cleaned | {
        "nan_position": np.flatnonzero(is_nan).tolist(),
        "id_stripped": stripped,
    }
    if len(kept) < metadata.num_rows:
        metadata = metadata.take(pa.array(kept, pa.int64()))
    return Chunk(
        name,
        len(places),
        places[kept] + records.first_row,
        [cast(str, ids[place]) for place in places[kept]],
        [sequences[number] for number in kept],
        metadata,
        tuple(rejected),
        {rule: places[numbers] + records.first_row for rule, numbers in changes.items()},
    )


def _shape_metadata(
    table: pa.Table, num_rows: int, schema: pa.Schema
) -> tuple[pa.Table, dict[int, Complaint], np.ndarray]:
    """Cast to the schema, absent columns null; what is wrong with rows; whether a row has a NaN."""
    wrong: dict[int, Complaint] = {}
    is_nan = np.zeros(num_rows, bool)
    columns = []
    for field in schema:
        if field.name not in table.column_names:
            columns.append(pa.nulls(num_rows, field.type))
        elif field.name in POSITIONS:
            columns.append(_numbers(field.name, table[field.name], wrong, is_nan))
        else:
            columns.append(table[field.name].cast(field.type))
    return pa.table(columns, schema=schema), wrong, is_nan


def _numbers(
    name: str, column: pa.ChunkedArray, wrong: dict[int, Complaint], is_nan: np.ndarray
) -> pa.Array:
    column = column.combine_chunks()
    try:
        values = column.cast(pa.float64())
    except pa.ArrowInvalid:
        values = _parse_one_by_one(name, column, wrong)
    nan = pc.fill_null(pc.is_nan(values), False)
    is_nan |= nan.to_numpy(zero_copy_only=False)
    values = pc.if_else(nan, pa.scalar(None, pa.float64()), values)
    limit = _LIMITS.get(name, np.finfo(np.float64).max)
    outside = pc.fill_null(pc.greater(pc.abs(values), limit), False)
    for row in np.flatnonzero(outside.to_numpy(zero_copy_only=False)).tolist():
        span = f"outside -{limit:.0f} to {limit:.0f}" if name in _LIMITS else "not finite"
        reason = f"{name} {values[row].as_py():g} is {span}"
        wrong.setdefault(row, Complaint(Code.IMPOSSIBLE_VALUE, reason))
    return values


def _parse_one_by_one(name: str, column: pa.Array, wrong: dict[int, Complaint]) -> pa.Array:
    values: list[float | None] = []
    for row, text in enumerate(column.to_pylist()):
        try:
            values.append(float(text) if text not in (None, "") else None)
        except ValueError:
            values.append(None)
            wrong[row] = Complaint(Code.IMPOSSIBLE_VALUE, f"{name} {text!r} is not a number")
    return pa.array(values, pa.float64())
