import math

import numpy as np
import pytest
import torch
from torch import nn

from reid3d.ops.pyg import fps, knn, knn_graph, radius, radius_graph

from .clouds import cloud, exact_distances

# Equal and different sizes, smaller than k, single points, none: first, in the middle and last.
RAGGED = (0, 7, 12, 1, 7, 0, 3, 12, 0)
FLOWS = ("source_to_target", "target_to_source")


def flat(kind, sizes, rng, dims=3):
    """Points of all clouds (N,dims) float64, their batch vector, and where the clouds begin and end."""
    x = cloud(kind, sum(sizes), rng, batch=1, dims=dims)[0]
    batch = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    return x, batch, [0, *np.cumsum(sizes).tolist()]


def ranks(x, y, bounds_x, bounds_y):
    """For every point of y: (its index, the (squared distance, index) of all points of x in its cloud), exact."""
    distances = exact_distances(y[None], x[None])[0]
    for (begin, end), (first, last) in zip(
        zip(bounds_x, bounds_x[1:], strict=False), zip(bounds_y, bounds_y[1:], strict=False), strict=True
    ):
        for i in range(first, last):
            yield i, [(distances[i][j], j) for j in range(begin, end)]


def nearest(x, y, k, bounds_x, bounds_y, loop=True):
    """Edges of the definition: [point of y, point of x]."""
    return [
        [i, j]
        for i, row in ranks(x, y, bounds_x, bounds_y)
        for _, j in sorted(pair for pair in row if loop or pair[1] != i)[:k]
    ]


def within(x, y, r, k, bounds_x, bounds_y, loop=True):
    return [
        [i, j]
        for i, row in ranks(x, y, bounds_x, bounds_y)
        for j in [j for d, j in row if d < r * r and (loop or j != i)][:k]
    ]


def edges(found):
    assert found.dtype == torch.int64 and found.dim() == 2 and found.shape[0] == 2
    return found.T.tolist()


@pytest.mark.parametrize("kind", ["random", "grid", "equal"])
@pytest.mark.parametrize("k", [1, 5, 12, 150])
@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize("flow", FLOWS)
def test_knn_graph(kind, k, loop, flow, dtype, device, rng):
    x, batch, bounds = flat(kind, RAGGED, rng)
    found = edges(knn_graph(x.to(device, dtype), k, batch.to(device), loop, flow, batch_size=len(RAGGED)))
    expected = nearest(x, x, k, bounds, bounds, loop)
    assert found == ([[j, i] for i, j in expected] if flow == "source_to_target" else expected)


@pytest.mark.parametrize("sizes", [(9, 9, 9), (9,), (1,), (2,)])
def test_knn_graph_of_equal_clouds(sizes, device, rng):
    x, batch, bounds = flat("grid", sizes, rng)
    expected = nearest(x, x, 4, bounds, bounds, loop=False)
    assert edges(knn_graph(x.to(device), 4, batch.to(device), flow="target_to_source")) == expected
    if len(sizes) == 1:
        assert edges(knn_graph(x.to(device), 4, flow="target_to_source")) == expected


@pytest.mark.parametrize("dims", [1, 2, 5])
def test_other_dimensions(dims, device, rng):
    x, batch, bounds = flat("grid", (6, 4, 6), rng, dims)
    x, here = (x * 3).round(), batch.to(device)
    on = x.to(device).squeeze(1)  # one coordinate may be (N,)
    assert edges(knn_graph(on, 3, here, flow="target_to_source")) == nearest(x, x, 3, bounds, bounds, loop=False)
    assert edges(radius(on, on, 2.5, here, here)) == within(x, x, 2.5, 32, bounds, bounds)
    assert fps(on, here, 1.0, random_start=False).tolist() == by_hand(x, bounds, [6, 4, 6], [0, 0, 0])


