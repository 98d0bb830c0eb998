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
# # 06 · Quantization: how few bits?
#
# A weight is stored in 32 bits, as if its tenth digit mattered. Eight bits are enough for nearly everything, four for
# most, and at two bits, four values in all, a network is destroyed or a clever method saved it. This chapter is about
# where the line runs, and what moves it.
#
# **Reading time** about 25 minutes · **runs** in about a minute on one processor core, offline
#
# After it you can
# 1. choose a grid: how many levels, how wide, shared by how many weights; and count what it really costs;
# 2. say why one odd channel ruins a whole layer, and name two ways to spread it;
# 3. explain how rounding *worse* weight by weight can be better for the layer;
# 4. run a layer on integers alone;
# 5. read "3 bits" in a paper and ask the right question.

# %%
import tempfile
from functools import lru_cache
from pathlib import Path

import torch
from IPython.display import Markdown

from minivid import world
from minivid.claims import dmmv as claim
from minivid.core import noise, sample, text, weights
from minivid.core.baselines import quant
from minivid.core.baselines.quant import QuantisedLinear
from minivid.core.baselines.vq import kmeans
from minivid.core.model import Cond
from minivid.core.surgery import Gram, record, swap
from minivid.lab import canvas, claims, measure, papers, play, plots, show
from minivid.quantization import dmmv, vq4dit
from minivid.quantization.hawqv3 import dyadic, rescale
from minivid.world.scores import psnr

# %%
_ = torch.set_num_threads(1)
model, tokenizer = weights.load("video"), weights.load("tok-v")
layers = {name: m for name, m in model.named_modules() if "blocks" in name and isinstance(m, torch.nn.Linear)}
share = sum(m.weight.numel() for m in layers.values()) / measure.parameters(model)
print(f"{len(layers)} linear layers in the blocks hold {100 * share:.0f} % of the model's numbers")

# %% [markdown]
# ## The picture first
#
# One caption, one noise, and every linear layer of the blocks rounded to fewer and fewer bits: to the nearest of
# $2^b$ evenly spaced values between the least and the greatest weight of its row.


# %%
def rounded(bits, grid="a row"):
    """The model with its layers in few bits, each weight at its nearest level."""
    return swap(model, {name: QuantisedLinear.of(m, steps(m, bits, grid)) for name, m in layers.items()})


def steps(layer, bits, grid):
    """A grid for a whole matrix, for each row or for each group of 32 weights of a row, as wide as the weights."""
    w = layer.weight.detach()
    return {"a matrix": lambda: quant.minmax(w, bits, (0, 1)), "a row": lambda: quant.minmax(w, bits, 1),
            "a group of 32": lambda: quant.minmax(w.unflatten(1, (-1, 32)), bits, -1)}[grid]()  # fmt: skip


# %% tags=["nbval-ignore-output"]
caption = "a red circle moves right"
film = lambda net: sample.generate([caption], 3, model=net, tokenizer=tokenizer)[0]
whole = film(model)
films = {bits: film(rounded(bits)) for bits in (8, 6, 4, 3, 2)}
titles = [f"{bits} bits: {psnr(one, whole):.0f} dB to it" for bits, one in films.items()]
show.clips([whole, *films.values()], ["32 bits", *titles], f"“{caption}”, the same noise each time")

# %% [markdown]
# <details><summary><b>Before you read on:</b> what would you try at three bits?</summary>
#
# A grid of its own for fewer weights, so that it can be narrow. Cutting off the few largest weights, for the sake of the
# many. Levels where the weights are, instead of evenly spaced ones. Or another question: must each weight be near what it
# was, or only what the *layer* says?
# </details>
#
# ## A grid, and what it costs
#
# $$\text{value} = s \cdot \text{code} + o, \qquad
# \text{code} = \operatorname{clamp}\Big(\operatorname{round}\frac{w - o}{s},\ 0,\ 2^b - 1\Big)$$
#
# The step $s$ and the offset $o$ must be stored too, in 16 bits each. **Turn the bits, share a grid among fewer weights, and
# cut off the ends.** Grey: the weights of one row of a layer; the lines are the levels that it may take (of groups, those of the
# first).

# %%
name = "trunk.blocks.1.attention.v"
layer = layers[name]
w = layer.weight.detach()


