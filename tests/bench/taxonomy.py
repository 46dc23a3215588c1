"""Per-rank accuracy of a fine-tuned small encoder against 1-nearest-neighbour on 6-mer counts.

`python tests/bench/taxonomy.py FILE.parquet [--encoder FOLDER] [--references 20000]` draws
references, and queries whose class is among them; fine-tunes an encoder on the references (the
one given, or one of random weights, whose embeddings and linear layers then all get an adapter),
and names the queries in three ways: by the nearest reference in 6-mer counts (cosine), by the
heads, and by the nearest reference among the vectors of the classifier. A name counts as right if
it is equal; a query whose name is not among the references counts, as wrong, for all three.
"""

import argparse
import logging
import platform
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from small_encoder import split

from bioscan_xla.options import FinetuneConfig
from bioscan_xla.reads.cleaning import clean_sequences
from bioscan_xla.reads.lineages import known_lineage
from bioscan_xla.sample import write_model
from bioscan_xla.training.run import finetune

LINEAGE = ("kingdom", "phylum", "class", "order", "family", "genus", "species")
RANKS = ("phylum", "class", "order", "family", "genus", "species")


def draw(path, num_references, num_queries, seed):
    """References, and queries whose class is among them, as tables.

    The sides are those of `small_encoder.split`, so that an encoder which that script trained with
    this seed has seen no query, and no sequence lies on both.
    """
    table = pq.read_table(path)
    lengths = pc.utf8_length(table["dna_sequence"])
    table = table.filter(pc.greater_equal(lengths, 100))
    rng = np.random.default_rng(seed)
    table = table.take(rng.permutation(table.num_rows))
    names = zip(*(table[rank].to_pylist() for rank in LINEAGE), strict=True)
    parts = split(_clean(table), [known_lineage(name) for name in names], seed)
    references = table.filter(parts == "train").slice(0, num_references)
    rest = table.filter(parts == "query")
    rest = rest.filter(
        pc.is_in(rest["class"], value_set=pc.unique(references["class"]).drop_null())
    )
    return references, rest.slice(0, num_queries)


def six_mers(table):
    """Unit vectors of 6-mer counts, (rows, 4096); windows with another letter do not count."""
    codes = np.full(256, -1, np.int64)
    codes[np.frombuffer(b"ACGT", np.uint8)] = range(4)
    result = np.zeros((table.num_rows, 4096), np.float32)
    for row, text in enumerate(table["dna_sequence"].to_pylist()):
        letters = codes[np.frombuffer(text.upper().replace("U", "T").encode(), np.uint8)]
        windows = np.lib.stride_tricks.sliding_window_view(letters, 6)
        good = (windows >= 0).all(1)
        np.add.at(result[row], windows[good] @ 4 ** np.arange(5, -1, -1), 1)
    return result / np.maximum(np.linalg.norm(result, axis=1, keepdims=True), 1e-9)


def nearest(references, queries):
    """Row of the nearest reference of each query, by cosine of unit vectors."""
    a, b = torch.from_numpy(references), torch.from_numpy(queries)
    return torch.cat([(part @ a.T).argmax(1) for part in b.split(256)]).numpy()


def whiten(references, queries):
    """Both sides, centred and whitened by the references."""
    references, queries = unit(references), unit(queries)
    mean = references.mean(0)
    values, directions = np.linalg.eigh(np.cov((references - mean).T))
    directions = directions / np.sqrt(values + 0.1 * values.mean())
    return unit((references - mean) @ directions), unit((queries - mean) @ directions)


def unit(vectors):
    """Vectors of length 1."""
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def shares(named, queries):
    """Share of right names at each rank, over the queries that have one."""
    result = []
    for rank in RANKS:
        pairs = [(a, b) for a, b in zip(named[rank], queries[rank].to_pylist(), strict=True) if b]
        result.append(np.mean([a == b for a, b in pairs]) if pairs else float("nan"))
    return result


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--encoder", type=Path, help="a pre-trained model; else random weights")
    parser.add_argument("--layers", type=int, default=1, help="of the encoder of random weights")
    parser.add_argument("--references", type=int, default=20_000)
    parser.add_argument("--queries", type=int, default=1_500)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--frames", default=None, help="1, 6 or random; default the encoder's")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0, help="of the split, see small_encoder.py")
    parser.add_argument("--work", type=Path, default=Path("taxonomy-bench"))
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("bioscan_xla").setLevel(logging.INFO)
    work = options.work / options.file.stem
    work.mkdir(parents=True, exist_ok=True)
    references, queries = draw(options.file, options.references, options.queries, options.seed)
    pq.write_table(references, work / "references.parquet")
    pq.write_table(queries, work / "queries.parquet")
    encoder, targets = options.encoder, ["query", "value"]  # without layers the embeddings
    if encoder is None:
        encoder, targets = work / "encoder", ["word_embeddings", "query", "key", "value", "dense"]
        write_model(encoder, hidden=256, layers=options.layers)
    started = time.time()
    finetune(
        FinetuneConfig(
            train=str(work / "references.parquet"),
            eval=str(work / "queries.parquet"),
            output=str(work / "classifier"),
            model=str(encoder),
            targets=targets,
            rank=64,
            alpha=64,
            device="cpu",
            dtype="float32",
            dropout=0.0,
            min_sequences=1,
            num_epochs=options.epochs,
            frames=int(options.frames) if options.frames in ("1", "6") else options.frames,
            batch_size=options.batch_size,
            learning_rate=options.learning_rate,
        )
    )
    seconds = time.time() - started

    from bioscan_xla.encode.runtime import open_device
    from bioscan_xla.training.classifier import load_classifier
    from bioscan_xla.training.evaluation import predict

    device = open_device("cpu", "float32")
    classifier = load_classifier(work / "classifier", device)
    cleaned = [_clean(table) for table in (references, queries)]
    _, reference_vectors = predict(classifier, device, cleaned[0], 1000)
    probabilities, query_vectors = predict(classifier, device, cleaned[1], 1000)
    by_counts = nearest(six_mers(references), six_mers(queries))
    by_vectors = nearest(unit(reference_vectors), unit(query_vectors))
    white = whiten(reference_vectors.astype(np.float64), query_vectors.astype(np.float64))
    by_whitened = nearest(*white)
    names = [classifier.labels.names(rank) for rank in range(7)]
    by_heads = {
        rank: [names[at][n] for n in probabilities[at].argmax(1)]
        for at, rank in enumerate(RANKS, 1)
    }
    ways = {
        "6-mer counts, 1-NN": references.take(pa.array(by_counts)).to_pydict(),
        "heads": by_heads,
        "vectors, 1-NN": references.take(pa.array(by_vectors)).to_pydict(),
        "whitened, 1-NN": references.take(pa.array(by_whitened)).to_pydict(),
    }
    print(
        f"{options.file.name}: {references.num_rows:,} references, {queries.num_rows:,} queries; "
        f"{options.epochs} epochs at {options.learning_rate:g}, {seconds:.0f} s; "
        f"{platform.machine()}, {torch.get_num_threads()} threads"
    )
    print(f"{'':20}" + "".join(f"{rank:>9}" for rank in RANKS))
    for name, named in ways.items():
        print(f"{name:20}" + "".join(f"{share:9.3f}" for share in shares(named, queries)))


def _clean(table):
    return clean_sequences(table["dna_sequence"].to_pylist())[0]


if __name__ == "__main__":
    main()
