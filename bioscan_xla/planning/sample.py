"""The part of an input that a plan looks at, packed as the run would pack it.

Input: options of a run. Output: its first sequences, and their batches.
Invariants: at most `MOST_SEQUENCES` sequences; nothing is computed on a device.
"""

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..encode.inference import prepare
from ..encode.packing import Batch, Layout, Packer, Totals
from ..options import EmbedConfig
from ..reads.files import metadata_schema
from ..reads.raw import read_options
from ..reads.records import read_chunks

MOST_SEQUENCES = 20_000


@dataclass(frozen=True)
class Packed:
    """Sequences as batches.

    Attributes:
        lengths: tokens of each window.
        batches: in the order of the run.
        totals: of all batches.
    """

    lengths: list[int]
    batches: list[Batch]
    totals: Totals


def read_part(
    config: EmbedConfig, sources: Sequence[str], most: int = MOST_SEQUENCES
) -> tuple[list[str], int]:
    """The first usable sequences of each file, `most` in all, and how many were rejected there."""
    reading = read_options(config)
    schema = metadata_schema(sources, reading)
    each = -(-most // len(sources))
    rejected: Counter[str] = Counter()

    def texts(source: str) -> Iterator[str]:
        for chunk in read_chunks([source], reading, schema):
            rejected.update(item.code.value for item in chunk.rejected)
            yield from chunk.sequences

    sequences: list[str] = []
    for source in sources:
        sequences += itertools.islice(texts(source), each)
    return sequences[:most], rejected.total()


def pack(
    sequences: Sequence[str],
    shape: Layout,
    max_tokens: int,
    overlap: int,
    frames: int,
    strands: str,
) -> Packed:
    """Cut sequences into windows and pack them; the options are those of `prepare`."""
    packer, totals = Packer(shape), Totals()
    job = prepare(0, None, sequences, max_tokens, overlap, frames, strands)
    totals.windowed = job.num_windowed
    batches = [*packer.add(job.windows), *packer.flush()]
    for batch in batches:
        totals.count(batch)
    return Packed([len(window) for window in job.windows], batches, totals)