def grids(shared, clip, bits):
    s = steps(layer, bits, shared).scaled(clip)
    each = s.each(w)
    back = quant.dequantise(quant.quantise(w, each), each)
    error = ((back - w).square().sum() / w.square().sum()).sqrt()
    true = bits + 32 * s.step.numel() / w.numel()

    def draw(ax):
        ax.hist(w[0].tolist(), 60, color="#bbbbbb")
        for value in torch.unique(back[0, :32] if shared == "a group of 32" else back[0]).tolist():
            ax.axvline(value, color="#0072B2", lw=1)
        ax.set(xlabel="weight", ylabel="how many", title=f"{true:.2f} bits a weight in all, off by {100 * error:.1f} %")

    alt = f"Weights of a row and their levels, {bits} bits, a grid for {shared}: off by {100 * error:.1f} %."
    return plots.figure(draw, (7, 2.6), f"{bits} bits, a grid for {shared}, {clip} of its width", alt)


# %%
settled = [dict(shared="a row", clip=1.0, bits=3), dict(shared="a group of 32", clip=1.0, bits=3)]
settled.append(dict(shared="a row", clip=0.7, bits=3))
play.knobs(grids, settled=settled, shared=play.Choice(["a row", "a matrix", "a group of 32"]),
           clip=play.FloatRange(0.4, 1, 1, 0.1), bits=play.IntRange(2, 8, 3))  # fmt: skip

# %% [markdown]
# A grid for a whole matrix costs nothing and is as wide as the worst weight anywhere; one for 32 weights is narrow, and
# costs a whole bit a weight. A clipped one gives up a few weights for the many. Ask of every "3 bits" in a paper: *with
# the steps?*
#
# ## One odd channel
#
# When activations are rounded too, all channels of a token share a grid. In large transformers a few channels grow a hundred
# times larger than the rest, and every other one falls into the two or three levels around zero. Our model is too small to
# have any (below), so we **plant one**: channel 40 of the layer's input times $c$, its column of weights divided by
# $c$. Nothing has changed, until somebody rounds.

# %%
fitted, unseen = claim.calls(0, False, "train"), claim.calls(0, False, "held-out")
record(model, fitted, grams := {name: Gram() for name in layers})
record(model, unseen, {name: (inputs := dmmv.Inputs())})
x = inputs.rows[::20]
largest = x.abs().amax(0)
print(f"the largest channel is {largest.max() / largest.median():.1f} times as large as the one in the middle")


# %%
def nothing(x, w):
    return x, w


def smoothed(x, w):
    s = quant.smoothing(x.abs().amax(0), w.abs().amax(0))
    return x / s, w * s


def rotated(x, w):
    return quant.hadamard(x), quant.hadamard(w)


remedies = {"nothing": nothing, "SmoothQuant": smoothed, "rotation": rotated}


# %%
def outlier(remedy, times, bits):
    c = torch.ones(x.shape[1]).index_fill(0, torch.tensor([40]), float(times))
    inside, weight = remedies[remedy](x * c, w / c)
    coarse = lambda t, dim: quant.fake_quantise(t, quant.minmax(t, bits, dim))
    error = coarse(inside, -1) @ coarse(weight, 1).T - x @ w.T
    off = (error.square().sum() / (x @ w.T).square().sum()).sqrt()

    def draw(axes):
        for ax, values, what in zip(axes, (inside.abs().amax(0), weight.abs().amax(0)), ("input", "weight"), strict=True):
            odd = 40 if remedy != "rotation" else -1
            ax.bar(range(len(values)), values, color=["#E69F00" if i == odd else "#0072B2" for i in range(len(values))], width=1)
            ax.set(xlabel="channel", ylabel=f"largest {what}")
        axes[0].set_title(f"{remedy}: output off by {100 * off:.1f} %")

    told = f"{remedy}: {bits} bits for inputs and weights, output off by {100 * off:.1f} %"
    return plots.figure(draw, (8.2, 2.5), told, f"Channel 40 times {times}, {told}.", (1, 2))


# %%
play.knobs(outlier, settled=[dict(remedy=remedy, times=30, bits=6) for remedy in remedies], remedy=play.Choice(list(remedies)),
           times=play.IntRange(1, 60, 30), bits=play.IntRange(3, 8, 6))  # fmt: skip

