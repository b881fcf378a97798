"""Points of the ROC against a sort of all pairs."""

from importlib import import_module

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reid3d.retrieval import roc

from .test_metrics import cosines, features, problem, rows_of, sized

RATES = (0.0, 0.05, 0.1, 0.5, 1.0)


def by_sorting(sims, q, g, rate, cross_camera) -> tuple[float, float]:
    """Every similarity of a matching pair as the threshold, from the highest down, until too many others are above."""
    match, other = [], []
    for i in range(len(q)):
        for j in range(len(g)):
            same = q.pids[i] == g.pids[j]
            own = q.camids[i] == g.camids[j] != -1 if cross_camera else q.names[i] == g.names[j]
            if -1 not in (q.pids[i], g.pids[j]) and not (same and own):
                (match if same else other).append(float(sims[i, j]))
    best = (0.0, np.inf)
    for threshold in sorted(set(match), reverse=True):
        if sum(s >= threshold for s in other) / len(other) <= rate:
            best = (sum(s >= threshold for s in match) / len(match), threshold)
    return best


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32 - 1), st.booleans(), st.booleans())
def test_against_a_sort_of_all_pairs(seed, tied, cross_camera):
    sims, q, g = problem(seed, tied)
    q.pids[q.pids == 9] = -1
    options = {"scores": sims, "cross_camera": cross_camera}
    try:
        result = roc(q, g, RATES, **options)
    except ValueError as error:
        assert any(words in str(error) for words in ("have no match", "all junk", "all pairs match"))
        return
    wanted = [by_sorting(sims, q, g, rate, cross_camera) for rate in RATES]
    assert list(zip(result.tpr.tolist(), result.threshold.tolist(), strict=True)) == wanted


def test_blocks_features_and_order_change_nothing(monkeypatch, rng):
    sims, q, g = sized(rng)
    wanted = roc(q, g, RATES, scores=sims)
    assert 0 < wanted.tpr[1] < wanted.tpr[3] < wanted.tpr[4] == 1
    queries, items = rng.permutation(len(q)), rng.permutation(len(g))
    monkeypatch.setattr(import_module("reid3d.retrieval.pairs"), "_BLOCK", 1000)
    turned = roc(rows_of(q, queries), rows_of(g, items), RATES, scores=sims[queries][:, items])
    assert turned.tpr.tolist() == wanted.tpr.tolist() and turned.threshold.tolist() == wanted.threshold.tolist()
    assert (turned.num_match, turned.num_other) == (wanted.num_match, wanted.num_other)
    directions = np.eye(5, dtype=np.float32)
    q, g = (features(directions[rng.integers(0, 5, len(side))], side.pids, side.camids) for side in (q, g))
    assert roc(q, g, RATES).tpr.tolist() == roc(q, g, RATES, scores=cosines(q, g)).tpr.tolist()


def test_a_perfect_and_a_worst_order():
    q, g = features([[0]], [1]), features(np.zeros((4, 1)), [1, 2, 3, 4])
    best = roc(q, g, (0.0, 1.0), scores=np.array([[4, 3, 2, 1]], np.float32))
    assert best.tpr.tolist() == [1, 1] and best.threshold.tolist() == [4, 4]
    worst = roc(q, g, (0.0, 0.99, 1.0), scores=np.array([[1, 2, 3, 4]], np.float32))
    assert worst.tpr.tolist() == [0, 0, 1] and worst.threshold.tolist() == [np.inf, np.inf, 1]
    assert (worst.num_match, worst.num_other) == (1, 3)


def test_errors():
    q, g = features([[0]], [1]), features([[0], [0]], [1, 2])
    scores = np.zeros((1, 2), np.float32)
    for rates in ((0.1, 1.1), (-0.1,), (np.nan,), 0.1):
        with pytest.raises(ValueError, match="fpr must be a list of shares between 0 and 1, got"):
            roc(q, g, rates, scores=scores)
    with pytest.raises(ValueError, match="all pairs match"):
        roc(q, features([[0]], [1]), scores=scores[:, :1])
    with pytest.raises(ValueError, match="scores must not hold NaN, got one for 0.jpg and 1.jpg"):
        roc(q, g, scores=np.array([[0, np.nan]], np.float32))
