"""The clip is watched once, without knowing the question; then any number of questions are answered from the cache."""

import pytest
import torch

from minivid.core.baselines.answerer import Answerer
from minivid.core.cache import Cache
from minivid.core.model import Cond, Context
from minivid.core.text import VOCABULARY

CLIP = torch.rand(2, 3, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
ONE, TWO = torch.tensor([[5, 6, 7, 0], [8, 9, 0, 0]]), torch.tensor([[9, 8, 0, 0], [5, 5, 5, 5]])


def small() -> Answerer:
    return Answerer(d=24, depth=2, heads=2).eval().requires_grad_(False)


def test_watching_then_answering_is_one_pass_over_everything():
    model = small()
    (a, seen), (b, heard) = model.see(CLIP), model.hear(ONE)
    y = model.trunk(torch.cat([a, b], 1), Context(seen.join(heard)))
    whole = model.head(model.norm(y[:, a.shape[1]]))
    torch.testing.assert_close(model(CLIP, None, Cond(text=ONE)), whole, atol=1e-5, rtol=1e-4)
    assert whole.shape == (2, VOCABULARY)


def test_a_question_leaves_no_trace():
    model, cache = small(), Cache()
    model.watch(CLIP, cache)
    held, first = cache.nbytes, model.answer(ONE, cache)
    model.answer(TWO, cache)
    assert torch.equal(model(None, None, Cond(text=ONE), cache), first) and cache.nbytes == held
    assert held == 2 * 2 * 2 * (3 * 4) * 24 * 4 and cache.tokens == 12  # layers, k and v, samples, tokens, width, bytes


def test_padding_is_not_read_and_words_and_pixels_are():
    model = small()
    first = model(CLIP, None, Cond(text=ONE))
    longer = torch.cat([ONE, torch.zeros(2, 2, dtype=torch.long)], 1)
    torch.testing.assert_close(model(CLIP, None, Cond(text=longer)), first, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(model(CLIP, None, Cond(text=TWO)), first, atol=1e-4)
    assert not torch.allclose(model(-CLIP, None, Cond(text=ONE)), first, atol=1e-4)
    torch.testing.assert_close(model(CLIP[:1], None, Cond(text=ONE[:1])), first[:1], atol=1e-5, rtol=1e-4)


def test_frames_keep_their_numbers():
    model, long = small(), torch.rand(1, 3, 8, 8, 8) * 2 - 1
    tokens, where = model.see(long)
    some, at = model.see(long[:, :, 1::3], 1, 3)  # frames 1, 4, 7
    chosen = (where.coords[0, :, 0] % 3) == 1
    assert torch.equal(at.coords, where.coords[:, chosen]) and torch.equal(some, tokens[:, chosen])
    cache, other = Cache(), Cache()
    model.watch(long[:, :, :2], cache), model.watch(long[:, :, :2], other, 0, 4)
    assert not torch.allclose(model.answer(ONE[:1], cache), model.answer(ONE[:1], other), atol=1e-5)


def test_an_empty_cache_is_refused():
    with pytest.raises(ValueError, match="watch"):
        small()(None, None, Cond(text=ONE), Cache())


def test_it_learns_through_the_cache():
    model = small().requires_grad_(True).train()
    opt, answers, losses = torch.optim.Adam(model.parameters(), 3e-3), torch.tensor([11, 12]), []
    for _ in range(30):
        losses.append(torch.nn.functional.cross_entropy(model(CLIP, None, Cond(text=ONE)), answers))
        opt.zero_grad(), losses[-1].backward(), opt.step()
    assert losses[-1] < 0.2 * losses[0] and model.project.weight.grad.abs().sum() > 0
