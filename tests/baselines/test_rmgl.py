"""RMGL against its description, written out strip by strip, and balanced pooling against loops."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from reid3d.baselines.image_model import Heads
from reid3d.baselines.resnet import ResNet
from reid3d.baselines.rmgl import RMGL, activation_balanced_pool, rmgl

BLOCKS = (1, 2, 1, 1)


def tiny(num_classes=0, partitions=(2, 3), **changes):
    """A model of a thousandth of the size, in which nothing is trivial: statistics moved, negative scales."""
    torch.manual_seed(0)
    model = RMGL(num_classes, partitions, blocks=BLOCKS, width=4, dim=8, **changes).double()
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.dim() == 1 and tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=rng, dtype=tensor.dtype) * 0.3
                tensor.copy_(noise.exp() if name.endswith("running_var") else noise)
                if name.endswith("weight"):
                    tensor.add_(torch.where(noise < -0.3, -1.0, 1.0))
    return model


def images(batch=3, height=96, width=32, seed=0):
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Balanced pooling.


def balanced_by_loops(maps, parts, pool="max"):
    """One sample, one channel, one row after another."""
    out = []
    for sample in maps.tolist():
        height, counts = len(sample[0]), [0] * len(sample[0])
        for channel in sample:
            best, where = 0.0, None
            for y, row in enumerate(channel):
                for value in row:
                    if value > best:
                        best, where = value, y
            if where is not None:
                counts[where] += 1
        total, ends = sum(counts), [0]
        for k in range(1, parts):
            if total == 0:
                end = k * height // parts
            else:
                end = max(h for h in range(height + 1) if sum(counts[:h]) <= math.ceil(k * total / parts))
            ends.append(min(max(end, ends[-1] + 1), height - (parts - k)))
        ends.append(height)
        strips = []
        for k in range(parts):
            values = [[v for row in channel[ends[k] : ends[k + 1]] for v in row] for channel in sample]
            strips.append([max(v) if pool == "max" else math.fsum(v) / len(v) for v in values])
        out.append([list(channel) for channel in zip(*strips, strict=True)])
    return torch.tensor(out, dtype=maps.dtype)


def peaks(rows, height=4):
    """A map one pixel wide: channel c has 2 in the row rows[c], and h + 1 tenths in every other row h."""
    maps = (torch.arange(1.0, height + 1) / 10).repeat(1, len(rows), 1).unsqueeze(3)
    for channel, row in enumerate(rows):
        maps[0, channel, row] = 2.0
    return maps


@pytest.mark.parametrize(
    ("rows", "parts", "ends"),
    [
        ([0, 1, 2, 3], 2, [2]),  # as many maxima as rows: equal strips
        ([0, 0, 1, 3], 2, [1]),  # two lie in the first row, three in the first two, and ceil(4 / 2) = 2
        ([2, 3, 3, 3], 2, [3]),  # one in the first three rows, all four in four, of which the last strip keeps one
        ([0, 1, 2], 2, [2]),  # ceil(3 / 2) = 2, so the upper strip has the odd one
        ([3, 3, 3, 3], 2, [3]),
        ([0, 0, 0, 0], 2, [1]),  # more than half in one row: the strip would be empty
        ([0, 0, 0, 0], 3, [1, 2]),  # both would
        ([3, 3, 3, 3], 3, [2, 3]),  # the last two would
        ([1, 1, 1, 1], 3, [1, 2]),  # nothing up to row 1, all from there on: the second would
        ([0, 0, 0, 3], 4, [1, 2, 3]),  # as many strips as rows leave no choice
        ([0, 3], 1, []),
    ],
)
def test_balanced_by_hand(rows, parts, ends):
    maps = peaks(rows)
    bounds = [0, *ends, 4]
    strips = [maps[:, :, a:b].flatten(2) for a, b in zip(bounds, bounds[1:], strict=False)]
    assert torch.equal(activation_balanced_pool(maps, parts), torch.stack([s.amax(2) for s in strips], 2))
    means = torch.stack([s.mean(2) for s in strips], 2)
    torch.testing.assert_close(activation_balanced_pool(maps, parts, "mean"), means)


def test_balanced_written_out():
    """Six rows, three maxima in the first and one in the last: the upper strip holds two at most, so one row."""
    maps = torch.zeros(1, 4, 6, 2)
    maps[0, :3, 0, 1] = torch.tensor([1.0, 2.0, 3.0])
    maps[0, 3, 5, 0] = 4.0
    maps[0, 0, 3, 0] = 0.5
    expected = torch.tensor([[[1.0, 0.5], [2.0, 0.0], [3.0, 0.0], [0.0, 4.0]]])
    assert torch.equal(activation_balanced_pool(maps, 2), expected)
    means = torch.tensor([[[1 / 2, 0.5 / 10], [2 / 2, 0.0], [3 / 2, 0.0], [0.0, 4 / 10]]])
    torch.testing.assert_close(activation_balanced_pool(maps, 2, "mean"), means)


def test_dead_channels_do_not_count():
    """Two in the first row, two in the last. Dead channels, whose first maximum is in row 0, would pull the end up."""
    alive = peaks([0, 1, 2, 3])
    dead = torch.cat((alive, torch.zeros(1, 9, 4, 1), torch.full((1, 9, 4, 1), -1.0)), 1)
    pooled = activation_balanced_pool(dead, 2)
    assert torch.equal(pooled[:, :4], activation_balanced_pool(alive, 2))
    assert (pooled[:, 4:13] == 0).all() and (pooled[:, 13:] == -1).all()


@pytest.mark.parametrize(("height", "parts", "ends"), [(4, 2, [2]), (6, 3, [2, 4]), (5, 2, [2]), (8, 3, [2, 5])])
def test_equal_strips_where_nothing_counts(height, parts, ends):
    """Negative values tell the rows apart: those that grow downwards have their maximum in a strip's last row."""
    maps = -torch.arange(height, 0, -1.0).view(1, 1, -1, 1).expand(1, 3, height, 2)
    lasts = [end - 1 for end in (*ends, height)]
    assert torch.equal(activation_balanced_pool(maps, parts), maps[:, :, lasts, 0])


