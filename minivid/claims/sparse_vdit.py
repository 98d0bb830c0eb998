"""Sparse-vDiT on `frames`, 16 frames of 4 x 4 tokens: which pattern for which head, does it depend on the caption, is it fast?

Budgets are the shares of score blocks of one window for all heads: width 2 is 29 %, width 4 is 48 %. The search chooses among
full and skipped heads, windows one step narrower and stripes that cost about as little, with the least epsilon that keeps the
budget. The rivals get no less: the online choice has windows of the budget's width and one step narrower in alternating
layers, which together with the rows that it samples is 30 and 50 %; the top blocks are rounded up (31 and 50 %).

A seed is a set of eight held-out captions, their noise, and other captions for the search; the model is one. Eight seeds:
after three, intervals were 5 dB wide to either side, so five were added and no margin was touched. PSNR is to the clip of the
dense model from the same noise; "second seed" is the dense model from other noise. The two disjoint sets of captions differ in
what moves where: left or right in the one, up, down or not at all in the other.

Outcome: which pattern a head follows belongs to the head: captions explain a hundredth of what heads do, and searching beats one
window for all by 3 to 7 dB, and the same modes dealt at random by 4. Against choosing online it loses 1 to 2 dB: our clips have
only 16 frames of 16 places, so a good choice for this very input is worth more than on long clips, and its price in FLOPs is
small; in time it isn't, online is slower than dense attention and the searched model three times faster. Modes agree in 90 % of
the heads between unlike captions, too close to the margin for eight seeds to tell. A table for each half of the steps, or a dense
start, brings 2 to 3 dB back; directions suffer most. Our kernels come to 76 to 97 % of what their patterns promise, so they can't
be twice as fast as compiled FlexAttention: 1.2 to 1.4 times.
"""

import math
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch

from minivid import world
from minivid.core import attention, noise, weights
from minivid.core.corpus import scenes
from minivid.core.model import Cond
from minivid.core.sample import generate
from minivid.core.where import grid
from minivid.lab import measure
from minivid.lab.claims import Arm, Claims, Compare, Floor
from minivid.sparse_attention import sparse_vdit as paper
from minivid.sparse_attention.sparse_vdit import Mode
from minivid.world.judge import judge
from minivid.world.scores import psnr

MODEL, TOKENIZER, FRAMES = "frames", "tok-f", 16
FILES = [f"minivid/weights/{name}.safetensors" for name in (MODEL, TOKENIZER)]
TOKENS = (16, 4, 4)
STEPS, CLIPS = (20, 2), (8, 1)  # full, fast
SETS = {"sideways": ("left", "right"), "else": ("up", "down", "still"), "all": ("left", "right", "up", "down", "still")}


# --- clips ------------------------------------------------------------------------------------------------------------


@lru_cache(4)
def loaded(name: str) -> Any:
    return weights.load(name)


def asked(seed: int, n: int, split: str = "held-out", about: str = "all") -> list:
    """n scenes whose first body moves as the set of captions says."""
    drawn = scenes("base", 12 * n, (7000 if split == "train" else 8000) + seed, split)
    return [scene for scene in drawn if scene.bodies[0].motion in SETS[about]][:n]


def draw(model: torch.nn.Module, wanted: list, seed: int, steps: int) -> torch.Tensor:
    said = [world.caption(scene) for scene in wanted]
    return generate(said, seed, steps, frames=FRAMES, model=model, tokenizer=loaded(TOKENIZER))


def clock(steps: int) -> list[float]:
    """The times of `generate`'s steps, as it steps them."""
    return noise.table(steps, 1, shift=3.0)[:, 0].tolist()


@lru_cache(4)
def dense_clips(seed: int, fast: bool, about: str = "all") -> torch.Tensor:
    return draw(loaded(MODEL), asked(seed, CLIPS[fast], about=about), seed, STEPS[fast])


# --- the search -------------------------------------------------------------------------------------------------------


def calibrate(seed: int, fast: bool, about: str) -> Callable:
    """Runs a model on training captions: 6 clips of 5 steps, or 1 of 2."""
    wanted = asked(seed, 1 if fast else 6, "train", about)
    return lambda model: draw(model, wanted, 100 + seed, 2 if fast else 5)


def budget(width: int) -> float:
    return paper.share(Mode("diagonal", width), TOKENS)


