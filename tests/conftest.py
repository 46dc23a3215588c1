"""One small model for all tests, and what Hugging Face says about it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Programs for XLA's CPU backend run for milliseconds here: compiling them well takes longer.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import torch
from safetensors.torch import load_file

from bioscan_xla.reads.tokens import load_tokenizer
from bioscan_xla.sample import simulate, write_model, write_sample

from .copying import database, without_rclone  # noqa: F401
from .cruise import data, done  # noqa: F401

ROOT = Path(__file__).parents[1]


def pytest_collection_modifyitems(items):
    """Files with slow tests first, so that no process waits for another's at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def run_python(*words, env=None, check=True, **options):
    """Run a Python command in a process of its own."""
    result = subprocess.run(
        [sys.executable, *map(str, words)],
        env={**os.environ, **(env or {})},
        check=False,
        capture_output=True,
        text=True,
        **options,
    )
    assert not check or result.returncode == 0, result.stderr
    return result


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A two-layer ESM model with the real architecture, in the Hugging Face format."""
    folder = tmp_path_factory.mktemp("model")
    write_model(folder, hidden=64, layers=2, heads=4)
    return str(folder)


@pytest.fixture(scope="session")
def sequences():
    """Simulated sequences of 60 to 5,900 bp, some with N, some equal."""
    texts = [text for text in simulate(60, seed=3)["dna_sequence"].to_pylist() if len(text) < 5900]
    return [*texts, "ACGTAC", "A", "ACGTN" * 20, texts[0], texts[5]]


def hugging_face_states(folder, sequences, layer=-1):
    """Hidden states of each sequence alone, by Hugging Face's own forward, float32."""
    from transformers import EsmModel

    model = EsmModel.from_pretrained(folder, dtype=torch.float32, add_pooling_layer=False).eval()
    tokenizer = load_tokenizer(folder)
    with torch.inference_mode():
        for sequence in sequences:
            output = model(**tokenizer(sequence, return_tensors="pt"), output_hidden_states=True)
            last = layer == -1  # which a model without layers has too
            states = output.last_hidden_state if last else output.hidden_states[layer]
            yield states[0].numpy()


@pytest.fixture(scope="session")
def expected(model_folder, sequences):
    """Vectors by the model card's recipe: mean of the last hidden state, each sequence alone."""
    return np.stack([states.mean(0) for states in hugging_face_states(model_folder, sequences)])


def cosine(a, b):
    """Cosine of each pair of rows."""
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


@pytest.fixture
def offline_wandb(tmp_path, monkeypatch):
    """The real Weights & Biases client, offline, writing under the returned folder."""
    import wandb

    wandb.teardown()  # its service keeps the settings of the run before
    folder = tmp_path / "wandb-offline"
    folder.mkdir()
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(folder))
    yield folder
    wandb.teardown()


@pytest.fixture(scope="session")
def training_sample(tmp_path_factory):
    """A labelled Parquet of 60 sequences."""
    path = tmp_path_factory.mktemp("sample") / "sample.parquet"
    write_sample(path, 60)
    return str(path)


@pytest.fixture(scope="session")
def short_sample(training_sample):
    """The same, each cut to 90 bases: one row width, so that little is compiled."""
    table = pq.read_table(training_sample)
    short = pc.utf8_slice_codeunits(table["dna_sequence"], 0, 90)
    at = table.schema.get_field_index("dna_sequence")
    path = Path(training_sample).with_name("short.parquet")
    pq.write_table(table.set_column(at, "dna_sequence", short), path)
    return str(path)


@pytest.fixture
def options(training_sample, model_folder, tmp_path):
    """Options of a small fine-tuning run."""
    return small_run(training_sample, model_folder, str(tmp_path / "out"))


def small_run(train, model, output):
    """Options of a small fine-tuning run with these places."""
    return {
        "train": train,
        "model": model,
        "output": output,
        "device": "cpu",
        "dtype": "float32",
        "num_epochs": 2,
        "batch_size": 8,
        "eval_fraction": 0.2,
        "learning_rate": 1e-3,
        "min_sequences": 1,
    }


def tracked_scalars(folder):
    """The scalars of a training folder's TensorBoard files: name to values, in their order."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    values = {}
    for path in Path(folder).rglob("events.out.*"):
        events = EventAccumulator(str(path)).Reload()
        for name in events.Tags()["scalars"]:
            values.setdefault(name, []).extend(event.value for event in events.Scalars(name))
    return values


def metrics_lines(folder):
    """The lines of a training folder's metrics.jsonl."""
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


def trained(folder):
    """All trained weights of a model folder."""
    folder = Path(folder)
    return load_file(folder / "adapter/adapter_model.safetensors") | load_file(
        folder / "heads.safetensors"
    )


def difference(a, b):
    """Largest difference between two sets of weights."""
    a, b = trained(a), trained(b)
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)
