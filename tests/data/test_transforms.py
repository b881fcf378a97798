"""Clouds on their way to a network, against the steps written out, then the draws."""

import numpy as np
import pytest
import torch

from reid3d.cloud import PointCloud
from reid3d.data.transforms import EvalTransform, TrainTransform, place


def make_cloud(n, seed=0):
    rng = np.random.default_rng(seed)
    xyz = rng.normal(size=(n, 3)).astype(np.float32) + np.float32([1, 2, 3])
    return PointCloud(xyz, rng.integers(0, 256, (n, 3)).astype(np.uint8), np.full(n, -1, np.int32))


def rng(seed=0):
    return np.random.default_rng(seed)


def still(points, **changes):
    return TrainTransform(points, **{"flip": False, "scale": False, "jitter": False, **changes})


def test_eval_by_hand():
    cloud = make_cloud(10)
    xyz, rgb = EvalTransform(points=5)(cloud, rng())
    chosen = [0, 2, 4, 6, 9]  # 0, 2.25, 4.5, 6.75, 9 rounded down
    torch.testing.assert_close(xyz, torch.from_numpy(cloud.xyz[chosen] - cloud.xyz.mean(0)))
    torch.testing.assert_close(rgb, torch.from_numpy(cloud.rgb[chosen] / 255 - 0.5).float())
    assert xyz.dtype == rgb.dtype == torch.float32


@pytest.mark.parametrize("make", [EvalTransform, still])
def test_without_background_there_is_only_the_body(make):
    cloud = make_cloud(12)
    body = np.array([1, 4, 5, 9])
    cloud.vertex[body] = 7
    xyz, rgb = make(4, background=False)(cloud, rng())
    torch.testing.assert_close(xyz, torch.from_numpy(cloud.xyz[body] - cloud.xyz[body].mean(0)))
    torch.testing.assert_close(rgb, torch.from_numpy(cloud.rgb[body] / 255 - 0.5).float())
    alone = make_cloud(12)  # of which nothing would be left
    torch.testing.assert_close(make(6, background=False)(alone, rng())[0], make(6)(alone, rng())[0])


def test_eval_takes_every_second_point_of_a_whole_crop():
    cloud = make_cloud(8192)
    xyz, _ = EvalTransform()(cloud, rng())
    second = torch.from_numpy(cloud.xyz[::2] - cloud.xyz.mean(0))
    assert xyz.shape == (4096, 3)
    torch.testing.assert_close(xyz[:4095], second[:4095])  # the last one taken is the cloud's last


def test_white_is_a_colour_and_the_whole_range_is_kept():
    cloud = make_cloud(4)
    cloud.rgb[:] = [[255, 255, 255], [0, 0, 0], [255, 0, 51], [255, 255, 255]]
    _, rgb = EvalTransform(points=4)(cloud, rng())
    expected = torch.tensor([[0.5, 0.5, 0.5], [-0.5, -0.5, -0.5], [0.5, -0.5, -0.3], [0.5, 0.5, 0.5]])
    torch.testing.assert_close(rgb, expected)


def test_few_points_repeat():
    cloud = make_cloud(3)
    for transform in (EvalTransform(6), still(6)):
        xyz, rgb = transform(cloud, rng())
        assert xyz.shape == rgb.shape == (6, 3)
        assert len(xyz.unique(dim=0)) == 3


def test_the_cloud_is_left_as_it_is():
    cloud = make_cloud(50)
    before = cloud.xyz.copy(), cloud.rgb.copy()
    xyz, rgb = TrainTransform(points=50)(cloud, rng())
    xyz.zero_(), rgb.zero_()
    assert np.array_equal(cloud.xyz, before[0]) and np.array_equal(cloud.rgb, before[1])


