"""What a recipe is: everything that decides a file of shipped weights, in one record."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Recipe:
    """How one file of shipped weights is made.

    kind, settings: what the model is (see weights.build)
    material:       `material(device) -> batches`, where `batches(i)` is the batch of step i
    objective:      `objective(model, batch, generator) -> {name: loss}`; the first is minimised
    steps, batch, lr: length, clips a step, peak learning rate (warm-up, then cosine to 0)
    muon:           peak learning rate of the matrices inside transformer blocks, by Muon; without it they too take AdamW and lr
    begin, end:     `begin(model, batches)`, once, on a fresh model; `end` likewise on the trained one, before it is shipped
    start:          shipped weights to begin from, of the same shapes, instead of random ones
    half:           multiply in bfloat16 where that is fast; convolutions with few channels are slower in it on a CPU
    """

    kind: str
    settings: dict
    material: Callable
    objective: Callable
    steps: int
    lr: float = 1e-3
    batch: int = 64
    decay: float = 0.01
    muon: float | None = None
    begin: Callable | None = None
    end: Callable | None = None
    start: str | None = None
    half: bool = True


def pick(i: int, n: int, batch: int, seed: int = 0) -> Tensor:
    """Which of n samples the step i sees: `batch` numbers, a function of (seed, i) alone."""
    return torch.randint(n, (batch,), generator=torch.Generator().manual_seed(seed * 1_000_003 + i))
