"""Checkpoints: what training saves while it runs, and how it resumes.

Input: what a step trains, and where training is.
Output: folders `checkpoints/step_<n>` and `checkpoints/best`, of safetensors and JSON.
Invariants: a folder is complete or absent; a checkpoint of other options or another label space is
refused with the difference; nothing that could run code is unpickled.
"""

import dataclasses
import json
import logging
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import load as load_tensors
from safetensors.torch import load_file, save_file
from torch import nn

from ..encode import runtime
from ..encode.model_files import share_weights
from ..errors import ConfigError
from ..options import FinetuneConfig
from ..reads.labels import LabelSpace
from .step import Learner

log = logging.getLogger(__name__)

# Options that may change on resuming without changing the result.
_PLACES = ("train", "eval", "taxonomy", "model", "start")  # their content is compared
_FREE = (
    "output",
    "checkpoint_minutes",
    "keep_checkpoints",
    "tracker",
    "wandb_project",
    "patience",
    "device",
    "resume",
    "save_merged",
    "push_to_hub",
    "labels",  # compared by content
)


_ORIGIN = "origin.json"


@dataclasses.dataclass
class Cursor:
    """Where training is; saved with each checkpoint.

    Attributes:
        epoch: current epoch, from 0.
        step: batches of it that are done.
        updates: optimizer updates in all.
        losses: mean loss of every finished epoch.
        loss_sum: sum over this epoch's batches of loss times sequences.
        loss_count: sequences of these.
        skipped: updates left out because the gradient was not finite.
        best: best monitored figure so far, negated where lower is better.
        stale: evaluations since then.
        run_id: of the tracker.
        base_commit: of the base model on the hub; empty for a folder.
        finished: all epochs are done.
    """

    epoch: int = 0
    step: int = 0
    updates: int = 0
    losses: list[float] = dataclasses.field(default_factory=list)
    loss_sum: float = 0.0
    loss_count: int = 0
    skipped: int = 0
    best: float = float("-inf")
    stale: int = 0
    run_id: str = ""
    base_commit: str = ""
    finished: bool = False


def trainable_state(module: nn.Module) -> dict[str, torch.Tensor]:
    """Adapter and heads, on the host; of the adapter also what is frozen."""
    return {
        name: parameter.detach().cpu().contiguous()
        for name, parameter in module.named_parameters()
        if parameter.requires_grad or ".lora_" in name
    }


