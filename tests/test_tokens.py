"""Token ids equal those of the Hugging Face tokenizer, whatever the text."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bioscan_xla.reads.tokens import CLS_ID, VOCABULARY, load_tokenizer, save_tokenizer, tokenize

PUBLISHED = Path(__file__).parents[2] / "shared" / "nt_v1_tokenizer"

dna = st.text(alphabet="ACGT", max_size=60)
messy = st.text(alphabet="ACGTACGTACGTNacgtnURYKM-* \n\t", max_size=60)
strange = st.lists(
    st.sampled_from(["ACGTAC", "A", "N", "n", "<mask>", "<cls>", "<pad>", "<unk>", "<", "é", "Ω"]),
    max_size=12,
).map("".join)


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer()


def _one_by_one(tokenizer, sequences):
    return [tokenizer(sequence)["input_ids"] for sequence in sequences]


def _as_lists(tokens):
    return [part.tolist() for part in tokens]


def test_vocabulary():
    assert len(VOCABULARY) == len(set(VOCABULARY)) == 4105
    assert VOCABULARY[:6] == ("<unk>", "<pad>", "<mask>", "<cls>", "AAAAAA", "AAAAAT")
    assert VOCABULARY[-5:] == ("A", "T", "C", "G", "N")


@settings(max_examples=500, deadline=None)
@given(st.lists(st.one_of(dna, messy, strange), min_size=5, max_size=12))
def test_same_ids_as_hugging_face(tokenizer, sequences):
    assert _as_lists(tokenize(sequences)) == _one_by_one(tokenizer, sequences)


@pytest.mark.parametrize("rest", range(6))
def test_trailing_bases_are_single_tokens(tokenizer, rest):
    sequences = ["", "ACGTAC" * 3 + "ACGTA"[:rest], "N" * rest, "NACGTACGTAN" + "T" * rest]
    tokens = tokenize(sequences)
    assert _as_lists(tokens) == _one_by_one(tokenizer, sequences)
    assert len(list(tokens)[1]) == 1 + 3 + rest


def test_lengths_around_the_block_size():
    rng = np.random.default_rng(0)
    letters = np.array(list("ACGTN"))
    sequences = ["".join(rng.choice(letters, n % 40)) for n in range(600)]
    together = _as_lists(tokenize(sequences))
    assert together == [_as_lists(tokenize([sequence]))[0] for sequence in sequences]


def test_no_sequence_at_all():
    tokens = tokenize([])
    assert len(tokens) == 0
    assert list(tokens) == []


def test_model_folder_loads_as_usual(tmp_path):
    from transformers import AutoTokenizer

    save_tokenizer(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded("ACGTACGTACGTN")["input_ids"] == tokenize(["ACGTACGTACGTN"]).values.tolist()
    assert loaded.pad_token_id == 1
    assert loaded.mask_token_id == 2
    assert loaded.eos_token_id is None
    assert loaded.cls_token_id == CLS_ID


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published tokenizer files are not here")
def test_same_ids_as_the_published_tokenizer():
    published = load_tokenizer(PUBLISHED)
    rng = np.random.default_rng(1)
    letters = np.array(list("ACGTACGTACGTNacR- "))
    sequences = ["".join(rng.choice(letters, n)) for n in rng.integers(0, 300, 300)]
    sequences += [
        "".join(kmer) for kmer in itertools.islice(itertools.product("ACGT", repeat=6), 500)
    ]
    assert _as_lists(tokenize(sequences)) == _one_by_one(published, sequences)
