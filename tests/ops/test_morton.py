import numpy as np
import pytest
import torch

from reid3d.ops import farthest_point_sample, knn, morton_order, morton_order_reference

from .clouds import KINDS, cloud


def by_hand(points: np.ndarray) -> list[int]:
    """One cloud in whole numbers, 0 to 1023: the curve as its definition gives it, by interleaved bits as text."""
    keys = []
    for i, (x, y, z) in enumerate(points.astype(int).tolist()):
        bits = "".join(a + b + c for a, b, c in zip(f"{z:010b}", f"{y:010b}", f"{x:010b}", strict=True))
        keys.append((int(bits, 2), i))
    return [i for _, i in sorted(keys)]


def test_by_hand(dtype, device, rng):
    points = rng.integers(0, 1024, (2, 200, 3))
    points[:, :2] = [[0, 0, 0], [1023, 1023, 1023]]  # the cells are those of whole numbers
    points[:, 100:] = points[:, :100]  # equal points in index order
    order = morton_order(torch.tensor(points).to(device, dtype))
    assert order.dtype == torch.int32
    assert order.tolist() == [by_hand(p) for p in points]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 2, 17, 300, 5000])
def test_equals_the_reference(kind, n, dtype, device, rng):
    xyz = cloud(kind, n, rng).to(device, dtype)
    assert torch.equal(morton_order(xyz), morton_order_reference(xyz))


def test_points_next_in_the_order_are_near(device, rng):
    xyz = torch.tensor(rng.random((1, 4096, 3)), device=device)
    walk = xyz[0, morton_order(xyz)[0].long()]
    assert (walk[1:] - walk[:-1]).norm(dim=1).mean() < 0.2 * (xyz[0, 1:] - xyz[0, :-1]).norm(dim=1).mean()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3e38])
def test_any_number_has_a_place(value, device, rng):
    xyz = torch.tensor(rng.random((1, 50, 3)), dtype=torch.float32, device=device)
    xyz[0, ::7, 1] = value
    assert torch.equal(morton_order(xyz).sort(1).values.cpu(), torch.arange(50, dtype=torch.int32)[None])


def test_no_clouds(device):
    assert morton_order(torch.zeros(0, 5, 3, device=device)).shape == (0, 5)
    assert morton_order(torch.zeros(2, 0, 3, device=device)).shape == (2, 0)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_is_read_as_float32(half, device, rng):
    xyz = cloud("random", 60, rng).to(device, half)
    assert torch.equal(morton_order(xyz), morton_order(xyz.float()))


def test_non_contiguous(device, rng):
    xyz = cloud("random", 60, rng).to(device)
    assert torch.equal(morton_order(xyz.transpose(1, 2).contiguous().transpose(1, 2)), morton_order(xyz))


def test_opcheck_and_one_graph(device, rng):
    xyz = cloud("random", 30, rng).to(device, torch.float32)
    torch.library.opcheck(torch.ops.reid3d.morton_order.default, (xyz,))

    def search(xyz):
        order = morton_order(xyz)
        return knn(xyz, xyz, 4, order=order).idx.sum() + farthest_point_sample(xyz, 5, order=order).sum()

    compiled = torch.compile(search, fullgraph=True, backend="aot_eager", dynamic=True)
    assert torch.equal(compiled(xyz), search(xyz))
    assert torch.equal(compiled(xyz[:, :20]), search(xyz[:, :20]))


@pytest.mark.parametrize("kind", KINDS)
def test_an_order_changes_no_result(kind, dtype, device, rng):
    xyz = cloud(kind, 150, rng).to(device, dtype)
    mixed = torch.tensor(np.stack([rng.permutation(150) for _ in xyz]), dtype=torch.int32, device=device)
    for order in (morton_order(xyz), mixed):
        for found, expected in zip(knn(xyz[:, :70], xyz, 9, order=order), knn(xyz[:, :70], xyz, 9), strict=True):
            assert torch.equal(found, expected)
        assert torch.equal(knn(xyz, xyz, 9, order=order).idx, knn(xyz, xyz, 9).idx)
        assert torch.equal(farthest_point_sample(xyz, 40, 3, order=order), farthest_point_sample(xyz, 40, 3))


XYZ = torch.rand(2, 5, 3)


@pytest.mark.parametrize(
    ("order", "error", "message"),
    [
        ([0, 1], TypeError, "order must be an int32 tensor, got list"),
        (torch.zeros(2, 5).long(), TypeError, "order must be an int32 tensor, got torch.int64"),
        (torch.zeros(2, 4).int(), ValueError, r"order must have shape \(2, 5\), got \(2, 4\)"),
        (torch.zeros(2, 5, device="meta").int(), ValueError, "order must be on the device of the points, cpu"),
        (torch.arange(5).int().expand(2, 5) + 1, RuntimeError, "order must hold indices between 0 and 4, got 5"),
        (torch.arange(5).int().expand(2, 5) - 1, RuntimeError, "order must hold indices between 0 and 4, got -1"),
        (torch.zeros(2, 5).int(), RuntimeError, "order must hold every index once, got 0 twice"),
    ],
)
def test_errors(order, error, message):
    flat = torch.zeros(2, 5, 4)  # searched without a tree
    for search in (
        lambda: knn(XYZ, XYZ, 2, order=order),
        lambda: knn(flat, flat, 2, order=order),
        lambda: knn(XYZ[:, :0], XYZ, 2, order=order),
        lambda: farthest_point_sample(XYZ, 2, order=order),
        lambda: farthest_point_sample(XYZ, 0, order=order),
    ):
        with pytest.raises(error, match=message):
            search()


def test_shape_errors():
    with pytest.raises(ValueError, match=r"xyz must have shape \(B, N, 3\), got \(2, 5, 2\)"):
        morton_order(XYZ[..., :2])
