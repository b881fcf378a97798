import numpy as np
import pytest
import torch

from reid3d.ops import farthest_point_sample, farthest_point_sample_reference

from .clouds import KINDS, cloud, exact_distances


def by_hand(distances, m: int, start: int) -> list[int]:
    """One cloud, its matrix of exact distances: the definition, word for word."""
    picked = [start]
    while len(picked) < m:
        left = [i for i in range(len(distances)) if i not in picked]
        picked.append(max(left, key=lambda i: (min(distances[i][p] for p in picked), -i)))
    return picked[:m]


@pytest.mark.parametrize("kind", ["grid", "duplicates", "equal"])
@pytest.mark.parametrize("start", [0, 4])
def test_against_rational_arithmetic(kind, start, dtype, device, rng):
    xyz = cloud(kind, 19, rng)
    if kind == "duplicates":
        xyz = (xyz * 8).round()
    picked = farthest_point_sample(xyz.to(device, dtype), 19, start)
    assert picked.tolist() == [by_hand(d, 19, start) for d in exact_distances(xyz, xyz)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "m", "start"), [(300, 70, 0), (65, 65, 64), (1, 1, 0), (7, 0, 3)])
def test_equals_the_reference(kind, n, m, start, dtype, device, rng):
    xyz = cloud(kind, n, rng).to(device, dtype)
    assert torch.equal(farthest_point_sample(xyz, m, start), farthest_point_sample_reference(xyz, m, start))


@pytest.mark.parametrize("places", [4096, 2048, 900])  # with fewer than 4096, points coincide
def test_a_large_cloud_equals_the_reference_in_both_precisions(places, device, rng):
    xyz = torch.tensor(rng.random((2, places, 3)), dtype=torch.float32, device=device)
    xyz = xyz[:, torch.tensor(rng.permutation(np.arange(4096) % places), device=device)]
    picked = farthest_point_sample(xyz, 768)
    assert torch.equal(picked, farthest_point_sample_reference(xyz, 768, 0))
    assert torch.equal(picked, farthest_point_sample_reference(xyz.double(), 768, 0))


@pytest.mark.parametrize(("batch", "n"), [(1, 5000), (5, 5000), (2, 70000)])
def test_deep_trees_equal_the_reference(batch, n, device, rng):
    xyz = torch.tensor(rng.random((batch, n, 3)), dtype=torch.float32, device=device)
    xyz[:, 1::2] = xyz[:, ::2].clone()  # every point twice
    assert torch.equal(farthest_point_sample(xyz, 40, 7), farthest_point_sample_reference(xyz, 40, 7))


@pytest.mark.parametrize("kind", KINDS)
def test_picks_every_point_once(kind, device, rng):
    xyz = cloud(kind, 130, rng).to(device, torch.float32)
    picked = farthest_point_sample(xyz, 130)
    assert torch.equal(picked.sort(1).values.cpu(), torch.arange(130).expand(2, 130))


def test_a_shorter_sample_is_a_prefix(device, rng):
    xyz = cloud("grid", 90, rng).to(device, torch.float32)
    longest = farthest_point_sample(xyz, 90)
    for m in (1, 2, 40):
        assert torch.equal(farthest_point_sample(xyz, m), longest[:, :m])


def test_a_sample_of_a_sample_is_its_beginning(device, rng):
    xyz = cloud("random", 200, rng).to(device, torch.float32)
    picked = farthest_point_sample(xyz, 60)
    sample = xyz.gather(1, picked[..., None].expand(-1, -1, 3))
    assert torch.equal(farthest_point_sample(sample, 30).cpu(), torch.arange(30).expand(2, 30))


@pytest.mark.parametrize("scale", [2.0**-10, 2.0**10, 2.0**20])
def test_scale_changes_nothing(scale, dtype, device, rng):
    xyz = cloud("random", 100, rng).to(device, dtype)
    assert torch.equal(farthest_point_sample(xyz * scale, 50), farthest_point_sample(xyz, 50))


