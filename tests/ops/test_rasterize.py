"""The z-buffer against rational arithmetic, against rays, and its edge rules by hand."""

from fractions import Fraction

import pytest
import torch

from reid3d.ops import rasterize, rasterize_reference
from reid3d.ops.rasterize import barycentric
from reid3d.preprocess.body import load_body


def exact(points: torch.Tensor, faces: torch.Tensor, height: int, width: int) -> list[list[int]]:
    """The face that every pixel sees, one face and one pixel at a time, in rational arithmetic."""
    best: dict[tuple[int, int], tuple[Fraction, int]] = {}
    for f, corner in enumerate(points[faces].tolist()):
        (ax, ay, az), (bx, by, bz), (cx, cy, cz) = ([Fraction(v) for v in c] for c in corner)
        area = (bx - ax) * (cy - ay) - (cx - ax) * (by - ay)
        if area >= 0:
            continue
        for i in range(height):
            for j in range(width):
                x, y = j + Fraction(1, 2), i + Fraction(1, 2)
                u = ((bx - x) * (cy - y) - (cx - x) * (by - y)) / area
                v = ((cx - x) * (ay - y) - (ax - x) * (cy - y)) / area
                w = 1 - u - v
                if min(u, v, w) >= 0:
                    best[i, j] = min(best.get((i, j), (Fraction(10**9), 0)), (u * az + v * bz + w * cz, f))
    return [[best[i, j][1] if (i, j) in best else -1 for j in range(width)] for i in range(height)]


