"""The writing side of the table: schema, done rows, append, indexes.

Input: vectors and metadata with where they came from. Output: rows, and what is already there.
Invariants: an append is one atomic commit that carries its own progress (`source`, `row`), so a
run killed at any moment finds in the table itself what remains to be done; rows made in another
way (model, pooling, ...) are never mixed in.
"""

import json
import logging
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from lancedb.index import Bitmap, BTree, IvfRq

from ..errors import TableError
from ..reads.lineages import RANKS
from ..reads.records import SEEN_BEFORE, Rejection
from .embedding_function import column_metadata
from .neighbours import FINGERPRINT_KEY, connect, exists, first_line
from .rejections import Rejections

log = logging.getLogger(__name__)

_ROWS_PER_BATCH = 1024
_INDEX_ROWS = 5_000  # fewer do not fill the clusters of a vector index


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


@dataclass
class Store:
    """An open table and the record of what was set aside.

    Attributes:
        uri: database folder or URL.
        table: the LanceDB table.
        rejections: the record of what was set aside.
    """

    uri: str
    table: Any
    rejections: Rejections

    @classmethod
    def open(
        cls,
        uri: str,
        name: str,
        schema: pa.Schema,
        *,
        process_index: int = 0,
        rule: str = "",
        sources: Sequence[str] = (),
    ) -> "Store":
        """Open a table, or create it.

        Args:
            uri: database folder or URL.
            name: table name.
            schema: what `table_schema` gave.
            process_index: of several processes that append, which this is.
            rule: how records are read; if it differs from the last run's, records of `sources`
                that were rejected then are looked at again.
            sources: what this run reads.

        Raises:
            TableError: not writable, or made by another model or with other columns; the message
                shows the difference.
        """
        try:
            if "://" not in uri:
                Path(uri).mkdir(parents=True, exist_ok=True)
            database = connect(uri)
            if not exists(database, name):
                # Another process may be creating it at this moment.
                database.create_table(name, schema=schema, exist_ok=True)
            table = database.open_table(name)
        except (OSError, RuntimeError, ValueError) as error:
            raise TableError(
                f"{uri}: the table {name!r} cannot be opened or created ({first_line(error)}); "
                "check the path, its permissions and the free space"
            ) from error
        try:
            _compare(uri, name, table.schema, schema)
        except TableError:
            if table.count_rows():
                raise
            # Begun by a run that failed before its first row: nothing to spoil.
            table = database.create_table(name, schema=schema, mode="overwrite")
        return cls(uri, table, Rejections(uri, name, process_index, rule, sources))

    @property
    def hidden(self) -> int:
        """Length of a vector."""
        return self.table.schema.field("vector").type.list_size

    def done(self) -> dict[str, np.ndarray]:
        """For each source, a bool by row: True where the row is in the table or was rejected."""
        rows: dict[str, list[np.ndarray]] = {}
        batches = self.table.search().select(["source", "row"]).to_batches(1 << 16)
        rejected = self.rejections.of_all_processes().select(["source", "row"]).to_batches()
        for batch in (*batches, *rejected):
            sources = batch["source"].dictionary_encode()
            numbers = batch["row"].to_numpy()
            which = sources.indices.to_numpy()
            for code, source in enumerate(sources.dictionary.to_pylist()):
                rows.setdefault(source, []).append(numbers[which == code])
        result = {}
        for source, parts in rows.items():
            bitmap = np.zeros(max(int(part.max()) for part in parts if len(part)) + 1, bool)
            for part in parts:
                bitmap[part] = True
            result[source] = bitmap
        return result

    def ids(self) -> Iterator[list[str]]:
        """All ids in the table and among the rejected, some thousand at a time.

        Not those rejected as seen before: where several write, the record that they repeat may be
        one that is still to be done, and would then be lost.
        """
        for batch in self.table.search().select(["sequence_id"]).to_batches(1 << 14):
            yield batch["sequence_id"].to_pylist()
        rejected = self.rejections.of_all_processes()
        first = rejected.filter(pc.not_equal(rejected["reason"], SEEN_BEFORE))
        yield [name for name in first["sequence_id"].to_pylist() if name is not None]

    def append(self, parts: Sequence[pa.Table]) -> None:
        """Add rows in one atomic commit.

        Raises:
            TableError: nothing was added.
        """
        try:
            self.table.add(_reader(parts, self.table.schema))
        except (OSError, RuntimeError, ValueError) as error:
            raise _not_written(self.uri, error) from error

    def append_fragments(self, fragments: Sequence[Any]) -> None:
        """Add what `write_fragments` wrote, here or on other hosts, in one atomic commit.

        Raises:
            TableError: nothing was added; a file may not be where this process can see it.
        """
        import lance

        location = self.table.uri
        for fragment in fragments if "://" not in location else ():
            for file in fragment.files:
                if not Path(location, "data", file.path).is_file():
                    raise TableError(
                        f"{location}: a worker wrote {file.path}, and it is not there; the "
                        "database must be one folder for all hosts: a shared disk, gs:// or s3://"
                    )
        try:
            append = lance.LanceOperation.Append(list(fragments))
            lance.LanceDataset.commit(location, append, read_version=self.table.version)
            self.table.checkout_latest()
        except (OSError, RuntimeError, ValueError) as error:
            raise _not_written(self.uri, error) from error

    def reject(self, rejections: Sequence[Rejection]) -> None:
        """Record what cannot be used in `rejected.parquet` beside the table."""
        self.rejections.add(rejections)

    def count_rows(self) -> int:
        """Rows in the table."""
        return self.table.count_rows()

    def sample_norm(self) -> float:
        """Mean Euclidean norm of the table's first vectors; 0 for an empty table."""
        vectors = self.table.search().select(["vector"]).limit(100).to_arrow()["vector"]
        values = vectors.combine_chunks().flatten().to_numpy().astype(np.float32)
        norms = np.linalg.norm(values.reshape(-1, self.hidden), axis=1)
        return float(norms.mean()) if len(norms) else 0.0

    def finish(self, vector_index: bool = False) -> None:
        """Compact once, build scalar indexes, and on request a vector index (IVF_RQ, cosine)."""
        kinds: dict[str, Any] = {"sequence_id": BTree(), "depth": BTree()}
        kinds |= {rank: Bitmap() for rank in RANKS}
        try:
            existing = {column for index in self.table.list_indices() for column in index.columns}
            for column, kind in kinds.items():
                if column in self.table.schema.names and column not in existing:
                    self.table.create_index(column, config=kind)
            if vector_index and "vector" not in existing:
                if self.count_rows() < _INDEX_ROWS:
                    log.info("no vector index: exact search is fast below %d rows", _INDEX_ROWS)
                else:
                    self.table.create_index("vector", config=IvfRq(distance_type="cosine"))
            self.table.optimize()
        except (OSError, RuntimeError, ValueError) as error:
            # The rows are safe; another process may be compacting at the same moment.
            log.warning("the table is complete but not compacted or indexed: %s", error)


