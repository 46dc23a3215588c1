"""The report page: what it says, and what a browser shows of it."""

import dataclasses
import itertools
import json
import re
import shutil
import subprocess
from importlib import resources

import numpy as np
import pytest
from scipy import sparse

from bioscan_xla import classification
from bioscan_xla.classification.counts import Counts
from bioscan_xla.classification.overview import summarise
from bioscan_xla.classification.report import methods_text, page_data, render, write_report
from bioscan_xla.classification.samples import Sample
from bioscan_xla.reads.lineages import RANKS

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
TEXTS = ("ink", "soft", "faint", "accent", "warm", "bad")
FISH = ("Animalia", "Chordata", "Actinopteri", "Gadiformes", "Gadidae", "Gadus", "Gadus morhua")
WORM = ("Animalia", "Annelida", "Polychaeta", "Sabellida", "Siboglinidae", None, None)
NOTHING = (None,) * 7
LINEAGES = [FISH, WORM, (*FISH[:5], None, None), NOTHING]
SAMPLES = [
    Sample("dive", latitude=44.5, longitude=-125.0, min_depth_m=1500.0),
    Sample("blank", is_control=True),
]
COUNTS = Counts(["ASV0", "ASV1"], ["dive", "blank"], sparse.csr_matrix([[30, 0], [10, 2]]))
ROW_OF = {"ASV0": 0, "ASV1": 1}
RUN = {
    "program": "bioscan_xla 1.0",
    "command": "classify",
    "options": {
        "input": ["cruise.fasta"],
        "method": "neighbours",
        "precision": 0.95,
        "novel_share": 0.2,
        "num_candidates": 50,
        "min_coverage": 0.7,
    },
    "reference": {
        "name": "fishes",
        "version": "2026",
        "content_hash": "ab" * 32,
        "sequences": 1000,
        "left_out": 3,
    },
    "model": None,
    "method": "bioscan_xla 1.0: candidates by shared 8-mers",
    "calibration_trials": 1500,
    "thresholds": dict.fromkeys(RANKS, 0.5),
    "novelty_trust": {"0-300 bp": 0.7, "over 1500 bp": None},
    "versions": {"numpy": "2"},
    "rejected": {},
    "controls": {"samples": 1, "removed": False},
}
HIT = {
    "reference_id": "REF1",
    "lineage": "Animalia",
    "identity": 0.9,
    "query_coverage": 1.0,
    "query_start": 4,
    "reference_start": 0,
    "query_row": "AC-GT" * 20,
    "reference_row": "AGCGT" * 20,
}


def rows(copies=5, lineages=LINEAGES, **changes):
    random = np.random.default_rng(0)
    counts = {"ASV0": (30, 0), "ASV1": (10, 2)}
    for number, lineage in enumerate(lineages * copies):
        name = f"ASV{number}"
        reads, in_controls = counts.get(name, (None, None))
        yield {
            "sequence_id": name,
            "dna_sequence": "ACGT",
            "length_bp": 4,
            **dict(zip(RANKS, lineage, strict=True)),
            **{f"confidence_{r}": 0.8 for r in RANKS if r != "species"},
            "confidence_species": None,
            "novelty": number / (copies * len(lineages)),
            "novelty_rank": "genus" if number % 10 == 9 else None,
            "novelty_statement": "new genus in Gadidae" if number % 10 == 9 else None,
            "identity": 0.9,
            "num_evidence": 1,
            "hits": [HIT],
            "vector": random.normal(size=8),
            "reads": reads,
            "control_reads": in_controls,
            **changes,
        }


def whole(copies=5, **changes):
    return page_data(summarise(rows(copies, **changes), SAMPLES, COUNTS, ROW_OF), RUN)


def test_samples_share_and_controls():
    data = whole()
    dive, blank = data["samples"]
    assert dive["reads"] == 40
    assert dict(dive["groups"]) == {"Chordata": 0.75, "Annelida": 0.25}
    assert blank["control"]
    assert data["controls"]["rows"] == [("ASV1", "Sabellida, Siboglinidae", 2.0, 10.0)]
    assert sum(data["reads"]) == 40
    assert sum(data["sequences"]) == 20


def test_controls_that_were_removed_are_said_to_be():
    run = RUN | {"controls": {"samples": 1, "removed": True}}
    dives = Counts(COUNTS.ids, ["dive"], COUNTS.matrix[:, :1])
    told = page_data(summarise(rows(), SAMPLES[:1], dives, ROW_OF), run)["controls"]
    assert "1 negative control was removed" in told["note"]


def test_where_one_phylum_has_nearly_all_a_lower_rank_is_coloured():
    plain = page_data(summarise(rows()), RUN)
    assert plain["groups"]["rank"] == "phylum"
    whale = (*FISH[:2], "Mammalia", "Artiodactyla", None, None, None)
    fishes = page_data(summarise(rows(lineages=[FISH, FISH, whale, FISH])), RUN)
    assert fishes["groups"]["rank"] == "class"


