"""Files to raw records: each file goes to the reader of its format.

Input: names of files, local or in the cloud.
Output: `Records`, a few at a time, in the order of the file, as text that nobody has judged yet.
Invariants: no more than one batch of rows is held; a file that breaks off gives all that could be
read and then an `InputError`.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pyarrow as pa

from ..errors import InputError
from .fasta import read_fasta
from .inputs import format_of
from .lineages import RANKS
from .parquet import open_parquet, read_parquet, require_columns
from .raw import POSITIONS, ReadOptions, Records


def count_rows(sources: Sequence[str]) -> int | None:
    """Rows in all files, from Parquet footers; None where only reading them would tell."""
    if any(format_of(source) != "parquet" for source in sources):
        return None
    try:
        return sum(open_parquet(source).metadata.num_rows for source in sources)
    except InputError:
        return None  # reading will come to this file and say so


def metadata_schema(sources: Sequence[str], options: ReadOptions) -> pa.Schema:
    """Schema of the metadata columns: ranks, depth and position, kept columns."""
    fields = [pa.field(rank, pa.string()) for rank in RANKS]
    fields += [pa.field(name, pa.float64()) for name in POSITIONS]
    kept = dict.fromkeys(options.keep, pa.string())
    for source in sources if options.keep else ():
        if format_of(source) == "parquet":
            schema = open_parquet(source).schema_arrow
            require_columns(source, schema, options.keep, "keep")
            kept = {name: schema.field(name).type for name in options.keep}
            break
    return pa.schema(fields + [pa.field(*item) for item in kept.items()])


def read_records(
    source: str, options: ReadOptions, is_wanted: Callable[[int, int], bool], done: np.ndarray
) -> Iterator[Records]:
    """Read one file.

    Args:
        source: file or URL.
        options: column names and rows at a time.
        is_wanted: of a first row and a number of rows, whether sequences among them are wanted;
            of other rows only ids are read.
        done: bool, by row; stretches that are all True are passed over.

    Raises:
        InputError: after all that could be read.
    """
    if format_of(source) == "parquet":
        return read_parquet(source, options, is_wanted, done)
    return read_fasta(source, options, is_wanted, done)