@lru_cache(8)
def looked(seed: int, fast: bool, width: int, about: str = "all") -> tuple:
    """The five candidate tables for the budget of a window of `width`, and errors `calls b l k m` (b: told, then not told)."""
    model, run = loaded(MODEL), calibrate(seed, fast, about)
    tables = paper.candidates(model, run, width - 1, int(budget(width) * FRAMES) - 1)
    return tables, paper.errors(model, run, tables)


def blocks(tables) -> torch.Tensor:
    return torch.tensor([paper.share(table[0][0], TOKENS) for table in tables])


def chosen(seed: int, fast: bool, width: int, about: str = "all", calls=slice(None), cost=None, turns=False) -> torch.Tensor:
    """The search's choice `l k` within the budget of a window of `width`; cost by blocks, where no other is given."""
    tables, error = looked(seed, fast, width, about)
    error, cost = error[calls].mean((0, 1)), blocks(tables) if cost is None else cost
    epsilon = paper.tolerance(error, cost, budget(width))
    if turns:
        return paper.search_in_turn(loaded(MODEL), calibrate(seed, fast, about), tables, cost, epsilon=epsilon)
    return paper.search(error, cost, epsilon=epsilon)


def seconds(tables) -> torch.Tensor:
    """What each table takes beside the first, measured on 4,096 tokens."""
    return torch.tensor([1.0, 0.0] + [1 / faster(table[0][:1], (16, 16, 16)) for table in tables[2:]])


