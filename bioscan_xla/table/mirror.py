"""A copy of a local database in a folder that cannot hold a live one, such as a mounted Drive.

Lance commits need hard links, which such mounts refuse; finished files can be copied there.
Input: a local database and a folder. Output: a copy of the database there.
Invariants: the copy is readable at all times, because a table's manifests (`_versions`), which name
its files, are copied after the files they name and deleted before them.
"""

import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from ..errors import TableError
from ..reads.inputs import UNFINISHED
from .claim import CLAIM

log = logging.getLogger(__name__)

TRANSFORM_SUFFIX = ".transform.safetensors"  # of the file beside a whitened table
_EVERY_SECONDS = 1800.0


def copy_database(
    source: str | Path,
    destination: str | Path,
    is_wanted: Callable[[str], bool] = lambda name: True,
) -> int:
    """Bring `destination` up to `source`; files already there are not copied again.

    Args:
        source: database folder.
        destination: folder of the copy.
        is_wanted: of the name of a file; what is not wanted stays as it is at the destination.

    Returns:
        Number of files copied.
    """
    source, destination = Path(source), Path(destination)
    # Manifests are listed first: all that they name exists already.
    _, manifests = copy_order(filter(is_wanted, _files(source)))
    others, _ = copy_order(filter(is_wanted, _files(source)))
    copied = 0
    for name in [*others, *manifests]:
        copied += _copy_file(source / name, destination / name)
    there = set(filter(is_wanted, _files(destination)))
    stale_others, stale_manifests = copy_order(there - {*others, *manifests})
    for name in [*stale_manifests, *stale_others]:
        table = name.split("/")[0]
        ours = table.endswith(".lance") and (source / table).is_dir()
        if ours and not (source / name).exists():
            (destination / name).unlink(missing_ok=True)
    return copied


def newest_versions(names: Iterable[str]) -> dict[str, int]:
    """Newest version of each table among these files, by the names of its manifests."""
    newest: dict[str, int] = {}
    for name in names:
        if found := re.fullmatch(r"(.*?)/?_versions/(\d+)\.manifest", name):
            table, digits = found.groups()
            # Lance counts down from 2^64 - 1 (20 digits), so that the newest is listed first.
            version = 2**64 - 1 - int(digits) if len(digits) == 20 else int(digits)
            newest[table] = max(version, newest.get(table, 0))
    return newest


def foreign_tables(
    ours: Collection[str], there: Collection[str], is_same: Callable[[str], bool]
) -> dict[str, str]:
    """Tables there that are not an earlier state of ours, each with the evidence.

    Manifests copied beside those of another table would silently replace it.

    Args:
        ours: names of the files at the source.
        there: names of the files at the destination.
        is_same: whether a file of that name is the same at both.
    """
    found = {}
    newest = newest_versions(ours)
    for table, version in newest_versions(there).items():
        if table not in newest:
            continue
        shared = [name for name in there if name in ours and _table_of(name) == table]
        manifests = {newest_versions([n]).get(table, 0): n for n in shared}
        last = manifests.pop(0, None)
        if version > newest[table]:
            found[table] = f"is at version {version} there and at {newest[table]} in the source"
        elif manifests and not is_same(manifests[max(manifests)]):
            found[table] = f"has another version {max(manifests)} there than in the source"
        elif not manifests and last is None:
            found[table] = "has no file there that it has in the source"
    return found


def _table_of(name: str) -> str | None:
    """The folder of the table that a file belongs to; None for files of no table."""
    match = re.fullmatch(r"(.*?)/?(_versions/\d+\.manifest|data/.*|_transactions/.*)", name)
    return match.group(1) if match else None


