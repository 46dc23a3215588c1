"""How a run ends: what it says, its exit status, and what the next run finds."""

import gzip
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from bioscan_xla.embed import main, run_embedding_pipeline
from bioscan_xla.errors import InputError, ModelError

from .test_records import GOOD, write
from .test_resume import sources
from .test_shares import rejected, sequence_of, stored, write_files


def run(source, db, model, *more):
    """The command, in this process; its exit status."""
    words = ["--input", str(source), "--db", str(db), "--model", str(model), "--device", "cpu"]
    return main([*words, "--dtype", "float32", *map(str, more)])


@pytest.fixture
def options(model_folder):
    return {"model": model_folder, "device": "cpu", "dtype": "float32"}


@pytest.fixture
def broken_model(model_folder, tmp_path):
    """The model with NaN in one bias."""
    folder = tmp_path / "broken"
    shutil.copytree(model_folder, folder)
    weights = load_file(folder / "model.safetensors")
    (name,) = [key for key in weights if key.endswith("layer.1.output.dense.bias")]
    weights[name] = torch.full_like(weights[name], float("nan"))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_what_the_model_caused_is_undone_by_a_good_model(
    tmp_path, model_folder, broken_model, capsys
):
    source, db = write_files(tmp_path / "in", [40]), tmp_path / "db"
    assert run(source, db, broken_model) == 1
    error = capsys.readouterr().err
    assert f"model '{broken_model}' gives no usable vectors: 40 of 40 are not finite" in error
    assert not rejected(db)
    # In the same place, as after a download that was mended.
    shutil.copy(Path(model_folder) / "model.safetensors", broken_model)
    assert run(source, db, broken_model) == 0
    assert "all 40 usable sequences embedded" in capsys.readouterr().out
    assert stored(db) == {f"s{row}": 1 for row in range(40)}


def test_a_few_vectors_that_are_not_finite_are_set_aside_for_this_model(
    tmp_path, options, monkeypatch, capsys
):
    from bioscan_xla.embedding import pipeline

    source, db = write_files(tmp_path / "in", [60]), str(tmp_path / "db")
    storable = pipeline.storable

    def spoiled(vectors, schema):
        vectors[:5] = float("nan")
        return storable(vectors, schema)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "storable", spoiled)
        assert run(source, db, options["model"]) == 0
    assert "5 records rejected (see rejected.parquet): vector not finite (5)" in (
        capsys.readouterr().out
    )
    assert [row["code"] for row in rejected(db)] == ["vector_not_finite"] * 5
    # Done for this model, also where it lies elsewhere.
    moved = shutil.copytree(options["model"], tmp_path / "moved")
    assert run(source, db, moved) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert sum(stored(db).values()) == 55


def _none_finite(vectors, schema):
    return vectors.astype(np.float16), np.zeros(len(vectors), bool)


def test_the_last_record_alone_does_not_accuse_the_model(tmp_path, options, monkeypatch):
    from bioscan_xla.embedding import pipeline

    source, db = write_files(tmp_path / "in", [20]), str(tmp_path / "db")
    run_embedding_pipeline(source, db, max_sequences=19, **options)
    monkeypatch.setattr(pipeline, "storable", _none_finite)
    assert run_embedding_pipeline(source, db, **options)["rejected"] == {"vector_not_finite": 1}
    with pytest.raises(ModelError, match="20 of 20"):
        run_embedding_pipeline(source, str(tmp_path / "other"), **options)


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        (
            "protein.fasta",
            ">a\nMKLVEEF\n>b\nMEEPQSD\n",
            "all 2 records of the input were rejected",
        ),
        ("empty.fasta", "", "the input has no records"),
        ("n.fasta", f">a\n{'N' * 30}\n", r"only n (1)"),
    ],
)
def test_nothing_usable_is_no_success(tmp_path, model_folder, capsys, name, text, sentence):
    (tmp_path / name).write_text(text)
    for again in (False, True):
        assert run(tmp_path / name, tmp_path / "db", model_folder) == 2
        output = capsys.readouterr().out
        assert "no usable sequence: " in output
        assert again or sentence in output
        assert "100.0 %" not in output


def test_null_sequences_are_nothing_usable(tmp_path, model_folder, capsys):
    columns = {"sequence_id": ["a", "b"], "dna_sequence": pa.nulls(2, pa.string())}
    write(tmp_path / "null.parquet", columns)
    assert run(tmp_path / "null.parquet", tmp_path / "db", model_folder) == 2
    assert "empty sequence (2)" in capsys.readouterr().out


