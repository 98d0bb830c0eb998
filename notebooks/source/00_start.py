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
# # 00 Start: from an mp4 to a generated clip
#
# A video generator has three parts, and you are about to meet all three: a **tokenizer** that makes a film small, a
# **transformer** that looks at it, and a **process** that turns noise into film, step by step.
#
# *Half an hour.* At the end you can
# - say how many numbers a clip is, and turn it into 80 tokens and back;
# - write a video transformer in thirty lines, train it before your own eyes, and say what its loss means;
# - watch noise turn into the clip that a caption asks for, and use the knob that makes a model listen.
#
# One processor core is enough. Where it says **Predict**, ten seconds of thought are worth more than the answer.

# %%
import tempfile
import time
from itertools import product
from pathlib import Path

import torch
from einops import rearrange
from IPython.display import Markdown
from torch import nn

from minivid import world
from minivid.core import noise, sample, text, weights
from minivid.core.model import Cond, Guided
from minivid.lab import papers, play, show
from minivid.world import judge
from minivid.world.scores import psnr

_ = torch.set_num_threads(1)

# %% [markdown]
# ## 1. Where we start, where we end
#
# First a film that people made: *Big Buck Bunny*, written as an mp4 and read back as any mp4 of yours would be. Below
# it a clip that nobody made. The numbers under the pictures count frames; open **Play** to see both move.

# %%
with tempfile.TemporaryDirectory() as folder:
    file = world.write_video(Path(folder) / "bunny.mp4", world.natural("bunny"), fps=25)
    real = world.read_video(file, size=48, frames=17).clip
made = sample.generate(["a red circle moves left"], seed=1)[0]
titles = ["read from bunny.mp4", "made from noise and the words “a red circle moves left”"]
show.clips([real, made], titles=titles)

# %% [markdown]
# Between these two rows lies the whole notebook. To the computer a clip is a box of numbers with four sides, `c f h
# w`: 3 **c**olours, **f** frames, **h** rows (its height), **w** columns (its width); −1 is dark, +1 is full colour.

# %%
print("c f h w =", tuple(real.shape))
print(f"{real.numel():,} numbers for 17 frames of {real.shape[2]} x {real.shape[3]} pixels")
assert -1 <= real.min() < real.max() <= 1

# %% [markdown]
# ## 2. Fewer numbers: the tokenizer
#
# Most of these numbers are gossip: a pixel says nearly what its neighbour says, and what it said one frame ago. The
# tokenizer is a small network that was trained to keep only the news. Its **encoder** squeezes every tube of 4 frames
# × 4 × 4 pixels into 10 numbers, the *latent*; its **decoder** draws the film again from these alone. The first frame
# gets a group to itself, so that a single picture is a film too: 17 frames become 1 + 4 = 5.
#
# **Predict:** 3 × 17 × 48 × 48 numbers go in. How many come out, and how many times fewer is that?
#
# <details><summary>Answer</summary>
#
# 10 channels × 5 latent frames × 12 × 12 places = 7,200, about 16 times fewer. (A full group does better: 3 · 4 · 4 ·
# 4 / 10 ≈ 19. The lonely first frame spoils the average.)
#
# </details>

# %%
tokenizer = weights.load("tok-v")
with torch.no_grad():
    latent = tokenizer.encode(real[None])[0]
fewer = real.numel() / latent.numel()
print(f"{tuple(latent.shape)}: {latent.numel():,} numbers, {fewer:.0f} times fewer")
assert latent.numel() == 7_200
show.latent(latent[:4], "What the film has become: 4 of its 10 channels")

# %% [markdown]
# No secret code: a latent is a small picture with odd colours, and places stay where they were. Is it enough to draw
# the film again? We count the error in decibels. With $x$ the clip, $\hat x$ what comes back and 2 the distance from
# dark to full,
#
# $$\mathrm{PSNR} = 10 \log_{10} \frac{2^2}{\mathrm{mean}\,(x - \hat x)^2}.$$
#
# Ten decibels more: a squared error ten times smaller. Now bring **a film of your own**. Press the button, and its
# first 17 frames make the same trip as the bunny. (What can't be read is answered with a sentence.)


