"""Linear layers whose inputs and weights are rotated, smoothed and rounded; and their calibration, block after block.

    y = X W' = (X R / s)(W R s)'        R = diag(+-1) H / sqrt d,   s_c = max|X R|_c^alpha / max|W R|_c^(1 - alpha)

Each step is exact, so only rounding loses anything. Rounding is symmetric: a step for each row of W, and for inputs one for each
token (found anew at every call) or, "static", one for all. R is the fast transform: d log2 d additions a token, done once for
layers that read the same tensor.
"""

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ...core.baselines.quant import (
    QuantisedLinear,
    Steps,
    around,
    fake_quantise,
    hadamard,
    pack,
    quantise,
    smoothing,
    unpack,
)
from ...core.model import Block
from ...core.surgery import record, swap
from .samples import Each

PAPER = ("rotate", "smooth")
OPEN = 4.0  # where clipping begins: sigmoid(4) = 0.982 of the range


@dataclass(frozen=True)
class How:
    """Bits of weights and of inputs; the steps in the order in which they are done; the rest as in the paper's text.

    order:  of "rotate" and "smooth", each at most once; () is plain rounding
    clip:   bounds are sigmoid(g) of the range, g learnt: one a row of the weight, a pair for the inputs
    static: the inputs' range is what calibration saw, one for the layer, instead of each token's own
    """

    bits: tuple[int, int] = (4, 4)
    order: tuple[str, ...] = PAPER
    clip: bool = False
    static: bool = False
    alpha: float | int = 0.5

    def __post_init__(self):
        if not set(self.order) <= set(PAPER) or len(set(self.order)) < len(self.order):
            raise ValueError(f'the order consists of "rotate" and "smooth", each at most once, got {self.order}')
        if self.static and self.order == PAPER[::-1]:
            raise ValueError("a static range is known before a rotation only if that comes first: take another order")


