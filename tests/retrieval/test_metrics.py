"""The metrics against a plain evaluator that walks each ranked list, hand-made cases, properties, and errors."""

from importlib import import_module

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reid3d.retrieval import Features, Result, evaluate, search
from reid3d.retrieval.search import order_keys

DEFINITIONS = ("market", "mean")


def features(feats, pids, camids=None) -> Features:
    feats = np.asarray(feats, np.float32)
    camids = np.full(len(feats), -1) if camids is None else camids
    names = [f"{i}.jpg" for i in range(len(feats))]
    return Features(feats, np.asarray(pids, np.int64), np.asarray(camids, np.int64), names)


def angle(*degrees: float) -> np.ndarray:
    """Unit vectors of the plane: the cosine falls as the angle from 0 grows."""
    return np.stack([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))], 1)


def brute_force(q: Features, g: Features, ap: str) -> dict:
    """One query at a time, one item of the ranked list at a time, as the published evaluation codes do."""
    first, aps, inps = [], [], []
    for i in range(len(q)):
        sims = [float(np.float32(s)) for s in np.asarray(g.feats, np.float32) @ np.asarray(q.feats[i], np.float32)]
        order = sorted(range(len(g)), key=lambda j: (-sims[j], j))
        kept = []
        for j in order:
            same_camera = q.camids[i] == g.camids[j] and q.camids[i] != -1
            if g.pids[j] != -1 and not (g.pids[j] == q.pids[i] and same_camera):
                kept.append(g.pids[j] == q.pids[i])
        good = sum(kept)
        if not good:
            continue
        hits, area, before = 0, 0.0, 1.0
        for place, right in enumerate(kept, 1):
            hits += right
            precision = hits / place
            if right:
                area += precision / good if ap == "mean" else (precision + before) / 2 / good
            before = precision
        places = [place for place, right in enumerate(kept, 1) if right]
        first.append(places[0])
        aps.append(area)
        inps.append(good / places[-1])
    return {
        "cmc": [np.mean([place <= r for place in first]) for r in range(1, 51)],
        "mAP": np.mean(aps),
        "mINP": np.mean(inps),
        "valid": len(first),
        "ap": aps,
    }


def assert_agrees(result: Result, wanted: dict) -> None:
    assert result.num_valid == wanted["valid"]
    np.testing.assert_allclose(result.cmc, wanted["cmc"], atol=1e-12)
    np.testing.assert_allclose([result.mAP, result.mINP], [wanted["mAP"], wanted["mINP"]], atol=1e-12)
    np.testing.assert_allclose(result.per_query.ap[result.per_query.rank > 0], wanted["ap"], atol=1e-12)


def test_by_hand():
    """Ranked list: right, wrong, right. Trapezoids: (1+1)/2/2 + (1/2 + 2/3)/2/2; mean of precisions: (1 + 2/3)/2."""
    q, g = features(angle(0), [1]), features(angle(10, 20, 30), [1, 2, 1])
    market, mean = evaluate(q, g), evaluate(q, g, ap="mean")
    assert market.mAP == pytest.approx(0.5 + 7 / 24) and mean.mAP == pytest.approx(5 / 6)
    assert market.ap == "market" and mean.ap == "mean"
    assert market.mINP == mean.mINP == pytest.approx(2 / 3)
    assert market.cmc.shape == (50,) and (market.cmc == 1).all()
    assert market.per_query.rank.tolist() == [1]


def test_a_first_match_in_second_place():
    """Wrong, right: the trapezoid from precision 0 to 1/2 is 1/4, the precision at the match 1/2."""
    q, g = features(angle(0), [1]), features(angle(10, 20), [2, 1])
    assert evaluate(q, g).mAP == pytest.approx(0.25)
    assert evaluate(q, g, ap="mean").mAP == pytest.approx(0.5)
    assert evaluate(q, g).cmc[:3].tolist() == [0, 1, 1]


def test_a_block_of_queries_without_a_match(monkeypatch):
    monkeypatch.setattr(import_module("reid3d.retrieval.search"), "_BLOCK", 12)  # four queries of a gallery of three
    q = features(angle(0, 0, 0, 0, 0), [9, 9, 9, 9, 1])
    result = evaluate(q, features(angle(10, 20, 30), [2, 1, 1]))
    assert (result.num_valid, result.num_query) == (1, 5)
    assert result.per_query.rank.tolist() == [0, 0, 0, 0, 2]


def test_the_protocol_by_hand():
    """Junk and the own camera vanish, the own camera's other people, distractors and unknown cameras stay."""
    gallery = [  # angle, pid, camid; in the order of similarity
        (1, -1, 2),  # junk: dropped
        (2, 1, 1),  # the query's own camera: removed
        (3, 2, 1),  # another person under that camera: place 1
        (4, 0, 3),  # distractor: place 2
        (5, 1, 2),  # match: place 3
        (6, 1, -1),  # match under an unknown camera: place 4
    ]
    degrees, pids, camids = zip(*gallery, strict=True)
    g = features(angle(*degrees), pids, camids)
    result = evaluate(features(angle(0), [1], [1]), g, ap="mean")
    assert result.per_query.rank.tolist() == [3]
    assert result.mAP == pytest.approx((1 / 3 + 2 / 4) / 2) and result.mINP == pytest.approx(2 / 4)
    assert result.num_gallery == 5
    unknown = evaluate(features(angle(0), [1], [-1]), g, ap="mean")  # removes nothing
    assert unknown.per_query.rank.tolist() == [1]


