"""A model over discrete codes: it says, for the cells of the next block, how likely each code is.

    logits = model(x, None, cond, cache=None)        x: input codes `b f h w`; logits `b K f h w`

What is unusual here: next-block prediction (Ren et al. 2025, arXiv 2502.07737). Cells follow each other in raster order
and are cut into blocks of L; what stands at the l-th cell of a block is the code of the l-th cell of the block *before*
(`shift`), and all L cells are predicted at once. L = 1 is the ordinary next-token model, L = 8 here a row of a frame,
L = all cells a single guess.

    log p(codes) = sum over blocks m, cells l of log p(code[m, l] | blocks before m, caption)

Differs from the paper: rotary positions instead of learnt ones; the first block begins with a learnt vector a cell.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from .model import Cond, Context, Trunk, words
from .text import TextEncoder
from .where import Where


class Cells(nn.Module):
    """The inlet: codes become vectors, places are those of the cells that they help to predict.

    codes: number K of codes; the number K itself means "nothing yet" and gives the learnt start vector of its cell
    side:  rows and columns of a whole frame, so that a call may bring any run of cells, beginning at frame `cond.start`
    block: cells L of a block; set it to another value for another model of the same weights
    """

    def __init__(self, codes: int, d: int, side: tuple[int, int] = (8, 8), block: int = 8):
        super().__init__()
        self.codes, self.side, self.block = codes, tuple(side), block
        self.code = nn.Embedding(codes, d)
        self.start = nn.Parameter(0.5 * torch.randn(side[0] * side[1], d))
        nn.init.normal_(self.code.weight, std=0.5)

    def forward(self, x: Int[Tensor, "b f h w"], t, cond: Cond):
        check_codes(x, self.codes + 1)
        n, cells = x[0].numel(), len(self.start)
        flat, place = rearrange(x, "b f h w -> b (f h w)"), self.places(n, cond.start, x.device)
        if n % self.block:
            raise ValueError(f"{tuple(x.shape[1:])} = {n} cells don't divide into blocks of {self.block}")
        vectors = torch.where(
            (flat == self.codes)[..., None], self.start[place % cells], self.code(flat.clamp(max=self.codes - 1))
        )
        row, width = place % cells // self.side[1], self.side[1]
        coords = torch.stack([place // cells, row, place % width], -1).float()[None]
        return vectors, Where(coords, (place // self.block)[None], grid=tuple(x.shape[1:])), t

    def places(self, n: int, start: float | int, device=None) -> Int[Tensor, "n"]:
        """Raster numbers of n cells from frame `start` on (with parts of a frame: 2.25 is row 2 of 8 in frame 2)."""
        return torch.arange(n, device=device) + round(start * self.side[0] * self.side[1])


def check_codes(x: Tensor, limit: int) -> None:
    """Raise unless x is a grid of integers `b f h w` in [0, limit)."""
    if x.ndim != 4 or x.is_floating_point():
        raise ValueError(f"codes are integers 'b f h w', got {x.dtype} of shape {tuple(x.shape)}")
    if int(x.min()) < 0 or int(x.max()) >= limit:
        raise ValueError(f"codes lie in [0, {limit}), got values from {int(x.min())} to {int(x.max())}")


def shift(codes: Int[Tensor, "b f h w"], block: int, start: int) -> Int[Tensor, "b f h w"]:
    """The inputs that predict `codes`: one block of `start` numbers, then all blocks but the last."""
    flat = codes.flatten(1)
    first = torch.full_like(flat[:, :block], start)
    return torch.cat([first, flat[:, : flat.shape[1] - block]], 1).view_as(codes)


class TokenModel(nn.Module):
    """`model(x, t, cond, cache=None) -> logits`; t is not looked at. A plain pre-norm decoder with grouped heads.

    codes:     number K of codes
    key_heads: heads of keys and values; each serves heads / key_heads query heads
    side, block: rows and columns of a frame, cells of a block (see `Cells`)
    """

    def __init__(self, codes: int = 256, d: int = 128, depth: int = 4, heads: int = 4, key_heads: int = 2,
                 side: tuple[int, int] = (8, 8), block: int = 8):
        super().__init__()
        self.codes = codes
        self.inlet, self.text = Cells(codes, d, side, block), TextEncoder(d)
        self.trunk = Trunk(d, depth, heads, key_heads)
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, codes)
        for layer in self.trunk.blocks:  # no time to modulate by: gates start open
            nn.init.ones_(layer.table[2]), nn.init.ones_(layer.table[5])

    def forward(self, x: Int[Tensor, "b f h w"], t, cond: Cond, cache=None) -> Float[Tensor, "b K f h w"]:
        tokens, where, _ = self.inlet(x, t, cond)
        ctx = Context(where, None, *words(self.text, cond), cache, cond)
        f, h, w = where.grid
        return rearrange(self.head(self.norm(self.trunk(tokens, ctx))), "b (f h w) k -> b k f h w", f=f, h=h)

    def predict(self, codes: Int[Tensor, "b f h w"], cond: Cond) -> Float[Tensor, "b K f h w"]:
        """Logits of every cell of `codes`, each from the blocks before its own (teacher forcing), all in one pass."""
        check_codes(codes, self.codes)
        return self(shift(codes, self.inlet.block, self.codes), None, cond)


def nll(logits: Float[Tensor, "b K f h w"], codes: Int[Tensor, "b f h w"]) -> Float[Tensor, "b f h w"]:
    """Negative log-likelihood of each cell in nats; its mean trains, its mean / log 2 is bits a token."""
    return F.cross_entropy(logits, codes, reduction="none")


def choose(logits: Float[Tensor, "b K n"], temperature: float | int = 1.0, generator=None) -> Int[Tensor, "b n"]:
    """One code a cell, each cell by itself: softmax(logits / temperature); temperature 0 takes the likeliest."""
    if temperature == 0:
        return logits.argmax(1)
    p = rearrange((logits / temperature).softmax(1), "b k n -> (b n) k")
    return rearrange(torch.multinomial(p, 1, generator=generator), "(b n) 1 -> b n", b=len(logits))


@torch.no_grad()
def generate(model, frames: int, cond: Cond, prompt: Int[Tensor, "b p h w"] | None = None, cache=None,
             temperature: float | int = 1.0, generator=None, b: int = 1) -> Int[Tensor, "b f h w"]:
    """Codes of `frames` frames, block by block. The blocks of `prompt` (whole blocks, b samples) are taken as given.

    cache: keeps the keys of the blocks that were fed, so each block costs one pass over L cells; None computes the past
           anew each time (slower, the same numbers). b: samples, where neither a prompt nor a caption says it.
    """
    inlet, (h, w) = model.inlet, model.inlet.side
    block, n = inlet.block, frames * h * w
    given = prompt.flatten(1) if prompt is not None else None
    b = len(given) if given is not None else (len(cond.text) if cond.text is not None else b)
    known = given.shape[1] if given is not None else 0
    if n % block or known % block:
        raise ValueError(f"{n} cells, and the prompt's {known}, must divide into blocks of {block}")
    device = inlet.start.device
    fed = torch.full((b, n + block), model.codes, device=device)  # the start block, then what has been said
    if known:
        fed[:, block : block + known] = given
    # With a cache one pass reads the whole prompt: block-causal attention writes all of its blocks at once.
    for at in [*range(known, n, block)]:
        first = 0 if cache is None or at == known else at
        told = cond.at(at // block, first / (h * w))
        x = fed[:, first : at + block].reshape(b, 1, -1, block)
        if cache is not None:
            cache.open(at // block, told)
            cache.writing = True
        logits = model(x, None, told, cache)
        if cache is not None:
            cache.writing = False
            cache.close(at // block)
        fed[:, at + block : at + 2 * block] = choose(logits.flatten(2)[..., -block:], temperature, generator)
    return rearrange(fed[:, block:], "b (f h w) -> b f h w", h=h, w=w)
