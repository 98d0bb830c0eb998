"""ViD-GPT: no frame looks ahead, the cache is exact, the queue forgets the oldest, and only noisy frames are learnt from."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from minivid.block_diffusion.vid_gpt import Anew, Merge, Queue, Shown, ViDGPT, blocks, loss, past, prompts
from minivid.core import fit, noise
from minivid.core.cache import Cache
from minivid.core.model import Cond, Guided
from minivid.core.rollout import Plan, remember, rollout

PATH, L = noise.flow(), 4


def small(mode="causal", positions="cyclic", **more):
    """A model of random weights, no zeros left, in float64."""
    torch.manual_seed(0)
    model = ViDGPT(d=32, depth=2, heads=2, mode=mode, positions=positions, **more).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    return model


def clip(f, b=2, seed=1):
    return torch.randn(b, 4, f, 4, 4, generator=torch.Generator().manual_seed(seed)).double()


def mixed(P, f, t=0.6):
    """Times of P prompt frames and f - P noisy ones."""
    return torch.cat([torch.zeros(2, P), torch.full((2, f - P), t)], 1).double()


def reach(model, x, t):
    """Which frames (columns) each output frame (row) depends on."""
    x = x.clone().requires_grad_()
    out = model(x, t, Cond())
    grads = [torch.autograd.grad(out[:, :, i].square().sum(), x, retain_graph=True)[0] for i in range(x.shape[2])]
    return torch.stack([g.abs().sum((0, 1, 3, 4)) > 0 for g in grads])


# --- who sees whom ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["cyclic", "rotary"])
def test_no_output_depends_on_a_later_frame(positions):
    assert torch.equal(reach(small(positions=positions), clip(9), mixed(5, 9)), torch.ones(9, 9).tril().bool())


def test_partial_lets_noisy_frames_see_their_chunk_and_full_all():
    expected = torch.ones(9, 9).tril().bool()
    expected[5:] = True
    assert torch.equal(reach(small("partial"), clip(9), mixed(5, 9)), expected)
    assert reach(small("full"), clip(9), mixed(5, 9)).all()


def test_rows_of_the_partial_mask():
    t = torch.tensor([[0.0, 0.0, 0.0, 0.5, 0.5]])
    sees = lambda mode: (n := blocks(t, 0, mode)[0])[None] <= n[:, None]
    assert torch.equal(sees("partial")[:3], sees("causal")[:3]) and sees("partial")[3:].all()
    assert blocks(t, 0, "full") is None


@pytest.mark.parametrize("mode", ["causal", "partial"])
def test_what_is_kept_of_the_prompt_does_not_depend_on_the_noise(mode):
    model, x, kept = small(mode), clip(9), []
    for t in (0.01, 0.9):
        cache = Cache()
        cache.open(0, Cond())
        cache.writing = True
        model(torch.cat([x[:, :, :5], clip(4, seed=int(100 * t))], 2), mixed(5, 9, t), Cond(), cache)
        kept.append([(e.k[:, :, :5], e.v[:, :, :5]) for entries in cache.kept.values() for e in entries])
    assert all(torch.equal(a, b) for one, other in zip(*kept, strict=True) for a, b in zip(one, other, strict=True))


def test_full_attention_refuses_a_cache():
    with pytest.raises(ValueError, match="can't be cached"):
        small("full")(clip(4), torch.zeros(2, 4), Cond(), Cache())


# --- the cache ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["causal", "partial"])
@pytest.mark.parametrize("positions", ["cyclic", "rotary"])
def test_a_cached_forward_is_the_full_one_for_every_prompt(mode, positions):
    model, x = small(mode, positions), clip(17)
    for P in prompts(17, L):
        whole = model(x[:, :, : P + L], mixed(P, P + L), Cond())
        cache = Queue(13)
        for i, (first, last) in enumerate(zip([0, *range(1, P, L)], range(1, P + 1, L), strict=True)):
            cache.open(i, Cond())
            remember(model, x[:, :, first:last], 0.0, Cond(start=first), cache)
            cache.close(i)
        cache.open(99, Cond())
        part = model(x[:, :, P : P + L], torch.full((2, L), 0.6).double(), Cond(start=P), cache)
        torch.testing.assert_close(part, whole[:, :, P:], atol=1e-9, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("mode", ["causal", "partial"])
def test_cached_rollouts_are_those_that_compute_their_prompt_anew(mode):
    model = Guided(Shown(small(mode), PATH, 0.05), 1.5)
    words = torch.randint(3, 20, (2, 6), generator=torch.Generator().manual_seed(0))
    first, ends, cond = [clip(1)], [clip(L, seed=i) for i in range(3)], Cond(text=words)
    plan = Plan(PATH, noise.table(3, L).double())
    cached = rollout(model, plan, ends, cond, Queue(13), first=first)
    anew = rollout(Anew(model), replace(plan, write="none", context=past(13)), ends, cond, first=first)
    torch.testing.assert_close(cached, anew, atol=1e-6, rtol=0)
    other = rollout(Shown(small(mode), PATH, 0.05), plan, ends, cond, Queue(13), first=first)
    assert (other - cached).abs().max() > 1e-3  # guidance does something, so the two sides of it keep their own pasts


@torch.no_grad()
@pytest.mark.parametrize("positions", ["cyclic", "rotary"])
def test_after_the_queue_wrapped_every_frame_sees_what_was_in_it_when_it_was_written(positions):
    model, room, total = small(positions=positions), 5, 17
    x, t = clip(total + L), mixed(total, total + L)
    cache, starts = Queue(room), [0, *range(1, total, L)]
    for i, first in enumerate(starts):
        cache.open(i, Cond())
        remember(model, x[:, :, first : 1 + L * i], 0.0, Cond(start=first), cache)
        cache.close(i)
    cache.open(99, Cond())
    part = model(x[:, :, total:], t[:, total:], Cond(start=total), cache)
    seen = torch.zeros(total + L, total + L, dtype=torch.bool)
    for first, last in zip([*starts, total], [1, *range(1 + L, total + L + 1, L)], strict=True):
        for i in range(first, last):
            seen[i, max(0, first - room) : i + 1] = True
    for block in model.trunk.blocks:
        block.along.attend = lambda q, k, v, where: F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    model.trunk.length, table = 10**6, model.trunk.place  # one call for all frames: more than there are positions
    if table is not None:
        model.trunk.place = torch.nn.Parameter(table[torch.arange(total + L) % len(table)])
    torch.testing.assert_close(part, model(x, t, Cond())[:, :, total:], atol=1e-9, rtol=0)


def test_the_queue_drops_the_oldest_and_never_holds_more():
    model, cache, x = small(), Queue(9), clip(21)
    for i, first in enumerate([0, *range(1, 21, L)]):
        cache.open(i, Cond())
        remember(model, x[:, :, first : 1 + L * i], 0.0, Cond(start=first), cache)
        before = cache.kept[0][-1].k[:, :, -L:].clone()
        cache.close(i)
        assert cache.tokens == min(9, 1 + L * i)
        assert torch.equal(cache.kept[0][0].k[:, :, -L:], before)
    with pytest.raises(ValueError, match="at least a frame"):
        Queue(0)


def test_more_frames_than_positions_are_refused():
    with pytest.raises(ValueError, match="18 frames are in view, but there are 17"):
        small()(clip(18), mixed(14, 18), Cond())


@torch.no_grad()
def test_frames_that_go_through_the_network():
    shown, K = Shown(small(), PATH, 0.05), 3
    plan = Plan(PATH, noise.table(K, L).double())
    counts = []
    for n in (1, 2, 3, 4):
        shown.frames = 0
        rollout(shown, plan, [clip(L, seed=i) for i in range(n)], Cond(), Queue(5), first=[clip(1)])
        counts.append(shown.frames)
    assert [b - a for a, b in zip(counts, counts[1:], strict=False)] == [K * L + L] * 3
    shown.frames = 0
    rollout(Anew(shown), replace(plan, write="none", context=past(13)), [clip(L), clip(L)], Cond(), first=[clip(1)])
    assert shown.frames == K * (1 + L) + K * (5 + L)


# --- the prompt ---------------------------------------------------------------------------------------------------------


def test_prompt_lengths():
    assert prompts(33, 8) == [1, 9, 17, 25] and prompts(17, 4) == [1, 5, 9, 13]
    assert all(p + 4 <= 17 for p in prompts(17, 4))
    with pytest.raises(ValueError, match="room for a frame and a chunk"):
        prompts(4, 4)


def test_the_mark_changes_nothing_at_first_and_something_later():
    x, merge = torch.randn(2, 3, 4, 8), Merge(8)
    for mark in (torch.zeros(2, 3), torch.ones(2, 3)):
        assert torch.equal(merge(x, mark), x)
    with torch.no_grad():
        merge.linear.weight[:, -1] = 1
    assert torch.allclose(merge(x, torch.ones(2, 3)), x + 1)


def test_targets_of_prompt_frames_count_for_nothing():
    """The same loss and gradients whatever the prompt's output; none of them reaches the output on prompt frames."""
    model, outs = small(), []

    def heard(x, t, cond):
        outs.append(model(x, t, cond))
        outs[-1].retain_grad()
        return outs[-1]

    heard.trunk = model.trunk
    for i in range(6):
        loss(heard, PATH, clip(17), Cond(), fit.draws(0, i), prompts(17, L)).backward()
        P = outs[-1].shape[2] - L
        grad = outs[-1].grad.abs().sum((0, 1, 3, 4))
        assert (grad[:P] == 0).all() and (grad[P:] > 0).all()
    assert len({out.shape[2] for out in outs}) > 2 and max(out.shape[2] for out in outs) <= 17


def test_a_prompt_is_shown_with_the_same_noise_in_every_pass():
    seen = []
    shown = Shown(lambda x, t, cond, cache=None: seen.append(x) or x, PATH, 0.1, seed=3)
    x = clip(6)
    shown(x, mixed(6, 6), Cond(start=2))
    shown(x[:, :, 3:], mixed(3, 3), Cond(start=5))
    shown(x, mixed(0, 6), Cond(start=2))
    assert torch.equal(seen[0][:, :, 3:], seen[1]) and torch.equal(seen[2], x)
    assert 0.05 < (seen[0] - 0.9 * x).std() < 0.15


def test_the_network_learns_with_the_mark_and_all_prompt_lengths():
    model = ViDGPT(d=32, depth=1, heads=2)
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3)
    still = torch.randn(8, 4, 1, 4, 4, generator=torch.Generator().manual_seed(0)).expand(-1, -1, 9, -1, -1)
    values = []
    for i in range(60):
        value = loss(model, PATH, still, Cond(), fit.draws(1, i), prompts(9, L), 0.0)
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        values.append(value.item())
    assert sum(values[-10:]) < 0.8 * sum(values[:10])
