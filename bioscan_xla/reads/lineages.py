"""The seven taxonomic ranks, and the lineage formats of reference files.

Input: FASTA headers, taxonomy strings, names. Output: a `Lineage`, one name or None per rank.
Invariants: text that names no taxon ("uncultured", "sp.") is never taken for a name.
"""

import functools
import re
from collections.abc import Iterable, Sequence

RANKS = ("kingdom", "phylum", "class", "order", "family", "genus", "species")

HEADER_STYLES = ("sintax", "silva")

Lineage = tuple[str | None, ...]
"""One name per rank, highest first; None where unknown."""

_NO_NAME = re.compile(
    r"^(na|n/a|nan|none|null|-|\?|unknown|unassigned|undetermined|unspecified)$"
    r"|\b(unclassified|uncultured|unidentified|unknown|metagenome|environmental|incertae)\b"
    r"|(^|\s)(sp|spp|cf|aff|nr)(\.|\s|$)"
    r"|\d",
    re.IGNORECASE,
)


@functools.lru_cache(maxsize=1 << 16)
def known_name(text: str | None) -> str | None:
    """A taxon's name, or None where the text names no taxon.

    None for: null and empty; `NA`, `none`, `unknown`, `unassigned`, `-` and the like; names that
    hold `unclassified`, `uncultured`, `unidentified`, `environmental`, `metagenome` or `incertae`;
    open nomenclature (`sp.`, `spp.`, `cf.`, `aff.`, `nr.`); and numbered names (any digit).
    Underscores count as spaces, and a rank prefix such as `g__` is taken off.

    >>> known_name("g__Osedax"), known_name("Osedax sp. MB3")
    ('Osedax', None)
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


# Endings reserved for a rank by the codes of nomenclature or by usage.
_ENDINGS = {
    "mycota": "phylum",
    "phyta": "phylum",
    "mycetes": "class",
    "opsida": "class",
    "phyceae": "class",
    "ales": "order",
    "iformes": "order",
    "aceae": "family",
    "idae": "family",
}
_STRICT_ENDINGS = ("ales", "aceae", "idae")
_KINGDOMS = ("Animalia", "Metazoa", "Fungi", "Plantae", "Viridiplantae", "Chloroplastida")
_PHYLA_TEXT = """
    Acanthocephala Annelida Arthropoda Brachiopoda Bryozoa Cercozoa Chaetognatha Chordata Ciliophora
    Cnidaria Ctenophora Cycliophora Dicyemida Echinodermata Entoprocta Euglenozoa Foraminifera
    Gastrotricha Gnathostomulida Hemichordata Kinorhyncha Loricifera Metamonada Micrognathozoa
    Mollusca Nematoda Nematomorpha Nemertea Onychophora Orthonectida Percolozoa Phoronida Placozoa
    Platyhelminthes Porifera Priapulida Radiozoa Rotifera Sipuncula Tardigrada Xenacoelomorpha
"""
_PHYLA = frozenset(_PHYLA_TEXT.split())
_BINOMIAL = re.compile(r"([A-Z][a-z-]+) [a-z][a-z-]+")
_SYNONYM = re.compile(r"\s*\([^)]*\)$")


def split_header(header: str, style: str) -> tuple[str, Lineage]:
    """Id and lineage of a FASTA header.

    `sintax`: `id;tax=k:Animalia,p:Annelida,...;`, where `d` (domain) stands for kingdom when no
    `k` is given. `silva`: `id Eukaryota;Opisthokonta;...`; see `rank_silva`.

    >>> split_header("x1;tax=k:Animalia,g:Osedax;", "sintax")
    ('x1', ('Animalia', None, None, None, None, 'Osedax', None))

    Reference: https://www.drive5.com/usearch/manual/tax_annot.html
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
    return name, rank_silva(text)[0]


