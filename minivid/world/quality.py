"""Statistics that tell good clips from bad ones without a network, and the limits beyond which a clip is thrown out.

Measured on pixels in [0, 1]; the limits are meant for 64 x 64 and were set on clean and spoilt clips of this world. Every
statistic is a few lines, because the lesson is what each one can and cannot see: none of them sees a teleport, shuffled frames
or enlarged pixels, and "change" throws out honest clips in which nothing moves.
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d, interpolate

LIMITS = {  # name: (lowest, highest) value of a good clip
    "border": (0, 2.5),  # px of black border: 3 are too many
    "clipped": (0, 0.35),  # share of pixels nearly black or nearly white
    "colour": (0.012, 1),  # mean of max - min over red, green, blue
    "sharpness": (5e-5, math.inf),  # variance of the Laplacian
    "detail": (0.01, 1),  # share of the energy above half the Nyquist frequency, without the mean
    "change": (0.0008, 0.2),  # mean absolute frame difference
    "flicker": (0, 0.05),  # standard deviation of the frames' means
    "writing": (0, 0.1),  # share of 16 blocks that look like text
    "noise": (0, 0.03),  # estimated standard deviation
    "cuts": (0, 0.5),  # how many
}


def quality(clip: Float[Tensor, "c f h w"]) -> dict[str, float]:
    """All statistics of one clip (in [-1, 1]) by the names of LIMITS."""
    x = (clip + 1) / 2
    grey = x.mean(0)
    return {
        "border": float(border(x)),
        "clipped": float(((x > 0.98) | (x < 0.02)).float().mean()),
        "colour": float((x.amax(0) - x.amin(0)).mean()),
        "sharpness": float(_laplace(grey).var()),
        "detail": detail(grey),
        "change": float((x[:, 1:] - x[:, :-1]).abs().mean()) if x.shape[1] > 1 else 0.0,
        "flicker": float(grey.mean((1, 2)).std(correction=0)),
        "writing": writing(grey),
        "noise": noise(grey),
        "cuts": float(len(cut_frames(clip))),
    }


def reject(clip: Float[Tensor, "c f h w"], limits: dict[str, tuple[float, float]] = LIMITS) -> list[str]:
    """The names of the statistics that lie outside their limits; empty for a good clip."""
    found = quality(clip)
    return [name for name, (low, high) in limits.items() if not low <= found[name] <= high]


def border(x: Float[Tensor, "c f h w"]) -> int:
    """Longest run of uniform black lines (std < .01, mean < .03) from one of the four edges, in px."""
    runs = []
    for lines in (x.permute(2, 0, 1, 3), x.permute(3, 0, 1, 2)):
        flat = lines.flatten(1)
        empty = (flat.std(1) < 0.01) & (flat.mean(1) < 0.03)
        for order in (empty, empty.flip(0)):
            runs.append(int(order.int().cumprod(0).sum()))
    return max(runs)


def _laplace(grey: Float[Tensor, "f h w"]) -> Float[Tensor, "f h2 w2"]:
    kernel = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]])
    return conv2d(grey[:, None], kernel[None, None])[:, 0]


def detail(grey: Float[Tensor, "f h w"]) -> float:
    """Share of spectral energy above half the Nyquist frequency (radially), the mean left out."""
    power = torch.fft.fft2(grey, norm="ortho").abs() ** 2
    radius = torch.hypot(torch.fft.fftfreq(grey.shape[1])[:, None], torch.fft.fftfreq(grey.shape[2])[None])
    return float(power[:, radius > 0.25].sum() / power[:, radius > 0].sum().clamp(min=1e-12))


def writing(grey: Float[Tensor, "f h w"]) -> float:
    """Share of the 4 x 4 blocks of the frame in which some row, in most frames, changes the sign of its slope more than 6 times.

    Slopes below .1 don't count: noise and soft texture are no writing.
    """
    slope = grey[:, :, 1:] - grey[:, :, :-1]
    f, h, w = slope.shape
    count = 0
    for rows in slope.tensor_split(4, 1):
        for block in rows.tensor_split(4, 2):
            sign = torch.where(block.abs() > 0.1, block.sign(), torch.zeros(()))
            turns = ((sign[..., 1:] * sign[..., :-1] < 0) | ((sign[..., 1:] != 0) & (sign[..., :-1] == 0))).sum(-1)
            count += int(((turns > 6).any(1)).float().mean() > 0.5)
    return count / 16


def noise(grey: Float[Tensor, "f h w"]) -> float:
    """Immerkaer's estimate of the standard deviation of white noise: a mask blind to planes and edges along the axes."""
    kernel = torch.tensor([[1.0, -2.0, 1.0], [-2.0, 4.0, -2.0], [1.0, -2.0, 1.0]])
    response = conv2d(grey[:, None], kernel[None, None]).abs()
    return float(response.median()) / 0.6745 / 6  # the median: drawn edges are few, noise is everywhere


