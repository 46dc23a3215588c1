"""Batched nearest-neighbour search against LanceDB's defaults and FAISS IVF-PQ.

`python tests/bench/search.py [--rows 1000000] [--folder FOLDER]` draws vectors of 2,560 numbers
from a seeded mixture of genera and species, writes them as float16 into a table, builds each index
in a process of its own (seconds and peak memory), and then asks all of them the same queries, in
turn, `--rounds` times over. Prints queries a second of the best round, and recall at 10 against an
exact search in float32. A folder is kept and used again; without one everything is temporary. FAISS
takes part where it is installed (`pip install faiss-cpu`); its index holds no vectors to rank again
by.
"""

import argparse
import json
import logging
import multiprocessing
import os
import resource
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from bioscan_xla.table.neighbours import open_table, search_vectors
from bioscan_xla.table.rows import make_rows, storable, table_schema
from bioscan_xla.table.store import Store

HIDDEN, K = 2560, 10
GENERA, SPECIES = 2_000, 5  # species of each genus
LATENT = 256
CHUNK = 20_000


class Mixture:
    """Vectors with a common mean, genera, species and individuals in a decaying spectrum."""

    def __init__(self, seed=0):
        rng = np.random.default_rng(seed)
        self.scale = np.arange(1, LATENT + 1, dtype=np.float32) ** -0.5
        total = float(np.square(self.scale).sum())
        self.basis = rng.standard_normal((LATENT, HIDDEN), np.float32) / total**0.5
        self.mean = 2 * rng.standard_normal(HIDDEN, np.float32)
        genera = rng.standard_normal((GENERA, 1, LATENT), np.float32)
        species = rng.standard_normal((GENERA, SPECIES, LATENT), np.float32)
        self.centres = (genera + 0.5 * species).reshape(-1, LATENT)
        share = rng.permutation(np.arange(1, GENERA * SPECIES + 1) ** -0.7)
        self.share = share / share.sum()

    def draw(self, count, seed):
        """(count, HIDDEN) float32."""
        rng = np.random.default_rng([1, seed])
        chosen = rng.choice(len(self.share), count, p=self.share)
        latent = self.centres[chosen] + 0.3 * rng.standard_normal((count, LATENT), np.float32)
        noise = 0.05 * rng.standard_normal((count, HIDDEN), np.float32)
        return (latent * self.scale) @ self.basis + self.mean + noise


def make_table(folder, rows, queries):
    """Write the table chunk by chunk, and the exact answers beside it."""
    mixture = Mixture()
    asked = mixture.draw(queries, -1 % 2**31)
    unit = torch.nn.functional.normalize(torch.from_numpy(asked))
    best, owners = torch.full((queries, K), -2.0), torch.zeros((queries, K), dtype=torch.int64)
    schema = table_schema(HIDDEN, "float16", pa.schema([]), False, {"model": "mixture"})
    store = Store.open(str(Path(folder, "ours")), "embeddings", schema)
    for first in range(0, rows, CHUNK):
        count = min(CHUNK, rows - first)
        vectors, _ = storable(mixture.draw(count, first), schema)
        numbers = np.arange(first, first + count)
        ids = [str(number) for number in numbers]
        metadata = pa.table({})
        store.append([make_rows(ids, ids, metadata, "mixture", numbers, vectors, schema)])
        scores = unit @ torch.nn.functional.normalize(torch.from_numpy(vectors).float()).T
        values, at = torch.cat([best, scores], 1).topk(K)
        best = values
        owners = torch.cat([owners, torch.arange(first, first + count).expand(queries, -1)], 1)
        owners = owners.gather(1, at)
    # The indexes come later, each timed; the scalar ones belong to no one's figure.
    store.finish()
    shutil.copytree(Path(folder, "ours"), Path(folder, "lancedb"), copy_function=os.link)
    np.save(Path(folder, "queries.npy"), asked)
    np.save(Path(folder, "answers.npy"), owners.numpy())


def index_ours(folder):
    """What `embed --vector-index true` does at its end."""
    schema = table_schema(HIDDEN, "float16", pa.schema([]), False, {"model": "mixture"})
    Store.open(str(Path(folder, "ours")), "embeddings", schema).finish(vector_index=True)


def index_lancedb(folder):
    """LanceDB's default index, for cosine."""
    open_table(str(Path(folder, "lancedb"))).create_index(metric="cosine")


def index_faiss(folder):
    """IVF-PQ as FAISS's guide has it for a million vectors: 4,096 lists, 64 bytes a vector."""
    import faiss

    table = open_table(str(Path(folder, "ours")))
    lists = 1 << int(np.log2(4 * table.count_rows() ** 0.5))
    index = faiss.index_factory(HIDDEN, f"IVF{lists},PQ64", faiss.METRIC_INNER_PRODUCT)
    mixture = Mixture()
    sample = mixture.draw(min(table.count_rows(), 40 * lists), -2 % 2**31)
    faiss.normalize_L2(sample)
    index.train(sample)
    for vectors in _stored(table):
        faiss.normalize_L2(vectors)
        index.add(vectors)
    faiss.write_index(index, str(Path(folder, "faiss.index")))


