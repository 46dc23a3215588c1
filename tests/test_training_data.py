"""Labelled files to examples: what is joined, what is refused."""

import pytest

from bioscan_xla.errors import InputError
from bioscan_xla.reads.raw import ReadOptions
from bioscan_xla.reads.taxonomy import read_taxonomy
from bioscan_xla.training.data import read_examples


def test_taxonomy_file(tmp_path):
    path = tmp_path / "t.tsv"
    path.write_text(
        "Feature ID\tTaxon\tConfidence\n#q2:types\tcategorical\tnumeric\n"
        "a\tk__Animalia; p__Annelida\t0.9\n"
    )
    assert read_taxonomy(str(path))["a"][:3] == ("Animalia", "Annelida", None)
    path.write_text("no tab here\n")
    with pytest.raises(InputError, match="line 1 has no tab"):
        read_taxonomy(str(path))
    with pytest.raises(InputError, match="cannot be read"):
        read_taxonomy(str(tmp_path / "absent.tsv"))


def test_a_quotation_mark_in_a_name_swallows_no_line(tmp_path):
    path = tmp_path / "t.tsv"
    path.write_text('\ufeffa\tk__Animalia; s__"Osedax\nb\tk__Fungi\n', encoding="utf-8")
    found = read_taxonomy(str(path))
    assert list(found) == ["a", "b"]
    assert found["b"][0] == "Fungi"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a\tk__A\na\tk__B\n", "line 2 gives 'a' another lineage"),
        (b"\x1f\x8b\x08\x00", "is truncated.*gzip data end too early"),
        ("a\tk__A\n".encode("utf-16"), "UTF-16"),
        (b"\tk__A\n", "line 1 has no id"),
    ],
)
def test_a_broken_taxonomy_file_is_named(tmp_path, content, message):
    path = tmp_path / "t.tsv"
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"t.tsv: .*{message}"):
        read_taxonomy(str(path))
    with pytest.raises(InputError, match="cannot be read"):
        read_taxonomy(str(tmp_path))


def test_a_taxonomy_of_other_sequences_is_refused(tmp_path, caplog):
    fasta = tmp_path / "a.fasta"
    fasta.write_text("".join(f">s{n}\n{'ACGT' * 10}\n" for n in range(3)))
    table = tmp_path / "t.tsv"
    table.write_text("x\tk__Animalia\n")
    with pytest.raises(InputError, match=r"t\.tsv: contains none of the sequence ids.*'x'.*'s0'"):
        read_examples([str(fasta)], ReadOptions(), str(table))
    table.write_text("s1\tk__Animalia\n")
    examples = read_examples([str(fasta)], ReadOptions(), str(table))
    assert [lineage[0] for lineage in examples.lineages] == [None, "Animalia", None]
    assert "2 of 3 sequences are not in it" in caplog.text


def test_a_file_without_a_usable_sequence_is_named(tmp_path):
    fasta = tmp_path / "a.fasta"
    fasta.write_text(">a\nACG\n>b\nACGT\n")
    with pytest.raises(InputError, match=r"a\.fasta: no sequence can be used \(.*bp"):
        read_examples([str(fasta)], ReadOptions())
