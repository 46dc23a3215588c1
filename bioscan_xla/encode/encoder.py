"""The encoder: an ESM model on a device, and packed rows through it.

Input: a model id or folder, and `Batch` records. Output: one float32 vector per segment, still on
the device. Invariants: the vectors are those of Hugging Face's EsmModel, attention stays inside a
segment, and no step waits for the device.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import EsmModel

from .. import __version__
from ..errors import ConfigError, ModelError
from ..options import DEFAULT_MODEL
from ..reads.tokens import VOCABULARY, tokenize
from . import runtime
from .fingerprint import TOKENIZER, VECTORS_VERSION, compare
from .int8 import quantize, random_sequences
from .model import (
    hash_weights,
    is_bag,
    load_model,
    merge_adapter,
    read_config,
    sample_hash,
    token_states,
)
from .model_files import absolute, adapter_reading, resolve_base, resolve_commit
from .onednn import fast_float32, reorder_linear_layers
from .packing import (
    FIRST_POSITION,
    FRAMES,
    STRANDS,
    Batch,
    Layout,
    Totals,
    Window,
    fill_rows,
    layout,
)
from .pooling import POOLINGS, mean_of_rows, pool
from .runtime import Device
from .sending import send_back
from .transform import Transform, load_transform

log = logging.getLogger(__name__)

SAMPLE = 16
"""Sequences on which int8 is measured."""
_SAMPLE_TOKENS = 256  # the most tokens of each


@dataclass(frozen=True)
class Encoder:
    """A loaded model with its pooling.

    Attributes:
        model: the EsmModel, on the device, in evaluation mode.
        device: where it runs.
        pooling: see `pooling.pool`.
        max_tokens: the longest window, `<cls>` included.
        overlap_tokens: tokens that neighbouring windows of a long sequence share.
        fingerprint: all that decides what a vector is, as strings.
        frames: reading frames that a vector averages over; see `packing.readings`.
        strands: `given` or `both`.
        token_vectors: (vocabulary, hidden) float32 if a token's state depends only on the token,
            so that a vector is a mean over its rows; else None.
        transform: of the vectors, once the mean over windows is taken; None for none.
    """

    model: EsmModel
    device: Device
    pooling: str
    max_tokens: int
    overlap_tokens: int
    fingerprint: dict[str, str]
    frames: int = 1
    strands: str = "given"
    token_vectors: torch.Tensor | None = None
    transform: Transform | None = None

    @property
    def layout(self) -> Layout:
        """How rows are shaped for the device."""
        num_layers = 0 if self.token_vectors is not None else 1
        return layout(self.device.kind, self.device.num_devices, self.max_tokens, num_layers)

    @property
    def hidden(self) -> int:
        """Length of a vector."""
        return self.model.config.hidden_size

    @property
    def compiles(self) -> int:
        """Programs compiled so far."""
        return runtime.counters(self.device)["compiles"]

    def flops(self, tokens: int, squared: int) -> float:
        """Floating-point operations of a forward pass; see `forward_flops`."""
        return forward_flops(self.model.config, len(self.model.encoder.layer), tokens, squared)

    def utilisation(self, totals: Totals, seconds: float) -> float | None:
        """Model FLOP/s over the device's peak, counting only real tokens; None if unknown."""
        peak = runtime.peak_flops(self.device)
        return (
            self.flops(totals.useful_tokens, totals.squared_tokens) / seconds / peak
            if peak
            else None
        )

    def encode(self, batch: Batch) -> Any:
        """Start computing a batch: (rows, num_segments, hidden) float32, on the device."""
        return send_back(self.device, self.trace(batch))

    @torch.no_grad()
    def trace(self, batch: Batch) -> torch.Tensor:
        """What `encode` computes; on XLA, computation has not started."""
        if self.token_vectors is not None:
            ids, positions = (torch.from_numpy(a) for a in (batch.input_ids, batch.positions))
            return mean_of_rows(self.token_vectors, ids, positions, FIRST_POSITION)
        ids, positions, segments = (
            runtime.put(self.device, array)
            for array in (batch.input_ids, batch.positions, batch.segments)
        )
        states = self.model(
            input_ids=ids, position_ids=positions, segments=segments, runs=batch.runs
        ).last_hidden_state
        return pool(states, positions, segments, batch.num_segments, self.pooling, FIRST_POSITION)


