"""The reading side of a table: open it, what it was made with, its nearest rows.

Input: a database and the name of a table; vectors to look for. Output: the open table, its
fingerprint, rows. Invariants: nothing here writes.
"""

import base64
import json
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("LANCEDB_LOG", "error")  # hides a warning about new tables

import lancedb
import numpy as np
import pyarrow as pa

from ..errors import TableError, first_line
from .mirror import TRANSFORM_SUFFIX

FINGERPRINT_KEY = b"bioscan_xla.fingerprint"
_QUERIES = 64  # per call, which reads the table once
_EXACT_ROWS = 100_000  # up to here an exact search takes well under a second
# Rows ranked again by exact distance, for each row asked for. Recall at 10 with 5, 10, 20: .956,
# .994, .998 (tests/bench/search.py, 110,000 vectors of 256 numbers).
_REFINE = 20
_OPEN_ATTEMPTS, _OPEN_SECONDS = 50, 0.2


def connect(uri: str) -> Any:
    """Connect to a database folder or URL."""
    if os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://"):
        os.environ.setdefault("AWS_ALLOW_HTTP", "true")  # as other programs take it
    return lancedb.connect(uri)


def exists(database: Any, name: str) -> bool:
    """True if the database has a table of this name."""
    return name in database.list_tables(limit=1000).tables


def open_table(uri: str, name: str = "embeddings") -> Any:
    """Open an existing table for reading.

    Raises:
        TableError: it does not exist; the message lists those that do.
    """
    if "://" not in uri and not Path(uri).is_dir():
        raise TableError(f"{uri}: no such database; check the path")
    try:
        database = connect(uri)
        if exists(database, name):
            return database.open_table(name)
        names = database.list_tables(limit=1000).tables
    except (OSError, RuntimeError, ValueError) as error:
        raise TableError(f"{uri}: cannot be opened ({first_line(error)})") from error
    known = f"it has {', '.join(names)}" if names else "it has no tables"
    raise TableError(f"{uri}: has no table {name!r}; {known}")


def open_or_create(database: Any, name: str, schema: pa.Schema) -> Any:
    """Open a table, or create it; another process may be creating it at this moment.

    Its folder is there before its first version, and cannot be opened in between.
    """
    attempts = _OPEN_ATTEMPTS
    while True:
        try:
            if not exists(database, name):
                database.create_table(name, schema=schema, exist_ok=True)
            return database.open_table(name)
        except (RuntimeError, ValueError) as error:
            attempts -= 1
            if "not found" not in str(error).lower() or not attempts:
                raise
            time.sleep(_OPEN_SECONDS)


def read_fingerprint(table: Any) -> dict[str, str]:
    """The fingerprint of the run that made a table; empty if bioscan_xla did not make it.

    The file of its transform is the one beside the table, wherever that is now.
    """
    made_by = json.loads((table.schema.metadata or {}).get(FINGERPRINT_KEY, b"{}"))
    if "transform" in made_by:
        made_by["transform_file"] = transform_file(table.uri)
    return made_by


def transform_file(location: str) -> str:
    """Where the transform of a table is kept: beside it; `location` as `table.uri`."""
    return location.rstrip("/").removesuffix(".lance") + TRANSFORM_SUFFIX


def vectors_of(batch: pa.RecordBatch) -> np.ndarray:
    """Vectors of some rows, (rows, hidden) float32."""
    column = batch["vector"]
    values = column.flatten().to_numpy(zero_copy_only=False)
    return values.astype(np.float32).reshape(-1, column.type.list_size)


def recorded_schema(uri: str, name: str) -> pa.Schema | None:
    """Schema of a table; None if there is no such table yet."""
    try:
        return open_table(uri, name).schema
    except TableError:
        return None


def recorded_revision(uri: str, name: str, model: str) -> str | None:
    """Commit of a hub model that a table was started with, so that a later run uses the same."""
    try:
        made_by = read_fingerprint(open_table(uri, name))
    except TableError:
        return None  # no table yet
    return (made_by.get("revision") or None) if made_by.get("model") == model else None


def recorded_transform(uri: str, name: str) -> str | None:
    """File of the transform of a table, which rows added to it get too."""
    try:
        return read_fingerprint(open_table(uri, name)).get("transform_file")
    except TableError:
        return None  # no table yet


def search_vectors(
    table: Any, vectors: np.ndarray, k: int = 10, where: str | None = None
) -> list[pa.Table]:
    """Nearest rows by cosine distance.

    Args:
        table: an open table.
        vectors: (queries, hidden).
        k: rows per query.
        where: SQL condition on the columns, applied before the search.

    Returns:
        For each query its rows, nearest first, with `_distance` (1 - cosine). Exact up to
        100,000 rows or without a vector index.

    Raises:
        TableError: the condition is invalid or names an unknown column.
    """
    columns = [name for name in table.schema.names if name not in ("vector", "dna_sequence")]
    exact = table.count_rows() <= _EXACT_ROWS
    results: list[pa.Table] = []
    for first in range(0, len(vectors), _QUERIES):
        part = np.ascontiguousarray(vectors[first : first + _QUERIES], np.float32)
        query = table.search(part, vector_column_name="vector")
        query = query.distance_type("cosine").select([*columns, "_distance"]).limit(k)
        if where:
            query = query.where(where, prefilter=True)
        if exact:
            query = query.bypass_vector_index()
        else:
            # maximum 0 means "as many as needed to find k": filters still return k rows.
            query = query.minimum_nprobes(20).maximum_nprobes(0).refine_factor(_REFINE)
        try:
            found = query.to_arrow()
        except (OSError, RuntimeError, ValueError) as error:
            raise TableError(
                f"the search failed ({first_line(error)}); columns are {', '.join(columns)}"
            ) from error
        # LanceDB omits the index for a single query.
        owners = found["query_index"].to_numpy() if len(part) > 1 else np.zeros(len(found), int)
        found = found.select([*columns, "_distance"])
        for number in range(len(part)):
            rows = found.take(pa.array(np.flatnonzero(owners == number)))
            results.append(rows.sort_by("_distance"))
    return results


def nearest_rows(
    table: Any, vectors: np.ndarray, k: int = 10, where: str | None = None
) -> list[list[dict[str, Any]]]:
    """`search_vectors` as records: for each query its rows, with `distance` (1 - cosine)."""
    return [
        [{"distance": abs(round(row.pop("_distance"), 6)), **row} for row in rows.to_pylist()]
        for rows in search_vectors(table, vectors, k, where)
    ]


def plain(value: Any) -> str:
    """Types that JSON lacks: dates and times as ISO 8601, bytes as base64, others as text."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return value.isoformat() if hasattr(value, "isoformat") else str(value)
