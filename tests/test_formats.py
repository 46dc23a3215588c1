"""Every output file of classify, by the reader of its own format."""

import csv
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import biom
import h5py
import numpy as np
import pytest

from bioscan_xla import run_classification_pipeline
from bioscan_xla.classification.counts import read_counts
from bioscan_xla.classification.darwin_core import _reason_to_leave_out, read_known_taxa
from bioscan_xla.classification.formats import krona_path, qiime_taxon, sintax_line
from bioscan_xla.classification.journal import read_rows
from bioscan_xla.classification.kmers import reverse_complement
from bioscan_xla.classification.samples import read_samples
from bioscan_xla.errors import InputError
from bioscan_xla.reads.lineages import RANKS


def test_biom_is_valid_and_holds_taxonomy_and_metadata(done):
    import biom

    path = done[0] / "table.biom"
    table = biom.load_table(str(path))
    assert table.shape == (37, 3)
    taxonomy = table.metadata("q0", "observation")["taxonomy"]
    assert len(taxonomy) == 7
    assert taxonomy[0] == "k__Animalia"
    assert table.metadata("L1", "sample")["env_medium"] == "sea water"
    checked = subprocess.run(
        [str(Path(sys.executable).with_name("biom")), "validate-table", "-i", str(path)],
        capture_output=True,
        text=True,
    )
    assert "is a valid BIOM" in checked.stdout


def test_darwin_core_archive_reads_back(done):
    read = pytest.importorskip("dwca.read")
    output, result, _rows = done
    told = result["darwin_core"]
    assert told["of_controls"] == 1
    assert told["without_place"] == 24
    with read.DwCAReader(str(output / "dwca.zip")) as archive:
        assert archive.core_contains_term("http://rs.tdwg.org/dwc/terms/occurrenceID")
        found = list(archive)
        assert len(found) == told["occurrences"] == 36
        term = "http://rs.tdwg.org/dwc/terms/"
        ids = [row.id for row in found]
        assert len(set(ids)) == len(ids)
        for row in found:
            needed = ("eventDate", "decimalLatitude", "scientificName", "verbatimIdentification")
            assert all(row.data[term + name] for name in needed)
            (dna,) = row.extensions
            assert dna.rowtype == "http://rs.gbif.org/terms/1.0/DNADerivedData"
            assert dna.data["https://w3id.org/mixs/0000044"] == "12S rRNA"
            assert set(dna.data["http://rs.gbif.org/terms/dna_sequence"]) <= set("ACGT")
        far = [row for row in found if row.data[term + "organismQuantity"] == "36"]
        assert [row.data[term + "scientificName"] for row in far] == ["incertae sedis"]


def test_phyloseq_tables_fit_each_other(done):
    def table(name):
        with open(done[0] / "phyloseq" / name, newline="") as file:
            return list(csv.reader(file, delimiter="\t"))

    otu, tax, samples = table("otu_table.tsv"), table("tax_table.tsv"), table("sample_data.tsv")
    assert [row[0] for row in otu] == [row[0] for row in tax]
    assert all(len(row) == 8 for row in tax)
    assert otu[0][1:] == [row[0] for row in samples[1:]]
    assert [row[samples[0].index("is_control")] for row in samples[1:]] == [
        "FALSE",
        "FALSE",
        "TRUE",
    ]


def test_text_files_have_a_line_for_each_record(done):
    output, _, rows = done
    with open(output / "taxonomy.tsv", newline="") as file:
        lines = list(csv.reader(file, delimiter="\t"))
    assert lines[0] == ["Feature ID", "Taxon", "Confidence"]
    assert len(lines) == len(rows) + 1
    assert all(len(line) == 3 and not line[1].endswith(";") for line in lines)
    sintax = (output / "taxonomy.sintax.tsv").read_text().splitlines()
    assert [line.split("\t")[0] for line in sintax] == list(rows)
    assert all(line.count("\t") == 3 for line in sintax)
    krona = [line.split("\t") for line in (output / "krona.txt").read_text().splitlines()]
    assert sum(int(line[0]) for line in krona) == sum(row["reads"] for row in rows.values())
    assert all(cell for line in krona for cell in line)
    with open(output / "faire.tsv", newline="") as file:
        faire = list(csv.DictReader(file, delimiter="\t"))
    assert float(faire[0]["percent_match"]) > 95
    assert faire[-1]["scientificName"] == "incertae sedis"
    fasta = (output / "oriented.fasta").read_text().splitlines()
    assert fasta[2] == ">q1 strand=minus"


