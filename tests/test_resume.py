"""Going on: inputs that moved or changed, other rules, other layouts, full disks."""

import logging
import os
import shutil
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bioscan_xla.embed import run_embedding_pipeline
from bioscan_xla.errors import TableError
from bioscan_xla.reads import shares
from bioscan_xla.table.neighbours import open_table

from .conftest import ROOT
from .test_records import write
from .test_shares import rejected, sequence_of, stored, write_files


@pytest.fixture
def options(model_folder):
    return {"model": model_folder, "device": "cpu", "dtype": "float32"}


def sources(db):
    """The distinct names in column `source`."""
    return set(open_table(str(db)).to_arrow()["source"].to_pylist())


def test_a_moved_input_goes_on(tmp_path, options):
    db = str(tmp_path / "db")
    old = tmp_path / "old"
    write_files(old, [30, 30])
    (old / "2024").mkdir()
    (old / "part1.parquet").rename(old / "2024" / "part1.parquet")
    run_embedding_pipeline(str(old), db, max_sequences=40, **options)
    new = old.rename(tmp_path / "new")
    result = run_embedding_pipeline(str(new / "**" / "*.parquet"), db, **options)
    assert result["embeddings_generated"] == 20
    # One file by itself is known too, wherever it lies below the folder that was given before.
    again = run_embedding_pipeline([str(new / "2024" / "part1.parquet")], db, **options)
    assert again["sequences_processed"] == 0
    assert stored(db) == {f"s{row}": 1 for row in range(60)}
    assert not rejected(db)
    assert {name.split("#")[0] for name in sources(db)} == {"part0.parquet", "2024/part1.parquet"}


def test_a_file_that_changed_is_another_and_is_told(tmp_path, options, caplog):
    path, db = tmp_path / "reads.fasta", str(tmp_path / "db")
    path.write_text(f">a\n{sequence_of(1)}\n")
    run_embedding_pipeline(str(path), db, **options)
    path.write_text(f">b\n{sequence_of(2)}\n>a\n{sequence_of(1)}\n")
    with caplog.at_level(logging.WARNING):
        run_embedding_pipeline(str(path), db, **options)
    assert "reads.fasta changed since it was embedded" in caplog.text
    assert stored(db) == {"a": 1, "b": 1}
    assert len(sources(db)) == 2


def test_a_record_that_was_mended_is_embedded(tmp_path, options):
    path, db = tmp_path / "reads.fasta", str(tmp_path / "db")
    path.write_text(f">a\n{sequence_of(1)}\n>b\nACGTEFG\n")
    run_embedding_pipeline(str(path), db, **options)
    path.write_text(f">a\n{sequence_of(1)}\n>b\n{sequence_of(2)}\n")
    result = run_embedding_pipeline(str(path), db, **options)
    assert result["rejected"] == {"id_seen_before": 1}
    assert stored(db) == {"a": 1, "b": 1}


def test_a_repeat_counts_once_what_it_repeats_is_gone(tmp_path, options):
    db, reads = str(tmp_path / "db"), tmp_path / "reads"
    reads.mkdir()
    (reads / "1.fasta").write_text(f">a\n{sequence_of(1)}\n>b\nACGTEFG\n")
    (reads / "2.fasta").write_text(f">a\n{sequence_of(1)}\n>b\n{sequence_of(2)}\n")
    run_embedding_pipeline(str(reads), db, **options)
    assert run_embedding_pipeline(str(reads), db, **options)["sequences_processed"] == 0
    (reads / "1.fasta").unlink()
    assert run_embedding_pipeline(str(reads), db, **options)["embeddings_generated"] == 1
    assert run_embedding_pipeline(str(reads), db, **options)["sequences_processed"] == 0
    assert stored(db) == {"a": 1, "b": 1}
    assert [item["sequence_id"] for item in rejected(db)] == ["b", "a"]


