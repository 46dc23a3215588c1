"""Results in the formats that other programs read.

Input: rows of `classified.parquet`, one at a time; counts and samples where these are given.
Output: files under the output folder. Invariants: every row of the input is in every file; nothing
is held in memory but what a file needs as a whole (the count table, Krona's sums).
"""

import csv
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from ..reads.lineages import RANKS
from .counts import Counts
from .record import lineage_text
from .samples import Sample

LETTERS = ("k", "p", "c", "o", "f", "g", "s")
UNASSIGNED = "Unassigned"

Row = Mapping[str, Any]


def names_of(row: Row, prefix: str = "") -> list[str | None]:
    """The seven names of a row; with prefix `best_` before truncation."""
    return [row[prefix + rank] for rank in RANKS]


def known_part(names: Sequence[str | None]) -> list[str | None]:
    """Names down to the last that is known."""
    last = max((at for at, name in enumerate(names) if name), default=-1)
    return list(names[: last + 1])


def write_texts(folder: Path, rows: Iterable[Row], reference: str) -> None:
    """Write taxonomy.tsv, taxonomy.sintax.tsv, krona.txt, faire.tsv and oriented.fasta."""
    with ExitStack() as files:

        def begin(name: str) -> TextIO:
            file = open(folder / name, "w", encoding="utf-8", newline="")  # noqa: SIM115
            return files.enter_context(file)

        qiime, sintax, fasta = map(begin, ("taxonomy.tsv", "taxonomy.sintax.tsv", "oriented.fasta"))
        faire = csv.writer(begin("faire.tsv"), delimiter="\t", lineterminator="\n")
        faire.writerow(FAIRE_COLUMNS)
        qiime.write("Feature ID\tTaxon\tConfidence\n")
        krona: Counter[tuple[str, ...]] = Counter()
        for row in rows:
            qiime.write(qiime_line(row))
            sintax.write(sintax_line(row))
            strand = row["strand"] or "unknown"
            fasta.write(f">{row['sequence_id']} strand={strand}\n{row['dna_sequence']}\n")
            faire.writerow(faire_cells(row, reference))
            weight = 1 if row["reads"] is None else row["reads"]
            krona[krona_path(row)] += weight
        krona_file = begin("krona.txt")
        for path, weight in sorted(krona.items()):
            if weight:
                krona_file.write("\t".join([str(weight), *path]) + "\n")


def one_word(name: str) -> str:
    """An identifier without white space."""
    return re.sub(r"\s", "_", name)


def qiime_taxon(row: Row) -> str:
    """`k__Animalia; p__Cnidaria; c__` and so on, at least two ranks, or `Unassigned`.

    QIIME 2 takes a file without any semicolon for one without taxonomy.
    """
    names = known_part(names_of(row))
    if not names:
        return UNASSIGNED
    names += [None] * (2 - len(names))
    return "; ".join(
        f"{letter}__{(name or '').replace(';', ',')}"
        for letter, name in zip(LETTERS, names, strict=False)
    )


def qiime_line(row: Row) -> str:
    """A line of QIIME 2's taxonomy."""
    confidence = row["confidence"] if row["confidence"] is not None else 0.0
    return f"{one_word(row['sequence_id'])}\t{qiime_taxon(row)}\t{confidence:.6g}\n"


def sintax_line(row: Row) -> str:
    """A line as `vsearch --sintax --sintax_cutoff` writes it."""

    def clean(name: str) -> str:
        return re.sub(r"[,;\s]+", "_", name)

    best = [
        f"{letter}:{clean(row[f'best_{rank}'])}({row[f'confidence_{rank}']:.2f})"
        for letter, rank in zip(LETTERS, RANKS, strict=True)
        if row[f"best_{rank}"]
    ]
    kept = [
        f"{letter}:{clean(row[rank])}"
        for letter, rank in zip(LETTERS, RANKS, strict=True)
        if row[rank]
    ]
    if not best:
        return f"{row['sequence_id']}\t\t\t\n"
    return f"{row['sequence_id']}\t{','.join(best)}\t+\t{','.join(kept)}\n"


def krona_path(row: Row) -> tuple[str, ...]:
    """Names for Krona; a gap is filled, since it would make a wedge without a name."""
    names = known_part(names_of(row))
    if not names:
        return (UNASSIGNED,)
    return tuple(name or f"(no {rank})" for name, rank in zip(names, RANKS, strict=False))


FAIRE_COLUMNS = (
    "seq_id",
    "dna_sequence",
    *RANKS,
    "taxonRank",
    "scientificName",
    "verbatimIdentification",
    "percent_match",
    "percent_query_cover",
    "confidence_score",
    "accession_id",
    "accession_id_ref_db",
)


def agreeing_hit(row: Row) -> Mapping[str, Any] | None:
    """The most identical hit whose lineage has the names that were given, None if none has."""
    for hit in row["hits"] or ():
        theirs = hit["lineage"].split(";")
        if all(a in (None, b) or b == "?" for a, b in zip(names_of(row), theirs, strict=False)):
            return hit
    return None


