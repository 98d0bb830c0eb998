"""Real clips: two bundled natural films, panned photographs with exact flow, and any file that a reader names.

What is unusual: the two films are split by *columns*, not by time. Neighbouring frames are nearly equal, so held-out
frames would be known from training; the right 64 columns are never seen. They are stored as lossless animated WebP, so
what is read is what was made (data/ATTRIBUTION.md, scripts/make_clips.py), and Pillow alone reads it.

A clip is float in [-1, 1]: `c f h w`. Flow is forward, in pixels (x right, y down): the point p of frame i is at
p + flow[:, i] in frame i + 1.
"""

import importlib.util
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from .files import pictures, to_clip

DATA = Path(__file__).parent / "data"
CLIPS = ("bunny", "city")
PHOTOS = ("china", "flower")
SPLIT = 96  # columns left of it are for training, the others are held out


@lru_cache
def _bundled(name: str, halved: bool = False) -> np.ndarray:
    """A bundled film as bytes `f h w c`, at full size or averaged over 2 x 2 pixels."""
    if name not in (*CLIPS, "cut"):
        raise ValueError(f"Unknown clip {name!r}. The bundled clips are: {', '.join(CLIPS)}, cut.")
    pixels = np.stack([picture for picture, _ in pictures(DATA / f"{name}.webp")])
    if halved:
        f, h, w, c = pixels.shape
        pixels = np.rint(pixels.reshape(f, h // 2, 2, w // 2, 2, c).mean((2, 4), dtype=np.float32)).astype(np.uint8)
    pixels.setflags(write=False)
    return pixels


def natural(name: str) -> Float[Tensor, "c f h w"]:
    """A bundled clip whole: "bunny" and "city" are 64 frames of 96 x 160 (columns from 96 on are held out); "cut" is 24
    frames of 96 x 96 of the city film with a hard cut between frames 11 and 12. Sources: data/ATTRIBUTION.md."""
    return to_clip(_bundled(name))


def natural_crops(
    n: int, size: int = 64, frames: int = 17, split: str = "train", seed: int = 0
) -> Float[Tensor, "b c f h w"]:
    """n random crops in space and time, all on one side of the split; a pure function of its arguments.

    Held-out crops are the film as it is. Training crops are also mirrored and reversed, every second of 48 px or less
    is from the film at half size, one in four is a pan over a photograph (if scikit-learn, their source, is there).
    """
    if split not in ("train", "held-out"):
        raise ValueError(f"Unknown split {split!r}. Use train or held-out.")
    width = SPLIT if split == "train" else 160 - SPLIT
    if n < 1 or not 1 <= size <= min(width, 96) or not 1 <= frames <= 64:
        limits = f"n >= 1, 1 <= size <= {min(width, 96)} and 1 <= frames <= 64"
        raise ValueError(f"Crops of the {split} part need {limits}; got {n}, {size} and {frames}.")
    rng = np.random.default_rng([seed, split == "train", n, size, frames])
    out = torch.empty(n, 3, frames, size, size)
    photos = split == "train" and _photo_folder() is not None
    for i in range(n):
        own = np.random.default_rng(rng.integers(2**63))  # so that a clip does not depend on what the ones before drew
        out[i] = _panned(own, size, frames) if photos and own.random() < 0.25 else _crop(own, size, frames, split)
    return out


def _crop(rng: np.random.Generator, size: int, frames: int, split: str) -> Tensor:
    halved = split == "train" and size <= 48 and rng.random() < 0.5
    film = _bundled(CLIPS[rng.integers(2)], bool(halved))
    edge = SPLIT * film.shape[2] // 160
    film = film[:, :, :edge] if split == "train" else film[:, :, edge:]
    f0, y, x = (rng.integers(have - want + 1) for have, want in zip(film.shape, (frames, size, size), strict=False))
    clip = film[f0 : f0 + frames, y : y + size, x : x + size]
    if split == "train":
        mirrored, reverse = rng.random(2) < 0.5
        clip = clip[:: -1 if reverse else 1, :, :: -1 if mirrored else 1]
    return to_clip(clip)


def _photo_folder() -> Path | None:
    spec = importlib.util.find_spec("sklearn")  # finds the folder without the second that importing it takes
    folder = Path(spec.origin).parent / "datasets" / "images" if spec and spec.origin else None
    return folder if folder and (folder / "china.jpg").exists() else None


@lru_cache
def photograph(name: str) -> Float[Tensor, "c h w"]:
    """One of scikit-learn's photographs, "china" or "flower", 3 x 427 x 640 in [-1, 1] (CC BY, data/ATTRIBUTION.md)."""
    if name not in PHOTOS:
        raise ValueError(f"Unknown photograph {name!r}. Use one of: {', '.join(PHOTOS)}.")
    folder = _photo_folder()
    if folder is None:
        raise FileNotFoundError("The photographs come with scikit-learn, which is missing: pip install scikit-learn.")
    from PIL import Image

    with Image.open(folder / f"{name}.jpg") as picture:
        return to_clip(np.asarray(picture.convert("RGB"))[None])[:, 0]


def _panned(rng: np.random.Generator, size: int, frames: int) -> Tensor:
    zoom_out = int(rng.integers(2, 4))
    most = min(1.5, (420 / zoom_out - size) / frames)  # px a frame; the photographs are 427 px high
    velocity = rng.uniform(-most, most, 2).tolist()
    return pan(PHOTOS[rng.integers(2)], size, frames, velocity, int(rng.integers(2**31)), zoom_out)[0]


def pan(
    photo: str | Float[Tensor, "c H W"],
    size: int = 64,
    frames: int = 17,
    velocity: Sequence[float | int] = (1.0, 0.0),
    seed: int = 0,
    zoom_out: int = 2,
) -> tuple[Float[Tensor, "c f h w"], Float[Tensor, "xy f h w"]]:
    """A photograph passing by at `velocity` (x, y) px a frame, and where each pixel's point is in the next frame.

    A pixel is the exact mean over the `zoom_out` x `zoom_out` photograph pixels below it, also at fractions of a pixel,
    so every frame is equally sharp and the flow is exact; the seed chooses where the pan starts.
    """
    picture = photograph(photo) if isinstance(photo, str) else photo
    if picture.ndim != 3 or size < 1 or frames < 1 or zoom_out < 1:
        got = f"{tuple(picture.shape)}, {size}, {frames}, {zoom_out}"
        raise ValueError(f"pan takes a photograph 'c h w' and positive size, frames and zoom_out, got {got}.")
    travel = [-v * zoom_out * (frames - 1) for v in velocity]  # of the window, in photograph pixels
    sides = picture.shape[2], picture.shape[1]
    room = [have - size * zoom_out - abs(go) for have, go in zip(sides, travel, strict=True)]
    if min(room) < 0:
        raise ValueError(
            f"A pan of {frames} frames of {size} px at {tuple(velocity)} px a frame lacks {-min(room):.0f} px in "
            "the photograph: take fewer frames, a smaller size, a slower velocity or a smaller zoom_out."
        )
    rng = np.random.default_rng(seed)
    start = [rng.uniform(0, r) + max(0.0, -go) for r, go in zip(room, travel, strict=True)]
    clip = torch.empty(picture.shape[0], frames, size, size)
    for i in range(frames):
        x, y = (s - v * zoom_out * i for s, v in zip(start, velocity, strict=True))
        x0, across = _box(x, size, zoom_out, sides[0])
        y0, down = _box(y, size, zoom_out, sides[1])
        window = picture[:, y0 : y0 + down.shape[1], x0 : x0 + across.shape[1]]
        clip[:, i] = down @ window @ across.T
    flow = torch.tensor(velocity, dtype=torch.float32).view(2, 1, 1, 1).expand(2, frames, size, size).clone()
    return clip.clamp_(-1, 1), flow


def _box(start: float, size: int, width: int, length: int) -> tuple[int, Tensor]:
    """First source pixel and the weights `size x source` that average [start + i width, start + (i + 1) width]."""
    first = min(int(start), length - 1)
    last = min(int(np.ceil(start + size * width - 1e-9)), length)
    left = start + width * torch.arange(size, dtype=torch.float64)[:, None]
    pixel = torch.arange(first, last, dtype=torch.float64)
    overlap = (torch.minimum(left + width, pixel + 1) - torch.maximum(left, pixel)).clamp(min=0)
    return first, (overlap / overlap.sum(1, keepdim=True)).float()