def test_a_copy_under_another_name_is_a_success(tmp_path, model_folder, capsys):
    (tmp_path / "a.fasta").write_text(f">x\n{GOOD}\n")
    shutil.copy(tmp_path / "a.fasta", tmp_path / "b.fasta")
    for name in ("a.fasta", "b.fasta", "b.fasta"):
        assert run(tmp_path / name, tmp_path / "db", model_folder) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_a_file_that_fails_does_not_stop_the_next(tmp_path, model_folder, capsys, options):
    folder = tmp_path / "in"
    write_files(folder, [10, 10])
    (folder / "a.parquet").write_text("not parquet")
    (folder / "part1.parquet").rename(folder / "z.parquet")
    (folder / "m.fastq").write_text(f"@m\n{GOOD}\n+\n{'I' * 50}\n@n\n{GOOD}\n+\nII\n")
    for again in (False, True):
        assert run(folder, tmp_path / "db", model_folder) == 1
        output, errors = capsys.readouterr()
        assert again or "21 sequences embedded" in output
        last = errors[errors.rindex("error:") :]
        assert "2 files could not be read in full" in last
        assert "a.parquet" in last
        assert "m.fastq" in last
    assert stored(tmp_path / "db") == {f"s{row}": 1 for row in range(20)} | {"m": 1}
    with pytest.raises(InputError, match="2 files"):
        run_embedding_pipeline(str(folder), str(tmp_path / "db"), **options)


def make_unreadable(path):
    """Nobody can read the file, as if its disk had failed."""
    path.unlink()
    path.symlink_to("/proc/self/mem")  # which gives no byte at its beginning, even to root


needs_proc = pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="no /proc/self/mem")


@needs_proc
def test_a_file_that_cannot_be_read_is_named(tmp_path, model_folder, capsys):
    folder = tmp_path / "in"
    write_files(folder, [10, 10])
    make_unreadable(folder / "part0.parquet")
    assert run(folder, tmp_path / "db", model_folder) == 1
    output, errors = capsys.readouterr()
    assert "10 sequences embedded" in output
    assert "part0.parquet: cannot be read" in errors


@needs_proc
def test_one_of_several_processes_stops_at_a_file_that_it_cannot_read(tmp_path, options):
    """Another may read it: an id that comes again in a later file would be embedded by both."""
    folder, db = tmp_path / "in", str(tmp_path / "db")
    write_files(folder, [10])
    shutil.copy(folder / "part0.parquet", folder / "part1.parquet")
    with gzip.open(folder / "part0.fasta.gz", "wt") as file:  # read before the Parquet files
        file.writelines(f">s{row}\n{sequence_of(row)}\n" for row in range(2000))
    whole = (folder / "part0.fasta.gz").read_bytes()
    shares = [options | {"process_index": index, "process_count": 2} for index in (0, 1)]
    for path, spoil in (
        (folder / "part0.parquet", make_unreadable),
        (folder / "part0.fasta.gz", lambda path: path.write_bytes(whole[: len(whole) // 2])),
    ):
        spoil(path)
        for share in shares:
            with pytest.raises(InputError, match="stops before the files after it"):
                run_embedding_pipeline(str(folder), db, **share)
        path.unlink()
    assert not {"part1.parquet"} & {name.split("#")[0] for name in sources(db)}
    for share in shares:
        run_embedding_pipeline(str(folder), db, **share)
    assert max(stored(db).values()) == 1
    assert len(stored(db)) >= 10


def test_the_summary_counts_sequences_and_every_change(tmp_path, model_folder, capsys):
    columns = {
        "sequence_id": [" a ", "b", "c"],
        "dna_sequence": [GOOD.lower(), sequence_of(1), sequence_of(2)],
        "depth": [1.0, float("nan"), 3.0],
    }
    write(tmp_path / "x.parquet", columns)
    assert run(tmp_path / "x.parquet", tmp_path / "db", model_folder, "--max-sequences", 1) == 0
    assert "\n1 sequences embedded" in "\n" + capsys.readouterr().out
    assert run(tmp_path / "x.parquet", tmp_path / "db", model_folder) == 0
    output = capsys.readouterr().out
    assert "the remaining 2 usable sequences were embedded" in output
    assert "nan position 1" in output
    assert "tokens" not in output
    db = tmp_path / "all"
    assert run(tmp_path / "x.parquet", db, model_folder) == 0
    output = capsys.readouterr().out
    assert "all 3 usable sequences embedded" in output
    assert "cleaned: case 1, nan position 1, id stripped 1" in output
    assert set(stored(db)) == {"a", "b", "c"}


def test_max_sequences_counts_no_change_of_records_that_it_left(tmp_path, options):
    sequences = [sequence_of(row).lower() if row % 2 else sequence_of(row) for row in range(20)]
    columns = {"sequence_id": [f" s{row}" for row in range(20)], "dna_sequence": sequences}
    write(tmp_path / "x.parquet", columns)
    runs = [
        run_embedding_pipeline(
            str(tmp_path / "x.parquet"), str(tmp_path / "db"), max_sequences=most, **options
        )
        for most in (5, 7, None)
    ]
    assert [result["cleaned"]["case"] for result in runs] == [2, 4, 4]
    assert [result["cleaned"]["id_stripped"] for result in runs] == [5, 7, 8]


def test_max_errors_still_says_what_was_committed(tmp_path, model_folder, capsys):
    rows = {"sequence_id": ["a", "b"], "dna_sequence": [GOOD, ""]}
    pq.write_table(pa.table(rows), tmp_path / "x.parquet")
    assert run(tmp_path / "x.parquet", tmp_path / "db", model_folder, "--max-errors", 0) == 1
    output, errors = capsys.readouterr()
    assert "1 sequences embedded" in output
    assert "more than max_errors 0" in errors
