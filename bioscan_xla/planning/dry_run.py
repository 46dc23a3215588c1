"""The plan of an embedding run, in words, from a part of its input: what `--dry-run` prints.

Input: sources and a model's configuration. Output: text.
Invariants: nothing is computed on the device.
"""

import itertools

import numpy as np
from transformers import EsmConfig

from ..encode.encoder import choose_reading
from ..encode.model import no_bars, read_config
from ..encode.model_files import resolve_base
from ..encode.packing import FIRST_POSITION, layout
from ..encode.runtime import open_device
from ..options import EmbedConfig
from ..reads.files import count_rows
from ..reads.inputs import expand_inputs
from .sample import pack, read_part

_BAR_CHARACTERS = 40


def describe_embedding(config: EmbedConfig) -> str:
    """Rows, token histogram, batch shapes, useful fraction, device and memory."""
    sources = expand_inputs(config.input)
    device = open_device(config.device, config.dtype)
    name, revision = resolve_base(config.model, config.revision, config.adapter)
    model = read_config(name, revision)
    max_tokens = model.max_position_embeddings - FIRST_POSITION
    frames, strands = choose_reading(model, config.adapter, config.frames, config.strands)
    shape = layout(device.kind, device.num_devices, max_tokens, model.num_hidden_layers)
    sequences, num_rejected = read_part(config, sources)
    packed = pack(sequences, shape, max_tokens, config.overlap_tokens, frames, strands)
    totals = packed.totals
    total = count_rows(sources)
    weights = count_parameters(model) * (1 if device.is_int8 else device.dtype.itemsize)
    lines = [
        f"input: {len(sources)} file(s), "
        + (f"{total:,} records" if total is not None else "records not counted yet"),
        f"looked at: {len(sequences):,} usable, {num_rejected:,} to be rejected",
        f"device: {device.kind} x {device.num_devices}, {device.dtype_name} ({device.why})",
        f"model: {name}, {model.num_hidden_layers} layers, hidden {model.hidden_size}; "
        f"weights {_size(weights)}"
        + (" on every device" if device.num_devices > 1 and not config.shard_parameters else ""),
        describe_reading(frames, strands),
        f"tokens a window (at most {max_tokens}); {totals.windowed:,} sequences need several",
        *_histogram(packed.lengths),
        (
            f"batches: rows of {' or '.join(map(str, shape.row_tokens))} tokens, "
            f"{len(totals.shapes)} program(s) to compile"
            if shape.is_static
            else f"batches: one row of up to {shape.row_tokens[0]} tokens, no padding"
        ),
        f"useful tokens: {100 * totals.useful_fraction:.1f} %",
    ]
    if total is not None:
        width = 2 if config.vector_dtype == "float16" else 4
        lines.append(f"table: about {_size(total * model.hidden_size * width)} of vectors")
    return "\n".join(lines)


def describe_reading(frames: int, strands: str) -> str:
    """Frames and strands, and what they cost, in words."""
    times = frames * (2 if strands == "both" else 1)
    cost = f"{times} times the tokens of one reading" if times > 1 else "one reading a sequence"
    return f"frames: {frames}, strands: {strands}; {cost}"


def _size(num_bytes: int) -> str:
    """Bytes in the unit that shows them as a number of at least one."""
    if num_bytes < 1 << 20:
        return f"{num_bytes / 2**10:.1f} KiB"
    if num_bytes < 1 << 30:
        return f"{num_bytes / 2**20:.1f} MiB"
    return f"{num_bytes / 2**30:.2f} GiB"


def _histogram(lengths: list[int]) -> list[str]:
    if not lengths:
        return ["  no usable sequence in what was looked at"]
    edges = [0, 32, 64, 128, 192, 256, 384, 512, 768, 1 << 30]
    counts, _ = np.histogram(lengths, edges)
    most = counts.max()
    return [
        f"  {f'{low + 1} to {high}' if high < 1 << 30 else f'over {low}':>12}  "
        f"{count:>8,}  {'#' * int(np.ceil(_BAR_CHARACTERS * count / most))}"
        for (low, high), count in zip(itertools.pairwise(edges), counts.tolist(), strict=True)
        if count
    ]


def count_parameters(model: EsmConfig) -> int:
    """Parameters of an encoder, without heads."""
    import torch
    from transformers import EsmModel

    with torch.device("meta"), no_bars():
        return sum(p.numel() for p in EsmModel(model, add_pooling_layer=False).parameters())
