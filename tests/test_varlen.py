"""Attention over sequences of different lengths in one kernel equals the loop over them."""

import importlib.util
import sys
from types import SimpleNamespace

import pytest
import torch

from bioscan_xla.encode import attention, runtime, sending, varlen
from bioscan_xla.encode.encoder import load_encoder
from bioscan_xla.encode.inference import embed_sequences

RUNS = ((2, 30), (1, 25), (3, 7))
TOKENS, HEADS, DIM = 106, 4, 16
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")


@pytest.fixture(autouse=True)
def _nothing_has_failed(monkeypatch):
    monkeypatch.setattr(varlen, "_failed", set())


def _inputs(device="cpu", dtype=torch.float32):
    random = torch.Generator().manual_seed(0)
    made = [torch.randn(1, HEADS, TOKENS, DIM, generator=random) for _ in range(3)]
    return [x.to(device, dtype).requires_grad_() for x in made]


def _loop(inputs, scale):
    return attention._runs_attention(None, *inputs, None, runs=RUNS, scaling=scale)[0]


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_nested_tensors_give_what_the_loop_gives(scale):
    inputs = _inputs()
    given = attention._varlen_attention(None, *inputs, None, runs=RUNS, scaling=scale)[0]
    wanted = _loop(inputs, scale)
    assert not varlen._failed
    assert given.shape == wanted.shape == (1, TOKENS, HEADS, DIM)
    torch.testing.assert_close(given, wanted, atol=2e-6, rtol=0)
    weights = torch.randn(given.shape, generator=torch.Generator().manual_seed(1))
    theirs = torch.autograd.grad((given * weights).sum(), inputs)
    ours = torch.autograd.grad((wanted * weights).sum(), inputs)
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)


def test_flash_attn_is_taken_where_it_is_installed(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: name == "flash_attn" or found(name)
    )
    assert varlen.kernels(torch.bfloat16, 128) == ["flash_attn", "nested"]
    assert varlen.kernels(torch.float32, 128) == ["nested"]
    assert varlen.kernels(torch.bfloat16, 20) == ["nested"]
    seen = []

    def flash(query, key, value, starts, ends, longest, most, softmax_scale):
        seen.append((starts.tolist(), ends.tolist(), longest, most, softmax_scale))
        return query + value

    module = SimpleNamespace(flash_attn_varlen_func=flash)
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    inputs = [x.bfloat16() for x in _inputs()]
    states = attention._varlen_attention(None, *inputs, None, runs=RUNS, scaling=1.0)[0]
    torch.testing.assert_close(states[0], (inputs[0] + inputs[2])[0].transpose(0, 1))
    starts = [0, 30, 60, 85, 92, 99, 106]
    assert seen == [(starts, starts, 30, 30, 1.0)]


def test_a_kernel_that_fails_is_left_out_once_and_told(monkeypatch, caplog):
    def broken(*_):
        raise RuntimeError("no kernel image is available")

    inputs = _inputs()
    monkeypatch.setitem(varlen._KERNELS, "nested", broken)
    for _ in range(2):
        given = attention._varlen_attention(None, *inputs, None, runs=RUNS, scaling=1.0)[0]
        torch.testing.assert_close(given, _loop(inputs, 1.0))
    assert caplog.text.count("nested does not work here") == 1

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(varlen, "_failed", set())
    monkeypatch.setitem(varlen._KERNELS, "nested", full)
    with pytest.raises(torch.OutOfMemoryError):
        attention._varlen_attention(None, *inputs, None, runs=RUNS, scaling=1.0)


def test_the_model_gives_the_same_vectors(monkeypatch, model_folder, sequences, expected):
    # As on a GPU: one row of all sequences, and the kernel over it.
    monkeypatch.setattr(attention, "_runs_attention", attention._varlen_attention)
    encoder = load_encoder(model_folder, device=runtime.open_device("cpu", "float32"))
    vectors = embed_sequences(encoder, sequences[:8])
    assert abs(vectors - expected[:8]).max() < 2e-5
    assert not varlen._failed


def test_a_result_on_its_way_is_awaited():
    waited = []
    event = SimpleNamespace(synchronize=lambda: waited.append(True))
    values = runtime.fetch(sending.OnItsWay(torch.arange(3), event))
    assert values.tolist() == [0, 1, 2]
    assert waited == [True]


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_kernel_of_a_gpu_gives_what_the_loop_gives(dtype):
    inputs = _inputs("cuda", dtype)
    wanted = _loop([x.detach().cpu().float() for x in inputs], 0.25)
    names = varlen.kernels(dtype, DIM)
    rows = [x[0].transpose(0, 1) for x in inputs]
    for name in names:
        states = varlen._KERNELS[name](*rows, RUNS, 0.25)
        states.float().sum().backward()
        atol = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(states[None].detach().cpu().float(), wanted, atol=atol, rtol=0)


@pytest.mark.cuda
@needs_cuda
def test_a_gpu_copies_its_results_while_it_computes():
    device = runtime.open_device("cuda", "float32")
    given = runtime.put(device, torch.arange(6.0).view(2, 3).numpy())
    sent = sending.send_back(device, given * 2)
    assert sent.values.is_pinned()
    assert runtime.fetch(sent).tolist() == [[0, 2, 4], [6, 8, 10]]
