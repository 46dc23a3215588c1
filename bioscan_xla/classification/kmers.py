"""Candidates by shared words: an inverted index of the distinct 8-mers of the references.

Input: cleaned sequences. Output: for each query the references that share most of its words.
Invariants: exact (every reference is counted); ties go to the lower reference number.
"""

from collections.abc import Sequence

import numpy as np

WORD_BP = 8
_FEWEST_WORDS = 30  # a shorter sequence is not favoured for being short
_COMMON = 1 / 8
_CODES = np.full(256, 4, np.uint8)
_CODES[np.frombuffer(b"ACGT", np.uint8)] = range(4)
_COMPLEMENT = str.maketrans("ACGT", "TGCA")


def reverse_complement(sequence: str) -> str:
    """The other strand of an upper-case ACGTN sequence."""
    return sequence.translate(_COMPLEMENT)[::-1]


def distinct_words(sequence: str) -> np.ndarray:
    """Numbers of the distinct 8-mers of a sequence, sorted, int32; a word with N does not count."""
    letters = _CODES[np.frombuffer(sequence.encode(), np.uint8)]
    if len(letters) < WORD_BP:
        return np.zeros(0, np.int32)
    length = len(letters) - WORD_BP + 1
    words = np.zeros(length, np.int32)
    bad = np.zeros(length, bool)
    for place in range(WORD_BP):
        part = letters[place : place + length]
        words = words * 4 + (part & 3)
        bad |= part > 3
    found = np.zeros(4**WORD_BP, bool)  # several times as fast as sorting them
    found[words[~bad]] = True
    return np.flatnonzero(found).astype(np.int32)


class KmerIndex:
    """Postings of each 8-mer: 4 bytes for each distinct word of each reference.

    A word that more than an eighth of the references have is a row of bytes instead, one for each
    reference: rows are added up several times as fast as postings are counted.

    15,000 references of 500 bp take about 40 MB, 70,000 of 1,500 bp about 600 MB.
    """

    def __init__(self, sequences: Sequence[str]):
        """Index the references; `sequences` are upper-case ACGTN."""
        words = [distinct_words(text) for text in sequences]
        self.num_words = np.fromiter(map(len, words), np.int64, len(words))
        counts = np.zeros(4**WORD_BP, np.int64)
        for found in words:
            counts[found] += 1
        common = np.flatnonzero(counts > _COMMON * len(words))
        self._row_of = np.full(4**WORD_BP, -1, np.int32)
        self._row_of[common] = np.arange(len(common))
        self._rows = np.zeros((len(common), len(words)), np.uint8)
        counts[common] = 0
        self._starts = np.append(0, np.cumsum(counts))
        self._postings = np.empty(self._starts[-1], np.int32)
        ends = self._starts[:-1].copy()
        for number, found in enumerate(words):
            row = self._row_of[found]
            self._rows[row[row >= 0], number] = 1
            found = found[row < 0]
            self._postings[ends[found]] = number
            ends[found] += 1

    @property
    def num_bytes(self) -> int:
        """Memory that the index takes."""
        parts = (self._postings, self._starts, self.num_words, self._rows, self._row_of)
        return sum(part.nbytes for part in parts)

    def scores(self, sequence: str) -> np.ndarray:
        """Shared distinct words over the fewer of the two (at least 30), (references,) float32."""
        words = distinct_words(sequence)
        rows = self._row_of[words]
        shared = np.zeros(len(self.num_words), np.int64)
        lists = [
            self._postings[self._starts[word] : self._starts[word + 1]]
            for word in words[rows < 0].tolist()
        ]
        if lists:
            shared += np.bincount(np.concatenate(lists), minlength=len(shared))
        rows = rows[rows >= 0]
        for first in range(0, len(rows), 255):  # so that the sum fits into a byte
            shared += self._rows[rows[first : first + 255]].sum(0, dtype=np.uint8)
        fewer = np.maximum(np.minimum(self.num_words, len(words)), _FEWEST_WORDS)
        return (shared / fewer).astype(np.float32)


def best_numbers(scores: np.ndarray, k: int) -> np.ndarray:
    """Numbers of the k largest scores above 0, best first; ties by number."""
    if k < len(scores):
        limit = np.partition(scores, len(scores) - k)[len(scores) - k]
        found = np.flatnonzero((scores >= limit) & (scores > 0))
    else:
        found = np.flatnonzero(scores > 0)
    return found[np.argsort(-scores[found], kind="stable")][:k]