# %% [markdown]
# SmoothQuant divides each channel of the input by a factor and multiplies its column of weights by it, until both are
# equally large. Our channel met a column that we had made small, so the trouble vanishes; where the weights are of ordinary
# size, half of it moves into them. A rotation mixes all channels, input and weights alike ($x R\,(w R)^\top = x\,w^\top$ for
# every orthogonal $R$), so that nobody is odd any more, whatever the weights; but what was large in one channel is now a
# little of it in all, so here it comes second. And with no outlier at all (set it to 1) both bring little.
#
# ## Both, but in which order?
#
# Both change no product, so one may follow the other. [QuantVGGT](papers/quantvggt.ipynb) rotates first and levels then; others
# the other way round. Four odd channels this time, in 4 bits, and they grow:

# %%
orders = {"nothing": (nothing,), "SmoothQuant": (smoothed,), "rotation": (rotated,),
          "rotation, SmoothQuant": (rotated, smoothed), "SmoothQuant, rotation": (smoothed, rotated)}  # fmt: skip


def missed(order, times):
    """How far the layer's output is off, in %, when four channels are so many times as large."""
    c = torch.ones(x.shape[1]).index_fill(0, torch.tensor([7, 40, 71, 100]), float(times))
    inside, weight = x * c, w / c
    for remedy in order:
        inside, weight = remedy(inside, weight)
    coarse = lambda t: quant.fake_quantise(t, quant.symmetric(t, 4, 1))
    error = coarse(inside) @ coarse(weight).T - x @ w.T
    return 100 * (error.square().sum() / (x @ w.T).square().sum()).sqrt().item()


grow = (1, 2, 5, 10, 20)
curves = {name: (grow, [missed(order, times) for times in grow]) for name, order in orders.items()}
show.lines(curves, "four channels, times what they were", "output off by, %", "A giant is levelled at once, or never", log="x")

# %% [markdown]
# Without giants, on the left, rotating and then levelling is the best of all. With them it is the other order: a rotation
# mixes giants into every channel, and then there is nothing left to level. (That levelling undoes them *entirely* is our doing:
# we made their weights small.)
#
# ## Rounding together
#
# The nearest level for each weight is not the nearest *layer*: inputs are correlated, so one error can pay for another. GPTQ
# rounds column by column and lets what isn't rounded yet make up for what is. [DMMV](papers/dmmv.ipynb) goes on from there:
# it swaps levels until the *worst* output of all is as good as it gets. Each curve below is the whole model with every
# layer of its blocks rounded; the axis counts what is really stored: codes, steps, offsets and biases. GPTQ's grid is one
# a row too, with its ends cut off where that lowers the error.


# %%
@lru_cache(None)
def small(way, bits):
    if way != "a row, GPTQ":
        return rounded(bits, way)
    clipped = lambda m: quant.search(m.weight.detach(), steps(m, bits, "a row"), 1, 2.4)
    return swap(model, {name: QuantisedLinear.of(m, clipped(m), grams[name].xx) for name, m in layers.items()})


@torch.no_grad()
def off(net):
    """Squared error of the model's output on 16 noisy clips that nothing was fitted to, as a share of the output's squares."""
    pairs = [(net(*call), model(*call)) for call in unseen[:2]]
    return sum((a - b).square().sum() for a, b in pairs).item() / sum(b.square().sum() for _, b in pairs).item()


def stored(net):
    """Bits a weight of the blocks' layers, packed, with steps, offsets and biases."""
    parts = dict(net.named_modules())
    return 8 * measure.stored_bytes([parts[name] for name in layers]) / sum(m.weight.numel() for m in layers.values())


# %% tags=["nbval-ignore-output"]
ways = ("a matrix", "a row", "a group of 32", "a row, GPTQ")
curves = {}
for way in ways:
    nets = [small(way, bits) for bits in (2, 3, 4, 6, 8)]
    curves[way] = [stored(net) for net in nets], [off(net) for net in nets]
show.lines(curves, "bits a weight, as stored", "error of the model's output", "A grid for ... (2 to 8 bits a code)", log="y")

# %% [markdown]
# Read the marks from left to right, 2, 3, 4, 6 and 8 bits a code. At the same code length a grid for 32 weights beats one
# for a row of 128 or 384; at the same number of *stored* bits it loses. And GPTQ at three bits is about as good as nearest
# rounding at four.
#
# "Stored" means just that: codes are packed bit by bit, steps and offsets are fp16, and a file holds nothing else. These layers
# as GPTQ leaves them, with four bits a code, on the disk:

