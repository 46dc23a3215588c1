"""Name sequences: `python -m bioscan_xla.classify --input F --reference DB --output DIR`.

Input: a config. Output: the folder of results, and a summary. Invariants: after any interruption,
running the same command again resumes where it stopped.
"""

import shlex
import sys
from collections.abc import Sequence
from typing import Any

from .cli import check_keys, run_command
from .options import ClassifyConfig
from .reads.lineages import RANKS

_PROG = "python -m bioscan_xla.classify"


def run_classification_pipeline(
    input: str | Sequence[str], reference: str, output: str, **options: Any
) -> dict[str, Any]:
    """Name sequences.

    Args:
        input: Parquet, FASTA, FASTQ; globs, folders, URLs.
        reference: database made by embed, or labelled FASTA or Parquet.
        output: folder for the results.
        **options: any other field of `bioscan_xla.options.ClassifyConfig`.

    Returns:
        What `run.json` holds: `classified` (records), `read`, `rejected` (by reason), `named` (by
        rank), `unplaced` (without evidence), `unsure` (with no name that is sure enough), `novel`,
        `tied`, `reversed`, `contradictions`, `untested_ranks` (of which the reference has one
        taxon), `heads_not_calibrated`, `thresholds` (None where no name at a rank holds the
        precision), `novelty_trust`, `reference`, `model`, `method`, `controls` and `darwin_core`
        where counts were given, `seconds`, `interrupted`.

    Raises:
        BioscanError: a subclass; the message says what happened, where, and what to do.
    """
    from .classification.run import classify

    check_keys(ClassifyConfig, list(options), "run_classification_pipeline")
    return classify(
        ClassifyConfig(input=input, reference=reference, output=output, **options)  # type: ignore
    )


def summary(config: ClassifyConfig, result: dict[str, Any]) -> str:
    """The summary printed at the end."""
    if result["interrupted"]:
        return f"interrupted; results are kept in {config.output}. Run the same command to resume"
    total = result["classified"]
    lines = [
        f"{_count(total, 'sequence')} classified in {result['seconds']:.1f} s "
        f"{_against(result['reference'])}({result['method']})",
        "names kept: " + ", ".join(f"{rank} {result['named'][rank]:,}" for rank in RANKS),
        "least confidence: "
        + ", ".join(f"{rank} {_least(result['thresholds'][rank])}" for rank in RANKS),
    ]
    if not result["calibration_trials"]:
        lines.append("confidence is not calibrated, and novelty is not known")
    if result["heads_not_calibrated"]:
        lines.append("confidence is calibrated without the heads: too few held-out sequences")
    if result["unplaced"]:
        strand = "" if config.strand == "both" else f", or not on the {config.strand} strand"
        lines.append(
            f"without a name: {result['unplaced']:,} that align to no reference (another marker or "
            f"group than the reference's{strand})"
        )
    if result["unsure"]:
        lines.append(f"without a name: {result['unsure']:,} whose best name is not sure enough")
    told = [f"{result['tied']:,} tied with another lineage"]
    if result["calibration_trials"]:
        told.insert(0, f"{result['novel']:,} look new")
    if config.strand == "both":
        told.append(f"{result['reversed']:,} on the other strand")
    lines.append("; ".join(told))
    if result["contradictions"]:
        lines.append(
            f"{result['contradictions']:,} have names that contradict each other, those below the "
            "cut included"
        )
    if result["rejected"]:
        from .reads.cleaning import Code

        reasons = ", ".join(
            f"{Code(code).words} ({count:,})" for code, count in result["rejected"].items()
        )
        lines.append(f"rejected (see rejected.parquet): {reasons}")
    if controls := result.get("controls"):
        what = "removed" if controls["removed"] else "kept and flagged"
        lines.append(
            f"{_count(controls['samples'], 'negative control')}, {what}; "
            f"{_count(controls['sequences'], 'sequence')} found in controls, "
            f"{controls['only_there']:,} only there"
        )
    if archive := result.get("darwin_core"):
        lines.append(
            f"dwca.zip: {_count(archive['occurrences'], 'occurrence')}; left out: "
            f"{archive['of_controls']:,} from controls, {archive['without_place']:,} "
            "without position or date"
        )
    lines.append(f"results in {config.output}: report.html, classified.parquet, taxonomy.tsv ...")
    return "\n".join(lines)


def _against(reference: dict[str, Any]) -> str:
    number = reference["sequences"]
    return f"with {_count(number, 'reference')} of {reference['name']} " if number else ""


def _least(threshold: float | None) -> str:
    return "none kept" if threshold is None else f"{threshold:.2f}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    words = sys.argv[1:] if arguments is None else list(arguments)

    def work(config: ClassifyConfig) -> int:
        from .classification.run import classify

        result = classify(config, shlex.join([*_PROG.split(), *words]))
        print(summary(config, result))
        if result["interrupted"]:
            return 128 + result["interrupted"]
        return 0 if result["classified"] else 2

    return run_command(
        ClassifyConfig,
        work,
        words,
        _PROG,
        on_second_signal="stopped at once; results so far are kept. Run the same command to resume",
    )


if __name__ == "__main__":
    sys.exit(main())
