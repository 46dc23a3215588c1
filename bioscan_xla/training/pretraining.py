"""Pre-train a small encoder on unlabelled sequences.

Input: unlabelled sequences. Output: a model folder in the Hugging Face format, for `--model`.
It is Nucleotide Transformer's recipe (15 % of the 6-mers masked) at a size that a workstation
trains; transformers' Trainer does the work and resumes from its own checkpoints.
Invariants: weights are written when training has ended, never over another model; a run with
other options or sequences is refused; what is drawn at random follows from the seed, the epoch and
the sequence alone, so that a resumed run ends as an uninterrupted one.
"""

import dataclasses
import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    DataCollatorForLanguageModeling,
    EsmForMaskedLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_pt_utils import get_length_grouped_indices

from ..encode.architecture import new_model
from ..encode.model import no_bars
from ..encode.model_files import share_weights
from ..encode.packing import FIRST_POSITION
from ..errors import ConfigError, InputError
from ..options import PretrainConfig
from ..reads.files import metadata_schema
from ..reads.inputs import expand_inputs
from ..reads.raw import read_options
from ..reads.records import read_chunks
from ..reads.tokens import load_tokenizer, save_tokenizer, tokenize
from .batches import Augmentation

log = logging.getLogger("bioscan_xla.pretrain")

_RECORD = "pretraining.json"
_SAVE_STEPS = 500
_MASKED = 0.15  # Dalla-Torre et al. (2024), https://doi.org/10.1038/s41592-024-02523-z


class _Sequences(torch.utils.data.Dataset):
    """Distinct sequences, in each epoch from a random frame and strand, cut to the model's window.

    Attributes:
        epoch: the epoch that is read, from 0.
    """

    def __init__(self, sequences: list[str], max_tokens: int, seed: int):
        self.sequences, self.max_tokens, self.seed = sequences, max_tokens, seed
        self.epoch = 0
        self._augmentation = Augmentation()

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, row: int) -> dict[str, Any]:
        rng = np.random.default_rng([self.seed, self.epoch, row])
        ids = tokenize([self._augmentation.apply(self.sequences[row], rng)]).values
        room = self.max_tokens - 1
        start = int(rng.integers(1, max(2, len(ids) - room + 1)))
        tokens = [int(ids[0]), *ids[start : start + room].tolist()]
        return {"input_ids": tokens, "mask_seed": int(rng.integers(2**31))}


class _ByLength(torch.utils.data.Sampler):
    """The rows of an epoch in random order, sequences of similar length beside each other."""

    def __init__(self, data: _Sequences, batch_size: int):
        self._data, self._batch_size = data, batch_size
        self._lengths = [len(text) for text in data.sequences]

    def __len__(self) -> int:
        return len(self._data)

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self._data.seed, self._data.epoch])
        generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
        return iter(get_length_grouped_indices(self._lengths, self._batch_size, None, generator))


class _Epoch(TrainerCallback):
    """Tells the data which epoch is read."""

    def __init__(self, data: _Sequences):
        self._data = data

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._data.epoch = int(state.epoch)


