"""Memory does not grow with the input: peak over 10 thousand and over 1 million rows.

`python tests/bench/memory.py` runs the product's pipeline with an encoder that costs nothing, each
size in a process of its own, and prints both peaks and their ratio.
"""

import argparse
import multiprocessing
import resource
import tempfile
from pathlib import Path

from host_path import embed_nothing, write_random


def measure(source, db, hidden, connection):
    """Embed and send the peak resident memory of this process, MiB."""
    rows = embed_nothing(source, db, "cpu", hidden)
    connection.send((rows, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))


def main():
    """Print the peaks and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs=2, default=(10_000, 1_000_000))
    parser.add_argument("--hidden", type=int, default=256)
    options = parser.parse_args()
    peaks = []
    spawn = multiprocessing.get_context("spawn")
    for rows in options.rows:
        with tempfile.TemporaryDirectory() as folder:
            source = str(Path(folder, "rows.parquet"))
            write_random(source, rows, 120, group=10_000)
            ours, theirs = spawn.Pipe()
            process = spawn.Process(
                target=measure, args=(source, str(Path(folder, "db")), options.hidden, theirs)
            )
            process.start()
            done, peak = ours.recv()
            process.join()
        peaks.append(peak)
        print(f"{done:>9,} rows: peak {peak:,.0f} MiB", flush=True)
    print(f"ratio {peaks[1] / peaks[0]:.3f}")


if __name__ == "__main__":
    main()
