import math

import pytest
import torch

from reid3d.ops import TransposedGraph, edge_pool, group_max, group_max_reference, transpose_graph

ALL = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def problem(rng, b=2, n=30, m=11, k=5, c=7, dtype=torch.float32, device="cpu"):
    feats = torch.tensor(rng.standard_normal((b, n, c))).to(device, dtype)
    return feats, torch.tensor(rng.integers(0, n, (b, m, k)), device=device)


@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize(("k", "c"), [(1, 1), (5, 7), (32, 64), (3, 130), (9, 70), (256, 3), (257, 5), (400, 16)])
def test_by_hand(k, c, dtype, device, rng):
    feats, idx = problem(rng, k=k, c=c, dtype=dtype, device=device)
    out = group_max(feats, idx)
    values, groups = feats.tolist(), idx.tolist()
    expected = [
        [[max(values[b][i][channel] for i in group) for channel in range(c)] for group in groups[b]] for b in range(2)
    ]
    assert out.dtype == dtype
    assert out.tolist() == expected


@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize(("m", "k", "c"), [(50, 20, 70), (300, 33, 16), (7, 3, 1), (20, 256, 64), (20, 257, 15)])
def test_equals_the_reference_with_its_slots(m, k, c, dtype, device, rng):
    feats, idx = problem(rng, n=200, m=m, k=k, c=c, dtype=dtype, device=device)
    for x in (feats, (feats * 2).round()):  # equal values: the first slot wins
        result, expected = torch.ops.reid3d.group_max(x, idx, None, None), group_max_reference(x, idx)
        assert result[1].dtype == (torch.uint8 if k <= 256 else torch.int16)
        assert torch.equal(result[0], expected[0]) and torch.equal(result[1], expected[1])


@pytest.mark.parametrize("dtype", ALL)
def test_nan_wins_and_infinity_is_a_number(dtype, device):
    nan, inf = math.nan, math.inf
    feats = torch.tensor([[[1.0, nan, -inf, nan], [nan, 0.0, -inf, nan], [inf, 2.0, -inf, 1.0]]])
    feats, idx = feats.to(device, dtype), torch.tensor([[[0, 1, 2]]], device=device)
    out, slot = torch.ops.reid3d.group_max(feats, idx, None, None)
    assert torch.equal(out, feats.amax(1, keepdim=True)) or out.isnan().tolist() == [[[True, True, False, True]]]
    assert out[0, 0, 2] == -inf
    assert slot.tolist() == [[[1, 0, 0, 0]]]


@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize("k", [3, 4, 35])
def test_undefined_values_anywhere(dtype, k, device, rng):
    feats, idx = problem(rng, n=40, m=60, k=k, c=37, dtype=dtype, device=device)
    kinds = torch.tensor(rng.choice([1.0, math.nan, math.inf, -math.inf], feats.shape, p=[0.9, 0.04, 0.03, 0.03]))
    feats = torch.where(kinds.to(device) == 1, feats, kinds.to(feats))
    feats[0, ::2, 0] = -math.nan  # its sign says nothing
    result, expected = torch.ops.reid3d.group_max(feats, idx, None, None), group_max_reference(feats, idx)
    assert torch.equal(result[1], expected[1])
    assert torch.equal(result[0].isnan(), expected[0].isnan())
    assert torch.equal(result[0].nan_to_num(), expected[0].nan_to_num())


@pytest.mark.parametrize("dtype", ALL)
def test_gradient_lands_on_the_winner_only(dtype, device):
    feats = torch.tensor([[[1.0], [3.0], [3.0], [2.0]]], device=device, dtype=dtype, requires_grad=True)
    idx = torch.tensor([[[0, 2, 1], [3, 0, 0], [1, 1, 2]]], device=device)
    group_max(feats, idx).backward(torch.tensor([[[1.0], [10.0], [100.0]]], device=device, dtype=dtype))
    assert feats.grad.flatten().tolist() == [0.0, 100.0, 1.0, 10.0]


