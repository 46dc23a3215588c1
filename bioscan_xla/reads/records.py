"""Raw records to clean ones: the reader that the whole program takes its sequences from.

Enters: files. Leaves: `Chunk` records in the order of the files, their sequences upper-case ACGTN
only, and for each record that cannot be used a `Rejection` with its reason. Guaranteed: a record
is in exactly one place; the first of several with one id is taken, however many processes read;
memory does not grow with the file but for 8 bytes an id.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .files import read_records
from .raw import POSITIONS, ReadOptions, Records

CLEANING = ("case", "u_to_t", "gaps", "iupac_to_n", "trimmed_n")
"""The cleaning rules, in the order they are applied; each counts the records it changed."""

SEEN_BEFORE = "id seen before"
"""Why a record whose id an earlier one had is rejected."""

_LOWER, _URACIL, _GAP, _IUPAC, _N, _ILLEGAL = 1, 2, 4, 8, 16, 32
_GAPS = "-.~ \t\r\n"
_FLAGS = np.full(256, _ILLEGAL, np.uint8)
for _letters, _flag in (("ACGT", 0), ("U", _URACIL), ("RYSWKMBDHV", _IUPAC), ("N", _N)):
    for _letter in _letters:
        _FLAGS[ord(_letter)] = _flag
        _FLAGS[ord(_letter.lower())] = _flag | _LOWER
for _letter in _GAPS:
    _FLAGS[ord(_letter)] = _GAP
_TRANSLATION = str.maketrans("URYSWKMBDHV", "TNNNNNNNNNN", _GAPS)

_LIMITS = {"latitude": 90.0, "longitude": 180.0}


@dataclass(frozen=True)
class Rejection:
    """A record that cannot be used, and why."""

    source: str
    row: int
    sequence_id: str | None
    reason: str


@dataclass(frozen=True)
class Chunk:
    """Neighbouring records of one file.

    Attributes:
        source: file or URL.
        num_rows: rows looked at, rejected ones included.
        rows: (kept,) int64, row numbers in the source.
        ids: (kept,) sequence ids.
        sequences: (kept,) upper-case ACGTN.
        metadata: (kept,) the columns of `metadata_schema`.
        rejected: the records set aside.
        cleaned: records changed, by rule of `CLEANING`.
    """

    source: str
    num_rows: int
    rows: np.ndarray
    ids: list[str]
    sequences: list[str]
    metadata: pa.Table
    rejected: tuple[Rejection, ...]
    cleaned: Mapping[str, int]


class _SeenIds:
    """A growing set of ids, 8 bytes each: sorted arrays of 64-bit hashes, merged when alike.

    Two different ids with one hash would cost the second its place; among 10 million ids the
    chance that any two collide is 3 in a million.
    """

    def __init__(self) -> None:
        self._arrays: list[np.ndarray] = []

    def add(self, ids: Sequence[str | None]) -> np.ndarray:
        """Add ids; True for each that was there before, also earlier in `ids`. None is never."""
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
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Chunk]:
    """Read and clean files.

    Args:
        sources: what `expand_inputs` gave.
        options: names, limits, rows at a time.
        schema: what `metadata_schema` gave.
        done: per source, a bool for each row that needs no more work.
        known_ids: ids that count as seen before.
        process_index: which of several processes this is.
        process_count: how many share the work. A unit of work is a row group of a Parquet file
            that has several, else `chunk_rows` rows.

    Raises:
        InputError: a file cannot be read (any further); all before it has been yielded.
    """
    seen = _SeenIds()
    for names in known_ids:
        seen.add(names)
    mine = itertools.cycle([index == process_index for index in range(process_count)])
    nothing = np.zeros(0, bool)
    for source in sources:
        finished = (done or {}).get(source, nothing)
        for records in read_records(source, options, mine, finished):
            ids = [(name.strip() or None) if name else None for name in records.ids]
            part = finished[records.first_row : records.first_row + len(ids)]
            todo = np.ones(len(ids), bool)
            todo[: len(part)] = ~part
            # Rows that are done have their ids among the known ones.
            places = np.flatnonzero(todo)
            duplicate = seen.add([ids[place] for place in places])
            if records.sequences is not None:
                yield _clean(source, records, ids, places, duplicate, options, schema)


def _clean(
    source: str,
    records: Records,
    ids: list[str | None],
    places: np.ndarray,
    duplicate: np.ndarray,
    options: ReadOptions,
    schema: pa.Schema,
) -> Chunk:
    assert records.sequences is not None
    raw = [records.sequences[place] or "" for place in places]
    sequences, complaints, cleaned = clean_sequences(raw, options)
    metadata, wrong_values = _shape_metadata(records.metadata, len(ids), schema)
    kept: list[int] = []
    rejected: list[Rejection] = []
    for number, place in enumerate(places.tolist()):
        name = ids[place]
        reason = (
            "no id"
            if name is None
            else SEEN_BEFORE
            if duplicate[number]
            else complaints.get(number) or wrong_values.get(place)
        )
        if reason is None:
            kept.append(number)
        else:
            rejected.append(Rejection(source, records.first_row + place, name, reason))
    rows = places[kept]
    if len(rows) < metadata.num_rows:
        metadata = metadata.take(pa.array(rows))
    return Chunk(
        source,
        len(places),
        rows + records.first_row,
        [ids[row] for row in rows],
        [sequences[number] for number in kept],
        metadata,
        tuple(rejected),
        cleaned,
    )


def clean_sequences(
    sequences: Sequence[str], options: ReadOptions | None = None
) -> tuple[list[str], dict[int, str], dict[str, int]]:
    """Clean sequences: upper case, U to T, gaps out, IUPAC codes to N, surrounding N off.

    Gaps are `-`, `.`, `~` and white space.

    Returns:
        The cleaned sequences; for each unusable one its number and reason; records changed by rule.
    """
    options = options or ReadOptions()
    result = list(sequences)
    complaints: dict[int, str] = {}
    cleaned: Counter[str] = Counter()
    for number in np.flatnonzero(_flags_of(sequences)).tolist():
        text = sequences[number]
        flags = int(_flags_of([text])[0])
        if flags & _ILLEGAL:
            complaints[number] = _first_illegal(text)
            continue
        text = text.upper().translate(_TRANSLATION)
        trimmed = text.strip("N")
        changes = (_LOWER, _URACIL, _GAP, _IUPAC)
        cleaned.update(rule for rule, flag in zip(CLEANING, changes, strict=False) if flags & flag)
        cleaned["trimmed_n"] += len(trimmed) < len(text)
        result[number] = trimmed
        if trimmed and trimmed.count("N") > options.max_n_fraction * len(trimmed):
            share = 100 * trimmed.count("N") / len(trimmed)
            complaints[number] = (
                f"{share:.0f} % of it is N, more than {100 * options.max_n_fraction:.0f} %"
            )
    for number, text in enumerate(result):
        if len(text) < options.min_length_bp and number not in complaints:
            complaints[number] = (
                f"{len(text)} bp, shorter than {options.min_length_bp} bp"
                if text
                else "empty sequence"
            )
    return result, complaints, dict(cleaned)


def _flags_of(sequences: Sequence[str]) -> np.ndarray:
    """For each sequence, the flags of all its characters together, (sequences,) uint8."""
    text = "\n".join(sequences) + "\n"
    if not text.isascii():
        # A letter beyond ASCII would shift the bytes; every one of them is illegal.
        text = text.encode("ascii", "replace").decode()
    flags = _FLAGS[np.frombuffer(text.encode(), np.uint8)]
    lengths = np.fromiter(map(len, sequences), np.int64, len(sequences)) + 1
    ends = np.cumsum(lengths)
    flags[ends - 1] = 0  # the separators
    return np.bitwise_or.reduceat(flags, ends - lengths) if len(sequences) else flags[:0]


def _first_illegal(text: str) -> str:
    place, letter = next(
        (place, letter)
        for place, letter in enumerate(text)
        if not letter.isascii() or _FLAGS[ord(letter)] & _ILLEGAL
    )
    return f"character {letter!r} at base {place + 1} is no nucleotide code"


def _shape_metadata(
    table: pa.Table, num_rows: int, schema: pa.Schema
) -> tuple[pa.Table, dict[int, str]]:
    """Cast to the schema, absent columns null; and what is wrong with a row's values."""
    wrong: dict[int, str] = {}
    columns = []
    for field in schema:
        if field.name not in table.column_names:
            columns.append(pa.nulls(num_rows, field.type))
        elif field.name in POSITIONS:
            columns.append(_numbers(field.name, table[field.name], wrong))
        else:
            columns.append(table[field.name].cast(field.type))
    return pa.table(columns, schema=schema), wrong


def _numbers(name: str, column: pa.ChunkedArray, wrong: dict[int, str]) -> pa.Array:
    column = column.combine_chunks()
    try:
        values = column.cast(pa.float64())
    except pa.ArrowInvalid:
        values = _parse_one_by_one(name, column, wrong)
    values = pc.if_else(pc.is_nan(values), pa.scalar(None, pa.float64()), values)
    limit = _LIMITS.get(name, np.finfo(np.float64).max)
    outside = pc.fill_null(pc.greater(pc.abs(values), limit), False)
    for row in np.flatnonzero(outside.to_numpy(zero_copy_only=False)).tolist():
        span = f"outside -{limit:.0f} to {limit:.0f}" if name in _LIMITS else "not finite"
        wrong.setdefault(row, f"{name} {values[row].as_py():g} is {span}")
    return values


def _parse_one_by_one(name: str, column: pa.Array, wrong: dict[int, str]) -> pa.Array:
    values: list[float | None] = []
    for row, text in enumerate(column.to_pylist()):
        try:
            values.append(float(text) if text not in (None, "") else None)
        except ValueError:
            values.append(None)
            wrong[row] = f"{name} {text!r} is no number"
    return pa.array(values, pa.float64())
