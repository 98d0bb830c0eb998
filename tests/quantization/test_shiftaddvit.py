"""ShiftAddViT: codes only add, shifts are exact in integers, every token has one expert, latencies steer who gets it."""

import copy
import math

import pytest
import torch
from checks.models import video
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from minivid.core.attention import dense
from minivid.core.model import Cond
from minivid.core.surgery import parts, swap
from minivid.core.where import grid
from minivid.lab import measure
from minivid.quantization import shiftaddvit as paper

SEEDS = st.integers(0, 10_000)


def dice(seed=0):
    return torch.Generator().manual_seed(seed)


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def call(seed=1):
    text = torch.randint(2, 200, (2, 4), generator=dice(seed))
    return torch.randn(2, 4, 2, 6, 6, generator=dice(seed)), torch.tensor([0.3, 0.7]), Cond(text=text)


def names(model, roles=("fc1", "fc2")):
    return [name for name, _, role in parts(model) if role in roles and not name.startswith("text")]


def linear(i=8, o=6, seed=0, std=0.3):
    torch.manual_seed(seed)
    layer = nn.Linear(i, o)
    nn.init.normal_(layer.weight, std=std)
    return layer


def powers(i=8, o=6, seed=0):
    """A layer whose weights are powers of two already."""
    layer = linear(i, o, seed)
    p = torch.randint(-6, 1, (o, i), generator=dice(seed))
    layer.weight.data = torch.ldexp(layer.weight.data.sign(), p)
    layer.bias.data = (layer.bias.data * 2**16).floor() / 2**16
    return layer


def heads(seed=0, n=18, d=8):
    return tuple(torch.randn(2, 3, n, d, generator=dice(seed + i)) for i in range(3))


# --- the law of limits ------------------------------------------------------------------------------------------------


def test_powers_of_two_are_the_layer_itself():
    layer, x = powers(), paper.fixed(torch.randn(5, 8, generator=dice()))
    assert torch.equal(paper.Shift(layer).weight, layer.weight)
    assert torch.equal(paper.Shift(layer)(x), layer(x))
    assert torch.equal(paper.Shift(layer).packed()(x), layer(x))


@pytest.mark.parametrize("share", [None, 0.0, 0.6, 1.0])
def test_two_experts_alike_are_the_dense_layer(share):
    layer, x = powers(), paper.fixed(torch.randn(2, 9, 8, generator=dice()))
    mix = paper.Mixture(layer, dice(), chance=share)
    close(mix(x), layer(x))
    whole = paper.Mixture(layer, dice(), product=True)
    whole.router.weight.data.zero_()
    close(whole(x), layer(x) / 2)
    whole.router.bias.data = torch.tensor([100.0, 0.0])
    close(whole(x), layer(x))


def test_a_model_of_powers_of_two_is_unchanged_by_shifting():
    model = video()
    own = names(model)
    for name in own:
        part = model.get_submodule(name)
        part.weight.data = torch.ldexp(*paper.power(part.weight.data))
    same = paper.converted(model, own, paper.Shift)
    close(same(*call()), model(*call()), 1e-3)  # inputs lose what is below 2^-16


# --- additions --------------------------------------------------------------------------------------------------------


@given(SEEDS)
@settings(max_examples=20)
def test_codes_only_add_in_either_order(seed):
    q, k, v = heads(seed)
    bq, bk = (q > q.mean()).float(), (k > k.mean()).float()
    both = bq @ bk.transpose(-1, -2)
    close(bq @ (bk.transpose(-1, -2) @ v), both @ v, 1e-4)
    assert torch.equal(both, both.round()) and 0 <= both.min() and both.max() <= 8
    far = (bq[..., :, None, :] != bk[..., None, :, :]).sum(-1)  # Hamming
    assert torch.equal(far.float(), bq.sum(-1)[..., :, None] + bk.sum(-1)[..., None, :] - 2 * both)
    slow = torch.zeros(8, 8)
    for row, code in zip(v[0, 0], bk[0, 0], strict=True):  # no product: a row is added or skipped
        for j in range(8):
            if code[j]:
                slow[j] += row
    close(bk[0, 0].T @ v[0, 0], slow)


def test_the_gradient_of_a_code_is_one_inside_and_zero_outside():
    x = torch.tensor([-0.5, 0.2, 0.8, 1.5], requires_grad=True)
    codes = paper.binary(x, torch.tensor(0.5))
    codes.sum().backward()
    assert codes.tolist() == [0, 0, 1, 1] and x.grad.tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize("coded", [True, False])
