"""The 6-mer vocabulary of Nucleotide Transformer, version 1: sequences to token ids.

Input: sequences as text. Output: `Tokens`, every sequence beginning with `<cls>`.
Invariants: the ids equal those of the Hugging Face tokenizer of the published models for any text.

Reference: Dalla-Torre et al. (2024), https://doi.org/10.1038/s41592-024-02523-z
"""

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from transformers import EsmTokenizer

UNK_ID, PAD_ID, MASK_ID, CLS_ID = 0, 1, 2, 3

K = 6
"""Bases in a token."""

_SPECIAL = ("<unk>", "<pad>", "<mask>", "<cls>")
_BASES = "ATCG"
VOCABULARY: tuple[str, ...] = (
    *_SPECIAL,
    *("".join(bases) for bases in itertools.product(_BASES, repeat=K)),
    *_BASES,
    "N",
)
"""All 4,105 tokens; a token's index is its id."""

_IDS = {token: number for number, token in enumerate(VOCABULARY)}
_FIRST_KMER = len(_SPECIAL)
_FIRST_BASE = _FIRST_KMER + 4**K  # ids of the single bases, in the order A T C G N

_N, _OTHER, _SPACE = 4, 5, 6
_CLASS = np.full(128, _OTHER, np.uint8)
for _number, _letter in enumerate(_BASES + "N"):
    _CLASS[ord(_letter)] = _number
_CLASS[[code for code in range(128) if chr(code).isspace()]] = _SPACE

_COMPLEMENT = str.maketrans("ACGT", "TGCA")
_BLOCK_SEQUENCES = 256  # sequences at a time: the working arrays stay in the L2 cache
_PATTERN = re.compile(rf"<unk>|<pad>|<mask>|<cls>|[ACGT]{{{K}}}|[ACGTN]|\s+|(.)", re.DOTALL)


@dataclass(frozen=True)
class Tokens:
    """Token ids of several sequences, end to end.

    Attributes:
        values: (total,) int32.
        offsets: (sequences + 1,) int64; sequence i is `values[offsets[i]:offsets[i + 1]]`.
    """

    values: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        """Return the number of sequences."""
        return len(self.offsets) - 1

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yield the ids of each sequence."""
        bounds = self.offsets.tolist()
        return (self.values[a:b] for a, b in itertools.pairwise(bounds))


def reverse_complement(sequence: str) -> str:
    """The other strand of a cleaned sequence."""
    return sequence.translate(_COMPLEMENT)[::-1]


def tokenize(sequences: Sequence[str]) -> Tokens:
    """Token ids of sequences: leftmost 6-mers, then single bases, as the published models expect.

    Within a stretch of ACGT, every six bases from its start are one token; the one to five that
    remain, and every N, are single tokens; a stretch of anything else is one `<unk>`; white
    space separates and gives no token.

    Returns:
        Each sequence begins with `<cls>`; there is no end token.
    """
    parts = [
        _tokenize_block(sequences[first : first + _BLOCK_SEQUENCES])
        for first in range(0, len(sequences), _BLOCK_SEQUENCES)
    ]
    values = [part.values for part in parts]
    counts = [np.diff(part.offsets) for part in parts]
    offsets = np.zeros(len(sequences) + 1, np.int64)
    if parts:
        np.cumsum(np.concatenate(counts), out=offsets[1:])
    return Tokens(np.concatenate(values) if values else np.zeros(0, np.int32), offsets)


def _tokenize_block(sequences: Sequence[str]) -> Tokens:
    # A line end before each sequence ends the stretch before it, and holds the <cls>.
    text = "\n" + "\n".join(sequences)
    if not text.isascii() or "<" in text:
        return _tokenize_one_by_one(sequences)
    codes = _CLASS[np.frombuffer(text.encode("ascii"), np.uint8)]
    sizes = np.fromiter(map(len, sequences), np.int64, len(sequences)) + 1
    heads = np.cumsum(sizes) - sizes
    token_at = np.full(len(codes), -1, np.int32)

    breaks = np.flatnonzero(codes >= _N)  # ends of stretches of ACGT; the first is at 0
    starts = breaks + 1
    lengths = np.diff(breaks, append=len(codes)) - 1
    kmers, rest = lengths // K, lengths % K
    first = _spread(starts, kmers, K)
    value = np.zeros(len(first), np.int32)
    for base in range(K):
        value = value * 4 + codes[first + base]
    token_at[first] = _FIRST_KMER + value
    single = _spread(starts + kmers * K, rest, 1)
    token_at[single] = _FIRST_BASE + codes[single].astype(np.int32)

    kinds = codes[breaks]
    token_at[breaks[kinds == _N]] = _FIRST_BASE + _N
    others = breaks[kinds == _OTHER]
    token_at[others[codes[others - 1] != _OTHER]] = UNK_ID
    token_at[heads] = CLS_ID

    emitted = np.flatnonzero(token_at >= 0)
    return Tokens(token_at[emitted], np.append(np.searchsorted(emitted, heads), len(emitted)))


def _spread(starts: np.ndarray, counts: np.ndarray, step: int) -> np.ndarray:
    """For each start: start, start + step, ... `counts` of them."""
    before = np.cumsum(counts) - counts
    return np.repeat(starts - before * step, counts) + np.arange(counts.sum()) * step


def _tokenize_one_by_one(sequences: Sequence[str]) -> Tokens:
    """The same for text with spelled-out special tokens or non-ASCII letters."""
    values: list[int] = []
    offsets = [0]
    for sequence in sequences:
        values.append(CLS_ID)
        in_other = False
        for match in _PATTERN.finditer(sequence):
            token = match.group()
            if match.group(1) is not None:
                if not in_other:
                    values.append(UNK_ID)
                in_other = True
                continue
            in_other = False
            if not token[0].isspace():
                values.append(_IDS[token])
        offsets.append(len(values))
    return Tokens(np.array(values, np.int32), np.array(offsets, np.int64))


def save_tokenizer(folder: str | Path) -> None:
    """Write the vocabulary into a model folder, in the format that `AutoTokenizer` loads."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY), encoding="ascii")
    names = dict(
        cls_token="<cls>", eos_token=None, mask_token="<mask>", pad_token="<pad>", unk_token="<unk>"
    )
    config = {"tokenizer_class": "EsmTokenizer", "model_max_length": 1000, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(names, indent=2) + "\n")


def load_tokenizer(folder: str | Path | None = None) -> "EsmTokenizer":
    """The vocabulary as a Hugging Face tokenizer.

    Args:
        folder: a model folder; None uses the built-in vocabulary.
    """
    from transformers import EsmTokenizer

    if folder is not None:
        return EsmTokenizer.from_pretrained(folder)
    with TemporaryDirectory() as temporary:
        save_tokenizer(temporary)
        return EsmTokenizer.from_pretrained(temporary)
