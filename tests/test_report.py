"""The report page: what it says, and what a browser shows of it."""

import dataclasses
import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from bioscan_xla.classification.report import (
    Counts,
    NovelSequence,
    Results,
    Sample,
    page_data,
    render,
    write_report,
)
from bioscan_xla.reads.lineages import RANKS

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FISH = ("Animalia", "Chordata", "Actinopteri", "Gadiformes", "Gadidae", "Gadus", "Gadus morhua")
WORM = ("Animalia", "Annelida", "Polychaeta", "Sabellida", "Siboglinidae", None, None)
LINEAGES = [FISH, WORM, (*FISH[:5], None, None), (None,) * 7]


def results(copies=5, **changes):
    lineages = LINEAGES * copies
    count = len(lineages)
    random = np.random.default_rng(0)
    named = np.array([[name is not None for name in lineage] for lineage in lineages])
    named = named.reshape(count, len(RANKS)).astype(bool)
    confidence = np.where(named, random.uniform(0.5, 1, named.shape), np.nan)
    made = Results(
        title="Cruise 7",
        lede="A few sequences.",
        ids=[f"ASV{number}" for number in range(count)],
        lineages=lineages,
        confidence=confidence,
        named=named,
        identity=np.full(count, 0.97),
        novelty=np.linspace(0, 1, count),
        novel_from=0.9,
        thresholds=[0.5] * 7,
        novel=[
            NovelSequence(
                "ASV19", "new genus in Gadidae", 0.99, "Nearest: X.", ("AC-", "|*-", "AG-")
            )
        ],
        novel_note="Weak below 300 bp.",
        methods="Sequences were classified.",
        facts=[("reference", "fishes")],
        samples=[Sample("dive", 44.5, -125.0, 1500.0), Sample("blank", control=True)],
        counts=Counts(np.array([0, 0, 1]), np.array([0, 1, 1]), np.array([30.0, 10.0, 2.0])),
        vectors=random.normal(size=(count, 8)),
    )
    return dataclasses.replace(made, **changes)


def test_samples_share_and_controls():
    data = page_data(results())
    dive, blank = data["samples"]
    assert dive["reads"] == 40
    assert dict(dive["groups"]) == {"Chordata": 0.75, "Annelida": 0.25}
    assert blank["control"]
    assert data["controls"]["rows"] == [("ASV1", "no name at these ranks", 2.0, 10.0)]


def test_where_one_phylum_has_nearly_all_a_lower_rank_is_coloured():
    assert page_data(results())["groups"]["rank"] == "phylum"
    whale = (*FISH[:2], "Mammalia", "Artiodactyla", None, None, None)
    fishes = results(5, lineages=[FISH, FISH, whale, FISH] * 5, counts=None, samples=())
    assert page_data(fishes)["groups"]["rank"] == "class"


def test_histograms_count_each_named_sequence_once():
    data = page_data(results())
    for rank, line in enumerate(data["by_rank"]):
        assert line["name"] == RANKS[rank]
        assert sum(line["kept"]) == results().named[:, rank].sum()


def test_a_name_cannot_leave_its_place():
    bad = "</script><script>alert(1)</script>"
    page = render(results(title=bad, ids=[bad] * 20))
    assert bad not in page
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page)
    assert json.loads(data)["title"] == bad


def test_a_hundred_thousand_sequences_stay_small(tmp_path):
    write_report(tmp_path / "report.html", results(25_000))
    assert (tmp_path / "report.html").stat().st_size < 6_000_000


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize("kind", ["whole", "bare", "empty"])
def test_browser_shows_it(kind, tmp_path):
    made = {
        "whole": results(),
        "bare": results(counts=None, samples=(), vectors=None, novel=()),
        "empty": results(0, counts=None, samples=(), vectors=None, novel=()),
    }[kind]
    write_report(tmp_path / "report.html", made)
    shown = subprocess.run(
        [
            CHROMIUM,
            *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
            *("--disable-background-networking", "--virtual-time-budget=3000", "--dump-dom"),
            f"--user-data-dir={tmp_path / 'profile'}",
            (tmp_path / "report.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout
    assert 'data-ready="true"' in shown, "the script broke off"
    assert '<h1 id="title">Cruise 7</h1>' in shown
    sections = set(re.findall(r'<section id="(\w+)"', shown))
    assert {"composition", "confidence", "novel", "methods"} <= sections
    assert ({"places", "vectors", "controls"} <= sections) == (kind == "whole")
    if kind != "empty":
        assert "Annelida" in shown
    if kind == "whole":
        assert len(re.findall(r'class="site', shown)) == 2, "a dot on the map, a bar at its depth"
        assert "new genus in Gadidae" in shown
        assert '<span class="x">*</span>' in shown