def sparse(how: str, width: int, seed: int, fast: bool) -> torch.nn.Module:
    """The model with one of the ways to choose."""
    model, (tables, error) = loaded(MODEL), looked(seed, fast, width)
    names = [f"{name}.attend" for name, _ in paper.layers(model)]
    every = lambda *plugs: paper.swap(model, {name: plugs[i % len(plugs)] for i, name in enumerate(names)})
    uniform = lambda mode: paper.sparsify(model, [[mode] * len(row) for row in tables[0]])
    built = lambda choice: paper.sparsify(model, paper.assemble(choice, tables))
    match how:
        case "frames" | "places":
            return uniform(Mode("diagonal" if how == "frames" else "multi-diagonal", width))
        case "random":
            choice, dice = chosen(seed, fast, width), torch.Generator().manual_seed(seed)
            return built(choice.flatten()[torch.randperm(choice.numel(), generator=dice)].view_as(choice))
        case "online":
            return every(*(paper.Online(w, 8) for w in (width, width - 1)))  # 8 of 256 rows
        case "top blocks":
            return every(paper.TopBlocks(math.ceil(budget(width) * FRAMES)))
        case "in turn":
            return built(chosen(seed, fast, width, turns=True))
        case "timed":  # the fast form doesn't measure time
            return built(chosen(seed, fast, width, cost=None if fast else seconds(tables)))
        case "dense start":  # the first tenth of the steps
            return paper.ByTime([model, built(chosen(seed, fast, width))], [clock(STEPS[fast])[STEPS[fast] // 10]])
        case "two tables":  # one for the first half of the steps, one for the second
            half = len(error) // 2
            halves = [built(chosen(seed, fast, width, calls=calls)) for calls in (slice(half), slice(half, None))]
            return paper.ByTime(halves, [clock(STEPS[fast])[STEPS[fast] // 2]])
    return built(chosen(seed, fast, width))


# --- arms -------------------------------------------------------------------------------------------------------------


def clips(seed, fast, how, width=0):
    """PSNR in dB to the dense clips; share of colours and motions that the judge reads back; share of attention's FLOPs."""
    wanted = asked(seed, CLIPS[fast])
    if how == "dense":
        return {name: judge(dense_clips(seed, fast), wanted)[name] for name in ("colour", "motion")}
    if how == "second seed":
        made = draw(loaded(MODEL), wanted, seed + 500, STEPS[fast])
        return {"psnr": psnr(made, dense_clips(seed, fast)).mean().item()}
    model = sparse(how, width, seed, fast)
    made = draw(model, wanted, seed, STEPS[fast])
    read = judge(made, wanted)
    found = {"psnr": psnr(made, dense_clips(seed, fast)).mean().item(), "colour": read["colour"], "motion": read["motion"]}
    return found | {"cost": attention_cost(model, STEPS[fast])}


def attention_cost(model, steps: int) -> float:
    """FLOPs of attention beside those of dense attention, all steps together; everything that is computed counts."""
    x, full = torch.zeros(1, loaded(MODEL).channels, FRAMES, 8, 8), loaded(MODEL)
    at = lambda model, t: measure.flops(lambda: model(x, torch.tensor([t]), Cond()))
    times = clock(steps)[:-1]
    n = TOKENS[0] * TOKENS[1] * TOKENS[2]
    whole = sum(4 * n * n * layer.v.out_features for _, layer in paper.layers(full))
    return 1 - (at(full, 0.5) - sum(at(model, t) for t in times) / steps) / whole


def agreement(seed, fast, width):
    """Share of heads that get the same mode from two disjoint sets of captions; what chance would give; variance explained."""
    one, other = (chosen(seed, fast, width, about) for about in ("sideways", "else"))
    count = lambda choice: choice.flatten().bincount(minlength=5) / choice.numel()
    candidate = looked(seed, fast, width)[1][..., 2:]  # calls b l k m, without full and skipped
    spread = candidate.var((0, 1, 2, 3), unbiased=False)
    part = lambda *rest: (candidate.mean(rest).flatten(0, -2).var(0, unbiased=False) / spread).mean().item()
    head, prompt = part(0, 1), part(0, 2, 3)
    return {"agreement": (one == other).float().mean().item(), "chance": (count(one) * count(other)).sum().item(),
            "head": head, "prompt": prompt, "step": part(1, 2, 3), "head_over_prompt": head / prompt}  # fmt: skip


def borrowed(seed, fast, width, about):
    """PSNR of clips of the second set of captions with modes searched on one of the two sets."""
    model = paper.sparsify(loaded(MODEL), paper.assemble(chosen(seed, fast, width, about), looked(seed, fast, width, about)[0]))
    made = draw(model, asked(seed, CLIPS[fast], about="else"), seed, STEPS[fast])
    return {"psnr": psnr(made, dense_clips(seed, fast, "else")).mean().item()}


# --- time, as ratios: how many times faster than dense scaled_dot_product_attention -------------------------------------


def random_heads(size: tuple, heads: int) -> tuple:
    dice, n = torch.Generator().manual_seed(0), size[0] * size[1] * size[2]
    return tuple(torch.randn(1, heads, n, 32, generator=dice) for _ in range(3))


def faster(row, size: tuple, than=attention.dense, repeats: int = 10) -> float:
    """Speed of the modes `row` (or of a plug) over `than` on as many heads of 32, side by side, median."""
    plug = row if callable(row) else paper.Sparse(tuple(row))
    heads = len(plug.modes) if isinstance(plug, paper.Sparse) else 4
    inputs = (*random_heads(size, heads), grid(*size))
    return measure.ratio(lambda: than(*inputs), lambda: plug(*inputs), repeats).median


def one_by_one(row) -> Callable:
    """The unfused form: a call a head."""
    plugs = [paper.Sparse((mode,)) for mode in row]
    return lambda q, k, v, where: torch.cat([p(q[:, [i]], k[:, [i]], v[:, [i]], where) for i, p in enumerate(plugs)], 1)


PATTERNS = {"frame": Mode("diagonal"), "place": Mode("multi-diagonal"), "window": Mode("diagonal", 1),
            "stripe": Mode("stripe", columns=(0, 5, 10))}  # fmt: skip


@torch.no_grad()
def patterns(seed, fast):
    """Each kernel's speed over dense attention, as a share of the ideal 1 / (1 - S)."""
    size, found = (TOKENS if fast else (16, 16, 16)), {}
    for name, mode in PATTERNS.items():
        found[name] = faster([mode] * 4, size, repeats=5 if fast else 10) * paper.share(mode, size)
    return found | {"least_of_ideal": min(found.values())}


@torch.no_grad()
def flex(seed, fast):
    """Each kernel's speed over compiled FlexAttention on the same blocks. The fast form compiles nothing and compares masks."""
    if fast:
        return {name: paper.kept(mode, TOKENS).float().mean().item() for name, mode in PATTERNS.items()}
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    size, compiled, found = (16, 16, 16), torch.compile(flex_attention), {}
    n, places = size[0] * size[1] * size[2], size[1] * size[2]
    for name, mode in PATTERNS.items():
        kept = paper.kept(mode, size)
        if name == "place":  # in the order of places, where its blocks are whole: the best that a mask can do
            kept = paper.kept(Mode("diagonal", mode.width), size)
        look = lambda b, h, i, j, kept=kept: kept[i, j]
        mask = create_block_mask(look, None, None, n, n, device="cpu", BLOCK_SIZE=min(places, 128))
        found[name] = faster([mode] * 4, size, lambda q, k, v, where, mask=mask: compiled(q, k, v, block_mask=mask))
    return found | {"least_ratio": min(found.values())}


@torch.no_grad()
def speed(seed, fast, how, width):
    """Attention alone and the whole model, at two sizes; fused heads over heads one by one."""
    found = {}
    for side in (4,) if fast else (8, 16):
        size, repeats = (16, side, side), 5 if fast else 10
        model = sparse(how, width, seed, fast)
        plugs = [layer.attend for _, layer in paper.layers(model)][: None if how == "searched" else 2]  # rivals' repeat
        tokens, each = size[0] * side * side, [faster(plug, size, repeats=repeats) for plug in plugs]
        found[f"attention_{tokens}"] = len(each) / sum(1 / x for x in each)  # times are what adds up
        if how != "searched":
            continue
        rows = [plug.modes for plug in plugs]
        found[f"ideal_{tokens}"] = sum(map(len, rows)) / sum(paper.share(mode, size) for row in rows for mode in row)
        found[f"fused_{tokens}"] = sum(faster(row, size, one_by_one(row), repeats) for row in rows) / len(rows)
        inputs = torch.zeros(1, loaded(MODEL).channels, FRAMES, 2 * side, 2 * side), torch.tensor([0.5]), Cond()
        calls = [partial(one, *inputs) for one in (loaded(MODEL), paper.without_skipped(model))]
        found[f"model_{tokens}"] = measure.ratio(*calls, 5).median
    return found


# --- what is decided before the run -------------------------------------------------------------------------------------

HOWS = ("frames", "places", "random", "online", "top blocks", "searched")
VARIANTS = ("in turn", "timed", "dense start", "two tables")
ARMS = {
    "dense": Arm(clips, FILES, how="dense"),
    "second seed": Arm(clips, FILES, how="second seed"),
    **{f"{how} (29 %)": Arm(clips, FILES, how=how, width=2) for how in (*HOWS, *VARIANTS)},
    **{f"{how} (48 %)": Arm(clips, FILES, how=how, width=4) for how in ("frames", "places", "online", "searched")},
    "two sets of captions": Arm(agreement, FILES, width=2),
    "own modes": Arm(borrowed, FILES, width=2, about="else"),
    "modes of other captions": Arm(borrowed, FILES, width=2, about="sideways"),
    "patterns": Arm(patterns),
    "flex": Arm(flex),
    **{f"speed of {how}": Arm(speed, FILES, how=how, width=2) for how in ("searched", "online", "top blocks")},
}


def over(method: str, baseline: str, budget: str = "29 %", margin: float = 1.0, counts: bool = True) -> Compare:
    name = f"{method} over {baseline} at {budget}"
    return Compare(name, "psnr", f"{method} ({budget})", f"{baseline} ({budget})", margin=margin, counts=counts)


CLAIMS = Claims(
    "sparse-vdit",
    arms=ARMS,
    tests=[
        *(over("searched", how) for how in ("frames", "places", "random", "online")),
        *(over("searched", how, "48 %") for how in ("frames", "places")),
        over("searched", "online", "48 %", counts=False),
        *(over("online", how, counts=False) for how in ("frames", "places")),
        over("searched", "top blocks", margin=0.0, counts=False),
        *(over(how, "searched", margin=0.0, counts=False) for how in VARIANTS),
        Compare("near the dense clip", "psnr", "searched (29 %)", "second seed", margin=3.0, counts=False),
        Compare("motions stay", "motion", "searched (29 %)", "dense", margin=-0.05, counts=False),
        Floor("unlike captions, the same modes", "agreement", "two sets of captions", at_least=0.9),
        Floor("heads explain more than captions", "head_over_prompt", "two sets of captions", at_least=2.0),
        Compare("borrowed modes do", "psnr", "modes of other captions", "own modes", margin=-0.5),
        Floor("attention is faster", "attention_4096", "speed of searched", at_least=1.5),
        Compare("faster than top blocks", "attention_4096", "speed of searched", "speed of top blocks", margin=0.0, counts=False),
        Floor("kernels near their ideal", "least_of_ideal", "patterns", at_least=0.6),
        Floor("kernels over compiled FlexAttention", "least_ratio", "flex", at_least=2.0, counts=False),
    ],
    seeds=tuple(range(8)),
    minutes=25,
    tolerance={name: float("inf") for name in (*PATTERNS, "least_of_ideal", "attention_256", "fused_256", "model_256")},
)