# %%
four, file = small("a row, GPTQ", 4), Path(tempfile.mkdtemp()) / "four_bits.safetensors"
weights.write(file, {f"{name}.{part}": t for name in layers for part, t in four.get_submodule(name).state_dict().items()}, {})
size, whole = file.stat().st_size, sum(p.nbytes for m in layers.values() for p in m.parameters())
print(f"{whole:,} bytes in float32, {size:,} in the file, its list of names included: {whole / size:.1f} times fewer")

# %% [markdown]
# ## Words instead of levels
#
# A grid has levels for one weight at a time. Take weights in pairs: a pair is a point, and k-means puts $k$ *codewords* where the
# points are. A pair stores the number of its codeword, $\tfrac12 \log_2 k$ bits a weight; the codebook comes on top
# ([VQ4DiT](papers/vq4dit.ipynb)). **Turn the bits**; the larger a place, the more pairs use it.

# %%
pairs = vq4dit.groups(w, 2)


@lru_cache(None)
def places(bits):
    levels = quant.dequantise(torch.arange(2**bits), quant.search(pairs, quant.minmax(pairs, bits))).flatten()
    words, _ = kmeans(pairs, 4**bits, torch.Generator().manual_seed(0), 20)
    return {f"{2**bits} levels a weight": torch.cartesian_prod(levels, levels), f"{4**bits} codewords a pair": words}


# %%
def cloud(bits):
    at = {title: torch.cdist(pairs, codes).argmin(1) for title, codes in places(bits).items()}
    error = {title: ((places(bits)[title][i] - pairs).square().sum() / pairs.square().sum()).sqrt() for title, i in at.items()}

    def draw(axes):
        for ax, (title, codes) in zip(axes, places(bits).items(), strict=True):
            ax.plot(*pairs[::8].T, "o", color="#bbbbbb", ms=2, mew=0)
            size = 8 + 900 * at[title].bincount(minlength=len(codes)) / len(pairs)
            ax.scatter(*codes.T, s=size, marker="D", color="#0072B2", ec="white", lw=0.5, zorder=3)
            ax.set(title=f"{title}: off by {100 * error[title]:.0f} %", xlabel="a weight", ylabel="the next one")
            ax.set(aspect="equal", xlim=(-1.3, 1.3), ylim=(-1.3, 1.3))

    told = ", ".join(f"{title}: off by {100 * e:.0f} %" for title, e in error.items())
    return plots.figure(draw, (7.2, 3.5), f"{bits} bits", f"Pairs of weights as a round cloud. {told}.", (1, 2))


# %%
play.knobs(cloud, settled=[dict(bits=bits) for bits in (1, 2, 3)], bits=play.IntRange(1, 4, 2))

# %% [markdown]
# On the plot of above, with one codebook for all layers of a kind (all queries, all keys ...):


# %% tags=["nbval-ignore-output"]
def worded(bits):
    s = vq4dit.Settings(d=2, k=4**bits, n=1, shared=True)
    net = vq4dit.quantised(model, vq4dit.books(model, list(layers), s, torch.Generator().manual_seed(0), 5), s)
    net = vq4dit.shipped(net)
    return stored(net), off(net)


curves["codewords, k-means"] = tuple(zip(*map(worded, (2, 3, 4)), strict=True))
show.lines(curves, "bits a weight, as stored", "error of the model's output", "Levels and words (2 to 8 bits a code)", log="y")

# %% [markdown]
# Words beat levels where both ask only what is near. GPTQ asks what the *layer* says, and beats both. VQ4DiT asks for that too:
# it tunes the codebook on the model's own samples, and lets each group *learn* which of its nearest words it takes. From its
# claim, four weights a word:

# %% tags=["nbval-ignore-output"]
found = claims.read("vq4dit")["arms"]
value = lambda arm, metric: found[arm]["values"][metric]
arms = {"nearest levels": "rounded, 2.25 bits", "GPTQ": "gptq, 2.25 bits", "GPTQ, steps tuned": "gptq, tuned",
        "k-means": "k-means alone", "codebook tuned": "n = 1", "VQ4DiT": "vq",
        "VQ4DiT, a book a role": "vq, a book a role"}  # fmt: skip
bars = {f"{title}: {value(arm, 'bits')[0]:.2f} bits": value(arm, "error") for title, arm in arms.items()}
show.bars(bars, "error of the model's output (a dot a seed)", "Two bits and what they cost")

