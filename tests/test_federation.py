"""Models of several sites: what they agree on, the mean and what it equals, who is left out."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from bioscan_xla.classify import main as classify
from bioscan_xla.embed import main as embed
from bioscan_xla.encode.architecture import write_model
from bioscan_xla.encode.runtime import open_device
from bioscan_xla.errors import BioscanError, ConfigError, InputError, ModelError
from bioscan_xla.federate import main
from bioscan_xla.federation.agreement import unite, write_site_labels
from bioscan_xla.federation.averaging import class_weights
from bioscan_xla.federation.merging import merge
from bioscan_xla.federation.site import train_site
from bioscan_xla.options import (
    FinetuneConfig,
    LabelUnionConfig,
    MergeConfig,
    SiteConfig,
    SiteLabelsConfig,
)
from bioscan_xla.reads.labels import LabelSpace, join_labels, learn_labels
from bioscan_xla.reads.lineages import RANKS
from bioscan_xla.sample import simulate
from bioscan_xla.training.classifier import load_classifier
from bioscan_xla.training.loop import Loop
from bioscan_xla.training.run import finetune

from .conftest import ROOT

GENUS = RANKS.index("genus")
ONE_STEP = {
    "optimizer": "sgd",
    "learning_rate": 0.5,
    "weight_decay": 0.0,
    "dropout": 0.0,
    "max_grad_norm": 1e9,
    "frame_shift": False,
    "eval_fraction": 0.0,
    "min_sequences": 1,
    "batch_size": 1000,
    "num_epochs": 1,
    "device": "cpu",
    "dtype": "float32",
    "freeze_a": True,
    "rank": 4,
    "alpha": 8,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model of one layer."""
    folder = tmp_path_factory.mktemp("base")
    write_model(folder, hidden=32, layers=1, heads=2)
    return str(folder)


@pytest.fixture(scope="module")
def records():
    """Sequences of one length, so that an epoch can be one batch, of eight species."""
    rows = [row for row in simulate(400).to_pylist() if len(row["dna_sequence"]) >= 600]
    names = sorted({row["species"] for row in rows})[:8]
    return [
        row | {"dna_sequence": row["dna_sequence"][:300]} for row in rows if row["species"] in names
    ]


def write(path, rows):
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


@pytest.fixture(scope="module")
def steps(base, records, tmp_path_factory):
    """Three sites of unequal size after one step each; the last lacks two species."""
    folder = tmp_path_factory.mktemp("steps")
    names = sorted({row["species"] for row in records})
    parts = [records[0::5], records[1::5] + records[2::5]]
    parts.append([row for row in records[3::5] if row["species"] not in names[:2]])
    assert all({row["species"] for row in part} == {*names} for part in parts[:2])
    files = [write(folder / f"{n}.parquet", part) for n, part in enumerate(parts)]
    for n, path in enumerate(files):
        write_site_labels(SiteLabelsConfig(train=path, output=str(folder / f"{n}.json")))
    union = str(folder / "union.json")
    unite(LabelUnionConfig(sites=[str(folder / f"{n}.json") for n in (2, 0, 1)], output=union))
    common = ONE_STEP | {"labels": union, "model": base}
    for n, path in enumerate(files):
        train_site(SiteConfig(train=path, output=str(folder / f"site{n}"), site=f"s{n}", **common))
    return folder, files, common, names[:2]


def trained(folder):
    adapter = load_file(Path(folder, "adapter/adapter_model.safetensors"))
    return adapter | load_file(Path(folder, "heads.safetensors"))


def central(files, output, common):
    finetune(FinetuneConfig(train=files, output=str(output), **common))
    return trained(output)


def merged(folder, sites, output, **options):
    used, left_out = merge(
        MergeConfig(
            sites=[str(folder / name) for name in sites],
            output=str(output),
            labels=str(folder / "union.json"),
            model=options.pop("model", None)
            or json.loads((folder / "site0/adapter/adapter_config.json").read_text())[
                "base_model_name_or_path"
            ],
            **options,
        )
    )
    return used, left_out


