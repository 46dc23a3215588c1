"""Files: what is found, what is read, and what is said when one is broken."""

import gzip
import logging

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bioscan_xla.errors import ConfigError, InputError
from bioscan_xla.reads.files import count_rows, metadata_schema
from bioscan_xla.reads.inputs import UNFINISHED, expand_inputs
from bioscan_xla.reads.raw import ReadOptions

from .test_records import GOOD, kept, read, write

COLUMNS = {"sequence_id": [f"s{n}" for n in range(40)], "dna_sequence": [GOOD] * 40}


TAKEN = ["a.parquet", "b.fasta", "c.fq.gz", "deep/d.fna", "rejected_by_hand.fasta"]
LEFT = [
    ".hidden.fasta",
    "_metadata.parquet",
    ".cache/a.fasta",
    "rejected.parquet",
    "rejected-1.parquet",
    "deep/rejected-other-2.parquet",
    f"{UNFINISHED}/half.parquet",  # of a copy that was interrupted
    "old.lance/e.parquet",
]


@pytest.mark.parametrize("remote", [False, True])
def test_files_globs_and_folders(tmp_path, caplog, remote):
    caplog.set_level(logging.INFO)
    root = "memory:///folder" if remote else str(tmp_path)
    files = fsspec.filesystem("memory" if remote else "file")
    for name in [*TAKEN, *LEFT, "notes.txt"]:
        files.makedirs(f"{root}/{name}".rpartition("/")[0], exist_ok=True)
        files.touch(f"{root}/{name}")
    try:
        found = [f"{root}/{name}" for name in TAKEN]
        assert expand_inputs(root) == found
        assert f"skipped {len(LEFT)} files that are hidden or written by this" in caplog.text
        assert "rejected_by_hand" not in caplog.text
        globs = [f"{root}/*.fasta", found[0], f"{root}/*.parquet"]
        assert expand_inputs(globs) == [found[1], found[4], found[0]]
        assert expand_inputs(f"{root}/**/*.fna") == [found[3]]
        assert expand_inputs(f"{root}/rejected.parquet") == [f"{root}/rejected.parquet"]
    finally:
        files.rm(root, recursive=True)


def test_a_folder_inside_a_hidden_one_is_no_hidden_one(tmp_path, monkeypatch):
    (tmp_path / ".data").mkdir()
    (tmp_path / ".data/a.fasta").touch()
    monkeypatch.chdir(tmp_path)
    path = str(tmp_path / ".data/a.fasta")
    for name in (".data", "./.data", ".data/*.fasta", "./.data/*", str(tmp_path / ".data")):
        assert expand_inputs(name) == [path]
    with pytest.raises(InputError, match="no sequence files in this folder"):
        expand_inputs(".")


@pytest.mark.parametrize("name", ["absent.parquet", "nothing*.fasta"])
def test_nothing_there(tmp_path, name):
    with pytest.raises(InputError, match="no such file"):
        expand_inputs(str(tmp_path / name))


def test_unknown_ending(tmp_path):
    (tmp_path / "a.txt").touch()
    with pytest.raises(InputError, match=r"a\.txt: unknown file type"):
        expand_inputs(str(tmp_path / "a.txt"))


def test_renamed_missing_and_kept_columns(tmp_path):
    path = write(
        tmp_path / "a.parquet",
        {
            "otu": pa.array([7, 8]),
            "seq": pa.array([GOOD, GOOD], pa.large_string()).dictionary_encode(),
            "depth_m": [1, 2],
            "station": ["A", "B"],
        },
    )
    chunks, error = read(path)
    assert not chunks
    assert (
        "has no column 'sequence_id' or 'dna_sequence'; it has otu, seq, depth_m, station"
        in str(error)
    )
    assert "--columns" in str(error)
    options = ReadOptions(
        columns={"sequence_id": "otu", "dna_sequence": "seq", "depth": "depth_m"}, keep=("station",)
    )
    (chunk,), error = read(path, options=options)
    assert error is None
    assert chunk.ids == ["7", "8"]
    assert chunk.metadata["depth"].to_pylist() == [1.0, 2.0]
    assert chunk.metadata["station"].to_pylist() == ["A", "B"]
    with pytest.raises(InputError, match="no column 'cruise'"):
        metadata_schema([path], ReadOptions(keep=("cruise",)))


