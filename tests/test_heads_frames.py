"""Heads trained on one frame are not read in six, wherever that could be asked for."""

import pyarrow.parquet as pq
import pytest

from bioscan_xla.classify import run_classification_pipeline
from bioscan_xla.embed import run_embedding_pipeline
from bioscan_xla.encode.runtime import open_device
from bioscan_xla.errors import ConfigError, ModelError
from bioscan_xla.options import ClassifyConfig, FinetuneConfig
from bioscan_xla.table.neighbours import open_table, read_fingerprint
from bioscan_xla.training.classifier import load_classifier
from bioscan_xla.training.run import finetune

from .conftest import small_run

CPU = {"device": "cpu", "dtype": "float32"}


@pytest.fixture(scope="module")
def one_frame(training_sample, model_folder, tmp_path_factory):
    """A folder of heads trained on one frame."""
    folder = str(tmp_path_factory.mktemp("heads") / "out")
    finetune(FinetuneConfig(**small_run(training_sample, model_folder, folder) | {"num_epochs": 1}))
    return folder


@pytest.mark.parametrize("method", ["heads", "both"])
def test_classify_refuses_heads_in_another_reading(one_frame, training_sample, tmp_path, method):
    places = training_sample, training_sample, str(tmp_path / "out")
    options = {"model": one_frame, "num_trials": 0, **CPU}
    for reading, words in (
        ({"frames": 6}, "frames 1 and cannot be read with frames 6"),
        ({"strands": "both"}, "strands given and cannot be read with strands both"),
    ):
        with pytest.raises(ModelError, match=words):
            run_classification_pipeline(*places, method=method, **options, **reading)
    run_classification_pipeline(*places, method=method, frames=1, **options)


def test_vectors_of_the_same_model_are_read_in_six(one_frame, training_sample, tmp_path):
    small = tmp_path / "small.parquet"
    pq.write_table(pq.read_table(training_sample).slice(0, 12), small)
    places = str(small), str(small), str(tmp_path / "out")
    run_classification_pipeline(*places, model=one_frame, frames=6, num_trials=0, **CPU)
    db = str(tmp_path / "db")
    run_embedding_pipeline(str(small), db, adapter=one_frame, frames=6, **CPU)
    assert read_fingerprint(open_table(db))["frames"] == "6"
    # Heads beside a table of six frames: embedded again, in their own.
    result = run_classification_pipeline(
        str(small), db, str(tmp_path / "heads"), model=one_frame, method="both", num_trials=0, **CPU
    )
    assert result["model"]["frames"] == "1"


def test_the_loaded_classifier_reads_what_it_was_trained_on(one_frame):
    assert load_classifier(one_frame, open_device("cpu", "float32")).frames == 1


def test_frames_without_a_model_are_refused(training_sample):
    with pytest.raises(ConfigError, match="those of --model"):
        ClassifyConfig(input=[training_sample], reference=training_sample, frames=6)