# %% [markdown]
# GPTQ with tuned steps is ahead of VQ4DiT with a book a layer, and behind it with a book a role (one for all queries, one for
# all keys ...); at 3 and 4 bits GPTQ wins clearly.
#
# ## Training while it rounds
#
# So far a finished model was rounded. It can also be *trained* while it is being rounded: forwards round, backwards act as if
# nothing had been (the straight-through estimator), and let the float model teach. Weights then move until their *rounded* values
# say the right thing. [QVGen](papers/qvgen.ipynb) gives each layer a helper besides, a small product of two matrices in full
# precision that says what the bits can't; it fades, half of it at a time, and is gone at the end. Here inputs have few bits too
# (W3A3: weights 3, inputs, or *activations*, 3). From its claim, 400 steps:

# %% tags=["nbval-ignore-output"]
found = claims.read("qvgen")["arms"]
hows = {"rounded": "rounded", "trained": "QAT", "with a helper that fades": "QVGen"}
bars = {f"{width}, {how}": found[f"{width}: {arm}"]["values"]["error"] for width in ("W4A4", "W3A3", "W2A4")
        for how, arm in hows.items()}  # fmt: skip
show.bars(bars, "error of the model's output (a dot a seed)", "Trained while it rounds")

# %% [markdown]
# Training is worth a lot, the more the fewer bits. The helper is not, in a model of this size: at three bits the input's rounding
# is most of what is lost, and of that no weight can know; at two bits it does much of the work until it is taken away.
#
# ## No float at all
#
# So far codes became floats again before they met. They needn't: $q_x q_w^\top$ is a sum of products of integers, which only has
# to come back to 8 bits, by the factor $M = s_x s_w / s_y$. Written as $m / 2^c$, that is one product and one shift
# ([HAWQ-V3](papers/hawqv3.ipynb)). How many bits must $m$ have? The same layer, inputs, weights and outputs in 8 bits: each
# dot is a code that a real-valued $M$ would have rounded otherwise (64 tokens, 128 outputs; blue: too small, orange: too large).

# %%
steps_x, steps_w, steps_y = (quant.symmetric(v, 8, dim) for v, dim in ((x, (0, 1)), (w, 1), (x @ w.T, (0, 1))))
acc = quant.quantise(x, steps_x).long() @ quant.quantise(w, steps_w).long().T
factor = (steps_x.step * steps_w.step.T / steps_y.step).double()
exact = torch.floor(factor * acc + 0.5)


def shifted(bits):
    off = rescale(acc, dyadic(factor, bits)) - exact
    share, most = 100 * (off != 0).double().mean(), off.abs().max()

    def draw(ax):
        ax.imshow(canvas.signed(off[:64].float().clamp(-1, 1).numpy(), 1.0), interpolation="nearest", aspect="auto")
        ax.set(xlabel="output", ylabel="token", title=f"{share:.2g} % of {acc.numel():,} codes differ, by up to {most:.0f}")

    alt = f"With multipliers of {bits} bits {share:.2g} % of the codes differ, by up to {most:.0f}."
    return plots.figure(draw, (7, 2.8), f"multipliers of {bits} bits", alt)


play.knobs(shifted, settled=[{"bits": bits} for bits in (4, 8, 14)], bits=play.IntRange(2, 31, 8))

# %% [markdown]
# With 31 bits nothing differs, here or anywhere: what was tested in simulation is what runs. And who has integers can ask
# which layer gets how many. The lesson's answer, from the curvature of the loss, on the video model:

# %% tags=["nbval-ignore-output"]
hows = {"by curvature": "omega", "greedy, measured": "greedy", "4 bits everywhere": "uniform"}
rises = {how: claims.read("hawqv3")["arms"]["video"]["values"][f"rise_{key}"] for how, key in hows.items()}
show.bars(rises, "rise of the loss (a dot a draw)", "Four bits a weight on average, shared out", digits=3)

# %% [markdown]
# ## No products at all
#
# Integers still multiply. Let every weight be a power of two, with its sign, and a product is a shift: 5 bits name 15 of
# them, and zero. Queries and keys of 0 and 1 make attention a choice of what to add
# ([ShiftAddViT](papers/shiftaddvit.ipynb)). What each costs, after 300 steps of training with the float model as teacher,
# and the energy of one pass by a table of energies:

# %% tags=["nbval-ignore-output"]
found = claims.read("shiftaddvit")["arms"]
mean = lambda arm, metric: sum(found[arm]["values"][metric]) / 3
arms = {"5 bits on an even grid": "uniform", "feed-forward by shifts": "shift", "attention by sums": "attention", "both": "both",
        "both, a router saves some tokens": "mixture, 6:4"}  # fmt: skip
names = {f"{title}: energy {100 * mean(arm, 'energy'):.0f} %": arm for title, arm in arms.items()}
bars = {title: found[arm]["values"]["error"] for title, arm in names.items()}
show.bars(bars, "error of the model's output (a dot a seed)", "Shifts and sums")

# %% [markdown]
# Powers of two are a bad grid: they crowd around zero, where nobody needs them so close, and are rare where the large weights
# are. They save energy, not quality; and no processor that you can buy adds faster than it multiplies matrices.
#
# ## All of them, side by side
#
# The same caption from the same noise, by every way of this chapter, with a grid a row where nothing else is said; for HAWQ-V3
# the bits are those of a code on average.
# **Turn the frame.** What has no picture wasn't made: plain training and tuning are for few bits, powers of two have five, and
# DMMV's search takes ten minutes each time. With 8 and 2 bits on average HAWQ-V3 has no choice left; VQ4DiT's codewords are
# single weights at 8 and 6 bits, pairs at 4 and 3, fours at 2.

# %%
stills, _ = weights.read("06_quantization.safetensors")
blank = torch.full((3, 32, 32), 255, dtype=torch.uint8)
order = (8, 6, 5, 4, 3, 2)
methods = {"nearest": "nearest", "nearest, a group of 32": "groups of 32", "gptq": "GPTQ", "gptq, tuned": "GPTQ, tuned",
           "dmmv": "DMMV", "hawqv3": "HAWQ-V3", "quantvggt": "QuantVGGT", "shiftaddvit": "powers of 2", "vq4dit": "VQ4DiT",
           "trained": "trained", "qvgen": "QVGen"}  # fmt: skip


# %%
def board(frame):
    still = lambda way, bits: stills[f"{way}, {bits}"][:, frame] if f"{way}, {bits}" in stills else blank
    tile = lambda picture: torch.nn.functional.pad(picture, (1, 1, 1, 1), value=255)
    row = lambda way: [stills["float"][:, frame], *(still(way, bits) for bits in order)]
    picture = torch.cat([torch.cat([tile(one) for one in row(way)], 2) for way in methods], 1).movedim(0, 2)
    told = f"“{caption}”, frame {4 * frame} of 16: a row for each way, a column for each number of bits."

    def draw(ax):
        ax.imshow(picture, interpolation="nearest")
        ax.set_xticks([17 + 34 * i for i in range(7)], ["float", "8", "6", "5", "4", "3", "2 bits"])
        ax.set_yticks([17 + 34 * i for i in range(len(methods))], list(methods.values()))
        ax.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
        ax.spines[:].set_visible(False)

    return plots.figure(draw, (6.0, 7.7), f"frame {4 * frame}", told)


# %%
play.knobs(board, settled=[dict(frame=frame) for frame in (0, 2, 4)], frame=play.IntRange(0, 4, 2))

# %% [markdown]
# And counted, on 72 held-out captions: how near the clips are to the float model's, and how often the judge reads back
# colour, shape and direction as they were asked for. The axis counts every bit that is stored.

# %% tags=["nbval-ignore-output"]
table = claims.read("few-bits")["arms"]
mean = lambda arm, metric: sum(table[arm]["values"][metric]) / 3
points = {title: [f"{way}, {bits}" for bits in order[::-1] if f"{way}, {bits}" in table] for way, title in methods.items()}
near = {title: ([mean(arm, "bits") for arm in arms], [mean(arm, "psnr") for arm in arms]) for title, arms in points.items()}
show.lines(near, "bits a weight, as stored", "dB to the float model's clips", "The same noise, fewer bits")

# %% [markdown]
# What makes the difference between the nearest values and GPTQ? A part of it is only the *grid*, whose ends are cut off:

# %% tags=["nbval-ignore-output"]
ladder = {"nearest": "nearest", "ends cut off": "nearest, clipped", "GPTQ": "gptq", "GPTQ, steps tuned": "gptq, tuned"}
bars = {f"{bits} bits, {title}": table[arm]["values"]["psnr"] for bits in (4, 3, 2) for title, way in ladder.items()
        if (arm := f"{way}, {bits}") in table}  # fmt: skip
