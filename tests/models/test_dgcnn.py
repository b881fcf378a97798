"""DGCNN against its by-the-book form: every edge formed, convolutions 1x1 and BatchNorm over the edges."""

import pytest
import torch
import torch.nn.functional as F

from reid3d.models import create_model
from reid3d.models.dgcnn import DGCNN, dgcnn
from reid3d.models.head import Output

from .against_the_book import (
    awkward,
    batch_norm,
    check_eval,
    check_every_parameter_gets_a_gradient,
    check_float32,
    check_initialisation,
    check_training,
    clouds,
    conv,
    gather,
    knn,
)

WITHOUT_GRADIENT = ("theta.bias", "phi.bias", "project.bias", "head.linear.bias")


def book(model, xyz, rgb):
    idx, running, h, every = knn(xyz, xyz, model.k), {}, rgb, []
    for layer in model.convs:
        center = gather(h, torch.arange(h.shape[1]).view(1, -1, 1).expand(idx.shape))
        edges = conv(gather(h, idx) - center, layer.theta) + conv(center, layer.phi)
        h = F.leaky_relu(batch_norm(edges, layer.norm, running).max(-1).values, 0.2).transpose(1, 2)
        every.append(h)
    h = model.project(torch.cat(every, 2))
    pooled = model.head.linear(torch.cat((h.max(1).values, h.mean(1)), 1))
    return F.leaky_relu(batch_norm(pooled, model.head.norm, running), 0.2), running


def small():
    torch.manual_seed(0)
    return awkward(DGCNN((8, 16, 24), k=5, dropout=0.0).double())


def test_eval_agrees_with_the_book():
    check_eval(small(), book)


def test_training_agrees_with_the_book():
    check_training(small(), book, WITHOUT_GRADIENT)


def test_float32_is_close_to_float64():
    check_float32(small(), book)


def test_parameter_counts():
    """As published, without and with the classifier of Market-1501's 751 people."""
    assert sum(p.numel() for p in dgcnn().parameters()) == 1_366_144
    assert sum(p.numel() for p in dgcnn(751).parameters()) == 1_751_407


def test_published_sizes():
    model = create_model("dgcnn", 3)
    assert (model.k, model.min_points, model.inputs, model.head.dropout.p) == (20, 20, "cloud", 0.7)
    assert [conv.theta.out_features for conv in model.convs] == [64, 128, 256, 512]


def test_initialisation():
    torch.manual_seed(0)
    check_initialisation(dgcnn(751), is_fan_out=lambda name: True)


def test_every_parameter_gets_a_gradient():
    torch.manual_seed(0)
    check_every_parameter_gets_a_gradient(dgcnn(5), WITHOUT_GRADIENT)


def test_descriptor_is_behind_the_activation_and_before_dropout():
    torch.manual_seed(0)
    model = DGCNN((8, 16), 7, k=5)
    xyz, rgb = clouds(3, 64, dtype=torch.float32)
    first, second = model(xyz, rgb), model(xyz, rgb)
    assert isinstance(first, Output) and first.feats.shape == (3, 512) and first.logits.shape == (3, 7)
    assert torch.equal(first.feats, second.feats) and not torch.equal(first.logits, second.logits)
    assert first.feats.max() > -4 * first.feats.min()  # of a normalised descriptor, 0.2 below 0
    assert DGCNN((8, 16), k=5)(xyz, rgb).logits is None


def test_order_of_points_is_of_no_account():
    model = small().eval()
    xyz, rgb = clouds(2, 64)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(model(xyz[:, order], rgb[:, order]), model(xyz, rgb), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("training", [False, True])
def test_autocast_changes_nothing(training):
    model = small().float().train(training)
    xyz, rgb = clouds(2, 64, dtype=torch.float32)
    expected = model(xyz, rgb)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(xyz, rgb)[0], expected)


def test_errors():
    with pytest.raises(TypeError, match="k must be an int, got 2.5"):
        dgcnn(k=2.5)
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        dgcnn(k=0)
    model = small()
    xyz, rgb = clouds(2, 64)
    with pytest.raises(ValueError, match=r"\(B, N, 3\)"):
        model(xyz, rgb[:, :5])
    with pytest.raises(ValueError, match="N >= 5 points, got 4"):
        model(xyz[:, :4], rgb[:, :4])
    with pytest.raises(ValueError, match="more than 1 value"):
        model.train()(xyz[:1], rgb[:1])
