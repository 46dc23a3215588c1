"""Copies by fsspec's file systems: any store it supports, without another program.

Input: two folders or URLs. Output: an engine with the methods of `transfer.engine.Engine`.
"""

import hashlib
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

from fsspec import AbstractFileSystem
from fsspec.spec import AbstractBufferedFile

from ..errors import SyncError
from ..reads.inputs import UNFINISHED, filesystem_of

_BLOCK_BYTES = 8 << 20
_STORES = {"s3", "gs", "gcs", "abfs", "az"}  # they have buckets and need no folders


class Fsspec:
    """fsspec's file systems, one file at a time."""

    name = "fsspec"

    def __init__(self, source: str, destination: str, only: str | None = None):
        """Take two folders or URLs."""
        self._places = tuple(filesystem_of(place) for place in (destination, source))
        self._only = only

    def is_file(self) -> bool:
        """Ask the file system; a missing path, or no answer, counts as no file."""
        filesystem, root = self._places[1]
        try:
            return filesystem.isfile(root)
        except Exception:  # listing it will report the reason
            return False

    def files(self, at_source: bool) -> dict[str, int]:
        """List recursively."""
        filesystem, root = self._places[at_source]
        filesystem.invalidate_cache()
        try:
            if self._only:
                path = f"{root.rstrip('/')}/{self._only}"
                return {self._only: filesystem.info(path)["size"]}
            if _is_local(filesystem):
                return list_folder(root, strict=at_source)
            found = filesystem.find(root, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except SyncError:
            raise
        except Exception as error:  # every storage backend raises its own errors
            raise SyncError(
                f"{root}: cannot be listed ({error}); check the address, the network and the "
                "credentials"
            ) from error
        start = len(root.rstrip("/")) + 1
        return {path[start:]: item["size"] for path, item in found.items() if path[start:]}

    def different(self, names: Sequence[str]) -> list[str]:
        """Compare sizes, then MD5: the store's own if it has one, else of the bytes."""
        there = self.files(at_source=False)
        ours = self.files(at_source=True)
        return [
            name
            for name in names
            if there.get(name) != ours.get(name) or self._md5(False, name) != self._md5(True, name)
        ]

    def _md5(self, at_source: bool, name: str) -> str:
        filesystem, root = self._places[at_source]
        path = f"{root.rstrip('/')}/{name}"
        tag = str(filesystem.info(path).get("ETag", "")).strip('"')
        if re.fullmatch("[0-9a-f]{32}", tag):
            return tag
        digest = hashlib.md5(usedforsecurity=False)
        with filesystem.open(path, "rb") as file:
            while block := file.read(_BLOCK_BYTES):
                digest.update(block)
        return digest.hexdigest()

    def copy(self, names: Sequence[str], on_bytes: Callable[[int], object]) -> None:
        """Copy block by block; beside and renamed where the destination is a folder here."""
        (destination, to), (source, root) = self._places
        is_local = _is_local(destination)
        for name in names:
            path = f"{to.rstrip('/')}/{name}"
            part = path + UNFINISHED if is_local else path
            try:
                if not _protocols(destination) & _STORES:
                    destination.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
                with source.open(f"{root.rstrip('/')}/{name}", "rb") as file:
                    _write(file, destination.open(part, "wb"), on_bytes)
                if is_local:
                    os.replace(part, path)
            except Exception as error:
                raise SyncError(
                    f"{name}: could not be copied ({error}); check access and free space, and run "
                    "the same command again to resume"
                ) from error

    def delete(self, names: Sequence[str]) -> None:
        """Delete files one by one, and folders that become empty."""
        filesystem, root = self._places[0]
        for name in names:
            filesystem.rm_file(f"{root.rstrip('/')}/{name}")
        if _is_local(filesystem):  # LanceDB takes an empty `NAME.lance` for a table
            for folder, *_ in os.walk(root, topdown=False):
                if folder != root and not os.listdir(folder):
                    os.rmdir(folder)


def list_folder(root: str, strict: bool) -> dict[str, int]:
    """Files below a local folder, following links; empty if it does not exist.

    fsspec passes over a folder that cannot be read, and its files would count as gone. `strict`
    also refuses what could not be copied, where it would be left out.
    """

    def refuse(error: OSError) -> None:
        raise SyncError(f"{error.filename}: cannot be read ({error.strerror}); check access")

    found = {}
    walk = os.walk(root, onerror=refuse, followlinks=True) if Path(root).is_dir() else ()
    for folder, _, names in walk:
        here = Path(folder)
        if here.is_symlink() and here.parent.resolve().is_relative_to(here.resolve()):
            raise SyncError(f"{here}: this link leads back to a folder above it; remove it")
        for path in (here / name for name in names):
            name = path.relative_to(root).as_posix()
            if path.is_file():
                found[name] = path.stat().st_size
            elif strict:
                raise SyncError(f"{path}: a dangling link or not a regular file; remove it")
            if strict and not _is_plain(name):
                raise SyncError(f"{str(path)!r}: this name cannot be copied; rename the file")
    return found


def _is_plain(name: str) -> bool:
    """Whether a name is one line of UTF-8, as the lists of rclone are."""
    try:
        return len(name.encode().splitlines()) == 1
    except UnicodeEncodeError:
        return False


def _write(file: BinaryIO, out: BinaryIO, on_bytes: Callable[[int], object]) -> None:
    try:
        while block := file.read(_BLOCK_BYTES):
            out.write(block)
            on_bytes(len(block))
    except BaseException:
        if isinstance(out, AbstractBufferedFile):
            # Closing it would publish the partial upload as the whole object.
            out.discard()
            out.closed = True
        else:
            out.close()
        raise
    out.close()


def _protocols(filesystem: AbstractFileSystem) -> set[str]:
    known = filesystem.protocol
    return {known} if isinstance(known, str) else {*known}


def _is_local(filesystem: AbstractFileSystem) -> bool:
    return "file" in _protocols(filesystem)
