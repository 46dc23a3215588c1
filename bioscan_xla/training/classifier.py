"""The classifier: encoder with LoRA adapter, the shared pooling, and a head for each rank.

Input: packed rows, or input as the Hugging Face tokenizer makes it.
Output: logits, one tensor a rank, highest rank first.
Invariants: the encoder is frozen in the dtype of the device; adapter and heads are float32.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from transformers import EsmModel

from ..encode.model import attach_saved_adapter, is_bag, load_model, token_states
from ..encode.model_files import adapter_reading, resolve_base
from ..encode.packing import FIRST_POSITION
from ..encode.pooling import count_tokens, mean_of_rows, pool
from ..encode.runtime import Device, enable_gradient_checkpointing
from ..errors import ModelError
from ..options import DEFAULT_MODEL, FinetuneConfig
from ..reads.labels import LabelSpace
from ..reads.lineages import RANKS
from ..reads.tokens import VOCABULARY

POOLING = "mean"
"""How the encoder's states become the vector that the heads see."""


class TaxonomyClassifier(nn.Module):
    """Encoder, pooling, seven heads (LayerNorm, dropout, linear) in float32.

    Attributes:
        labels: the classes of each rank.
        frames: reading frames that the vectors of whole sequences are the mean over.
        strands: `given` or `both`, likewise.
    """

    def __init__(
        self,
        encoder: nn.Module,
        hidden: int,
        labels: LabelSpace,
        dropout: float = 0.1,
        frames: int = 1,
        strands: str = "given",
    ):
        """Take an EsmModel, with or without adapter, that attends by packed segments."""
        super().__init__()
        self.encoder = encoder
        self.labels = labels
        self.frames, self.strands = frames, strands
        self._bag: bool | None = None
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
        if runs is not None and input_ids.device.type == "cpu" and self._has_bag():
            table = token_states(self.encoder, len(VOCABULARY))  # fewer than a batch's tokens
            return mean_of_rows(table, input_ids, positions, FIRST_POSITION)
        states = self.encoder(
            input_ids=input_ids, position_ids=positions, segments=segments, runs=runs
        ).last_hidden_state
        return pool(states, positions, segments, num_segments, POOLING, FIRST_POSITION)

    def _has_bag(self) -> bool:
        if self._bag is None:
            encoder: Any = self.encoder
            base = encoder.get_base_model() if isinstance(encoder, PeftModel) else encoder
            self._bag = is_bag(base)
        return self._bag

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
        frames: int = 1,
    ) -> tuple[torch.Tensor, ...]:
        """Logits, for each rank (rows * num_segments / frames, classes).

        Args:
            input_ids: (rows, tokens).
            positions: (rows, tokens), or None for one sequence a row, as the Hugging Face tokenizer
                gives it with `attention_mask`.
            segments: (rows, tokens), filler -1.
            num_segments: segments a row can hold.
            runs: see `packing.Batch`.
            attention_mask: (rows, tokens), 1 for tokens; only without positions and segments.
            frames: so many neighbouring rows, or segments of a single row, are the frames of
                the same sequences; their token-weighted mean is taken.
        """
        if positions is None or segments is None:
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            segments = mask - 1  # 0 for tokens, -1 for filler
            counting = torch.arange(input_ids.shape[1], device=input_ids.device) + FIRST_POSITION
            positions = torch.where(mask > 0, counting, FIRST_POSITION - 1)
        vectors = self.vectors(input_ids, positions, segments, num_segments, runs)
        if frames > 1:
            num_tokens = _by_example(count_tokens(segments, num_segments)[..., None], frames)
            total = (_by_example(vectors, frames) * num_tokens).sum(1)
            return self.classify(total / num_tokens.sum(1).clamp(min=1))
        return self.classify(vectors.flatten(0, 1))


def _by_example(values: torch.Tensor, frames: int) -> torch.Tensor:
    """(rows, segments, size) as (examples, frames, size)."""
    if len(values) == 1:
        return values[0].unflatten(0, (-1, frames))
    return values.unflatten(0, (-1, frames)).transpose(1, 2).flatten(0, 1)


