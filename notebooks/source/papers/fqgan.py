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
# # FQGAN: several small codebooks in place of a large one
#
# A place of the picture gets one of K codes. The more codes, the better the picture, and the harder it is to keep them all in use
# and to search them. FQGAN gives every place *several* codes from small books: two books of 64 say 4,096 things.
#
# *Ten minutes, one processor core. A part: a bottleneck.* At the end you can
# - count what a product of books costs, and what it can't say;
# - keep two heads from saying the same, and show which weights learn from that;
# - tell when small books are worth it, and when one large one is as good.

# %%
from functools import lru_cache
from statistics import fmean

import torch
import torch.nn.functional as F

from minivid.core import corpus, weights
from minivid.core.baselines.vq import VQ, kmeans, nearest
from minivid.lab import claims, play, plots, show
from minivid.tokenizers import fqgan as paper
from minivid.tokenizers.fqgan import Factorised

_ = torch.set_num_threads(1)

# %% [markdown]
# ## The picture first
#
# Held-out frames through four tokenizers, all with 12 bits for each of 8 x 8 places: a book of 4,096 codes; two books of 64; two
# of 64 where the second says what the first leaves over (*residual*); three of 16.

# %% tags=["nbval-ignore-output"]
drawn, _ = weights.read("fqgan.safetensors")
result = claims.read("fqgan")["arms"]
value = lambda arm, metric: result[arm]["values"][metric]
mean = lambda arm, metric: fmean(value(arm, metric))
film = lambda name: corpus.clip_of(drawn[name].transpose(0, 1)[None])[0]
names = {"one, 12": "one book of 4,096", "two, 12": "two books of 64", "residual, 12": "residual, 64 and 64",
         "three, 12": "three books of 16"}  # fmt: skip
titles = [f"{name}: {mean(arm, 'psnr'):.1f} dB, {100 * mean(arm, 'usage'):.0f} % of codes in use" for arm, name in names.items()]
show.clips([film(name) for name in ("true", *names)], ["true", *titles])

# %% [markdown]
# ## You have not read the paper: how would you do it?
#
# Twelve bits a place. How many tables, and what keeps one from repeating another?
#
# <details><summary>What others do</summary>
#
# Cut a vector into pieces and give each a book (*product quantisation*). Code the remainder again (*residual*). Round each number
# by itself (FSQ: as many books as numbers). All say $K^k$ things with $kK$ entries; they differ in who learns what.
#
# </details>
#
# ## The idea
#
# Each book has its own head, small transformers over the encoder's features $h$, so books need not share a space:
#
# $$z_a = \frac{A_a(h)}{|A_a(h)|},\qquad q_a = \text{nearest of } K \text{ unit vectors},\qquad \hat x = D([q_1; \dots; q_k]).$$
#
# Two terms see to the division of labour. The codes chosen at a place $i$ shall be at right angles, and the codes of some heads
# shall tell what a teacher says of the picture (here: its caption's words), picked out among the batch's:
#
# $$L_{dis} = \lambda\,\frac1n\sum_i \langle q_{a,i}, q_{b,i}\rangle^2,\qquad
# L_{sem} = -\frac1B\sum_i \log\frac{e^{\langle s_i, v_i\rangle}}{\sum_j e^{\langle s_i, v_j\rangle}}.$$

# %%
for heads, k in ((1, 4096), (2, 64), (3, 16)):
    part = Factorised(k=k, heads=heads)
    print(f"{heads} of {k:4}: {part.size} combinations, {heads * k:4} distances a place, {heads * k * 8:5} numbers in the books")

# %% [markdown]
# ## The package's own source

# %%
show.source(Factorised.said, paper.disentangled, paper.entropies)

# %% [markdown]
# ## Turn it yourself: what does a product lose?
#
# Points of four numbers that hang together. One book of $2^b$ centres for all four, or two books of $2^{b/2}$, each for two of
# the numbers. Dashed: on the points that the centres were found with; solid: on new ones. **Turn up how much the halves have in
# common, then take fewer points.**


