"""From pixels to regions: soft coverage by saturated colour, connected regions, and regions followed through time.

What is unusual: a region is not a mask. In the colour plane (RGB without its grey part) a pixel with coverage a of a body
lies a times as far from the background as the body's own colour does, so coverage is read as a fraction. Sums over it
give areas and centres that are exact to about a tenth of a pixel, as long as the background is muted.

Everything is an array over a batch; the loops in Python are over bodies, not over pixels.
"""

from dataclasses import dataclass

import numpy as np

from .parts import COLOURS, SIZES

# Two axes of the colour plane: orthonormal and both orthogonal to grey.
PLANE = np.array([[2, -1, -1], [0, 3**0.5, -(3**0.5)]], np.float32).T / 6**0.5
HUES = np.array(list(COLOURS.values()), np.float32) @ PLANE  # colours x 2
LENGTH = np.linalg.norm(HUES, axis=1)
SMALLEST = 0.008  # share of the frame; half of the smallest body
NOISY = 0.2  # median distance of the pixels from the background's colour beyond which nothing is read, in body colours


def coverage(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Soft coverage by the pixel's nearest colour (b f h w), the number of that colour, and whether each clip is
    clear.
    """
    plane = pixels @ PLANE
    ground = np.median(plane[:, ::2].reshape(len(plane), -1, 2), axis=1)[:, None, None, None]
    plane -= ground
    spread = np.median(np.abs(plane[:, ::2]).sum(-1).reshape(len(plane), -1), axis=1)
    aim = plane @ (HUES / LENGTH[:, None]).T
    hue = aim.argmax(-1)
    cover = np.take_along_axis(aim, hue[..., None], -1)[..., 0] / LENGTH[hue]
    return cover, hue, spread < NOISY * LENGTH.mean()


@dataclass
class Regions:
    """Connected saturated regions of all frames of all clips: one value a region."""

    clip: np.ndarray
    frame: np.ndarray
    hue: np.ndarray
    mass: np.ndarray  # px, sum of the coverage
    x: np.ndarray
    y: np.ndarray
    rgb: np.ndarray  # n x 3, mean of the inside
    window: np.ndarray  # n x side x side, coverage by this region alone
    corner: np.ndarray  # n x 2, column and row of the window's first pixel


def regions(pixels: np.ndarray, cover: np.ndarray, hue: np.ndarray, clear: np.ndarray) -> Regions:
    from scipy import ndimage  # here, because it takes long to import

    b, f, size, _ = cover.shape
    some = size * f // 2
    top = np.partition(cover.reshape(b, -1), -some, axis=1)[:, -some:].mean(1)
    level = (0.4 * top).clip(0.12, 0.4)[:, None, None, None]  # in dim light the coverage is dim too
    strong = (cover > level) & clear[:, None, None, None]
    least = SMALLEST * size * size
    most = np.stack([(strong & (hue == k)).sum((2, 3)).max(1) for k in range(len(HUES))], 1)
    clip, colour = np.nonzero(most >= least)  # the planes worth looking at: a clip and a colour
    mine = hue[clip] == colour[:, None, None, None]
    in_plane = np.zeros((3, 3, 3), bool)
    in_plane[1] = True
    label, n = ndimage.label((strong[clip] & mine).reshape(-1, size, size), in_plane)
    keep = np.bincount(label.ravel(), minlength=n + 1) >= least
    keep[0] = False
    label = np.where(keep, np.cumsum(keep), 0)[label]
    wide = ndimage.maximum_filter(label, (1, 5, 5))  # two pixels more: there the coverage fades out
    soft = np.where(mine | (cover[clip] < level[clip]), cover[clip], 0).reshape(label.shape)
    soft[(wide == 0) | ((label != wide) & (label != 0))] = 0
    n = int(keep.sum())
    plane, row, column = np.nonzero(wide)
    which, weight = wide[plane, row, column] - 1, soft[plane, row, column]
    mass, x, y = (np.bincount(which, weight * k, n) for k in (1.0, column + 0.5, row + 0.5))
    inside = weight.clip(0) ** 6  # leaves the mixed pixels of the outline out
    colours = pixels[clip[plane // f], plane % f, row, column] * inside[:, None]
    rgb = np.stack([np.bincount(which, channel, n) for channel in colours.T], 1) / np.bincount(which, inside, n)[:, None]
    at = np.zeros(n, int)
    at[which] = plane
    x, y = x / mass, y / mass
    return Regions(clip[at // f], at % f, colour[at // f], mass, x, y, rgb, *_windows(soft, wide, at, x, y))


def _windows(soft: np.ndarray, wide: np.ndarray, plane: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple:
    """The coverage round each region's centre (beyond the frame's edge it is zero), and where each window begins."""
    size = soft.shape[-1]
    side = int(2.7 * SIZES["large"] * size) + 2
    corner = np.stack([np.floor(p - side / 2 + 0.5).astype(int) for p in (x, y)], 1)
    column, row = (corner[:, k, None] + np.arange(side) for k in (0, 1))
    inside = ((row >= 0) & (row < size))[:, :, None] & ((column >= 0) & (column < size))[:, None, :]
    at = (plane[:, None, None], row.clip(0, size - 1)[:, :, None], column.clip(0, size - 1)[:, None, :])
    own = inside & (wide[at] == np.arange(1, len(plane) + 1)[:, None, None])
    return np.where(own, soft[at], 0).astype(np.float32), corner


def tracks(found: Regions, frames: int, size: int) -> list[np.ndarray]:
    """The regions of each body, one number a frame (-1: not seen); bodies are those seen in half of the frames or
    more.
    """
    out = []
    plane = found.clip * len(HUES) + found.hue
    order = np.lexsort((found.frame, plane))
    for group in np.split(order, np.nonzero(np.diff(plane[order]))[0] + 1):
        if not len(group):
            continue
        when = found.frame[group]
        if len(np.unique(when)) == len(group):
            track = np.full(frames, -1)
            track[when] = group
            out.append(track)
        else:
            out += _link([group[when == t] for t in range(frames)], found, size)
    return [track for track in out if (track >= 0).sum() * 2 >= frames]


def _link(groups: list[np.ndarray], found: Regions, size: int) -> list[np.ndarray]:
    """Several regions of one colour: follow each to the nearest in the next frame, at most a quarter of the frame
    away.
    """
    from scipy.optimize import linear_sum_assignment

    tracks: list[np.ndarray] = []
    for t, group in enumerate(groups):
        last = np.array([track[track >= 0][-1] for track in tracks], int)
        far = np.hypot(found.x[group, None] - found.x[last], found.y[group, None] - found.y[last])
        taken = set()
        for i, j in zip(*linear_sum_assignment(far), strict=True):
            if far[i, j] < size / 4:
                tracks[j][t] = group[i]
                taken.add(i)
        for i in set(range(len(group))) - taken:
            tracks.append(np.full(len(groups), -1))
            tracks[-1][t] = group[i]
    return tracks
