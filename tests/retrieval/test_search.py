"""Search against a plain full sort; its filter, its ties, its memory, its index, its errors."""

import subprocess
import sys
from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reid3d.retrieval import Features, build_index, search

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


# Vectors of lengths 1 and 2, whose products as unit vectors are multiples of 1/4 and so exact however they are summed.
EXACT = np.array([*np.eye(4), *-np.eye(4), *np.ndindex(2, 2, 2, 2)])
EXACT[8:] = 2 * EXACT[8:] - 1


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_ties_and_all_as_in_a_stable_sort_whatever_the_blocks(data):
    def some(count: int) -> Features:
        rows = data.draw(st.lists(st.integers(0, len(EXACT) - 1), min_size=count, max_size=count))
        people = st.lists(st.integers(-1, 2), min_size=count, max_size=count)
        return features(EXACT[rows], data.draw(people), data.draw(people))

    q, g = some(data.draw(st.integers(1, 6))), some(data.draw(st.integers(1, 60)))
    k, cross_camera = data.draw(st.integers(1, 70)), data.draw(st.booleans())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(import_module("reid3d.retrieval.search"), "_BLOCK", data.draw(st.sampled_from([1, 9000, 2**20])))
        ranks = search(q, g, k, cross_camera=cross_camera)
    for i in range(len(q)):
        sims = [float(np.dot(row, q.feats[i]) / np.linalg.norm(row) / np.linalg.norm(q.feats[i])) for row in g.feats]
        left = [
            j
            for j in range(len(g))
            if not cross_camera
            or g.pids[j] != -1
            and not (g.pids[j] == q.pids[i] and g.camids[j] == q.camids[i] and q.camids[i] != -1)
        ]
        wanted = sorted(left, key=lambda j: -sims[j])[:k]
        assert ranks.idx[i].tolist() == wanted + [-1] * (k - len(wanted))
        assert ranks.sim[i].tolist() == [sims[j] for j in wanted] + [-np.inf] * (k - len(wanted))


@pytest.mark.parametrize("order", [1, -1])
def test_galleries_in_the_order_of_similarity(order):
    """The first item is the best, and every item is better than all before."""
    g = features(angle(*np.linspace(0, 90, 3000)[::order]), range(3000))
    ranks = search(features(angle(0), [1]), g, k=5)
    assert ranks.idx[0].tolist() == list(range(3000))[::order][:5]


