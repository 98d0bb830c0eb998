"""FQGAN in a per-frame tokenizer on frames of 32 x 32: what are several small codebooks worth, and what does each say?

All arms have the encoder and decoder of `Tokenizer` (0.25 M parameters, 32 channels, 8 x 8 places), the same frames of `base`
(8,192; 1,024 held-out ones are measured on), begin at principal components, and take 1,000 steps of 16 in the same order,
Adam at 4e-3, codes as running means with restart, unit length, the entropies at a tenth of the paper's weight. These were
settled by runs of as many steps on another seed. Rate: 1e-3, 2e-3, 4e-3 gave 25.6, 26.2, 26.6 dB to two books of 64 and 26.8,
27.4, 27.6 dB to one of 4,096; the reader of captions learns at 1e-3, as at 4e-3 it tells nothing and costs 3 dB. Weight of
the entropies: 0.03 (the paper's), 0.003 and 0 gave 25.1, 26.7 and 26.4 dB to two books, and the first two 25.8 and 26.8 dB to
one of 1,024. Start of the layer after unit codes: that of `Conv3d` left every arm of unit codes near 20 dB.

1. "two, b": two books of 2^(b/2) codes of 8 numbers, an adapter of one block each, lambda 0.1; "three, 12": three books of
   16. "one, b": one book of 2^b codes of 16 numbers behind one adapter of two blocks. "residual, b": behind such an adapter
   two books of 2^(b/2) codes of 16 numbers, the second for what the first leaves over, of any length. "psnr" in dB, "usage"
   and "perplexity" of a book (mean over books, share of it). "two, 0.03", "one, 0.03": 12 bits, the paper's weight.
2. "cos2": squared cosine of the two heads' codes, "mi": mutual information in bits of the two streams of indices, less that
   of the same streams after a shuffle of places (mean of twenty). "lambda 0" and "lambda 1": two books of 64.
3. "captions": as "two, 12", and the second head's codes are read by a class token that must find its caption's bag of words
   among the batch's (weight 0.5). Linear probes (ridge) on the codes of a head, mean over places, tell colour and shape of
   scenes with one body: "first", "second" are the shares of right answers, mean of both, "gap" the second less the first.
4. "writer": codes of "two, 12", a model of three layers of width 64 with captions, 1,500 steps of 16 frames: bits of a place,
   with the second code told the first ("told"), or both by themselves ("alone", as many parameters); "gain" the difference.

Outcome: with the tricks of today one book doesn't die, and then it needs no help. Of its 4,096 codes 96 % are in use, and it
draws 0.7 dB better than two books of 64 (27.6 for 26.8 dB); at 10 bits 0.3 dB, at 8 bits none, where runs of one kind differ
by up to 4 dB. A residual pair of the same bits is 0.5 dB ahead as well at 10 and 12 bits, three books of 16 are behind. What
two books lose is what both say: their codes share 2.7 of 5.7 bits, those of the residual pair 0.9 of 5. L_dis was to mend
that, and doesn't: it takes the squared cosine from 0.14 to 0.01, ten times under chance, and the shared bits stay (2.6
without it, 3.1 at lambda 1, which costs 4 dB): directions at right angles can still change together. A teacher does mend it:
the head that must find its caption tells 64 % of colours and shapes where its twin tells 45 %, 16 points more than the first
head (one seed of three stays under 10), the shared bits fall to 1.8; 1.5 dB are the price, where 0.3 were allowed. A writer
that tells its second code the first pays 3.7 bits a place instead of 4.0, the 0.2 nats that were expected.
"""

from functools import lru_cache
from statistics import fmean

import numpy as np
import torch
from torch import Tensor, nn

from minivid import world
from minivid.block_diffusion.blockvid import bag
from minivid.core import corpus, fit, text
from minivid.core.baselines.vq import VQ, ResidualVQ
from minivid.core.model import Cond
from minivid.core.tokenizer import Tokenizer
from minivid.lab.claims import Arm, Claims, Compare, Floor
from minivid.tokenizers import fqgan as paper
from minivid.tokenizers.fqgan import Adapter, Factorised, Reader, Writer
from minivid.training.recipe import pick
from minivid.world import COLOURS, SHAPES
from minivid.world.scores import mutual_information, perplexity, psnr, usage

D, BATCH, EVEN = 32, 16, 0.003
RATES = {"tok": 4e-3, "reader": 1e-3}
STEPS, WRITE = (1000, 3), (1500, 2)  # full, fast
TRAIN, HELD = (8192, 32), (1024, 16)
RUNNING = dict(decay=0.99, restart=0.1)
WORDS = (*COLOURS, *SHAPES)


class Narrow(nn.Module):
    """A bottleneck of 16 numbers behind the adapter that a single book has."""

    def __init__(self, inside: nn.Module):
        super().__init__()
        self.down, self.inside, self.up = Adapter(D, 16, 2), inside, nn.Conv3d(16, D, 1)

    def forward(self, z):
        value, codes, losses = self.inside(self.down(z))
        return self.up(value), codes, losses


