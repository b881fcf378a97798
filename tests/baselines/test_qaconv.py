"""QAConv against matching and losses written out pair by pair, and published files against made ones."""

import functools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from reid3d.baselines import qaconv
from reid3d.baselines.image_model import Heads
from reid3d.baselines.qaconv import Matcher, QAConv, from_official, qaconv50, qaconv50_ibn_b, qaconv152
from reid3d.baselines.resnet import BLOCKS, ResNet
from reid3d.retrieval import rerank
from reid3d.retrieval.features import Features

H, W = 48, 32  # of images: maps of 3 x 2
C, L = 4, 6
VERSIONS = ("1.0", "2.1")


class Patches(nn.Module):
    """A backbone that sees 16 x 16 pixels at a time."""

    def __init__(self, channels=5):
        super().__init__()
        self.channels = channels
        self.conv = nn.Conv2d(3, channels, 16, 16)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x):
        return self.bn(self.conv(x))


def small(num_classes=5, version="1.0", **changes):
    """A model in which nothing is trivial: statistics moved, scales of both signs. In float64, in training mode."""
    torch.manual_seed(0)
    options = {"height": H, "width": W, "channels": C} | changes
    model = QAConv(Patches(), num_classes, version=version, **options).double()
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.is_floating_point() and name != "class_memory":
                noise = torch.randn(tensor.shape, generator=rng, dtype=tensor.dtype) * 0.3
                tensor.copy_(noise.exp() if name.endswith("running_var") else tensor + noise)
    return model


def crops(batch=4, seed=0):
    return torch.rand(batch, 3, H, W, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit_maps(count, seed=0, shape=(C, 3, 2)):
    rng = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, *shape, generator=rng, dtype=torch.float64), dim=1)


def filled(model, seed=9):
    """With a memory in which one id, number 2, has no image yet."""
    model.class_memory.copy_(unit_maps(model.num_classes, seed))
    model.class_memory[2] = 0
    return model


def features(maps, **changes):
    count = len(maps)
    ids = np.arange(count, dtype=np.int64)
    feats = maps.flatten(1).float().numpy()
    return Features(feats, ids, ids, [f"{i}.jpg" for i in range(count)], **changes)


def close(a, b, tolerance=1e-10):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# The method written out, on a state dict.


def norm(state, name, x, over, training):
    mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
    if training:
        mean = x.mean(over)
        var = ((x - x.mean(over, keepdim=True)) ** 2).mean(over)
    shape = [1 if d in over else -1 for d in range(x.dim())]
    mean, var, weight, bias = (t.view(shape) for t in (mean, var, state[f"{name}.weight"], state[f"{name}.bias"]))
    return (x - mean) / (var + 1e-5).sqrt() * weight + bias


def logits_by_hand(state, queries, gallery, version, training=False):
    """One pair after another, one position after another; queries and gallery (n, C, positions)."""
    of_query, of_gallery = [], []
    for query in queries.unbind():
        for other in gallery.unbind():
            rows = [[(a * b).sum() for b in other.unbind(1)] for a in query.unbind(1)]
            of_query.append(torch.stack([torch.stack(row).max() for row in rows]))
            of_gallery.append(torch.stack([torch.stack(column).max() for column in zip(*rows, strict=True)]))
    of_query, of_gallery = torch.stack(of_query), torch.stack(of_gallery)
    values = torch.stack((of_query, of_gallery), 2)[..., None]  # one channel, so that all share their statistics
    of_query, of_gallery = norm(state, "matcher.bn", values, [0, 1, 2], training)[..., 0].unbind(2)
    weight, bias = state["matcher.fc.weight"][0], state["matcher.fc.bias"]
    if version == "1.0":  # in the published code maxima over the positions of the kernel, the query, come first
        out = torch.cat((of_gallery, of_query), 1) @ weight + bias
    else:
        out = (of_query @ weight + bias) + (of_gallery @ weight + bias)
    out = norm(state, "matcher.logit_bn", out[:, None], [0], training)
    return out.view(len(queries), len(gallery))


