"""Maestro: full width is the layer, a cut is the truncated SVD; widths, lasso, shrinking and pruning are what the paper says."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from minivid.core.baselines.lowrank import Factored, svd
from minivid.core.model import Cond, VideoModel
from minivid.low_rank import maestro as paper
from minivid.low_rank.maestro import Ordered, Pairs, Settings

double = dict(dtype=torch.float64)


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **double)


def linear(i, o, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(i, o)


def layer(i=12, o=20, seed=0):
    return Ordered.of(linear(i, o, seed), min(i, o))


# --- the layer ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ends", [(12, 20), (20, 12), (9, 9)])
def test_full_width_is_the_layer_and_a_cut_the_truncated_svd(ends):
    plain, x = linear(*ends), normal(7, ends[0]).float()
    one = Ordered.of(plain, min(ends))
    close(one(x), plain(x)), close(one.a @ one.b, plain.weight)
    values = torch.linalg.svdvals(plain.weight.double())
    for b in range(min(ends) + 1):
        one.width = b
        a, c = svd(plain.weight, b)
        close(one(x), F.linear(x, a @ c, plain.bias))
        gap = plain.weight - one.a[:, :b] @ one.b[:b]
        assert gap.norm().item() == pytest.approx(values[b:].square().sum().sqrt().item(), abs=1e-4)
    one.width = 0
    assert torch.equal(one(x), plain.bias.expand(7, -1))


def test_masked_and_pruned_say_the_same_and_are_merged_at_break_even():
    model, x = nn.Sequential(layer(12, 24)), normal(5, 12).float()
    one = model[0]
    for live in range(13):  # 12 x 24 = 288 numbers, a term has 36: at 8 terms factors save nothing
        one.live.fill_(live)
        small = paper.pruned(model)
        close(small(x), model(x))
        assert type(small[0]) is (nn.Linear if live >= 8 else Factored)
        assert one.size() == min(36 * live, 288) == sum(p.numel() for p in small.parameters()) - 24
    one.live.fill_(12)
    assert paper.pruned(model, {"0": 3})[0].rank == 3


def test_scaling_leaves_the_output_but_not_the_lasso():
    one, other, x = layer(), layer(), normal(5, 12).float()
    with torch.no_grad():
        for scale in (0.5, 3.0):
            other.a.copy_(scale * one.a), other.b.copy_(one.b / scale)
            close(other(x), one(x), 1e-4)
            assert paper.lasso([other]) > paper.lasso([one])  # the SVD's factors are balanced


# --- widths -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 4])
def test_a_cycle_has_every_pair_once(every):
    own = [layer(), layer(9, 9), layer(5, 7)]
    own[1].live.fill_(6)
    pairs = Pairs(own, 3, every)
    all_ = sorted((i, b) for i, x in enumerate(own) for b in paper.widths(int(x.live), every))
    assert (1, 6) in all_ and (1, 9) not in all_ and (2, 5) in all_

    def cycle():
        drawn = [pairs.draw() for _ in all_]
        assert all(sum(b is not None for b in some) == 1 for some in drawn)
        return [(i, b) for some in drawn for i, b in enumerate(some) if b is not None]

    first, second = cycle(), cycle()
    assert sorted(first) == sorted(second) == all_ and first != second
    own[0].live.fill_(2)
    own[1].live.fill_(0)
    assert {i for some in (pairs.draw() for _ in range(20)) for i, b in enumerate(some) if b is not None} == {0, 2}
    assert max(b for some in (pairs.draw() for _ in range(20)) if (b := some[0]) is not None) == 2
    for x in own:
        x.live.fill_(0)
    assert pairs.draw() == [None] * 3


def test_the_sampler_goes_on_where_it_was():
    own = [layer(), layer(9, 9)]
    pairs, other = Pairs(own, 1), Pairs(own, 1)
    for _ in range(30):
        pairs.draw()
    other.load_state_dict(pairs.state_dict())
    assert [other.draw() for _ in range(40)] == [pairs.draw() for _ in range(40)]


def test_independent_widths_are_each_of_the_grid():
    own, dice = [layer(), layer(9, 9)], torch.Generator().manual_seed(0)
    own[1].live.fill_(0)
    drawn = [paper.independent(own, dice, 5) for _ in range(60)]
    assert {some[0] for some in drawn} == {5, 10, 12} and {some[1] for some in drawn} == {0}


def test_terms_beyond_the_width_get_no_gradient():
    own, x = [layer(12, 20), layer(20, 12)], normal(6, 12).float()
    model = nn.Sequential(own[0], nn.GELU(), own[1])
    with paper.narrow(own, [None, 4]):
        model(x).square().sum().backward()
    assert own[1].width is None
    for grad in (own[1].a.grad.T, own[1].b.grad):
        assert (grad[4:] == 0).all() and (grad[:4].norm(dim=1) > 0).all()
    assert (own[0].b.grad.norm(dim=1) > 0).all()


# --- the lasso ----------------------------------------------------------------------------------------------------------


def slow(u, v):
    return sum(u[:, b:].norm() + v[:, b:].norm() for b in range(u.shape[1]))


def test_lasso_is_the_double_loop():
    own = [layer(), layer(9, 7)]
    close(paper.lasso(own), sum(slow(x.a, x.b.T) for x in own))
    thin = Ordered(normal(6, 1).float(), normal(1, 5, seed=1).float())
    close(paper.lasso([thin]), thin.a.norm() + thin.b.norm())
    x = normal(5, 8)
    best = x[:, x.norm(dim=0).argsort(descending=True)]
    for seed in range(20):
        mixed = x[:, torch.randperm(8, generator=torch.Generator().manual_seed(seed))]
        assert paper.tails(best).sum() <= paper.tails(mixed).sum() + 1e-9


def test_dead_tails_have_a_gradient_of_zero():
    one = layer()
    with torch.no_grad():
        one.a[:, 3:], one.b[3:] = 0, 0
    paper.lasso([one]).backward()
    assert one.a.grad.isfinite().all() and (one.a.grad[:, 3:] == 0).all() and one.a.grad[:, 2].norm() > 0


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 99), st.floats(0.01, 1.5))
def test_the_proximal_step_is_the_minimum(seed, by):
    """No step from it, small or large, towards another matrix or the start, is better; and it agrees with plain descent."""
    u, dice = normal(4, 5, seed=seed), torch.Generator().manual_seed(seed)
    x = u * torch.from_numpy(paper.softened(u.norm(dim=0).numpy()[None], by)[0])
    cost = lambda x: 0.5 * (x - u).square().sum() + by * paper.tails(x).sum()
    for size in (1e-3, 1e-2, 0.1, 1.0):
        for _ in range(20):
            assert cost(x) <= cost(x + size * torch.randn(x.shape, generator=dice, **double)) + 1e-9
    for share in np.linspace(0, 1, 11):
        assert cost(x) <= cost(x + share * (u - x)) + 1e-9 and cost(x) <= cost((1 - share) * x) + 1e-9
    free = u.clone().requires_grad_()
    opt = torch.optim.LBFGS([free], max_iter=300, line_search_fn="strong_wolfe")

    def closure():
        opt.zero_grad()
        value = cost(free)
        value.backward()
        return value

    opt.step(closure)
    assert cost(x) <= cost(free.detach()) + 1e-7


def test_one_term_is_the_soft_threshold_and_zeros_are_a_tail():
    assert paper.softened(np.array([[3.0]]), 1.0) == pytest.approx(2 / 3)
    assert paper.softened(np.array([[3.0, 2.0]]), 0.0) == pytest.approx(1.0)
    for seed in range(20):
        zero = paper.softened(np.abs(normal(1, 9, seed=seed).numpy()) * 3, 0.7)[0] == 0
        assert (np.diff(zero.astype(int)) >= 0).all()


def test_layers_of_any_rank_take_their_step_together():
    own = [layer(), layer(9, 7)]
    before = copy.deepcopy(own)
    paper.proximal(own, 0.02)
    for x, old in zip(own, before, strict=True):
        for new, was in ((x.a, old.a), (x.b.T, old.b.T)):
            close(new, was * torch.from_numpy(paper.softened(was.detach().norm(dim=0).numpy()[None], 0.02)[0]).float())


# --- shrinking ----------------------------------------------------------------------------------------------------------


def test_importance_never_rises_and_what_stays_is_a_prefix():
    one = Ordered(normal(6, 8).float(), normal(8, 5, seed=1).float())
    value = paper.importance(one)
    assert (value.diff() <= 0).all()
    close(value[3], one.a[:, 3:].norm() * one.b[3:].norm())
    least = value[4].item()
    paper.shrink([one], least)
    assert int(one.live) == 5 and one.a[:, 5:].abs().max() == 0
    assert len(paper.importance(one)) == 5
    paper.shrink([one], 1e9)
    assert int(one.live) == 0 and len(paper.importance(one)) == 0
    paper.shrink([one], 1e9)


def test_the_optimiser_forgets_dead_terms():
    one, x = layer(), normal(6, 12).float()
    opt = torch.optim.Adam(one.parameters(), 0.1)
    for _ in range(3):
        opt.zero_grad()
        one(x).square().sum().backward()
        opt.step()
    paper.shrink([one], paper.importance(one)[4].item(), opt)
    opt.zero_grad()
    one(x).square().sum().backward()
    opt.step()
    assert int(one.live) == 5 and one.a[:, 5:].abs().max() == 0 and one.b[5:].abs().max() == 0


# --- what is proved in the paper ----------------------------------------------------------------------------------------


def target(n=8):
    u, v = torch.linalg.qr(normal(n, n)).Q, torch.linalg.qr(normal(n, n, seed=1)).Q
    return u * 0.7 ** torch.arange(n, **double) @ v.T


def learnt(w, data, sampler, steps=1500, seed=0):
    """One linear layer trained on y = w x."""
    model = nn.Sequential(Ordered.of(linear(len(w), len(w), seed), len(w)))
    batches = lambda i: data(i).float()
    paper.train(model, lambda m, x: F.mse_loss(m(x), x @ w.T.float()), batches, steps, 2e-2, Settings(sampler, every=1))
    return model[0]


def test_ordered_training_finds_the_svd_and_plain_training_does_not():
    w, gaps = target(), {}
    for sampler in ("single", "none"):
        one = learnt(w, lambda i: 4 * torch.cat([torch.eye(8), -torch.eye(8)]), sampler)  # the expected loss itself
        best = torch.linalg.svdvals(w).square().flip(0).cumsum(0).flip(0).sqrt()
        error = torch.stack([(w - one.a[:, :b].double() @ one.b[:b].double()).norm() for b in range(1, 8)])
        gaps[sampler] = (error / best[1:] - 1).max().item()
    assert gaps["single"] < 1e-5 and gaps["none"] > 1


# --- training -----------------------------------------------------------------------------------------------------------


def regression():
    """Two layers that should be of rank 3."""
    torch.manual_seed(0)
    model = nn.Sequential(layer(12, 16), nn.Identity(), layer(16, 12, 1))
    w = (normal(12, 3) @ normal(3, 12, seed=1)).float() / 4
    batches = lambda i: normal(64, 12, seed=i).float()
    return model, lambda model, x: F.mse_loss(model(x), x @ w), batches


def test_the_lasso_finds_the_rank_and_shrinking_makes_it_so():
    model, loss, batches = regression()
    used = paper.train(model, loss, batches, 400, 1e-2, Settings("single", every=1, strength=0.5, epoch=20))
    ranks = [int(x.live) for x in paper.layers(model).values()]
    assert all(3 <= r <= 5 for r in ranks), ranks
    assert used[0] > used[-1] and loss(model, batches(999)) < 0.05
    small = paper.pruned(model)
    x = batches(5)
    close(small(x), model(x), 1e-5)
    assert sum(p.numel() for p in small.parameters()) < 0.6 * sum(p.numel() for p in model.parameters())


def test_without_sampler_and_lasso_it_is_ordinary_training():
    model, loss, batches = regression()
    other = copy.deepcopy(model)
    paper.train(model, loss, batches, 15, 1e-2, Settings("none"))
    opt = torch.optim.Adam(other.parameters(), 1e-2, (0.9, 0.99))
    for i in range(15):
        opt.param_groups[0]["lr"] = 1e-2 * paper.fit.cosine(i, 15, 1)
        opt.zero_grad()
        loss(other, batches(i)).backward()
        opt.step()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        close(a, b, 1e-6)
    dense = nn.Sequential(linear(4, 4))
    paper.train(dense, lambda m, x: m(x).square().mean(), lambda i: normal(3, 4).float(), 2, 1e-2, Settings("none"))
    with pytest.raises(ValueError, match="nothing here is ordered"):
        paper.train(dense, loss, batches, 2, 1e-2, Settings())
    with pytest.raises(ValueError, match="not 'each'"):
        Settings("each")


@pytest.mark.parametrize("sampler", ["single", "independent"])
def test_a_killed_training_goes_on_to_the_same_weights(tmp_path, sampler):
    class Killed(Exception):
        pass

    def run(path, until=None):
        model, loss, batches = regression()

        def look(step):
            if step == until:
                raise Killed

        paper.train(model, loss, batches, 250, 1e-2, Settings(sampler, 4, strength=0.1, epoch=20), look, path)
        return model

    whole = run(None)
    with pytest.raises(Killed):
        run(tmp_path / "state.safetensors", 230)
    again = run(tmp_path / "state.safetensors")
    for name, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


# --- whole models -------------------------------------------------------------------------------------------------------


def video():
    torch.manual_seed(0)
    model = VideoModel(4, 48, 2, 2)
    for p in model.parameters():
        nn.init.normal_(p, std=0.15)
    return model


def calls():
    dice = torch.Generator().manual_seed(1)
    draw = lambda: torch.randn(4, 4, 2, 6, 6, generator=dice)
    return draw(), torch.rand(4, generator=dice), Cond(text=torch.randint(2, 200, (4, 4), generator=dice))


def encoder():
    """PyTorch's own transformer, whose attention is fused: only its feed-forwards are parts."""
    torch.manual_seed(0)
    part = nn.TransformerEncoderLayer(32, 4, 96, batch_first=True, dropout=0.0)
    return nn.TransformerEncoder(part, 2)


