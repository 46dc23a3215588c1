"""The examples in the docstrings do what they show."""

import doctest
import importlib

import pytest


@pytest.mark.parametrize(
    "module",
    [
        "encode.fingerprint",
        "reads.labels",
        "reads.lineages",
        "training.batches",
        "training.folder",
        "training.metrics",
        "training.splits",
    ],
)
def test_examples(module):
    result = doctest.testmod(importlib.import_module(f"bioscan_xla.{module}"))
    assert result.attempted
    assert not result.failed
