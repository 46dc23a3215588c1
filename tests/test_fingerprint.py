"""What tells models apart is content, never the place: on writing, on search, in LanceDB."""

import datetime
import decimal
import hashlib
import json
import shutil
from pathlib import Path

import lancedb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import EsmModel

from bioscan_xla import run_embedding_pipeline
from bioscan_xla.encode.encoder import load_encoder
from bioscan_xla.encode.fingerprint import TOKENIZER, compare, describe, hash_tensors
from bioscan_xla.encode.inference import embed_sequences
from bioscan_xla.encode.runtime import open_device
from bioscan_xla.errors import ModelError, TableError
from bioscan_xla.reads.tokens import VOCABULARY
from bioscan_xla.sample import write_model
from bioscan_xla.search import main, search_sequences
from bioscan_xla.table.embedding_function import SequenceEmbedding, _load
from bioscan_xla.table.neighbours import FINGERPRINT_KEY, open_table, read_fingerprint

OPTIONS = {"device": "cpu", "dtype": "float32"}
QUERY = "ACGTTGCATG" * 7


@pytest.fixture(autouse=True)
def forget():
    """Each test is a process of its own: no encoder is kept from the one before."""
    _load.cache_clear()
    yield
    _load.cache_clear()


@pytest.fixture
def fasta(tmp_path):
    path = tmp_path / "few.fasta"
    path.write_text("".join(f">s{n}\n{'ACGTTGCATG' * (5 + n)}\n" for n in range(6)))
    return str(path)


@pytest.fixture
def folder(model_folder, tmp_path):
    """A copy of the model that a test may change."""
    return shutil.copytree(model_folder, tmp_path / "model")


def retrain(folder):
    """Change one number of one weight: sampling some of the values would miss it."""
    path = Path(folder, "model.safetensors")
    weights = load_file(path)
    weights["esm.encoder.layer.1.output.dense.weight"][3, 7] += 0.5
    save_file(weights, path, {"format": "pt"})


def make_adapter(base, folder, seed=0):
    torch.manual_seed(seed)
    model = EsmModel.from_pretrained(base, add_pooling_layer=False)
    config = LoraConfig(r=2, target_modules=["query"], init_lora_weights=False)
    tuned = get_peft_model(model, config)
    tuned.peft_config["default"].base_model_name_or_path = str(base)
    tuned.save_pretrained(folder)
    return str(folder)


def test_every_byte_of_the_weights_counts(folder):
    cpu = open_device("cpu", "float32")
    before = load_encoder(str(folder), device=cpu).fingerprint
    retrain(folder)
    after = load_encoder(str(folder), device=cpu).fingerprint
    assert before["weights"] == after["weights"]  # the sampled hash of older tables
    assert compare(before, after).different == ("weights_sha256",)


def test_the_hash_knows_names_types_and_shapes():
    ones = torch.ones(4, 2)
    alike = {
        hash_tensors([("a", ones), ("b", ones)]),
        hash_tensors([("b", ones.clone()), ("a", ones.t().contiguous().t())]),
    }
    assert len(alike) == 1
    others = [("c", ones), ("a", ones.double()), ("a", ones.view(2, 4)), ("a", 2 * ones)]
    assert len({hash_tensors([other, ("b", ones)]) for other in others} | alike) == 5


def test_the_tokenizer_is_named_by_its_content():
    digest = hashlib.sha256("\n".join(VOCABULARY).encode()).hexdigest()
    assert (TOKENIZER, digest[:16]) == ("6-mer-4105", "610a27ecb85ca630")


