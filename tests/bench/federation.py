"""Sites with disjoint families over several rounds beside central training, in one run.

`python tests/bench/federation.py [FILE.parquet] [--sites 4] [--rounds 6] [--epochs 2]
[--sequences 4000] [--optimizer adamw] [--learning-rate 0.003] [--central]` splits the file (by
default the built-in sample) into a fifth to evaluate on and a training part, whose families are
dealt to the sites so that each has about as many sequences. The sites train from bioscan-small;
after each round it prints the accuracy of the merged model at each rank. With `--central` it
trains on all sequences at once, for as many epochs as all rounds together.
"""

import argparse
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bioscan_xla.encode.packing import FIRST_POSITION
from bioscan_xla.encode.runtime import open_device
from bioscan_xla.federation.agreement import unite, write_site_labels
from bioscan_xla.federation.merging import merge
from bioscan_xla.federation.site import train_site
from bioscan_xla.options import (
    FinetuneConfig,
    LabelUnionConfig,
    MergeConfig,
    SiteConfig,
    SiteLabelsConfig,
)
from bioscan_xla.reads.cleaning import clean_sequences
from bioscan_xla.reads.lineages import RANKS, known_lineage
from bioscan_xla.sample import simulate
from bioscan_xla.training.classifier import load_classifier
from bioscan_xla.training.evaluation import predict
from bioscan_xla.training.run import finetune

FAMILY = RANKS.index("family")


def deal(path, num_sites, most, seed):
    """Rows to evaluate on, and those of each site."""
    table = pq.read_table(path) if path else simulate(400)
    columns = ["dna_sequence", *RANKS]
    rows = table.select(columns).to_pylist()
    _, bad, _ = clean_sequences([row["dna_sequence"] for row in rows])
    rows = [
        {"sequence_id": f"s{at}"}
        | row
        | dict(zip(RANKS, known_lineage([row[rank] for rank in RANKS]), strict=True))
        for at, row in enumerate(rows)
        if at not in bad and len(row["dna_sequence"]) < 5900
    ]
    rows = [row for row in rows if row["family"] and row["genus"]]
    rng = np.random.default_rng(seed)
    rows = [rows[at] for at in rng.permutation(len(rows))[:most]]
    held, train = rows[: len(rows) // 5], rows[len(rows) // 5 :]
    seen = {row["dna_sequence"] for row in train}
    held = [row for row in held if row["dna_sequence"] not in seen]
    sites, home, load = [[] for _ in range(num_sites)], {}, [0] * num_sites
    for family, count in Counter(row["family"] for row in train).most_common():
        home[family] = load.index(min(load))
        load[home[family]] += count
    for row in train:
        sites[home[row["family"]]].append(row)
    return held, sites


def write(path, rows):
    """Write rows as Parquet; the name of the file."""
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def accuracies(folder, held):
    """Accuracy at each rank over the rows whose name is a class."""
    device = open_device("cpu", "float32")
    classifier = load_classifier(folder, device)
    room = classifier.encoder.config.max_position_embeddings - FIRST_POSITION
    sequences, _, _ = clean_sequences([row["dna_sequence"] for row in held])
    predicted = predict(classifier, device, sequences, room)[0]
    truth = classifier.labels.encode([tuple(row[rank] for rank in RANKS) for row in held])
    result = {}
    for number, rank in enumerate(RANKS[1:], 1):
        known = truth[:, number] >= 0
        right = predicted[number].argmax(1)[known] == truth[known, number]
        result[rank] = float(right.mean())
    return result


def show(name, figures, started):
    """Print a line."""
    told = "  ".join(f"{rank} {value:.3f}" for rank, value in figures.items())
    mean, seconds = np.mean(list(figures.values())), time.monotonic() - started
    print(f"{name:12} {told}  mean {mean:.3f}  {seconds:.0f} s", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", nargs="?")
    parser.add_argument("--sites", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--sequences", type=int, default=4000)
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument("--learning-rate", type=float, default=0.003)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--central", action="store_true")
    asked = parser.parse_args()
    held, sites = deal(asked.file, asked.sites, asked.sequences, 0)
    print(
        f"{sum(map(len, sites))} to train on, {[len(site) for site in sites]}; {len(held)} held out"
    )
    started = time.monotonic()
    common = {
        "model": "bioscan-small",
        "device": "cpu",
        "eval_fraction": 0.0,
        "optimizer": asked.optimizer,
        "learning_rate": asked.learning_rate,
        "batch_size": asked.batch_size,
        "warmup_steps": 20,
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = [write(folder / f"{n}.parquet", rows) for n, rows in enumerate(sites)]
        for n, file in enumerate(files):
            write_site_labels(SiteLabelsConfig(train=file, output=str(folder / f"{n}.json")))
        labels = str(folder / "union.json")
        unite(LabelUnionConfig([str(folder / f"{n}.json") for n in range(len(files))], labels, 2))
        if asked.central:
            epochs = asked.rounds * asked.epochs
            more = common | {"num_epochs": epochs, "labels": labels}
            finetune(FinetuneConfig(train=files, output=str(folder / "central"), **more))
            show("central", accuracies(folder / "central", held), started)
        more = {"labels": labels}
        for number in range(1, asked.rounds + 1):
            outputs = [str(folder / f"{number}-{n}") for n in range(len(files))]
            for n, (file, output) in enumerate(zip(files, outputs, strict=True)):
                options = common | more | {"num_epochs": asked.epochs}
                train_site(SiteConfig(train=file, output=output, site=f"site {n}", **options))
            merged = str(folder / f"round{number}")
            merge(MergeConfig(outputs, labels, merged))
            show(f"round {number}", accuracies(merged, held), started)
            more = {"start": merged}


if __name__ == "__main__":
    main()
