"""oneDNN on a CPU: linear layers with reordered weights for inference, float32 for training.

Input: an EsmModel. Output: the same model, its linear layers replaced by modules that hold the
weight once, in the block order that oneDNN multiplies fastest. Invariants: same results within
rounding; without oneDNN the layers stay as they are.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

EXPECTED_TOKENS = 1024
"""Rows of activations for which the weight's block order is chosen."""


class ReorderedLinear(nn.Module):
    """A linear layer, optionally with GELU fused in, over oneDNN.

    Shapes: (..., in) to (..., out).
    """

    def __init__(self, linear: nn.Linear, activation: str = "none"):
        """Take over a layer's weight; `activation` is `none` or `gelu` (the exact, erf form)."""
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(
            linear.weight.detach().contiguous(), EXPECTED_TOKENS
        )
        self.bias = None if linear.bias is None else linear.bias.detach()
        self.activation = activation
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply, add the bias, activate."""
        return torch.ops.mkldnn._linear_pointwise(
            x,
            self.weight,
            self.bias,
            self.activation,
            [],
            "none" if self.activation == "gelu" else "",
        )


class _ReorderedWithResidual(nn.Module):
    """EsmSelfOutput and EsmOutput without dropout: linear plus residual in one product."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.dense = ReorderedLinear(linear)

    def forward(self, hidden_states: torch.Tensor, input_tensor: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise.binary(
            hidden_states, input_tensor, self.dense.weight, self.dense.bias, "add"
        )


def reorder_linear_layers(model: Any) -> bool:
    """Replace the linear layers of an EsmModel's encoder in place.

    Returns:
        Whether it was done: False if torch was built without oneDNN, or if the model is in bfloat16
        and the processor is too old for oneDNN's products of it.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    if model.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    for layer in model.encoder.layer:
        attention = layer.attention.self
        for name in ("query", "key", "value"):
            setattr(attention, name, ReorderedLinear(getattr(attention, name)))
        layer.attention.output = _ReorderedWithResidual(layer.attention.output.dense)
        layer.intermediate = ReorderedLinear(layer.intermediate.dense, "gelu")
        layer.output = _ReorderedWithResidual(layer.output.dense)
    return True


@contextmanager
def fast_float32(kind: str) -> Iterator[None]:
    """On a CPU, have oneDNN in place of MKL multiply float32: twice as fast on AMD processors.

    The setting is named bf16, because oneDNN may round to it; it does so only on processors with
    AMX. Where a product shows that, nothing is changed.
    """
    backend: Any = torch.backends.mkldnn
    matmul = backend.matmul
    if kind != "cpu" or not torch.backends.mkldnn.is_available():
        yield
        return
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "bf16"
        if not _is_precise():
            matmul.fp32_precision = before
        yield
    finally:
        matmul.fp32_precision = before


def _is_precise() -> bool:
    """Whether products of float32 are float32, as tried on one."""
    a = torch.linspace(0.5, 1, 512 * 512).view(512, 512)
    exact = a.double() @ a.double()
    return bool(((a @ a) / exact - 1).abs().max() < 1e-5)
