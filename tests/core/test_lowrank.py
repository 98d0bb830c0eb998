"""Factors, masks and adapters: optimal where theory says so, equal to PyTorch's where it has them, the layer in the limit."""

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

from minivid.core import surgery
from minivid.core.baselines.lowrank import Factored, LoRA, keep_largest, keep_n_of_m, keep_rows, rank_for, svd
from minivid.lab import measure


def dice(seed=0):
    return torch.Generator().manual_seed(seed)


def inputs(n=200, i=10, seed=0):
    """Rows whose channels are unequal and correlated."""
    g = dice(seed)
    return (torch.randn(n, i, generator=g) * torch.logspace(-1.5, 1, i)) @ torch.randn(i, i, generator=g)


W = torch.randn(7, 10, generator=dice(5), dtype=torch.float64)
X = inputs().double()


@pytest.mark.parametrize("gram", [None, X.T @ X], ids=["plain", "whitened"])
def test_full_rank_is_the_matrix_and_each_cut_leaves_the_tail(gram):
    """The error in the norm that is minimised is the root of the sum of the dropped squared singular values: Eckart & Young."""
    a, b = svd(W, 7, gram)
    torch.testing.assert_close(a @ b, W, atol=1e-8, rtol=1e-8)
    x = torch.eye(10, dtype=torch.float64) if gram is None else X
    tail = torch.linalg.svdvals(x @ W.T)
    for r in range(8):
        a, b = svd(W, r, gram)
        assert a.shape == (7, r) and b.shape == (r, 10)
        torch.testing.assert_close((x @ (W - a @ b).T).norm(), tail[r:].norm(), atol=1e-5, rtol=1e-5)


@given(seed=st.integers(0, 200), rank=st.integers(1, 6))
def test_no_other_factors_are_better(seed, rank):
    """Neither random ones near by, nor alternating least squares begun anywhere."""
    g = dice(seed)
    gram = X.T @ X
    error = lambda a, b: (X @ (W - a @ b).T).norm()
    a, b = svd(W, rank, gram)
    least = error(a, b) * (1 - 1e-9)
    near = lambda t, size: t + size * torch.randn(t.shape, generator=g, dtype=t.dtype)
    assert all(error(near(a, size), near(b, size)) >= least for size in (1e-3, 1e-1, 1.0))
    other = torch.randn(rank, 10, generator=g, dtype=torch.float64)
    left = torch.linalg.lstsq(X @ other.T, X @ W.T).solution.T
    assert error(left, other) >= least and error(*svd(W, rank)) >= least


def test_white_inputs_change_nothing_and_the_terms_are_nested_and_balanced():
    a, b = svd(W, 6)
    for gram in (None, 3 * torch.eye(10, dtype=torch.float64)):
        c, d = svd(W, 3, gram)
        torch.testing.assert_close(a[:, :3] @ b[:3], c @ d)
    torch.testing.assert_close(a.T @ a, b @ b.T)
    assert (a.norm(dim=0).diff() <= 0).all()


def test_dead_inputs_are_no_trouble():
    """Channels that are always 0, and fewer samples than channels: finite factors, and outputs kept."""
    x = X[:4].clone()
    x[:, 2] = 0
    a, b = svd(W.float(), 4, x.T @ x)
    assert torch.isfinite(a).all() and torch.isfinite(b).all() and a.dtype == torch.float32
    torch.testing.assert_close(x.float() @ (a @ b).T, x.float() @ W.T.float(), atol=1e-3, rtol=1e-3)
    with pytest.raises(ValueError, match="were inputs recorded"):
        svd(W, 2, torch.zeros(10, 10))
    with pytest.raises(ValueError, match="ranks 0 to 7, got 8"):
        svd(W, 8)


def test_heads_are_a_batch():
    """Per head: each by itself, with one X'X for all; at full rank the projection is untouched."""
    w = torch.randn(12, 10, generator=dice(1))
    heads = rearrange(w, "(k d) i -> k d i", k=3)
    a, b = svd(heads, 2, (X.T @ X).float())
    for k in range(3):
        one, two = svd(heads[k], 2, (X.T @ X).float())
        torch.testing.assert_close(a[k] @ b[k], one @ two)
    a, b = svd(heads, 4)
    torch.testing.assert_close(rearrange(a @ b, "k d i -> (k d) i"), w)


@pytest.mark.parametrize("bias", [True, False])
def test_a_factored_layer_is_the_layer_and_merges_back(bias):
    linear, x = nn.Linear(10, 7, bias=bias), torch.randn(2, 3, 10)
    full = Factored.of(linear, 7)
    torch.testing.assert_close(full(x), linear(x))
    for r in (0, 1, 3):
        part = Factored.of(linear, r)
        a, b = svd(linear.weight.detach(), r)
        want = F.linear(x, a @ b, linear.bias)
        for same in (part(x), part.merge()(x), full(x, r), full.cut(r)(x)):
            torch.testing.assert_close(same, want)
        assert part.rank == r and measure.parameters(part) == r * 17 + 7 * bias
    zero = Factored.of(linear, 0)(x)
    assert torch.equal(zero, linear.bias.expand(2, 3, 7) if bias else torch.zeros(2, 3, 7))
    full(x).sum().backward()
    assert full.a.grad is not None and linear.weight.grad is None


def test_whitened_layers_keep_more_of_a_model():
    """On the inputs that a layer really gets, and on others of their kind."""
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 16), nn.GELU(), nn.Linear(16, 8))
    with torch.no_grad():
        model[0].weight.copy_(torch.diag(torch.logspace(-1.5, 0.5, 10)))
    gram, x, held_out = surgery.Gram(), torch.randn(400, 10), torch.randn(100, 10)
    surgery.record(model, [x], {"1": gram})
    off = lambda g: (surgery.swap(model, {"1": Factored.of(model[1], 3, g)})(held_out) - model(held_out)).norm()
    assert off(gram.xx) < 0.8 * off(None)


