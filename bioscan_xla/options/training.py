"""Options of fine-tuning and pre-training."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError
from ..reads.lineages import HEADER_STYLES, RANKS
from .checks import (
    DEFAULT_MODEL,
    DEVICES,
    DTYPES,
    TRACKERS,
    check_choices,
    check_least,
    check_positive,
    check_shares,
    set_list,
)

RANK_WEIGHTS = (2.0, 1.8, 1.5, 1.2, 1.0, 0.8, 0.6)
"""Weight of each rank in the loss, kingdom to species."""

WHOLE_MONITORS = ("mean_accuracy", "hierarchical_distance", "inconsistent")
MONITORS = ("accuracy", "macro_f1", "top3", "calibration_error")
"""Figures of all ranks together, and of one."""

LOWER_IS_BETTER = ("hierarchical_distance", "inconsistent", "calibration_error")


def _check_monitor(name: str) -> None:
    """Refuse a name that is not a figure of an evaluation."""
    rank, _, figure = name.rpartition("/")
    good = figure in MONITORS if rank in RANKS else name in WHOLE_MONITORS
    if not good:
        raise ConfigError(
            f"monitor {name!r} is unknown; choose {', '.join(WHOLE_MONITORS)}, or a rank and one "
            f"of {', '.join(MONITORS)}, as in species/accuracy"
        )


@dataclass(frozen=True)
class FinetuneConfig:
    """Fine-tune a LoRA adapter and seven taxonomy heads on labelled sequences.

    Run it again with the same options to resume from the last checkpoint.
    """

    train: list[str] | str = ()  # type: ignore[assignment]
    """Labelled sequences: Parquet, FASTA or FASTQ; files, a glob, a folder or a URL."""

    eval: list[str] | str = ()  # type: ignore[assignment]
    """Labelled sequences to evaluate on; by default part of the training data."""

    output: str = "model"
    """Folder for the model, its checkpoints and its report."""

    model: str = DEFAULT_MODEL
    """The base model: a Hugging Face id (owner/name), a folder, or bioscan-small, an encoder of
    2 MB that comes with the package."""

    revision: str | None = None
    """Commit of the model on the hub; by default the newest."""

    device: str = "auto"
    """auto (TPU, then GPU, then CPU), xla, cuda or cpu."""

    dtype: str | None = None
    """bfloat16 or float32, of the frozen base; the adapter and the heads are float32."""

    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    """Column names of the file, where they differ: dna_sequence=seq genus=Genus."""

    header_taxonomy: str | None = None
    """Read the lineage from FASTA headers: sintax or silva."""

    taxonomy: str | None = None
    """QIIME 2 taxonomy TSV (Feature ID, Taxon), joined by sequence id."""

    min_sequences: int = 2
    """A class with fewer sequences is not learned; its sequences still count at the ranks above."""

    labels: str | None = None
    """A labels.json with the classes to learn; by default those of the training sequences."""

    start: str | None = None
    """Output folder of fine-tuning, or of federate merge, to go on from, with its classes."""

    eval_fraction: float = 0.1
    """Share of the distinct sequences held out where no eval file is given."""

    identity: float = 1.0
    """Sequences about this similar never end up on both sides; 1 means identical ones only."""

    novel_rank: str | None = None
    """Hold out whole genera (genus) or families (family) as novel."""

    novel_fraction: float = 0.1
    """Share of that rank's taxa held out."""

    rank: int = 16
    """LoRA rank r."""

    alpha: int = 32
    """LoRA alpha."""

    dropout: float = 0.1
    """Dropout in the adapter and before each head."""

    targets: list[str] = ("query", "value")  # type: ignore[assignment]
    """Layers that get an adapter; in a model without layers the embeddings of its tokens."""

    freeze_a: bool = False
    """Train only LoRA's B, which starts at zero, and leave the random A as it is drawn."""

    rank_weights: list[float] = RANK_WEIGHTS  # type: ignore[assignment]
    """Weight of each rank in the loss, kingdom to species."""

    label_smoothing: float = 0.0
    """Share of the target spread over all classes."""

    class_balance: float = 0.0
    """Strength of the logit adjustment by class frequency; 0 is none, 1 is full."""

    consistency: float = 0.0
    """Weight of a loss term that draws each rank's prediction to its child's."""

    reverse_complement: float = 0.0
    """Share of training sequences read from the other strand: 0.5 where strands are mixed."""

    frame_shift: bool = True
    """Drop 0 to 5 leading bases of training sequences, as 6-mer tokens change with the frame; false
    leaves them whole."""

    frames: int | str | None = None
    """1; 6 for the mean over the reading frames; random to train on one of them, drawn again each
    time, and read all six. By default as the model's configuration says."""

    strands: str | None = None
    """given, or both for the mean over both strands (trained on either); default the model's."""

    crop: float = 0.0
    """Share of training sequences cut to a random amplicon of 100 bp or more."""

    num_epochs: int = 10
    """Passes over the training sequences."""

    batch_size: int = 32
    """Sequences per step, over all processes; a few less in some, so that steps are alike."""

    accumulate: int = 1
    """Batches whose gradients are added before an update."""

    optimizer: str = "adamw"
    """adamw, or sgd (plain, without momentum)."""

    learning_rate: float = 2e-4
    """Peak learning rate."""

    warmup_steps: int = 500
    """Updates with rising learning rate, at most a tenth of all; then it falls along a cosine."""

    weight_decay: float = 0.01
    """Decoupled decay of matrices; biases and norms have none."""

    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""

    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them."""

    seed: int = 0
    """Seed of splits, order, augmentation, dropout and initial weights."""

    resume: bool = True
    """Resume from the last checkpoint in the output folder; false deletes them and starts over."""

    checkpoint_minutes: float = 30.0
    """Save at least this often, and after every epoch."""

    keep_checkpoints: int = 2
    """How many of the last checkpoints stay; the best always does."""

    eval_steps: int | None = None
    """Evaluate every so many updates, besides after every epoch."""

    monitor: str = "mean_accuracy"
    """What decides the best model: mean_accuracy, hierarchical_distance, RANK/accuracy, ..."""

    patience: int | None = None
    """Stop after this many evaluations without a better `monitor`; by default never."""

    save_merged: bool = False
    """Also save the base with the adapter merged in, in `merged/`."""

    push_to_hub: str | None = None
    """Hub repository to upload the finished folder to (token from HF_TOKEN)."""

    tracker: str = "none"
    """none, wandb (key from WANDB_API_KEY) or tensorboard."""

    wandb_project: str = "global-bioscan-lora"
    """Project at Weights & Biases."""

    def __post_init__(self):
        """Normalise and check what needs no file and no device."""
        for key in ("train", "eval", "targets"):
            set_list(self, key)
        object.__setattr__(self, "rank_weights", [float(weight) for weight in self.rank_weights])
        check_choices(
            self,
            {
                "device": DEVICES,
                "dtype": DTYPES,
                "header_taxonomy": (None, *HEADER_STYLES),
                "frames": (None, 1, 6, "random"),
                "strands": (None, "given", "both"),
                "novel_rank": (None, "family", "genus"),
                "tracker": TRACKERS,
                "optimizer": ("adamw", "sgd"),
            },
        )
        ones = (
            "min_sequences",
            "rank",
            "num_epochs",
            "batch_size",
            "accumulate",
            "patience",
            "keep_checkpoints",
            "eval_steps",
        )
        check_least(self, dict.fromkeys(ones, 1) | {"warmup_steps": 0})
        shares = ("eval_fraction", "novel_fraction", "dropout", "label_smoothing")
        check_shares(self, [*shares, "reverse_complement", "crop"])
        if not 0.95 <= self.identity <= 1:
            raise ConfigError(f"identity is {self.identity}; it must be from 0.95 to 1")
        if self.frames == "random" and not self.frame_shift:
            raise ConfigError("frames random needs frame_shift, which draws them; turn it on")
        if self.consistency < 0:
            raise ConfigError(f"consistency is {self.consistency}; it must be at least 0")
        _check_monitor(self.monitor)
        if len(self.rank_weights) != 7 or min(self.rank_weights) < 0:
            raise ConfigError(
                "rank_weights must be seven numbers of at least 0, kingdom to species"
            )
        check_positive(self, ["learning_rate", "checkpoint_minutes", "max_grad_norm"])
        if self.start and Path(self.start).resolve() == Path(self.output).resolve():
            raise ConfigError(
                f"start and output are both {self.output}, and the run would write over the model "
                "that it starts from; name another --output"
            )

    @property
    def frames_read(self) -> int:
        """Frames that a vector is the mean over, once trained."""
        return 1 if self.frames in (None, 1) else 6

    @property
    def frames_trained(self) -> int:
        """Frames of each example in a training batch."""
        return 6 if self.frames == 6 else 1


@dataclass(frozen=True)
class PretrainConfig:
    """Pre-train a small encoder on unlabelled sequences, by masking 6-mers."""

    input: list[str] | str = ()  # type: ignore[assignment]
    """Parquet, FASTA or FASTQ: files, a glob, a folder, or a URL."""

    output: str = "encoder"
    """Folder for the model."""

    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    """Column names of the file, where they differ: dna_sequence=seq."""

    hidden: int = 256
    """Width of the encoder."""

    layers: int = 4
    """Layers of the encoder."""

    heads: int = 4
    """Attention heads of a layer."""

    num_epochs: float = 3.0
    """Passes over the distinct sequences."""

    max_steps: int | None = None
    """Stop after this many updates."""

    batch_size: int = 16
    """Sequences per step and device."""

    learning_rate: float = 5e-4
    """Peak; a short rise, then a cosine to zero."""

    device: str = "auto"
    """auto or cpu."""

    seed: int = 0
    """Seed of initial weights, order, masks and augmentation."""

    def __post_init__(self):
        """Normalise and check what needs no file and no device."""
        set_list(self, "input")
        check_choices(self, {"device": ("auto", "cpu")})
        check_least(
            self, dict.fromkeys(("hidden", "layers", "heads", "batch_size", "max_steps"), 1)
        )
        if self.hidden % self.heads:
            raise ConfigError(f"hidden {self.hidden} must be a multiple of heads {self.heads}")
        check_positive(self, ["learning_rate", "num_epochs"])
