"""The fingerprint: everything that determines a vector, as strings, and its comparison.

Input: loaded weights; two fingerprints. Output: hashes; the keys that differ, and those that only
one side has. Invariants: every byte of the weights counts. A model's location is recorded as a hint
and never compared, so a moved model is the same model.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

VECTORS_VERSION = "1"
"""Increase by hand whenever the same model with the same options gives other vectors."""

TOKENIZER = "6-mer-4105"
"""Names the built-in vocabulary, the only one used: a model with another is refused."""

HINTS = ("model", "revision", "adapter", "version", "int8_cosine", "transform_file")
"""Where files were, which release wrote the fingerprint, how close int8 came: never compared."""

BEFORE = {"vectors": "1", "frames": "1", "strands": "given", "transform": "none"}
"""Values of keys that a fingerprint lacks."""

_EXACT = {"weights_sha256": "weights", "adapter_sha256": "adapter_hash"}
"""Hashes over all bytes, and the sampled hashes that older fingerprints have instead."""


def identity(fingerprint: Mapping[str, str]) -> str:
    """Twelve hexadecimal digits over all that decides a vector; where the model lies is not in it.

    Example:
        >>> there, here = {"layer": "-1", "model": "/data/m"}, {"layer": "-1", "model": "m"}
        >>> identity(there) == identity(here)
        True
    """
    told = {key: value for key, value in fingerprint.items() if key not in HINTS}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Comparison:
    """How two fingerprints compare.

    Attributes:
        different: keys that both have and that differ.
        unknown: keys that only one of them has.
    """

    different: tuple[str, ...]
    unknown: tuple[str, ...]


def hash_tensors(
    tensors: Iterable[tuple[str, "Tensor"]], dtype: "torch.dtype | None" = None
) -> str:
    """SHA-256 over the names, types, shapes and all bytes of tensors on the host.

    With `dtype` they are hashed as rounded to that type.

    The tensors are hashed in memory, as loaded: no file is read twice, and the result does not
    depend on how the weights were divided into files. One hash per tensor, several at a time,
    then one hash over these.
    """
    import torch

    def digest(item: tuple[str, "Tensor"]) -> bytes:
        name, tensor = item[0], item[1].detach().to(dtype)
        head = f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()
        flat: Any = tensor.contiguous().flatten().view(torch.uint8).numpy()
        return hashlib.sha256(head).digest() + hashlib.sha256(flat).digest()

    with ThreadPoolExecutor(torch.get_num_threads()) as threads:  # hashing releases the GIL
        digests = threads.map(digest, sorted(tensors, key=lambda item: item[0]))
        return hashlib.sha256(b"".join(digests)).hexdigest()


def compare(one: Mapping[str, str], other: Mapping[str, str]) -> Comparison:
    """Compare the keys that both fingerprints have.

    Example:
        >>> old = {"layer": "-1", "weights": "ab12"}
        >>> new = {"layer": "4", "weights": "ab12", "weights_sha256": "ef56"}
        >>> compare(old, new)
        Comparison(different=('layer',), unknown=('weights_sha256',))
    """
    one, other = BEFORE | dict(one), BEFORE | dict(other)
    both = one.keys() & other.keys()
    skipped = {sampled for exact, sampled in _EXACT.items() if exact in both}
    if one.get("dtype") != other.get("dtype"):
        skipped |= {*_EXACT, *_EXACT.values()}  # follows from it: weights are hashed as loaded
    keys = sorted((one.keys() | other.keys()) - skipped - set(HINTS))
    return Comparison(
        tuple(key for key in keys if key in both and one[key] != other[key]),
        tuple(key for key in keys if key not in both and (one.get(key) or other.get(key))),
    )


def describe(
    keys: Iterable[str],
    there: Mapping[str, str],
    ours: Mapping[str, str],
    names: tuple[str, str] = ("the table", "this run"),
) -> list[str]:
    """A line for each key that differs, with where each model is or was."""
    return [
        f"  {key}: {names[0]} has {_show(key, there)}, {names[1]} has {_show(key, ours)}"
        for key in keys
    ]


def _show(key: str, fingerprint: Mapping[str, str]) -> str:
    value = (BEFORE | dict(fingerprint)).get(key, "nothing")
    if key not in _EXACT and key not in _EXACT.values():
        return repr(value)
    if not value:
        return "none"
    place = fingerprint.get("adapter" if key.startswith("adapter") else "model", "")
    if key.startswith("weights") and fingerprint.get("revision"):
        place += f", revision {fingerprint['revision']}"
    return f"{value[:12]} ({place})"
