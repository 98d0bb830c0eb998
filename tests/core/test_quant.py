"""Quantisers: against PyTorch's own, scipy, brute force; at many bits they are the identity; stored bytes are counted."""

import itertools
import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from minivid.core import surgery
from minivid.core.attention import Attention, unfused
from minivid.core.baselines.quant import (
    LearnedSteps,
    QuantisedLinear,
    Steps,
    allocate,
    around,
    between,
    dequantise,
    fake_quantise,
    gptq,
    hadamard,
    hessian,
    largest,
    minmax,
    pack,
    pack3,
    quantise,
    search,
    smoothing,
    symmetric,
    traces,
    unpack,
    unpack3,
)
from minivid.core.where import grid
from minivid.lab import measure


def dice(seed=0):
    return torch.Generator().manual_seed(seed)


W = torch.randn(12, 64, generator=dice()) * torch.rand(12, 1, generator=dice(1))
GRANULARITY = {"tensor": (W, ()), "channel": (W, 1), "group": (W.unflatten(1, (-1, 16)), -1), "token": (W.view(3, 4, 64), -1)}
each = pytest.mark.parametrize("x, dim", GRANULARITY.values(), ids=GRANULARITY)
kinds = pytest.mark.parametrize("make", [minmax, symmetric])


@each
@kinds
def test_the_limit_of_many_bits_is_no_change(x, dim, make):
    """The error is at most half a step, and so halves with every bit."""
    for bits in (2, 4, 8, 12, 16):
        s = make(x, bits, dim)
        back = dequantise(quantise(x, s), s)
        assert ((back - x).abs() <= s.step / 2 + 1e-6).all()
        torch.testing.assert_close(fake_quantise(x, s), back)
        assert torch.equal(quantise(back, s), quantise(x, s))
    assert (back - x).abs().max() < 1e-4 * x.abs().max()


@each
def test_ranges_are_covered(x, dim):
    s = minmax(x, 3, dim)
    codes = quantise(x, s)
    assert (codes.amin(dim) == 0).all() and (codes.amax(dim) == 7).all()
    back = dequantise(codes, s)
    torch.testing.assert_close(back.amax(dim), x.amax(dim))
    assert torch.equal(back.amin(dim), x.amin(dim))
    codes = quantise(x, symmetric(x, 3, dim))
    assert codes.abs().amax(dim).min() == 3 and codes.min() >= -4
    assert (quantise(torch.zeros_like(x), symmetric(x, 3, dim)) == 0).all()


@pytest.mark.parametrize("make, bits", [(minmax, 1), (minmax, 4), (symmetric, 2), (symmetric, 4)])
def test_constants_are_exact(make, bits):
    for value in (0.0, 3.25, -2.0):
        x = torch.full((2, 5), value)
        s = make(x, bits, 1)
        torch.testing.assert_close(dequantise(quantise(x, s), s), x)


def test_a_step_serves_its_own_numbers_only():
    """Per token: a permutation of tokens permutes the result, and other tokens don't matter. Affine maps of x pass through."""
    x, order = torch.randn(6, 32), torch.randperm(6)
    token = lambda y: fake_quantise(y, minmax(y, 4, -1))
    assert torch.equal(token(x)[order], token(x[order])) and torch.equal(token(x)[:1], token(x[:1]))
    torch.testing.assert_close(token(3 * x + 5), 3 * token(x) + 5)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_torch_quantises_alike_per_tensor_and_channel(bits):
    """Values and gradients of torch.fake_quantize_*, with some numbers beyond the ends."""
    s = symmetric(W, bits).scaled(0.4)
    x, y = W.clone().requires_grad_(True), W.clone().requires_grad_(True)
    ours, theirs = fake_quantise(x, s), torch.fake_quantize_per_tensor_affine(y, s.step.item(), 0, s.low, s.high)
    torch.testing.assert_close(ours, theirs)
    (ours * W).sum().backward(), (theirs * W).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    assert (x.grad == 0).any()
    s = symmetric(W, bits, 1).scaled(0.4)
    theirs = torch.fake_quantize_per_channel_affine(W, s.step[:, 0], torch.zeros(12), 0, s.low, s.high)
    torch.testing.assert_close(fake_quantise(W, s), theirs)
    zero = 2**bits // 3
    s = Steps(torch.tensor(0.11), torch.tensor(-0.11 * zero), 0, 2**bits - 1)
    theirs = torch.fake_quantize_per_tensor_affine(W, 0.11, zero, 0, 2**bits - 1)
    torch.testing.assert_close(fake_quantise(W, s), theirs)


