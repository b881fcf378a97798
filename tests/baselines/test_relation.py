"""The relation network against its book form: one vector at a time, from a state dict and a map; published counts."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from reid3d.baselines.image_model import Heads
from reid3d.baselines.relation import RelationNet, relation_f, relation_s
from reid3d.baselines.resnet import ResNet

from .test_resnet import torchvision_layout

CLASSES, DIM = 5, 4
SWITCHES = ("contrast", "reduction", "cross_entropy", "triplet")


class Patches(nn.Module):
    """Stands in for ResNet: patches of 16 x 16 pixels, each a pixel of the map."""

    channels = 6

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, self.channels, 16, 16)

    def forward(self, x):
        return F.relu(self.conv(x))


def small(strips=(6, 4, 2), num_classes=CLASSES, **forms):
    """A model in float64 in which no two norms and classifiers are alike; equal weights whatever the forms, by name."""
    model = RelationNet(Patches(), strips, num_classes, dim=DIM, **forms).double()
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                generator = torch.Generator().manual_seed(sum(map(ord, name)) + 31 * len(name))
                value.copy_(torch.randn(value.shape, generator=generator, dtype=torch.float64) / 2)
                if name.endswith(("running_var", "1.weight")):
                    value.abs_().add_(0.3)
    return model


def crops(batch=7, height=192, width=32, seed=0):
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def book(model, images, training, strips=(6, 4, 2), contrast="official"):
    """q of the relations in the published order, and p and r beside them, each with the name of its classifier."""
    state = model.state_dict()
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[
        ..., None, None
    ].double()  # float32's, as all
    maps = model.base((images - mean) / std)

    def layer(name, x):
        y = x @ state[f"{name}.0.weight"][:, :, 0, 0].T + state[f"{name}.0.bias"]
        if f"{name}.1.weight" not in state:
            return y
        centre, spread = state[f"{name}.1.running_mean"], state[f"{name}.1.running_var"]
        if training:
            centre, spread = y.mean(0), y.var(0, unbiased=False)
        y = (y - centre) / (spread + 1e-5).sqrt() * state[f"{name}.1.weight"] + state[f"{name}.1.bias"]
        return y.clamp(min=0)

    def relation(names, own, rest):
        p, r = layer(names[0], own), layer(names[1], rest)
        return p + layer(names[2], torch.cat((p, r), 1)), p, r

    local, whole = [], []
    for n in strips:
        tall = maps.shape[2] // n
        parts = [maps[:, :, i * tall : (i + 1) * tall].amax((2, 3)) for i in range(n)]
        for i in range(n):
            rest = sum(parts[j] for j in range(n) if j != i) / (n - 1)
            q, p, r = relation([f"{x}_{n}_conv_list.{i}" for x in ("local", "rest", "relation")], parts[i], rest)
            local.append([(f"fc_local_rest_{n}_list.{i}", q), (f"fc_local_{n}_list.{i}", p)])
            local[-1].append((f"fc_rest_{n}_list.{i}", r))
        most = maps.amax((2, 3))
        besides = sum(parts) / n - most if contrast == "paper" else (sum(parts) - most) / (n - 1)
        q, p, r = relation([f"global_{n}_{x}_conv_list.0" for x in ("max", "rest", "pooling")], most, besides)
        whole.append([(f"fc_global_{n}_list.0", q), (f"fc_global_max_{n}_list.0", p)])
        whole[-1].append((f"fc_global_rest_{n}_list.0", r))
    return local + whole


def book_logits(model, relations, vectors=(0, 1, 2)):
    state, found = model.state_dict(), []
    for relation in relations:
        for name, x in (relation[i] for i in vectors):
            found.append(x @ state[f"{name}.weight"].T + state[f"{name}.bias"])
    return found


def book_triplet(feats, labels, margin):
    losses = []
    for anchor, label in zip(feats, labels, strict=True):
        dist = [math.sqrt(sum((anchor - other).square().tolist())) for other in feats]
        positive = [d for d, other in zip(dist, labels, strict=True) if other == label]
        negative = [d for d, other in zip(dist, labels, strict=True) if other != label]
        losses.append(max(0.0, max(positive) - min(negative) + margin))
    return sum(losses) / len(losses)


def book_cross_entropy(logits, labels):
    rows = zip(logits.tolist(), labels.tolist(), strict=True)
    losses = [math.log(sum(math.exp(x) for x in row)) - row[label] for row, label in rows]
    return sum(losses) / len(losses)


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("strips", [(6, 4, 2), (6,), (3, 2)])
def test_eval_agrees_with_the_book(strips):
    model = small(strips).eval()
    relations = book(model, crops(), False, strips)
    feats = model(crops())
    assert feats.shape == (7, DIM * (sum(strips) + len(strips)))
    close(feats, torch.cat([relation[0][1] for relation in relations], 1))


@pytest.mark.parametrize("strips", [(6, 4, 2), (6,)])
def test_training_agrees_with_the_book(strips):
    model = small(strips).train()
    relations = book(model, crops(), True, strips)
    feats, logits = model(crops())
    assert len(feats) == sum(strips) + len(strips) and len(logits) == 3 * len(feats)
    close(list(feats), [relation[0][1] for relation in relations])
    close(list(logits), book_logits(model, relations))


def test_loss_agrees_with_the_book():
    """The sum of 15 triplet losses, and twice that of 45 cross-entropies."""
    model = small().train()
    labels = torch.tensor([0, 1, 0, 4, 1, 4, 4])
    terms = model.loss(model(crops()), labels)
    relations = book(model, crops(), True)
    triplets = [book_triplet(relation[0][1], labels, 1.2) for relation in relations]
    entropies = [book_cross_entropy(logits, labels) for logits in book_logits(model, relations)]
    assert (len(triplets), len(entropies)) == (15, 45) and 0 < min(triplets)
    assert list(terms) == ["cross_entropy", "triplet"]
    assert terms["triplet"].item() == pytest.approx(sum(triplets), rel=1e-10)
    assert terms["cross_entropy"].item() == pytest.approx(2 * sum(entropies), rel=1e-10)


def test_contrast_of_paper_and_code():
    """With the maps at hand: what the reduction is given. It is <= 0 in the paper, >= 0 in the code."""
    given = {}
    for way in ("official", "paper"):
        model = small(contrast=way).eval()
        for n in (6, 4, 2):
            layer = getattr(model, f"global_{n}_rest_conv_list")[0]
            layer.register_forward_hook(lambda _, inputs, __, n=n, way=way: given.update({(way, n): inputs[0]}))
        feats = model(crops())
        close(feats, torch.cat([relation[0][1] for relation in book(model, crops(), False, contrast=way)], 1))
        given[way] = feats
        assert all((given[way, n] >= 0).all() if way == "official" else (given[way, n] <= 0).all() for n in (6, 4, 2))
    local, whole = slice(0, 12 * DIM), slice(12 * DIM, None)
    assert torch.equal(given["official"][:, local], given["paper"][:, local])
    assert not torch.isclose(given["official"][:, whole], given["paper"][:, whole]).all()


@pytest.mark.parametrize("training", [False, True])
def test_reduction_of_paper_and_code(training):
    """The paper's has no norm and no ReLU behind p and r; the relation has them in both."""
    official, paper = small(reduction="official").train(training), small(reduction="paper").train(training)
    dropped = official.state_dict().keys() - paper.state_dict().keys()
    assert len(dropped) == 2 * 15 * 5 and not any("relation" in key or "pooling" in key for key in dropped)
    relations, output = book(paper, crops(), training), paper(crops())
    q = [relation[0][1] for relation in relations]
    close(torch.cat(output.feats, 1) if training else output, torch.cat(q, 1))
    if training:
        close(list(output.logits), book_logits(paper, relations))
    assert min(relation[1][1].min() for relation in relations) < 0
    assert min(relation[1][1].min() for relation in book(official, crops(), training)) == 0
    other = official(crops())
    assert not torch.isclose(torch.cat(other.feats, 1) if training else other, torch.cat(q, 1)).all()


