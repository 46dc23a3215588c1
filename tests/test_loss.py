"""The loss against arithmetic by hand."""

import numpy as np
import pytest
import torch

from bioscan_xla.reads.labels import learn_labels
from bioscan_xla.training.loss import (
    RANK_WEIGHTS,
    ParentLink,
    parent_links,
    rank_disagreement,
    rank_loss,
)


def _by_hand(logits, labels, weights=RANK_WEIGHTS):
    total = scale = 0.0
    for rank, values in enumerate(logits):
        losses = [
            np.log(np.exp(row).sum()) - row[label]
            for row, label in zip(values.numpy().astype(np.float64), labels[:, rank], strict=True)
            if label >= 0
        ]
        if losses:
            total += weights[rank] * np.mean(losses)
            scale += weights[rank]
    return total / scale


@pytest.fixture
def example():
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(6, classes, generator=generator) for classes in (1, 2, 3, 4, 5, 6, 7)]
    labels = torch.stack([torch.randint(-1, c, (6,), generator=generator) for c in range(1, 8)], 1)
    labels[:, 4] = -1  # a rank that nobody knows
    return logits, labels


def test_against_the_formula(example):
    logits, labels = example
    loss = rank_loss(logits, labels)
    assert float(loss.total) == pytest.approx(_by_hand(logits, labels), rel=1e-6)
    assert float(loss.per_rank[4]) == 0
    assert loss.known.tolist() == (labels >= 0).sum(0).tolist()


def test_unknown_rows_and_ranks_have_no_gradient(example):
    logits, labels = example
    logits = [values.requires_grad_() for values in logits]
    rank_loss(logits, labels).total.backward()
    for rank, values in enumerate(logits):
        unknown = labels[:, rank] < 0
        assert (values.grad[unknown] == 0).all()
    assert (logits[4].grad == 0).all()
    assert any((values.grad != 0).any() for values in logits)


def test_parts_of_a_batch_add_up_to_the_whole(example):
    logits, labels = example
    known = (labels >= 0).sum(0)
    whole = rank_loss(logits, labels).total
    parts = [
        rank_loss([values[part] for values in logits], labels[part], known).total
        for part in (slice(0, 2), slice(2, 6))
    ]
    assert float(sum(parts)) == pytest.approx(float(whole), rel=1e-6)


def test_filler_rows_change_nothing(example):
    logits, labels = example
    more = [torch.cat([values, torch.full((3, values.shape[1]), 9.0)]) for values in logits]
    filled = torch.cat([labels, torch.full((3, 7), -1)])
    assert float(rank_loss(more, filled).total) == pytest.approx(
        float(rank_loss(logits, labels).total), rel=1e-6
    )


def test_priors_and_smoothing(example):
    logits, labels = example
    priors = [torch.log_softmax(torch.arange(float(v.shape[1])), 0) for v in logits]
    adjusted = rank_loss(logits, labels, log_priors=priors).total
    shifted = [values + prior for values, prior in zip(logits, priors, strict=True)]
    assert float(adjusted) == pytest.approx(_by_hand(shifted, labels), rel=1e-6)
    assert rank_loss(logits, labels, label_smoothing=0.1).total != rank_loss(logits, labels).total


def test_nothing_known_is_zero(example):
    logits, labels = example
    assert float(rank_loss(logits, torch.full_like(labels, -1)).total) == 0


def test_disagreement_between_a_rank_and_its_child():
    upper = torch.log(torch.tensor([[0.7, 0.3], [0.5, 0.5]]))
    lower = torch.log(torch.tensor([[0.2, 0.5, 0.3], [0.9, 0.05, 0.05]]))  # classes of 0, 0, 1
    labels, known = torch.tensor([[0, 1], [0, -1]]), torch.tensor([2, 1])
    every = torch.ones(3, dtype=torch.bool)
    parents = [ParentLink(0, 1, torch.tensor([0, 0, 1]), every)]
    assert float(rank_disagreement([upper, lower], labels, known, parents)) == pytest.approx(0)
    parents = [ParentLink(0, 1, torch.tensor([0, 1, 1]), every)]
    wanted = 0.7 * np.log(0.7 / 0.2) + 0.3 * np.log(0.3 / 0.8)
    got = rank_disagreement([upper, lower], labels, known, parents)
    assert float(got) == pytest.approx(wanted, rel=1e-5)
    # In the loss it is only an addition.
    more, plain = (
        rank_loss([upper, lower], labels, known, weights=(1, 1), parents=parents, consistency=w)
        for w in (0.5, 0.0)
    )
    assert float(more.total - plain.total) == pytest.approx(0.5 * wanted, rel=1e-5)


def _chain(*names):
    return names + (None,) * (7 - len(names))


def test_disagreement_reaches_over_a_rank_that_is_missing():
    # The class is unknown in the first lineage: its order still belongs to phylum X.
    space, _ = learn_labels([_chain("K", "X", None, "O"), _chain("K", "Y", "C", "P")])
    links = parent_links(space)
    assert [(link.upper, link.lower) for link in links] == [(0, 1), (1, 2), (1, 3), (2, 3)]
    logits = [torch.zeros(1, n) for n in space.num_classes]
    logits[1] = torch.log(torch.tensor([[0.9, 0.1]]))
    logits[3] = torch.log(torch.tensor([[0.2, 0.8]]))  # O under X, P under Y
    labels = torch.tensor([[-1, -1, -1, 0, -1, -1, -1]])
    got = rank_disagreement(logits, labels, (labels >= 0).sum(0), links)
    wanted = 0.9 * np.log(0.9 / 0.2) + 0.1 * np.log(0.1 / 0.8)
    assert float(got) == pytest.approx(wanted / 3, rel=1e-5)  # three ranks have a parent


def test_nothing_to_disagree_with_is_zero():
    space, _ = learn_labels([_chain("K")])
    labels = torch.tensor([[0, -1, -1, -1, -1, -1, -1]])
    logits = [torch.zeros(1, n) for n in space.num_classes]
    got = rank_disagreement(logits, labels, (labels >= 0).sum(0), parent_links(space))
    assert float(got) == 0
