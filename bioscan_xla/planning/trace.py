"""Trace one program of a run without computing it; `plan` runs it in a process of its own.

Input: a JSON file that says which (see `main`). Output: a serialized HloModuleProto.
Invariants: it is the program that the run computes; weights are never loaded, since their values
do not affect it.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers import EsmConfig, EsmModel

from ..encode import attention, runtime
from ..encode.encoder import Encoder
from ..encode.packing import FIRST_POSITION, Batch, Window, fill_rows


def trace_embedding(
    config: EsmConfig, device: runtime.Device, batch: Batch, pooling: str
) -> list[torch.Tensor]:
    """Results of embedding one batch."""
    model = _on_device(_empty_model(config, device).eval().requires_grad_(False), device)
    max_tokens = config.max_position_embeddings - FIRST_POSITION
    return [Encoder(model, device, pooling, max_tokens, 0, {}).trace(batch)]


def trace_training(
    config: EsmConfig, device: runtime.Device, batch: Batch, options: dict, num_classes: list[int]
) -> list[torch.Tensor]:
    """Results of one training step: its figures, the trained parameters, the optimizer's state."""
    from ..training.batches import TrainingBatch
    from ..training.step import Learner, device_state, make_optimizer, train_step

    finetuning, model = _classifier(config, device, options, num_classes)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    learner = Learner(finetuning, device, model, make_optimizer(model, finetuning), trained)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    learner.optimizer.step()  # makes its state, which is an argument of every later step
    learner.optimizer.zero_grad()
    runtime.launch(device, torch.zeros(1, device=device.torch_device))
    frames = finetuning.frames_trained
    labelled = np.zeros((len(batch.input_ids) * batch.num_segments // frames, 7), np.int64)
    known = np.full(7, len(labelled))
    figures = train_step(learner, TrainingBatch(batch, labelled, known, len(labelled), frames))
    return [figures, *trained, *device_state(learner.optimizer)]


def trace_evaluation(
    config: EsmConfig, device: runtime.Device, batch: Batch, options: dict, num_classes: list[int]
) -> list[torch.Tensor]:
    """Results of reading one batch in an evaluation: the vectors that the heads see."""
    from ..training.evaluation import ClassifierVectors

    _, model = _classifier(config, device, options, num_classes)
    max_tokens = config.max_position_embeddings - FIRST_POSITION
    return [ClassifierVectors(model.eval(), device, max_tokens).trace(batch)]


def _classifier(
    config: EsmConfig, device: runtime.Device, options: dict, num_classes: list[int]
) -> tuple[Any, Any]:
    """The options of the run and its classifier, empty, on the device."""
    from ..options import FinetuneConfig
    from ..training.classifier import build_classifier

    finetuning = FinetuneConfig(**options)
    labels: Any = SimpleNamespace(num_classes=num_classes)  # all that a classifier asks of it
    with torch.device("meta"):
        classifier = build_classifier(_empty_model(config, device), device, labels, finetuning)
    return finetuning, _on_device(classifier, device)


def _empty_model(config: EsmConfig, device: runtime.Device) -> Any:
    with torch.device("meta"):
        model: Any = EsmModel(config, add_pooling_layer=False)
    model.set_attn_implementation(attention.NAME)
    return model.to(device.dtype)


def _on_device(module: Any, device: runtime.Device) -> Any:
    # Empty on the host first: what is made on XLA would be part of the program.
    return module.to_empty(device="cpu").to(device.torch_device)


def main() -> None:
    """Trace and write.

    The JSON has `job`, `model` (a folder with config.json), `out`, `dtype`, `shape` (rows, tokens,
    segments), and `pooling`, or `options` and `num_classes`.
    """
    said = json.loads(Path(sys.argv[1]).read_text())
    config = EsmConfig.from_pretrained(said["model"])
    device = runtime.open_device("xla", said["dtype"])
    rows, width, segments = said["shape"]
    longest = config.max_position_embeddings - FIRST_POSITION
    window = Window((0, 0), np.zeros(min(width, longest) - 1, np.int32))
    batch = fill_rows([[window]] * rows, rows, width, segments, with_runs=False)
    if said["job"] == "embed":
        results = trace_embedding(config, device, batch, said["pooling"])
    else:
        trace = trace_training if said["job"] == "finetune" else trace_evaluation
        results = trace(config, device, batch, said["options"], said["num_classes"])
    Path(said["out"]).write_bytes(runtime.traced_program(results))


if __name__ == "__main__":
    main()
