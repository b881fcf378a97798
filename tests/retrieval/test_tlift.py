"""Temporal lifting against the definition, written as loops; numbers by hand; the clocks; errors."""

from dataclasses import dataclass, replace
from importlib import import_module

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reid3d.retrieval import Features, clock_seconds, tlift

from .test_metrics import angle, features


def seen(camids, frames, feats=None) -> Features:
    """People under these cameras at these frames."""
    n = len(camids)
    return replace(features(np.ones((n, 2)) if feats is None else feats, [1] * n, camids), times=np.array(frames, int))


@dataclass
class Split:
    """All that a clock needs to know of a split."""

    camids: np.ndarray
    times: np.ndarray

    def __len__(self) -> int:
        return len(self.camids)


def by_definition(q, g, scores, seconds, tau, sigma, k, alpha) -> np.ndarray:
    out = np.zeros((len(q), len(g)))
    for a in range(len(q)):
        near = [b for b in range(len(q)) if q.camids[b] == q.camids[a] and abs(seconds[0][b] - seconds[0][a]) < tau]
        for camera in set(g.camids.tolist()):
            there = [x for x in range(len(g)) if g.camids[x] == camera]
            block = sorted((float(scores[b, x]) for b in near for x in there), reverse=True)
            least = block[min(k, len(block)) - 1]
            pivots = [x for b in near for x in there if scores[b, x] >= least]
            for x in there:
                p = np.mean([np.exp(-(((seconds[1][y] - seconds[1][x]) / sigma) ** 2)) for y in pivots])
                out[a, x] = (p + alpha) * scores[a, x]
    return out


def test_by_hand():
    """A and B pass together. B is found for certain at 40 s, so the one of A's two candidates near then is lifted."""
    q, g = seen([1, 1, 1], [0, 60 * 25, 100 * 25]), seen([2, 2, 2], [1000 * 25, 40 * 25, 50 * 25])
    scores = np.array([[0.6, 0.1, 0.5], [0.1, 0.9, 0.2], [0, 1, 0]], np.float32)
    lifted = tlift(q, g, scores, tau=100, sigma=10, k=1, alpha=0.2)
    # The third is 100 s from A: not less than tau, so that its 1 is no pivot of A.
    wanted = [0.2 * 0.6, 1.2 * 0.1, (np.exp(-1) + 0.2) * 0.5]
    np.testing.assert_allclose(lifted[0], wanted, atol=1e-6)
    assert lifted.dtype == np.float32 and scores[0].argmax() == 0 and lifted[0].argmax() == 2


def test_pivots_by_hand():
    """Found by two they count twice, ties with the k-th join, fewer than k are all, one's own camera is lifted too."""
    q, g = seen([1, 1], [0, 0]), seen([1, 1, 1, 2], [0, 25, 50, 0])
    scores = np.array([[0.8, 0.5, 0.1, 0.4], [0.8, 0.5, 0.5, 0.0]], np.float32)
    one, two = np.exp(-1), np.exp(-4)  # one and two seconds away
    lifted = tlift(q, g, scores, sigma=1, k=3, alpha=0)  # 0.8, 0.8, 0.5 and the two 0.5 that tie
    p = np.array([2 + 2 * one + two, 2 * one + 2 + one, 2 * two + 2 * one + 1]) / 5
    np.testing.assert_allclose(lifted[:, :3], p * scores[:, :3], atol=1e-6)
    np.testing.assert_allclose(lifted[:, 3], [0.4, 0], atol=1e-6)
    two_of_one = tlift(q, g, scores, sigma=1, k=2, alpha=0)  # both found the first
    np.testing.assert_allclose(two_of_one[0, :3], [0.8, one * 0.5, two * 0.1], atol=1e-6)


