"""What leaves a site: its trained weights, and how many sequences of each class they saw.

Input: the output folder of a site's training; then the folders that sites sent. Output: the folder
`share`; a `SiteModel` for each. Invariants: no sequence, id, vector or path of the site is in it;
what a site sent is checked and never unpickled.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from ..encode.fingerprint import hash_tensors
from ..encode.model_files import READING, TRAINED, check_safetensors, read_json
from ..errors import BioscanError, ConfigError, ModelError
from ..options import SiteConfig
from ..options.federation import check_site_name
from ..reads.labels import LabelSpace
from ..reads.lineages import RANKS
from ..training.card import hub_id
from ..training.classifier import is_drawn
from ..training.start import ADAPTER, HEADS

SHARE = "share"
ADAPTER_CONFIG = "adapter/adapter_config.json"
FILES = (ADAPTER_CONFIG, ADAPTER, f"adapter/{READING}", HEADS, "labels.json", TRAINED)
"""All that a site shares."""

_MOST_SEQUENCES = 2**53
_HEAD = ("0.weight", "0.bias", "2.weight", "2.bias")


@dataclass(frozen=True)
class SiteModel:
    """What a site sent, without its tensors.

    Attributes:
        name: of the site.
        folder: where it lies.
        labels: the classes of its heads.
        sequences: that it trained on.
        classes: for each rank (classes,) sequences of each class.
        epochs: that it and the models it started from trained for.
        form: what must be the same at all sites, by what it is called.
        drawn_hash: of the factor A of its adapter.
        base: id of the base model; None where the site had it in a local folder.
        adapter_config: of PEFT.
        reading: frames and strands.
    """

    name: str
    folder: Path
    labels: LabelSpace
    sequences: int
    classes: tuple[np.ndarray, ...]
    epochs: int
    form: Mapping[str, str]
    drawn_hash: str
    base: str | None
    adapter_config: dict[str, Any]
    reading: dict[str, Any]

    def known(self, rank: int) -> int:
        """Sequences whose name at a rank is a class."""
        return int(self.classes[rank].sum())

    def adapter(self) -> dict[str, torch.Tensor]:
        """Its adapter's tensors."""
        return load_file(self.folder / ADAPTER)

    def heads(self) -> dict[str, torch.Tensor]:
        """Its heads' tensors."""
        return load_file(self.folder / HEADS)


def write_share(config: SiteConfig) -> Path:
    """Collect what a site shares from the output folder of its training."""
    output = Path(config.output)
    folder, part = output / SHARE, output / f"{SHARE}.part"
    shutil.rmtree(part, ignore_errors=True)
    (part / "adapter").mkdir(parents=True)
    for name in FILES:
        shutil.copyfile(output / name, part / name)
    raw = read_json(part / ADAPTER_CONFIG)
    base = str(raw["base_model_name_or_path"])
    raw["base_model_name_or_path"] = hub_id(base)
    (part / ADAPTER_CONFIG).write_text(json.dumps(raw, indent=1) + "\n")
    trained = {"site": config.site} | read_json(part / TRAINED)
    (part / TRAINED).write_text(json.dumps(trained) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)
    return folder


def site_name(place: str) -> str:
    """The name of a site whose model cannot be used: as it sent it, else that of its folder."""
    folder = _folder_of(place)
    try:
        name = read_json(folder / TRAINED)["site"]
        check_site_name(name)
        return str(name)
    except (BioscanError, KeyError, OSError):
        folder = folder.resolve()
        return folder.parent.name if folder.name == SHARE else folder.name


def _folder_of(place: str) -> Path:
    inside = Path(place, SHARE)
    return inside if inside.is_dir() else Path(place)


