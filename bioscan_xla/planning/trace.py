"""Trace one program of a run without computing it; `plan` runs it in a process of its own.

Argument: a JSON file that says which (see `main`). Leaves: a serialized HloModuleProto. Weights are
never loaded: their values do not change the program.
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
    from ..options import FinetuneConfig
    from ..training.classifier import TaxonomyClassifier
    from ..training.loop import Loop
    from ..training.lora import attach_adapter
    from ..training.run import parameter_groups

    finetuning = FinetuneConfig(**options)
    base = _empty_model(config, device)
    if finetuning.gradient_checkpointing:
        runtime.enable_gradient_checkpointing(device, base)
    with torch.device("meta"):
        adapted = attach_adapter(
            base,
            rank=finetuning.rank,
            alpha=finetuning.alpha,
            dropout=finetuning.dropout,
            targets=tuple(finetuning.targets),
        )
        labels: Any = SimpleNamespace(num_classes=num_classes)
        classifier = TaxonomyClassifier(
            adapted, config.hidden_size, labels, dropout=finetuning.dropout
        )
    model = _on_device(classifier.train(), device)
    loop: Any = Loop.__new__(Loop)  # its methods that are the program, and no more
    loop.config, loop.device, loop.model = finetuning, device, model
    loop.accelerator = SimpleNamespace(num_processes=1, backward=lambda loss: loss.backward())
    loop.trained = [p for p in model.parameters() if p.requires_grad]
    loop.optimizer = torch.optim.AdamW(parameter_groups(model, finetuning))
    loop.scheduler = SimpleNamespace(step=lambda: None)
    loop.log_priors = loop.parents = None
    for parameter in loop.trained:
        parameter.grad = torch.zeros_like(parameter)
    loop.optimizer.step()  # makes its state, which is an argument of every later step
    loop.optimizer.zero_grad()
    runtime.launch(device, torch.zeros(1, device=device.torch_device))
    labels = np.zeros((len(batch.input_ids) * batch.num_segments, 7), np.int64)
    arrays = (batch.input_ids, batch.positions, batch.segments, labels)
    known = torch.full((7,), len(labels)).to(device.torch_device)
    loop._backward(*(runtime.put(device, array) for array in arrays), known, batch)
    norm = loop._update()
    state = [
        value
        for values in loop.optimizer.state.values()
        for value in values.values()
        if torch.is_tensor(value) and value.device.type == "xla"
    ]
    return [loop._figures(norm), *loop.trained, *state]


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
        results = trace_training(config, device, batch, said["options"], said["num_classes"])
    Path(said["out"]).write_bytes(runtime.traced_program(results))


if __name__ == "__main__":
    main()
