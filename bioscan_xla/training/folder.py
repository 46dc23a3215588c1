"""The output folder of fine-tuning.

Input: a trained classifier, its labels and figures. Output: adapter, heads, labels, config,
metrics, pictures and a model card. Invariants: weights are safetensors; the card holds no path of
this machine; a folder with labels.json is complete, and all of its parts are of one run.
"""

import copy
import csv
import dataclasses
import filecmp
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors.torch import save_file

from ..encode.model import no_bars
from ..encode.model_files import READING, TRAINED, share_weights
from ..errors import SyncError
from ..options import FinetuneConfig
from ..reads.labels import UNKNOWN, LabelSpace
from ..reads.tokens import save_tokenizer
from .card import write_card
from .checkpoint import trainable_state
from .classifier import TaxonomyClassifier
from .data import Data, Examples
from .evaluation import Evaluated
from .heldout import HELDOUT, MOST_EVALUATED, evenly_spaced, write_heldout
from .pictures import draw_confusion, draw_curves, draw_vectors, write_confusions
from .start import ADAPTER

log = logging.getLogger(__name__)

_LAST = "labels.json"
"""No reader takes a model folder without it."""


class History:
    """`metrics.jsonl`: one line an evaluation."""

    def __init__(self, path: Path):
        """Take the file, whether it exists or not."""
        self.path = path

    def lines(self) -> list[dict[str, Any]]:
        """All lines."""
        if not self.path.is_file():
            return []
        return [json.loads(line) for line in self.path.read_text().splitlines()]

    def add(self, line: Mapping[str, Any]) -> None:
        """Add a line."""
        self.keep_until(line["updates"] - 1)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def keep_until(self, updates: int) -> None:
        """Drop lines of a later update: a resumed run writes them again."""
        lines = self.lines()
        kept = [line for line in lines if line["updates"] <= updates]
        if len(kept) < len(lines):
            self.path.write_text("".join(json.dumps(line) + "\n" for line in kept))


def write_tables(
    folder: Path,
    split: Sequence[tuple[str, str]],
    conflicts: Sequence[tuple[str, str, str, str]],
) -> None:
    """Write which sequence is in which part, and those with conflicting lineages, if any."""
    tables: dict[str, tuple[tuple[str, ...], Sequence[tuple[str, ...]]]] = {
        "split": (("sequence_id", "part"), split)
    }
    if conflicts:
        tables["conflicts"] = (("rank", "name", "sequence_id", "lineage"), conflicts)
    for name, (header, rows) in tables.items():
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(header)
            writer.writerows(rows)


def count_classes(labels: np.ndarray, num_classes: Sequence[int]) -> list[list[int]]:
    """For each rank the sequences of each class.

    >>> count_classes(np.array([[0, 1], [0, -1]]), [1, 2])
    [[2], [0, 1]]
    """
    return [
        np.bincount(numbers[numbers >= 0], minlength=classes).tolist()
        for numbers, classes in zip(labels.T, num_classes, strict=True)
    ]


def write_model_folder(
    config: FinetuneConfig,
    classifier: TaxonomyClassifier,
    data: Data,
    result: Mapping[str, Any],
    facts: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
    evaluated: Evaluated,
    novel: tuple[np.ndarray, Examples],
) -> None:
    """Write everything; `adapter/` is plain PEFT, the rest is safetensors, JSON, YAML and PNG.

    `evaluated` is of the evaluation part, `novel` has vectors of sequences of the novel part.
    """
    space, truth = data.space, data.eval_labels
    with _replacing(Path(config.output)) as folder:
        _write_weights(folder, config, classifier, space)
        (folder / "config.yaml").write_text(
            yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)
        )
        (folder / "metrics.json").write_text(json.dumps(result, indent=1) + "\n")
        trained = {
            "base_hash": facts["base_hash"],
            "start_hash": facts["start_hash"],
            "epochs": facts["all_epochs"],
            "sequences": facts["train"],
            "classes": facts["counts"],
        }
        (folder / TRAINED).write_text(json.dumps(trained) + "\n")
        write_card(folder, config, space, result["evaluation"], facts)
        draw_curves(folder / "curves.png", history)
        if len(truth):
            predicted = evaluated.predictions.classes
            write_confusions(folder / "confusions.csv", predicted, truth, space)
            draw_confusion(folder / "confusion.png", predicted, truth, space)
        counts = None if config.start else facts["counts"]
        _write_heldout(folder, data, evaluated, *novel, counts)
        if len(evaluated.vectors) > 1:  # one point has no plane
            phylum = truth[evaluated.vector_rows, 1]
            draw_vectors(folder / "vectors.png", evaluated.vectors, phylum, space.names(1))


