"""Two checkouts of the package side by side: the same vectors, and at what speed.

`python tests/bench/versions.py OLD NEW [--layers 4] [--hidden 512]`: each checkout gets a process
that loads one model of random weights, with the options of Nucleotide Transformer, and embeds the
same sequences again and again, in turn with the other, in changing order. Printed are the largest
difference between the vectors and, over the rounds, the median of new time over old time.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

_WORKER = """
import sys, time
import numpy as np
from bioscan_xla.encode.encoder import load_encoder
from bioscan_xla.encode.inference import embed_sequences
from bioscan_xla.encode.runtime import open_device

model, dtype, texts, out = sys.argv[1:]
sequences = open(texts).read().split()
encoder = load_encoder(model, device=open_device("cpu", dtype))
np.save(out, embed_sequences(encoder, sequences))
print("ready", flush=True)
for line in sys.stdin:
    started = time.process_time()
    embed_sequences(encoder, sequences)
    print(time.process_time() - started, flush=True)
"""


def main():
    """Print the difference and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkouts", nargs=2, type=Path, help="the old one, the new one")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--sequences", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run(options, Path(folder))


def run(options, folder):
    """Start the two processes and let them embed in turn."""
    from bioscan_xla.sample import write_model

    write_model(folder / "model", hidden=options.hidden, layers=options.layers, heads=8)
    rng = np.random.default_rng(0)
    lengths = rng.choice([170, 313, 658, 1500, 5990, 7000], options.sequences)
    texts = folder / "texts"
    texts.write_text("\n".join("".join(rng.choice(list("ACGT"), n)) for n in lengths))
    workers = []
    for number, checkout in enumerate(options.checkouts):
        words = [sys.executable, "-c", _WORKER, folder / "model", options.dtype, texts]
        workers.append(
            subprocess.Popen(
                [*map(str, words), str(folder / f"{number}.npy")],
                env={**os.environ, "PYTHONPATH": str(checkout.resolve())},
                cwd=folder,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
    for worker in workers:
        assert worker.stdout.readline().strip() == "ready"
    old, new = (np.load(folder / f"{number}.npy") for number in range(2))
    seconds = np.zeros((options.rounds, 2))
    for at in range(options.rounds):
        for number in (0, 1) if at % 2 else (1, 0):
            workers[number].stdin.write("again\n")
            workers[number].stdin.flush()
            seconds[at, number] = float(workers[number].stdout.readline())
    for worker in workers:
        worker.stdin.close()
        worker.wait()
    ratios = seconds[:, 1] / seconds[:, 0]
    low, middle, high = np.percentile(ratios, [25, 50, 75])
    print(
        f"{options.layers} layers of {options.hidden}, {options.dtype}, {len(lengths)} sequences: "
        f"largest difference {np.abs(old - new).max():g}; new over old, CPU time, "
        f"{options.rounds} rounds: median {middle:.4f} (quartiles {low:.4f}, {high:.4f})"
    )


if __name__ == "__main__":
    main()
