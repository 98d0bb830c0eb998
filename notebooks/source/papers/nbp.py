# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # NBP: say a row at a time
#
# A model of tokens says one, reads it, says the next: a second of film is a thousand passes. A film isn't a sentence, though.
# What stands in a cell depends on what stood there a moment ago more than on its left neighbour. So let all cells of a row be
# said at once, each by the token above it.
#
# *Ten minutes, one processor core. A procedure: mask, target and decoding change, the network doesn't.* At the end you can
# - move any model from next tokens to next blocks by a shift and a mask;
# - say what a block costs in bits, what it saves in passes, and why these are not the same price;
# - say what the cells of a block can't know of each other, and when that matters.

# %%
from functools import lru_cache
from statistics import fmean

import torch
from matplotlib.patches import Rectangle

from minivid import world
from minivid.block_diffusion import nbp as paper
from minivid.block_diffusion.nbp import Flat, NextBlock
from minivid.core import attention, text, weights
from minivid.core.baselines.vq import Codes
from minivid.core.cache import Cache
from minivid.core.corpus import bytes_of
from minivid.core.model import Cond
from minivid.core.where import grid, visible
from minivid.lab import claims, measure, play, plots, show
from minivid.training.tokens import codes_of

_ = torch.set_num_threads(1)

# %% [markdown]
# ## The picture first
#
# A frame is 8 × 8 codes of 256 (`tok-q`). Four true frames are given; the fifth fills up, a block at a time. Left, who sees whom
# among the tokens of two frames: a staircase whose step is L. Right, the frame after some share of its cells, said by a small
# model trained with this L (those of the claim below); blue cells are the next block. **Slide L, then let the frame fill.**

# %%
result = claims.read("nbp")["arms"]
mean = lambda arm, metric: fmean(result[arm]["values"][metric])
made, _ = weights.read("nbp.safetensors")
tokenizer = weights.load("tok-q")
SHAPES = {1: (1, 1, 1), 4: (1, 1, 4), 8: (1, 1, 8), 16: (1, 2, 8), 64: (1, 8, 8)}


# %%
@torch.no_grad()
def pixels(codes):
    """Codes `b f 8 8` as clips in [-1, 1]."""
    index = codes.long()
    return tokenizer.decode(tokenizer.bottleneck.lookup([Codes(index, grid(*index.shape[1:]))]))


@lru_cache(None)
def fifth(L):
    """The fifth frame of a clip that the model with blocks of L went on with, `32 32 3` in [0, 1]."""
    return pixels(made[f"L = {L}, 1"])[0, :, 4].movedim(0, 2) / 2 + 0.5


@lru_cache(None)
def order(L):
    """Who sees whom among the first 128 tokens, and the cells of a frame in the order in which they are said."""
    inlet = NextBlock(shape=SHAPES[L]).inlet
    where = inlet(torch.zeros(1, 1, 1, 128, dtype=torch.long), None, Cond())[1]
    return visible(where)[0], inlet.cells(torch.arange(64))


