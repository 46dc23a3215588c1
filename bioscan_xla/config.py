"""Options: one frozen dataclass a command, checked once. `command_line` makes them from flags."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import ConfigError


@dataclass(frozen=True)
class EmbedConfig:
    """Embed sequences into a LanceDB table of vectors.

    Run it again with the same options to resume: what is in the table is not computed again.
    """

    input: list[str] | str = ()  # type: ignore[assignment]
    """Parquet, FASTA or FASTQ: files, a glob, a folder, or a gs://, s3://, az://, hf:// URL."""

    db: str = "embeddings.db"
    """LanceDB database: a local folder, or a gs:// or s3:// URL."""

    table: str = "embeddings"
    """Name of the table."""

    mirror: str | None = None
    """Folder (a mounted Google Drive, say) that gets a copy of the database every half hour."""

    model: str = "InstaDeepAI/nucleotide-transformer-2.5b-multi-species"
    """Hugging Face id or local folder of a Nucleotide Transformer (version 1)."""

    revision: str | None = None
    """Commit of the model on the hub; by default that of the table, for a new table the newest."""

    adapter: str | None = None
    """Folder of a LoRA adapter, merged into the model."""

    pooling: str = "mean"
    """mean (the model card's recipe), mean_no_special, cls or max."""

    layer: int = -1
    """Hidden state to pool: -1 the last, 0 the embeddings, k the output of layer k."""

    overlap_tokens: int = 100
    """Tokens that neighbouring windows share in sequences longer than the model's 1,000 tokens."""

    device: str = "auto"
    """auto (TPU, then GPU, then CPU), xla, cuda or cpu."""

    dtype: str | None = None
    """bfloat16 or float32; by default bfloat16 where the device multiplies it natively."""

    shard_parameters: bool = False
    """XLA only: divide the weights over the devices, for a model too large for one of them."""

    vector_dtype: str = "float16"
    """float16 or float32: how vectors are stored."""

    store_sequences: bool = True
    """Also store the cleaned sequence."""

    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    """Column names of the file, where they differ: {dna_sequence: seq, depth: depth_m}."""

    keep: list[str] = ()  # type: ignore[assignment]
    """Further Parquet columns to carry into the table."""

    header_taxonomy: str | None = None
    """Read the lineage from FASTA headers: sintax or silva."""

    min_length_bp: int = 20
    """Shorter sequences are set aside."""

    max_n_fraction: float = 0.5
    """Sequences with a larger share of N are set aside."""

    max_errors: int | None = None
    """Stop when more records than this had to be set aside; by default never."""

    max_sequences: int | None = None
    """Embed at most this many sequences in this run."""

    commit_rows: int = 10_000
    """Commit when this many rows wait."""

    commit_minutes: float = 30.0
    """Commit at least this often."""

    vector_index: bool = False
    """Build a vector index (IVF_RQ, cosine) at the end; worth it from 100,000 rows."""

    wandb: bool = False
    """Report to Weights & Biases (key from WANDB_API_KEY; WANDB_MODE=offline works)."""

    wandb_project: str = "bioscan_xla"
    """Project at Weights & Biases."""

    process_index: int = 0
    """Of several processes that share the input, which this is."""

    process_count: int = 1
    """How many processes share the input."""

    dry_run: bool = False
    """Read a part of the input, print the plan, compute nothing."""

    def __post_init__(self):
        """Normalise and check what needs no file and no device."""
        inputs = [self.input] if isinstance(self.input, str | Path) else list(self.input)
        object.__setattr__(self, "input", [str(item) for item in inputs])
        object.__setattr__(self, "keep", list(self.keep))
        _check_choices(
            self,
            {
                "pooling": ("mean", "mean_no_special", "cls", "max"),
                "device": ("auto", "xla", "cuda", "cpu"),
                "dtype": (None, "bfloat16", "float32"),
                "vector_dtype": ("float16", "float32"),
                "header_taxonomy": (None, "sintax", "silva"),
            },
        )
        ones = ("min_length_bp", "commit_rows", "process_count", "max_sequences")
        _check_least(self, dict.fromkeys(ones, 1) | {"overlap_tokens": 0, "max_errors": 0})
        if not 0 <= self.process_index < self.process_count:
            raise ConfigError(
                f"process_index {self.process_index} must lie between 0 and process_count - 1, "
                f"which is {self.process_count - 1}"
            )
        if not 0 <= self.max_n_fraction <= 1:
            raise ConfigError(f"max_n_fraction is {self.max_n_fraction}; it is a share from 0 to 1")
        if self.commit_minutes <= 0:
            raise ConfigError(f"commit_minutes is {self.commit_minutes}; it must be above 0")


