"""Training batches: each example once, the same in every process and on every device."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bioscan_xla.encode.model import load_model
from bioscan_xla.encode.packing import PAD_ID
from bioscan_xla.encode.runtime import open_device
from bioscan_xla.options import FinetuneConfig
from bioscan_xla.reads.tokens import tokenize
from bioscan_xla.training.batches import (
    Augmentation,
    Shape,
    choose_shape,
    find_groups,
    find_shapes,
    make_batch,
    plan_epoch,
)
from bioscan_xla.training.classifier import build_classifier
from bioscan_xla.training.data import Examples
from bioscan_xla.training.step import Learner, make_optimizer, train_step

PLAIN = Augmentation(0.0, False, 0.0)


@pytest.fixture(scope="module")
def examples():
    rng = np.random.default_rng(0)
    sequences = ["".join(rng.choice(list("ACGT"), n)) for n in rng.integers(60, 7000, 50)]
    return Examples([f"s{n}" for n in range(50)], sequences, [(None,) * 7] * 50)


@pytest.fixture(scope="module")
def labels():
    return np.random.default_rng(1).integers(-1, 4, (50, 7))


def _make(examples, labels, rows, group=0, shapes=None, **more):
    options = {"max_tokens": 1000, "augmentation": PLAIN, "seed": 0, "epoch": 0} | more
    return make_batch(examples, labels, group, rows, shapes=shapes, **options)


def _mixed(count, seed=0):
    """Lengths in bp as a plan without data simulates them: barcodes, amplicons, long reads."""
    rng = np.random.default_rng(seed)
    spans = np.array([(658, 659), (150, 421), (900, 1801), (1801, 5995)])
    chosen = spans[rng.choice(4, count, p=(0.3, 0.3, 0.3, 0.1))]
    return rng.integers(chosen[:, 0], chosen[:, 1])


def _examples(lengths):
    rng = np.random.default_rng(1)
    texts = ["".join(rng.choice(list("ACGT"), n)) for n in lengths]
    return Examples([f"s{n}" for n in range(len(texts))], texts, [(None,) * 7] * len(texts))


def test_each_example_once_an_epoch_in_another_order(examples):
    tokens = np.diff(tokenize(examples.sequences).offsets)
    plans = [plan_epoch(tokens, 1000, 8, 0, epoch) for epoch in (0, 0, 1)]
    for plan in plans:
        assert sorted(np.concatenate([rows for _, rows in plan]).tolist()) == list(range(50))
        sizes = {}
        for group, rows in plan:
            sizes.setdefault(group, []).append(len(rows))
        assert max(map(max, sizes.values())) <= 8
        assert all(max(each) - min(each) <= 1 for each in sizes.values())
    flat = [[rows.tolist() for _, rows in plan] for plan in plans]
    assert flat[0] == flat[1] != flat[2]
    assert len(sizes) <= 6


def test_sequences_of_one_length_make_one_group():
    assert not find_groups(np.full(100, 114), 32).any()
    assert find_groups(np.array([7]), 32).tolist() == [0]
    mixed = np.repeat([30, 900], [900, 100])
    groups = find_groups(mixed, 32)
    assert groups[0] == 0  # short ones do not wait in rows that long ones make wide
    assert groups[-1] == 1


@pytest.mark.parametrize("lengths", ["mixed", "uniform"])
@pytest.mark.parametrize("frames", [1, 6])
def test_rows_of_a_few_shapes_hold_little_filler(lengths, frames):
    rng = np.random.default_rng(3)
    lengths_bp = _mixed(3000) if lengths == "mixed" else rng.integers(100, 6001, 1500)
    examples = _examples(lengths_bp)
    labels = np.zeros((len(examples), 7), np.int64)
    tokens = np.diff(tokenize(examples.sequences).offsets)
    varied = Augmentation()
    options = {"max_tokens": 1000, "augmentation": varied, "seed": 0, "frames": frames}
    shapes = find_shapes(examples, tokens, batch_size=32, num_devices=8, **options)
    useful = computed = 0
    seen = set()
    for group, rows in plan_epoch(tokens, 1000, 32, 0, 1)[:: frames * 2]:
        made = _make(examples, labels, rows, group, shapes, epoch=1, **options)
        assert made.batch.num_segments * len(made.batch.input_ids) == len(made.labels) * frames
        useful += made.batch.num_useful
        computed += made.batch.input_ids.size
        seen.add(made.batch.input_ids.shape)
    assert 1 - useful / computed < 0.08
    assert len(seen) <= 6


def test_rows_hold_the_tokens_and_labels(examples, labels):
    rows = np.array([3, 9, 1])
    made = _make(examples, labels, rows)
    assert made.known.tolist() == (labels[rows] >= 0).sum(0).tolist()
    assert made.batch.input_ids.shape[0] == 1
    for _, segment, window in made.batch.places:
        row = window.owner[1]
        assert made.labels[segment].tolist() == labels[row].tolist()
        whole = tokenize([examples.sequences[row]]).values[1:]
        text, part = whole.tobytes(), window.tokens.tobytes()
        assert part in text
        assert len(window) == min(1000, len(whole) + 1)


def test_rows_on_xla_hold_the_same_tokens_and_labels(examples, labels):
    rows = np.array([0, 1, 2, 4, 5])
    shapes = [Shape(8, 1100, 2), Shape(8, 1000, 1)]
    made = _make(examples, labels, rows, shapes=shapes)
    assert made.batch.input_ids.shape == (8, 1100)
    assert made.labels.shape == (16, 7)
    whole = _make(examples, labels, rows)
    for one, other in zip(_held(made), _held(whole), strict=True):
        assert one == other
    empty = (made.batch.segments >= 0).any(1)
    assert empty.sum() == 5
    assert (made.batch.input_ids[~empty] == PAD_ID).all()
    assert made.known.tolist() == whole.known.tolist()


def _held(made):
    """Tokens and labels of every place that holds a sequence, in the order of the examples."""
    places = sorted(made.batch.places, key=lambda place: place[2].owner[1])
    for row, segment, window in places:
        at = row * made.batch.num_segments + segment
        yield window.owner[1], window.tokens.tolist(), made.labels[at].tolist()


def test_a_batch_that_outgrows_its_shape_takes_the_next():
    shapes = [Shape(2, 100, 3), Shape(2, 200, 3), Shape(2, 150, 3), Shape(6, 1000, 1)]
    assert choose_shape([50, 50, 60, 40], 0, shapes)[0] == shapes[0]
    shape, held = choose_shape([60, 60, 60, 50], 0, shapes)
    assert shape == shapes[2]
    assert sorted(at for row in held for at in row) == [0, 1, 2, 3]
    assert choose_shape([999, 30], 1, shapes)[0] == shapes[3]
    assert choose_shape([60, 10, 10, 10, 10, 10], 0, shapes)[0] == shapes[0]
    assert choose_shape([10] * 7, 0, [Shape(2, 100, 3), Shape(8, 1000, 1)])[0].rows == 8


def test_processes_share_a_batch(examples, labels):
    rows = np.array([3, 9, 1, 4, 7])
    varied = Augmentation(0.5, True, 0.5)
    whole = _make(examples, labels, rows, augmentation=varied)
    parts = [
        _make(examples, labels, rows, augmentation=varied, process_index=i, process_count=6)
        for i in range(6)
    ]

    def tokens(made):
        return {w.owner[1]: w.tokens.tolist() for _, _, w in made.batch.places if w.owner[1] >= 0}

    together = {}
    for part in parts:
        together |= tokens(part)
        assert part.known.tolist() == whole.known.tolist()
    assert together == tokens(whole)
    assert (parts[5].labels == -1).all()  # nothing is left for the sixth


def test_augmentation():
    rng = np.random.default_rng(0)
    sequence = "ACGTTGCATG" * 30
    assert Augmentation(1.0, False, 0.0).apply("AACGT" * 30, rng) == "ACGTT" * 30
    shifted = {Augmentation(0.0, True, 0.0).apply(sequence, rng) for _ in range(60)}
    assert shifted == {sequence[n:] for n in range(6)}
    cropped = [Augmentation(0.0, False, 1.0).apply(sequence, rng) for _ in range(20)]
    assert all(part in sequence and 100 <= len(part) < 300 for part in cropped)
    assert PLAIN.apply(sequence, rng) == sequence


@pytest.mark.parametrize("frames", [1, 6])
def test_a_step_on_rows_of_xla_is_the_step_on_one_row(examples, labels, model_folder, frames):
    device = open_device("cpu", "float32")
    config = FinetuneConfig(dropout=0.0, frames=frames)
    counts = SimpleNamespace(num_classes=[4] * 7)
    rows = np.array([0, 3, 4, 9])
    figures = []
    for shapes in (None, [Shape(2, 2000, 3), Shape(4, 1000, 1)]):
        torch.manual_seed(0)
        base = load_model(model_folder, torch.float32)
        model = build_classifier(base, device, counts, config)
        trained = [p for p in model.parameters() if p.requires_grad]
        learner = Learner(config, device, model, make_optimizer(model, config), trained)
        made = _make(examples, labels, rows, shapes=shapes, frames=frames)
        figures.append(train_step(learner, made))
    assert figures[0][1] > 0
    torch.testing.assert_close(figures[0], figures[1], rtol=1e-4, atol=1e-6)
