"""Weights & Biases and TensorBoard, the real clients: failures change nothing, no key is left."""

import logging

import fsspec
import numpy as np
import pytest

from bioscan_xla.embedding.tracking import Tracker

from .conftest import tracked_scalars


def test_offline_run_is_written_without_the_key(offline_wandb, monkeypatch, caplog):
    key = "0123456789abcdef0123456789abcdef01234567"
    monkeypatch.setenv("WANDB_API_KEY", key)
    with caplog.at_level(logging.DEBUG):
        tracker = Tracker("wandb", "tests", {"model": "small"}, ".")
        tracker.log({"embed/sequences": 5}, [1.0, 2.0])
        tracker.finish()
    written = [
        path for path in offline_wandb.rglob("*") if path.is_file() and not path.is_symlink()
    ]
    assert any(path.suffix == ".wandb" for path in written)
    assert all(key.encode() not in path.read_bytes() for path in written)
    assert key not in caplog.text
    assert "failed" not in caplog.text


def test_a_failure_is_warned_of_once(monkeypatch, caplog):
    import wandb

    class Run:
        def log(self, *_):
            raise ConnectionError("gone")

    monkeypatch.setattr(wandb, "init", lambda **_: Run())
    tracker = Tracker("wandb", "tests", {}, ".")
    for _ in range(3):
        tracker.log({"a": 1})
    tracker.finish()
    assert caplog.text.count("gone") == 1


def test_off_by_default(monkeypatch):
    import wandb

    monkeypatch.setattr(wandb, "init", lambda **_: 1 / 0)
    Tracker("none", "tests", {}, ".").log({"a": 1})


def test_tensorboard_beside_a_remote_database(tmp_path):
    pytest.importorskip("tensorboard")
    files = fsspec.filesystem("memory")
    tracker = Tracker("tensorboard", "tests", {"model": "small"}, "memory://tracked/vectors.db")
    for number in range(40):  # several flushes
        tracker.log({"embed/sequences": number, "embed/speed": 2.5}, np.array([1.0, 2.0]))
    tracker.finish()
    files.get("memory://tracked/vectors.db/tensorboard", str(tmp_path), recursive=True)
    assert tracked_scalars(tmp_path)["embed/sequences"] == list(range(40))
    files.rm("memory://tracked", recursive=True)
