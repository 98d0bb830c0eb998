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
# # VidKV: keep the past in one or two bits a number
#
# A model that looks back keeps keys and values of all it has seen. For a video that is most of its memory, and says much the same
# again and again. How few bits are enough?
#
# *Ten minutes, one processor core. A part: a cache, given to a trained model.* At the end you can
# - store a number in 1, 1.6 or 2 bits, and say what its scale costs besides;
# - say which error a sign makes, and when a Fourier transform helps it;
# - tell what survives in a model that reads its own past over and over.

# %%
from dataclasses import replace

import torch

from minivid import world
from minivid.core import sample, text, weights
from minivid.core.cache import Cache
from minivid.core.model import Cond
from minivid.core.rollout import remember
from minivid.lab import claims, play, plots, show
from minivid.sparse_attention import vidkv as paper
from minivid.sparse_attention.vidkv import Scheme, Setting, VidKV
from minivid.world import questions
from minivid.world.scores import psnr, sharpness

_ = torch.set_num_threads(1)

# %% [markdown]
# ## The picture first
#
# One true chunk of four frames, then five that `block` makes from the same noise, reading its cache. Each row holds its past in
# another way; the title says in how many bits a number, *everything counted*.

# %% tags=["nbval-ignore-output"]
model, tokenizer = weights.load("block"), weights.load("tok-f")
scene = world.draw(7000, 1, "recurrent", "held-out")
shot = scene.cuts[0].shot
captions = [world.chunk_caption(shot, 4 * i) for i in range(8)]  # of the films, the first six
truth = tokenizer.encode(world.render(shot, 32, 32)[None])


def film(cache):
    """The first chunk and those that follow, through a cache; and the bits that it held in the end."""
    latent = sample.film([captions[:6]], truth[:, :, :4], cache, 0, 6, model=model)
    numbers = 2 * 6 * 2 * cache.tokens * 128  # keys and values, layers, told or not (guidance), channels
    with torch.no_grad():
        return tokenizer.decode(latent)[0], 8 * cache.nbytes / numbers


# %% tags=["nbval-ignore-output"]
few = Setting(hot=Scheme(size=64), cold=Scheme("sign", size=64, mix="fft"), rest=Scheme("ternary", size=64))
channel, token = Scheme(size=128), Scheme(size=128, by="token")
ways = {"in fp16": Setting(residual=10**6), "1.5-bit keys, 1.58-bit values": few,
        "2 bits, a scale a channel, keys before they are turned": Setting(k=1, p=1, hot=channel, safe=channel, rotated=False),
        "2 bits, a scale a token": Setting(k=1, p=1, hot=token, safe=token)}  # fmt: skip
films = {name: film(VidKV(setting)) for name, setting in ways.items()}
titles = [f"{name}: {bits:.2f} bits" for name, (_, bits) in films.items()]
show.clips([clip for clip, _ in films.values()], titles, f"“{captions[0]}”, at the end “{captions[5]}”")

# %% [markdown]
# ## You have not read the paper: how would you do it?
#
# Two bits are four values. Which four, and for which numbers?
#
# <details><summary>One answer</summary>
#
# From the least to the largest, evenly, for 32 numbers at a time: a scale and an offset for these. The question is which 32.
# Those of one token? Or one channel of 32 tokens?
#
# </details>
#
# ## The naive way: token by token
#
# A token's keys and values arrive together, so text models like to give each token its own scale. Compare (error: lost share of
# the energy, all layers of `block`, on true chunks):

# %%
seen = {rotated: Cache() for rotated in (True, False)}
words = text.tokens(captions)
with torch.no_grad():
    for rotated, cache in seen.items():
        cache.rotated = rotated
        for i in range(8):
            told = Cond(text=words[i : i + 1], start=4.0 * i)
            cache.open(i, told)
            remember(model, truth[:, :, 4 * i : 4 * i + 4], 0.0, told, cache)
            cache.close(i)


