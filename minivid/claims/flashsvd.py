"""FlashSVD on a block of `video`: what SVD, chunks of tokens and streaming do to the memory of activations, and at what price.

One sample, 16 frames of 4 x 4, 8 x 8 or 16 x 16 tokens (256, 1,024, 4,096), width 128, 4 heads of 32, hidden layer 384. The
low-rank block has rank R a head in q, k, v, and 2 R in o and both feed-forward layers: at R = 16 half of a head and a quarter
of the width. Tiles are 64 x 64. A seed is another block of the model with other inputs; memory and FLOPs don't depend on it.

`peak` is in units of M d numbers and includes the block's input, which its caller holds. It is counted by the storages alive,
not estimated; "profiled" is the same by PyTorch's profiler, which also sees the scratch memory of the fused attention.
The adaLN around the branches, attention to words and the sums are in every number; `feed` is the second branch alone, likewise
with x and y.

The rivals keep q, k, v at full length for the fused attention and run all else by 64 rows of tokens: "chunked" for all heads
at once, as is ordinary, "head by head" in a loop over heads; both also on the block that has no low rank ("dense ...").
`flops` and `time` are relative to the ordinary low-rank block.

Outcome: all that the paper says of memory is so. SVD leaves the peak where it was to the byte, because the thin products die
before the hidden layer is activated; streaming takes 60.0 % off, 3 % above the memory model, with tiles of 64 (at 1,024
tokens the tiles weigh more, and it is 57 %). But most of that needs neither streaming nor low rank: chunks of tokens take 44
% off the dense block, and a loop over heads beside them 66 %, more than streaming does (63 % with the scratch memory of the
fused attention, which the meter doesn't see), or 74 % on the low-rank block; the feed-forward alone holds 2.6 M d streamed and
2.1 M d in chunks, since streaming keeps two strips at full length. The 60 % come from attention, where strips of rank R stand
in place of q, k and v, and end where R is the width of a head. Feed-forward variant 1 costs no FLOPs, as promised; what the
paper doesn't count is that keys and values are rebuilt for each block of queries, R / BM of attention's work: 23 % of the
block. On a processor it is several times slower; the traffic that a GPU kernel saves can't be measured here.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from minivid import world
from minivid.core import noise, surgery, text, weights
from minivid.core.baselines.lowrank import Factored
from minivid.core.corpus import scenes
from minivid.core.model import Block, Cond, Context, words
from minivid.core.sample import generate, start
from minivid.core.where import Where, grid
from minivid.lab import measure
from minivid.lab.claims import Arm, Claims, Compare, Floor
from minivid.low_rank import flashsvd as paper
from minivid.low_rank.flashsvd import Streamed, Tokens, cut, modulated, only_tokens, words_
from minivid.world.scores import psnr

FILES = [f"minivid/weights/{name}.safetensors" for name in ("video", "tok-v")]
BLOCKS = (0, 3, 5)  # by seed


# --- the rival --------------------------------------------------------------------------------------------------------


class Chunked(nn.Module):
    """The ordinary rival: q, k, v in full for the fused attention, all the rest by rows of tokens. Also for dense blocks.

    heads: how many heads have q, k, v at a time (None: all)
    """

    def __init__(self, block: Block, rows: int = 64, heads: int | None = None):
        super().__init__()
        self.block, self.rows, self.heads = block, rows, heads

    @torch.no_grad()
    def forward(self, x: Tokens, ctx: Context) -> Tokens:
        block, where, m = self.block, only_tokens(self.block, ctx), self.block.modulation(ctx)
        y = self.attention(x, where, *modulated(m[:3], x.shape[1]))
        words_(y, block, ctx, self.rows)
        before, after = modulated(m[3:], x.shape[1])
        for rows in cut(x.shape[1], self.rows):
            y[:, rows] = after(y[:, rows], block.feed(before(y[:, rows], rows)), rows)
        return y

    def project(self, x: Tokens, where: Where, before: Callable, group: slice) -> list[Tensor]:
        """q, k, v of some heads at full length, `b k n e`, filled by rows."""
        layer, n = self.block.attention, x.shape[1]
        count = len(range(layer.heads)[group])
        full = [x.new_empty(len(x), count, n, layer.width) for _ in range(3)]

        def fill(rows: slice, h: Tensor) -> None:
            place = Where(where.coords[..., rows, :])
            for y, one in zip(full, (layer.q, layer.k, layer.v), strict=True):
                head = rearrange(one(h), "b n (k e) -> b k n e", e=layer.width)[:, group]
                y[:, :, rows] = head if one is layer.v else layer.turned(head, place)

        for rows in cut(n, self.rows):
            fill(rows, before(x[:, rows], rows))
        return full

    def attention(self, x: Tokens, where: Where, before: Callable, after: Callable) -> Tokens:
        """The branch with its residual: what heads say is summed up behind the first half of the output's projection."""
        layer, t = self.block.attention, None
        down = layer.o.b if isinstance(layer.o, Factored) else layer.o.weight
        up = (lambda t: F.linear(t, layer.o.a, layer.o.bias)) if isinstance(layer.o, Factored) else lambda t: t + layer.o.bias
        for group in cut(layer.heads, self.heads):
            o = layer.attend(*self.project(x, where, before, group), where)
            t = x.new_zeros(*x.shape[:2], len(down)) if t is None else t
            columns = down[:, group.start * layer.width : group.stop * layer.width]
            for rows in cut(x.shape[1], self.rows):
                t[:, rows] += F.linear(rearrange(o[:, :, rows], "b k n e -> b n (k e)"), columns)
            del o  # or it would be alive while the next heads are projected
        y = torch.empty_like(x)
        for rows in cut(x.shape[1], self.rows):
            y[:, rows] = after(x[:, rows], up(t[:, rows]), rows)
        return y


