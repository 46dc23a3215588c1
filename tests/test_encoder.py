"""Vectors equal Hugging Face's own forward on each sequence alone, in every way of computing."""

import json
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import EsmForMaskedLM, EsmModel

from bioscan_xla.embed import run_embedding_pipeline
from bioscan_xla.encode import model_files
from bioscan_xla.encode.encoder import load_encoder
from bioscan_xla.encode.inference import embed_sequences, embed_text
from bioscan_xla.encode.model_files import adapter_base
from bioscan_xla.encode.runtime import open_device
from bioscan_xla.errors import ConfigError, ModelError, TableError

from .conftest import cosine, hugging_face_states


@pytest.fixture(scope="module")
def cpu():
    return open_device("cpu", "float32")


def test_float32_equals_hugging_face(model_folder, sequences, expected, cpu):
    vectors = embed_sequences(load_encoder(model_folder, device=cpu), sequences)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, expected, atol=1e-5)


def test_bfloat16_is_close(model_folder, sequences, expected):
    encoder = load_encoder(model_folder, device=open_device("cpu", "bfloat16"))
    assert cosine(embed_sequences(encoder, sequences), expected).min() >= 0.9995


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")
@pytest.mark.parametrize(("dtype", "least"), [("float32", 0.999999), ("bfloat16", 0.9995)])
def test_cuda_is_close(model_folder, sequences, expected, dtype, least):
    encoder = load_encoder(model_folder, device=open_device("cuda", dtype))
    assert cosine(embed_sequences(encoder, sequences), expected).min() >= least


def test_neighbours_do_not_matter(model_folder, sequences, cpu):
    encoder = load_encoder(model_folder, device=cpu)
    together = embed_sequences(encoder, sequences)
    alone = np.concatenate([embed_sequences(encoder, [sequence]) for sequence in sequences])
    backwards = embed_sequences(encoder, sequences[::-1])[::-1]
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(together, backwards, atol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "mean_no_special", "cls", "max"])
def test_poolings(model_folder, sequences, pooling, cpu):
    by_hand = {
        "mean": lambda states: states.mean(0),
        "mean_no_special": lambda states: states[1:].mean(0),
        "cls": lambda states: states[0],
        "max": lambda states: states.max(0),
    }[pooling]
    wanted = [by_hand(states) for states in hugging_face_states(model_folder, sequences[:20])]
    encoder = load_encoder(model_folder, device=cpu, pooling=pooling)
    np.testing.assert_allclose(embed_sequences(encoder, sequences[:20]), wanted, atol=1e-5)


@pytest.mark.parametrize("layer", [-1, 0, 1, 2])
def test_layers(model_folder, sequences, layer, cpu):
    wanted = [s.mean(0) for s in hugging_face_states(model_folder, sequences[:10], layer)]
    encoder = load_encoder(model_folder, device=cpu, layer=layer)
    np.testing.assert_allclose(embed_sequences(encoder, sequences[:10]), wanted, atol=1e-5)


def test_long_sequence_is_the_token_weighted_mean_of_its_windows(model_folder, cpu):
    rng = np.random.default_rng(0)
    kmers = ["".join(rng.choice(list("ACGT"), 6)) for _ in range(2500)]
    encoder = load_encoder(model_folder, device=cpu, overlap_tokens=100)
    assert encoder.max_tokens == 1000
    windows = [kmers[0:999], kmers[899:1898], kmers[1798:2500]]
    parts = embed_sequences(encoder, ["".join(window) for window in windows])
    weights = np.array([len(window) + 1 for window in windows])
    wanted = (parts * weights[:, None]).sum(0) / weights.sum()
    np.testing.assert_allclose(embed_sequences(encoder, ["".join(kmers)])[0], wanted, atol=1e-5)


