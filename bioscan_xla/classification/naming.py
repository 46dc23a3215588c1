"""Queries to decisions: candidates, alignment, votes, one lineage each.

Input: cleaned sequences, and their vectors where there is a model. Output: a `Named` for each, in
their order. Invariants: the result for a sequence does not depend on the others.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from .evidence import (
    NO_HITS,
    Decision,
    Hits,
    collect_hits,
    decide,
    rank_features,
    vote_weights,
)
from .heads import HeadDecoder, Heads
from .kmers import KmerIndex, best_numbers, reverse_complement
from .reference import Reference

_VECTOR_BLOCK = 65_536  # references compared at a time

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Named:
    """A query with its evidence and decision.

    Attributes:
        sequence: on the strand that was taken.
        strand: `plus` or `minus`; None where nothing tells.
        hits: the evidence.
        decision: None where there is no evidence.
        features: (ranks, features), what confidence is computed from.
        by_heads: True where the heads decided alone and the hits are only shown beside the name.
    """

    sequence: str
    strand: str | None
    hits: Hits
    decision: Decision | None
    features: np.ndarray | None
    by_heads: bool = False


class Namer:
    """References indexed for queries."""

    def __init__(
        self,
        reference: Reference,
        *,
        num_candidates: int = 50,
        candidates: str = "both",
        min_coverage: float = 0.7,
        method: str = "neighbours",
        heads: Heads | None = None,
    ):
        """Index the references.

        Args:
            reference: labelled sequences.
            num_candidates: taken by words, and as many by vectors.
            candidates: `kmer`, `vector` or `both`; without vectors only words are used.
            min_coverage: share of the shorter sequence that an alignment must cover.
            method: what decides: `neighbours`, `heads` or `both`, or `argmax`, each head by itself.
            heads: of the model that made the vectors.
        """
        self.method, self.heads = method, heads
        self.reference = reference
        self.index = KmerIndex(reference.sequences)
        self.num_candidates, self.min_coverage = num_candidates, min_coverage
        self.use_words = candidates != "vector" or reference.vectors is None
        self.use_vectors = candidates != "kmer" and reference.vectors is not None
        self.nameless = [reference.tree.nameless(rank) for rank in range(7)]
        self.decoder = None
        if method != "neighbours":
            assert reference.class_leaves is not None
            assert heads is not None
            self.decoder = HeadDecoder(
                reference.tree, self.nameless, reference.class_leaves, heads.labels.num_classes
            )

    def orient(self, sequence: str, strand: str) -> tuple[str, str]:
        """The sequence on the strand that shares more words with its best reference, and which.

        Args:
            sequence: cleaned.
            strand: `both`, `plus` or `minus`.
        """
        if strand == "plus":
            return sequence, "plus"
        reverse = reverse_complement(sequence)
        if strand == "minus":
            return reverse, "minus"
        if not len(self.index.num_words):
            return sequence, "plus"
        plus, minus = self.index.scores(sequence).max(), self.index.scores(reverse).max()
        return (reverse, "minus") if minus > plus else (sequence, "plus")

    def candidates(
        self,
        sequence: str,
        cosines: np.ndarray | None = None,
        excluded: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Candidates of one query: numbers, shared words, cosines.

        Args:
            sequence: on the references' strand.
            cosines: (references,) of its vector with theirs.
            excluded: (references,) True for those that may not be taken.
        """
        words = self.index.scores(sequence)
        allowed = words if excluded is None else np.where(excluded, 0, words)
        numbers = best_numbers(allowed, self.num_candidates) if self.use_words else None
        if self.use_vectors and cosines is not None:
            allowed = cosines if excluded is None else np.where(excluded, -1, cosines)
            near = best_numbers(allowed, self.num_candidates)
            numbers = near if numbers is None else np.union1d(numbers, near)
        assert numbers is not None
        nothing = np.zeros(len(numbers), np.float32)
        return numbers, words[numbers], nothing if cosines is None else cosines[numbers]

    def name(
        self,
        sequence: str,
        strand: str = "plus",
        cosines: np.ndarray | None = None,
        excluded: np.ndarray | None = None,
        shares: Sequence[np.ndarray] | None = None,
    ) -> Named:
        """Name one query that lies on the references' strand; `strand` is only recorded.

        Without `shares`, what the heads say for each rank, the references decide alone.
        """
        found = self.candidates(sequence, cosines, excluded)
        hits = collect_hits(sequence, *found, self.reference.sequences, self.min_coverage)
        leaves = self.reference.leaves[hits.numbers]
        tree = self.reference.tree
        if self.decoder is not None and shares is not None:
            if self.method != "both":
                return self._by_heads(sequence, strand, hits, shares)
            # What aligns to nothing is perhaps of no group that the heads know: they cannot tell.
            if not len(leaves):
                return Named(sequence, strand, hits, None, None)
            decision = self.decoder.decide(shares, leaves, vote_weights(hits))
        elif len(leaves):
            decision = decide(tree, self.nameless, leaves, vote_weights(hits))
        else:
            return Named(sequence, strand, hits, None, None)
        features = rank_features(tree, self.nameless, hits, leaves, decision, len(sequence))
        return Named(sequence, strand, hits, decision, features)

    def _by_heads(
        self, sequence: str, strand: str, hits: Hits, shares: Sequence[np.ndarray]
    ) -> Named:
        """Name by the heads alone; the references are only shown beside the name."""
        decision, features = self.decide_by_heads(shares, len(sequence))
        return Named(sequence, strand, hits, decision, features, by_heads=True)

    def decide_by_heads(
        self, shares: Sequence[np.ndarray], length_bp: int
    ) -> tuple[Decision, np.ndarray]:
        """What the heads alone decide, and what its confidence is computed from."""
        assert self.decoder is not None
        none = np.zeros(0, np.int64)
        if self.method == "argmax":
            decision = self.decoder.decide_apart(shares)
        else:
            decision = self.decoder.decide(shares, none, None)
        tree = self.reference.tree
        features = rank_features(tree, self.nameless, NO_HITS, none, decision, length_bp)
        return decision, features

    def name_all(
        self,
        sequences: Sequence[str],
        strands: Sequence[str],
        vectors: np.ndarray | None = None,
    ) -> list[Named]:
        """Name queries that lie on the references' strand; vectors (queries, hidden)."""
        nothing = [None] * len(sequences)
        cosines: Iterable[np.ndarray | None] = nothing
        if vectors is not None and self.reference.vectors is not None:
            cosines = self.cosines(vectors)
        by_rank = self.heads.probabilities(vectors) if self.heads and vectors is not None else None
        shares = zip(*by_rank, strict=True) if by_rank is not None else nothing
        jobs = list(zip(sequences, strands, shares, strict=True))
        return list(
            in_threads(
                lambda job: self.name(job[0][0], job[0][1], job[1], shares=job[0][2]),
                zip(jobs, cosines, strict=True),
            )
        )

    def cosines(self, vectors: np.ndarray) -> Iterator[np.ndarray]:
        """Cosine with every reference, a query at a time, computed for some queries together."""
        from .reference import unit

        assert self.reference.vectors is not None
        queries = unit(vectors)
        for first in range(0, len(queries), 64):
            blocks = [
                queries[first : first + 64] @ self.reference.vectors[at : at + _VECTOR_BLOCK].T
                for at in range(0, len(self.reference.vectors), _VECTOR_BLOCK)
            ]
            yield from np.concatenate(blocks, axis=1)


def in_threads(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Apply a function on all cores, results in order; aligning releases the interpreter."""
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with ThreadPoolExecutor(threads or 1) as pool:
        waiting = []
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= 4 * (threads or 1):  # a query's cosines are not small
                yield waiting.pop(0).result()
        for future in waiting:
            yield future.result()
