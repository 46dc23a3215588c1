"""One page that shows a classification: `report.html`.

Input: the classified records, what the run says of itself, and, where they are known, counts,
samples and vectors. Output: one HTML file. Invariants: the file needs no network and no other file;
numbers are packed as base64, so that 100,000 sequences stay below 6 MB.
"""

import base64
import html
import importlib.resources
import json
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..reads.lineages import RANKS, Lineage

NUM_BINS = 25
_MOST_IDS = 30_000  # beyond that the ids alone would be larger than all else
_MOST_GROUPS = 12
_UNNAMED = "no name"
NUM_NOVEL = 30


@dataclass(frozen=True)
class Sample:
    """Where and when some of the sequences come from.

    Attributes:
        name: of the sample.
        latitude: degrees north, None if unknown.
        longitude: degrees east, None if unknown.
        depth: metres below the surface, None if unknown.
        control: True for a negative control.
    """

    name: str
    latitude: float | None = None
    longitude: float | None = None
    depth: float | None = None
    control: bool = False


@dataclass(frozen=True)
class Counts:
    """Reads of each sequence in each sample, where there are any.

    Attributes:
        sample: (entries,) which sample.
        sequence: (entries,) which sequence.
        value: (entries,) reads.
    """

    sample: np.ndarray
    sequence: np.ndarray
    value: np.ndarray


@dataclass(frozen=True)
class NovelSequence:
    """A sequence that looks new, and why.

    Attributes:
        sequence_id: its id.
        says: a sentence such as "new genus in Comatulida".
        score: novelty, 0 to 1.
        evidence: a sentence on its nearest reference.
        alignment: three lines for each block: query, marks (`|` equal, `*` not), reference.
    """

    sequence_id: str
    says: str
    score: float
    evidence: str
    alignment: tuple[str, ...]


@dataclass(frozen=True)
class Results:
    """What the page shows.

    Attributes:
        title: heading.
        lede: a sentence or two under it.
        ids: (sequences,).
        lineages: (sequences,) as truncated.
        confidence: (sequences, ranks) of the best lineage, NaN where there is none.
        named: (sequences, ranks) True where the name was kept.
        identity: (sequences,) to the nearest reference, 0 to 1, NaN where nothing was found.
        novelty: (sequences,) 0 to 1.
        novel_from: novelty from which a sequence is called new.
        thresholds: for each rank the least confidence that keeps a name, None if not used.
        novel: the most novel sequences, most novel first.
        novel_note: how far such statements can be trusted here.
        methods: a paragraph for a paper.
        facts: names and values: versions, hashes, options.
        samples: in the order of `counts.sample`.
        counts: reads; None where no table was given.
        vectors: (sequences, hidden); None where the run had no model.
    """

    title: str
    lede: str
    ids: Sequence[str]
    lineages: Sequence[Lineage]
    confidence: np.ndarray
    named: np.ndarray
    identity: np.ndarray
    novelty: np.ndarray
    novel_from: float
    thresholds: Sequence[float | None]
    novel: Sequence[NovelSequence]
    novel_note: str
    methods: str
    facts: Sequence[tuple[str, str]]
    samples: Sequence[Sample] = ()
    counts: Counts | None = None
    vectors: np.ndarray | None = None


def write_report(path: str | Path, results: Results) -> None:
    """Write the page."""
    Path(path).write_text(render(results), encoding="utf-8")


def render(results: Results) -> str:
    """The page as one HTML document."""
    page = importlib.resources.files(__package__) / "page"
    # "</" would end the script element, whatever stands between quotes.
    data = json.dumps(page_data(results), ensure_ascii=False, allow_nan=False).replace("</", "<\\/")
    return string.Template((page / "page.html").read_text("utf-8")).substitute(
        title=html.escape(results.title),
        style=(page / "page.css").read_text("utf-8"),
        script=(page / "page.js").read_text("utf-8"),
        data=data,
    )