def copy_order(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """The files of tables in the order in which they are copied: the manifests come last.

    A manifest names other files, so a reader must never meet one before them. To delete, take the
    two lists the other way round.
    """
    parts: tuple[list[str], list[str]] = ([], [])
    for name in sorted(names):
        parts[is_manifest(Path(name))].append(name)
    return parts


def is_manifest(path: Path) -> bool:
    """True for the files of a table that name its other files."""
    return "_versions" in path.parts


def _files(folder: Path) -> list[str]:
    return [
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.endswith((UNFINISHED, CLAIM))
    ]


def _copy_file(source: Path, destination: Path) -> bool:
    try:
        size = source.stat().st_size
    except FileNotFoundError:
        return False  # compacted in the meantime; the next copy has its replacement
    # Lance never rewrites a file; the lists of rejected records grow.
    is_changing = not any(part.endswith(".lance") for part in destination.parts)
    if not is_changing and destination.exists() and destination.stat().st_size == size:
        return False
    destination.parent.mkdir(parents=True, exist_ok=True)
    part = destination.with_name(destination.name + UNFINISHED)
    shutil.copyfile(source, part)
    os.replace(part, destination)
    return True


def restore(mirror: str | Path, database: str | Path, table: str) -> bool:
    """Copy the mirror back if the local table is gone; True if that was done.

    Other tables that are gone come with it. Those that are here stay as they are: they may be
    newer than their copies.
    """
    gone = {name for name in _tables(mirror) if name not in _tables(database)}
    if f"{table}.lance" not in gone:
        return False

    def is_wanted(name: str) -> bool:
        owner = name.split("/")[0].replace(TRANSFORM_SUFFIX, ".lance")
        return owner in gone or ("/" not in name and not Path(database, name).exists())

    log.info("restoring %s from its mirror %s", database, mirror)
    try:
        copy_database(mirror, database, is_wanted)
    except OSError as error:
        raise TableError(
            f"{mirror}: the mirror could not be copied back to {database} ({error}); check both "
            "paths and the free space"
        ) from error
    return True


def _tables(folder: str | Path) -> set[str]:
    """Folders of the tables of a database that have a version."""
    return {path.parts[-3] for path in Path(folder).glob("*.lance/_versions/*")}


def check_mirror(database: str | Path, mirror: str | Path) -> None:
    """Refuse a mirror whose drive is not mounted, or that holds other tables than earlier ones.

    Raises:
        TableError: says what is wrong and what to do.
    """
    mirror = Path(mirror)
    if not mirror.parent.is_dir():
        raise TableError(
            f"{mirror}: {mirror.parent} does not exist; mount the drive, or create that "
            "folder first"
        )
    ours, there = (set(_files(Path(folder))) for folder in (database, mirror))
    foreign = foreign_tables(
        ours,
        there,
        lambda name: Path(database, name).read_bytes() == (mirror / name).read_bytes(),
    )
    for table, why in foreign.items():
        raise TableError(
            f"{mirror}: the table {table.removesuffix('.lance')!r} {why} {database}: the mirror "
            "may hold more, or another table. Move the local table away to resume from the mirror, "
            "or name another folder"
        )


class Mirror:
    """Copies a database during the run, at most every half hour; failures only cause a warning."""

    def __init__(self, database: str, destination: str):
        """Remember a local database and the folder for its copy."""
        self.database, self.destination = database, destination
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="mirror")
        self._last = time.monotonic()
        self._running: Future[None] | None = None

    def after_commit(self) -> None:
        """Start a copy if the last is half an hour old and finished."""
        if time.monotonic() - self._last < _EVERY_SECONDS:
            return
        if self._running is None or self._running.done():
            self._last = time.monotonic()
            self._running = self._worker.submit(self._copy)

    def finish(self) -> None:
        """Copy once more and wait for it."""
        self._worker.submit(self._copy)
        self._worker.shutdown(wait=True)

    def _copy(self) -> None:
        try:
            copied = copy_database(self.database, self.destination)
            log.info("mirror %s: %d files copied", self.destination, copied)
        except OSError as error:
            log.warning(
                "mirror %s: the copy failed (%s); check the mount and the free space. The "
                "local table is not affected",
                self.destination,
                error,
            )
