"""Kill -9 at random moments, resume, and count what is lost and what is there twice.

`python -m tests.bench.kill --kills 100` divides the kills: embedding in one process, in two that
share the input, in the driver of a Ray run (a fifth of the kills, for its workers start slowly),
and classification (a fifth). It prints a line for each, and ends with status 1 if a record is lost,
doubled, or rejected without a reason. Times are not measured.
"""

import argparse
import logging
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from bioscan_xla.sample import write_model, write_sample
from bioscan_xla.table.neighbours import open_table

PROCESSES = {"one process": 1, "two processes": 2, "ray": 1, "classify": 1}
_MOST_COMMITS = 8  # between a start and its kill
_END_SECONDS = 600  # within which a run opens its table, and one that is not killed ends

# Each run is a process of its own, forked from one that has loaded what takes longest and has
# opened nothing.
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    [
        "tests.bench.kill",
        "transformers.models.esm.modeling_esm",
        "bioscan_xla.embedding.run",
        "bioscan_xla.embedding.pipeline",
        "bioscan_xla.classification.run",
    ]
)
warnings.filterwarnings("ignore", "lancedb fork support")


@dataclass(frozen=True)
class Count:
    """What is in the table after so many kills.

    Attributes:
        kills: processes that were running and were killed with -9.
        rounds: times that all processes were started.
        commits: of the table, or parts of the classification.
        lost: ids that are neither in the table nor rejected.
        doubled: ids that are in the table twice, or rejected twice, or both.
        rows: of the table, or named.
    """

    kills: int
    rounds: int
    commits: int
    lost: int
    doubled: int
    rows: int


def kill_and_resume(
    folder: Path, model: str, kind: str, num_kills: int, seed: int, num_sequences: int = 1500
) -> Count:
    """Start, kill and start again until `num_kills` are done; then let the run end."""
    rng = random.Random(seed)
    source, db = folder / "many.parquet", folder / "db"
    write_sample(source, num_sequences)  # and two records that cannot be used
    kills = rounds = 0
    while True:
        rounds += 1
        running, channels = zip(
            *(_start(source, db, model, kind, i) for i in range(PROCESSES[kind])), strict=True
        )
        if kills < num_kills:
            # Some commits later, and some part of the next: wherever the machine is by then.
            seconds = [_wait(told, rng.randrange(_MOST_COMMITS)) for told in channels]
            time.sleep(rng.uniform(0, max(seconds)))
            for process in running:
                if process.is_alive() and kills < num_kills:
                    os.kill(process.pid, signal.SIGKILL)
                    kills += 1
        for process in running:
            process.join(_END_SECONDS)
            if process.exitcode not in (0, -signal.SIGKILL):
                process.kill()
                raise RuntimeError(f"{kind}, round {rounds}: ended with {process.exitcode}")
        if all(process.exitcode == 0 for process in running):
            break
    there, commits = _results(db, kind)
    num_rows = len(there)
    for path in db.glob("rejected*.parquet"):
        there += pq.read_table(path)["sequence_id"].to_pylist()
    wanted = set(pq.read_table(source)["sequence_id"].to_pylist())
    times = Counter(there)
    return Count(
        kills,
        rounds,
        commits,
        len(wanted - set(times)),
        sum(number > 1 for number in times.values()) + len(set(times) - wanted),
        num_rows,
    )


def _results(db: Path, kind: str) -> tuple[list[str], int]:
    """Ids of the results, and how many commits made them."""
    if kind == "classify":
        ids = pq.read_table(db / "classified.parquet", columns=["sequence_id"])["sequence_id"]
        return ids.to_pylist(), sum(1 for _ in (db / "commits").open())
    table = open_table(str(db))
    return table.to_arrow()["sequence_id"].to_pylist(), table.version


