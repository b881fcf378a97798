"""PointNet++ against its by-the-book form: every pair formed, convolutions 1x1 and BatchNorm over the pairs."""

import pytest
import torch
import torch.nn.functional as F

from reid3d.models import create_model
from reid3d.models import pointnet2 as module
from reid3d.models.head import Output
from reid3d.models.ognet import HOLE
from reid3d.models.pointnet2 import PointNet2, pointnet2_msg, pointnet2_ssg

from .against_the_book import (
    awkward,
    ball,
    batch_norm,
    check_eval,
    check_every_parameter_gets_a_gradient,
    check_float32,
    check_initialisation,
    check_training,
    clouds,
    conv,
    fps,
    gather,
)

# Balls part-filled and full, and MLPs that begin narrower and wider than what they take.
SCALES = (
    ((0.2, 8, (2, 6, 12)), (0.5, 16, (8, 8, 12))),
    ((0.4, 8, (8, 10, 12)), (0.8, 4, (32, 8, 16))),
)


def book(model, xyz, rgb):
    h, running = rgb, {}
    for abstraction, points in zip(model.abstractions, (*model.points_left, None), strict=True):
        if points is None:
            centers = torch.zeros_like(xyz[:, :1])
        else:
            centers = torch.stack([cloud[i] for cloud, i in zip(xyz, fps(xyz, points, HOLE), strict=True)])
        h = torch.cat([mlp(branch, centers, xyz, h, running) for branch in abstraction.branches], 2)
        xyz = centers
    linear, norm, _ = model.hidden
    h = F.leaky_relu(batch_norm(linear(h[:, 0]), norm, running), 0.2)
    return batch_norm(model.head.linear(h), model.head.norm, running), running


def mlp(branch, centers, xyz, h, running):
    if branch.radius is None:
        idx = torch.arange(xyz.shape[1]).expand(len(xyz), 1, -1)
    else:
        idx = ball(centers, xyz, branch.radius, branch.k)
    y = torch.cat((gather(xyz, idx) - centers.permute(0, 2, 1)[..., None], gather(h, idx)), 1)
    for i, (linear, norm) in enumerate(zip(branch.linears, branch.norms, strict=True)):
        y = batch_norm(conv(y, linear), norm, running)
        if branch.affine == 1 or i == 2:
            y = F.relu(y)
    return y.max(-1).values.transpose(1, 2)


def small(relu, **kwargs):
    torch.manual_seed(0)
    return awkward(PointNet2(SCALES, points=(24, 10), relu=relu, dropout=0.0, **kwargs).double())


def without_gradient(relu):
    """Two BatchNorms without a ReLU in between: the bias of the first goes."""
    return ("linear.bias", "hidden.0.bias", *(() if relu else ("norms.0.bias", "norms.1.bias")))


@pytest.mark.parametrize(("relu", "at_once"), [(False, 1 << 22), (True, 1 << 22), (True, 1)])
def test_eval_agrees_with_the_book(relu, at_once, monkeypatch):
    monkeypatch.setattr(module, "PAIRS", at_once)  # 1: one cloud at a time
    check_eval(small(relu), book)


@pytest.mark.parametrize("relu", [False, True])
def test_training_agrees_with_the_book(relu):
    check_training(small(relu), book, without_gradient(relu))


@pytest.mark.parametrize("relu", [False, True])
def test_float32_is_close_to_float64(relu):
    check_float32(small(relu), book)


@pytest.mark.parametrize(("model", "body"), [(pointnet2_ssg, 1_594_880), (pointnet2_msg, 1_865_664)])
def test_parameter_counts(model, body):
    """As published, without and with the classifier of Market-1501's 751 people."""
    assert sum(p.numel() for p in model().parameters()) == body
    assert sum(p.numel() for p in model(751).parameters()) == body + 385_263
    assert sum(p.numel() for p in model(relu=True).parameters()) == body


