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
# # 02 · Tokenizers: how few numbers can a clip be?
#
# A second of film at 32 x 32 pixels is 50,000 numbers, and most of them you could have guessed. Whatever makes videos
# works on something smaller: a **latent** of a few numbers for a block of pixels, or a grid of **codes** from a list.
# What is lost?
#
# **Reading time** about 25 minutes · **runs** in about a minute on one processor core, offline
#
# After it you can
# 1. turn a clip into numbers, into bits and into codes, and say what each step costs in decibels;
# 2. read a rate-distortion plot, and tell a good tokenizer from one that only has more bits;
# 3. see a codebook collapse, and look up what any of its codes stands for.

# %%
from ast import literal_eval
from functools import lru_cache
from statistics import fmean

import torch
from IPython.display import Markdown

from minivid import world
from minivid.claims import simvq as claim
from minivid.core import weights
from minivid.core.baselines import quant
from minivid.core.baselines.vq import VQ
from minivid.core.tokenizer import Tokenizer
from minivid.lab import books, claims, papers, play, plots, show
from minivid.tokenizers.simvq import SimVQ, chase
from minivid.world.clips import natural_crops
from minivid.world.digits import digits
from minivid.world.scores import psnr

_ = torch.set_num_threads(1)

# %% [markdown]
# ## The picture first
#
# Three clips: a drawn scene, a moving digit (no tokenizer here has ever met one), and a film of the real world. Each
# through the two tokenizers that this package ships: `tok-f` looks at every frame by itself, `tok-v` at four frames
# at once.

# %%
clips = {
    "world": world.batch([world.draw(7, i, "base", "held-out") for i in range(16)], 32, 17),
    "digits": torch.stack([digits(7, i, frames=17)[0] for i in range(16)]),
    "film": natural_crops(16, 32, 17, "held-out", seed=7),
}
tokenizers = {name: weights.load(name) for name in ("tok-f", "tok-v")}


def through(name, clip):
    """What is left of clips `b 3 f h w`, and how many numbers it went through."""
    latent = tokenizers[name].encode(clip)
    return tokenizers[name].decode(latent), latent.numel()


# %%
titles, rows = [], []
for kind, clip in clips.items():
    titles.append(f"{kind}: {clip[0].numel():,} numbers"), rows.append(clip[0])
    for name in tokenizers:
        back, numbers = through(name, clip)
        titles.append(f"{name}: {numbers // 16:,} numbers, {psnr(back, clip).mean():.1f} dB"), rows.append(back[0])
show.clips(rows, titles, "Open Play to see them move; decibels are means over 16 clips")

# %% [markdown]
# Twelve and sixteen times fewer, and the drawn world hardly changes. The film does: leaves and façades are not made of
# few things. And a strange world shows what a tokenizer has learnt to expect: the digit moves faster than anything that
# `tok-v` met in training, so it smears where `tok-f` doesn't. Hence every number of this chapter is given for a kind of
# clip.
#
# <details><summary><b>Before you read on:</b> how would you make the numbers fewer, without any training?</summary>
#
# Throw pixels away and paint the holes. Or cut the frame into patches, and keep of each only how much of a few
# *typical* patches it contains: principal components, the best that any linear map can do. Our tokenizers begin
# training as exactly that.
# </details>
#
# ## What a network adds to the linear map
#
# A fresh tokenizer, set to the principal components of some clips, never trained, against the trained one with as
# many numbers:


# %%
def resized(clip, scale):
    """Frames smaller (averages) or larger (smooth curves through them)."""
    how = {"mode": "area"} if scale < 1 else {"mode": "bicubic"}
    frames = torch.nn.functional.interpolate(clip.transpose(1, 2).flatten(0, 1), scale_factor=scale, **how).clamp(-1, 1)
    return frames.unflatten(0, (len(clip), -1)).transpose(1, 2)


seen = world.batch([world.draw(8, i, "base") for i in range(128)], 32, 17)
both = torch.cat([seen[:96], natural_crops(96, 32, 17, "train", seed=8)])
gains = {}
for kind, clip in clips.items():
    gains[f"{kind}: 16x fewer pixels"] = psnr(resized(resized(clip, 0.25), 4), clip).tolist()
    linear = Tokenizer(10, 4)
    linear.begin(both)
    gains[f"{kind}: linear, 10 for 192"] = psnr(linear.decode(linear.features(clip).detach()), clip).tolist()
    gains[f"{kind}: tok-v, 10 for 192"] = psnr(through("tok-v", clip)[0], clip).tolist()
show.bars(gains, "PSNR, dB (a dot a clip)", "The same count of numbers, made in three ways")

# %% [markdown]
# ## Numbers are not bits
#
# "Sixteen times fewer numbers" is a promise about memory only when you say how long a number is. Round each channel
# of the latent to $2^b$ levels between its least and its greatest value, pack the codes, and count bytes.