def attach_adapter(
    model: EsmModel,
    *,
    rank: int = 16,
    alpha: int = 32,
    dropout: float = 0.1,
    targets: Sequence[str] = ("query", "value"),
    freeze_a: bool = False,
) -> PeftModel:
    """Freeze a model and put a float32 LoRA adapter beside its target layers.

    With `freeze_a` only the factor that starts at zero is trained.

    Reference: Hu et al. (2021), https://arxiv.org/abs/2106.09685
    """
    model.requires_grad_(False)
    tuned = get_peft_model(
        model,
        LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(targets)),
    )
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if freeze_a:
        for name, parameter in tuned.named_parameters():
            if is_drawn(name):
                parameter.requires_grad = False
                # PEFT rounds it to the type of the base model, which sites may load in another.
                parameter.data = parameter.data.bfloat16().float()
    return tuned


class _Intermediate(nn.Module):
    """EsmIntermediate with the exact GELU as one operation; the library's takes five."""

    def __init__(self, dense: nn.Linear):
        super().__init__()
        self.dense = dense

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return F.gelu(self.dense(hidden_states))


def is_drawn(name: str) -> bool:
    """Whether a tensor is the factor of an adapter that starts at random: A.

    Of embeddings it is the one that PEFT calls B; the other factor starts at zero.
    """
    return ".lora_A" in name or ".lora_embedding_B" in name


def build_classifier(
    base: EsmModel, device: Device, labels: LabelSpace, config: FinetuneConfig
) -> TaxonomyClassifier:
    """A base model with a new adapter and new heads, for training."""
    if config.gradient_checkpointing:
        enable_gradient_checkpointing(device, base)
    if device.kind != "xla":  # whose compiler fuses it
        layer: Any
        for layer in base.encoder.layer:
            layer.intermediate = _Intermediate(layer.intermediate.dense)
    adapted = attach_adapter(
        base,
        rank=config.rank,
        alpha=config.alpha,
        dropout=config.dropout,
        targets=config.targets,
        freeze_a=config.freeze_a,
    )
    return TaxonomyClassifier(
        adapted,
        base.config.hidden_size,
        labels,
        config.dropout,
        config.frames_read,
        config.strands or "given",
    ).train()


def fit_to_model(config: FinetuneConfig, base: Any) -> FinetuneConfig:
    """The options, with those left open filled in from the model's configuration."""
    targets = config.targets
    if not base.num_hidden_layers and targets == ["query", "value"]:
        targets = ["word_embeddings"]
    return dataclasses.replace(
        config,
        frames=config.frames or getattr(base, "frames", None),
        strands=config.strands or getattr(base, "strands", None),
        targets=targets,
    )


def count_parameters(module: nn.Module) -> tuple[int, int]:
    """Trainable parameters, and all."""
    trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return trainable, sum(p.numel() for p in module.parameters())


def check_model_folder(folder: Path) -> None:
    """ModelError where a folder lacks a file of a trained model."""
    for name in ("adapter/adapter_config.json", "heads.safetensors", "labels.json"):
        if not (folder / name).is_file():
            raise ModelError(
                f"{folder}: has no {name}; pass the output folder of fine-tuning. If that run was "
                "stopped, run its command again: it finishes the folder"
            )


def load_classifier(
    folder: str | Path, device: Device, model: str | None = None
) -> TaxonomyClassifier:
    """Load a fine-tuned model, in evaluation mode.

    Args:
        folder: the output folder of fine-tuning.
        device: an opened device.
        model: the base model, if it has moved since training.

    Raises:
        ModelError: a file is missing or does not fit.
        InputError: `labels.json` is not a label space.
    """
    folder = Path(folder)
    check_model_folder(folder)
    labels = LabelSpace.load(folder / "labels.json")
    base, revision = resolve_base(model or DEFAULT_MODEL, None, str(folder))
    esm = load_model(base, device.dtype, revision)
    tuned = attach_saved_adapter(esm, folder)
    classifier = TaxonomyClassifier(
        tuned, esm.config.hidden_size, labels, **adapter_reading(str(folder))
    )
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
