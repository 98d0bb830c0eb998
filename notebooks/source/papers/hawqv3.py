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
# # HAWQ-V3: a network of multiplications, additions and shifts
#
# Most "int8" networks hide floating point between their layers. HAWQ-V3 has none: every factor becomes $m / 2^c$, a whole number
# and a shift. And it chooses each layer's bits by solving a small integer program.
#
# *Ten minutes, one processor core. Surgery: a trained network in, a smaller one out.* At the end you can
# - find the floats that hide in a quantised network, and replace each of them;
# - say how long a multiplier must be before no code differs any more;
# - share out a budget of bits among layers by the curvature of the loss.

# %%
import copy
from statistics import fmean

import numpy as np
import torch
from PIL import Image, ImageDraw

from minivid.claims import hawqv3 as claim
from minivid.core import weights
from minivid.core.baselines.quant import allocate
from minivid.lab import claims, maps, play, plots, show
from minivid.lab.canvas import DENSITY, INK, PALETTE, TEXT, Picture, Sheet, font
from minivid.quantization import hawqv3 as paper
from minivid.world.scores import psnr

_ = torch.set_num_threads(1)

# %% [markdown]
# ## The picture first
#
# A frame autoencoder with batch norm, a residual block and an average pool learns for some seconds in floating point, then a
# little more on grids of 4 bits. Then it becomes integers: `int8` codes in, `int8` codes out.

# %%
torch.manual_seed(0)
train, held = claim.frames(99, 24, "train"), claim.frames(99, 8, "held-out")
net = claim.train(paper.Network(), train, 240, 4e-3, 99)
simulation = claim.train(paper.quantise_all(copy.deepcopy(net), 4), train, 80, 1e-3, 99, fold_at=40)
simulation = simulation.double().requires_grad_(False)
x = held.double()
want = simulation(x)


def integers(width=31):
    """The frames that integers make, with multipliers of this many bits, and the share of their codes that differ."""
    engine = simulation.integer(width)
    said = engine.leave(engine(engine.enter(x)))
    return said, (100 * (said - want).abs().gt(1e-9).double().mean()).item()


made = {31: integers(31), 5: integers(5)}

# %% tags=["nbval-ignore-output"]
film = lambda frames: frames[:16].movedim(0, 1).float().clamp(-1, 1)
name = lambda width: f"multipliers of {width} bits: {quality(made[width][0])} dB, {made[width][1]:.3g} % of codes differ"
quality = lambda frames: f"{psnr(frames, x).mean():.1f}"
show.clips(
    [film(x), film(want), film(made[31][0]), film(made[5][0])],
    ["held-out frames", f"simulated: {quality(want)} dB", name(31), name(5)], "A 4-bit network, simulated and in integers",
)  # fmt: skip

# %% [markdown]
# "Simulated" is how the network was trained: floats that stand on grids. The integers of the third row say *the same*, to the
# bit. In the fourth, short multipliers move most codes by a little. You hardly see it; but what runs is no longer what was
# trained and tested, and nobody knows when it will matter.
#
# ## You have not read the paper: how would you do it?
#
# Codes are small integers, $x \approx S q$. A layer adds up products of codes. Where does a float creep in?
#
# <details><summary>Four places</summary>
#
# The accumulator must come back to 8 bits: times $S_w S_x / S_y$. Batch norm multiplies and adds. A residual sum adds
# codes of two different steps. An average divides.
#
# </details>
#
# ## The naive way
#
# Leave them. The simulation, watched operation by operation, fails at the very first one:

# %%
try:
    with paper.IntegersOnly():
        simulation(x)
except ValueError as error:
    print("simulation:", error)
engine = simulation.integer()
codes = engine.enter(x)
with paper.IntegersOnly() as watch:
    engine(codes)
print("integers:", ", ".join(f"{watch.seen.count(one)} {one}" for one in sorted(set(watch.seen))))

# %% [markdown]
# ## The idea
#
# Write the factor as $M = f \cdot 2^e$ with $f \in [0.5, 1)$, and round $f$ to a whole number of 31 bits, once, before
# inference:
#
# $$m = \mathrm{round}(f \cdot 2^{31}), \quad c = 31 - e, \qquad q_y = (\mathrm{acc} \cdot m + 2^{c-1}) \gg c .$$
#
# Batch norm disappears into weights and bias. A residual sum gets a factor for each branch, on a grid of 16 bits:
# $q_a = \mathrm{DN}(S_m/S_a)\, q_m + \mathrm{DN}(S_r/S_a)\, q_r$. An average is a sum with $1/n$ in its factor.
#
# ## The package's own source

