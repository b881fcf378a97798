"""Best matches of feature maps against loops and torch's own gradients, then properties and errors."""

import math

import pytest
import torch

from reid3d.ops import backend, match_maps, match_maps_reference

# query maps, gallery maps, channels, positions: tiles and vectors that are not full, more query maps than are packed or
# summed up at a time, one of everything
SHAPES = [(3, 4, 5, 7), (2, 3, 17, 16), (2, 2, 16, 49), (1, 5, 33, 97), (9, 3, 700, 30), (1, 1, 1, 1), (40, 2, 3, 2)]


def maps(rng, shape, dtype=torch.float64, device="cpu", levels=None):
    """Query and gallery maps; with `levels`, of few whole numbers, so that there are ties and nothing is rounded."""
    Q, G, C, L = shape
    draw = rng.standard_normal if levels is None else lambda size: rng.integers(-levels, levels + 1, size)
    return tuple(torch.tensor(draw((n, C, L))).to(device, dtype) for n in (Q, G))


def by_hand(query, gallery):
    """By the definition, a position at a time, with the lowest winner."""
    best, winner = [], []
    for a in query.double().tolist():
        for b in gallery.double().tolist():
            sim = [
                [sum(x * y for x, y in zip(p, q, strict=True)) for q in zip(*b, strict=True)]
                for p in zip(*a, strict=True)
            ]
            for rows in (sim, list(zip(*sim, strict=True))):
                best.append([max(row) for row in rows])
                winner.append([list(row).index(max(row)) for row in rows])
    shape = (len(query), len(gallery), 2, query.shape[2])
    return torch.tensor(best, dtype=torch.float64).view(shape), torch.tensor(winner).view(shape)


def all_pairs(query, gallery):
    """With every similarity, for torch to differentiate: `max` gives the gradient to one winner."""
    sim = torch.einsum("qci,gcj->qgij", query, gallery)
    return torch.stack([sim.max(3).values, sim.max(2).values], 2)


@pytest.mark.parametrize(
    "shape", [(2, 3, 5, 7), (1, 2, 3, 18), (2, 1, 4, 33), (0, 3, 2, 4), (3, 0, 2, 4), (1, 1, 1, 1)]
)
@pytest.mark.parametrize("levels", [None, 1])
def test_by_hand(shape, levels, dtype, device, rng):
    query, gallery = maps(rng, shape, dtype, device, levels)
    best, winner = by_hand(query.cpu(), gallery.cpu())
    exact = {} if levels is None else {"rtol": 0, "atol": 0}
    for found in (torch.ops.reid3d.match_maps(query, gallery, True), match_maps_reference(query, gallery)):
        torch.testing.assert_close(found[0].cpu().double(), best, **exact or {"rtol": 1e-6, "atol": 1e-6})
        assert found[0].dtype == dtype and found[1].dtype == torch.int16
        assert torch.equal(found[1].cpu().long(), winner)
    assert torch.equal(match_maps(query, gallery), torch.ops.reid3d.match_maps(query, gallery, True)[0])


@pytest.mark.parametrize("shape", SHAPES)
def test_every_pair_and_its_gradient(shape, dtype, device, rng):
    query, gallery = (x.requires_grad_() for x in maps(rng, shape, dtype, device))
    exact = [x.detach().double().requires_grad_() for x in (query, gallery)]
    found, expected = match_maps(query, gallery), all_pairs(*exact)
    tolerance = {"rtol": 1e-12, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-4}
    assert found.shape == expected.shape and found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, **tolerance)
    grad = torch.tensor(rng.standard_normal(expected.shape), device=device)
    for a, b in zip(
        torch.autograd.grad(found, (query, gallery), grad.to(dtype)),
        torch.autograd.grad(expected, exact, grad),
        strict=True,
    ):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, **tolerance)


