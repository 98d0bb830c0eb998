"""Quantisers that stand between encoder and decoder: finite scalar quantisation, and codebooks learnt by k-means.

Each is a bottleneck `(z: b c f h w) -> z_q, codes, losses` with `lookup(codes) -> z_q`; codes are a list of index grids.
"""

import torch
from einops import rearrange
from torch import Tensor, nn


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
        return int(self.levels.prod())

    def forward(self, z: Tensor):
        n = self.levels.view(-1, 1, 1, 1)
        # An even number of levels has no level at 0: tanh is shifted by half a step so that rounding still gives n levels.
        shift, half = (n % 2 == 0) * 0.5, (n - 1) * 0.5 * 1.001
        bounded = torch.tanh(z + torch.atanh(shift / half)) * half - shift
        rounded = bounded + (bounded.round() - bounded).detach()  # straight through
        codes = ((rounded.detach() + n // 2).long() * self.digit.view(-1, 1, 1, 1)).sum(1)
        return rounded / (n // 2), [codes], {}

    def lookup(self, codes: list[Tensor]) -> Tensor:
        """Index grids `[b f h w]` -> the values `b c f h w` that they stand for."""
        n = self.levels.view(-1, 1, 1, 1)
        index = rearrange(codes[0], "b f h w -> b 1 f h w") // self.digit.view(-1, 1, 1, 1) % n
        return (index - n // 2) / (n // 2)
