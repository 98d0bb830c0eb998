"""Chapter 06 in one table: clips of `video` by every way of the chapter that spends 8, 6, 5, 4, 3 or 2 bits on a weight.

Quantised are the matrices of the six blocks and the time modulation that they share (1.47 M weights); activations stay in
float32, but in QuantVGGT's and QVGen's arms, where the inputs of these layers have 8 bits a token. Every model is measured as
it is stored, with packed layers: "bits" are all bits a weight that these keep, codes, steps, offsets, codebooks, biases. "psnr"
is in dB to the float model's clips from the same noise (24 held-out captions, 20 steps), "colour", "shape" and "motion" are the
shares in which the judge reads back what was asked for, "follows" their mean, "error" is |y - y'|^2 / |y|^2 of the model's
outputs on noisy held-out clips. A seed is another set of captions, noises and calibration clips.

Nearest: a grid as wide as the weights, for a row or for 32 weights of a row; "clipped": a row's, its ends cut off where that
lowers the error. GPTQ: that clipped grid, block after block, each seeing what the quantised ones before it say of 64 clips;
"tuned": its codes stay, steps, offsets and biases learn 500 steps with VQ4DiT's loss. DMMV: from GPTQ's codes, 20 rounds of its
search on 512 inputs (three bits only: it takes the longest). HAWQ-V3: 2, 3, 4, 6 or 8 bits a layer by curvature (32 probes, 16
clips; q, k, v alike), the mean as given, one budget; one symmetric grid a row, nearest ("symmetric": that grid, the same bits
everywhere); "floor": no trace counts less than a quarter of the median of the positive ones. QuantVGGT: rotated, then smoothed,
to the nearest; nothing learnt. VQ4DiT: at 2, 4 and 8 bits 256 codewords of 4, 2 and 1 weights, at 6 bits 64 of one, a codebook
a role, at 3 bits 64 pairs, a codebook a layer, all calibrated as in its own claim at 2 bits. QVGen: trained 400 steps with the
rounding on, helpers of rank 16 that fade; "trained" is the same without helpers; learning rates of both, 3e-4, 1e-3 and 3e-3 at
4, 3 and 2 bits, are the best of two or three on seed 99. ShiftAddViT: powers of two in 5 bits, 300 steps of its distillation;
its attention by additions would be another model, and is left out.

Outcome: down to four bits the model follows captions as before (91 to 94 of 100; the float model 92), by whatever way but
HAWQ-V3's. Below, asking what the layer says is what counts: GPTQ is 4.3 dB nearer than the nearest values on the same grid, at
four bits and at three, where it still follows 89 of 100 captions and they 84 (on unclipped grids 63); cutting the ends off is
worth 0.8 dB of it, at two bits 4. A grid for 32 weights loses 3 dB to a grid a row with one bit more a code, which stores as
much. DMMV's worst-case codes are no better than those of GPTQ, from which they began. At two bits nothing comes near to
training while it rounds: 20.2 dB, after 400 steps without any helper; with helpers that fade it is 3 dB less, at three bits
too. VQ4DiT, which sees no clips, has 19.3, GPTQ 17.3, with tuned steps 18.1, the nearest 9; its calibration is for few bits:
with 8 it leaves 32 dB, where the nearest have 50. Bits shared out by curvature lose 2.9 dB to four bits for all at the same
error of single outputs. 1.9 of that is the symmetric grid; the rest is traces near zero, for which layers get two bits as if
these cost nothing: with a floor under them it is level with four bits on the symmetric grid. Rotating and smoothing bring
nothing on average (this model has no giants, and its inputs have 8 bits besides). Powers of two lose 10 dB to as many bits on
an even grid, with all their training.
"""

import copy
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor, nn

from minivid import world
from minivid.claims import dmmv as lists
from minivid.claims import hawqv3 as curves
from minivid.claims import qvgen as training
from minivid.claims import shiftaddvit as shifts
from minivid.claims import vq4dit as words
from minivid.claims.vq4dit import BLOCKS, FILES, loaded, names
from minivid.core.baselines import quant
from minivid.core.baselines.quant import QuantisedLinear
from minivid.core.model import Cond
from minivid.core.sample import generate
from minivid.core.surgery import Gram, record, swap
from minivid.lab import measure
from minivid.lab.claims import Arm, Claims, Compare, Floor
from minivid.quantization import dmmv, quantvggt, qvgen, shiftaddvit, vq4dit
from minivid.quantization.hawqv3 import curvature, sensitivity
from minivid.world.judge import judge
from minivid.world.scores import psnr

OPTIONS = (2, 3, 4, 6, 8)
PAPERS = "minivid/quantization/"

# --- what is measured ---------------------------------------------------------------------------------------------------


