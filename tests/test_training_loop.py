"""The loop: what it updates, skips, evaluates and tells the trackers."""

import json
import logging
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from bioscan_xla.errors import ConfigError
from bioscan_xla.options import FinetuneConfig
from bioscan_xla.training import loop as training_loop
from bioscan_xla.training.run import finetune

from .conftest import metrics_lines


def test_gradients_reach_only_adapter_and_heads(options, monkeypatch):
    seen = {}
    update = training_loop.Loop._update

    def spy(self):
        for name, parameter in self.model.named_parameters():
            seen.setdefault(name, parameter.grad is not None)
        return update(self)

    monkeypatch.setattr(training_loop.Loop, "_update", spy)
    finetune(FinetuneConfig(**options | {"num_epochs": 1}))
    with_gradient = {name for name, has in seen.items() if has}
    assert with_gradient == {n for n in seen if "lora_" in n or n.startswith("heads.")}
    assert len(with_gradient) == 8 + 28


def test_evaluation_between_epochs_and_early_stopping(options, tmp_path, monkeypatch):
    more = {"eval_steps": 2, "monitor": "hierarchical_distance", "num_epochs": 3}
    result = finetune(FinetuneConfig(**options | more))
    lines = metrics_lines(options["output"])
    assert [line["updates"] % 2 for line in lines if line["epoch"] % 1] == [0] * (len(lines) - 3)
    assert len(lines) > 3
    best = min(line["valid/hierarchical_distance"] for line in lines)
    assert result["evaluation"]["hierarchical_distance"] == best
    with pytest.raises(ConfigError, match="species/accuracy"):
        FinetuneConfig(monitor="accuracy/species")

    # Two evaluations that are no better than the first, and it ends.
    monkeypatch.setattr(
        "bioscan_xla.training.run.evaluate", lambda *_: {"hierarchical_distance": 1.0}
    )
    stopped = more | {"patience": 2, "output": str(tmp_path / "stopped")}
    result = finetune(FinetuneConfig(**options | stopped))
    assert result["num_epochs"] == 1
    assert [line["updates"] for line in metrics_lines(stopped["output"])] == [2, 4, 6]


def test_an_evaluation_part_of_one_sequence(options, tmp_path):
    # One vector spans no plane, so there is no picture of it; all else is as ever.
    one = tmp_path / "one.parquet"
    pq.write_table(pq.read_table(options["train"]).slice(0, 1), one)
    result = finetune(FinetuneConfig(**options | {"eval": str(one), "num_epochs": 1}))
    assert result["evaluation"]["kingdom/accuracy"] in (0, 1)
    folder = Path(options["output"])
    assert (folder / "confusion.png").is_file()
    assert not (folder / "vectors.png").exists()


def test_tensorboard_gets_figures_and_pictures(options):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    finetune(FinetuneConfig(**options | {"tracker": "tensorboard", "num_epochs": 1}))
    (path,) = [
        path
        for path in Path(options["output"]).rglob("events.out.*")
        if EventAccumulator(str(path)).Reload().Tags()["scalars"]
    ]
    tags = EventAccumulator(str(path)).Reload().Tags()
    assert {"train/loss", "train/species/loss", "train/tokens_per_second"} <= {*tags["scalars"]}
    assert {"system/model_flop_utilisation", "system/memory_gib"} <= {*tags["scalars"]}
    assert {"valid/mean_accuracy", "final/mean_accuracy"} <= {*tags["scalars"]}
    assert {"final/confusion", "final/vectors"} <= {*tags["images"]}


def test_accumulation_makes_fewer_updates(options):
    counts = {}
    for accumulate in (1, 3):
        folder = f"{options['output']}-{accumulate}"
        finetune(FinetuneConfig(**options | {"accumulate": accumulate, "output": folder}))
        lines = Path(folder, "metrics.jsonl").read_text().splitlines()
        counts[accumulate] = [json.loads(line)["updates"] for line in lines]
    batches = counts[1][0]
    assert counts[1] == [batches, 2 * batches]
    assert counts[3] == [-(-batches // 3), 2 * -(-batches // 3)]


def test_gradient_that_is_not_finite_is_left_out_then_stops(options, monkeypatch, caplog):
    backward = training_loop.Loop._backward
    bad = {2}

    def spoil(self, *arguments):
        backward(self, *arguments)
        if self.cursor.updates in bad:
            self.trained[0].grad.fill_(float("nan"))

    monkeypatch.setattr(training_loop.Loop, "_backward", spoil)
    result = finetune(FinetuneConfig(**options))
    assert result["skipped_updates"] == 1
    assert np.isfinite(result["total_loss"])
    bad.update(range(100))
    with pytest.raises(training_loop.TrainingStopped, match="3 times in a row"):
        finetune(FinetuneConfig(**options | {"output": options["output"] + "2"}))
    assert caplog.text.count("not finite") >= 4


def test_offline_tracker_runs_and_a_broken_one_does_not_stop(
    options, tmp_path, offline_wandb, monkeypatch, caplog
):
    assert finetune(FinetuneConfig(**options | {"tracker": "wandb", "num_epochs": 1}))
    assert list(offline_wandb.rglob("*.wandb"))
    monkeypatch.setattr("wandb.init", lambda **_: 1 / 0)
    with caplog.at_level(logging.WARNING):
        finetune(
            FinetuneConfig(
                **options | {"tracker": "wandb", "num_epochs": 1, "output": str(tmp_path / "b")}
            )
        )
    assert "tracker failed" in caplog.text
