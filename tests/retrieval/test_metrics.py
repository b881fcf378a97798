"""The metrics against a plain evaluator that walks each ranked list, hand-made cases, properties, and errors."""

from importlib import import_module
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reid3d.retrieval import Features, Result, evaluate, search
from reid3d.retrieval.search import order_keys

DEFINITIONS = ("market", "mean")


def features(feats, pids, camids=None, names=None) -> Features:
    feats = np.asarray(feats, np.float32)
    camids = np.full(len(feats), -1) if camids is None else camids
    names = [f"{i}.jpg" for i in range(len(feats))] if names is None else names
    return Features(feats, np.asarray(pids, np.int64), np.asarray(camids, np.int64), names)


def angle(*degrees: float) -> np.ndarray:
    """Unit vectors of the plane: the cosine falls as the angle from 0 grows."""
    return np.stack([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))], 1)


def ranked(sims, q, g, i, ties="stable", cross_camera=True) -> list[bool]:
    """Of query i the whole ranked list, item by item: whether it is a match."""
    own = (lambda j: q.camids[i] == g.camids[j] != -1) if cross_camera else (lambda j: q.names[i] == g.names[j])
    right = [g.pids[j] == q.pids[i] for j in range(len(g))]
    kept = [j for j in range(len(g)) if g.pids[j] != -1 and not (right[j] and own(j))]
    kept.sort(key=lambda j: (-float(sims[i][j]), ties == "pessimistic" and right[j], j))
    return [bool(right[j]) for j in kept]


def brute_force(sims, q: Features, g: Features, ap: str, ties="stable", cross_camera=True) -> dict:
    """One query at a time, one item of the ranked list at a time, as the published evaluation codes do."""
    first, aps, inps = [], [], []
    for i in range(len(q)):
        kept = ranked(sims, q, g, i, ties, cross_camera)
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
        "cmc": [np.mean([place <= r for place in first]) for r in range(1, 51)] if first else None,
        "mAP": np.mean(aps) if aps else None,
        "mINP": np.mean(inps) if inps else None,
        "valid": len(first),
        "ap": aps,
    }


def cosines(q: Features, g: Features) -> np.ndarray:
    return np.asarray(q.feats, np.float32) @ np.asarray(g.feats, np.float32).T


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


def problem(seed: int, tied: bool) -> tuple[np.ndarray, Features, Features]:
    """A few queries and items: junk, distractors, unknown cameras, images of the gallery among the queries."""
    rng = np.random.default_rng(seed)
    queries, items = rng.integers(1, 5), rng.integers(1, 25)
    q, g = (
        features(
            np.zeros((n, 1)), rng.integers(-1, 4, n), rng.integers(-1, 3, n), [f"{i}" for i in rng.permutation(30)[:n]]
        )
        for n in (queries, items)
    )
    sims = (
        rng.integers(-2, 3, (queries, items)) / 2 * rng.choice([1, -1.0]) if tied else rng.normal(size=(queries, items))
    )
    q.pids[q.pids == -1] = 9
    return sims.astype(np.float32), q, g


@settings(max_examples=2000, deadline=None)
@given(
    *(st.integers(0, 2**32 - 1), st.booleans(), st.sampled_from(DEFINITIONS)),
    *(st.sampled_from(("stable", "pessimistic")), st.booleans()),
)
def test_against_brute_force(seed, tied, ap, ties, cross_camera):
    sims, q, g = problem(seed, tied)
    wanted = brute_force(sims, q, g, ap, ties, cross_camera)
    if wanted["valid"]:
        result = evaluate(q, g, ap, scores=sims, ties=ties, cross_camera=cross_camera)
        assert_agrees(result, wanted)
        assert result.num_gallery == (g.pids != -1).sum()
    else:
        with pytest.raises(ValueError, match="have no match|all junk"):
            evaluate(q, g, ap, scores=sims, ties=ties, cross_camera=cross_camera)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(DEFINITIONS))