def _start(source: Path, db: Path, model: str, kind: str, index: int) -> tuple[Any, Connection]:
    """A run, and where it says that its table is open, and each commit."""
    ours, theirs = _FORKS.Pipe(duplex=False)
    if kind == "classify":
        process = _FORKS.Process(target=_classify, args=(theirs, str(source), str(db)))
        process.start()
        theirs.close()
        return process, ours
    options = {
        "parquet_input_path": str(source),
        "lancedb_output_path": str(db),
        "model": model,
        "process_index": index,
        "process_count": PROCESSES[kind],
        "engine": "ray" if kind == "ray" else "local",
    }
    process = _FORKS.Process(target=_embed, args=(theirs, os.environ.get("RAY_ADDRESS"), options))
    process.start()
    theirs.close()
    return process, ours


def _embed(tell: Connection, ray_address: str | None, options: dict[str, Any]) -> None:
    """The embedding command with many commits a second."""
    from bioscan_xla.embed import run_embedding_pipeline
    from bioscan_xla.reads import shares
    from bioscan_xla.table.store import Store

    if ray_address:
        os.environ["RAY_ADDRESS"] = ray_address
    logging.disable()
    shares.BLOCK_ROWS = 100
    for name in ("done", "append", "append_fragments"):
        setattr(Store, name, _told(getattr(Store, name), tell))
    run_embedding_pipeline(device="cpu", dtype="float32", commit_rows=8, **options)


def _classify(tell: Connection, source: str, output: str) -> None:
    """The classification command with small parts; its reference is the first 100 records."""
    from bioscan_xla.classification import run
    from bioscan_xla.classification.journal import Journal

    logging.disable()
    run._CHUNK_ROWS = 8
    reference = Path(output).with_name("reference.parquet")
    if not reference.exists():
        pq.write_table(pq.read_table(source).slice(0, 100), reference)

    def append(journal: Journal, rows: Any) -> None:
        whole(journal, rows)
        with open(journal.folder / "commits", "a") as file:
            file.write("x\n")
        tell.send(None)

    whole = Journal.append
    Journal.append = append  # type: ignore[method-assign]
    Journal.done = _told(Journal.done, tell)  # type: ignore[method-assign]
    from bioscan_xla import run_classification_pipeline

    run_classification_pipeline(source, str(reference), output, num_trials=0)


def _told(method: Callable[..., Any], tell: Connection) -> Callable[..., Any]:
    def told(*arguments: Any) -> Any:
        result = method(*arguments)
        tell.send(None)
        return result

    return told


def _wait(told: Connection, num_commits: int) -> float:
    """Until the table is open and so many commits are done; how long the last of these took."""
    seconds = 0.0
    for _ in range(1 + num_commits):
        began = time.monotonic()
        if not told.poll(_END_SECONDS):
            raise RuntimeError(f"neither open nor committed within {_END_SECONDS} s")
        try:
            told.recv()
        except EOFError:  # it ended before that; its status tells more
            break
        seconds = time.monotonic() - began
    return min(seconds, 1.0)


def main() -> int:
    """Print the counts; 1 if anything is lost or doubled."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--rows", type=int, default=6000)  # few enough end before the last kill
    parser.add_argument("--only", choices=PROCESSES, default="", help="one of the four")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    is_good = True
    fifth = arguments.kills // 5
    shares = (fifth, arguments.kills - 3 * fifth, fifth, fifth)
    for number, (kind, share) in enumerate(zip(PROCESSES, shares, strict=True)):
        if arguments.only not in ("", kind):
            continue
        if kind == "ray":
            import ray

            # One cluster for all drivers, as on machines that stay up. By default its workers have
            # niceness 15, and hardly move while the machine does other things.
            os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112
            os.environ["RAY_AUTH_MODE"] = "disabled"  # drivers of other processes join it
            context = ray.init(
                address="local", num_cpus=2, include_dashboard=False, _node_ip_address="127.0.0.1"
            )
            os.environ["RAY_ADDRESS"] = context.address_info["gcs_address"]
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_model(folder / "model", hidden=64, layers=2, heads=4)
            count = kill_and_resume(
                folder, str(folder / "model"), kind, share, arguments.seed + number, arguments.rows
            )
        print(
            f"{kind}: {count.kills} kills in {count.rounds} rounds, {count.commits} commits, "
            f"{count.rows} rows, {count.lost} lost, {count.doubled} doubled",
            flush=True,
        )
        is_good &= count.kills == share and not count.lost and not count.doubled
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
