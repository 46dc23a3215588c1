"""Going on from the folder of a trained model: its classes, the form of its adapter, its weights.

Input: a config that names the folder. Output: the config fitted to it; a classifier with its
weights. Invariants: an option that contradicts the folder is refused; another base model is refused
before training.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft import set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..encode.fingerprint import hash_tensors
from ..encode.model_files import (
    TRAINED,
    adapter_reading,
    check_safetensors,
    read_json,
    resolve_base,
)
from ..errors import ConfigError, ModelError, first_line
from ..options import FinetuneConfig
from ..reads.labels import LabelSpace
from .classifier import TaxonomyClassifier, check_model_folder

ADAPTER = "adapter/adapter_model.safetensors"
HEADS = "heads.safetensors"


def fit_to_start(
    config: FinetuneConfig, fit_to_base: Callable[[FinetuneConfig], FinetuneConfig]
) -> FinetuneConfig:
    """The options, with those left open filled in from the folder and from the base model.

    Args:
        config: options; those that have their default are left open.
        fit_to_base: fills in what the base model says.

    Raises:
        ConfigError: an option contradicts the folder.
    """
    fitted = fit_to_base(config)
    if not config.start:
        return fitted
    raw = read_json(Path(config.start, "adapter", "adapter_config.json"))
    defaults = FinetuneConfig()
    theirs: dict[str, Any] = {
        "rank": raw.get("r"),
        "alpha": raw.get("lora_alpha"),
        "targets": sorted(raw.get("target_modules") or ()),
    }
    for key, value in theirs.items():
        own = getattr(config, key)
        is_open = own == getattr(defaults, key)
        if not is_open and (sorted(own) if key == "targets" else own) != value:
            raise _other(config.start, key, value, own)
    fitted = dataclasses.replace(fitted, **theirs)
    reading: dict[str, Any] = {"frames": 1, "strands": "given"} | adapter_reading(config.start)
    if fitted.frames_read != reading["frames"]:
        if config.frames is not None:
            raise _other(config.start, "frames", reading["frames"], config.frames)
        fitted = dataclasses.replace(fitted, frames=reading["frames"])
    if (fitted.strands or "given") != reading["strands"]:
        if config.strands is not None:
            raise _other(config.start, "strands", reading["strands"], config.strands)
        fitted = dataclasses.replace(fitted, strands=reading["strands"])
    return fitted


def _other(folder: str, key: str, theirs: Any, ours: Any) -> ConfigError:
    return ConfigError(
        f"{folder} was trained with {key} {theirs!r}, and this run asks for {ours!r}; leave "
        f"--{key} out, or start from the base model"
    )


def base_of_start(config: FinetuneConfig) -> FinetuneConfig:
    """The options with the base model that the folder was trained on, if none is named.

    Raises:
        ModelError: the folder is not one of a trained model.
    """
    if not config.start:
        return config
    check_model_folder(Path(config.start))
    model, revision = resolve_base(config.model, config.revision, config.start)
    return dataclasses.replace(config, model=model, revision=revision)


def given_labels(config: FinetuneConfig) -> LabelSpace | None:
    """The classes that the options name, by a file or by a folder to start from; None without.

    Raises:
        ConfigError: the two differ.
    """
    spaces = [LabelSpace.load(config.labels)] if config.labels else []
    if config.start:
        spaces.append(LabelSpace.load(Path(config.start, "labels.json")))
    if len(spaces) == 2 and spaces[0] != spaces[1]:
        raise ConfigError(
            f"{config.labels} and {config.start}/labels.json differ; a model can only go on with "
            "its own classes. Leave --labels out, or start from the base model"
        )
    return spaces[0] if spaces else None


def hash_trained(folder: Path) -> str:
    """A hash over the adapter and the heads of a model folder."""
    found = [*load_file(folder / ADAPTER).items(), *load_file(folder / HEADS).items()]
    return hash_tensors(sorted(found))


def load_start(classifier: TaxonomyClassifier, folder: Path, base_hash: str) -> dict[str, Any]:
    """Give a new classifier the adapter and the heads of a model folder.

    Returns:
        `hash` of these weights, and `epochs` that they were trained for.

    Raises:
        ModelError: they are damaged, do not fit, or were trained on another base model.
    """
    facts = read_json(folder / TRAINED) if (folder / TRAINED).is_file() else {}
    if facts.get("base_hash", base_hash) != base_hash:
        raise ModelError(
            f"{folder} was trained on a base model with other weights (hash {facts['base_hash']}, "
            f"not {base_hash}); pass that one as --model"
        )
    try:
        adapter = load_file(folder / ADAPTER)
        found: Any = set_peft_model_state_dict(classifier.encoder, adapter)
        lacking = [name for name in found.missing_keys if "lora_" in name]
        if lacking or found.unexpected_keys:
            raise RuntimeError(f"tensor names differ: {[*lacking, *found.unexpected_keys][0]}")
        classifier.heads.load_state_dict(load_file(folder / HEADS))
    except (OSError, SafetensorError, RuntimeError, KeyError) as error:
        for part in (folder, folder / "adapter"):
            check_safetensors(part)
        raise ModelError(
            f"{folder}: its weights do not fit this run ({first_line(error)}); pass the model that "
            "it was trained on as --model, and the whole folder as --start"
        ) from error
    return {"hash": hash_trained(folder), "epochs": int(facts.get("epochs", 0))}
