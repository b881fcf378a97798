"""Crops on their way to a 2D network: draws written out by hand, then the draws of many seeds."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from reid3d.data.image_transforms import (
    ERASED,
    ImageEvalTransform,
    ImageTrainTransform,
    random_erasing,
    random_occlusion,
    random_shift,
)

RANDOM = (random_shift, random_erasing, random_occlusion)


class Script:
    """A generator whose draws are written down; every draw tells the range it must be from, and none may be left."""

    def __init__(self, *draws):
        self.draws = list(draws)

    def _next(self, kind, *bounds):
        expected, value = self.draws.pop(0)
        assert expected == (kind, *(pytest.approx(bound) for bound in bounds)), (kind, bounds)
        return value

    def random(self):
        return self._next("random")

    def uniform(self, low, high):
        return self._next("uniform", low, high)

    def integers(self, low, high=None):
        return self._next("integers", *((0, low) if high is None else (low, high)))


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def rng(seed=0):
    return np.random.default_rng(seed)


def rows(*values, width=4):
    """An image of rows that are of one grey each."""
    return np.repeat(np.uint8(values), width * 3).reshape(len(values), width, 3)


def test_eval_is_pillows_resampling():
    pixels = noise(60, 20)
    for resample in ("bilinear", "bicubic"):
        out = ImageEvalTransform(32, 16, resample)(pixels, rng())
        expected = Image.fromarray(pixels).resize((16, 32), getattr(Image, resample.upper()))
        assert out.dtype == torch.uint8 and out.shape == (3, 32, 16) and out.is_contiguous()
        assert np.array_equal(out.permute(1, 2, 0).numpy(), np.asarray(expected))
    assert ImageEvalTransform()(pixels, rng()).shape == (3, 256, 128)


def test_eval_by_hand():
    """Two columns become four: PIL's centres lie at 0.25, 0.75, 1.25 and 1.75 of columns whose own are 0.5 and 1.5."""
    pixels = np.uint8([[[0, 100, 200], [100, 100, 0]]])
    out = ImageEvalTransform(1, 4)(pixels, rng())
    assert out.tolist() == [[[0, 25, 75, 100]], [[100] * 4], [[200, 150, 50, 0]]]


@pytest.mark.parametrize("kind", [ImageEvalTransform, lambda *size: ImageTrainTransform(*size, flip=False)])
@pytest.mark.parametrize("size", [(6, 4), (1, 1)])
def test_right_size_is_taken_as_it_is_and_copied(kind, size):
    pixels = noise(*size)
    before = pixels.copy()
    out = kind(*size)(pixels, rng())
    assert np.array_equal(out.permute(1, 2, 0).numpy(), pixels)
    out.zero_()
    assert np.array_equal(pixels, before)


def test_shift_without_crop_by_hand():
    """Half as tall and half as wide, at row 1 and column 2 of the canvas."""
    script = Script(
        (("random",), 0.5),  # not below 0.5: no crop
        (("integers", 0, 1), 0),
        (("uniform", 0.5, 1), 0.5),  # 4 rows -> 2
        (("uniform", 0.5, 1), 0.5),  # 4 columns -> 2
        (("integers", 0, 3), 1),
        (("integers", 0, 3), 2),
    )
    out = random_shift(rows(10, 10, 10, 10), script)
    expected = np.full((4, 4, 3), 127)
    expected[1:3, 2:4] = 10
    assert np.array_equal(out, expected) and out.dtype == np.uint8 and not script.draws


def test_shift_with_crop_by_hand():
    """Of ten rows those from the second to the ninth (r_c = 0.8), stretched to all ten rows, in half the width."""
    pixels = rows(0, 40, 40, 40, 40, 40, 40, 40, 40, 0)
    script = Script(
        (("random",), 0.49),
        (("uniform", 0.7, 1), 0.8),  # 8 rows
        (("integers", 0, 3), 1),  # from row 1 on: neither black row
        (("uniform", 0.5, 1.25), 1.25),  # as tall as the canvas
        (("uniform", 0.5, 1), 0.75),  # 3 of 4 columns
        (("integers", 0, 1), 0),
        (("integers", 0, 2), 1),
    )
    expected = np.full((10, 4, 3), 127)
    expected[:, 1:] = 40
    assert np.array_equal(random_shift(pixels, script), expected) and not script.draws


