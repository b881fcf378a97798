"""Checkpoints in the published layout, from a tree of convolutions with the published names."""

import collections
import re

import pytest
import torch

from reid3d.models import create_model
from reid3d.models.official import read_official, write_official
from reid3d.models.ognet import OGNet

from .against_the_book import awkward, clouds
from .published import Published

NAMES = ["ognet", "ognet_small", "ognet_deep"]
SMALL = {"k": 5, "init_points": 40}


def save(path, state, prefix="module."):
    torch.save(collections.OrderedDict((prefix + key, tensor) for key, tensor in state.items()), path)
    return path


@pytest.fixture(scope="module")
def state():
    return Published("ognet_small", 7).state_dict()


@pytest.fixture(scope="module")
def deep_state():
    return Published("ognet_deep", 7).state_dict()


@torch.no_grad()
@pytest.mark.parametrize(("name", "circle"), [("ognet", False), ("ognet_small", True), ("ognet_deep", False)])
def test_agrees_with_the_published_network(name, circle, tmp_path):
    tree = Published(name, 7, circle)
    path = save(tmp_path / "model_last.pth", tree.state_dict())
    model = create_model(weights=path, **SMALL).double().eval()
    xyz, rgb = clouds(2, 70)
    expected = tree.double().eval()(xyz, rgb, k=5, points=40)
    torch.testing.assert_close(model(xyz, rgb), expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))
    with torch.enable_grad():
        rgb.requires_grad_()
        weight = torch.randn_like(expected)
        (ours,) = torch.autograd.grad((model(xyz, rgb) * weight).sum(), rgb)
        (theirs,) = torch.autograd.grad((tree(xyz, rgb, k=5, points=40) * weight).sum(), rgb)
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9 * float(theirs.abs().max()))


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_left_out_nor_invented(name, tmp_path):
    tree = Published(name, 7)
    path = save(tmp_path / "a.pth", tree.state_dict())
    found, kwargs, state, num_classes = read_official(path)
    assert (found, kwargs, num_classes) == (name, {}, 7)
    own = create_model(name, 7).state_dict()
    assert {key: tensor.shape for key, tensor in state.items()} == {key: tensor.shape for key, tensor in own.items()}
    assert sum(tensor.numel() for tensor in state.values()) == sum(t.numel() for t in tree.state_dict().values())
    counts = [tensor for key, tensor in state.items() if key.endswith("num_batches_tracked")]
    assert all(count.dtype == torch.int64 and count == 1234 for count in counts)


def test_create_model(state, tmp_path):
    path = save(tmp_path / "model_average.pth", state)
    model = create_model(weights=path)
    assert (model.name, model.kwargs, model.num_classes, model.points) == ("ognet_small", {}, 0, 4096)
    assert (model.min_points, model.background, model.training) == (768, True, True)
    assert model.trained_on == '{"ids": 7, "points": 4096}'
    assert model.head.classifier is None
    model = create_model("ognet_small", 7, weights=path, dropout=0.1)
    assert torch.equal(model.head.classifier.weight, state["proj_output.weight"])
    assert model.head.dropout.p == 0.1
    with pytest.raises(ValueError, match="num_classes must be 0 or that of the weights, 7, got 8"):
        create_model(num_classes=8, weights=path)
    with pytest.raises(ValueError, match="name must be that of the weights, 'ognet_small', got 'ognet'"):
        create_model("ognet", weights=path)


def test_prefix_may_be_missing_but_not_in_part(state, tmp_path):
    plain = read_official(save(tmp_path / "plain.pth", state, prefix=""))
    prefixed = read_official(save(tmp_path / "prefixed.pth", state))
    assert all(torch.equal(tensor, prefixed[2][key]) for key, tensor in plain[2].items())
    mixed = {"module." + key if key == "agg.0.p" else key: tensor for key, tensor in state.items()}
    with pytest.raises(ValueError, match="for ognet_small, agg.0.p is missing, and 1 more are wrong$"):
        read_official(save(tmp_path / "mixed.pth", mixed, prefix=""))


@pytest.mark.parametrize("name", NAMES)
def test_round_trip(name, tmp_path):
    torch.manual_seed(0)
    model = awkward(create_model(name, 11, **SMALL))
    write_official(model, tmp_path / "a.pth")
    again = create_model(name, 11, weights=tmp_path / "a.pth", **SMALL)
    for key, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key
    xyz, rgb = clouds(2, 70, dtype=torch.float32)
    assert torch.equal(again.eval()(xyz, rgb), model.eval()(xyz, rgb))
    tree = Published(name, 11)  # the published code loads it, strictly
    written = torch.load(tmp_path / "a.pth", weights_only=True)
    tree.load_state_dict({key.removeprefix("module."): tensor for key, tensor in written.items()})
    assert "module.logit_scale" not in written
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]


