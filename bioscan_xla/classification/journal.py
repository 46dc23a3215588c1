"""The classified rows on disk: parts that serve as the journal, and the final file.

Input: tables of `record.SCHEMA`. Output: `classified.parquet`, and which rows are done.
Invariants: a part is written whole or not at all, so after a kill the parts show what remains to be
done, and each record is there once.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import ConfigError
from ..reads.shares import by_source, mark
from .record import SCHEMA

FILE = "classified.parquet"
_PARTS = "parts"
_SETTINGS = "settings.json"
_GROUP_ROWS = 4096  # in a row group of the file; each costs some kilobytes whenever it is open


class Journal:
    """The rows of one output folder."""

    def __init__(self, folder: str | Path, settings: Mapping[str, str]):
        """Open or create.

        Args:
            folder: of all results.
            settings: everything that determines the content of a row.

        Raises:
            ConfigError: the folder holds rows that were made with other settings; the message
                shows the difference.
        """
        self.folder = Path(folder)
        self._parts = self.folder / _PARTS
        try:
            self._parts.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"{folder}: cannot be made ({error.strerror}); name another folder with --output"
            ) from error
        path = self.folder / _SETTINGS
        if path.is_file() and (self._files() or (self.folder / FILE).exists()):
            old = json.loads(path.read_text(encoding="utf-8"))
            lines = [
                f"  {key}: the folder has {old.get(key)!r}, this run has {settings.get(key)!r}"
                for key in sorted({*old, *settings})
                if old.get(key) != settings.get(key)
            ]
            if lines:
                raise ConfigError(
                    f"{folder}: holds results made with other settings:\n"
                    + "\n".join(lines)
                    + "\nUse the same options, or another --output"
                )
        _write_whole(path, lambda to: to.write_text(json.dumps(dict(settings), indent=1) + "\n"))
        self._drop_what_was_joined()
        self._next = max((int(file.stem.split("-")[1]) for file in self._files()), default=-1) + 1

    def _files(self) -> list[Path]:
        return sorted(self._parts.glob("part-*.parquet"))

    def _all(self) -> list[Path]:
        whole = self.folder / FILE
        return ([whole] if whole.exists() else []) + self._files()

    def _drop_what_was_joined(self) -> None:
        """Parts whose rows are in the file already: the last run was killed while tidying up."""
        whole = self.folder / FILE
        if not whole.exists():
            return
        done = _done([whole])
        for part in self._files():
            first = next(pq.ParquetFile(part).iter_batches(1, columns=["source", "row"]), None)
            if first is None or _holds(done, *first.to_pylist()[0].values()):
                part.unlink()

    def done(self) -> dict[str, np.ndarray]:
        """For each source, a bool by row."""
        return _done(self._all())

    def ids(self) -> Iterator[list[str]]:
        """All ids, some thousand at a time."""
        for path in self._all():
            for batch in pq.ParquetFile(path).iter_batches(1 << 14, columns=["sequence_id"]):
                yield batch["sequence_id"].to_pylist()

    def append(self, rows: pa.Table) -> None:
        """Add rows in one atomic step."""
        if len(rows):
            path = self._parts / f"part-{self._next:06d}.parquet"
            _write_whole(path, lambda to: pq.write_table(rows, to, compression="zstd"))
            self._next += 1

    def join(self, complete: Callable[[pa.Table], pa.Table]) -> int:
        """Make `classified.parquet` of all rows, in the order they were named.

        Args:
            complete: is given some rows at a time and fills in their counts.

        Returns:
            The number of rows.
        """
        num_rows = 0

        def write(path: Path) -> None:
            nonlocal num_rows
            with pq.ParquetWriter(path, SCHEMA, compression="zstd") as writer:
                for batches in _gathered(self._all(), _GROUP_ROWS):
                    rows = complete(pa.Table.from_batches(batches).cast(SCHEMA))
                    num_rows += len(rows)
                    writer.write_table(rows)

        _write_whole(self.folder / FILE, write)
        for part in self._files():
            part.unlink()
        self._parts.rmdir()
        return num_rows


def _gathered(files: list[Path], num_rows: int) -> Iterator[list[pa.RecordBatch]]:
    """The rows of files in lots of about `num_rows`."""
    lot: list[pa.RecordBatch] = []
    for file in files:
        for batch in pq.ParquetFile(file).iter_batches(num_rows):
            lot.append(batch)
            if sum(map(len, lot)) >= num_rows:
                yield lot
                lot = []
    if lot:
        yield lot


def _done(files: list[Path]) -> dict[str, np.ndarray]:
    parts: dict[str, list[np.ndarray]] = {}
    for path in files:
        for batch in pq.ParquetFile(path).iter_batches(1 << 16, columns=["source", "row"]):
            for source, rows in by_source(batch):
                parts.setdefault(source, []).append(rows)
    return {source: mark(rows) for source, rows in parts.items()}


def _holds(done: Mapping[str, np.ndarray], source: str, row: int) -> bool:
    rows = done.get(source, np.zeros(0, bool))
    return row < len(rows) and bool(rows[row])


def _write_whole(path: Path, write: Callable[[Path], object]) -> None:
    temporary = path.with_name(f".{path.name}.part")
    write(temporary)
    os.replace(temporary, path)


def read_rows(folder: str | Path, columns: list[str] | None = None) -> Iterator[dict]:
    """Rows of `classified.parquet`, one at a time."""
    for batch in pq.ParquetFile(Path(folder) / FILE).iter_batches(1024, columns=columns):
        yield from batch.to_pylist()
