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
# # Maestro: a model that may be cut anywhere
#
# A matrix can be trained as a sum of thin products. If the sum is *ordered*, the most important product first, you can cut its
# tail whenever you like: while it is trained, or years later on a smaller machine.
#
# *Ten minutes, one processor core. Procedure: how a model is trained.* At the end you can
# - say why ordinary training leaves a product without any order, and why drawing a width gives it one;
# - see singular vectors and principal components come out of a training loop that never heard of them;
# - let a penalty on tails find the rank of each layer.

# %%
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import nn

from minivid.claims import maestro as claim
from minivid.core import sample, weights
from minivid.lab import claims, play, plots, show
from minivid.low_rank import maestro as paper
from minivid.low_rank.maestro import Ordered, Settings
from minivid.world.scores import psnr

_ = torch.set_num_threads(1)

# %% [markdown]
# ## The picture first
#
# A layer of 16 x 16 learns to say $y = A x$, as a product $U V^\top$ of two matrices. Both pictures ask: how much of the $j$-th
# true singular vector (across) is in the $b$-th column of $U$ (down)? Left, ordinary training. Right, Maestro. Both say $A x$
# equally well.

# %%
n, dice = 16, torch.Generator().manual_seed(0)
u, v = claim.orthogonal(n, dice), claim.orthogonal(n, dice)
a = u * 0.85 ** torch.arange(n) @ v.T
every = torch.cat([torch.eye(n), -torch.eye(n)]) * n**0.5


@lru_cache(None)
def learnt(sampler, steps=1600):
    """Looks at U and V' on the way, every 100 steps."""
    torch.manual_seed(0)
    model, looks = nn.Sequential(Ordered.of(nn.Linear(n, n, bias=False), n)), []
    keep = lambda: looks.append((model[0].a.detach().double(), model[0].b.detach().double()))
    loss = lambda m, x: F.mse_loss(m(x), x @ a.T.float())
    paper.train(model, loss, lambda i: every, steps, 1e-2, Settings(sampler, every=1), lambda step: step % 100 or keep())
    keep()
    return looks


# %%
names = {"none": "ordinary", "single": "ordered"}


