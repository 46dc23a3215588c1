"""What a column was probably meant to be called.

Input: the columns that are missing and those that a file has.
Output: the mapping that would name them.
Invariants: no column of the file is suggested twice.
"""

import difflib
import re
from collections.abc import Sequence

_OTHER_NAMES = {
    "sequence_id": (
        *("sequenceid", "seqid", "id", "name", "header", "recordid", "readid", "accession"),
        *("processid", "asvid", "asv", "otuid", "otu", "featureid", "identifier"),
    ),
    "dna_sequence": (
        *("dnasequence", "dnaseq", "dna", "sequence", "seq", "sequences", "nucleotides"),
        *("nucleotidesequence", "nucraw", "nuc", "barcode", "read", "bases"),
    ),
}
_LEAST_LIKENESS = 0.6


def suggest_columns(missing: Sequence[str], names: Sequence[str]) -> str | None:
    """`dna_sequence=dna_seq sequence_id=ID`, or None if no column is similar."""
    free = list(names)
    pairs = []
    for our in missing:
        if near := _nearest(our, free):
            free.remove(near)
            pairs.append(f"{our}={near}")
    return " ".join(pairs) or None


def _nearest(our: str, names: Sequence[str]) -> str | None:
    plain = {re.sub(r"[^a-z0-9]", "", name.lower()): name for name in reversed(names)}
    for other in _OTHER_NAMES.get(our, ()):
        if other in plain:
            return plain[other]
    likely = difflib.get_close_matches(our.replace("_", ""), plain, 1, _LEAST_LIKENESS)
    return plain[likely[0]] if likely else None
