"""Pre-training: the loss falls, and what is left is a model that the rest can use."""

import json

import pytest

from bioscan_xla.embed import run_embedding_pipeline
from bioscan_xla.errors import ConfigError, InputError
from bioscan_xla.options import PretrainConfig
from bioscan_xla.pretrain import main, pretrain


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


def test_mistakes_are_told(tmp_path):
    with pytest.raises(ConfigError, match="multiple of heads"):
        PretrainConfig(hidden=30, heads=4)
    (tmp_path / "empty.fasta").write_text(">a\nNNN\n")
    with pytest.raises(InputError, match="no usable"):
        pretrain(PretrainConfig(input=str(tmp_path / "empty.fasta"), output=str(tmp_path / "out")))
