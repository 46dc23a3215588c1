"""Parquet to raw records.

Input: the name or address of a Parquet file.
Output: `Records`, a few at a time, in the order of the file: ids, sequences and ranks as text,
depth and position as float64 or text, kept columns in their own type.
Invariants: at most one batch of rows is held; every column is checked before the first row is read;
text that is not UTF-8 affects only its own odd letters.
"""

import functools
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pyarrow.types as pt

from ..errors import InputError, first_line
from .column_names import suggest_columns
from .inputs import filesystem_of, is_remote
from .lineages import RANKS
from .lines import read_head
from .raw import POSITIONS, ReadOptions, Records, all_done

log = logging.getLogger(__name__)

_BUFFER_BYTES = 1 << 20
_MAGIC = b"PAR1"
_ERRORS = (OSError, pa.ArrowException, ValueError, OverflowError, MemoryError)
"""Errors that Arrow raises on damaged files; ValueError covers names that are not UTF-8."""


def open_parquet(source: str) -> pq.ParquetFile:
    """Open a Parquet file with small read buffers (local) or with read-ahead (remote).

    Pages with a checksum are verified.
    """
    try:
        if is_remote(source):
            filesystem, path = filesystem_of(source)
            file = filesystem.open(path, "rb")
            return pq.ParquetFile(file, pre_buffer=True, page_checksum_verification=True)
        return pq.ParquetFile(
            source, pre_buffer=False, buffer_size=_BUFFER_BYTES, page_checksum_verification=True
        )
    except InputError:
        raise
    except Exception as error:  # every storage backend raises its own errors
        if not is_remote(source) and not isinstance(error, _ERRORS):
            raise
        raise InputError(f"{source}: {_why_unreadable(source, error)}") from error


def _why_unreadable(source: str, error: Exception) -> str:
    head = read_head(source)
    if head.startswith(_MAGIC):
        return (
            f"is a Parquet file that cannot be opened ({first_line(error)}); "
            "its end may be missing: copy it again"
        )
    if head[:1] in (b">", b"@"):
        kind = "FASTA" if head[:1] == b">" else "FASTQ"
        return f"contains {kind}, not Parquet; rename it to end in .{kind.lower()}"
    if head:
        return f"is not Parquet ({first_line(error)}); check the file, or copy it again"
    return f"cannot be read as Parquet ({first_line(error)}); check the path, or copy it again"


def require_columns(source: str, schema: pa.Schema, names: Sequence[str], option: str) -> None:
    """Refuse a file in which one of these columns is missing or duplicated.

    Args:
        source: the file.
        schema: its schema.
        names: columns that will be read.
        option: the flag that names them.
    """
    have = ", ".join(schema.names)
    for name in names:
        if name not in schema.names:
            raise InputError(
                f"{source}: has no column {name!r}; it has {have}. "
                f"Name the right one with --{option}"
            )
    _refuse_doubled(source, schema, names)


def _refuse_doubled(source: str, schema: pa.Schema, names: Sequence[str]) -> None:
    counts = Counter(schema.names)
    for name in names:
        if counts[name] > 1:
            raise InputError(
                f"{source}: has {counts[name]} columns named {name!r}; rename all but one"
            )


def check_columns(source: str, schema: pa.Schema, options: ReadOptions) -> dict[str, str]:
    """Check every column that will be read, before reading any row.

    Returns:
        Our name and the file's of each metadata column that the file has.

    Raises:
        InputError: a column is missing, duplicated, or of an unusable type.
    """
    ours = {
        "sequence_id": options.name("sequence_id"),
        "dna_sequence": options.name("dna_sequence"),
    }
    missing = [our for our, theirs in ours.items() if theirs not in schema.names]
    option = "--" + options.columns_option.replace("_", "-")
    if missing:
        names = " or ".join(repr(ours[our]) for our in missing)
        hint = suggest_columns(missing, schema.names)
        remedy = f"Perhaps: {option} {hint}" if hint else f"Name the right one with {option}"
        if set(missing) <= set(schema.names):
            remedy = f"Leave {' and '.join(missing)} out of {option}"
        raise InputError(
            f"{source}: has no column {names}; it has {', '.join(schema.names)}. {remedy}"
        )
    require_columns(source, schema, list(options.columns.values()), option[2:])
    require_columns(source, schema, options.keep, "keep")
    wanted = {name: options.name(name) for name in (*RANKS, *POSITIONS)}
    wanted |= {name: name for name in options.keep}
    wanted = {our: theirs for our, theirs in wanted.items() if theirs in schema.names}
    _refuse_doubled(source, schema, [*ours.values(), *wanted.values()])
    for our, theirs in (ours | wanted).items():
        if our not in options.keep:
            _check_type(source, schema.field(theirs), our, option)
    _mention_unread(schema, wanted, option)
    return wanted


