"""Who may commit: of the runs with one process index, the one that was started last.

Input: a database, the name of a table, a process index, the files that are read. Output: a small
JSON file beside the table, with the host, the process and the time; an error once another run has
put its own in place of it, or where another process that shares the input was given other files.
Invariants: a run that began earlier commits at most what it was writing at that moment. A file is
used rather than a lock because object stores have no locks, and nobody has to remove it after a
kill.
"""

import hashlib
import json
import logging
import os
import platform
import uuid
from collections.abc import Collection
from datetime import datetime, timezone
from typing import Any

import fsspec

from ..errors import TableError
from ..reads.inputs import UNFINISHED, without_mark
from ..reads.shares import ALL, Share

log = logging.getLogger(__name__)

CLAIM = ".run.json"
"""What the name of the file ends with; copies of a database leave it out."""


class Claim:
    """The right of this run to commit as one of the processes that fill a table."""

    def __init__(
        self,
        uri: str,
        table: str,
        share: Share = ALL,
        sources: Collection[str] = (),
        reshare: bool = False,
    ):
        """Take it, also from a run that has it.

        Args:
            uri: database folder or URL.
            table: name of the table.
            share: which of how many processes this is.
            sources: stored names of the files that are read.
            reshare: take it though other processes were given other files.

        Raises:
            TableError: another process that shares the input was given other files.
        """
        self._uri, self._table, self._index = uri, table, share.index
        self._filesystem, folder = fsspec.core.url_to_fs(uri)
        self._stem = f"{folder}/{table}-"
        self._path = f"{self._stem}{share.index}{CLAIM}"
        self._run = uuid.uuid4().hex
        names = sorted(sources)
        self._claim: dict[str, Any] = {
            "run": self._run,
            "host": platform.node(),
            "process": os.getpid(),
            "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "count": share.count,
            "sources": hashlib.sha256("\n".join(names).encode()).hexdigest(),
            "finished": False,
        }
        if share.count > 1 and not reshare:
            self._compare(share, names)
        if share.count > 1:
            self._write(self._list_of(share.index), names)
        self._write(self._path, self._claim)
        if share.count > 1 and not reshare:  # two may have started at one moment
            self._compare(share, names)

    def finish(self) -> None:
        """Record that this run has done its share."""
        self.check()
        self._write(self._path, self._claim | {"finished": True})

    def _list_of(self, index: int) -> str:
        return f"{self._stem}{index}.files{CLAIM}"

    def _write(self, path: str, content: Any) -> None:
        part = f"{path}.{self._run}{UNFINISHED}"
        with self._filesystem.open(part, "w") as handle:
            handle.write(json.dumps(content))
        self._filesystem.mv(part, path)

    def _read(self, path: str) -> Any:
        try:
            return json.loads(self._filesystem.cat_file(path))
        except FileNotFoundError:
            return None

    def _compare(self, share: Share, names: list[str]) -> None:
        """Refuse files that differ from those of another process that shares the input.

        Of a process that has finished, it may have been another run with another input: a warning.
        """
        self._filesystem.invalidate_cache()
        found = set(self._filesystem.glob(f"{self._stem}*{CLAIM}"))
        for index in range(share.count):
            path = f"{self._stem}{index}{CLAIM}"
            if index == share.index or path not in found:
                continue
            there = self._read(path)
            if not there or there.get("count") != share.count:
                continue  # of an earlier version, or of another number of processes
            if there["sources"] == self._claim["sources"]:
                continue
            theirs = set(self._read(self._list_of(index)) or ())
            told = (
                f"{self._uri}: process {share.index} of {share.count} was given other files than "
                f"process {index}: {_differences(theirs, set(names), index)}"
            )
            if not there["finished"]:
                raise TableError(
                    f"{told}. Records that only some processes read would be left out. Give all "
                    "processes the same --input; or, if process "
                    f"{index} no longer runs and the input is meant to change, add --reshare"
                )
            log.warning("%s. That is right only if it finished before the input changed", told)

    def check(self) -> None:
        """TableError if another run has taken the claim."""
        there = self._read(self._path)
        if there is None:
            return  # somebody tidied up
        if there["run"] != self._run:
            raise TableError(
                f"{self._uri}: another run fills the table {self._table!r} as process "
                f"{self._index}: process {there['process']} on host {there['host']}, started "
                f"{there['started']}, after this one. It goes on and this one stops; what was "
                "committed is kept. Several processes need a --process-index each"
            )


def _differences(theirs: set[str], ours: set[str], index: int) -> str:
    """What only one of two lists of files has, in words."""

    def some(names: set[str]) -> str:
        shown = [without_mark(name) for name in sorted(names)[:3]]
        return ", ".join(shown) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

    told = []
    if ours - theirs:
        told.append(f"only this one reads {some(ours - theirs)}")
    if theirs - ours:
        told.append(f"only process {index} reads {some(theirs - ours)}")
    return "; ".join(told)