# %%
show.source(paper.dyadic, paper.rescale, paper.IntegerConv.forward, paper.IntegerJoin.sum)

# %% [markdown]
# ## One number on its way, and the knob
#
# Follow one accumulator of the layer `more`. The knob is the width of the multiplier. The curve: how many of the network's
# output codes differ from the simulation.

# %% tags=["nbval-ignore-output"]
widths = [3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 31]
shares = [integers(width)[1] for width in widths]
seen = []
hook = engine.more.register_forward_pre_hook(lambda part, args: seen.append(args[0][:1]))
_ = engine(codes)
hook.remove()
layer = engine.more
acc = torch.nn.functional.conv2d(seen[0].int(), layer.weight.int(), padding=1) + layer.bias
channel = acc.amax((0, 2, 3)).argmax().item()  # a channel that is alive
numbers = acc[0, channel].flatten().sort().values[[6, 20, 40, -1]].tolist()
real = (layer.unit[channel] / simulation.more.out.steps.step).double().flatten()


# %%
def journey(bits, accumulator):
    by, value = paper.dyadic(real, bits), numbers[accumulator - 1]
    m, c = int(by.m), int(by.c)
    exact, told = value * real.item(), int(paper.rescale(torch.tensor(value), by))
    sheet = Sheet()
    sheet.text(f"An accumulator of {value:,} meets a multiplier of {bits} bits", bold=True)
    lines = [
        f"the factor M = {real.item():.12f}", f"as m / 2^c = {m:,} / 2^{c} = {m / 2**c:.12f}",
        f"times m: {value * m:,}", f"plus half, 2^{c - 1}: {value * m + 2 ** (c - 1):,}", f"shifted right by {c}: {told:,}",
    ]  # fmt: skip
    for line in lines:
        sheet.text(line)
    same = told == int(np.floor(exact + 0.5))
    sheet.text(f"in floats: round({exact:.9f}): {'the same' if same else 'NOT the same'}", bold=True)
    at = max(i for i, one in enumerate(widths) if one <= bits)
    curve = maps.curve(widths, shares, at, "bits of the multiplier", "% of output codes that differ")
    sheet.tiles([np.asarray(curve)])
    return Picture(sheet.image(), "journey of a number", f"{'; '.join(lines)}; in floats {exact:.6f}.")


# %% tags=["nbval-ignore-output"]
settled = [dict(bits=bits, accumulator=4) for bits in (4, 8, 31)]
play.knobs(journey, settled=settled, bits=play.IntRange(3, 31, 8), accumulator=play.IntRange(1, 4, 4))

# %% [markdown]
# Why 31? The product of two numbers below $2^{31}$ just fits into 64 bits. A relative error of $2^{-31}$ moves a code only when
# it happens to lie within some $10^{-8}$ of a half: about one in a hundred million.
#
# ## Which layer gets how many bits?
#
# Near a minimum the loss is quadratic, so a rounding error $\Delta W$ costs about $\tfrac12 \Omega_i(b) = \tfrac12
# \frac{\mathrm{Tr}\,H_i}{n_i}\,\|\Delta W_i\|^2$. The trace comes from random signs $v$ (Hutchinson): $\mathrm{Tr}\,H =
# \mathrm{E}\,v^\top H v$, and $Hv$ from a second backward pass. Why the trace? Exactly it is $\tfrac12 \Delta W^\top H\,
# \Delta W$; were the error without a preferred direction, its mean would be $\tfrac12 \|\Delta W\|^2$ times the mean of
# $H$'s eigenvalues, $\mathrm{Tr}\,H / n$. Where a trace comes out near zero, or below, rounding seems to be free: there the
# estimate says nothing, and it had better not be believed.
#
# Now the linear layers of our video transformer. Only these: its norms, softmax and GELU stay in floating point, so nobody
# should call it integer-only.

# %%
bench = claim.Bench.of(weights.load("video"), 99, fast=False)
few, unseen = claim.first(bench.train, 8), claim.first(bench.held, 4)  # enough to draw a picture
trace = paper.curvature(
    lambda: (bench.model(*few[0]) - few[1]).square().mean(), bench.model, bench.names, torch.Generator().manual_seed(0), 16
)
matrices = [bench.model.get_submodule(name).weight for name in bench.names]
omega = paper.sensitivity(trace, matrices, claim.OPTIONS)
kinds = {"attention": "blue", "cross": "sky", "fc": "orange", "mod": "purple"}
kind = lambda name: next(word for word in kinds if word in name)