def _stored(table):
    for batch in table.search().select(["vector"]).to_batches(CHUNK):
        yield np.array(batch["vector"].flatten()).reshape(-1, HIDDEN).astype(np.float32)


def ask_ours(folder):
    """The product's search, all queries in one call."""
    table = open_table(str(Path(folder, "ours")))

    def ask(queries):
        found = search_vectors(table, queries, K)
        return np.array([[int(name) for name in one["sequence_id"].to_pylist()] for one in found])

    return ask


def ask_lancedb(folder, refine=None):
    """LanceDB's search with its default probes, all queries in one call."""
    table = open_table(str(Path(folder, "lancedb")))

    def ask(queries):
        query = table.search(queries, vector_column_name="vector").distance_type("cosine")
        if refine:
            query = query.refine_factor(refine)
        found = query.select(["sequence_id", "_distance"]).limit(K).to_arrow()
        result = np.full((len(queries), K), -1)
        names, owners = found["sequence_id"].to_pylist(), found["query_index"].to_pylist()
        filled = np.zeros(len(queries), int)
        for name, owner in zip(names, owners, strict=True):
            result[owner, filled[owner]] = int(name)
            filled[owner] += 1
        return result

    return ask


def ask_faiss(folder, probes):
    """FAISS, all queries in one call, on this process's threads."""
    import faiss

    index = faiss.read_index(str(Path(folder, "faiss.index")))
    index.nprobe = probes
    faiss.omp_set_num_threads(torch.get_num_threads())

    def ask(queries):
        queries = np.array(queries)
        faiss.normalize_L2(queries)
        return index.search(queries, K)[1]

    return ask


INDEXES = {"bioscan_xla": index_ours, "LanceDB": index_lancedb, "FAISS": index_faiss}
WAYS = {
    "bioscan_xla": ask_ours,
    "LanceDB, its defaults": ask_lancedb,
    "LanceDB, refine_factor 10": lambda folder: ask_lancedb(folder, 10),
    "FAISS IVF-PQ, 16 probes": lambda folder: ask_faiss(folder, 16),
    "FAISS IVF-PQ, 256 probes": lambda folder: ask_faiss(folder, 256),
}


def _measured(make, folder, connection):
    logging.disable()
    start = time.perf_counter()
    try:
        make(folder)
        seconds = time.perf_counter() - start
    except ImportError as error:
        connection.send(str(error))
        return
    connection.send((seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20))


def build(folder, wanted):
    """Build the indexes that are missing; their figures are kept in `indexes.json`."""
    path = Path(folder, "indexes.json")
    done = json.loads(path.read_text()) if path.is_file() else {}
    spawn = multiprocessing.get_context("spawn")
    for name in wanted:
        if name in done:
            continue
        end, other = spawn.Pipe()
        process = spawn.Process(target=_measured, args=(INDEXES[name], folder, other))
        process.start()
        other.close()
        done[name] = end.recv()
        process.join()
        path.write_text(json.dumps(done))
    return done


def main():
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=1_000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--folder", help="kept, and used again")
    parser.add_argument("--indexes", nargs="*", choices=INDEXES, default=list(INDEXES))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or temporary
        if not Path(folder, "answers.npy").is_file():
            make_table(folder, options.rows, options.queries)
        built = build(folder, options.indexes)
        queries = np.load(Path(folder, "queries.npy"))[: options.queries]
        answers = np.load(Path(folder, "answers.npy"))[: options.queries]
        print(f"{options.rows:,} vectors of {HIDDEN}, float16; {torch.get_num_threads()} threads")
        for name, figures in built.items():
            words = (
                figures
                if isinstance(figures, str)
                else "index {:7.1f} s, {:5.1f} GiB".format(*figures)
            )
            print(f"{name:26} {words}")
        made = {}
        for name, make in WAYS.items():
            if isinstance(built.get(name.split()[0].strip(",")), list | tuple):
                made[name] = make(folder)
        best, recalls = {}, {}
        for _ in range(options.rounds):
            for name, ask in made.items():
                start = time.perf_counter()
                found = ask(queries)
                seconds = time.perf_counter() - start
                best[name] = min(best.get(name, seconds), seconds)
                pairs = zip(found, answers, strict=True)
                recalls[name] = np.mean([len({*a} & {*b}) / K for a, b in pairs])
        for name, seconds in best.items():
            print(
                f"{name:26} {len(queries) / seconds:8.1f} queries/s, recall at {K} "
                f"{recalls[name]:.3f}"
            )


if __name__ == "__main__":
    main()
