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
# # SimVQ: how to keep a codebook alive with one linear layer
#
# A tokenizer may say only "number 17" instead of 32 numbers: a **codebook** of K vectors lists what can be said. Most
# codebooks die while they learn. SimVQ keeps all codes by moving them together.
#
# *Part: a bottleneck of the tokenizer. Ten minutes, one processor core.* At the end you can
# - say why a code that isn't chosen is lost, and watch it happen;
# - compute how far each code moves when one of them is chosen;
# - say when SimVQ's cure works, and what it costs.

# %%
from functools import lru_cache

import torch
from IPython.display import display

from minivid.claims import simvq as claim
from minivid.core.baselines.vq import VQ, nearest
from minivid.core.tokenizer import Tokenizer
from minivid.lab import books, canvas, claims, play, plots, show
from minivid.tokenizers.simvq import SimVQ, chase, reach
from minivid.world.scores import psnr

_ = torch.set_num_threads(1)

# %% [markdown]
# ## The picture first
#
# Vectors of two numbers, so that we can see them. The grey cloud is what an encoder says. It begins on top of the codes
# and walks away, as encoders do while they learn. Each vector is replaced by its nearest code. Dots are codes in use,
# crosses are codes that nobody chose; a cross fades with time.


# %%
def cloud(far, arc=False, n=500):
    """A slanted cloud `n 2`, or an arc, that walks `far` to the right and half as much up in the first 200 steps."""
    x = torch.randn(n, 2, generator=torch.Generator().manual_seed(0))
    turn = 1.9 * x[:, 0].tanh() + 1.6
    bent = torch.stack([turn.cos(), turn.sin()], 1) * (1.2 + 0.08 * x[:, 1:])
    x = bent if arc else x @ torch.tensor([[0.9, 0.35], [-0.15, 0.38]])
    return lambda i: x + torch.tensor([1.0, 0.5]) * far * min(1, i / 200)


def walk(part, far=4, arc=False):
    """Every twenty-fifth of 500 steps, in which the codebook learns to follow the cloud."""
    return [look for look in chase(part, cloud(far, arc), 500, lr=1e-2) if look.step % 25 == 0]


books.picture({"plain VQ": walk(VQ(64, 2)), "SimVQ": walk(SimVQ(64, 2))}, film=True)

# %% [markdown]
# Left, a quarter of the codes carries everything; right, nearly the whole book came along. (Thin lines: the way of each code.)
#
# **You have not read the paper: how would you do it?**
#
# <details><summary>What others do</summary>
#
# Move dead codes to where vectors are (*restart*). Let codes be running means of what they stand for. Begin at the
# centres of clusters. Compare directions only. Or do without learning: round every number (FSQ). All of these work.
# SimVQ asks for less: no counters, no rules, only gradients.
#
# </details>
#
# ## Why codes die
#
# The codebook learns by gradient: each vector pulls the code that is nearest to it. How many of our 64 codes feel any
# pull? First with the cloud on top of the book, then after it moved.

# %%
for far in (0, 4):
    part = VQ(64, 2)
    vectors = cloud(far)(200).T[None, :, :, None, None]  # b d f h w
    _, codes, losses = part(vectors)
    losses["codebook"].backward()
    print(f"cloud at {far}: {(part.codes.grad.abs().sum(1) > 0).sum()} of 64 codes have a gradient")

# %% [markdown]
# No gradient, no step; no step, still not the nearest. Nothing that the book does brings such a code back; only an encoder that
# walks back to it can (in the claim below many do).
#
# ## One layer
#
# Draw a random table $C$ and freeze it. What is learnt is a matrix $W$ and a shift $b$:
#
# $$Q = C\,W^\top + b .$$
#
# Say the loss wants the chosen code $q_k$ to go along $-g$. One step at rate $\eta$ moves code $j$ by
#
# $$\Delta q_j = -\eta\,\big(\langle c_j, c_k\rangle + 1\big)\,g ,$$
#
# where plain VQ has 1 for $j = k$ and 0 for all others. The inner product comes through $W$, the 1 through $b$. Below:
# this number for every pair of 16 codes, from −3 (blue) through 0 (white) to 3 (orange).


# %%
books_of_16 = {"plain VQ": VQ(16, 2), "W alone": SimVQ(16, 2, learn=("weight",)), "W and b": SimVQ(16, 2)}


