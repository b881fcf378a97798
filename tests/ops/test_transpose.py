import pytest
import torch

from reid3d.ops import TransposedGraph, transpose_graph, transpose_graph_reference


def graph(rng, b=2, n=30, m=11, k=5, device="cpu"):
    return torch.tensor(rng.integers(0, n, (b, m, k)), device=device)


def by_hand(idx: torch.Tensor, n: int) -> list[list[list[int]]]:
    """[b][point] -> the edges that end there."""
    return [[[e for e, j in enumerate(cloud) if j == point] for point in range(n)] for cloud in idx.flatten(1).tolist()]


@pytest.mark.parametrize(("b", "n", "m", "k"), [(2, 30, 11, 5), (3, 1, 4, 7), (1, 200, 3, 1), (2, 70, 90, 33)])
def test_by_hand(b, n, m, k, device, rng):
    idx = graph(rng, b, n, m, k, device)
    offsets, edges = transpose_graph(idx, n)
    assert offsets.dtype == edges.dtype == torch.int32
    assert offsets.shape == (b, n + 1) and edges.shape == (b, m * k)
    for cloud, (starts, ends) in zip(by_hand(idx, n), zip(offsets.tolist(), edges.tolist(), strict=True), strict=True):
        assert starts[0] == 0 and starts[-1] == m * k
        assert [ends[starts[j] : starts[j + 1]] for j in range(n)] == cloud


@pytest.mark.parametrize("used", [1, 3, 4096])
def test_equals_the_reference(used, device, rng):
    # points that no edge reaches, and points that all edges reach
    idx = graph(rng, 3, used, 700, 20, device)
    for result, expected in zip(transpose_graph(idx, 4096), transpose_graph_reference(idx, 4096), strict=True):
        assert torch.equal(result, expected)


def test_transposed_twice_is_the_graph(device, rng):
    idx = graph(rng, n=40, m=17, k=6, device=device)
    offsets, edges = transpose_graph(idx, 40)
    points = torch.repeat_interleave(torch.arange(40, device=device).repeat(2), offsets.diff(dim=1).flatten().long())
    back = torch.empty_like(idx).flatten(1).scatter_(1, edges.long(), points.view(2, -1))
    assert torch.equal(back.view_as(idx), idx)


@pytest.mark.parametrize(("b", "n", "m"), [(0, 5, 3), (2, 5, 0), (2, 0, 0), (0, 0, 3)])
def test_empty(b, n, m, device):
    offsets, edges = transpose_graph(torch.zeros(b, m, 4, device=device, dtype=torch.int64), n)
    assert offsets.shape == (b, n + 1) and edges.shape == (b, 4 * m) and not offsets.any()


def test_non_contiguous(device, rng):
    idx = graph(rng, device=device)[:, ::2, 1:]
    for result, expected in zip(transpose_graph(idx, 30), transpose_graph(idx.contiguous(), 30), strict=True):
        assert torch.equal(result, expected)


def test_opcheck(device, rng):
    torch.library.opcheck(torch.ops.reid3d.transpose_graph.default, (graph(rng, device=device), 30))


def test_compiles_into_one_graph(device, rng):
    compiled = torch.compile(transpose_graph, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (20, 33):
        idx = graph(rng, n=n, device=device)
        result = compiled(idx, n)
        assert isinstance(result, TransposedGraph) and torch.equal(result.edges, transpose_graph(idx, n).edges)


IDX = torch.zeros(2, 4, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("idx", "n", "error", "message"),
    [
        (None, 5, TypeError, "idx must be an int64 tensor, got NoneType"),
        (IDX.int(), 5, TypeError, "idx must be an int64 tensor, got torch.int32"),
        (IDX[0], 5, ValueError, r"idx must have shape \(B, M, K\) with 1 <= K <= 32767, got \(4, 3\)"),
        (IDX[..., :0], 5, ValueError, r"idx must have shape \(B, M, K\) with 1 <= K <= 32767, got \(2, 4, 0\)"),
        (IDX.new_zeros(1).expand(1, 2**27, 16), 5, ValueError, "idx must have at most 2147483647 edges a cloud"),
        (IDX, 0, ValueError, "n must be at least 1, got 0"),
        (IDX[:, :0], -1, ValueError, "n must be at least 0, got -1"),
        (IDX, 5.0, TypeError, "n must be an int, got float"),
    ],
)
def test_errors(idx, n, error, message):
    with pytest.raises(error, match=message):
        transpose_graph(idx, n)


@pytest.mark.parametrize("wrong", [-1, 5, 2**32, -(2**63)])
def test_an_index_out_of_range_is_an_error_on_the_cpu(wrong):
    with pytest.raises(RuntimeError, match="idx must be between 0 and 4"):
        transpose_graph(IDX.clone().index_fill_(2, torch.tensor([1]), wrong), 5)
