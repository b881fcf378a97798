"""Drop-ins for knn, knn_graph, radius, radius_graph and fps of torch_cluster and torch_geometric.nn.

A batch is flat there: the points (N,D) of all clouds one below the other, and a sorted vector (N,) with the number of
the cloud of every point. The clouds of one size are one call of the kernel, nothing is padded. Arguments, their order
and defaults, the order of edges and the strict `<` of a radius are theirs. Where the results differ:

* equal distances are ordered by index, on every device;
* no distance is too large: their CUDA kernels pass over squared distances above 1e10 (k-NN) and 5e4 (fps), and k > 100;
* fps repeats no index where points coincide, and its random start follows torch.manual_seed, alike on all devices;
* without loops a point has exactly min(k, n - 1) neighbours, also where more than k points coincide with it;
* of too many neighbours within a radius the first in index order stay, as theirs on CUDA, not arbitrary ones;
* a cloud may be empty, batches must be sorted, and dimensions, devices and values are checked.

torch_geometric's EdgeConv on the edges of knn_graph is its DynamicEdgeConv, which asks for a library of its own.

Floating-point points only; float16 and bfloat16 are read as float32. A NaN coordinate is farthest of all, and within no
radius. `num_workers` is taken and without effect (torch.set_num_threads has one). The sizes of the clouds are read on
the host, so on CUDA each call waits for the device, as theirs do.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from numbers import Real

import torch
import torch.nn.functional as F
from torch import Tensor

from .arguments import check_int
from .ball_query import ball_query_reference
from .fps import farthest_point_sample, farthest_point_sample_reference
from .knn import knn as exact_knn

__all__ = ["fps", "knn", "knn_graph", "radius", "radius_graph"]


def knn(
    x: Tensor,
    y: Tensor,
    k: int,
    batch_x: Tensor | None = None,
    batch_y: Tensor | None = None,
    cosine: bool = False,
    num_workers: int = 1,
    batch_size: int | None = None,
) -> Tensor:
    """For every point of y the k nearest points of x in the cloud of the same number.

    Args:
        x: (N,D) or (N,) floating point.
        y: (M,D) or (M,), same dtype and device.
        k: neighbours per point, >= 1; a cloud with fewer gives them all.
        batch_x, batch_y: (N,) and (M,) integers, sorted: the cloud of every point. None: one cloud.
        cosine: compare directions (1 - cosine of the angle), of float32 at least; a zero vector has none and is the
            farthest of all. Theirs has this on CUDA only.
        num_workers: no effect.
        batch_size: number of clouds, if there are more than the batches name.

    Returns:
        (2,E) int64: indices into y, ascending, above indices into x, by distance. Not differentiable.

    Raises:
        TypeError: an argument of the wrong kind. ValueError: a shape or value out of range.

    Source: torch_cluster 1.6.3, knn.py.
    """
    x, y = _points("x", x), _points("y", y)
    _check_same("x", x, "y", y)
    k = check_int("k", k, 1)
    sizes = _paired_sizes(x, y, batch_x, batch_y, batch_size)
    k = min(k, _most(sizes[0]))
    if cosine:
        x, y = _directions(x), _directions(y)
    return _edges(_nearest(x, y, k, *sizes), full=all(n >= k or m == 0 for n, m in zip(*sizes, strict=True)))


def knn_graph(
    x: Tensor,
    k: int,
    batch: Tensor | None = None,
    loop: bool = False,
    flow: str = "source_to_target",
    cosine: bool = False,
    num_workers: int = 1,
    batch_size: int | None = None,
) -> Tensor:
    """The graph of every point's k nearest neighbours in its cloud.

    Args:
        x: (N,D) or (N,) floating point.
        k: neighbours per point, >= 1; a cloud with fewer gives them all.
        batch: (N,) integers, sorted: the cloud of every point. None: one cloud.
        loop: whether a point may be its own neighbour. If so it is, except where k points of lower index coincide
            with it.
        flow: "source_to_target": the neighbours are row 0 of the result, the points they belong to row 1;
            "target_to_source": the other way round.
        cosine: compare directions, as in `knn`.
        num_workers: no effect.
        batch_size: number of clouds, if there are more than `batch` names.

    Returns:
        (2,E) int64 edges, those of a point one after the other, nearest first. Not differentiable.

    Raises:
        TypeError: an argument of the wrong kind. ValueError: a shape or value out of range.

    Source: torch_cluster 1.6.3, knn.py.
    """
    x = _points("x", x)
    k = check_int("k", k, 1)
    _check_flow(flow)
    sizes = _sizes("batch", batch, "x", x, batch_size)
    if cosine:
        x = _directions(x)
    searched = min(k, _most(sizes)) + (not loop)
    found = _nearest(x, x, searched, sizes, sizes)
    edges = _edges(found if loop else _without_self(found), full=all(n >= searched or n == 0 for n in sizes))
    return edges.flip(0) if flow == "source_to_target" else edges


def radius(
    x: Tensor,
    y: Tensor,
    r: float,
    batch_x: Tensor | None = None,
    batch_y: Tensor | None = None,
    max_num_neighbors: int = 32,
    num_workers: int = 1,
    batch_size: int | None = None,
    ignore_same_index: bool = False,
) -> Tensor:
    """For every point of y the points of x nearer than r in the cloud of the same number, the first ones of them.

    Args:
        x: (N,D) or (N,) floating point.
        y: (M,D) or (M,), same dtype and device.
        r: > 0, in the unit of the points; rounded to their dtype before it is squared.
        batch_x, batch_y: (N,) and (M,) integers, sorted: the cloud of every point. None: one cloud.
        max_num_neighbors: of the points in reach the first this many in index order, >= 1.
        num_workers: no effect.
        batch_size: number of clouds, if there are more than the batches name.
        ignore_same_index: leave out the point of x that has the index of the one of y.

    Returns:
        (2,E) int64: indices into y, ascending, above indices into x, ascending for each. Not differentiable.

    Raises:
        TypeError: an argument of the wrong kind. ValueError: a shape or value out of range.

    Source: torch_cluster 1.6.3, radius.py; ignore_same_index from its last, unreleased state.
    """
    x, y = _points("x", x), _points("y", y)
    _check_same("x", x, "y", y)
    if not isinstance(r, Real) or isinstance(r, bool):
        raise TypeError(f"r must be a float, got {type(r).__name__}")
    if not r > 0:
        raise ValueError(f"r must be greater than 0, got {r}")
    k = check_int("max_num_neighbors", max_num_neighbors, 1)
    sizes = _paired_sizes(x, y, batch_x, batch_y, batch_size)
    found = _within(x, y, float(r), min(k, _most(sizes[0])) + ignore_same_index, *sizes)
    return _edges(_without_self(found) if ignore_same_index else found, full=False)


def radius_graph(
    x: Tensor,
    r: float,
    batch: Tensor | None = None,
    loop: bool = False,
    max_num_neighbors: int = 32,
    flow: str = "source_to_target",
    num_workers: int = 1,
    batch_size: int | None = None,
) -> Tensor:
    """The graph of the points nearer to each other than r, in every cloud.

    Args:
        x: (N,D) or (N,) floating point.
        r, max_num_neighbors: as in `radius`; without loops a point does not count among its neighbours.
        batch, flow, num_workers, batch_size: as in `knn_graph`.
        loop: whether a point is its own neighbour.

    Returns:
        (2,E) int64 edges, those of a point one after the other, by index. Not differentiable.

    Raises:
        TypeError: an argument of the wrong kind. ValueError: a shape or value out of range.

    Source: torch_cluster 1.6.3, radius.py, whose limit without loops is one neighbour too many for some points.
    """
    _check_flow(flow)
    edges = radius(x, x, r, batch, batch, max_num_neighbors, num_workers, batch_size, ignore_same_index=not loop)
    return edges.flip(0) if flow == "source_to_target" else edges


def fps(
    x: Tensor,
    batch: Tensor | None = None,
    ratio: float | Tensor | None = None,
    random_start: bool = True,
    batch_size: int | None = None,
    ptr: Tensor | Sequence[int] | None = None,
) -> Tensor:
    """Farthest point sampling of a share of every cloud: ceil(ratio * n) of n points, computed in float32.

    Args:
        x: (N,...) floating point; all but the first dimension are coordinates. torch_cluster calls it src.
        batch: (N,) integers, sorted: the cloud of every point. None: one cloud.
        ratio: from 0 to 1; a tensor holds one for all clouds, or one for each. None: 0.5.
        random_start: begin at a point of every cloud drawn by torch's CPU generator, else at the first.
        batch_size: number of clouds, if there are more than `batch` names.
        ptr: instead of batch, where the clouds begin and end: [0, 2, 5] for batch [0, 0, 1, 1, 1].

    Returns:
        (E,) int64 indices into x, cloud after cloud, in the order of picking. Not differentiable.

    Raises:
        TypeError: an argument of the wrong kind. ValueError: a shape or value out of range.

    Source: torch_cluster 1.6.3, fps.py; the sampling as in `reid3d.ops.farthest_point_sample`.
    """
    x = _points("x", x, flatten=True)
    sizes = _sizes("batch", batch, "x", x, batch_size) if ptr is None else _sizes_of_ptr(ptr, x.shape[0])
    counts = _shares(ratio, sizes)
    clouds, begins = x.split(sizes), _begins(sizes)
    drawn = torch.rand(len(sizes) if random_start else 0, dtype=torch.float64)
    picked = [x.new_empty(0, dtype=torch.int64)] * (len(sizes) + 1)  # one more, to have something to concatenate
    for members, (n, m) in _groups(sizes, counts):
        if m == 0:
            continue
        stack = torch.stack([clouds[b] for b in members])
        if random_start:
            # The kernel has one start for all clouds: each moves its own to the front. The other points keep their
            # order, so that ties are decided as before.
            start = (drawn[members] * n).long().to(x.device).unsqueeze(1)
            order = torch.arange(n, device=x.device).repeat(len(members), 1)
            order -= (order <= start).long()
            order[:, :1] = start
            sample = order.gather(1, _sample(stack.take_along_dim(order.unsqueeze(2), 1), m))
        else:
            sample = _sample(stack, m)
        for b, row in zip(members, sample, strict=True):
            picked[b] = row + begins[b]
    return torch.cat(picked)


def _sample(clouds: Tensor, m: int) -> Tensor:
    """(B,m) indices, for any D."""
    D = clouds.shape[2]
    return farthest_point_sample_reference(clouds, m, 0) if D > 3 else farthest_point_sample(_padded(clouds), m)


def _padded(clouds: Tensor) -> Tensor:
    """Three coordinates for the kernels that need them: zeros change no distance."""
    return F.pad(clouds, (0, 3 - clouds.shape[2]))


def _points(name: str, x: Tensor, flatten: bool = False) -> Tensor:
    """x as coordinates (N,D) of float32 or float64, without a gradient."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {x.dtype}")
    if x.dim() == 0 or (x.dim() > 2 and not flatten):
        raise ValueError(f"{name} must have shape (N, D) or (N,), got {tuple(x.shape)}")
    x = x.detach() if x.dtype == torch.float64 else x.detach().float()
    return x.unsqueeze(1) if x.dim() == 1 else x.flatten(1)