def matrices(axes):
    for ax, (name, part) in zip(axes, books_of_16.items(), strict=True):
        ax.imshow(canvas.signed(reach(part).numpy(), 3))
        ax.set(title=name, xlabel="chosen code k", ylabel="code j that moves")


alt = "Maps of 16 x 16 codes. Plain VQ: the diagonal alone. W alone: orange and blue patches. W and b: mostly orange."
plots.figure(matrices, (8.2, 3.0), "how far each code moves", alt, (1, 3))

# %% [markdown]
# Left, everybody for himself. Without $b$ a pull can even push others the wrong way (blue); with it nearly all go along.
# The package's own source says it in a few lines; search, gradients and losses are those of plain VQ:

# %%
show.source(SimVQ)

# %% [markdown]
# ## In a real tokenizer
#
# Two tokenizers, the same seed, the same 200 steps; only the bottleneck differs. An 8 x 8 grid of codes, 32 numbers each,
# must say what a frame of 32 x 32 pixels shows.

# %%
frames, unseen = (claim.frames(split, fast=False) for split in ("train", "held-out"))


def trained(bottleneck, steps=200):
    torch.manual_seed(0)
    tok = Tokenizer(32, 1, (32, 64), (1, 2), bottleneck=bottleneck, noise=0.0)
    claim.train(tok, frames, steps, seed=0)
    return tok.eval().requires_grad_(False)


toks = {"plain VQ": trained(VQ(1024, 32)), "SimVQ": trained(SimVQ(1024, 32))}
titles, films, counts = ["held-out frames"], [unseen[64::128, :, 0].transpose(0, 1)], {}
for name, tok in toks.items():
    z, codes, _ = tok.bottleneck(tok.features(unseen))
    back, counts[name] = tok.decode(z), codes[0].index.flatten().bincount(minlength=1024)
    titles.append(f"{name}: {(counts[name] > 0).sum()} of 1,024 codes in use, {psnr(back, unseen).mean():.1f} dB")
    films.append(back[64::128, :, 0].transpose(0, 1))
show.clips(films, titles=titles)

# %% [markdown]
# The frames look much alike after so few steps. The books don't. Here are all 1,024 codes, 32 numbers each, seen from their
# two main directions:

# %%
for name, tok in toks.items():
    display(show.codebook(tok.bottleneck.table, counts[name], name))

# %% [markdown]
# ## Turn it yourself
#
# How many codes, how far the encoder walks, whether its vectors lie on an arc, and the step at which you look. Where does
# plain VQ lose nothing? And what can SimVQ's book never do, however long it learns?


# %%
@lru_cache(None)
def walks(codes, distance, arc):
    return {"plain VQ": walk(VQ(codes, 2), distance, arc), "SimVQ": walk(SimVQ(codes, 2), distance, arc)}


