"""Counts of sequences by sample.

Input: a count table: TSV, CSV or BIOM 2.1. Output: `Counts`. Invariants: rows are sequences and
columns samples, whichever way round the table is; every count is a whole number.
"""

import csv
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from .kmers import reverse_complement

_DNA = re.compile(r"^[ACGTUN]{20,}$", re.IGNORECASE)


@dataclass(frozen=True)
class Counts:
    """Reads of each sequence in each sample.

    Attributes:
        ids: of the rows; sequences where the table names rows by sequence.
        samples: of the columns.
        matrix: scipy sparse, (rows, columns).
    """

    ids: list[str]
    samples: list[str]
    matrix: Any

    def match(self, records: Iterable[tuple[str, str]]) -> dict[str, int]:
        """Row of each record that has one: by its id, its sequence, or the other strand of it.

        A row belongs to one record, so that no read is counted twice: to that which fits best in
        this order, and of these to the first.

        Args:
            records: ids, and sequences as they were read.

        Returns:
            Rows by id.
        """
        by_id = {name: row for row, name in enumerate(self.ids)}
        texts = {
            name.upper().replace("U", "T"): row for name, row in by_id.items() if _DNA.match(name)
        }
        turned = {reverse_complement(text): row for text, row in texts.items()}
        owners: tuple[dict[int, str], ...] = ({}, {}, {})
        for name, sequence in records:
            ways = by_id.get(name), texts.get(sequence), turned.get(sequence)
            found = next(((at, row) for at, row in enumerate(ways) if row is not None), None)
            if found is not None:
                owners[found[0]].setdefault(found[1], name)
        of_id, of_text, of_turned = owners
        return {name: row for row, name in (of_turned | of_text | of_id).items()}


def read_counts(path: str) -> Counts:
    """Read a count table.

    Rows are sequences and columns samples, as QIIME 2 exports it and BIOM holds it. Where the
    columns are named by DNA sequences, as in DADA2's table, it is turned round.

    Raises:
        InputError: it cannot be read, or a count is not a whole number.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: no such count table; check the path")
    with open(path, "rb") as file:
        if file.read(1) in (b">", b"@"):
            raise InputError(
                f"{path}: holds sequences, not counts; a count table has a row for each sequence "
                "and a column for each sample. Pass the sequences as --input"
            )
    if path.lower().endswith((".biom", ".hdf5", ".h5")):
        counts = _read_biom(path)
    else:
        counts = _read_text(path)
    for kind, names in (("row", counts.ids), ("column", counts.samples)):
        twice = [name for name, number in Counter(names).items() if number > 1]
        if twice:
            raise InputError(f"{path}: the {kind} {twice[0]!r} occurs twice; add up its counts")
    _refuse_sums(path, counts)
    return counts


def _refuse_sums(path: str, counts: Counts) -> None:
    sums = np.asarray(counts.matrix.sum(1)).ravel()
    for column, name in enumerate(counts.samples):
        if re.fullmatch(r"(row\W?)?(total|sum)s?", name.strip(), re.IGNORECASE):
            reads = np.asarray(counts.matrix[:, [column]].sum(1)).ravel()
            if len(counts.samples) > 1 and (2 * reads == sums).all():
                raise InputError(
                    f"{path}: the column {name!r} is the sum of the others, not a sample; remove it"
                )


def _read_biom(path: str) -> Counts:
    import biom

    try:
        table = biom.load_table(path)
    except Exception as error:  # h5py and json have errors of their own
        raise InputError(f"{path}: cannot be read as BIOM ({error})") from error
    ids = [str(name) for name in table.ids("observation")]
    samples = [str(name) for name in table.ids("sample")]
    matrix = table.matrix_data.tocoo()
    wrong = np.flatnonzero(~_are_counts(matrix.data))
    if len(wrong):
        at = wrong[0]
        where = f"row {ids[matrix.row[at]]!r}, column {samples[matrix.col[at]]!r}"
        raise _no_count(path, where, matrix.data[at])
    return Counts(ids, samples, matrix.tocsr().astype(np.int64))


def _read_text(path: str) -> Counts:
    from scipy.sparse import csr_matrix

    lines = table_lines(path)
    header = next(lines, None)
    if header is None:
        raise InputError(f"{path}: the file is empty")
    ids, data, columns, starts = [], [], [], [0]
    width = None
    for number, row in enumerate(lines, 1):
        if width is None:
            width = len(row)
            if len(header) == width - 1:  # R omits the header of the row names
                header = ["", *header]
            names = header[1:]
            use = [at for at, name in enumerate(names, 1) if not _is_text_column(name)]
        if len(row) != width:
            raise InputError(
                f"{path}: row {number} has {len(row)} cells where the first has {width}"
            )
        ids.append(row[0])
        for place, at in enumerate(use):
            cell = row[at].strip()
            if cell in ("", "0", "0.0"):
                continue
            where = f"row {number} ({row[0]}), column {header[at]!r}"
            try:
                value = float(cell)
            except ValueError:
                raise InputError(f"{path}: {where}: {cell!r} is not a count") from None
            if not _are_counts(np.array(value)):
                raise _no_count(path, where, value)
            if value:
                data.append(value)
                columns.append(place)
        starts.append(len(data))
    if width is None:
        raise InputError(f"{path}: has a header but no counts")
    samples = [names[at - 1] for at in use]
    if not samples:
        raise InputError(
            f"{path}: has no column of counts; the first column names the sequences, each further "
            "one is a sample. Columns are separated by tabs, commas or semicolons"
        )
    shape = len(ids), len(samples)
    matrix = csr_matrix((np.array(data, np.int64), columns, starts), shape=shape)
    if all(_DNA.match(name) for name in samples):
        return Counts(samples, ids, matrix.T.tocsr())
    return Counts(ids, samples, matrix)


def _is_text_column(name: str) -> bool:
    return name.strip().lower() in ("taxonomy", "confidence", "sequence", "dna_sequence", "taxon")


def _are_counts(values: np.ndarray) -> np.ndarray:
    return np.isfinite(values) & (values >= 0) & (values == np.floor(values))


def _no_count(path: str, where: str, value: float) -> InputError:
    return InputError(
        f"{path}: {where}: {value:g} is not a count; the table must hold numbers of reads, not "
        "fractions"
    )


def table_lines(path: str) -> Iterator[list[str]]:
    """Cells of a TSV, or of a CSV with commas or semicolons.

    Comments are skipped, but not a header that begins with `#`.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            text = file.read(65536)
            file.seek(0)
            first = next((line for line in text.splitlines() if not _is_comment(line)), "")
            delimiter = "\t" if "\t" in first else max(",;", key=first.count)
            lines = (line for line in file if not _is_comment(line))
            for row in csv.reader(lines, delimiter=delimiter):
                if any(cell.strip() for cell in row):
                    yield [row[0].lstrip("#").strip(), *row[1:]]
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: is not UTF-8 text ({error.reason}); save it as 'CSV UTF-8', or as "
            "tab-separated text in UTF-8"
        ) from error
    except csv.Error as error:
        raise InputError(f"{path}: cannot be read as a table ({error})") from error


def _is_comment(line: str) -> bool:
    if not line.startswith("#"):
        return False
    return not re.match(r"#\s?(otu|feature|sample|asv)[\s_-]?id", line, re.IGNORECASE)