def _check_same(name: str, x: Tensor, other: str, y: Tensor) -> None:
    if x.dtype != y.dtype:
        raise TypeError(f"{name} and {other} must have one dtype, got {x.dtype} and {y.dtype}")
    if x.device != y.device:
        raise ValueError(f"{name} and {other} must be on one device, got {x.device} and {y.device}")
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"{name} and {other} must agree in D, got {x.shape[1]} and {y.shape[1]}")


def _check_flow(flow: str) -> None:
    if flow not in ("source_to_target", "target_to_source"):
        raise ValueError(f"flow must be source_to_target or target_to_source, got {flow!r}")


def _sizes(name: str, batch: Tensor | None, of: str, x: Tensor, batch_size: int | None) -> list[int]:
    """Number of points of every cloud."""
    N = x.shape[0]
    clouds = None if batch_size is None else check_int("batch_size", batch_size, 1)
    if batch is None:
        if clouds is not None and clouds > 1:
            raise ValueError(f"batch_size must be 1 where {name} is None, got {clouds}")
        return [N]
    if not isinstance(batch, Tensor) or batch.is_floating_point() or batch.is_complex() or batch.dtype == torch.bool:
        raise TypeError(f"{name} must be an integer tensor, got {getattr(batch, 'dtype', type(batch).__name__)}")
    if batch.shape != (N,):
        raise ValueError(f"{name} must have shape ({N},) like the points of {of}, got {tuple(batch.shape)}")
    if batch.device != x.device:
        raise ValueError(f"{name} must be on the device of {of}, {x.device}, got {batch.device}")
    if N == 0:
        return [0] * (clouds or 0)
    batch = batch.long()  # of a small type not every number of a cloud might fit
    first, last, ordered = torch.stack([batch[0], batch[-1], (batch[1:] >= batch[:-1]).all()]).tolist()
    if not ordered:
        raise ValueError(f"{name} must be sorted")
    if first < 0 or (clouds is not None and last >= clouds):
        rule = "not be negative" if first < 0 else f"be below batch_size = {clouds}"
        raise ValueError(f"{name} must {rule}, got {first if first < 0 else last}")
    ends = torch.searchsorted(batch, torch.arange(clouds or last + 1, device=x.device), right=True)
    return _differences([0, *ends.tolist()])


