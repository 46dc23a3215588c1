"""The table: atomic appends that carry their progress, refusal of strangers, search."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bioscan_xla.errors import TableError
from bioscan_xla.reads.cleaning import Code
from bioscan_xla.reads.files import metadata_schema
from bioscan_xla.reads.raw import ReadOptions
from bioscan_xla.reads.records import Rejection
from bioscan_xla.reads.shares import Share
from bioscan_xla.table.neighbours import (
    connect,
    open_or_create,
    open_table,
    read_fingerprint,
    search_vectors,
)
from bioscan_xla.table.rows import make_rows, storable, table_schema
from bioscan_xla.table.store import Store

FINGERPRINT = {
    "model": "m",
    "revision": "",
    "adapter": "",
    "pooling": "mean",
    "layer": "-1",
    "dtype": "float32",
    "overlap_tokens": "100",
    "frames": "1",
    "strands": "given",
}
METADATA = metadata_schema([], ReadOptions())
NAMES = {path: path for path in ("/a.parquet", "/b.parquet", "/a", "/b", "f")}


def make(folder, name="embeddings", dtype="float16", hidden=16, fingerprint=FINGERPRINT, **options):
    schema = table_schema(hidden, dtype, METADATA, True, fingerprint)
    options.setdefault("names", NAMES)
    return Store.open(str(folder), name, schema, **options)


def fill(store, first, count, source="/a.parquet", phylum="Annelida"):
    rng = np.random.default_rng(first)
    vectors = rng.standard_normal((count, store.hidden)).astype(np.float32)
    metadata = pa.table(
        {
            field.name: pa.array([phylum if field.name == "phylum" else None] * count, field.type)
            for field in METADATA
        }
    )
    names = [f"{phylum}{n}" for n in range(first, first + count)]
    values, finite = storable(vectors, store.table.schema)
    assert finite.all()
    rows = np.arange(first, first + count)
    schema = store.table.schema
    store.append([make_rows(names, ["ACGT"] * count, metadata, source, rows, values, schema)])
    return vectors


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_an_append_is_one_version_and_its_own_progress(tmp_path, dtype):
    store = make(tmp_path, dtype=dtype)
    version = store.table.version
    vectors = fill(store, 3, 50)
    assert store.table.version == version + 1
    again = make(tmp_path, dtype=dtype)
    assert again.count_rows() == 50
    assert again.done().rows["/a.parquet"].tolist() == [False] * 3 + [True] * 50
    assert [name for names in again.ids() for name in names] == [
        f"Annelida{n}" for n in range(3, 53)
    ]
    stored = np.array(again.table.to_arrow()["vector"].to_pylist(), np.float32)
    np.testing.assert_allclose(stored, vectors, rtol=1e-3 if dtype == "float16" else 0)
    assert read_fingerprint(again.table) == FINGERPRINT
    assert again.sample_norm() == pytest.approx(np.linalg.norm(vectors, axis=1).mean(), rel=1e-3)


def test_what_is_not_finite_in_the_table_is_found(tmp_path):
    store = make(tmp_path)
    vectors = np.ones((5, 16), np.float32)
    vectors[0, 3], vectors[1, 0], vectors[2, 5], vectors[3] = np.nan, np.inf, 70000.0, 60000.0
    assert storable(vectors, store.table.schema)[1].tolist() == [False, False, False, True, True]
    assert storable(vectors, make(tmp_path, "other", "float32").table.schema)[1].tolist() == [
        False,
        False,
        True,
        True,
        True,
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"fingerprint": FINGERPRINT | {"layer": "4"}},
            "layer: the table has '-1', this run has '4'",
        ),
        ({"hidden": 8}, r"column vector: the table has .*16.*, this run has .*8"),
        ({"dtype": "float32"}, "column vector"),
    ],
)
def test_another_way_of_making_rows_is_refused(tmp_path, change, message):
    fill(make(tmp_path), 0, 1)
    with pytest.raises(TableError, match=message):
        make(tmp_path, **change)


def test_a_failed_append_changes_nothing(tmp_path, monkeypatch):
    store = make(tmp_path)
    fill(store, 0, 5)

    def broken(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(type(store.table), "add", broken)
    with pytest.raises(TableError, match="Committed rows are kept"):
        fill(store, 5, 5)
    assert make(tmp_path).count_rows() == 5


def test_rejections_are_merged_and_count_as_done(tmp_path):
    store = make(tmp_path, rule="r", share=Share(0, 2))
    store.reject([Rejection("/a.parquet", 4, "x", "empty sequence", Code.EMPTY_SEQUENCE)])
    store.reject([])
    store.reject([Rejection("/a.parquet", 6, None, "no id", Code.NO_ID)])
    other = make(tmp_path, rule="r", share=Share(1, 2))
    other.reject([Rejection("/b.parquet", 0, "y", "no id", Code.NO_ID)])
    assert pq.read_table(tmp_path / "rejected.parquet").num_rows == 2
    assert pq.read_table(tmp_path / "rejected-1.parquet").num_rows == 1
    again = make(tmp_path, rule="r", share=Share(0, 2))
    assert np.flatnonzero(again.done().rows["/a.parquet"]).tolist() == [4, 6]
    assert again.done().rows["/b.parquet"].tolist() == [True]
    assert sorted(name for names in again.ids() for name in names) == ["x", "y"]


def test_a_new_rule_looks_again_at_this_runs_sources_only(tmp_path):
    store = make(tmp_path, rule="min 20")
    store.reject([Rejection(path, 1, "x", "4 bp", Code.TOO_SHORT) for path in ("/a", "/b")])
    again = make(tmp_path, rule="min 10", names={"/a": "/a"})
    assert "/a" not in again.done().rows
    again.reject([Rejection("/a", 5, "z", "4 bp", Code.TOO_SHORT)])
    rows = pq.read_table(tmp_path / "rejected.parquet").to_pylist()
    assert {(row["source"], row["row"]) for row in rows} == {("/b", 1), ("/a", 5)}
    # The rule that came between is not that of /b's record, which is looked at again too.
    assert list(make(tmp_path, rule="min 10").done().rows) == ["/a"]
    assert list(make(tmp_path, rule="min 20", names={"/b": "/b"}).done().rows) == ["/b"]


def test_tables_in_one_database_keep_their_rejections_apart(tmp_path):
    make(tmp_path, "second").reject([Rejection("/a", 1, "x", "no id", Code.NO_ID)])
    assert not make(tmp_path).done().rows
    assert (tmp_path / "rejected-second.parquet").exists()


def test_search_is_exact_and_filters_return_all_rows(tmp_path):
    store = make(tmp_path)
    vectors = fill(store, 0, 300)
    fill(store, 300, 20, phylum="Cnidaria")
    (found,) = search_vectors(store.table, vectors[7:8], 5)
    assert found["sequence_id"][0].as_py() == "Annelida7"
    assert found["_distance"].to_pylist() == sorted(found["_distance"].to_pylist())
    (few,) = search_vectors(store.table, vectors[7:8], 15, "phylum = 'Cnidaria'")
    assert len(few) == 15
    with pytest.raises(TableError, match="columns are sequence_id"):
        search_vectors(store.table, vectors[:1], 5, "no_such_column = 1")


def test_queries_in_one_call_find_what_each_finds_alone(tmp_path, monkeypatch):
    import bioscan_xla.table.neighbours as module

    store = make(tmp_path)
    vectors = fill(store, 0, 300)
    fill(store, 300, 4, phylum="Cnidaria")
    monkeypatch.setattr(module, "_QUERIES", 7)
    for where in (None, "phylum = 'Cnidaria'", "phylum = 'Mollusca'"):
        together = search_vectors(store.table, vectors[:20], 6, where)
        alone = [search_vectors(store.table, vectors[n : n + 1], 6, where)[0] for n in range(20)]
        assert [len(rows) for rows in together] == [len(rows) for rows in alone]
        for one, other in zip(together, alone, strict=True):
            assert one["sequence_id"].to_pylist() == other["sequence_id"].to_pylist()
    assert search_vectors(store.table, vectors[:0], 6) == []


def test_finish_indexes_and_search_stays_right(tmp_path, monkeypatch):
    import bioscan_xla.table.neighbours as reading
    import bioscan_xla.table.store as module

    monkeypatch.setattr(module, "_INDEX_ROWS", 500)
    monkeypatch.setattr(reading, "_EXACT_ROWS", 0)  # take the index
    store = make(tmp_path, hidden=32)
    vectors = fill(store, 0, 2000)
    fill(store, 2000, 30, phylum="Cnidaria")
    store.finish(vector_index=True)
    store.finish(vector_index=True)
    columns = {column for index in store.table.list_indices() for column in index.columns}
    assert {"sequence_id", "depth", "phylum", "species", "vector"} <= columns
    found = search_vectors(store.table, vectors[:20], 3)
    assert [rows["sequence_id"][0].as_py() for rows in found] == [f"Annelida{n}" for n in range(20)]
    (few,) = search_vectors(store.table, vectors[:1], 25, "phylum = 'Cnidaria'")
    assert len(few) == 25


def test_rows_added_after_the_index_are_found_before_and_after_it_takes_them_in(
    tmp_path, monkeypatch
):
    import bioscan_xla.table.neighbours as reading
    import bioscan_xla.table.store as module

    monkeypatch.setattr(module, "_INDEX_ROWS", 500)
    monkeypatch.setattr(reading, "_EXACT_ROWS", 0)
    store = make(tmp_path, hidden=32)
    old = fill(store, 0, 1500)
    store.finish(vector_index=True)
    new = fill(store, 5000, 30, phylum="Mollusca")
    names = [f"Mollusca{n}" for n in range(5000, 5030)]
    for _ in range(2):
        found = search_vectors(store.table, new, 3)
        assert [rows["sequence_id"][0].as_py() for rows in found] == names
        found = search_vectors(store.table, old[:20], 30, "phylum = 'Mollusca'")
        assert all(sorted(rows["sequence_id"].to_pylist()) == names for rows in found)
        store.finish(vector_index=True)
        (index,) = [one for one in store.table.list_indices() if one.columns == ["vector"]]
    assert store.table.index_stats(index.name).num_unindexed_rows == 0


def test_absent_tables_are_named(tmp_path):
    with pytest.raises(TableError, match="no such database"):
        open_table(str(tmp_path / "absent"))
    make(tmp_path, "there")
    with pytest.raises(TableError, match="it has there"):
        open_table(str(tmp_path))


def test_an_empty_table_binds_nobody(tmp_path):
    make(tmp_path)  # a run that failed before its first row
    store = make(tmp_path, fingerprint=FINGERPRINT | {"pooling": "cls"})
    assert read_fingerprint(store.table)["pooling"] == "cls"
    fill(store, 0, 2)
    with pytest.raises(TableError, match="pooling"):
        make(tmp_path)


def test_an_id_seen_before_does_not_hide_its_first_record(tmp_path):
    store = make(tmp_path)
    store.reject(
        [
            Rejection("f", 9, "later", "id seen before", Code.ID_SEEN_BEFORE),
            Rejection("f", 10, "bad", "empty sequence", Code.EMPTY_SEQUENCE),
        ]
    )
    # The record of that id which is to be taken may not be done yet, or be gone: look again.
    assert [name for names in store.ids() for name in names] == ["bad"]
    assert store.done().rows["f"].tolist() == [False] * 10 + [True]


def test_a_table_that_another_process_is_creating_is_waited_for(tmp_path, monkeypatch):
    """Its folder is there before its first version, and cannot be opened in between."""
    database = connect(str(tmp_path / "db"))
    schema = pa.schema([("row", pa.int64())])
    database.create_table("embeddings", schema=schema)
    opened = type(database).open_table
    misses = iter([True, True])

    def not_yet(self, name, *arguments, **options):
        if next(misses, False):
            raise ValueError(f"Table '{name}' was not found")
        return opened(self, name, *arguments, **options)

    monkeypatch.setattr(type(database), "open_table", not_yet)
    assert open_or_create(database, "embeddings", schema).count_rows() == 0
    assert next(misses, "used up") == "used up"
