"""Mutated files: each record is used or rejected, or the product says what is wrong."""

from .fuzzing import KINDS, run_cases


def test_mutated_files(tmp_path):
    kinds = [kind for kind in KINDS if kind != "yaml"]
    cases = [(kind, number) for kind in kinds for number in range(60)]
    cases += [("parquet", 492), ("parquet", 522)]  # Arrow's threads waited for ever
    results = list(run_cases(cases, str(tmp_path)))
    bad = [result for result in results if result[2] in ("other error", "hang", "crash")]
    assert not bad, "\n\n".join(" ".join(map(str, result)) for result in bad)
    for kind in kinds:  # the mutations do reach something
        assert len({result[2] for result in results if result[0] == kind}) > 1
