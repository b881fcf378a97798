"""OG-Net against its by-the-book form, then its properties and errors."""

from functools import partial

import pytest
import torch

from reid3d.bench import published
from reid3d.models import create_model
from reid3d.models import ognet as module
from reid3d.models.head import Output
from reid3d.models.norm import FoldedNorm
from reid3d.models.ognet import OGNet, ognet, ognet_deep, ognet_small

from .against_the_book import awkward, ball, clouds, fps, knn

SMALL = {"init_points": 32, "k": 5, "dropout": 0.0}


KINDS = {
    "plain": {},
    "deep": {"dims": (8, 16, 16, 24), "convs": 2, "shortcut": True},
    "no SE": {"se": False},
    "graphs in space": {"nonlocal_graph": False},
    "max": {"mix": "max"},
    "mean": {"mix": "mean"},
    "no graph": {"k": 1},
    "no graph, deep": {"k": 1, "dims": (8, 16, 16, 24), "convs": 2, "shortcut": True},
    "flat": {"flat": True},
    "nearest": {"grouping": "nearest", "init_points": 64},
    "spread": {"grouping": "spread"},
    "paper": {"preset": "paper", "init_points": 128},
    "paper, max": {"preset": "paper", "init_points": 128, "mix": "max"},
    "paper, learned": {"preset": "paper", "init_points": 128, "mix": "learned"},
    "paper, deep": {"preset": "paper", "init_points": 128, "dims": (8, 16, 16, 24), "convs": 2, "shortcut": True},
}


def by_the_book(model, xyz, rgb):
    """The twin of the network, with loops for what it samples and groups."""
    hole = module.HOLE if model.form.grouping == "ball" else -1.0
    search = published.Search(partial(fps, hole=hole), ball, knn)
    return published.forward(model, xyz, rgb, search)


def build(kind):
    torch.manual_seed(0)
    kwargs = {"dims": (8, 16, 24), **SMALL, **KINDS[kind]}
    return awkward(OGNet(kwargs.pop("dims"), **kwargs).double())


def inputs_of(kind, batch):
    """Clouds as the network takes them, and as its twin does, which has no order of its own."""
    xyz, rgb = clouds(batch, 140 if "paper" in kind else 70)
    rgb.requires_grad_()
    if kind not in ("nearest", "spread") and "paper" not in kind:
        return (xyz, rgb), (xyz, rgb)
    rows = torch.cat((xyz, rgb.detach()), 2).tolist()
    order = torch.tensor([sorted(range(len(cloud)), key=cloud.__getitem__) for cloud in rows])
    if kind == "spread":
        order = order.gather(1, fps(xyz.gather(1, order.unsqueeze(2).expand_as(xyz)), xyz.shape[1]))
    return (xyz, rgb), tuple(x.gather(1, order.unsqueeze(2).expand_as(x)) for x in (xyz, rgb))


