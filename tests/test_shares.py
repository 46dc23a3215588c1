"""Shares: whatever the processes, their order, their stops and their devices, each record once."""

import itertools
import os
import tempfile
import threading
from collections import Counter
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bioscan_xla.embed import run_embedding_pipeline
from bioscan_xla.embedding.pipeline import limited
from bioscan_xla.errors import TableError
from bioscan_xla.reads import shares
from bioscan_xla.reads.cleaning import Code
from bioscan_xla.reads.inputs import name_inputs
from bioscan_xla.reads.raw import ReadOptions
from bioscan_xla.reads.records import read_chunks
from bioscan_xla.reads.shares import Share
from bioscan_xla.table.neighbours import open_table
from bioscan_xla.table.store import Store

from .test_records import write

LETTERS = "ACGT"


def sequence_of(number):
    """A usable sequence that no other number has."""
    return "".join(LETTERS[(number >> 2 * place) & 3] for place in range(10)) * 5


def write_files(folder, sizes, row_group_size=10_000, prefix="part"):
    """Parquet files of so many rows each, with ids that go on from file to file."""
    folder.mkdir(exist_ok=True)
    first = 0
    for number, size in enumerate(sizes):
        rows = range(first, first + size)
        columns = {
            "sequence_id": [f"s{row}" for row in rows],
            "dna_sequence": [sequence_of(row) for row in rows],
        }
        write(folder / f"{prefix}{number}.parquet", columns, row_group_size=row_group_size)
        first += size
    return str(folder)


def stored(db):
    """How often each id is in the table."""
    return Counter(open_table(str(db)).to_arrow()["sequence_id"].to_pylist())


def rejected(db):
    """All rows of the lists of rejected records."""
    return [row for path in Path(db).glob("rejected*") for row in pq.read_table(path).to_pylist()]


@pytest.fixture
def options(model_folder):
    return {"model": model_folder, "device": "cpu", "dtype": "float32"}


def test_a_process_that_starts_again_keeps_its_share(tmp_path, options):
    source, db = write_files(tmp_path / "in", [100] * 4), str(tmp_path / "db")

    def run(index, **more):
        run_embedding_pipeline(source, db, process_index=index, process_count=2, **options, **more)

    run(1, max_sequences=150)
    run(0)
    run(1)
    assert stored(db) == {f"s{row}": 1 for row in range(400)}


def test_a_share_depends_on_no_commit_size(tmp_path, options):
    source, db = write_files(tmp_path / "in", [3000]), str(tmp_path / "db")
    for index, commit_rows in enumerate((1024, 1000)):
        run_embedding_pipeline(
            source, db, process_index=index, process_count=2, commit_rows=commit_rows, **options
        )
    assert stored(db) == {f"s{row}": 1 for row in range(3000)}


class Journal:
    """A table in memory: what is committed, as the store tells it to a process that starts."""

    def __init__(self, folder):
        self.names, _ = name_inputs(folder)
        self.kept, self.rejected = Counter(), {}

    def start(self, share, chunk_rows, max_sequences):
        """Chunks that a process which starts now would compute."""
        paths = {name: path for path, name in self.names.items()}
        done = {path: np.zeros(64, bool) for path in self.names}
        for source, row in [*((s, r) for s, r, _ in self.kept), *self.rejected]:
            done[paths[source]][row] = True
        ids = [name for _, _, name in self.kept]
        ids += [name for name, code in self.rejected.values() if code != Code.ID_SEEN_BEFORE]
        chunks = read_chunks(
            list(self.names),
            ReadOptions(chunk_rows=chunk_rows),
            SCHEMA,
            done=done,
            known_ids=[ids],
            share=share,
            names=self.names,
        )
        return limited(chunks, max_sequences, None)

    def commit(self, chunk):
        self.kept.update(
            (chunk.source, row, name)
            for row, name in zip(chunk.rows.tolist(), chunk.ids, strict=True)
        )
        for item in chunk.rejected:
            assert (item.source, item.row) not in self.rejected
            self.rejected[item.source, item.row] = (item.sequence_id, item.code)


