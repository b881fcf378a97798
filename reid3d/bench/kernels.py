"""What `reid3d bench kernels` measures: each op on clouds of OG-Net's sizes, and `match_maps` on QAConv's, ours, plain
torch and other libraries.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from .timing import Case


class Sizes(NamedTuple):
    """What is measured: OG-Net's clouds, the points that its stages keep, its graph and its balls."""

    points: int = 4096
    stages: tuple[int, ...] = (768, 384, 192)
    k: int = 20
    balls: tuple[tuple[float, int], ...] = ((0.1, 8), (0.2, 16), (0.4, 32))  # metres, points
    channels: int = 64
    wide: tuple[int, ...] = (768, 96)  # points in the feature space of its last stages
    width: int = 515
    crops: tuple[tuple[int, int], ...] = ((128, 64), (256, 128))  # pixels
    maps: tuple[int, int, int, int] = (16, 32, 128, 192)  # query and gallery maps of QAConv, channels, positions


SIZES = Sizes()


def meshes(batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The embedded body as people of different shapes and poses: vertices (B,V,3) metres, y up, and faces (F,3)."""
    from ..preprocess.body import axis_angle_to_matrix, load_body

    body = load_body()
    pose = axis_angle_to_matrix(0.2 * torch.randn(batch, 24, 3, generator=generator))
    with torch.no_grad():
        return body(pose, torch.randn(batch, 10, generator=generator)).verts, body.faces


def bodies(batch: int, points: int, seed: int = 0) -> Tensor:
    """Points on the surface of the embedded body, evenly by area: people of different shapes and poses, metres."""
    generator = torch.Generator().manual_seed(seed)
    verts, faces = meshes(batch, generator)
    corners = verts[:, faces]  # (B,F,3,3)
    edges = corners[:, :, 1:] - corners[:, :, :1]
    area = torch.linalg.cross(edges[:, :, 0], edges[:, :, 1]).norm(dim=2)
    face = area.multinomial(points, replacement=True, generator=generator)
    share = torch.rand(batch, points, 3, generator=generator).log_()  # normalised, even on a triangle
    share /= share.sum(2, keepdim=True)
    return (corners[torch.arange(batch)[:, None], face] * share[..., None]).sum(2)


def features(xyz: Tensor, channels: int, seed: int = 1) -> Tensor:
    """Features (B,N,channels) as a network gives them: near points have similar ones."""
    generator = torch.Generator().manual_seed(seed)
    first = 3 * torch.randn(3, channels, generator=generator)
    second = torch.randn(channels, channels, generator=generator) / channels**0.5
    return ((xyz.cpu() @ first).tanh() @ second).to(xyz.device)


def _rows(idx: Tensor, n: int) -> Tensor:
    """Indices (B,M,K) into clouds of n points as indices (B*M,K) into all of them."""
    return (idx + n * torch.arange(idx.shape[0], device=idx.device).view(-1, 1, 1)).flatten(0, 1)


def _select(idx: Tensor, n: int) -> Callable[[Tensor], Tensor]:
    """Neighbours (B,M,K,C) in plain torch, the fastest way."""
    rows = _rows(idx, n).flatten()
    return lambda x: x.flatten(0, 1).index_select(0, rows).view(*idx.shape, -1)


def _bag(idx: Tensor, n: int) -> Callable[[Tensor, str], Tensor]:
    """Neighbours pooled to (B,M,C) by embedding_bag, the one way of plain torch that never stores all of them."""
    rows = _rows(idx, n)
    return lambda x, mode: F.embedding_bag(rows, x.flatten(0, 1), mode=mode).view(*idx.shape[:2], -1)


def _distances(query: Tensor, points: Tensor) -> Tensor:
    """Distances squared in float64, by differences."""
    pairs = zip(query.double(), points.double(), strict=True)
    return torch.stack([torch.cdist(q, p, compute_mode="donot_use_mm_for_euclid_dist").square_() for q, p in pairs])


def _recall(dist2: Tensor, k: int) -> Callable[[Tensor], float]:
    """The share of neighbours that are among the k nearest, equally near ones included."""
    near = dist2 <= dist2.kthvalue(k, dim=2, keepdim=True).values * (1 + 1e-12)

    def agrees(idx: Tensor) -> float:
        idx = idx.to(near.device).sort(2).values
        fresh = F.pad(idx.diff(dim=2) != 0, (1, 0), value=True)
        return float((near.gather(2, idx) & fresh).double().sum() / near[..., 0].numel() / k)

    return agrees


def _sequence(xyz: Tensor, m: int) -> Callable[[Tensor], float]:
    """The share of a farthest point sample that float64 picks in the same place, begun at the same point."""

    def agrees(picked: Tensor) -> float:
        picked = picked.to(xyz.device)
        clouds = zip(xyz.double(), picked, strict=True)
        same = [ops.farthest_point_sample_reference(cloud[None], m, int(row[0]))[0] == row for cloud, row in clouds]
        return float(torch.stack(same).double().mean())

    return agrees


def _equal(expected: Tensor, per_row: bool = False) -> Callable[[Tensor], float]:
    """The share of numbers, or of rows, that are the same."""

    def agrees(found: Tensor) -> float:
        same = found.to(expected.device) == expected
        return float((same.all(-1) if per_row else same).double().mean())

    return agrees


def _close(*expected: Tensor) -> Callable[[tuple[Tensor, ...]], float]:
    """The share of numbers within 1e-5 of the greatest."""

    def agrees(found: tuple[Tensor, ...]) -> float:
        near = [
            ((a.double() - b).abs() <= 1e-5 * b.abs().max()).flatten() for a, b in zip(found, expected, strict=True)
        ]
        return float(torch.cat(near).double().mean())

    return agrees


def cases(device: torch.device, peers: dict[str, Any], threads: int) -> Iterator[Case]:
    """All cases, one at a time, so that only one holds its data."""
    s = SIZES
    for batch in (4, 36) if device.type == "cuda" else (4,):
        cloud = bodies(batch, s.points).to(device)
        kept = ops.farthest_point_sample(cloud, s.stages[0])
        stage = cloud.take_along_dim(kept[..., None], 1)  # its beginning is what a later stage keeps
        for n in (s.points, *s.stages):
            yield knn_case(cloud if n == s.points else stage[:, :n].contiguous(), s.k, "body", peers, threads)
        for n in s.wide:
            part = stage[:, :n]
            yield knn_case(torch.cat([part, features(part, s.width - 3)], 2), s.k, "features", peers, threads)
        yield fps_case(cloud, s.stages[0], "body", peers)
        for radius, k in s.balls:
            yield ball_case(stage, cloud, radius, k, peers, threads)
        wide = features(cloud, s.channels)
        ball = ops.ball_query(stage, cloud, *s.balls[-1])
        graph = ops.knn(cloud, cloud, s.k).idx
        for backward in (False, True):
            yield group_max_case(wide, ball, backward, peers)
        for backward in (False, True):
            yield edge_pool_case(wide, graph, backward)
        yield edge_conv_case(wide, graph)
        yield morton_case(cloud)
        for height, width in s.crops:
            yield rasterize_case(batch, height, width, device)
        generator = torch.Generator().manual_seed(2)
        cloud = torch.rand(batch, s.points, 3, generator=generator).to(device)
        yield knn_case(cloud, s.k, "uniform", peers, threads)
        yield fps_case(cloud, s.stages[0], "uniform", peers)
    for backward in (False, True):
        yield match_maps_case(*s.maps, backward, device)


def knn_case(x: Tensor, k: int, kind: str, peers: dict[str, Any], threads: int) -> Case:
    B, N, D = x.shape
    right = _recall(_distances(x, x), k)
    case = Case("knn", f"{kind} {B} x {N} x {D}, k = {k}")
    case.add("reid3d.ops.knn", lambda: ops.knn(x, x, k), lambda out: right(out.idx), kind="ours")
    if D == 3:
        order = ops.morton_order(x)
        name = "the same, order given"
        case.add(name, lambda: ops.knn(x, x, k, order=order), lambda out: right(out.idx), kind="ours")

    def baddbmm() -> Tensor:
        norm = x.square().sum(2)
        return torch.baddbmm(norm[:, None, :], x, x.transpose(1, 2), alpha=-2).add_(norm[:, :, None])

    direct = "donot_use_mm_for_euclid_dist"
    case.add("cdist + topk", lambda: torch.cdist(x, x).topk(k, largest=False).indices, right)
    case.add(
        "cdist by differences + topk", lambda: torch.cdist(x, x, compute_mode=direct).topk(k, largest=False)[1], right
    )
    case.add("baddbmm + topk", lambda: baddbmm().topk(k, largest=False).indices, right)
    if cluster := peers.get("torch-cluster"):
        flat, of = x.flatten(0, 1), torch.arange(B, device=x.device).repeat_interleave(N)
        begin = N * torch.arange(B, device=x.device).view(-1, 1, 1)
        case.add(
            "torch_cluster.knn_graph",
            lambda: cluster.knn_graph(flat, k, of, loop=True),
            lambda edges: right(edges[0].view(B, N, k) - begin),
            kind="peer",
        )
    if p3d := peers.get("pytorch3d"):
        case.add("pytorch3d knn_points", lambda: p3d.knn_points(x, x, K=k), lambda out: right(out.idx), kind="peer")
    if keops := peers.get("pykeops"):
        i, j = keops.LazyTensor(x[:, :, None, :]), keops.LazyTensor(x[:, None, :, :])
        case.add("pykeops argKmin", lambda: ((i - j) ** 2).sum(-1).argKmin(k, dim=2), right, kind="peer")
    if (scipy := peers.get("scipy")) and x.device.type == "cpu":
        clouds = [cloud.numpy() for cloud in x]
        case.add(
            "scipy cKDTree",
            lambda: [scipy.cKDTree(cloud).query(cloud, k, workers=threads)[1] for cloud in clouds],
            lambda idx: right(torch.stack([torch.as_tensor(rows) for rows in idx])),
            kind="peer",
        )
    return case


def fps_case(xyz: Tensor, m: int, kind: str, peers: dict[str, Any]) -> Case:
    B, N, _ = xyz.shape
    right = _sequence(xyz, m)
    case = Case("fps", f"{kind} {B} x {N} to {m}")
    case.add("reid3d.ops.farthest_point_sample", lambda: ops.farthest_point_sample(xyz, m), right, kind="ours")
    order = ops.morton_order(xyz)
    case.add("the same, order given", lambda: ops.farthest_point_sample(xyz, m, order=order), right, kind="ours")

    def loop() -> Tensor:
        picked = torch.zeros(B, m, dtype=torch.int64, device=xyz.device)
        nearest, current = xyz.new_full((B, N), torch.inf), picked[:, 0]
        each = torch.arange(B, device=xyz.device)
        for step in range(1, m):
            nearest = torch.minimum(nearest, (xyz - xyz[each, current].unsqueeze(1)).square().sum(2))
            current = nearest.argmax(1)
            picked[:, step] = current
        return picked

    case.add("a loop in plain torch", loop, right)
    if cluster := peers.get("torch-cluster"):
        flat, of = xyz.flatten(0, 1), torch.arange(B, device=xyz.device).repeat_interleave(N)
        begin = N * torch.arange(B, device=xyz.device).view(-1, 1)
        case.add(
            "torch_cluster.fps",
            lambda: cluster.fps(flat, of, ratio=m / N, random_start=False),
            lambda idx: right(idx.view(B, m) - begin),
            kind="peer",
        )
    if p3d := peers.get("pytorch3d"):
        name = "pytorch3d sample_farthest_points"
        case.add(name, lambda: p3d.sample_farthest_points(xyz, K=m), lambda out: right(out[1]), kind="peer")
    if (fpsample := peers.get("fpsample")) and xyz.device.type == "cpu":
        clouds = [cloud.numpy() for cloud in xyz]

        def buckets(height: int) -> list[Any]:
            return [fpsample.bucket_fps_kdline_sampling(cloud, m, height, start_idx=0) for cloud in clouds]

        for height in (3, 5, 7):
            case.add(
                f"fpsample bucket, h = {height}",
                partial(buckets, height),
                lambda idx: right(torch.stack([torch.as_tensor(row.astype("int64")) for row in idx])),
                kind="peer",
                note="from a start of its own",
            )
    return case


def ball_case(centers: Tensor, points: Tensor, radius: float, k: int, peers: dict[str, Any], threads: int) -> Case:
    (B, M, _), N = centers.shape, points.shape[1]
    inside = _distances(centers, points) < float(torch.tensor(radius).double().square())
    first = torch.where(inside, torch.arange(N, device=points.device), N).topk(min(k, N), largest=False).values
    expected = torch.where(first == N, first[..., :1], first)
    right = _equal(expected, per_row=True)
    most = inside.sum(2).clamp(max=k).flatten()

    def in_reach(edges: Tensor) -> float:
        """The share of centres with as many points as there should be, whichever those in reach are."""
        y, x = edges.unique(dim=1)
        found = y[inside.flatten(0, 1)[y, x % N] & (x // N == y // M)]
        return float(
            ((found.bincount(minlength=B * M) == most) & (y.bincount(minlength=B * M) == most)).double().mean()
        )

    def first_of(lists: list[Any]) -> float:
        rows = [sorted(hits)[:k] for cloud in lists for hits in cloud]
        return right(torch.tensor([row + row[:1] * (k - len(row)) for row in rows]).view(B, M, k))

    case = Case("ball_query", f"body {B} x {M} in {N}, {radius} m, k = {k}")
    case.add("reid3d.ops.ball_query", lambda: ops.ball_query(centers, points, radius, k), right, kind="ours")

    def candidates() -> Tensor:
        order = torch.arange(N, device=points.device)
        return torch.where(torch.cdist(centers, points) < radius, order, N)

    def filled(idx: Tensor) -> Tensor:
        return torch.where(idx == N, idx[..., :1], idx)

    case.add("cdist + sort", lambda: filled(candidates().sort(2).values[..., :k]), right)
    case.add("cdist + topk", lambda: filled(candidates().topk(k, largest=False).values), right)
    if p3d := peers.get("pytorch3d"):
        case.add(
            "pytorch3d ball_query",
            lambda: p3d.ball_query(centers, points, K=k, radius=radius, return_nn=False),
            lambda out: right(torch.where(out.idx < 0, out.idx[..., :1], out.idx)),
            kind="peer",
        )
    if cluster := peers.get("torch-cluster"):
        x, y = points.flatten(0, 1), centers.flatten(0, 1)
        in_x, in_y = (torch.arange(B, device=points.device).repeat_interleave(n) for n in (N, M))
        any_k = "any k of those in reach" if points.device.type == "cpu" else ""
        case.add(
            "torch_cluster.radius",
            lambda: cluster.radius(x, y, radius, in_x, in_y, k),
            in_reach,
            kind="peer",
            note=any_k,
        )
    if (scipy := peers.get("scipy")) and points.device.type == "cpu":
        clouds = [(near.numpy(), cloud.numpy()) for near, cloud in zip(centers, points, strict=True)]
        case.add(
            "scipy cKDTree",
            lambda: [scipy.cKDTree(cloud).query_ball_point(near, radius, workers=threads) for near, cloud in clouds],
            first_of,
            kind="peer",
            note="all in reach, as lists",
        )
    return case


def _both(x: Tensor, forward: Callable[[Tensor], Tensor], grad: Tensor) -> Callable[[], Tensor]:
    """Forward and backward in one call: the gradient of x."""

    def call() -> Tensor:
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(forward(leaf), leaf, grad)[0]

    return call


def group_max_case(x: Tensor, idx: Tensor, backward: bool, peers: dict[str, Any]) -> Case:
    B, M, K = idx.shape
    N, C = x.shape[1:]
    each = torch.arange(B, device=x.device).view(-1, 1, 1)
    select, bag, wide = _select(idx, N), _bag(idx, N), idx.view(B, M * K, 1).expand(-1, -1, C)
    grad = torch.rand(B, M, C, generator=torch.Generator().manual_seed(3)).to(x.device)
    ways: list[tuple[str, str, Callable[[Tensor], Tensor]]] = [
        ("ours", "reid3d.ops.group_max", lambda x: ops.group_max(x, idx)),
        ("torch", "x[b, idx].amax", lambda x: x[each, idx].amax(2)),
        ("torch", "x[b, idx].max", lambda x: x[each, idx].max(2).values),
        ("torch", "gather + max", lambda x: x.gather(1, wide).view(B, M, K, C).max(2).values),
        ("torch", "index_select + amax", lambda x: select(x).amax(2)),
        ("torch", "index_select + max", lambda x: select(x).max(2).values),
        ("torch", "embedding_bag", lambda x: bag(x, "max")),
    ]
    if backward:
        transposed = ops.transpose_graph(idx, N)
        ways.insert(
            1, ("ours", "the same, graph transposed before", lambda x: ops.group_max(x, idx, transposed=transposed))
        )
    if p3d := peers.get("pytorch3d"):
        ways.append(("peer", "pytorch3d knn_gather + max", lambda x: p3d.knn_gather(x, idx).max(2).values))
    if backward:  # to the winner alone, where amax divides it among equal ones
        wins = x.double()[each, idx].max(2).indices
        exact = torch.zeros_like(x, dtype=torch.float64).scatter_add_(1, idx.gather(2, wins), grad.double())
        right = _close(exact)
    else:
        right = _close(x.double()[each, idx].amax(2))
    case = Case("group_max" + " + gradient" * backward, f"{B} x {M} x {K} of {N}, C = {C}")
    for kind, name, way in ways:
        call = _both(x, way, grad) if backward else partial(way, x)
        case.add(name, call, lambda out: right((out,)), kind=kind)
    return case


def _pools(e: Tensor) -> tuple[Tensor, ...]:
    """What `edge_pool` gives, of neighbours (B,M,K,C); without a gradient the fastest way of plain torch."""
    return e.amax(2), e.amin(2), e.sum(2), e.square().sum(2)


def edge_pool_case(x: Tensor, idx: Tensor, backward: bool) -> Case:
    B, M, K = idx.shape
    N, C = x.shape[1:]
    select, bag = _select(idx, N), _bag(idx, N)
    generator = torch.Generator().manual_seed(3)
    grads = [torch.rand(B, M, C, generator=generator).to(x.device) for _ in range(4)]

    def reductions(e: Tensor) -> tuple[Tensor, ...]:
        return e.max(2).values, e.min(2).values, e.sum(2), e.square().sum(2)

    def bags(x: Tensor) -> tuple[Tensor, ...]:
        return bag(x, "max"), -bag(-x, "max"), bag(x, "sum"), bag(x.square(), "sum")

    def both(x: Tensor, way: Callable[[Tensor], Any], grads: list[Tensor]) -> tuple[Tensor, ...]:
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(tuple(way(leaf)), leaf, grads)

    ways: list[tuple[str, str, Callable[[Tensor], Any]]] = [
        ("ours", "reid3d.ops.edge_pool", lambda x: ops.edge_pool(x, idx)),
        ("torch", "index_select, max, min, sums", lambda x: reductions(select(x))),
        ("torch", "index_select, amax, amin, sums", lambda x: _pools(select(x))),
        ("torch", "four times embedding_bag", bags),
    ]
    exact = reductions(select(x.double()))
    if backward:
        transposed = ops.transpose_graph(idx, N)
        ways.insert(
            1, ("ours", "the same, graph transposed before", lambda x: ops.edge_pool(x, idx, transposed=transposed))
        )
        exact = both(x.double(), lambda x: reductions(select(x)), [grad.double() for grad in grads])
    right = _close(*exact)
    case = Case("edge_pool" + " + gradient" * backward, f"{B} x {M} x {K} of {N}, C = {C}")
    for kind, name, way in ways:
        call = partial(both, x, way, grads) if backward else partial(way, x)
        case.add(name, call, right, kind=kind)
    return case


def edge_conv_case(x: Tensor, idx: Tensor) -> Case:
    """Linear on [x_i, x_j - x_i] of every edge, batch norm in training mode, LeakyReLU, maximum; no gradient."""
    B, N, K = idx.shape
    C = x.shape[2]
    generator = torch.Generator().manual_seed(4)
    weight = (torch.randn(C, 2 * C, generator=generator) / (2 * C) ** 0.5).to(x.device)
    gamma, beta = (torch.randn(C, generator=generator).to(x.device) for _ in range(2))
    select = _select(idx, N)
    w_self, w_difference = weight.chunk(2, 1)

    @torch.no_grad()
    def pooled(pool: Callable[[Tensor], Sequence[Tensor]]) -> Tensor:
        own, other = F.linear(x, w_self - w_difference), F.linear(x, w_difference)
        most, least, total, squares = pool(other)
        mean = (own * K + total).mean((0, 1)) / K
        power = (K * own.square() + 2 * own * total + squares).mean((0, 1)) / K
        scale = gamma * torch.rsqrt(power - mean.square() + 1e-5)
        largest = own + torch.where(gamma < 0, least, most)
        return F.leaky_relu(largest * scale + (beta - mean * scale), 0.2)

    @torch.no_grad()
    def per_edge(x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        near = select(x)
        own = x.unsqueeze(2).expand_as(near)
        e = F.linear(torch.cat([own, near - own], 3), weight).flatten(0, 2)
        return F.leaky_relu(F.batch_norm(e, None, None, gamma, beta, training=True), 0.2).view(B, N, K, C).amax(2)

    @torch.no_grad()
    def channels_first() -> Tensor:
        near = select(x)
        own = x.unsqueeze(2).expand_as(near)
        e = F.conv2d(torch.cat([own, near - own], 3).permute(0, 3, 1, 2), weight[:, :, None, None])
        return F.leaky_relu(F.batch_norm(e, None, None, gamma, beta, training=True), 0.2).amax(3)

    right = _close(per_edge(x.double(), weight.double(), gamma.double(), beta.double()))
    case = Case("EdgeConv", f"{B} x {N}, k = {K}, {C} to {C}, forward")
    way = partial(pooled, lambda x: ops.edge_pool(x, idx))
    case.add("two linear + reid3d.ops.edge_pool", way, lambda out: right((out,)), kind="ours")
    way = partial(pooled, lambda x: _pools(select(x)))
    case.add("two linear, amax, amin, sums", way, lambda out: right((out,)))
    case.add("per edge, linear", lambda: per_edge(x, weight, gamma, beta), lambda out: right((out,)))
    case.add("per edge, conv2d", channels_first, lambda out: right((out.transpose(1, 2),)))
    return case


def morton_case(xyz: Tensor) -> Case:
    B, N, _ = xyz.shape
    case = Case("morton_order", f"body {B} x {N}")
    right = _equal(ops.morton_order_reference(xyz))
    case.add("reid3d.ops.morton_order", lambda: ops.morton_order(xyz), right, kind="ours")
    case.add("plain torch", lambda: ops.morton_order_reference(xyz), right)
    return case


def rasterize_case(batch: int, height: int, width: int, device: torch.device) -> Case:
    verts, faces = meshes(batch, torch.Generator().manual_seed(0))
    faces = faces.to(device)
    low, high = verts.amin(1, keepdim=True), verts.amax(1, keepdim=True)
    scale = 0.92 * height / (high - low)[..., 1:2]
    xy = (verts - (low + high) / 2)[..., :2] * torch.tensor([1.0, -1]) * scale + torch.tensor([width / 2, height / 2])
    points = torch.cat([xy, -verts[..., 2:]], 2).to(device)
    case = Case("rasterize", f"body {batch} x {faces.shape[0]} faces to {height} x {width}")
    right = _equal(ops.rasterize_reference(points, faces, height, width)[1])
    ours = partial(ops.rasterize, points, faces, height, width)
    case.add("reid3d.ops.rasterize", ours, lambda out: right(out.face), kind="ours")
    plain = partial(ops.rasterize_reference, points, faces, height, width)
    case.add("plain torch", plain, lambda out: right(out[1]))
    return case


def match_maps_case(Q: int, G: int, C: int, L: int, backward: bool, device: torch.device) -> Case:
    """All pairs, with the gradient of the query maps, as in training against a memory of classes; of whole numbers,
    which float32 multiplies and adds exactly, so that the winners are everybody's.
    """
    generator = torch.Generator().manual_seed(5)
    query, gallery = (torch.randint(-99, 100, (n, C, L), generator=generator).float().to(device) for n in (Q, G))
    grad = torch.rand(Q, G, 2, L, generator=generator).to(device)

    def einsum(query: Tensor, gallery: Tensor, pool: Callable[[Tensor, int], Tensor]) -> Tensor:
        sim = torch.einsum("qci,gcj->qgij", query, gallery)
        return torch.stack([pool(sim, 3), pool(sim, 2)], 2)

    def blocks(query: Tensor, pool: Callable[[Tensor, int], Tensor]) -> Tensor:
        """8 x 8 pairs at a time, whose similarities stay in the cache of a CPU."""
        return torch.cat([torch.cat([einsum(q, g, pool) for g in gallery.split(8)], 1) for q in query.split(8)])

    def first(sim: Tensor, dim: int) -> Tensor:
        return sim.max(dim).values

    ways: list[tuple[str, str, Callable[[Tensor], Tensor]]] = [
        ("ours", "reid3d.ops.match_maps", lambda query: ops.match_maps(query, gallery)),
        ("torch", "einsum as published", lambda query: einsum(query, gallery, first)),
        ("torch", "einsum as published, 8 x 8 pairs", lambda query: blocks(query, first)),
        ("torch", "einsum + amax, 8 x 8 pairs", lambda query: blocks(query, torch.amax)),
    ]
    if backward:  # to the winner alone, where amax divides it among equal ones
        exact = _both(query.double(), lambda q: einsum(q, gallery.double(), first), grad.double())()
    else:
        exact = einsum(query.double(), gallery.double(), first)
    right = _close(exact)
    case = Case("match_maps" + " + gradient" * backward, f"{Q} x {G} maps of {C} x {L}")
    for kind, name, way in ways:
        call = _both(query, way, grad) if backward else partial(way, query)
        case.add(name, call, lambda out: right((out,)), kind=kind)
    return case
