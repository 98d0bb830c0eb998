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
# # 04 · Block diffusion: how does it go on for a minute?
#
# Diffusion makes all frames of a clip at once, each looking at every other: beautiful, and over after a second. A language model
# makes one word after another: endless, and its mistakes add up. Make a film **a block of frames at a time**, each block by
# diffusion, each looking back at what is finished, and you have both. And both kinds of trouble.
#
# **Reading time** about 25 minutes · **runs** in about half a minute on one processor core, offline
#
# After it you can
# 1. place autoregression, block diffusion and plain diffusion on one axis, and say what moves along it;
# 2. say what a cache holds, why only clean frames may enter it, and what a bounded one forgets;
# 3. read a drift curve, and tell drift from forgetting;
# 4. weigh a minute's quality against the cost of a frame.

# %%
import copy
from functools import lru_cache
from statistics import fmean
from time import process_time

import torch
from IPython.display import Markdown

from minivid import world
from minivid.core import sample, weights
from minivid.core.cache import Cache, Window
from minivid.lab import claims, papers, play, plots, show

_ = torch.set_num_threads(1)
model, tokenizer = weights.load("block"), weights.load("tok-f")

# %% [markdown]
# ## The picture first
#
# Nothing is given but captions, one for each block of four frames. The first tells a shape and a motion, not a colour; the second
# scene likewise; then the words only say *back to the first*. `block` was trained on films of eight blocks. This one has twelve:

# %% tags=["nbval-ignore-output"]
scene = world.draw(5000, 9, "recurrent", "held-out")
words = [text for *_, text in world.captions(scene, 48)]
with torch.no_grad():
    film = tokenizer.decode(sample.film([words], None, Cache(), seed=1, steps=10, model=model))[0]
every = list(range(2, 48, 4))
show.strip(film[:, every], "One frame of each block", frames=12, labels=[f"block {i}" for i in range(12)])

# %%
for i in [i for i in range(12) if i == 0 or words[i] != words[i - 1]]:
    print(f"from block {i}: {words[i]}")

# %% [markdown]
# <details><summary><b>Before you read on:</b> how can it know the colour?</summary>
#
# It made it up in the first block. Since then it reads what it made: the keys and values of finished blocks are kept, and every
# later block attends to them as to its own. Take them away, and "back to the first" is just a phrase (below).
# </details>
#
# ## One axis
#
# Let a film be blocks $V_1, V_2, \dots$, each made from noise, each seeing itself and what came before:
#
# $$p(V) = \prod_c p(V_c \mid V_{<c}, \text{caption}_c).$$
#
# With one frame a block that is autoregression; with the whole clip in one block it is plain diffusion. In between a rule decides
# who sees whom: *a key is visible if its block is not later than the query's*. **Slide the block length.** Left: which of 16
# frames (across) each frame (down) sees. Right: the clip, by the same weights from the same noise.


