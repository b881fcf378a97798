import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from reid3d.ops import EdgePool, edge_pool, edge_pool_reference, group_max, transpose_graph

ALL = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def problem(rng, b=2, n=30, m=11, k=5, c=7, dtype=torch.float32, device="cpu"):
    feats = torch.tensor(rng.standard_normal((b, n, c))).to(device, dtype)
    return feats, torch.tensor(rng.integers(0, n, (b, m, k)), device=device)


def sums(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def bitwise_equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal to the last bit, where any NaN is equal to any other."""
    return a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(0), b.nan_to_num(0))


def by_hand(column: list[float], wide: type) -> tuple[float, float, float, float, int, int]:
    """The values of one group and channel: maximum, minimum, sum, sum of squares and both slots."""
    order = sorted(range(len(column)), key=lambda k: (column[k], k))
    smallest, largest = order[0], min(order, key=lambda k: (-column[k], k))
    total = power = wide(0)
    for value in column:
        total = total + wide(value)
        power = wide(float(power) + float(value) ** 2)
    return column[largest], column[smallest], float(total), float(power), largest, smallest


@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize(
    ("k", "c"), [(1, 1), (2, 16), (5, 7), (32, 64), (3, 130), (9, 70), (256, 3), (257, 5), (400, 16)]
)
def test_by_hand(k, c, dtype, device, rng):
    feats, idx = problem(rng, b=2, m=4, k=k, c=c, dtype=dtype, device=device)
    feats = (feats * 4).round() / 4  # many equal values
    results = torch.ops.reid3d.edge_pool(feats, idx, None, None)
    values, groups = feats.tolist(), idx.tolist()
    wide = np.float64 if dtype == torch.float64 else np.float32
    for b, group in enumerate(groups):
        for m, rows in enumerate(group):
            for channel in range(c):
                expected = by_hand([values[b][j][channel] for j in rows], wide)
                assert tuple(float(r[b, m, channel]) for r in results) == expected
    slot = torch.uint8 if k <= 256 else torch.int16
    assert [r.dtype for r in results] == [dtype, dtype, sums(dtype), sums(dtype), slot, slot]


@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize(("m", "k", "c"), [(50, 20, 70), (300, 33, 16), (7, 3, 1), (20, 300, 64), (9, 16, 15)])
def test_equals_the_reference_with_its_slots(m, k, c, dtype, device, rng):
    feats, idx = problem(rng, n=200, m=m, k=k, c=c, dtype=dtype, device=device)
    for x in (feats, (feats * 2).round()):  # equal values: the first slot wins
        results = torch.ops.reid3d.edge_pool(x, idx, None, None)
        for result, expected in zip(results, edge_pool_reference(x, idx), strict=True):
            assert result.dtype == expected.dtype and torch.equal(result, expected)


@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize("k", [3, 4, 35])
def test_nan_wins_and_infinity_is_a_number(dtype, k, device, rng):
    feats, idx = problem(rng, n=40, m=60, k=k, c=37, dtype=dtype, device=device)
    kinds = torch.tensor(rng.choice([1.0, math.nan, math.inf, -math.inf], feats.shape, p=[0.9, 0.04, 0.03, 0.03]))
    feats = torch.where(kinds.to(device) == 1, feats, kinds.to(feats))
    feats[0, ::2, 0] = -math.nan  # its sign says nothing
    results = torch.ops.reid3d.edge_pool(feats, idx, None, None)
    for result, expected in zip(results, edge_pool_reference(feats, idx), strict=True):
        assert bitwise_equal(result, expected)
    grouped = feats[0, idx[0]]
    assert bitwise_equal(edge_pool(feats, idx).max[0], grouped.amax(1))
    assert bitwise_equal(edge_pool(feats, idx).min[0], grouped.amin(1))


@pytest.mark.parametrize("dtype", ALL)
def test_largest_finite_values(dtype, device):
    huge = torch.finfo(dtype).max
    feats = torch.tensor([[[huge, -huge], [huge, -huge]]], device=device, dtype=dtype)
    pooled = edge_pool(feats, torch.tensor([[[0, 1]]], device=device))
    assert pooled.max.tolist() == pooled.min.tolist() == [[[huge, -huge]]]
    half = dtype == torch.float16  # whose sums are float32
    assert pooled.sum.tolist() == [[[2 * huge, -2 * huge] if half else [math.inf, -math.inf]]]
    assert pooled.sumsq.tolist() == [[[2 * huge * huge] * 2 if half else [math.inf] * 2]]


def test_smallest_half_values(device):
    # every float16 and bfloat16 is a float32, the subnormal ones too
    for dtype in (torch.float16, torch.bfloat16):
        feats = torch.arange(-(2**15), 2**15, device=device).to(torch.int16).view(dtype).view(1, -1, 16)
        idx = torch.arange(feats.shape[1], device=device).view(1, -1, 1)
        pooled = edge_pool(feats, idx)
        assert bitwise_equal(pooled.max, feats) and bitwise_equal(pooled.min, feats)
        assert bitwise_equal(pooled.sum, feats.float() + 0)


@pytest.mark.parametrize("field", EdgePool._fields)
def test_gradients(field, device, rng):
    feats, idx = problem(rng, dtype=torch.float64, device=device)
    assert torch.autograd.gradcheck(lambda x: getattr(edge_pool(x, idx), field), feats.requires_grad_())


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize(("k", "c"), [(5, 7), (1, 3), (3, 18)])
def test_gradients_together(given, k, c, device, rng):
    feats, idx = problem(rng, n=9, m=6, k=k, c=c, dtype=torch.float64, device=device)
    transposed = transpose_graph(idx, 9) if given else None

    def mixed(x):
        pooled = edge_pool(x, idx, transposed=transposed)
        return pooled.max * pooled.sum - pooled.min * pooled.sumsq, pooled.sumsq.sum(1).sqrt()

    assert torch.autograd.gradcheck(lambda x: tuple(edge_pool(x, idx, transposed=transposed)), feats.requires_grad_())
    assert torch.autograd.gradcheck(mixed, feats)


def backward_by_hand(grads, feats, idx, slots) -> list:
    """Four sums over the edges into a point, in their order and each in the precision of the sums."""
    wide = np.float64 if feats.dtype == torch.float64 else np.float32
    *grads, x = (t.cpu().to(sums(feats.dtype)).numpy() for t in (*grads, feats))
    parts = [np.zeros_like(x) for _ in range(4)]
    idx, *slots = (t.cpu().numpy() for t in (idx, *slots))
    for b, m, k in np.ndindex(idx.shape):
        j = idx[b, m, k]
        for part, grad, slot in zip(parts, grads, [*slots, None, None], strict=True):
            won = True if slot is None else slot[b, m] == k
            part[b, j] += np.where(won, grad[b, m], wide(0))
    return ((parts[0] + parts[1]) + parts[2]) + wide(2) * x * parts[3]


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize(("n", "m", "k", "c"), [(30, 11, 5, 7), (60, 40, 9, 64), (5, 90, 20, 17), (40, 6, 260, 16)])
def test_gradient_to_the_last_bit(n, m, k, c, dtype, given, device, rng):
    feats, idx = problem(rng, n=n, m=m, k=k, c=c, dtype=dtype, device=device)
    feats.requires_grad_()
    pooled = edge_pool(feats, idx, transposed=transpose_graph(idx, n) if given else None)
    grads = [torch.tensor(rng.standard_normal(p.shape)).to(p) for p in pooled]
    result = torch.autograd.grad(tuple(pooled), feats, grads)[0]
    slots = edge_pool_reference(feats.detach(), idx)[4:]
    expected = torch.tensor(backward_by_hand(grads, feats.detach(), idx, slots)).to(device, dtype)
    assert result.dtype == dtype
    assert torch.equal(result, expected)


def test_gradient_of_a_padded_group_lands_once(device):
    # a ball with one point in it names that point k times: it wins in its first slot only, but counts k times
    feats = torch.tensor([[[2.0], [3.0]]], device=device, requires_grad=True)
    pooled = edge_pool(feats, torch.tensor([[[1, 1, 1, 1]]], device=device))
    grads = [torch.autograd.grad(p.sum(), feats, retain_graph=True)[0].flatten().tolist() for p in pooled]
    assert grads == [[0, 1], [0, 1], [0, 4], [0, 24]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_summed_in_float32(dtype, device):
    # 4096 + 1 is 4096 in float16: sums of ones in half precision would stop at 2048, or at 256
    feats = torch.ones(1, 1, 1, device=device, dtype=dtype, requires_grad=True)
    pooled = edge_pool(feats, torch.zeros(1, 1, 4096, device=device, dtype=torch.int64))
    assert pooled.sum.item() == pooled.sumsq.item() == 4096
    pooled.sum.sum().backward()
    assert feats.grad.item() == 4096


def test_the_gradient_of_the_sums_is_counted(device, rng):
    feats, idx = problem(rng, n=50, m=80, k=9, c=20, device=device)
    degree = torch.stack([row.bincount(minlength=50) for row in idx.flatten(1)]).unsqueeze(2)
    feats.requires_grad_()
    pooled = edge_pool(feats, idx)
    assert torch.equal(*torch.broadcast_tensors(torch.autograd.grad(pooled.sum.sum(), feats)[0], degree.float()))
    pooled = edge_pool(feats, idx)
    grad = torch.autograd.grad(pooled.sumsq.sum(), feats)[0]
    torch.testing.assert_close(grad, 2 * feats.detach() * degree)


def test_the_maximum_is_that_of_group_max(dtype, device, rng):
    feats, idx = problem(rng, n=50, m=80, k=9, c=20, dtype=dtype, device=device)
    pooled = edge_pool(feats, idx)
    assert torch.equal(pooled.max, group_max(feats, idx))
    assert torch.equal(pooled.min, -group_max(-feats, idx))


def test_permuted_points_and_groups_change_nothing(dtype, device, rng):
    feats, idx = problem(rng, n=50, m=80, k=9, c=20, dtype=dtype, device=device)
    points, groups = (torch.tensor(rng.permutation(size), device=device) for size in (50, 80))
    place = points.argsort()
    permuted = edge_pool(feats[:, points], place[idx][:, groups])
    for result, expected in zip(permuted, edge_pool(feats, idx), strict=True):
        assert torch.equal(result, expected[:, groups])


def test_order_within_a_group_does_not_matter_but_for_rounding(device, rng):
    feats, idx = problem(rng, device=device)
    forward, backward = edge_pool(feats, idx), edge_pool(feats, idx.flip(2))
    assert torch.equal(forward.max, backward.max) and torch.equal(forward.min, backward.min)
    torch.testing.assert_close(forward.sum, backward.sum)
    torch.testing.assert_close(forward.sumsq, backward.sumsq)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_deterministic_whatever_the_threads(threads, device, rng):
    feats, idx = problem(rng, b=3, n=20, m=700, k=6, c=40, device=device)
    grads = [torch.tensor(rng.standard_normal((3, 700, 40)), dtype=torch.float32, device=device) for _ in range(4)]
    feats.requires_grad_()

    def both():
        pooled = edge_pool(feats, idx)
        return [*pooled, torch.autograd.grad(tuple(pooled), feats, grads)[0]]

    before = torch.get_num_threads()
    first = both()
    try:
        torch.set_num_threads(threads)
        again = both()
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def per_edge(x, idx, weight, bias, norm):
    """EdgeConv as it is written: a linear layer on every (x_i, x_j - x_i), BatchNorm over all edges, max."""
    neighbours = x.gather(1, idx.flatten(1).unsqueeze(2).expand(-1, -1, x.shape[2])).view(*idx.shape, -1)
    centres = x.unsqueeze(2).expand_as(neighbours)
    edges = F.linear(torch.cat((centres, neighbours - centres), 3), weight, bias)
    return F.leaky_relu(norm(edges.flatten(0, 2)).view_as(edges), 0.2).amax(2)


def per_point(x, idx, weight, bias, norm):
    """The same without a tensor over the edges: an edge is u_i + v_j, linear in both."""
    k, (w_centre, w_neighbour) = idx.shape[2], weight.chunk(2, dim=1)
    u, v = F.linear(x, w_centre - w_neighbour, bias), F.linear(x, w_neighbour)
    largest, smallest, s, q = edge_pool(v, idx)
    count = idx.numel()
    mean = (k * u + s).sum((0, 1)) / count
    var = (k * u * u + 2 * u * s + q).sum((0, 1)) / count - mean * mean
    with torch.no_grad():
        norm.num_batches_tracked += 1
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(var * count / (count - 1), norm.momentum)
    extreme = u + torch.where(norm.weight >= 0, largest, smallest)
    return F.leaky_relu((extreme - mean) * torch.rsqrt(var + norm.eps) * norm.weight + norm.bias, 0.2)


@pytest.mark.parametrize("k", [1, 6])
def test_the_base_of_an_exact_edge_conv(k, device, rng):
    x, idx = problem(rng, n=40, m=40, k=k, c=8, dtype=torch.float64, device=device)
    weight, bias, scale, shift = (
        torch.tensor(rng.standard_normal(shape), device=device).requires_grad_() for shape in ((12, 16), 12, 12, 12)
    )
    grad = torch.tensor(rng.standard_normal((2, 40, 12)), device=device)
    outcomes = []
    for convolve in (per_edge, per_point):
        norm = torch.nn.BatchNorm1d(12, device=device, dtype=torch.float64)
        norm.weight, norm.bias = torch.nn.Parameter(scale.detach()), torch.nn.Parameter(shift.detach())
        leaf = x.clone().requires_grad_()
        out = convolve(leaf, idx, weight, bias, norm)
        wanted = (leaf, weight, bias, norm.weight, norm.bias)
        outcomes.append([out.detach(), norm.running_mean, norm.running_var, *torch.autograd.grad(out, wanted, grad)])
    assert (scale < 0).any() and (scale > 0).any()
    for name, expected, result in zip("out mean var x weight bias scale shift".split(), *outcomes, strict=True):
        error = (result - expected).abs().max() / max(1.0, float(expected.abs().max()))
        assert error < 1e-12, f"{name}: {error}"


@pytest.mark.parametrize(("b", "m", "c"), [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empty(b, m, c, device):
    feats = torch.zeros(b, 5, c, device=device, requires_grad=True)
    pooled = edge_pool(feats, torch.zeros(b, m, 2, device=device, dtype=torch.int64))
    sum(p.sum() for p in pooled).backward()
    assert all(p.shape == (b, m, c) for p in pooled) and feats.grad.shape == (b, 5, c)
    assert feats.grad.abs().sum() == 0


def test_non_contiguous(device, rng):
    feats, idx = problem(rng, c=18, device=device)
    gradients = []
    for x, i in ((feats, idx), (feats.mT.contiguous().mT, idx.mT.contiguous().mT)):
        x = x.detach().requires_grad_()
        pooled = edge_pool(x, i[:, ::2])
        sum(p.mT.square().sum(0).sum() for p in pooled).backward()
        gradients.append([*pooled, x.grad])
    assert not x.is_contiguous() and not i.is_contiguous()
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_differentiated_once_only(device, rng):
    feats, idx = problem(rng, device=device)
    pooled = edge_pool(feats.requires_grad_(), idx)
    grad = torch.autograd.grad(pooled.sumsq.sum(), feats, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="edge_pool can be differentiated once only"):
        grad.sum().backward()


def test_opcheck(device, rng):
    feats, idx = problem(rng, device=device)
    graph = transpose_graph(idx, 30)
    op, backward = torch.ops.reid3d.edge_pool.default, torch.ops.reid3d.edge_pool_backward.default
    torch.library.opcheck(op, (feats.clone().requires_grad_(), idx, None, None))
    torch.library.opcheck(op, (feats.clone().requires_grad_(), idx, *graph))
    *pooled, max_slot, min_slot = op(feats, idx, None, None)
    torch.library.opcheck(backward, (*pooled, feats, idx, max_slot, min_slot, None, None))
    torch.library.opcheck(backward, (*pooled, feats, idx, max_slot, min_slot, *graph))


@pytest.mark.parametrize("given", [False, True])
def test_compiles_into_one_graph(given, device, rng):
    def loss(x, i):
        pooled = edge_pool(x * 2, i, transposed=transpose_graph(i, x.shape[1]) if given else None)
        return sum(p.square().sum() for p in pooled)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (20, 33):
        feats, idx = problem(rng, n=n, device=device)
        gradients = []
        for function in (loss, compiled):
            leaf = feats.clone().requires_grad_()
            function(leaf, idx).backward()
            gradients.append(leaf.grad)
        assert torch.equal(*gradients)


def test_autocast_keeps_the_dtype(device, rng):
    feats, idx = problem(rng, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        for x in (feats, feats.bfloat16()):
            assert [p.dtype for p in edge_pool(x, idx)] == [x.dtype, x.dtype, torch.float32, torch.float32]


FEATS, IDX = torch.zeros(2, 5, 3), torch.zeros(2, 4, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("feats", "idx", "error", "message"),
    [
        (None, IDX, TypeError, "feats must be a torch.Tensor, got NoneType"),
        (FEATS.long(), IDX, TypeError, "feats must be floating point, got torch.int64"),
        (FEATS[:, :0], IDX, ValueError, r"feats must hold at least one point, got \(2, 0, 3\)"),
        (FEATS, IDX.int(), TypeError, "idx must be an int64 tensor, got torch.int32"),
        (FEATS, IDX[:1], ValueError, r"idx must have shape \(2, M, K\) with 1 <= K <= 32767, got \(1, 4, 3\)"),
        (FEATS, IDX[:, :1].expand(-1, -1, 3).repeat(1, 1, 11000), ValueError, r"got \(2, 1, 33000\)"),
        (FEATS[:1], IDX.new_zeros(1).expand(1, 2**27, 16), ValueError, "idx must have at most 2147483647 edges"),
        (FEATS, IDX.to("meta"), ValueError, "idx must be on the device of feats, cpu, got meta"),
    ],
)
def test_errors(feats, idx, error, message):
    with pytest.raises(error, match=message):
        edge_pool(feats, idx)


@pytest.mark.parametrize("wrong", [-1, 5, 2**32, 2**40, -(2**63)])
def test_an_index_out_of_range_is_an_error_on_the_cpu(wrong):
    with pytest.raises(RuntimeError, match="idx must be between 0 and 4"):
        edge_pool(FEATS, IDX.clone().index_fill_(2, torch.tensor([1]), wrong))
