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
# # QVGen: a helper that fades away
#
# Three bits for every weight and every input: round a trained model like that, and its shapes fall apart. Train it *while* it is
# rounded, and it learns to live with it, slowly, on rough gradients. QVGen gives each layer a helper in full precision that says
# what the bits can't; training is calm then. And a helper costs, so it must be gone before the model is shipped.
#
# *Ten minutes, one processor core. Surgery: a trained model in, one of few bits out, tuned on clips.* At the end you can
# - train through a rounding, and say why its gradients are rough;
# - build a helper of low rank that makes the rounded layer say what it said;
# - take it away without the model noticing, and tell three ways of doing so apart.

# %%
import torch
from torch import nn

from minivid import world
from minivid.core import corpus, noise, text, weights
from minivid.core.model import Cond
from minivid.core.surgery import record
from minivid.lab import claims, play, plots, show
from minivid.quantization import qvgen as paper
from minivid.quantization.qvgen import Bits, Tuning

_ = torch.set_num_threads(1)

# %% [markdown]
# ## The picture first
#
# One feed-forward of our video model, with what really enters it. Its weights and inputs get 3 bits, and for 400 steps it
# learns to say again what it said. Left, how large the gradients of the weights are; right, what is still missing. Grey:
# ordinary training. Blue: with a helper, which is made smaller five times (bands) and is gone at step 400.


# %%
class Rows(list):
    add = list.append


model, name = weights.load("video"), "trunk.blocks.2"
block = model.get_submodule(name)
teacher = nn.Sequential(block.fc1, nn.GELU(), block.fc2)


def inputs(first, n=32):
    """What the feed-forward gets from n noisy clips."""
    scenes = corpus.scenes("base", n, first)
    latent = weights.load("tok-v").encode(world.batch(scenes, 32, 17))
    dice = torch.Generator().manual_seed(first)
    t = noise.logit_normal(n, 5, dice, 3.0)
    x = noise.flow().at(latent, torch.randn(latent.shape, generator=dice), t)
    call = x, t, Cond(text=text.tokens([world.caption(scene) for scene in scenes]))
    record(model, [call], {f"{name}.fc1": (rows := Rows())})
    return torch.cat(rows).flatten(0, 1)


# %%
with torch.no_grad():
    fitted, unseen = inputs(1), inputs(50)
print(f"{len(fitted)} tokens of {fitted.shape[1]} numbers to learn from, as many to measure on")


# %%
def error(student):
    """Relative squared error of the output on unseen inputs, as it would be shipped."""
    with torch.no_grad():
        want = teacher(unseen)
        return ((student(unseen) - want).square().sum() / want.square().sum()).item()


def batches(i):
    dice = torch.Generator().manual_seed(i)
    return fitted[torch.randint(len(fitted), (128,), generator=dice)]


# %%
STEPS, trained = 400, {}


def taught(bits, rank, removal="by_rank"):
    """A student, its losses and gradient norms, and the singular values of its first helper every 10 steps."""
    if (bits, rank, removal) not in trained:
        student, looks = paper.quantised(teacher, ["0", "2"], Bits(bits, bits, rank, 1)), []
        look = lambda i: i % 10 or looks.append(torch.linalg.svdvals(student[0].helper.detach())[:16])
        s = Tuning(STEPS, 1e-3, seed=0)
        told = paper.distil(student, teacher, batches, s, getattr(paper, removal), lambda x, dice: (x,), look)
        trained[bits, rank, removal] = student, told, torch.stack(looks)
    return trained[bits, rank, removal]


def smooth(values, n=20):
    x = torch.tensor(values)
    return x.unfold(0, n, 1).mean(1).tolist()


