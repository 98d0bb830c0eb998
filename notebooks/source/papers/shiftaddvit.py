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
# # ShiftAddViT: who may still multiply?
#
# A 32-bit product costs 3.7 pJ, a sum 0.9, a shift 0.13. ShiftAddViT takes a trained transformer and exchanges its products for
# sums and shifts, and lets a router send the tokens that need it to the last real products.
#
# *Ten minutes, one processor core. Surgery: a trained model in, one of cheaper primitives out.* At the end you can
# - write a product of matrices as "add this row or skip it";
# - say what a grid of powers of two is bad at, and what it is good for;
# - steer a router by the latencies of its experts.

# %%
from statistics import fmean

import torch
from torch import nn

from minivid import world
from minivid.core import corpus, noise, text, weights
from minivid.core.baselines.quant import dequantise, quantise, search, symmetric
from minivid.core.model import Cond
from minivid.core.surgery import record
from minivid.lab import claims, play, plots, show
from minivid.quantization import shiftaddvit as paper

_ = torch.set_num_threads(1)

# %% [markdown]
# ## The picture first
#
# Weights of a layer of our video model. Left, the places that an even grid of five bits gives them; right, the powers of two
# that five bits can name. Powers crowd around zero, far closer than is of use, and leave wide gaps where the large weights stand.

# %%
model = weights.load("video")
layer = model.get_submodule("trunk.blocks.2.fc1")
w = layer.weight.detach()
grid = search(w, symmetric(w, 5), ())
even, shifted = dequantise(quantise(w, grid), grid), paper.Shift(layer).weight.detach()


def lines(axes):
    for ax, values, title in zip(axes, (even, shifted), ("even grid", "powers of two"), strict=True):
        off = ((values - w).square().sum() / w.square().sum()).item()
        ax.hist(w.flatten().numpy(), 120, color="#BBBBBB")
        ax.plot(values.unique().numpy(), 0 * values.unique().numpy(), "|", color="#0072B2", ms=22)
        ax.set(title=f"{title}: error {off:.4f}", xlabel="weight", ylabel="how many", xlim=(-1.6, 1.6))


alt = "A histogram of weights with ticks below: evenly spaced for the even grid, crowding towards zero for powers of two."
plots.figure(lines, (7.2, 2.9), "two grids of five bits", alt, (1, 2))

# %% [markdown]
# ## You have not read the paper: how would you do it?
#
# Attention multiplies queries by keys, and what comes of it by values. How could one get rid of these products?
#
# <details><summary>An answer</summary>
#
# Make queries and keys 0 or 1. A value times 0 or 1 is no product: it is added, or skipped.
#
# </details>
#
# ## The idea
#
# With codes $b = \mathbb 1[x > \theta]$ of the unit vectors,
#
# $$y = \tfrac12 v + \tfrac1\pi\, b_q\,(b_k^\top v),$$
#
# then each $y$ is brought to one length, and a small convolution of $v$ is added. The inner bracket is a $d \times d$ table, so
# no map of all pairs of tokens is ever formed. For linear layers, $w \approx \mathrm{sign}(w)\, 2^{\mathrm{round}(\log_2
# |w|)}$: a shift and a sum.
#
# The authors find that attention bears this and feed-forward layers don't. So these get two experts, a product and a shift, and a
# router sends each token to one of them. A loss, the squared variation of *latency times tokens*, is least where the slower
# expert has fewer of them.
#
# ## The package's own source

# %%
show.source(paper.linear_angular, paper.power, paper.engine, paper.Mixture.forward, paper.balance)

# %% [markdown]
# ## Add or skip
#
# The same table twice: by a product of matrices, and by sums of those rows whose bit is set.

# %%
dice = torch.Generator().manual_seed(0)
v, bits = torch.randn(80, 32, generator=dice), torch.rand(80, 32, generator=dice) > 0.5
sums = torch.stack([v[bits[:, j]].sum(0) for j in range(32)])
print("largest difference:", f"{(bits.float().T @ v - sums).abs().max():.0e}")

# %% [markdown]
# ## The knob: how slow is a product?
#
# What one layer of the model gets from one clip with a little noise: 80 tokens, 4 x 4 for each of 5 moments. A mixture of the
# layer and its shifts learns to say what the layer says, with the balance loss. Black squares: tokens that still multiply.
# **Turn the latency of a product** (of a shift: 1). The slower it is, the fewer multiply, and the last of them lie on the bodies.
# The loss works on *soft* counts, the squares are hard ones, so where a router is undecided the share differs from the one asked
# for.