# %%
def held(what, layer, rotated=True):
    return torch.cat([getattr(entry, what) for entry in seen[rotated].kept[layer]], 2)


def error(scheme, x):
    return float((scheme.pack(x).values() - x).square().sum() / x.square().sum())


over = lambda scheme, what: [error(scheme, held(what, layer)) for layer in range(6)]
show.bars({f"{name}, 2 bits a {by}": over(Scheme(by=by), what) for name, what in (("keys", "k"), ("values", "v"))
           for by in ("token", "channel")}, "relative error (a dot a layer)", digits=2)  # fmt: skip

# %% [markdown]
# Look at the keys and you see why. Rows are channels (four heads of 32), columns are every fourth token of eight chunks.


# %%
def surface(axes):
    x = held("k", 0)[0, :, ::4]
    flat = paper.waves(x)
    for ax, y, title in zip(axes, (x, flat), ("keys", "each token Fourier-transformed"), strict=True):
        image = ax.imshow(y.mT.flatten(0, 1).abs(), aspect="auto", cmap="cividis", vmax=8, interpolation="nearest")
        ax.set(xlabel="every fourth token", ylabel="channel", title=title)
    axes[0].figure.colorbar(image, ax=axes, label="size of the number")


alt = "Sizes of the keys of the first layer: a few bright rows; transformed, other rows."
plots.figure(surface, (6.4, 2.7), "key surface", alt, (1, 2))

# %% [markdown]
# Rows: a channel is large or small in *all* tokens (two rows of a head trade places, slowly: the rotary turn). A scale for a
# channel fits; a scale for a token fits nobody. The transform spreads a bright row over the 32 of its head.
#
# ## The idea
#
# **Keys.** Take the range $R_d$ of each channel. The share $k$ of channels with the largest get 2 bits. Of the others only the
# sign is kept, $x' = \pm s$ with $s = \mathrm{mean}|x|$, after a Fourier transform over the token's channels.
#
# **Values.** Three codes, $-s, 0, s$, with 0 for $|v| \le 0.7\,s$; five of them fit in a byte ($3^5 = 243$). Tokens that
# matter to the question may keep 2 bits.
#
# How wrong is a sign? Exactly this much, whatever the data:
#
# $$\frac{\mathrm E(x - x')^2}{\mathrm E x^2} = 1 - \frac{(\mathrm E|x|)^2}{\mathrm E x^2}$$
#
# 0.25 for uniform numbers, 0.36 for normal ones, 0.5 for Laplace's. A transform makes everything look normal: it helps what has
# heavy tails, and nothing else.

# %%
dice = torch.Generator().manual_seed(0)
u = torch.rand(1, 4, 2048, 32, generator=dice) * 2 - 1
data = {"uniform": u, "normal": torch.randn(u.shape, generator=dice), "Laplace": -u.sign() * u.abs().log()}
data["normal + b"] = data["normal"] + 3 * torch.randn(1, 4, 1, 32, generator=dice)  # each channel has its own offset b
signs = {"sign": Scheme("sign"), "sign of waves": Scheme("sign", mix="fft"), "centred sign": Scheme("sign", centred=True)}
for name, x in data.items():
    print(f"{name:11}", {how: round(error(scheme, x), 2) for how, scheme in signs.items()})

# %% [markdown]
# The last line is the one to remember: if a channel has an *offset*, take it out first (*centred*: $m \pm s$).
#
# ## The package's own source

# %%
show.source(Scheme.coded, paper.waves, VidKV.close)

# %% [markdown]
# ## Every bit counted
#
# A scale in fp16 for 32 numbers is half a bit each, an offset another half:

# %%
kinds = {"2 bits": Scheme(), "sign": Scheme("sign"), "centred sign": Scheme("sign", centred=True), "ternary": Scheme("ternary")}
for name, scheme in kinds.items():
    sizes = [8 * replace(scheme, size=n).pack(held("v", 0)).nbytes / held("v", 0).numel() for n in (32, 128)]
    print(f"{name:13} in groups of 32: {sizes[0]:.2f} bits, of 128: {sizes[1]:.2f}")