def test_one_step_at_each_site_is_one_central_step(steps, tmp_path):
    """All classes at both sites: every tensor equals that of one step over all sequences."""
    folder, files, common, _ = steps
    merged(folder, ["site0", "site1"], tmp_path / "merged")
    ours = trained(tmp_path / "merged")
    theirs = central(files[:2], tmp_path / "central", common)
    start = trained(folder / "site0")
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, atol=1e-6, rtol=0)
    moved = [name for name in theirs if (theirs[name] - start[name]).abs().max() > 1e-4]
    assert len(moved) > 10  # and the sites alone are elsewhere


def test_a_class_that_a_site_lacks_is_a_step_of_the_sites_that_have_it(steps, tmp_path):
    folder, files, common, lacking = steps
    merged(folder, ["site2", "site0", "site1"], tmp_path / "merged")
    ours = trained(tmp_path / "merged")
    of_all = central(files, tmp_path / "all", common)
    of_owners = central(files[:2], tmp_path / "owners", common)
    space = LabelSpace.load(folder / "union.json")
    sites = [json.loads((folder / f"site{n}/trained.json").read_text()) for n in range(3)]
    apart = 0
    for name, value in of_all.items():
        if ".2." not in name:
            torch.testing.assert_close(ours[name], value, atol=1e-6, rtol=0)
            continue
        rank = RANKS.index(name.split(".")[0])
        for number in range(space.num_classes[rank]):
            everywhere = all(site["classes"][rank][number] for site in sites)
            wanted = value if everywhere else of_owners[name]
            torch.testing.assert_close(ours[name][number], wanted[number], atol=1e-6, rtol=0)
            apart += not everywhere and (value - wanted)[number].abs().max() > 1e-5
    assert apart >= 2 * len(lacking)


def test_the_order_of_the_sites_does_not_matter(steps, tmp_path):
    folder, *_ = steps
    for order in ("012", "201"):
        merged(folder, [f"site{n}" for n in order], tmp_path / order)
    for path in (tmp_path / "012").rglob("*"):
        if path.is_file():
            assert (
                path.read_bytes()
                == (tmp_path / "201" / path.relative_to(tmp_path / "012")).read_bytes()
            )


def delta(folder):
    """The product of each adapted layer, scaled."""
    raw = json.loads(Path(folder, "adapter/adapter_config.json").read_text())
    tensors = load_file(Path(folder, "adapter/adapter_model.safetensors"))
    return {
        name: raw["lora_alpha"]
        / raw["r"]
        * tensors[name.replace("lora_A", "lora_B")]
        @ tensors[name]
        for name in tensors
        if "lora_A" in name
    }


def test_stacked_adapters_are_the_mean_of_the_products(steps, base, records, tmp_path):
    """Also where A differs, which the plain mean refuses."""
    _, files, common, _ = steps
    for seed in (1, 2):
        options = common | {"seed": seed, "freeze_a": False}
        train_site(
            SiteConfig(
                train=files[seed - 1], output=str(tmp_path / f"{seed}"), site=f"{seed}", **options
            )
        )
    sites = [str(tmp_path / "1"), str(tmp_path / "2" / "share")]
    with pytest.raises(ModelError, match=r"A is not the same at all sites: '1' | '2'"):
        merge(MergeConfig(sites=sites, output=str(tmp_path / "mean"), model=base))
    assert not (tmp_path / "mean").exists()
    used, _ = merge(
        MergeConfig(sites=sites, output=str(tmp_path / "stack"), model=base, stack=True)
    )
    total = sum(site.sequences for site in used)
    parts = [delta(path) for path in sites]
    for name, product in delta(tmp_path / "stack").items():
        wanted = sum(
            site.sequences / total * part[name] for site, part in zip(used, parts, strict=True)
        )
        torch.testing.assert_close(product, wanted, atol=1e-7, rtol=1e-5)
        assert product.abs().max() > 1e-6
    device = open_device("cpu", "float32")
    classifier = load_classifier(tmp_path / "stack", device)
    assert classifier.encoder.peft_config["default"].r == 8
    # And it can be gone on from, with the rank it has.
    more = {k: v for k, v in common.items() if k not in ("rank", "alpha", "labels")}
    train_site(
        SiteConfig(
            train=files[0],
            start=str(tmp_path / "stack"),
            output=str(tmp_path / "on"),
            site="1",
            **more,
        )
    )
    assert json.loads((tmp_path / "on/share/trained.json").read_text())["epochs"] == 2


