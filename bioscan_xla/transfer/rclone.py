"""Copies by the rclone program, to and from any place it is configured for.

Input: two folders, `gs://` or `s3://` addresses, or rclone remotes. Output: an engine with the
methods of `transfer.engine.Engine`.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ..errors import SyncError
from ..reads.inputs import UNFINISHED, is_remote
from .fsspec import list_folder

_STAGE = UNFINISHED  # folder at a local destination for rclone's unfinished files
_SOON = ("--retries", "1", "--low-level-retries", "2", "--contimeout", "20s")
# Remotes of our own for the services that rclone can serve here. Options of a whole backend
# (RCLONE_S3_...) would also change the remotes that the user has configured.
REMOTES = {"s3": "bioscan_s3:", "gs": "bioscan_gs:"}


def is_rclone_remote(address: str) -> bool:
    """True for `remote:path` and `:backend,option=value:path`."""
    return re.match(r"^(:[a-z0-9]+(,[^:]*)?:|[\w][\w .+@-]+:(?!//))", address) is not None


class Rclone:
    """The rclone program; its own options can be given as RCLONE_... in the environment."""

    name = "rclone"

    def __init__(self, program: str, source: str, destination: str, only: str | None = None):
        """Take the program and two addresses."""
        self._only = only
        source, destination = _address(source), _address(destination)
        self._program, self._places = program, (destination, source)
        is_local = not is_rclone_remote(destination)
        self._stage = Path(destination, _STAGE) if is_local else None
        self._environment = dict(os.environ) | _credentials()
        # rclone refuses to start with this one; it has its own name for it.
        if bundle := self._environment.pop("AWS_CA_BUNDLE", None):
            self._environment.setdefault("RCLONE_CA_CERT", bundle)

    def is_file(self) -> bool:
        """Ask `rclone lsjson --stat`; a missing path is not a file."""
        done = self._run("lsjson", "--stat", *_SOON, self._places[1])
        return not done.returncode and not json.loads(done.stdout)["IsDir"]

    def files(self, at_source: bool) -> dict[str, int]:
        """List by `rclone lsjson`; a folder here that is the source by itself."""
        place = self._places[at_source]
        if at_source and not self._only and not is_rclone_remote(place):
            return list_folder(place, strict=True)
        options = ["--recursive", "--files-only", "--no-modtime", "--copy-links", *_SOON]
        with _listed([self._only or ""]) as path:
            # No filter otherwise: with one, rclone passes over keys such as `../evil.txt`.
            which = ["--files-from-raw", path] if self._only else []
            done = self._run("lsjson", *options, *which, place)
        if done.returncode == 3:  # directory not found
            return {}
        self._check(done)
        found = {item["Path"]: item["Size"] for item in json.loads(done.stdout)}
        return {name: size for name, size in found.items() if not name.startswith(f"{_STAGE}/")}

    def different(self, names: Sequence[str]) -> list[str]:
        """Compare by `rclone check`: checksums that both places have, else the bytes."""
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
        """Names that are the same, and rclone's other output."""
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
        """Copy by `rclone copy`, which retries broken transfers by itself."""
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
            if self._stage is not None:  # complete files are kept even if others failed
                with contextlib.suppress(SyncError):
                    sizes = self.files(at_source=True)
                    self._deliver([n for n in names if _size(self._stage / n) == sizes.get(n, -1)])
            raise SyncError(
                f"rclone could not copy everything ({'; '.join(errors[-3:]) or 'no reason given'});"
                " check access and free space, and run the same command again to resume"
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


def _address(address: str) -> str:
    if not is_remote(address):
        return address if is_rclone_remote(address) else os.path.abspath(address)
    kind, _, path = address.partition("://")
    return REMOTES[kind] + path


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None
