"""BlockVid: everything kept and read is the full cache; what is kept is minimal; levels rise; noise stays noise; gamma mixes."""

import pytest
import torch
from checks import contracts
from checks.contracts import small
from hypothesis import given, settings
from hypothesis import strategies as st

from minivid.block_diffusion import blockvid as paper
from minivid.block_diffusion.blockvid import Forcing, Semantic
from minivid.core import fit, noise, text
from minivid.core.attention import dense, scores
from minivid.core.cache import Cache, Window
from minivid.core.model import Cond, Guided
from minivid.core.rollout import Plan, block_loss, rollout
from minivid.core.where import Where, grid
from minivid.world.scores import vde

SEEDS = st.integers(0, 10_000)
FLOW = noise.flow()
WORDS = ["first scene a circle moves left", "second scene a square moves up", "third scene a star moves up"]
ORDER = [0, 1, 2, 0, 1, 2]
PLAN = Plan(FLOW, noise.table(3, 2))


def dice(seed=0):
    return torch.Generator().manual_seed(seed)


def ends(n=6, seed=1):
    g = dice(seed)
    return [torch.randn(2, 3, 2, 8, 8, generator=g) for _ in range(n)]


def told(order=ORDER):
    """Two films: the second has its scenes in the opposite order."""
    words = text.tokens(WORDS)[order]
    return Cond(text=torch.stack([words, words.flip(0)]))


@torch.no_grad()
def roll(cache, model=None, blocks=None, cond=None):
    return rollout(model or small(), PLAN, blocks or ends(), cond or told(), cache)


# --- the law of limits ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("within", [None, 6, 99])
@pytest.mark.parametrize("local", [1, 2])
def test_everything_kept_and_read_is_the_full_cache(local, within):
    torch.testing.assert_close(roll(Semantic(99, 1.0, local, within=within)), roll(Cache()), atol=1e-5, rtol=1e-4)


