"""The decoder against a search of all paths, and what the tree makes of lineages."""

import math

import numpy as np
import pytest

from bioscan_xla.classification.decoding import best_path, make_levels, score_paths
from bioscan_xla.classification.tree import build_tree
from bioscan_xla.reads.lineages import RANKS


def random_lineages(rng, num, width=3, unknown=0.25):
    rows = []
    for _ in range(num):
        chain, names = "", []
        for rank in RANKS:
            # One class only at the highest rank; few below, so that paths share nodes.
            choice = 0 if rank == "kingdom" else int(rng.integers(0, width))
            chain += "abc"[choice]
            names.append(None if rng.random() < unknown else f"{rank} {chain}")
        rows.append(names)
    return rows


def brute_force(tree, values):
    """Score of every path, from the definition, with loops only; None for one that ends early."""
    paths = tree.paths.tolist()

    def is_named(rank, node):
        return tree.names[rank][node] is not None

    scores = []
    for path in paths:
        score = 0.0
        known = [rank for rank in range(7) if is_named(rank, path[rank])]
        last = known[-1]
        if any(
            other[last] == path[last] and any(is_named(q, other[q]) for q in range(last + 1, 7))
            for other in paths
        ):
            scores.append(None)
            continue
        for rank in known:
            above = [q for q in known if q < rank]
            agreeing = [
                p for p in paths if all(p[q] == path[q] for q in above if is_named(q, p[q]))
            ]
            rivals = {p[rank] for p in agreeing if is_named(rank, p[rank])}
            total = sum(values[rank][n] for n in rivals)
            share = values[rank][path[rank]] / total if total else 0.0
            score += math.log(max(share, 1e-12))
        scores.append(score)
    return scores


def decode(tree, paths, values):
    levels = make_levels(paths, [tree.nameless(rank) for rank in range(7)])
    scores = [score_paths(*pair) for pair in zip(levels, values(levels), strict=True)]
    return best_path(levels, scores)


@pytest.mark.parametrize("seed", range(60))
def test_best_path_is_that_of_a_full_search(seed):
    rng = np.random.default_rng(seed)
    tree, _, _ = build_tree(random_lineages(rng, int(rng.integers(1, 25))))
    if not len(tree.paths):
        return
    # Few distinct values: many ties, and zeros.
    values = [rng.integers(0, 4, len(names)) / 4 for names in tree.names]
    best, equal = decode(
        tree,
        tree.paths,
        lambda levels: [v[level.nodes] for v, level in zip(values, levels, strict=True)],
    )
    scores = brute_force(tree, values)
    most = max(score for score in scores if score is not None)
    wanted = [at for at, score in enumerate(scores) if score is not None and score > most - 1e-9]
    assert equal.tolist() == wanted
    named = [sum(name is not None for name in tree.lineage(at)) for at in wanted]
    assert best == wanted[named.index(max(named))]


def test_some_paths_only():
    tree, leaves, _ = build_tree(
        [["K", "P", "C", "O", "F", "G", "G a"], ["K", "P", "C", "O", "F", "G", "G b"]] * 2
        + [["K", "P", "C", "O", "F", "H", None]]
    )
    assert leaves.tolist() == [0, 1, 0, 1, 2]
    values = [np.array([1.0])] * 5 + [np.array([0.4, 0.6]), np.array([1.0, 1.0])]
    assert decode(tree, tree.paths[[1, 2]], lambda _: values)[0] == 1
    assert tree.lineage(2) == ("K", "P", "C", "O", "F", "H", None)


def test_unknown_ranks_cost_nothing_and_never_beat_a_better_genus():
    tree, _, _ = build_tree(
        [["K", "P", "C", "O", "F", "G", "G a"], ["K", "P", "C", "O", "F", "H", None]]
    )

    def genus(votes):
        values = [np.array([1.0])] * 5 + [np.array(votes), np.array([0.3, 0.0])]
        return tree.lineage(decode(tree, tree.paths, lambda _: values)[0])[5]

    assert genus([0.6, 0.4]) == "G"
    assert genus([0.4, 0.6]) == "H"


def test_an_unknown_kingdom_is_no_free_pass():
    """Protists have no kingdom in many taxonomies; a weak hit among them must not win."""
    tree, leaves, _ = build_tree(
        [
            ["Metazoa", "Chordata", "C", "O", "F", "G", "G a"],
            ["Fungi", "Ascomycota", "D", "Q", "E", "H", "H a"],
            [None, "Ciliophora", "L", "M", "N", "I", "I a"],
        ]
    )
    votes = np.array([0.5, 0.3, 0.2])

    def values(levels):
        return [np.bincount(level.of_path, votes[leaves.argsort()]) for level in levels]

    assert decode(tree, tree.paths, values)[0] == leaves[0]


def test_what_lies_below_an_unknown_rank_competes_with_the_named():
    """The far hit alone knows its kingdom, phylum and class; that is no reason to take it."""
    tree, leaves, _ = build_tree(
        [
            [None, None, "Centroplasthelida", "Pterocystida", "Pterocystidae", "Pterocystis", None],
            [
                None,
                None,
                "Centroplasthelida",
                "Pterocystida",
                "Heterophryidae",
                "Sphaerastrum",
                None,
            ],
            [
                "Metazoa",
                "Porifera",
                "Calcarea",
                "Leucosolenida",
                "Leucosoleniidae",
                "Leucosolenia",
                None,
            ],
            ["Metazoa", "Porifera", None, "Homosclerophorida", "Plakinidae", "Plakina", None],
        ]
    )
    votes = np.array([0.70, 0.25, 0.03, 0.02])

    def values(levels):
        return [np.bincount(level.of_path, votes[leaves.argsort()]) for level in levels]

    assert decode(tree, tree.paths, values)[0] == leaves[0]


def test_tree_fills_gaps_keeps_homonyms_apart_and_leaves_out_the_nameless():
    rows = [
        ["Animalia", "Cnidaria", "Anthozoa", "Actiniaria", "Actiniidae", "Urticina", None],
        [None, None, None, None, "Actiniidae", "Urticina", "Urticina felina"],
        ["Animalia", "Chordata", None, None, None, "Ammonia", None],
        ["Protista", "Foraminifera", None, None, None, "Ammonia", None],
        [None, None, None, None, None, None, "uncultured eukaryote"],
    ]
    tree, leaves, conflicts = build_tree(rows)
    assert leaves[4] == -1
    assert tree.lineage(leaves[1]) == (
        "Animalia",
        "Cnidaria",
        "Anthozoa",
        "Actiniaria",
        "Actiniidae",
        "Urticina",
        "Urticina felina",
    )
    assert len({tuple(tree.lineage(leaf)) for leaf in leaves[2:4]}) == 2
    assert [conflict.name for conflict in conflicts] == ["Ammonia"]