def test_the_gradient_of_step_and_offset_is_lsqs():
    """PyTorch's learnable quantiser says the same; each clamped number adds its end's code to the step's gradient."""
    x = torch.randn(200, generator=dice())
    step = torch.tensor([0.2], requires_grad=True)
    zero = torch.tensor([3.0], requires_grad=True)
    torch._fake_quantize_learnable_per_tensor_affine(x, step, zero, 0, 7, 1.0).pow(3).sum().backward()
    ours, offset = torch.tensor([0.2], requires_grad=True), torch.tensor([-0.6], requires_grad=True)
    fake_quantise(x, Steps(ours, offset, 0, 7)).pow(3).sum().backward()
    # Theirs keeps the zero point's code, ours the offset = -step zero: by the chain rule d/d step differs by zero d/d offset.
    torch.testing.assert_close(ours.grad - 3 * offset.grad, step.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(offset.grad * -0.2, zero.grad, rtol=1e-4, atol=1e-4)
    ours.grad = None
    fake_quantise(torch.tensor([99.0]), Steps(ours, torch.tensor([0.0]), 0, 7)).sum().backward()
    assert ours.grad.item() == 7


def test_a_learnt_clip_of_a_running_range_gets_its_gradient():
    """Ends of the range times learnt shares, as activations are clipped: against finite differences of the clamped numbers."""
    x = torch.randn(4, 64, generator=dice())
    share = torch.full((2,), 0.6, requires_grad=True)
    grid_of = lambda p: between(p[0] * x.amin(1, keepdim=True), p[1] * x.amax(1, keepdim=True), 8)
    fake_quantise(x, grid_of(share)).sum().backward()
    for i in range(2):
        p, m = (share.detach().clone().index_add(0, torch.tensor([i]), torch.tensor([d])) for d in (0.01, -0.01))
        clamped = lambda q: x.clamp(q[0] * x.amin(1, keepdim=True), q[1] * x.amax(1, keepdim=True)).sum()
        assert share.grad[i].item() == pytest.approx(((clamped(p) - clamped(m)) / 0.02).item(), abs=0.8)
    torch.testing.assert_close(around(x.abs().amax(), 4).step, symmetric(x, 4).step[0, 0])


def test_learned_steps_find_a_better_grid():
    x = torch.randn(16, 256, generator=dice())
    start = symmetric(x, 3, 1)
    part = LearnedSteps(start, 256)
    assert torch.equal(part(x), fake_quantise(x, start)) and not part.offset.requires_grad
    part(x).square().sum().backward()
    plain = start.step.clone().requires_grad_(True)
    fake_quantise(x, start._replace(step=plain)).square().sum().backward()
    torch.testing.assert_close(part.step.grad, plain.grad / math.sqrt(256 * 3))
    opt = torch.optim.Adam(part.parameters(), 0.02)
    error = lambda: (part(x) - x).square().mean(1)
    first, searched = error().detach(), search(x, start, 1)
    for _ in range(100):
        opt.zero_grad(), error().sum().backward(), opt.step()
    assert (error() < 0.7 * first).all()
    best = (fake_quantise(x, searched) - x).square().mean(1)
    assert error().mean() < 1.1 * best.mean()
    assert LearnedSteps(minmax(x, 3, 1), 256).offset.requires_grad


def test_a_step_that_crossed_zero_is_turned_round():
    x = torch.randn(4, 64, generator=dice())
    part = LearnedSteps(minmax(x, 3, 1), 64)
    with torch.no_grad():  # rows 1 and 3 as learning may leave them: from the top downwards
        for row in (1, 3):
            part.offset[row] += 7 * part.step[row]
            part.step[row] *= -1
    assert (part.learnt.step > 0).all() and torch.equal(part.learnt.step[::2], part.step[::2])
    torch.testing.assert_close(dequantise(quantise(x, part.learnt), part.learnt), part(x).detach(), atol=1e-5, rtol=0)


@each
@kinds
def test_the_search_is_the_slow_loop_and_never_hurts(x, dim, make):
    s = make(x, 3, dim)
    found = search(x, s, dim, power=2.4)
    error = lambda g: (fake_quantise(x, g) - x).abs().pow(2.4).sum(dim, keepdim=True)
    every = torch.stack([error(s.scaled(1 - k / 100)) for k in range(80)])
    torch.testing.assert_close(error(found), every.amin(0))
    assert (error(found) <= error(s)).all() and error(found).sum() < 0.95 * error(s).sum()


def test_the_search_finds_the_known_grid_of_a_gaussian():
    """Four levels for a standard normal: the best even grid has step 0.9957 and error 0.1188 (Max 1960, table 2)."""
    x = torch.randn(1, 200_000, generator=dice())
    s = Steps(torch.tensor([[2.0]]), torch.tensor([[-3.0]]), 0, 3)
    found = search(x, s, 1)
    assert found.step.item() == pytest.approx(0.9957, abs=0.02)
    assert (fake_quantise(x, found) - x).square().mean().item() == pytest.approx(0.1188, abs=0.002)


def test_smoothing_changes_nothing_and_its_ends_are_flat():
    x, w = torch.randn(50, 16).double() * torch.logspace(-2, 2, 16), torch.randn(8, 16).double()
    for alpha in (0.0, 0.5, 1.0):
        s = smoothing(x.abs().amax(0), w.abs().amax(0), alpha)
        torch.testing.assert_close((x / s) @ (w * s).T, x @ w.T, atol=1e-10, rtol=1e-10)
    flat = lambda t: t.abs().amax(0).max() / t.abs().amax(0).min()
    assert flat(x / s) < 1 + 1e-9 and flat(w * smoothing(x.abs().amax(0), w.abs().amax(0), 0.0)) < 1 + 1e-9
    four = lambda a, b: (fake_quantise(a, symmetric(a, 4, -1)) @ fake_quantise(b, symmetric(b, 4, 1)).T - x @ w.T).norm()
    s = smoothing(x.abs().amax(0), w.abs().amax(0))
    assert four(x / s, w * s) < 0.5 * four(x, w)


@pytest.mark.parametrize("d", [1, 2, 4, 12, 16, 20, 48, 96, 128, 384, 448])
def test_hadamard_is_orthogonal_and_scipys(d):
    h = hadamard(torch.eye(d, dtype=torch.float64))
    torch.testing.assert_close(h.abs(), torch.full_like(h, d**-0.5))
    torch.testing.assert_close(h @ h.T, torch.eye(d, dtype=torch.float64))
    if d & (d - 1) == 0:
        torch.testing.assert_close(h, torch.from_numpy(scipy.linalg.hadamard(d)).double() * d**-0.5)
        x = torch.randn(3, 5, d)
        torch.testing.assert_close(hadamard(hadamard(x)), x)


def test_a_random_rotation_keeps_the_product_and_spreads_an_outlier():
    x, w = torch.randn(40, 96), torch.randn(8, 96)
    signs = torch.randint(0, 2, (96,), generator=dice()) * 2 - 1
    torch.testing.assert_close(hadamard(x * signs) @ hadamard(w * signs).T, x @ w.T, atol=1e-4, rtol=1e-4)
    x[:, 3] *= 100
    assert hadamard(x * signs).abs().max() < 0.3 * x.abs().max()
    with pytest.raises(ValueError, match="size 6 is known here"):
        hadamard(torch.zeros(6))


def correlated(n, i, seed=0):
    """Inputs whose channels share a few causes."""
    g = dice(seed)
    causes = torch.randn(4, i, generator=g)
    return torch.randn(n, 4, generator=g) @ causes + 0.3 * torch.randn(n, i, generator=g)


def output_error(w, codes, s, gram):
    """|X (w - w_q)'|^2 of each row, from X'X."""
    e = (dequantise(codes, s.each(w)) - w).double()
    return ((e @ gram.double()) * e).sum(1)


def test_gptq_is_rounding_where_inputs_are_uncorrelated():
    gram = torch.diag(torch.rand(64) + 0.1)
    for s in (symmetric(W, 3, 1), minmax(W.unflatten(1, (-1, 16)), 3, -1), minmax(W, 2)):
        assert torch.equal(gptq(W, gram, s), quantise(W, s.each(W)))


@pytest.mark.parametrize("bits, gain", [(2, 0.8), (3, 0.6), (4, 0.4), (8, 0.4)])
def test_gptq_beats_rounding_on_correlated_inputs(bits, gain):
    """Also on inputs that it has not seen; and a layer stored with it says so."""
    x, held_out = correlated(900, 64).split([600, 300])
    s = search(W, symmetric(W, bits, 1), 1).stored()
    codes, plain = gptq(W, x.T @ x, s), quantise(W, s.each(W))
    assert codes.min() >= s.low and codes.max() <= s.high
    for seen in (x, held_out):
        gram = seen.T @ seen
        assert output_error(W, codes, s, gram).sum() < gain * output_error(W, plain, s, gram).sum()
    linear = nn.Linear(64, 12)
    linear.weight.data.copy_(W)
    stored = QuantisedLinear.of(linear, s, x.T @ x)
    torch.testing.assert_close(stored.weight, dequantise(codes, s.each(W)))


@given(seed=st.integers(0, 300))
def test_gptq_keeps_its_books_and_its_bound(seed):
    """Without clamping, its error is a sum over columns of (step / 2)^2 / U_jj^2 at most (Babai's nearest plane), and given
    the codes of all columns but the last one rounded, that one is the best there is."""
    g = dice(seed)
    w, x = torch.randn(3, 5, generator=g).double(), correlated(40, 5, seed).double()
    gram = x.T @ x
    s = Steps(torch.full((3, 1), 0.5).double(), torch.zeros(3, 1).double(), -1000, 1000)
    codes = gptq(w, gram, s, damp=0)
    error = output_error(w, codes, s, gram)
    order = gram.diagonal().argsort(descending=True)
    u = torch.linalg.cholesky(torch.linalg.inv(gram[order][:, order]), upper=True)
    assert (error <= (0.25**2 / u.diagonal() ** 2).sum() * (1 + 1e-6)).all()
    for change in (-1, 1):
        other = codes.clone()
        other[:, order[-1]] += change
        assert (output_error(w, other, s, gram) >= error * (1 - 1e-9)).all()


def test_gptq_is_near_the_best_of_all_codes():
    """Every one of 4^5 choices tried for each of 60 rows: never better than the best, near it, and far nearer than rounding."""
    w, x = torch.randn(60, 5, generator=dice()), correlated(60, 5)
    gram, s = (x.T @ x).double(), minmax(w, 2, 1)
    choices = torch.tensor(list(itertools.product(range(4), repeat=5)), dtype=torch.int32)
    every = torch.stack([output_error(w, c.expand(60, 5), s, gram) for c in choices])
    best, rounded = every.amin(0), output_error(w, quantise(w, s), s, gram)
    ours = output_error(w, gptq(w, gram, s), s, gram)
    assert (ours >= best - 1e-6).all() and ours.sum() < 1.2 * best.sum() and rounded.sum() > 1.5 * best.sum()
    assert (ours - best < 1e-6).double().mean() > 0.4  # two rows in five are the best there is


def test_gptq_needs_inputs():
    with pytest.raises(ValueError, match="were inputs recorded"):
        gptq(W, torch.zeros(64, 64), symmetric(W, 4, 1))


@given(bits=st.integers(1, 8), n=st.integers(0, 70), seed=st.integers(0, 99))
def test_packing_is_lossless_and_tight(bits, n, seed):
    codes = torch.randint(0, 2**bits, (n,), generator=dice(seed))
    packed = pack(codes, bits)
    assert torch.equal(unpack(packed, bits, n).long(), codes) and len(packed) == math.ceil(n * bits / 8)
    if bits == 1 and n:
        assert packed.numpy().tobytes() == np.packbits(codes.numpy().astype(np.uint8), bitorder="little").tobytes()


@given(st.lists(st.integers(0, 2), max_size=40))
def test_base_three_is_lossless_and_tight(codes):
    packed = pack3(torch.tensor(codes, dtype=torch.int64))
    assert unpack3(packed, len(codes)).tolist() == codes and len(packed) == math.ceil(len(codes) / 5)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"in \[0, 4\), got 0 to 4"):
        pack(torch.arange(5), 2)
    with pytest.raises(ValueError, match="1 to 8 here, got 9"):
        pack(torch.arange(5), 9)
    with pytest.raises(ValueError, match="got -1 to 1"):
        pack3(torch.tensor([-1, 0, 1]))
    with pytest.raises(ValueError, match="2 to 16 here, got 1"):
        symmetric(W, 1)
    with pytest.raises(ValueError, match="scale the weights"):
        symmetric(W * 1e-8, 8).stored()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [None, 16])
