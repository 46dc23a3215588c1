"""Input names to files, local or in the cloud.

Input: files, globs, folders, URLs.
Output: absolute paths and URLs of files whose format is known.
Invariants: a local folder and its remote copy give the same files; a sequence file that is skipped
is named in the log.
"""

import glob
import hashlib
import itertools
import logging
import os
import re
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec

from ..errors import InputError

log = logging.getLogger(__name__)

_MARK = re.compile(r"#[0-9a-f]{12}$")
_MARK_BYTES = 1 << 16
_MARKS_AT_ONCE = 8
_PATTERN = re.compile(r"[*?\[]")

_SUFFIXES = {
    "parquet": (".parquet", ".pq"),
    "fasta": (".fasta", ".fa", ".fna", ".fas", ".ffn"),
    "fastq": (".fastq", ".fq"),
}


UNFINISHED = ".bioscan-part"
"""Suffix of files, or name of a folder of files, that are still being copied."""

_OWN_FOLDERS = (".lance", UNFINISHED)  # tables, and files that are being copied
_OWN_FILES = re.compile(r"rejected(-.+)?\.parquet")  # of any table and process
_HIDDEN = (".", "_")  # as Spark, Hive and Arrow have it
_MOST_NAMED = 5


def format_of(source: str) -> str:
    """`parquet`, `fasta` or `fastq`, by the file name; InputError for any other."""
    name = source.lower().removesuffix(".gz")
    for kind, suffixes in _SUFFIXES.items():
        if name.endswith(suffixes) and (kind != "parquet" or not source.lower().endswith(".gz")):
            return kind
    endings = ", ".join(itertools.chain.from_iterable(_SUFFIXES.values()))
    raise InputError(f"{source}: unknown file type; use {endings}, FASTA and FASTQ also with .gz")


def is_remote(source: str) -> bool:
    """True for `gs://`, `s3://`, `az://`, `hf://` and the like."""
    return "://" in source


def expand_inputs(inputs: str | Sequence[str]) -> list[str]:
    """Files that the inputs name: files, globs, folders (searched recursively) and URLs.

    Folders and globs skip hidden files (`.name`, `_name`, or in such a folder) and files written by
    this program: `rejected.parquet`, `rejected-*.parquet`, tables, unfinished copies.

    Returns:
        Absolute paths or URLs, each once; those of a glob or folder are sorted.

    Raises:
        InputError: an input matches nothing, or its format is unknown.
    """
    return list(_find_files(inputs))


def name_inputs(inputs: str | Sequence[str]) -> tuple[dict[str, str], list[InputError]]:
    """Files that the inputs name, and the name under which a table stores each.

    The name is the path below the folder or the fixed part of the glob that was given, or the
    file's own name, then a mark of the content: `2024/reads.fasta#5a1c0f93be72`. So a file that
    moves with its folder, or to the cloud, keeps its name, and two files never share one.

    Returns:
        Path or URL to name; a second copy of a file is left out. And an error for each file that
        cannot be read.

    Raises:
        InputError: as `expand_inputs`, or not one file can be read.
    """
    names: dict[str, str] = {}
    failures: list[InputError] = []
    known: dict[str, str] = {}
    found = _find_files(inputs)
    with ThreadPoolExecutor(_MARKS_AT_ONCE) as threads:
        marks = [threads.submit(content_mark, path) for path in found]
    for (path, below), mark in zip(found.items(), marks, strict=True):
        try:
            name = f"{below}#{mark.result()}"
        except InputError as error:
            failures.append(error)
            continue
        first = known.setdefault(source_key(name), path)
        if first == path:
            names[path] = name
        else:
            log.warning("%s is a copy of %s and is read only once", path, first)
    if not names:
        raise failures[0]
    return names, failures


def source_key(name: str) -> str:
    """What identifies a source: the file's own name with the mark, whatever its folder."""
    return name.rsplit("/", 1)[-1] if has_mark(name) else name


def has_mark(name: str) -> bool:
    """False for sources of old tables, which are absolute paths or URLs."""
    return _MARK.search(name) is not None


def without_mark(name: str) -> str:
    """A stored name without its mark, for messages."""
    return _MARK.sub("", name)


def changed_files(names: Mapping[str, str], known: Collection[str]) -> list[str]:
    """The files whose content was another when their name was recorded.

    Args:
        names: of each file, as it is now.
        known: recorded names.
    """
    current = set(map(source_key, names.values()))
    earlier = {
        without_mark(name) for name in known if has_mark(name) and source_key(name) not in current
    }
    there = set(map(source_key, known))
    return [
        path
        for path, name in names.items()
        if without_mark(name) in earlier and source_key(name) not in there
    ]