def clips(seed: int, fast: bool, model: nn.Module) -> tuple[Tensor, list]:
    asked, _ = words.asked(9500 + seed, 2 if fast else 24, "held-out")
    captions = [world.caption(scene) for scene in asked]
    return generate(captions, seed, 2 if fast else 20, model=model, tokenizer=loaded("tok-v")), asked


@lru_cache(2)
def wanted(seed: int, fast: bool) -> Tensor:
    return clips(seed, fast, loaded("video"))[0]


def followed(made: Tensor, asked: list) -> dict[str, float]:
    found = judge(made, asked)
    shares = {name: found[name] for name in ("colour", "shape", "motion")}
    return shares | {"follows": sum(shares.values()) / 3}


def whole(seed, fast):
    """The float model."""
    return followed(*clips(seed, fast, loaded("video"))) | {"bits": 32.0}


@torch.no_grad()
@torch.no_grad()
def scored(seed: int, fast: bool, model: nn.Module) -> dict[str, float]:
    """How near the model is to the float one, how well it follows captions, and the bits a weight of what it keeps."""
    made, asked = clips(seed, fast, model)
    lost = [((model(*call) - y).square().sum(), y.square().sum()) for call, y in words.held(seed, fast)["error"]]
    error = (sum(a for a, _ in lost) / sum(b for _, b in lost)).item()
    near = psnr(made, wanted(seed, fast)).mean().item()
    kept = measure.stored_bytes([model.get_submodule(name) for name in names(fast)])
    bits = 8 * kept / sum(m.weight.numel() for m in linears(fast).values())
    return followed(made, asked) | {"bits": bits, "error": error, "psnr": near}


def linears(fast: bool) -> dict[str, nn.Linear]:
    return {name: loaded("video").get_submodule(name) for name in names(fast)}


# --- ways to spend bits, each a model of packed layers ------------------------------------------------------------------


def clipped(w: Tensor, bits: int) -> quant.Steps:
    return quant.search(w, quant.minmax(w, bits, 1), 1, 2.4).stored()


GRIDS = {
    "a row": lambda w, bits: quant.minmax(w, bits, 1),
    "a group of 32": lambda w, bits: quant.minmax(w.unflatten(1, (-1, 32)), bits, -1),
    "clipped": clipped,
    "symmetric": lambda w, bits: quant.symmetric(w, bits, 1),
}


def to_nearest(seed: int, fast: bool, bits: int, grid: str) -> nn.Module:
    """To the nearest value of a grid."""
    grids = {name: GRIDS[grid](m.weight.detach(), bits) for name, m in linears(fast).items()}
    return swap(loaded("video"), {name: QuantisedLinear.of(m, grids[name]) for name, m in linears(fast).items()})


def in_turn(seed: int, fast: bool, recorder: Callable, make: Callable) -> nn.Module:
    """The model's parts, one after the other, each made from what it gets when those before it are quantised."""
    model = loaded("video")
    for place in ("mod", *BLOCKS):
        own = {name: m for name, m in linears(fast).items() if name == place or name.startswith(place + ".")}
        if own:
            record(model, lists.calls(seed, fast, "train"), seen := {name: recorder() for name in own})
            model = swap(model, {name: make(m, seen[name]) for name, m in own.items()})
    return model


def by_gptq(seed: int, fast: bool, bits: int) -> nn.Module:
    """Column by column."""
    return in_turn(seed, fast, Gram, lambda m, seen: QuantisedLinear.of(m, clipped(m.weight.detach(), bits), seen.xx))


def by_search(seed: int, fast: bool, bits: int) -> nn.Module:
    """DMMV: the largest error of each output made small, from GPTQ's codes."""

    def make(m, seen):
        w, x = m.weight.detach(), seen.rows
        s = clipped(w, bits)
        codes, few = quant.gptq(w, x.double().T @ x.double(), s), slice(0, 3 if fast else None)
        way, rows = dmmv.Search(iterations=2 if fast else 20), lists.some(x, 64 if fast else 512, seed)
        mine = s._replace(step=s.step[few], offset=s.offset[few])
        codes[few] = dmmv.layer(w[few], rows, mine, codes[few], way, seed)
        return QuantisedLinear(codes, s, m.bias)

    return in_turn(seed, fast, dmmv.Inputs, make)


def by_tuned_steps(seed: int, fast: bool, bits: int) -> nn.Module:
    """GPTQ's codes stay; steps, offsets and biases learn as VQ4DiT's codebooks do."""
    return words.tuned(by_gptq(seed, fast, bits), names(fast), words.pairs(seed, fast, "walk"))