@pytest.mark.parametrize("given", [False, True])
def test_gradients(given, device, rng):
    feats, idx = problem(rng, dtype=torch.float64, device=device)
    transposed = transpose_graph(idx, 30) if given else None
    assert torch.autograd.gradcheck(lambda x: group_max(x, idx, transposed=transposed), feats.requires_grad_())
    assert torch.autograd.gradgradcheck(lambda x: group_max(x, idx, transposed=transposed), feats)


@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize(("n", "m", "k", "c"), [(30, 11, 5, 7), (60, 40, 9, 64), (5, 90, 20, 17), (40, 6, 260, 16)])
def test_gradient_to_the_last_bit(n, m, k, c, dtype, device, rng):
    feats, idx = problem(rng, n=n, m=m, k=k, c=c, dtype=dtype, device=device)
    grad = torch.tensor(rng.standard_normal((2, m, c))).to(device, dtype)
    slot = group_max_reference(feats, idx)[1].tolist()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    expected = grad.cpu().to(wide).new_zeros(feats.shape).numpy()
    values, groups = grad.cpu().to(wide).numpy(), idx.tolist()
    for b in range(2):
        for g in range(m):
            for channel in range(c):
                expected[b, groups[b][g][slot[b][g][channel]], channel] += values[b, g, channel]
    leaf = feats.requires_grad_()
    for transposed in (None, transpose_graph(idx, n)):
        result = torch.autograd.grad(group_max(leaf, idx, transposed=transposed), leaf, grad)[0]
        assert torch.equal(result, torch.tensor(expected).to(device, dtype))


def test_half_gradients_are_summed_in_float32(device):
    # 4096 + 1 is 4096 in float16: a sum of ones in half precision would stop at 2048
    feats = torch.zeros(1, 1, 1, device=device, dtype=torch.float16, requires_grad=True)
    group_max(feats, torch.zeros(1, 4096, 1, device=device, dtype=torch.int64)).sum().backward()
    assert feats.grad.item() == 4096


def test_deterministic_whatever_the_threads(device, rng):
    feats, idx = problem(rng, n=10, m=500, k=4, c=40, device=device)
    grad = torch.tensor(rng.standard_normal((2, 500, 40)), dtype=torch.float32, device=device)
    leaf, before, runs = feats.requires_grad_(), torch.get_num_threads(), []
    try:
        for threads in (before, 1, 2, 3):
            torch.set_num_threads(threads)
            out = group_max(leaf, idx)
            runs.append((out, torch.autograd.grad(out, leaf, grad)[0]))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


def test_order_within_a_group_does_not_matter(device, rng):
    feats, idx = problem(rng, device=device)
    assert torch.equal(group_max(feats, idx), group_max(feats, idx.flip(2)))


