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
# # VQ4DiT: weights that choose their codeword
#
# Two bits a weight leave a rounded weight four values. Two bits a weight for *four weights together* leave them 256
# patterns, and the patterns may be learnt. VQ4DiT also learns who takes which.
#
# *Ten minutes, one processor core. Surgery: a trained model in, codewords and indices out.* At the end you can
# - say when codewords beat grids and when they don't, and count the bits of both honestly;
# - see groups of weights make up their minds between two codewords;
# - calibrate a model with no data at all.

# %%
import itertools
from statistics import fmean

import torch
from torch import nn

from minivid import world
from minivid.core import corpus, noise, sample, text, weights
from minivid.core.baselines.quant import dequantise, minmax, search
from minivid.core.model import Cond
from minivid.core.surgery import parts, record
from minivid.lab import canvas, claims, play, plots, show
from minivid.quantization import vq4dit as paper
from minivid.quantization.vq4dit import Settings

_ = torch.set_num_threads(1)

# %% [markdown]
# ## The picture first
#
# One layer of our video model: 128 x 128 weights. Neighbours in a row are taken as pairs, and each pair is a point. Left, each
# weight rounded to 4 values: the pair has 16 places to go, on a square. Right, 16 places too, but put where the points are. Both
# cost 2 bits a weight, and a little for the grid or the codebook.

# %%
model, name = weights.load("video"), "trunk.blocks.1.attention.v"
layer = nn.Sequential(model.get_submodule(name))  # a model of one layer, to play with
w = layer[0].weight
pairs = paper.groups(w, 2)
grid = search(pairs, minmax(pairs, 2))
values = dequantise(torch.arange(4), grid).flatten()
square = torch.cartesian_prod(values, values)
book = paper.books(layer, ["0"], Settings(d=2, k=16), torch.Generator().manual_seed(0), 30)["0"]


# %%
def places(axes):
    for ax, codes, title in zip(axes, (square, book), ("4 values a weight", "16 codewords"), strict=True):
        at = torch.cdist(pairs, codes).argmin(1)
        lost, use = ((codes[at] - pairs).square().sum() / pairs.square().sum()).item(), at.bincount(minlength=16) / len(pairs)
        ax.plot(*pairs[::4].T, "o", color="#BBBBBB", ms=2, mew=0)
        ax.scatter(*codes.T, s=20 + 900 * use, marker="D", color="#0072B2", ec="white", zorder=3)
        ax.set(title=f"{title}: error {lost:.3f}", xlabel="a weight", ylabel="the next one", aspect="equal")
        ax.set(xlim=(-1.3, 1.3), ylim=(-1.3, 1.3))


alt = "Pairs of weights as a round cloud; 16 places on a square, the outer ones little used, and 16 codewords as the cloud is."
plots.figure(places, (6.8, 3.4), "grid and codewords", alt, (1, 2))

# %% [markdown]
# The larger a place, the more pairs use it. The corners of a square are far from a round cloud: hardly used, and paid for all
# the same.
#
# ## You have not read the paper: how would you do it?
#
# The codewords stand, and each group has taken the nearest. The model is damaged. What would you tune, and with which data?
#
# <details><summary>Two usual answers</summary>
#
# Tune the codewords: there are few, and each is differentiable. Or round again, more cleverly, one weight after the other, each
# making good for those before (GPTQ). Neither lets a group change its mind.
#
# </details>
#
# ## The naive way: tune the codebook alone
#
# A codeword serves hundreds of groups, and moves by the sum of their gradients. Do they agree? Mean cosine between gradients
# of groups that share a codeword, on what the layer gets while the model samples:


# %%
class Rows(list):
    add = list.append


def inputs(seed, n=4):
    """What the layer gets while the float model makes n clips of noise."""
    cond = Cond(text=text.tokens([world.caption(s) for s in corpus.scenes("base", n, seed)]))
    walk = paper.walk(model, sample.start(n, (10, 5, 8, 8), seed), cond, noise.table(10, 5, 3.0), [])
    record(model, [call for call, _ in walk], {name: (rows := Rows())})
    return torch.cat(rows).flatten(0, 1)