TEXT = (torch.randn(4, 10, 32, generator=torch.Generator().manual_seed(0)),)
MODELS = {"video": (video, calls(), "trunk", 20), "encoder": (encoder, TEXT, "", 4)}


@pytest.mark.parametrize("kind", MODELS)
def test_models_of_any_make(kind):
    make, call, within, count = MODELS[kind]
    model = make()
    state = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        said = model(*call)
        close(paper.ordered(model, None, within)(*call), said, 1e-3)
    student = paper.ordered(copy.deepcopy(model), None, within)
    assert len(paper.layers(student)) == count
    loss = lambda m, _: F.mse_loss(m(*call), said)
    look = lambda share: loss(paper.pruned(student, {n: int(share * x.rank) for n, x in paper.layers(student).items()}), 0).item()
    before = look(0.3)
    paper.train(student, loss, lambda i: i, 60, 2e-3, Settings("independent", every=4))
    assert look(0.3) < 0.7 * before
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="no part within 'head'"):
        paper.ordered(model, None, "head")


def test_whitened_start_minds_the_inputs():
    plain, x = linear(12, 20), normal(300, 12) * torch.logspace(-2, 1, 12, **double)
    model = nn.ModuleDict({"fc1": plain, "rest": nn.Sequential(nn.Linear(2, 2), nn.ReLU())})
    model = nn.ModuleList([model])  # a block, so that fc1 is one of its feed-forward
    name = "0.fc1"
    one, other = (paper.layers(paper.ordered(model, g))[name] for g in (None, {name: x.T @ x}))
    gap = lambda y: (x.float() @ (plain.weight - y.a[:, :4] @ y.b[:4]).T).norm()
    assert gap(other) < 0.5 * gap(one)
    close(other.a @ other.b, plain.weight, 1e-4)


