from fractions import Fraction

import numpy as np
import pytest
import torch

from reid3d.ops import KNN, backend, knn, knn_reference

from .clouds import KINDS, cloud, exact_distances


@pytest.mark.parametrize("kind", ["grid", "duplicates", "equal"])
def test_ties_and_order_against_rational_arithmetic(kind, dtype, device, rng):
    # on these clouds every distance is exact in both precisions, or the points are equal
    points = cloud(kind, 23, rng)
    if kind == "duplicates":
        points = (points * 8).round()
    expected = exact_distances(points, points)
    dist2, idx = knn(points.to(device, dtype), points.to(device, dtype), 7)
    for b, rows in enumerate(expected):
        for m, row in enumerate(rows):
            order = sorted(range(23), key=lambda i, row=row: (row[i], i))[:7]
            assert idx[b, m].tolist() == order
            assert dist2[b, m].tolist() == [float(row[i]) for i in order]


@pytest.mark.parametrize("kind", KINDS)
def test_neighbours_are_the_nearest(kind, dtype, device, rng):
    query, points = cloud(kind, 9, rng), cloud(kind, 31, rng)
    result = knn(query.to(device, dtype), points.to(device, dtype), 5)
    tolerance = 4 * torch.finfo(dtype).eps
    for b, rows in enumerate(exact_distances(query, points)):
        for m, row in enumerate(rows):
            found = [float(row[i]) for i in result.idx[b, m].tolist()]
            assert len(set(result.idx[b, m].tolist())) == 5
            assert result.dist2[b, m].tolist() == pytest.approx(found, rel=tolerance)
            assert found == pytest.approx(sorted(map(float, row))[:5], rel=tolerance)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("m", "n", "dims", "k"),
    [(70, 64, 3, 20), (5, 1, 3, 1), (3, 200, 3, 200), (33, 130, 3, 129), (17, 100, 1, 40), (9, 333, 19, 16)],
)
def test_equals_the_reference_bit_for_bit(kind, m, n, dims, k, dtype, device, rng):
    query, points = (cloud(kind, size, rng, dims=dims).to(device, dtype) for size in (m, n))
    result, expected = knn(query, points, k), knn_reference(query, points, k)
    assert torch.equal(result.idx, expected[1])
    assert torch.equal(result.dist2, expected[0])


def test_a_large_cloud_equals_the_reference(device, rng):
    xyz = torch.tensor(rng.random((1, 4096, 3)), dtype=torch.float32, device=device)
    result, expected = knn(xyz, xyz, 20), knn_reference(xyz, xyz, 20)
    assert torch.equal(result.idx, expected[1]) and torch.equal(result.dist2, expected[0])
    assert torch.equal(result.idx[0, :, 0].cpu(), torch.arange(4096))  # every point finds itself


@pytest.mark.parametrize("differences", [(2.0**-30, 4097.0), (71.44227600097656, 11913852.0)])
def test_kernels_round_once_where_the_reference_rounds_twice(differences, device):
    # the float64 sum is midway between two float32 numbers; the true sum of the first is above it, of the second below
    query = torch.tensor([[differences]], device=device)
    twice = knn_reference(query, torch.zeros_like(query), 1)[0].item()
    first, second = (Fraction(d) ** 2 for d in differences)
    exact = Fraction(float(np.float32(float(first)))) + second
    once = min(
        (float(np.nextafter(np.float32(twice), np.float32(to))) for to in (0, np.inf)),
        key=lambda x: abs(Fraction(x) - exact),
    )
    assert abs(Fraction(once) - exact) < abs(Fraction(twice) - exact)
    compiled = {"cpu": "cpp", "cuda": "cuda"}[device.type] in backend()
    assert knn(query, torch.zeros_like(query), 1).dist2.item() == (once if compiled else twice)


def test_far_from_the_origin_no_neighbour_is_lost(device, rng):
    # 1/1024 steps around 1000 are exact in float32; |q|^2 + |p|^2 - 2qp would lose them
    near = torch.tensor(rng.integers(0, 1024, (1, 200, 3)) / 1024, dtype=torch.float32, device=device)
    assert torch.equal(knn(near + 1000, near + 1000, 10).idx, knn(near, near, 10).idx)


