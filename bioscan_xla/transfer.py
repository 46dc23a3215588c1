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
from typing import BinaryIO, Protocol

from fsspec import AbstractFileSystem
from fsspec.spec import AbstractBufferedFile

from .errors import SyncError
from .inputs import UNFINISHED, filesystem_of, is_remote

_BLOCK_BYTES = 8 << 20
_STAGE = UNFINISHED  # folder at a local destination in which rclone's files become whole
_SOON = ("--retries", "1", "--low-level-retries", "2", "--contimeout", "20s")
_STORES = {"s3", "gs", "gcs", "abfs", "az"}  # they have buckets, and no folders to be made
# Remotes of our own for the services that rclone can serve here. Options of a whole backend
# (RCLONE_S3_...) would also change the remotes that the user has configured.
_RCLONE_REMOTES = {"s3": "bioscan_s3:", "gs": "bioscan_gs:"}


class Engine(Protocol):
    """What both engines do; names are relative to the place, with `/` between folders."""

    name: str

    def is_file(self) -> bool:
        """Whether the source is one file."""

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


def open_engine(
    source: str, destination: str, only: str | None = None, without_rclone: bool = False
) -> Engine:
    """The engine for two addresses: folders, `gs://`, `s3://` and other URLs, rclone remotes.

    Args:
        source: folder, URL or remote.
        destination: folder, URL or remote.
        only: the one file of the source that is meant; no other is listed.
        without_rclone: take fsspec though rclone is installed.

    Raises:
        SyncError: a remote of rclone's, and rclone is not installed.
        InputError: a kind of URL whose package is not installed.
    """
    pair = (source, destination)
    program = None if without_rclone else shutil.which("rclone")
    needed = [address for address in pair if is_rclone_remote(address)]
    if needed and program is None:
        raise SyncError(f"{needed[0]}: is a remote of rclone, which is not installed (rclone.org)")
    known = all(not is_remote(a) or a.split("://")[0] in _RCLONE_REMOTES for a in pair)
    if program is not None and known:
        return Rclone(program, _as_rclone(source), _as_rclone(destination), only)
    return Fsspec(source, destination, only)


def _as_rclone(address: str) -> str:
    if not is_remote(address):
        return address if is_rclone_remote(address) else os.path.abspath(address)
    kind, _, path = address.partition("://")
    return _RCLONE_REMOTES[kind] + path


class Rclone:
    """The rclone program; its own options can be given as RCLONE_... in the environment."""

    name = "rclone"

    def __init__(self, program: str, source: str, destination: str, only: str | None = None):
        """Take the program and two addresses as rclone writes them."""
        self._only = only
        self._program, self._places = program, (destination, source)
        is_local = not is_rclone_remote(destination)
        self._stage = Path(destination, _STAGE) if is_local else None
        self._environment = dict(os.environ) | _credentials()
        # rclone refuses to start with this one; it has its own name for it.
        if bundle := self._environment.pop("AWS_CA_BUNDLE", None):
            self._environment.setdefault("RCLONE_CA_CERT", bundle)

    def is_file(self) -> bool:
        """Ask `rclone lsjson --stat`; what is not there is no file."""
        done = self._run("lsjson", "--stat", *_SOON, self._places[1])
        return not done.returncode and not json.loads(done.stdout)["IsDir"]

    def files(self, at_source: bool) -> dict[str, int]:
        """List by `rclone lsjson`; a folder here that is the source by itself."""
        place = self._places[at_source]
        if at_source and not self._only and not is_rclone_remote(place):
            return _walk(place, strict=True)
        options = ["--recursive", "--files-only", "--no-modtime", "--copy-links", *_SOON]
        with _listed([self._only or ""]) as path:
            which = ["--files-from-raw", path] if self._only else ["--exclude", f"/{_STAGE}/**"]
            done = self._run("lsjson", *options, *which, place)
        if done.returncode == 3:  # directory not found
            return {}
        self._check(done)
        return {item["Path"]: item["Size"] for item in json.loads(done.stdout)}

    def different(self, names: Sequence[str]) -> list[str]:
        """Compare by `rclone check`: checksums that both places know, else the bytes."""
        same, said = self._compare(names)
        if "No common hash" in said:
            unsure = list(names)
        elif "hashes could not be checked" in said:
            # Of these it has compared the sizes only, and counts them as equal.
            unsure = self._without_hash(names) or list(names)
        else:
            unsure = []
        if unsure:
            same = (same - set(unsure)) | self._compare(unsure, "--download")[0]
        return [name for name in names if name not in same]

    def _compare(self, names: Sequence[str], *how: str) -> tuple[set[str], str]:
        """Names that are the same, and what rclone said besides."""
        with _listed(names) as path:
            options = ["--one-way", "--combined", "-", "--copy-links", "--files-from-raw", path]
            done = self._run("check", *options, *how, self._places[1], self._places[0])
        lines = done.stdout.splitlines()
        if not lines:
            self._check(done)
        # A file that was deleted on both sides has no line.
        return {line[2:] for line in lines if line.startswith("= ")}, done.stderr

    def _without_hash(self, names: Sequence[str]) -> list[str]:
        """Names for which one of the places has no checksum of its own."""
        found: set[str] = set()
        for place in filter(is_rclone_remote, self._places):
            with _listed(names) as path:
                options = ["--recursive", "--files-only", "--hash", "--files-from-raw", path]
                done = self._run("lsjson", *options, place)
            self._check(done)
            items = json.loads(done.stdout)
            found |= {item["Path"] for item in items if not any(item.get("Hashes", {}).values())}
        return sorted(found)

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
                    *("--files-from-raw", path, "--no-traverse", "--copy-links", again),
                    # In several streams a part of a file can have the size of the whole.
                    *("--multi-thread-streams", "0"),
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
            if self._stage is not None:  # what is whole is not held back by what failed
                with contextlib.suppress(SyncError):
                    sizes = self.files(at_source=True)
                    self._deliver([n for n in names if _size(self._stage / n) == sizes.get(n, -1)])
            raise SyncError(
                f"rclone could not copy everything ({'; '.join(errors[-3:]) or 'no reason given'});"
                " check access and free space, and run the same command again to go on"
            )
        if self._stage is not None:
            # One that was deleted at the source meanwhile is not there; `different` tells.
            self._deliver([name for name in names if (self._stage / name).exists()])
            shutil.rmtree(self._stage, ignore_errors=True)

    def _deliver(self, names: Sequence[str]) -> None:
        assert self._stage is not None
        for name in names:
            target = Path(self._places[0], name)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(self._stage / name, target)

    def delete(self, names: Sequence[str]) -> None:
        """Delete by `rclone delete`."""
        with _listed(names) as path:
            self._check(self._run("delete", "--files-from-raw", path, self._places[0]))
        # LanceDB takes an empty `NAME.lance` for a table. Stores without folders ignore this.
        self._check(self._run("rmdirs", "--leave-root", self._places[0]))

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
            last = " / ".join(done.stderr.strip().splitlines()[-3:]) or "no reason given"
            raise SyncError(
                f"rclone {done.args[1]} failed: {last[-600:]}; check the address, the network and "
                "the credentials"
            )


