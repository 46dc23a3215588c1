"""Fine-tuning from a config to a model folder.

Input: a config. Output: a model folder (adapter, heads, labels, report).
Invariants: a run that is killed and restarted gives the result of an uninterrupted run, bit for bit
on a CPU.
"""

import dataclasses
import importlib.util
import logging
import signal
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator, PartialState
from accelerate.utils import DataLoaderConfiguration, is_torch_xla_available

from ..encode import hosts, runtime
from ..encode.onednn import fast_float32
from ..errors import ConfigError, DeviceError
from ..options import FinetuneConfig
from ..stopping import stop_on_signal
from .classifier import count_parameters
from .evaluation import predict_part
from .folder import count_classes, push_to_hub, write_model_folder
from .heldout import MOST_NOVEL, evenly_spaced
from .loop import Loop
from .metrics import evaluate
from .setup import Run, set_up

log = logging.getLogger(__name__)

_PICTURES = ("curves", "confusion", "vectors")


def finetune(config: FinetuneConfig) -> dict[str, Any]:
    """Run a config; returns what `run_finetuning_pipeline` returns.

    On a TPU slice of several hosts every host calls this; see `hosts`.
    """
    device = runtime.open_device(config.device, config.dtype, whole_slice=True)
    if is_torch_xla_available() != (device.kind == "xla"):
        wanted = "1" if device.kind == "xla" else "0"
        raise DeviceError(
            f"accelerate was imported before the device {device.kind} was chosen; set "
            f"USE_TORCH_XLA={wanted} in the environment, or start with launch/finetune.py"
        )
    if config.tracker == "tensorboard" and importlib.util.find_spec("tensorboard") is None:
        raise ConfigError("tensorboard is not installed: pip install 'bioscan_xla[tensorboard]'")
    hosts.check_same(device, "the options", repr(config))
    if device.process_index:
        logging.getLogger("bioscan_xla").setLevel(logging.ERROR)  # the first host logs everything
        config = dataclasses.replace(config, tracker="none", push_to_hub=None)
    with hosts.own_folder(device, config.output) as folder, fast_float32(device.kind):
        result = _finetune(dataclasses.replace(config, output=folder), device)
    index = device.process_index or PartialState().process_index
    return result | {"model_path": config.output, "process_index": index}


def _finetune(config: FinetuneConfig, device: runtime.Device) -> dict[str, Any]:
    started = datetime.now(timezone.utc)
    Path(config.output).mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(
        cpu=device.kind == "cpu",
        mixed_precision="no",
        project_dir=config.output,
        log_with=None if config.tracker == "none" else config.tracker,
        # The batch is one over all processes, so a step of the scheduler is one step.
        dataloader_config=DataLoaderConfiguration(split_batches=True),
    )
    run = set_up(config, device, accelerator)
    if interrupted := _train(run):
        run.tracker.finish()
        return {"interrupted": interrupted}
    return _finish(run, started)


def _train(run: Run) -> int | None:
    """Train to the end, or to a signal; returns the signal's number."""
    loop = Loop(run)
    with stop_on_signal() as stop:
        while not run.cursor.finished:
            loop.run_epoch(stop.event)
            if stop.event.is_set():
                log.warning("saved %s; run the same command to resume", run.checkpoints.latest())
                return stop.signal_number or signal.SIGTERM  # another process may have got it
            loop.end_epoch()
    return None


def _finish(run: Run, started: datetime) -> dict[str, Any]:
    """Evaluate the best model, write the folder, upload it; returns the result."""
    config, data, cursor = run.config, run.data, run.cursor
    if len(data.eval):
        run.checkpoints.load_best(run.classifier)
    result: dict[str, Any] = {
        "start_time": started.isoformat(),
        "end_time": datetime.now(timezone.utc).isoformat(),
        "total_loss": float(np.mean(cursor.losses)),
        "num_epochs": len(cursor.losses),
        **{f"epoch_{n}_loss": loss for n, loss in enumerate(cursor.losses, 1)},
        "skipped_updates": cursor.skipped,
        "model_path": config.output,
        "compiles": runtime.counters(run.device)["compiles"],
        "interrupted": None,
        "evaluation": {},
    }
    found = predict_part(
        run.accelerator, run.classifier, run.device, data.eval.sequences, run.max_tokens
    )
    some = data.novel.select(evenly_spaced(len(data.novel), MOST_NOVEL))
    novel = predict_part(
        run.accelerator, run.classifier, run.device, some.sequences, run.max_tokens
    )
    if run.accelerator.is_main_process:
        if len(data.eval):
            result["evaluation"] = evaluate(found.predictions, data.eval_labels, data.space)
        trainable, parameters = count_parameters(run.classifier)
        facts = {
            "train": len(data.train),
            "eval": len(data.eval),
            "epochs": len(cursor.losses),
            "trainable": trainable,
            "parameters": parameters,
            "base_hash": run.base_hash,
            "start_hash": run.start.get("hash"),
            "counts": count_classes(data.train_labels, data.space.num_classes),
            "all_epochs": run.start.get("epochs", 0) + len(cursor.losses),
        }
        write_model_folder(
            config,
            run.classifier,
            data,
            result,
            facts,
            run.history.lines(),
            found,
            (novel.vectors, some),
        )
    figures = {f"final/{key}": value for key, value in result["evaluation"].items()}
    run.tracker.log(figures, cursor.updates)
    pictures = {f"final/{name}": Path(config.output, f"{name}.png") for name in _PICTURES}
    run.tracker.log_pictures(pictures, cursor.updates)
    run.tracker.finish()
    if config.push_to_hub and run.accelerator.is_main_process:
        push_to_hub(config.output, config.push_to_hub)
    return result
