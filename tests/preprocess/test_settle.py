"""Bodies that settle on what is seen: the derivatives against small moves, the outline by hand, and what is reached."""

from math import pi

import pytest
import torch
from torch import Tensor

from reid3d.preprocess import settle
from reid3d.preprocess.body import JOINT_NAMES, axis_angle_to_matrix, load_body
from reid3d.preprocess.camera import project_joints
from reid3d.preprocess.fit import STEPS
from reid3d.preprocess.hmr import Regressed
from reid3d.preprocess.settle import OUTLINE, Settler, outline_of
from reid3d.preprocess.train_fitter import HELD_OUT, Batch, RenderedBatches, shape_of

CLEARLY = 0.05


@pytest.fixture(scope="module")
def batch() -> Batch:
    return RenderedBatches(1, 16, HELD_OUT + 20_000)[0]


@pytest.fixture(scope="module")
def settler() -> Settler:
    return Settler(load_body("low"))


def truth_of(batch: Batch) -> Regressed:
    return Regressed(batch.rotmats, batch.betas, batch.cam)


def seen_in(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    return batch.joints2d, torch.full(batch.joints2d.shape[:2], CLEARLY), batch.silhouette


def disturbed(batch: Batch) -> Regressed:
    torch.manual_seed(0)
    turns = axis_angle_to_matrix(0.06 * torch.randn(len(batch.cam), 24, 3))
    betas = batch.betas + torch.cat([torch.zeros(10), torch.tensor([0.8, -0.5, 0.8, 0.8, -0.4])])
    cam = batch.cam * torch.tensor([1.06, 1.0, 1.0]) + torch.tensor([0.0, 0.05, -0.05])
    return Regressed(turns @ batch.rotmats, betas, cam)


def test_the_derivatives_are_those_of_small_moves(settler: Settler, batch: Batch) -> None:
    body = settler.body.double()
    try:
        fit = Regressed(*(part[:3].double() for part in disturbed(batch)))
        settler.below, settler.weights = settler.below.double(), settler.weights.double()
        posed = body.joints(fit.rotmats, fit.betas)
        seen, jacobian = settler._points(fit, *posed)
        verts = body(fit.rotmats, fit.betas).verts
        torch.testing.assert_close(seen, project_joints(torch.cat([posed[1], verts], 1), fit.cam))
        step = 1e-6
        for k in range(len(settler.firmness)):
            change = torch.zeros(3, len(settler.firmness), dtype=torch.float64)
            change[:, k] = step
            ends = [
                settler._points(moved, *body.joints(moved.rotmats, moved.betas))[0]
                for moved in (settler._moved(fit, *posed, sign * change) for sign in (1, -1))
            ]
            wanted = ((ends[0] - ends[1]) / (2 * step)).mT.flatten(1)
            torch.testing.assert_close(jacobian[:, k], wanted, atol=1e-5, rtol=0)
            assert wanted.abs().max() > 1e-3
    finally:
        settler.float()


def test_small_parts_stay_stiff(settler: Settler) -> None:
    names = [JOINT_NAMES[j] for j in settler.free]
    assert "pelvis" in names and "left_elbow" in names and "right_knee" in names and len(names) == 16
    assert not any(part in name for name in names for part in ("hand", "wrist", "foot", "ankle"))


def test_the_outline_of_a_square_by_hand() -> None:
    mask = torch.zeros(3, 8, 4, dtype=torch.bool)
    mask[0, 2:6, 1:4] = True  # the crop's right edge cuts it: no outline there
    mask[1, 4, 2] = True
    points = outline_of(mask)
    left = {(-0.25, y / 8) for y in (-3, -1, 1, 3)}
    ends = {(x / 8, y) for x in (-1, 1, 3) for y in (-0.5, 0.5)}
    places, counts = torch.unique(points[0], dim=0, return_counts=True)
    assert {tuple(place) for place in places.tolist()} == left | ends
    assert counts.tolist() == [OUTLINE // 10] * 10  # evenly along it
    assert {tuple(p) for p in points[1].tolist()} == {(0.0, 0.125), (0.25, 0.125), (0.125, 0.0), (0.125, 0.25)}
    assert (points[2] > 100).all()


def test_disturbed_bodies_come_back(settler: Settler, batch: Batch) -> None:
    before = disturbed(batch)
    after = settler(before, *seen_in(batch), STEPS)
    body = load_body("low")
    true = body(batch.rotmats, batch.betas)

    def errors(fit: Regressed) -> tuple[float, float, float]:
        posed = body(fit.rotmats, fit.betas)
        joints = posed.joints - posed.joints[:, :1] - true.joints + true.joints[:, :1]
        shape = shape_of(body, posed.verts, fit.cam, 64)
        iou = (shape & batch.silhouette).sum((1, 2)) / (shape | batch.silhouette).sum((1, 2))
        off = (project_joints(posed.joints, fit.cam) - batch.joints2d).norm(dim=2)
        return joints.norm(dim=2).mean().item(), off.mean().item(), iou.mean().item()

    (joints, off, iou), (joints_after, off_after, iou_after) = errors(before), errors(after)
    assert off_after < 0.4 * off and joints_after < 0.8 * joints and iou_after > iou + 0.1
    assert torch.equal(after.betas[:, :10], before.betas[:, :10])
    turns = after.rotmats.mT @ after.rotmats
    torch.testing.assert_close(turns, torch.eye(3).expand_as(turns), atol=1e-6, rtol=0)


def test_true_bodies_hardly_move(settler: Settler, batch: Batch) -> None:
    after = settler(truth_of(batch), *seen_in(batch), STEPS)
    body = load_body("low")
    moved = body(after.rotmats, after.betas).joints - body(batch.rotmats, batch.betas).joints
    assert moved.norm(dim=2).mean() < 0.02 and (after.cam[:, 0] / batch.cam[:, 0] - 1).abs().max() < 0.05
    assert (after.betas - batch.betas).mean(0).abs().max() < 0.4  # 8 mm, as vertices are not everywhere


def test_joints_and_silhouettes_have_no_say_where_there_are_none(settler: Settler, batch: Batch) -> None:
    before, (joints2d, spread, mask) = disturbed(batch), seen_in(batch)
    far, nobody = torch.full_like(joints2d, 1e3), torch.zeros_like(mask)
    for after in (settler(before, far, spread, each, STEPS) for each in (nobody, torch.ones_like(mask))):
        for a, b in zip(before, after, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=0)
    by_joints = settler(before, joints2d, spread, nobody, STEPS)
    assert torch.equal(by_joints.betas, before.betas)  # clothes move no joint
    assert (by_joints.cam - before.cam).abs().max() > 0.01
    by_mask = settler(before, far, spread, mask, STEPS)
    assert (by_mask.betas - before.betas).abs().max() > 0.1


def test_what_is_beyond_the_crop_pulls_nothing(settler: Settler, batch: Batch) -> None:
    body = load_body("low")
    low = truth_of(batch)._replace(cam=batch.cam + torch.tensor([0.0, 0.0, 0.6]))  # the legs are below the crop
    posed = body(low.rotmats, low.betas)
    joints = project_joints(posed.joints, low.cam)
    below = (joints[..., 1] > 1).all(0)
    on_edge = joints.clone()
    on_edge[..., 1].clamp_(max=0.95)  # the lowest that maps may show
    spread = torch.full(joints.shape[:2], CLEARLY)
    after = settler(low, on_edge, spread, shape_of(body, posed.verts, low.cam, 64), STEPS)
    moved = project_joints(body.joints(after.rotmats, after.betas)[1], after.cam) - joints
    assert below.sum() >= 4 and moved[:, below].norm(dim=2).mean() < 0.03


def test_far_joints_and_blurred_ones_count_less(settler: Settler, batch: Batch) -> None:
    before, (joints2d, spread, mask) = truth_of(batch), seen_in(batch)
    knee = JOINT_NAMES.index("left_knee")
    aside, blurred = torch.zeros_like(joints2d), spread.clone()
    aside[:, knee, 0], blurred[:, knee] = 0.1, 4 * settle.CLEAR

    def moved(joints2d: Tensor, spread: Tensor) -> float:
        after = settler(before, joints2d, spread, mask, STEPS)
        joints = load_body("low").joints(after.rotmats, after.betas)[1]
        return (project_joints(joints, after.cam)[:, knee, 0] - batch.joints2d[:, knee, 0]).mean().item()

    clear = moved(joints2d + aside, spread)
    assert clear > 0.01
    assert moved(joints2d + aside, blurred) < 0.5 * clear and moved(joints2d + 10 * aside, spread) < 0.5 * clear


def test_a_crop_settles_as_it_does_alone(settler: Settler, batch: Batch) -> None:
    before, seen = disturbed(batch), seen_in(batch)
    together = settler(before, *seen, STEPS)
    alone = settler(Regressed(*(part[5:6] for part in before)), *(part[5:6] for part in seen), STEPS)
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a[5:6], b, atol=1e-4, rtol=1e-4)


def test_people_who_face_away_are_not_turned(settler: Settler, batch: Batch) -> None:
    turned = batch.rotmats.clone()
    turned[:, 0] = axis_angle_to_matrix(torch.tensor([0.0, pi, 0.0])) @ turned[:, 0]
    after = settler(Regressed(turned, batch.betas, batch.cam), *seen_in(batch), STEPS)
    change = (after.rotmats[:, 0] - turned[:, 0]).norm(dim=(1, 2))
    assert change.median() < 0.3 and (after.cam[:, 0] / batch.cam[:, 0] - 1).abs().max() < 0.3
