"""LouisKV: with room for all it is the full cache; what is read is what is listed; samples turn when they turn."""

import math

import pytest
import torch
from checks import contracts
from hypothesis import given
from hypothesis import strategies as st

from minivid.core.attention import Attention
from minivid.core.cache import Cache
from minivid.core.codes import TokenModel, generate
from minivid.core.model import Cond
from minivid.core.where import HIDDEN, Where, grid
from minivid.sparse_attention import louiskv as paper
from minivid.sparse_attention.louiskv import LOCAL, SINK, LouisKV

SMALL = dict(sink=2, local=12, size=4, longest=12)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokens(b=2, key_heads=2):
    """A model over 16 codes, frames of 2 x 4, one row a block; and codes for a prompt of three frames."""
    torch.manual_seed(0)
    model = TokenModel(16, 32, 2, 4, key_heads, (2, 4), 4).eval().requires_grad_(False)
    for p in model.parameters():
        p.add_(0.2 * torch.randn(p.shape))
    return model, torch.randint(16, (b, 3, 2, 4), generator=torch.Generator().manual_seed(1))


def step(cache, block, q, k, v, where, layer=0):
    """One block through one layer of a cache: what it read, or None."""
    cache.open(block, Cond())
    cache.writing = True
    past = cache.read(layer, q, where)
    cache.add(layer, q, k, v, where)
    cache.close(block)
    return past


def run(cache, steps, b=2, heads=4, groups=2, prompt=24, each=4, seed=0, same=()):
    """A prompt and some steps of random tokens in a row of places; what was read at each. same: steps that repeat a query."""
    at, read, q = 0, [], None
    for i in range(steps + 1):
        n = each if i else prompt
        new = draw(b, heads, n, 8, seed=seed + 3 * i)
        q = q if i in same else new
        where = Where(torch.arange(at, at + n).float()[None, :, None] * torch.tensor([1.0, 0, 0]), torch.full((1, n), i))
        kv = draw(2, b, groups, n, 8, seed=seed + 3 * i + 1)
        read.append(step(cache, i, q, *kv, where))
        at += n
    return read


# --- the limits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [-1, 0.3, 1.01])
def test_it_keeps_the_contract_of_caches(tau):
    contracts.cache(lambda: LouisKV(8, tau, sink=1, local=4, size=2, longest=8))


@pytest.mark.parametrize("tau", [-1, 0.5, 1.01])
@pytest.mark.parametrize("size, longest", [(1, 4), (4, 12), (100, 100)])
def test_with_room_for_all_it_is_the_full_cache(tau, size, longest):
    """What has left the buffer since the last look is seen by nobody: so tau is above 1 here, or nothing leaves."""
    model, prompt = tokens()
    local = 12 if tau > 1 else 1000
    cache, full = LouisKV(1000, tau, 2, local, size, longest), Cache()
    logits = {}
    for name, one in (("few", cache), ("all", full)):
        heard = logits.setdefault(name, [])
        watched = lambda *args, heard=heard: heard.append(model(*args)) or heard[-1]
        watched.inlet, watched.codes = model.inlet, model.codes
        generate(watched, 8, Cond(), prompt, one, temperature=0)
    for a, b in zip(logits["few"], logits["all"], strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)
    assert cache.rate == (1.0 if tau > 1 else pytest.approx(1 / 9) if tau < 0 else cache.rate)


def test_tau_beyond_the_cosines_range_looks_always_or_once():
    for tau, want in ((1.01, [True] * 6), (-1, [True] + [False] * 5)):
        cache = LouisKV(8, tau, **SMALL)
        run(cache, 6)
        assert [bool(x.all()) for x in cache.memory[0].looked] == want == [bool(x.any()) for x in cache.memory[0].looked]


def test_units_of_one_token_are_the_exact_best():
    cache = LouisKV(5, 1.01, sink=2, local=1000, size=1)
    run(cache, 1, heads=2, groups=2, each=1, prompt=30)
    q, k = draw(2, 2, 1, 8, seed=3), draw(2, 2, 2, 30, 8, seed=1)[0]
    best = (q @ k[:, :, 2:].mT)[:, :, 0].topk(5).indices + 2
    assert torch.equal(cache.memory[0].index.sort(-1).values, best.sort(-1).values)


def test_a_group_that_is_one_head_votes_for_itself():
    q, keys, size = draw(2, 3, 4, 8), draw(2, 3, 6, 8, seed=1), torch.ones(2, 3, 6, dtype=torch.long)
    alone = torch.stack([paper.votes(q[:, [i]], keys[:, [i]], size[:, [i]])[:, 0] for i in range(3)], 1)
    torch.testing.assert_close(paper.votes(q, keys, size), alone)
    both = paper.votes(q[:, :2], keys[:, :1], size[:, :1])  # a group of two: the mean of what each would say
    each = [paper.votes(q[:, [i]], keys[:, :1], size[:, :1]) for i in (0, 1)]
    torch.testing.assert_close(both, sum(each) / 2)


# --- when it looks ----------------------------------------------------------------------------------------------------


