"""Gated pooling against every pair formed and torch's own gradients, then its properties and errors."""

import math

import pytest
import torch

from reid3d.ops import Gate, backend, gated_pool

# clouds, points, groups, slots, inner, outer, hidden: rows that are no whole vectors, more slots than a tile has rows,
# more groups than a piece of a cloud has, one of everything
SHAPES = [
    (2, 30, 11, 5, 16, 32, 2),
    (3, 30, 13, 8, 24, 50, 1),
    (2, 40, 7, 32, 40, 20, 0),
    (2, 9, 5, 100, 16, 16, 3),
    (1, 300, 3, 300, 8, 8, 1),
    (2, 50, 700, 16, 20, 17, 1),
    (1, 1, 1, 1, 1, 1, 1),
]


def problem(rng, shape, dtype=torch.float64, device="cpu"):
    """points, centers, idx, weight, gate, sign."""
    b, n, m, k, h, c, r = shape

    def normal(*size):
        return torch.tensor(rng.standard_normal(size)).to(device, dtype)

    gate = Gate(normal(r, h) / h**0.5, normal(r), normal(h, r), normal(h)) if r else None
    sign = torch.where(normal(c) < 0, -1.0, 1.0).to(dtype)
    idx = torch.tensor(rng.integers(0, n, (b, m, k)), device=device)
    return normal(b, n, h), normal(b, m, h), idx, normal(c, h) / h**0.5, gate, sign


def leaves(points, centers, idx, weight, gate, sign):
    return [x.requires_grad_() for x in (points, centers, weight, *(gate or ()))]


def every_pair(points, centers, idx, weight, gate, sign):
    """By the definition."""
    y = torch.stack([cloud[group] for cloud, group in zip(points, idx, strict=True)]) + centers.unsqueeze(2)
    if gate is not None:
        hidden = y @ gate.reduce.t() + gate.reduce_bias
        y = y / (1 + torch.exp(-(hidden / (1 + torch.exp(-hidden))) @ gate.expand.t() - gate.expand_bias))
    e = y @ weight.t()
    largest = (e * sign).max(2).values * sign
    return largest, e.mean((0, 1, 2)), (e - e.mean((0, 1, 2))).square().mean((0, 1, 2))


def ours(points, centers, idx, weight, gate, sign, moments=True):
    return gated_pool(points, centers, idx, weight, gate, sign=sign, moments=moments)


def largest_error(found, expected):
    return float((found - expected).detach().abs().max() / expected.detach().abs().max().clamp_min(1e-300))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("moments", [False, True])
def test_every_pair(shape, moments, device, rng):
    inputs = problem(rng, shape, device=device)
    wanted = leaves(*inputs)
    found, expected = ours(*inputs, moments), every_pair(*inputs)
    kept = 3 if moments else 1
    grads = [torch.tensor(rng.standard_normal(x.shape), device=device) for x in expected[:kept]]
    for name, a, b in zip(("extreme", "mean", "var"), found[:kept], expected, strict=False):
        assert largest_error(a, b) < 1e-12 or float(b.detach().abs().max()) == 0, name
    assert moments or found.mean is found.var is None
    for a, b in zip(
        torch.autograd.grad(found[:kept], wanted, grads),
        torch.autograd.grad(expected[:kept], wanted, grads),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11 * max(1.0, float(b.abs().max())))


@pytest.mark.parametrize("shape", SHAPES)
def test_float32_is_close(shape, device, rng):
    inputs = problem(rng, shape, torch.float32, device)
    exact = [None if x is None else x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
             for x in inputs]  # fmt: skip
    exact[4] = None if inputs[4] is None else Gate(*(x.double() for x in inputs[4]))
    found, expected = ours(*inputs), every_pair(*exact)
    assert [x.dtype for x in found] == [torch.float32] * 3
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
    grads = [torch.tensor(rng.standard_normal(x.shape), device=device) for x in expected]
    # what wins by less than a rounding may lose
    slots = torch.ops.reid3d.gated_pool(*inputs[:3], *flat(inputs[4]), *inputs[3:4], inputs[5], False)[4]
    true = torch.ops.reid3d.gated_pool(*exact[:3], *flat(exact[4]), *exact[3:4], exact[5], False)[4]
    grads[0] = torch.where(slots == true, grads[0], 0.0)
    of_ours, of_exact = leaves(*inputs), leaves(*exact)
    found = torch.autograd.grad(ours(*inputs), of_ours, [g.float() for g in grads])
    for a, b in zip(found, torch.autograd.grad(every_pair(*exact), of_exact, grads), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=2e-5 * max(1.0, float(b.abs().max())))


def flat(gate):
    return [None] * 4 if gate is None else [gate.reduce, gate.reduce_bias, gate.expand.t(), gate.expand_bias]


def test_gradcheck(device, rng):
    *inputs, gate, sign = problem(rng, (2, 7, 4, 3, 5, 6, 2), device=device)
    points, centers, idx, weight = inputs

    def pool(points, centers, weight, *gate):
        return tuple(gated_pool(points, centers, idx, weight, Gate(*gate), sign=sign, moments=True))

    assert torch.autograd.gradcheck(pool, leaves(*inputs, gate, sign))


