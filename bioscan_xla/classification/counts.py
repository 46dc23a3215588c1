"""Counts of sequences by sample, and what is known of the samples.

Input: a count table (TSV, CSV or BIOM 2.1) and sample metadata (FAIRe or plain). Output: `Counts`
and a `Sample` for each of its columns. Invariants: samples keep the table's order; a negative
control is known by its category; a value such as "not applicable" counts as missing.
"""

import csv
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from .kmers import reverse_complement

_DNA = re.compile(r"^[ACGTUN]{20,}$", re.IGNORECASE)
_NO_VALUE = re.compile(
    r"^(|na|n/a|nan|null|none|unknown|not applicable|not collected|not provided|not recorded"
    r"|missing.*|restricted access)$",
    re.IGNORECASE,
)
_CONTROL = re.compile(r"negative|blank|\bntc\b|no.template|^neg|^control$", re.IGNORECASE)

_ALIASES = {
    "latitude": ("decimalLatitude", "latitude", "lat"),
    "longitude": ("decimalLongitude", "longitude", "lon", "long"),
    "min_depth_m": ("minimumDepthInMeters", "depth", "depth_m", "min_depth_m"),
    "max_depth_m": ("maximumDepthInMeters", "max_depth_m", "depth", "depth_m"),
    "date": ("eventDate", "collection_date", "date", "event_date"),
    "category": ("samp_category", "sample_category", "category", "sample_type", "control"),
}
_SAMPLE_IDS = ("samp_name", "sample-id", "sample_id", "sampleid", "sample id", "sample", "id")


@dataclass(frozen=True)
class Sample:
    """A column of the count table.

    Attributes:
        name: as the count table has it.
        fields: all metadata that have a value.
        latitude: degrees north.
        longitude: degrees east.
        min_depth_m: metres below the surface.
        max_depth_m: metres below the surface.
        date: ISO 8601.
        category: of the sample; None if not given.
        is_control: True for negative controls.
    """

    name: str
    fields: Mapping[str, str] = field(default_factory=dict)
    latitude: float | None = None
    longitude: float | None = None
    min_depth_m: float | None = None
    max_depth_m: float | None = None
    date: str | None = None
    category: str | None = None
    is_control: bool = False


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

    def rows(self) -> dict[str, int]:
        """Row of each id; of a sequence also under its other strand."""
        result = {}
        for row, name in enumerate(self.ids):
            result[name] = row
            if _DNA.match(name):
                text = name.upper().replace("U", "T")
                result.setdefault(text, row)
                result.setdefault(reverse_complement(text), row)
        return result


def read_counts(path: str) -> Counts:
    """Read a count table.

    Rows are sequences and columns samples, as QIIME 2 exports it and BIOM holds it. Where the
    columns are named by DNA sequences, as in DADA2's table, it is turned round.

    Raises:
        InputError: it cannot be read, or a count is not a whole number.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: no such count table; check the path")
    if path.lower().endswith((".biom", ".hdf5", ".h5")):
        counts = _read_biom(path)
    else:
        counts = _read_text(path)
    twice = [name for name, number in _tally(counts.ids).items() if number > 1]
    if twice:
        raise InputError(f"{path}: the row {twice[0]!r} occurs twice; add up its counts")
    return counts


def _tally(names: Sequence[str]) -> dict[str, int]:
    result: dict[str, int] = {}
    for name in names:
        result[name] = result.get(name, 0) + 1
    return result


def _read_biom(path: str) -> Counts:
    import biom

    try:
        table = biom.load_table(path)
    except Exception as error:  # h5py and json have errors of their own
        raise InputError(f"{path}: cannot be read as BIOM ({error})") from error
    matrix = table.matrix_data.tocsr()
    _check_whole(path, matrix.data)
    return Counts(
        [str(name) for name in table.ids("observation")],
        [str(name) for name in table.ids("sample")],
        matrix.astype(np.int64),
    )


def _read_text(path: str) -> Counts:
    from scipy.sparse import csr_matrix

    lines = _table_lines(path)
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
            try:
                value = float(cell)
            except ValueError:
                raise InputError(
                    f"{path}: row {number} ({row[0]}), column {header[at]!r}: {cell!r} is "
                    "not a count"
                ) from None
            if value:
                data.append(value)
                columns.append(place)
        starts.append(len(data))
    if width is None:
        raise InputError(f"{path}: has a header but no counts")
    samples = [names[at - 1] for at in use]
    values = np.array(data)
    _check_whole(path, values)
    shape = len(ids), len(samples)
    matrix = csr_matrix((values.astype(np.int64), columns, starts), shape=shape)
    if samples and all(_DNA.match(name) for name in samples):
        return Counts(samples, ids, matrix.T.tocsr())
    return Counts(ids, samples, matrix)


def _is_text_column(name: str) -> bool:
    return name.strip().lower() in ("taxonomy", "confidence", "sequence", "dna_sequence", "taxon")


def _check_whole(path: str, values: np.ndarray) -> None:
    wrong = values[(values < 0) | (values != np.floor(values))]
    if len(wrong):
        raise InputError(
            f"{path}: {wrong[0]:g} is not a count; the table must hold reads, not fractions"
        )


def _table_lines(path: str) -> Iterator[list[str]]:
    """Cells of a TSV or CSV; comments are skipped, but not a header that begins with `#`."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        text = file.read(65536)
        file.seek(0)
        first = next((line for line in text.splitlines() if not _is_comment(line)), "")
        delimiter = "\t" if "\t" in first else ","
        lines = (line for line in file if not _is_comment(line))
        for row in csv.reader(lines, delimiter=delimiter):
            if any(cell.strip() for cell in row):
                yield [row[0].lstrip("#").strip(), *row[1:]]


