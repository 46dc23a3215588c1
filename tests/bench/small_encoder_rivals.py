"""Other programs on the split on which the small encoder is measured.

`python tests/bench/small_encoder_rivals.py FILE.parquet ... --file NAME --seed 0 --methods sintax`
names the queries of one file of `small_encoder.py`, against the same references. All files of the
training must be given: the split and the draw of queries follow from them and the seed. A name that
no reference has counts as wrong. Methods: sintax and global (vsearch), bayes (naive Bayes as
q2-feature-classifier sets it up), with the settings of `naming.py`.
"""

import argparse
import json
import time
from pathlib import Path

import naming
import numpy as np
from small_encoder import read, shuffled, sides, split

from bioscan_xla.reads.lineages import RANKS


def main():
    """Print a line for each method."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+")
    parser.add_argument("--file", required=True, help="which of them, without .parquet")
    parser.add_argument("--methods", nargs="+", default=["sintax", "global", "bayes"])
    parser.add_argument("--queries", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("rivals-bench"))
    options = parser.parse_args()
    sequences, lineages, files = shuffled(*read(options.files))
    parts = split(sequences, lineages, options.seed)
    (found,) = (
        (references, queries)
        for file, kind, references, queries in sides(parts, files, options.queries)
        if (file, kind) == (options.file, "query")
    )
    references, queries = (
        [(f"s{n}", sequences[n], lineages[n]) for n in numbers.tolist()] for numbers in found
    )
    naming.REFERENCES = references
    for method in options.methods:
        work = options.work / f"{options.file}-{options.seed}-{method}"
        work.mkdir(parents=True, exist_ok=True)
        naming.write_fasta(work / "references.fasta", references)
        naming.write_fasta(work / "queries.fasta", queries)
        started = time.monotonic()
        if method == "bayes":
            best = naming.by_naive_bayes(queries)["best"]
        else:
            name = naming.by_sintax if method == "sintax" else naming.by_global_search
            best = name(work, queries, "1")["best"]
        line = {}
        for at, rank in enumerate(RANKS):
            pairs = [(b[at], q[2][at]) for b, q in zip(best, queries, strict=True) if q[2][at]]
            line[rank] = round(float(np.mean([_key(a) == _key(b) for a, b in pairs])), 3)
        print(
            f"{options.file} seed {options.seed}, {len(references):,} references: {method} "
            f"{json.dumps(line)} {time.monotonic() - started:.0f} s",
            flush=True,
        )


def _key(name):
    """A name as a FASTA header can hold it."""
    return name and name.replace(",", "_").replace(" ", "_")


if __name__ == "__main__":
    main()
