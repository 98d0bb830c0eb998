"""QVGen: helpers of full rank are the float layer, the rest of an SVD is what stays wrong, and nothing jumps when ranks halve."""

import copy
import itertools
import math

import pytest
import torch
from checks.models import linears, video
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from minivid.core import fit
from minivid.core.baselines.quant import Steps, dequantise, fake_quantise, minmax, quantise
from minivid.core.model import Cond
from minivid.core.surgery import Clock
from minivid.quantization import qvgen as paper
from minivid.quantization.qvgen import Bits, ClippedInputs, QVLinear, Tuning

SEEDS = st.integers(0, 10_000)


def dice(seed=0):
    return torch.Generator().manual_seed(seed)


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def layer(o=24, i=20, seed=0, **more):
    """A layer in few bits, in training mode, and the linear layer that it was."""
    torch.manual_seed(seed)
    linear = nn.Linear(i, o)
    return linear, QVLinear(linear, Bits(**{"rank": 16, "groups": 1} | more)).train()


def call(b=2, seed=0):
    g = dice(seed)
    x, t = torch.randn(b, 4, 2, 6, 6, generator=g), torch.rand(b, generator=g)
    return x, t, Cond(text=torch.randint(2, 200, (b, 4), generator=g))


def batches(i):
    return torch.randn(4, 4, 2, 6, 6, generator=dice(i % 3)), torch.randint(2, 200, (4, 4), generator=dice(i % 3))


# --- the law of limits ------------------------------------------------------------------------------------------------


@given(SEEDS, st.sampled_from([1, 2, 3, 4]))
@settings(max_examples=8)
def test_a_helper_of_full_rank_cancels_the_error_of_the_weights(seed, weights):
    linear, part = layer(seed=seed, weights=weights, rank=99)
    close(part.grid(part.weight) + part.helper, linear.weight)
    x = torch.randn(2, 5, 20, generator=dice(seed))
    close(part(x), linear(part.inputs(x)), 1e-4)


@pytest.mark.parametrize("rank", [1, 4, 16])
def test_a_lower_rank_leaves_the_other_singular_values(rank):
    linear, part = layer(rank=rank)
    error = (linear.weight - part.grid(part.weight)).detach()
    left = (error - part.helper).norm()
    close(left, torch.linalg.svdvals(error)[rank:].square().sum().sqrt(), 1e-4)
    assert part.rank == rank and left < error.norm()


def test_rank_0_is_ordinary_training_and_many_bits_are_the_model():
    _, part = layer(rank=0)
    x = torch.randn(3, 7, 20, generator=dice())
    assert part.left is None and torch.equal(part(x), part.eval()(x))
    model = video()
    fine = paper.quantised(model, linears(model), Bits(16, 16, 0))
    for one in paper.layers(fine).values():
        one.inputs.clip.data.fill_(20.0)  # nothing is cut off
    close(fine(*call()), model(*call()), 1e-3)


@pytest.mark.parametrize("rank", [0, 4])
def test_evaluation_never_sees_the_helper(rank):
    _, part = layer(rank=rank)
    x = torch.randn(3, 7, 20, generator=dice())
    before, trained = part.eval()(x), part.train()(x)
    for p in (part.left, part.right):
        if p is not None:
            p.data.fill_(1e3)
    assert torch.equal(part.eval()(x), before)
    assert torch.equal(part.train()(x), trained) == (rank == 0)


def test_only_at_most_2_to_the_bits_values_a_row():
    for bits in (1, 2, 3, 4):
        _, part = layer(o=30, i=200, weights=bits)
        assert max(len(row.unique()) for row in part.grid(part.weight)) <= 2**bits
        x = torch.randn(2, 9, 200, generator=dice())
        inputs = ClippedInputs(bits)(x)
        assert max(len(row.unique()) for row in inputs.flatten(0, 1)) <= 2**bits


# --- grids ------------------------------------------------------------------------------------------------------------


def test_the_grids_start_is_the_best_of_a_slow_search():
    linear, part = layer(weights=3)
    w, start = linear.weight.detach(), minmax(linear.weight.detach(), 3, 1)
    for row in range(5):
        best = min((1 - k / 100 for k in range(80)), key=lambda p: _lost(w[row], start.step[row] * p, start.offset[row] * p))
        close(part.grid.step[row], start.step[row] * best)


