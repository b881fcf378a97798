"""The body and its skinning layer, against smplx.SMPL, a plain loop, and what a body must look like."""

from pathlib import Path

import numpy as np
import pytest
import torch

from reid3d.preprocess.body import (
    CLOTHES,
    JOINT_NAMES,
    THICKNESS,
    axis_angle_to_matrix,
    load_body,
    rotation_6d_to_matrix,
    vertex_normals,
)


def random_rotations(*shape: int, seed: int = 0) -> torch.Tensor:
    return axis_angle_to_matrix(torch.randn(*shape, 3, generator=torch.Generator().manual_seed(seed)) * 0.5)


def test_skinning_matches_smplx() -> None:
    # Written by `preprocess/assets/bake.py --golden` with smplx 0.1.28 on the same asset.
    golden = np.load(Path(__file__).with_name("smplx_posed.npz"))
    posed = load_body("full")(axis_angle_to_matrix(torch.from_numpy(golden["pose"])), torch.from_numpy(golden["betas"]))
    verts = posed.verts[:, :: int(golden["step"])].numpy()
    np.testing.assert_allclose(verts, golden["verts"], atol=2e-5)
    np.testing.assert_allclose(posed.joints.numpy(), golden["joints"], atol=2e-5)


def test_skinning_matches_a_loop_over_vertices() -> None:
    body = load_body("low")
    rotmats, betas = random_rotations(1, 24), torch.linspace(-1, 1, 15)[None]
    posed = body(rotmats, betas)
    shaped = body.v_template + body.shapedirs @ betas[0]
    rest = body.regressor @ (body.v_template + body.shapedirs[..., :10] @ betas[0, :10])
    world = []
    for j, parent in enumerate(body.parents):
        local = torch.eye(4)
        local[:3, :3] = rotmats[0, j]
        local[:3, 3] = rest[j] - (rest[parent] if j else 0)
        world.append(world[parent] @ local if j else local)
    for v in (0, 500, len(shaped) - 1):
        point = sum(
            body.weights[v, j] * (world[j][:3, :3] @ (shaped[v] - rest[j]) + world[j][:3, 3]) for j in range(24)
        )
        torch.testing.assert_close(posed.verts[0, v], point, atol=1e-5, rtol=0)
    torch.testing.assert_close(posed.joints[0], torch.stack([w[:3, 3] for w in world]), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("lod", "low", "high"), [("full", 6500, 7000), ("low", 1600, 1900)])
def test_asset_is_a_person_in_t_pose(lod: str, low: int, high: int) -> None:
    body = load_body(lod)
    verts, joints = body.v_template, body.j_template
    assert low <= len(verts) <= high
    assert body.shapedirs.shape == (len(verts), 3, 15) and body.num_betas == 15
    assert 1.5 < float(verts[:, 1].max() - verts[:, 1].min()) < 1.9  # y up, an adult
    torch.testing.assert_close(body.weights.sum(1), torch.ones(len(verts)))
    torch.testing.assert_close(body.regressor.sum(1), torch.ones(24), atol=1e-4, rtol=0)
    at = {name: joints[i] for i, name in enumerate(JOINT_NAMES)}
    assert at["left_wrist"][0] > 0.5 and at["right_wrist"][0] < -0.5  # left is +x, arms out
    assert abs(at["left_wrist"][1] - at["left_shoulder"][1]) < 0.12
    assert at["left_foot"][2] > at["left_ankle"][2] + 0.05  # the toes point to +z
    assert at["head"][1] > at["neck"][1] > at["spine3"][1] > at["pelvis"][1] > at["left_knee"][1]
    corners = verts[body.faces]  # outward faces: positive volume, near an adult's 60-80 litres
    volume = torch.linalg.det(corners).sum() / 6
    assert 0.04 < float(volume) < 0.1


def test_assets_are_small() -> None:
    folder = Path(__import__("reid3d.preprocess.body", fromlist=["x"]).__file__).parent / "assets"
    assert sum(p.stat().st_size for p in folder.glob("body_*.npz")) < 1_000_000
    assert (folder / "fitter.safetensors").stat().st_size < 10_000_000


def test_both_levels_of_detail_pose_alike() -> None:
    rotmats, betas = random_rotations(3, 24), torch.randn(3, 10, generator=torch.Generator().manual_seed(1))
    full, low = load_body("full")(rotmats, betas), load_body("low")(rotmats, betas)
    assert (full.joints - low.joints).norm(dim=-1).max() < 0.01
    nearest = torch.cdist(low.verts, full.verts).amin(2)
    assert nearest.mean() < 0.015


