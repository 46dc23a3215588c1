"""The loop: what it updates, skips, evaluates and tells the trackers."""

import dataclasses
import itertools
import json
import logging
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from bioscan_xla.errors import ConfigError
from bioscan_xla.options import FinetuneConfig
from bioscan_xla.training import loop as training_loop
from bioscan_xla.training import step
from bioscan_xla.training.run import finetune

from .conftest import metrics_lines


def test_gradients_reach_only_adapter_and_heads(options, monkeypatch):
    seen = {}
    update = step._update_where

    def spy(good, learner):
        for name, parameter in learner.model.named_parameters():
            seen.setdefault(name, parameter.grad is not None)
        return update(good, learner)

    monkeypatch.setattr(step, "_update_where", spy)
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
        "bioscan_xla.training.evaluation.evaluate", lambda *_: {"hierarchical_distance": 1.0}
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
    clip = torch.nn.utils.clip_grad_norm_
    bad, updates = {2}, itertools.count()

    def spoil(trained, most):
        if next(updates) in bad:
            trained[0].grad.fill_(float("nan"))
        return clip(trained, most)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spoil)
    result = finetune(FinetuneConfig(**options))
    assert result["skipped_updates"] == 1
    assert np.isfinite(result["total_loss"])
    bad.update(range(100))
    with pytest.raises(training_loop.TrainingStopped, match="3 times in a row"):
        finetune(FinetuneConfig(**options | {"output": options["output"] + "2"}))
    assert caplog.text.count("not finite") >= 4


def test_a_group_with_one_loss_that_is_not_finite_is_left_out(options, monkeypatch):
    loss, batches = step.rank_loss, itertools.count()

    def spoil(*arguments, **named):
        found = loss(*arguments, **named)
        bad = next(batches) == 4 or is_broken
        return dataclasses.replace(found, total=found.total * float("nan")) if bad else found

    monkeypatch.setattr(step, "rank_loss", spoil)
    is_broken = False
    result = finetune(FinetuneConfig(**options | {"accumulate": 2, "num_epochs": 1}))
    assert result["skipped_updates"] == 1
    assert np.isfinite(result["total_loss"])
    is_broken = True
    again = {"accumulate": 2, "output": options["output"] + "2", "num_epochs": 1}
    with pytest.raises(training_loop.TrainingStopped, match="3 times in a row"):
        finetune(FinetuneConfig(**options | again))


def test_the_last_group_of_an_epoch_is_averaged_over_its_own_batches(options, monkeypatch):
    groups, shares = [], []

    def spy(learner, made, *, share, is_update):
        shares.append(share)
        if is_update:
            groups.append(shares.copy())
            shares.clear()
        return train_step(learner, made, share=share, is_update=is_update)

    train_step = training_loop.train_step
    monkeypatch.setattr(training_loop, "train_step", spy)
    finetune(FinetuneConfig(**options | {"accumulate": 4, "num_epochs": 1}))
    assert len(groups[0]) == 4
    assert 0 < len(groups[-1]) < 4
    assert [sum(group) for group in groups] == pytest.approx([1] * len(groups))


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


def test_figures_of_many_steps_are_fetched_at_once(monkeypatch):
    """Each fetch waits for the device, and there is one for all steps since the last log line."""
    fetched = []
    monkeypatch.setattr(
        training_loop.runtime, "fetch", lambda each: fetched.append(each) or each.numpy()
    )
    loop = SimpleNamespace(
        device=SimpleNamespace(kind="cuda"), accelerator=SimpleNamespace(num_processes=1)
    )
    values = training_loop.Loop._fetch(loop, [torch.full((9,), float(step)) for step in range(20)])
    assert values.shape == (20, 9)
    assert values[:, 0].tolist() == list(range(20))
    assert len(fetched) == 1
