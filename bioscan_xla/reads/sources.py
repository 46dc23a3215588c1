"""Files to raw records: Parquet, FASTA and FASTQ, local or in the cloud.

Enters: names of files. Leaves: `Records`, a few at a time, in the order of the file, as text that
nobody has judged yet. Guaranteed: no more than one batch of rows is held; a file that breaks off
gives all that could be read and then an `InputError`.
"""

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import dnaio
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import ConfigError, InputError
from .inputs import filesystem_of, format_of, is_remote
from .lineages import HEADER_STYLES, RANKS, split_header

log = logging.getLogger(__name__)

POSITIONS = ("depth", "latitude", "longitude")
"""Columns of numbers: metres below the surface, degrees north, degrees east."""


@dataclass(frozen=True)
class ReadOptions:
    """How records are read and judged.

    Attributes:
        columns: our column name to the file's, where they differ.
        keep: further Parquet columns to carry into the table.
        header_taxonomy: lineage in FASTA headers: `sintax` (`;tax=k:..,p:..;`), `silva`
            (`a;b;c` after the id) or None.
        min_length_bp: shortest usable sequence after cleaning.
        max_n_fraction: largest usable share of N after cleaning.
        chunk_rows: rows read at a time.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    keep: tuple[str, ...] = ()
    header_taxonomy: str | None = None
    min_length_bp: int = 20
    max_n_fraction: float = 0.5
    chunk_rows: int = 1024

    def __post_init__(self):
        """Refuse what contradicts itself."""
        ours = ("sequence_id", "dna_sequence", *RANKS, *POSITIONS)
        unknown = sorted(set(self.columns) - set(ours))
        if unknown:
            raise ConfigError(
                f"columns maps {unknown[0]!r}, which is no column of the table; "
                f"it can map {', '.join(ours)}"
            )
        taken = sorted(set(self.keep) & {*ours, "source", "row", "vector"})
        if taken:
            raise ConfigError(f"keep names {taken[0]!r}, which the table has already; leave it out")
        if self.header_taxonomy not in (None, *HEADER_STYLES):
            raise ConfigError(
                f"header_taxonomy {self.header_taxonomy!r} is unknown; "
                f"choose {' or '.join(HEADER_STYLES)}"
            )

    def name(self, column: str) -> str:
        """The file's name for one of our columns."""
        return self.columns.get(column, column)


@dataclass(frozen=True)
class Records:
    """Neighbouring rows of one file, as they are in it.

    Attributes:
        first_row: row number in the file, from 0.
        ids: None where the file has none.
        sequences: None for all rows when another process computes them and only ids matter.
        metadata: columns that the file has, under our names.
    """

    first_row: int
    ids: list[str | None]
    sequences: Sequence[str | None] | None
    metadata: pa.Table


def open_parquet(source: str) -> pq.ParquetFile:
    """Open a Parquet file with small read buffers (local) or with read-ahead (remote)."""
    try:
        if is_remote(source):
            filesystem, path = filesystem_of(source)
            return pq.ParquetFile(filesystem.open(path, "rb"), pre_buffer=True)
        return pq.ParquetFile(source, pre_buffer=False, buffer_size=1 << 20)
    except (OSError, pa.ArrowException) as error:
        raise InputError(
            f"{source}: cannot be read as Parquet ({_first_line(error)}); "
            "it may be truncated: copy it again"
        ) from error


def count_rows(sources: Sequence[str]) -> int | None:
    """Rows in all files, from Parquet footers; None where only reading them would tell."""
    if any(format_of(source) != "parquet" for source in sources):
        return None
    try:
        return sum(open_parquet(source).metadata.num_rows for source in sources)
    except InputError:
        return None  # reading will come to this file and say so


def metadata_schema(sources: Sequence[str], options: ReadOptions) -> pa.Schema:
    """Schema of the metadata columns: ranks, depth and position, kept columns."""
    fields = [pa.field(rank, pa.string()) for rank in RANKS]
    fields += [pa.field(name, pa.float64()) for name in POSITIONS]
    kept = dict.fromkeys(options.keep, pa.string())
    for source in sources if options.keep else ():
        if format_of(source) == "parquet":
            schema = open_parquet(source).schema_arrow
            _require(source, schema, options.keep, "keep")
            kept = {name: schema.field(name).type for name in options.keep}
            break
    return pa.schema(fields + [pa.field(*item) for item in kept.items()])


def _require(source: str, schema: pa.Schema, names: Sequence[str], option: str) -> None:
    for name in names:
        if name not in schema.names:
            raise InputError(
                f"{source}: has no column {name!r}; it has {', '.join(schema.names)}. "
                f"Name the right one with --{option}"
            )