# --- deployment ---------------------------------------------------------------------------------------------------------


def test_greedy_cuts_where_it_costs_least():
    """Of two equal layers one feeds an output that counts a hundred times as much: the other is cut."""
    own = [layer(16, 16), layer(16, 16, 1)]
    model, x = nn.ModuleList(own), normal(64, 16).float()
    with torch.no_grad():
        said = [y(x) for y in own]

    def loss(_):
        return sum(w * F.mse_loss(y(x), one).item() for w, y, one in zip((100, 1), own, said, strict=True))

    ranks = paper.greedy(model, loss, 0.75, 2)
    assert ranks["0"] == 16 and ranks["1"] <= 8 and 256 + 32 * ranks["1"] <= 0.75 * 512
    assert own[0].width is None
    ranks = paper.greedy(model, loss, 0.0, 2)
    assert ranks == {"0": 0, "1": 0} and paper.greedy(model, loss, 1.0) == {"0": 16, "1": 16}
    with pytest.raises(ValueError, match="nothing here is ordered"):
        paper.greedy(nn.Linear(2, 2), loss, 0.5)


def test_lazy_prices_agree_with_fresh_ones():
    """Where layers don't touch each other a lazy search is the exhaustive one."""
    own = [layer(16, 16, seed) for seed in range(3)]
    model, x = nn.ModuleList(own), normal(64, 16).float()
    with torch.no_grad():
        said = [y(x) for y in own]
    loss = lambda _: sum((i + 1) * F.mse_loss(y(x), said[i]).item() for i, y in enumerate(own))
    found = paper.greedy(model, loss, 0.4, 2)
    ranks = [16] * 3
    size = lambda i, r: own[i].size(r)
    while sum(size(i, r) for i, r in enumerate(ranks)) > 0.4 * 3 * 256:

        def told(some):
            with paper.narrow(own, some):
                return loss(0)

        after = [(*ranks[:i], min(6, ranks[i] - 2), *ranks[i + 1 :]) for i in range(3)]
        saved = [size(i, ranks[i]) - size(i, max(0, some[i])) for i, some in enumerate(after)]
        prices = [(told(some) - told(ranks)) / x if x else np.inf for some, x in zip(after, saved, strict=True)]
        ranks = list(after[int(np.argmin(prices))])
    assert list(found.values()) == ranks
