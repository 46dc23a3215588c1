"""The model card and the pictures of a fine-tuned model."""

import csv
import json
import warnings

import numpy as np
import pytest
from huggingface_hub import ModelCard

from bioscan_xla.options import FinetuneConfig
from bioscan_xla.reads.labels import learn_labels
from bioscan_xla.training.card import hub_id, write_card
from bioscan_xla.training.pictures import draw_confusion, draw_vectors, write_confusions

NUCLEOTIDE_TRANSFORMER = "InstaDeepAI/nucleotide-transformer-2.5b-multi-species"
FACTS = {"train": 90, "eval": 10, "epochs": 2, "trainable": 5, "parameters": 50}


@pytest.fixture(scope="module")
def space():
    rows = [("Animalia", "Annelida"), ("Animalia", "Mollusca")]
    return learn_labels([row + (None,) * 5 for row in rows])[0]


def _card(folder, model, space, **more):
    config = FinetuneConfig(train="x.parquet", model=model, output=str(folder / "out"))
    write_card(folder, config, space, {"kingdom/accuracy": 0.5}, FACTS | more)
    return ModelCard.load(folder / "README.md")


def test_card_of_a_model_of_the_hub(tmp_path, space):
    card = _card(tmp_path, NUCLEOTIDE_TRANSFORMER, space)
    assert card.data.base_model == NUCLEOTIDE_TRANSFORMER
    assert card.data.license == "cc-by-nc-sa-4.0"
    assert "| kingdom | 1 | 0.500 | - |" in card.text
    assert str(tmp_path) not in card.text


def test_card_of_a_local_model_holds_no_path(tmp_path, space):
    model = tmp_path / "encoder"
    model.mkdir()
    (model / "config.json").write_text("{}")
    card = _card(tmp_path, str(model), space, base_hash="abc123")
    assert card.data.base_model is None
    assert card.data.license is None
    assert "base_model" not in (tmp_path / "README.md").read_text()
    assert str(tmp_path) not in card.text
    assert "Taxonomy adapter for encoder" in card.text
    assert "abc123" in card.text


def test_a_copy_of_a_hub_model_is_named_by_its_id(tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"_name_or_path": NUCLEOTIDE_TRANSFORMER}))
    assert hub_id(str(tmp_path)) == NUCLEOTIDE_TRANSFORMER
    for other in ('{"_name_or_path": "/data/model"}', '{"_name_or_path": ""}', "[]", "broken"):
        config.write_text(other)
        assert hub_id(str(tmp_path)) is None
    config.unlink()
    assert hub_id(str(tmp_path)) is None
    assert hub_id("gs://bucket/model") is None


def test_confusions(tmp_path, space):
    truth = np.full((5, 7), -1)
    truth[:, 0], truth[:, 1] = 0, [0, 0, 0, 1, -1]
    predicted = truth.copy()
    predicted[:, 1] = [0, 1, 1, 1, 0]
    write_confusions(tmp_path / "c.csv", predicted, truth, space)
    with (tmp_path / "c.csv").open() as file:
        header, *rows = csv.reader(file)
    assert header == ["rank", "truth", "predicted", "sequences"]
    assert rows == [["phylum", "Annelida", "Mollusca", "2"]]
    draw_confusion(tmp_path / "c.png", predicted, truth, space)
    assert (tmp_path / "c.png").stat().st_size > 1000


def test_vectors_are_drawn_where_they_span_a_plane(tmp_path):
    vectors = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
    draw_vectors(tmp_path / "v.png", vectors, np.array([0, -1, 0]), ["Annelida"])
    assert (tmp_path / "v.png").stat().st_size > 1000
    draw_vectors(tmp_path / "one.png", vectors[:1], np.array([0]), ["Annelida"])
    assert not (tmp_path / "one.png").exists()


def test_many_phyla_fit_into_the_picture(tmp_path):
    """Those beyond the most frequent are grey together; matplotlib would give up the layout."""
    rng = np.random.default_rng(0)
    phylum = np.repeat(np.arange(80), 3)
    names = [f"Phylum number {number}" for number in range(80)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_vectors(tmp_path / "v.png", rng.normal(size=(240, 8)), phylum, names)
    assert (tmp_path / "v.png").stat().st_size > 5_000