show.bars(bars, "dB to the float model's clips (a dot a seed)", "From the nearest values to GPTQ")

# %% tags=["nbval-ignore-output"]
heard = {title: (near[title][0], [100 * mean(arm, "follows") for arm in arms]) for title, arms in points.items()}
print(f"the float model: {100 * mean('float', 'follows'):.0f} %")
show.lines(heard, "bits a weight, as stored", "read back as asked for, %", "Does it still listen?")

# %% [markdown]
# To four bits nearly everything goes: the film changes before its content does. Below, it pays to ask what the layer *says*: on
# the same grid GPTQ is 4 dB nearer than the nearest values. Best of all at three and two bits is to go on training while it
# rounds, the one way here that needs clips and gradients of the whole model. QVGen's helpers don't add to it at this size, and
# VQ4DiT's codewords, tuned without a single clip, come next at two bits. Powers of two pay 10 dB for their shifts.
#
# HAWQ-V3 is under plain rounding. Two parts of three of that is its symmetric grid. The rest is how it prices layers: by
# the trace of the curvature, and where a trace comes out near zero, two bits seem to cost nothing. With a floor under the
# traces it is level with four bits for all. (By the loss that it was made for, and with all three of its budgets, it wins,
# as its lesson measures: *a claim holds for what was measured*.)

# %% [markdown]
# ## Turn it yourself
#
# What the model believes in when it is told a clip with 70 % noise, and how far that is from what the whole model believes.

# %%
scene = world.draw(7, 1, "base", "held-out")
latent, words = tokenizer.encode(world.render(scene, 32, 17)[None]), text.tokens([world.caption(scene)])
t = torch.tensor([0.7])
mixed = noise.flow().at(latent, sample.start(1, latent.shape[1:], 0), t)


@torch.no_grad()
def believed(net):
    return tokenizer.decode(noise.flow().clean(mixed, t, net(mixed, t, Cond(text=words))))[0]


@lru_cache(None)
def render(way, bits):
    whole, now = believed(model), believed(small(way, bits))
    told = f"a grid for {way}, {bits} bits: {psnr(now, whole):.0f} dB"
    return show.clips([whole, now], ["32 bits", told], difference=True)


play.knobs(render, settled=[dict(way=way, bits=3) for way in ways[1:]], way=play.Choice(list(ways)), bits=play.IntRange(2, 8, 3))

# %% [markdown]
# ## What is measured
#
# From the claim of DMMV, three seeds: two layers in 3 bits, the largest error of an output over 1,024 inputs that nothing
# was fitted to. "Squares" is the same search for the sum of squares.

# %% tags=["nbval-ignore-output"]
result = claims.read("dmmv")
arms = {"nearest": "nearest", "GPTQ": "gptq", "searched for the worst": "search", "searched for squares": "squares"}
worst = {title: result["arms"][f"{arm}, layers"]["values"]["worst"] for title, arm in arms.items()}
show.bars(worst, "worst error, in units of the output (a dot a seed)", "Three bits, two layers")

# %% [markdown]
# On inputs that nothing was fitted to the search is level with GPTQ: what it gains, a quarter of the worst error, it gains on the
# inputs that it saw. Where all inputs are known, as with filters, that is no objection.
#
# ## The papers of this chapter

# %% tags=["nbval-ignore-output"]
asks = {"dmmv": "and if only the worst error counts?",
        "hawqv3": "can a network run on integers alone, without a single division?",
        "vq4dit": "two bits a weight: is a list of codewords better than a grid?",
        "qvgen": "what does a video model need to be trained with 4 bits?",
        "quantvggt": "what do a few odd tokens do to the calibration?",
        "shiftaddvit": "can sums and shifts replace products?"}
Markdown(papers.listed(asks))

# %% [markdown]
# ## Where next
#
# * [HAWQ-V3](papers/hawqv3.ipynb): from a trained network to integers, and which layer needs how many.
# * [DMMV](papers/dmmv.ipynb): one search for weights, pictures and filters.
# * [VQ4DiT](papers/vq4dit.ipynb): watch groups of weights choose their codeword.
# * [QVGen](papers/qvgen.ipynb): watch a helper fade, singular value by singular value.
# * [ShiftAddViT](papers/shiftaddvit.ipynb): who may still multiply?
# * [07 · Low rank](07_low_rank.ipynb): fewer numbers instead of shorter ones.
# * [00 · Start](00_start.ipynb): the model that was rounded here.