def test_features_against_brute_force_with_ties(seed, ap):
    """Features on a few directions, so that similarities are exact and often tie."""
    rng = np.random.default_rng(seed)
    sides = [
        features(
            np.vstack([np.eye(3), -np.eye(3)])[rng.integers(0, 6, n)], rng.integers(0, 4, n), rng.integers(-1, 3, n)
        )
        for n in (5, 25)
    ]
    assert_agrees(evaluate(*sides, ap=ap), brute_force(cosines(*sides), *sides, ap))


@pytest.mark.parametrize("ap", DEFINITIONS)
def test_against_brute_force_over_blocks(ap, monkeypatch):
    for module in ("search", "pairs"):
        monkeypatch.setattr(import_module(f"reid3d.retrieval.{module}"), "_BLOCK", 1000)  # 3 queries a block
    rng = np.random.default_rng(0)
    unit = rng.standard_normal((350, 16))
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    q = features(unit[:50], rng.integers(1, 15, 50), rng.integers(1, 4, 50))
    g = features(unit[50:], rng.integers(-1, 12, 300), rng.integers(1, 4, 300))
    wanted = brute_force(cosines(q, g), q, g, ap)
    assert wanted["valid"] < 50
    assert_agrees(evaluate(q, g, ap=ap), wanted)
    assert_agrees(evaluate(q, g, ap=ap, scores=cosines(q, g)), wanted)


def same(one: Result, other: Result) -> bool:
    arrays = [(one.cmc, other.cmc), *zip(one.per_query, other.per_query, strict=True)]
    return all(np.array_equal(a, b, equal_nan=True) for a, b in arrays) and one.mAP == other.mAP


def sized(rng, queries=40, items=200, low=-1) -> tuple[np.ndarray, Features, Features]:
    q = features(np.zeros((queries, 1)), rng.integers(1, 9, queries), rng.integers(-1, 4, queries))
    g = features(np.zeros((items, 1)), rng.integers(low, 9, items), rng.integers(-1, 4, items))
    return rng.standard_normal((queries, items)).astype(np.float32), q, g


def rows_of(side: Features, rows) -> Features:
    return features(side.feats[rows], side.pids[rows], side.camids[rows], [side.names[i] for i in rows])


@pytest.mark.parametrize("options", [{}, {"ties": "pessimistic"}, {"single_gallery_shot": True}])
def test_threads_and_blocks_change_no_bit(options, monkeypatch, rng):
    import torch

    sims, q, g = sized(rng)
    sims = sims.round(1)  # ties
    wanted, threads = evaluate(q, g, scores=sims, **options), torch.get_num_threads()
    try:
        for count, block in ((1, 2**20), (3, 2**20), (2, 1000), (1, 1)):
            torch.set_num_threads(count)
            for module in ("pairs", "metrics"):
                monkeypatch.setattr(import_module(f"reid3d.retrieval.{module}"), "_BLOCK", block)
            assert same(evaluate(q, g, scores=sims, **options), wanted)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("options", [{}, {"ties": "pessimistic"}, {"single_gallery_shot": True}])
def test_the_order_of_gallery_and_queries_changes_nothing(options, rng):
    sims, q, g = sized(rng)
    wanted = evaluate(q, g, scores=sims, **options)
    queries, items = rng.permutation(len(q)), rng.permutation(len(g))
    found = evaluate(rows_of(q, queries), rows_of(g, items), scores=sims[queries][:, items], **options)
    for a, b in zip(found.per_query, wanted.per_query, strict=True):
        np.testing.assert_array_equal(a, b[queries])
    np.testing.assert_allclose(found.cmc, wanted.cmc, rtol=0, atol=1e-14)
    assert found.mAP == pytest.approx(wanted.mAP, abs=1e-14)


