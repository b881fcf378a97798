"""Published layouts of checkpoints, written here key by key, and where their tensors land in a small net."""

import collections
import re
import sys
import types

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from reid3d.baselines import weights
from reid3d.baselines.image_model import ImageModel
from reid3d.baselines.resnet import Bottleneck, ResNet
from reid3d.baselines.weights import Report, load_backbone, read_official, read_tensors


class Small(ImageModel):
    """A short ResNet of one layer and a neck of its own."""

    backbone = ("base.",)

    def __init__(self, ibn=None):
        super().__init__()
        self.base = nn.Module()
        self.base.conv1 = nn.Conv2d(3, 4, 7, bias=False)
        self.base.bn1 = nn.InstanceNorm2d(4, affine=True) if ibn == "b" else nn.BatchNorm2d(4)
        self.base.layer1 = nn.Sequential(*(Bottleneck(4 if i == 0 else 16, 4, ibn=ibn) for i in range(2)))
        self.neck_conv = nn.Conv2d(16, 2, 1)

    def of_backbone(self, key):
        return (f"base.{key}",)


class Twice(ImageModel):
    """As PLR-OSNet: conv2 of an OSNet once, conv3 for each of two branches."""

    backbone = ("layer",)

    def __init__(self):
        super().__init__()
        self.layer1, self.layer20, self.layer21 = (nn.Sequential(nn.BatchNorm2d(4)) for _ in range(3))
        self.layer21 = nn.Sequential(self.layer21)
        self.fc = nn.Linear(4, 2)

    def of_backbone(self, key):
        module, _, rest = key.partition(".")
        return {"conv2": (f"layer1.{rest}",), "conv3": (f"layer20.{rest}", f"layer21.0.{rest}")}.get(module, ())


def norm(name, channels, count=True):
    keys = ("weight", "bias", "running_mean", "running_var")
    layout = {f"{name}.{key}": torch.randn(channels) for key in keys}
    return layout | ({f"{name}.num_batches_tracked": torch.tensor(7)} if count else {})


def instance_norm(name, channels):
    return {f"{name}.weight": torch.randn(channels), f"{name}.bias": torch.randn(channels)}


def published(ibn=None, count=True):
    """A file in the layout of torchvision or IBN-Net, with a layer4 that Small has not."""
    state = {"conv1.weight": torch.randn(4, 3, 7, 7)}
    state |= instance_norm("bn1", 4) if ibn == "b" else norm("bn1", 4, count)
    for layer, blocks in (("layer1", 2), ("layer4", 1)):
        for i in range(blocks):
            name = f"{layer}.{i}"
            for k, shape in enumerate([(4, 4 if i == 0 else 16, 1, 1), (4, 4, 3, 3), (16, 4, 1, 1)], 1):
                state[f"{name}.conv{k}.weight"] = torch.randn(shape)
                if ibn == "a" and k == 1:
                    state |= instance_norm(f"{name}.bn1.IN", 2) | norm(f"{name}.bn1.BN", 2, count)
                else:
                    state |= norm(f"{name}.bn{k}", shape[0], count)
            if i == 0:
                state[f"{name}.downsample.0.weight"] = torch.randn(16, 4, 1, 1)
                state |= norm(f"{name}.downsample.1", 16, count)
            if ibn == "b":
                state |= instance_norm(f"{name}.IN", 16)
    return state | {"fc.weight": torch.randn(5, 16), "fc.bias": torch.randn(5)}


def save(path, content, **kwargs):
    torch.save(content, path, **kwargs)
    return path


def prefixed(prefix, state):
    return {prefix + key: tensor for key, tensor in state.items()}


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def check_filled(model, state, report, before, prefix="base."):
    """Each tensor of the backbone is the file's, and no other has changed."""
    for name, tensor in model.state_dict().items():
        key = name.removeprefix(prefix)
        if name in report.loaded:
            assert torch.equal(tensor, state[key]), name
        else:
            assert torch.equal(tensor, before[name]), name
    backbone = {name for name in before if name.startswith(prefix)}
    assert set(report.loaded) | set(report.fresh) == backbone
    assert not set(report.loaded) & set(report.fresh)


