"""What counts as a name, and how lineages become classes."""

import json

import numpy as np
import pytest

from bioscan_xla.errors import InputError
from bioscan_xla.reads.files import metadata_schema
from bioscan_xla.reads.labels import UNKNOWN, LabelSpace, learn_labels
from bioscan_xla.reads.lineages import RANKS, known_lineage, known_name, rank_silva, split_ranked
from bioscan_xla.reads.raw import ReadOptions
from bioscan_xla.reads.records import read_chunks


def lineage(text):
    """Seven names from `A;B;;...`, short ones filled up with None."""
    names = [name or None for name in text.split(";")]
    return tuple(names + [None] * (7 - len(names)))


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "  ",
        "NA",
        "n/a",
        "none",
        "-",
        "unknown",
        "Unassigned",
        "unclassified Bacteria",
        "uncultured bacterium",
        "unidentified",
        "Osedax sp.",
        "Osedax sp. MB3",
        "Osedax spp.",
        "Osedax cf. rubiplumus",
        "Riftia aff. pachyptila",
        "SAR11 clade",
        "Clade 3",
        "g__",
        "environmental samples",
        "marine metagenome",
        "Bilateria incertae sedis",
        "sp.",
    ],
)
def test_no_name(text):
    assert known_name(text) is None


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Annelida", "Annelida"),
        (" Osedax  rubiplumus ", "Osedax rubiplumus"),
        ("g__Osedax", "Osedax"),
        ("Osedax_rubiplumus", "Osedax rubiplumus"),
        ("Sparidae", "Sparidae"),
        ("Nanomia", "Nanomia"),
        ("Cfaria", "Cfaria"),
    ],
)
def test_names(text, name):
    assert known_name(text) == name


def test_rare_classes_still_count_above():
    rows = [lineage("K;P;C;O;F;G;S one")] * 3 + [lineage("K;P;C;O;F;H;H two")]
    space, conflicts = learn_labels(rows, 2)
    assert not conflicts
    assert space.num_classes == (1, 1, 1, 1, 1, 1, 1)
    assert [counts[0] for counts in space.counts] == [4, 4, 4, 4, 4, 3, 3]
    labels = space.encode(rows)
    assert labels[3].tolist() == [0, 0, 0, 0, 0, UNKNOWN, UNKNOWN]


def test_homonyms_are_two_classes_and_reported_with_rows():
    rows = [
        lineage("Animalia;Cnidaria;;;;Morus"),
        lineage("Plantae;Rosids;;;;Morus"),
        lineage("Animalia;Cnidaria;;;;Other"),
    ]
    space, conflicts = learn_labels(rows)
    assert space.num_classes[5] == 3
    (conflict,) = conflicts
    assert (conflict.rank, conflict.name, conflict.rows) == ("genus", "Morus", (0, 1))
    assert "Morus" in str(conflict)
    labels = space.encode(rows)
    assert labels[0, 5] != labels[1, 5]
    # The bare name does not tell which it is.
    assert space.encode([lineage(";;;;;Morus")])[0, 5] == UNKNOWN


def test_a_gap_among_the_ancestors_is_no_conflict():
    rows = [lineage("A;B;C;D;E;G"), lineage("A;;C;;E;G"), lineage(";B;;;;G")]
    space, conflicts = learn_labels(rows)
    assert not conflicts
    assert space.lineages[5] == (("A", "B", "C", "D", "E", "G"),)
    assert space.counts[5] == (3,)
    assert space.encode(rows)[:, 5].tolist() == [0, 0, 0]


def test_parents_and_order_are_stable():
    rows = [lineage("A;X"), lineage("B;Y"), lineage("A;W"), lineage(";Z")]
    space, _ = learn_labels(rows)
    again, _ = learn_labels(rows[::-1])
    assert space == again
    names = space.names(1)
    parents = dict(zip(names, space.ancestors()[1][:, -1].tolist(), strict=True))
    assert parents == {"W": 0, "X": 0, "Y": 1, "Z": UNKNOWN}


def test_a_missing_rank_hides_no_ancestor():
    rows = [lineage("K;P;C;O;F;G"), lineage("K;P;;O;E;H"), lineage(";;;;E;H;S")]
    space, _ = learn_labels(rows)
    assert space.ancestors()[3][:, -1].tolist() == [
        0
    ]  # one order, whose class one of the rows names
    genera = dict(zip(space.names(5), space.ancestors()[5].tolist(), strict=True))
    families = space.names(4)
    assert genera["H"][4] == families.index("E")
    assert genera["H"][:4] == [0, 0, 0, 0]  # the class through the order
    (species,) = space.ancestors()[6].tolist()
    assert species == [0, 0, 0, 0, families.index("E"), space.names(5).index("H")]


def test_an_unknown_middle_rank_leaves_the_ranks_above():
    space, _ = learn_labels([lineage("A;P;;O"), lineage("B;P;;Q")])
    assert space.ancestors()[3][:, -1].tolist() == [UNKNOWN, UNKNOWN]
    assert space.ancestors()[3].tolist() == [[0, 0, UNKNOWN], [1, 1, UNKNOWN]]


def test_labels_written_by_an_earlier_version(tmp_path):
    ranks = {rank: [] for rank in RANKS}
    ranks["kingdom"] = [{"lineage": ["A"], "count": 3}]
    ranks["class"] = [{"lineage": ["A", None, "C"], "count": 2}]
    (tmp_path / "labels.json").write_text(json.dumps(ranks))
    space = LabelSpace.load(tmp_path / "labels.json")
    assert space.num_classes == (1, 0, 1, 0, 0, 0, 0)
    assert space.ancestors()[2].tolist() == [[0, UNKNOWN]]


