"""FASTA and FASTQ to raw records.

Input: the name or address of a FASTA or FASTQ file, plain or gzip.
Output: `Records`, a few at a time, in the order of the file.
Invariants: at most one chunk of records is held; a bad record affects no other; a truncated file
gives every complete record, and then an `InputError`.

The parsers are our own because dnaio, Biopython and others abandon the whole file at the first
non-ASCII header.

Reference: https://doi.org/10.1093/nar/gkp1137 (FASTQ)
"""

import itertools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from ..errors import InputError
from .lineages import RANKS, count_unranked, split_header
from .lines import decode, open_text
from .raw import Broken, ReadOptions, Records, all_done

log = logging.getLogger(__name__)

_BLANKS = " \t\v\f"
_FASTQ_REMEDY = (
    "each record has four lines: @id, the sequence, + and the quality "
    "(`seqkit seq -w 0` puts wrapped sequences on one line)"
)


@dataclass(frozen=True)
class Sequence:
    """One record as it is in the file; `problem` is what is wrong with it, if anything."""

    header: str
    text: str
    problem: str | None = None


def read_fasta(
    source: str, options: ReadOptions, is_wanted: Callable[[int, int], bool], done: np.ndarray
) -> Iterator[Records]:
    """Read one FASTA or FASTQ file; see `read_records`."""
    row = num_unranked = 0
    records = read_sequences(source)
    while True:
        # Never read beyond the chunk, so that damage loses nothing that came before it.
        taken, error = _take(records, options.chunk_rows)
        if taken:
            is_mine = is_wanted(row, len(taken))
            if not all_done(done, row, len(taken)):
                if options.header_taxonomy == "silva" and is_mine:
                    num_unranked += count_unranked(record.header for record in taken)
                yield _from_headers(row, taken, is_mine, options)
            row += len(taken)
        if error is not None:
            raise error
        if not taken:
            break
    if row == 0:
        log.warning("%s contains no records", source)
    if num_unranked:
        log.warning(
            "%s: lineages with names whose rank is unclear: %d; these names are ignored. "
            "Fine-tuning takes exact ranks from a taxonomy TSV (--taxonomy)",
            source,
            num_unranked,
        )


def read_sequences(source: str) -> Iterator[Sequence]:
    """Read the records of one FASTA or FASTQ file.

    Raises:
        InputError: after all that could be read.
    """
    count = 0
    try:
        text = open_text(source)
        parse = _parse_fastq if text.kind == "fastq" else _parse_fasta
        for record in parse(source, text.lines):
            yield record
            count += 1
    except Broken as broken:
        where = f" after record {count}; the records before it are kept" if count else ""
        remedy = broken.remedy[0].upper() + broken.remedy[1:]
        raise InputError(f"{source}: {broken.what}{where}. {remedy}.") from broken


def _take(records: Iterator[Sequence], count: int) -> tuple[list[Sequence], InputError | None]:
    taken = []
    try:
        for record in itertools.islice(records, count):
            taken.append(record)
    except InputError as error:
        return taken, error
    return taken, None


def _parse_fasta(source: str, lines: Iterator[str]) -> Iterator[Sequence]:
    header: str | None = None
    parts: list[str] = []
    num_comments = 0
    for number, raw in enumerate(lines, 1):
        line = raw.strip(_BLANKS)
        if line.startswith(">"):
            if header is not None:
                yield Sequence(decode(header), decode("".join(parts)))
            header, parts = line[1:], []
        elif line.startswith((";", "#")):
            num_comments += 1
        elif header is not None:
            parts.append(line)
        elif line:
            raise Broken(
                f"line {number} ({_shorten(line)}) is not a header",
                "a FASTA record begins with a line of > and its id; add it",
            )
    if header is not None:
        yield Sequence(decode(header), decode("".join(parts)))
    if num_comments:
        log.info("%s: %d comment lines were skipped", source, num_comments)


def _parse_fastq(source: str, lines: Iterator[str]) -> Iterator[Sequence]:
    numbered = enumerate(lines, 1)
    odd: Sequence | None = None  # a record whose quality length is wrong, if it really ends here
    for number, header in numbered:
        if not header.strip(_BLANKS):
            continue
        if not header.startswith("@"):
            raise Broken(
                f"line {number} ({_shorten(header)}) should be a header that begins with @",
                _FASTQ_REMEDY,
            )
        if odd:
            yield odd
            odd = None
        rest = [line.strip(_BLANKS) for _, line in itertools.islice(numbered, 3)]
        if len(rest) > 1 and not rest[1].startswith("+"):
            raise Broken(
                f"line {number + 2} ({_shorten(rest[1])}) should begin with +", _FASTQ_REMEDY
            )
        if len(rest) < 3:
            raise Broken("is truncated", "the last record is incomplete: copy the file again")
        sequence, _, quality = rest
        if len(sequence) == len(quality):
            yield Sequence(decode(header[1:]), decode(sequence))
        else:
            problem = f"{len(quality)} quality values for {len(sequence)} bases"
            odd = Sequence(decode(header[1:]), decode(sequence), problem)
    if odd:
        if len(rest[2]) < len(rest[0]):
            raise Broken("is truncated", "the last record is incomplete: copy the file again")
        yield odd


def _shorten(line: str) -> str:
    line = decode(line)
    return repr(line if len(line) <= 30 else line[:27] + "...")


def _from_headers(
    first_row: int, taken: list[Sequence], is_mine: bool, options: ReadOptions
) -> Records:
    sequences = [record.text for record in taken] if is_mine else None
    problems = {place: record.problem for place, record in enumerate(taken) if record.problem}
    if options.header_taxonomy is None:
        ids = [next(iter(record.header.split(maxsplit=1)), None) for record in taken]
        return Records(first_row, ids, sequences, pa.table({}), problems)
    split = [split_header(record.header, options.header_taxonomy) for record in taken]
    columns = zip(*(lineage for _, lineage in split), strict=True)
    metadata = pa.table(
        {rank: pa.array(names, pa.string()) for rank, names in zip(RANKS, columns, strict=True)}
    )
    return Records(first_row, [name or None for name, _ in split], sequences, metadata, problems)
