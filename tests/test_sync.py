"""Copying between folders: what arrives, what is refused, what is told."""

import os
import shutil
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import lancedb
import pytest

from bioscan_xla import sync as command
from bioscan_xla.errors import SyncError
from bioscan_xla.sync import sync
from bioscan_xla.transfer import engine as transfer

from .copying import ENGINES, RCLONE, add_rows, content, count_rows, needs_rclone


@pytest.mark.parametrize("without_rclone", ENGINES, indirect=True)
def test_all_arrives_and_only_what_changed_is_copied_again(database, tmp_path, without_rclone):
    copy = tmp_path / "copy"
    first = sync(str(database), str(copy))
    assert content(copy) == content(database)
    assert first["copied"] == len(content(database))
    assert count_rows(copy) == 120

    again = sync(str(database), str(copy))
    assert (again["copied"], again["kept"]) == (0, first["copied"])

    # Truncated, and changed at the same size: both are mended.
    data = sorted((copy / "embeddings.lance" / "data").iterdir())
    os.truncate(data[0], 10)
    (copy / "rejected.parquet").write_bytes(b"set_aside")
    assert set(sync(str(database), str(copy))["to_copy"]) == {
        data[0].relative_to(copy).as_posix(),
        "rejected.parquet",
    }
    assert content(copy) == content(database)


@pytest.mark.parametrize("without_rclone", ENGINES, indirect=True)
def test_nothing_is_deleted_unless_told(database, tmp_path, without_rclone):
    copy = tmp_path / "copy"
    sync(str(database), str(copy))
    (copy / "notes.txt").write_text("mine")
    sync(str(database), str(copy))
    assert (copy / "notes.txt").exists()
    planned = sync(str(database), str(copy), delete=True, dry_run=True)
    assert planned["to_delete"] == ["notes.txt"]
    assert "delete  notes.txt" in command.summary(planned, True)
    assert (copy / "notes.txt").exists()
    sync(str(database), str(copy), delete=True)
    assert content(copy) == content(database)


@pytest.mark.parametrize("without_rclone", ENGINES, indirect=True)
def test_the_table_is_readable_after_every_file(database, tmp_path, monkeypatch, without_rclone):
    copy = tmp_path / "copy"
    sync(str(database), str(copy))
    add_rows(database, 60)
    add_rows(database, 70)
    connection = lancedb.connect(str(database))
    table = connection.open_table("embeddings")
    table.optimize(cleanup_older_than=timedelta(0), delete_unverified=True)
    seen = []
    kind = transfer.Fsspec if without_rclone else transfer.Rclone
    whole_copy, whole_delete = kind.copy, kind.delete

    def copy_each(self, names, on_bytes):
        for name in names:
            whole_copy(self, [name], on_bytes)
            seen.append(count_rows(copy))

    def delete_each(self, names):
        for name in names:
            whole_delete(self, [name])
            seen.append(count_rows(copy))

    monkeypatch.setattr(kind, "copy", copy_each)
    monkeypatch.setattr(kind, "delete", delete_each)
    result = sync(str(database), str(copy), delete=True)
    assert result["deleted"] > 0
    assert len(seen) > 4
    assert set(seen) == {120, 250}
    assert content(copy) == content(database)


@pytest.mark.parametrize("without_rclone", ENGINES, indirect=True)
def test_a_file_that_arrives_changed_is_told(database, tmp_path, monkeypatch, without_rclone):
    copy = tmp_path / "copy"
    kind = transfer.Fsspec if without_rclone else transfer.Rclone
    whole = kind.copy

    def spoil(self, names, on_bytes):
        whole(self, names, on_bytes)
        path = copy / names[0]
        path.write_bytes(b"x" * path.stat().st_size)

    monkeypatch.setattr(kind, "copy", spoil)
    with pytest.raises(SyncError, match="differ at the destination"):
        sync(str(database), str(copy))
    # The manifests were held back: no reader meets the spoilt file.
    assert count_rows(copy) == 0


def test_what_cannot_be_is_refused(database, tmp_path, capsys):
    empty = tmp_path / "usb"
    empty.mkdir()
    for source, destination, message in (
        (tmp_path / "gone", tmp_path / "copy", "no such file or folder; is the drive mounted"),
        (empty, tmp_path / "copy", "holds no files; is the drive mounted"),
        (database, tmp_path / "no" / "such" / "copy", "does not exist; mount the drive"),
        (database, database, "the same place"),
        (database, database / "copy", "inside the other"),
        (database, database / "rejected.parquet", "is a file"),
    ):
        assert command.main([str(source), str(destination)]) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "copy").exists()
    if RCLONE is None:
        with pytest.raises(SyncError, match="not installed"):
            sync(str(database), "drive:copy")


