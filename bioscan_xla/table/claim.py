"""Who may commit: of the runs with one process index, the one that was started last.

Input: a database, the name of a table, a process index. Output: a small JSON file beside the table,
with the host, the process and the time; an error once another run has put its own in place of it.
Invariants: a run that began earlier commits at most what it was writing at that moment. A file is
used rather than a lock because object stores have no locks, and nobody has to remove it after a
kill.
"""

import json
import os
import platform
import uuid
from datetime import datetime, timezone

import fsspec

from ..errors import TableError
from ..reads.inputs import UNFINISHED

CLAIM = ".run.json"
"""What the name of the file ends with; copies of a database leave it out."""


class Claim:
    """The right of this run to commit as one of the processes that fill a table."""

    def __init__(self, uri: str, table: str, process_index: int):
        """Take it, also from a run that has it."""
        self._uri, self._table, self._index = uri, table, process_index
        self._filesystem, folder = fsspec.core.url_to_fs(uri)
        self._path = f"{folder}/{table}-{process_index}{CLAIM}"
        self._run = uuid.uuid4().hex
        text = json.dumps(
            {
                "run": self._run,
                "host": platform.node(),
                "process": os.getpid(),
                "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            }
        )
        part = f"{self._path}.{self._run}{UNFINISHED}"
        with self._filesystem.open(part, "w") as handle:
            handle.write(text)
        self._filesystem.mv(part, self._path)

    def check(self) -> None:
        """TableError if another run has taken the claim."""
        try:
            there = json.loads(self._filesystem.cat_file(self._path))
        except FileNotFoundError:
            return  # somebody tidied up
        if there["run"] != self._run:
            raise TableError(
                f"{self._uri}: another run fills the table {self._table!r} as process "
                f"{self._index}: process {there['process']} on host {there['host']}, started "
                f"{there['started']}, after this one. It goes on and this one stops; what was "
                "committed is kept. Several processes need a --process-index each"
            )