def render(codes, distance, arc, step):
    return books.picture(walks(codes, distance, arc), step // 25)


knobs = {"codes": play.Choice([64, 16, 256]), "distance": play.IntRange(0, 8, 4), "arc": play.Toggle()}
knobs["step"] = play.IntRange(0, 500, 500, 25)
settled = [(64, 0, False, 500), (64, 4, False, 200), (64, 4, True, 500)]
play.knobs(render, settled=[dict(zip(knobs, values, strict=True)) for values in settled], **knobs)

# %% [markdown]
# Shift, stretch, turn: an oval book stays oval. Codes that learn one by one bend with the arc, those that are still alive.

# %% [markdown]
# ## Predict, then run
#
# Vectors of 16 numbers, one standard deviation away from the book in each, 512 codes. **Predict:** which keeps more codes,
# $W$ without $b$, or $b$ without $W$ (the book can only be pushed, as a whole)? And what if the cloud stands still on the
# book from the start?

# %%
x = torch.randn(2048, 16, generator=torch.Generator().manual_seed(0))
parts = {"plain VQ": ("codes",), "W": ("weight",), "b": ("bias",), "W and b": ("weight", "bias")}
shares = {0: {}, 1: {}}
for m in shares:
    for name, learn in parts.items():
        *_, last = chase(SimVQ(512, 16, learn=learn), lambda i, m=m: x[i % 8 :: 8] + m, 400, lr=1e-2)
        shares[m][name] = 100 * len(nearest(x + m, last.table).unique()) / 512
print("on the book:", ", ".join(f"{name} {share:.0f} %" for name, share in shares[0].items()))
show.bars(shares[1], "codes in use, %", "One standard deviation away")

# %% [markdown]
# On top of the book nothing collapses, so there is nothing to cure: features that stay centred would do as well. And from a
# distance the humble $b$, which the paper's formula doesn't even have, does most of the work. But codes in use aren't quality:
# in the claim $b$ alone errs more than plain VQ at this distance, and in the tokenizer it is 3 dB worse than both together.
#
# ## Exercise
#
# Complete `moves`: the step that every code takes when code `k` alone is chosen and its gradient is `g`, if only $W$ learns.

# %% tags=["exercise"]


def moves(table, k, g, rate):
    """Steps `K d` of all codes; table: C, `K d`; g: gradient of the loss in the chosen code, `d`."""
    step = 0 * table
    step[k] = -rate * g
    return step  # not right yet: this is plain VQ


# %% tags=["exercise-check"]
import torch

dice = torch.Generator().manual_seed(1)
C, W, g = (torch.randn(*shape, generator=dice) for shape in ((6, 3), (3, 3), (3,)))
W.requires_grad_(True)
((C @ W.T)[2] @ g).backward()
want = C @ (W.detach() - 0.1 * W.grad).T - C @ W.detach().T
gap = (moves(C, 2, g, 0.1) - want).abs().max(1).values
if gap.max() < 1e-5:
    print("Right.")
else:
    print("Autograd moves the codes otherwise. Largest differences a code:", [f"{x:.2f}" for x in gap.tolist()])
    print("Not yet: which number tells how much code j goes along with code 2?")

# %% [markdown]
# <details><summary>Hint</summary>
#
# The gradient of $\langle W c_k, g\rangle$ in $W$ is $g\,c_k^\top$. What does a step along it do to $W c_j$?
#
# </details>
# <details><summary>Solution</summary>
#
# ```python
# def moves(table, k, g, rate):
#     return -rate * torch.outer(table @ table[k], g)
# ```
#
# </details>
#
# ## The law of limits
#
# Where $W$ is the identity, $b$ is zero and the table learns in their stead, SimVQ must be plain VQ: not nearly, but to
# the last bit, after every step.

# %%
limit, plain = walk(SimVQ(64, 2, learn=("codes",))), walk(VQ(64, 2))
same = [torch.equal(a.table, b.table) and torch.equal(a.age, b.age) for a, b in zip(limit, plain, strict=True)]
print(f"{sum(same)} of {len(same)} looks are equal to the bit")
assert all(same)

# %% [markdown]
# ## What the claim says
#
# Five ways to have codes, two to four sizes, three seeds, 2,000 steps each.

# %%
result = claims.read("simvq")
ways = {"vq": "plain VQ", "simvq": "SimVQ", "restart": "means + restart"}


def curve(how, metric):
    ks = [k for k in claim.SIZES if f"{how}, {k}" in result["arms"]]
    return ks, [sum(v) / len(v) for v in (result["arms"][f"{how}, {k}"]["values"][metric] for k in ks)]


curves = {name: (ks, [100 * v for v in vs]) for how, name in ways.items() for ks, vs in [curve(how, "usage")]}
show.lines(curves, "codes K", "codes in use, %", "Who keeps the codes of a trained tokenizer?", log="x")

# %%
rivals = ways | {"unit": "unit vectors of 8", "fsq": "FSQ"}
curves = {name: curve(how, "psnr") for how, name in rivals.items()}
show.lines(curves, "codes K", "PSNR on held-out frames, dB", "What are they worth?", log="x")

# %%
some = ("usage: simvq, 1024 over vq, 1024", "psnr: simvq, 1024 over vq, 1024", "psnr: simvq, 1024 over restart, 1024")
show.claim(result | {"tests": [test for test in result["tests"] if test["name"] in some]})

# %%
show.verdict("simvq")

# %% [markdown]
# **What the authors report** (ImageNet, 128 x 128, 65,536 codes): plain VQ uses 1.4 % of its codes and reaches 22.2 dB, SimVQ
# 100 % and 24.2 dB; from 1,024 to 262,144 codes it gains 2.3 dB. Left out here: adversarial and perceptual losses, audio,
# more than 4,096 codes.
#
# **Where next?** Chapter [02](../02_tokenizers.ipynb) puts all tokenizers on one plot of bits against decibels, and
# [sparse-vdit](sparse-vdit.ipynb) asks the same question of attention: which of all these pairs are used?
