"""Sparse-vDiT: look once which of five fixed patterns each attention head follows, and from then on compute only that.

Paper:   Sparse-vDiT: Unleashing the Power of Sparse Attention to Accelerate Video Diffusion Transformers (2025), arXiv 2506.03065
Kind:    part (the attention of every layer, replaced from outside in a trained model)
Equal:   dense attention, where every head is full, every window reaches the ends, or every column is kept
Claim:   at 30 % of the score blocks, same-seed PSNR to the dense clip: +1 dB over one window for all heads, over the same modes
         dealt at random, and over choosing online; the modes agree to 90 % between unlike captions; attention 1.5x faster
Differs: words enter by cross-attention, so no text rows stay dense. A block is one frame's number of tokens. Errors are in units
         of the layer's mean output energy, so that lambda and epsilon mean the same everywhere. Inferred, since no code was
         published: one table for all steps, and a stripe's columns are the frames that receive most attention in calibration

In a video transformer most heads do one of four things: look about everywhere, stay within their frame, stay at their place in
all frames, or stare at a few key frames; and which of these a head does hardly depends on the caption. So five *modes* are
enough (S is the share of score blocks that is never computed, b the number of blocks along a side):

    M0 full            S = 0
    M1 skip            S = 1                              the head says 0
    M2 diagonal        S = 1 - ((2w+1) b - w (w+1)) / b^2     |i - j| <= w, blocks are frames
    M3 multi-diagonal  the same, after tokens were put in order of place first, frame second; blocks are groups of places
    M4 stripe          S = 1 - c / b                      all queries read the c frames that were chosen for this head

What is unusual: nothing here is masked. Each mode is made of ordinary dense products on pieces of memory that lie together
(for a window, overlapping views of the keys), so a skipped block costs neither arithmetic nor memory.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ..core.attention import Attention, dense, grouped, scores
from ..core.surgery import swap
from ..core.where import Where

Grid = tuple[int, int, int]  # frames, rows, columns of the token grid
Heads = Float[Tensor, "b k n d"]
Values = Float[Tensor, "b k n e"]
KINDS = ("full", "skip", "diagonal", "multi-diagonal", "stripe")  # M0 ... M4
sdpa = F.scaled_dot_product_attention


@dataclass(frozen=True)
class Mode:
    """How one head computes: one of KINDS.

    width:   blocks to either side of the diagonal that a window keeps
    columns: frames that a stripe keeps
    """

    kind: str = "full"
    width: int = 0
    columns: tuple[int, ...] = ()

    def __post_init__(self):
        if self.kind not in KINDS or self.width < 0 or (self.kind == "stripe") != bool(self.columns):
            raise ValueError(f"a mode is one of {', '.join(KINDS)}, its width >= 0, and a stripe keeps columns; got {self}")


FULL, SKIP = Mode("full"), Mode("skip")
Table = list[list[Mode]]  # by layer and head


def groups(grid: Grid) -> int:
    """Blocks in order of place: as many as frames, so that both windows cost the same; where that doesn't divide, all places."""
    f, places = grid[0], grid[1] * grid[2]
    return f if places % f == 0 else places


def share(mode: Mode, grid: Grid) -> float:
    """1 - S: the share of all score blocks that the mode computes."""
    blocks = groups(grid) if mode.kind == "multi-diagonal" else grid[0]
    width = min(mode.width, blocks - 1)
    window = ((2 * width + 1) * blocks - width * (width + 1)) / blocks**2
    return dict(zip(KINDS, (1.0, 0.0, window, window, len(mode.columns) / blocks), strict=True))[mode.kind]


def kept(mode: Mode, grid: Grid) -> Bool[Tensor, "n n"]:
    """The same as a mask, queries x keys: for pictures and tests. No mode is computed this way."""
    places = grid[1] * grid[2]
    token = torch.arange(grid[0] * places)
    frame, group = token // places, token % places * groups(grid) // places
    if mode.kind == "stripe":
        return torch.isin(frame, torch.tensor(mode.columns)).expand(len(token), -1)
    if mode.kind in ("full", "skip"):
        return torch.full((len(token), len(token)), mode.kind == "full")
    block = frame if mode.kind == "diagonal" else group
    return (block[:, None] - block).abs() <= mode.width


# --- the kernels: dense products of pieces that lie together in memory ------------------------------------------------