def spoil(source, target, change):
    """A copy of a site with one thing changed."""
    shutil.copytree(source / "share", target)
    change(target)
    return str(target)


def with_json(name, **values):
    def change(folder):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def with_tensor(file, pick, make):
    def change(folder):
        tensors = load_file(folder / file)
        name = next(n for n in tensors if pick in n)
        tensors[name] = make(tensors[name])
        save_file(tensors, folder / file)

    return change


def without(name):
    return lambda folder: (folder / name).unlink()


def pickled(folder):
    torch.save({"x": torch.zeros(1)}, folder / "heads.safetensors")


def other_labels(folder):
    space = LabelSpace.load(folder / "labels.json")
    LabelSpace(space.lineages, tuple(tuple(n + 1 for n in each) for each in space.counts)).save(
        folder / "labels.json"
    )


HEADS = "heads.safetensors"
ADAPTER = "adapter/adapter_model.safetensors"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (without("trained.json"), "has no trained.json; its training did not end"),
        (with_tensor(HEADS, "genus.2.weight", lambda t: t * float("nan")), "is not finite"),
        (with_tensor(ADAPTER, "lora_B", lambda t: t + float("inf")), "is not finite"),
        (with_tensor(HEADS, "genus.2.bias", lambda t: t[1:].clone()), "genus.2.bias is of shape"),
        (with_tensor(ADAPTER, "lora_B", lambda t: t[1:].clone()), "most sites in shapes"),
        (with_tensor(HEADS, "genus.2.bias", lambda t: t.double()), "not float32"),
        (with_json("trained.json", base_hash="f" * 64), "most sites in base model"),
        (with_json("trained.json", start_hash="f" * 64), "most sites in start"),
        (with_json("trained.json", sequences=-5), "'-5' is not a count"),
        (with_json("trained.json", sequences=float("nan")), "'nan' is not a count"),
        (with_json("trained.json", sequences=3), "more names of kingdom than its 3"),
        (with_json("trained.json", classes=[[1]] * 7), "do not fit its label space"),
        (with_json("trained.json", site="a\nb"), "is not the name of a site"),
        (with_json("adapter/adapter_config.json", use_rslora=True), "most sites in adapter"),
        (other_labels, "not that of --labels"),
        (pickled, "its header is truncated or damaged"),
    ],
)
def test_a_site_that_cannot_be_used_is_left_out_with_its_reason(steps, tmp_path, change, reason):
    folder, *_ = steps
    bad = spoil(folder / "site2", tmp_path / "bad<b>", change)
    used, left_out = merged(folder, ["site0", "site1", bad], tmp_path / "merged")
    assert [site.name for site in used] == ["s0", "s1"]
    assert reason in left_out[0].reason
    card = (tmp_path / "merged/README.md").read_text()
    assert "| s0 |" in card
    assert "<b>" not in card
    told = json.loads((tmp_path / "merged/sites.json").read_text())
    assert reason in told["left_out"][0]["reason"]
    with pytest.raises(BioscanError, match=r"no site|no majority"):
        merged(folder, [bad] if "most" not in reason else ["site0", bad], tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_site_that_cannot_be_used_is_named_and_one_that_is_not_there_is_an_error(steps, tmp_path):
    folder, *_ = steps
    broken = {}
    for name, change in (("oslo", without("heads.safetensors")), ("lima", without("trained.json"))):
        (tmp_path / name).mkdir()
        broken[name] = spoil(folder / "site2", tmp_path / name / "share", change)
    _, left_out = merged(folder, ["site0", "site1", *broken.values()], tmp_path / "merged")
    assert [site.name for site in left_out] == ["lima", "s2"]  # what it sent, else its folder
    with pytest.raises(ConfigError, match="site9: no such folder"):
        merged(folder, ["site0", "site9"], tmp_path / "x")


def test_a_site_counts_once_and_no_model_is_overwritten(steps, tmp_path):
    folder, *_ = steps
    copy = spoil(folder / "site0", tmp_path / "copy", lambda _: None)
    with pytest.raises(ConfigError, match="both of the site 's0'"):
        merged(folder, ["site0", copy], tmp_path / "x")
    with pytest.raises(ConfigError, match="given twice"):
        merged(folder, ["site0", "site1/../site0"], tmp_path / "x")
    (tmp_path / "x").mkdir()
    with pytest.raises(ConfigError, match="exists"):
        merged(folder, ["site0", "site1"], tmp_path / "x")


def test_what_leaves_a_site(steps, records):
    folder, *_ = steps
    share = folder / "site0/share"
    files = [path for path in share.rglob("*") if path.is_file()]
    assert {path.name for path in files} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "reading.json",
        "heads.safetensors",
        "labels.json",
        "trained.json",
    }
    content = b"".join(path.read_bytes() for path in files)
    assert str(folder).encode() not in content
    assert not any(row["sequence_id"].encode() in content for row in records)
    assert not any(row["dna_sequence"][:20].encode() in content for row in records)