def maps_by_hand(state, images, neck, training=False):
    x = F.conv2d(images, state["base.conv.weight"], state["base.conv.bias"], 16)
    x = norm(state, "base.bn", x, [0, 2, 3], training and neck != "2.1")
    weight = state["neck_conv.weight"]
    x = F.conv2d(x, weight, state.get("neck_conv.bias"), padding=weight.shape[2] // 2)
    if neck == "official":
        x = norm(state, "neck_bn", x, [0, 2, 3], training)
    return x / x.pow(2).sum(1, keepdim=True).sqrt()


def state_of(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def focal_by_hand(logits, labels, ids):
    total = 0.0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        for j in ids:
            p = 1 / (1 + math.exp(-row[j]))
            p = p if j == label else 1 - p
            total -= (1 - p) ** 2 * math.log(p)
    return total / len(labels)


# Descriptor.


@pytest.mark.parametrize(
    ("changes", "neck", "kernel", "bias"),
    [
        ({}, "official", 3, False),
        ({"neck": "paper"}, "paper", 1, True),
        ({"form": "paper"}, "paper", 1, True),
        ({"form": "paper", "neck": "official"}, "official", 3, False),
        ({"version": "2.1"}, "2.1", 3, True),
    ],
)
def test_descriptor_agrees_with_the_book(changes, neck, kernel, bias):
    model = small(**changes).eval()
    feats = model(crops())
    assert model.map_shape == (C, 3, 2) and feats.shape == (4, C * L)
    assert model.neck_conv.kernel_size == (kernel, kernel) and (model.neck_conv.bias is not None) == bias
    assert any(name.startswith("neck_bn.") for name in model.state_dict()) == (neck == "official")
    close(feats, maps_by_hand(state_of(model), crops(), neck).flatten(1))
    close(feats.view(4, C, L).norm(dim=1), torch.ones(4, L, dtype=torch.float64))
    close(torch.cat([model(image[None]) for image in crops()]), feats)
    assert model(crops(0)).shape == (0, C * L)


def test_what_the_method_asks_of_images():
    model = small(height=64)
    assert model.size == (64, 32) and QAConv.size == (384, 128) and model.resample == "bicubic"
    assert not model.normalised and not model.flip
    assert model.backbone == ("base.",) and model.classifiers == ("class_memory",)
    assert model.of_backbone("layer3.0.conv1.weight") == ("base.layer3.0.conv1.weight",)


@pytest.mark.parametrize("training", [False, True])
def test_images_of_another_size(training):
    model = small().train(training)
    for shape in ((H, W + 16), (H + 16, W), (W, H), (H - 1, W), (0, 0)):
        with pytest.raises(ValueError, match=f"^images must have 48 x 32 pixels, got {shape[0]} x {shape[1]}$"):
            model(torch.zeros(2, 3, *shape, dtype=torch.float64))


# Matching.


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("version", VERSIONS)
def test_logits_agree_with_loops(version, training):
    model = small(version=version).train(training)
    q, g = unit_maps(3, 1).flatten(2), unit_maps(5, 2).flatten(2)
    before = state_of(model)
    got = model.matcher(qaconv.match_maps(q, g))
    close(got, logits_by_hand(before, q, g, version, training))
    assert got.std() > 0.05


def test_one_pair_by_hand():
    """Two positions, one channel: similarities [[1, -1], [-1, 1]] or all 1, BN of ones and zeros."""
    matcher = Matcher(2, symmetric=False).double().eval()
    matcher.bn.eps = matcher.logit_bn.eps = 0.0
    with torch.no_grad():
        matcher.fc.weight.copy_(torch.tensor([[1.0, 10.0, 100.0, 1000.0]]))
        matcher.fc.bias.fill_(0.5)
    both, one = torch.tensor([[[1.0, -1.0]]]).double(), torch.tensor([[[1.0, 1.0]]]).double()
    # Each position of `one` finds 1 in `both`; of `both` the second finds -1 at best.
    close(matcher(qaconv.match_maps(both, one)), torch.tensor([[1 + 10 + 100 - 1000 + 0.5]]).double())
    close(matcher(qaconv.match_maps(one, both)), torch.tensor([[1 - 10 + 100 + 1000 + 0.5]]).double())


@pytest.mark.parametrize("positions", [L, 192])
def test_version_2_1_is_symmetric(positions):
    best = torch.rand(7, 9, 2, positions, generator=torch.Generator().manual_seed(0)) * 2 - 1
    turned = best.transpose(0, 1).flip(2)
    for symmetric in (True, False):
        torch.manual_seed(0)
        matcher = Matcher(positions, symmetric).eval()
        nn.init.normal_(matcher.fc.weight)
        assert torch.equal(matcher(best).T, matcher(turned)) == symmetric
        matcher.train()  # here statistics are summed in an order
        assert torch.allclose(matcher(best).T, matcher(turned), atol=1e-5) == symmetric


def test_matcher_starts():
    torch.manual_seed(0)
    assert (Matcher(L, symmetric=True).fc.weight == 1 / L).all()
    assert Matcher(L, symmetric=False).fc.weight.std() > 0
    assert sum(p.numel() for p in Matcher(192, symmetric=False).parameters()) == 2 + 385 + 2 == 389
    assert sum(p.numel() for p in Matcher(192, symmetric=True).parameters()) == 2 + 193 + 2 == 197


# Version 1.0 in training.


@pytest.mark.parametrize("empty", ["official", "paper"])
def test_training_agrees_with_loops(empty):
    model = filled(small(empty=empty))
    before = state_of(model)
    labels = torch.tensor([3, 0, 2, 0])
    output = model(crops())
    ((maps,), (logits,)) = output
    expected = maps_by_hand(before, crops(), "official", training=True)
    close(maps, expected)
    assert logits.shape == (4, 5)
    close(logits, logits_by_hand(before, expected.flatten(2), before["class_memory"].flatten(2), "1.0", training=True))
    terms = model.loss(output, labels)
    assert list(terms) == ["focal"]
    ids = (0, 1, 2, 3, 4) if empty == "official" else (0, 1, 3, 4)  # nothing is known of 2
    close(terms["focal"].item(), focal_by_hand(logits, labels, ids))
    memory = before["class_memory"]
    for label, one in zip(labels.tolist(), maps.detach(), strict=True):  # in order, so the last of an id stays
        memory[label] = one
    assert torch.equal(model.class_memory, memory) and not model.class_memory.requires_grad
    assert torch.equal(model.class_memory[0], maps[3].detach()) and not torch.equal(maps[1], maps[3])


def test_an_empty_memory():
    """In the first step all maxima are 0: the code learns from the biases alone, the other way from nothing."""
    labels = torch.tensor([0, 1, 1, 4])
    for empty in ("official", "paper"):
        model = small(empty=empty)
        output = model(crops())
        loss = model.loss(output, labels)["focal"]
        loss.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        ids = range(5) if empty == "official" else ()
        close(loss.item(), focal_by_hand(output.logits[0], labels, ids))
        assert (loss == 0) == (empty == "paper")
        assert model.matcher.logit_bn.bias.grad.abs().item() > 0 or empty == "paper"
        assert [bool(slot.any()) for slot in model.class_memory] == [True, True, False, False, True]
        again = model(crops(seed=1))
        assert model.loss(again, labels)["focal"] > 0


def test_the_gradient_is_that_of_the_memory_before_the_step():
    model = filled(small())
    other = small()
    memory = model.class_memory.clone()
    labels = torch.tensor([3, 0, 2, 0])
    model.loss(model(crops()), labels)["focal"].backward()
    state = dict(other.named_parameters()) | {name: t for name, t in other.named_buffers() if name != "class_memory"}
    maps = maps_by_hand(state, crops(), "official", training=True)
    right = logits_by_hand(state, maps.flatten(2), memory.flatten(2), "1.0", training=True)
    right = torch.where(F.one_hot(labels, 5).bool(), right, -right)
    (-((1 - right.sigmoid()) ** 2) * right.sigmoid().log()).sum(1).mean().backward()
    for (name, mine), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-7, atol=1e-10, msg=name)


@pytest.mark.parametrize(
    ("changes", "without"),
    [
        # A norm follows: of a backbone's bias in front of its own, of FC's, and of the first norm's, which moves FC.
        ({}, {"base.conv.bias", "matcher.bn.bias", "matcher.fc.bias"}),
        ({"neck": "paper"}, {"base.conv.bias", "matcher.bn.bias", "matcher.fc.bias"}),
        # Here the backbone's norm is frozen; what all scores have in common no triplet sees.
        ({"version": "2.1"}, {"matcher.bn.bias", "matcher.fc.bias", "matcher.logit_bn.bias"}),
    ],
)
def test_every_parameter_but_some_biases_gets_a_gradient(changes, without):
    model = small(**changes)
    if "version" not in changes:
        filled(model)
    sum(model.loss(model(crops(6)), torch.tensor([0, 1, 0, 4, 1, 4])).values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert {name for name, p in model.named_parameters() if p.grad.abs().max() < 1e-10} == without


# Version 2.1 in training.


@pytest.mark.parametrize("labels", [[0, 1, 0, 1, 4, 4], [0, 1, 0, 3, 4, 2], [0, 0, 0, 1, 1, 2]])
def test_triplets_agree_with_loops(labels):
    model = small(version="2.1")
    before = state_of(model)
    output = model(crops(6))
    assert output.logits == () and output.feats[0].shape == (6, C, 3, 2)
    close(output.feats[0], maps_by_hand(before, crops(6), "2.1", training=True))
    maps = output.feats[0].detach().flatten(2)
    scores = logits_by_hand(before, maps, maps, "2.1", training=True)
    terms = []
    for i, label in enumerate(labels):
        own = [scores[i, j].item() for j, of in enumerate(labels) if of == label and j != i]
        others = [scores[i, j].item() for j, of in enumerate(labels) if of != label]
        if own and others:
            terms.append(max(0.0, 16 - (min(own) - max(others))))
    assert len(terms) in (2, 5, 6)  # of 6 images, over which the published code takes the mean
    loss = model.loss(output, torch.tensor(labels))
    assert list(loss) == ["triplet"]
    close(loss["triplet"].item(), sum(terms) / 6)


def test_triplets_beyond_the_margin_are_0():
    scores = torch.tensor([[0.0, 30.0, 10.0], [30.0, 0.0, 20.0], [10.0, 20.0, 0.0]])
    same = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]]).bool()
    assert QAConv._triplet(scores, same) == (0 + (20 - 30 + 16) + 0) / 3


