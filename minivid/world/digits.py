"""Moving digits: one or two handwritten digits that bounce, by mirror law or by chance. Class and path are known.

The digits are scikit-learn's 1,797 scans of 8 x 8 pixels (UCI, "Optical recognition of handwritten digits"), enlarged to 16 x 16
and split by scan: the first 1,437 for training, the other 360 held out. They are white on black; where two meet, the brighter
shows.
"""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import interpolate

from .parts import Leg, source
from .physics import hit, later

_TRAIN = 1437
_SIDE = 16 / 32  # side of a digit in sides of the frame


@dataclass(frozen=True)
class Digits:
    """A clip of moving digits: per digit the number of its scan, its class, and its path as legs (in sides, centres)."""

    seed: tuple[int, int]
    scans: tuple[int, ...]
    labels: tuple[int, ...]
    paths: tuple[tuple[Leg, ...], ...]

    def centres(self, frames: int, start: int = 0) -> Float[Tensor, "k f xy"]:
        """Exact centres in sides of the frame."""
        out = []
        for legs in self.paths:
            starts = np.array([leg.start for leg in legs])
            rows = []
            for t in range(start, start + frames):
                leg = later(legs[int(np.searchsorted(starts, t, side="right")) - 1], float(t))
                rows.append((leg.x, leg.y))
            out.append(rows)
        return torch.tensor(out)


@cache
def scans() -> tuple[Float[Tensor, "n h w"], Int[Tensor, "n"]]:
    """All digits at 16 x 16, in [0, 1], and their classes."""
    from sklearn.datasets import load_digits  # slow to import, and few need it

    data = load_digits()
    small = torch.from_numpy(data.images).float()[:, None] / 16
    return interpolate(small, (16, 16), mode="bicubic", align_corners=False)[:, 0].clamp(0, 1), torch.from_numpy(data.target)


def draw_digits(
    seed: int, index: int = 0, count: int = 1, stochastic: bool = False, split: str = "train", frames: int = 64
) -> Digits:
    """Clip number `index` of the list named by the other arguments; paths are worked out for `frames` frames.

    At a wall the velocity is mirrored, or with `stochastic` drawn anew, which makes the future random.
    """
    if count not in (1, 2):
        raise ValueError(f"Expected 1 or 2 digits, got {count}.")
    if split not in ("train", "held-out"):
        raise ValueError(f'Unknown split {split!r}. Use "train" or "held-out".')
    rng = source(seed, index, "digits", count, int(stochastic), split)
    labels = scans()[1]
    low, high = (0, _TRAIN) if split == "train" else (_TRAIN, len(labels))
    chosen = tuple(int(rng.integers(low, high)) for _ in range(count))
    paths = tuple(_path(rng, stochastic, frames) for _ in range(count))
    return Digits((seed, index), chosen, tuple(int(labels[i]) for i in chosen), paths)


def _path(rng: np.random.Generator, stochastic: bool, frames: int) -> tuple[Leg, ...]:
    """Straight legs between the walls; speed .03 to .06 sides a frame."""
    low, high = _SIDE / 2, 1 - _SIDE / 2
    place = low + (high - low) * rng.random(2)
    speed, turn = 0.03 + 0.03 * rng.random(), 2 * math.pi * rng.random()
    legs = [Leg(x=float(place[0]), y=float(place[1]), vx=speed * math.cos(turn), vy=speed * math.sin(turn))]
    while True:
        now = legs[-1]
        times = hit(now.x, now.vx, 0.0, low, high), hit(now.y, now.vy, 0.0, low, high)
        time = now.start + min(times)
        if time >= frames:
            return tuple(legs)
        side = times[0] < times[1]
        if stochastic:
            inward = math.atan2(0, -now.vx) if side else math.atan2(-now.vy, 0)
            speed, turn = 0.03 + 0.03 * rng.random(), inward + 2.6 * (rng.random() - 0.5)
            vx, vy = speed * math.cos(turn), speed * math.sin(turn)
        else:
            vx, vy = (-now.vx, now.vy) if side else (now.vx, -now.vy)
        legs.append(later(now, time)._replace(vx=vx, vy=vy))


def render_digits(clips: list[Digits], size: int = 32, frames: int = 16, start: int = 0) -> Float[Tensor, "b c f h w"]:
    """Clips in [-1, 1] (three equal channels), sub-pixel by bilinear interpolation."""
    if size < 8 or frames < 1 or start < 0 or not clips:
        raise ValueError(
            f"Expected size >= 8, frames >= 1, start >= 0 and a clip, got {size}, {frames}, {start}, {len(clips)} clips."
        )
    images = scans()[0]
    canvas = torch.zeros(len(clips), frames, size, size)
    step = (torch.arange(size) + 0.5) / size
    for number in range(max(len(clip.scans) for clip in clips)):
        rows = [i for i, clip in enumerate(clips) if len(clip.scans) > number]
        centre = torch.stack([clips[i].centres(frames, start)[number] for i in rows])  # n f 2
        picture = images[[clips[i].scans[number] for i in rows]]
        across, down = (_tent((step - centre[..., axis, None]) / _SIDE * 16 + 7.5) for axis in (0, 1))
        drawn = torch.einsum("nfhi,nij,nfwj->nfhw", down, picture, across)
        canvas[rows] = torch.maximum(canvas[rows], drawn)
    return canvas.mul(2).sub(1).clamp(-1, 1)[:, None].expand(-1, 3, -1, -1, -1).contiguous()


def _tent(place: Float[Tensor, "*n p"]) -> Float[Tensor, "*n p i"]:
    """Weights with which a pixel at source coordinate `place` reads the 16 source pixels; nothing outside."""
    return (1 - (place[..., None] - torch.arange(16)).abs()).clamp(min=0)


def digits(
    seed: int, index: int = 0, count: int = 1, stochastic: bool = False, size: int = 32, frames: int = 16
) -> tuple[Float[Tensor, "c f h w"], tuple[int, ...], Float[Tensor, "k f xy"]]:
    """One training clip, the classes of its digits and their centres in px: draw_digits and render_digits in one."""
    clip = draw_digits(seed, index, count, stochastic, frames=max(frames, 64))
    return render_digits([clip], size, frames)[0], clip.labels, clip.centres(frames) * size
