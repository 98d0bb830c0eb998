"""A model over layered tokens: all of the coarsest layer first, then the finer ones, each token seeing all before it."""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ...core.baselines.vq import Codes
from ...core.codes import TokenModel, check_codes
from ...core.model import Cond, Guided
from ...core.where import Where
from .layers import Level


class Line(nn.Module):
    """The inlet: all tokens of all layers in a row, the coarsest layer first, each fed where the next one is asked for.

    Codes of a layer follow those of the coarser ones in number; the number behind all of them means "nothing yet".
    """

    def __init__(self, levels: Sequence[Level], cells: tuple[int, int, int], d: int):
        super().__init__()
        grids = [level.grid(*cells) for level in levels]
        counts = torch.tensor([prod(grid) for grid in grids])
        self.grids, self.block, self.codes = grids, 1, sum(level.k for level in levels)
        self.side = (1, int(counts.sum()))
        first = torch.tensor([0, *(level.k for level in levels)]).cumsum(0)
        owner = torch.arange(len(levels)).repeat_interleave(counts)
        self.register_buffer("first", first[owner], persistent=False)  # of each token, the number of its layer's first code
        self.register_buffer("last", first[owner + 1], persistent=False)
        coords = torch.cat([level.places(*grid).coords for level, grid in zip(levels, grids, strict=True)], 1)
        self.register_buffer("coords", coords, persistent=False)
        self.code = nn.Embedding(self.codes + 1, d)
        nn.init.normal_(self.code.weight, std=0.5)
        self.start = nn.Parameter(0.1 * torch.randn(self.side[1], d))

    def asked(self, n: int, start: float | int) -> slice:
        """Which tokens n numbers from `start` (in whole rows) on ask for."""
        first = round(start * self.side[1])
        return slice(first, first + n)

    def forward(self, x: Int[Tensor, "b f h w"], t, cond: Cond):
        check_codes(x, self.codes + 1)
        at = self.asked(x[0].numel(), cond.start)
        number = torch.arange(self.side[1], device=x.device)[None, at]
        return self.code(x.flatten(1)) + self.start[at], Where(self.coords[:, at], number, grid=tuple(x.shape[1:])), t


class Writer(TokenModel):
    """A `TokenModel` over `Line`: it says only codes of the layer that is asked for. `cells`: the finest grid f x h x w."""

    def __init__(self, levels: Sequence[Level], cells: tuple[int, int, int], d: int = 64, depth: int = 3, heads: int = 2):
        super().__init__(sum(level.k for level in levels), d, depth, heads, heads)
        self.inlet = Line(levels, cells, d)

    def forward(self, x: Int[Tensor, "b f h w"], t, cond: Cond, cache=None) -> Float[Tensor, "b K f h w"]:
        logits = super().forward(x, t, cond, cache)
        at, code = self.inlet.asked(x[0].numel(), cond.start), torch.arange(self.codes, device=x.device)[:, None]
        other = (code < self.inlet.first[at]) | (code >= self.inlet.last[at])
        return logits.masked_fill(other.view(self.codes, *x.shape[1:]), -1e4)

    def row(self, codes: list[Codes]) -> Int[Tensor, "b 1 1 n"]:
        """The tokens of all layers in one row, numbered through."""
        flat = torch.cat([grid.index.flatten(1) for grid in codes], 1)
        return (flat + self.inlet.first[: flat.shape[1]])[:, None, None]

    def layers(self, row: Int[Tensor, "b 1 1 n"], levels: Sequence[Level]) -> list[Codes]:
        """The grids of a row that holds whole layers, the first few or all."""
        flat, out = row.flatten(1), []
        flat = flat - self.inlet.first[: flat.shape[1]]
        for level, grid in zip(levels, self.inlet.grids, strict=True):
            if flat.shape[1]:
                own, flat = flat[:, : prod(grid)], flat[:, prod(grid) :]
                out.append(Codes(own.reshape(-1, *grid), level.places(*grid, device=row.device)))
        return out


class Steered(Guided):
    """Guidance for a `Writer`: null + scale (told - null) of the logits. `core.codes.generate` takes it as a model."""

    @property
    def inlet(self) -> Any:
        return self.model.inlet

    @property
    def codes(self) -> Any:
        return self.model.codes
