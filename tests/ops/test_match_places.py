import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reid3d.ops import match_places, match_places_reference


def by_hand(sim, matches, removed, junk, pessimistic) -> list[list[int]]:
    """The list itself, sorted by Python, one query at a time."""
    out = []
    for row, mine, away in zip(sim, matches, removed, strict=True):
        mine, away = set(mine) - {-1}, {*away, *junk}
        kept = [i for i in range(len(row)) if i not in away]
        kept.sort(key=lambda i: (-row[i], pessimistic and i in mine, i))
        places = [place for place, i in enumerate(kept, 1) if i in mine]
        out.append(places + [0] * (len(matches[0]) - len(places)))
    return out


def problem(rng, rows, n, most, values=None):
    """Rows of items, of which up to `most` are matches, as many removed, and some junk."""
    sim = rng.standard_normal((rows, n)) if values is None else rng.choice(values, (rows, n))
    junk = rng.permutation(n)[: rng.integers(0, n // 3 + 1)]
    left = np.setdiff1d(np.arange(n), junk)
    lists = []
    for _ in range(2 * rows):
        lists.append(rng.permutation(left)[: rng.integers(0, min(most, len(left) // 2) + 1)])
    width = [max(map(len, lists[i::2])) + int(rng.integers(0, 3)) for i in range(2)]
    both = []
    for i in range(2):
        padded = np.full((rows, width[i]), -1)
        for row in range(rows):
            items = lists[2 * row + i]
            items = items if i == 0 else np.setdiff1d(items, lists[2 * row])
            padded[row, rng.permutation(width[i])[: len(items)]] = items
        both.append(torch.from_numpy(padded))
    return torch.from_numpy(sim.astype(np.float32)), *both, torch.from_numpy(junk)


VALUES = [0.5, -0.5, 0.0, -0.0, 1e-40, -1e-40, np.inf, -np.inf, 3e38]


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(0, 40), st.booleans(), st.booleans())
def test_by_hand(seed, rows, n, tied, pessimistic):
    sim, matches, removed, junk = problem(np.random.default_rng(seed), rows, n, 12, VALUES if tied else None)
    wanted = by_hand(*(x.tolist() for x in (sim, matches, removed, junk)), pessimistic)
    for op in (match_places, match_places_reference):
        found = op(sim, matches, removed, junk, pessimistic=pessimistic)
        assert found.dtype == torch.int64 and found.tolist() == wanted


@pytest.mark.parametrize("pessimistic", [False, True])
@pytest.mark.parametrize(("n", "most"), [(300, 9), (4096, 20), (4097, 300), (9001, 255), (9001, 256), (9001, 4000)])
def test_long_rows_and_many_matches(n, most, pessimistic, rng, device):
    for values in (None, np.linspace(-1, 1, 40), [1.0]):
        inputs = [x.to(device) for x in problem(rng, 3, n, most, values)]
        wanted = match_places_reference(*inputs, pessimistic)
        assert torch.equal(match_places(*inputs, pessimistic=pessimistic), wanted)
        assert by_hand(*(x.tolist() for x in inputs), pessimistic) == wanted.tolist()


@pytest.mark.parametrize("most", [30, 600])
def test_neither_threads_nor_batch_nor_strides_matter(most, rng):
    inputs = problem(rng, 7, 5000, most, np.linspace(-1, 1, 300))
    wanted, threads = match_places(*inputs), torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(match_places(*inputs), wanted)
    finally:
        torch.set_num_threads(threads)
    sim, matches, removed, junk = inputs
    alone = [match_places(sim[i : i + 1], matches[i : i + 1], removed[i : i + 1], junk) for i in range(7)]
    assert torch.equal(torch.cat(alone), wanted)
    turned = [x.T.contiguous().T for x in (sim, matches, removed)]
    assert torch.equal(match_places(*turned, junk), wanted)


def test_the_inputs_stay_as_they_were(rng):
    inputs = problem(rng, 4, 100, 9)
    before = [x.clone() for x in inputs]
    match_places(*inputs)
    assert all(map(torch.equal, inputs, before))


def test_nothing_to_place(device):
    none = torch.full((2, 3), -1, device=device)
    assert match_places(torch.zeros(2, 5, device=device), none, none[:, :0]).tolist() == [[0] * 3] * 2
    assert match_places(torch.zeros(2, 0, device=device), none, none).tolist() == [[0] * 3] * 2
    assert match_places(torch.zeros(0, 5, device=device), none[:0], none[:0]).shape == (0, 3)
    assert match_places(torch.zeros(2, 5, device=device), none[:, :0], none).shape == (2, 0)


def test_opcheck_and_one_graph(rng):
    inputs = problem(rng, 4, 60, 9)
    torch.library.opcheck(torch.ops.reid3d.match_places.default, (*inputs, True))
    compiled = torch.compile(match_places, fullgraph=True, backend="aot_eager", dynamic=True)
    assert torch.equal(compiled(*inputs), match_places(*inputs))
    assert torch.equal(compiled(*(x[:2] for x in inputs[:3])), match_places(*(x[:2] for x in inputs[:3])))


SIM, NONE = torch.zeros(2, 5), torch.full((2, 1), -1)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"sim": SIM.double()}, TypeError, "sim must be a float32 tensor, got torch.float64"),
        ({"sim": [[0.0]]}, TypeError, "sim must be a float32 tensor, got list"),
        ({"sim": SIM[0]}, ValueError, r"sim must have shape \(B, G\), got \(5,\)"),
        ({"matches": NONE.int()}, TypeError, "matches must be an int64 tensor, got torch.int32"),
        ({"matches": None}, TypeError, "matches must be an int64 tensor, got NoneType"),
        ({"removed": NONE[:1]}, ValueError, r"removed must have shape \(2, R\), got \(1, 1\)"),
        ({"matches": NONE[:, 0]}, ValueError, r"matches must have shape \(2, P\), got \(2,\)"),
        ({"junk": NONE}, ValueError, r"junk must have shape \(J,\), got \(2, 1\)"),
        ({"junk": NONE[0].to("meta")}, ValueError, "junk must be on the device of sim, cpu, got meta"),
        ({"sim": SIM + torch.tensor([0, 0, 0, 0, torch.nan])}, RuntimeError, "sim must not hold NaN"),
        ({"matches": NONE - 1}, RuntimeError, "must hold -1 or a position below 5"),
        ({"removed": NONE + 6}, RuntimeError, "must hold -1 or a position below 5"),
        ({"junk": NONE[0] + 6}, RuntimeError, "must hold -1 or a position below 5"),
    ],
)
def test_errors(change, error, message):
    with pytest.raises(error, match=message):
        match_places(**{"sim": SIM, "matches": NONE, "removed": NONE, "junk": None, **change})
