"""The embedded fitter: what its figures mean, that the shipped weights reach them, and that training resumes."""

import json
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict, replace
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from reid3d.ops import farthest_point_sample
from reid3d.preprocess import train_fitter
from reid3d.preprocess.body import axis_angle_to_matrix, load_body, rotation_6d_to_matrix, some_vertices
from reid3d.preprocess.camera import project
from reid3d.preprocess.fit import (
    FITTERS,
    BodyFit,
    EmbeddedFitter,
    Fitter,
    UprightFitter,
    load_fitter,
    load_regressor,
    mirror,
    mirror_body,
    mirror_seen,
)
from reid3d.preprocess.hmr import FINE, REDUCED, Regressed, Regressor, Seen
from reid3d.preprocess.train_fitter import (
    HELD_OUT,
    MEAN,
    RUN_BITS,
    TRUST,
    Batch,
    Recipe,
    RenderedBatches,
    evaluate,
    held_out,
    loss,
    loss_of_seen,
    measure,
    normalise,
    procrustes,
    shape_of,
    spots,
    train,
)

ASSETS = files("reid3d.preprocess") / "assets"


@pytest.fixture(scope="module")
def fitter() -> EmbeddedFitter:
    return EmbeddedFitter()


def fit_images(fitter: Fitter, images: torch.Tensor) -> BodyFit:
    return fitter(list(images.numpy()), [str(i) for i in range(len(images))])


@pytest.fixture(scope="module")
def batch() -> Batch:
    return RenderedBatches(1, 16, HELD_OUT + 10_000)[0]


def test_shipped_figures_are_those_of_the_shipped_weights(fitter: Fitter) -> None:
    shipped = json.loads((ASSETS / "fitter.json").read_text())
    assert shipped["crops"] >= 5000
    measured = evaluate(fitter, 512, workers=0)  # the first of the crops that fitter.json was measured on
    assert measured["crops"] == 512
    for figure in ("mpjpe_mm", "pa_mpjpe_mm", "pve_mm", "yaw_median_deg", "joints2d_px", "iou"):
        assert measured[figure] == pytest.approx(shipped[figure], rel=0.1)
    assert abs(measured["front_back"] - shipped["front_back"]) < 0.02


def test_shipped_weights_reach_their_target() -> None:
    shipped = json.loads((ASSETS / "fitter.json").read_text())
    assert (
        shipped["mpjpe_mm"] <= 80 and shipped["pve_mm"] <= 80 and shipped["joints2d_px"] <= 4 and shipped["iou"] >= 0.8
    )
    assert shipped["yaw_median_deg"] <= 9 and shipped["front_back"] <= 0.04 and shipped["doubted"] >= 0.6


def test_evaluation_of_perfect_and_of_wrong_answers() -> None:
    truth = [RenderedBatches(1, 64, HELD_OUT + i)[0] for i in range(2)]

    class Answer(Fitter):
        """Answers the truth, turned about the vertical by `turn` and moved by `shift`."""

        def __init__(self, turn: float, shift: float) -> None:
            super().__init__()
            self.body, self.turn, self.shift, self.calls = load_body("low"), turn, shift, 0

        def forward(self, crops: Sequence[np.ndarray], names: Sequence[str]) -> BodyFit:
            batch = truth[self.calls]
            self.calls += 1
            assert all(np.array_equal(a, b) for a, b in zip(crops, batch.images.numpy(), strict=True))
            rotmats = batch.rotmats.clone()
            rotmats[:, 0] = axis_angle_to_matrix(torch.tensor([0.0, self.turn, 0.0])) @ rotmats[:, 0]
            posed = self.body(rotmats, batch.betas)
            cam = batch.cam + torch.tensor([0.0, self.shift, 0.0])
            sure = torch.arange(len(crops)) / len(crops)
            return BodyFit(posed.verts, cam, sure, rotmats, batch.betas, posed.joints)

    perfect = evaluate(Answer(0.0, 0.0), 65, workers=0)
    assert perfect["crops"] == 128
    assert all(perfect[k] == 0 for k in ("mpjpe_mm", "pa_mpjpe_mm", "pve_mm", "yaw_median_deg", "front_back", "bad"))
    assert perfect["joints2d_px"] < 1.5  # the weak camera against the true one
    assert 0.85 < perfect["iou"] < 1  # as are skirts against thick legs
    turned = evaluate(Answer(torch.pi / 6, 0.0), 128, workers=0)
    assert turned["yaw_median_deg"] == pytest.approx(30, abs=0.2) and turned["front_back"] == 0
    assert turned["pa_mpjpe_mm"] == 0 < turned["mpjpe_mm"] < turned["pve_mm"] * 1.5
    back = evaluate(Answer(torch.pi, 0.0), 128, workers=0)
    assert back["front_back"] == 1 and back["bad"] > 0.5
    moved = evaluate(Answer(0.0, 0.1), 128, workers=0)
    scale = torch.cat([t.cam[:, 0] for t in truth]).mean()
    assert moved["joints2d_px"] == pytest.approx(float(0.1 * scale * 64), rel=0.1)
    assert moved["mpjpe_mm"] == 0 and moved["iou"] < perfect["iou"] - 0.1


