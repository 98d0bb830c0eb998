"""MoDeGPT on `video`: what is the loss when 10, 30 or 50 % of the blocks' matrices go, and which of its parts does it?

A share is that of the numbers in the matrices of the six blocks (self-attention, attention to words, feed-forward); time
modulation, text encoder, inlet and head stay and are counted in "parameters" alone (millions, all of the model). "rise" is by
how much the flow matching loss grows on 128 held-out clips at fixed times and noise, "error" |y - y'|^2 / |y|^2 of the outputs.
Calibration sees 256 training clips (20,480 tokens), with times and empty captions as in training. Nothing is fine-tuned.

A seed is a draw of calibration clips, held-out clips, times and noise; the model is one. The arm "small models" is for the
others: each seed trains a generator of its own (width 64, 6 blocks, 600 steps) and compares on it.

"modegpt" takes the epsilon of five that is best on a quarter of the calibration clips. Rivals: plain SVD of every matrix;
SVD whitened by the inputs, at one share for all or with ranks shared out by relative energy (all that reach break-even stay
whole); pruning by the norms of weights, of the same widths; one share for all blocks ("uniform"); shares found by measuring
the loss at every step of a tenth of a block ("greedy").

Outcome: where 30 % go, shrinking widths costs a quarter less loss than SVD whitened at one share, on the small generators 40 %
less, and next to nothing beside plain SVD or pruning; but with its ranks shared out the whitened SVD is level, and clips are as
near to the whole model's. At 10 % it costs a fifth of what SVD does, at 50 % weighted SVD wins by a tenth. The fit does most of
it: choosing units by leverage instead of norm takes 32 % off the error of a feed-forward, the fit 71 %. The allocation is
reproduced in part: influence holds block 0, then block 5 for what matters most, and its best epsilon takes 5 % off the rise of
even shares, with an interval that reaches below 0; at 50 % even shares are better; a greedy search that measures the loss takes
42 % off. And a rotation has its price: where queries and keys don't turn, an SVD of their product errs 90 times less than any
choice of columns, and where they do, turning aside, 15 times.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from einops import rearrange
from torch import Tensor, nn

from minivid import world
from minivid.core import corpus, fit, noise, text, weights
from minivid.core.baselines.lowrank import Factored, keep_rows, linear, rank_for
from minivid.core.model import Cond
from minivid.core.sample import generate
from minivid.core.surgery import Gram, record, swap
from minivid.lab import measure
from minivid.lab.claims import Arm, Claims, Compare, Floor
from minivid.low_rank import modegpt as paper
from minivid.low_rank.modegpt import Pair, Seen
from minivid.training.command import multiplies, optimisers, stepper
from minivid.training.generators import generate_loss
from minivid.training.recipe import Recipe, pick
from minivid.world.judge import judge
from minivid.world.scores import psnr

FILES = [f"minivid/weights/{name}.safetensors" for name in ("video", "tok-v")]
CALIBRATION, HELD = (256, 8), (128, 4)  # clips: full, fast
CLIPS, STEPS = 2048, 600  # of a small model's training
EPSILONS = (0.03, 0.1, 0.3, 1.0, 3.0)
EVEN = float("inf")
Call = tuple[Tensor, Tensor, Cond]

# --- material -----------------------------------------------------------------------------------------------------------


@lru_cache(8)
def clips(seed: int, n: int, split: str) -> tuple[Tensor, Tensor]:
    """Latents and words of n clips."""
    tok, asked = weights.load("tok-v"), corpus.scenes("base", n, 20_000 + seed, split)
    with torch.no_grad():
        latent = torch.cat([tok.encode(world.batch(asked[i : i + 32], 32, 17)) for i in range(0, n, 32)])
    return latent, text.tokens([world.caption(scene) for scene in asked])


def noisy(latent: Tensor, words: Tensor, seed: int, times: tuple[float, float] = (0.0, 1.0)) -> list[tuple[Call, Tensor]]:
    """Calls of 32 clips, and what the model should say. Times as in training, or even ones of an interval."""
    out, path = [], noise.flow()
    for i in range(0, len(latent), 32):
        x, dice = latent[i : i + 32], fit.draws(seed, i)
        t = noise.logit_normal(len(x), x.shape[2], dice, 3.0)
        if times != (0.0, 1.0):
            t = (times[0] + (times[1] - times[0]) * fit.uniform(len(x), 1, generator=dice)).expand_as(t)
        eps, gone = fit.normal(*x.shape, generator=dice), fit.uniform(len(x), generator=dice) < 0.1
        out.append(((path.at(x, eps, t), t, Cond(text=words[i : i + 32]).drop(gone)), path.target(x, eps, t)))
    return out


@dataclass
class Bench:
    """A model, what it is calibrated with and measured on, and what calibration found."""

    model: nn.Module
    calibration: list
    held: list
    pairs: list[Pair]
    seen: Seen
    said: list[Tensor]  # what the model says to the held-out calls

    @classmethod
    def of(cls, model: nn.Module, seed: int, fast: bool, counts: tuple[int, int] | None = None) -> "Bench":
        """counts: of calibration and of held-out clips, where the claim's are too many"""
        many, few = counts or (CALIBRATION[fast], HELD[fast])
        calibration = noisy(*clips(seed, many, "train"), seed)
        held = noisy(*clips(seed, few, "held-out"), 1000 + seed)
        pairs = [p for p in paper.find(model, "trunk") if not fast or p.block in ("trunk.blocks.0", "trunk.blocks.1")]
        seen = paper.observe(model, pairs, [call for call, _ in calibration])
        with torch.no_grad():
            return cls(model, calibration, held, pairs, seen, [model(*call) for call, _ in held])

    def size(self, widths: dict[Pair, int] | None = None) -> int:
        return sum(p.size(self.model, p.full if widths is None else widths[p]) for p in self.pairs)

    @property
    def layers(self) -> dict[str, nn.Linear]:
        return {name: self.model.get_submodule(name) for p in self.pairs for name in p.layers}