# %% [markdown]
# ρ turns the limit on size from all layers at 4 bits (0) to all at 8 (1). Above: bits of each layer. Below: Ω at 4 bits, in
# powers of ten; a stub is a trace that came out negative and counts as 0. Who gives up bits first?


# %%
def shared_out(rho):
    size, (bops, time) = bench.limits[0][0], bench.limits[1:]
    loose = [(use, paper.limit(use, claim.OPTIONS, 1)) for use, _ in (bops, time)]
    choice = allocate(omega, [(size, paper.limit(size, claim.OPTIONS, rho)), *loose], bench.ties)
    page = Image.new("RGB", (820 * DENSITY, 330 * DENSITY), "white")
    pen, put = ImageDraw.Draw(page), lambda x, y, word: pen.text((x * DENSITY, y * DENSITY), word, INK, font())
    logs = omega[:, 2].clamp(min=1e-12).log10()
    for i, name in enumerate(bench.names):
        bits, left = claim.OPTIONS[choice[i]], 10 + 13 * i
        high = 110 * ((logs[i] - logs.max() + 5).clamp(min=0.1) / 5).item()
        for low, top in ((160, 160 - 15 * bits), (310, 310 - high)):
            pen.rectangle([v * DENSITY for v in (left, top, left + 9, low)], PALETTE[kinds[kind(name)]], INK)
        put(left + 1, 160 - 15 * bits - TEXT - 4, str(bits))
    for i, word in enumerate(kinds):
        pen.rectangle([v * DENSITY for v in (10 + 120 * i, 6, 22 + 120 * i, 18)], PALETTE[kinds[word]], INK)
        put(28 + 120 * i, 4, {"attention": "self-attention", "cross": "to words", "fc": "feed-forward", "mod": "time"}[word])
    put(10, 164, "bits a weight, block 0 on the left"), put(10, 314, "Omega at 4 bits, the highest five powers of ten")
    mean = (size.gather(1, choice[:, None]).sum() / size[:, 0].sum() * 2).item()
    put(510, 4, f"{mean:.2f} bits a weight on average")
    return Picture(page, "bits of each layer", f"rho = {rho:.2f}: {mean:.2f} bits a weight on average.")


# %% tags=["nbval-ignore-output"]
settled = [dict(rho=rho) for rho in (0.0, 0.25, 0.75)]
play.knobs(shared_out, settled=settled, rho=play.FloatRange(0.0, 1.0, 0.25, 0.05))

# %% [markdown]
# ## Does it pay?
#
# Each point is an allocation; its height is what it really costs. Grey: random ones that use up the budgets. One sensitive
# layer at 2 bits ruins them, so they are easily beaten. The rival worth the name is 4 bits everywhere.

# %% tags=["nbval-ignore-output"]
before, dice, random, front = claim.loss(bench.model, unseen), torch.Generator().manual_seed(0), [], []
size = bench.limits[0][0]
place = lambda choice: (size.gather(1, choice[:, None]).sum().item() / 8e6,
                        claim.loss(paper.allocated(bench.model, bench.bits(choice)), unseen) - before)  # fmt: skip
for rho in (-0.25, 0.0, 0.25, 0.5):
    bench.limits = [(use, paper.limit(use, claim.OPTIONS, rho if use is size else max(rho, 0.25))) for use, _ in bench.limits]
    random += [place(bench.spread(claim.drawn(bench, dice))) for _ in range(10)]
    front.append(place(allocate(omega, bench.limits, bench.ties)))
four = place(torch.full((len(bench.names),), claim.OPTIONS.index(4)))


# %% tags=["nbval-ignore-output"]
def draw(ax):
    ax.plot(*zip(*random, strict=True), "x", color="#888888", label="random")
    ax.plot(*zip(*front, strict=True), "o-", color=PALETTE["blue"], label="by curvature")
    ax.plot(*four, "D", color=PALETTE["orange"], label="4 bits everywhere")
    ax.set(xlabel="weights of the layers, MB", ylabel="rise of the loss", title="Four clips, four budgets")
    ax.set_yscale("symlog", linthresh=1e-2)
    ax.legend(frameon=False)


plots.figure(draw, (6.5, 3.4), "size against loss", "Random allocations, those by curvature, and 4 bits everywhere.")

