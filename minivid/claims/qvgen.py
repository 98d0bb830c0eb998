"""QVGen on `video`: what helpers do to gradients, what is left of it when they are gone, and whether it matters how they go.

Quantised are the 60 linear layers of the six blocks (1.38 M weights), per row, and their inputs, per token; the rest stays. All
arms train 400 steps (T_ph = 80) on the same batches of 8 of 2,048 training clips, the same times and noise, taught by the float
model (its outputs at the same noisy clip, no other loss); "QAT" is the same without helpers, "1.15 times" with 460 steps. A
seed is a draw of batches, times and noise, and of held-out clips; the model is one.

"norm" is the norm of the gradient over the weights W, before clipping, and "loss" the training loss, means over the first third
of the steps. "error" is |y - y'|^2 / |y|^2 of the model's outputs over held-out clips (held-out captions) at ten levels of
noise, "walk" the same along trajectories that the float model samples. Helpers are always off there, but for "kept": the error
of the model whose helpers never go, with them. "integer" is the error when offsets are then rounded to whole steps, as integer
engines need them. "psnr" is in dB between clips made from the same noise, colour, shape and motion are shares of bodies that
the judge reads back from them (24 held-out captions, ten steps); "float" is the teacher. "rounded" is the start: searched
grids, nothing learnt.

Removals of the same helper: "QVGen" by rank, "fade" as a whole and linearly, "dropped" at four fifths of the steps, "never".
Learning rates are the best of four for each method and width, from `sweep` on seed 99, whose batches and clips belong to no seed
here; 4 bits take those of 3 bits. Errors at 3e-4, 1e-3, 3e-3, 1e-2: W3A3 0.093, 0.088, 0.084, 0.092 without helpers and 0.095,
0.085, 0.081, 0.093 with; W2A4 0.101, 0.076, 0.067, 0.080 without and 0.157, 0.123, 0.098, 0.097 with (0.058 and 0.081 after twice
as many steps at 3e-3).

Outcome: what helpers do is there, and it is little. In 3 bits, gradients of the first third are 2 % smaller (20 were asked for;
11 % in W2A4) and the loss is 3 % lower. When helpers are gone the error is 1.3 % lower than without them (5 were asked for),
and 3 % higher than after 1.15 times as many steps of QAT. With 4 bits it is 4 % higher, and with W2A4 46 %, though the rate is
its own best: two bits lean on the helper, and 400 steps are too few to learn to do without. Fading as a whole is as good as by
rank (1 % better, within the draws), and both beat dropping, by 3 and 2 %. Helpers that never go bring no more than 3 % either:
inputs of 3 bits lose most, and a helper sees them as rounded too. What counts is training at all: 54, 84 and 32 % less error
than rounding at W3A3, W2A4 and W4A4. Whole offsets, as an integer engine needs them, cost half as much error again in 3 bits,
and in 2 bits five times as much without helpers, two and a half times with.
"""

from functools import lru_cache
from statistics import fmean

import torch
from torch import Tensor, nn

from minivid import world
from minivid.claims.vq4dit import FILES, asked, held, loaded, names
from minivid.core import corpus
from minivid.core.sample import generate
from minivid.lab.claims import Arm, Claims, Compare
from minivid.quantization import qvgen as paper
from minivid.quantization.qvgen import Bits, Tuning
from minivid.training.recipe import pick
from minivid.world.judge import judge
from minivid.world.scores import psnr

CLIPS, STEPS, BATCH, DRAWN = (2048, 4), (400, 5), (8, 2), 24  # full, fast; the last in full only
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
LR = {(3, 3): (3e-3, 3e-3), (2, 4): (3e-3, 1e-2), (4, 4): (3e-3, 3e-3)}  # without and with helpers

# --- training -----------------------------------------------------------------------------------------------------------


@lru_cache(1)
def material(fast: bool) -> tuple[Tensor, Tensor]:
    """Latents of training clips, and their captions."""
    n = CLIPS[fast]
    data = corpus.latents(loaded("tok-v"), f"base-{n}x17x32", corpus.clips("base", n, 32, 17))
    return data.float(), corpus.captions("base", n)


def trained(
    seed: int, fast: bool, bits: Bits, tuning: Tuning, removal: str = "by_rank", mod: bool = False
) -> tuple[nn.Module, list[dict]]:
    """A student, and loss and norm of each of its steps. mod: quantise the time modulation too."""
    data, words = material(fast)
    student = paper.quantised(loaded("video"), names(fast, mod), bits)

    def batches(i):
        rows = pick(i, len(data), BATCH[fast], seed)
        return data[rows], words[rows]

    return student, paper.distil(student, loaded("video"), batches, tuning, getattr(paper, removal))


def sweep(weights: int = 3, inputs: int = 3, steps: int = STEPS[False]) -> None:
    """Print how each method does at each rate: `python -c "from minivid.claims.qvgen import sweep; sweep(3, 3)"`."""
    torch.set_num_threads(1)
    for rate in RATES:
        for rank in (0, 16):
            student, _ = trained(99, False, Bits(weights, inputs, rank), Tuning(steps, rate, seed=99))
            print(f"W{weights}A{inputs}, rate {rate}, rank {rank}: {lost(99, False, student, 'error'):.4f}", flush=True)


