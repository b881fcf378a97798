"""Explanations: against gradients taken by differences, toy models whose answer is known, and what sums must be."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import reid3d
from reid3d.baselines.image_model import ImageModel, Part
from reid3d.baselines.plr_osnet import plr_osnet
from reid3d.baselines.qaconv import QAConv
from reid3d.baselines.relation import RelationNet
from reid3d.baselines.rmgl import RMGL
from reid3d.cloud import PointCloud
from reid3d.explain import activation_maps, points_at, position_matches, saliency
from reid3d.io import Record
from tests.capsules import capsule_person


class SumOfPoints(nn.Module):
    """Clouds to the sum over points of a linear layer of (xyz, rgb), of which dropout takes some in training."""

    inputs = "cloud"

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 5, bias=False)
        self.drop = nn.Dropout(0.5)

    def forward(self, xyz, rgb):
        return self.drop(self.linear(torch.cat((xyz, rgb), 2))).sum(1)


class Trunk(nn.Module):
    """Crops to maps of a 16th of their size."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.conv = nn.Conv2d(3, channels, 16, 16)

    def forward(self, images):
        return self.conv(images)


class Toy(ImageModel):
    """Two parts of one map: a linear layer of the mean of each half, brought to length 1 each; and the maximum."""

    flip = False
    normalised = False

    def __init__(self, flip: bool = False) -> None:
        super().__init__()
        self.flip = flip
        self.trunk = Trunk(4)
        self.linear = nn.Linear(8, 6, bias=False)

    def last_maps(self, images):
        return (self.trunk(images),)

    def parts(self, maps):
        halves = maps[0].unflatten(2, (2, -1)).mean((3, 4)).flatten(1)
        return {"halves": Part(0, self.linear(halves)), "most": Part(0, maps[0].amax((2, 3)))}

    def from_maps(self, maps):
        return torch.cat([F.normalize(part.feats) for part in self.parts(maps).values()], 1)


def clouds(count: int = 2, points: int = 40, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, count, points, 3, generator=generator, dtype=dtype).unbind(0)


def images(count: int = 2, size: tuple[int, int] = (64, 32), dtype=torch.float64):
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(1), dtype=dtype)


def randomise(model: nn.Module) -> nn.Module:
    """Norms that are no identity."""
    generator = torch.Generator().manual_seed(2)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and tensor.dim() == 1:
            low = 0.5 if "var" in name or "weight" in name else -0.5
            tensor.data.uniform_(low, low + 1, generator=generator)
    return model