def test_files_added_later_fit_the_kept_columns_of_the_table(tmp_path, options):
    db = str(tmp_path / "db")
    kinds = [pa.array([1], pa.int64()), pa.array([2], pa.int32()), pa.nulls(1)]
    for number, kind in enumerate(kinds):
        columns = {"sequence_id": [f"s{number}"], "dna_sequence": [sequence_of(number)]}
        path = write(tmp_path / f"{number}.parquet", columns | {"station": kind})
        run_embedding_pipeline(path, db, keep=["station"], **options)
    (tmp_path / "3.fasta").write_text(f">s3\n{sequence_of(3)}\n")
    run_embedding_pipeline(str(tmp_path / "3.fasta"), db, keep=["station"], **options)
    found = open_table(db).to_arrow().sort_by("sequence_id")["station"]
    assert found.to_pylist() == [1, 2, None, None]
    path = write(tmp_path / "4.parquet", columns | {"station": [1.5]})
    with pytest.raises(TableError, match="column station: the table has int64"):
        run_embedding_pipeline(path, db, keep=["station"], **options)


def test_two_files_of_one_name_and_a_copy(tmp_path, options, caplog):
    for number, folder in enumerate("xyz"):
        (tmp_path / folder).mkdir()
        text = f">r{number % 2}\n{sequence_of(number % 2)}\n"
        (tmp_path / folder / "reads.fasta").write_text(text)
    inputs = [str(tmp_path / folder / "reads.fasta") for folder in "xyz"]
    result = run_embedding_pipeline(inputs, str(tmp_path / "db"), **options)
    assert result["embeddings_generated"] == result["sequences_processed"] == 2
    assert "is a copy of" in caplog.text
    assert "changed" not in caplog.text


def test_a_table_of_an_earlier_version_goes_on(tmp_path, options):
    """Whole paths as names, no process count, rejections with neither code nor rule of a row."""
    db, path = str(tmp_path / "db"), tmp_path / "reads.parquet"
    ids = [f"s{row}" for row in range(20)]
    texts = ["ACGT", *map(sequence_of, range(1, 20))]
    write(path, {"sequence_id": ids, "dna_sequence": texts})
    run_embedding_pipeline(str(path), db, max_sequences=10, **options)
    table = open_table(db)
    table.update(values={"source": str(path)})
    table.update_field_metadata({"path": "source", "metadata": {"bioscan_xla.process_count": None}})
    (row,) = rejected(db)
    old = pa.table({key: [row[key]] for key in ("row", "sequence_id", "reason")})
    old = old.add_column(0, "source", pa.array([str(path)]))
    metadata = {"bioscan_xla.reading": row["rule"]}
    pq.write_table(old.replace_schema_metadata(metadata), tmp_path / "db" / "rejected.parquet")
    result = run_embedding_pipeline(str(path), db, **options)
    assert result["sequences_processed"] == 10 - 1 + 0
    assert stored(db) == {name: 1 for name in ids[1:]}
    assert run_embedding_pipeline(str(path), db, **options)["sequences_processed"] == 0


@pytest.mark.parametrize("count", [1, 2])
def test_another_rule_looks_again_whatever_came_between(tmp_path, options, count, monkeypatch):
    monkeypatch.setattr(shares, "BLOCK_ROWS", 4)
    db = str(tmp_path / "db")
    for name, first in (("a", 0), ("b", 100)):
        rows = range(first, first + 20)
        texts = [sequence_of(row)[: 12 if row % 3 else 50] for row in rows]
        columns = {"sequence_id": [f"s{row}" for row in rows], "dna_sequence": texts}
        write(tmp_path / f"{name}.parquet", columns, row_group_size=3)

    def run(name, least):
        for index in range(count):
            run_embedding_pipeline(
                str(tmp_path / f"{name}.parquet"),
                db,
                min_length_bp=least,
                process_index=index,
                process_count=count,
                **options,
            )

    run("a", 20)
    assert len(rejected(db)) == 13
    run("b", 10)
    run("a", 10)
    assert stored(db) == {f"s{row}": 1 for row in (*range(20), *range(100, 120))}
    assert not rejected(db)


