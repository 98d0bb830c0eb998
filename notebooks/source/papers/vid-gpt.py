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
# # ViD-GPT: the frames so far are the prompt
#
# A clip model makes a long film clip by clip: the last frames of one are the first of the next. They are seen by all others and
# see all others, so at every step of every clip they are computed anew, though they don't change. A language model reads its
# prompt once. What must change so that a video model can?
#
# *Ten minutes, one processor core. A procedure: who sees whom, and what is trained on.* At the end you can
# - say which two things make keys of finished frames reusable, and break each of them;
# - count the work of a film with and without a cache;
# - tell what a long context brings, and when nothing.

# %%
from statistics import fmean

import torch
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

from minivid.block_diffusion import vid_gpt as paper
from minivid.block_diffusion.vid_gpt import Anew, Queue, Shown, ViDGPT
from minivid.core import noise, weights
from minivid.core.model import Cond
from minivid.core.rollout import Plan, rollout
from minivid.lab import claims, measure, play, plots, show

_ = torch.set_num_threads(1)

# %% [markdown]
# ## The picture first
#
# Films A, B, A, B ...: each shot holds for four frames, then the other scene is back. Nine frames are given. A model that sees
# only the last four has no chance to know what the other scene looked like. One whose past reaches further has. (The claim
# below trains and measures these models; a shot is a chunk.) Here is one frame of each shot; two shots are given.

# %% tags=["nbval-ignore-output"]
made, _ = weights.read("vid-gpt.safetensors")
tokenizer = weights.load("tok-f")


@torch.no_grad()
def pixels(latent):
    return tokenizer.decode(latent.float())[0]


rows = {"true": made["true"], "all frames, causal, cached": made["causal"], "all frames, full attention": made["full"],
        "the last 4 frames": made["full, 4"]}  # fmt: skip
FILM = 2  # of 0 to 3; on striped ground, in 0 and 3, all of these small models lose the scene at once
strips = [pixels(x[FILM : FILM + 1])[:, 2::4] for x in rows.values()]
show.clips(strips, list(rows), "Two shots given, then six chunks", fps=2)

# %% [markdown]
# A memory of four frames goes on with what it sees. The others bring the right scene back, a little less of it each time.

# %% [markdown]
# ## You have not read the paper: how would you do it?
#
# Keys and values of finished frames shall be computed once. When is that allowed?
#
# <details><summary>One answer</summary>
#
# When they would come out the same every time. What changes from step to step is the noisy frames and the time. So finished
# frames must not *see* noisy frames, and must not be *told* the time of the others.
#
# </details>
#
# ## The idea
#
# **Causal in time.** Attention within a frame stays as it is. Attention along time, at each place of the picture, looks back
# only.
#
# **Frame as prompt.** Finished frames $z$ stand before the noisy ones, and every frame has a time of its own:
#
# $$[z_1 \dots z_P \mid x_{P+1} \dots x_{P+l}], \qquad t = [0 \dots 0 \mid t \dots t].$$
#
# Only the noisy ones are scored. A mark says which is which, and in training P is drawn from {1, 1 + l, 1 + 2l, ...}, the
# lengths that a film will meet.
#
# **Cache.** A chunk is denoised in K steps that read the kept keys; one pass more, at time 0, writes its own.
#
# Who sees whom along time? **Slide through the chunks of a film; switch the mode.** Grey rows are kept, coloured ones are
# computed.

# %%
L, ROOM = 4, 13


def sees(mode, chunk):
    """The frames in view of the film's chunk, and who sees whom: 0 nobody, 1 kept, 2 computed."""
    frames = torch.arange(max(0, 1 + L * chunk - ROOM), 1 + L * (chunk + 1))
    t = (frames > L * chunk).float()[None]
    number = paper.blocks(t, int(frames[0]), mode)
    mask = torch.ones(len(frames), len(frames)) if number is None else (number[0][None] <= number[0][:, None]).float()
    computed = t[0] > 0 if mode != "full" else torch.ones(len(frames)) > 0
    return frames, mask * torch.where(computed, 2.0, 1.0)[:, None]