def test_the_first_of_equal_ones_wins(device, rng):
    points, centers, idx, weight, gate, _ = problem(rng, (2, 3, 9, 12, 8, 16, 1), device=device)
    found = torch.ops.reid3d.gated_pool(points, centers, idx, *flat(gate), weight, torch.ones_like(weight[:, 0]), False)
    for b, m, c in torch.cartesian_prod(torch.arange(2), torch.arange(9), torch.arange(16)).tolist():
        group = idx[b, m].tolist()
        slot = int(found[4][b, m, c])
        assert group.index(group[slot]) == slot


def test_variance_about_a_large_mean(device, rng):
    """Outputs around 1000 that vary by 1: their squares say nothing in float32."""
    points, centers, idx, weight, _, sign = problem(rng, (2, 60, 90, 16, 24, 16, 0), torch.float32, device)
    points, centers = points + 1000, centers * 0
    _, mean, var = every_pair(points.double(), centers.double(), idx, weight.double(), None, sign.double())
    found = ours(points, centers, idx, weight, None, sign)
    torch.testing.assert_close(found.mean.double(), mean, rtol=1e-6, atol=1e-3)
    torch.testing.assert_close(found.var.double(), var, rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nan_wins_where_it_is(dtype, device, rng):
    points, centers, idx, weight, gate, sign = problem(rng, (2, 40, 60, 5, 8, 20, 1), dtype, device)
    points[0, 3] = math.nan
    found = ours(points, centers, idx, weight, gate, sign)
    touched = (idx[0] == 3).any(1)
    assert touched.any() and found.extreme[0, touched].isnan().all()
    assert not found.extreme[0, ~touched].isnan().any() and not found.extreme[1].isnan().any()
    assert found.mean.isnan().all() and found.var.isnan().all()
    raw = torch.ops.reid3d.gated_pool(points, centers, idx, *flat(gate), weight, sign, False)
    first = (idx[0] == 3).int().argmax(1)[touched].unsqueeze(1)
    assert (raw[4][0, touched] == first).all()


def test_a_closed_and_an_open_gate(device, rng):
    """The sigmoid far out: 0 and 1, and no NaN."""
    points, centers, idx, weight, gate, sign = problem(rng, (1, 20, 10, 4, 16, 16, 1), torch.float32, device)
    wide_open = gate._replace(expand_bias=torch.full_like(gate.expand_bias, 1e4))
    torch.testing.assert_close(
        ours(points, centers, idx, weight, wide_open, sign), ours(points, centers, idx, weight, None, sign)
    )
    closed = gate._replace(expand_bias=torch.full_like(gate.expand_bias, -1e4))
    assert float(ours(points, centers, idx, weight, closed, sign).extreme.abs().max()) < 1e-30


def test_permuted_points_and_groups(device, rng):
    points, centers, idx, weight, gate, sign = problem(rng, (2, 50, 80, 9, 24, 20, 1), device=device)
    order, groups = (torch.tensor(rng.permutation(size), device=device) for size in (50, 80))
    found = ours(points[:, order], centers[:, groups], order.argsort()[idx][:, groups], weight, gate, sign)
    expected = ours(points, centers, idx, weight, gate, sign)
    assert torch.equal(found.extreme, expected.extreme[:, groups])
    torch.testing.assert_close(found.mean, expected.mean)
    torch.testing.assert_close(found.var, expected.var)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_deterministic_whatever_the_threads(threads, device, rng):
    """The compiled kernels, to the last bit; plain torch rounds as its products do."""
    points, centers, idx, weight, gate, sign = problem(rng, (5, 60, 700, 16, 24, 20, 1), torch.float32, device)
    inputs = (points, centers, idx, *flat(gate), weight)

    def both():
        extreme, mean, var, inner_mean, slot = torch.ops.reid3d.gated_pool(*inputs, sign, True)
        q = torch.outer(inner_mean, inner_mean)
        backward = torch.ops.reid3d.gated_pool_backward(extreme, *inputs, slot, inner_mean, q, inner_mean)
        return [extreme, mean, var, inner_mean, slot, *backward]

    before = torch.get_num_threads()
    first = both()
    try:
        torch.set_num_threads(threads)
        again = both()
    finally:
        torch.set_num_threads(before)
    exact = "cpp" in backend() and device.type == "cpu"
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b) or not exact
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * max(1.0, float(b.abs().max())))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_read_as_float32_on_the_cpu(dtype, rng):
    points, centers, idx, weight, gate, sign = problem(rng, (2, 30, 11, 5, 16, 32, 2), torch.float32)
    found = ours(points.to(dtype), centers.to(dtype), idx, weight.to(dtype), Gate(*(x.to(dtype) for x in gate)), sign)
    rounded = [x.to(dtype).float() for x in (points, centers, weight)]
    expected = ours(*rounded[:2], idx, rounded[2], Gate(*(x.to(dtype).float() for x in gate)), sign)
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("moments", [False, True])
@pytest.mark.parametrize(("b", "m", "c"), [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empty(b, m, c, moments, device, rng):
    inputs = problem(rng, (b, 5, m, 2, 6, c, 1), device=device)
    found = ours(*inputs, moments=moments)
    assert found.extreme.shape == (b, m, c)
    assert not moments or (found.mean.shape == found.var.shape == (c,) and (c == 0 or found.mean.isnan().all()))
    wanted = leaves(*inputs)
    grads = torch.autograd.grad(ours(*inputs, moments=moments).extreme.sum(), wanted)
    assert all(float(g.abs().sum()) == 0 for g in grads)


def test_non_contiguous(device, rng):
    points, centers, idx, weight, gate, sign = problem(rng, (2, 30, 11, 6, 16, 32, 2), device=device)
    expected = ours(points, centers, idx[..., ::2], weight, gate, sign)
    points, centers, idx, weight, *gate = (
        x.mT.contiguous().mT if x.dim() > 1 else x for x in (points, centers, idx, weight, *gate)
    )
    found = ours(points, centers, idx[..., ::2], weight, Gate(*gate), sign)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_differentiated_once_only(device, rng):
    inputs = problem(rng, SHAPES[0], device=device)
    wanted = leaves(*inputs)
    grad = torch.autograd.grad(ours(*inputs).extreme.square().sum(), wanted[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="gated_pool can be differentiated once only"):
        grad.sum().backward()


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2]])
@pytest.mark.parametrize("moments", [False, True])
def test_opcheck(shape, moments, device, rng):
    points, centers, idx, weight, gate, sign = problem(rng, shape, device=device)
    leaves(points, centers, idx, weight, gate, sign)
    op, backward = torch.ops.reid3d.gated_pool.default, torch.ops.reid3d.gated_pool_backward.default
    inputs = [x.detach() if x is not None else None for x in (points, centers, idx, *flat(gate), weight)]
    grads = [x if x is None or x.dtype == torch.int64 else x.clone().requires_grad_() for x in inputs]
    torch.library.opcheck(op, (*grads, sign, moments))
    extreme, mean, _, inner_mean, slot = op(*inputs, sign, moments)
    q = inner_mean.new_zeros((weight.shape[1],) * 2 if moments else 0) + 0.1
    torch.library.opcheck(backward, (extreme, *inputs, slot, inner_mean, q, inner_mean + 1))