def _paired_sizes(
    x: Tensor, y: Tensor, batch_x: Tensor | None, batch_y: Tensor | None, batch_size: int | None
) -> tuple[list[int], list[int]]:
    """Sizes of the clouds in x and y, as many of the one as of the other."""
    sizes_x = _sizes("batch_x", batch_x, "x", x, batch_size)
    sizes_y = _sizes("batch_y", batch_y, "y", y, batch_size)
    clouds = max(len(sizes_x), len(sizes_y))
    for name, batch in (("batch_x", batch_x), ("batch_y", batch_y)):
        if batch is None and clouds > 1:
            raise ValueError(f"{name} must be given where there are several clouds, got None")
    return sizes_x + [0] * (clouds - len(sizes_x)), sizes_y + [0] * (clouds - len(sizes_y))


def _sizes_of_ptr(ptr: Tensor | Sequence[int], n: int) -> list[int]:
    """Number of points of every cloud, from their boundaries."""
    if isinstance(ptr, Tensor) and (ptr.dim() != 1 or ptr.is_floating_point()):
        raise ValueError(f"ptr must be one row of integers, got {ptr.dtype} of shape {tuple(ptr.shape)}")
    if not isinstance(ptr, (Tensor, Sequence)):
        raise TypeError(f"ptr must be a tensor or a list of integers, got {type(ptr).__name__}")
    bounds = [check_int("ptr", bound, 0) for bound in (ptr.tolist() if isinstance(ptr, Tensor) else ptr)]
    if not bounds or bounds[0] != 0 or bounds[-1] != n or bounds != sorted(bounds):
        raise ValueError(f"ptr must ascend from 0 to {n}, the number of points, got {bounds}")
    return _differences(bounds)