@pytest.mark.parametrize("kind", KINDS)
def test_eval_agrees_with_the_book(kind):
    model = build(kind).eval()
    ours, theirs = inputs_of(kind, 2)
    expected, _ = by_the_book(model, *theirs)
    torch.testing.assert_close(model(*ours), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_training_agrees_with_the_book(kind):
    model = build(kind).train()
    ours, theirs = inputs_of(kind, 3)
    weight = torch.randn(3, 512, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    expected, running = by_the_book(model, *theirs)
    leaves = {"rgb": ours[1], **dict(model.named_parameters())}
    gradients = torch.autograd.grad((expected * weight).sum(), leaves.values())

    feats = model(*ours).feats
    torch.testing.assert_close(feats, expected, rtol=1e-9, atol=1e-9)
    found = torch.autograd.grad((feats * weight).sum(), leaves.values())
    for name, a, b in zip(leaves, found, gradients, strict=True):
        scale = float(b.abs().max())
        assert scale > 0 or (model.form.paper and ".gate." in name), name  # whose one ReLU may be shut
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9 * max(scale, 1.0), msg=lambda m, n=name: f"{n}: {m}")
    assert len(running) == sum(isinstance(part, torch.nn.BatchNorm1d) for part in model.modules())
    for norm, (mean, var) in running.items():
        torch.testing.assert_close(norm.running_mean, mean, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(norm.running_var, var, rtol=1e-10, atol=1e-10)
        assert int(norm.num_batches_tracked) == 1


@pytest.mark.parametrize("name", ["ognet", "ognet_small", "ognet_deep"])
def test_the_published_networks_agree_with_the_book(name):
    """In their own sizes, with the compiled sampling and grouping."""
    torch.manual_seed(0)
    model = awkward(create_model(name, 3, dropout=0.0).double()).train()
    xyz, rgb = clouds(2, 1000)
    expected, _ = published.forward(model, xyz, rgb, published.AS_OURS)
    gradients = torch.autograd.grad(expected.square().sum(), [*model.stages.parameters()])
    feats = model(xyz, rgb).feats
    torch.testing.assert_close(feats, expected, rtol=1e-9, atol=1e-9)
    for a, b in zip(torch.autograd.grad(feats.square().sum(), [*model.stages.parameters()]), gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9 * max(float(b.abs().max()), 1.0))


@pytest.mark.parametrize(
    ("model", "body", "layers"), [(ognet, 1_951_738, 4), (ognet_small, 1_200_833, 4), (ognet_deep, 2_470_498, 7)]
)
def test_parameter_counts(model, body, layers):
    """As published, without and with the classifier of Market-1501's 751 people."""
    assert sum(p.numel() for p in model().parameters()) == body
    assert sum(p.numel() for p in model(751).parameters()) == body + 385_263
    assert len(model().stages) == layers


def test_points_of_the_published_stages():
    assert [stage.points for stage in ognet().stages] == [768, 384, 192, 96]
    assert [stage.points for stage in ognet_deep().stages] == [768, 384, None, 192, None, 96, None]
    assert [net().form.k for net in (ognet, ognet_small, ognet_deep)] == [20, 20, 9]
    assert ognet_deep(preset="paper").form.k == 20
    assert ognet().head.dropout.p == 0.7
    assert [b.gate.reduce.out_features for s in ognet().stages for b in s.abstraction.branches[:1]] == [1, 2, 5, 10]
    assert module.BALLS == ((0.1, 8), (0.2, 16), (0.4, 32))


def test_initialisation():
    torch.manual_seed(0)
    model = ognet_deep(751).requires_grad_(False)
    for name, p in model.named_parameters():
        if name.endswith(("bias", "mix", "skip")):
            assert (p == 0).all(), name
            continue
        if p.dim() == 1:  # normalisation
            mean, std = 1.0, 0.02
        elif "classifier" in name:
            mean, std = 0.0, 1e-6
        else:
            fan_out = name.endswith(("project.weight", "head.linear.weight"))
            mean, std = 0.0, (2 / p.shape[0 if fan_out else 1]) ** 0.5
        n = p.numel()
        assert abs(float(p.mean()) - mean) < 5 * std / n**0.5, name
        assert abs(float(p.std()) / std - 1) < 5 / (2 * n) ** 0.5, name


def float_model(**kwargs):
    torch.manual_seed(0)
    return awkward(OGNet((8, 16, 24), **{**SMALL, **kwargs}))


@torch.no_grad()
def test_float32_is_close_to_float64():
    """The refactored batch statistics do not cancel, even where features barely vary about a large mean."""
    model = float_model(num_classes=3).train()
    xyz, rgb = clouds(4, 70)
    rgb = 0.4 + rgb * 0.02
    ours = model(xyz.float(), rgb.float()).feats
    reference = awkward(OGNet((8, 16, 24), 3, **SMALL)).double()
    reference.load_state_dict(model.state_dict())
    exact, _ = by_the_book(reference.train(), xyz.float().double(), rgb.float().double())
    assert float((ours - exact).abs().max()) < 2e-3 * float(exact.abs().max())


def shuffled(xyz, rgb, seed):
    order = torch.randperm(xyz.shape[1], generator=torch.Generator().manual_seed(seed))
    return xyz[:, order], rgb[:, order]


@pytest.mark.parametrize(
    "kwargs", [{"grouping": "nearest", "init_points": 64}, {"preset": "paper", "init_points": 128}]
)
def test_the_order_of_points_does_not_matter_to_nearest_groups(kwargs):
    """Not even on a grid, where everything ties, and where points coincide."""
    model = float_model(**kwargs).eval()
    xyz, rgb = clouds(2, 200, dtype=torch.float32)
    xyz[:, :150] = (xyz[:, :150] * 8).round() / 8
    xyz[:, 190:], rgb[:, 190:] = xyz[:, 180:190], rgb[:, 180:190]
    for seed in range(3):
        torch.testing.assert_close(model(*shuffled(xyz, rgb, seed)), model(xyz, rgb), rtol=1e-5, atol=1e-5)


def test_the_order_of_points_matters_to_balls():
    """As published, and as the docstring says."""
    assert "order of a cloud's points matters" in " ".join(OGNet.__doc__.split())
    model = float_model().eval()
    xyz, rgb = clouds(2, 200, dtype=torch.float32)
    assert float((model(*shuffled(xyz, rgb, 0)) - model(xyz, rgb)).detach().abs().max()) > 1e-2


def test_flat_clouds_have_no_depth():
    model = float_model(flat=True).eval()
    xyz, rgb = clouds(2, 64, dtype=torch.float32)
    assert torch.equal(model(xyz * torch.tensor([1, 1, 7.0]), rgb), model(xyz, rgb))


def test_eval_is_deterministic_and_clouds_do_not_mix():
    model = float_model(dropout=0.7).eval()
    xyz, rgb = clouds(5, 64, dtype=torch.float32)
    feats = model(xyz, rgb)
    assert isinstance(feats, torch.Tensor) and feats.shape == (5, 512) and torch.isfinite(feats).all()
    assert torch.equal(feats, model(xyz, rgb))
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(model(xyz[order], rgb[order]), feats[order], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(xyz[:1], rgb[:1]), feats[:1], rtol=1e-4, atol=1e-4)
    assert model(xyz[:0], rgb[:0]).shape == (0, 512)


def test_a_shift_of_the_cloud_changes_nothing():
    """But for the hole at the origin."""
    model = float_model(grouping="nearest", init_points=64).double().eval()
    xyz, rgb = clouds(2, 64)
    torch.testing.assert_close(model(xyz + 3.0, rgb), model(xyz, rgb), rtol=1e-6, atol=1e-6)


def test_training_output():
    model = float_model(num_classes=7).train()
    output = model(*clouds(3, 64, dtype=torch.float32))
    assert isinstance(output, Output)
    assert output.feats.shape == (3, 512) and output.logits.shape == (3, 7)
    assert float_model().train()(*clouds(3, 64, dtype=torch.float32)).logits is None


def test_every_parameter_gets_a_gradient():
    torch.manual_seed(0)
    model = ognet_deep(5, init_points=72).train()
    output = model(*clouds(4, 80, dtype=torch.float32))
    torch.nn.functional.cross_entropy(output.logits + output.feats[:, :5], torch.arange(4)).backward()
    for name, p in model.named_parameters():
        if name.endswith("linear.bias"):  # in front of a BatchNorm, which takes any constant away
            assert p.grad.abs().max() < 1e-4, name
        else:
            assert p.grad.abs().max() > 0, name


def test_dropout_acts_on_the_logits_only():
    model = float_model(num_classes=4, dropout=0.7).train()
    xyz, rgb = clouds(3, 64, dtype=torch.float32)
    torch.manual_seed(0)
    first = model(xyz, rgb)
    second = model(xyz, rgb)
    assert torch.equal(first.feats, second.feats)
    assert not torch.equal(first.logits, second.logits)


def test_duplicate_points_and_as_many_as_sampled():
    model = float_model().eval()
    xyz, rgb = clouds(2, 32, dtype=torch.float32)
    xyz[:, 16:] = xyz[:, :16]
    assert torch.isfinite(model(xyz, rgb)).all()


@pytest.mark.parametrize("at", [0.0, 1.0])
@pytest.mark.parametrize(
    "kwargs", [{}, {"grouping": "nearest", "init_points": 64}, {"preset": "paper", "init_points": 128}]
)
def test_all_points_are_one(kwargs, at):
    """Within the hole at the origin, and outside."""
    model = float_model(num_classes=3, **kwargs)
    xyz, rgb = torch.full((4, 150, 3), at), torch.full((4, 150, 3), 0.1)
    output = model.train()(xyz, rgb)
    output.logits.sum().backward()
    assert torch.isfinite(output.feats).all()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    assert torch.isfinite(model.eval()(xyz, rgb)).all()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"k": 0}, "k=0"),
        ({"k": 25, "init_points": 32}, "which leaves 16"),
        ({"init_points": 3, "k": 1}, "init_points"),
        ({"grouping": "nearest"}, "init_points must leave at least 32 points for every stage, got 32, which leaves 16"),
        ({"preset": "paper", "init_points": 64}, "got 64, which leaves 16"),
        ({"preset": "paper", "grouping": "ball"}, "grouping must be nearest with preset=paper"),
        ({"convs": 0}, "convs must be at least 1, got 0"),
        ({"mix": "gem"}, "mix must be one of learned, max, mean, got 'gem'"),
        ({"grouping": "knn"}, "grouping must be one of ball, spread, nearest"),
        ({"preset": "mine"}, "preset must be one of official, paper"),
    ],
)
def test_impossible_sizes(kwargs, message):
    with pytest.raises(ValueError, match=message):
        OGNet((8, 16, 24), **{**SMALL, **kwargs})


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"k": 2.5}, "k must be an int"),
        ({"convs": True}, "convs must be an int"),
        ({"se": "no"}, "se must be true or false"),
    ],
)
def test_arguments_of_the_wrong_kind(kwargs, message):
    with pytest.raises(TypeError, match=message):
        OGNet((8, 16, 24), **{**SMALL, **kwargs})


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_one_colour_in_training(scale):
    """Features that hardly vary, in millimetres too: the variance rounds to below 0 where it cancels."""
    torch.manual_seed(0)
    model = ognet_small(4, init_points=96, k=9).train()
    xyz, rgb = clouds(4, 256, dtype=torch.float32)
    for step in range(3):
        output = model(scale * xyz, torch.full_like(rgb, 0.2 + 0.1 * step))
        assert torch.isfinite(output.feats).all()
    output.logits.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    for name, buffer in model.named_buffers():
        if name.endswith("running_var"):
            assert (buffer >= 0).all(), name


