"""Tokenizers and feature networks: what they see, what is asked of them."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .. import world
from ..core import corpus, fit
from ..core.baselines.vq import VQ
from .recipe import Recipe, pick

SEEN = ("base", "textured", "varied", "camera", "light", "recurrent")  # worlds that the tokenizers learn to draw


def clip_material(batch: int, frames: int, every: int | None = None) -> Callable:
    """Batches of 32 x 32 crops: half world at 32 px, a quarter world at 64 px, a quarter natural clips and panned photographs.

    every: None for whole clips of 17 frames, or how many frames to keep of each (a per-frame tokenizer needs no neighbours)
    """

    def material(device):
        small = [corpus.clips(r, 4096 if r == "base" else 1024, 32, frames) for r in SEEN]
        large = [corpus.clips(r, 256, 64, frames) for r in SEEN]
        real = [corpus.natural(1024, size, frames) for size in (32, 64)]
        pools = [torch.from_numpy(np.concatenate([np.asarray(a) for a in g])).to(device) for g in (small, large)]
        pools += [torch.from_numpy(np.array(a)).to(device) for a in real]
        parts = (batch // 2, batch // 4, batch // 8, batch // 8)

        def batches(i):
            dice = torch.Generator().manual_seed(i)
            out = []
            for pool, n in zip(pools, parts, strict=True):
                chosen = pool[torch.randint(len(pool), (n,), generator=dice).to(device)]
                y, x = (int(torch.randint(s - 31, (1,), generator=dice)) for s in chosen.shape[-2:])
                chosen = chosen[..., y : y + 32, x : x + 32]
                if every:
                    chosen = chosen[:, :, torch.randint(frames, (every,), generator=dice).to(device)]
                mirrors = [d for d in (2, 4) if torch.rand((), generator=dice) < 0.5]  # backwards in time, left for right
                chosen = chosen.flip(mirrors)
                out.append(corpus.clip_of(chosen))
            return torch.cat(out)[torch.randperm(batch, generator=dice)]  # every process gets of everything

        return batches

    return material


def components(model, batches) -> None:
    """Begin at the principal components of the first few batches; codes that learn at the clusters of these."""
    clips = torch.cat([batches(i) for i in range(8)])
    model.begin(clips)
    if isinstance(model.bottleneck, VQ):
        with torch.no_grad():
            model.bottleneck.begin(model.features(clips))


def settle(model, batches) -> None:
    """Fix the scale of the latents."""
    model.settle(torch.cat([batches(i) for i in range(8)]))


def reconstruct(model, clip: Tensor, generator) -> dict[str, Tensor]:
    """Tokenizer loss: L1, squared error (what PSNR counts) and L1 of the spatial differences (edges)."""
    back, _, extra = model(clip, generator)
    error = back - clip
    edges = sum((error.diff(dim=d)).abs().mean() for d in (-1, -2))
    parts = {"l1": error.abs().mean(), "mse": error.square().mean(), "edges": edges, **extra}
    total = parts["l1"] + 10 * parts["mse"] + 0.3 * edges + sum(extra.values())
    return {"loss": total, "mse": parts["mse"]}


def labelled(batch: int, n: int = 8192) -> Callable:
    """Clips of 16 frames with what the feature networks are asked: per colour, presence, shape, velocity."""

    def material(device):
        clips = torch.from_numpy(np.array(corpus.clips("base", n, 32, 17))).to(device)
        labels = torch.stack([answers(s) for s in corpus.scenes("base", n)]).to(device)

        def batches(i):
            rows = pick(i, n, batch, 5).to(device)
            return corpus.clip_of(clips[rows]), labels[rows]

        return batches

    return material


def answers(scene) -> Tensor:
    """One row a colour: presence, shape number, velocity x and y in sides per 16 frames."""
    rows = torch.zeros(len(world.COLOURS), 4)
    for body in scene.bodies:
        rows[list(world.COLOURS).index(body.colour)] = torch.tensor(
            [1.0, list(world.SHAPES).index(body.shape), 16 * body.legs[0].vx, 16 * body.legs[0].vy]
        )
    return rows


def recognise(model, batch, generator) -> dict[str, Tensor]:
    """Presence by logistic loss; shape and velocity only of the bodies that are there. A little noise."""
    clip, labels = batch
    level = 0.1 * fit.uniform(len(clip), 1, 1, 1, 1, generator=generator)
    clip = clip + level * fit.normal(*clip.shape, generator=generator)  # not randn_like: a resumed run must draw the same
    said = model.answers(clip)
    there = labels[..., 0] > 0
    presence = F.binary_cross_entropy_with_logits(said[..., 0], labels[..., 0])
    shape = F.cross_entropy(said[..., 1:-2][there], labels[..., 1][there].long())
    speed = F.smooth_l1_loss(said[..., -2:][there], labels[..., 2:][there])
    return {"loss": presence + 0.5 * shape + speed, "shape": shape, "speed": speed}


TOK_V = dict(channels=10, time_stride=4, noise=0.02)
TOK_F = dict(channels=4, time_stride=1, noise=0.02)
TOK_Q = dict(channels=3, time_stride=1, codes=256, noise=0.0)

ENDS = dict(begin=components, end=settle)
RECIPES = {
    "tok-v": Recipe("tokenizer", TOK_V, clip_material(16, 17), reconstruct, 8000, 3e-3, 16, **ENDS),
    "tok-f": Recipe("tokenizer", TOK_F, clip_material(16, 17, every=4), reconstruct, 5000, 3e-3, 16, **ENDS),
    "tok-q": Recipe("tokenizer", TOK_Q, clip_material(16, 17, every=4), reconstruct, 5000, 3e-3, 16, **ENDS),
    "feat-a": Recipe("features", dict(time=1), labelled(32), recognise, 2500, 2e-3, 32),
    "feat-b": Recipe("features", dict(time=3, widths=[24, 40, 56]), labelled(32, 24576), recognise, 10000, 2e-3, 32),
}
