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
# # Sparse-vDiT: look once which pattern a head follows, then compute only that
#
# In a video transformer every token asks every other token, and that takes most of the time. Most of those questions are
# never listened to.
#
# *Ten minutes. A part: given to the attention of a trained model.* At the end you can
# - read four patterns off an attention map, and say which order of tokens turns the second into the first;
# - skip what a pattern doesn't need, so that it costs *nothing* (masking costs more, not less);
# - choose a pattern for each head, once, and say what you pay for it.

# %%
import json

import torch

from minivid.core import attention, noise, sample, text, weights, where
from minivid.core.model import Cond, Guided
from minivid.lab import claims, maps, measure, play, show
from minivid.sparse_attention import sparse_vdit as paper
from minivid.world.scores import psnr

_ = torch.set_num_threads(1)

# %% [markdown]
# ## The picture first
#
# One caption, one noise, three times the same model. Above, all tokens ask all tokens. In the middle each head may only
# ask tokens in neighbouring frames. Below each head has a pattern of its own, at the same price. (What takes minutes was
# computed beforehand by `scripts/make_explorer.py` and is read here.)

# %% tags=["nbval-ignore-output"]
made, header = weights.read("sparse-vdit.safetensors")
names, shown_steps = json.loads(header["names"]), json.loads(header["steps"])
tables = [[[[paper.Mode(k, w, tuple(c)) for k, w, c in row] for row in table] for table in five]
          for five in json.loads(header["tables"])]  # fmt: skip
model, tokenizer, grid = weights.load("frames"), weights.load("tok-f"), (16, 4, 4)
with torch.no_grad():
    films = {name: tokenizer.decode(latents.float()) for name, latents in zip(names, made["clips"], strict=True)}


def film(name, step=-1):
    """The clip that a stored run believes in at one of the shown steps, and its PSNR to the dense clip of that step."""
    return films[name][step], psnr(films[name][step], films["dense"][step]).item()


titles = {"dense": "all pairs", "diagonal 2": "29 % of them: a window of frames for every head",
          "searched 2": "29 % of them: a pattern for each head"}  # fmt: skip
said = [f"{title}, {film(name)[1]:.0f} dB" if name != "dense" else title for name, title in titles.items()]
show.clips([film(name)[0] for name in titles], said, f"“{header['caption']}”")

# %% [markdown]
# PSNR (in dB) is measured to the *dense clip from the same noise*: we ask whether the model still says what it would have
# said, not whether the clip is good.
#
# ## You have not read the paper: how would you do it?
#
# Our clip is 16 frames of 4 × 4 tokens: 256 tokens, 65,536 pairs a head, 24 heads, 40 calls. Which pairs would you drop?
#
# <details><summary>One answer</summary>
#
# Neighbours in time matter most, so: forbid everything beyond two frames. That is the middle row above, and it also forbids
# what some heads live on. Another: keep the largest weights. But to know which those are, you must compute them all.
#
# </details>
#
# ## The naive way: a mask
#
# Say a token may see its own frame and one on either side. Tell so the attention with a mask, and time it against the same
# without (1,024 tokens, four heads):

# %% tags=["nbval-ignore-output"]
places = where.grid(16, 8, 8)
q, k, v = torch.randn(3, 1, 4, 1024, 32, generator=torch.Generator().manual_seed(0))
mode = paper.Mode("diagonal", 1)
mask = paper.kept(mode, places.grid)
whole = lambda: attention.dense(q, k, v, places)
ways = {"a mask": lambda: paper.sdpa(q, k, v, attn_mask=mask),
        "in pieces": lambda: paper.Sparse((mode,) * 4)(q, k, v, places)}  # fmt: skip
speeds = {name: measure.ratio(whole, way, 9).median for name, way in ways.items()}
speeds["what the pattern promises"] = 1 / paper.share(mode, places.grid)
assert speeds["a mask"] < speeds["in pieces"]
show.bars(speeds, "times as fast as full attention", digits=2)

# %% [markdown]
# A mask computes everything and throws most of it away. *In pieces* is what this lesson is about: the same pattern, made of
# small dense products. First, though: which pattern? Ask the model. This runs it once, densely, and keeps what its heads
# compare; then **point at a token** (or use the arrow keys) and see where one of the heads looks from there.

