"""Names by classify beside those of other programs, on one split, in one run.

`python tests/bench/naming.py FILE.parquet [--seeds 21 22 23] [--methods kmer sintax ...]` holds out
5 % of the genera, draws references from the others, and queries from what is left: of known genera,
and `--novel` (a share) of the held-out ones. No query is identical to a reference. Named by:
`kmer`, classify without a model; `encoder`, with an encoder; `heads`, `both`, `argmax`, with a
fine-tuned one; `sintax` and `global`, vsearch; `bayes`, naive Bayes of 7-mers as
q2-feature-classifier sets it up; `six`, the nearest in 6-mer counts. Encoder and heads are trained
first, on the references alone (small_encoder.py, then fine-tuning), so that no query was seen, and
that of the heads on none of the sequences that fine-tuning holds out: heads look better than they
are where the encoder has learnt their answers.

What was measured is kept in `--work` and not measured again. Over several seeds each figure is the
mean, with the standard deviation.

accuracy: before truncation, over the queries of genera that are not held out whose name at the
rank is known; a name that is absent from the references counts as wrong. named: share of queries
of known genera that keep a genus at the default cutoff; precision: of all kept genera; novel
named: queries of genera that the references lack which are given one. calibration error: of 15
bins, over the queries of all seeds; beside it that of a perfect confidence on as many queries,
which is not zero.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from sklearn.metrics import f1_score, roc_auc_score

from bioscan_xla.classification.journal import read_rows
from bioscan_xla.options import FinetuneConfig
from bioscan_xla.reads.cleaning import clean_sequences
from bioscan_xla.reads.lineages import RANKS, known_lineage
from bioscan_xla.training.metrics import calibration_error
from bioscan_xla.training.setup import prepare_data

GENUS = RANKS.index("genus")
OURS = ["kmer", "encoder", "heads", "both", "argmax"]
METHODS = [*OURS, "sintax", "global", "bayes", "six"]


def draw(path, num_references, num_queries, novel, seed):
    """References and queries as lists of (id, sequence, lineage)."""
    table = pq.read_table(path)
    sequences, bad, _ = clean_sequences(table["dna_sequence"].to_pylist())
    names = zip(*(table[rank].to_pylist() for rank in RANKS), strict=True)
    rows = [
        (f"s{at}", sequence, known_lineage(lineage))
        for at, (sequence, lineage) in enumerate(zip(sequences, names, strict=True))
        if at not in bad and len(sequence) >= 60
    ]
    rng = np.random.default_rng(seed)
    genera = sorted({row[2][GENUS] for row in rows} - {None})
    held = set(rng.choice(genera, max(1, len(genera) // 20), replace=False).tolist())
    rows = [rows[at] for at in rng.permutation(len(rows))]
    known = [row for row in rows if row[2][GENUS] not in held]
    references = known[:num_references]
    taken = {row[1] for row in references}

    def fresh(candidates, number):
        distinct = {row[1]: row for row in candidates if row[1] not in taken}
        return list(distinct.values())[:number]

    num_novel = round(novel * num_queries)
    queries = fresh(known[num_references:], num_queries - num_novel)
    queries += fresh([row for row in rows if row[2][GENUS] in held], num_novel)
    return references, queries


def write_fasta(path, rows, style=None):
    """A FASTA file, with lineages as SINTAX wants them."""
    with open(path, "w") as file:
        for name, sequence, lineage in rows:
            tax = ",".join(
                f"{rank[0]}:{text.replace(',', '_').replace(' ', '_')}"
                for rank, text in zip(RANKS, lineage, strict=True)
                if text
            )
            file.write(f">{name}{f';tax={tax};' if style else ''}\n{sequence}\n")


def timed(command, **options):
    """Run a command; seconds and peak memory in MB."""
    started = time.monotonic()
    process = subprocess.Popen(command, **options)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{command[0]} failed")
    return time.monotonic() - started, usage.ru_maxrss / 1024


def write_rows(path, rows):
    """Labelled sequences as Parquet."""
    columns = {rank: [row[2][at] for row in rows] for at, rank in enumerate(RANKS)}
    ids, sequences, _ = zip(*rows, strict=True)
    pq.write_table(pa.table({"sequence_id": ids, "dna_sequence": sequences, **columns}), path)


def train(path, encoder):
    """An encoder that has seen the sequences of a file only; its folder."""
    if not (encoder / "config.json").is_file():
        command = [sys.executable, str(Path(__file__).parent / "small_encoder.py"), str(path)]
        subprocess.run([*command, "--output", str(encoder), "--all"], check=True)
    return encoder


def tune(work):
    """Encoder and heads that have seen most references; one genus of ten is held out."""
    tuned = work / "tuned"
    if not (tuned / "heads.safetensors").is_file():
        root = Path(__file__).parents[2]
        config = root / "configs" / "finetune_small.yaml"
        options = {"train": str(work / "references.parquet"), "output": str(tuned)}
        options |= {"novel_rank": "genus", "device": "cpu"}
        part = prepare_data(FinetuneConfig(**yaml.safe_load(config.read_text()) | options)).train
        rows = list(zip(part.ids, part.sequences, part.lineages, strict=True))
        write_rows(work / "train.parquet", rows)
        options["model"] = str(train(work / "train.parquet", work / "encoder-train"))
        command = [sys.executable, str(root / "launch" / "finetune.py"), "--config", str(config)]
        for key, value in options.items():
            command += [f"--{key.replace('_', '-')}", str(value)]
        subprocess.run(command, check=True)
    return tuned


def by_classify(work, queries, novel, method):
    """Names, confidence, kept, novelty, and cost; what is done once a reference is timed apart."""
    command = [sys.executable, "-m", "bioscan_xla.classify", "--input", str(work / "queries.fasta")]
    command += ["--reference", str(work / "references.parquet"), "--novel-share", str(novel)]
    if method == "encoder":
        command += ["--model", str(train(work / "references.parquet", work / "encoder"))]
    elif method != "kmer":
        command += ["--model", str(tune(work)), "--method", method]
    costs = []
    for number in range(2):  # the second finds vectors and trials of the reference
        output = str(work / f"{method}{number}")
        shutil.rmtree(output, ignore_errors=True)
        costs.append(timed([*command, "--output", output], stdout=subprocess.DEVNULL))
    found = {row["sequence_id"]: row for row in read_rows(work / f"{method}1")}
    rows = [found[name] for name, _, _ in queries]
    return {
        "best": [[row[f"best_{rank}"] for rank in RANKS] for row in rows],
        "confidence": np.array(
            [[row[f"confidence_{rank}"] or 0.0 for rank in RANKS] for row in rows]
        ),
        "kept": np.array([[row[rank] is not None for rank in RANKS] for row in rows]),
        "novelty": np.array([row["novelty"] or 0.0 for row in rows]),
        "seconds": costs[1][0],
        "megabytes": costs[1][1],
        "once": costs[0][0] - costs[1][0],
    }


def by_sintax(work, queries, threads):
    """`vsearch --sintax`, cutoff 0.8."""
    write_fasta(work / "sintax.fasta", REFERENCES, "sintax")
    command = [
        "vsearch",
        "--sintax",
        str(work / "queries.fasta"),
        "--db",
        str(work / "sintax.fasta"),
    ]
    command += ["--tabbedout", str(work / "sintax.tsv"), "--strand", "both", "--threads", threads]
    seconds, megabytes = timed(command, stderr=subprocess.DEVNULL)
    letters = {rank[0]: at for at, rank in enumerate(RANKS)}
    found = {}
    for line in (work / "sintax.tsv").read_text().splitlines():
        name, text = line.split("\t")[:2]
        best, confidence = [None] * 7, [0.0] * 7
        for part in filter(None, text.split(",")):
            letter, rest = part.split(":", 1)
            taxon, _, value = rest.rpartition("(")
            at = letters[letter]
            best[at], confidence[at] = taxon.replace("_", " "), float(value.rstrip(")"))
        found[name] = best, confidence
    confidence = np.array([found[name][1] for name, _, _ in queries])
    return {
        "best": [found[name][0] for name, _, _ in queries],
        "confidence": confidence,
        "kept": confidence >= 0.8,
        "novelty": 1 - confidence[:, GENUS],
        "seconds": seconds,
        "megabytes": megabytes,
    }


def by_global_search(work, queries, threads):
    """`vsearch --usearch_global --id 0.5`, top hit."""
    command = ["vsearch", "--usearch_global", str(work / "queries.fasta")]
    command += ["--db", str(work / "references.fasta"), "--id", "0.5", "--maxaccepts", "20"]
    command += ["--maxrejects", "100", "--top_hits_only", "--strand", "both", "--threads", threads]
    command += ["--userout", str(work / "hits.tsv"), "--userfields", "query+target+id"]
    seconds, megabytes = timed(command, stderr=subprocess.DEVNULL)
    lineages = {name: lineage for name, _, lineage in REFERENCES}
    first, identity = {}, {}
    for line in (work / "hits.tsv").read_text().splitlines():
        name, target, value = line.split("\t")
        first.setdefault(name, lineages[target])
        identity.setdefault(name, float(value) / 100)
    return {
        "best": [first.get(name, (None,) * 7) for name, _, _ in queries],
        "novelty": np.array([1 - identity.get(name, 0) for name, _, _ in queries]),
        "seconds": seconds,
        "megabytes": megabytes,
    }


def by_naive_bayes(queries):
    """As q2-feature-classifier: 7-mers hashed to 8,192, multinomial, cutoff 0.7."""
    from scipy.sparse import csr_matrix
    from scipy.special import softmax
    from sklearn.feature_extraction.text import HashingVectorizer

    started = time.monotonic()
    hashing = HashingVectorizer(
        analyzer="char_wb", ngram_range=(7, 7), n_features=8192, alternate_sign=False
    )
    whole = [";".join(name or "" for name in row[2]) for row in REFERENCES]
    classes, numbers = np.unique(whole, return_inverse=True)
    chains = [tuple(part or None for part in text.split(";")) for text in classes]
    features = hashing.transform(row[1] for row in REFERENCES)
    # As MultinomialNB(alpha=0.001, fit_prior=False), whose own fit needs rows times classes.
    ones = np.ones(len(numbers)), (numbers, np.arange(len(numbers)))
    weights = (csr_matrix(ones, shape=(len(classes), len(numbers))) @ features).toarray() + 0.001
    weights = np.log(weights / weights.sum(1, keepdims=True)).T
    best, confidence = [], []
    for first in range(0, len(queries), 100):
        part = hashing.transform(row[1] for row in queries[first : first + 100])
        part = softmax(part @ weights, axis=1)
        for shares in part:
            chain = chains[int(shares.argmax())]
            best.append(chain)
            some = np.flatnonzero(shares > 1e-4)
            confidence.append(
                [
                    sum(shares[at] for at in some if chains[at][: r + 1] == chain[: r + 1])
                    for r in range(7)
                ]
            )
    confidence = np.array(confidence)
    return {
        "best": best,
        "confidence": confidence,
        "kept": confidence >= 0.7,
        "novelty": 1 - confidence[:, GENUS],
        "seconds": time.monotonic() - started,
    }


def by_six_mers(queries):
    """Nearest by cosine of 6-mer counts."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.preprocessing import normalize

    started = time.monotonic()
    counting = CountVectorizer(analyzer="char", ngram_range=(6, 6), lowercase=False)
    references = normalize(counting.fit_transform(row[1] for row in REFERENCES).astype(np.float32))
    found = normalize(counting.transform(row[1] for row in queries).astype(np.float32))
    best, cosine = [], []
    for first in range(0, len(queries), 100):
        part = (found[first : first + 100] @ references.T).toarray()
        best += [REFERENCES[at][2] for at in part.argmax(1)]
        cosine += part.max(1).tolist()
    return {
        "best": best,
        "novelty": 1 - np.array(cosine),
        "seconds": time.monotonic() - started,
    }


