"""Train the small encoder that comes with the package, and measure it.

`python tests/bench/small_encoder.py FILE.parquet ... --output FOLDER` learns one vector for each
6-mer, so that the mean over all 6-mers of a sequence (that is, over its six reading frames) tells
its lineage: seven linear heads, one label space over all files. Then it turns the table into an
ESM model without layers, in which a plain cosine is that of centred, whitened vectors.

What is evaluated was never trained on: a sequence is trained on if a hash of it falls into 85 %
and a hash of its genus not into the 8 % that are left out whole (`--seed` salts both). `--all`
trains on everything, for the weights that are shipped; it evaluates nothing.
"""

import argparse
import hashlib
import json
import logging
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch import nn
from transformers import EsmModel

from bioscan_xla.encode.architecture import esm_config
from bioscan_xla.encode.encoder import load_encoder
from bioscan_xla.encode.inference import embed_sequences
from bioscan_xla.encode.runtime import open_device
from bioscan_xla.reads.cleaning import clean_sequences
from bioscan_xla.reads.labels import learn_labels
from bioscan_xla.reads.lineages import RANKS, known_lineage
from bioscan_xla.reads.tokens import VOCABULARY, K, save_tokenizer

log = logging.getLogger("small_encoder")

_KMERS = 4**K
_DIGITS = np.arange(_KMERS)[:, None] // 4 ** np.arange(K) % 4
_REVERSED = (_DIGITS ^ 1) @ 4 ** np.arange(K - 1, -1, -1)  # of A T C G, a base and its complement
_TRAINED_SHARE, _NOVEL_SHARE = 0.85, 0.08
_SHORTEST_CROP = 100
# Where a processor has no bfloat16, its products are many times slower than float32.
_PRODUCTS = torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32
_FULL_SOFTMAX = 6000  # of ranks with more classes, so many others are drawn for each step


def share(text, salt):
    """A number from 0 to 1 that depends on the text and the salt alone."""
    return int(hashlib.sha256(f"{salt}:{text}".encode()).hexdigest()[:8], 16) / 2**32


def kmers(sequence):
    """Numbers of all overlapping 6-mers, (6-mers,) int16, in the order of the vocabulary."""
    codes = np.full(256, -1, np.int16)
    codes[np.frombuffer(b"ATCG", np.uint8)] = range(4)
    bases = codes[np.frombuffer(sequence.encode(), np.uint8)]
    windows = np.lib.stride_tricks.sliding_window_view(bases, K)
    numbers = windows @ (4 ** np.arange(K - 1, -1, -1)).astype(np.int16)
    return numbers[windows.min(1) >= 0].astype(np.int16)


def read(paths):
    """Distinct cleaned sequences of files, their lineages and the file of each."""
    found = {}
    for path in paths:
        table = pq.read_table(path, columns=["dna_sequence", *RANKS])
        texts, complaints, _ = clean_sequences(table["dna_sequence"].to_pylist())
        lineages = list(zip(*(table[rank].to_pylist() for rank in RANKS), strict=True))
        for row, text in enumerate(texts):
            if row not in complaints and len(text) >= 2 * K:
                found.setdefault(text, (known_lineage(lineages[row]), Path(path).stem))
    names, files = zip(*found.values(), strict=True)
    return list(found), list(names), np.array(files)


def split(sequences, lineages, seed):
    """For each sequence `train`, `query` or `novel` (of a genus left out whole)."""
    return np.array(
        [
            "novel"
            if lineage[5] and share(lineage[5], f"genus{seed}") < _NOVEL_SHARE
            else "train"
            if share(sequence, seed) < _TRAINED_SHARE
            else "query"
            for sequence, lineage in zip(sequences, lineages, strict=True)
        ]
    )


def counts(rows, rng=None, crop=0.0):
    """Counts of 6-mers, (rows, 4096), and their sums; with `rng`, of random parts."""
    result = np.zeros((len(rows), _KMERS), np.uint8)
    sizes = np.ones(len(rows), np.float32)
    for at, numbers in enumerate(rows):
        if rng is not None and rng.random() < crop and len(numbers) > _SHORTEST_CROP:
            size = int(len(numbers) * rng.uniform(0.3, 1))
            size = max(size, _SHORTEST_CROP)
            start = int(rng.integers(0, len(numbers) - size + 1))
            numbers = numbers[start : start + size]
        result[at] = np.minimum(np.bincount(numbers, minlength=_KMERS), 255)
        sizes[at] = max(1, len(numbers))
    return torch.from_numpy(result).to(_PRODUCTS), torch.from_numpy(sizes)


