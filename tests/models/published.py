"""OG-Net as a tree of convolutions under the published names, and its forward pass in plain torch, for eval alone."""

import torch
import torch.nn.functional as F
from torch import nn

from .against_the_book import ball, fps, gather, knn

DIMS = {
    "ognet": (64, 128, 256, 512),
    "ognet_small": (48, 96, 192, 384),
    "ognet_deep": (48, 96, 96, 192, 192, 384, 384),
}
HOLE = 1e-3  # no sampled point but the first is this near to the origin, squared
BALLS = ((0.1, 8), (0.2, 16), (0.4, 32))


class Mix(nn.Module):
    def __init__(self):
        super().__init__()
        self.p = nn.Parameter(torch.zeros(1))


class Gate(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.se_reduce = nn.Conv2d(channels, max(1, channels // 24), 1)
        self.se_expand = nn.Conv2d(max(1, channels // 24), channels, 1)

    def forward(self, x):
        y = self.se_reduce(x)
        return x * self.se_expand(y * y.sigmoid()).sigmoid()


class Scales(nn.Module):
    def __init__(self, channels):
        super().__init__()
        half = channels // 2
        self.mlps = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels + 3, half, 1, bias=False),
                nn.BatchNorm2d(half),
                Gate(half),
                nn.Conv2d(half, channels, 1, bias=False),
                nn.BatchNorm2d(channels),
                nn.ReLU(),
            )
            for _ in BALLS
        )


class Published(nn.Module):
    """The network of that name, with random weights and statistics; ``circle``: trained with a metric loss too."""

    def __init__(self, name, num_classes, circle=False):
        super().__init__()
        self.dims = DIMS[name]
        self.convs = 2 if name == "ognet_deep" else 1
        self.conv, self.agg, self.bn, self.sa = (nn.ModuleList() for _ in range(4))
        if name == "ognet_deep":
            self.conv_s2 = nn.ModuleList()
            self.p_w = nn.Parameter(torch.zeros(len(self.dims)))
        for c_in, c_out in zip((3, *self.dims), self.dims, strict=False):
            for j in range(self.convs):
                self.conv.append(nn.Conv2d(2 * (c_out if j else c_in), c_out, 1))
                self.agg.append(Mix())
                self.bn.append(nn.BatchNorm2d(c_out))
            if c_in != c_out:
                self.sa.append(Scales(c_out))
                if hasattr(self, "p_w"):
                    self.conv_s2.append(nn.Sequential(nn.Linear(c_in, c_out), nn.LeakyReLU(0.2)))
        self.embs = nn.ModuleList([nn.Linear(2 * self.dims[-1], 512, bias=False)])
        self.bn_embs = nn.ModuleList([nn.BatchNorm1d(512)])
        self.proj_output = nn.Linear(512, num_classes)
        if circle:
            self.logit_scale = nn.Parameter(torch.ones(()))
        rng = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for key, tensor in self.state_dict().items():
                noise = torch.randn(tensor.shape, generator=rng)
                if key.endswith("num_batches_tracked"):
                    tensor.fill_(1234)
                elif key.endswith("running_var"):
                    tensor.copy_((0.3 * noise).exp())
                elif tensor.dim() > 1:
                    tensor.copy_(noise * (2 / tensor.shape[1]) ** 0.5)
                elif key.endswith("weight"):
                    tensor.copy_(1 - 2 * (noise > 1) + 0.1 * noise)
                else:
                    tensor.copy_(0.3 * noise)

    def forward(self, xyz, rgb, k, points):
        """The descriptor; ``points`` are left by the first sampling, and half of them by each later one."""
        h, conv, sa = rgb, 0, 0
        for i, c_out in enumerate(self.dims):
            h_in = h
            for _ in range(self.convs):
                last = i + 1 == len(self.dims)
                idx = knn(space := torch.cat((xyz, h), 2) if last else xyz, space, k)
                center = gather(h, torch.arange(h.shape[1]).view(1, -1, 1).expand(idx.shape))
                y = self.bn[conv](self.conv[conv](torch.cat((gather(h, idx) - center, center), 1)))
                share = self.agg[conv].p.sigmoid()
                h = F.leaky_relu(share * y.max(-1).values + (1 - share) * y.mean(-1), 0.2).transpose(1, 2)
                conv += 1
            sampling = i == 0 or c_out != self.dims[i - 1]
            if sampling:
                sample = fps(xyz, points, HOLE)
                centers, h_in = (torch.stack([c[j] for c, j in zip(x, sample, strict=True)]) for x in (xyz, h_in))
                total = 0
                for mlp, (radius, size) in zip(self.sa[sa].mlps, BALLS, strict=True):
                    idx = ball(centers, xyz, radius, size)
                    relative = gather(xyz, idx) - centers.permute(0, 2, 1)[..., None]
                    total = total + mlp(torch.cat((relative, gather(h, idx)), 1)).max(-1).values
                xyz, h = centers, total.transpose(1, 2)
                points //= 2
            if hasattr(self, "p_w"):
                share = self.p_w[i].sigmoid()
                h = share * (self.conv_s2[sa](h_in) if sampling else h_in) + (1 - share) * h
            sa += sampling
        return self.bn_embs[0](self.embs[0](torch.cat((h.max(1).values, h.mean(1)), 1)))
