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
# # DMMV: make the worst of many errors small, in whole steps only
#
# Weights of 3 bits, black and white pixels, filters with short coefficients: three times, numbers may take a few values
# only, and three times it is the *largest* error that hurts. One search serves them all.
#
# *Ten minutes, one processor core. A guest: it meets our models only from outside.* At the end you can
# - write a task as $\min_x \max_k |A_k x - b_k|$ and say what a swap does to it;
# - throw away 99 of 100 moves without computing them, and prove that none of them was any good;
# - say when the largest error is the right thing to look at, and when it misleads.

# %%
import itertools

import numpy as np
import torch

from minivid.claims import dmmv as claim
from minivid.core.surgery import record
from minivid.lab import canvas, claims, measure, play, plots, show
from minivid.quantization import dmmv as paper
from minivid.quantization.dmmv import MinMax, Search

_ = torch.set_num_threads(1)

# %% [markdown]
# ## The picture first
#
# A digit of 16 x 16 pixels, black or white, is seen from 16 sides: 256 sums along rays, each off by up to 1.5 pixels.
# What was the digit? Below each answer: what is wrong with it (blue: a pixel lost, orange: one too many).


# %%
truth, A = claim.pictures(0, False)[40], paper.projections(16, 16)
rays = MinMax(A, A @ truth + np.random.default_rng(0).uniform(-1.5, 1.5, len(A)), np.array([0.0, 1.0]))
grey = paper.sart(A, rays.b, 16, 60)
start, way = rays.nearest(grey), Search(destroy=0.02, iterations=150)
squares = Search(objective="squares", destroy=0.02, iterations=150)
answers = {"the digit": truth, "SART, a classic": grey, "the same, rounded": start,
           "searched: squares": rays.search(start, squares).codes,
           "searched: the worst": rays.search(start, way).codes}  # fmt: skip


# %% tags=["nbval-ignore-output"]
def tiles(axes):
    for i, (name, x) in enumerate(answers.items()):
        axes[i].imshow(x.reshape(16, 16), cmap="gray", vmin=0, vmax=1)
        axes[i].set_title(name, fontsize=9)
        axes[i + 5].imshow(canvas.signed((x - truth).reshape(16, 16), 2))
        axes[i + 5].set_xlabel(f"{np.abs(np.round(x) - truth).sum():.0f} pixels wrong")
    for ax in axes:
        ax.set(xticks=[], yticks=[])


wrong = ", ".join(f"{name} {np.abs(np.round(x) - truth).sum():.0f}" for name, x in list(answers.items())[1:])
plots.figure(tiles, (8.2, 3.7), "a digit and four answers", f"A digit and four answers. Pixels wrong: {wrong}.", (2, 5))

# %% [markdown]
# SART (1984) solves for grey values and is good at it; it doesn't know that pixels are black or white. The two searches do, and
# begin at its rounded answer. One looks for the least sum of squares. The other asks only that *no ray is wrong by much*.
#
# ## You have not read the paper: how would you do it?
#
# <details><summary>Three answers</summary>
#
# Solve for real numbers, then round. Or minimise the sum of squares, which every library can. Or write it as an integer program
# (minimise $t$, with $-t \le A_k x - b_k \le t$) and let a solver prove the optimum: with 16 unknowns that takes seconds,
# with 50 far too long.
#
# </details>
#
# ## The naive way: round
#
# To halve a video's size one first removes what is too fine for the smaller one, with a filter. This one has 21
# coefficients, computed by Parks and McClellan so that its ripple (the largest deviation from 1 below 0.4, from 0 above
# 0.5) is the least possible. Now write each coefficient with 5 bits:

# %%
problem, real = paper.fir(20, 5)
z = problem.nearest(real)
print("ripple of the real-valued filter", f"{np.abs(problem.A @ real - problem.b).max():.3f}")
print("rounded to 5 bits               ", f"{problem.state(z).t:.3f}")
found = problem.search(z, Search(("step", "pair"), guard=False, destroy=0.25, iterations=100))
print("DMMV, 5 bits                    ", f"{found.t:.3f}")

# %% [markdown]
# Each coefficient is right to half a step, and the response is wrong by five whole ones. Errors could cancel instead: that is
# what a search is for. **Turn the bits**: real-valued (black), rounded (orange), searched (blue), and the corridor of ± t.

