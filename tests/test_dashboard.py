"""The dashboard's reading functions against the file they come from, and the page itself."""

from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest

from bioscan_xla import run_classification_pipeline, run_embedding_pipeline
from bioscan_xla.classification.counts import read_counts
from bioscan_xla.classification.journal import read_rows
from bioscan_xla.errors import InputError
from bioscan_xla.reads.lineages import RANKS
from bioscan_xla.sample import write_cruise, write_sample
from bioscan_xla.table.neighbours import open_table
from launch import dashboard

from .conftest import ROOT, cosine


@pytest.fixture(scope="module")
def db(training_sample, model_folder, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("dashboard") / "embeddings.db")
    run_embedding_pipeline(
        training_sample, folder, model=model_folder, device="cpu", dtype="float32"
    )
    return folder


@pytest.fixture(scope="module")
def table(db):
    return open_table(db)


@pytest.fixture(scope="module")
def records(training_sample):
    """What is in the file, but for the two records that cannot be used."""
    return pq.read_table(training_sample).to_pylist()[:-2]


@pytest.mark.parametrize("rank", RANKS)
def test_counts_by_rank(table, records, rank):
    counts = dashboard.count_by_rank(table, rank)
    assert counts == Counter(record[rank] for record in records)
    assert list(counts.values()) == sorted(counts.values(), reverse=True)


@pytest.mark.parametrize("ends", [(1000, 3000), (None, 1500), (2500.5, None), (None, None)])
def test_depth_filter(table, records, ends):
    low, high = ends[0] or 0, ends[1] or 1e9
    inside = [record for record in records if low <= record["depth"] <= high]
    where = dashboard.depth_condition(*ends)
    assert sum(dashboard.count_by_rank(table, "species", where).values()) == len(inside) > 0
    rows = dashboard.rows_at(table, where)
    assert {row["sequence_id"] for row in rows} == {record["sequence_id"] for record in inside}
    assert not {"vector", "dna_sequence"} & {*rows[0]}
    assert len(dashboard.rows_at(table, where, limit=2)) == 2


def test_a_depth_of_zero_is_a_limit():
    assert dashboard.depth_condition(0, None) == "depth >= 0.0"


def test_neighbours_of_a_row(table):
    everything = table.to_arrow()
    vectors = np.stack(everything["vector"].to_pylist()).astype(np.float32)
    ids = everything["sequence_id"].to_pylist()
    similarity = cosine(np.broadcast_to(vectors[7], vectors.shape), vectors)
    similarity[7] = -1  # itself
    found = dashboard.neighbours_of_row(table, ids[7], k=5)
    assert [row["sequence_id"] for row in found] == [ids[n] for n in np.argsort(-similarity)[:5]]
    np.testing.assert_allclose(
        [row["distance"] for row in found], 1 - np.sort(similarity)[::-1][:5], atol=1e-3
    )
    deep = dashboard.neighbours_of_row(table, ids[7], k=5, where="depth > 3000")
    assert len(deep) == 5
    assert all(row["depth"] > 3000 for row in deep)


def test_what_is_not_there_is_said(table):
    with pytest.raises(InputError, match="not a rank"):
        dashboard.count_by_rank(table, "depth")
    with pytest.raises(InputError, match="O'Hara"):
        dashboard.neighbours_of_row(table, "O'Hara")


def test_the_page(db, records, monkeypatch):
    testing = pytest.importorskip("streamlit.testing.v1", reason="streamlit is not installed")
    monkeypatch.setattr("sys.argv", ["dashboard.py", db])
    page = testing.AppTest.from_file(str(ROOT / "launch/dashboard.py"), default_timeout=60).run()
    assert not page.exception
    assert page.metric[0].value == str(len(records))
    assert len(page.dataframe[0].value) == len(records)

    page.sidebar.number_input[1].set_value(1500.0).run()
    shallow = [record for record in records if record["depth"] <= 1500]
    assert page.metric[0].value == str(len(shallow))

    page.main.text_input[0].set_value(records[0]["dna_sequence"]).run()
    page.sidebar.number_input[1].set_value(None).run()
    nearest = page.dataframe[0].value.iloc[0]
    assert nearest["sequence_id"] == records[0]["sequence_id"]
    assert nearest["distance"] < 1e-3

    page.main.text_input[0].set_value("SIM00007").run()
    assert "SIM00007" not in set(page.dataframe[0].value["sequence_id"])

    page.sidebar.text_input[0].set_value("nowhere.db").run()
    assert not page.exception
    assert "nowhere.db" in page.error[0].value


@pytest.fixture(scope="module")
def named(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cruise")
    write_cruise(folder, 30)
    write_sample(folder / "reference.parquet", 200)
    run_classification_pipeline(
        str(folder / "asv.fasta"),
        str(folder / "reference.parquet"),
        str(folder / "named"),
        table=str(folder / "counts.tsv"),
        samples=[str(folder / "samples.tsv")],
        num_trials=200,
    )
    return str(folder / "named"), read_counts(str(folder / "counts.tsv"))


def test_names_by_rank_novelty_depth_and_sample(named):
    folder, counts = named
    rows = {row["sequence_id"]: row for row in read_rows(folder)}
    everything = dashboard.count_names(folder, "genus")
    assert everything == Counter(row["genus"] or "unknown" for row in rows.values())
    high = dashboard.named_where(folder, (0.5, 1.0))
    novel = {row["sequence_id"] for row in dashboard.rows_named(folder, high)}
    assert novel == {name for name, row in rows.items() if row["novelty"] >= 0.5} != set()

    deep = dashboard.samples_at(folder, 1000)
    assert 0 < len(deep) < len(dashboard.samples_at(folder)) == len(counts.samples)
    for samples in (deep, deep[:1]):
        columns = [counts.samples.index(name) for name in samples]
        there = np.asarray(counts.matrix[:, columns].sum(1)).ravel() > 0
        wanted = {name for name, is_there in zip(counts.ids, there, strict=True) if is_there}
        found = dashboard.rows_named(folder, dashboard.named_where(folder, samples=samples))
        assert {row["sequence_id"] for row in found} == wanted & set(rows) != set()
    assert len(dashboard.rows_named(folder, limit=2)) == 2
    with pytest.raises(InputError, match="not a rank"):
        dashboard.count_names(folder, "depth")


def test_the_page_of_names(named, monkeypatch):
    testing = pytest.importorskip("streamlit.testing.v1", reason="streamlit is not installed")
    folder, counts = named
    monkeypatch.setattr("sys.argv", ["dashboard.py", folder])
    page = testing.AppTest.from_file(str(ROOT / "launch/dashboard.py"), default_timeout=60).run()
    assert not page.exception
    assert page.metric[0].value == str(sum(1 for _ in read_rows(folder)))
    page.sidebar.multiselect[0].select(counts.samples[0]).run()
    assert not page.exception
    there = np.flatnonzero(counts.matrix[:, 0].toarray().ravel())
    assert page.metric[0].value == str(len(there))