def _write_heldout(
    folder: Path,
    data: Data,
    evaluated: Evaluated,
    novel_vectors: np.ndarray,
    novel: Examples,
    counts: Sequence[Sequence[int]] | None,
) -> None:
    """Write what was not trained on, if there is any.

    Of given classes some may have had no training sequence (`counts`, of each rank): they are as
    new to the model as names that are no class. What a model to go on from has seen is not known.
    """
    some = evenly_spaced(len(evaluated.vectors), MOST_EVALUATED)
    held = data.eval.select(evaluated.vector_rows[some])
    parts = [part for part in (evaluated.vectors[some], novel_vectors) if len(part)]
    if parts:
        lineages = [*held.lineages, *novel.lineages]
        sequences = [*held.sequences, *novel.sequences]
        classes = data.space.encode(lineages)
        for of_rank, count in zip(classes.T, counts or (), strict=False):
            of_rank[(np.array([*count, 1]) == 0)[of_rank]] = UNKNOWN  # -1 is the last, which stays
        write_heldout(folder, np.concatenate(parts), sequences, lineages, classes)


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """A folder to write into, whose content then takes the place of what the model's folder has.

    Whoever reads while it is moved, or after a kill, finds no `labels.json`, never a mixture.
    """
    new = folder / ".new"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    yield new
    share_weights(new)
    (folder / _LAST).unlink(missing_ok=True)
    for name in (HELDOUT, "confusions.csv", "confusion.png", "vectors.png"):
        (folder / name).unlink(missing_ok=True)  # the new model may have none
    if not all(_is_equal(folder / name, new / name) for name in (ADAPTER, TRAINED)):
        shutil.rmtree(folder / "merged", ignore_errors=True)  # of other weights
    for part in sorted(new.iterdir(), key=lambda path: path.name == _LAST):
        if part.is_dir():
            shutil.rmtree(folder / part.name, ignore_errors=True)
        os.replace(part, folder / part.name)
    new.rmdir()


def _is_equal(one: Path, other: Path) -> bool:
    return one.is_file() and filecmp.cmp(one, other, shallow=False)


def _write_weights(
    folder: Path, config: FinetuneConfig, classifier: TaxonomyClassifier, space: LabelSpace
) -> None:
    """Write the adapter, the heads, the labels and, if it was asked for, the merged model."""
    state = trainable_state(classifier)
    adapter = {
        name.removeprefix("encoder."): value
        for name, value in state.items()
        if name.startswith("encoder.")
    }
    encoder: Any = classifier.encoder
    # It never holds a copy of the embeddings, so PEFT need not ask the hub about the base.
    encoder.save_pretrained(folder / "adapter", state_dict=adapter, save_embedding_layers=False)
    (folder / "adapter" / "README.md").unlink(missing_ok=True)  # PEFT's empty form; ours is above
    reading = {"frames": classifier.frames, "strands": classifier.strands}
    (folder / "adapter" / READING).write_text(json.dumps(reading) + "\n")
    heads = {
        name.removeprefix("heads."): value
        for name, value in state.items()
        if name.startswith("heads.")
    }
    save_file(heads, folder / "heads.safetensors", {"format": "pt"})
    space.save(folder / _LAST)
    if config.save_merged:
        # A copy: merging changes layers that the classifier still uses.
        merged = copy.deepcopy(classifier.encoder).cpu().merge_and_unload()  # type: ignore[operator]
        merged.config.update(reading)
        with no_bars():
            merged.save_pretrained(folder / "merged")
        save_tokenizer(folder / "merged")


def push_to_hub(folder: str, repository: str) -> None:
    """Upload a model folder without its checkpoints; the token is that of HF_TOKEN.

    Raises:
        SyncError: it could not be uploaded; the folder is complete.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repository, exist_ok=True)
        api.upload_folder(
            folder_path=folder, repo_id=repository, ignore_patterns=["checkpoints/**", "wandb/**"]
        )
    except Exception as error:  # the transport under the hub's client has errors of its own
        raise SyncError(
            f"the model is finished and complete in {folder}, but could not be uploaded to "
            f"{repository!r} ({str(error).strip()}); check the name, the network and HF_TOKEN, "
            "then run the same command again: it uploads without training again"
        ) from error
