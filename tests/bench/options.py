"""What each option of training changes, on the built-in sample or on a labelled file.

`python tests/bench/options.py [FILE.parquet] [--sequences 800] [--epochs 12]` trains the same model
on the same split once for each option, and prints the accuracy at genus on the held-out reads: as
they are, without their first 1 to 5 bases, from the other strand, and their middle third only; then
the macro-F1 at genus, the calibration error, and the share of inconsistent lineages.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from bioscan_xla.finetune import choose_backend
from bioscan_xla.options import FinetuneConfig
from bioscan_xla.sample import write_model, write_sample

GENUS = 5
PLAIN = {"reverse_complement": 0.0, "frame_shift": False}
OPTIONS = {
    "none": {},
    "frame_shift": {"frame_shift": True},
    "reverse_complement 0.5": {"reverse_complement": 0.5},
    "both": {"frame_shift": True, "reverse_complement": 0.5},
    "frame_shift, crop 0.5": {"frame_shift": True, "crop": 0.5},
    "label_smoothing 0.1": {"label_smoothing": 0.1},
    "class_balance 1": {"class_balance": 1.0},
    "consistency 1": {"consistency": 1.0},
}


def reads(sequences):
    """The held-out reads in four forms."""
    rng = np.random.default_rng(0)
    yield "as is", sequences
    yield "shifted", [text[rng.integers(1, 6) :] for text in sequences]
    complement = str.maketrans("ACGT", "TGCA")
    yield "strand", [text.translate(complement)[::-1] for text in sequences]
    yield "third", [text[len(text) // 3 : -(len(text) // 3)] for text in sequences]


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", nargs="?", type=Path)
    parser.add_argument("--sequences", type=int, default=800)
    parser.add_argument("--epochs", type=int, default=12)
    options = parser.parse_args()
    choose_backend("cpu")
    from bioscan_xla.finetune import finetune
    from bioscan_xla.training.evaluation import predict
    from bioscan_xla.training.metrics import accuracy, evaluate
    from bioscan_xla.training.setup import prepare_data

    forms = ("as is", "shifted", "strand", "third")
    print(
        f"{'option':24}" + "".join(f"{name:>9}" for name in (*forms, "macro-F1", "ECE", "incons."))
    )
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        if options.file:
            table = pq.read_table(options.file)
            rows = np.random.default_rng(0).permutation(table.num_rows)[: options.sequences]
            pq.write_table(table.take(rows), work / "labelled.parquet")
        else:
            write_sample(work / "labelled.parquet", options.sequences)
        write_model(work / "model")
        for number, (name, changed) in enumerate(OPTIONS.items()):
            config = FinetuneConfig(
                train=str(work / "labelled.parquet"),
                output=str(work / f"out{number}"),
                model=str(work / "model"),
                device="cpu",
                dtype="float32",
                num_epochs=options.epochs,
                batch_size=16,
                learning_rate=3e-3,
                eval_fraction=0.25,
                **PLAIN | changed,
            )
            finetune(config)
            from bioscan_xla.encode.runtime import open_device
            from bioscan_xla.training.classifier import load_classifier

            device = open_device("cpu", "float32")
            classifier = load_classifier(config.output, device)
            data = prepare_data(config)
            figures = []
            for form, texts in reads(data.eval.sequences):
                probabilities, _ = predict(classifier, device, texts, 1000)
                found = probabilities[GENUS].argmax(1)
                figures.append(accuracy(found, data.eval_labels[:, GENUS]))
                if form == "as is":
                    whole = evaluate(probabilities, data.eval_labels, data.space)
            keys = ("genus/macro_f1", "genus/calibration_error", "inconsistent")
            figures += [whole[key] for key in keys]
            print(f"{name:24}" + "".join(f"{value:9.3f}" for value in figures), flush=True)


if __name__ == "__main__":
    main()
