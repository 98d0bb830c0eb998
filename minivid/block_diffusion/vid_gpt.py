"""ViD-GPT: frames that are done stand before the noisy ones like a prompt, and never look ahead, so their keys are kept.

Paper:   ViD-GPT: Introducing GPT-style Autoregressive Generation in Video Diffusion Models (2024), arXiv 2406.10981
Kind:    procedure (a block with attention along time, what it is trained on, a cache; `VideoModel` around it stays)
Equal:   the cached rollout is the one that computes its prompt anew, as long as nothing has left the queue; after that, the one
         whose every frame sees what was in the queue when it was written. "full" is a plain model in space and time
Claim:   the cache changes nothing but the time, which is flat in the length of the film and comes to half of its
         (P + l) K / (l (K + 1)); where a scene returns, a context that reaches back to it beats one of l frames, and causal
         attention is no worse there than full; "partial" denoises better by 1 % or more; a prompt shown with a little noise
         drifts less
Differs: latents of `tok-f`, flow matching, no learnt variance, captions by attention in every block. A frame is prompt iff its
         time is 0, so the mark can't be forgotten in a write pass. The attention of noisy frames to tokens of the last three
         prompt frames, an option of the successor's code, is left out: space is within a frame. Inferred, as everything but the
         abstract's three parts (causal attention along time, frame as prompt, cache) comes from the successor, Ca2-VDM: sizes,
         prompt lengths, the level of the prompt's noise, cyclic positions

    x = [z_1 .. z_P clean | x_(P+1) .. x_(P+l) noisy],  t = [0 .. 0 | t .. t],  loss on the noisy ones
    causal   key j visible to query i  iff  j <= i              partial  noisy frames also see all of their chunk
    cost of a chunk   K (P + l) frames without cache,  K l + l with one

What is unusual here: a site is a sample of the batch in the attention along time, so a cache of tokens is a queue of frames.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..core import fit, noise
from ..core.attention import Attention
from ..core.cache import Cache, Entry, together
from ..core.model import Block, Cond, Context, Trunk, VideoModel, times, words
from ..core.where import Where

Mode = Literal["causal", "partial", "full"]
Positions = Literal["cyclic", "rotary"]


# --- the network --------------------------------------------------------------------------------------------------------


def blocks(t: Float[Tensor, "b f"], start: float | int, mode: Mode) -> Int[Tensor, "b f"] | None:
    """Numbers of the frames along time: a key is visible iff its number is at most the query's. None: all see all."""
    if mode == "full":
        return None
    number = torch.arange(t.shape[1], device=t.device) + int(start)
    return number.expand(t.shape) if mode == "causal" else torch.where(t > 0, number[-1], number)


class Merge(nn.Module):
    """Width d + 1 -> d: the mark (1 on prompt frames) enters; at first it changes nothing."""

    def __init__(self, d: int):
        super().__init__()
        self.linear = nn.Linear(d + 1, d)
        with torch.no_grad():
            self.linear.weight.copy_(torch.eye(d, d + 1))
            self.linear.bias.zero_()

    def forward(self, x: Float[Tensor, "b f p d"], mark: Float[Tensor, "b f"]) -> Float[Tensor, "b f p d"]:
        return self.linear(torch.cat([x, mark[:, :, None, None].expand(*x.shape[:-1], 1)], -1))


@dataclass
class Film(Context):
    """What a block is told besides: the times `b f`, the frames' places along time, and what enters the first of them."""

    t: Tensor | None = None
    frames: Where | None = None
    enter: Callable = lambda x: x


