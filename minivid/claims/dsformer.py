"""DSFormer on `video`: what does D S err at equal storage, is it worth learning its places, and does it beat low rank?

What is compressed: all matrices of self-attention, attention to words and feed-forward of the six blocks, 1.4 of 1.9 million
numbers. A share is that of their bits, places included; all else, biases too, stays. "rise" is by how much the flow matching
loss grows on 128 held-out clips at fixed times and noise: the gap to the dense model. Calibration sees 256 training clips.

"matrices": relative errors |X (W - D S)| / |X W| without any training, mean over the twelve matrices of the feed-forwards
("mlp"), or over those of attention in two blocks. Where X isn't said to weigh, X is the identity; else it is what enters on
held-out clips, while both sides were fitted to calibration clips in the same norm. "grouped" holds one number in each group,
the best of two sizes of groups; "free" holds its numbers anywhere, the best of two widths of D.

Tuned arms all have the same inputs, teacher, 500 steps of 8 clips, Adam without decay, and of three rates the one that is best
on 64 further training clips after a run of 60 steps: the target is what the dense model says. "shadow", "projected" and "fixed"
begin as the same D S, whose pattern is chosen for each matrix by its error: groups of 1 (low rank), 2, 4 or 8; "blind" ones by
the error of the weights, without a look at inputs, as the paper's start is blind to the task. "low rank" begins as the weighted
SVD; "pruned" keeps 2 of every 4 numbers by size times size of the input, refitted to make up for those that go: at 16 bits a
number it takes 56 % of the bits, for there is no such pattern of a half. "start" is the rise before any tuning.

A seed is a draw of training clips, held-out clips, times and noise, and of the columns that D begins with; the model is one.

Outcome: at half the storage D S errs 27 to 36 % less than the best low rank on the matrices of the feed-forwards, however many
bits a number has and whether or not inputs weigh; on those of attention 4 to 14 % less, but for groups at 16 bits with inputs
weighed, which are 1 % worse. In the model, tuned for as many steps, it rises 29 % (at half) and 22 % (at a third) less than low
rank. That its places are worth learning is not reproduced: the shadow moves 6 to 10 % of the numbers, and the rise is 1.5 % less
than where all stay, 20 were asked for; from a blind start, five times as bad, 2 % move and it is 0.8 %. What tuning brings (0.79
down to 0.18) the numbers bring, not their places. And two of every four numbers, refitted, rise by a third less than D S at
half, for 56 % of the bits instead of 49. Low rank, and D S at half, chose 1e-3 in every draw, the least rate that was tried:
both might gain by a smaller one. The pruned and the blind ones chose 3e-3.
"""

import copy
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivid import world
from minivid.core import corpus, fit, noise, text, weights
from minivid.core.baselines.lowrank import Factored, keep_n_of_m, rank_for
from minivid.core.model import Cond
from minivid.core.surgery import swap
from minivid.lab.claims import Arm, Claims, Compare
from minivid.low_rank import dsformer as paper
from minivid.low_rank.dsformer import DenseSparse, Pattern

FILES = [f"minivid/weights/{name}.safetensors" for name in ("video", "tok-v")]
CLIPS, CALIBRATION, HELD, JUDGED = (512, 8), (256, 8), (128, 4), (64, 4)  # full, fast
STEPS, TRY, BATCH = (500, 3), (60, 1), 8
RATES = (1e-3, 3e-3, 1e-2)
Call = tuple[Tensor, Tensor, Cond]

# --- material -----------------------------------------------------------------------------------------------------------


@lru_cache(8)
def clips(seed: int, n: int, split: str, first: int = 0) -> tuple[Tensor, Tensor]:
    """Latents and words of n clips."""
    tok, asked = weights.load("tok-v"), corpus.scenes("base", n, 30_000 + seed, split, first)
    with torch.no_grad():
        latent = torch.cat([tok.encode(world.batch(asked[i : i + 32], 32, 17)) for i in range(0, n, 32)])
    return latent, text.tokens([world.caption(scene) for scene in asked])


def noisy(latent: Tensor, words: Tensor, seed: int, size: int = 32) -> list[tuple[Call, Tensor]]:
    """Calls of `size` clips with times, noise and empty captions as in training, and what the model should say."""
    out, path = [], noise.flow()
    for i in range(0, len(latent), size):
        x, dice = latent[i : i + size], fit.draws(seed, i)
        t, eps = noise.logit_normal(len(x), x.shape[2], dice, 2.0), fit.normal(*x.shape, generator=dice)
        told = Cond(text=words[i : i + size]).drop(fit.uniform(len(x), generator=dice) < 0.1)
        out.append(((path.at(x, eps, t), t, told), path.target(x, eps, t)))
    return out


@lru_cache(2)
def dense() -> nn.Module:
    return weights.load("video")


@lru_cache(2)
def layers(fast: bool) -> dict[str, nn.Linear]:
    """What is compressed; in the fast form two matrices."""
    found = paper.find(dense(), "trunk")
    few = ("attention.v", "fc2")
    return {name: part for name, part in found.items() if not fast or name in [f"trunk.blocks.1.{last}" for last in few]}


