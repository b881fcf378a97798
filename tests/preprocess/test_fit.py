"""The embedded fitter: what its figures mean, that the shipped weights reach them, and that training resumes."""

import json
from copy import deepcopy
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from reid3d.preprocess import train_fitter
from reid3d.preprocess.body import axis_angle_to_matrix, load_body
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
)
from reid3d.preprocess.hmr import Regressed, Regressor
from reid3d.preprocess.train_fitter import (
    HELD_OUT,
    MEAN,
    RUN_BITS,
    Recipe,
    RenderedBatches,
    evaluate,
    loss,
    normalise,
    procrustes,
    train,
)
from tests.plain import plain_scenes

ASSETS = files("reid3d.preprocess") / "assets"


@pytest.fixture(scope="module")
def fitter() -> EmbeddedFitter:
    return EmbeddedFitter()


def fit_images(fitter: Fitter, images: torch.Tensor) -> BodyFit:
    return fitter(list(images.numpy()), [str(i) for i in range(len(images))])


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Held-out crops are like those that the shipped weights were trained on."""
    monkeypatch.setattr(train_fitter, "sample_scenes", plain_scenes)


@pytest.fixture
def batch(plain: None) -> tuple[torch.Tensor, ...]:
    return RenderedBatches(1, 16, HELD_OUT + 10_000)[0]


def test_shipped_figures_are_those_of_the_shipped_weights(fitter: Fitter) -> None:
    shipped = json.loads((ASSETS / "fitter.json").read_text())
    assert shipped["crops"] >= 2000
    measured = evaluate(fitter.regressor, 256, workers=0)  # the first of the crops that fitter.json was measured on
    for figure in ("mpjpe_mm", "pa_mpjpe_mm", "yaw_median_deg", "joints2d_px"):
        assert measured[figure] == pytest.approx(shipped[figure], rel=0.15)


def test_shipped_weights_reach_their_target_on_plain_crops(fitter: Fitter, plain) -> None:
    measured = evaluate(fitter.regressor, 256, workers=0)
    assert measured["crops"] == 256
    assert measured["mpjpe_mm"] <= 110 and measured["yaw_median_deg"] <= 15 and measured["joints2d_px"] <= 6


def test_evaluation_of_perfect_and_of_wrong_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    truth = [RenderedBatches(2, 8, HELD_OUT)[i] for i in range(2)]

    class Answer(Regressor):
        """Answers the truth, turned about the vertical by `turn` and moved by `shift`."""

        turn, shift = 0.0, 0.0

        def forward(self, x: torch.Tensor) -> Regressed:
            _, rotmats, betas, cam, _ = truth[self.calls]
            self.calls += 1
            rotmats = rotmats.clone()
            rotmats[:, 0] = axis_angle_to_matrix(torch.tensor([0.0, self.turn, 0.0])) @ rotmats[:, 0]
            return Regressed(rotmats, betas, cam + torch.tensor([0.0, self.shift, 0.0]))

    answer = Answer()
    answer.calls = 0
    perfect = evaluate(answer, 16, batch=8, workers=0)
    assert perfect["crops"] == 16
    assert perfect["mpjpe_mm"] == 0 and perfect["pa_mpjpe_mm"] == 0 and perfect["yaw_median_deg"] == 0
    assert perfect["joints2d_px"] < 1.5  # the weak camera against the true one
    answer.calls, answer.turn = 0, torch.pi / 6
    turned = evaluate(answer, 16, batch=8, workers=0)
    assert turned["yaw_median_deg"] == pytest.approx(30, abs=0.2)
    assert turned["pa_mpjpe_mm"] == 0 < turned["mpjpe_mm"]
    answer.calls, answer.turn, answer.shift = 0, 0.0, 0.1
    moved = evaluate(answer, 16, batch=8, workers=0)
    scale = torch.cat([t[3][:, 0] for t in truth]).mean()
    assert moved["joints2d_px"] == pytest.approx(float(0.1 * scale * 64), rel=0.1)
    assert moved["mpjpe_mm"] == 0


def test_procrustes_undoes_a_similarity() -> None:
    g = torch.Generator().manual_seed(0)
    b = torch.randn(4, 24, 3, generator=g)
    rotation = axis_angle_to_matrix(torch.randn(4, 3, generator=g))
    a = 0.7 * b @ rotation.mT + torch.randn(4, 1, 3, generator=g)
    torch.testing.assert_close(procrustes(a, b), b, atol=1e-5, rtol=0)
    mirrored = b * torch.tensor([-1.0, 1, 1])
    assert (procrustes(mirrored, b) - b).norm(dim=-1).mean() > 0.3  # a mirror image is no similarity


def test_loss_is_zero_at_the_truth_and_grows(batch) -> None:
    _, rotmats, betas, cam, joints2d = batch
    body = load_body("low")
    joints2d = train_fitter.project_joints(body.joints(rotmats, betas)[1], cam)
    assert loss(body, Regressed(rotmats, betas, cam), rotmats, betas, cam, joints2d) == pytest.approx(0, abs=1e-4)
    assert loss(body, Regressed(rotmats, betas, cam * 1.1), rotmats, betas, cam, joints2d) > 0.1


def test_held_out_crops_are_never_trained_on() -> None:
    # A CPU generator uses the low 32 bits of a seed: the ranges must not meet there.
    last_of_last_run = ((MEAN >> RUN_BITS) << RUN_BITS) - 1
    assert last_of_last_run < MEAN < MEAN + 8 < HELD_OUT < HELD_OUT + 10_000 < 1 << 32
    first = [RenderedBatches(1, 4, seed)[0][0] for seed in (0, MEAN, HELD_OUT, 1 << RUN_BITS)]
    assert all(not torch.equal(a, b) for i, a in enumerate(first) for b in first[:i])
    for recipe in (Recipe(steps=1 << RUN_BITS), Recipe(seed=MEAN >> RUN_BITS)):
        with pytest.raises(ValueError, match="steps must be in"):
            train(recipe, Path("unused"), workers=0)


def test_fit_lands_on_the_person(fitter: Fitter, batch) -> None:
    images, _, _, _, joints2d = batch
    fit = fit_images(fitter, images)
    assert fit.verts.shape == (16, len(fitter.body.v_template), 3)
    torch.testing.assert_close(fit.verts, fitter.body(fit.rotmats, fit.betas).verts)
    error = (train_fitter.project_joints(fit.joints, fit.cam) - joints2d).norm(dim=-1) * 64
    assert error.mean() < 8


def test_fit_does_not_depend_on_the_batch(fitter: Fitter, batch) -> None:
    images = batch[0]
    together, alone = fit_images(fitter, images), fit_images(fitter, images[3:4])
    torch.testing.assert_close(together.verts[3:4], alone.verts, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("height", "width"), [(256, 128), (160, 64), (128, 96), (384, 128)])
def test_cameras_of_other_shapes_see_the_same_body(fitter: Fitter, batch, height: int, width: int) -> None:
    # The same person in a crop with more street around, or enlarged: the joints fall on the same pixels of the photo.
    sure = fit_images(fitter, batch[0]).confidence.topk(4).indices  # a fit in doubt changes with every pixel
    images = batch[0][sure]
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
        mean = torch.zeros(1)

        def forward(self, x: torch.Tensor) -> Regressed:
            weight = (x.mean(1) + 1).clamp(min=0)
            weight = weight / weight.sum((1, 2), keepdim=True)
            row = (weight.sum(2) * (torch.arange(128) + 0.5)).sum(1)
            column = (weight.sum(1) * (torch.arange(64) + 0.5)).sum(1)
            cam = torch.stack([torch.ones(len(x)), (column - 32) / 64, (row - 64) / 64], 1)
            return Regressed(torch.eye(3).repeat(len(x), 24, 1, 1), torch.zeros(len(x), 10), cam)

    monkeypatch.setattr(fitter, "regressor", Spot())
    images = torch.zeros(1, height, width, 3, dtype=torch.uint8)
    row, column = height // 3, width // 2 - 3
    images[0, row - 2 : row + 3, column - 2 : column + 3] = 255
    cam = fit_images(fitter, images).cam
    pixel = project(torch.zeros(1, 1, 3), cam, height, width)[0, 0, :2]
    torch.testing.assert_close(pixel, torch.tensor([column + 0.5, row + 0.5]), atol=0.1, rtol=0)


def test_folding_changes_no_result(fitter: EmbeddedFitter, batch) -> None:
    plain, _ = load_regressor(ASSETS / "fitter.safetensors")
    x = normalise(batch[0])
    with torch.no_grad():
        for a, b in zip(plain.eval()(x), fitter.regressor(x), strict=True):
            torch.testing.assert_close(a, b, atol=2e-5, rtol=0)
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


def test_confidence_tells_bad_fits_from_good_ones(fitter: EmbeddedFitter, plain) -> None:
    errors, confidence = [], []
    for i in range(6):
        images, rotmats, betas, _, _ = RenderedBatches(6, 64, HELD_OUT + 20_000)[i]
        fit, truth = fit_images(fitter, images), fitter.body(rotmats, betas)
        apart = (fit.verts - fit.joints[:, :1]) - (truth.verts - truth.joints[:, :1])
        errors.append(apart.norm(dim=2).mean(1))
        confidence.append(fit.confidence)
    error, confidence = torch.cat(errors), torch.cat(confidence)
    assert ((confidence >= 0) & (confidence <= 1)).all()
    bad, doubted = error > 0.15, confidence <= confidence.quantile(0.2)
    assert 10 <= bad.sum() <= 40
    assert (bad & doubted).sum() >= 0.5 * bad.sum()
    assert error[confidence < 0.5].mean() > 1.5 * error[confidence > 0.95].mean()
    # It is a share of good fits.
    assert float((~bad)[confidence > 0.9].float().mean()) == pytest.approx(
        float(confidence[confidence > 0.9].mean()), abs=0.03
    )


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
    a, b = fit_images(fitter, batch[0]), fit_images(other, batch[0])
    assert torch.equal(a.rotmats, b.rotmats) and (b.betas == 0).all() and b.verts.shape[1] == 1778
    assert a.betas.abs().max() > 0.1 and fitter.fingerprint() != other.fingerprint()


def test_moving_a_fitter_leaves_the_others_alone(batch) -> None:
    EmbeddedFitter().double()
    assert fit_images(EmbeddedFitter(), batch[0][:1]).verts.dtype == torch.float32


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
        with pytest.raises(SystemExit, match="train_fitter: error: (steps must be in|weights must be a file)"):
            train_fitter.main(["--out", str(tmp_path / "run"), *arguments])


def test_interrupted_training_equals_uninterrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_fitter, "CHECKPOINT_EVERY", 2)
    recipe = Recipe(steps=6, batch=4)
    train(recipe, tmp_path / "whole", workers=0)

    class Stopped(Exception):
        pass

    original = RenderedBatches.__getitem__

    def item(self: RenderedBatches, i: int) -> tuple[torch.Tensor, ...]:
        if self.first == 0 and i == 3:
            raise Stopped
        return original(self, i)

    with monkeypatch.context() as m:
        m.setattr(RenderedBatches, "__getitem__", item)
        with pytest.raises(Stopped):
            train(recipe, tmp_path / "parts", workers=0)
    with monkeypatch.context() as m:
        m.setattr(train_fitter, "mean_parameters", lambda batches: pytest.fail("resuming must not start again"))
        train(recipe, tmp_path / "parts", workers=0)
    whole, parts = (load_file(tmp_path / k / "fitter.safetensors") for k in ("whole", "parts"))
    assert all(torch.equal(whole[k], parts[k]) for k in whole)
    with pytest.raises(ValueError, match="must come from the same recipe"):
        train(replace(recipe, lr=1.0), tmp_path / "whole", workers=0)