@lru_cache(3)
def bench(seed: int, fast: bool) -> Bench:
    return Bench.of(weights.load("video"), seed, fast)


@torch.no_grad()
def loss(model: nn.Module, calls: list) -> float:
    return torch.cat([(model(*call) - target).square().flatten(1).mean(1) for call, target in calls]).mean().item()


@torch.no_grad()
def measured(b: Bench, model: nn.Module) -> dict[str, float]:
    """Rise of the loss, relative error of the outputs, parameters in millions."""
    made, said, targets = (torch.cat(x) for x in ([model(*call) for call, _ in b.held], b.said, [target for _, target in b.held]))
    rise = (made - targets).square().mean() - (said - targets).square().mean()
    error = (made - said).square().sum() / said.square().sum()
    return {"rise": rise.item(), "error": error.item(), "parameters": measure.parameters(model) / 1e6}


def work(b: Bench, model: nn.Module) -> float:
    """FLOPs of a call beside those of the whole model."""
    (x, t, cond), _ = b.held[0]
    one, two = (measure.flops(lambda model=model: model(x[:1], t[:1], Cond(text=cond.text[:1]))) for model in (model, b.model))
    return one / two


# --- ways to cut --------------------------------------------------------------------------------------------------------


def modular(b: Bench, share: float, epsilon: float) -> nn.Module:
    return paper.shrink(b.model, b.seen, paper.plan(b.model, b.pairs, b.seen.influence, share, epsilon))


