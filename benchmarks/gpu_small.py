"""Every op once on each path of its CUDA kernels, on clouds small enough for compute-sanitizer."""

import torch

from reid3d import ops

assert "cuda" in ops.backend(), ops.backend()


def rows(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.rand(*shape, device="cuda", dtype=dtype).requires_grad_()


for n in (1, 33, 257):
    for dtype in (torch.float32, torch.float64):
        xyz = rows(2, n, 3, dtype=dtype)
        order = ops.morton_order(xyz.detach())
        for hint in (None, order):
            ops.knn(xyz, xyz, min(n, 20), order=hint).dist2.sum().backward()
            ops.farthest_point_sample(xyz.detach(), n, order=hint)
        ops.knn(wide := rows(2, n, 37, dtype=dtype), wide, min(n, 20)).dist2.sum().backward()
        idx = ops.ball_query(xyz.detach(), xyz.detach(), 0.2, 16)
    transposed = ops.transpose_graph(idx, n)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        for channels in (1, 32, 67):
            for hint in (None, transposed):
                ops.group_max(rows(2, n, channels, dtype=dtype), idx, transposed=hint).sum().backward()
                pooled = ops.edge_pool(rows(2, n, channels, dtype=dtype), idx, transposed=hint)
                sum(part.double().sum() for part in pooled).backward()
for n in (1500, 4000, 5000, 9000):  # what is sampled in slabs, in more registers and in memory, and how it is ordered
    xyz = torch.rand(2, n, 3, device="cuda")
    ops.farthest_point_sample(xyz, 12)
    near = ops.knn(xyz[:, :40].contiguous(), xyz, 20)  # queries of their own
    ops.transpose_graph(near.idx, n)
xyz = torch.rand(2, 300, 3, device="cuda")
for k in (32, 33, 64, 65, 128, 129, 257):  # lists of neighbours of every length, in registers and in memory
    for cloud in (xyz, xyz.double(), xyz.expand(2, 300, 3).repeat(1, 1, 7)):
        ops.knn(cloud, cloud, k)
ops.group_max(rows(2, 300, 8), torch.randint(300, (2, 5, 300), device="cuda")).sum().backward()  # slots beyond uint8
ops.knn(torch.zeros(1, 300, 3, device="cuda"), torch.zeros(1, 300, 3, device="cuda"), 20)  # nothing but ties
for faces in (0, 1, 500):
    corners = torch.randint(300, (faces, 3), device="cuda")
    ops.rasterize(torch.rand(2, 300, 3, device="cuda") * 40 - 4, corners, 33, 17)
torch.cuda.synchronize()