# %%
def spent(tokenizer, clip, bits):
    """Bits a pixel, as packed, and the clip that comes back."""
    latent = tokenizer.encode(clip)
    grid = quant.minmax(latent, bits, (0, 2, 3, 4))
    codes = quant.quantise(latent, grid)
    back = tokenizer.decode(quant.dequantise(codes, grid)).detach()
    return 8 * quant.pack(codes, bits).numel() / clip[:, 0].numel(), back


def rounded(bits):
    lines, names = [], []
    for kind in ("world", "film"):
        rate, back = spent(tokenizers["tok-v"], clips[kind], bits)
        lines.append(back[0]), names.append(f"{kind}: {rate:.2f} bits a pixel, {psnr(back, clips[kind]).mean():.1f} dB")
    return show.clips(lines, names, f"{bits} bits a number")


play.knobs(rounded, bits=play.IntRange(1, 8, 3), settled=[{"bits": 8}, {"bits": 4}, {"bits": 2}])

# %% [markdown]
# A pixel on a screen has 24 bits. Around 4 bits a number nothing is visibly lost, and these clips are down to less
# than one bit a pixel. Below that, the error of rounding is all you see.
#
# ## Codes from a list
#
# Why round every number by itself? Take the whole vector of a cell and say which of K vectors of a **codebook** is
# nearest: $\log_2 K$ bits for all its numbers together. The list is learnt with the tokenizer, and here the trouble
# begins: a code that no vector is near to is never corrected, and the vectors move. Left, 64 codes learn one by one
# to follow a cloud that walks off; right, through one shared layer. Crosses are codes that nobody uses.


# %%
def cloud(i, far=4):
    """A slanted cloud `n 2` that walks away in the first 200 steps."""
    x = torch.randn(500, 2, generator=torch.Generator().manual_seed(0)) @ torch.tensor([[0.9, 0.35], [-0.15, 0.38]])
    return x + torch.tensor([1.0, 0.5]) * far * min(1, i / 200)


def walk(part):
    return [look for look in chase(part, cloud, 500, lr=1e-2) if look.step % 25 == 0]


books.picture({"plain VQ": walk(VQ(64, 2)), "SimVQ": walk(SimVQ(64, 2))}, film=True)

# %% [markdown]
# That shared layer is **SimVQ**. Why it helps, when it doesn't, and which simpler rescues do better, stand in [its
# lesson](papers/simvq.ipynb).
#
# ## A codebook under the microscope
#
# Two small tokenizers learn for 150 steps in front of you, one with plain VQ and one with SimVQ: 8 x 8 codes for a
# frame of 32 x 32. Choose a codebook and a rank (1 is the code that is used most). You see where that code stands in
# the order of use, patches of held-out frames that it stands for, and what the decoder draws when all cells say
# nothing but this code.

# %%
frames, unseen = (claim.frames(split, fast=False) for split in ("train", "held-out"))
kinds = {"plain VQ, 1024": VQ(1024, 32), "SimVQ, 1024": SimVQ(1024, 32), "plain VQ, 64": VQ(64, 32), "SimVQ, 64": SimVQ(64, 32)}


@lru_cache(None)
@torch.no_grad()
def studied(name):
    """The tokenizer, the codes `n 8 8` of the held-out frames, and all codes in the order of their use, with counts."""
    torch.manual_seed(0)
    tok = Tokenizer(32, 1, (32, 64), (1, 2), bottleneck=kinds[name], noise=0.0)
    with torch.enable_grad():
        claim.train(tok, frames, 150, seed=0)
    index = tok.eval().bottleneck(tok.features(unseen))[1][0].index[:, 0]
    count = index.flatten().bincount(minlength=tok.bottleneck.size)
    return tok, index, count.argsort(descending=True, stable=True), count.sort(descending=True)[0]


