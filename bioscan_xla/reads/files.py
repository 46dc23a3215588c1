"""Files to raw records: picks the reader for each file's format.

Input: names of files, local or in the cloud.
Output: `Records`, a few at a time, in the order of the file, not yet cleaned or checked.
Invariants: at most one batch of rows is held; a truncated file gives all that could be read and
then an `InputError`.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pyarrow as pa

from ..errors import InputError
from .fasta import read_fasta
from .inputs import format_of
from .lineages import RANKS
from .parquet import open_parquet, read_parquet, read_schema, require_columns
from .raw import POSITIONS, ReadOptions, Records


def count_rows(sources: Sequence[str]) -> int | None:
    """Rows in all files, from Parquet footers; None if the files must be read to know."""
    if any(format_of(source) != "parquet" for source in sources):
        return None
    try:
        return sum(open_parquet(source).metadata.num_rows for source in sources)
    except InputError:
        return None  # reading this file will report it


def metadata_schema(
    sources: Sequence[str], options: ReadOptions, table: pa.Schema | None = None
) -> pa.Schema:
    """Schema of the metadata columns: ranks, depth and position, kept columns.

    Args:
        sources: files.
        options: which columns are kept.
        table: schema of a table that gets the records; a kept column has the type it has there,
            if that holds the values of every file.

    Raises:
        InputError: a kept column is missing, or its types in two files have no common type.
    """
    fields = [pa.field(rank, pa.string()) for rank in RANKS]
    fields += [pa.field(name, pa.float64()) for name in POSITIONS]
    return pa.schema(fields + [_fit(f, table) for f in _kept_fields(sources, options.keep)])


def _fit(field: pa.Field, table: pa.Schema | None) -> pa.Field:
    """A kept column in the type that it has in a table, if that holds it."""
    there = table.field(field.name).type if table and field.name in table.names else None
    if pa.types.is_null(field.type):  # no file has a value
        return field.with_type(there or pa.string())
    if there is None or there == field.type:
        return field
    kinds = [_plain(there), _plain(field.type)]
    if all(pa.types.is_string(kind) or pa.types.is_large_string(kind) for kind in kinds):
        return field.with_type(there)
    try:
        common = pa.unify_schemas(
            [pa.schema([field.with_type(kind)]) for kind in kinds], promote_options="permissive"
        )
    except pa.ArrowException:
        return field  # the table refuses it
    return field.with_type(there) if common.field(0).type == kinds[0] else field


def _kept_fields(sources: Sequence[str], keep: Sequence[str]) -> list[pa.Field]:
    """The kept columns, each in a type that holds the values of every file."""
    common: pa.Schema | None = None
    first = ""
    for source in sources if keep else ():
        if format_of(source) != "parquet":
            continue
        schema = read_schema(source, open_parquet(source))
        require_columns(source, schema, keep, "keep")
        own = pa.schema([pa.field(name, schema.field(name).type) for name in keep])
        if common is None:
            common, first = own, source
        else:
            common = _unify(common, own, first, source)
    if common is None:
        return [pa.field(name, pa.null()) for name in keep]
    return list(common)


def _unify(common: pa.Schema, own: pa.Schema, first: str, source: str) -> pa.Schema:
    fields = []
    for before, now in zip(common, own, strict=True):
        if before.type == now.type:
            fields.append(before)
            continue
        pair = [pa.schema([field.with_type(_plain(field.type))]) for field in (before, now)]
        try:
            fields.append(pa.unify_schemas(pair, promote_options="permissive").field(0))
        except pa.ArrowException as error:
            raise InputError(
                f"{source}: column {now.name!r} is of type {now.type}, and in {first} it is "
                f"{before.type}; convert one of them, or leave it out of --keep"
            ) from error
    return pa.schema(fields)


def _plain(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def read_records(
    source: str, options: ReadOptions, is_wanted: Callable[[int, int], bool], done: np.ndarray
) -> Iterator[Records]:
    """Read one file.

    Args:
        source: file or URL.
        options: column names and rows at a time.
        is_wanted: given a first row and a number of rows, whether any of their sequences are
            wanted; for other rows only ids are read.
        done: bool, by row; stretches that are all True are skipped.

    Raises:
        InputError: after all that could be read.
    """
    if format_of(source) == "parquet":
        return read_parquet(source, options, is_wanted, done)
    return read_fasta(source, options, is_wanted, done)