class _Trainer(Trainer):
    """Trainer whose batches follow from the epoch, not from what was drawn before."""

    def get_train_dataloader(self) -> Any:
        """Batches of `_ByLength`."""
        data: Any = self.train_dataset
        size = self.args.train_batch_size
        return self.accelerator.prepare(
            torch.utils.data.DataLoader(
                data, size, sampler=_ByLength(data, size), collate_fn=self.data_collator
            )
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        # By itself Trainer skips the layer norms, which `save_pretrained` writes as gamma and beta.
        with no_bars():
            saved = EsmForMaskedLM.from_pretrained(resume_from_checkpoint)
        loaded: Any = model or self.model
        loaded.load_state_dict(saved.state_dict())


class _Mask(DataCollatorForLanguageModeling):
    """Masks a batch by the seed of its first sequence."""

    def __call__(self, examples: list[dict[str, Any]], return_tensors: str | None = None) -> Any:
        rows = [{"input_ids": example["input_ids"]} for example in examples]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(examples[0]["mask_seed"])
            return super().__call__(rows, return_tensors)


def pretrain(config: PretrainConfig) -> dict[str, Any]:
    """Run a config; returns `sequences`, `epochs`, `loss`, `seconds`, `model_path`."""
    reading = read_options(config)
    sources = expand_inputs(config.input)
    chunks = read_chunks(sources, reading, metadata_schema(sources, reading))
    # In order of appearance, so that a resumed run has the same list.
    sequences = list(dict.fromkeys(text for chunk in chunks for text in chunk.sequences))
    if not sequences:
        raise InputError(f"{sources[0]}: no usable sequence")
    output = Path(config.output)
    finished = _claim(output, config, sequences)
    if finished is not None:
        log.info("%s is finished: nothing to do", output)
        return finished
    model = new_model(config.hidden, config.layers, config.heads, config.seed)
    tokenizer = load_tokenizer()
    data = _Sequences(sequences, model.config.max_position_embeddings - FIRST_POSITION, config.seed)
    arguments = TrainingArguments(
        str(output / "checkpoints"),
        per_device_train_batch_size=config.batch_size,
        num_train_epochs=config.num_epochs,
        max_steps=config.max_steps or -1,
        learning_rate=config.learning_rate,
        warmup_steps=0.05,
        lr_scheduler_type="cosine",
        weight_decay=0.01,
        use_cpu=config.device == "cpu",
        seed=config.seed,
        logging_steps=50,
        save_steps=_SAVE_STEPS,
        save_total_limit=1,
        report_to=[],
    )
    trainer = _Trainer(
        model,
        arguments,
        train_dataset=data,
        data_collator=_Mask(tokenizer, mlm_probability=_MASKED),
        callbacks=[_Epoch(data)],
    )
    found = any((output / "checkpoints").glob("checkpoint-*"))
    result = trainer.train(resume_from_checkpoint=found or None)
    figures = {
        "sequences": len(sequences),
        "epochs": round(result.metrics["epoch"], 3),
        "loss": result.metrics["train_loss"],
        "seconds": result.metrics["train_runtime"],
        "model_path": str(output),
    }
    _write_whole(output, model, config, sequences, figures)
    return figures


def _claim(output: Path, config: PretrainConfig, sequences: Sequence[str]) -> dict[str, Any] | None:
    """Claim the folder for this run, or refuse; returns the run's figures if it is finished.

    Raises:
        ConfigError: the folder has a model, or a run with other options or sequences.
    """
    path = output / _RECORD
    if not path.is_file():
        if any(any(output.glob(name)) for name in ("*.safetensors", "*.bin", "checkpoints")):
            raise ConfigError(
                f"{output}: already holds a model or checkpoints of something else; use another "
                "--output"
            )
        output.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(_identity(config, sequences), indent=1) + "\n")
        return None
    theirs = json.loads(path.read_text())
    finished = theirs.pop("result", None)
    ours = _identity(config, sequences)
    lines = [
        f"  {key}: there {theirs.get(key)!r}, here {value!r}"
        for key, value in ours.items()
        if theirs.get(key) != value
    ]
    if lines:
        raise ConfigError(
            f"{output}: belongs to another pre-training run:\n"
            + "\n".join(lines)
            + "\nUse the same options to resume, or another --output to start over"
        )
    return None if finished is None else finished | {"model_path": str(output)}


def _identity(config: PretrainConfig, sequences: Sequence[str]) -> dict[str, Any]:
    """What must be the same for a run to be resumed."""
    left_out = ("input", "output", "columns", "device")
    options = {key: v for key, v in dataclasses.asdict(config).items() if key not in left_out}
    digest = hashlib.sha256("\n".join(sequences).encode()).hexdigest()
    return options | {"sequences": f"{len(sequences)}, hash {digest[:16]}"}


def _write_whole(
    output: Path, model: Any, config: PretrainConfig, sequences: Sequence[str], figures: dict
) -> None:
    """Write the model beside its place, then move it there; the record last."""
    part = output / "part"
    shutil.rmtree(part, ignore_errors=True)
    with no_bars():
        model.save_pretrained(part)
    share_weights(part)
    save_tokenizer(part)
    record = _identity(config, sequences) | {"result": figures}
    (part / _RECORD).write_text(json.dumps(record, indent=1) + "\n")
    for path in sorted(part.iterdir(), key=lambda path: path.name == _RECORD):
        path.replace(output / path.name)
    part.rmdir()