@dataclass(frozen=True)
class FinetuneConfig:
    """Fine-tune a LoRA adapter and seven taxonomy heads on labelled sequences.

    Run it again with the same options to resume from the last checkpoint.
    """

    train: list[str] | str = ()  # type: ignore[assignment]
    """Labelled sequences: Parquet, FASTA or FASTQ; files, a glob, a folder or a URL."""

    eval: list[str] | str = ()  # type: ignore[assignment]
    """Labelled sequences to evaluate on; by default a part of the training ones."""

    output: str = "model"
    """Folder for the model, its checkpoints and its report."""

    model: str = "InstaDeepAI/nucleotide-transformer-2.5b-multi-species"
    """Hugging Face id or local folder of the base model."""

    revision: str | None = None
    """Commit of the model on the hub; by default the newest."""

    device: str = "auto"
    """auto (TPU, then GPU, then CPU), xla, cuda or cpu."""

    dtype: str | None = None
    """bfloat16 or float32, of the frozen base; the adapter and the heads are float32."""

    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    """Column names of the file, where they differ: {dna_sequence: seq, genus: Genus}."""

    header_taxonomy: str | None = None
    """Read the lineage from FASTA headers: sintax or silva."""

    taxonomy: str | None = None
    """QIIME 2 taxonomy TSV (Feature ID, Taxon), joined by sequence id."""

    min_sequences: int = 2
    """A class with fewer sequences is unknown at its rank and still counts above it."""

    eval_fraction: float = 0.1
    """Share of the distinct sequences held out where no eval file is given."""

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
    """Layers that get an adapter."""

    rank_weights: list[float] = (2.0, 1.8, 1.5, 1.2, 1.0, 0.8, 0.6)  # type: ignore[assignment]
    """Weight of each rank in the loss, kingdom to species."""

    label_smoothing: float = 0.0
    """Share of the target spread over all classes."""

    class_balance: float = 0.0
    """Strength of the logit adjustment by class frequency; 0 is none, 1 is full."""

    reverse_complement: float = 0.5
    """Share of training sequences that are read from the other strand."""

    frame_shift: bool = True
    """Drop 0 to 5 leading bases of training sequences: 6-mer tokens change with the frame."""

    crop: float = 0.0
    """Share of training sequences cut to a random amplicon of 100 bp or more."""

    num_epochs: int = 10
    """Passes over the training sequences."""

    batch_size: int = 32
    """Sequences a step, over all processes."""

    accumulate: int = 1
    """Batches whose gradients are added before an update."""

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
    """Of splits, order, augmentation, dropout and initial weights."""

    checkpoint_minutes: float = 30.0
    """Save at least this often, and after every epoch."""

    keep_checkpoints: int = 2
    """How many of the last checkpoints stay; the best always does."""

    patience: int | None = None
    """Stop after this many epochs without a better mean accuracy; by default never."""

    save_merged: bool = False
    """Also save the base with the adapter merged in, in `merged/`."""

    push_to_hub: str | None = None
    """Hub repository that gets the finished folder (token from HF_TOKEN)."""

    tracker: str = "none"
    """none, wandb (key from WANDB_API_KEY) or tensorboard."""

    wandb_project: str = "global-bioscan-lora"
    """Project at Weights & Biases."""

    def __post_init__(self):
        """Normalise and check what needs no file and no device."""
        for key in ("train", "eval"):
            value = getattr(self, key)
            inputs = [value] if isinstance(value, str | Path) else list(value or ())
            object.__setattr__(self, key, [str(item) for item in inputs])
        object.__setattr__(self, "targets", list(self.targets))
        object.__setattr__(self, "rank_weights", [float(weight) for weight in self.rank_weights])
        _check_choices(
            self,
            {
                "device": ("auto", "xla", "cuda", "cpu"),
                "dtype": (None, "bfloat16", "float32"),
                "header_taxonomy": (None, "sintax", "silva"),
                "novel_rank": (None, "family", "genus"),
                "tracker": ("none", "wandb", "tensorboard"),
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
        )
        _check_least(self, dict.fromkeys(ones, 1) | {"warmup_steps": 0})
        for key in (
            "eval_fraction",
            "novel_fraction",
            "dropout",
            "label_smoothing",
            "reverse_complement",
            "crop",
        ):
            if not 0 <= getattr(self, key) <= 1:
                raise ConfigError(f"{key} is {getattr(self, key)}; it is a share from 0 to 1")
        if len(self.rank_weights) != 7 or min(self.rank_weights) < 0:
            raise ConfigError(
                "rank_weights must be seven numbers of at least 0, kingdom to species"
            )
        if self.learning_rate <= 0 or self.checkpoint_minutes <= 0 or self.max_grad_norm <= 0:
            raise ConfigError("learning_rate, checkpoint_minutes and max_grad_norm must be above 0")


def _check_choices(config: Any, choices: Mapping[str, tuple]) -> None:
    for key, known in choices.items():
        if getattr(config, key) not in known:
            names = ", ".join(name for name in known if name)
            raise ConfigError(f"{key} {getattr(config, key)!r} is unknown; choose {names}")


def _check_least(config: Any, least: Mapping[str, int]) -> None:
    for key, lowest in least.items():
        value = getattr(config, key)
        if value is not None and value < lowest:
            raise ConfigError(f"{key} is {value}; it must be at least {lowest}")
