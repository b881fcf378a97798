"""ResNet against its book form, computed from a state dict alone; torchvision's keys, shapes and counts by rule."""

import pytest
import torch
import torch.nn.functional as F

from reid3d.baselines.resnet import ResNet

STAGES = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


def torchvision_layout(depth, ibn=None):
    """Keys and shapes of torchvision's resnet50, 101 or 152 without fc, or of IBN-Net's."""
    layout = {}

    def conv(name, outputs, inputs, side):
        layout[f"{name}.weight"] = (outputs, inputs, side, side)

    def norm(name, channels):
        layout.update({f"{name}.{key}": (channels,) for key in ("weight", "bias", "running_mean", "running_var")})
        layout[f"{name}.num_batches_tracked"] = ()

    def instance_norm(name, channels):
        layout.update({f"{name}.weight": (channels,), f"{name}.bias": (channels,)})

    conv("conv1", 64, 3, 7)
    (instance_norm if ibn == "b" else norm)("bn1", 64)
    inputs = 64
    for stage, blocks in enumerate(STAGES[depth], 1):
        width = 32 * 2**stage
        for block in range(blocks):
            name = f"layer{stage}.{block}"
            for k, (o, i, side) in enumerate([(width, inputs, 1), (width, width, 3), (4 * width, width, 1)], 1):
                conv(f"{name}.conv{k}", o, i, side)
                if ibn == "a" and k == 1 and stage <= 3:
                    instance_norm(f"{name}.bn1.IN", o // 2)
                    norm(f"{name}.bn1.BN", o // 2)
                else:
                    norm(f"{name}.bn{k}", o)
            if block == 0:
                conv(f"{name}.downsample.0", 4 * width, inputs, 1)
                norm(f"{name}.downsample.1", 4 * width)
            if ibn == "b" and stage <= 2 and block == blocks - 1:
                instance_norm(f"{name}.IN", 4 * width)
            inputs = 4 * width
    return layout


def by_the_book(state, x, depth, last_stride):
    """The last feature map; what the keys of the state name is done, instance norms and all."""

    def norm(name, x):
        if f"{name}.IN.weight" in state:
            return torch.cat(
                (norm(f"{name}.IN", x[:, : x.shape[1] // 2]), norm(f"{name}.BN", x[:, x.shape[1] // 2 :])), 1
            )
        if f"{name}.running_mean" not in state:
            mean, var = x.mean((2, 3), keepdim=True), x.var((2, 3), unbiased=False, keepdim=True)
            weight, bias = (state[f"{name}.{key}"][:, None, None] for key in ("weight", "bias"))
            return (x - mean) / (var + 1e-5).sqrt() * weight + bias
        mean, var, weight, bias = (
            state[f"{name}.{key}"][:, None, None] for key in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    def conv(name, x, stride=1):
        weight = state[f"{name}.weight"]
        side = weight.shape[-1]
        patches = F.unfold(x, side, padding=side // 2, stride=stride)  # (B, inputs * side * side, positions)
        rows = (x.shape[2] - 1) // stride + 1
        return (weight.flatten(1) @ patches).unflatten(2, (rows, -1))

    x = norm("bn1", conv("conv1", x, 2)).clamp(min=0)
    x = F.pad(x, (1, 1, 1, 1), value=float("-inf")).unfold(2, 3, 2).unfold(3, 3, 2).amax((4, 5))
    for stage in range(4):
        if f"layer{stage + 1}.0.conv1.weight" not in state:
            break
        for block in range(STAGES[depth][stage]):
            name = f"layer{stage + 1}.{block}"
            stride = (1, 2, 2, last_stride)[stage] if block == 0 else 1
            y = norm(f"{name}.bn1", conv(f"{name}.conv1", x)).clamp(min=0)
            y = norm(f"{name}.bn2", conv(f"{name}.conv2", y, stride)).clamp(min=0)
            y = norm(f"{name}.bn3", conv(f"{name}.conv3", y))
            if block == 0:
                x = norm(f"{name}.downsample.1", conv(f"{name}.downsample.0", x, stride))
            x = x + y
            if f"{name}.IN.weight" in state:
                x = norm(f"{name}.IN", x)
            x = x.clamp(min=0)
    return x


def with_statistics(model, seed=0):
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if "bn" in name or "IN" in name or "downsample.1" in name:
                noise = torch.randn(tensor.shape, generator=rng).to(tensor) * 0.2
                tensor.copy_(noise.exp() if name.endswith(("running_var", "weight")) else noise)
    return model


@pytest.mark.parametrize("last_stride", [1, 2])
def test_agrees_with_the_book(last_stride):
    torch.manual_seed(0)
    model = with_statistics(ResNet(50, last_stride).double()).eval()
    x = torch.randn(2, 3, 70, 33, dtype=torch.float64)
    with torch.no_grad():
        features = model(x)
        expected = by_the_book(model.state_dict(), x, 50, last_stride)
    assert features.shape == ((2, 2048, 3, 2) if last_stride == 2 else (2, 2048, 5, 3))
    torch.testing.assert_close(features, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))


@pytest.mark.parametrize(("ibn", "stages"), [("a", 4), ("b", 4), (None, 3), ("b", 1)])
def test_ibn_and_stages_agree_with_the_book(ibn, stages):
    torch.manual_seed(0)
    model = with_statistics(ResNet(50, 1, ibn, stages).double()).eval()
    x = torch.randn(2, 3, 70, 33, dtype=torch.float64)
    with torch.no_grad():
        features = model(x)
        expected = by_the_book(model.state_dict(), x, 50, 1)
    assert features.shape == ((2, 256, 18, 9) if stages == 1 else (2, model.channels, 5, 3))
    torch.testing.assert_close(features, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))


@pytest.mark.parametrize(("depth", "parameters"), [(50, 23_508_032), (101, 42_500_160), (152, 58_143_808)])
def test_layout_is_torchvisions(depth, parameters):
    with torch.device("meta"):
        model = ResNet(depth)
    assert sum(p.numel() for p in model.parameters()) == parameters
    state = model.state_dict()
    expected = torchvision_layout(depth)
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == expected
    assert list(state) == list(expected)
    if depth == 50:
        assert len(state) == 320 - 2  # less the two of fc
    assert model(torch.zeros(1, 3, 224, 224, device="meta")).shape == (1, ResNet.channels, 7, 7)


@pytest.mark.parametrize("depth", [50, 101, 152])
@pytest.mark.parametrize("ibn", ["a", "b"])
def test_layout_is_ibn_nets(depth, ibn):
    with torch.device("meta"):
        model, plain = ResNet(depth, ibn=ibn), ResNet(depth)
    state = model.state_dict()
    expected = torchvision_layout(depth, ibn)
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == expected
    assert list(state) == list(expected)
    norms = {name.rpartition(".")[0] for name in state if ".IN." in name}
    more = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in plain.parameters())
    if ibn == "a":
        assert norms == {f"layer{i + 1}.{j}.bn1.IN" for i in range(3) for j in range(STAGES[depth][i])}
        assert more == 0
        assert state["layer3.0.bn1.IN.weight"].shape == state["layer3.0.bn1.BN.running_var"].shape == (128,)
    else:
        assert norms == {"layer1.2.IN", "layer2.7.IN" if depth == 152 else "layer2.3.IN"}
        assert more == 2 * (256 + 512)
        assert "bn1.running_mean" not in state


@pytest.mark.parametrize("ibn", [None, "a", "b"])
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_stages_are_the_first_of_the_whole(ibn, stages):
    with torch.device("meta"):
        part = ResNet(50, 1, ibn, stages)
        whole = list(ResNet(50, 1, ibn).state_dict())
    gone = tuple(f"layer{stage}." for stage in range(stages + 1, 5))
    assert list(part.state_dict()) == [name for name in whole if not name.startswith(gone)]
    assert part.channels == (256, 512, 1024, 2048)[stages - 1]
    side = (56, 28, 14, 14)[stages - 1]
    assert part(torch.zeros(1, 3, 224, 224, device="meta")).shape == (1, part.channels, side, side)


@pytest.mark.parametrize("ibn", [None, "a", "b"])
def test_trains(ibn):
    torch.manual_seed(0)
    model = ResNet(50, 1, ibn)
    model(torch.randn(2, 3, 32, 32)).mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.layer4[2].bn3.num_batches_tracked == 1


def test_errors():
    with pytest.raises(ValueError, match="depth must be one of 50, 101, 152, got 18"):
        ResNet(18)
    with pytest.raises(ValueError, match="last_stride must be 1 or 2, got 4"):
        ResNet(50, 4)
    with pytest.raises(ValueError, match="ibn must be 'a', 'b' or None, got 'c'"):
        ResNet(50, ibn="c")
    with pytest.raises(ValueError, match="stages must be 1, 2, 3 or 4, got 0"):
        ResNet(50, stages=0)
