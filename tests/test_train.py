"""Training: what it changes, that it resumes exactly, and that every way of running agrees."""

import dataclasses
import importlib.util
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from bioscan_xla.encode.encoder import load_encoder
from bioscan_xla.encode.runtime import open_device
from bioscan_xla.errors import ConfigError, InputError, ModelError
from bioscan_xla.options import FinetuneConfig
from bioscan_xla.reads.labels import learn_labels
from bioscan_xla.reads.lineages import RANKS, known_name
from bioscan_xla.sample import write_model
from bioscan_xla.training import loop as training_loop
from bioscan_xla.training import setup
from bioscan_xla.training.classifier import load_classifier
from bioscan_xla.training.heldout import NEW_TO_THE_MODEL, read_heldout
from bioscan_xla.training.run import finetune
from bioscan_xla.training.setup import prepare_data

from .conftest import ROOT, difference, metrics_lines, run_python, tracked_scalars

needs_xla = pytest.mark.skipif(
    importlib.util.find_spec("torch_xla") is None, reason="torch_xla is not installed"
)


def run(options, env=None, check=True, launcher=()):
    """Fine-tune in a process of its own."""
    words = [*launcher, "-m", "tests.finetune_run", json.dumps(options)]
    return run_python(*words, env=env, check=check, cwd=ROOT)


def test_killed_and_resumed_equals_uninterrupted(options, tmp_path):
    whole = options | {"output": str(tmp_path / "whole")}
    broken = options | {"output": str(tmp_path / "broken"), "checkpoint_minutes": 1e-9}
    first = json.loads(run(whole).stdout.splitlines()[-1])
    for kill_at in (3, 5, 9):  # in the first and in the second epoch
        killed = run(broken, env={"KILL_AT": str(kill_at)}, check=False)
        assert killed.returncode == -signal.SIGKILL
    second = json.loads(run(broken).stdout.splitlines()[-1])
    assert difference(whole["output"], broken["output"]) == 0
    assert second["epoch_1_loss"] == first["epoch_1_loss"]
    assert second["epoch_2_loss"] == first["epoch_2_loss"]
    assert second["evaluation"] == first["evaluation"]
    lines = [Path(o["output"], "metrics.jsonl").read_text() for o in (whole, broken)]
    assert lines[0] == lines[1]


def test_a_finished_run_has_nothing_to_do(options):
    first = finetune(FinetuneConfig(**options))
    again = finetune(FinetuneConfig(**options))
    assert again["epoch_2_loss"] == first["epoch_2_loss"]
    assert again["evaluation"] == first["evaluation"]


def test_an_error_under_the_launcher_is_one_message(training_sample, tmp_path):
    """As the Makefile calls it; without --quiet the launcher adds a traceback of its own."""
    makefile = Path(ROOT, "Makefile").read_text().replace("\\\n", " ")
    (flags,) = re.findall(r"accelerate launch (.*?) launch/finetune.py", makefile)
    words = ["--train", training_sample, "--model", "no/such/folder", "--output", tmp_path / "out"]
    ended = run_python(
        *("-m", "accelerate.commands.launch", *flags.split(), ROOT / "launch/finetune.py", *words),
        check=False,
    )
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1] == (
        "error: no/such/folder: no such folder; check the path"
    )
    assert "Traceback" not in ended.stderr


def test_a_resumed_run_keeps_the_commit_that_it_began_with(options, monkeypatch):
    loaded, load = [], setup.load_model

    def from_hub(model, dtype, revision):
        loaded.append(revision)
        return load(model, dtype)

    monkeypatch.setattr(setup, "load_model", from_hub)
    for moved, begins_anew in (("a", False), ("b", False), ("c", True)):
        monkeypatch.setattr(setup, "resolve_commit", lambda *_, moved=moved: moved * 40)
        more = {"num_epochs": 1, "resume": not begins_anew}
        finetune(FinetuneConfig(**options | more))
        adapter = Path(options["output"], "adapter/adapter_config.json").read_text()
        assert json.loads(adapter)["revision"] == loaded[-1]
    assert loaded == ["a" * 40, "a" * 40, "c" * 40]
    with pytest.raises(ConfigError, match="another run:\n  revision"):
        finetune(FinetuneConfig(**options | {"num_epochs": 1, "revision": "v2"}))
    assert loaded[-1] == "c" * 40


