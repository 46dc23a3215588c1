"""Attention of a CUDA GPU over all sequences of a batch in one kernel.

Input: query, key and value of sequences that lie end to end. Output: their attention states.
Invariants: a token attends only to tokens of its own sequence. A kernel that fails is left out from
then on, with one warning, and the next takes its place: flash-attn where it is installed, torch's
own for nested tensors, then a loop over the sequences in `attention`.
"""

import functools
import importlib.util
import logging
import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F

log = logging.getLogger(__name__)

Runs = tuple[tuple[int, int], ...]

_failed: set[str] = set()


def kernels(dtype: torch.dtype, head_dim: int) -> Sequence[str]:
    """Names of the kernels to try, the fastest first."""
    names = []
    if (
        dtype in (torch.float16, torch.bfloat16)
        and head_dim <= 256
        and head_dim % 8 == 0
        and importlib.util.find_spec("flash_attn") is not None
    ):
        names.append("flash_attn")
    names.append("nested")
    return [name for name in names if name not in _failed]


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, runs: Runs, scale: float | None
) -> torch.Tensor | None:
    """Attention within each sequence; None if no kernel works here.

    Args:
        query: (tokens, heads, head_dim), like `key` and `value`.
        key: see `query`.
        value: see `query`.
        runs: (count, length) of neighbouring sequences of equal length.
        scale: of the scores; None for one over the root of the head's size.

    Returns:
        (tokens, heads, head_dim).
    """
    for name in kernels(query.dtype, query.shape[-1]):
        try:
            return _KERNELS[name](query, key, value, runs, scale)
        except torch.OutOfMemoryError:
            raise
        except (ImportError, RuntimeError, NotImplementedError) as error:
            _failed.add(name)
            log.warning(
                "the attention kernel %s does not work here and is left out: %s", name, error
            )
    return None


@functools.lru_cache(maxsize=8)
def sequence_starts(runs: Runs, device: torch.device) -> torch.Tensor:
    """Where each sequence begins, and the end: (sequences + 1,) int32 on the device.

    Kept, because every layer asks for those of the same batch.

    >>> sequence_starts(((2, 5), (1, 3)), torch.device("cpu")).tolist()
    [0, 5, 10, 13]
    """
    counts, lengths = torch.tensor(runs).T
    starts = F.pad(lengths.repeat_interleave(counts).cumsum(0), (1, 0)).int()
    if device.type == "cuda":
        starts = starts.pin_memory()
    return starts.to(device, non_blocking=True)


def _flash_attn(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, runs: Runs, scale: float | None
) -> torch.Tensor:
    from flash_attn import flash_attn_varlen_func

    starts = sequence_starts(runs, query.device)
    longest = max(length for _, length in runs)
    return flash_attn_varlen_func(
        query, key, value, starts, starts, longest, longest, softmax_scale=scale
    )


def _nested(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, runs: Runs, scale: float | None
) -> torch.Tensor:
    starts = sequence_starts(runs, query.device)
    # Both given, so that torch does not ask the device for them.
    shortest = min(length for _, length in runs)
    longest = max(length for _, length in runs)

    def nest(values: torch.Tensor) -> torch.Tensor:
        nested = torch.nested.nested_tensor_from_jagged(
            values.contiguous(), starts, min_seqlen=shortest, max_seqlen=longest
        )
        return nested.transpose(1, 2)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The PyTorch API of nested tensors")
        states = F.scaled_dot_product_attention(nest(query), nest(key), nest(value), scale=scale)
    return states.transpose(1, 2).values()


_KERNELS = {"flash_attn": _flash_attn, "nested": _nested}
