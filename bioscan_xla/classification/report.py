"""One page that shows a classification: `report.html`.

Input: an `Overview` of the rows and what the run says of itself (the contents of `run.json`).
Output: one HTML file. Invariants: the file needs no network and no other file; numbers are packed
as base64, so that 100,000 sequences stay below 6 MB.
"""

import base64
import html
import importlib.resources
import json
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..reads.lineages import RANKS, Lineage
from .overview import Overview

_MOST_IDS = 30_000  # beyond that the ids alone would be larger than all else
_MOST_GROUPS = 12
_UNNAMED = "no name"


def write_report(path: str | Path, overview: Overview, run: Mapping[str, Any]) -> None:
    """Write the page; `run` is what run.json holds."""
    Path(path).write_text(render(overview, run), encoding="utf-8")


def render(overview: Overview, run: Mapping[str, Any]) -> str:
    """The page as one HTML document."""
    page = importlib.resources.files(__package__) / "page"
    data = page_data(overview, run)
    # "</" would end the script element, whatever stands between quotes.
    text = json.dumps(data, ensure_ascii=False, allow_nan=False).replace("</", "<\\/")
    return string.Template((page / "page.html").read_text("utf-8")).substitute(
        title=html.escape(data["title"]),
        style=(page / "page.css").read_text("utf-8"),
        script=(page / "page.js").read_text("utf-8"),
        data=text,
    )


def page_data(overview: Overview, run: Mapping[str, Any]) -> dict[str, Any]:
    """All that the page's script reads."""
    lineages = list(overview.lineages)
    reads = np.array(overview.reads, float)
    rank, groups = _groups(lineages, reads)
    has_places = any(sample.latitude is not None for sample in overview.samples)
    return {
        "title": _title(run),
        "lede": _lede(overview, run),
        "tiles": _tiles(overview),
        "ranks": RANKS,
        "lineages": lineages,
        "reads": reads.tolist(),
        "sequences": overview.sequences,
        "groups": {"rank": RANKS[rank], "unnamed": _UNNAMED, "of_lineage": groups},
        "counts": _counts(overview),
        "samples": _samples(overview, groups),
        "coastline": _coastline() if has_places else None,
        **_points(overview, RANKS[rank]),
        "by_rank": [_rank(overview, run, rank) for rank in range(len(RANKS))],
        "novel": [vars(item) for item in overview.novel],
        "novel_note": _novel_note(overview, run),
        "controls": _controls(overview, run),
        "methods": methods_text(run),
        "facts": _facts(run),
    }


def _pack(values: Any, kind: Any) -> str:
    little = np.asarray(values, np.dtype(kind).newbyteorder("<"))
    return base64.b64encode(np.ascontiguousarray(little).tobytes()).decode()


def _title(run: Mapping[str, Any]) -> str:
    inputs = run["options"]["input"]
    names = [Path(name).name for name in inputs]
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _reference_name(run: Mapping[str, Any]) -> str:
    reference = run["reference"]
    return " ".join(filter(None, (reference["name"], reference["version"])))


def _lede(overview: Overview, run: Mapping[str, Any]) -> str:
    reference = run["reference"]
    return (
        f"{overview.num_sequences:,} sequences, named by the {reference['sequences']:,} references "
        f"of {_reference_name(run)}. Lineages are cut so that about "
        f"{run['options']['precision']:.0%} of the names were right in a test on "
        f"{run['calibration_trials']:,} left-out references."
    ).replace("%", " %")


def _tiles(overview: Overview) -> list[tuple[str, str, str]]:
    count = overview.num_sequences
    tiles = [("sequences", f"{count:,}", f"{len(overview.lineages):,} lineages")]
    for rank in ("species", "genus", "family"):
        at = RANKS.index(rank)
        share = overview.num_named[at] / max(1, count)
        taxa = len(overview.num_taxa[at])
        tiles.append((f"named to {rank}", f"{100 * share:.0f} %", f"{taxa:,} taxa"))
    unplaced = f"without any reference: {overview.num_unplaced:,}" if overview.num_unplaced else ""
    tiles.append(("look new", f"{overview.num_novel:,}", unplaced))
    if overview.samples:
        controls = sum(sample.is_control for sample in overview.samples)
        small = f"{sum(overview.reads):,.0f} reads" + (
            f", controls: {controls}" if controls else ""
        )
        tiles.append(("samples", f"{len(overview.samples) - controls:,}", small))
    return tiles


