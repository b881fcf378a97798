"""OSNet against its plain form, computed from a state dict alone; torchreid's keys, shapes and counts by rule."""

import math

import pytest
import torch
import torch.nn.functional as F

from reid3d.baselines.osnet import OSBlock, OSNet


def norm_layout(name, channels):
    keys = ("weight", "bias", "running_mean", "running_var")
    return {f"{name}.{key}": (channels,) for key in keys} | {f"{name}.num_batches_tracked": ()}


def conv_layout(name, outputs, inputs, side):
    return {f"{name}.conv.weight": (outputs, inputs, side, side)} | norm_layout(f"{name}.bn", outputs)


def block_layout(name, inputs, outputs):
    width = outputs // 4
    layout = conv_layout(f"{name}.conv1", width, inputs, 1)
    for lite in ("2a", "2b.0", "2b.1", "2c.0", "2c.1", "2c.2", "2d.0", "2d.1", "2d.2", "2d.3"):
        layout[f"{name}.conv{lite}.conv1.weight"] = (width, width, 1, 1)
        layout[f"{name}.conv{lite}.conv2.weight"] = (width, 1, 3, 3)
        layout |= norm_layout(f"{name}.conv{lite}.bn", width)
    layout[f"{name}.gate.fc1.weight"], layout[f"{name}.gate.fc1.bias"] = (width // 16, width, 1, 1), (width // 16,)
    layout[f"{name}.gate.fc2.weight"], layout[f"{name}.gate.fc2.bias"] = (width, width // 16, 1, 1), (width,)
    layout |= conv_layout(f"{name}.conv3", outputs, width, 1)
    return layout | (conv_layout(f"{name}.downsample", outputs, inputs, 1) if inputs != outputs else {})


def torchreid_layout():
    """Keys and shapes of torchreid's osnet_x1_0 without fc and classifier."""
    layout = conv_layout("conv1", 64, 3, 7)
    for stage, inputs, outputs in (2, 64, 256), (3, 256, 384), (4, 384, 512):
        layout |= block_layout(f"conv{stage}.0", inputs, outputs) | block_layout(f"conv{stage}.1", outputs, outputs)
        if stage < 4:
            layout |= conv_layout(f"conv{stage}.2.0", outputs, outputs, 1)
    return layout | conv_layout("conv5", 512, 512, 1)


def norm(state, name, x, training):
    """BatchNorm of (B, C) or (B, C, H, W)."""
    shape = (1, -1) + (1,) * (x.dim() - 2)
    dims = (0, *range(2, x.dim()))
    mean = x.mean(dims) if training else state[f"{name}.running_mean"]
    var = x.var(dims, correction=0) if training else state[f"{name}.running_var"]
    y = (x - mean.view(shape)) / (var.view(shape) + 1e-5).sqrt()
    return y * state[f"{name}.weight"].view(shape) + state[f"{name}.bias"].view(shape)


def conv(state, name, x, stride=1):
    weight = state[f"{name}.weight"]
    groups = x.shape[1] // weight.shape[1]
    return F.conv2d(x, weight, state.get(f"{name}.bias"), stride, weight.shape[-1] // 2, groups=groups)


def conv_norm(state, name, x, training, stride=1):
    return norm(state, f"{name}.bn", conv(state, f"{name}.conv", x, stride), training)


def gate(state, name, x, of):
    return x / (1 + (-conv(state, f"{name}.fc2", conv(state, f"{name}.fc1", of).clamp(min=0))).exp())


def block(state, name, x, training):
    narrow, total = conv_norm(state, f"{name}.conv1", x, training).clamp(min=0), 0
    for lites in ["2a"], ["2b.0", "2b.1"], ["2c.0", "2c.1", "2c.2"], ["2d.0", "2d.1", "2d.2", "2d.3"]:
        y = narrow
        for lite in lites:
            y = conv(state, f"{name}.conv{lite}.conv2", conv(state, f"{name}.conv{lite}.conv1", y))
            y = norm(state, f"{name}.conv{lite}.bn", y, training).clamp(min=0)
        total = total + gate(state, f"{name}.gate", y, y.mean((2, 3), keepdim=True))
    wide = conv_norm(state, f"{name}.conv3", total, training)
    if f"{name}.downsample.conv.weight" in state:
        x = conv_norm(state, f"{name}.downsample", x, training)
    return (wide + x).clamp(min=0)


def stem(state, name, x, training):
    x = conv_norm(state, name, x, training, stride=2).clamp(min=0)
    return F.pad(x, (1, 1, 1, 1), value=float("-inf")).unfold(2, 3, 2).unfold(3, 3, 2).amax((4, 5))


def stage(state, name, x, training):
    x = block(state, f"{name}.1", block(state, f"{name}.0", x, training), training)
    if f"{name}.2.0.conv.weight" not in state:
        return x
    x = conv_norm(state, f"{name}.2.0", x, training).clamp(min=0)
    return (x[:, :, ::2, ::2] + x[:, :, 1::2, ::2] + x[:, :, ::2, 1::2] + x[:, :, 1::2, 1::2]) / 4


def by_the_book(state, x, training):
    x = stem(state, "conv1", x, training)
    for name in ("conv2", "conv3", "conv4"):
        x = stage(state, name, x, training)
    return conv_norm(state, "conv5", x, training).clamp(min=0)


def awkward(model, seed=0):
    """With norms and biases that have learned something."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.dim() == 1:
                noise = torch.randn(tensor.shape, generator=rng).to(tensor) * 0.2
                tensor.copy_(noise.exp() if name.endswith(("running_var", "weight", "gamma")) else noise)
    return model


def copied(model):
    """The state before a pass in training mode changes it."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 256), (256, 256)])
def test_block_agrees_with_the_book(inputs, outputs, training, dtype):
    torch.manual_seed(0)
    model = awkward(torch.nn.Sequential(OSBlock(inputs, outputs)).to(dtype)).train(training)
    x = torch.randn(2, inputs, 7, 5, dtype=dtype)
    with torch.no_grad():
        expected = block(copied(model), "0", x, training)
        atol = (1e-5 if dtype == torch.float32 else 1e-10) * float(expected.abs().max())
        torch.testing.assert_close(model(x), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("training", [False, True])
def test_agrees_with_the_book(training):
    torch.manual_seed(0)
    model = awkward(OSNet().double()).train(training)
    x = torch.randn(2, 3, 64, 32, dtype=torch.float64)
    with torch.no_grad():
        expected = by_the_book(copied(model), x, training)
        features = model(x)
    assert features.shape == (2, OSNet.channels, 4, 2)
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-10 * float(expected.abs().max()))


def test_layout_is_torchreids():
    model = OSNet()
    state, expected = model.state_dict(), torchreid_layout()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == expected
    assert list(state) == list(expected)
    assert len(state) == 567 - 9  # less fc.0's two, the five of fc.1, which is a norm, and the classifier's two
    assert sum(p.numel() for p in model.parameters()) == 1_905_828
    assert model.eval()(torch.zeros(1, 3, 256, 128)).shape == (1, 512, 16, 8)


def test_initialisation():
    torch.manual_seed(0)
    state = OSNet().state_dict()
    for name, tensor in state.items():
        if tensor.dim() == 4:
            deviation = math.sqrt(2 / (tensor.shape[0] * tensor.shape[2] ** 2))
            assert float(tensor.std()) == pytest.approx(deviation, rel=4 / math.sqrt(2 * tensor.numel())), name
            assert abs(float(tensor.mean())) < 4 * deviation / math.sqrt(tensor.numel()), name
        elif name.endswith(("bias", "running_mean")):
            assert not tensor.any(), name
        elif name.endswith(("weight", "running_var")):
            assert (tensor == 1).all(), name


def test_trains():
    torch.manual_seed(0)
    model = OSNet()
    model(torch.randn(4, 3, 32, 32)).square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())
    assert model.conv4[1].conv2d[3].bn.num_batches_tracked == 1
