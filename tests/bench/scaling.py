"""Two Ray workers against one on this machine, one thread each, in turn in one run.

`python tests/bench/scaling.py [--rows 600] [--rounds 3]` prints sequences a second of each and the
ratio; 2 is perfect. Only the time between the first chunk and the last commit counts, so that the
start of Ray and the loading of the model, which happen once a run, do not.
"""

import argparse
import contextlib
import io
import os
import statistics
import tempfile
import warnings
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch, here and in what is started from here
os.environ.setdefault("RAY_worker_niceness", "0")  # 15 otherwise: behind all else that runs

import ray
from host_path import write_random

from bioscan_xla.embed import run_embedding_pipeline
from bioscan_xla.embedding import cluster
from bioscan_xla.sample import write_model
from bioscan_xla.table.store import Store


def measure(source, model, db, workers, chunk_rows, dtype):
    """Sequences a second of one run."""
    started = cluster.Workers.load

    def load_all(self, *words, **options):
        """Wait for every worker, not the first alone."""
        started(self, *words, **options)
        while not all(member.ready for member in self._members):
            self._collect(None)
        return self

    cluster.Workers.load = load_all
    try:
        result = run_embedding_pipeline(
            source,
            db,
            model=model,
            engine="ray",
            workers=workers,
            device="cpu",
            dtype=dtype,
            commit_rows=chunk_rows,
        )
    finally:
        cluster.Workers.load = started
    return result["sequences_per_second"]


def main():
    """Print the rates and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--length-bp", type=int, default=650)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--chunk-rows", type=int, default=25)
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    rates = {1: [], 2: []}
    warnings.filterwarnings("ignore", "lancedb fork support")
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        _node_ip_address="127.0.0.1",
        log_to_driver=False,
    )
    # One CPU of the cluster is one core and one thread, however many workers there are.
    cluster._resources = one_core_each
    Store.finish = lambda *_: None  # the indexes, which come once at the end
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        source, model = str(Path(folder, "rows.parquet")), str(Path(folder, "model"))
        write_random(source, options.rows, options.length_bp)
        write_model(model, hidden=options.hidden, layers=options.layers, heads=8)
        for number in range(options.rounds):
            for workers in (1, 2) if number % 2 == 0 else (2, 1):
                db = str(Path(folder, f"db-{number}-{workers}"))
                rate = measure(source, model, db, workers, options.chunk_rows, options.dtype)
                rates[workers].append(rate)
                print(f"{workers} workers: {rate:.2f} sequences/s", flush=True)
    ray.shutdown()
    ratios = [two / one for one, two in zip(rates[1], rates[2], strict=True)]
    print(
        f"2 workers against 1: {statistics.median(ratios):.2f} times "
        f"({min(ratios):.2f} to {max(ratios):.2f}), efficiency "
        f"{statistics.median(ratios) / 2:.2f}; {options.layers} layers of {options.hidden}, "
        f"{options.dtype}, {options.rows} sequences of {options.length_bp} bp"
    )


def one_core_each(device, count):
    """In place of dividing the machine's cores among the workers."""
    return device, {"num_cpus": 1}, 1, count


if __name__ == "__main__":
    main()
