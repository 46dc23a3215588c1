"""What training leaves on disk while it runs, and how it resumes.

Enters: an Accelerator whose model, optimizer and scheduler are prepared. Leaves: folders
`checkpoints/step_<n>` and `checkpoints/best`. Guaranteed: a folder is whole or is not there; a
checkpoint of other options or another label space is refused with the difference.
"""

import dataclasses
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ..errors import ConfigError
from ..options import FinetuneConfig
from ..reads.labels import LabelSpace

log = logging.getLogger(__name__)

# What may differ between a run and its resumption without changing the result.
_FREE = (
    "output",
    "checkpoint_minutes",
    "keep_checkpoints",
    "tracker",
    "wandb_project",
    "patience",
    "device",
    "resume",
)


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
    finished: bool = False

    def state_dict(self) -> dict[str, Any]:
        """All fields."""
        return dataclasses.asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over all fields."""
        for key, value in state.items():
            setattr(self, key, value)


def trainable_state(module: nn.Module) -> dict[str, torch.Tensor]:
    """Trained parameters, on the host."""
    return {
        name: parameter.detach().cpu().contiguous()
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }


def load_trainable(module: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Copy trained parameters into a module."""
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        for name, value in state.items():
            parameters[name].copy_(value.to(parameters[name].device))


def register_hooks(accelerator: Any) -> None:
    """Have Accelerate save and load only what is trained, as safetensors, on any device."""

    def save(models: list[nn.Module], weights: list, folder: str) -> None:
        if accelerator.is_main_process:
            for model in models:
                state = trainable_state(accelerator.unwrap_model(model))
                save_file(state, Path(folder, "trained.safetensors"))
        weights.clear()  # the frozen base is not saved again and again

    def load(models: list[nn.Module], folder: str) -> None:
        for model in models:
            state = load_file(Path(folder, "trained.safetensors"))
            load_trainable(accelerator.unwrap_model(model), state)
        models.clear()

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


class Checkpoints:
    """The checkpoints of one output folder."""

    def __init__(self, accelerator: Any, config: FinetuneConfig, labels: LabelSpace):
        """Take an Accelerator that has its hooks, and what the run must agree with."""
        self._accelerator, self._config, self._labels = accelerator, config, labels
        self.folder = Path(config.output) / "checkpoints"

    def latest(self) -> Path | None:
        """The last whole checkpoint."""
        folders = sorted(self.folder.glob("step_*"))
        return folders[-1] if folders else None

    def save(self, updates: int, best: bool = False) -> Path:
        """Write beside, then rename; the oldest beyond `keep_checkpoints` go."""
        target = self.folder / f"step_{updates:09d}"
        part = self.folder / "part"
        accelerator = self._accelerator
        if accelerator.is_main_process:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(part))
        if accelerator.is_main_process:
            self._labels.save(part / "labels.json")
            options = dataclasses.asdict(self._config)
            (part / "config.json").write_text(json.dumps(options, indent=1))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
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
        """Load a checkpoint of this very run.

        Raises:
            ConfigError: it is of other options or another label space; the message says which.
        """
        ours = dataclasses.asdict(self._config)
        theirs = json.loads((folder / "config.json").read_text())
        lines = [
            f"  {key}: the checkpoint has {theirs.get(key)!r}, this run has {ours[key]!r}"
            for key in ours
            if key not in _FREE and theirs.get(key) != json.loads(json.dumps(ours[key]))
        ]
        if LabelSpace.load(folder / "labels.json") != self._labels:
            lines.append("  the label space: the training sequences are not the same")
        if lines:
            raise ConfigError(
                f"{folder} is a checkpoint of another run:\n"
                + "\n".join(lines)
                + "\nUse the same options to resume, or another --output to begin anew"
            )
        self._accelerator.load_state(str(folder))

    def load_best(self, module: nn.Module) -> bool:
        """Load the trained parameters of the best evaluation; False if there is none."""
        path = self.folder / "best" / "trained.safetensors"
        if path.is_file():
            load_trainable(module, load_file(path))
        return path.is_file()