def test_a_checkpoint_holds_no_pickle(options):
    finetune(FinetuneConfig(**options | {"num_epochs": 1}))
    files = [path for path in Path(options["output"], "checkpoints").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors"}


class _Code:
    """Unpickled, it would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickled_checkpoint_is_loaded_and_runs_no_code(options, tmp_path):
    """The first format of checkpoints, written here from one of today."""
    config = FinetuneConfig(**options | {"num_epochs": 1})
    first = finetune(config)
    (folder,) = Path(options["output"], "checkpoints").glob("step_*")
    state = {}
    for key, value in load_file(folder / "optimizer.safetensors").items():
        number, name = key.split(".")
        state.setdefault(int(number), {})[name] = value
    torch.save({"state": state, "param_groups": []}, folder / "optimizer.bin")
    random = {"torch_manual_seed": torch.get_rng_state()}
    torch.save(random, folder / "random_states_0.pkl")
    cursor = json.loads((folder / "cursor.json").read_text())
    for name in ("cursor.json", "optimizer.safetensors", "random_0.safetensors"):
        (folder / name).unlink()
    torch.save(cursor, folder / "custom_checkpoint_0.pkl")
    again = finetune(config)
    assert again["epoch_1_loss"] == first["epoch_1_loss"]
    assert again["evaluation"] == first["evaluation"]

    torch.save(cursor | {"epoch": _Code(tmp_path / "ran")}, folder / "custom_checkpoint_0.pkl")
    with pytest.raises(ConfigError, match=r"custom_checkpoint_0\.pkl: .* could run code"):
        finetune(config)
    assert not (tmp_path / "ran").exists()


def test_a_wrong_model_is_told_before_the_data_are_read(options):
    with pytest.raises(ModelError, match="lab/nothing"):
        finetune(FinetuneConfig(**options | {"model": "lab/nothing", "train": "no-file.fasta"}))


def test_a_checkpoint_of_another_run_is_refused(options):
    finetune(FinetuneConfig(**options))
    with pytest.raises(ConfigError, match=r"learning_rate: the checkpoint has 0\.001, this run"):
        finetune(FinetuneConfig(**options | {"learning_rate": 5e-4}))
    anew = finetune(FinetuneConfig(**options | {"learning_rate": 5e-4, "resume": False}))
    assert anew["num_epochs"] == 2
    assert [line["epoch"] for line in metrics_lines(options["output"])] == [1, 2]


def test_what_a_run_began_with_may_not_change_in_its_place(options, tmp_path):
    """The same names and options, other content: base model, start and sequences."""
    base, start, train = tmp_path / "base", tmp_path / "start", tmp_path / "train.parquet"
    shutil.copytree(options["model"], base)
    shutil.copy(options["train"], train)
    options |= {"num_epochs": 1, "train": str(train), "model": str(base)}
    first = options | {"output": str(start)}
    finetune(FinetuneConfig(**first))
    second = options | {"start": str(start)}
    finetune(FinetuneConfig(**second))

    rows = pq.read_table(train)
    texts = [text and text + "ACGT" for text in rows["dna_sequence"].to_pylist()]
    place = rows.schema.get_field_index("dna_sequence")
    pq.write_table(rows.set_column(place, "dna_sequence", pa.array(texts)), train)
    with pytest.raises(ConfigError, match="the training sequences: the content changed"):
        finetune(FinetuneConfig(**second))
    pq.write_table(rows, train)
    for place in (base, start, train):  # the same content under another name
        shutil.move(place, place.with_name(f"moved-{place.name}"))
    places = {"train": train, "model": base, "start": start}
    moved = {key: str(place.with_name(f"moved-{place.name}")) for key, place in places.items()}
    assert finetune(FinetuneConfig(**second | moved))["num_epochs"] == 1
    for place in (base, start, train):
        shutil.move(place.with_name(f"moved-{place.name}"), place)

    finetune(FinetuneConfig(**first | {"resume": False, "learning_rate": 5e-4}))
    with pytest.raises(ConfigError, match="the model to start from: the content changed"):
        finetune(FinetuneConfig(**second))

    with pytest.raises(ConfigError, match="write over the model"):
        FinetuneConfig(**second | {"output": f"{start}/"})

    write_model(base, hidden=64, layers=2, heads=4, seed=9)
    with pytest.raises(ConfigError, match="the base model: the content changed"):
        finetune(FinetuneConfig(**first | {"learning_rate": 5e-4}))
    for use in (
        lambda: load_classifier(start, open_device("cpu", "float32")),
        lambda: load_encoder(device=open_device("cpu", "bfloat16"), adapter=str(start)),
    ):
        with pytest.raises(ModelError, match="was trained on a base model with other weights"):
            use()


def test_a_model_goes_on_in_another_type(options, tmp_path):
    """What a base model is does not depend on the type that it is loaded in."""
    options |= {"num_epochs": 1}
    finetune(FinetuneConfig(**options | {"dtype": "bfloat16"}))
    on = options | {"start": options["output"], "output": str(tmp_path / "on")}
    finetune(FinetuneConfig(**on | {"dtype": "float32"}))
    facts = [json.loads(Path(o["output"], "trained.json").read_text()) for o in (options, on)]
    assert facts[0]["base_hash"] == facts[1]["base_hash"]
    load_encoder(device=open_device("cpu", "float32"), adapter=options["output"])


def test_sigterm_saves_and_says_so(options):
    options |= {"num_epochs": 200}
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.finetune_run", json.dumps(options)],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    history = Path(options["output"], "metrics.jsonl")
    while not history.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert json.loads(output.splitlines()[-1])["interrupted"] == signal.SIGTERM, errors
    assert list(Path(options["output"], "checkpoints").glob("step_*"))


def test_checkpointing_changes_memory_and_not_numbers(options, tmp_path, monkeypatch):
    kept = {True: 0, False: 0}
    step = training_loop.train_step

    def count(learner, *arguments, **options):
        def pack(tensor):
            kept[learner.config.gradient_checkpointing] += tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            return step(learner, *arguments, **options)

    monkeypatch.setattr(training_loop, "train_step", count)
    for name, on in (("plain", False), ("again", True)):
        finetune(
            FinetuneConfig(
                **options | {"output": str(tmp_path / name), "gradient_checkpointing": on}
            )
        )
    assert difference(tmp_path / "plain", tmp_path / "again") < 1e-6
    assert kept[True] < 0.5 * kept[False]


@pytest.mark.slow
def test_two_processes_equal_one(options, tmp_path):
    pytest.importorskip("tensorboard")
    same = options | {"dropout": 0.0, "num_epochs": 1, "tracker": "tensorboard"}
    one, two = (same | {"output": str(tmp_path / name)} for name in ("one", "two"))
    run(one)
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29517")
    run(two, env={"USE_TORCH_XLA": "0", "ACCELERATE_USE_CPU": "true"}, launcher=launcher)
    assert difference(one["output"], two["output"]) < 2e-6
    # The tracker has the losses of the whole batch, not of one process's part.
    tracked = [tracked_scalars(each["output"]) for each in (one, two)]
    for name in ("train/loss", *(f"train/{rank}/loss" for rank in RANKS)):
        whole, parts = (scalars[name] for scalars in tracked)
        assert len(whole) == len(parts) > 0
        assert parts == pytest.approx(whole, rel=1e-4, abs=1e-6), name


@pytest.mark.slow
def test_two_nodes_equal_one_process(options, tmp_path):
    """Two launchers that find each other as on two hosts, by the rendezvous of launch/."""
    same = options | {"dropout": 0.0, "num_epochs": 1}
    one, two = (same | {"output": str(tmp_path / name)} for name in ("one", "two"))
    run(one)
    nodes = "-m torch.distributed.run --nnodes 2 --nproc_per_node 1 --rdzv_id 7 --rdzv_backend c10d"
    launcher = (*nodes.split(), "--rdzv_endpoint", "127.0.0.1:29519", "--local_addr", "127.0.0.1")
    env = {"USE_TORCH_XLA": "0", "ACCELERATE_USE_CPU": "true"}
    with ThreadPoolExecutor() as hosts:
        list(hosts.map(lambda _: run(two, env=env, launcher=launcher), range(2)))
    assert difference(one["output"], two["output"]) < 2e-6


@pytest.mark.slow
@pytest.mark.xla
@needs_xla
def test_eight_device_mesh_equals_plain_cpu(options, tmp_path):
    same = options | {"dropout": 0.0, "num_epochs": 3, "gradient_checkpointing": False}
    plain = same | {"output": str(tmp_path / "plain")}
    mesh = same | {"output": str(tmp_path / "mesh"), "device": "xla"}
    first = json.loads(run(plain).stdout.splitlines()[-1])
    env = {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "8"}
    second = json.loads(run(mesh, env=env).stdout.splitlines()[-1])
    for epoch in (1, 2, 3):
        key = f"epoch_{epoch}_loss"
        assert second[key] == pytest.approx(first[key], rel=1e-4)
    assert difference(plain["output"], mesh["output"]) < 1e-3
    # After the first pass over the widths nothing is compiled any more.
    compiles = [line["system/compiles"] for line in metrics_lines(mesh["output"])]
    assert 0 < compiles[0] <= compiles[1] == compiles[2]


def test_taxonomy_tsv_is_joined_by_id(options, tmp_path):
    fasta, tsv = tmp_path / "a.fasta", tmp_path / "taxonomy.tsv"
    letters = np.array(list("ACGT"))
    rng = np.random.default_rng(0)
    fasta.write_text("".join(f">s{n}\n{''.join(rng.choice(letters, 80))}\n" for n in range(12)))
    tsv.write_text(
        "Feature ID\tTaxon\n"
        + "".join(
            f"s{n}\tk__Animalia; p__{'Annelida' if n % 2 else 'Cnidaria'}\n" for n in range(12)
        )
    )
    config = FinetuneConfig(**options | {"train": str(fasta), "taxonomy": str(tsv)})
    assert prepare_data(config).space.names(1) == ["Annelida", "Cnidaria"]
    with pytest.raises(InputError, match="no sequence has a name"):
        prepare_data(FinetuneConfig(**options | {"train": str(fasta)}))


def test_conflicting_lineages_and_the_split_are_on_disk_before_training(options, monkeypatch):
    table = pq.read_table(options["train"])
    phylum = table["phylum"].to_pylist()
    genus = next(name for name in table["genus"].to_pylist() if name)
    first = table["genus"].to_pylist().index(genus)
    phylum[first] = "Elsewhere"
    changed = table.set_column(table.schema.get_field_index("phylum"), "phylum", [phylum])
    path = Path(options["output"]).with_name("changed.parquet")
    pq.write_table(changed, path)
    monkeypatch.setattr(training_loop.Loop, "run_epoch", lambda self, stop: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        finetune(FinetuneConfig(**options | {"train": str(path)}))
    rows = Path(options["output"], "conflicts.csv").read_text().splitlines()
    name = table["sequence_id"][first].as_py()
    assert any(row.startswith(f"genus,{genus},{name},") and "Elsewhere" in row for row in rows)
    split = Path(options["output"], "split.csv").read_text().splitlines()
    assert {row.split(",")[1] for row in split[1:]} == {"train", "eval"}


def test_novel_taxa_are_held_out(options):
    config = FinetuneConfig(**options | {"novel_rank": "genus", "novel_fraction": 0.2})
    data = prepare_data(config)
    novel = {name for name, part in data.split if part == "novel"}
    assert novel == set(data.novel.ids)
    assert novel
    assert not novel & {*data.train.ids, *data.eval.ids}
    assert len(RANKS) == data.train_labels.shape[1]
    given = FinetuneConfig(**dataclasses.asdict(config) | {"eval": config.train})
    assert prepare_data(given).novel.ids == data.novel.ids, "with evaluation data of its own, too"


@pytest.mark.parametrize("given", [False, True])
def test_the_model_folder_keeps_vectors_of_what_was_held_out(options, tmp_path, given):
    """With given classes a genus may be a class and yet have no training sequence."""
    config = FinetuneConfig(**options | {"novel_rank": "genus", "novel_fraction": 0.3})
    if given:
        rows = pq.read_table(options["train"]).to_pylist()
        space, _ = learn_labels([[known_name(row[rank]) for rank in RANKS] for row in rows])
        space.save(tmp_path / "all.json")
        config = dataclasses.replace(config, labels=str(tmp_path / "all.json"))
    finetune(config)
    data = prepare_data(config)
    held = read_heldout(Path(options["output"]))
    assert len(data.novel)
    evaluated, novel = (held.places(part.sequences) for part in (data.eval, data.novel))
    assert (evaluated >= 0).all()
    assert (novel >= 0).all()
    genus = RANKS.index("genus")
    assert (held.classes[evaluated, genus] > NEW_TO_THE_MODEL).all()
    assert (held.classes[novel, genus] <= NEW_TO_THE_MODEL).all()
    assert given == (data.space.encode(data.novel.lineages)[:, genus] >= 0).all()
    names = [lineage[: genus + 1] for lineage in data.novel.lineages]
    numbers = held.classes[novel, genus].tolist()
    assert len(set(names)) == len(set(numbers)) == len(set(zip(names, numbers, strict=True)))
