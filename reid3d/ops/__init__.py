"""Point-cloud ops on (B,N,D) tensors, a z-buffer, matches of feature maps, and places in ranked lists: one contract,
from the compiled kernels the same on every device.

Each op is one file: contract, wrapper, plain-torch reference, schema, fake kernel, gradient. The compiled kernels in
reid3d/_C.so (CPU) and reid3d/_C_cuda.so replace the references on their device; REID3D_NO_EXTENSION=1 in the
environment leaves them out. The references round float32 distances almost always as the kernels do
(`knn.squared_distances`). `reid3d.ops.pyg` has the same on the flat batches of PyG.

The CPU kernels are compiled for AVX-512, for AVX2 and for any machine, and the processor decides which run;
REID3D_ISA=avx512, avx2 or portable in the environment sets the most they may use. All give the same bits,
but for `gated_pool` and `match_maps`, which round as the processor does.
"""

import os
from pathlib import Path

import torch

from . import pyg
from .ball_query import ball_query, ball_query_reference
from .edge_pool import EdgePool, edge_pool, edge_pool_reference
from .fps import farthest_point_sample, farthest_point_sample_reference
from .gated_pool import Gate, GatedPool, gated_pool, gated_pool_reference
from .group_max import group_max, group_max_reference
from .knn import KNN, knn, knn_reference
from .match_maps import match_maps, match_maps_reference
from .match_places import match_places, match_places_reference
from .morton import morton_order, morton_order_reference
from .rasterize import Fragments, rasterize, rasterize_reference
from .transpose import TransposedGraph, transpose_graph, transpose_graph_reference

__all__ = [
    "EdgePool",
    "Gate",
    "GatedPool",
    "Fragments",
    "KNN",
    "TransposedGraph",
    "backend",
    "ball_query",
    "ball_query_reference",
    "edge_pool",
    "edge_pool_reference",
    "farthest_point_sample",
    "farthest_point_sample_reference",
    "gated_pool",
    "gated_pool_reference",
    "group_max",
    "group_max_reference",
    "knn",
    "knn_reference",
    "match_maps",
    "match_maps_reference",
    "match_places",
    "match_places_reference",
    "morton_order",
    "morton_order_reference",
    "pyg",
    "rasterize",
    "rasterize_reference",
    "transpose_graph",
    "transpose_graph_reference",
]


def _load() -> dict[str, Path]:
    """Loads what was compiled: {"cpp": path, "cuda": path}, without those that are not there or of no use."""
    if os.environ.get("REID3D_NO_EXTENSION") == "1":
        return {}
    isa = os.environ.get("REID3D_ISA", "")
    if isa not in ("", "avx512", "avx2", "portable"):
        raise ImportError(f"REID3D_ISA must be avx512, avx2 or portable, got {isa}")
    package = Path(__file__).parents[1]
    found = {"cpp": package / "_C.so"}
    if torch.version.cuda is not None:
        found["cuda"] = package / "_C_cuda.so"
    found = {kind: path for kind, path in found.items() if path.is_file()}
    for path in found.values():
        try:
            torch.ops.load_library(path)
        except OSError as error:
            raise ImportError(
                f"{path} cannot be loaded by torch {torch.__version__} ({error}): build it again with "
                "pip install --no-build-isolation, or set REID3D_NO_EXTENSION=1 to do without"
            ) from error
    return found


_loaded = _load()


def backend() -> str:
    """Which kernels are in use: "cpp" compiled for the CPU, "cpp+cuda" for both, "torch" the references alone."""
    return "+".join(_loaded) or "torch"