def test_procrustes_undoes_a_similarity() -> None:
    g = torch.Generator().manual_seed(0)
    b = torch.randn(4, 24, 3, generator=g)
    rotation = axis_angle_to_matrix(torch.randn(4, 3, generator=g))
    a = 0.7 * b @ rotation.mT + torch.randn(4, 1, 3, generator=g)
    torch.testing.assert_close(procrustes(a, b), b, atol=1e-5, rtol=0)
    mirrored = b * torch.tensor([-1.0, 1, 1])
    assert (procrustes(mirrored, b) - b).norm(dim=-1).mean() > 0.3  # a mirror image is no similarity


def test_loss_is_least_at_the_truth(batch: Batch) -> None:
    body = load_body("low")
    truth = batch._replace(joints2d=train_fitter.project_joints(body.joints(batch.rotmats, batch.betas)[1], batch.cam))
    maps = spots(truth.joints2d).clamp(min=1e-8).log()
    seen = Seen(40.0 * truth.silhouette - 20, truth.joints2d, torch.zeros(16, 24), maps)
    right = Regressed(truth.rotmats, truth.betas, truth.cam)
    least = loss(body, [right] * 3, seen, truth)
    assert float(least - train_fitter.OF_SEEN * loss_of_seen(seen, truth)) == pytest.approx(0, abs=1e-4)
    turned = axis_angle_to_matrix(torch.tensor([0.0, 0.3, 0.0])) @ truth.rotmats
    for wrong in (
        right._replace(rotmats=turned),
        right._replace(betas=truth.betas + 1),
        right._replace(cam=truth.cam * 1.1),
    ):
        assert loss(body, [right, right, wrong], seen, truth) > least + 0.1
        assert loss(body, [wrong, right, right], seen, truth) > least + 0.001
    for blind in (
        seen._replace(mask=-seen.mask),
        seen._replace(joints2d=seen.joints2d + 0.1),
        seen._replace(maps=seen.maps.roll(2, 2)),
    ):
        assert loss(body, [right] * 3, blind, truth) > least + 0.1
    # Joints beyond the crop's edges are no fault of what is seen.
    outside = (truth.joints2d.abs() > torch.tensor([0.5, 1.0])).any(2)
    assert outside.any()
    lost = torch.where(outside[..., None], 9.0, seen.joints2d)
    assert loss(body, [right] * 3, seen._replace(joints2d=lost), truth) == least


def test_spots_are_where_the_joints_are() -> None:
    joints = torch.tensor([[[0.0, 0.0], [0.4, -0.9], [-0.46875, 0.96875]]])
    spot = spots(joints).view(1, 3, 32, 16)
    torch.testing.assert_close(spot.sum((2, 3)), torch.ones(1, 3))
    grid = Regressor().grid.view(32, 16, 2)
    torch.testing.assert_close((spot[..., None] * grid).sum((2, 3))[0, 0], joints[0, 0], atol=1e-5, rtol=0)
    assert spot[0, 2].argmax() == 31 * 16  # the centre of the lower left cell
    torch.testing.assert_close(grid[31, 0], joints[0, 2])


