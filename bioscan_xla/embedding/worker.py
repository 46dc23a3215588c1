"""Runs on the machines of a Ray cluster: one encoder on one device, in its own process.

Input: chunks of records. Output: Lance fragments that no version of the table refers to yet, and
their description for the driver. Invariants: nothing here depends on Ray.
"""

import os
import platform
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from transformers import EsmConfig

from ..encode import runtime
from ..encode.encoder import Encoder, load_encoder
from ..encode.inference import prepare_for, run_jobs
from ..encode.packing import Totals
from ..reads.records import Chunk
from ..table.rows import write_fragments
from .pipeline import make_part, sample_norms
from .threads import Part


@dataclass(frozen=True)
class Description:
    """What a worker says of itself once its model is loaded."""

    host: str
    process: int
    hidden: int
    fingerprint: dict[str, str]
    config: EsmConfig
    layers: int
    peak_flops: float | None


@dataclass(frozen=True)
class Computed:
    """A chunk that a worker is done with; `part` holds fragments."""

    part: Part
    norms: np.ndarray
    totals: Totals
    compiles: int


class Worker:
    """One encoder on one device, in its own process."""

    def __init__(self, device: str, dtype: str | None, threads: int, model: Mapping[str, Any]):
        """Only keeps the options: an error in here would reach the driver without its type.

        Args:
            device: `xla`, `cuda` or `cpu`.
            dtype: see `runtime.open_device`.
            threads: of torch, at most; OMP_NUM_THREADS may ask for fewer.
            model: keywords of `load_encoder`.
        """
        self._options = device, dtype, threads, model
        self._encoder: Encoder | None = None
        self._stop = threading.Event()
        # Calls come on several threads, and the device is used from one.
        self._thread = ThreadPoolExecutor(1)

    def describe(self) -> Description:
        """Load the model and say what it is."""
        encoder = self._thread.submit(self._load).result()
        config = encoder.model.config
        return Description(
            platform.node(),
            os.getpid(),
            encoder.hidden,
            encoder.fingerprint,
            config,
            len(encoder.model.encoder.layer),
            self._thread.submit(runtime.peak_flops, encoder.device).result(),
        )

    def embed(self, chunk: Chunk, location: str, schema: pa.Schema) -> Computed:
        """Compute a chunk and write its rows as fragments of the table at `location`."""
        encoder = self._thread.submit(self._load).result()
        job = prepare_for(encoder, 0, chunk, chunk.sequences)
        totals = Totals()

        def compute() -> list[tuple[Chunk, np.ndarray, np.ndarray]]:
            return list(run_jobs(encoder, [job], totals, self._stop.is_set))

        ((_, vectors, ready),) = self._thread.submit(compute).result()
        made = make_part(chunk, vectors, ready, schema)
        fragments = write_fragments(location, made.rows, schema) if made.rows else []
        part = Part(fragments, made.num_rows, made.rejected)
        return Computed(part, sample_norms(vectors, ready), totals, encoder.compiles)

    def stop(self) -> None:
        """Finish the batch on the device and start no other."""
        self._stop.set()

    def _load(self) -> Encoder:
        if self._encoder is None:
            device, dtype, threads, model = self._options
            # Ray sets it to the worker's share of the cores, if nobody else has set it.
            torch.set_num_threads(min(threads, int(os.environ.get("OMP_NUM_THREADS", threads))))
            self._encoder = load_encoder(device=runtime.open_device(device, dtype), **model)
        return self._encoder
