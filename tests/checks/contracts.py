"""What every attention plug, every cache and every path must do, whoever wrote it: one function each, to be called by its test.

    from checks import contracts
    contracts.attention(my_plug)

Each asks for shapes, dtypes, determinism, independence of the samples of a batch, gradients, and the one rule of its contract.
"""

import pytest
import torch

from minivid.core.cache import Cache
from minivid.core.model import Cond, VideoModel
from minivid.core.where import grid, visible

close = lambda a, b: torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def reached(y, *inputs) -> bool:
    """Whether a finite gradient other than 0 comes from y to all inputs."""
    grads = torch.autograd.grad(y.square().sum(), inputs, allow_unused=True)
    return all(g is not None and bool(g.isfinite().all()) and bool(g.abs().sum() > 0) for g in grads)


def attention(attend, gradient=True, key_heads=(4, 2), blocks=(None, 1, 2)) -> None:
    """`attend(q, k, v, where) -> o` on a grid of 3 x 2 x 4 tokens; gradient=False for plugs of inference.

    blocks: the kinds of visibility (frames a block) that the plug knows; it must refuse the others, not overlook them.
    """
    for g in key_heads:
        for block in (None, 1, 2):
            where = grid(3, 2, 4, block=block)
            q, k, v = draw(2, 4, 24, 8), draw(2, g, 24, 8, seed=1), draw(2, g, 24, 6, seed=2)
            if block not in blocks:
                with pytest.raises(ValueError):
                    attend(q, k, v, where)
                continue
            o = attend(q, k, v, where)
            assert o.shape == (2, 4, 24, 6) and o.dtype == q.dtype and o.isfinite().all()
            assert torch.equal(o, attend(q, k, v, where))
            close(attend(q[1:], k[1:], v[1:], where), o[1:])
            assert attend(q.double(), k.double(), v.double(), where).dtype == torch.float64
            if gradient:
                inputs = [x.requires_grad_(True) for x in (q, k, v)]
                assert reached(attend(*inputs, where), *inputs)
            if block is not None:  # a query must not feel a key that it can't see
                seen = visible(where)[0, 5]
                hidden = lambda x, seen=seen: torch.where(seen[:, None], x, 100 + x)
                close(attend(q, hidden(k), hidden(v), where)[:, :, 5], o[:, :, 5])


def small(block=2, d=32) -> VideoModel:
    """A block-causal model of two layers whose zero-initialised gates were opened."""
    torch.manual_seed(0)
    model = VideoModel(channels=3, d=d, depth=2, heads=2, block=block).eval().requires_grad_(False)
    for p in model.parameters():
        p.add_(0.2 * torch.randn(p.shape))
    return model


def play(model, x, t, cache, size=2):
    """Block by block through the cache, every block written as it is. Returns all outputs."""
    out = []
    for i, part in enumerate(x.split(size, 2)):
        cache.open(i, Cond())
        cache.writing = True
        out.append(model(part, t[:, i * size : (i + 1) * size], Cond(start=i * size), cache))
        cache.close(i)
    return torch.cat(out, 2)