def test_knn_between_two_sets(dtype, device, rng):
    sizes_y = (3, 5, 0, 4, 1, 2, 0, 5, 1)  # queries in clouds without points, points in clouds without queries
    (x, batch_x, bounds_x), (y, batch_y, bounds_y) = flat("grid", RAGGED, rng), flat("grid", sizes_y, rng)
    points, queries, in_x, in_y = x.to(device, dtype), y.to(device, dtype), batch_x.to(device), batch_y.to(device)
    assert edges(knn(points, queries, 4, in_x, in_y)) == nearest(x, y, 4, bounds_x, bounds_y)
    assert edges(radius(points, queries, 1.5, in_x, in_y, 4)) == within(x, y, 1.5, 4, bounds_x, bounds_y)


@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("most", [1, 3, 200])
def test_radius_graph(loop, flow, most, dtype, device, rng):
    x, batch, bounds = flat("grid", RAGGED, rng)
    found = edges(radius_graph(x.to(device, dtype), 1.5, batch.to(device), loop, most, flow))
    expected = within(x, x, 1.5, most, bounds, bounds, loop)
    assert found == ([[j, i] for i, j in expected] if flow == "source_to_target" else expected)


@pytest.mark.parametrize("dims", [3, 5])
def test_radius_is_strict(dims, device):
    x = torch.zeros(3, dims, device=device)
    x[:, 0] = torch.tensor([0.0, 1, 3])
    assert edges(radius(x, x[:1], 1.0)) == [[0, 0]]
    assert edges(radius(x, x[:1], 1.5)) == [[0, 0], [0, 1]]
    assert edges(radius(x, x[:1] - 2, 0.5)) == []  # nothing, not index 0


def by_hand(x, bounds, counts, starts):
    """Farthest points by definition, cloud by cloud; `starts` within each cloud."""
    picked = []
    for begin, end, m, start in zip(bounds, bounds[1:], counts, starts, strict=False):
        d = exact_distances(x[None, begin:end], x[None, begin:end])[0]
        chosen = [start] if m else []
        while len(chosen) < m:
            left = [i for i in range(end - begin) if i not in chosen]
            chosen.append(max(left, key=lambda i: (min(d[i][p] for p in chosen), -i)))  # noqa: B023
        picked += [begin + i for i in chosen]
    return picked


@pytest.mark.parametrize("kind", ["random", "grid", "equal"])
@pytest.mark.parametrize("ratio", [None, 0.3, 0.7, 1, torch.tensor(0.7), torch.tensor([0.3])])
def test_fps(kind, ratio, dtype, device, rng):
    x, batch, bounds = flat(kind, RAGGED, rng)
    share = 0.5 if ratio is None else round(float(ratio), 1)
    counts = [math.ceil(round(share * n, 6)) for n in RAGGED]
    expected = by_hand(x, bounds, counts, [0] * len(RAGGED))
    on = x.to(device, dtype)
    assert fps(on, batch.to(device), ratio, random_start=False).tolist() == expected
    assert fps(on, None, ratio, random_start=False, ptr=bounds).tolist() == expected
    assert fps(on, None, ratio, random_start=False, ptr=torch.tensor(bounds, device=device)).tolist() == expected


@pytest.mark.parametrize("kind", ["random", "grid", "equal"])
@pytest.mark.parametrize("dims", [3, 5])
def test_fps_from_a_random_start(kind, dims, device, rng):
    x, batch, bounds = flat(kind, RAGGED, rng, dims)
    on, in_cloud = x.to(device), batch.to(device)
    seen = set()
    for seed in range(8):
        torch.manual_seed(seed)
        picked = fps(on, in_cloud, 1.0)
        torch.manual_seed(seed)
        assert torch.equal(fps(on, in_cloud, 1.0), picked)
        starts = [int(picked[begin]) - begin if n else 0 for begin, n in zip(bounds, RAGGED, strict=False)]
        assert picked.tolist() == by_hand(x, bounds, RAGGED, starts)
        seen.add(tuple(starts))
    assert len(seen) > 4 and len({starts[1] for starts in seen}) > 2