def test_published_sizes():
    model = create_model("pointnet2_msg", 3)
    assert (model.points_left, model.min_points, model.inputs) == ((512, 128), 512, "cloud")
    assert model.head.dropout.p == 0.7
    first, second, whole = model.abstractions
    assert [(b.radius, b.k) for b in first.branches] == [(0.1, 16), (0.2, 32), (0.4, 128)]
    assert [(b.radius, b.k) for b in second.branches] == [(0.2, 32), (0.4, 64), (0.8, 128)]
    assert [linear.in_features for b in second.branches for linear in b.linears[:1]] == [323] * 3
    assert [linear.in_features for linear in whole.branches[0].linears] == [643, 256, 512]
    first, second, _ = create_model("pointnet2_ssg").abstractions
    assert [(b.radius, b.k) for s in (first, second) for b in s.branches] == [(0.2, 64), (0.4, 64)]


@pytest.mark.parametrize("model", [pointnet2_ssg, pointnet2_msg])
def test_initialisation(model):
    torch.manual_seed(0)
    check_initialisation(model(751), is_fan_out=lambda name: name in ("hidden.0.weight", "head.linear.weight"))


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("model", [pointnet2_ssg, pointnet2_msg])
def test_every_parameter_gets_a_gradient(model, relu):
    torch.manual_seed(0)
    check_every_parameter_gets_a_gradient(model(5, points=(32, 12), relu=relu), without_gradient(relu))


def test_descriptor_is_before_dropout():
    torch.manual_seed(0)
    model = PointNet2(SCALES, 7, points=(24, 10))
    xyz, rgb = clouds(3, 64, dtype=torch.float32)
    first, second = model(xyz, rgb), model(xyz, rgb)
    assert isinstance(first, Output) and first.feats.shape == (3, 512) and first.logits.shape == (3, 7)
    assert torch.equal(first.feats, second.feats) and not torch.equal(first.logits, second.logits)
    torch.testing.assert_close(first.feats.mean(0), torch.zeros(512), rtol=0, atol=1e-5)
    assert PointNet2(SCALES, points=(24, 10))(xyz, rgb).logits is None


@pytest.mark.parametrize("relu", [False, True])
def test_one_colour_duplicates_and_as_many_as_sampled(relu):
    torch.manual_seed(0)
    model = PointNet2(SCALES, 3, points=(32, 10), relu=relu)
    xyz, rgb = clouds(3, 32, dtype=torch.float32)
    xyz[:, 16:] = xyz[:, :16]
    output = model(xyz, torch.full_like(rgb, 0.2))
    output.logits.sum().backward()
    assert torch.isfinite(output.feats).all()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    assert torch.isfinite(model.eval()(xyz, rgb)).all()


@pytest.mark.parametrize("training", [False, True])
def test_autocast_changes_nothing(training):
    model = small(True).float().train(training)
    xyz, rgb = clouds(2, 64, dtype=torch.float32)
    expected = model(xyz, rgb)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(xyz, rgb)[0], expected)


def test_errors():
    for points in (128, (128,), (128, 2.0), (True, 1), "ab"):
        with pytest.raises(TypeError, match="points must be two ints, got"):
            pointnet2_ssg(points=points)
    for points in ((10, 24), (10, 0)):
        with pytest.raises(ValueError, match="points must fall and be at least 1, got"):
            pointnet2_ssg(points=points)
    assert pointnet2_ssg(points=[64, 16]).points_left == (64, 16)  # as a file of weights gives them back
    model = small(False)
    xyz, rgb = clouds(2, 64)
    with pytest.raises(ValueError, match=r"\(B, N, 3\)"):
        model(xyz, rgb[:, :5])
    with pytest.raises(ValueError, match="N >= 24 points, got 23"):
        model(xyz[:, :23], rgb[:, :23])
    with pytest.raises(ValueError, match="more than 1 value"):
        model.train()(xyz[:1], rgb[:1])