def _lost(x, step, offset):
    s = Steps(step, offset, 0, 7)
    return (dequantise(quantise(x, s), s) - x).abs().pow(2.4).sum().item()


def test_the_steps_gradient_is_the_slope_of_the_straight_through_surrogate():
    """Rounding's own error is held: value = (v + held) step + offset where a code isn't clamped, else the end's code."""
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(4, 50) * 0.5)
    part = QVLinear(nn.Linear(50, 4), Bits(3, 3, 0))
    part.grid.step.data.fill_(0.13)
    part.grid.offset.data.fill_(-0.4)
    up = torch.randn(4, 50, generator=dice())
    (part.grid(w) * up).sum().backward()
    v = (w.detach() + 0.4) / 0.13
    inside, held = (v.round() >= 0) & (v.round() <= 7), v.round() - v

    def surrogate(step, offset):
        now = (w.detach().double() - offset) / step
        return ((torch.where(inside, now + held, v.clamp(0, 7)) * step + offset) * up).sum(1)

    e, scale = 1e-6, 1 / math.sqrt(50 * 7)
    slope = (surrogate(0.13 + e, -0.4) - surrogate(0.13 - e, -0.4)) / (2 * e) * scale
    close(part.grid.step.grad[:, 0].double(), slope, 1e-4)
    slope = (surrogate(0.13, -0.4 + e) - surrogate(0.13, -0.4 - e)) / (2 * e) * scale
    close(part.grid.offset.grad[:, 0].double(), slope, 1e-4)


def test_what_is_clipped_high_pulls_at_the_scale_by_the_last_code_less_the_zero_point():
    scale, zero = torch.tensor([[0.1]], requires_grad=True), 2.3  # LSQ+ with a zero point in steps: offset = -zero scale
    fake_quantise(torch.tensor([[9.0]]), Steps(scale, -zero * scale, 0, 7)).sum().backward()
    close(scale.grad, torch.tensor([[7 - zero]]))


def test_inputs_have_a_grid_a_token_of_0_95_of_its_range_at_first():
    x = torch.randn(2, 6, 20, generator=dice())
    part = ClippedInputs(3)
    for b, n in itertools.product(range(2), range(6)):  # the slow loop
        low, high = 0.95 * x[b, n].min(), 0.95 * x[b, n].max()
        step = (high - low) / 7
        close(part(x)[b, n], ((x[b, n] - low) / step).round().clamp(0, 7) * step + low)


def test_each_interval_of_time_has_its_own_clipping():
    clock = Clock()
    part = ClippedInputs(8, 4, clock)
    assert part.group(3).tolist() == [0, 0, 0]
    clock.t = torch.tensor([0.0, 0.24, 0.25, 0.99, 1.0])
    assert part.group(5).tolist() == [0, 0, 1, 3, 3]
    clock.t = clock.t[:, None].expand(-1, 6)
    assert part.group(5).tolist() == [0, 0, 1, 3, 3]
    x = torch.randn(5, 4, 8, generator=dice())
    before = part(x)
    part.clip.data[1] = -1.0
    assert torch.equal(part(x)[[0, 1, 3, 4]], before[[0, 1, 3, 4]]) and not torch.equal(part(x)[2], before[2])
    part(x).square().sum().backward()
    assert (part.clip.grad[[0, 1, 3]] != 0).all() and (part.clip.grad[2] == 0).all()


def test_a_models_layers_know_its_time():
    model = video()
    soft = paper.quantised(model, linears(model), Bits(4, 4, 0, groups=2))
    x, _, cond = call()
    soft(x, torch.tensor([0.1, 0.9]), cond)
    part = next(iter(paper.layers(soft).values()))
    assert part.inputs.group(2).tolist() == [0, 1]


# --- how helpers vanish -----------------------------------------------------------------------------------------------


