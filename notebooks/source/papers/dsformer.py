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
# # DSFormer: a thin matrix times a sparse one
#
# Low rank says: all columns of a weight matrix live in one small space. They don't. DSFormer writes $W \approx D\,S$ too, but
# $S$ is wide and nearly empty, so every column picks a small space of its own. Which one is learnt with the task.
#
# *Ten minutes, one processor core. Surgery: a trained model in, a smaller one out.* At the end you can
# - say what a union of small spaces buys over one, and what its addresses cost;
# - train numbers whose *places* must be chosen, by a gradient that goes straight through the choice;
# - tell on which matrices of a video model the idea pays, and on which it can't.

# %%
import copy
import itertools
from functools import lru_cache

import torch
import torch.nn.functional as F
from PIL import Image

from minivid.claims import dsformer as claim
from minivid.core import sample
from minivid.core.baselines.lowrank import Factored, rank_for, svd
from minivid.core.surgery import swap
from minivid.lab import canvas, claims, maps, play, plots, show
from minivid.low_rank import dsformer as paper
from minivid.low_rank.dsformer import DenseSparse, Pattern
from minivid.world.scores import psnr

_ = torch.set_num_threads(1)

# %% [markdown]
# ## The picture first
#
# The model watches 96 noisy clips, so that both ways may mind what really enters a matrix. Then the twelve matrices of its
# feed-forwards are stored in half of their bits, by low rank and as $D\,S$. Nothing is trained yet.

# %%
model, names = claim.dense(), [name for name in claim.layers(False) if name.endswith(("fc1", "fc2"))]
latent, words = claim.clips(99, 96, "train")
calls = [call for call, _ in claim.noisy(latent, words, 99)]
grams, full = paper.inputs(model, names, calls), {name: model.get_submodule(name) for name in names}
thin = {name: Factored.of(x, rank_for(*x.weight.shape, 1 / 2), grams[name]) for name, x in full.items()}
mixed = {name: paper.choose(x, 1 / 2, grams[name], (4,)) for name, x in full.items()}

# %% tags=["nbval-ignore-output"]
caption = "a red circle moves right"
draw = lambda model: sample.generate([caption], 3, model=model)[0]
whole, low, ours = (draw(swap(model, new)) for new in ({}, thin, mixed))
told = lambda name, film: f"{name}: {psnr(film, whole):.0f} dB to the first"
show.clips([whole, low, ours], ["all numbers", told("low rank", low), told("D S", ours)], f"“{caption}”")

# %% [markdown]
# ## You have not read the paper: how would you do it?
#
# The columns of a matrix are 384 points in 128 dimensions. You may store half the numbers. Where do the points live?
#
# <details><summary>The usual answer</summary>
#
# In the plane (or space) that is nearest to all of them: the singular value decomposition finds it, and no other space of
# that dimension is nearer.
#
# </details>
#
# ## The naive way: one space for all
#
# Eighty points in three dimensions, on *two* planes through the origin. One plane (rank 2) fits neither. Four directions, of
# which each point takes two, fit both.

# %%
dice = torch.Generator().manual_seed(4)
planes = torch.linalg.qr(torch.randn(2, 3, 3, generator=dice, dtype=torch.float64))[0][..., :2]
points = torch.cat([plane @ torch.randn(2, 40, generator=dice, dtype=torch.float64) for plane in planes], 1)
a, b = svd(points, 2)
tries = [paper.factor(points, Pattern(4, 2), seed, rounds=60) for seed in range(4)]
d, shadow, _ = min(tries, key=lambda made: made[2][-1])
fits = {"one plane (rank 2)": a @ b, "4 directions, 2 a point": d @ (shadow * paper.support(shadow, Pattern(4, 2)))}


# %%
one, two = (torch.linalg.cross(plane[:, 0], plane[:, 1]) for plane in planes)
camera = torch.linalg.qr(torch.stack([one, two], 1)).Q.T  # looks along the line in which the planes meet: each is a stroke