def test_a_variance_rounded_below_0_counts_as_0():
    norm = FoldedNorm(2)
    scale, _ = norm.fold(torch.zeros(2), torch.tensor([-1e-3, 1.0]), 10)
    torch.testing.assert_close(scale, torch.tensor([1e-5, 1 + 1e-5]) ** -0.5)
    assert norm.running_var[0] == pytest.approx(0.9)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("kind", "least"),  # the more convolutions and the fewer neighbours that are averaged, the more a rounding shows
    [("plain", 0.99), ("deep", 0.9), ("no graph", 0.99), ("nearest", 0.99), ("paper", 0.99), ("paper, max", 0.97)],
)
def test_autocast_is_close(kind, least, training):
    kwargs = {"dims": (8, 16, 24), **SMALL, "num_classes": 3, **KINDS[kind]}
    torch.manual_seed(0)
    model = awkward(OGNet(kwargs.pop("dims"), **kwargs)).train(training)
    xyz, rgb = clouds(16, 140, dtype=torch.float32)
    expected = model(xyz, rgb)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            found = model(xyz, rgb)
            feats, exact = (found.feats, expected.feats) if training else (found, expected)
            assert torch.isfinite(model(xyz.bfloat16(), rgb.bfloat16())[0]).all()
        assert feats.dtype == torch.float32
        assert torch.nn.functional.cosine_similarity(feats, exact).mean() > least
        if training:
            found.logits.float().logsumexp(1).sum().backward()