def test_cross_entropy_of_paper_and_code():
    """The paper has classifiers of q alone."""
    official, paper = small().train(), small(cross_entropy="paper").train()
    of_q = {f"fc_local_rest_{n}_list.{i}" for n in (6, 4, 2) for i in range(n)} | {
        f"fc_global_{n}_list.0" for n in (6, 4, 2)
    }
    assert {key.rpartition(".")[0] for key in paper.state_dict() if key.startswith("fc_")} == of_q
    labels = torch.tensor([0, 1, 0, 4, 1, 4, 4])
    output = paper(crops())
    logits = book_logits(paper, book(paper, crops(), True), vectors=(0,))
    assert len(logits) == 15
    close(list(output.logits), logits)
    got, other = paper.loss(output, labels), official.loss(official(crops()), labels)
    assert got["cross_entropy"].item() == pytest.approx(
        2 * sum(book_cross_entropy(x, labels) for x in logits), rel=1e-10
    )
    assert got["triplet"] == other["triplet"] and got["cross_entropy"] < 0.9 * other["cross_entropy"]


def test_triplet_of_paper_and_code():
    """The paper's is of the descriptor."""
    official, paper = small().train(), small(triplet="paper").train()
    labels = torch.tensor([0, 1, 0, 4, 1, 4, 4])
    output = paper(crops())
    joined = torch.cat([relation[0][1] for relation in book(paper, crops(), True)], 1)
    close(list(output.feats), [joined])
    got, other = paper.loss(output, labels), official.loss(official(crops()), labels)
    assert got["triplet"].item() == pytest.approx(book_triplet(joined, labels, 1.2), rel=1e-10)
    assert got["cross_entropy"] == other["cross_entropy"] and got["triplet"] < 0.9 * other["triplet"]


