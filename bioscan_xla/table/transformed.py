"""A second table in the same database: the rows of a first, their vectors centred or whitened.

Input: a finished table of raw vectors. Output: a table of the same rows, and beside it the file of
the transform. Invariants: the transform is fitted once, to all rows of the first table; rows that
are added to the new table later, and queries, get the same. The first table is only read, and the
new one appears with all its rows in one commit.
"""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from ..encode.transform import Transform, fit, save_transform
from ..errors import TableError
from ..reads.shares import Share
from .embedding_function import column_metadata
from .neighbours import (
    FINGERPRINT_KEY,
    connect,
    exists,
    open_table,
    read_fingerprint,
    transform_file,
    vectors_of,
)
from .rows import storable
from .store import Store, process_count

log = logging.getLogger(__name__)

_BATCH_ROWS = 4096
_CENTRED_MODELS = ("bioscan-small",)


def transform_table(uri: str, name: str, to: str, kind: str) -> int:
    """Fit a transform to a table and write the transformed rows as another table.

    Args:
        uri: database folder or URL.
        name: the table of raw vectors.
        to: name of the new table.
        kind: `center` or `whiten`.

    Returns:
        Number of rows.

    Raises:
        TableError: no such table, it is transformed already, or the new one exists.
        InputError: too few rows.
    """
    source = open_table(uri, name)
    made_by = read_fingerprint(source)
    if not made_by:
        raise TableError(f"{uri}: the table {name!r} was not made by bioscan_xla")
    if "transform" in made_by:
        raise TableError(
            f"{uri}: the vectors of {name!r} are transformed already ({made_by['transform']}); "
            "name the table of raw vectors as --table"
        )
    database = connect(uri)
    if exists(database, to) and database.open_table(to).count_rows():
        raise TableError(
            f"{uri}: the table {to!r} exists. To add rows to it: python -m bioscan_xla.embed "
            f"--table {to}; to fit again, name another --to"
        )
    if Path(made_by["model"]).name in _CENTRED_MODELS and not made_by.get("adapter"):
        log.warning("%s is whitened in its weights; its vectors gain little", made_by["model"])
    source.checkout(source.version)  # other processes may still add rows
    transform = fit((vectors_of(batch) for batch in _scan(source, ["vector"])), kind)
    hidden = len(transform.mean)
    rows = source.count_rows()
    if kind == "whiten" and rows < hidden:
        log.warning(
            "whitening %d numbers a vector by %d rows: some directions are only guessed; take more "
            "rows, or center",
            hidden,
            rows,
        )
    path = transform_file(f"{source.uri.rstrip('/').rpartition('/')[0]}/{to}.lance")
    save_transform(transform, path)
    fingerprint = made_by | {"transform": transform.mark, "transform_file": path}
    schema = _schema_for(source.schema, fingerprint, hidden)
    store = Store.open(uri, to, schema, share=Share(0, process_count(source) or 1))
    store.append(_transformed(source, transform, store.table.schema))
    store.finish()
    return store.count_rows()


def _scan(table: Any, columns: list[str]) -> pa.RecordBatchReader:
    return table.search().select(columns).to_batches(_BATCH_ROWS)


def _schema_for(schema: pa.Schema, fingerprint: dict[str, str], hidden: int) -> pa.Schema:
    import json

    metadata = {**(schema.metadata or {}), FINGERPRINT_KEY: json.dumps(fingerprint).encode()}
    if "dna_sequence" in schema.names:
        metadata |= column_metadata(fingerprint, hidden)
    return schema.with_metadata(metadata)


def _transformed(source: Any, transform: Transform, schema: pa.Schema) -> Iterator[pa.Table]:
    at = schema.get_field_index("vector")
    for batch in _scan(source, schema.names):
        values, _ = storable(transform.apply(vectors_of(batch)), schema)
        column = pa.FixedSizeListArray.from_arrays(
            pa.array(values.ravel()), type=schema.field(at).type
        )
        columns = [column if n == "vector" else batch[n] for n in schema.names]
        yield pa.Table.from_arrays(columns, schema=schema)
