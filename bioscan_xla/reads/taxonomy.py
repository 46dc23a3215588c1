"""A taxonomy table to lineages by id.

Input: a QIIME 2 taxonomy TSV, plain or gzip, local or remote.
Output: the lineage of each id.
Invariants: every line is used or refused with its number; an id has one lineage.
"""

from collections.abc import Iterator

from ..errors import InputError
from .lineages import Lineage, split_ranked
from .lines import decode, read_lines
from .raw import Broken

_HEADERS = ("feature id", "feature-id", "featureid", "id", "otu id", "#otuid", "#otu id")


def read_taxonomy(path: str) -> dict[str, Lineage]:
    """Read a QIIME 2 taxonomy TSV: `Feature ID`, `Taxon` such as `k__Animalia; p__Annelida`.

    Reference: https://docs.qiime2.org/2024.10/tutorials/importing (HeaderlessTSVTaxonomyFormat too)

    Raises:
        InputError: it cannot be read, or a line is not an id and a taxon with a tab between them.
    """
    result: dict[str, Lineage] = {}
    line_of: dict[str, int] = {}
    try:
        for number, name, taxon in _split_lines(path):
            lineage = split_ranked(taxon)
            if result.setdefault(name, lineage) != lineage:
                raise Broken(
                    f"line {number} gives {name!r} another lineage than line {line_of[name]}",
                    "delete one of them",
                )
            line_of.setdefault(name, number)
    except Broken as broken:
        remedy = broken.remedy[0].upper() + broken.remedy[1:]
        raise InputError(f"{path}: {broken.what}. {remedy}.") from broken
    return result


def _split_lines(path: str) -> Iterator[tuple[int, str, str]]:
    """Number, id and taxon of each line that is not blank or a comment."""
    is_first = True
    for number, line in enumerate(read_lines(path), 1):
        fields = [_unquote(field) for field in decode(line).split("\t")]
        is_header = is_first and fields[0].lower() in _HEADERS
        if is_header or not line.strip() or line.startswith("#"):
            is_first = is_first and not is_header
            continue
        is_first = False
        if len(fields) < 2 or not fields[0]:
            what = "has no tab" if len(fields) < 2 else "has no id"
            raise Broken(
                f"line {number} {what}", "each line must be an id, a tab and a taxon, as in QIIME 2"
            )
        yield number, fields[0], fields[1]


def _unquote(field: str) -> str:
    field = field.strip()
    is_quoted = len(field) > 1 and field[0] == field[-1] == '"'
    return field[1:-1].replace('""', '"') if is_quoted else field
