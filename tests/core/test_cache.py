"""The cache gives what computing everything again gives; it counts its bytes; a window forgets what it says."""

import pytest
import torch

from minivid.core.attention import dense, rotate, scores, unfused
from minivid.core.cache import Cache, Window
from minivid.core.model import Cond, VideoModel
from minivid.core.where import Where, grid, visible


def small(block=2) -> VideoModel:
    """A model of two layers whose zero-initialised gates were opened."""
    model = VideoModel(channels=3, d=32, depth=2, heads=2, block=block).eval().requires_grad_(False)
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


X = torch.randn(2, 3, 6, 8, 8, generator=torch.Generator().manual_seed(1))
T = torch.tensor([[0.0, 0, 0.2, 0.2, 0.7, 0.7]]).repeat(2, 1)


def test_cached_is_the_full_block_causal_pass():
    model, cache = small(), Cache()
    torch.testing.assert_close(play(model, X, T, cache), model(X, T, Cond()), atol=1e-5, rtol=1e-4)


def test_a_cache_of_rotated_keys_is_the_same():
    class Rotated(Cache):
        rotated = True

    model = small()
    torch.testing.assert_close(play(model, X, T, Rotated()), play(model, X, T, Cache()), atol=1e-5, rtol=1e-4)


def test_keys_are_kept_unrotated():
    model, cache = small(), Cache()
    play(model, X, T, cache)
    moved = Cache()
    for i, part in enumerate(X.split(2, 2)):  # the same frames at other places
        moved.open(i, Cond())
        moved.writing = True
        model(part, T[:, 2 * i : 2 * i + 2], Cond(start=2 * i + 50), moved)
        moved.close(i)
    torch.testing.assert_close(cache.kept[0][0].k, moved.kept[0][0].k)


def test_the_past_cannot_see_the_future():
    model, other = small(), X.clone()
    other[:, :, 4:] += 1
    a, b = play(model, X, T, Cache()), play(model, other, T, Cache())
    assert torch.equal(a[:, :, :4], b[:, :, :4]) and not torch.equal(a[:, :, 4:], b[:, :, 4:])


def test_a_window_as_long_as_the_clip_is_full_and_a_shorter_one_is_not():
    model = small()
    full = play(model, X, T, Cache())
    assert torch.equal(play(model, X, T, Window(3)), full)
    short = play(model, X, T, Window(1))
    assert torch.equal(short[:, :, :4], full[:, :, :4]) and not torch.allclose(short[:, :, 4:], full[:, :, 4:], atol=1e-4)
    assert torch.equal(play(model, X, T, Window(1, sink=1)), full)  # block 0 is the sink, block 1 the window


def test_a_window_keeps_its_sink_and_its_last_blocks():
    cache = Window(2, sink=1)
    for i in range(6):
        cache.open(i, Cond())
        cache.add(0, torch.zeros(1, 1, 1, 4), torch.full((1, 1, 1, 4), float(i)), torch.zeros(1, 1, 1, 4), grid(1, 1, 1, i, 1))
        cache.close(i)
    assert [e.block for e in cache.kept[0]] == [0, 4, 5]
    cache.open(6, Cond())
    k, _, where = cache.read(0, torch.zeros(1, 1, 1, 4), grid(1, 1, 1))
    assert k[0, 0, :, 0].tolist() == [0, 4, 5] == where.coords[0, :, 0].tolist() == where.block[0].tolist()


def test_bytes_are_counted():
    model, cache = small(), Cache()
    play(model, X, T, cache)
    a_block = 2 * 2 * (2 * 16) * 32 * 4  # k and v, batch, 32 tokens of width 32, float32
    assert cache.nbytes == 2 * 3 * a_block and cache.tokens == 3 * 32
    assert cache.moved == 2 * (1 + 2) * a_block  # two layers; block 1 read one block, block 2 two
    cache.reset()
    assert cache.nbytes == cache.moved == cache.tokens == 0


def test_reading_writes_nothing_and_a_second_pass_replaces_the_first():
    model, cache = small(), Cache()
    cache.open(0, Cond())
    model(X[:, :, :2], T[:, :2], Cond(), cache)
    assert cache.nbytes == 0
    cache.writing = True
    for x in (X, 2 * X):
        model(x[:, :, :2], T[:, :2], Cond(), cache)
    assert len(cache.kept[0]) == 1
    again = cache.read(0, torch.zeros(1, 1, 1, 4), grid(1, 1, 1))
    assert again is None  # a block isn't its own past


def test_samples_do_not_touch_each_other():
    model = small()
    both, one = play(model, X, T, Cache()), play(model, X[:1], T[:1], Cache())
    torch.testing.assert_close(both[:1], one, atol=1e-5, rtol=1e-4)


def test_a_window_says_what_it_cannot_be():
    with pytest.raises(ValueError, match="last >= 1"):
        Window(0)


def test_places_may_differ_by_key_head():
    """What retrieval returns: two key heads that hold other tokens, for four query heads, beside the tokens of the call."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, m, 8, generator=g) for n, m in ((4, 3, ), (2, 5), (2, 5)))
    past = Where(torch.rand(2, 2, 2, 3, generator=g), torch.tensor([[[0, 9], [0, 0]]]).expand(2, -1, -1))
    own = grid(3, 1, 1, block=3)
    where = own.seen_from(past.join(own))
    m = visible(where)
    assert m.shape == (2, 2, 3, 5) and not m[:, 0, :, 1].any() and m[:, 1].all()
    o, a = dense(q, k, v, where), scores(q, k, where)
    torch.testing.assert_close(o, unfused(q, k, v, where))
    assert (a[:, :2, :, 1] == 0).all() and (a[:, 2:, :, 1] > 0).all()  # query heads 0 and 1 are served by key head 0
    axis, freq = torch.tensor([0, 1, 1, 2]), torch.rand(4)
    one = rotate(k[:, 1:], where.keys.coords[:, 1], axis, freq)
    torch.testing.assert_close(rotate(k, where.keys.coords, axis, freq)[:, 1:], one)