def test_shift_keeps_rows_as_they_are_where_nothing_is_scaled():
    script = Script(
        (("random",), 0.0),
        (("uniform", 0.75, 1), 0.75),
        (("integers", 0, 2), 1),  # the last three rows
        (("uniform", 0.25, 4 / 3), 1.0),
        (("uniform", 0.5, 1), 1.0),
        (("integers", 0, 2), 0),  # at the top
        (("integers", 0, 1), 0),
    )
    out = random_shift(rows(1, 2, 3, 4), script, crop=0.1, min_crop=0.75, min_height=0.25, fill=9)
    assert np.array_equal(out, rows(2, 3, 4, 9)) and not script.draws


def test_shift_resamples_as_told():
    pixels, outs = noise(40, 20), {}
    for resample in ("bilinear", "bicubic"):
        script = Script(
            (("random",), 0.9),
            (("integers", 0, 1), 0),
            (("uniform", 0.5, 1), 0.5),
            (("uniform", 0.5, 1), 0.5),
            (("integers", 0, 21), 3),
            (("integers", 0, 11), 4),
        )
        outs[resample] = random_shift(pixels, script, resample=resample)
        patch = np.asarray(Image.fromarray(pixels).resize((10, 20), getattr(Image, resample.upper())))
        assert np.array_equal(outs[resample][3:23, 4:14], patch)
    assert not np.array_equal(outs["bilinear"], outs["bicubic"])


def test_erasing_by_hand():
    """A quarter of 10 x 10 as high as wide is 5 x 5; the first draw, 10 high and 4 wide, is not lower than that."""
    script = Script(
        (("uniform", 0.02, 0.4), 0.4),
        (("uniform", 0.3, 10 / 3), 2.5),
        (("uniform", 0.02, 0.4), 0.25),
        (("uniform", 0.3, 10 / 3), 1.0),
        (("integers", 0, 6), 5),
        (("integers", 0, 6), 2),
    )
    pixels = noise(10, 10)
    expected = pixels.copy()
    expected[5:10, 2:7] = 152, 144, 129
    assert np.array_equal(random_erasing(pixels, script), expected) and not script.draws


def test_erased_is_torchreids_colour_to_eight_bits():
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    assert ERASED == tuple(np.rint((np.array([0.4914, 0.4822, 0.4465]) * std + mean) * 255))


def test_erasing_gives_up():
    pixels = noise(1, 9)  # nothing of a pixel's height is lower than this
    draws = [(("uniform", 0.02, 0.4), 0.4), (("uniform", 0.3, 10 / 3), 1.0)] * 100
    script = Script(*draws)
    assert np.array_equal(random_erasing(pixels, script), pixels) and not script.draws


def test_occlusion_by_hand():
    script = Script((("integers", 1, 8), 4), (("integers", 0, 17), 16), (("integers", 0, 7), 1))
    pixels = noise(20, 10)
    expected = pixels.copy()
    expected[16:20, 1:5] = 255
    assert np.array_equal(random_occlusion(pixels, script), expected) and not script.draws


def test_training_does_its_steps_in_order():
    """Mirrored, shifted (to where it was), resized (to as large), then erased, then occluded over what was erased."""
    pixels = np.concatenate([rows(10, 10, width=2), rows(50, 50, width=2)], axis=1)
    shifted = [
        (("random",), 0.9),
        (("integers", 0, 1), 0),
        (("uniform", 0.5, 1), 1.0),
        (("uniform", 0.5, 1), 0.99),  # 4 columns
        (("integers", 0, 1), 0),
        (("integers", 0, 1), 0),
    ]
    script = Script(
        (("random",), 0.49),  # mirrored
        (("random",), 0.29),  # shifted
        *shifted,
        (("random",), 0.19),  # erased, of 4 x 4
        (("uniform", 0.02, 0.4), 0.25),
        (("uniform", 0.3, 10 / 3), 1.0),
        (("integers", 0, 3), 0),
        (("integers", 0, 3), 1),
        (("integers", 1, 3), 1),  # occluded
        (("integers", 0, 4), 1),
        (("integers", 0, 4), 1),
    )
    out = ImageTrainTransform(4, 4, erasing=0.2, occlusion=True, shift=0.3)(pixels, script)
    assert not script.draws
    assert out[0].tolist() == [[50, 152, 152, 10], [50, 255, 152, 10], [50, 50, 10, 10], [50, 50, 10, 10]]
    assert out[2, 0].tolist() == [50, 129, 129, 10]


