"""Cleaning of sequences, and the reasons for rejecting one.

Input: sequences as text. Output: upper-case ACGTN, complaints, and which each rule changed.
Invariants: cleaning is idempotent; every sequence that breaks a rule has exactly one complaint.
"""

from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple

import numpy as np

from .raw import ReadOptions

CLEANING = ("case", "u_to_t", "gaps", "iupac_to_n", "trimmed_n", "id_stripped", "nan_position")
"""Changes that are counted: five rules for sequences, in the order they are applied; white space
around an id; a position that is NaN, which becomes null."""


class Code(str, Enum):
    """Why a record is rejected; the value is in column `code` of `rejected.parquet`."""

    NO_ID = "no_id"
    """No id, or only white space."""
    ID_SEEN_BEFORE = "id_seen_before"
    """An earlier record, or one in the table, has the same id."""
    EMPTY_SEQUENCE = "empty_sequence"
    """No sequence, or nothing but gaps."""
    ONLY_N = "only_n"
    """The sequence is nothing but N."""
    TOO_SHORT = "too_short"
    """Shorter than `min_length_bp` after cleaning."""
    TOO_MANY_N = "too_many_n"
    """A larger share of N than `max_n_fraction` after cleaning."""
    NOT_A_NUCLEOTIDE = "not_a_nucleotide"
    """A character that is not a nucleotide code, as in a protein sequence."""
    WRONG_QUALITY = "wrong_quality"
    """FASTQ: the number of quality values differs from the number of bases."""
    IMPOSSIBLE_VALUE = "impossible_value"
    """A depth or position that is not a number or out of range."""
    VECTOR_NOT_FINITE = "vector_not_finite"
    """The model gave a vector with NaN or infinity; a run with another model tries it again."""
    UNKNOWN = "unknown"
    """Rejected by an earlier version, which recorded no codes."""

    @property
    def words(self) -> str:
        """The code in words."""
        return self.value.replace("_", " ")


class Complaint(NamedTuple):
    """What is wrong with a record: a code to count by and a sentence to read."""

    code: Code
    reason: str


_LOWER, _URACIL, _GAP, _IUPAC, _N, _ILLEGAL = 1, 2, 4, 8, 16, 32
_GAPS = "-.~ \t\r\n"
_FLAGS = np.full(256, _ILLEGAL, np.uint8)
for _letters, _flag in (("ACGT", 0), ("U", _URACIL), ("RYSWKMBDHV", _IUPAC), ("N", _N)):
    for _letter in _letters:
        _FLAGS[ord(_letter)] = _flag
        _FLAGS[ord(_letter.lower())] = _flag | _LOWER
for _letter in _GAPS:
    _FLAGS[ord(_letter)] = _GAP
_TRANSLATION = str.maketrans("URYSWKMBDHV", "TNNNNNNNNNN", _GAPS)


def clean_sequences(
    sequences: Sequence[str], options: ReadOptions | None = None
) -> tuple[list[str], dict[int, Complaint], dict[str, list[int]]]:
    """Clean sequences: upper case, U to T, gaps out, IUPAC codes to N, surrounding N off.

    Gaps are `-`, `.`, `~` and white space.

    Returns:
        The cleaned sequences; for each unusable one its number and the reason; by rule, the
        numbers of those that it changed.
    """
    options = options or ReadOptions()
    result = list(sequences)
    complaints: dict[int, Complaint] = {}
    cleaned: dict[str, list[int]] = {}
    for number in np.flatnonzero(_flags_of(sequences)).tolist():
        text = sequences[number]
        flags = int(_flags_of([text])[0])
        if flags & _ILLEGAL:
            complaints[number] = Complaint(Code.NOT_A_NUCLEOTIDE, _first_illegal(text))
            continue
        text = text.upper().translate(_TRANSLATION)
        trimmed = text.strip("N")
        changes = (_LOWER, _URACIL, _GAP, _IUPAC)
        rules = [rule for rule, flag in zip(CLEANING, changes, strict=False) if flags & flag]
        rules += ["trimmed_n"] * (len(trimmed) < len(text))
        for rule in rules:
            cleaned.setdefault(rule, []).append(number)
        result[number] = trimmed
        if text and not trimmed:
            complaints[number] = Complaint(Code.ONLY_N, f"{len(text)} bp, all of them N")
        elif trimmed.count("N") > options.max_n_fraction * len(trimmed):
            share = 100 * trimmed.count("N") / len(trimmed)
            limit = 100 * options.max_n_fraction
            complaints[number] = Complaint(
                Code.TOO_MANY_N, f"{share:.0f} % of it is N, more than {limit:.0f} %"
            )
    for number, text in enumerate(result):
        if number in complaints or len(text) >= options.min_length_bp:
            continue
        complaints[number] = (
            Complaint(Code.TOO_SHORT, f"{len(text)} bp, shorter than {options.min_length_bp} bp")
            if text
            else Complaint(Code.EMPTY_SEQUENCE, "empty sequence")
        )
    return result, complaints, cleaned


def _flags_of(sequences: Sequence[str]) -> np.ndarray:
    """For each sequence, the flags of all its characters combined, (sequences,) uint8."""
    text = "\n".join(sequences) + "\n"
    if not text.isascii():
        # A non-ASCII letter would shift the bytes; all of them are illegal.
        text = text.encode("ascii", "replace").decode()
    flags = _FLAGS[np.frombuffer(text.encode(), np.uint8)]
    lengths = np.fromiter(map(len, sequences), np.int64, len(sequences)) + 1
    ends = np.cumsum(lengths)
    flags[ends - 1] = 0  # the separators
    return np.bitwise_or.reduceat(flags, ends - lengths) if len(sequences) else flags[:0]


def _first_illegal(text: str) -> str:
    place, letter = next(
        (place, letter)
        for place, letter in enumerate(text)
        if not letter.isascii() or _FLAGS[ord(letter)] & _ILLEGAL
    )
    return f"character {letter!r} at base {place + 1} is not a nucleotide code"