def test_permuted_points_give_permuted_indices(device, rng):
    xyz = cloud("random", 100, rng).to(device)
    order = torch.tensor(rng.permutation(100), device=device)
    start = int((order == 0).nonzero())
    assert torch.equal(order[farthest_point_sample(xyz[:, order], 40, start)], farthest_point_sample(xyz, 40))


def test_nan_points_come_last_in_index_order(dtype, device):
    nan = torch.nan
    xyz = torch.tensor([[[0, 0, 0], [nan, 0, 0], [1, 0, 0], [0, 0, nan], [5, 0, 0]]]).to(device, dtype)
    assert farthest_point_sample(xyz, 5).tolist() == [[0, 4, 2, 1, 3]]
    assert farthest_point_sample(xyz, 5, start=3).tolist() == [[3, 0, 4, 2, 1]]


def test_no_clouds(device):
    assert farthest_point_sample(torch.zeros(0, 5, 3, device=device), 2).shape == (0, 2)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_is_read_as_float32(half, device, rng):
    xyz = cloud("random", 60, rng).to(device, half)
    assert torch.equal(farthest_point_sample(xyz, 30), farthest_point_sample(xyz.float(), 30))


def test_non_contiguous(device, rng):
    xyz = cloud("random", 60, rng).to(device)
    strided = xyz.transpose(1, 2).contiguous().transpose(1, 2)[:, ::2]
    assert torch.equal(farthest_point_sample(strided, 20), farthest_point_sample(strided.contiguous(), 20))


def test_numpy_numbers_are_numbers(device, rng):
    xyz = cloud("random", 20, rng).to(device)
    assert torch.equal(farthest_point_sample(xyz, np.int64(6), np.uint8(3)), farthest_point_sample(xyz, 6, 3))


def test_opcheck(device, rng):
    xyz = cloud("random", 20, rng).to(device, torch.float32)
    torch.library.opcheck(torch.ops.reid3d.farthest_point_sample.default, (xyz, None, 5, 0))


def test_compiles_into_one_graph(device, rng):
    def picked_points(xyz):
        return (xyz * 2).gather(1, farthest_point_sample(xyz, 6)[..., None].expand(-1, -1, 3))

    compiled = torch.compile(picked_points, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (20, 33):
        xyz = cloud("random", n, rng).to(device)
        assert torch.equal(compiled(xyz), picked_points(xyz))


def test_accepts_points_that_require_grad(device, rng):
    xyz = cloud("random", 20, rng).to(device).requires_grad_()
    assert not farthest_point_sample(xyz, 5).requires_grad


XYZ = torch.zeros(2, 5, 3)


@pytest.mark.parametrize(
    ("xyz", "m", "start", "error", "message"),
    [
        (np.zeros((2, 5, 3)), 1, 0, TypeError, "xyz must be a torch.Tensor, got ndarray"),
        (XYZ.int(), 1, 0, TypeError, "xyz must be floating point, got torch.int32"),
        (XYZ[..., :2], 1, 0, ValueError, r"xyz must have shape \(B, N, 3\), got \(2, 5, 2\)"),
        (XYZ, 6, 0, ValueError, "m must be between 0 and 5, the number of points, got 6"),
        (XYZ, -1, 0, ValueError, "m must be between 0 and 5, the number of points, got -1"),
        (XYZ, 1.5, 0, TypeError, "m must be an int, got float"),
        (XYZ[:, :0], 0, 0, ValueError, r"xyz must hold at least one point, got \(2, 0, 3\)"),
        (XYZ, 1, 5, ValueError, "start must be between 0 and 4, the last point, got 5"),
        (XYZ, 1, -1, ValueError, "start must be between 0 and 4, the last point, got -1"),
    ],
)
def test_errors(xyz, m, start, error, message):
    with pytest.raises(error, match=message):
        farthest_point_sample(xyz, m, start)