# %%
seen, shape = {}, tokenizer.latent_shape(16, 32, 32)
words, x = text.tokens([header["caption"]]), sample.start(1, shape, int(header["seed"]))
watched = paper.watched(model, lambda layer, *heads: seen.setdefault(layer, []).append(heads))
_ = noise.sample(Guided(watched, 2.0), noise.flow(), x, Cond(text=words), noise.table(20, 16, shift=3.0))


def looks(layer, head, step):
    """Attention map and values of one head at one of the 20 steps, with the caption told."""
    q, k, v, at = seen[layer][step]
    return attention.scores(q[:1, [head]], k[:1, [head]], at)[0, 0], v[0, head]


play.attention(looks(3, 0, 11)[0], *grid)

# %% [markdown]
# ## The idea
#
# Put the tokens in a line, frame after frame, and a head's map shows one of four textures: a thick **diagonal** (it stays
# near its own frame), **many diagonals** (it stays at its place, in all frames), **stripes** (a few frames that all listen
# to), or nothing in particular. Sort the tokens by place first, and the many diagonals become one thick diagonal: with
# $P$ for that sorting,
#
# $$\mathrm{Attn}(Q, K, V) = P^\top \mathrm{Attn}(PQ, PK, PV).$$
#
# So one window kernel serves two patterns. For each head, let $O_0$ be its full output and $O_i$ that of pattern $i$,
# which computes the share $c_i$ of all blocks. Take the pattern with the least
#
# $$L_i = \frac{\lVert O_i - O_0 \rVert^2}{\text{mean energy of the layer's heads}} + \lambda\, c_i,$$
#
# or full attention, if all $L_i$ exceed a limit $\varepsilon$. Once, offline.
#
# ## The package's own source
#
# Watch for what is *not* there: no mask, no loop over inner blocks. `unfold` gives overlapping views of one memory.

# %%
show.source(paper.window, paper.window_of_places, paper.search)

# %% [markdown]
# ## Same noise, one part swapped
#
# `sparsify` returns a model that shares all its weights with ours and attends by a table.

# %% tags=["nbval-ignore-output"]
error, cost = made["errors"][1], torch.tensor([paper.share(table[0][0], grid) for table in tables[1]])
limit = paper.tolerance(error, cost, most=0.4)
choice = paper.search(error, cost, epsilon=limit)
sparse = paper.sparsify(model, paper.assemble(choice, tables[1]))
seed = int(header["seed"])
again = sample.generate([header["caption"]], seed, frames=16, model=sparse, tokenizer=tokenizer)[0]
title = f"{100 * cost[choice].mean():.0f} % of the blocks: {psnr(again, film('dense')[0]):.0f} dB"
show.clips([film("dense")[0], again], ["dense", title], difference=True)

# %% [markdown]
# ## The explorer
#
# Choose a head, a pattern for it, how much it may keep, and a moment of the 20 steps. The maps show what is computed in
# full colour and what is skipped washed out, in both orders of the tokens. Under them: what the boxed token takes from
# the 16 frames of 4 × 4 tokens. Under that: the clean clip that the model believes in at this step if *all* heads get this
# pattern. Find a head that loses nothing to a window of frames, and one that loses nearly everything.

# %% tags=["nbval-ignore-output"]
levels = {"6 %": 0, "18 %": 1, "29 %": 2, "48 %": 4}  # of the pairs; the width of a window that keeps as much
by_places = torch.arange(256).view(16, 16).T.flatten()
places = where.grid(16, 16, 16)
one = *torch.randn(3, 1, 1, 4096, 32, generator=torch.Generator().manual_seed(0)), places
speed = {}
for level, five in zip(levels, tables, strict=True):
    speed |= {("full", level): "as fast as", ("skip", level): "no time beside"}
    for kind, table in zip(paper.KINDS[2:], five[2:], strict=True):
        plug = paper.Sparse((table[0][0],))
        times = measure.ratio(lambda: attention.dense(*one), lambda plug=plug: plug(*one), 5)
        speed[kind, level] = f"{times.median:.2g}x as fast as"


# %%
def facts(layer, head, kind, level, step):
    """The full map, its kept part, the pattern's map, and two sentences."""
    full, v = looks(layer, head, step)
    mode = tables[list(levels).index(level)][paper.KINDS.index(kind)][layer][head]
    kept, work = paper.kept(mode, grid), paper.share(mode, grid)
    part = ((full * kept) / (full * kept).sum(-1, keepdim=True)).nan_to_num()
    lost = ((part - full) @ v).square().mean() / (full @ v).square().mean()
    held, flops = 100 * (full * kept).sum() / 256, 4 * 256**2 * 32 / 1e6
    told = (f"{100 * work:.0f} % of the pairs hold {held:.0f} % of this head's attention. "
            f"Error: {lost:.2f} of its energy.")  # fmt: skip
    price = f"{work * flops:.1f} of {flops:.1f} MFLOP; at 4,096 tokens {speed[kind, level]} full attention (measured)."
    return full, kept, part, (told, price)