def test_adapter_is_merged(model_folder, sequences, tmp_path, cpu):
    torch.manual_seed(1)
    base = EsmModel.from_pretrained(model_folder, add_pooling_layer=False)
    tuned = get_peft_model(
        base,
        LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"], init_lora_weights=False),
    )
    tuned.save_pretrained(tmp_path / "adapter")
    with_adapter = load_encoder(model_folder, device=cpu, adapter=str(tmp_path / "adapter"))
    without = load_encoder(model_folder, device=cpu)
    assert with_adapter.fingerprint["adapter_hash"]
    assert with_adapter.fingerprint["weights"] == without.fingerprint["weights"]

    fresh = PeftModel.from_pretrained(
        EsmModel.from_pretrained(model_folder, add_pooling_layer=False), tmp_path / "adapter"
    )
    fresh.merge_and_unload().save_pretrained(tmp_path / "merged")
    shutil.copy(Path(model_folder) / "vocab.txt", tmp_path / "merged")
    shutil.copy(Path(model_folder) / "tokenizer_config.json", tmp_path / "merged")
    wanted = [s.mean(0) for s in hugging_face_states(tmp_path / "merged", sequences[:8])]
    got = embed_sequences(with_adapter, sequences[:8])
    np.testing.assert_allclose(got, wanted, atol=1e-5)
    assert np.abs(got - embed_sequences(without, sequences[:8])).max() > 1e-3


def test_other_adapter_other_hash(model_folder, tmp_path, cpu):
    hashes = set()
    for seed in (0, 1):
        torch.manual_seed(seed)
        base = EsmModel.from_pretrained(model_folder, add_pooling_layer=False)
        config = LoraConfig(r=2, target_modules=["query"], init_lora_weights=False)
        get_peft_model(base, config).save_pretrained(tmp_path / str(seed))
        encoder = load_encoder(model_folder, device=cpu, adapter=str(tmp_path / str(seed)))
        hashes.add(encoder.fingerprint["adapter_hash"])
    assert len(hashes) == 2


@pytest.fixture
def hub(model_folder, tmp_path, monkeypatch):
    """A hub cache with two commits of one model, the newer with other weights."""
    cache = tmp_path / "hub"
    repository = cache / "models--lab--tiny"
    for commit in ("a" * 40, "b" * 40):
        shutil.copytree(model_folder, repository / "snapshots" / commit)
    weights = load_file(repository / "snapshots" / ("b" * 40) / "model.safetensors")
    weights["esm.embeddings.word_embeddings.weight"] *= 2
    save_file(
        weights, repository / "snapshots" / ("b" * 40) / "model.safetensors", {"format": "pt"}
    )
    (repository / "refs").mkdir()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    return repository / "refs" / "main"


def test_the_table_keeps_the_commit_it_was_begun_with(hub, tmp_path, cpu):
    options = dict(model="lab/tiny", device="cpu", dtype="float32")
    fasta = tmp_path / "few.fasta"
    fasta.write_text("".join(f">s{n}\n{'ACGTTGCATG' * (5 + n)}\n" for n in range(9)))
    hub.write_text("a" * 40)
    first = run_embedding_pipeline(str(fasta), str(tmp_path / "db"), max_sequences=4, **options)
    assert first["fingerprint"]["revision"] == "a" * 40
    hub.write_text("b" * 40)
    second = run_embedding_pipeline(str(fasta), str(tmp_path / "db"), **options)
    assert second["fingerprint"] == first["fingerprint"]
    assert load_encoder("lab/tiny", device=cpu).fingerprint["revision"] == "b" * 40
    with pytest.raises(TableError, match="revision"):
        run_embedding_pipeline(str(fasta), str(tmp_path / "db"), revision="b" * 40, **options)


def test_weights_as_pickle_load_tensors_only(model_folder, sequences, expected, tmp_path, cpu):
    folder = _copy(model_folder, tmp_path)
    (folder / "model.safetensors").unlink()
    model = EsmForMaskedLM.from_pretrained(model_folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    vectors = embed_sequences(load_encoder(str(folder), device=cpu), sequences)
    np.testing.assert_allclose(vectors, expected, atol=1e-5)


class _Evil:
    def __reduce__(self):
        return (Path.touch, (Path("unpickled"),))


def test_pickled_code_is_never_run(model_folder, tmp_path, monkeypatch, cpu):
    folder = _copy(model_folder, tmp_path)
    (folder / "model.safetensors").unlink()
    torch.save({"esm.embeddings.word_embeddings.weight": _Evil()}, folder / "pytorch_model.bin")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="could not be loaded"):
        load_encoder(str(folder), device=cpu)
    assert not (tmp_path / "unpickled").exists()