def test_names_not_learned_are_unknown():
    space, _ = learn_labels([lineage("A;B")])
    assert space.encode([lineage("A;Q;C"), lineage("unclassified;B")]).tolist() == [
        [0] + [UNKNOWN] * 6,
        [UNKNOWN, 0] + [UNKNOWN] * 5,
    ]


def test_saved_and_loaded(tmp_path):
    space, _ = learn_labels([lineage("A;B;;D"), lineage("A;C")])
    space.save(tmp_path / "labels.json")
    assert LabelSpace.load(tmp_path / "labels.json") == space
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(InputError, match=r"bad\.json"):
        LabelSpace.load(tmp_path / "bad.json")


def test_qiime_lineage():
    text = "k__Animalia; p__Annelida; c__; o__Sabellida; f__Siboglinidae; g__Osedax; s__"
    assert split_ranked(text) == (
        "Animalia",
        "Annelida",
        None,
        "Sabellida",
        "Siboglinidae",
        "Osedax",
        None,
    )
    assert split_ranked("d__Eukaryota;p__X")[0] == "Eukaryota"
    assert split_ranked("Animalia;Annelida")[:2] == ("Animalia", "Annelida")
    assert known_lineage(split_ranked(text))[3] == "Sabellida"
    assert len(RANKS) == len(split_ranked(text))
    assert np.array(split_ranked("")).tolist() == [None] * 7


SILVA_PATHS = {
    # Paths as they stand in SILVA's files, and what their names say.
    "Eukaryota;Opisthokonta;Holozoa;Metazoa (Animalia);Eumetazoa;Bilateria;Platyhelminthes;"
    "Catenulida;Catenulidae;Paracatenula galateia": (
        "Metazoa;Platyhelminthes;;;Catenulidae;Paracatenula;Paracatenula galateia"
    ),
    "Eukaryota;SAR;Rhizaria;Cercozoa;Imbricatea;Silicofilosea;Euglyphida;Assulinidae;Assulina;"
    "Assulina muscorum": "Eukaryota;Cercozoa;;;Assulinidae;Assulina;Assulina muscorum",
    "Eukaryota;SAR;Alveolata;Ciliophora;Intramacronucleata;Conthreep;Oligohymenophorea;"
    "Peritrichia;Telotrochidium;uncultured eukaryote": "Eukaryota;Ciliophora",
    "Eukaryota;Opisthokonta;Nucletmycea;Fungi;Cryptomycota;LKM11;uncultured eukaryote": (
        "Fungi;Cryptomycota"
    ),
    # Fewer than seven names: by place the family would be an order.
    "Eukaryota;Metazoa (Animalia);Annelida;Siboglinidae;Osedax;Osedax sp. MB3": (
        "Metazoa;Annelida;;;Siboglinidae;Osedax"
    ),
    # Several names that end in -phyta, and a subclass that ends in -idae.
    "Eukaryota;Chloroplastida;Charophyta;Tracheophyta;Rosidae;Rosales;Rosaceae;Rosa;Rosa canina": (
        "Chloroplastida;;;Rosales;Rosaceae;Rosa;Rosa canina"
    ),
    "Bacteria;Pseudomonadota;Gammaproteobacteria;Enterobacterales;Enterobacteriaceae;"
    "Escherichia-Shigella;Escherichia coli": (
        "Bacteria;Pseudomonadota;Gammaproteobacteria;Enterobacterales;Enterobacteriaceae;"
        "Escherichia-Shigella;Escherichia coli"
    ),
    "Bacteria;Planctomycetes;Planctomycetacia;Gemmatales;": (
        "Bacteria;Planctomycetes;Planctomycetacia;Gemmatales"
    ),
    # No class is given, so places shift by one.
    "Bacteria;Cyanobacteria;Nostocales;Nostocaceae;Nostoc;Nostoc commune": (
        "Bacteria;;;Nostocales;Nostocaceae;Nostoc;Nostoc commune"
    ),
    "Archaea;Nitrososphaerota;Nitrosopumilus maritimus": (
        "Archaea;Nitrososphaerota;;;;;Nitrosopumilus maritimus"
    ),
    "Animalia;Annelida;;;;Osedax;Osedax rubiplumus": (
        "Animalia;Annelida;;;;Osedax;Osedax rubiplumus"
    ),
    "": "",
}


@pytest.mark.parametrize(("path", "wanted"), SILVA_PATHS.items())
def test_silva_paths_are_ranked_by_name(path, wanted):
    assert known_lineage(rank_silva(path)[0]) == lineage(wanted)


def test_names_without_a_rank_are_counted():
    assert rank_silva("Eukaryota;SAR;Alveolata;Ciliophora;uncultured eukaryote")[1] == 2
    assert rank_silva("Bacteria;Bacillota;Bacilli")[1] == 0


def test_the_log_says_how_many_lineages_lost_names(tmp_path, caplog):
    path = tmp_path / "silva.fasta"
    headers = ["a Eukaryota;SAR;Alveolata;Ciliophora", "b Eukaryota;Annelida", "c Bacteria;Bacilli"]
    path.write_text("".join(f">{header}\n{'ACGT' * 10}\n" for header in headers))
    options = ReadOptions(header_taxonomy="silva")
    schema = metadata_schema([str(path)], options)
    (chunk,) = read_chunks([str(path)], options, schema)
    assert chunk.metadata["phylum"].to_pylist() == ["Ciliophora", "Annelida", "Bacilli"]
    assert "names whose rank is unclear: 1;" in caplog.text
