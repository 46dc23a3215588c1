"""Filler in the training rows of XLA, and how many programs they take; nothing is trained.

`python tests/bench/filler.py [FILE.parquet ...] [--batch-size 32] [--devices 8] [--frames 1]` lays
an epoch of each file's first 6,667 sequences (column `dna_sequence`) in rows as fine-tuning does,
and of two simulated sets: the mix of lengths that `plan` simulates, and any length from 100 to
6,000 bp alike. Prints the share of filler, the batches that outgrew the shape of their group, and
the shapes.
"""

import argparse
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from bioscan_xla.reads.cleaning import clean_sequences
from bioscan_xla.reads.tokens import tokenize
from bioscan_xla.training.batches import Augmentation, find_shapes, make_batch, plan_epoch
from bioscan_xla.training.data import Examples

MAX_TOKENS = 1000
MOST = 6667


def simulated():
    """Name and sequences of the two simulated sets."""
    rng = np.random.default_rng(0)
    spans = np.array([(658, 659), (150, 421), (900, 1801), (1801, 5995)])
    chosen = spans[rng.choice(4, MOST, p=(0.3, 0.3, 0.3, 0.1))]
    sets = {
        "mix of 150 to 5,994 bp": rng.integers(chosen[:, 0], chosen[:, 1]),
        "any of 100 to 6,000 bp": rng.integers(100, 6001, MOST),
    }
    for name, lengths in sets.items():
        yield name, ["".join(rng.choice(list("ACGT"), length)) for length in lengths.tolist()]


def report(name, sequences, options):
    """Print a line for one set."""
    examples = Examples([str(n) for n in range(len(sequences))], sequences, [])
    labels = np.zeros((len(sequences), 7), np.int64)
    num_tokens = np.diff(tokenize(sequences).offsets)
    how = {"max_tokens": MAX_TOKENS, "augmentation": Augmentation(), "seed": 0}
    how["frames"] = options.frames
    size = options.batch_size
    shapes = find_shapes(examples, num_tokens, batch_size=size, num_devices=options.devices, **how)
    used, useful, computed, grown = Counter(), 0, 0, 0
    for group, rows in plan_epoch(num_tokens, MAX_TOKENS, size, 0, 1):
        batch = make_batch(examples, labels, group, rows, shapes=shapes, epoch=1, **how).batch
        useful += batch.num_useful
        computed += batch.input_ids.size
        used[batch.input_ids.shape] += 1
        own = shapes[group]
        grown += batch.input_ids.shape != (own.rows * options.frames, own.width)
    print(
        f"{name:28} {1 - useful / computed:6.1%} filler, {grown} of {used.total()} batches grown; "
        + ", ".join(f"{rows} x {width}" for rows, width in sorted(used)),
        flush=True,
    )


def main():
    """Print a line for each set."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--frames", type=int, default=1)
    options = parser.parse_args()
    for path in options.files:
        texts = pq.read_table(path)["dna_sequence"].to_pylist()[:MOST]
        sequences, complaints, _ = clean_sequences(texts)
        usable = [text for at, text in enumerate(sequences) if at not in complaints]
        report(path.stem, usable, options)
    for name, sequences in simulated():
        report(name, sequences, options)


if __name__ == "__main__":
    main()