def test_the_file_written_is_the_file_read(deep_state, tmp_path):
    write_official(create_model(num_classes=7, weights=save(tmp_path / "a.pth", deep_state)), tmp_path / "b.pth")
    written = torch.load(tmp_path / "b.pth", weights_only=True)
    assert written.keys() == {"module." + key for key in deep_state}
    assert all(torch.equal(written["module." + key], tensor) for key, tensor in deep_state.items())


def without(key):
    return lambda state: {k: v for k, v in state.items() if k != key}


def replaced(key, tensor):
    return lambda state: {**state, key: tensor}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("sa.2.mlps.1.2.se_expand.bias"), "sa.2.mlps.1.2.se_expand.bias is missing"),
        (without("bn.3.num_batches_tracked"), "bn.3.num_batches_tracked is missing"),
        (without("conv.1.weight"), "conv.1.weight is missing"),
        (without("proj_output.weight"), "proj_output.weight is missing"),
        (replaced("globpool.p", torch.zeros(1)), "globpool.p is unknown"),
        (replaced("p_w", torch.zeros(4)), r"p_w\[0\] is unknown, and 3 more are wrong"),
        (replaced("p_w", torch.zeros(())), "p_w is unknown"),
        (replaced("logit_scale", torch.zeros(2)), "logit_scale is unknown"),
        (replaced("agg.1.p", torch.zeros(2)), r"agg.1.p must have shape \(1,\), got \(2,\)"),
        (
            replaced("conv.0.weight", torch.zeros(48, 6)),
            r"conv.0.weight must have shape \(48, 6, 1, 1\), got \(48, 6\)",
        ),
        (
            replaced("proj_output.bias", torch.zeros(9)),
            r"proj_output.weight must have shape \(9, 512\), got \(7, 512\)",
        ),
        (replaced("proj_output.bias", torch.zeros(())), r"proj_output.\w+ must have shape"),
    ],
)
def test_keys_and_shapes(change, message, state, tmp_path):
    path = save(tmp_path / "a.pth", change(state))
    with pytest.raises(ValueError, match=f"weights must be a published OG-Net checkpoint, got .*a.pth: .*{message}"):
        create_model(weights=path)


def test_a_stage_too_few(deep_state, tmp_path):
    path = save(tmp_path / "a.pth", {**deep_state, "p_w": torch.zeros(6)})
    with pytest.raises(ValueError, match=r"for ognet_deep, p_w\[6\] is missing$"):
        read_official(path)


class Harm:
    def __reduce__(self):
        return print, ("harm",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(1)], "weights must be a state dict, tensors by name"),
        ({"module.conv.0.weight": 3}, "weights must be a state dict, tensors by name"),
        ({0: torch.zeros(1)}, "weights must be a state dict, tensors by name"),
        ({}, "is missing"),
        ({"a": Harm()}, "weights must be a checkpoint of tensors"),
    ],
)
def test_other_files(content, message, tmp_path, capsys):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=message):
        read_official(tmp_path / "a.pth")
    assert capsys.readouterr().out == ""


def test_no_file_and_no_checkpoint(state, tmp_path):
    with pytest.raises(FileNotFoundError, match="weights must be a file, got .*none.pth"):
        create_model(weights=tmp_path / "none.pth")
    whole = save(tmp_path / "a.pth", state).read_bytes()
    for content in (b"", b"text", whole[: len(whole) // 2]):
        (tmp_path / "broken.pth").write_bytes(content)
        with pytest.raises(ValueError, match=re.escape(f"checkpoint of tensors, got {tmp_path / 'broken.pth'}: ")):
            read_official(tmp_path / "broken.pth")


def test_old_files_are_read_too(state, tmp_path):
    """The published ones were written by torch 1.4, before its files were archives."""
    torch.save(state, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    assert read_official(tmp_path / "a.pth")[0] == "ognet_small"


def test_what_cannot_be_written(tmp_path):
    with pytest.raises(TypeError, match="model must be an OGNet, got DGCNN"):
        write_official(create_model("dgcnn", 3), tmp_path / "a.pth")
    with pytest.raises(ValueError, match="model must have a classifier, got num_classes=0"):
        write_official(create_model("ognet"), tmp_path / "a.pth")
    with pytest.raises(ValueError, match="got one that differs: for ognet, conv.0.weight must"):
        write_official(OGNet((8, 16, 24, 32), 3, **SMALL), tmp_path / "a.pth")
    assert not list(tmp_path.iterdir())