def test_junk_changes_nothing(rng):
    sims, q, g = sized(rng, low=0)
    columns = np.sort(rng.permutation(260)[:200])
    more = features(np.zeros((260, 1)), np.full(260, -1), rng.integers(-1, 4, 260))
    more.pids[columns], more.camids[columns] = g.pids, g.camids
    wide = rng.standard_normal((40, 260)).astype(np.float32).round(1)
    wide[:, columns] = sims = sims.round(1)
    for options in ({}, {"ties": "pessimistic"}, {"single_gallery_shot": True}):
        assert same(evaluate(q, more, scores=wide, **options), evaluate(q, g, scores=sims, **options))


def test_scores_of_any_layout_are_read_where_they_are(rng, tmp_path):
    sims, q, g = sized(rng)
    wanted, before = evaluate(q, g, scores=sims), sims.copy()
    assert np.array_equal(sims, before)
    np.save(tmp_path / "scores.npy", sims)
    sims.flags.writeable = False
    for other in (
        sims,
        np.asfortranarray(sims),
        np.repeat(sims, 2, 1)[:, ::2],
        sims[::-1].copy()[::-1],
        np.load(tmp_path / "scores.npy", mmap_mode="r"),
    ):
        assert same(evaluate(q, g, scores=other), wanted)


def test_infinite_scores_have_their_places():
    q, g = features([[0]], [1]), features(np.zeros((4, 1)), [2, 1, 3, 1])
    scores = np.array([[np.inf, 0, -np.inf, -np.inf]], np.float32)
    assert evaluate(q, g, "mean", scores=scores).mAP == pytest.approx((1 / 2 + 2 / 4) / 2)


def test_all_scores_equal():
    """The order of the gallery decides, or nothing good does."""
    q, scores = features([[0]], [1]), np.zeros((1, 4), np.float32)
    g = features(np.zeros((4, 1)), [1, 2, 3, 1])
    assert evaluate(q, g, "mean", scores=scores).per_query.ap.tolist() == [(1 + 2 / 4) / 2]
    worst = evaluate(q, g, "mean", scores=scores, ties="pessimistic")
    assert worst.per_query.rank.tolist() == [3] and worst.mAP == pytest.approx((1 / 3 + 2 / 4) / 2)
    assert worst.ties == "pessimistic"


def test_without_cameras_only_the_image_itself_is_removed():
    q = features(angle(0, 90), [1, 2], [1, 1], ["a", "b"])
    g = features(angle(0, 10, 90, 20), [1, 1, 2, 3], [1, 1, 1, 1], ["a", "c", "b", "d"])
    with pytest.raises(ValueError, match="3 matches of the others were taken by the same-camera rule"):
        evaluate(q, g)
    result = evaluate(q, g, cross_camera=False)
    assert result.per_query.rank.tolist() == [1, 0] and result.protocol == "single query, any camera"
    elsewhere = Features(g.feats, g.pids, g.camids, g.names, source="elsewhere")
    assert evaluate(q, elsewhere, cross_camera=False).per_query.rank.tolist() == [1, 1]
    with pytest.raises(ValueError, match="1 matches of the others were taken by the rule that no image matches itself"):
        evaluate(rows_of(q, [1]), g, cross_camera=False)


def test_multi_query(rng):
    """One query for each pid and camera, by hand; an unknown camera is its own."""
    q = features(rng.standard_normal((7, 4)) * 5, [2, 1, 2, 1, 1, 1, 2], [1, 1, 1, 2, -1, -1, 1])
    g = features(rng.standard_normal((40, 4)), rng.integers(0, 4, 40), rng.integers(1, 4, 40))
    unit = q.feats.astype(float) / np.linalg.norm(q.feats.astype(float), axis=1, keepdims=True)
    means = [unit[[0, 2, 6]].mean(0), unit[1], unit[3], unit[4], unit[5]]
    pooled = features(means, [2, 1, 1, 1, 1], [1, 1, 2, -1, -1])
    result = evaluate(q, g, multi_query=True)
    assert same(result, evaluate(pooled, g))
    assert result.num_query == 5 and result.protocol == "multi query, cross camera"
    with pytest.raises(ValueError, match="multi_query pools features, which scores do not have"):
        evaluate(q, g, multi_query=True, scores=cosines(q, g))


