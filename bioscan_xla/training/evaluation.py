"""A classifier's predictions for whole sequences, and how good they are.

Input: a classifier and sequences. Output: predictions, some vectors, figures.
Invariants: long sequences are read in full, as windows; nothing is augmented or cut; probabilities
are held for one batch of sequences at a time; every process has the same figures.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object

from ..encode import runtime
from ..encode.inference import prepare, run_jobs
from ..encode.packing import Batch, Layout, Totals, layout
from ..encode.sending import send_back
from .classifier import POOLING, TaxonomyClassifier
from .data import Data
from .metrics import Predictions, evaluate

_JOB_SEQUENCES = 2048
OVERLAP_TOKENS = 100
_MOST_VECTORS = 5000


@dataclass(frozen=True)
class Evaluated:
    """Predictions for the evaluation part.

    Attributes:
        predictions: of all sequences.
        vector_rows: (vectors,) sequences whose vectors were kept, evenly spaced.
        vectors: (vectors, hidden) float32.
    """

    predictions: Predictions
    vector_rows: np.ndarray
    vectors: np.ndarray


@dataclass(frozen=True)
class ClassifierVectors:
    """Gives `run_jobs` the input vectors of a classifier's heads."""

    classifier: TaxonomyClassifier
    device: runtime.Device
    max_tokens: int
    pooling: str = POOLING

    @property
    def layout(self) -> Layout:
        """How batches are shaped."""
        return layout(self.device.kind, self.device.num_devices, self.max_tokens)

    @property
    def hidden(self) -> int:
        """Length of a vector."""
        config: Any = self.classifier.encoder.config
        return config.hidden_size

    def encode(self, batch: Batch) -> Any:
        """Start computing a batch: (rows, num_segments, hidden) float32, on the device."""
        return send_back(self.device, self.trace(batch))

    @torch.no_grad()
    def trace(self, batch: Batch) -> torch.Tensor:
        """What `encode` computes; on XLA, computation has not started."""
        ids, positions, segments = (
            runtime.put(self.device, array)
            for array in (batch.input_ids, batch.positions, batch.segments)
        )
        return self.classifier.vectors(ids, positions, segments, batch.num_segments, batch.runs)


def predict(
    classifier: TaxonomyClassifier,
    device: runtime.Device,
    sequences: Sequence[str],
    max_tokens: int,
) -> tuple[list[np.ndarray], np.ndarray]:
    """Probabilities and vectors of some sequences at once; see `predict_batches`."""
    parts = list(predict_batches(classifier, device, sequences, max_tokens))
    if not parts:
        counts = classifier.labels.num_classes
        return [np.zeros((0, n), np.float32) for n in counts], np.zeros((0, 0), np.float32)
    ranks = zip(*(probabilities for probabilities, _ in parts), strict=True)
    return [np.concatenate(rank) for rank in ranks], np.concatenate([each for _, each in parts])


def predict_batches(
    classifier: TaxonomyClassifier,
    device: runtime.Device,
    sequences: Sequence[str],
    max_tokens: int,
) -> Iterator[tuple[list[np.ndarray], np.ndarray]]:
    """Probabilities and vectors of cleaned sequences, in their order.

    Args:
        classifier: on the device; left in the mode it was in.
        device: where it is.
        sequences: cleaned.
        max_tokens: the model's longest window.

    Yields:
        Of some thousand sequences at a time: for each rank (sequences, classes) float32, and the
        vectors (sequences, hidden) float32.
    """
    was_training = classifier.training
    classifier.eval()
    jobs = (
        prepare(
            number,
            None,
            sequences[first : first + _JOB_SEQUENCES],
            max_tokens,
            OVERLAP_TOKENS,
            classifier.frames,
            classifier.strands,
        )
        for number, first in enumerate(range(0, len(sequences), _JOB_SEQUENCES))
    )
    try:
        # The heads are small: on the host they cost nothing and compile nothing.
        heads = [copy.deepcopy(head).cpu() for head in classifier.heads.values()]
        counts = classifier.labels.num_classes
        for _, vectors, _ in run_jobs(
            ClassifierVectors(classifier, device, max_tokens), jobs, Totals()
        ):
            with torch.inference_mode():
                logits = [head(torch.from_numpy(vectors)) for head in heads]
                probabilities = [
                    torch.softmax(values, -1).numpy()[:, :count]
                    for values, count in zip(logits, counts, strict=True)
                ]
            yield probabilities, vectors
    finally:
        classifier.train(was_training)


def predict_part(
    accelerator: Any,
    classifier: TaxonomyClassifier,
    device: runtime.Device,
    sequences: Sequence[str],
    max_tokens: int,
) -> Evaluated:
    """Predictions for sequences, each process computing its share; whole in every process."""
    index, count = accelerator.process_index, accelerator.num_processes
    rows = np.arange(index, len(sequences), count)
    kept = np.linspace(0, len(sequences) - 1, min(len(sequences), _MOST_VECTORS)).astype(np.int64)
    parts, vectors, read = [], [np.zeros((0, 0), np.float32)], 0
    share = sequences[index::count]
    for probabilities, found in predict_batches(classifier, device, share, max_tokens):
        parts.append(Predictions.of(probabilities))
        is_kept = np.isin(rows[read : read + len(found)], kept)
        vectors = [each for each in vectors if len(each)] + [found[is_kept]]
        read += len(found)
    own = Evaluated(Predictions.join(parts), rows[np.isin(rows, kept)], np.concatenate(vectors))
    if count == 1:
        return own
    shares = [share for share in gather_object([(rows, own)]) if len(share[0])]
    if not shares:
        return own
    order = np.argsort(np.concatenate([rows for rows, _ in shares]))
    vector_rows = np.concatenate([share.vector_rows for _, share in shares])
    by_row = np.argsort(vector_rows)
    return Evaluated(
        Predictions.join([share.predictions for _, share in shares]).take(order),
        vector_rows[by_row],
        np.concatenate([share.vectors for _, share in shares if len(share.vectors)])[by_row],
    )


def evaluate_part(
    accelerator: Any,
    classifier: TaxonomyClassifier,
    device: runtime.Device,
    data: Data,
    max_tokens: int,
) -> dict[str, float]:
    """Figures of the evaluation part, the same in every process."""
    figures: list[dict[str, float]] = [{}]
    found = predict_part(accelerator, classifier, device, data.eval.sequences, max_tokens)
    if accelerator.is_main_process and len(data.eval):
        # Shows vectors that collapse or blow up before the accuracy falls.
        figures[0] = evaluate(found.predictions, data.eval_labels, data.space) | {
            "vector_norm": float(np.linalg.norm(found.vectors, axis=1).mean()),
            "vector_variance": float(found.vectors.var(0).mean()),
        }
    if accelerator.num_processes > 1:
        broadcast_object_list(figures)
    return figures[0]
