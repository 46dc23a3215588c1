"""Token states to one vector per segment: the only place that pools. Pure functions.

Input: hidden states of packed rows and the segment number of every token. Output: one float32
vector per segment. Invariants: filler tokens (segment -1) never contribute.
"""

import torch
import torch.nn.functional as F

POOLINGS = ("mean", "mean_no_special", "cls", "max")


_MANY_SEGMENTS = 64  # of a row on a CPU; the product below grows with their number


def pool(
    hidden: torch.Tensor,
    positions: torch.Tensor,
    segments: torch.Tensor,
    num_segments: int,
    pooling: str = "mean",
    first_position: int = 2,
) -> torch.Tensor:
    """Pool each segment of each row.

    Args:
        hidden: (rows, tokens, hidden), any float dtype.
        positions: (rows, tokens); `first_position` marks the `<cls>` of a segment.
        segments: (rows, tokens), 0 up to `num_segments` - 1, filler -1.
        num_segments: how many segments a row can hold.
        pooling: `mean` over all tokens, the special one included (the model card's recipe);
            `mean_no_special`; `cls`; `max` over all tokens.
        first_position: position number of a segment's first token.

    Returns:
        (rows, num_segments, hidden), float32; zeros for segments that a row lacks.
    """
    numbers = torch.arange(num_segments, device=segments.device, dtype=segments.dtype)
    if pooling == "max":
        lowest = torch.finfo(hidden.dtype).min
        parts = [
            torch.where((segments == k)[..., None], hidden, lowest).amax(1)
            for k in range(num_segments)
        ]
        held = (segments[:, None, :] == numbers[None, :, None]).any(-1, keepdim=True)
        return torch.where(held, torch.stack(parts, 1), 0).float()
    member = segments[:, None, :] == numbers[None, :, None]  # (rows, segments, tokens)
    is_cls = (positions == first_position)[:, None, :]
    if pooling == "cls":
        member = member & is_cls
    elif pooling == "mean_no_special":
        # A sequence without tokens has only its <cls>: keep it rather than divide by zero.
        rest = member & ~is_cls
        member = torch.where(rest.any(-1, keepdim=True), rest, member)
    if num_segments > _MANY_SEGMENTS and hidden.device.type == "cpu":
        return _sum_by_index(hidden.float(), member, segments, num_segments)
    weights = member.to(torch.float32)
    total = torch.matmul(weights, hidden.float())
    return total / weights.sum(-1, keepdim=True).clamp(min=1)


def _sum_by_index(
    hidden: torch.Tensor, member: torch.Tensor, segments: torch.Tensor, num_segments: int
) -> torch.Tensor:
    """The mean as in `pool`, at a cost independent of the number of segments."""
    used = member.any(1)  # (rows, tokens)
    rows = torch.arange(len(segments), device=segments.device)[:, None] * num_segments
    places = (rows + segments.long().clamp(min=0))[used]
    total = hidden.new_zeros(len(segments) * num_segments, hidden.shape[-1])
    total = total.index_add(0, places, hidden[used])
    counts = torch.bincount(places, minlength=len(total)).clamp(min=1)
    return (total / counts[:, None]).view(len(segments), num_segments, -1)


def count_tokens(segments: torch.Tensor, num_segments: int) -> torch.Tensor:
    """Tokens of each segment, (rows, num_segments) float32; `segments` as for `pool`."""
    if num_segments > _MANY_SEGMENTS and segments.device.type == "cpu":
        rows = torch.arange(len(segments))[:, None] * num_segments
        places = (rows + segments.long())[segments >= 0]
        counts = torch.bincount(places, minlength=len(segments) * num_segments)
        return counts.view(len(segments), num_segments).float()
    numbers = torch.arange(num_segments, device=segments.device, dtype=segments.dtype)
    return (segments[:, None, :] == numbers[None, :, None]).sum(-1).float()


def mean_of_rows(
    table: torch.Tensor, input_ids: torch.Tensor, positions: torch.Tensor, first_position: int = 2
) -> torch.Tensor:
    """Mean of each segment's rows of a table of token states, (1, segments, hidden).

    Args:
        table: (vocabulary, hidden) float32.
        input_ids: (1, tokens), one row without filler.
        positions: (1, tokens).
        first_position: position number of a segment's first token.
    """
    starts = (positions[0] == first_position).nonzero()[:, 0].to(input_ids.dtype)
    return F.embedding_bag(input_ids[0], table, starts, mode="mean")[None]
