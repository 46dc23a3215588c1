"""Mutated files: each record is used or rejected, or the product says what is wrong."""

from .fuzzing import KINDS, run_cases


def test_mutated_files(tmp_path):
    cases = [(kind, number) for kind in KINDS for number in range(60)]
    cases += [("parquet", 492), ("parquet", 522)]  # Arrow's threads waited for ever
    results = list(run_cases(cases, str(tmp_path)))
    bad = [result for result in results if result[2] in ("other error", "hang", "crash")]
    assert not bad, "\n\n".join(" ".join(map(str, result)) for result in bad)
    for kind in KINDS:  # the mutations do reach something
        assert len({result[2] for result in results if result[0] == kind}) > 1