def test_agreement_is_a_cosine_that_knows_no_length_and_no_place():
    for bare in (True, False):
        cache = LouisKV(8, 0.5, **SMALL, bare=bare)
        q, where = draw(2, 4, 4, 8), grid(1, 2, 2, start=3, block=1)
        once = cache.direction(q, where)
        torch.testing.assert_close(torch.cosine_similarity(once, cache.direction(5 * q, where), dim=-1), torch.ones(2, 4))
        layer = Attention(32, 4)
        content = draw(1, 4, 1, 8, seed=5).expand(2, -1, 1, -1)
        at = lambda frame: Where(torch.tensor([[[frame, 1.0, 2.0]]]))
        near, far = (cache.direction(layer.turned(content, at(frame)), at(frame)) for frame in (0.0, 9.0))
        same = torch.cosine_similarity(near, far, dim=-1)
        assert bool((same > 1 - 1e-5).all()) == bare  # without the turn, the same content agrees from everywhere


def test_between_two_turns_nothing_is_moved():
    cache, moved = LouisKV(8, 0.999, **SMALL), []
    sets = []
    at, q = 24, None
    run(cache, 0)
    for i in range(1, 6):
        where = Where(torch.arange(at, at + 4).float()[None, :, None] * torch.tensor([1.0, 0, 0]), torch.full((1, 4), i))
        content = draw(2, 4, 4, 8, seed=7 if i in (1, 2, 3) else 50)  # turns once, before step 4
        axis, freq = paper.rotary_pairs(8)
        q = paper.rotate(content, where.coords, axis, freq)
        step(cache, i, q, *draw(2, 2, 2, 4, 8, seed=i), where)
        sets.append(cache.memory[0].read), moved.append(cache.moved)
        at += 4
    assert sets[0] is sets[1] is sets[2] and sets[3] is sets[4] and sets[2] is not sets[3]
    assert moved[0] == moved[1] == moved[2] < moved[3] == moved[4]
    torch.testing.assert_close(torch.stack(cache.memory[0].agreed[1:3]), torch.ones(2, 2))


def test_each_sample_turns_by_itself():
    cache = LouisKV(8, 0.9, **SMALL)
    run(cache, 1)
    first = cache.memory[0].index.clone()
    where = grid(1, 1, 4, start=28, block=1)
    q = draw(2, 4, 4, 8, seed=11)
    cache.memory[0].last = cache.direction(q, where).clone()
    cache.memory[0].last[1] *= -1  # the second sample looked the other way
    step(cache, 2, q, *draw(2, 2, 2, 4, 8, seed=9), where)
    now = cache.memory[0].index
    assert cache.memory[0].looked[-1].tolist() == [False, True]
    assert torch.equal(now[0], first[0]) and not torch.equal(now[1], first[1])


# --- what belongs together --------------------------------------------------------------------------------------------


@given(st.integers(0, 1000), st.floats(0.0, 1.0), st.integers(0, 9))
def test_every_token_is_in_one_place(seed, tau, steps):
    cache = LouisKV(8, tau, **SMALL)
    run(cache, steps, seed=seed)
    m = cache.memory[0]
    n = 24 + 4 * steps
    assert m.unit.shape == (2, 2, n) and (m.unit[:, :, :2] == SINK).all() and (m.unit[:, :, 2:24] >= 0).all()
    assert ((m.unit == SINK).sum(-1) + (m.unit == LOCAL).sum(-1) + m.size.sum(-1) == n).all()
    for b in range(2):
        ids = m.segment[b].tolist()
        assert ids == sorted(ids) and set(ids) == set(range(len(set(ids))))  # contiguous, in order
        assert all(ids.count(i) <= 12 for i in set(ids))
        gone = sum(u != LOCAL for u in m.unit[b, 0, 24:].tolist())
        assert (m.unit[b, :, 24 : 24 + gone] >= 0).all() and (m.unit[b, :, 24 + gone :] == LOCAL).all()
        assert len(ids) - gone <= 12 and (gone == 0 or gone == len(ids) or ids[gone - 1] != ids[gone])  # whole segments only


@given(st.lists(st.tuples(st.integers(1, 4), st.booleans()), max_size=12), st.integers(1, 10))
def test_what_leaves_the_buffer_is_what_a_loop_would_move(runs, local):
    ids = [i for i, (n, _) in enumerate(runs) for _ in range(n)]
    gone, closed = 0, sorted(set(ids))[:-1]
    for i in closed:
        if len(ids) - gone > local:
            gone += ids.count(i)
    assert paper.leaving(torch.tensor([ids], dtype=torch.long), local).tolist() == [gone]


def test_units_have_the_mean_of_their_keys():
    k, unit = draw(2, 2, 9, 4), torch.tensor([SINK, 0, 2, 0, 2, 2, LOCAL, 0, LOCAL]).expand(2, 2, -1)
    keys, size = paper.means(k, unit, 3)
    assert size.tolist() == [[[3, 0, 3]] * 2] * 2
    torch.testing.assert_close(keys[:, :, 0], k[:, :, [1, 3, 7]].mean(2))
    torch.testing.assert_close(keys[:, :, 2], k[:, :, [2, 4, 5]].mean(2))
    assert (keys[:, :, 1] == 0).all()