def load_trainable(module: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Copy trained parameters into a module."""
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        for name, value in state.items():
            parameters[name].copy_(value.to(parameters[name].device))


def optimizer_state(optimizer: Any) -> dict[str, torch.Tensor]:
    """The tensors of an optimizer, on the host, by number of the parameter and name."""
    return {
        f"{number}.{name}": value.detach().cpu().contiguous()
        for number, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
    }


def load_optimizer(optimizer: Any, tensors: dict[str, torch.Tensor]) -> None:
    """Give an optimizer its tensors back; its options stay as they are."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        number, name = key.split(".")
        state.setdefault(int(number), {})[name] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _is_same(key: str, before: Any, now: Any) -> bool:
    """Whether an option is as it was; a file may have moved, if its old place is empty now."""
    if before == now or key not in _PLACES:
        return before == now
    old, new = (value if isinstance(value, list) else [value] for value in (before, now))
    return len(old) == len(new) and all(
        a == b
        or (
            a
            and b
            and Path(a).name == Path(b).name
            and Path(a).is_absolute()
            and not Path(a).exists()
        )
        for a, b in zip(old, new, strict=True)
    )


def latest_checkpoint(output: str) -> Path | None:
    """The last whole checkpoint of an output folder."""
    folders = sorted(Path(output, "checkpoints").glob("step_*"))
    return folders[-1] if folders else None


def recorded_commit(config: FinetuneConfig) -> str:
    """The commit of the base model that a run began with; empty where it cannot be resumed from.

    The branch of the hub that `config` names may have moved since.
    """
    latest = latest_checkpoint(config.output) if config.resume else None
    if latest is None or not (latest / "cursor.json").is_file():
        return ""
    defaults = dataclasses.asdict(FinetuneConfig())
    theirs = defaults | json.loads((latest / "config.json").read_text())
    if (theirs["model"], theirs["revision"]) != (config.model, config.revision):
        return ""  # another run, which is refused with the difference
    return json.loads((latest / "cursor.json").read_text()).get("base_commit", "")


class Checkpoints:
    """The checkpoints of one output folder."""

    def __init__(
        self,
        accelerator: Any,
        config: FinetuneConfig,
        labels: LabelSpace,
        learner: Learner,
        cursor: Cursor,
        origin: Mapping[str, str],
    ):
        """Take what is saved and loaded, and what a checkpoint must agree with.

        `origin` has hashes of what training began with, by what it is called.
        """
        self._origin = dict(origin)
        self._accelerator, self._config, self._labels = accelerator, config, labels
        self._learner, self._cursor = learner, cursor
        self._module = accelerator.unwrap_model(learner.model)
        self.folder = Path(config.output) / "checkpoints"

    def latest(self) -> Path | None:
        """The last whole checkpoint."""
        return latest_checkpoint(self._config.output)

    def save(self, updates: int, best: bool = False) -> Path:
        """Write beside, then rename; delete the oldest beyond `keep_checkpoints`."""
        target = self.folder / f"step_{updates:09d}"
        part = self.folder / "part"
        accelerator = self._accelerator
        if accelerator.is_main_process:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
        accelerator.wait_for_everyone()
        part.mkdir(parents=True, exist_ok=True)
        random = runtime.random_state(self._learner.device)
        save_file(random, part / f"random_{accelerator.process_index}.safetensors")
        if accelerator.is_main_process:
            save_file(trainable_state(self._module), part / "trained.safetensors")
            save_file(optimizer_state(self._learner.optimizer), part / "optimizer.safetensors")
            _write_json(part / "cursor.json", dataclasses.asdict(self._cursor))
            _write_json(part / "config.json", dataclasses.asdict(self._config))
            _write_json(part / _ORIGIN, self._origin)
            self._labels.save(part / "labels.json")
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            share_weights(part)
            shutil.rmtree(target, ignore_errors=True)
            part.rename(target)
            if best:
                self._keep_best(target)
            for old in sorted(self.folder.glob("step_*"))[: -self._config.keep_checkpoints]:
                shutil.rmtree(old)
        accelerator.wait_for_everyone()
        return target

    def clear(self) -> None:
        """Delete all of them."""
        if self._accelerator.is_main_process:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._accelerator.wait_for_everyone()

    def _keep_best(self, source: Path) -> None:
        part, best = self.folder / "best.part", self.folder / "best"
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(source, part)
        shutil.rmtree(best, ignore_errors=True)
        part.rename(best)

    def load(self, folder: Path) -> None:
        """Load a checkpoint of this run.

        Raises:
            ConfigError: it is of other options or another label space; the message says which.
        """
        self._check(folder)
        load_trainable(self._module, load_file(folder / "trained.safetensors"))
        index = self._accelerator.process_index
        if (folder / "cursor.json").is_file():
            cursor = json.loads((folder / "cursor.json").read_text())
            optimizer = load_file(folder / "optimizer.safetensors")
            path = folder / f"random_{index}.safetensors"
            random = load_file(path) if path.is_file() else {}
        else:
            cursor, optimizer, random = _read_pickled(folder, index)
        for key, value in cursor.items():
            setattr(self._cursor, key, value)
        load_optimizer(self._learner.optimizer, optimizer)
        if not runtime.set_random_state(self._learner.device, random):
            log.warning(
                "%s was saved on another device or by fewer processes: dropout will differ",
                folder,
            )

    def _check(self, folder: Path) -> None:
        """Refuse a checkpoint of another run; an option it does not know had its default."""
        defaults = dataclasses.asdict(FinetuneConfig())
        ours = json.loads(json.dumps(dataclasses.asdict(self._config)))
        theirs = defaults | json.loads((folder / "config.json").read_text())
        path = folder / _ORIGIN  # older ones have none
        origin = json.loads(path.read_text()) if path.is_file() else None
        free = (*_FREE, *_PLACES) if origin == self._origin else _FREE
        lines = [
            f"  {key}: the checkpoint has {theirs[key]!r}, this run has {value!r}"
            for key, value in ours.items()
            if key not in free and not _is_same(key, json.loads(json.dumps(theirs[key])), value)
        ]
        if LabelSpace.load(folder / "labels.json") != self._labels:
            lines.append("  the label space: the training sequences are not the same")
        elif not lines and origin is not None:
            changed = [name for name, value in self._origin.items() if origin.get(name) != value]
            lines += [f"  {name}: the content changed" for name in changed]
        if lines:
            raise ConfigError(
                f"{folder} is a checkpoint of another run:\n"
                + "\n".join(lines)
                + "\nUse the same options to resume, or another --output to start over"
            )

    def load_best(self, module: nn.Module) -> bool:
        """Load the trained parameters of the best evaluation; False if there is none."""
        path = self.folder / "best" / "trained.safetensors"
        if path.is_file():
            load_trainable(module, load_file(path))
        return path.is_file()


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=1) + "\n")


def _read_pickled(
    folder: Path, process_index: int
) -> tuple[dict[str, Any], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Cursor, optimizer and random state of a checkpoint in the first format: pickled.

    Only tensors and plain values are taken from it.
    """
    paths = ("custom_checkpoint_0.pkl", "optimizer.bin", f"random_states_{process_index}.pkl")
    found: list[Any] = []
    for path in (folder / name for name in paths):
        if not path.is_file() and path.suffix == ".pkl" and found:
            found.append({})  # saved by fewer processes
            continue
        try:
            found.append(load_tensors(path, map_location="cpu"))
        except (OSError, pickle.UnpicklingError) as error:
            raise ConfigError(
                f"{path}: cannot be read, or holds more than tensors and could run code, which is "
                f"refused. Delete {folder} to resume from the checkpoint before it, or start over "
                "with another --output"
            ) from error
    cursor, optimizer, random = found
    tensors = {
        f"{number}.{name}": value
        for number, values in optimizer["state"].items()
        for name, value in values.items()
    }
    names = {"torch_manual_seed": "cpu", "torch_cuda_manual_seed": "cuda", "xm_seed": "xla"}
    state = {name: random[key] for key, name in names.items() if key in random}
    if "cuda" in state:
        state["cuda"] = state["cuda"][0]
    if "xla" in state:
        state["xla"] = torch.from_numpy(np.array(state["xla"], np.uint64))
    return cursor, tensors, state
