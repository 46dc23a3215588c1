"""Confidence against a known truth, temperatures, and heads by themselves."""

import csv
import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from bioscan_xla import run_classification_pipeline
from bioscan_xla.classification.calibration import (
    ALONE,
    GENUS,
    HIGHER_SHARES,
    Trials,
    _most_named,
    calibrate,
)
from bioscan_xla.classification.evidence import RANK_FEATURES
from bioscan_xla.classification.heads import HeadDecoder, fit_temperature, softmax
from bioscan_xla.classification.leave_out import run_trials
from bioscan_xla.classification.logistic import _inputs, fit_logistic
from bioscan_xla.classification.naming import Namer
from bioscan_xla.classification.reference import load_reference
from bioscan_xla.classification.tree import build_tree
from bioscan_xla.classification.trial_jobs import (
    SPECIES,
    _in_turn,
    choose_jobs,
    first_new_rank,
    without_species,
)
from bioscan_xla.reads.lineages import RANKS
from bioscan_xla.sample import simulate
from bioscan_xla.training.heldout import (
    NEW_TO_THE_MODEL,
    digest,
    read_heldout,
    write_heldout,
)
from bioscan_xla.training.metrics import calibration_error

DATA = Path(__file__).parents[2] / "shared" / "data"


def made_up(rng, num, novel_share, whole_share=0.0):
    """Trials whose probability of being right is known, and that probability at each rank.

    A sequence of an unknown genus has a lower identity, and is never right from genus down.
    """
    whole = rng.random(num) < whole_share
    novel = whole | (rng.random(num) < novel_share)
    identity = np.where(novel, rng.normal(0.88, 0.04, num), rng.normal(0.97, 0.02, num))
    features = np.zeros((num, len(RANKS), len(RANK_FEATURES)))
    features[:, :, RANK_FEATURES.index("identity")] = identity[:, None]
    correct = np.zeros((num, len(RANKS)), np.int8)
    above = np.ones(num, bool)
    for rank in range(len(RANKS)):
        odds = 60 * (identity - 0.80 - 0.015 * rank) + 2
        above = above & (rng.random(num) < 1 / (1 + np.exp(-odds)))
        if rank >= GENUS:
            above &= ~novel
        correct[:, rank] = above
    new = np.zeros((num, len(RANKS)), bool)
    new[:, GENUS:] = novel[:, None]
    every = np.ones((num, len(RANKS)), bool)
    left_out = np.where(whole, GENUS, ALONE)
    return Trials(features, every, correct, new, every, np.full(num, 500), left_out, np.arange(num))


@pytest.mark.parametrize("novel_share", [0.02, 0.2, 0.5])
def test_confidence_is_the_share_of_right_names_and_never_rises(novel_share):
    rng = np.random.default_rng(1)
    trials = made_up(rng, 6000, 0.03, whole_share=0.5)
    queries = made_up(rng, 6000, novel_share)
    fitted = calibrate(trials, novel_share=novel_share, precision=0.95)
    confidence = fitted.confidences(queries.features, queries.named)
    assert (np.diff(confidence, axis=1) <= 1e-12).all()
    for rank in range(len(RANKS)):
        assert calibration_error(confidence[:, rank], queries.correct[:, rank] == 1) < 0.03
        kept = confidence[:, rank] >= fitted.thresholds[rank]
        if kept.any():
            assert (queries.correct[kept, rank] == 1).mean() >= 0.93
    given = confidence[queries.novel[:, GENUS], GENUS] >= fitted.thresholds[GENUS]
    assert given.mean() <= 0.06


def test_a_name_is_no_surer_than_its_share_of_what_fits_equally_well():
    """However sure the trials, which have no contradicting labels, make it."""
    rng = np.random.default_rng(4)
    fitted = calibrate(made_up(rng, 2000, 0.05), novel_share=0.05, precision=0.95)
    queries = made_up(rng, 200, 0.05)
    free = fitted.confidences(queries.features, queries.named)
    assert np.nanmax(free[:, -1]) > 0.9
    queries.features[:, GENUS, RANK_FEATURES.index("tied_others")] = 0.25
    tied = fitted.confidences(queries.features, queries.named)
    np.testing.assert_array_equal(tied[:, :GENUS], free[:, :GENUS])
    np.testing.assert_allclose(tied[:, GENUS:], np.minimum(free[:, GENUS:], 0.75))