def test_additive_attention_is_its_slow_loop(coded):
    q, k, v = heads()
    part = paper.Additive(3, coded)
    part(q, k, v, grid(2, 3, 3))
    close(part.gain.detach()[:, 0, 0], dense(q, k, v, grid(2, 3, 3)).norm(dim=-1).mean((0, 2)))
    nn.init.normal_(part.filter)
    o = part.eval()(q, k, v, grid(2, 3, 3))
    for b, h in ((0, 0), (1, 2)):
        a, c = (x[b, h] / x[b, h].norm(dim=-1, keepdim=True) for x in (q, k))
        if coded:
            a, c = (a > part.threshold[0, h]).float(), (c > part.threshold[1, h]).float()
        for n in (0, 7, 17):
            y = v[b, h, n] / 2 + sum((a[n] @ c[m]) * v[b, h, m] for m in range(18)) / math.pi
            y = part.gain[h, 0] * y / y.norm()
            near = sum(part.filter[h, 0, j, 0] * v[b, h, n + j - 4] for j in range(9) if 0 <= n + j - 4 < 18)
            close(o[b, h, n], y + near)


def test_a_clip_does_not_depend_on_its_neighbours():
    q, k, v = heads()
    part = paper.Additive(3)
    part(q, k, v, grid(2, 3, 3))
    part.eval()
    close(part(q, k, v, grid(2, 3, 3))[:1], part(q[:1], k[:1], v[:1], grid(2, 3, 3)))


def test_masks_and_caches_are_refused():
    with pytest.raises(ValueError, match="takes no mask"):
        paper.Additive(3)(*heads(), grid(2, 3, 3, block=1))


# --- shifts -----------------------------------------------------------------------------------------------------------


@given(SEEDS)
@settings(max_examples=20)
def test_weights_are_the_nearest_powers_in_the_logarithm(seed):
    w = torch.randn(6, 8, generator=dice(seed)) * 0.2
    w[0, 0] = 0
    sign, p = paper.power(w)
    new = torch.ldexp(sign, p)
    assert new[0, 0] == 0 and p.min() >= -14 and p.max() <= 0
    inside = (w.abs() > 2.0**-14) & (w.abs() < 1)
    assert ((new - w).abs() / w.abs())[inside].max() <= math.sqrt(2) - 1 + 1e-6
    assert torch.equal(torch.ldexp(*paper.power(new)), new)


@given(SEEDS)
@settings(max_examples=20)
def test_shifts_and_additions_alone_give_the_layers_numbers(seed):
    layer = paper.Shift(linear(seed=seed))
    layer.bias = None
    x = torch.randint(-(2**20), 2**20, (5, 8), generator=dice(seed))
    sign, p = layer.packed().parts()
    exact = (x.double() / 2**16) @ layer.weight.detach().double().T
    assert torch.equal(paper.engine(x, sign, p).double() / 2**30, exact)
    close(layer((x / 2**16).float()).double(), exact, 1e-4)
    cut = paper.engine(x, sign, p, truncate=True).double() / 2**16
    assert (cut - exact).abs().max() <= 8 * 2.0**-16


def test_packed_layers_hold_five_bits_a_weight_and_say_the_same():
    layer, x = paper.Shift(linear(64, 32)), torch.randn(5, 64, generator=dice())
    layer.latent.data[3, 5] = 0
    stored = layer.packed()
    assert torch.equal(stored(x), layer(x))
    assert measure.stored_bytes(stored) == 64 * 32 * 5 // 8 + 32 * 4


def test_inputs_are_floored_to_sixteen_places_and_gradients_pass():
    x = torch.tensor([1 + 2**-17, -(2**-17), 0.25], requires_grad=True)
    y = paper.fixed(x)
    y.sum().backward()
    assert y.tolist() == [1, -(2**-16), 0.25] and x.grad.tolist() == [1, 1, 1]
    layer = paper.Shift(linear())
    layer(torch.randn(5, 8, generator=dice())).square().sum().backward()
    assert (layer.latent.grad != 0).all()


# --- the mixture ------------------------------------------------------------------------------------------------------


def test_every_token_gets_the_one_expert_that_its_router_says():
    layer, x = linear(), torch.randn(2, 9, 8, generator=dice())
    mix = paper.Mixture(layer, dice())
    y = mix(x).flatten(0, 1)
    assert 0 < mix.shifted.sum() < 18
    for token, out in zip(x.flatten(0, 1), y, strict=True):
        a, b = mix.router(token)
        close(out, mix.experts[int(b > a)](token))
    order = torch.randperm(9, generator=dice())
    close(mix(x[:, order]), y.view(2, 9, -1)[:, order])