# %%
@torch.no_grad()
def there_and_back(clip):
    back = tokenizer.decode(tokenizer.encode(clip[None]))[0]
    titles = ["before: the film", f"after: {fewer:.0f} times fewer numbers, {psnr(clip, back):.0f} dB"]
    return show.clips([clip, back], titles=titles, difference=True)


play.upload(there_and_back, real, size=48)

# %% [markdown]
# The third row shows where the two differ: bright is a large error. Outlines and grass suffer, calm surfaces survive.
# From here on the generator lives among latents. It never sees a pixel.
#
# ## 3. Clips with captions
#
# To learn what words mean, a model needs films with captions, and you need somebody who can check its answers. Our
# world is drawn by a program: a *scene* says what there is and how it moves, so picture, caption and truth have one
# source. We take one scene and vary it: four colours times four directions, sixteen films. Here are four of them.

# %%
first = world.draw(seed=0, index=339)
scenes = [
    world.vary(world.vary(first, "colour", value=colour), "motion", value=motion)
    for colour in ("red", "blue", "yellow", "green")
    for motion in ("left", "right", "up", "down")
]
clips, captions = world.batch(scenes, size=32, frames=17), [world.caption(scene) for scene in scenes]
show.clips(list(clips[[0, 5, 10, 15]]), titles=[captions[i] for i in (0, 5, 10, 15)])

# %% [markdown]
# And here is somebody who checks. The **judge** measures colours, outlines and paths in the pixels, by rules and
# without a network. Where it is unsure it says `?` rather than guess.


# %%
def reading(clip):
    """What the judge reads in a clip, in the words of a caption."""

    def say(body):
        verb = "stays" if body.motion == "still" else "moves"
        return " ".join(word or "?" for word in ("a", body.colour, body.shape, verb, body.motion))

    return " and ".join(map(say, judge.read(clip).bodies)) or "nothing"


for i in (0, 5, 10, 15):
    print(f"{captions[i]:28} the judge: {reading(clips[i])}")
assert [reading(clip) for clip in clips] == captions

# %% [markdown]
# ## 4. The transformer, in three small cells
#
# A transformer reads a *list* of vectors. So the latent must become a list, and so must the words.
#
# **Patches to tokens.** Cut each latent frame into patches of 2 × 2 places and write each patch as one row of
# numbers. One line of einops says so, and its mirror image takes it back:


# %%
def to_tokens(x):
    return rearrange(x, "b c f (h p) (w q) -> b (f h w) (c p q)", p=2, q=2)


def to_latent(tokens):
    return rearrange(tokens, "b (f h w) (c p q) -> b c f (h p) (w q)", f=5, h=4, p=2, q=2)


with torch.no_grad():
    latents = tokenizer.encode(clips)
words = text.tokens(captions, length=6)
print("latents ", tuple(latents.shape), "-> tokens", tuple(to_tokens(latents).shape))
print("captions", tuple(words.shape), "  the first:", captions[0], "->", words[0].tolist())
assert torch.equal(to_latent(to_tokens(latents)), latents)

# %% [markdown]
# A clip is now **80 tokens** (5 frames × 4 rows × 4 columns) of 40 numbers (10 channels × 2 × 2). A word is its
# number in a list of words, and 0 fills up. One token is a tube through time; everything else is hidden from it. This
# is token 38:

# %%
tube = torch.zeros(17, 32, 32)
frame, row, column = 38 // 16, 38 // 4 % 4, 38 % 4  # 5 frames of 4 x 4 tokens
tube[4 * frame - 3 : 4 * frame + 1, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = 1
caption = f"Token 38: latent frame {frame}, row {row}, column {column}"
show.mask(tube, over=clips[1], caption=caption, scale=2)

# %% [markdown]
# **Attention.** Half a circle slips through this tube. Where does it come from, where is the rest? The tube must ask
# the others. Every token calls out a *query* $q$, wears a *key* $k$ and offers a *value* $v$, all three linear
# functions of itself. Token $i$ then takes
#
# $$o_i = \sum_j a_{ij}\, v_j, \qquad a_{ij} = \frac{\exp(q_i \cdot k_j / \sqrt{d})}{\sum_m \exp(q_i \cdot k_m / \sqrt{d})}.$$
#
# $a_{ij}$ is the share that $i$ takes from $j$: large where query and key point the same way, and all shares of $i$
# sum to 1. ($d$ is the number of entries of $q$; dividing by its root keeps the exponentials tame.) Four *heads* ask
# four such questions at once. Then each token thinks by itself, in two linear layers, and what it found is *added* to
# what it was.


# %%
class Block(nn.Module):
    def __init__(self, d, heads=4):
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.think = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, 3 * d), nn.GELU(), nn.Linear(3 * d, d))

    def forward(self, x):
        q, k, v = rearrange(self.qkv(self.norm(x)), "b n (j k d) -> j b k n d", j=3, k=self.heads)
        self.shares = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        x = x + self.out(rearrange(self.shares @ v, "b k n d -> b n (k d)"))
        return x + self.think(x)


# %% [markdown]
# **The whole model.** Every token gets a learned tag that says *where* it stands, and the time $t$ (next section) is
# added to all. The words join the list as six more tokens, so that tubes can ask them too. After two blocks the
# *head* turns each video token into a patch again.


# %%
class Mini(nn.Module):
    def __init__(self, d=64, depth=2):
        super().__init__()
        self.patch, self.place = nn.Linear(40, d), nn.Parameter(torch.randn(80, d) / 2)
        self.word = nn.Embedding(text.VOCABULARY, d)
        self.time = nn.Sequential(nn.Linear(1, d), nn.SiLU(), nn.Linear(d, d))
        self.blocks = nn.Sequential(*[Block(d) for _ in range(depth)])
        self.head = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, 40))

    def forward(self, x, t, words):
        tokens = self.patch(to_tokens(x)) + self.place + self.time(t[:, None])[:, None]
        tokens = self.blocks(torch.cat([self.word(words), tokens], 1))
        return to_latent(self.head(tokens[:, -80:]))


_ = torch.manual_seed(0)
mini = Mini()
print(f"{sum(p.numel() for p in mini.parameters()):,} parameters")
print("in", tuple(latents.shape), "  out", tuple(mini(latents, torch.ones(16), words).shape))

# %% [markdown]
# Latent in, latent out, words read on the way. But what should it *say*?
#
# ## 5. Flow matching: learn the way back from noise
#
# Take a clean latent $x_0$, and a latent $\varepsilon$ of pure noise (each number drawn from the normal
# distribution). Mix them:
#
# $$x_t = (1 - t)\, x_0 + t\, \varepsilon, \qquad t \text{ from } 0 \text{ (clean) to } 1 \text{ (noise).}$$
#
# A straight road from film to noise. The bunny walks down it, one frame shown at eight times (drawn by the decoder):

