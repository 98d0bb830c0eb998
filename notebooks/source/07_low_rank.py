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
# # 07 · Low rank and pruning: how few weights?
#
# A trained model is a few million numbers, and nobody believes that it needs all of them. But which ones, and what do you
# get for leaving them out: a smaller file, less arithmetic, less memory while it runs, or less time? These are four
# different questions, and a method that answers one of them often makes another worse.
#
# **Reading time** about 25 minutes · **runs** in about a minute on one processor core, offline
#
# After it you can
# 1. read the singular spectrum of a layer, and say why it looks worse than it is;
# 2. compute from which rank on two thin matrices are smaller than one;
# 3. shrink a video model by turning one knob, in three ways, and see what each does to a clip;
# 4. say which tensors hold the memory while it runs, and why fewer weights don't change that.

# %%
from functools import lru_cache
from statistics import fmean

import torch
from IPython.display import Markdown

from minivid import world
from minivid.claims import flashsvd as running
from minivid.claims import modegpt as claim
from minivid.core import noise, sample, text, weights
from minivid.core.baselines.lowrank import rank_for
from minivid.core.model import Cond
from minivid.lab import claims, measure, memory, papers, play, plots, show
from minivid.low_rank import dsformer, modegpt
from minivid.world.scores import psnr

_ = torch.set_num_threads(1)
model, tokenizer = weights.load("video"), weights.load("tok-v")

# %% [markdown]
# ## The picture first
#
# One caption, one noise, and only 70 % of the numbers in the matrices of our generator's blocks, saved in three ways. First
# the model watches itself on 96 noisy clips; two of the three ways use what it sees.

# %%
bench = claim.Bench.of(model, 99, fast=False, counts=(96, 8))
grams = claim.entering(bench)
ways = {
    "SVD of each matrix": lambda share: claim.factored(bench, share),
    "SVD, weighted by the inputs": lambda share: claim.factored(bench, share, grams),
    "narrower (MoDeGPT)": lambda share: claim.modular(bench, share, 1.0),
}


@lru_cache(None)
def small(way, share):
    return ways[way](share)


# %% tags=["nbval-ignore-output"]
caption, shown = "a red circle moves right", [model, *(small(way, 0.7) for way in ways)]
films = [sample.generate([caption], 3, model=one, tokenizer=tokenizer)[0] for one in shown]
titles = [f"{way}: {psnr(film, films[0]):.0f} dB to it" for way, film in zip(ways, films[1:], strict=True)]
show.clips(films, ["all numbers", *titles], f"“{caption}”, 70 % of the numbers")

# %% [markdown]
# <details><summary><b>Before you read on:</b> what would you leave out?</summary>
#
# The smallest numbers: but then the zeros must be stored, or their places. Whole rows: then the neighbouring matrix
# shrinks too, and what the row said is lost, unless another can say it. Directions that hardly matter: that is what
# follows.
# </details>
#
# ## Spectra
#
# Each matrix turns and stretches; its singular values say how much, direction by direction. If most were tiny, the matrix
# could be made of a few. Grey: the values of the matrix itself. Blue: what really comes out, direction by direction, when
# the model's own activations go in (the spectrum of $C^{1/2} W$ with $C = X^\top X$).

# %%
roles = {"query": "attention.q", "value": "attention.v", "hidden layer in": "fc1", "hidden layer out": "fc2"}


def spectrum(matrix):
    """Share of the energy that the first r directions hold."""
    energy = torch.linalg.svdvals(matrix.double()).square()
    return (energy.cumsum(0) / energy.sum()).tolist()


# %%
def draw(axes):
    for ax, (title, role) in zip(axes, roles.items(), strict=True):
        for name in (name for name in bench.layers if name.endswith(role) and "cross" not in name):
            w = bench.layers[name].weight.detach()
            for matrix, colour in ((w, "#999999"), (w.double() @ modegpt.roots(grams[name])[0], "#0072B2")):
                ax.plot(range(1, min(w.shape) + 1), spectrum(matrix), color=colour, lw=1)
        ax.axvline(rank_for(*w.shape, 1.0), color="#222222", ls=":", lw=1)
        ax.set(title=title, xlabel="rank r", ylim=(0, 1.02))
    axes[0].set_ylabel("energy in the first r")


alt = "Cumulated spectra of four kinds of layers: grey ones rise slowly, blue ones, of what comes out, steeply."
plots.figure(draw, (8.6, 2.6), "spectra", alt, (1, 4))

# %% [markdown]
# The grey curves are discouraging: a trained matrix is nearly full of directions. The blue ones aren't: the inputs hardly
# use most of them. And the dotted line is a warning: two factors `o x r` and `r x i` are smaller than `o x i` only to the
# left of it, at $r < \frac{o\,i}{o + i}$; for a square matrix that is half of its width. **To save 30 % of a square matrix
# you must throw away two thirds of its directions.**
#
# ## Turn it yourself
#
# Choose a way and how many numbers stay. The clip is what the model believes in when it is told a clip with 70 % noise.


# %%
scene = world.draw(7, 1, "base", "held-out")
latent, words = tokenizer.encode(world.render(scene, 32, 17)[None]), text.tokens([world.caption(scene)])
t = torch.tensor([0.7])
mixed = noise.flow().at(latent, sample.start(1, latent.shape[1:], 0), t)


@torch.no_grad()
def believed(net):
    return tokenizer.decode(noise.flow().clean(mixed, t, net(mixed, t, Cond(text=words))))[0]


# %%
whole = believed(model)


