"""Parquet as people have it: types that cannot be used, odd bytes, damage."""

import datetime
import logging

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bioscan_xla.errors import InputError
from bioscan_xla.reads.files import metadata_schema
from bioscan_xla.reads.raw import ReadOptions
from bioscan_xla.reads.records import read_chunks

from .test_records import GOOD, kept, read, rejected, write

BASE = {"sequence_id": ["a", "b"], "dna_sequence": [GOOD, GOOD]}
DAY = datetime.datetime(2024, 1, 1)


def odd_bytes(*values):
    """A string column of bytes that nobody checked."""
    raw = pa.array(values, pa.binary())
    return pa.Array.from_buffers(pa.string(), len(raw), raw.buffers())


@pytest.mark.parametrize(
    ("name", "column", "told"),
    [
        ("depth", [{"m": 1}, {"m": 2}], "column 'depth' is of type struct<m: int64>, and depth"),
        ("depth", [[1], [2]], "is of type list<element: int64>, and depth must be numbers"),
        ("depth", [DAY, DAY], "is of type timestamp[us], and depth must be numbers"),
        ("latitude", [True, False], "is of type bool, and latitude must be numbers"),
        ("species", [["x"], ["y"]], "is of type list<element: string>, and species must be text"),
        ("genus", [DAY, DAY], "is of type timestamp[us], and genus must be text"),
        ("sequence_id", [1.5, 2.5], "is of type double, and sequence_id must be text or whole"),
        ("sequence_id", [["a"], ["b"]], "and sequence_id must be text or whole numbers"),
        ("dna_sequence", [1, 2], "is of type int64, and dna_sequence must be text"),
        ("dna_sequence", [{"s": GOOD}, None], "and dna_sequence must be text"),
    ],
)
def test_a_type_that_cannot_be_used_is_named(tmp_path, name, column, told):
    path = write(tmp_path / "a.parquet", BASE | {name: column})
    chunks, error = read(path)
    assert not chunks
    assert str(error).startswith(f"{path}: column {name!r} is of type")
    assert told in str(error)
    assert f"--columns {name}=NAME" in str(error)


@pytest.mark.parametrize("name", ["sequence_id", "depth", "species", "station"])
def test_a_column_that_is_there_twice(tmp_path, name):
    columns = [pa.array(["a", "b"]), pa.array([GOOD, GOOD]), *[pa.array(["1", "2"])] * 2]
    table = pa.table(columns, names=["sequence_id", "dna_sequence", name, name])
    if name == "sequence_id":
        table = table.remove_column(3)
    pq.write_table(table, tmp_path / "a.parquet")
    options = ReadOptions(keep=("station",) if name == "station" else ())
    path = str(tmp_path / "a.parquet")
    schema = metadata_schema([path], ReadOptions())
    with pytest.raises(InputError, match=f"has 2 columns named '{name}'; rename all but one"):
        list(read_chunks([path], options, schema))
    if options.keep:
        with pytest.raises(InputError, match="has 2 columns named"):
            metadata_schema([path], options)


def test_text_that_is_not_utf8_costs_nothing_but_itself(tmp_path):
    columns = {
        "sequence_id": odd_bytes(b"F\xe4r", "Fär2".encode(), b"c"),
        "dna_sequence": odd_bytes(GOOD.encode(), GOOD.encode() + b"\xff", GOOD.encode()),
        "species": odd_bytes(b"Art\xe9mia", None, b"Homo"),
        "depth": odd_bytes(b"1", b"2", b"\xff"),
        "station": odd_bytes(b"x", b"y", b"z"),
    }
    chunks, error = read(write(tmp_path / "a.parquet", columns))
    assert error is None
    assert [name for _, _, name in kept(chunks)] == ["Fär"]
    assert chunks[0].metadata["species"].to_pylist() == ["Artémia"]
    assert rejected(chunks) == {
        1: "character 'ÿ' at base 51 is not a nucleotide code",
        2: "depth 'ÿ' is not a number",
    }
    options = ReadOptions(keep=("station",))
    columns["station"] = odd_bytes(b"\xe4", b"y", b"z")
    chunks, error = read(write(tmp_path / "b.parquet", columns), options=options)
    assert error is None
    assert chunks[0].metadata["station"].to_pylist() == ["ä"]
    columns["station"] = odd_bytes(b"\xe4", b"y", b"z").dictionary_encode()
    path = write(tmp_path / "c.parquet", columns)
    _, error = read(path, options=options)
    assert f"{path}: row group 0 is damaged after row 0 (column 'station'" in str(error)