# %%
times = [0.0, 0.1, 0.25, 0.4, 0.55, 0.7, 0.85, 1.0]
eps = torch.randn(latent.shape, generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    road = tokenizer.decode(torch.stack([(1 - t) * latent + t * eps for t in times]))
labels = [f"t = {t:g}" for t in times]
show.strip(road[:, :, -1].transpose(0, 1), "Frame 16 on its way to noise", labels=labels)

# %% [markdown]
# **Predict:** up to which $t$ can *you* still tell the bunny? What do you lose first, its ears or its place?
#
# <details><summary>Answer</summary>
#
# Ears first. A large shape is many numbers that agree with one another; noise agrees with nobody, so it drowns fine
# things first. Walked backwards that means: near $t = 1$ it is decided *what* and *where*, near $t = 0$ *how
# exactly*. You will see this order again in the slider below.
#
# </details>

# %% [markdown]
# Along the road $x_t$ moves with the constant velocity $v = \varepsilon - x_0$ (differentiate the formula by $t$).
# This is what we ask the network: *here is a mixture, its time and a caption: which way does the road run?* Many
# roads cross at one point, so it can't know, only estimate; we punish its squared error. The whole loss is three
# lines:


# %%
def flow_loss(model, x0, words, dice):
    t, eps = torch.rand(len(x0), generator=dice), torch.randn(x0.shape, generator=dice)
    xt = (1 - t).view(-1, 1, 1, 1, 1) * x0 + t.view(-1, 1, 1, 1, 1) * eps
    return (model(xt, t, words) - (eps - x0)).square().mean()


# %% [markdown]
# **Predict:** what is the loss of a model that always answers 0? (Each number of $\varepsilon$ has variance 1, and the
# tokenizer scales its latents so that over all its training films the numbers of $x_0$ have mean 0 and variance 1 too.)
#
# <details><summary>Answer</summary>
#
# $\mathrm{mean}\,(\varepsilon - x_0)^2 = 1 + 1 = 2$ over all films. For our sixteen, which are calmer or wilder than
# the average film, it is $1 + \mathrm{mean}\,x_0^2$: the dashed line in the plot further down.
#
# </details>

# %% [markdown]
# To generate is to walk the road backwards: from noise at $t = 1$, in 20 equal steps against the velocity, to $t =
# 0$.


# %%
@torch.no_grad()
def walk(model, words, x, steps=20):
    """From noise x to a clean latent; also all (t, x, v) on the way."""
    way, times = [], torch.linspace(1, 0, steps + 1)
    for t, s in zip(times[:-1], times[1:], strict=True):
        v = model(x, t.expand(len(x)), words)
        way.append((t, x, v))
        x = x + (s - t) * v  # s - t is negative: backwards along the road
    return x, way


# %% [markdown]
# Now train: 500 steps, each on 16 films drawn from our sixteen. Three times on the way the model has to draw *“a blue
# circle moves right”*, always from the same noise.

# %%
size = tokenizer.latent_shape(17, 32, 32)
history, drawn, dice, began = [], {}, torch.Generator().manual_seed(0), time.process_time()
optimiser = torch.optim.AdamW(mini.parameters(), betas=(0.9, 0.95))
schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-2, total_steps=500, pct_start=0.1)
for step in range(1, 501):
    rows = torch.randint(16, (16,), generator=dice)
    loss = flow_loss(mini, latents[rows], words[rows], dice)
    optimiser.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(mini.parameters(), 1.0)
    optimiser.step(), schedule.step()
    history.append(loss.item())
    if step in (50, 150, 500):
        drawing, _ = walk(mini, words[5:6], sample.start(1, size, seed=1))
        drawn[f"after {step} steps"] = tokenizer.decode(drawing)[0]
print(f"trained for {time.process_time() - began:.0f} s of one core")
show.clips(list(drawn.values()), titles=list(drawn))

# %% [markdown]
# Noise first, then blue, then a circle that goes where it was told. Blurry, but right. This is the loss on the way:

# %%
smooth = [sum(history[i : i + 20]) / 20 for i in range(0, 500, 20)]
zero = (1 + latents.square().mean()).item()
assert smooth[-1] < 0.4 * zero
curves = {"mini model": (range(10, 510, 20), smooth), "always answer 0": ((0, 500), (zero, zero))}
show.lines(curves, "training step", "squared error of the velocity", "The loss (means of 20 steps)")

# %% [markdown]
# Is “right” true of all sixteen? Each caption gets a noise of its own, and we look which of the sixteen films comes
# nearest to what was drawn. And **predict:** it has never met the word *magenta*. What will it draw for “a magenta
# circle moves left”?
#
# <details><summary>Answer</summary>
#
# Something out of the sixteen, but hardly magenta. That word is a row of random numbers that no training step has
# touched, so it means nothing yet. Our model knows its films by heart. To *understand* words it must see more films
# than it can remember.
#
# </details>

