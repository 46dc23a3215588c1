"""Options of planning a run: those of the run, and the TPU it is planned for."""

from dataclasses import dataclass

from ..errors import ConfigError
from .embedding import EmbedConfig
from .training import FinetuneConfig


@dataclass(frozen=True)
class PlanEmbeddingConfig(EmbedConfig):
    """Compile the programs of an embedding run for a TPU; no TPU is needed.

    Further options are those of `python -m bioscan_xla.embed`. Exit status: 0 if all programs fit,
    3 if not, 1 after an error.
    """

    topology: str = "v5e-8"
    """TPU slice to plan for: v3-8, v4-8, v5e-1, v5e-8 or v6e-8."""

    json: bool = False
    """Print JSON instead of a table."""

    def __post_init__(self):
        """Check, as for the run, and that it can run on a TPU."""
        super().__post_init__()
        if self.dtype == "int8":
            raise ConfigError("dtype int8 is computed on CPUs only; plan for bfloat16 or float32")


@dataclass(frozen=True)
class PlanFinetuningConfig(FinetuneConfig):
    """Compile the training steps of a fine-tuning run for a TPU; no TPU is needed.

    Further options are those of `launch/finetune.py`. Exit status: 0 if all programs fit, 3 if
    not, 1 after an error.
    """

    topology: str = "v5e-8"
    """TPU slice to plan for: v3-8, v4-8, v5e-1, v5e-8, v5e-16 or v6e-8."""

    json: bool = False
    """Print JSON instead of a table."""
