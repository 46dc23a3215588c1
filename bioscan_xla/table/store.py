"""The writing side of the table: finished rows, appends, indexes.

Input: vectors and metadata with where they came from. Output: rows, and what is already there.
Invariants: an append is one atomic commit that records its own progress (`source`, `row`), so after
a kill the table itself shows what remains to be done; rows made with another model, pooling and so
on are never mixed in.
"""

import json
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from lancedb.index import Bitmap, BTree, IvfRq

from ..errors import TableError, first_line
from ..reads.cleaning import Code
from ..reads.inputs import changed_files, source_key
from ..reads.lineages import RANKS
from ..reads.records import Rejection
from ..reads.shares import ALL, Share, by_source, mark
from .claim import Claim
from .neighbours import FINGERPRINT_KEY, connect, open_or_create
from .rejections import Rejections
from .rows import not_written, reader_of, refuse_other_schema

log = logging.getLogger(__name__)

_COUNT_KEY = "bioscan_xla.process_count"  # metadata of column `source`
_INDEX_ROWS = 5_000  # fewer do not fill the clusters of a vector index


@dataclass(frozen=True)
class Done:
    """Records that need no more work.

    Attributes:
        rows: per path of this run, a bool by row: True where it is in the table or was rejected.
        num_usable: records of these sources that the table has, under their own or an earlier
            record's id.
    """

    rows: dict[str, np.ndarray]
    num_usable: int


