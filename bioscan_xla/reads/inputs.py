"""Names to files: what the user calls the input, local or in the cloud.

Enters: files, globs, folders, URLs. Leaves: absolute paths and URLs of files whose format is known.
"""

import glob
import itertools
import os
from collections.abc import Sequence
from pathlib import Path

import fsspec

from ..errors import InputError

_SUFFIXES = {
    "parquet": (".parquet", ".pq"),
    "fasta": (".fasta", ".fa", ".fna", ".fas", ".ffn"),
    "fastq": (".fastq", ".fq"),
}


UNFINISHED = ".bioscan-part"
"""What a name ends with, or the folder that holds files, until they are whole."""

_NOT_INPUT = (".lance", UNFINISHED)  # folders: tables, and files that are being copied


def format_of(source: str) -> str:
    """`parquet`, `fasta` or `fastq`, told by the name; InputError if by none."""
    name = source.lower().removesuffix(".gz")
    for kind, suffixes in _SUFFIXES.items():
        if name.endswith(suffixes) and (kind != "parquet" or not source.lower().endswith(".gz")):
            return kind
    endings = ", ".join(itertools.chain.from_iterable(_SUFFIXES.values()))
    raise InputError(
        f"{source}: the ending tells no format; known are {endings}, FASTA and FASTQ also with .gz"
    )


def is_remote(source: str) -> bool:
    """True for `gs://`, `s3://`, `az://`, `hf://` and the like."""
    return "://" in source


def expand_inputs(inputs: str | Sequence[str]) -> list[str]:
    """Files that the inputs name: files, globs, folders (searched to the bottom) and URLs.

    Returns:
        Absolute paths or URLs, each once; those of a glob or folder in sorted order.

    Raises:
        InputError: an input names nothing, or a format that is not known.
    """
    names = [inputs] if isinstance(inputs, str | os.PathLike) else list(inputs)
    found: list[str] = []
    for name in map(os.fspath, names):
        if is_remote(name):
            matches = _expand_remote(name)
        elif os.path.isdir(name):
            matches = sorted(str(path) for path in Path(name).rglob("*") if _is_data(path))
        elif os.path.exists(name):
            matches = [name]
        else:
            matches = sorted(path for path in glob.glob(name, recursive=True))
        if not matches:
            raise InputError(
                f"{name}: no such file, or no sequence file in this folder; check the path"
            )
        found += [match if is_remote(match) else os.path.abspath(match) for match in matches]
    if not found:
        raise InputError("no input was named; pass --input FILE")
    for source in found:
        format_of(source)
    return list(dict.fromkeys(found))


def _is_data(path: Path) -> bool:
    if path.name.startswith((".", "_")) or not path.is_file():
        return False
    if path.name.startswith("rejected") or any(part.endswith(_NOT_INPUT) for part in path.parts):
        return False  # what an earlier run or copy left in this folder
    try:
        return bool(format_of(str(path)))
    except InputError:
        return False


def filesystem_of(source: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """File system and path of an address; InputError where its package is not installed."""
    try:
        return fsspec.core.url_to_fs(source)
    except (ImportError, ValueError) as error:
        raise InputError(
            f"{source}: this kind of address needs a package that is not installed ({error}); "
            "pip install 'bioscan_xla[cloud]'"
        ) from error


def _expand_remote(name: str) -> list[str]:
    filesystem, path = filesystem_of(name)
    try:
        if any(letter in path for letter in "*?["):
            return sorted(map(filesystem.unstrip_protocol, filesystem.glob(path)))
        if filesystem.isdir(path):
            files = map(filesystem.unstrip_protocol, filesystem.find(path))
            return sorted(file for file in files if _is_data_name(file))
        return [name] if filesystem.exists(path) else []
    except Exception as error:  # each kind of store has errors of its own
        raise InputError(
            f"{name}: cannot be listed ({error}); check the address, the network and the "
            "credentials"
        ) from error


def _is_data_name(name: str) -> bool:
    """True where the name is a sequence file's, and not one inside a LanceDB table."""
    try:
        folders = name.split("/")[:-1]
        return not any(f.endswith(_NOT_INPUT) for f in folders) and bool(format_of(name))
    except InputError:
        return False