# %% [markdown]
# So the paper's "1.5 / 1.58 bits" are 2.25 and 2.1, and plain 2 bits in groups of 128 cost as much.
#
# ## Five ways to keep one bit
#
# Choose a layer and $k$; bars are the error of the *normal* channels' keys. Where do the two transforms help? What if keys are
# kept before the rotary turn (*turned* off)?

# %% tags=["nbval-ignore-output"]
ones = {"least and largest": Scheme(bits=1), "sign": Scheme("sign"), "sign of waves": Scheme("sign", mix="fft"),
        "sign after Hadamard": Scheme("sign", mix="hadamard"),
        "centred sign, groups of 64": Scheme("sign", centred=True, size=64)}  # fmt: skip


def normal(layer, k, turned):
    x = held("k", layer, turned)
    hot = paper.channels(x, k)[0]
    rest, bits = x[..., ~hot], {name: f"{name} ({s.true:.1f} bits)" for name, s in ones.items()}
    found = {bits[name]: error(scheme, rest) for name, scheme in ones.items()}
    return show.bars(found, "relative error", f"layer {layer}, the {len(hot) - hot.sum()} channels of least range", digits=2)


settled = [dict(layer=layer, k=0.5, turned=turned) for layer, turned in ((0, True), (3, True), (3, False))]
play.knobs(normal, settled=settled, layer=play.IntRange(0, 5, 0), k=play.Choice([0.5, 0.25, 0.75]),
           turned=play.Choice([True, False]))  # fmt: skip

# %% [markdown]
# Keys have offsets, the same in every token; the turn makes some of them swing. The transforms win a little here and lose a
# little there. Centred signs, at no more bits, are the rival that the paper didn't have. But beware: a mistake that is the same
# in *all* keys adds the same to all scores, and the softmax doesn't see it. What counts is the error of the attention, below.
#
# ## Which tokens matter to a question?
#
# Now another model: `qa` watches 16 frames, 1,024 visual tokens, and then answers a question. VidKV protects the fifth of the
# tokens whose *embeddings* agree most with those of the question's words. Choose a question: outlined is what is protected, in
# every fourth frame.

# %% tags=["nbval-ignore-output"]
qa, asked_of = weights.load("qa"), world.draw(8000, 3, "many", "held-out")
clip = world.render(asked_of, 32, 16)
pairs = [questions.ask(asked_of, i) for i in range(12)]
pairs = dict(list(dict(pairs).items())[:4])
with torch.no_grad():
    visual = qa.see(clip[None])[0]


def protected(question):
    said = text.tokens([question], 8)
    on = paper.most(paper.relevance(visual, qa.word(said), said > 0), 192)[0].view(16, 8, 8)
    area = on.float().repeat_interleave(4, 1).repeat_interleave(4, 2)
    return show.mask(area[::4], clip[:, ::4], f"answer: {pairs[question]}", scale=3)


three = [dict(question=question) for question in list(pairs)[:3]]
play.knobs(protected, settled=three, question=play.Choice(list(pairs)))

# %% [markdown]
# These products mean something: `qa`'s eye was taught to make patches agree with the words for their body's colour and shape,
# as large models' eyes are by training. But of the question's words only one or two name what can be seen.
#
# ## The knobs of the paper: k and p
#
# Six clips, a question each. How far off are the scores of the answers (share of their energy), and what does the cache cost?
# Grey are other settings; yours is the large dot.

# %%
scenes = [world.draw(8000, i, "many", "held-out") for i in range(6)]
watched, ask = Cache(), text.tokens([questions.ask(s)[0] for s in scenes], 8)
watched.rotated = True
with torch.no_grad():
    clips = world.batch(scenes, 32, 16)
    qa.watch(clips, watched)
    full = qa.answer(ask, watched)
    relevant = paper.relevance(qa.see(clips)[0], qa.word(ask), ask > 0)