@pytest.mark.parametrize("without_rclone", ENGINES, indirect=True)
def test_one_file(tmp_path, without_rclone):
    (tmp_path / "a").mkdir()
    for name in ("reads.fasta", "others.fasta"):
        (tmp_path / "a" / name).write_text(">s\nACGT\n")
    (tmp_path / "b").mkdir()
    sync(str(tmp_path / "a/reads.fasta"), str(tmp_path / "b"))
    assert set(content(tmp_path / "b")) == {"reads.fasta"}


@pytest.mark.parametrize("without_rclone", ENGINES, indirect=True)
def test_a_newer_table_is_not_buried(database, tmp_path, without_rclone):
    """Its manifests would stay on top, and readers would go on seeing it."""
    copy = tmp_path / "copy"
    shutil.copytree(database, copy)
    add_rows(copy, 60)
    before = content(copy)
    with pytest.raises(SyncError, match=r"is at version 4 there and at 3 in .*: it is newer"):
        sync(str(database), str(copy))
    assert content(copy) == before
    sync(str(database), str(copy), delete=True)
    assert content(copy) == content(database)
    assert count_rows(copy) == 120


@pytest.mark.parametrize("without_rclone", ENGINES, indirect=True)
@pytest.mark.parametrize("more", [0, 3])
def test_another_table_of_the_same_name_is_not_replaced(database, tmp_path, without_rclone, more):
    """Neither at the same version nor below ours, which would hide it from every reader."""
    other = tmp_path / "other.db"
    for count in (5, 6, 7, *[8] * more):
        add_rows(other, count)
    copy = tmp_path / "copy"
    sync(str(database), str(copy))
    before = content(copy)
    with pytest.raises(SyncError, match=r"has another version 3 .* or another table"):
        sync(str(other), str(copy))
    assert content(copy) == before
    sync(str(other), str(copy), delete=True)
    assert content(copy) == content(other)


@pytest.mark.parametrize("without_rclone", ENGINES, indirect=True)
def test_what_cannot_be_copied_is_told(tmp_path, without_rclone):
    source = tmp_path / "source"
    (source / "inside").mkdir(parents=True)
    (source / "a.txt").write_text("a")
    for path, target, message in (
        (source / "nowhere", tmp_path / "gone", "nowhere: a dangling link"),
        (source / "inside/loop", source, "loop: this link leads back"),
    ):
        path.symlink_to(target)
        with pytest.raises(SyncError, match=message):
            sync(str(source), str(tmp_path / "copy"))
        path.unlink()
    for name in (b"two\nlines", b"latin\xe9"):
        path = os.path.join(os.fsencode(source), name)
        with open(path, "wb"):
            pass
        with pytest.raises(SyncError, match="rename the file"):
            sync(str(source), str(tmp_path / "copy"))
        os.unlink(path)
    assert not (tmp_path / "copy").exists()


@needs_rclone
def test_what_is_whole_is_not_held_back(tmp_path, monkeypatch):
    source = tmp_path / "source"
    source.mkdir()
    (source / "a.txt").write_text("small")
    (source / "b.bin").write_bytes(os.urandom(4 << 20))
    monkeypatch.setenv("RCLONE_MAX_TRANSFER", "1M")
    monkeypatch.setenv("RCLONE_TRANSFERS", "1")
    monkeypatch.setenv("RCLONE_ORDER_BY", "name")
    with pytest.raises(SyncError, match="could not copy everything"):
        sync(str(source), str(tmp_path / "copy"))
    assert (tmp_path / "copy/a.txt").read_text() == "small"
    assert not (tmp_path / "copy/b.bin").exists()
    monkeypatch.delenv("RCLONE_MAX_TRANSFER")
    sync(str(source), str(tmp_path / "copy"))
    assert content(tmp_path / "copy") == content(source)


@pytest.mark.parametrize("without_rclone", ENGINES, indirect=True)
def test_a_deleted_table_leaves_no_folder(database, tmp_path, without_rclone):
    """LanceDB would take it for a table."""
    copy = tmp_path / "copy"
    shutil.copytree(database, copy)
    shutil.copytree(copy / "embeddings.lance", copy / "dropped.lance")
    sync(str(database), str(copy), delete=True)
    assert lancedb.connect(str(copy)).list_tables().tables == ["embeddings"]