def test_a_stored_layer_is_the_rounded_layer_in_fewer_bytes(bits, group):
    linear, x = nn.Linear(64, 12), torch.randn(2, 5, 64)
    rows = linear.weight if group is None else linear.weight.unflatten(1, (-1, group))
    for s, numbers in ((symmetric(rows, bits, -1), 1), (minmax(rows, bits, -1), 2)):
        layer = QuantisedLinear.of(linear, s)
        want = fake_quantise(rows, s.stored()).reshape(12, 64)
        torch.testing.assert_close(layer.weight, want)
        torch.testing.assert_close(layer(x), nn.functional.linear(x, want, linear.bias))
        steps = 12 * (1 if group is None else 4)
        assert layer.nbytes == 12 * 64 * bits // 8 + 2 * numbers * steps + 4 * 12 == measure.stored_bytes(layer)
        again = QuantisedLinear.of(nn.Linear(64, 12), s._replace(step=s.step + 1))
        again.load_state_dict(layer.state_dict())
        assert torch.equal(again(x), layer(x))


def test_a_stored_layer_takes_a_place_in_a_model_and_rounds_its_inputs():
    model, x = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 4)), torch.randn(10, 16)
    gram = surgery.Gram()
    surgery.record(model, [x], {"2": gram})
    eight = lambda y: fake_quantise(y, minmax(y, 8, -1))
    new = {"2": QuantisedLinear.of(model[2], symmetric(model[2].weight, 8, 1), gram.xx, inputs=eight)}
    smaller = surgery.swap(model, new)
    assert (smaller(x) - model(x)).abs().max() < 0.03 * model(x).abs().max()
    assert measure.stored_bytes(smaller) == measure.stored_bytes(model) - 4 * 128 + 128 + 8


