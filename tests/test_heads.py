"""Names by the heads of a fine-tuned model, alone and with references."""

import shutil
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bioscan_xla import run_classification_pipeline, run_finetuning_pipeline
from bioscan_xla.classification import leave_out
from bioscan_xla.classification.calibration import ALONE, GENUS
from bioscan_xla.classification.evidence import RANK_FEATURES
from bioscan_xla.classification.formats import agreeing_hit
from bioscan_xla.classification.journal import read_rows
from bioscan_xla.classification.leave_out import run_trials
from bioscan_xla.classification.opening import open_namer
from bioscan_xla.classification.record import lineage_text
from bioscan_xla.classification.run import classify
from bioscan_xla.classify import summary
from bioscan_xla.errors import BioscanError, ConfigError, ModelError
from bioscan_xla.options import ClassifyConfig
from bioscan_xla.reads.labels import UNKNOWN, learn_labels
from bioscan_xla.reads.lineages import RANKS
from bioscan_xla.training.heldout import read_heldout, write_heldout


@pytest.fixture(scope="module")
def tuned(data, model_folder):
    """A fine-tuned model whose heads are the mean vectors of their classes."""
    from safetensors.numpy import save_file

    from bioscan_xla.classification.heads import load_heads
    from bioscan_xla.encode.encoder import load_encoder
    from bioscan_xla.encode.inference import embed_sequences
    from bioscan_xla.encode.runtime import open_device

    from .conftest import small_run

    folder, _ = data
    output = folder / "tuned"
    run_finetuning_pipeline(
        training_data_path=str(folder / "reference.parquet"),
        model_output_path=str(output),
        **{
            key: value
            for key, value in small_run("", str(model_folder), "").items()
            if key not in ("train", "output", "num_epochs")
        },
        num_epochs=1,
    )
    rows = pq.read_table(folder / "reference.parquet").to_pylist()
    lineages = [[row[rank] for rank in RANKS] for row in rows]
    space, _ = learn_labels(lineages)
    encoder = load_encoder(
        str(model_folder), device=open_device("cpu", "float32"), adapter=str(output)
    )
    vectors = embed_sequences(encoder, [row["dna_sequence"] for row in rows])
    centred = vectors - vectors.mean(1, keepdims=True)
    unit = centred / np.sqrt((centred**2).mean(1, keepdims=True) + 1e-5)
    middle = unit.mean(0)
    layers = {}
    for rank, (name, numbers) in enumerate(zip(RANKS, space.encode(lineages).T, strict=True)):
        means = [unit[numbers == n].mean(0) - middle for n in range(space.num_classes[rank])]
        weight = np.stack(means) * 10
        layers[f"{name}.0.weight"] = np.ones(vectors.shape[1], np.float32)
        layers[f"{name}.0.bias"] = np.zeros(vectors.shape[1], np.float32)
        layers[f"{name}.2.weight"] = weight.astype(np.float32)
        layers[f"{name}.2.bias"] = (-(weight @ middle) - (weight**2).sum(1) / 20).astype(np.float32)
    save_file(layers, output / "heads.safetensors")
    space.save(output / "labels.json")
    assert load_heads(str(output)).labels == space
    assert (output / "heldout.safetensors").is_file()  # of the few that fine-tuning held out
    sequences = [row["dna_sequence"] for row in rows]
    write_heldout(output, vectors, sequences, lineages, space.encode(lineages))
    return output


@pytest.mark.parametrize("reference", ["reference.parquet", ""])
@pytest.mark.parametrize("method", ["heads", "both"])
def test_heads_alone_and_with_references(data, tuned, tmp_path, method, reference):
    folder, queries = data
    if method == "both" and not reference:
        return
    run_classification_pipeline(
        str(folder / "asv.fasta"),
        str(folder / reference) if reference else "",
        str(tmp_path / "out"),
        model=str(tuned),
        method=method,
        num_trials=0,
        device="cpu",
        dtype="float32",
        strand="both" if reference else "plus",
    )
    known = {tuple(lineage) for _, _, lineage in queries}
    rows = {row["sequence_id"]: row for row in read_rows(tmp_path / "out")}
    right = 0
    for name, _, lineage in queries[:-1]:
        best = tuple(rows[name][f"best_{rank}"] for rank in RANKS)
        assert best in known
        right += best[5] == lineage[5]
        if method == "heads" and reference:  # they are only shown beside the name
            assert rows[name]["tied_rank"] is None
            hit = agreeing_hit(rows[name])
            kept = [rows[name][rank] for rank in RANKS]
            assert hit is None or hit["lineage"].startswith(lineage_text(kept))
    assert right >= (36 if method == "both" else 20)