@pytest.mark.parametrize("resample", ["bilinear", "bicubic"])
def test_training_shifts_before_it_resizes(resample):
    transform = ImageTrainTransform(32, 16, resample, flip=False, shift=1.0)
    pixels = noise(100, 40)
    again = rng(7)
    again.random()
    shifted = random_shift(pixels, again, resample=resample)
    assert torch.equal(transform(pixels, rng(7)), ImageEvalTransform(32, 16, resample)(shifted, rng()))


@pytest.mark.parametrize("function", RANDOM)
def test_what_is_given_is_left_as_it_is(function):
    pixels = noise(30, 20)
    before = pixels.copy()
    for seed in range(20):
        out = function(pixels, rng(seed))
        out[:] = 0
    assert np.array_equal(pixels, before)


def test_same_seed_same_bytes():
    pixels = noise(50, 30)
    transform = ImageTrainTransform(64, 32, erasing=0.5, occlusion=True, shift=0.5)
    outs = [transform(pixels, rng(seed)) for seed in (1, 1, 2)]
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])
    state = rng(3)
    before = state.bit_generator.state
    ImageEvalTransform(8, 8)(pixels, state)
    assert state.bit_generator.state == before  # nothing random there


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (9, 1), (2, 2), (50, 30), (300, 100)])
def test_any_size_comes_out_in_the_one_asked_for(size):
    transform = ImageTrainTransform(24, 12, erasing=1.0, occlusion=True, shift=1.0)
    for seed in range(20):
        out = transform(noise(*size), rng(seed))
        assert out.shape == (3, 24, 12) and out.dtype == torch.uint8
    for function in RANDOM:
        assert function(noise(*size), rng()).shape == (*size, 3)


def box(changed):
    """Rows and columns of what is True, which must be a full rectangle."""
    ys, xs = np.nonzero(changed)
    top, bottom, left, right = ys.min(), ys.max() + 1, xs.min(), xs.max() + 1
    assert changed[top:bottom, left:right].all() and changed.sum() == (bottom - top) * (right - left)
    return top, bottom, left, right


def test_erased_share_and_aspect():
    pixels, boxes = np.zeros((64, 32, 3), np.uint8), []
    for seed in range(400):
        out = random_erasing(pixels, rng(seed))
        top, bottom, left, right = box((out == ERASED).all(2))
        boxes.append((top, bottom, left, right))
        tall, wide = bottom - top, right - left
        assert tall < 64 and wide < 32
        # each side is rounded by half a pixel at most
        assert (tall - 0.5) * (wide - 0.5) <= 0.4 * 64 * 32 and (tall + 0.5) * (wide + 0.5) >= 0.02 * 64 * 32
        assert (tall + 0.5) / (wide - 0.5) >= 0.3 and (tall - 0.5) / (wide + 0.5) <= 1 / 0.3
    top, bottom, left, right = np.array(boxes).T
    assert top.min() == 0 and bottom.max() == 64 and left.min() == 0 and right.max() == 32  # up to every edge
    share = (bottom - top) * (right - left) / (64 * 32)
    assert share.min() < 0.05 and share.max() > 0.35


def test_occluded_squares():
    pixels, sides, ends = np.zeros((60, 20, 3), np.uint8), set(), []
    for seed in range(600):
        top, bottom, left, right = box((random_occlusion(pixels, rng(seed)) == 255).all(2))
        assert bottom - top == right - left
        sides.add(bottom - top)
        ends.append((top, bottom, left, right))
    assert sides == set(range(1, 16))  # below 0.8 * 20
    ends = np.array(ends)
    assert ends.min(0)[[0, 2]].tolist() == [0, 0] and ends.max(0)[[1, 3]].tolist() == [60, 20]


def test_shifted_boxes():
    """All white, so that the patch is told from its canvas."""
    pixels, boxes = np.full((80, 40, 3), 255, np.uint8), []
    for seed in range(400):
        out = random_shift(pixels, rng(seed))
        assert set(np.unique(out)) <= {127, 255}
        boxes.append(box((out == 255).all(2)))
    top, bottom, left, right = np.array(boxes).T
    assert top.min() == 0 and bottom.max() == 80 and left.min() == 0 and right.max() == 40
    assert (bottom - top).min() >= round(0.35 * 80) and (right - left).min() >= 20  # 0.7 * 0.5 of the height
    assert ((bottom - top) < 40).any()  # lower than half, which takes a crop
    assert abs((right - left).mean() / 40 - 0.75) < 0.03


