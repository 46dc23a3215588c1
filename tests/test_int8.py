"""int8: close to float32, the same whatever the neighbours, refused where it cannot be."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import EsmModel

from bioscan_xla.embed import run_embedding_pipeline
from bioscan_xla.embedding.summary import summarise
from bioscan_xla.encode.encoder import load_encoder
from bioscan_xla.encode.inference import embed_sequences
from bioscan_xla.encode.int8 import LEAST_COSINE, _Int8Linear
from bioscan_xla.encode.runtime import open_device
from bioscan_xla.errors import ConfigError, TableError
from bioscan_xla.options import EmbedConfig, FinetuneConfig
from bioscan_xla.options.plan import PlanEmbeddingConfig
from bioscan_xla.sample import write_model
from bioscan_xla.search import search_sequences
from bioscan_xla.table.neighbours import open_table, read_fingerprint

from .conftest import cosine


@pytest.fixture(scope="module")
def int8():
    return open_device("cpu", "int8")


@pytest.fixture(scope="module")
def wider(tmp_path_factory):
    """A model as wide as the smallest real ones, where rounding errors average out."""
    folder = tmp_path_factory.mktemp("wider")
    write_model(folder, hidden=256, layers=3, heads=4)
    return folder


def in_float32(folder, sequences, **options):
    return embed_sequences(
        load_encoder(str(folder), device=open_device("cpu", "float32"), **options), sequences
    )


def change(folder, target, edit):
    """A copy of a model, edited."""
    model = EsmModel.from_pretrained(folder, add_pooling_layer=False)
    with torch.no_grad():
        edit(model.encoder.layer[1])
    model.save_pretrained(target)
    for name in ("vocab.txt", "tokenizer_config.json"):
        (target / name).write_bytes((folder / name).read_bytes())
    return target


@pytest.mark.parametrize("strands", ["given", "both"])
def test_close_to_float32_and_independent_of_neighbours(wider, sequences, int8, strands):
    encoder = load_encoder(str(wider), device=int8, sample=sequences, strands=strands)
    vectors = embed_sequences(encoder, sequences)
    assert cosine(vectors, in_float32(wider, sequences, strands=strands)).min() > LEAST_COSINE
    alone = np.concatenate([embed_sequences(encoder, [text]) for text in sequences[:6]])
    np.testing.assert_allclose(alone, vectors[:6], atol=2e-2)
    assert cosine(alone, vectors[:6]).min() > 0.99999
    assert LEAST_COSINE < float(encoder.fingerprint["int8_cosine"]) < 1


def test_channels_far_larger_than_the_rest_keep_the_others_precise(
    wider, sequences, int8, tmp_path
):
    def enlarge(layer):
        layer.LayerNorm.weight[:3] *= 14

    folder = change(wider, tmp_path, enlarge)
    vectors = embed_sequences(load_encoder(str(folder), device=int8), sequences)
    assert cosine(vectors, in_float32(folder, sequences)).min() > LEAST_COSINE


def test_sums_of_large_products_are_right(int8):
    """A processor without the instructions for it adds pairs of products in 16 bits."""
    linear = torch.nn.Linear(64, 32, bias=False)
    linear.weight.data.fill_(1.0)
    values = torch.full((32, 64), 255, dtype=torch.uint8)
    found = _Int8Linear(linear, (1.0, 0), torch.float32)(values)
    torch.testing.assert_close(found, torch.full((32, 32), 64 * 255.0), rtol=1e-3, atol=0)


def test_refused_where_the_vectors_would_turn(wider, sequences, int8, tmp_path):
    def spoil(layer):
        layer.intermediate.dense.bias[0] = 1e5  # one step of uint8 then spans all other channels
        layer.output.dense.weight[:, 0] = 0

    folder = change(wider, tmp_path, spoil)
    with pytest.raises(ConfigError, match=r"cosine of only 0.* use --dtype (bfloat16|float32)"):
        load_encoder(str(folder), device=int8)


def test_adapter_is_merged_first(wider, sequences, int8, tmp_path):
    torch.manual_seed(1)
    base = EsmModel.from_pretrained(wider, add_pooling_layer=False)
    tuned = get_peft_model(base, LoraConfig(r=4, target_modules=["query", "value"]))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    tuned.save_pretrained(tmp_path)
    expected = in_float32(wider, sequences, adapter=str(tmp_path))
    assert cosine(expected, in_float32(wider, sequences)).min() < 0.99  # the adapter matters
    encoder = load_encoder(str(wider), device=int8, adapter=str(tmp_path))
    assert cosine(embed_sequences(encoder, sequences), expected).min() > LEAST_COSINE


def test_table_resume_and_search(wider, training_sample, tmp_path):
    table = pq.read_table(training_sample)
    run = {"model": str(wider), "dtype": "int8"}
    first = run_embedding_pipeline(training_sample, str(tmp_path), max_sequences=20, **run)
    rest = run_embedding_pipeline(training_sample, str(tmp_path), **run)
    assert (first["total_rows"], rest["already_done"], rest["total_rows"]) == (20, 20, 60)
    told = summarise(EmbedConfig(input=training_sample, db=str(tmp_path)), rest | {"failure": None})
    assert "int8: the least cosine to float32 is 0.99" in told
    made_by = read_fingerprint(open_table(str(tmp_path)))
    assert made_by["dtype"] == "int8"
    assert LEAST_COSINE < float(made_by["int8_cosine"]) < 1
    with pytest.raises(TableError, match="dtype: the table has 'int8', this run has 'float32'"):
        run_embedding_pipeline(training_sample, str(tmp_path), **run | {"dtype": "float32"})
    (found,) = search_sequences(str(tmp_path), [table["dna_sequence"][7].as_py()], k=1)
    assert found["sequence_id"] == table["sequence_id"][7].as_py()
    assert found["distance"] < 1e-3


def test_what_int8_cannot_do(wider, tmp_path, int8):
    with pytest.raises(ConfigError, match="CPUs only, and the device is cuda"):
        open_device("cuda", "int8")
    with pytest.raises(ConfigError, match="without layers"):
        load_encoder(str(wider), device=int8, layer=0)
    with pytest.raises(ConfigError, match="CPUs only; plan for bfloat16"):
        PlanEmbeddingConfig(dtype="int8")
    with pytest.raises(ConfigError, match="dtype 'int8' is unknown"):
        FinetuneConfig(dtype="int8")
    assert EmbedConfig(dtype="int8").dtype == "int8"
