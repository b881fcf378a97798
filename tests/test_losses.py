"""The losses against loops written from their formulas and a library, then awkward batches, properties, and errors."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from pytorch_metric_learning import losses as pml
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.miners import BatchHardMiner
from pytorch_metric_learning.reducers import MeanReducer
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from reid3d.losses import circle_loss, contrastive_loss, instance_loss, triplet_loss

LOSSES = {
    "circle": circle_loss,
    "circle of the batch": partial(circle_loss, over="batch"),
    "triplet": triplet_loss,
    "soft triplet": partial(triplet_loss, margin=None),
    "contrastive": contrastive_loss,
    "instance": instance_loss,
    "instance, no labels": lambda feats, labels, **kwargs: instance_loss(feats, **kwargs),
}
LABELS = {  # of ordinary batches; some people have a single sample
    "pairs": [0, 0, 1, 1, 2, 2, 3, 3],
    "mixed": [7, -1, 7, 3, 3, 7, 5, 9],
    "two people": [1, 0, 0, 0, 0, 0, 0, 0],
}
# What has no pair to learn from.
NOTHING = {
    "no sample": ([], ["circle", "circle of the batch", "triplet", "soft triplet", "contrastive", "instance"]),
    "one sample": ([3], ["circle", "circle of the batch", "triplet", "soft triplet", "contrastive", "instance"]),
    "no positive": ([4, 1, 2, 3], ["circle", "circle of the batch", "triplet", "soft triplet"]),
    "one identity": ([5, 5, 5, 5], ["circle", "circle of the batch", "triplet", "soft triplet", "instance"]),
}


def batch(labels, device, dims=5, dtype=torch.float64, seed=0):
    """Vectors of unequal lengths about a common direction, so that similarities are of both signs."""
    rng = torch.Generator().manual_seed(seed)
    feats = 1.5 * torch.randn(len(labels), dims, generator=rng, dtype=torch.float64) + 0.5
    return feats.to(device, dtype).requires_grad_(), torch.tensor(labels, dtype=torch.int64, device=device)


def value_and_gradient(loss, feats, labels, autocast=False, **kwargs):
    leaf = feats.detach().clone().requires_grad_()
    with torch.autocast(feats.device.type, dtype=torch.bfloat16, enabled=autocast):
        value = loss(leaf, labels, **kwargs)
    assert value.shape == () and value.requires_grad
    value.backward()
    return value.detach(), leaf.grad


# The formulas, in plain Python.


def units(feats):
    return [[x / (math.hypot(*row) or 1.0) for x in row] for row in feats]


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def slow_circle(feats, labels, margin=0.25, gamma=64.0, over="anchors", weights_of=None):
    """`weights_of`: the feats that the weights are computed from, which the gradient takes as constants."""
    unit, fixed = units(feats), units(feats if weights_of is None else weights_of)
    anchors, everything = [], ([], [])
    for i in range(len(labels)):
        positives, negatives = [], []
        for j in range(len(labels)):
            s, frozen = dot(unit[i], unit[j]), dot(fixed[i], fixed[j])
            if labels[i] != labels[j]:
                term, to = math.exp(gamma * max(frozen + margin, 0) * (s - margin)), 1
            elif i != j:
                term, to = math.exp(-gamma * max(1 + margin - frozen, 0) * (s - (1 - margin))), 0
            else:
                continue
            (positives, negatives)[to].append(term)
            if i < j:
                everything[to].append(term)
        if positives and negatives:
            anchors.append(math.log1p(sum(positives) * sum(negatives)))
    if over == "batch":
        return math.log1p(sum(everything[0]) * sum(everything[1])) / len(labels)
    return sum(anchors) / max(len(anchors), 1)


def slow_triplet(feats, labels, margin=0.3):
    anchors = []
    for i in range(len(labels)):
        positives = [math.dist(feats[i], feats[j]) for j in range(len(labels)) if labels[j] == labels[i] and j != i]
        negatives = [math.dist(feats[i], feats[j]) for j in range(len(labels)) if labels[j] != labels[i]]
        if positives and negatives:
            gap = max(positives) - min(negatives)
            anchors.append(math.log1p(math.exp(gap)) if margin is None else max(gap + margin, 0))
    return sum(anchors) / max(len(anchors), 1)


def slow_contrastive(feats, labels, margin=1.0):
    unit, positives, negatives = units(feats), [], []
    for i in range(len(labels)):
        for j in range(len(labels)):
            d = math.dist(unit[i], unit[j])
            if labels[i] != labels[j]:
                negatives.append(max(margin - d, 0))
            elif i != j:
                positives.append(d)
    total = 0.0
    for terms in (positives, negatives):
        active = [term for term in terms if term > 0]
        total += sum(active) / max(len(active), 1)
    return total


def slow_instance(feats, labels=None, scale=32.0):
    unit = units(feats)
    if labels is not None:
        people = sorted(set(labels))
        of = {p: [row for row, label in zip(unit, labels, strict=True) if label == p] for p in people}
        unit = units([[sum(column) / len(of[p]) for column in zip(*of[p], strict=True)] for p in people])
    total = 0.0
    for i, row in enumerate(unit):
        own = dot(row, row)  # divides both sides of the softmax, so that a small loss keeps its digits
        total += math.log1p(sum(math.exp(scale * (dot(row, other) - own)) for j, other in enumerate(unit) if j != i))
    return total / max(len(unit), 1)


SLOW = [  # what is computed, with what it is compared, options
    (circle_loss, slow_circle, {}),
    (circle_loss, slow_circle, {"margin": 0.4, "gamma": 5.0}),
    (circle_loss, slow_circle, {"over": "batch"}),
    (circle_loss, slow_circle, {"over": "batch", "margin": 0.0, "gamma": 1.0}),
    (triplet_loss, slow_triplet, {}),
    (triplet_loss, slow_triplet, {"margin": 2.0}),
    (triplet_loss, slow_triplet, {"margin": 0}),
    (triplet_loss, slow_triplet, {"margin": None}),
    (contrastive_loss, slow_contrastive, {}),
    (contrastive_loss, slow_contrastive, {"margin": 0.3}),
    (contrastive_loss, slow_contrastive, {"margin": 2.0}),
    (instance_loss, slow_instance, {}),
    (instance_loss, slow_instance, {"scale": 1}),
]
named = pytest.mark.parametrize("name", LOSSES)
over_labels = pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)


@over_labels
@pytest.mark.parametrize(("loss", "slow", "kwargs"), SLOW)
def test_agrees_with_the_formula(loss, slow, kwargs, labels, device):
    feats, target = batch(labels, device)
    wanted = slow(feats.tolist(), labels, **kwargs)
    assert wanted > 0
    assert loss(feats, target, **kwargs).item() == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("scale", [1.0, 32.0])
def test_instance_without_labels_agrees_with_the_formula(scale, device):
    feats, _ = batch(LABELS["mixed"], device)
    assert instance_loss(feats, scale=scale).item() == pytest.approx(slow_instance(feats.tolist(), None, scale), 1e-12)


@pytest.mark.parametrize("labels", [labels for labels, _ in NOTHING.values() if labels], ids=list(NOTHING)[1:])
@pytest.mark.parametrize(("loss", "slow", "kwargs"), SLOW)
def test_agrees_with_the_formula_on_batches_that_lack_pairs(loss, slow, kwargs, labels, device):
    feats, target = batch(labels, device)
    wanted = slow(feats.tolist(), labels, **kwargs)
    assert loss(feats, target, **kwargs).item() == pytest.approx(wanted, rel=1e-12, abs=1e-14)


def test_by_hand(device):
    """On a line: 0 and 1 are of one person, 3 and 7 of another. Gaps 1 - 3, 1 - 2, 4 - 2, 4 - 6."""
    feats = torch.tensor([[0.0], [1.0], [3.0], [7.0]], device=device)
    target = torch.tensor([0, 0, 1, 1], device=device)
    assert triplet_loss(feats, target, margin=1.5).item() == pytest.approx((0 + 0.5 + 3.5 + 0) / 4)
    # Unit vectors at 0, 60 and 180 degrees, the first two of one person: distances 1, 2, 3 ** 0.5.
    feats = torch.tensor([[5.0, 0.0], [0.5, 0.75**0.5], [-2.0, 0.0]], device=device)
    target = torch.tensor([0, 0, 1], device=device)
    assert contrastive_loss(feats, target).item() == pytest.approx(1)
    assert contrastive_loss(feats, target, margin=1.9).item() == pytest.approx(1 + 1.9 - 3**0.5)
    # Similarities 1/2, -1, -1/2: without a margin the weights are 1/2, 0, 0 and the logits -1/2 * (1/2 - 1), 0, 0.
    wanted = math.log1p(2 * math.exp(0.25)) / 3
    assert circle_loss(feats, target, margin=0.0, gamma=1.0, over="batch").item() == pytest.approx(wanted)
    wanted = math.log1p(math.exp(0.25))
    assert circle_loss(feats, target, margin=0.0, gamma=1.0).item() == pytest.approx(wanted)
    # The person's mean lies at 30 degrees, 150 from the other: logits 1 and -cos 30 in both rows.
    assert instance_loss(feats, target, scale=1.0).item() == pytest.approx(math.log1p(math.exp(-(0.75**0.5) - 1)))


# pytorch-metric-learning. Its softplus is linear from 20 on, which is wrong by up to 2e-9 there.


@over_labels
@pytest.mark.parametrize(("margin", "gamma"), [(0.25, 64.0), (0.4, 80.0), (0.0, 2.0)])
def test_circle_agrees_with_pytorch_metric_learning(margin, gamma, labels, device):
    feats, target = batch(labels, device)
    ours = value_and_gradient(circle_loss, feats, target, margin=margin, gamma=gamma)
    theirs = value_and_gradient(pml.CircleLoss(m=margin, gamma=gamma), feats, target)
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)


@over_labels
@pytest.mark.parametrize("margin", [0.3, 2.0, None])
def test_triplet_agrees_with_pytorch_metric_learning(margin, labels, device):
    feats, target = batch(labels, device)
    distance = LpDistance(normalize_embeddings=False)
    mined = BatchHardMiner(distance=distance)(feats, target)
    peer = pml.TripletMarginLoss(margin or 0, smooth_loss=margin is None, distance=distance, reducer=MeanReducer())
    ours = value_and_gradient(triplet_loss, feats, target, margin=margin)
    theirs = value_and_gradient(partial(peer, indices_tuple=mined), feats, target)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@over_labels
@pytest.mark.parametrize("margin", [1.0, 0.5])
@pytest.mark.parametrize("copies", [False, True])
def test_contrastive_agrees_with_pytorch_metric_learning(copies, margin, labels, device):
    feats, target = batch(labels, device)
    if copies:  # of a sample, which are no pair that is counted, and of the sample of another person
        feats = torch.cat([feats, feats[:1], feats[-1:]])
        target = torch.cat([target, target[:1], target[:1]])
    ours = value_and_gradient(contrastive_loss, feats, target, margin=margin)
    theirs = value_and_gradient(pml.ContrastiveLoss(pos_margin=0, neg_margin=margin), feats, target)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_instance_agrees_with_pytorch_metric_learning_where_labels_count_the_samples(device):
    feats, target = batch(range(8), device)
    theirs = value_and_gradient(pml.InstanceLoss(gamma=32), feats, target)
    for labels in (None, target, target.flip(0)):  # for us, a label is a name
        ours = value_and_gradient(instance_loss, feats, labels)
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


# Gradients.


@over_labels
@pytest.mark.parametrize("name", [name for name in LOSSES if "circle" not in name])
def test_gradcheck(name, labels, device):
    feats, target = batch(labels, device)
    assert torch.autograd.gradcheck(lambda x: LOSSES[name](x, target), feats)


@over_labels
@pytest.mark.parametrize("over", ["anchors", "batch"])
def test_the_gradient_of_circle_takes_its_weights_as_constants(over, labels, device):
    """Central differences of the formula with the weights held: the loss itself has another slope."""
    feats, target = batch(labels, device)
    _, gradient = value_and_gradient(circle_loss, feats, target, gamma=8.0, over=over)
    at, step = feats.tolist(), 1e-6
    for i in range(len(labels)):
        for d in range(len(at[0])):
            moved = [[row[:] for row in at] for _ in range(2)]
            moved[0][i][d] += step
            moved[1][i][d] -= step
            high, low = (slow_circle(rows, labels, gamma=8.0, over=over, weights_of=at) for rows in moved)
            assert gradient[i, d].item() == pytest.approx((high - low) / (2 * step), rel=1e-6, abs=1e-8)


# Awkward batches.


@pytest.mark.parametrize(
    ("labels", "name"), [(labels, name) for labels, names in NOTHING.values() for name in names], ids=str
)
def test_exactly_nothing_without_pairs(labels, name, device, dtype):
    feats, target = batch(labels, device, dtype=dtype)
    with torch.autograd.set_detect_anomaly(True):  # NaN is nowhere on the way back either
        value, gradient = value_and_gradient(LOSSES[name], feats, target)
    assert value == 0
    assert gradient.shape == feats.shape and (gradient == 0).all()


@named
@pytest.mark.parametrize("kind", ["copies", "copies of all", "copy of another person", "zero", "all zero", "opposite"])
def test_finite_whatever_the_batch(kind, name, device, dtype):
    feats, target = batch(LABELS["pairs"], device, dtype=dtype)
    with torch.no_grad():
        if kind == "copies":
            feats[1] = feats[0]
        elif kind == "copies of all":
            feats[:] = feats[0].clone()
        elif kind == "copy of another person":
            feats[2] = feats[0]
        elif kind == "zero":
            feats[0] = 0
        elif kind == "all zero":
            feats.zero_()
        else:  # a person whose mean is zero
            feats[1] = -feats[0]
    with torch.autograd.set_detect_anomaly(True):
        value, gradient = value_and_gradient(LOSSES[name], feats, target)
    assert value.isfinite() and value >= 0
    assert gradient.isfinite().all() and gradient.abs().max() < 1e3


@pytest.mark.parametrize(
    ("loss", "slow", "kwargs"),
    [
        (circle_loss, slow_circle, {}),
        (contrastive_loss, slow_contrastive, {"margin": 1.5}),  # a zero vector is at 1 from all others, or about
        (instance_loss, slow_instance, {}),
    ],
)
def test_a_zero_vector_agrees_with_the_formula(loss, slow, kwargs, device):
    feats, target = batch(LABELS["mixed"], device)
    feats = feats.detach()
    feats[2] = 0
    wanted = slow(feats.tolist(), LABELS["mixed"], **kwargs)
    assert loss(feats, target, **kwargs).item() == pytest.approx(wanted, rel=1e-12)


def test_copies_share_the_gradient_of_the_hardest(device):
    feats, target = batch([0, 0, 0, 1, 1], device)
    feats = feats.detach()
    feats[2] = feats[1]
    feats[4] = feats[3]
    _, gradient = value_and_gradient(triplet_loss, feats, target, margin=10.0)
    torch.testing.assert_close(gradient[1], gradient[2])
    torch.testing.assert_close(gradient[3], gradient[4])


def test_softplus_is_exact_where_it_is_nearly_linear(device):
    """A pair at right angles, and a copy of one by another person: logits of 15/16 gamma, whose sum is 20.6."""
    feats = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]], device=device, dtype=torch.float64)
    target = torch.tensor([0, 0, 1], device=device)
    wanted = slow_circle(feats.tolist(), target.tolist(), gamma=11.0)
    assert circle_loss(feats, target, gamma=11.0).item() == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("over", ["anchors", "batch"])
@pytest.mark.parametrize("gamma", [1e3, 1e6, 1e30])
def test_large_gamma(gamma, over, device):
    """As gamma grows, loss / gamma tends to the greatest sum of two logits without gamma."""
    labels = LABELS["pairs"]
    feats, target = batch(labels, device, dtype=torch.float32)
    value, gradient = value_and_gradient(circle_loss, feats, target, gamma=gamma, over=over)
    assert gradient.isfinite().all() and gradient.abs().max() > 0
    unit, rows = units(feats.tolist()), range(len(labels))
    hardest = []
    for i in rows:
        s = [dot(unit[i], other) for other in unit]
        positive = max(-max(1.25 - s[j], 0) * (s[j] - 0.75) for j in rows if labels[j] == labels[i] and j != i)
        negative = max(max(s[j] + 0.25, 0) * (s[j] - 0.25) for j in rows if labels[j] != labels[i])
        hardest.append((positive, negative))
    if over == "batch":
        limit = max(max(p for p, _ in hardest) + max(n for _, n in hardest), 0) / len(labels)
    else:
        limit = sum(max(p + n, 0) for p, n in hardest) / len(labels)
    slack = 5 / gamma + 1e-5 * limit  # log of the number of pairs, and rounding
    assert limit - slack <= value.item() / gamma <= limit + slack


def test_well_separated_people_have_no_triplet_left(device, dtype):
    feats = torch.eye(4, device=device, dtype=dtype).repeat_interleave(2, 0) * 1e4
    target = torch.arange(4, device=device).repeat_interleave(2)
    assert triplet_loss(feats, target) == 0 and triplet_loss(feats, target, margin=None) == 0
    assert contrastive_loss(feats, target) == 0


def test_small_distances_far_from_the_origin(device):
    """A matrix product in float32 would lose them."""
    feats, target = batch(LABELS["pairs"], device, dtype=torch.float32)
    feats = feats.detach() + 1000
    assert triplet_loss(feats, target).item() == pytest.approx(triplet_loss(feats.double(), target).item(), rel=1e-6)


# Properties.


@named
@over_labels
def test_the_order_of_the_batch_changes_nothing(name, labels, device):
    feats, target = batch(labels, device)
    order = torch.tensor([3, 0, 7, 1, 6, 2, 5, 4], device=device)
    value, gradient = value_and_gradient(LOSSES[name], feats, target)
    other, moved = value_and_gradient(LOSSES[name], feats[order], target[order])
    torch.testing.assert_close(other, value, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(moved, gradient[order], rtol=1e-10, atol=1e-12)


@named
def test_lengths_matter_to_the_triplet_only(name, device):
    feats, target = batch(LABELS["mixed"], device)
    factors = torch.linspace(0.1, 9, 8, device=device, dtype=feats.dtype)[:, None]
    same = torch.isclose(LOSSES[name](feats * factors, target), LOSSES[name](feats, target), rtol=1e-12, atol=0)
    assert same.item() == ("triplet" not in name)


@named
def test_labels_are_names(name, device):
    feats, target = batch(LABELS["mixed"], device)
    renamed = (target * 1_000_003 - 2**60).neg()
    torch.testing.assert_close(LOSSES[name](feats, renamed), LOSSES[name](feats, target), rtol=1e-12, atol=0)


@named
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_widened(half, name, device):
    feats, target = batch(LABELS["mixed"], device, dtype=half)
    value, gradient = value_and_gradient(LOSSES[name], feats, target)
    wide, wide_gradient = value_and_gradient(LOSSES[name], feats.float(), target)
    assert value.dtype == torch.float32 and torch.equal(value, wide)
    assert gradient.dtype == half and torch.equal(gradient, wide_gradient.to(half))


@named
def test_autocast_changes_nothing(name, device):
    feats, target = batch(LABELS["mixed"], device, dtype=torch.float32)
    plain = value_and_gradient(LOSSES[name], feats, target)
    cast = value_and_gradient(LOSSES[name], feats, target, autocast=True)
    torch.testing.assert_close(cast, plain, rtol=0, atol=0)


@named
def test_no_value_is_waited_for(name):
    """Tensors without values, which refuse to tell one or to take a shape from one."""
    with FakeTensorMode():
        feats = torch.randn(8, 5, requires_grad=True)
        LOSSES[name](feats, torch.zeros(8, dtype=torch.int64)).backward()
        assert feats.grad.shape == (8, 5)
        with pytest.raises(DataDependentOutputException):
            feats.sum().item()


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_label_smoothing_of_torch_is_the_usual_one(smoothing, device):
    """The target is 1 - smoothing at the label, and smoothing / K at all K classes, the label's too."""
    logits, target = batch([2, 0, 4, 1], device)
    K, total = logits.shape[1], 0.0
    for row, label in zip(logits.tolist(), target.tolist(), strict=True):
        log_sum = math.log(sum(math.exp(x) for x in row))
        for k, x in enumerate(row):
            total -= ((1 - smoothing) * (k == label) + smoothing / K) * (x - log_sum)
    ours = F.cross_entropy(logits, target, label_smoothing=smoothing)
    assert ours.item() == pytest.approx(total / len(logits), rel=1e-12)