def test_gradcheck(device, rng):
    query, gallery = maps(rng, (2, 3, 4, 5), device=device)
    assert torch.autograd.gradcheck(match_maps, (query.requires_grad_(), gallery.requires_grad_()))
    assert torch.autograd.gradcheck(match_maps, (query.detach(), gallery))
    assert torch.autograd.gradcheck(match_maps, (query, gallery.detach()))


@pytest.mark.parametrize("shape", [(2, 3, 2, 35), (3, 2, 1, 100), (20, 3, 2, 18)])
def test_ties_go_to_the_lower_position(shape, dtype, device, rng):
    query, gallery = (x.requires_grad_() for x in maps(rng, shape, dtype, device, levels=2))
    sim = torch.einsum("qci,gcj->qgij", query.detach(), gallery.detach())
    winner = torch.ops.reid3d.match_maps(query.detach(), gallery.detach(), True)[1]
    for side, dim in ((0, 3), (1, 2)):
        assert torch.equal(winner[:, :, side].long(), sim.argmax(dim))  # the first of the largest
    grad = torch.tensor(rng.integers(-3, 4, winner.shape)).to(device, dtype)
    found = torch.autograd.grad(match_maps(query, gallery), (query, gallery), grad)
    other = [torch.zeros_like(x) for x in (query, gallery)]
    for q, g, i in torch.cartesian_prod(*map(torch.arange, (shape[0], shape[1], shape[3]))).tolist():
        j, k = winner[q, g, :, i].tolist()
        other[0][q, :, i] += grad[q, g, 0, i] * gallery.detach()[g, :, j]
        other[1][g, :, j] += grad[q, g, 0, i] * query.detach()[q, :, i]
        other[0][q, :, k] += grad[q, g, 1, i] * gallery.detach()[g, :, i]
        other[1][g, :, i] += grad[q, g, 1, i] * query.detach()[q, :, k]
    assert all(map(torch.equal, found, other))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16])
def test_exchanged_maps_give_the_same_bits(shape, kind, device, rng):
    query, gallery = maps(rng, shape, kind, device)
    found, exchanged = match_maps(query, gallery), match_maps(gallery, query).transpose(0, 1).flip(2)
    torch.testing.assert_close(found, exchanged, rtol=1e-5, atol=1e-4)
    assert torch.equal(found, exchanged) or "cpp" not in backend()


def test_a_pair_alone_and_any_threads_give_the_same_bits(device, rng):
    if "cpp" not in backend():
        pytest.skip("plain torch rounds as its products do")
    query, gallery = (x.requires_grad_() for x in maps(rng, (9, 5, 40, 50), torch.float32, device))
    grad = torch.tensor(rng.standard_normal((9, 5, 2, 50))).to(device, torch.float32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found = match_maps(query, gallery)
            results.append([found, *torch.autograd.grad(found, (query, gallery), grad)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0], strict=True))
    for q, g in ((0, 0), (8, 4), (3, 2)):
        assert torch.equal(match_maps(query[q : q + 1], gallery[g : g + 1])[0, 0], results[0][0][q, g])


def test_with_and_without_a_gradient_the_same_bits(dtype, device, rng):
    query, gallery = maps(rng, (3, 4, 20, 50), dtype, device)
    assert torch.equal(match_maps(query, gallery), match_maps(query.clone().requires_grad_(), gallery).detach())
    assert torch.ops.reid3d.match_maps(query, gallery, False)[1].numel() == 0


@pytest.mark.parametrize("winners", [False, True])
def test_nan_wins_where_it_is(winners, dtype, device, rng):
    query, gallery = maps(rng, (3, 2, 6, 40), dtype, device)
    query[1, 2, 7] = query[1, 3, 30] = gallery[1, 0, 20] = math.nan
    sim = torch.einsum("qci,gcj->qgij", query.double(), gallery.double())
    best, winner = torch.ops.reid3d.match_maps(query, gallery, winners)
    for side, dim in ((0, 3), (1, 2)):
        assert torch.equal(best[:, :, side].isnan(), sim.amax(dim).isnan())
        assert not winners or torch.equal(winner[:, :, side].long(), sim.argmax(dim))
    clean = sim.isnan().any(3).any(2).logical_not()
    assert clean.any() and not clean.all()
    torch.testing.assert_close(best, all_pairs(query, gallery), equal_nan=True, rtol=1e-5, atol=1e-5)


