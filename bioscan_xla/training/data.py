"""Labelled sequences to training batches.

Input: labelled files. Output: `Examples`, and for every step a `TrainingBatch`.
Invariants: the content of step n depends only on the seed, the epoch and n, so it is the same in
every process and after every resume; batches have one of a few shapes.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..encode.packing import Batch, Window, fill_rows, readings
from ..errors import InputError
from ..options import FinetuneConfig
from ..reads.files import metadata_schema
from ..reads.inputs import expand_inputs
from ..reads.labels import UNKNOWN, LabelSpace
from ..reads.lineages import RANKS, Lineage
from ..reads.raw import ReadOptions
from ..reads.records import read_chunks
from ..reads.taxonomy import read_taxonomy
from ..reads.tokens import reverse_complement, tokenize

log = logging.getLogger(__name__)

_MOST_WIDTHS = 6  # each is a program to compile: minutes for 2.5B
_WIDTH_STEP = 32  # tokens
_SHORTEST_CROP_BP = 100
_NO_EXAMPLE = -1


@dataclass(frozen=True)
class Examples:
    """Labelled sequences: ids, cleaned sequences, and seven names each."""

    ids: list[str]
    sequences: list[str]
    lineages: list[Lineage]

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self.ids)

    def select(self, rows: Sequence[int] | np.ndarray) -> "Examples":
        """Those of these rows."""
        return Examples(
            [self.ids[row] for row in rows],
            [self.sequences[row] for row in rows],
            [self.lineages[row] for row in rows],
        )


@dataclass(frozen=True)
class Data:
    """Split and labelled examples, and the label space learned from the training part.

    Attributes:
        train: what is trained on.
        eval: what is evaluated on; may be empty.
        space: the classes that the training part has.
        train_labels: (train, 7) class numbers, -1 where unknown.
        eval_labels: (eval, 7) likewise.
        split: (id, part) of every example read for training.
        conflicts: (rank, name, id, lineage) of every example with a conflicting lineage.
    """

    train: Examples
    eval: Examples
    space: LabelSpace
    train_labels: np.ndarray
    eval_labels: np.ndarray
    split: list[tuple[str, str]]
    conflicts: list[tuple[str, str, str, str]]


def read_examples(
    inputs: Sequence[str], reading: ReadOptions, taxonomy: str | None = None
) -> Examples:
    """Read labelled sequences; unusable records are counted in the log.

    Args:
        inputs: files, globs, folders, URLs.
        reading: column names and limits.
        taxonomy: a QIIME 2 taxonomy TSV, joined by id; it wins over the file's own ranks.

    Raises:
        InputError: a file cannot be read, or nothing in it can be used.
    """
    sources = expand_inputs(inputs)
    schema = metadata_schema(sources, reading)
    ids: list[str] = []
    sequences: list[str] = []
    lineages: list[Lineage] = []
    left_out: Counter[str] = Counter()
    why = "there are no records"
    for chunk in read_chunks(sources, reading, schema):
        ids += chunk.ids
        sequences += chunk.sequences
        columns = [chunk.metadata[rank].to_pylist() for rank in RANKS]
        lineages += list(zip(*columns, strict=True))
        if chunk.rejected and not left_out:
            first = chunk.rejected[0]
            why = f"{first.sequence_id or f'record {first.row + 1}'}: {first.reason}"
        left_out.update(item.code.value for item in chunk.rejected)
    if left_out:
        counts = ", ".join(f"{code} {count}" for code, count in left_out.most_common())
        log.warning("%d records left out (%s); the first is %s", left_out.total(), counts, why)
    if not ids:
        raise InputError(f"{', '.join(inputs)}: no sequence can be used ({why})")
    if taxonomy:
        lineages = _join_taxonomy(taxonomy, ids, lineages)
    if not any(any(lineage) for lineage in lineages):
        raise InputError(
            f"{sources[0]}: no sequence has a name at any rank; name the columns with --columns, "
            "read them from headers with --header-taxonomy, or join a TSV with --taxonomy"
        )
    return Examples(ids, sequences, lineages)


def _join_taxonomy(path: str, ids: list[str], lineages: list[Lineage]) -> list[Lineage]:
    """Lineages by id from a taxonomy TSV; an id that it lacks keeps its own."""
    by_id = read_taxonomy(path)
    joined = sum(name in by_id for name in ids)
    if not joined:
        raise InputError(
            f"{path}: contains none of the sequence ids (it has {next(iter(by_id), 'none')!r}, "
            f"they have {ids[0]!r}); its first column must hold the sequence ids"
        )
    if joined < len(ids):
        log.warning(
            "%s: %d of %d sequences are not in it; they keep the lineage of their own file",
            path,
            len(ids) - joined,
            len(ids),
        )
    return [by_id.get(name, lineage) for name, lineage in zip(ids, lineages, strict=True)]


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
        labels: (rows * num_segments / frames, 7) int64, -1 where unknown or filler.
        known: (7,) rows known at each rank in the whole batch, all processes together.
        num_sequences: in the whole batch.
        frames: neighbouring segments (or rows of one) that are the frames of one example.
    """

    batch: Batch
    labels: np.ndarray
    known: np.ndarray
    num_sequences: int
    frames: int = 1


