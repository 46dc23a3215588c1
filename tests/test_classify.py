"""The command from files to files: names, resume and refusals."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bioscan_xla import run_classification_pipeline
from bioscan_xla.classification.evidence import RANK_FEATURES
from bioscan_xla.classification.journal import Journal, read_rows
from bioscan_xla.classification.kmers import reverse_complement
from bioscan_xla.classification.opening import open_namer
from bioscan_xla.classification.record import SCHEMA
from bioscan_xla.classify import main
from bioscan_xla.errors import BioscanError, ConfigError, InputError
from bioscan_xla.options import ClassifyConfig
from bioscan_xla.reads.lineages import RANKS

from .cruise import mutate


def test_names_strands_and_evidence(data, done):
    _, queries = data
    _output, result, rows = done
    assert result["classified"] == len(queries)
    assert result["rejected"] == {"illegal_character": 1} or sum(result["rejected"].values()) == 1
    right = 0
    for number, (name, sequence, lineage) in enumerate(queries[:-1]):
        row = rows[name]
        assert row["strand"] == ("minus" if number % 5 == 1 else "plus")
        assert row["dna_sequence"] == sequence
        assert row["best_genus"] == lineage[5]
        right += row["best_species"] == lineage[6]
        best = row["hits"][0]
        assert best["query_row"].replace("-", "") in sequence
        assert 0.95 < row["identity"] <= 1.0
        confidence = [row[f"confidence_{rank}"] for rank in RANKS]
        assert confidence == sorted(confidence, reverse=True)
    assert right >= 30
    assert result["named"]["family"] >= 34
    far = rows["far"]
    assert far["assigned_rank"] is None
    assert far["best_kingdom"] is None
    assert far["novelty"] == 1.0
    assert far["strand"] is None
    assert far["dna_sequence"] == reverse_complement(queries[-1][1]), "as it was given"
    assert f">far strand=unknown\n{far['dna_sequence']}" in (_output / "oriented.fasta").read_text()
    assert result["unplaced"] == 1
    assert result["reversed"] == sum(row["strand"] == "minus" for row in rows.values()) == 7
    assert rows["q5"]["reads"] == 5 + 2
    assert rows["q0"]["control_reads"] == 5


def test_no_lineage_contradicts_itself(data, done):
    reference = pq.read_table(data[0] / "reference.parquet").to_pylist()
    known = {tuple(row[rank] for rank in RANKS) for row in reference}
    for row in done[2].values():
        best = tuple(row[f"best_{rank}"] for rank in RANKS)
        assert best == (None,) * 7 or best in known
        kept = [row[rank] for rank in RANKS]
        assert kept == [b if k else None for k, b in zip(kept, best, strict=True)]
        assert kept[: sum(map(bool, kept))] == list(best[: sum(map(bool, kept))])


def test_a_damaged_file_leaves_the_names_of_what_came_before(data, tmp_path):
    folder, _ = data
    whole = gzip.compress((folder / "asv.fasta").read_bytes(), mtime=0)
    (tmp_path / "cut.fasta.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"cut\.fasta\.gz"):
        run_classification_pipeline(
            str(tmp_path / "cut.fasta.gz"),
            str(folder / "reference.parquet"),
            str(tmp_path / "out"),
            num_trials=0,
        )
    assert 1 <= len(list(read_rows(tmp_path / "out"))) < 37
    assert (tmp_path / "out/report.html").is_file()
    assert (tmp_path / "out/taxonomy.tsv").is_file()


def test_a_repeated_run_says_the_same(data, tmp_path, capsys):
    folder, _ = data
    words = ["--input", str(folder / "asv.fasta"), "--output", str(tmp_path / "out")]
    words += ["--reference", str(folder / "reference.parquet"), "--num-trials", "0"]
    told = []
    for _again in range(2):
        assert main(words) == 0
        told.append(capsys.readouterr().out.splitlines()[1:])  # the first line has the time
    assert told[0] == told[1]
    assert "rejected (see rejected.parquet): not a nucleotide (1)" in told[1]


def test_run_json_tells_the_reference(done):
    run = json.loads((done[0] / "run.json").read_text())
    assert len(run["reference"]["content_hash"]) == 64
    assert run["thresholds"]
    found = {"samples": 1, "sequences": 1, "only_there": 1}
    assert run["controls"] == {"removed": False} | found


def test_fasta_reference_gives_the_same_names(data, done, tmp_path):
    folder, _ = data
    run_classification_pipeline(
        str(folder / "asv.fasta"),
        str(folder / "reference.fasta"),
        str(tmp_path / "out"),
        header_taxonomy="sintax",
        num_trials=0,
        remove_controls=False,
    )
    for row in read_rows(tmp_path / "out"):
        assert row["best_species"] == done[2][row["sequence_id"]]["best_species"]
        assert row["novelty"] is None


def test_vectors_of_a_model_are_used_and_kept(data, model_folder, tmp_path):
    folder, queries = data
    options = {"model": str(model_folder), "num_trials": 0, "device": "cpu", "dtype": "float32"}
    for number in range(2):
        result = run_classification_pipeline(
            str(folder / "asv.fasta"),
            str(folder / "reference.parquet"),
            str(tmp_path / f"out{number}"),
            **options,
        )
        assert result["model"]["pooling"] == "mean"
    kept = list((folder / "reference.parquet.classify").glob("vectors-*.npy"))
    assert len(kept) == 1
    rows = list(read_rows(tmp_path / "out1"))
    assert all(len(row["vector"]) for row in rows)
    genus = {name: lineage[5] for name, _, lineage in queries}
    assert sum(row["best_genus"] == genus[row["sequence_id"]] for row in rows) >= 36


def test_killed_and_run_again_each_record_is_there_once(data, tmp_path):
    folder, queries = data
    big = tmp_path / "many.fasta"
    text = [f">{name}_{copy}\n{seq}A{'C' * copy}" for copy in range(40) for name, seq, _ in queries]
    big.write_text("\n".join(text) + "\n")
    output = tmp_path / "out"
    command = [sys.executable, "-m", "bioscan_xla.classify", "--input", str(big)]
    command += ["--reference", str(folder / "reference.parquet"), "--output", str(output)]
    command += ["--num-trials", "0"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=dict(os.environ))
    deadline = time.monotonic() + 60
    while not list(output.glob("parts/part-*.parquet")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert main(command[3:]) == 0
    ids = [row["sequence_id"] for row in read_rows(output)]
    assert sorted(ids) == sorted(f"{n}_{c}" for c in range(40) for n, _, _ in queries)
    assert main(command[3:]) == 0
    assert len(list(read_rows(output))) == len(ids)


def test_small_parts_become_large_row_groups(tmp_path):
    journal = Journal(tmp_path, {"a": "1"})
    for part in range(20):
        rows = [{"sequence_id": f"a{part}_{n}", "source": "x", "row": n} for n in range(300)]
        journal.append(pa.Table.from_pylist(rows, schema=SCHEMA))
    assert journal.join(lambda part: part) == 6000
    file = pq.ParquetFile(tmp_path / "classified.parquet")
    assert file.num_row_groups == 2
    ids = [row["sequence_id"] for row in read_rows(tmp_path)]
    assert ids == [f"a{part}_{n}" for part in range(20) for n in range(300)]


def test_parts_that_were_joined_before_a_kill_are_not_taken_twice(tmp_path):
    rows = pa.Table.from_pylist(
        [{"sequence_id": f"a{n}", "source": "x", "row": n} for n in range(3)], schema=SCHEMA
    )
    journal = Journal(tmp_path, {"a": "1"})
    journal.append(rows)
    kept = (tmp_path / "parts" / "part-000000.parquet").read_bytes()
    assert journal.join(lambda part: part) == 3
    journal.close()
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "part-000000.parquet").write_bytes(kept)
    again = Journal(tmp_path, {"a": "1"})
    assert again.done()["x"].tolist() == [True] * 3
    assert again.join(lambda part: part) == 3


def test_another_reference_or_option_is_refused_with_the_difference(data, done, capsys):
    folder, _ = data
    common = ["--input", str(folder / "asv.fasta"), "--output", str(done[0])]
    common += ["--reference", str(folder / "reference.parquet"), "--num-trials", "300"]
    assert main([*common, "--min-coverage", "0.9", "--novel-share", "0.05"]) == 1
    assert "min_coverage: the folder has 0.7, this run has 0.9" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"threshold": {"genos": 0.5}}, "genos"),
        ({"precision": 1.5}, "must be from 0 to 1"),
        ({"samples": ["x.tsv"]}, "pass --table"),
        ({"candidates": "vector"}, "need a model"),
        ({"table": "nowhere.tsv"}, "nowhere.tsv: no such count table"),
        ({"model": "bioscan-small", "candidates": "kmer"}, "kmer uses no vectors"),
        ({"known_taxa": "taxa.csv"}, "pass --table and --samples"),
        ({"target_gene": "12S rRNA", "table": "t.tsv"}, "pass --table and --samples"),
        (
            {"reference_columns": {"dna_sequence": "seq"}},
            "Leave dna_sequence out of --reference-columns",
        ),
    ],
)
def test_what_cannot_be_is_refused(data, tmp_path, options, words):
    folder, _ = data
    with pytest.raises(BioscanError, match=words):
        run_classification_pipeline(
            str(folder / "asv.fasta"),
            str(folder / "reference.parquet"),
            str(tmp_path / "out"),
            **options,
        )


def test_a_reference_without_lineages_is_refused(data, tmp_path):
    folder, _ = data
    with pytest.raises(InputError, match="none of its 37 sequences has a lineage"):
        run_classification_pipeline(
            str(folder / "asv.fasta"), str(folder / "asv.fasta"), str(tmp_path / "out")
        )


def test_a_few_bases_name_nobody(training_sample, tmp_path):
    """Some reference has them by chance, however exact the match is."""
    text = pq.read_table(training_sample)["dna_sequence"][0].as_py().upper()
    queries = tmp_path / "q.fasta"
    queries.write_text(f">few\n{text[100:125]}\n>more\n{text[100:160]}\n")
    options = {"num_trials": 0, "min_length_bp": 20}
    run_classification_pipeline(str(queries), training_sample, str(tmp_path / "out"), **options)
    few, more = read_rows(tmp_path / "out")
    assert (few["num_evidence"], few["best_phylum"], few["confidence"]) == (0, None, None)
    assert (more["identity"], more["best_phylum"] is None) == (1.0, False)


def test_controls_that_are_removed_are_counted_first(data, done, tmp_path, capsys):
    folder, _ = data
    run_classification_pipeline(
        str(folder / "asv.fasta"),
        str(folder / "reference.parquet"),
        str(tmp_path / "out"),
        table=str(folder / "counts.tsv"),
        samples=[str(folder / "samples.tsv"), str(folder / "libraries.tsv")],
        remove_controls=True,
        num_trials=0,
    )
    kept, removed = (
        json.loads((where / "run.json").read_text())["controls"]
        for where in (done[0], tmp_path / "out")
    )
    assert removed == kept | {"removed": True}
    reads = {row["sequence_id"]: row["control_reads"] for row in read_rows(tmp_path / "out")}
    assert reads == {name: row["control_reads"] for name, row in done[2].items()}


def test_a_genus_that_is_alone_is_not_given_to_everything(tmp_path, caplog):
    """No trial can lack it, so confidence would be 1 for whatever aligns."""
    rng = np.random.default_rng(8)
    root = "".join(rng.choice(list("ACGT"), 250))
    lineage = dict(zip(RANKS, ["A", "Chordata", "Actino", "Ordera", "Fama", "Genus"], strict=False))
    species = [mutate(root, 0.05, rng) for _ in range(12)]
    rows = [
        {"sequence_id": f"r{at}", "dna_sequence": mutate(species[at % 12], 0.005, rng)}
        | lineage
        | {"species": f"Genus {'abcdefghijkl'[at % 12]}us"}
        for at in range(180)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "reference.parquet")
    own = [mutate(rng.choice(species), 0.005, rng) for _ in range(10)]
    other = [mutate(root, 0.22, rng) for _ in range(10)]
    texts = [f">{at}\n{text}\n" for at, text in enumerate(own + other)]
    (tmp_path / "q.fasta").write_text("".join(texts))
    run = run_classification_pipeline(
        str(tmp_path / "q.fasta"), str(tmp_path / "reference.parquet"), str(tmp_path / "out")
    )
    found = list(read_rows(tmp_path / "out"))
    assert [row["genus"] for row in found] == ["Genus"] * 10 + [None] * 10
    assert all(row["novelty"] > 0.9 for row in found[10:])
    assert run["untested_ranks"] == ["order", "family", "genus"]
    assert "the reference has one order and one family and one genus" in caplog.text
    page = (tmp_path / "out/report.html").read_text()
    assert "there the precision could not be tested" in page


def test_of_two_names_that_fit_equally_well_neither_is_sure(data, tmp_path):
    """Labels that contradict each other are not among the trials, so calibration cannot know."""
    rows = pq.read_table(data[0] / "reference.parquet").to_pylist()
    doubled, other = rows[:4], rows[-1]  # all of one species; one of another order
    copies = [
        row | {rank: other[rank] for rank in RANKS[3:]} | {"sequence_id": f"copy{at}"}
        for at, row in enumerate(doubled)
    ]
    pq.write_table(pa.Table.from_pylist(rows + copies), tmp_path / "reference.parquet")
    texts = [f">{row['sequence_id']}\n{row['dna_sequence']}\n" for row in doubled + rows[40:44]]
    (tmp_path / "q.fasta").write_text("".join(texts))
    files = {"input": str(tmp_path / "q.fasta"), "reference": str(tmp_path / "reference.parquet")}
    _, namer = open_namer(ClassifyConfig(**files, output="unused"))
    for row, share in ((doubled[0], 0.5), (rows[40], 0.0)):
        named = namer.name(row["dna_sequence"])
        assert named.features[3:, RANK_FEATURES.index("tied_others")].tolist() == [share] * 4
        assert named.features[2, RANK_FEATURES.index("tied_others")] == 0
    run_classification_pipeline(**files, output=str(tmp_path / "out"))
    found = list(read_rows(tmp_path / "out"))
    for row in found[:4]:
        assert (row["tied_rank"], row["assigned_rank"]) == ("order", "class")
        assert row["confidence_class"] > 0.9
        assert all(row[f"confidence_{rank}"] <= 0.5 for rank in RANKS[3:])
    assert all(row["species"] for row in found[4:])


def test_config_error_is_a_config_error():
    with pytest.raises(ConfigError, match="no reference given"):
        run_classification_pipeline("x.fasta", "", "out")


def test_nothing_usable_ends_with_status_2(data, tmp_path, capsys):
    (tmp_path / "protein.fasta").write_text(">a\nMKVLLAAGIVGLLLAGCQEE\n")
    words = ["--input", str(tmp_path / "protein.fasta"), "--output", str(tmp_path / "out")]
    words += ["--reference", str(data[0] / "reference.parquet"), "--num-trials", "0"]
    assert main(words) == 2
    assert "rejected (see rejected.parquet)" in capsys.readouterr().out