def point(k, p):
    """True bits, and the error of the answers' scores."""
    cache = VidKV(Setting(k=k, p=p), relevant)
    cache.open(0, Cond())
    for layer, (e,) in watched.kept.items():
        cache.add(layer, e.k, e.k, e.v, e.where)
    cache.close(0)
    with torch.no_grad():
        wrong = (qa.answer(ask, cache) - full).square().sum() / full.square().sum()
    return 8 * cache.nbytes / (2 * 3 * 6 * 1024 * 96), wrong.item()


# %% tags=["nbval-ignore-output"]
points = {(k, p): point(k, p) for k in (0.0, 0.25, 0.5, 0.75, 1.0) for p in (0.0, 0.2, 1.0)}


def cost(k, p):
    def draw(ax):
        for other, look in ((0.0, "o-"), (0.2, "s--"), (1.0, "D:")):
            line = [points[share, other] for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
            ax.plot(*zip(*line, strict=True), look, color="#999999", ms=4)
            ax.annotate(f"p = {other:g}", points[0.0, other], (-6, 0), textcoords="offset points", va="center", ha="right")
        ax.plot(*points[k, p], "o", ms=11, color=show.PALETTE["blue"])
        ax.margins(x=0.15)
        ax.set(xlabel="bits a number, everything counted", ylabel="error of the scores", yscale="log", title=f"k = {k}, p = {p}")

    alt = "k {}, p {}: {:.2f} bits, error {:.3f}.".format(k, p, *points[k, p])
    return plots.figure(draw, (5.2, 2.5), f"k {k}, p {p}", alt)


settled = [dict(k=0.0, p=0.0), dict(k=0.5, p=0.2), dict(k=1.0, p=1.0)]
play.knobs(cost, settled=settled, k=play.Choice([0.5, 0.0, 0.25, 0.75, 1.0]), p=play.Choice([0.0, 0.2, 1.0]))

# %% [markdown]
# ## Predict, then run
#
# Back to the film. Spare the keys (8 bits) and give values 1.58 bits; or spare the values and give keys 1.5. One film goes
# another way than that in fp16, the other fades. **Predict** which.

# %% tags=["nbval-ignore-output"]
fine = Scheme(bits=8)
spared = {"values in 1.58 bits": Setting(hot=fine, cold=fine), "keys in 1.5 bits": Setting(safe=fine, rest=fine)}
true, _ = films["in fp16"]
for name, setting in spared.items():
    mine, _ = film(VidKV(setting))
    edges = sharpness(mine[:, 16:]) / sharpness(true[:, 16:])
    print(f"{name:20} {psnr(mine, true):.1f} dB to the film in fp16, {100 * edges:.0f} % of its edges in the second half")

# %% [markdown]
# Keys say where to look, values what is seen. And a chunk is made from the past as it was kept, and kept in turn: errors come
# back. A ternary scale that is the mean of all sizes is too small, so every chunk is a little paler than the one before it. A
# question is asked once; a film asks itself again and again.
#
# ## Exercise
#
# The paper's ternary scale is the mean of *all* sizes. Give the best one for its codes.

# %% tags=["exercise"]


def ternary(x, gamma=0.7):
    """x: numbers of one group. Returns codes -1, 0, 1 and the scale with the least squared error."""
    s = x.abs().mean()
    codes = (x.abs() > gamma * s) * x.sign()
    return codes, s  # not right yet: the codes are, the scale isn't


# %% tags=["exercise-check"]
import torch

x = torch.randn(4096, generator=torch.Generator().manual_seed(0))
codes, s = ternary(x)
lost = float((codes * s - x).square().mean() / x.square().mean())
if sorted(codes.unique().tolist()) == [-1, 0, 1] and lost < 0.2:
    print("Right.")
else:
    print(f"Your scale loses {lost:.3f} of the energy. Which s makes (s code - x)^2 least? Set the derivative to zero.")
    print("Not yet.")

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def ternary(x, gamma=0.7):
#     codes = (x.abs() > gamma * x.abs().mean()) * x.sign()
#     return codes, (codes * x).sum() / codes.abs().sum()
# ```
#
# The mean size of those that aren't 0: a third less error, at no cost.
#
# </details>
#
# ## The law of limits
#
# A residual longer than the film packs nothing. And attention over ternary values is additions:

# %%
a, v = torch.rand(1, 4, 512, generator=dice).softmax(-1), Scheme("ternary").pack(held("v", 2))
assert torch.allclose(paper.by_additions(a, v), torch.einsum("bgn,bgnd->bgd", a, v.values()), atol=1e-5)
short = films["in fp16"][0] - film(Cache())[0]
print("fp16 against float32:", "the same film" if short.abs().max() < 0.1 else "another film")

# %% [markdown]
# ## The claim
#
# First questions: three seeds of other clips. Which channels, which bit, which axis?

# %% tags=["nbval-ignore-output"]
result = claims.read("vidkv")
value = lambda arm, metric: result["arms"][arm]["values"][metric]
mean = lambda arm, metric: sum(value(arm, metric)) / len(value(arm, metric))
names = [f"keys: 0.5 by {how}" for how in ("range", "variance", "outliers", "random")]
names += [f"one bit: {one}" for one in ("minmax", "sign", "fft", "hadamard", "centred, groups of 64")]
names += [f"values: {bits} a {by}" for bits in ("2", "1.58") for by in ("channel", "token")]
show.bars({name: value(f"block, {name}", "error") for name in names}, "error of attention in `block` (a dot a seed)", digits=2)

# %% tags=["nbval-ignore-output"]
show.bars({name: value(name, "error") for name in names}, "error of attention in `qa` (a dot a seed)", digits=2)

# %% tags=["nbval-ignore-output"]
table = ("2/2", "1.5/2", "1.5/1.66", "1.5/1.58", "1.25/1.58", "ours")
table += tuple(f"{name}, equal bits" for name in ("2/2", "KIVI 2/2", "uniform 2/2"))
rows = {"fp16": value("fp16", "right")} | {f"{name}: {mean(name, 'bits'):.2f} bits": value(name, "right") for name in table}
show.bars(rows, "share of right answers of `qa` (a dot a seed)", "Keys / values, bits of a code, and of everything")

# %% [markdown]
# And films, six a seed, 19 chunks after one. Beside the paper's cache one of ours at fewer bits: centred signs, keys before they
# are turned, values in 2 bits, groups of 256.

# %% tags=["nbval-ignore-output"]
kept = ("fp16", "1.5/1.58", "1.5/1.58, groups of 64", "KIVI 2/2", "uniform 2/2", "2/2, before", "ours")
rows = {f"{name}: {mean(f'roll: {name}', 'bits'):.2f} bits": value(f"roll: {name}", "judge") for name in kept}
show.bars(rows, "judge: right colour, shape, size, count", "Films that read their own past", digits=2)

# %% tags=["nbval-ignore-output"]
curve = lambda name: (list(range(20)), [mean(f"roll: {name}", f"at {i:02d}") for i in range(20)])
show.lines({name: curve(name) for name in kept if name != "1.5/1.58"}, "chunk", "colour error of body and ground", "Drift")

# %% [markdown]
# Where the scales sit shows in the film: a scale a token (uniform) draws other bodies, ternary values fade, keys packed after
# their rotary turn lose shapes. Packed before it, two bits and centred signs stay beside fp16.

# %%
show.verdict("vidkv")

# %% [markdown]
# The authors report, on LLaVA-OneVision with 7 billion parameters, 49.05 on TempCompass in 16 bits, 50.45 with 1.5/2, 47.35 with
# 1.5/1.58 bits, and 47.55 with a fifth of the values protected.
#
# ## Where next
#
# - [05 Sparse attention](../05_sparse_attention.ipynb): read less of the past, instead of keeping it in fewer bits.
# - [06 Quantization](../06_quantization.ipynb): few bits for weights.
# - [The paper](https://arxiv.org/abs/2503.16257).
