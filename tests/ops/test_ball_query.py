from fractions import Fraction

import numpy as np
import pytest
import torch

from reid3d.ops import ball_query, ball_query_reference

from .clouds import KINDS, cloud, exact_distances


@pytest.mark.parametrize("k", [1, 4, 40])
@pytest.mark.parametrize("radius", [1.0, 1.5, 3.0, 100.0])
def test_against_rational_arithmetic(radius, k, dtype, device, rng):
    # whole numbers: every distance is exact, and many equal the radius
    centers, points = cloud("grid", 6, rng) + 2, cloud("grid", 25, rng)
    idx = ball_query(centers.to(device, dtype), points.to(device, dtype), radius, k)
    empty = 0
    for b, rows in enumerate(exact_distances(centers, points)):
        for m, row in enumerate(rows):
            hits = [i for i, d in enumerate(row) if d < Fraction(radius) ** 2][:k]
            empty += not hits
            assert idx[b, m].tolist() == (hits + hits[:1] * (k - len(hits)) if hits else [0] * k)
    assert empty or radius > 1  # the smallest radius leaves balls empty


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("m", "n", "k"), [(40, 200, 16), (3, 65, 64), (5, 1, 3), (2, 130, 200)])
def test_equals_the_reference(kind, m, n, k, dtype, device, rng):
    centers, points = (cloud(kind, size, rng).to(device, dtype) for size in (m, n))
    radius = 0.3 * {"tiny": 1e-3, "huge": 1e6, "grid": 5.0}.get(kind, 1.0)
    assert torch.equal(ball_query(centers, points, radius, k), ball_query_reference(centers, points, radius, k)[0])


def test_the_boundary_is_outside(dtype, device):
    points = torch.tensor([[[2.0, 0, 0], [0, 0, 1.5]]], device=device, dtype=dtype)
    assert ball_query(torch.zeros_like(points[:, :1]), points, 2, 2).tolist() == [[[1, 1]]]


def test_the_first_in_index_order_not_the_nearest(device):
    points = torch.tensor([[[9.0, 0, 0], [0.9, 0, 0], [0.1, 0, 0], [0, 0, 0]]], device=device)
    assert ball_query(points[:, 3:], points, 1, 2).tolist() == [[[1, 2]]]
    assert ball_query(points[:, 3:], points, torch.inf, 4).tolist() == [[[0, 1, 2, 3]]]


def test_nan_is_in_no_ball(dtype, device):
    points = torch.tensor([[[torch.nan, 0, 0], [0, 0, 0]]], device=device, dtype=dtype)
    assert ball_query(points, points, 10.0, 2).tolist() == [[[0, 0], [1, 1]]]


def test_permuted_points_keep_full_balls(device, rng):
    xyz = cloud("random", 80, rng).to(device)
    order = torch.tensor(rng.permutation(80), device=device)
    plain, permuted = ball_query(xyz, xyz, 0.3, 80), order[ball_query(xyz, xyz[:, order], 0.3, 80)]
    for a, b in zip(plain.flatten(0, 1).tolist(), permuted.flatten(0, 1).tolist(), strict=True):
        assert set(a) == set(b)


@pytest.mark.parametrize(("b", "m"), [(0, 4), (2, 0)])
def test_empty(b, m, device):
    idx = ball_query(torch.zeros(b, m, 3, device=device), torch.zeros(b, 5, 3, device=device), 1.0, 2)
    assert idx.shape == (b, m, 2) and idx.dtype == torch.int64


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_is_read_as_float32(half, device, rng):
    xyz = cloud("random", 60, rng).to(device, half)
    assert torch.equal(ball_query(xyz, xyz, 0.3, 8), ball_query(xyz.float(), xyz.float(), 0.3, 8))


def test_non_contiguous(device, rng):
    xyz = cloud("random", 60, rng).to(device)
    strided = xyz.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(ball_query(strided[:, ::2], strided, 0.3, 8), ball_query(xyz[:, ::2].contiguous(), xyz, 0.3, 8))


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.int64])
def test_numpy_numbers_are_numbers(kind, device, rng):
    xyz = cloud("grid", 60, rng).to(device)
    assert torch.equal(ball_query(xyz, xyz, kind(2), np.int16(8)), ball_query(xyz, xyz, 2.0, 8))


def test_opcheck(device, rng):
    xyz = cloud("random", 20, rng).to(device, torch.float32)
    torch.library.opcheck(torch.ops.reid3d.ball_query.default, (xyz[:, :5], xyz, 0.3, 4))


def test_compiles_into_one_graph(device, rng):
    compiled = torch.compile(ball_query, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (20, 33):
        xyz = cloud("random", n, rng).to(device)
        assert torch.equal(compiled(xyz, xyz, 0.3, 5), ball_query(xyz, xyz, 0.3, 5))


XYZ = torch.zeros(2, 5, 3)


@pytest.mark.parametrize(
    ("centers", "points", "radius", "k", "error", "message"),
    [
        (None, XYZ, 1.0, 1, TypeError, "centers must be a torch.Tensor, got NoneType"),
        (XYZ, XYZ[..., :2], 1.0, 1, ValueError, r"points must have shape \(B, N, 3\), got \(2, 5, 2\)"),
        (XYZ, XYZ.double(), 1.0, 1, TypeError, "centers and points must have one dtype"),
        (XYZ, XYZ[:1], 1.0, 1, ValueError, "centers and points must agree in B and D"),
        (XYZ, XYZ[:, :0], 1.0, 1, ValueError, r"points must hold at least one point, got \(2, 0, 3\)"),
        (XYZ, XYZ, 0.0, 1, ValueError, "radius must be greater than 0, got 0.0"),
        (XYZ, XYZ, float("nan"), 1, ValueError, "radius must be greater than 0, got nan"),
        (XYZ, XYZ, np.float32(-1), 1, ValueError, "radius must be greater than 0, got -1"),
        (XYZ, XYZ, True, 1, TypeError, "radius must be a float, got bool"),
        (XYZ, XYZ, "1", 1, TypeError, "radius must be a float, got str"),
        (XYZ, XYZ, 1.0, 0, ValueError, "k must be at least 1, got 0"),
        (XYZ, XYZ, 1.0, 2**63, ValueError, "k must be an int of 64 bits, got 9223372036854775808"),
    ],
)
def test_errors(centers, points, radius, k, error, message):
    with pytest.raises(error, match=message):
        ball_query(centers, points, radius, k)