def test_sites_whose_hardware_takes_another_type_are_averaged(steps, tmp_path):
    """Their default types differ; the base model and A are the same nevertheless."""
    _, files, common, _ = steps
    for number, dtype in enumerate(("float32", "bfloat16")):
        options = common | {"dtype": dtype, "site": dtype, "output": str(tmp_path / dtype)}
        train_site(SiteConfig(train=files[number], **options))
    sites = [str(tmp_path / "float32"), str(tmp_path / "bfloat16")]
    used, left_out = merge(
        MergeConfig(sites=sites, output=str(tmp_path / "mean"), model=common["model"])
    )
    assert ([site.name for site in used], left_out) == (["bfloat16", "float32"], [])


def test_a_site_that_was_stopped_goes_on_as_if_it_had_not_been(steps, tmp_path, monkeypatch):
    """The merged model is a start, too: what a resumed run shares is the same to the last bit."""
    folder, files, common, _ = steps
    merged(folder, ["site0", "site1"], tmp_path / "r1")
    options = {k: v for k, v in common.items() if k != "labels"}
    options |= {"start": str(tmp_path / "r1"), "num_epochs": 2, "batch_size": 8, "site": "s0"}
    options |= {"optimizer": "adamw", "learning_rate": 1e-3, "dropout": 0.1}
    train_site(SiteConfig(train=files[0], output=str(tmp_path / "whole"), **options))
    end = Loop.end_epoch

    def kill(loop):
        end(loop)
        raise KeyboardInterrupt

    monkeypatch.setattr(Loop, "end_epoch", kill)
    config = SiteConfig(train=files[0], output=str(tmp_path / "killed"), **options)
    with pytest.raises(KeyboardInterrupt):
        train_site(config)
    assert not (tmp_path / "killed/share").exists()
    monkeypatch.undo()
    train_site(config)
    for name in (HEADS, ADAPTER, "trained.json"):
        ours, theirs = (tmp_path / run / "share" / name for run in ("killed", "whole"))
        assert ours.read_bytes() == theirs.read_bytes(), name


def test_a_round_draws_anew_and_its_options_must_fit(steps, tmp_path, base):
    folder, files, common, _ = steps
    merged(folder, ["site0", "site1", "site2"], tmp_path / "r1")
    start = {k: v for k, v in common.items() if k != "labels"} | {"start": str(tmp_path / "r1")}
    with pytest.raises(ConfigError, match="trained with rank 4, and this run asks for 5"):
        finetune(FinetuneConfig(train=files[0], output=str(tmp_path / "a"), **start | {"rank": 5}))
    other = tmp_path / "other"
    write_model(other, hidden=32, layers=1, heads=2, seed=9)
    with pytest.raises(ModelError, match="base model with other weights"):
        finetune(
            FinetuneConfig(
                train=files[0], output=str(tmp_path / "b"), **start | {"model": str(other)}
            )
        )
    theirs = str(tmp_path / "theirs.json")
    write_site_labels(SiteLabelsConfig(train=files[2], output=theirs))
    with pytest.raises(ConfigError, match="differ; a model can only go on with its own classes"):
        finetune(
            FinetuneConfig(train=files[0], output=str(tmp_path / "c"), **start | {"labels": theirs})
        )


