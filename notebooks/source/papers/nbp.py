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
# # NBP: say a row at a time
#
# A model of tokens says one, reads it, says the next: a second of film is a thousand passes. A film isn't a sentence, though. What
# stands in a cell depends on what stood there a moment ago more than on its left neighbour. So let all cells of a row be said at
# once, each by the token above it.
#
# *Ten minutes, one processor core. A procedure: mask, target and decoding change, the network doesn't.* At the end you can
# - move any model from next tokens to next blocks by a shift and a mask;
# - say what a block costs in bits, what it saves in passes, and why these are not the same price;
# - see on a made frame that its cells were drawn without asking each other.

# %%
from functools import lru_cache
from statistics import fmean

import torch

from minivid import world
from minivid.block_diffusion import nbp as paper
from minivid.block_diffusion.nbp import Flat, NextBlock
from minivid.core import attention, text, weights
from minivid.core.baselines.vq import Codes
from minivid.core.cache import Cache
from minivid.core.corpus import bytes_of
from minivid.core.model import Cond
from minivid.core.where import grid, visible
from minivid.lab import claims, measure, play, plots, show
from minivid.training.tokens import codes_of

_ = torch.set_num_threads(1)

# %% [markdown]
# ## The picture first
#
# A frame is 8 × 8 codes of 256 (`tok-q`). Four true frames are given; the fifth fills up, a block at a time. Left, who sees whom
# among the tokens of two frames: a staircase whose step is L. Middle, the frame after some share of its cells, said by a small
# model trained with this L (those of the claim below); the blue frame is the next block. **Slide L, then let the frame fill.**

# %%
result = claims.read("nbp")["arms"]
mean = lambda arm, metric: fmean(result[arm]["values"][metric])
made, _ = weights.read("papers/nbp.safetensors")
tokenizer = weights.load("tok-q")
SHAPES = {1: (1, 1, 1), 4: (1, 1, 4), 8: (1, 1, 8), 16: (1, 2, 8), 64: (1, 8, 8)}


@torch.no_grad()
def pixels(codes):
    """Codes `b f 8 8` as clips in [-1, 1]."""
    index = codes.long()
    return tokenizer.decode(tokenizer.bottleneck.lookup([Codes(index, grid(*index.shape[1:]))]))


@lru_cache(None)
def fifth(L):
    """The fifth frame of a clip that the model with blocks of L went on with, `32 32 3` in [0, 1]."""
    return pixels(made[f"L = {L}, 1"])[0, :, 4].movedim(0, 2) / 2 + 0.5


# %%
def outlined(ax, cells):
    """A frame around a box of cells."""
    r, c = cells // 8, cells % 8
    size = 4 * (c.max() - c.min() + 1), 4 * (r.max() - r.min() + 1)
    box = plots_box((4 * c.min() - 0.5, 4 * r.min() - 0.5), *size, fill=False, ec="#0072B2", lw=2)
    ax.add_patch(box)


def filling(L, filled):
    passes = -(-filled * 64 // (100 * L))  # of this frame, so far
    said = min(64, passes * L)
    inlet = NextBlock(shape=SHAPES[L]).inlet
    sees = visible(inlet(torch.zeros(1, 1, 1, 128, dtype=torch.long), None, Cond())[1])[0]
    known = torch.zeros(64, dtype=torch.bool)
    known[inlet.cells(torch.arange(64))[:said]] = True
    area = known.view(8, 8).repeat_interleave(4, 0).repeat_interleave(4, 1)
    shown = torch.where(area[..., None], fifth(L), torch.tensor(0.85))
    torn, bits = 100 * mean(f"L = {L}", "torn_1"), mean(f"L = {L}", "bits")
    told = f"L = {L}: {passes} of {64 // L} passes for this frame; {bits:.2f} bits a code; {torn:.0f} % of made frames torn"

    def draw(axes):
        axes[0].imshow(sees, cmap="cividis", vmin=0, vmax=1)
        axes[0].set(xlabel="token seen", ylabel="token", xticks=(0, 63, 127), yticks=(0, 63, 127))
        axes[1].imshow(shown.clamp(0, 1), interpolation="nearest")
        axes[1].set_axis_off()
        if said < 64:
            outlined(axes[1], inlet.cells(torch.arange(64))[said : said + L])

    return plots.figure(draw, (6.6, 3.3), told, told + ".", (1, 2))


# %% tags=["nbval-ignore-output"]
settled = [dict(L=L, filled=filled) for L, filled in ((1, 40), (8, 40), (64, 100))]
play.knobs(filling, settled=settled, L=play.Choice(list(SHAPES)), filled=play.IntRange(0, 100, 40, 10))