def test_same_generator_same_tensors():
    cloud, transform = make_cloud(100), TrainTransform(points=40)
    first, again, other = transform(cloud, rng(1)), transform(cloud, rng(1)), transform(cloud, rng(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    for seed in (1, 2):
        assert torch.equal(EvalTransform(40)(cloud, rng(seed))[0], EvalTransform(40)(cloud, rng())[0])


def test_points_are_random_half_the_time_and_always_in_order():
    cloud = make_cloud(60)
    cloud.xyz[:, 0] = np.arange(60)  # tells which points were taken
    evenly = EvalTransform(30)(cloud, rng())[0]
    same, seen = 0, np.zeros(60)
    for seed in range(400):
        xyz, _ = still(30)(cloud, rng(seed))
        index = xyz[:, 0].numpy()
        assert (np.diff(index) > 0).all()  # in file order, none twice
        if torch.equal(xyz, evenly):
            same += 1
        else:
            seen[np.rint(xyz[:, 0].numpy() + cloud.xyz[:, 0].mean()).astype(int)] += 1
    assert abs(same - 200) < 50
    assert (abs(seen / (400 - same) - 0.5) < 0.2).all()  # every point as often, the last included


def test_flip():
    cloud = make_cloud(20)
    plain = EvalTransform(20)(cloud, rng())[0]
    flipped = 0
    for seed in range(200):
        xyz, _ = still(20, flip=True)(cloud, rng(seed))
        assert torch.equal(xyz[:, 1:], plain[:, 1:])
        if torch.equal(xyz[:, 0], -plain[:, 0]):
            flipped += 1
        else:
            assert torch.equal(xyz, plain)
    assert abs(flipped - 100) < 36


def test_scale():
    cloud = make_cloud(20)
    plain = EvalTransform(20)(cloud, rng())[0]
    factors = []
    for seed in range(300):
        xyz, _ = still(20, scale=True)(cloud, rng(seed))
        ratio = xyz / plain
        torch.testing.assert_close(ratio, ratio[:1].expand(20, 3))
        factors.append(ratio[0].numpy())
    factors = np.array(factors)
    assert (factors >= 0.75 - 1e-6).all() and (factors <= 1.33 + 1e-6).all()
    assert (abs(factors.mean(0) - 1.04) < 0.05).all()
    assert (abs(factors.std(0) - 0.58 / 12**0.5) < 0.02).all()
    assert abs(np.corrcoef(factors.T)[0, 1]) < 0.25  # an axis each


def test_jitter():
    cloud = make_cloud(5000)
    plain = EvalTransform(5000)(cloud, rng())[0]
    xyz, _ = still(5000, jitter=True)(cloud, rng())
    noise = (xyz - plain).numpy()
    assert abs(noise).max() <= 0.01 + 1e-6
    assert abs(noise.mean()) < 5e-4
    assert abs((abs(noise) > 0.00999).mean() - 0.317) < 0.02  # what a normal has beyond one deviation


@pytest.mark.parametrize("jitter", [False, True])
def test_a_batch_is_placed_as_each_cloud_is(jitter):
    transform, clouds = TrainTransform(40, jitter=jitter), [make_cloud(90, seed) for seed in range(6)]
    picked = [transform.pick(cloud, rng(seed)) for seed, cloud in enumerate(clouds)]
    assert all((xyz.dtype, rgb.dtype) == (torch.float32, torch.uint8) for xyz, rgb, _ in picked)
    for cloud, (xyz, rgb, _) in zip(clouds, picked, strict=True):  # points of the cloud, as they are
        rows = {(*a, *b) for a, b in zip(cloud.xyz.tolist(), cloud.rgb.tolist(), strict=True)}
        assert {(*a, *b) for a, b in zip(xyz.tolist(), rgb.tolist(), strict=True)} <= rows
    generators = [rng(seed) for seed in range(6)]
    alone = [transform(cloud, generator) for cloud, generator in zip(clouds, generators, strict=True)]
    noise = None
    if jitter:
        plain = [place(*(part[None] for part in one))[0][0] for one in picked]
        noise = torch.stack([(xyz - still) / 0.01 for (xyz, _), still in zip(alone, plain, strict=True)])
    xyz, rgb = place(*(torch.stack(part) for part in zip(*picked, strict=True)), noise)
    torch.testing.assert_close(xyz, torch.stack([one for one, _ in alone]))
    assert torch.equal(rgb, torch.stack([one for _, one in alone]))


def test_errors():
    empty = PointCloud(np.zeros((0, 3), np.float32), np.zeros((0, 3), np.uint8), np.zeros(0, np.int32))
    for kind in (EvalTransform, TrainTransform):
        with pytest.raises(ValueError, match="at least one point"):
            kind(points=8)(empty, rng())
        with pytest.raises(ValueError, match="points must be positive, got 0"):
            kind(points=0)(make_cloud(4), rng())
