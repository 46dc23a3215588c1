"""Run by test_serve_process.py in a process of its own: requests to a server on an XLA mesh.

Arguments: model folder, file of sequences, file for the vectors. Prints one JSON line of counters,
read when the server is ready and after its requests.
"""

import json
import sys
from pathlib import Path

import numpy as np

from bioscan_xla.encode import runtime
from tests.serving import running


def main():
    model, texts, output = sys.argv[1:]
    sequences = Path(texts).read_text().split("\n")
    with running(model=model, device="xla") as it:
        device = it.service.versions.find(None).encoder.device
        counted = [runtime.counters(device)]
        vectors = []
        for part in (sequences[:1], sequences[1:]):
            data = it.post("embeddings", input=part).json()["data"]
            vectors += [item["embedding"] for item in data]
        counted.append(runtime.counters(device))
    np.save(output, np.array(vectors))
    print(json.dumps({"kind": device.kind, "counted": counted}))


if __name__ == "__main__":
    main()