def test_fps_takes_every_point_as_start(device):
    x, seen = torch.rand(5, 3, device=device), set()
    torch.manual_seed(0)
    for _ in range(100):
        seen.add(int(fps(x, ratio=0.2)))
    assert seen == {0, 1, 2, 3, 4}


def test_fps_with_a_ratio_for_every_cloud(device, rng):
    x, batch, bounds = flat("grid", (8, 8, 5), rng)
    counts = [2, 8, 0]
    ratio = torch.tensor([0.25, 1.0, 0.0], dtype=torch.float64, device=device)
    found = fps(x.to(device), batch.to(device), ratio, random_start=False)
    assert found.tolist() == by_hand(x, bounds, counts, [0, 0, 0])


def test_fps_of_more_than_two_dimensions(device, rng):
    x = torch.tensor(rng.random((10, 2, 4)), device=device)
    assert torch.equal(fps(x, random_start=False), fps(x.view(10, 8), random_start=False))


def test_ratios_do_not_gain_a_point_by_rounding(device):
    # 0.1 * 30 is 3.0000000000000004 in float64; in float16, which theirs computes in for float16 points, 0.7 is more.
    for dtype in (torch.float16, torch.float32, torch.float64):
        assert len(fps(torch.rand(30, 3, device=device).to(dtype), ratio=0.1)) == 3
        assert len(fps(torch.rand(10, 3, device=device).to(dtype), ratio=0.7)) == 7


@pytest.mark.parametrize("scale", [1e-3, 1e6])
def test_no_distance_is_too_large(scale, device, rng):
    x = torch.tensor(rng.random((40, 3)), device=device)
    assert torch.equal(knn_graph(x * scale, 4), knn_graph(x, 4))
    assert torch.equal(fps(x * scale, random_start=False), fps(x, random_start=False))
    assert torch.equal(radius_graph(x * scale, 0.3 * scale), radius_graph(x, 0.3))


def test_cosine_compares_directions(dtype, device, rng):
    x = torch.tensor(rng.standard_normal((20, 4)), device=device, dtype=dtype)
    cosines = torch.nn.functional.cosine_similarity(x[:, None].double(), x[None].double(), dim=-1)
    nearer = cosines.fill_diagonal_(-2).topk(3).indices
    found = knn_graph(x * torch.rand(20, 1, device=device).exp().to(dtype), 3, flow="target_to_source", cosine=True)
    assert torch.equal(found[1].view(20, 3), nearer)
    with_zero = torch.cat([x, torch.zeros_like(x[:1])])
    assert 20 not in knn(with_zero, x, 20, cosine=True)[1]


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_is_read_as_float32(half, device, rng):
    x = cloud("random", 30, rng)[0].to(device, half)
    assert torch.equal(knn_graph(x, 3), knn_graph(x.float(), 3))
    assert torch.equal(fps(x, random_start=False), fps(x.float(), random_start=False))
    assert torch.equal(radius_graph(x, 0.4), radius_graph(x.float(), 0.4))


def test_nothing_at_all(device):
    none, no_batch = torch.zeros(0, 3, device=device), torch.zeros(0, dtype=torch.int64, device=device)
    for batch in (None, no_batch):
        for size in (None, 1) if batch is None else (None, 3):
            assert fps(none, batch, batch_size=size).shape == (0,)
            assert knn_graph(none, 3, batch, batch_size=size).shape == (2, 0)
            assert radius_graph(none, 1.0, batch, batch_size=size).shape == (2, 0)
    assert knn(none, torch.zeros(4, 3, device=device), 2).shape == (2, 0)


def test_nan_points_are_nobodys_first_choice(device):
    x = torch.tensor([[0.0, 0, 0], [torch.nan, 0, 0], [1, 0, 0], [3, 0, 0]], device=device)
    assert edges(knn(x, x[:1], 4)) == [[0, 0], [0, 2], [0, 3], [0, 1]]
    assert edges(radius(x, x, 1.5)) == [[0, 0], [0, 2], [2, 0], [2, 2], [3, 3]]
    assert fps(x, ratio=1.0, random_start=False).tolist() == [0, 3, 2, 1]