def difference_hash(clip: Float[Tensor, "c f h w"]) -> Bool[Tensor, "3 64"]:
    """64 bits for each of the first, middle and last frame: is a cell of an 8 x 9 thumbnail brighter than its right neighbour?"""
    f = clip.shape[1]
    grey = clip.mean(0)[[0, f // 2, f - 1]]
    small = interpolate(grey[:, None], (8, 9), mode="area")[:, 0]
    return (small[..., :-1] > small[..., 1:] + 0.01).flatten(1)


def duplicate(one: Bool[Tensor, "3 64"], two: Bool[Tensor, "3 64"], below: float = 6.0) -> bool:
    """Whether two hashes differ in fewer than `below` of 64 bits, averaged over the three frames."""
    return float((one != two).float().sum(1).mean()) < below


def cut_frames(clip: Float[Tensor, "c f h w"], limit: float = 0.25) -> list[int]:
    """First frames of new shots: the colour histogram (8 bins a channel) has moved by over `limit` at step 1, or, for a fade,
    at step 4 (then the middle of the fade). The distance is half the L1 difference, in [0, 1]; neighbours are merged.
    """
    c, f, h, w = clip.shape
    bins = ((clip + 1) * 4).long().clamp(0, 7)
    levels = torch.stack([(bins == level).float().mean((2, 3)) for level in range(8)], -1)  # c f 8

    def moved(step: int) -> list[float]:
        return (0.5 * (levels[:, step:] - levels[:, :-step]).abs().sum(-1)).mean(0).tolist() if f > step else []

    found = [i + 1 for i, d in enumerate(moved(1)) if d > limit]
    for i, d in enumerate(moved(4)):
        if d > 1.4 * limit and not any(i < at <= i + 5 for at in found):
            found.append(i + 2)
    return sorted(at for n, at in enumerate(sorted(found)) if n == 0 or at - sorted(found)[n - 1] > 3)


def block_motion(
    one: Float[Tensor, "c h w"], two: Float[Tensor, "c h w"], block: int = 8, reach: int = 4
) -> tuple[Float[Tensor, "xy rows columns"], Float[Tensor, "rows columns"]]:
    """Whole-pixel motion of each block from frame one to two by exhaustive search, and the mean absolute error that is left.

    Ties go to the shortest vector, so that a uniform block stands still.
    """
    c, h, w = one.shape
    shifts = sorted(
        ((y, x) for y in range(-reach, reach + 1) for x in range(-reach, reach + 1)), key=lambda s: s[0] ** 2 + s[1] ** 2
    )
    wide = torch.nn.functional.pad(two[None], (reach,) * 4, mode="replicate")[0]
    errors = torch.stack(
        [
            avg_pool2d((one - wide[:, reach + y : reach + y + h, reach + x : reach + x + w]).abs().mean(0)[None], block)[0]
            + 1e-6 * n
            for n, (y, x) in enumerate(shifts)
        ]
    )
    error, which = errors.min(0)
    return torch.tensor(shifts, dtype=torch.float32)[which].flip(-1).permute(2, 0, 1), error
