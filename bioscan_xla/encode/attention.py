"""Attention inside the segments of packed rows, registered with transformers under one name.

Input: query, key and value of packed rows and, as keywords that the model passes through, either
`runs` (rows without filler: neighbouring segments of equal length) or `segments` (the segment
number of every token, to make the mask on the device). Output: attention states of the rows.
Invariants: a token attends only to tokens of its own segment.
"""

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface

from . import varlen

NAME = "packed"
"""What a model's attention implementation is set to."""

_SCORE_ELEMENTS = 1 << 19  # a tile of attention scores that stays in the L2 cache


def _packed_attention(module, query, key, value, attention_mask, runs=None, **options):
    if runs is None:
        return _segment_attention(module, query, key, value, attention_mask, **options)
    if query.device.type == "cuda":
        return _varlen_attention(module, query, key, value, attention_mask, runs, **options)
    return _runs_attention(module, query, key, value, attention_mask, runs, **options)


def _varlen_attention(module, query, key, value, attention_mask, runs, scaling=None, **_):
    """`_runs_attention` by one kernel over all segments, where one works."""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    states = varlen.attend(q, k, v, runs, scaling)
    if states is None:
        return _runs_attention(module, query, key, value, attention_mask, runs, scaling)
    return states[None], None


def _runs_attention(module, query, key, value, attention_mask, runs=None, scaling=None, **_):
    """Attention over neighbouring segments of equal length; one row, no filler.

    query, key, value: (1, heads, tokens, head_dim). Returns (1, tokens, heads, head_dim).
    """
    _, heads, _, dim = query.shape
    tiles: list[tuple[int, int]] = []
    for count, length in runs:
        # Segments per tile: at least one, and few enough to keep the scores small on a CPU.
        most = count
        if query.device.type == "cpu":
            most = max(1, min(count, _SCORE_ELEMENTS // (heads * length * length)))
        tiles += [(min(most, count - first), length) for first in range(0, count, most)]
    # Split and joined as a whole: the gradient of a slice would be as large as what it is cut from.
    sizes = [n * length for n, length in tiles]
    parts = zip(*(x[0].split(sizes, 1) for x in (query, key, value)), strict=True)
    outputs = []
    for (n, length), part in zip(tiles, parts, strict=True):
        q, k, v = (x.reshape(heads, n, length, dim).transpose(0, 1) for x in part)
        if query.device.type == "cpu":
            scores = torch.matmul(q, k.transpose(2, 3))
            if scaling != 1:  # ESM has already scaled the query
                scores = scores * scaling
            states = torch.matmul(torch.softmax(scores, -1), v)
        else:
            states = F.scaled_dot_product_attention(q, k, v, scale=scaling)
        outputs.append(states.transpose(1, 2).reshape(n * length, heads, dim))
    return torch.cat(outputs)[None], None


def _segment_attention(
    module, query, key, value, attention_mask, segments=None, scaling=None, dropout=0.0, **_
):
    """Attention with the mask made on the device from `segments`, (rows, tokens)."""
    same = segments[:, None, :, None] == segments[:, None, None, :]
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    scores = torch.where(same, scores.float(), torch.finfo(torch.float32).min)
    weights = torch.softmax(scores, -1).to(query.dtype)
    if dropout:
        weights = F.dropout(weights, dropout, module.training)
    return torch.matmul(weights, value).transpose(1, 2), None


def _no_mask(*args, **kwargs):
    """Replaces Hugging Face's mask code, which copies the mask back from the device."""
    return None


AttentionInterface.register(NAME, _packed_attention)
AttentionMaskInterface.register(NAME, _no_mask)
