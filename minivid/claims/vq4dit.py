"""VQ4DiT on `video`: what codewords cost at about 2 bits a weight, codebooks counted, and which part of the method helps.

Quantised are the matrices of the six blocks and the time modulation that they share (1.47 M weights); the rest stays. "error" is
|y - y'|^2 / |y|^2 of the model's outputs over held-out clips (held-out captions) at ten levels of noise, "walk" the same along
trajectories that the float model samples for held-out captions, "psnr" in dB between clips sampled from the same noise, "weights"
the relative error of the weights, "bits" all bits a weight, with codebooks, steps and offsets in fp16. A seed is a draw of
noise and captions (or clips), of held-out clips, and of k-means' start; the model is one.

Calibration, the same for all: 20 runs of the float model's sampler, ten steps each, two captions, so 200 steps; "real data"
takes training clips with noise at the same times instead. GPTQ sees half of these calls, block after block, each with what the
quantised blocks before say, on clip-searched grids; "gptq, tuned" learns its steps, offsets and biases by the same loss and
steps. Grids have one step and offset a row of 128 (2.25 bits) or a group of 64 (2.5): more bits than the codewords'
2.09, so the baseline is favoured. Lloyd's rounds are 30. Codebooks learn at 3e-3 in all arms, logits at 5e-2, lambda_r is 300,
from short trials on captions and noise of no seed here: 3e-3 was the best of three for n = 1, the baseline.

At 4 bits codewords are pairs, 256 of them, one book for all layers of a role (4.06 bits, GPTQ 4.25). "matrix" is a check without
a model: 256 x 256 random weights, Gaussian or heavy-tailed (t with 5 degrees of freedom).
"""

from collections.abc import Iterator
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivid import world
from minivid.core import corpus, fit, noise, text, weights
from minivid.core.baselines import quant
from minivid.core.baselines.quant import QuantisedLinear, Steps
from minivid.core.model import Cond
from minivid.core.sample import generate, start
from minivid.core.surgery import Gram, parts, record, swap
from minivid.lab.claims import Arm, Claims, Compare, Floor
from minivid.quantization import vq4dit as paper
from minivid.quantization.vq4dit import Settings
from minivid.world.scores import psnr

FILES = [f"minivid/weights/{name}.safetensors" for name in ("video", "tok-v")]
BLOCKS = tuple(f"trunk.blocks.{i}" for i in range(6))
RUNS, STEPS, CLIPS, HELD = (20, 1), (10, 2), (2, 2), (16, 2)  # full, fast
SHIFT = 3.0  # of the sampler's times, as `generate` has it
TUNED = dict(slow=3e-3, weight=300.0)
SEARCHED = 30  # Lloyd's rounds

# --- material -----------------------------------------------------------------------------------------------------------


@lru_cache(2)
def loaded(name: str) -> nn.Module:
    return weights.load(name)


def names(fast: bool, mod: bool = True) -> list[str]:
    """The layers that are quantised: those of all blocks (in the fast form of the first), and the time modulation."""
    where = BLOCKS[0] if fast else "trunk"
    return [name for name, _, role in parts(loaded("video"))
            if name.startswith(where) and role != "block" or mod and name == "mod"]  # fmt: skip


def asked(seed: int, n: int, split: str) -> tuple[list, Cond]:
    found = corpus.scenes("base", n, 30_000 + seed, split)
    return found, Cond(text=text.tokens([world.caption(scene) for scene in found], 16))


def real(seed: int, fast: bool, n: int, split: str) -> Iterator[tuple]:
    """Calls of n clips with noise, one at each time of the sampler's table."""
    found, cond = asked(seed, n, split)
    with torch.no_grad():
        latent = torch.cat([loaded("tok-v").encode(world.batch(found[i : i + 8], 32, 17)) for i in range(0, n, 8)])
    for i, t in enumerate(noise.table(STEPS[fast], latent.shape[2], SHIFT)[:-1]):
        eps = fit.normal(*latent.shape, generator=fit.draws(seed, 1000 + i))
        yield noise.flow().at(latent, eps, t), t.expand(n, -1), cond


def walked(seed: int, fast: bool, n: int, split: str) -> Iterator[paper.Pair]:
    """The float model's calls, and what its blocks say, on its way from noise to n clips."""
    _, cond = asked(seed, n, split)
    times = noise.table(STEPS[fast], 5, SHIFT)
    return paper.walk(loaded("video"), start(n, loaded("tok-v").latent_shape(17, 32, 32), seed), cond, times, BLOCKS)


@lru_cache(2)
def pairs(seed: int, fast: bool, how: str) -> list[paper.Pair]:
    """What the student is calibrated with."""
    found = []
    for run in range(RUNS[fast]):
        if how == "walk":
            found += walked(100 * seed + run, fast, CLIPS[fast], "train")
        else:
            calls = real(100 * seed + run, fast, CLIPS[fast], "train")
            found += [(call, paper.heard(loaded("video"), call, BLOCKS)[0]) for call in calls]
    return found


