"""The ops, and steps of OG-Net, in a CUDA graph, on a stream of their own and on a device that is not made to wait."""

from contextlib import nullcontext

import torch
import torch.nn.functional as F

from reid3d import create_model, ops
from reid3d.bench.kernels import bodies

assert "cuda" in ops.backend(), ops.backend()
B, N, M, K, C = 4, 4096, 768, 20, 64


def everything(xyz: torch.Tensor, feats: torch.Tensor) -> list[torch.Tensor]:
    order = ops.morton_order(xyz)
    kept = ops.farthest_point_sample(xyz, M, order=order)
    near = ops.knn(xyz, xyz, K, order=order)
    ball = ops.ball_query(xyz.gather(1, kept[..., None].expand(-1, -1, 3)), xyz, 0.2, 16)
    wide = ops.knn(feats[:, :96], feats[:, :96], K)
    transposed = ops.transpose_graph(near.idx, N)
    leaf = feats.detach().requires_grad_()
    with torch.enable_grad():
        pooled = ops.edge_pool(leaf, near.idx, transposed=transposed)
        loss = ops.group_max(leaf, ball).sum() + pooled.max.sum() - pooled.min.sum() + pooled.sum.sum()
        (grad,) = torch.autograd.grad(loss, leaf)
    return [order, kept, near.dist2, near.idx, ball, wide.idx, *transposed, *(part.detach() for part in pooled), grad]


def same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    torch.cuda.synchronize()
    for n, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(a, b), f"output {n} differs"


clouds = [(torch.rand(B, N, 3, device="cuda"), torch.randn(B, N, C, device="cuda")) for _ in range(3)]
expected = [everything(*cloud) for cloud in clouds]
for cloud, outputs in zip(clouds, expected, strict=True):
    same(everything(*cloud), outputs)  # twice the same bits

torch.cuda.synchronize()
torch.cuda.set_sync_debug_mode("error")  # nothing may wait for the device
outputs = everything(*clouds[0])
torch.cuda.set_sync_debug_mode("default")
same(outputs, expected[0])

# On a stream of its own, work goes on after what is before it in that stream, and not before.
side = torch.cuda.Stream()
static = [tensor.clone() for tensor in clouds[0]]
torch.cuda.synchronize()
with torch.cuda.stream(side):
    for cloud, right in zip(clouds, expected, strict=True):
        torch.cuda._sleep(20_000_000)  # some 10 ms: a kernel in another stream would not wait
        for tensor, value in zip(static, cloud, strict=True):
            tensor.copy_(value)
        outputs = everything(*static)
        same(outputs, right)

# A graph, captured once and run on other clouds.
with torch.cuda.stream(side):
    everything(*static)  # warm up
side.synchronize()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph, stream=side):
    outputs = everything(*static)
for cloud, right in zip(clouds, expected, strict=True):
    for tensor, value in zip(static, cloud, strict=True):
        tensor.copy_(value)
    graph.replay()
    same(outputs, right)
print("streams, graphs: the same bits")


def train_step(model: torch.nn.Module, xyz: torch.Tensor, rgb: torch.Tensor, labels: torch.Tensor, half: bool) -> None:
    model.zero_grad(set_to_none=False)
    with torch.autocast("cuda", torch.bfloat16) if half else nullcontext():
        logits = model(xyz, rgb).logits
    F.cross_entropy(logits.float(), labels).backward()


xyz = bodies(36, N).cuda()
xyz -= xyz.mean(1, keepdim=True)
rgb, labels = torch.rand_like(xyz) - 0.5, torch.arange(36, device="cuda")
for half in (False, True):
    torch.manual_seed(0)
    model = create_model("ognet", 751, dropout=0.0).cuda().train()
    with torch.cuda.stream(side):
        for _ in range(3):
            train_step(model, xyz, rgb, labels, half)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    train_step(model, xyz, rgb, labels, half)
    torch.cuda.set_sync_debug_mode("default")
    eager = [parameter.grad.clone() for parameter in model.parameters()]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        train_step(model, xyz, rgb, labels, half)
    times = []
    for _ in range(10):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    for name, parameter, grad in zip(dict(model.named_parameters()), model.parameters(), eager, strict=True):
        error = float((parameter.grad - grad).norm() / grad.norm().clamp_min(1e-3))
        assert error < (0.1 if half else 1e-2), f"{name}: {error}"  # sums in another order, and neighbours that tie
    print(f"ognet, 36 x {N}, forward and backward as a graph, bfloat16 {half}: {sorted(times)[5]:.2f} ms")
