"""Shares: whatever the processes, their order, their stops and their devices, each record once."""

from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from bioscan_xla.embed import run_embedding_pipeline
from bioscan_xla.table.neighbours import open_table

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
