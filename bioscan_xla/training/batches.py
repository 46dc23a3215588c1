"""Examples to training batches: which sequences make up a step, and how they lie in rows.

Input: `Examples` and their lengths. Output: the batches of an epoch, and for every step a
`TrainingBatch`.
Invariants: the content of step n depends only on the seed, the epoch and n, so it is the same in
every process, on every device and after every resume; on XLA batches have one of a few shapes.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..encode.packing import Batch, Window, fill_rows, readings
from ..options import FinetuneConfig
from ..reads.labels import UNKNOWN
from ..reads.lineages import RANKS
from ..reads.tokens import reverse_complement, tokenize
from .data import Examples

_MOST_GROUPS = 6  # each is a program to compile: minutes for 2.5B
_WORTH_A_PROGRAM = 0.01  # of the cost: less does not pay for another program
_CUTS = 32  # lengths at which groups may end
_PLANNED_ROWS = 8  # groups are planned for eight cores, so that they are the same on any device
_WIDTH_STEP = 16  # tokens; a tile of bfloat16 has so many rows
_ROW_CHOICES = 4
_BATCHES_LOOKED_AT = 64
_LINEAR_TOKENS = 15_000
"""Attention to so many tokens costs a token as much as its matrix products (6 x 2,560 of the 2.5B
model), so rows twice as wide cost little more."""
_SHORTEST_CROP_BP = 100
_NO_EXAMPLE = -1


@dataclass(frozen=True)
class Augmentation:
    """How training sequences are varied; see `FinetuneConfig`."""

    reverse_complement: float = 0.5
    frame_shift: bool = True
    crop: float = 0.0

    def apply(self, sequence: str, rng: np.random.Generator) -> str:
        """A variant of a sequence."""
        if rng.random() < self.reverse_complement:
            sequence = reverse_complement(sequence)
        if rng.random() < self.crop and len(sequence) > _SHORTEST_CROP_BP:
            length = int(rng.integers(_SHORTEST_CROP_BP, len(sequence)))
            start = int(rng.integers(0, len(sequence) - length + 1))
            sequence = sequence[start : start + length]
        if self.frame_shift:
            shift = int(rng.integers(0, 6))
            if len(sequence) > _SHORTEST_CROP_BP:
                sequence = sequence[shift:]
        return sequence


def augmentation_of(config: FinetuneConfig) -> Augmentation:
    """How a run varies its sequences; with both strands, it trains on either."""
    reverse = 0.5 if config.strands == "both" else config.reverse_complement
    return Augmentation(reverse, config.frame_shift, config.crop)


@dataclass(frozen=True)
class TrainingBatch:
    """A process's part of a batch.

    Attributes:
        batch: packed rows.
        labels: (examples or places for one, 7) int64, -1 where unknown or filler.
        known: (7,) rows known at each rank in the whole batch, all processes together.
        num_sequences: in the whole batch.
        frames: neighbouring segments, or rows if there are several, that are the frames of one
            example.
    """

    batch: Batch
    labels: np.ndarray
    known: np.ndarray
    num_sequences: int
    frames: int = 1


@dataclass(frozen=True)
class Shape:
    """A static shape of a batch on XLA; each is a program.

    Attributes:
        rows: of one frame; a multiple of the devices.
        width: tokens of a row.
        segments: sequences that a row can hold.
    """

    rows: int
    width: int
    segments: int

    @property
    def cost(self) -> float:
        """Of computing it, in tokens."""
        return self.rows * self.width * (1 + self.width / _LINEAR_TOKENS)


def balance(lengths: Sequence[int], rows: int, segments: int | None = None) -> list[list[int]]:
    """Divide sequences over rows of about equal length: which sequences each row holds.

    Longest first, each into the row with the fewest tokens.

    Reference: R. L. Graham (1969), https://doi.org/10.1137/0117039

    >>> balance([900, 500, 450, 100], 2)
    [[0, 3], [1, 2]]
    """
    held: list[list[int]] = [[] for _ in range(rows)]
    heap = [(0, row) for row in range(rows)]
    for at in sorted(range(len(lengths)), key=lambda at: -lengths[at]):
        used, row = heapq.heappop(heap)
        held[row].append(at)
        if segments is None or len(held[row]) < segments:
            heapq.heappush(heap, (used + lengths[at], row))
    return held


def _fit_shape(batches: Sequence[Sequence[int]], unit: int) -> Shape:
    """The cheapest shape, of a multiple of `unit` rows, that holds each of these batches."""
    longest = max(max(lengths) for lengths in batches)
    tokens = max(sum(lengths) for lengths in batches)
    most = -(-max(map(len, batches)) // unit) * unit
    first = max(unit, tokens // max(longest, 1024) // unit * unit)
    shapes = []
    for rows in range(first, most + 1, unit)[:_ROW_CHOICES] or [most]:
        width = segments = 0
        for lengths in batches:
            held = balance(lengths, rows)
            width = max(width, *(sum(lengths[at] for at in row) for row in held))
            segments = max(segments, *map(len, held))
        shapes.append(Shape(rows, -(-width // _WIDTH_STEP) * _WIDTH_STEP, segments))
    return min(shapes, key=lambda shape: shape.cost)


def _group_cost(lengths: np.ndarray, batch_size: int) -> float:
    """Cost of the batches of some examples, by one batch that is typical of them."""
    num_batches = -(-len(lengths) // batch_size)
    size = -(-len(lengths) // num_batches)
    typical = lengths[((np.arange(size) + 0.5) * len(lengths) / size).astype(int)]
    typical[-1] = lengths[-1]  # some batch has it
    return num_batches * _fit_shape([typical.tolist()], _PLANNED_ROWS).cost


def find_groups(num_tokens: np.ndarray, batch_size: int) -> np.ndarray:
    """The number of each example's group: a batch is taken from one group of like lengths.

    At most 6 groups, by dynamic programming over their limits (the one-dimensional segmentation of
    Bellman 1961, https://doi.org/10.1145/366573.366611), and no more than pay.

    Args:
        num_tokens: (examples,) tokens of each, at most the model's limit.
        batch_size: examples in a batch.
    """
    ordered = np.sort(num_tokens)
    mass = np.cumsum(ordered)
    limits = np.searchsorted(mass, mass[-1] * np.arange(1, _CUTS) / _CUTS, side="right")
    ends = np.searchsorted(
        ordered, np.unique(ordered[np.append(limits, len(ordered) - 1)]), "right"
    )
    bounds = [0, *ends.tolist()]
    count = len(bounds)
    cost = np.full((_MOST_GROUPS + 1, count), np.inf)
    cost[0, 0] = 0
    before = np.zeros(cost.shape, np.int64)
    for last in range(1, count):
        here = [
            _group_cost(ordered[bounds[first] : bounds[last]], batch_size) for first in range(last)
        ]
        for k in range(1, _MOST_GROUPS + 1):
            options = cost[k - 1, :last] + here
            before[k, last], cost[k, last] = options.argmin(), options.min()
    least = cost[:, -1].min()
    k = next(k for k in range(_MOST_GROUPS + 1) if cost[k, -1] <= (1 + _WORTH_A_PROGRAM) * least)
    last, tops = count - 1, []
    while last:
        tops.append(ordered[bounds[last] - 1])
        k, last = k - 1, int(before[k, last])
    return np.searchsorted(tops[::-1], num_tokens)


def plan_epoch(
    num_tokens: np.ndarray, max_tokens: int, batch_size: int, seed: int, epoch: int
) -> list[tuple[int, np.ndarray]]:
    """The batches of an epoch: number of a group, and which examples; each example once.

    A batch has one example of every stratum of its group's lengths, so that the batches of a group
    have almost the same number of tokens, and one static shape fits all of them.

    Args:
        num_tokens: (examples,) tokens of each.
        max_tokens: the model's limit; longer ones are cut to a random window of it.
        batch_size: most examples in a batch; those of a group differ by at most one.
        seed: of the run.
        epoch: from 0.
    """
    rng = np.random.default_rng([seed, epoch])
    lengths = np.minimum(num_tokens, max_tokens)
    groups = find_groups(lengths, batch_size)
    result = []
    for number in range(groups.max() + 1):
        members = rng.permutation(np.flatnonzero(groups == number))
        members = members[np.argsort(lengths[members], kind="stable")]
        num_batches = -(-len(members) // batch_size)
        strata = [
            rng.permutation(members[first : first + num_batches])
            for first in range(0, len(members), num_batches)
        ]
        # The last stratum may be short: any of the batches can go without.
        order = rng.permutation(num_batches)
        result += [
            (number, np.array([stratum[at] for stratum in strata if at < len(stratum)]))
            for at in order.tolist()
        ]
    return [result[at] for at in rng.permutation(len(result))]


def find_shapes(
    examples: Examples,
    num_tokens: np.ndarray,
    *,
    max_tokens: int,
    batch_size: int,
    num_devices: int,
    augmentation: Augmentation,
    seed: int,
    frames: int = 1,
) -> list[Shape]:
    """The static shape of each group's batches on XLA, and after them one that fits any batch.

    They follow from the first batches of the first epoch, varied as they will be.
    """
    batches: dict[int, list[list[int]]] = {}
    for group, members in plan_epoch(num_tokens, max_tokens, batch_size, seed, 0):
        known = batches.setdefault(group, [])
        if len(known) < _BATCHES_LOOKED_AT:
            made = [
                _vary(examples, row, augmentation, max_tokens, frames, seed, 0)
                for row in members.tolist()
            ]
            known.append([max(map(len, each)) for each in made])
    shapes = [_fit_shape(batches[group], num_devices) for group in sorted(batches)]
    rows = -(-batch_size // num_devices) * num_devices
    return [*shapes, Shape(rows, -(-max_tokens // _WIDTH_STEP) * _WIDTH_STEP, 1)]


def choose_shape(
    lengths: Sequence[int], group: int, shapes: Sequence[Shape]
) -> tuple[Shape, list[list[int]]]:
    """The shape that a batch is computed in, and what its rows hold.

    That of its group; where varying a sequence has made a row too long, the next that fits.
    """
    others = sorted(shapes[:-1], key=lambda shape: shape.cost)
    for shape in (shapes[group], *(s for s in others if s.cost > shapes[group].cost)):
        if len(lengths) <= shape.rows * shape.segments:
            held = balance(lengths, shape.rows, shape.segments)
            if max(sum(lengths[at] for at in row) for row in held) <= shape.width:
                return shape, held
    return shapes[-1], balance(lengths, shapes[-1].rows, 1)


def _vary(
    examples: Examples,
    row: int,
    augmentation: Augmentation,
    max_tokens: int,
    frames: int,
    seed: int,
    epoch: int,
) -> list[Window]:
    """The frames of an example, varied, cut to a random window of the model."""
    # A generator for each example, so that the result is the same in every process.
    rng = np.random.default_rng([seed, epoch, row])
    sequence = augmentation.apply(examples.sequences[row], rng)
    read = [texts[0] for texts in readings([sequence], frames, "given")]
    tokens = [ids[1:] for ids in tokenize(read)]
    room = max_tokens - 1
    if len(tokens[0]) > room:
        start = int(rng.integers(0, len(tokens[0]) - room + 1))
        tokens = [ids[start : start + room] for ids in tokens]
    return [Window((0, row), ids[:room]) for ids in tokens]


def make_batch(
    examples: Examples,
    labels: np.ndarray,
    group: int,
    rows: np.ndarray,
    *,
    shapes: Sequence[Shape] | None,
    max_tokens: int,
    augmentation: Augmentation,
    seed: int,
    epoch: int,
    frames: int = 1,
    process_index: int = 0,
    process_count: int = 1,
) -> TrainingBatch:
    """Make one batch of the plan.

    With `shapes`, for XLA, rows of one of them, each frame of a row in a row of its own; else all
    sequences lie end to end in one row, without filler.
    """
    own = rows[process_index::process_count].tolist()
    windows = [_vary(examples, row, augmentation, max_tokens, frames, seed, epoch) for row in own]
    if shapes is not None:
        lengths = [max(map(len, each)) for each in windows]
        shape, held = choose_shape(lengths, group, shapes)
        laid = [[windows[at][frame] for at in row] for row in held for frame in range(frames)]
        batch = fill_rows(laid, frames * shape.rows, shape.width, shape.segments, with_runs=False)
        placed = np.full((shape.rows * shape.segments, len(RANKS)), UNKNOWN, np.int64)
        for number, row in enumerate(held):
            first = number * shape.segments
            placed[first : first + len(row)] = labels[[own[at] for at in row]]
    else:
        if not windows:  # the batch has fewer sequences than there are processes
            windows = [[Window((0, _NO_EXAMPLE), np.zeros(0, np.int32))] * frames]
        windows.sort(key=lambda each: len(each[0]), reverse=True)
        laid = [[window for each in windows for window in each]]
        batch = fill_rows(laid, 1, sum(map(len, laid[0])), len(laid[0]), with_runs=True)
        owners = np.array([each[0].owner[1] for each in windows])
        placed = np.where((owners == _NO_EXAMPLE)[:, None], UNKNOWN, labels[owners])
    return TrainingBatch(batch, placed, (labels[rows] != UNKNOWN).sum(0), len(rows), frames)