def points_drawn(axes):
    for ax, (name, fit) in zip(axes, fits.items(), strict=True):
        for i, (colour, marker) in enumerate((("#0072B2", "o"), ("#E69F00", "^"))):
            (x, y), (u, v) = (camera @ p[:, 40 * i : 40 * i + 40] for p in (points, fit))
            ax.plot([x.tolist(), u.tolist()], [y.tolist(), v.tolist()], color="#999999", lw=1)
            ax.plot(x, y, marker, color=colour, ms=4, label=f"plane {i + 1}")
        gap = ((points - fit).norm() / points.norm()).item()
        ax.set(title=f"{name}: error {100 * gap:.0f} %", xlabel="seen along both planes", xticks=[], yticks=[])
    axes[1].legend(frameon=False)


alt = "Points on two planes. A grey line leads from each to what is stored of it: long for one plane, none for four directions."
plots.figure(points_drawn, (7.4, 3.0), "two planes", alt, (1, 2))

# %% [markdown]
# ## The idea
#
# $$y = (x D)\,S, \qquad D\in\mathbb R^{m\times r},\quad S\in\mathbb R^{r\times n}\ \text{sparse}.$$
#
# The $r$ rows of $S$ stand in groups of $g$. In every column each group holds **one** number, so a column has $k = r/g$ of them,
# and an address costs only $\log_2 g$ bits. At $B$ bits a number that is
#
# $$B\,m\,r + n\,k\,(B + \log_2 g)\ \text{bits, against}\ B\,R\,(m+n)\ \text{for rank}\ R .$$
#
# Groups of one *are* low rank. $S$ lies along the longer side, where the saving is.
#
# ## The package's own source

# %%
show.source(paper.support, paper.pursue, DenseSparse.sparse)

# %% [markdown]
# `pursue` chooses places (matching pursuit: again and again the direction nearest to what is left). `sparse` is the trick of
# the second half: places that are learnt.
#
# ## Same storage, one knob
#
# A matrix of block 3, at a share of its 16-bit storage. Blue and orange are the numbers of $S$ (below and above 0) in its first
# 96 columns, white is nothing. Turn the groups: fewer numbers a column, but more directions to choose from.

# %%
shown = {last: full[f"trunk.blocks.3.{last}"] for last in ("fc1", "fc2")} | {
    "query": claim.layers(False)["trunk.blocks.3.attention.q"]}  # fmt: skip
made = {(last, share, group): paper.choose(layer, share / 100, None, (group,))
        for last, layer in shown.items() for share in (25, 50) for group in (1, 2, 4, 8)}  # fmt: skip


# %%
@lru_cache(None)
def errors(matrix, share):
    layer = shown[matrix]
    return [100 * paper.error(layer, made[matrix, share, group].merge().weight) ** 0.5 for group in (1, 2, 4, 8)]


def render(matrix, share, group):
    new, at = made[matrix, share, group], (1, 2, 4, 8).index(group)
    s, p = (new.shadow * new.mask).detach()[:, :96], new.pattern
    picture = Image.fromarray(canvas.enlarge(canvas.signed(s.numpy(), float(s.abs().quantile(0.99))), 7))
    side = maps.curve([1, 2, 4, 8], errors(matrix, share), at, "numbers in a group", "error, %")
    m, n = sorted(shown[matrix].weight.shape)
    fact = f"{p.r} directions, {p.k} numbers in each of {n} columns, {p.place} bits an address."
    count = f"Error {errors(matrix, share)[at]:.0f} % of the weights; low rank: {errors(matrix, share)[0]:.0f} %."
    return maps.page(f"{matrix}, {m} x {n}, in {share} % of its bits", [[picture, side]], [fact, count])


# %% tags=["nbval-ignore-output"]
settled = [dict(matrix="fc1", share=50, group=group) for group in (1, 4, 8)]
knobs = dict(matrix=play.Choice(list(shown)), share=play.IntRange(25, 50, 50, 25), group=play.Choice([1, 2, 4, 8]))
play.knobs(render, settled=settled, **knobs)

# %% [markdown]
# Groups of two leave too little choice, groups of eight too few numbers. And the query's matrix, as wide as high, gains least:
# at groups of four $D$ takes nearly four fifths of its storage, of fc1's only a little over half.
#
# ## Predict, then run
#
# So far each number of a matrix counted the same. But inputs don't use all directions: what matters is $|X(W - DS)|$. Weighted
# so, low rank has an easier task, since real activations fill few directions.
#
# **Predict:** is the gain larger where $X$ meets $D$ (`fc1`, wide) or where it meets $S$ (`fc2`, high)?