def test_the_task_teaches_the_router_and_the_released_gate_would_not():
    mix = paper.Mixture(linear(), dice())
    x = torch.randn(20, 8, generator=dice())
    mix(x).square().sum().backward()
    assert mix.router.weight.grad.abs().max() > 0
    off = paper.Mixture(linear(), dice(), chance=0.5)
    off(x).square().sum().backward()
    assert off.router.weight.grad is None


def test_random_routing_has_its_share():
    mix = paper.Mixture(linear(), dice(), chance=0.6)
    mix(torch.randn(4000, 8, generator=dice()))
    assert abs(mix.shifted.float().mean() - 0.6) < 0.03


def test_scv_is_zero_when_all_are_alike_and_has_no_scale():
    v = torch.rand(4, generator=dice()) + 0.1
    assert paper.scv(torch.full((3,), 2.0)) == 0 < paper.scv(v)
    close(paper.scv(v), paper.scv(7 * v))


@pytest.mark.parametrize("latency", [(1, 1), (6, 4), (9, 1)])
def test_balance_is_least_where_tokens_go_in_inverse_proportion_to_latency(latency):
    right = round(20 * latency[0] / sum(latency))  # of 20 tokens that have made up their minds
    sharp = lambda n: torch.tensor([[0.0, 20.0]] * n + [[20.0, 0.0]] * (20 - n))
    each = [paper.balance(sharp(n), latency).item() for n in range(21)]
    assert each[right] < 1e-6 < min(each[:right] + each[right + 1 :])
    assert each[:right] == sorted(each[:right], reverse=True) and each[right:] == sorted(each[right:])


def test_even_latencies_are_the_usual_balance_loss():
    logits = torch.randn(30, 2, generator=dice())
    p, wins = logits.softmax(-1), torch.special.ndtr((logits - logits.flip(-1)) / 0.5)
    close(paper.balance(logits, (1, 1)), paper.scv(p.sum(0)) + paper.scv(wins.sum(0)))
    close(paper.balance(logits, (6, 4)), paper.balance(logits, (0.6, 0.4)))
    with pytest.raises(ValueError, match="two positive numbers"):
        paper.balance(logits, (1, 0))


# --- whole models -----------------------------------------------------------------------------------------------------


def test_all_of_it_learns_in_a_video_model_and_leaves_the_teacher_alone():
    model = video()
    before = copy.deepcopy(model.state_dict())
    said = model(*call())
    places = {f"trunk.blocks.{i}.attention.attend": paper.Additive(2) for i in range(2)}
    student = copy.deepcopy(swap(model, places)).requires_grad_(True)
    told = paper.distil(student, [(call(), said)] * 40, 1e-3)
    assert min(told[-5:]) < told[0]
    mixed = paper.converted(student, names(student), lambda part: paper.Mixture(part, dice()))
    assert len(paper.mixtures(mixed)) == 4
    share = lambda: torch.cat([m.shifted for m in paper.mixtures(mixed).values()]).float().mean().item()
    paper.distil(mixed, [(call(), said)] * 40, 1e-3, (9, 1), 1.0)
    assert share() > 0.75
    assert all(torch.equal(model.state_dict()[name], x) for name, x in before.items())


def test_a_model_that_is_not_ours():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval().requires_grad_(False)
    x, own = torch.randn(2, 7, 16, generator=dice()), names(model)
    assert len(own) == 4
    shifted = paper.converted(model, own, paper.Shift)
    packed = paper.converted(model, own, lambda part: paper.Shift(part).packed())
    close(shifted(x), packed(x))
    assert 0 < (shifted(x) - model(x)).norm() / model(x).norm() < 0.5
    assert measure.stored_bytes(packed) < measure.stored_bytes(model)
    mixed = paper.converted(model, own, lambda part: paper.Mixture(part, dice()))
    close(mixed(x), mixed(x))
    with pytest.raises(ValueError, match="only linear layers"):
        paper.converted(model, ["layers.0.norm1"], paper.Shift)


def test_the_bill():
    assert paper.energy(2, 3, 5) == pytest.approx(2 * 3.7 + 3 * 0.9 + 5 * 0.13)
    whole, all_shift = paper.layer_energy(10, 8, 6), paper.layer_energy(10, 8, 6, 1.0)
    assert whole == pytest.approx(480 * 4.6) and all_shift == pytest.approx(480 * 1.03)
    assert paper.layer_energy(10, 8, 6, 0.5) == pytest.approx((whole + all_shift) / 2)
    assert paper.attention_energy(80, 32, 4, "linear") < paper.attention_energy(80, 32, 4, "dense")
    assert paper.attention_energy(80, 32, 4, "additive") == pytest.approx(2 * 4 * 80 * 32 * 32 * 0.9)
    with pytest.raises(ValueError, match="'dense'"):
        paper.attention_energy(80, 32, 4, "sparse")
