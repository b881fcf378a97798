"""What by-the-book forms of networks on clouds are made of, in plain torch, and what a network must do: agree with its
own, forwards, backwards and in its statistics.
"""

import torch
import torch.nn.functional as F


def clouds(batch, points, seed=0, dtype=torch.float64):
    """Points in a box of a person's proportions, so that balls of 0.1 to 0.4 m are empty, part-filled and full."""
    rng = torch.Generator().manual_seed(seed)
    xyz = (torch.rand(batch, points, 3, generator=rng, dtype=dtype) - 0.5) * torch.tensor([0.6, 1.4, 0.3], dtype=dtype)
    rgb = torch.rand(batch, points, 3, generator=rng, dtype=dtype) - 0.5
    xyz[:, 5:9] *= 0.02  # where the published sampler picks nothing
    return xyz, rgb


def awkward(model):
    """Weights where nothing is trivial: running statistics moved, negative scales, mixes off 1/2."""
    rng = torch.Generator().manual_seed(1)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=rng, dtype=tensor.dtype) * 0.3
            with torch.no_grad():
                if name.endswith("running_var"):
                    tensor.copy_(noise.exp())
                elif "norm" in name and name.endswith("weight"):
                    tensor.copy_(torch.where(noise < -0.2, -1.0, 1.0) + noise * 0.1)
                else:
                    tensor.add_(noise * (1.0 if tensor.dim() < 2 else 0.1))
    return model


def fps(xyz, m, hole=-1.0):
    """Farthest points of each cloud, index 0 first, ties to the lower index, none with a squared norm of at most hole
    but the first.
    """
    chosen = []
    for cloud in xyz:
        order = [0]
        nearest = ((cloud - cloud[0]) ** 2).sum(1)
        nearest[(cloud**2).sum(1) <= hole] = -1
        for _ in range(m - 1):
            nearest[order[-1]] = -1
            order.append(int(nearest.argmax()))
            nearest = torch.minimum(nearest, ((cloud - cloud[order[-1]]) ** 2).sum(1))
        chosen.append(order)
    return torch.tensor(chosen)


def ball(centers, xyz, radius, k):
    """First k points in index order with d^2 < r^2, padded with the first."""
    idx = torch.zeros(*centers.shape[:2], k, dtype=torch.int64)
    for b, cloud in enumerate(xyz):
        for m, center in enumerate(centers[b]):
            hits = torch.nonzero(((cloud - center) ** 2).sum(1) < radius**2)[:k, 0]
            idx[b, m] = hits[0]
            idx[b, m, : len(hits)] = hits
    return idx


def knn(query, points, k):
    return torch.cdist(query, points).argsort(dim=2, stable=True)[:, :, :k]


def gather(h, idx):
    """h (B, N, C), idx (B, M, K) -> (B, C, M, K)."""
    return torch.stack([cloud[i] for cloud, i in zip(h, idx, strict=True)]).permute(0, 3, 1, 2)


def conv(x, linear):
    return F.conv2d(x, linear.weight[:, :, None, None], linear.bias)


def batch_norm(x, norm, running):
    """BatchNorm on copies of the running statistics, which are left in ``running``."""
    running[norm] = (norm.running_mean.clone(), norm.running_var.clone())
    return F.batch_norm(x, *running[norm], norm.weight, norm.bias, norm.training, norm.momentum, norm.eps)


@torch.no_grad()
def check_eval(model, book):
    """``book(model, xyz, rgb)`` gives the descriptor, and the new (mean, var) of each BatchNorm."""
    model.eval()
    xyz, rgb = clouds(3, 70)
    feats = model(xyz, rgb)
    expected, _ = book(model, xyz, rgb)
    torch.testing.assert_close(feats, expected, rtol=1e-9, atol=1e-9)
    for b in range(3):
        torch.testing.assert_close(model(xyz[b : b + 1], rgb[b : b + 1]), feats[b : b + 1], rtol=1e-9, atol=1e-9)
    assert model(xyz[:0], rgb[:0]).shape == (0, 512)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        torch.testing.assert_close(model(xyz, rgb), feats, rtol=1e-9, atol=1e-9)
    finally:
        torch.set_num_threads(threads)


def check_training(model, book, without_gradient):
    """``without_gradient``: endings of the names of biases in front of a BatchNorm, which takes them away."""
    model.train()
    xyz, rgb = clouds(3, 70)
    rgb.requires_grad_()
    weight = torch.randn(3, 512, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    expected, running = book(model, xyz, rgb)
    leaves = {"rgb": rgb, **dict(model.named_parameters())}
    gradients = torch.autograd.grad((expected * weight).sum(), leaves.values())

    feats = model(xyz, rgb).feats
    torch.testing.assert_close(feats, expected, rtol=1e-9, atol=1e-9)
    ours = torch.autograd.grad((feats * weight).sum(), leaves.values())
    for name, a, b in zip(leaves, ours, gradients, strict=True):
        scale = float(b.abs().max())
        assert (scale < 1e-9) == name.endswith(without_gradient), name
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9 * max(scale, 1.0), msg=lambda m, n=name: f"{n}: {m}")
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm1d)]
    assert running.keys() == set(norms)
    for norm, (mean, var) in running.items():
        torch.testing.assert_close(norm.running_mean, mean, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(norm.running_var, var, rtol=1e-10, atol=1e-10)
        assert int(norm.num_batches_tracked) == 1


@torch.no_grad()
def check_float32(model, book):
    """The folded statistics do not cancel, even where features barely vary about a large mean."""
    model.float().train()
    xyz, rgb = clouds(4, 70)
    xyz, rgb = xyz.float(), (0.4 + rgb * 0.02).float()
    ours = model(xyz, rgb).feats
    exact, _ = book(model.double(), xyz.double(), rgb.double())
    assert float((ours - exact).abs().max()) < 2e-3 * float(exact.abs().max())


@torch.no_grad()
def check_initialisation(model, is_fan_out):
    """Kaiming normal by fan-in or fan-out, norms N(1, 0.02), classifier N(0, 1e-6), biases 0."""
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert (p == 0).all(), name
            continue
        if p.dim() == 1:
            mean, std = 1.0, 0.02
        elif "classifier" in name:
            mean, std = 0.0, 1e-6
        else:
            mean, std = 0.0, (2 / p.shape[0 if is_fan_out(name) else 1]) ** 0.5
        n = p.numel()
        assert abs(float(p.mean()) - mean) < 5 * std / n**0.5, name
        assert abs(float(p.std()) / std - 1) < 5 / (2 * n) ** 0.5, name


def check_every_parameter_gets_a_gradient(model, without_gradient):
    output = model.train()(*clouds(4, 80, dtype=torch.float32))
    torch.nn.functional.cross_entropy(output.logits + output.feats[:, :5], torch.arange(4)).backward()
    for name, p in model.named_parameters():
        largest = float(p.grad.abs().max())
        assert largest < 1e-4 if name.endswith(without_gradient) else largest > 0, name
