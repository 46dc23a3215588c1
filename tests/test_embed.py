"""The whole command: what it makes, and that nothing interrupts it for good."""

import logging
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import lancedb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import bioscan_xla
from bioscan_xla.embed import main, run_embedding_pipeline
from bioscan_xla.embedding import progress
from bioscan_xla.errors import ConfigError, InputError, TableError
from bioscan_xla.sample import write_sample
from bioscan_xla.search import main as search_main
from bioscan_xla.table.neighbours import open_table
from bioscan_xla.table.store import Store

from .bench.kill import kill_and_resume
from .conftest import cosine


@pytest.fixture
def sample(tmp_path):
    path = tmp_path / "sample.parquet"
    write_sample(path, 60)
    return str(path)


@pytest.fixture
def options(model_folder):
    return {"model": model_folder, "device": "cpu", "dtype": "float32"}


def _ids(db):
    return open_table(str(db)).to_arrow()["sequence_id"].to_pylist()


def _rejected(db):
    return pq.read_table(Path(db) / "rejected.parquet").to_pylist()


def test_vectors_and_metadata_arrive(sample, tmp_path, options, model_folder):
    result = run_embedding_pipeline(sample, str(tmp_path / "db"), keep=["marker"], **options)
    rows = open_table(str(tmp_path / "db")).to_arrow()
    source = pq.read_table(sample).slice(0, 60)
    assert rows["sequence_id"].to_pylist() == source["sequence_id"].to_pylist()
    for column in ("species", "depth", "latitude", "longitude", "marker"):
        assert rows[column].to_pylist() == source[column].to_pylist()
    assert rows["row"].to_pylist() == list(range(60))
    assert rows.schema.field("vector").type == pa.list_(pa.float16(), 64)
    assert {
        "sequences_processed": 62,
        "embeddings_generated": 60,
        "errors": 2,
        "total_rows": 60,
        "vector_count": 60,
        "avg_vector_length": 64,
    }.items() <= result.items()
    assert result["sample_vector_norm"] > 0
    assert result["seconds"] > 0
    assert result["useful_token_fraction"] == 1
    assert result["fingerprint"]["dtype"] == "float32"
    assert Counter(row["reason"] for row in _rejected(tmp_path / "db")) == {
        "empty sequence": 1,
        "character 'L' at base 3 is not a nucleotide code": 1,
    }


def test_stored_vectors_are_those_of_each_sequence(sample, tmp_path, options):
    from bioscan_xla.encode.encoder import load_encoder
    from bioscan_xla.encode.inference import embed_text
    from bioscan_xla.encode.runtime import open_device

    run_embedding_pipeline(sample, str(tmp_path / "db"), vector_dtype="float32", **options)
    rows = open_table(str(tmp_path / "db")).to_arrow()
    encoder = load_encoder(options["model"], device=open_device("cpu", "float32"))
    wanted = embed_text(encoder, pq.read_table(sample)["dna_sequence"].to_pylist()[:60])
    np.testing.assert_allclose(np.stack(rows["vector"].to_pylist()), wanted, atol=1e-5)


def test_second_run_has_nothing_to_do(sample, tmp_path, options, monkeypatch):
    first = run_embedding_pipeline(sample, str(tmp_path / "db"), **options)
    version = open_table(str(tmp_path / "db")).version
    second = run_embedding_pipeline(sample, str(tmp_path / "db"), **options)
    assert (first["embeddings_generated"], second["embeddings_generated"]) == (60, 0)
    assert second["total_rows"] == 60
    assert len(_rejected(tmp_path / "db")) == 2
    rows = open_table(str(tmp_path / "db"))
    assert rows.count_rows() == 60
    assert rows.version >= version


def test_max_sequences_then_the_rest(sample, tmp_path, options):
    db = str(tmp_path / "db")
    assert run_embedding_pipeline(sample, db, max_sequences=25, **options)["total_rows"] == 25
    assert run_embedding_pipeline(sample, db, **options)["embeddings_generated"] == 35
    assert sorted(_ids(db)) == sorted(pq.read_table(sample)["sequence_id"].to_pylist()[:60])
    assert len(_rejected(db)) == 2


def test_duplicate_ids_are_there_once(tmp_path, options):
    table = pa.table(
        {
            "sequence_id": ["a", "b", "a", "c", "b"],
            "dna_sequence": ["ACGTTGCATG" * n for n in (5, 6, 7, 8, 9)],
        }
    )
    pq.write_table(table, tmp_path / "one.parquet", row_group_size=2)
    pq.write_table(table, tmp_path / "two.parquet")
    paths = [str(tmp_path / name) for name in ("one.parquet", "two.parquet")]
    result = run_embedding_pipeline(paths, str(tmp_path / "db"), commit_rows=1, **options)
    rows = open_table(str(tmp_path / "db")).to_arrow().sort_by("sequence_id").to_pylist()
    assert [(row["sequence_id"], len(row["dna_sequence"])) for row in rows] == [
        ("a", 50),
        ("b", 60),
        ("c", 80),
    ]
    assert result["errors"] == 7
    assert result["rejected"] == {"id_seen_before": 7}


