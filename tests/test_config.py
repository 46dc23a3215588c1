"""Options from YAML and flags; unknown ones are refused with the nearest name."""

import dataclasses

import pytest

from bioscan_xla.cli import parse
from bioscan_xla.errors import ConfigError
from bioscan_xla.options import EmbedConfig
from bioscan_xla.training.options import FinetuneConfig

from .conftest import ROOT


def embed(*words):
    return parse(EmbedConfig, list(words), "embed")


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_every_yaml_loads_and_tells_its_command(path):
    kind = EmbedConfig if path.name.startswith("embed_") else FinetuneConfig
    assert isinstance(parse(kind, ["--config", str(path)], path.stem), kind)
    assert f"--config configs/{path.name}" in path.read_text().split("\n\n")[0]


def test_flags_win_over_yaml(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("commit_rows: 5\ndevice: cpu\ninput: [x.fasta]\ncolumns: {depth: m}\n")
    config = embed("--config", str(path), "--commit-rows", "7")
    assert (config.commit_rows, config.device, config.input) == (7, "cpu", ["x.fasta"])
    assert config.columns == {"depth": "m"}


def test_ways_to_write_a_flag():
    config = embed(
        "--input",
        "a.fa",
        "b.fa",
        "--keep=station",
        "--dry-run",
        "--commit_rows=3",
        "--columns",
        "depth=m",
        "dna_sequence=seq",
        "--store-sequences",
        "false",
    )
    assert config.input == ["a.fa", "b.fa"]
    assert config.keep == ["station"]
    assert config.dry_run is True
    assert config.store_sequences is False
    assert config.commit_rows == 3
    assert config.columns == {"depth": "m", "dna_sequence": "seq"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--comit-rows", "5"], "did you mean 'commit_rows'"),
        (["--pooling", "sum"], "choose mean"),
        (["--commit-rows", "0"], "at least 1"),
        (["--commit-rows", "many"], "commit_rows"),
        (["--process-index", "2", "--process-count", "2"], "between 0 and"),
        (["--max-n-fraction", "2"], "from 0 to 1"),
        (["--commit-minutes", "0"], "above 0"),
        (["stray"], "stray"),
        (["--config", "absent.yaml"], "cannot be read"),
    ],
)
def test_mistakes_are_named(words, message):
    with pytest.raises(ConfigError, match=message):
        embed(*words)


def test_unknown_yaml_key_names_the_nearest(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("commit_row: 5\n")
    with pytest.raises(
        ConfigError, match=r"a\.yaml: there is no option 'commit_row'; did you mean"
    ):
        embed("--config", str(path))


def test_help_and_print_config(capsys):
    with pytest.raises(SystemExit):
        embed("--help")
    text = capsys.readouterr().out
    for field in dataclasses.fields(EmbedConfig):
        assert f"--{field.name.replace('_', '-')}" in text
    with pytest.raises(SystemExit):
        embed("--commit-rows", "77", "--print-config")
    assert "commit_rows: 77" in capsys.readouterr().out
