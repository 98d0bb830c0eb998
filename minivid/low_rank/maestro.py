"""Maestro: train layers as products whose terms are ordered by importance, and cut the tails that nobody needs.

Paper:   Maestro: Uncovering Low-Rank Structures via Trainable Decomposition (2023), arXiv 2308.14929
Kind:    procedure (a model is trained in factors; ranks fall on the way, and may fall further at deployment)
Equal:   without a sampler and a lasso it is the plain model in factors; a truncated SVD's factors are truncated SVDs
Claim:   for a linear target the terms become its SVD, for an autoencoder PCA; cut to half or a quarter of its numbers without
         retraining, the loss of an ordered model is lower than of a dense one cut by whitened SVD; ranks that were found beat
         one share for all
Differs: a video generator of 0.3 M parameters and 20 tokens from scratch, and the shared one of 1.9 M, begun at its SVD and
         taught by itself; paper: classifiers up to ResNet-50, a translator. Linear layers only. Adam without decay, not SGD with
         it: the lasso is an exact proximal step after each of Adam's (rate x strength), so tails reach 0; its strength isn't
         comparable. Widths on a grid of eights, since we have 10^3 steps, not 10^5. No full pass beside the truncated one (the
         authors' scripts leave it out too). Shrinking every so many steps, not after epochs. Inferred: the rule by which ranks
         are cut at deployment (greedy, prices measured anew only when they come first), grids, rates, the use on a generator

    W = U V' = sum_b u_b v_b',   U: `o r`, V': `r i`;   a pass of width b runs the first b terms

Plain training of U V' knows only the product; any turn of the terms among themselves is as good. Here each step one layer runs
with its first b terms alone, b drawn at random: what comes first must carry most. What is unusual here: the layer is the
`Factored` of the baselines with a number in it, so whatever cuts or merges one works on both.
"""

import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..core import fit
from ..core.baselines.lowrank import Factored
from ..core.surgery import parts, swap

ROLES = (*"qkvo", *("cross-" + role for role in "qkvo"), "fc1", "fc2")


class Ordered(Factored):
    """A linear layer as ordered rank-one terms: the columns of `a` (U) and rows of `b` (V').

    live:  the rank r_i that shrinking has left; the tail is masked, but stays until `pruned`
    width: how many terms a truncated pass runs; None for all that live
    """

    def __init__(self, a: Float[Tensor, "o r"], b: Float[Tensor, "r i"], bias: Float[Tensor, "o"] | None = None):
        super().__init__(a, b, bias)
        self.live, self.width = nn.Buffer(torch.tensor(a.shape[1])), None

    @property
    def ends(self) -> int:
        """Numbers in a term: o + i."""
        return len(self.a) + self.b.shape[1]

    def size(self, rank: int | None = None) -> int:
        """Numbers of the weight at this rank (by default the live one), in factors or merged, whichever is smaller."""
        return min((int(self.live) if rank is None else rank) * self.ends, len(self.a) * self.b.shape[1])

    def forward(self, x: Float[Tensor, "*n i"], rank: int | None = None) -> Float[Tensor, "*n o"]:
        rank = self.width if rank is None else rank
        return super().forward(x, int(self.live) if rank is None else min(rank, int(self.live)))

    def plain(self, rank: int | None = None) -> nn.Module:
        """The layer of the first `rank` terms (by default the live ones), merged once that is no larger: r (o + i) >= o i."""
        cut = self.cut(int(self.live) if rank is None else rank)
        return cut.merge() if cut.rank * self.ends >= len(self.a) * self.b.shape[1] else cut


def ordered(model: nn.Module, grams: Mapping[str, Tensor] | None = None, within: str = "") -> nn.Module:
    """The model with the linear layers of attention and feed-forward in factors of full rank, begun at their SVD.

    grams: X'X `i i` of what enters layers, by name; then it is the SVD whitened by it. Untouched parts are shared with the model.
    Raises ValueError where there are none within that name.
    """
    found = {name: part for name, part, role in parts(model) if role in ROLES and name.startswith(within)}
    if not found:
        raise ValueError(f"no part within {within!r} is a linear layer of an attention or a feed-forward")
    full = {name: min(part.weight.shape) for name, part in found.items()}
    return swap(model, {name: Ordered.of(part, full[name], (grams or {}).get(name)) for name, part in found.items()})


def layers(model: nn.Module) -> dict[str, Ordered]:
    """The ordered layers of a model, by name."""
    return {name: part for name, part in model.named_modules() if isinstance(part, Ordered)}


def pruned(model: nn.Module, ranks: Mapping[str, int] | None = None) -> nn.Module:
    """The model without masked tails, or at these ranks: thin factors, or plain layers where factors save nothing."""
    return swap(model, {name: part.plain(None if ranks is None else ranks[name]) for name, part in layers(model).items()})


# --- low-rank ordered decomposition -------------------------------------------------------------------------------------