def read_records(
    source: str, options: ReadOptions, mine: Iterator[bool], done: np.ndarray
) -> Iterator[Records]:
    """Read one file.

    Args:
        source: file or URL.
        options: column names and rows at a time.
        mine: tells of each unit of work whether it is this process's.
        done: bool, by row; stretches that are all True are passed over.

    Raises:
        InputError: after all that could be read.
    """
    if format_of(source) == "parquet":
        return _read_parquet(source, options, mine, done)
    return _read_fasta(source, options, mine, done)


def _read_parquet(
    source: str, options: ReadOptions, mine: Iterator[bool], done: np.ndarray
) -> Iterator[Records]:
    file = open_parquet(source)
    schema = file.schema_arrow
    id_name, sequence_name = options.name("sequence_id"), options.name("dna_sequence")
    _require(source, schema, [id_name, sequence_name, *options.columns.values()], "columns")
    _require(source, schema, options.keep, "keep")
    wanted = {options.name(name): name for name in (*RANKS, *POSITIONS)}
    wanted |= {name: name for name in options.keep}
    wanted = {theirs: our for theirs, our in wanted.items() if theirs in schema.names}
    by_group = file.num_row_groups > 1
    first_row = 0
    for group in range(file.num_row_groups):
        num_rows = file.metadata.row_group(group).num_rows
        is_mine = next(mine) if by_group else True
        if _all_done(done, first_row, num_rows):
            first_row += num_rows
            continue
        columns = [id_name, sequence_name, *wanted] if is_mine else [id_name]
        try:
            for batch in file.iter_batches(options.chunk_rows, [group], columns):
                if not by_group:
                    is_mine = next(mine)
                if not _all_done(done, first_row, batch.num_rows):
                    table = pa.Table.from_batches([batch])
                    yield Records(
                        first_row,
                        _texts(table[id_name]),
                        _texts(table[sequence_name]) if is_mine else None,
                        table.select(list(wanted)).rename_columns(list(wanted.values()))
                        if is_mine
                        else table.select([]),
                    )
                first_row += batch.num_rows
        except (OSError, pa.ArrowException) as error:
            raise InputError(
                f"{source}: row group {group} breaks off after row {first_row} "
                f"({_first_line(error)}); copy the file again. What came before it is kept"
            ) from error


def _texts(column: pa.ChunkedArray) -> list[str | None]:
    return column.cast(pa.string()).to_pylist()


def _all_done(done: np.ndarray, first_row: int, num_rows: int) -> bool:
    part = done[first_row : first_row + num_rows]
    return len(part) == num_rows and bool(part.all())


def _read_fasta(
    source: str, options: ReadOptions, mine: Iterator[bool], done: np.ndarray
) -> Iterator[Records]:
    row = 0
    try:
        if is_remote(source):
            filesystem, path = filesystem_of(source)
            compression = "gzip" if source.lower().endswith(".gz") else None
            target = filesystem.open(path, "rb", compression=compression)
        else:
            target = source
        # One record beyond the chunk is never read, so a break loses nothing that came before it.
        with dnaio.open(target, fileformat=format_of(source), open_threads=0) as reader:
            records = iter(reader)
            while True:
                headers, sequences, broken = _take(records, options.chunk_rows)
                if headers:
                    is_mine = next(mine)
                    if not _all_done(done, row, len(headers)):
                        yield _from_headers(row, headers, sequences if is_mine else None, options)
                    row += len(headers)
                if broken is not None:
                    raise broken
                if not headers:
                    break
    except (OSError, EOFError, ValueError, dnaio.FileFormatError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{source}: breaks off after record {row} ({_first_line(error)}); "
            "copy the file again. What came before it is kept"
        ) from error
    if row == 0:
        log.warning("%s holds no record", source)


def _take(records: Iterator, count: int) -> tuple[list[str], list[str], Exception | None]:
    headers, sequences = [], []
    try:
        for record in itertools.islice(records, count):
            headers.append(record.name)
            sequences.append(record.sequence)
    except (OSError, EOFError, ValueError, dnaio.FileFormatError) as error:
        return headers, sequences, error
    return headers, sequences, None


def _from_headers(
    first_row: int, headers: list[str], sequences: list[str] | None, options: ReadOptions
) -> Records:
    if options.header_taxonomy is None:
        ids = [header.split(maxsplit=1)[0] if header.strip() else None for header in headers]
        return Records(first_row, ids, sequences, pa.table({}))
    split = [split_header(header, options.header_taxonomy) for header in headers]
    columns = zip(*(lineage for _, lineage in split), strict=True)
    metadata = pa.table(
        {rank: pa.array(names, pa.string()) for rank, names in zip(RANKS, columns, strict=True)}
    )
    return Records(first_row, [name or None for name, _ in split], sequences, metadata)


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]
