"""A training step against the Hugging Face Trainer, and what checkpointing saves.

`python tests/bench/training.py [--sequences 192]` trains the same model, LoRA, heads, loss, batch
and precision in both, in turn, and prints sequences a second and their ratio from one run; then
the peak memory of the product with and without gradient checkpointing, each in its own process.
"""

import argparse
import logging
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from bioscan_xla.finetune import finetune
from bioscan_xla.options import FinetuneConfig
from bioscan_xla.reads.lineages import RANKS
from bioscan_xla.reads.tokens import load_tokenizer
from bioscan_xla.sample import write_model
from bioscan_xla.training.classifier import TaxonomyClassifier, attach_adapter
from bioscan_xla.training.loss import rank_loss

BATCH = 16


def write_labelled(path, count):
    """Random sequences of at most 1,800 bp with random lineages."""
    from embedding import mixed_sequences

    rng = np.random.default_rng(0)
    sequences = [text[:1800] for text in mixed_sequences(count)]
    columns = {"sequence_id": [f"s{n}" for n in range(count)], "dna_sequence": sequences}
    for rank in RANKS:
        columns[rank] = [f"{rank.title()}{'ab'[n]}" for n in rng.integers(0, 2, count)]
    pq.write_table(pa.table(columns), path)


def config(folder, output, **more):
    """The same settings for both; `more` goes before them."""
    options = {
        "train": str(Path(folder, "labelled.parquet")),
        "model": str(Path(folder, "model")),
        "output": str(Path(folder, output)),
        "device": "cpu",
        "dtype": "float32",
        "num_epochs": 1,
        "batch_size": BATCH,
        "eval_fraction": 0.0,
        "min_sequences": 1,
        "reverse_complement": 0.0,
        "frame_shift": False,
    }
    return FinetuneConfig(**options | more)


def train_ours(folder, output, **more):
    """Seconds of the epoch."""
    from bioscan_xla.training import loop as training_loop

    seconds = []
    run_epoch = training_loop.Loop.run_epoch

    def timed(self, stop):
        start = time.perf_counter()
        run_epoch(self, stop)
        seconds.append(time.perf_counter() - start)

    training_loop.Loop.run_epoch = timed
    try:
        finetune(config(folder, output, **more))
    finally:
        training_loop.Loop.run_epoch = run_epoch
    return seconds[0]


class _ForTrainer(torch.nn.Module):
    """The same parts as a Trainer takes them: padded batches, a loss in the output."""

    def __init__(self, folder, space):
        from transformers import EsmModel

        super().__init__()
        esm = EsmModel.from_pretrained(Path(folder, "model"), add_pooling_layer=False)
        self.encoder = attach_adapter(esm)
        self.heads = TaxonomyClassifier(torch.nn.Identity(), esm.config.hidden_size, space).heads

    def forward(self, input_ids, attention_mask, labels):
        """Mean over real tokens, heads, the same loss."""
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None].float()
        vectors = (states * mask).sum(1) / mask.sum(1)
        logits = [head(vectors) for head in self.heads.values()]
        return {"loss": rank_loss(logits, labels).total}


def train_theirs(folder, **more):
    """Seconds of the epoch, by the Trainer's own clock, batches grouped by length."""
    from transformers import Trainer, TrainingArguments

    from bioscan_xla.training.setup import prepare_data

    same = config(folder, "unused", **more)
    data = prepare_data(same)
    tokenizer = load_tokenizer()
    rows = [
        {"input_ids": tokenizer(text)["input_ids"], "labels": labels}
        for text, labels in zip(data.train.sequences, data.train_labels, strict=True)
    ]

    def collate(items):
        batch = tokenizer.pad(
            {"input_ids": [item["input_ids"] for item in items]}, return_tensors="pt"
        )
        labels = torch.from_numpy(np.stack([item["labels"] for item in items]))
        return {
            "input_ids": batch["input_ids"],
            "attention_mask": batch["attention_mask"],
            "labels": labels,
        }

    options = TrainingArguments(
        str(Path(folder, "trainer")),
        per_device_train_batch_size=same.batch_size,
        num_train_epochs=1,
        learning_rate=2e-4,
        use_cpu=same.device == "cpu",
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        train_sampling_strategy="group_by_length",
        remove_unused_columns=False,
    )
    trainer = Trainer(
        _ForTrainer(folder, data.space), options, train_dataset=rows, data_collator=collate
    )
    return trainer.train().metrics["train_runtime"]


def measure_memory(folder, on, connection):
    """Send the peak resident memory of one epoch, MiB."""
    logging.disable()
    finetune(config(folder, f"memory-{on}", gradient_checkpointing=on))
    connection.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main():
    """Print both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, default=192)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    logging.disable()
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder, "model"), hidden=256, layers=6, heads=8)
        write_labelled(Path(folder, "labelled.parquet"), options.sequences)
        # First, because a process begins with the peak of the one that started it.
        spawn = multiprocessing.get_context("spawn")
        peaks = {}
        for on in (False, True):
            end, other = spawn.Pipe()
            process = spawn.Process(target=measure_memory, args=(folder, on, other))
            process.start()
            peaks[on] = end.recv()
            process.join()
        print(
            f"peak memory {peaks[False]:,.0f} MiB; with gradient checkpointing "
            f"{peaks[True]:,.0f} MiB"
        )
        ours, theirs = [], []
        for number in range(options.rounds):
            ours.append(train_ours(folder, f"ours-{number}"))
            theirs.append(train_theirs(folder))
        print(
            f"{options.sequences} sequences, batch {BATCH}, float32, "
            f"{torch.get_num_threads()} threads"
        )
        for name, seconds in (("bioscan_xla", ours), ("Hugging Face Trainer", theirs)):
            print(f"{name:22} {options.sequences / min(seconds):7.1f} sequences/s")
        print(f"ratio {min(theirs) / min(ours):.2f}")


if __name__ == "__main__":
    main()