def window(q: Heads, k: Heads, v: Values, blocks: int, width: int) -> Values:
    """M2: each of `blocks` blocks of queries reads its own block of keys and `width` more on either side.

    All inner blocks are one batched product, their keys overlapping views of one memory: nothing is copied. At both ends
    the window is cut, so those blocks have products of their own.
    """
    b, n = len(q), q.shape[2]
    size, inner = n // blocks, blocks - 2 * width
    ends = [*range(min(width, blocks)), *range(max(blocks - width, width), blocks)]
    piece = lambda x, first, last: x[:, :, max(first, 0) * size : last * size]
    rows = [sdpa(piece(q, i, i + 1), piece(k, i - width, i + width + 1), piece(v, i - width, i + width + 1)) for i in ends]
    if inner > 0:
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        slide = lambda x: x.unfold(1, (2 * width + 1) * size, size).mT
        middle = sdpa(q[:, width * size : n - width * size].unflatten(1, (inner, size)), slide(k), slide(v))
        rows.insert(width, middle.flatten(1, 2).unflatten(0, (b, -1)))
    return torch.cat(rows, 2)


def window_of_places(q: Heads, k: Heads, v: Values, grid: Grid, width: int) -> Values:
    """M3 = P' M2(P q, P k, P v), where P puts tokens in order of place: (f s) -> (s f). Rotary turns are in q and k already.

    Attention doesn't ask for the order within a block, so a group's places may stay together, frame after frame: whole runs
    of memory are moved, not single tokens.
    """
    f, g = grid[0], groups(grid)
    q, k, v = (rearrange(x, "b k (f g s) d -> b k (g f s) d", f=f, g=g) for x in (q, k, v))
    return rearrange(window(q, k, v, g, width), "b k (g f s) d -> b k (f g s) d", f=f, g=g)


def stripe(q: Heads, k: Heads, v: Values, frames: int, columns: Int[Tensor, "k c"]) -> Values:
    """M4: all queries read the same frames, a few for each head, gathered once."""
    heads = torch.arange(len(columns))[:, None]
    gathered = lambda x: x.unflatten(2, (frames, -1))[:, heads, columns].flatten(2, 3)
    return sdpa(q, gathered(k), gathered(v))


def run(modes: Sequence[Mode], q: Heads, k: Heads, v: Values, grid: Grid) -> Values:
    """One call for heads of one kind (and width, and number of columns)."""
    match modes[0].kind:
        case "full":
            return sdpa(q, k, v)
        case "skip":
            return torch.zeros_like(v)
        case "diagonal":
            return window(q, k, v, grid[0], modes[0].width)
        case "multi-diagonal":
            return window_of_places(q, k, v, grid, modes[0].width)
        case _:
            return stripe(q, k, v, grid[0], torch.tensor([mode.columns for mode in modes], device=q.device))


# --- in a model -------------------------------------------------------------------------------------------------------


def whole(q: Tensor, where: Where) -> Grid:
    """The grid that the tokens fill. Raises ValueError where fixed patterns mean nothing."""
    if where.grid is None or where.keys is not None or where.block is not None:
        what = "no grid" if where.grid is None else "a cache, or blocks that mustn't see each other"
        raise ValueError(f"fixed patterns need all tokens of one f x h x w grid, each visible to all; this call has {what}")
    return where.grid


@dataclass(frozen=True)
class Sparse:
    """The attention of one layer, `(q, k, v, where) -> o`: a mode for each head.

    Heads are fused: those that share a mode are gathered, computed by one call, and put back. This changes nothing but time.
    """

    modes: tuple[Mode, ...]

    def __call__(self, q: Heads, k: Float[Tensor, "b g n d"], v: Float[Tensor, "b g n e"], where: Where) -> Values:
        grid = whole(q, where)
        if len(self.modes) != q.shape[1] or any(c >= grid[0] for mode in self.modes for c in mode.columns):
            raise ValueError(f"{len(self.modes)} modes don't fit {q.shape[1]} heads, {grid[0]} frames: search them anew; {self}")
        k, v = grouped(q, k), grouped(q, v)
        teams: dict[tuple, list[int]] = {}
        for head, mode in enumerate(self.modes):
            teams.setdefault((mode.kind, mode.width, len(mode.columns)), []).append(head)
        if len(teams) == 1:
            return run(self.modes, q, k, v, grid)
        o = torch.empty_like(v)
        for heads in teams.values():
            o[:, heads] = run([self.modes[i] for i in heads], q[:, heads], k[:, heads], v[:, heads], grid)
        return o


def layers(model: nn.Module) -> list[tuple[str, Attention]]:
    """The self-attention layers by name, in order."""
    return [(name, part) for name, part in model.named_modules() if isinstance(part, Attention)]