def storable(vectors: np.ndarray, schema: pa.Schema) -> tuple[np.ndarray, np.ndarray]:
    """Vectors in the table's dtype, and for each whether all its numbers are finite there."""
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
    """Columns as the table has them; `vectors` (rows, hidden) as from `storable`."""
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

    What is never given to `Store.append_fragments` is removed by the table's clean-up.

    Args:
        location: of the table (`Store.table.uri`), not of the database.
        parts: rows, as from `make_rows`.
        schema: of the table, with its metadata.

    Returns:
        Lance's description of each file (picklable).

    Raises:
        TableError: there is no such table here, or nothing could be written.
    """
    import lance

    try:
        there = lance.dataset(location).schema
    except (OSError, RuntimeError, ValueError) as error:
        raise TableError(
            f"{location}: host {platform.node()} sees no table there ({first_line(error)}); the "
            "database must be one folder for all hosts: a shared disk, gs:// or s3://"
        ) from error
    if (there.metadata or {}).get(FINGERPRINT_KEY) != (schema.metadata or {})[FINGERPRINT_KEY]:
        raise TableError(f"{location}: on host {platform.node()} this is another table")
    try:
        return lance.fragment.write_fragments(_reader(parts, schema), location, schema=schema)
    except (OSError, RuntimeError, ValueError) as error:
        raise _not_written(location, error) from error


def _reader(parts: Sequence[pa.Table], schema: pa.Schema) -> pa.RecordBatchReader:
    batches = (batch for part in parts for batch in part.to_batches(max_chunksize=_ROWS_PER_BATCH))
    return pa.RecordBatchReader.from_batches(schema, batches)


def _not_written(uri: str, error: BaseException) -> TableError:
    return TableError(
        f"{uri}: rows could not be written ({first_line(error)}); check the free "
        "space and permissions. What was committed before is kept: run again to go on"
    )


def _compare(uri: str, name: str, there: pa.Schema, ours: pa.Schema) -> None:
    old = json.loads((there.metadata or {}).get(FINGERPRINT_KEY, b"{}"))
    new = json.loads((ours.metadata or {})[FINGERPRINT_KEY])
    lines = [
        f"  {key}: the table has {old.get(key, 'nothing')!r}, this run has {new.get(key)!r}"
        for key in sorted(old | new)
        if old.get(key) != new.get(key)
    ]
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