class Factorised(Block):
    """A block whose self-attention is over the frame, then over time at each site; then words and feed-forward as ever."""

    def __init__(self, d: int, heads: int, ratio: int = 3):
        super().__init__(d, heads, None, ratio)
        self.along = Attention(d, heads)
        self.table = nn.Parameter(torch.zeros(9, d))

    def forward(self, x: Float[Tensor, "b n d"], ctx: Film) -> Float[Tensor, "b n d"]:
        f, h, w = ctx.where.grid
        m = rearrange(ctx.mod, "b f (m d) -> m b f d", m=9) + self.table[:, None, None]
        y = rearrange(self.modulated(x, m[0], m[1]), "b (f p) d -> (b f) p d", f=f)
        y = self.attention(y, Where(ctx.where.coords[:, : h * w], grid=(1, h, w)))
        x = x + self.gated(rearrange(y, "(b f) p d -> b (f p) d", f=f), m[2])
        y = rearrange(self.modulated(x, m[6], m[7]), "b (f p) d -> b f p d", f=f)
        y = rearrange(ctx.enter(y) if self.along.layer == 0 else y, "b f p d -> (b p) f d")
        y = self.along(y, ctx.frames, ctx.cache)
        x = x + self.gated(rearrange(y, "(b p) f d -> b (f p) d", p=h * w), m[8])
        if ctx.text is not None:
            x = x + self.cross(self.cross_norm(x), ctx)
        return x + self.gated(self.feed(self.modulated(x, m[3], m[4])), m[5])


class Along(Trunk):
    """`Factorised` blocks, with the marks and positions of the frames.

    mode: who sees whom along time.  positions: "cyclic" adds a learnt vector to the input of the first attention along time,
    frame number modulo `length`, baked into the keys that are kept; "rotary" turns keys as they are read
    """

    def __init__(self, d: int, depth: int, heads: int, mode: Mode = "causal", positions: Positions = "cyclic", length: int = 17):
        nn.Module.__init__(self)
        self.mode, self.positions, self.length = mode, positions, length
        self.blocks = nn.ModuleList(Factorised(d, heads) for _ in range(depth))
        for i, block in enumerate(self.blocks):
            block.along.layer = i
        self.merge = Merge(d)
        self.place = nn.Parameter(0.02 * torch.randn(length, d)) if positions == "cyclic" else None

    def forward(self, x: Float[Tensor, "b n d"], ctx: Film) -> Float[Tensor, "b n d"]:
        (f, h, w), start = ctx.where.grid, ctx.cond.start
        number = torch.arange(f, device=x.device) + int(start)
        past = ctx.cache.past(0) if isinstance(ctx.cache, Cache) else []
        view = f + sum(e.k.shape[2] for e in past)
        if self.place is not None and view > self.length:
            raise ValueError(f"{view} frames are in view, but there are {self.length} cyclic positions: two would have the same")
        coords = torch.zeros(1, f, 3, device=x.device)
        if self.place is None:
            coords[..., 0] = number
        order = blocks(ctx.t, start, self.mode)
        frames = Where(coords, None if order is None else order.repeat_interleave(h * w, 0))

        def enter(y):
            y = self.merge(y, (ctx.t == 0).to(y.dtype))
            return y if self.place is None else y + self.place[number % self.length][None, :, None]

        return super().forward(x, replace(ctx, frames=frames, enter=enter))


class ViDGPT(VideoModel):
    """`model(x, t, cond, cache=None)`; frames at time 0 are the prompt. Sizes as in `VideoModel`, the rest as in `Along`.

    With a cache the frames before `cond.start` are those that it holds. Mode "full" has no use for one: ValueError.
    """

    def __init__(self, channels: int = 4, d: int = 96, depth: int = 4, heads: int = 4, patch: int = 2, mode: Mode = "causal",
                 positions: Positions = "cyclic", length: int = 17):
        super().__init__(channels, d, 1, heads, patch)
        self.trunk = Along(d, depth, heads, mode, positions, length)
        self.mod = nn.Linear(d, 9 * d)
        nn.init.zeros_(self.mod.weight), nn.init.zeros_(self.mod.bias)

    def forward(self, x: Float[Tensor, "b c f h w"], t: Tensor, cond: Cond, cache=None) -> Float[Tensor, "b c f h w"]:
        if cache is not None and self.trunk.mode == "full":
            raise ValueError("where prompt frames look at noisy ones their keys change with every step: 'full' can't be cached")
        t = times(t, x)
        tokens, where, t = self.inlet(x, t, cond)
        time = self.time(t)
        ctx = Film(where, self.mod(F.silu(time)), *words(self.text, cond), cache, cond, t)
        return self.head(self.trunk(tokens, ctx), time, ctx)