def test_where_every_name_may_be_kept_the_threshold_is_the_least():
    trials = made_up(np.random.default_rng(6), 2000, 0.0)
    right = trials.correct.copy()
    right[:, 0] = 1  # the highest rank is always right, and its confidence the same for all
    fitted = calibrate(dataclasses.replace(trials, correct=right), novel_share=0.0, precision=0.9)
    assert fitted.thresholds[0] == 0.7


def test_trials_are_mixed_to_the_expected_share_of_unknown_genera():
    trials = made_up(np.random.default_rng(2), 4000, 0.1, whole_share=0.5)
    novel = trials.novel[:, GENUS]
    for share in (0.02, 0.1, 0.4):
        weights = trials.weights(share)
        assert weights.sum() == pytest.approx(4000)
        assert weights[novel].sum() / 4000 == pytest.approx(share, abs=1e-6)


def test_trials_without_the_family_have_their_share_of_the_unknown_genera():
    trials = made_up(np.random.default_rng(2), 4000, 0.1, whole_share=0.5)
    left_out = trials.left_out.copy()
    left_out[:100] = RANKS.index("family")
    novel = trials.novel.copy()
    novel[:100, RANKS.index("family") :] = True
    trials = dataclasses.replace(trials, left_out=left_out, novel=novel)
    for share in (0.02, 0.4):
        weights = trials.weights(share)
        assert weights.sum() == pytest.approx(4000)
        assert weights[novel[:, GENUS]].sum() / 4000 == pytest.approx(share, abs=1e-6)
        expected = share * HIGHER_SHARES["family"]
        assert weights[:100].sum() / 4000 == pytest.approx(expected, abs=1e-6)


def test_of_taxa_that_are_left_out_each_comes_before_any_comes_again():
    taxa = np.random.default_rng(1).permutation(np.repeat([3, 5, 8], [1, 40, 2]))
    assert sorted(taxa[_in_turn(taxa)][:3]) == [3, 5, 8]
    assert sorted(taxa[_in_turn(taxa)][3:5]) == [5, 8]
    rows = 100 + np.arange(43)
    of_all = np.concatenate([np.zeros(100, int), taxa])
    jobs = choose_jobs(rows, np.tile(of_all[:, None], (1, len(RANKS))), 50)
    alone = [row for row, rank in jobs if rank == ALONE]
    whole = [taxa[row - 100] for row, rank in jobs if rank == GENUS]
    assert alone == rows[:20].tolist()
    assert len(whole) == 20
    assert {3, 5, 8} == set(whole[:3])


def test_genera_that_are_new_to_the_heads_stand_for_unknown_ones():
    """Heads cannot unlearn a genus: taking it from them hides too little."""
    rows, family = np.arange(300), RANKS.index("family")
    classes = np.zeros((300, len(RANKS)), int)
    classes[:60, GENUS:] = NEW_TO_THE_MODEL
    classes[60:80, family:] = NEW_TO_THE_MODEL
    classes[80:100, -1] = NEW_TO_THE_MODEL
    first_new = first_new_rank(classes)
    assert first_new.tolist() == [GENUS] * 60 + [family] * 20 + [6] * 20 + [7] * 200
    taxa = np.tile(rows[:, None] % 20, (1, len(RANKS)))
    jobs = choose_jobs(rows, taxa, 1000, first_new)
    of_rank = {rank: {row for row, at in jobs if at == rank} for rank in range(len(RANKS) + 1)}
    assert of_rank[GENUS] == set(range(60))
    assert of_rank[ALONE] == set(range(80, 300))
    assert min(of_rank[family]) >= 80, "twenty are too few: known ones are taken from the heads"
    mixed = [row for row, rank in choose_jobs(rows, taxa, 200, first_new, 0.25) if rank == ALONE]
    assert len(mixed) == 80
    assert sum(row < 80 for row in mixed) == 20, "a quarter is of genera that heads do not know"
    some = [row for row, rank in choose_jobs(rows, taxa, 1000, first_new, 0.25) if rank == ALONE]
    assert sum(row < 80 for row in some) == round(0.25 * len(some))
    only_new = choose_jobs(rows[:80], taxa, 200, first_new[:80], 1.0)
    assert sum(rank == ALONE for _, rank in only_new) == 80


