"""Re-ranking against the definition, written as loops over items and sets; single queries; query expansion; errors."""

from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reid3d.retrieval import Features, GalleryGraph, expand, rerank

from .test_metrics import angle, features


def by_definition(dist: np.ndarray, queries: int, k1: int, k2: int, weight: float) -> np.ndarray:
    """Section 3 of the paper, with the published code's choices, item by item in float64.

    dist (N, N): column i holds the distances of item i, queries first.
    """
    n = len(dist)
    d = [[float(dist[j, i]) / (float(dist[:, i].max()) or 1.0) for j in range(n)] for i in range(n)]
    rank = [sorted(range(n), key=lambda j: (float(dist[j, i]), j)) for i in range(n)]

    def reciprocal(i: int, k: int) -> list[int]:
        return [j for j in rank[i][: k + 1] if i in rank[j][: k + 1]]

    members = []
    for i in range(n):
        base = reciprocal(i, k1)
        whole = set(base)
        for j in base:
            theirs = reciprocal(j, round(k1 / 2))
            if 3 * len(set(theirs) & set(base)) > 2 * len(theirs):
                whole |= set(theirs)
        v = np.zeros(n)
        for j in whole:
            v[j] = np.exp(-d[i][j])
        members.append(v / v.sum() if whole else v)
    if k2 > 1:
        members = [np.mean([members[j] for j in rank[i][:k2]], axis=0) for i in range(n)]
    out = np.zeros((queries, n - queries))
    for i in range(queries):
        for j in range(queries, n):
            smaller = sum(min(a, b) for a, b in zip(members[i], members[j], strict=True))
            out[i, j - queries] = 1 - (1 - weight) * (1 - smaller / (2 - smaller)) - weight * d[i][j]
    return out


def squared(q: Features, g: Features) -> np.ndarray:
    """Squared Euclidean distances between unit vectors."""
    x = np.concatenate([q.feats, g.feats]).astype(np.float64)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return ((x[:, None] - x[None]) ** 2).sum(2)


