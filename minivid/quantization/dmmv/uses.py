"""Three tasks as min-max problems: weights of few bits, discrete tomography, filters with short coefficients."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy import ndimage
from scipy.signal import remez
from torch import Tensor, nn

from ...core.baselines.quant import QuantisedLinear, Steps
from ...core.surgery import record, swap
from .solver import Array, MinMax, Search

# --- use 1: weights of few bits -------------------------------------------------------------------------------------------


class Inputs:
    """Gathers what a layer gets, `rows i`, for `core.surgery.record`."""

    def __init__(self):
        self.seen: list[Tensor] = []

    def add(self, x: Float[Tensor, "*n i"]) -> None:
        self.seen.append(x.detach().reshape(-1, x.shape[-1]))

    @property
    def rows(self) -> Float[Tensor, "K i"]:
        return torch.cat(self.seen)


def layer(
    w: Float[Tensor, "o i"], x: Float[Tensor, "K i"], s: Steps, start: Int[Tensor, "o i"], how: Search, seed: int = 0,
    own: Bool[Tensor, "o i"] | None = None,
) -> Int[Tensor, "o i"]:  # fmt: skip
    """Codes of a weight: one problem a row of w, A = x, b = x w. The largest error of an output over the K inputs is made small.

    s: a grid for each row `o 1`; start: codes to begin with; own: outliers, which keep their value, so their codes stay
    """
    codes, a = start.clone(), x.double().numpy()
    for o, row in enumerate(w.double().numpy()):
        free = slice(None) if own is None else ~own[o].numpy()
        levels = (s.offset[o] + s.step[o] * torch.arange(s.low, s.high + 1)).double().numpy()
        problem = MinMax(a[:, free], a[:, free] @ row[free], levels)
        z = start[o].numpy()[free] - s.low
        codes[o, torch.ones(len(row), dtype=torch.bool) if own is None else ~own[o]] = torch.from_numpy(
            problem.search(z, how, seed + o).codes + s.low
        ).int()
    return codes


Choose = Callable[[nn.Linear, Tensor], tuple[Tensor, Steps]]


def quantised(model: nn.Module, names: Iterable[str], batches: Sequence, choose: Choose) -> nn.Module:
    """The model with the named linear layers in few bits, one after the other, each seeing the inputs that those before left.

    choose: (layer, inputs `K i`) -> codes and a grid that fp16 keeps (`Steps.stored`). The original stays as it is.
    """
    layers = dict(model.named_modules())
    for name in names:
        record(model, batches, {name: (seen := Inputs())})
        codes, s = choose(layers[name], seen.rows)
        model = swap(model, {name: QuantisedLinear(codes, s, layers[name].bias)})
    return model


# --- use 2: discrete tomography -------------------------------------------------------------------------------------------


def projections(side: int, angles: int) -> Float[Array, "K n"]:
    """Parallel rays through a picture of side x side pixels: its columns' sums after it was turned by 0 ... 180 degrees.

    The turned picture is read by bilinear interpolation; `side` rays an angle, K = angles side, n = side^2.
    """
    at = np.arange(side) - (side - 1) / 2
    u, v = np.meshgrid(at, at, indexing="ij")
    tent = lambda place: np.maximum(0, 1 - np.abs(place[..., None] - at))
    turns = [(np.cos(a), np.sin(a)) for a in np.pi * np.arange(angles) / angles]
    views = [np.einsum("uvi,uvj->vij", tent(c * u + s * v), tent(c * v - s * u)) for c, s in turns]
    return np.concatenate(views).reshape(angles * side, -1)


def sart(
    A: Float[Array, "K n"], b: Float[Array, "K"], angles: int, rounds: int = 100, most: float = 1.0,
    x: Float[Array, "n"] | None = None,
) -> Float[Array, "n"]:  # fmt: skip
    """Pixels in [0, most] by simultaneous algebraic reconstruction, an angle at a time (Andersen & Kak 1984), from x or zeros."""
    x = np.zeros(A.shape[1]) if x is None else x
    views = [(part, y) for part, y in zip(np.split(A, angles), np.split(b, angles), strict=True)]
    for _ in range(rounds):
        for part, y in views:
            gap = (y - part @ x) / np.maximum(part.sum(1), 1e-9)
            x = np.clip(x + part.T @ gap / np.maximum(part.sum(0), 1e-9), 0, most)
    return x


def dart(
    problem: MinMax, angles: int, x: Float[Array, "n"], rounds: int = 50, free: float = 0.5, inner: int = 1, seed: int = 0
) -> Int[Array, "n"]:
    """Codes of a square picture by discrete algebraic reconstruction (Batenburg & Sijbers 2011), the classic of black and white.

    A round sets every pixel to its nearest level, then frees those with another level among their eight neighbours, and each
    other one with probability `free`; SART goes on over the free pixels alone, the others stay at their level.

    x: where to begin, grey (SART's answer); inner: SART's rounds in each round
    """
    dice, side = np.random.default_rng(seed), round(len(x) ** 0.5)
    for _ in range(rounds):
        flat = problem.levels[problem.nearest(x)]
        square = flat.reshape(side, side)
        edge = ndimage.maximum_filter(square, 3, mode="nearest") != ndimage.minimum_filter(square, 3, mode="nearest")
        loose = edge.ravel() | (dice.random(len(x)) < free)
        rest = problem.b - problem.A[:, ~loose] @ flat[~loose]
        x = flat.copy()
        x[loose] = sart(problem.A[:, loose], rest, angles, inner, problem.levels[-1], flat[loose])
    return problem.nearest(x)


# --- use 3: filters with short coefficients -------------------------------------------------------------------------------


def fir(order: int, bits: int, edges: tuple[float, float] = (0.4, 0.5)) -> tuple[MinMax, Float[Array, "n"]]:
    """A low-pass filter of even order L and p bits as a problem, and the real coefficients of Parks and McClellan.

    H(w) = h_0 + 2 sum_m h_m cos(m w) = 1 below the first edge, 0 above the second (Nyquist is 1), on 16 L frequencies; t is
    the ripple. x = (h_M ... h_1, h_0), M = L / 2, each k / 2^(p-1). Raises ValueError for an odd order or edges out of order.
    """
    if order < 2 or order % 2 or not 0 < edges[0] < edges[1] < 1:
        raise ValueError(f"a filter takes an even order and edges 0 < pass < stop < 1, got {order} and {edges}")
    share = edges[0] / (edges[0] + 1 - edges[1])
    first = round(16 * order * share)
    w = np.r_[np.linspace(0, edges[0], first), np.linspace(edges[1], 1, 16 * order - first)]
    levels = np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1)) / 2 ** (bits - 1)
    real = remez(order + 1, [0, *edges, 1], [1, 0], fs=2)[: order // 2 + 1]
    return MinMax(gain(w, order // 2), (w <= edges[0]) * 1.0, levels), real


def gain(w: Float[Array, "K"], half: int) -> Float[Array, "K n"]:
    """Rows (2 cos M w, ..., 2 cos w, 1) for frequencies in units of Nyquist: their product with x is the filter's response."""
    rows = 2 * np.cos(np.pi * w[:, None] * np.arange(half, -1, -1))
    rows[:, -1] = 1
    return rows


def taps(x: Float[Array, "n"]) -> Float[Array, "l"]:
    """All L + 1 coefficients of the symmetric filter."""
    return np.r_[x, x[-2::-1]]