def row_of(best, kept, confidence=0.9):
    row = {"sequence_id": "a", "confidence": confidence}
    for rank, name in zip(RANKS, best, strict=True):
        row[f"best_{rank}"] = name
        row[f"confidence_{rank}"] = confidence if name else None
    return row | {
        r: n if at < kept else None for at, (r, n) in enumerate(zip(RANKS, best, strict=True))
    }


def test_lines_of_difficult_names():
    row = row_of(["K", None, "C, x;y", None, None, None, "Aus bus"], 3)
    assert qiime_taxon(row) == "k__K; p__; c__C, x,y"
    assert sintax_line(row) == "a\tk:K(0.90),c:C_x_y(0.90),s:Aus_bus(0.90)\t+\tk:K,c:C_x_y\n"
    assert krona_path(row) == ("K", "(no phylum)", "C, x;y")
    assert qiime_taxon(row_of(["K"] + [None] * 6, 1)) == "k__K; p__"
    nothing = row_of([None] * 7, 0, None)
    assert qiime_taxon(nothing) == "Unassigned"
    assert sintax_line(nothing) == "a\t\t\t\n"
    assert krona_path(nothing) == ("Unassigned",)


def test_a_table_of_a_european_spreadsheet_is_read(tmp_path):
    (tmp_path / "t.csv").write_text("ASV;S1;S2\na;3;0\nb;1;2\n")
    counts = read_counts(str(tmp_path / "t.csv"))
    assert (counts.samples, counts.matrix.toarray().tolist()) == (["S1", "S2"], [[3, 0], [1, 2]])


def test_dada2_table_is_turned_round(tmp_path):
    sequence, other = "ACGTACGTACGTACGTACGTAAC", "GGGTACGTACGTACGTACGTAAC"
    (tmp_path / "seqtab.csv").write_text(f'"","{sequence}","{other}"\n"S1",3,0\n"S2",1,2\n')
    counts = read_counts(str(tmp_path / "seqtab.csv"))
    assert counts.samples == ["S1", "S2"]
    assert counts.matrix.toarray().tolist() == [[3, 1], [0, 2]]
    records = [("x", reverse_complement(other)), ("z", "ACGT"), ("w", sequence), ("v", sequence)]
    assert counts.match(records) == {"x": 1, "w": 0}, "each row once"
    assert counts.match([*records, ("y", other)]) == {"y": 1, "w": 0}, "as it was read first"
    assert counts.match([*records, (other, other)]) == {other: 1, "w": 0}, "its id first"


def test_a_table_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "t.csv").write_bytes("ASV,Gro\u00dfe\na,3\n".encode("latin-1"))
    with pytest.raises(InputError, match=r"t\.csv: is not UTF-8 text .*save it as"):
        read_counts(str(tmp_path / "t.csv"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("id\tS\na\t0.5\n", r"row 1 \(a\), column 'S': 0.5 is not a count"),
        ("id\tS\tT\na\t1\t2\nb\t1\t-4\n", r"row 2 \(b\), column 'T': -4 is not a count"),
        ("id\tS\na\tinf\n", "inf is not a count"),
        ("id\tS\na\t1\na\t2\n", "row 'a' occurs twice"),
        ("id\tS\tT\tTotal\na\t1\t2\t3\nb\t0\t4\t4\n", "column 'Total' is the sum of the others"),
        ("id\tS\tS\na\t1\t2\n", "column 'S' occurs twice"),
        (">a\nACGT\n", "holds sequences, not counts"),
        ("id\na\nb\n", "has no column of counts"),
        ("", "is empty"),
    ],
)
def test_counts_that_are_none_are_refused(tmp_path, text, words):
    (tmp_path / "t.tsv").write_text(text)
    with pytest.raises(InputError, match=words):
        read_counts(str(tmp_path / "t.tsv"))