@given(o=st.integers(1, 40), i=st.integers(1, 40), share=st.floats(0, 1))
def test_the_rank_of_a_budget(o, i, share):
    r = rank_for(o, i, share)
    assert r * (o + i) <= share * o * i + 1e-6 and ((r + 1) * (o + i) > share * o * i - 1e-6 or r == min(o, i))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
def test_magnitude_and_structured_masks_are_torchs(share):
    for w in (torch.randn(20, 30), torch.randn(10, 6, 3, 3)):
        mask = prune.L1Unstructured(amount=1 - share).compute_mask(w, torch.ones_like(w))
        assert torch.equal(keep_largest(w, share), mask.bool())
        for dim in (0, 1):
            mask = prune.LnStructured(amount=1 - share, n=2, dim=dim).compute_mask(w, torch.ones_like(w)).bool()
            ours = keep_rows(w, share, dim)
            assert ours.shape == (w.shape[dim],) and torch.equal(ours, mask.movedim(dim, 0).flatten(1).all(1))


def test_two_of_four_is_torchs_and_a_slow_loop():
    from torch.ao.pruning import WeightNormSparsifier

    model = nn.Sequential(nn.Linear(32, 8))
    w = model[0].weight.detach().clone()
    sparsifier = WeightNormSparsifier(sparsity_level=1.0, sparse_block_shape=(1, 4), zeros_per_block=2)
    sparsifier.prepare(model, [{"tensor_fqn": "0.weight"}])
    sparsifier.step()
    mask = keep_n_of_m(w)
    assert torch.equal(mask, model[0].parametrizations.weight[0].mask.bool())
    for n, m in ((1, 2), (2, 4), (3, 8), (0, 4), (4, 4)):
        mask = keep_n_of_m(w, n, m)
        for row, kept in zip(w.split(m, 1), mask.split(m, 1), strict=True):
            assert (kept.sum(1) == n).all()
            if 0 < n < m:
                assert (row.abs().masked_fill(~kept, torch.inf).amin(1) >= row.abs().masked_fill(kept, 0).amax(1)).all()
    with pytest.raises(ValueError, match="rows of 10 must divide into groups of 4"):
        keep_n_of_m(torch.zeros(2, 10))


def test_cutting_the_smallest_units_makes_a_smaller_network():
    one, two, x = nn.Linear(10, 32), nn.Linear(32, 4), torch.randn(5, 10)
    with torch.no_grad():
        one.weight[::2] = 0  # units that say only their bias
    mask = keep_rows(one.weight, 0.5)
    assert torch.equal(mask.nonzero()[:, 0], torch.arange(1, 32, 2))
    small = F.linear(F.linear(x, one.weight[mask], one.bias[mask]).relu(), two.weight[:, mask], two.bias)
    rest = F.linear(one.bias[~mask].relu(), two.weight[:, ~mask])
    torch.testing.assert_close(small + rest, two(one(x).relu()))


LAYERS = {
    "linear": (lambda: nn.Linear(10, 7), (2, 3, 10)),
    "no bias": (lambda: nn.Linear(10, 7, bias=False), (4, 10)),
    "conv": (lambda: nn.Conv2d(5, 6, 3, stride=2, padding=1, padding_mode="replicate"), (2, 5, 9, 9)),
}


@pytest.mark.parametrize("make, shape", LAYERS.values(), ids=LAYERS)
def test_lora_begins_as_the_layer_learns_beside_it_and_merges(make, shape):
    layer, x = make(), torch.randn(shape)
    part = LoRA(layer, 2, dice())
    assert torch.equal(part(x), layer(x))
    before = layer.weight.detach().clone()
    trained = [p for p in part.parameters() if p.requires_grad]
    assert {id(p) for p in trained} == {id(part.up.weight), id(part.down.weight)} and layer.weight.requires_grad
    opt = torch.optim.SGD(trained, 0.1)
    for _ in range(3):
        opt.zero_grad(), part(x).square().mean().backward(), opt.step()
    assert not torch.allclose(part(x), layer(x)) and torch.equal(layer.weight, before)
    for _ in range(2):  # twice: what is merged isn't added to the base
        merged = part.merge()
        torch.testing.assert_close(merged(x), part(x), atol=1e-5, rtol=1e-5)
    assert type(merged) is type(layer) and torch.linalg.matrix_rank((merged.weight - before).flatten(1)) == 2


def test_the_strength_of_lora_is_linear_and_0_is_off():
    layer, x = nn.Linear(10, 7), torch.randn(4, 10)
    part = LoRA(layer, 2, dice())
    nn.init.normal_(part.up.weight)
    whole = part(x) - layer(x)
    part.strength = 0.25
    torch.testing.assert_close(part(x) - layer(x), 0.25 * whole, atol=1e-5, rtol=1e-5)
    part.strength = 0
    assert torch.equal(part(x), layer(x)) and torch.equal(part.merge().weight, layer.weight)


def test_lora_draws_from_its_generator_only_and_says_where_it_fits():
    layer, grouped, state = nn.Linear(10, 7), nn.Conv2d(4, 4, 3, groups=2), torch.get_rng_state()
    one, two = (LoRA(layer, 2, dice(3)) for _ in range(2))
    assert torch.equal(one.down.weight, two.down.weight) and torch.equal(state, torch.get_rng_state())
    with pytest.raises(TypeError, match="without groups"):
        LoRA(grouped, 2, dice())