def sparsify(model: nn.Module, table: Table) -> nn.Module:
    """The model with `table[layer][head]` for its attention. It shares all weights with `model`, which stays as it is."""
    found = layers(model)
    if [len(row) for row in table] != [layer.heads for _, layer in found]:
        raise ValueError(f"the table has {[len(row) for row in table]} heads by layer, the model {[x.heads for _, x in found]}")
    return swap(model, {f"{name}.attend": Sparse(tuple(row)) for (name, _), row in zip(found, table, strict=True)})


def without_skipped(model: nn.Module) -> nn.Module:
    """A sparse model without the projections of its skipped heads (one head a layer stays): the same outputs, less work."""
    new = {}
    for name, layer in layers(model):
        modes = layer.attend.modes if isinstance(layer.attend, Sparse) else (FULL,)
        keep = [i for i, mode in enumerate(modes) if mode != SKIP] or [0]
        if len(keep) == len(modes) or layer.key_heads != layer.heads:
            continue
        new[name] = small = copy.deepcopy(layer)
        rows = lambda linear, keep=keep, k=layer.heads: torch.arange(linear.out_features).view(k, -1)[keep].flatten()
        small.o.weight = nn.Parameter(layer.o.weight[:, rows(layer.v)].detach())
        for part in (small.q, small.k, small.v):
            part.weight, part.bias = (nn.Parameter(x[rows(part)].detach()) for x in (part.weight, part.bias))
        small.heads = small.key_heads = len(keep)
        small.attend = Sparse(tuple(modes[i] for i in keep))
    return swap(model, new)


class ByTime(nn.Module):
    """models[i] while t > above[i], the last one after that: a dense beginning, or a table for each part of the way."""

    def __init__(self, models: Sequence[nn.Module], above: Sequence[float]):
        super().__init__()
        self.models, self.above = nn.ModuleList(models), tuple(above)

    def forward(self, x, t, cond, cache=None):
        return self.models[sum(float(t.max()) <= limit for limit in self.above)](x, t, cond, cache)


# --- the search, once, offline ----------------------------------------------------------------------------------------

Calibration = Callable[[nn.Module], object]  # runs the model that it is given, on a few prompts


def watched(model: nn.Module, look: Callable) -> nn.Module:
    """The model, calling `look(layer, q, k, v, where)` at every attention."""

    def watch(i, attend):
        def seen(q, k, v, where):
            look(i, q, k, v, where)
            return attend(q, k, v, where)

        return seen

    return swap(model, {f"{name}.attend": watch(i, layer.attend) for i, (name, layer) in enumerate(layers(model))})


@torch.no_grad()
def candidates(model: nn.Module, calibrate: Calibration, width: int, columns: int) -> list[Table]:
    """Five tables, M0 ... M4 for all heads. A head's stripe keeps the frames that receive most of its attention."""
    mass: dict[int, Tensor] = {}

    def look(i, q, k, v, where):
        received = scores(q, k, where).mean((0, 2)).unflatten(-1, (where.grid[0], -1)).sum(-1)
        mass[i] = mass.get(i, 0) + received

    calibrate(watched(model, look))
    most = lambda row: tuple(sorted(row.topk(columns).indices.tolist()))
    stripes = [[Mode("stripe", columns=most(row)) for row in mass[i]] for i in sorted(mass)]
    modes = FULL, SKIP, Mode("diagonal", width), Mode("multi-diagonal", width)
    return [[[mode] * layer.heads for _, layer in layers(model)] for mode in modes] + [stripes]


@torch.no_grad()
def errors(model: nn.Module, calibrate: Calibration, tables: Sequence[Table]) -> Float[Tensor, "calls b l k m"]:
    """MSE(O_i, O_0) of every call, sample, layer, head and table, in units of mean(O_0^2) over all heads of the layer.

    The paper doesn't divide, so its epsilon means another thing in every model. Dividing by the layer and not by the head keeps
    what matters: a quiet head is cheap to get wrong, and to skip. Skipping costs 1 on average over a layer's heads.
    """
    found = []

    def look(i, q, k, v, where):
        full = dense(q, k, v, where)
        gap = [(Sparse(tuple(table[i]))(q, k, v, where) - full).square().mean((2, 3)) for table in tables]
        found.append(torch.stack(gap, -1) / full.square().mean((1, 2, 3)).clamp_min(1e-12)[:, None, None])

    calibrate(watched(model, look))
    return rearrange(torch.stack(found), "(c l) b k m -> c b l k m", l=len(layers(model)))


