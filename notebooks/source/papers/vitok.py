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
# # ViTok: how many numbers, and does it matter where they stand?
#
# A tokenizer turns a clip into L tokens of c numbers. Fewer, longer tokens, or more, shorter ones? A deep encoder, or a deep
# decoder? Nobody can try all of it on real films. This paper takes the plainest network there is and turns one knob at a time.
#
# *Ten minutes, one processor core. A part: a tokenizer.* At the end you can
# - say what of a code's shape decides how well a clip is drawn, and what hardly does;
# - put depth where it helps;
# - tell why the code that draws best is not the one to generate with.

# %%
from ast import literal_eval
from statistics import fmean

import numpy as np
import torch

from minivid.core import corpus, fit, weights
from minivid.lab import claims, measure, play, plots, show
from minivid.tokenizers import vitok as paper
from minivid.tokenizers.vitok import ViTok

_ = torch.set_num_threads(1)

# %% [markdown]
# ## The picture first
#
# The same clip through fifteen tokenizers. A code (q, p, c) has a token of c numbers for q frames of p x p pixels; E counts
# all its numbers. **Choose codes of one E, then of another.** (The claim below trains them.)

# %% tags=["nbval-ignore-output"]
drawn, _ = weights.read("vitok.safetensors")
result = claims.read("vitok")["arms"]
value = lambda arm, metric: result[arm]["values"][metric]
mean = lambda arm, metric: fmean(value(arm, metric))
codes = [literal_eval(name) for name in drawn if name != "true"]
E = lambda shape: ViTok(*shape).numbers(16, 32, 32)
codes.sort(key=E)


def looks(code):
    shape = literal_eval(code.split(":")[1])
    rows = [corpus.clip_of(drawn[name])[0] for name in ("true", str(shape))]
    title = f"E = {E(shape)}, {mean('sweep', f'psnr {shape}'):.1f} dB, {3 * 16 * 32 * 32 / E(shape):.0f} times fewer numbers"
    return show.clips(rows, ["true", f"(q, p, c) = {shape}"], title, fps=4)


names = {shape: f"E = {E(shape)}: {shape}" for shape in codes}
settled = [dict(code=names[shape]) for shape in ((4, 8, 1), (4, 8, 16), (4, 4, 16))]
play.knobs(looks, settled=settled, code=play.Choice([names[4, 8, 16], *[n for s, n in names.items() if s != (4, 8, 16)]]))

# %% [markdown]
# ## You have not read the paper: how would you do it?
#
# You have 1,024 numbers for a clip. Sixty-four tokens of 16, or 256 of 4?
#
# <details><summary>One answer</summary>
#
# More tokens are more places to look at, and more work; long ones see more at once. If attention can carry anything anywhere, the
# *sum* may be all that counts. That can be measured.
#
# </details>
#
# ## The idea
#
# Cut the clip into tubelets of q frames and p x p pixels, each a token (a linear layer). Full attention, no convolution. A
# linear layer makes c means and c variances of each token, and a draw from them goes through the mirror image of all that:
#
# $$L = \tfrac Tq \tfrac Hp \tfrac Wp,\qquad E = L\,c,\qquad \mathcal L = \mathrm{MSE} + 10^{-3}\,\mathrm{KL} + \text{edges}.$$
#
# q, p and c occur in four linear layers and nowhere else, so shapes can be traded freely: double q and c, and E stays.

# %%
for shape in ((4, 8, 16), (8, 8, 32), (4, 4, 4), (2, 8, 8)):
    tok, clip = ViTok(*shape), torch.zeros(1, 3, 16, 32, 32)
    c, *size = tok.latent_shape(16, 32, 32)
    work = measure.flops(lambda tok=tok, clip=clip: tok.decode(tok.encode(clip))) / 1e6
    print(f"{shape}: {np.prod(size):3} tokens of {c:2} numbers, E = {tok.numbers(16, 32, 32)}, {work:4.0f} MFLOPs a clip")

# %% [markdown]
# Mind the last column: at equal E, more tokens are more work. Whoever compares shapes compares that too.
#
# ## The package's own source

# %%
show.source(ViTok.moments, ViTok.decode, paper.loss)

# %% [markdown]
# ## Where a fresh one begins
#
# A token of 4 x 8 x 8 pixels is 768 numbers, and the network has to find out which of them matter. Ours begins with the principal
# components of tubelets in its first and last layer. Thirty steps with and without:


# %%
def learn(begun, steps=30):
    torch.manual_seed(0)
    tok, clips = ViTok(4, 8, 16, d=64), corpus.clip_of(drawn["true"]).repeat_interleave(2, 2)
    if begun:
        tok.begin(clips)
    adam, errors = torch.optim.AdamW(tok.parameters(), 4e-3), []
    for i in range(steps):
        found = paper.loss(tok, clips, fit.draws(0, i))
        adam.zero_grad()
        found["loss"].backward()
        adam.step()
        errors.append(found["mse"].item())
    return list(range(steps)), errors


curves = {"begun with principal components": learn(True), "begun at random": learn(False)}
show.lines(curves, "step", "squared error", "Two clips, thirty steps")

# %% [markdown]
# ## Predict, then run
#
# The decoder gets four blocks and the encoder one, or the other way round. **Predict** which draws better, and by how much, in
# dB.

# %% tags=["nbval-ignore-output"]
pairs = [(1, 1), (4, 1), (1, 4), (2, 2), (4, 4)]
bars = {f"encoder {a}, decoder {b}": value("depths", f"psnr {(a, b)}") for a, b in pairs}
show.bars(bars, "PSNR in dB (a dot a seed)", "Blocks of either side, code (4, 8, 16)")

# %%
print(f"doubling the encoder: {mean('depths', 'encoder'):+.2f} dB, the decoder: {mean('depths', 'decoder'):+.2f} dB")