def _credentials() -> dict[str, str]:
    """Our two remotes, and what other programs read from the environment under rclone's names."""
    given = os.environ
    s3 = {"TYPE": "s3", "ENV_AUTH": "true", "NO_CHECK_BUCKET": "true", "PROVIDER": "AWS"}
    if endpoint := given.get("AWS_ENDPOINT_URL_S3") or given.get("AWS_ENDPOINT_URL"):
        s3 |= {"ENDPOINT": endpoint, "PROVIDER": "Other"}
    if region := given.get("AWS_REGION") or given.get("AWS_DEFAULT_REGION"):
        s3["REGION"] = region
    gs = {"TYPE": "google cloud storage", "ENV_AUTH": "true", "BUCKET_POLICY_ONLY": "true"}
    if account := given.get("GOOGLE_APPLICATION_CREDENTIALS"):
        gs["SERVICE_ACCOUNT_FILE"] = account
    remotes = {"BIOSCAN_S3": s3, "BIOSCAN_GS": gs}
    return {
        f"RCLONE_CONFIG_{remote}_{option}": value
        for remote, options in remotes.items()
        for option, value in options.items()
    }


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

    def __init__(self, source: str, destination: str, only: str | None = None):
        """Take two folders or URLs."""
        self._places = tuple(filesystem_of(place) for place in (destination, source))
        self._only = only

    def is_file(self) -> bool:
        """Ask the file system; what is not there, or does not answer, is no file."""
        filesystem, root = self._places[1]
        try:
            return filesystem.isfile(root)
        except Exception:  # listing it tells why
            return False

    def files(self, at_source: bool) -> dict[str, int]:
        """List to the bottom."""
        filesystem, root = self._places[at_source]
        filesystem.invalidate_cache()
        try:
            if self._only:
                path = f"{root.rstrip('/')}/{self._only}"
                return {self._only: filesystem.info(path)["size"]}
            if _is_local(filesystem):
                return _walk(root, strict=at_source)
            found = filesystem.find(root, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except SyncError:
            raise
        except Exception as error:  # each kind of store has errors of its own
            raise SyncError(
                f"{root}: cannot be listed ({error}); check the address, the network and the "
                "credentials"
            ) from error
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
                    "the same command again to go on"
                ) from error

    def delete(self, names: Sequence[str]) -> None:
        """Delete one after the other, and the folders that are then empty."""
        filesystem, root = self._places[0]
        for name in names:
            filesystem.rm_file(f"{root.rstrip('/')}/{name}")
        if _is_local(filesystem):  # LanceDB takes an empty `NAME.lance` for a table
            for folder, *_ in os.walk(root, topdown=False):
                if folder != root and not os.listdir(folder):
                    os.rmdir(folder)


def _walk(root: str, strict: bool) -> dict[str, int]:
    """Files below a local folder, through links; empty if it is not there.

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
                raise SyncError(f"{path}: leads nowhere, or is no file; remove it")
            if strict and not _is_plain(name):
                raise SyncError(f"{str(path)!r}: this name cannot be copied; rename the file")
    return found


def _is_plain(name: str) -> bool:
    """Whether a name is one line of UTF-8, as the lists of rclone are."""
    try:
        return len(name.encode().splitlines()) == 1
    except UnicodeEncodeError:
        return False


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _write(file: BinaryIO, out: BinaryIO, on_bytes: Callable[[int], object]) -> None:
    try:
        while block := file.read(_BLOCK_BYTES):
            out.write(block)
            on_bytes(len(block))
    except BaseException:
        if isinstance(out, AbstractBufferedFile):
            # To close it would publish what was written so far as the whole object.
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


def local_folder(address: str) -> Path | None:
    """The folder or file here that an address means; None where it is elsewhere."""
    if is_remote(address) or is_rclone_remote(address):
        return None
    return Path(address).expanduser().resolve()