def bottleneck(how: str, k: int, seed: int, lam: float, even: float) -> nn.Module:
    match how:
        case "residual":
            return Narrow(ResidualVQ(*(VQ(k, 16, seed=seed + i, **RUNNING) for i in range(2))))
        case "one":
            return Factorised(D, k, 16, 1, 0, even, seed, {"depth": 2}, **RUNNING)
        case "three":
            return Factorised(D, k, 8, 3, lam, even, seed, **RUNNING)
    return Factorised(D, k, 8, 2, lam, even, seed, **RUNNING)


# --- frames ---------------------------------------------------------------------------------------------------------------


@lru_cache(2)
def frames(split: str, fast: bool) -> tuple[list, Tensor, Tensor]:
    """Scenes, single frames `n 3 1 32 32` and captions' word numbers."""
    n = (TRAIN if split == "train" else HELD)[fast]
    some = corpus.scenes("base", n, 50, split)
    return some, world.batch(some, 32, 1), text.tokens([world.caption(scene) for scene in some])


# --- training -------------------------------------------------------------------------------------------------------------


def trained(seed, fast, folder, how="two", k=64, lam=0.1, told=False, even=EVEN) -> tuple[Tokenizer, Reader | None]:
    """As every arm is trained; a killed run goes on from its checkpoint."""
    torch.manual_seed(seed)
    tok = Tokenizer(D, 1, (32, 64), (1, 2), bottleneck=bottleneck(how, k, seed, lam, even), noise=0.0)
    reader, (_, clips, said) = Reader(8, len(WORDS)) if told else None, frames("train", fast)
    teacher = bag(said, WORDS)
    tok.begin(clips[:512])
    parts = {"tok": tok} | ({"reader": reader} if reader else {})
    heard: list[Tensor] = []  # what the second head says
    if reader:
        tok.bottleneck.books[1].register_forward_hook(lambda book, args, out: heard.append(out[0]) if book.training else None)
    groups = [{"params": list(part.parameters()), "peak": RATES[name]} for name, part in parts.items()]
    adam = torch.optim.Adam(groups, betas=(0.9, 0.99), fused=True)

    def step(state, rows, generator):
        for group in adam.param_groups:
            group["lr"] = group["peak"] * fit.cosine(state.i, STEPS[fast])
        clip = clips[rows]
        back, _, losses = tok(clip)
        if reader:
            losses["told"] = 0.5 * reader.loss(heard.pop(), teacher[rows])
        error = back - clip
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        loss = error.abs().mean() + edges + sum(losses.values())
        adam.zero_grad()
        loss.backward()
        adam.step()
        return {"loss": loss}

    rows = lambda i: pick(i, len(clips), 4 if fast else BATCH, 60 + seed)
    fit.fit(step, fit.State(parts | {"adam": adam}), rows, STEPS[fast], seed, folder / "state.safetensors", 250)
    return tok.eval(), reader


# --- measures -------------------------------------------------------------------------------------------------------------


def told_by(x: Tensor, answers: Tensor) -> float:
    """Share of right answers of a ridge probe that learns from the first half and is asked about the second."""
    x = torch.cat([x, torch.ones(len(x), 1)], 1).double()
    half, target = len(x) // 2, nn.functional.one_hot(answers).double()
    gram = x[:half].T @ x[:half] + 1e-3 * half * torch.eye(x.shape[1]).double()
    weight = torch.linalg.solve(gram, x[:half].T @ target[:half])
    return float(((x[half:] @ weight).argmax(-1) == answers[half:]).double().mean())


def arm(seed, fast, folder, how="two", k=64, **settings):
    return measured(trained(seed, fast, folder, how, k, **settings)[0], fast, how, k)


@torch.no_grad()
def measured(tok: Tokenizer, fast: bool, how: str, k: int) -> dict[str, float]:
    scenes, clips, _ = frames("held-out", fast)
    heads, grids, back = [], [], []
    for clip in clips.split(64):
        z = tok.features(clip)
        value, codes, _ = tok.bottleneck(z)
        heads.append(tok.bottleneck.said(z)[0] if how != "residual" else [])
        grids.append([one.index for one in codes]), back.append(tok.decode(value))
    index = [torch.cat(one) for one in zip(*grids, strict=True)]
    found = {"psnr": psnr(torch.cat(back), clips).mean().item(), "usage": fmean(usage(one, k) for one in index),
             "perplexity": fmean(perplexity(one, k) for one in index)}  # fmt: skip
    if len(index) > 1:
        found["mi"] = float(mutual_information(index[0].flatten(), index[1].flatten()))
    if how in ("two", "three"):
        said = [torch.cat(one) for one in zip(*heads, strict=True)]
        found["cos2"] = paper.disentangled(said).item()
        alone = torch.tensor([len(scene.bodies) == 1 for scene in scenes])
        first = [scene.bodies[0] for scene in scenes if len(scene.bodies) == 1]
        answers = [torch.tensor([list(names).index(getattr(body, what)) for body in first])
                   for what, names in (("colour", COLOURS), ("shape", SHAPES))]  # fmt: skip
        for name, q in zip(("first", "second"), said, strict=False):
            found[name] = fmean(told_by(q[alone].mean((2, 3, 4)), answer) for answer in answers)
        found["gap"] = found["second"] - found["first"]
    return found


