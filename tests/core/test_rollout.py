"""Block = whole clip is the plain sampler; cached is uncached; nothing leaks back; gradients stop where they are told to."""

from dataclasses import replace

import pytest
import torch

from minivid.core import noise, text
from minivid.core.cache import Cache, Window
from minivid.core.model import Cond, VideoModel
from minivid.core.rollout import Plan, block_loss, block_times, denoise, remember, rollout

FLOW = noise.flow()


def small(block=2) -> VideoModel:
    """A model of two layers whose zero-initialised gates were opened."""
    model = VideoModel(channels=3, d=32, depth=2, heads=2, block=block).eval().requires_grad_(False)
    for p in model.parameters():
        p.add_(0.2 * torch.randn(p.shape))
    return model


def ends(n=3, size=2, seed=1):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 3, size, 8, 8, generator=g) for _ in range(n)]


PLAN = Plan(FLOW, noise.table(3, 2))


@torch.no_grad()
def roll(model, plan=PLAN, blocks=None, cond=None, cache=None, **more):
    return rollout(model, plan, blocks or ends(), cond or Cond(), cache, **more)


@pytest.mark.parametrize("write", ["clean", "same", "none"])
def test_one_block_is_the_plain_sampler(write):
    model, (x,) = small(None), ends(1, 6)
    plain = noise.sample(model, FLOW, x, Cond(), noise.table(3, 6))
    assert torch.equal(roll(model, Plan(FLOW, noise.table(3, 6), write=write), [x], cache=Cache()), plain)


def test_cached_is_uncached():
    """The slow way: at every step the clean past is put before the noisy block, and the whole is computed again."""
    model = small()
    made = torch.empty(2, 3, 0, 8, 8)
    for x in ends():
        n = made.shape[2]
        for t, s in zip(PLAN.times[:-1], PLAN.times[1:], strict=True):
            out = model(torch.cat([made, x], 2), torch.cat([torch.zeros(n), t]).expand(2, -1), Cond())[:, :, n:]
            x = noise.euler(FLOW, lambda x, t, out=out: FLOW.clean(x, t, out), x, t, s)
        made = torch.cat([made, x], 2)
    torch.testing.assert_close(roll(model, cache=Cache()), made, atol=1e-5, rtol=1e-4)


def test_another_future_leaves_the_past_as_it_is():
    model, blocks = small(), ends()
    a = roll(model, blocks=blocks, cache=Cache())
    b = roll(model, blocks=[*blocks[:2], -blocks[2]], cache=Cache())
    assert torch.equal(a[:, :, :4], b[:, :, :4]) and not torch.equal(a[:, :, 4:], b[:, :, 4:])


def test_a_long_window_is_the_full_cache():
    model = small()
    assert torch.equal(roll(model, cache=Window(3)), roll(model, cache=Cache()))
    assert not torch.equal(roll(model, cache=Window(1)), roll(model, cache=Cache()))


def test_without_a_past_blocks_are_samples_of_their_own():
    model = small(None)  # rotary places are relative: where a block stands doesn't matter when it is alone
    alone = [noise.sample(model, FLOW, x, Cond(), PLAN.times) for x in ends()]
    torch.testing.assert_close(roll(model, Plan(FLOW, PLAN.times, write="none")), torch.cat(alone, 2), atol=1e-5, rtol=1e-4)


def test_the_same_pass_writes_the_keys_of_the_last_step():
    seen = []

    class Watching(Cache):
        def add(self, layer, *rest):
            seen.append((self.block, layer))
            super().add(layer, *rest)

    roll(small(), Plan(FLOW, PLAN.times, write="same"), cache=Watching())
    assert seen == [(i, layer) for i in range(3) for layer in range(2)]


def test_context_is_given_what_was_made():
    lengths = []

    def context(made, cond):
        lengths.append((made.shape[2], cond.start))
        return cond

    out = roll(small(None), Plan(FLOW, PLAN.times, write="none", context=context))
    assert lengths == [(2, 2.0), (4, 4.0)] and out.shape[2] == 6


def test_every_block_is_told_its_own_caption():
    told = []

    def model(x, t, cond, cache=None):
        told.append((cond.text[0, 0].item(), cond.start))
        return torch.zeros_like(x)

    roll(model, Plan(FLOW, noise.table(1, 2), write="none"), cond=Cond(text=torch.tensor([[[5], [6]]]).expand(2, -1, -1)))
    assert told == [(5, 0.0), (6, 2.0), (6, 4.0)]  # the last caption goes on


