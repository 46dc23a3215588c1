"""Copying between places, with real servers on the loopback: S3 and rclone's own."""

import hashlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import lancedb
import numpy as np
import pyarrow as pa
import pytest

from bioscan_xla import sync as command
from bioscan_xla.errors import InputError, SyncError
from bioscan_xla.reads.inputs import UNFINISHED, expand_inputs
from bioscan_xla.sync import sync
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


def _free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _serve(words, port):
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(300):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return process
        assert process.poll() is None, words
        time.sleep(0.1)
    raise AssertionError(f"{words} did not start")


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    """A bucket of an S3 server on the loopback, by the environment alone."""
    for name in ("moto", "s3fs", "flask"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    port = _free_port()
    server = _serve([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], port)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret-of-the-test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("RCLONE_CONFIG", str(tmp_path_factory.mktemp("rclone") / "rclone.conf"))
        import s3fs

        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().mkdir("samples")
        yield "s3://samples"
    server.terminate()
    server.wait()


@pytest.mark.slow
@pytest.mark.parametrize("without_rclone", ENGINES, indirect=True)
def test_up_to_s3_and_down_again(s3, database, tmp_path, without_rclone):
    (database / "large.bin").write_bytes(os.urandom(11 << 20))  # in several parts
    address = f"{s3}/{'fsspec' if without_rclone else 'rclone'}"
    assert sync(str(database), address)["copied"] == len(content(database))
    assert sync(str(database), address)["copied"] == 0
    sync(address, str(tmp_path / "down"))
    assert content(tmp_path / "down") == content(database)
    assert count_rows(tmp_path / "down") == 120
    with pytest.raises(SyncError, match="does not exist or holds no files"):
        sync(f"{s3}/nothing", str(tmp_path / "nothing"))


@pytest.fixture(scope="module")
def gs():
    """A bucket of a Cloud Storage server on the loopback, by the environment alone."""
    for name in ("gcp_storage_emulator", "gcsfs"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    port = _free_port()
    words = [
        "start",
        "--host=127.0.0.1",
        f"--port={port}",
        "--in-memory",
        "--default-bucket=samples",
    ]
    server = _serve([sys.executable, "-m", "gcp_storage_emulator", *words], port)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
        patch.setenv("RCLONE_CONFIG_BIOSCAN_GS_ENDPOINT", f"http://127.0.0.1:{port}/storage/v1/")
        patch.setenv("RCLONE_CONFIG_BIOSCAN_GS_ANONYMOUS", "true")
        yield "gs://samples"
    server.terminate()
    server.wait()


@pytest.mark.slow
@pytest.mark.parametrize("without_rclone", ENGINES, indirect=True)
def test_up_to_gs_and_down_again(gs, database, tmp_path, without_rclone):
    if without_rclone:  # rclone's way with large files is one that this server does not know
        (database / "large.bin").write_bytes(os.urandom(11 << 20))
    address = f"{gs}/{'fsspec' if without_rclone else 'rclone'}"
    result = sync(str(database), address)
    assert result["engine"] == ("fsspec" if without_rclone else "rclone")
    assert result["copied"] == len(content(database))
    assert sync(str(database), address)["copied"] == 0
    sync(address, str(tmp_path / "down"))
    assert content(tmp_path / "down") == content(database)
    assert count_rows(tmp_path / "down") == 120


@pytest.mark.slow
@pytest.mark.parametrize("without_rclone", ENGINES, indirect=True)
def test_what_s3_must_not_do(s3, database, tmp_path, without_rclone):
    import s3fs

    with pytest.raises(SyncError, match="bucket does not exist"):
        sync(str(database), "s3://mistyped/copy")
    assert not s3fs.S3FileSystem(use_listings_cache=False).exists("mistyped")
    sync(str(database / "rejected.parquet"), f"{s3}/one")
    with pytest.raises(SyncError, match="inside the other"):
        sync(f"{s3}/one", f"{s3}/one/two")
    (tmp_path / "note.txt").write_text("no sequences")
    sync(str(tmp_path / "note.txt"), f"{s3}/one")
    assert sync(f"{s3}/one/note.txt", str(tmp_path / "down"))["copied"] == 1
    assert set(content(tmp_path / "down")) == {"note.txt"}


@pytest.mark.slow
@pytest.mark.parametrize("without_rclone", ENGINES, indirect=True)
def test_a_key_of_s3_that_leads_out_is_refused(s3, tmp_path, without_rclone):
    import s3fs

    filesystem = s3fs.S3FileSystem(use_listings_cache=False)
    for key in ("bad/good.txt", "bad/../../evil.txt"):
        filesystem.call_s3("put_object", Bucket="samples", Key=key, Body=b"evil")
    (tmp_path / "a/b").mkdir(parents=True)
    with pytest.raises(SyncError, match="could lead out of the destination"):
        sync(f"{s3}/bad", str(tmp_path / "a/b/down"))
    assert not content(tmp_path)


@pytest.fixture
def without_checksum(s3):
    """An object that was uploaded in parts, of which the store tells no MD5."""
    import s3fs

    content = os.urandom(11 << 20)
    filesystem = s3fs.S3FileSystem(use_listings_cache=False)
    with filesystem.open("samples/parts/large.bin", "wb", block_size=5 << 20) as file:
        file.write(content)
    assert "-" in filesystem.info("samples/parts/large.bin")["ETag"]
    return f"{s3}/parts", content


@pytest.mark.slow
@pytest.mark.parametrize("without_rclone", ENGINES, indirect=True)
def test_bytes_are_compared_where_there_is_no_checksum(without_checksum, tmp_path, without_rclone):
    address, before = without_checksum
    down = tmp_path / "down"
    sync(address, str(down))
    assert (down / "large.bin").read_bytes() == before
    assert sync(str(down), address)["copied"] == 0
    (down / "large.bin").write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    assert sync(address, str(tmp_path / "down"))["copied"] == 1
    assert (down / "large.bin").read_bytes() == before


@pytest.mark.slow
@needs_rclone
def test_a_staged_file_of_the_right_size_is_not_trusted(without_checksum, tmp_path):
    """What an interrupted copy left; rclone itself takes it where there is no checksum."""
    address, before = without_checksum
    staged = tmp_path / "down" / UNFINISHED / "large.bin"
    staged.parent.mkdir(parents=True)
    staged.write_bytes(bytes(len(before)))
    with pytest.raises(SyncError, match=r"large\.bin .*differ .* run the same command again"):
        sync(address, str(tmp_path / "down"))
    sync(address, str(tmp_path / "down"))
    assert (tmp_path / "down/large.bin").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("without_rclone", ENGINES, indirect=True)
def test_missing_credentials_are_told(s3, tmp_path, monkeypatch, without_rclone):
    import s3fs

    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(SyncError, match="the credentials"):
        sync(s3, str(tmp_path / "down"))
    with pytest.raises(InputError, match="the credentials"):
        expand_inputs(f"{s3}/reads.parquet")
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.slow
@pytest.mark.usefixtures("without_rclone")
def test_a_broken_upload_leaves_no_object(s3, tmp_path, monkeypatch):
    import s3fs

    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "large.bin").write_bytes(os.urandom(20 << 20))

    def stop(count):
        raise KeyboardInterrupt

    engine = transfer.open_engine(str(tmp_path / "source"), f"{s3}/broken")
    with pytest.raises(KeyboardInterrupt):
        engine.copy(["large.bin"], stop)
    assert not s3fs.S3FileSystem(use_listings_cache=False).exists("samples/broken/large.bin")


@pytest.mark.slow
@needs_rclone
def test_a_configured_remote_keeps_its_own_options(s3, database, tmp_path, monkeypatch):
    """The environment's endpoint is for s3://, not for the S3 remotes of the user."""
    (tmp_path / "rclone.conf").write_text(
        "[store]\ntype = s3\nprovider = Minio\nregion = us-east-1\n"
        f"endpoint = {os.environ['AWS_ENDPOINT_URL']}\n"
        "access_key_id = test\nsecret_access_key = a-secret-of-the-test\n"
    )
    monkeypatch.setenv("RCLONE_CONFIG", str(tmp_path / "rclone.conf"))
    monkeypatch.setenv("RCLONE_LOW_LEVEL_RETRIES", "1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert sync(str(database), "store:samples/own")["copied"] == len(content(database))


@pytest.mark.slow
@needs_rclone
def test_killed_on_the_way_and_run_again(s3, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for number in range(12):
        (source / f"{number}.bin").write_bytes(os.urandom(2 << 20))
    words = [sys.executable, "-m", "bioscan_xla.sync", str(source), f"{s3}/killed"]
    environment = os.environ | {"RCLONE_BWLIMIT": "8M", "RCLONE_TRANSFERS": "1"}
    process = subprocess.Popen(words, env=environment, start_new_session=True)
    import s3fs

    filesystem = s3fs.S3FileSystem(use_listings_cache=False)
    while not filesystem.exists("samples/killed/0.bin"):
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = len(filesystem.find("samples/killed"))
    assert before < 12
    second = sync(str(source), f"{s3}/killed")
    assert second["copied"] == 12 - before
    sync(f"{s3}/killed", str(tmp_path / "down"))
    assert content(tmp_path / "down") == content(source)


@pytest.mark.slow
@needs_rclone
def test_a_remote_of_rclone(database, tmp_path, monkeypatch):
    """A WebDAV server, which knows no checksums: the bytes are compared."""
    (tmp_path / "served").mkdir()
    port = _free_port()
    address = f"127.0.0.1:{port}"
    server = _serve([RCLONE, "serve", "webdav", "--addr", address, tmp_path / "served"], port)
    monkeypatch.setenv("RCLONE_CONFIG", str(tmp_path / "rclone.conf"))
    monkeypatch.setenv("RCLONE_CONFIG_SHIP_TYPE", "webdav")
    monkeypatch.setenv("RCLONE_CONFIG_SHIP_URL", f"http://{address}")
    try:
        sync(str(database), "ship:cruise/vectors.db")
        assert content(tmp_path / "served/cruise/vectors.db") == content(database)
        (tmp_path / "served/cruise/vectors.db/rejected.parquet").write_bytes(b"set_aside")
        assert sync(str(database), "ship:cruise/vectors.db")["to_copy"] == ["rejected.parquet"]
        sync("ship:cruise/vectors.db", str(tmp_path / "down"))
        assert content(tmp_path / "down") == content(database)
    finally:
        server.terminate()
        server.wait()