SCHEMA = pa.schema([])
records = st.lists(st.tuples(st.integers(0, 40), st.booleans()), max_size=24)
files = st.lists(
    st.tuples(records, st.sampled_from(["parquet", "fasta"]), st.integers(1, 9)),
    min_size=1,
    max_size=4,
)
steps = st.lists(
    st.tuples(
        st.integers(0, 3),  # which process
        st.booleans(),  # whether it is killed and starts again
        st.integers(1, 20),  # rows at a time: device and commit size
        st.none() | st.integers(1, 30),  # --max-sequences
        st.integers(0, 4),  # chunks that it gets through
    ),
    max_size=12,
)
phases_of_a_run = st.lists(st.tuples(st.integers(1, 4), steps), min_size=1, max_size=3)


@settings(max_examples=150, deadline=None)
@given(
    files, st.integers(1, 9), st.lists(st.tuples(st.integers(1, 4), steps), min_size=1, max_size=3)
)
def test_all_shares_together_are_each_record_once(contents, block_rows, phases):
    """Several processes at once, killed and started anew, then in another number."""
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(shares, "BLOCK_ROWS", block_rows),
    ):
        for number, (rows, form, group) in enumerate(contents):
            _write(Path(folder) / f"{number}.{form}", number, rows, form, group)
        whole = Journal(folder)
        for chunk in whole.start(Share(), 7, None):
            whole.commit(chunk)
        journal = Journal(folder)
        for count, plan in phases:
            running = {}
            for process, is_killed, chunk_rows, most, num_chunks in plan:
                share = Share(process % count, count)
                if is_killed or share.index not in running:
                    running[share.index] = journal.start(share, chunk_rows, most)
                for chunk in itertools.islice(running[share.index], num_chunks):
                    journal.commit(chunk)
        for index in range(count):
            for chunk in journal.start(Share(index, count), 5, None):
                journal.commit(chunk)
    assert journal.kept == whole.kept
    assert journal.rejected == whole.rejected


def _write(path, number, rows, form, group):
    ids = [f"s{name}" for name, _ in rows]
    # The file's number keeps equal files apart, which would be one source.
    texts = [sequence_of(number) if good else "" for _, good in rows]
    if form == "fasta":
        path.write_text("".join(f">{i}\n{t}\n" for i, t in zip(ids, texts, strict=True)))
    else:
        columns = {
            "sequence_id": pa.array(ids, pa.string()),
            "dna_sequence": pa.array(texts, pa.string()),
        }
        write(path, columns, row_group_size=group)