# %%
asks = text.tokens([*captions, "a magenta circle moves left"], length=6)
with torch.no_grad():
    drawings = tokenizer.decode(walk(mini, asks, sample.start(17, size, seed=2))[0])
distance = (drawings[:16, None] - clips[None]).square().flatten(2).mean(2)
right = (distance.argmin(1) == torch.arange(16)).sum().item()
print(f"{right} of 16 drawings are nearest to the film that their caption belongs to")
assert right >= 14 and "magenta" not in reading(drawings[16])
show.strip(drawings[16], "The mini model's answer to “a magenta circle moves left”")

# %% [markdown]
# Whom did the tubes ask? For each word, the keenest of our eight heads (two blocks of four): how much of its
# attention does a tube give to that word, on average? (With 86 tokens in the list, a fair share would be 1/86.)

# %% tags=["nbval-ignore-output"]
with torch.no_grad():
    mini(0.5 * latents[5:6] + 0.5 * sample.start(1, size, seed=3), torch.tensor([0.5]), words[5:6])
heads = torch.cat([block.shares[0, :, 6:, :6].mean(1) for block in mini.blocks])  # 8 heads x 6 words
keenest = dict(zip([*captions[5].split(), "(empty)"], heads.amax(0).tolist(), strict=True))
assert min(keenest["blue"], keenest["right"]) > 3 / 86
show.bars(keenest, "share of attention", "What a tube listens to", digits=2)

# %% [markdown]
# Nobody told it which words matter. *Blue* and *right* tell our films apart, and some head gives each of them many
# times its fair share.
#
# ## 6. The same code, trained for longer
#
# The package ships a model of the same recipe: patches, words, attention, this loss. It is wider and deeper, and it
# was shown films of all colours and shapes, small and large, on many backgrounds, alone and in pairs. It goes through
# **our** `walk`, unchanged. One in eight combinations of colour, shape and direction was kept from it: those we ask
# for.

# %%
video, card = weights.load("video"), weights.card("video")["made"]
for name, model, steps in (("ours", mini, len(history)), ("shipped", video, card["steps"])):
    print(f"{name:8}{sum(p.numel() for p in model.parameters()):>10,} parameters,{steps:>6,} steps")


def asked(guidance):
    """The shipped model, called as ours is. (Guidance is what section 8 is about.)"""
    model = Guided(video, guidance)
    return lambda x, t, words: model(x, t, Cond(text=words))


wanted = ["red circle left", "green star down", "yellow square up", "magenta triangle left"]
wanted = [tuple(words.split()) for words in wanted]
assert all(world.held_out(*one) for one in wanted)
asks = [f"a {colour} {shape} moves {motion}" for colour, shape, motion in wanted]
clean, way = walk(asked(2.0), text.tokens(asks), sample.start(4, size, seed=1))

# %% tags=["nbval-ignore-output"]
with torch.no_grad():
    films = tokenizer.decode(clean)
seen = [reading(film) for film in films]
titles = [f"“{said}”; the judge reads: {one}" for said, one in zip(asks, seen, strict=True)]
show.clips(list(films), titles=titles)

# %% [markdown]
# Nobody ever showed it a red circle that moves left, yet it has met *red*, *circle* and *left*, each in other
# company, and it is asked to put them together. (How often that succeeds is counted in section 8.)
#
# ## 7. Watching noise make up its mind
#
# For a long time $x_t$ looks like mere noise. But whoever names a velocity has a clean film in mind: from $x_t = (1 -
# t)\,x_0 + t\,\varepsilon$ and $v = \varepsilon - x_0$ you can tell which.
#
# **Exercise.** Complete `believed`: which clean latent do $x_t$, $t$ and $v$ imply? The cell after it tests you.

# %% tags=["exercise"]


def believed(x, t, v):
    """The clean latent that a mixture x at time t and its velocity v imply."""
    return x  # not right yet: change this line


