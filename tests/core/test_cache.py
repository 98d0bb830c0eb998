"""The cache gives what computing everything again gives; it counts its bytes; the others keep or read what they say."""

import itertools

import pytest
import torch
from checks.contracts import play, small
from hypothesis import given
from hypothesis import strategies as st

from minivid.core.attention import dense, rotate, scores, unfused
from minivid.core.cache import Cache, Quest, Retrieve, Stride, Window, pick
from minivid.core.model import Cond
from minivid.core.where import Where, grid, visible

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


def test_a_window_says_what_it_cannot_be():
    with pytest.raises(ValueError, match="last >= 1"):
        Window(0)


kind = lambda cache: type(cache).__name__


@pytest.mark.parametrize("cache", [Stride(2), Retrieve(4, 16), Retrieve(99, 24), Quest(4, 16), Quest(2, 32)], ids=kind)
def test_reading_everything_is_the_full_cache(cache):
    model = small()
    torch.testing.assert_close(play(model, X, T, cache), play(model, X, T, Cache()), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("cache", [Stride(1), Retrieve(1, 16), Quest(1, 16)], ids=kind)
def test_reading_less_is_not_and_moves_less(cache):
    model, full = small(), Cache()
    out, whole = play(model, X, T, cache), play(model, X, T, full)
    assert not torch.allclose(out[:, :, 4:], whole[:, :, 4:], atol=1e-4)
    assert cache.moved < full.moved and cache.tokens == full.tokens and cache.nbytes >= full.nbytes


def filled(cache, n=10, heads=2, d=4, size=1, seed=0):
    """A cache of n blocks of `size` tokens: random keys; values and places that tell the number of the token."""
    g = torch.Generator().manual_seed(seed)
    for i in range(n):
        cache.open(i, Cond())
        number = torch.arange(i * size, (i + 1) * size).float()
        k, v = torch.randn(2, heads, size, d, generator=g), number[:, None].expand(2, heads, -1, d)
        cache.add(0, torch.zeros(2, heads, size, d), k, v, grid(size, 1, 1, i * size, 1))
        cache.close(i)
    cache.open(n, Cond())
    return cache


def test_a_stride_reads_as_many_blocks_spread_over_the_past():
    read = lambda n, of: filled(Stride(n), of).read(0, torch.zeros(2, 2, 1, 4), grid(1, 1, 1))[1][0, 0, :, 0].tolist()
    assert read(4, 10) == [0, 3, 6, 9] and read(3, 10) == [0, 5, 9] and read(1, 10) == [9] and read(5, 3) == [0, 1, 2]
    assert read(2, 100) == [0, 99]


def wanted(cache, q, n, page, worth):
    """The slow way: which tokens each key head of each sample gets, by `worth(query, keys of a page)`."""
    k = torch.cat([e.k for e in cache.kept[0]], 2)
    b, g, count, d = k.shape
    chosen = {}
    for i, h in itertools.product(range(b), range(g)):
        share = torch.zeros(count // page)
        for head, query in itertools.product(range(h * q.shape[1] // g, (h + 1) * q.shape[1] // g), range(q.shape[2])):
            marks = [worth(q[i, head, query], k[i, h, p * page : (p + 1) * page]) / d**0.5 for p in range(len(share))]
            share += torch.stack(marks).softmax(0)
        best = sorted(range(len(share)), key=lambda p: -share[p])[:n]
        chosen[i, h] = sorted(t for p in best for t in range(p * page, (p + 1) * page)) + [*range(count // page * page, count)]
    return chosen


mean_score = lambda q, keys: torch.stack([q @ key for key in keys]).mean()
bound = lambda q, keys: sum(max(q[c] * keys[:, c].min(), q[c] * keys[:, c].max()) for c in range(len(q)))


@pytest.mark.parametrize("size, page", [(1, 3), (5, 3), (2, 4)])
@pytest.mark.parametrize("kind, worth", [(Retrieve, mean_score), (Quest, bound)])
def test_retrieval_equals_a_slow_loop(kind, worth, size, page):
    """Pages run across blocks; what fills no page yet is always read; sets differ by sample and key head."""
    cache, q = filled(kind(2, page), 10, size=size), torch.randn(2, 4, 3, 4)
    k, v, where = cache.read(0, q, grid(3, 1, 1))
    want = wanted(cache, q, 2, page, worth)
    whole = torch.cat([e.k for e in cache.kept[0]], 2)
    for (i, h), tokens in want.items():
        assert v[i, h, :, 0].tolist() == tokens == where.coords[i, h, :, 0].tolist() == where.block[i, h].tolist()
        assert torch.equal(k[i, h], whole[i, h, tokens])
    assert len({tuple(t) for t in want.values()}) > 1


@given(st.integers(0, 10_000), st.integers(1, 9), st.floats(0, 3))
def test_the_bound_of_a_page_is_never_below_a_score(seed, page, shift):
    g = torch.Generator().manual_seed(seed)
    k, q = torch.randn(1, 2, 4 * page, 6, generator=g) + shift, 2 * torch.randn(1, 4, 3, 6, generator=g)
    pages = Quest.summary(k.unflatten(2, (4, page)))
    bounds, true = Quest.score(q, pages), (q @ k.repeat_interleave(2, 1).mT).unflatten(-1, (4, page))
    assert (bounds >= true.amax(-1) - 1e-4).all()
    if page == 1:
        torch.testing.assert_close(bounds, true[..., 0])
        torch.testing.assert_close(Retrieve.score(q, Retrieve.summary(k.unflatten(2, (4, 1)))), true[..., 0])


def test_retrieval_scores_are_those_of_the_attention():
    """Keys and queries come rotated, so a page of one key is worth what the attention gives it."""
    model, seen = small(), {}

    class Watch(Retrieve):
        def read(self, layer, q, where):
            seen["q"], seen["k"] = q, self.kept[layer][0].k if self.kept.get(layer) else None
            return super().read(layer, q, where)

    def plug(q, k, v, where):
        if k.shape[2] > q.shape[2]:  # there is a past
            torch.testing.assert_close(seen["q"], q)
            torch.testing.assert_close(seen["k"], k[:, :, : seen["k"].shape[2]])
        return dense(q, k, v, where)

    for block in model.trunk.blocks:
        block.attention.attend = plug
    play(model, X, T, Watch(99, 8))
    assert seen["k"].shape[2] == 64


@pytest.mark.parametrize("kind, of_a_page", [(Retrieve, 1), (Quest, 2)])
def test_retrieval_counts_what_it_holds_and_moves(kind, of_a_page):
    cache = filled(kind(2, 4), 9, heads=2, d=4, size=2)  # 18 tokens: 4 pages and 2 tokens
    token, pages = 2 * 2 * 4 * 4, 4 * of_a_page * 2 * 2 * 4 * 4  # batch, heads, width, float32
    assert cache.nbytes == 18 * 2 * token + pages and cache.moved == 0
    cache.read(0, torch.randn(2, 2, 1, 4), grid(1, 1, 1))
    assert cache.moved == (2 * 4 + 2) * 2 * token + pages
    cache.reset()
    assert cache.nbytes == cache.moved == cache.tokens == 0


def test_picked_tokens_carry_a_gradient_and_their_places():
    k, v = (torch.randn(2, 2, 5, 3, requires_grad=True) for _ in range(2))
    index = torch.tensor([[[0, 4], [1, 1]], [[3, 2], [0, 1]]])
    pk, pv, where = pick(k, v, Where(torch.arange(15.0).view(1, 5, 3)), index)
    assert torch.equal(pk[1, 0], k[1, 0, [3, 2]]) and torch.equal(pv[0, 1], v[0, 1, [1, 1]]) and where.block is None
    assert torch.equal(where.coords[0, 0], torch.arange(15.0).view(5, 3)[[0, 4]])
    pk.sum().backward()
    assert k.grad[0, 1, :, 0].tolist() == [0, 2, 0, 0, 0]


def test_the_others_say_what_they_cannot_be():
    with pytest.raises(ValueError, match="n >= 1"):
        Stride(0)
    for kind in (Retrieve, Quest):
        with pytest.raises(ValueError, match="n >= 1 pages of page >= 1 tokens"):
            kind(0, 4)


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
