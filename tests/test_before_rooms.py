"""What the version before the move into rooms wrote: tables, models and checkpoints still load.

The paths inside them do not exist any more; `data/before_rooms/make.py` tells how they were made.
"""

import shutil

import pyarrow.parquet as pq
import pytest

from bioscan_xla import load_classifier
from bioscan_xla.embed import run_embedding_pipeline
from bioscan_xla.encode.runtime import open_device
from bioscan_xla.errors import ModelError
from bioscan_xla.finetune import run_finetuning_pipeline
from bioscan_xla.search import search_sequences
from bioscan_xla.table.neighbours import open_table
from bioscan_xla.training.evaluation import predict

from .conftest import ROOT, metrics_lines

BEFORE = ROOT / "tests/data/before_rooms"
RUN = {"device": "cpu", "dtype": "float32"}


@pytest.fixture
def place(tmp_path):
    """The old files, somewhere else."""
    shutil.copytree(BEFORE, tmp_path / "moved")
    return tmp_path / "moved"


@pytest.fixture(scope="module")
def reads():
    return pq.read_table(BEFORE / "reads.parquet").to_pylist()


def test_an_old_table_is_searched_with_the_moved_model(place, reads):
    rows = search_sequences(
        str(place / "vectors.db"),
        [reads[0]["dna_sequence"]],
        k=1,
        device="cpu",
        model=str(place / "model"),
    )
    assert rows[0]["sequence_id"] == reads[0]["sequence_id"]
    assert rows[0]["distance"] < 1e-3


def test_an_old_table_is_gone_on_with(place, reads):
    """Old sources are whole paths: of a file that moved, what is stored is known by its ids."""
    result = run_embedding_pipeline(
        str(place / "reads.parquet"),
        str(place / "vectors.db"),
        model=str(place / "model"),
        overlap_tokens=20,
        **RUN,
    )
    assert result["total_rows"] == len(reads) - 1
    assert result["embeddings_generated"] == len(reads) - 1 - 9
    assert result["rejected"] == {"id_seen_before": 9, "not_a_nucleotide": 1}
    ids = open_table(str(place / "vectors.db")).to_arrow()["sequence_id"].to_pylist()
    assert sorted(ids) == sorted(row["sequence_id"] for row in reads if row is not reads[3])


def test_an_old_classifier_loads(place, reads):
    with pytest.raises(ModelError, match="/tmp/before/model, which no longer exists"):
        load_classifier(place / "classifier", "cpu", "float32")
    classifier = load_classifier(place / "classifier", "cpu", "float32", place / "model")
    probabilities, _ = predict(
        classifier, open_device("cpu", "float32"), [reads[0]["dna_sequence"]], max_tokens=150
    )
    assert [len(rank) for rank in probabilities] == [1] * 7


def test_old_training_is_gone_on_with(place):
    result = run_finetuning_pipeline(
        str(place / "reads.parquet"),
        str(place / "interrupted"),
        model=str(place / "model"),
        use_wandb=False,
        num_epochs=2,
        batch_size=4,
        eval_fraction=0.2,
        min_sequences=1,
        learning_rate=1e-3,
        **RUN,
    )
    assert result["interrupted"] is None
    # Near the run of before that was not interrupted: batches are drawn in another way now.
    for number, line in enumerate(metrics_lines(BEFORE / "classifier"), 1):
        assert result[f"epoch_{number}_loss"] == pytest.approx(line["train/loss"], rel=0.05)