def test_shift_crops_half_the_time_and_anywhere():
    pixels = np.repeat(np.arange(100, dtype=np.uint8), 8 * 3).reshape(100, 8, 3)
    first, last = [], []
    for seed in range(400):
        out = random_shift(pixels, rng(seed), min_height=1.0, min_width=1.0, fill=255)
        seen = np.unique(out[out != 255])
        first.append(seen[0])
        last.append(seen[-1])
    first, last = np.array(first), np.array(last)
    cropped = (first > 1) | (last < 98)  # a row at an end is blurred at most
    assert abs(cropped.mean() - 0.5) < 0.1
    assert (last - first >= 67).all() and first.max() > 20 and last.min() < 80


@pytest.mark.parametrize(
    ("changes", "expected"), [({"erasing": 0.3}, 0.3), ({"shift": 0.7}, 0.7), ({"flip": True}, 0.5)]
)
def test_probabilities(changes, expected):
    transform = ImageTrainTransform(16, 8, **{"flip": False, **changes})
    pixels = noise(16, 8)
    plain = ImageEvalTransform(16, 8)(pixels, rng())
    changed = [not torch.equal(transform(pixels, rng(seed)), plain) for seed in range(500)]
    assert abs(np.mean(changed) - expected) < 3 * math.sqrt(expected * (1 - expected) / 500)


def test_flip_mirrors():
    transform, pixels = ImageTrainTransform(16, 8), noise(16, 8)
    plain = ImageEvalTransform(16, 8)(pixels, rng())
    outs = [transform(pixels, rng(seed)) for seed in range(20)]
    mirrored = [torch.equal(out, plain.flip(2)) for out in outs]
    assert any(mirrored) and all(m or torch.equal(out, plain) for m, out in zip(mirrored, outs, strict=True))


@pytest.mark.parametrize("kind", [ImageEvalTransform, ImageTrainTransform])
def test_errors_of_sizes(kind):
    with pytest.raises(ValueError, match="height must be at least 1, got 0"):
        kind(height=0)
    with pytest.raises(ValueError, match="width must be at least 1, got -3"):
        kind(width=-3)
    with pytest.raises(TypeError, match="height must be an int, got 2.5"):
        kind(height=2.5)
    with pytest.raises(ValueError, match="resample must be 'bilinear' or 'bicubic', got 'nearest'"):
        kind(resample="nearest")


@pytest.mark.parametrize("name", ["erasing", "shift"])
@pytest.mark.parametrize("value", [-0.1, 1.5, math.nan])
def test_errors_of_probabilities(name, value):
    with pytest.raises(ValueError, match=rf"{name} must be in \[0, 1\], got {value}"):
        ImageTrainTransform(**{name: value})


@pytest.mark.parametrize("function", [*RANDOM, ImageEvalTransform(), ImageTrainTransform()])
def test_errors_of_pixels(function):
    with pytest.raises(TypeError, match="pixels must be a uint8 array, got float32"):
        function(noise(4, 4).astype(np.float32), rng())
    with pytest.raises(TypeError, match="pixels must be a uint8 array, got list"):
        function([[0, 0, 0]], rng())
    for shape in ((4, 4), (4, 4, 4), (3, 4, 5), (0, 4, 3), (2, 4, 4, 3)):
        with pytest.raises(ValueError, match=r"pixels must be \(h, w, 3\) with at least one pixel, got"):
            function(np.zeros(shape, np.uint8), rng())


def test_errors_of_parameters():
    pixels = noise(4, 4)
    for name in ("crop", "min_crop", "min_height", "min_width"):
        with pytest.raises(ValueError, match=rf"{name} must be in \[0, 1\], got 1.1"):
            random_shift(pixels, rng(), **{name: 1.1})
    for function in (random_shift, random_occlusion):
        with pytest.raises(ValueError, match=r"fill must be in \[0, 255\], got 256"):
            function(pixels, rng(), fill=256)
    with pytest.raises(ValueError, match="max_side must be in"):
        random_occlusion(pixels, rng(), max_side=-1)
    for area in ((0.5, 0.4), (-0.1, 0.5), (0.5, 1.1)):
        with pytest.raises(ValueError, match=r"area must be two ascending shares in \[0, 1\], got"):
            random_erasing(pixels, rng(), area=area)
    for aspect in ((0, 1), (2, 1)):
        with pytest.raises(ValueError, match="aspect must be two ascending positive numbers, got"):
            random_erasing(pixels, rng(), aspect=aspect)