# %%
designs = {bits: paper.fir(20, bits) for bits in range(3, 11)}
found = {bits: p.search(p.nearest(x), Search(("step", "pair"), guard=False, destroy=0.25, iterations=60))
         for bits, (p, x) in designs.items()}  # fmt: skip
w = np.linspace(0, 1, 400)
curve = paper.gain(w, 10)
decibel = lambda x: 20 * np.log10(np.maximum(np.abs(x), 1e-4))


# %%
def response(bits):
    (p, x), t = designs[bits], found[bits].t
    ways = {"real-valued": x, "rounded": p.levels[p.nearest(x)], "searched": p.levels[found[bits].codes]}

    def draw(ax):
        ax.fill_between([0, 0.4], *decibel(np.array([[1 - t] * 2, [1 + t] * 2])), color="#56B4E9", alpha=0.3, lw=0)
        ax.fill_between([0.5, 1], -80, decibel(t), color="#56B4E9", alpha=0.3, lw=0)
        for (name, h), ink, dash in zip(ways.items(), ("black", "#E69F00", "#0072B2"), (":", "--", "-"), strict=True):
            ripple = np.abs(p.A @ h - p.b).max()
            ax.plot(w, decibel(curve @ h), color=ink, ls=dash, label=f"{name}: ripple {ripple:.3f}")
        ax.set(xlabel="frequency, 1 is the finest the frame can hold", ylabel="response, dB", ylim=(-62, 8))
        ax.legend(loc="lower left", frameon=False)

    return plots.figure(draw, (7, 3.1), f"{bits} bits", f"With {bits} bits the searched filter has a ripple of {t:.3f}.")


play.knobs(response, settled=[{"bits": bits} for bits in (4, 5, 8)], bits=play.IntRange(3, 10, 5))

# %% [markdown]
# ## The idea
#
# Let $D = A x - b$ hold all errors, $t = \max_k |D_k|$. Variable $i$ goes a level up, $j$ goes one down (a *swap*):
#
# $$D' = D + s\,(A_{\cdot i} - A_{\cdot j}).$$
#
# With 128 weights of 8 levels there are some 2,000 swaps, each with 1,024 new errors. Two observations spare nearly all
# of that.
#
# **Filter 1.** Let $r_k$ be the largest change that any swap brings to row $k$. If $|D_k| + r_k < t$, this row can't become
# the worst one. Drop it.
#
# **Filter 2.** The worst row must come down, and no other may come up to $t$. So for each of the 100 worst rows, with
# $\sigma_k$ the sign of $D_k$:
#
# $$\sigma_k\, s\,(A_{ki} - A_{kj}) < t - |D_k| .$$
#
# For the worst row the right side is 0: half of all pairs are gone after one comparison, nearly all after a few. What is
# left is computed. When no swap helps, a few variables are disturbed, and the descent begins again.
#
# ## The package's own source

# %%
show.source(paper.improving, MinMax.descend)

# %% [markdown]
# ## Same start, one word swapped
#
# A real layer: one output of an attention layer of our video model has 128 weights; 3 bits each. $A$ is what the layer gets
# (1,024 tokens of noisy clips), $b$ what the output should be. From the rounded weights we search on: for the maximum, with
# and without a guard that forbids moves which raise the sum of squares; and for squares. Beside them GPTQ, which doesn't
# search: it rounds one weight after the other and lets the rest make good for it.

# %%
model, name = claim.loaded("video"), claim.LAYERS[0]
seen = []
for split in ("train", "held-out"):
    record(model, claim.calls(0, False, split), {name: (inputs := paper.Inputs())})
    seen.append(inputs.rows)
linear = dict(model.named_modules())[name]
codes, s = claim.chooser(0, False, "gptq", 1024, 0)(linear, seen[0])
fitted, unseen = (claim.some(x, 1024, 0).double().numpy() for x in seen)


# %% tags=["nbval-ignore-output"]
def one(o):
    """The problem of output o, rounded codes, GPTQ's codes, and how codes err on inputs that were not fitted."""
    levels, weight = (s.offset[o] + s.step[o] * torch.arange(8)).double().numpy(), linear.weight[o].detach().double().numpy()
    gap = lambda z: unseen @ (levels[z] - weight)
    problem = MinMax(fitted, fitted @ weight, levels)
    return problem, problem.nearest(weight), codes[o].numpy(), gap