# --- training -----------------------------------------------------------------------------------------------------------


def prompts(length: int, l: int) -> list[int]:
    """Lengths P of the prompt that are met in generation: 1, 1 + l, ... with room for l noisy frames."""
    if l < 1 or length < 1 + l:
        raise ValueError(f"a clip has room for a frame and a chunk of l >= 1, got {length} frames and {l=}")
    return list(range(1, length - l + 1, l))


def loss(model, path: noise.Path, clean: Float[Tensor, "b c f h w"], cond: Cond, generator,
         lengths: Sequence[int], slight: float | int = 0.1, shift: float | int = 1.0) -> Float[Tensor, ""]:
    """Squared error on the noisy frames; one prompt length a step, drawn from `lengths` (see `prompts`).

    The clip is the longest prompt and its noisy frames. slight: t' of the prompt's noise. With the longest prompt a film starts
    anywhere on the circle of positions, else at 0: in a rollout, a prompt is short at the beginning only.
    """
    b, l = len(clean), clean.shape[2] - max(lengths)
    P = lengths[int(fit.uniform(1, generator=generator) * len(lengths))]
    clean = clean[:, :, : P + l]
    start = int(fit.uniform(1, generator=generator) * model.trunk.length) * (P == max(lengths))
    t = noise.logit_normal(b, P + l, generator, shift).clone()
    level = t.clone()
    t[:, :P], level[:, :P] = 0, slight
    eps = fit.normal(*clean.shape, generator=generator)
    out = model(path.at(clean, eps, level), t, replace(cond, start=start))
    return (out - path.target(clean, eps, t))[:, :, P:].square().mean()


# --- rollouts -----------------------------------------------------------------------------------------------------------


class Queue(Cache):
    """Keeps the last `room` frames; what is older is forgotten."""

    def __init__(self, room: int):
        if room < 1:
            raise ValueError(f"a queue keeps at least a frame, got {room=}")
        self.room = room
        super().__init__()

    def close(self, block: int) -> None:
        super().close(block)
        for layer, entries in self.kept.items():
            k, v, where = together(entries)
            n = max(0, k.shape[2] - self.room)
            block_of = None if where.block is None else where.block[..., n:]
            self.kept[layer] = [Entry(block, k[:, :, n:].clone(), v[:, :, n:].clone(), Where(where.coords[..., n:, :], block_of))]


class Shown(nn.Module):
    """A model whose prompt frames are shown with a little noise at level `slight`; frame i of a film always with the same."""

    def __init__(self, model: Callable, path: noise.Path, slight: float | int, seed: int = 0):
        super().__init__()
        self.model, self.path, self.slight, self.seed = model, path, slight, seed
        self.frames = 0  # how many frames have gone through the network

    def forward(self, x, t, cond, cache=None):
        self.frames += x.shape[2]
        prompt = (t == 0)[:, None, :, None, None]
        first = int(cond.start)
        draw = lambda i: torch.randn(x[0, :, 0].shape, generator=fit.draws(self.seed, first + i))
        eps = torch.stack([draw(i) for i in range(x.shape[2])], 1).to(x)
        x = torch.where(prompt, self.path.at(x, eps.expand_as(x), torch.full_like(t, self.slight)), x)
        return self.model(x, t, cond, cache)


class Anew(nn.Module):
    """A model that computes its prompt anew at every call: `cond.known`, the past, stands before the noisy frames."""

    def __init__(self, model: Callable):
        super().__init__()
        self.model = model

    def forward(self, x, t, cond, cache=None):
        if cond.known is None:
            return self.model(x, t, cond)
        past = cond.known.expand(len(x), *cond.known.shape[1:])
        told = replace(cond, known=None, start=cond.start - past.shape[2])
        none = t.new_zeros(len(x), past.shape[2])
        return self.model(torch.cat([past, x], 2), torch.cat([none, t], 1), told)[:, :, past.shape[2] :]


def past(room: int) -> Callable[[Tensor, Cond], Cond]:
    """For `Plan.context`: the last `room` frames as `cond.known`."""
    return lambda made, cond: replace(cond, known=made[:, :, -room:])