def find_token_vectors(esm: EsmModel, device: Device, pooling: str) -> torch.Tensor | None:
    """State of every token, for a model in which it depends only on the token.

    None for other models, for poolings other than the mean over all tokens, and for devices
    where the ordinary computation is as fast.
    """
    if device.kind != "cpu" or pooling != "mean" or not is_bag(esm):
        return None
    with torch.no_grad():
        return token_states(esm, len(VOCABULARY))


def forward_flops(config: Any, layers: int, tokens: int, squared: int) -> float:
    """Floating-point operations of an encoder's forward pass.

    Args:
        config: of the model.
        layers: how many of them are computed.
        tokens: number of real tokens.
        squared: sum over windows of their token count squared (attention's scores).
    """
    linear = 8 * config.hidden_size**2 + 4 * config.hidden_size * config.intermediate_size
    return layers * (float(tokens) * linear + 4.0 * config.hidden_size * squared)


def check_options(config: Any, layer: int, overlap_tokens: int) -> int:
    """The model's longest window in tokens; ConfigError for options that it does not support."""
    max_tokens = config.max_position_embeddings - FIRST_POSITION
    if not 0 <= overlap_tokens < (max_tokens - 1) // 2 + 1:
        raise ConfigError(
            f"overlap_tokens {overlap_tokens} must lie between 0 and {(max_tokens - 1) // 2}"
        )
    if not -1 <= layer <= config.num_hidden_layers:
        raise ConfigError(f"layer {layer} must lie between -1 and {config.num_hidden_layers}")
    return max_tokens


def choose_reading(
    config: Any, adapter: str | None, frames: int | None, strands: str | None
) -> tuple[int, str]:
    """Frames and strands: as requested, else as for the adapter's training, else the model's."""
    trained = adapter_reading(adapter) if adapter else {}
    frames = frames or trained.get("frames") or getattr(config, "frames", 1)
    strands = strands or trained.get("strands") or getattr(config, "strands", "given")
    if frames not in FRAMES or strands not in STRANDS:
        raise ConfigError(
            f"frames {frames!r} and strands {strands!r}: choose 1 or 6, and given or both"
        )
    return int(frames), str(strands)