def faire_cells(row: Row, reference: str) -> list[object]:
    """A row of FAIRe's taxa table."""
    hit = agreeing_hit(row)
    names = known_part(names_of(row))
    return [
        row["sequence_id"],
        row["dna_sequence"],
        *[name or "" for name in names_of(row)],
        row["assigned_rank"] or "",
        names[-1] if names else "incertae sedis",
        lineage_text(names_of(row, "best_")),
        f"{100 * hit['identity']:.2f}" if hit else "",
        f"{100 * hit['query_coverage']:.2f}" if hit else "",
        f"{row['confidence']:.4f}" if row["confidence"] is not None else "",
        hit["reference_id"] if hit else "",
        reference if hit else "",
    ]


def write_biom(
    path: Path,
    rows: Iterable[Row],
    counts: Counts,
    row_of: Mapping[str, int],
    samples: Sequence[Sample],
    made_by: str,
) -> None:
    """Write BIOM 2.1 with `taxonomy` and, where there is any, sample metadata.

    Args:
        path: of the file.
        rows: classified.
        counts: rows without reads are left out.
        row_of: row of `counts` by sequence_id.
        samples: of the columns of `counts`.
        made_by: the program.
    """
    import biom
    import h5py

    taxa = _by_count_row(rows, row_of)
    nothing = [None] * len(RANKS)
    kept = _with_reads(counts)
    ids = _ids_of(kept, counts, row_of)
    observation = [{"taxonomy": _seven_prefixed(taxa.get(row, nothing))} for row in kept]
    columns = sorted({column for sample in samples for column in sample.fields})
    metadata = None
    if columns:
        metadata = [{c: sample.fields.get(c, "") for c in columns} for sample in samples]
    table = biom.Table(
        counts.matrix[kept], ids, counts.samples, observation or None, metadata, type="OTU table"
    )
    with h5py.File(path, "w") as file:
        table.to_hdf5(file, made_by)


def _seven_prefixed(names: Sequence[str | None]) -> list[str]:
    # A None among them would be an error of the format; ragged lists would be padded with it.
    return [f"{letter}__{name or ''}" for letter, name in zip(LETTERS, names, strict=True)]


def _by_count_row(rows: Iterable[Row], row_of: Mapping[str, int]) -> dict[int, list[str | None]]:
    """Names of each row of the counts."""
    names = ((row_of.get(row["sequence_id"]), names_of(row)) for row in rows)
    return {place: found for place, found in names if place is not None}


def _with_reads(counts: Counts) -> list[int]:
    """Rows that have any; what was only in controls that were removed has none."""
    return np.flatnonzero(np.asarray(counts.matrix.sum(1)).ravel()).tolist()


def _ids_of(rows: Sequence[int], counts: Counts, row_of: Mapping[str, int]) -> list[str]:
    """The sequence_id of rows, as in the other files; of what has none, its name in the counts."""
    name_of = {row: name for name, row in row_of.items()}
    return [name_of.get(row, counts.ids[row]) for row in rows]


def write_phyloseq(
    folder: Path,
    rows: Iterable[Row],
    counts: Counts,
    row_of: Mapping[str, int],
    samples: Sequence[Sample],
) -> None:
    """Write otu_table.tsv, tax_table.tsv (always seven ranks) and sample_data.tsv.

    All with row names, for `read.delim(file, row.names = 1, check.names = FALSE)`. The arguments
    are those of `write_biom`.
    """
    folder.mkdir(exist_ok=True)
    taxa = _by_count_row(rows, row_of)
    nothing = [None] * len(RANKS)
    kept = _with_reads(counts)

    def table(name: str, header: Sequence[str], lines: Iterator[Sequence[object]]) -> None:
        with open(folder / name, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, delimiter="\t", lineterminator="\n")
            writer.writerow(header)
            writer.writerows(lines)

    ids = [one_word(name) for name in _ids_of(kept, counts, row_of)]
    table(
        "otu_table.tsv",
        ["ASV", *counts.samples],
        ([name, *counts.matrix[row].toarray()[0]] for row, name in zip(kept, ids, strict=True)),
    )
    table(
        "tax_table.tsv",
        ["ASV", *[rank.capitalize() for rank in RANKS]],
        (
            [name, *[text or "NA" for text in taxa.get(row, nothing)]]
            for row, name in zip(kept, ids, strict=True)
        ),
    )
    known = sorted({column for sample in samples for column in sample.fields})
    table(
        "sample_data.tsv",
        ["sample", "latitude", "longitude", "depth_m", "date", "category", "is_control", *known],
        (
            [
                sample.name,
                *[
                    "NA" if value is None else value
                    for value in (
                        sample.latitude,
                        sample.longitude,
                        sample.min_depth_m,
                        sample.date,
                        sample.category,
                    )
                ],
                str(sample.is_control).upper(),
                *[sample.fields.get(column, "NA") for column in known],
            ]
            for sample in samples
        ),
    )