def test_a_biom_count_that_is_none_is_named(tmp_path):
    table = biom.Table(np.array([[1, 0.5], [2, 3]]), ["a", "b"], ["S", "T"])
    with h5py.File(tmp_path / "t.biom", "w") as file:
        table.to_hdf5(file, "test")
    with pytest.raises(InputError, match=r"row 'a', column 'T': 0\.5 is not a count"):
        read_counts(str(tmp_path / "t.biom"))


def test_a_table_that_lies_on_its_side_is_told(data, tmp_path):
    (tmp_path / "t.tsv").write_text("sample\tq0\tq1\nL1\t3\t4\nL2\t1\t0\n")
    with pytest.raises(InputError, match="'L1', is a sequence of the input; its columns are"):
        run_classification_pipeline(
            str(data[0] / "asv.fasta"),
            str(data[0] / "reference.parquet"),
            str(tmp_path / "out"),
            table=str(tmp_path / "t.tsv"),
            num_trials=0,
        )


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("scientificName,AphiaID\nAus bus,12\n\nCus,\n", "urn:lsid:marinespecies.org:taxname:12"),
        ("taxonKey\tName\n12\tAus bus \n", "https://www.gbif.org/species/12"),
        ("name;scientificNameID\nAus bus;x:12;more\n", "x:12"),
        ("name,id\nAus bus,12\n", r"needs a column .* it has name, id"),
        ("", "it has no header"),
        ("name,AphiaID\nA\u00fcs bus,12\n", "is not UTF-8"),
    ],
)
def test_known_taxa(tmp_path, text, told):
    (tmp_path / "taxa").write_text(text, encoding="latin-1")
    if "12" in told:
        assert read_known_taxa(str(tmp_path / "taxa")) == {"Aus bus": told}
    else:
        with pytest.raises(InputError, match=told):
            read_known_taxa(str(tmp_path / "taxa"))


def test_strands_of_a_sequence_are_one_occurrence_and_no_read_counts_twice(data, tmp_path):
    """DADA2 gives both strands of mixed reads a row each; a record may be there twice."""
    folder, queries = data
    one, other = queries[3][1], queries[7][1]
    turned = reverse_complement(one)
    records = {"one": one, "again": one, "turned": turned, "other": other}
    (tmp_path / "asv.fasta").write_text("".join(f">{n}\n{s}\n" for n, s in records.items()))
    (tmp_path / "t.tsv").write_text(f"id\tL1\tL3\n{one}\t5\t0\n{turned}\t7\t0\n{other}\t0\t3\n")
    result = run_classification_pipeline(
        str(tmp_path / "asv.fasta"),
        str(folder / "reference.parquet"),
        str(tmp_path / "out"),
        table=str(tmp_path / "t.tsv"),
        samples=[str(folder / "samples.tsv"), str(folder / "libraries.tsv")],
        remove_controls=True,
        num_trials=0,
    )
    reads = {row["sequence_id"]: row["reads"] for row in read_rows(tmp_path / "out")}
    assert sum(filter(None, reads.values())) == 12, reads
    assert (reads["one"], reads["turned"], reads["other"]) == (5, 7, 0)
    assert result["controls"]["only_there"] == 1
    with zipfile.ZipFile(tmp_path / "out/dwca.zip") as archive:
        text = archive.read("occurrence.txt").decode()
    (found,) = csv.DictReader(text.splitlines(), delimiter="\t")
    assert (found["organismQuantity"], found["sampleSizeValue"]) == ("12", "12")
    table = biom.load_table(str(tmp_path / "out/table.biom"))
    assert table.sum("observation").tolist() == [5, 7], "the control's own is not a row of zeros"
    with open(tmp_path / "out/phyloseq/tax_table.tsv") as file:
        assert [line.split("\t")[0] for line in file][1:] == ["one", "turned"], "as in taxonomy.tsv"


def samples_of(folder, text, names=("X",)):
    (folder / "s.tsv").write_text(text)
    return read_samples([str(folder / "s.tsv")], list(names))