class DynamicEdgeConv(nn.Module):
    """As users of these drop-ins write it: an MLP on [x_i, x_j - x_i] of the edges, and its maximum at every point."""

    def __init__(self, mlp, k):
        super().__init__()
        self.mlp, self.k = mlp, k

    def forward(self, x, batch):
        source, target = knn_graph(x, self.k, batch)
        messages = self.mlp(torch.cat([x[target], x[source] - x[target]], dim=1))
        into = target[:, None].expand_as(messages)
        return messages.new_zeros(len(x), messages.shape[1]).scatter_reduce(
            0, into, messages, "amax", include_self=False
        )


def test_a_training_step_of_a_graph_convolution(device, rng):
    x, batch, _ = flat("random", (20, 20, 9), rng)
    x, batch, k = x.to(device), batch.to(device), 4
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5)).to(device).double()
    twin = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5)).to(device).double()
    twin.load_state_dict(mlp.state_dict())
    weight = torch.tensor(rng.standard_normal((len(x), 5)), device=device)

    def dense():
        out = []
        for b in range(3):
            own = x[batch == b]
            d = (own[:, None] - own[None]).square().sum(2).fill_diagonal_(torch.inf)
            near = own[d.topk(k, largest=False).indices]
            i = own[:, None].expand_as(near)
            out.append(twin(torch.cat([i, near - i], 2)).amax(1))
        return torch.cat(out)

    for model, forward in ((mlp, lambda: DynamicEdgeConv(mlp, k)(x, batch)), (twin, dense)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        (forward() * weight).sum().backward()
        optimizer.step()
    for ours, theirs in zip(mlp.parameters(), twin.parameters(), strict=True):
        assert ours.grad.abs().sum() > 0
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_no_limit_takes_no_memory(device, rng):
    x, batch, _ = flat("random", (7, 1, 5), rng)
    x, batch, most = x.to(device), batch.to(device), 2**62
    y = x[batch == 2] + 0.01
    in_y = torch.full((5,), 2, device=device)
    for loop in (False, True):
        assert torch.equal(knn_graph(x, most, batch, loop), knn_graph(x, 7, batch, loop))
        assert torch.equal(radius_graph(x, 9.0, batch, loop, most), radius_graph(x, 9.0, batch, loop, 7))
    assert torch.equal(knn(x, y, most, batch, in_y), knn(x, y, 5, batch, in_y))
    found = radius(x, y, 9.0, batch, in_y, most, ignore_same_index=True)  # y[0] has another index in x
    assert torch.equal(found, radius(x, y, 9.0, batch, in_y, 5)) and found.shape == (2, 25)


@pytest.mark.parametrize("small", [torch.uint8, torch.int8, torch.uint16, torch.int32])
def test_batches_of_any_integers(small, device, rng):
    x, batch, _ = flat("random", (4, 0, 6), rng)
    x, batch = x.to(device), batch.to(device)
    assert torch.equal(knn_graph(x, 2, batch.to(small), batch_size=300), knn_graph(x, 2, batch))


def test_points_that_require_grad(device, rng):
    x = cloud("random", 30, rng)[0].to(device).requires_grad_()
    assert not any(found.requires_grad for found in (knn_graph(x, 3), radius_graph(x, 0.4), fps(x)))


X = torch.zeros(4, 3)
BATCH = torch.tensor([0, 0, 1, 1])


@pytest.mark.parametrize(
    ("run", "error", "message"),
    [
        (lambda: knn_graph(np.zeros((4, 3)), 1), TypeError, "x must be a torch.Tensor, got ndarray"),
        (lambda: knn_graph(X.int(), 1), TypeError, "x must be floating point, got torch.int32"),
        (lambda: knn_graph(X[None], 1), ValueError, r"x must have shape \(N, D\) or \(N,\), got \(1, 4, 3\)"),
        (lambda: knn_graph(X, 0), ValueError, "k must be at least 1, got 0"),
        (lambda: knn_graph(X, 1.5), TypeError, "k must be an int, got float"),
        (
            lambda: knn_graph(X, 1, BATCH[:3]),
            ValueError,
            r"batch must have shape \(4,\) like the points of x, got \(3,",
        ),
        (lambda: knn_graph(X, 1, BATCH.float()), TypeError, "batch must be an integer tensor, got torch.float32"),
        (lambda: knn_graph(X, 1, [0, 0, 1, 1]), TypeError, "batch must be an integer tensor, got list"),
        (lambda: knn_graph(X, 1, BATCH.flip(0)), ValueError, "batch must be sorted"),
        (lambda: knn_graph(X, 1, BATCH - 1), ValueError, "batch must not be negative, got -1"),
        (lambda: knn_graph(X, 1, BATCH, batch_size=1), ValueError, "batch must be below batch_size = 1, got 1"),
        (lambda: knn_graph(X, 1, batch_size=2), ValueError, "batch_size must be 1 where batch is None, got 2"),
        (lambda: knn_graph(X, 1, BATCH, batch_size=0), ValueError, "batch_size must be at least 1, got 0"),
        (
            lambda: knn_graph(X, 1, BATCH, flow="up"),
            ValueError,
            "flow must be source_to_target or target_to_source, got 'u",
        ),
        (
            lambda: radius_graph(X, 1, flow=None),
            ValueError,
            "flow must be source_to_target or target_to_source, got None",
        ),
        (lambda: knn(X, X.double(), 1), TypeError, "x and y must have one dtype, got torch.float32 and torch.float64"),
        (lambda: knn(X, X.to("meta"), 1), ValueError, "x and y must be on one device, got cpu and meta"),
        (
            lambda: fps(X, BATCH.to("meta")),
            ValueError,
            "batch must be on the device of x, cpu, got meta",
        ),
        (lambda: knn(X, X[:, :2], 1), ValueError, "x and y must agree in D, got 3 and 2"),
        (lambda: knn(X, X, 1, BATCH), ValueError, "batch_y must be given where there are several clouds, got None"),
        (lambda: radius(X, X, "1"), TypeError, "r must be a float, got str"),
        (lambda: radius(X, X, 0.0), ValueError, "r must be greater than 0, got 0.0"),
        (lambda: radius(X, X, 1.0, max_num_neighbors=0), ValueError, "max_num_neighbors must be at least 1, got 0"),
        (lambda: fps(X, ratio=1.5), ValueError, "ratio must be between 0 and 1, got 1.5"),
        (lambda: fps(X, ratio=torch.nan), ValueError, "ratio must be between 0 and 1, got nan"),
        (lambda: fps(X, ratio="half"), TypeError, "ratio must be a float or a tensor, got str"),
        (lambda: fps(X, ratio=torch.tensor(1j)), TypeError, "ratio must be a float or a tensor, got torch.complex64"),
        (lambda: fps(X, ptr=4), TypeError, "ptr must be a tensor or a list of integers, got int"),
        (
            lambda: fps(X, BATCH, torch.ones(3)),
            ValueError,
            r"ratio must hold one number, or one for each of 2 clouds, got \[3\]",
        ),
        (lambda: fps(X, ptr=[0, 3]), ValueError, r"ptr must ascend from 0 to 4, the number of points, got \[0, 3\]"),
        (lambda: fps(X, ptr=[0, 3, 2, 4]), ValueError, "ptr must ascend from 0 to 4"),
        (lambda: fps(X, ptr=[]), ValueError, "ptr must ascend from 0 to 4"),
        (
            lambda: fps(X, ptr=torch.zeros(2)),
            ValueError,
            r"ptr must be one row of integers, got torch.float32 of shape \(2,\)",
        ),
    ],
)
def test_errors(run, error, message):
    with pytest.raises(error, match=message):
        run()
