"""The z-buffer against a plain loop over faces and pixels, and its edge rules by hand."""

import math

import pytest
import torch

from reid3d.preprocess.body import load_body
from reid3d.preprocess.zbuffer import barycentric, rasterize


def plain(points: torch.Tensor, faces: torch.Tensor, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One image, one face and one pixel at a time, in double precision."""
    best = torch.full((height, width), math.inf, dtype=torch.float64)
    face = torch.full((height, width), -1)
    for f, corner in enumerate(points.double()[faces].tolist()):
        (ax, ay, az), (bx, by, bz), (cx, cy, cz) = corner
        area = (bx - ax) * (cy - ay) - (cx - ax) * (by - ay)
        if area >= 0:
            continue
        for i in range(max(0, math.floor(min(ay, by, cy))), min(height, math.ceil(max(ay, by, cy)) + 1)):
            for j in range(max(0, math.floor(min(ax, bx, cx))), min(width, math.ceil(max(ax, bx, cx)) + 1)):
                x, y = j + 0.5, i + 0.5
                u = ((bx - x) * (cy - y) - (cx - x) * (by - y)) / area
                v = ((cx - x) * (ay - y) - (ax - x) * (cy - y)) / area
                w = 1 - u - v
                if min(u, v, w) >= 0 and u * az + v * bz + w * cz < best[i, j]:
                    best[i, j] = u * az + v * bz + w * cz
                    face[i, j] = f
    return face, best


@pytest.mark.parametrize("seed", range(5))
def test_random_triangles_match_the_loop(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    points = torch.rand(2, 60, 3, generator=g) * torch.tensor([40.0, 40, 4]) - torch.tensor([8.0, 8, 2])
    faces = torch.randint(0, 60, (80, 3), generator=g)
    got = rasterize(points, faces, 24, 20)
    for b in range(2):
        face, depth = plain(points[b], faces, 24, 20)
        assert torch.equal(got.face[b], face)
        seen = face >= 0
        torch.testing.assert_close(got.depth[b][seen].double(), depth[seen], atol=1e-4, rtol=1e-5)
        assert torch.isinf(got.depth[b][~seen]).all()


def test_body_matches_the_loop() -> None:
    body = load_body("low")
    verts = body.v_template * torch.tensor([1, -1, -1.0])
    points = torch.cat([verts[:, :2] * 27 + torch.tensor([24.0, 24]), verts[:, 2:]], 1)
    got = rasterize(points[None], body.faces, 56, 48)
    face, depth = plain(points, body.faces, 56, 48)
    assert (got.face[0] == face).float().mean() > 0.999  # float32 against float64 on shared edges
    assert 200 < int((face >= 0).sum()) < 900


def test_faces_turned_away_are_not_seen() -> None:
    points = torch.tensor([[[0.0, 0, 1], [0, 8, 1], [8, 0, 1]]])  # down, then right: counter-clockwise as one looks
    assert (rasterize(points, torch.tensor([[0, 1, 2]]), 8, 8).face >= 0).any()
    assert (rasterize(points, torch.tensor([[0, 2, 1]]), 8, 8).face < 0).all()


def test_shared_edges_leave_no_hole_and_go_to_the_lower_face() -> None:
    corners = torch.tensor([[[0.0, 0, 1], [0, 8, 1], [8, 8, 1], [8, 0, 1]]])
    got = rasterize(corners, torch.tensor([[0, 1, 2], [0, 2, 3]]), 8, 8)
    assert (got.face >= 0).all()  # the diagonal runs through pixel centres
    assert (got.face[0].diagonal() == 0).all()
    torch.testing.assert_close(got.depth, torch.ones(1, 8, 8))


@pytest.mark.parametrize("near", [-3.0, -1e-3, 0.0, 2.5])
def test_nearer_wins_also_at_negative_depth(near: float) -> None:
    square = torch.tensor([[0.0, 0], [0, 4], [4, 4], [4, 0]])
    points = torch.cat([torch.cat([square, torch.full((4, 1), z)], 1) for z in (near + 0.5, near, near + 1)])
    faces = torch.tensor([[0, 1, 2], [0, 2, 3]])
    got = rasterize(points[None], torch.cat([faces, faces + 4, faces + 8]), 4, 4)
    assert ((got.face == 2) | (got.face == 3)).all()
    torch.testing.assert_close(got.depth, torch.full((1, 4, 4), near))


def test_empty_inputs() -> None:
    faces = torch.tensor([[0, 1, 2]])
    assert rasterize(torch.zeros(0, 3, 3), faces, 4, 5).face.shape == (0, 4, 5)
    outside = torch.tensor([[[100.0, 100, 1], [100, 108, 1], [108, 100, 1]]])
    assert (rasterize(outside, faces, 4, 5).face == -1).all()


def test_barycentric_by_hand() -> None:
    corners = torch.tensor([[[0.0, 0], [4, 0], [0, 4]]])
    torch.testing.assert_close(barycentric(corners, torch.tensor([[1.0, 2]])), torch.tensor([[0.25, 0.25, 0.5]]))