def test_each_confidence_is_counted_once():
    for rank, line in enumerate(whole()["by_rank"]):
        named = sum(lineage[rank] is not None for lineage in LINEAGES) * 5
        if RANKS[rank] == "species":
            assert sum(line["kept"] + line["cut"]) == 0
            continue
        assert (sum(line["kept"]), sum(line["cut"])) == (named, 20 - named)
        assert line["share"] == named / 20
        assert line["identity"] == pytest.approx(0.9)


def test_novel_sequences_come_with_their_alignment():
    first, second = whole()["novel"]
    assert (first["sequence_id"], second["sequence_id"]) == ("ASV19", "ASV9")
    assert first["says"] == "new genus in Gadidae"
    query, marks, reference = first["alignment"][:3]
    assert query.split()[:2] == ["query", "5"]
    assert marks.strip().startswith("|*-||")
    assert reference.split()[:2] == ["reference", "1"]
    assert first["alignment"][4].split()[1] == str(5 + 64), "gaps are no bases"


def test_what_aligns_to_nothing_is_counted_and_not_called_new():
    nothing = dict(num_evidence=0, hits=[], identity=None, novelty=1.0, novelty_rank=None)
    nothing |= {f"confidence_{rank}": None for rank in RANKS}
    data = page_data(summarise(rows(1, lineages=[NOTHING], **nothing)), RUN)
    assert data["novel"] == []
    assert "Sequences that align to nothing in the reference: 1." in data["novel_note"]


def test_methods_name_reference_and_thresholds():
    text = methods_text(RUN)
    assert "fishes 2026 (1,000 sequences; SHA-256 abababab" in text
    assert "genus 0.50" in text


def test_a_name_cannot_leave_its_place():
    bad = "</script><script>alert(1)</script>"
    run = RUN | {"options": RUN["options"] | {"input": [bad]}}
    page = render(summarise(rows(1, lineages=[(bad, *FISH[1:])])), run)
    assert bad not in page
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page)
    assert json.loads(data)["lineages"][0][0] == bad


@pytest.mark.slow
def test_a_hundred_thousand_sequences_stay_small(tmp_path):
    write_report(tmp_path / "report.html", summarise(rows(26_000)), RUN)
    assert (tmp_path / "report.html").stat().st_size < 6_000_000
    data = (tmp_path / "report.html").read_text()
    assert "A random 100,000 of 104,000 sequences are drawn" in data


def luminance(colour):
    """Relative luminance, https://www.w3.org/TR/WCAG21/#dfn-relative-luminance."""
    digits = colour.lstrip("#")
    digits = "".join(d * 2 for d in digits) if len(digits) == 3 else digits
    values = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
    parts = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_text_has_the_contrast_of_wcag_aa():
    css = (resources.files(classification) / "page" / "page.css").read_text()
    schemes = [dict(re.findall(r"--([\w-]+): (#\w+)", block)) for block in css.split("}")[:2]]
    for scheme in schemes:
        pairs = [(text, back) for text in TEXTS for back in ("bg", "panel")]
        pairs.append(("on-accent", "accent"))
        ratios = {pair: contrast(*(scheme[name] for name in pair)) for pair in pairs}
        assert min(ratios.values()) >= 4.5, ratios