def content_mark(source: str) -> str:
    """12 hexadecimal digits from a file's size and its first and last 64 KiB.

    Parquet and gzip files end with checksums, so any change shows. A change in the middle of a
    large plain FASTA that keeps its size does not.

    Raises:
        InputError: the file cannot be read.
    """
    filesystem, path = filesystem_of(source)
    try:
        size = filesystem.size(path) or 0
        start = filesystem.cat_file(path, 0, _MARK_BYTES)
        end = filesystem.cat_file(path, max(0, size - _MARK_BYTES), size) if size else b""
    except Exception as error:  # every storage backend raises its own errors
        raise InputError(
            f"{source}: cannot be read ({error}); check its permissions, the network and the "
            "credentials"
        ) from error
    digest = hashlib.blake2b(f"{size}:".encode(), digest_size=6)
    digest.update(start)
    digest.update(end)
    return digest.hexdigest()


def _find_files(inputs: str | Sequence[str]) -> dict[str, str]:
    """Absolute path or URL of each file, and its path below what was named."""
    names = [inputs] if isinstance(inputs, str | os.PathLike) else list(inputs)
    found: dict[str, str] = {}
    for name in map(os.fspath, names):
        root, matches = _fixed_part(name), _match(name)
        paths = [match if is_remote(match) else os.path.abspath(match) for match in matches]
        below = {path: _below(root, path) for path in paths}
        if matches != [name]:
            below = _leave_out(below)
        if not below:
            raise InputError(
                f"{name}: no such file, or no sequence files in this folder; check the path"
            )
        found |= {path: part for path, part in below.items() if path not in found}
    if not found:
        raise InputError("no input given; pass --input FILE")
    for source in found:
        format_of(source)
    return found


def _fixed_part(name: str) -> str:
    """A glob's folders before the first pattern; any other name unchanged."""
    parts = (name if is_remote(name) else Path(os.path.abspath(name)).as_posix()).split("/")
    if is_remote(name) or not os.path.exists(name):
        parts = list(itertools.takewhile(lambda part: not _PATTERN.search(part), parts))
    return "/".join(parts).rstrip("/")


def _below(folder: str, path: str) -> str:
    if is_remote(path):
        # Some file systems write three slashes where the user wrote two.
        path, folder = (place.split("://", 1)[-1].lstrip("/") for place in (path, folder))
    else:
        path = Path(path).as_posix()
    if path.startswith(f"{folder}/"):
        return path[len(folder) + 1 :]
    return path.rsplit("/", 1)[-1]


def _match(name: str) -> list[str]:
    """The file of this name, or the sorted files of the folder or pattern."""
    if is_remote(name):
        return _expand_remote(name)
    if os.path.isdir(name):
        files = (str(path) for path in Path(name).rglob("*") if path.is_file())
        return sorted(filter(_has_format, files))
    return [name] if os.path.exists(name) else sorted(glob.glob(name, recursive=True))


def _leave_out(below: Mapping[str, str]) -> dict[str, str]:
    """Skip hidden files and those this program wrote, and name them in the log."""
    left = [path for path, part in below.items() if _is_hidden_or_own(part)]
    if left:
        names = ", ".join(left[:_MOST_NAMED]) + (", ..." if len(left) > _MOST_NAMED else "")
        log.info(
            "skipped %d files that are hidden or written by this program: %s", len(left), names
        )
    return {path: part for path, part in below.items() if path not in left}


def _is_hidden_or_own(below: str) -> bool:
    parts = below.split("/")
    return (
        any(part.startswith(_HIDDEN) or part.endswith(_OWN_FOLDERS) for part in parts)
        or _OWN_FILES.fullmatch(parts[-1]) is not None
    )


def _has_format(name: str) -> bool:
    try:
        return bool(format_of(name))
    except InputError:
        return False


def filesystem_of(source: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """File system and path of an address; InputError if its package is not installed."""
    try:
        return fsspec.core.url_to_fs(source)
    except (ImportError, ValueError) as error:
        raise InputError(
            f"{source}: this kind of URL needs a package that is not installed ({error}); "
            "pip install 'bioscan_xla[cloud]'"
        ) from error


def _expand_remote(name: str) -> list[str]:
    filesystem, path = filesystem_of(name)
    try:
        if _PATTERN.search(path):
            return sorted(map(filesystem.unstrip_protocol, filesystem.glob(path)))
        if filesystem.isdir(path):
            files = filter(_has_format, filesystem.find(path))
            return sorted(map(filesystem.unstrip_protocol, files))
        return [name] if filesystem.exists(path) else []
    except Exception as error:  # every storage backend raises its own errors
        raise InputError(
            f"{name}: cannot be listed ({error}); check the address, the network and the "
            "credentials"
        ) from error