# %%
def filling(L, filled):
    passes = -(-filled * 64 // (100 * L))  # of this frame, so far
    sees, cells = order(L)
    said, ask = torch.zeros(64, dtype=torch.bool), cells[passes * L : passes * L + L]
    said[cells[: passes * L]] = True
    area = said.view(8, 8, 1).repeat_interleave(4, 0).repeat_interleave(4, 1)
    torn, bits = 100 * mean(f"L = {L}", "torn_1"), mean(f"L = {L}", "bits")
    told = f"L = {L}: {passes} of {64 // L} passes for this frame; {bits:.2f} bits a code; {torn:.0f} % of made frames torn"

    def draw(axes):
        axes[0].imshow(sees, cmap="cividis", vmin=0, vmax=1)
        axes[0].set(xlabel="token seen", ylabel="token", xticks=(0, 63, 127), yticks=(0, 63, 127))
        axes[0].set_title(f"L = {L}: {bits:.2f} bits a code")
        axes[1].imshow(torch.where(area, fifth(L), torch.tensor(0.85)).clamp(0, 1), interpolation="nearest")
        axes[1].set_axis_off()
        axes[1].set_title(f"{passes} of {64 // L} passes; {torn:.0f} % torn")
        for corner in ask.tolist():
            axes[1].add_patch(Rectangle((4 * (corner % 8) - 0.3, 4 * (corner // 8) - 0.3), 3.6, 3.6, fill=False, ec="#0072B2"))

    return plots.figure(draw, (6.8, 3.4), told, told + ".", (1, 2))


# %% tags=["nbval-ignore-output"]
settled = [dict(L=L, filled=filled) for L, filled in ((1, 40), (8, 40), (64, 100))]
play.knobs(filling, settled=settled, L=play.Choice(list(SHAPES)), filled=play.IntRange(0, 100, 40, 10))

# %% [markdown]
# ## You have not read the paper: how would you do it?
#
# You have a model that says the next token. It shall say eight at once. What do you change?
#
# <details><summary>One answer</summary>
#
# Give it eight heads, for the next token, the one after, and so on. All eight then guess from the same last token, and the
# eighth, far from anything it knows, guesses badly. In a picture the cell *above* each of the eight is known. Ask that one.
#
# </details>
#
# ## The idea
#
# Put the cells into an order, cut it into blocks of L, and let what stands at the l-th cell of a block answer for the l-th
# cell of the *next* block:
#
# $$p(x) = \prod_m \prod_{l=1}^{L} p(x_{m,l} \mid B_{<m}).$$
#
# Two things change in a model of next tokens: the target is L places ahead, and within a block all see each other. With L = 1
# nothing changes. The last row of a frame asks for the first row of the next frame.
#
# **The start.** Who asks for the first block? L copies of “begin” would be a hard question. The *hybrid* start says the first
# L tokens one by one, and then puts L - 1 learnt middle tokens beside the last of them, so that L inputs ask for block 2:

# %%
def layout(n, L, hybrid=True):
    """What is fed at each place, its block, and what it asks for."""
    source, number = paper.sources(n, L, hybrid).tolist(), paper.numbers(torch.arange(n), L, hybrid).tolist()
    name = lambda s: f"x{s + 1}" if s >= 0 else "BOV" if s == -1 else f"m{-1 - s}"
    rows = {"fed": [name(s) for s in source], "block": number, "asks for": [f"x{i + 1}" for i in range(n)]}
    return "\n".join(f"{title:9}" + "".join(f"{value!s:>5}" for value in row) for title, row in rows.items())


print(layout(12, 4))
print(f"passes for 1,024 tokens in rows of 8: {paper.steps(1024, 8)}, of which {8} single ones")

# %% [markdown]
# ## The package's own source
#
# A block needn't be a row. Its shape is an order of the cells, nothing else.

# %%
show.source(paper.order, paper.sources, paper.numbers)


# %% tags=["nbval-ignore-output"]
def shapes(axes):
    names = {"row": (1, 1, 8), "patch": (1, 2, 4), "half a row of two frames": (2, 1, 4)}
    for ax, (name, shape) in zip(axes, names.items(), strict=True):
        cells = NextBlock(shape=shape).inlet.cells(torch.arange(128))
        when = torch.empty(128)
        when[cells] = torch.arange(128.0) // 8
        ax.imshow(torch.cat(list(when.view(2, 8, 8)), 1), cmap="cividis")
        ax.axvline(7.5, color="white", lw=2)
        ax.set(xticks=(3.5, 11.5), xticklabels=("frame 0", "frame 1"), yticks=(), title=name)
        ax.tick_params(length=0)


alt = "Two frames of 8 x 8 cells; brighter cells are said later. Rows go down, frame by frame; patches left, right, down."
plots.figure(shapes, (8.2, 1.9), "shapes of a block", alt, (1, 3))

# %% [markdown]
# Dark is said first. Patches go left, right, then down; blocks across frames say the same half row of both frames at once.
#
# ## What a trained model looks at
#
# The package's own `codes` is a next-block model with rows. Four frames of a clip, one layer, its heads. The steps of the
# staircase are rows; the bright **diagonals** one frame apart ask what stood here before, those two apart how it moves, the dots
# beside the main diagonal what is close by.

# %% tags=["nbval-ignore-output"]
codes_model = weights.load("codes")
scene = world.draw(600, 4, "base", "held-out")
clip = world.render(scene, 32, 8)[:, ::2]
seen = {}


def watched(q, k, v, where):
    seen.setdefault("maps", []).append(attention.scores(q, k, where)[0])
    return attention.dense(q, k, v, where)


for block in codes_model.trunk.blocks:
    block.attention.attend = watched
with torch.no_grad():
    _ = codes_model.predict(codes_of(tokenizer, bytes_of(clip[None])).long(), Cond(text=text.tokens([world.caption(scene)], 16)))
show.attention(seen["maps"][2], 4, "Who reads what (layer 2)", titles=[f"head {i}" for i in range(4)])

# %% [markdown]
# ## What a block can't know
#
# Cells of a block are drawn without asking each other. If the ball may be here or there, each cell decides for itself: half a
# ball here, half there, or two. But *may* it? Four frames have shown which way it goes. Below, four frames given, four made, the
# same random number in every cell. **Predict** which L tears bodies most, then look; *the likeliest* draws without dice.

# %% tags=["nbval-ignore-output"]
CLIP = 0
rows = {"true codes": made["true"]} | {f"L = {L}": made[f"L = {L}, 1"] for L in (1, 8, 64)}
rows |= {f"L = {L}, the likeliest": made[f"L = {L}, 0"] for L in (1, 64)}
show.clips([pixels(x[CLIP : CLIP + 1])[0] for x in rows.values()], list(rows), "Four frames given, four made", fps=4)

# %% [markdown]
# ## Predict, then run
#
# 128 tokens, once with blocks of 1, once of 8, once of 64, all with a cache. **Predict** how many times as fast rows are, and
# frames. (Mind the hybrid start.)

# %% tags=["nbval-ignore-output"]
def say(L, cache=Flat, frames=2):
    net, u = NextBlock(shape=SHAPES[L]).eval(), torch.rand(1, frames, 8, 8)
    return lambda: paper.generate(net, frames, Cond(), None, cache(64 * frames), u)


for L in (8, 64):
    faster = measure.ratio(say(1), say(L), 5).median
    print(f"L = {L:2}: {faster:.1f} times as fast; passes {128} : {paper.steps(128, L)}")
slow = measure.ratio(say(1, lambda room: Cache()), say(1), 5).median
print(f"With a cache that joins its entries at each step, next tokens take {slow:.1f} times as long: that would flatter blocks.")

# %% [markdown]
# ## Exercise
#
# Complete the layout of the hybrid start, for n > 2 L.

# %% tags=["exercise"]
def fed(n, L):
    """What is fed at each of n places: 'B', 'x1' ... and 'm1' ... 'm(L-1)'."""
    return ["B"] + [f"x{i}" for i in range(1, n)]  # not right yet: that is L = 1


# %% tags=["exercise-check"]
from minivid.block_diffusion import nbp

right = True
for n, L in ((12, 4), (12, 1), (24, 8)):
    name = lambda s: f"x{s + 1}" if s >= 0 else "B" if s == -1 else f"m{-1 - s}"
    wanted = [name(s) for s in nbp.sources(n, L).tolist()]
    if fed(n, L) != wanted:
        print(f"n = {n}, L = {L}: {' '.join(wanted)} is asked for; yours is {' '.join(fed(n, L))}.")
        print("Not yet.")
        right = False
        break
if right:
    print("Right.")

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def fed(n, L):
#     middles = [f"m{j}" for j in range(1, L)]
#     return ["B", *[f"x{i}" for i in range(1, L + 1)], *middles, *[f"x{i}" for i in range(L + 1, n - L + 1)]]
# ```
#
# The last block is never fed: nobody asks for what follows it. For L = 1 there are no middles.
#
# </details>
#
# ## The law of limits
#
# Blocks of one token are next-token prediction; a cache changes nothing.

# %%
one = NextBlock(shape=SHAPES[1]).eval()
where = one.inlet(torch.zeros(1, 1, 1, 64, dtype=torch.long), None, Cond())[1]
print("L = 1 is the causal mask:", bool((visible(where)[0] == torch.ones(64, 64).tril().bool()).all()))
rowwise, u = NextBlock(shape=SHAPES[8]).eval(), torch.rand(1, 2, 8, 8)
both = [paper.generate(rowwise, 2, Cond(), None, cache, u) for cache in (None, Flat(128))]
print("cached codes are those computed anew:", torch.equal(*both))

# %% [markdown]
# ## The claim
#
# Five twins with the same parameters, steps and clips, three seeds, trained from scratch. First, how many bits a true code costs,
# as training goes on. By theory L = 1 must win: it sees all that larger blocks see, and more.

# %% tags=["nbval-ignore-output"]
marks = (200, 400, 600)
bits = lambda arm: [*[mean(arm, f"bits_{i}") for i in marks], mean(arm, "bits")]
curves = {f"L = {L}": ([*marks, 800], bits(f"L = {L}")) for L in SHAPES}
show.lines(curves, "steps", "bits a code, given four frames", f"By frequency alone: {mean('truth', 'unigram'):.1f} bits")

# %% [markdown]
# It doesn't, not after 800 steps: whole frames cost least. What counts so far is what is easy to learn. A whole frame's cell is
# asked for by *the same cell of the frame before*, a row's by the cell above, a single token's by its left neighbour; in a world
# that moves by parts of a cell, the first of these nearly is the answer, and the others have to look for it. The lead shrinks.
# Shapes at L = 8, and speed: 1,024 tokens from nothing, beside the passes that are saved.

# %% tags=["nbval-ignore-output"]
names = {"L = 8": "a row", "patch": "2 x 4 cells", "two frames": "half a row of two frames"}
bars = {title: result[arm]["values"]["bits"] for arm, title in names.items()}
show.bars(bars, "bits a code (a dot a seed)", "Shapes of 8 cells")

# %%
for L in (4, 8, 16, 64):
    fewer, faster = 1024 / mean("speed", f"calls, L = {L}"), mean("speed", f"L = {L}")
    print(f"L = {L:2}: {fewer:5.1f} times fewer passes, {faster:5.1f} times as fast")
print(f"rows, 16 clips at once: {mean('speed', 'L = 8, batch 16'):.1f} times as fast")

# %% [markdown]
# Then they go on alone: four frames given, four made. The Fréchet distance to the same clips' true ends (lower is nearer), and
# how many of the made frames have a body too many. It follows the bits: straight motion, once seen, leaves cells little to
# agree on, so what is wrong is what the models don't know, and 256 draws in a row add more to that than four.

# %% tags=["nbval-ignore-output"]
ways = {"temperature 1": "1", "top-k, top-p": "top", "temperature 0.7": "0.7", "the likeliest": "0"}
over = lambda metric, scale=1: {title: (list(SHAPES), [scale * mean(f"L = {L}", f"{metric}_{way}") for L in SHAPES])
                                for title, way in ways.items()}  # fmt: skip
show.lines(over("frechet"), "cells of a block, L", "Fréchet distance", "What is made freely", log="x")

# %% tags=["nbval-ignore-output"]
torn = f"Torn (true codes, decoded: {100 * mean('truth', 'torn'):.0f} %)"
show.lines(over("torn", 100), "cells of a block, L", "made frames with a body too many, %", torn, log="x")

# %%
show.verdict("nbp")

# %% [markdown]
# The authors report, on K600 with 5 frames given, an FVD of 29.0 for next tokens, 25.5 for rows of 16 and 67.0 for whole frames,
# at 11 times the frames a second; their validation loss rises with the block.
#
# ## One axis
#
# In [block diffusion](../04_block_diffusion.ipynb) the length of a chunk goes from autoregression (one frame) to plain
# diffusion (all of them). L is the same axis, further down: a token, a row, a frame. The rule of who sees whom is the same one
# line. What differs is how a block is made: here in one pass, each cell for itself; there in many, in which its cells come to
# agree, so that a large block is dear.
#
# ## Where next
#
# - [04 Block diffusion](../04_block_diffusion.ipynb): the rest of the axis.
# - [LouisKV](louiskv.ipynb): the cache of a model like this, when it is too long to be read.
# - [The paper](https://arxiv.org/abs/2502.07737).
