"""A site's training: fine-tuning with the classes of all sites, then the folder that it shares.

Input: options. Output: a model folder with `share` in it.
Invariants: a run that was killed resumes as fine-tuning does; nothing is shared before training
has ended.
"""

import dataclasses
from pathlib import Path
from typing import Any

from ..options import FinetuneConfig, SiteConfig
from ..training.run import finetune
from .share import write_share


def train_site(config: SiteConfig) -> tuple[dict[str, Any], Path | None]:
    """Train; returns what fine-tuning returns, and the folder to send (None if interrupted)."""
    names = [field.name for field in dataclasses.fields(FinetuneConfig)]
    result = finetune(FinetuneConfig(**{name: getattr(config, name) for name in names}))
    if result["interrupted"] or result["process_index"]:
        return result, None
    return result, write_share(config)
