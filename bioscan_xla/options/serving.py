"""Options of serve."""

import dataclasses
import re
from dataclasses import dataclass

from ..errors import ConfigError
from ..reads.lineages import HEADER_STYLES
from .checks import DEVICES, INFERENCE_DTYPES, check_choices, check_least, check_positive, set_list
from .classification import ClassifyConfig


@dataclass(frozen=True)
class ServeConfig:
    """Serve vectors, names and neighbours over HTTP, as OpenAI's clients speak it.

    Keys come from the environment: BIOSCAN_API_KEY for clients, BIOSCAN_ADMIN_KEY for loading
    models.
    """

    model: str | None = None
    """Hugging Face id, folder or bioscan-small; by default the one that made the reference."""

    adapter: str | None = None
    """Folder of a LoRA adapter, merged into the model (by default the one it was trained on)."""

    name: str | None = None
    """What clients call the model; by default the last part of its id or folder."""

    also: dict[str, str] = dataclasses.field(default_factory=dict)
    """Further models or output folders of fine-tuning: NAME=FOLDER."""

    revision: str | None = None
    """Commit of the model on the hub; by default the newest."""

    pooling: str = "mean"
    """mean, mean_no_special, cls or max."""

    layer: int = -1
    """Hidden state to pool: -1 the last, 0 the embeddings, k the output of layer k."""

    overlap_tokens: int = 100
    """Tokens that neighbouring windows share in sequences longer than the model's 1,000 tokens."""

    frames: int | None = None
    """Reading frames: 1, or 6 for the mean over all; by default the model's."""

    strands: str | None = None
    """given, or both for the mean over both strands; by default the model's."""

    reference: str | None = None
    """Labelled sequences for /v1/classify: a database made by embed, which /v1/search then looks
    in, or a FASTA or Parquet file."""

    reference_table: str = "embeddings"
    """Table of the reference database."""

    header_taxonomy: str | None = None
    """Lineage in the FASTA headers of the reference: sintax or silva."""

    method: str = "neighbours"
    """What names sequences: neighbours, heads (of a fine-tuned model), both or argmax;
    see classify."""

    num_trials: int = ClassifyConfig.num_trials
    """References left out and named, to calibrate confidence."""

    device: str = "auto"
    """auto (TPU, then GPU, then CPU), xla, cuda or cpu."""

    dtype: str | None = None
    """bfloat16, float32, or int8 (CPU only); by default that of the reference table, else bfloat16
    where the device multiplies it natively."""

    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 for all of this machine."""

    port: int = 8000
    """Port to listen at; 0 takes a free one."""

    anonymous: bool = False
    """Allow a --host that other machines reach though no BIOSCAN_API_KEY is set."""

    max_body_mb: int = 16
    """Largest request, in megabytes."""

    max_sequences: int = 2048
    """Most sequences in a request."""

    max_request_tokens: int = 400_000
    """Most tokens in a request."""

    max_queue_tokens: int = 1_000_000
    """Tokens that may wait; further requests get 429."""

    max_k: int = 100
    """Rows that a search may ask for, for each sequence."""

    max_models: int = 4
    """Versions of models held at once."""

    timeout_seconds: float = 60.0
    """A request that takes longer gets 504; clients may ask for less."""

    drain_seconds: float = 60.0
    """After SIGTERM, how long accepted requests may still take."""

    job_roots: list[str] = ()  # type: ignore[assignment]
    """Folders and URLs below which background jobs may read and write; without, there are none."""

    jobs_folder: str = "serve-jobs"
    """Where descriptions of background jobs are kept."""

    def __post_init__(self):
        """Normalise and check what needs no file and no device."""
        set_list(self, "job_roots")
        check_choices(
            self,
            {
                "pooling": ("mean", "mean_no_special", "cls", "max"),
                "frames": (None, 1, 6),
                "strands": (None, "given", "both"),
                "header_taxonomy": (None, *HEADER_STYLES),
                "method": ("neighbours", "heads", "both", "argmax"),
                "device": DEVICES,
                "dtype": INFERENCE_DTYPES,
            },
        )
        ones = ("max_body_mb", "max_sequences", "max_request_tokens", "max_k", "max_models")
        check_least(self, dict.fromkeys(ones, 1) | {"port": 0, "num_trials": 0})
        check_positive(self, ["timeout_seconds", "drain_seconds"])
        if self.max_queue_tokens < self.max_request_tokens:
            raise ConfigError(
                f"max_queue_tokens {self.max_queue_tokens} is less than max_request_tokens "
                f"{self.max_request_tokens}: the largest request would never be accepted"
            )
        if not (self.model or self.adapter or self.reference):
            raise ConfigError("no model; pass --model FOLDER or ID, or --reference DB")
        for name in [*self.also, *([self.name] if self.name else [])]:
            if not re.fullmatch(r"[^@/\s]+", name):
                raise ConfigError(f"name {name!r}: a name has no @, no slash and no white space")