# %% tags=["exercise-check"]
import torch

dice = torch.Generator().manual_seed(3)
x0, eps = torch.randn(2, 10, 5, 8, 8, generator=dice), torch.randn(2, 10, 5, 8, 8, generator=dice)
yours = {t: believed((1 - t) * x0 + t * eps, t, eps - x0) for t in (0.0, 0.3, 1.0)}
gaps = {t: (guess - x0).abs().max().item() for t, guess in yours.items()}
if max(gaps.values()) > 1e-4:
    print("With the true velocity the clean latent should come out at every t. Your largest errors:")
    print("Not yet:", ", ".join(f"{gap:.1f} at t = {t}" for t, gap in gaps.items()))
else:
    print("Right.")

# %% [markdown]
# <details><summary>Hint</summary>
#
# Write $\varepsilon = v + x_0$ into the first equation. What happens to $(1 - t) + t$?
#
# </details>
# <details><summary>Solution</summary>
#
# $x_t = (1 - t)\,x_0 + t\,(v + x_0) = x_0 + t\,v$, so
#
# ```python
# def believed(x, t, v):
#     return x - t * v
# ```
#
# In words: from where you stand, walk the rest of the road at once.
#
# </details>

# %% [markdown]
# The package has this formula for every kind of road (`noise.Path.clean`); here it is applied to all that `walk`
# kept. **Move the slider**, with the mouse or, once it has the focus, with the arrow keys. Above: $x_t$, what the
# walker holds. Below: the clean film that the model believes in. When do you know the colour? When the direction?
# When the outline?

# %% tags=["nbval-ignore-output"]
path, steps = noise.flow(), [*way, (torch.tensor(0.0), clean, torch.zeros_like(clean))]
with torch.no_grad():
    held = torch.stack([tokenizer.decode(x) for _, x, _ in steps])
    beliefs = torch.stack([tokenizer.decode(path.clean(x, t, v)) for t, x, v in steps])


def draw(step):
    t, seen = steps[step][0].item(), reading(beliefs[step, 0])
    rows = [f"step {step}, t = {t:.2f}: what the walker holds", "the clean film the model believes in"]
    alt = f"After {step} of 20 steps, t = {t:.2f}. In the lower row the judge reads: {seen}."
    return show.clips([held[step, 0], beliefs[step, 0]], titles=rows, alt=alt)


pictures = [draw(step) for step in range(21)]
_ = [picture.png for picture in pictures]  # drawn beforehand, so that the slider doesn't lag
settled = [{"step": 1}, {"step": 6}, {"step": 20}]
play.knobs(lambda step: pictures[step], step=play.IntRange(0, 20, 0), settled=settled)

# %% [markdown]
# At step 0 there is nothing but the caption, and the best estimate is the average of all films that fit it: a blur.
# Every step narrows the choice. Let the judge answer the three questions, for all four films: from which step on is
# it right about the belief, and stays right?

# %% tags=["nbval-ignore-output"]
bodies = [[(seen.bodies or (None,))[0] for seen in judge.read_many(row)] for row in beliefs]


def since(film, name, word):
    """The step from which on the judge reads the right word to the end (21: never)."""
    right = [getattr(row[film], name, None) == word for row in bodies]
    return 21 - next((i for i, ok in enumerate(reversed(right)) if not ok), 21)


names = ("colour", "shape", "motion")
decided = {name: [since(k, name, one[i]) for k, one in enumerate(wanted)] for i, name in enumerate(names)}
label = "right from this step on (a dot a film, the bar their mean; 21 is never)"
show.bars(decided, label, "When is it decided?")

# %% [markdown]
# ## 8. How hard should it listen?
#
# In training one caption in ten was emptied, so the model can also answer when it is told nothing. **Guidance** asks
# twice, with the caption and with an empty one, and exaggerates the difference:
#
# $$v = v_\text{empty} + g\,(v_\text{told} - v_\text{empty}).$$
#
# At $g = 0$ it is deaf, $g = 1$ is the model as it was trained, and beyond that it listens harder than it was taught.
# One caption, one noise, five settings:


