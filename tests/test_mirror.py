"""The copy on a mounted folder is readable at every moment, and brings a lost table back."""

import shutil

import pytest

from bioscan_xla.errors import TableError
from bioscan_xla.table import mirror
from bioscan_xla.table.mirror import check_mirror, copy_database, foreign_tables, restore
from bioscan_xla.table.neighbours import open_table

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


def test_restoring_one_table_leaves_the_others_as_they_are(tmp_path):
    store = make(tmp_path / "db")
    fill(store, 0, 5)
    fill(make(tmp_path / "db", "other"), 0, 3)
    transform = tmp_path / "db" / "other.transform.safetensors"
    transform.write_text("of the copy")
    copy_database(tmp_path / "db", tmp_path / "drive")
    fill(store, 5, 5)
    (tmp_path / "db" / "rejected.parquet").write_text("newer")
    (tmp_path / "drive" / "rejected.parquet").write_text("older")
    transform.write_text("of a later table")
    shutil.rmtree(tmp_path / "db" / "other.lance")
    assert restore(tmp_path / "drive", tmp_path / "db", "other")
    assert (rows(tmp_path / "db"), rows(tmp_path / "db", "other")) == (10, 3)
    assert (tmp_path / "db" / "rejected.parquet").read_text() == "newer"
    assert transform.read_text() == "of the copy"


def test_a_mirror_that_holds_more_or_another_table_is_refused(tmp_path):
    kept = make(tmp_path / "db")
    fill(kept, 0, 5)
    fill(kept, 5, 5)
    copy_database(tmp_path / "db", tmp_path / "drive")
    check_mirror(tmp_path / "db", tmp_path / "drive")
    fill(kept, 10, 5)
    check_mirror(tmp_path / "db", tmp_path / "drive")  # an earlier state
    young = make(tmp_path / "young")
    with pytest.raises(TableError, match=r"'embeddings' is at version \d there .* may hold more"):
        check_mirror(tmp_path / "young", tmp_path / "drive")
    for first in range(4):
        fill(young, first, 1)
    with pytest.raises(TableError, match="has another version"):
        check_mirror(tmp_path / "young", tmp_path / "drive")
    assert rows(tmp_path / "drive") == 10


def test_tables_without_a_common_file_are_strangers():
    there = ["a.lance/_versions/1.manifest", "a.lance/data/x.lance", "note.txt"]
    ours = ["a.lance/_versions/7.manifest", "a.lance/data/y.lance", "note.txt"]
    assert "has no file there" in foreign_tables(ours, there, lambda _: True)["a.lance"]
    # Cleaned up and not compacted whole: a data file is left that is in both.
    assert not foreign_tables([*ours, "a.lance/data/x.lance"], there, lambda _: True)
    assert not foreign_tables([*ours, there[0]], there, lambda _: True)
    assert foreign_tables([*ours, there[0]], there, lambda _: False)
    assert not foreign_tables(["b.lance/_versions/1.manifest"], there, lambda _: False)


def test_a_drive_that_is_not_mounted_is_told(tmp_path):
    with pytest.raises(TableError, match="mount the drive"):
        check_mirror(tmp_path / "db", tmp_path / "not/mounted")


def test_a_failing_copy_is_only_a_warning(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    fill(make(tmp_path / "db"), 0, 5)
    copier = mirror.Mirror(str(tmp_path / "db"), str(tmp_path / "file"))
    copier.finish()
    assert "check the mount" in caplog.text


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
