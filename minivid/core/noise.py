"""The process: what is put between data and noise, what the network is asked, and how a sample is drawn.

    x_t = a(t) clean + b(t) end + c(t) noise          (t is per frame; 0 is clean, 1 is the other end)
    out = p(t) clean + q(t) noise                     (what the network is trained to say)

Flow matching, variance-preserving diffusion and bridges are three sets of coefficients. Since both lines are linear, one
formula turns any network output into an estimate of the clean clip, and every sampler speaks only of that estimate:

    clean = (q (x_t - b end) - c out) / (q a - c p)
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from . import fit

Coefficient = Callable[[Tensor], Tensor]


def _on(t: Tensor, x: Tensor) -> Tensor:
    """Per-frame times `b f` (or `f`, or a number) shaped to multiply a clip `b c f h w`."""
    t = torch.as_tensor(t, dtype=x.dtype, device=x.device)
    t = t.expand(x.shape[0], x.shape[2]) if t.ndim < 2 else t
    return t[:, None, :, None, None]


@dataclass(frozen=True)
class Path:
    """Coefficients of the mixture (a, b, c) and of what the network says (p, q), each a function of t in [0, 1].

    end: the clip at the other end of a bridge, like the clean one in shape (no other path has b != 0)
    """

    a: Coefficient
    c: Coefficient
    p: Coefficient
    q: Coefficient
    b: Coefficient = torch.zeros_like
    end: Tensor | float = 0.0

    def at(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t, the clip on its way."""
        t = _on(t, clean)
        return self.a(t) * clean + self.b(t) * self.end + self.c(t) * noise

    def target(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should say at x_t."""
        t = _on(t, clean)
        return self.p(t) * clean + self.q(t) * noise

    def clean(self, x: Tensor, t: Tensor, out: Tensor) -> Tensor:
        """The clean clip that the network's output implies."""
        t = _on(t, x)
        a, c, p, q = self.a(t), self.c(t), self.p(t), self.q(t)
        return (q * (x - self.b(t) * self.end) - c * out) / (q * a - c * p)

    def noise(self, x: Tensor, t: Tensor, out: Tensor) -> Tensor:
        """The noise that the network's output implies."""
        t = _on(t, x)
        a, c, p, q = self.a(t), self.c(t), self.p(t), self.q(t)
        return (a * out - p * (x - self.b(t) * self.end)) / (q * a - c * p)


def flow() -> Path:
    """Flow matching on the straight line : x_t = (1-t) clean + t noise, out = noise - clean.

    Lipman et al. 2023, arXiv 2210.02747; Liu et al. 2023, arXiv 2209.03003.
    """
    return Path(a=lambda t: 1 - t, c=lambda t: t, p=lambda t: -torch.ones_like(t), q=torch.ones_like)


def preserving(says: str = "noise") -> Path:
    """Variance preserving, cosine schedule (Nichol & Dhariwal 2021): a = cos(pi t/2), c = sin(pi t/2).

    says: "noise" (Ho et al. 2020), "v" = a noise - c clean (Salimans & Ho 2022) or "clean".
    """
    a, c = (lambda t: torch.cos(t * math.pi / 2)), (lambda t: torch.sin(t * math.pi / 2))
    zero = torch.zeros_like
    p, q = {"noise": (zero, torch.ones_like), "v": (lambda t: -c(t), a), "clean": (torch.ones_like, zero)}[says]
    return Path(a=a, c=c, p=p, q=q)


def bridge(end: Tensor, sigma: float = 1.0) -> Path:
    """Brownian bridge between clean (t = 0) and end (t = 1): c = sigma sqrt(t (1-t)); the network says the clean clip."""
    return Path(
        a=lambda t: 1 - t, b=lambda t: t, c=lambda t: sigma * (t * (1 - t)).sqrt(), p=torch.ones_like, q=torch.zeros_like, end=end
    )


def match(t: Tensor, have: Path, want: Path) -> Tensor:
    """The times at which path `want` has the signal-to-noise ratio a/c that path `have` has at t; by bisection, in float64."""
    angle = lambda path, t: torch.atan2(path.c(t), path.a(t))  # 0 is clean, pi/2 is noise, and it grows with t on every path
    goal = angle(have, t.double())
    low, high = torch.zeros_like(goal), torch.ones_like(goal)
    for _ in range(60):
        middle = (low + high) / 2
        less = angle(want, middle) < goal
        low, high = torch.where(less, middle, low), torch.where(less, high, middle)
    return low.to(t.dtype)


class Matched(torch.nn.Module):
    """A network trained on one path, serving another: a model like any other.

    What a network denoises is a clip with some ratio of signal to noise. Every Gaussian path passes through all ratios, at
    times and lengths of its own, so x (less its part of `end`) is rescaled, t is looked up, and the answer, which says clean and
    noise, is put into the words of the other path (Karras et al. 2022, arXiv 2206.00364, table 1). Nothing is approximated.
    At t = 1 a network that says the noise knows nothing of the clean clip, here as natively; nor does a bridge, all of
    whose clip is `end` there.
    """

    def __init__(self, model: Callable, trained: Path, serves: Path):
        super().__init__()
        self.model, self.trained, self.serves = model, trained, serves

    def forward(self, x: Float[Tensor, "b c f h w"], t: Tensor, cond, cache=None) -> Float[Tensor, "b c f h w"]:
        own, other = self.trained, self.serves
        t = t[:, None].expand(-1, x.shape[2]) if t.ndim == 1 else t
        s = match(t, other, own)
        here, there = _on(t, x), _on(s, x)
        length = ((own.a(there) ** 2 + own.c(there) ** 2) / (other.a(here) ** 2 + other.c(here) ** 2)).sqrt()
        y = (x - other.b(here) * other.end) * length + own.b(there) * own.end
        out = self.model(y, s, cond, cache)
        return other.target(own.clean(y, s, out), own.noise(y, s, out), t)


def logit_normal(b: int, f: int, generator: torch.Generator, shift: float = 1.0) -> Float[Tensor, "b f"]:
    """Training times, one a clip and the same in all frames: sigmoid of a normal, so the middle is seen most.

    shift > 1 moves them towards noise (Esser et al. 2024, eq. 23): redundant tokens need more noise to be destroyed.
    """
    t = fit.normal(b, 1, generator=generator).sigmoid()
    return (shift * t / (1 + (shift - 1) * t)).expand(b, f)


def loss(
    model: Callable, path: Path, clean: Tensor, t: Float[Tensor, "b f"], cond, noise: Tensor
) -> Float[Tensor, "b"]:
    """Mean squared error of the network's output at time t, per sample."""
    out = model(path.at(clean, noise, t), t, cond)
    return (out - path.target(clean, noise, t)).square().flatten(1).mean(1)


def table(steps: int, frames: int, shift: float = 1.0) -> Float[Tensor, "steps f"]:
    """Times of a plain sampler, from 1 to 0: `steps + 1` rows, one column a frame, all frames alike."""
    t = torch.linspace(1, 0, steps + 1)
    return (shift * t / (1 + (shift - 1) * t))[:, None].repeat(1, frames)


Predict = Callable[[Tensor, Tensor], Tensor]  # (x, t) -> clean


def euler(path: Path, predict: Predict, x: Tensor, t: Tensor, s: Tensor, generator=None) -> Tensor:
    """One deterministic step from time t to s: keep the noise that is in x, re-mix it (DDIM; on the flow path, Euler)."""
    clean = predict(x, t)
    return remix(path, x, clean, t, s)


def heun(path: Path, predict: Predict, x: Tensor, t: Tensor, s: Tensor, generator=None) -> Tensor:
    """A step of second order: average the clean estimates at both ends. Two network calls."""
    first = predict(x, t)
    trial = remix(path, x, first, t, s)
    if bool((s <= 0).all()):
        return trial
    return remix(path, x, (first + predict(trial, s)) / 2, t, s)


def ancestral(path: Path, predict: Predict, x: Tensor, t: Tensor, s: Tensor, generator=None) -> Tensor:
    """A step that forgets: the clean estimate with entirely fresh noise (needs a generator)."""
    fresh = torch.randn(x.shape, generator=generator, device=x.device)
    return path.at(predict(x, t), fresh, s)


def remix(path: Path, x: Tensor, clean: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Move x from time t to s when its clean part is known. Frames whose time doesn't change are left alone."""
    c = path.c(_on(t, x))
    noise = (x - path.a(_on(t, x)) * clean - path.b(_on(t, x)) * path.end) / c.clamp_min(1e-5)
    moved = path.at(clean, noise, s)
    return torch.where(_on(t, x) == _on(s, x), x, moved)


@torch.no_grad()
def sample(model, path: Path, x: Float[Tensor, "b c f h w"], cond, times: Float[Tensor, "steps f"], step=euler, generator=None):
    """Walk x from the times of the first row to those of the last: the network's clean estimate, then a step, and again.

    x: noise `b c f h w` (times 1), or a clip on its way at the times of the first row. Returns the clip of the last row.
    """
    times = times.to(x.device)

    def predict(x, t):
        return path.clean(x, t, model(x, t.expand(x.shape[0], -1), cond))

    for t, s in zip(times[:-1], times[1:], strict=True):
        x = step(path, predict, x, t, s, generator)
    return x