def test_another_fingerprint_is_refused(sample, tmp_path, options):
    run_embedding_pipeline(sample, str(tmp_path / "db"), max_sequences=5, **options)
    with pytest.raises(TableError, match=r"pooling: the table has 'mean', this run has 'cls'"):
        run_embedding_pipeline(sample, str(tmp_path / "db"), pooling="cls", **options)


def test_corrupt_parquet_commits_what_came_before(tmp_path, options):
    path = tmp_path / "broken.parquet"
    write_sample(path, 300)  # row groups of 100
    footer = pq.ParquetFile(path).metadata
    data = bytearray(path.read_bytes())
    sequence_column = footer.schema.names.index("dna_sequence")
    start = footer.row_group(1).column(sequence_column).data_page_offset
    data[start : start + 40] = b"\xff" * 40
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"broken\.parquet: row group 1 is damaged after row 100"):
        run_embedding_pipeline(str(path), str(tmp_path / "db"), **options)
    assert len(_ids(tmp_path / "db")) == 100


def test_max_errors_stops_after_a_commit(sample, tmp_path, options):
    with pytest.raises(InputError, match="more than max_errors 1"):
        run_embedding_pipeline(sample, str(tmp_path / "db"), max_errors=1, **options)
    assert len(_ids(tmp_path / "db")) == 60
    assert len(_rejected(tmp_path / "db")) == 2


def test_unwritable_database(sample, tmp_path, options):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(TableError, match="permissions"):
        run_embedding_pipeline(sample, str(tmp_path / "file" / "db"), **options)


def test_full_disk_keeps_what_was_committed(sample, tmp_path, options, monkeypatch):
    append = Store.append
    calls = []

    def failing(self, parts):
        calls.append(1)
        if len(calls) == 3:
            # What LanceDB raises when the operating system reports ENOSPC.
            with monkeypatch.context() as patch:
                patch.setattr(type(self.table), "add", _no_space)
                return append(self, parts)
        return append(self, parts)

    monkeypatch.setattr(Store, "append", failing)
    with pytest.raises(TableError, match="free space"):
        run_embedding_pipeline(sample, str(tmp_path / "db"), commit_rows=10, **options)
    assert len(_ids(tmp_path / "db")) == 20
    monkeypatch.setattr(Store, "append", append)
    run_embedding_pipeline(sample, str(tmp_path / "db"), commit_rows=10, **options)
    assert len(set(_ids(tmp_path / "db"))) == len(_ids(tmp_path / "db")) == 60


def _no_space(*args, **kwargs):
    raise OSError("No space left on device (os error 28)")


def test_mirror_brings_a_lost_table_back(sample, tmp_path, options):
    db, mirror = tmp_path / "db", tmp_path / "drive"
    run_embedding_pipeline(sample, str(db), str(mirror), max_sequences=40, **options)
    assert len(_ids(mirror)) == 40
    db.rename(tmp_path / "lost")
    result = run_embedding_pipeline(sample, str(db), str(mirror), **options)
    assert result["embeddings_generated"] == 20
    assert len(set(_ids(db))) == len(set(_ids(mirror))) == 60


def test_search_by_text_and_by_command(sample, tmp_path, options, capsys, caplog):
    db = str(tmp_path / "db")
    run_embedding_pipeline(sample, db, **options)
    record = pq.read_table(sample).slice(7, 1).to_pylist()[0]
    assert bioscan_xla.__version__
    found = lancedb.connect(db).open_table("embeddings").search(record["dna_sequence"]).limit(1)
    assert found.to_list()[0]["sequence_id"] == record["sequence_id"]
    for style in ("table", "csv", "json"):
        words = ["--db", db, record["dna_sequence"], "-k", "2", "--format", style]
        assert search_main(words) == 0
        assert record["sequence_id"] in capsys.readouterr().out
    assert search_main(["--db", db, "ACGTEE"]) == 1
    assert "not a nucleotide" in capsys.readouterr().err
    query = tmp_path / "query.fastq"
    query.write_text(f"@whole\n{'ACGT' * 9}\n+\n{'I' * 36}\n@torn\nAC")
    words = ["--db", db, str(query), "-k", "1", "--format", "json"]
    assert search_main(words) == 1
    assert '"query": "whole"' in capsys.readouterr().out
    assert sum("truncated" in text for text in caplog.messages) == 1