def name(method, work, queries, unknown):
    """Names by one method."""
    threads = str(len(os.sched_getaffinity(0)))
    if method == "sintax":
        return by_sintax(work, queries, threads)
    if method == "global":
        return by_global_search(work, queries, threads)
    if method == "bayes":
        return by_naive_bayes(queries)
    return by_six_mers(queries) if method == "six" else by_classify(work, queries, unknown, method)


def measure(result, queries):
    """Figures of one method on one split."""
    truth = [row[2] for row in queries]
    present = [{row[2][rank] for row in REFERENCES} for rank in range(7)]
    is_new = np.array([lineage[GENUS] not in present[GENUS] for lineage in truth])
    of_genus = np.array([lineage[GENUS] is not None for lineage in truth])
    held = np.array([lineage[GENUS] in HELD for lineage in truth])
    figures, judged = {}, {}
    for rank, name in list(enumerate(RANKS))[1:]:
        rows = [at for at in range(len(truth)) if truth[at][rank] and not held[at]]
        figures[name] = np.mean([result["best"][at][rank] == truth[at][rank] for at in rows])
        pairs = [(truth[at][rank], result["best"][at][rank] or "-") for at in rows]
        classes = sorted({pair[0] for pair in pairs})
        options = {"average": "macro", "zero_division": 0, "labels": classes}
        figures[f"macro-F1 {name}"] = f1_score(*zip(*pairs, strict=True), **options)
        if "confidence" in result:
            rows = [at for at in range(len(truth)) if truth[at][rank] and result["best"][at][rank]]
            right = [result["best"][at][rank] == truth[at][rank] for at in rows]
            judged[name] = [np.round(result["confidence"][rows, rank], 4).tolist(), right]
    chains = [{row[2][rank - 1 : rank + 1] for row in REFERENCES} for rank in range(7)]
    figures["contradictions"] = np.mean(
        [
            any(a and b and (a, b) not in chains[r] for r, (a, b) in enumerate(pairwise(x), 1))
            for x in result["best"]
        ]
    )
    if "kept" in result:
        kept = result["kept"][:, GENUS]
        right = np.array([b[GENUS] == t[GENUS] for b, t in zip(result["best"], truth, strict=True)])
        figures["named"] = kept[~is_new & of_genus].mean()
        figures["precision"] = right[kept & of_genus].mean()
        figures["novel named"] = kept[is_new & of_genus].mean()
    lengths = np.array([len(row[1]) for row in queries])
    for low, high in ((0, 300), (300, 600), (600, 10**9)):
        rows = of_genus & (lengths > low) & (lengths <= high)
        if min((is_new & rows).sum(), (~is_new & rows).sum()) >= 5:
            figures[f"AUROC {low}+ bp"] = roc_auc_score(is_new[rows], result["novelty"][rows])
    figures["seconds a thousand"] = 1000 * result["seconds"] / len(queries)
    figures |= {key: result[key] for key in ("megabytes", "once") if key in result}
    return {"figures": {key: float(value) for key, value in figures.items()}, "judged": judged}


