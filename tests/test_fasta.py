"""FASTA and FASTQ as people have them: odd headers, wrong names, damaged gzip."""

import bz2
import gzip
import logging

import fsspec
import pytest

from bioscan_xla.errors import InputError
from bioscan_xla.reads.fasta import read_sequences
from bioscan_xla.reads.raw import ReadOptions

from .test_records import GOOD, kept, read, rejected

FASTA = "".join(f">s{n} station {n}\n{GOOD}\n" for n in range(10)).encode()
FASTQ = "".join(f"@s{n} station {n}\n{GOOD}\n+\n{'I' * 50}\n" for n in range(10)).encode()


def names(chunks):
    """The ids of all usable records."""
    return [name for _, _, name in kept(chunks)]


@pytest.fixture(params=["local", "remote"])
def place(request, tmp_path):
    """Write a file in a folder or in a store; its path or address."""
    store = fsspec.filesystem("memory")

    def write(name, content):
        if request.param == "local":
            (tmp_path / name).write_bytes(content)
            return str(tmp_path / name)
        with store.open(f"/formats/{name}", "wb") as file:
            file.write(content)
        return f"memory://formats/{name}"

    yield write
    if store.exists("/formats"):
        store.rm("/formats", recursive=True)


@pytest.mark.parametrize("name", ["a.fasta", "a.fastq"])
def test_headers_beyond_ascii_cost_nothing(place, name):
    def record(header):
        if name == "a.fasta":
            return b">" + header + b"\n" + GOOD.encode() + b"\n"
        return b"@" + header + b"\n" + GOOD.encode() + b"\n+\n" + b"I" * 50 + b"\n"

    content = record("Färöer nord".encode()) + record("Skå".encode("latin-1"))
    path = place(name, content + record("voilà".encode()) + record(b"last"))
    chunks, error = read(path)
    assert error is None
    assert names(chunks) == ["Färöer", "Skå", "voilà", "last"]


def test_letters_beyond_ascii_in_a_sequence_cost_that_record(place):
    content = f">a\n{GOOD}\n>b\n{GOOD}é\n>c\n{GOOD}\n".encode()
    chunks, error = read(place("a.fasta", content))
    assert error is None
    assert names(chunks) == ["a", "c"]
    assert rejected(chunks) == {1: "character 'é' at base 51 is not a nucleotide code"}


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.fasta", FASTQ, "contains FASTQ despite its name"),
        ("a.fastq", FASTA, "contains FASTA despite its name"),
        ("a.fasta", gzip.compress(FASTA, mtime=0), ": compressed with gzip despite its name"),
        ("a.fasta.gz", FASTA, ": not compressed with gzip despite its name"),
        ("a.fq.gz", gzip.compress(b"\xef\xbb\xbf" + FASTA, mtime=0), "contains FASTA"),
        ("a.fasta", b"\xef\xbb\xbf" + FASTA, ""),
        ("a.fasta", FASTA.replace(b"\n", b"\r\n"), ""),
        ("a.fasta", FASTA.replace(b"\n", b"\r"), ""),
        ("a.fasta", b"\n\n  " + FASTA.replace(b"\n", b"\n\n"), ""),
        ("a.fastq", FASTQ.replace(b"\n@", b"\n\n@"), ""),
        ("a.fasta", b"; by hand\n# of 2024\n" + FASTA, "2 comment lines"),
    ],
)
def test_content_counts_and_not_the_name(place, caplog, name, content, told):
    caplog.set_level(logging.INFO)
    chunks, error = read(place(name, content))
    assert error is None
    assert names(chunks) == [f"s{n}" for n in range(10)]
    assert told in caplog.text
    assert bool(told) == bool(caplog.records)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.fasta", FASTA.decode().encode("utf-16"), "is UTF-16 text. Save it as UTF-8"),
        ("a.fastq", FASTQ.decode().encode("utf-16-be"), "is UTF-16 text"),
        ("a.fasta", bytes(range(256)), "is binary"),
        ("a.fasta.gz", gzip.compress(gzip.compress(FASTA, mtime=0), mtime=0), "gzip twice"),
        ("a.fasta", bz2.compress(FASTA), "is compressed with bzip2"),
        ("a.fasta", b"PAR1....", "is a Parquet file. Rename it to end in .parquet"),
        ("a.fasta", b"<!DOCTYPE html><html>404", "is a web page"),
        ("a.fasta.gz", gzip.compress(b"BAM\x01" + bytes(9), mtime=0), "samtools fasta"),
        ("a.fasta", b"ACGT\n" + FASTA, "line 1 ('ACGT') is not a header. A FASTA record begins"),
        ("a.fastq", b"s0\nACGT\n", "line 1 ('s0') should be a header that begins with @"),
        ("a.fastq", b"@s0\nACGT\nACGT\n+\nIIII\nIIII\n", "line 3 ('ACGT') should begin with +"),
        ("a.fastq", b"@s0\nACGT", "is truncated. The last record is incomplete: copy"),
    ],
)
def test_what_a_file_is_instead_is_said(place, name, content, told):
    path = place(name, content)
    chunks, error = read(path)
    assert not chunks
    assert str(error).startswith(f"{path}: ")
    assert told in str(error)
    assert ("copy the file again" in str(error)) == ("incomplete" in told)