class Bag(nn.Module):
    """A vector for each 6-mer, and seven heads on the mean."""

    def __init__(self, hidden, num_classes, dropout):
        """Begin at random."""
        super().__init__()
        self.table = nn.Parameter(torch.randn(_KMERS, hidden) * 0.3)
        self.norm = nn.LayerNorm(hidden)
        self.dropout = nn.Dropout(dropout)
        self.heads = nn.ModuleList(nn.Linear(hidden, max(1, n)) for n in num_classes)

    def states(self):
        """The vector of each 6-mer, (4096, hidden), of mean zero and the same on both strands."""
        table = self.table - self.table.mean(1, keepdim=True)
        return (table + table[_REVERSED]) / 2

    def vectors(self, part, sizes):
        """Means over the 6-mers, (rows, hidden) float32."""
        table = self.states()
        # Products of small whole numbers: bfloat16 costs the table's own rounding only.
        return (part @ table.to(_PRODUCTS)).float() / sizes[:, None]

    def losses(self, vectors, labels, smoothing):
        """Cross-entropy at each rank; of many classes those of the batch and some others."""
        states = self.dropout(self.norm(vectors))
        for rank, head in enumerate(self.heads):
            known = labels[:, rank] >= 0
            if not known.any():
                continue
            wanted, weight, bias = labels[known, rank], head.weight, head.bias
            if len(weight) > _FULL_SOFTMAX:
                drawn = torch.randint(len(weight), (_FULL_SOFTMAX,))
                chosen, wanted = torch.unique(torch.cat([wanted, drawn]), return_inverse=True)
                wanted = wanted[: int(known.sum())]
                weight, bias = F.embedding(chosen, weight), bias[chosen]
            logits = (states[known].to(_PRODUCTS) @ weight.to(_PRODUCTS).T).float() + bias
            yield F.cross_entropy(logits, wanted, label_smoothing=smoothing)


