"""A model's files: read its configuration, load its weights and adapter, tell models apart.

Input: a model id or folder. Output: an EsmModel on the host, its commit, hashes. Invariants:
nothing that could run code is unpickled, and a model that is not wholly there is refused.
"""

import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import EsmConfig, EsmModel
from transformers.utils.hub import cached_file, extract_commit_hash

from ..errors import ModelError
from ..reads.tokens import VOCABULARY
from . import attention

DEFAULT_MODEL = "InstaDeepAI/nucleotide-transformer-2.5b-multi-species"


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


def load_model(model: str, dtype: torch.dtype, revision: str | None = None) -> EsmModel:
    """Load an EsmModel that attends by packed segments (see `attention`), on the host.

    Raises:
        ModelError: not found, another family, incomplete, or only loadable by running code.
    """
    esm = _load_weights(model, revision, read_config(model, revision), dtype)
    esm.set_attn_implementation(attention.NAME)
    return esm


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


def absolute(name: str) -> str:
    """A folder's full path; a model id as it is."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def merge_adapter(esm: EsmModel, adapter: str) -> Any:
    """Add an adapter to the weights; ModelError where it cannot be loaded or does not fit."""
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


def sample_hash(esm: EsmModel) -> str:
    """A hash over the shapes and some values of every weight: tells models apart in a second."""
    digest = hashlib.sha256(json.dumps(esm.config.hidden_size).encode())
    for name, weight in sorted(esm.named_parameters()):
        if "contact_head" in name or "pooler" in name:
            continue
        flat = weight.detach().flatten()
        values = flat[:: max(1, len(flat) // 64)][:64].float()
        digest.update(f"{name}{tuple(weight.shape)}".encode() + values.numpy().tobytes())
    return digest.hexdigest()[:16]
