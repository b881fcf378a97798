"""Sampling and grouping by the book, in loops, and the twin of OG-Net that uses them."""

import torch

from reid3d.bench import published


def fps(xyz, m):
    """Farthest points of each cloud, index 0 first, ties to the lower index; none within the hole at the origin."""
    chosen = []
    for cloud in xyz:
        order = [0]
        nearest = ((cloud - cloud[0]) ** 2).sum(1)
        nearest[(cloud**2).sum(1) <= 1e-3] = -1
        nearest[0] = -1
        for _ in range(m - 1):
            best = int(nearest.argmax())
            order.append(best)
            nearest = torch.minimum(nearest, ((cloud - cloud[best]) ** 2).sum(1))
            nearest[best] = -1
        chosen.append(order)
    return torch.tensor(chosen)


def fps_everywhere(xyz, m):
    """The same without the hole: of a cloud far from the origin."""
    return fps(xyz + 1000, m)


def ball(centers, xyz, radius, k):
    """First k points in index order with d^2 < r^2, padded with the first."""
    idx = torch.zeros(*centers.shape[:2], k, dtype=torch.int64)
    for b, cloud in enumerate(xyz):
        for m, center in enumerate(centers[b]):
            hits = [j for j, p in enumerate(cloud) if float(((p - center) ** 2).sum()) < radius**2][:k]
            idx[b, m] = torch.tensor(hits + [hits[0]] * (k - len(hits)))
    return idx


def knn(query, points, k):
    return torch.cdist(query, points).argsort(dim=2, stable=True)[:, :, :k]


def forward(model, xyz, rgb):
    """The descriptor, and the new (mean, var) of each BatchNorm."""
    sample = fps if model.form.grouping == "ball" else fps_everywhere
    return published.forward(model, xyz, rgb, published.Search(sample, ball, knn))
