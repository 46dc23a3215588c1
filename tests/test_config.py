"""Options from YAML and flags; unknown ones are refused with the nearest name."""

import dataclasses
import sys

import pytest

from bioscan_xla import embed as embed_command
from bioscan_xla import finetune
from bioscan_xla.cli import parse, run_command
from bioscan_xla.errors import ConfigError
from bioscan_xla.options import (
    EmbedConfig,
    FinetuneConfig,
    SampleConfig,
    SearchConfig,
    SyncConfig,
)

from .conftest import ROOT, run_python


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
        (["--sequences", "5"], "did you mean 'max_sequences'"),
        (["--train", "x.fasta"], "there is no option 'train'; known are input, db"),
        (["--pooling", "sum"], "choose mean"),
        (["--commit-rows", "0"], "at least 1"),
        (["--commit-rows", "many"], r"^--commit-rows is 'many'; it must be a whole number$"),
        (["--dry-run", "maybe"], r"^--dry-run is 'maybe'; it must be true or false$"),
        (["--commit-minutes", ".nan"], "above 0"),
        (["--columns", "depth"], "write it as NAME=VALUE"),
        (["--db"], "--db needs a value"),
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


@pytest.mark.parametrize("before", [True, False])
def test_flags_win_wherever_they_stand(tmp_path, before):
    path = tmp_path / "a.yaml"
    path.write_text("input: [yaml.fasta]\ncommit_rows: 5\n")
    words = [["--input", "flag.fasta"], ["--config", str(path)]]
    first, second = words if before else words[::-1]
    config = embed(*first, *second)
    assert (config.input, config.commit_rows) == (["flag.fasta"], 5)


def test_of_two_yamls_the_later_wins(tmp_path):
    (tmp_path / "a.yaml").write_text("commit_rows: 5\ntable: a\n")
    (tmp_path / "b.yaml").write_text("commit_rows: 6\n")
    config = embed("--config", str(tmp_path / "a.yaml"), "--config", str(tmp_path / "b.yaml"))
    assert (config.commit_rows, config.table) == (6, "a")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("db: a\ntable: t\ndb: b\n", r"a\.yaml: 'db' is set twice, in lines 1 and 3"),
        ("columns:\n  depth: a\n  depth: b\n", r"'depth' is set twice, in lines 2 and 3"),
        ("commit_rows: many\n", r"a\.yaml: commit_rows is 'many'; it must be a whole number"),
        ("table: 2026\n", r"a\.yaml: table is 2026; it must be text .*quotes"),
        ("max_errors: [1]\n", r"max_errors is \[1\]; it must be a whole number or null"),
        ("input: {a: b}\n", r"input is \{'a': 'b'\}; it must be a list of text or text"),
        ("commit_rows: 0\n", r"a\.yaml: commit_rows is 0; it must be at least 1"),
        ("commit_minutes: .nan\n", r"a\.yaml: commit_minutes is nan"),
        ("- db\n", "must hold options as"),
        ("db: [\n", "not valid YAML"),
        ("db: b\xe4d\n", "save it as UTF-8"),
    ],
)
def test_mistakes_in_a_yaml_name_it(tmp_path, text, message):
    path = tmp_path / "a.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=message) as caught:
        embed("--config", str(path))
    assert "Parser" not in str(caught.value)


def test_the_old_name_of_tracker_is_accepted_with_a_note(tmp_path, caplog):
    path = tmp_path / "a.yaml"
    path.write_text("wandb: true\n")
    assert embed("--config", str(path)).tracker == embed("--wandb").tracker == "wandb"
    assert embed("--config", str(path), "--wandb", "false").tracker == "none"
    assert "the option wandb is now tracker: wandb" in caplog.text
    with pytest.raises(ConfigError, match="remove wandb"):
        embed("--wandb", "--tracker", "none")


def test_words_without_a_flag():
    config = parse(
        SearchConfig, ["--db", "d", "ACGT", "-k", "3", "a.fa"], "s", ("query",), {"-k": "k"}
    )
    assert (config.query, config.db, config.k) == (["ACGT", "a.fa"], "d", 3)
    config = parse(SyncConfig, ["a", "--delete", "b"], "sync", ("source", "destination"))
    assert (config.source, config.destination, config.delete) == ("a", "b", True)
    with pytest.raises(ConfigError, match="destination is missing"):
        parse(SyncConfig, ["a"], "sync", ("source", "destination"))


HEAVY = ["torch", "torch_xla", "transformers", "peft", "accelerate", "lancedb", "jax", "ray"]
COMMANDS = ["embed", "search", "finetune", "pretrain", "plan", "sync", "sample"]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("words", ["--help", "--no-such-option 1", "--input absent.fasta"])
def test_what_is_wrong_is_said_before_anything_heavy_is_imported(command, words, tmp_path):
    script = f"""
import sys
from bioscan_xla.{command} import main
try:
    status = main({["embed"] * (command == "plan") + words.split()!r})
except SystemExit as left:
    status = left.code
print(status, *sorted(set({HEAVY!r}) & set(sys.modules)), file=sys.stderr)
"""
    if command == "finetune":
        script = script.replace("--input", "--train")
    if command in ("search", "sync", "sample", "plan") and "absent" in words:
        pytest.skip("has no such option, or wants a compiler first")
    done = run_python("-c", script, cwd=tmp_path)
    said = done.stderr.strip().splitlines()
    assert said[-1] == ("0" if words == "--help" else "1")
    if "absent" in words:
        assert "absent.fasta" in said[-2]


def test_embed_without_a_word_embeds_the_sample(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert embed_command.main([]) == 0
    first, *rest = capsys.readouterr().out.splitlines()
    assert "built-in sample" in first
    assert "--input FILES --db FOLDER" in first
    assert "400" in rest[0]
    assert (tmp_path / "demo/embeddings.db").is_dir()


def test_finetune_without_a_word_trains_on_the_sample(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    seen = []
    result = {"process_index": 1, "interrupted": None}
    monkeypatch.setattr(finetune, "finetune", lambda config: seen.append(config) or result)
    assert finetune.main([]) == 0
    assert "--train FILES --output FOLDER" in capsys.readouterr().out.splitlines()[0]
    (config,) = seen
    # The same run as the demo's config.
    assert config == parse(
        FinetuneConfig,
        ["--config", str(ROOT / "configs/finetune_demo.yaml")],
        "finetune",
    )
    assert (tmp_path / "demo/sample.parquet").is_file()
    assert (tmp_path / "demo/model").is_dir()


def test_help_and_print_config(capsys):
    with pytest.raises(SystemExit):
        embed("--help")
    text = capsys.readouterr().out
    for field in dataclasses.fields(EmbedConfig):
        assert f"--{field.name.replace('_', '-')}" in text
    with pytest.raises(SystemExit):
        embed("--commit-rows", "77", "--print-config")
    assert "commit_rows: 77" in capsys.readouterr().out


def test_a_reader_that_has_left_is_no_error(capsys, monkeypatch):
    """As with `... | head`: the work is done."""
    monkeypatch.setattr(sys, "stdout", sys.stdout)

    def work(config):
        raise BrokenPipeError

    assert run_command(SampleConfig, work, ["demo"], "prog", positionals=("folder",)) == 141
    assert capsys.readouterr().err == ""