@pytest.mark.parametrize("labels", [[0, 1, 2, 3], [2, 2, 2, 2]])
def test_a_batch_without_triplets(labels):
    model = small(version="2.1")
    loss = model.loss(model(crops()), torch.tensor(labels))["triplet"]
    assert loss.item() == 0
    loss.backward()
    assert all((p.grad == 0).all() for p in model.parameters())


def test_the_backbone_of_version_2_1_keeps_its_statistics():
    for version, frozen in (("1.0", False), ("2.1", True)):
        model = small(version=version)
        for _ in range(2):
            assert model.base.bn.training is not frozen and model.matcher.training
            before = model.base.bn.running_mean.clone()
            model(crops())
            assert torch.equal(model.base.bn.running_mean, before) is frozen
            assert not model.eval().base.bn.training and not model.matcher.training
            model.train()


def test_autocast_keeps_maps_and_logits():
    model = filled(small().float())
    with torch.autocast("cpu", torch.bfloat16):
        output = model(crops().float())
    assert output.feats[0].dtype == output.logits[0].dtype == torch.float32
    close(output.feats[0].norm(dim=1), torch.ones(4, 3, 2), 1e-5)
    exact = model.matcher(qaconv.match_maps(output.feats[0].flatten(2), model.class_memory.flatten(2)))
    close(output.logits[0], exact, 1e-6)
    model.loss(output, torch.tensor([0, 1, 2, 3]))["focal"].backward()


