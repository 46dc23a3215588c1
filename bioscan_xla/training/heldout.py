"""Sequences that a model was not trained on, kept with it so that its heads can be calibrated.

Input: the evaluation and novel parts of fine-tuning. Output: `heldout.safetensors` in the model
folder.
Invariants: it holds vectors, class numbers, lengths and digests, and no sequence, id or name.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import ModelError
from ..reads.labels import UNKNOWN
from ..reads.lineages import Lineage, known_lineage

HELDOUT = "heldout.safetensors"
NEW_TO_THE_MODEL = -2
"""Highest class number of names that the training part does not have; each has one of its own."""
MOST_EVALUATED = 2000  # 10 MB of vectors of 2,560 numbers
MOST_NOVEL = 1000

_DIGEST_BYTES = 16


@dataclass(frozen=True)
class HeldOut:
    """Held-out sequences, without the sequences.

    Attributes:
        vectors: (sequences, hidden) what the heads read.
        classes: (sequences, 7) class numbers, -1 where no name is known, from -2 down where the
            name is not among the classes.
        length_bp: (sequences,).
        digests: (sequences, 16) of `digest`.
    """

    vectors: np.ndarray
    classes: np.ndarray
    length_bp: np.ndarray
    digests: np.ndarray

    def places(self, sequences: Sequence[str]) -> np.ndarray:
        """Which of them each sequence is, (sequences,); -1 for none."""
        own = {row.tobytes(): number for number, row in enumerate(self.digests)}
        return np.array([own.get(digest(text), -1) for text in sequences], np.int64)


def digest(sequence: str) -> bytes:
    """16 bytes that tell a cleaned sequence from others."""
    return hashlib.blake2b(sequence.encode(), digest_size=_DIGEST_BYTES).digest()


def write_heldout(
    folder: Path,
    vectors: np.ndarray,
    sequences: Sequence[str],
    lineages: Sequence[Lineage],
    classes: np.ndarray,
) -> None:
    """Write them.

    Args:
        folder: of the model.
        vectors: (sequences, hidden).
        sequences: cleaned.
        lineages: seven names each.
        classes: (sequences, 7) class numbers, -1 where unknown.
    """
    from safetensors.numpy import save_file

    digests = np.frombuffer(b"".join(map(digest, sequences)), np.uint8)
    tensors = {
        "vectors": vectors.astype(np.float16),
        "classes": _number_new(lineages, classes).astype(np.int32),
        "length_bp": np.array([len(sequence) for sequence in sequences], np.int32),
        "digests": digests.reshape(-1, _DIGEST_BYTES).copy(),
    }
    save_file(tensors, folder / HELDOUT)


def evenly_spaced(number: int, most: int) -> np.ndarray:
    """At most so many of the numbers below `number`."""
    return np.linspace(0, number - 1, min(number, most)).astype(np.int64)


def _number_new(lineages: Sequence[Lineage], classes: np.ndarray) -> np.ndarray:
    """Class numbers in which each name that is no class has its own, from -2 down."""
    classes = classes.copy()
    numbers: dict[Lineage, int] = {}
    for row, lineage in enumerate(lineages):
        names = known_lineage(lineage)
        for rank, name in enumerate(names):
            if name and classes[row, rank] == UNKNOWN:
                number = numbers.setdefault(names[: rank + 1], NEW_TO_THE_MODEL - len(numbers))
                classes[row, rank] = number
    return classes


def read_heldout(folder: Path) -> HeldOut | None:
    """Read them; None in a folder that has none.

    Raises:
        ModelError: the file is damaged.
    """
    from safetensors.numpy import load_file

    if not (folder / HELDOUT).is_file():
        return None
    try:
        found = load_file(folder / HELDOUT)
        vectors = found["vectors"].astype(np.float32)
        return HeldOut(vectors, found["classes"], found["length_bp"], found["digests"])
    except Exception as error:  # safetensors has no error class of its own for a short file
        raise ModelError(
            f"{folder}: {HELDOUT} cannot be read ({error}); fine-tune again, or delete it to go "
            "without calibrated heads"
        ) from error