# %% tags=["nbval-ignore-output"]
@torch.no_grad()
def listen(guidance):
    said = "a cyan star moves right"
    latent, _ = walk(asked(guidance), text.tokens([said]), sample.start(1, size, seed=4))
    film = tokenizer.decode(latent)[0]
    alt = f"“{said}” with g = {guidance}. The judge reads: {reading(film)}."
    return show.clips([film], titles=[alt], alt=alt)


settled = [{"guidance": 0}, {"guidance": 2}, {"guidance": 8}]
play.knobs(listen, guidance=play.Choice([0, 1, 2, 4, 8]), settled=settled)

# %% [markdown]
# One film proves nothing. So: all twelve combinations that were kept from it, and the judge counts.
#
# **Predict:** how many of the twelve colours does the deaf model ($g = 0$) get right? How many directions?
#
# <details><summary>Answer</summary>
#
# As many as luck gives: there are six colours and four directions (and standing still), so about two of twelve each, or
# fewer, for the judge may also be unsure. It hasn't heard what you want.
#
# </details>

# %% tags=["nbval-ignore-output"]
every = [one for one in product(world.COLOURS, world.SHAPES, world.MOTIONS) if world.held_out(*one)]
told = text.tokens([f"a {colour} {shape} moves {motion}" for colour, shape, motion in every])
begin = sample.start(len(every), size, seed=5)
guidances, counts = (0, 1, 2, 4), {name: [] for name in names}
for g in guidances:
    with torch.no_grad():
        seen = judge.read_many(tokenizer.decode(walk(asked(g), told, begin, steps=10)[0]))
    for i, name in enumerate(names):
        words_seen = [getattr((one.bodies or (None,))[0], name, None) for one in seen]
        counts[name].append(sum(word == one[i] for word, one in zip(words_seen, every, strict=True)))
assert counts["colour"][0] <= 5 < counts["colour"][2]
curves = {name: (guidances, count) for name, count in counts.items()}
show.lines(curves, "guidance g", f"right answers of {len(every)}", "What the judge reads back")

# %% [markdown]
# ## 9. Change one word
#
# The same model, the same noise, and one word of the caption exchanged. Do we get what the word names?

# %% tags=["nbval-ignore-output"]
asks = ["red circle moves left", "blue circle moves left", "red star moves left", "red circle moves down"]
asks = ["a " + said for said in asks]
same = sample.start(1, size, seed=1).expand(4, -1, -1, -1, -1)
with torch.no_grad():
    films = tokenizer.decode(walk(asked(2.0), text.tokens(asks), same)[0])
for said, film in zip(asks, films, strict=True):
    print(f"{said:26} the judge: {reading(film)}")
show.clips(list(films), titles=[f"“{said}”" for said in asks])

# %% [markdown]
# That is a text-to-video model, whole: a tokenizer, a transformer, a road out of noise. What you see in the news has
# the same three parts, many times larger, and a trick for every place where that hurts.
#
# ## 10. Where the tricks are: a map
#
# Every chapter asks one question of the model that you have just met, and answers it with papers, re-measured.

# %%
rows = ["| | chapter | the question | papers |", "|---|---|---|---|"]
for number, (chapter, question) in enumerate(papers.CHAPTERS.items(), 1):
    names = ", ".join(row.name for row in papers.ROWS if row.chapter == chapter)
    rows.append(f"| {number:02d} | {chapter.replace('_', ' ')} | {question} | {names} |")
print(len(papers.ROWS), "papers in", len(papers.CHAPTERS), "chapters")
Markdown("\n".join(rows))

# %% [markdown]
# **Where next?** If you liked the tokenizer, go to 02 and make its numbers fewer still. If you liked the slider, 03
# tells a model more than a caption. If you would rather have a film of a minute than of 17 frames, start at 04. And
# from 05 on it is all about the price.