def test_form_sets_all_the_switches_and_each_may_differ():
    def shape(model):
        """What each switch makes of the model: contrast, layers behind a reduction, logits and metric features."""
        heads = model.train()(crops())
        return model.contrast, len(model.local_6_conv_list[0]), len(heads.logits), len(heads.feats)

    shapes = {"official": ("official", 3, 45, 15), "paper": ("paper", 1, 15, 1)}
    assert shape(small()) == shapes["official"]
    for form, other in (("official", "paper"), ("paper", "official")):
        assert shape(small(form=form)) == shapes[form]
        for i, switch in enumerate(SWITCHES):
            mixed = shapes[form][:i] + shapes[other][i : i + 1] + shapes[form][i + 1 :]
            assert shape(small(form=form, **{switch: other})) == mixed


def test_all_forms_of_the_paper_agree_with_the_book():
    model = small(form="paper").train()
    relations = book(model, crops(), True, contrast="paper")
    feats, logits = model(crops())
    close(feats[0], torch.cat([relation[0][1] for relation in relations], 1))
    close(list(logits), book_logits(model, relations, vectors=(0,)))


def official_keys(classes):
    """Names and shapes of the published model, 384 x 128 pixels, in full."""
    layout = {f"base.{key}": shape for key, shape in torchvision_layout(50).items()}

    def unit(name, inputs):
        layout.update(
            {f"{name}.0.weight": (256, inputs, 1, 1), f"{name}.0.bias": (256,), f"{name}.1.num_batches_tracked": ()}
        )
        layout.update({f"{name}.1.{key}": (256,) for key in ("weight", "bias", "running_mean", "running_var")})

    def linear(name):
        layout.update({f"{name}.weight": (classes, 256), f"{name}.bias": (classes,)})

    for n in (2, 4, 6):
        for i in range(n):
            unit(f"local_{n}_conv_list.{i}", 2048)
            unit(f"rest_{n}_conv_list.{i}", 2048)
            unit(f"relation_{n}_conv_list.{i}", 512)
            linear(f"fc_local_{n}_list.{i}")
            linear(f"fc_rest_{n}_list.{i}")
            linear(f"fc_local_rest_{n}_list.{i}")
        unit(f"global_{n}_max_conv_list.0", 2048)
        unit(f"global_{n}_rest_conv_list.0", 2048)
        unit(f"global_{n}_pooling_conv_list.0", 512)
        linear(f"fc_global_{n}_list.0")
        linear(f"fc_global_max_{n}_list.0")
        linear(f"fc_global_rest_{n}_list.0")
    return layout


def test_state_dict_is_the_published_one():
    expected = official_keys(751)
    assert len(expected) == 723
    with torch.device("meta"):
        state = relation_f(751).state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == expected
    without = {key for key in expected if not key.startswith("fc_")}
    with torch.device("meta"):
        assert relation_f().state_dict().keys() == without
        small_one = {key for key in expected if key.startswith("base.") or "_6_" in key}
        assert relation_s(751).state_dict().keys() == small_one