def test_multi_query_without_cameras_pools_people_and_finds_none_of_their_own_images():
    q = features(angle(0, 20), [1, 1], None, ["a", "b"])
    g = features(angle(0, 20, 10, 11), [1, 1, 2, 1], None, ["a", "b", "c", "d"])
    result = evaluate(q, g, "mean", multi_query=True, cross_camera=False)
    assert (result.num_query, result.per_query.rank.tolist()) == (1, [2])


def every_draw(sims, q, g, i, ties) -> np.ndarray:
    """The mean CMC of query i over all ways to draw one kept item a person; a distractor is a person of its own."""
    own = [g.pids[j] == q.pids[i] and q.camids[i] == g.camids[j] != -1 for j in range(len(g))]
    people: dict = {}
    for j in range(len(g)):
        if g.pids[j] != -1 and not own[j]:
            people.setdefault((g.pids[j], j if g.pids[j] == 0 else 0), []).append(j)
    curves = []
    for draw in product(*people.values()):
        drawn = sorted(draw, key=lambda j: (-sims[i][j], ties == "pessimistic" and g.pids[j] == q.pids[i], j))
        curves.append(np.arange(1, 51) > [g.pids[j] == q.pids[i] for j in drawn].index(True))
    return np.mean(curves, 0)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.booleans(), st.sampled_from(("stable", "pessimistic")))
def test_single_gallery_shot_is_the_mean_over_all_draws(seed, tied, ties):
    rng = np.random.default_rng(seed)
    q = features(np.zeros((3, 1)), rng.integers(1, 4, 3), rng.integers(-1, 3, 3))
    g = features(np.zeros((9, 1)), [1, 2, 3, *rng.integers(-1, 5, 6)], [7, 7, 7, *rng.integers(-1, 3, 6)])
    sims = (rng.integers(0, 4, (3, 9)) if tied else rng.standard_normal((3, 9))).astype(np.float32)
    result = evaluate(q, g, scores=sims, ties=ties, single_gallery_shot=True)
    wanted = np.mean([every_draw(sims, q, g, i, ties) for i in range(3)], 0)
    np.testing.assert_allclose(result.cmc, wanted, atol=1e-12)
    full = evaluate(q, g, scores=sims, ties=ties)
    assert (result.mAP, result.mINP) == (full.mAP, full.mINP)


def test_single_gallery_shot_against_sampling(rng):
    """As the published code draws, some thousand times, at 60 people, so that ranks go beyond 50."""
    pids = np.repeat(np.arange(1, 61), 4)
    g = features(np.zeros((240, 1)), pids, np.tile([1, 1, 2, 2], 60))
    q = features(np.zeros((5, 1)), [1, 2, 3, 4, 5], [1] * 5)
    sims = (rng.standard_normal((5, 240)) + 0.5 * (q.pids[:, None] == pids)).astype(np.float32)
    result = evaluate(q, g, scores=sims, single_gallery_shot=True)
    draws, places = 4000, []
    for i in range(5):
        drawn = 4 * np.arange(60) + rng.integers(0, 4, (draws, 60))
        drawn[:, i] = 4 * i + rng.integers(2, 4, draws)  # those of the query's camera are removed
        found = sims[i][drawn]
        places.append(1 + (found > found[:, i : i + 1]).sum(1))
    sampled = (np.stack(places)[..., None] <= np.arange(1, 51)).mean((0, 1))
    assert 0 < sampled[0] < 0.6 and sampled[-1] < 1
    np.testing.assert_allclose(result.cmc, sampled, atol=5 * 0.5 / np.sqrt(5 * draws))
    assert result.chance.rank1 == pytest.approx(1 / 60)
    assert result.protocol == "single query, cross camera, single gallery shot"


