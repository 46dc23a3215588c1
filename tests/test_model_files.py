"""Broken model files are named, with what is wrong; another vocabulary is refused."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import EsmModel

from bioscan_xla.encode.encoder import load_encoder
from bioscan_xla.encode.model import attach_saved_adapter, load_model, read_config
from bioscan_xla.encode.model_files import check_vocabulary, resolve_base
from bioscan_xla.encode.runtime import open_device
from bioscan_xla.errors import ModelError
from bioscan_xla.options import DEFAULT_MODEL
from bioscan_xla.reads.tokens import VOCABULARY
from bioscan_xla.sample import write_model

from .conftest import ROOT

PUBLISHED = ROOT.parent / "shared" / "nt_v1_tokenizer"


@pytest.fixture
def folder(model_folder, tmp_path):
    """A copy of the model that a test may break."""
    return shutil.copytree(model_folder, tmp_path / "model")


def load(folder):
    return load_encoder(str(folder), device=open_device("cpu", "float32"))


@pytest.mark.parametrize("kept", [5, 300, 100_000])
def test_truncated_weights(folder, kept):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ModelError, match=r"model\.safetensors: .*(truncated|damaged)"):
        load(folder)


def test_a_truncated_adapter(folder, tmp_path):
    model = EsmModel.from_pretrained(folder, add_pooling_layer=False)
    get_peft_model(model, LoraConfig(r=2, target_modules=["query"])).save_pretrained(tmp_path / "a")
    path = tmp_path / "a" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors: .*truncated"):
        attach_saved_adapter(load_model(str(folder), torch.float32), tmp_path / "a")


def test_an_adapter_of_a_wider_model(folder, tmp_path):
    write_model(tmp_path / "wide", hidden=128)
    wide = EsmModel.from_pretrained(tmp_path / "wide", add_pooling_layer=False)
    get_peft_model(wide, LoraConfig(r=2, target_modules=["query"])).save_pretrained(tmp_path / "a")
    with pytest.raises(ModelError, match=r"lora_A.*shape \[2, 128\], expected \[2, 64\]"):
        attach_saved_adapter(load_model(str(folder), torch.float32), tmp_path / "a")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"model_type": "esm", ', r"config\.json: not valid JSON"),
        ("[]", r"config\.json: not a JSON object"),
    ],
)
def test_a_broken_config(folder, text, message):
    (folder / "config.json").write_text(text)
    with pytest.raises(ModelError, match=message):
        read_config(str(folder))


@pytest.mark.parametrize("change", [{"hidden_size": "wide"}, {"num_attention_heads": 7}])
def test_a_config_of_no_model(folder, change):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ModelError, match=r"config\.json: no model can be built"):
        read_config(str(folder))


def test_weights_of_another_shape_are_named(folder):
    path = folder / "model.safetensors"
    weights = load_file(path)
    name = "esm.encoder.layer.1.output.dense.weight"
    weights[name] = weights[name][:, :-8].contiguous()
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(ModelError) as caught:
        load(folder)
    words = str(caught.value)
    assert (
        "encoder.layer.1.output.dense.weight has the shape (64, 248), expected (64, 256)" in words
    )
    assert "ignore_mismatched" not in words
    assert "complete" not in words


def test_a_swapped_vocabulary_is_refused(folder):
    words = list(VOCABULARY)
    words[10], words[11] = words[11], words[10]
    (folder / "vocab.txt").write_text("\n".join(words))
    with pytest.raises(ModelError, match=rf"vocab\.txt.*token 10 is '{words[10]}', not"):
        load(folder)
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY[:-1]))
    with pytest.raises(ModelError, match="token 4104 is missing, not 'N'"):
        load(folder)
    (folder / "vocab.txt").write_text("\n".join((*VOCABULARY, "<eos>")) + "\n")
    load(folder)  # the published file has it, and nothing uses it


def test_other_forms_of_the_vocabulary(folder):
    known = {word: number for number, word in enumerate(VOCABULARY)}
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({"model": {"vocab": known}, "added_tokens": []}))
    check_vocabulary(str(folder))
    known["AAAAAA"], known["AAAAAT"] = known["AAAAAT"], known["AAAAAA"]
    path.write_text(json.dumps({"model": {"vocab": known}}))
    with pytest.raises(ModelError, match=r"tokenizer\.json.*token 4 is 'AAAAAT', not 'AAAAAA'"):
        check_vocabulary(str(folder))
    path.unlink()
    (folder / "special_tokens_map.json").write_text(json.dumps({"cls_token": "N"}))
    with pytest.raises(ModelError, match="cls_token is 'N', not '<cls>'"):
        check_vocabulary(str(folder))


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published files are not here")
def test_the_published_vocabulary_is_the_built_in_one(folder):
    check_vocabulary(str(PUBLISHED))
    assert read_config(str(PUBLISHED)).hidden_size == 1280


def test_an_adapter_brings_its_base_and_commit(tmp_path):
    said = {"base_model_name_or_path": "a/b", "revision": "c0ffee"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(said))
    adapter = str(tmp_path)
    assert resolve_base(DEFAULT_MODEL, None, adapter) == ("a/b", "c0ffee")
    assert resolve_base("a/b", None, adapter) == ("a/b", "c0ffee")
    assert resolve_base("a/b", "main", adapter) == ("a/b", "main")
    assert resolve_base("x/y", None, adapter) == ("x/y", None)  # another model's commits
    assert resolve_base("x/y", None, None) == ("x/y", None)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"adapter_config\.json: not valid JSON"):
        resolve_base(DEFAULT_MODEL, None, adapter)


def test_loading_and_writing_draw_no_bars(folder, tmp_path, capfd):
    load(folder)
    write_model(tmp_path / "other", hidden=64)
    assert capfd.readouterr().err == ""
