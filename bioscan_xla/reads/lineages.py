"""The seven taxonomic ranks, and lineages as reference files write them.

Input: FASTA headers, taxonomy strings, names. Output: a `Lineage`, one name or None a rank.
Invariants: a text that names no taxon ("uncultured", "sp.") is never taken for a name.
"""

import re
from collections.abc import Sequence

RANKS = ("kingdom", "phylum", "class", "order", "family", "genus", "species")

HEADER_STYLES = ("sintax", "silva")

Lineage = tuple[str | None, ...]
"""One name a rank, highest first; None where unknown."""

_NO_NAME = re.compile(
    r"^(na|n/a|nan|none|null|-|\?|unknown|unassigned|undetermined|unspecified)$"
    r"|\b(unclassified|uncultured|unidentified|unknown|metagenome|environmental|incertae)\b"
    r"|(^|\s)(sp|spp|cf|aff|nr)(\.|\s|$)"
    r"|\d",
    re.IGNORECASE,
)


def known_name(text: str | None) -> str | None:
    """A taxon's name, or None where the text names no taxon.

    None are: null and empty; `NA`, `none`, `unknown`, `unassigned`, `-` and the like; names that
    hold `unclassified`, `uncultured`, `unidentified`, `environmental`, `metagenome` or `incertae`;
    open nomenclature (`sp.`, `spp.`, `cf.`, `aff.`, `nr.`); and numbered names (any digit).
    Underscores count as spaces, and a rank prefix such as `g__` is taken off.
    """
    if text is None:
        return None
    text = re.sub(r"^[dkpcofgs]__", "", text.strip()).replace("_", " ").strip()
    return None if not text or _NO_NAME.search(text) else " ".join(text.split())


def known_lineage(names: Sequence[str | None]) -> Lineage:
    """`known_name` at each of the seven ranks."""
    return tuple(known_name(name) for name in names)


_SINTAX = re.compile(r";tax=([^;]*)")
_LETTERS = dict(zip("kpcofgs", RANKS, strict=True)) | {"d": "kingdom"}


def split_header(header: str, style: str) -> tuple[str, Lineage]:
    """Id and lineage of a FASTA header.

    `sintax`: `id;tax=k:Animalia,p:Annelida,...;`, where `d` (domain) stands for kingdom when no
    `k` is given. `silva`: `id Eukaryota;Annelida;...`, names from the highest rank down; a lineage
    of more than seven names does not tell which rank each has, so only its first (kingdom) and
    last (species) are taken.

    Reference: https://www.drive5.com/usearch/manual/tax_annot.html and
        https://www.arb-silva.de/documentation/silva-taxonomy
    """
    if style == "sintax":
        match = _SINTAX.search(header)
        named: dict[str, str] = {}
        for part in match.group(1).split(",") if match else ():
            letter, _, name = part.partition(":")
            rank = _LETTERS.get(letter.strip())
            if rank and name.strip() and (letter != "d" or rank not in named):
                named[rank] = name.strip().replace("_", " ")
        words = header.split(";", 1)[0].split(maxsplit=1)
        return (words[0] if words else ""), tuple(named.get(rank) for rank in RANKS)
    name, _, text = header.strip().partition(" ")
    names = [part.strip() or None for part in text.strip().rstrip(";").split(";")]
    if len(names) > len(RANKS):
        names = [names[0], *[None] * (len(RANKS) - 2), names[-1]]
    return name, tuple(names + [None] * (len(RANKS) - len(names)))


def split_ranked(text: str) -> Lineage:
    """Lineage of `k__Animalia; p__Annelida; ...`; names without a prefix are taken in order."""
    names: dict[str, str] = {}
    for place, part in enumerate(text.split(";")):
        letter, mark, name = part.strip().partition("__")
        rank = _LETTERS.get(letter) if mark else None
        if rank is None and not mark and place < len(RANKS):
            rank, name = RANKS[place], part.strip()
        if rank and name and (letter != "d" or rank not in names):
            names[rank] = name
    return tuple(names.get(rank) for rank in RANKS)
