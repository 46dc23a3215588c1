"""Parquet to raw records.

Input: the name or address of a Parquet file.
Output: `Records`, a few at a time, in the order of the file.
Invariants: no more than one batch of rows is held; columns are checked before rows are read.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import InputError
from .inputs import filesystem_of, is_remote
from .lineages import RANKS
from .raw import POSITIONS, ReadOptions, Records, all_done, first_line


def open_parquet(source: str) -> pq.ParquetFile:
    """Open a Parquet file with small read buffers (local) or with read-ahead (remote)."""
    try:
        if is_remote(source):
            filesystem, path = filesystem_of(source)
            return pq.ParquetFile(filesystem.open(path, "rb"), pre_buffer=True)
        return pq.ParquetFile(source, pre_buffer=False, buffer_size=1 << 20)
    except (OSError, pa.ArrowException) as error:
        raise InputError(
            f"{source}: cannot be read as Parquet ({first_line(error)}); "
            "it may be truncated: copy it again"
        ) from error


def require_columns(source: str, schema: pa.Schema, names: Sequence[str], option: str) -> None:
    """Refuse a file that lacks a column; `option` is the flag that names it."""
    for name in names:
        if name not in schema.names:
            raise InputError(
                f"{source}: has no column {name!r}; it has {', '.join(schema.names)}. "
                f"Name the right one with --{option}"
            )


def read_parquet(
    source: str, options: ReadOptions, is_wanted: Callable[[int, int], bool], done: np.ndarray
) -> Iterator[Records]:
    """Read one Parquet file; see `read_records`."""
    file = open_parquet(source)
    schema = file.schema_arrow
    id_name, sequence_name = options.name("sequence_id"), options.name("dna_sequence")
    require_columns(source, schema, [id_name, sequence_name, *options.columns.values()], "columns")
    require_columns(source, schema, options.keep, "keep")
    wanted = {options.name(name): name for name in (*RANKS, *POSITIONS)}
    wanted |= {name: name for name in options.keep}
    wanted = {theirs: our for theirs, our in wanted.items() if theirs in schema.names}
    first_row = 0
    for group in range(file.num_row_groups):
        num_rows = file.metadata.row_group(group).num_rows
        if all_done(done, first_row, num_rows):
            first_row += num_rows
            continue
        is_mine = is_wanted(first_row, num_rows)
        columns = [id_name, sequence_name, *wanted] if is_mine else [id_name]
        try:
            for batch in file.iter_batches(options.chunk_rows, [group], columns):
                if not all_done(done, first_row, batch.num_rows):
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
                f"({first_line(error)}); copy the file again. What came before it is kept"
            ) from error


def _texts(column: pa.ChunkedArray) -> list[str | None]:
    return column.cast(pa.string()).to_pylist()