def _groups(lineages: Sequence[Lineage], reads: np.ndarray) -> tuple[int, list[str]]:
    """What is coloured alike: the rank, and for each lineage its name there.

    The rank is phylum, or the next one below at which no single name has nine tenths of the reads.
    """
    first = RANKS.index("phylum")
    for rank in range(first, RANKS.index("family") + 1):
        names = [lineage[rank] or _UNNAMED for lineage in lineages]
        sums: dict[str, float] = {}
        for name, weight in zip(names, reads.tolist(), strict=True):
            sums[name] = sums.get(name, 0.0) + weight
        if max(sums.values(), default=0.0) < 0.9 * max(reads.sum(), 1e-12):
            return rank, names
    return first, [lineage[first] or _UNNAMED for lineage in lineages]


def _counts(overview: Overview) -> dict[str, str] | None:
    if not overview.samples:
        return None
    keys = np.array(list(overview.by_sample), np.int64).reshape(-1, 2)
    values = np.array(list(overview.by_sample.values()), float).reshape(-1, 2)
    return {
        "sample": _pack(keys[:, 0], np.int32),
        "lineage": _pack(keys[:, 1], np.int32),
        "reads": _pack(values[:, 0], np.float32),
        "sequences": _pack(values[:, 1], np.int32),
    }


def _samples(overview: Overview, groups: Sequence[str]) -> list[dict[str, Any]]:
    """Each sample with its reads and its groups in one order, the most frequent of all first."""
    distinct = sorted(set(groups))
    number = {name: at for at, name in enumerate(distinct)}
    sums = np.zeros((len(overview.samples), len(distinct)))
    richness = np.zeros(len(overview.samples), np.int64)
    for (column, lineage), (reads, sequences) in overview.by_sample.items():
        sums[column, number[groups[lineage]]] += reads
        richness[column] += sequences
    order = np.argsort(-sums.sum(0), kind="stable")[:_MOST_GROUPS]
    result = []
    for at, sample in enumerate(overview.samples):
        total = float(sums[at].sum())
        shares = [(distinct[g], float(sums[at, g]) / total) for g in order if sums[at, g]]
        result.append(
            {
                "name": sample.name,
                "latitude": sample.latitude,
                "longitude": sample.longitude,
                "depth": sample.min_depth_m,
                "control": sample.is_control,
                "reads": total,
                "sequences": int(richness[at]),
                "groups": shares,
            }
        )
    return result


def _coastline() -> dict[str, Any]:
    page = importlib.resources.files(__package__) / "page"
    return json.loads((page / "coastline.json").read_text("utf-8"))


def _points(overview: Overview, coloured_by: str) -> dict[str, Any]:
    """The vectors in two dimensions, as numbers from 0 to 65,535."""
    points = overview.points
    if len(points.ids) < 3:
        return {"x": None}
    places, note = project(np.stack(points.vectors).astype(np.float32))
    low, high = np.percentile(places, [0.1, 99.9], axis=0)
    steps = np.round(65535 * np.clip((places - low) / np.maximum(high - low, 1e-12), 0, 1))
    part = ""
    if len(points.ids) < overview.num_sequences:
        part = f" A random {len(points.ids):,} of {overview.num_sequences:,} sequences are drawn."
    return {
        "x": _pack(steps[:, 0], np.uint16),
        "y": _pack(steps[:, 1], np.uint16),
        "leaf": _pack(points.lineage, np.int32),
        "new": _pack(points.is_novel, np.uint8),
        "ids": points.ids if len(points.ids) <= _MOST_IDS else None,
        "projection_note": f"{note} Colour: {coloured_by}. Rings mark sequences that look new."
        f"{part} Scroll or press + to zoom, drag or use the arrow keys to move, 0 to return.",
    }


