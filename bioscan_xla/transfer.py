"""Places that hold files, and moving files between them: rclone if installed, else fsspec.

Enters: two addresses. Leaves: an engine that lists, copies, compares and deletes. Guaranteed: a
file at a local destination appears under its name only when it is whole; credentials come from
the environment and are never part of a command line.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from .errors import SyncError
from .inputs import filesystem_of, is_remote

_BLOCK_BYTES = 8 << 20
_STAGE = ".part"  # folder at a local destination in which rclone's files become whole
_RCLONE_KINDS = {"s3": "s3", "gs": "gcs"}  # what rclone calls the services that it can serve here


class Engine(Protocol):
    """What both engines do; names are relative to the place, with `/` between folders."""

    name: str

    def files(self, at_source: bool) -> dict[str, int]:
        """Names and sizes in bytes of the files at one place; empty if it is not there."""

    def different(self, names: Sequence[str]) -> list[str]:
        """Those of these files whose size or checksum is not the same at both places."""

    def copy(self, names: Sequence[str], on_bytes: Callable[[int], object]) -> None:
        """Copy files to the destination; `on_bytes` hears how many more bytes are done."""

    def delete(self, names: Sequence[str]) -> None:
        """Delete files at the destination."""


def is_rclone_remote(address: str) -> bool:
    """True for `remote:path` and `:backend,option=value:path`."""
    return re.match(r"^(:[a-z0-9]+(,[^:]*)?:|[\w][\w .+@-]+:(?!//))", address) is not None


def open_engine(source: str, destination: str, without_rclone: bool = False) -> Engine:
    """The engine for two addresses: folders, `gs://`, `s3://` and other URLs, rclone remotes.

    Raises:
        SyncError: a remote of rclone's, and rclone is not installed.
        InputError: a kind of URL whose package is not installed.
    """
    pair = (source, destination)
    program = None if without_rclone else shutil.which("rclone")
    needed = [address for address in pair if is_rclone_remote(address)]
    if needed and program is None:
        raise SyncError(f"{needed[0]}: is a remote of rclone, which is not installed (rclone.org)")
    known = all(not is_remote(a) or a.split("://")[0] in _RCLONE_KINDS for a in pair)
    if program is not None and known:
        return Rclone(program, *map(_as_rclone, pair))
    return Fsspec(source, destination)


def _as_rclone(address: str) -> str:
    if not is_remote(address):
        return address if is_rclone_remote(address) else os.path.abspath(address)
    kind, _, path = address.partition("://")
    return f":{_RCLONE_KINDS[kind]}:{path}"


class Rclone:
    """The rclone program; its own options can be given as RCLONE_... in the environment."""

    name = "rclone"

    def __init__(self, program: str, source: str, destination: str):
        """Take the program and two addresses as rclone writes them."""
        self._program, self._places = program, (destination, source)
        is_local = not is_rclone_remote(destination)
        self._stage = Path(destination, _STAGE) if is_local else None
        self._environment = _credentials() | dict(os.environ)
        # rclone refuses to start with this one; it has its own name for it.
        if bundle := self._environment.pop("AWS_CA_BUNDLE", None):
            self._environment.setdefault("RCLONE_CA_CERT", bundle)

    def files(self, at_source: bool) -> dict[str, int]:
        """List by `rclone lsjson`."""
        place = self._places[at_source]
        options = ("--recursive", "--files-only", "--no-modtime", "--exclude", f"/{_STAGE}/**")
        done = self._run("lsjson", *options, place)
        if done.returncode == 3:  # directory not found
            return {}
        self._check(done)
        return {item["Path"]: item["Size"] for item in json.loads(done.stdout)}

    def different(self, names: Sequence[str]) -> list[str]:
        """Compare by `rclone check`: checksums that both places know, else the bytes."""
        with _listed(names) as path:
            options = ["--one-way", "--combined", "-", "--files-from-raw", path]
            done = self._run("check", *options, self._places[1], self._places[0])
            if "No common hash" in done.stderr:
                done = self._run("check", *options, "--download", self._places[1], self._places[0])
        lines = done.stdout.splitlines()
        if len(lines) < len(names):
            self._check(done)
        return [line[2:] for line in lines if not line.startswith("= ")]

    def copy(self, names: Sequence[str], on_bytes: Callable[[int], object]) -> None:
        """Copy by `rclone copy`; it tries again by itself where a transfer breaks."""
        told, errors = 0, []
        # What is staged may be there from a run that was interrupted; all else must be written.
        again = "--checksum" if self._stage else "--ignore-times"
        with _listed(names) as path:
            process = subprocess.Popen(
                [
                    self._program,
                    "copy",
                    *("--files-from-raw", path, "--no-traverse", again),
                    *("--use-json-log", "--stats", "1s", "--stats-log-level", "NOTICE"),
                    self._places[1],
                    str(self._stage or self._places[0]),
                ],
                env=self._environment,
                stderr=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                text=True,
            )
            assert process.stderr is not None
            try:
                for line in process.stderr:
                    said = _json(line)
                    if said.get("level") == "error":
                        errors.append(f"{said.get('object', '')} {said.get('msg', '')}".strip())
                    done = said.get("stats", {}).get("bytes", told)
                    on_bytes(max(0, done - told))
                    told = max(told, done)
            except BaseException:
                process.terminate()
                raise
            finally:
                process.wait()
        if process.returncode:
            raise SyncError(
                f"rclone could not copy everything ({'; '.join(errors[-3:]) or 'no reason given'});"
                " check access and free space, and run the same command again to go on"
            )
        if self._stage is not None:
            for name in names:
                target = Path(self._places[0], name)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(self._stage / name, target)
            shutil.rmtree(self._stage)

    def delete(self, names: Sequence[str]) -> None:
        """Delete by `rclone delete`."""
        with _listed(names) as path:
            self._check(self._run("delete", "--files-from-raw", path, self._places[0]))

    def _run(self, *words: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [self._program, *words],
            env=self._environment,
            capture_output=True,
            text=True,
            check=False,
        )

    def _check(self, done: "subprocess.CompletedProcess[str]") -> None:
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise SyncError(f"rclone {done.args[1]} failed: {last}; check the address and access")


def _credentials() -> dict[str, str]:
    """What other programs read from the environment, under rclone's names."""
    found = {"RCLONE_S3_ENV_AUTH": "true", "RCLONE_GCS_ENV_AUTH": "true"}
    found["RCLONE_GCS_BUCKET_POLICY_ONLY"] = "true"
    same = {
        "AWS_ENDPOINT_URL": "RCLONE_S3_ENDPOINT",
        "AWS_DEFAULT_REGION": "RCLONE_S3_REGION",
        "GOOGLE_APPLICATION_CREDENTIALS": "RCLONE_GCS_SERVICE_ACCOUNT_FILE",
    }
    found |= {ours: os.environ[name] for name, ours in same.items() if name in os.environ}
    found["RCLONE_S3_PROVIDER"] = "Other" if "RCLONE_S3_ENDPOINT" in found else "AWS"
    return found


