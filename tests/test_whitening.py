"""Centred and whitened tables: fitted once, the same for later rows, for queries and for names."""

import shutil
from pathlib import Path

import lancedb
import numpy as np
import pyarrow.parquet as pq
import pytest

import bioscan_xla  # noqa: F401  registers the embedding function
from bioscan_xla.classify import run_classification_pipeline
from bioscan_xla.embed import run_embedding_pipeline
from bioscan_xla.encode.fingerprint import compare
from bioscan_xla.encode.transform import fit, load_transform
from bioscan_xla.errors import ConfigError, InputError, ModelError, TableError
from bioscan_xla.options import ReferenceConfig
from bioscan_xla.reference import main, transform
from bioscan_xla.search import search_sequences
from bioscan_xla.table.embedding_function import _load
from bioscan_xla.table.neighbours import open_table, read_fingerprint

from .conftest import cosine

ROWS = 40


@pytest.fixture(scope="module")
def sample(training_sample, tmp_path_factory):
    path = tmp_path_factory.mktemp("sample") / "reads.parquet"
    pq.write_table(pq.read_table(training_sample).slice(0, ROWS), path)
    return str(path)


@pytest.fixture(scope="module")
def embed(sample, model_folder):
    def run(db, **options):
        wanted = {"model": model_folder, "device": "cpu", "dtype": "float32", "frames": 6}
        return run_embedding_pipeline(sample, str(db), **(wanted | options))

    return run


@pytest.fixture(scope="module")
def database(embed, tmp_path_factory):
    db = tmp_path_factory.mktemp("vectors") / "vectors.db"
    embed(db, max_sequences=30)  # the rest comes later
    assert transform(ReferenceConfig("whiten", str(db))) == (30, "whitened")
    assert transform(ReferenceConfig("center", str(db))) == (30, "centered")
    return db


def rows_of(db, table):
    """Ids and vectors of a table, in the order of the ids."""
    found = open_table(str(db), table).to_arrow().sort_by("sequence_id")
    vectors = np.stack(found["vector"].to_numpy(zero_copy_only=False)).astype(np.float32)
    return found["sequence_id"].to_pylist(), vectors


def test_whitened_vectors_are_centred_and_spread_alike():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(4000, 16)) * np.linspace(0.2, 3, 16) + 2
    parts = np.split(vectors, [1000, 1100])
    white = fit(parts, "whiten").apply(vectors)
    np.testing.assert_allclose(white.mean(0), 0, atol=1e-3)
    spread = np.cov(white.T)
    assert np.abs(spread - np.diag(np.diag(spread))).max() < 1e-3
    before = np.cov((vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).T)
    assert np.linalg.cond(spread) < 0.2 * np.linalg.cond(before)
    np.testing.assert_allclose(fit([vectors], "whiten").apply(vectors), white, atol=1e-3)
    centred = fit(parts, "center").apply(vectors)
    np.testing.assert_allclose(np.cov(centred.T), before, atol=1e-5)
    assert fit(parts, "center").mark != fit(parts, "whiten").mark


@pytest.mark.parametrize("table", ["whitened", "centered"])
def test_a_transformed_table_has_the_rows_of_the_raw_one(database, table):
    ids, raw = rows_of(database, "embeddings")
    there, vectors = rows_of(database, table)
    assert there == ids
    file = load_transform(str(database / f"{table}.transform.safetensors"))
    np.testing.assert_allclose(vectors, file.apply(raw), rtol=2e-3, atol=2e-3)
    old, new = (
        open_table(str(database), name).schema.remove_metadata() for name in ("embeddings", table)
    )
    assert old == new


def test_rows_added_later_get_the_same_transform(database, embed, tmp_path):
    shutil.copytree(database, tmp_path / "moved.db")
    result = embed(tmp_path / "moved.db", table="whitened")
    assert (result["embeddings_generated"], result["total_rows"]) == (ROWS - 30, ROWS)
    embed(tmp_path / "whole.db")
    ids, raw = rows_of(tmp_path / "whole.db", "embeddings")
    there, vectors = rows_of(tmp_path / "moved.db", "whitened")
    assert there == ids
    file = load_transform(str(database / "whitened.transform.safetensors"))
    assert cosine(vectors, file.apply(raw)).min() > 0.9999
    # The table of raw vectors beside it goes on by itself.
    assert embed(tmp_path / "moved.db")["total_rows"] == ROWS


def test_two_processes_go_on_behind_the_transform(embed, tmp_path):
    db = tmp_path / "two.db"
    embed(db, process_index=0, process_count=2, max_sequences=10)
    embed(db, process_index=1, process_count=2, max_sequences=10)
    transform(ReferenceConfig("whiten", str(db)))
    with pytest.raises(TableError, match="process_count 2"):
        embed(db, table="whitened")
    for index in (1, 0):
        embed(db, table="whitened", process_index=index, process_count=2)
    ids, _ = rows_of(db, "whitened")
    assert len(ids) == len(set(ids)) == ROWS


