"""Importing the package is quick, and LanceDB knows its embedding function all the same."""

import inspect

import pytest

import bioscan_xla

from .conftest import run_python


def test_importing_loads_nothing_heavy():
    code = (
        "import sys, bioscan_xla, bioscan_xla.errors, bioscan_xla.options;"
        "heavy = 'torch transformers lancedb pyarrow sklearn peft ray accelerate numpy'.split();"
        "print(sorted(set(heavy) & set(sys.modules)))"
    )
    assert run_python("-c", code).stdout.strip() == "[]"


@pytest.mark.parametrize("order", ["lancedb, bioscan_xla", "bioscan_xla, lancedb"])
def test_lancedb_knows_the_embedding_function_in_either_order(order):
    code = (
        f"import {order}, sys;"
        "from lancedb.embeddings import get_registry;"
        "print(get_registry().get('bioscan_xla').__name__, 'torch' in sys.modules)"
    )
    assert run_python("-c", code).stdout.split() == ["SequenceEmbedding", "False"]


def test_public_names_are_the_real_ones():
    assert "parquet_input_path" in inspect.signature(bioscan_xla.run_embedding_pipeline).parameters
    assert "Returns:" in inspect.getdoc(bioscan_xla.run_embedding_pipeline)
    assert inspect.getdoc(bioscan_xla.run_finetuning_pipeline)
    assert list(inspect.signature(bioscan_xla.load_classifier).parameters) == [
        "folder",
        "device",
        "dtype",
        "model",
    ]
    assert set(bioscan_xla.__all__) <= set(dir(bioscan_xla))
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        bioscan_xla.absent  # noqa: B018