@pytest.mark.parametrize(
    "make",
    [
        lambda v: pa.array(v, pa.large_string()),
        lambda v: pa.array([x.encode() for x in v], pa.binary()),
        lambda v: pa.array(v).dictionary_encode(),
        lambda v: pa.array([x.encode() for x in v], pa.large_binary()).dictionary_encode(),
        lambda v: pa.array(v, pa.string_view()),
    ],
)
def test_every_kind_of_text(tmp_path, make):
    columns = {
        "sequence_id": make(["a", "b"]),
        "dna_sequence": make([GOOD, GOOD]),
        "species": make(["x", "y"]),
        "depth": make(["1.5", "2"]),
    }
    chunks, error = read(write(tmp_path / "a.parquet", columns))
    assert error is None
    assert [name for _, _, name in kept(chunks)] == ["a", "b"]
    assert chunks[0].metadata["species"].to_pylist() == ["x", "y"]
    assert chunks[0].metadata["depth"].to_pylist() == [1.5, 2.0]


def test_columns_as_pandas_writes_those_without_a_value(tmp_path):
    columns = BASE | {"species": [float("nan")] * 2, "genus": pa.nulls(2), "depth": pa.nulls(2)}
    chunks, error = read(write(tmp_path / "a.parquet", columns))
    assert error is None
    assert chunks[0].metadata["species"].to_pylist() == [None, None]
    nothing = {"sequence_id": pa.nulls(2), "dna_sequence": pa.nulls(2)}
    chunks, error = read(write(tmp_path / "b.parquet", nothing))
    assert error is None
    assert rejected(chunks) == {0: "no id", 1: "no id"}


@pytest.mark.parametrize(
    ("ids", "sequences", "hint"),
    [
        ("sequence_id", "dna_seq", "--columns dna_sequence=dna_seq"),
        ("Sequence_ID", "dna_sequence", "--columns sequence_id=Sequence_ID"),
        ("ID", "seq", "--columns sequence_id=ID dna_sequence=seq"),
        ("seq_id", "Sequence", "--columns sequence_id=seq_id dna_sequence=Sequence"),
        ("processid", "nucraw", "--columns sequence_id=processid dna_sequence=nucraw"),
        ("sequenc_id", "dna_sequenze", "--columns sequence_id=sequenc_id dna_sequence=dna_seq"),
    ],
)
def test_the_nearest_name_is_suggested(tmp_path, ids, sequences, hint):
    path = write(tmp_path / "a.parquet", {ids: ["a"], sequences: [GOOD], "zzz": [1]})
    _, error = read(path)
    assert f"Perhaps: {hint}" in str(error)


def test_nothing_near_and_ranks_in_capitals(tmp_path, caplog):
    _, error = read(write(tmp_path / "a.parquet", {"zzz": ["a"], "yyy": [GOOD]}))
    assert "Name the right one with --columns" in str(error)
    _, error = read(write(tmp_path / "b.parquet", BASE | {"Species": ["x", "y"]}))
    assert error is None
    assert "ignored; to read them: --columns species=Species" in caplog.text