def page_data(results: Results) -> dict[str, Any]:
    """All that the page's script reads."""
    lineages, leaf = _distinct(results.lineages)
    reads = _reads(results)
    rank, groups = _groups(lineages, leaf, reads)
    has_places = any(sample.latitude is not None for sample in results.samples)
    return {
        "title": results.title,
        "lede": results.lede,
        "tiles": _tiles(results),
        "ranks": RANKS,
        "lineages": lineages,
        "leaf": _pack(leaf, np.int32),
        "groups": {"rank": RANKS[rank], "unnamed": _UNNAMED, "of_lineage": groups},
        "reads": _pack(reads, np.float32),
        "has_counts": results.counts is not None,
        "counts": _pack_counts(results.counts),
        "samples": _samples(results, [groups[number] for number in leaf]),
        "coastline": _coastline() if has_places else None,
        "ids": list(results.ids) if len(results.ids) <= _MOST_IDS else None,
        "novelty": _pack(np.round(255 * results.novelty), np.uint8),
        "novel_from": 255 * results.novel_from,
        **_projection(results.vectors, RANKS[rank]),
        "by_rank": [_rank(results, rank) for rank in range(len(RANKS))],
        "novel": [
            {
                "id": item.sequence_id,
                "says": item.says,
                "score": item.score,
                "evidence": item.evidence,
                "alignment": item.alignment,
            }
            for item in results.novel[:NUM_NOVEL]
        ],
        "novel_note": results.novel_note,
        "controls": _controls(results),
        "methods": results.methods,
        "facts": results.facts,
    }


def _pack(values: np.ndarray, kind: Any) -> str:
    little = np.asarray(values, np.dtype(kind).newbyteorder("<"))
    return base64.b64encode(np.ascontiguousarray(little).tobytes()).decode()


def _pack_counts(counts: Counts | None) -> dict[str, str] | None:
    if counts is None:
        return None
    return {
        "sample": _pack(counts.sample, np.int32),
        "sequence": _pack(counts.sequence, np.int32),
        "value": _pack(counts.value, np.float32),
    }


def _distinct(lineages: Sequence[Lineage]) -> tuple[list[Lineage], np.ndarray]:
    places: dict[Lineage, int] = {}
    numbers = [places.setdefault(tuple(lineage), len(places)) for lineage in lineages]
    return list(places), np.array(numbers, np.int32)


def _reads(results: Results) -> np.ndarray:
    """Reads of each sequence over all samples; 1 for each where there are no counts."""
    if results.counts is None:
        return np.ones(len(results.ids))
    counts = results.counts
    return np.bincount(counts.sequence, counts.value, minlength=len(results.ids))


def _tiles(results: Results) -> list[tuple[str, str, str]]:
    count = len(results.ids)
    share = results.named.mean(0) if count else np.zeros(len(RANKS))
    novel = int((results.novelty >= results.novel_from).sum())
    tiles = [("sequences", f"{count:,}", f"{len(set(results.lineages)):,} lineages")]
    for rank in ("species", "genus", "family"):
        at = RANKS.index(rank)
        taxa = len({lineage[: at + 1] for lineage in results.lineages if lineage[at]})
        tiles.append((f"named to {rank}", f"{share[at]:.0%}".replace("%", " %"), f"{taxa:,} taxa"))
    tiles.append(("look new", f"{novel:,}", "see their evidence below"))
    if results.counts is not None:
        controls = sum(sample.control for sample in results.samples)
        small = f"{results.counts.value.sum():,.0f} reads"
        tiles.append(
            (
                "samples",
                f"{len(results.samples) - controls:,}",
                small + (f", {controls} controls" if controls else ""),
            )
        )
    return tiles


def _groups(
    lineages: Sequence[Lineage], leaf: np.ndarray, reads: np.ndarray
) -> tuple[int, list[str]]:
    """What is coloured alike: the rank, and for each lineage its name there.

    The rank is phylum, or the next one below at which no single name has nine tenths of the reads.
    """
    weights = np.bincount(leaf, reads, minlength=len(lineages))
    first = RANKS.index("phylum")
    for rank in range(first, RANKS.index("family") + 1):
        names = [lineage[rank] or _UNNAMED for lineage in lineages]
        sums: dict[str, float] = {}
        for name, weight in zip(names, weights, strict=True):
            sums[name] = sums.get(name, 0.0) + float(weight)
        if max(sums.values(), default=0.0) < 0.9 * max(weights.sum(), 1e-12):
            return rank, names
    return first, [lineage[first] or _UNNAMED for lineage in lineages]


def _samples(results: Results, groups: Sequence[str]) -> list[dict[str, Any]]:
    """Each sample with its reads and its groups in one order, the most frequent of all first."""
    if results.counts is None:
        return []
    counts = results.counts
    distinct = sorted(set(groups))
    number = {name: at for at, name in enumerate(distinct)}
    of_sequence = np.array([number[name] for name in groups], np.int64)
    shape = (len(results.samples), len(distinct))
    flat = counts.sample * shape[1] + of_sequence[counts.sequence]
    sums = np.bincount(flat, counts.value, minlength=shape[0] * shape[1]).reshape(shape)
    richness = np.bincount(counts.sample, minlength=shape[0])
    order = np.argsort(-sums.sum(0), kind="stable")[:_MOST_GROUPS]
    result = []
    for at, sample in enumerate(results.samples):
        total = float(sums[at].sum())
        shares = [(distinct[g], float(sums[at, g]) / total) for g in order if sums[at, g]]
        result.append(
            {**vars(sample), "reads": total, "sequences": int(richness[at]), "groups": shares}
        )
    return result


