"""int8 linear layers over oneDNN, for inference on a CPU.

Input: an Encoder in float32. Output: the same, its linear layers multiplying int8; the cosine of
its vectors to those before. Invariants: the scales follow from the weights alone, so that the same
model gives the same vectors on every run, and a vector does not depend on what else is in its
batch. What is not a linear layer stays in float32, attention in the processor's fastest type.

Reference: per-channel smoothing after Xiao et al. (2022), https://arxiv.org/abs/2211.10438
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..errors import ConfigError
from .choice import cpu_has_bfloat16
from .onednn import EXPECTED_TOKENS

LEAST_COSINE = 0.998
"""Models whose vectors would turn further from float32 are refused."""

# Of the sequences that set the scales. In short ones attention averages over little, so that its
# results are largest.
_LENGTHS_BP = (*[6] * 60, 7, 8, 12, 20, 30, 60, 120, 170, 300, 658, 1_500, 2_400)


def random_sequences() -> list[str]:
    """The sequences that set the scales of activations; always the same, longest first."""
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("ACGT"), length)) for length in _LENGTHS_BP]
    return ["ACGTN" * 20, *reversed(texts)]


@cache
def _largest_weight() -> int:
    """127; 63 where the processor adds pairs of products in 16 bits, which 2 * 255 * 127 exceeds.

    Those without VNNI or AMX instructions do. oneDNN leaves it to its users to keep clear of that.
    """
    linear = nn.Linear(64, 32, bias=False)
    linear.weight.data.fill_(1.0)
    layer = _Int8Linear(linear, (1.0, 0), torch.float32, largest=127)
    right = layer(torch.full((32, 64), 255, dtype=torch.uint8)).min() > 0.99 * 255 * 64
    return 127 if right else 63


@dataclass(frozen=True)
class _Range:
    """Least and largest value of each channel of a layer's input, (channels,), 0 included."""

    low: torch.Tensor
    high: torch.Tensor

    def scale(self) -> tuple[float, int]:
        """Step and zero point of uint8 for all channels."""
        low, high = float(self.low.min()), float(self.high.max())
        step = max(high - low, 1e-8) / 255
        return step, round(-low / step)


class _Int8Linear(nn.Module):
    """(..., in) uint8 to (..., out): multiply, add the bias, activate, and return in `dtype`."""

    def __init__(
        self,
        linear: nn.Linear,
        scale: tuple[float, int],
        dtype: torch.dtype,
        activation: str = "none",
        out_scale: tuple[float, int] = (1.0, 0),
        largest: int | None = None,
    ):
        super().__init__()
        weight = linear.weight.detach()
        steps = weight.abs().amax(1).clamp(min=1e-12) / (largest or _largest_weight())
        whole = (weight / steps[:, None]).round().to(torch.int8)
        shape = [EXPECTED_TOKENS, weight.shape[1]]
        self.weight = torch.ops.onednn.qlinear_prepack(whole, shape)
        self.steps, self.zeros = steps, torch.zeros(len(steps), dtype=torch.int64)
        self.bias = None if linear.bias is None else linear.bias.detach().float()
        self.scale, self.dtype, self.activation = scale, dtype, activation
        self.out_scale = out_scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.onednn.qlinear_pointwise(
            x,
            *self.scale,
            self.weight,
            self.steps,
            self.zeros,
            self.bias,
            *self.out_scale,
            self.dtype,
            self.activation,
            [],
            # Nearer to the exact form than a step of uint8, at a quarter of its cost in oneDNN.
            "tanh" if self.activation == "gelu" else "",
        )


class _Int8Residual(nn.Module):
    """EsmSelfOutput and EsmOutput: (..., in) to the residual (..., out) float32, added in place."""

    def __init__(self, linear: nn.Linear, scale: tuple[float, int]):
        super().__init__()
        self.dense = _Int8Linear(linear, scale, torch.float32)

    def forward(self, hidden_states: torch.Tensor, input_tensor: torch.Tensor) -> torch.Tensor:
        dense = self.dense
        if hidden_states.dtype != torch.uint8:
            hidden_states = _quantize(hidden_states, dense.scale)
        one = (1.0, 0)
        return torch.ops.onednn.qlinear_pointwise.binary(
            *(hidden_states, *dense.scale, dense.weight, dense.steps, dense.zeros),
            *(input_tensor, dense.bias, *one, torch.float32, *one),
            *("sum", 1.0, "none", [], ""),
        )