def overlap(axes, step):
    for ax, (sampler, name) in zip(axes, names.items(), strict=True):
        columns = F.normalize(learnt(sampler)[step // 100][0], dim=0)
        ax.imshow((columns.T @ u).abs(), cmap="cividis", vmin=0, vmax=1, extent=(0.5, n + 0.5, n + 0.5, 0.5))
        ax.set(title=f"{name}, step {step}", xlabel="true singular vector", ylabel="column of U")
        ax.set(xticks=(1, 8, 16), yticks=(1, 8, 16))


alt = "Two grids of 16 x 16: ordinary training is scattered all over, ordered training is a bright diagonal."
plots.figure(lambda axes: overlap(axes, 1600), (7.0, 3.4), "overlap", alt, (1, 2))

# %% [markdown]
# ## You have not read the paper: how would you do it?
#
# You want a model that can be made smaller later, without training it again. How do you store it?
#
# <details><summary>The usual answer</summary>
#
# Train it, take the singular value decomposition of each matrix, keep the largest terms. The decomposition minds the matrix (or,
# whitened, the layer's inputs), but not what the rest of the network does with the layer's mistakes.
#
# </details>
#
# ## The naive way: train the product, cut it
#
# $U V^\top$ is the same matrix as $(U R)(R^{-1} V^\top)$ for every invertible $R$. Training knows the product alone, so it has no
# reason to put anything first. Cut to $b$ terms, what is lost?

# %%
best = (0.85 ** torch.arange(n)).square().flip(0).cumsum(0).flip(0).sqrt()[1:].tolist()
error = lambda left, right: [(a - left[:, :b] @ right[:b]).norm().item() for b in range(1, n)]
lost = {name: (list(range(1, n)), error(*learnt(sampler)[-1])) for sampler, name in names.items()}
show.lines(lost | {"best possible": (list(range(1, n)), best)}, "terms kept", "error of the cut matrix", "Cut after training")

# %% [markdown]
# The ordered one lies on the best possible curve, at every width at once.
#
# ## The idea
#
# At each step **one** layer $i$ runs with its first $b$ terms alone, every other layer with all of its own; the pair $(i, b)$ is
# drawn:
#
# $$\min\ \mathbb E_{(i,b)}\ \mathrm{loss}\big(\dots,\ U^i_{:b} {V^i_{:b}}^{\!\top},\ \dots\big).$$
#
# The first term is in every pass, the last in very few. So the first has to do what helps most. For a linear target the only
# matrix pair that is best at all $b$ is the SVD.
#
# And to find out *how many* terms a layer needs, a lasso presses on whole tails $U_{b:}$, all columns from $b$ on:
#
# $$\lambda \sum_i \sum_b \big(\|U^i_{b:}\| + \|V^i_{b:}\|\big).$$
#
# Column $b$ stands in $b$ of these norms: late ones are pressed hardest, and a tail dies as a whole. When
# $\|U_{b:}\|\,\|V_{b:}\|$ is nothing, the tail is cut, while training goes on.
#
# ## The package's own source

# %%
show.source(Ordered.forward, paper.Pairs.draw, paper.tails, paper.softened)

# %% [markdown]
# `softened` is what makes tails *exactly* 0: gradient steps only ever come near. It solves the lasso for one step, by shrinking
# the shortest tail, then the next longer, up to the whole.
#
# ## Watch the order appear
#
# **Turn the step.** Both ends of the diagonal settle first, its middle last.

# %%
def watch(step):
    alt = f"Step {step}: the grid of ordinary training stays scattered; that of ordered training turns diagonal."
    return plots.figure(lambda axes: overlap(axes, step), (7.0, 3.4), f"overlap at {step}", alt, (1, 2))


# %% tags=["nbval-ignore-output"]
play.knobs(watch, settled=[{"step": s} for s in (0, 400, 1200)], step=play.IntRange(0, 1600, 0, 100))

# %% [markdown]
# ## How many terms?
#
# Two layers in a row learn a map that needs **three** terms. Bright: an important position. The white line is the rank that
# shrinking has left. **Turn the strength** $\lambda$.

# %%
w = torch.randn(12, 3, generator=dice) @ torch.randn(3, 12, generator=dice) / 4


@lru_cache(None)
def pressed(strength):
    """Importance of each position of both layers, its ranks, every 20 steps; and the loss on unseen inputs."""
    torch.manual_seed(0)
    model, looks = nn.Sequential(*(Ordered.of(nn.Linear(12, 12), 12) for _ in range(2))), []
    own = list(paper.layers(model).values())

    def look(step):
        if step % 20 == 0:
            padded = [F.pad(paper.importance(x).detach(), (0, 12 - int(x.live))) for x in own]
            looks.append((torch.stack(padded), [int(x.live) for x in own]))

    batch = lambda i: torch.randn(64, 12, generator=torch.Generator().manual_seed(i))
    loss = lambda m, x: F.mse_loss(m(x), x @ w)
    paper.train(model, loss, batch, 400, 1e-2, Settings(every=1, strength=strength, epoch=20), look)
    return looks, [int(x.live) for x in own], loss(model, batch(9999)).item()


# %%
def tail(strength):
    looks, ranks, loss = pressed(strength)

    def draw(axes):
        for i, ax in enumerate(axes):
            value = torch.stack([x[i] for x, _ in looks], 1).clamp_min(1e-4).log10()
            ax.imshow(value, cmap="cividis", vmin=-3, vmax=1, aspect="auto", extent=(0, 400, 12.5, 0.5))
            ax.step([20 * j for j in range(len(looks))], [r[i] + 0.5 for _, r in looks], color="white", lw=2, where="post")
            ax.set(title=f"layer {i + 1}: rank {ranks[i]}", xlabel="step", ylabel="position", ylim=(12.6, 0.4))

    alt = f"Strength {strength}: ranks {ranks} are left, the loss on unseen inputs is {loss:.2g}."
    return plots.figure(draw, (7.0, 2.8), f"strength {strength}", alt, (1, 2))


# %% tags=["nbval-ignore-output"]
strengths = [0.0, 0.1, 0.3, 0.5, 1.0]
play.knobs(tail, settled=[{"strength": x} for x in (0.0, 0.5, 1.0)], strength=play.Choice(strengths))

# %% [markdown]
# ## Predict, then run
#
# **Predict:** with which strengths is the loss on unseen inputs small, though terms are gone? And what happens beyond?

# %%
for strength in strengths:
    _, ranks, loss = pressed(strength)
    print(f"strength {strength}: ranks {ranks}, loss {loss:.3g}")

# %% [markdown]
# ## On the video model
#
# The shared generator was trained without any order. We write its 60 matrices as products (whitened SVD) and let it learn for 30
# steps to say, at random widths, what it says whole. Then half of the numbers of every matrix go.

# %%
whole, batches = weights.load("video"), claim.lessons(0, True, 8)
before, after = claim.whitened(whole, 0, True), claim.whitened(whole, 0, True)


def repeat(model, batch):
    with torch.no_grad():
        said = whole(*batch[0])
    return F.mse_loss(model(*batch[0]), said)


_ = paper.train(after, repeat, batches, 30, 1e-3, Settings("independent", every=16))

# %% tags=["nbval-ignore-output"]
caption = "a red circle moves right"
draw = lambda model: sample.generate([caption], 3, model=model)[0]
half = {name: paper.pruned(model, claim.at(model, 0.5)) for name, model in (("whitened SVD", before), ("30 steps later", after))}
films = {"whole": draw(whole)} | {name: draw(model) for name, model in half.items()}
titles = [name if name == "whole" else f"{name}: {psnr(film, films['whole']):.0f} dB" for name, film in films.items()]
show.clips(list(films.values()), titles, f"“{caption}”, half of the numbers")

# %% [markdown]
# Eight clips and 30 steps are no training; what a longer one brings, the claim measures.
#
# ## Exercise
#
# Complete `penalty`: the lasso of one layer, for U `o r` and V `i r`.

# %% tags=["exercise"]


def penalty(u, v):
    """The sum over b of the norms of all columns from b on, of u and of v."""
    return u.norm(dim=0).sum() + v.norm(dim=0).sum()  # not right yet: columns, not tails


# %% tags=["exercise-check"]
import torch

some, others = (torch.randn(7, 5, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
right = sum(x[:, b:].norm() for x in (some, others) for b in range(5))
if torch.allclose(penalty(some, others), right):
    print("Right.")
else:
    print(f"It should be {right:.3f}, yours is {penalty(some, others):.3f}. Is the last column in all five norms?")
    print("Not yet.")

# %% [markdown]
# <details><summary>Hint</summary>
#
# Squares of columns, summed from the right: `flip`, `cumsum`, `flip`.
#
# </details>
# <details><summary>Solution</summary>
#
# ```python
# def penalty(u, v):
#     tails = lambda x: x.square().sum(0).flip(0).cumsum(0).flip(0).sqrt()
#     return (tails(u) + tails(v)).sum()
# ```
#
# </details>
#
# ## The law of limits
#
# At full width the products say what the layers say; a cut is the truncated SVD; a masked tail says what a pruned one says; no
# strength presses nothing.

# %%
layer, x = nn.Linear(12, 20), torch.randn(5, 12)
one = Ordered.of(layer, 12)
print("full width is the layer:", torch.allclose(one(x), layer(x), atol=1e-5))
s = torch.linalg.svdvals(layer.weight)
print("a cut is the SVD's:", torch.allclose((layer.weight - one.a[:, :4] @ one.b[:4]).norm(), s[4:].norm(), atol=1e-5))
one.live.fill_(5)
print("pruned says what masked says:", torch.allclose(one.plain()(x), one(x), atol=1e-5), type(one.plain()).__name__)
one.live.fill_(8)
print("merged where factors save nothing:", type(one.plain()).__name__)

# %% [markdown]
# ## The claim
#
# A small generator from scratch, 800 steps, three seeds; its twenty matrices cut at no retraining. Margins fixed before.

# %% tags=["nbval-ignore-output"]
result = claims.read("maestro")
values = lambda arm: result["arms"][arm]["values"]
mean = lambda arm, metric: sum(values(arm)[metric]) / len(values(arm)[metric])
shown = {"dense, whitened SVD": "small: dense", "one layer a step": "small: single", "all layers": "small: independent"}
shares = (25, 50, 75, 100)
ladder = {name: (shares, [mean(arm, f"loss_{share}") for share in shares]) for name, arm in shown.items()}
show.lines(ladder, "numbers left, %", "loss on held-out clips", "One model, four sizes")

# %% [markdown]
# The dense one is nearly flat: so small a model, so briefly trained, hardly uses its matrices, and a good SVD cuts it for
# free. One layer a step is drawn too rarely to order twenty layers in 800 steps; widths for all layers at once do it, at
# some cost at full size. For ranks, too, there is little to find here:

# %% tags=["nbval-ignore-output"]
ways = {"Maestro's ranks": "found", "the same from scratch": "again", "one share for all": "uniform", "narrow, dense": "narrow"}
kept = 100 * mean("ranks", "share")
show.bars({name: values("ranks")[metric] for name, metric in ways.items()}, "loss (a dot a seed)",
          f"Trained small: {kept:.0f} % of the numbers")  # fmt: skip

# %% [markdown]
# The shared generator, trained for 45,000 steps, does need its numbers. There 150 steps are worth a third of what a cut costs:

# %% tags=["nbval-ignore-output"]
ways = {"whitened SVD": "start", "one layer a step": "single", "all layers": "independent", "one model a size": "specialists"}
show.bars({name: values(f"video: {arm}")["rise_50"] for name, arm in ways.items()}, "rise of the loss (a dot a seed)",
          "The shared generator at half of its numbers, equal steps in all")  # fmt: skip

# %%
show.verdict("maestro")

# %% [markdown]
# The authors report smaller footprints at equal accuracy than factorising afterwards, pruning and low precision, on classifiers
# and a translator; their abstract has no numbers. Left out: those networks, convolutions, and training as
# long as theirs, where one layer a step is drawn a thousand times as often.
#
# ## Where next
#
# - [DSFormer](dsformer.ipynb): not one space for all columns.
# - [The paper](https://arxiv.org/abs/2308.14929).
