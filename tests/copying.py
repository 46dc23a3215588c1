"""What the tests of copying share: both engines, a database to copy, and a look at copies."""

import hashlib
import shutil
from pathlib import Path
from types import SimpleNamespace

import lancedb
import numpy as np
import pyarrow as pa
import pytest

from bioscan_xla.transfer import engine as transfer

RCLONE = shutil.which("rclone")


needs_rclone = pytest.mark.skipif(RCLONE is None, reason="rclone is not installed")


ENGINES = [
    pytest.param(False, id="rclone", marks=needs_rclone),
    pytest.param(True, id="fsspec"),
]


@pytest.fixture
def without_rclone(request, monkeypatch):
    """Whether fsspec is to copy, as it does where rclone is not installed."""
    hidden = getattr(request, "param", True)
    if hidden:
        monkeypatch.setattr(transfer, "shutil", SimpleNamespace(which=lambda _: None))
    return hidden


def content(folder):
    """Digest of every file below a folder."""
    return {
        path.relative_to(folder).as_posix(): hashlib.md5(path.read_bytes()).hexdigest()
        for path in Path(folder).rglob("*")
        if path.is_file()
    }


def add_rows(database, count):
    """Add rows with vectors to the table of a database."""
    vectors = np.random.default_rng(count).normal(size=(count, 8)).astype(np.float32)
    rows = pa.table(
        {
            "n": range(count),
            "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), 8),
        }
    )
    connection = lancedb.connect(str(database))
    if "embeddings" in connection.list_tables().tables:
        connection.open_table("embeddings").add(rows)
    else:
        connection.create_table("embeddings", rows)


def count_rows(database):
    """Rows that a reader sees; 0 where there is no table yet."""
    try:
        table = lancedb.connect(str(database)).open_table("embeddings")
    except ValueError:
        return 0
    return len(table.to_arrow())


@pytest.fixture
def database(tmp_path):
    """A database of one table with several versions, and a file beside it."""
    folder = tmp_path / "vectors.db"
    for count in (30, 40, 50):
        add_rows(folder, count)
    (folder / "rejected.parquet").write_bytes(b"set aside")
    return folder