# --- what is measured ---------------------------------------------------------------------------------------------------


@lru_cache(2)
def loaded(name: str) -> Any:
    return weights.load(name)


@lru_cache(8)
def low_rank(rank: int) -> nn.Module:
    return paper.factorise(loaded("video"), rank, 2 * rank)


@torch.no_grad()
def inputs(side: int, seed: int) -> tuple[Float[Tensor, "1 n d"], Context]:
    """Tokens and context of one call of a block: noise, a time and a caption."""
    model, dice = loaded("video"), torch.Generator().manual_seed(seed)
    t, said = torch.rand(1, 1, generator=dice).expand(1, 16), Cond(text=text.tokens(["a large red circle moves left"]))
    ctx = Context(grid(16, side, side), model.mod(F.silu(model.time(t))), *words(model.text, said))
    return torch.randn(1, 16 * side * side, 128, generator=dice), ctx


def block(way: str, rank: int, number: int) -> nn.Module:
    """One block, run in one of the ways."""
    dense = loaded("video").trunk.blocks[number]
    low = low_rank(rank).trunk.blocks[number]
    ways: dict[str, Callable] = {
        "dense": lambda: dense, "dense chunked": lambda: Chunked(dense), "dense head by head": lambda: Chunked(dense, heads=1),
        "svd": lambda: low, "chunked": lambda: Chunked(low), "head by head": lambda: Chunked(low, heads=1),
        "streaming": lambda: Streamed(low), "streaming 2": lambda: Streamed(low, variant=2),
    }  # fmt: skip
    return ways[way]()


@torch.no_grad()
def lives(way: str, side: int = 8, rank: int = 16) -> list[measure.Life]:
    """Who is alive while one block runs, 16 frames of side x side tokens; without attention to words, for a clearer picture."""
    part, (x, ctx) = block(way, rank, 0), inputs(side, 0)
    ctx.text = None
    return measure.lives(lambda: part(x, ctx))


def feed(part: nn.Module, x: Tokens, ctx: Context) -> Tokens:
    """The feed-forward branch alone, out of place, as the block would run it."""
    own = getattr(part, "block", part)
    m = own.modulation(ctx)[3:]
    if part is own:
        return x + own.gated(own.feed(own.modulated(x, m[0], m[1])), m[2])
    y, (before, after) = x.clone(), modulated(m, x.shape[1])
    if isinstance(part, Streamed):
        paper.feed_(y, own.fc1, own.fc2, paper.gelu, (before, after), part.tiles, part.variant)
        return y
    for rows in cut(x.shape[1], part.rows):
        y[:, rows] = after(y[:, rows], own.feed(before(y[:, rows], rows)), rows)
    return y


