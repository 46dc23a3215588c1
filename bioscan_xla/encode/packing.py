"""Tokens to packed rows: long sequences into windows, windows end to end into rows.

Input: the tokens of sequences. Output: `Batch` records in which several windows share a row,
positions restart at each window, and `places` gives the place of each. Invariants: every window is
in exactly one batch, and nothing is truncated.
"""

import bisect
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..reads.tokens import CLS_ID, PAD_ID, Tokens, reverse_complement

FIRST_POSITION = PAD_ID + 1
"""ESM counts positions from padding_idx + 1, as RoBERTa does."""


@dataclass(frozen=True)
class Window:
    """A stretch of one sequence that fits the model: `<cls>` and `tokens`, owned by `owner`."""

    owner: tuple[int, int]  # (job, sequence in job)
    tokens: np.ndarray  # int32, without <cls>

    def __len__(self) -> int:
        """Tokens in the row, `<cls>` included."""
        return len(self.tokens) + 1


@dataclass(frozen=True)
class Batch:
    """Packed rows.

    Attributes:
        input_ids: (rows, tokens) int32, filler is `<pad>`.
        positions: (rows, tokens) int32, restarting at each segment; filler is the pad position.
        segments: (rows, tokens) int32, filler -1.
        num_segments: how many segments a row can hold (static on XLA).
        runs: for rows without filler, (count, length) of neighbouring segments of equal length;
            None where attention needs the mask from `segments`.
        places: (row, segment, window) of every window.
    """

    input_ids: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    num_segments: int
    runs: tuple[tuple[int, int], ...] | None
    places: tuple[tuple[int, int, Window], ...]

    @property
    def num_useful(self) -> int:
        """Tokens without filler."""
        return sum(len(window) for _, _, window in self.places)


@dataclass
class Totals:
    """Totals so far: tokens, rows of tokens, and operations."""

    sequences: int = 0
    distinct: int = 0
    windowed: int = 0
    useful_tokens: int = 0
    computed_tokens: int = 0
    squared_tokens: int = 0
    batches: int = 0
    shapes: set[tuple[int, ...]] = field(default_factory=set)

    @property
    def useful_fraction(self) -> float:
        """Real tokens over computed tokens; 1 before the first batch."""
        return self.useful_tokens / self.computed_tokens if self.computed_tokens else 1.0

    def add(self, other: "Totals") -> None:
        """Add what was computed elsewhere."""
        for name, value in vars(other).items():
            own = getattr(self, name)
            setattr(self, name, own | value if isinstance(value, set) else own + value)

    def count(self, batch: Batch) -> None:
        """Add a batch."""
        self.useful_tokens += batch.num_useful
        self.computed_tokens += batch.input_ids.size
        self.squared_tokens += sum(len(window) ** 2 for _, _, window in batch.places)
        self.batches += 1
        self.shapes.add(batch.input_ids.shape)


@dataclass(frozen=True)
class Layout:
    """How rows are shaped.

    Attributes:
        row_tokens: static row lengths, ascending (XLA); a single budget without filler else.
        num_rows: rows of the longest length in a batch; shorter ones get proportionally more.
        max_segments: most segments in a row of the longest length; None for no limit.
    """

    row_tokens: tuple[int, ...]
    num_rows: int
    max_segments: int | None

    @property
    def is_static(self) -> bool:
        """True if every batch has one of a few shapes."""
        return self.max_segments is not None

    @property
    def batch_tokens(self) -> int:
        """Tokens of the largest batch."""
        return self.num_rows * self.row_tokens[-1]

    @property
    def batch_segments(self) -> int | None:
        """Most windows of a batch; None for no limit."""
        return None if self.max_segments is None else self.num_rows * self.max_segments


