"""Memory does not grow with the input: peak over 10 thousand rows and over 1 million.

`python tests/bench/memory.py` embeds with an encoder that costs nothing, `... memory.py classify`
names 200 bp reads of 200 references by shared 8-mers. Each size runs in a process of its own; the
script prints both peaks and their ratio.
"""

import argparse
import multiprocessing
import resource
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from host_path import embed_nothing, write_random

from bioscan_xla.reads.lineages import RANKS

_NUM_REFERENCES = 200
_LENGTH_BP = 200


def embed(source, folder, hidden):
    """Embed; returns the number of rows."""
    return embed_nothing(source, str(Path(folder, "db")), "cpu", hidden)


def classify(source, folder, hidden):
    """Name the rows of a file; returns how many there are."""
    from bioscan_xla import run_classification_pipeline

    reference = str(Path(folder, "reference.parquet"))
    texts = [row.tobytes().decode() for row in _references()]
    columns = {"sequence_id": [f"r{at}" for at in range(_NUM_REFERENCES)], "dna_sequence": texts}
    for depth, rank in enumerate(RANKS):
        columns[rank] = [_name(at % 2 ** (1 + depth)) for at in range(_NUM_REFERENCES)]
    pq.write_table(pa.table(columns), reference)
    result = run_classification_pipeline(source, reference, str(Path(folder, "named")))
    return result["classified"]


def _references():
    letters = np.frombuffer(b"ACGT", np.uint8)
    return letters[np.random.default_rng(1).integers(0, 4, (_NUM_REFERENCES, _LENGTH_BP))]


def _name(number):
    """A name without digits, which would count as none."""
    return "Taxon" + "".join(chr(97 + int(digit)) for digit in str(number))


def write_reads_of_references(path, rows, group=10_000):
    """A Parquet file of references with one base in ten drawn anew."""
    rng = np.random.default_rng(2)
    letters = np.frombuffer(b"ACGT", np.uint8)
    schema = pa.schema([("sequence_id", pa.string()), ("dna_sequence", pa.string())])
    with pq.ParquetWriter(path, schema) as writer:
        for first in range(0, rows, group):
            reads = _references()[rng.integers(0, _NUM_REFERENCES, min(group, rows - first))]
            drawn = rng.random(reads.shape) < 0.1
            reads[drawn] = letters[rng.integers(0, 4, int(drawn.sum()))]
            names = [f"s{at}" for at in range(first, first + len(reads))]
            texts = [row.tobytes().decode() for row in reads]
            writer.write_table(pa.table([names, texts], schema=schema))


def measure(work, source, folder, hidden, connection):
    """Work and send the peak resident memory of this process, MiB."""
    rows = work(source, folder, hidden)
    connection.send((rows, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))


def main():
    """Print the peaks and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", choices=("embed", "classify"), nargs="?", default="embed")
    parser.add_argument("--rows", type=int, nargs=2, default=(10_000, 1_000_000))
    parser.add_argument("--hidden", type=int, default=256)
    options = parser.parse_args()
    work = {"embed": embed, "classify": classify}[options.work]
    peaks = []
    spawn = multiprocessing.get_context("spawn")
    for rows in options.rows:
        with tempfile.TemporaryDirectory() as folder:
            source = str(Path(folder, "rows.parquet"))
            if options.work == "embed":
                write_random(source, rows, 120, group=10_000)
            else:
                write_reads_of_references(source, rows)
            ours, theirs = spawn.Pipe()
            process = spawn.Process(
                target=measure, args=(work, source, folder, options.hidden, theirs)
            )
            process.start()
            theirs.close()  # so that recv ends if the process does
            done, peak = ours.recv()
            process.join()
        peaks.append(peak)
        print(f"{done:>9,} rows: peak {peak:,.0f} MiB", flush=True)
    print(f"ratio {peaks[1] / peaks[0]:.3f}")


if __name__ == "__main__":
    main()
