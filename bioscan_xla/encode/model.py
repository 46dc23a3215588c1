"""Load a model: its configuration, its weights, an adapter.

Input: a model id or folder, an adapter. Output: an EsmModel on the host, and its hashes.
Invariants: nothing that could run code is unpickled, and an incomplete model is refused.
"""

import hashlib
import json
import logging
import pickle
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import EsmConfig, EsmModel

from ..errors import ModelError, first_line
from ..reads.tokens import VOCABULARY
from . import attention
from .fingerprint import hash_tensors
from .model_files import (
    SHIPPED,
    adapter_base_hash,
    adapter_folder,
    check_safetensors,
    check_vocabulary,
    find_file,
    is_offline,
    is_on_hub,
    locate,
    read_json,
)

_LOAD_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    RuntimeError,
    SafetensorError,
    pickle.UnpicklingError,
)
log = logging.getLogger(__name__)

_SIZE_MISMATCH = re.compile(
    r"size mismatch for (\S+): .*?shape torch\.Size\((\[.*?\])\).*?torch\.Size\((\[.*?\])\)"
)


def read_config(model: str, revision: str | None = None) -> EsmConfig:
    """Read a model's configuration; check that it can be used and has the built-in vocabulary.

    Raises:
        ModelError: not found, damaged, of another family, or with another vocabulary.
    """
    model = locate(model)
    folder = Path(model)
    if not folder.is_dir() and not is_on_hub(model):
        hint = "" if "/" in model else f", or name {SHIPPED[0]} or a model of the hub as OWNER/NAME"
        raise ModelError(f"{model}: no such folder; check the path{hint}")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ModelError(f"{model}: has no config.json; name the folder that holds the model")
    path = find_file(model, "config.json", revision)
    if path is None:
        why = (
            "the hub cannot be reached from here; check the path if you meant a folder, or the "
            "network"
            if is_offline()
            else "could not be downloaded from the hub; check the id and the network (for a "
            "private model, set HF_TOKEN)"
        )
        raise ModelError(
            f"model {model!r} is not a folder on this machine, and {why}, or download it elsewhere "
            "and pass its folder as --model FOLDER"
        )
    raw = read_json(path)
    if raw.get("auto_map"):
        raise ModelError(
            f"model {model!r} can only be loaded by running code from its repository, which is "
            "refused; use a Nucleotide Transformer of version 1"
        )
    if raw.get("model_type") != "esm" or raw.get("vocab_size") != len(VOCABULARY):
        raise ModelError(
            f"model {model!r} is {raw.get('model_type')!r} with {raw.get('vocab_size')} tokens; "
            f"needed: 'esm' with the {len(VOCABULARY)} tokens of Nucleotide Transformer version 1"
        )
    if raw.get("position_embedding_type", "absolute") != "absolute":
        raise ModelError(
            f"model {model!r} has {raw['position_embedding_type']} positions; they must be "
            "absolute, as in Nucleotide Transformer version 1"
        )
    check_vocabulary(model, revision)
    try:
        config = EsmConfig.from_dict(raw)
        with torch.device("meta"), no_bars():
            EsmModel(config, add_pooling_layer=False)
    except Exception as error:  # the library raises many kinds of error for bad values
        raise ModelError(
            f"{path}: no model can be built from these values ({first_line(error)}); "
            "download the file again"
        ) from error
    return config


def load_model(model: str, dtype: torch.dtype, revision: str | None = None) -> EsmModel:
    """Load an EsmModel that attends by packed segments (see `attention`), on the host.

    Raises:
        ModelError: not found, of another family, incomplete, or only loadable by running code.
    """
    model = locate(model)
    esm = _load_weights(model, revision, read_config(model, revision), dtype)
    esm.set_attn_implementation(attention.NAME)
    return esm


def is_bag(esm: Any) -> bool:
    """Whether a token's state depends only on the token: no layers, and positions all zero."""
    positions = esm.embeddings.position_embeddings
    return (
        not len(esm.encoder.layer)
        and not esm.embeddings.token_dropout
        and isinstance(positions, torch.nn.Embedding)
        and not positions.weight.any()
    )


def token_states(encoder: Any, num_tokens: int) -> torch.Tensor:
    """State of every token of such a model, with or without an adapter, (vocabulary, hidden)."""
    ids = torch.arange(num_tokens)[None]
    return encoder(input_ids=ids, position_ids=torch.zeros_like(ids)).last_hidden_state[0].float()