def cache(make, gradient=True, rounds=0.0) -> None:
    """`make()` gives a new cache; 4 blocks of 2 frames of 4 tokens are played through it.

    gradient: whether one comes through what it holds; rounds: how far off a sample alone may be, as its last digits differ
    """
    model, x, t = small(), draw(2, 3, 8, 4, 4), torch.rand(2, 8, generator=torch.Generator().manual_seed(1))
    held = make()
    out = play(model, x, t, held)
    assert isinstance(held, Cache) and out.shape == x.shape and out.dtype == x.dtype and out.isfinite().all()
    assert held.nbytes > 0 and held.moved > 0 and held.tokens > 0
    counted = held.nbytes, held.moved, held.tokens
    assert torch.equal(play(model, x, t, make()), out)
    held.reset()
    assert (held.nbytes, held.moved, held.tokens) == (0, 0, 0)
    assert torch.equal(play(model, x, t, held), out) and (held.nbytes, held.moved, held.tokens) == counted
    torch.testing.assert_close(play(model, x[1:], t[1:], make()), out[1:], atol=1e-5 + rounds, rtol=1e-4)
    close(out[:, :, :2], model(x[:, :, :2], t[:, :2], Cond()))  # without a past it is the plain model
    other = torch.cat([x[:, :, :6], x[:, :, 6:] + 1], 2)
    assert torch.equal(play(model, other, t, make())[:, :, :6], out[:, :, :6])  # the past doesn't feel the future
    other = torch.cat([x[:, :, :4], x[:, :, 4:6] + 1, x[:, :, 6:]], 2)
    assert not torch.allclose(play(model, other, t, make())[:, :, 6:], out[:, :, 6:])  # but the future feels the block before
    held.open(4, Cond())
    model(x[:, :, :2], t[:, :2], Cond(start=8), held)
    assert (held.nbytes, held.tokens) == (counted[0], counted[2])  # reading writes nothing
    assert play(model.double(), x.double(), t.double(), make()).dtype == torch.float64
    if gradient:
        blocks = [b.requires_grad_(True) for b in x.split(2, 2)]
        assert reached(play(model.float(), torch.cat(blocks, 2), t, make())[:, :, 6:], *blocks[2:])


def path(make) -> None:
    """`make(samples)` gives the path for a slice of a batch of two clips `b 3 4 5 5`: a bridge has an end for each."""
    x, eps = draw(2, 3, 4, 5, 5), draw(2, 3, 4, 5, 5, seed=1)
    t = 0.05 + 0.9 * torch.rand(2, 4, generator=torch.Generator().manual_seed(2))
    whole = make(slice(None))
    mixed, told = whole.at(x, eps, t), whole.target(x, eps, t)
    assert mixed.shape == told.shape == x.shape and mixed.dtype == told.dtype == x.dtype
    assert torch.equal(mixed, whole.at(x, eps, t)) and torch.equal(told, whole.target(x, eps, t))
    torch.testing.assert_close(whole.clean(mixed, t, told), x, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(whole.noise(mixed, t, told), eps, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(whole.at(x, eps, torch.zeros(2, 4)), x)
    one = make(slice(1, 2))
    assert torch.equal(one.at(x[1:], eps[1:], t[1:]), mixed[1:]) and torch.equal(one.target(x[1:], eps[1:], t[1:]), told[1:])
    moved = t.clone()
    moved[:, 2] = 0.5
    assert torch.equal(whole.at(x, eps, moved)[:, :, [0, 1, 3]], mixed[:, :, [0, 1, 3]])  # every frame has its own time
    inputs = [y.requires_grad_(True) for y in (mixed, told)]
    assert whole.clean(mixed.double(), t.double(), told.double()).dtype == torch.float64
    assert reached(whole.clean(mixed, t, told) + whole.noise(mixed, t, told), *inputs)


def bottleneck(part, d: int) -> None:
    """`part(z) -> z_q, codes, losses` and `part.lookup(codes)`, on a latent of d channels; codes are (index, where) pairs."""
    z = draw(2, d, 3, 4, 4).requires_grad_(True)
    part = part.eval()
    out, codes, losses = part(z)
    assert out.shape == z.shape and out.dtype == z.dtype and out.isfinite().all()
    assert torch.equal(part.lookup(codes), out)
    for index, where in codes:
        n = index[0].numel()
        assert index.dtype == torch.int64 and len(index) == 2 and index.min() >= 0 and where.coords.shape[-2:] == (n, 3)
    assert all(value.ndim == 0 and value >= 0 for value in losses.values())
    assert reached(out, z)
    again = part(z)
    assert torch.equal(again[0], out) and all(torch.equal(a.index, b.index) for a, b in zip(again[1], codes, strict=True))
    alone, own, _ = part(z[1:])
    close(alone, out[1:])
    assert all(torch.equal(a.index, b.index[1:]) for a, b in zip(own, codes, strict=True))
    doubled = part.double()
    assert doubled(z.double())[0].dtype == torch.float64
    part.float()
