"""Pooling against arithmetic by hand."""

import numpy as np
import pytest
import torch

from bioscan_xla.encode.pooling import POOLINGS, pool

# Two rows of six tokens; row 0 holds segments of 3 and 2 tokens and a filler, row 1 one of 4.
SEGMENTS = torch.tensor([[0, 0, 0, 1, 1, -1], [0, 0, 0, 0, -1, -1]])
POSITIONS = torch.tensor([[2, 3, 4, 2, 3, 1], [2, 3, 4, 5, 1, 1]])
PARTS = {(0, 0): slice(0, 3), (0, 1): slice(3, 5), (1, 0): slice(0, 4)}


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_segment_alone(pooling, dtype):
    hidden = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    pooled = pool(hidden, POSITIONS, SEGMENTS, 3, pooling)
    assert pooled.shape == (2, 3, 5)
    assert pooled.dtype == torch.float32
    by_hand = {
        "mean": lambda x: x.mean(0),
        "mean_no_special": lambda x: x[1:].mean(0),
        "cls": lambda x: x[0],
        "max": lambda x: x.max(0),
    }[pooling]
    for (row, segment), part in PARTS.items():
        wanted = by_hand(hidden[row, part].float().numpy())
        np.testing.assert_allclose(pooled[row, segment], wanted, rtol=1e-5, atol=1e-6)
    assert (pooled[1, 1:] == 0).all()
    assert (pooled[0, 2] == 0).all()


@pytest.mark.parametrize("pooling", POOLINGS)
def test_filler_never_counts(pooling):
    hidden = torch.zeros(2, 6, 4)
    spoiled = hidden.clone()
    spoiled[SEGMENTS == -1] = 1e9
    assert torch.equal(
        pool(hidden, POSITIONS, SEGMENTS, 2, pooling),
        pool(spoiled, POSITIONS, SEGMENTS, 2, pooling),
    )


def test_segment_of_only_a_special_token():
    hidden = torch.full((1, 1, 2), 3.0)
    one = torch.zeros(1, 1, dtype=torch.long)
    pooled = pool(hidden, one + 2, one, 1, "mean_no_special")
    assert pooled.tolist() == [[[3.0, 3.0]]]