def by_curvature(seed: int, fast: bool, bits: int, floor: float = 0.0) -> nn.Module:
    """HAWQ-V3: so many bits on average, more where the loss is curved; q, k, v alike. floor: traces count as that share of the
    median of the positive ones at least."""
    model, own = loaded("video"), linears(fast)
    bench = curves.Bench.of(model, seed, fast)
    call, target = curves.calls(seed, 2 if fast else 16, "train")
    loss = lambda: (model(*call) - target).square().mean()
    trace = curvature(loss, model, list(own), torch.Generator().manual_seed(seed), 1 if fast else 32)
    trace = trace.clamp(min=floor * trace[trace > 0].median())
    matrices, at = [m.weight.detach() for m in own.values()], {name: i for i, name in enumerate(own)}
    size = torch.tensor([[float(w.numel() * option) for option in OPTIONS] for w in matrices])
    ties = [(at[bench.names[a]], at[bench.names[b]]) for a, b in bench.ties]
    limit = (size, bits * sum(w.numel() for w in matrices))
    choice = quant.allocate(sensitivity(trace, matrices, OPTIONS), [limit], ties)
    new = {name: QuantisedLinear.of(m, quant.symmetric(m.weight.detach(), OPTIONS[k], 1))
           for (name, m), k in zip(own.items(), choice.tolist(), strict=True)}  # fmt: skip
    return swap(model, new)


class Told(nn.Module):
    """The model as a function of its input alone."""

    def __init__(self, inside: nn.Module, t: Tensor, cond: Cond):
        super().__init__()
        self.inside, self.t, self.cond = inside, t, cond

    def forward(self, x):
        return self.inside(x, self.t, self.cond)


def by_rotation(seed: int, fast: bool, bits: int) -> nn.Module:
    """QuantVGGT: rotated and smoothed, inputs in 8 bits."""
    x, t, cond = lists.calls(seed, fast, "train")[0]
    own, told = [f"inside.{name}" for name in names(fast)], Told(loaded("video"), t, cond)
    how, turns = quantvggt.How((bits, 8)), quantvggt.rotations(told, own, x, seed)
    seen = quantvggt.observe(told, x, how.order, turns, len(x))
    small = quantvggt.quantised(told, how, turns, seen)
    return swap(small, {name: small.get_submodule(name).packed() for name in own}).get_submodule("inside")


def by_training(seed: int, fast: bool, bits: int, rank: int) -> nn.Module:
    """QVGen, inputs in 8 bits; rank 0: without helpers."""
    how, rate = qvgen.Bits(bits, 8, rank), {3: 1e-3, 2: 3e-3}.get(bits, 3e-4)
    tuning = qvgen.Tuning(training.STEPS[fast], rate, seed=seed)
    model, _ = training.trained(seed, fast, how, tuning, mod=True)
    return qvgen.shipped(model)


def by_shifts(seed: int, fast: bool) -> nn.Module:
    """ShiftAddViT's layers: powers of two."""
    model = shiftaddvit.converted(loaded("video"), names(fast), shiftaddvit.Shift)
    model = shifts.tuned(copy.deepcopy(model), seed, fast, "shift")
    return swap(model, {name: model.get_submodule(name).packed() for name in names(fast)})


BOOKS = {8: (1, 256), 6: (1, 64), 4: (2, 256), 3: (2, 64), 2: (4, 256)}  # weights in a group, codewords


def by_codewords(seed: int, fast: bool, bits: int) -> nn.Module:
    """VQ4DiT."""
    d, k = BOOKS[bits]
    book = dict(d=d, k=16 if fast else k, shared=bits != 3)
    s = vq4dit.Settings(**book, **(words.TUNED | (dict(quick=2.0) if fast else {})))
    model = vq4dit.quantised(loaded("video"), words.books(seed, fast, **book, mod=True), s)
    vq4dit.calibrate(model, words.pairs(seed, fast, "walk"), BLOCKS, s)
    return vq4dit.shipped(model)


# --- arms ---------------------------------------------------------------------------------------------------------------


def nearest(seed, fast, bits, grid):
    return scored(seed, fast, to_nearest(seed, fast, bits, grid))


def tuned(seed, fast, bits):
    return scored(seed, fast, by_tuned_steps(seed, fast, bits))


def gptq(seed, fast, bits):
    return scored(seed, fast, by_gptq(seed, fast, bits))


def searched(seed, fast, bits):
    return scored(seed, fast, by_search(seed, fast, bits))


def shared_out(seed, fast, bits, floor=0.0):
    return scored(seed, fast, by_curvature(seed, fast, bits, floor))


def rotated(seed, fast, bits):
    return scored(seed, fast, by_rotation(seed, fast, bits))


def codewords(seed, fast, bits):
    return scored(seed, fast, by_codewords(seed, fast, bits))


