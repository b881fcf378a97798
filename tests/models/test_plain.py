"""Plain networks of images: their layers by hand, published counts, and losses of the config."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from reid3d.config import LossConfig, TripletConfig
from reid3d.models import create_model
from reid3d.models.plain import PlainNet
from reid3d.train import _losses


class Patches(nn.Module):
    channels = 6

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 8, 8)

    def forward(self, x):
        return self.conv(x)


def test_the_descriptor_by_hand():
    torch.manual_seed(0)
    model = PlainNet(Patches, 3, dim=4).double().eval()
    images = torch.rand(2, 3, 16, 8, dtype=torch.float64)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).double()[..., None, None]
    pooled = model.base((images - mean) / std).mean((2, 3))
    norm = model.head.norm
    expected = (pooled @ model.head.linear.weight.T + model.head.linear.bias - norm.running_mean) * norm.weight
    torch.testing.assert_close(model(images), expected / (norm.running_var + norm.eps).sqrt() + norm.bias)


def test_it_learns_by_the_losses_of_the_config():
    torch.manual_seed(0)
    model = PlainNet(Patches, 3, dim=4, dropout=0.0)
    labels = torch.tensor([0, 0, 1, 2])
    output = model(torch.rand(4, 3, 16, 8))
    parts = _losses(LossConfig(triplet=TripletConfig(weight=1.0)), output, labels)
    assert parts["cross_entropy"].item() == pytest.approx(F.cross_entropy(output.logits, labels).item())
    sum(parts.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert not hasattr(model, "loss")


def test_published_counts():
    with torch.device("meta"):
        counts = {name: sum(p.numel() for p in create_model(name).parameters()) for name in ("resnet50", "osnet")}
    assert counts == {"resnet50": 23_508_032 + 512 * 2048 + 3 * 512, "osnet": 1_905_828 + 512 * 512 + 3 * 512}
    model = create_model("resnet50", 2)
    assert model.backbone == ("base.",) and model.of_backbone("conv1.weight") == ("base.conv1.weight",)
    with pytest.raises(ValueError, match="num_classes must be at least 0, got -1"):
        PlainNet(Patches, -1)
