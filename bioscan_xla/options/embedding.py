"""Options of embedding and of searching its table."""

import dataclasses
from dataclasses import dataclass

from ..errors import ConfigError
from ..reads.lineages import HEADER_STYLES
from .checks import (
    DEFAULT_MODEL,
    DEVICES,
    INFERENCE_DTYPES,
    TRACKERS,
    check_choices,
    check_least,
    check_positive,
    check_shares,
    set_list,
)


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

    model: str = DEFAULT_MODEL
    """A Nucleotide Transformer of version 1: its Hugging Face id (owner/name) or folder. Or
    bioscan-small, an encoder of 2 MB that comes with the package."""

    revision: str | None = None
    """Commit of the model on the hub; by default that of the table, for a new table the newest."""

    adapter: str | None = None
    """Folder of a LoRA adapter, merged into the model (by default the one it was trained on)."""

    pooling: str = "mean"
    """mean (the model card's recipe), mean_no_special, cls or max."""

    layer: int = -1
    """Hidden state to pool: -1 the last, 0 the embeddings, k the output of layer k."""

    overlap_tokens: int = 100
    """Tokens that neighbouring windows share in sequences longer than the model's 1,000 tokens."""

    frames: int | None = None
    """Reading frames: 1, or 6 for the mean over all (six times the tokens); default the model's."""

    strands: str | None = None
    """given, or both for the mean over both strands (twice the tokens); default the model's."""

    device: str = "auto"
    """auto (TPU, then GPU, then CPU), xla, cuda or cpu."""

    dtype: str | None = None
    """bfloat16 (default where the device multiplies it natively), float32, or int8 (CPU only)."""

    shard_parameters: bool = False
    """XLA only: divide the weights over the devices, for a model too large for one of them."""

    vector_dtype: str = "float16"
    """float16 or float32: how vectors are stored."""

    store_sequences: bool = True
    """Also store the cleaned sequence; false leaves it out."""

    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    """Column names of the file, where they differ: dna_sequence=seq depth=depth_m."""

    keep: list[str] = ()  # type: ignore[assignment]
    """Further Parquet columns to carry into the table."""

    header_taxonomy: str | None = None
    """Read the lineage from FASTA headers: sintax or silva."""

    min_length_bp: int = 20
    """Shorter sequences are rejected."""

    max_n_fraction: float = 0.5
    """Sequences with a larger share of N are rejected."""

    max_errors: int | None = None
    """Stop when more records than this are rejected; by default never."""

    max_sequences: int | None = None
    """Embed at most this many sequences in this run."""

    commit_rows: int = 10_000
    """Commit when this many rows are waiting."""

    commit_minutes: float = 30.0
    """Commit at least this often."""

    vector_index: bool = False
    """Build a vector index (IVF_RQ, cosine) at the end; worth it from 100,000 rows."""

    tracker: str = "none"
    """none, wandb (key from WANDB_API_KEY; WANDB_MODE=offline works) or tensorboard."""

    wandb_project: str = "bioscan_xla"
    """Project at Weights & Biases."""

    engine: str = "local"
    """local (this process, one device) or ray (workers of a Ray cluster, or of this machine)."""

    workers: int | None = None
    """ray only: how many workers; by default one per TPU host, GPU or CPU host."""

    process_index: int = 0
    """Number of this process, from 0, of those that share the input."""

    process_count: int = 1
    """How many processes share the input."""

    reshare: bool = False
    """Take over a table that another number of processes filled, or processes with other files;
    none of them may still run."""

    dry_run: bool = False
    """Read part of the input, print the plan, compute nothing."""

    def __post_init__(self):
        """Normalise and check what needs no file and no device."""
        set_list(self, "input")
        set_list(self, "keep")
        check_choices(
            self,
            {
                "frames": (None, 1, 6),
                "strands": (None, "given", "both"),
                "pooling": ("mean", "mean_no_special", "cls", "max"),
                "device": DEVICES,
                "dtype": INFERENCE_DTYPES,
                "vector_dtype": ("float16", "float32"),
                "header_taxonomy": (None, *HEADER_STYLES),
                "tracker": TRACKERS,
                "engine": ("local", "ray"),
            },
        )
        ones = ("min_length_bp", "commit_rows", "process_count", "max_sequences", "workers")
        check_least(self, dict.fromkeys(ones, 1) | {"overlap_tokens": 0, "max_errors": 0})
        if self.workers is not None and self.engine == "local":
            raise ConfigError("workers belongs to --engine ray; add it, or remove workers")
        if not 0 <= self.process_index < self.process_count:
            raise ConfigError(
                f"process_index {self.process_index} must lie between 0 and process_count - 1, "
                f"which is {self.process_count - 1}"
            )
        check_shares(self, ["max_n_fraction"])
        check_positive(self, ["commit_minutes"])


@dataclass(frozen=True)
class SearchConfig:
    """Nearest neighbours of DNA sequences in a table made by `python -m bioscan_xla.embed`."""

    query: list[str] = ()  # type: ignore[assignment]
    """Sequences, or FASTA and FASTQ files."""

    db: str = "embeddings.db"
    """LanceDB database: a local folder, or a gs:// or s3:// URL."""

    table: str = "embeddings"
    """Name of the table."""

    k: int = 10
    """Rows per query."""

    where: str | None = None
    """SQL condition on the columns, such as "depth > 1000"."""

    format: str = "table"
    """table (for people), csv or json."""

    model: str | None = None
    """Folder of the model, if it has moved since the table was made."""

    adapter: str | None = None
    """Folder of the adapter, if it has moved since the table was made."""

    device: str = "auto"
    """auto (TPU, then GPU, then CPU), xla, cuda or cpu."""

    def __post_init__(self):
        """Normalise and check what needs no file and no device."""
        set_list(self, "query")
        check_choices(self, {"format": ("table", "csv", "json"), "device": DEVICES})
        check_least(self, {"k": 1})
