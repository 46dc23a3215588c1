"""Reading frames and strands: the mean over them, what it is invariant to, and what is refused."""

import numpy as np
import pytest

from bioscan_xla.embed import run_embedding_pipeline
from bioscan_xla.encode.encoder import load_encoder
from bioscan_xla.encode.inference import embed_sequences, prepare
from bioscan_xla.encode.runtime import open_device
from bioscan_xla.errors import ConfigError, TableError
from bioscan_xla.reads.tokens import reverse_complement
from bioscan_xla.search import search_sequences

from .conftest import cosine, hugging_face_states


@pytest.fixture(scope="module")
def load(model_folder):
    cpu = open_device("cpu", "float32")
    return lambda **options: load_encoder(model_folder, device=cpu, **options)


def test_six_frames_are_the_token_weighted_mean(load, model_folder):
    rng = np.random.default_rng(0)
    sequences = ["".join(rng.choice(list("ACGT"), n)) for n in (20, 95, 640)]
    sequences.append("ACGTTNACGTACGTACCNNA")
    found = embed_sequences(load(frames=6), sequences)
    for vector, sequence in zip(found, sequences, strict=True):
        stretches = sequence.split("N")
        frames = ["N".join(part[drop:] for part in stretches) for drop in range(6)]
        states = np.concatenate(list(hugging_face_states(model_folder, frames)))
        np.testing.assert_allclose(vector, states.mean(0), atol=1e-5)


def test_a_sequence_shorter_than_a_frame_is_not_read_in_it():
    job = prepare(0, None, ["A", "ACGTAC", "ACGTAC" * 2], 1000, 100, frames=6)
    assert job.num_windows.tolist() == [1, 6, 6]
    assert job.num_windowed == 0


def test_long_sequences_count_as_windowed_once(load):
    sequences = ["ACGGTC" * 1200, "ACGGTC" * 100]
    job = prepare(0, None, sequences, 1000, 100, frames=6, strands="both")
    assert job.num_windowed == 1
    assert job.num_windows.tolist() == [24, 12]


@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_both_strands_do_not_depend_on_the_strand(load, sequences, pooling):
    cleaned = sequences[:20]
    reversed_ones = [reverse_complement(text) for text in cleaned]
    encoder = load(frames=6, strands="both", pooling=pooling)
    one, other = (embed_sequences(encoder, texts) for texts in (cleaned, reversed_ones))
    np.testing.assert_allclose(one, other, atol=2e-6)
    alone = load(frames=6, pooling=pooling)
    assert (
        cosine(embed_sequences(alone, cleaned), embed_sequences(alone, reversed_ones)).min() < 0.99
    )


def test_six_frames_hardly_change_when_bases_are_cut(load):
    rng = np.random.default_rng(1)
    sequences = ["".join(rng.choice(list("ACGT"), n)) for n in (170, 658, 1500)]
    one, six = load(frames=1), load(frames=6)
    for drop in range(1, 6):
        cut = [text[drop:] for text in sequences]
        kept = cosine(embed_sequences(six, sequences), embed_sequences(six, cut))
        assert kept.min() > 0.99
        assert (
            1 - kept < (1 - cosine(embed_sequences(one, sequences), embed_sequences(one, cut)))
        ).all()


def test_frames_are_part_of_the_fingerprint(load):
    assert load().fingerprint["frames"] == "1"
    assert load().fingerprint["strands"] == "given"
    assert load(frames=6, strands="both").fingerprint["frames"] == "6"
    with pytest.raises(ConfigError, match="choose 1 or 6"):
        load(frames=3)


def test_a_table_of_other_frames_is_refused_and_searched_in_its_own(
    training_sample, model_folder, tmp_path
):
    options = {"model": model_folder, "device": "cpu", "dtype": "float32", "max_sequences": 12}
    db = str(tmp_path / "vectors.db")
    run_embedding_pipeline(training_sample, db, frames=6, strands="both", **options)
    with pytest.raises(TableError, match="frames: the table has '6', this run has '1'"):
        run_embedding_pipeline(training_sample, db, **options)
    import pyarrow.parquet as pq

    text = pq.read_table(training_sample)["dna_sequence"][3].as_py()
    for query in (text, reverse_complement(text)):
        (row,) = search_sequences(db, [query], k=1, device="cpu")
        assert row["sequence_id"] == "SIM00003"
        assert row["distance"] < 1e-3


def test_dry_run_shows_the_cost(training_sample, model_folder, tmp_path, capsys):
    options = {"model": model_folder, "device": "cpu", "dry_run": True}
    run_embedding_pipeline(training_sample, str(tmp_path / "db"), **options)
    assert "one reading a sequence" in capsys.readouterr().out
    run_embedding_pipeline(
        training_sample, str(tmp_path / "db"), frames=6, strands="both", **options
    )
    assert "frames: 6, strands: both; 12 times the tokens" in capsys.readouterr().out
