"""QuantVGGT on a small geometry transformer: which order of steps, which clips to calibrate on, and where the tail comes from."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from minivid import world
from minivid.core import weights
from minivid.core.surgery import record
from minivid.lab.claims import Arm, Claims, Compare, Floor
from minivid.lab.papers import ROOT
from minivid.quantization import quantvggt as paper
from minivid.quantization.quantvggt import FRAMES, PAPER, Geometry, How, Views

FILE = "notebooks/papers/quantvggt.safetensors"
ORDERS = {"plain": (), "smooth": ("smooth",), "rotate": ("rotate",), "rotate, smooth": PAPER, "smooth, rotate": PAPER[::-1]}
SPOILT = ("blank", "noise", "inverted")
FEW = 20  # clips of a calibration

# --- material -----------------------------------------------------------------------------------------------------------


def taught(seed: int, clips: int = 768, steps: int = 700, tell=lambda i, loss: None) -> Views:
    """A model of its own."""
    return paper.train(*paper.examples(paper.at_rest(clips, seed)), steps, seed, tell=tell)


@lru_cache(1)
def shipped() -> Views:
    model = Views()
    model.load_state_dict(weights.read(ROOT / FILE)[0])
    return model.float().eval().requires_grad_(False)


@lru_cache(4)
def held(seed: int, n: int) -> tuple[Tensor, Geometry]:
    """Clips that nothing was fitted to, and their geometry."""
    return paper.examples(paper.at_rest(n, 1000 + seed, "held-out"))


def pool(seed: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """n clips to choose from, their categories (what the camera does), and what is wrong with them: -1 nothing, or a place in SPOILT.

    Every twentieth, at random, is blank (one colour), pure noise, or has its contrast inverted.
    """
    clips = world.batch(paper.at_rest(n, 2000 + seed), 32, FRAMES[-1] + 1)[:, :, FRAMES]
    dice, wrong = torch.Generator().manual_seed(seed), torch.full((n,), -1)
    for i, row in enumerate(torch.randperm(n, generator=dice)[: n // 20].tolist()):
        wrong[row] = i % 3
        colour = torch.rand(3, 1, 1, 1, generator=dice) * 2 - 1
        clips[row] = (colour.expand_as(clips[row]), torch.rand(clips[row].shape, generator=dice) * 2 - 1, -clips[row])[i % 3]
    return clips, torch.arange(n) % len(paper.LENSES), wrong


@dataclass
class Bench:
    """A model, the pool with what is known of it, held-out clips and what the model says to them."""

    model: Views
    clips: Tensor
    category: Tensor
    wrong: Tensor
    stay: Tensor
    kind: dict[str, Tensor]
    turns: dict
    tests: tuple[Tensor, Geometry]
    said: Geometry

    @classmethod
    @torch.no_grad()
    def of(cls, model: Views, seed: int, fast: bool) -> "Bench":
        clips, category, wrong = pool(seed, 40 if fast else 200)
        stats, views = paper.deep(model, model.blocks[-2:], model.blocks[-1], clips, len(FRAMES))
        stay = paper.normal(stats, category)
        every = torch.ones_like(stay)
        kind = {"random": torch.zeros(len(clips), dtype=torch.long), "filter only": torch.where(stay, 0, -1),
                "clusters only": paper.kinds(views, every, seed=seed), "filtered, diverse": paper.kinds(views, stay, seed=seed)}  # fmt: skip
        names = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and name.startswith(("frame", "every"))]
        tests = held(seed, 4 if fast else 32)
        turns = paper.rotations(model, names, clips[:1], seed)
        return cls(model, clips, category, wrong, stay, kind, turns, tests, model(tests[0]))

    def drawn(self, how: str, seed: int) -> Tensor:
        return paper.draw(self.kind[how], FEW, seed)


@lru_cache(2)
def bench(seed: int, fast: bool) -> Bench:
    return Bench.of(shipped(), seed, fast)


@lru_cache(2)
def planted(seed: int, fast: bool) -> Bench:
    """The same with outliers put in, which change nothing that is said."""
    return Bench.of(paper.outliers(shipped(), seed), seed, fast)


@torch.no_grad()
def measured(b: Bench, small: nn.Module) -> dict[str, float]:
    """Error beside the whole model, relative, of camera and cells together; the camera's error in pixels to the truth."""
    said = small(b.tests[0])
    parts = [((new - old).square().sum() / old.square().sum()).item() for new, old in zip(said, b.said, strict=True)]
    return {"error": (sum(parts) / len(parts)) ** 0.5, "pan": pan(said, b.tests[1])}


