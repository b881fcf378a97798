"""Samplers: what the batches are made of, how often each cloud is drawn, and that seed and epoch decide it all.

`BalancedSampler` is tested with training.
"""

import math

import numpy as np
import pytest

from reid3d.data.samplers import BalancedSampler, Batches, ClassSampler, PKSampler


def epochs(sampler, count):
    for epoch in range(count):
        sampler.set_epoch(epoch)
        drawn, draws = np.array(list(sampler)).T
        assert draws.tolist() == list(range(len(sampler)))
        yield drawn


def people(*counts):
    """Labels, in no order, of identities with as many clouds."""
    return np.random.default_rng(5).permutation(np.repeat(10 * np.arange(len(counts)), counts))


class TestPKSampler:
    COUNTS = (4, 4, 7, 5, 9, 2, 3, 1, 6, 12, 4, 5)

    @pytest.mark.parametrize("p, k", [(3, 4), (4, 2), (2, 3), (11, 2)])
    def test_batches_are_p_identities_with_k_clouds(self, p, k):
        labels = people(*self.COUNTS)
        sampler = PKSampler(labels, p=p, k=k, seed=1)
        assert len(sampler) == len(labels) // (p * k) * p * k
        for drawn in epochs(sampler, 8):
            for batch in drawn.reshape(-1, p, k):
                same = labels[batch]
                assert (same == same[:, :1]).all() and len(set(same[:, 0])) == p
                for clouds in batch:
                    there = (labels == labels[clouds[0]]).sum()
                    _, times = np.unique(clouds, return_counts=True)
                    assert len(times) == min(there, k)  # repeats only as needed,
                    assert times.max() - times.min() <= 1  # and evenly

    def test_each_cloud_is_drawn_equally_often(self):
        labels = people(*self.COUNTS)
        count, rounds = np.zeros(len(labels)), 600
        for drawn in epochs(PKSampler(labels, p=3, k=4, seed=2), rounds):
            count += np.bincount(drawn, minlength=len(labels))
        share = count / rounds * len(labels) / 60  # 60 draws an epoch
        assert abs(share - 1).max() < 0.25  # of an only cloud, which comes four at a time, the deviation is 0.08
        assert np.bincount(labels // 10, count)[[4, 9]] / rounds * 62 / 60 == pytest.approx([9, 12], rel=0.02)

    def test_an_identity_has_its_share_of_turns_rounded_down_or_up(self):
        labels = people(*self.COUNTS)
        for drawn in epochs(PKSampler(labels, p=3, k=4, seed=3), 50):
            turns = np.bincount(labels[drawn] // 10, minlength=12) / 4
            assert (abs(turns - np.array(self.COUNTS) * 15 / 62) < 1).all()

    def test_a_big_identity_is_in_every_batch_once(self):
        labels = people(40, 3, 3, 2)
        seen = np.zeros(4)
        for drawn in epochs(PKSampler(labels, p=2, k=2, seed=0), 40):
            batches = labels[drawn].reshape(-1, 2, 2)[..., 0]
            assert ((batches == 0).sum(1) == 1).all()
            seen += np.bincount(batches.ravel() // 10, minlength=4)
        assert seen[1:] / seen[1:].sum() == pytest.approx([3 / 8, 3 / 8, 2 / 8], abs=0.03)

    def test_as_many_identities_as_a_batch_takes(self):
        labels = people(2, 9, 3)
        for drawn in epochs(PKSampler(labels, p=3, k=4), 5):
            assert sorted(labels[drawn][::4]) == [0, 10, 20]  # 14 clouds fill one batch of 12
        labels = people(2, 2)
        (drawn,) = epochs(PKSampler(labels, p=2, k=4), 1)  # 4 clouds would not fill one
        assert np.bincount(drawn).tolist() == [2, 2, 2, 2]

    @pytest.mark.parametrize(
        "cameras, k, least",
        [
            ([4, 4, 4, 4], 4, 4),
            ([4, 4], 4, 2),
            ([2, 2], 2, 2),
            ([5, 3, 2, 2], 3, 2),
            ([1, 1, 1], 4, 3),
            ([3, 3, 3, 3, 3, 3], 4, 3),
        ],
    )
    def test_clouds_of_one_identity_are_from_different_cameras(self, cameras, k, least):
        camids = np.random.default_rng(1).permutation(np.repeat(np.arange(len(cameras)), cameras))
        labels = np.repeat([0, 1], len(camids))
        camids = np.tile(camids, 2)
        distinct = [
            len(set(camids[clouds]))
            for drawn in epochs(PKSampler(labels, camids, p=2, k=k), 30)
            for clouds in drawn.reshape(-1, k)
        ]
        assert min(distinct) >= least

    def test_seed_and_epoch_decide(self):
        labels, camids = people(*self.COUNTS), np.arange(62) % 3
        sampler, twin = (PKSampler(labels, camids, p=3, k=4, seed=3) for _ in range(2))
        first = list(sampler)
        assert first == list(sampler) == list(twin)
        sampler.set_epoch(1)
        assert first != list(sampler)
        assert first != list(PKSampler(labels, camids, p=3, k=4, seed=4))

    @pytest.mark.parametrize(
        ("counts", "change", "message"),
        [
            ((2, 2, 1, 1, 1), {}, r"p must not exceed the 2 identities with at least 2 clouds \(of 5 in all\), got 3"),
            ((1, 1, 1), {}, r"p must not exceed the 0 identities with at least 2 clouds \(of 3 in all\), got 3"),
            ((2, 2, 2), {"p": 1}, "p must be at least 2, got 1"),
            ((2, 2, 2), {"k": 1}, "k must be at least 2, got 1"),
            ((2, 2, 2), {"seed": -1}, "seed must not be negative"),
            ((2, 2, 2), {"camids": np.zeros(5, int)}, r"camids must have the shape of labels, \(6,\), got \(5,\)"),
            ((), {}, "non-empty"),
        ],
    )
    def test_errors(self, counts, change, message):
        with pytest.raises(ValueError, match=message):
            PKSampler(people(*counts).astype(int), **{"p": 3, "k": 2, **change})

    def test_kinds(self):
        with pytest.raises(TypeError, match="labels must be integers"):
            PKSampler(np.array([0.5]), p=2, k=2)
        with pytest.raises(TypeError, match="camids must be integers"):
            PKSampler(people(2, 2), np.zeros(4), p=2, k=2)


class TestClassSampler:
    def test_passes_of_n_clouds_of_each_identity(self):
        labels = people(5, 1, 2, 10)
        sampler = ClassSampler(labels, 2, seed=1)
        assert len(sampler) == math.ceil(18 / 4 / 2) * 4 * 2 == 24
        seen = np.zeros(18)
        for drawn in epochs(sampler, 400):
            for one in drawn.reshape(3, 8):
                assert np.bincount(labels[one] // 10).tolist() == [2, 2, 2, 2]
                assert np.bincount(one, minlength=18)[labels != 10].max() == 1  # different ones, where there are two
            seen += np.bincount(drawn, minlength=18)
        for person, count in enumerate((5, 1, 2, 10)):
            assert seen[labels == 10 * person] / 400 == pytest.approx(np.full(count, 6 / count), rel=0.2)

    def test_market_has_six_passes(self):
        """12,936 clouds of 751 people, three of each: 6 passes, as in the published runs."""
        assert len(ClassSampler(np.arange(12936) % 751, 3)) == 6 * 751 * 3

    def test_seed_and_epoch_decide(self):
        labels = people(5, 1, 2, 10)
        sampler, twin = ClassSampler(labels, 2, seed=3), ClassSampler(labels, 2, seed=3)
        first = list(sampler)
        assert first == list(sampler) == list(twin)
        sampler.set_epoch(1)
        assert first != list(sampler)
        assert first != list(ClassSampler(labels, 2, seed=4))

    def test_errors(self):
        with pytest.raises(ValueError, match="n must be at least 1, got 0"):
            ClassSampler(people(2, 2), 0)
        with pytest.raises(TypeError, match="labels must be integers"):
            ClassSampler(np.array([0.5]), 1)


class TestBatches:
    def test_one_process(self):
        batches = Batches(BalancedSampler(people(5, 6), seed=1), 4)
        assert len(batches) == 2  # of 11 draws
        assert sum(batches, []) == list(BalancedSampler(people(5, 6), seed=1))[:8]
        before = list(batches)
        batches.set_epoch(1)
        assert list(batches) != before

    @pytest.mark.parametrize("make", [BalancedSampler, lambda y: ClassSampler(y, 2), lambda y: PKSampler(y, p=4, k=2)])
    def test_processes_share_each_batch_of_one_process(self, make):
        labels = people(5, 4, 3, 6, 4, 5)
        whole, parts = Batches(make(labels), 8), [Batches(make(labels), 2, rank, 4) for rank in range(4)]
        assert len(whole) == len(parts[0]) > 0
        for batch, *shares in zip(whole, *parts, strict=True):
            assert sum(shares, []) == batch
