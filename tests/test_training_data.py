"""Training batches: each example once, the same in every process, shapes few."""

import itertools

import numpy as np
import pytest

from bioscan_xla.encode.packing import PAD_ID
from bioscan_xla.errors import InputError
from bioscan_xla.reads.raw import ReadOptions
from bioscan_xla.reads.taxonomy import read_taxonomy
from bioscan_xla.reads.tokens import tokenize
from bioscan_xla.training.data import (
    Augmentation,
    Examples,
    make_batch,
    plan_epoch,
    read_examples,
    row_widths,
)

PLAIN = Augmentation(0.0, False, 0.0)


@pytest.fixture(scope="module")
def examples():
    rng = np.random.default_rng(0)
    sequences = ["".join(rng.choice(list("ACGT"), n)) for n in rng.integers(60, 7000, 50)]
    return Examples([f"s{n}" for n in range(50)], sequences, [(None,) * 7] * 50)


@pytest.fixture(scope="module")
def labels():
    return np.random.default_rng(1).integers(-1, 4, (50, 7))


def _make(examples, labels, width, rows, **more):
    options = {
        "kind": "cpu",
        "batch_size": 8,
        "num_devices": 1,
        "max_tokens": 1000,
        "augmentation": PLAIN,
        "seed": 0,
        "epoch": 0,
    } | more
    return make_batch(examples, labels, width, rows, **options)


def test_each_example_once_an_epoch_in_another_order(examples):
    tokens = np.diff(tokenize(examples.sequences).offsets)
    plans = [plan_epoch(tokens, 1000, 8, 0, epoch) for epoch in (0, 0, 1)]
    for plan in plans:
        assert sorted(np.concatenate([rows for _, rows in plan]).tolist()) == list(range(50))
        assert all((tokens[rows] <= width).all() or width == 1024 for width, rows in plan)
    flat = [[rows.tolist() for _, rows in plan] for plan in plans]
    assert flat[0] == flat[1] != flat[2]
    assert len({width for width, _ in plans[0]}) <= 6


def test_no_other_six_widths_waste_less():
    lengths = np.random.default_rng(2).integers(1, 400, 40)
    widths = row_widths(lengths, 1000)

    def computed(choice):
        return sum(min(width for width in choice if width >= length) for length in lengths)

    last = -(-int(lengths.max()) // 32) * 32
    others = itertools.combinations(range(32, last, 32), 5)
    assert computed(widths) == min(computed((*choice, last)) for choice in others)
    assert len(widths) <= 6
    assert row_widths(np.array([7, 9]), 1000) == [32]
    assert row_widths(np.array([5000]), 1000) == [1024]


def test_rows_hold_the_tokens_and_labels(examples, labels):
    rows = np.array([3, 9, 1])
    made = _make(examples, labels, 1024, rows)
    assert made.known.tolist() == (labels[rows] >= 0).sum(0).tolist()
    assert made.batch.input_ids.shape[0] == 1
    for _, segment, window in made.batch.places:
        row = window.owner[1]
        assert made.labels[segment].tolist() == labels[row].tolist()
        whole = tokenize([examples.sequences[row]]).values[1:]
        text, part = whole.tobytes(), window.tokens.tobytes()
        assert part in text
        assert len(window) == min(1000, len(whole) + 1)


def test_static_shapes_on_xla(examples, labels):
    made = _make(examples, labels, 256, np.array([0, 1, 2]), kind="xla", num_devices=8)
    assert made.batch.input_ids.shape == (8, 256)
    assert made.labels.shape == (8, 7)
    assert (made.labels[3:] == -1).all()
    assert (made.batch.input_ids[3:] == PAD_ID).all()


def test_processes_share_a_batch(examples, labels):
    rows = np.array([3, 9, 1, 4, 7])
    varied = Augmentation(0.5, True, 0.5)
    whole = _make(examples, labels, 1024, rows, augmentation=varied)
    parts = [
        _make(examples, labels, 1024, rows, augmentation=varied, process_index=i, process_count=6)
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


def test_taxonomy_file(tmp_path):
    path = tmp_path / "t.tsv"
    path.write_text(
        "Feature ID\tTaxon\tConfidence\n#q2:types\tcategorical\tnumeric\n"
        "a\tk__Animalia; p__Annelida\t0.9\n"
    )
    assert read_taxonomy(str(path))["a"][:3] == ("Animalia", "Annelida", None)
    path.write_text("no tab here\n")
    with pytest.raises(InputError, match="line 1 has no tab"):
        read_taxonomy(str(path))
    with pytest.raises(InputError, match="cannot be read"):
        read_taxonomy(str(tmp_path / "absent.tsv"))


def test_a_quotation_mark_in_a_name_swallows_no_line(tmp_path):
    path = tmp_path / "t.tsv"
    path.write_text('\ufeffa\tk__Animalia; s__"Osedax\nb\tk__Fungi\n', encoding="utf-8")
    found = read_taxonomy(str(path))
    assert list(found) == ["a", "b"]
    assert found["b"][0] == "Fungi"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a\tk__A\na\tk__B\n", "line 2 gives 'a' another lineage"),
        (b"\x1f\x8b\x08\x00", "is truncated.*gzip data end too early"),
        ("a\tk__A\n".encode("utf-16"), "UTF-16"),
        (b"\tk__A\n", "line 1 has no id"),
    ],
)
def test_a_broken_taxonomy_file_is_named(tmp_path, content, message):
    path = tmp_path / "t.tsv"
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"t.tsv: .*{message}"):
        read_taxonomy(str(path))
    with pytest.raises(InputError, match="cannot be read"):
        read_taxonomy(str(tmp_path))


def test_a_taxonomy_of_other_sequences_is_refused(tmp_path, caplog):
    fasta = tmp_path / "a.fasta"
    fasta.write_text("".join(f">s{n}\n{'ACGT' * 10}\n" for n in range(3)))
    table = tmp_path / "t.tsv"
    table.write_text("x\tk__Animalia\n")
    with pytest.raises(InputError, match=r"t\.tsv: contains none of the sequence ids.*'x'.*'s0'"):
        read_examples([str(fasta)], ReadOptions(), str(table))
    table.write_text("s1\tk__Animalia\n")
    examples = read_examples([str(fasta)], ReadOptions(), str(table))
    assert [lineage[0] for lineage in examples.lineages] == [None, "Animalia", None]
    assert "2 of 3 sequences are not in it" in caplog.text


def test_a_file_without_a_usable_sequence_is_named(tmp_path):
    fasta = tmp_path / "a.fasta"
    fasta.write_text(">a\nACG\n>b\nACGT\n")
    with pytest.raises(InputError, match=r"a\.fasta: no sequence can be used \(.*bp"):
        read_examples([str(fasta)], ReadOptions())