def test_statistics_are_exact_under_autocast():
    """Features that barely vary about a large mean: in bfloat16 the mean would swallow what varies."""
    layer = module.EdgeConv(3, 16, ognet().form).train()
    h = 0.4 + 0.04 * torch.rand(4, 60, 3, generator=torch.Generator().manual_seed(0))
    graph = module._graph(h, 8)
    expected = layer(h, graph), layer.norm.running_mean.clone(), layer.norm.running_var.clone()
    layer.norm.reset_running_stats()
    with torch.autocast("cpu", torch.bfloat16):
        layer(h, graph)
    deviation = float(expected[2].sqrt().mean())
    assert float((layer.norm.running_mean - expected[1]).abs().max()) < 0.01 * deviation
    torch.testing.assert_close(layer.norm.running_var, expected[2], rtol=0.01, atol=0)


@pytest.mark.parametrize("kind", ["plain", "deep", "no graph", "spread", "nearest", "paper"])
def test_compiles_into_one_graph(kind):
    model = build(kind)
    ours, _ = inputs_of(kind, 2)
    torch._dynamo.reset()  # it counts the networks that it has compiled
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for training in (False, True):
        model.train(training)
        found, expected = (net(*ours) for net in (compiled, model))
        if not training:
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
            continue
        torch.testing.assert_close(found.feats, expected.feats, rtol=1e-9, atol=1e-9)
        gradients = [torch.autograd.grad(out.feats.square().sum(), ours[1])[0] for out in (found, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-8)


def test_a_quarter_of_the_activations():
    """What is kept for the gradient, beside what the published form keeps; weights are nobody's activations."""
    model = create_model("ognet_small", dropout=0.0).train()
    xyz, rgb = clouds(2, 1500, dtype=torch.float32)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: list[dict[int, int]] = []

    def keep(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[-1][storage.data_ptr()] = storage.nbytes()
        return x

    graphs = []  # alive, so that no memory counts as two
    for way in (lambda: model(xyz, rgb).feats, lambda: published.forward(model, xyz, rgb)[0]):
        kept.append({})
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            graphs.append(way())
    ours, theirs = (sum(sizes.values()) for sizes in kept)
    assert 4 * ours < theirs


def test_wrong_inputs():
    model = float_model().eval()
    xyz, rgb = clouds(2, 64, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"\(B, N, 3\)"):
        model(xyz[0], rgb[0])
    with pytest.raises(ValueError, match=r"\(B, N, 3\)"):
        model(xyz, rgb[:, :5])
    with pytest.raises(ValueError, match="N >= 32 points, got 31"):
        model(xyz[:, :31], rgb[:, :31])
    with pytest.raises(ValueError, match="more than 1 value"):
        float_model().train()(xyz[:1], rgb[:1])