@pytest.mark.parametrize(
    ("factory", "num_classes", "count"),
    [
        (relation_s, 0, 31_781_696),
        (relation_f, 0, 41_237_312),
        (relation_f, 702, 49_355_942),
        (relation_f, 751, 49_922_627),
        (relation_f, 767, 50_107_667),
    ],
)
def test_parameter_counts(factory, num_classes, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in factory(num_classes).parameters()) == count


@pytest.mark.parametrize(("factory", "dims", "multiple"), [(relation_s, 256 * 7, 96), (relation_f, 256 * 15, 192)])
def test_published_sizes(factory, dims, multiple):
    with torch.device("meta"):
        model = factory(751)
        assert model.inputs == "image" and model.size == (384, 128) and model.flip and model.normalised
        assert model.size[0] % multiple == 0
        model.eval()
        for height in (384, multiple):
            assert model(torch.zeros(2, 3, height, 128)).shape == (2, dims)
        heads = model.train()(torch.zeros(2, 3, multiple, 32))
    assert [feats.shape for feats in heads.feats] == [(2, 256)] * (dims // 256)
    assert [logits.shape for logits in heads.logits] == [(2, 751)] * (3 * dims // 256)


def test_backbone_and_classifiers_by_name():
    with torch.device("meta"):
        model, backbone = relation_s(751), ResNet(50, last_stride=1)
    state, given = model.state_dict(), backbone.state_dict()
    targets = {name: value.shape for key, value in given.items() for name in model.of_backbone(key)}
    assert len(targets) == len(given)
    assert targets == {name: value.shape for name, value in state.items() if name.startswith(model.backbone)}
    changed = {name for name, value in state.items() if 751 in value.shape}
    assert changed == {name for name in state if name.startswith(model.classifiers)} and len(changed) == 2 * 21


def test_initialisation():
    torch.manual_seed(0)
    model = RelationNet(Patches(), (6, 4, 2), 200, dim=64)
    weights = [value for name, value in model.named_parameters() if name.startswith("fc_") and name.endswith("weight")]
    assert len(weights) == 45 and len({value[0, 0].item() for value in weights}) == 45
    assert all(abs(value.std().item() / 0.001 - 1) < 0.05 for value in weights)
    biases = [value for name, value in model.named_parameters() if name.startswith("fc_") and name.endswith("bias")]
    assert len(biases) == 45 and not any(value.any() for value in biases)


def behind_norm(relations, *roles):
    names = {"own": ("local", "max"), "rest": ("rest", "rest"), "both": ("relation", "pooling")}
    local, whole = zip(*(names[role] for role in roles), strict=True)
    return {f"{x}_{n}_conv_list.{i}.0.bias" for x in local for n in relations for i in range(n)} | {
        f"global_{n}_{x}_conv_list.0.0.bias" for x in whole for n in relations
    }


@pytest.mark.parametrize(
    ("forms", "roles"),
    [
        ({}, ("own", "rest", "both")),
        # p is seen by a classifier, and so is its bias; r only by the relation, whose norm takes away what is constant.
        ({"form": "paper"}, ("rest", "both")),
        ({"form": "paper", "cross_entropy": "official"}, ("both",)),
    ],
)
def test_every_parameter_but_biases_before_norm_gets_a_gradient(forms, roles):
    model = small(**forms).train()
    labels = torch.tensor([0, 1, 0, 4, 1, 4, 4])
    sum(model.loss(model(crops()), labels).values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    without = {name for name, p in model.named_parameters() if p.grad.abs().max() < 1e-12}
    assert without == behind_norm((6, 4, 2), *roles)


@pytest.mark.parametrize("labels", [[0, 1, 2, 3, 4], [2, 2, 2, 2, 2]])
def test_triplets_are_zero_without_pairs(labels):
    for triplet in ("official", "paper"):
        model = small(triplet=triplet).train()
        terms = model.loss(model(crops(5)), torch.tensor(labels))
        assert terms["triplet"].item() == 0 and terms["cross_entropy"] > 0
        sum(terms.values()).backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        assert model.base.conv.weight.grad.abs().max() > 0


def test_losses_of_half_precision_are_taken_in_float32():
    model = small((6,)).train()
    output = model(crops())
    half = Heads(tuple(x.bfloat16() for x in output.feats), tuple(x.bfloat16() for x in output.logits))
    again = Heads(tuple(x.float() for x in half.feats), tuple(x.float() for x in half.logits))
    labels = torch.tensor([0, 1, 0, 4, 1, 4, 4])
    got, expected = model.loss(half, labels), model.loss(again, labels)
    assert all(got[name].dtype == torch.float32 and torch.equal(got[name], expected[name]) for name in expected)


def test_images_are_described_each_for_itself():
    model = small().eval()
    feats = model(crops())
    close(torch.cat([model(image[None]) for image in crops()]), feats)
    assert model(crops(0)).shape == (0, 15 * DIM)


def test_without_classes_there_are_no_logits_and_no_loss():
    model = small(num_classes=0).train()
    output = model(crops())
    assert len(output.feats) == 15 and output.logits == ()
    with pytest.raises(ValueError, match="num_classes must be at least 1 for a loss, got 0"):
        model.loss(output, torch.zeros(7, dtype=torch.int64))


@pytest.mark.parametrize(("strips", "multiple"), [((6,), 96), ((6, 4, 2), 192), ((4, 2), 64), ((3, 2), 96)])
def test_heights_that_the_strips_cannot_divide(strips, multiple):
    model = small(strips).eval()
    assert len(model(crops(1, multiple))) == len(model(crops(1, 2 * multiple))) == 1
    for height in (multiple - 16, multiple + 16, multiple - 1, multiple // 2, 0):
        with pytest.raises(ValueError, match=f"^height must be a multiple of {multiple}, got {height}$"):
            model(crops(1, height))


def test_bad_input():
    model = small((6,)).train()
    with pytest.raises(ValueError, match="images must be at least 2 in training mode, for BatchNorm, got 1"):
        model(crops(1))
    output = model(crops(3))
    for bad, value in (([0, 5, 1], 5), ([0, -1, 1], -1), ([-100, 0, 1], -100)):
        with pytest.raises(ValueError, match=rf"labels must be in \[0, 5\), got {value}"):
            model.loss(output, torch.tensor(bad))
    with pytest.raises(ValueError, match=r"labels must have shape \(3,\)"):
        model.loss(output, torch.tensor([0, 1]))
    with pytest.raises(TypeError, match="labels must be an int64 tensor"):
        model.loss(output, torch.tensor([0, 1, 1], dtype=torch.int32))
    for strips in ((), (6, 1), (0,), (6, 2, 6)):
        with pytest.raises(ValueError, match="strips must be one or more different numbers of at least 2, got"):
            RelationNet(Patches(), strips)
    with pytest.raises(ValueError, match="num_classes must be at least 0, got -1"):
        RelationNet(Patches(), (6,), -1)
    for name in ("form", *SWITCHES):
        with pytest.raises(ValueError, match=f"^{name} must be 'official' or 'paper', got 'code'$"):
            RelationNet(Patches(), (6,), **{name: "code"})


# The paper's ablations.


def test_without_relations_a_feature_is_its_part_reduced():
    """q_i = p_i, and q_0 the maximum reduced, in the forms of the same weights by name; the rest is not there."""
    whole, cut = small((6, 2)).eval(), small((6, 2), relate=False, contrastive=False).eval()
    wanted = set(whole.state_dict())
    for kind in ("rest_6_conv", "rest_2_conv", "relation", "global_6_rest", "global_2_rest", "pooling"):
        wanted = {key for key in wanted if kind not in key}
    gone = ("fc_local_6_", "fc_local_2_", "fc_rest_", "fc_global_max", "fc_global_rest")
    assert set(cut.state_dict()) == {key for key in wanted if not key.startswith(gone)}
    images = crops()
    features = cut(images)
    close(features, torch.cat([relation[1][1] for relation in book(whole, images, False, (6, 2))], 1))
    output = cut.train()(images)
    assert len(output.logits) == 6 + 2 + 2 and output.feats[0].shape == (7, DIM)
    classifier = cut.fc_local_rest_6_list[0]
    close(output.logits[0], classifier(output.feats[0]))


@pytest.mark.parametrize("relate", [False, True])
def test_each_relation_may_be_left_out_alone(relate):
    model, full = small(relate=relate, contrastive=not relate).eval(), small().eval()
    got, expected = model(crops()), full(crops())
    local = 12 * DIM
    same, other = (slice(0, local), slice(local, None)) if relate else (slice(local, None), slice(0, local))
    close(got[:, same], expected[:, same])
    assert (got[:, other] - expected[:, other]).abs().max() > 1e-3
