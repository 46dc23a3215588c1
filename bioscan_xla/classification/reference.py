"""The references: labelled sequences that queries are compared with.

Input: a LanceDB table made by embed, or labelled FASTA or Parquet. Output: a `Reference`.
Invariants: sequences are cleaned as the reader cleans them; a reference without any usable name is
left out and counted; the content hash depends on ids, sequences and lineages alone.
"""

import hashlib
import logging
import os
from collections import defaultdict
from collections.abc import Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..errors import InputError, TableError
from ..reads.files import metadata_schema
from ..reads.inputs import expand_inputs, is_remote
from ..reads.labels import UNKNOWN, Conflict, compatible
from ..reads.lineages import RANKS, Lineage, known_lineage
from ..reads.raw import ReadOptions
from ..reads.records import clean_sequences, read_chunks
from ..table.neighbours import open_table, read_fingerprint, vectors_of
from .heads import Heads
from .tree import LineageTree, build_tree

log = logging.getLogger(__name__)

_CHUNK_ROWS = 8192


@dataclass(frozen=True)
class Reference:
    """Labelled sequences.

    Attributes:
        name: what to call it.
        version: of the LanceDB table, or what the user says; empty where neither is known.
        content_hash: SHA-256 of ids, sequences and lineages.
        ids: (references,).
        sequences: (references,) cleaned.
        lineages: (references,) as they were given.
        tree: of all lineages.
        leaves: (references,) leaf of each in the tree.
        conflicts: names with several sets of ancestors.
        num_left_out: records without a usable name or sequence.
        vectors: (references, hidden) of length 1, None where there are none.
        fingerprint: of the encoder that made the vectors.
        class_leaves: leaf of each class of the heads, where there are heads.
    """

    name: str
    version: str
    content_hash: str
    ids: list[str]
    sequences: list[str]
    lineages: list[Lineage]
    tree: LineageTree
    leaves: np.ndarray
    conflicts: list[Conflict]
    num_left_out: int
    vectors: np.ndarray | None = None
    fingerprint: dict[str, str] | None = None
    class_leaves: np.ndarray | None = None

    def with_vectors(self, vectors: np.ndarray, fingerprint: dict[str, str]) -> "Reference":
        """The same with vectors; one that is not finite is near to nothing."""
        finite = np.isfinite(vectors).all(axis=1)
        if not finite.all():
            log.warning("%d references have no finite vector", (~finite).sum())
            vectors = np.where(finite[:, None], vectors, 0)
        return replace(self, vectors=unit(vectors), fingerprint=fingerprint)


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors of length 1, float32."""
    vectors = np.asarray(vectors, np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def is_table(reference: str) -> bool:
    """True where the reference is a LanceDB database rather than a file of sequences."""
    if is_remote(reference):
        return not any(
            reference.lower().removesuffix(".gz").endswith(ending)
            for ending in (".parquet", ".pq", ".fasta", ".fa", ".fna", ".fas")
        )
    return os.path.isdir(reference) and any(Path(reference).glob("*.lance"))


def load_reference(
    reference: str,
    *,
    table: str = "embeddings",
    name: str | None = None,
    version: str | None = None,
    columns: dict[str, str] | None = None,
    columns_option: str = "columns",
    header_taxonomy: str | None = None,
    heads: Heads | None = None,
) -> Reference:
    """Read the references.

    Args:
        reference: database, or file of sequences.
        table: of the database.
        name: what to call it; by default the file's name.
        version: what the user calls it.
        columns: our column name to the file's.
        columns_option: the option that gave them, for messages.
        header_taxonomy: how FASTA headers write the lineage.
        heads: whose classes the tree must hold too. With heads `reference` may be empty.

    Raises:
        InputError: it cannot be read or holds no labelled sequence.
        TableError: no such table, or it holds no sequences.
    """
    vectors, fingerprint = None, None
    ids: list[str] = []
    sequences: list[str] = []
    lineages: list[Lineage] = []
    if not reference:
        name = name or "no reference"
    elif is_table(reference):
        ids, sequences, lineages, vectors, fingerprint, found_version = _from_table(
            reference, table
        )
        version = version or found_version
    else:
        options = ReadOptions(
            columns or {}, header_taxonomy=header_taxonomy, columns_option=columns_option
        )
        ids, sequences, lineages = _from_files(reference, options)
    classes = heads.lineages() if heads else []
    tree, all_leaves, conflicts = build_tree([*lineages, *classes])
    _warn_of_other_places(conflicts, lineages, classes, reference)
    leaves, class_leaves = all_leaves[: len(ids)], all_leaves[len(ids) :]
    kept = np.flatnonzero(leaves != UNKNOWN)
    num_left_out = len(ids) - len(kept)
    if reference and not len(kept):
        raise _no_lineages(reference, len(ids))
    if num_left_out:
        log.warning("%s: %d records without a usable name are left out", reference, num_left_out)
        ids = [ids[at] for at in kept]
        sequences = [sequences[at] for at in kept]
        lineages = [lineages[at] for at in kept]
    plain = os.path.basename(os.path.normpath(reference))
    result = Reference(
        name or plain,
        version or "",
        _hash(ids, sequences, lineages),
        ids,
        sequences,
        lineages,
        tree,
        leaves[kept],
        conflicts,
        num_left_out,
        class_leaves=class_leaves if heads else None,
    )
    if vectors is not None:
        result = result.with_vectors(vectors[kept], fingerprint or {})
    return result


def _no_lineages(reference: str, count: int) -> InputError:
    return InputError(
        f"{reference}: none of its {count:,} sequences has a lineage; a reference needs the "
        f"columns {', '.join(RANKS)}, or FASTA headers with a lineage (--header-taxonomy sintax or "
        "silva)"
    )


def _warn_of_other_places(
    conflicts: Sequence[Conflict],
    lineages: Sequence[Lineage],
    classes: Sequence[Lineage],
    reference: str,
) -> None:
    """Tell of names whose ancestors in the heads are never those in the reference.

    They are two nodes of the tree, so that the heads' share and the votes do not add up.
    """
    if not classes:
        return
    keys = {(RANKS.index(item.rank), item.name) for item in conflicts}
    theirs, ours = (_ancestors_of(keys, side) for side in (lineages, classes))
    apart = [
        key
        for key in sorted(theirs.keys() & ours.keys())
        if not any(compatible(a, b) for a in ours[key] for b in theirs[key])
    ]
    if apart:
        rank, name = apart[0]
        chains = [";".join(text or "?" for text in next(iter(s[apart[0]]))) for s in (ours, theirs)]
        log.warning(
            "%d names have other ancestors in the model than in %s, such as the %s %s: %s in the "
            "model, %s in the reference. There heads and references do not support each other; "
            "take one taxonomy for both",
            len(apart),
            reference,
            RANKS[rank],
            name,
            *chains,
        )


def _ancestors_of(
    keys: Set[tuple[int, str | None]], lineages: Sequence[Lineage]
) -> dict[tuple[int, str | None], set[Lineage]]:
    """For each rank and name that occurs in lineages, its chains of ancestors."""
    found: dict[tuple[int, str | None], set[Lineage]] = defaultdict(set)
    for names in map(known_lineage, set(lineages)):
        for key in keys & set(enumerate(names)):
            found[key].add(names[: key[0]])
    return found


def _hash(ids: Sequence[str], sequences: Sequence[str], lineages: Sequence[Lineage]) -> str:
    digest = hashlib.sha256()
    for row in zip(ids, sequences, lineages, strict=True):
        names = ";".join(name or "" for name in row[2])
        digest.update(f"{row[0]}\t{row[1]}\t{names}\n".encode())
    return digest.hexdigest()


def _from_table(
    uri: str, name: str
) -> tuple[list[str], list[str], list[Lineage], np.ndarray, dict[str, str], str]:
    table = open_table(uri, name)
    missing = {"dna_sequence", *RANKS} - set(table.schema.names)
    if missing:
        raise TableError(
            f"{uri}: the table {name!r} has no column {sorted(missing)[0]!r}; a reference needs "
            "sequences and lineages: embed it again from a labelled file, with --store-sequences"
        )
    ids: list[str] = []
    sequences: list[str] = []
    lineages: list[Lineage] = []
    parts = []
    wanted = ["sequence_id", "dna_sequence", *RANKS, "vector"]
    hidden = table.schema.field("vector").type.list_size
    for batch in table.search().select(wanted).to_batches(_CHUNK_ROWS):
        ids += batch["sequence_id"].to_pylist()
        sequences += batch["dna_sequence"].to_pylist()
        lineages += zip(*(batch[rank].to_pylist() for rank in RANKS), strict=True)
        parts.append(vectors_of(batch))
    vectors = np.concatenate(parts) if parts else np.zeros((0, hidden), np.float32)
    order = sorted(range(len(ids)), key=ids.__getitem__)  # rows move when a table is compacted
    return (
        [ids[at] for at in order],
        clean_sequences([sequences[at] for at in order])[0],
        [lineages[at] for at in order],
        vectors[order],
        read_fingerprint(table),
        f"table version {table.version}",
    )


def _from_files(reference: str, options: ReadOptions) -> tuple[list[str], list[str], list[Lineage]]:
    sources = expand_inputs(reference)
    options = replace(options, chunk_rows=_CHUNK_ROWS)
    ids: list[str] = []
    sequences: list[str] = []
    lineages: list[Lineage] = []
    rejected = 0
    for chunk in read_chunks(sources, options, metadata_schema(sources, options)):
        ids += chunk.ids
        sequences += chunk.sequences
        lineages += zip(*(chunk.metadata[rank].to_pylist() for rank in RANKS), strict=True)
        rejected += len(chunk.rejected)
        for item in chunk.rejected[:3]:
            log.warning("reference %s, row %d: %s", item.source, item.row, item.reason)
    if rejected:
        log.warning("%s: %d records cannot be used as references", reference, rejected)
    return ids, sequences, lineages
