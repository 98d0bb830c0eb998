"""Quantisers that stand between encoder and decoder: finite scalar quantisation, and codebooks that learn.

    bottleneck(z) -> z_q, codes, losses        lookup(codes) -> z_q        z: `b c f h w`, a vector of c numbers a cell

Codes are a list of `Codes(index, where)`, one a grid; losses are named and already weighted.

What is unusual here: the search for the nearest code never holds a table of all distances; running means and restarts of
codes are those of the whole batch, however many processes share it, and random choices are functions of a counter that is
saved with the codebook, so a resumed training draws the same; `VQ.table` may be overridden by another way to make the codes.
"""

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..where import Where, grid
from .critics import everyone

ROOM = 2**20  # numbers in one piece of a table of distances: 4 MB, which stays in a processor's cache


class Codes(NamedTuple):
    """One grid of code numbers `b f h w`, and the places of its cells in frame-major order."""

    index: Tensor
    where: Where


def straight(value: Float[Tensor, "*shape"], x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The straight-through estimator: `value` forwards (to the bit, unlike x + (value - x)), the gradient of x backwards."""
    return value.detach() + (x - x.detach())


@torch.no_grad()
def nearest(x: Float[Tensor, "*b n d"], table: Float[Tensor, "*b k d"]) -> Int[Tensor, "*b n"]:
    """Which row of `table` is nearest to each row of x. Memory beside x grows with n, not with n k.

    |x - e|^2 = |x|^2 - 2 (x.e - |e|^2 / 2), and |x|^2 is the same for all e: |e|^2 / 2 rides along as one more coordinate, so a
    piece of the search is one matrix product, in float32 at least (autocast off: half precision loses near ties).
    """
    if table.numel() == 0 or x.shape[-1] != table.shape[-1]:
        raise ValueError(f"vectors 'n d' and a table 'k d' share d, and k >= 1; got {tuple(x.shape)}, {tuple(table.shape)}")
    with torch.autocast(x.device.type, enabled=False):
        kind = torch.promote_types(torch.promote_types(x.dtype, table.dtype), torch.float32)
        middle = table.to(kind).mean(-2, keepdim=True)  # a far-off origin would cost digits
        e = table - middle
        e = torch.cat([e, -0.5 * e.square().sum(-1, keepdim=True)], -1).mT
        pieces = x.split(max(1, ROOM // e[..., 0, :].numel()), -2)
        return torch.cat([(F.pad(p - middle, (0, 1), value=1) @ e).argmax(-1) for p in pieces], -1)


def sums(x: Float[Tensor, "n d"], index: Int[Tensor, "n"], k: int) -> tuple[Float[Tensor, "k d"], Float[Tensor, "k"]]:
    """Sum and number of the vectors that each of k codes stands for."""
    return x.new_zeros(k, x.shape[1]).index_add_(0, index, x), torch.bincount(index, minlength=k).to(x.dtype)


@torch.no_grad()
def kmeans(
    x: Float[Tensor, "*b n d"], k: int, generator: torch.Generator, rounds: int = 10, start: Tensor | None = None
) -> tuple[Float[Tensor, "*b k d"], Int[Tensor, "*b n"]]:
    """Centres of k clusters and the cluster of each vector, for every batch entry by itself (Lloyd's algorithm).

    start: centres to begin with, `*b k d`; None draws them by k-means++ (Arthur & Vassilvitskii 2007: each next one far from
    those before). An emptied cluster takes the vector that is farthest from its centre. Raises ValueError when k > n.
    """
    if not 1 <= k <= x.shape[-2]:
        raise ValueError(f"{x.shape[-2]} vectors can't form {k} clusters: 1 <= k <= n")
    if x.ndim > 2:
        starts = [None] * len(x) if start is None else start
        both = [kmeans(a, k, generator, rounds, b) for a, b in zip(x, starts, strict=True)]
        return torch.stack([c for c, _ in both]), torch.stack([i for _, i in both])
    centres = _spread(x, k, generator) if start is None else start.clone()
    index = nearest(x, centres)
    for _ in range(rounds):
        total, count = sums(x, index, k)
        centres = torch.where(count[:, None] > 0, total / count[:, None].clamp(min=1), centres)
        if (empty := (count == 0).nonzero()[:, 0]).numel():
            centres[empty] = x[(x - centres[index]).square().sum(-1).topk(len(empty)).indices]
        index = nearest(x, centres)
    return centres, index


def _spread(x: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """k rows of x, each drawn with probability proportional to its squared distance from the nearest one before."""
    rows, far = [torch.randint(len(x), (1,), generator=generator, device=x.device)], torch.full_like(x[:, 0], torch.inf)
    for _ in range(k - 1):
        far = torch.minimum(far, (x - x[rows[-1]]).square().sum(-1))
        chance = far if far.sum() > 0 else torch.ones_like(far)  # fewer distinct vectors than clusters
        rows.append(torch.multinomial(chance, 1, generator=generator))
    return x[torch.cat(rows)].clone()


def _checked(z: Tensor, channels: int) -> None:
    if z.ndim != 5 or z.shape[1] != channels:
        raise ValueError(f"this bottleneck takes 'b {channels} f h w', got {tuple(z.shape)}")


class FSQ(nn.Module):
    """Finite scalar quantisation: every channel is rounded to a few levels; the codebook is their product and cannot collapse.

    Mentzer et al. 2023, arXiv 2309.15505. levels (4, 4, 4, 4) make 256 codes of 4 channels. Values come out in [-1, 1].
    """

    def __init__(self, levels: tuple[int, ...] = (4, 4, 4, 4)):
        super().__init__()
        self.register_buffer("levels", torch.tensor(levels), persistent=False)
        self.register_buffer("digit", torch.tensor([1, *levels]).cumprod(0)[:-1], persistent=False)

    @property
    def size(self) -> int:
        """Number of codes."""
        return int(self.levels.prod())

    def forward(self, z: Float[Tensor, "b c f h w"]):
        _checked(z, len(self.levels))
        n = self.levels.view(-1, 1, 1, 1)
        # An even number of levels has no level at 0: tanh is shifted by half a step so that rounding still gives n levels.
        shift, half = (n % 2 == 0) * 0.5, (n - 1) * 0.5 * 1.001
        bounded = torch.tanh(z + torch.atanh(shift / half)) * half - shift
        rounded = straight(bounded.round(), bounded)
        index = ((rounded.detach() + n // 2).long() * self.digit.view(-1, 1, 1, 1)).sum(1)
        return rounded / (n // 2), [Codes(index, grid(*index.shape[1:], device=z.device))], {}

    def lookup(self, codes: list[Codes]) -> Float[Tensor, "b c f h w"]:
        """The values that the codes stand for."""
        n = self.levels.view(-1, 1, 1, 1)
        index = rearrange(codes[0].index, "b f h w -> b 1 f h w") // self.digit.view(-1, 1, 1, 1) % n
        return (index - n // 2) / (n // 2)


class VQ(nn.Module):
    """A codebook: each cell's vector becomes the nearest of k codes (van den Oord et al. 2017, arXiv 1711.00937, eq. 1-3).

        losses: commit = beta mean (x - sg e)^2,  codebook = mean (sg x - e)^2 (gradient learning only)

    k, d:    number of codes, and numbers in each: the channels of z
    unit:    compare directions: z and codes are divided by their norms first (Yu et al. 2021, arXiv 2110.04627), and z_q is
             a unit vector
    decay:   None: codes learn by gradient. A number: code = total / count, running means over training passes of the
             vectors that it stands for (appendix A.1); `count` 1 is a fair share, n / k vectors a pass
    restart: a code whose count falls below this becomes a random vector of the pass (with `decay`; Dhariwal et al. 2020,
             arXiv 2005.00341, section 3)
    """

    def __init__(self, k: int, d: int, beta: float | int = 0.25, unit: bool = False, decay: float | None = None,
                 restart: float | int = 0, seed: int = 0):
        super().__init__()
        if restart and decay is None:
            raise ValueError("restart needs the counts that decay keeps: give a decay, say 0.99")
        self.size, self.d, self.beta, self.unit = k, d, beta, unit
        self.decay, self.restart, self.seed = decay, restart, seed
        codes = torch.randn(k, d, generator=torch.Generator().manual_seed(seed)) * d**-0.5  # norms near 1
        codes = F.normalize(codes, dim=-1) if unit else codes
        if decay is None:
            self.codes = nn.Parameter(codes)
        else:
            self.register_buffer("codes", codes), self.register_buffer("total", codes.clone())
            self.register_buffer("count", torch.ones(k)), self.register_buffer("passes", torch.tensor(0))

    @property
    def table(self) -> Float[Tensor, "k d"]:
        """The codes that z is compared with."""
        return F.normalize(self.codes, dim=-1) if self.unit else self.codes

    def cells(self, z: Float[Tensor, "b d f h w"]) -> Float[Tensor, "n d"]:
        """One vector a cell, of length 1 where only directions count."""
        _checked(z, self.d)
        x = rearrange(z, "b d f h w -> (b f h w) d")
        return F.normalize(x, dim=-1) if self.unit else x

    @torch.no_grad()
    def begin(self, z: Float[Tensor, "b d f h w"]) -> None:
        """Set the codes to the centres of k clusters of these features (in every process the same)."""
        x = self.cells(z)
        centres, _ = kmeans(x, self.size, torch.Generator(x.device).manual_seed(self.seed))
        self.codes.copy_(F.normalize(centres, dim=-1) if self.unit else centres)
        if self.decay is not None:
            self.total.copy_(self.codes), self.count.fill_(1)

    def search(self, z: Float[Tensor, "b d f h w"]) -> list[Codes]:
        """The codes of z, with nothing learnt from it."""
        return self._named(nearest(self.cells(z), self.table), z)

    def _named(self, index: Tensor, z: Tensor) -> list[Codes]:
        b, _, f, h, w = z.shape
        return [Codes(index.view(b, f, h, w), grid(f, h, w, device=z.device))]

    def forward(self, z: Float[Tensor, "b d f h w"]):
        x, table = self.cells(z), self.table
        index = nearest(x, table)
        code = F.embedding(index, table)
        losses = {"commit": self.beta * (x - code.detach()).square().mean()}
        if self.decay is None:
            losses["codebook"] = (x.detach() - code).square().mean()
        elif self.training:
            self.follow(x.detach(), index)
        b, _, f, h, _ = z.shape
        out = rearrange(straight(code, x), "(b f h w) d -> b d f h w", b=b, f=f, h=h)
        return out, self._named(index, z), losses

    def lookup(self, codes: list[Codes]) -> Float[Tensor, "b d f h w"]:
        """What the codes stand for."""
        return rearrange(F.embedding(codes[0].index, self.table), "b f h w d -> b d f h w")

    @torch.no_grad()
    def follow(self, x: Float[Tensor, "n d"], index: Int[Tensor, "n"]) -> None:
        """Move the codes to the running means of what they stand for, then restart those that stand for too little."""
        x = x.to(self.total)  # sums in half precision would lose most of what they add
        total, count = sums(x, index, self.size)
        seen = torch.cat([total, count[:, None]], 1)
        if dist.is_initialized():
            dist.all_reduce(seen)
        seen *= self.size / seen[:, -1].sum()
        self.total.lerp_(seen[:, :-1], 1 - self.decay), self.count.lerp_(seen[:, -1], 1 - self.decay)
        mean = self.total / self.count[:, None].clamp(min=1e-8)
        mean = F.normalize(mean, dim=-1) if self.unit else mean
        self.codes.copy_(torch.where(self.count[:, None] > 1e-8, mean, self.codes))  # a code never chosen stays where it is
        self.passes += 1
        dead = (self.count < self.restart).nonzero()[:, 0]
        if len(dead):
            x = everyone(x)
            dice = torch.Generator(x.device).manual_seed(self.seed * 1_000_003 + int(self.passes))
            rows = torch.randperm(len(x), generator=dice, device=x.device)[: len(dead)]
            dead = dead[: len(rows)]
            # A whole fair share: a newcomer has a few times 1 / (1 - decay) passes to be chosen before it can die again.
            self.codes[dead], self.total[dead], self.count[dead] = x[rows], x[rows], 1.0


class ResidualVQ(nn.Module):
    """Codebooks in a row, each for what those before left over (Zeghidour et al. 2021, arXiv 2107.03312, algorithm 1).

    One grid of codes a codebook; `lookup` of the first m grids alone gives a coarser z_q.
    """

    def __init__(self, *stages: VQ):
        super().__init__()
        self.stages = nn.ModuleList(stages)

    @property
    def size(self) -> int:
        """Number of combinations of codes."""
        return math.prod(stage.size for stage in self.stages)

    @torch.no_grad()
    def begin(self, z: Float[Tensor, "b d f h w"]) -> None:
        """`VQ.begin` of each codebook on what is left for it."""
        for stage in self.stages:
            stage.begin(z)
            z = z - stage.lookup(stage.search(z))

    def forward(self, z: Float[Tensor, "b d f h w"]):
        whole, grids, losses = torch.zeros_like(z), [], {}
        for stage in self.stages:
            part, codes, more = stage(z - whole)
            whole, grids = whole + part.detach(), grids + codes
            losses = {name: losses.get(name, 0) + value for name, value in more.items()}
        return straight(whole, z), grids, losses

    def lookup(self, codes: list[Codes]) -> Float[Tensor, "b d f h w"]:
        """Sum of what the grids stand for; fewer grids than codebooks give a coarser answer."""
        return torch.stack([stage.lookup([one]) for stage, one in zip(self.stages, codes, strict=False)]).sum(0)