def render(way, stays):
    net = small(way, stays / 100)
    now = believed(net)
    left, full = (measure.parameters(m) / 1e6 for m in (net, model))
    told = f"{way}, {stays} %: {psnr(now, whole):.0f} dB, {left:.2f} of {full:.2f} million numbers"
    return show.clips([whole, now], ["all numbers", told], difference=True)


play.knobs(
    render, settled=[dict(way=way, stays=70) for way in ways], way=play.Choice(list(ways)[::-1]),
    stays=play.IntRange(30, 90, 70, 10),
)  # fmt: skip

# %% [markdown]
# ## Narrower instead of thinner
#
# Two matrices in a row have a width between them. Shrink *that*, and both get smaller from the first number on: no
# break-even, no further matrices. What stands between them (an activation, a rotation, nothing) decides how what stays can
# speak for what goes: [MoDeGPT](papers/modegpt.ipynb).
#
# ## Thin times sparse
#
# Both factors of an SVD are dense, and all columns of the matrix share one small space. Let the second factor be wide and
# sparse instead: each column takes a few directions of many, others each, and an address is only a few bits. A feed-forward's
# matrix of block 3 in half of its bits (addresses included), without training; groups of one are the SVD:

# %% tags=["nbval-ignore-output"]
wide, missed = bench.layers["trunk.blocks.3.fc2"], {}
gram = grams["trunk.blocks.3.fc2"]
for group in (1, 2, 4, 8):
    new = dsformer.choose(wide, 0.5, gram, (group,))
    title = "SVD, weighted" if group == 1 else f"{new.pattern.k} of {new.pattern.r} directions"
    missed[title] = 100 * dsformer.error(wide, new.merge().weight, gram) ** 0.5
show.bars(missed, "error of what fc2 says, %", "A dense times a sparse matrix", digits=2)

# %% [markdown]
# The paper learns the places too, with the task, by a gradient that goes straight through the choice of the largest. Here
# that brings next to nothing: [DSFormer](papers/dsformer.ipynb).
#
# ## Less memory? Look who holds it
#
# Fewer weights are a smaller file. But while the model runs, what counts is the largest pile of activations that are alive
# at one time. One block, 1,024 tokens, from left to right in time:


# %%
names = ("dense", "svd", "chunked", "streaming")
memory.timeline({way: running.lives(way) for way in names}, 1024, 128, "One block, 1,024 tokens, half of the rank")

# %% [markdown]
# *SVD* has fewer weights and the same peak. To lower it, nothing wide may ever be written down: rebuild tiles from the
# thin factors, use them, drop them ([FlashSVD](papers/flashsvd.ipynb)). Or, more simply, do it in chunks of tokens. The
# lesson says what each is worth.
#
# ## Narrower or thinner, on one plot
#
# From the claims, means of three seeds: by how much the loss on held-out clips rises when 10, 30 or 50 % of the blocks'
# numbers go, without any fine-tuning.

# %% tags=["nbval-ignore-output"]
result = claims.read("modegpt")["arms"]
titles = {"modegpt": "MoDeGPT", "uniform": "MoDeGPT, even", "whitened": "SVD, weighted",
          "whitened, shared out": "SVD, ranks shared out", "svd": "SVD", "pruned": "pruned by size"}  # fmt: skip
curves = {}
for way, title in titles.items():
    arms = [result[f"{way}, {share} %"]["values"] for share in (50, 70, 90) if f"{way}, {share} %" in result]
    curves[title] = [fmean(arm["parameters"]) for arm in arms], [fmean(arm["rise"]) for arm in arms]
show.lines(curves, "parameters of the model, millions", "rise of the loss", "Weights and quality", log="y")

# %% [markdown]
# ## One training, all sizes
#
# So far every size is a model of its own. A model can also *learn to be cut*: run it at random widths for some steps, so that the
# first terms of each product must carry most ([Maestro](papers/maestro.ipynb)). From its claim: the same generator, begun
# at the weighted SVD, with equal steps for all; "a model a size" shares them among three specialists.

# %% tags=["nbval-ignore-output"]
taught = claims.read("maestro")["arms"]
titles = {"start": "SVD, weighted", "single": "one layer a step", "independent": "all layers", "specialists": "a model a size"}
ladder = {title: ((25, 50, 75), [fmean(taught[f"video: {arm}"]["values"][f"rise_{share}"]) for share in (25, 50, 75)])
          for arm, title in titles.items()}  # fmt: skip
show.lines(ladder, "numbers of the matrices left, %", "rise of the loss", "Cut anywhere, after one training")

# %% [markdown]
# ## The papers of this chapter

# %% tags=["nbval-ignore-output"]
asks = {"flashsvd": "can a low-rank model run in less memory, and not only lie smaller on the disk?",
        "modegpt": "can a model be made narrower without training it again?",
        "dsformer": "is a dense small matrix times a sparse one better than two thin ones?",
        "maestro": "can one training give all ranks at once?",
        "vdmini": "which blocks of a video U-Net draw what is there, and which move it?",
        "hummingbird": "and if most blocks go, can a judge teach the rest?"}
Markdown(papers.listed(asks))

# %% [markdown]
# ## Where next
#
# * [MoDeGPT](papers/modegpt.ipynb): three decompositions, one for each thing that can stand between two matrices.
# * [DSFormer](papers/dsformer.ipynb): a dense matrix times a sparse one, whose places are learnt.
# * [Maestro](papers/maestro.ipynb): terms put in order while they are trained.
# * [FlashSVD](papers/flashsvd.ipynb): memory, measured while it runs.
# * [00 · Start](00_start.ipynb): the model that was cut here.
