"""Models by name, and weights files that know what they are."""

import json

import pytest
import torch
from safetensors.torch import save_file

from reid3d.models import create_model, list_models, resolve_device, save_weights

SIZES = {"init_points": 32, "k": 4}


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(3)
    model = create_model("ognet_small", 5, **SIZES)
    with torch.no_grad():
        for buffer in model.buffers():
            buffer.add_(1)
    save_weights(model, tmp_path / "weights.safetensors", trained_on="nothing at all")
    return model, tmp_path / "weights.safetensors"


def test_names():
    of_clouds = ["dgcnn", "ognet", "ognet_deep", "ognet_small", "pointnet2_msg", "pointnet2_ssg"]
    of_images = [
        "osnet",
        "plr_osnet",
        "qaconv152",
        "qaconv50",
        "qaconv50_ibn_b",
        "relation_f",
        "relation_s",
        "resnet50",
        "rmgl",
    ]
    assert list_models() == sorted(of_clouds + of_images)
    model = create_model("ognet", 3)
    assert (model.name, model.num_classes, model.inputs, model.training) == ("ognet", 3, "cloud", True)


def test_weights_need_no_name(saved):
    model, path = saved
    loaded = create_model(weights=path)
    assert (loaded.name, loaded.kwargs, loaded.num_classes) == ("ognet_small", SIZES, 0)
    xyz, rgb = torch.rand(2, 40, 3), torch.rand(2, 40, 3) - 0.5
    assert torch.equal(loaded.eval()(xyz, rgb), model.eval()(xyz, rgb))


def test_classifier_is_loaded_when_it_fits(saved):
    model, path = saved
    same = create_model("ognet_small", 5, weights=path)
    assert torch.equal(same.head.classifier.weight, model.head.classifier.weight)
    other = create_model(num_classes=7, weights=path)
    assert other.head.classifier.weight.shape == (7, 512)
    assert torch.equal(other.head.linear.weight, model.head.linear.weight)
    assert create_model(weights=path, dropout=0.1).head.dropout.p == 0.1


@pytest.mark.parametrize(
    ("trained_on", "points", "background"),
    [
        ('{"points": 96}', 96, True),
        ('{"points": 96, "background": false}', 96, False),
        ("nothing", None, True),
        ("[]", None, True),
        ('{"points": null}', None, True),
    ],
)
def test_what_it_was_fed_with_comes_with_the_weights(trained_on, points, background, tmp_path):
    model = create_model("ognet_small", **SIZES)
    assert model.points is None and model.background is True
    save_weights(model, tmp_path / "w", trained_on=trained_on)
    again = create_model(weights=tmp_path / "w")
    assert (again.points, again.background) == (points, background)


def test_devices():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type in ("cpu", "cuda")
    for name in ("abacus", "cuda:99", "hpu", "0", ""):
        with pytest.raises(RuntimeError, match=f"^device '{name}' cannot be used: .") as caught:
            resolve_device(name)
        assert "\n" not in str(caught.value)


def test_metadata(saved):
    from safetensors import safe_open

    with safe_open(saved[1], "pt") as file:
        meta = file.metadata()
    assert json.loads(meta.pop("kwargs")) == SIZES
    assert meta == {
        "format": "reid3d-weights-1",
        "model": "ognet_small",
        "num_classes": "5",
        "trained_on": "nothing at all",
    }


def test_errors(saved, tmp_path):
    with pytest.raises(
        ValueError, match="one of dgcnn, ognet, ognet_deep, ognet_small, osnet, plr_osnet, .*, rmgl, got 'resnet'"
    ):
        create_model("resnet")
    with pytest.raises(
        ValueError, match="one of dgcnn, ognet, ognet_deep, ognet_small, osnet, plr_osnet, .*, rmgl, got None"
    ):
        create_model()
    with pytest.raises(ValueError, match="ognet has the arguments k, convs, .*, dropout, .*, preset, got depth"):
        create_model("ognet", depth=3)
    with pytest.raises(ValueError, match="num_classes must not be negative"):
        create_model("ognet", -1)
    with pytest.raises(ValueError, match="name must be that of the weights, 'ognet_small', got 'ognet'"):
        create_model("ognet", weights=saved[1])
    with pytest.raises(FileNotFoundError, match="missing"):
        create_model(weights=tmp_path / "missing.safetensors")
    (tmp_path / "text").write_text("no weights")
    with pytest.raises(ValueError, match="must be a safetensors file"):
        create_model(weights=tmp_path / "text")
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign")
    with pytest.raises(ValueError, match="must be a reid3d-weights-1 file"):
        create_model(weights=tmp_path / "foreign")


def test_tensors_that_do_not_fit(saved, tmp_path):
    from safetensors import safe_open

    with safe_open(saved[1], "pt") as file:
        tensors, meta = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()
    tensors.pop("head.linear.weight")
    save_file(tensors, tmp_path / "short", meta)
    with pytest.raises(ValueError, match="1 tensors, first head.linear.weight"):
        create_model(weights=tmp_path / "short")