def _differences(bounds: list[int]) -> list[int]:
    return [end - begin for begin, end in zip(bounds, bounds[1:], strict=False)]


def _most(sizes: list[int]) -> int:
    """Neighbours a point can have at most: no more room is made for them, however many are asked for."""
    return max(sizes, default=0) or 1


def _begins(sizes: list[int]) -> list[int]:
    """Index of the first point of every cloud."""
    return [0, *accumulate(sizes)][: len(sizes)]


def _groups(*keys: list[int]) -> Iterator[tuple[list[int], tuple[int, ...]]]:
    """The clouds that agree in all keys: their numbers, ascending, and what they agree in."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for cloud, key in enumerate(zip(*keys, strict=True)):
        groups.setdefault(key, []).append(cloud)
    for key, members in groups.items():
        yield members, key


def _nearest(x: Tensor, y: Tensor, k: int, sizes_x: list[int], sizes_y: list[int]) -> Tensor:
    """(M,k) indices into x, nearest first; -1 where the cloud has no more points."""

    def op(points: Tensor, queries: Tensor) -> Tensor:
        return exact_knn(queries, points, min(k, points.shape[1])).idx

    return _search(op, x, y, k, sizes_x, sizes_y)


def _within(x: Tensor, y: Tensor, r: float, k: int, sizes_x: list[int], sizes_y: list[int]) -> Tensor:
    """(M,k) indices into x, ascending; -1 where no more points are within r."""

    def op(points: Tensor, queries: Tensor) -> Tensor:
        most = min(k, points.shape[1])
        if points.shape[2] > 3:
            idx, count = ball_query_reference(queries, points, r, most)
        else:
            idx, count = torch.ops.reid3d.ball_query(_padded(queries), _padded(points), r, most)
        return idx.masked_fill(torch.arange(most, device=idx.device) >= count.unsqueeze(2), -1)

    return _search(op, x, y, k, sizes_x, sizes_y)


def _search(op, x: Tensor, y: Tensor, k: int, sizes_x: list[int], sizes_y: list[int]) -> Tensor:
    """(M,k) indices into x, or -1, from `op`, which gives (B,m,<=k) indices into the points of B clouds, or -1."""
    clouds, queries, begins = x.split(sizes_x), y.split(sizes_y), _begins(sizes_x)
    found = [x.new_empty((0, k), dtype=torch.int64)] * (len(sizes_y) + 1)
    for members, (n, m) in _groups(sizes_x, sizes_y):
        if n == 0 or m == 0:
            rows = x.new_full((len(members), m, k), -1, dtype=torch.int64)
        else:
            points = torch.stack([clouds[b] for b in members])
            # One tensor where it is the cloud's own graph, for which the search of neighbours has shorter ways.
            own = x is y and sizes_x == sizes_y
            idx = op(points, points if own else torch.stack([queries[b] for b in members]))
            begin = torch.tensor([begins[b] for b in members], device=x.device).view(-1, 1, 1)
            rows = F.pad(torch.where(idx < 0, idx, idx + begin), (0, k - idx.shape[2]), value=-1)
        for b, row in zip(members, rows, strict=True):
            found[b] = row
    return torch.cat(found)


def _without_self(found: Tensor) -> Tensor:
    """(M,k+1) neighbours -> (M,k): without the index of the row, or without the last if that is not among them."""
    gone = found == torch.arange(found.shape[0], device=found.device).unsqueeze(1)
    gone[:, -1] = True
    slots = torch.arange(found.shape[1] - 1, device=found.device)
    return found.gather(1, slots + (slots >= gone.int().argmax(1, keepdim=True)))


def _edges(found: Tensor, full: bool) -> Tensor:
    """(M,k) neighbours, -1 for none -> (2,E): rows above neighbours. `full`: there is no -1."""
    rows = torch.arange(found.shape[0], device=found.device).unsqueeze(1).expand_as(found)
    if full:
        return torch.stack([rows, found]).flatten(1)
    there = found >= 0
    return torch.stack([rows.masked_select(there), found.masked_select(there)])


def _directions(x: Tensor) -> Tensor:
    """Points on the unit sphere, where Euclidean distances order as angles do; NaN of a zero vector."""
    return x / torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float64).to(x.dtype)


def _shares(ratio: float | Tensor | None, sizes: list[int]) -> list[int]:
    """How many points of every cloud to pick."""
    if isinstance(ratio, Tensor) and not (ratio.is_complex() or ratio.dtype == torch.bool):
        if ratio.shape not in ((), (1,), (len(sizes),)):
            raise ValueError(
                f"ratio must hold one number, or one for each of {len(sizes)} clouds, got {list(ratio.shape)}"
            )
        share = ratio.detach().to("cpu", torch.float32)
    elif ratio is None or (isinstance(ratio, Real) and not isinstance(ratio, bool)):
        share = torch.tensor(0.5 if ratio is None else float(ratio))
    else:
        raise TypeError(f"ratio must be a float or a tensor, got {getattr(ratio, 'dtype', type(ratio).__name__)}")
    if not ((share >= 0) & (share <= 1)).all():
        raise ValueError(f"ratio must be between 0 and 1, got {share.tolist()}")
    return (torch.tensor(sizes, dtype=torch.float32) * share).ceil().long().tolist()