# --- measuring ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def lost(seed: int, fast: bool, model: nn.Module, kind: str) -> float:
    """Relative squared error of the outputs over the calls of one kind."""
    calls = held(seed, fast)[kind]
    gap = sum((model(*call) - y).square().sum().item() for call, y in calls)
    return gap / sum(y.square().sum().item() for _, y in calls)


def drawn(seed: int, model: nn.Module) -> Tensor:
    """Clips of held-out captions."""
    captions = [world.caption(scene) for scene in asked(9000 + seed, DRAWN, "held-out")[0]]
    return generate(captions, 9000 + seed, 10, model=model, tokenizer=loaded("tok-v"))


@lru_cache(2)
def wanted(seed: int) -> Tensor:
    return drawn(seed, loaded("video"))


def measured(seed: int, fast: bool, model: nn.Module) -> dict[str, float]:
    found = {kind: lost(seed, fast, model, kind) for kind in ("error", "walk")}
    if fast:
        return found
    clips = drawn(seed, model)
    read = judge(clips, asked(9000 + seed, DRAWN, "held-out")[0])
    return found | {"psnr": psnr(clips, wanted(seed)).mean().item()} | {k: read[k] for k in ("colour", "shape", "motion")}


# --- arms ---------------------------------------------------------------------------------------------------------------


def tuned(seed, fast, weights, inputs, rank=16, removal="by_rank", longer=1.0):
    tuning = Tuning(round(longer * STEPS[fast]), LR[weights, inputs][rank > 0], seed=seed)
    student, told = trained(seed, fast, Bits(weights, inputs, rank), tuning, removal)
    first = told[: len(told) // 3]
    found = {what: fmean(step[what] for step in first) for what in ("norm", "loss")} | measured(seed, fast, student)
    if removal == "never":
        found["kept"] = lost(seed, fast, student.train(), "error")
        student.eval()
    for layer in paper.layers(student).values():
        layer.grid.offset.data = (layer.grid.offset / layer.grid.step).round() * layer.grid.step
    return found | {"integer": lost(seed, fast, student, "error")}


def rounded(seed, fast, weights, inputs):
    return measured(seed, fast, paper.quantised(loaded("video"), names(fast, False), Bits(weights, inputs, 0)))


def teacher(seed, fast):
    """Its clips as the judge reads them (that they are its own is left out)."""
    return {what: value for what, value in measured(seed, fast, loaded("video")).items() if what != "psnr"}


# --- what is decided before the run -------------------------------------------------------------------------------------

WIDTHS = {"W3A3": dict(weights=3, inputs=3), "W2A4": dict(weights=2, inputs=4), "W4A4": dict(weights=4, inputs=4)}
HOW = {"QAT": dict(rank=0), "QVGen": {}}
MORE = {"QAT, 1.15 times": dict(rank=0, longer=1.15), "fade": dict(removal="as_one"), "dropped": dict(removal="at_once"),
        "never": dict(removal="never")}  # fmt: skip
ARMS = {
    "float": Arm(teacher, FILES),
    **{f"{width}: rounded": Arm(rounded, FILES, **bits) for width, bits in WIDTHS.items()},
    **{f"{width}: {how}": Arm(tuned, FILES, **bits, **s) for width, bits in WIDTHS.items() for how, s in HOW.items()},
    **{f"W3A3: {how}": Arm(tuned, FILES, **WIDTHS["W3A3"], **s) for how, s in MORE.items()},
}


def less(metric: str, width: str, method: str, baseline: str, margin: float = 0.0, counts: bool = True) -> Compare:
    """`margin` is a share of the baseline's value."""
    name = f"{width}: {metric} of {method} under {baseline}"
    return Compare(name, metric, f"{width}: {method}", f"{width}: {baseline}", margin, False, True, counts)


CLAIMS = Claims(
    "qvgen",
    arms=ARMS,
    tests=[
        # 1: while helpers are there
        less("norm", "W3A3", "QVGen", "QAT", 0.2),
        less("loss", "W3A3", "QVGen", "QAT"),
        *(less(what, width, "QVGen", "QAT", counts=False) for width in ("W2A4", "W4A4") for what in ("norm", "loss")),
        # 2: when they are gone
        less("error", "W3A3", "QVGen", "QAT", 0.05),
        less("error", "W2A4", "QVGen", "QAT", 0.05),
        less("error", "W3A3", "QVGen", "QAT, 1.15 times"),
        less("error", "W4A4", "QVGen", "QAT", counts=False),
        *(less("walk", width, "QVGen", "QAT", counts=False) for width in WIDTHS),
        *(Compare(f"{width}: clips nearer to the teacher's", "psnr", f"{width}: QVGen", f"{width}: QAT", 0.0, counts=False)
          for width in WIDTHS),
        # 3: how they go
        less("error", "W3A3", "QVGen", "fade"),
        less("error", "W3A3", "fade", "dropped"),
        less("error", "W3A3", "QVGen", "dropped"),
    ],
    minutes=30,
    sources=["minivid/quantization/qvgen.py", "minivid/claims/vq4dit.py"],
    tolerance=0.1,
)
