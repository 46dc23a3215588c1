"""How this folder was made, with the code of version 0.1.0 before its files moved into rooms.

Run from the root of that version: `python make.py FOLDER`. Kept: `reads.parquet`, `model/`,
`vectors.db/` (with a rejected record), `classifier/` (finished) and `interrupted/` (a checkpoint).
The absolute paths inside them do not exist any more; that is what the tests are about.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq

from bioscan_xla.embed import run_embedding_pipeline
from bioscan_xla.sample import simulate, write_model


def main():
    folder = Path(sys.argv[1]).resolve()
    folder.mkdir(parents=True)
    table = simulate(40, seed=5)
    short = [row for row in table.to_pylist() if len(row["dna_sequence"]) < 700][:14]
    short[3]["dna_sequence"] = "MKLVEEQPFWY" * 5  # set aside
    pq.write_table(table.from_pylist(short, schema=table.schema), folder / "reads.parquet")
    write_model(folder / "model", hidden=8, layers=1, heads=2, max_tokens=150)
    reads, model = str(folder / "reads.parquet"), str(folder / "model")
    common = {"model": model, "device": "cpu", "dtype": "float32"}
    run_embedding_pipeline(
        reads, str(folder / "vectors.db"), max_sequences=9, overlap_tokens=20, **common
    )
    options = common | {
        "train": [reads],
        "num_epochs": 2,
        "batch_size": 4,
        "eval_fraction": 0.2,
        "min_sequences": 1,
        "learning_rate": 1e-3,
    }
    for name, extra in (("classifier", {}), ("interrupted", {"TERM_AT": "4"})):
        words = json.dumps(options | {"output": str(folder / name)})
        subprocess.run(
            [sys.executable, "tests/finetune_run.py", words],
            env={**os.environ, **extra},
            check=True,
        )
    shutil.rmtree(folder / "classifier" / "checkpoints", ignore_errors=True)
    for older in sorted((folder / "interrupted" / "checkpoints").glob("step_*"))[:-1]:
        shutil.rmtree(older)
    (folder / "classifier" / "curves.png").unlink()


if __name__ == "__main__":
    main()
