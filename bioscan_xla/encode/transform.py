"""Centring and whitening of vectors: fitted once, then part of what a vector is.

Input: the vectors of a table. Output: a `Transform`, its file, transformed vectors.
Invariants: a transform depends on the vectors it was fitted on alone, and is known by a hash of its
numbers; applied to a vector it does not depend on other vectors.

Reference: Su et al. (2021), https://arxiv.org/abs/2103.15316; centring alone, Mu and Viswanath
    (2018), https://arxiv.org/abs/1702.01417
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ..errors import InputError, ModelError, first_line

KINDS = ("center", "whiten")
SHRINK = 0.1
"""Share of the mean variance that is added to every direction, so that noise is not blown up."""

_LEAST_NORM = 1e-12
_FEWEST = 2


@dataclass(frozen=True)
class Transform:
    """An affine map of vectors that were first scaled to length 1.

    Attributes:
        kind: `center` or `whiten`.
        mean: (hidden,) float32, of the vectors it was fitted on.
        matrix: (hidden, hidden) float32, directions over their spread; None if only centred.
    """

    kind: str
    mean: np.ndarray
    matrix: np.ndarray | None = None

    @property
    def mark(self) -> str:
        """Kind and hash, for the fingerprint."""
        digest = hashlib.sha256(self.kind.encode())
        for array in (self.mean, self.matrix):
            if array is not None:
                digest.update(np.ascontiguousarray(array, np.float32).tobytes())
        return f"{self.kind} {digest.hexdigest()[:16]}"

    def apply(self, vectors: np.ndarray) -> np.ndarray:
        """Transformed vectors, (vectors, hidden) float32."""
        centred = _unit(vectors) - self.mean
        return centred if self.matrix is None else centred @ self.matrix


def fit(parts: Iterable[np.ndarray], kind: str) -> Transform:
    """Fit to vectors, read once and a part at a time.

    Args:
        parts: (vectors, hidden) each.
        kind: `center` or `whiten`.

    Raises:
        InputError: fewer than two vectors.
    """
    count, total, squares = 0, np.zeros(0), None
    for part in parts:
        unit = _unit(part).astype(np.float64)
        if not count:
            total = np.zeros(unit.shape[1])
            squares = np.zeros((unit.shape[1],) * 2) if kind == "whiten" else None
        count += len(unit)
        total += unit.sum(0)
        if squares is not None:
            squares += unit.T @ unit
    if count < _FEWEST:
        raise InputError(f"a transform cannot be fitted to {count} vectors; embed more first")
    mean = total / count
    if squares is None:
        return Transform(kind, mean.astype(np.float32))
    covariance = (squares - count * np.outer(mean, mean)) / (count - 1)
    spread, directions = np.linalg.eigh(covariance)
    spread = np.maximum(spread, 0)
    matrix = directions / np.sqrt(spread + SHRINK * spread.mean() + _LEAST_NORM)
    return Transform(kind, mean.astype(np.float32), matrix.astype(np.float32))


def save_transform(transform: Transform, path: str) -> None:
    """Write a safetensors file; `path` may be a URL. It is complete or not there."""
    import fsspec
    from safetensors.numpy import save

    arrays = {"mean": transform.mean}
    if transform.matrix is not None:
        arrays["matrix"] = np.ascontiguousarray(transform.matrix)
    filesystem, place = fsspec.core.url_to_fs(path)
    with filesystem.open(f"{place}.part", "wb") as file:
        file.write(save(arrays, {"kind": transform.kind}))
    filesystem.mv(f"{place}.part", place)


def load_transform(path: str) -> Transform:
    """Read what `save_transform` wrote.

    Raises:
        ModelError: the file is missing or damaged.
    """
    import fsspec
    from safetensors import SafetensorError
    from safetensors.numpy import load

    filesystem, place = fsspec.core.url_to_fs(path)
    try:
        with filesystem.open(place, "rb") as file:
            arrays = load(file.read())
        mean, matrix = arrays["mean"], arrays.get("matrix")
    except FileNotFoundError as error:
        raise ModelError(
            f"{path}: missing. The table's vectors were transformed by it, and queries must be "
            "too; copy it back beside the table, or transform the table of raw vectors again"
        ) from error
    except (OSError, SafetensorError, KeyError) as error:
        raise ModelError(
            f"{path}: cannot be read ({first_line(error)}); copy the file again"
        ) from error
    return Transform("center" if matrix is None else "whiten", mean, matrix)


def _unit(vectors: np.ndarray) -> np.ndarray:
    vectors = np.asarray(vectors, np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), _LEAST_NORM)