def _copy(model_folder, tmp_path, **changes):
    folder = tmp_path / "copy"
    shutil.copytree(model_folder, folder)
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"auto_map": {"AutoModel": "modeling_esm.EsmModel"}}, "running code"),
        ({"model_type": "bert"}, "'bert'"),
        ({"vocab_size": 4107}, "4107 tokens"),
        ({"position_embedding_type": "rotary"}, "rotary"),
    ],
)
def test_other_models_are_refused(model_folder, tmp_path, changes, message, cpu):
    folder = _copy(model_folder, tmp_path, **changes)
    with pytest.raises(ModelError, match=message):
        load_encoder(str(folder), device=cpu)


def test_incomplete_weights_are_refused(model_folder, tmp_path, cpu):
    folder = _copy(model_folder, tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights.pop("esm.encoder.layer.1.output.dense.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"lack encoder\.layer\.1\.output\.dense\.weight"):
        load_encoder(str(folder), device=cpu)


def test_missing_model_names_the_remedy(tmp_path, cpu):
    with pytest.raises(ModelError, match="--model FOLDER"):
        load_encoder("nobody/no-such-model", device=cpu)
    with pytest.raises(ModelError, match=r"no config\.json"):
        load_encoder(str(tmp_path), device=cpu)


@pytest.mark.parametrize(
    "options", [{"pooling": "sum"}, {"layer": 3}, {"layer": -2}, {"overlap_tokens": 600}]
)
def test_options_out_of_range(model_folder, options, cpu):
    with pytest.raises(ConfigError):
        load_encoder(model_folder, device=cpu, **options)


def test_text_is_cleaned_first(model_folder, cpu):
    encoder = load_encoder(model_folder, device=cpu)
    clean = "ACGTTGCA" * 8
    messy = "nn" + clean.replace("T", "u").lower()[:30] + "-" + clean[30:] + "N"
    np.testing.assert_array_equal(embed_text(encoder, [messy]), embed_text(encoder, [clean]))
    with pytest.raises(ValueError, match="sequence 2 of 2"):
        embed_text(encoder, [clean, "protein"])


def test_an_adapter_says_what_it_was_trained_on(tmp_path):
    folder = tmp_path / "tuned/adapter"
    folder.mkdir(parents=True)
    said = {"base_model_name_or_path": "a/b", "revision": "c0ffee"}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    assert adapter_base(str(folder)) == adapter_base(str(folder.parent)) == ("a/b", "c0ffee")
    assert adapter_base(str(tmp_path)) == (None, None)


@pytest.mark.parametrize(
    "name",
    ["{}/gone", "./gone", "../gone", "~/gone", "a/b/c", "here/gone", "gone", "a\\b", "a/", ".a/b"],
)
def test_a_mistyped_folder_is_not_looked_for_on_the_hub(
    model_folder, tmp_path, monkeypatch, cpu, name
):
    def ask(*arguments, **options):
        raise AssertionError("the hub was asked")

    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    monkeypatch.setattr(model_files, "cached_file", ask)
    monkeypatch.setattr("peft.PeftModel.from_pretrained", ask)
    name = name.format(tmp_path)
    with pytest.raises(ModelError, match="no such folder"):
        load_encoder(name, device=cpu)
    with pytest.raises(ModelError, match="no such folder"):
        load_encoder(model_folder, device=cpu, adapter=name)


def test_a_hub_without_an_address_is_not_asked(monkeypatch, cpu):
    def fail(*arguments):
        raise socket.gaierror("Name or service not known")

    asked = []
    monkeypatch.setattr(socket, "getaddrinfo", fail)
    monkeypatch.setattr(model_files, "cached_file", lambda *a, **options: asked.append(options))
    with pytest.raises(ModelError, match="the hub cannot be reached"):
        load_encoder("lab/gone", device=cpu)
    assert [options["local_files_only"] for options in asked] == [True]


def test_a_home_folder_is_written_out(model_folder, tmp_path, monkeypatch, cpu):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(model_folder, tmp_path / "mine")
    assert load_encoder("~/mine", device=cpu).fingerprint["model"] == str(tmp_path / "mine")