@pytest.mark.parametrize("scale", [2.0**-10, 2.0**10, 2.0**20])
def test_scale_changes_nothing_but_the_distances(scale, dtype, device, rng):
    xyz = cloud("random", 100, rng).to(device, dtype)
    small, large = knn(xyz, xyz, 8), knn(xyz * scale, xyz * scale, 8)
    assert torch.equal(small.idx, large.idx)
    assert torch.equal(small.dist2 * scale**2, large.dist2)


def test_permuted_points_give_permuted_indices(device, rng):
    xyz = cloud("random", 100, rng).to(device)
    order = torch.tensor(rng.permutation(100), device=device)
    assert torch.equal(order[knn(xyz, xyz[:, order], 6).idx], knn(xyz, xyz, 6).idx)


def test_fewer_neighbours_are_a_prefix(device, rng):
    xyz = cloud("grid", 150, rng).to(device, torch.float32)
    most = knn(xyz, xyz, 150)
    for k in (1, 31, 32, 33, 129):
        fewer = knn(xyz, xyz, k)
        assert torch.equal(fewer.idx, most.idx[..., :k]) and torch.equal(fewer.dist2, most.dist2[..., :k])


def test_undefined_and_overflowing_distances_come_last(dtype, device):
    huge = torch.finfo(dtype).max / 2
    points = [[torch.nan, 0, 0], [1, 0, 0], [torch.inf, 0, 0], [0, 0, 0], [huge, huge, huge]]
    points = torch.tensor([points], device=device, dtype=dtype)
    result = knn(torch.zeros_like(points[:, :1]), points, 5)
    assert result.idx.tolist() == [[[3, 1, 0, 2, 4]]]
    assert result.dist2.tolist() == [[[0, 1, torch.inf, torch.inf, torch.inf]]]


@pytest.mark.parametrize(("b", "m"), [(0, 4), (2, 0)])
def test_empty(b, m, device):
    result = knn(torch.zeros(b, m, 3, device=device), torch.zeros(b, 5, 3, device=device), 2)
    assert result.dist2.shape == result.idx.shape == (b, m, 2)
    assert (result.dist2.dtype, result.idx.dtype) == (torch.float32, torch.int64)


def test_no_dimensions(device):
    result = knn(torch.zeros(2, 4, 0, device=device), torch.zeros(2, 5, 0, device=device), 3)
    assert result.dist2.abs().sum() == 0 and result.idx.tolist() == [[[0, 1, 2]] * 4] * 2


@pytest.mark.parametrize("k", [16, 17, 33, 65])
@pytest.mark.parametrize("dims", [3, 8])
def test_many_at_one_distance(k, dims, dtype, device, rng):
    # more points tie at the k-th distance than any list of candidates holds
    points = torch.tensor(rng.integers(0, 2, (2, 400, dims))).to(device, dtype)
    points[:, :100] = points[:, :1]
    result, expected = knn(points, points, k), knn_reference(points, points, k)
    assert torch.equal(result.idx, expected[1]) and torch.equal(result.dist2, expected[0])


@pytest.mark.parametrize("n", [5000, 70000])
def test_deep_trees(n, device, rng):
    points = torch.tensor(rng.random((1, n, 3)), dtype=torch.float32, device=device)
    result, expected = knn(points[:, :40], points, 20), knn_reference(points[:, :40], points, 20)
    assert torch.equal(result.idx, expected[1]) and torch.equal(result.dist2, expected[0])
    if backend() != "torch":  # which would take minutes, and is what it is compared with
        assert torch.equal(knn(points, points, 20).idx[:, :40], expected[1])


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_is_read_as_float32(half, device, rng):
    xyz = cloud("random", 60, rng).to(device, half)
    result, expected = knn(xyz, xyz, 5), knn(xyz.float(), xyz.float(), 5)
    assert result.dist2.dtype == torch.float32
    assert torch.equal(result.dist2, expected.dist2) and torch.equal(result.idx, expected.idx)