# %%
def staircase(chunk, mode):
    frames, mask = sees(mode, chunk)
    new = int((mask == 2).any(1).sum())
    title = f"chunk {chunk}, {mode}: {new} of {len(frames)} frames computed a step"

    def draw(ax):
        colours = ListedColormap(["white", "#BBBBBB", show.PALETTE["blue"]])
        ax.pcolormesh(mask.flip(0), cmap=colours, vmin=0, vmax=2, ec="white", lw=1)
        ax.set(xlabel="frame seen", ylabel="frame", title=title, aspect="equal")
        ax.set_xticks(torch.arange(len(frames)) + 0.5, frames.tolist())
        ax.set_yticks(torch.arange(len(frames)) + 0.5, frames.flip(0).tolist())
        ax.legend([Patch(fc="#BBBBBB"), Patch(fc=show.PALETTE["blue"])], ["kept", "computed"], loc="upper right")

    return plots.figure(draw, (5.0, 4.6), title, title + ".")


# %% tags=["nbval-ignore-output"]
settled = [dict(chunk=2, mode="causal"), dict(chunk=2, mode="partial"), dict(chunk=6, mode="causal")]
play.knobs(staircase, settled=settled, chunk=play.IntRange(0, 9, 2), mode=play.Choice(["causal", "partial", "full"]))

# %% [markdown]
# From chunk 4 on the queue is full: 13 frames are kept, the oldest four leave when four are written. "Partial" lets the frames
# of a chunk see each other; the kept ones still look back only. With "full" all is blue, and nothing can be kept.
#
# ## The package's own source

# %%
show.source(paper.blocks, paper.loss, Queue.close)

# %% [markdown]
# ## Break it
#
# The same chunk at two different times. What happens to the keys of the nine frames before it, in the last layer? (A model of
# random values will do.)

# %%
torch.manual_seed(0)
toy = ViDGPT(d=32, depth=2, heads=2).eval()
with torch.no_grad():
    for p in toy.parameters():
        p.add_(0.1 * torch.randn(p.shape))
nine, chunk = torch.randn(1, 4, 9, 8, 8), torch.randn(1, 4, 4, 8, 8)


@torch.no_grad()
def keys(mode, t, told=0.0):
    """Keys of nine prompt frames in the last layer, with four noisy frames at time t; told: the time that the prompt is given."""
    toy.trunk.mode, seen = mode, []
    hook = toy.trunk.blocks[-1].along.k.register_forward_hook(lambda layer, args, out: seen.append(out[:, :9]))
    toy(torch.cat([nine, chunk], 2), torch.cat([torch.full((1, 9), told), torch.full((1, 4), t)], 1), Cond())
    hook.remove()
    return seen[0]


# %%
for mode in ("causal", "partial", "full"):
    print(f"{mode:8} the prompt's keys change by {(keys(mode, 0.1) - keys(mode, 0.9)).abs().max():.2f}")
print(f"causal, one time for all frames: by {(keys('causal', 0.1, 0.1) - keys('causal', 0.9, 0.9)).abs().max():.2f}")

# %% [markdown]
# Both things are needed: eyes that look back only, and a time of its own for every frame.
#
# ## Predict, then run
#
# Chunks of 4 frames, 20 steps each. Without cache up to 17 frames go through the network at each step. With one, 4 do, and 4
# more once in the end. **Predict** the ratio of the times for the first four chunks, then compare with the count.

# %% tags=["nbval-ignore-output"]
net = ViDGPT().eval()
with torch.no_grad():
    for p in net.parameters():
        p.add_(0.1 * torch.randn(p.shape))
