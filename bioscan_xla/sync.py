"""Copy data and tables between places: `python -m bioscan_xla.sync SOURCE DESTINATION`.

Input: two addresses (a folder, a mounted Drive, `gs://`, `s3://`, an rclone remote). Output: the
destination with all files of the source. Invariants: a LanceDB table at the destination is readable
at all times, because its manifests (`_versions`) are copied after the files they name and deleted
before them; nothing is deleted unless asked; files that are already there are not copied again.
"""

import logging
import re
import sys
import time
from collections.abc import Callable, Collection, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .cli import run_command
from .errors import SyncError
from .options import SyncConfig
from .reads.inputs import UNFINISHED
from .table.mirror import copy_order, foreign_tables, is_manifest
from .transfer.engine import Engine, check_names, check_targets, local_folder, open_engine

log = logging.getLogger("bioscan_xla.sync")

_SHOWN = 20
_LOG_SECONDS = 60.0


def sync(
    source: str, destination: str, *, delete: bool = False, dry_run: bool = False
) -> dict[str, Any]:
    """Bring a destination up to a source.

    Args:
        source: a local folder or file, a URL, or an rclone remote (`drive:folder`).
        destination: a folder, a URL or a remote; a copied file keeps its name.
        delete: also delete files at the destination that the source does not have.
        dry_run: only report what would be done.

    Returns:
        `copied`, `bytes`, `kept` (there already), `deleted` (files), `to_copy`, `to_delete`
        (names), `seconds`, `engine`.

    Raises:
        SyncError: the source is missing or empty, one place is inside the other, a transfer
            failed, or a file differs afterwards.
    """
    started = time.monotonic()
    source, only = _check_places(source, destination)
    engine = open_engine(source, destination, only)
    if only is None and local_folder(source) is None and engine.is_file():
        source, only = _split(source)
        engine = open_engine(source, destination, only)
    if delete and only is not None:
        raise SyncError(f"{only}: a single file; --delete works on folders only")
    ours = _list_source(engine)
    if not ours:
        raise SyncError(f"{source}: does not exist or holds no files; is the drive mounted?")
    there = engine.files(at_source=False)
    both = [name for name in ours if there.get(name) == ours[name]]
    changed = set(engine.different(both)) if both else set()
    if not delete:
        _refuse_foreign(ours, there, set(both) - changed, destination)
    to_copy = [name for name in ours if name not in there or name in changed or name not in both]
    to_delete = sorted(set(there) - set(ours)) if delete else []
    if (folder := local_folder(destination)) is not None:
        check_targets(folder, [*to_copy, *to_delete, f"{UNFINISHED}/a"])
    result = {
        "copied": 0 if dry_run else len(to_copy),
        "bytes": sum(ours[name] for name in to_copy),
        "kept": len(ours) - len(to_copy),
        "deleted": 0 if dry_run else len(to_delete),
        "to_copy": [*chain(*copy_order(to_copy))],
        "to_delete": [*chain(*copy_order(to_delete)[::-1])],
        "engine": engine.name,
    }
    if not dry_run:
        _carry_out(engine, result)
    return result | {"seconds": time.monotonic() - started}


def _list_source(engine: Engine) -> dict[str, int]:
    found = engine.files(at_source=True)
    check_names(found)
    manifests = {name: size for name, size in found.items() if is_manifest(Path(name))}
    if manifests:
        # Listed again: all files that these manifests name are in the later list, even of a table
        # that is being written.
        found = engine.files(at_source=True)
        check_names(found)
    others = {name: size for name, size in found.items() if not is_manifest(Path(name))}
    return {
        name: size
        for name, size in (others | manifests).items()
        if not name.endswith(UNFINISHED) and not name.startswith(UNFINISHED + "/")
    }


def _refuse_foreign(
    ours: Collection[str], there: Collection[str], same: Collection[str], destination: str
) -> None:
    for table, why in foreign_tables(ours, there, lambda name: name in same).items():
        raise SyncError(
            f"{destination}: the table {table or 'there'} {why}: it is newer, or another table. "
            "Swap the two places if you meant that, name another destination, or make it equal "
            "with --delete"
        )