@given(seed=st.integers(0, 60), budgets=st.integers(1, 2))
def test_allocation_is_brute_force(seed, budgets):
    g = dice(seed)
    cost = torch.rand(5, 3, generator=g)
    limits = [(torch.rand(5, 3, generator=g), 2.2) for _ in range(budgets)]
    ties = ((0, 3),) if seed % 2 else ()
    total = lambda t, choice: sum(float(t[i, c]) for i, c in enumerate(choice))
    legal = [c for c in itertools.product(range(3), repeat=5)
             if all(total(use, c) <= most for use, most in limits) and all(c[a] == c[b] for a, b in ties)]
    if not legal:
        with pytest.raises(ValueError, match="no choice keeps all budgets"):
            allocate(cost, limits, ties)
        return
    found = allocate(cost, limits, ties).tolist()
    assert all(total(use, found) <= most + 1e-6 for use, most in limits) and all(found[a] == found[b] for a, b in ties)
    assert total(cost, found) == pytest.approx(min(total(cost, c) for c in legal), abs=1e-6)
    assert allocate(cost * 1e-9, limits, ties).tolist() == found


def test_a_looser_budget_never_costs_more():
    cost, size = torch.tensor([[4.0, 1.0], [9.0, 2.0], [1.0, 0.5]]), torch.tensor([[4.0, 8.0]] * 3)
    spent = [cost.gather(1, allocate(cost, [(size, most)])[:, None]).sum() for most in (12, 16, 20, 24)]
    assert spent[0] == 14 and spent[-1] == 3.5 and all(b <= a for a, b in zip(spent, spent[1:], strict=False))
    with pytest.raises(ValueError, match="11"):
        allocate(cost, [(size, 11)])