def test_shares_go_on_with_another_layout(tmp_path, options, monkeypatch):
    """Each process stops early and goes on with other chunks and commits, as on another device."""
    from bioscan_xla.embedding import run as embed

    monkeypatch.setattr(shares, "BLOCK_ROWS", 16)
    module = sys.modules.get("bioscan_xla.embedding.run", embed)
    source = write_files(tmp_path / "in", [100, 7, 45], row_group_size=30)
    db = str(tmp_path / "db")
    for turn, (chunk_rows, commit_rows, most) in enumerate(
        ((64, 10, 20), (5, 3, 9), (33, 50, None))
    ):
        monkeypatch.setitem(module._CHUNK_ROWS, "cpu", chunk_rows)
        for index in (0, 1, 2) if turn % 2 else (2, 0, 1):
            run_embedding_pipeline(
                source,
                db,
                process_index=index,
                process_count=3,
                commit_rows=commit_rows,
                max_sequences=most,
                **options,
            )
    assert stored(db) == {f"s{row}": 1 for row in range(152)}


LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))
from bioscan_xla.embed import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_file_that_cannot_grow_is_an_error_and_the_next_run_goes_on(tmp_path, options):
    """The operating system refuses to write on, as it does on a full disk."""
    source, db = write_files(tmp_path / "in", [2000]), str(tmp_path / "db")
    words = ["--input", source, "--db", db, "--commit-rows", "5000"]
    words += [word for key, value in options.items() for word in (f"--{key}", value)]
    result = subprocess.run(
        [sys.executable, "-c", LIMITED, *words],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert result.returncode == 1, result.stderr
    assert "rows could not be written" in result.stderr
    assert "check the free space" in result.stderr
    assert "Traceback" not in result.stderr
    run_embedding_pipeline(source, db, **options)
    assert stored(db) == {f"s{row}": 1 for row in range(2000)}


@pytest.fixture
def small_disk(tmp_path):
    """A folder that is a disk of 1 MB, and what mounts it again with other options."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(*words):
        return subprocess.run(["mount", *words, str(folder)], capture_output=True, check=False)

    if not shutil.which("mount") or mount("-t", "tmpfs", "-o", "size=1m", "none").returncode:
        pytest.skip("only root may mount a disk")
    yield folder, lambda options: mount("-o", f"remount,{options}")
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_keeps_what_was_committed_and_the_next_run_goes_on(
    tmp_path, options, small_disk
):
    folder, remount = small_disk
    source, db = write_files(tmp_path / "in", [5000]), str(folder / "db")
    with pytest.raises(
        TableError, match=r"could not be written.*free\s+space.*run again to resume"
    ):
        run_embedding_pipeline(source, db, commit_rows=500, **options)
    num_rows = sum(stored(db).values())
    assert 0 < num_rows < 5000
    assert num_rows % 500 == 0
    assert remount("size=100m").returncode == 0
    result = run_embedding_pipeline(source, db, **options)
    assert result["embeddings_generated"] == 5000 - num_rows
    assert stored(db) == {f"s{row}": 1 for row in range(5000)}


def test_a_database_that_may_not_be_written(tmp_path, options, small_disk):
    folder, remount = small_disk
    source, db = write_files(tmp_path / "in", [20]), str(folder / "db")
    run_embedding_pipeline(source, db, max_sequences=5, **options)
    assert remount("ro").returncode == 0
    with pytest.raises(TableError, match="permissions"):
        run_embedding_pipeline(source, db, **options)
    assert remount("rw").returncode == 0
    assert sum(stored(db).values()) == 5
    run_embedding_pipeline(source, db, **options)
    assert sum(stored(db).values()) == 20


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_folders_that_may_not_be_written(tmp_path, options):
    source, db = write_files(tmp_path / "in", [20]), tmp_path / "db"
    run_embedding_pipeline(source, str(db), max_sequences=5, **options)
    folders = [db, *(path for path in db.rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o500)
    try:
        with pytest.raises(TableError, match="permissions"):
            run_embedding_pipeline(source, str(db), **options)
    finally:
        for folder in folders:
            folder.chmod(0o700)
    assert sum(stored(db).values()) == 5