def test_queries_without_a_match_are_counted_and_skipped():
    q = features(angle(0, 0, 0, 0), [1, 7, -1, 2], [1, 1, 1, 1])
    g = features(angle(10, 20, 30), [1, 2, -1], [2, 1, 2])  # pid 2 only under the query's own camera
    result = evaluate(q, g)
    assert (result.num_valid, result.num_query) == (1, 4)
    assert result.mAP == result.cmc[0] == 1
    assert result.per_query.rank.tolist() == [1, 0, 0, 0]
    assert (
        np.isnan(result.per_query.ap).tolist() == np.isnan(result.per_query.inp).tolist() == [False, True, True, True]
    )


def test_ties_go_to_the_lower_gallery_index():
    q = features([[1, 0]], [1])
    tied = np.tile([[0.0, 1.0]], (4, 1))
    assert evaluate(q, features(tied, [1, 2, 3, 4])).cmc[0] == 1
    assert evaluate(q, features(tied, [2, 3, 4, 1])).per_query.rank.tolist() == [4]
    assert evaluate(q, features([[0, 1], [0, -1]], [2, 1])).per_query.rank.tolist() == [2]  # 0.0 and -0.0 tie


def test_keys_sort_as_a_stable_sort():
    import torch

    sims = torch.tensor([[0.5, -1.0, 0.0, -0.0, 1.0, 0.5, -torch.inf, -1e-40, 1e-40, 0.0]])
    wanted = sorted(range(sims.shape[1]), key=lambda j: -sims[0, j].item())
    assert order_keys(sims).argsort(1)[0].tolist() == wanted


def test_perfect_and_worst():
    pids = np.repeat(np.arange(1, 6), 3)
    g = features(np.repeat(np.eye(5), 3, 0), pids)
    q = features(np.eye(5), np.arange(1, 6))
    for ap in DEFINITIONS:
        best = evaluate(q, g, ap=ap)
        assert best.mAP == best.mINP == best.cmc[0] == 1
    worst = evaluate(features(-np.eye(5), np.arange(1, 6)), g, ap="mean")
    assert worst.cmc[11] == 0 and worst.cmc[12] == 1
    assert worst.mAP == pytest.approx((1 / 13 + 2 / 14 + 3 / 15) / 3)


def test_cmc_counts_beyond_its_50_places_for_nothing():
    q, g = features([[1.0, 0.0]], [1]), features([[1.0, 0.0]] * 60 + [[0.0, 1.0]], [2] * 60 + [1])
    assert evaluate(q, g).cmc.tolist() == [0.0] * 50
    assert evaluate(q, g).per_query.rank.tolist() == [61]


@st.composite
def problems(draw) -> tuple[Features, Features]:
    """Small integer features on a few directions, so that similarities are exact and often tie."""
    directions = np.vstack([np.eye(3), -np.eye(3)])

    def side(size: int, low: int) -> Features:
        pick = st.lists(st.integers(0, 5), min_size=size, max_size=size)
        pids = draw(st.lists(st.integers(low, 4), min_size=size, max_size=size))
        camids = draw(st.lists(st.sampled_from([-1, 1, 2, 3]), min_size=size, max_size=size))
        return features(directions[draw(pick)], pids, camids)

    return side(draw(st.integers(1, 8)), -1), side(draw(st.integers(1, 30)), -1)


@settings(max_examples=150, deadline=None)
@given(problems(), st.sampled_from(DEFINITIONS))
def test_against_brute_force_with_ties(problem, ap):
    q, g = problem
    q.pids[q.pids == -1] = 5
    with np.errstate(all="ignore"):
        try:
            result = evaluate(q, g, ap=ap)
        except ValueError as error:
            assert "no match" in str(error)
            return
    assert_agrees(result, brute_force(q, g, ap))


@pytest.mark.parametrize("ap", DEFINITIONS)
def test_against_brute_force_over_blocks(ap, monkeypatch):
    monkeypatch.setattr(import_module("reid3d.retrieval.search"), "_BLOCK", 1000)  # 3 queries a block
    rng = np.random.default_rng(0)
    unit = rng.standard_normal((350, 16))
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    q = features(unit[:50], rng.integers(1, 15, 50), rng.integers(1, 4, 50))
    g = features(unit[50:], rng.integers(-1, 12, 300), rng.integers(1, 4, 300))
    result = evaluate(q, g, ap=ap)
    assert result.num_valid < 50
    assert_agrees(result, brute_force(q, g, ap))