def test_the_first_of_equal_maxima_counts():
    """All in the first row and again in the last: were it the last, the upper strip would have three rows."""
    maps = peaks([0, 0, 0, 0])
    maps[0, :, 3] = 2.0
    maps[0, :, 1:3] = torch.tensor([5.0, 6.0]).view(2, 1) / 10
    assert torch.equal(activation_balanced_pool(maps, 2, "mean"), torch.tensor([2.0, 3.1 / 3]).repeat(1, 4, 1))


@pytest.mark.parametrize("pool", ["max", "mean"])
@pytest.mark.parametrize("kind", ["continuous", "sparse", "skewed", "coarse"])
def test_balanced_agrees_with_loops(kind, pool):
    """sparse: dead channels and rows; skewed: most maxima in few rows; coarse: ties everywhere."""
    for seed in range(60):
        rng = torch.Generator().manual_seed(seed)
        channels, height, width = (int(torch.randint(1, n, (), generator=rng)) for n in (20, 13, 4))
        parts = int(torch.randint(1, height + 1, (), generator=rng))
        maps = torch.randn(5, channels, height, width, generator=rng, dtype=torch.float64)
        if kind == "sparse":
            maps = (maps - 1.5).relu()
        elif kind == "skewed":
            maps[:, :, int(torch.randint(height, (), generator=rng))] += 2
        elif kind == "coarse":
            maps = maps.round()
        out = activation_balanced_pool(maps, parts, pool)
        assert out.shape == (5, channels, parts)
        torch.testing.assert_close(out, balanced_by_loops(maps, parts, pool), rtol=1e-12, atol=1e-12)


def test_samples_do_not_see_each_other():
    maps = torch.randn(6, 9, 12, 3, generator=torch.Generator().manual_seed(0))
    alone = torch.cat([activation_balanced_pool(sample[None], 3) for sample in maps])
    assert torch.equal(activation_balanced_pool(maps, 3), alone)
    assert activation_balanced_pool(maps[:0], 3).shape == (0, 9, 3)