# %%
def explore(layer, head, pattern, density, step):
    full, kept, part, told = facts(layer, head, pattern, density, step - 1)
    name = {"full": "dense", "skip": "skip 0"}.get(pattern, f"{pattern} {levels[density]}")
    at, query = shown_steps.index(step - 1), 8 * 16 + 9
    clip, score = film(name, at)
    in_order = lambda x: x[by_places][:, by_places]
    squares = {"keys, frame after frame": maps.square(full, kept.float()),
               "keys, place after place": maps.square(in_order(full), in_order(kept.float())),
               "sums over frames": maps.square(full.view(16, 16, 16, 16).sum((1, 3)))}  # fmt: skip
    through = maps.volume(part[query], grid, query, kept[query].float())
    volumes = {"what the boxed token takes, all pairs": maps.volume(full[query], grid, query),
               "and through this pattern": through}  # fmt: skip
    clips = {"what the dense model believes in at this step": film("dense", at)[0],
             f"the same with this pattern in all heads: {score:.0f} dB": clip}  # fmt: skip
    return maps.head(f"layer {layer}, head {head}, step {step}: {pattern}", squares, volumes, clips, told)


# %% tags=["nbval-ignore-output"]
settled = [dict(layer=3, head=0, pattern=kind, density="18 %", step=12) for kind in paper.KINDS[2:]]
play.knobs(
    explore, settled=settled, layer=play.IntRange(0, 5, 3), head=play.IntRange(0, 3, 0),
    pattern=play.Choice(paper.KINDS[2:] + paper.KINDS[:2]), density=play.Choice(list(levels)[1:] + ["6 %"]),
    step=play.Choice([i + 1 for i in shown_steps]),
)  # fmt: skip

# %% [markdown]
# ## All heads at once
#
# Each head with its mean map, framed in the colour of the mode that the search gives it. Turn $\varepsilon$: more heads
# become sparse, and the point moves down the curve. Choose a head to see what its candidates cost ($\lambda = 0.5$): the
# least bar wins if it stays under the line.

# %%
colours = dict(zip(paper.KINDS, ("black", "sky", "blue", "orange", "purple"), strict=True))
epsilons, shares, scores = made["curve"].clamp(max=50).T.tolist()


def searched(epsilon, layer, head):
    choice = paper.search(error, cost, epsilon=epsilon)
    kinds = [[paper.KINDS[m] for m in row] for row in choice.tolist()]
    parts = zip(error[layer, head].tolist(), (0.5 * cost).tolist(), strict=True)
    bars = maps.bars(dict(list(zip(paper.KINDS, parts, strict=True))[1:]), ("error", "0.5 x share of the blocks"), epsilon)
    at = min(range(len(epsilons)), key=lambda i: abs(epsilons[i] - epsilon))
    curve = maps.curve(shares, scores, at, "share of the blocks", "PSNR to the dense clips, dB, at most 50")
    title = f"{(choice > 0).sum()} of 24 heads sparse; head {head} of layer {layer}: {kinds[layer][head]}"
    return maps.board(made["maps"].float(), kinds, colours, title, chosen=(layer, head), sides=(bars, curve))


# %% tags=["nbval-ignore-output"]
settled = [dict(epsilon=epsilon, layer=3, head=0) for epsilon in (0.15, 0.25, 0.35)]
play.knobs(
    searched, settled=settled, epsilon=play.FloatRange(0.0, 0.6, 0.25, 0.025), layer=play.IntRange(0, 5, 3),
    head=play.IntRange(0, 3, 0),
)  # fmt: skip

# %% [markdown]
# ## Predict, then run
#
# The search behind these pictures looked at six captions. Repeat it with one other caption and two steps. **Predict:** of
# 24 heads, how many get the same mode? If what a head does came from the content, it would be as many as chance gives.

