"""DSFormer: groups of one are low rank, D = 1 is the layer; places are kept, packed, found and learnt as the paper says."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from checks.models import video
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import orthogonal_mp_gram
from torch import nn

from minivid.core.baselines.lowrank import Factored, rank_for, svd
from minivid.core.model import Cond
from minivid.lab import measure
from minivid.low_rank import dsformer as paper
from minivid.low_rank.dsformer import DenseSparse, Pattern

double = dict(dtype=torch.float64)


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **double)


def gram_of(i, seed=0):
    """X'X of rows whose channels are unequal and hang together."""
    x = normal(400, i, seed=seed) * torch.logspace(-1.5, 0.5, i, **double) @ normal(i, i, seed=seed + 1)
    return x.T @ x


def linear(i, o, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(i, o)


def unit_columns(m, r, seed=0):
    return F.normalize(normal(m, r, seed=seed), dim=0)


KINDS = [(8,), (8, 2), (8, 4), (12, 4, 3), (9, 3), (8, 8, 3), (6, 6)]
patterns = st.sampled_from([Pattern(*kind) for kind in KINDS])

# --- the projection -----------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(patterns, st.integers(1, 20), st.integers(0, 9))
def test_projection(p, n, seed):
    s = normal(p.r, n, seed=seed)
    mask = paper.support(s, p)
    assert (mask.unflatten(0, (-1, p.group)).sum(1) == p.keep).all() and mask.sum() == n * p.k
    assert torch.equal(paper.support(s * mask, p), mask)  # idempotent
    for column in range(n):  # a slow loop
        for first in range(0, p.r, p.group):
            size = s[first : first + p.group, column].abs()
            assert size[mask[first : first + p.group, column]].min() >= size.sort(descending=True).values[p.keep - 1]


@pytest.mark.parametrize("p", [Pattern(8, 4), Pattern(8, 4, 2), Pattern(8, 8, 3)])
def test_of_equals_the_upper_stays(p):
    mask = paper.support(torch.ones(8, 5), p).unflatten(0, (-1, p.group))
    assert mask[:, : p.keep].all() and mask.sum() == 5 * p.k
    assert torch.equal(paper.support(torch.zeros(8, 5), p), mask.flatten(0, 1))


@pytest.mark.parametrize("wrong", [(0,), (8, 3), (8, 4, 5), (8, 4, 0)])
def test_patterns_that_cannot_be(wrong):
    with pytest.raises(ValueError, match="must divide r"):
        Pattern(*wrong)


# --- limits -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ends", [(6, 15), (15, 6), (9, 9)])
@pytest.mark.parametrize("weighted", [False, True])
def test_groups_of_one_are_the_low_rank_layer(ends, weighted):
    layer, gram = linear(*ends), gram_of(ends[0]) if weighted else None
    new, old = DenseSparse.of(layer, Pattern(4), gram), Factored.of(layer, 4, gram)
    x = normal(7, ends[0]).float()
    close(new(x), old(x), 1e-4)
    assert new.mask.all() and new.pattern.place == 0
    if not weighted:  # the tail of the spectrum
        values = torch.linalg.svdvals(layer.weight.double()).square()
        assert paper.error(layer, new.merge().weight) == pytest.approx((values[4:].sum() / values.sum()).item(), rel=1e-4)


@pytest.mark.parametrize("ends", [(6, 15), (15, 6)])
def test_d_the_identity_is_the_layer_itself(ends):
    layer, m, turned = linear(*ends), min(ends), ends[0] > ends[1]
    w = layer.weight.detach() if turned else layer.weight.detach().T
    same = DenseSparse(torch.eye(m), w, Pattern(m), layer.bias, turned)
    x = normal(7, ends[0]).float()
    assert torch.equal(same(x), x @ layer.weight.T + layer.bias)
    close(same.merge().weight, layer.weight, 0)


@pytest.mark.parametrize("p", [Pattern(8, 4), Pattern(12, 4, 2), Pattern(8, 8, 3), Pattern(5)])
@pytest.mark.parametrize("ends", [(6, 15), (15, 6)])
@pytest.mark.parametrize("bias", [True, False])
def test_gathering_is_multiplying_with_zeros(p, ends, bias):
    m, n = sorted(ends)
    layer = DenseSparse(normal(m, p.r), normal(p.r, n, seed=1), p, normal(ends[1]) if bias else None, ends[0] > ends[1])
    x = normal(3, 7, ends[0], seed=2)
    close(layer.gathered(x), layer(x), 1e-9)
    plain = layer.merge()
    close(plain(x), layer(x), 1e-9)
    assert plain.weight.shape == ends[::-1]
    layer.free = True
    close(layer(x), plain(x), 1e-9)
    assert layer.mask.sum() == n * p.k


def test_only_columns_of_one_length_are_compared():
    """The same product with other lengths of columns is the same layer with the same places; sizes alone would choose others."""
    p, d, s, stretch = Pattern(8, 4), unit_columns(6, 8), normal(8, 15, seed=1), torch.logspace(-1, 1, 8, **double)[:, None]
    layer, other = DenseSparse(d, s, p), DenseSparse(d / stretch.T, s * stretch, p)
    assert not torch.equal(paper.support(s * stretch, p), paper.support(s, p))
    assert torch.equal(layer.mask, other.mask)
    x = normal(5, 6)
    close(layer(x), other(x), 1e-9)
    with torch.no_grad():  # a step that changed the lengths
        layer.d /= stretch.T
        layer.shadow *= stretch
    layer.settle()
    close(layer.shadow, other.shadow, 1e-9)
    close(layer(x), other(x), 1e-9)
    close(layer.d.norm(dim=0), torch.ones(8, **double), 1e-9)


# --- storage ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [Pattern(8, 4), Pattern(8, 2), Pattern(12, 3), Pattern(12, 4, 3), Pattern(8, 8, 3), Pattern(5)])
@pytest.mark.parametrize("turned", [False, True])
def test_storage_is_the_size_of_what_is_packed(p, turned):
    layer = DenseSparse(normal(8, p.r).float(), normal(p.r, 24, seed=1).float(), p, torch.ones(8 if turned else 24), turned)
    packed = layer.pack()
    assert 8 * measure.stored_bytes(packed) == p.bits(8, 24) and p.bits(8, 24, 32) - p.bits(8, 24) == 16 * (8 * p.r + 24 * p.k)
    again = DenseSparse.unpack(packed, p, layer.bias, turned)
    assert torch.equal(again.mask, layer.mask)
    x = torch.randn(4, 24 if turned else 8, generator=torch.Generator().manual_seed(0))
    close(again(x), layer(x), 2e-2)
    assert torch.equal(DenseSparse.unpack(again.pack(), p, layer.bias, turned).mask, layer.mask)


@settings(max_examples=60)
@given(st.integers(8, 200), st.integers(1, 4), st.floats(0.1, 0.9), st.sampled_from([1, 2, 4, 8, 16]), st.sampled_from([16, 32]))
def test_the_largest_pattern_that_fits(m, ratio, share, group, width):
    n = ratio * m
    p = paper.fitting(m, n, share, group, width)
    assert p is not None or Pattern(group, group).bits(m, n, width) > share * width * m * n or group > n
    if p:
        assert p.bits(m, n, width) <= share * width * m * n and p.group == group and p.r <= n
        assert p.r + group > n or Pattern(p.r + group, group).bits(m, n, width) > share * width * m * n
    if group == 1 and p:
        assert p.r == min(rank_for(m, n, share), n)


def test_what_places_cost():
    assert Pattern(96, 4).bits(128, 512) == 16 * 128 * 96 + 512 * 24 * (16 + 2)
    assert Pattern(128, 128, 20).place == 7 and Pattern(12, 3).place == 2 and Pattern(4, 4, 4).place == 0


# --- the start ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3, 6])
def test_free_places_are_those_of_scikit_learn(k):
    w, d = normal(10, 20), unit_columns(10, 16, seed=1)
    best = orthogonal_mp_gram((d.T @ d).numpy(), (d.T @ w).numpy(), n_nonzero_coefs=k)
    s = paper.refit(w, d, paper.pursue(w, d, Pattern(16, 16, k)))
    close(s, torch.from_numpy(best), 1e-5)


@settings(max_examples=20)
@given(st.integers(0, 50), st.sampled_from([(2, 1), (4, 1), (4, 2)]))
def test_pursuit_keeps_the_pattern_and_what_is_left_is_orthogonal(seed, group):
    p = Pattern(16, *group)
    w, d = normal(10, 20, seed=seed), unit_columns(10, 16, seed=seed + 1)
    index = paper.pursue(w, d, p)
    counts = torch.zeros(20, 16).scatter_add_(1, index, torch.ones(20, p.k))
    assert counts.max() == 1 and (counts.unflatten(1, (-1, p.group)).sum(2) == p.keep).all()
    s = paper.refit(w, d, index)
    assert torch.equal(s != 0, counts.T.bool())
    if p.k < 10:
        left = d.T @ (w - d @ s)
        assert (left * counts.T).abs().max() < 1e-5


def test_more_places_never_err_more():
    w, d = normal(10, 20), unit_columns(10, 16, seed=1)
    gap = lambda index: (w - d @ paper.refit(w, d, index)).square().sum(0)
    gaps = [gap(paper.pursue(w, d, Pattern(16, 16, k))) for k in range(1, 12)]
    assert all((b <= a + 1e-9).all() for a, b in zip(gaps, gaps[1:], strict=False))
    assert gaps[9].max() < 1e-12 < gaps[0].min()  # ten independent columns say everything


def test_pursuit_by_a_slow_loop():
    p, w, d = Pattern(12, 3), normal(7, 9), unit_columns(7, 12, seed=1)
    index = paper.pursue(w, d, p)
    for j in range(9):
        taken, rest = [], w[:, j]
        for _ in range(p.k):
            groups = {i // 3 for i in taken}
            best = max((i for i in range(12) if i // 3 not in groups), key=lambda i, rest=rest: abs(rest @ d[:, i]).item())
            taken.append(best)
            some = d[:, taken]
            rest = w[:, j] - some @ torch.linalg.lstsq(some, w[:, j]).solution
        assert index[j].tolist() == sorted(taken)


@pytest.mark.parametrize("weighted", [False, True])
def test_numbers_are_least_squares_in_the_norm_asked_for(weighted):
    w, d, c = normal(5, 6), unit_columns(5, 8, seed=1), gram_of(6) if weighted else None
    index = paper.pursue(w, d, Pattern(8, 4))
    s = paper.refit(w, d, index, c)
    root = torch.linalg.cholesky(c if weighted else torch.eye(6, **double))
    mask = (s != 0).flatten()
    wide = torch.kron(d, root.T)[:, mask]  # vec of d S root, row by row
    exact = torch.linalg.lstsq(wide, (w @ root).flatten()).solution
    close(s.flatten()[mask], exact, 1e-4)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("p", [Pattern(12, 2), Pattern(12, 4), Pattern(12, 12, 4)])
def test_no_round_raises_the_error(p, weighted):
    w, c = normal(8, 30) * torch.logspace(0, -1, 8, **double)[:, None], gram_of(30) if weighted else None
    for seed in range(3):
        d, s, errors = paper.factor(w, p, seed, c, rounds=8)
        assert all(b <= a * (1 + 1e-6) for a, b in zip(errors, errors[1:], strict=False)) and errors[-1] < 0.98 * errors[0]
        gap = w - d @ s
        close(errors[-1], ((gap if c is None else gap @ c) * gap).sum().item(), 1e-6)
        close(d.norm(dim=0), torch.ones(12, **double), 1e-6)
    with pytest.raises(ValueError, match="factor the transpose or ask for fewer"):
        paper.factor(w[:, :11], p)


def test_two_planes_need_two_subspaces():
    """Points on two planes: rank 2 fits neither, four columns of which each point takes two fit both."""
    dice, planes = normal(2, 2, 40), normal(2, 3, 2, seed=1)
    w = torch.cat([planes[0] @ dice[0], planes[1] @ dice[1]], 1)
    a, b = svd(w, 2)
    assert (w - a @ b).norm() > 0.2 * w.norm()
    errors = [paper.factor(w, Pattern(4, 2), seed, rounds=60)[2][-1] for seed in range(5)]
    assert min(errors) < 1e-8 * w.square().sum()


@pytest.mark.parametrize("ends", [(12, 30), (30, 12), (16, 16)])
def test_the_start_minds_the_inputs(ends):
    """In the norm of the outputs the weighted start is better, in that of the weights the plain one, and seeds differ."""
    layer, gram, p = linear(*ends), gram_of(ends[0]), Pattern(8, 2)
    plain, weighted = DenseSparse.of(layer, p), DenseSparse.of(layer, p, gram)
    of = lambda new, gram: paper.error(layer, new.merge().weight, gram)
    assert of(weighted, gram) < 0.7 * of(plain, gram) and of(plain, None) < of(weighted, None)
    x = torch.linalg.cholesky(gram).T
    gap = x @ (layer.weight - weighted.merge().weight).double().T
    assert of(weighted, gram) == pytest.approx((gap.norm() / (x @ layer.weight.double().T).norm()).square().item(), rel=1e-4)
    assert torch.equal(DenseSparse.of(layer, p, gram).shadow, weighted.shadow)
    assert not torch.equal(DenseSparse.of(layer, p, gram, seed=1).shadow, weighted.shadow)
    assert weighted.turned == (ends == (30, 12)) and weighted.shadow.shape == (8, max(ends))


def test_inputs_that_are_never_there_are_no_trouble():
    x = normal(400, 12)
    x[:, 3] = 0
    for ends in ((12, 30), (12, 6)):
        new = DenseSparse.of(linear(*ends), Pattern(6, 2), x.T @ x)
        assert new.d.isfinite().all() and new.shadow.isfinite().all() and new.merge().weight.abs().max() < 1e3


def test_resting_numbers_begin_as_what_they_would_be_alone():
    p, w, d = Pattern(12, 3), normal(7, 9), unit_columns(7, 12, seed=1)
    s = paper.refit(w, d, paper.pursue(w, d, p))
    shadow = paper.wake(w, d, s, p)
    assert torch.equal(paper.support(shadow, p), s != 0) and torch.equal(shadow * (s != 0), s)
    for i, j in ((0, 0), (4, 3), (11, 8), (7, 5)):  # by hand: the others of its group silent
        group = range(i // 3 * 3, i // 3 * 3 + 3)
        rest = w[:, j] - d @ s[:, j] + d[:, list(group)] @ s[list(group), j]
        speaks = s[list(group), j].abs().max()
        assert shadow[i, j] == pytest.approx((d[:, i] @ rest).clamp(-0.9 * speaks, 0.9 * speaks) if s[i, j] == 0 else s[i, j])
    assert torch.equal(paper.wake(w, d, normal(12, 9), Pattern(12)), normal(12, 9))  # nobody rests


# --- the straight-through factorizer ------------------------------------------------------------------------------------


@pytest.mark.parametrize("turned", [False, True])
def test_gradient_goes_straight_through(turned):
    """All of the shadow, resting numbers included, gets D' x' delta; D gets what autograd gives it at S."""
    p, m, n = Pattern(8, 4), 6, 15
    layer = DenseSparse(normal(m, 8), normal(8, n, seed=1), p, None, turned)
    layer.free = True
    x, delta = normal(7, n if turned else m, seed=2), normal(7, m if turned else n, seed=3)
    (layer(x) * delta).sum().backward()
    s = layer.shadow * layer.mask
    by_hand = layer.d.T @ delta.T @ x if turned else layer.d.T @ x.T @ delta
    close(layer.shadow.grad, by_hand, 1e-9)
    close(layer.d.grad, delta.T @ x @ s.T if turned else x.T @ delta @ s.T, 1e-9)
    layer.zero_grad()
    layer.free = False
    (layer(x) * delta).sum().backward()
    close(layer.shadow.grad, by_hand * layer.mask, 1e-9)


class Net(nn.Module):
    """Two layers to be factored, and one to be left alone."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2, self.last = nn.Linear(12, 36), nn.Linear(36, 12), nn.Linear(12, 4)

    def forward(self, x):
        return self.last(self.fc2(F.gelu(self.fc1(x))))


def regression(rows=64):
    """A task: a student that starts from the weights alone, inputs of unequal channels, and the loss."""
    teacher, student = Net(), Net()
    for name in ("fc1", "fc2"):
        setattr(student, name, DenseSparse.of(getattr(teacher, name), Pattern(8, 4)))
    spread = torch.logspace(-1, 0.7, 12)

    def batches(i):
        x = torch.randn(rows, 12, generator=torch.Generator().manual_seed(i)) * spread
        with torch.no_grad():
            return x, teacher(x)

    return student, batches, lambda model, batch: F.mse_loss(model(batch[0]), batch[1])


def tuned(how, steps=150, rate=1e-2):
    student, batches, loss = regression()
    before = copy.deepcopy(student)
    churn = paper.tune(student, [student.fc1, student.fc2], loss, batches, steps, rate, how)
    with torch.no_grad():
        return student, before, churn, loss(student, batches(9999)).item(), loss(before, batches(9999)).item()


def test_places_are_learnt_and_come_to_rest():
    student, before, churn, after, was = tuned("shadow")
    assert after < 0.5 * was and len(churn) == 150
    assert sum(churn[:120]) > 0.05 and sum(churn[120:]) == 0  # the last fifth stays
    for name in ("fc1", "fc2"):
        layer, old = getattr(student, name), getattr(before, name)
        assert (layer.mask & ~old.mask).any() and not layer.free
        assert (layer.shadow[~layer.mask] != 0).any()  # what rests remembers
        close(layer.d.norm(dim=0), torch.ones(8), 1e-5)
        assert (layer.mask.unflatten(0, (-1, 4)).sum(1) == 1).all()
        assert torch.equal(DenseSparse.unpack(layer.pack(), layer.pattern, None, layer.turned).mask, layer.mask)
    assert torch.equal(student.last.weight, before.last.weight) and student.last.weight.grad is None
    assert student.last.weight.requires_grad and not student.fc1.d.requires_grad


def test_fixed_places_stay_and_projected_ones_forget():
    fixed, before, churn, after, was = tuned("fixed")
    assert after < was and sum(churn) == 0 and torch.equal(fixed.fc1.mask, before.fc1.mask)
    projected, _, churn, after, was = tuned("projected")
    assert after < was and sum(churn) > 0 and projected.fc2.shadow[~projected.fc2.mask].abs().max() == 0
    with pytest.raises(ValueError, match="'fixed', not 'soft'"):
        tuned("soft")


def test_learning_places_beats_wrong_ones():
    """A layer that is D S, started with half of its places elsewhere: straight through some are found, fixed they can't be."""
    p, d, s = Pattern(8, 4), unit_columns(12, 8).float(), normal(8, 24, seed=1).float()
    s = s.sign() * (0.5 + s.abs())
    planted = DenseSparse(d, s, p)
    x = normal(2000, 12, seed=2).float()
    batches = lambda i: x[torch.randint(2000, (64,), generator=torch.Generator().manual_seed(i))]
    found, loss = {}, lambda model, x: F.mse_loss(model[0](x), planted(x).detach())
    for how in ("shadow", "fixed"):
        start = torch.where(normal(8, 24, seed=3) > 0, s, s.flip(0) * 0.5).float()
        model = nn.Sequential(DenseSparse(d, start * paper.support(start, p), p))
        paper.tune(model, list(model), loss, batches, 200, 3e-2, how)
        found[how] = loss(model, x).item(), (model[0].mask == planted.mask).float().mean().item()
    assert found["shadow"][0] < 0.8 * found["fixed"][0] and found["shadow"][1] > found["fixed"][1]


def test_a_killed_tuning_goes_on_to_the_same_weights(tmp_path):
    class Killed(Exception):
        pass

    def run(path, until=None):
        student, batches, loss = regression()

        def once(model, batch):
            nonlocal calls
            calls += 1
            if until and calls > until:
                raise Killed
            return loss(model, batch)

        calls = 0
        paper.tune(student, [student.fc1, student.fc2], once, batches, 240, 1e-2, path=path)
        return student

    whole = run(None)
    with pytest.raises(Killed):
        run(tmp_path / "state.safetensors", 220)
    again = run(tmp_path / "state.safetensors")
    for name, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


# --- whole models -------------------------------------------------------------------------------------------------------


def calls(n=4, b=4):
    dice = torch.Generator().manual_seed(1)
    draw = lambda: torch.randn(b, 4, 2, 6, 6, generator=dice)
    return [(draw(), torch.rand(b, generator=dice), Cond(text=torch.randint(2, 200, (b, 4), generator=dice))) for _ in range(n)]


def encoder():
    """PyTorch's own transformer, whose attention is fused: only its feed-forwards are parts."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 96, batch_first=True)
    return nn.TransformerEncoder(layer, 2).eval().requires_grad_(False)


class Foreign(nn.Module):
    """Somebody's language model: gated feed-forward, layers without biases, other names."""

    class Layer(nn.Module):
        def __init__(self, d):
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(d, d, bias=False) for _ in range(4))
            self.up_proj, self.down_proj = nn.Linear(d, 3 * d, bias=False), nn.Linear(3 * d, d, bias=False)

        def forward(self, x):
            o = F.scaled_dot_product_attention(self.q_proj(x), self.k_proj(x), self.v_proj(x), is_causal=True)
            x = x + self.o_proj(o)
            return x + self.down_proj(F.silu(self.up_proj(F.layer_norm(x, x.shape[-1:]))))

    def __init__(self, d=32):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Foreign.Layer(d) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


TEXTS = [(torch.randn(4, 30, 32, generator=torch.Generator().manual_seed(i)),) for i in range(4)]
MODELS = {"video": (video, calls(), "trunk", 20), "encoder": (encoder, TEXTS, "", 4), "foreign": (Foreign, TEXTS, "", 12)}


@pytest.mark.parametrize("kind", MODELS)
def test_models_of_any_make(kind):
    make, batches, within, count = MODELS[kind]
    model = make()
    state = copy.deepcopy(model.state_dict())
    layers = paper.find(model, within)
    assert len(layers) == count
    with torch.no_grad():
        said, error = model(*batches[0]), []
        for share in (0.75, 0.5):
            small = paper.compress(model, batches, share, within)
            new = {name: small.get_submodule(name) for name in layers}
            assert all(type(layer) is DenseSparse for layer in new.values())
            bits = sum(8 * measure.stored_bytes(layer.pack()) for layer in new.values())
            full = sum(16 * layer.weight.numel() for layer in layers.values())
            assert (share - 0.08) * full < bits <= share * full + 7 * count  # the last byte of places may be begun
            error.append((small(*batches[0]) - said).norm() / said.norm())
        assert error[0] < error[1] < 0.9
        assert torch.equal(model(*batches[0]), said)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", MODELS)
def test_tuning_a_compressed_model(kind):
    make, batches, within, _ = MODELS[kind]
    model = make()
    small = paper.compress(model, batches, 0.4, within)
    with torch.no_grad():
        pool = [(call, model(*call)) for call in batches]
    layers = [small.get_submodule(name) for name in paper.find(model, within)]
    loss = lambda model, batch: F.mse_loss(model(*batch[0]), batch[1])
    state = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        before = sum(loss(small, batch).item() for batch in pool)
    paper.tune(small, layers, loss, lambda i: pool[i % 4], 30, 3e-3)
    with torch.no_grad():
        assert sum(loss(small, batch).item() for batch in pool) < 0.8 * before
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())  # the teacher is left alone


def test_the_pattern_of_a_matrix_is_that_of_the_least_error():
    layer, gram = linear(24, 72), gram_of(24)
    best = paper.choose(layer, 0.5, gram)
    for group in (1, 2, 4, 8):
        one = paper.choose(layer, 0.5, gram, (group,))
        assert one.pattern.group == group
        assert paper.error(layer, best.merge().weight, gram) <= paper.error(layer, one.merge().weight, gram)
    low = nn.Linear(24, 72)
    with torch.no_grad():
        low.weight.copy_(normal(72, 5) @ normal(5, 24, seed=1))
    assert paper.choose(low, 0.5).pattern.group == 1 and paper.error(low, paper.choose(low, 0.5).merge().weight) < 1e-8
    with pytest.raises(ValueError, match="can't be stored in 0.01"):
        paper.choose(layer, 0.01)
    with pytest.raises(ValueError, match="no part within 'head'"):
        paper.find(video(d=48), "head")


def test_packing_does_not_depend_on_the_order_in_which_bits_are_read():
    places = np.unpackbits(DenseSparse(torch.eye(4), torch.eye(4)[[2, 0, 3, 1]], Pattern(4, 4)).pack()["places"].numpy())
    assert places.tolist() == [1, 0, 1, 1, 0, 0, 0, 1]  # 1, 3, 0, 2: the lower bit first