def test_blocks_are_spread_evenly():
    rows = 100 * shares.BLOCK_ROWS
    parts = [Share(index, 3).of("reads.parquet#0123456789ab", 0, rows) for index in range(3)]
    assert (np.sum(parts, 0) == 1).all()
    assert {int(part.sum()) // shares.BLOCK_ROWS for part in parts} == {33, 34}
    names = [f"{number}.fasta#0123456789ab" for number in range(300)]
    first = Counter(i for name in names for i in range(3) if Share(i, 3).of(name, 0, 1)[0])
    assert min(first.values()) > 60


def test_another_number_of_processes_is_refused_until_it_is_said(tmp_path, options):
    source, db = write_files(tmp_path / "in", [30] * 4), str(tmp_path / "db")

    def run(index, count, **more):
        return run_embedding_pipeline(
            source, db, process_index=index, process_count=count, **options, **more
        )

    run(0, 1, max_sequences=50)
    with pytest.raises(TableError, match=r"process_count 1, and this run has 3.*--reshare"):
        run(0, 3)
    for index in (2, 0, 1):
        run(index, 3, reshare=index == 2)
    assert stored(db) == {f"s{row}": 1 for row in range(120)}
    with pytest.raises(TableError, match="process_count 3, and this run has 1"):
        run(0, 1)


def test_a_run_stops_when_another_number_of_processes_takes_over(tmp_path, options, monkeypatch):
    source, db = write_files(tmp_path / "in", [3000]), str(tmp_path / "db")
    append = Store.append
    calls = []

    def taken_over(self, parts):
        append(self, parts)
        calls.append(1)
        if len(calls) == 1:
            run_embedding_pipeline(
                source, db, process_count=2, reshare=True, max_sequences=1, **options
            )

    monkeypatch.setattr(Store, "append", taken_over)
    with pytest.raises(TableError, match="process_count 2, and this run has 1"):
        run_embedding_pipeline(source, db, commit_rows=1000, **options)
    assert max(stored(db).values()) == 1


@pytest.mark.parametrize("count", [1, 2])
def test_of_two_runs_of_one_process_only_the_last_goes_on(tmp_path, options, monkeypatch, count):
    """Both have looked at what is done before either commits."""
    source, db = write_files(tmp_path / "in", [60] * 4), str(tmp_path / "db")
    both = threading.Barrier(2)
    done = Store.done

    def done_together(self):
        result = done(self)
        both.wait(60)
        return result

    errors = []

    def run(index=0):
        try:
            run_embedding_pipeline(source, db, process_index=index, process_count=count, **options)
        except TableError as error:
            errors.append(str(error))

    with monkeypatch.context() as patch:
        patch.setattr(Store, "done", done_together)
        threads = [threading.Thread(target=run) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    (error,) = errors
    assert f"another run fills the table 'embeddings' as process 0: process {os.getpid()}" in error
    assert "--process-index" in error
    if count == 2:
        run(1)
    assert stored(db) == {f"s{row}": 1 for row in range(240)}
    assert len(errors) == 1


@pytest.mark.parametrize("count", [1, 2])
def test_a_commit_that_was_under_way_when_the_next_run_started(
    tmp_path, options, monkeypatch, count
):
    """The claim of the first was good when it looked; the second sees its rows, and stops."""
    source, db = write_files(tmp_path / "in", [60] * 4), str(tmp_path / "db")
    check, done, append = Store._check_still_ours, Store.done, Store.append
    second_knows, first_has_committed = threading.Event(), threading.Event()
    errors, stores = [], []

    def run():
        try:
            run_embedding_pipeline(source, db, process_count=count, **options)
        except TableError as error:
            errors.append(str(error))

    second = threading.Thread(target=run)

    def done_first_or_second(self):
        result = done(self)
        stores.append(self)
        if self is not stores[0]:
            second_knows.set()
        return result

    def check_then_wait(self):
        if self is not stores[0]:
            assert first_has_committed.wait(60)
        check(self)
        if self is stores[0]:
            second.start()
            assert second_knows.wait(60)

    def append_and_tell(self, parts):
        append(self, parts)
        first_has_committed.set()

    with monkeypatch.context() as patch:
        patch.setattr(Store, "done", done_first_or_second)
        patch.setattr(Store, "_check_still_ours", check_then_wait)
        patch.setattr(Store, "append", append_and_tell)
        run()
        second.join()
    (error,) = errors
    assert "another run was still committing rows of process 0" in error
    for index in range(count):
        run_embedding_pipeline(source, db, process_index=index, process_count=count, **options)
    assert stored(db) == {f"s{row}": 1 for row in range(240)}


def test_a_run_that_is_refused_takes_nobodys_place(tmp_path, options, monkeypatch):
    source, db = write_files(tmp_path / "in", [60]), str(tmp_path / "db")
    append = Store.append

    def refused_meanwhile(self, parts):
        append(self, parts)
        with pytest.raises(TableError, match="made in another way"):
            run_embedding_pipeline(source, db, pooling="cls", **options)

    monkeypatch.setattr(Store, "append", refused_meanwhile)
    run_embedding_pipeline(source, db, commit_rows=20, **options)
    assert sum(stored(db).values()) == 60


def test_processes_that_were_given_other_files_are_refused(tmp_path, options, caplog):
    write_files(tmp_path / "in", [9000, 60])
    one, both, db = str(tmp_path / "in/part0.parquet"), str(tmp_path / "in"), str(tmp_path / "db")

    def run(source, index, **more):
        more = {"process_index": index, "process_count": 2, **options, **more}
        return run_embedding_pipeline(source, db, **more)

    run(both, 0, max_sequences=1)
    claim = tmp_path / "db/embeddings-0.run.json"
    running = claim.read_text().replace('"finished": true', '"finished": false')
    claim.write_text(running)  # as after a kill
    with pytest.raises(TableError, match=r"only process 0 reads part1.parquet.*same --input"):
        run(one, 1, max_sequences=1)
    assert not (tmp_path / "db/embeddings-1.run.json").exists()
    run(both, 1, max_sequences=1)
    run(one, 1, max_sequences=1, reshare=True)
    claim.write_text(running.replace('"finished": false', '"finished": true'))
    caplog.clear()
    run(one, 1, max_sequences=1)
    assert "was given other files than process 0: only process 0 reads part1.parquet" in caplog.text