# %% tags=["nbval-ignore-output"]
gains, half = {}, {"D S": mixed, "low rank": thin}
for last in ("fc1", "fc2"):
    for way, new in half.items():
        mine = [name for name in names if name.endswith(last)]
        merged = {name: new[name].merge().weight for name in mine}
        gains[f"{last}: {way}"] = [100 * paper.error(full[name], merged[name], grams[name]) ** 0.5 for name in mine]
show.bars(gains, "error of the outputs, % (a dot a block)", "Half of the storage, inputs weighed", digits=2)

# %% [markdown]
# What enters `fc1` fills few directions, which suits low rank. What enters `fc2` are hidden units, which fill many; there $D\,S$
# is far ahead.
#
# ## Learn the places
#
# A number that rests is 0, so it has no gradient and never comes back. The straight-through estimator keeps a dense *shadow*
# $\tilde S$; forward only the largest of each group speaks, backward **all** of $\tilde S$ gets the gradient of $S$:
#
# $$S = \Pi(\tilde S), \qquad \partial L/\partial \tilde S := \partial L/\partial S = D^\top x^\top \delta .$$
#
# A resting number that would help grows until it is the largest, and takes the place. Sizes are only comparable if the columns
# of $D$ have one length: after each step they get it back.
#
# One feed-forward at a quarter of its storage learns to say what the whole one says. Same start, same steps, three ways.


# %%
class Kept:
    """Rows that entered a part."""

    def __init__(self):
        self.rows = []

    def add(self, x):
        self.rows.append(x.flatten(0, 1))


entered = Kept()
paper.record(model, calls, {"trunk.blocks.3.fc1": entered})
rows, act = torch.cat(entered.rows), torch.nn.GELU("tanh")
block = torch.nn.Sequential(shown["fc1"], act, shown["fc2"])
start = torch.nn.Sequential(*(made[last, 25, 8] if last else act for last in ("fc1", "", "fc2")))


def batch(i):
    x = rows[torch.randint(len(rows) - 1024, (256,), generator=torch.Generator().manual_seed(i))]
    return x, block(x)


# %%
def learn(how, steps=240, rate=3e-3):
    """Loss at every tenth step on rows that weren't seen, churn, and masks of fc2 on the way."""
    student, step, curve, masks = copy.deepcopy(start), itertools.count(), [], []

    def loss(net, pair):  # once a step
        if next(step) % 10 == 0:
            with torch.no_grad():
                curve.append(F.mse_loss(net(rows[-1024:]), block(rows[-1024:])).item())
            masks.append(net[2].mask[:, :96].clone())
        return F.mse_loss(net(pair[0]), pair[1])

    churn = paper.tune(student, [student[0], student[2]], loss, batch, steps, rate, how)
    return curve, churn, masks


# %% tags=["nbval-ignore-output"]
runs = {how: learn(how) for how in ("fixed", "projected", "shadow")}
curves = {how: ([10 * i for i in range(len(curve))], curve) for how, (curve, _, _) in runs.items()}
show.lines(curves, "step", "squared error on unseen rows", "One feed-forward, a quarter of the storage")

# %% [markdown]
# Hardly a difference: few places move, and what improves are the numbers. From a start five times as bad (the claim's blind one)
# it is the same. Which ones in `fc2` (blue), after none, half and all of the steps? In the last fifth they are frozen.

# %% tags=["nbval-ignore-output"]
masks = torch.stack(runs["shadow"][2])
moved = (masks & ~masks[0])[[0, 12, 23]].float()
share, swaps = 100 * moved[-1].sum() / masks[0].sum(), 100 * sum(runs["shadow"][1])
title = f"New places in 96 columns: {share:.2g} % at the end (all swaps on the way: {swaps:.2g} %)"
show.mask(moved, caption=title, scale=2, alt=f"Three pictures of 96 columns of S: new places are few. {title}.")

# %% [markdown]
# ## Exercise
#
# Complete `project`: in each group of `g` rows, keep the entry of largest size in each column.

# %% tags=["exercise"]


