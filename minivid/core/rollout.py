"""The rollout: a long clip is made block by block, each from what was made before.

One frame a block is autoregression, the whole clip is plain diffusion, a few frames is block diffusion. A block comes
to know the past through a cache of keys (written by a clean pass, by the denoising pass itself, or not at all) or
through `context`, which turns what was emitted into the condition of the next block. Runs under gradient, so a model
can be trained on its own rollouts. The training loss of such a model stands below.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from . import fit, noise
from .model import Cond

Write = str  # "clean": a pass of its own over the finished block; "same": the last denoising pass; "none"


@dataclass(frozen=True)
class Plan:
    """How one block is made.

    path:    the process (see noise)
    times:   table `steps+1 f` of a block's frames, or `times(i)` for block i
    step:    sampler step
    write:   how a finished block enters the cache: "clean" (a pass of its own at time `at`), "same" (the keys of the
             last denoising pass), "none"
    at:      time of the clean pass; a little above 0 tells the model that its own past is not perfect
    context: `context(emitted, cond) -> cond`: the past as a condition, for models without a cache
    detach:  cut the gradient at block borders (truncated backpropagation)
    """

    path: noise.Path
    times: Tensor | Callable[[int], Tensor]
    step: Callable = noise.euler
    write: Write = "clean"
    at: float = 0.0
    context: Callable | None = None
    detach: bool = True

    def __post_init__(self):
        if self.write not in ("clean", "same", "none"):
            raise ValueError(f"a block is written by a 'clean' pass, by the 'same' pass or 'none', got {self.write!r}")


def rollout(model, plan: Plan, ends: Sequence[Float[Tensor, "b c _ h w"]], cond: Cond, cache=None, generator=None,
            first: Sequence[Float[Tensor, "b c _ h w"]] = ()) -> Float[Tensor, "b c f h w"]:
    """Make one block of every tensor of noise in `ends` (a sequence of blocks `b c f h w`), in order; returns all frames.

    cond:  a caption for all (`b l`) or one a block (`b s l`, the last goes on); block i is told `cond.at(i, start)`
    first: known blocks before the first that is made (each written by a clean pass); they are part of the result
    Wrap the call in `torch.no_grad()` to sample; without it gradients flow within each block, and across blocks where
    `plan.detach` is off.
    """
    made, at = [], 0
    blocks = [*first, *ends]
    for i, end in enumerate(blocks):
        told = cond.at(i, cond.start + at)
        if plan.context is not None and made:
            past = torch.cat(made, 2)
            told = plan.context(past.detach() if plan.detach else past, told)
        if cache is not None:
            cache.open(i, told)
        given = i < len(first)
        x = end if given else denoise(model, plan, i, end, told, cache, generator)
        if cache is not None:
            if plan.write == "clean" or (given and plan.write != "none"):
                remember(model, x, plan.at, told, cache, plan.detach)
            cache.close(i)
            if plan.detach:
                cache.detach()
        made.append(x)
        at += x.shape[2]
    return torch.cat(made, 2)


def denoise(model, plan: Plan, i: int, x: Tensor, cond: Cond, cache=None, generator=None) -> Float[Tensor, "b c f h w"]:
    """Walk block i from noise to clean, looking at the cache."""
    times = (plan.times(i) if callable(plan.times) else plan.times).to(x.device)
    if times.shape[1] != x.shape[2]:
        raise ValueError(f"block {i} has {x.shape[2]} frames, the table of times {times.shape[1]} columns")

    def predict(x, t):
        return plan.path.clean(x, t, model(x, t.expand(x.shape[0], -1), cond, cache))

    for j, (t, s) in enumerate(zip(times[:-1], times[1:], strict=True)):
        if cache is not None:
            cache.writing = plan.write == "same" and j == len(times) - 2
        x = plan.step(plan.path, predict, x, t, s, generator)
    return x


def remember(model, x: Tensor, t: float | int, cond: Cond, cache, detach: bool = True) -> None:
    """The clean pass: show the model the finished block at time t and let the cache keep its keys."""
    cache.writing = True
    with torch.set_grad_enabled(torch.is_grad_enabled() and not detach):
        model(x, torch.full((x.shape[0], x.shape[2]), t, device=x.device), cond, cache)
    cache.writing = False


def block_times(b: int, chunks: int, frames: int, generator, slight: float = 0.0, shift: float = 1.0):
    """Training times `b f` of chunks x frames, and which chunks are noised, `b chunks` booleans.

    A number m is drawn a sample: chunks before m are the clean past (times uniform in [0, slight]), m and those after
    it are noised, each to a time of its own. So the first noised chunk sees what it sees in a rollout.
    """
    m = (fit.uniform(b, 1, generator=generator) * chunks).long()
    noised = torch.arange(chunks, device=m.device) >= m
    t = fit.normal(b, chunks, generator=generator).sigmoid()
    t = shift * t / (1 + (shift - 1) * t)
    t = torch.where(noised, t, slight * fit.uniform(b, chunks, generator=generator))
    return t.repeat_interleave(frames, 1), noised


def block_loss(model, path: noise.Path, clean: Float[Tensor, "b c f h w"], cond: Cond, generator, slight: float = 0.0,
               shift: float = 1.0) -> Float[Tensor, ""]:
    """Loss of a block-causal model (`model.block` frames a chunk): squared error of the output on noised chunks only.

    Every sample counts alike, however many of its chunks were noised.
    """
    b, _, f = clean.shape[:3]
    if not model.block or f % model.block:
        raise ValueError(f"{f} frames don't divide into chunks of {model.block}")
    t, noised = block_times(b, f // model.block, model.block, generator, slight, shift)
    eps = fit.normal(*clean.shape, generator=generator)
    error = (model(path.at(clean, eps, t), t, cond) - path.target(clean, eps, t)).square().mean((1, 3, 4))
    weight = noised.repeat_interleave(model.block, 1).to(error.dtype)
    return ((error * weight).sum(1) / weight.sum(1)).mean()