class Rotation(nn.Module):
    """x -> x R. Layers that are given the same tensor share one, and it is worked out once for all of them."""

    def __init__(self, signs: Float[Tensor, "d"]):
        super().__init__()
        self.d = len(signs)
        self.last: tuple = (None, None)
        self.register_buffer("packed", pack((signs > 0).int(), 1))

    @property
    def signs(self) -> Int[Tensor, "d"]:
        """The diagonal, +-1; one bit each is kept."""
        return 2 * unpack(self.packed, 1, self.d).to(torch.int8) - 1

    def forward(self, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
        if x is not self.last[0]:
            self.last = x, self.once(x)
        return self.last[1]

    def once(self, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
        """The same, without a thought for who else may ask."""
        return hadamard(x * self.signs)


def rotations(model: nn.Module, names: Iterable[str], batch: Tensor, seed: int) -> dict[str, Rotation]:
    """A random rotation for each named layer; those that read the same tensor (q, k and v) get the same one."""
    names, read, dice, made = list(names), {}, torch.Generator().manual_seed(seed), {}
    keep = lambda name: lambda layer, args: read.__setitem__(name, args[0])  # kept alive, so that no two have one id
    hooks = [model.get_submodule(name).register_forward_pre_hook(keep(name)) for name in names]
    with torch.no_grad():
        model(batch)
    for hook in hooks:
        hook.remove()
    if unread := [name for name in names if name not in read]:
        raise ValueError(f"the model never called these layers, so nothing is known of their inputs: {', '.join(unread)}")
    for x in read.values():
        if id(x) not in made:
            made[id(x)] = Rotation(torch.randint(0, 2, x.shape[-1:], generator=dice) * 2.0 - 1)
    return {name: made[id(x)] for name, x in read.items()}


class Seen(NamedTuple):
    """What a layer's inputs were, as they are when smoothing comes, for each clip and channel.

    peak: mean over the frames of a clip (of which a block that sees all of them has one) of the largest size among the tokens
    """

    peak: Float[Tensor, "b d"]
    low: Float[Tensor, "b d"]
    high: Float[Tensor, "b d"]

    def of(self, rows: Tensor) -> "Seen":
        """Some of the clips, in this order."""
        return Seen(*(x[rows] for x in self))


def observe(
    model: nn.Module, clips: Tensor, order: tuple[str, ...], turns: Mapping[str, Rotation], batch: int = 4
) -> dict[str, Seen]:
    """What the layers get on the clips `b ...`, rotated already where `order` begins with that."""
    ends = lambda x: (x.abs().amax(2).mean(1), x.amin((1, 2)), x.amax((1, 2)))
    first = lambda turn: (lambda x: ends(turn(x))) if order[:1] == ("rotate",) else ends
    watch = {name: Each(first(turn), batch) for name, turn in turns.items()}
    if len(clips) % batch:
        raise ValueError(f"{len(clips)} clips don't make batches of {batch}")
    record(model, clips.split(batch), watch)
    return {name: Seen(*map(torch.cat, zip(*w.found, strict=True))) for name, w in watch.items()}


class Inputs(nn.Module):
    """How the inputs of a layer are moved and rounded: s, their clips g_x and a static range, each a tensor or None."""

    def __init__(self, how: How, turn: Rotation):
        super().__init__()
        self.how, self.turn = how, turn
        for name in ("s", "g_x", "span"):
            self.register_buffer(name, None)

    def moved(self, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
        """Inputs after the steps: X R / s, or in another order."""
        for step in self.how.order:
            x = self.turn(x) if step == "rotate" else x / self.s.to(x).clamp(min=1e-5)
        return x

    def tokens(self, x: Float[Tensor, "*n i"]) -> Steps:
        """The grid of each token of the moved inputs; or, static, of all."""
        low, high = (x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)) if self.span is None else self.span.to(x)
        if self.g_x is not None:
            bounds = self.g_x.to(x).sigmoid()
            low, high = low * bounds[0], high * bounds[1]
        return around(torch.maximum(-low, high), self.how.bits[1])

    def inputs(self, x: Float[Tensor, "*n i"]) -> Float[Tensor, "*n i"]:
        """Moved and rounded."""
        x = self.moved(x)
        return fake_quantise(x, self.tokens(x))

    forward = inputs


class Dual(Inputs):
    """A linear layer in few bits. s and the clips g are parameters; its rotation and its own weight stay.

    Without steps and clips it is plain rounding to the largest size (RTN).
    """

    def __init__(self, linear: nn.Linear, how: How, turn: Rotation, seen: Seen):
        super().__init__(how, turn)
        self.bias = linear.bias
        first = how.order[:1] == ("rotate",)
        self.register_buffer("weight", turn.once(linear.weight.detach()) if first else linear.weight.detach())
        self.g_w = self.rounded = None
        if "smooth" in how.order:  # the weight's maxima after the same rotation as the inputs'
            self.s = nn.Parameter(smoothing(peaks(seen.peak), self.weight.abs().amax(0), how.alpha))
        if how.clip:
            self.g_w, self.g_x = nn.Parameter(torch.full((len(self.weight), 1), OPEN)), nn.Parameter(torch.full((2,), OPEN))
        if how.static:
            s = 1 if self.s is None else self.s.detach()
            self.span = torch.stack([(seen.low / s).min(), (seen.high / s).max()])

    def moved_weight(self) -> Float[Tensor, "o i"]:
        """The weight after the steps: W R s. A rotation that comes first was done when the layer was made."""
        w: Tensor = self.weight
        for step in self.how.order[self.how.order[:1] == ("rotate",) :]:
            w = self.turn.once(w) if step == "rotate" else w * self.s.clamp(min=1e-5)
        return w

    def rows(self, w: Float[Tensor, "o i"]) -> Steps:
        """The grid of each row of the moved weight."""
        most = w.abs().amax(1, keepdim=True)
        return around(most if self.g_w is None else most * self.g_w.sigmoid(), self.how.bits[0])

    def forward(self, x: Float[Tensor, "*n i"]) -> Float[Tensor, "*n o"]:
        w = self.rounded
        if w is None:
            w = self.moved_weight()
            w = fake_quantise(w, self.rows(w))
        return F.linear(self.inputs(x), w, self.bias)

    @torch.no_grad()
    def folded(self) -> "Dual":
        """The layer as it runs: its weight moved, clipped and rounded once and for all."""
        new = copy.deepcopy(self, {id(self.turn): self.turn}).requires_grad_(False)
        w = self.moved_weight()
        new.rounded = fake_quantise(w, self.rows(w))
        return new

    @torch.no_grad()
    def packed(self) -> QuantisedLinear:
        """The same as codes in packed bytes, with s and the rows' steps in fp16; 8 bits at most."""
        new, way = copy.deepcopy(self, {id(self.turn): self.turn}), Inputs(self.how, self.turn)
        for name in ("s", "g_x", "span"):
            if (own := getattr(new, name)) is not None:
                setattr(way, name, own.detach().half())
                own.data = getattr(way, name).to(own)
        w = new.moved_weight()
        s = new.rows(w).stored()
        return QuantisedLinear(quantise(w, s), s, self.bias, way)


def peaks(peak: Float[Tensor, "b d"], batch: int = 1, keep: float = 0.95) -> Float[Tensor, "d"]:
    """The largest size of each channel, as the paper watches it: a moving average over the first fifth of the clips."""
    few = peak[: max(1, len(peak) // 5)].split(batch)
    mean = few[0].mean(0)
    for some in few[1:]:
        mean = keep * mean + (1 - keep) * some.mean(0)
    return mean


def quantised(model: nn.Module, how: How, turns: Mapping[str, Rotation], seen: Mapping[str, Seen]) -> nn.Module:
    """The model with the layers that were seen as `Dual` ones."""
    return swap(model, {name: Dual(model.get_submodule(name), how, turns[name], seen[name]) for name in seen})


def folded(model: nn.Module) -> nn.Module:
    """The model with its `Dual` layers as they run."""
    return swap(model, {name: m.folded() for name, m in model.named_modules() if isinstance(m, Dual)})


@torch.enable_grad()
def calibrate(
    model: nn.Module, small: nn.Module, blocks: Sequence[str], clips: Tensor, epochs: int = 15, batch: int = 4
) -> list[tuple[float, float]]:
    """Learn s and the clips of `small`, a block at a time, so that it says what `model`'s block says to the model's own inputs.

    Returns each block's mean squared error before and after; a block that got worse goes back to where it began.
    AdamW, 1e-3 for s and 1e-2 for clips, down to a thousandth of that on a cosine.
    """
    calls: dict[str, list] = {name: [] for name in blocks}
    keep = lambda name: lambda part, args, out: calls[name].append((args, out))
    hooks = [model.get_submodule(name).register_forward_hook(keep(name)) for name in blocks]
    with torch.no_grad():
        for some in clips.split(batch):
            model(some)
    for hook in hooks:
        hook.remove()
    found = []
    for name in blocks:
        part = small.get_submodule(name)
        found.append(_calibrate(part, calls.pop(name), epochs))
    return found


def _calibrate(block: nn.Module, calls: list, epochs: int) -> tuple[float, float]:
    duals = [m for m in block.modules() if isinstance(m, Dual)]
    smooth, clips = [m.s for m in duals if m.s is not None], [g for m in duals for g in (m.g_w, m.g_x) if g is not None]
    groups = [(smooth, 1e-3), (clips, 1e-2)]
    learnt = [p for group, _ in groups for p in group]
    error = lambda call: F.mse_loss(block(*call[0]), call[1])
    whole = lambda: sum(error(call).item() for call in calls) / len(calls)
    with torch.no_grad():
        before = whole()
    if not learnt:
        return before, before
    start = [p.detach().clone() for p in learnt]
    optimiser = torch.optim.AdamW([{"params": group, "lr": lr} for group, lr in groups if group], weight_decay=0, fused=True)
    n = epochs * len(calls)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda i: 0.001 + 0.999 * (1 + math.cos(math.pi * i / n)) / 2)
    for i in range(n):
        optimiser.zero_grad()
        error(calls[i % len(calls)]).backward()
        optimiser.step(), schedule.step()
    with torch.no_grad():
        after = whole()
        if after > before:
            for p, old in zip(learnt, start, strict=True):
                p.copy_(old)
    return before, min(after, before)


def outliers(model: nn.Module, seed: int, channels: int = 4, by: float = 20.0) -> nn.Module:
    """A copy that says the same, with outliers put in: random channels of what a norm says times `by`, of weights through it.

    In our blocks a norm's scale and shift are rows of `table`: 0 and 1 before attention, 3 and 4 before the feed-forward.
    """
    model, dice = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    for block in (m for m in model.modules() if isinstance(m, Block)):
        readers = (block.attention.q, block.attention.k, block.attention.v), (block.fc1,)
        for shift, layers in zip((0, 3), readers, strict=True):
            rows = torch.randperm(block.table.shape[1], generator=dice)[:channels]
            block.table.data[shift, rows] *= by
            block.table.data[shift + 1, rows] = (1 + block.table.data[shift + 1, rows]) * by - 1
            for layer in layers:
                layer.weight.data[:, rows] /= by
    return model