def test_the_guide(tmp_path, monkeypatch, capsys):
    """Every command of docs/federation.md in its order, on sites with species of their own."""
    monkeypatch.chdir(tmp_path)
    table = simulate(120)
    for number, name in enumerate(("norway", "chile", "japan")):
        own = [row for row in range(len(table)) if row % 24 % 3 == number]
        pq.write_table(table.take(own), f"{name}.parquet")
    commands = re.findall(
        r"^python -m bioscan_xla\.federate (.*)$",
        (ROOT / "docs/federation.md").read_text(),
        re.MULTILINE,
    )
    assert len(commands) == 12
    for command in commands:
        words = command.split()
        assert main([*words, "--device", "cpu"] if words[0] == "train" else words) == 0, command
    assert "chile: " in capsys.readouterr().out
    merged = load_classifier("round-1", open_device("cpu", "float32"))
    assert merged.labels == LabelSpace.load("union.json")
    assert load_classifier("round-2", open_device("cpu", "float32")).labels == merged.labels
    vectors = ["--input", "norway.parquet", "--db", "v.db", "--device", "cpu"]
    assert embed([*vectors, "--adapter", "round-1"]) == 0
    named = ["--input", "chile.parquet", "--output", "named", "--method", "argmax"]
    assert classify([*named, "--model", "round-1", "--device", "cpu"]) == 0


def lineage(text):
    names = [name or None for name in text.split(";")]
    return tuple(names + [None] * (7 - len(names)))


def test_the_union_is_the_label_space_of_all_sequences():
    rows = [tuple(row[rank] for rank in RANKS) for row in simulate(200).to_pylist()]
    sites = [learn_labels(rows[n::3])[0] for n in range(3)]
    for order in (sites, sites[::-1]):
        assert join_labels(order, 9) == learn_labels(rows, 9)
    # A class that is rare at each site and not in all counts.
    few = [learn_labels([lineage("A;B")])[0]] * 2
    assert join_labels(few, 2)[0].counts[:2] == ((2,), (2,))


def test_contradictions_between_sites_are_told_with_their_sites(tmp_path, capsys):
    spaces = {"a": ["A;B;;O;F;G"], "b": ["A;C;;P;H;G"], "c": ["A;;;O;F;G"]}
    for name, rows in spaces.items():
        learn_labels([lineage(row) for row in rows])[0].save(tmp_path / f"{name}.json")
    files = [str(tmp_path / f"{name}.json") for name in "cab"]
    texts = []
    for order in (files, files[::-1]):
        assert (
            main(
                ["labels", "union", *order, "--output", str(tmp_path / "u"), "--min-sequences", "1"]
            )
            == 0
        )
        texts.append(capsys.readouterr().out + (tmp_path / "u").read_text())
    assert texts[0] == texts[1]
    a, b, c = sorted(files)
    assert f"genus 'G': A;B;?;O;F ({a}, {c}) | A;C;?;P;H ({b})" in texts[0]
    with pytest.raises(ConfigError, match="given twice"):
        unite(LabelUnionConfig(sites=[a, a], output=str(tmp_path / "v")))
    (tmp_path / "bad.json").write_text((tmp_path / "a.json").read_text().replace('"G"', "7"))
    with pytest.raises(InputError, match="not a label space"):
        unite(LabelUnionConfig(sites=[a, str(tmp_path / "bad.json")], output=str(tmp_path / "v")))


def test_classes_of_no_site_are_averaged_over_all():
    by_class, known = class_weights(np.array([[2, 0, 0], [0, 3, 0]]), np.array([5, 5]))
    assert by_class.tolist() == [[2, 0, 2], [0, 3, 3]]
    assert known.tolist() == [2, 3]
    assert class_weights(np.zeros((2, 1), int), np.array([4, 5]))[1].tolist() == [4, 5]
