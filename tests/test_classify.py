"""The command from files to files: names, resume, refusals, and every format by its own reader."""

import csv
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bioscan_xla import run_classification_pipeline, run_finetuning_pipeline
from bioscan_xla.classification.counts import read_counts, read_samples
from bioscan_xla.classification.formats import krona_path, qiime_taxon, sintax_line
from bioscan_xla.classification.journal import Journal, read_rows
from bioscan_xla.classification.kmers import KmerIndex, best_numbers, reverse_complement
from bioscan_xla.classification.record import SCHEMA
from bioscan_xla.classify import main
from bioscan_xla.errors import BioscanError, ConfigError, InputError
from bioscan_xla.reads.lineages import RANKS


def mutate(sequence, share, rng):
    letters = [
        str(rng.choice([c for c in "ACGT" if c != letter])) if rng.random() < share else letter
        for letter in sequence
    ]
    return "".join(letters)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A reference of 4 families, 12 genera and 36 species; queries; counts; samples."""
    folder = tmp_path_factory.mktemp("classify")
    rng = np.random.default_rng(3)
    rows, queries = [], []
    root = "".join(rng.choice(list("ACGT"), 240))
    for family in range(4):
        of_family = mutate(root, 0.15, rng)
        for genus in range(3):
            of_genus = mutate(of_family, 0.08, rng)
            for species in range(3):
                of_species = mutate(of_genus, 0.03, rng)
                name = f"Genus{'abcd'[family]}{'xyz'[genus]}"
                lineage = ["Animalia", "Chordata", "Actinopteri", f"Order{'ab'[family // 2]}"]
                lineage += [f"Family{'abcd'[family]}", name, f"{name} {'pqr'[species]}us"]
                for _copy in range(4):
                    rows.append(
                        {
                            "sequence_id": f"R{len(rows):04d}",
                            "dna_sequence": mutate(of_species, 0.004, rng),
                            **dict(zip(RANKS, lineage, strict=True)),
                        }
                    )
                queries.append((f"q{len(queries)}", mutate(of_species, 0.004, rng), lineage))
    queries.append(("far", "".join(rng.choice(list("ACGT"), 200)), [None] * 7))
    pq.write_table(pa.Table.from_pylist(rows), folder / "reference.parquet")
    with open(folder / "reference.fasta", "w") as file:
        for row in rows:
            tax = ",".join(f"{r[0]}:{row[r]}" for r in RANKS)
            file.write(f">{row['sequence_id']};tax={tax};\n{row['dna_sequence']}\n")
    with open(folder / "asv.fasta", "w") as file:
        for number, (name, sequence, _) in enumerate(queries):
            text = reverse_complement(sequence) if number % 5 == 1 else sequence
            file.write(f">{name}\n{text}\n")
        file.write(">bad\nACGTXX!!ACGTACGTACGTACGTACGT\n")
    with open(folder / "counts.tsv", "w") as file:
        file.write("# Constructed from biom file\n#OTU ID\tL1\tL2\tL3\n")
        for number, (name, _, _) in enumerate(queries):
            file.write(f"{name}\t{number}.0\t{number % 3}\t{5 if number == 0 else 0}\n")
    (folder / "samples.tsv").write_text(
        "# section\ta\tb\nsamp_name\tsamp_category\tdecimalLatitude\tdecimalLongitude"
        "\teventDate\tminimumDepthInMeters\tenv_medium\n"
        "S1\tsample\t10.5\t-120\t2023-04-15\t900\tsea water\n"
        "S2\tsample\tnot applicable\tnot applicable\t2023-04-15\t100\t\n"
        "B1\tnegative control\tnot applicable\tnot applicable\tnot applicable\t\t\n"
    )
    (folder / "libraries.tsv").write_text(
        "# x\nsamp_name\tlib_id\tassay_name\nS1\tL1\t12S\nS2\tL2\t12S\nB1\tL3\t12S\n"
    )
    (folder / "worms.csv").write_text("scientificName,AphiaID\nGenusax pus,12345\n")
    return folder, queries


@pytest.fixture(scope="module")
def done(data):
    folder, _queries = data
    output = folder / "out"
    result = run_classification_pipeline(
        str(folder / "asv.fasta"),
        str(folder / "reference.parquet"),
        str(output),
        table=str(folder / "counts.tsv"),
        samples=[str(folder / "samples.tsv"), str(folder / "libraries.tsv")],
        known_taxa=str(folder / "worms.csv"),
        target_gene="12S rRNA",
        num_trials=300,
        novel_share=0.05,
    )
    return output, result, {row["sequence_id"]: row for row in read_rows(output)}


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


def test_run_json_tells_the_reference(done):
    run = json.loads((done[0] / "run.json").read_text())
    assert len(run["reference"]["content_hash"]) == 64
    assert run["thresholds"]
    assert run["controls"] == {"samples": 1, "removed": False, "sequences": 1}


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


def test_parts_that_were_joined_before_a_kill_are_not_taken_twice(tmp_path):
    rows = pa.Table.from_pylist(
        [{"sequence_id": f"a{n}", "source": "x", "row": n} for n in range(3)], schema=SCHEMA
    )
    journal = Journal(tmp_path, {"a": "1"})
    journal.append(rows)
    kept = (tmp_path / "parts" / "part-000000.parquet").read_bytes()
    assert journal.join(lambda part: part) == 3
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
    assert "min_coverage: the folder has '0.7', this run has '0.9'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"threshold": {"genos": 0.5}}, "genos"),
        ({"precision": 1.5}, "must be from 0 to 1"),
        ({"samples": ["x.tsv"]}, "pass --table"),
        ({"candidates": "vector"}, "need a model"),
        ({"table": "nowhere.tsv"}, "nowhere.tsv: no such count table"),
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


def test_biom_is_valid_and_holds_taxonomy_and_metadata(done):
    import biom

    path = done[0] / "table.biom"
    table = biom.load_table(str(path))
    assert table.shape == (37, 3)
    taxonomy = table.metadata("q0", "observation")["taxonomy"]
    assert len(taxonomy) == 7
    assert taxonomy[0] == "k__Animalia"
    assert table.metadata("L1", "sample")["env_medium"] == "sea water"
    checked = subprocess.run(
        [str(Path(sys.executable).with_name("biom")), "validate-table", "-i", str(path)],
        capture_output=True,
        text=True,
    )
    assert "is a valid BIOM" in checked.stdout


def test_darwin_core_archive_reads_back(done):
    read = pytest.importorskip("dwca.read")
    output, result, _rows = done
    told = result["darwin_core"]
    assert told["of_controls"] == 1
    assert told["without_place"] == 24
    with read.DwCAReader(str(output / "dwca.zip")) as archive:
        assert archive.core_contains_term("http://rs.tdwg.org/dwc/terms/occurrenceID")
        found = list(archive)
        assert len(found) == told["occurrences"] == 36
        term = "http://rs.tdwg.org/dwc/terms/"
        ids = [row.id for row in found]
        assert len(set(ids)) == len(ids)
        for row in found:
            needed = ("eventDate", "decimalLatitude", "scientificName", "verbatimIdentification")
            assert all(row.data[term + name] for name in needed)
            (dna,) = row.extensions
            assert dna.rowtype == "http://rs.gbif.org/terms/1.0/DNADerivedData"
            assert dna.data["https://w3id.org/mixs/0000044"] == "12S rRNA"
            assert set(dna.data["http://rs.gbif.org/terms/dna_sequence"]) <= set("ACGT")
        far = [row for row in found if row.data[term + "organismQuantity"] == "36"]
        assert [row.data[term + "scientificName"] for row in far] == ["incertae sedis"]


def test_phyloseq_tables_fit_each_other(done):
    def table(name):
        with open(done[0] / "phyloseq" / name, newline="") as file:
            return list(csv.reader(file, delimiter="\t"))

    otu, tax, samples = table("otu_table.tsv"), table("tax_table.tsv"), table("sample_data.tsv")
    assert [row[0] for row in otu] == [row[0] for row in tax]
    assert all(len(row) == 8 for row in tax)
    assert otu[0][1:] == [row[0] for row in samples[1:]]
    assert [row[samples[0].index("is_control")] for row in samples[1:]] == [
        "FALSE",
        "FALSE",
        "TRUE",
    ]


def test_text_files_have_a_line_for_each_record(done):
    output, _, rows = done
    with open(output / "taxonomy.tsv", newline="") as file:
        lines = list(csv.reader(file, delimiter="\t"))
    assert lines[0] == ["Feature ID", "Taxon", "Confidence"]
    assert len(lines) == len(rows) + 1
    assert all(len(line) == 3 and not line[1].endswith(";") for line in lines)
    sintax = (output / "taxonomy.sintax.tsv").read_text().splitlines()
    assert [line.split("\t")[0] for line in sintax] == list(rows)
    assert all(line.count("\t") == 3 for line in sintax)
    krona = [line.split("\t") for line in (output / "krona.txt").read_text().splitlines()]
    assert sum(int(line[0]) for line in krona) == sum(row["reads"] for row in rows.values())
    assert all(cell for line in krona for cell in line)
    with open(output / "faire.tsv", newline="") as file:
        faire = list(csv.DictReader(file, delimiter="\t"))
    assert float(faire[0]["percent_match"]) > 95
    assert faire[-1]["scientificName"] == "incertae sedis"
    fasta = (output / "oriented.fasta").read_text().splitlines()
    assert fasta[2] == ">q1 strand=minus"


def row_of(best, kept, confidence=0.9):
    row = {"sequence_id": "a", "confidence": confidence}
    for rank, name in zip(RANKS, best, strict=True):
        row[f"best_{rank}"] = name
        row[f"confidence_{rank}"] = confidence if name else None
    return row | {
        r: n if at < kept else None for at, (r, n) in enumerate(zip(RANKS, best, strict=True))
    }


def test_lines_of_difficult_names():
    row = row_of(["K", None, "C, x;y", None, None, None, "Aus bus"], 3)
    assert qiime_taxon(row) == "k__K; p__; c__C, x,y"
    assert sintax_line(row) == "a\tk:K(0.90),c:C_x_y(0.90),s:Aus_bus(0.90)\t+\tk:K,c:C_x_y\n"
    assert krona_path(row) == ("K", "(no phylum)", "C, x;y")
    assert qiime_taxon(row_of(["K"] + [None] * 6, 1)) == "k__K; p__"
    nothing = row_of([None] * 7, 0, None)
    assert qiime_taxon(nothing) == "Unassigned"
    assert sintax_line(nothing) == "a\t\t\t\n"
    assert krona_path(nothing) == ("Unassigned",)


def test_dada2_table_is_turned_round(tmp_path):
    sequence, other = "ACGTACGTACGTACGTACGTAAC", "GGGTACGTACGTACGTACGTAAC"
    (tmp_path / "seqtab.csv").write_text(f'"","{sequence}","{other}"\n"S1",3,0\n"S2",1,2\n')
    counts = read_counts(str(tmp_path / "seqtab.csv"))
    assert counts.samples == ["S1", "S2"]
    assert counts.matrix.toarray().tolist() == [[3, 1], [0, 2]]
    assert counts.rows()[reverse_complement(other)] == 1


def test_counts_that_are_none_are_refused(tmp_path):
    for text, words in (("id\tS\na\t0.5\n", "not a count"), ("id\tS\na\t1\na\t2\n", "twice")):
        (tmp_path / "t.tsv").write_text(text)
        with pytest.raises(InputError, match=words):
            read_counts(str(tmp_path / "t.tsv"))
    (tmp_path / "s.tsv").write_text("sample\tlatitude\nX\t99\n")
    with pytest.raises(InputError, match="no column names the samples"):
        read_samples([str(tmp_path / "s.tsv")], ["Y"])
    with pytest.raises(InputError, match="must be a number from -90 to 90"):
        read_samples([str(tmp_path / "s.tsv")], ["X"])


def test_words_are_counted_exactly():
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("ACGTN"), 200, p=[0.24] * 4 + [0.04])) for _ in range(20)]

    def words(text):
        return {text[at : at + 8] for at in range(len(text) - 7) if "N" not in text[at : at + 8]}

    index = KmerIndex(texts)
    query = texts[3][20:150]
    wanted = [
        len(words(query) & words(t)) / max(min(len(words(query)), len(words(t))), 30) for t in texts
    ]
    assert index.scores(query) == pytest.approx(wanted)
    assert best_numbers(index.scores(query), 5)[0] == 3
    assert best_numbers(np.array([0.0, 1, 1, 0.5]), 2).tolist() == [1, 2]
    assert index.scores("ACG").tolist() == [0.0] * 20
    long = "".join(np.random.default_rng(1).choice(list("ACGT"), 900))
    related = KmerIndex(
        [long, long[:500], long[400:], *texts]
    )  # more common words than a byte counts
    wanted = [
        len(words(long) & words(t)) / max(min(len(words(long)), len(words(t))), 30)
        for t in (long, long[:500], long[400:], *texts)
    ]
    assert related.scores(long) == pytest.approx(wanted)


def test_config_error_is_a_config_error():
    with pytest.raises(ConfigError, match="no reference given"):
        run_classification_pipeline("x.fasta", "", "out")


@pytest.fixture(scope="module")
def tuned(data, model_folder):
    """A fine-tuned model whose heads are the mean vectors of their classes."""
    from safetensors.numpy import save_file

    from bioscan_xla.classification.heads import load_heads
    from bioscan_xla.encode.encoder import load_encoder
    from bioscan_xla.encode.inference import embed_sequences
    from bioscan_xla.encode.runtime import open_device
    from bioscan_xla.reads.labels import learn_labels
    from bioscan_xla.training.heldout import write_heldout

    from .conftest import small_run

    folder, _ = data
    output = folder / "tuned"
    run_finetuning_pipeline(
        training_data_path=str(folder / "reference.parquet"),
        model_output_path=str(output),
        **{
            key: value
            for key, value in small_run("", str(model_folder), "").items()
            if key not in ("train", "output", "num_epochs")
        },
        num_epochs=1,
    )
    rows = pq.read_table(folder / "reference.parquet").to_pylist()
    lineages = [[row[rank] for rank in RANKS] for row in rows]
    space, _ = learn_labels(lineages)
    encoder = load_encoder(
        str(model_folder), device=open_device("cpu", "float32"), adapter=str(output)
    )
    vectors = embed_sequences(encoder, [row["dna_sequence"] for row in rows])
    centred = vectors - vectors.mean(1, keepdims=True)
    unit = centred / np.sqrt((centred**2).mean(1, keepdims=True) + 1e-5)
    middle = unit.mean(0)
    layers = {}
    for rank, (name, numbers) in enumerate(zip(RANKS, space.encode(lineages).T, strict=True)):
        means = [unit[numbers == n].mean(0) - middle for n in range(space.num_classes[rank])]
        weight = np.stack(means) * 10
        layers[f"{name}.0.weight"] = np.ones(vectors.shape[1], np.float32)
        layers[f"{name}.0.bias"] = np.zeros(vectors.shape[1], np.float32)
        layers[f"{name}.2.weight"] = weight.astype(np.float32)
        layers[f"{name}.2.bias"] = (-(weight @ middle) - (weight**2).sum(1) / 20).astype(np.float32)
    save_file(layers, output / "heads.safetensors")
    space.save(output / "labels.json")
    assert load_heads(str(output)).labels == space
    assert (output / "heldout.safetensors").is_file()  # of the few that fine-tuning held out
    sequences = [row["dna_sequence"] for row in rows]
    write_heldout(output, vectors, sequences, lineages, space.encode(lineages))
    return output


@pytest.mark.parametrize("reference", ["reference.parquet", ""])
@pytest.mark.parametrize("method", ["heads", "both"])
def test_heads_alone_and_with_references(data, tuned, tmp_path, method, reference):
    folder, queries = data
    if method == "both" and not reference:
        return
    run_classification_pipeline(
        str(folder / "asv.fasta"),
        str(folder / reference) if reference else "",
        str(tmp_path / "out"),
        model=str(tuned),
        method=method,
        num_trials=0,
        device="cpu",
        dtype="float32",
        strand="both" if reference else "plus",
    )
    known = {tuple(lineage) for _, _, lineage in queries}
    rows = {row["sequence_id"]: row for row in read_rows(tmp_path / "out")}
    right = 0
    for name, _, lineage in queries[:-1]:
        best = tuple(rows[name][f"best_{rank}"] for rank in RANKS)
        assert best in known
        right += best[5] == lineage[5]
    assert right >= (36 if method == "both" else 20)


@pytest.mark.parametrize("method", ["heads", "both", "argmax"])
def test_heads_are_calibrated_on_what_the_model_was_not_trained_on(data, tuned, tmp_path, method):
    folder, _ = data
    result = run_classification_pipeline(
        str(folder / "asv.fasta"),
        str(folder / "reference.parquet"),
        str(tmp_path / "out"),
        model=str(tuned),
        method=method,
        num_trials=200,
        device="cpu",
        dtype="float32",
    )
    assert result["calibration_trials"] == 200
    rows = list(read_rows(tmp_path / "out"))
    assert result["contradictions"] == sum(row["contradiction"] for row in rows)
    if method != "argmax":
        assert result["contradictions"] == 0
    for row in rows:
        confidence = [row[f"confidence_{rank}"] for rank in RANKS if row[f"best_{rank}"]]
        assert confidence == sorted(confidence, reverse=True)
        assert row["novelty"] is not None


def test_a_foreign_label_space_is_refused(data, tuned, tmp_path):
    folder, _ = data
    table = pq.read_table(folder / "reference.parquet")
    for rank in RANKS[3:]:
        names = pa.array([f"Other{name.lower()}" for name in table[rank].to_pylist()])
        table = table.set_column(table.column_names.index(rank), rank, names)
    pq.write_table(table, tmp_path / "other.parquet")
    with pytest.raises(BioscanError, match="share no name with the reference") as caught:
        run_classification_pipeline(
            str(folder / "asv.fasta"),
            str(tmp_path / "other.parquet"),
            str(tmp_path / "out"),
            model=str(tuned),
            method="both",
        )
    assert "order: the model knows 'Ordera', the reference 'Otherordera'" in str(caught.value)


def test_heads_need_a_fine_tuned_model():
    with pytest.raises(ConfigError, match="needs the heads of a fine-tuned model"):
        run_classification_pipeline("x.fasta", "r.fasta", "out", method="heads")