OPTIMIZER = torch.optim.Adam([nn.Parameter(torch.ones(2))]).state_dict()
TORCHREID = {"epoch": 60, "rank1": np.float32(0.9), "mAP": np.float64(0.8), "optimizer": OPTIMIZER}
LAYOUTS = {  # what is around the weights, and what is beside the backbone's
    "torchvision": (lambda state: collections.OrderedDict(state), set()),
    "DataParallel": (lambda state: prefixed("module.", state), set()),
    "torchreid": (lambda state: {"state_dict": prefixed("module.", state), **TORCHREID}, set()),
    "strong baseline": (lambda state: prefixed("base.", state), set()),
    "fast-reid": (
        lambda state: {
            "model": prefixed("backbone.", state)
            | {"heads.weight": torch.ones(5, 16), "heads.bottleneck.0.bias": torch.ones(16)},
            "optimizer": OPTIMIZER,
            "iteration": 9,
        },
        {"heads.weight", "heads.bottleneck.0.bias"},
    ),
    "QAConv": (
        lambda state: {
            "model": prefixed("module.base.", state) | {"module.neck_conv.weight": torch.ones(2, 16, 1, 1)},
            "criterion": {"class_memory": torch.ones(3), "fc.bias": torch.ones(1)},
            "optim": OPTIMIZER,
            "epoch": 15,
        },
        {"neck_conv.weight"},
    ),
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_takes_the_layouts_of_trainers(layout, zipped, tmp_path):
    wrap, beside = LAYOUTS[layout]
    state = published()
    path = save(tmp_path / "a.pth.tar", wrap(state), _use_new_zipfile_serialization=zipped)
    assert read_tensors(path).keys() == state.keys() | beside
    model = Small()
    before = snapshot(model)
    report = load_backbone(model, path)
    check_filled(model, state, report, before)
    assert report.fresh == ()
    assert set(report.unused) == {key for key in state if key.startswith(("layer4.", "fc."))} | beside


@pytest.mark.parametrize(("ibn", "kept"), [("a", "base.layer1.1.bn1.IN.weight"), ("b", "base.layer1.1.IN.weight")])
def test_takes_ibn_nets(ibn, kept, tmp_path):
    state = published(ibn)
    model = Small(ibn)
    before = snapshot(model)
    report = load_backbone(model, save(tmp_path / "resnet50_ibn.pth", prefixed("module.", state)))
    check_filled(model, state, report, before)
    assert kept in report.loaded
    assert report.fresh == ()


def test_counts_of_batchnorm_may_be_missing(tmp_path):
    state = published(count=False)
    model = Small()
    model.base.bn1.num_batches_tracked.fill_(3)
    before = snapshot(model)
    report = load_backbone(model, save(tmp_path / "old.pth", state, _use_new_zipfile_serialization=False))
    check_filled(model, state, report, before)
    assert len(report.fresh) == 1 + 3 + 1 + 3
    assert all(name.endswith(".num_batches_tracked") for name in report.fresh)
    assert model.base.bn1.num_batches_tracked == 3


def test_copies_to_several_places(tmp_path):
    state = (
        norm("conv2.0", 4) | norm("conv3.0", 4) | {"classifier.weight": torch.ones(5, 4), "fc.0.bias": torch.ones(4)}
    )
    model = Twice()
    before = snapshot(model)
    report = load_backbone(model, save(tmp_path / "osnet_x1_0_imagenet.pth", prefixed("module.", state)))
    after = model.state_dict()
    for place, key in (("layer1.0", "conv2.0"), ("layer20.0", "conv3.0"), ("layer21.0.0", "conv3.0")):
        for leaf in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            assert torch.equal(after[f"{place}.{leaf}"], state[f"{key}.{leaf}"])
    assert torch.equal(after["fc.weight"], before["fc.weight"])
    assert len(report.loaded) == 15
    assert report.unused == ("classifier.weight", "fc.0.bias")
    assert report.fresh == ()


def test_safetensors_and_precision(tmp_path):
    state = {key: tensor.half() if tensor.is_floating_point() else tensor for key, tensor in published().items()}
    save_file(prefixed("backbone.", state), tmp_path / "a.safetensors")
    model = Small()
    load_backbone(model, tmp_path / "a.safetensors")
    assert model.base.conv1.weight.dtype == torch.float32
    assert torch.equal(model.base.conv1.weight, state["conv1.weight"].float())


def test_parameters_still_learn(tmp_path):
    model = Small()
    parameters = dict(model.named_parameters())
    load_backbone(model, save(tmp_path / "a.pth", {k: nn.Parameter(v.float()) for k, v in published().items()}))
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name]
        assert parameter.is_leaf
        assert parameter.requires_grad


