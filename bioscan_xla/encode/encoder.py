"""The encoder: loads an ESM model and runs packed rows through it.

Enters: a model id or folder, and `Batch` records. Leaves: one float32 vector a segment, still on
the device. Guaranteed: Hugging Face's own EsmModel computes it, attention stays inside a
segment, nothing that could run code is unpickled, and no step waits for the device.
"""

import hashlib
import json
import logging
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import EsmConfig, EsmModel
from transformers.utils.hub import cached_file, extract_commit_hash

from .. import __version__
from ..errors import ConfigError, ModelError
from ..reads.tokens import VOCABULARY
from . import attention, runtime
from .onednn import reorder_linear_layers
from .packing import FIRST_POSITION, Batch, Totals
from .pooling import POOLINGS, pool
from .runtime import Device

log = logging.getLogger(__name__)

DEFAULT_MODEL = "InstaDeepAI/nucleotide-transformer-2.5b-multi-species"


@dataclass(frozen=True)
class Encoder:
    """A loaded model with its way of pooling.

    Attributes:
        model: the EsmModel, on the device, in evaluation mode.
        device: where it runs.
        pooling: see `pooling.pool`.
        max_tokens: the longest window, `<cls>` included.
        overlap_tokens: tokens that neighbouring windows of a long sequence share.
        fingerprint: all that decides what a vector is, as strings.
    """

    model: EsmModel
    device: Device
    pooling: str
    max_tokens: int
    overlap_tokens: int
    fingerprint: dict[str, str]

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

    def encode(self, batch: Batch) -> torch.Tensor:
        """Start computing a batch: (rows, num_segments, hidden) float32, on the device."""
        return runtime.launch(self.device, self.trace(batch))

    @torch.no_grad()
    def trace(self, batch: Batch) -> torch.Tensor:
        """What `encode` computes, on XLA not yet begun."""
        ids, positions, segments = (
            runtime.put(self.device, array)
            for array in (batch.input_ids, batch.positions, batch.segments)
        )
        states = self.model(
            input_ids=ids, position_ids=positions, segments=segments, runs=batch.runs
        ).last_hidden_state
        return pool(states, positions, segments, batch.num_segments, self.pooling, FIRST_POSITION)


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
    """The model's longest window in tokens; ConfigError for options that it cannot follow."""
    max_tokens = config.max_position_embeddings - FIRST_POSITION
    if not 0 <= overlap_tokens < (max_tokens - 1) // 2 + 1:
        raise ConfigError(
            f"overlap_tokens {overlap_tokens} must lie between 0 and {(max_tokens - 1) // 2}"
        )
    if not -1 <= layer <= config.num_hidden_layers:
        raise ConfigError(f"layer {layer} must lie between -1 and {config.num_hidden_layers}")
    return max_tokens


def load_encoder(
    model: str = DEFAULT_MODEL,
    *,
    device: Device,
    revision: str | None = None,
    adapter: str | None = None,
    pooling: str = "mean",
    layer: int = -1,
    overlap_tokens: int = 100,
    shard_parameters: bool = False,
) -> Encoder:
    """Load a model for inference.

    Args:
        model: Hugging Face id or local folder of an ESM model with the 6-mer vocabulary.
        device: an opened device.
        revision: commit of a hub model; None takes the hub's current one.
        adapter: folder or id of a PEFT adapter; it is merged into the weights.
        pooling: `mean`, `mean_no_special`, `cls` or `max`.
        layer: which hidden state is pooled: -1 the last, 0 the embeddings, k the output of
            layer k (numbered as Hugging Face's `hidden_states`).
        overlap_tokens: tokens that neighbouring windows of a long sequence share.
        shard_parameters: on XLA, divide the weights over the mesh instead of replicating them.

    Raises:
        ModelError: not found, another family, or only loadable by running code from the hub.
        ConfigError: unknown pooling, no such layer, an overlap that leaves no progress.
    """
    if pooling not in POOLINGS:
        raise ConfigError(f"pooling {pooling!r} is unknown; choose one of {', '.join(POOLINGS)}")
    config = read_config(model, revision)
    max_tokens = check_options(config, layer, overlap_tokens)
    commit = resolve_commit(model, revision)
    esm: Any = load_model(model, device.dtype, commit or None)
    fingerprint = {
        "model": _absolute(model),
        "revision": commit,
        "weights": _sample_hash(esm),
        "adapter": "",
        "adapter_hash": "",
        "tokenizer": "6-mer-4105",
        "pooling": pooling,
        "layer": str(layer),
        "dtype": device.dtype_name,
        "max_tokens": str(max_tokens),
        "overlap_tokens": str(overlap_tokens),
        "version": __version__.split("+")[0],
    }
    if adapter:
        esm = _merge_adapter(esm, adapter)
        fingerprint |= {"adapter": _absolute(adapter), "adapter_hash": _sample_hash(esm)}
    if layer not in (-1, config.num_hidden_layers):
        esm.encoder.layer = esm.encoder.layer[:layer]
        esm.encoder.emb_layer_norm_after = None
    esm.to(dtype=device.dtype).eval().requires_grad_(False)
    if device.kind == "cpu":
        runtime.keep_large_buffers()
        reorder_linear_layers(esm)
    else:
        esm.to(device=device.torch_device)
        if shard_parameters:
            runtime.shard_parameters(device, esm)
    log.info("model %s: %d layers, hidden %d", model, len(esm.encoder.layer), config.hidden_size)
    return Encoder(esm, device, pooling, max_tokens, overlap_tokens, fingerprint)


