"""The model card of a merged model.

Input: what was merged. Output: `README.md`.
Invariants: what a site says of itself is escaped.
"""

import html
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from ..reads.labels import LabelSpace
from ..reads.lineages import RANKS
from ..training.card import card_data, hub_id, licence_of


def escape(text: str) -> str:
    r"""Text as Markdown shows it literally, in one line.

    >>> print(escape("a|b <i>*x*"))
    a\|b &lt;i&gt;\*x\*
    """
    return re.sub(r"([\\`*_{}\[\]()#+!|~-])", r"\\\1", html.escape(" ".join(text.split())))


def write_federated_card(
    folder: Path,
    base: str,
    adapter: Mapping[str, Any],
    labels: LabelSpace,
    trained: Mapping[str, Any],
    told: Mapping[str, Any],
) -> None:
    """Write `README.md`.

    Args:
        folder: of the model.
        base: id or folder of the base model.
        adapter: PEFT's configuration.
        labels: the classes.
        trained: what `trained.json` holds.
        told: what `sites.json` holds.
    """
    known = hub_id(base)
    classes = ", ".join(f"{n} {rank}" for n, rank in zip(labels.num_classes, RANKS, strict=True))
    how = (
        "The adapters of the sites stand beside each other (stacked), so their ranks add up."
        if told["stacked"]
        else "LoRA's A is the same at all sites, so the mean of B is the mean of the adapters."
    )
    name = known or Path(base).name
    text = f"""# Taxonomy adapter for {escape(name)}, trained at several sites

A LoRA adapter (r {adapter["r"]}, alpha {adapter["lora_alpha"]}) and seven heads that name the
kingdom, phylum, class, order, family, genus and species of DNA sequences. Classes: {classes}.
The hash of the weights of the base model is `{escape(trained["base_hash"])}`.

## Sites

Each site trained on its own sequences, which stayed there: {trained["sequences"]:,} in
all. Epochs over all
rounds: {trained["epochs"]}. {how} Tensors are averaged by sequences, each class of
a head over the sites that have it.

{_tell_sites(told)}

Weights can give away what they were trained on: a model trained at several sites is no guarantee
of privacy. The counts are what the sites said of themselves.

## Use

```python
import bioscan_xla

classifier = bioscan_xla.load_classifier("path/to/this/folder")
```

`python -m bioscan_xla.embed --adapter path/to/this/folder ...` makes vectors with it.

## Licence

{licence_of(known)}.
"""
    ModelCard(f"---\n{card_data(known).to_yaml()}\n---\n\n{text}").save(folder / "README.md")


def _tell_sites(told: Mapping[str, Any]) -> str:
    """The sites with their shares, and those that were left out."""
    total = sum(site["sequences"] for site in told["sites"])
    lines = ["| site | sequences | share |", "|---|---|---|"]
    lines += [
        f"| {escape(site['site'])} | {site['sequences']:,} | {site['sequences'] / total:.1%} |"
        for site in told["sites"]
    ]
    lines += ["", "Left out:", ""]
    lines += [f"- {escape(site['name'])}: {escape(site['reason'])}" for site in told["left_out"]]
    return "\n".join(lines if told["left_out"] else [*lines, "None."])