def pan(said: Geometry, true: Geometry) -> float:
    return (said.camera - true.camera)[:, 1:].abs().mean().item()


def scored(model: Views) -> dict[str, float]:
    """How good a model is on held-out clips: pixels that the camera is off, beside a guess of no motion; cells that are right."""
    clips, true = held(99, 64)
    said = model(clips)
    right = ((said.nearer > 0) == (true.nearer > 0.5)).float().mean().item()
    guess = pan(Geometry(torch.zeros_like(true.camera), true.nearer), true)
    return {"pan": pan(said, true), "guess": guess, "right": right, "ground": (true.nearer <= 0.5).float().mean().item()}


def small(b: Bench, how: How, rows: Tensor, epochs: int, seen: dict | None = None) -> nn.Module:
    """The model in few bits, calibrated on some clips of the pool."""
    seen = paper.observe(b.model, b.clips[rows], how.order, b.turns) if seen is None else seen
    new = paper.quantised(b.model, how, b.turns, seen)
    if epochs:
        paper.calibrate(b.model, new, b.model.blocks, b.clips[rows], epochs)
    return paper.folded(new)


# --- arms ---------------------------------------------------------------------------------------------------------------


def rounded(seed, fast, order, clip, bits, outliers=False):
    """One way to round: what is learnt (s, clips or both) is learnt in 15 epochs on the same 20 clips."""
    b = (planted if outliers else bench)(seed, fast)
    how = How((bits, bits), ORDERS[order], clip)
    return measured(b, small(b, how, b.drawn("filtered, diverse", seed), 1 if fast else 15))


def whole(seed, fast):
    b = bench(seed, fast)
    return {"pan": pan(b.said, b.tests[1])}


@lru_cache(4)
def observed(seed: int, fast: bool, order: str) -> dict:
    b = bench(seed, fast)
    return paper.observe(b.model, b.clips, ORDERS[order], b.turns)


def draws(seed, fast, how, bits, order="rotate, smooth"):
    """30 calibrations of static ranges: mean, spread and worst of the error; spoilt clips among the 20."""
    b, errors, bad = bench(seed, fast), [], []
    for i in range(3 if fast else 30):
        rows = b.drawn(how, 100 * seed + i)
        seen = {name: one.of(rows) for name, one in observed(seed, fast, order).items()}
        model = small(b, How((bits, bits), ORDERS[order], static=True), rows, 0, seen)
        errors.append(measured(b, model)["error"])
        bad.append((b.wrong[rows] >= 0).sum().item())
    return spread(errors) | {"spoilt": sum(bad) / len(bad)}


def learnt(seed, fast, how):
    """10 calibrations of s and clips at 4 bits, each token with a range of its own."""
    b, errors = bench(seed, fast), []
    for i in range(2 if fast else 10):
        model = small(b, How(clip=True), b.drawn(how, 100 * seed + i), 1 if fast else 5)
        errors.append(measured(b, model)["error"])
    return spread(errors)


def spread(errors: list[float]) -> dict[str, float]:
    x = torch.tensor(errors)
    return {"mean": x.mean().item(), "spread": x.std().item(), "worst": x.max().item()}


def found(seed, fast):
    """What the filter finds: shares in % of the spoilt clips of each sort that go, and of the sound ones."""
    b = bench(seed, fast)
    share = lambda rows: 100 * (1 - b.stay[rows].float().mean().item())
    return {"sound": share(b.wrong < 0)} | {name: share(b.wrong == i) for i, name in enumerate(SPOILT)}


# --- what is decided before the run -------------------------------------------------------------------------------------

CLAIMS = Claims("quantvggt", arms={"whole": Arm(whole, [FILE])}, tests=[Floor("x","pan","whole",at_most=1.0)])