def load_model(model: str, dtype: torch.dtype, revision: str | None = None) -> EsmModel:
    """Load an EsmModel that attends by packed segments (see `attention`), on the host.

    Raises:
        ModelError: not found, another family, incomplete, or only loadable by running code.
    """
    esm = _load_weights(model, revision, read_config(model, revision), dtype)
    esm.set_attn_implementation(attention.NAME)
    return esm


def _absolute(name: str) -> str:
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def read_config(model: str, revision: str | None) -> EsmConfig:
    """Read a model's configuration and check that its family is supported; ModelError if not."""
    folder = Path(model)
    if not folder.is_dir() and len(folder.parts) > 1 and folder.parent.is_dir():
        raise ModelError(f"{model}: there is no such folder; check the path")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ModelError(f"{model}: has no config.json; name the folder that holds the model")
    try:
        raw, _ = EsmConfig.get_config_dict(model, revision=revision)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model {model!r} is no folder here and could not be had from the hub; check the id "
            "and the network (for a private model, HF_TOKEN), or download it elsewhere and pass "
            "its folder as --model FOLDER"
        ) from error
    if raw.get("auto_map"):
        raise ModelError(
            f"model {model!r} can only be loaded by running code from its repository, which is "
            "refused; take a Nucleotide Transformer of version 1"
        )
    if raw.get("model_type") != "esm" or raw.get("vocab_size") != len(VOCABULARY):
        raise ModelError(
            f"model {model!r} is {raw.get('model_type')!r} with {raw.get('vocab_size')} tokens; "
            f"needed is 'esm' with the {len(VOCABULARY)} tokens of Nucleotide Transformer version 1"
        )
    if raw.get("position_embedding_type", "absolute") != "absolute":
        raise ModelError(
            f"model {model!r} has {raw['position_embedding_type']} positions; needed are the "
            "absolute ones of Nucleotide Transformer version 1"
        )
    return EsmConfig.from_dict(raw)


def adapter_base(adapter: str) -> str | None:
    """The model that a LoRA folder was trained on; None where it does not say."""
    for folder in (Path(adapter) / "adapter", Path(adapter)):  # the first is fine-tuning's output
        path = folder / "adapter_config.json"
        if path.is_file():
            return json.loads(path.read_text()).get("base_model_name_or_path") or None
    return None


def resolve_commit(model: str, revision: str | None) -> str:
    """The commit that a hub model's files come from; empty for a folder."""
    if Path(model).is_dir():
        return ""
    path = cached_file(model, "config.json", revision=revision)
    return extract_commit_hash(path, None) or revision or ""


def _load_weights(
    model: str, revision: str | None, config: EsmConfig, dtype: torch.dtype
) -> EsmModel:
    options: dict[str, Any] = dict(
        config=config,
        revision=revision,
        dtype=dtype,
        add_pooling_layer=False,
        trust_remote_code=False,
        weights_only=True,
        output_loading_info=True,
    )
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()  # the unused head is no news
    try:
        loaded: Any = EsmModel.from_pretrained(model, **options)
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"the weights of {model!r} could not be loaded: they are a pickle that holds more than "
            "tensors, which could run code and is refused. Take safetensors"
        ) from error
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"the weights of {model!r} could not be loaded ({error}); is the download complete?"
        ) from error
    finally:
        transformers.utils.logging.set_verbosity(verbosity)
    esm, report = loaded
    # Rotary tables and the contact head are not part of the forward pass.
    missing = sorted(key for key in report["missing_keys"] if "contact_head" not in key)
    if missing:
        raise ModelError(
            f"the weights of {model!r} lack {', '.join(missing[:3])} ({len(missing)} in all); "
            "a model with random weights in part is refused. Download it again"
        )
    return esm


def _merge_adapter(esm: EsmModel, adapter: str) -> Any:
    from peft import PeftModel

    if (Path(adapter) / "adapter").is_dir():  # the output folder of fine-tuning
        adapter = str(Path(adapter) / "adapter")
    try:
        merged = PeftModel.from_pretrained(esm, adapter).merge_and_unload()
    except (OSError, ValueError, KeyError, RuntimeError, pickle.UnpicklingError) as error:
        raise ModelError(
            f"adapter {adapter!r} could not be loaded onto the model ({error}); name the folder "
            "that holds adapter_config.json and adapter_model.safetensors"
        ) from error
    return merged


def _sample_hash(esm: EsmModel) -> str:
    """A hash over the shapes and some values of every weight: tells models apart in a second."""
    digest = hashlib.sha256(json.dumps(esm.config.hidden_size).encode())
    for name, weight in sorted(esm.named_parameters()):
        if "contact_head" in name or "pooler" in name:
            continue
        flat = weight.detach().flatten()
        values = flat[:: max(1, len(flat) // 64)][:64].float()
        digest.update(f"{name}{tuple(weight.shape)}".encode() + values.numpy().tobytes())
    return digest.hexdigest()[:16]