@pytest.mark.parametrize(("b", "m", "c"), [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empty(b, m, c, device):
    feats = torch.zeros(b, 5, c, device=device, requires_grad=True)
    out = group_max(feats, torch.zeros(b, m, 2, device=device, dtype=torch.int64))
    out.sum().backward()
    assert out.shape == (b, m, c) and feats.grad.abs().sum() == 0


def test_non_contiguous(device, rng):
    feats, idx = problem(rng, device=device)
    strided = feats.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(group_max(strided, idx[:, ::2]), group_max(feats, idx[:, ::2].contiguous()))
    strided.requires_grad_()
    group_max(strided, idx).sum(0).t().square().sum().backward()
    feats.requires_grad_()
    group_max(feats, idx).sum(0).square().sum().backward()
    assert torch.equal(strided.grad, feats.grad)


def test_opcheck(device, rng):
    feats, idx = problem(rng, device=device)
    op, backward = torch.ops.reid3d.group_max.default, torch.ops.reid3d.group_max_backward.default
    for graph in ((None, None), transpose_graph(idx, 30)):
        torch.library.opcheck(op, (feats.clone().requires_grad_(), idx, *graph))
        out, slot = op(feats, idx, *graph)
        torch.library.opcheck(backward, (out.requires_grad_(), idx, slot, *graph, 30))


def test_compiles_into_one_graph(device, rng):
    compiled = torch.compile(
        lambda x, i: group_max(x * 2, i).square().sum(), fullgraph=True, backend="aot_eager", dynamic=True
    )
    for n in (20, 33):
        feats, idx = problem(rng, n=n, device=device)
        gradients = []
        for function in (lambda x, i: group_max(x * 2, i).square().sum(), compiled):
            leaf = feats.clone().requires_grad_()
            function(leaf, idx).backward()
            gradients.append(leaf.grad)
        assert torch.equal(*gradients)


def test_autocast_keeps_the_dtype(device, rng):
    feats, idx = problem(rng, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert group_max(feats, idx).dtype == torch.float32
        assert group_max(feats.bfloat16(), idx).dtype == torch.bfloat16


FEATS, IDX = torch.zeros(2, 5, 3), torch.zeros(2, 4, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("feats", "idx", "error", "message"),
    [
        (FEATS.long(), IDX, TypeError, "feats must be floating point, got torch.int64"),
        (FEATS.to(torch.float8_e5m2), IDX, TypeError, "feats must be float16, .* got torch.float8_e5m2"),
        (FEATS[0], IDX, ValueError, r"feats must have shape \(B, N, D\), got \(5, 3\)"),
        (FEATS[:, :0], IDX, ValueError, r"feats must hold at least one point, got \(2, 0, 3\)"),
        (FEATS, IDX.int(), TypeError, "idx must be an int64 tensor, got torch.int32"),
        (FEATS, [[0]], TypeError, "idx must be an int64 tensor, got list"),
        (FEATS, IDX[:1], ValueError, r"idx must have shape \(2, M, K\) with 1 <= K <= 32767, got \(1, 4, 3\)"),
        (FEATS, IDX[..., :0], ValueError, r"idx must have shape .*, got \(2, 4, 0\)"),
        (FEATS[:1], IDX.new_zeros(1).expand(1, 2**27, 16), ValueError, "idx must have at most 2147483647 edges"),
        (FEATS, IDX.to("meta"), ValueError, "idx must be on the device of feats, cpu, got meta"),
    ],
)
def test_errors(feats, idx, error, message):
    with pytest.raises(error, match=message):
        group_max(feats, idx)


GRAPH = transpose_graph(IDX, 5)


@pytest.mark.parametrize(
    ("transposed", "error", "message"),
    [
        (tuple(GRAPH), TypeError, "transposed must be a TransposedGraph, got tuple"),
        (GRAPH._replace(edges=None), TypeError, "transposed.edges must be an int32 tensor, got NoneType"),
        (GRAPH._replace(offsets=IDX), TypeError, "transposed.offsets must be an int32 tensor, got torch.int64"),
        (transpose_graph(IDX, 6), ValueError, r"transposed.offsets must have shape \(2, 6\), got \(2, 7\)"),
        (transpose_graph(IDX[:, 1:], 5), ValueError, r"transposed.edges must have shape \(2, 12\), got \(2, 9\)"),
        (
            TransposedGraph(GRAPH.offsets, GRAPH.edges.to("meta")),
            ValueError,
            "transposed.edges must be on the device of idx, cpu, got meta",
        ),
    ],
)
@pytest.mark.parametrize("op", [group_max, edge_pool])
def test_errors_of_a_transposed_graph(op, transposed, error, message):
    with pytest.raises(error, match=message):
        op(FEATS, IDX, transposed=transposed)


@pytest.mark.parametrize("wrong", [-1, 5, 2**32, 2**40, -(2**63)])
def test_an_index_out_of_range_is_an_error_on_the_cpu(wrong):
    with pytest.raises(RuntimeError, match="idx must be between 0 and 4"):
        group_max(FEATS, IDX.clone().index_fill_(2, torch.tensor([1]), wrong))