@pytest.fixture(params=[1, 2, 3, 8])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("dim", [33, 512])
@pytest.mark.parametrize("queries", [1, 3, 5, 16])
@pytest.mark.parametrize("items", [7, 37, 1003, 2500])
def test_equal_items_have_equal_similarities(queries, items, dim, threads):
    """Matrix products may round edges, and unaligned rows, otherwise than the rest, and threads make more edges."""
    rng = np.random.default_rng(items)
    feats = rng.standard_normal((items, dim)).astype(np.float32)
    same = [0, items // 2, items - 1]
    feats[same] = feats[0]
    near = feats[:1] + 0.1 * rng.standard_normal((queries, dim)).astype(np.float32)
    ranks = search(features(near, [1] * queries), features(feats, range(items)), k=3)
    assert ranks.idx.tolist() == [same] * queries
    assert (ranks.sim == ranks.sim[:, :1]).all()
    for rows, sim in import_module("reid3d.retrieval.search").similarity_blocks(near, feats):
        assert (sim[:, same] == sim[:, :1]).all()
        np.testing.assert_allclose(sim[:, 0], ranks.sim[rows, 0], atol=1e-6)


def test_on_a_device(device):
    rng = np.random.default_rng(0)
    q, g = (features(rng.standard_normal((n, 24)), rng.integers(-1, 9, n), rng.integers(1, 4, n)) for n in (30, 5000))
    here, there = search(q, g, cross_camera=True), search(q, g, cross_camera=True, device=device)
    assert there.idx.tolist() == here.idx.tolist()
    np.testing.assert_allclose(there.sim, here.sim, atol=1e-6)


def test_memory_does_not_grow_with_the_gallery():
    """By the system's count of the most memory held, beyond inputs of 160 MB and the 20 MB that a first call loads."""
    code = """
import numpy as np, torch
from reid3d.retrieval import Features, search
def some(n):
    return Features(np.ones((n, 128), np.float32), np.zeros(n, np.int64), np.zeros(n, np.int64), [""] * n)
def held(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) // 1024
torch.set_num_threads(1)
q, g = some(300), some(300_000)
search(q, some(3000))
open("/proc/self/clear_refs", "w").write("5")
before = held("VmRSS")
search(q, g)
print(held("VmHWM") - before)
"""
    grown = int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    assert grown < 60, f"{grown} MiB"


def test_a_memory_map_is_searched_as_what_it_maps(tmp_path):
    rng = np.random.default_rng(0)
    q, g = (features(rng.standard_normal((n, 40)), range(n)) for n in (5, 3000))
    g.save(tmp_path / "g")
    mapped = Features.load(tmp_path / "g", mmap=True)
    assert isinstance(mapped.feats, np.memmap)
    ranks, wanted = search(q, mapped), search(q, g)
    assert ranks.idx.tolist() == wanted.idx.tolist() and ranks.sim.tolist() == wanted.sim.tolist()


def test_a_memory_map_with_nan_is_refused(tmp_path):
    g = features(np.random.default_rng(0).standard_normal((3000, 40)), range(3000))
    g.feats[2000, 3] = np.nan
    np.save(tmp_path / "g.npy", g.feats)
    broken = replace(g, feats=np.load(tmp_path / "g.npy", mmap_mode="r"))
    with pytest.raises(ValueError, match="feats must be finite, got NaN or infinity"):
        search(features(np.ones((1, 40)), [1]), broken)


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
    with pytest.raises(ValueError, match="features of one model, got made_by a and b"):
        search(replace(q, made_by="a"), replace(q, made_by="b"))
    assert len(search(replace(q, made_by="a"), q).idx) == 1
    assert search(q, q, k=2000).idx.shape == (1, 2000)


@pytest.fixture(scope="module")
def people():
    """50 queries and 2000 items of 100 people."""
    rng = np.random.default_rng(0)
    middles = rng.standard_normal((100, 24))

    def some(n):
        pids = rng.integers(1, 101, n)
        return features(middles[pids - 1] + 0.5 * rng.standard_normal((n, 24)), pids, rng.integers(1, 4, n))

    return some(50), some(2000)


@pytest.fixture(scope="module")
def index(people, tmp_path_factory):
    path = tmp_path_factory.mktemp("search") / "g.faiss"
    build_index(people[1], path, lists=16, codes=12, probes=16)
    return path


@pytest.mark.parametrize("cross_camera", [False, True])
def test_what_an_index_finds_is_scored_exactly(people, index, cross_camera):
    q, g = people
    wanted = search(q, g, k=10, cross_camera=cross_camera)
    ranks = search(q, g, k=10, cross_camera=cross_camera, index=index, shortlist=200)
    assert ranks.idx.tolist() == wanted.idx.tolist()  # all lists are looked into
    np.testing.assert_allclose(ranks.sim, wanted.sim, atol=1e-6)
    few = search(q, g, k=10, index=str(index), shortlist=10)
    assert (np.diff(few.sim) <= 0).all()
    for i in range(len(q)):
        by_hand = q.feats[i] @ g.feats[few.idx[i]].T / np.linalg.norm(g.feats[few.idx[i]], axis=1)
        np.testing.assert_allclose(few.sim[i], by_hand / np.linalg.norm(q.feats[i]), atol=1e-6)


def test_an_index_of_ones_own(people):
    import faiss

    q, g = people
    flat = faiss.IndexFlatIP(24)
    flat.add(g.feats / np.linalg.norm(g.feats, axis=1, keepdims=True))
    assert search(q, g, k=7, index=flat, shortlist=7).idx.tolist() == search(q, g, k=7).idx.tolist()


def test_an_index_file_is_one_of_faiss(people, index):
    import faiss

    there = faiss.read_index(str(index))
    assert (there.ntotal, there.d, there.nlist, there.nprobe, there.pq.M) == (2000, 24, 16, 16, 12)


def test_an_index_that_looks_into_few_lists_may_find_fewer(people, tmp_path):
    q, g = people
    build_index(g, tmp_path / "g.faiss", lists=40, probes=1)
    ranks = search(q, g, k=500, index=tmp_path / "g.faiss")
    assert (ranks.idx[:, -1] == -1).all() and (ranks.sim[ranks.idx == -1] == -np.inf).all()
    assert all(len(set(row[row >= 0])) == (row >= 0).sum() for row in ranks.idx)

    class Nothing:
        ntotal, d = g.feats.shape

        def search(self, queries, count):
            return None, np.full((len(queries), count), -1)

    assert (search(q, g, k=5, index=Nothing()).idx == -1).all()


def test_index_errors(people, index, tmp_path, monkeypatch):
    import faiss

    q, g = people
    with pytest.raises(FileNotFoundError, match="no such index: .*none"):
        search(q, g, index=tmp_path / "none")
    (tmp_path / "other").write_text("no index")
    with pytest.raises(ValueError, match="other is not an index of FAISS"):
        search(q, g, index=tmp_path / "other")
    with pytest.raises(ValueError, match="the gallery's 1999 items of dimension 24, got 2000 items of dimension 24"):
        search(q, g.subset(range(1999)), index=faiss.read_index(str(index)))
    with pytest.raises(ValueError, match="index must be of this gallery, got that of another: .*g.faiss"):
        search(q, g.subset(range(1999, -1, -1)), index=index)
    with pytest.raises(ValueError, match="at least 256 items for an index, got 255"):
        build_index(g.subset(range(255)), tmp_path / "few")
    for name in ("lists", "codes", "probes"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            build_index(g, tmp_path / "few", **{name: 0})
    with pytest.raises(ValueError, match="lists must be at most 51, a 39th of the items, got 52"):
        build_index(g, tmp_path / "few", lists=52)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ModuleNotFoundError, match="^an index needs FAISS: pip install faiss-cpu$"):
        search(q, g, index=index)