def test_known_first_frames_begin_the_clip():
    model, known = small(), ends(1, seed=9)[0]
    out = roll(model, blocks=ends(1), cache=(cache := Cache()), first=[known])
    assert torch.equal(out[:, :, :2], known) and cache.tokens == 64
    x = denoise(model, PLAN, 1, ends(1)[0], Cond(start=2.0), _with(model, known))
    assert torch.equal(out[:, :, 2:], x)


def test_known_blocks_are_each_told_their_own_caption():
    """The past that a rollout leaves of known chunks is the one that is written by hand, caption by caption."""
    model, (a, b) = small(), ends(2, seed=9)
    told = Cond(text=text.tokens(["a red circle", "a blue square", "a green star"])[None].expand(2, -1, -1))
    out = roll(model, blocks=ends(1), cond=told, cache=Cache(), first=[a, b])
    swapped = replace(told, text=told.text[:, [1, 0, 2]])
    other = roll(model, blocks=ends(1), cond=swapped, cache=Cache(), first=[a, b])
    cache = Cache()
    for i, known in enumerate((a, b)):
        cache.open(i, told.at(i, 2.0 * i))
        remember(model, known, 0.0, told.at(i, 2.0 * i), cache)
        cache.close(i)
    cache.open(2, told.at(2, 4.0))
    by_hand = denoise(model, PLAN, 2, ends(1)[0], told.at(2, 4.0), cache)
    assert torch.equal(out[:, :, :4], torch.cat([a, b], 2)) and torch.equal(out[:, :, 4:], by_hand)
    assert not torch.allclose(out[:, :, 4:], other[:, :, 4:], atol=1e-4)


def _with(model, known):
    cache = Cache()
    cache.open(0, Cond())
    remember(model, known, 0.0, Cond(), cache)
    cache.close(0)
    cache.open(1, Cond())
    return cache


@pytest.mark.parametrize("write", ["clean", "same"])
@pytest.mark.parametrize("detach", [True, False])
def test_gradients_cross_blocks_only_when_asked(detach, write):
    blocks = [x.requires_grad_(True) for x in ends()]
    made = rollout(small(), Plan(FLOW, noise.table(1, 2), write=write, detach=detach), blocks, Cond(), Cache())
    made[:, :, 4:].sum().backward()
    reached = [x.grad.abs().sum() > 0 for x in blocks]
    assert reached == [not detach, not detach, True]


def test_a_model_learns_under_its_own_rollout():
    model = small().requires_grad_(True)
    made = rollout(model, Plan(FLOW, noise.table(1, 2), detach=False), ends(), Cond(), Cache())
    made[:, :, 4:].square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.trunk.parameters() if p.grad is not None)
    assert model.trunk.blocks[0].attention.k.weight.grad.abs().sum() > 0


def test_times_of_training_are_a_clean_past_and_noised_blocks():
    t, noised = block_times(2000, 4, 3, torch.Generator().manual_seed(0), slight=0.1)
    per = t.view(2000, 4, 3)
    assert (per == per[..., :1]).all() and noised[:, -1].all() and (noised.int().diff(dim=1) >= 0).all()
    assert per[..., 0][~noised].max() <= 0.1 and per[..., 0][noised].mean().item() == pytest.approx(0.5, abs=0.02)
    assert noised.float().mean(0).tolist() == pytest.approx([0.25, 0.5, 0.75, 1.0], abs=0.04)


def test_only_noised_blocks_count():
    clean = torch.randn(2, 3, 6, 8, 8)

    class Right(torch.nn.Module):
        """Knows the clean clip; says nonsense of frames at time 0."""

        block = 2

        def forward(self, x, t, cond, cache=None):
            t = t[:, None, :, None, None]
            return torch.where(t == 0, torch.full_like(x, 7.0), (x - clean) / t.clamp_min(1e-6))

    assert block_loss(Right(), FLOW, clean, Cond(), torch.Generator().manual_seed(0)) < 1e-6


def test_the_loss_trains():
    model = VideoModel(channels=3, d=32, depth=2, heads=2, block=2)
    opt, clean, losses = torch.optim.Adam(model.parameters(), 3e-3), torch.ones(4, 3, 4, 8, 8), []
    for i in range(40):
        losses.append(block_loss(model, FLOW, clean, Cond(), torch.Generator().manual_seed(i), 0.05))
        opt.zero_grad(), losses[-1].backward(), opt.step()
    assert losses[-1] < 0.6 * losses[0]


def test_errors_say_what_is_wrong():
    with pytest.raises(ValueError, match="'clean' pass"):
        Plan(FLOW, PLAN.times, write="often")
    with pytest.raises(ValueError, match="3 frames, the table"):
        roll(small(), blocks=ends(1, 3))
    with pytest.raises(ValueError, match="don't divide into chunks"):
        block_loss(small(), FLOW, torch.randn(1, 3, 5, 8, 8), Cond(), torch.Generator())
