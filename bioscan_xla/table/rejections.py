"""The records that could not be used: `rejected.parquet` beside the table.

Enters: rejections. Leaves: a Parquet file of source, row, id and reason, one for each process
that writes. Guaranteed: the file is whole at every moment; a record that was rejected under the
same rule is not looked at again.
"""

import re
from collections.abc import Sequence

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import TableError
from ..reads.records import Rejection

_RULE_KEY = b"bioscan_xla.reading"
_SCHEMA = pa.schema(
    [
        ("source", pa.string()),
        ("row", pa.int64()),
        ("sequence_id", pa.string()),
        ("reason", pa.string()),
    ]
)


class Rejections:
    """What this process set aside, on disk; and what the others did, for reading."""

    def __init__(self, uri: str, table: str, process_index: int, rule: str, sources: Sequence[str]):
        """Load what an earlier run left; under another `rule`, forget that of this run's sources.

        Args:
            uri: database folder or URL.
            table: name of the table; only `embeddings` has the plain file name.
            process_index: whose file is written.
            rule: how records are read and judged.
            sources: what this run reads.
        """
        self._filesystem, self._folder = fsspec.core.url_to_fs(uri)
        self._stem = "rejected" if table == "embeddings" else f"rejected-{table}"
        self._rule = rule
        self._path = f"{self._folder}/{self._name(process_index)}"
        self._table = _SCHEMA.empty_table()
        if self._filesystem.exists(self._path):
            self._table, old_rule = self._read(self._path)
            if old_rule != rule:
                again = set(sources)
                keep = [source not in again for source in self._table["source"].to_pylist()]
                self._table = self._table.filter(pa.array(keep, pa.bool_()))

    def add(self, rejections: Sequence[Rejection]) -> None:
        """Add to the file.

        Raises:
            TableError: it could not be written; what was there before still is.
        """
        if not rejections:
            return
        new = pa.Table.from_pylist([vars(item) for item in rejections], schema=_SCHEMA)
        self._table = pa.concat_tables([self._table, new]).combine_chunks()
        try:
            with self._filesystem.open(f"{self._path}.part", "wb") as handle:
                metadata = {_RULE_KEY: self._rule.encode()}
                pq.write_table(self._table.replace_schema_metadata(metadata), handle)
            self._filesystem.mv(f"{self._path}.part", self._path)
        except OSError as error:
            raise TableError(
                f"{self._path}: the rejected records could not be written ({error}); check the "
                "free space and permissions, then run again to go on"
            ) from error

    def of_all_processes(self) -> pa.Table:
        """The rejected records of all processes that were judged under this run's rule."""
        tables = [self._table]
        for path in self._filesystem.glob(f"{self._folder}/{self._stem}*.parquet"):
            name = path.rsplit("/", 1)[-1]
            # `rejected-other.parquet` belongs to the table `other`.
            if path == self._path or not re.fullmatch(rf"{self._stem}(-\d+)?\.parquet", name):
                continue
            table, rule = self._read(path)
            if rule == self._rule:
                tables.append(table)
        return pa.concat_tables(tables)

    def _name(self, process_index: int) -> str:
        return f"{self._stem}{f'-{process_index}' if process_index else ''}.parquet"

    def _read(self, path: str) -> tuple[pa.Table, str]:
        with self._filesystem.open(path, "rb") as handle:
            table = pq.read_table(handle)
        rule = (table.schema.metadata or {}).get(_RULE_KEY, b"").decode()
        return table.replace_schema_metadata(None).cast(_SCHEMA), rule
