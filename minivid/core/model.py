"""The video transformer: inlet -> trunk(tokens, ctx) -> head, called as `model(x, t, cond, cache=None)`.

What is unusual here: nothing is ever added to that signature. Whatever a paper conditions on travels in `Cond`; how it
enters is a part of the inlet; what every block needs to know (time modulation, text, places, cache) travels in `Context`;
guidance is a wrapper that is itself a model. Time is per frame, modulation is one linear layer shared by all blocks plus a
small table in each (Chen et al. 2023, PixArt-alpha, arXiv 2310.00426, section 2.3), positions are rotary only.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from .attention import Attention
from .text import NULL, PAD, TextEncoder
from .where import Where, grid


@dataclass(frozen=True)
class Cond:
    """What a model is told beside the noisy clip; every field may be missing.

    text:    word numbers `b l`, or `b s l`: one caption for each of s equal chunks of the frames
    known:   known pixels or latents, in the shape of x
    given:   mask `b 1 f h w` in [0, 1], 1 where `known` is to be believed
    vector:  further numbers `b d` (class, speed, size)
    streams: further token streams by name
    start:   frame number (in latent frames) at which x begins; a later block of a rollout doesn't begin at 0
    """

    text: Tensor | None = None
    known: Tensor | None = None
    given: Tensor | None = None
    vector: Tensor | None = None
    streams: dict[str, Tensor] = field(default_factory=dict)
    start: float | int = 0.0

    def null(self) -> "Cond":
        """The same with an empty caption: the other side of guidance."""
        if self.text is None:
            return self
        empty = torch.full_like(self.text, PAD)
        empty[..., 0] = NULL
        return replace(self, text=empty)

    def drop(self, gone: Tensor) -> "Cond":
        """The captions of the samples where `gone` (`b` booleans) is true are emptied: text dropout in training."""
        if self.text is None:
            return self
        gone = gone.view(-1, *[1] * (self.text.ndim - 1))
        return replace(self, text=torch.where(gone, self.null().text, self.text))

    def at(self, block: int, start: float | int) -> "Cond":
        """The condition of one block of a rollout: its own caption where there is one a chunk, and where it begins."""
        text = self.text[:, min(block, self.text.shape[1] - 1)] if self.text is not None and self.text.ndim == 3 else self.text
        return replace(self, text=text, start=start)

    def twice(self, other: "Cond") -> "Cond":
        """This condition and `other` as one batch of twice the size."""
        both = lambda a, b: None if a is None else torch.cat([a, b])
        names = ("text", "known", "given", "vector")
        return replace(
            self, **{n: both(getattr(self, n), getattr(other, n)) for n in names},
            streams={n: torch.cat([v, other.streams[n]]) for n, v in self.streams.items()},
        )


@dataclass
class Context:
    """What every block is told: modulation `b f m` by frame, words `b s l d` with their mask, places, cache."""

    where: Where
    mod: Tensor | None = None
    text: Tensor | None = None
    text_mask: Tensor | None = None
    cache: object | None = None
    cond: Cond | None = None


class Patch(nn.Module):
    """The plain inlet: p x p patches of x become tokens, places are the grid's. block: latent frames a block (block-causal)."""

    def __init__(self, channels: int, d: int, p: int = 2, block: int | None = None):
        super().__init__()
        self.channels, self.p, self.block = channels, p, block
        self.project = nn.Linear(channels * p * p, d)

    def forward(self, x, t, cond):
        if x.ndim != 5 or x.shape[1] != self.channels or x.shape[3] % self.p or x.shape[4] % self.p:
            raise ValueError(
                f"this model takes 'b {self.channels} f h w', rows and columns divisible by {self.p}, got {tuple(x.shape)}"
            )
        where = grid(x.shape[2], x.shape[3] // self.p, x.shape[4] // self.p, cond.start, self.block, x.device)
        return self.project(rearrange(x, "b c f (h p) (w q) -> b (f h w) (c p q)", p=self.p, q=self.p)), where, t


class TimeEmbedding(nn.Module):
    """Times `b f` in [0, 1] -> vectors `b f d`: sines and cosines of 1000 t at d frequencies, then two linear layers."""

    def __init__(self, d: int, waves: int = 128):
        super().__init__()
        self.register_buffer("freq", 1000 * 10000 ** (-torch.arange(waves // 2) / (waves // 2)), persistent=False)
        self.fc1, self.fc2 = nn.Linear(waves, d), nn.Linear(d, d)

    def forward(self, t):
        angle = t[..., None] * self.freq
        return self.fc2(F.silu(self.fc1(torch.cat([angle.cos(), angle.sin()], -1))))


class Cross(nn.Module):
    """Attention from video tokens to the caption's words; s captions serve s equal chunks of the tokens."""

    def __init__(self, d: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(d, d) for _ in range(4))

    def forward(self, x, ctx):
        b, s, l, _ = ctx.text.shape
        split = lambda y, n: rearrange(y, "b (s n) (k d) -> (b s) k n d", s=n, k=self.heads)
        text = ctx.text.reshape(b, s * l, -1)
        o = F.scaled_dot_product_attention(
            split(self.q(x), s), split(self.k(text), s), split(self.v(text), s),
            attn_mask=ctx.text_mask.view(b * s, 1, 1, l),
        )
        return self.o(rearrange(o, "(b s) k n d -> b (s n) (k d)", b=b))


class Block(nn.Module):
    """`block(x, ctx)`: self-attention, attention to words, feed-forward; the first and last modulated by time (adaLN).

    The gate of a modulated branch starts at 0 (Peebles & Xie 2023, adaLN-Zero): the network begins as the identity.
    """

    def __init__(self, d: int, heads: int, key_heads: int | None = None, ratio: int = 3, text: bool = True):
        super().__init__()
        self.attention = Attention(d, heads, key_heads)
        self.cross = Cross(d, heads) if text else None
        self.cross_norm = nn.LayerNorm(d) if text else None
        self.fc1, self.fc2 = nn.Linear(d, ratio * d), nn.Linear(ratio * d, d)
        self.table = nn.Parameter(torch.zeros(6, d))

    def forward(self, x: Float[Tensor, "b n d"], ctx: Context) -> Float[Tensor, "b n d"]:
        m = self.modulation(ctx)
        x = x + self.gated(self.attention(self.modulated(x, m[0], m[1]), ctx.where, ctx.cache), m[2])
        if self.cross is not None and ctx.text is not None:
            x = x + self.cross(self.cross_norm(x), ctx)
        return x + self.gated(self.feed(self.modulated(x, m[3], m[4])), m[5])

    def feed(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))

    def modulation(self, ctx):
        """Six vectors `b f d`: shift, scale, gate of the attention, then of the feed-forward."""
        table = self.table[:, None, None]
        return table if ctx.mod is None else rearrange(ctx.mod, "b f (m d) -> m b f d", m=6) + table

    @staticmethod
    def modulated(x, shift, scale):
        y = F.layer_norm(x, x.shape[-1:])
        f = shift.shape[1]
        y = rearrange(y, "b (f p) d -> b f p d", f=f) * (1 + scale[:, :, None]) + shift[:, :, None]
        return rearrange(y, "b f p d -> b (f p) d")

    @staticmethod
    def gated(y, gate):
        f = gate.shape[1]
        return rearrange(rearrange(y, "b (f p) d -> b f p d", f=f) * gate[:, :, None], "b f p d -> b (f p) d")


class Trunk(nn.Module):
    """The blocks, one after the other. `trunk(tokens, ctx) -> tokens`."""

    def __init__(self, d: int, depth: int, heads: int, key_heads: int | None = None, ratio: int = 3, text: bool = True):
        super().__init__()
        self.blocks = nn.ModuleList(Block(d, heads, key_heads, ratio, text) for _ in range(depth))
        for i, block in enumerate(self.blocks):
            block.attention.layer = i  # the name under which a cache keeps this layer's keys

    def forward(self, x, ctx):
        for block in self.blocks:
            x = block(x, ctx)
        return x


class Unpatch(nn.Module):
    """The plain head: a time-modulated norm, then each token says its p x p patch of the output. Starts at 0."""

    def __init__(self, d: int, channels: int, p: int = 2):
        super().__init__()
        self.p = p
        self.mod, self.project = nn.Linear(d, 2 * d), nn.Linear(d, channels * p * p)
        for layer in (self.mod, self.project):
            nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)

    def forward(self, x, time, ctx):
        shift, scale = self.mod(F.silu(time)).chunk(2, -1)
        f, h, w = ctx.where.grid
        y = self.project(Block.modulated(x, shift, scale))
        return rearrange(y, "b (f h w) (c p q) -> b c f (h p) (w q)", f=f, h=h, p=self.p, q=self.p)


class VideoModel(nn.Module):
    """`model(x, t, cond, cache=None) -> out`, all of them `b c f h w`; t is `b f`, or `b` for one time a clip.

    channels, patch: of the latent and of the patches that become tokens
    d, depth, heads: width, blocks, attention heads
    block:           latent frames a block of the visibility rule; None is full bidirectional attention
    """

    def __init__(self, channels: int, d: int = 128, depth: int = 6, heads: int = 4, patch: int = 2, block: int | None = None):
        super().__init__()
        self.channels, self.block = channels, block
        self.inlet = Patch(channels, d, patch, block)
        self.text, self.time = TextEncoder(d), TimeEmbedding(d)
        self.mod = nn.Linear(d, 6 * d)
        nn.init.zeros_(self.mod.weight), nn.init.zeros_(self.mod.bias)
        self.trunk, self.head = Trunk(d, depth, heads), Unpatch(d, channels, patch)

    def forward(self, x: Float[Tensor, "b c f h w"], t: Tensor, cond: Cond, cache=None) -> Float[Tensor, "b c f h w"]:
        t = times(t, x)
        tokens, where, t = self.inlet(x, t, cond)
        time = self.time(t)
        ctx = Context(where, self.mod(F.silu(time)), *words(self.text, cond), cache, cond)
        return self.head(self.trunk(tokens, ctx), time, ctx)


def times(t: Tensor, x: Tensor) -> Float[Tensor, "b f"]:
    """Times as `b f`; raises where they fit neither `b` nor `b f`, or leave [0, 1]."""
    t = t[:, None].expand(-1, x.shape[2]) if t.ndim == 1 else t
    if t.shape != (x.shape[0], x.shape[2]):
        raise ValueError(f"times are 'b' or 'b f' = {(x.shape[0], x.shape[2])} in [0, 1], got shape {tuple(t.shape)}")
    return t


def words(encoder: TextEncoder, cond: Cond) -> tuple[Tensor | None, Tensor | None]:
    """The caption's words as vectors `b s l d` and the mask `b s l` of those that are there."""
    if cond.text is None:
        return None, None
    text = cond.text if cond.text.ndim == 3 else cond.text[:, None]
    vectors = encoder(rearrange(text, "b s l -> (b s) l"))
    return rearrange(vectors, "(b s) l d -> b s l d", b=text.shape[0]), text != PAD


class Guided(nn.Module):
    """Classifier-free guidance (Ho & Salimans 2022): out = null + scale (told - null). A model like any other.

    scale:   1 is the model itself, at its own cost
    null:    `cond -> cond`, what the other side is told: an empty caption, a negative one, no given frames either
    rescale: share of `out` that is brought back to the spread of `told` in each sample, against over-exposure
             (Lin et al. 2024, arXiv 2305.08891, eq. 15-16; they take 0.7)
    """

    def __init__(self, model: nn.Module, scale: float = 2.0, null: Callable = Cond.null, rescale: float = 0.0):
        super().__init__()
        self.model, self.scale, self.null, self.rescale = model, scale, null, rescale

    def forward(self, x, t, cond, cache=None):
        if self.scale == 1:
            return self.model(x, t, cond, cache)
        both = None if t is None else torch.cat([t, t])  # a model over codes has no time
        told, null = self.model(torch.cat([x, x]), both, cond.twice(self.null(cond)), cache).chunk(2)
        out = null + self.scale * (told - null)
        if self.rescale:
            spread = lambda y: y.std(tuple(range(1, y.ndim)), keepdim=True)
            out = out * (1 - self.rescale + self.rescale * spread(told) / spread(out))
        return out
