"""The classified rows on disk: parts that serve as the journal, and the final file.

Input: tables of `record.SCHEMA`. Output: `classified.parquet`, and which rows are done.
Invariants: a part is written whole or not at all, so after a kill the parts show what remains to be
done, and each record is there once. One run at a time has the folder.
"""

import json
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import ConfigError
from ..reads.inputs import source_key, without_mark
from ..reads.shares import by_source, mark
from .kmers import reverse_complement
from .record import SCHEMA

FILE = "classified.parquet"
_PARTS = "parts"
_SETTINGS = "settings.json"
_LOCK = ".lock"
_GROUP_ROWS = 4096  # in a row group of the file; each costs some kilobytes whenever it is open


class Journal:
    """The rows of one output folder."""

    def __init__(
        self,
        folder: str | Path,
        settings: Mapping[str, str],
        sources: Collection[str] | None = None,
    ):
        """Open or create; `close` gives the folder back.

        Args:
            folder: of all results.
            settings: everything that determines the content of a row.
            sources: stored names of all files that belong to the results; None for any.

        Raises:
            ConfigError: another run has the folder, or it holds rows that were made with other
                settings or of other files; the message shows the difference.
        """
        self.folder = Path(folder)
        self._parts = self.folder / _PARTS
        try:
            self._parts.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"{folder}: cannot be made ({error.strerror}); name another folder with --output"
            ) from error
        self._lock = _take(self.folder / _LOCK)
        try:
            self._open(dict(settings), sources)
        except BaseException:
            self.close()
            raise

    def _open(self, settings: dict[str, str], sources: Collection[str] | None) -> None:
        path = self.folder / _SETTINGS
        if path.is_file() and _files_of(self.folder):
            _refuse_other_settings(self.folder, _settings_of(self.folder), settings)
            there = {without_mark(source_key(source)) for source in self.done()}
            ours = {without_mark(source_key(source)) for source in sources or ()}
            if sources is not None and there - ours:
                raise ConfigError(
                    f"{self.folder}: holds names of the sequences of {min(there - ours)}, which is "
                    "not among the input. Name both as --input, or pass another --output"
                )
        _write_whole(path, lambda to: to.write_text(json.dumps(settings, indent=1) + "\n"))
        self._drop_what_was_joined()
        self._next = (
            max((int(file.stem.split("-")[1]) for file in _parts_of(self.folder)), default=-1) + 1
        )

    def close(self) -> None:
        """Let another run have the folder."""
        self._lock.close()

    def __enter__(self) -> "Journal":
        """The journal; `close` at the end of the block."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    def _drop_what_was_joined(self) -> None:
        """Parts whose rows are in the file already: the last run was killed while tidying up."""
        whole = self.folder / FILE
        if not whole.exists():
            return
        done = _done([whole])
        for part in _parts_of(self.folder):
            first = next(pq.ParquetFile(part).iter_batches(1, columns=["source", "row"]), None)
            if first is None or _holds(done, *first.to_pylist()[0].values()):
                part.unlink()

    def done(self) -> dict[str, np.ndarray]:
        """For each source, a bool by row."""
        return _done(_files_of(self.folder))

    def ids(self) -> Iterator[list[str]]:
        """All ids, some thousand at a time."""
        for path in _files_of(self.folder):
            for batch in pq.ParquetFile(path).iter_batches(1 << 14, columns=["sequence_id"]):
                yield batch["sequence_id"].to_pylist()

    def records(self) -> Iterator[tuple[str, str]]:
        """Ids, and sequences as they were read, of all rows in the order they were named."""
        for path in _files_of(self.folder):
            yield from _records(path)

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
                for batches in _gathered(_files_of(self.folder), _GROUP_ROWS):
                    rows = complete(pa.Table.from_batches(batches).cast(SCHEMA))
                    num_rows += len(rows)
                    writer.write_table(rows)

        _write_whole(self.folder / FILE, write)
        for part in _parts_of(self.folder):
            part.unlink()
        self._parts.rmdir()
        return num_rows


def check_options(folder: str | Path, options: Mapping[str, str]) -> None:
    """Refuse a folder whose results were made with other options, before anything is loaded.

    Args:
        folder: of all results.
        options: the settings that are known without references and model.

    Raises:
        ConfigError: it holds such results; the message shows the difference.
    """
    folder = Path(folder)
    if (folder / _SETTINGS).is_file() and _files_of(folder):
        known = options.keys() | {"columns"}  # which is there only where it was given
        kept = {name: value for name, value in _settings_of(folder).items() if name in known}
        _refuse_other_settings(folder, kept, options)


def _settings_of(folder: Path) -> dict[str, str]:
    return json.loads((folder / _SETTINGS).read_text(encoding="utf-8"))


def _refuse_other_settings(folder: Path, old: Mapping[str, str], new: Mapping[str, str]) -> None:
    lines = _differences(old, new)
    if lines:
        raise ConfigError(
            f"{folder}: holds results made with other settings:\n"
            + "\n".join(f"  {line}" for line in lines)
            + "\nUse the same options, or another --output"
        )


def _parts_of(folder: Path) -> list[Path]:
    return sorted((folder / _PARTS).glob("part-*.parquet"))


def _files_of(folder: Path) -> list[Path]:
    whole = folder / FILE
    return ([whole] if whole.exists() else []) + _parts_of(folder)


def _take(path: Path) -> IO[str]:
    """A file that is locked until it is closed, or until the process ends in any way."""
    file = open(path, "a", encoding="utf-8")  # noqa: SIM115
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ConfigError(
            f"{path.parent}: is in use by another run; wait until it ends, or pass another --output"
        ) from None
    except (ImportError, OSError):
        pass  # no such locks on this system or this drive
    return file


def _differences(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """What differs between two settings, a line for each."""
    keys = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    lines = []
    for key in keys:
        there, here = old.get(key), new.get(key)
        if any(value and re.fullmatch(r"[0-9a-f]{16,}", value) for value in (there, here)):
            lines.append(f"{key.split()[0]}: not the same")
        else:
            lines.append(f"{key}: the folder has {there}, this run has {here}")
    of_model = [key for key in keys if key.startswith("model ")]
    if of_model and not all(any(k.startswith("model ") for k in side) for side in (old, new)):
        lines = [line for line, key in zip(lines, keys, strict=True) if key not in of_model]
        lines.append("model: one of the two has no model")
    return list(dict.fromkeys(lines))


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


def read_records(folder: str | Path) -> Iterator[tuple[str, str]]:
    """Ids, and sequences as they were read, of `classified.parquet`."""
    return _records(Path(folder) / FILE)


def _records(path: Path) -> Iterator[tuple[str, str]]:
    columns = ["sequence_id", "dna_sequence", "strand"]
    for batch in pq.ParquetFile(path).iter_batches(1 << 14, columns=columns):
        for row in batch.to_pylist():
            sequence = row["dna_sequence"]
            turned = row["strand"] == "minus"
            yield row["sequence_id"], reverse_complement(sequence) if turned else sequence


def read_rows(folder: str | Path, columns: list[str] | None = None) -> Iterator[dict]:
    """Rows of `classified.parquet`, one at a time."""
    for batch in pq.ParquetFile(Path(folder) / FILE).iter_batches(1024, columns=columns):
        yield from batch.to_pylist()
