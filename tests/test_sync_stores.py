"""Copying to and from stores, with real servers on the loopback: S3, Google and rclone's own."""

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from bioscan_xla.errors import InputError, SyncError
from bioscan_xla.reads.inputs import UNFINISHED, expand_inputs
from bioscan_xla.sync import sync
from bioscan_xla.transfer import engine as transfer

from .copying import ENGINES, RCLONE, content, count_rows, needs_rclone


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