# %% tags=["nbval-ignore-output"]
other = text.tokens(["a large green star moves up"])
calibrate = lambda m: noise.sample(m, noise.flow(), sample.start(1, shape, 9), Cond(text=other), noise.table(2, 16, shift=3.0))
once = paper.errors(model, calibrate, tables[1]).mean((0, 1))
alone = paper.search(once, cost, epsilon=paper.tolerance(once, cost, 0.4))
same, share = (alone == choice).sum().item(), lambda one: one.flatten().bincount(minlength=5) / 24
print(f"{same} of 24 heads get the same mode; chance would give {24 * (share(alone) * share(choice)).sum():.0f}")

# %% [markdown]
# ## Exercise
#
# You are given `by_frame`: attention within each frame, for tokens that come frame after frame. Make of it attention within
# each *place*, over all frames, without touching a score. (Two rearrangements are enough.)

# %% tags=["exercise"]
from einops import rearrange


def by_place(by_frame, q, k, v, frames):
    """Heads `b k (f s) d`: each token attends to the tokens at its own place in all frames."""
    return by_frame(q, k, v, frames)  # not right yet: change this


# %% tags=["exercise-check"]
import torch
from einops import rearrange


def by_frame(q, k, v, frames):
    q, k, v = (rearrange(x, "b k (f s) d -> b k f s d", f=frames) for x in (q, k, v))
    return ((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v).flatten(2, 3)


q, k, v = torch.randn(3, 2, 2, 6 * 4, 8, generator=torch.Generator().manual_seed(0))
yours, wanted = by_place(by_frame, q, k, v, 6), torch.zeros_like(v)
for place in range(4):
    one = slice(place, None, 4)
    wanted[:, :, one] = (q[:, :, one] @ k[:, :, one].mT / 8**0.5).softmax(-1) @ v[:, :, one]
if yours.shape == wanted.shape and torch.allclose(yours, wanted, atol=1e-5):
    print("Right.")
else:
    print("Is each output back at its token? Compare token 1 of frame 0 with what it should be:", wanted[0, 0, 1, :3])
    print("Not yet.")

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def by_place(by_frame, q, k, v, frames):
#     q, k, v = (rearrange(x, "b k (f s) d -> b k (s f) d", f=frames) for x in (q, k, v))
#     o = by_frame(q, k, v, q.shape[2] // frames)
#     return rearrange(o, "b k (s f) d -> b k (f s) d", f=frames)
# ```
#
# Every place plays the part of a frame. Rotary positions don't mind: they were turned into $q$ and $k$ before the sorting.
#
# </details>
#
# ## The law of limits
#
# A method that is right has a setting at which it changes nothing.

# %%
q, k, v, at = seen[3][11]
dense = attention.dense(q, k, v, at)
limits = {"window over all frames": paper.Mode("diagonal", 15), "window over all places": paper.Mode("multi-diagonal", 15),
          "stripe of all frames": paper.Mode("stripe", columns=tuple(range(16)))}  # fmt: skip
for name, mode in limits.items():
    assert torch.allclose(paper.Sparse((mode,) * 4)(q, k, v, at), dense, atol=1e-4)
    print(f"{name:24} = full attention")
silent = paper.Sparse((paper.SKIP,) * 4)(q, k, v, at)
print("a skipped head says", silent.unique().tolist())

# %% [markdown]
# ## The claim
#
# Measured on held-out captions with eight seeds, margins fixed before. All at about 29 % of the pairs; *online* chooses between
# both windows anew at every call, *top blocks* finds the best frames for each block of queries at every call.

# %% tags=["nbval-ignore-output"]
result = claims.read("sparse-vdit")
ways = {"one window of frames": "frames", "one window of places": "places", "searched modes, dealt at random": "random",
        "online": "online", "top blocks": "top blocks", "searched": "searched"}  # fmt: skip
values = {name: result["arms"][f"{way} (29 %)"]["values"]["psnr"] for name, way in ways.items()}
values["another noise"] = result["arms"]["second seed"]["values"]["psnr"]
show.bars(values, "PSNR to the dense clip, dB (a dot a seed)", "Who stays closest to the dense model?")

# %%
show.verdict("sparse-vdit")

# %% [markdown]
# The authors report, on HunyuanVideo with 119,056 tokens, 1.85 times the speed end to end at 27.1 dB. At our 256 tokens there is
# hardly a gain, and at 4,096 the kernels come near what the patterns promise: sparse attention is for long clips.
#
# ## Where next
#
# - [00 Start](../00_start.ipynb): the model that was cut here, from its first line.
# - [The paper](https://arxiv.org/abs/2506.03065), and its [rival](https://arxiv.org/abs/2502.01776), which chooses online.
