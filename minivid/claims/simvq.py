"""SimVQ in a per-frame tokenizer of 0.25 M parameters on frames of 32 x 32: who keeps its codes, what are they worth, and why?

All arms have the same network (vectors of 32 numbers on an 8 x 8 grid), batches (16 frames, 1,024 vectors) and steps; they
differ in the bottleneck alone. Each has its best learning rate of 4e-3, 8e-3 and 1.6e-2, found with 1,024 codes, 500 steps and a
seed that isn't used here: 4e-3 for running means with restart, 1.6e-2 for all others (3.2e-2, tried after the run, gives SimVQ
nothing more and plain VQ half a dB, so plain VQ is too weak here, and what "holds" against it is an upper bound; restart was
best at the least rate that was tried). Half of the frames show the world, half the natural films; usage and PSNR are measured on
1,024 held-out frames (65,536 codes). The network begins at random and nothing centres its features: the tokenizers of this
package begin at principal components and lean towards unit variance, and the arms "centred" say what is left to cure there.

Rivals: running means with restart of dead codes (Dhariwal et al. 2020), a k-means start, unit vectors of 8 numbers behind a
linear map (Yu et al. 2021, "VQ-FC"), finite scalar quantisation with the levels that its authors advise (Mentzer et al. 2023;
64, 240, 1,000 and 4,375 codes).

The arms "alone" train a book of 512 codes by itself (Adam 3e-3, 1,500 steps of 256) on 4,096 fixed Gaussian vectors of 16
numbers, whose mean is m = 0, 1 and 3 standard deviations a coordinate from the book's; distortion is relative to their variance.

Outcome: SimVQ keeps more codes than plain VQ, 88 against 73 % of 1,024 and 67 against 28 % of 4,096, and the pictures are 0.4
and 0.3 dB worse for all that; at both sizes every rival is ahead of it. Plain VQ doesn't die for good: with 1,024 codes the
encoder comes back to the book (m falls from 0.4 to 0.03). SimVQ's codes are in use, but unevenly (perplexity 145 of 1,024; plain
VQ 272, means with restart 524): a book that only moves as a whole can't be dense where vectors are. Learning the table as well
mends part of that (248, and +0.8 dB), against the paper's warning; b brings nothing here (without it 91 % and 0.1 dB more,
within the spread). Where features are centred nothing is left to cure: plain VQ keeps 95 %, SimVQ 93 % and 1.1 dB less. Running
means with restart lead at 4,096 codes by 0.8 dB (1.2 over SimVQ), and are level with plain VQ at 256 and with a k-means start at
1,024. Looked at alone, the mechanism is as described as far as use goes: a book at rest loses no codes; one standard deviation
costs plain VQ four codes of five and SimVQ none, and the shift b, which the paper's formula lacks, does most of it; three are
too far even for SimVQ, not for b alone. Use isn't worth, though: at one deviation b alone errs 13 % more than plain VQ with a
fifth of its codes, and restart 29 % less than SimVQ.
"""

import math
from collections import deque
from functools import lru_cache, partial

import numpy as np
import torch
from torch import Tensor, nn

from minivid import world
from minivid.core import fit
from minivid.core.baselines.vq import FSQ, VQ, nearest
from minivid.core.corpus import scenes
from minivid.core.tokenizer import Tokenizer
from minivid.lab import measure
from minivid.lab.claims import Arm, Claims, Compare, Floor
from minivid.tokenizers import simvq as paper
from minivid.tokenizers.simvq import SimVQ
from minivid.training.recipe import pick
from minivid.world.clips import natural_crops
from minivid.world.scores import perplexity, psnr, usage

D, BATCH = 32, 16
RATES = {"restart": 4e-3}  # of all others: 1.6e-2
STEPS = (2000, 3)  # full, fast
SIZES = (64, 256, 1024, 4096)
LEVELS = {64: (4, 4, 4), 256: (8, 6, 5), 1024: (8, 5, 5, 5), 4096: (7, 5, 5, 5, 5)}
CELLS = {"table and layer": ("codes", "weight", "bias"), "no bias": ("weight",), "bias": ("bias",), "simvq": ("weight", "bias")}


class Narrow(nn.Module):
    """A bottleneck of d channels between two linear maps from and to D."""

    def __init__(self, d: int, inside: nn.Module):
        super().__init__()
        self.down, self.inside, self.up = nn.Conv3d(D, d, 1), inside, nn.Conv3d(d, D, 1)

    def forward(self, z):
        z, codes, losses = self.inside(self.down(z))
        return self.up(z), codes, losses