def test_samples_that_are_wrong_are_refused(tmp_path):
    with pytest.raises(InputError, match="no column names the samples"):
        samples_of(tmp_path, "sample\tlatitude\nX\t99\n", ["Y"])
    with pytest.raises(InputError, match="must be a number from -90 to 90"):
        samples_of(tmp_path, "sample\tlatitude\nX\t99\n")
    with pytest.raises(InputError, match="minimumDepthInMeters of sample 'X' is 'deep'"):
        samples_of(tmp_path, "sample\tminimumDepthInMeters\nX\tdeep\n")
    with pytest.raises(InputError, match="sample 'X' has two rows that differ"):
        samples_of(tmp_path, "sample\tlatitude\nX\t9\nX\t8\n")
    assert samples_of(tmp_path, "sample\tlatitude\nX\t9\nX\t9\n")[0].latitude == 9
    with pytest.raises(InputError, match="column 'date' occurs twice; keep one"):
        samples_of(tmp_path, "sample\tdate\tdate\nX\t2024\t2020\n")
    with pytest.raises(InputError, match=r"is '10,5'.* write a point, not a comma"):
        samples_of(tmp_path, "sample\tlatitude\nX\t10,5\n")
    with pytest.raises(InputError, match=r"row 1 \(X\) has 4 cells where the header has 3"):
        samples_of(tmp_path, "sample,place,latitude\nX,Bergen, Norway,60\n")


@pytest.mark.parametrize("category", ["positive control", "Mock community", "pos control"])
def test_positive_controls_are_no_occurrences(tmp_path, category):
    text = f"sample\tcategory\tlat\tlon\tdate\nX\t{category}\t1\t2\t2024\nY\twater\t1\t2\t2024\n"
    samples = samples_of(tmp_path, text, ["X", "Y"])
    assert [sample.is_control for sample in samples] == [False, False]
    assert [_reason_to_leave_out(sample) for sample in samples] == ["of_controls", None]


def test_all_that_is_wrong_with_samples_is_told_at_once(tmp_path):
    header = "sample\tlatitude\tdate\tminimumDepthInMeters\tmaximumDepthInMeters\n"
    with pytest.raises(InputError) as told:
        samples_of(tmp_path, header + "X\t99\tMay\t\t\nY\t9\t\t-50\t\nZ\t9\t\t50\t20\n", "XYZ")
    _, *lines = str(told.value).split("\n")
    assert [re.sub(r";.*", "", line) for line in lines] == [
        "  date of sample 'X' is 'May'",
        "  latitude of sample 'X' is '99'",
        "  minimumDepthInMeters of sample 'Y' is '-50'",
        "  maximumDepthInMeters of sample 'Z' is 20, less than minimumDepthInMeters, 50",
    ]
    with pytest.raises(InputError, match="and 15 more"):
        samples_of(
            tmp_path, "sample\tlatitude\n" + "".join(f"{n}\tN\n" for n in "abcde" * 5), "abcde" * 5
        )


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("2024", "2024"),
        ("2024-05-31", "2024-05-31"),
        ("2024-05-31T14:30:05.5Z", "2024-05-31T14:30:05.5Z"),
        ("2024-05-31 14:30", "2024-05-31T14:30"),
        ("2024-05-31T14+02:00", "2024-05-31T14+02:00"),
        ("2024-05-31/2024-06-02", "2024-05-31/2024-06-02"),
        ("2024-05-31/06", "2024-05-31/06"),
        ("not collected", None),
        ("31/05/2024", InputError),
        ("05-31-2024", InputError),
        ("2024-13-01", InputError),
        ("May 2024", InputError),
        ("45443", InputError),
    ],
)
def test_dates_are_iso_8601(tmp_path, text, told):
    table = f"sample\teventDate\nX\t{text}\n"
    if told is InputError:
        with pytest.raises(InputError, match=r"date of sample 'X' is .*write it as ISO 8601"):
            samples_of(tmp_path, table)
    else:
        assert samples_of(tmp_path, table)[0].date == told


@pytest.mark.parametrize(
    ("column", "value", "is_control"),
    [
        ("samp_category", "negative control", True),
        ("type", "blank", True),
        ("sample_type", "NTC", True),
        ("type", "sediment", False),
        ("samp_category", "positive control", False),
        ("is_control", "TRUE", True),
        ("control", "no", False),
        ("control", "extraction blank", True),
        ("samp_category", "extraction control", True),
    ],
)
def test_negative_controls_are_known_by_their_category(tmp_path, column, value, is_control):
    (sample,) = samples_of(tmp_path, f"sample\t{column}\nX\t{value}\n")
    assert sample.is_control == is_control