def test_one_column_of_the_file_may_be_several_of_the_table(tmp_path):
    path = write(
        tmp_path / "a.parquet",
        {"otu": ["a"], "dna_sequence": [GOOD], "taxon": ["Osedax"], "depth_m": [7.5]},
    )
    columns = {"sequence_id": "otu", "genus": "taxon", "family": "taxon", "depth": "depth_m"}
    (chunk,), error = read(path, options=ReadOptions(columns=columns, keep=("depth_m", "otu")))
    assert error is None
    (row,) = chunk.metadata.select(["genus", "family", "depth", "depth_m", "otu"]).to_pylist()
    assert [*row.values()] == ["Osedax", "Osedax", 7.5, 7.5, "a"]


@pytest.mark.parametrize(
    "options",
    [{"columns": {"dna": "x"}}, {"keep": ("vector",)}, {"header_taxonomy": "greengenes"}],
)
def test_options_that_contradict(options):
    with pytest.raises(ConfigError):
        ReadOptions(**options)


def test_not_parquet_and_truncated(tmp_path):
    text = tmp_path / "text.parquet"
    text.write_text("not parquet")
    good = write(tmp_path / "good.parquet", COLUMNS)
    cut = tmp_path / "zcut.parquet"
    cut.write_bytes((tmp_path / "good.parquet").read_bytes()[:-20])
    for broken in (text, cut):
        chunks, error = read([good, str(broken)])
        assert len(kept(chunks)) == 40
        assert str(broken) in str(error)
        assert "copy it again" in str(error)


def test_truncated_gzip_gives_what_is_readable(tmp_path):
    path = tmp_path / "cut.fasta.gz"
    with gzip.open(path, "wt") as file:
        file.write(
            "".join(
                f">s{n}\n{n:050b}".replace("0", "A").replace("1", "C") + "\n" for n in range(20000)
            )
        )
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    chunks, error = read(str(path), options=ReadOptions(chunk_rows=1000))
    assert 0 < len(kept(chunks)) < 20000
    assert "cut.fasta.gz: is truncated after record" in str(error)


def test_broken_fastq(tmp_path):
    path = tmp_path / "a.fastq"
    path.write_text(f"@a\n{GOOD}\n+\n{'I' * 50}\n@b\n{GOOD}\n+\nII\n")
    chunks, error = read(str(path))
    assert [name for _, _, name in kept(chunks)] == ["a"]
    assert "is truncated after record 1" in str(error)


def test_empty_fasta_is_no_error(tmp_path, caplog):
    (tmp_path / "a.fasta").touch()
    assert read(str(tmp_path / "a.fasta")) == ([], None)
    assert "contains no records" in caplog.text


def test_cloud_addresses_go_through_fsspec(tmp_path):
    files = fsspec.filesystem("memory")
    with files.open("/bucket/a.parquet", "wb") as file:
        pq.write_table(pa.table(COLUMNS), file)
    with files.open("/bucket/b.fasta.gz", "wb") as file:
        file.write(gzip.compress(f">x\n{GOOD}\n".encode()))
    try:
        for inputs in (
            "memory://bucket",
            "memory://bucket/*",
            ["memory://bucket/a.parquet", "memory://bucket/b.fasta.gz"],
        ):
            chunks, error = read(inputs)
            assert error is None
            assert len(kept(chunks)) == 41
        with pytest.raises(InputError, match="no such file"):
            expand_inputs("memory://bucket/*.fastq")
    finally:
        files.rm("/bucket", recursive=True)


def test_cloud_package_that_is_not_installed():
    with pytest.raises(InputError, match=r"pip install 'bioscan_xla\[cloud\]'"):
        expand_inputs("nosuchcloud://bucket/*.fasta")


def test_rows_are_counted_from_footers_only(tmp_path):
    path = write(tmp_path / "a.parquet", COLUMNS)
    assert count_rows([path, path]) == 80
    (tmp_path / "b.fasta").write_text(">a\nACGT\n")
    assert count_rows([path, str(tmp_path / "b.fasta")]) is None