def test_the_order_of_the_gallery_and_the_lengths_change_nothing():
    rng = np.random.default_rng(1)
    q = features(rng.standard_normal((20, 8)), rng.integers(1, 6, 20), rng.integers(1, 4, 20))
    g = features(rng.standard_normal((100, 8)), rng.integers(-1, 6, 100), rng.integers(1, 4, 100))
    result, order = evaluate(q, g), rng.permutation(100)
    lengths = rng.uniform(0.1, 10, (100, 1)).astype(np.float32)
    other = evaluate(q, features(g.feats[order] * lengths, g.pids[order], g.camids[order]))
    assert other.mAP == pytest.approx(result.mAP, abs=1e-12) and other.mINP == pytest.approx(result.mINP, abs=1e-12)
    np.testing.assert_array_equal(other.cmc, result.cmc)
    np.testing.assert_array_equal(other.per_query.rank, result.per_query.rank)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_ranges(seed):
    rng = np.random.default_rng(seed)
    q = features(rng.standard_normal((6, 4)), [1, 2, 3, 1, 2, 3], rng.integers(-1, 3, 6))
    g = features(rng.standard_normal((30, 4)), [1, 2, 3] * 10, [5, 6] * 15)
    market, mean = evaluate(q, g), evaluate(q, g, ap="mean")
    for result in (market, mean):
        assert 0 < result.mAP <= 1 and 0 < result.mINP <= result.mAP + 0.5 and (np.diff(result.cmc) >= 0).all()
    # Just before a match the precision is at most what the match makes of it, unless it was 1 already.
    assert market.mAP <= mean.mAP + 1e-12


@pytest.mark.parametrize("ap", DEFINITIONS)
def test_chance_is_the_mean_over_all_orders(ap):
    """One query, four gallery items of which one is of its own camera: all orders of the rest, one after the other."""
    from itertools import permutations

    pids = np.array([1, 1, 2, 3])
    places = [features(angle(*np.array(order) * 10.0 + 5), pids) for order in permutations(range(4))]
    results = [evaluate(features(angle(0), [1]), g, ap=ap) for g in places]
    assert results[0].chance.rank1 == pytest.approx(np.mean([result.cmc[0] for result in results]))
    assert results[0].chance.mAP == pytest.approx(np.mean([result.mAP for result in results]))
    alone = evaluate(features(angle(0), [1]), features(angle(5), [1]), ap=ap)
    assert alone.chance == (1, 1)


def test_the_similarities_are_never_all_held(monkeypatch):
    """Of 2,000 x 3,000 similarities, no more than a block at a time is asked for or ordered."""
    sizes = []

    def watched(sim):
        sizes.append(sim.numel())
        return order_keys(sim)

    rng = np.random.default_rng(0)
    q = features(rng.standard_normal((2000, 2)), rng.integers(1, 500, 2000))
    g = features(rng.standard_normal((3000, 2)), rng.integers(1, 500, 3000))
    for name, call in (("metrics", evaluate), ("search", search)):
        sizes.clear()
        monkeypatch.setattr(import_module(f"reid3d.retrieval.{name}"), "order_keys", watched)
        call(q, g)
        assert sum(sizes) == 2000 * 3000 and max(sizes) <= 2**20


def test_errors():
    q, g = features(angle(0), [1]), features(angle(5), [1])
    with pytest.raises(ValueError, match="ap must be 'market' or 'mean', got 'coco'"):
        evaluate(q, g, ap="coco")
    with pytest.raises(ValueError, match="same dimension, got 2 and 3"):
        evaluate(q, features([[1, 0, 0]], [1]))
    with pytest.raises(ValueError, match="1 of 1 queries have no match"):
        evaluate(q, features(angle(5), [2]))
    with pytest.raises(ValueError, match="gallery must not be empty"):
        evaluate(q, features(np.zeros((0, 2)), []))
    with pytest.raises(ValueError, match="feats must be finite, got NaN or infinity for 1 of 2: 1.jpg"):
        features([[1, 0], [np.nan, 0]], [1, 1])


def test_search_and_evaluate_agree_on_the_first_place():
    rng = np.random.default_rng(2)
    q = features(rng.standard_normal((30, 8)), rng.integers(1, 6, 30), rng.integers(1, 4, 30))
    g = features(rng.standard_normal((80, 8)), rng.integers(-1, 6, 80), rng.integers(1, 4, 80))
    ranks = search(q, g, k=1, cross_camera=True)
    result = evaluate(q, g)
    assert result.cmc[0] == pytest.approx((g.pids[ranks.idx[:, 0]] == q.pids).sum() / result.num_valid)


def test_result_prints_as_a_table_with_chance():
    q = Features(np.eye(2, dtype=np.float32), np.array([1, 2]), np.array([1, 1]), ["a", "b"])
    g = Features(np.eye(2, dtype=np.float32)[[0, 0]], np.array([1, 2]), np.array([2, 2]), ["c", "d"])
    lines = str(evaluate(q, g, ap="mean")).splitlines()
    assert lines[0] == "Rank-1        50.00%   chance 50.00%, 1.0 times that"
    assert lines[3] == "mAP (mean)    75.00%   chance 75.00%, 1.0 times that"
    assert lines[-1] == "single query, cross camera: 2 of 2 queries have a match in the gallery of 2"
