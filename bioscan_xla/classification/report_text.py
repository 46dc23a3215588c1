"""The sentences of the report page.

Input: an `Overview` and what the run says of itself (the contents of `run.json`). Output: plain
text. Invariants: what was not calibrated, or not measured, is not claimed.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .overview import Overview


def title_text(run: Mapping[str, Any]) -> str:
    """The names of the input."""
    inputs = run["options"]["input"]
    names = [Path(name).name for name in inputs]
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def lede_text(overview: Overview, run: Mapping[str, Any]) -> str:
    """What was named by what, and how sure the names are."""
    reference = run["reference"]
    count = overview.num_sequences
    told = f"{count:,} {'sequence' if count == 1 else 'sequences'}, named by "
    heads = run["options"]["method"] in ("heads", "argmax")
    if heads:
        told += "the heads of a fine-tuned model"
    else:
        told += f"{reference['sequences']:,} references of {_reference_name(run)}"
    if run["calibration_trials"] and not any(run["thresholds"].values()):
        told += (
            f". No confidence reached the precision of {run['options']['precision']:.0%} that was "
            "asked for, so that no name is kept."
        )
    elif run["calibration_trials"]:
        left_out = "sequences that it was not trained on" if heads else "left-out references"
        told += (
            f". Lineages are cut so that at least {run['options']['precision']:.0%} of the names "
            f"at each rank were right in a test on {run['calibration_trials']:,} {left_out}."
        )
        told += _untested_text(run)
    else:
        told += ". Confidence is not calibrated."
    return told.replace("%", " %")


def _untested_text(run: Mapping[str, Any]) -> str:
    """What the precision does not apply to."""
    told = ""
    if run.get("few_trials"):
        told += " These are few, and the precision may not hold."
    if run.get("heads_not_calibrated"):
        told += (
            " The heads took no part in that test, as too few sequences are known that they were "
            "not trained on."
        )
    if not run.get("untested_ranks"):
        return told
    return (
        f"{told} The reference has one {' and one '.join(run['untested_ranks'])}: there the "
        "precision could not be tested, and confidence rests on identity alone."
    )


def novel_note(overview: Overview, run: Mapping[str, Any]) -> str:
    """How many sequences look new, and how well that can be told."""
    trust = [
        f"{band} {value:.2f}" for band, value in run["novelty_trust"].items() if value is not None
    ]
    told = (
        " How well the novelty score tells left-out genera from known ones, by length "
        f"(1 is perfect, 0.5 is chance): {', '.join(trust)}."
        if trust
        else ""
    )
    shown = " The most novel are shown." if len(overview.novel) < overview.num_novel else ""
    score = " The number on the right is the probability that the genus is not in the reference."
    unplaced = (
        f" Sequences that align to nothing in the reference: {overview.num_unplaced:,}. They are "
        "of another marker or group, artefacts, or far from all that is known; they are not in "
        "this list."
        if overview.num_unplaced
        else ""
    )
    score = score if overview.novel else ""
    return f"Sequences that look new: {overview.num_novel:,}.{shown}{score}{unplaced}{told}"


def methods_text(run: Mapping[str, Any]) -> str:
    """A paragraph for the methods section of a paper."""
    options, reference = run["options"], run["reference"]
    thresholds = ", ".join(
        f"{rank} {'none kept' if least is None else f'{least:.2f}'}"
        for rank, least in run["thresholds"].items()
    )
    model = f" Vectors were made with {run['model']['model']}." if run.get("model") else ""
    by_heads = options["method"] in ("heads", "argmax")
    tried = (
        "sequences that the model was not trained on"
        if by_heads
        else "references that were left out, whole genera among them"
    )
    cut = (
        f"Lineages were cut at the confidence that gave a precision of {options['precision']:.0%} "
        f"on {run['calibration_trials']:,} {tried} (least confidence by rank: {thresholds}), "
        f"expecting {options['novel_share']:.0%} of the sequences to be of genera absent from the "
        f"reference.{_untested_text(run)}"
        if run["calibration_trials"]
        else f"Confidence was not calibrated. Least confidence by rank: {thresholds}."
    )
    against, aligned = "", ""
    if reference["sequences"]:
        against = (
            f" against {_reference_name(run)} ({reference['sequences']:,} sequences; SHA-256 "
            f"{reference['content_hash'][:16]})"
        )
        aligned = (
            f" Up to {options['num_candidates']} candidates by each way were aligned with free end "
            "gaps; identity is the share of matching columns without end gaps, and an alignment "
            f"that covers less than {options['min_coverage']:.0%} of the shorter sequence was not "
            "used as evidence."
        )
    how = run["method"].split(": ", 1)[-1]
    return (
        f"Sequences were classified with {run['program']}{against}. "
        f"{how[:1].upper()}{how[1:]}.{model}{aligned} {cut}"
    ).replace("%", " %")


def facts(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and values, nothing that is empty."""
    reference = run["reference"]
    told = {
        "program": run["program"],
        "command": run.get("command"),
        "reference": _reference_name(run),
        "reference SHA-256": reference["content_hash"],
        "references left out": reference["left_out"] or None,
        "model": (run.get("model") or {}).get("model"),
        "rejected": ", ".join(f"{why}: {n:,}" for why, n in run["rejected"].items()),
        "versions": ", ".join(f"{name} {value}" for name, value in run["versions"].items()),
    }
    return [(name, str(value)) for name, value in told.items() if value]


def _reference_name(run: Mapping[str, Any]) -> str:
    reference = run["reference"]
    return " ".join(filter(None, (reference["name"], reference["version"])))