@contextmanager
def no_bars() -> Iterator[None]:
    """Hide the progress bars of transformers for loading and writing weights.

    The hub's bars stay: a download of gigabytes should show its progress.
    """

    def silent(factory: Any, args: tuple, options: dict[str, Any]) -> Any:
        return factory(*args, **options | {"disable": True})

    before = transformers.utils.logging.set_tqdm_hook(silent)
    try:
        with warnings.catch_warnings():
            # For a model without layers, whose contact head (never used) has no weights.
            warnings.filterwarnings("ignore", "Initializing zero-element tensors")
            yield
    finally:
        transformers.utils.logging.set_tqdm_hook(before)


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
        local_files_only=is_offline(),
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are refused below, with names and shapes
    )
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()  # hides warnings about the unused head
    try:
        with no_bars():
            loaded: Any = EsmModel.from_pretrained(model, **options)
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"the weights of {model!r} could not be loaded: they are a pickle that holds more than "
            "tensors, which could run code and is refused. Take safetensors"
        ) from error
    except _LOAD_ERRORS as error:
        config_path = find_file(model, "config.json", revision)
        if config_path is not None:
            check_safetensors(config_path.parent)
        raise ModelError(
            f"the weights of {model!r} could not be loaded ({first_line(error)}); "
            "download the model again"
        ) from error
    finally:
        transformers.utils.logging.set_verbosity(verbosity)
    esm, report = loaded
    for name, theirs, ours in sorted(report["mismatched_keys"]):
        raise ModelError(
            f"the weights of {model!r} do not fit its config.json: {name} has the shape "
            f"{tuple(theirs)}, expected {tuple(ours)}; the two files belong to different models"
        )
    # Rotary tables and the contact head are not part of the forward pass.
    missing = sorted(key for key in report["missing_keys"] if "contact_head" not in key)
    if missing:
        raise ModelError(
            f"the weights of {model!r} lack {', '.join(missing[:3])} ({len(missing)} in total); "
            "a partly random model is refused. Download it again"
        )
    return esm


def attach_saved_adapter(esm: EsmModel, adapter: str | Path) -> Any:
    """Load an adapter beside the weights of a model, a PeftModel.

    Raises:
        ModelError: it does not exist, is damaged, or was trained on another model.
    """
    from peft import PeftModel

    folder = adapter_folder(str(adapter))
    if not Path(folder).is_dir() and not is_on_hub(folder):
        raise ModelError(f"adapter {folder}: no such folder; check the path")
    recorded = adapter_base_hash(str(adapter))
    if recorded and recorded not in (hash_base(esm), hash_weights(esm)):
        raise ModelError(
            f"adapter {str(adapter)!r} was trained on a base model with other weights than those "
            f"of {esm.name_or_path!r}, and its vectors would be wrong; pass the model that it was "
            "trained on as --model, or fine-tune again"
        )
    try:
        return PeftModel.from_pretrained(esm, folder)
    except _LOAD_ERRORS as error:
        if Path(folder).is_dir():
            check_safetensors(Path(folder))
        if found := _SIZE_MISMATCH.search(str(error)):
            name, theirs, ours = found.groups()
            raise ModelError(
                f"adapter {str(adapter)!r} does not fit the model: {name} has the shape {theirs}, "
                f"expected {ours}; pass the model that it was trained on as --model"
            ) from error
        raise ModelError(
            f"adapter {str(adapter)!r} could not be loaded onto the model ({first_line(error)}); "
            "pass the folder that holds adapter_config.json and adapter_model.safetensors"
        ) from error


def merge_adapter(esm: EsmModel, adapter: str) -> tuple[Any, str]:
    """The model with an adapter added to its weights, and the adapter's hash.

    Raises:
        ModelError: see `attach_saved_adapter`.
    """
    tuned = attach_saved_adapter(esm, adapter)
    digest = _hash_adapter(tuned)
    return tuned.merge_and_unload(), digest


def _hash_adapter(tuned: Any) -> str:
    """A hash over an adapter's tensors and their scaling factors."""
    from peft import get_peft_model_state_dict

    tensors = dict(get_peft_model_state_dict(tuned, save_embedding_layers=False))
    for name, module in tuned.named_modules():
        scaling = getattr(module, "scaling", None)  # in attention it is a number
        for factor in scaling.values() if isinstance(scaling, dict) else ():
            tensors[f"{name} scaling"] = torch.tensor(float(factor))
    return hash_tensors(tensors.items())


def _weights(esm: EsmModel) -> Iterator[tuple[str, torch.Tensor]]:
    for name, weight in esm.named_parameters():
        if "contact_head" not in name and "pooler" not in name:
            yield name, weight


def hash_weights(esm: EsmModel) -> str:
    """A hash over every byte of the weights that vectors depend on, on the host."""
    return hash_tensors(_weights(esm))


def hash_base(esm: EsmModel) -> str:
    """The same in bfloat16, so that it does not depend on the type that the model is loaded in."""
    return hash_tensors(_weights(esm), torch.bfloat16)


def sample_hash(esm: EsmModel) -> str:
    """A hash over the shapes and some values of every weight, as recorded by older tables."""
    digest = hashlib.sha256(json.dumps(esm.config.hidden_size).encode())
    for name, weight in sorted(_weights(esm)):
        flat = weight.detach().flatten()
        values = flat[:: max(1, len(flat) // 64)][:64].float()
        digest.update(f"{name}{tuple(weight.shape)}".encode() + values.numpy().tobytes())
    return digest.hexdigest()[:16]