# %% [markdown]
# ## Predict, then run
#
# Hardware rounds halves up, `torch.round` halves to even. Average four random codes: **predict** in what share of the
# results the two differ.

# %%
four_codes = torch.randint(-127, 128, (100_000, 4), generator=torch.Generator().manual_seed(0))
up = paper.rescale(four_codes.sum(1), paper.dyadic(torch.tensor(0.25)))
even = (four_codes.sum(1) / 4).round().long()
print(f"{100 * (up != even).double().mean():.1f} %: every fourth sum ends in a half, and every second half goes another way")

# %% [markdown]
# One rule must serve both paths, or simulation and integers part.
#
# ## Exercise
#
# Complete `requantise` with whole numbers alone: no division, no float. Negative accumulators too.

# %% tags=["exercise"]


def requantise(acc, m, c):
    """acc: int64 tensor; m, c: Python integers. Returns round(acc m / 2^c), halves up."""
    return (acc * m) >> c  # not right yet: this rounds down


# %% tags=["exercise-check"]
import torch

acc = torch.arange(-5000, 5000)
m, c = 1_503_238_553, 38
true = torch.tensor([(2 * a * m + 2**c) // 2 ** (c + 1) for a in acc.tolist()])
yours = requantise(acc, m, c)
if yours.dtype == torch.int64 and torch.equal(yours, true):
    print("Right.")
else:
    print(f"{100 * (yours != true).double().mean():.0f} % of the codes are wrong.")
    print("Not yet.")

# %% [markdown]
# <details><summary>Hint</summary>
#
# Rounding to nearest is rounding down after adding a half. What is a half, before the shift?
#
# </details>
# <details><summary>Solution</summary>
#
# ```python
# def requantise(acc, m, c):
#     return (acc * m + (1 << (c - 1))) >> c
# ```
#
# </details>
#
# ## The law of limits
#
# With 31 bits every code is the simulation's; a budget for 8 bits everywhere gives 8 bits everywhere.

# %%
print("codes that differ at 31 bits:", int((integers(31)[0] - want).abs().gt(1e-9).sum()), "of", want.numel())
everything = [(use, paper.limit(use, claim.OPTIONS, 1)) for use, _ in bench.limits]
worth = paper.squares(matrices, claim.OPTIONS)
print("bits under the loosest budget:", {claim.OPTIONS[k] for k in allocate(worth, everything, bench.ties).tolist()})

# %% [markdown]
# ## The claim
#
# Three seeds, margins fixed before. First: share of output codes that a shorter multiplier changes.

# %% tags=["nbval-ignore-output"]
result = claims.read("hawqv3")
changed = lambda arm: [fmean(result["arms"][arm]["values"][f"changed_{width}"]) for width in claim.WIDTHS]
curves = {arm: (list(claim.WIDTHS), changed(arm)) for arm in ("W8A8", "W4A4")}
curves["random numbers"] = list(claim.WIDTHS), changed("numbers")
total = lambda metric: sum(sum(result["arms"][arm]["values"][metric]) for arm in ("W8A8", "W4A4"))
said = f"At 31 bits {total('differ'):.0f} of {total('codes'):.1f} million codes differ"
show.lines(curves, "bits of the multiplier", "codes that differ, %", said)

# %% tags=["nbval-ignore-output"]
hows = {"by curvature": "omega", "by weight error": "errors", "4 bits everywhere": "uniform", "greedy, measured": "greedy",
        "program, measured": "measured"}  # fmt: skip
rises = result["arms"]["video"]["values"]
values = {how: rises[f"rise_{key}"] for how, key in hows.items()}
print(f"random ones, far off to the right: {fmean(rises['rise_random']):.1f}, the luckiest {fmean(rises['rise_luckiest']):.2f}")
show.bars(values, "rise of the loss (a dot a draw)", "4 bits a weight on average", digits=2)

# %%
show.verdict("hawqv3")

# %% [markdown]
# The authors report ResNet50 at 77.6 % with 8 bits (float: 77.7), and 23 % less latency than 8 bits when bits are mixed, on a
# T4. Left out here: their int4 kernels, so no word about speed.
#
# ## Where next
#
# - [06 Quantization](../06_quantization.ipynb): the same arithmetic on one layer of the video model, with a knob.
# - [00 Start](../00_start.ipynb): the video model whose layers were rounded.
# - [The paper](https://arxiv.org/abs/2011.10680).