@dataclass
class Store:
    """An open table and its rejected records.

    Attributes:
        uri: database folder or URL.
        table: the LanceDB table.
        rejections: the record of what was rejected.
        names: path of each source of this run, and its stored name.
        share: which of how many processes this is.
        claim: what tells whether another run has taken this one's place.
    """

    uri: str
    table: Any
    rejections: Rejections
    names: Mapping[str, str]
    share: Share
    claim: Claim
    _num_own: int | None = None  # rows of this share when it was asked what is done

    @classmethod
    def open(
        cls,
        uri: str,
        name: str,
        schema: pa.Schema,
        *,
        rule: str = "",
        names: Mapping[str, str] | None = None,
        share: Share = ALL,
        reshare: bool = False,
    ) -> "Store":
        """Open a table, or create it.

        Args:
            uri: database folder or URL.
            name: table name.
            schema: from `table_schema`.
            rule: how records are read; records rejected under another rule are checked again.
            names: what this run reads, as from `name_inputs`.
            share: which of how many processes this is.
            reshare: take over a table filled by another number of processes.

        Raises:
            TableError: not writable, made by another model or with other columns (the message
                shows the difference), or filled by another number of processes.
        """
        names = names or {}
        count = {_COUNT_KEY: str(share.count)}
        at = schema.get_field_index("source")
        schema = schema.set(at, schema.field(at).with_metadata(count))
        try:
            if "://" not in uri:
                Path(uri).mkdir(parents=True, exist_ok=True)
            database = connect(uri)
            table = open_or_create(database, name, schema)
            try:
                refuse_other_schema(uri, name, table.schema, schema)
            except TableError:
                if table.count_rows():
                    raise
                # Left by a run that failed before its first row: safe to replace.
                table = database.create_table(name, schema=schema, mode="overwrite")
            if process_count(table) != share.count:
                if table.count_rows() and process_count(table) and not reshare:
                    raise _other_count(uri, name, table, share.count)
                table.update_field_metadata({"path": "source", "metadata": count})
            claim = Claim(uri, name, share, names.values(), reshare)
            # Only now: rows that a run before this one still commits must be seen.
            table.checkout_latest()
        except (OSError, RuntimeError, ValueError) as error:
            if isinstance(error, TableError):
                raise
            raise TableError(
                f"{uri}: the table {name!r} cannot be opened or created ({first_line(error)}); "
                "check the path, its permissions and the free space"
            ) from error
        fingerprint = json.loads((schema.metadata or {})[FINGERPRINT_KEY])
        ours = {*map(source_key, names.values()), *names}
        rejections = Rejections(uri, name, share.index, rule, fingerprint, ours)
        return cls(uri, table, rejections, names, share, claim)

    @property
    def hidden(self) -> int:
        """Length of a vector."""
        return self.table.schema.field("vector").type.list_size

    def done(self) -> Done:
        """Records that this run can skip; warns of files that changed."""
        # Old tables have the whole path.
        ours = {source_key(name): path for path, name in self.names.items()}
        ours |= {path: path for path in self.names}
        rows: dict[str, list[np.ndarray]] = {}
        known: set[str] = set()
        num_usable = 0
        self._num_own = self._count_own()
        self.rejections.recheck_repeats(lambda: (b["sequence_id"] for b in self._scan_ids()))
        rejected = self.rejections.done()
        same_id = pc.equal(rejected["code"], Code.ID_SEEN_BEFORE.value)
        for batch, is_usable in (
            *((b, True) for b in self._scan(["source", "row"])),
            *((b, True) for b in rejected.filter(same_id).to_batches()),
            *((b, False) for b in rejected.filter(pc.invert(same_id)).to_batches()),
        ):
            for source, numbers in by_source(batch):
                known.add(source)
                path = ours.get(source_key(source))
                if path is not None:
                    rows.setdefault(path, []).append(numbers)
                    num_usable += is_usable * len(numbers)
        self._warn_of_changes(known)
        return Done({path: mark(parts) for path, parts in rows.items()}, num_usable)

    def _warn_of_changes(self, known: Collection[str]) -> None:
        for path in changed_files(self.names, known):
            log.warning(
                "%s changed since it was embedded: it is read again, and records whose ids are in "
                "the table are rejected",
                path,
            )

    def ids(self) -> Iterator[list[str]]:
        """All ids in the table and among the rejected of this run, a few thousand at a time."""
        for batch in self._scan_ids():
            yield batch["sequence_id"].to_pylist()
        yield self.rejections.ids()

    def _count_own(self) -> int:
        """Rows in the table that belong to this share."""
        if self.share.count == 1:
            return self.count_rows()
        return sum(
            int(self.share.owns(source_key(source), rows).sum())
            for batch in self._scan(["source", "row"])
            for source, rows in by_source(batch)
        )

    def _scan_ids(self) -> pa.RecordBatchReader:
        return self._scan(["sequence_id"], 1 << 14)

    def _scan(self, columns: list[str], batch_rows: int = 1 << 16) -> pa.RecordBatchReader:
        return self.table.search().select(columns).to_batches(batch_rows)

    def _check_still_ours(self) -> None:
        """Before a commit: nobody has taken the table or this share over since it was opened."""
        fingerprint = self.table.schema.metadata[FINGERPRINT_KEY]
        self.table.checkout_latest()
        if self.table.schema.metadata.get(FINGERPRINT_KEY) != fingerprint:
            raise TableError(
                f"{self.uri}: another run has replaced the table while this one was computing; "
                "name another --table or --db"
            )
        if process_count(self.table) != self.share.count:
            raise _other_count(self.uri, self.table.name, self.table, self.share.count)
        self.claim.check()
        # An earlier run of this share may have been in the middle of its last commit. Once is
        # enough: at the next it finds the claim taken.
        if self._num_own is not None and self._count_own() > self._num_own:
            raise TableError(
                f"{self.uri}: another run was still committing rows of process "
                f"{self.share.index} when this one started; run again to go on behind them"
            )
        self._num_own = None

    def append(self, parts: Iterable[pa.Table]) -> None:
        """Add rows in one atomic commit.

        Raises:
            TableError: nothing was added.
        """
        try:
            self._check_still_ours()
            self.table.add(reader_of(parts, self.table.schema))
        except TableError:
            raise
        except (OSError, RuntimeError, ValueError) as error:
            raise not_written(self.uri, error) from error

    def append_fragments(self, fragments: Sequence[Any]) -> None:
        """Add what `write_fragments` wrote, here or on other hosts, in one atomic commit.

        Raises:
            TableError: nothing was added; a file may be out of reach of this process.
        """
        import lance

        location = self.table.uri
        for fragment in fragments if "://" not in location else ():
            for file in fragment.files:
                if not Path(location, "data", file.path).is_file():
                    raise TableError(
                        f"{location}: a worker wrote {file.path}, but it is missing; the "
                        "database must be one folder for all hosts: a shared disk, gs:// or s3://"
                    )
        try:
            self._check_still_ours()
            append = lance.LanceOperation.Append(list(fragments))
            lance.LanceDataset.commit(location, append, read_version=self.table.version)
            self.table.checkout_latest()
        except TableError:
            raise
        except (OSError, RuntimeError, ValueError) as error:
            raise not_written(self.uri, error) from error

    def reject(self, rejections: Sequence[Rejection]) -> None:
        """Record what cannot be used in `rejected.parquet` beside the table.

        Raises:
            TableError: it could not be written, or another run has this one's place.
        """
        if rejections:
            self.claim.check()
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
            self.claim.finish()
        except TableError:  # another run has taken this one's place: it will say so itself
            return
        except (OSError, RuntimeError, ValueError) as error:
            # The rows are safe; another process may be compacting at the same moment.
            log.warning("the table is complete but not compacted or indexed: %s", error)


def process_count(table: Any) -> int | None:
    """How many processes fill a table; None if made by an earlier version."""
    count = (table.schema.field("source").metadata or {}).get(_COUNT_KEY.encode())
    return int(count) if count else None


def _other_count(uri: str, name: str, table: Any, count: int) -> TableError:
    there = process_count(table)
    return TableError(
        f"{uri}: the table {name!r} is filled with process_count {there}, and this run has "
        f"{count}: together they would embed rows twice. Use --process-count {there}; or, once no "
        "other process writes to the table, add --reshare: what is done stays done"
    )