@pytest.mark.parametrize("method", ["heads", "both", "argmax"])
def test_heads_are_calibrated_on_what_the_model_was_not_trained_on(data, tuned, tmp_path, method):
    folder, _ = data
    result = run_classification_pipeline(
        str(folder / "asv.fasta"),
        str(folder / "reference.parquet"),
        str(tmp_path / "out"),
        model=str(tuned),
        method=method,
        num_trials=200,
        device="cpu",
        dtype="float32",
    )
    assert not result["heads_not_calibrated"]
    assert 150 <= result["calibration_trials"] <= 200  # kingdoms and the like cannot be left out
    rows = list(read_rows(tmp_path / "out"))
    assert result["contradictions"] == sum(row["contradiction"] for row in rows)
    if method != "argmax":
        assert result["contradictions"] == 0
    for row in rows:
        confidence = [row[f"confidence_{rank}"] for rank in RANKS if row[f"best_{rank}"]]
        assert confidence == sorted(confidence, reverse=True)
        assert row["novelty"] is not None


@pytest.mark.parametrize("method", ["heads", "both"])
def test_genera_that_were_held_out_are_the_unknown_ones(
    data, tuned, tmp_path, method, caplog, monkeypatch
):
    """Retraining with held-out genera changes what calibration rests on."""
    shutil.copytree(tuned, tmp_path / "model")
    rows = pq.read_table(data[0] / "reference.parquet").to_pylist()
    lineages = [[row[rank] for rank in RANKS] for row in rows]
    genera = Counter(lineage[GENUS] for lineage in lineages)
    new = set(sorted(genera)[::2])
    assert sum(genera[name] for name in new) >= 50
    labels = learn_labels(lineages)[0].encode(lineages)
    labels[[lineage[GENUS] in new for lineage in lineages], GENUS:] = UNKNOWN
    held = read_heldout(tmp_path / "model")
    sequences = [row["dna_sequence"] for row in rows]
    vectors = held.vectors[held.places(sequences)]
    config = ClassifyConfig(
        input=str(data[0] / "asv.fasta"),
        reference=str(data[0] / "reference.parquet"),
        output="unused",
        model=str(tmp_path / "model"),
        method=method,
        device="cpu",
        dtype="float32",
    )
    told = "fine-tune with --novel-rank genus"
    run_trials(open_namer(config)[1], 100)
    assert told in caplog.text
    caplog.clear()
    write_heldout(tmp_path / "model", vectors, sequences, lineages, labels)
    _, namer = open_namer(config)
    # Those of new genera, however many, do not say how often the others are named right.
    trials = run_trials(namer, 200)
    assert "needs 100" in caplog.text
    assert trials is None or not trials.features[..., RANK_FEATURES.index("head")].any()
    caplog.clear()
    monkeypatch.setattr(leave_out, "_FEWEST_REFERENCES", 50)
    trials = run_trials(namer, 200)
    assert told not in caplog.text
    whole, alone = trials.left_out == GENUS, trials.left_out == ALONE
    assert whole.sum() >= 50
    assert alone.sum() >= 50
    assert trials.novel[whole, GENUS].all()
    assert not trials.novel[alone, GENUS].any()
    assert not (trials.correct[whole, GENUS] == 1).any()
    assert 3 <= len(set(trials.genus[whole])) <= len(new)
    # Sequences of genera that references have and heads do not are among the queries.
    of_new = np.isin(trials.genus[trials.left_out > GENUS], trials.genus[whole]).mean()
    natural = sum(genera[name] for name in new) / len(rows)
    assert of_new == pytest.approx(natural if method == "both" else 0, abs=0.1)


def test_confidence_without_the_heads_is_told_in_the_results(data, tuned, tmp_path):
    folder, _ = data
    shutil.copytree(tuned, tmp_path / "model")
    (tmp_path / "model/heldout.safetensors").unlink()
    config = ClassifyConfig(
        input=str(folder / "asv.fasta"),
        reference=str(folder / "reference.parquet"),
        output=str(tmp_path / "out"),
        model=str(tmp_path / "model"),
        method="both",
        num_trials=100,
        device="cpu",
        dtype="float32",
    )
    result = classify(config)
    assert result["heads_not_calibrated"]
    assert "calibrated without the heads" in summary(config, result)
    assert "The heads took no part in that test" in (tmp_path / "out/report.html").read_text()


def test_heads_do_not_name_with_references_what_aligns_to_none_of_them(data, tuned, tmp_path):
    folder, _ = data
    noise = np.random.default_rng(8).choice(list("ACGT"), 400)
    (tmp_path / "noise.fasta").write_text(f">noise\n{''.join(noise)}\n")
    run_classification_pipeline(
        str(tmp_path / "noise.fasta"),
        str(folder / "reference.parquet"),
        str(tmp_path / "out"),
        model=str(tuned),
        method="both",
        num_trials=0,
        device="cpu",
        dtype="float32",
    )
    (row,) = read_rows(tmp_path / "out")
    assert [row[f"best_{rank}"] for rank in RANKS] == [None] * 7


