"""The records that could not be used: `rejected.parquet` beside the table.

Input: rejections. Output: a Parquet file of source, row, id, code and reason, one for each process
that writes. Invariants: the file is complete at all times. A record counts as done only under the
rule by which it was read; if the model was the cause, only for that model; if an earlier record has
its id, only as long as there is one.
"""

import itertools
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import fsspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..encode.fingerprint import HINTS
from ..errors import TableError
from ..reads.cleaning import Code
from ..reads.inputs import source_key
from ..reads.records import Rejection

_OLD_RULE_KEY = b"bioscan_xla.reading"  # earlier versions kept one rule for the whole file
_OLD_REASONS = {
    "id seen before": Code.ID_SEEN_BEFORE,
    "its vector is not finite": Code.VECTOR_NOT_FINITE,
}
_SCHEMA = pa.schema(
    [
        ("source", pa.string()),
        ("row", pa.int64()),
        ("sequence_id", pa.string()),
        ("code", pa.string()),
        ("reason", pa.string()),
        ("rule", pa.string()),
        ("model", pa.string()),  # null unless the model was the cause
    ]
)


class Rejections:
    """Records rejected by this process, written to disk, and by the others, read only."""

    def __init__(
        self,
        uri: str,
        table: str,
        process_index: int = 0,
        rule: str = "",
        fingerprint: Mapping[str, str] | None = None,
        sources: Collection[str] = (),
    ):
        """Load the records of an earlier run; drop those that must be checked again.

        Args:
            uri: database folder or URL.
            table: name of the table; only `embeddings` has the plain file name.
            process_index: whose file is written.
            rule: how records are read and checked.
            fingerprint: of the model.
            sources: what this run reads: keys of names, and whole paths as old tables have them.
        """
        self._filesystem, self._folder = fsspec.core.url_to_fs(uri)
        self._stem = "rejected" if table == "embeddings" else f"rejected-{table}"
        self._rule, self._model = rule, _mark_of(fingerprint or {})
        self._sources = frozenset(sources)
        self._free_ids = pa.array([], pa.string())
        self._path = f"{self._folder}/{self._name(process_index)}"
        self._table = _SCHEMA.empty_table()
        self._is_stale = False
        if self._filesystem.exists(self._path):
            self._table = self._read(self._path)
            self._drop_stale()

    def add(self, rejections: Sequence[Rejection]) -> None:
        """Add to the file.

        Raises:
            TableError: it could not be written; the file is unchanged.
        """
        if not rejections and not self._is_stale:
            return
        new = [
            vars(item)
            | {
                "code": item.code.value,
                "rule": self._rule,
                "model": self._model if item.code is Code.VECTOR_NOT_FINITE else None,
            }
            for item in rejections
        ]
        table = pa.concat_tables([self._table, pa.Table.from_pylist(new, schema=_SCHEMA)])
        try:
            with self._filesystem.open(f"{self._path}.part", "wb") as handle:
                pq.write_table(table, handle)
            self._filesystem.mv(f"{self._path}.part", self._path)
        except OSError as error:
            raise TableError(
                f"{self._path}: the rejected records could not be written ({error}); check the "
                "free space and permissions, then run again to resume"
            ) from error
        self._table, self._is_stale = table.combine_chunks(), False

    def recheck_repeats(self, table_ids: Callable[[], Iterable[pa.Array]]) -> None:
        """Let records be read again that repeat an id which no record has any more.

        The record that had it may have been unusable and have gone with its file.

        Args:
            table_ids: gives the ids in the table, some at a time; called only if there are repeats.
        """
        done = self.done()
        done = done.filter(self._is_ours(done))
        is_repeat = pc.equal(done["code"], Code.ID_SEEN_BEFORE.value)
        free = done.filter(is_repeat)["sequence_id"].unique()
        taken = done.filter(pc.invert(is_repeat))["sequence_id"].combine_chunks()
        for ids in itertools.chain([taken], table_ids() if len(free) else ()):
            free = free.filter(pc.invert(pc.is_in(free, ids)))
        self._free_ids = free
        self._drop_stale()

    def ids(self) -> list[str]:
        """Ids of the rejected records of this run's sources, without those that repeat another's.

        Where several write, the record that they repeat may be one that is still to be done, and
        would then be lost. A file that is no longer read, because it was mended, takes no ids.
        """
        done = self.done()
        first = pc.not_equal(done["code"], Code.ID_SEEN_BEFORE.value)
        names = done.filter(pc.and_(first, self._is_ours(done)))["sequence_id"]
        return names.drop_null().to_pylist()

    def done(self) -> pa.Table:
        """Records rejected by all processes that still count as done, see the invariants."""
        tables = [self._table]
        for path in self._filesystem.glob(f"{self._folder}/{self._stem}*.parquet"):
            name = path.rsplit("/", 1)[-1]
            # `rejected-other.parquet` belongs to the table `other`.
            if path != self._path and re.fullmatch(rf"{self._stem}(-\d+)?\.parquet", name):
                tables.append(self._read(path))
        together = pa.concat_tables(tables)
        return together.filter(self._holds(together))

    def _holds(self, table: pa.Table) -> pa.ChunkedArray:
        """For each row, whether its record still counts as done."""
        same_rule = pc.equal(table["rule"], self._rule)
        same_model = pc.or_(
            pc.not_equal(table["code"], Code.VECTOR_NOT_FINITE.value),
            pc.fill_null(pc.equal(table["model"], self._model), False),
        )
        is_repeat = pc.equal(table["code"], Code.ID_SEEN_BEFORE.value)
        is_free = pc.is_in(table["sequence_id"], self._free_ids)
        return pc.and_(pc.and_(same_rule, same_model), pc.invert(pc.and_(is_repeat, is_free)))

    def _is_ours(self, table: pa.Table) -> pa.Array:
        """For each row, whether its source is one that this run reads."""
        ours = [source_key(name) in self._sources for name in table["source"].to_pylist()]
        return pa.array(ours, pa.bool_())

    def _drop_stale(self) -> None:
        """Drop this process's records that must be checked again in this run."""
        there = self._table
        self._table = there.filter(pc.or_(self._holds(there), pc.invert(self._is_ours(there))))
        self._is_stale |= len(self._table) < len(there)

    def _name(self, process_index: int) -> str:
        return f"{self._stem}{f'-{process_index}' if process_index else ''}.parquet"

    def _read(self, path: str) -> pa.Table:
        with self._filesystem.open(path, "rb") as handle:
            table = pq.read_table(handle)
        if "code" not in table.column_names:
            rule = (table.schema.metadata or {}).get(_OLD_RULE_KEY, b"").decode()
            reasons = table["reason"].to_pylist()
            codes = [_OLD_REASONS.get(reason, Code.UNKNOWN).value for reason in reasons]
            table = table.append_column("code", pa.array(codes, pa.string()))
            table = table.append_column("rule", pa.array([rule] * len(table), pa.string()))
            table = table.append_column("model", pa.nulls(len(table), pa.string()))
        return table.replace_schema_metadata(None).select(_SCHEMA.names).cast(_SCHEMA)


def _mark_of(fingerprint: Mapping[str, str]) -> str:
    """Everything that determines a vector, but not the model's location."""
    decisive = {key: value for key, value in fingerprint.items() if key not in HINTS}
    return json.dumps(decisive, sort_keys=True)
