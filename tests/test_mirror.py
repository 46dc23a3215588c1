"""The copy on a mounted folder is readable at every moment, and brings a lost table back."""

import shutil

import pytest

from bioscan_xla import mirror
from bioscan_xla.mirror import copy_database, restore
from bioscan_xla.store import open_table

from .test_store import fill, make


def rows(folder, name="embeddings"):
    return open_table(str(folder), name).count_rows()


def test_copies_only_what_is_new(tmp_path):
    store = make(tmp_path / "db")
    fill(store, 0, 5)
    assert copy_database(tmp_path / "db", tmp_path / "drive") > 0
    assert rows(tmp_path / "drive") == 5
    assert copy_database(tmp_path / "db", tmp_path / "drive") == 0
    fill(store, 5, 5)
    copy_database(tmp_path / "db", tmp_path / "drive")
    assert rows(tmp_path / "drive") == 10


def test_readable_after_every_file(tmp_path, monkeypatch):
    store = make(tmp_path / "db")
    fill(store, 0, 5)
    copy_database(tmp_path / "db", tmp_path / "drive")
    fill(store, 5, 5)
    store.finish()
    fill(store, 10, 5)
    copy, seen = mirror._copy_file, []

    def counting(source, destination):
        result = copy(source, destination)
        seen.append(rows(tmp_path / "drive"))
        return result

    monkeypatch.setattr(mirror, "_copy_file", counting)
    copy_database(tmp_path / "db", tmp_path / "drive")
    assert seen == sorted(seen)
    assert set(seen) <= {5, 10, 15}
    assert rows(tmp_path / "drive") == 15


def test_tables_that_only_the_copy_has_stay(tmp_path):
    fill(make(tmp_path / "other", "precious"), 0, 3)
    copy_database(tmp_path / "other", tmp_path / "drive")
    fill(make(tmp_path / "db"), 0, 5)
    copy_database(tmp_path / "db", tmp_path / "drive")
    assert rows(tmp_path / "drive", "precious") == 3
    assert rows(tmp_path / "drive") == 5


def test_restore_only_where_the_table_is_gone(tmp_path):
    store = make(tmp_path / "db")
    fill(store, 0, 5)
    copy_database(tmp_path / "db", tmp_path / "drive")
    assert not restore(tmp_path / "drive", tmp_path / "db", "embeddings")
    shutil.rmtree(tmp_path / "db")
    assert restore(tmp_path / "drive", tmp_path / "db", "embeddings")
    assert rows(tmp_path / "db") == 5
    assert not restore(tmp_path / "absent", tmp_path / "new", "embeddings")


def test_a_failing_copy_is_only_a_warning(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    fill(make(tmp_path / "db"), 0, 5)
    copier = mirror.Mirror(str(tmp_path / "db"), str(tmp_path / "file"))
    copier.finish()
    assert "is the folder mounted" in caplog.text


def test_no_copy_before_half_an_hour(tmp_path, monkeypatch):
    fill(make(tmp_path / "db"), 0, 5)
    clock = [1000.0]
    monkeypatch.setattr(mirror.time, "monotonic", lambda: clock[0])
    copier = mirror.Mirror(str(tmp_path / "db"), str(tmp_path / "drive"))
    copier.after_commit()
    assert not (tmp_path / "drive").exists()
    clock[0] += 1801
    copier.after_commit()
    copier._worker.shutdown(wait=True)
    assert rows(tmp_path / "drive") == 5
    with pytest.raises(RuntimeError):
        copier.finish()
