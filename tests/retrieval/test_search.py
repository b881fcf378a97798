"""Search against a plain full sort; its filter, its ties, its errors."""

from importlib import import_module

import numpy as np
import pytest

from reid3d.retrieval import search

from .test_metrics import angle, features


@pytest.mark.parametrize("cross_camera", [False, True])
def test_against_a_full_sort(cross_camera, monkeypatch):
    monkeypatch.setattr(import_module("reid3d.retrieval.search"), "_BLOCK", 500)  # several blocks, the last one smaller
    rng = np.random.default_rng(0)
    unit = rng.standard_normal((131, 8)).astype(np.float32)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    q = features(unit[:31], rng.integers(1, 5, 31), rng.integers(1, 3, 31))
    g = features(unit[31:], rng.integers(-1, 5, 100), rng.integers(1, 3, 100))
    ranks = search(q, g, k=7, cross_camera=cross_camera)
    for i in range(31):
        sims = g.feats.astype(np.float64) @ q.feats[i]
        if cross_camera:
            sims[(g.pids == -1) | ((g.pids == q.pids[i]) & (g.camids == q.camids[i]))] = -np.inf
        wanted = np.argsort(-sims, kind="stable")[:7]
        assert ranks.idx[i].tolist() == wanted.tolist()
        np.testing.assert_allclose(ranks.sim[i], sims[wanted], atol=1e-6)
    assert ranks.query is q and ranks.gallery is g
    assert ranks.idx.dtype == np.int64 and ranks.sim.dtype == np.float32


def test_ties_go_to_the_lower_index():
    assert search(features([[2, 0]], [1]), features([[3, 0]] * 50, range(50)), k=50).idx[0].tolist() == list(range(50))


@pytest.mark.parametrize("queries", [1, 2, 3, 5])
@pytest.mark.parametrize("items", [3, 30, 37, 1003])
def test_ties_of_real_lengths_do_not_depend_on_the_number_of_queries(queries, items):
    """Matrix products of one to three rows may round the last columns otherwise than the others."""
    rng = np.random.default_rng(items)
    feats = rng.standard_normal((items, 512)).astype(np.float32)
    same = [0, items // 2, items - 1]
    feats[same] = feats[0]
    near = feats[:1] + 0.1 * rng.standard_normal((queries, 512)).astype(np.float32)
    ranks = search(features(near, [1] * queries), features(feats, range(items)), k=3)
    assert ranks.idx.tolist() == [same] * queries
    assert (ranks.sim == ranks.sim[:, :1]).all()


def test_a_slice_of_the_gallery_at_a_time(monkeypatch):
    g = features(np.random.default_rng(0).standard_normal((40, 16)), range(40))
    whole = search(g, g, k=5)
    monkeypatch.setattr(import_module("reid3d.retrieval.search"), "_BLOCK", 48)  # three rows
    parts = search(g, g, k=5)
    assert parts.idx.tolist() == whole.idx.tolist()
    np.testing.assert_allclose(parts.sim, whole.sim, atol=1e-6)


def test_a_feature_finds_itself_first_with_similarity_1():
    g = features(np.random.default_rng(0).standard_normal((40, 16)), range(40))
    ranks = search(g, g, k=1)
    assert ranks.idx[:, 0].tolist() == list(range(40))
    np.testing.assert_allclose(ranks.sim, 1, atol=1e-6)


def test_fewer_items_than_asked_for_end_in_minus_1():
    g = features(angle(10, 20, 30), [1, -1, 2], [1, 1, 1])
    ranks = search(features(angle(0), [1], [1]), g, k=5, cross_camera=True)
    assert ranks.idx[0].tolist() == [2, -1, -1, -1, -1]
    assert ranks.sim[0, 1:].tolist() == [-np.inf] * 4
    assert search(features(angle(0), [1], [1]), g, k=5).idx[0].tolist() == [0, 1, 2, -1, -1]


def test_an_unknown_camera_removes_nothing():
    ranks = search(features(angle(0), [1], [-1]), features(angle(10), [1], [-1]), k=1, cross_camera=True)
    assert ranks.idx.tolist() == [[0]]


def test_extreme_lengths_and_zero():
    q = features([[1e30, 0], [1e-30, 0], [0, 0]], [1, 2, 3])
    ranks = search(q, features([[0, 1], [1, 0]], [1, 2]), k=2)
    assert ranks.idx.tolist() == [[1, 0], [1, 0], [0, 1]]
    assert ranks.sim.tolist() == [[1, 0], [1, 0], [0, 0]]


def test_empty_sides():
    some, none = features(angle(0, 1), [1, 2]), features(np.zeros((0, 2)), [])
    assert search(none, some, k=3).idx.shape == (0, 3)
    assert search(some, none, k=3).idx.tolist() == [[-1] * 3] * 2


def test_errors():
    q, g = features(angle(0), [1]), features([[1, 0, 0]], [1])
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        search(q, q, k=0)
    with pytest.raises(ValueError, match="same dimension, got 2 and 3"):
        search(q, g)