def describe(method, found):
    """Print the figures of a method over all seeds."""
    print(f"\n{method}")
    for key in dict.fromkeys(key for each in found for key in each["figures"]):
        values = [each["figures"][key] for each in found if key in each["figures"]]
        digits = 0 if key in ("megabytes", "once") else 1 if "seconds" in key else 3
        spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
        print(f"  {key:22}{np.mean(values):9.{digits}f}{spread}")
    rng = np.random.default_rng(0)
    for rank in found[0]["judged"]:
        confidence = np.concatenate([each["judged"][rank][0] for each in found])
        right = np.concatenate([each["judged"][rank][1] for each in found])
        error = calibration_error(confidence, right)
        least = np.mean(
            [calibration_error(confidence, rng.random(len(right)) < confidence) for _ in range(50)]
        )
        print(f"  calibration error {rank:8}{error:5.3f}, of a perfect confidence {least:.3f}")


def prepare(options, seed):
    """Draw a split and write its files; the folder, the queries, and the share of new genera."""
    global REFERENCES, HELD
    work = options.work / f"{options.file.stem}-{seed}"
    work.mkdir(parents=True, exist_ok=True)
    REFERENCES, queries = draw(
        options.file, options.references, options.queries, options.novel, seed
    )
    genera = {row[2][GENUS] for row in REFERENCES}
    HELD = {row[2][GENUS] for row in queries[-round(options.novel * options.queries) :]} - genera
    if not (work / "queries.fasta").is_file():
        write_rows(work / "references.parquet", REFERENCES)
        write_fasta(work / "references.fasta", REFERENCES)
        write_fasta(work / "queries.fasta", queries)
    unknown = np.mean([row[2][GENUS] not in genera for row in queries if row[2][GENUS]])
    print(
        f"{options.file.name}, seed {seed}: {len(REFERENCES):,} references, {len(queries):,} "
        f"queries, {100 * unknown:.0f} % of genera that the references lack",
        flush=True,
    )
    return work, queries, float(unknown)


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--references", type=int, default=15_000)
    parser.add_argument("--queries", type=int, default=1_000)
    parser.add_argument("--novel", type=float, default=0.2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[21])
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--work", type=Path, default=Path("naming-bench"))
    options = parser.parse_args()
    found = {method: [] for method in options.methods}
    for seed in options.seeds:
        work, queries, unknown = prepare(options, seed)
        for method in options.methods:
            kept = work / f"{method}.json"
            if not kept.is_file():
                result = name(method, work, queries, unknown)
                kept.write_text(json.dumps(measure(result, queries)))
            found[method].append(json.loads(kept.read_text()))
    for method, each in found.items():
        describe(method, each)


if __name__ == "__main__":
    main()