def layout(kind: str, num_devices: int = 1, max_tokens: int = 1000, num_layers: int = 1) -> Layout:
    """The layout for a device kind; see the README's performance section for the reasons."""
    longest = -(-max_tokens // 128) * 128  # the TPU's vector registers are 128 wide
    if kind == "xla":
        short = max(128, longest // 2)
        return Layout((short, longest), 8 * num_devices, longest // 24)
    # Short rows on a CPU keep the attention scores in its cache; without layers there are none.
    return Layout((max(longest, 1024 if kind == "cpu" and num_layers else 32768),), 1, None)


FRAMES = (1, 6)
STRANDS = ("given", "both")


def _shift(sequence: str, frame: int) -> str:
    if "N" not in sequence:
        return sequence[frame:]
    return "N".join(stretch[frame:] for stretch in sequence.split("N"))


def readings(sequences: Sequence[str], frames: int, strands: str) -> Iterator[list[str]]:
    """The sequences in each reading frame and strand, unchanged ones first.

    Args:
        sequences: cleaned.
        frames: 1 leaves them as they are; 6 adds copies without the first 1 to 5 bases, so that a
            6-mer token begins at every base. After an N, where tokens restart, likewise.
        strands: `given`, or `both` to add the reverse complement.
    """
    yield from ([_shift(text, frame) for text in sequences] for frame in range(frames))
    if strands == "both":
        yield from readings([reverse_complement(text) for text in sequences], frames, "given")


def cut_windows(tokens: Tokens, job: int, max_tokens: int, overlap: int) -> list[Window]:
    """Cut each sequence into windows of at most `max_tokens` tokens, `<cls>` included.

    Args:
        tokens: each sequence begins with `<cls>`.
        job: number that comes back in `Window.owner`.
        max_tokens: the model's limit, `<cls>` included.
        overlap: tokens that neighbouring windows share.
    """
    body = max_tokens - 1
    result = []
    bounds = tokens.offsets.tolist()
    for index in range(len(bounds) - 1):
        start, end = bounds[index] + 1, bounds[index + 1]
        first = start
        while True:
            last = min(first + body, end)
            result.append(Window((job, index), tokens.values[first:last]))
            if last == end:
                break
            first += body - overlap
    return result


def fill_rows(
    rows: list[list[Window]], num_rows: int, width: int, num_segments: int, with_runs: bool
) -> Batch:
    """Lay windows end to end.

    Args:
        rows: the windows of each row.
        num_rows: rows of the batch; those without windows are filler.
        width: tokens of a row.
        num_segments: most windows a row can hold.
        with_runs: for a single row without filler, windows of equal length being neighbours.
    """
    input_ids = np.full((num_rows, width), PAD_ID, np.int32)
    positions = np.full((num_rows, width), PAD_ID, np.int32)
    segments = np.full((num_rows, width), -1, np.int32)
    places: list[tuple[int, int, Window]] = []
    cls = np.array([CLS_ID], np.int32)
    for row, windows in enumerate(rows):
        places.extend((row, segment, window) for segment, window in enumerate(windows))
        lengths = np.fromiter(map(len, windows), np.int64, len(windows))
        used = int(lengths.sum())
        parts = itertools.chain.from_iterable((cls, window.tokens) for window in windows)
        input_ids[row, :used] = np.concatenate([cls[:0], *parts])
        starts = np.cumsum(lengths) - lengths
        positions[row, :used] = FIRST_POSITION + np.arange(used) - np.repeat(starts, lengths)
        segments[row, :used] = np.repeat(np.arange(len(windows)), lengths)
    runs: list[tuple[int, int]] = []
    if with_runs:
        for window in rows[0]:
            if runs and runs[-1][1] == len(window):
                runs[-1] = (runs[-1][0] + 1, len(window))
            else:
                runs.append((1, len(window)))
    return Batch(
        input_ids,
        positions,
        segments,
        num_segments,
        tuple(runs) if with_runs else None,
        tuple(places),
    )


class Packer:
    """Collects windows into full batches; `flush` returns the rest."""

    def __init__(self, shape: Layout):
        """Start empty, with the layout of the device."""
        self.layout = shape
        self.pending: list[Window] = []

    def add(self, windows: list[Window]) -> Iterator[Batch]:
        """Take windows and yield every batch that is full."""
        self.pending.extend(windows)
        return self._emit(flush=False)

    def flush(self) -> Iterator[Batch]:
        """Yield the rest; the last batch may be partly empty."""
        return self._emit(flush=True)

    def _emit(self, flush: bool) -> Iterator[Batch]:
        self.pending.sort(key=len, reverse=True)
        if not self.layout.is_static:
            windows, self.pending = self.pending, []
            yield from self._unpadded(windows)
            return
        if not self.pending:
            return
        widths = self.layout.row_tokens
        # Where every window fits the short rows, their smaller attention square is enough.
        width = next(w for w in widths if len(self.pending[0]) <= w)
        num_rows = self.layout.num_rows * (widths[-1] // width)
        limit = max(1, (self.layout.max_segments or 1) * width // widths[-1])
        rows = best_fit(self.pending, width, limit)
        # Oldest job first, so that no window waits for a second batch.
        rows.sort(key=lambda row: min(window.owner[0] for window in row))
        whole = len(rows) if flush else len(rows) // num_rows * num_rows
        self.pending = [window for row in rows[whole:] for window in row]
        for first in range(0, whole, num_rows):
            part = rows[first : min(first + num_rows, whole)]
            yield fill_rows(part, num_rows, width, limit, with_runs=False)

    def _unpadded(self, windows: list[Window]) -> Iterator[Batch]:
        row: list[Window] = []
        total = 0
        for window in windows:
            if row and total + len(window) > self.layout.row_tokens[0]:
                yield fill_rows([row], 1, total, len(row), with_runs=True)
                row, total = [], 0
            row.append(window)
            total += len(window)
        if row:
            yield fill_rows([row], 1, total, len(row), with_runs=True)


def best_fit(windows: list[Window], width: int, max_segments: int) -> list[list[Window]]:
    """Best-fit decreasing: each window into the fullest row that still has room for it.

    Reference: D. S. Johnson et al. (1974), https://doi.org/10.1137/0203025

    Args:
        windows: longest first.
        width: tokens in a row.
        max_segments: most windows in a row.
    """
    rows: list[list[Window]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for window in windows:
        at = bisect.bisect_left(room, (len(window), -1))
        if at == len(room):
            rows.append([window])
            left, row = width - len(window), len(rows) - 1
        else:
            left, row = room.pop(at)
            rows[row].append(window)
            left -= len(window)
        if left > 1 and len(rows[row]) < max_segments:
            bisect.insort(room, (left, row))
    return rows