def trained(seed, fast, bits, rank):
    return scored(seed, fast, by_training(seed, fast, bits, rank))


def shifted(seed, fast):
    return scored(seed, fast, by_shifts(seed, fast))


# --- what is decided before the run -------------------------------------------------------------------------------------

ALL = (8, 6, 5, 4, 3, 2)
HAWQ = [*FILES, PAPERS + "hawqv3/allocation.py", "minivid/claims/hawqv3.py"]
ARMS = {
    "float": Arm(whole, FILES),
    **{f"nearest, {bits}": Arm(nearest, FILES, bits=bits, grid="a row") for bits in ALL},
    **{f"nearest, a group of 32, {bits}": Arm(nearest, FILES, bits=bits, grid="a group of 32") for bits in ALL},
    **{f"nearest, clipped, {bits}": Arm(nearest, FILES, bits=bits, grid="clipped") for bits in (4, 3, 2)},
    "symmetric, 4": Arm(nearest, FILES, bits=4, grid="symmetric"),
    **{f"gptq, {bits}": Arm(gptq, FILES, bits=bits) for bits in ALL},
    "dmmv, 3": Arm(searched, [*FILES, PAPERS + "dmmv/uses.py", PAPERS + "dmmv/solver.py"], bits=3),
    **{f"hawqv3, {bits}": Arm(shared_out, HAWQ, bits=bits) for bits in OPTIONS[::-1]},
    "hawqv3, floor, 4": Arm(shared_out, HAWQ, bits=4, floor=0.25),
    **{f"gptq, tuned, {bits}": Arm(tuned, [*FILES, PAPERS + "vq4dit.py"], bits=bits) for bits in (3, 2)},
    **{f"quantvggt, {bits}": Arm(rotated, [*FILES, PAPERS + "quantvggt/layers.py"], bits=bits) for bits in ALL},
    **{f"vq4dit, {bits}": Arm(codewords, [*FILES, PAPERS + "vq4dit.py"], bits=bits) for bits in BOOKS},
    **{f"{how}, {bits}": Arm(trained, [*FILES, PAPERS + "qvgen.py", "minivid/claims/qvgen.py"], bits=bits, rank=rank)
       for bits in (4, 3, 2) for how, rank in (("trained", 0), ("qvgen", 16))},
    **{f"qvgen, {bits}": Arm(trained, [*FILES, PAPERS + "qvgen.py", "minivid/claims/qvgen.py"], bits=bits, rank=16)
       for bits in (8, 6)},
    "shiftaddvit, 5": Arm(shifted, [*FILES, PAPERS + "shiftaddvit.py", "minivid/claims/shiftaddvit.py"]),
}


def nearer(method: str, baseline: str, margin: float, counts: bool = True) -> Compare:
    return Compare(f"{method} nearer than {baseline}", "psnr", method, baseline, margin, counts=counts)


CLAIMS = Claims(
    "few-bits",
    arms=ARMS,
    tests=[
        Floor("8 bits, nearest: no eye sees it", "psnr", "nearest, 8", at_least=35.0),
        Compare("4 bits, GPTQ: follows as the float model", "follows", "gptq, 4", "float", -0.05),
        nearer("gptq, 4", "nearest, clipped, 4", 1.0), nearer("gptq, 3", "nearest, clipped, 3", 1.0),
        nearer("gptq, 3", "nearest, clipped, 4", 0.0, False), nearer("nearest, clipped, 3", "nearest, 3", 1.0, False),
        nearer("nearest, a group of 32, 3", "nearest, 4", 0.0),  # fewer stored bits, even so
        nearer("hawqv3, 4", "nearest, 4", 0.0), nearer("hawqv3, 4", "symmetric, 4", 0.0, False),
        nearer("hawqv3, floor, 4", "symmetric, 4", 0.0, False),
        nearer("quantvggt, 4", "nearest, 4", 0.0), nearer("vq4dit, 2", "gptq, 2", 2.0),
        nearer("vq4dit, 2", "gptq, tuned, 2", 0.0), nearer("dmmv, 3", "gptq, 3", 0.0, False),
        nearer("qvgen, 3", "gptq, 3", 0.0), nearer("qvgen, 2", "vq4dit, 2", 0.0), nearer("qvgen, 2", "trained, 2", 0.0),
        nearer("trained, 2", "gptq, tuned, 2", 0.0), nearer("shiftaddvit, 5", "nearest, 5", 0.0),
    ],
    sources=["minivid/core/baselines/quant.py", "minivid/core/surgery.py", "minivid/claims/vq4dit.py", "minivid/claims/dmmv.py"],
    tolerance=0.1,
)  # fmt: skip