def test_fingerprints_are_compared_by_what_both_know():
    old = {"model": "/a", "weights": "x", "adapter_hash": "", "version": "1.0", "dtype": "float32"}
    new = old | {"model": "/b", "weights_sha256": "f" * 64, "adapter_sha256": "", "version": "2.0"}
    new["vectors"] = "1"
    assert compare(old, new).different == ()
    assert compare(old, new).unknown == ("weights_sha256",)
    assert compare(old, new | {"weights": "y"}).different == ("weights",)
    # All bytes are known to both: what a sample of them says does not matter any more.
    assert compare(new, new | {"weights": "y"}).different == ()
    assert compare(old, new | {"vectors": "2"}).different == ("vectors",)
    # Weights are hashed as they are loaded, in the dtype of the run.
    lower = new | {"dtype": "bfloat16", "weights_sha256": "e" * 64}
    assert compare(new, lower).different == ("dtype",)
    (line,) = describe(["weights_sha256"], new, new | {"weights_sha256": "e" * 64, "model": "m"})
    assert (
        line == "  weights_sha256: the table has ffffffffffff (/b), this run has eeeeeeeeeeee (m)"
    )


def test_a_model_rewritten_in_place_is_refused(folder, fasta, tmp_path):
    db = str(tmp_path / "db")
    run_embedding_pipeline(fasta, db, model=str(folder), max_sequences=3, **OPTIONS)
    (near,) = search_sequences(db, [QUERY], k=1, device="cpu")
    retrain(folder)
    # The encoder that made the table is still in memory, and still the right one.
    assert search_sequences(db, [QUERY], k=1, device="cpu") == [near]
    _load.cache_clear()
    with pytest.raises(ModelError, match=r"weights_sha256: the table has .*, the search has"):
        search_sequences(db, [QUERY], k=1, device="cpu")
    with pytest.raises(ModelError, match="not the model that made the table"):
        lancedb.connect(db).open_table("embeddings").search(QUERY).limit(1).to_list()
    with pytest.raises(TableError, match="weights_sha256"):
        run_embedding_pipeline(fasta, db, model=str(folder), **OPTIONS)


def test_a_moved_model_is_the_same_model(folder, fasta, tmp_path, capsys):
    db = str(tmp_path / "db")
    adapter = make_adapter(folder, tmp_path / "adapter")
    run_embedding_pipeline(
        fasta, db, model=str(folder), adapter=adapter, max_sequences=3, **OPTIONS
    )
    (before,) = search_sequences(db, [QUERY], k=1, device="cpu")
    _load.cache_clear()
    folder = str(shutil.move(folder, tmp_path / "elsewhere"))
    with pytest.raises(ModelError, match=r"no longer exists.*--model FOLDER"):
        search_sequences(db, [QUERY], k=1, device="cpu")
    adapter = shutil.move(adapter, tmp_path / "there")
    with pytest.raises(ModelError, match=r"no longer exists.*--adapter FOLDER"):
        search_sequences(db, [QUERY], k=1, device="cpu", model=folder)
    places = {"model": folder, "adapter": str(adapter)}
    assert search_sequences(db, [QUERY], k=1, device="cpu", **places) == [before]
    words = ["--db", db, "--device", "cpu", "-k", "1", "--format", "json", QUERY]
    assert main([*words, "--model", folder, "--adapter", places["adapter"]]) == 0
    assert json.loads(capsys.readouterr().out) == [before]
    result = run_embedding_pipeline(fasta, db, **places, **OPTIONS)
    assert result["total_rows"] == 6
    other = make_adapter(folder, tmp_path / "other", seed=1)
    with pytest.raises(ModelError, match="adapter_sha256"):
        search_sequences(db, [QUERY], k=1, device="cpu", model=folder, adapter=other)
    with pytest.raises(ModelError, match=r"trained on the model .*no longer exists"):
        run_embedding_pipeline(fasta, db, adapter=str(adapter), **OPTIONS)