def _is_comment(line: str) -> bool:
    if not line.startswith("#"):
        return False
    return not re.match(r"#\s?(otu|feature|sample|asv)[\s_-]?id", line, re.IGNORECASE)


def read_samples(paths: Sequence[str], names: Sequence[str]) -> list[Sample]:
    """What is known of the columns of a count table.

    Args:
        paths: metadata files. Where the table's columns are libraries, one file says which sample
            each came from (FAIRe's `lib_id` and `samp_name`).
        names: columns of the count table.

    Raises:
        InputError: no file names any of the columns, or a position is not a number.
    """
    tables = [_read_metadata(path) for path in paths]
    found: dict[str, dict[str, str]] = {}
    best = _best_key(tables, names)
    if best is None:
        raise InputError(
            f"{', '.join(paths)}: no column names the samples of the count table, such as "
            f"{names[0]!r}; add the file that links libraries to samples (FAIRe's experiment run "
            "metadata with lib_id and samp_name)"
        )
    place, key = best
    by_sample: list[dict[str, dict[str, str]]] = []
    for at, rows in enumerate(tables):
        column = _sample_column(rows)
        if at != place and column:
            by_sample.append({row[column]: row for row in rows if row.get(column)})
    linked = _sample_column(tables[place])
    for row in tables[place]:
        if row.get(key):
            merged: dict[str, str] = {}
            for other in by_sample:
                merged |= other.get(row.get(linked or key, ""), {})
            found[row[key]] = {**row, **merged}
    return [_make_sample(name, found.get(name, {}), paths) for name in names]


def _read_metadata(path: str) -> list[dict[str, str]]:
    if not Path(path).is_file():
        raise InputError(f"{path}: no such metadata file; check the path")
    lines = _table_lines(path)
    header = next(lines, [])
    rows = []
    for cells in lines:
        pairs = zip(header, cells, strict=False)
        rows.append({k: v.strip() for k, v in pairs if k and not _NO_VALUE.match(v.strip())})
    return rows


def _sample_column(rows: Sequence[Mapping[str, str]]) -> str | None:
    columns = {name.lower(): name for row in rows for name in row}
    return next((columns[name] for name in _SAMPLE_IDS if name in columns), None)


def _best_key(
    tables: Sequence[Sequence[Mapping[str, str]]], names: Sequence[str]
) -> tuple[int, str] | None:
    wanted = set(names)
    hits: dict[tuple[int, str], int] = {}
    for at, rows in enumerate(tables):
        for row in rows:
            for column, value in row.items():
                if value in wanted:
                    hits[at, column] = hits.get((at, column), 0) + 1
    return max(hits, key=lambda key: hits[key]) if hits else None


def _make_sample(name: str, fields: Mapping[str, str], paths: Sequence[str]) -> Sample:
    lower = {column.lower(): column for column in fields}

    def value(kind: str) -> str | None:
        columns = (lower.get(alias.lower()) for alias in _ALIASES[kind])
        return next((fields[column] for column in columns if column), None)

    def number(kind: str, limit: float) -> float | None:
        text = value(kind)
        if text is None:
            return None
        try:
            result = float(text)
        except ValueError:
            result = float("nan")
        if not abs(result) <= limit:
            raise InputError(
                f"{', '.join(paths)}: {kind} of sample {name!r} is {text!r}; it must be a number "
                f"from -{limit:g} to {limit:g}"
            )
        return result

    category = value("category")
    return Sample(
        name,
        dict(fields),
        number("latitude", 90),
        number("longitude", 180),
        number("min_depth_m", 12_000),
        number("max_depth_m", 12_000),
        value("date"),
        category,
        bool(category and _CONTROL.search(category)),
    )