# %%
def patches(index, code, most=24):
    """Up to `most` patches `k 3 12 12` around cells that this code stands for, spread over the frames."""
    places = (index == code).nonzero()
    places = places[:: max(1, len(places) // most)][:most]
    wide = torch.nn.functional.pad(unseen[:, :, 0], (4, 4, 4, 4), mode="replicate")
    return torch.stack([wide[n, :, 4 * i : 4 * i + 12, 4 * j : 4 * j + 12] for n, i, j in places.tolist()])


def sheet(tiles, columns=8):
    """Tiles `k 3 h w` as one picture `h w 3` in [0, 1], three rows of `columns`; empty places are white."""
    page = torch.ones(3 * columns, 3, 14, 14)
    page[: len(tiles), :, 1:-1, 1:-1] = (tiles + 1) / 2
    return page.view(3, columns, 3, 14, 14).permute(0, 3, 1, 4, 2).reshape(3 * 14, columns * 14, 3).numpy()


# %%
def microscope(book, rank):
    tok, index, order, count = studied(book)
    alive, code = int((count > 0).sum()), order[rank - 1]
    said = f"code {int(code)} stands for {int(count[rank - 1])} patches"
    alone = tok.bottleneck.table[code].detach().view(1, 32, 1, 1, 1).expand(1, 32, 1, 8, 8)
    own = tok.decode(alone).detach()[0, :, 0, 10:22, 10:22]

    def draw(axes):
        axes[0].plot(range(1, alive + 1), count[:alive])
        axes[0].plot(rank, max(int(count[rank - 1]), 1), "o", color="#D55E00")
        axes[0].set(yscale="log", xlabel="rank", ylabel="cells in 1,024 frames", title=f"{alive} of {len(count)} in use")
        tiles = patches(index, code) if count[rank - 1] else torch.empty(0, 3, 12, 12)
        axes[1].imshow(sheet(tiles), interpolation="nearest"), axes[1].set_title(said)
        axes[2].imshow((own.permute(1, 2, 0) + 1) / 2, interpolation="nearest"), axes[2].set_title("drawn from it alone")
        axes[1].set_axis_off(), axes[2].set_axis_off()

    alt = f"{book}, rank {rank}: {said}; {alive} of {len(count)} codes in use."
    return plots.figure(draw, (8.2, 2.6), f"microscope {book} {rank}", alt, (1, 3))


# %%
settled = [{"book": "plain VQ, 1024", "rank": 1}, {"book": "SimVQ, 1024", "rank": 1}, {"book": "SimVQ, 1024", "rank": 60}]
play.knobs(microscope, settled=settled, book=play.Choice(list(kinds)), rank=play.IntRange(1, 64, 1))

# %% [markdown]
# Try rank 60 of *plain VQ, 1024*: few codes do all the work, and everything that they stand for must look alike. A large book is
# worth its bits only when it is used, and used evenly: after 2,000 steps plain VQ has caught up and passed SimVQ (below).
#
# ## All of them on one plot
#
# To the right: more bits. Up: less lost. Single frames, half of the drawn world and half of film; `tok-f` and `tok-v`
# are rounded as above (`tok-v` on clips of 17 frames, so it may use time; the others may not), codebooks come from
# the [claim](../minivid/claims/simvq.json) of SimVQ, means of three seeds. "Pixels" are averages of 2 x 2, rounded.

# %%
def rounded_pixels(clip, bits):
    small = resized(clip, 0.5)
    grid = quant.minmax(small, bits)
    rate = 8 * quant.pack(quant.quantise(small, grid), bits).numel() / clip[:, 0].numel()
    return rate, resized(quant.fake_quantise(small, grid), 2)


result, some, both = claims.read("simvq"), unseen[::8], torch.cat([clips["world"], clips["film"]])
points = {
    "tok-v": [(spent(tokenizers["tok-v"], both, bits), both) for bits in range(1, 7)],
    "tok-f": [(spent(tokenizers["tok-f"], some, bits), some) for bits in range(1, 7)],
    "pixels": [(rounded_pixels(some, bits), some) for bits in range(1, 7)],
}
curves = {}
for name, each in points.items():
    curves[name] = [rate for (rate, _), _ in each], [psnr(back, clip).mean().item() for (_, back), clip in each]
for how, name in (("vq", "plain VQ"), ("simvq", "SimVQ"), ("restart", "means + restart")):
    arms = [result["arms"][f"{how}, {k}"]["values"] for k in claim.SIZES]
    curves[name] = [fmean(arm["bits"]) for arm in arms], [fmean(arm["psnr"]) for arm in arms]
show.lines(curves, "bits a pixel, as stored", "PSNR, dB", "Rate and distortion", log="x")

# %% [markdown]
# Three things to read off. Rounding every number by itself wastes bits: at the rate of the codebooks, a rounded latent is far
# below them. And at equal quality `tok-v` needs a fraction of the bits of all others, because most of a frame was in the frame
# before: that is the case for tokenizers that look along time. Among codebooks, running means with restart are ahead where the
# book is large, and SimVQ is under plain VQ from 256 codes on.
#
# ## Several books at every place
#
# Does a large codebook have to be one? [FQGAN](papers/fqgan.ipynb) gives a place several codes from small books. At equal bits,
# on single frames ([claim](../minivid/claims/fqgan.json); a mean of three seeds):

# %%
books_of = claims.read("fqgan")["arms"]
kinds_of_books = {"one book": "one", "two books": "two", "residual": "residual"}
at = lambda how: [fmean(books_of[f"{how}, {b}"]["values"]["psnr"]) for b in (8, 10, 12)]
curves = {name: ([8, 10, 12], at(how)) for name, how in kinds_of_books.items()}
show.lines(curves, "bits a place", "PSNR, dB", "One book or two?")

# %% [markdown]
# It does no harm, at least: kept alive by running means and restart, one large book beats two small ones, whose heads repeat much
# of what the other says. What small books save is search: 128 distances a place instead of 4,096.

# %% [markdown]
# ## A new tokenizer for an old generator
#
# A generator is worth far more than its tokenizer, and knows no other. Can it be given a finer one? What counts is not only
# what a tokenizer keeps, but whether its latents are of the kind that the generator has learnt. Below, from the
# [claim](../minivid/claims/tvt.json) of [TVT](papers/tvt.ipynb): a frozen denoiser reads latents of 4x tokenizers of one shape.
# 1 is its error on the latents it was trained on; three seeds.

# %%
arms = claims.read("tvt")["arms"]
kinds_of_4x = {"fresh, equal mean and spread": "scratch", "TVT: taught by a frozen decoder": "TVT",
               "told the old latents, then a decoder": "reverse", "told them while it learns": "joint"}  # fmt: skip
show.bars({name: arms[how]["values"]["ratio"] for name, how in kinds_of_4x.items()},
          "error of the denoiser, relative to old latents", "Who lives where the generator lives?")  # fmt: skip

# %% [markdown]
# A latent space is more than its statistics: the fresh tokenizer has the same mean and spread in every channel, and is a
# stranger.
#
# ## Codes in layers
#
# A flat grid says everything equally finely. HiTVideo puts a coarse layer of codes above the fine one and tells the fine layer
# what the coarse one has said. Here at equal bits, from the [claim](../minivid/claims/hitvideo.json): clips of the drawn world on
# plain grounds, tokenizers trained for a minute each, so decibels don't compare with those above. "Top of layers" is the top
# layer alone, decoded by the tokenizer that sometimes lost its bottom in training.

# %%
layered = claims.read("hitvideo")["arms"]
mean = lambda arm, metric: fmean(layered[arm]["values"][metric])
arms = {"layers": [f"layers {k}" for k in (2, 8, 64)], "flat": [f"flat {k}" for k in (5, 20, 161)], "coarser": ["coarse", "wide"]}
curves = {name: tuple([mean(arm, metric) for arm in each] for metric in ("bits", "psnr")) for name, each in arms.items()}
curves["top of layers"] = [256], [mean("layers 8", "psnr_top")]
show.lines(curves, "bits a clip of 9 x 32 x 32", "PSNR, dB", "Layers against one grid")

# %% [markdown]
# Layers are level with a flat grid, and a coarser grid with a large book is ahead of both at low rates. Their use lies elsewhere:
# a decoder that works from the top alone, and a plan that can be written first. The
# [lesson](papers/hitvideo.ipynb) asks which layer decides what is seen.
#
# ## What a latent's shape is worth
#
# Sixty-four tokens of 16 numbers, or 256 of 4? [ViTok](papers/vitok.ipynb) takes two plain transformers, so that tokens,
# channels and depth can be traded at will. Fifteen codes, each trained alike ([claim](../minivid/claims/vitok.json), three
# seeds), over E, all numbers of a clip of 16 x 32 x 32:

# %%
vit = claims.read("vitok")["arms"]["sweep"]["values"]
curves = {}
for q, p in ((8, 8), (4, 8), (2, 8), (4, 4)):
    shapes = [literal_eval(name[5:]) for name in vit if name.startswith(f"psnr ({q}, {p}, ")]
    numbers = [c * (16 // q) * (32 // p) ** 2 for _, _, c in shapes]
    curves[f"{q} frames of {p} x {p}"] = numbers, [fmean(vit[f"psnr {shape}"]) for shape in shapes]
show.lines(curves, "numbers in the code, E", "PSNR, dB", f"A doubling is worth {fmean(vit['slope']):.1f} dB", log="x")

# %% [markdown]
# A code's number of numbers says most about what it can draw, but each kind of tubelet has its curve: few numbers are best in
# few tokens, many in many.
#
# ## The papers of this chapter

# %% tags=["nbval-ignore-output"]
asks = {"simvq": "how do you keep all codes of a large codebook alive, without rules?",
        "fqgan": "is a large codebook better made of several small ones?",
        "hitvideo": "what if codes come in layers, the coarse ones first?",
        "vitok": "what limits a tokenizer: its size, its encoder or its decoder, or the bottleneck alone?",
        "tvt": "can a trained generator keep its weights and get a finer tokenizer?"}
Markdown(papers.listed(asks))

# %% [markdown]
# ## Where next
#
# * [SimVQ](papers/simvq.ipynb): the lesson on what you have just seen.
# * [TVT](papers/tvt.ipynb): two latent spaces, and what it takes to be read by both.
# * [00 · Start](00_start.ipynb): a generator at work on the latents of `tok-v`.
