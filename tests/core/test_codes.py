"""No block sees itself or what follows; cached decoding is uncached; L = 1 is the next-token model."""

import pytest
import torch

from minivid.core.cache import Cache, Window
from minivid.core.codes import TokenModel, choose, generate, nll, shift
from minivid.core.model import Cond
from minivid.core.where import visible

K = 12


def small(block=4, side=(2, 4)) -> TokenModel:
    return TokenModel(K, d=32, depth=2, heads=4, key_heads=2, side=side, block=block).eval().requires_grad_(False)


def codes(b=2, f=3, seed=0):
    return torch.randint(K, (b, f, 2, 4), generator=torch.Generator().manual_seed(seed))


TEXT = Cond(text=torch.tensor([[5, 6, 7, 0], [8, 9, 0, 0]]))


@pytest.mark.parametrize("block", [1, 2, 4, 8, 24])
def test_a_block_depends_on_all_blocks_before_it_and_on_nothing_else(block):
    model, x = small(block), codes()
    kept = {}
    model.inlet.code.register_forward_hook(lambda m, i, o: kept.update(vectors=o.requires_grad_(True)))
    logits = model.predict(x, Cond()).flatten(2)
    for m in range(24 // block):
        (grad,) = torch.autograd.grad(logits[..., m * block : (m + 1) * block].sum(), kept["vectors"], retain_graph=True)
        # By input place. What is fed at place i is the code of cell i - L; the first block is fed the start vectors.
        reached = grad.abs().sum((0, 2)) > 0
        assert not reached[:block].any() and not reached[(m + 1) * block :].any() and reached[block : (m + 1) * block].all()


def test_places_and_visibility():
    model = small(1)
    _, where, _ = model.inlet(codes(), None, Cond())
    assert torch.equal(visible(where)[0], torch.ones(24, 24).tril().bool())
    assert where.coords[0, 13].tolist() == [1, 1, 1]  # cell 13 = frame 1, row 1, column 1
    model.inlet.block = 24
    assert visible(model.inlet(codes(), None, Cond())[1]).all()
    model.inlet.block = 4
    sums = visible(model.inlet(codes(), None, Cond())[1])[0].sum(1)
    assert sums.tolist() == [4 * (q // 4 + 1) for q in range(24)]


def test_a_part_of_a_frame_is_a_part_of_the_whole():
    model, x = small(), codes()
    _, whole, _ = model.inlet(x, None, Cond())
    _, part, _ = model.inlet(x[:, 1:2, 1:], None, Cond(start=1.5))
    assert torch.equal(part.coords, whole.coords[:, 12:16]) and torch.equal(part.block, whole.block[:, 12:16])


def test_shift():
    x = torch.arange(8).view(1, 1, 2, 4)
    assert shift(x, 4, 99).flatten().tolist() == [99] * 4 + [0, 1, 2, 3]
    assert shift(x, 1, 99).flatten().tolist() == [99, 0, 1, 2, 3, 4, 5, 6]


def test_nll_is_the_plain_formula():
    model, x = small(), codes()
    logits = model.predict(x, TEXT)
    p = logits.softmax(1)
    slow = torch.stack([-p[b, x[b, f, h, w], f, h, w].log() for b, f, h, w in torch.cartesian_prod(*map(torch.arange, x.shape))])
    torch.testing.assert_close(nll(logits, x).flatten(), slow)


@pytest.mark.parametrize("block", [1, 4, 8, 24])
def test_cached_generation_is_uncached(block):
    model = small(block)
    slow, fast = (generate(model, 3, TEXT, cache=c, generator=torch.Generator().manual_seed(3)) for c in (None, Cache()))
    assert torch.equal(slow, fast) and slow.shape == (2, 3, 2, 4) and slow.max() < K


def test_cached_logits_are_those_of_the_full_pass():
    model, x, cache = small(), codes(), Cache()
    full, fed, out = model.predict(x, TEXT), shift(x, 4, K).flatten(1), []
    for m in range(6):
        cache.open(m, TEXT)
        cache.writing = True
        out.append(model(fed[:, 4 * m : 4 * m + 4].view(2, 1, 1, 4), None, TEXT.at(m, m / 2), cache).flatten(2))
        cache.close(m)
        assert cache.tokens == 4 * (m + 1)
    torch.testing.assert_close(torch.cat(out, 2), full.flatten(2), atol=1e-5, rtol=1e-4)


def test_greedy_generation_follows_the_likeliest_codes():
    model = small()
    out = generate(model, 3, TEXT, temperature=0)
    assert torch.equal(model.predict(out, TEXT).argmax(1), out)


def test_a_prompt_is_kept_and_continued():
    model, given = small(), codes(f=2)
    a, b = (generate(model, 4, Cond(), given, c, generator=torch.Generator().manual_seed(3)) for c in (None, Cache()))
    assert torch.equal(a[:, :2], given) and torch.equal(a, b)
    assert torch.equal(generate(model, 2, Cond(), given), given)
    assert torch.equal(generate(model, 4, Cond(), given, Window(9), 0), generate(model, 4, Cond(), given, Cache(), 0))


def test_captions_and_samples_count_by_themselves():
    model, x = small(), codes()
    both, one = model.predict(x, TEXT), model.predict(x[:1], Cond(text=TEXT.text[:1]))
    torch.testing.assert_close(both[:1], one, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(model.predict(x, TEXT.null()), both, atol=1e-3)


def test_draws_follow_the_probabilities_and_the_seed():
    logits = torch.tensor([0.5, 0.3, 0.2]).log().view(1, 3, 1).expand(1, 3, 20000)
    draw = lambda t=1.0: choose(logits, t, torch.Generator().manual_seed(0))
    assert (torch.bincount(draw()[0]) / 20000).tolist() == pytest.approx([0.5, 0.3, 0.2], abs=0.015)
    assert torch.equal(draw(), draw()) and (draw(0) == 0).all() and (draw(0.1) == 0).float().mean() > 0.98


def test_it_learns():
    model, x = small().requires_grad_(True).train(), codes(1)
    opt, losses = torch.optim.Adam(model.parameters(), 1e-2), []
    for _ in range(40):
        losses.append(nll(model.predict(x, Cond()), x).mean())
        opt.zero_grad(), losses[-1].backward(), opt.step()
    assert losses[-1] < 0.1 * losses[0]
    assert torch.equal(generate(model, 3, Cond(), temperature=0), x)


@pytest.mark.parametrize("call, message", [
    (lambda m: m.predict(codes().float(), Cond()), "codes are integers"),
    (lambda m: m.predict(codes() + K, Cond()), r"lie in \[0, 12\)"),
    (lambda m: m.predict(codes()[:, :, :1, :3], Cond()), "don't divide into blocks of 4"),
    (lambda m: generate(m, 2, Cond(), codes()[:, :1, :, :3]), "must divide into blocks of 4"),
    (lambda m: TokenModel(K, d=32, heads=4, key_heads=3), "divide into 4 heads"),
])  # fmt: skip
def test_errors_say_what_is_wrong(call, message, untyped):
    with pytest.raises(ValueError, match=message):
        call(small())