@pytest.mark.parametrize("without_rclone", ENGINES, indirect=True)
def test_links_are_followed_and_no_name_is_passed_over(tmp_path, without_rclone):
    """A model from the Hugging Face cache is a folder of links."""
    source, copy = tmp_path / "model", tmp_path / "copy"
    source.mkdir()
    (tmp_path / "blob").write_bytes(b"weights")
    (source / "model.safetensors").symlink_to(tmp_path / "blob")
    (source / "download.part").write_bytes(b"mine")
    sync(str(source), str(copy))
    assert content(copy) == content(source)
    assert not (copy / "model.safetensors").is_symlink()


@pytest.mark.parametrize("without_rclone", ENGINES, indirect=True)
def test_a_file_deleted_meanwhile_holds_the_manifests_back(
    database, tmp_path, monkeypatch, without_rclone
):
    copy = tmp_path / "copy"
    kind = transfer.Fsspec if without_rclone else transfer.Rclone
    whole = kind.copy

    def compact_first(self, names, on_bytes):
        for name in names:
            if "/data/" in name:
                (database / name).unlink()
        whole(self, names, on_bytes)

    monkeypatch.setattr(kind, "copy", compact_first)
    with pytest.raises(SyncError, match="run the same command again"):
        sync(str(database), str(copy))
    assert not (copy / "embeddings.lance" / "_versions").exists()


@pytest.mark.usefixtures("without_rclone")
def test_a_folder_that_cannot_be_read_is_not_an_empty_one(database, tmp_path, monkeypatch):
    """With --delete the copy of what it holds would go."""
    copy = tmp_path / "copy"
    sync(str(database), str(copy))
    before = content(copy)
    whole = os.scandir

    def broken(path):
        if str(path) == str(database / "embeddings.lance" / "data"):
            raise OSError(5, "Input/output error", str(path))
        return whole(path)

    monkeypatch.setattr(os, "scandir", broken)
    with pytest.raises(SyncError, match="cannot be read"):
        sync(str(database), str(copy), delete=True)
    monkeypatch.undo()
    assert content(copy) == before


def test_a_dead_mount_is_told(database, tmp_path, monkeypatch, capsys):
    whole = Path.stat

    def dead(path):
        if path == database:
            raise OSError(107, "Transport endpoint is not connected", str(path))
        return whole(path)

    monkeypatch.setattr(Path, "stat", dead)
    assert command.main([str(database), str(tmp_path / "copy")]) == 1
    assert "not connected; mount the drive again" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["../../evil.txt", "a/../../evil.txt", "/etc/evil", "a//b", ".", "a\\..\\evil", "a/.."]
)
@pytest.mark.parametrize("kind", ["Fsspec", "Rclone"])
def test_a_name_that_leads_out_of_the_destination_is_refused(tmp_path, monkeypatch, name, kind):
    """The keys of a store are free text; nothing is copied, not even what has a good name."""

    class Store(getattr(transfer, kind)):
        def files(self, at_source):
            return {"good.txt": 1, name: 5} if at_source else {}

        def copy(self, names, on_bytes):
            raise AssertionError("copied")

        different = is_file = lambda self, *_: False

    is_rclone = kind == "Rclone"
    monkeypatch.setattr(transfer, kind, Store)
    monkeypatch.setattr(
        transfer, "shutil", SimpleNamespace(which=lambda _: "rclone" if is_rclone else None)
    )
    source = "drive:bucket" if is_rclone else "memory://bucket"
    for options in ({}, {"dry_run": True}, {"delete": True}):
        with pytest.raises(SyncError, match="could lead out of the destination"):
            sync(source, str(tmp_path / "copy"), **options)
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize("without_rclone", ENGINES, indirect=True)
def test_a_link_at_the_destination_that_leads_out_is_refused(tmp_path, without_rclone):
    source, copy, outside = (tmp_path / name for name in ("source", "copy", "outside"))
    for folder in (source / "a/b", copy, outside):
        folder.mkdir(parents=True)
    (source / "a/b/reads.fasta").write_text(">s\nACGT\n")
    (source / "first.fasta").write_text(">s\nACGT\n")
    (copy / "a").symlink_to(outside)
    with pytest.raises(SyncError, match="leads out of the destination"):
        sync(str(source), str(copy))
    assert not content(outside)
    assert not (copy / "first.fasta").exists()
    (copy / "a").unlink()
    (copy / "gone").symlink_to(outside)
    (outside / "precious.txt").write_text("mine")
    with pytest.raises(SyncError, match="leads out of the destination"):
        sync(str(source), str(copy), delete=True)
    assert content(outside)