@st.composite
def problems(draw):
    """Scores in few values, so that they tie, and times in whole seconds."""
    n, m, top = draw(st.integers(1, 9)), draw(st.integers(1, 14)), draw(st.sampled_from([1, 4, 100]))

    def side(size):
        cameras = draw(st.lists(st.integers(1, 3), min_size=size, max_size=size))
        return seen(cameras, 25 * np.array(draw(st.lists(st.integers(0, 12), min_size=size, max_size=size))))

    scores = draw(st.lists(st.integers(0, top), min_size=n * m, max_size=n * m))
    return side(n), side(m), (np.array(scores) / top).astype(np.float32).reshape(n, m)


@settings(max_examples=200, deadline=None)
@given(problems(), st.integers(1, 12), st.integers(1, 13), st.sampled_from([0.5, 3.0]), st.sampled_from([7, 2**20]))
def test_against_the_definition(problem, k, tau, sigma, block):
    q, g, scores = problem
    module = import_module("reid3d.retrieval.tlift")
    before, module._BLOCK = module._BLOCK, block
    try:
        lifted = tlift(q, g, scores, tau=tau, sigma=sigma, k=k, alpha=0.2)
    finally:
        module._BLOCK = before
    wanted = by_definition(q, g, scores, clock_seconds("frames", q, g), tau, sigma, k, 0.2)
    np.testing.assert_allclose(lifted, wanted, atol=1e-6)


def test_many_with_times_far_from_zero():
    rng = np.random.default_rng(0)
    q = seen(rng.integers(1, 4, 60), rng.integers(0, 50_000, 60) + 900_000_000)
    g = seen(rng.integers(1, 4, 200), rng.integers(0, 50_000, 200) + 900_000_000)
    scores = rng.random((60, 200), np.float32)
    wanted = by_definition(q, g, scores, clock_seconds("frames", q, g), 100, 200, 10, 0.2)
    np.testing.assert_allclose(tlift(q, g, scores), wanted, atol=1e-6)


def test_the_order_changes_nothing_and_the_scores_stay():
    rng = np.random.default_rng(1)
    q, g = (seen(rng.integers(1, 3, n), rng.integers(0, 9000, n)) for n in (30, 80))
    scores = rng.random((30, 80), np.float32)
    lifted, kept = tlift(q, g, scores), scores.copy()
    rows, columns = rng.permutation(30), rng.permutation(80)
    moved = tlift(
        seen(q.camids[rows], q.times[rows]), seen(g.camids[columns], g.times[columns]), scores[np.ix_(rows, columns)]
    )
    np.testing.assert_allclose(moved, lifted[np.ix_(rows, columns)], atol=1e-6)
    np.testing.assert_array_equal(scores, kept)


def test_scores_fall_with_the_squared_distance_where_none_are_given():
    q, g = seen([1], [0], angle(0)), seen([2, 2, 3], [0, 0, 0], angle(60, 120, 0))
    np.testing.assert_allclose(tlift(q, g), 1.2 * np.exp([[-0.5 / 0.2, -1.5 / 0.2, 0]]), rtol=1e-5)


def test_empty_sides():
    some, none = seen([1, 2], [0, 0]), seen([], [])
    assert tlift(none, some).shape == (0, 2) and tlift(some, none).shape == (2, 0)
    assert [len(times) for times in clock_seconds("market-continuous", none, some)] == [0, 2]


@pytest.mark.parametrize(
    ("clock", "starts"),
    [("market-continuous", [0, 100, 200, 300, 400, 500]), ("market-official", [0, 100, 300, 700, 1500, 3100])],
)
def test_the_market_clocks(clock, starts):
    """Six sessions of a hundred frames; where the published code begins them is measured, not meant."""
    query = seen([1] * 6, [10**6 * s + 7 for s in range(6)])
    train = Split(np.array([1, 1, 1, 1, 1, 2]), 10**6 * np.array([0, 1, 2, 3, 4, 4]) + 100)
    seconds, of_train = clock_seconds(clock, query, train)
    np.testing.assert_allclose(seconds, (np.array(starts) + 7) / 25)
    assert of_train[-1] == 100 / 25  # each camera for itself; sessions without an image take no time