def train(bag, rows, labels, options):
    """Train for some epochs; a line of the log for each."""
    rng = np.random.default_rng(options.seed)
    optimizer = torch.optim.AdamW(
        bag.parameters(), lr=options.learning_rate, weight_decay=0.01, fused=True
    )
    steps = options.epochs * (len(rows) // options.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, options.learning_rate, total_steps=steps + 1, pct_start=0.05
    )
    started = time.time()
    for epoch in range(options.epochs):
        order, total = rng.permutation(len(rows)), 0.0
        bag.train()
        for step in range(len(rows) // options.batch):
            at = order[step * options.batch : (step + 1) * options.batch]
            part, sizes = counts([rows[n] for n in at], rng, options.crop)
            loss = sum(bag.losses(bag.vectors(part, sizes), labels[at], options.smoothing))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(bag.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += float(loss.detach())
        log.info("epoch %d loss %.3f %.0f s", epoch + 1, total / step, time.time() - started)


@torch.no_grad()
def embed(table, rows):
    """Vectors of sequences by a table, (rows, hidden) float32, exactly."""
    parts = []
    for first in range(0, len(rows), 1024):
        part, sizes = counts(rows[first : first + 1024])
        parts.append(part.float() @ table / sizes[:, None])
    return torch.cat(parts)


@torch.no_grad()
def whiten(table, rows, shrink):
    """The table in which vectors have mean zero and directions about equal spread.

    Returns:
        (4096, hidden), its rows of mean zero: the direction of least spread is left out.
    """
    hidden = table.shape[1]
    vectors = embed(table, rows)
    unit = F.normalize(vectors)
    del vectors
    mean = unit.mean(0)
    values, directions = torch.linalg.eigh(torch.cov((unit - mean).T).double())
    values, directions = values[1:].float(), directions[:, 1:].float()
    scale = (values + shrink * values.mean()) ** -0.5
    # The mean over tokens is not of unit length, so the centre is that of the vectors themselves.
    centre = embed(table, rows).mean(0)
    white = (table - centre) @ (directions * scale)
    # hidden - 1 numbers into hidden ones with mean zero: what a LayerNorm can give.
    basis = torch.linalg.qr(torch.cat([torch.ones(hidden, 1), torch.eye(hidden)[:, 1:]], 1))[0]
    return white @ basis[:, 1:].T


def write(table, folder):
    """Write a table of 6-mer vectors as an ESM model without layers, float16.

    The LayerNorm behind the embeddings gives y = e / sqrt(var(e) + 1), so e = y / sqrt(1 - var(y)).
    Other tokens (`<cls>`, single bases, N) are zero there, and positions are: they only count.
    """
    table = table * (0.5 / table.var(1, unbiased=False).max()).sqrt()
    table = table / (1 - table.var(1, unbiased=False, keepdim=True)).sqrt()
    config = esm_config(table.shape[1], layers=0, heads=4)
    config.update({"token_dropout": False, "layer_norm_eps": 1.0, "frames": 6})
    config.update({"vocab_size": len(VOCABULARY), "dtype": "float16"})
    model = EsmModel(config, add_pooling_layer=False)
    with torch.no_grad():
        for parameter in model.embeddings.parameters():
            parameter.zero_()
        first = VOCABULARY.index("A" * K)
        model.embeddings.word_embeddings.weight[first : first + _KMERS] = table
    model.half().save_pretrained(folder)
    save_tokenizer(folder)


def check(table, folder, sequences):
    """The ordinary encoder gives the vectors of the table.

    Sequences with N are left out, behind which the tokenizer begins anew in all six frames, and
    those of more than one window.
    """
    sequences = [text for text in sequences if len(text) < 5900 and not set(text) - set("ACGT")]
    encoder = load_encoder(str(folder), device=open_device("cpu", "float32"))
    found = torch.from_numpy(embed_sequences(encoder, sequences))
    wanted = embed(table, [kmers(sequence) for sequence in sequences])
    least = float(F.cosine_similarity(found, wanted).min())
    log.info("the model's vectors against the table's: cosine at least %.6f", least)
    assert least > 0.999


def nearest(references, queries, k):
    """Numbers of the k nearest references by cosine, (queries, k)."""
    references = F.normalize(references)
    return torch.cat([(p @ references.T).topk(k).indices for p in F.normalize(queries).split(512)])


def right(found, wanted, named):
    """Share of equal labels among those that have a name; one never trained on counts as wrong."""
    equal = (found == wanted) & (wanted >= 0)
    return round(float(equal[named].float().mean()), 3) if named.any() else None


def shuffled(sequences, lineages, files, limit=None):
    """The same in a fixed random order."""
    keep = np.random.default_rng(0).permutation(len(sequences))[:limit]
    return [sequences[n] for n in keep], [lineages[n] for n in keep], files[keep]


def sides(parts, files, num_queries):
    """Of each file, for `query` and `novel`: the references' numbers, and those of some queries."""
    rng = np.random.default_rng(0)
    for file in dict.fromkeys(files):
        references = np.flatnonzero((parts == "train") & (files == file))
        for kind in ("query", "novel"):
            queries = np.flatnonzero((parts == kind) & (files == file))
            yield file, kind, references, rng.permutation(queries)[:num_queries]


@torch.no_grad()
def evaluate(bag, white, rows, labels, named, parts, files, options):
    """Accuracies at order, family, genus and species of heads and nearest neighbours."""
    for file, kind, references, queries in sides(parts, files, options.queries):
        there = [rows[n] for n in references], [rows[n] for n in queries]
        ways = {"6-mer counts": torch.eye(_KMERS), "raw": bag.states(), "white": white}
        for name, table in ways.items():
            if name == "6-mer counts":
                a, b = (torch.cat([counts(r)[0]]).float() for r in there)
            else:
                a, b = (embed(table, r) for r in there)
            near = nearest(a, b, 20)
            by_rank = labels[references][near]  # (queries, 20, 7)
            wanted, has = labels[queries], named[queries]
            line = {
                r: right(by_rank[:, 0, at], wanted[:, at], has[:, at]) for at, r in enumerate(RANKS)
            }
            hit = ((by_rank[..., 6] == wanted[:, None, 6]) & (wanted[:, None, 6] >= 0)).any(1)
            line["species in 20"] = round(float(hit[has[:, 6]].float().mean()), 3)
            log.info("%s %s %s %s", file, kind, name, json.dumps(line))
        states = bag.eval().norm(embed(bag.states(), there[1]))
        line = {
            rank: right(bag.heads[at](states).argmax(1), wanted[:, at], has[:, at])
            for at, rank in enumerate(RANKS)
        }
        log.info("%s %s heads %s", file, kind, json.dumps(line))


def main():
    """Train, evaluate, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--all", action="store_true", help="train on everything")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--smoothing", type=float, default=0.1)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--crop", type=float, default=0.5)
    parser.add_argument("--shrink", type=float, default=0.1)
    parser.add_argument("--queries", type=int, default=1500)
    parser.add_argument("--limit", type=int, help="so many sequences, to try the script")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    handlers = [logging.StreamHandler(), logging.FileHandler(options.output / "training.log")]
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=handlers, force=True)
    log.info("%s", vars(options))
    torch.manual_seed(options.seed)
    sequences, lineages, files = read(options.files)
    sequences, lineages, files = shuffled(sequences, lineages, files, options.limit)
    parts = split(sequences, lineages, options.seed)
    if options.all:
        parts[:] = "train"
    rows = [kmers(sequence) for sequence in sequences]
    trained = np.flatnonzero(parts == "train")
    space, _ = learn_labels([lineages[n] for n in trained])
    labels = torch.from_numpy(space.encode(lineages))
    named = torch.tensor([[name is not None for name in lineage] for lineage in lineages])
    log.info("%d to train on, classes %s", len(trained), space.num_classes)
    bag = Bag(options.hidden, space.num_classes, options.dropout)
    train_rows = [rows[n] for n in trained]
    train(bag, train_rows, labels[trained], options)
    white = whiten(bag.states(), train_rows, options.shrink)
    write(white, options.output)
    check(white, options.output, sequences[:400])
    if not options.all:
        evaluate(bag, white, rows, labels, named, parts, files, options)


if __name__ == "__main__":
    main()