def _check_type(source: str, field: pa.Field, our: str, option: str) -> None:
    kind = field.type.value_type if pt.is_dictionary(field.type) else field.type
    usable = pt.is_null(kind) or is_text(kind)
    needed = "text"
    if our in POSITIONS:
        usable |= pt.is_integer(kind) or pt.is_floating(kind) or pt.is_decimal(kind)
        needed = "numbers"
    elif our == "sequence_id":
        usable |= pt.is_integer(kind)
        needed = "text or whole numbers"
    elif our in RANKS:
        # pandas writes a rank that no row has as a column of NaN.
        usable |= pt.is_integer(kind) or pt.is_floating(kind)
    if not usable:
        raise InputError(
            f"{source}: column {field.name!r} is of type {field.type}, and {our} must be {needed}; "
            f"convert it, or name another with {option} {our}=NAME"
        )


def is_text(kind: pa.DataType) -> bool:
    """True for strings and bytes of any width."""
    tests = (pt.is_string, pt.is_large_string, pt.is_binary, pt.is_large_binary)
    return any(test(kind) for test in tests) or kind in (pa.string_view(), pa.binary_view())


def _mention_unread(schema: pa.Schema, wanted: dict[str, str], option: str) -> None:
    """Log which columns are probably ranks or positions under another name."""
    absent = [our for our in (*RANKS, *POSITIONS) if our not in wanted]
    free = [name for name in schema.names if name not in wanted.values()]
    by_case = {name.lower(): name for name in free}
    alike = [f"{our}={by_case[our]}" for our in absent if our in by_case]
    if alike:
        _mention_columns(f"{option} {' '.join(alike)}")


@functools.cache  # once per run, not for every file
def _mention_columns(words: str) -> None:
    log.warning("unrecognised columns are ignored; to read them: %s", words)


def read_parquet(
    source: str, options: ReadOptions, is_wanted: Callable[[int, int], bool], done: np.ndarray
) -> Iterator[Records]:
    """Read one Parquet file; see `read_records`."""
    file = open_parquet(source)
    schema = read_schema(source, file)
    id_name, sequence_name = options.name("sequence_id"), options.name("dna_sequence")
    wanted = check_columns(source, schema, options)
    first_row = 0
    for group in range(file.num_row_groups):
        num_rows = file.metadata.row_group(group).num_rows
        if all_done(done, first_row, num_rows):
            first_row += num_rows
            continue
        end = first_row + num_rows
        is_mine = is_wanted(first_row, num_rows)
        columns = [id_name, sequence_name, *wanted.values()] if is_mine else [id_name]
        try:
            # With threads, Arrow hangs on some damaged pages.
            batches = file.iter_batches(options.chunk_rows, [group], columns, use_threads=False)
            for batch in batches:
                if not all_done(done, first_row, batch.num_rows):
                    yield _from_batch(batch, first_row, is_mine, id_name, sequence_name, wanted)
                first_row += batch.num_rows
            if first_row != end:
                raise pa.ArrowInvalid(f"it should end at row {end}")
        except _ERRORS as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"{source}: row group {group} is damaged after row {first_row} "
                f"({first_line(error)}); copy the file again. The rows before it are kept"
            ) from error


def read_schema(source: str, file: pq.ParquetFile) -> pa.Schema:
    """The Arrow schema of an open file."""
    try:
        schema = file.schema_arrow
        schema.names  # noqa: B018 - raises where a name is not UTF-8
        return schema
    except _ERRORS as error:
        raise InputError(
            f"{source}: its schema cannot be read ({first_line(error)}); copy the file again"
        ) from error


def _from_batch(
    batch: pa.RecordBatch,
    first_row: int,
    is_mine: bool,
    id_name: str,
    sequence_name: str,
    wanted: dict[str, str],
) -> Records:
    ids = as_text(batch[id_name]).to_pylist()
    if not is_mine:
        return Records(first_row, ids, None, pa.table({}))
    columns = {our: _as_metadata(batch[theirs], our) for our, theirs in wanted.items()}
    sequences = as_text(batch[sequence_name]).to_pylist()
    return Records(first_row, ids, sequences, pa.table(columns))


def _as_metadata(column: pa.Array, our: str) -> pa.Array:
    if our in RANKS or pt.is_string(column.type) or pt.is_large_string(column.type):
        return as_text(column)
    if our in POSITIONS:
        if pt.is_dictionary(column.type):
            column = column.dictionary_decode()
        return as_text(column) if is_text(column.type) else column.cast(pa.float64(), safe=False)
    try:
        column.validate(full=True)
    except pa.ArrowInvalid as error:
        raise pa.ArrowInvalid(f"column {our!r}: {first_line(error)}") from error
    return column


def as_text(column: pa.Array) -> pa.Array:
    """A column as strings; bytes that are not UTF-8 are read as Latin-1, and NaN as null."""
    if pt.is_dictionary(column.type):
        column = column.dictionary_decode()
    if not is_text(column.type):
        if pt.is_floating(column.type):
            column = pc.if_else(pc.is_nan(column), pa.scalar(None, column.type), column)
        return column.cast(pa.string())
    raw = column.cast(pa.large_binary())
    try:
        return raw.cast(pa.large_string()).cast(pa.string())
    except pa.ArrowInvalid:
        return pa.array([None if item is None else _decode(item) for item in raw.to_pylist()])


def _decode(item: bytes) -> str:
    try:
        return item.decode("utf-8")
    except UnicodeDecodeError:
        return item.decode("latin-1")