def people(seed: int, queries: int, gallery: int, dims: int = 16) -> tuple[Features, Features]:
    """Features around a few centres, so that neighbourhoods are mutual."""
    rng = np.random.default_rng(seed)
    pids = rng.integers(0, 1 + (queries + gallery) // 8, queries + gallery)
    feats = rng.standard_normal((pids.max() + 1, dims))[pids] + 0.5 * rng.standard_normal((len(pids), dims))
    return features(feats[:queries], pids[:queries]), features(feats[queries:], pids[queries:])


@pytest.mark.parametrize(("block", "tile"), [(2**22, 2**11), (3000, 16)])
@pytest.mark.parametrize(
    ("k1", "k2", "weight"), [(20, 6, 0.3), (7, 3, 0.5), (5, 1, 0.0), (1, 2, 1.0), (1, 1, 0.3), (200, 201, 0.1)]
)
def test_against_the_definition(k1, k2, weight, block, tile, monkeypatch):
    monkeypatch.setattr(import_module("reid3d.retrieval.rerank"), "_BLOCK", block)
    monkeypatch.setattr(import_module("reid3d.retrieval.rerank"), "_TILE", tile)
    q, g = people(k1, 13, 58)
    scores = rerank(q, g, k1=k1, k2=k2, weight=weight)
    assert scores.shape == (13, 58) and scores.dtype == np.float32
    assert 0 <= scores.min() and scores.max() <= 1
    np.testing.assert_allclose(scores, by_definition(squared(q, g), 13, k1, k2, weight), atol=1e-5)


def test_by_hand():
    """Query and first item are near each other, the other two far away and near each other: k1 = 1, so pairs.

    Neighbourhoods {q, a}, {a, q}, {b, c}, {c, b}. Distances of q: 0, 1, 4, 4, over the largest 0, 1/4, 1, 1, so the
    memberships of q are e^0 and e^-1/4, normalised; those of a: 0.25 and 1 in that order. They share 2 e^-1/4 / sum.
    """
    qq, qg = np.zeros((1, 1), np.float32), np.array([[1, 4, 4]], np.float32)
    gg = np.array([[0, 4, 4], [4, 0, 1], [4, 1, 0]], np.float32)
    q, g = features(angle(0), [1]), features(angle(1, 2, 3), [1, 2, 3])
    scores = rerank(q, g, k1=1, k2=1, weight=0.3, distances=(qq, qg, gg))
    shared = 2 * np.exp(-0.25) / (1 + np.exp(-0.25))
    np.testing.assert_allclose(scores, [[0.7 * shared / (2 - shared) + 0.3 * 0.75, 0, 0]], atol=1e-6)


@st.composite
def problems(draw) -> tuple[np.ndarray, int]:
    """Distances in few values, which tie, neither symmetric nor 0 between an item and itself."""
    n, queries = draw(st.integers(2, 14)), draw(st.integers(1, 3))
    values = draw(st.lists(st.integers(0, draw(st.sampled_from([1, 3, 40]))), min_size=n * n, max_size=n * n))
    return np.array(values, np.float32).reshape(n, n), min(queries, n - 1)


@settings(max_examples=150, deadline=None)
@given(problems(), st.integers(1, 8), st.integers(1, 5), st.sampled_from([0.0, 0.3, 1.0]))
def test_given_distances_that_tie(problem, k1, k2, weight):
    dist, queries = problem
    dist[queries:, :queries] = dist[:queries, queries:].T  # there is one block of query to gallery
    k2 = min(k2, k1 + 1)
    blocks = dist[:queries, :queries], dist[:queries, queries:], dist[queries:, queries:]
    q, g = (
        features(np.ones((queries, 2)), [1] * queries),
        features(np.ones((len(dist) - queries, 2)), dist[queries:, 0]),
    )
    scores = rerank(q, g, k1=k1, k2=k2, weight=weight, distances=blocks)
    np.testing.assert_allclose(scores, by_definition(dist, queries, k1, k2, weight), atol=1e-5)


def test_distances_of_the_features_give_what_the_features_give():
    q, g = people(5, 20, 90)
    dist = squared(q, g).astype(np.float32)
    blocks = dist[:20, :20], dist[:20, 20:], dist[20:, 20:]
    np.testing.assert_allclose(rerank(q, g, distances=blocks), rerank(q, g), atol=1e-5)
    np.testing.assert_allclose(rerank(q, g, distances=tuple(9 * block for block in blocks)), rerank(q, g), atol=1e-5)


def test_blocks_change_nothing(monkeypatch):
    """Not even where items are equal, and more of them than there are neighbours."""
    q, g = people(6, 17, 180)
    g.feats[10:170:6] = g.feats[1]
    q.feats[::5] = g.feats[1]
    whole = rerank(q, g)
    np.testing.assert_allclose(whole, by_definition(squared(q, g).round(12), 17, 20, 6, 0.3), atol=1e-5)
    monkeypatch.setattr(import_module("reid3d.retrieval.rerank"), "_BLOCK", 5000)
    monkeypatch.setattr(import_module("reid3d.retrieval.rerank"), "_TILE", 50)
    np.testing.assert_allclose(rerank(q, g), whole, atol=1e-6)


def test_the_order_and_the_lengths_change_nothing():
    q, g = people(7, 15, 100)
    order, lengths = np.random.default_rng(0).permutation(100), np.linspace(0.1, 9, 100)[:, None]
    other = features(g.feats[order] * lengths, g.pids[order])
    np.testing.assert_allclose(rerank(q, other), rerank(q, g)[:, order], atol=1e-5)
    np.testing.assert_allclose(rerank(features(q.feats[::-1], q.pids[::-1]), g), rerank(q, g)[::-1], atol=1e-5)


def test_weight_1_leaves_the_order_as_it_was():
    q, g = people(8, 10, 60)
    dist = squared(q, g)[:10, 10:]
    assert (rerank(q, g, weight=1.0).argsort(1) == (-dist).argsort(1)).all()


def test_it_brings_people_together():
    """The reason for it: neighbourhoods find who the distance alone does not."""
    rng = np.random.default_rng(0)
    pids = np.repeat(np.arange(40), 10)
    feats = rng.standard_normal((40, 32))[pids] + 1.4 * rng.standard_normal((400, 32))
    q, g = features(feats[::10], pids[::10]), features(np.delete(feats, np.s_[::10], 0), np.delete(pids, np.s_[::10]))
    right = q.pids[:, None] == g.pids
    unit = [x.feats / np.linalg.norm(x.feats, axis=1, keepdims=True) for x in (q, g)]

    def nine(scores):
        return np.take_along_axis(right, scores.argsort(1)[:, -9:], 1).mean()

    assert nine(rerank(q, g, k1=10)) > nine(unit[0] @ unit[1].T) + 0.05


def test_identical_items_and_empty_sides():
    same = features(np.ones((30, 4)), range(30))
    np.testing.assert_allclose(rerank(same, same), by_definition(np.zeros((60, 60)), 30, 20, 6, 0.3), atol=1e-5)
    none = features(np.zeros((0, 4)), [])
    assert rerank(none, same).shape == (0, 30) and rerank(same, none).shape == (30, 0)
    assert rerank(none, none).shape == (0, 0) and GalleryGraph(same).rerank(none).shape == (0, 30)


@pytest.mark.parametrize("gallery", [1, 2, 5, 19, 20, 21, 22, 150])
@pytest.mark.parametrize(("k1", "k2"), [(20, 6), (6, 1), (4, 5)])
def test_a_single_query_is_re_ranked_as_if_it_alone_were_there(gallery, k1, k2):
    q, g = people(gallery, 6, gallery)
    q.feats[1] = g.feats[0]  # somebody of the gallery itself
    q.feats[2] = -g.feats.mean(0)  # farther away than anybody: the distances of all are normalised anew
    graph = GalleryGraph(g, k1=k1, k2=k2)
    together = graph.rerank(q)
    for i in range(6):
        alone = features(q.feats[i : i + 1], [1])
        np.testing.assert_allclose(together[i], rerank(alone, g, k1=k1, k2=k2)[0], atol=1e-5)
        np.testing.assert_array_equal(graph.rerank(alone)[0], together[i])  # nothing is left of other queries


def test_a_single_query_of_a_large_gallery():
    q, g = people(3, 8, 1500, dims=64)
    q.feats[:4] = g.feats[:4]
    graph = GalleryGraph(g, k1=15, k2=4, weight=0.2)
    for i, scores in enumerate(graph.rerank(q)):
        alone = rerank(features(q.feats[i : i + 1], [1]), g, k1=15, k2=4, weight=0.2)
        np.testing.assert_allclose(scores, alone[0], atol=1e-5)


def test_expansion_by_hand():
    """Cosines with the query: 1/2 (60 degrees), 0 (90), -1/2 (120). The last is not among the two nearest."""
    q, g = features(2 * angle(0), [7], [3]), features(angle(90, 120, 60), [1, 2, 3])
    moved = expand(q, g, k=2, alpha=3)
    wanted = angle(0)[0] + 0.5**3 * angle(60)[0]
    np.testing.assert_allclose(moved.feats[0], wanted / np.linalg.norm(wanted), atol=1e-6)
    assert (moved.pids, moved.camids, moved.names) == (q.pids, q.camids, q.names)
    wanted += (0.5**1 - 0.5**3) * angle(60)[0]
    np.testing.assert_allclose(expand(q, g, k=3, alpha=1).feats[0], wanted / np.linalg.norm(wanted), atol=1e-6)
    np.testing.assert_allclose(expand(q, g, k=50, alpha=1).feats[0], wanted / np.linalg.norm(wanted), atol=1e-6)


def test_expansion_against_a_loop():
    q, g = people(9, 12, 70)
    moved = expand(q, g, k=6, alpha=2.5)
    for i in range(12):
        unit = [x / np.linalg.norm(x) for x in g.feats.astype(np.float64)]
        own = q.feats[i].astype(np.float64) / np.linalg.norm(q.feats[i])
        nearest = sorted(range(70), key=lambda j: -(own @ unit[j]))[:6]
        total = own + sum(max(own @ unit[j], 0) ** 2.5 * unit[j] for j in nearest)
        np.testing.assert_allclose(moved.feats[i], total / np.linalg.norm(total), atol=1e-5)
    np.testing.assert_allclose(expand(q, g, alpha=2.5, k=6).feats, moved.feats)
    for nobody_near in (features(np.zeros((0, 16)), []), features(-q.feats[:1], [1])):
        alone = expand(features(q.feats[:1], [1]), nobody_near)
        np.testing.assert_allclose(alone.feats[0], q.feats[0] / np.linalg.norm(q.feats[0]), atol=1e-6)


def test_errors():
    q, g = features(angle(0), [1]), features(angle(1, 2), [1, 2])
    wide = features([[1, 0, 0]], [1])
    good = (np.zeros((1, 1), np.float32), np.zeros((1, 2), np.float32), np.zeros((2, 2), np.float32))
    for make in (lambda **kwargs: rerank(q, g, **kwargs), lambda **kwargs: GalleryGraph(g, **kwargs)):
        with pytest.raises(ValueError, match="k1 must be at least 1, got 0"):
            make(k1=0)
        with pytest.raises(ValueError, match="k2 must be between 1 and k1 \\+ 1 = 6, got 7"):
            make(k1=5, k2=7)
        with pytest.raises(ValueError, match="weight must be between 0 and 1, got nan"):
            make(weight=float("nan"))
    for call in (rerank, expand):
        with pytest.raises(ValueError, match="same dimension, got 2 and 3"):
            call(q, wide)
    with pytest.raises(ValueError, match="dimension of the gallery, got 3 and 2"):
        GalleryGraph(g).rerank(wide)
    with pytest.raises(ValueError, match="g must not be empty"):
        GalleryGraph(features(np.zeros((0, 2)), []))
    with pytest.raises(ValueError, match="three arrays, qq, qg and gg, got 2"):
        rerank(q, g, distances=good[:2])
    with pytest.raises(ValueError, match=r"qg must have shape \(1, 2\), got \(2, 1\)"):
        rerank(q, g, distances=(good[0], good[1].T, good[2]))
    with pytest.raises(TypeError, match="gg must be a float32 array, got float64"):
        rerank(q, g, distances=(*good[:2], good[2].astype(float)))
    for bad in (-1, np.nan, np.inf):
        with pytest.raises(ValueError, match="gg must be finite and at least 0, got values in"):
            rerank(q, g, distances=(*good[:2], np.array([[0, bad], [bad, 0]], np.float32)))
    with pytest.raises(ValueError, match="alpha must be at least 0 and finite, got -1"):
        expand(q, g, alpha=-1)
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        expand(q, g, k=0)


def test_features_of_two_models_are_refused():
    q, g = (replace(features(np.eye(3), [1, 2, 3]), made_by=name) for name in "ab")
    with pytest.raises(ValueError, match="q and g must be features of one model, got made_by a and b"):
        rerank(q, g)
    with pytest.raises(ValueError, match="q must be features of the model of the gallery, got a and b"):
        GalleryGraph(g).rerank(q)


@pytest.mark.parametrize("seed", range(8))
def test_identical_items_of_any_direction(seed):
    one = np.random.default_rng(seed).standard_normal((1, 33)).repeat(30, 0)
    np.testing.assert_allclose(rerank(features(one[:5], [1] * 5), features(one[5:], [1] * 25)), 1, atol=1e-6)
