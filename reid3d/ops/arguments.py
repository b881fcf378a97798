"""What every op demands of its arguments, and the words in which it says so."""

import operator

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_GROUP = 32767  # of group_max and edge_pool, whose widest slots are int16
MAX_EDGES = 2**31 - 1  # of a cloud: those of a transposed graph are int32


def check_points(name: str, x: Tensor, dims: int | None = None) -> Tensor:
    """x as float32 or float64 coordinates (B,N,D): float16 and bfloat16 are widened."""
    check_rows(name, x, dims)
    return x if x.dtype == torch.float64 else x.float()


def check_rows(name: str, x: Tensor, dims: int | None = None) -> None:
    """x is (B,N,D), one of FLOATS; `dims` fixes D."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {x.dtype}")
    if x.dtype not in FLOATS:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if x.dim() != 3 or (dims is not None and x.shape[2] != dims):
        raise ValueError(f"{name} must have shape (B, N, {dims or 'D'}), got {tuple(x.shape)}")


def check_not_empty(name: str, x: Tensor) -> None:
    """x, (B,N,D), has points to choose from."""
    if x.shape[1] == 0:
        raise ValueError(f"{name} must hold at least one point, got {tuple(x.shape)}")


def check_same_cloud_batch(name: str, x: Tensor, other: str, y: Tensor) -> None:
    """Two (B,·,D) tensors that can be compared with each other."""
    if x.dtype != y.dtype:
        raise TypeError(f"{name} and {other} must have one dtype, got {x.dtype} and {y.dtype}")
    if x.device != y.device:
        raise ValueError(f"{name} and {other} must be on one device, got {x.device} and {y.device}")
    if x.shape[0] != y.shape[0] or x.shape[2] != y.shape[2]:
        raise ValueError(f"{name} and {other} must agree in B and D, got {tuple(x.shape)} and {tuple(y.shape)}")


def check_idx(idx: Tensor, feats: Tensor | None = None, name: str = "feats") -> None:
    """idx (B,M,K) int64 picks groups of 1 <= K <= MAX_GROUP rows, M * K <= MAX_EDGES, of feats (B,N,C) where given."""
    if not isinstance(idx, Tensor) or idx.dtype != torch.int64:
        raise TypeError(f"idx must be an int64 tensor, got {getattr(idx, 'dtype', type(idx).__name__)}")
    if feats is not None and idx.device != feats.device:
        raise ValueError(f"idx must be on the device of {name}, {feats.device}, got {idx.device}")
    fits = idx.dim() == 3 and (feats is None or idx.shape[0] == feats.shape[0])
    if not fits or not 1 <= idx.shape[2] <= MAX_GROUP:
        batch = "B" if feats is None else feats.shape[0]
        raise ValueError(f"idx must have shape ({batch}, M, K) with 1 <= K <= {MAX_GROUP}, got {tuple(idx.shape)}")
    if idx.shape[1] * idx.shape[2] > MAX_EDGES:
        raise ValueError(f"idx must have at most {MAX_EDGES} edges a cloud, got {tuple(idx.shape)}")
    if feats is not None and idx.numel() > 0:
        check_not_empty(name, feats)


def check_range(idx: Tensor, n: int) -> None:
    """Every value of idx is in [0, n): for the references, as the kernels do it themselves. Does not wait for CUDA."""
    torch._assert_async(((idx >= 0) & (idx < n)).all(), f"idx must be between 0 and {n - 1}")


def check_int(name: str, value: int, low: int, high: int | None = None, what: str = "") -> int:
    """An int of any kind, NumPy's too, low <= value <= high, where `what` says in words what high is."""
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got bool")
    if not isinstance(value, (int, torch.SymInt)):
        try:
            value = operator.index(value)
        except TypeError:
            raise TypeError(f"{name} must be an int, got {type(value).__name__}") from None
    if high is None and value >= 2**63:
        raise ValueError(f"{name} must be an int of 64 bits, got {value}")
    if value < low or (high is not None and value > high):
        limit = f"at least {low}" if high is None else f"between {low} and {high}, {what}"
        raise ValueError(f"{name} must be {limit}, got {value}")
    return value
