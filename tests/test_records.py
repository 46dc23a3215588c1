"""Reading and cleaning: every rule, every reason, any number of processes."""

import gzip

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bioscan_xla.errors import InputError
from bioscan_xla.reads import shares
from bioscan_xla.reads.cleaning import Code, clean_sequences
from bioscan_xla.reads.files import metadata_schema
from bioscan_xla.reads.inputs import expand_inputs
from bioscan_xla.reads.raw import ReadOptions
from bioscan_xla.reads.records import read_chunks
from bioscan_xla.reads.shares import Share

GOOD = "ACGTTGCATG" * 5


def read(paths, *, options=None, **more):
    """All chunks, and the error that ended them."""
    options = options or ReadOptions(chunk_rows=4)
    sources = expand_inputs(paths)
    chunks, error = [], None
    try:
        for chunk in read_chunks(sources, options, metadata_schema(sources, options), **more):
            chunks.append(chunk)
    except InputError as caught:
        error = caught
    return chunks, error


def kept(chunks):
    """(source, row, id) of all usable records."""
    return [
        (chunk.source, row, name)
        for chunk in chunks
        for row, name in zip(chunk.rows.tolist(), chunk.ids, strict=True)
    ]


def rejected(chunks):
    """Row to reason."""
    return {item.row: item.reason for chunk in chunks for item in chunk.rejected}


def write(path, columns, **options):
    """A Parquet file of these columns."""
    pq.write_table(pa.table(columns), path, **options)
    return str(path)


@pytest.mark.parametrize(
    ("raw", "clean", "rule"),
    [
        (GOOD.lower(), GOOD, "case"),
        (GOOD.replace("T", "U"), GOOD, "u_to_t"),
        (GOOD[:9] + "-. ~\n\t" + GOOD[9:], GOOD, "gaps"),
        (GOOD + "RYSWKMBDHV" + GOOD, GOOD + "N" * 10 + GOOD, "iupac_to_n"),
        ("NN" + GOOD + "NNN", GOOD, "trimmed_n"),
    ],
)
def test_each_cleaning_rule_is_applied_and_counted(raw, clean, rule):
    sequences, complaints, cleaned = clean_sequences([GOOD, raw, raw])
    assert sequences == [GOOD, clean, clean]
    assert not complaints
    assert cleaned == {rule: [1, 2]}


def test_rules_work_together():
    sequences, complaints, cleaned = clean_sequences(
        ["nnr-" + GOOD.lower().replace("t", "u") + "Y"]
    )
    assert sequences == [GOOD]
    assert not complaints
    assert list(cleaned) == ["case", "u_to_t", "gaps", "iupac_to_n", "trimmed_n"]
    assert all(numbers == [0] for numbers in cleaned.values())


@pytest.mark.parametrize(
    ("raw", "code", "reason"),
    [
        ("", Code.EMPTY_SEQUENCE, "empty sequence"),
        ("---", Code.EMPTY_SEQUENCE, "empty sequence"),
        ("NNnN", Code.ONLY_N, "4 bp, all of them N"),
        ("R-", Code.ONLY_N, "1 bp, all of them N"),
        ("ACGT", Code.TOO_SHORT, "4 bp, shorter than 20 bp"),
        (
            GOOD[:10] + "N" * 60 + GOOD[:10],
            Code.TOO_MANY_N,
            "75 % of it is N, more than 50 %",
        ),
        (
            GOOD + "E",
            Code.NOT_A_NUCLEOTIDE,
            "character 'E' at base 51 is not a nucleotide code",
        ),
        (
            GOOD[:3] + "é" + GOOD,
            Code.NOT_A_NUCLEOTIDE,
            "character 'é' at base 4 is not a nucleotide code",
        ),
        (
            GOOD + "*",
            Code.NOT_A_NUCLEOTIDE,
            "character '*' at base 51 is not a nucleotide code",
        ),
    ],
)
def test_each_reason_to_reject_a_sequence(raw, code, reason):
    _, complaints, _ = clean_sequences([GOOD, raw, GOOD])
    assert complaints == {1: (code, reason)}


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(alphabet="ACGTUNacgtunRYKM-. \nEé", max_size=80), max_size=6))
def test_cleaning_is_idempotent_and_leaves_only_bases(texts):
    options = ReadOptions(min_length_bp=1, max_n_fraction=1.0)
    sequences, complaints, _ = clean_sequences(texts, options)
    for number, sequence in enumerate(sequences):
        if number not in complaints:
            assert set(sequence) <= set("ACGTN")
            assert sequence == sequence.strip("N") != ""
            again, none, changes = clean_sequences([sequence], options)
            assert (again, none) == ([sequence], {})
            assert not any(changes.values())