def book(how: str, k: int, d: int = D, seed: int = 0) -> nn.Module:
    """The bottleneck of an arm."""
    match how:
        case "vq" | "k-means":
            return VQ(k, d, seed=seed)
        case "means":
            return VQ(k, d, decay=0.99, seed=seed)
        case "restart":
            return VQ(k, d, decay=0.99, restart=0.1, seed=seed)
        case "unit":
            return Narrow(8, VQ(k, 8, unit=True, seed=seed))
        case "fsq":
            return Narrow(len(LEVELS[k]), FSQ(LEVELS[k]))
    return SimVQ(k, d, learn=CELLS[how], seed=seed)


# --- in a tokenizer -----------------------------------------------------------------------------------------------------


@lru_cache(2)
def frames(split: str, fast: bool) -> Tensor:
    """Single frames `b 3 1 32 32`, half of the world, half natural."""
    n = {"train": 32, "held-out": 16}[split] if fast else {"train": 4096, "held-out": 512}[split]
    recipes = ("base", "textured", "varied", "camera")
    drawn = [s for recipe in recipes for s in scenes(recipe, n // len(recipes), 40, split)]
    return torch.cat([world.batch(drawn, 32, 1), natural_crops(n, 32, 1, split, seed=40)])


def train(tok: Tokenizer, clips: Tensor, steps: int, seed: int, rate: float = 1.6e-2, lean: bool = False) -> dict[str, float]:
    """Train as every arm is trained; returns how far from the book the features were at the start, at most, and at the end."""
    adam, part, gaps = torch.optim.Adam(tok.parameters(), rate, (0.9, 0.99), fused=True), tok.bottleneck, []
    some = clips[:: max(1, len(clips) // 64)]

    def step(state, clip, generator):
        adam.param_groups[0]["lr"] = rate * fit.cosine(state.i, steps)
        if state.i % 100 == 0 and hasattr(part, "table"):
            gaps.append(gap(tok, some))
        back, _, losses = tok(clip)
        error = back - clip
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        losses = {name: loss for name, loss in losses.items() if lean or name != "lean"}
        loss = error.abs().mean() + edges + sum(losses.values())
        adam.zero_grad()
        loss.backward()
        adam.step()
        return {"loss": loss}

    fit.fit(step, fit.State({"tok": tok, "adam": adam}), lambda i: clips[pick(i, len(clips), BATCH, seed)], steps, seed)
    return {"m_start": gaps[0], "m_most": max(gaps), "m_end": gap(tok, some)} if gaps else {}


@torch.no_grad()
def gap(tok: Tokenizer, clips: Tensor) -> float:
    return paper.offset(tok.bottleneck.cells(tok.features(clips)), tok.bottleneck.table)[0]


def tokenizer(seed, fast, how, k, centred=False):
    """PSNR in dB, codes in use, their perplexity, bits a pixel as stored; m before, in and after training."""
    torch.manual_seed(seed)  # the network's initial values
    tok = Tokenizer(D, 1, (32, 64), (1, 2), bottleneck=book(how, k, seed=seed), noise=0.0)
    clips, unseen = frames("train", fast), frames("held-out", fast)
    if centred:
        tok.begin(clips[:512])
    if how == "k-means":
        with torch.no_grad():
            tok.bottleneck.begin(tok.features(clips[:: max(1, len(clips) // 512)]))
    found = train(tok, clips, STEPS[fast], seed, RATES.get(how, 1.6e-2), centred)
    tok.eval()
    codes, back = [], []
    with torch.no_grad():
        for clip in unseen.split(64):
            z, grids, _ = tok.bottleneck(tok.features(clip))
            codes.append(grids[0].index), back.append(tok.decode(z))
    index, size = torch.cat(codes), math.prod(LEVELS[k]) if how == "fsq" else k
    found |= {"psnr": psnr(torch.cat(back), unseen).mean().item(), "usage": usage(index, size, 0 if fast else 20_000)}
    bits = index.flatten()[:, None].numpy() >> np.arange((size - 1).bit_length()) & 1
    pixels = unseen[:, 0].numel()
    return found | {"perplexity": perplexity(index, size), "bits": 8 * np.packbits(bits.astype(bool)).nbytes / pixels}


# --- alone ----------------------------------------------------------------------------------------------------------------


def alone(seed, fast, how):
    """Usage and relative distortion on all vectors, at the end, for each m."""
    found, n = {}, 512 if fast else 4096
    for m in (0, 1, 3):
        x = torch.randn(n, 16, generator=torch.Generator().manual_seed(seed)) + m
        batches = partial(lambda x, i: x[pick(i, n, 256, seed)], x)
        table = deque(paper.chase(book(how, 512, 16, seed), batches, 20 if fast else 1500), 1)[0].table
        index = nearest(x, table)
        found[f"usage_{m}"] = usage(index, 512)
        found[f"distortion_{m}"] = ((x - table[index]).square().mean() / x.var(0).mean()).item()
    return found


# --- speed and memory -------------------------------------------------------------------------------------------------------


def speed(seed, fast, k):
    """How many times as long, and as much memory, vector-quantize-pytorch's SimVQ takes for a step on the same vectors."""
    from vector_quantize_pytorch import SimVQ as Theirs

    n = 256 if fast else 8192
    z = torch.randn(1, D, n, 1, 1, generator=torch.Generator().manual_seed(seed)).requires_grad_(True)
    ours, theirs = SimVQ(k, D, learn=("weight",)), Theirs(D, k, rotation_trick=False)

    def run():
        out, _, losses = ours(z)
        (out.square().mean() + sum(losses.values())).backward()

    def run_theirs():
        out, _, loss = theirs(z[..., 0, 0].transpose(1, 2))
        (out.square().mean() + loss).backward()

    @torch.no_grad()
    def search():
        ours.search(z)

    @torch.no_grad()
    def search_theirs():
        theirs.eval()(z[..., 0, 0].transpose(1, 2))

    repeats = 5 if fast else 15
    return {"step": measure.ratio(run_theirs, run, repeats).median, "memory": measure.peak(run_theirs) / measure.peak(run),
            "search": measure.ratio(search_theirs, search, repeats).median}  # fmt: skip


# --- what is decided before the run -----------------------------------------------------------------------------------------

ARMS = {
    **{f"{how}, {k}": Arm(tokenizer, how=how, k=k) for how in ("vq", "simvq", "restart") for k in SIZES},
    **{f"{how}, {k}": Arm(tokenizer, how=how, k=k) for how in ("unit", "fsq") for k in (1024, 4096)},
    **{f"{how}, 1024": Arm(tokenizer, how=how, k=1024) for how in ("k-means", "table and layer", "no bias", "bias")},
    **{f"{how}, 1024, centred": Arm(tokenizer, how=how, k=1024, centred=True) for how in ("vq", "simvq")},
    **{f"{how}, alone": Arm(alone, how=how) for how in ("vq", *CELLS, "means", "restart")},
    **{f"speed, {k}": Arm(speed, k=k) for k in (1024, 4096)},
}


def over(metric: str, method: str, baseline: str, margin: float, counts: bool = True, **rest) -> Compare:
    return Compare(f"{metric}: {method} over {baseline}", metric, method, baseline, margin, counts=counts, **rest)


CLAIMS = Claims(
    "simvq",
    arms=ARMS,
    tests=[
        # 1: usage against K
        *(over("usage", f"simvq, {k}", f"vq, {k}", 0.3) for k in (1024, 4096)),
        *(Floor(f"SimVQ keeps {k} codes", "usage", f"simvq, {k}", at_least=0.85) for k in (1024, 4096)),
        *(Floor(f"plain VQ loses {k} codes", "usage", f"vq, {k}", at_most=0.4) for k in (1024, 4096)),
        *(over("psnr", f"simvq, {k}", f"vq, {k}", 0.3) for k in (1024, 4096)),
        *(over("psnr", f"simvq, {k}", f"restart, {k}", -0.3) for k in SIZES),
        *(over("psnr", "simvq, 1024", f"{how}, 1024", 0.0, counts=False) for how in ("k-means", "unit", "fsq")),
        *(over("psnr", "simvq, 4096", f"{how}, 4096", 0.0, counts=False) for how in ("unit", "fsq")),
        # 2: which part matters
        *(over("psnr", "simvq, 1024", f"{how}, 1024", 0.0, counts=False) for how in ("table and layer", "no bias", "bias")),
        over("usage", "simvq, 1024, centred", "vq, 1024, centred", 0.3, counts=False),
        over("psnr", "simvq, 1024, centred", "vq, 1024, centred", 0.3, counts=False),
        *(Floor(f"alone, m = 0: {how} loses nothing", "usage_0", f"{how}, alone", at_least=0.95) for how in ("vq", "simvq")),
        over("usage_1", "simvq, alone", "vq, alone", 0.5),
        over("usage_1", "simvq, alone", "no bias, alone", 0.3),
        over("usage_1", "table and layer, alone", "vq, alone", 0.1),
        over("distortion_1", "restart, alone", "simvq, alone", 0.05, higher=False, relative=True),
        over("usage_3", "bias, alone", "simvq, alone", 0.0, counts=False),
        # 3: growing K helps
        *(over("psnr", f"simvq, {k}", f"simvq, {k // 4}", 0.0) for k in SIZES[1:]),
        over("psnr", "simvq, 4096", "simvq, 256", 0.5),
        over("psnr", "vq, 4096", "vq, 256", 0.5, counts=False),
        over("psnr", "restart, 4096", "restart, 256", 0.5, counts=False),
        # and the price
        *(Floor(f"a step at {k} codes is as fast as the library's", "step", f"speed, {k}", at_least=1.0) for k in (1024, 4096)),
        *(Floor(f"and takes less memory ({k})", "memory", f"speed, {k}", at_least=1.0) for k in (1024, 4096)),
    ],
    minutes=60,
    tolerance={"step": math.inf, "search": math.inf, "memory": 0.05},
)