def project(s, g):
    """s: `r n`, g divides r. Returns s with all but one entry of each group of each column set to 0."""
    return s * (s.abs() >= s.abs().max(0).values)  # not right yet: one a column, not one a group


# %% tags=["exercise-check"]
import torch

s = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
yours = project(s, 4)
counts = (yours != 0).view(3, 4, 5).sum(1)
if yours.shape == s.shape and (counts == 1).all() and (yours.abs().view(3, 4, 5).amax(1) == s.abs().view(3, 4, 5).amax(1)).all():
    print("Right.")
else:
    print(f"Numbers in each group and column: {counts.min()} to {counts.max()}. It should be 1, the largest.")
    print("Not yet.")

# %% [markdown]
# <details><summary>Hint</summary>
#
# `s.unflatten(0, (-1, g))` has the groups as an axis of its own.
#
# </details>
# <details><summary>Solution</summary>
#
# ```python
# def project(s, g):
#     size = s.unflatten(0, (-1, g)).abs()
#     best = size.argmax(1, keepdim=True)
#     return s * torch.zeros_like(size).scatter_(1, best, 1.0).flatten(0, 1)
# ```
#
# </details>
#
# ## The law of limits
#
# Groups of one are the low-rank layer; $D = 1$ with a full $S$ is the layer; skipping zeros says what multiplying by them says.

# %%
layer = shown["fc1"]
x, w = rows[:64], layer.weight.detach()
low, one = Factored.of(layer, 48), DenseSparse.of(layer, Pattern(48))
print("groups of one are low rank:", torch.allclose(one(x), low(x), atol=1e-3))
same = DenseSparse(torch.eye(128), w.T, Pattern(128), layer.bias)
print("D = 1 is the layer:", torch.allclose(same(x), layer(x), atol=1e-4))
few = made["fc1", 50, 4]
print("gathered is multiplied:", torch.allclose(few.gathered(x), few(x), atol=1e-3))
packed = few.pack()
print("bits stored, bits counted:", 8 * sum(t.numel() * t.element_size() for t in packed.values()), few.pattern.bits(128, 384))

# %% [markdown]
# ## The claim
#
# All matrices of the blocks in a third of their bits; 500 steps of learning from the dense model; 128 unseen clips, three draws;
# three learning rates each; margins fixed before.

# %% tags=["nbval-ignore-output"]
result = claims.read("dsformer")
ways = {"D S, places learnt": "shadow, 33 %", "D S, projected": "projected, 33 %", "D S, places fixed": "fixed, 33 %",
        "low rank": "low rank, 33 %"}  # fmt: skip
values = {name: result["arms"][arm]["values"]["rise"] for name, arm in ways.items()}
show.bars(values, "rise of the loss (a dot a draw)", "What two thirds less cost after tuning", digits=2)

# %% tags=["nbval-ignore-output"]
kinds = {"matrices: svd": "low rank", "matrices: grouped": "D S, one a group", "matrices: free": "D S, anywhere"}
values = {f"{title}{', weighed' if weighed else ''}":
          [100 * x for x in result["arms"][f"{arm}, 16 bits{', weighted' if weighed else ''}"]["values"]["mlp"]]
          for weighed in (False, True) for arm, title in kinds.items()}  # fmt: skip
show.bars(values, "error of a feed-forward's matrix, %", "Half of the storage, nothing tuned", digits=2)

# %% tags=["nbval-ignore-output"]
ways = {"D S": "shadow, 50 %", "low rank": "low rank, 50 %", "2 of 4 numbers (56 %)": "pruned, 50 %"}
values = {name: result["arms"][arm]["values"]["rise"] for name, arm in ways.items()}
show.bars(values, "rise of the loss (a dot a draw)", "What half of the bits costs after tuning", digits=2)

# %%
show.verdict("dsformer")

# %% [markdown]
# The authors report up to 40 % better compression than the best low-rank factorisers on language understanding, and up to 50 %
# on top of distilled and quantised models. Left out here: those tasks, and time: gathering is slower than a dense product on
# most processors.
#
# ## Where next
#
# - [MoDeGPT](modegpt.ipynb): make the width between two matrices smaller instead.
# - [The paper](https://arxiv.org/abs/2312.13211).
