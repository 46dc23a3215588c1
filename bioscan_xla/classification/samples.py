"""What is known of the samples of a count table.

Input: sample metadata, FAIRe or plain. Output: a `Sample` for each column of the table.
Invariants: samples keep the table's order; a negative control is known by its category; a value
such as "not applicable" counts as missing.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

from ..errors import InputError
from .counts import table_lines

_NO_VALUE = re.compile(
    r"^(|na|n/a|nan|null|none|unknown|not applicable|not collected|not provided|not recorded"
    r"|missing.*|restricted access)$",
    re.IGNORECASE,
)
_CONTROL = re.compile(
    r"negative|blank|\bntc\b|no.template|^neg|^control$|(extraction|pcr|filtration|field).control",
    re.IGNORECASE,
)
_POSITIVE = re.compile(r"positive|^pos\b|\bmock\b", re.IGNORECASE)
_YES = re.compile(r"^(true|t|yes|y|1)$", re.IGNORECASE)
_DATE = re.compile(
    r"^\d{4}(-\d\d(-\d\d(T\d\d[\d:.,]*(Z|[+-]\d\d[\d:]*)?)?)?)?(/\d\d[\dT:.,Z+-]*)?$"
)
_ALIASES = {
    "latitude": ("decimalLatitude", "latitude", "lat"),
    "longitude": ("decimalLongitude", "longitude", "lon", "long"),
    "min_depth_m": ("minimumDepthInMeters", "depth", "depth_m", "min_depth_m"),
    "max_depth_m": ("maximumDepthInMeters", "max_depth_m", "depth", "depth_m"),
    "date": ("eventDate", "collection_date", "date", "event_date"),
    "category": (
        "samp_category",
        "sample_category",
        "category",
        "sample_type",
        "sample-type",
        "sampletype",
        "type",
    ),
    "control": ("control", "is_control", "negative_control", "is_negative_control"),
}
_DEEPEST_M = 12_000.0
_MOST_TOLD = 10
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
        date: ISO 8601, a day, a time or an interval.
        category: of the sample; None if not given.
        is_control: True for negative controls, by a word such as "negative control" or "blank" in
            the category or in a column for controls, or by "yes" in the latter.
        is_positive_control: True where these say "positive control" or "mock community".
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
    is_positive_control: bool = False


def read_samples(paths: Sequence[str], names: Sequence[str]) -> list[Sample]:
    """What is known of the columns of a count table.

    Args:
        paths: metadata files. Where the table's columns are libraries, one file says which sample
            each came from (FAIRe's `lib_id` and `samp_name`).
        names: columns of the count table.

    Raises:
        InputError: a file cannot be read, no file names any of the columns, two rows of a sample
            differ, or positions, depths or dates are wrong; all of these are told at once.
    """
    tables = [_read_metadata(path) for path in paths]
    found: dict[str, dict[str, str]] = {}
    best = _best_key(tables, names)
    if best is None:
        raise InputError(
            f"{', '.join(paths)}: no column names the samples of the count table, such as "
            f"{names[0]!r}; add the file that links libraries to samples (FAIRe's experiment run "
            "metadata with lib_id and samp_name). If the columns of the table are sequences, "
            "transpose it"
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
            fields = {**row, **merged}
            if found.setdefault(row[key], fields) != fields:
                raise InputError(
                    f"{paths[place]}: sample {row[key]!r} has two rows that differ; keep one"
                )
    problems: list[str] = []
    samples = [_make_sample(name, found.get(name, {}), problems) for name in names]
    if problems:
        shown = problems[:_MOST_TOLD]
        if len(problems) > len(shown):
            shown.append(f"and {len(problems) - len(shown)} more")
        raise InputError(f"{', '.join(paths)}:\n  " + "\n  ".join(shown))
    return samples


def _read_metadata(path: str) -> list[dict[str, str]]:
    if not Path(path).is_file():
        raise InputError(f"{path}: no such metadata file; check the path")
    lines = table_lines(path)
    header = next(lines, [])
    twice = [column for column, number in Counter(header).items() if column and number > 1]
    if twice:
        raise InputError(f"{path}: the column {twice[0]!r} occurs twice; keep one")
    rows = []
    for number, cells in enumerate(lines, 1):
        if any(cell.strip() for cell in cells[len(header) :]):
            raise InputError(
                f"{path}: row {number} ({cells[0]}) has {len(cells)} cells where the header has "
                f"{len(header)}; put a cell that holds a comma in quotes"
            )
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


def _make_sample(name: str, fields: Mapping[str, str], problems: list[str]) -> Sample:
    """A sample; what is wrong with it is added to the problems."""
    lower = {column.lower(): column for column in fields}

    def column_of(kind: str) -> str | None:
        columns = (lower.get(alias.lower()) for alias in _ALIASES[kind])
        return next((column for column in columns if column), None)

    def value(kind: str) -> str | None:
        column = column_of(kind)
        return fields[column] if column else None

    def number(kind: str, low: float, high: float, unit: str) -> float | None:
        text = value(kind)
        if text is None:
            return None
        try:
            result = float(text)
        except ValueError:
            result = float("nan")
        if not low <= result <= high:
            hint = "; write a point, not a comma" if re.match(r"^-?\d+,\d+$", text) else ""
            problems.append(
                f"{column_of(kind)} of sample {name!r} is {text!r}; it must be a number from "
                f"{low:g} to {high:g}, in {unit}{hint}"
            )
        return result

    category, control, when = value("category"), value("control"), value("date")
    if when is not None and not _is_date(when := when.replace(" ", "T")):
        problems.append(
            f"date of sample {name!r} is {value('date')!r}; write it as ISO 8601, such as "
            "2024-05-31 or 2024-05-31T14:30Z"
        )
    latitude = number("latitude", -90, 90, "degrees north")
    longitude = number("longitude", -180, 180, "degrees east")
    shallowest = number("min_depth_m", 0, _DEEPEST_M, "metres below the surface")
    deepest = number("max_depth_m", 0, _DEEPEST_M, "metres below the surface")
    if shallowest is not None and deepest is not None and deepest < shallowest:
        problems.append(
            f"{column_of('max_depth_m')} of sample {name!r} is {deepest:g}, less than "
            f"{column_of('min_depth_m')}, {shallowest:g}"
        )
    words = [word for word in (category, control) if word]
    is_positive = any(_POSITIVE.search(word) for word in words)
    is_control = not is_positive and (
        any(_CONTROL.search(word) for word in words) or bool(control and _YES.match(control))
    )
    return Sample(
        name,
        dict(fields),
        latitude,
        longitude,
        shallowest,
        deepest,
        when,
        category,
        is_control,
        is_positive,
    )


def _is_date(text: str) -> bool:
    """True for a day, a time or an interval in ISO 8601."""
    if not _DATE.match(text):
        return False
    try:
        date.fromisoformat((text.split("T")[0].split("/")[0] + "-01-01")[:10])
    except ValueError:
        return False
    return True