def _coastline() -> dict[str, Any]:
    page = importlib.resources.files(__package__) / "page"
    return json.loads((page / "coastline.json").read_text("utf-8"))


def _projection(vectors: np.ndarray | None, coloured_by: str) -> dict[str, Any]:
    """The vectors in two dimensions, as numbers from 0 to 65,535."""
    if vectors is None or len(vectors) < 3:
        return {"x": None, "y": None}
    from sklearn.decomposition import PCA

    good = np.flatnonzero(np.isfinite(vectors).all(1))
    values = vectors[good].astype(np.float32)
    norms = np.linalg.norm(values, axis=1, keepdims=True)
    values = values / np.maximum(norms, 1e-12)
    size = min(50, *values.shape)
    principal = PCA(size, svd_solver="randomized", random_state=0).fit(values)
    share = principal.explained_variance_ratio_[:2].sum()
    places = principal.transform(values)
    note = f"The first two principal components; they hold {share:.0%} of the variance."
    try:
        from openTSNE import TSNE
    except ImportError:
        places = places[:, :2]
    else:
        places = np.asarray(TSNE(random_state=0, n_jobs=-1).fit(places))
        note = "t-SNE of the first 50 principal components: neighbours are kept, distances are not."
    low, high = np.percentile(places, [0.1, 99.9], axis=0)
    scaled = np.clip((places - low) / np.maximum(high - low, 1e-12), 0, 1)
    steps = np.round(65535 * scaled)
    return {
        "x": _pack(steps[:, 0], np.uint16),
        "y": _pack(steps[:, 1], np.uint16),
        "point": _pack(good, np.int32),
        "projection_note": note
        + f" Colour: {coloured_by}. Rings mark sequences that look new. Scroll or press + to zoom, "
        "drag or use the arrow keys to move, 0 to return.",
    }


def _rank(results: Results, rank: int) -> dict[str, Any]:
    """Histograms of the confidence at one rank, of names that were kept and of those cut."""
    values, kept = results.confidence[:, rank], results.named[:, rank]
    known = np.isfinite(values)
    edges = np.linspace(0, 1, NUM_BINS + 1)
    identities = results.identity[kept & np.isfinite(results.identity)]
    return {
        "name": RANKS[rank],
        "kept": np.histogram(values[known & kept], edges)[0].tolist(),
        "cut": np.histogram(values[known & ~kept], edges)[0].tolist(),
        "share": float(kept.mean()) if len(kept) else 0.0,
        "identity": float(np.median(identities)) if len(identities) else None,
        "threshold": results.thresholds[rank],
    }


def _controls(results: Results) -> dict[str, Any] | None:
    """Sequences found in negative controls, most frequent first; None where there is no control."""
    if results.counts is None or not any(sample.control for sample in results.samples):
        return None
    counts = results.counts
    in_control = np.array([sample.control for sample in results.samples])[counts.sample]
    count = len(results.ids)
    inside = np.bincount(counts.sequence[in_control], counts.value[in_control], minlength=count)
    outside = np.bincount(counts.sequence[~in_control], counts.value[~in_control], minlength=count)
    found = np.flatnonzero(inside)
    rows = [
        (
            results.ids[at],
            ", ".join(filter(None, results.lineages[at][-2:])) or "no name at these ranks",
            float(inside[at]),
            float(outside[at]),
        )
        for at in found[np.argsort(-inside[found], kind="stable")][:50]
    ]
    num_controls = sum(sample.control for sample in results.samples)
    return {
        "note": f"{len(found):,} sequences occur in {num_controls} negative controls, "
        f"{inside.sum():,.0f} reads. They are flagged and were not removed unless that was asked "
        "for; a sequence that is frequent here and rare elsewhere is likely a contaminant."
        + (" The 50 most frequent are shown." if len(found) > len(rows) else ""),
        "rows": rows,
    }


def describe_facts(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and values as text, nothing that is empty."""
    return [(name, str(value)) for name, value in facts.items() if value not in (None, "", [], {})]
