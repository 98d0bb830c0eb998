"""HAWQ-V3: dyadic factors are near the real ones, nothing floats between the doors, every code is the simulation's."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from minivid.core import weights
from minivid.core.baselines.quant import Steps, allocate, around, hessian, symmetric, traces
from minivid.core.model import Cond
from minivid.core.surgery import record
from minivid.quantization import hawqv3 as paper

SEEDS = st.integers(0, 10_000)


def dice(seed=0):
    return torch.Generator().manual_seed(seed)


def frames(n=4, seed=0):
    return torch.rand(n, 3, 16, 16, generator=dice(seed)) * 2 - 1


def net(bits=8, seed=0, batches=6, folded=True):
    """A small network with statistics and weights that a few steps have moved."""
    torch.manual_seed(seed)
    net = paper.quantise_all(paper.Network(8), bits, momentum=0.3)  # few batches must be enough for ranges and norms
    for layer in net.layers.values():
        layer.norm.momentum = 0.5
    optimiser = torch.optim.SGD(net.parameters(), 0.05)
    for i in range(batches):
        if folded and i == batches // 2:
            paper.fold(net)
        x = frames(8, 100 * seed + i)
        loss = (net(x) - x).square().mean()
        optimiser.zero_grad(), loss.backward(), optimiser.step()
    return net.eval().requires_grad_(False).double()


# --- dyadic numbers -----------------------------------------------------------------------------------------------------


@given(st.floats(1e-6, 1e3), st.integers(4, 31))
def test_a_dyadic_number_is_near_the_real_one(real, width):
    m, c = paper.dyadic(torch.tensor(real, dtype=torch.float64), width)
    exact = int(m) / 2 ** int(c)  # Python's integers: no rounding before the division
    assert abs(exact - real) <= 2.0**-width * real and 0 < int(m) <= 2**31 and 1 <= int(c) <= 62


def test_powers_of_two_are_exact_and_large_numbers_shift_left():
    real = torch.tensor([2.0**-31, 0.25, 1.0, 218.0, 2.0**29], dtype=torch.float64)
    assert torch.equal(paper.dyadic(real).real, real)
    few = paper.dyadic(real, 4)
    assert torch.equal(few.real, torch.tensor([2.0**-31, 0.25, 1.0, 224.0, 2.0**29]).double()) and few.c.min() == 1


@given(st.integers(-(2**31) + 1, 2**31 - 1), st.floats(1e-6, 1.0))
def test_multiply_add_shift_is_rounding_half_up_of_any_sign(acc, real):
    by = paper.dyadic(torch.tensor(real, dtype=torch.float64))
    want = (2 * acc * int(by.m) + 2 ** int(by.c)) // 2 ** (int(by.c) + 1)  # floor(x + 1/2), without overflow
    assert paper.rescale(torch.tensor(acc), by).item() == want


def test_ties_go_up_on_both_sides_of_zero():
    half, x = paper.dyadic(torch.tensor(0.5)), torch.arange(-5, 6)
    assert paper.rescale(x, half).tolist() == [-2, -2, -1, -1, 0, 0, 1, 1, 2, 2, 3]
    assert paper.nearest(x * 0.5).tolist() == paper.rescale(x, half).tolist() != (x * 0.5).round().tolist()


def test_what_has_no_dyadic_form_is_refused():
    for wrong in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="positive and finite"):
            paper.dyadic(torch.tensor(wrong))
    for wrong in (2.0**-32, 2.0**30):
        with pytest.raises(ValueError, match="factors lie in"):
            paper.dyadic(torch.tensor(wrong))
    with pytest.raises(ValueError, match="1 to 31 bits, got 32"):
        paper.dyadic(torch.tensor(1.0), 32)


def test_four_bits_are_packed_eight_to_a_word():
    every = torch.arange(-8, 8)
    codes = every[torch.randint(16, (160,), generator=dice())]
    assert paper.pack4(codes).dtype == torch.int32 and len(paper.pack4(codes)) == 20
    for some in (codes, every, every.flip(0)):
        assert torch.equal(paper.unpack4(paper.pack4(some)), some.to(torch.int8))
    assert paper.pack4(torch.tensor([1, 0, 0, 0, 0, 0, 0, -1])).item() == 1 - 2**28  # 0xf0000001
    for wrong in (torch.tensor([8] * 8), torch.zeros(7, dtype=torch.long)):
        with pytest.raises(ValueError, match="multiple of 8 codes"):
            paper.pack4(wrong)


# --- nothing but integers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 4])
def test_between_its_doors_the_graph_is_integers(bits):
    engine = net(bits).integer()
    codes = engine.enter(frames().double())
    with paper.IntegersOnly() as watch:
        said = engine(codes)
    assert said.dtype == codes.dtype == torch.int8 and said.shape == codes.shape
    ran = set(watch.seen)
    assert {"convolution", "mul", "__rshift__", "clamp", "sum"} <= ran  # it did look at the work
    assert sum(name == "convolution" for name in watch.seen) == 7
    assert {name for name, t in engine.state_dict().items() if t.is_floating_point()} == {"door", "exit"}


def test_the_guard_catches_what_floats_or_divides():
    x = torch.arange(4)
    for wrong in (
        lambda: x.float(), lambda: x * 0.5, lambda: x / 2, lambda: x // 2, lambda: x % 2, lambda: torch.rand(2),
        lambda: F.conv2d(torch.ones(1, 1, 2, 2, dtype=torch.int32), torch.ones(1, 1, 1, 1, dtype=torch.int32)).double(),
        lambda: torch.div(x, 2, rounding_mode="floor"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="an integer graph"), paper.IntegersOnly():
            wrong()
    simulation = net()
    with pytest.raises(ValueError, match="floating point"), paper.IntegersOnly():
        simulation(frames().double())  # the very network that trains is caught


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("seed", [0, 1])
def test_every_code_is_the_simulations(bits, seed):
    """All hidden codes as well, not only the last."""
    simulation, x = net(bits, seed), frames(16, 7).double()
    engine = simulation.integer()
    said, ran = {}, {}
    for model, kept in ((simulation, said), (engine, ran)):
        for name in ("first", "one", "join", "pool", "narrow", "widen", "more", "last"):
            getattr(model, name).register_forward_hook(lambda part, args, out, kept=kept, name=name: kept.update({name: out}))
    whole = simulation(x)
    codes = engine(engine.enter(x))
    for name, value in said.items():
        part = getattr(simulation, name)
        want = torch.round(value / part.out.steps.step)
        assert torch.equal(want, ran[name].double()), name
        assert want.unique().numel() > (16 if part.out.bits == 8 else 6), name  # a dead layer would prove nothing
    torch.testing.assert_close(engine.leave(codes), whole, rtol=0, atol=1e-12)


def test_few_bits_in_the_multiplier_change_codes():
    simulation, x = net(), frames(16, 3).double()
    engines = {width: simulation.integer(width) for width in (3, 8, 31)}
    codes = {width: engine(engine.enter(x)) for width, engine in engines.items()}
    share = {width: (codes[width] != codes[31]).float().mean().item() for width in codes}
    assert share[3] > share[8] > share[31] == 0


def test_codes_have_their_types_and_ends():
    four = net(4)
    for name, part in four.named_modules():
        if isinstance(part, paper.Codes):
            wide = {"enter": 8, "more.out": 8, "last.out": 8, "join.wide": 16}.get(name, 4)
            low, high = (-(2 ** (wide - 1)), 2 ** (wide - 1) - 1) if wide >= 8 else (0, 15)
            assert (part.bits, part.steps.low, part.steps.high) == (wide, low, high), name
    engine = four.integer()
    assert {name: (part.weight.min() >= -8 and part.weight.max() <= 7) for name, part in engine.named_children()
            if isinstance(part, paper.IntegerConv)} == {
        "first": False, "one": True, "two": True, "narrow": True, "widen": True, "more": True, "last": False}  # fmt: skip
    assert engine.first.weight.dtype == torch.int8 and engine.first.bias.dtype == torch.int32
    assert engine.first.by.m.shape == (8, 1, 1)  # a factor an output channel


# --- batch norm, residual, pool -----------------------------------------------------------------------------------------


def test_folding_changes_nothing_before_rounding():
    torch.manual_seed(0)
    layer = paper.Layer(3, 6, 3, 2).double()
    layer.norm.weight.data, layer.norm.bias.data = torch.randn(6).double(), torch.randn(6).double()
    for i in range(5):
        layer(frames(4, i).double())
    layer.eval()
    x = frames(4, 9).double()
    before = layer(x)
    layer.folded = True
    torch.testing.assert_close(layer(x), before, rtol=0, atol=1e-12)
    moving = layer.norm.running_mean.clone()
    layer.train()
    torch.testing.assert_close(layer(x), before, rtol=0, atol=1e-12)  # frozen, in training too
    assert torch.equal(layer.norm.running_mean, moving)


def test_equal_steps_add_exactly():
    one, out = paper.dyadic(torch.tensor(1.0)), around(torch.tensor(1.0), 8)
    main, branch = torch.randint(-(2**20), 2**20, (2, 1, 3, 4, 4), generator=dice(), dtype=torch.int32)
    assert torch.equal(paper.IntegerJoin(one, one, one, out).sum(main, branch), main + branch)


def test_the_residual_sum_is_not_clamped_but_the_next_grid_is():
    one, out = paper.dyadic(torch.tensor(1.0)), Steps(torch.tensor(1.0), torch.tensor(0.0), -128, 127)
    join, much = paper.IntegerJoin(one, one, one, out), torch.full((1, 1, 1, 1), 30_000, dtype=torch.int32)
    assert join.sum(much, much).item() == 60_000 and join(much, much).item() == 127 and join(-much, -much).item() == 0


@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_pool_sums_integers_and_scales_once(n):
    step = torch.tensor(0.37, dtype=torch.float64)
    pool = paper.IntegerPool(n, paper.dyadic(step / step / n**2), (-128, 127))
    x = torch.randint(-127, 128, (2, 3, 6, 6), generator=dice(), dtype=torch.int8)
    total = F.avg_pool2d(x.double(), n) * n**2
    want = torch.floor((2 * total + n**2) / (2 * n**2))  # no multiple of 1/9 is a tie, and 1/4 is exact
    assert torch.equal(pool(x).double(), want)


def test_pixels_are_torchs():
    x = torch.arange(2 * 12 * 3 * 5).view(2, 12, 3, 5)
    assert torch.equal(F.pixel_shuffle(x, 2), paper.network.pixels(x, 2))


# --- how it trains ------------------------------------------------------------------------------------------------------


def test_ranges_follow_batches_and_gradients_pass():
    codes = paper.Codes(8, momentum=0.9)
    codes(torch.tensor([-1.0, 3.0])), codes(torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(codes.range, torch.tensor([-0.9, 2.8]))
    codes.eval()
    x = torch.tensor([-5.0, 0.1, 5.0], requires_grad=True)
    said = codes(x)
    said.sum().backward()
    torch.testing.assert_close(said, torch.tensor([-128, 5, 127]) * 2.8 / 127)
    torch.testing.assert_close(x.grad, torch.ones(3))  # of what was clamped too
    four = paper.Codes(4)
    four(torch.tensor([0.0, 3.0]))
    assert (four.steps.low, four.steps.high) == (0, 15) and four.steps.step == 0.2
    with pytest.raises(ValueError, match="no range yet"):
        paper.Codes(8).eval()(x)


def test_without_bits_it_is_a_plain_network():
    torch.manual_seed(0)
    plain = paper.Network(8).eval()
    x = frames()
    linear = lambda part, h: part.norm(part.conv(h))
    first = F.relu(linear(plain.first, x))
    h = F.relu(linear(plain.two, F.relu(linear(plain.one, first))) + first)
    h = F.avg_pool2d(h, 2)
    for part in (plain.narrow, plain.widen, plain.more):
        h = F.relu(linear(part, h))
    torch.testing.assert_close(F.pixel_shuffle(linear(plain.last, h), 4), plain(x))


def test_training_on_grids_helps():
    start, x = net(4, batches=2, folded=False).float(), frames(8, 1)
    paper.fold(start)
    after = copy.deepcopy(start).requires_grad_(True)
    optimiser = torch.optim.Adam(after.parameters(), 3e-3)
    for _ in range(30):
        loss = (after(x) - x).square().mean()
        optimiser.zero_grad(), loss.backward(), optimiser.step()
    error = lambda model: (model(x) - x).square().mean().item()
    assert error(after) < 0.9 * error(start)


def test_a_file_is_all_that_integers_need(tmp_path):
    engine, other = net(4).integer(), net(4, seed=1).integer()
    codes, file = engine.enter(frames().double()), tmp_path / "integers.safetensors"
    said = engine(codes)
    assert not torch.equal(other(codes), said)
    weights.write(file, engine.state_dict(), {})
    other.load_state_dict(weights.read(file)[0])
    assert torch.equal(other(codes), said) and torch.equal(other.leave(said), engine.leave(said))
    for name, layer in engine.named_modules():
        if isinstance(layer, paper.IntegerConv):
            assert layer.packed.nbytes == layer.weight.numel() * (1 if name in ("first", "last") else 0.5)


def test_what_is_not_ready_is_refused():
    with pytest.raises(ValueError, match="batch norm folded"):
        net(folded=False).integer()
    layer = paper.Layer(1, 1, 1)
    with pytest.raises(ValueError, match="beyond int32"):
        one = torch.ones(1, 1, 1)
        paper.IntegerConv(one[None], 2.0**31 * one, layer.conv, one, None, True, 8, 31)


# --- which layer gets how many bits -------------------------------------------------------------------------------------


def quadratic(n=5, seed=0, diagonal=False):
    a = torch.randn(2 * n, 2 * n, generator=dice(seed), dtype=torch.float64)
    a = torch.diag(a.diagonal()) if diagonal else a + a.T
    w = [torch.randn(n, generator=dice(seed + i), dtype=torch.float64, requires_grad=True) for i in range(2)]
    x = torch.cat(w)
    return a, 0.5 * x @ a @ x, w


def test_one_probe_of_a_diagonal_hessian_is_exact_and_blocks_sum_to_the_whole():
    a, loss, w = quadratic(diagonal=True)
    for seed in range(5):
        torch.testing.assert_close(traces(hessian(loss, w), w, dice(seed), 1).sum(), a.trace())
    a, loss, w = quadratic()
    found = traces(hessian(loss, w), w, dice(), 4000)
    torch.testing.assert_close(found, torch.stack([a[:5, :5].trace(), a[5:, 5:].trace()]), rtol=0, atol=0.4)
    errors = [torch.stack([traces(hessian(loss, w), w, dice(s), n).sum() - a.trace() for s in range(40)]).std() for n in (4, 64)]
    assert 2.5 < errors[0] / errors[1] < 6.5  # 1 / sqrt(probes): 4


def test_curvature_is_the_trace_of_the_exact_hessian():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 3)).requires_grad_(False)
    x, y = torch.randn(30, 4), torch.randn(30, 3)
    found = paper.curvature(lambda: (model(x) - y).square().mean(), model, ["0", "2"], dice(), 3000)
    for name, trace in zip(("0", "2"), found, strict=True):
        layer = model.get_submodule(name)
        loss = lambda w, name=name: (torch.func.functional_call(model, {f"{name}.weight": w}, (x,)) - y).square().mean()
        exact = torch.autograd.functional.hessian(loss, layer.weight).reshape(layer.weight.numel(), -1).trace()
        assert trace.item() == pytest.approx(exact.item(), rel=0.05) and not layer.weight.requires_grad


def test_fused_attention_gets_its_second_derivative():
    """The model as it is, attention to words included: no kernel of it may refuse."""
    torch.manual_seed(0)
    model = weights.build("video", dict(channels=2, d=16, heads=2, depth=1))
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    call = (torch.randn(2, 2, 2, 4, 4), torch.rand(2), Cond(text=torch.randint(1, 9, (2, 5))))
    names = ["trunk.blocks.0.cross.q", "trunk.blocks.0.attention.v"]
    found = paper.curvature(lambda: model(*call).square().mean(), model, names, dice(), 2)
    assert found.isfinite().all() and (found != 0).all()


def test_omega_by_hand_and_clamped():
    w = [torch.randn(3, 4, generator=dice()), torch.randn(2, 4, generator=dice(1))]
    omega = paper.sensitivity(torch.tensor([6.0, -1.0]), w, (2, 8))
    for k, bits in enumerate((2, 8)):
        s = w[0].abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
        gap = (w[0] / s).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * s - w[0]
        assert omega[0, k].item() == pytest.approx(6 / 12 * gap.square().sum().item(), rel=1e-4)
    assert omega[1].tolist() == [0, 0]


def test_omega_predicts_the_loss_of_a_quadratic():
    """With H = h I the expected rise is exactly sum Omega / 2."""
    w, h = [torch.randn(6, 8, generator=dice(i)) for i in range(3)], torch.tensor([1.0, 5.0, 0.2])
    omega = paper.sensitivity(h * 48, w, (2, 3, 4))
    for choice in itertools.product(range(3), repeat=3):
        rise = sum(0.5 * h[i] * (paper.rounded(w[i], 2 + c) - w[i]).square().sum() for i, c in enumerate(choice))
        assert rise.item() == pytest.approx(0.5 * sum(omega[i, c] for i, c in enumerate(choice)).item(), rel=1e-4)


OPTIONS = (4, 8)


def program(seed, l=6):
    g = dice(seed)
    use = paper.Use.of(*torch.randint(10, 100, (2, l), generator=g).tolist(), OPTIONS)
    cost = torch.rand(l, 1, generator=g).double() * torch.tensor([1.0, 0.05])
    return cost, use


@settings(max_examples=15)
@given(SEEDS, st.sampled_from([0.25, 0.5, 0.75]))
def test_the_program_is_brute_force_with_three_budgets_and_a_tie(seed, rho):
    cost, use = program(seed)
    limits = [(t, paper.limit(t, OPTIONS, r)) for t, r in ((use.size, rho), (use.bops, 0.6), (use.latency, 0.7))]
    ties = ((1, 4),)
    total = lambda t, c: t[torch.arange(6), torch.tensor(c)].sum().item()
    fits = lambda c: all(total(t, c) <= most + 1e-9 * most for t, most in limits) and c[1] == c[4]
    best = min(total(cost, c) for c in itertools.product(range(2), repeat=6) if fits(c))
    found = allocate(cost, limits, ties).tolist()
    assert fits(found) and total(cost, found) == pytest.approx(best, rel=1e-6)


@settings(max_examples=10)
@given(SEEDS)
def test_ends_of_the_budget(seed):
    cost, use = program(seed)
    all8 = [(t, paper.limit(t, OPTIONS, 1)) for t in (use.size, use.bops)]
    assert allocate(cost, all8).tolist() == [1] * 6
    assert allocate(cost, [(use.size, paper.limit(use.size, OPTIONS, 0)), all8[1]]).tolist() == [0] * 6
    with pytest.raises(ValueError, match="no choice keeps all budgets"):
        allocate(cost, [(use.size, paper.limit(use.size, OPTIONS, -0.01)), all8[1]])
    worth = [cost.gather(1, allocate(cost, [(use.size, paper.limit(use.size, OPTIONS, r)), all8[1]])[:, None]).sum().item()
             for r in (0, 0.25, 0.5, 0.75, 1)]  # fmt: skip
    assert all(b <= a + 1e-12 for a, b in zip(worth, worth[1:], strict=False))


def test_uses():
    use = paper.Use.of([10, 20], [100, 50], (2, 4, 8))
    assert use.size.tolist() == [[20, 40, 80], [40, 80, 160]]
    assert use.bops.tolist() == [[1600, 3200, 6400], [800, 1600, 3200]]
    assert torch.equal(use.latency[:, 0], use.latency[:, 1]) and (use.latency[:, 2] > use.latency[:, 1]).all()
    assert paper.limit(use.size, (2, 4, 8), 0.5) == 180


def test_rounded_weights_take_their_place_and_leave_the_model_alone():
    model = nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 3)).requires_grad_(False)
    before, x = copy.deepcopy(model.state_dict()), torch.randn(7, 4)
    new = paper.allocated(model, {"0": 3, "2": 8})
    assert new[0].weight.unique(dim=1).numel() and all((row.unique().numel() <= 7) for row in new[0].weight)
    torch.testing.assert_close(new[0].weight, paper.rounded(model[0].weight, 3))
    torch.testing.assert_close(new(x), F.linear(F.gelu(F.linear(x, new[0].weight, model[0].bias)), new[2].weight, model[2].bias))
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
    torch.testing.assert_close(paper.allocated(model, {"0": 16, "2": 16})(x), model(x), rtol=0, atol=1e-3)


def test_rows_count_every_call():
    model, rows = nn.Sequential(nn.Linear(4, 5)), paper.Rows()
    record(model, [torch.randn(2, 7, 4), torch.randn(3, 4)], {"0": rows})
    assert rows.n == 17


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_a_linear_layer_on_integers_is_its_simulation(bits):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(24, 16), nn.GELU(), nn.Linear(16, 8, bias=False)).double(), torch.randn(200, 24).double()
    new = paper.integer_layers(model, {"0": bits, "2": 8}, [x])
    layer, s = new[0], symmetric(model[0].weight.detach(), bits, 1)
    near = lambda v, s: torch.floor(v / s.step + 0.5).clamp(s.low, s.high) * s.step
    enter, leave = (around(v.abs().max(), 8) for v in (x, model[0](x).detach()))
    unit = s.step.flatten() * enter.step
    weight, bias = near(model[0].weight, s), torch.floor(model[0].bias / unit + 0.5) * unit
    want = near(F.linear(near(x, enter), weight, bias), leave)
    torch.testing.assert_close(new[0](x), want, rtol=0, atol=1e-12)
    with paper.IntegersOnly():
        layer.integers(torch.randint(-127, 128, (5, 24), dtype=torch.int8))
    assert (new(x) - model(x)).norm() / model(x).norm() < (0.05 if bits == 8 else 0.3)