def test_the_annealing_goes_from_1_to_0():
    assert paper.annealed(0, 80) == 1 and paper.annealed(80, 80) == pytest.approx(0, abs=1e-12)
    assert paper.annealed(40, 80) == pytest.approx(0.5)
    u = [paper.annealed(i, 80) for i in range(81)]
    assert all(b < a for a, b in itertools.pairwise(u))


@given(SEEDS)
@settings(max_examples=5)
def test_ranks_go_16_8_4_2_1_0_and_the_weaker_half_fades(seed):
    _, part = layer(seed=seed)
    seen, x = [], torch.randn(1, 3, 20, generator=dice(seed))
    for step in range(50):
        paper.by_rank(part, step, 50)
        seen.append(part.rank)
        last, u = max(1, part.rank // 2), paper.annealed(step % 10, 10)
        close(part.gamma, torch.tensor([1.0] * (part.rank - last) + [u] * last))
        if step % 10 == 0:  # at 1 the mask is the identity
            assert torch.equal(part.helper, part.left @ part.right)
    assert [r for r, _ in itertools.groupby(seen)] == [16, 8, 4, 2, 1] == paper.ranks(16)
    paper.by_rank(part, 50, 50)
    assert part.rank == 0 and {name for name, _ in part.named_parameters()} == {
        "weight", "bias", "grid.step", "grid.offset", "inputs.clip"}  # fmt: skip
    assert torch.equal(part(x), part.eval()(x))


@pytest.mark.parametrize("rank, want", [(12, [12, 6, 3, 1]), (1, [1]), (0, [])])
def test_other_ranks_halve_too(rank, want):
    _, part = layer(rank=rank)
    assert paper.ranks(rank) == want
    seen = []
    for step in range(41):
        paper.by_rank(part, step, 40)
        seen.append(part.rank)
    assert [r for r, _ in itertools.groupby(seen)] == [*want, 0]


@given(SEEDS)
@settings(max_examples=5)
def test_nothing_jumps_when_a_faded_half_is_dropped(seed):
    _, part = layer(seed=seed)
    part.left.data += 0.1 * torch.randn(part.left.shape, generator=dice(seed))  # as if trained: no longer balanced
    x = torch.randn(2, 6, 20, generator=dice(seed + 1))
    while part.rank:
        part.fade(0.0, part.rank - part.rank // 2)
        before, w = part(x), part.helper
        part.halve()
        close(part.helper, w), close(part(x), before)
        if part.rank:
            a, b = part.left.T @ part.left, part.right @ part.right.T
            close(a, b), close(a, torch.diag(a.diagonal()))
            assert (a.diagonal().diff() <= 1e-6).all()
            close(a.diagonal(), torch.linalg.svdvals(w)[: part.rank])


def test_the_other_ways_to_go():
    for removal in (paper.as_one, paper.at_once, paper.never):
        _, part = layer()
        kept, full = [], part.helper.norm().item()
        for step in range(11):
            removal(part, step, 10)
            kept.append(part.helper.norm().item() / full)
        want = {"as_one": [1 - k / 10 for k in range(11)], "at_once": [1.0] * 8 + [0.0] * 3, "never": [1.0] * 11}
        assert kept == pytest.approx(want[removal.__name__], abs=1e-5)
        assert part.rank == (16 if removal is paper.never else 0)


# --- training -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("removal", [paper.by_rank, paper.as_one, paper.at_once])
def test_training_lowers_the_loss_removes_the_helpers_and_leaves_the_teacher_alone(removal):
    model = video()
    before, soft = copy.deepcopy(model.state_dict()), paper.quantised(model, linears(model), Bits(2, 8, 4))
    off = lambda net: (net(*call(16)) - model(*call(16))).square().mean().item()
    start = off(soft)
    told = paper.distil(soft, model, batches, Tuning(40, 1e-3), removal)
    assert not soft.training and all(part.rank == 0 for part in paper.layers(soft).values())
    assert off(soft) < 0.9 * start
    assert len(told) == 40 and all(step["norm"] > 0 and step["loss"] > 0 for step in told)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_same_seed_same_weights():
    made = []
    for _ in range(2):
        model = video()
        soft = paper.quantised(model, linears(model), Bits(3, 3, 2))
        paper.distil(soft, model, batches, Tuning(4))
        made.append(torch.cat([p.flatten() for p in soft.parameters()]))
    assert torch.equal(*made)


def test_the_norm_is_that_of_the_weights_before_clipping():
    model = video()
    soft = paper.quantised(model, linears(model), Bits(3, 3, 4))
    own = copy.deepcopy(soft)
    told = paper.distil(soft, model, batches, Tuning(2, seed=5), paper.never)
    args = paper.noised(batches(0), fit.draws(5, 0))
    own.train()
    (own(*args) - model(*args)).square().mean().backward()
    slow = sum(part.weight.grad.square().sum() for part in paper.layers(own).values()).sqrt()
    assert told[0]["norm"] == pytest.approx(slow.item(), rel=1e-4)


def test_a_helper_makes_the_first_loss_and_the_first_gradient_smaller():
    """Here for one layer, where it is certain: the helper takes the best 8 of 20 directions of the error."""
    x, told = torch.randn(1, 400, 20, generator=dice()), {}
    for rank in (0, 8, 20):
        linear, part = layer(weights=2, inputs=8, rank=rank)
        (part(x) - linear(part.inputs(x)).detach()).square().mean().backward()
        told[rank] = part.weight.grad.norm()
    assert told[20] < 1e-3 * told[0] and told[8] < 0.9 * told[0]


def test_noise_comes_as_in_training_of_the_model_and_some_captions_are_emptied():
    latent, words = torch.randn(400, 2, 3, 4, 4, generator=dice()), torch.full((400, 5), 7)
    x, t, cond = paper.noised((latent, words), fit.draws(0, 0))
    assert x.shape == latent.shape and t.shape == (400, 3) and (t[:, :1] == t).all() and 0.6 < t.mean() < 0.8
    assert 5 <= (cond.text[:, 0] != 7).sum() <= 40
    far = x[t[:, 0] > 0.95].std()
    assert 0.8 < far < 1.2


# --- what is shipped --------------------------------------------------------------------------------------------------


def test_packed_layers_say_the_same():
    model = video()
    soft = paper.quantised(model, linears(model), Bits(3, 4, 2))
    paper.distil(soft, model, batches, Tuning(4, 1e-3))
    small = paper.shipped(soft)
    assert not paper.layers(small)
    want = soft(*call())
    assert (small(*call()) - want).norm() < 0.05 * want.norm()  # steps in fp16: some input takes the next code
    part = next(iter(paper.layers(soft).values()))
    packed, w = part.packed(), part.grid(part.weight).detach()
    assert packed.packed.nbytes == math.ceil(w.numel() * 3 / 8)
    assert (packed.weight - w).abs().max() < 2e-3


def test_somebody_elses_model_is_trained_as_well():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)).requires_grad_(False)
    mix = torch.randn(4, 16, generator=dice(7))  # correlated: of white inputs the nearest weights are nearly the best
    draw = lambda n, seed: torch.randn(n, 4, generator=dice(seed)) @ mix
    plain, soft = (paper.quantised(model, ["0", "2"], Bits(3, 8, rank, groups=1)) for rank in (0, 4))
    told = paper.distil(soft, model, lambda i: draw(64, i), Tuning(100, 1e-3), call=lambda x, g: (x,))
    x = draw(2000, 500)
    off = lambda net: (net(x) - model(x)).square().mean().item()
    assert len(told) == 100 and off(soft) < 0.7 * off(plain)


def test_bad_input_is_refused_in_words():
    model = video()
    with pytest.raises(ValueError, match="only linear layers get few bits.*trunk.blocks.0$"):
        paper.quantised(model, ["trunk.blocks.0"], Bits())
    with pytest.raises(ValueError, match="no layers of few bits"):
        paper.distil(model, model, batches, Tuning(2))
    with pytest.raises(ValueError, match="takes 5 phases, so at least as many steps; got 3"):
        paper.by_rank(layer()[1], 0, 3)
    clock = Clock()
    clock.t = torch.rand(3)
    with pytest.raises(ValueError, match="called with 3 times, this layer with 2 samples"):
        ClippedInputs(4, 2, clock)(torch.randn(2, 5, 8))
