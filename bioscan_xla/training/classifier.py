"""The classifier: encoder, the shared pooling, and one head for each of the seven ranks.

Enters: packed rows, or input as the Hugging Face tokenizer makes it. Leaves: logits, one tensor a
rank, highest rank first.
"""

import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from ..encode.model import attach_saved_adapter, load_model
from ..encode.model_files import resolve_base
from ..encode.packing import FIRST_POSITION
from ..encode.pooling import pool
from ..encode.runtime import Device
from ..errors import ModelError
from ..options import DEFAULT_MODEL
from ..reads.labels import LabelSpace
from ..reads.lineages import RANKS


class TaxonomyClassifier(nn.Module):
    """Encoder, pooling, seven heads (LayerNorm, dropout, linear) in float32.

    Attributes:
        labels: the classes of each rank.
    """

    def __init__(
        self,
        encoder: nn.Module,
        hidden: int,
        labels: LabelSpace,
        pooling: str = "mean",
        dropout: float = 0.1,
    ):
        """Take an EsmModel, with or without adapter, that attends by packed segments."""
        super().__init__()
        self.encoder = encoder
        self.labels = labels
        self.pooling = pooling
        self.heads = nn.ModuleDict(
            {
                rank: nn.Sequential(
                    nn.LayerNorm(hidden), nn.Dropout(dropout), nn.Linear(hidden, max(1, classes))
                )
                for rank, classes in zip(RANKS, labels.num_classes, strict=True)
            }
        )

    def vectors(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        segments: torch.Tensor,
        num_segments: int,
        runs: Any = None,
    ) -> torch.Tensor:
        """Pooled vectors of packed rows, (rows, num_segments, hidden) float32."""
        states = self.encoder(
            input_ids=input_ids, position_ids=positions, segments=segments, runs=runs
        ).last_hidden_state
        return pool(states, positions, segments, num_segments, self.pooling, FIRST_POSITION)

    def classify(self, vectors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Logits of pooled vectors (..., hidden): for each rank (..., classes)."""
        return tuple(head(vectors) for head in self.heads.values())

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor | None = None,
        segments: torch.Tensor | None = None,
        num_segments: int = 1,
        runs: Any = None,
        attention_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """Logits, for each rank (rows * num_segments, classes).

        Args:
            input_ids: (rows, tokens).
            positions: (rows, tokens), or None for one sequence a row, as the Hugging Face tokenizer
                gives it with `attention_mask`.
            segments: (rows, tokens), filler -1.
            num_segments: segments a row can hold.
            runs: see `batches.Batch`.
            attention_mask: (rows, tokens), 1 for tokens; only without positions and segments.
        """
        if positions is None or segments is None:
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            segments = mask - 1  # 0 for tokens, -1 for filler
            counting = torch.arange(input_ids.shape[1], device=input_ids.device) + FIRST_POSITION
            positions = torch.where(mask > 0, counting, FIRST_POSITION - 1)
        vectors = self.vectors(input_ids, positions, segments, num_segments, runs)
        return self.classify(vectors.flatten(0, 1))


def load_classifier(
    folder: str | Path, device: Device, model: str | None = None
) -> TaxonomyClassifier:
    """Load what fine-tuning left, in evaluation mode.

    Args:
        folder: the output folder of fine-tuning.
        device: an opened device.
        model: the base model, where it is no longer where it was at training.

    Raises:
        ModelError: a file is missing or does not fit.
        InputError: `labels.json` is no label space.
    """
    folder = Path(folder)
    for name in ("adapter/adapter_config.json", "heads.safetensors", "labels.json"):
        if not (folder / name).is_file():
            raise ModelError(f"{folder}: has no {name}; name the output folder of fine-tuning")
    labels = LabelSpace.load(folder / "labels.json")
    base, revision = resolve_base(model or DEFAULT_MODEL, None, str(folder))
    esm = load_model(base, device.dtype, revision)
    tuned = attach_saved_adapter(esm, folder)
    classifier = TaxonomyClassifier(tuned, esm.config.hidden_size, labels)
    heads = load_file(folder / "heads.safetensors")
    try:
        classifier.heads.load_state_dict(heads)
    except RuntimeError as error:
        raise ModelError(
            f"{folder}: heads.safetensors does not fit labels.json ({error})"
        ) from error
    return classifier.eval().to(device.torch_device)


def initial_log_priors(labels: LabelSpace, strength: float) -> list[torch.Tensor]:
    """Log frequency of each class times `strength`, for `loss.rank_loss`."""
    result = []
    for counts in labels.counts:
        total = sum(counts) or 1
        values = [strength * math.log(count / total) for count in counts] or [0.0]
        result.append(torch.tensor(values))
    return result
