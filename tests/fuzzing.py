"""Mutated inputs and what becomes of them: what the fuzz test and `tests/bench/fuzz.py` share.

A case is a kind of file and a number. The number alone decides what is written and how it is then
damaged, so that a case that fails can be run again: `python tests/bench/fuzz.py --case fasta 17`.
"""

import gzip
import logging
import random
import time
import traceback
from multiprocessing import get_context
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from bioscan_xla.cli import parse
from bioscan_xla.errors import BioscanError
from bioscan_xla.options import EmbedConfig
from bioscan_xla.reads.files import metadata_schema
from bioscan_xla.reads.inputs import expand_inputs
from bioscan_xla.reads.raw import ReadOptions
from bioscan_xla.reads.records import read_chunks
from bioscan_xla.reads.taxonomy import read_taxonomy

KINDS = {
    "fasta": "a.fasta",
    "fasta.gz": "a.fasta.gz",
    "fastq": "a.fastq",
    "fastq.gz": "a.fastq.gz",
    "parquet": "a.parquet",
    "sintax": "sintax.fasta",
    "silva": "silva.fasta",
    "labels": "labels.tsv",
    "yaml": "a.yaml",
}
NAUGHTY = (
    *(
        b"\0",
        b"\xff",
        b"\xef\xbb\xbf",
        b"\r",
        b"\n",
        b"\n\n",
        b">",
        b"@",
        b"+\n",
        b";",
        b"\t",
        b'"',
    ),
    *("Färöer".encode(), "Färöer".encode("latin-1"), "海".encode(), b"\xed\xa0\x80", b"\xc2\x85"),
    *(b"\x1f\x8b\x08", b"PAR1", b"[", b"{", b": ", b"- ", b"&a ", b"*a ", b"2024-99-99", b"!!x "),
    *(b"tax=", b";tax=k:", b"k__", b"? [a]: b", b"1e999", b'"', b"-" * 70, b"A" * 300),
)
OUTCOMES = ("emitted", "rejected and emitted", "product error", "crash", "other error", "hang")


def write_case(folder, kind, number):
    """Write the file of a case; its path."""
    rng = random.Random(f"{kind} {number}")
    path = Path(folder, KINDS[kind])
    content = _plain(rng, kind, path)
    if kind.endswith(".gz"):
        if rng.random() < 0.3:
            content = _mutate(rng, content)
        half = rng.randrange(len(content) + 1)
        first = gzip.compress(content[:half], rng.randrange(10), mtime=0)
        content = first + gzip.compress(content[half:], mtime=0)
    path.write_bytes(_mutate(rng, content) if rng.random() < 0.95 else content)
    return str(path)


def _plain(rng, kind, path):
    ids = [f"s{rng.randrange(40)}" for _ in range(rng.randrange(1, 30))]
    bases = ["".join(rng.choices("ACGTN", k=rng.randrange(15, 90))) for _ in ids]
    records = list(zip(ids, bases, strict=True))
    if kind == "parquet":
        return _parquet(rng, ids, bases, path)
    if kind == "yaml":
        return Path(__file__).parents[1].joinpath("configs/embed_demo.yaml").read_bytes()
    if kind == "labels":
        ranks = "k__Animalia; p__Annelida; c__; o__Sabellida; f__Siboglinidae; g__Osedax; s__"
        return ("Feature ID\tTaxon\n" + "".join(f"{name}\t{ranks}\n" for name in ids)).encode()
    if kind.startswith("fastq"):
        return "".join(f"@{n} x\n{s}\n+\n{'I' * len(s)}\n" for n, s in records).encode()
    lineage = {
        "sintax": ";tax=k:Animalia,p:Annelida,g:Osedax;",
        "silva": " Eukaryota;Opisthokonta;Metazoa (Animalia);Annelida;Osedax",
    }.get(kind, " x")
    return "".join(f">{name}{lineage}\n{s[:40]}\n{s[40:]}\n" for name, s in records).encode()