def writer(seed, fast, folder):
    tok, _ = trained(seed, fast, folder)
    codes, found = {}, {}
    with torch.no_grad():
        for split in ("train", "held-out"):
            grids = [tok.bottleneck.said(tok.features(clip))[1] for clip in frames(split, fast)[1].split(256)]
            codes[split] = [torch.cat([part[i].index for part in grids]) for i in range(2)]
    mine, said = codes["train"], frames("train", fast)[2]
    for name, alone in (("told", False), ("alone", True)):
        torch.manual_seed(seed)
        model = Writer(64, 2, 64, 3, alone=alone)
        adam = torch.optim.AdamW(model.parameters(), 2e-3, (0.9, 0.99), weight_decay=0.01, fused=True)

        def step(state, rows, generator, model=model, adam=adam):
            adam.param_groups[0]["lr"] = 2e-3 * fit.cosine(state.i, WRITE[fast])
            loss = model.nll([one[rows] for one in mine], Cond(text=said[rows])).mean()
            adam.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            adam.step()
            return {"loss": loss}

        rows = lambda i: pick(i, len(said), 4 if fast else 16, 65 + seed)
        fit.fit(step, fit.State({"model": model, "adam": adam}), rows, WRITE[fast], seed, folder / f"{name}.safetensors", 250)
        model.eval()
        words = frames("held-out", fast)[2]
        with torch.no_grad():
            parts = zip(*(one.split(64) for one in codes["held-out"]), words.split(64), strict=True)
            bits = torch.cat([model.nll([a, b], Cond(text=w)) for a, b, w in parts]).sum(-1).mean() / np.log(2)
        found[name] = float(bits)
    return found | {"gain": found["alone"] - found["told"]}


# --- what is decided before the run -----------------------------------------------------------------------------------------

BITS = (8, 10, 12)
ARMS = {
    **{f"two, {b}": Arm(arm, k=2 ** (b // 2)) for b in BITS},
    **{f"one, {b}": Arm(arm, how="one", k=2**b) for b in BITS},
    **{f"residual, {b}": Arm(arm, how="residual", k=2 ** (b // 2)) for b in BITS},
    "three, 12": Arm(arm, how="three", k=16),
    **{f"lambda {lam}": Arm(arm, lam=lam) for lam in (0, 1)},
    "captions": Arm(arm, told=True),
    "two, 0.03": Arm(arm, even=0.03),
    "one, 0.03": Arm(arm, how="one", k=4096, even=0.03),
    "writer": Arm(writer),
}


def over(metric: str, method: str, baseline: str, margin: float, counts: bool = True, **rest) -> Compare:
    return Compare(f"{metric}: {method} over {baseline}", metric, method, baseline, margin, counts=counts, **rest)


CLAIMS = Claims(
    "fqgan",
    arms=ARMS,
    tests=[
        # 1: vocabulary
        over("psnr", "two, 12", "one, 12", 0.3),
        *(over("psnr", f"two, {b}", f"one, {b}", -0.3) for b in (8, 10)),
        *(over("psnr", f"two, {b}", f"residual, {b}", -0.3, False) for b in BITS),
        over("usage", "two, 12", "one, 12", 0.1, False),
        over("psnr", "three, 12", "two, 12", -0.3, False),
        over("psnr", "two, 0.03", "one, 0.03", 0.3, False),
        # 2: disentanglement
        over("cos2", "two, 12", "lambda 0", 0.5, higher=False, relative=True),
        Floor("under chance, 1/8", "cos2", "two, 12", at_most=0.125),
        over("mi", "two, 12", "lambda 0", 0.0, higher=False),
        over("mi", "lambda 1", "lambda 0", 0.0, False, higher=False),
        over("psnr", "two, 12", "lambda 0", -0.2),
        # 3: division of labour
        Floor("a head that follows captions tells 10 points more", "gap", "captions", at_least=0.1),
        over("second", "captions", "two, 12", 0.1),
        Floor("without captions heads differ by 3 points at most", "gap", "two, 12", at_most=0.03, counts=False),
        over("psnr", "captions", "two, 12", -0.3),
        # 4: the writer
        Floor("the second code is cheaper once the first is told", "gain", "writer", at_least=0.03, counts=False),
    ],
    minutes=60,
)