def test_what_is_seen_by_hand() -> None:
    net = Regressor()
    fine = torch.randn(1, FINE, 32, 16)
    maps = torch.zeros(1, 28, 32, 16)
    maps[0, 5, 10, 3] = 100.0  # joint 5 is there, the others anywhere
    maps[0, 24:, 20, 7] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    features, seen = net.read(torch.zeros(1, REDUCED * 8), fine, maps)
    torch.testing.assert_close(seen.joints2d[0, 5], torch.tensor([(7 - 16) / 32, (21 - 32) / 32]))
    torch.testing.assert_close(seen.joints2d[0, 0], torch.zeros(2), atol=1e-6, rtol=0)
    assert seen.spread[0, 5] == pytest.approx(0.001, abs=1e-3) and seen.spread[0, 0] > 0.5
    at_joints = features[0, REDUCED * 8 :].view(24, FINE + 3)
    torch.testing.assert_close(at_joints[5, :FINE], fine[0, :, 10, 3])
    torch.testing.assert_close(at_joints[0, :FINE], fine[0].mean((1, 2)), atol=1e-5, rtol=0)
    assert torch.equal(seen.mask[0, 40:42, 14:16], torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert seen.mask.shape == (1, 64, 32) and seen.mask.count_nonzero() == 4


def test_each_correction_is_told_how_far_the_body_is_from_what_is_seen() -> None:
    torch.manual_seed(0)
    net, body = Regressor().eval(), load_body("low")
    net.norm.running_mean.normal_()
    net.mean.copy_(train_fitter.mean_parameters(RenderedBatches(8, 4, MEAN)))
    net.correction.weight.data.normal_(0, 0.01)
    features, joints2d = torch.randn(2, net.hidden0.in_features), torch.rand(2, 24, 2) - 0.5
    found = net.regress(features, joints2d)
    parameters = net.mean.expand(2, -1)
    for guess in found:
        six, betas, cam = parameters.split([144, 15, 3], 1)
        joints = body.joints(rotation_6d_to_matrix(six.view(2, 24, 3, 2)), betas)[1]
        off = 5 * (joints2d - train_fitter.project_joints(joints, cam)).flatten(1).clamp(-1, 1)
        told = torch.cat([net.norm(features), parameters, off], 1)
        first = torch.cat([net.hidden0.weight, net.hidden1.weight], 1)
        hidden = (told @ first.T + net.hidden0.bias).relu()
        parameters = parameters + net.correction(net.hidden2(hidden).relu())
        six, betas, cam = parameters.split([144, 15, 3], 1)
        torch.testing.assert_close(guess.rotmats, rotation_6d_to_matrix(six.view(2, 24, 3, 2)), atol=1e-4, rtol=0)
        torch.testing.assert_close(guess.betas, betas, atol=1e-4, rtol=0)
        torch.testing.assert_close(guess.cam, cam, atol=1e-4, rtol=0)
    assert (found[0].cam - found[2].cam).abs().max() > 1e-3


def test_held_out_crops_are_never_trained_on() -> None:
    # A CPU generator uses the low 32 bits of a seed: the ranges must not meet there.
    last_of_last_run = ((MEAN >> RUN_BITS) << RUN_BITS) - 1
    assert last_of_last_run < MEAN < MEAN + 8 < TRUST < TRUST + 10_000 < HELD_OUT < HELD_OUT + 10_000 < 1 << 32
    first = [RenderedBatches(1, 4, seed)[0].images for seed in (0, MEAN, TRUST, HELD_OUT, 1 << RUN_BITS)]
    assert all(not torch.equal(a, b) for i, a in enumerate(first) for b in first[:i])
    for recipe in (Recipe(steps=1 << RUN_BITS - 1), Recipe(steps=0), Recipe(seed=MEAN >> RUN_BITS)):
        with pytest.raises(ValueError, match="steps times processes must be in"):
            train(recipe, Path("unused"), workers=0)
    for batch in (5, 2):
        with pytest.raises(ValueError, match=f"multiple of processes, 2 crops or more for each, got {batch} and 2"):
            train(Recipe(batch=batch), Path("unused"), workers=0)
    with pytest.raises(ValueError, match="fall must be above 0 and at most 1, got 0"):
        train(Recipe(fall=0), Path("unused"), workers=0)


def test_held_out_crops_show_what_training_does_not(batch: Batch) -> None:
    assert batch.clothed is not None and RenderedBatches(1, 4, 0)[0].clothed is None
    # The silhouette is that of the true body, half as large.
    body = load_body("low")
    large = shape_of(body, body(batch.rotmats, batch.betas).verts, batch.cam, 128)
    pooled = torch.nn.functional.avg_pool2d(large.float()[:, None], 2)[:, 0] > 0.5
    assert ((pooled & batch.silhouette).sum() / (pooled | batch.silhouette).sum()) > 0.93
    assert ((large & batch.clothed).sum() / (large | batch.clothed).sum()) > 0.85


def test_some_training_crops_have_their_edges_drawn_out(batch: Batch) -> None:
    parts = [RenderedBatches(1, 64, i)[0] for i in (1, 2)]
    images = torch.cat([part.images for part in parts])
    above = (images[:, 0] == images[:, 1]).all((1, 2)) & (images[:, -1] == images[:, -2]).all((1, 2))
    beside = (images[:, :, 0] == images[:, :, 1]).all((1, 2)) & (images[:, :, -1] == images[:, :, -2]).all((1, 2))
    assert 0.1 < above.float().mean() < 0.25 and 0.05 < beside.float().mean() < 0.2 and not (above & beside).any()
    # Who has street above and below them is smaller, by as much.
    height = torch.cat([part.joints2d[..., 1].amax(1) - part.joints2d[..., 1].amin(1) for part in parts])
    assert height[above].mean() < 0.95 * height[~above].mean()
    held_out = batch.images
    assert not (held_out[:, 0] == held_out[:, 1]).all((1, 2)).any()


def test_fit_lands_on_the_person(fitter: Fitter, batch: Batch) -> None:
    fit = fit_images(fitter, batch.images)
    assert fit.verts.shape == (16, len(fitter.body.v_template), 3)
    torch.testing.assert_close(fit.verts, fitter.body(fit.rotmats, fit.betas).verts)
    error = (train_fitter.project_joints(fit.joints, fit.cam) - batch.joints2d).norm(dim=-1) * 64
    assert error.mean() < 8


class Still(torch.nn.Module):
    """Settles nothing."""

    def forward(self, body: Regressed, *seen_and_steps: object) -> Regressed:
        return body


def test_fit_of_a_mirrored_crop_is_mirrored(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    fitter, mirrored_images = EmbeddedFitter(), batch.images.flip(2).contiguous()
    settled, settled_mirrored = fit_images(fitter, batch.images), fit_images(fitter, mirrored_images)
    monkeypatch.setattr(fitter, "settler", Still())
    fit, mirrored = fit_images(fitter, batch.images), fit_images(fitter, mirrored_images)
    torch.testing.assert_close(mirrored.rotmats, mirror(fit.rotmats), atol=1e-3, rtol=0)
    torch.testing.assert_close(mirrored.cam, fit.cam * torch.tensor([1.0, -1.0, 1.0]), atol=1e-3, rtol=0)
    torch.testing.assert_close(mirrored.betas, fit.betas, atol=1e-3, rtol=0)
    torch.testing.assert_close(mirrored.confidence, fit.confidence, atol=0.05, rtol=0)  # silhouettes are made of pixels
    # The vertices that are settled are not mirror images of each other: that leaves about a degree.
    off = (settled_mirrored.rotmats - mirror(settled.rotmats)).norm(dim=(2, 3)).mean()
    assert off < 0.03 and 0.02 < (settled.rotmats - fit.rotmats).norm(dim=(2, 3)).mean()


def test_settling_brings_fits_to_what_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    fitter, batch = EmbeddedFitter(), RenderedBatches(1, 64, HELD_OUT + 30_000)[0]
    crops = list(batch.images.numpy())
    settled, signs = fitter.fit(crops)
    monkeypatch.setattr(fitter, "settler", Still())
    plain, signs_before = fitter.fit(crops)
    after, before = measure(fitter, settled, batch), measure(fitter, plain, batch)
    assert after["iou"].mean() > before["iou"].mean() + 0.02
    assert after["joints2d"].mean() < before["joints2d"].mean() and after["mpjpe"].mean() < before["mpjpe"].mean()
    # The second sign is the IoU with the silhouette that is seen. Where it is poor, there are more steps.
    assert signs[:, 1].mean() > signs_before[:, 1].mean() + 0.02
    poor = signs_before[:, 1] < 0.65
    assert poor.any() and (signs[poor, 1] > signs_before[poor, 1] + 0.05).all()


def test_what_is_seen_in_a_mirror_comes_back(batch: Batch) -> None:
    maps = spots(batch.joints2d)
    seen = Seen(batch.silhouette.float(), batch.joints2d, batch.joints2d[..., 0].abs(), maps)
    mirrored = mirror_seen(seen)
    assert torch.equal(mirrored.joints2d[:, 4], batch.joints2d[:, 5] * torch.tensor([-1.0, 1.0]))  # the knees
    assert torch.equal(mirrored.spread[:, 4], seen.spread[:, 5])
    assert torch.equal(mirrored.mask[..., 0], seen.mask[..., -1])
    torch.testing.assert_close(mirrored.maps, spots(mirrored.joints2d))
    assert all(torch.equal(a, b) for a, b in zip(mirror_seen(mirrored), seen, strict=True))
    body = Regressed(batch.rotmats, batch.betas, batch.cam)
    joints = load_body("low").joints(mirror_body(body).rotmats, torch.zeros(16, 10))[1]
    there = train_fitter.project_joints(joints, mirror_body(body).cam)[:, 15]
    here = train_fitter.project_joints(load_body("low").joints(batch.rotmats, torch.zeros(16, 10))[1], batch.cam)[:, 15]
    torch.testing.assert_close(there, here * torch.tensor([-1.0, 1.0]), atol=0.02, rtol=0)  # the head


def test_fit_does_not_depend_on_the_batch(fitter: Fitter, batch) -> None:
    images = batch.images
    together, alone = fit_images(fitter, images), fit_images(fitter, images[3:4])
    torch.testing.assert_close(together.verts[3:4], alone.verts, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("height", "width"), [(256, 128), (160, 64), (128, 96), (384, 128)])
def test_cameras_of_other_shapes_see_the_same_body(fitter: Fitter, batch, height: int, width: int) -> None:
    # The same person in a crop with more street around, or enlarged: the joints fall on the same pixels of the photo.
    sure = fit_images(fitter, batch.images).confidence.topk(4).indices  # a fit in doubt changes with every pixel
    images = batch.images[sure]
    scale = max(height // 128, 1) if height in (256, 384) else 1
    big = images.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    top, side = height - 128 * scale, width - 64 * scale
    big = torch.nn.functional.pad(
        big.permute(0, 3, 1, 2).float(),
        (side // 2, side - side // 2, top // 2, top - top // 2) if side >= 0 else (0, 0, top // 2, top - top // 2),
        mode="replicate",
    )
    big = big[..., max(0, -side) // 2 :][..., :width].permute(0, 2, 3, 1).byte()
    fit, base = fit_images(fitter, big.contiguous()), fit_images(fitter, images)

    def pixels(f, h: int) -> torch.Tensor:  # from the crop's centre, in pixels of the original crop
        return train_fitter.project_joints(f.joints, f.cam) * h / 2

    error = (pixels(fit, height) / scale - pixels(base, 128)).norm(dim=-1)
    assert error.mean() < 8


@pytest.mark.parametrize(
    ("height", "width"),
    [(128, 64), (128, 63), (127, 64), (161, 64), (160, 65), (128, 97), (129, 96), (33, 17), (31, 40)],
)
def test_camera_counts_from_the_centre_of_odd_crops(height: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in regressor puts the body's origin on the bright spot; it must come back where it is in the crop."""
    fitter = EmbeddedFitter()

    class Spot(torch.nn.Module):
        mean, trust = torch.zeros(1), torch.zeros(5)

        def forward(self, x: torch.Tensor) -> tuple[Regressed, Seen]:
            weight = (x.mean(1) + 1).clamp(min=0)
            weight = weight / weight.sum((1, 2), keepdim=True)
            row = (weight.sum(2) * (torch.arange(128) + 0.5)).sum(1)
            column = (weight.sum(1) * (torch.arange(64) + 0.5)).sum(1)
            cam = torch.stack([torch.ones(len(x)), (column - 32) / 64, (row - 64) / 64], 1)
            shapes = (64, 32), (24, 2), (24,), (24, 512)
            nothing = (torch.full((len(x), *shape), v) for shape, v in zip(shapes, (-1.0, 1e3, 1.0, 0.0), strict=True))
            seen = Seen(*nothing)
            return Regressed(torch.eye(3).repeat(len(x), 24, 1, 1), torch.zeros(len(x), 15), cam), seen

    monkeypatch.setattr(fitter, "regressor", Spot())
    images = torch.zeros(1, height, width, 3, dtype=torch.uint8)
    row, column = height // 3, width // 2 - 3
    images[0, row - 2 : row + 3, column - 2 : column + 3] = 255
    cam = fit_images(fitter, images).cam
    pixel = project(torch.zeros(1, 1, 3), cam, height, width)[0, 0, :2]
    torch.testing.assert_close(pixel, torch.tensor([column + 0.5, row + 0.5]), atol=0.1, rtol=0)


def test_folding_changes_no_result(fitter: EmbeddedFitter, batch) -> None:
    plain, _ = load_regressor(ASSETS / "fitter.safetensors")
    x = normalise(batch.images)
    with torch.no_grad():
        for a, b in zip(plain.eval()(x), fitter.regressor(x), strict=True):
            for one, other in zip(a, b, strict=True):
                torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-5)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in fitter.regressor.modules())


def test_a_mirror_exchanges_left_and_right() -> None:
    body, g = load_body("low"), torch.Generator().manual_seed(0)
    rotmats = axis_angle_to_matrix(torch.randn(3, 24, 3, generator=g))
    # In the rest pose of a symmetric skeleton a mirrored pose has mirrored joints.
    offset = torch.tensor([-1.0, 1, 1])
    other = [0, 2, 1, 3, 5, 4, 6, 8, 7, 9, 11, 10, 12, 14, 13, 15, 17, 16, 19, 18, 21, 20, 23, 22]
    symmetric = deepcopy(body)
    symmetric.j_template = (body.j_template + body.j_template[other] * offset) / 2
    joints = symmetric.joints(rotmats, torch.zeros(3, 10))[1]
    mirrored = symmetric.joints(mirror(rotmats), torch.zeros(3, 10))[1]
    torch.testing.assert_close(mirrored, joints[:, other] * offset, atol=1e-5, rtol=0)
    torch.testing.assert_close(mirror(mirror(rotmats)), rotmats)


def test_confidence_tells_bad_fits_from_good_ones(fitter: EmbeddedFitter) -> None:
    rows = [measure(fitter, fit_images(fitter, b.images), b) for b in held_out(512, 0, HELD_OUT + 20_000)]
    error, sure = (torch.cat([row[name] for row in rows]) for name in ("pve", "confidence"))
    assert ((sure >= 0) & (sure <= 1)).all()
    bad, doubted = error > 0.15, sure <= sure.quantile(0.2)
    assert 15 <= bad.sum() <= 60
    assert (bad & doubted).sum() >= 0.6 * bad.sum()
    assert error[sure < 0.5].mean() > 1.5 * error[sure > 0.95].mean()
    # It is a share of good fits.
    assert float((~bad).float().mean()) == pytest.approx(float(sure.mean()), abs=0.04)
    assert float((~bad)[sure > 0.9].float().mean()) == pytest.approx(float(sure[sure > 0.9].mean()), abs=0.03)


def test_confidence_is_a_logistic_regression(fitter: EmbeddedFitter, batch: Batch) -> None:
    fit, signs = fitter.fit(list(batch.images.numpy()))
    torch.testing.assert_close(fit.confidence, (signs @ fitter.regressor.trust).sigmoid())
    assert (signs[:, 0] == 1).all() and ((signs[:, 1] >= 0) & (signs[:, 1] <= 1)).all()
    _, trust = fitter.regressor.trust[:2]
    assert trust > 0 and (fitter.regressor.trust[2:] < 0.5).all()  # overlap speaks for a fit, distances against it


@pytest.mark.parametrize("shape", [(128, 64), (200, 50), (60, 120)])
def test_an_upright_body_fills_the_crop(shape: tuple[int, int]) -> None:
    fit = UprightFitter()([np.zeros((*shape, 3), np.uint8)] * 2, ["a", "b"])
    points = project(fit.verts, fit.cam, *shape)[..., :2]
    low, high = points.amin(1), points.amax(1)
    torch.testing.assert_close((low + high) / 2, torch.tensor([[shape[1] / 2, shape[0] / 2]] * 2), atol=0.01, rtol=0)
    share = ((high - low) / torch.tensor([shape[1], shape[0]])).amax(1)
    torch.testing.assert_close(share, torch.full((2,), UprightFitter.FILL))
    assert (fit.confidence == 0).all()
    assert (fit.joints[:, 15, 1] < fit.joints[:, 0, 1] - 0.4).all()  # the head is up
    assert (fit.joints[:, 10, 2] < fit.joints[:, 7, 2] - 0.05).all()  # the toes point to the camera
    assert (fit.joints[:, 20, 1] > fit.joints[:, 16, 1] + 0.3).all()  # the hands hang


def test_another_body_keeps_the_pose_and_not_the_betas(fitter: EmbeddedFitter, batch) -> None:
    other = load_fitter("default", load_body("low"))
    assert fitter.coarse is not load_body("low")
    a, b = fit_images(fitter, batch.images), fit_images(other, batch.images)
    assert torch.equal(a.rotmats, b.rotmats) and (b.betas == 0).all() and b.verts.shape[1] == 1778
    assert a.betas.abs().max() > 0.1 and fitter.fingerprint() != other.fingerprint()


def test_moving_a_fitter_leaves_the_others_alone(batch) -> None:
    EmbeddedFitter().double()
    assert fit_images(EmbeddedFitter(), batch.images[:1]).verts.dtype == torch.float32


def test_errors(fitter: Fitter, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="crops must be uint8, got float32"):
        fitter([np.zeros((128, 64, 3), np.float32)], ["a"])
    with pytest.raises(ValueError, match=r"crops must be \(H, W, 3\), got \(128, 64\)"):
        fitter([np.zeros((128, 64), np.uint8)], ["a"])
    for spec in ("", "spin", "spin:", "best", "mean:x", "default:x"):
        with pytest.raises(ValueError, match=f"fitter must be one of {', '.join(FITTERS)}, got '{spec}'"):
            load_fitter(spec)
    (tmp_path / "bad").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="weights must be a file of train_fitter, got .*bad"):
        EmbeddedFitter(tmp_path / "bad")
    save_file({"x": torch.zeros(1)}, tmp_path / "other", {"format": "reid3d-fitter-1"})
    with pytest.raises(ValueError, match="weights must be a file of train_fitter, got .*other"):
        EmbeddedFitter(tmp_path / "other")
    save_file({"x": torch.zeros(1)}, tmp_path / "foreign")
    with pytest.raises(ValueError, match="weights must be a file of train_fitter, got .*its format is None"):
        EmbeddedFitter(tmp_path / "foreign")
    with pytest.raises(FileNotFoundError, match="weights must be a file, got .*nothing"):
        EmbeddedFitter(tmp_path / "nothing")
    for arguments in (["--steps", "0"], ["--evaluate"]):
        with pytest.raises(
            SystemExit, match="train_fitter: error: (steps times processes must|weights must be a file)"
        ):
            train_fitter.main(["--out", str(tmp_path / "run"), *arguments])


class Stopped(Exception):
    pass


def stop_at(monkeypatch: pytest.MonkeyPatch, item: int) -> None:
    original = RenderedBatches.__getitem__

    def getitem(self: RenderedBatches, i: int) -> Batch:
        if self.first == 0 and i == item:
            raise Stopped
        return original(self, i)

    monkeypatch.setattr(RenderedBatches, "__getitem__", getitem)


def test_interrupted_training_equals_uninterrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_fitter, "CHECKPOINT_EVERY", 2)
    monkeypatch.setattr(train_fitter, "TRUST_CROPS", 64)
    monkeypatch.setattr(train_fitter, "EVALUATE_CROPS", 64)
    recipe = Recipe(steps=6, batch=4, processes=1)
    train(recipe, tmp_path / "whole", workers=0)
    with monkeypatch.context() as m:
        stop_at(m, 3)
        with pytest.raises(Stopped):
            train(recipe, tmp_path / "parts", workers=0)
    with monkeypatch.context() as m:
        m.setattr(train_fitter, "mean_parameters", lambda batches: pytest.fail("resuming must not start again"))
        train(recipe, tmp_path / "parts", workers=0)
    whole, parts = (load_file(tmp_path / k / "fitter.safetensors") for k in ("whole", "parts"))
    assert all(torch.equal(whole[k], parts[k]) for k in whole) and whole["trust"].any()
    lines = [[json.loads(x) for x in (tmp_path / k / "log.jsonl").read_text().splitlines()] for k in ("whole", "parts")]
    assert [line["step"] for line in lines[0]] == [2, 4, 6] == [line["step"] for line in lines[1]]
    assert lines[0][-1]["mpjpe_mm"] == lines[1][-1]["mpjpe_mm"] > 0
    for other in (replace(recipe, lr=1.0), replace(recipe, steps=7)):  # its rate has begun to fall
        with pytest.raises(ValueError, match="must come from the same recipe"):
            train(other, tmp_path / "whole", workers=0)


def test_training_may_be_made_longer_before_the_rate_falls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_fitter, "CHECKPOINT_EVERY", 2)
    monkeypatch.setattr(train_fitter, "TRUST_CROPS", 64)
    monkeypatch.setattr(train_fitter, "EVALUATE_CROPS", 64)
    short, long = (Recipe(steps=steps, batch=4, processes=1) for steps in (6, 7))
    train(long, tmp_path / "whole", workers=0)
    with monkeypatch.context() as m:
        stop_at(m, 3)
        with pytest.raises(Stopped):
            train(short, tmp_path / "parts", workers=0)
    train(long, tmp_path / "parts", workers=0)
    whole, parts = (load_file(tmp_path / k / "fitter.safetensors") for k in ("whole", "parts"))
    assert all(torch.equal(whole[k], parts[k]) for k in whole)


def test_rate_warms_up_stays_and_falls() -> None:
    recipe = Recipe(steps=10_000, lr=1.0, fall=0.4)
    rates = [recipe.rate(step) for step in range(10_000)]
    assert rates[0] == pytest.approx(1 / 200) and rates[99] == pytest.approx(0.5)
    assert set(rates[200:6001]) == {1.0}
    assert rates[8000] == pytest.approx(0.5) and rates[9999] == pytest.approx(1 / 4000)


@pytest.fixture
def one_thread():
    """As each of several processes has: bfloat16 rounds otherwise with another number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_processes_share_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes do what one would by averaging the gradients of two halves of each batch."""
    monkeypatch.setattr(train_fitter, "TRUST_CROPS", 64)  # a part of the first process alone
    recipe = Recipe(steps=3, batch=8, processes=2)
    train(recipe, tmp_path, workers=0)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["step"] == 3 and state["recipe"] == asdict(recipe)
    body = load_body("low")
    body = some_vertices(body, farthest_point_sample(body.v_template[None], train_fitter.SKIN)[0])
    torch.manual_seed(recipe.seed)
    model = Regressor().to(memory_format=torch.channels_last).train()
    model.mean.copy_(train_fitter.mean_parameters(RenderedBatches(8, 64, MEAN)))
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=recipe.weight_decay)
    batches = RenderedBatches(6, 4, 0)
    for step in range(3):
        optimizer.zero_grad()
        for rank in range(2):
            half = batches[2 * step + rank]
            with torch.autocast("cpu", torch.bfloat16):
                maps = model.maps_of(normalise(half.images))
            features, seen = model.read(*(part.float() for part in maps))
            (loss(body, model.regress(features, seen.joints2d), seen, half) / 2).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.param_groups[0]["lr"] = recipe.rate(step)
        optimizer.step()
    for name, value in model.named_parameters():
        torch.testing.assert_close(state["model"][name], value.detach(), atol=2e-4, rtol=1e-3)