def test_metadata_that_cannot_be(tmp_path):
    path = write(
        tmp_path / "a.parquet",
        {
            "sequence_id": list("abcdefg"),
            "dna_sequence": [GOOD] * 7,
            "longitude": [1.0, 400.0, 2.0, 3.0, float("nan"), None, -180.0],
            "latitude": [90.0, 0.0, -91.0, 0.0, 0.0, 0.0, 0.0],
            "depth": ["12.5", "1", "1", "deep", "1", "", "inf"],
        },
    )
    chunks, error = read(path)
    assert error is None
    assert rejected(chunks) == {
        1: "longitude 400 is outside -180 to 180",
        2: "latitude -91 is outside -90 to 90",
        3: "depth 'deep' is not a number",
        6: "depth inf is not finite",
    }
    table = pa.concat_tables([chunk.metadata for chunk in chunks])
    assert table["depth"].to_pylist() == [12.5, 1.0, None]
    assert table["longitude"].to_pylist() == [1.0, None, None]


def test_missing_ids_and_duplicates(tmp_path):
    one = write(
        tmp_path / "a.parquet",
        {
            "sequence_id": ["x", None, "", "y", "x", "z", " "],
            "dna_sequence": [GOOD] * 7,
        },
    )
    two = write(tmp_path / "b.parquet", {"sequence_id": ["z", "w"], "dna_sequence": [GOOD] * 2})
    chunks, _ = read([one, two], known_ids=[["w"], []])
    assert kept(chunks) == [(one, 0, "x"), (one, 3, "y"), (one, 5, "z")]
    reasons = [item.reason for chunk in chunks for item in chunk.rejected]
    assert reasons == ["no id", "no id", "id seen before", "no id"] + ["id seen before"] * 2


def test_an_id_counts_as_seen_even_if_its_record_was_unusable(tmp_path):
    path = write(
        tmp_path / "a.parquet",
        {
            "sequence_id": ["x", "x"],
            "dna_sequence": ["A", GOOD],
        },
    )
    chunks, _ = read(path)
    assert kept(chunks) == []
    assert rejected(chunks) == {0: "1 bp, shorter than 20 bp", 1: "id seen before"}


def _many(folder, form):
    rng = np.random.default_rng(0)
    ids = [f"s{rng.integers(0, 60)}" for _ in range(90)]  # many twice
    sequences = [GOOD if rng.random() < 0.9 else "" for _ in range(90)]
    if form == "fasta":
        path = folder / "many.fasta"
        pairs = zip(ids, sequences, strict=True)
        path.write_text("".join(f">{name}\n{text}\n" for name, text in pairs))
        return str(path)
    size = {"groups": 7, "one group": 90}[form]
    columns = {"sequence_id": ids, "dna_sequence": sequences}
    return write(folder / "many.parquet", columns, row_group_size=size)


@pytest.mark.parametrize("form", ["groups", "one group", "fasta"])
@pytest.mark.parametrize("count", [2, 3])
def test_processes_share_without_overlap(tmp_path, form, count, monkeypatch):
    monkeypatch.setattr(shares, "BLOCK_ROWS", 7)
    path = _many(tmp_path, form)
    whole, _ = read(path)
    parts = [read(path, share=Share(i, count))[0] for i in range(count)]
    assert all(kept(part) for part in parts)
    assert sorted(kept(whole)) == sorted(item for part in parts for item in kept(part))
    together = {row: why for part in parts for row, why in rejected(part).items()}
    assert together == rejected(whole)


@pytest.mark.parametrize("form", ["groups", "one group", "fasta"])
def test_done_rows_are_passed_over(tmp_path, form):
    path = _many(tmp_path, form)
    whole, _ = read(path)
    done = np.zeros(70, bool)
    done[:33] = True
    done[50:61] = True
    names = [name for _, row, name in kept(whole) if row < 70 and done[row]]
    names += [
        item.sequence_id for c in whole for item in c.rejected if item.row < 70 and done[item.row]
    ]
    rest, _ = read(path, done={path: done}, known_ids=[names])
    todo = [item for item in kept(whole) if item[1] >= 70 or not done[item[1]]]
    assert kept(rest) == todo


def test_fastq_and_gzip(tmp_path):
    text = "".join(f"@r{n} more\n{GOOD}\n+\n{'I' * 50}\n" for n in range(9))
    (tmp_path / "a.fastq").write_text(text)
    with gzip.open(tmp_path / "b.fq.gz", "wt") as file:
        file.write(text.replace("@r", "@q"))
    chunks, error = read(str(tmp_path))
    assert error is None
    assert [name for _, _, name in kept(chunks)] == [f"r{n}" for n in range(9)] + [
        f"q{n}" for n in range(9)
    ]


@pytest.mark.parametrize(
    ("style", "header"),
    [
        ("sintax", "id1;tax=d:Eukaryota,k:Animalia,p:Annelida,g:Osedax,s:Osedax_rubiplumus;"),
        ("silva", "id1 Animalia;Annelida;;;;Osedax;Osedax rubiplumus"),
    ],
)
def test_lineage_from_headers(tmp_path, style, header):
    path = tmp_path / "a.fasta"
    path.write_text(f">{header}\n{GOOD}\n>id2\n{GOOD}\n")
    options = ReadOptions(header_taxonomy=style)
    (chunk,), _ = read(str(path), options=options)
    assert chunk.ids == ["id1", "id2"]
    first, second = chunk.metadata.to_pylist()
    assert (first["kingdom"], first["phylum"], first["class"]) == ("Animalia", "Annelida", None)
    assert (first["genus"], first["species"]) == ("Osedax", "Osedax rubiplumus")
    assert second["kingdom"] is None