def test_queries_are_transformed_as_the_rows_are(database, sample, tmp_path):
    text = pq.read_table(sample)["dna_sequence"][3].as_py()
    name = pq.read_table(sample)["sequence_id"][3].as_py()
    for table in ("embeddings", "whitened", "centered"):
        (row,) = search_sequences(str(database), [text], table=table, k=1, device="cpu")
        assert row["sequence_id"] == name
        assert row["distance"] < 1e-3
    opened = lancedb.connect(str(database)).open_table("whitened")
    (row,) = opened.search(text).distance_type("cosine").limit(1).to_list()
    assert row["sequence_id"] == name
    assert row["_distance"] < 1e-3


def test_a_database_may_move(database, sample, tmp_path):
    shutil.copytree(database, tmp_path / "moved.db")
    text = pq.read_table(sample)["dna_sequence"][3].as_py()
    found = [
        search_sequences(str(db), [text], table="whitened", k=3, device="cpu")
        for db in (database, tmp_path / "moved.db")
    ]
    assert found[0] == found[1]
    file = tmp_path / "moved.db" / "whitened.transform.safetensors"
    shutil.copy(tmp_path / "moved.db" / "centered.transform.safetensors", file)
    _load.cache_clear()
    with pytest.raises(ModelError, match="transform: the table has 'whiten"):
        search_sequences(str(tmp_path / "moved.db"), [text], table="whitened", device="cpu")
    for damage in (lambda: file.write_bytes(b"{"), file.unlink):
        damage()
        _load.cache_clear()
        with pytest.raises(ModelError, match=r"whitened\.transform\.safetensors"):
            search_sequences(str(tmp_path / "moved.db"), [text], table="whitened", device="cpu")


def test_what_is_transformed_is_not_transformed_again(database, embed, model_folder):
    before = (database / "whitened.transform.safetensors").read_bytes()
    with pytest.raises(TableError, match="'whitened' exists"):
        transform(ReferenceConfig("whiten", str(database)))
    with pytest.raises(TableError, match="transformed already"):
        transform(ReferenceConfig("center", str(database), table="whitened", to="again"))
    assert (database / "whitened.transform.safetensors").read_bytes() == before
    with pytest.raises(ConfigError, match="table of raw vectors"):
        ReferenceConfig("whiten", str(database), to="embeddings")
    with pytest.raises(TableError, match="frames"):
        embed(database, table="whitened", frames=1)
    made_by = read_fingerprint(open_table(str(database), "whitened"))
    raw = read_fingerprint(open_table(str(database)))
    assert compare(raw, made_by).different == ("transform",)
    assert compare({k: v for k, v in raw.items() if k != "frames"}, made_by).different == (
        "frames",
        "transform",
    )


def test_a_file_of_sequences_has_nothing_to_whiten(sample, tmp_path, capsys, embed):
    assert main(["whiten", sample]) == 1
    assert "embed it first" in capsys.readouterr().err
    embed(tmp_path / "one.db", max_sequences=1)
    with pytest.raises(InputError, match="cannot be fitted to 1 vectors"):
        transform(ReferenceConfig("whiten", str(tmp_path / "one.db")))
    assert not (tmp_path / "one.db" / "whitened.lance").exists()


def test_a_transform_cut_short_is_made_again(embed, tmp_path, monkeypatch):
    from bioscan_xla.table import transformed

    db = tmp_path / "cut.db"
    embed(db, max_sequences=12)

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(transformed.Store, "append", stop)
        with pytest.raises(KeyboardInterrupt):
            transform(ReferenceConfig("whiten", str(db)))
    embed(db, max_sequences=4)
    assert transform(ReferenceConfig("whiten", str(db))) == (16, "whitened")


def test_classify_takes_the_vectors_of_the_table(database, sample, model_folder, tmp_path, caplog):
    options = {"reference_table": "whitened", "candidates": "vector", "device": "cpu"}
    found = {}
    for name, more in {
        "own": {},
        "named": {"model": model_folder, "dtype": "float32", "frames": 6},
    }.items():
        caplog.clear()
        output = tmp_path / name
        with caplog.at_level("INFO"):
            run_classification_pipeline(
                sample, str(database), str(output), num_trials=0, **options, **more
            )
        assert "embedded again" not in caplog.text
        table = pq.read_table(next(Path(output).glob("classified.parquet")))
        found[name] = table.select(["sequence_id", "best_species", "vector"]).to_pylist()
    assert found["own"] == found["named"]
    caplog.clear()
    with caplog.at_level("INFO"):
        run_classification_pipeline(
            sample,
            str(database),
            str(tmp_path / "other"),
            num_trials=0,
            model=model_folder,
            dtype="float32",
            frames=1,
            **options,
        )
    assert "embedded again" in caplog.text
