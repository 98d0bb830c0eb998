"""Attention: who reads what from whom.

An attention is a callable `(q, k, v, where) -> o` on heads `b k n d`; `dense` is the default and everything else (sparse
patterns, retrieval, linear attention) is swapped in for it. What is unusual here: positions are rotary only and come from
`where`, so one set of weights runs on any grid; and keys are rotated *after* a cache was read, so a cache may reorder them.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from .where import Where, visible


def _mask(where: Where, heads: int) -> Tensor | None:
    """The visibility mask `b k n m` (or with 1 for k, which broadcasts) of `heads` query heads."""
    m = visible(where)
    if m is None or m.ndim == 3:
        return None if m is None else m[:, None]
    return m if m.shape[1] in (1, heads) else m.repeat_interleave(heads // m.shape[1], 1)


def grouped(q: Tensor, k: Tensor) -> Tensor:
    """Grouped heads: every key head serves q heads / k heads query heads."""
    return k if k.shape[1] == q.shape[1] else k.repeat_interleave(q.shape[1] // k.shape[1], 1)


def dense(
    q: Float[Tensor, "b k n d"], k: Float[Tensor, "b g m d"], v: Float[Tensor, "b g m e"], where: Where
) -> Float[Tensor, "b k n e"]:
    """softmax(q k' / sqrt d) v over the visible keys, by PyTorch's fused kernel. `g` key heads may serve `k` query heads."""
    return F.scaled_dot_product_attention(q, grouped(q, k), grouped(q, v), attn_mask=_mask(where, q.shape[1]))


def scores(
    q: Float[Tensor, "b k n d"], k: Float[Tensor, "b g m d"], where: Where
) -> Float[Tensor, "b k n m"]:
    """The attention map itself: row i says what share of its output token i takes from every key."""
    s = torch.einsum("bknd,bkmd->bknm", q, grouped(q, k)) * q.shape[-1] ** -0.5
    m = _mask(where, q.shape[1])
    return (s if m is None else s.masked_fill(~m, -torch.inf)).softmax(-1)


def unfused(
    q: Float[Tensor, "b k n d"], k: Float[Tensor, "b g m d"], v: Float[Tensor, "b g m e"], where: Where
) -> Float[Tensor, "b k n e"]:
    """`dense` written out: for showing maps, and for second derivatives, which the fused kernel doesn't have."""
    return scores(q, k, where) @ grouped(q, v)


def rotate(x: Float[Tensor, "b k n d"], coords: Tensor, axis: Tensor, freq: Tensor) -> Float[Tensor, "b k n d"]:
    """Rotary positions: pair i of the head turns by freq[i] * coordinate[axis[i]], so q.k depends on differences only.

    coords `b n 3` or `b k n 3`; axis, freq `d/2`, or `k d/2` where heads kept different pairs. Pair i is (x[i], x[i + d/2]).
    """
    coords = coords if coords.ndim == 4 else coords[:, None]
    if axis.ndim == 1:
        angle = coords[..., axis] * freq
    else:
        lead = (len(coords), len(axis), coords.shape[2])
        angle = coords.expand(*lead, 3).gather(-1, axis[None, :, None].expand(*lead, -1)) * freq[:, None]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def rotary_pairs(d: int, base: float = 100.0) -> tuple[Tensor, Tensor]:
    """Which coordinate (0 frame, 1 row, 2 column) each of the d/2 pairs reads, and its frequency.

    A quarter of the pairs reads frames, the rest is shared by rows and columns. base 100 because our grids have at most
    a few hundred places: the slowest pair should still turn visibly across them.
    """
    n = d // 2
    counts = (n - 2 * (3 * n // 8), 3 * n // 8, 3 * n // 8)
    axis = torch.cat([torch.full((m,), i) for i, m in enumerate(counts)])
    freq = torch.cat([base ** (-torch.arange(m) / m) for m in counts])
    return axis, freq


class Attention(nn.Module):
    """Self-attention over the tokens of one call and, where there is a cache, over what it holds.

    q, k, v, o are four plain linear layers, and surgery may narrow them: the widths of the q-k heads and of the v-o heads are
    what the layers say; `axis`, `freq` are the rotary pairs, `p` for all heads or `g p` for each key head; `width` is the head
    width that belongs to the scale of the softmax, and narrowing leaves it as it was.
    """

    def __init__(self, d: int, heads: int, key_heads: int | None = None, attend=dense):
        super().__init__()
        if d % heads or heads % (key_heads or heads):
            raise ValueError(f"width {d} must divide into {heads} heads, and these by {key_heads} key heads")
        width, key_heads = d // heads, key_heads or heads
        self.heads, self.key_heads, self.attend, self.layer, self.width = heads, key_heads, attend, 0, width
        self.q, self.o = nn.Linear(d, d), nn.Linear(d, d)
        self.k, self.v = nn.Linear(d, width * key_heads), nn.Linear(d, width * key_heads)
        axis, freq = rotary_pairs(width)
        self.register_buffer("axis", axis, persistent=False)
        self.register_buffer("freq", freq, persistent=False)

    def forward(self, x: Float[Tensor, "b n d"], where: Where, cache=None) -> Float[Tensor, "b n d"]:
        q = rearrange(self.q(x), "b n (k d) -> b k n d", k=self.heads)
        k = rearrange(self.k(x), "b n (k d) -> b k n d", k=self.key_heads)
        v = rearrange(self.v(x), "b n (k d) -> b k n d", k=self.key_heads)
        if q.shape[-1] != self.width:  # `attend` divides by the root of the width that it sees
            q = q * (q.shape[-1] / self.width) ** 0.5
        early = cache is None or cache.rotated
        if early:
            q, k = self.turned(q, where), self.turned(k, where)
        if cache is not None:
            k, v, keys = cache.through(self.layer, q, k, v, where)
            if not early:
                q, k = self.turned(q, where), self.turned(k, keys)
            where = where.seen_from(keys)
        return self.o(rearrange(self.attend(q, k, v, where), "b k n d -> b n (k d)"))

    def turned(self, x, where):
        """Queries or keys at their places."""
        own = lambda pairs: pairs if pairs.ndim == 1 else pairs.repeat_interleave(x.shape[1] // len(pairs), 0)
        return rotate(x, where.coords, own(self.axis), own(self.freq))