def test_a_quality_that_does_not_fit_costs_its_record(place):
    content = FASTQ.replace(b"I\n@s4", b"\n@s4")
    chunks, error = read(place("a.fastq", content))
    assert error is None
    assert rejected(chunks) == {3: "49 quality values for 50 bases"}
    assert names(chunks) == [f"s{n}" for n in range(10) if n != 3]


def packed(count=20_000):
    """Many different records packed with gzip, in three members."""
    letters = str.maketrans("01", "AC")
    texts = [f">s{n}\n{f'{n:050b}'.translate(letters)}\n" for n in range(count)]
    thirds = (texts[: count // 3], texts[count // 3 : count // 2], texts[count // 2 :])
    return [gzip.compress("".join(third).encode()) for third in thirds]


@pytest.mark.parametrize("chunk_rows", [64, 100_000])
@pytest.mark.parametrize("damage", ["cut", "deflate", "checksum", "between"])
def test_damaged_gzip_gives_what_is_whole_and_then_the_error(place, damage, chunk_rows):
    first, second, third = packed()
    content, least, told = {
        "cut": (first + second + third[: len(third) // 2], 12_000, "gzip data end too early"),
        "deflate": (
            first + second[:2000] + bytes(range(256)) + second[2256:] + third,
            6_666,
            "gzip",
        ),
        "checksum": (first + second[:-8] + bytes(8) + third, 9_999, "gzip checksum after record"),
        "between": (first + second + b"oh" + third, 9_999, "gzip data after other bytes"),
    }[damage]
    path = place("a.fasta.gz", content)
    chunks, error = read(path, options=ReadOptions(chunk_rows=chunk_rows))
    assert told in str(error)
    assert str(error).startswith(f"{path}: ")
    found = names(chunks)
    # Until the checksum tells, letters that were damaged look like any others.
    sure = 6_666 if damage == "deflate" else len(found)
    assert found[:sure] == [f"s{n}" for n in range(sure)]
    assert least <= len(found) < 20_000


def test_the_last_byte_before_a_damage_comes_out(place):
    text = FASTA * 300
    content = bytearray(gzip.compress(text, 0))  # stored in blocks as it is
    size = int.from_bytes(content[11:13], "little")
    content[10 + 5 + size] = 0b110  # no kind of block
    chunks, error = read(place("a.fa.gz", bytes(content)))
    assert "is damaged" in str(error)
    # A record is known to be whole by the header line behind it.
    num_headers = text[:size].rpartition(b"\n")[0].count(b">")
    assert len(kept(chunks)) + len(rejected(chunks)) == num_headers - 1


@pytest.mark.parametrize("behind", [bytes(512), b"signature of somebody", b"\x1f"])
def test_bytes_behind_the_gzip_cost_nothing(place, caplog, behind):
    content = b"".join(packed(300)) + behind
    chunks, error = read(place("a.fasta.gz", content), options=ReadOptions(chunk_rows=64))
    assert error is None
    assert len(kept(chunks)) == 300
    assert f": {len(behind)} bytes after its gzip data were skipped" in caplog.text


def test_records_across_blocks_and_long_lines(place):
    long = "ACGT" * 300_000
    content = gzip.compress(f">a\n{long}\n>b\n{long[:60]}\n{long[60:]}\n".encode())
    chunks, error = read(place("a.fasta.gz", content))
    assert error is None
    assert [text for chunk in chunks for text in chunk.sequences] == [long, long]


def test_a_file_that_may_not_be_read(tmp_path):
    (tmp_path / "a.fasta").mkdir()
    with pytest.raises(InputError, match=r"a\.fasta: cannot be read \(.*\)\. Check the path"):
        list(read_sequences(str(tmp_path / "a.fasta")))
    with pytest.raises(InputError, match=r"a\.fasta: cannot be read \(.*\)\. Check the address"):
        list(read_sequences("memory://nowhere/a.fasta"))
