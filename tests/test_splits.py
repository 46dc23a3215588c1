"""Splits: equal sequences on one side, classes on both, whole taxa held out."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bioscan_xla.training.splits import groups_of_kin, split_rows


@pytest.fixture
def rows():
    rng = np.random.default_rng(0)
    sequences = [f"s{n}" for n in rng.integers(0, 300, 500)]
    genus = {name: int(rng.integers(0, 12)) for name in set(sequences)}
    labels = np.full((500, 7), -1)
    labels[:, :5] = 0
    labels[:, 5] = [genus[name] for name in sequences]
    return sequences, labels


def test_equal_sequences_are_never_on_both_sides(rows):
    sequences, labels = rows
    parts = split_rows(sequences, labels, eval_fraction=0.2)
    side = {}
    for name, part in zip(sequences, parts.tolist(), strict=True):
        assert side.setdefault(name, part) == part
    distinct = list(side.values())
    assert distinct.count("eval") == pytest.approx(0.2 * len(distinct), abs=2)


def test_every_class_stays_in_training(rows):
    sequences, labels = rows
    parts = split_rows(sequences, labels, eval_fraction=0.5)
    assert set(labels[parts == "train", 5]) == set(labels[:, 5])
    assert len(set(labels[parts == "eval", 5])) > 8


def test_single_sequences_stay_in_training():
    labels = np.full((10, 7), -1)
    labels[:, 6] = np.arange(10)
    assert (split_rows([str(n) for n in range(10)], labels, eval_fraction=0.5) == "train").all()


def test_whole_taxa_are_novel(rows):
    sequences, labels = rows
    parts = split_rows(sequences, labels, novel_rank=5, novel_fraction=0.25)
    novel = set(labels[parts == "novel", 5])
    assert len(novel) == 3
    assert not novel & set(labels[parts != "novel", 5])


def test_seeded(rows):
    sequences, labels = rows
    one, same, other = (split_rows(sequences, labels, seed=seed) for seed in (1, 1, 2))
    assert (one == same).all()
    assert (one != other).any()


def test_near_identical_sequences_are_never_on_both_sides():
    rng = np.random.default_rng(0)
    letters = np.array(list("ACGT"))
    originals = rng.choice(letters, (60, 650))
    sequences, kind = [], []
    for number, bases in enumerate(originals):
        for _ in range(4):
            copy = bases.copy()
            places = rng.choice(650, 5, replace=False)  # about 99.2 % alike
            copy[places] = rng.choice(letters, 5)
            text = "".join(copy)
            if rng.random() < 0.5:  # read from the other strand
                text = text.translate(str.maketrans("ACGT", "TGCA"))[::-1]
            sequences.append(text)
            kind.append(number)
    assert len({*zip(groups_of_kin(sequences, 0.98), kind, strict=True)}) == 60
    assert len({*groups_of_kin(sequences, 0.98)}) == 60
    assert len({*groups_of_kin(sequences)}) == 240
    labels = np.zeros((240, 7), int)
    parts = split_rows(sequences, labels, eval_fraction=0.3, identity=0.98)
    sides = {(number, part) for number, part in zip(kind, parts.tolist(), strict=True)}
    assert len(sides) == 60
    assert (parts == "eval").sum() == pytest.approx(72, abs=8)


def test_sequences_too_short_to_compare_are_their_own_kin():
    assert groups_of_kin(["ACGT", "ACGT", "ACGA", "N" * 40], 0.97) == [0, 0, 1, 2]


def _species(sizes):
    """One sequence each, `sizes` of a species; the sequences, their labels."""
    labels = np.full((sum(sizes), 7), -1)
    labels[:, 6] = np.repeat(np.arange(len(sizes)), sizes)
    return [f"s{n}" for n in range(sum(sizes))], labels


def test_species_of_one_sequence_leave_no_debt_to_others():
    # Two hundred species that can give nothing stand before two hundred of eleven sequences.
    sequences, labels = _species([1] * 200 + [11] * 200)
    parts = split_rows(sequences, labels, eval_fraction=0.1)
    given_away = Counter(labels[parts == "eval", 6].tolist())
    assert set(given_away.values()) <= {1, 2}
    assert sum(given_away.values()) == 220


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=40),
    st.floats(0, 1),
    st.integers(0, 5),
)
def test_no_species_gives_more_than_its_share(sizes, fraction, seed):
    sequences, labels = _species(sizes)
    parts = split_rows(sequences, labels, eval_fraction=fraction, seed=seed)
    assert (parts == split_rows(sequences, labels, eval_fraction=fraction, seed=seed)).all()
    taken = Counter(labels[parts == "eval", 6].tolist())
    shares = [min(fraction * size, size - 1) for size in sizes]
    for number, share in enumerate(shares):
        assert np.floor(share - 1e-4) <= taken[number] <= np.ceil(share + 1e-4)
    assert abs(sum(taken.values()) - sum(shares)) <= 0.5 + 1e-3


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 20), st.integers(0, 7), st.integers(0, 6)),
        min_size=1,
        max_size=80,
    ),
    st.floats(0, 1),
    st.integers(0, 5),
)
def test_any_taxonomy(records, fraction, seed):
    """Sequences shared between species, lineages of any depth: kin stay together, classes stay."""
    sequences = [f"s{sequence}" for sequence, _, _ in records]
    labels = np.full((len(records), 7), -1)
    for row, (_, species, depth) in enumerate(records):
        labels[row, :depth] = [species >> (7 - rank) for rank in range(depth)]
    parts = split_rows(sequences, labels, eval_fraction=fraction, seed=seed)
    assert len({*zip(sequences, parts.tolist(), strict=True)}) == len(set(sequences))
    assert (parts == "train").any()
    for rank in range(7):
        assert set(labels[parts == "eval", rank]) <= {*labels[parts == "train", rank], -1}
