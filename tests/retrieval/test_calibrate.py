"""Calibration against loops over all pairs; its file, its errors."""

import json
from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest

from reid3d.retrieval import Calibration, calibrate

from .test_metrics import features

MODULE = import_module("reid3d.retrieval.calibrate")


def crowd(seed, people=14, queries=40, gallery=160, spread=1.0):
    """Noisy images of some people, with junk, distractors and unknown cameras, also among the queries."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((people + 1, 6))
    sides = []
    for n in (queries, gallery):
        pids = rng.integers(-1, people + 1, n)
        feats = centres[pids] + spread * rng.standard_normal((n, 6))
        sides.append(features(feats, pids, rng.integers(-1, 4, n)))
    return sides


def pairs(q, g):
    """(similarity, query pid, gallery pid) of the pairs that count."""
    unit = [
        side.feats.astype(float) / np.linalg.norm(side.feats.astype(float), axis=1, keepdims=True) for side in (q, g)
    ]
    for i in range(len(q)):
        for j in range(len(g)):
            a, b = q.pids[i], g.pids[j]
            if a <= 0 or b == -1 or (a == b and q.camids[i] == g.camids[j] != -1):
                continue
            yield unit[0][i] @ unit[1][j], a, b


@pytest.mark.parametrize("seed", range(4))
def test_against_all_pairs(seed):
    q, g = crowd(seed)
    rates = (0.3, 0.1, 0.02)
    found = calibrate(q, g, rates)
    every = list(pairs(q, g))
    same = [s for s, a, b in every if a == b]
    different = [s for s, a, b in every if a != b]
    assert (found.same, found.different) == (len(same), len(different))
    assert found.people == len({pid for pid in [*q.pids, *g.pids] if pid > 0})
    assert [row.fmr for row in found.thresholds] == list(rates)
    for row in found.thresholds:
        at = row.similarity
        assert row.false_match == np.mean([s >= at for s in different]) <= row.fmr
        assert np.mean([s >= at - 2 / 65536 for s in different]) > row.fmr  # one step lower is too low
        assert row.match == np.mean([s >= at for s in same])


def test_intervals_are_those_of_people_drawn_anew(monkeypatch):
    monkeypatch.setattr(MODULE, "_RESAMPLES", 60)
    monkeypatch.setattr(MODULE, "_AT_ONCE", 7)
    q, g = crowd(5, people=12, queries=30, gallery=60)
    found = calibrate(q, g, (0.2,), seed=3)
    at = found.thresholds[0].similarity
    people = sorted({pid for pid in [*q.pids, *g.pids] if pid > 0})
    every = list(pairs(q, g))
    shares = []
    for draw in np.random.default_rng(3).multinomial(len(people), np.full(len(people), 1 / len(people)), 60):
        times = {0: 1, **dict(zip(people, draw, strict=True))}  # strangers are always there
        false = [(times[a] * times[b], s >= at) for s, a, b in every if a != b]
        match = [(times[a], s >= at) for s, a, b in every if a == b]
        shares.append([np.average([hit for _, hit in rows], weights=[n for n, _ in rows]) for rows in (false, match)])
    low, high = np.quantile(shares, (0.025, 0.975), axis=0)
    row = found.thresholds[0]
    np.testing.assert_allclose(row.false_match_interval, (low[0], high[0]), rtol=1e-9)
    np.testing.assert_allclose(row.match_interval, (low[1], high[1]), rtol=1e-9)
    assert low[0] < row.false_match < high[0] and low[1] < row.match < high[1]


def test_intervals_hold_what_other_people_give():
    """Of 40 worlds of as many people, the interval of one holds most of the others' rates, and is not much too wide."""
    worlds = [crowd(seed, people=30, queries=60, gallery=120) for seed in range(40)]
    first = calibrate(*worlds[0], (0.1,))
    low, high = first.thresholds[0].false_match_interval
    at = first.thresholds[0].similarity
    rates = [np.mean([s >= at for s, a, b in pairs(q, g) if a != b]) for q, g in worlds[1:]]
    held = np.mean([low <= rate <= high for rate in rates])
    assert held > 0.6 and high - low < 3 * (np.quantile(rates, 0.975) - np.quantile(rates, 0.025)), held


def test_order_block_and_junk_change_nothing(monkeypatch):
    q, g = crowd(1)
    whole = calibrate(q, g, (0.1, 0.05))
    monkeypatch.setattr(import_module("reid3d.retrieval.search"), "_BLOCK", 1000)  # several blocks from here on
    order = np.random.default_rng(0).permutation(len(g))
    mixed = features(g.feats[order], g.pids[order], g.camids[order])
    assert calibrate(q, mixed, (0.05, 0.1, 0.1)) == whole
    junk = features(np.concatenate([g.feats, q.feats]), [*g.pids, *[-1] * len(q)], np.concatenate([g.camids, q.camids]))
    assert calibrate(q, junk, (0.1, 0.05)) == whole


def test_the_file(tmp_path):
    q, g = crowd(0)
    found = calibrate(replace(q, made_by="x", source="clouds"), replace(g, made_by="x"), (0.1, 0.02))
    found.save(tmp_path / "c.json")
    assert Calibration.load(tmp_path / "c.json") == found and found.made_by == "x" and found.source == "clouds"
    assert found.threshold() is found.thresholds[1] and found.threshold(0.1) is found.thresholds[0]
    lines = str(found).splitlines()
    assert len(lines) == 4 and all(len(line) < 100 for line in lines)
    with pytest.raises(ValueError, match=r"^fmr must be one that was calibrated \(0.1, 0.02\), got 0.5$"):
        found.threshold(0.5)
    with pytest.raises(FileNotFoundError, match="no such calibration"):
        Calibration.load(tmp_path / "d.json")
    whole = json.loads((tmp_path / "c.json").read_text())
    for broken in (
        [],
        {**whole, "format": "other"},
        {**whole, "thresholds": []},
        {**whole, "thresholds": [{"fmr": 1}]},
        {**whole, "thresholds": [{**whole["thresholds"][0], "similarity": "high"}]},
        {**whole, "more": 1},
    ):
        (tmp_path / "d.json").write_text(json.dumps(broken))
        with pytest.raises(ValueError, match=r"d.json is not a reid3d calibration: "):
            Calibration.load(tmp_path / "d.json")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda q, g: (q, g, ()), "fmr must hold rates above 0 and below 1, got []"),
        (lambda q, g: (q, g, (0.1, 1)), "fmr must hold rates above 0 and below 1, got [0.1, 1]"),
        (lambda q, g: (q, g, (1e-9,)), "fmr must be at least 30 of the 5,"),
        (
            lambda q, g: (replace(q, made_by="a"), replace(g, made_by="b"), (0.1,)),
            "q and g must be features of one model",
        ),
        (lambda q, g: (q, replace(g, pids=np.full_like(g.pids, -1)), (0.1,)), "gallery must not be all junk"),
        (lambda q, g: (*(replace(s, pids=s.pids % 3) for s in (q, g)), (0.1,)), "at least 10 people are needed"),
        (
            lambda q, g: (*(replace(s, feats=np.ones_like(s.feats)) for s in (q, g)), (0.1,)),
            "no threshold can be found",
        ),
    ],
)
def test_errors(change, said):
    q, g, rates = change(*crowd(0))
    with pytest.raises(ValueError) as error:
        calibrate(q, g, rates)
    assert said in str(error.value)