def test_the_other_clocks():
    q = seen([1, 8], [100, 1_000_050])
    assert [t.tolist() for t in clock_seconds("frames", q)] == [[4.0, 40_002.0]]
    assert [t.tolist() for t in clock_seconds("seconds", q)] == [[100.0, 1_000_050.0]]
    np.testing.assert_allclose(clock_seconds("duke", q)[0], [5642 / 59.94, 1_046_815 / 59.94])


def test_seconds_of_any_kind():
    q, g = seen([1, 1], [0, 0]), seen([2, 2], [0, 0])
    scores = np.array([[0.5, 0.5], [0.9, 0.1]], np.float32)
    seconds = [5.25, 6.5], np.array([-3.5, 1e5])
    wanted = by_definition(q, g, scores, seconds, 2, 3, 1, 0.2)
    np.testing.assert_allclose(tlift(q, g, scores, seconds=seconds, tau=2, sigma=3, k=1), wanted, atol=1e-6)


def test_who_is_exactly_tau_away_does_not_count():
    """At 25 frames a second 2,500 frames are 100 s, which floating point has in some places only."""
    for start in range(0, 4000, 7):
        q, g = seen([1, 1], [start, start + 2500]), seen([2, 2], [0, 0])
        scores = np.array([[0.9, 0.1], [0.2, 0.8]], np.float32)
        alone = [tlift(q.subset(np.array([i])), g, scores[i : i + 1], k=1)[0] for i in range(2)]
        np.testing.assert_array_equal(tlift(q, g, scores, k=1), alone)


def test_errors():
    q, g = seen([1, 2], [3, 4]), seen([1, 2, 3], [3, 4, 5])
    scores = np.full((2, 3), 0.5, np.float32)
    for name, bad in (("tau", 0), ("tau", np.nan), ("sigma", -1), ("sigma", np.inf)):
        with pytest.raises(ValueError, match=f"{name} must be positive and finite, got {bad}"):
            tlift(q, g, scores, **{name: bad})
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        tlift(q, g, scores, k=0)
    with pytest.raises(ValueError, match="alpha must be at least 0 and finite, got -0.1"):
        tlift(q, g, scores, alpha=-0.1)
    with pytest.raises(ValueError, match=r"scores must have shape \(2, 3\), got \(3, 2\)"):
        tlift(q, g, scores.T)
    with pytest.raises(TypeError, match="scores must be a float32 NumPy array, got float64"):
        tlift(q, g, scores.astype(float))
    for bad in (np.nan, -0.1, 1.1):
        with pytest.raises(ValueError, match="scores must be between 0 and 1, got values in"):
            tlift(q, g, np.where(np.eye(2, 3) > 0, scores, np.float32(bad)).astype(np.float32))
    with pytest.raises(ValueError, match="camids must be known, got 1 of 2 that are not"):
        tlift(seen([1, -1], [3, 4]), g, scores)
    for unknown in (replace(q, times=None), seen([1, 2], [-1, -1])):
        with pytest.raises(ValueError, match="times must be known, got 2 of 2 that are not"):
            tlift(unknown, g, scores)
    for bad in (np.zeros(2), np.array([0, 1, np.nan])):
        with pytest.raises(ValueError, match=r"seconds of g must be \(3,\) finite numbers, got shape"):
            tlift(q, g, scores, seconds=(np.zeros(2), bad))
    with pytest.raises(ValueError, match="q and g must be features of one model, got made_by a and b"):
        tlift(replace(q, made_by="a"), replace(g, made_by="b"))
    with pytest.raises(ValueError, match="seconds must be two arrays, of q and of g, got 3"):
        tlift(q, g, scores, seconds=clock_seconds("frames", q, g, q))
    with pytest.raises(ValueError, match="clock must be 'frames', .* got 'market'"):
        clock_seconds("market", q)
    with pytest.raises(ValueError, match="camids must be from 1 to 8 for the clock 'duke', got \\[1 9\\]"):
        clock_seconds("duke", seen([1, 9], [0, 0]))
    with pytest.raises(ValueError, match="same dimension, got 2 and 3"):
        tlift(q, seen([1], [0], [[1, 0, 0]]))