def rank_silva(path: str) -> tuple[Lineage, int]:
    """Lineage of a SILVA path, and how many of its names were ignored for an unclear rank.

    For Bacteria and Archaea, SILVA lists the usual ranks in order, so a name's position is its
    rank. The same holds for other paths of at most seven names that nothing contradicts.
    Eukaryotes have any number of clades between two ranks. Their names are ranked by the names
    themselves: known kingdoms and phyla (Ruggiero et al. 2015), the endings of the codes of
    nomenclature (-ales, -aceae, -idae and others), a final binomial and its genus. If two names
    claim one rank, neither gets it; names of unclear rank are ignored. RESCRIPt and DADA2 look the
    ranks up in SILVA's own table (`tax_slv_ssu_*.txt`), which is more complete: the taxonomy TSV
    that RESCRIPt makes from it can be joined with `--taxonomy`.

    >>> rank_silva("Bacteria;Bacillota;Bacilli;Lactobacillales")[0][:5]
    ('Bacteria', 'Bacillota', 'Bacilli', 'Lactobacillales', None)
    >>> path = "Eukaryota;Opisthokonta;Metazoa (Animalia);Annelida;Sabellida;Siboglinidae;Osedax"
    >>> rank_silva(path)
    (('Metazoa', 'Annelida', None, None, 'Siboglinidae', None, None), 3)

    Reference: https://www.arb-silva.de/documentation/silva-taxonomy,
        https://doi.org/10.1371/journal.pone.0119248 (kingdoms and phyla),
        https://www.iapt-taxon.org/nomen (Articles 16 to 18: -phyta, -mycota, -opsida, -phyceae,
        -mycetes, -ales, -aceae), https://code.iczn.org (Article 29: -idae)
    """
    names = [_SYNONYM.sub("", part.strip()) for part in path.strip().rstrip(";").split(";")]
    species = names[-1] if known_name(names[-1]) and _BINOMIAL.fullmatch(names[-1]) else None
    if len(names) <= len(RANKS) and names[0] != "Eukaryota" and _in_place(names):
        lineage = [name or None for name in names] + [None] * (len(RANKS) - len(names))
        if species:
            lineage[len(names) - 1] = None
            lineage[-1] = species
        return tuple(lineage), 0
    claims: dict[str, list[str]] = {rank: [] for rank in RANKS}
    for name in names[1:]:
        if (rank := _told_rank(name)) is not None:
            claims[rank].append(name)
    if claims["family"] and any(name.endswith("aceae") for name in claims["family"]):
        # In plants -idae is the ending of a subclass.
        claims["family"] = [name for name in claims["family"] if name.endswith("aceae")]
    claims["kingdom"] = claims["kingdom"][:1] or names[:1]
    first_word = names[-1].split(" ")[0]
    if species:
        claims["genus"], claims["species"] = [first_word], [species]
    elif len(names) > 2 and names[-2] == first_word:  # as in Osedax;Osedax sp.
        claims["genus"] = [first_word]
    found = {rank: told[0] for rank, told in claims.items() if len(set(told)) == 1 and told[0]}
    left_out = sum(known_name(name) is not None for name in names[1:] if name not in found.values())
    return tuple(found.get(rank) for rank in RANKS), left_out


def count_unranked(headers: Iterable[str]) -> int:
    """How many SILVA headers hold a name of unclear rank; see `rank_silva`."""
    return sum(rank_silva(header.strip().partition(" ")[2])[1] > 0 for header in headers)


def _told_rank(name: str) -> str | None:
    """The rank that a name shows by itself."""
    if name in _KINGDOMS:
        return "kingdom"
    if name in _PHYLA:
        return "phylum"
    if " " in name:
        return None
    return next((rank for ending, rank in _ENDINGS.items() if name.endswith(ending)), None)


def _in_place(names: Sequence[str]) -> bool:
    """True if no name's ending contradicts the rank of its position."""
    return all(
        _told_rank(name) == RANKS[place]
        for place, name in enumerate(names)
        if name.endswith(_STRICT_ENDINGS) and " " not in name
    )


def split_ranked(text: str) -> Lineage:
    """Lineage of `k__Animalia; p__Annelida; ...`; names without a prefix are taken in order.

    >>> split_ranked("k__Animalia; p__; g__Osedax")
    ('Animalia', None, None, None, None, 'Osedax', None)
    """
    names: dict[str, str] = {}
    for place, part in enumerate(text.split(";")):
        letter, mark, name = part.strip().partition("__")
        rank = _LETTERS.get(letter) if mark else None
        if rank is None and not mark and place < len(RANKS):
            rank, name = RANKS[place], part.strip()
        if rank and name and (letter != "d" or rank not in names):
            names[rank] = name
    return tuple(names.get(rank) for rank in RANKS)
