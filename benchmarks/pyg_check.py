"""Compares reid3d.ops.pyg with torch_cluster, where it is installed: python benchmarks/pyg_check.py [cpu|cuda]

Random points have no ties, so the edges must be equal, in order; within a radius only as sets, for its CPU kernel keeps
no order. What differs on purpose is in the docstring of reid3d.ops.pyg and in its tests.
"""

import sys

import torch
import torch_cluster

from reid3d.ops import pyg

device = sys.argv[1] if len(sys.argv) > 1 else "cpu"
generator = torch.Generator().manual_seed(0)
compared = 0


def same(what: str, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    global compared
    assert torch.equal(ours, theirs), f"{what}: {tuple(ours.shape)} and {tuple(theirs.shape)} differ"
    compared += 1


def ordered(edges: torch.Tensor) -> torch.Tensor:
    """The edges by row, then by neighbour."""
    return edges[:, (edges[0] * (edges.max() + 1) + edges[1]).argsort()] if edges.numel() else edges


for trial in range(40):
    sizes = torch.randint(1, 60, (5,), generator=generator) if trial % 3 else torch.full((5,), 30)
    batch = torch.arange(5).repeat_interleave(sizes).to(device)
    other = torch.arange(5).repeat_interleave(torch.randint(1, 20, (5,), generator=generator)).to(device)
    for dims in (1, 2, 3, 7):
        x = torch.rand(len(batch), dims, generator=generator).to(device)
        y = torch.rand(len(other), dims, generator=generator).to(device)
        where = f"trial {trial}, {dims} dimensions"
        same(f"knn, {where}", pyg.knn(x, y, 7, batch, other), torch_cluster.knn(x, y, 7, batch, other))
        found = [ordered(library.radius(x, y, 0.3, batch, other, 1000)) for library in (pyg, torch_cluster)]
        same(f"radius, {where}", *found)
        for loop in (False, True):
            for flow in ("source_to_target", "target_to_source"):
                found = [library.knn_graph(x, 6, batch, loop, flow) for library in (pyg, torch_cluster)]
                same(f"knn_graph, {where}, {loop}, {flow}", *found)
                found = [library.radius_graph(x, 0.3, batch, loop, 1000, flow) for library in (pyg, torch_cluster)]
                same(f"radius_graph, {where}, {loop}, {flow}", *map(ordered, found))
        for ratio in (None, 0.3, 0.77, torch.tensor(0.5, device=device), torch.rand(5, generator=generator).to(device)):
            found = [library.fps(x, batch, ratio, random_start=False) for library in (pyg, torch_cluster)]
            same(f"fps, {where}, {ratio}", *found)
print(f"{compared} results of torch_cluster, the same from reid3d.ops.pyg")