fitted, unseen = inputs(1), inputs(2)
batches = fitted[torch.randperm(len(fitted), generator=torch.Generator().manual_seed(0))].split(400)
told = [((x,), [layer(x)]) for x in batches]
error = lambda one, x=unseen: ((one(x) - layer(x)).square().sum() / (layer(x) - layer[0].bias).square().sum()).item()
nearest = paper.quantised(layer, {"0": book}, Settings(d=2, n=1))
pull = paper.pulls(nearest, told, ["0"])["0"]
print(f"mean cosine: {paper.agreement(pull, nearest[0].index, 16).nanmean():.3f}   (1: all pull one way, 0: each its own)")

# %% [markdown]
# Next to nothing in common: they neither agree nor oppose each other, and in the sum most of it is lost. What is left still
# moves the codeword, and that is worth much (n = 1 below), but no group gets what it wants.
#
# ## The idea
#
# Let each group choose. It keeps its $n$ nearest codewords $a_1 \dots a_n$ and begins as their mixture,
#
# $$\hat w = \sum_j r_j\, C[a_j], \qquad r = \mathrm{softmax}(z),$$
#
# then logits $z$ and codebook $C$ learn together, from two losses: $\mathcal L_d$ compares what each block says with what
# the float model's block says, and
#
# $$\mathcal L_r = \mathrm{mean}\,(1 - |2 r - 1|)$$
#
# is 0 only where every ratio is 0 or 1. Who passes 0.99 is frozen. When 99 % of a layer are, mixtures are over.
#
# So says the text. The authors' code begins with $r_j$ in proportion to 1 / distance, and lets a codebook wait until its layer
# has settled. Both are here (`released`); the code's form does better, and is the one below.
#
# **No data:** the float model samples from noise, and each of its steps is one step of learning. The student
# always gets the *float* model's clip, so its own errors never pile up.
#
# ## The package's own source

# %%
show.source(paper.VQLinear.weight.fget, paper.ratio_loss, paper.walk, paper.block_loss)

# %% [markdown]
# ## Same start, one candidate more
#
# One layer, 300 steps, the same batches. `n=1` is the classic: the codebook alone. "As written" are equal shares at first.

# %%
history = {}  # looks on the way, by n and k


def learnt(n, k=16, released=True):
    """The layer after calibration, and the share of frozen groups; on the way, ratios and codebook every 20 steps."""
    s = Settings(d=2, k=k, n=n, slow=3e-3, weight=0.3, released=released)
    one, looks = paper.quantised(layer, {"0": books[k]}, s), []
    keep = lambda: looks.append((one[0].ratios.detach().clone(), one[0].codes.detach().clone()))
    steps = paper.calibrate(one, (told * 40)[:300], ["0"], s, lambda step: step % 20 or keep())
    keep()
    if released:
        history[n, k] = looks
    return one, [100 * step["frozen"] for step in steps]


# %%
books = {8: paper.books(layer, ["0"], Settings(d=2, k=8), torch.Generator().manual_seed(0), 30)["0"], 16: book}
tuned = {(n, k): learnt(n, k) for n in (1, 2, 3) for k in books}
bars = {"k-means alone": error(nearest)} | {f"n = {n}": error(tuned[n, 16][0]) for n in (1, 2, 3)}
bars["n = 2, as written"] = error(learnt(2, released=False)[0])
show.bars(bars, "relative error of the layer's output, inputs not seen", "16 codewords for pairs: 2 bits a weight")

# %% [markdown]
# In one layer it pays. Whether it does over a whole model, the claim below measures.
#
# ## Watch them choose
#
# A few groups (grey dots). Grey lines join the candidates of each; its bead stands where the mixture is: blue and round while
# it leans to the nearest codeword, orange and square when to another, the paler the less it is decided. Grey borders: the cells.
# **Turn the step up**: beads run to a corner, and not always to the near one.

# %%
some, wide = torch.arange(0, len(pairs), 110), (-1.3, 1.3)
mesh = torch.cartesian_prod(*[torch.linspace(*wide, 120)] * 2)
joined = lambda *ends: torch.stack([*ends, torch.full_like(ends[0], torch.nan)], 1).flatten(0, 1).T  # one line, with gaps


