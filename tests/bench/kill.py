"""Kill -9 at random moments, resume, and count what is lost and what is there twice.

`python -m tests.bench.kill --kills 100` divides the kills among one process, two processes that
share the input, and the driver of a Ray run; it prints a line for each, and ends with status 1 if a
record is lost, doubled, or set aside without a reason. Times are not measured.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from bioscan_xla.sample import write_model, write_sample
from bioscan_xla.table.neighbours import open_table

ROOT = Path(__file__).parents[2]
PROCESSES = {"one process": 1, "two processes": 2, "ray": 1}


@dataclass(frozen=True)
class Count:
    """What is in the table after so many kills.

    Attributes:
        kills: processes that were running and were killed with -9.
        rounds: times that all processes were started.
        versions: commits of the table.
        lost: ids that are neither in the table nor set aside.
        doubled: ids that are in the table twice, or set aside twice, or both.
        rows: of the table.
    """

    kills: int
    rounds: int
    versions: int
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
        running = [_start(source, db, model, kind, i) for i in range(PROCESSES[kind])]
        if kills < num_kills:
            for process in running:
                process.stderr.readline()  # its table is open; the kill comes some commits later
            time.sleep(rng.uniform(0, 0.25))
            for process in running:
                if process.poll() is None and kills < num_kills:
                    os.kill(process.pid, signal.SIGKILL)
                    kills += 1
        for process in running:
            _, errors = process.communicate(timeout=300)
            if process.returncode not in (0, -signal.SIGKILL):
                raise RuntimeError(errors)
        if all(process.returncode == 0 for process in running):
            break
    table = open_table(str(db))
    there = Counter(table.to_arrow()["sequence_id"].to_pylist())
    for path in db.glob("rejected*.parquet"):
        there.update(pq.read_table(path)["sequence_id"].to_pylist())
    wanted = pq.read_table(source)["sequence_id"].to_pylist()
    return Count(
        kills,
        rounds,
        table.version,
        len(set(wanted) - set(there)),
        sum(number > 1 for number in there.values()) + len(set(there) - set(wanted)),
        table.count_rows(),
    )


def _start(source: Path, db: Path, model: str, kind: str, index: int) -> subprocess.Popen:
    words = [source, db, model, index, PROCESSES[kind], "ray" if kind == "ray" else "local"]
    return subprocess.Popen(
        [sys.executable, "-m", "tests.embed_fast", *map(str, words)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )


def main() -> int:
    """Print the counts; 1 if anything is lost or doubled."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    is_good = True
    left = arguments.kills
    for number, kind in enumerate(PROCESSES):
        share = left // (len(PROCESSES) - number)
        left -= share
        if kind == "ray":
            import ray

            # One cluster for all drivers, as on machines that stay up.
            context = ray.init(
                address="local", num_cpus=2, include_dashboard=False, _node_ip_address="127.0.0.1"
            )
            os.environ["RAY_ADDRESS"] = context.address_info["gcs_address"]
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_model(folder / "model", hidden=64, layers=2, heads=4)
            # Enough sequences that no round comes to the end before the last kill.
            count = kill_and_resume(
                folder, str(folder / "model"), kind, share, arguments.seed + number, 6000
            )
        print(
            f"{kind}: {count.kills} kills in {count.rounds} rounds, {count.versions} commits, "
            f"{count.rows} rows, {count.lost} lost, {count.doubled} doubled",
            flush=True,
        )
        is_good &= count.kills == share and not count.lost and not count.doubled
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