# %%
class Rows(list):
    add = list.append


scene = corpus.scenes("base", 1, 7, "held-out")
clip = world.batch(scene, 32, 17)
latent = weights.load("tok-v").encode(clip).detach()
t = torch.full((1, 5), 0.3)
words = text.tokens([world.caption(scene[0])], 16)
call = noise.flow().at(latent, torch.randn(latent.shape, generator=dice), t), t, Cond(text=words)
record(model, [call], {"trunk.blocks.2.fc1": (rows := Rows())})
x = torch.cat([row.detach().reshape(-1, 128) for row in rows])
said = layer(x).detach()


# %%
def mixed(latency):
    mix = paper.Mixture(layer, torch.Generator().manual_seed(0)).requires_grad_(True)
    paper.distil(mix, [((x,), said)] * 150, 1e-3, (latency, 1), 0.1)
    with torch.no_grad():
        return mix(x), mix.shifted.view(5, 4, 4)


routed = {latency: mixed(latency)[1] for latency in (1, 2, 4, 9)}


# %%
def routes(latency):
    want, shifts = latency / (latency + 1), routed[latency]
    found = shifts.float().mean().item()

    def draw(axes):
        for ax, frame, moment in zip(axes, shifts, range(0, 17, 4), strict=True):
            ax.imshow(clip[0, :, moment].permute(1, 2, 0) / 2 + 0.5)
            for i, j in (~frame).nonzero().tolist():
                x, y = [8 * j + side for side in (0, 7, 7, 0, 0)], [8 * i + side for side in (0, 0, 7, 7, 0)]
                ax.plot(x, y, color="black", lw=1.2)
            ax.set(xticks=[], yticks=[], title=f"frame {moment}")
        axes[0].set_ylabel(f"shift: asked {want:.2f}\nfound {found:.2f}")

    alt = f"A product {latency} times as slow: asked for {want:.2f} of the tokens on the shift, found {found:.2f}."
    return plots.figure(draw, (7.4, 1.9), f"routes at {latency}", alt, (1, 5))


# %% tags=["nbval-ignore-output"]
play.knobs(routes, settled=[{"latency": k} for k in (1, 4, 9)], latency=play.Choice([1, 2, 4, 9]))

# %% [markdown]
# ## Predict, then run
#
# **Predict:** five bits a weight, twice. Which grid errs less, even or powers of two? And what does a layer of 80 tokens cost
# with each?

# %%
off = lambda values: ((values - w).square().sum() / w.square().sum()).item()
print(f"error: even {off(even):.4f}, powers of two {off(shifted):.4f}")
for share in (0.0, 0.6, 1.0):
    print(f"{share:.0%} of the tokens shift: {paper.layer_energy(80, 128, 384, share) / 1e6:.1f} million pJ")
print("bytes of the packed weights:", paper.Shift(layer).packed().packed.numel(), "of", 4 * w.numel())

# %% [markdown]
# The bill counts every sum, those after a shift too. The released table leaves them out, and memory is in neither. And no
# processor of yours is faster by any of it: a matrix product is what it was built for.
#
# ## Exercise
#
# Complete `nearest`: the power of two that is nearest to each weight *in the logarithm*, with its sign.

# %% tags=["exercise"]


def nearest(w):
    """w: weights of any shape, none of them 0. Returns powers of two with the signs of w."""
    return w.sign()  # not right yet: all of size 1


# %% tags=["exercise-check"]
import torch

w_ = torch.tensor([0.3, -0.7, 0.05, 1.0, -0.25])
right = torch.tensor([0.25, -0.5, 0.0625, 1.0, -0.25])
if torch.equal(nearest(w_), right):
    print("Right.")
else:
    print(f"Wanted {right.tolist()}, yours are {nearest(w_).tolist()}: round log2 of the size, then raise 2 to it.")
    print("Not yet.")

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def nearest(w):
#     return w.sign() * 2 ** w.abs().log2().round()
# ```
#
# </details>
#
# ## The law of limits
#
# A layer whose weights are powers of two already is not changed. And integers that are shifted and added give the same numbers,
# exactly.