def _parquet(rng, ids, bases, path):
    columns = {
        "sequence_id": pa.array(ids),
        "dna_sequence": pa.array(bases),
        "species": pa.array(rng.choices(["Osedax rubiplumus", ""], k=len(ids))).dictionary_encode(),
        "depth": pa.array([rng.choice([1.5, None, float("nan"), -1e300]) for _ in ids]),
        "latitude": pa.array(rng.choices(["12", "", "x", None], k=len(ids))),
        "station": pa.array(rng.choices(["A", None], k=len(ids))),
    }
    if rng.random() < 0.3:  # a column of another type, or under another name
        name = rng.choice(list(columns))
        odd = rng.choice([[[1]], [{"a": 1}], [True], [1.5], [b"\xff\xfe"], [None], [7]])
        columns[name] = pa.array(odd * len(ids))
    if rng.random() < 0.1:
        columns["ID"] = columns.pop(rng.choice(list(columns)))
    pq.write_table(
        pa.table(columns),
        path,
        row_group_size=rng.choice([3, 10, 100]),
        compression=rng.choice(["snappy", "none", "zstd", "gzip"]),
        use_dictionary=rng.random() < 0.5,
        write_page_checksum=rng.random() < 0.5,
        data_page_version=rng.choice(["1.0", "2.0"]),
    )
    return path.read_bytes()


def _mutate(rng, content):
    content = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 2, 5, 20])):
        place = rng.randrange(len(content) + 1)
        end = min(len(content), place + rng.choice([1, 2, 8, 100]))
        kind = rng.randrange(6)
        if kind == 0 and content:
            content[place % len(content)] = rng.randrange(256)
        elif kind == 1:
            content[place:place] = rng.choice(NAUGHTY)
        elif kind == 2:
            del content[place:end]
        elif kind == 3:
            content[place:place] = content[place:end]
        elif kind == 4:
            content[place:end] = rng.choice(NAUGHTY)
        elif rng.random() < 0.3:
            del content[place:]
    return bytes(content)


def read_case(kind, path):
    """Read a file as the product does; (outcome, what was seen)."""
    try:
        if kind == "yaml":
            parse(EmbedConfig, ["--config", path], "fuzz")
            return "emitted", ""
        if kind == "labels":
            return "emitted", f"{len(read_taxonomy(path))} labels"
        return _read_records(kind, path)
    except BioscanError as error:
        if str(path) not in str(error):
            return "other error", f"does not name the file: {error}"
        return "product error", str(error)
    except Exception:
        return "other error", traceback.format_exc()


def _read_records(kind, path):
    options = ReadOptions(
        keep=("station",) if kind == "parquet" else (),
        header_taxonomy=kind if kind in ("sintax", "silva") else None,
        chunk_rows=8,
    )
    sources = expand_inputs(path)
    rows, kept, rejected = [], 0, 0
    for chunk in read_chunks(sources, options, metadata_schema(sources, options)):
        chunk.metadata.validate(full=True)
        "".join(chunk.ids).encode()  # whole text, which a table can store
        assert len(chunk.rows) == len(chunk.ids) == len(chunk.sequences) == chunk.metadata.num_rows
        assert all(set(text) <= set("ACGTN") and len(text) >= 20 for text in chunk.sequences)
        assert all(item.reason and item.code.value for item in chunk.rejected)
        rows += chunk.rows.tolist() + [item.row for item in chunk.rejected]
        kept, rejected = kept + len(chunk.ids), rejected + len(chunk.rejected)
    assert sorted(rows) == list(range(len(rows))), "a record is lost or there twice"
    return ("rejected and emitted" if rejected else "emitted"), f"{kept} kept, {rejected} rejected"


def _serve(connection, folder):
    logging.disable(logging.CRITICAL)
    connection.send("ready")
    while True:
        kind, number = connection.recv()
        connection.send(read_case(kind, write_case(folder, kind, number)))


def run_cases(cases, folder, seconds_a_case=10):
    """Run cases in a process of their own; yields (kind, number, outcome, detail) of each.

    A case that takes too long is a hang and one that ends the process a crash; both get a new one.
    """
    spawn = get_context("spawn")
    process = connection = None
    for kind, number in cases:
        if process is None:
            connection, theirs = spawn.Pipe()
            process = spawn.Process(target=_serve, args=(theirs, folder), daemon=True)
            process.start()
            theirs.close()
            connection.recv()
        connection.send((kind, number))
        begun = time.monotonic()
        try:
            answer = connection.recv() if connection.poll(seconds_a_case) else ("hang", "")
        except EOFError:
            answer = ("crash", f"after {time.monotonic() - begun:.1f} s")
        if answer[0] in ("hang", "crash"):
            process.kill()
            process.join()
            process = None
        yield kind, number, *answer
    if process is not None:
        process.kill()
        process.join()
