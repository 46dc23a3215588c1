"""Options of all commands: a dataclass for each, every field with what it means.

Input: values from a command line, a YAML or a call. Output: a checked, frozen config.
Invariants: what needs no file and no device is checked here, and nothing heavy is imported.
"""

from .checks import DEFAULT_MODEL, DEVICES, SAMPLE
from .classification import ClassifyConfig, ReferenceConfig
from .embedding import EmbedConfig, SearchConfig
from .federation import LabelUnionConfig, MergeConfig, SiteConfig, SiteLabelsConfig
from .files import SampleConfig, SyncConfig
from .plan import PlanEmbeddingConfig, PlanFinetuningConfig
from .serving import ServeConfig
from .training import FinetuneConfig, PretrainConfig

__all__ = [
    "DEFAULT_MODEL",
    "DEVICES",
    "SAMPLE",
    "ClassifyConfig",
    "EmbedConfig",
    "FinetuneConfig",
    "LabelUnionConfig",
    "MergeConfig",
    "PlanEmbeddingConfig",
    "PlanFinetuningConfig",
    "PretrainConfig",
    "ReferenceConfig",
    "SampleConfig",
    "SearchConfig",
    "ServeConfig",
    "SiteConfig",
    "SiteLabelsConfig",
    "SyncConfig",
]