def project(vectors: np.ndarray) -> tuple[np.ndarray, str]:
    """Vectors (points, hidden) to places (points, 2), and what was done, in a sentence.

    t-SNE of 50 principal components where openTSNE is installed, else two principal components.
    """
    from sklearn.decomposition import PCA

    values = np.nan_to_num(vectors)
    values = values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)
    principal = PCA(min(50, *values.shape), svd_solver="randomized", random_state=0)
    places = principal.fit_transform(values)
    try:
        from openTSNE import TSNE
    except ImportError:
        share = np.nan_to_num(principal.explained_variance_ratio_[:2].sum())
        note = f"The first two principal components, with {100 * share:.0f} % of the variance."
        return places[:, :2], note
    places = np.asarray(TSNE(random_state=0, n_jobs=-1).fit(places))
    return places, "t-SNE of 50 principal components: it keeps neighbours, not distances."


def _rank(overview: Overview, run: Mapping[str, Any], rank: int) -> dict[str, Any]:
    steps = overview.identities[rank]
    middle = None
    if steps.sum():
        middle = float(np.searchsorted(steps.cumsum(), steps.sum() / 2)) / (len(steps) - 1)
    return {
        "name": RANKS[rank],
        "kept": overview.kept[rank].tolist(),
        "cut": overview.cut[rank].tolist(),
        "share": float(overview.num_named[rank] / max(1, overview.num_sequences)),
        "identity": middle,
        "threshold": min(1.0, run["thresholds"][RANKS[rank]]),
    }


def _novel_note(overview: Overview, run: Mapping[str, Any]) -> str:
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
    unplaced = (
        f" Sequences that align to nothing in the reference: {overview.num_unplaced:,}. They are "
        "of another marker or group, artefacts, or far from all that is known; they are not in "
        "this list."
        if overview.num_unplaced
        else ""
    )
    return f"Sequences that look new: {overview.num_novel:,}.{shown}{unplaced}{told}"


def _controls(overview: Overview, run: Mapping[str, Any]) -> dict[str, Any] | None:
    """Sequences in negative controls; None where there is no control."""
    if run.get("controls") is None or not run["controls"]["samples"]:
        return None
    count = run["controls"]["samples"]
    if run["controls"]["removed"]:
        removed = "1 negative control was" if count == 1 else f"{count} negative controls were"
        return {"note": f"{removed} removed, as asked.", "rows": []}
    more = " The most frequent are shown." if overview.num_in_controls > 50 else ""
    return {
        "note": f"Sequences found in negative controls: {overview.num_in_controls:,}. Controls are "
        "flagged and were not removed. A sequence that is frequent here and rare elsewhere is "
        f"likely a contaminant.{more}",
        "rows": overview.controls,
    }


def methods_text(run: Mapping[str, Any]) -> str:
    """A paragraph for the methods section of a paper."""
    options, reference = run["options"], run["reference"]
    thresholds = ", ".join(f"{rank} {value:.2f}" for rank, value in run["thresholds"].items())
    model = f" Vectors were made with {run['model']['model']}." if run.get("model") else ""
    cut = (
        f"the confidence that gave a precision of {options['precision']:.0%} on "
        f"{run['calibration_trials']:,} references that were left out, whole genera among them"
        if run["calibration_trials"]
        else "the confidence that was asked for"
    )
    return (
        f"Sequences were classified with {run['program']} against "
        f"{_reference_name(run)} ({reference['sequences']:,} sequences; SHA-256 "
        f"{reference['content_hash'][:16]}). {run['method'].split(': ', 1)[-1].capitalize()}."
        f"{model} Up to {options['num_candidates']} candidates by each way were aligned with free "
        "end gaps; identity is the share of matching columns without end gaps, and an alignment "
        f"that covers less than {options['min_coverage']:.0%} of the shorter sequence was not used "
        f"as evidence. Lineages were cut at {cut} (least confidence by rank: {thresholds}), "
        f"expecting {options['novel_share']:.0%} of the sequences to be of genera absent from the "
        "reference."
    ).replace("%", " %")


def _facts(run: Mapping[str, Any]) -> list[tuple[str, str]]:
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