# %% [markdown]
# Neither: seeds differ by more than depths do. The paper's 0.3 dB for a doubled decoder is not to be seen at this size.

# %% [markdown]
# ## Exercise
#
# A clip of T frames, H x W pixels shall become E numbers. Which c does a tubelet (q, p) need?

# %% tags=["exercise"]


def channels(E, q, p, T=16, H=32, W=32):
    """Numbers of a token, so that the code has E."""
    return E  # not right yet: that is one token for everything


# %% tags=["exercise-check"]
for q, p, E_wanted, c in ((4, 8, 1024, 16), (8, 8, 1024, 32), (4, 4, 256, 1), (2, 8, 4096, 32)):
    if channels(E_wanted, q, p) != c:
        print(f"q = {q}, p = {p}, E = {E_wanted} needs c = {c}; yours is {channels(E_wanted, q, p)}.")
        print("Not yet.")
        break
else:
    print("Right.")

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def channels(E, q, p, T=16, H=32, W=32):
#     return E // ((T // q) * (H // p) * (W // p))
# ```
#
# </details>
#
# ## The law of limits
#
# Without blocks and with as many channels as a tubelet has numbers, it is a change of basis: nothing is lost.

# %%
plain = ViTok(2, 4, 96, d=96, depth=(0, 0))
with torch.no_grad():
    basis = torch.linalg.qr(torch.randn(96, 96))[0]
    for layer in (plain.embed, plain.code, plain.read, plain.unembed):
        layer.bias.zero_()
    plain.embed.weight.copy_(basis), plain.unembed.weight.copy_(basis.T)
    plain.code.weight.copy_(torch.eye(192, 96)), plain.read.weight.copy_(torch.eye(96))
    clip = corpus.clip_of(drawn["true"])
    print(f"largest error: {(plain.decode(plain.encode(clip)) - clip).abs().max():.0e}")

# %% [markdown]
# ## The claim
#
# Fifteen codes, three seeds. First against E: is it a line? Then the same points against the arithmetic.


# %% tags=["nbval-ignore-output"]
def law(axes):
    looks = {(8, 8): ("o", "blue"), (4, 8): ("s", "orange"), (2, 8): ("^", "purple"), (4, 4): ("D", "sky")}
    for (q, p), (mark, name) in looks.items():
        some = [shape for shape in codes if shape[:2] == (q, p)]
        y, style = [mean("sweep", f"psnr {shape}") for shape in some], dict(color=show.PALETTE[name], label=f"q = {q}, p = {p}")
        axes[0].plot([E(shape) for shape in some], y, mark + "-", **style)
        axes[1].plot([mean("sweep", f"flops {shape}") / 1e6 for shape in some], y, mark, **style)
    axes[0].set(xscale="log", xlabel="numbers in the code, E", ylabel="PSNR in dB", title=f"R² = {mean('sweep', 'r2'):.2f}")
    axes[1].set(xscale="log", xlabel="MFLOPs a clip", title=f"R² = {mean('sweep', 'r2 flops'):.2f}")
    for ax, ticks in zip(axes, ((64, 256, 1024, 4096), (50, 100, 200, 400)), strict=True):
        ax.set_xticks(ticks, [f"{n:,}" for n in ticks]), ax.minorticks_off()
    axes[0].legend()


alt = "PSNR over E: four curves that rise and bend, near a line; over FLOPs it is a cloud."
plots.figure(law, (7.6, 3.2), "PSNR against E, and against FLOPs", alt, (1, 2))

# %%
print(f"{mean('sweep', 'slope'):.2f} dB per doubling of E; codes of equal E differ by {mean('sweep', 'spread'):.2f} of that")
print(f"few tokens with as much arithmetic as many: {mean('sweep', 'equal work'):+.2f} dB")
for clips in ("moving", "shuffled"):
    print(f"tubelets of 4 frames over single frames at equal E, clips {clips}: {mean('price', f'gain, {clips}'):+.1f} dB")

# %% [markdown]
# E explains most, and not all. Each kind of tubelet has a curve of its own, and they cross: 256 numbers are best in few tokens,
# as a token of one number says little; 1,024 in many, as a network of this size can't fill a token of 32. So your 1,024 numbers
# draw 1 dB better as 256 tokens of 4 than as 64 of 16, for four times the arithmetic. The paper's networks, with a thousand times
# the steps, fill theirs.
#
# And generation: the same small video transformer learns from codes (4, 8, c).

# %% tags=["nbval-ignore-output"]
channels_ = (1, 4, 16, 64)
line = lambda metric: (list(channels_), [mean(f"c = {c}", metric) for c in channels_])
curves = {"generated": line("frechet"), "true clips through the tokenizer": line("ceiling, frechet")}
show.lines(curves, "channels c", "Fréchet distance", "What can be generated, and what could be", log="x")

# %% tags=["nbval-ignore-output"]
curves = {"generated": line("told"), "true clips through the tokenizer": line("ceiling, told")}
show.lines(curves, "channels c", "colour, shape, motion, count as told", "The judge's word", log="x")

# %% [markdown]
# Four channels draw worse than sixteen and sixty-four, and are generated best: a number that the tokenizer added is one more that
# the generator has to learn.

# %%
show.verdict("vitok")

# %% [markdown]
# The authors report, on 256-pixel images, R² of 0.92 for PSNR over log E, and of 0.07 for the encoder's size against 0.83 for the
# decoder's; generation is best near 2^12 numbers.
#
# ## Where next
#
# - [02 Tokenizers](../02_tokenizers.ipynb): codes instead of numbers.
# - [SimVQ](simvq.ipynb): keep a large codebook alive.
# - [The paper](https://arxiv.org/abs/2501.09755).
