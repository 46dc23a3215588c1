"""Checks and choices that several configs share."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError

DEFAULT_MODEL = "InstaDeepAI/nucleotide-transformer-2.5b-multi-species"
SAMPLE = "demo/sample.parquet"
"""Where demos write the built-in sample."""
DEVICES = ("auto", "xla", "cuda", "cpu")
DTYPES = (None, "bfloat16", "float32")
"""For training; inference also knows int8."""
INFERENCE_DTYPES = (*DTYPES, "int8")
TRACKERS = ("none", "wandb", "tensorboard")


def check_choices(config: Any, choices: Mapping[str, tuple]) -> None:
    """Refuse a value that is not one of its key's choices."""
    for key, known in choices.items():
        if getattr(config, key) not in known:
            names = ", ".join(str(name) for name in known if name)
            raise ConfigError(f"{key} {getattr(config, key)!r} is unknown; choose {names}")


def check_least(config: Any, least: Mapping[str, int]) -> None:
    """Refuse a value below its key's minimum."""
    for key, lowest in least.items():
        value = getattr(config, key)
        if value is not None and value < lowest:
            raise ConfigError(f"{key} is {value}; it must be at least {lowest}")


def check_shares(config: Any, keys: Sequence[str]) -> None:
    """Refuse a fraction outside 0 to 1, and NaN."""
    for key in keys:
        if not 0 <= getattr(config, key) <= 1:
            raise ConfigError(f"{key} is {getattr(config, key)}; it must be from 0 to 1")


def check_positive(config: Any, keys: Sequence[str]) -> None:
    """Refuse a number that is not above 0, and NaN."""
    for key in keys:
        if not getattr(config, key) > 0:
            raise ConfigError(f"{key} is {getattr(config, key)}; it must be above 0")


def set_list(config: Any, key: str) -> None:
    """Make a list of strings from one string, one path or several."""
    value = getattr(config, key)
    items = [value] if isinstance(value, str | Path) else list(value or ())
    object.__setattr__(config, key, [str(item) for item in items])
