"""OG-Net by the book: every edge formed, Conv2d 1x1 + BatchNorm2d, loops for sampling and balls. Slow, and plain."""

import torch
import torch.nn.functional as F


def fps(xyz, m):
    """Farthest points of each cloud, index 0 first, ties to the lower index."""
    chosen = []
    for cloud in xyz:
        order = [0]
        nearest = ((cloud - cloud[0]) ** 2).sum(1)
        nearest[0] = -1
        for _ in range(m - 1):
            best = int(nearest.argmax())
            order.append(best)
            nearest = torch.minimum(nearest, ((cloud - cloud[best]) ** 2).sum(1))
            nearest[best] = -1
        chosen.append(order)
    return torch.tensor(chosen)


def ball(centers, xyz, radius, k):
    """First k points in index order with d^2 < r^2, padded with the first."""
    idx = torch.zeros(*centers.shape[:2], k, dtype=torch.int64)
    for b, cloud in enumerate(xyz):
        for m, center in enumerate(centers[b]):
            hits = [j for j, p in enumerate(cloud) if float(((p - center) ** 2).sum()) < radius**2][:k]
            idx[b, m] = torch.tensor(hits + [hits[0]] * (k - len(hits)))
    return idx


def knn(space, k):
    return torch.cdist(space, space).argsort(dim=2, stable=True)[:, :, :k]


def gather(h, idx):
    """h (B, N, C), idx (B, M, K) -> (B, C, M, K)."""
    return torch.stack([cloud[i] for cloud, i in zip(h, idx, strict=True)]).permute(0, 3, 1, 2)


def conv(x, linear):
    return F.conv2d(x, linear.weight[:, :, None, None], linear.bias)


def batch_norm(x, norm, running):
    """BatchNorm2d on copies of the running statistics, which are left in ``running``."""
    running[norm] = (norm.running_mean.clone(), norm.running_var.clone())
    return F.batch_norm(x, *running[norm], norm.weight, norm.bias, norm.training, norm.momentum, norm.eps)


def edge_conv(layer, h, idx, running):
    center = gather(h, torch.arange(h.shape[1]).view(1, -1, 1).expand(idx.shape))
    edges = torch.cat((gather(h, idx) - center, center), 1)
    y = batch_norm(conv(edges, layer.linear), layer.norm, running)
    share = layer.mix.sigmoid()
    return F.leaky_relu(share * y.max(-1).values + (1 - share) * y.mean(-1), 0.2).transpose(1, 2)


def branch(layer, centers, xyz, h, running):
    idx = ball(centers, xyz, layer.radius, layer.k)
    relative = gather(xyz, idx) - centers.permute(0, 2, 1)[..., None]
    y = conv(torch.cat((relative, gather(h, idx)), 1), layer.linear1)
    y = batch_norm(y, layer.norm1, running)
    squeezed = conv(y, layer.gate.reduce)
    y = y * conv(squeezed * squeezed.sigmoid(), layer.gate.expand).sigmoid()
    y = F.relu(batch_norm(conv(y, layer.linear2), layer.norm2, running))
    return y.max(-1).values.transpose(1, 2)


def forward(model, xyz, rgb):
    """The descriptor, and the new (mean, var) of each BatchNorm."""
    h, running = rgb, {}
    for number, stage in enumerate(model.stages):
        h_in = h
        for layer in stage.convs:
            last = number == len(model.stages) - 1
            space = torch.cat((xyz, h.detach()), 2) if last else xyz
            h = edge_conv(layer, h, knn(space, model.k), running)
        if stage.abstraction is not None:
            sample = fps(xyz, stage.points)
            centers = torch.stack([cloud[i] for cloud, i in zip(xyz, sample, strict=True)])
            h = sum(branch(layer, centers, xyz, h, running) for layer in stage.abstraction.branches)
            if stage.project is not None:
                h_in = torch.stack([cloud[i] for cloud, i in zip(h_in, sample, strict=True)])
                h_in = F.leaky_relu(stage.project(h_in), 0.2)
            xyz = centers
        if stage.skip is not None:
            share = stage.skip.sigmoid()
            h = share * h_in + (1 - share) * h
    pooled = model.head.linear(torch.cat((h.max(1).values, h.mean(1)), 1))
    return batch_norm(pooled, model.head.norm, running), running
