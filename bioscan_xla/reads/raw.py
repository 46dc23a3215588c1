"""Raw records: what a reader returns, and its options.

Input: none; nothing is read here.
Output: `ReadOptions` and `Records`, which the readers of every format share.
Invariants: options that contradict each other cannot be made.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import pyarrow as pa

from ..errors import ConfigError
from .lineages import HEADER_STYLES, RANKS

POSITIONS = ("depth", "latitude", "longitude")
"""Columns of numbers: metres below the surface, degrees north, degrees east."""


@dataclass(frozen=True)
class ReadOptions:
    """How records are read and checked.

    Attributes:
        columns: our column name to the file's, where they differ.
        keep: further Parquet columns to carry into the table.
        header_taxonomy: lineage in FASTA headers: `sintax` (`;tax=k:..,p:..;`), `silva`
            (`a;b;c` after the id) or None.
        min_length_bp: shortest usable sequence after cleaning.
        max_n_fraction: largest usable share of N after cleaning.
        chunk_rows: rows read at a time.
        columns_option: the option that gave `columns`, for messages.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    keep: tuple[str, ...] = ()
    header_taxonomy: str | None = None
    min_length_bp: int = 20
    max_n_fraction: float = 0.5
    chunk_rows: int = 1024
    columns_option: str = "columns"

    def __post_init__(self):
        """Refuse contradictory options."""
        ours = ("sequence_id", "dna_sequence", *RANKS, *POSITIONS)
        unknown = sorted(set(self.columns) - set(ours))
        if unknown:
            raise ConfigError(
                f"{self.columns_option} maps {unknown[0]!r}, which is not a column of the table; "
                f"it can map {', '.join(ours)}"
            )
        taken = sorted(set(self.keep) & {*ours, "source", "row", "vector"})
        if taken:
            raise ConfigError(f"keep names {taken[0]!r}, which the table always has; leave it out")
        if self.header_taxonomy not in (None, *HEADER_STYLES):
            raise ConfigError(
                f"header_taxonomy {self.header_taxonomy!r} is unknown; "
                f"choose {' or '.join(HEADER_STYLES)}"
            )

    def name(self, column: str) -> str:
        """The file's name for one of our columns."""
        return self.columns.get(column, column)


def read_options(config: Any, chunk_rows: int = 1024) -> ReadOptions:
    """Reading options from a command's config: the fields that both have."""
    names = {item.name for item in fields(ReadOptions)} & {item.name for item in fields(config)}
    given = {name: getattr(config, name) for name in names}
    keep = tuple(dict.fromkeys(given.get("keep", ())))
    return ReadOptions(**given | {"keep": keep}, chunk_rows=chunk_rows)


@dataclass(frozen=True)
class Records:
    """Consecutive rows of one file, unchanged.

    Attributes:
        first_row: row number in the file, from 0.
        ids: None if the file has none.
        sequences: None if only the ids of these rows are needed.
        metadata: columns that the file has, under our names.
        problems: what is wrong with a record's text, by its position among these rows.
    """

    first_row: int
    ids: list[str | None]
    sequences: Sequence[str | None] | None
    metadata: pa.Table
    problems: Mapping[int, str] = field(default_factory=dict)


class Broken(Exception):
    """A file cannot be read any further; the reader adds the file and the record.

    Attributes:
        what: the end of a sentence that begins with the file's name.
        remedy: what the user can do.
    """

    def __init__(self, what: str, remedy: str):
        super().__init__(what, remedy)
        self.what = what
        self.remedy = remedy


def all_done(done: np.ndarray, first_row: int, num_rows: int) -> bool:
    """True if all of these rows are done."""
    part = done[first_row : first_row + num_rows]
    return len(part) == num_rows and bool(part.all())
