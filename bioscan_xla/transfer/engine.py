"""Places that hold files, and copying between them: rclone if installed, else fsspec.

Input: two addresses. Output: an engine that lists, copies, compares and deletes.
Invariants: a file at a local destination appears under its name only when complete;
credentials come from the environment and are never part of a command line.
"""

import shutil
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol

from ..errors import SyncError
from ..reads.inputs import is_remote
from .fsspec import Fsspec
from .rclone import REMOTES, Rclone, is_rclone_remote


class Engine(Protocol):
    """What both engines do; names are relative to the place, with `/` between folders."""

    name: str

    def is_file(self) -> bool:
        """Whether the source is one file."""

    def files(self, at_source: bool) -> dict[str, int]:
        """Names and sizes in bytes of the files at one place; empty if it does not exist."""

    def different(self, names: Sequence[str]) -> list[str]:
        """Those of these files whose size or checksum is not the same at both places."""

    def copy(self, names: Sequence[str], on_bytes: Callable[[int], object]) -> None:
        """Copy files to the destination; `on_bytes` receives each number of bytes copied."""

    def delete(self, names: Sequence[str]) -> None:
        """Delete files at the destination."""


def open_engine(source: str, destination: str, only: str | None = None) -> Engine:
    """The engine for two addresses: folders, `gs://`, `s3://` and other URLs, rclone remotes.

    Args:
        source: folder, URL or remote.
        destination: folder, URL or remote.
        only: the one file of the source that is meant; no other is listed.

    Raises:
        SyncError: an rclone remote, but rclone is not installed.
        InputError: a kind of URL whose package is not installed.
    """
    pair = (source, destination)
    program = shutil.which("rclone")
    needed = [address for address in pair if is_rclone_remote(address)]
    if needed and program is None:
        raise SyncError(
            f"{needed[0]}: an rclone remote, but rclone is not installed; install it (rclone.org)"
        )
    known = all(not is_remote(a) or a.split("://")[0] in REMOTES for a in pair)
    if program is not None and known:
        return Rclone(program, source, destination, only)
    return Fsspec(source, destination, only)


def check_names(names: Iterable[str]) -> None:
    """Refuse names that could lead out of the folder they are copied into.

    The keys of a store are free text, such as `../../evil.txt` or `/etc/passwd`. rclone shows the
    dots and slashes of such keys as their full-width forms.

    Raises:
        SyncError: the first such name.
    """
    for name in names:
        parts = unicodedata.normalize("NFKC", name).split("/")
        if {"", ".", ".."} & set(parts) or "\\" in name or "\0" in name:
            raise SyncError(
                f"{name!r}: this name at the source could lead out of the destination (it is "
                "absolute, or has an empty part, '.', '..' or a backslash); nothing was copied. "
                "Rename it at the source"
            )


def check_targets(folder: Path, names: Iterable[str]) -> None:
    """Refuse files that a link at a local destination would put elsewhere.

    Raises:
        SyncError: the first such link.
    """
    root = folder.resolve()
    safe = {root}
    for name in names:
        for parent in reversed((root / name).relative_to(root).parents):
            here = root / parent
            if here in safe:
                continue
            if here.is_symlink() and not here.resolve().is_relative_to(root):
                raise SyncError(
                    f"{here}: is a link that leads out of the destination, to {here.resolve()}; "
                    "nothing was copied. Remove the link, or name that folder as the destination"
                )
            safe.add(here)


def local_folder(address: str) -> Path | None:
    """The folder or file here that an address means; None where it is elsewhere."""
    if is_remote(address) or is_rclone_remote(address):
        return None
    return Path(address).expanduser().resolve()