def scene(seed: int, vertices: int = 60, count: int = 80, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    points = torch.rand(batch, vertices, 3, generator=g) * torch.tensor([40.0, 40, 4]) - torch.tensor([8.0, 8, 2])
    return points, torch.randint(0, vertices, (count, 3), generator=g)


@pytest.mark.parametrize("seed", range(3))
def test_against_rational_arithmetic(seed, device):
    # Corners at quarters of a pixel and whole depths: many centres on edges, and the float32 sums are exact.
    points, faces = scene(seed, count=40)
    points = torch.cat([(points[..., :2] * 4).round() / 4, points[..., 2:].round()], -1)
    got = rasterize(points.to(device), faces.to(device), 13, 11)
    for b in range(2):
        # Where two faces have one depth, its rounding decides.
        alone = [rasterize(points[b : b + 1].to(device), face[None].to(device), 13, 11).depth[0] for face in faces]
        for i, row in enumerate(exact(points[b], faces, 13, 11)):
            for j, face in enumerate(row):
                found = int(got.face[b, i, j])
                assert (found < 0) == (face < 0)
                if found != face:
                    assert abs(float(alone[found][i, j]) - float(alone[face][i, j])) < 1e-5


@pytest.mark.parametrize(("height", "width"), [(24, 20), (1, 1), (3, 50), (64, 5)])
@pytest.mark.parametrize("scale", [1.0, 0.05, 30.0])
def test_equals_the_reference_bit_for_bit(height, width, scale, device):
    for seed in range(4):
        points, faces = (t.to(device) for t in scene(seed))
        points[..., :2] *= scale
        got, (depth, face) = rasterize(points, faces, height, width), rasterize_reference(points, faces, height, width)
        assert torch.equal(got.depth, depth) and torch.equal(got.face, face)


def rays(points: torch.Tensor, faces: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Whether the ray through every pixel's centre meets a front face, by Moeller and Trumbore's test in float64."""
    a, b, c = points.double()[faces].unbind(1)
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    origin = torch.stack([x, y, torch.full_like(x, -1e3)], -1).flatten(0, 1).double()
    ahead = torch.tensor([0.0, 0, 1], dtype=torch.float64)
    hit = torch.zeros(len(origin), dtype=torch.bool)
    edge1, edge2 = b - a, c - a
    p = torch.linalg.cross(ahead.expand_as(edge2), edge2)
    determinant = (edge1 * p).sum(1)
    for rows in torch.arange(len(origin)).split(256):
        from_a = origin[rows, None] - a
        u = (from_a * p).sum(2) / determinant
        v = (torch.linalg.cross(from_a, edge1.expand_as(from_a)) @ ahead) / determinant
        hit[rows] = ((u >= 0) & (v >= 0) & (u + v <= 1) & (determinant < 0)).any(1)
    return hit.view(height, width)


@pytest.mark.parametrize(("height", "width"), [(128, 64), (96, 48)])
def test_silhouettes_are_those_of_rays(height, width, device):
    body = load_body("low")
    for turn in (1.0, -1.0):  # from the front, from behind
        verts = body.v_template * torch.tensor([turn, -1, -turn])
        xy = verts[:, :2] * (0.5 * height) + torch.tensor([width / 2, height * 0.43])
        points = torch.cat([xy, verts[:, 2:]], 1)
        seen = rasterize(points[None].to(device), body.faces.to(device), height, width).face[0].cpu() >= 0
        assert 0.1 < seen.float().mean() < 0.5
        assert (seen == rays(points, body.faces, height, width)).float().mean() >= 0.999


def test_faces_turned_away_are_not_seen(device):
    points = torch.tensor([[[0.0, 0, 1], [0, 8, 1], [8, 0, 1]]], device=device)  # counter-clockwise as one looks
    assert (rasterize(points, torch.tensor([[0, 1, 2]], device=device), 8, 8).face >= 0).any()
    assert (rasterize(points, torch.tensor([[0, 2, 1]], device=device), 8, 8).face < 0).all()
    assert (rasterize(points, torch.tensor([[0, 1, 1]], device=device), 8, 8).face < 0).all()


def test_shared_edges_leave_no_hole_and_go_to_the_lower_face(device):
    corners = torch.tensor([[[0.0, 0, 1], [0, 8, 1], [8, 8, 1], [8, 0, 1]]], device=device)
    got = rasterize(corners, torch.tensor([[0, 1, 2], [0, 2, 3]], device=device), 8, 8)
    assert (got.face >= 0).all()  # the diagonal runs through pixel centres
    assert (got.face[0].diagonal() == 0).all()
    torch.testing.assert_close(got.depth, torch.ones(1, 8, 8, device=device))


@pytest.mark.parametrize("near", [-3.0, -1e-3, 0.0, 2.5])
def test_nearer_wins_also_at_negative_depth(near, device):
    square = torch.tensor([[0.0, 0], [0, 4], [4, 4], [4, 0]])
    points = torch.cat([torch.cat([square, torch.full((4, 1), z)], 1) for z in (near + 0.5, near, near + 1)])
    faces = torch.tensor([[0, 1, 2], [0, 2, 3]])
    got = rasterize(points[None].to(device), torch.cat([faces, faces + 4, faces + 8]).to(device), 4, 4)
    assert ((got.face == 2) | (got.face == 3)).all()
    torch.testing.assert_close(got.depth, torch.full((1, 4, 4), near, device=device))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_corner_that_is_not_finite_hides_its_face_alone(bad, axis, device):
    square = torch.tensor([[0.0, 0, 1], [0, 8, 1], [8, 8, 1], [8, 0, 1]], device=device)
    points = torch.cat([square, square - torch.tensor([0, 0, 0.5], device=device)])
    points[5, axis] = bad  # of the nearer square's first face
    faces = torch.tensor([[0, 1, 2], [0, 2, 3], [4, 5, 6], [4, 6, 7]], device=device)
    got = rasterize(points[None], faces, 8, 8)
    assert not (got.face == 2).any() and (got.face == 3).any() and (got.face == 0).any() and got.depth.isfinite().all()


def test_far_outside_and_far_away(device):
    points = torch.tensor([[[-1e6, -1e6, 1], [-1e6, 3e6, 1], [3e6, -1e6, 1]]], device=device)
    faces = torch.tensor([[0, 1, 2]], device=device)
    assert (rasterize(points, faces, 9, 7).face == 0).all()
    assert (rasterize(points + 1e7, faces, 9, 7).face == -1).all()


def test_empty(device):
    faces = torch.tensor([[0, 1, 2]], device=device)
    assert rasterize(torch.zeros(0, 3, 3, device=device), faces, 4, 5).face.shape == (0, 4, 5)
    got = rasterize(torch.zeros(2, 3, 3, device=device), faces[:0], 4, 5)
    assert (got.face == -1).all() and got.depth.isinf().all()
    assert rasterize(torch.zeros(2, 0, 3, device=device), faces[:0], 4, 5).face.shape == (2, 4, 5)


def test_other_dtypes_are_read_as_float32_and_strides_do_not_matter(device):
    points, faces = (t.to(device) for t in scene(0))
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        want = rasterize(points.to(dtype).float(), faces, 24, 20)
        assert torch.equal(rasterize(points.to(dtype), faces, 24, 20).face, want.face)
    strided = points.transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.cat([faces, faces], 1)[:, :3]
    assert torch.equal(rasterize(strided, wide, 24, 20).depth, rasterize(points, faces, 24, 20).depth)
    assert not rasterize(points.requires_grad_(), faces, 24, 20).depth.requires_grad


def test_threads_do_not_matter():
    points, faces = scene(0, batch=7)
    threads = torch.get_num_threads()
    try:
        results = [(torch.set_num_threads(n), rasterize(points, faces, 24, 20))[1] for n in (1, 2, 3)]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(r.face, results[0].face) and torch.equal(r.depth, results[0].depth) for r in results)


def test_barycentric_by_hand():
    corners = torch.tensor([[[0.0, 0], [4, 0], [0, 4]]])
    torch.testing.assert_close(barycentric(corners, torch.tensor([[1.0, 2]])), torch.tensor([[0.25, 0.25, 0.5]]))


def test_opcheck(device):
    points, faces = (t.to(device) for t in scene(0))
    torch.library.opcheck(torch.ops.reid3d.rasterize.default, (points, faces, 12, 10))


def test_compiles_into_one_graph(device):
    compiled = torch.compile(rasterize, fullgraph=True, backend="aot_eager", dynamic=True)
    for vertices in (50, 60):
        points, faces = (t.to(device) for t in scene(1, vertices))
        assert torch.equal(compiled(points, faces, 12, 10).face, rasterize(points, faces, 12, 10).face)


POINTS, FACES = torch.zeros(2, 5, 3), torch.zeros(4, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("points", "faces", "height", "width", "error", "message"),
    [
        (None, FACES, 4, 4, TypeError, "points must be a torch.Tensor, got NoneType"),
        (POINTS.long(), FACES, 4, 4, TypeError, "points must be floating point, got torch.int64"),
        (POINTS[..., :2], FACES, 4, 4, ValueError, r"points must have shape \(B, N, 3\), got \(2, 5, 2\)"),
        (POINTS, FACES.int(), 4, 4, TypeError, "faces must be an int64 tensor, got torch.int32"),
        (POINTS, FACES.tolist(), 4, 4, TypeError, "faces must be an int64 tensor, got list"),
        (POINTS, FACES[:, :2], 4, 4, ValueError, r"faces must have shape \(F, 3\), got \(4, 2\)"),
        (POINTS, FACES, 0, 4, ValueError, "height must be between 1 and 32768, the longest side of an image, got 0"),
        (POINTS, FACES, 4, 32769, ValueError, "width must be between 1 and 32768, .*, got 32769"),
        (POINTS, FACES, 4.0, 4, TypeError, "height must be an int, got float"),
    ],
)
def test_errors(points, faces, height, width, error, message):
    with pytest.raises(error, match=message):
        rasterize(points, faces, height, width)


@pytest.mark.parametrize("vertex", [-1, 5])
def test_a_face_without_a_point(vertex):  # on the CPU: CUDA ends the process
    with pytest.raises(RuntimeError, match="faces must hold indices between 0 and 4"):
        rasterize(POINTS, FACES.index_fill(0, torch.tensor([2]), vertex), 4, 4)