def test_a_foreign_label_space_is_refused(data, tuned, tmp_path):
    folder, _ = data
    table = pq.read_table(folder / "reference.parquet")
    for rank in RANKS[3:]:
        names = pa.array([f"Other{name.lower()}" for name in table[rank].to_pylist()])
        table = table.set_column(table.column_names.index(rank), rank, names)
    pq.write_table(table, tmp_path / "other.parquet")
    with pytest.raises(BioscanError, match="share no name with the reference") as caught:
        run_classification_pipeline(
            str(folder / "asv.fasta"),
            str(tmp_path / "other.parquet"),
            str(tmp_path / "out"),
            model=str(tuned),
            method="both",
        )
    assert "order: the model knows 'Ordera', the reference 'Otherordera'" in str(caught.value)


def test_heads_need_a_fine_tuned_model():
    with pytest.raises(ConfigError, match="needs the heads of a fine-tuned model"):
        run_classification_pipeline("x.fasta", "r.fasta", "out", method="heads")


@pytest.mark.parametrize("file", ["heads.safetensors", "labels.json", "heldout.safetensors"])
def test_a_model_changed_in_place_does_not_go_on(data, tuned, tmp_path, file):
    """Its adapter alone, and so its vectors, may be as before."""
    model = tmp_path / "model"
    shutil.copytree(tuned, model)
    options = {"model": str(model), "method": "heads", "num_trials": 0, "device": "cpu"}
    run = (str(data[0] / "asv.fasta"), "", str(tmp_path / "out"))
    run_classification_pipeline(*run, **options)
    if file == "labels.json":
        text = (model / file).read_text()
        (model / file).write_text(text.replace("Genusax", "Genusother"))
    elif file == "heads.safetensors":
        from safetensors.numpy import load_file, save_file

        save_file({k: -v for k, v in load_file(model / file).items()}, model / file)
    else:
        (model / file).unlink()
    with pytest.raises(ConfigError, match="heads: not the same"):
        run_classification_pipeline(*run, **options)


def test_another_taxonomy_and_an_unknown_strand_are_told(data, tuned, tmp_path, caplog):
    folder, _ = data
    rows = pq.read_table(folder / "reference.parquet").to_pylist()
    references = {
        "same": rows,
        "gaps": [row | {"order": None} for row in rows],
        "other": [row | {"kingdom": "Metazoa"} for row in rows],
    }
    for name, changed in references.items():
        caplog.clear()
        path = tmp_path / f"{name}.parquet"
        pq.write_table(
            pa.Table.from_pylist(changed, schema=pq.read_schema(folder / "reference.parquet")), path
        )
        options = {"model": str(tuned), "method": "both", "num_trials": 0, "device": "cpu"}
        run_classification_pipeline(
            str(folder / "asv.fasta"), str(path), str(tmp_path / name), **options
        )
        assert ("names have other ancestors in the model" in caplog.text) == (name == "other")
        assert "the strand of a sequence is not found" not in caplog.text
    assert "phylum Chordata: Animalia in the model, Metazoa in the reference" in caplog.text
    options |= {"method": "heads"}
    run_classification_pipeline(str(folder / "asv.fasta"), "", str(tmp_path / "none"), **options)
    assert "the strand of a sequence is not found" in caplog.text


@pytest.mark.parametrize("other", [{"pooling": "cls"}, {"layer": 1}, {"frames": 6}])
def test_heads_are_not_read_behind_another_pooling(tuned, other):
    from bioscan_xla.classification.opening import open_namer
    from bioscan_xla.encode.encoder import load_encoder
    from bioscan_xla.encode.runtime import open_device
    from bioscan_xla.options import ClassifyConfig

    device = open_device("cpu", "float32")
    config = ClassifyConfig(input="x.fasta", model=str(tuned), method="heads")
    open_namer(config, load_encoder(device=device, adapter=str(tuned), layer=2))  # the last
    with pytest.raises(ModelError, match=f"with {next(iter(other))} "):
        open_namer(config, load_encoder(device=device, adapter=str(tuned), **other))


@pytest.mark.parametrize("method", ["neighbours", "heads", "both"])
def test_a_vector_that_is_not_finite_ends_no_run(data, tuned, tmp_path, monkeypatch, method):
    from bioscan_xla.encode import inference

    embed = inference.embed_sequences

    def broken(encoder, sequences):
        vectors = embed(encoder, sequences)
        vectors[[text == queries[0][1] for text in sequences]] = np.nan
        return vectors

    folder, queries = data
    monkeypatch.setattr(inference, "embed_sequences", broken)
    options = {"model": str(tuned), "method": method, "num_trials": 0, "device": "cpu"}
    run = (str(folder / "asv.fasta"), str(folder / "reference.parquet"), str(tmp_path / "out"))
    result = run_classification_pipeline(*run, **options)
    assert result["classified"] == len(queries)
    rows = {row["sequence_id"]: row for row in read_rows(tmp_path / "out")}
    by_words = queries[0][2][6] if method == "neighbours" else None
    assert rows["q0"]["best_species"] == by_words
    assert rows["q2"]["best_species"] == queries[2][2][6]
