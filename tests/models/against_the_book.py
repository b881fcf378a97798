"""What every network on clouds must do: agree with its by-the-book form, forwards, backwards and in its statistics."""

import torch

from .test_ognet import clouds


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
