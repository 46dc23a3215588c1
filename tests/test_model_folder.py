"""The folder that fine-tuning leaves: what is in it, who reads it, and that it is whole or told."""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import bioscan_xla
from bioscan_xla.embed import run_embedding_pipeline
from bioscan_xla.errors import ModelError, SyncError
from bioscan_xla.finetune import run_finetuning_pipeline
from bioscan_xla.options import FinetuneConfig
from bioscan_xla.reads.tokens import load_tokenizer
from bioscan_xla.training import folder as folder_module
from bioscan_xla.training import loop as training_loop
from bioscan_xla.training.run import finetune
from bioscan_xla.training.setup import prepare_data

from .conftest import run_python, trained


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


def test_whoever_may_read_the_folder_may_read_its_weights(options):
    """Safetensors writes files that only their owner may read."""
    folder = Path(finetune(FinetuneConfig(**options | {"save_merged": True}))["model_path"])
    weights = sorted(folder.rglob("*.safetensors"))
    assert {path.parent.name for path in weights} >= {folder.name, "adapter", "merged", "best"}
    for path in weights:
        assert path.stat().st_mode & 0o777 == folder.stat().st_mode & 0o666, path


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
    assert Path(options["output"], "merged/model.safetensors").is_file()


def test_a_model_trained_anew_leaves_nothing_of_the_one_before(options):
    finetune(FinetuneConfig(**options | {"save_merged": True}))
    folder = Path(options["output"])
    assert (folder / "confusions.csv").is_file()
    finetune(FinetuneConfig(**options | {"eval_fraction": 0.0, "resume": False}))
    left = {path.name for path in folder.iterdir()}
    named = {"merged", "confusions.csv", "confusion.png", "vectors.png", "heldout.safetensors"}
    assert not left & named


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


class Killed(BaseException):
    """As a kill: nothing behind it runs."""


def test_a_kill_while_the_folder_is_written_leaves_no_mixture(options, monkeypatch):
    """Killed before each file is moved: the folder is refused, or it is whole and new."""
    finetune(FinetuneConfig(**options | {"num_epochs": 1}))
    output, replace = Path(options["output"]), os.replace
    before = trained(output)
    refused = 0
    more = FinetuneConfig(**options)
    for moves in range(20):
        left = iter(range(moves))

        def move(part, place, left=left):
            if Path(place).parent == output and next(left, None) is None:
                raise Killed
            replace(part, place)

        monkeypatch.setattr(folder_module.os, "replace", move)
        try:
            finetune(dataclasses.replace(more, resume=moves > 0))
            break
        except Killed:
            with pytest.raises(ModelError, match=r"has no .*run its command again"):
                bioscan_xla.load_classifier(output, "cpu", "float32")
            refused += 1
    assert refused > 8
    assert bioscan_xla.load_classifier(output, "cpu", "float32").labels
    assert not (output / ".new").exists()
    after = trained(output)
    assert any(not torch.equal(before[name], after[name]) for name in before)