@lru_cache(2)
def entering(seed: int, fast: bool, split: str = "train") -> dict[str, Tensor]:
    """X'X of what enters every layer, of calibration or of held-out clips."""
    n = (CALIBRATION if split == "train" else HELD)[fast]
    latent, words = clips(seed, CLIPS[fast] if split == "train" else n, split)
    calls = noisy(latent[:n], words[:n], seed)
    return paper.inputs(dense(), layers(fast), [call for call, _ in calls])


@lru_cache(1)
@torch.no_grad()
def lessons(seed: int, fast: bool) -> list[tuple[Call, Tensor]]:
    """The batch of every step of tuning: a call, and what the dense model says to it."""
    material, found, i = clips(seed, CLIPS[fast], "train"), [], 0
    while len(found) < STEPS[fast]:
        found += [(call, dense()(*call)) for call, _ in noisy(*material, 40_000 + 100 * seed + i, BATCH)]
        i += 1
    return found[: STEPS[fast]]


@lru_cache(4)
def held(seed: int, fast: bool, split: str = "held-out") -> list[tuple[Call, Tensor]]:
    """What is measured on: held-out clips, or, to choose a rate, training clips that tuning doesn't see."""
    n = HELD if split == "held-out" else JUDGED
    return noisy(*clips(seed, n[fast], split, 0 if split == "held-out" else 10_000), 1000 + seed)


@torch.no_grad()
def loss(model: nn.Module, calls: list) -> float:
    return torch.cat([(model(*call) - target).square().flatten(1).mean(1) for call, target in calls]).mean().item()


# --- matrices -----------------------------------------------------------------------------------------------------------


def scattered(m: int, n: int, share: float, r: int, width: int) -> Pattern | None:
    """As many numbers anywhere in a column as fit beside r columns of D."""
    k = min(r, int((share * width * m * n - width * m * r) / (n * (width + (r - 1).bit_length())) + 1e-9))
    return Pattern(r, r, k) if k >= 1 else None


