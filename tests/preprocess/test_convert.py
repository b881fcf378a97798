"""One crop to a cloud or a mesh, and what a recipe refuses."""

import numpy as np
import pytest
import torch
from PIL import Image

import reid3d
from reid3d.data.images import Picture
from reid3d.preprocess.convert import Converter, Recipe, convert, convert_mesh
from reid3d.preprocess.fit import BodyFit, UprightFitter
from reid3d.preprocess.mapping import MODES
from reid3d.preprocess.synth import synth
from tests.cube import CubeFitter


@pytest.fixture(scope="module")
def person(tmp_path_factory):
    """A synthetic crop."""
    folder = synth(
        tmp_path_factory.mktemp("convert") / "people", preset="easy", ids=2, cams=2, images=2, seed=1, progress=False
    )
    return sorted(folder.glob("query/*.jpg"))[0]


def test_a_crop_becomes_one_point_a_pixel(tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(95, 106, (128, 64, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    cloud = convert(tmp_path / "a.png", fitter=CubeFitter())
    assert len(cloud) == 128 * 64
    assert np.array_equal(cloud.vertex[:4], [0, 2, 4, 6])  # the face towards the camera; the rest is hidden
    assert (cloud.vertex[4:] == -1).all()
    assert np.array_equal(cloud.xyz[:4], CubeFitter().body.v_template[::2].numpy())
    x, y = (0.8 * (np.array([-0.5, -0.5]) + [pixels.mean() / 255 * 0.2, 0]) * 128 + [64, 128]) / 2
    assert np.array_equal(cloud.rgb[0], pixels[int(y), int(x)])


def test_a_picture_in_memory_and_another_size():
    cloud = convert(Image.new("RGB", (30, 50), (10, 20, 30)), size=(64, 32), fitter=CubeFitter())
    assert len(cloud) == 64 * 32
    assert (cloud.rgb == [10, 20, 30]).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [(128, 64), (256, 128), (384, 128)])
def test_every_mode_and_resolution_shows_the_same_body(person, mode, size):
    cloud = reid3d.convert(person, mode=mode, size=size)
    body = cloud.xyz[cloud.vertex >= 0]
    assert mode == "dense" or len(cloud) == size[0] * size[1]
    base = reid3d.convert(person)
    base = base.xyz[base.vertex >= 0]
    assert len(body) > 1000
    axes = [1] if mode == "official" else [0, 1, 2]  # it colours far sides too, and fits the stretched crop
    for end in (np.min, np.max):
        assert np.abs(end(body, 0) - end(base, 0))[axes].max() < 0.1


def test_a_stretched_crop_keeps_its_proportions():
    # A circle in a square crop, mapped at 2:1: the pixels are squeezed, the plane of the background is not.
    y, x = np.mgrid[:100, :100] - 49.5
    disc = np.where((x**2 + y**2 < 30**2)[..., None], [255, 0, 0], [0, 0, 200]).astype(np.uint8)
    cloud = convert(Image.fromarray(disc), fitter=CubeFitter(half=1e-3), size=(128, 64))
    red = cloud.xyz[(cloud.rgb[:, 0] > 128) & (cloud.vertex < 0)]
    width, height = np.ptp(red[:, 0]), np.ptp(red[:, 1])
    assert width == pytest.approx(height, rel=0.05)
    assert height == pytest.approx(0.6 * 2 / 0.8, rel=0.05)  # of the crop's 2 / s metres


def test_a_mesh_has_the_colours_of_its_pixels(person):
    verts, faces, rgb = convert_mesh(person)
    assert verts.dtype == np.float32 and verts.shape == rgb.shape == (6872, 3) and faces.shape == (13717, 3)
    dense = convert(person, mode="dense")
    body = dense.vertex >= 0
    assert np.array_equal(rgb[dense.vertex[body]], dense.rgb[body]) and np.array_equal(
        verts[dense.vertex[body]], dense.xyz[body]
    )
    hidden = np.setdiff1d(np.arange(6872), dense.vertex)
    assert (rgb[hidden] == 128).all() and len(hidden) > 2000


def test_a_fit_without_confidence_becomes_an_upright_body(person):
    with pytest.warns(UserWarning, match="no body was fitted with confidence, an upright one stands in"):
        cloud = convert(person, min_confidence=1.0)
    upright = UprightFitter()([np.zeros((128, 64, 3), np.uint8)], ["a"]).verts[0].numpy()
    body = cloud.vertex >= 0
    assert body.sum() > 1000 and np.array_equal(cloud.xyz[body], upright[cloud.vertex[body]])
    with pytest.warns(UserWarning, match="stands in"):
        assert np.array_equal(convert_mesh(person, min_confidence=1.0)[0], upright)
    assert np.array_equal(convert(person, fitter="mean").xyz, cloud.xyz)  # asked for: no warning


@pytest.mark.parametrize(
    ("verts", "cam", "confidence"),
    [
        (1.0, [torch.nan, 0, 0], 0.9),
        (1.0, [1e-9, 0, 0], 0.9),
        (1.0, [-1, 0, 0], 0.9),
        (1.0, [1, 1e6, 0], 0.9),
        (torch.inf, [1, 0, 0], 0.9),
        (1e6, [1, 0, 0], 0.9),
        (1.0, [1, 0, 0], 0.05),
        (1.0, [1, 0, 0], torch.nan),
    ],
)
def test_a_fit_out_of_this_world_is_not_trusted(verts, cam, confidence):
    fitter = CubeFitter()
    bodies = fitter.body.v_template.repeat(2, 1, 1)
    bodies[1, 3, 2] = verts
    fit = BodyFit(bodies, torch.tensor([[0.8, 0, 0], cam]), torch.tensor([0.75, confidence]))
    fitter.forward = lambda crops, names: fit
    picture = Picture(np.zeros((128, 64, 3), np.uint8), (128, 64))
    good, bad = Converter(Recipe(fitter))([picture, picture], ["a", "b"])
    assert good.quality == {"confidence": 0.75, "visible": 0.5, "inside": 1.0} and good.fit == "CubeFitter"
    assert bad.fit == "mean" and bad.quality["confidence"] <= 0.05 and bad.quality["inside"] == 1.0
    assert len(good.cloud) == len(bad.cloud) == 128 * 64
    assert (
        good.pose is None and bad.pose.shape == (24, 3) and abs(bad.pose[0]) == pytest.approx([np.pi, 0, 0], abs=1e-5)
    )


def test_what_convert_refuses(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"no picture")
    picture = Image.new("RGB", (64, 128))
    with pytest.raises(ValueError, match=f"image: {tmp_path / 'a.jpg'}: not a JPEG"):
        convert(tmp_path / "a.jpg", fitter=CubeFitter())
    with pytest.raises(FileNotFoundError, match="no.jpg"):
        convert(tmp_path / "no.jpg", fitter=CubeFitter())
    for options, error, words in (
        ({"size": (4, 64)}, ValueError, r"size must be .* at least 8 .*, got \(4, 64\)"),
        ({"size": (9000, 9000)}, ValueError, r"size must be .* at most 50 megapixels, got \(9000, 9000\)"),
        ({"size": (128.0, 64)}, TypeError, r"size must be two integers .*, got \(128.0, 64\)"),
        ({"mode": "best"}, ValueError, "mode must be one of paper, dense, surface, official, got 'best'"),
        ({"min_confidence": 1.5}, ValueError, "min_confidence must be in 0..1, got 1.5"),
        ({"fitter": "best"}, ValueError, "fitter must be one of default, .*, got 'best'"),
    ):
        with pytest.raises(error, match=words):
            convert(picture, **options)