def test_a_real_resnet(tmp_path):
    class Whole(ImageModel):
        backbone = ("base.",)

        def __init__(self, depth, ibn=None, stages=4):
            super().__init__()
            self.base = ResNet(depth, 1, ibn, stages)

        def of_backbone(self, key):
            return (f"base.{key}",)

    torch.manual_seed(1)
    state = ResNet(50).state_dict() | {"fc.weight": torch.ones(1000, 2048), "fc.bias": torch.ones(1000)}
    assert len(state) == 320
    path = save(tmp_path / "resnet50.pth", state)
    model = Whole(50)
    before = snapshot(model)
    report = load_backbone(model, path)
    check_filled(model, state, report, before)
    assert str(report) == "318 tensors loaded; of the file unused: fc.weight and 1 more"
    with torch.device("meta"):
        cut, ibn, deep = Whole(50, stages=3), Whole(50, "a"), Whole(101)
    assert len(load_backbone(cut, path).loaded) == sum(not key.startswith(("layer4", "fc")) for key in state)
    for other, first in ((ibn, "base.layer1.0.bn1.IN.weight"), (deep, "base.layer3.6.conv1.weight")):
        with pytest.raises(
            ValueError, match=f"resnet50.pth, a ResNet-50: {re.escape(first)} of the model is not in it"
        ):
            load_backbone(other, path)


def test_report_is_one_line():
    assert str(Report(("a", "b"), (), ())) == "2 tensors loaded"
    assert str(Report(("a",), ("x", "y", "z"), ("b",))) == (
        "1 tensors loaded; of the file unused: x and 2 more; of the backbone not in the file: b"
    )


def drop(key):
    return lambda state: state.pop(key)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("conv1.weight"), "base.conv1.weight of the model is not in it"),
        (drop("layer1.1.bn3.running_var"), "base.layer1.1.bn3.running_var of the model is not in it"),
        (lambda s: s.update({"bn1.weight": torch.ones(5)}), "bn1.weight must have shape (4,), got (5,)"),
        (lambda s: s.update(norm("layer1.2.bn1", 4)), "layer1.2.bn1.weight is not in the model"),
        (lambda s: s.clear() or s.update(norm("conv5.bn", 3)), "base.conv1.weight of the model is not in it"),
        (lambda s: s.update({"layer1.0.bn1.IN.weight": torch.ones(2)}), "layer1.0.bn1.IN.weight is not in the model"),
    ],
)
def test_another_backbone_changes_nothing(change, message, tmp_path):
    state = published()
    change(state)
    model = Small()
    before = snapshot(model)
    path = save(tmp_path / "other.pth", state)
    start, end = (
        re.escape(text) for text in (f"weights must be of the model's backbone, got {path}, a ", f": {message}")
    )
    with pytest.raises(ValueError, match=f"^{start}[^\n]+{end}$"):
        load_backbone(model, path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def resnet_keys(blocks, *more, conv3=True):
    convs = ("conv1", "conv2", "conv3")[: 3 if conv3 else 2]
    keys = [f"layer{i}.{j}.{c}.weight" for i, count in enumerate(blocks, 1) for j in range(count) for c in convs]
    return ["conv1.weight", *keys, *more]


OSNET = ["conv1.conv.weight", "conv2.0.conv1.conv.weight", "conv2.0.conv2a.conv1.weight", "conv2.2.0.conv.weight"]


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (resnet_keys((3, 4, 6, 3)), "a ResNet-50"),
        (resnet_keys((3, 4, 23, 3), "fc.weight"), "a ResNet-101"),
        (resnet_keys((3, 8, 36)), "a ResNet-152"),  # QAConv's end there
        (resnet_keys((3, 4, 6, 3), conv3=False), "a ResNet of 3, 4, 6, 3 blocks"),  # ResNet-34
        (resnet_keys((2, 2, 2, 2), conv3=False), "a ResNet of 2, 2, 2, 2 blocks"),
        (resnet_keys((3, 4, 6, 3), "layer1.0.bn1.IN.weight"), "a ResNet-50 with IBN-a"),
        (resnet_keys((3, 4, 23, 3), "layer1.2.IN.weight", "layer2.3.IN.weight"), "a ResNet-101 with IBN-b"),
        (OSNET, "an OSNet"),
        ([*OSNET, "conv2.0.IN.weight"], "an OSNet with instance norms"),
        (["conv2.0.conv2.0.layers.0.conv1.weight", "conv2.0.IN.weight"], "an OSNet with instance norms"),  # osnet_ain
        (["cls_token", "pos_embed", "blocks.0.norm1.weight"], "a file of cls_token, pos_embed, ..."),
        (["weight"], "a file of weight"),
    ],
)
def test_another_backbone_is_told_by_its_keys(keys, expected, tmp_path):
    model = Small()
    path = save(tmp_path / "other.pth", prefixed("module.", dict.fromkeys(keys, torch.ones(1))))
    with pytest.raises(ValueError, match=re.escape(f"got {path}, {expected}: ")):
        load_backbone(model, path)