def test_without_classes_there_is_no_memory_and_no_loss():
    for version in VERSIONS:
        model = small(0, version)
        assert "class_memory" not in model.state_dict()
        output = model(crops())
        assert len(output.feats) == 1 and output.logits == ()
        with pytest.raises(ValueError, match="num_classes must be at least 1 for a loss, got 0"):
            model.loss(output, torch.zeros(4, dtype=torch.int64))


@pytest.mark.parametrize("version", VERSIONS)
def test_bad_labels(version):
    model = small(version=version)
    output = model(crops(3))
    before = state_of(model)
    for bad, value in (([0, 5, 1], 5), ([0, -1, 1], -1)):
        with pytest.raises(ValueError, match=rf"labels must be in \[0, 5\), got {value}"):
            model.loss(output, torch.tensor(bad))
    with pytest.raises(ValueError, match=r"labels must have shape \(3,\), got \(2,\)"):
        model.loss(output, torch.tensor([0, 1]))
    with pytest.raises(TypeError, match="labels must be an int64 tensor, got torch.int32"):
        model.loss(output, torch.tensor([0, 1, 1], dtype=torch.int32))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_bad_models():
    for changes, message in (
        ({"num_classes": -1}, "num_classes must be at least 0, got -1"),
        ({"channels": 0}, "channels must be at least 1, got 0"),
        ({"version": "2.0"}, "version must be '1.0' or '2.1', got '2.0'"),
        ({"height": 100}, "height must be a multiple of 16, got 100"),
        ({"width": 0}, "width must be a multiple of 16, got 0"),
        ({"form": "code"}, "form must be 'official' or 'paper', got 'code'"),
        ({"neck": "code"}, "neck must be 'official' or 'paper', got 'code'"),
        ({"empty": "code"}, "empty must be 'official' or 'paper', got 'code'"),
        ({"version": "2.1", "form": "paper"}, "form must be 'official' for version 2.1, which is not the paper's"),
        ({"version": "2.1", "empty": "paper"}, "empty must be 'official' for version 2.1, which is not the paper's"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            small(**changes)


# Scores.


def scored_by_hand(model, q, g):
    state = {name: tensor.double() for name, tensor in state_of(model).items()}
    out = logits_by_hand(state, q.double().flatten(2), g.double().flatten(2), model.version)
    return (torch.sigmoid(out / 10) if model.version == "1.0" else out).numpy()


@pytest.mark.parametrize("block", [2, 3, 128])
@pytest.mark.parametrize("version", VERSIONS)
def test_scores_agree_with_loops(version, block, monkeypatch):
    monkeypatch.setattr(qaconv, "BLOCK", block)
    model = small(version=version).float()
    q, g = unit_maps(5, 1), unit_maps(7, 2)
    got = model.scores(features(q), features(g))
    assert got.shape == (5, 7) and got.dtype == np.float32
    expected = scored_by_hand(model, q, g)
    assert np.abs(got - expected).max() < 1e-3
    assert model.training and expected.std() > (0.003 if version == "1.0" else 0.05)
    scaled = model.eval().scores(features(F.normalize(q.flatten(1)).view_as(q)), features(g * 3))
    assert np.abs(got - scaled).max() < 1e-3 and not model.training
    assert model.scores(features(q[:0]), features(g)).shape == (0, 7)
    assert model.scores(features(q), features(g[:0])).shape == (5, 0)


@pytest.mark.parametrize("version", VERSIONS)
def test_half_precision_moves_published_sizes_little(version):
    """Maps of 128 channels at 24 x 8 positions, their statistics those of such pairs."""
    torch.manual_seed(0)
    model = QAConv(Patches(), version=version)
    base = torch.randn(1, 128, 24, 8)
    maps = F.normalize(base + 1.5 * torch.randn(6, 128, 24, 8), dim=1)
    best = qaconv.match_maps(maps.flatten(2), maps.flatten(2))
    for _ in range(200):
        exact = model.matcher(best)  # learns the statistics
    exact = model.eval().matcher(best).detach()
    exact = torch.sigmoid(exact / 10) if version == "1.0" else exact
    got = model.scores(features(maps), features(maps.clone()))
    moved = np.abs(got - exact.numpy()).max()
    assert 0 < moved < 1e-3
    assert exact.std() > (0.01 if version == "1.0" else 0.5)


@pytest.mark.parametrize(
    ("count", "block", "fine", "pairs"),
    [
        (7, 3, 3, 9 + 18 + 7),
        (6, 2, 2, 4 + 8 + 12),
        (4, 128, 128, 16),
        (5, 1, 1, 15),
        (7, 4, 2, 4 + 8 + (12 + 4 + 3)),
        (7, 5, 2, 4 + 8 + 5 + (10 + 4)),
    ],
)
@pytest.mark.parametrize("version", VERSIONS)
def test_scores_of_a_set_with_itself_match_one_triangle(version, count, block, fine, pairs, monkeypatch):
    monkeypatch.setattr(qaconv, "BLOCK", block)
    monkeypatch.setattr(qaconv, "FINE", fine)
    matched = []

    def counting(query, gallery):
        matched.append(len(query) * len(gallery))
        return whole(query, gallery)

    whole = qaconv.match_maps
    monkeypatch.setattr(qaconv, "match_maps", counting)
    model, both = small(version=version).float(), features(unit_maps(count, 1))
    got = model.scores(both, both)
    assert sum(matched) == pairs <= count * (count + fine) / 2 or fine > count
    matched.clear()
    plain = model.scores(both, both.subset(range(count)))
    assert sum(matched) == count**2
    assert np.abs(got - plain).max() < 1e-3
    assert np.array_equal(got, got.T) == (version == "2.1")
    assert np.abs(got - scored_by_hand(model, unit_maps(count, 1), unit_maps(count, 1))).max() < 1e-3


@pytest.mark.parametrize("block", [2, 128])
@pytest.mark.parametrize("version", VERSIONS)
def test_shortlist(version, block, monkeypatch):
    monkeypatch.setattr(qaconv, "BLOCK", block)
    model = small(version=version).float()
    q, g = unit_maps(3, 1), unit_maps(9, 2)
    every = model.scores(features(q), features(g))
    got = model.scores(features(q), features(g), shortlist=3)
    means = [F.normalize(x.flatten(2).mean(2), dim=1) for x in (q, g)]
    cosines = (means[0] @ means[1].T).numpy()
    for row, full, cosine in zip(got, every, cosines, strict=True):
        order = np.argsort(-cosine)
        near, far = order[:3], order[3:]
        assert np.abs(row[near] - full[near]).max() < 1e-5
        assert np.abs(row[far] - (row[near].min() - (2 - cosine[far]))).max() < 1e-5
        assert row[far].max() < row[near].min() and (np.diff(row[far]) <= 0).all()
    for enough in (9, 10, np.int64(100)):
        assert np.array_equal(model.scores(features(q), features(g), shortlist=enough), every)


def test_bad_scores():
    model = small().float()
    good, bad = features(unit_maps(2)), features(unit_maps(2, shape=(C, 2, 2)))
    for arguments, name in (((bad, good), "q"), ((good, bad), "g")):
        with pytest.raises(ValueError, match=f"^{name} must have 24 = 4 x 3 x 2 numbers each, got 16$"):
            model.scores(*arguments)
    with pytest.raises(ValueError, match="q and g must be features of one model"):
        model.scores(features(unit_maps(2), made_by="a"), features(unit_maps(2), made_by="b"))
    with pytest.raises(ValueError, match="shortlist must be at least 1, got 0"):
        model.scores(good, good, shortlist=0)
    with pytest.raises(TypeError, match="shortlist must be an int, got float"):
        model.scores(good, good, shortlist=1.5)


def test_a_memory_map_with_nan(tmp_path):
    model, good = small().float(), features(unit_maps(2))
    path = tmp_path / "f"
    features(unit_maps(3, 2)).save(path)
    held = Features.load(path).feats[1, 5].tobytes()
    path.write_bytes(path.read_bytes().replace(held, np.float32(np.nan).tobytes(), 1))
    bad = Features.load(path, mmap=True)
    for arguments in ((bad, good), (good, bad), (bad, bad)):
        with pytest.raises(ValueError, match="feats must be finite, got NaN or infinity for 1.jpg"):
            model.scores(*arguments)
    with pytest.raises(ValueError, match="feats must be finite, got NaN or infinity for 1.jpg"):
        model.scores(good, bad, shortlist=1)


@pytest.mark.parametrize("version", VERSIONS)
def test_distances_are_what_reranking_takes(version):
    model, q, g = small(version=version).float(), features(unit_maps(5, 1)), features(unit_maps(7, 2))
    pairs = (q, q), (q, g), (g, g)
    found = tuple(model.distances(*pair) for pair in pairs)
    for distance, scores in zip(found, (model.scores(*pair) for pair in pairs), strict=True):
        by_hand = 1 - scores if version == "1.0" else 1 / (1 + np.exp(scores / 10))
        assert distance.dtype == np.float32 and np.abs(distance - by_hand).max() < 1e-6
        assert (np.argsort(distance, 1) == np.argsort(-scores, 1)).all()
    assert rerank(q, g, k1=3, k2=2, distances=found).shape == (5, 7)


@pytest.mark.parametrize("version", VERSIONS)
def test_correspondences(version):
    model = small(version=version)
    query, gallery = unit_maps(2, 3)
    found = model.correspondences(query, gallery * 5)
    state = state_of(model)
    for row in range(3):
        for column in range(2):
            here = [[(query[:, row, column] * gallery[:, i, j]).sum().item() for j in range(2)] for i in range(3)]
            i, j = found.place[row, column].tolist()
            assert here[i][j] == max(map(max, here))
            close(found.similarity[row, column].item(), here[i][j])
    # The other half adds what the gallery's positions find.
    weight = state["matcher.fc.weight"][0]
    turned = model.correspondences(gallery, query)
    others = norm(state, "matcher.bn", turned.similarity.view(1, 1, -1), [0, 2], False).flatten() * weight[:L]
    bias = state["matcher.fc.bias"] * (1 if version == "1.0" else 2)
    whole = found.contribution.sum() + others.sum() + bias
    logit = norm(state, "matcher.logit_bn", whole.view(1, 1), [0], False)
    close(logit, logits_by_hand(state, query[None].flatten(2), gallery[None].flatten(2), version))
    assert model.training and found.place.shape == (3, 2, 2)
    with pytest.raises(ValueError, match=r"gallery_map must have shape \(4, 3, 2\), got \(4, 2, 3\)"):
        model.correspondences(query, gallery.transpose(1, 2))


# The published nets and files.


def trunk(depth):
    """Parameters of a ResNet up to layer3, block by block."""
    total = 3 * 64 * 49 + 2 * 64
    inputs = 64
    for stage, blocks in enumerate(BLOCKS[depth][:3]):
        width = 64 << stage
        total += inputs * 4 * width + 2 * 4 * width  # short-cut
        for _ in range(blocks):
            total += inputs * width + 9 * width * width + 4 * width * width + 2 * (width + width + 4 * width)
            inputs = 4 * width
    return total


@pytest.mark.parametrize(
    ("make", "version", "depth", "more", "count"),
    [
        (qaconv50, "1.0", 50, 2 * 128, 9_723_200),
        (qaconv152, "1.0", 152, 2 * 128, 44_358_976),
        (qaconv50_ibn_b, "2.1", 50, 128 + 2 * (256 + 512), 9_724_608),  # two blocks have a third norm
    ],
)
def test_parameters(make, version, depth, more, count):
    with torch.device("meta"):
        model = make(7)
        feats = model.eval()(torch.zeros(2, 3, 384, 128))
    of_matcher = sum(p.numel() for p in model.matcher.parameters())
    total = sum(p.numel() for p in model.parameters())
    assert of_matcher == (389 if version == "1.0" else 197)
    assert total - of_matcher == trunk(depth) + 1024 * 128 * 9 + more == count
    assert model.version == version and model.map_shape == (128, 24, 8)
    assert feats.shape == (2, 128 * 24 * 8)
    heads = {"base", "neck_conv", "neck_bn", "matcher", "class_memory"} - (
        {"neck_bn", "class_memory"} if version == "2.1" else set()
    )
    assert {name.partition(".")[0] for name in model.state_dict()} == heads
    if version == "1.0":
        assert model.class_memory.shape == (7, 128, 24, 8)


def test_factories_pass_options_on(monkeypatch):
    monkeypatch.setattr(qaconv, "ResNet", lambda *args, **kwargs: Patches())
    for make in (qaconv50, qaconv152, qaconv50_ibn_b):
        model = make(3, version="1.0", height=64, width=32, form="paper", neck="official")
        assert model.version == "1.0" and model.size == (64, 32) and model.map_shape == (128, 4, 2)
        assert model.empty == "paper" and model.neck_conv.kernel_size == (3, 3) and model.num_classes == 3
        assert make(version="1.0", empty="paper").empty == "paper"
        assert make(version="2.1").matcher.symmetric


@functools.cache
def whole_resnet(depth, ibn):
    with torch.device("meta"):
        return ResNet(depth, ibn=ibn).state_dict()


@pytest.fixture
def cached(monkeypatch):
    """Nets built once for all files; no more is read of them than keys and shapes."""
    for name, make in CACHED.items():
        monkeypatch.setattr(qaconv, name, make)


CACHED = {name: functools.cache(getattr(qaconv, name)) for name in ("qaconv50", "qaconv152", "qaconv50_ibn_b")}


def published(depth=50, ibn=None, version="1.0", ids=3, rows=24, columns=8):
    """As the published code saves: the whole ResNet, and the criterion apart. On meta, but what is looked at."""
    with torch.device("meta"):
        state = {f"base.{key}": tensor for key, tensor in whole_resnet(depth, ibn).items()}
        state |= {"base.fc.weight": torch.zeros(1000, 2048), "base.fc.bias": torch.zeros(1000)}
        neck = nn.Conv2d(1024, 128, 3, padding=1, bias=version == "2.1")
        state |= {f"neck_conv.{key}": tensor for key, tensor in neck.state_dict().items()}
    prefix = "matcher." if version == "2.1" else ""
    criterion = {}
    if version == "1.0":
        state |= {f"neck_bn.{key}": tensor for key, tensor in nn.BatchNorm2d(128).state_dict().items()}
        maps = torch.randn(ids, 128, rows, columns, generator=torch.Generator().manual_seed(0))
        maps[-1] = 0
        criterion["class_memory"] = maps
    fc = nn.Linear(rows * columns * (1 if version == "2.1" else 2), 1)
    for name, layer in (("bn", nn.BatchNorm1d(1)), ("fc", fc), ("logit_bn", nn.BatchNorm1d(1))):
        criterion |= {f"{prefix}{name}.{key}": tensor for key, tensor in layer.state_dict().items()}
    return state, criterion


@pytest.mark.parametrize(
    ("options", "name", "kwargs"),
    [
        ({}, "qaconv50", {}),
        ({"depth": 152}, "qaconv152", {}),
        ({"ibn": "b", "version": "2.1"}, "qaconv50_ibn_b", {}),
        ({"version": "2.1"}, "qaconv50", {"version": "2.1"}),
        ({"ibn": "b"}, "qaconv50_ibn_b", {"version": "1.0"}),
        ({"rows": 8, "columns": 4}, "qaconv50", {"height": 128, "width": 64}),
        ({"ibn": "b", "version": "2.1", "rows": 12, "columns": 4}, "qaconv50_ibn_b", {"height": 192, "width": 64}),
    ],
)
def test_published_files(options, name, kwargs, cached):
    state, criterion = published(**options)
    assert any(key.startswith("base.layer4.") for key in state)
    found = from_official(state, criterion)
    old = options.get("version", "1.0") == "1.0"
    assert found[:2] == (name, kwargs) and found[3] == (3 if old else 0)
    with torch.device("meta"):
        model = getattr(qaconv, name)(found[3], **kwargs)
    own = model.state_dict()
    assert list(found[2]) == list(own)
    assert all(found[2][key].shape == tensor.shape for key, tensor in own.items())
    left_out = {key for key in state if key not in own}
    assert left_out and all(key.startswith(("base.layer4.", "base.fc.")) for key in left_out)
    for key, tensor in found[2].items():
        if key.startswith("matcher."):
            assert tensor is criterion[key.removeprefix("matcher.") if old else key]
        elif key != "class_memory":
            assert tensor is state[key]
    if old:
        memory, raw = found[2]["class_memory"], criterion["class_memory"]
        close(memory[:2].norm(dim=1), torch.ones(2, *raw.shape[2:]), 1e-5)
        close(memory * raw.norm(dim=1, keepdim=True), raw, 1e-5)
        assert not memory[2].any()


def test_published_files_that_do_not_fit(cached):
    def wrong(message, change, **options):
        state, criterion = published(**options)
        change(state, criterion)
        with pytest.raises(ValueError, match=f"^{message}"):
            from_official(state, criterion)

    wrong("neck_bn.bias is missing for qaconv50, version 1.0$", lambda s, c: s.pop("neck_bn.bias"))
    wrong("fc.weight is missing for qaconv50", lambda s, c: c.pop("fc.weight"))
    wrong("matcher.fc.bias is missing for qaconv50", lambda s, c: c.pop("matcher.fc.bias"), version="2.1")
    wrong("base.layer2.1.bn2.weight is missing", lambda s, c: s.pop("base.layer2.1.bn2.weight"))
    wrong("neck_bn.extra is unknown to qaconv50", lambda s, c: s.update({"neck_bn.extra": torch.zeros(1)}))
    wrong("extra is unknown to qaconv50", lambda s, c: c.update(extra=torch.zeros(1)))
    wrong("class_memory must be .* got None$", lambda s, c: c.pop("class_memory"))
    wrong(
        r"neck_conv.weight must have shape \(128, 1024, 3, 3\) for qaconv50, got \(64, 1024, 3, 3\)$",
        lambda s, c: s.update({"neck_conv.weight": torch.zeros(64, 1024, 3, 3)}),
    )
    wrong(
        r"class_memory must have shape \(3, 128, 24, 8\)", lambda s, c: c.update(class_memory=torch.zeros(3, 9, 24, 8))
    )
    wrong("matcher.fc.weight must have shape", lambda s, c: None, version="2.1", rows=5, columns=5)
    wrong("base.layer3 must have 6 blocks, or without IBN 36, got 23$", lambda s, c: None, depth=101)
    wrong("base.layer1.0.bn1.weight is missing", lambda s, c: None, ibn="a")


def test_a_published_file_gives_the_same_model():
    """A net of version 1.0 cut into the two dictionaries and put together again."""
    torch.manual_seed(0)
    model = qaconv50(2, height=32, width=16).eval()
    filled_memory = F.normalize(torch.randn(2, 128, 2, 1), dim=1)
    model.class_memory.copy_(filled_memory)
    own = state_of(model)
    criterion = {key.removeprefix("matcher."): t for key, t in own.items() if key.startswith(("matcher.", "class_"))}
    state = {key: tensor for key, tensor in own.items() if key.startswith(("base.", "neck_"))}
    name, kwargs, tensors, ids = from_official(state, criterion)
    again = getattr(qaconv, name)(ids, **kwargs).eval()
    again.load_state_dict(tensors)
    with torch.no_grad():
        assert torch.equal(again(torch.ones(1, 3, 32, 16)), model(torch.ones(1, 3, 32, 16)))
    close(again.class_memory, filled_memory, 1e-6)


def test_heads_are_what_the_trainer_takes():
    output = filled(small())(crops())
    assert isinstance(output, Heads) and output.logits[0].argmax(1).shape == (4,)