def test_clusters_are_of_content_and_forgive_what_is_equal():
    centres = 10 * draw(1, 1, 5, 8)
    k = (centres.repeat_interleave(6, 2) + 0.1 * draw(1, 1, 30, 8, seed=1)).expand(2, 3, -1, -1)
    found = paper.clusters(k, 6)
    assert found.shape == (2, 3, 30)
    for i in range(5):
        assert found[0, 0, 6 * i : 6 * i + 6].unique().numel() == 1
    assert found[0, 0].unique().numel() == 5
    assert paper.clusters(torch.ones(1, 1, 12, 4), 4).max() < 3  # fewer distinct keys than clusters: no NaN, no error
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    assert torch.equal(paper.clusters(k[:, :, order], 6), found[:, :, order])


def test_the_order_of_the_prompt_makes_no_difference():
    order = torch.cat([torch.arange(2), 2 + torch.randperm(22, generator=torch.Generator().manual_seed(0))])
    where = Where(torch.arange(24).float()[None, :, None] * torch.tensor([1.0, 0, 0]), torch.zeros(1, 24, dtype=torch.long))
    q, (k, v) = draw(2, 4, 24, 8), draw(2, 2, 2, 24, 8, seed=1)
    found = []
    for mix in (torch.arange(24), order):
        cache = LouisKV(8, 1.01, **SMALL)
        step(cache, 0, q, k[:, :, mix], v[:, :, mix], Where(where.coords[:, mix], where.block[:, mix]))
        past = step(cache, 1, draw(2, 4, 4, 8, seed=3), *draw(2, 2, 2, 4, 8, seed=4), grid(1, 1, 4, start=24, block=1))
        there = past[2].block < HIDDEN
        found.append(torch.where(there[..., None], past[0], 0).sum(2))
    torch.testing.assert_close(*found)


# --- what it reads ----------------------------------------------------------------------------------------------------


@given(st.integers(0, 1000), st.integers(1, 40))
def test_fill_takes_whole_units_by_rank_and_skips_only_what_is_too_large(seed, budget):
    dice = torch.Generator().manual_seed(seed)
    vote, size = torch.rand(2, 2, 9, generator=dice), torch.randint(0, 12, (2, 2, 9), generator=dice)
    taken = paper.fill(vote, size, budget)
    for b in range(2):
        for g in range(2):
            used, want = 0, set()
            for i in vote[b, g].argsort(descending=True).tolist():
                if 0 < size[b, g, i] <= budget - used:
                    used += int(size[b, g, i])
                    want.add(i)
            assert set(taken[b, g].nonzero()[:, 0].tolist()) == want


def test_attention_is_over_what_is_listed_and_nothing_else():
    cache = LouisKV(8, 1.01, **SMALL)
    past = run(cache, 9)[-1]
    m, (entry,) = cache.memory[0], cache.kept[0]
    k, _, where = past
    for b in range(2):
        for g in range(2):
            there = where.block[b, g] < HIDDEN
            got = sorted(map(tuple, k[b, g][there].tolist()))
            # the state of before the last step: its four tokens weren't there, and what left the buffer since was in it
            index = m.index[b, g][m.index[b, g] >= 0].tolist()
            assert len(index) <= 8
            gone = 24 + int(paper.leaving(m.segment[:, :-4], 12)[b])
            listed = sorted({0, 1, *index, *range(gone, 24 + 4 * 8)})
            assert got == sorted(tuple(entry.k[b, g, i].tolist()) for i in listed)


def test_what_was_dropped_can_weigh_no_more_than_its_radius_says():
    """Mass of a unit's keys <= size exp(q mu + |q| rho), with rho the distance of its farthest key from the mean."""
    cache = LouisKV(8, 1.01, **SMALL)
    run(cache, 6)
    m, (entry,), q = cache.memory[0], cache.kept[0], draw(2, 2, 8, seed=99)
    for b in range(2):
        for g in range(2):
            for u in range(m.size.shape[-1]):
                mine = entry.k[b, g][m.unit[b, g] == u]
                if len(mine):
                    rho = (mine - m.keys[b, g, u]).norm(dim=-1).max()
                    bound = len(mine) * math.exp(q[b, g] @ m.keys[b, g, u] + q[b, g].norm() * rho)
                    assert (mine @ q[b, g]).exp().sum() <= bound * (1 + 1e-5)


def test_what_is_moved_is_counted():
    cache = LouisKV(8, -1, **SMALL)
    run(cache, 1)
    m = cache.memory[0]
    assert cache.moved == int((m.index >= 0).sum()) * 2 * 8 * 4 + m.keys.nbytes
    assert cache.nbytes > 2 * 2 * 2 * 28 * 8 * 4  # keys and values of all, and what is known of units


@pytest.mark.parametrize("wrong", [dict(budget=0), dict(sink=-1), dict(local=0), dict(size=0), dict(longest=0)])
def test_settings_that_mean_nothing_are_refused(wrong):
    with pytest.raises(ValueError, match="1 at least"):
        LouisKV(**wrong)
