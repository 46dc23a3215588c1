"""The model card of a fine-tuned model: `README.md` in the form that the Hugging Face Hub reads.

Input: the options, the label space and the figures of a run. Output: one file.
Invariants: it holds no path of the machine that trained the model.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..options import FinetuneConfig
from ..reads.labels import LabelSpace
from ..reads.lineages import RANKS

_NUCLEOTIDE_TRANSFORMER = "InstaDeepAI/nucleotide-transformer"
_FIGURES = ("accuracy", "macro_f1", "top3", "calibration_error")


def write_card(
    folder: Path,
    config: FinetuneConfig,
    labels: LabelSpace,
    evaluation: Mapping[str, float],
    facts: Mapping[str, Any],
) -> None:
    """Write `README.md`.

    Args:
        folder: of the model.
        config: that it was trained with.
        labels: its classes.
        evaluation: what `metrics.evaluate` gave; empty if nothing was evaluated.
        facts: `train` and `eval` sequences, `epochs`, `trainable` and all `parameters`, and, where
            known, `base_hash`, which tells the weights of the base model.
    """
    base = hub_id(config.model)
    rows = [
        f"| {rank} | {labels.num_classes[number]} | "
        + " | ".join(_figure(evaluation.get(f"{rank}/{key}")) for key in _FIGURES)
        + " |"
        for number, rank in enumerate(RANKS)
    ]
    count = facts["epochs"]
    epochs = "1 epoch" if count == 1 else f"{count} epochs"
    text = f"""# Taxonomy adapter for {base or Path(config.model).name}

A LoRA adapter (r {config.rank}, alpha {config.alpha}, on {", ".join(config.targets)}) and seven
heads that name the kingdom, phylum, class, order, family, genus and species of DNA sequences.
{_describe_base(config, base, facts)}

Trained on {facts["train"]:,} sequences for {epochs}; evaluated on
{facts["eval"]:,} others. {facts["trainable"]:,} of {facts["parameters"]:,} parameters were trained.

| rank | classes | accuracy | macro-F1 | top-3 | calibration error |
|---|---|---|---|---|---|
{chr(10).join(rows)}

Wrong ranks per sequence: {_figure(evaluation.get("hierarchical_distance"))}. Share of lineages
whose ranks contradict each other: {_figure(evaluation.get("inconsistent"))}. The other figures
are taken over the evaluation sequences whose true name is known at the rank. Classes with fewer
than {config.min_sequences} training sequences were not learned.

## Use

```python
import bioscan_xla

classifier = bioscan_xla.load_classifier("path/to/this/folder")
```

`python -m bioscan_xla.embed --adapter path/to/this/folder ...` makes vectors with it.

## Licence

{licence_of(base)}.
"""
    ModelCard(f"---\n{card_data(base).to_yaml()}\n---\n\n{text}").save(folder / "README.md")


def card_data(base: str | None) -> ModelCardData:
    """What the hub reads of a card, by the id of the base model."""
    return ModelCardData(
        base_model=base,
        library_name="peft",
        license="cc-by-nc-sa-4.0" if _is_nucleotide_transformer(base) else None,
        tags=["biology", "genomics", "environmental-dna", "taxonomy", "lora"],
    )


def licence_of(base: str | None) -> str:
    """The licence in words, by the id of the base model."""
    licence = "The licence of the base model holds for what is derived from it"
    if _is_nucleotide_transformer(base):
        licence += " (CC BY-NC-SA 4.0: no commercial use, share alike)"
    return licence


def _is_nucleotide_transformer(base: str | None) -> bool:
    return base is not None and base.startswith(_NUCLEOTIDE_TRANSFORMER)


def hub_id(model: str) -> str | None:
    """The id on the Hub of a base model, None if it has none that is known.

    Of a local folder it is the id that its `config.json` says it came from.
    """
    if Path(model).is_dir():
        try:
            came_from = json.loads(Path(model, "config.json").read_text("utf-8"))["_name_or_path"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if not isinstance(came_from, str) or came_from.count("/") != 1 or Path(came_from).exists():
            return None
        model = came_from
    try:
        validate_repo_id(model)
    except HFValidationError:
        return None
    return model


def _describe_base(config: FinetuneConfig, base: str | None, facts: Mapping[str, Any]) -> str:
    text = f"The base model is {base}" if base else "The base model lay in a local folder"
    if base and config.revision:
        text += f", revision {config.revision}"
    if facts.get("base_hash"):
        text += f"; the hash of its weights is `{facts['base_hash']}`"
    return text + "."


def _figure(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.3f}"