@lru_cache(2)
def held(seed: int, fast: bool) -> dict[str, list]:
    """Calls that nothing was fitted to, with what the float model says."""
    n = HELD[fast]
    calls = {"error": list(real(9000 + seed, fast, n, "held-out")),
             "walk": [call for call, _ in walked(9000 + seed, fast, n, "held-out")]}  # fmt: skip
    with torch.no_grad():
        return {name: [(call, loaded("video")(*call)) for call in some] for name, some in calls.items()}


@torch.no_grad()
def measured(seed: int, fast: bool, model: nn.Module) -> dict[str, float]:
    found = {}
    for name, some in held(seed, fast).items():
        lost = sum((model(*call) - y).square().sum() for call, y in some)
        found[name] = (lost / sum(y.square().sum() for _, y in some)).item()
    if not fast:
        captions = [world.caption(scene) for scene in asked(9000 + seed, 8, "held-out")[0]]
        draw = lambda one: generate(captions, seed, 10, model=one, tokenizer=loaded("tok-v"))
        found["psnr"] = psnr(draw(model), draw(loaded("video"))).mean().item()
    return found


def apart(model: nn.Module, own: list[str]) -> float:
    """Relative squared error of the weights."""
    now = [model.get_submodule(name).weight.detach() for name in own]
    was = [loaded("video").get_submodule(name).weight for name in own]
    lost = sum((a - b).square().sum() for a, b in zip(now, was, strict=True))
    return (lost / sum(b.square().sum() for b in was)).item()


# --- codewords ----------------------------------------------------------------------------------------------------------


@lru_cache(4)
def books(seed: int, fast: bool, d: int, k: int, shared: bool, mod: bool) -> dict[str, Tensor]:
    s = Settings(d=d, k=k, shared=shared)
    dice = torch.Generator().manual_seed(seed)
    return paper.books(loaded("video"), names(fast, mod), s, dice, 2 if fast else SEARCHED)


def codewords(seed, fast, data="walk", d=4, k=128, shared=False, mod=True, **more):
    """Codewords, calibrated with `data` ("": not at all). more: of the Settings."""
    s = Settings(d=d, k=k, shared=shared, **(TUNED | more))
    model = paper.quantised(loaded("video"), books(seed, fast, d, k, shared, mod), s)
    told = paper.calibrate(model, pairs(seed, fast, data), BLOCKS, s) if data else []
    for layer in paper.layers(model).values():
        layer.settle()
    found = measured(seed, fast, model) | {"bits": paper.bits(model)["total"], "weights": apart(model, names(fast, mod))}
    if data and s.n > 1:
        own = paper.layers(model).values()
        second = sum((layer.index != layer.options[0]).sum().item() for layer in own)
        found |= {"second": second / sum(len(layer.index) for layer in own), "frozen": told[-1]["frozen"],
                  "frozen_20": told[min(19, len(told) - 1)]["frozen"]}  # fmt: skip
    return found


# --- even grids ---------------------------------------------------------------------------------------------------------


def grid(w: Tensor, bits: int, group: int) -> Steps:
    """Steps and offsets `o g 1`, clip-searched for the least squared error."""
    x = w.unflatten(1, (-1, min(group, w.shape[1])))
    return quant.search(x, quant.minmax(x, bits, -1), -1).stored()


class Even(nn.Module):
    """Weights on a grid whose steps, offsets and bias learn; the codes stay."""

    def __init__(self, layer: QuantisedLinear):
        super().__init__()
        self.codes, self.s = quant.quantise(layer.weight, layer_steps(layer).each(layer.weight)), layer_steps(layer)
        self.step, self.offset = nn.Parameter(self.s.step), nn.Parameter(self.s.offset)
        self.bias = nn.Parameter(layer.bias.detach().clone())

    def forward(self, x):
        s = self.s._replace(step=self.step, offset=self.offset).each(self.codes)
        return F.linear(x, quant.dequantise(self.codes, s), self.bias)


def layer_steps(layer: QuantisedLinear) -> Steps:
    return Steps(layer.step.float(), layer.offset.float(), layer.low, layer.high)


def even(seed, fast, how, bits=2, group=128, mod=True):
    """Grids: rounded to the nearest, by GPTQ, or by GPTQ and then tuned."""
    model, own = loaded("video"), names(fast, mod)
    calls = [call for call, _ in pairs(seed, fast, "walk")[::2]]
    for place in ("mod", *BLOCKS):  # each sees what those before it make of its inputs
        now = [name for name in own if name == place or name.startswith(place + ".")]
        grams = {name: Gram() for name in now}
        if now and how != "rounded":
            record(model, calls, grams)
        layers = {name: loaded("video").get_submodule(name) for name in now}
        model = swap(model, {name: QuantisedLinear.of(layer, grid(layer.weight, bits, group),
                                                      None if how == "rounded" else grams[name].xx)
                             for name, layer in layers.items()})  # fmt: skip
    steps = 32 * sum(model.get_submodule(name).step.numel() for name in own)
    cost = bits + steps / sum(loaded("video").get_submodule(name).weight.numel() for name in own)
    found = {"bits": cost, "weights": apart(model, own)}
    if how == "tuned":
        model = swap(model, {name: Even(model.get_submodule(name)) for name in own})
        paper.calibrate(model, pairs(seed, fast, "walk"), BLOCKS, Settings(**TUNED))
    return measured(seed, fast, model) | found