def row_widths(num_tokens: np.ndarray, max_tokens: int) -> list[int]:
    """The few row widths that waste the fewest tokens on these lengths, ascending.

    At most 6, multiples of 32, by dynamic programming over the histogram of lengths (the
    one-dimensional segmentation of Bellman 1961, https://doi.org/10.1145/366573.366611).

    Args:
        num_tokens: (examples,) tokens of each, at least one.
        max_tokens: the model's limit; longer ones count as that.

    >>> row_widths(np.array([30, 31, 200, 5000]), 1000)
    [32, 224, 1024]
    """
    steps = -(-np.minimum(num_tokens, max_tokens) // _WIDTH_STEP)
    below = np.concatenate([[0], np.cumsum(np.bincount(steps)[1:])])  # examples up to a width
    last = len(below) - 1
    # cost[k, w]: tokens computed for all examples up to width w with k widths, w the largest.
    cost = np.full((_MOST_WIDTHS + 1, last + 1), np.inf)
    cost[0, 0] = 0
    before = np.zeros(cost.shape, np.int64)
    for k in range(1, _MOST_WIDTHS + 1):
        for w in range(1, last + 1):
            options = cost[k - 1, :w] + w * (below[w] - below[:w])
            before[k, w] = options.argmin()
            cost[k, w] = options.min()
    k, w = int(cost[:, last].argmin()), last
    widths = []
    while w:
        widths.append(w * _WIDTH_STEP)
        k, w = k - 1, int(before[k, w])
    return widths[::-1]


def plan_epoch(
    num_tokens: np.ndarray, max_tokens: int, batch_size: int, seed: int, epoch: int
) -> list[tuple[int, np.ndarray]]:
    """The batches of an epoch: row width, and which examples; each example once.

    Examples of like length share a batch, so that rows of a few static widths hold little filler.

    Args:
        num_tokens: (examples,) tokens of each.
        max_tokens: the model's limit; longer ones are cut to a random window of it.
        batch_size: examples in a batch; the last of a width may have fewer.
        seed: of the run.
        epoch: from 0.
    """
    rng = np.random.default_rng([seed, epoch])
    widths = row_widths(num_tokens, max_tokens)
    bucket = np.minimum(np.searchsorted(widths, num_tokens), len(widths) - 1)
    result = []
    for number, width in enumerate(widths):
        rows = rng.permutation(np.flatnonzero(bucket == number))
        result += [
            (width, rows[first : first + batch_size]) for first in range(0, len(rows), batch_size)
        ]
    return [result[at] for at in rng.permutation(len(result))]


def make_batch(
    examples: Examples,
    labels: np.ndarray,
    width: int,
    rows: np.ndarray,
    *,
    kind: str,
    batch_size: int,
    num_devices: int,
    max_tokens: int,
    augmentation: Augmentation,
    seed: int,
    epoch: int,
    frames: int = 1,
    process_index: int = 0,
    process_count: int = 1,
) -> TrainingBatch:
    """Make one batch of the plan.

    On XLA there is one sequence a row and filler up to `width` and `batch_size`; elsewhere all
    sequences lie end to end in one row.
    """
    own = rows[process_index::process_count]
    examples_windows = []
    for row in own.tolist():
        # A generator for each example, so that the result is the same in every process.
        rng = np.random.default_rng([seed, epoch, row])
        sequence = augmentation.apply(examples.sequences[row], rng)
        read = [texts[0] for texts in readings([sequence], frames, "given")]
        tokens = [ids[1:] for ids in tokenize(read)]
        room = min(width, max_tokens) - 1
        if len(tokens[0]) > room:
            start = int(rng.integers(0, len(tokens[0]) - room + 1))
            tokens = [ids[start : start + room] for ids in tokens]
        examples_windows.append([Window((0, row), ids) for ids in tokens])
    if kind == "xla":
        windows = [window for each in examples_windows for window in each]
        num_rows = -(-batch_size // num_devices) * num_devices * frames
        batch = fill_rows([[w] for w in windows], num_rows, width, 1, with_runs=False)
    else:
        if not examples_windows:  # the batch has fewer sequences than there are processes
            examples_windows = [[Window((0, _NO_EXAMPLE), np.zeros(0, np.int32))] * frames]
        examples_windows.sort(key=lambda each: len(each[0]), reverse=True)
        windows = [window for each in examples_windows for window in each]
        batch = fill_rows(
            [windows], 1, sum(map(len, windows)), max(1, len(windows)), with_runs=True
        )
    num_segments = len(batch.input_ids) * batch.num_segments
    placed = np.full((num_segments // frames, len(RANKS)), UNKNOWN, np.int64)
    for at, segment, window in batch.places:
        if window.owner[1] != _NO_EXAMPLE:
            placed[(at * batch.num_segments + segment) // frames] = labels[window.owner[1]]
    return TrainingBatch(batch, placed, (labels[rows] != UNKNOWN).sum(0), len(rows), frames)