# %%
@lru_cache(None)
def clip(frames):
    """A clip of 16 frames in blocks of so many, how many bytes the cache holds, and seconds of a processor."""
    net, cache = copy.copy(model), Cache()
    net.block = frames
    began = process_time()
    latent = sample.film([["a green square moves right"] * (16 // frames)], None, cache, seed=3, steps=10, model=net)
    seconds = process_time() - began
    with torch.no_grad():
        return tokenizer.decode(latent)[0], cache.nbytes, seconds


LENGTHS = [1, 2, 4, 8, 16]
made = {frames: clip(frames) for frames in LENGTHS}


# %%
def axis(frames):
    block = torch.arange(16) // frames
    sees = block[None] <= block[:, None]
    picture = torch.cat(list(made[frames][0][:, 1::4].unbind(1)), 2).clamp(-1, 1).movedim(0, 2) / 2 + 0.5

    def draw(axes):
        axes[0].imshow(sees, cmap="cividis", vmin=0, vmax=1)
        axes[0].set(xlabel="frame seen", ylabel="frame", xticks=(0, 5, 10, 15), yticks=(0, 5, 10, 15))
        axes[0].set_title(f"{frames} a block")
        axes[1].imshow(picture, interpolation="nearest")
        axes[1].set_axis_off()
        axes[1].set_title(f"{16 // frames * 10} calls of {16 * frames} tokens;\nthe first frames are there after 10")

    name = {1: "autoregression", 16: "plain diffusion"}.get(frames, "block diffusion")
    pairs = 10 * sum(16 * frames * 16 * frames * (i + 1) for i in range(16 // frames))
    told = f"{frames} frames a block, {name}: {pairs / 1e6:.2f} million pairs a layer"
    return plots.figure(draw, (8.6, 2.5), told, f"{told}; {sees.float().mean():.0%} of all pairs of frames are seen.", (1, 2))


# %%
settled = [dict(frames=frames) for frames in (1, 4, 16)]
play.knobs(axis, settled=settled, frames=play.Choice(LENGTHS))

# %% [markdown]
# The weights were trained with four frames a block, and yet all lengths work: nothing in them knows the length, only who
# was seen. What moves along the axis:

# %% tags=["nbval-ignore-output"]
print("frames a block   calls   seconds   bytes in the cache")
for frames, (_, held, seconds) in made.items():
    print(f"{frames:14} {16 // frames * 10:7} {seconds:9.1f} {held:16,}")

# %% [markdown]
# Short blocks: the viewer sees the first frames early, and each frame costs a whole walk through the noise. Long ones: few calls,
# every frame adjusts to every other, nothing to see until all is done, and no going on. The cache ends equally full.

# %% [markdown]
# ## The axis goes on below a frame
#
# Take codes in place of latents, and a block is *said* in one pass instead of being walked through noise. Then it may be
# shorter than a frame: [NBP](papers/nbp.ipynb) goes from a token (a language model of pictures) to a row of eight to a frame.
# The rule of who sees whom is the same. Five twins, same parameters, steps and clips: passes for 16 frames of 64 codes, how
# much faster that is with a cache, what a true code costs, and what comes of going on alone for four frames:

# %% tags=["nbval-ignore-output"]
twins = claims.read("nbp")["arms"]
of = lambda arm, metric: fmean(twins[arm]["values"][metric])
print("tokens a block   passes   times as fast   bits a code   Fréchet   frames torn")
for L in (1, 4, 8, 16, 64):
    calls, faster = (of("speed", f"calls, L = {L}"), of("speed", f"L = {L}")) if L > 1 else (1024, 1)
    found = [of(f"L = {L}", metric) for metric in ("bits", "frechet_1", "torn_1")]
    print(f"{L:14} {calls:8.0f} {faster:15.1f} {found[0]:13.2f} {found[1]:9.2f} {found[2]:13.0%}")

# %% [markdown]
# Single tokens see most and should cost least, but after 800 steps whole frames do: each of their cells is asked for by the same
# cell of the frame before, which is soon learnt. The cells of such a block are drawn without asking each other. Where motion is
# straight they hardly need to; where the future is open, the frames of a diffused block adjust to each other over its steps. That
# is what the many calls above are for.
#
# ## What the cache holds
#
# Keys and values of each layer for all tokens of finished blocks, written by **one clean pass**: the finished block is shown to
# the model once more, without noise. Keep those of the last noisy step instead, and every later block reads a blur. Two laws
# the tests hold: a film through the cache is the film computed anew, to $10^{-5}$; and changing a later caption leaves
# everything before it bit for bit as it was.
#
# What is it worth? One step of the next block, late in a film against early, and against computing all of the past anew at every
# step (from the claim of [BlockVid](papers/blockvid.ipynb)):

# %% tags=["nbval-ignore-output"]
result = claims.read("blockvid")
value = lambda arm, metric: result["arms"][arm]["values"][metric]
mean = lambda arm, metric: fmean(value(arm, metric))
for name, title in {"full": "all of the past", "bank": "a bank that looks up two old blocks"}.items():
    late, faster, promised = (mean("time", f"{name}: {what}") for what in ("late over early", "speed-up", "promised"))
    print(f"{title}: a step after 32 blocks takes {late:.1f} times as long as after 4;")
    print(f"    {faster:.0f} times as fast as without a cache, where the operations promise {promised:.0f}")

# %% [markdown]
# ## When may keys be kept?
#
# When they come out the same at every step: finished frames look at finished frames only, and have a time of their own, 0.
# [ViD-GPT](papers/vid-gpt.ipynb) makes a clip model so by looking back along time, the frames so far as a prompt. What does it
# lose against a model whose frames all see each other and are all computed anew? Films A B A B ..., a scene comes back after
# four frames of another; colour error of its body (a dot a seed):

# %% tags=["nbval-ignore-output"]
gpt = claims.read("vid-gpt")["arms"]
names = {"causal": "looks back, cached", "partial": "and sees its own chunk", "full": "all see all, anew",
         "full, 4": "the last 4 frames, anew"}  # fmt: skip
bars = {name: gpt[arm]["values"]["body"] for arm, name in names.items()}
faster = fmean(gpt["speed"]["values"]["faster"])
show.bars(bars, "colour error of the body", f"A cached chunk is {faster:.1f} times as fast", digits=2)

# %% [markdown]
# ## Forgetting
#
# A cache that keeps everything grows with the film, and so does the time of a step. Keep the last few blocks: constant time, and
# whoever left the picture more blocks ago than that is gone. Scenes A and B are true frames here; then A is called back. **Turn
# the window.**

# %% tags=["nbval-ignore-output"]
known = scene.cuts[2].start // 4
truth = world.render(scene, 32, 4 * known + 8)
past = tokenizer.encode(truth[None, :, : 4 * known])


@lru_cache(None)
def back(last):
    cache = Window(last) if last < known else Cache()
    latent = sample.film([words[: known + 2]], past, cache, seed=0, steps=8, model=model)
    with torch.no_grad():
        return tokenizer.decode(latent[:, :, -8:])[0], cache.nbytes


SIZES = list(range(1, known + 1))
returns = {last: back(last) for last in SIZES}


# %%
def window(last):
    shown, held = returns[last]
    off = (shown - truth[:, -8:]).square().mean().sqrt()
    scenes = "".join(cut.name * ((after.start - cut.start) // 4) for cut, after in zip(scene.cuts, scene.cuts[1:3], strict=False))
    told = f"the last {last} of {known} blocks ({scenes[-last:]}) are kept, {held / 1e6:.1f} MB: off by {off:.2f}"
    rows = torch.stack([truth[:, -8::2], shown[:, ::2]])
    picture = torch.cat([torch.cat(list(row.unbind(1)), 2) for row in rows], 1).clamp(-1, 1).movedim(0, 2) / 2 + 0.5

    def draw(ax):
        ax.imshow(picture, interpolation="nearest")
        ax.set_yticks([16, 48], ["truth", "made"])
        ax.set_xticks([])
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)

    return plots.figure(draw, (6.4, 3.2), told, f"A returns: {told}.")


settled = [dict(last=last) for last in (SIZES[0], SIZES[-3], SIZES[-2])]
play.knobs(window, settled=settled, last=play.IntRange(1, known, 1))

# %% [markdown]
# As soon as a block of A is in reach, its colour and its ground are back. That is what the shared `block` was trained for,
# and what its own claim measures: with A in the cache every colour is right; without, one in nine, as by guessing.
#
# [BlockVid](papers/blockvid.ipynb) reads back *by caption*: of all old blocks the two whose words are most alike, and of
# these the tokens that were looked at. In the claim A returns after B, A and C, and C fills the window:

# %% tags=["nbval-ignore-output"]
read = {"window": "the last three", "stride": "three, spread", "full": "everything", "retrieval": "looked up",
        "sparse": "looked up, sparse"}  # fmt: skip
tokens = {name: mean(f"recall: {name}", "tokens") for name in read}
bars = {f"{title}: {tokens[name]:.0f} tokens": value(f"recall: {name}", "body") for name, title in read.items()}
show.bars(bars, "error of the colour that no caption tells (a dot a seed)", "A comes back")

# %% [markdown]
# ## Drift
#
# Forgetting loses what was right. **Drift** is worse: each block reads the mistakes of those before it and adds its own, and the
# model has never seen such a past in training. One scene without end, one true block, 31 made. The remedies of the chapter all
# make the past of training look like the past of a rollout: by noise, or by the model's own blocks.

# %% tags=["nbval-ignore-output"]
curve = lambda arm, n=32: (list(range(n)), [mean(arm, f"at {i:02d}") for i in range(n)])
arms = {"untuned": "as it is", "true past": "tuned, true past", "noised past": "tuned, noised past",
        "own past": "tuned, own past"}  # fmt: skip
show.lines({title: curve(arm) for arm, title in arms.items()}, "block", "error of body and ground", "Going on alone")

# %% [markdown]
# A few steps on such scenes help, and the plain ones help most. The model's own blocks, the remedy that the papers trust
# most, make it worse here: asked for the *true* block after a past that went elsewhere, the model learns something in
# between, blurred and slow. (The papers ask for a *likely* block instead, by a critic. That half is left out here.)

# %% [markdown]
# ## A minute
#
# 240 blocks are 960 frames: a minute at 16 frames a second, thirty times the films of training. Scenes come back again and again.

# %% tags=["nbval-ignore-output"]
minute = {"the last three": "240 chunks: window", "looked up, sparse": "240 chunks: sparse"}
tens = lambda arm: [fmean(curve(arm, 240)[1][i : i + 10]) for i in range(0, 240, 10)]
series = {title: ([(i + 0.5) * 2.5 for i in range(24)], tens(arm)) for title, arm in minute.items()}
show.lines(series, "seconds of film", "error of body and ground", "One minute")

# %% [markdown]
# Looking up keeps scenes longer; in the end it reads its own mistakes too. Three films a curve, and they differ a lot.

# %% [markdown]
# And all on one plot: what is read for a frame, and how the film ends (32 blocks).

# %% tags=["nbval-ignore-output"]
points = {title: ([tokens[name]], [mean(f"film: {name}", "error")]) for name, title in read.items()}
show.lines(points, "tokens of the past that a block reads", "error at the end", "What a remembered token is worth")

# %% [markdown]
# ## The papers of this chapter

# %% tags=["nbval-ignore-output"]
asks = {"nbp": "a row of a frame at a time: how much faster than a token at a time, and at what price?",
        "vid-gpt": "a diffusion model that goes on like GPT: what must its attention not see?",
        "art-v": "one frame after another, with a mask for what the last one can't tell?",
        "blockvid": "which of hundreds of old blocks should the next one read?"}
Markdown(papers.listed(asks))

# %% [markdown]
# ## Where next
#
# * [ViD-GPT](papers/vid-gpt.ipynb): what makes keys reusable, and what breaks them.
# * [BlockVid](papers/blockvid.ipynb): look inside the bank, and force a model onto its own mistakes.
# * [05 · Sparse attention](05_sparse_attention.ipynb): leaving out pairs, not blocks.
# * [00 · Start](00_start.ipynb): one clip, from words to frames.