def test_mirroring_and_permuting_channels_keep_the_strips():
    maps = torch.randn(2, 9, 12, 3, generator=torch.Generator().manual_seed(0))
    out, order = activation_balanced_pool(maps, 3), torch.randperm(9, generator=torch.Generator().manual_seed(1))
    assert torch.equal(activation_balanced_pool(maps.flip(3), 3), out)
    assert torch.equal(activation_balanced_pool(maps[:, order], 3), out[:, order])


def test_max_of_strips_gives_the_global_maximum():
    maps = torch.randn(4, 30, 24, 8, generator=torch.Generator().manual_seed(0))
    for parts in (1, 2, 3, 24):
        assert torch.equal(activation_balanced_pool(maps, parts).amax(2), maps.amax((2, 3)))


@pytest.mark.parametrize("pool", ["max", "mean"])
def test_balanced_pool_has_gradients(pool):
    maps = torch.randn(2, 5, 6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: activation_balanced_pool(x, 3, pool), maps.requires_grad_())
    activation_balanced_pool(maps, 3, pool).sum().backward()
    assert (maps.grad.sum((2, 3)) - 3).abs().max() < 1e-12  # one share of each strip
    assert (maps.grad != 0).sum() == (2 * 5 * 3 if pool == "max" else maps.numel())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_balanced_pool_keeps_the_dtype(dtype):
    maps = torch.randn(2, 5, 6, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    for pool, tolerance in (("max", 0), ("mean", 1e-2)):
        out = activation_balanced_pool(maps, 2, pool)
        assert out.dtype == dtype
        expected = balanced_by_loops(maps.double(), 2, pool)
        torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


def test_errors_of_balanced_pool():
    maps = torch.zeros(1, 2, 3, 4)
    with pytest.raises(TypeError, match="maps must be of floating point, got torch.int64"):
        activation_balanced_pool(maps.long(), 2)
    for shape in ((2, 3, 4), (1, 2, 0, 4), (1, 0, 3, 4), (1, 2, 3, 0)):
        with pytest.raises(ValueError, match=r"maps must be \(N, C, H, W\) with C, H, W >= 1, got"):
            activation_balanced_pool(torch.zeros(shape), 1)
    for parts in (0, 4, -1):
        with pytest.raises(ValueError, match=rf"parts must be in \[1, 3\], as maps have rows, got {parts}"):
            activation_balanced_pool(maps, parts)
    with pytest.raises(ValueError, match="pool must be 'max' or 'mean', got 'sum'"):
        activation_balanced_pool(maps, 2, "sum")


# The network.


class Book:
    """The method as the paper tells it, on a state dict. running: what the statistics of BatchNorm become."""

    def __init__(self, model, **options):
        self.state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self.training, self.partitions = model.training, model.partitions
        self.options = {"receptive": True, "receptive_global": True, "receptive_abp": True, "balanced": False} | options
        self.pool = self.options.pop("pool", "max")

    def norm(self, name, x):
        weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        mean, var = self.state[f"{name}.running_mean"], self.state[f"{name}.running_var"]
        over = [d for d in range(x.dim()) if d != 1]
        if self.training:
            n = x.numel() / x.shape[1]
            batch_mean = x.mean(over)
            batch_var = ((x - batch_mean.view(1, -1, *[1] * (x.dim() - 2))) ** 2).mean(over)
            self.state[f"{name}.running_mean"] = 0.9 * mean + 0.1 * batch_mean
            self.state[f"{name}.running_var"] = 0.9 * var + 0.1 * batch_var * n / (n - 1)
            mean, var = batch_mean, batch_var
        mean, var, weight, bias = (t.view(1, -1, *[1] * (x.dim() - 2)) for t in (mean, var, weight, bias))
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    def conv(self, name, x, stride=1):
        weight = self.state[f"{name}.weight"]
        return F.conv2d(x, weight, stride=stride, padding=weight.shape[2] // 2)

    def layer(self, name, x, stride):
        for block in range(BLOCKS[int(name[-1]) - 1]):
            of_block, step = f"{name}.{block}", stride if block == 0 else 1
            y = self.norm(f"{of_block}.bn1", self.conv(f"{of_block}.conv1", x)).relu()
            y = self.norm(f"{of_block}.bn2", self.conv(f"{of_block}.conv2", y, step)).relu()
            y = self.norm(f"{of_block}.bn3", self.conv(f"{of_block}.conv3", y))
            if block == 0:
                x = self.norm(f"{of_block}.downsample.1", self.conv(f"{of_block}.downsample.0", x, step))
            x = (x + y).relu()
        return x

    def last(self, branch, x):
        for layer, stride in ((2, 2), (3, 2), (4, 1)):
            x = self.layer(f"branches.{branch}.layer{layer}", x, stride)
        return x

    def strips(self, maps, parts, balanced):
        if balanced:
            return list(balanced_by_loops(maps, parts, self.pool).unbind(2))
        rows = maps.shape[2] // parts
        return [maps[:, :, k * rows : (k + 1) * rows].flatten(2).max(2).values for k in range(parts)]

    def __call__(self, x):
        x = (x - torch.tensor([0.485, 0.456, 0.406]).double().view(3, 1, 1)) / torch.tensor(
            [0.229, 0.224, 0.225]
        ).double().view(3, 1, 1)
        x = F.max_pool2d(self.norm("stem.bn1", self.conv("stem.conv1", x, 2)).relu(), 3, 2, 1)
        x = self.layer("stem.layer1", x, 1)
        number, branches = 0, []
        for branch, parts in enumerate(self.partitions):
            whole = self.last(branch, x)
            pooled = [whole.flatten(2).max(2).values]
            if parts > 1:
                pooled += self.strips(whole, parts, self.options["balanced"])
            if parts > 1 and self.options["receptive"]:
                rows = x.shape[2] // parts
                cut = [x[:, :, k * rows : (k + 1) * rows] for k in range(parts)]
                # BatchNorm sees all strips at once; in eval mode each may as well go alone.
                seen = self.last(branch, torch.cat(cut)).split(len(x)) if self.training else None
                seen = seen or [self.last(branch, strip) for strip in cut]
                stacked = torch.cat(list(seen), 2)
                assert stacked.shape == whole.shape
                if self.options["receptive_global"]:
                    pooled.append(stacked.flatten(2).max(2).values)
                pooled += self.strips(stacked, parts, self.options["balanced"] and self.options["receptive_abp"])
            feats = []
            for feature in pooled:
                reduced = feature @ self.state[f"reductions.{number}.0.weight"].T
                feats.append(self.norm(f"reductions.{number}.1", reduced))
                number += 1
            branches.append(feats)
        assert f"reductions.{number}.0.weight" not in self.state
        return branches


def joined(branches):
    return torch.cat([feat for of_branch in branches for feat in of_branch], 1)


@pytest.mark.parametrize("partitions", [(2,), (3,), (2, 3), (1, 2, 3), (2, 4)])
def test_agrees_with_the_book(partitions):
    height = 64 if partitions == (2, 4) else 96
    model = tiny(partitions=partitions).eval()
    with torch.no_grad():
        feats = model(images(height=height))
        expected = joined(Book(model, balanced=True)(images(height=height)))
    torch.testing.assert_close(feats, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("changes", "options", "features"),
    [
        ({"receptive": False}, {"receptive": False, "balanced": True}, 7),
        ({"receptive_global": False}, {"receptive_global": False, "balanced": True}, 12),
        ({"abp": "off"}, {}, 14),
        ({"abp": "both"}, {"balanced": True}, 14),
        ({"abp_pool": "mean"}, {"balanced": True, "pool": "mean"}, 14),
        ({"abp_receptive": False}, {"balanced": True, "receptive_abp": False}, 14),
        ({"abp": "off", "receptive": False}, {"receptive": False}, 7),
    ],
)
def test_every_part_can_be_read_otherwise(changes, options, features):
    model, standard = tiny(**changes).eval(), tiny().eval()
    with torch.no_grad():
        feats = model(images())
        torch.testing.assert_close(feats, joined(Book(model, **options)(images())), rtol=1e-9, atol=1e-9)
        others = standard(images())
    assert feats.shape == (3, 8 * features)
    if changes != {"abp": "both"}:  # which is another thing in training alone
        assert feats.shape != others.shape or not torch.allclose(feats, others, rtol=1e-3)


@pytest.mark.parametrize(("abp", "balanced"), [("off", False), ("test", False), ("both", True)])
def test_training_agrees_with_the_book(abp, balanced):
    model = tiny(5, abp=abp)
    book = Book(model, balanced=balanced)
    with torch.no_grad():
        output, branches = model(images(4)), book(images(4))
    assert isinstance(output, Heads) and [feats.shape for feats in output.feats] == [(4, 48), (4, 64)]
    for feats, expected in zip(output.feats, branches, strict=True):
        torch.testing.assert_close(feats, torch.cat(expected, 1), rtol=1e-8, atol=1e-8)
    assert len(output.logits) == 14
    for number, (logits, feat) in enumerate(zip(output.logits, sum(branches, []), strict=True)):
        expected = feat @ model.state_dict()[f"heads.{number}.weight"].T + model.state_dict()[f"heads.{number}.bias"]
        torch.testing.assert_close(logits, expected, rtol=1e-8, atol=1e-8)
    for name, tensor in model.state_dict().items():
        if "running" in name:  # of layer2 to layer4 they have moved twice, once for each path
            torch.testing.assert_close(tensor, book.state[name], rtol=1e-8, atol=1e-8, msg=name)


def test_balanced_in_training_is_another_thing():
    first, second = (tiny(2, abp=abp)(images(4)).feats for abp in ("test", "both"))
    assert all(not torch.allclose(a, b, rtol=1e-3) for a, b in zip(first, second, strict=True))


def test_strips_are_seen_alone():
    """What is below the upper half, and far enough for layer1, changes only the receptive path's lower strip."""
    model = tiny(partitions=(2,), abp="off").eval()
    x = images()
    y = x.clone()
    y[:, :, 68:] = images(seed=1)[:, :, 68:]
    with torch.no_grad():
        before, after = (model(z).unflatten(1, (6, 8)) for z in (x, y))
    same = (before == after).flatten(2).all((0, 2)).tolist()
    assert same == [False, False, False, False, True, False]


def test_maps_are_those_of_resnet_50():
    """The published weights go to the stem and to every branch, under the names that `of_backbone` says."""
    torch.manual_seed(0)
    resnet = ResNet(50, last_stride=1).eval()
    model = rmgl().eval()
    state = {name: tensor for key, tensor in resnet.state_dict().items() for name in model.of_backbone(key)}
    wanted = {name for name in model.state_dict() if name.startswith(model.backbone)}
    assert set(state) == wanted
    model.load_state_dict({**model.state_dict(), **state})
    x = torch.randn(1, 3, 64, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = resnet(x)
        for branch in model.branches:
            torch.testing.assert_close(branch(model.stem(x)), expected)
    assert model.of_backbone("fc.weight") == ()
    assert model.of_backbone("layer3.5.bn2.bias") == (
        "branches.0.layer3.5.bn2.bias",
        "branches.1.layer3.5.bn2.bias",
    )
    assert model.of_backbone("layer1.0.conv1.weight") == ("stem.layer1.0.conv1.weight",)


def bottlenecks(inputs, width, blocks):
    """Parameters of a stage: convolutions of 1, 9 and 1 taps, three norms, and in the first block a short-cut."""
    first = inputs * width + 9 * width**2 + 4 * width**2 + 2 * 6 * width + inputs * 4 * width + 2 * 4 * width
    return first + (blocks - 1) * (4 * width**2 + 9 * width**2 + 4 * width**2 + 2 * 6 * width)


@pytest.mark.parametrize(
    ("partitions", "changes", "features"),
    [
        ((2,), {}, 6),
        ((3,), {}, 8),
        ((2, 3), {}, 14),
        ((1, 2, 3), {}, 15),
        ((2, 3, 4), {}, 24),
        ((2, 3), {"receptive": False}, 7),
        ((2, 3), {"receptive_global": False}, 12),
    ],
)
def test_parameter_counts(partitions, changes, features):
    stem = 3 * 64 * 49 + 2 * 64 + bottlenecks(64, 64, 3)
    branch = bottlenecks(256, 128, 4) + bottlenecks(512, 256, 6) + bottlenecks(1024, 512, 3)
    expected = stem + len(partitions) * branch + features * (2048 * 256 + 2 * 256)
    with torch.device("meta"):
        model, classes = rmgl(partitions=partitions, **changes), rmgl(751, partitions=partitions, **changes)
    assert sum(p.numel() for p in model.parameters()) == expected
    assert sum(p.numel() for p in classes.parameters()) == expected + features * 751 * 257
    with torch.no_grad():
        assert model.eval()(torch.zeros(2, 3, 384, 128, device="meta")).shape == (2, 256 * features)


def test_published_sizes():
    with torch.device("meta"):
        model = rmgl(751)
    parts = (model.stem, *model.branches, model.reductions, model.heads)
    counts = [sum(p.numel() for p in part.parameters()) for part in parts]
    assert counts == [225_344, 23_282_688, 23_282_688, 7_347_200, 14 * 751 * 257]
    assert sum(counts[:-1]) == 54_137_920
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(1, 3, *model.size, device="meta"))
    assert round(counter.get_total_flops() / 2e9, 1) == 22.0
    assert (model.size, model.flip, model.normalised, model.inputs) == ((384, 128), True, True, "image")
    names = [name for name, _ in model.named_parameters()]
    assert {name.split(".")[0] for name in names if name.startswith(model.backbone)} == {"stem", "branches"}
    assert {name.split(".")[0] for name in names if not name.startswith(model.backbone)} == {"reductions", "heads"}
    assert [name for name in model.state_dict() if name.startswith(model.classifiers)] == [
        f"heads.{i}.{kind}" for i in range(14) for kind in ("weight", "bias")
    ]


@pytest.mark.parametrize("name", ["receptive", "receptive_global", "abp", "abp_pool", "abp_receptive"])
def test_factory_passes_on_what_it_is_told(name):
    value = {"abp": "both", "abp_pool": "mean"}.get(name, False)
    with torch.device("meta"):
        model, standard = rmgl(partitions=[2], **{name: value}), RMGL(0, (2,), blocks=(1, 1, 1, 1), width=1)
    expected = {"receptive": True, "receptive_global": True, "abp": "test", "abp_pool": "max", "abp_receptive": True}
    assert {key: getattr(standard, key) for key in expected} == expected
    assert {key: getattr(model, key) for key in expected} == expected | {name: value}
    assert model.partitions == (2,)


# The loss.


def triplet_by_loops(feats, labels):
    hinges = []
    for i, anchor in enumerate(feats):
        dist = [math.dist(anchor.tolist(), other.tolist()) for other in feats]
        same = [d for j, d in enumerate(dist) if labels[j] == labels[i] and j != i]
        other = [d for j, d in enumerate(dist) if labels[j] != labels[i]]
        if same and other:
            hinges.append(max(0.0, 0.6 + max(same) - min(other)))
    return sum(hinges) / len(hinges) if hinges else 0.0


def entropy_by_loops(logits, labels):
    rows = [[value - row[label] for value in row] for row, label in zip(logits.tolist(), labels.tolist(), strict=True)]
    return sum(math.log(math.fsum(map(math.exp, row))) for row in rows) / len(rows)


@pytest.mark.parametrize("labels", [[0, 0, 1, 1, 2, 2], [0, 0, 0, 3, 3, 1], [0, 1, 2, 3, 4, 2], [0, 1, 2, 3, 4, 5]])
def test_loss_agrees_with_loops(labels):
    """The last batch has no positives: nothing to learn but the classes."""
    labels = torch.tensor(labels)
    model = tiny(6)
    output = model(images(6))
    terms = model.loss(output, labels)
    assert list(terms) == ["cross_entropy", "triplet"]
    entropies = [entropy_by_loops(logits.detach(), labels) for logits in output.logits]
    triplets = [triplet_by_loops(feats.detach(), labels) for feats in output.feats]
    assert len(entropies) == 14 and len(triplets) == 2
    assert terms["cross_entropy"].item() == pytest.approx(sum(entropies), rel=1e-9)
    assert terms["triplet"].item() == pytest.approx(sum(triplets), rel=1e-9)
    assert (terms["triplet"] == 0) == (len(labels.unique()) == 6)
    sum(terms.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def without_gradient(model, loss):
    model.zero_grad()
    loss.backward()
    return [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]


@pytest.mark.parametrize("abp", ["test", "both"])
@pytest.mark.parametrize("partitions", [(2, 3), (1, 2, 3)])
def test_every_parameter_gets_a_gradient(partitions, abp):
    model, labels = tiny(3, partitions, abp=abp), torch.tensor([0, 0, 1, 1, 2, 2])
    terms = model.loss(model(images(6)), labels)
    assert without_gradient(model, sum(terms.values())) == []
    # Distances do not see what is added to all descriptors, nor the classifiers.
    terms = model.loss(model(images(6)), labels)
    features = sum((1 if parts == 1 else 2 + 2 * parts) for parts in partitions)
    small = [f"heads.{i}.{kind}" for i in range(features) for kind in ("weight", "bias")]
    missing = [n for n in without_gradient(model, terms["triplet"]) if not n.startswith("reductions")]
    assert missing == small


def test_learns_a_batch_by_heart():
    torch.manual_seed(0)
    model = RMGL(3, blocks=(1, 1, 1, 1), width=4, dim=8)
    x, labels = images(6).float(), torch.tensor([0, 0, 1, 1, 2, 2])
    optimizer, losses = torch.optim.Adam(model.parameters(), 1e-2), []
    for _ in range(25):
        optimizer.zero_grad()
        output = model(x)
        loss = sum(model.loss(output, labels).values())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    assert all((logits.argmax(1) == labels).all() for logits in output.logits)


def test_eval_does_not_depend_on_the_batch():
    model = tiny().eval()
    with torch.no_grad():
        together, alone = model(images(4)), torch.cat([model(image[None]) for image in images(4)])
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-9)


# Bad input.


@pytest.mark.parametrize(
    ("partitions", "multiple", "fits"),
    [((2,), 32, 64), ((3,), 48, 96), ((2, 3), 96, 192), ((1,), 16, 48), ((2, 3, 4), 192, 384)],
)
def test_height_must_fit(partitions, multiple, fits):
    with torch.device("meta"):
        model = RMGL(0, partitions, blocks=BLOCKS, width=4).eval()
    assert len(model(torch.zeros(1, 3, fits, 30, device="meta"))) == 1
    for height in (fits + 16 if multiple > 16 else fits + 8, fits - 1, 0):
        with pytest.raises(ValueError, match=f"height must be a multiple of {multiple}, got {height}"):
            model(torch.zeros(1, 3, height, 32, device="meta"))


def test_errors():
    for partitions in ((), (0, 2), (-1,)):
        with pytest.raises(ValueError, match="partitions must be one or more numbers of at least 1, got"):
            rmgl(partitions=partitions)
    with pytest.raises(TypeError, match="partitions must be ints, got 2.5"):
        rmgl(partitions=(2, 2.5))
    with pytest.raises(ValueError, match="num_classes must be at least 0, got -1"):
        rmgl(-1)
    with pytest.raises(ValueError, match="abp must be 'off', 'test' or 'both', got 'train'"):
        rmgl(abp="train")
    with pytest.raises(ValueError, match="abp_pool must be 'max' or 'mean', got 'sum'"):
        rmgl(abp_pool="sum")


def test_errors_of_the_loss():
    model = tiny()
    output = model(images(4))
    assert output.logits == () and len(output.feats) == 2
    with pytest.raises(ValueError, match="num_classes must be at least 1 for a loss, got 0"):
        model.loss(output, torch.tensor([0, 0, 1, 1]))
    model = tiny(2)
    output = model(images(4))
    for label in (2, -1, -100):  # the last is one that cross-entropy would pass over
        with pytest.raises(ValueError, match=rf"labels must be in \[0, 2\), got {label}"):
            model.loss(output, torch.tensor([0, 0, 1, label]))
    with pytest.raises(TypeError, match="labels must be an int64 tensor"):
        model.loss(output, torch.tensor([0.0, 0, 1, 1]))
    with pytest.raises(ValueError, match="labels must have shape"):
        model.loss(output, torch.tensor([0, 0, 1]))
