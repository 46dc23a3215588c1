"""Labelled sequences, and the parts that they are split into.

Input: labelled files. Output: `Examples` and `Data`.
Invariants: an unusable record is counted in the log; a file without a usable one is an error.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import InputError
from ..reads.files import metadata_schema
from ..reads.inputs import expand_inputs
from ..reads.labels import LabelSpace
from ..reads.lineages import RANKS, Lineage
from ..reads.raw import ReadOptions
from ..reads.records import read_chunks
from ..reads.taxonomy import read_taxonomy

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Examples:
    """Labelled sequences: ids, cleaned sequences, and seven names each."""

    ids: list[str]
    sequences: list[str]
    lineages: list[Lineage]

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self.ids)

    def content_hash(self) -> str:
        """A hash over all of them, in their order."""
        digest = hashlib.sha256()
        for row in zip(self.ids, self.sequences, self.lineages, strict=True):
            digest.update(repr(row).encode())
        return digest.hexdigest()

    def select(self, rows: Sequence[int] | np.ndarray) -> "Examples":
        """Those of these rows."""
        return Examples(
            [self.ids[row] for row in rows],
            [self.sequences[row] for row in rows],
            [self.lineages[row] for row in rows],
        )


@dataclass(frozen=True)
class Data:
    """Split and labelled examples, and the label space learned from the training part.

    Attributes:
        train: what is trained on.
        eval: what is evaluated on; may be empty.
        novel: of taxa that were held out whole; may be empty.
        space: the classes that the training part has.
        train_labels: (train, 7) class numbers, -1 where unknown.
        eval_labels: (eval, 7) likewise.
        split: (id, part) of every example read for training.
        conflicts: (rank, name, id, lineage) of every example with a conflicting lineage.
    """

    train: Examples
    eval: Examples
    novel: Examples
    space: LabelSpace
    train_labels: np.ndarray
    eval_labels: np.ndarray
    split: list[tuple[str, str]]
    conflicts: list[tuple[str, str, str, str]]


def read_examples(
    inputs: Sequence[str], reading: ReadOptions, taxonomy: str | None = None
) -> Examples:
    """Read labelled sequences; unusable records are counted in the log.

    Args:
        inputs: files, globs, folders, URLs.
        reading: column names and limits.
        taxonomy: a QIIME 2 taxonomy TSV, joined by id; it wins over the file's own ranks.

    Raises:
        InputError: a file cannot be read, or nothing in it can be used.
    """
    sources = expand_inputs(inputs)
    schema = metadata_schema(sources, reading)
    ids: list[str] = []
    sequences: list[str] = []
    lineages: list[Lineage] = []
    left_out: Counter[str] = Counter()
    why = "there are no records"
    for chunk in read_chunks(sources, reading, schema):
        ids += chunk.ids
        sequences += chunk.sequences
        columns = [chunk.metadata[rank].to_pylist() for rank in RANKS]
        lineages += list(zip(*columns, strict=True))
        if chunk.rejected and not left_out:
            first = chunk.rejected[0]
            why = f"{first.sequence_id or f'record {first.row + 1}'}: {first.reason}"
        left_out.update(item.code.value for item in chunk.rejected)
    if left_out:
        counts = ", ".join(f"{code} {count}" for code, count in left_out.most_common())
        log.warning("%d records left out (%s); the first is %s", left_out.total(), counts, why)
    if not ids:
        raise InputError(f"{', '.join(inputs)}: no sequence can be used ({why})")
    if taxonomy:
        lineages = _join_taxonomy(taxonomy, ids, lineages)
    if not any(any(lineage) for lineage in lineages):
        raise InputError(
            f"{sources[0]}: no sequence has a name at any rank; name the columns with --columns, "
            "read them from headers with --header-taxonomy, or join a TSV with --taxonomy"
        )
    return Examples(ids, sequences, lineages)


def _join_taxonomy(path: str, ids: list[str], lineages: list[Lineage]) -> list[Lineage]:
    """Lineages by id from a taxonomy TSV; an id that it lacks keeps its own."""
    by_id = read_taxonomy(path)
    joined = sum(name in by_id for name in ids)
    if not joined:
        raise InputError(
            f"{path}: contains none of the sequence ids (it has {next(iter(by_id), 'none')!r}, "
            f"they have {ids[0]!r}); its first column must hold the sequence ids"
        )
    if joined < len(ids):
        log.warning(
            "%s: %d of %d sequences are not in it; they keep the lineage of their own file",
            path,
            len(ids) - joined,
            len(ids),
        )
    return [by_id.get(name, lineage) for name, lineage in zip(ids, lineages, strict=True)]