def chosen(b: Bench, share: float) -> tuple[float, nn.Module]:
    """The epsilon with the least loss on the first quarter of the calibration calls, and its model."""
    some, tried = b.calibration[: -(-len(b.calibration) // 4)], EPSILONS[: 1 + len(b.calibration)]  # in the fast form 2
    made = {epsilon: modular(b, share, epsilon) for epsilon in tried}
    best = min(tried, key=lambda epsilon: loss(made[epsilon], some))
    return best, made[best]


def greedy(b: Bench, share: float, step: float) -> nn.Module:
    """Block by block, `step` of a block at a time, wherever the loss on 32 calibration clips then is least."""
    removed = dict.fromkeys(b.seen.influence, 0.0)
    widths = lambda removed: {p: p.kept(min(removed[p.block], paper.CAP)) for p in b.pairs}
    while b.size(widths(removed)) > share * b.size():
        ways = [removed | {block: less + step} for block, less in removed.items() if less + step < paper.CAP + 1e-6]
        removed = min(ways, key=lambda way: loss(paper.shrink(b.model, b.seen, widths(way)), b.calibration[:1]))
    scaled = (widths({block: less * part / 500 for block, less in removed.items()}) for part in range(501))
    return paper.shrink(b.model, b.seen, next(way for way in scaled if b.size(way) <= share * b.size()))


@lru_cache(3)
def inputs(seed: int, fast: bool) -> dict[str, Tensor]:
    """X'X of what enters every layer."""
    return entering(bench(seed, fast))


def entering(b: Bench) -> dict[str, Tensor]:
    grams = {name: Gram() for name in b.layers}
    record(b.model, [call for call, _ in b.calibration], grams)
    return {name: gram.xx for name, gram in grams.items()}


def factored(b: Bench, share: float, grams: dict[str, Tensor] | None = None, shared_out: bool = False) -> nn.Module:
    """Every matrix as two, plain or whitened; at one share, or with ranks shared out among them."""
    ranks = {name: rank_for(layer.out_features, layer.in_features, share) for name, layer in b.layers.items()}
    left = share * b.size() - sum(ranks[name] * sum(layer.weight.shape) for name, layer in b.layers.items())
    for name, layer in b.layers.items():  # whole ranks leave something over
        if left >= sum(layer.weight.shape):
            ranks[name], left = ranks[name] + 1, left - sum(layer.weight.shape)
    if shared_out and grams is not None:
        ranks = shares_of_energy(b, share, grams)
    whole = lambda layer, rank: rank * sum(layer.weight.shape) >= layer.weight.numel()
    return swap(b.model, {name: Factored.of(layer, ranks[name], None if grams is None else grams[name])
                          for name, layer in b.layers.items() if not whole(layer, ranks[name])})  # fmt: skip


def shares_of_energy(b: Bench, share: float, grams: dict[str, Tensor]) -> dict[str, int]:
    """Ranks by the energy of outputs, relative to the layer's, that a further term brings for its numbers."""
    terms = []
    for name, layer in b.layers.items():
        o, i = layer.weight.shape
        energy = torch.linalg.svdvals(layer.weight.double() @ paper.roots(grams[name])[0]).square()
        terms += [(e / energy.sum().item() / (o + i), name, o + i) for e in energy[: o * i // (o + i)].tolist()]
    ranks, left = dict.fromkeys(b.layers, 0), share * b.size()
    for _, name, numbers in sorted(terms, reverse=True):
        if left >= numbers:
            ranks[name], left = ranks[name] + 1, left - numbers
    return ranks


@torch.no_grad()
def pruned(b: Bench, share: float) -> nn.Module:
    """The widths of "uniform"; what stays has the largest product of the norms of its weights on both sides."""
    widths, gram, new = paper.plan(b.model, b.pairs, b.seen.influence, share, EVEN), {}, {}
    for p, width in widths.items():
        own = [b.layers[name] for name in p.layers]
        if p.kind == "qk":  # W W' in the place of Q'Q: then scores are norms of weights
            gram |= {name: (w := rearrange(layer.weight, "(k d) i -> k d i", d=p.full)) @ w.mT
                     for name, layer in zip(p.layers, own, strict=True)}  # fmt: skip
            continue
        size = own[0].weight.norm(dim=1) * own[1].weight.norm(dim=0)
        keep = torch.cat([keep_rows(head[:, None], width / p.full) for head in size.view(-1, p.full)])
        made = (linear(own[0].weight[keep], own[0].bias[keep]), linear(own[1].weight[:, keep], own[1].bias))
        new |= dict(zip(p.layers, made, strict=True))
    return swap(paper.shrink(b.model, Seen({}, gram), {p: w for p, w in widths.items() if p.kind == "qk"}), new)


# --- arms ---------------------------------------------------------------------------------------------------------------


@lru_cache(40)
def cut(seed: int, fast: bool, how: str, share: float) -> tuple[nn.Module, dict[str, float]]:
    """The model, cut, and what was chosen for it."""
    b = bench(seed, fast)
    match how:
        case "modegpt":
            epsilon, model = chosen(b, share)
            return model, {"epsilon": epsilon}
        case "greedy":
            return greedy(b, share, 0.4 if fast else 0.1), {}
        case "svd":
            return factored(b, share), {}
        case "whitened" | "whitened, shared out":
            return factored(b, share, inputs(seed, fast), how != "whitened"), {}
        case "pruned":
            return pruned(b, share), {}
    return modular(b, share, EVEN if how == "uniform" else float(how)), {}


def model_level(seed, fast, how, share):
    model, found = cut(seed, fast, how, share)
    found |= {} if fast else {"flops": work(bench(seed, fast), model)}
    return measured(bench(seed, fast), model) | found


def asked_for(seed: int, fast: bool) -> list:
    return corpus.scenes("base", 1 if fast else 24, 21_000 + seed, "held-out")


@lru_cache(8)
def generated(seed: int, fast: bool, how: str, share: float) -> Tensor:
    """Clips by the whole model or by a smaller one, from the same noise."""
    model = weights.load("video") if how == "whole" else cut(seed, fast, how, share)[0]
    return generate([world.caption(s) for s in asked_for(seed, fast)], seed, 2 if fast else 20, model=model)


def drawn(seed, fast, how, share):
    """PSNR in dB to what the whole model draws from the same noise; shares of colours and motions that the judge reads back."""
    whole = generated(seed, fast, "whole", 1.0)
    made = whole if how == "whole" else generated(seed, fast, how, share)
    read = judge(made, asked_for(seed, fast))
    return {"colour": read["colour"], "motion": read["motion"]} | (
        {} if how == "whole" else {"psnr": psnr(made, whole).mean().item()})  # fmt: skip


def units(seed, fast, how):
    """Relative error of the six feed-forwards on held-out clips when 30 % of their hidden units go."""
    b = bench(seed, fast)
    mlps = [p for p in b.pairs if p.kind == "mlp"]
    unseen = paper.observe(b.model, mlps, [call for call, _ in b.held])
    errors = []
    for p in mlps:
        up, down = (b.layers[name] for name in p.layers)
        c, k, dice = b.seen.gram[p.layers[-1]], p.kept(0.3), torch.Generator().manual_seed(seed)
        size = up.weight.norm(dim=1) * down.weight.norm(dim=0)
        draws = {
            "leverage": [paper.leverage(c)], "largest": [size], "largest, no fit": [size], "busiest": [c.diagonal()],
            "random": [torch.rand(p.full, generator=dice) for _ in range(1 if fast else 8)],
        }[how]  # fmt: skip
        for score in draws:
            keep = score.topk(k).indices.sort().values
            mix = torch.eye(p.full, dtype=torch.float64)[keep] if how == "largest, no fit" else paper.nystroem(c, keep)
            gap = torch.eye(p.full, dtype=torch.float64)
            gap[keep] -= mix  # h - h[:, J] M = h gap
            errors.append(relative(gap @ down.weight.T.double(), down.weight.T.double(), unseen.gram[p.layers[-1]]))
    return {"error": sum(errors) / len(errors)}


def relative(gap: Tensor, w: Tensor, c: Tensor, other: Tensor | None = None) -> float:
    """|X gap|^2 / |X w|^2 with C = X'X, or, with other = Y'Y as well, |X gap Y'|^2 / |X w Y'|^2."""
    size = lambda m: (m * (c @ m if other is None else c @ m @ other)).sum()
    return (size(gap) / size(w)).item()


class WithOne(Gram):
    """X'X of rows with a 1 at their end, which carries the bias."""

    def add(self, x):
        super().add(torch.cat([x, torch.ones_like(x[..., :1])], -1))


def scores(seed, fast, how, where):
    """Relative error of q.k before the softmax, on held-out clips, when 30 % of each head go. Rotations are left out."""
    b = bench(seed, fast)
    pairs, errors = [p for p in b.pairs if p.kind == "qk" and ("cross" in p.layers[0]) == (where == "cross")], []
    seen, unseen = ({name: WithOne() for p in pairs for name in p.layers} for _ in range(2))
    for grams, calls in ((seen, b.calibration), (unseen, b.held)):
        record(b.model, [call for call, _ in calls], grams)
    for p in pairs:
        wide = [torch.cat([b.layers[name].weight.T, b.layers[name].bias[None]]).double() for name in p.layers]
        q, k = (w.unflatten(1, (p.heads, -1)).movedim(1, 0) for w in wide)  # k d+1 e
        c, e = ([grams[name].xx for name in p.layers] for grams in (seen, unseen))
        r = round(0.7 * p.full)
        if how == "svd":
            (root, back), (root2, back2) = (paper.roots(x, 1e-9) for x in c)
            u, s, v = torch.linalg.svd(root @ q @ k.mT @ root2)
            thin = back @ (u[..., :r] * s[:, None, :r]) @ v[:, :r] @ back2
        else:
            keep = paper.products(q.mT @ c[0] @ q, k.mT @ c[1] @ k, False).topk(r).indices[:, None]
            thin = torch.take_along_dim(q, keep, 2) @ torch.take_along_dim(k, keep, 2).mT
        errors += [relative(w - t, w, e[0], e[1]) for w, t in zip(q @ k.mT, thin, strict=True)]
    return {"error": sum(errors) / len(errors)}


def levels(seed, fast):
    """What noise changes: influence of the blocks in four intervals of time; the units kept at both ends; their price."""
    b = bench(seed, fast)
    latent, words = (x[: 4 if fast else 64] for x in clips(seed, CALIBRATION[fast], "train"))
    calls = [noisy(latent, words, seed, (i / 4, (i + 1) / 4)) for i in range(4)]
    seen = [paper.observe(b.model, b.pairs, [call for call, _ in some]) for some in calls]
    mlps, both = [p for p in b.pairs if p.kind == "mlp"], []
    for p in mlps:
        ends = [set(paper.leverage(s.gram[p.layers[-1]]).topk(p.kept(0.3)).indices.tolist()) for s in (seen[0], seen[3])]
        both.append(len(ends[0] & ends[1]) / len(ends[0]))
    found = {f"influence_{block.split('.')[2]}_{i}": s.influence[block] for i, s in enumerate(seen) for block in s.influence}
    widths = paper.plan(b.model, b.pairs, b.seen.influence, 0.7, EVEN)
    for name, one in (("clean", seen[0]), ("noise", seen[3])):
        found[f"rise_{name}"] = measured(b, paper.shrink(b.model, one, widths))["rise"]
    return found | {"overlap": sum(both) / len(both)}


def trained(seed: int, fast: bool, folder) -> nn.Module:
    """A small generator, trained on 2,048 clips as `video` is; in the fast form random, with open gates."""
    torch.manual_seed(seed)
    settings = dict(channels=10, d=64, heads=2)
    model = weights.build("video", settings)
    if fast:
        for p in model.parameters():
            nn.init.normal_(p, std=0.2)
        return model.eval().requires_grad_(False)
    data = corpus.latents(weights.load("tok-v"), f"base-{CLIPS}x17x32", corpus.clips("base", CLIPS, 32, 17))
    words = corpus.captions("base", CLIPS)

    def batches(i):
        rows = pick(i, CLIPS, 32, seed)
        return data[rows].float(), words[rows]

    recipe = Recipe("video", settings, lambda device: batches, generate_loss(3.0), STEPS, 3e-3, 32, muon=1e-2)
    state = fit.State({"model": model, **optimisers(model, recipe), "ema": fit.Ema(model)})
    fit.fit(stepper(recipe, STEPS, multiplies("cpu")), state, batches, STEPS, seed, folder / "model.safetensors", 100)
    model.load_state_dict(state.ema.state_dict())
    return model.eval().requires_grad_(False)


def small(seed, fast, folder):
    """On a generator of its own: the held-out loss, the rise by MoDeGPT at 70 %, and by how much smaller it is than of others."""
    b = Bench.of(trained(seed, fast, folder), seed, fast)
    rise = lambda model: measured(b, model)["rise"]
    ours = rise(chosen(b, 0.7)[1])
    others = {"whitened": factored(b, 0.7, entering(b)), "pruned": pruned(b, 0.7), "uniform": modular(b, 0.7, EVEN)}
    found = {f"under_{name}": 1 - ours / rise(other) for name, other in others.items()}
    return {"loss": loss(b.model, b.held), "rise": ours} | found


# --- what is decided before the run -------------------------------------------------------------------------------------

RIVALS = ("svd", "whitened", "whitened, shared out", "pruned", "uniform")
CUTS = {0.9: ("modegpt", "whitened"), 0.7: ("modegpt", *RIVALS, "greedy", *map(str, EPSILONS)), 0.5: ("modegpt", *RIVALS)}
ARMS = {
    **{f"{how}, {100 * share:.0f} %": Arm(model_level, FILES, how=how, share=share)
       for share, hows in CUTS.items() for how in hows},
    **{f"units: {how}": Arm(units, FILES, how=how) for how in ("leverage", "random", "largest", "busiest", "largest, no fit")},
    **{f"scores to {where}: {how}": Arm(scores, FILES, how=how, where=where)
       for where in ("cross", "self") for how in ("cr", "svd")},
    **{f"clips: {how}, {100 * share:.0f} %": Arm(drawn, FILES, how=how, share=share)
       for how, share in (("whole", 1.0), ("modegpt", 0.9), ("modegpt", 0.7), ("modegpt", 0.5), ("whitened", 0.7))},
    "noise levels": Arm(levels, FILES),
    "small models": Arm(small, FILES[1:]),
}  # fmt: skip


def less(metric: str, method: str, baseline: str, margin: float, counts: bool = True) -> Compare:
    return Compare(f"{metric}: {method} under {baseline}", metric, method, baseline, margin, False, True, counts)


def rises(baseline: str, share: int, margin: float, counts: bool = True, method: str = "modegpt") -> Compare:
    return less("rise", f"{method}, {share} %", f"{baseline}, {share} %", margin, counts)


CLAIMS = Claims(
    "modegpt",
    arms=ARMS,
    tests=[
        # 1: of a feed-forward
        less("error", "units: leverage", "units: random", 0.05),
        less("error", "units: leverage", "units: largest", 0.0),
        less("error", "units: largest", "units: largest, no fit", 0.5),
        less("error", "units: leverage", "units: busiest", 0.0, counts=False),
        # 2: of the model
        rises("whitened", 70, 0.2), rises("svd", 70, 0.5), rises("pruned", 70, 0.5),
        Floor("small models: under whitened", "under_whitened", "small models", at_least=0.2),
        Floor("small models: under pruned", "under_pruned", "small models", at_least=0.5),
        rises("whitened, shared out", 70, 0.0, counts=False),
        *(rises(how, 50, 0.0, counts=False) for how in ("whitened", "whitened, shared out", "svd", "pruned")),
        rises("whitened", 90, 0.0, counts=False),
        Compare("clips: nearer than whitened", "psnr", "clips: modegpt, 70 %", "clips: whitened, 70 %", 0.0, counts=False),
        # 3: of the allocation
        rises("uniform", 70, 0.0),
        rises("uniform", 50, 0.0, counts=False),
        rises("uniform", 70, 0.1, counts=False, method="greedy"), rises("greedy", 70, 0.0, counts=False),
        Floor("small models: under uniform", "under_uniform", "small models", at_least=0.0, counts=False),
        # 4: the price of a rotation
        *(less("error", f"scores to {where}: svd", f"scores to {where}: cr", 0.0) for where in ("cross", "self")),
        # noise levels
        Floor("both ends of time keep the same units", "overlap", "noise levels", at_least=0.8, counts=False),
    ],
    minutes=30,
    tolerance=0.1,
)  # fmt: skip
