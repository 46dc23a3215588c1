"""Fine-tuning that reads six frames, and fine-tuning from the shipped encoder."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from bioscan_xla.embed import run_embedding_pipeline
from bioscan_xla.encode.encoder import load_encoder
from bioscan_xla.encode.inference import embed_sequences
from bioscan_xla.encode.model import load_model
from bioscan_xla.encode.pooling import count_tokens, pool
from bioscan_xla.encode.runtime import open_device
from bioscan_xla.errors import ConfigError
from bioscan_xla.options import FinetuneConfig
from bioscan_xla.reads.cleaning import clean_sequences
from bioscan_xla.reads.labels import learn_labels
from bioscan_xla.table.neighbours import open_table, read_fingerprint
from bioscan_xla.training.batches import Augmentation, Shape, make_batch
from bioscan_xla.training.classifier import TaxonomyClassifier, fit_to_model, load_classifier
from bioscan_xla.training.data import Examples
from bioscan_xla.training.evaluation import predict
from bioscan_xla.training.run import finetune

CPU = open_device("cpu", "float32")
LINEAGE = ("Animalia", "Annelida", "Polychaeta", "Sabellida", "Siboglinidae", "Riftia", None)


@pytest.mark.parametrize("kind", ["cpu", "xla"])
def test_a_batch_of_six_frames_gives_the_vectors_that_are_read(kind, model_folder):
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("ACGT"), n)) for n in (120, 300, 240)]
    examples = Examples(["a", "b", "c"], texts, [LINEAGE] * 3)
    space, _ = learn_labels(examples.lineages)
    labels = space.encode(examples.lineages)
    labels[:, 6] = [0, 1, 2]  # who is who
    made = make_batch(
        examples,
        labels,
        0,
        np.arange(3),
        shapes=None if kind == "cpu" else [Shape(2, 100, 2), Shape(4, 1000, 1)],
        max_tokens=1000,
        augmentation=Augmentation(0.0, False, 0.0),
        seed=0,
        epoch=0,
        frames=6,
    )
    model = TaxonomyClassifier(load_model(model_folder, torch.float32), 64, space).eval()
    batch = made.batch
    seen = []
    model.classify = lambda vectors: seen.append(vectors)
    with torch.no_grad():
        arrays = (torch.from_numpy(a) for a in (batch.input_ids, batch.positions, batch.segments))
        model(*arrays, batch.num_segments, batch.runs, frames=made.frames)
    (vectors,) = seen
    wanted = embed_sequences(load_encoder(model_folder, device=CPU, frames=6), texts)
    assert len(vectors) == len(made.labels)
    for vector, label in zip(vectors.numpy(), made.labels, strict=True):
        if label[6] >= 0:
            np.testing.assert_allclose(vector, wanted[label[6]], atol=1e-5)
    assert sorted(made.labels[:, 6].tolist())[-3:] == [0, 1, 2]
    assert batch.num_segments == (18 if kind == "cpu" else 2)


def test_many_segments_are_pooled_as_few_are():
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 300, 8, generator=rng)
    segments = torch.arange(300).div(3, rounding_mode="floor").repeat(2, 1)
    segments[1, 250:] = -1
    positions = 2 + torch.arange(300).remainder(3).repeat(2, 1)
    for pooling in ("mean", "mean_no_special", "cls"):
        many = pool(hidden, positions, segments, 100, pooling)
        few = pool(hidden[:, :90], positions[:, :90], segments[:, :90], 30, pooling)
        torch.testing.assert_close(many[:, :30], few)
        assert not many[1, 84:].any()


def test_many_segments_are_counted_as_few_are():
    segments = torch.arange(300).div(3, rounding_mode="floor").repeat(2, 1)
    segments[1, 250:] = -1
    many = count_tokens(segments, 101)
    torch.testing.assert_close(many[:, :30], count_tokens(segments[:, :90], 30))
    assert many[0].tolist() == [3.0] * 100 + [0.0]
    assert many[1, 82:85].tolist() == [3.0, 1.0, 0.0]


def test_options_follow_from_the_model(model_folder):
    small = load_model("bioscan-small", torch.float32).config
    config = fit_to_model(FinetuneConfig(), small)
    assert (config.frames_read, config.frames_trained) == (6, 6)
    assert config.targets == ["word_embeddings"]
    config = fit_to_model(FinetuneConfig(frames="random"), small)
    assert (config.frames_read, config.frames_trained) == (6, 1)
    config = fit_to_model(FinetuneConfig(), load_model(model_folder, torch.float32).config)
    assert (config.frames_read, config.targets) == (1, ["query", "value"])
    with pytest.raises(ConfigError, match="frame_shift"):
        FinetuneConfig(frames="random", frame_shift=False)


@pytest.mark.parametrize("frames", [None, "random"])
def test_fine_tuning_from_the_shipped_encoder(frames, options, tmp_path):
    options |= {"model": "bioscan-small", "frames": frames, "save_merged": True}
    result = finetune(FinetuneConfig(**options))
    assert result["epoch_2_loss"] < result["epoch_1_loss"]
    folder = Path(options["output"])
    assert json.loads((folder / "adapter" / "reading.json").read_text())["frames"] == 6
    classifier = load_classifier(folder, CPU)
    assert (classifier.frames, classifier.strands) == (6, "given")
    # The vectors that the heads see are those that embed writes with the adapter, or merged.
    texts = clean_sequences(pq.read_table(options["train"])["dna_sequence"].to_pylist()[:8])[0]
    _, wanted = predict(classifier, CPU, texts, 1000)
    for encoder in (
        load_encoder(adapter=str(folder), device=CPU),
        load_encoder(str(folder / "merged"), device=CPU),
    ):
        assert encoder.frames == 6
        np.testing.assert_allclose(embed_sequences(encoder, texts), wanted, atol=1e-5)
    db = str(tmp_path / "db")
    run_embedding_pipeline(options["train"], db, adapter=str(folder), device="cpu", max_sequences=5)
    assert read_fingerprint(open_table(db))["frames"] == "6"
