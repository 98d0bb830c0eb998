"""NBP: predict a block of a video's tokens from the block before, all at once, instead of token after token.

Paper:   Next Block Prediction: Video Generation via Semi-Autoregressive Modeling (2025), arXiv 2502.07737
Kind:    procedure (the target and the mask of a model over codes, and its decoding; the network stays as it is)
Equal:   blocks of one token are next-token prediction: loss, mask, samples; one block of all cells sees everything
Claim:   a token costs more bits the larger the block; with a cache, rows of 8 are said at least 3 times as fast as single tokens;
         and what is made freely gets better before it gets worse: some L > 1 is nearer to true clips than L = 1
Differs: codes of single frames (`tok-q`, 8 x 8 of 256 codes), no 3-D tokenizer; captions reach the tokens by an attention of
         their own, not as a prefix. The cell that is asked for is told by rotary positions and one learnt vector for each cell
         of a frame. BOV and 63 middle tokens are there for every L, so that all L have the same parameters. Inferred: the place
         given to an input is that of its target; blocks across frames go by rows, columns, then frames; sizes, rates, steps

    p(x) = prod_m prod_l p(x[m, l] | blocks before m)            inputs: the order of the cells, moved by L
    [BOV] [x1 ... xL] [m1 ... m(L-1)] [block 2] ... [block M-1]  hybrid: the first L one by one, then xL and the middles ask
      x1   x2 ... | block 2           | block 3 ...              for block 2. Whatever stands at place p says token p

What is unusual here: the cells' order is all that a block's shape changes. A block is L cells in a row of that order, and the
network isn't told what L is: only the mask and what it is asked for say so.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..core.cache import Cache
from ..core.codes import Cells, TokenModel, check_codes
from ..core.model import Cond
from ..core.where import Where

# --- layout: who is fed where, who sees whom ----------------------------------------------------------------------------


def order(side: tuple[int, int], shape: tuple[int, int, int]) -> Int[Tensor, "n"]:
    """Raster numbers of the cells of `shape[0]` frames, block after block; all frames after these are alike."""
    t, h, w = shape
    if side[0] % h or side[1] % w:
        raise ValueError(f"frames of {side[0]} x {side[1]} cells don't divide into blocks of {h} x {w}")
    cells = torch.arange(t * prod(side)).view(t, *side)
    return rearrange(cells, "t (r h) (c w) -> (r c t h w)", h=h, w=w)


def sources(n: int, block: int, hybrid: bool = True) -> Int[Tensor, "n"]:
    """Which token of the order is fed at each of n places; -1 is BOV, and -1 - j the j-th middle token."""
    place = torch.arange(n)
    if not hybrid:  # the first block is asked for by as many tokens that say nothing
        return torch.where(place < block, -1 - place, place - block)
    start = torch.where(place <= block, place - 1, block - 1 - place)
    return torch.where(place < 2 * block, start, place - block)


def numbers(place: Int[Tensor, "n"], block: int, hybrid: bool = True) -> Int[Tensor, "n"]:
    """Block of each place: a key is visible iff its block <= the query's. Hybrid: the first L are blocks of their own."""
    return torch.where(place < block, place, block - 1 + place // block) if hybrid else place // block


def steps(n: int, block: int, known: int = 0, hybrid: bool = True) -> int:
    """Forward passes that say n tokens after `known`."""
    single = max(0, block - known) if hybrid else 0
    return single + (n - single) // block


# --- the model ----------------------------------------------------------------------------------------------------------


class Blocks(Cells):
    """The inlet: ids become vectors, each at the place of the cell that it asks for.

    shape: frames, rows and columns of a block.  hybrid: how the first block begins (see `sources`)
    Ids from K on are BOV and the middle tokens. Calls bring runs `b 1 1 n` of the order, from place `cond.start` (in frames) on.
    """

    def __init__(self, codes: int, d: int, side: tuple[int, int], shape: tuple[int, int, int], hybrid: bool = True):
        super().__init__(codes, d, side, prod(shape))
        if self.block > len(self.start):
            raise ValueError(f"a block has at most the {len(self.start)} cells of a frame, got {shape} = {self.block}")
        self.shape, self.hybrid = tuple(shape), hybrid
        self.place = nn.Parameter(0.1 * torch.randn(len(self.start), d))
        self.register_buffer("order", order(self.side, self.shape), persistent=False)

    def cells(self, place: Int[Tensor, "n"]) -> Int[Tensor, "n"]:
        """Raster numbers (through all frames) of the cells at these places of the order."""
        return self.order[place % len(self.order)] + place // len(self.order) * len(self.order)

    def fed(self, tokens: Int[Tensor, "b n"], source: Int[Tensor, "m"] | None = None) -> Int[Tensor, "b m"]:
        """The ids that ask for `tokens` (in the order of the blocks), or those of some places, by their sources."""
        if source is None:
            source = sources(tokens.shape[1], self.block, self.hybrid).to(tokens.device)
        return torch.where(source < 0, self.codes - 1 - source, tokens[:, source.clamp_min(0)])

    def forward(self, x: Int[Tensor, "b f h w"], t, cond: Cond):
        check_codes(x, self.codes + len(self.start))
        place = self.places(x[0].numel(), cond.start, x.device)
        cell, width = self.cells(place), self.side[1]
        inside = cell % len(self.start)
        vectors = torch.cat([self.code.weight, self.start])[x.flatten(1)] + self.place[inside]
        coords = torch.stack([cell // len(self.start), inside // width, inside % width], -1).float()[None]
        return vectors, Where(coords, numbers(place, self.block, self.hybrid)[None], grid=tuple(x.shape[1:])), t


class NextBlock(TokenModel):
    """A `TokenModel` whose blocks have a shape and whose first block may begin token by token."""

    def __init__(self, codes: int = 256, d: int = 64, depth: int = 3, heads: int = 4, side: tuple[int, int] = (8, 8),
                 shape: tuple[int, int, int] = (1, 1, 8), hybrid: bool = True):
        super().__init__(codes, d, depth, heads, heads, side)
        self.inlet = Blocks(codes, d, side, shape, hybrid)

    def predict(self, codes: Int[Tensor, "b f h w"], cond: Cond) -> Float[Tensor, "b K f h w"]:
        """Logits of every cell, each from what comes before its block (teacher forcing), in one pass."""
        check_codes(codes, self.codes)
        n, inlet = codes[0].numel(), self.inlet
        if n % max(len(inlet.order), inlet.block):
            raise ValueError(f"{tuple(codes.shape[1:])} = {n} cells don't divide into blocks of {inlet.shape}")
        cell = inlet.cells(torch.arange(n, device=codes.device))
        logits = self(inlet.fed(codes.flatten(1)[:, cell])[:, None, None], None, cond).flatten(2)
        return logits[..., cell.argsort()].unflatten(2, codes.shape[1:])


# --- decoding -----------------------------------------------------------------------------------------------------------


class Flat(Cache):
    """Keeps everything in one piece of memory, keys already rotated: nothing is copied when it is read.

    `Cache` puts its entries together anew at each step, which for blocks of one token would cost more than the attention.
    room: tokens that it can hold
    """

    rotated = True

    def __init__(self, room: int):
        self.room = room
        super().__init__()

    def reset(self) -> None:
        super().reset()
        self.held: dict[int, tuple[Tensor, Tensor]] = {}
        self.end = 0

    def through(self, layer: int, q: Tensor, k: Tensor, v: Tensor, where: Where) -> tuple[Tensor, Tensor, Where]:
        if layer not in self.held:
            room = lambda x: x.new_empty(*x.shape[:2], self.room, x.shape[3])
            self.held[layer] = room(k), room(v)
            self.number = where.block.new_empty(1, self.room)
        n = self.end + k.shape[2]
        if n > self.room:
            raise ValueError(f"the cache has room for {self.room} tokens, {n} are to be held")
        for kept, new in zip(self.held[layer], (k, v), strict=True):
            kept[:, :, self.end : n] = new
        self.number[:, self.end : n] = where.block
        k, v = self.held[layer]
        places = Where(where.coords.new_zeros(1, n, 3), self.number[:, :n])  # rotated keys need no coordinates
        return k[:, :, :n], v[:, :, :n], places

    def close(self, block: int) -> None:
        self.end = block

    @property
    def tokens(self) -> int:
        return self.end


@dataclass(frozen=True)
class Sampling:
    """How a code is drawn; temperature 0 takes the likeliest. top_k, top_p: see `likely`."""

    temperature: float | int = 1.0
    top_k: int = 0
    top_p: float | int = 1.0


def likely(logits: Float[Tensor, "b K n"], top_k: int = 0, top_p: float | int = 1.0) -> Float[Tensor, "b K n"]:
    """Logits in which, cell by cell, all but the `top_k` likeliest codes (0: all), and of them all but the fewest whose
    probabilities reach `top_p`, are ruled out."""
    ranked, codes = logits.sort(1, descending=True)
    gone = torch.zeros_like(ranked, dtype=torch.bool)
    if top_k:
        gone[:, top_k:] = True
    p = ranked.masked_fill(gone, -torch.inf).softmax(1)
    gone |= p.cumsum(1) - p >= top_p  # what the likelier ones hold already
    return logits.masked_fill(torch.zeros_like(gone).scatter(1, codes, gone), -torch.inf)


def draw(logits: Float[Tensor, "b K n"], u: Float[Tensor, "b n"], how: Sampling = Sampling()) -> Int[Tensor, "b n"]:
    """One code a cell, from its own number u in [0, 1) and nobody else's."""
    if how.temperature == 0:
        return logits.argmax(1)
    if how.top_k or how.top_p < 1:
        logits = likely(logits, how.top_k, how.top_p)
    below = (logits.double() / how.temperature).softmax(1).cumsum(1)
    return (below <= u[:, None] * below[:, -1:]).sum(1)


@torch.no_grad()
def filling(
    model: NextBlock, frames: int, cond: Cond, prompt: Int[Tensor, "b p h w"] | None = None, cache: Cache | None = None,
    u: Float[Tensor, "b f h w"] | None = None, how: Sampling = Sampling(),
) -> Iterator[Int[Tensor, "b f h w"]]:  # fmt: skip
    """The codes of `frames` frames after each step; what hasn't been said yet is -1. `prompt`: true frames to begin with.

    u: a number in [0, 1) for each cell, which decides what is drawn there; not needed at temperature 0
    cache: None computes the past anew at each step (slower, the same codes)
    """
    inlet, (h, w) = model.inlet, model.inlet.side
    n, block, device = frames * h * w, inlet.block, inlet.start.device
    said = 0 if prompt is None else prompt[0].numel()
    if n % max(len(inlet.order), block) or said % block or said % len(inlet.order):
        raise ValueError(f"{n} cells, and the prompt's {said}, must divide into blocks of {inlet.shape}")
    if said >= n:
        raise ValueError(f"nothing is left to say: {n} cells are asked for, and the prompt has {said}")
    if how.temperature and u is None:
        raise ValueError("drawing needs a number u for each cell (temperature 0 does without)")
    b = len(prompt) if prompt is not None else len(u) if u is not None else 1
    cell = inlet.cells(torch.arange(n, device=device))
    tokens, back = torch.full((b, n), -1, device=device), cell.argsort()
    if said:
        tokens[:, :said] = prompt.flatten(1)[:, cell[:said]]
    dice = torch.zeros(b, n, device=device) if u is None else u.flatten(1)[:, cell]
    source, fresh = sources(n, block, inlet.hybrid).to(device), True
    while said < n:
        end = said + (1 if inlet.hybrid and said < block else block)
        first = 0 if cache is None or fresh else said
        told, fresh = cond.at(end, first / (h * w)), False
        if cache is not None:
            cache.open(end, told)
            cache.writing = True
        x = inlet.fed(tokens, source[first:end])
        logits = model(x[:, None, None], None, told, cache).flatten(2)[..., said - end :]
        if cache is not None:
            cache.close(end)
        tokens[:, said:end] = draw(logits, dice[:, said:end], how)
        said = end
        yield tokens[:, back].view(b, frames, h, w)


def generate(model: NextBlock, frames: int, cond: Cond, *args, **named) -> Int[Tensor, "b f h w"]:
    """The last of `filling`."""
    return deque(filling(model, frames, cond, *args, **named), 1)[0]