def widths(rank: int, every: int = 1) -> list[int]:
    """every, 2 every, ... and the rank itself; none of rank 0."""
    return [*range(every, rank, every), rank] if rank else []


class Pairs:
    """The paper's sampler. All (layer, width) once, in an order drawn by the seed; then again, in another.

    When a rank has changed the list is made anew. It has a state dict, so that a killed training goes on to the same weights.
    """

    def __init__(self, own: Sequence[Ordered], seed: int = 0, every: int = 1):
        self.own, self.seed, self.every, self.cycle, self.place = list(own), seed, every, 0, 0
        self.ranks: list[int] = []
        self.order: list[tuple[int, int]] = []

    def _listed(self) -> list[tuple[int, int]]:
        """The order of this cycle."""
        found = [(i, b) for i, rank in enumerate(self.ranks) for b in widths(rank, self.every)]
        dice = np.random.default_rng([self.seed, self.cycle])
        return [found[j] for j in dice.permutation(len(found))]

    def draw(self) -> list[int | None]:
        """A width for each layer: a number for one, None for all others."""
        ranks = [int(layer.live) for layer in self.own]
        if ranks != self.ranks or self.place == len(self.order):
            self.ranks, self.place, self.cycle = ranks, 0, self.cycle + 1
            self.order = self._listed()
        chosen: list[int | None] = [None] * len(self.own)
        if self.order:
            i, chosen[i] = self.order[self.place]
            self.place += 1
        return chosen

    def state_dict(self) -> dict:
        return {"cycle": self.cycle, "place": self.place, "ranks": list(self.ranks)}

    def load_state_dict(self, state: dict) -> None:
        self.cycle, self.place, self.ranks = state["cycle"], state["place"], list(state["ranks"])
        self.order = self._listed()


def independent(own: Sequence[Ordered], generator: torch.Generator, every: int = 1) -> list[int | None]:
    """The authors' other sampler: a width for every layer, each at random."""
    choice = [widths(int(layer.live), every) for layer in own]
    return [some[int(torch.randint(len(some), (), generator=generator))] if some else 0 for some in choice]


@contextmanager
def narrow(own: Iterable[Ordered], some: Iterable[int | None]) -> Iterator[None]:
    """For a while, layers run with these widths (None: all that lives)."""
    own = list(own)
    for layer, width in zip(own, some, strict=True):
        layer.width = width
    try:
        yield
    finally:
        for layer in own:
            layer.width = None


# --- hierarchical group lasso and progressive shrinking -----------------------------------------------------------------


def tails(x: Float[Tensor, "m r"]) -> Float[Tensor, "r"]:
    """|X_{b:}| for each b: the norm of all columns from b on. Its gradient is 0, not infinite, where a tail is 0."""
    return x.square().sum(0).flip(0).cumsum(0).flip(0).clamp_min(1e-30).sqrt()


def lasso(own: Iterable[Ordered]) -> Float[Tensor, ""]:
    """sum_b |U_{b:}| + |V_{b:}|, over the layers: column b stands in b of the norms, so late ones are pressed hardest."""
    return torch.stack([tails(layer.a).sum() + tails(layer.b.T).sum() for layer in own]).sum()


def softened(norms: np.ndarray, by: float) -> np.ndarray:
    """What the lasso's proximal step leaves of each column, as shares `k r`, given the columns' norms `k r`.

    argmin_X |X - U|^2 / 2 + by sum_b |X_{b:}|: as tails are nested, one soft threshold after the other from the shortest to the
    longest is exact (Jenatton et al. 2011, arXiv 1009.2139). Zeros are exact, and always a whole tail.
    """
    left, tail = np.empty_like(norms), np.zeros(len(norms))
    for b in reversed(range(norms.shape[1])):
        tail = np.hypot(norms[:, b], tail)
        left[:, b] = np.maximum(0, 1 - by / np.maximum(tail, 1e-30))
        tail = tail * left[:, b]
    return left.cumprod(1)


@torch.no_grad()
def proximal(own: Sequence[Ordered], by: float) -> None:
    """The lasso's proximal step on all factors, in place."""
    factors = [x for layer in own for x in (layer.a, layer.b.T)]
    norms = np.zeros((len(factors), max(x.shape[1] for x in factors)))
    for row, x in zip(norms, factors, strict=True):
        row[: x.shape[1]] = x.norm(dim=0).numpy()
    for share, x in zip(softened(norms, by), factors, strict=True):
        x.mul_(torch.from_numpy(share[: x.shape[1]]).to(x))


def importance(layer: Ordered) -> Float[Tensor, "live"]:
    """|U_{b:}| |V_{b:}| of the live terms; it never rises with b, so whatever a threshold keeps is a prefix."""
    live = int(layer.live)
    return tails(layer.a[:, :live]) * tails(layer.b[:live].T)