def test_budgets_are_kept_in_any_unit():
    """A budget that everybody's best option just fills is no budget, be it seconds or bit operations."""
    cost, use = torch.rand(60, 3, generator=dice()).cumsum(1).flip(1), torch.rand(60, 1, generator=dice(1))
    use = use * torch.tensor([2.0, 4, 8])
    for unit in (1e-9, 1.0, 1e10):
        every = (use * unit).double()
        assert allocate(cost, [(every, every[:, 2].sum().item()), (every, every[:, 2].sum().item())]).tolist() == [2] * 60


def net():
    torch.manual_seed(0)
    model, x, y = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(20, 3), torch.randn(20, 2)
    weights = [p for p in model.parameters() if p.ndim == 2]
    explicit = torch.autograd.functional.hessian(
        lambda a, b: (torch.tanh(x @ a.T + model[0].bias) @ b.T + model[2].bias - y).square().mean(), tuple(weights))
    sizes = [w.numel() for w in weights]
    matrix = torch.cat([torch.cat([explicit[r][c].reshape(sizes[r], sizes[c]) for c in range(2)], 1) for r in range(2)])
    return (model(x) - y).square().mean(), weights, matrix.detach()


def test_products_traces_and_the_top_eigenvalue_are_those_of_the_explicit_hessian():
    loss, weights, matrix = net()
    apply = hessian(loss, weights)
    v = [torch.randn(w.shape) for w in weights]
    flat = lambda t: torch.cat([a.flatten() for a in t])
    torch.testing.assert_close(flat(apply(v)), matrix @ flat(v), atol=1e-5, rtol=1e-4)
    n = weights[0].numel()
    want = torch.stack([matrix[:n, :n].trace(), matrix[n:, n:].trace()]).double()
    torch.testing.assert_close(traces(apply, weights, dice(), 4000), want, rtol=0.05, atol=0.01)
    values, vectors = torch.linalg.eigh(matrix)
    value, vector = largest(apply, weights, dice())
    assert value == pytest.approx(values[-1].item(), rel=1e-3)
    assert abs(float(flat(vector) @ vectors[:, -1])) > 0.999