class _QuantizingLayerNorm(nn.Module):
    """(..., hidden) float32 to (..., hidden) uint8."""

    def __init__(self, norm: nn.LayerNorm, scale: tuple[float, int]):
        super().__init__()
        self.norm, self.scale = norm, scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _quantize(self.norm(x), self.scale)


def _quantize(x: torch.Tensor, scale: tuple[float, int]) -> torch.Tensor:
    return torch.quantize_per_tensor(x.float(), *scale, torch.quint8).int_repr()


def quantize(
    model: Any, embed: Callable[[Sequence[str]], torch.Tensor], sample: Sequence[str]
) -> float:
    """Replace the linear layers of an EsmModel's encoder in place.

    Args:
        model: float32, on the CPU.
        embed: gives the vectors of sequences by the model as it is, (sequences, hidden).
        sample: sequences whose vectors are compared before and after.

    Returns:
        The least cosine of the vectors of the sample to those in float32.

    Raises:
        ConfigError: there are no linear layers, torch lacks oneDNN, or the cosine is too low.
    """
    if not torch.backends.mkldnn.is_available():
        raise ConfigError("dtype int8 needs a torch with oneDNN; use float32 or bfloat16")
    if not len(model.encoder.layer):
        raise ConfigError(
            "dtype int8 has no effect on a model without layers; use float32 or bfloat16"
        )
    before = embed(sample)
    ranges = _measure(model, lambda: embed(random_sequences()))
    for layer in model.encoder.layer:
        _quantize_layer(layer, ranges)
    cosine = float(F.cosine_similarity(before, embed(sample)).min())
    if not cosine >= LEAST_COSINE:
        instead = "bfloat16" if cpu_has_bfloat16() else "float32"
        raise ConfigError(
            f"in int8 the vectors of this model have a cosine of only {cosine:.4f} to those in "
            f"float32 ({LEAST_COSINE} is needed); use --dtype {instead}"
        )
    return cosine


def _measure(model: Any, run: Callable[[], object]) -> dict[nn.Module, _Range]:
    """Ranges of the inputs of all linear layers while `run` computes."""
    ranges: dict[nn.Module, _Range] = {}

    def note(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        low, high = inputs[0].flatten(0, -2).aminmax(dim=0)
        known = ranges.get(module, _Range(torch.zeros_like(low), torch.zeros_like(high)))
        ranges[module] = _Range(low.minimum(known.low), high.maximum(known.high))

    hooks = [
        module.register_forward_pre_hook(note)
        for module in model.encoder.layer.modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return ranges


def _quantize_layer(layer: Any, ranges: dict[nn.Module, _Range]) -> None:
    attention, inner = layer.attention.self, torch.bfloat16
    if not cpu_has_bfloat16():
        inner = torch.float32
    names = ("query", "key", "value")
    inputs = [getattr(attention, name) for name in names]
    scale = _smooth(layer.attention.LayerNorm, inputs, ranges[inputs[0]])
    layer.attention.LayerNorm = _QuantizingLayerNorm(layer.attention.LayerNorm, scale)
    for name, linear in zip(names, inputs, strict=True):
        setattr(attention, name, _Int8Linear(linear, scale, inner))
    output = layer.attention.output.dense
    layer.attention.output = _Int8Residual(output, ranges[output].scale())
    up, down = layer.intermediate.dense, layer.output.dense
    scale, between = _smooth(layer.LayerNorm, [up], ranges[up]), ranges[down].scale()
    layer.LayerNorm = _QuantizingLayerNorm(layer.LayerNorm, scale)
    layer.intermediate = _Int8Linear(up, scale, torch.uint8, "gelu", between)
    layer.output = _Int8Residual(down, between)


def _smooth(norm: nn.LayerNorm, linears: list[nn.Linear], seen: _Range) -> tuple[float, int]:
    """Move large channels of a norm's output into the weights behind it; the new scale."""
    weights = torch.cat([linear.weight for linear in linears]).abs().amax(0)
    largest = seen.high.maximum(-seen.low)
    factor = (largest.clamp(min=1e-5) / weights.clamp(min=1e-5)).sqrt()
    norm.weight.data /= factor
    norm.bias.data /= factor
    for linear in linears:
        linear.weight.data *= factor
    return _Range(seen.low / factor, seen.high / factor).scale()