def _check_places(source: str, destination: str) -> tuple[str, str | None]:
    """The source folder and, where a single file is meant, its name."""
    for address in (source, destination):
        if re.fullmatch(r"\w+://+", address):
            raise SyncError(f"{address}: no bucket is named; add it")
    here, there = local_folder(source), local_folder(destination)
    only = None
    if here is not None:
        if not _exists(here):
            raise SyncError(f"{source}: no such file or folder; is the drive mounted?")
        if here.is_file():
            source, only = str(here.parent), here.name
            here = here.parent
    if here is not None and only and there is not None and there.suffix == Path(only).suffix != "":
        raise SyncError(f"{destination}: name the folder; a copied file keeps its name, {only}")
    if there is not None:
        if there.is_file():
            raise SyncError(f"{destination}: is a file; name a folder")
        if not there.parent.is_dir():
            raise SyncError(
                f"{destination}: {there.parent} does not exist; mount the drive, or create "
                "that folder first"
            )
    ends = [
        re.sub("(?<!:)$", "/", (str(folder) if folder else address).rstrip("/"))
        for folder, address in ((here, source), (there, destination))
    ]
    if ends[0] == ends[1]:
        raise SyncError(f"{source}: source and destination are the same place")
    if only is None and (ends[0].startswith(ends[1]) or ends[1].startswith(ends[0])):
        raise SyncError(f"{source} and {destination}: one is inside the other")
    return source, only


def _exists(path: Path) -> bool:
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:  # a dead mount
        raise SyncError(f"{path}: {error.strerror}; mount the drive again") from error
    return True


def _split(address: str) -> tuple[str, str]:
    """The folder of a file elsewhere, and its name."""
    head, mark, name = re.match(r"(.*)([/:])([^/:]+)$", address).groups()  # type: ignore[union-attr]
    return head + mark if mark == ":" else head, name


def _carry_out(engine: Engine, result: dict[str, Any]) -> None:
    names = result["to_copy"]
    if names:
        log.info("%d files (%s) to copy by %s", len(names), _size(result["bytes"]), engine.name)
    with tqdm(
        total=result["bytes"], unit="B", unit_scale=True, desc="copying", leave=False, disable=None
    ) as bar:
        count = _counter(bar, result["bytes"])
        for part in copy_order(names):
            if part:
                engine.copy(part, count)
            if wrong := engine.different(part) if part else []:
                raise SyncError(
                    f"{', '.join(wrong[:3])} ({len(wrong)} in total): differ at the "
                    "destination after the copy, or were deleted at the source meanwhile; run the "
                    "same command again"
                )
    for part in reversed(copy_order(result["to_delete"])):
        if part:
            engine.delete(part)


def _counter(bar: tqdm, total: int) -> Callable[[int], None]:
    """Counts bytes on a progress bar or, without a terminal, in a log line every minute."""
    done, logged = 0, time.monotonic()

    def count(more: int) -> None:
        nonlocal done, logged
        done += more
        bar.update(more)
        if bar.disable and time.monotonic() - logged >= _LOG_SECONDS:
            logged = time.monotonic()
            log.info("%.0f %% of %s copied", 100 * done / max(1, total), _size(total))

    return count


def _size(count: int) -> str:
    return tqdm.format_sizeof(count, "B", 1024)


def summary(result: dict[str, Any], dry_run: bool) -> str:
    """The summary printed at the end."""
    size = _size(result["bytes"])
    if dry_run:
        lines = [f"copy    {name}" for name in result["to_copy"][:_SHOWN]]
        lines += [f"delete  {name}" for name in result["to_delete"][:_SHOWN]]
        more = len(result["to_copy"]) + len(result["to_delete"]) - len(lines)
        lines += [f"... and {more:,} more"] if more else []
        return "\n".join(
            [
                *lines,
                f"would copy {len(result['to_copy']):,} files ({size}) and delete "
                f"{len(result['to_delete']):,}; {result['kept']:,} are already there",
            ]
        )
    return (
        f"{result['copied']:,} files ({size}) copied in {result['seconds']:.1f} s by "
        f"{result['engine']}, sizes and checksums compared; {result['kept']:,} were there already, "
        f"{result['deleted']:,} deleted"
    )


def _work(config: SyncConfig) -> int:
    result = sync(config.source, config.destination, delete=config.delete, dry_run=config.dry_run)
    print(summary(result, config.dry_run))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return run_command(
        SyncConfig,
        _work,
        arguments,
        "python -m bioscan_xla.sync",
        on_second_signal="stopped; run the same command to resume",
        positionals=("source", "destination"),
    )


if __name__ == "__main__":
    sys.exit(main())