@contextlib.contextmanager
def _listed(names: Sequence[str]) -> Iterator[str]:
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as file:
        file.write("".join(f"{name}\n" for name in names))
        file.flush()
        yield file.name


def _json(line: str) -> dict:
    try:
        return json.loads(line)
    except ValueError:
        return {}


class Fsspec:
    """fsspec's file systems, a file after the other."""

    name = "fsspec"

    def __init__(self, source: str, destination: str):
        """Take two folders or URLs."""
        self._places = tuple(filesystem_of(place) for place in (destination, source))

    def files(self, at_source: bool) -> dict[str, int]:
        """List to the bottom."""
        filesystem, root = self._places[at_source]
        filesystem.invalidate_cache()
        try:
            found = filesystem.find(root, detail=True)
        except FileNotFoundError:
            return {}
        start = len(root.rstrip("/")) + 1
        return {path[start:]: item["size"] for path, item in found.items() if path[start:]}

    def different(self, names: Sequence[str]) -> list[str]:
        """Compare sizes, then MD5: the store's own where it tells one, else of what is read."""
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
        for name in names:
            path = f"{to.rstrip('/')}/{name}"
            destination.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
            is_local = "file" in destination.protocol
            part = path + ".part" if is_local else path
            try:
                with (
                    source.open(f"{root.rstrip('/')}/{name}", "rb") as file,
                    destination.open(part, "wb") as out,
                ):
                    while block := file.read(_BLOCK_BYTES):
                        out.write(block)
                        on_bytes(len(block))
            except OSError as error:
                raise SyncError(
                    f"{name}: could not be copied ({error}); check access and free space, and run "
                    "the same command again to go on"
                ) from error
            if is_local:
                os.replace(part, path)

    def delete(self, names: Sequence[str]) -> None:
        """Delete one after the other."""
        filesystem, root = self._places[0]
        for name in names:
            filesystem.rm_file(f"{root.rstrip('/')}/{name}")


def local_folder(address: str) -> Path | None:
    """The folder or file here that an address means; None where it is elsewhere."""
    if is_remote(address) or is_rclone_remote(address):
        return None
    return Path(address).resolve()
