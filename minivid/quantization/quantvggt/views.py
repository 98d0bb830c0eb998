"""The model to be quantised: a small visual geometry transformer, and the clips with exact cameras that it learns from.

Tokens of a frame are 1 camera token, 4 register tokens and its patches. The special tokens are parameters, one set for the
first frame and one for all others: whatever the clip shows, they enter the blocks as the same numbers. Blocks alternate between
the tokens of a frame and the tokens of all frames. There is no frame position, so but for the first the frames are a set.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from ... import world
from ...core.model import Block, Context
from ...core.where import Where, grid
from ...world.parts import DIRECTIONS, Camera

LENSES = ("still", "left", "right", "up", "down", "shake")
SPECIAL = 5  # a camera token and 4 registers
FRAMES = tuple(range(0, 16, 3))  # six views, far enough apart to see the camera move


class Geometry(NamedTuple):
    """Of each frame: how far the camera has moved since the first (in pixels), and for each cell of 2 x 2 pixels a logit that
    something stands there in front of the ground."""

    camera: Float[Tensor, "b f xy"]
    nearer: Float[Tensor, "b f h w"]


class Views(nn.Module):
    """`model(clip) -> Geometry` for clips `b 3 f h w` of 32 x 32 pixels. Blocks lie in `frame` and `every`."""

    def __init__(self, d: int = 96, pairs: int = 3, heads: int = 4):
        super().__init__()
        layers = nn.Conv2d(3, 32, 4, 2, 1), nn.GELU(), nn.Conv2d(32, 64, 4, 2, 1), nn.GELU(), nn.Conv2d(64, d, 2, 2)
        self.embed = nn.Sequential(*layers)
        self.special, self.place = nn.Parameter(torch.randn(2, SPECIAL, d) * 0.1), nn.Parameter(torch.randn(16, d) * 0.1)
        self.frame, self.every = (nn.ModuleList(Block(d, heads, ratio=2, text=False) for _ in range(pairs)) for _ in range(2))
        for block in (*self.frame, *self.every):
            block.table.data[[2, 5]] = 1.0  # gates open: there is no time to learn that first
        self.norm, self.camera, self.near = nn.LayerNorm(d), nn.Linear(d, 2), nn.Linear(d, 16)

    @property
    def blocks(self) -> list[str]:
        """Names of the blocks, in the order in which they run."""
        return [f"{kind}.{i}" for i in range(len(self.frame)) for kind in ("frame", "every")]

    def forward(self, clip: Float[Tensor, "b 3 f h w"]) -> Geometry:
        b, _, f, h, w = clip.shape
        if (h, w) != (32, 32):  # `place` is learnt for these 16 patches
            raise ValueError(f"this model takes clips 'b 3 f h w' of 32 x 32 pixels, got {tuple(clip.shape)}")
        patches = rearrange(self.embed(rearrange(clip, "b c f h w -> (b f) c h w")), "n d h w -> n (h w) d") + self.place
        special = self.special[[0] + [1] * (f - 1)].repeat(b, 1, 1)
        x = torch.cat([special, patches], 1)
        one, every = places(h // 8, w // 8, 1, x.device), places(h // 8, w // 8, f, x.device)
        for inside, across in zip(self.frame, self.every, strict=True):
            x = inside(x, Context(one))
            x = across(rearrange(x, "(b f) n d -> b (f n) d", f=f), Context(every))
            x = rearrange(x, "b (f n) d -> (b f) n d", f=f)
        x = self.norm(x)
        cells = rearrange(self.near(x[:, SPECIAL:]), "(b f) (h w) (p q) -> b f (h p) (w q)", b=b, h=h // 8, p=4)
        return Geometry(rearrange(self.camera(x[:, 0]), "(b f) k -> b f k", b=b), cells)


def places(h: int, w: int, frames: int, device=None) -> Where:
    """Special tokens at row and column 0, patches from 1 on, the same in each of the frames."""
    patches = grid(1, h, w, device=device).coords + torch.tensor([0.0, 1.0, 1.0], device=device)
    special = torch.zeros(1, SPECIAL, 3, device=device)
    return Where(torch.cat([special, patches], 1).repeat(1, frames, 1))


def is_special(n: int, patches: int) -> Tensor:
    """Which of n tokens, of one frame or of many, are special."""
    return torch.arange(n) % (SPECIAL + patches) < SPECIAL


# --- clips whose geometry is known ----------------------------------------------------------------------------------------


def at_rest(n: int, seed: int, split: str = "train") -> list[world.Scene]:
    """n scenes with two bodies that rest, while the camera does one of LENSES in turn."""
    return [_at_rest(world.draw(seed, i, "two", split), i) for i in range(n)]


def _at_rest(scene: world.Scene, i: int) -> world.Scene:
    stop = lambda leg: leg._replace(x=leg.x + 8 * leg.vx, y=leg.y + 8 * leg.vy, vx=0.0, vy=0.0)  # in the midst of its way
    bodies = tuple(replace(body, motion="still", legs=(stop(body.legs[0]),)) for body in scene.bodies)
    word, rate = LENSES[i % len(LENSES)], 0.6 + 0.8 * math.modf(0.618 * i)[0]
    dx, dy = (0.014 * rate * way for way in DIRECTIONS.get(word, (0, 0)))
    return replace(scene, bodies=bodies, camera=Camera(word, dx, dy, shake=0.05 * (word == "shake"), phase=float(i)))


def examples(scenes: Sequence[world.Scene], size: int = 32) -> tuple[Float[Tensor, "b 3 f h w"], Geometry]:
    """Six views of each scene and their true geometry; `nearer` is a share of the cell here, not a logit."""
    clips = world.batch(scenes, size, FRAMES[-1] + 1)[:, :, FRAMES]
    camera, near = [], []
    for scene in scenes:
        at = torch.from_numpy(np.stack(scene.camera.at(np.array(FRAMES, float))[:2], -1)).float()
        camera.append(size * (at - at[0]))
        near.append((world.truth(scene, size, FRAMES[-1] + 1, grid=1).order[list(FRAMES)] >= 0).float())
    return clips, Geometry(torch.stack(camera), F.avg_pool2d(torch.stack(near), 2))


def turned(clips: Tensor, true: Geometry, across: bool, down: bool) -> tuple[Tensor, Geometry]:
    """Mirrored clips, and the geometry that belongs to them."""
    sides = [side for side, on in ((-1, across), (-2, down)) if on]
    signs = torch.tensor([-1.0 if across else 1.0, -1.0 if down else 1.0])
    return clips.flip(sides), Geometry(true.camera * signs, true.nearer.flip(sides))


def loss(said: Geometry, true: Geometry) -> Float[Tensor, ""]:
    """Smooth L1 of the camera in units of 2 pixels, and cross-entropy of the cells."""
    return F.smooth_l1_loss(said.camera / 2, true.camera / 2) + F.binary_cross_entropy_with_logits(said.nearer, true.nearer)


@torch.enable_grad()
def train(clips: Tensor, true: Geometry, steps: int, seed: int, batch: int = 16, tell: Callable = lambda i, loss: None) -> Views:
    """A model of its own, by Muon for the blocks' matrices and AdamW for the rest."""
    torch.manual_seed(seed)
    model, dice = Views(), torch.Generator().manual_seed(seed)
    inner = [pair for blocks in (model.frame, model.every) for pair in blocks.named_parameters()]
    matrices = [p for name, p in inner if p.ndim == 2 and not name.endswith("table")]
    inside = {id(p) for p in matrices}
    rest = torch.optim.AdamW([p for p in model.parameters() if id(p) not in inside], 3e-3, (0.9, 0.99))
    optimisers = (torch.optim.Muon(matrices, 1e-2, 0.01, adjust_lr_fn="match_rms_adamw"), rest)
    peaks = [o.param_groups[0]["lr"] for o in optimisers]
    for i in range(steps):
        rows, flips = torch.randint(len(clips), (batch,), generator=dice), torch.rand(2, generator=dice) < 0.5
        x, y = turned(clips[rows], Geometry(true.camera[rows], true.nearer[rows]), *flips.tolist())
        error = loss(model(x), y)
        for o, peak in zip(optimisers, peaks, strict=True):
            o.param_groups[0]["lr"] = peak * min(1.0, (i + 1) / 20) * (1 - i / steps)
        model.zero_grad()
        error.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for o in optimisers:
            o.step()
        tell(i, error.item())
    return model.eval().requires_grad_(False)
