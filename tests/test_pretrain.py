"""Pre-training: the loss falls, and what is left is a model that the rest can use."""

import dataclasses
import itertools
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

from bioscan_xla.embed import run_embedding_pipeline
from bioscan_xla.errors import ConfigError, InputError
from bioscan_xla.options import PretrainConfig
from bioscan_xla.pretrain import main, pretrain
from bioscan_xla.sample import write_sample
from bioscan_xla.training import pretraining


def test_a_small_encoder_is_trained_and_can_be_used(tmp_path, capsys):
    # Repeats of a few motifs: easy to learn.
    motifs = ("ACGTTGCA", "GGATCCAT", "TTAGGCAT")
    texts = [motifs[n % 3] * (30 + n) for n in range(40)]
    (tmp_path / "sample.fasta").write_text(
        "".join(f">s{n}\n{text}\n" for n, text in enumerate(texts))
    )
    options = {"hidden": 32, "layers": 1, "heads": 2, "batch_size": 8, "learning_rate": 5e-3}
    words = [f"--{key}={value}" for key, value in options.items()]
    words += ["--input", str(tmp_path / "sample.fasta"), "--output", str(tmp_path / "encoder")]
    assert main([*words, "--max-steps", "60", "--device", "cpu"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["loss"] < 6  # log(4,105) = 8.3 is chance
    made = run_embedding_pipeline(
        str(tmp_path / "sample.fasta"),
        str(tmp_path / "db"),
        model=result["model_path"],
        device="cpu",
    )
    assert made["avg_vector_length"] == 32
    assert not list((tmp_path / "encoder").glob("*.bin"))


def test_a_trained_encoder_is_never_written_over(tmp_path, monkeypatch):
    path, output = tmp_path / "a.fasta", tmp_path / "encoder"
    path.write_text("".join(f">s{n}\n{'ACGTTGCA' * (9 + n)}\n" for n in range(8)))
    small = {"hidden": 16, "layers": 1, "heads": 2, "max_steps": 2, "device": "cpu"}
    config = PretrainConfig(input=str(path), output=str(output), **small)
    with monkeypatch.context() as stopped:
        stopped.setattr("transformers.Trainer.train", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            pretrain(config)
    assert not list(output.glob("*.safetensors"))  # nothing to show yet
    first = pretrain(config)
    weights = (output / "model.safetensors").read_bytes()
    monkeypatch.setattr("transformers.Trainer.train", lambda *_, **__: 1 / 0)
    assert pretrain(config) == first
    with pytest.raises(ConfigError, match=r"another pre-training run:\n  seed: there 0, here 1"):
        pretrain(dataclasses.replace(config, seed=1))
    (output / "pretraining.json").unlink()  # as every other model folder
    with pytest.raises(ConfigError, match="already holds a model"):
        pretrain(config)
    assert (output / "model.safetensors").read_bytes() == weights


@pytest.mark.parametrize("save_steps", [3, 4])  # the end of an epoch, the middle of one
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, monkeypatch, save_steps):
    monkeypatch.setattr(pretraining, "_SAVE_STEPS", save_steps)
    write_sample(tmp_path / "a.parquet", 12)
    small = {"hidden": 16, "layers": 1, "heads": 2, "batch_size": 4, "num_epochs": 4}
    config = PretrainConfig(
        input=str(tmp_path / "a.parquet"), output=str(tmp_path / "whole"), device="cpu", **small
    )
    pretrain(config)
    broken, step = dataclasses.replace(config, output=str(tmp_path / "broken")), itertools.count()
    train = transformers.Trainer.training_step
    with monkeypatch.context() as stopped:
        stopped.setattr(
            "transformers.Trainer.training_step",
            lambda *words: 1 / 0 if next(step) == 5 else train(*words),
        )
        with pytest.raises(ZeroDivisionError):
            pretrain(broken)
    assert (tmp_path / f"broken/checkpoints/checkpoint-{save_steps}").is_dir()
    pretrain(broken)
    whole, resumed = (
        load_file(tmp_path / name / "model.safetensors") for name in ("whole", "broken")
    )
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


def test_mistakes_are_told(tmp_path):
    with pytest.raises(ConfigError, match="multiple of heads"):
        PretrainConfig(hidden=30, heads=4)
    (tmp_path / "empty.fasta").write_text(">a\nNNN\n")
    with pytest.raises(InputError, match="no usable"):
        pretrain(PretrainConfig(input=str(tmp_path / "empty.fasta"), output=str(tmp_path / "out")))
