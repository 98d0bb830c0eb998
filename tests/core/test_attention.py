"""Attention: the fused product is the written-out one, positions are relative, the visibility rule is the slow loop."""

import copy
import itertools

import pytest
import torch

from minivid.core.attention import Attention, dense, rotary_pairs, rotate, scores, unfused
from minivid.core.cache import Cache
from minivid.core.model import Cond
from minivid.core.surgery import swap
from minivid.core.where import Where, grid, visible


def heads(b=2, k=4, n=12, d=8, g=None, seed=0):
    dice = torch.Generator().manual_seed(seed)
    draw = lambda heads: torch.randn(b, heads, n, d, generator=dice)
    return draw(k), draw(g or k), draw(g or k)


PLACES = {"all": grid(3, 2, 2), "by frame": grid(3, 2, 2, block=1), "pairs of frames": grid(3, 2, 2, block=2)}


@pytest.mark.parametrize("where", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("g", [4, 2, 1])
def test_dense_equals_a_slow_loop(where, g):
    q, k, v = heads(g=g)
    block = where.block[0] if where.block is not None else torch.zeros(12)
    o = torch.zeros_like(q)
    for b, h, i in itertools.product(range(2), range(4), range(12)):
        seen = [j for j in range(12) if block[j] <= block[i]]
        share = torch.stack([q[b, h, i] @ k[b, h * g // 4, j] / 8**0.5 for j in seen]).softmax(0)
        o[b, h, i] = sum(s * v[b, h * g // 4, j] for s, j in zip(share, seen, strict=True))
    for plug in (dense, unfused):
        torch.testing.assert_close(plug(q, k, v, where), o, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scores(q, k, where).sum(-1), torch.ones(2, 4, 12))


def test_unfused_has_a_second_derivative():
    q, k, v = (x.requires_grad_(True) for x in heads(1, 1, 4, 4))
    (g,) = torch.autograd.grad(unfused(q, k, v, grid(1, 2, 2)).square().sum(), q, create_graph=True)
    assert torch.autograd.grad(g.square().sum(), q)[0].abs().sum() > 0


def test_rotary_scores_depend_on_differences_only():
    axis, freq = rotary_pairs(32)
    q, k, _ = heads(1, 2, 12, 32)
    at = grid(3, 2, 2).coords
    moved = at + torch.tensor([5.0, -2.0, 7.5])
    turned = lambda x, c: rotate(x, c, axis, freq)
    torch.testing.assert_close(
        turned(q, at) @ turned(k, at).mT, turned(q, moved) @ turned(k, moved).mT, atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(turned(q, at).norm(dim=-1), q.norm(dim=-1))
    assert sorted(set(axis.tolist())) == [0, 1, 2] and len(axis) == 16


def test_visibility_rule():
    assert visible(grid(2, 2, 2)) is None
    m = visible(grid(4, 1, 2, block=2))[0]
    assert m.tolist() == [[True] * 4 + [False] * 4] * 4 + [[True] * 8] * 4
    causal = Where(torch.zeros(1, 5, 3), torch.arange(5)[None])
    assert torch.equal(visible(causal)[0], torch.ones(5, 5).tril().bool())
    condition = Where(torch.zeros(1, 3, 3), torch.tensor([[-1, 0, 99]]))  # a condition, a token, padding
    assert visible(condition)[0].tolist() == [[True, False, False], [True, True, False], [True, True, True]]


def test_where_may_differ_by_head_and_keys_may_stand_elsewhere():
    q, k, v = heads(k=2)
    per_head = torch.stack([torch.zeros(12).long(), torch.arange(12)])[None]
    o = dense(q, k, v, Where(torch.zeros(1, 12, 3), per_head))
    for h, block in enumerate((None, torch.arange(12)[None])):
        alone = dense(q[:, h : h + 1], k[:, h : h + 1], v[:, h : h + 1], Where(torch.zeros(1, 12, 3), block))
        torch.testing.assert_close(o[:, h : h + 1], alone)
    early, late = grid(1, 2, 2, block=1), grid(2, 2, 2, start=1, block=1)
    joined = visible(late.seen_from(early.join(late)))
    assert torch.equal(joined, visible(grid(3, 2, 2, block=1))[:, 4:])


def test_batch_independence_and_dtype():
    torch.manual_seed(0)
    layer, x = Attention(32, 4, 2), torch.randn(3, 12, 32)
    y = layer(x, grid(3, 2, 2))
    torch.testing.assert_close(layer(x[1:2], grid(3, 2, 2)), y[1:2], atol=1e-5, rtol=1e-5)
    assert layer.double()(x.double(), grid(3, 2, 2)).dtype == torch.float64


def narrowed(layer: Attention, pairs: torch.Tensor) -> Attention:
    """What surgery does: only these rotary pairs of each key head stay (pair i is columns i and i + width/2)."""
    g, kept = pairs.shape
    group, half = layer.heads // g, layer.width // 2
    columns = torch.cat([pairs, pairs + half], 1) + layer.width * torch.arange(g)[:, None]
    own = (pairs.repeat_interleave(group, 0), layer.width * torch.arange(layer.heads)[:, None])
    rows = {"q": torch.cat([own[0], own[0] + half], 1) + own[1], "k": columns}
    new = {}
    for name, index in rows.items():
        old, index = getattr(layer, name), index.flatten()
        new[name] = torch.nn.Linear(old.in_features, len(index))
        new[name].weight.data, new[name].bias.data = old.weight.data[index], old.bias.data[index]
    small = swap(layer, new)
    small.axis, small.freq = layer.axis[pairs], layer.freq[pairs]
    return small


@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("cached", [False, True])
def test_a_narrowed_head_is_the_full_one_with_its_other_pairs_at_zero(key_heads, cached):
    """Every key head keeps pairs of its own, at their own frequencies, and the scale of the softmax stays the original one."""
    layer, x = Attention(64, 4, key_heads), torch.randn(2, 12, 64)
    pairs = torch.stack([torch.randperm(8)[:3] for _ in range(key_heads)])
    small = narrowed(layer, pairs)
    gone = torch.ones(key_heads, 8).scatter_(1, pairs, 0).bool().repeat(1, 2).flatten()
    closed = swap(layer, {"k": copy.deepcopy(layer.k)})
    closed.k.weight.data[gone], closed.k.bias.data[gone] = 0, 0
    outputs = []
    for each in (small, closed):
        cache = None
        if cached:
            cache = Cache()
            cache.open(0, Cond())
            cache.writing = True
            each(x.flip(1), grid(3, 2, 2, 5), cache)
            cache.close(0)
            cache.open(1, Cond())
        outputs.append(each(x, grid(3, 2, 2), cache))
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-4)
    assert small.q.weight.shape == (24, 64) and small.k.weight.shape == (6 * key_heads, 64)
    assert layer.q.weight.shape == (64, 64) and layer.axis.shape == (8,)  # the original is untouched


def test_all_pairs_kept_is_the_layer_itself():
    layer, x = Attention(32, 2), torch.randn(2, 12, 32)
    assert torch.equal(narrowed(layer, torch.arange(8).expand(2, 8))(x, grid(3, 2, 2)), layer(x, grid(3, 2, 2)))


def test_values_may_have_a_width_of_their_own():
    """v and o of rank r: the low-rank product in place of the full one (its bias goes where attention rows sum to 1)."""
    layer, x = Attention(32, 2), torch.randn(2, 12, 32)
    v, o = layer.v.weight.data.view(2, 16, 32), layer.o.weight.data.view(32, 2, 16)
    small = swap(layer, {"v": torch.nn.Linear(32, 2 * 5), "o": torch.nn.Linear(2 * 5, 32)})
    low = copy.deepcopy(layer)
    for h in range(2):
        u, s, w = torch.linalg.svd(o[:, h] @ v[h])
        small.v.weight.data[5 * h : 5 * h + 5], small.o.weight.data[:, 5 * h : 5 * h + 5] = w[:5], u[:, :5] * s[:5]
        low.v.weight.data[16 * h : 16 * h + 16] = torch.linalg.pinv(o[:, h]) @ (u[:, :5] * s[:5]) @ w[:5]
    small.v.bias.data.zero_(), low.v.bias.data.zero_()
    small.o.bias.data = low.o.bias.data
    torch.testing.assert_close(small(x, grid(3, 2, 2)), low(x, grid(3, 2, 2)), atol=1e-4, rtol=1e-4)


def test_rotary_pairs_may_differ_by_head():
    q, _, _ = heads(2, 3, 12, 8)
    axis, freq, at = torch.randint(0, 3, (3, 4)), torch.rand(3, 4), torch.rand(2, 3, 12, 3)
    turned, shared = rotate(q, at, axis, freq), rotate(q, at[:, 0], axis, freq)
    for h in range(3):
        torch.testing.assert_close(turned[:, h : h + 1], rotate(q[:, h : h + 1], at[:, h], axis[h], freq[h]))
        torch.testing.assert_close(shared[:, h : h + 1], rotate(q[:, h : h + 1], at[:, 0], axis[h], freq[h]))


def test_bad_widths():
    with pytest.raises(ValueError, match="30 must divide into 4 heads"):
        Attention(30, 4)
