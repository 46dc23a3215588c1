"""Embedding by the workers of a real local Ray cluster; workers and driver are killed with -9."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bioscan_xla.embed import run_embedding_pipeline
from bioscan_xla.errors import ConfigError, ModelError, TableError
from bioscan_xla.reads.files import metadata_schema
from bioscan_xla.reads.raw import ReadOptions
from bioscan_xla.sample import write_sample
from bioscan_xla.table.neighbours import FINGERPRINT_KEY, open_table
from bioscan_xla.table.rows import make_rows, table_schema, write_fragments
from bioscan_xla.table.store import Store

from .conftest import ROOT, cosine, run_python

ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'bioscan_xla[ray]'")
lance = pytest.importorskip("lance", reason="pylance is not installed")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:lancedb fork support:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:lance is not fork-safe:UserWarning"),
]

from bioscan_xla.embedding import cluster  # noqa: E402

METADATA = metadata_schema([], ReadOptions())
FINGERPRINT = (
    "model",
    "revision",
    "adapter",
    "pooling",
    "layer",
    "dtype",
    "overlap_tokens",
    "frames",
    "strands",
)


@pytest.fixture(scope="module")
def two_cpus():
    """A cluster of this machine that lasts for all tests; its address."""
    # By default workers have niceness 15, and hardly move while a machine does other things.
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112
    context = ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        _node_ip_address="127.0.0.1",
        object_store_memory=200 * 2**20,
        log_to_driver=False,
    )
    yield context.address_info["gcs_address"]
    ray.shutdown()


@pytest.fixture
def options(model_folder):
    return {"model": model_folder, "device": "cpu", "dtype": "float32"}


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """1,500 sequences, and after them records that cannot be used or that came before."""
    path = tmp_path_factory.mktemp("many") / "many.parquet"
    write_sample(path, 1500)
    table = pq.read_table(path)
    pq.write_table(pa.concat_tables([table, table.slice(0, 40)]), path, row_group_size=100)
    return path


def _rows(db):
    return open_table(str(db)).to_arrow().sort_by("row")


def _rejected(db):
    rows = pq.read_table(Path(db) / "rejected.parquet").to_pylist()
    return sorted((row["row"], row["sequence_id"], row["reason"]) for row in rows)


def _is_whole(db, source):
    """Each usable record is in the table once, the others are rejected once."""
    wanted = pq.read_table(source)["sequence_id"].to_pylist()
    rows = _rows(db)
    assert rows["sequence_id"].to_pylist() == wanted[:1500]
    assert rows["row"].to_pylist() == list(range(1500))
    assert Counter(row for row, _, _ in _rejected(db)) == Counter(range(1500, len(wanted)))


def _part(store, first):
    names = [f"s{n}" for n in range(first, first + 5)]
    metadata = pa.table([pa.nulls(5, kind.type) for kind in METADATA], schema=METADATA)
    rows = np.arange(first, first + 5)
    vectors = np.ones((5, 16), np.float16)
    return make_rows(names, ["ACGT"] * 5, metadata, "f", rows, vectors, store.table.schema)


def test_fragments_of_several_writers_are_one_commit(tmp_path):
    schema = table_schema(16, "float16", METADATA, True, dict.fromkeys(FINGERPRINT, "1"))
    store = Store.open(str(tmp_path / "db"), "embeddings", schema, names={"f": "f"})
    version, schema = store.table.version, store.table.schema
    written = [write_fragments(store.table.uri, [_part(store, n)], schema) for n in (0, 5, 10)]
    assert store.count_rows() == 0  # nobody can see them yet
    store.append_fragments(written[0] + written[2])
    assert (store.table.version, store.count_rows()) == (version + 1, 10)
    assert store.done().rows["f"].tolist() == [True] * 5 + [False] * 5 + [True] * 5
    store.append([_part(store, 5)])
    assert sorted(store.table.to_arrow()["row"].to_pylist()) == list(range(15))
    # A worker whose folder of the same name is on a disk of its own.
    elsewhere = Store.open(str(tmp_path / "elsewhere"), "embeddings", schema)
    lost = write_fragments(elsewhere.table.uri, [_part(store, 15)], schema)
    with pytest.raises(TableError, match="one folder for all hosts"):
        store.append_fragments(lost)
    with pytest.raises(TableError, match="one folder for all hosts"):
        write_fragments(str(tmp_path / "nowhere.lance"), [_part(store, 15)], schema)
    other = schema.with_metadata(schema.metadata | {FINGERPRINT_KEY: b"{}"})
    with pytest.raises(TableError, match="another table"):
        write_fragments(store.table.uri, [_part(store, 15)], other)
    assert store.count_rows() == 15


def test_equals_the_local_engine(two_cpus, many, tmp_path, options):
    result = {}
    for name, engine in (("local", {}), ("ray", {"engine": "ray", "workers": 2})):
        result[name] = run_embedding_pipeline(
            str(many), str(tmp_path / name), commit_rows=64, keep=["marker"], **engine, **options
        )
    local, other = _rows(tmp_path / "local"), _rows(tmp_path / "ray")
    assert local.schema.equals(other.schema, check_metadata=True)
    assert local.drop_columns("vector").equals(other.drop_columns("vector"))
    vectors = [np.stack(rows["vector"].to_pylist()).astype(np.float32) for rows in (local, other)]
    assert cosine(*vectors).min() > 0.99999
    assert _rejected(tmp_path / "local") == _rejected(tmp_path / "ray")
    same = set(result["local"]) - {"seconds", "sequences_per_second", "useful_tokens_per_second"}
    same -= {"sample_vector_norm", "model_flop_utilisation"}
    assert {k: result["local"][k] for k in same} == {k: result["ray"][k] for k in same}
    again = run_embedding_pipeline(
        str(many), str(tmp_path / "ray"), engine="ray", keep=["marker"], **options
    )
    assert again["sequences_processed"] == 0


def test_killed_workers(two_cpus, many, tmp_path, options, monkeypatch, caplog):
    """Three workers die with chunks in hand, whichever are up by then."""
    alive = {}
    welcome = cluster.Workers._welcome

    def welcomed(self, member, described):
        welcome(self, member, described)
        alive[member.number] = described.process

    monkeypatch.setattr(cluster.Workers, "_welcome", welcomed)
    errors = []

    def embed():
        try:
            run_embedding_pipeline(
                str(many), str(tmp_path / "db"), engine="ray", workers=2, commit_rows=8, **options
            )
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=embed)
    thread.start()
    killed = set()
    for rows in (16, 200, 400):
        _wait(lambda r=rows: _count(tmp_path / "db") >= r and alive, thread)
        _, process = alive.popitem()
        killed.add(process)
        os.kill(process, signal.SIGKILL)
    thread.join(timeout=120)
    assert not thread.is_alive()
    assert not errors
    assert len(killed) == 3
    assert caplog.text.count("another takes over") >= 3
    assert "rows" in caplog.text
    _is_whole(tmp_path / "db", many)


def test_command_of_the_guide(two_cpus, many, tmp_path, model_folder):
    text = (ROOT / "launch/CLOUD_WORKFLOW.md").read_text()
    (line,) = [line for line in text.splitlines() if line.endswith("--engine ray")]
    (tmp_path / "reads.parquet").symlink_to(many)
    words = [*line.split()[1:], "--model", model_folder, "--max-sequences", "50"]
    result = run_python(
        *words, cwd=tmp_path, env={"RAY_ADDRESS": two_cpus, "PYTHONPATH": str(ROOT)}, timeout=200
    )
    assert "50 sequences embedded" in result.stdout
    assert open_table(str(tmp_path / "ray.db")).count_rows() == 50


def _count(db):
    try:
        return open_table(str(db)).count_rows()
    except TableError:
        return -1


def _wait(condition, running):
    """Wait for a condition while a thread or process runs."""
    is_alive = running.is_alive if hasattr(running, "is_alive") else lambda: running.poll() is None
    while is_alive():
        if condition():
            return
        time.sleep(0.01)
    pytest.fail("the run ended first")


def _driver(address, source, db, options):
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "bioscan_xla.embed", "--engine", "ray"),
            *("--input", str(source), "--db", str(db), "--commit-rows", "8"),
            *(word for key, value in options.items() for word in (f"--{key}", value)),
        ],
        env={**os.environ, "RAY_ADDRESS": address},
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_killed_driver_then_stopped_driver_then_the_rest(two_cpus, many, tmp_path, options):
    db = tmp_path / "db"
    first = _driver(two_cpus, many, db, options)
    _wait(lambda: _count(db) >= 16, first)
    first.kill()
    first.communicate(timeout=30)
    rows = _count(db)
    assert 16 <= rows < 1500
    second = _driver(two_cpus, many, db, options)
    _wait(lambda: _count(db) > rows, second)
    second.send_signal(signal.SIGTERM)
    output, errors = second.communicate(timeout=60)
    assert second.returncode == 128 + signal.SIGTERM, errors
    assert "Run the same command to resume" in output
    rows = _count(db)
    assert rows < 1500
    result = run_embedding_pipeline(str(many), str(db), engine="ray", **options)
    assert result["embeddings_generated"] == 1500 - rows
    _is_whole(db, many)


def test_errors_of_workers_are_the_users(two_cpus, many, tmp_path, options):
    with pytest.raises(ModelError, match="no such folder"):
        run_embedding_pipeline(
            str(many),
            str(tmp_path / "db"),
            engine="ray",
            **options | {"model": str(tmp_path / "x/y")},
        )
    with pytest.raises(ConfigError, match="nodes have no GPU"):
        run_embedding_pipeline(
            str(many), str(tmp_path / "db"), engine="ray", **options | {"device": "cuda"}
        )