@lru_cache(256)
@torch.no_grad()
def peak(way: str, rank: int, side: int, branch: str = "block", meter: str = "peak") -> float:
    """Peak of a block, or of its feed-forward, in units of M d numbers, with its input."""
    x, ctx = inputs(side, 0)
    part = block(way, rank, 0)
    call = (lambda: part(x, ctx)) if branch == "block" else lambda: feed(part, x, ctx)
    return getattr(measure, meter)(call) / (4 * x.numel()) + 1


@torch.no_grad()
def memory(seed, fast, way, side, rank=16):
    """Peaks, and how far the outputs are from those of the ordinary low-rank block, in units of its largest."""
    side = 4 if fast else side
    mine = lambda **how: peak(way, rank, side, **how)
    m = 16 * side * side
    found = {"peak": mine(), "feed": mine(branch="feed")}
    found |= {f"of_{other}": found["peak"] / peak(other, rank, side) for other in ("dense", "svd", "chunked")}
    found["of_head_by_head"] = found["peak"] / peak("head by head", rank, side)
    found["feed_of_chunked"] = found["feed"] / peak("chunked", rank, side, "feed")
    if way.startswith("streaming"):
        variant = 2 if way.endswith("2") else 1
        found["of_model"] = found["peak"] * m * 128 / paper.model_numbers(m, 128, 4, rank, 2 * rank, 2 * rank, variant)
    if side <= 8:
        found["profiled"] = mine(meter="allocated")
    x, ctx = inputs(side, seed)
    ordinary, got = block("svd", rank, BLOCKS[seed])(x, ctx), block(way, rank, BLOCKS[seed])(x, ctx)
    found["error"] = ((got - ordinary).abs().max() / ordinary.abs().max()).item()
    own, dense = (measure.parameters(block(name, rank, 0)) for name in (way, "dense"))
    return found | {"weights": own / dense}


@torch.no_grad()
def cost(seed, fast, way, rank=16):
    """FLOPs of the block and of its feed-forward at 4,096 tokens, and time at 1,024, relative to the ordinary low-rank block."""
    x, ctx = inputs(4 if fast else 16, seed)
    mine, ordinary = block(way, rank, BLOCKS[seed]), block("svd", rank, BLOCKS[seed])
    count = lambda part, run: measure.flops(lambda: run(part, x, ctx))
    whole = lambda part, x, ctx: part(x, ctx)
    found = {"flops": count(mine, whole) / count(ordinary, whole), "feed_flops": count(mine, feed) / count(ordinary, feed)}
    few, told = inputs(4 if fast else 8, seed)
    return found | {"time": 1 / measure.ratio(lambda: ordinary(few, told), lambda: mine(few, told), 5).median}


@torch.no_grad()
def grams(model: nn.Module, seed: int, clips: int, times: int) -> dict[str, Tensor]:
    """X'X of the inputs of all layers that are factored: noisy latents of rendered clips with their captions, at some times."""
    names = [f"{name}.{part}" for name, _ in paper.blocks(model)
             for part in ("attention.q", "attention.k", "attention.v", "attention.o", "fc1", "fc2")]  # fmt: skip
    found, shown = {name: surgery.Gram() for name in names}, scenes("base", clips, 900 + seed, "train")
    latent = loaded("tok-v").encode(world.batch(shown, 32, 17))
    said, end = Cond(text=text.tokens([world.caption(scene) for scene in shown])), start(clips, latent.shape[1:], seed)
    each = [torch.full((clips, latent.shape[2]), (i + 0.5) / times) for i in range(times)]
    surgery.record(model, [(noise.flow().at(latent, end, t), t, said) for t in each], found)
    return {name: one.xx for name, one in found.items()}