def test_non_contiguous(device, rng):
    xyz = cloud("random", 60, rng).to(device)
    strided = xyz.transpose(1, 2).contiguous().transpose(1, 2)
    assert not strided.is_contiguous()
    assert torch.equal(knn(strided[:, ::2], strided, 5).idx, knn(xyz[:, ::2].contiguous(), xyz, 5).idx)
    assert torch.equal(knn(strided, strided, 5).idx, knn(xyz, xyz, 5).idx)
    assert torch.equal(knn(xyz[:, :30], xyz, 5).idx, knn(xyz, xyz, 5).idx[:, :30])  # begins where points begin


def test_gradients(device, rng):
    query, points = (cloud("random", n, rng).to(device).requires_grad_() for n in (4, 7))
    assert torch.autograd.gradcheck(lambda q, p: knn(q, p, 3).dist2, (query, points))
    assert torch.autograd.gradgradcheck(lambda q, p: knn(q, p, 3).dist2, (query, points))


def test_opcheck(device, rng):
    xyz = cloud("random", 20, rng).to(device, torch.float32)
    torch.library.opcheck(torch.ops.reid3d.knn.default, (xyz.requires_grad_(), xyz[:, :5].detach(), None, 4))
    torch.library.opcheck(torch.ops.reid3d.knn.default, (xyz.detach().double(), xyz.detach().double(), None, 4))


def test_compiles_into_one_graph(device, rng):
    def loss(query, points):
        result = knn(query * 2, points, 4)
        return result.dist2.sum() + result.idx.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (20, 33):
        query, points = (cloud("random", size, rng).to(device) for size in (n, n + 5))
        gradients = []
        for function in (loss, compiled):
            leaf = query.clone().requires_grad_()
            function(leaf, points).backward()
            gradients.append(leaf.grad)
        assert torch.equal(*gradients)


def test_autocast_computes_in_float32(device, rng):
    xyz = cloud("far", 60, rng).to(device, torch.float32)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        result = knn(xyz, xyz, 5)
    assert result.dist2.dtype == torch.float32
    assert torch.equal(result.idx, knn(xyz, xyz, 5).idx)


def test_numpy_numbers_are_numbers(device, rng):
    xyz = cloud("random", 20, rng).to(device)
    assert torch.equal(knn(xyz, xyz, np.int32(4)).idx, knn(xyz, xyz, 4).idx)


def test_names(device):
    assert KNN._fields == ("dist2", "idx")
    assert isinstance(knn(torch.zeros(1, 1, 3, device=device), torch.zeros(1, 1, 3, device=device), 1), KNN)


XYZ = torch.zeros(2, 5, 3)


@pytest.mark.parametrize(
    ("query", "points", "k", "error", "message"),
    [
        (np.zeros((2, 5, 3)), XYZ, 1, TypeError, "query must be a torch.Tensor, got ndarray"),
        (XYZ.long(), XYZ, 1, TypeError, "query must be floating point, got torch.int64"),
        (XYZ, XYZ[0], 1, ValueError, r"points must have shape \(B, N, D\), got \(5, 3\)"),
        (XYZ, XYZ.double(), 1, TypeError, "query and points must have one dtype, got torch.float32 and torch.float64"),
        (XYZ, XYZ[:1], 1, ValueError, r"query and points must agree in B and D, got \(2, 5, 3\) and \(1, 5, 3\)"),
        (XYZ, XYZ[..., :2], 1, ValueError, "query and points must agree in B and D"),
        (XYZ, XYZ.to("meta"), 1, ValueError, "query and points must be on one device, got cpu and meta"),
        (XYZ, XYZ, 6, ValueError, "k must be between 1 and 5, the number of points, got 6"),
        (XYZ, XYZ, 0, ValueError, "k must be between 1 and 5, the number of points, got 0"),
        (XYZ, XYZ[:, :0], 1, ValueError, r"points must hold at least one point, got \(2, 0, 3\)"),
        (XYZ, XYZ, np.float32(2), TypeError, "k must be an int, got float32"),
        (XYZ, XYZ, np.int64(6), ValueError, "k must be between 1 and 5, the number of points, got 6"),
        (XYZ, XYZ, 2.0, TypeError, "k must be an int, got float"),
        (XYZ, XYZ, True, TypeError, "k must be an int, got bool"),
    ],
)
def test_errors(query, points, k, error, message):
    with pytest.raises(error, match=message):
        knn(query, points, k)
