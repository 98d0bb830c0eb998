"""Real factors as m / 2^c: multiply two integers, add half, shift. And the guard that proves that nothing else was done.

    round(M acc)  becomes  (acc m + 2^(c-1)) >> c        >> rounds down for both signs, so halves go up for both
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from ...core.baselines.vq import straight

WIDTH = 31  # bits of a multiplier: with accumulators below 2^31 the product fits into int64


class Dyadic(NamedTuple):
    """The number m / 2^c, or a tensor of them; both int64."""

    m: Tensor
    c: Tensor

    @property
    def real(self) -> Float[Tensor, "..."]:
        """Its value in float64, for looking at."""
        return self.m.double() * 0.5 ** self.c.double()


def dyadic(real: Float[Tensor, "*n"], width: int = WIDTH) -> Dyadic:
    """The nearest m / 2^c with m of `width` bits: real = f 2^e with f in [0.5, 1), m = floor(f 2^width + 1/2), c = width - e.

    Worked out before inference. f >= 1/2 makes the relative error at most 2^-width. Few bits for a large number would
    shift to the left: then m gets the zeros, and c is 1. Raises ValueError for numbers that aren't positive, and outside
    [2^-31, 2^30).
    """
    if not 1 <= width <= WIDTH:
        raise ValueError(f"a multiplier has 1 to {WIDTH} bits, got {width}: a longer one could overflow int64")
    if not (torch.isfinite(real).all() and (real > 0).all()):
        raise ValueError("a dyadic factor is a quotient of steps, so positive and finite: is a layer's range 0 or not recorded?")
    f, e = torch.frexp(real.double())
    m, c = torch.floor(f * 2.0**width + 0.5).long(), width - e.long()
    if e.min() < -30 or e.max() > 30:
        raise ValueError(f"factors lie in [2^-31, 2^30), got {real.min():.3g} to {real.max():.3g}: are two ranges so far apart?")
    return Dyadic(m << (1 - c).clamp(min=0), c.clamp(min=1))


def rescale(acc: Integer[Tensor, "..."], by: Dyadic) -> Int[Tensor, "..."]:
    """round(acc m / 2^c), halves up, in int64 (int32 would overflow, float64 lose bits). by: broadcasts with acc."""
    half = torch.ones_like(by.c) << (by.c - 1)
    return (acc.to(torch.int64) * by.m + half) >> by.c


class Rescale(nn.Module):
    """`rescale` by factors that are kept with the model."""

    def __init__(self, by: Dyadic):
        super().__init__()
        self.register_buffer("m", by.m), self.register_buffer("c", by.c.to(torch.int8))

    def forward(self, acc: Integer[Tensor, "..."]) -> Int[Tensor, "..."]:
        return rescale(acc, Dyadic(self.m, self.c.long()))


def nearest(x: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """The nearest whole number, halves up as in `rescale` (`torch.round` takes halves to even). Its gradient is 1."""
    return straight(torch.floor(x + 0.5), x)


class IntegersOnly(TorchDispatchMode):
    """While it is on, every operation that reads or makes a floating-point number, or divides, raises ValueError.

    seen: the names of the operations that ran
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, out = func.overloadpacket.__name__, func(*args, **(kwargs or {}))
        if any(word in name for word in ("div", "remainder", "fmod", "reciprocal", "mean", "avg_pool")):
            raise ValueError(f"an integer graph doesn't divide, but {name} did")
        for leaf in tree_iter((args, kwargs, out)):
            if isinstance(leaf, float) or isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex()):
                raise ValueError(f"an integer graph has no floating point, but {name} met {getattr(leaf, 'dtype', leaf)}")
        self.seen.append(name)
        return out


def pack4(codes: Integer[Tensor, "*n"]) -> Int[Tensor, "m"]:
    """Codes in [-8, 7], eight in an int32, the first in its lowest four bits."""
    if codes.numel() % 8 or codes.numel() and not -8 <= int(codes.min()) <= int(codes.max()) <= 7:
        raise ValueError(f"packs a multiple of 8 codes in [-8, 7], got {codes.numel()} in [{codes.min()}, {codes.max()}]")
    places = 4 * torch.arange(8, device=codes.device)
    words = ((codes.reshape(-1, 8).long() & 15) << places).sum(1)  # 15: the low half of two's complement, sign and all
    return (words - ((words >> 31) << 32)).to(torch.int32)  # a word from 2^31 on is a negative int32


def unpack4(packed: Int[Tensor, "m"]) -> Int[Tensor, "n"]:
    """The codes that `pack4` wrote, as int8. The fourth bit is the sign and must be stretched over the other four."""
    places = 4 * torch.arange(8, device=packed.device)
    codes = (packed[:, None].long() >> places) & 15
    return (codes - ((codes & 8) << 1)).flatten().to(torch.int8)