path, plan = noise.flow(), Plan(noise.flow(), noise.table(20, L, 3.0))
x = torch.randn(1, 4, ROOM + L, 8, 8, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def film(cached, chunks=4, write="clean"):
    shown = Shown(net, path, 0.05)
    how = Plan(path, plan.times, write=write) if cached else Plan(path, plan.times, write="none", context=paper.past(ROOM))
    ends = x[:, :, 1 : 1 + L * chunks].split(L, 2)
    told = (shown, how, ends, Cond(), Queue(ROOM)) if cached else (Anew(shown), how, ends, Cond())
    return rollout(*told, first=[x[:, :, :1]]), shown


# %% tags=["nbval-ignore-output"]
(one, kept), (two, anew) = film(True), film(False)
late = film(True, write="same")[0]
print(f"with a cache or computed anew: at most {(one - two).abs().max():.0e} apart;"
      f" with keys of the last denoising step: {(late - two).abs().max():.2f}")  # fmt: skip
print(f"frames through the network: {kept.frames} and {anew.frames}")
faster = measure.ratio(lambda: film(False), lambda: film(True), 5).median
print(f"{anew.frames / kept.frames:.1f} times fewer frames, {faster:.1f} times as fast (four chunks, from the first)")

# %% [markdown]
# ## Exercise
#
# A queue of `room` frames. Which frames does a frame of chunk i see, if all was written chunk by chunk?

# %% tags=["exercise"]


def in_view(frame, room, l=4):
    """Numbers of the frames that `frame` sees; frame 0 came alone, then chunks of l."""
    return list(range(frame + 1))  # not right yet: that is a cache without end


# %% tags=["exercise-check"]
wanted = {3: [0, 1, 2, 3], 12: list(range(4, 13)), 16: list(range(8, 17)), 17: list(range(12, 18))}
for frame, frames in wanted.items():
    if in_view(frame, 5) != frames:
        print(f"Frame {frame}, room 5: {frames} are seen; yours: {in_view(frame, 5)}.")
        print("Not yet.")
        break
else:
    print("Right.")

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def in_view(frame, room, l=4):
#     first = 0 if frame == 0 else 1 + (frame - 1) // l * l  # of its chunk
#     return list(range(max(0, first - room), frame + 1))
# ```
#
# So what is kept of a frame was made in sight of frames that have left since. That is why a rollout whose queue has wrapped is
# not the one that shows the last frames anew: it remembers a little more.
#
# </details>
#
# ## The claim
#
# Six models with the same parameters, steps and clips, three seeds. First the scene that comes back: how far is the body's colour
# off, and how far does the body stand from where it should?

# %% tags=["nbval-ignore-output"]
result = claims.read("vid-gpt")["arms"]
value = lambda arm, metric: result[arm]["values"][metric]
mean = lambda arm, metric: fmean(value(arm, metric))
names = {"causal": "causal, 13 frames", "partial": "partial, 13", "full": "full, 13", "full, 4": "full, the last 4"}
bodies = {name: value(arm, "body") for arm, name in names.items()}
show.bars(bodies, "colour error of the body (a dot a seed)", "B is back", digits=2)

# %% tags=["nbval-ignore-output"]
show.bars({name: value(arm, "astray") for arm, name in names.items()}, "distance from its place, px (a dot a seed)", digits=2)

# %%
for arm in ("causal", "full"):
    print(f"{arm:8}", {f"{room} frames": round(mean(arm, f"body_{room}"), 3) for room in (4, 8, 13)}, "colour error by context")
same, faster, bound, flat = (mean("speed", metric) for metric in ("same", "faster", "bound", "24th over 4th"))
print(f"cache: differs by {same:.0e}; {faster:.1f} times as fast (frames promise {bound:.1f}); 24th chunk over 4th: {flat:.2f}")

# %% [markdown]
# Then ten chunks in a row, and the noise with which the prompt is shown in training (t'). The zigzag has seen A only and goes on
# with it: right in every second chunk, by luck.

# %% tags=["nbval-ignore-output"]
rows = {"no noise": "t' = 0", "causal": "t' = 0.1", "more noise": "t' = 0.25", "full": "full, t' = 0.1",
        "full, 4": "full, the last 4 frames"}  # fmt: skip
curves = {name: (list(range(10)), [mean(arm, f"at {i:02d}") for i in range(10)]) for arm, name in rows.items()}
show.lines(curves, "chunk", "colour error of the body", "Drift")

# %% tags=["nbval-ignore-output"]
names = {"causal": "causal", "partial": "partial", "full": "full", "no noise": "causal, t' = 0",
         "more noise": "causal, t' = 0.25"}  # fmt: skip
errors = {name: value(arm, "mse") for arm, name in names.items()}
show.bars(errors, "error of the noisy chunk (a dot a seed)", "The price of looking back")

# %%
show.verdict("vid-gpt")

# %% [markdown]
# The paper's abstract gives no figures.
#
# ## Where next
#
# - [04 Block diffusion](../04_block_diffusion.ipynb): chunk length, cache and drift on one axis.
# - [BlockVid](blockvid.ipynb): which part of a long past to keep.
# - [The paper](https://arxiv.org/abs/2406.10981).