def test_search_leaves_out_a_query_that_cannot_be_used(sample, tmp_path, options, capsys, caplog):
    db, queries = str(tmp_path / "db"), tmp_path / "queries.fasta"
    run_embedding_pipeline(sample, db, **options)
    record = pq.read_table(sample).slice(7, 1).to_pylist()[0]
    queries.write_text(f">protein\nMKLV\n>good\n{record['dna_sequence']}\n>none\n\n")
    assert search_main(["--db", db, str(queries), "-k", "1", "--format", "csv"]) == 1
    out, err = capsys.readouterr()
    assert f"good,0.0,{record['sequence_id']}" in out
    assert "2 of 3 queries could not be used" in err
    told = [text for text in caplog.messages if "left out" in text]
    assert any("protein" in text and "not a nucleotide" in text for text in told)
    assert any("none: empty sequence" in text for text in told)


def test_unknown_option_names_the_nearest(sample, tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'commit_rows'"):
        run_embedding_pipeline(sample, str(tmp_path / "db"), commit_row=5)


def test_dry_run_computes_nothing(sample, tmp_path, model_folder, capsys):
    words = ["--input", sample, "--db", str(tmp_path / "db"), "--model", model_folder, "--dry-run"]
    assert main(words) == 0
    output = capsys.readouterr().out
    assert "62 records" in output
    assert "useful tokens: 100.0 %" in output
    assert " 0.00 GiB" not in output
    assert not (tmp_path / "db").exists()


def test_failing_tracker_changes_nothing(sample, tmp_path, options, monkeypatch, caplog):
    import wandb

    def broken(**_):
        raise RuntimeError("no network")

    monkeypatch.setattr(wandb, "init", broken)
    with caplog.at_level(logging.WARNING):
        result = run_embedding_pipeline(sample, str(tmp_path / "db"), wandb=True, **options)
    assert result["total_rows"] == 60
    assert "no network" in caplog.text


def _command(source, db, model_folder, *more):
    return [
        sys.executable,
        "-m",
        "bioscan_xla.embed",
        "--input",
        str(source),
        "--db",
        str(db),
        "--model",
        model_folder,
        "--device",
        "cpu",
        "--dtype",
        "float32",
        *map(str, more),
    ]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_commits_and_says_how_to_go_on(tmp_path, model_folder, options, number):
    source, db = tmp_path / "many.parquet", tmp_path / "db"
    write_sample(source, 6000)
    process = subprocess.Popen(
        _command(source, db, model_folder, "--commit-rows", 20),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    _wait_for_rows(db, 1, process)
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number, errors
    assert "Run the same command to resume" in output
    rows = _ids(db)
    assert 0 < len(rows) < 6000
    assert len(rows) == len(set(rows))


def _wait_for_rows(db, count, process):
    while process.poll() is None:
        try:
            if open_table(str(db)).count_rows() >= count:
                return
        except TableError:
            pass
        time.sleep(0.02)
    pytest.fail(f"the run ended first: {process.communicate()}")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["one process", "two processes"])
def test_killed_at_random_moments_each_id_is_there_once(tmp_path, model_folder, kind):
    count = kill_and_resume(tmp_path, model_folder, kind, num_kills=6, seed=1)
    assert count.kills == 6
    assert (count.lost, count.doubled, count.rows) == (0, 0, 1500)
    assert count.commits > 20


def test_log_line_where_there_is_no_terminal(sample, tmp_path, options, monkeypatch, caplog):
    monkeypatch.setattr(progress, "_LOG_SECONDS", 0.0)
    with caplog.at_level(logging.INFO, logger="bioscan_xla"):
        run_embedding_pipeline(sample, str(tmp_path / "db"), commit_rows=20, **options)
    assert "of 62 records" in caplog.text
    assert "last commit" in caplog.text


def test_number_of_processes_changes_nothing(tmp_path, options, model_folder):
    source = tmp_path / "sample.parquet"
    write_sample(source, 300)
    vectors = {}
    for count in (1, 3):
        db = str(tmp_path / f"db{count}")
        for index in range(count):
            run_embedding_pipeline(
                str(source), db, process_index=index, process_count=count, **options
            )
        rows = open_table(db).to_arrow().sort_by("sequence_id")
        assert rows["sequence_id"].to_pylist() == sorted(rows["sequence_id"].to_pylist())
        vectors[count] = np.stack(rows["vector"].to_pylist()).astype(np.float32)
    assert len(vectors[1]) == len(vectors[3]) == 300
    assert cosine(vectors[1], vectors[3]).min() > 0.99999
