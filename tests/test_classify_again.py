"""A second run of classify in the folder of a first: its files agree with each other."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bioscan_xla import run_classification_pipeline
from bioscan_xla.classification import leave_out, run
from bioscan_xla.classification.journal import Journal, read_rows
from bioscan_xla.classification.naming import Namer
from bioscan_xla.classification.reference import load_reference
from bioscan_xla.errors import ConfigError, InputError


@pytest.fixture
def again(data, tmp_path):
    """Classify into one folder, with the counts or without."""
    folder, _ = data

    def run(**options):
        options = {"num_trials": 0, "reference": str(folder / "reference.parquet")} | options
        options = {"input": str(folder / "asv.fasta")} | options
        return run_classification_pipeline(output=str(tmp_path / "out"), **options)

    return run


def counted(folder):
    return {
        "table": str(folder / "counts.tsv"),
        "samples": [str(folder / "samples.tsv"), str(folder / "libraries.tsv")],
    }


def test_without_the_counts_of_before_nothing_of_them_is_left(data, again, tmp_path, caplog):
    output = tmp_path / "out"
    again(**counted(data[0]))
    assert (output / "dwca.zip").is_file()
    assert "this run has no" not in caplog.text
    again(table=counted(data[0])["table"])
    assert "as this run has no --samples: dwca.zip. Run again with it" in caplog.text
    assert not (output / "dwca.zip").exists()
    assert (output / "table.biom").is_file()
    again()
    assert "as this run has no --table: table.biom, phyloseq. Run again" in caplog.text
    assert not (output / "table.biom").exists()
    assert not (output / "phyloseq").exists()
    columns = ["reads", "num_samples", "control_reads"]
    assert not any(value for row in read_rows(output, columns) for value in row.values())
    assert all(line.startswith("1\t") for line in (output / "krona.txt").open())


def test_counts_that_fit_nothing_leave_no_files_of_other_counts(data, again, tmp_path):
    again(**counted(data[0]))
    (tmp_path / "foreign.tsv").write_text("#OTU ID\tA\nnobody\t3\n")
    with pytest.raises(InputError, match="nobody"):
        again(table=str(tmp_path / "foreign.tsv"))
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert "classified.parquet" in left
    assert not left & {"table.biom", "phyloseq", "dwca.zip", "report.html", "run.json"}


def test_reads_of_sequences_that_have_no_name_are_told(data, again, tmp_path, caplog):
    (tmp_path / "counts.tsv").write_text("#OTU ID\tA\nq0\t3\nbad\t40\nnobody\t5\n")
    again(table=str(tmp_path / "counts.tsv"))
    told = "without a named sequence of their own: 2 of 3, such as 'bad', with 45 of 48 reads"
    assert told in caplog.text
    assert "bad" in (tmp_path / "out/phyloseq/otu_table.tsv").read_text()
    assert (tmp_path / "out/krona.txt").read_text().startswith("3\t")


def test_another_column_of_the_input_is_another_input(data, again, tmp_path):
    rows = pq.read_table(data[0] / "reference.parquet").slice(0, 5)
    other = pa.array([text[::-1] for text in rows["dna_sequence"].to_pylist()])
    path = tmp_path / "two.parquet"
    pq.write_table(rows.append_column("other", other), path)
    again(input=str(path))
    with pytest.raises(ConfigError, match="columns"):
        again(input=str(path), columns={"dna_sequence": "other"})


def test_a_file_that_changed_is_told(data, again, tmp_path, caplog):
    texts = pq.read_table(data[0] / "reference.parquet")["dna_sequence"].to_pylist()
    path = tmp_path / "x.fasta"
    path.write_text(f">a\n{texts[0]}\n")
    again(input=str(path))
    assert "changed" not in caplog.text
    path.write_text(f">a\n{texts[40]}\n>b\n{texts[80]}\n")
    result = again(input=str(path))
    assert "x.fasta changed since it was named" in caplog.text
    assert result["rejected"] == {"id_seen_before": 1}


def test_other_input_is_not_mixed_into_the_folder(data, again, tmp_path):
    texts = pq.read_table(data[0] / "reference.parquet")["dna_sequence"].to_pylist()
    one, two = tmp_path / "one.fasta", tmp_path / "two.fasta"
    one.write_text(f">a\n{texts[0]}\n")
    two.write_text(f">a\n{texts[40]}\n>b\n{texts[80]}\n")
    again(input=str(one))
    with pytest.raises(ConfigError, match=r"holds names of the sequences of one\.fasta"):
        again(input=str(two))
    assert again(input=[str(one), str(two)])["classified"] == 2
    assert again(input=[str(one), str(two)])["rejected"] == {"id_seen_before": 1}


def test_results_and_trials_of_other_rules_are_not_used(data, again, tmp_path, monkeypatch):
    """A newer program may weigh the evidence otherwise: a folder would hold two kinds of names."""
    again()
    for module in (run, leave_out):
        monkeypatch.setattr(module, "RULES", leave_out.RULES + 1)
    with pytest.raises(ConfigError, match="rules of naming: the folder has"):
        again()
    namer = Namer(load_reference(str(data[0] / "reference.parquet")))
    leave_out.kept_trials(namer, 50, tmp_path / "kept")
    monkeypatch.setattr(leave_out, "RULES", leave_out.RULES + 1)
    leave_out.kept_trials(namer, 50, tmp_path / "kept")
    assert len(list((tmp_path / "kept").glob("trials-*.npz"))) == 2


def test_two_runs_at_once_do_not_share_a_folder(again, tmp_path):
    first = again()
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    with (
        Journal(tmp_path / "out", settings),
        pytest.raises(ConfigError, match="in use by another run"),
    ):
        again()
    assert again()["classified"] == first["classified"], "a run that failed keeps no lock"


def test_other_options_are_refused_before_the_reference_is_read(data, again, monkeypatch):
    """Embedding a reference can take hours."""
    again()
    monkeypatch.setattr(run, "open_namer", lambda config: pytest.fail("references were read"))
    with pytest.raises(ConfigError, match=r"coverage: the folder has 0\.7, this run has 0\.9"):
        again(min_coverage=0.9)
    with pytest.raises(ConfigError, match="columns: the folder has None"):
        again(columns={"sequence_id": "name"})
