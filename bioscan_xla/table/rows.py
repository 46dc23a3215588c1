"""Rows of the table: its schema, vectors in its type, fragments not yet committed.

Input: vectors and metadata with where they came from. Output: Arrow tables, or Lance's files.
Invariants: nothing here commits.
"""

import json
import logging
import platform
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from ..encode.fingerprint import compare, describe
from ..errors import TableError, first_line
from .embedding_function import column_metadata
from .neighbours import FINGERPRINT_KEY

log = logging.getLogger(__name__)

_ROWS_PER_BATCH = 1024


def table_schema(
    hidden: int,
    vector_dtype: str,
    metadata_schema: pa.Schema,
    store_sequences: bool,
    fingerprint: Mapping[str, str],
) -> pa.Schema:
    """Schema of the table: id, sequence, metadata, provenance, vector."""
    fields = [pa.field("sequence_id", pa.string())]
    if store_sequences:
        fields.append(pa.field("dna_sequence", pa.string()))
    fields += list(metadata_schema)
    fields += [pa.field("source", pa.string()), pa.field("row", pa.int64())]
    dtype = pa.float16() if vector_dtype == "float16" else pa.float32()
    fields.append(pa.field("vector", pa.list_(dtype, hidden)))
    metadata: dict[bytes, bytes] = {FINGERPRINT_KEY: json.dumps(dict(fingerprint)).encode()}
    if store_sequences:
        metadata |= column_metadata(fingerprint, hidden)
    return pa.schema(fields, metadata)


def refuse_other_schema(uri: str, name: str, there: pa.Schema, ours: pa.Schema) -> None:
    """TableError, with the differences, if a table was made in another way than ours would be."""
    old = json.loads((there.metadata or {}).get(FINGERPRINT_KEY, b"{}"))
    new = json.loads((ours.metadata or {})[FINGERPRINT_KEY])
    compared = compare(old, new)
    lines = describe(compared.different, old, new)
    if compared.unknown:
        log.info(
            "the table %s is from another release; these could not be compared: %s",
            name,
            ", ".join(compared.unknown),
        )
    for column in dict.fromkeys([*there.names, *ours.names]):
        types = [str(s.field(column).type) if column in s.names else "no" for s in (there, ours)]
        if types[0] != types[1]:
            lines.append(f"  column {column}: the table has {types[0]}, this run has {types[1]}")
    if lines:
        raise TableError(
            f"{uri}: the table {name!r} was made in another way, and mixing would spoil it:\n"
            + "\n".join(lines)
            + "\nUse the same options, or another --table or --db"
        )


def storable(vectors: np.ndarray, schema: pa.Schema) -> tuple[np.ndarray, np.ndarray]:
    """Vectors in the table's dtype, and for each whether all its numbers are finite."""
    dtype = schema.field("vector").type.value_type.to_pandas_dtype()
    squares = np.einsum("ij,ij->i", vectors, vectors)
    finite = squares <= 1e9  # no number above the square root of that; False for NaN
    for row in np.flatnonzero(~finite):
        finite[row] = np.abs(vectors[row]).max() <= np.finfo(dtype).max
    if dtype == np.float16:
        vectors = torch.from_numpy(vectors).half().numpy()  # several times faster than numpy
    return vectors, finite


def make_rows(
    ids: Sequence[str],
    sequences: Sequence[str],
    metadata: pa.Table,
    source: str,
    rows: np.ndarray,
    vectors: np.ndarray,
    schema: pa.Schema,
) -> pa.Table:
    """Columns in the table's schema; `vectors` (rows, hidden) as from `storable`."""
    vector_type = schema.field("vector").type
    columns: dict[str, Any] = {name: metadata[name] for name in metadata.column_names}
    columns |= {
        "sequence_id": pa.array(ids, pa.string()),
        "dna_sequence": pa.array(sequences, pa.string()),
        "source": pa.array([source] * len(ids), pa.string()),
        "row": pa.array(rows, pa.int64()),
        "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), type=vector_type),
    }
    return pa.table({name: columns[name] for name in schema.names}, schema=schema)


def write_fragments(location: str, parts: Sequence[pa.Table], schema: pa.Schema) -> list[Any]:
    """Write rows beside a table's own, as files that no version of it refers to yet.

    Fragments never passed to `Store.append_fragments` are removed by the table's clean-up.

    Args:
        location: of the table (`Store.table.uri`), not of the database.
        parts: rows, as from `make_rows`.
        schema: of the table, with its metadata.

    Returns:
        Lance's description of each file (picklable).

    Raises:
        TableError: no such table on this host, or nothing could be written.
    """
    import lance

    try:
        there = lance.dataset(location).schema
    except (OSError, RuntimeError, ValueError) as error:
        raise TableError(
            f"{location}: host {platform.node()} finds no table there ({first_line(error)}); the "
            "database must be one folder for all hosts: a shared disk, gs:// or s3://"
        ) from error
    if (there.metadata or {}).get(FINGERPRINT_KEY) != (schema.metadata or {})[FINGERPRINT_KEY]:
        raise TableError(f"{location}: on host {platform.node()} this is another table")
    try:
        return lance.fragment.write_fragments(reader_of(parts, schema), location, schema=schema)
    except (OSError, RuntimeError, ValueError) as error:
        raise not_written(location, error) from error


def reader_of(parts: Iterable[pa.Table], schema: pa.Schema) -> pa.RecordBatchReader:
    """Rows in the form that LanceDB commits at once."""
    batches = (batch for part in parts for batch in part.to_batches(max_chunksize=_ROWS_PER_BATCH))
    return pa.RecordBatchReader.from_batches(schema, batches)


def not_written(uri: str, error: BaseException) -> TableError:
    """The error of a commit that failed."""
    return TableError(
        f"{uri}: rows could not be written ({first_line(error)}); check the free "
        "space and permissions. Committed rows are kept: run again to resume"
    )