def load_encoder(
    model: str = DEFAULT_MODEL,
    *,
    device: Device,
    revision: str | None = None,
    adapter: str | None = None,
    pooling: str = "mean",
    layer: int = -1,
    overlap_tokens: int = 100,
    frames: int | None = None,
    strands: str | None = None,
    transform: str | None = None,
    shard_parameters: bool = False,
    on_device: Callable[[Callable[[], None]], None] = lambda move: move(),
    sample: Sequence[str] = (),
) -> Encoder:
    """Load a model for inference.

    Args:
        model: Hugging Face id or local folder of an ESM model with the 6-mer vocabulary.
        device: an opened device.
        revision: commit of a hub model; None uses the hub's current one.
        adapter: folder or id of a PEFT adapter; it is merged into the weights.
        pooling: `mean`, `mean_no_special`, `cls` or `max`.
        layer: which hidden state is pooled: -1 the last, 0 the embeddings, k the output of
            layer k (numbered as Hugging Face's `hidden_states`).
        overlap_tokens: tokens that neighbouring windows of a long sequence share.
        frames: 1 or 6, see `packing.readings`; None uses those of the adapter's training, or those
            in the model's configuration.
        strands: `given` or `both`; None likewise.
        transform: file of a centring or whitening, as a transformed table has it.
        shard_parameters: on XLA, divide the weights over the mesh instead of replicating them.
        on_device: calls what moves the weights, where one thread owns the device and this is
            another.
        sample: in int8, cleaned sequences on which the cosine to float32 is measured; random ones
            if none are given.

    Raises:
        ModelError: not found, of another family, or only loadable by running code from the hub.
        ConfigError: unknown pooling, no such layer, too large an overlap, or too low a cosine.
    """
    if pooling not in POOLINGS:
        raise ConfigError(f"pooling {pooling!r} is unknown; choose one of {', '.join(POOLINGS)}")
    model, revision = resolve_base(model, revision, adapter)
    config = read_config(model, revision)
    max_tokens = check_options(config, layer, overlap_tokens)
    frames, strands = choose_reading(config, adapter, frames, strands)
    commit = resolve_commit(model, revision)
    esm: Any = load_model(model, device.dtype, commit or None)
    fingerprint = {
        "model": absolute(model),
        "revision": commit,
        "weights": sample_hash(esm),
        "weights_sha256": hash_weights(esm),
        "adapter": "",
        "adapter_hash": "",
        "adapter_sha256": "",
        "tokenizer": TOKENIZER,
        "pooling": pooling,
        "layer": str(layer),
        "dtype": device.dtype_name,
        "max_tokens": str(max_tokens),
        "overlap_tokens": str(overlap_tokens),
        "frames": str(frames),
        "strands": strands,
        "vectors": VECTORS_VERSION,
        "version": __version__.split("+")[0],
    }
    if adapter:
        esm, adapter_sha256 = merge_adapter(esm, adapter)
        fingerprint |= {
            "adapter": absolute(adapter),
            "adapter_hash": sample_hash(esm),
            "adapter_sha256": adapter_sha256,
        }
    if layer not in (-1, config.num_hidden_layers):
        esm.encoder.layer = esm.encoder.layer[:layer]
        esm.encoder.emb_layer_norm_after = None
    esm.to(dtype=device.dtype).eval().requires_grad_(False)
    if device.kind == "cpu":
        runtime.keep_large_buffers()
        if not device.is_int8:
            reorder_linear_layers(esm)
    else:

        def move() -> None:
            esm.to(device=device.torch_device)
            if shard_parameters:
                runtime.shard_parameters(device, esm)

        on_device(move)
    log.info("model %s: %d layers, hidden %d", model, len(esm.encoder.layer), config.hidden_size)
    token_vectors = find_token_vectors(esm, device, pooling)
    encoder = Encoder(
        esm,
        device,
        pooling,
        max_tokens,
        overlap_tokens,
        fingerprint,
        frames,
        strands,
        token_vectors,
    )
    if device.is_int8:
        measured_on = sample[:SAMPLE] or random_sequences()
        with fast_float32(device.kind):
            cosine = quantize(esm, lambda texts: _embed_row(encoder, texts), measured_on)
        fingerprint["int8_cosine"] = f"{cosine:.5f}"
        kind = "sequences of the input" if sample else "random sequences"
        log.info("int8: least cosine to float32 %.5f, on %d %s", cosine, len(measured_on), kind)
    return with_transform(encoder, transform) if transform else encoder


def _embed_row(encoder: Encoder, sequences: Sequence[str]) -> torch.Tensor:
    """Vectors of the beginning of each sequence, in one row, (sequences, hidden)."""
    most = min(encoder.max_tokens, _SAMPLE_TOKENS)
    tokens = [ids[:most] for ids in tokenize(sequences)]
    windows = [Window((0, number), ids[1:]) for number, ids in enumerate(tokens)]
    row = fill_rows([windows], 1, sum(map(len, windows)), len(windows), with_runs=True)
    return encoder.trace(row)[0]


def with_transform(encoder: Encoder, path: str | None) -> Encoder:
    """The encoder followed by a transform from a file, in place of its own; by none without one.

    Raises:
        ModelError: the file is missing or damaged, or is for vectors of another length.
    """
    plain = {
        key: value
        for key, value in encoder.fingerprint.items()
        if key not in ("transform", "transform_file")
    }
    if path is None:
        return replace(encoder, transform=None, fingerprint=plain)
    loaded = load_transform(path)
    if len(loaded.mean) != encoder.hidden:
        raise ModelError(
            f"{path}: fitted to vectors of {len(loaded.mean)} numbers, the model gives "
            f"{encoder.hidden}; take the model that made the table"
        )
    marks = {"transform": loaded.mark, "transform_file": path}
    return replace(encoder, transform=loaded, fingerprint=plain | marks)


def transformed_alike(encoder: Encoder, made_by: Mapping[str, str]) -> Encoder:
    """The encoder with the transform of a table, if it is otherwise the one that made the table."""
    plain = {key: value for key, value in made_by.items() if key != "transform"}
    if "transform" not in made_by or compare(plain, encoder.fingerprint).different:
        return encoder
    return with_transform(encoder, made_by["transform_file"])