def read_share(place: str) -> SiteModel:
    """Read and check what a site sent.

    Raises:
        ModelError: a file is missing, damaged, or holds values that no site sends.
        InputError: its classes are not a label space.
    """
    folder = _folder_of(place)
    for name in FILES:
        if not (folder / name).is_file():
            raise ModelError(f"{folder}: has no {name}; its training did not end, or part is lost")
    labels = LabelSpace.load(folder / "labels.json")
    raw, trained = read_json(folder / ADAPTER_CONFIG), read_json(folder / TRAINED)
    try:
        name = trained.get("site", "")
        check_site_name(name)
        sequences, classes = _read_counts(trained, labels)
        epochs = _whole(trained.get("epochs"), 0)
        config = {k: v for k, v in raw.items() if k not in ("base_model_name_or_path", "revision")}
        if raw.get("target_modules"):
            config["target_modules"] = sorted(raw["target_modules"])
        _whole(raw.get("r"), 1)
        if not isinstance(raw.get("lora_alpha"), int | float):
            raise ValueError("lora_alpha is not a number")
    except (ValueError, TypeError, ConfigError) as error:
        raise ModelError(f"{folder}: {error}") from error
    shapes, drawn_hash = _check_tensors(folder, labels)
    base = raw.get("base_model_name_or_path")
    form = {
        "base model": str(trained.get("base_hash")),
        "start": str(trained.get("start_hash")),
        "adapter": json.dumps(config, sort_keys=True),
        "frames and strands": json.dumps(read_json(folder / "adapter" / READING), sort_keys=True),
        "label space": hash_labels(labels),
        "shapes": shapes,
    }
    return SiteModel(
        name,
        folder,
        labels,
        sequences,
        classes,
        epochs,
        form,
        drawn_hash,
        base if isinstance(base, str) else None,
        raw,
        read_json(folder / "adapter" / READING),
    )


def hash_labels(labels: LabelSpace) -> str:
    """A hash over classes and counts."""
    values = torch.tensor(list(repr((labels.lineages, labels.counts)).encode()), dtype=torch.uint8)
    return hash_tensors([("labels", values)])


def _whole(value: object, least: int) -> int:
    if type(value) is not int or not least <= value <= _MOST_SEQUENCES:
        raise ValueError(f"{str(value)[:40]!r} is not a count")
    return value


def _read_counts(trained: dict[str, Any], labels: LabelSpace) -> tuple[int, tuple[np.ndarray, ...]]:
    """Sequences in all and of each class; ValueError if they cannot be."""
    sequences = _whole(trained.get("sequences"), 1)
    found = trained.get("classes")
    if not isinstance(found, list) or [len(counts) for counts in found] != [*labels.num_classes]:
        raise ValueError("the counts of its classes do not fit its label space")
    for rank, counts in zip(RANKS, found, strict=True):
        if sum(_whole(count, 0) for count in counts) > sequences:
            raise ValueError(f"it counts more names of {rank} than its {sequences} sequences")
    return sequences, tuple(np.array(counts, np.int64) for counts in found)


def _check_tensors(folder: Path, labels: LabelSpace) -> tuple[str, str]:
    """The shapes of a site's tensors as text, and the hash of the factor A.

    Raises:
        ModelError: a file is damaged, or a tensor is missing, not finite or of another shape.
    """
    for part in (folder, folder / "adapter"):
        check_safetensors(part)
    adapter, heads = load_file(folder / ADAPTER), load_file(folder / HEADS)
    for name, tensor in [*adapter.items(), *heads.items()]:
        if tensor.dtype != torch.float32:
            raise ModelError(f"{folder}: {_shown(name)} is {tensor.dtype}, not float32")
        if not torch.isfinite(tensor).all():
            raise ModelError(f"{folder}: {_shown(name)} is not finite")
    hidden = heads.get(f"{RANKS[0]}.0.weight", torch.zeros(0)).numel()
    for rank, classes in zip(RANKS, labels.num_classes, strict=True):
        rows = max(1, classes)
        wanted = dict(zip(_HEAD, ((hidden,), (hidden,), (rows, hidden), (rows,)), strict=True))
        for name, shape in wanted.items():
            found = heads.get(f"{rank}.{name}")
            if found is None or tuple(found.shape) != shape:
                has = "missing" if found is None else f"of shape {tuple(found.shape)}"
                raise ModelError(f"{folder}: {rank}.{name} is {has}; expected {shape}")
    if len(heads) != len(RANKS) * len(_HEAD) or not hidden:
        raise ModelError(f"{folder}: its heads are not the seven heads of fine-tuning")
    if not adapter or not all(".lora_" in name and t.ndim == 2 for name, t in adapter.items()):
        raise ModelError(f"{folder}: its adapter is not one of fine-tuning")
    shapes = {name: tuple(t.shape) for name, t in sorted({**adapter, **heads}.items())}
    drawn = sorted((name, t) for name, t in adapter.items() if is_drawn(name))
    return repr(shapes), hash_tensors(drawn)


def _shown(name: str) -> str:
    """A foreign name, fit to print."""
    return repr(name[:100])