@pytest.mark.parametrize(("file", "model"), [("a", None), (None, "a"), ("b", None), (None, "b"), ("a", "b")])
def test_ibn_and_plain_are_not_mistaken(file, model, tmp_path):
    with pytest.raises(ValueError, match="weights must be of the model's backbone"):
        load_backbone(Small(model), save(tmp_path / "a.pth", published(file)))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (nn.Linear(2, 2), "it holds a torch.nn.modules.linear.Linear"),
        ({"state_dict": {"a": np.ones(2)}}, "it holds a numpy"),
        ([torch.ones(2)], "a list"),
        (torch.ones(2), "a Tensor"),
        ({}, "which has none"),
        ({"state_dict": {}}, "which has none"),
        ({"epoch": 3, "optimizer": {"state": {0: torch.ones(2)}}}, "which has none"),
        ({"model": {"epoch": 3}, "a": torch.ones(2)}, "which has none"),
        ({"a": torch.ones(2), "module.a": torch.ones(2)}, "which holds a under several prefixes"),
    ],
)
def test_no_checkpoint(content, message, zipped, tmp_path):
    path = save(tmp_path / "a.pth", content, _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        ValueError, match=f"^weights must [^\n]*{re.escape(str(path))}[^\n]*{re.escape(message)}[^\n]*$"
    ):
        read_tensors(path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_broken_files(suffix, tmp_path):
    path = tmp_path / f"a{suffix}"
    whole = save(tmp_path / "whole.pth", published()).read_bytes()
    for content in (b"", b"hello\nthere", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="^weights must be a checkpoint of tensors and plain values, got [^\n]+$"):
            read_tensors(path)
    for missing in (tmp_path / f"none{suffix}", tmp_path):
        for read in (read_tensors, read_official, lambda path: load_backbone(Small(), path)):
            with pytest.raises(FileNotFoundError, match="weights must be a file, got"):
                read(missing)


def test_no_code_of_a_file_runs(tmp_path):
    class Evil:
        def __reduce__(self):
            return (tmp_path / "ran").touch, ()

    for zipped in (True, False):
        path = save(
            tmp_path / "a.pth", {"state_dict": published(), "rank1": Evil()}, _use_new_zipfile_serialization=zipped
        )
        with pytest.raises(ValueError, match="it holds a"):
            read_tensors(path)
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def fakes(monkeypatch):
    """Both networks' modules, which return what they were called with, or raise what they are told to."""
    calls = []

    def fake(name):
        def from_official(*states):
            calls.append((name, *states))
            if "wrong" in states[0]:
                raise ValueError("weights must be right: wrong is unknown")
            return name, {"kwarg": 1}, dict(states[0]), 751

        module = types.ModuleType(f"{weights.__package__}.{name}")
        module.from_official = from_official
        monkeypatch.setitem(sys.modules, module.__name__, module)

    fake("plr_osnet")
    fake("qaconv")
    return calls


def test_official_plr_osnet(fakes, tmp_path):
    state = norm("layer0.0.bn", 4) | norm("attention_module1.pam.bn", 4)
    path = save(tmp_path / "model.pth.tar-60", {"state_dict": prefixed("module.", state), **TORCHREID})
    name, kwargs, tensors, num_classes = read_official(path)
    assert (name, kwargs, num_classes) == ("plr_osnet", {"kwarg": 1}, 751)
    assert tensors.keys() == state.keys()
    assert all(torch.equal(tensors[key], state[key]) for key in state)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_official_qaconv(fakes, prefix, tmp_path):
    state = prefixed("base.", published()) | {"neck_conv.weight": torch.ones(2, 16, 1, 1)}
    criterion = {"class_memory": torch.ones(3), "fc.bias": torch.ones(1)}
    content = {
        "model": prefixed(prefix, state),
        "criterion": prefixed(prefix, criterion),
        "optim": OPTIMIZER,
        "epoch": 1,
    }
    name, _, tensors, _ = read_official(save(tmp_path / "checkpoint.pth.tar", content))
    assert name == "qaconv"
    assert tensors.keys() == state.keys()
    ((_, _, got),) = fakes
    assert got.keys() == criterion.keys()
    assert torch.equal(got["class_memory"], criterion["class_memory"])


def test_official_errors(fakes, tmp_path):
    path = save(tmp_path / "a.pth", {"state_dict": {"module.wrong": torch.ones(1)}})
    with pytest.raises(ValueError, match=re.escape(f"weights must be right: wrong is unknown, in {path}")):
        read_official(path)
    fakes.clear()
    for content, held in (
        ({"conv1.weight": torch.ones(2)}, "conv1.weight"),
        ({"model": published(), "epoch": 1}, "model, epoch"),
        ({"criterion": {}}, "criterion"),
        ({}, "nothing"),
    ):
        path = save(tmp_path / "b.pth", content)
        with pytest.raises(ValueError, match=f"PLR-OSNet, with state_dict, or of QAConv.*, got .*b.pth with {held}$"):
            read_official(path)
    assert not fakes