def test_rotating_the_root_rotates_the_body() -> None:
    body = load_body("low")
    rotmats, betas = random_rotations(1, 24), torch.zeros(1, 10)
    turn = random_rotations(1, seed=5)
    turned = torch.cat([(turn @ rotmats[:, 0])[:, None], rotmats[:, 1:]], 1)
    a, b = body(rotmats, betas), body(turned, betas)
    pivot = a.joints[:, :1]
    torch.testing.assert_close(b.verts, (a.verts - pivot) @ turn[0].T + pivot, atol=1e-5, rtol=0)


def test_betas_are_differentiable() -> None:
    body = load_body("low")
    betas = torch.zeros(1, 10, requires_grad=True)
    body(random_rotations(1, 24), betas).verts.square().sum().backward()
    assert betas.grad is not None and (betas.grad != 0).all()


@pytest.mark.parametrize("lod", ["full", "low"])
def test_clothes_stand_off_the_part_that_they_dress(lod: str) -> None:
    body = load_body(lod)
    betas = body.all_betas(torch.zeros(len(CLOTHES), 10))
    betas[:, 10:] = torch.eye(len(CLOTHES))
    for rotmats in (random_rotations(len(CLOTHES), 24), torch.eye(3).expand(len(CLOTHES), 24, 3, 3)):
        naked, dressed = body(rotmats, torch.zeros(len(CLOTHES), 10)), body(rotmats, betas)
        assert torch.equal(naked.joints, dressed.joints)
    off = ((dressed.verts - naked.verts) * vertex_normals(naked.verts, body.faces)).sum(2)
    assert float(off.min()) > -1e-5 and float(off.max()) == pytest.approx(THICKNESS, abs=1e-4)
    for garment, row in zip(CLOTHES, off, strict=True):
        where = body.v_template[row > 0.015]
        assert len(where) > len(body.v_template) / 40
        low, high = (float(v) for v in (where[:, 1].min(), where[:, 1].max()))
        hips, knees, neck = (float(body.j_template[JOINT_NAMES.index(j), 1]) for j in ("left_hip", "left_knee", "neck"))
        assert {
            "trunk": hips - 0.2 < low and high < neck + 0.1,
            "arms": float(where[:, 0].abs().min()) > 0.1,
            "thighs": knees - 0.1 < low and high < hips + 0.2,
            "shins": high < knees + 0.1,
            "head": low > neck,
        }[garment]
    with_none = body(rotmats, body.all_betas(torch.ones(len(CLOTHES), 10))).verts
    torch.testing.assert_close(with_none, body(rotmats, torch.ones(len(CLOTHES), 10)).verts, atol=1e-6, rtol=0)


def test_rotations_are_rotations() -> None:
    for matrix in (random_rotations(50), rotation_6d_to_matrix(torch.randn(50, 3, 2))):
        torch.testing.assert_close(matrix @ matrix.mT, torch.eye(3).expand(50, 3, 3), atol=1e-5, rtol=0)
        torch.testing.assert_close(torch.linalg.det(matrix), torch.ones(50), atol=1e-5, rtol=0)
    quarter = axis_angle_to_matrix(torch.tensor([0, 0, torch.pi / 2]))
    torch.testing.assert_close(quarter @ torch.tensor([1.0, 0, 0]), torch.tensor([0.0, 1, 0]), atol=1e-6, rtol=0)
    assert torch.equal(axis_angle_to_matrix(torch.zeros(3)), torch.eye(3))
    torch.testing.assert_close(rotation_6d_to_matrix(quarter[:, :2]), quarter)


def test_vertex_normals_agree_with_the_faces() -> None:
    body = load_body("low")
    normals = vertex_normals(body.v_template[None], body.faces)[0]
    corners = body.v_template[body.faces]
    face = torch.linalg.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    agree = (normals[body.faces[:, 0]] * face).sum(1) > 0
    assert agree.float().mean() > 0.98
    torch.testing.assert_close(normals.norm(dim=1), torch.ones(len(normals)))


def test_errors_name_argument_rule_and_value() -> None:
    body = load_body("low")
    with pytest.raises(ValueError, match=r"rotmats must be \(B, 24, 3, 3\), got \(2, 23, 3, 3\)"):
        body(torch.eye(3).expand(2, 23, 3, 3), torch.zeros(2, 10))
    with pytest.raises(ValueError, match=r"betas must be \(2, 10\) or \(2, 15\) like rotmats, got \(2, 9\)"):
        body(torch.eye(3).expand(2, 24, 3, 3), torch.zeros(2, 9))
    with pytest.raises(ValueError, match="lod must be .* got 'huge'"):
        load_body("huge")