def clips(seed, fast, rank=16):
    """PSNR in dB of clips from one noise: streamed to low-rank, and low-rank to dense, with factors plain and whitened."""
    model, n, steps = loaded("video"), 1 if fast else 8, 2 if fast else 20
    said = [world.caption(scene) for scene in scenes("base", n, 500 + seed, "held-out")]
    draw = lambda model: generate(said, seed, steps, model=model, tokenizer=loaded("tok-v"))
    fitted = paper.factorise(model, rank, 2 * rank, grams(model, seed, 2 if fast else 16, 2 if fast else 5))
    dense, low = draw(model), draw(fitted)
    near = lambda a, b: psnr(a, b).clamp(max=100).mean().item()
    return {"streamed_to_low": near(draw(paper.each_block(fitted, Streamed)), low),
            "whitened_to_dense": near(low, dense), "plain_to_dense": near(draw(low_rank(rank)), dense)}  # fmt: skip


# --- what is decided before the run ---------------------------------------------------------------------------------------

WAYS = ("dense", "svd", "dense chunked", "dense head by head", "chunked", "head by head", "streaming", "streaming 2")
SIDES = {256: 4, 1024: 8, 4096: 16}
RANKS = (4, 8, 24, 32)
ARMS = {
    **{f"{way}, {m}": Arm(memory, FILES, way=way, side=side) for m, side in SIDES.items() for way in WAYS},
    **{f"{way}, 4096, R = {rank}": Arm(memory, FILES, way=way, side=16, rank=rank)
       for rank in RANKS for way in ("svd", "chunked", "streaming")},
    **{f"cost of {way}": Arm(cost, FILES, way=way) for way in ("chunked", "head by head", "streaming", "streaming 2")},
    "clips": Arm(clips, FILES),
}  # fmt: skip


def less(way: str, than: str, margin: float, m: int = 4096, counts: bool = True) -> Compare:
    name = f"{way} takes {100 * margin:.0f} % off {than}, {m} tokens"
    return Compare(name, "peak", f"{way}, {m}", f"{than}, {m}", margin, higher=False, relative=True, counts=counts)


CLAIMS = Claims(
    "flashsvd",
    arms=ARMS,
    tests=[
        # 1: SVD alone doesn't cut the peak
        Floor("SVD alone leaves the peak", "of_dense", "svd, 4096", at_least=1.0),
        Floor("although weights shrink", "weights", "svd, 4096", at_most=0.99),
        # 2: streaming does
        less("streaming", "svd", 0.6),
        *(less("streaming", "svd", 0.6, m, counts=False) for m in (256, 1024)),
        less("streaming 2", "svd", 0.6, counts=False),
        Floor("the memory model, from above", "of_model", "streaming, 4096", at_most=1.15),
        Floor("the memory model, from below", "of_model", "streaming, 4096", at_least=0.85),
        Floor("no more than chunking", "of_chunked", "streaming, 4096", at_most=1.15),
        Floor("no more than head by head", "of_head_by_head", "streaming, 4096", at_most=1.15, counts=False),
        Floor("its feed-forward no more than chunks", "feed_of_chunked", "streaming, 4096", at_most=1.15, counts=False),
        less("dense chunked", "svd", 0.4, counts=False),
        less("dense head by head", "svd", 0.6, counts=False),
        less("head by head", "svd", 0.6, counts=False),
        Floor("the same function", "error", "streaming, 4096", at_most=1e-4),
        Floor("the same function, variant 2", "error", "streaming 2, 4096", at_most=1e-4),
        Floor("the same clips, dB", "streamed_to_low", "clips", at_least=50),
        # 3: the price
        Floor("variant 1 costs no FLOPs", "feed_flops", "cost of streaming", at_most=1.05),
        Floor("variant 2 costs half as much again", "feed_flops", "cost of streaming 2", at_least=1.5, counts=False),
        Floor("keys and values rebuilt cost none", "flops", "cost of streaming", at_most=1.05, counts=False),
        Floor("no faster on a CPU", "time", "cost of streaming", at_least=1.0, counts=False),
    ],
    minutes=10,
    tolerance={"time": float("inf"), "error": float("inf"), "streamed_to_low": float("inf")},
)
