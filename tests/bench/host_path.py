"""The host's share of embedding: Parquet to committed rows, with an encoder that costs nothing.

`python tests/bench/host_path.py [--rows 100000] [--layout xla]` prints rows a second. A device that
makes more vectors a second than this is kept waiting.
"""

import argparse
import functools
import resource
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from bioscan_xla.embedding.pipeline import run
from bioscan_xla.encode.packing import layout
from bioscan_xla.encode.runtime import open_device
from bioscan_xla.reads.files import metadata_schema
from bioscan_xla.reads.raw import ReadOptions
from bioscan_xla.reads.records import read_chunks
from bioscan_xla.table.rows import table_schema
from bioscan_xla.table.store import Store

FINGERPRINT = dict.fromkeys(("model", "revision", "adapter", "pooling", "dtype"), "none") | {
    "layer": "-1",
    "overlap_tokens": "100",
    "frames": "1",
    "strands": "given",
}


@dataclass(frozen=True)
class NullEncoder:
    """Has what the pipeline asks of an encoder, and computes nothing."""

    device: object
    hidden: int
    max_tokens: int = 1000
    overlap_tokens: int = 100
    pooling: str = "mean"
    frames: int = 1
    strands: str = "given"
    layout: object = None

    def encode(self, batch):
        """Ones for every segment."""
        return _ones(len(batch.input_ids), batch.num_segments, self.hidden)


# A device writes its results into pinned memory; making them anew would be the host's own work.
@functools.lru_cache(maxsize=8)
def _ones(*shape):
    return torch.ones(*shape)


def write_random(path, rows, length_bp, group=50_000):
    """A Parquet file of random sequences, written a row group at a time."""
    rng = np.random.default_rng(0)
    letters = np.frombuffer(b"ACGT", np.uint8)
    schema = pa.schema([("sequence_id", pa.string()), ("dna_sequence", pa.string())])
    with pq.ParquetWriter(path, schema) as writer:
        for first in range(0, rows, group):
            count = min(group, rows - first)
            text = letters[rng.integers(0, 4, (count, length_bp), np.uint8)].tobytes()
            offsets = pa.py_buffer(np.arange(0, (count + 1) * length_bp, length_bp, dtype=np.int32))
            sequences = pa.StringArray.from_buffers(count, offsets, pa.py_buffer(text))
            ids = pa.array([f"s{first + n}" for n in range(count)])
            writer.write_table(pa.table([ids, sequences], schema=schema))


def embed_nothing(source, db, kind, hidden, commit_rows=10_000):
    """Run the product's pipeline with the null encoder; rows committed."""
    device = replace(open_device("cpu", "float32"), num_devices=8)
    encoder = NullEncoder(device, hidden, layout=layout(kind, 8, 1000))
    reading = ReadOptions(chunk_rows={"cpu": 1024, "xla": 16384}[kind])
    schema = metadata_schema([source], reading)
    store = Store.open(db, "embeddings", table_schema(hidden, "float16", schema, True, FINGERPRINT))
    chunks = read_chunks([source], reading, schema, done=store.done().rows, known_ids=store.ids())
    outcome = run(encoder, store, chunks, commit_rows=commit_rows, commit_seconds=1800)
    return outcome.embedded


def main():
    """Print rows a second."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=60_000)
    parser.add_argument("--length-bp", type=int, default=650)
    parser.add_argument("--hidden", type=int, default=2560)
    parser.add_argument("--layout", choices=("cpu", "xla"), default="xla")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = str(Path(folder, "rows.parquet"))
        write_random(source, options.rows, options.length_bp)
        start = time.perf_counter()
        rows = embed_nothing(source, str(Path(folder, "db")), options.layout, options.hidden)
        seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"layout {options.layout}, {options.length_bp} bp, hidden {options.hidden}: {rows:,} rows "
        f"in {seconds:.1f} s, {rows / seconds:,.0f} rows/s, peak memory {peak:.2f} GiB, "
        f"{torch.get_num_threads()} threads"
    )


if __name__ == "__main__":
    main()
