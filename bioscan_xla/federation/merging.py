"""The models of several sites to one model folder.

Input: what the sites sent. Output: a folder that embed, classify and the next round take.
Invariants: a site that cannot be used is left out with its reason, which the result tells; the
folder is complete or absent; the order in which the sites are given does not matter.
"""

import dataclasses
import json
import logging
import shutil
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.torch import save_file

from ..encode.model_files import READING, TRAINED, absolute, share_weights
from ..errors import BioscanError, ConfigError, ModelError, first_line
from ..options import MergeConfig
from ..reads.labels import LabelSpace
from ..training.start import ADAPTER, HEADS
from .agreement import refuse_twice
from .averaging import average_adapters, average_heads, stack_adapters
from .card import write_federated_card
from .share import ADAPTER_CONFIG, SiteModel, hash_labels, read_share, site_name

log = logging.getLogger(__name__)

SITES = "sites.json"


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """A site that was not averaged.

    Attributes:
        name: of the site, or its folder where the name is not known.
        reason: why.
    """

    name: str
    reason: str


def merge(config: MergeConfig) -> tuple[list[SiteModel], list[LeftOut]]:
    """Merge the sites; returns those that were used and those that were left out.

    Raises:
        ConfigError: a site is given twice or not there, the output exists, or it is not clear which
            of the sites are foreign.
        ModelError: no site is left, or their adapters cannot be averaged.
    """
    if not config.sites:
        raise ConfigError("no sites given; pass the folder that each site shared")
    refuse_twice(config.sites)
    if absent := [place for place in config.sites if not Path(place).is_dir()]:
        raise ConfigError(
            f"{', '.join(absent)}: no such folder; pass what each site sent, without those that "
            "sent nothing"
        )
    output = Path(config.output)
    if output.exists():
        raise ConfigError(f"{output} exists; pass another --output, no model is overwritten")
    read, left_out = _read_all(config.sites)
    used, foreign = _choose(read, LabelSpace.load(config.labels) if config.labels else None)
    left_out = sorted([*left_out, *foreign], key=lambda site: (site.name, site.reason))
    for site in left_out:
        log.warning("left out: %s: %s", site.name, site.reason)
    if not used:
        reasons = "".join(f"\n  {site.name}: {site.reason}" for site in left_out)
        raise ModelError(f"no site can be merged:{reasons}")
    if not config.stack:
        _check_drawn(used)
    _write(config, output, used, left_out)
    return used, left_out


def _read_all(places: Sequence[str]) -> tuple[list[SiteModel], list[LeftOut]]:
    """The sites that can be read, by name, and the others."""
    sites: dict[str, SiteModel] = {}
    left_out = []
    for place in places:
        try:
            site = read_share(place)
        except BioscanError as error:
            left_out.append(LeftOut(site_name(place), first_line(error)))
            continue
        if (other := sites.setdefault(site.name, site)) is not site:
            raise ConfigError(
                f"{other.folder} and {site.folder} are both of the site {site.name!r}; a site "
                "counts once. Pass one of them, or train with another --site"
            )
    return [sites[name] for name in sorted(sites)], left_out


def _choose(
    sites: Sequence[SiteModel], labels: LabelSpace | None
) -> tuple[list[SiteModel], list[LeftOut]]:
    """The largest group of sites of the same form, and the others with what differs."""
    foreign = []
    if labels is not None:
        agreed = hash_labels(labels)
        foreign = [
            LeftOut(site.name, "its label space is not that of --labels")
            for site in sites
            if site.form["label space"] != agreed
        ]
        sites = [site for site in sites if site.form["label space"] == agreed]
    forms = Counter(tuple(site.form.items()) for site in sites)
    if not forms:
        return [], foreign
    (form, most), *others = forms.most_common()
    if any(count == most for _, count in others):
        keys = sorted(
            {key for other, _ in others for key, value in other if dict(form)[key] != value}
        )
        names = ", ".join(repr(site.name) for site in sites)
        raise ConfigError(
            f"the sites {names} differ in {', '.join(keys)}, and no majority says which are "
            "foreign; pass only those that belong together"
        )
    used = [site for site in sites if tuple(site.form.items()) == form]
    for site in sites:
        if different := [key for key, value in form if site.form[key] != value]:
            foreign.append(LeftOut(site.name, f"differs from most sites in {', '.join(different)}"))
    return used, foreign


def _check_drawn(sites: Sequence[SiteModel]) -> None:
    """ModelError unless all sites have the same factor A."""
    by_hash = defaultdict(list)
    for site in sites:
        by_hash[site.drawn_hash].append(repr(site.name))
    if len(by_hash) > 1:
        groups = " | ".join(", ".join(names) for names in sorted(by_hash.values()))
        raise ModelError(
            f"LoRA's A is not the same at all sites: {groups}. The mean of B would not be the mean "
            "of the products. Train with the same --seed and with --freeze-a true, or merge with "
            "--stack"
        )


def _write(
    config: MergeConfig, output: Path, sites: list[SiteModel], left_out: list[LeftOut]
) -> None:
    """Write the folder beside its place, then rename it."""
    first = sites[0]
    bases = [absolute(config.model)] if config.model else [s.base for s in sites if s.base]
    if not bases:
        raise ConfigError(
            "the sites trained on a model in a local folder; pass your copy of it as --model FOLDER"
        )
    part = output.with_name(f".{output.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    (part / "adapter").mkdir(parents=True)
    adapter = stack_adapters(sites) if config.stack else average_adapters(sites)
    save_file(adapter, part / ADAPTER, {"format": "pt"})
    save_file(average_heads(sites), part / HEADS, {"format": "pt"})
    share_weights(part)
    raw = first.adapter_config | {"base_model_name_or_path": bases[0]}
    if config.stack:
        raw |= {"r": len(sites) * raw["r"], "lora_alpha": len(sites) * raw["lora_alpha"]}
    (part / ADAPTER_CONFIG).write_text(json.dumps(raw, indent=1) + "\n")
    (part / "adapter" / READING).write_text(json.dumps(first.reading) + "\n")
    first.labels.save(part / "labels.json")
    trained = {
        "base_hash": first.form["base model"],
        "start_hash": first.form["start"],
        "epochs": max(site.epochs for site in sites),
        "sequences": sum(site.sequences for site in sites),
        "classes": [
            np.sum([site.classes[rank] for site in sites], 0).tolist()
            for rank in range(len(first.classes))
        ],
    }
    (part / TRAINED).write_text(json.dumps(trained) + "\n")
    told = {
        "stacked": config.stack,
        "sites": [{"site": site.name, "sequences": site.sequences} for site in sites],
        "left_out": [dataclasses.asdict(site) for site in left_out],
    }
    (part / SITES).write_text(json.dumps(told, indent=1) + "\n")
    write_federated_card(part, bases[0], raw, first.labels, trained, told)
    part.rename(output)