def test_a_gallery_shorter_than_50(rng):
    q, g = features([[0], [0]], [1, 2], [1, 1]), features(np.zeros((3, 1)), [1, 2, 2], [1, 1, 2])
    result = evaluate(q, g, scores=np.array([[3, 2, 1], [1, 2, 3]], np.float32))
    assert result.num_valid == 1 and result.cmc.tolist() == [1] * 50


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

    def watched(call):
        def counted(sim, *args, **options):
            sizes.append(sim.numel())
            return call(sim, *args, **options)

        return counted

    rng = np.random.default_rng(0)
    q = features(rng.standard_normal((2000, 2)), rng.integers(1, 500, 2000))
    g = features(rng.standard_normal((3000, 2)), rng.integers(1, 500, 3000))
    scores = np.zeros((2000, 3000), np.float32)
    module = import_module("reid3d.retrieval.metrics")
    monkeypatch.setattr(module, "match_places", watched(module.match_places))
    for of in (None, scores):
        sizes.clear()
        evaluate(q, g, scores=of)
        assert sum(sizes) == 2000 * 3000 and max(sizes) <= 2**20


def test_errors():
    q, g = features(angle(0), [1]), features(angle(5), [1])
    scores = np.zeros((1, 1), np.float32)
    for options, error, message in (
        ({"ap": "coco"}, ValueError, "ap must be 'market' or 'mean', got 'coco'"),
        ({"ties": "random"}, ValueError, "ties must be 'stable' or 'pessimistic', got 'random'"),
        ({"g": features([[1, 0, 0]], [1])}, ValueError, "same dimension, got 2 and 3"),
        ({"g": features(angle(5), [2])}, ValueError, "1 of 1 queries have no match: 1 of 1 ids are not in the gallery"),
        ({"g": features(angle(5), [-1])}, ValueError, "gallery must not be all junk .pid -1., got 1 of 1 items"),
        ({"g": features(np.zeros((0, 2)), [])}, ValueError, "gallery must not be empty"),
        ({"q": features(np.zeros((0, 2)), [])}, ValueError, "query must not be empty"),
        ({"q": features(angle(5, 6, 7), [1] * 3, None, ["a", "b", "b"])}, ValueError, "query .* once, got b more than"),
        ({"g": features(angle(5, 6, 7), [1] * 3, None, ["a", "a", "b"])}, ValueError, "gallery .* once, got a more"),
        ({"scores": scores.astype(float)}, TypeError, "scores must be a float32 NumPy array, got float64"),
        ({"scores": [[0.0]]}, TypeError, "scores must be a float32 NumPy array, got list"),
        ({"scores": scores[0]}, ValueError, r"scores must have shape \(Q, G\) = \(1, 1\), got \(1,\)"),
        ({"scores": scores * np.float32(np.nan)}, ValueError, "scores must not hold NaN, got one for 0.jpg and 0.jpg"),
    ):
        with pytest.raises(error, match=message):
            evaluate(**{"q": q, "g": g, **options})
    with pytest.raises(ValueError, match="feats must be finite, got NaN or infinity for 1 of 2: 1.jpg"):
        features([[1, 0], [np.nan, 0]], [1, 1])


def test_no_match_says_which_rule_took_them():
    q = features(angle(0, 0, 0, 0), [1, 2, 3, 3], [1, 1, 1, 2])
    g = features(angle(10, 20, 30), [1, 1, 2], [1, 1, 1])
    with pytest.raises(
        ValueError,
        match="4 of 4 queries have no match: 1 of 3 ids are not in the gallery, "
        "3 matches of the others were taken by the same-camera rule",
    ):
        evaluate(q, g)


def test_features_of_two_models_are_not_compared():
    q, g = (
        Features(np.ones((1, 2), np.float32), np.array([1]), np.array([n]), ["a"], made_by=f"model{n}") for n in (1, 2)
    )
    with pytest.raises(ValueError, match="q and g must be features of one model, got made_by model1 and model2"):
        evaluate(q, g)
    assert evaluate(q, g, scores=np.zeros((1, 1), np.float32)).mAP == 1


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
