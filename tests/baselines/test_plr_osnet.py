"""PLR-OSNet and its losses against their plain form; the published keys, shapes and counts by rule."""

import math

import pytest
import torch

from reid3d.baselines.image_model import Heads
from reid3d.baselines.osnet import OSNet
from reid3d.baselines.plr_osnet import PLROSNet, SpatialAttention, from_official, plr_osnet
from reid3d.models import MODELS, create_model, save_weights

from .test_osnet import awkward, conv, conv_norm, copied, gate, norm, norm_layout, stage, stem, torchreid_layout

TERMS = ["cross_entropy", "triplet", "centre"]
MOVED = {
    "conv1": ["layer0.0"],
    "conv2": ["layer1"],
    "conv3": ["layer2"],
    "conv4": ["layer30", "layer31.0"],
    "conv5": ["layer40", "layer41.0"],
}


def published_layout(num_classes):
    """Keys and shapes of the published code's checkpoints."""
    layout = {}
    for key, shape in torchreid_layout().items():
        module, rest = key.split(".", 1)
        layout |= {f"{moved}.{rest}": shape for moved in MOVED[module]}
    for name, channels in ("attention_module1", 256), ("attention_module2", 384):
        for part in "query", "key":
            layout[f"{name}.pam.{part}_conv.weight"] = (channels // 8, channels, 1, 1)
            layout[f"{name}.pam.{part}_conv.bias"] = (channels // 8,)
        layout |= {f"{name}.pam.gamma": (1,)} | norm_layout(f"{name}.pam.bn", channels)
        layout[f"{name}.se.fc1.weight"] = (channels // 16, channels, 1, 1)
        layout[f"{name}.se.fc1.bias"] = (channels // 16,)
        layout[f"{name}.se.fc2.weight"] = (channels, channels // 16, 1, 1)
        layout[f"{name}.se.fc2.bias"] = (channels,)
    layout |= {"fc2.weight": (512, 512), "fc2.bias": (512,)} | norm_layout("bn1", 2048) | norm_layout("bn2", 512)
    for name, dim in ("classifier1", 2048), ("classifier2", 512):
        layout |= {f"{name}.weight": (num_classes, dim), f"{name}.bias": (num_classes,)}
    return layout


def published_checkpoint(num_classes):
    rng = torch.Generator().manual_seed(0)
    state = {key: torch.randn(shape, generator=rng) for key, shape in published_layout(num_classes).items()}
    return state | {key: torch.tensor(9) for key in state if key.endswith("num_batches_tracked")}


def shapes(state):
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def pam(state, name, x, training):
    flat = x.flatten(2)
    query, key = (conv(state, f"{name}.{part}_conv", x).flatten(2) for part in ("query", "key"))
    weights = torch.einsum("bci,bcj->bij", query, key).softmax(2)
    mean = torch.einsum("bij,bcj->bci", weights, flat).view(x.shape)
    return norm(state, f"{name}.bn", state[f"{name}.gamma"] * mean, training) + x


def attention(state, name, x, training):
    x = pam(state, f"{name}.pam", x, training)
    return gate(state, f"{name}.se", x, x)


def by_the_book(state, images, training):
    """The vectors in front of the norms, and behind them."""
    x = (images - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    x = stage(state, "layer1", stem(state, "layer0.0", x, training), training)
    x = stage(state, "layer2", attention(state, "attention_module1", x, training), training)
    x = attention(state, "attention_module2", x, training)
    local = conv_norm(state, "layer40", stage(state, "layer30", x, training), training).clamp(min=0)
    whole = conv_norm(state, "layer41.0", stage(state, "layer31.0", x, training), training).clamp(min=0)
    rows = local.shape[2] // 4
    local = torch.cat([local[:, :, i * rows : (i + 1) * rows].mean((2, 3)) for i in range(4)], 1)
    whole = whole.flatten(2).max(2).values
    if "fc2.weight" in state:
        whole = whole @ state["fc2.weight"].T + state["fc2.bias"]
    return (local, whole), (norm(state, "bn1", local, training), norm(state, "bn2", whole, training))


def logits_by_the_book(state, normed):
    return [v @ state[f"classifier{i}.weight"].T + state[f"classifier{i}.bias"] for i, v in enumerate(normed, 1)]


def cross_entropy_by_the_book(logits, labels, smoothing):
    num_classes = logits.shape[1]
    target = torch.full_like(logits, smoothing / num_classes)
    target[range(len(labels)), labels] += 1 - smoothing
    return -(target * logits.log_softmax(1)).sum(1).mean()


def triplet_by_the_book(feats, labels):
    losses = []
    for i in range(len(labels)):
        away = [(feats[i] - other).square().sum().sqrt() if j != i else None for j, other in enumerate(feats)]
        same = [d for j, d in enumerate(away) if j != i and labels[j] == labels[i]]
        rest = [d for j, d in enumerate(away) if labels[j] != labels[i]]
        losses.append((1 + (max(same) - min(rest)).exp()).log())
    return torch.stack(losses).mean()


def centre_by_the_book(feats, labels, centres):
    known = [i for i, label in enumerate(labels) if label < len(centres)]
    return torch.stack([(feats[i] - centres[labels[i]]).square().sum() for i in known]).mean()


def losses_by_the_book(state, images, labels, smoothing):
    feats, normed = by_the_book(state, images, True)
    logits = logits_by_the_book(state, normed)
    return {
        "cross_entropy": sum(cross_entropy_by_the_book(y, labels, smoothing) for y in logits) / 2,
        "triplet": sum(triplet_by_the_book(v, labels) for v in feats) / 2,
        "centre": sum(centre_by_the_book(v, labels, state[f"centres{i}"]) for i, v in enumerate(feats, 1)) * 0.0005 / 2,
    }


def small(num_classes=5, **kwargs):
    torch.manual_seed(0)
    return plr_osnet(num_classes, **kwargs).double()


def crops(count=6, height=64, width=16):
    rng = torch.Generator().manual_seed(1)
    return torch.rand(count, 3, height, width, dtype=torch.float64, generator=rng)


LABELS = torch.tensor([0, 3, 0, 3, 4, 4])


def total(model, images, labels):
    return sum(model.loss(model(images), labels).values())


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10 * max(1.0, float(expected.detach().abs().max())))


def test_eval_agrees_with_the_book():
    model = awkward(small()).eval()
    with torch.no_grad():
        feats = model(crops(3, 128, 16))
        _, normed = by_the_book(model.state_dict(), crops(3, 128, 16), False)
    expected = torch.cat([v / v.square().sum(1, keepdim=True).sqrt() for v in normed], 1)
    assert feats.shape == (3, 2560)
    close(feats, expected)
    close(feats[:, :2048].norm(dim=1), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("form", ["official", "paper"])
def test_training_agrees_with_the_book(form):
    """Vectors, logits, losses, and the gradient of their sum in every parameter."""
    model = awkward(small(form=form))
    state = copied(model)
    leaves = {name: state[name].requires_grad_() for name, _ in model.named_parameters()}
    output = model(crops())
    assert isinstance(output, Heads)
    feats, normed = by_the_book(state, crops(), True)
    plain = (*feats, *logits_by_the_book(state, normed))
    for actual, expected in zip((*output.feats, *output.logits), plain, strict=True):
        close(actual, expected)
    losses = model.loss(output, LABELS)
    expected = losses_by_the_book(state, crops(), LABELS, 0.1 if form == "official" else 0.0)
    assert list(losses) == list(expected) == TERMS
    for name, loss in losses.items():
        close(loss, expected[name])
    grads = torch.autograd.grad(sum(losses.values()), list(model.parameters()))
    wanted = torch.autograd.grad(sum(expected.values()), list(leaves.values()))
    for name, actual, grad in zip(leaves, grads, wanted, strict=True):
        atol = 1e-8 * float(grad.abs().max()) + 1e-12
        torch.testing.assert_close(actual, grad, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(("channels", "height", "width"), [(256, 32, 16), (384, 16, 8)])
def test_attention_is_its_plain_form(channels, height, width):
    """At the sizes and widths that it works in, forward and gradients."""
    torch.manual_seed(0)
    model = awkward(SpatialAttention(channels).double())
    state = {f"pam.{name}": tensor for name, tensor in model.named_parameters()}
    x = torch.randn(2, channels, height, width, dtype=torch.float64, requires_grad=True)
    weights = torch.randn_like(x)
    actual, expected = model(x), pam(state, "pam", x, True)
    close(actual, expected)
    leaves = [x, *model.parameters()]
    grads, expected_grads = (torch.autograd.grad((y * weights).sum(), leaves) for y in (actual, expected))
    for ours, plain in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-10 * float(plain.abs().max()) + 1e-10)


@pytest.mark.parametrize(
    ("num_classes", "form", "parameters", "entries"),
    [
        (0, "official", 3_324_926, 782),
        (751, "official", 5_248_988, 786 + 2),  # the published entries and the centres
        (0, "paper", 3_324_926 - 512 * 513, 780),
        (751, "paper", 5_248_988 - 512 * 513 + 751 * 2560, 784 + 2),
    ],
)
def test_counts(num_classes, form, parameters, entries):
    model = plr_osnet(num_classes, form=form)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(model.state_dict()) == entries


def test_layout_is_the_published_one():
    expected = published_layout(751)
    assert len(expected) == 786
    assert shapes(plr_osnet(751).state_dict()) == expected | {"centres1": (751, 2048), "centres2": (751, 512)}


def test_initialisation():
    torch.manual_seed(0)
    model = plr_osnet(100)
    for linear in model.fc2, model.classifier1, model.classifier2:
        assert float(linear.weight.detach().std()) == pytest.approx(0.01, rel=0.03) and not linear.bias.any()
    for centres in model.centres1, model.centres2:
        assert float(centres.std()) == pytest.approx(1, rel=0.01) and abs(float(centres.mean())) < 0.01
    for module in model.attention_module1, model.attention_module2:
        assert not module.pam.gamma.any()
    state = model.state_dict()
    assert all(torch.equal(tensor, state[f"layer31.0.{key}"]) for key, tensor in model.layer30.state_dict().items())
    assert model.layer30[0].conv1.conv.weight.data_ptr() != model.layer31[0][0].conv1.conv.weight.data_ptr()


def test_takes_a_published_checkpoint():
    """Tensor by tensor, and centres besides, which it lacks."""
    published = published_checkpoint(7)
    name, kwargs, state, num_classes = from_official(published)
    assert (name, kwargs, num_classes) == ("plr_osnet", {}, 7)
    model = plr_osnet(7)
    model.load_state_dict(state)
    loaded = model.state_dict()
    assert all(torch.equal(loaded.pop(key), tensor) for key, tensor in published.items())
    assert shapes(loaded) == {"centres1": (751, 2048), "centres2": (751, 512)}
    assert all(float(centres.std()) == pytest.approx(1, rel=0.01) for centres in loaded.values())


def test_gives_a_published_checkpoint():
    model = awkward(small(7)).eval()
    published = {key: tensor for key, tensor in model.state_dict().items() if not key.startswith("centres")}
    assert shapes(published) == published_layout(7)
    again = small(7).eval()
    again.load_state_dict(from_official(published)[2])
    with torch.no_grad():
        assert torch.equal(again(crops(2)), model(crops(2)))


def test_other_checkpoints_are_refused():
    published = published_checkpoint(7)
    with pytest.raises(ValueError, match=r"published PLR-OSNet: layer0.0.conv.weight is missing"):
        from_official({key: tensor for key, tensor in published.items() if key != "layer0.0.conv.weight"})
    with pytest.raises(ValueError, match=r"layer31.conv1 is unknown"):
        from_official(published | {"layer31.conv1": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"centres1 is unknown"):
        from_official(published | {"centres1": torch.zeros(751, 2048)})
    with pytest.raises(ValueError, match=r"fc2.weight must have shape \(512, 512\), got \(512, 2048\)"):
        from_official(published | {"fc2.weight": torch.zeros(512, 2048)})
    with pytest.raises(ValueError, match=r"classifier2.weight must have shape \(7, 512\), got \(8, 512\)"):
        from_official(published | {"classifier2.weight": torch.zeros(8, 512)})
    with pytest.raises(ValueError, match=r"classifier1.bias is missing"):
        from_official({key: tensor for key, tensor in published.items() if key != "classifier1.bias"})


def test_weights_files_keep_the_centres(tmp_path, monkeypatch):
    monkeypatch.setitem(MODELS, "plr_osnet", plr_osnet)
    model = create_model("plr_osnet", 3)
    save_weights(model, tmp_path / "model.safetensors", trained_on="nothing")
    again = create_model(num_classes=3, weights=tmp_path / "model.safetensors")
    assert torch.equal(again.centres1, model.centres1) and torch.equal(again.centres2, model.centres2)


def test_backbone_goes_to_both_branches():
    """Each of OSNet's tensors where the published code puts it; with attention that does nothing, all is OSNet's."""
    osnet, model = awkward(OSNet().double()).eval(), small(0).eval()
    state, pretrained, reached = model.state_dict(), osnet.state_dict(), []
    for key, tensor in pretrained.items():
        targets = model.of_backbone(key)
        assert len(targets) == (2 if key.startswith(("conv4", "conv5")) else 1)
        for target in targets:
            state[target] = tensor
        reached += targets
    assert sorted(reached) == sorted(key for key in state if key.startswith(model.backbone))
    assert all(model.of_backbone(key) == () for key in ("fc.0.weight", "fc.1.running_mean", "classifier.bias"))
    for name in "attention_module1", "attention_module2":  # gamma is 0, and a gate of 1
        state[f"{name}.se.fc2.weight"].zero_()
        state[f"{name}.se.fc2.bias"].fill_(1e3)
    model.load_state_dict(state)
    seen = []
    for end in model.layer40, model.layer41:
        end.register_forward_hook(lambda module, args, result: seen.append(result))
    model.normalised = False
    with torch.no_grad():
        model(crops(2))
        expected = osnet(crops(2))
    close(seen[0], expected)
    close(seen[1], expected)


def without_gradient(model, terms=TERMS):
    losses = model.loss(model(crops()), LABELS)
    grads = torch.autograd.grad(sum(losses[name] for name in terms), list(model.parameters()))
    sizes = {name: float(grad.abs().max()) for (name, _), grad in zip(model.named_parameters(), grads, strict=True)}
    assert all(math.isfinite(size) for size in sizes.values())
    assert not [name for name, size in sizes.items() if 1e-12 < size < 1e-6]  # nothing is in between
    return {name for name, size in sizes.items() if size <= 1e-12}


@pytest.mark.parametrize("form", ["official", "paper"])
def test_what_learns(form):
    """At first gamma is 0, and with it what it multiplies. Later on, softmax cancels what all keys share, and the norm
    and the differences of the triplet loss what all vectors share, so that fc2's bias learns from the centres alone.
    """
    sites = [f"attention_module{i}.pam" for i in (1, 2)]
    model = small(form=form)
    behind_gamma = [f"{part}_conv.{key}" for part in ("query", "key") for key in ("weight", "bias")] + ["bn.weight"]
    assert without_gradient(model) == {f"{site}.{name}" for site in sites for name in behind_gamma}
    shared_keys = {f"{site}.key_conv.bias" for site in sites}
    assert without_gradient(awkward(model)) == shared_keys
    if form == "official":
        assert without_gradient(model, ["cross_entropy", "triplet"]) == shared_keys | {"fc2.bias"}


def test_a_batch_without_positives_has_no_triplet_loss():
    model = small(6)
    output = model(crops())
    losses = model.loss(output, torch.arange(6))
    assert losses["triplet"] == 0 and losses["cross_entropy"] > 0 and losses["centre"] > 0
    grads = torch.autograd.grad(losses["triplet"], output.feats)
    assert not any(grad.any() for grad in grads)
    assert model.loss(output, torch.zeros(6, dtype=torch.int64))["triplet"] == 0  # nor has one without negatives


def test_smoothing():
    torch.manual_seed(0)
    feats = torch.randn(6, 2048), torch.randn(6, 512)
    output = Heads(feats, tuple(torch.randn(6, 3).double() for _ in feats))
    labels = torch.tensor([0, 1, 2, 2, 1, 0])
    for smoothing, share in ("official", 0.1), ("paper", 0.0):
        model = small(3, smoothing=smoothing)
        expected = sum(cross_entropy_by_the_book(logits, labels, share) for logits in output.logits) / 2
        close(model.loss(output, labels)["cross_entropy"], expected)


def test_centres():
    """Official: 751, and no parameters; whom they lack is left out of the mean. Paper: one each, and they learn."""
    torch.manual_seed(0)
    feats, labels = tuple(torch.randn(4, dim) for dim in (2048, 512)), torch.tensor([752, 3, 760, 750])
    output = Heads(feats, tuple(torch.randn(4, 767) for _ in feats))
    official, paper = plr_osnet(767, form="paper", centres="official"), plr_osnet(767, centres="paper")
    assert official.centres1.shape == (751, 2048) and not official.centres1.requires_grad
    assert not any(name.startswith("centres") for name, _ in official.named_parameters())
    assert paper.centres2.shape == (767, 512) and isinstance(paper.centres2, torch.nn.Parameter)
    for model, counted in (official, [1, 3]), (paper, [0, 1, 2, 3]):
        expected = 0.0
        for vectors, centres in zip(feats, (model.centres1, model.centres2), strict=True):
            dist2 = [(vectors[i] - centres[labels[i]]).square().sum().item() for i in counted]
            expected += 0.0005 * sum(dist2) / len(dist2) / 2
        assert model.loss(output, labels)["centre"].item() == pytest.approx(expected, rel=1e-5)
    assert official.loss(output, torch.tensor([751, 766, 751, 766]))["centre"] == 0
    grad = torch.autograd.grad(paper.loss(output, labels)["centre"], paper.centres1)[0]
    assert grad.abs().sum(1).nonzero().flatten().tolist() == [3, 750, 752, 760]


def test_projection():
    """Official: signs of the global vector vary. Paper: it is the maximum of what a ReLU gives."""
    official, paper = small(0), small(0, projection="paper")
    assert official(crops(2)).feats[1].min() < 0 <= paper(crops(2)).feats[1].min()
    assert shapes(official.state_dict()).items() - shapes(paper.state_dict()).items() == {
        ("fc2.weight", (512, 512)),
        ("fc2.bias", (512,)),
    }


def test_form_sets_them_all():
    for form, other in ("official", "paper"), ("paper", "official"):
        model, mixed = plr_osnet(9, form=form), plr_osnet(9, form=other, smoothing=form, centres=form, projection=form)
        assert shapes(model.state_dict()) == shapes(mixed.state_dict())
        assert model.label_smoothing == mixed.label_smoothing == (0.1 if form == "official" else 0)


def test_without_classes():
    model = small(0)
    output = model(crops(2))
    assert [tuple(feats.shape) for feats in output.feats] == [(2, 2048), (2, 512)] and output.logits == ()
    assert not any(name.startswith(model.classifiers) for name in model.state_dict())
    with pytest.raises(ValueError, match="num_classes must be at least 1 for a loss, got 0"):
        model.loss(output, torch.tensor([0, 0]))


def test_only_classifiers_and_centres_depend_on_the_people():
    few, many = (shapes(plr_osnet(n, form="paper").state_dict()) for n in (2, 3))
    of_people = {name for name in few if name.startswith(PLROSNet.classifiers)}
    assert {name for name in few if few[name] != many[name]} == of_people


def test_learns():
    torch.manual_seed(0)
    model, images = plr_osnet(5), crops().float()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-4)
    first = total(model, images, LABELS)
    for _ in range(6):
        optimizer.zero_grad()
        total(model, images, LABELS).backward()
        optimizer.step()
    assert total(model, images, LABELS) < 0.8 * first


def test_losses_are_wide_under_autocast():
    torch.manual_seed(0)
    model = plr_osnet(5)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(crops().float())
        losses = model.loss(output, LABELS)
    wide = Heads(*(tuple(tensor.float() for tensor in part) for part in output))
    assert output.logits[0].dtype == torch.bfloat16
    for name, expected in model.loss(wide, LABELS).items():
        assert losses[name].isfinite() and torch.equal(losses[name], expected)


def test_errors():
    for name in "form", "smoothing", "centres", "projection":
        with pytest.raises(ValueError, match=f"{name} must be one of official, paper, got 'torchreid'"):
            plr_osnet(**{name: "torchreid"})
    model = small(5)
    with pytest.raises(ValueError, match="height must be a multiple of 64, got 96"):
        model(crops(2, 96, 32))
    with pytest.raises(ValueError, match="width must be a multiple of 16, got 24"):
        model(crops(2, 64, 24))
    output = model(crops(2))
    with pytest.raises(ValueError, match=r"labels must be in \[0, 5\), got 5"):
        model.loss(output, torch.tensor([0, 5]))
    with pytest.raises(ValueError, match=r"labels must be in \[0, 5\), got -1"):
        model.loss(output, torch.tensor([-1, 4]))
    with pytest.raises(ValueError, match=r"labels must have shape \(2,\)"):
        model.loss(output, torch.tensor([0, 1, 2]))
    with pytest.raises(TypeError, match="labels must be an int64 tensor, got torch.int32"):
        model.loss(output, torch.tensor([0, 1], dtype=torch.int32))


# The paper's ablations.


def test_without_the_global_branch_the_descriptor_is_that_of_the_strips():
    whole, cut = small().eval(), small(whole=False).eval()
    cut.load_state_dict({key: tensor for key, tensor in whole.state_dict().items() if key in cut.state_dict()})
    absent = {key.partition(".")[0] for key in whole.state_dict().keys() - cut.state_dict().keys()}
    assert absent == {"layer31", "layer41", "fc2", "bn2", "classifier2", "centres2"}
    assert torch.equal(cut(crops()), whole(crops())[:, :2048])
    loss, both = (model.train().loss(model(crops()), LABELS) for model in (cut, whole))
    feats, logits = whole(crops())
    assert list(loss) == TERMS and loss["cross_entropy"] != both["cross_entropy"]
    by_hand = cross_entropy_by_the_book(logits[0].detach(), LABELS, 0.1)
    assert loss["cross_entropy"].item() == pytest.approx(float(by_hand), rel=1e-9)


def test_a_classifier_for_each_strip():
    model = small(each_strip=True).train()
    feats, logits = model(crops())
    assert len(feats) == 2 and len(logits) == 5
    normed = model.eval().bn1.train()(feats[0])
    for i, got in enumerate(logits[:4]):
        classifier = model.classifier1[i]
        expected = normed[:, 512 * i : 512 * (i + 1)] @ classifier.weight.T + classifier.bias
        torch.testing.assert_close(got, expected)
    terms = [float(cross_entropy_by_the_book(one.detach(), LABELS, 0.1)) for one in logits]
    loss = model.loss(Heads(feats, logits), LABELS)
    assert loss["cross_entropy"].item() == pytest.approx((sum(terms[:4]) + terms[4]) / 2, rel=1e-9)