# %%
@lru_cache(None)
def curves(common, points):
    dice = torch.Generator().manual_seed(0)
    x, shared = torch.randn(points + 4000, 4, generator=dice), torch.randn(points + 4000, 2, generator=dice)
    x = (1 - common) ** 0.5 * x + common**0.5 * torch.cat([shared, shared.flip(1)], 1)
    learnt, new = x.split([points, 4000])
    found = {}
    for name, parts in {"one book": (slice(0, 4),), "two books": (slice(0, 2), slice(2, 4))}.items():
        for b in (4, 6, 8, 10):
            books = [kmeans(learnt[:, part], 2 ** (b // len(parts)), dice)[0] for part in parts]
            for kind, some in (("new", new), ("learnt", learnt)):
                back = torch.cat([book[nearest(some[:, part], book)] for book, part in zip(books, parts, strict=True)], 1)
                found.setdefault((name, kind), []).append((back - some).square().mean().item())
    return found


# %%
def product(common, points):
    def draw(ax):
        for (name, kind), errors in curves(common, points).items():
            colour = show.PALETTE["blue" if name == "one book" else "orange"]
            label = f"{name}, {kind} points"
            ax.plot((4, 6, 8, 10), errors, "-o" if kind == "new" else "--", color=colour, label=label)
        ax.set(xlabel="bits a point", ylabel="squared error", yscale="log", xticks=(4, 6, 8, 10), ylim=(0.005, 0.6))
        ax.set_yticks([0.01, 0.03, 0.1, 0.3], ["0.01", "0.03", "0.1", "0.3"]), ax.minorticks_off()
        ax.legend(loc="lower left")

    alt = "Squared error over bits for one book and for two; the curves cross where points are few and bits are many."
    return plots.figure(draw, (5.6, 3.2), f"{points:,} points, {100 * common:.0f} % in common", alt)


settled = [dict(common=0.0, points=2000), dict(common=0.8, points=8000), dict(common=0.8, points=2000)]
knobs = {"common": play.Choice([0.8, 0.0, 0.4, 0.95]), "points": play.Choice([2000, 1100, 8000])}
play.knobs(product, settled=settled, **knobs)

# %% [markdown]
# A joint book is never worse on the points that it was made for: a product is one of the things that it can be. What a product
# saves is examples. In a network heads may also choose *what* to split, which these halves may not.
#
# ## Predict, then run
#
# Two heads that know nothing of each other choose unit vectors of 8 numbers. **Predict** the mean squared cosine between them.
# And: does $L_{dis}$ move heads, codes, or both?

# %%
dice = torch.Generator().manual_seed(0)
a, b = (F.normalize(torch.randn(100_000, 8, generator=dice), dim=1) for _ in range(2))
print(f"strangers: {(a * b).sum(1).square().mean():.3f}")
torch.manual_seed(0)
part = Factorised(k=64)
heard = [adapter(torch.randn(2, 32, 1, 8, 8, generator=dice)).detach().requires_grad_() for adapter in part.adapters]
said = [book(x)[0] for book, x in zip(part.books, heard, strict=True)]
paper.disentangled(said).backward()
norm = lambda grad: 0.0 if grad is None else grad.norm().item()
print(f"gradient in what heads say: {norm(heard[0].grad):.4f}, in the codes: {norm(part.books[0].codes.grad):.4f}")

# %% [markdown]
# 1/d, and heads alone: a code's value goes forward, but its gradient goes to what the head said (straight through). So two books
# that hold the same vectors stay the same; only their choice is pushed apart. What does training make of it? Squared cosines on
# held-out frames:


# %% tags=["nbval-ignore-output"]
def spread(ax):
    x = (torch.arange(40) + 0.5) / 40
    for name, arm in {"λ = 0": "lambda 0", "λ = 0.1": "two, 12", "λ = 1": "lambda 1"}.items():
        share = drawn[f"squared cosines, {arm}"] / drawn[f"squared cosines, {arm}"].sum()
        colour = show.PALETTE[{"lambda 0": "blue", "two, 12": "orange", "lambda 1": "purple"}[arm]]
        ax.plot(x, 100 * share.cumsum(0), color=colour, label=f"{name}: mean {mean(arm, 'cos2'):.3f}")
    ax.set(xlabel="squared cosine between the two codes of a place", ylabel="places below, %")
    ax.legend()


plots.figure(spread, (5.6, 3.0), "what L_dis does", "Shares of places below a squared cosine, for three weights.")

# %% [markdown]
# ## Who says what?
#
# The first head's codes of one frame with the second head's of another. Rows: whose first; columns: whose second. Left, two
# heads without a teacher; right, the second was asked for the caption's words.

# %% tags=["nbval-ignore-output"]


def swaps(axes):
    for ax, (arm, name) in zip(axes, {"two, 12": "no teacher", "captions": "second head: captions"}.items(), strict=True):
        page = F.pad(drawn[f"swap, {arm}"].unflatten(0, (4, 4)) / 255, (1, 1, 1, 1), value=1)
        ax.imshow(page.permute(0, 3, 1, 4, 2).reshape(136, 136, 3), interpolation="nearest")
        ax.set(title=name, xlabel="second head's codes of", ylabel="first head's codes of")
        ax.set_xticks([17, 51, 85, 119], "ABCD"), ax.set_yticks([17, 51, 85, 119], "ABCD")


plots.figure(swaps, (7.4, 3.9), "codes exchanged", "Two matrices of 4 x 4 frames; the diagonal shows frames as they are.", (1, 2))

# %% [markdown]
# Left, both heads say a bit of everything, and codes of two frames make a mixture of both. Right, rows look alike: the first head
# has taken over the picture, and the second, asked for words, changes colours at most.
#
# ## Exercise
#
# The entropy term of a codebook: every place sure of its code, all codes in use. Complete it for the probabilities `p`, one row a
# place.

# %% tags=["exercise"]


def sure_and_even(p):
    """Mean entropy of the rows of p `n k`, less the entropy of their mean, in nats."""
    return -(p * p.clamp_min(1e-12).log()).sum(1).mean()  # not right yet: places may be sure of one and the same code


# %% tags=["exercise-check"]
import torch

from minivid.tokenizers import fqgan as paper

table = torch.eye(4)
cases = {"all sure, all codes": table, "all sure of one code": table[:1].expand(4, -1), "unsure": torch.full((4, 4), 0.5)}
for name, x in cases.items():
    want = paper.entropies(x, table).item()
    mine = float(sure_and_even((-torch.cdist(x, table).square() / 0.01).softmax(-1)))
    if abs(mine - want) > 1e-4:
        print(f"{name}: yours is {mine:.3f}, wanted {want:.3f}")
        print("Not yet: what tells codes in use from codes at rest?")
        break
else:
    print("Right.")

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def sure_and_even(p):
#     entropy = lambda q: -(q * q.clamp_min(1e-12).log()).sum(-1)
#     return entropy(p).mean() - entropy(p.mean(0))
# ```
#
# </details>
#
# ## The law of limits
#
# One book behind a head that changes nothing is the unit-length VQ, to the bit.

# %%
part, book = Factorised(c=8, k=16, heads=1, even=0, adapter={"depth": 0}), VQ(16, 8, unit=True, seed=0)
with torch.no_grad():
    for conv in (part.adapters[0].out, part.up):
        conv.weight.copy_(torch.eye(8).view(conv.weight.shape)), conv.bias.zero_()
    z = torch.randn(2, 8, 1, 8, 8, generator=dice)
    assert torch.equal(part(z)[1][0].index, book(z)[1][0].index)
    print(f"largest difference {(part(z)[0] - book(z)[0]).abs().max():.0e}")

# %% [markdown]
# ## The claim
#
# Books of 8, 10 and 12 bits a place, three seeds.

# %% tags=["nbval-ignore-output"]
bits = (8, 10, 12)
rivals = {"two books": "two", "one book": "one", "residual": "residual"}
curve = lambda how, metric, by=1: (list(bits), [by * mean(f"{how}, {b}", metric) for b in bits])
show.lines({name: curve(how, "psnr") for name, how in rivals.items()}, "bits a place", "PSNR, dB", "What are bits worth?")

# %% tags=["nbval-ignore-output"]
show.lines({name: curve(how, "usage", 100) for name, how in rivals.items()}, "bits a place", "codes in use, %", "Who keeps them?")

# %% [markdown]
# With few codes nobody is ahead; with many it is the one book. Running means with restart keep 96 of 100 of its 4,096 codes in
# use, so what several books are to save it from doesn't happen here. (A codebook that learns by gradient dies: see
# [SimVQ](simvq.ipynb).) And two heads repeat each other. How much? The mutual information of their codes, which should be 0:

# %% tags=["nbval-ignore-output"]
pairs = {"two books, λ = 0": "lambda 0", "two books, λ = 0.1": "two, 12", "two books, λ = 1": "lambda 1",
         "residual": "residual, 12"}  # fmt: skip
show.bars({name: value(arm, "mi") for name, arm in pairs.items()}, "bits that both say, of 6 (a dot a seed)", "Who repeats whom?")

# %% [markdown]
# $L_{dis}$ makes squared cosines ten times smaller, and the heads still say the same: directions at right angles can change
# together. A residual repeats less: its second book sees only what the first left over.

# %% tags=["nbval-ignore-output"]
heads = {"no teacher, first": ("two, 12", "first"), "no teacher, second": ("two, 12", "second"),
         "first": ("captions", "first"), "second, told captions": ("captions", "second")}  # fmt: skip
shares = {name: [100 * v for v in value(*pair)] for name, pair in heads.items()}
show.bars(shares, "colour and shape told by a linear probe, % (a dot a seed)", "Who knows what is shown?")

# %% [markdown]
# A teacher does divide the labour, for 1.5 dB: the head that must find its caption knows more of what is shown, and the two heads
# share a bit less than before.

# %%
for arm, name in {"lambda 0": "λ = 0", "two, 12": "λ = 0.1", "lambda 1": "λ = 1"}.items():
    print(f"{name:8} squared cosine {mean(arm, 'cos2'):.3f}, shared {mean(arm, 'mi'):.2f} bits, {mean(arm, 'psnr'):.2f} dB")
print(f"a model that writes codes: {mean('writer', 'told'):.2f} bits a place where the second is told the first,"
      f" {mean('writer', 'alone'):.2f} where not")  # fmt: skip
show.verdict("fqgan")

# %% [markdown]
# **What the authors report** (ImageNet, 256 x 256, 16,384 codes a book): rFID 0.94 with two books, 0.76 with three, at 16 x 16
# pixels a place. Note that two books of 16,384 have twice the bits of one. Left out here: adversarial and perceptual losses,
# CLIP and DINO as teachers.
#
# **Where next?** [SimVQ](simvq.ipynb) keeps one large book alive; [HiTVideo](hitvideo.ipynb) puts books at different scales;
# chapter [02](../02_tokenizers.ipynb) compares all.
