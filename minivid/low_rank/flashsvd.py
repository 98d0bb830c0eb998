"""FlashSVD: keep thin projections at full length, and rebuild tiles of q, k, v and of the hidden layer only while they are used.

Paper:   FlashSVD: Memory-Efficient Inference with Streaming for Low-Rank Models (2025), arXiv 2508.01506
Kind:    surgery (a low-rank model in; the same function, run in less activation memory, out)
Equal:   the ordinary low-rank model, for all tiles, ranks and both variants; at full rank the dense model
Claim:   one block, 4,096 tokens: SVD alone leaves the peak of activation memory where it was; streaming takes 60 % off, is within
         15 % of the memory model, and at most 1.15 times ordinary chunking; variant 1 costs at most 1.05 times the FLOPs
Differs: loops of PyTorch in place of GPU kernels, so only memory and FLOPs can be reproduced, not speed; all heads of a tile at
         once; each factor carries the root of the singular values; attention to words isn't factored, but run by rows of
         tokens; gated feed-forwards are left out. A tile in which a row sees no key is guarded (the released kernel isn't)

A weight of rank R, W ~ U V, needs few numbers, but x -> x U -> (x U) V still writes the full-width result to memory. So here
only the thin strips P = x U exist for all M tokens. Whatever is wide is rebuilt from them in tiles and thrown away:

    attention, per block of BM queries     q = P_q V_q;  for each block of BN keys: k = P_k V_k, v = P_v V_v, online softmax
    feed-forward, variant 1                S += act(P V_1[:, slice] + b_1) U_2[slice],  then  y = S V_2 + b_2
                  variant 2                the same with the last product inside: S doesn't exist either, but all is done
                                           again for each tile of the output's columns

    numbers held at once, x and y included:  M (2 d + 3 H R),   M (2 d + R_1 + R_2),   M (2 d + R_1)

What is unusual: a tile is normalised, rotated to its absolute places, gated and added to x when it is rebuilt, so a whole
block runs without any full-length tensor but x, y and the strips.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from ..core.attention import dense
from ..core.baselines.lowrank import Factored, svd
from ..core.model import Block, Context
from ..core.surgery import swap
from ..core.where import Where, visible

Strip = Float[Tensor, "k b n r"]  # heads first: factors differ by head, not by sample
Tokens = Float[Tensor, "b n d"]
gelu = partial(F.gelu, approximate="tanh")  # the flavour that our blocks were trained with
Around = tuple[Callable, Callable]  # before(x, rows) -> what a branch gets; after(x, what it said, rows) -> the new x


@dataclass(frozen=True)
class Tiles:
    """How much is rebuilt at a time; a last tile may be smaller.

    rows: tokens (BM); keys (BN); rank: terms of a sum over ranks (BR); hidden: columns of the hidden layer;
    second: ranks of S in variant 1, None for all (BR2); out: columns of the output in variant 2 (BH)
    """

    rows: int = 64
    keys: int = 64
    rank: int = 32
    hidden: int = 64
    second: int | None = None
    out: int = 64

    def __post_init__(self):
        if min(self.rows, self.keys, self.rank, self.hidden, self.out, self.second or 1) < 1:
            raise ValueError(f"a tile holds at least 1 row, key, rank and column; got {self}")


def cut(n: int, size: int | None) -> list[slice]:
    """0 to n in pieces of `size`; the last may be shorter."""
    return [slice(i, min(i + (size or n), n)) for i in range(0, n, size or n or 1)]


def model_numbers(m: int, d: int, heads: int, rank: int, first: int, second: int, variant: int = 1) -> int:
    """The memory model: numbers held at once by a streamed block of m tokens, without tiles."""
    return m * (2 * d + max(3 * heads * rank, first + (second if variant == 1 else 0)))


# --- factors ------------------------------------------------------------------------------------------------------------


class PerHead(nn.Module):
    """A projection to heads, each factored by itself: head h says x u_h' v_h + bias_h. As a layer it is run the ordinary way.

    u `k r d`: to the thin strips;  v `k r e`: back to the width of a head;  bias `k e`
    """

    def __init__(self, u: Float[Tensor, "k r d"], v: Float[Tensor, "k r e"], bias: Float[Tensor, "k e"]):
        super().__init__()
        self.u, self.v, self.bias = (nn.Parameter(p.detach().clone()) for p in (u, v, bias))

    @classmethod
    def of(cls, w: Float[Tensor, "o d"], bias: Tensor | None, heads: int, rank: int, gram: Tensor | None = None) -> "PerHead":
        """The best of this rank for each head of a weight, in the norm of its outputs where X'X of its inputs is given."""
        a, b = svd(rearrange(w.detach(), "(k e) d -> k e d", k=heads), rank, gram)
        return cls(b, a.mT, torch.zeros_like(a[..., 0]) if bias is None else bias.view(heads, -1))

    def thin(self, x: Tokens) -> Strip:
        """P = x U for all heads."""
        return rearrange(F.linear(x, self.u.flatten(0, 1)), "b n (k r) -> k b n r", k=len(self.u))

    def rebuild(self, p: Strip, terms: int | None = None) -> Float[Tensor, "k b n e"]:
        """P V + bias, a few ranks at a time. V is never spread over the batch, which would copy it for each sample."""
        rows = p.flatten(1, 2)
        out = self.bias[:, None].repeat(1, rows.shape[1], 1)
        for r in cut(rows.shape[-1], terms):
            torch.baddbmm(out, rows[..., r], self.v[:, r], out=out)
        return out.unflatten(1, p.shape[1:3])

    def forward(self, x: Tokens) -> Float[Tensor, "b n o"]:
        return (torch.einsum("kbnr,kre->bnke", self.thin(x), self.v) + self.bias).flatten(2)