def test_a_table_of_an_older_release_is_compared_by_what_it_knows(folder, fasta, tmp_path, caplog):
    db = str(tmp_path / "db")
    run_embedding_pipeline(fasta, db, model=str(folder), max_sequences=3, **OPTIONS)
    _make_old(db)
    caplog.set_level("INFO", "bioscan_xla")
    assert run_embedding_pipeline(fasta, db, model=str(folder), **OPTIONS)["total_rows"] == 6
    assert "could not be compared: weights_sha256" in caplog.text
    assert search_sequences(db, [QUERY], k=1, device="cpu")[0]["sequence_id"] == "s2"
    assert "an older release" in caplog.text
    # What older releases told LanceDB is enough to embed a query.
    kept = read_fingerprint(open_table(db))
    keys = ("model", "revision", "adapter", "pooling", "dtype")
    old = {key: kept[key] for key in keys} | {"layer": -1, "overlap_tokens": 100, "hidden": 64}
    assert len(SequenceEmbedding.create(**old).compute_query_embeddings(QUERY)[0]) == 64
    weights = load_file(folder / "model.safetensors")
    weights["esm.embeddings.word_embeddings.weight"] *= 2
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    _load.cache_clear()
    with pytest.raises(ModelError, match="weights: the table has"):
        search_sequences(db, [QUERY], k=1, device="cpu")


def _make_old(db):
    """Write the table again with the fingerprint that releases up to 1.0 wrote."""
    table = open_table(db)
    rows = table.to_arrow()
    made_by = read_fingerprint(table)
    for key in ("weights_sha256", "adapter_sha256", "vectors"):
        made_by.pop(key)
    metadata = {FINGERPRINT_KEY: json.dumps(made_by)}
    lancedb.connect(db).create_table(
        "embeddings", rows.replace_schema_metadata(metadata), mode="overwrite"
    )


GOLDEN = Path(__file__).parent / "data" / "vectors.json"


def golden_model(folder):
    """A model whose weights depend on no library's way of drawing them."""
    write_model(folder, hidden=16, layers=2, heads=2)
    weights = {}
    for name, value in sorted(load_file(folder / "model.safetensors").items()):
        random = np.random.default_rng(list(name.encode()))
        drawn = torch.from_numpy(random.normal(0, 0.3, value.shape).astype(np.float32))
        weights[name] = drawn + 1 if name.endswith("LayerNorm.weight") else drawn
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


def golden_sequences():
    """Short ones, with N, of several windows."""
    bases = "".join(np.random.default_rng(0).choice(list("ACGT"), 9000))
    return ["ACGTAC", bases[:313], bases[:200] + "NNNNN" + bases[300:420], bases, bases[50:7000]]


@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_vectors_have_not_changed(tmp_path, pooling):
    """Where this fails, raise `VECTORS_VERSION`, and only then write other golden values.

    The model has the options of the published ones, and is read in one frame by default. The
    releases before `--frames` gave these values too.
    """
    encoder = load_encoder(
        golden_model(tmp_path), device=open_device("cpu", "float32"), pooling=pooling
    )
    assert (encoder.frames, encoder.strands, encoder.transform) == (1, "given", None)
    golden = np.array(json.loads(GOLDEN.read_text())[pooling], np.float32)
    np.testing.assert_allclose(embed_sequences(encoder, golden_sequences()), golden, atol=2e-5)


def test_any_column_can_be_written_as_json(folder, tmp_path, capsys):
    day = datetime.date(2021, 3, 4)
    sample = pa.table(
        {
            "sequence_id": ["a"],
            "dna_sequence": [QUERY],
            "taken": pa.array([day]),
            "seen": pa.array([datetime.datetime(2021, 3, 4, 5, 6)]),
            "mark": pa.array([b"\x01\xff"]),
            "price": pa.array([decimal.Decimal("1.50")]),
        }
    )
    pq.write_table(sample, tmp_path / "a.parquet")
    keep = ["taken", "seen", "mark", "price"]
    db = str(tmp_path / "db")
    path = str(tmp_path / "a.parquet")
    run_embedding_pipeline(path, db, model=str(folder), keep=keep, **OPTIONS)
    assert main(["--db", db, "--device", "cpu", "--format", "json", QUERY]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert [row[key] for key in keep] == ["2021-03-04", "2021-03-04T05:06:00", "Af8=", "1.50"]