# %%
exact = nn.Linear(8, 4, bias=False)
exact.weight.data = torch.ldexp(*paper.power(torch.randn(4, 8, generator=dice)))
whole = torch.randint(-(2**20), 2**20, (5, 8), generator=dice)
by_shifts = paper.engine(whole, *paper.Shift(exact).packed().parts()).double() / 2**30
print("same weights:", torch.equal(paper.Shift(exact).weight, exact.weight))
print("same sums:", torch.equal(by_shifts, (whole.double() / 2**16) @ exact.weight.double().T))

# %% [markdown]
# ## The claim
#
# The whole video model, tuned by distillation for the same steps a stage; three seeds, margins fixed before. "Both" shifts all
# feed-forward layers of the additive model; the mixtures let a router choose, "random" lets chance.

# %% tags=["nbval-ignore-output"]
result = claims.read("shiftaddvit")
arms = ("attention", "linear", "shift", "uniform", "float, both stages", "both", "mixture, 6:4", "no loss", "product", "random")
value = lambda arm, metric: result["arms"][arm]["values"][metric]
errors = {arm: value(arm, "error") for arm in arms}
show.bars(errors, "relative output error, unseen clips (a dot a seed)", "What each primitive costs")

# %% [markdown]
# In our model it is attention that doesn't bear it; feed-forward layers lose a seventh of that. The codes are not to blame:
# linear attention *without* them errs as much, so what is missing is the softmax. And at as many bits an even grid beats
# powers of two by far: what speaks for shifts is energy alone.

# %% tags=["nbval-ignore-output"]
point = lambda arm: ([fmean(value(arm, "energy"))], [fmean(value(arm, "error"))])
curves = {arm: point(arm) for arm in arms}
show.lines(curves, "energy, share of the float model's", "relative output error", "Energy against error")

# %% [markdown]
# The mixtures lie between "both" and "float, both stages", on a nearly straight line: a token that multiplies costs energy and
# spares error, whichever token it is. The router learns to send *as many* as it is told, not *which* ("random" is as good). And
# it keeps both experts in memory: 1.17 times the bytes of the float layers, where shifts alone take 0.16.
#
# What the energy consists of, counted for the products of attention and the feed-forward layers of one clip:

# %% tags=["nbval-ignore-output"]
share = fmean(value("mixture, 6:4", "share"))
plans = {"float": ("dense", 0.0), "attention": ("additive", 0.0), "mixture, 6:4": ("additive", share), "both": ("additive", 1.0)}


def counted(kind, s):
    """Operations of one clip: 80 tokens, six blocks, each with attention and two layers of 128 x 384."""
    layers, sums = 12 * 80 * 128 * 384, 12 * 4 * 80 * 32 * (80 if kind == "dense" else 32)
    routers = 6 * 80 * 2 * (128 + 384) * (0 < s < 1)
    products = (1 - s) * layers + sums * (kind == "dense") + routers
    return {"multiply": products, "add": layers + sums + routers, "shift": s * layers}


# %% tags=["nbval-ignore-output"]
looks = ("#0072B2", ""), ("#E69F00", "//"), ("#009E73", "..")


def stack(ax):
    for x, plan in enumerate(plans.values()):
        bottom = 0.0
        for (name, n), (ink, hatch) in zip(counted(*plan).items(), looks, strict=True):
            high = paper.energy(**{name: n}) / 1e6
            ax.bar(x, high, bottom=bottom, color=ink, hatch=hatch, ec="white", label=name if x == 0 else None)
            bottom += high
    ax.set_xticks(range(len(plans)), plans)
    ax.set(ylabel="energy of a clip, microjoules")
    ax.legend(frameon=False)


plots.figure(stack, (6.4, 2.8), "energy", "Bars of energy: products make up most of the float model and none of the last one.")

# %%
show.verdict("shiftaddvit")

# %% [markdown]
# The authors report up to 5.18 times less latency on a GPU with kernels of their own, and 42.9 % less energy, at comparable
# accuracy.
#
# ## Where next
#
# - [QVGen](qvgen.ipynb): trained while it rounds, with a helper that fades.
# - [06 Quantization](../06_quantization.ipynb): all ways on one plot.
# - [The paper](https://arxiv.org/abs/2306.06446).