@torch.no_grad()
def shrink(own: Iterable[Ordered], least: float = 1e-5, optimiser: torch.optim.Optimizer | None = None) -> None:
    """Ranks become the number of terms of this importance; tails are set to 0, and forgotten by the optimiser."""
    for layer in own:
        live = int((importance(layer) >= least).sum())
        layer.live.fill_(live)
        for x, dead in ((layer.a, (slice(None), slice(live, None))), (layer.b, (slice(live, None),))):
            x[dead] = 0
            for memory in optimiser.state[x].values() if optimiser is not None else ():
                if memory.shape == x.shape:
                    memory[dead] = 0


# --- training -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """How an ordered model is trained.

    sampler:  "single" (the paper's: one layer a step), "independent" (all), or "none" (full width, which orders nothing)
    every:    grid of widths
    strength: of the lasso, lambda_gl; 0 leaves ranks alone
    least:    importance below which a term goes, epsilon_ps
    epoch:    steps between two shrinkings
    seed:     of the widths
    """

    sampler: str = "single"
    every: int = 8
    strength: float | int = 0.0
    least: float = 1e-5
    epoch: int = 50
    seed: int = 0

    def __post_init__(self):
        if self.sampler not in ("single", "independent", "none"):
            raise ValueError(f"widths are drawn by 'single' or 'independent', or 'none', not {self.sampler!r}")


def train(
    model: nn.Module, loss: Callable, batches: Callable, steps: int, rate: float, s: Settings,
    look: Callable | None = None, path: Path | None = None,
) -> list[int]:  # fmt: skip
    """Train what may learn in the model, in place, by Adam with a warm-up and a cosine.

    loss, batches: `loss(model, batches(i))` of step i. look: called as look(step) before each step
    Returns the numbers in ordered layers that each step of this run computed with. With none it is ordinary training.
    """
    own, learnt = list(layers(model).values()), [p for p in model.parameters() if p.requires_grad]
    if s.sampler != "none" and not own:
        raise ValueError("nothing here is ordered, so nothing can be drawn: pass the model through `ordered`, or sampler='none'")
    pairs, opt, used = Pairs(own, s.seed, s.every), torch.optim.Adam(learnt, rate, (0.9, 0.99)), []

    def step(state, batch, generator):
        if look is not None:
            look(state.i)
        now = rate * fit.cosine(state.i, steps, max(1, min(50, steps // 10)))
        for group in opt.param_groups:
            group["lr"] = now
        some: list[int | None] = [None] * len(own)
        if s.sampler != "none":
            some = pairs.draw() if s.sampler == "single" else independent(own, generator, s.every)
        with narrow(own, some):
            value = loss(model, batch)
            opt.zero_grad()
            value.backward()
        opt.step()
        used.append(sum((int(x.live) if b is None else b) * x.ends for x, b in zip(own, some, strict=True)))
        if s.strength and own:
            proximal(own, now * s.strength)
            if (state.i + 1) % s.epoch == 0 or state.i + 1 == steps:
                shrink(own, s.least, opt)
        return {"loss": value.detach()}

    state = fit.State({"model": model, "opt": opt, "pairs": pairs})
    fit.fit(step, state, batches, steps, s.seed, path, note={"rate": rate, **vars(s)})
    return used


# --- deployment ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def greedy(model: nn.Module, loss: Callable[[nn.Module], float], share: float, step: int = 8) -> dict[str, int]:
    """Ranks at which the ordered layers hold at most this share of their dense numbers, at no retraining.

    Again and again one layer loses `step` terms: the one whose loss rises least for each number saved. Prices are measured anew
    only when they come first, since they rarely fall. loss: of validation, a function of the model
    """
    own = layers(model)
    if not own:
        raise ValueError("nothing here is ordered: pass the model through `ordered`")
    dense = sum(len(x.a) * x.b.shape[1] for x in own.values())
    ranks = {name: int(x.live) for name, x in own.items()}

    def lower(name: str) -> int:  # the next rank that is cheaper, on the grid
        fits = (len(own[name].a) * own[name].b.shape[1] - 1) // own[name].ends
        return max(0, (min(ranks[name] - 1, fits) // step) * step)

    def told(changed: dict[str, int]) -> float:
        with narrow(own.values(), (ranks | changed).values()):
            return loss(model)

    def price(name: str) -> float:
        saved = own[name].size(ranks[name]) - own[name].size(lower(name))
        return (told({name: lower(name)}) - now) / saved

    now = told({})
    heap = [(price(name), name) for name in own if ranks[name]]
    heapq.heapify(heap)
    while heap and sum(x.size(ranks[name]) for name, x in own.items()) > share * dense:
        _, name = heapq.heappop(heap)
        cost = price(name)
        if heap and cost > heap[0][0]:
            heapq.heappush(heap, (cost, name))
            continue
        ranks[name] = lower(name)
        now = told({})
        if ranks[name]:
            heapq.heappush(heap, (price(name), name))
    return ranks
