"""Training: what it changes, that it resumes exactly, and that every way of running agrees."""

import importlib.util
import json
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file

import bioscan_xla
from bioscan_xla.embed import run_embedding_pipeline
from bioscan_xla.errors import ConfigError, InputError, ModelError, SyncError
from bioscan_xla.finetune import run_finetuning_pipeline
from bioscan_xla.options import FinetuneConfig
from bioscan_xla.reads.lineages import RANKS
from bioscan_xla.reads.tokens import load_tokenizer
from bioscan_xla.training import loop as training_loop
from bioscan_xla.training import setup
from bioscan_xla.training.run import finetune
from bioscan_xla.training.setup import prepare_data

from .conftest import ROOT, metrics_lines, run_python, tracked_scalars

needs_xla = pytest.mark.skipif(
    importlib.util.find_spec("torch_xla") is None, reason="torch_xla is not installed"
)


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


def run(options, env=None, check=True, launcher=()):
    """Fine-tune in a process of its own."""
    words = [*launcher, "-m", "tests.finetune_run", json.dumps(options)]
    return run_python(*words, env=env, check=check, cwd=ROOT)


def test_what_is_left_behind(options, tmp_path):
    data_path, folder = options.pop("train"), options.pop("output")
    result = run_finetuning_pipeline(data_path, folder, use_wandb=False, **options)
    for key in ("start_time", "end_time", "total_loss", "epoch_1_loss", "epoch_2_loss"):
        assert result[key]
    assert result["num_epochs"] == 2
    assert result["epoch_2_loss"] < result["epoch_1_loss"]
    assert set(result["evaluation"]) >= {"kingdom/accuracy", "mean_accuracy", "inconsistent"}
    folder = Path(result["model_path"])
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        "adapter",
        "heads.safetensors",
        "labels.json",
        "config.yaml",
        "metrics.json",
        "metrics.jsonl",
        "README.md",
        "curves.png",
        "confusion.png",
        "confusions.csv",
        "vectors.png",
        "split.csv",
    }
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    assert "kingdom" in (folder / "README.md").read_text()
    assert FinetuneConfig(**yaml.safe_load((folder / "config.yaml").read_text())).rank == 16
    assert all(np.isfinite(v).all() for v in map(torch.Tensor.numpy, trained(folder).values()))

    # A fresh process needs nothing but PEFT and safetensors.
    code = (
        "import sys; from peft import PeftModel; from safetensors.torch import load_file;"
        "from transformers import EsmModel;"
        "base = EsmModel.from_pretrained(sys.argv[2], add_pooling_layer=False);"
        "model = PeftModel.from_pretrained(base, sys.argv[1] + '/adapter');"
        "print(len(load_file(sys.argv[1] + '/heads.safetensors')),"
        " sum('lora' in n for n, _ in model.named_parameters()), 'bioscan_xla' in sys.modules)"
    )
    result = run_python("-c", code, folder, options["model"])
    assert result.stdout.split() == ["28", "8", "False"]  # 7 heads x 4; 2 layers x q, v x A, B

    # Embedding takes the folder, and the table knows which adapter it was.
    made = run_embedding_pipeline(
        data_path,
        str(tmp_path / "db"),
        model=options["model"],
        adapter=str(folder),
        device="cpu",
        dtype="float32",
    )
    assert made["fingerprint"]["adapter_hash"]


def test_loaded_classifier_on_hugging_face_input_equals_training(options):
    finetune(FinetuneConfig(**options))
    classifier = bioscan_xla.load_classifier(options["output"], "cpu", "float32")
    data = prepare_data(FinetuneConfig(**options))
    sequences = [text for text in data.eval.sequences if len(text) < 3000][:5]
    inputs = load_tokenizer()(sequences, padding=True, return_tensors="pt")
    with torch.inference_mode():
        logits = classifier(inputs["input_ids"], attention_mask=inputs["attention_mask"])
    assert [len(values) for values in logits] == [5] * 7
    from bioscan_xla.encode.runtime import open_device
    from bioscan_xla.training.evaluation import predict

    wanted, _ = predict(classifier, open_device("cpu", "float32"), sequences, 1000)
    for values, probabilities in zip(logits, wanted, strict=True):
        got = torch.softmax(values, -1).numpy()[:, : probabilities.shape[1]]
        np.testing.assert_allclose(got, probabilities, atol=1e-5)


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


def test_outputs_are_added_to_a_finished_run_and_an_upload_that_fails_keeps_it(
    options, monkeypatch
):
    finetune(FinetuneConfig(**options))
    before = trained(options["output"])
    monkeypatch.setattr(training_loop, "train_step", lambda *_, **__: 1 / 0)
    more = options | {"save_merged": True, "push_to_hub": "lab/model"}
    with pytest.raises(
        SyncError, match=r"finished and complete in .*'lab/model'.*same command again"
    ):
        finetune(FinetuneConfig(**more))  # the tests are offline
    assert Path(options["output"], "merged/model.safetensors").is_file()
    after = trained(options["output"])
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert finetune(FinetuneConfig(**options))["num_epochs"] == 2  # and without them again


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
    assert novel
    assert not novel & {*data.train.ids, *data.eval.ids}
    assert len(RANKS) == data.train_labels.shape[1]


def test_merged_weights_and_upload(options, monkeypatch):
    uploads = []
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda *a, **k: None)
    monkeypatch.setattr(
        "huggingface_hub.HfApi.upload_folder", lambda self, **options: uploads.append(options)
    )
    finetune(FinetuneConfig(**options | {"save_merged": True, "push_to_hub": "lab/model"}))
    (upload,) = uploads
    assert (upload["repo_id"], upload["folder_path"]) == ("lab/model", options["output"])
    assert "checkpoints/**" in upload["ignore_patterns"]

    from bioscan_xla.encode.encoder import load_encoder
    from bioscan_xla.encode.inference import embed_sequences
    from bioscan_xla.encode.runtime import open_device

    device = open_device("cpu", "float32")
    merged = load_encoder(f"{options['output']}/merged", device=device)
    adapted = load_encoder(options["model"], device=device, adapter=options["output"])
    texts = ["ACGTTGCATG" * 9, "GGATCCATTA" * 20]
    np.testing.assert_allclose(
        embed_sequences(merged, texts), embed_sequences(adapted, texts), atol=1e-5
    )
