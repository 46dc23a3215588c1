"""What six frames, centring and whitening do to the nearest neighbour of a model's vectors.

`python tests/bench/whitening.py FOLDER [--adapter FOLDER]`: FOLDER holds `references.parquet` and
`queries.parquet`, as `taxonomy.py --work` leaves them beside the classifier. The references are
embedded into tables, read in one frame and in six, centred and whitened by the commands; the name
of each query is that of its nearest row by `search`. A name that no reference has counts as wrong.
"""

import argparse
import tempfile
from pathlib import Path

import pyarrow.parquet as pq
from taxonomy import RANKS, shares

from bioscan_xla.embed import run_embedding_pipeline
from bioscan_xla.options import ReferenceConfig
from bioscan_xla.reference import transform
from bioscan_xla.search import search_sequences


def main():
    """Print a line for each table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--adapter", help="output folder of fine-tuning")
    parser.add_argument("--model", help="instead of an adapter's")
    options = parser.parse_args()
    references, queries = (str(options.folder / f"{n}.parquet") for n in ("references", "queries"))
    wanted = pq.read_table(queries)
    known = {"adapter": options.adapter, "model": options.model}
    known = {key: value for key, value in known.items() if value}
    print(f"{'':24}" + "".join(f"{rank:>9}" for rank in RANKS))
    with tempfile.TemporaryDirectory() as folder:
        for frames in (1, 6):
            db = f"{folder}/{frames}.db"
            run_embedding_pipeline(
                references, db, frames=frames, device="cpu", dtype="float32", **known
            )
            for action in ("center", "whiten"):
                transform(ReferenceConfig(action, db))
            for table in ("embeddings", "centered", "whitened"):
                texts = wanted["dna_sequence"].to_pylist()
                rows = search_sequences(db, texts, table=table, k=1, device="cpu")
                named = {rank: [row[rank] for row in rows] for rank in RANKS}
                line = "".join(f"{share:9.3f}" for share in shares(named, wanted))
                print(f"{f'{frames} frame(s), {table}':24}{line}", flush=True)


if __name__ == "__main__":
    main()