def approximations(layer: nn.Linear, how: str, share: float, width: int) -> list[Pattern]:
    """The patterns of a kind that are tried on a matrix."""
    m, n = sorted(layer.weight.shape)
    if how == "svd":
        return [Pattern(rank_for(layer.out_features, layer.in_features, share))]
    if how == "grouped":
        return [p for group in ((4, 8) if n > m else (2, 4)) if (p := paper.fitting(m, n, share, group, width))]
    return [p for r in ((3 * m // 4, m) if n > m else (m // 4, m // 3)) if (p := scattered(m, n, share, r, width))]


def matrices(seed, fast, how, width, weighted):
    """Relative errors at half the storage."""
    fitted, seen = (entering(seed, fast, split) if weighted else {} for split in ("train", "held-out"))
    errors: dict[str, list[float]] = {"mlp": [], "fc1": [], "fc2": [], "attention": []}
    for name, layer in layers(fast).items():
        last = name.rpartition(".")[2]
        if not last.startswith("fc") and not fast and ".blocks.1." not in name and ".blocks.4." not in name:
            continue
        tried = approximations(layer, how, 0.5, width)[: 1 if fast else None]
        made = [DenseSparse.of(layer, p, fitted.get(name), seed).merge().weight for p in tried]
        best = min(made, key=lambda w, layer=layer, name=name: paper.error(layer, w, fitted.get(name)))
        for kind in ("mlp", last) if last.startswith("fc") else ("attention",):
            errors[kind].append(paper.error(layer, best, seen.get(name)) ** 0.5)
    return {kind: sum(values) / len(values) for kind, values in errors.items() if values}


# --- models -------------------------------------------------------------------------------------------------------------


class Pruned(nn.Linear):
    """A linear layer of which only the numbers in `mask` speak."""

    def forward(self, x):
        return F.linear(x, self.weight * self.mask, self.bias)


@torch.no_grad()
def pruned(layer: nn.Linear, gram: Tensor) -> Pruned:
    """2 of every 4: the largest |w| |x|, then least squares of the outputs with what stays."""
    mask, new = keep_n_of_m(layer.weight * gram.diagonal().sqrt()), Pruned(layer.in_features, layer.out_features)
    index, eye = mask.nonzero()[:, 1].view(len(mask), -1), 1e-6 * gram.diagonal().mean() * torch.eye(len(gram))
    right, own = (layer.weight.double() @ gram).gather(1, index), (gram + eye)[index[:, :, None], index[:, None]]
    new.weight.zero_().scatter_(1, index, torch.linalg.solve(own, right).float())
    new.bias.copy_(layer.bias)
    new.register_buffer("mask", mask)
    return new


@lru_cache(4)
def started(seed: int, fast: bool, how: str, share: float) -> dict[str, nn.Module]:
    """The layers before tuning. D S is the same whatever becomes of its places."""
    grams = entering(seed, fast)
    if how == "low rank":
        rank = lambda x: rank_for(x.out_features, x.in_features, share)
        return {name: Factored.of(x, rank(x), grams[name]) for name, x in layers(fast).items()}
    if how == "pruned":
        return {name: pruned(layer, grams[name]) for name, layer in layers(fast).items()}
    minded, groups = {} if how == "blind" else grams, (1, 4) if fast else (1, 2, 4, 8)
    return {name: paper.choose(layer, share, minded.get(name), groups, seed=seed) for name, layer in layers(fast).items()}


def bits(layer: nn.Linear, new: nn.Module) -> int:
    """Stored at 16 bits a number; in the 2:4 format a place is two more."""
    m, n = sorted(layer.weight.shape)
    if isinstance(new, DenseSparse):
        return new.pattern.bits(m, n)
    return 16 * new.rank * (m + n) if isinstance(new, Factored) else m * n // 4 * (2 * 16 + 2 * 2)


def fresh(seed: int, fast: bool, how: str, share: float) -> dict[str, nn.Module]:
    """Copies of the layers before tuning."""
    kind = how if how in ("low rank", "pruned") else "blind" if how.startswith("blind") else "D S"
    return {name: copy.deepcopy(layer) for name, layer in started(seed, fast, kind, share).items()}


def tuned(seed, fast, how, share, folder):
    """Rise of the loss before and after tuning, the rate that was chosen, the share of numbers whose place is new."""
    calls, teach = held(seed, fast), lessons(seed, fast)
    distil = lambda model, batch: F.mse_loss(model(*batch[0]), batch[1])
    places = how.split()[-1] if how.endswith(("shadow", "projected")) else "fixed"

    def run(rate, steps, path=None):
        new = fresh(seed, fast, how, share)
        model = swap(dense(), new)
        churn = paper.tune(model, list(new.values()), distil, lambda i: teach[i], steps, rate, places, path)
        return model, new, churn

    tried = {rate: loss(run(rate, TRY[fast])[0], held(seed, fast, "train")) for rate in (RATES[:2] if fast else RATES)}
    rate = min(tried, key=tried.get)
    model, new, _ = run(rate, STEPS[fast], folder / "state.safetensors")
    old = fresh(seed, fast, how, share)
    before, full = loss(dense(), calls), layers(fast)
    moving = [(new[name].mask, x.mask) for name, x in old.items() if isinstance(x, DenseSparse) and x.pattern.place]
    found = {"rise": loss(model, calls) - before, "start": loss(swap(dense(), old), calls) - before, "rate": rate}
    found["bits"] = sum(bits(full[name], x) for name, x in new.items()) / sum(16 * x.weight.numel() for x in full.values())
    if moving:
        found["moved"] = sum((a & ~b).sum().item() for a, b in moving) / sum(b.sum().item() for _, b in moving)
    return found


# --- what is decided before the run -------------------------------------------------------------------------------------

NORMS = {f"{width} bits{', weighted' if weighted else ''}": (width, weighted) for width in (32, 16) for weighted in (False, True)}
TUNED = {33: ("shadow", "fixed", "projected", "blind shadow", "blind fixed", "low rank"), 50: ("shadow", "low rank", "pruned")}
ARMS = {
    **{f"matrices: {how}, {name}": Arm(matrices, FILES, how=how, width=width, weighted=weighted)
       for name, (width, weighted) in NORMS.items() for how in ("svd", "grouped", "free")},
    **{f"{how}, {share} %": Arm(tuned, FILES, how=how, share=share / 100) for share, hows in TUNED.items() for how in hows},
}  # fmt: skip


def less(metric: str, method: str, baseline: str, margin: float, counts: bool = True) -> Compare:
    return Compare(f"{metric}: {method} under {baseline}", metric, method, baseline, margin, False, True, counts)


def errs(how: str, norm: str, metric: str, margin: float, counts: bool = True) -> Compare:
    return less(metric, f"matrices: {how}, {norm}", f"matrices: svd, {norm}", margin, counts)


CLAIMS = Claims(
    "dsformer",
    arms=ARMS,
    tests=[
        # 1: matrices at half the storage
        *(errs("grouped", norm, "mlp", 0.0) for norm in NORMS),
        *(errs("free", norm, "mlp", 0.15) for norm in NORMS),
        *(errs(how, norm, "attention", 0.0, counts=False) for how in ("grouped", "free") for norm in NORMS),
        # 2: places that are learnt, of the gap to the dense model
        less("rise", "shadow, 33 %", "fixed, 33 %", 0.2),
        less("rise", "shadow, 33 %", "projected, 33 %", 0.2),
        less("rise", "blind shadow, 33 %", "blind fixed, 33 %", 0.2),
        # 3: models at equal storage and steps
        *(less("rise", f"shadow, {share} %", f"low rank, {share} %", 0.0) for share in (50, 33)),
        less("rise", "shadow, 50 %", "pruned, 50 %", 0.0),
        less("rise", "fixed, 33 %", "low rank, 33 %", 0.0, counts=False),
        *(less("start", f"shadow, {share} %", f"low rank, {share} %", 0.0, counts=False) for share in (50, 33)),
    ],
    minutes=30,
    tolerance=0.1,
)  # fmt: skip