def test_infinities_and_an_overflow(dtype, device):
    """-inf may be the maximum; inf - inf is a NaN that was in neither map."""
    huge = torch.finfo(dtype).max
    query = torch.tensor([[[math.inf, huge, 1]]], dtype=dtype, device=device)
    gallery = torch.tensor([[[-1, -huge, -2]]], dtype=dtype, device=device)
    assert match_maps(query, gallery).tolist() == [[[[-math.inf, -huge, -1], [-1, -huge, -2]]]]
    query, gallery = torch.cat([query, query], 1), torch.cat([gallery, -gallery], 1)
    assert match_maps(query, gallery).isnan().all(3).tolist() == [[[False, True]]]


@pytest.mark.parametrize("kinds", [(torch.float16,) * 2, (torch.bfloat16,) * 2, (torch.float32, torch.float16)])
def test_half_types_are_read_as_float32(kinds, device, rng):
    query, gallery = (x.to(kind) for x, kind in zip(maps(rng, (5, 3, 40, 50), device=device), kinds, strict=True))
    found, expected = match_maps(query, gallery), match_maps(query.float(), gallery.float())
    assert found.dtype == torch.float32 and torch.equal(found, expected)
    grads = []
    for a, b in ((query, gallery), (query.float(), gallery.float())):
        grads.append(torch.autograd.grad(match_maps(a.requires_grad_(), b.requires_grad_()).sum(), (a, b)))
    for a, b, kind in zip(*grads, kinds, strict=True):
        assert a.dtype == kind and torch.equal(a, b.to(kind))


@pytest.mark.parametrize("extreme", [0.0, 2.0**-24, -(2.0**-15), 65504.0, math.inf])
def test_halves_of_every_kind(extreme, device):
    query = torch.full((1, 1, 20), extreme, dtype=torch.float16, device=device)
    assert torch.equal(match_maps(query, torch.ones_like(query)), torch.full((1, 1, 2, 20), extreme, device=device))


def test_autocast_computes_in_float32(device, rng):
    query, gallery = (x.requires_grad_() for x in maps(rng, (3, 4, 20, 30), torch.float32, device))
    expected = match_maps(query, gallery)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        found = match_maps(query, gallery)
        grads = torch.autograd.grad(found.square().sum(), (query, gallery))
    assert torch.equal(found, expected)
    again = torch.autograd.grad(expected.square().sum(), (query, gallery))
    assert all(map(torch.equal, grads, again))


def test_non_contiguous(device, rng):
    query, gallery = maps(rng, (4, 3, 20, 30), torch.float32, device)
    expected = match_maps(query[::2, :, ::3].contiguous(), gallery[:, :, :10].contiguous())
    turned = query.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    found = match_maps(turned[::2, :, ::3], gallery[:, :, :10])
    assert torch.equal(found, expected)
    one = gallery[:1].expand(3, -1, -1)
    assert torch.equal(match_maps(query, one), match_maps(query, one.contiguous()))


@pytest.mark.parametrize(("Q", "G"), [(0, 3), (2, 0), (0, 0)])
def test_no_maps(Q, G, device):
    query, gallery = (torch.zeros(n, 4, 5, device=device, requires_grad=True) for n in (Q, G))
    found = match_maps(query, gallery)
    assert found.shape == (Q, G, 2, 5)
    grads = torch.autograd.grad(found.sum(), (query, gallery))
    assert [x.shape for x in grads] == [query.shape, gallery.shape] and not any(x.any() for x in grads)