@pytest.mark.parametrize(
    ("one", "other", "common"),
    [
        (pa.array([1, 2], pa.int8()), pa.array([300, 4], pa.int16()), pa.int16()),
        (pa.array([1, 2]), pa.array([1.5, 2.5]), pa.float64()),
        (pa.nulls(2), pa.array(["x", "y"]), pa.string()),
        (pa.array(["x", "y"]), pa.array(["x", "y"], pa.large_string()), pa.large_string()),
        (pa.array(["x", "y"]).dictionary_encode(), pa.array(["x", "y"]), pa.string()),
    ],
)
def test_kept_columns_of_several_types_meet_in_one(tmp_path, one, other, common):
    paths = [
        write(tmp_path / "a.parquet", BASE | {"station": one}),
        write(tmp_path / "b.parquet", BASE | {"sequence_id": ["c", "d"], "station": other}),
    ]
    options = ReadOptions(keep=("station",))
    assert metadata_schema(paths, options).field("station").type == common
    chunks, error = read(paths, options=options)
    assert error is None
    found = [value for chunk in chunks for value in chunk.metadata["station"].to_pylist()]
    assert found == one.to_pylist() + other.to_pylist()


def test_kept_columns_that_have_no_type_in_common(tmp_path):
    paths = [
        write(tmp_path / "a.parquet", BASE | {"station": [1, 2]}),
        write(tmp_path / "b.parquet", BASE | {"station": [DAY, DAY]}),
    ]
    with pytest.raises(InputError, match=r"b\.parquet: column 'station' is of type timestamp"):
        metadata_schema(paths, ReadOptions(keep=("station",)))


def test_a_kept_value_that_the_common_type_cannot_hold(tmp_path):
    paths = [
        write(tmp_path / "a.parquet", BASE | {"station": [1.5, 2.5]}),
        write(
            tmp_path / "b.parquet", {**BASE, "sequence_id": ["c", "d"], "station": [1, 2**60 + 1]}
        ),
    ]
    chunks, error = read(paths, options=ReadOptions(keep=("station",)))
    assert len(kept(chunks)) == 2
    assert "b.parquet: a kept column does not fit the type that all files share" in str(error)


def test_a_page_that_does_not_match_its_checksum(tmp_path):
    columns = {
        "sequence_id": [f"s{n}" for n in range(40)],
        "dna_sequence": [
            "".join(np.random.default_rng(n).choice([*"ACGT"], 60)) for n in range(40)
        ],
    }
    path = tmp_path / "a.parquet"
    write(path, columns, row_group_size=20, compression="none", use_dictionary=False)
    plain = path.read_bytes()
    place = plain.index(columns["dna_sequence"][30].encode())
    write(
        path,
        columns,
        row_group_size=20,
        compression="none",
        use_dictionary=False,
        write_page_checksum=True,
    )
    content = bytearray(path.read_bytes())
    place = content.index(columns["dna_sequence"][30].encode())
    content[place] ^= 2  # another letter
    path.write_bytes(content)
    chunks, error = read(str(path))
    assert len(kept(chunks)) == 20
    assert "row group 1 is damaged after row 20" in str(error)
    assert "CRC" in str(error)


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize(
    ("content", "told"),
    [
        (f">a\n{GOOD}\n".encode(), "contains FASTA, not Parquet; rename it to end in .fasta"),
        (f"@a\n{GOOD}\n+\n{GOOD}\n".encode(), "contains FASTQ, not Parquet"),
        (b"PAR1 and nothing", "is a Parquet file that cannot be opened"),
        (b"something", "is not Parquet"),
        (b"", "cannot be read as Parquet"),
    ],
)
def test_what_a_file_is_instead_is_said(tmp_path, content, told, remote):
    path = str(tmp_path / "a.parquet")
    if remote:
        path = "memory://parquet/a.parquet"
    with fsspec.open(path, "wb") as file:
        file.write(content)
    _, error = read(path)
    assert f"{path}: {told}" in str(error)


def test_the_log_is_quiet_when_all_is_well(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    chunks, error = read(write(tmp_path / "a.parquet", BASE | {"species": ["x", "y"]}))
    assert error is None
    assert len(kept(chunks)) == 2
    assert not caplog.records