row, begin, gptq, gap = one(0)
walks = {"rounded": [begin], "GPTQ": [gptq]}
for goal, how in {"max, guarded": {}, "max alone": {"guard": False}, "squares": {"objective": "squares"}}.items():
    states = [begin]
    row.search(begin, Search(iterations=120, **how), 0, lambda now, states=states: states.append(now.z.copy()))
    walks[goal] = [states[i] for i in np.linspace(0, len(states) - 1, 13).round().astype(int)]
for goal, states in walks.items():
    D, new = row.state(states[-1]).D, gap(states[-1])
    said = [f"worst {np.abs(x).max():.3f} rms {(x**2).mean() ** 0.5:.3f}" for x in (D, new)]
    print(f"{goal:12}  fitted: {said[0]}   not seen: {said[1]}")

# %% [markdown]
# ## The bar-code
#
# The 150 largest errors, sorted: left of inputs that were fitted, right of inputs never seen; dashed, those of GPTQ. **Turn
# the progress up** and watch the top of the left one flatten into a plateau, where many errors are nearly as bad as
# the worst and none can be made smaller alone. Then look right. What does the guard do there? Which goal would you choose?


# %%
def barcode(goal, progress):
    z = walks[goal][progress]
    down = lambda error: [np.sort(np.abs(error(codes)))[::-1] for codes in (gptq, z)]
    pairs = {"fitted inputs": down(lambda codes: row.state(codes).D), "inputs not seen": down(gap)}
    top = max(np.abs(gap(states[-1])).max() for states in ([begin], *walks.values()))

    def draw(axes):
        for ax, (title, (old, now)) in zip(axes, pairs.items(), strict=True):
            ax.axhline(now.max(), color="black", lw=0.8)
            ax.vlines(range(150), 0, now[:150], color="#0072B2", lw=1.3, label=f"searched: {goal}")
            ax.plot(old[:150], color="#E69F00", ls="--", lw=1.5, label="GPTQ")
            said = f"{title}: t = {now.max():.3f}, rms {(now**2).mean() ** 0.5:.3f}"
            ax.set(title=said, xlabel="errors, the largest first", ylim=(0, 1.05 * top), ylabel="|D|")
        axes[1].legend(loc="upper right", frameon=False)

    alt = f"{goal}, {progress} of 12: the worst error is {row.state(z).t:.3f}; GPTQ's {row.state(gptq).t:.3f}."
    return plots.figure(draw, (8.2, 2.7), f"bar-code, {goal}", alt, (1, 2))


# %% tags=["nbval-ignore-output"]
settled = [dict(goal=goal, progress=i) for goal, i in (("max, guarded", 0), ("max, guarded", 12), ("max alone", 12))]
play.knobs(barcode, settled=settled, goal=play.Choice(list(walks)[2:]), progress=play.IntRange(0, 12, 12))

# %% [markdown]
# ## What the filters throw away

# %%
looks = []
row.search(begin, Search(iterations=60), 0, lambda now: looks.append((len(now.rows), now)))
ends, last = [n for n, _ in looks][-60::3], looks[-1][1]
shares = {"rows, by filter 1": last.rows, "pairs, by filter 2": last.pairs}
means = {name: [100 * np.mean(x[a:b]) for a, b in itertools.pairwise(ends)] for name, x in shares.items()}
show.lines({name: (range(3, 60, 3), y) for name, y in means.items()}, "iteration", "dropped, %")

# %% tags=["nbval-ignore-output"]
run = lambda top: row.search(begin, Search(iterations=3, top=top))
print(f"with both filters {measure.ratio(lambda: run(0), lambda: run(100), 5).median:.1f} times as fast, same codes:",
      (run(0).codes == run(100).codes).all())  # fmt: skip

# %% [markdown]
# ## Predict, then run
#
# Now we begin at GPTQ's codes and search for the maximum. On the fitted inputs the worst error falls by a good part.
# **Predict:** over eight outputs, by how much does it fall on inputs that were not seen?

# %% tags=["nbval-ignore-output"]
change = {"fitted": [], "unseen": []}
for o in range(8):
    problem, _, start, error = one(o)
    z = problem.search(start, Search(iterations=40), o).codes
    change["fitted"].append(problem.state(z).t / problem.state(start).t)
    change["unseen"].append(np.abs(error(z)).max() / np.abs(error(start)).max())