# Errors.


@named
def test_arguments_that_do_not_fit(name, device):
    feats, target = batch(LABELS["pairs"], device)
    loss = LOSSES[name]
    with pytest.raises(TypeError, match="feats must be a floating point tensor, got ndarray"):
        loss(feats.detach().cpu().numpy(), target)
    with pytest.raises(TypeError, match="feats must be a floating point tensor, got torch.int64"):
        loss(feats.long(), target)
    for wrong in (feats[0], feats[None], feats[0, 0]):
        with pytest.raises(ValueError, match="feats must have shape .B, D., got"):
            loss(wrong, target)
    if name == "instance, no labels":
        return
    with pytest.raises(TypeError, match="labels must be an int64 tensor, got list"):
        loss(feats, target.tolist())
    with pytest.raises(TypeError, match="labels must be an int64 tensor, got torch.int32"):
        loss(feats, target.int())
    for wrong in (target[:-1], target[:, None]):
        with pytest.raises(ValueError, match=r"labels must have shape \(8,\), as feats has rows, got"):
            loss(feats, wrong)
    with pytest.raises(ValueError, match=f"labels must be on the device of feats, {feats.device}, got meta"):
        loss(feats, target.to("meta"))


@pytest.mark.parametrize(
    ("loss", "argument", "rule"),
    [
        (circle_loss, "margin", "at least 0"),
        (circle_loss, "gamma", "greater than 0"),
        (triplet_loss, "margin", "at least 0"),
        (contrastive_loss, "margin", "at least 0"),
        (instance_loss, "scale", "greater than 0"),
    ],
)
def test_numbers_out_of_range(loss, argument, rule, device):
    feats, target = batch(LABELS["pairs"], device)
    for wrong in (-0.1, math.inf, math.nan, *([0.0] if "greater" in rule else [])):
        with pytest.raises(ValueError, match=f"{argument} must be finite and {rule}, got {wrong}"):
            loss(feats, target, **{argument: wrong})
    for wrong in ("1", True):
        with pytest.raises(TypeError, match=f"{argument} must be a float, got {type(wrong).__name__}"):
            loss(feats, target, **{argument: wrong})


def test_another_over(device):
    with pytest.raises(ValueError, match="over must be 'anchors' or 'batch', got 'pairs'"):
        circle_loss(*batch(LABELS["pairs"], device), over="pairs")