def browse(page, folder, *options):
    """The document as it is after its script has run."""
    return subprocess.run(
        [
            CHROMIUM,
            *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", *options),
            *("--disable-background-networking", "--virtual-time-budget=3000", "--dump-dom"),
            f"--user-data-dir={folder / 'profile'}",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_labels_of_the_map_keep_apart_in_a_narrow_window(tmp_path):
    north = [dataclasses.replace(sample, latitude=78.0) for sample in SAMPLES]
    write_report(tmp_path / "report.html", summarise(rows(), north, COUNTS, ROW_OF), RUN)
    shown = browse(tmp_path / "report.html", tmp_path, "--window-size=500,900")
    labels = re.findall(r'class="degrees" x="([-.\d]+)" y="([-.\d]+)">([^<]+)<', shown)
    assert len(labels) > 4
    for (x, y, text), (x2, y2, _) in itertools.permutations(labels, 2):
        is_beside = float(x2) >= float(x) + 6.5 * len(text) or float(x2) < float(x)
        assert is_beside or abs(float(y) - float(y2)) > 12, labels


def at_depths(depths, folder):
    """The rows of the depth profile as the browser shows them: label, y and widths of each."""
    samples = [Sample(f"s{at}", min_depth_m=depth) for at, depth in enumerate(depths)]
    reads = np.zeros((2, len(depths)), int)
    reads[0], reads[1] = 30, 10
    reads[:, -1] = 0
    counts = Counts(["ASV0", "ASV1"], [s.name for s in samples], sparse.csr_matrix(reads))
    write_report(folder / "report.html", summarise(rows(), samples, counts, ROW_OF), RUN)
    shown = browse(folder / "report.html", folder)
    (svg,) = re.findall(r'<svg id="depth".*?</svg>', shown, re.DOTALL)
    bars = []
    for label, inside in re.findall(r'<g class="site[^>]*aria-label="([^"]+)"[^>]*>(.*?)</g>', svg):
        rects = re.findall(r'y="([-.\d]+)" width="([-.\d]+)"', inside)
        bars.append((label, [float(y) for y, _ in rects], [float(width) for _, width in rects]))
    return bars, svg, shown


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_each_sample_has_its_bar_at_its_own_depth(tmp_path):
    bars, svg, shown = at_depths([3001.0, 5.0, 3000.0, 5.0], tmp_path)
    assert [label for label, _, _ in bars] == ["s1, 5 m", "s3, 5 m", "s2, 3,000 m", "s0, 3,001 m"]
    assert re.findall(r">([\d,]+ m)</text>", svg) == ["5 m", "5 m", "3,000 m", "3,001 m"]
    places = [y[0] for _, y, _ in bars if y]
    assert places == sorted(set(places)), "no two lie on each other"
    for label, _, widths in bars:
        if label.startswith("s3"):
            assert widths == []
        else:
            assert widths[0] == pytest.approx(3 * widths[1], rel=0.01)
    assert "no reads" in svg
    assert re.findall(r"</b>([^<]+)</span>", shown) == ["Chordata", "Annelida"], "the colours"


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_many_samples_are_shown_by_ranges_of_depth(tmp_path):
    bars, _, shown = at_depths([10.0 * at for at in range(100)], tmp_path)
    assert len(bars) == 20
    assert bars[1][0] == "5 samples, 50\N{EN DASH}100 m"
    assert bars[1][2][0] == pytest.approx(3 * bars[1][2][1], rel=0.01)
    assert "all samples of a range of depths" in shown


def test_groups_that_are_not_shown_are_counted_as_other():
    lineages = [("Animalia", f"Phylum{at}", *[None] * 5) for at in range(15)]
    ids = [f"ASV{at}" for at in range(15)]
    counts = Counts(ids, ["dive"], sparse.csr_matrix(np.full((15, 1), 4)))
    row_of = {name: at for at, name in enumerate(ids)}
    data = page_data(summarise(rows(1, lineages=lineages), SAMPLES[:1], counts, row_of), RUN)
    shares = dict(data["samples"][0]["groups"])
    assert shares["other"] == pytest.approx(3 / 15)
    assert sum(shares.values()) == pytest.approx(1)


def test_what_was_not_calibrated_is_not_claimed():
    run = RUN | {"calibration_trials": 0, "options": RUN["options"] | {"method": "heads"}}
    run["reference"] = RUN["reference"] | {"sequences": 0, "name": "no reference"}
    texts = methods_text(run), page_data(summarise(rows()), run)["lede"]
    for text in texts:
        assert "not calibrated" in text
        assert "precision" not in text
        assert "left" not in text
        assert "reference" not in text
    never = RUN | {"thresholds": RUN["thresholds"] | {"species": None}}
    assert "species none kept" in methods_text(never)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize("kind", ["whole", "bare", "empty"])
def test_browser_shows_it(kind, tmp_path):
    overview = {
        "whole": lambda: summarise(rows(), SAMPLES, COUNTS, ROW_OF),
        "bare": lambda: summarise(rows(vector=None, reads=None, control_reads=None)),
        "empty": lambda: summarise([]),
    }[kind]()
    run = RUN if kind == "whole" else {key: RUN[key] for key in RUN if key != "controls"}
    write_report(tmp_path / "report.html", overview, run)
    shown = browse(tmp_path / "report.html", tmp_path)
    shown = re.sub(r'<script type="application/json".*?</script>', "", shown, flags=re.DOTALL)
    assert 'data-ready="true"' in shown, "the script broke off"
    assert '<h1 id="title">cruise.fasta</h1>' in shown
    sections = set(re.findall(r'<section id="(\w+)"', shown))
    assert {"composition", "confidence", "novel", "methods"} <= sections
    assert ({"places", "vectors", "controls"} <= sections) == (kind == "whole")
    if kind != "empty":
        assert "Annelida" in shown
        assert "new genus in Gadidae" in shown
        assert '<span class="x">*</span>' in shown
    if kind == "whole":
        assert len(re.findall(r'class="site', shown)) == 2, "a dot on the map, a bar at its depth"


def test_the_first_sentence_claims_no_precision_that_nothing_reached():
    assert "at least 95 % of the names" in page_data(summarise(rows()), RUN)["lede"]
    few = page_data(summarise(rows()), RUN | {"few_trials": True})
    assert "These are few, and the precision may not hold." in few["lede"]
    never = RUN | {"thresholds": dict.fromkeys(RANKS)}
    assert "so that no name is kept" in page_data(summarise(rows()), never)["lede"]
    alone = RUN | {"untested_ranks": ["family", "genus"]}
    assert (
        "one family and one genus: there the precision could not"
        in page_data(summarise(rows()), alone)["lede"]
    )