def blocks(model: nn.Module) -> list[tuple[str, Block]]:
    """The transformer blocks by name, in order."""
    return [(name, part) for name, part in model.named_modules() if isinstance(part, Block)]


def factorise(model: nn.Module, rank: int, wide: int, grams: dict[str, Tensor] | None = None) -> nn.Module:
    """The ordinary low-rank model: q, k, v of self-attention of rank R a head; o and both feed-forward layers of rank `wide`.

    grams: X'X of the inputs of some layers by name, for factors that are best for the layer's outputs
    """
    new: dict[str, nn.Module] = {}
    for name, block in blocks(model):
        layer, gram = block.attention, lambda part, name=name: (grams or {}).get(f"{name}.{part}")
        for part, linear, heads in zip("qkv", (layer.q, layer.k, layer.v), (layer.heads, *[layer.key_heads] * 2), strict=True):
            new[f"{name}.attention.{part}"] = PerHead.of(linear.weight, linear.bias, heads, rank, gram(f"attention.{part}"))
        for part in ("attention.o", "fc1", "fc2"):
            new[f"{name}.{part}"] = Factored.of(block.get_submodule(part), wide, gram(part))
    return swap(model, new)


# --- streaming attention --------------------------------------------------------------------------------------------------


def fold(m: Tensor, l: Tensor, acc: Tensor, s: Tensor, v: Tensor) -> None:
    """One more tile of scores s `b n k` and values v `b k e` into a softmax that is under way; m, l, acc change, s is used up.

    m, l `b n 1`: largest score so far (begin at -inf) and the sum of e^(s - m);  acc `b n e`: sum of e^(s - m) v
    """
    top = torch.maximum(m, s.amax(-1, keepdim=True))
    finite = top.clamp_min(torch.finfo(s.dtype).min)  # where nothing was seen yet: e^(-inf - finite) = 0, not e^(-inf + inf)
    shrink = m.sub_(finite).exp_()
    s.sub_(finite).exp_()
    l.mul_(shrink).add_(s.sum(-1, keepdim=True))
    torch.baddbmm(acc.mul_(shrink), s, v, out=acc)
    m.copy_(top)


