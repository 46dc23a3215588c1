"""Mutated files: each record is used or rejected, or the product says what is wrong."""

import pytest

from .fuzzing import KINDS, run_cases


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "yaml"])
def test_mutated_files(tmp_path, kind):
    cases = [(kind, number) for number in range(60)]
    results = list(run_cases(cases, str(tmp_path)))
    bad = [result for result in results if result[2] in ("other error", "hang", "crash")]
    assert not bad, "\n\n".join(" ".join(map(str, result)) for result in bad)
    assert len({result[2] for result in results}) > 1  # the mutations do reach something