# --- random matrices ----------------------------------------------------------------------------------------------------


def matrix(seed, fast, how, tails):
    """Relative squared error of a random matrix, and its bits a weight."""
    side, dice = 64 if fast else 256, torch.Generator().manual_seed(seed)
    w = torch.randn(side, side, generator=dice)
    if tails == "heavy":  # Student's t: a normal over the root of a mean of five squares
        w = w / torch.randn(5, side, side, generator=dice).square().mean(0).sqrt()
    if how in ("uniform", "min-max"):
        x = w.unflatten(1, (-1, 64))
        s = quant.minmax(x, 2, -1)
        s = (quant.search(x, s, -1) if how == "uniform" else s).stored()
        new, bits = quant.dequantise(quant.quantise(x, s), s).flatten(1), 2 + 32 / 64
    else:
        d, k = (4, 256) if how == "codewords" else (2, 16)
        linear = nn.Linear(side, side)
        linear.weight.data = w
        s = Settings(d=d, k=k, n=1)
        model = paper.quantised(nn.Sequential(linear), paper.books(nn.Sequential(linear), ["0"], s, dice), s)
        new, bits = model[0].weight.detach(), paper.bits(model)["total"]
    return {"weights": ((new - w).square().sum() / w.square().sum()).item(), "bits": bits}


# --- what is decided before the run -------------------------------------------------------------------------------------

KINDS = ("codewords", "cheap codewords", "uniform", "min-max")
ARMS = {
    "vq": Arm(codewords, FILES),
    "k-means alone": Arm(codewords, FILES, data="", n=1),
    "n = 1": Arm(codewords, FILES, n=1),
    "n = 1, taken anew": Arm(codewords, FILES, n=1, again=50),
    "n = 3": Arm(codewords, FILES, n=3),
    "as released": Arm(codewords, FILES, released=True),
    "real data": Arm(codewords, FILES, data="real"),
    "rounded, 2.25 bits": Arm(even, FILES, how="rounded"),
    "gptq, 2.25 bits": Arm(even, FILES, how="gptq"),
    "gptq, 2.5 bits": Arm(even, FILES, how="gptq", group=64),
    "gptq, tuned": Arm(even, FILES, how="tuned"),
    "vq, 4 bits": Arm(codewords, FILES, d=2, k=256, shared=True),
    "gptq, 4 bits": Arm(even, FILES, how="gptq", bits=4),
    "vq, modulation whole": Arm(codewords, FILES, mod=False),
    "gptq, modulation whole": Arm(even, FILES, how="gptq", mod=False),
    "k-means alone, a book a role": Arm(codewords, FILES, data="", n=1, k=256, shared=True),
    "k-means alone, k = 64": Arm(codewords, FILES, data="", n=1, k=64),
    "k-means alone, k = 256": Arm(codewords, FILES, data="", n=1, k=256),
    **{f"matrix, {tails} tails: {how}": Arm(matrix, how=how, tails=tails) for tails in ("light", "heavy") for how in KINDS},
}  # fmt: skip


def less(method: str, baseline: str, margin: float, counts: bool = True, metric: str = "error") -> Compare:
    """`margin` is a share of the baseline's value."""
    return Compare(f"{metric}: {method} under {baseline}", metric, method, baseline, margin, False, True, counts)


CLAIMS = Claims(
    "vq4dit",
    arms=ARMS,
    tests=[
        # 1: codewords against even grids
        *(less("vq", f"{how} bits", 0.15) for how in ("rounded, 2.25", "gptq, 2.25", "gptq, 2.5")),
        less("gptq, 4 bits", "vq, 4 bits", -0.15),
        less("vq", "gptq, tuned", 0.0),
        *(less("vq", f"{how} bits", 0.15, False, "walk") for how in ("gptq, 2.25", "gptq, 2.5")),
        less("vq, modulation whole", "gptq, modulation whole", 0.15, False),
        Compare("clips: nearer than gptq", "psnr", "vq", "gptq, 2.25 bits", 0.0, counts=False),
        *(less(f"matrix, {tails} tails: codewords", f"matrix, {tails} tails: uniform", 0.15, False, "weights")
          for tails in ("light", "heavy")),
        # 2: choices learnt
        less("vq", "n = 1", 0.1),
        less("n = 3", "n = 1", 0.1),
        less("vq", "n = 1, taken anew", 0.0),
        less("as released", "n = 1", 0.1, False),
        less("n = 1", "k-means alone", 0.0, False),
        Floor("choices aren't made before they are learnt", "frozen_20", "vq", at_most=0.5, counts=False),
        # 3: no data
        less("vq", "real data", -0.1),
    ],
    minutes=30,
    tolerance=0.1,
)
