"""FASTA and FASTQ to raw records.

Input: the name or address of a FASTA or FASTQ file, plain or gzip.
Output: `Records`, a few at a time, in the order of the file.
Invariants: no more than one chunk of records is held; a file that breaks off gives every record
that was whole, and then an `InputError`.
"""

import itertools
import logging
from collections.abc import Callable, Iterator

import dnaio
import numpy as np
import pyarrow as pa

from ..errors import InputError
from .inputs import filesystem_of, format_of, is_remote
from .lineages import RANKS, split_header
from .raw import ReadOptions, Records, all_done, first_line

log = logging.getLogger(__name__)


def read_fasta(
    source: str, options: ReadOptions, is_wanted: Callable[[int, int], bool], done: np.ndarray
) -> Iterator[Records]:
    """Read one FASTA or FASTQ file; see `read_records`."""
    row = 0
    try:
        if is_remote(source):
            filesystem, path = filesystem_of(source)
            compression = "gzip" if source.lower().endswith(".gz") else None
            target = filesystem.open(path, "rb", compression=compression)
        else:
            target = source
        # One record beyond the chunk is never read, so a break loses nothing that came before it.
        with dnaio.open(target, fileformat=format_of(source), open_threads=0) as reader:
            records = iter(reader)
            while True:
                headers, sequences, broken = _take(records, options.chunk_rows)
                if headers:
                    is_mine = is_wanted(row, len(headers))
                    if not all_done(done, row, len(headers)):
                        yield _from_headers(row, headers, sequences if is_mine else None, options)
                    row += len(headers)
                if broken is not None:
                    raise broken
                if not headers:
                    break
    except (OSError, EOFError, ValueError, dnaio.FileFormatError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{source}: breaks off after record {row} ({first_line(error)}); "
            "copy the file again. What came before it is kept"
        ) from error
    if row == 0:
        log.warning("%s holds no record", source)


def _take(records: Iterator, count: int) -> tuple[list[str], list[str], Exception | None]:
    headers, sequences = [], []
    try:
        for record in itertools.islice(records, count):
            headers.append(record.name)
            sequences.append(record.sequence)
    except (OSError, EOFError, ValueError, dnaio.FileFormatError) as error:
        return headers, sequences, error
    return headers, sequences, None


def _from_headers(
    first_row: int, headers: list[str], sequences: list[str] | None, options: ReadOptions
) -> Records:
    if options.header_taxonomy is None:
        ids = [header.split(maxsplit=1)[0] if header.strip() else None for header in headers]
        return Records(first_row, ids, sequences, pa.table({}))
    split = [split_header(header, options.header_taxonomy) for header in headers]
    columns = zip(*(lineage for _, lineage in split), strict=True)
    metadata = pa.table(
        {rank: pa.array(names, pa.string()) for rank, names in zip(RANKS, columns, strict=True)}
    )
    return Records(first_row, [name or None for name, _ in split], sequences, metadata)
