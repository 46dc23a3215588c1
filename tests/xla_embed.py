"""Run by test_runtime.py in a process of its own: embedding on an eight-device XLA mesh.

Arguments: model folder, file of sequences, file for the vectors, dtype, `sharded` or `replicated`.
Prints one JSON line of counters, read after every batch.
"""

import json
import sys
from pathlib import Path

import numpy as np

from bioscan_xla.encode import runtime
from bioscan_xla.encode.encoder import load_encoder
from bioscan_xla.encode.inference import prepare, run_jobs
from bioscan_xla.encode.packing import Totals


def main():
    model, texts, output, dtype, placement = sys.argv[1:]
    device = runtime.open_device("xla", dtype)
    encoder = load_encoder(model, device=device, shard_parameters=placement == "sharded")
    sequences = Path(texts).read_text().split("\n")
    after_pass = []
    for _ in range(3):
        totals = Totals()
        job = prepare(0, None, sequences, encoder.max_tokens, encoder.overlap_tokens)
        ((_, vectors, _),) = run_jobs(encoder, [job], totals)
        after_pass.append(runtime.counters(device))
    np.save(output, vectors)
    print(
        json.dumps(
            {
                "devices": device.num_devices,
                "after_pass": after_pass,
                "shapes": sorted(totals.shapes),
                "useful": totals.useful_fraction,
                "batches": totals.batches,
            }
        )
    )


if __name__ == "__main__":
    main()
