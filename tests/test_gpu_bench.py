"""The measurements for a GPU: the script works, which on a CPU is all that can be shown."""

import re

import pytest
import torch

from .conftest import ROOT, run_python

SCRIPT = ROOT / "tests" / "bench" / "gpu.py"
SMALL = "--layers 2 --hidden 64 --heads 4 --sequences 6 --training-sequences 8 --batch-size 4"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU here")
def test_without_a_gpu_nothing_is_measured():
    result = run_python(SCRIPT, check=False)
    assert result.returncode == 2
    assert result.stdout == "no CUDA GPU here: nothing is measured\n"


@pytest.mark.slow
@pytest.mark.skipif(
    torch.backends.mkldnn.is_available() and not torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    reason="this processor takes ten minutes for it in bfloat16",
)
def test_it_runs_from_end_to_end_with_a_small_model():
    text = run_python(SCRIPT, "--device", "cpu", *SMALL.split(), "--rounds", "1").stdout
    cosines = re.findall(r"^(?:bioscan|Hugging).*%\s+(\d\.\d{6})$", text, re.MULTILINE)
    assert len(cosines) >= 4  # more where sentence-transformers is installed
    assert all(float(cosine) > 0.999 for cosine in cosines)
    assert "left out: Hugging Face" not in text
    ratios = dict(re.findall(r"^ratio to (.*) (\d+\.\d+)$", text, re.MULTILINE))
    assert {"Hugging Face pipeline at its best", "Hugging Face Trainer"} <= ratios.keys()
