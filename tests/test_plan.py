"""The plan: what the TPU compiler makes of the very programs that a run would compile."""

import importlib.util
import json

import pytest

from bioscan_xla import plan
from bioscan_xla.encode.packing import Totals
from bioscan_xla.errors import ConfigError, DeviceError, InputError
from bioscan_xla.options import EmbedConfig, FinetuneConfig
from bioscan_xla.planning import estimate, programs
from bioscan_xla.planning.compiler import (
    GIB,
    Compiled,
    compile_for,
    find_collectives,
    find_topology,
)

needs_compiler = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("libtpu", "jax", "torch_xla")),
    reason="the TPU compiler is not installed: pip install 'bioscan_xla[plan]'",
)


def run(capsys, *words):
    """The plan as JSON."""
    status = plan.main([*words, "--json"])
    return status, json.loads(capsys.readouterr().out)


@pytest.mark.slow
@pytest.mark.xla
@needs_compiler
def test_embedding_moves_nothing_but_results(capsys, model_folder, training_sample):
    status, result = run(
        capsys, "embed", "--topology", "v5e-8", "--model", model_folder, "--input", training_sample
    )
    assert (status, result["fits"], result["cores"]) == (0, True, 8)
    assert 1 <= len(result["programs"]) <= 8
    for program in result["programs"]:
        assert program["host_transfers"] == 0
        # The vectors of all rows, float32, brought together once; no activation, no weight.
        size = 4 * 64 * program["rows"] * program["segments"]
        assert program["collectives"] == {"all-gather": [1, size]}
        assert program["flops"] > 0
        assert 0 < program["peak_share"] < 0.1
    assert result["sequences_per_hour"] < result["sequences_per_hour_bound"]


@pytest.mark.slow
@pytest.mark.xla
@needs_compiler
@pytest.mark.parametrize("topology", ["v5e-8", "v5e-16"])  # one host, and a slice of four
def test_a_training_step_reduces_its_gradients(
    capsys, model_folder, training_sample, monkeypatch, topology
):
    one = programs.plan_epoch
    monkeypatch.setattr(programs, "plan_epoch", lambda *given: one(*given)[:1])  # one width
    common = ["finetune", "--topology", topology, "--model", model_folder]
    status, result = run(capsys, *common, "--train", training_sample)
    assert status == 0
    (program,) = result["programs"]
    assert set(program["collectives"]) == {"all-reduce"}
    assert program["host_transfers"] == 0
    evaluation = result["evaluation"]
    assert evaluation["sequences"] == 6  # a tenth of the sample
    for program in evaluation["programs"]:  # vectors of all rows, brought together once
        size = 4 * 64 * program["rows"] * program["segments"]
        assert program["collectives"] == {"all-gather": [1, size]}
        assert program["host_transfers"] == 0
        assert program["peak_gib"] > program["argument_gib"]


def test_a_compiler_that_is_not_there_is_told(tmp_path, monkeypatch):
    (tmp_path / "jax.py").write_text("raise ImportError('No module named jax')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(DeviceError, match=r"not installed .*pip install 'bioscan_xla\[plan\]'"):
        compile_for(b"", find_topology("v5e-8"), 8)


def test_collectives_are_counted_by_kind_and_size():
    text = """
  %all-gather.1 = f32[64,41,2560]{2,1,0:T(8,128)} all-gather(%x), replica_groups={}
  %all-reduce-start = (bf16[8]{0}, f32[2,3]{1,0}, /*index=2*/pred[5]{0}) all-reduce-start(%a, %b)
  %fusion = f32[9]{0} fusion(%all-reduce-done)
"""
    assert find_collectives(text) == {
        "all-gather": (1, 4 * 64 * 41 * 2560),
        "all-reduce": (1, 2 * 8 + 4 * 6 + 5),
    }


def describe_finetuning(fits):
    """The text of a plan of one program that fits, or does not."""
    error = "" if fits else "RESOURCE_EXHAUSTED: Used 20G of 15G hbm"
    compiled = Compiled(1.0, peak_bytes=GIB if fits else None, flops=8e12 * fits, error=error)
    program = estimate.Program(32, 64, 1, 3, 1e12, compiled)
    totals = Totals()
    totals.useful_tokens, totals.computed_tokens = 3, 4
    summary = estimate.summarise([program], find_topology("v5e-8"), 96, totals)
    about = {"model": "m", "dtype": "bfloat16", "input": ["a.parquet"]}
    return summary, estimate.describe(about | summary | {"gradient_checkpointing": False})


def test_a_program_that_does_not_fit_has_no_figures():
    summary, text = describe_finetuning(fits=False)
    assert not summary["fits"]
    assert summary["programs"][0]["peak_gib"] is None
    assert summary["flops_over_ideal"] is summary["sequences_per_hour"] is None
    assert "NO  RESOURCE_EXHAUSTED: Used 20G" in text
    assert "take --gradient-checkpointing true" in text
    summary, text = describe_finetuning(fits=True)
    assert summary["fits"]
    assert summary["flops_over_ideal"] == pytest.approx(64)
    assert "96 sequences of a.parquet" in text


def test_a_plan_says_what_an_evaluation_needs(monkeypatch, model_folder, training_sample):
    jobs = []

    def trace(job, model, dtype, shape, **more):
        jobs.append((job, shape))
        return b""

    def compile_for(program, topology, rows, *given, **more):
        does_fit = jobs[-1][0] == "finetune"
        arguments = (3 if does_fit else 2) * GIB
        peak = (4 if does_fit else 15.5) * GIB
        return Compiled(1.0, arguments, 0, int(peak), 1e12, 1e9, {})

    monkeypatch.setattr(programs, "trace", trace)
    monkeypatch.setattr(programs, "compile_for", compile_for)
    config = FinetuneConfig(train=training_sample, model=model_folder, min_sequences=1)
    result = programs.plan_finetuning(config, find_topology("v5e-8"))
    trained = [shape for job, shape in jobs if job == "finetune"]
    assert trained[:-1] == [(p["rows"], p["tokens"], p["segments"]) for p in result["programs"]]
    assert sum(p["batches"] for p in result["programs"]) == 2  # 54 sequences, 32 a batch
    assert result["evaluation"]["programs"]
    # The optimizer's state, 1 GiB, is there too: 16.5 of 16 GiB.
    assert [p["peak_gib"] for p in result["evaluation"]["programs"]] == [16.5]
    assert not result["fits"]
    assert "an evaluation of 6 sequences" in estimate.describe(result)
    assert "does not fit" in estimate.describe(result)


def test_what_cannot_be_planned_is_told(model_folder, tmp_path, training_sample):
    topology = find_topology("v5e-8")
    options = {"model": model_folder, "input": training_sample}
    with pytest.raises(ConfigError, match="each host embeds by itself"):
        programs.plan_embedding(EmbedConfig(**options), find_topology("v5e-16"))
    with pytest.raises(ConfigError, match="overlap_tokens 999 must lie between"):
        programs.plan_embedding(EmbedConfig(**options, overlap_tokens=999), topology)
    with pytest.raises(ConfigError, match="layer 77 must lie between"):
        programs.plan_embedding(EmbedConfig(**options, layer=77), topology)
    with pytest.raises(InputError, match="no usable sequence"):
        programs.plan_embedding(EmbedConfig(**options, min_length_bp=100_000), topology)


def test_mistakes_are_told(capsys):
    with pytest.raises(ConfigError, match="v5e-8"):
        find_topology("v9")
    assert plan.main(["embed", "--topology", "v9"]) == 1
    assert "choose one of" in capsys.readouterr().err