def test_nothing_as_large_as_the_similarities_is_kept(rng):
    """Of the compiled kernels: 64 pairs of 900 positions have 207 MB of similarities."""
    if "cpp" not in backend():
        pytest.skip("plain torch forms some at a time")
    query, gallery = maps(rng, (8, 8, 2, 900), torch.float32)
    with torch.profiler.profile(profile_memory=True) as profile:
        match_maps(query.requires_grad_(), gallery).sum().backward()
    taken = max(event.self_cpu_memory_usage for event in profile.key_averages())
    assert taken < 2e6


def test_differentiated_once_only(device, rng):
    query, gallery = (x.requires_grad_() for x in maps(rng, (2, 2, 3, 4), device=device))
    grad = torch.autograd.grad(match_maps(query, gallery).square().sum(), query, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="match_maps can be differentiated once only"):
        grad.sum().backward()


def test_opcheck(dtype, device, rng):
    query, gallery = maps(rng, (3, 4, 5, 20), dtype, device)
    op, backward = torch.ops.reid3d.match_maps.default, torch.ops.reid3d.match_maps_backward.default
    torch.library.opcheck(op, (query, gallery, False))
    best, winner = op(query, gallery, True)
    torch.library.opcheck(backward, (best, winner, gallery))
    torch.library.opcheck(op, (query.requires_grad_(), gallery.requires_grad_(), True))


def test_compiles_into_one_graph(device, rng):
    def loss(query, gallery):
        return match_maps(query * 2, gallery).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((3, 4, 5, 20), (2, 6, 8, 33)):
        inputs = [x.requires_grad_() for x in maps(rng, shape, torch.float32, device)]
        gradients = [torch.autograd.grad(function(*inputs), inputs) for function in (loss, compiled)]
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b)


MAPS = torch.zeros(2, 3, 4)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": [1]}, TypeError, "query must be a torch.Tensor, got list"),
        ({"gallery": MAPS.long()}, TypeError, "gallery must be float16, bfloat16, float32 or float64, got torch.int64"),
        ({"query": MAPS.double()}, TypeError, "must both be float64, or neither, got torch.float64 and torch.float32"),
        ({"gallery": MAPS.to("meta")}, ValueError, "gallery must be on the device of query, cpu, got meta"),
        (
            {"query": MAPS[0]},
            ValueError,
            r"query must have shape \(Q, C, L\) with 1 <= C and 1 <= L <= 32767, got \(3, 4\)",
        ),
        ({"query": MAPS[:, :0]}, ValueError, r"with 1 <= C and 1 <= L <= 32767, got \(2, 0, 4\)"),
        ({"query": MAPS[:, :, :0]}, ValueError, r"got \(2, 3, 0\)"),
        ({"query": torch.zeros(0, 1, 32768)}, ValueError, r"got \(0, 1, 32768\)"),
        ({"gallery": MAPS[:, :2]}, ValueError, r"gallery must have shape \(G, 3, 4\), as query, got \(2, 2, 4\)"),
        ({"gallery": MAPS[..., :3]}, ValueError, r"gallery must have shape \(G, 3, 4\), as query, got \(2, 3, 3\)"),
        ({"gallery": MAPS[0]}, ValueError, r"gallery must have shape \(G, 3, 4\), as query, got \(3, 4\)"),
    ],
)
def test_errors(change, error, message):
    with pytest.raises(error, match=message):
        match_maps(**{"query": MAPS, "gallery": MAPS, **change})


def test_no_gradient_without_winners():
    with pytest.raises(RuntimeError, match="there is no gradient without winners"):
        torch.ops.reid3d.match_maps_backward(torch.zeros(2, 2, 2, 4), torch.zeros(0, 2, 2, 4, dtype=torch.int16), MAPS)


@pytest.mark.parametrize("bad", [-1, 4])
def test_a_winner_out_of_range(bad, device):
    if device.type != "cpu":
        pytest.skip("a failed launch ends the process on CUDA")
    winner = torch.zeros(1, 2, 2, 4, dtype=torch.int16)
    winner[0, 1, 1, 3] = bad
    with pytest.raises(RuntimeError):
        torch.ops.reid3d.match_maps_backward(torch.zeros(1, 2, 2, 4), winner, MAPS)
