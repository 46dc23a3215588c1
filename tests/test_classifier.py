"""The classifier: rank order, input of both kinds, what a broken folder says."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from bioscan_xla.encode.model import load_model
from bioscan_xla.encode.runtime import open_device
from bioscan_xla.errors import ModelError
from bioscan_xla.reads.labels import learn_labels
from bioscan_xla.reads.lineages import RANKS
from bioscan_xla.reads.tokens import load_tokenizer
from bioscan_xla.training.classifier import (
    TaxonomyClassifier,
    attach_adapter,
    count_parameters,
    initial_log_priors,
    load_classifier,
)
from bioscan_xla.training.evaluation import predict


@pytest.fixture(scope="module")
def space():
    rows = [
        ("A", ("Annelida", "Cnidaria")[n % 2], *[None] * 4, f"S {'abc'[n % 3]}") for n in range(12)
    ]
    return learn_labels(rows)[0]


@pytest.fixture
def classifier(model_folder, space):
    torch.manual_seed(0)
    return TaxonomyClassifier(load_model(model_folder, torch.float32), 64, space).eval()


def test_heads_are_in_rank_order(classifier, space):
    assert tuple(classifier.heads) == RANKS
    assert space.num_classes == (1, 2, 0, 0, 0, 0, 6)
    sizes = [head[-1].out_features for head in classifier.heads.values()]
    assert sizes == [1, 2, 1, 1, 1, 1, 6]


def test_tokenizer_input_equals_packed_rows(classifier, sequences):
    short = [text for text in sequences if len(text) < 900]
    inputs = load_tokenizer()(short, padding=True, return_tensors="pt")
    with torch.inference_mode():
        logits = classifier(inputs["input_ids"], attention_mask=inputs["attention_mask"])
    probabilities, vectors = predict(classifier, open_device("cpu", "float32"), short, 1000)
    assert vectors.shape == (len(short), 64)
    for values, wanted in zip(logits, probabilities, strict=True):
        got = torch.softmax(values, -1).numpy()[:, : wanted.shape[1]]
        np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_prediction_leaves_the_mode_as_it_was(classifier):
    classifier.train()
    predict(classifier, open_device("cpu", "float32"), ["ACGTACGTAA" * 3], 1000)
    assert classifier.training


def test_what_is_trained_is_counted(model_folder):
    tuned = attach_adapter(load_model(model_folder, torch.bfloat16), rank=16)
    trainable, total = count_parameters(tuned)
    assert trainable == 2 * 2 * (64 * 16 + 16 * 64)  # layers, query and value, A and B
    assert total > 10 * trainable
    kinds = {p.dtype for p in tuned.parameters() if p.requires_grad}
    assert kinds == {torch.float32}


def test_log_priors(space):
    priors = initial_log_priors(space, 1.0)
    np.testing.assert_allclose(torch.exp(priors[1]).sum(), 1, rtol=1e-6)
    assert [len(prior) for prior in priors] == [1, 2, 1, 1, 1, 1, 6]


def test_broken_folders_are_named(model_folder, classifier, space, tmp_path):
    device = open_device("cpu", "float32")
    with pytest.raises(ModelError, match=r"has no adapter/adapter_config\.json"):
        load_classifier(tmp_path, device)
    attach_adapter(load_model(model_folder, torch.float32)).save_pretrained(tmp_path / "adapter")
    space.save(tmp_path / "labels.json")
    save_file({"kingdom.0.weight": torch.ones(3)}, tmp_path / "heads.safetensors")
    with pytest.raises(ModelError, match=r"heads\.safetensors does not fit"):
        load_classifier(tmp_path, device, model_folder)
