"""The encoder that comes with the package: there, small, without network, and what it ignores."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

import bioscan_xla
from bioscan_xla.encode.encoder import load_encoder
from bioscan_xla.encode.inference import embed_sequences
from bioscan_xla.encode.runtime import open_device
from bioscan_xla.reads.tokens import load_tokenizer, reverse_complement

from .conftest import cosine, hugging_face_states, run_python

FOLDER = Path(bioscan_xla.__file__).parent / "weights" / "bioscan-small"


@pytest.fixture(scope="module")
def encoder():
    return load_encoder("bioscan-small", device=open_device("cpu", "float32"))


@pytest.fixture(scope="module")
def texts():
    rng = np.random.default_rng(5)
    return ["".join(rng.choice(list("ACGT"), n)) for n in (60, 170, 658, 1500)]


def test_its_files_are_small_and_complete():
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 6e6
    weights = load_file(FOLDER / "model.safetensors")
    assert {str(value.dtype) for value in weights.values()} == {"torch.float16"}
    card = (FOLDER / "README.md").read_text()
    assert all(f"## {part}" in card for part in ("Data", "Licence", "Recipe", "Results", "Limits"))
    assert (
        load_tokenizer(FOLDER).vocab_size
        == json.loads((FOLDER / "config.json").read_text())["vocab_size"]
    )


def test_it_reads_six_frames_as_hugging_face_does(encoder, texts):
    assert (encoder.frames, encoder.strands, encoder.hidden) == (6, "given", 256)
    found = embed_sequences(encoder, texts)
    for vector, text in zip(found, texts, strict=True):
        states = list(hugging_face_states(str(FOLDER), [text[drop:] for drop in range(6)]))
        np.testing.assert_allclose(vector, np.concatenate(states).mean(0), atol=1e-6)


def test_the_table_of_tokens_gives_what_the_model_gives(encoder, sequences):
    assert encoder.token_vectors is not None
    slow = replace(encoder, token_vectors=None)
    np.testing.assert_allclose(
        embed_sequences(encoder, sequences), embed_sequences(slow, sequences), atol=1e-6
    )


def test_a_model_with_positions_has_no_table_of_tokens(model_folder):
    cpu = open_device("cpu", "float32")
    assert load_encoder(model_folder, device=cpu, layer=0).token_vectors is None
    assert load_encoder("bioscan-small", device=cpu, pooling="max").token_vectors is None


def test_its_vectors_do_not_depend_on_strand_or_frame(encoder, texts):
    vectors = embed_sequences(encoder, texts)
    other = embed_sequences(encoder, [reverse_complement(text) for text in texts])
    np.testing.assert_allclose(vectors, other, atol=1e-6)
    for drop in range(1, 6):
        cut = embed_sequences(encoder, [text[drop:] for text in texts])
        kept = cosine(vectors, cut)
        assert kept[0] > 0.9  # 60 bp
        assert kept[1:].min() > 0.97
    # An N costs the 6-mers around it, and no frame behind it.
    with_n = embed_sequences(encoder, [text[:30] + "N" + text[31:] for text in texts])
    assert cosine(vectors, with_n)[1:].min() > 0.95


def test_a_folder_of_that_name_comes_first(tmp_path, monkeypatch, model_folder):
    (tmp_path / "bioscan-small").symlink_to(model_folder)
    monkeypatch.chdir(tmp_path)
    assert load_encoder("bioscan-small", device=open_device("cpu", "float32")).hidden == 64


def test_embeds_without_a_network(tmp_path):
    record = "".join(np.random.default_rng(0).choice(list("ACGT"), 200))
    (tmp_path / "reads.fasta").write_text(f">one\n{record}\n")
    offline = {
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "empty"),
        "HTTPS_PROXY": "http://127.0.0.1:9",
        "PYTHONPATH": os.pathsep.join([str(Path(bioscan_xla.__file__).parents[1])]),
    }
    words = [
        "--input",
        "reads.fasta",
        "--db",
        "vectors.db",
        "--model",
        "bioscan-small",
        "--device",
        "cpu",
    ]
    run_python("-m", "bioscan_xla.embed", *words, env=offline, cwd=tmp_path)
    words = f"-m bioscan_xla.search --db vectors.db {record} -k 1".split()
    assert "one" in run_python(*words, env=offline, cwd=tmp_path).stdout