def untouched(model: nn.Module, explain) -> None:
    """Runs it, and sees that neither gradients nor modes nor parameters are others than before."""
    model.train()
    frozen = next(module for module in model.modules() if not list(module.children()))
    frozen.training = False
    modes = [module.training for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    explain()
    with torch.inference_mode():
        explain()
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_saliency_of_a_linear_model_is_known():
    model = SumOfPoints().double()
    xyz, rgb = clouds()
    target = torch.randn(2, 5, dtype=torch.float64)
    feats = model.eval()(xyz, rgb).detach()
    unit, wanted = F.normalize(feats), F.normalize(target)
    cosine = (unit * wanted).sum(1, keepdim=True)
    weight = (wanted - cosine * unit) / feats.norm(dim=1, keepdim=True) @ model.linear.weight  # (B, 6)
    expected = (torch.cat((xyz, rgb), 2) * weight[:, None]).abs().sum(2)
    torch.testing.assert_close(saliency(model, xyz, rgb, target), expected.detach())
    torch.testing.assert_close(saliency(model, xyz, rgb, 7 * target), expected.detach())  # of any length
    length = (torch.cat((xyz, rgb), 2) * (unit / feats.norm(dim=1, keepdim=True) @ model.linear.weight)[:, None]).abs()
    torch.testing.assert_close(saliency(model, xyz, rgb), length.sum(2).detach())


def test_saliency_of_ognet_is_what_differences_say():
    torch.manual_seed(0)
    model = reid3d.create_model("ognet_small", init_points=64, k=8).double().eval()
    xyz, rgb = clouds(1, 150)
    xyz, rgb = xyz * 0.3, rgb * 0.2
    target = torch.randn(512, dtype=torch.float64)
    found = saliency(model, xyz, rgb, target)[0]

    def cosine(a, b):
        with torch.no_grad():
            return F.cosine_similarity(model(a, b), target[None]).item()

    step = 1e-6  # short of what would change a neighbourhood
    for point in [*found.argsort()[-3:].tolist(), 0, 75]:
        expected = 0.0
        for which, axis in ((w, a) for w in range(2) for a in range(3)):
            moved = [[x.clone() for x in (xyz, rgb)] for _ in range(2)]
            for sign, pair in zip((1, -1), moved, strict=True):
                pair[which][0, point, axis] += sign * step
            slope = (cosine(*moved[0]) - cosine(*moved[1])) / (2 * step)
            expected += abs(slope * (xyz, rgb)[which][0, point, axis].item())
        assert found[point].item() == pytest.approx(expected, rel=1e-4, abs=1e-10)


@pytest.mark.parametrize("name", ["ognet", "ognet_deep", "dgcnn", "pointnet2_ssg"])
def test_saliency_of_each_kind_of_network(name):
    """One value a point, some above 0; those of a cloud do not depend on the others."""
    torch.manual_seed(0)
    small = {"ognet": {"init_points": 128}, "ognet_deep": {"init_points": 160}}.get(name, {})
    model = reid3d.create_model(name, **small)
    xyz, rgb = clouds(2, 520, torch.float32)
    xyz, rgb = xyz * 0.3, rgb * 0.2
    both = saliency(model, xyz, rgb, torch.ones(512))
    assert both.shape == (2, 520) and both.isfinite().all() and (both >= 0).all() and both.any()
    alone = saliency(model, xyz[1:], rgb[1:], torch.ones(512))
    torch.testing.assert_close(both[1:], alone, rtol=1e-3, atol=1e-7)


def test_explaining_leaves_a_model_as_it_was():
    xyz, rgb = clouds()
    model = SumOfPoints().double()
    untouched(model, lambda: saliency(model, xyz, rgb, torch.ones(5)))
    toy = Toy().double()
    untouched(toy, lambda: activation_maps(toy, images()))
    assert not xyz.requires_grad and xyz.grad is None


def test_a_model_that_fails_gets_its_mode_back():
    model = reid3d.create_model("ognet_small")
    with pytest.raises(ValueError, match="xyz must have N >= 768 points, got 40"):
        saliency(model, *clouds(dtype=torch.float32))
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("flip", [False, True])
def test_maps_of_a_linear_model_add_up_to_the_cosine(flip):
    """The descriptor that `extract` makes is that of the image, plus that of its mirror image where the method says."""
    torch.manual_seed(0)
    model, crops = Toy(flip).double().eval(), images()
    other = torch.randn(2, 10, dtype=torch.float64)
    found = activation_maps(model, crops, other)
    assert list(found) == ["halves", "most"] and all(maps.shape == (2, 4, 2) for maps in found.values())
    with torch.no_grad():
        feats = model(crops) + model(crops.flip(3)) if flip else model(crops)
    summands = F.normalize(feats) * F.normalize(other)
    torch.testing.assert_close(found["halves"].sum((1, 2)), summands[:, :6].sum(1))
    torch.testing.assert_close(found["most"].sum((1, 2)), summands[:, 6:].sum(1))
    own = activation_maps(model, crops)
    torch.testing.assert_close(sum(maps.sum((1, 2)) for maps in own.values()), torch.ones(2, dtype=torch.float64))
    one = activation_maps(model, crops[1:], other[1])
    torch.testing.assert_close(one["halves"][0], found["halves"][1])


def test_what_is_pooled_by_maximum_lies_where_the_maximum_is():
    torch.manual_seed(0)
    model, crops = Toy().double().eval(), images(1)
    maps = model.trunk(crops)[0].detach()
    target = torch.zeros(10, dtype=torch.float64)
    target[6:] = torch.rand(4, dtype=torch.float64) + 0.1
    expected = torch.zeros(4, 2, dtype=torch.float64)
    weight = F.normalize(target, dim=0)[6:] / maps.amax((1, 2)).norm() / 2**0.5
    for channel, share in zip(maps, weight, strict=True):
        place = channel.flatten().argmax().item()
        expected[place // 2, place % 2] += share * channel.amax()
    found = activation_maps(model, crops, target)
    torch.testing.assert_close(found["most"][0], expected)
    assert not found["halves"].any()


def test_parts_of_plr_osnet():
    """Strips see their own rows alone; with norms that add nothing the maps add up to the cosine."""
    torch.manual_seed(0)
    model = randomise(plr_osnet()).double()
    for norm in (model.bn1, model.bn2):
        norm.running_mean.zero_(), norm.bias.data.zero_()
    model.fc2.bias.data.zero_()
    crops, other = images(2, (64, 32)), torch.randn(2, 2560, dtype=torch.float64)
    found = activation_maps(model, crops, other)
    assert list(found) == ["strip 1/4", "strip 2/4", "strip 3/4", "strip 4/4", "global"]
    for i in range(4):
        rows = found[f"strip {i + 1}/4"].abs().sum((0, 2)) > 0
        assert rows.tolist() == [row == i for row in range(4)]
    with torch.no_grad():
        cosine = F.cosine_similarity(model.eval()(crops), other)
    torch.testing.assert_close(sum(maps.sum((1, 2)) for maps in found.values()), cosine)


def test_parts_of_the_relation_network():
    torch.manual_seed(0)
    model = RelationNet(Trunk(6), (2, 4), dim=8)
    names = ["strip 1/2", "strip 2/2", *(f"strip {i}/4" for i in range(1, 5)), "global/2", "global/4"]
    crops = images(1, (128, 64), torch.float32)
    found = activation_maps(model, crops)
    assert list(found) == names and all(maps.shape == (1, 8, 4) for maps in found.values())
    mirrored = activation_maps(model, crops.flip(3))  # the descriptor is that of both
    for name in names:
        torch.testing.assert_close(mirrored[name], found[name].flip(2), rtol=1e-3, atol=1e-6)


def test_parts_of_rmgl():
    torch.manual_seed(0)
    model = RMGL(0, (2, 3), blocks=(1, 1, 1, 1), width=4, dim=6)
    paths = [
        [f"{path}global/{k}", *(f"{path}strip {i}/{k}" for i in range(1, k + 1))]
        for k in (2, 3)
        for path in ("", "receptive ")
    ]
    found = activation_maps(model, images(1, (96, 32), torch.float32))
    assert list(found) == [name for path in paths for name in path] and len(found) == 14
    assert all(maps.shape == (1, 6, 2) for maps in found.values())
    twice = RMGL(0, (2, 2), receptive=False, blocks=(1, 1, 1, 1), width=4, dim=6)
    assert len(activation_maps(twice, images(1, (96, 32), torch.float32))) == 6
    last = activation_maps(RMGL(0, (1,), blocks=(1, 1, 1, 1), width=4, dim=6), images(1, (96, 32), torch.float32))
    assert list(last) == ["global/1"]


@pytest.mark.parametrize("make", [lambda: plr_osnet(), lambda: RelationNet(Trunk(6), (2, 4), dim=8)])
def test_the_parts_are_the_descriptor(make):
    model = randomise(make()).eval()
    with torch.no_grad():
        maps = model.last_maps(model.prepare(images(2, (128, 64), torch.float32)))
        feats, start = model.from_maps(maps), 0
        for part in model.parts(maps).values():
            own = feats[:, start : start + part.feats.shape[1]]
            torch.testing.assert_close(F.cosine_similarity(own, part.feats), torch.ones(2))
            start += part.feats.shape[1]
    assert start == feats.shape[1]


def qaconv() -> QAConv:
    torch.manual_seed(0)
    return QAConv(Trunk(6), height=64, width=32, channels=5).eval()


def test_matches_of_places():
    """By hand, from the correspondences: one for each place there, the most similar, best contributions first."""
    model = qaconv()
    one, other = torch.randn(2, 5, 4, 2, generator=torch.Generator().manual_seed(3))
    every = model.correspondences(one, other)
    best: dict[tuple, tuple] = {}
    for row in range(4):
        for column in range(2):
            there, sim = tuple(every.place[row, column].tolist()), every.similarity[row, column].item()
            if there not in best or sim > best[there][0]:
                best[there] = (sim, every.contribution[row, column].item(), (row, column))
    expected = sorted(((c, q, g) for g, (_, c, q) in best.items()), reverse=True)
    found = position_matches(model, one, other)
    assert [tuple(q) for q in found.query.tolist()] == [q for _, q, _ in expected]
    assert [tuple(g) for g in found.gallery.tolist()] == [g for _, _, g in expected]
    assert found.contribution.tolist() == pytest.approx([c for c, _, _ in expected])
    assert len(position_matches(model, one, other, count=2).query) == 2
    same = position_matches(model, one, one, count=99)
    assert torch.equal(same.query, same.gallery) and len(same.query) == 8
    torch.testing.assert_close(same.similarity, torch.ones(8))


def test_points_of_places():
    """Capsule people have a point in the middle of every pixel: places of a map as large as the crop are pixels."""
    cloud, record = capsule_person(3, 1, 0, size=(32, 16))
    places = torch.tensor([[0, 0], [31, 15], [16, 7], [5, 8]])
    for place, point in zip(places.tolist(), points_at(cloud, record, places, (32, 16)).tolist(), strict=True):
        assert np.floor(record.project(cloud.xyz[[point]])[0]).tolist() == place[::-1]
    coarse = points_at(cloud, record, torch.tensor([[2, 1]]), (4, 2))[0]  # a cell of 8 x 8 pixels with legs in it
    pixel = record.project(cloud.xyz)
    inside = (pixel >= [8, 16]).all(1) & (pixel < [16, 24]).all(1) & (cloud.vertex >= 0)
    away = np.where(inside, np.square(pixel - [12, 20]).sum(1), np.inf)
    assert away[coarse] == pytest.approx(away.min())
    behind = cloud.vertex < 0
    background = PointCloud(cloud.xyz[behind], cloud.rgb[behind], cloud.vertex[behind])
    assert points_at(background, record, torch.tensor([[16, 7]]), (32, 16)).tolist() == [-1]


def test_where_points_are_in_the_crop():
    record = Record("a", "all", 1, 1, -1, (100, 40), (0.5, 0.1, -0.2), aspect=0.5)
    x, y = record.project(np.array([[0.3, 0.7, 9.0]]))[0]
    assert x == pytest.approx((0.5 * (0.3 + 0.1) / 0.5 + 1) * 40 / 2)
    assert y == pytest.approx((0.5 * (0.7 - 0.2) + 1) * 100 / 2)


def test_what_cannot_be_explained():
    xyz, rgb = clouds()
    with pytest.raises(ValueError, match="model must take clouds, got one that takes images: see activation_maps"):
        saliency(Toy(), xyz, rgb)
    with pytest.raises(ValueError, match="model must take images, got one that takes clouds: see saliency"):
        activation_maps(SumOfPoints(), images())
    with pytest.raises(ValueError, match="compares places: see position_matches"):
        activation_maps(qaconv(), images())
    for target in (torch.ones(4), torch.ones(3, 5), torch.ones(1, 1, 5), torch.ones(())):
        with pytest.raises(ValueError, match=r"target must be \(5,\) or \(2, 5\), got"):
            saliency(SumOfPoints().double(), xyz, rgb, target)
    with pytest.raises(ValueError, match="as QAConv does, got Toy"):
        position_matches(Toy(), torch.ones(5, 4, 2), torch.ones(5, 4, 2))
    with pytest.raises(ValueError, match="query_map must have shape"):
        position_matches(qaconv(), torch.ones(5, 2, 4), torch.ones(5, 4, 2))
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        position_matches(qaconv(), torch.ones(5, 4, 2), torch.ones(5, 4, 2), count=0)
    cloud, record = capsule_person(3, 1, 0, size=(32, 16))
    with pytest.raises(ValueError, match="places must be"):
        points_at(cloud, record, torch.tensor([[4, 0]]), (4, 2))