def test_of_held_out_sequences_as_many_lack_their_species_as_of_all():
    rng = np.random.default_rng(0)
    species = np.concatenate([np.arange(500), 500 + np.arange(500) // 5, np.full(200, 600)])
    taxa = np.tile(species[:, None], (1, len(RANKS)))
    nameless = np.arange(601) == 600
    rows = rng.permutation(len(species))
    held = [(row, ALONE) for row in range(500, 1200)] + [(row, GENUS) for row in range(500, 600)]
    jobs = without_species(held, rows, taxa, nameless, rng)
    assert [row for row, _ in jobs] == [row for row, _ in held]
    assert sum(rank == SPECIES for _, rank in jobs) == pytest.approx(250, abs=40)
    assert {rank for row, rank in jobs if species[row] == 600} == {ALONE}
    assert jobs[700:] == held[700:]
    drawn = [(row, ALONE) for row in rows[:600]]
    assert without_species(drawn, rows, taxa, nameless, rng) == drawn, "they are like queries"


def test_few_genera_say_less_of_the_next_one_than_many():
    rng = np.random.default_rng(8)
    trials = made_up(rng, 4000, 0.5)
    many = calibrate(trials, novel_share=0.5, precision=0.95).thresholds[GENUS]
    identity = trials.features[:, 0, RANK_FEATURES.index("identity")]
    # Twenty genera, the sequences of each alike.
    few = dataclasses.replace(trials, genus=np.argsort(np.argsort(identity)) // 200)
    assert calibrate(few, novel_share=0.5, precision=0.95).thresholds[GENUS] > many


def test_the_share_named_is_exceeded_as_seldom_as_it_says():
    """Genera of unequal size, each named whole or not at all, a tenth of them."""
    rng = np.random.default_rng(9)
    exceeded = 0
    for _ in range(300):
        sizes = rng.integers(1, 10, 80)
        genus = np.repeat(np.arange(80), sizes)
        order = rng.permutation(np.flatnonzero(rng.random(80)[genus] < 0.1))
        if len(order):
            most = _most_named(np.ones(len(genus)), genus, order)
            alone = 1 / len(genus) + 1.64 * np.sqrt(_variance(genus, order[:1]))
            assert most[0] == pytest.approx(alone)
            assert (most >= np.arange(1, len(order) + 1) / len(genus)).all()
            assert most[-1] == pytest.approx(
                len(order) / len(genus) + 1.64 * np.sqrt(_variance(genus, order))
            )
        exceeded += not len(order) or most[-1] < 0.1
    assert exceeded <= 0.12 * 300


def _variance(genus, named):
    """Of the share named over genera: Cochran's residuals, written out."""
    sizes = np.bincount(genus)
    counts = np.bincount(genus[named], minlength=len(sizes))
    residuals = counts - counts.sum() / sizes.sum() * sizes
    return len(sizes) / (len(sizes) - 1) * (residuals**2).sum() / sizes.sum() ** 2


def test_a_threshold_needs_more_than_a_few_right_names():
    trials = made_up(np.random.default_rng(7), 60, 0.0)
    all_right = np.ones_like(trials.correct)
    few = dataclasses.replace(trials, correct=all_right, named=trials.named & False)
    few.named[:10] = True
    assert (calibrate(few, novel_share=0.0, precision=0.95).thresholds > 1).all()
    few.named[:30] = True
    assert (calibrate(few, novel_share=0.0, precision=0.95).thresholds == 0.7).all()


def test_trials_leave_out_single_records_and_whole_taxa(tmp_path):
    table = simulate(240, seed=5).filter(pc.field("dna_sequence") != "")
    rows = table.to_pylist()
    barcode = "ACGTTGCA" * 3 + "GATTACAGGCATCCA" * 8
    shared = {rank: rows[0][rank] for rank in RANKS}
    for number, species in enumerate(["Riftia a", "Riftia b"]):
        row = {**rows[0], **shared, "sequence_id": f"shared{number}", "species": species}
        rows.append({**row, "dna_sequence": barcode})
    pq.write_table(pa.Table.from_pylist(rows, table.schema), tmp_path / "reference.parquet")
    namer = Namer(load_reference(str(tmp_path / "reference.parquet")))
    trials = run_trials(namer, 1000)
    assert set(trials.left_out) >= {ALONE, *(RANKS.index(name) for name in HIGHER_SHARES)}
    for rank in range(1, GENUS + 1):
        of_rank = trials.left_out == rank
        assert (trials.novel | ~trials.known)[of_rank, rank:].all()
        assert not (trials.correct[of_rank, rank:] == 1).any()
    # Without one of two species of one barcode the other would remain, and be wrong.
    alone = trials.left_out == ALONE
    identity = trials.features[:, -1, RANK_FEATURES.index("identity")]
    assert alone.sum() == len(set(namer.reference.sequences)) - 1
    assert not (alone & (identity == 1) & (trials.correct[:, -1] == 0)).any()


@pytest.mark.parametrize("rising", [True, False])
def test_better_evidence_never_makes_a_name_less_probable(rising):
    """Not even where the few trials far from all references say the opposite by chance."""
    rng = np.random.default_rng(3)
    features = np.zeros((800, len(RANK_FEATURES)))
    place = {name: at for at, name in enumerate(RANK_FEATURES)}
    features[:, place["identity"]] = np.append(rng.uniform(0.7, 0.74, 20), rng.uniform(0.8, 1, 780))
    features[:, place["agreement"]] = rng.normal(0, 2, 800)
    features[:, place["mismatches"]] = rng.uniform(0, 5, 800)
    right = rng.random(800) < 10 * (features[:, place["identity"]] - 0.9)
    right[:20] = True
    right[20:40] = features[20:40, place["agreement"]] < 0
    model = fit_logistic(features, right if rising else ~right, np.ones(800), rising=rising)
    direction = 1 if rising else -1
    for name, values in {
        "identity": np.linspace(0.5, 1, 101),
        "agreement": np.linspace(-5, 5, 11),
        "mismatches": np.linspace(5, 0, 11),
    }.items():
        changed = np.tile(features[0], (len(values), 1))
        changed[:, place[name]] = values
        assert (direction * np.diff(model.probability(changed)) >= -1e-12).all(), name
    assert np.ptp(model.probability(features)) > 0.2


def test_the_fit_is_that_of_a_library_where_nothing_bounds_it():
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(4)
    features = np.zeros((4000, len(RANK_FEATURES)))
    identity = rng.uniform(0.6, 1, 4000)
    features[:, RANK_FEATURES.index("identity")] = identity
    features[:, RANK_FEATURES.index("log_length")] = rng.normal(2.5, 0.3, 4000)
    right = rng.random(4000) < 1 / (1 + np.exp(-8 * (identity - 0.8)))
    weights = rng.uniform(0.5, 2, 4000)
    model = fit_logistic(features, right, weights, rising=True)
    inputs = (_inputs(features) - model.mean) / model.scale
    library = LogisticRegression(C=1.0, tol=1e-8, max_iter=5000)
    library.fit(inputs, right, sample_weight=weights)
    assert (library.coef_[0, :5] >= 0).all(), "no bound is met"
    expected = library.predict_proba(inputs)[:, 1]
    assert model.probability(features) == pytest.approx(expected, abs=1e-3)


def test_the_temperature_of_heads_that_are_too_sure_is_found():
    rng = np.random.default_rng(3)
    logits = rng.normal(0, 2, (1500, 12))
    truth = np.array([rng.choice(12, p=softmax(row)) for row in logits])
    assert fit_temperature(3 * logits, truth) == pytest.approx(3, rel=0.12)
    assert fit_temperature(logits / 2, truth) == pytest.approx(0.5, rel=0.12)
    assert fit_temperature(logits, np.full(1500, -1)) == 1.0


LINEAGES = [
    ("K", "P", "C", "O", "F", "G", "G a"),
    ("K", "P", "C", "O", "F", "G", "G b"),
    ("K", "P", "C", "O", "F", "H", "H a"),
]


@pytest.fixture
def decoder():
    """Heads with one class at the high ranks, two genera and three species."""
    chains = [row[: rank + 1] for rank in range(7) for row in dict.fromkeys(LINEAGES)]
    chains = list(dict.fromkeys(chains))
    nothing = (None,) * 7
    classes = [(*chain, *nothing[len(chain) :]) for chain in chains]
    tree, leaves, _ = build_tree([*LINEAGES, *classes])
    nameless = [tree.nameless(rank) for rank in range(7)]
    return HeadDecoder(tree, nameless, leaves[3:], [1, 1, 1, 1, 1, 2, 3])


def shares(genus, species):
    return [np.ones(1)] * 5 + [np.array(genus), np.array(species)]


def test_each_head_by_itself_may_contradict_another_and_that_is_told(decoder):
    found = decoder.decide_apart(shares([0.4, 0.6], [0.5, 0.2, 0.3]))
    assert decoder.tree.names_along(found.path)[5:] == ("H", "G a")
    assert found.leaf == -1
    assert found.head[5:].tolist() == [0.6, 0.5]
    agreeing = decoder.decide_apart(shares([0.4, 0.6], [0.3, 0.2, 0.5]))
    assert decoder.tree.lineage(agreeing.leaf) == decoder.tree.names_along(agreeing.path)
    together = decoder.decide(shares([0.4, 0.6], [0.5, 0.2, 0.3]), np.zeros(0, int), None)
    assert decoder.tree.lineage(together.leaf)[5:] == ("H", "H a")


def test_a_head_without_classes_gives_no_name(decoder):
    found = decoder.decide_apart(shares([0.4, 0.6], [0.0, 0.0, 0.0]))
    assert decoder.tree.names_along(found.path)[5:] == ("H", None)


def test_a_genus_can_be_taken_from_the_heads(decoder):
    genus = decoder.tree.names[GENUS].index("G")
    left = decoder.without(shares([0.9, 0.1], [0.5, 0.4, 0.1]), GENUS, genus)
    assert left[5].tolist() == pytest.approx([0, 1])
    assert left[6].tolist() == pytest.approx([0, 0, 1])
    assert left[4].tolist() == [1]
    nodes = decoder.nodes(np.array([[0, 0, 0, 0, 0, 1, -2], [0, 0, 0, 0, 0, -1, 2]]))
    assert decoder.tree.names_along(nodes[1])[6] == "H a"
    assert nodes[0, 5:].tolist() == [decoder.tree.names[GENUS].index("H"), -2]


def test_held_out_sequences_are_kept_without_the_sequences(tmp_path):
    rng = np.random.default_rng(4)
    vectors = rng.normal(size=(5, 4)).astype(np.float32)
    lineages = [(*LINEAGES[0][:6], name) for name in ("G new", "G newer", "G a", None, "G new")]
    classes = np.array([[0, 0, 0, 0, 0, 0, 0 if name == "G a" else -1] for *_, name in lineages])
    sequences = ["ACGT" * (n + 1) for n in range(5)]
    write_heldout(tmp_path, vectors, sequences, lineages, classes)
    assert b"ACGT" not in (tmp_path / "heldout.safetensors").read_bytes()
    held = read_heldout(tmp_path)
    assert np.allclose(held.vectors, vectors, atol=2e-3)
    assert held.classes[:, :6].tolist() == [[0] * 6] * 5
    assert held.classes[:, 6].tolist() == [-2, -3, 0, -1, -2]
    assert held.length_bp.tolist() == [4, 8, 12, 16, 20]
    assert held.places(["ACGTACGT", "TTTT"]).tolist() == [1, -1]
    assert held.digests[0].tobytes() == digest("ACGT")
    assert read_heldout(tmp_path / "elsewhere") is None


@pytest.mark.skipif(not (DATA / "deepsea_12s").is_dir(), reason="the data are not here")
def test_whales_get_no_order_of_fishes(tmp_path):
    """Far from all references hits may agree well, as all are the same few sequences."""
    fishes = pq.read_table(DATA / "mitohelper_12s.parquet")
    chosen = np.random.default_rng(0).permutation(len(fishes))[:2500]
    pq.write_table(fishes.take(chosen), tmp_path / "fishes.parquet")
    with open(DATA / "deepsea_12s" / "asv_taxa_features.tsv", newline="") as file:
        rows = [row for row in csv.DictReader(file, delimiter="\t") if row["class"] == "Mammalia"]
    text = "".join(f">{row['featureid']}\n{row['dna_sequence']}\n" for row in rows)
    (tmp_path / "whales.fasta").write_text(text)
    result = run_classification_pipeline(
        str(tmp_path / "whales.fasta"), str(tmp_path / "fishes.parquet"), str(tmp_path / "out")
    )
    assert result["classified"] == len(rows) >= 10
    assert result["unplaced"] < len(rows), "some align to fishes"
    assert result["named"]["order"] == 0
