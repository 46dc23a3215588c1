"""A classifier's probabilities for whole sequences, over embed's road.

Enters: a classifier and sequences. Leaves: for each rank the probabilities of its classes.
Guaranteed: long sequences are seen whole, as windows; nothing is augmented or cut.
"""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..encode.encoder import Encoder
from ..encode.inference import prepare, run_jobs
from ..encode.packing import Totals
from ..encode.runtime import Device
from .classifier import TaxonomyClassifier

_JOB_SEQUENCES = 2048


def predict(
    classifier: TaxonomyClassifier,
    device: Device,
    sequences: Sequence[str],
    max_tokens: int,
    overlap_tokens: int = 100,
) -> tuple[list[np.ndarray], np.ndarray]:
    """Probabilities and vectors.

    Args:
        classifier: on the device; left in the mode it was in.
        device: where it is.
        sequences: cleaned.
        max_tokens: the model's longest window.
        overlap_tokens: what windows share.

    Returns:
        For each rank (sequences, classes) float32; and the vectors (sequences, hidden) float32.
    """
    was_training = classifier.training
    classifier.eval()
    # Whatever model it holds, an Encoder only calls it.
    model: Any = classifier.encoder
    encoder = Encoder(
        model,
        device,
        classifier.pooling,
        max_tokens,
        overlap_tokens,
        {},
    )
    jobs = (
        prepare(number, None, sequences[first : first + _JOB_SEQUENCES], max_tokens, overlap_tokens)
        for number, first in enumerate(range(0, len(sequences), _JOB_SEQUENCES))
    )
    probabilities: list[list[np.ndarray]] = [[] for _ in classifier.heads]
    vectors: list[np.ndarray] = []
    try:
        # The heads are small: on the host they cost nothing and compile nothing.
        heads = [_on_host(head) for head in classifier.heads.values()]
        for _, found, _ in run_jobs(encoder, jobs, Totals()):
            vectors.append(found)
            with torch.inference_mode():
                for rank, head in enumerate(heads):
                    logits = head(torch.from_numpy(found))
                    probabilities[rank].append(torch.softmax(logits, -1).numpy())
    finally:
        classifier.train(was_training)
    counts = classifier.labels.num_classes
    if not vectors:
        return [np.zeros((0, n), np.float32) for n in counts], np.zeros((0, 0), np.float32)
    joined = [
        np.concatenate(parts)[:, :count] for parts, count in zip(probabilities, counts, strict=True)
    ]
    return joined, np.concatenate(vectors)


def _on_host(head: torch.nn.Module) -> torch.nn.Module:
    return copy.deepcopy(head).cpu()