def _as_it_is(x: Tensor, rows: slice) -> Tensor:
    return x


@torch.no_grad()
def attend(
    rows: slice, strips: list[Tensor], qkv: list[PerHead], tiles: Tiles, turn: Around = (_as_it_is, _as_it_is),
    bias: Callable | None = None,
) -> Float[Tensor, "b m o"]:  # fmt: skip
    """What some rows of tokens get from all, heads side by side: tiles of q, k, v come from the strips and go.

    turn: what is done to rebuilt queries and to keys `k b n e` of some rows (normalise, rotate to absolute places)
    bias: `(rows, keys) -> ` what is added to scores `k b m n`, -inf where a key is hidden
    """
    heads, b, n = strips[0].shape[:3]

    def tile(i: int, piece: slice) -> Tensor:
        x = qkv[i].rebuild(strips[i][:, :, piece], tiles.rank)
        x = turn[i > 0](x, piece) if i < 2 else x
        return (x if len(x) == heads else x.repeat_interleave(heads // len(x), 0)).flatten(0, 1)  # key heads may be shared

    def scores(keys: slice) -> Tensor:
        s = q @ tile(1, keys).mT
        if bias is not None:
            s.view(heads, b, *s.shape[1:]).add_(bias(rows, keys))
        return s

    q = tile(0, rows) * qkv[0].v.shape[-1] ** -0.5
    m, l = q.new_full((*q.shape[:2], 1), -torch.inf), q.new_zeros(*q.shape[:2], 1)
    acc = q.new_zeros(*q.shape[:2], qkv[2].v.shape[-1])
    for keys in cut(n, tiles.keys):
        fold(m, l, acc, scores(keys), tile(2, keys))  # no names: what is named lives one round longer
    o = acc.div_(l.clamp_min_(torch.finfo(l.dtype).tiny))  # a row that sees nothing says 0
    return rearrange(o, "(k b) m e -> b m (k e)", k=heads)


@torch.no_grad()
def attention(x: Tokens, qkv: list[PerHead], o: nn.Module, around: Around, tiles: Tiles, **how) -> Tokens:
    """A whole branch, after(x, o(attention(before(x)))). Of full length are x, three strips and the result. how: of `attend`."""
    (before, after), (b, n, _) = around, x.shape
    strips = [x.new_empty(len(part.u), b, n, part.u.shape[1]) for part in qkv]

    def fill(rows: slice, h: Tensor) -> None:  # a function, because a name in a loop outlives it
        for part, strip in zip(qkv, strips, strict=True):
            strip[:, :, rows] = part.thin(h)

    for rows in cut(n, tiles.rows):
        fill(rows, before(x[:, rows], rows))
    y = torch.empty_like(x)
    for rows in cut(n, tiles.rows):
        y[:, rows] = after(x[:, rows], o(attend(rows, strips, qkv, tiles, **how)), rows)
    return y


# --- streaming feed-forward -----------------------------------------------------------------------------------------------


def two_stage(p: Float[Tensor, "b n r"], fc1: Factored, fc2: Factored, act: Callable, tiles: Tiles) -> Float[Tensor, "b n s"]:
    """S = act(P V_1 + b_1) U_2 without the hidden layer, which is rebuilt once for each tile of S's ranks."""
    s = p.new_zeros(*p.shape[:2], fc2.rank)
    for rows, r, piece in product(cut(p.shape[1], tiles.rows), cut(fc2.rank, tiles.second), cut(len(fc1.a), tiles.hidden)):
        s[:, rows, r] += F.linear(hidden(p[:, rows], fc1, act, piece), fc2.b[r, piece])
    return s


def hidden(p: Float[Tensor, "b m r"], fc1: Factored, act: Callable, piece: slice) -> Float[Tensor, "b m h"]:
    """Some columns of the hidden layer."""
    return act(F.linear(p, fc1.a[piece], None if fc1.bias is None else fc1.bias[piece]))


def fused(p: Float[Tensor, "b m r"], fc1: Factored, fc2: Factored, act: Callable, tiles: Tiles) -> Float[Tensor, "b m o"]:
    """All of the feed-forward for some rows; S and the hidden layer are made again for each tile of output columns."""
    out = p.new_empty(*p.shape[:2], len(fc2.a))
    for columns in cut(out.shape[-1], tiles.out):
        s = sum(F.linear(hidden(p, fc1, act, piece), fc2.b[:, piece]) for piece in cut(len(fc1.a), tiles.hidden))
        out[..., columns] = F.linear(s, fc2.a[columns], None if fc2.bias is None else fc2.bias[columns])
    return out


@torch.no_grad()
def feed_(x: Tokens, fc1: Factored, fc2: Factored, act: Callable, around: Around, tiles: Tiles, variant: int = 1) -> None:
    """A whole branch written over x: x = after(x, fc2(act(fc1(before(x))))), by variant 1 or 2."""
    if variant not in (1, 2):
        raise ValueError(f"the feed-forward has variants 1 (two stages) and 2 (fused), got {variant}")
    before, after = around
    p = x.new_empty(*x.shape[:2], fc1.rank)
    for rows in cut(x.shape[1], tiles.rows):
        p[:, rows] = F.linear(before(x[:, rows], rows), fc1.b)
    s = two_stage(p, fc1, fc2, act, tiles) if variant == 1 else None
    y = lambda rows: fused(p[:, rows], fc1, fc2, act, tiles) if s is None else F.linear(s[:, rows], fc2.a, fc2.bias)
    for rows in cut(x.shape[1], tiles.rows):
        x[:, rows] = after(x[:, rows], y(rows), rows)


# --- blocks ---------------------------------------------------------------------------------------------------------------


def modulated(m: Float[Tensor, "3 b f d"], n: int) -> Around:
    """adaLN around a branch, for some rows of n tokens: m holds shift, scale and gate of every frame."""
    own = lambda part, rows: part[:, torch.arange(rows.start, rows.stop, device=m.device) * m.shape[2] // n]
    before = lambda x, rows: F.layer_norm(x, x.shape[-1:]) * (1 + own(m[1], rows)) + own(m[0], rows)
    return before, lambda x, said, rows: x + said * own(m[2], rows)


def words_(x: Tokens, block: Block, ctx: Context, rows: int) -> None:
    """Attention to the caption's words, added to x by rows of tokens; s captions serve s equal chunks of the tokens."""
    if block.cross is None or ctx.text is None:
        return
    for i, chunk in enumerate(x.chunk(ctx.text.shape[1], 1)):
        own = replace(ctx, text=ctx.text[:, [i]], text_mask=ctx.text_mask[:, [i]])
        for part in chunk.split(rows, 1):
            part += block.cross(block.cross_norm(part), own)


def only_tokens(block: Block, ctx: Context) -> Where:
    """The places of a call that is attention among its own tokens. Raises ValueError for another."""
    if ctx.cache is not None or ctx.where.keys is not None or block.attention.attend is not dense:
        raise ValueError("tiles are rebuilt from this call's own tokens: run it densely, without a cache and without other keys")
    return ctx.where


class Streamed(nn.Module):
    """A low-rank block of ours that streams, `block(x, ctx)`; for inference."""

    def __init__(self, block: Block, tiles: Tiles = Tiles(), variant: int = 1):
        super().__init__()
        if (type(block.attention.q), type(block.fc1)) != (PerHead, Factored):
            raise ValueError("only a low-rank block can be streamed: call factorise(model, rank, wide) first")
        self.block, self.tiles, self.variant = block, tiles, variant

    @torch.no_grad()
    def forward(self, x: Tokens, ctx: Context) -> Tokens:
        block, layer, where, m = self.block, self.block.attention, only_tokens(self.block, ctx), self.block.modulation(ctx)
        part = lambda rows: Where(where.coords[..., rows, :], None if where.block is None else where.block[..., rows])
        turned = lambda x, rows: layer.turned(x.transpose(0, 1), part(rows)).transpose(0, 1)
        scale = (layer.q.v.shape[-1] / layer.width) ** 0.5  # heads that were narrowed keep the scale of their softmax
        turn = (lambda x, rows: scale * turned(x, rows)), turned

        def bias(rows: slice, keys: slice) -> Tensor:
            seen = visible(part(rows).seen_from(part(keys)))
            return torch.zeros(seen.shape, dtype=x.dtype, device=x.device).masked_fill_(~seen, -torch.inf)

        qkv, bias = [layer.q, layer.k, layer.v], None if where.block is None else bias
        x = attention(x, qkv, layer.o, modulated(m[:3], x.shape[1]), self.tiles, turn=turn, bias=bias)
        words_(x, block, ctx, self.tiles.rows)
        feed_(x, block.fc1, block.fc2, gelu, modulated(m[3:], x.shape[1]), self.tiles, self.variant)
        return x


class StreamedLayer(nn.Module):
    """PyTorch's own nn.TransformerEncoderLayer (BERT's block), factored and streamed; for inference."""

    def __init__(self, layer: nn.TransformerEncoderLayer, rank: int, wide: int, tiles: Tiles = Tiles(), variant: int = 1):
        super().__init__()
        fused = layer.self_attn
        if not fused.batch_first or fused.in_proj_weight is None or fused.in_proj_bias is None:
            raise ValueError("the layer must be made with batch_first=True and biases, its queries, keys and values of one width")
        three = zip(fused.in_proj_weight.chunk(3), fused.in_proj_bias.chunk(3), strict=True)
        self.qkv = nn.ModuleList(PerHead.of(w, bias, fused.num_heads, rank) for w, bias in three)
        self.o, self.fc1, self.fc2 = (Factored.of(x, wide) for x in (fused.out_proj, layer.linear1, layer.linear2))
        self.norms, self.act, self.first = nn.ModuleList([layer.norm1, layer.norm2]), layer.activation, layer.norm_first
        self.tiles, self.variant = tiles, variant
        self.self_attn = SimpleNamespace(batch_first=True)  # nn.TransformerEncoder asks its first layer for it

    @torch.no_grad()
    def forward(self, src: Tokens, src_mask=None, src_key_padding_mask=None, is_causal=False) -> Tokens:
        if src_mask is not None and src_mask.ndim != 2:
            raise ValueError(f"a mask is one of tokens by tokens for all heads, got shape {tuple(src_mask.shape)}")

        def bias(rows: slice, keys: slice) -> Tensor:
            some = [] if src_mask is None else [src_mask[rows, keys]]
            some += [] if src_key_padding_mask is None else [src_key_padding_mask[:, None, keys]]
            added = (m if m.is_floating_point() else src.new_zeros(m.shape).masked_fill_(m, -torch.inf) for m in some)
            return sum(added, src.new_zeros(()))

        first, second = (
            ((lambda x, rows, norm=norm: norm(x)), (lambda x, said, rows: x + said)) if self.first
            else (_as_it_is, (lambda x, said, rows, norm=norm: norm(x + said))) for norm in self.norms
        )  # fmt: skip
        masked = src_mask is not None or src_key_padding_mask is not None
        x = attention(src, list(self.qkv), self.o, first, self.tiles, bias=bias if masked else None)
        feed_(x, self.fc1, self.fc2, self.act, second, self.tiles, self.variant)
        return x


def each_block(model: nn.Module, how: Callable[[Block], nn.Module]) -> nn.Module:
    """The model with `how(block)` for each block: `each_block(low, Streamed)`. It shares all weights with `model`."""
    return swap(model, {name: how(block) for name, block in blocks(model)})
