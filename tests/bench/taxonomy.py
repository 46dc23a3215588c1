"""Per-rank accuracy of a fine-tuned small encoder against 1-nearest-neighbour on 6-mer counts.

`python tests/bench/taxonomy.py FILE.parquet [--encoder FOLDER] [--config YAML]` draws references,
and queries whose class is among them; fine-tunes an encoder on the references (the one given, or
one of random weights, whose embeddings and linear layers then all get an adapter), and names the
queries by the nearest reference in 6-mer counts (cosine), by the heads, and by the nearest
reference among the vectors of the classifier, as they are and whitened. The model of the last
epoch is taken: nothing is chosen by the queries. A name counts as right if it is equal; a query
whose name is not among the references counts as wrong for all.

`--config` takes the options of a YAML of fine-tuning; `--set KEY=VALUE` changes some of them.
"""

import argparse
import logging
import os
import time
from pathlib import Path

os.environ["USE_TORCH_XLA"] = "0"  # before accelerate is imported

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
import yaml
from small_encoder import split

from bioscan_xla.finetune import finetune
from bioscan_xla.options import FinetuneConfig
from bioscan_xla.reads.cleaning import clean_sequences
from bioscan_xla.reads.lineages import known_lineage
from bioscan_xla.sample import write_model

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
    parser.add_argument("--config", type=Path, help="options of fine-tuning")
    parser.add_argument("--set", nargs="*", default=[], help="options that differ: KEY=VALUE")
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
    chosen = {"rank": 64, "alpha": 64, "min_sequences": 1, "num_epochs": 8, "learning_rate": 3e-3}
    encoder = options.encoder
    if encoder is None:
        encoder = work / "encoder"
        write_model(encoder, hidden=256, layers=options.layers)
        chosen["targets"] = ["word_embeddings", "query", "key", "value", "dense"]
    if options.config:
        chosen = yaml.safe_load(options.config.read_text())
    chosen |= {key: yaml.safe_load(value) for key, value in (w.split("=") for w in options.set)}
    chosen |= {"train": str(work / "references.parquet"), "output": str(work / "classifier")}
    chosen |= {"model": str(encoder), "eval_fraction": 0.0, "resume": False}
    chosen |= {"device": "cpu", "dtype": "float32"}
    started, processor = time.time(), time.process_time()
    finetune(FinetuneConfig(**chosen))
    seconds, processor = time.time() - started, time.process_time() - processor
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
        f"{seconds:.0f} s, {processor:.0f} CPU-seconds, {torch.get_num_threads()} threads; {chosen}"
    )
    print(f"{'':20}" + "".join(f"{rank:>9}" for rank in RANKS))
    for name, named in ways.items():
        print(f"{name:20}" + "".join(f"{share:9.3f}" for share in shares(named, queries)))


def _clean(table):
    return clean_sequences(table["dna_sequence"].to_pylist())[0]


if __name__ == "__main__":
    main()
