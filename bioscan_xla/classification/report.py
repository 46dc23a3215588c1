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
from .report_text import facts, lede_text, methods_text, novel_note, title_text

_MOST_IDS = 30_000  # beyond that the ids alone would be larger than all else
_MOST_GROUPS = 12
_UNNAMED = "no name"
_OTHER = "other"


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
        "title": title_text(run),
        "lede": lede_text(overview, run),
        "tiles": _tiles(overview),
        "ranks": RANKS,
        "lineages": lineages,
        "reads": reads.tolist(),
        "sequences": overview.sequences,
        "groups": {
            "rank": RANKS[rank],
            "unnamed": _UNNAMED,
            "other": _OTHER,
            "of_lineage": groups,
        },
        "counts": _counts(overview),
        "samples": _samples(overview, groups),
        "coastline": _coastline() if has_places else None,
        **_points(overview, RANKS[rank]),
        "by_rank": [_rank(overview, run, rank) for rank in range(len(RANKS))],
        "novel": [vars(item) for item in overview.novel],
        "novel_note": novel_note(overview, run),
        "controls": _controls(overview, run),
        "methods": methods_text(run),
        "facts": facts(run),
    }


def _pack(values: Any, kind: Any) -> str:
    little = np.asarray(values, np.dtype(kind).newbyteorder("<"))
    return base64.b64encode(np.ascontiguousarray(little).tobytes()).decode()


def _tiles(overview: Overview) -> list[tuple[str, str, str]]:
    count = overview.num_sequences
    tiles = [("sequences", f"{count:,}", _several(len(overview.lineages), "lineage"))]
    for rank in ("species", "genus", "family"):
        at = RANKS.index(rank)
        share = overview.num_named[at] / max(1, count)
        taxa = len(overview.num_taxa[at])
        word = "taxon" if taxa == 1 else "taxa"
        tiles.append((f"named to {rank}", f"{100 * share:.0f} %", f"{taxa:,} {word}"))
    unplaced = f"without evidence: {overview.num_unplaced:,}" if overview.num_unplaced else ""
    tiles.append(("look new", f"{overview.num_novel:,}", unplaced))
    if overview.samples:
        controls = sum(sample.is_control for sample in overview.samples)
        small = f"{sum(overview.reads):,.0f} reads" + (
            f", controls: {controls}" if controls else ""
        )
        tiles.append(("samples", f"{len(overview.samples) - controls:,}", small))
    return tiles


def _several(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


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
        rest = 1 - sum(share for _, share in shares)
        if shares and rest > 1e-6:
            shares.append((_OTHER, rest))
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
        "threshold": run["thresholds"][RANKS[rank]],
    }


def _controls(overview: Overview, run: Mapping[str, Any]) -> dict[str, Any] | None:
    """Sequences in negative controls; None where there is no control."""
    if run.get("controls") is None or not run["controls"]["samples"]:
        return None
    count = run["controls"]["samples"]
    told = "Controls are flagged and were not removed."
    if run["controls"]["removed"]:
        were = "1 negative control was" if count == 1 else f"{count} negative controls were"
        told = f"{were} removed, as asked; their reads count nowhere else."
    more = " The most frequent are shown." if overview.num_in_controls > 50 else ""
    return {
        "note": f"Sequences found in negative controls: {overview.num_in_controls:,}. {told} A "
        f"sequence that is frequent here and rare elsewhere is likely a contaminant.{more}",
        "rows": overview.controls,
    }