def test_attention_written_out_has_a_curvature():
    """Against the difference of two gradients."""
    torch.manual_seed(0)
    layer, x = Attention(8, 2, attend=unfused).double(), torch.randn(1, 6, 8).double()
    weights, v = [layer.q.weight, layer.v.weight], [torch.randn(8, 8).double() for _ in range(2)]
    loss = lambda: layer(x, grid(6, 1, 1)).pow(3).sum()
    said, sides = hessian(loss(), weights)(v), []
    for side in (1e-4, -2e-4):
        with torch.no_grad():
            for w, a in zip(weights, v, strict=True):
                w += side * a
        sides.append(torch.autograd.grad(loss(), weights))
    for a, plus, minus in zip(said, *sides, strict=True):
        torch.testing.assert_close(a, (plus - minus) / 2e-4, rtol=1e-4, atol=1e-4)


def test_one_probe_is_exact_on_a_diagonal_and_the_top_singular_value_is_the_svds():
    diagonal, w = torch.rand(7), torch.randn(20, 9)
    assert traces(lambda v: [diagonal * v[0]], [diagonal], dice(), 1).item() == pytest.approx(diagonal.sum().item(), rel=1e-5)
    value, _ = largest(lambda v: [w.T @ (w @ v[0])], [w[0]], dice(), 200)
    assert math.sqrt(value) == pytest.approx(torch.linalg.matrix_norm(w, 2).item(), rel=1e-3)
    assert largest(lambda v: [0 * v[0]], [w[0]], dice())[0] == 0