def search(error: Float[Tensor, "l k m"], cost: Float[Tensor, "m"], penalty=0.5, epsilon=1.0) -> Int[Tensor, "l k"]:
    """Numbers of the chosen tables: with L_i = error_i + penalty cost_i, 0 (full) if all other L_i > epsilon, else the least.

    cost: what a table takes beside table 0: blocks (`share`), or measured time
    """
    loss = (error + penalty * cost)[..., 1:]
    return torch.where(loss.amin(-1) > epsilon, 0, loss.argmin(-1) + 1)


def tolerance(error: Float[Tensor, "l k m"], cost: Float[Tensor, "m"], most: float, penalty=0.5) -> float:
    """The least epsilon whose modes cost at most `most` on average. Raises ValueError where even the cheapest cost more."""
    for epsilon in (error + penalty * cost)[..., 1:].amin(-1).flatten().sort().values.tolist():
        if cost[search(error, cost, penalty, epsilon)].mean() <= most + 1e-6:
            return epsilon
    raise ValueError(f"a mean cost of {most:.2g} can't be met: the candidates cost {[round(x, 3) for x in cost.tolist()]}")


def assemble(choice: Int[Tensor, "l k"], tables: Sequence[Table]) -> Table:
    """The table in which each head has the mode of the table that was chosen for it."""
    return [[tables[m][i][head] for head, m in enumerate(row)] for i, row in enumerate(choice.tolist())]


def search_in_turn(model: nn.Module, calibrate: Calibration, tables: Sequence[Table], cost, **how) -> Int[Tensor, "l k"]:
    """`search` from the first layer to the last, each with the layers before it already sparse. One calibration a layer."""
    choice = torch.zeros(len(tables[0]), len(tables[0][0]), dtype=torch.long)
    for i in range(len(choice)):
        found = errors(sparsify(model, assemble(choice, tables)), calibrate, tables).mean((0, 1))
        choice[i] = search(found, cost, **how)[i]
    return choice


# --- rivals: patterns chosen anew at every call -----------------------------------------------------------------------


@dataclass(frozen=True)
class Online:
    """Each call and head takes the window, of frames or of places, that errs less on a sample of `rows` queries.

    Xi et al. 2025, Sparse VideoGen, arXiv 2502.01776. The sampled rows are computed in full: that is its overhead.
    """

    width: int
    rows: int = 32

    def __call__(self, q: Heads, k: Float[Tensor, "b g n d"], v: Float[Tensor, "b g n e"], where: Where) -> Values:
        grid, n, k, v = whole(q, where), q.shape[2], grouped(q, k), grouped(q, v)
        some = torch.randperm(n, generator=torch.Generator().manual_seed(0))[: self.rows]
        logits = q[:, :, some] @ k.mT * q.shape[-1] ** -0.5
        full, gaps = logits.softmax(-1) @ v, []
        modes = Mode("diagonal", self.width), Mode("multi-diagonal", self.width)
        for mode in modes:
            masked = logits.masked_fill(~kept(mode, grid)[some], -torch.inf).softmax(-1) @ v
            gaps.append((masked - full).square().mean((2, 3)).flatten())
        q1, k1, v1 = (x.flatten(0, 1)[:, None] for x in (q, k, v))
        o = torch.empty_like(v1)
        for mode, mine in zip(modes, (gaps[0] <= gaps[1], gaps[0] > gaps[1]), strict=True):
            if mine.any():
                o[mine] = run([mode], q1[mine], k1[mine], v1[mine], grid)
        return o.view_as(v)


@dataclass(frozen=True)
class TopBlocks:
    """Each block of queries (a frame) reads the `count` frames whose mean key agrees best with its mean query.

    In the manner of MInference (Jiang et al. 2024, arXiv 2407.02490, block-sparse heads).
    """

    count: int

    def __call__(self, q: Heads, k: Float[Tensor, "b g n d"], v: Float[Tensor, "b g n e"], where: Where) -> Values:
        frames, b = whole(q, where)[0], len(q)
        q, k, v = (x.unflatten(2, (frames, -1)).flatten(0, 1) for x in (q, grouped(q, k), grouped(q, v)))
        best = (q.mean(2) @ k.mean(2).mT).topk(self.count).indices  # (b k) i c
        heads = torch.arange(len(q))[:, None, None]
        return sdpa(q, k[heads, best].flatten(2, 3), v[heads, best].flatten(2, 3)).flatten(1, 2).unflatten(0, (b, -1))