print({name: f"{100 * np.mean(x) - 100:+.0f} %" for name, x in change.items()})

# %% [markdown]
# 128 free choices against 1,024 errors, of which only the few largest count: it is easy to please those few. The largest of
# 1,024 numbers says little about the next 1,024, most of all where a few inputs are much longer than the others. In the
# tomography above this wasn't so: there the noise had a hard limit, and the limit is just what the maximum measures.
#
# ## Exercise
#
# Filter 2, by you. You get all errors `D`, what each first move adds to them (`first`, a row a move), and each second one.
# Say which pairs *may* lower the largest error, judging by the worst of the errors alone.

# %% tags=["exercise"]
import numpy as np


def may_improve(D, first, second):
    """A table of booleans: first moves by second moves."""
    return np.ones((len(first), len(second)), bool)  # safe, but it drops nothing


# %% tags=["exercise-check"]
import numpy as np

dice = np.random.default_rng(2)
D, first, second = dice.standard_normal(40), 0.3 * dice.standard_normal((20, 40)), 0.3 * dice.standard_normal((20, 40))
kept = may_improve(D, first, second)
better = np.array([[np.abs(D + a + b).max() < np.abs(D).max() for b in second] for a in first])
if kept.shape != better.shape or (better & ~kept).any():
    print("A pair that lowers the largest error was dropped, or the table has the wrong shape.")
    print("Not yet.")
elif kept.mean() > 0.6:
    print(f"Safe, but {100 * kept.mean():.0f} % of the pairs are left. In which direction must the worst row go?")
    print("Not yet.")
else:
    print("Right.")

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def may_improve(D, first, second):
#     k = np.abs(D).argmax()
#     push = np.sign(D[k]) * (first[:, None, k] + second[None, :, k])
#     return push < 0
# ```
#
# With seven more rows nearly nothing is left: each allows a push of $t - |D_k|$ in its own direction.
#
# </details>
#
# ## The law of limits
#
# Where everything can be tried, the search finds the best there is, HiGHS proves it, and the filters change nothing.

# %%
for seed in range(3):
    dice = np.random.default_rng(seed)
    tiny = MinMax(dice.standard_normal((15, 6)), dice.standard_normal(15), np.linspace(-1, 1, 4))
    best = min(tiny.state(np.array(z)).t for z in itertools.product(range(4), repeat=6))
    how = [Search(("step", "swap"), guard=False, destroy=0.5, iterations=300, top=top) for top in (100, 0)]
    searched, plain = (tiny.search(np.zeros(6, int), each, seed) for each in how)
    assert searched.t == plain.t and np.isclose(searched.t, best) and np.isclose(tiny.exact().t, best)
    print(f"4,096 tried: {best:.3f}   search: {searched.t:.3f}   HiGHS: {tiny.exact().t:.3f}   bound: {tiny.relaxed()[1]:.3f}")

# %% [markdown]
# ## The claim
#
# Three seeds, margins fixed before. Filters of growing order against HiGHS, which gets the same seconds where it can't prove
# its optimum; two layers of the video model in 3 bits; 64 pictures a seed under uniform and under Gaussian noise.

# %% tags=["nbval-ignore-output"]
result = claims.read("dmmv")
value = lambda arm, metric: result["arms"][arm]["values"][metric]
arms = [f"{way}, order {n}" for n in claim.LARGE for way in ("rounded", "HiGHS", "search")]
ripples = {arm: value(arm, "ripple") for arm in arms}
show.bars(ripples, "ripple (a dot a pair of edges)", "Filters too large to be proved optimal")

# %%
pixels = {f"{kind}: {way}": [100 * v for v in value(f"{way}, {kind} noise", "wrong")]
          for kind in claim.KINDS for way in (*claim.CLASSICS, "squares", "search")}  # fmt: skip
show.bars(pixels, "wrong pixels, % (a dot a seed)", "When noise is uniform, the worst ray tells most")

# %%
show.verdict("dmmv")

# %% [markdown]
# The authors report, on an accelerator: quantised networks 14 % better on average than other methods, tomography with 16 %
# less error under uniform noise, and close to half the ripple of a commercial solver's filters.
#
# ## Where next
#
# - [00 Start](../00_start.ipynb): the model whose layer was quantised here.
# - [The paper](https://arxiv.org/abs/2508.13437), and the [GPTQ](https://arxiv.org/abs/2210.17323) that it begins from.