# %%
def curves(bits, rank):
    runs = {"#777777": taught(bits, 0)[1], "#0072B2": taught(bits, rank)[1]}

    def draw(axes):
        for ax, what, title in zip(axes, ("norm", "loss"), ("norm of the weights' gradient", "loss"), strict=True):
            for (ink, told), dash in zip(runs.items(), ("--", "-"), strict=True):
                ax.plot(range(20, STEPS + 1), smooth([step[what] for step in told]), color=ink, ls=dash)
            phases = len(paper.ranks(rank)) if rank else 1
            for k in range(0, phases, 2):
                ax.axvspan(k * STEPS // phases, (k + 1) * STEPS // phases, color="#0072B2", alpha=0.07)
            ax.set(xlabel="step", title=title, yscale="log")

    errors = [error(taught(bits, r)[0]) for r in (0, rank)]
    alt = f"{bits} bits: error at the end {errors[0]:.4f} without a helper, {errors[1]:.4f} with one of rank {rank} that is gone."
    return plots.figure(draw, (7.4, 2.9), f"{bits} bits, rank {rank}", alt, (1, 2))


curves(3, 16)

# %% [markdown]
# ## You have not read the paper: how would you do it?
#
# Rounding has gradient 0 nearly everywhere. How can a rounded layer learn?
#
# <details><summary>The usual answer</summary>
#
# Pretend: forwards round, backwards act as if nothing had been (the straight-through estimator). Let the step and the offset
# of each row learn too (LSQ+). That is quantisation-aware training, and the rival here.
#
# </details>
#
# ## The naive way: just train
#
# The gradient belongs to a loss that is much larger than it need be, because the weights can't reach what they should say.
# For gradient descent on a convex loss the regret after $T$ steps has two terms,
#
# $$\frac{d\,D_\infty^2}{2\,T\,\eta_T} \;+\; \frac1{2T} \sum_t \eta_t\, \lVert g_t \rVert^2:$$
#
# the first goes to 0; the second is the mean size of the gradients. So make them smaller.
#
# ## The idea
#
# Beside the rounded weight stands a helper of low rank,
#
# $$y = Q_a(x)\,\big(Q_w(W) + L\,\mathrm{diag}(\gamma)\,R\big)^{\!\top} + b,$$
#
# which begins as the best rank-$r$ picture of what the rounding lost, $W - Q_w(W) \approx L R$. All of it learns, taught by
# the float model. Then, in phases: the weaker half of $\gamma$ goes from 1 to 0 by a cosine,
# $u = \tfrac12(1 + \cos \pi \tau / T)$; that half is cut off; what is left is factored anew by an SVD, so that "weaker" means
# something again. 16, 8, 4, 2, 1, 0.
#
# ## The package's own source

# %%
show.source(paper.QVLinear.forward, paper.QVLinear.halve, paper.by_rank, paper.ClippedInputs.forward)

# %% [markdown]
# ## Turn it yourself
#
# **Turn the bits and the rank.** The shaded bands are the phases; a larger rank has more of them. When is a helper worth it?

# %% tags=["nbval-ignore-output"]
for bits in (2, 3, 4):
    for rank in (0, 4, 16):
        taught(bits, rank)
settled = [dict(bits=bits, rank=16) for bits in (4, 3, 2)]
play.knobs(curves, settled=settled, bits=play.IntRange(2, 4, 3), rank=play.Choice([16, 4]))

# %% [markdown]
# The curves are calmer with a helper, at two bits clearly so; and where they end there is hardly a difference. To see why, round
# without any training, once the weights alone, once the inputs alone:

# %%
for weight_bits, input_bits in ((3, 3), (3, 16), (16, 3)):
    untrained = paper.quantised(teacher, ["0", "2"], Bits(weight_bits, input_bits, 0, 1))
    print(f"weights {weight_bits:2} bits, inputs {input_bits:2} bits: error {error(untrained):.3f}")

# %% [markdown]
# A helper stands beside the *weights*. What the inputs lost before they came to the layer it can't know either.
#
# ## Watch the tail go
#
# Singular values of a helper (down) over its training (across). Within a phase the lower half fades; at its end it is gone,
# and the rest stands in order again.


# %%
def spectrum(bits):
    looks = taught(bits, 16)[2]

    def draw(ax):
        shown = ax.imshow(looks.T, cmap="cividis", aspect="auto", extent=(0, STEPS, 16.5, 0.5))
        for k in range(1, 5):
            ax.axvline(k * STEPS // 5, color="white", lw=0.8)
        ax.set(xlabel="step", ylabel="singular value", title=f"{bits} bits: brightest {looks.max():.2f}")
        ax.figure.colorbar(shown, ax=ax)

    alt = f"{bits} bits: singular values of the helper, sixteen at first, eight after step 80, four, two, one, none."
    return plots.figure(draw, (7.0, 2.8), f"spectrum, {bits} bits", alt)


play.knobs(spectrum, settled=[dict(bits=bits) for bits in (4, 3, 2)], bits=play.IntRange(2, 4, 3))

# %% [markdown]
# ## Predict, then run
#
# The same helper, four ends. **Predict** the order: by rank, faded as a whole, dropped at four fifths; and how good would
# the model be if the helper could stay?

# %% tags=["nbval-ignore-output"]
ends = {"no helper": taught(3, 0), "by rank": taught(3, 16), "faded as a whole": taught(3, 16, "as_one"),
        "dropped at 320": taught(3, 16, "at_once")}  # fmt: skip
bars = {title: error(student) for title, (student, *_) in ends.items()}
kept = taught(3, 16, "never")[0].train()
bars["it stays (and costs)"] = error(kept)
_ = kept.eval()
show.bars(bars, "relative error of the feed-forward, inputs not seen", "3 bits, 400 steps")

# %% [markdown]
# ## Exercise
#
# Complete `helper`: the factors $L$ (`o r`) and $R$ (`r i`) of the best rank-$r$ picture of what a rounding lost, balanced.

# %% tags=["exercise"]


def helper(w, rounded, r):
    """w, rounded: `o i`. Returns L `o r` and R `r i`."""
    lost = w - rounded
    return lost[:, :r], torch.eye(r, lost.shape[1])  # not right yet: the first columns, not the best directions


# %% tags=["exercise-check"]
import torch

w = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
left, right = helper(w, w.round(), 2)
s = torch.linalg.svdvals(w - w.round())
off, best = (w - w.round() - left @ right).norm(), s[2:].norm()
balanced = torch.allclose(left.norm(dim=0), right.norm(dim=1), atol=1e-4)
if torch.allclose(off, best, atol=1e-4) and balanced:
    print("Right.")
else:
    print(f"What is left has norm {off:.3f}; it could be {best:.3f}. Balanced: {balanced}.")
    print("Not yet.")

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def helper(w, rounded, r):
#     u, s, v = torch.linalg.svd(w - rounded, full_matrices=False)
#     root = s[:r].sqrt()
#     return u[:, :r] * root, root[:, None] * v[:r]
# ```
#
# </details>
#
# ## The law of limits
#
# A helper of full rank gives the layer back. Without one it is ordinary training. And at the end nothing of it is left: what is
# shipped is packed codes.

# %%
layer = nn.Linear(24, 16)
x = torch.randn(5, 24, generator=torch.Generator().manual_seed(1))
full = paper.quantised(nn.Sequential(layer), ["0"], Bits(3, 16, 24, 1))
full[0].inputs.clip.data.fill_(20.0)  # of the inputs nothing is cut off
print("full rank:", torch.allclose(full.train()(x), layer(x), atol=1e-2), "(inputs have 16 bits)")
done = taught(3, 16)[0]
same = torch.equal(done(unseen[:9]), done.train()(unseen[:9]))
print("gone:", done[0].left is None, "| in training mode it says the same:", same)
_ = done.eval()
packed = paper.shipped(done)
numbers = done[0].weight.numel()
print(f"{8 * packed[0].packed.numel() / numbers:.2f} bits a weight, and they say the same:",
      torch.allclose(packed[0](unseen[:9]), done[0](unseen[:9]), atol=1e-2))  # fmt: skip

# %% [markdown]
# ## The claim
#
# The whole video model: weights and inputs of its 60 layers in 3 bits (and 2 for 4, and 4 for 4), three seeds, margins fixed
# before. "QAT" is the same training without helpers; both have the best of four learning rates.

# %% tags=["nbval-ignore-output"]
result = claims.read("qvgen")
value = lambda arm, metric: result["arms"][arm]["values"][metric]
widths = ("W4A4", "W3A3", "W2A4")
shown = {f"{width}, {how}": value(f"{width}: {how}", "error") for width in widths for how in ("QAT", "QVGen")}
show.bars(shown, "relative error of the model's output (a dot a seed)", "Helpers are gone")

# %% tags=["nbval-ignore-output"]
ways = {"QAT": "QAT", "QAT, 1.15 times the steps": "QAT, 1.15 times", "by rank": "QVGen", "faded as a whole": "fade",
        "dropped": "dropped", "never gone, and off": "never"}  # fmt: skip
bars = {title: value(f"W3A3: {how}", "error") for title, how in ways.items()}
bars["never gone, and on"] = value("W3A3: never", "kept")
show.bars(bars, "relative error of the model's output (a dot a seed)", "How the helper goes: 3 bits")

# %% tags=["nbval-ignore-output"]
shown = {f"{how}: {what}": value(f"W3A3: {how}", what) for what in ("norm", "loss") for how in ("QAT", "QVGen")}
show.bars(shown, "mean over the first third of the steps (a dot a seed)", "While helpers are there: 3 bits")

# %% tags=["nbval-ignore-output"]
print("read back from 24 clips a seed, %:          colour  shape  motion")
for arm in ("float", *(f"{width}: {how}" for width in widths for how in ("rounded", "QAT", "QVGen"))):
    shares = [100 * sum(value(arm, what)) / 3 for what in ("colour", "shape", "motion")]
    print(f"{arm:40} {shares[0]:10.0f} {shares[1]:6.0f} {shares[2]:7.0f}")

# %% [markdown]
# Training is what counts, helpers change little: at W3A3 the inputs lose most, at W2A4 400 steps are too few to learn to do
# without the helper. And for the eye? One caption, one noise, weights in few bits (inputs of the
# trained ones in 8):

# %% tags=["nbval-ignore-output"]
stills, _ = weights.read("../06_quantization.safetensors")
shown = {"float": "the teacher", "nearest, 3": "3 bits, rounded", "trained, 3": "3 bits, trained", "qvgen, 3": "3 bits, QVGen",
         "nearest, 2": "2 bits, rounded", "trained, 2": "2 bits, trained", "qvgen, 2": "2 bits, QVGen"}  # fmt: skip
films = [stills[name].float() / 127.5 - 1 for name in shown]
show.clips(films, list(shown.values()), "“a red circle moves right”, every fourth frame")

# %%
show.verdict("qvgen")

# %% [markdown]
# The authors report quality comparable to full precision at 4 bits on four models of 1.3 to 14 billion parameters, and at
# 3-bit weights large gains over the best method before, at about 2 % more training time.
#
# ## Where next
#
# - [VQ4DiT](vq4dit.ipynb): two bits without any training data.
# - [06 Quantization](../06_quantization.ipynb): all ways on one plot.
# - [The paper](https://arxiv.org/abs/2505.11497).