def test_the_same_under_guidance_whose_batch_is_twice_the_captions():
    model = Guided(small(), 2.0)
    torch.testing.assert_close(roll(Semantic(99, 1.0), model), roll(Cache(), model), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("local", [1, 2, 9])
def test_nothing_retrieved_is_a_window(local):
    assert torch.equal(roll(Semantic(0, 0.5, local)), roll(Window(local)))


def test_cached_is_uncached():
    """The slow way: at every step all chunks are computed again, and a mask lets each see what it would retrieve."""
    model, cond, made = small(), told(), torch.empty(2, 3, 0, 8, 8)
    seen = {c: [[c - 1, c] if c else [c]] * 2 for c in range(6)}
    for c in range(2, 6):
        for i in range(2):
            names = paper.bag(cond.text[i])
            best = max(range(c - 1), key=lambda j: (round(float(names[c] @ names[j]), 4), -j))
            seen[c] = [*seen[c][:i], [best, c - 1, c], *seen[c][i + 1 :]]

    def masked(q, k, v, where):
        chunk = where.block[0]
        mask = torch.stack([torch.stack([torch.isin(chunk, torch.tensor(seen[int(b)][i])) for b in chunk]) for i in range(2)])
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None])

    for block in model.trunk.blocks:
        block.attention.attend = masked
    with torch.no_grad():
        for x in ends():
            n = made.shape[2]
            so_far = Cond(text=cond.text[:, : n // 2 + 1])
            for t, s in zip(PLAN.times[:-1], PLAN.times[1:], strict=True):
                out = model(torch.cat([made, x], 2), torch.cat([torch.zeros(n), t]).expand(2, -1), so_far)[:, :, n:]
                x = noise.euler(FLOW, lambda x, t, out=out: FLOW.clean(x, t, out), x, t, s)
            made = torch.cat([made, x], 2)
    torch.testing.assert_close(roll(Semantic(1, 1.0)), made, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("tau", [1.0, 0.6])
def test_another_future_leaves_the_past_as_it_is(tau):
    blocks = ends()
    a, b = roll(Semantic(1, tau)), roll(Semantic(1, tau), blocks=[*blocks[:4], -blocks[4], blocks[5]])
    assert torch.equal(a[:, :, :8], b[:, :, :8]) and not torch.equal(a[:, :, 8:], b[:, :, 8:])


@pytest.mark.parametrize("settings", [{}, dict(l=1, tau=0.5), dict(l=1, tau=0.5, within=2)])
def test_the_contract_of_caches_holds(settings):
    contracts.cache(lambda: Semantic(**settings))


def test_with_everything_off_the_loss_is_the_plain_one():
    model, clean, cond = small(), torch.cat(ends(4), 2), Cond(text=told().text[:, :4])
    for slight in (0.0, 0.3):
        a = paper.forcing_loss(model, FLOW, clean, cond, dice(3), Forcing(slight))
        assert torch.equal(a, block_loss(model, FLOW, clean, cond, dice(3), slight))


# --- what is kept -----------------------------------------------------------------------------------------------------


@given(SEEDS, st.floats(0.05, 0.99))
@settings(max_examples=20)
def test_the_kept_tokens_are_the_fewest_that_reach_tau(seed, tau):
    mass = torch.rand(3, 20, generator=dice(seed), dtype=torch.float64).square()
    for row, keep in zip(mass, paper.salient(mass, tau), strict=True):
        weakest = row[keep].min()
        assert row[keep].sum() >= tau * row.sum() - 1e-9 and row[keep].sum() - weakest < tau * row.sum() + 1e-9
        assert (row[~keep] <= weakest).all()


@given(SEEDS)
@settings(max_examples=20)
def test_more_is_kept_for_a_larger_tau_and_a_permutation_permutes_it(seed):
    mass, order = torch.rand(2, 20, generator=dice(seed)), torch.randperm(20, generator=dice(seed))
    kept = [paper.salient(mass, tau) for tau in (0.1, 0.5, 0.9, 1.0)]
    assert all((a <= b).all() for a, b in zip(kept, kept[1:], strict=False)) and kept[-1].all()
    assert torch.equal(paper.salient(mass[:, order], 0.7), paper.salient(mass, 0.7)[:, order])


def test_mass_is_the_attention_of_the_model_itself():
    """Two equal chunks' worth of tokens: what `received` says is what the layer's own map says."""
    model, seen = small(), []

    def watch(q, k, v, where):
        seen.append(scores(q, k, Where(where.coords)).mean((1, 2)))
        return dense(q, k, v, where)

    for block in model.trunk.blocks:
        block.attention.attend = watch
    cache = Semantic()
    cache.open(0, told().at(0, 0))
    cache.writing = True
    model(ends()[0], torch.zeros(2, 2), told().at(0, 0), cache)
    for layer, mass in enumerate(seen):
        torch.testing.assert_close(cache.mass[layer, 0], mass)
        torch.testing.assert_close(mass.sum(-1), torch.ones(2))


@given(SEEDS)
@settings(max_examples=20)
def test_compact_keeps_what_it_is_told_in_order_and_hides_its_padding(seed):
    keep = torch.rand(3, 12, generator=dice(seed)) < 0.5
    keep[0] = True
    k, v = torch.randn(2, 3, 2, 12, 4, generator=dice(seed))
    x, y, where = paper.compact(k, v, grid(3, 2, 2, 0, 1), keep)
    assert x.shape[2] == int(keep.sum(1).max())
    for i in range(3):
        there = where.block[i] < paper.HIDDEN
        assert torch.equal(x[i, :, there], k[i][:, keep[i]]) and torch.equal(y[i, :, there], v[i][:, keep[i]])
        assert torch.equal(where.coords[i, there], grid(3, 2, 2).coords[0, keep[i]])


def test_what_a_sample_of_a_batch_reads_is_what_it_reads_alone():
    """Padding is seen by nobody: a batch gives what its samples give one by one."""
    both = roll(Semantic(2, 0.6))
    for i in range(2):
        one = roll(Semantic(2, 0.6), blocks=[x[i : i + 1] for x in ends()], cond=Cond(text=told().text[i : i + 1]))
        torch.testing.assert_close(one, both[i : i + 1], atol=1e-5, rtol=1e-4)


# --- what is read -----------------------------------------------------------------------------------------------------


def test_the_chunks_of_the_same_scene_are_read():
    cache = Semantic(1, 1.0)
    roll(cache)
    assert cache.block == 5 and cache.retrieved().tolist() == [[2], [2]]  # scene 2 in one film, scene 0 in the other
    assert cache.reads == 2 * 32


def test_of_equals_the_oldest_and_more_words_in_common_before_fewer():
    new, old = paper.bag(text.tokens([WORDS[0]])), paper.bag(text.tokens([WORDS[1], *WORDS, WORDS[0], "a circle", ""]))[None]
    assert paper.alike(new, old, 3).tolist() == [[1, 4, 5]] and paper.alike(new, old, 99).shape == (1, 7)


def test_retrieved_chunks_stand_at_their_own_times_or_are_moved_up():
    for within, first in ((None, 0), (4, 2), (3, 4), (99, 0)):
        cache = Semantic(2, 1.0, within=within)
        roll(cache)
        where = cache.context[0][2]
        assert cache.retrieved()[0].tolist() == [0, 2]
        begins = where.coords[0, :, 0].view(3, -1).amin(1).tolist()  # of the two that are retrieved, and of the latest
        assert begins == [first, max(4, first + 2), 8]


def test_the_bank_holds_less_and_reads_no_more_when_the_past_grows():
    order = [0, 1, 2] * 4
    cache, whole = Semantic(1, 0.5), Cache()
    roll(cache, blocks=ends(12), cond=told(order)), roll(whole, blocks=ends(12), cond=told(order))
    assert cache.nbytes < 0.75 * whole.nbytes and cache.tokens < 12 * 32
    assert cache.reads <= 2 * 32 < whole.tokens
    cache.reset()
    assert cache.nbytes == cache.moved == cache.reads == 0


def test_bytes_moved_are_counted():
    cache = Semantic(0, 1.0)
    roll(cache, blocks=ends(2))
    assert cache.moved == 4 * 2 * 2 * 2 * 32 * 32 * 4  # calls, layers, k and v, batch, tokens, width, float32


# --- noise ------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.floats(0, 1), st.floats(0, 1))
@settings(max_examples=20)
def test_levels_rise_from_end_to_end(n, a, b):
    low, high = min(a, b), max(a, b)
    for form in ("linear", "cosine"):
        found = paper.levels(n, low, high, form)
        assert len(found) == n + 1 and (found.diff() >= -1e-6).all()
        assert found[0].item() == pytest.approx(low, abs=1e-6) and found[-1].item() == pytest.approx(high, abs=1e-6)
    assert torch.allclose(paper.levels(n, low, high, "linear").diff(), torch.tensor((high - low) / n), atol=1e-6)
    middle = [paper.levels(2 * n, low, high, form)[n] for form in ("linear", "cosine")]
    torch.testing.assert_close(*middle)


@given(SEEDS, st.sampled_from(["linear", "cosine"]))
@settings(max_examples=20)
def test_the_first_noised_chunk_keeps_its_time_and_later_ones_are_noisier(seed, form):
    t, first = torch.rand(8, 5, generator=dice(seed)), torch.randint(0, 5, (8, 1), generator=dice(seed))
    noised = torch.arange(5) >= first
    found = paper.rising(t, noised, form)
    assert torch.equal(found[~noised], t[~noised]) and torch.equal(found.gather(1, first), t.gather(1, first))
    assert (found.diff(dim=1)[noised[:, :-1]] >= 0).all() and (found <= 1).all()


@given(SEEDS, st.integers(1, 9))
@settings(max_examples=20)
def test_shuffling_permutes_within_windows(seed, s):
    eps = torch.randn(2, 1, 8, 1, 1, generator=dice(seed))
    found = paper.shuffled(eps, s, dice(seed))
    for a, b in zip(eps.split(s, 2), found.split(s, 2), strict=True):
        assert torch.equal(a.sort(2).values, b.sort(2).values)
    assert s > 1 or torch.equal(found, eps)


def test_neighbouring_chunks_share_their_noise_and_each_is_normal():
    chunks = paper.shared(torch.randn(64, 3, 4, 8, 8, generator=dice()), 5, 4, dice())
    assert len(chunks) == 5 and len({float(x[0, 0, 0, 0, 0]) for x in chunks}) > 1
    for x in chunks:
        assert torch.equal(x.sort(2).values, chunks[0].sort(2).values)
        assert x.mean().abs() < 0.01 and x.std().item() == pytest.approx(1, abs=0.01)


# --- velocity forcing ---------------------------------------------------------------------------------------------------


def test_gamma_one_towards_itself_is_flow_matching_and_gamma_nought_points_to_nothing():
    x, other, eps, t = *torch.randn(3, 2, 3, 4, 4, 4, generator=dice()), torch.rand(2, 4, generator=dice())
    for scaled in (True, False):
        assert torch.equal(FLOW.target(paper.goal(x, x, 1, scaled), eps, t), FLOW.target(x, eps, t))
    assert torch.equal(FLOW.target(paper.goal(x, other, 0, True), eps, t), eps)
    assert torch.equal(paper.goal(x, other, 0), x) and torch.equal(paper.goal(x, other, 1), other)


def test_at_the_optimum_the_clean_estimate_moves_from_the_data_to_the_context():
    """Scalars: x ~ N(0, 1), a fixed x_cond. The best linear v, by regression, says (1-t) E[x | x_t] + t gamma x_cond."""
    g, gamma, x_cond = dice(), 0.5, 3.0
    x, eps = torch.randn(2, 400_000, generator=g, dtype=torch.float64)
    for t in (0.05, 0.4, 0.8, 0.99):
        x_t = (1 - t) * x + t * eps
        basis = torch.stack([x_t, torch.ones_like(x)], 1)
        fitted = basis @ torch.linalg.lstsq(basis, (eps - gamma * x_cond)[:, None]).solution
        expected = (1 - t) * x_t / ((1 - t) ** 2 + t**2)  # E[x | x_t] of the Gaussian
        clean = x_t - t * fitted[:, 0]
        torch.testing.assert_close(clean, (1 - t) * expected + t * gamma * x_cond, atol=0.02, rtol=0.02)


def test_two_losses_on_one_answer_are_one_loss_towards_the_mean():
    """Up to a constant: so L_SF + L_BF needs one pass, and the gradients agree."""
    v, a, b = torch.randn(3, 50, generator=dice())
    v.requires_grad_(True)
    (both,) = torch.autograd.grad((v - a).square().mean() + (v - b).square().mean(), v)
    (one,) = torch.autograd.grad(2 * (v - (a + b) / 2).square().mean(), v)
    torch.testing.assert_close(both, one)


def test_x_cond_is_the_mean_of_the_retrieved_chunks():
    x = torch.arange(5.0).view(1, 5, 1).expand(2, -1, 3)
    names = paper.bag(text.tokens(WORDS)[[0, 1, 0, 0, 1]])[None].expand(2, -1, -1)
    assert paper.retrieved_mean(x, names, 2)[0, :, 0].tolist() == [0, 0, 0.5, 1.0, 0.5 * (1 + 0)]
    assert paper.retrieved_mean(x, names, 1)[0, :, 0].tolist() == [0, 0, 0, 0, 1]


def test_own_chunks_stand_in_for_the_past_only_and_carry_no_gradient():
    model, clean, cond = small(), torch.cat(ends(4), 2), Cond(text=told().text[:, :4])
    own = paper.own_past(model, FLOW, clean, cond, dice(5), 2)
    assert torch.equal(own[:, :, :2], clean[:, :, :2]) and torch.equal(own[:, :, 6:], clean[:, :, 6:])
    by_hand = rollout(model, Plan(FLOW, noise.table(2, 2, shift=3.0)), _drawn(clean), cond, Cache(), first=[clean[:, :, :2]])
    torch.testing.assert_close(own[:, :, :6], by_hand)
    model = small().requires_grad_(True)
    assert not paper.own_past(model, FLOW, clean, cond, dice(5), 2).requires_grad


def _drawn(clean):
    g = dice(5)
    return [fit.normal(*x.shape, generator=g) for x in clean.split(2, 2)[1:3]]


@pytest.mark.parametrize("s", [Forcing(own=2), Forcing(0.1, 2, "cosine"), Forcing(gamma=0.5), Forcing(0.1, 1, "linear", 1, True)])
def test_every_setting_trains(s):
    model, clean, cond = small().requires_grad_(True), torch.cat(ends(4), 2), Cond(text=told().text[:, :4])
    plain = paper.forcing_loss(model, FLOW, clean, cond, dice(), Forcing(s.slight))
    loss = paper.forcing_loss(model, FLOW, clean, cond, dice(), s)
    loss.backward()
    assert loss.isfinite() and not torch.equal(loss, plain)
    assert all(p.grad.isfinite().all() for p in model.trunk.parameters() if p.grad is not None)


# --- the drift error, and bad input ---------------------------------------------------------------------------------------


def test_the_drift_error_has_the_papers_numbers():
    falling, last, second = [1 - 0.05 * i for i in range(10)], [1.0] * 9 + [0.5], [1.0, 0.5] + [1.0] * 8
    assert vde([0.7] * 10) == 0 and vde(falling) == pytest.approx(8.25) == vde([3 * m for m in falling])
    assert vde(last) == pytest.approx(0.5) and vde(last, log=True) == 0 and vde(second) == pytest.approx(4.5)


def test_errors_say_what_is_wrong():
    for wrong in (dict(l=-1), dict(local=0), dict(tau=0.0), dict(tau=1.1)):
        with pytest.raises(ValueError, match="the bank reads"):
            Semantic(**wrong)
    with pytest.raises(ValueError, match="'linear' or by a 'cosine'"):
        paper.levels(3, form="steep")
    with pytest.raises(ValueError, match="within"):
        paper.levels(3, 0.5, 0.2)
    with pytest.raises(ValueError, match="at least one frame"):
        paper.shuffled(ends(1)[0], 0, dice())
    with pytest.raises(ValueError, match="don't divide"):
        paper.forcing_loss(small(), FLOW, torch.randn(1, 3, 5, 8, 8), Cond(), dice())