def beads(n, k, step):
    """Corners `n m 2` between which groups choose, the bead of each, how far it leans to the nearest, and the codewords."""
    one, (ratios, codes) = tuned[n, k][0][0], history[n, k][step // 20]
    share = ((one.options == one.index).float() if len(ratios) < n else ratios)[:, some]  # once settled, no ratios are left
    corners = codes[one.options[:, some]]
    return corners, (share[..., None] * corners).sum(0), share[0] - share[1:].amax(0) if n > 1 else share[0], codes


def cells(codes):
    """Where a point of the mesh and the next one belong to different codewords."""
    cell = torch.cdist(mesh, codes).argmin(1).view(120, 120).T
    return (cell[1:, 1:] != cell[:-1, 1:]) | (cell[1:, 1:] != cell[1:, :-1])


# %%
def choosing(n, k, step):
    corners, at, lean, codes = beads(n, k, step)
    other, spot = lean < 0, pairs[some]

    def draw(ax):
        ax.imshow(-cells(codes).float(), cmap="gray", origin="lower", extent=wide * 2, alpha=0.25, interpolation="bilinear")
        ax.plot(*joined(*corners, corners[0]), color="#BBBBBB", lw=0.7)
        ax.plot(*spot.T, "o", color="#777777", ms=2.5)
        ax.plot(*codes.T, "D", color="black", mec="white", ms=6)
        for mine, mark, ink, dash in ((~other, "o", "#0072B2", "-"), (other, "s", "#E69F00", "--")):
            ax.plot(*joined(spot[mine], at[mine]), ls=dash, color=ink, lw=0.7)
            shade = canvas.signed(-lean[mine][None].numpy(), 1.0)[0] / 255
            ax.scatter(*at[mine].T, s=28, marker=mark, color=shade, ec=ink, lw=0.8, zorder=3)
        ax.set(xlim=wide, ylim=wide, aspect="equal", xlabel="a weight", ylabel="the next one")
        ax.set_title(f"step {step}: {100 * other.float().mean():.0f} % lean to another")

    alt = f"Step {step}, {k} codewords: {other.sum()} of {len(some)} beads lean to another codeword than the nearest."
    return plots.figure(draw, (3.6, 3.7), f"choosing, {n} of {k}, step {step}", alt)


# %% tags=["nbval-ignore-output"]
settled = [dict(n=2, k=16, step=step) for step in (0, 100, 300)]
play.knobs(choosing, settled=settled, n=play.IntRange(1, 3, 2), k=play.Choice([16, 8]), step=play.IntRange(0, 300, 0, 20))

# %% [markdown]
# ## From a hump to two spikes
#
# All 8,192 groups: the ratio of the nearest codeword. **Turn the step:** a hump at first, two spikes at last.


# %%
def spikes(step):
    ratios, one = history[2, 16][step // 20][0], tuned[2, 16][0][0]
    r = ratios[0] if len(ratios) == 2 else (one.index == one.options[0]).float()
    frozen = {n: tuned[n, 16][1] for n in (1, 2, 3)}

    def draw(axes):
        axes[0].hist(r.numpy(), 25, range=(0, 1), color="#0072B2")
        axes[0].set(xlabel="ratio of the nearest codeword", ylabel="groups", title=f"step {step}")
        for (n, share), ink, dash in zip(frozen.items(), ("black", "#0072B2", "#E69F00"), (":", "-", "--"), strict=True):
            axes[1].plot(share, color=ink, ls=dash, label=f"n = {n}")
        axes[1].axvline(step, color="#888888", lw=0.8)
        axes[1].set(xlabel="step", ylabel="groups frozen, %", ylim=(-3, 103))
        axes[1].legend(frameon=False, loc="center left")

    alt = f"Step {step}: {((r > 0.99) | (r < 0.01)).float().mean():.0%} of the groups have decided."
    return plots.figure(draw, (7.4, 2.8), f"ratios, step {step}", alt, (1, 2))


# %% tags=["nbval-ignore-output"]
play.knobs(spikes, settled=[{"step": step} for step in (0, 100, 300)], step=play.IntRange(0, 300, 0, 20))

# %% [markdown]
# ## Which layer decides first?
#
# All 61 layers of the model, 128 codewords of 4 weights each. For a quick look only 100 steps of one clip, with logits that
# learn six times as fast as in the paper. Numbers: per cent of a layer's groups that are frozen. **Turn the step.** At 100 time
# is up, and who hasn't decided takes the larger share.

# %%
blocks = [f"trunk.blocks.{i}" for i in range(6)]
roles = {name: role for name, _, role in parts(model) if name.startswith("trunk") and role != "block" or name == "mod"}
fast = Settings(released=True, quick=0.3, slow=3e-3, weight=100.0)
small = paper.quantised(model, paper.books(model, list(roles), fast, torch.Generator().manual_seed(0), 5), fast)
shares = []


def noted(step):
    if step % 10 == 0:
        shares.append([100.0 if one.settled else 100 * one.frozen.float().mean().item() for one in paper.layers(small).values()])


def trips(n):  # what the blocks say while the float model makes one clip, n times
    for seed in range(n):
        cond = Cond(text=text.tokens([world.caption(corpus.scenes("base", 1, 50 + seed)[0])]))
        yield from paper.walk(model, sample.start(1, (10, 5, 8, 8), seed), cond, noise.table(10, 5, 3.0), blocks)


steps = paper.calibrate(small, trips(10), blocks, fast, noted)
noted(100)


# %%
def frozen(step):
    table = dict(zip(paper.layers(small), shares[step // 10], strict=True))
    columns = list(dict.fromkeys(role for role in roles.values() if role != "mod"))
    grid = torch.zeros(6, len(columns))
    for name, share in table.items():
        if name != "mod":
            grid[int(name.split(".")[2]), columns.index(roles[name])] = share

    def draw(ax):
        ax.imshow(grid, cmap="cividis", vmin=0, vmax=100, aspect="auto")
        for (i, j), share in ((at, grid[at].item()) for at in itertools.product(range(6), range(len(columns)))):
            ax.text(j, i, f"{share:.0f}", ha="center", va="center", color="black" if share > 55 else "white")
        ax.set_xticks(range(len(columns)), columns)
        ax.set(ylabel="block", title=f"step {step}: frozen, %; of the time modulation {table['mod']:.0f}")

    alt = f"Step {step}: of a layer's groups {grid.mean():.0f} % are frozen on average."
    return plots.figure(draw, (7.2, 2.9), f"frozen, step {step}", alt)


# %% tags=["nbval-ignore-output"]
play.knobs(frozen, settled=[{"step": step} for step in (30, 70, 90)], step=play.IntRange(0, 100, 70, 10))

# %% [markdown]
# In this run queries and keys decide first, values last.
#
# ## Predict, then run
#
# **Predict:** the groups that left their nearest codeword: how many? And the error of the *weights* themselves, did it rise
# or fall?

# %%
chosen = tuned[2, 16][0]
off = lambda one: ((one[0].weight - w).square().sum() / w.square().sum()).item()
print(f"left the nearest: {100 * (chosen[0].index != chosen[0].options[0]).float().mean():.0f} %")
print(f"error of the weights: {off(nearest):.3f} before, {off(chosen):.3f} after")
print(f"error of the output:  {error(nearest):.3f} before, {error(chosen):.3f} after")
for n in (1, 2):
    one = tuned[n, 16][0]
    cosine = paper.agreement(paper.pulls(one, told, ["0"])["0"], one[0].index, 16).nanmean()
    print(f"mean cosine of gradients after calibration, n = {n}: {cosine:.3f}")

# %% [markdown]
# The weights are worse and the layer is better. The cosine is no larger afterwards: what helps is not that groups agree. Errors
# of single weights don't matter, their sum over a row does, weighted by what really comes in; so errors may cancel, if somebody
# lets them.
#
# ## Count all bits
#
# A codebook of 256 codewords of 4 weights in fp16 is 16,384 bits. A layer of the paper's size, 1152 x 1152, doesn't notice. Ours
# has 16,384 weights:

# %%
for side in (128, 256, 1152):
    index = 8 / 4
    print(f"{side:4} x {side:4}: {index} bits of index and {16 * 256 * 4 / side**2:.3f} of codebook, a weight")
options = {"k = 64": "k-means alone, k = 64", "k = 128": "k-means alone", "k = 256": "k-means alone, k = 256",
           "k = 256, a book a role": "k-means alone, a book a role"}  # fmt: skip

# %% [markdown]
# So here a layer gets 128 codewords; or all queries share one book, all keys another (*a book a role*, last line of the next
# table). Before any calibration, over all layers:

# %% tags=["nbval-ignore-output"]
result = claims.read("vq4dit")
value = lambda arm, metric: result["arms"][arm]["values"][metric]
for label, arm in options.items():
    print(f"{label:24} {value(arm, 'bits')[0]:.2f} bits a weight, error of the weights {value(arm, 'weights')[0]:.3f}")

# %% [markdown]
# ## Exercise
#
# Complete `mixture`: the weights of all groups, from codebook, candidates and logits.

# %% tags=["exercise"]


def mixture(codes, options, z):
    """codes: `k d`; options: numbers of the candidates, `n m`; z: logits `n m`. Returns groups `m d`."""
    return codes[options[0]]  # not right yet: the nearest one, as k-means would have it


# %% tags=["exercise-check"]
import torch

dice = torch.Generator().manual_seed(0)
codes, options = torch.randn(6, 3, generator=dice), torch.stack([torch.randperm(6, generator=dice)[:2] for _ in range(9)], 1)
z = torch.randn(2, 9, generator=dice)
yours, sure = mixture(codes, options, z), mixture(codes, options, torch.tensor([[0.0], [1e4]]).expand(2, 9))
r = z.exp() / z.exp().sum(0)
right = torch.stack([r[0, m] * codes[options[0, m]] + r[1, m] * codes[options[1, m]] for m in range(9)])
if yours.shape != right.shape:
    print(f"Groups are {tuple(right.shape)}, yours are {tuple(yours.shape)}.")
    print("Not yet.")
elif not torch.allclose(sure, codes[options[1]], atol=1e-5):
    print("With all weight on the second candidate, a group must be the second candidate.")
    print("Not yet.")
elif not torch.allclose(yours, right, atol=1e-5):
    print("Ratios are positive and sum to 1 over the candidates of a group: which function does that?")
    print("Not yet.")
else:
    print("Right.")

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def mixture(codes, options, z):
#     return (z.softmax(0)[..., None] * codes[options]).sum(0)
# ```
#
# </details>
#
# ## The law of limits
#
# A codeword for every group is the model itself, to the bit. And the float model as its own student has nothing to learn.

# %%
everyone = paper.quantised(layer, {"0": paper.groups(w, 4).unique(dim=0)}, Settings(d=4, n=1))
print("a codeword for each:", torch.equal(everyone(unseen), layer(unseen)))
print("loss of the float model:", sum(paper.block_loss(layer, pair, ["0"]).item() for pair in told))

# %% [markdown]
# ## The claim
#
# The whole model, 2.09 bits a weight with codebooks, 500 steps; three seeds, margins fixed before. The grids get more bits:
# 2.12, 2.25 and 2.5, with steps and offsets.

# %% tags=["nbval-ignore-output"]
arms = ("rounded, 2.25 bits", "gptq, 2.12 bits", "gptq, 2.25 bits", "gptq, 2.5 bits", "gptq, tuned", "k-means alone", "n = 1",
        "n = 1, taken anew", "n = 3", "as written", "real data", "vq, a book a role", "vq")  # fmt: skip
named = {f"{arm} (n = 2)" if arm == "vq" else arm: value(arm, "error") for arm in arms}
show.bars(named, "relative output error, unseen clips (a dot a seed)", "At two bits")

# %% [markdown]
# And with more bits? "A book a role": one codebook for all layers of a kind, so that it hardly costs anything.

# %% tags=["nbval-ignore-output"]
point = lambda arm: (fmean(value(arm, "bits")), fmean(value(arm, "error")))
kinds = {"GPTQ": ("gptq, 2.12 bits", "gptq, 2.25 bits", "gptq, 2.5 bits", "gptq, 3 bits", "gptq, 4 bits"),
         "GPTQ, tuned": ("gptq, tuned",), "VQ4DiT": ("vq", "vq, 3 bits"),
         "VQ4DiT, a book a role": ("vq, a book a role", "vq, 4 bits")}  # fmt: skip
curves = {kind: tuple(zip(*map(point, some_arms), strict=True)) for kind, some_arms in kinds.items()}
show.lines(curves, "bits a weight, codebooks and grids counted", "relative output error", "Codewords against grids", log="y")

# %%
show.verdict("vq4dit")

# %% [markdown]
# The authors report for DiT-XL/2 at 2 bits an FID of 12.4 on 256 x 256 pictures, where GPTQ and others exceed 300, and 2,553 MB
# that become 162. With n = 1 they have 60.2.
#
# ## Where next
#
# - [00 Start](../00_start.ipynb): the model that was quantised here.
# - [The paper](https://arxiv.org/abs/2408.17131).