def test_compiles_into_one_graph(device, rng):
    def loss(points, centers, idx, weight, sign, *gate):
        found = gated_pool(points * 2, centers, idx, weight, Gate(*gate), sign=sign, moments=True)
        return found.extreme.sum() + (found.mean * found.var).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (20, 33):
        points, centers, idx, weight, gate, sign = problem(rng, (2, n, 8, 3, 16, 24, 1), device=device)
        gradients = []
        for function in (loss, compiled):
            wanted = leaves(*(x.detach().clone() for x in (points, centers)), idx, weight, gate, sign)
            total = function(*wanted[:2], idx, weight, sign, *gate)
            gradients.append(torch.autograd.grad(total, wanted))
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"points": [1]}, TypeError, "points must be a torch.Tensor"),
        ({"points": torch.zeros(2, 0, 16)}, ValueError, "points must hold at least one point"),
        ({"centers": torch.zeros(2, 11, 16).double()}, TypeError, "centers must have the dtype of points"),
        ({"weight": torch.zeros(32, 16).long()}, TypeError, "weight must be a floating point tensor, got torch.int64"),
        ({"gate": (1, 2, 3, 4)}, TypeError, "gate must be an ops.Gate, got tuple"),
        ({"idx": torch.zeros(2, 11, 5)}, TypeError, "idx must be an int64 tensor"),
        ({"centers": torch.zeros(2, 10, 16)}, ValueError, r"centers must have shape \(2, 11, 16\), got \(2, 10, 16\)"),
        ({"weight": torch.zeros(32, 15)}, ValueError, r"weight must have shape \(32, 16\), got \(32, 15\)"),
        ({"sign": torch.ones(31)}, ValueError, r"sign must have shape \(32,\), got \(31,\)"),
        (
            {"gate": Gate(*(torch.zeros(s) for s in ((2, 16), (2,), (2, 16), (16,))))},
            ValueError,
            r"gate.expand must have shape \(16, 2\)",
        ),
    ],
)
def test_wrong_arguments(change, error, message, rng):
    names = ("points", "centers", "idx", "weight", "gate", "sign")
    inputs = dict(zip(names, problem(rng, SHAPES[0], torch.float32), strict=True)) | change
    with pytest.raises(error, match=message):
        gated_pool(**inputs, moments=True)


@pytest.mark.parametrize("bad", [-1, 30])
def test_index_out_of_range(bad, device, rng):
    if device.type != "cpu":
        pytest.skip("a failed launch ends the process on CUDA")
    inputs = problem(rng, SHAPES[0], device=device)
    inputs[2][1, 3, 2] = bad
    with pytest.raises(RuntimeError, match="idx must be between 0 and 29"):
        ours(*inputs)
