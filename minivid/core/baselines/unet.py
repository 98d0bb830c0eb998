"""A video U-Net: the video generator before transformers, and what the papers on pruning and adapters work on.

What is unusual here: it has the outer call of every model, `model(x, t, cond, cache=None)` (the cache is not looked
at); every stage is a list of *pairs* (residual block, attention block) that are addressed as `downs.0.1`, `mid`,
`ups.2.0`, and their numbers are settings, so a pruned network is the same class; every branch ends in zeros, so a fresh
network is an identity on its features, and `time=False` leaves out what looks across frames: the image U-Net, whose
weights are a subset of the video one's.

Layout (Ronneberger et al. 2015; temporal layers after Blattmann et al. 2023, arXiv 2304.08818): a fine, a middle and a
low level, skip connections from every pair and every change of level.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from ..attention import dense, rotary_pairs, rotate
from ..model import Cond, TimeEmbedding, times, words
from ..text import TextEncoder
from ..where import Where, grid


def zero(layer: nn.Module) -> nn.Module:
    """The layer with weights and bias at 0: a branch that starts as nothing."""
    nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
    return layer


class FrameNorm(nn.GroupNorm):
    """GroupNorm over each frame by itself: no statistics run across time."""

    def forward(self, x):
        return per_frame(super().forward, x)


def per_frame(layer, x: Tensor) -> Tensor:
    """A layer of images, applied to every frame; with channels last in memory, where convolutions are twice as fast on a CPU."""
    images = rearrange(x, "b c f h w -> (b f) c h w").contiguous(memory_format=torch.channels_last)
    return rearrange(layer(images), "(b f) c h w -> b c f h w", b=len(x))


class ResBlock(nn.Module):
    """x + conv(norm(conv(norm(x)) + time)), 3 x 3 in each frame, after a 1 x 1 entry where the width changes."""

    def __init__(self, ends: tuple[int, int], d: int):
        super().__init__()
        a, c = ends
        self.enter = nn.Conv2d(a, c, 1) if a != c else None
        self.norm1, self.norm2 = FrameNorm(8, c), FrameNorm(8, c)
        self.time = nn.Linear(d, c)
        self.conv1, self.conv2 = nn.Conv2d(c, c, 3, padding=1), zero(nn.Conv2d(c, c, 1))

    def forward(self, x, time):
        x = x if self.enter is None else per_frame(self.enter, x)
        y = per_frame(self.conv1, F.silu(self.norm1(x)))
        y = y + rearrange(self.time(F.silu(time)), "b f c -> b c f 1 1")
        return x + per_frame(self.conv2, F.silu(self.norm2(y)))


class Heads(nn.Module):
    """Attention of narrow heads: tokens `b n c` to themselves (with rotary places) or to words."""

    def __init__(self, c: int, heads: int, width: int, words: int | None = None):
        super().__init__()
        self.heads, inner, source = heads, heads * width, words or c
        self.norm = nn.LayerNorm(c)
        self.q, self.k, self.v = nn.Linear(c, inner), nn.Linear(source, inner), nn.Linear(source, inner)
        self.o = zero(nn.Linear(inner, c))
        axis, freq = rotary_pairs(width)
        self.register_buffer("axis", axis, persistent=False)
        self.register_buffer("freq", freq, persistent=False)

    def forward(self, x: Float[Tensor, "b n c"], where: Where | None = None, text=None, mask=None):
        y = self.norm(x)
        source = y if text is None else text
        split = lambda z: rearrange(z, "b n (k d) -> b k n d", k=self.heads)
        q, k, v = split(self.q(y)), split(self.k(source)), split(self.v(source))
        if text is None:
            q, k = (rotate(z, where.coords, self.axis, self.freq) for z in (q, k))
            o = dense(q, k, v, where)
        else:
            o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
        return x + self.o(rearrange(o, "b k n d -> b n (k d)"))


class AttentionBlock(nn.Module):
    """Each frame to itself (at low levels), every frame to the words, and each place to itself along time."""

    def __init__(self, c: int, space: bool, words: int, time: bool):
        super().__init__()
        heads, width = 2, min(c // 2, 16)
        self.space = Heads(c, heads, width) if space else None
        self.cross = Heads(c, heads, width, words)
        self.time = Heads(c, heads, width) if time else None

    def forward(self, x, text, mask):
        b, _, f, h, w = x.shape
        y = rearrange(x, "b c f h w -> (b f) (h w) c")
        if self.space is not None:
            y = self.space(y, grid(1, h, w, device=x.device))
        if text is not None:
            y = self.cross(rearrange(y, "(b f) n c -> b (f n) c", b=b), None, text, mask)
            y = rearrange(y, "b (f n) c -> (b f) n c", f=f)
        if self.time is not None:
            y = self.time(rearrange(y, "(b f) n c -> (b n) f c", b=b), grid(f, 1, 1, device=x.device))
            y = rearrange(y, "(b n) f c -> (b f) n c", b=b)
        return rearrange(y, "(b f) (h w) c -> b c f h w", b=b, h=h)


class Pair(nn.Module):
    """One residual block and one attention block: the unit that pruning removes."""

    def __init__(self, ends: tuple[int, int], d: int, words: int, space: bool, time: bool):
        super().__init__()
        self.ends = ends
        self.residual, self.attention = ResBlock(ends, d), AttentionBlock(ends[1], space, words, time)

    def forward(self, x, time, text, mask):
        return self.attention(self.residual(x, time), text, mask)


class UNet(nn.Module):
    """`model(x, t, cond, cache=None) -> out`, `b c f h w`; t is `b f`, or `b`.

    channels:   of x (12 for `Pix(2)`)
    widths:     channels of the levels, the finest first; rows and columns of x divide by 2 ** (levels - 1)
    downs, ups: pairs of each stage, downs from the finest level, ups from the lowest; each level's ups exceed its downs
                by one (every pair and every change of level leaves a skip, every pair on the way up takes one)
    mid:        whether there is a pair at the bottom
    time:       whether frames see each other; False is the image U-Net
    """

    def __init__(self, channels: int = 12, widths=(24, 48, 96), downs=(2, 2, 2), ups=(3, 3, 3), mid: bool = True,
                 time: bool = True, d: int = 64):
        super().__init__()
        if len(downs) != len(widths) or [n + 1 for n in reversed(downs)] != list(ups):
            need = tuple(n + 1 for n in reversed(downs))
            raise ValueError(f"each stage up has one pair more than the stage down: {downs} need {need}, got {ups}")
        self.channels, levels = channels, len(widths)
        self.text, self.time = TextEncoder(d), TimeEmbedding(d)
        pair = lambda a, i: Pair((a, widths[i]), d, d, i > 0, time)
        self.enter = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.downs, self.lower, skips, c = nn.ModuleList(), nn.ModuleList(), [widths[0]], widths[0]
        for i in range(levels):
            stage = nn.ModuleList()
            for _ in range(downs[i]):
                stage.append(pair(c, i))
                c = widths[i]
                skips.append(c)
            self.downs.append(stage)
            if i < levels - 1:
                self.lower.append(nn.Conv2d(c, c, 3, 2, 1))
                skips.append(c)
        self.mid = pair(c, levels - 1) if mid else None
        self.ups = nn.ModuleList()
        for i, n in zip(reversed(range(levels)), ups, strict=True):
            stage = nn.ModuleList()
            for _ in range(n):
                stage.append(pair(c + skips.pop(), i))
                c = widths[i]
            self.ups.append(stage)
        self.norm, self.leave = FrameNorm(8, c), zero(nn.Conv2d(c, channels, 3, padding=1))

    def forward(self, x: Float[Tensor, "b c f h w"], t: Tensor, cond: Cond, cache=None) -> Float[Tensor, "b c f h w"]:
        side = 2 ** (len(self.downs) - 1)
        if x.ndim != 5 or x.shape[1] != self.channels or x.shape[3] % side or x.shape[4] % side:
            raise ValueError(
                f"this U-Net takes 'b {self.channels} f h w', rows and columns divisible by {side}, got {tuple(x.shape)}"
            )
        time = self.time(times(t, x))
        text, mask = words(self.text, cond)
        if text is not None:
            text, mask = text.flatten(1, 2), mask.flatten(1)
        return per_frame(self.leave, F.silu(self.norm(self.body(x, time, text, mask))))

    def body(self, x, time, text, mask):
        """All stages: what comes before the last norm, `b c f h w` at the finest level's width."""
        x = per_frame(self.enter, x)
        skips = [x]
        for i, stage in enumerate(self.downs):
            for pair in stage:
                x = pair(x, time, text, mask)
                skips.append(x)
            if i < len(self.lower):
                x = per_frame(self.lower[i], x)
                skips.append(x)
        x = x if self.mid is None else self.mid(x, time, text, mask)
        for i, stage in enumerate(self.ups):
            if i:
                x = F.interpolate(x, scale_factor=(1, 2, 2), mode="nearest")
            for pair in stage:
                x = pair(torch.cat([x, skips.pop()], 1), time, text, mask)
        return x
