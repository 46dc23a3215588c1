"""Trace one program of embedding without computing it; `plan` runs it in a process of its own.

Arguments: folder with config.json, file to write, pooling, dtype, rows, width, segments. Leaves: a
serialized HloModuleProto. Weights are never loaded: their values do not change the program.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import EsmConfig, EsmModel

from . import attention, runtime
from .batches import FIRST_POSITION, Window, fill_rows
from .encoder import Encoder


def trace_embedding(
    config: EsmConfig, pooling: str, dtype: str, rows: int, width: int, segments: int
) -> bytes:
    """The program of embedding for one shape of batch."""
    device = runtime.open_device("xla", dtype)
    with torch.device("meta"):
        model: Any = EsmModel(config, add_pooling_layer=False)
    model.set_attn_implementation(attention.NAME)
    model = model.to(device.dtype).eval().requires_grad_(False)
    # Empty on the host first: what is made on XLA would be part of the program.
    model = model.to_empty(device="cpu").to(device.torch_device)
    max_tokens = config.max_position_embeddings - FIRST_POSITION
    encoder = Encoder(model, device, pooling, max_tokens, 0, {})
    window = Window((0, 0), np.zeros(min(width, max_tokens) - 1, np.int32))
    batch = fill_rows([[window]] * rows, rows, width, segments, with_runs=False)
    return runtime.traced_program([encoder.trace(batch)])


def main() -> None:
    """Trace and write."""
    folder, out, pooling, dtype, *shape = sys.argv[1:]
    rows, width, segments = map(int, shape)
    config = EsmConfig.from_pretrained(folder)
    Path(out).write_bytes(trace_embedding(config, pooling, dtype, rows, width, segments))


if __name__ == "__main__":
    main()
