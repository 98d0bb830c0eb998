"""Which layer gets how many bits: what rounding a layer costs, what its bits use up, and linear layers that run on integers.

    Omega_i(b) = Tr(H_i) / n_i |Q_b(W_i) - W_i|^2        the loss is expected to rise by sum Omega_i(b_i) / 2

The choice itself, an integer linear program, is `core.baselines.quant.allocate`; Tr(H_i) is `traces` of `hessian` there.
"""

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...core.baselines.quant import Steps, around, dequantise, hessian, pack, quantise, symmetric, traces, unpack
from ...core.surgery import Range, record, swap
from .dyadic import WIDTH, Rescale, dyadic


def rounded(weight: Float[Tensor, "o i"], bits: int) -> Float[Tensor, "o i"]:
    """The nearest values of a symmetric grid, one step a row."""
    s = symmetric(weight, bits, 1)
    return dequantise(quantise(weight, s), s)


def curvature(loss, model: nn.Module, names: Sequence[str], generator: torch.Generator, probes: int) -> Float[Tensor, "l"]:
    """Tr(H_i) of each named layer's weight by Hutchinson's probes, all at one draw of the batch, times and noise.

    loss: a function without arguments that gives the loss with its graph. The fused attention kernel has no second derivative,
    so it is off here.
    """
    weights = [model.get_submodule(name).weight for name in names]
    before = [w.requires_grad for w in weights]
    try:
        for w in weights:
            w.requires_grad_(True)
        with sdpa_kernel(SDPBackend.MATH):
            return traces(hessian(loss(), weights), weights, generator, probes)
    finally:
        for w, was in zip(weights, before, strict=True):
            w.requires_grad_(was)


def squares(weights: Sequence[Tensor], options: Sequence[int]) -> Float[Tensor, "l k"]:
    """|Q_b(W) - W|^2 of every weight and number of bits: the cost of an allocation that knows no curvature."""
    return torch.tensor([[(rounded(w, b) - w).double().square().sum().item() for b in options] for w in weights]).double()


def sensitivity(trace: Float[Tensor, "l"], weights: Sequence[Tensor], options: Sequence[int]) -> Float[Tensor, "l k"]:
    """Omega. Negative traces, as of a network that hasn't converged, count as 0."""
    n = torch.tensor([w.numel() for w in weights])
    return (trace.double().clamp(min=0) / n)[:, None] * squares(weights, options)


@dataclass(frozen=True)
class Use:
    """What layers use up, `l k`: size in bits; bops = MACs x weight bits x activation bits; latency in a model's own unit.

    Latency is no measurement but a model: a start for each layer, then operations in kernels of 4 or 8 bits. There are none for
    2 and 3 bits, which therefore save room and no time.
    """

    size: Tensor
    bops: Tensor
    latency: Tensor

    @classmethod
    def of(cls, numbers: Sequence[int], macs: Sequence[int], options: Sequence[int], active: int = 8) -> "Use":
        n, work, bits = (torch.tensor(x, dtype=torch.float64) for x in (numbers, macs, options))
        kernel = torch.where(bits <= 4, 4.0, 8.0)
        start = (work * 8 * active).mean() / 10
        return cls(n[:, None] * bits, work[:, None] * bits * active, start + work[:, None] * kernel * active)


def limit(use: Float[Tensor, "l k"], options: Sequence[int], rho: float | int) -> float:
    """What all at 4 bits use, and rho of the way from there to all at 8."""
    four, eight = use[:, options.index(4)].sum(), use[:, options.index(8)].sum()
    return (four + rho * (eight - four)).item()


def allocated(model: nn.Module, bits: Mapping[str, int]) -> nn.Module:
    """A copy of the model in which the weights of the named layers are rounded to so many bits. The rest is shared."""
    new = {name: copy.copy(model.get_submodule(name)) for name in bits}
    for name, layer in new.items():
        layer._parameters = dict(layer._parameters)
        layer.weight = nn.Parameter(rounded(layer.weight.detach(), bits[name]), requires_grad=False)
    return swap(model, new)


# --- linear layers on integers ----------------------------------------------------------------------------------------


class Rows:
    """How many rows a layer gets: times its numbers, its MACs."""

    n = 0

    def add(self, x: Float[Tensor, "*n d"]) -> None:
        self.n += x.numel() // x.shape[-1]


class IntegerLinear(nn.Module):
    """float in -> int8 codes -> int32 accumulators -> int8 codes by a dyadic factor a row -> float out.

    enter, leave: grids of what comes in and goes out, one step each. The weight's codes are kept in packed bits
    """

    packed: Tensor

    def __init__(self, linear: nn.Linear, bits: int, enter: Steps, leave: Steps, width: int = WIDTH):
        super().__init__()
        s = symmetric(linear.weight.detach().double(), bits, 1)
        unit = (s.step * enter.step.double()).flatten()
        bias = torch.zeros_like(unit) if linear.bias is None else torch.floor(linear.bias.detach().double() / unit + 0.5)
        self.shape, self.bits, self.low = linear.weight.shape, bits, s.low
        self.ends = enter.low, enter.high, leave.low, leave.high
        self.register_buffer("enter", enter.step), self.register_buffer("leave", leave.step)
        self.by = Rescale(dyadic(unit / leave.step.double(), width))
        self.register_buffer("packed", pack(quantise(linear.weight.detach().double(), s) - s.low, bits))
        self.register_buffer("bias", bias.to(torch.int32))

    @property
    def weight(self) -> Int[Tensor, "o i"]:
        """Its codes in int32."""
        return unpack(self.packed, self.bits, math.prod(self.shape)).view(self.shape).int() + self.low

    def forward(self, x: Float[Tensor, "*n i"]) -> Float[Tensor, "*n o"]:
        codes = torch.floor(x / self.enter + 0.5).clamp(*self.ends[:2]).to(torch.int8)
        return self.integers(codes) * self.leave

    def integers(self, x: Int[Tensor, "*n i"]) -> Int[Tensor, "*n o"]:
        """What lies between the two floats."""
        acc = x.to(torch.int32) @ self.weight.T + self.bias
        return self.by(acc).clamp(*self.ends[2:]).to(torch.int8)


def integer_layers(model: nn.Module, bits: Mapping[str, int], batches: Iterable, width: int = WIDTH) -> nn.Module:
    """The model with its named linear layers on integers, each with static 8-bit grids as wide as the batches showed.

    What stands between the layers (norms, softmax, GELU, modulation) stays in floating point: this model isn't integer-only.
    """
    inputs, outputs = ({name: Range() for name in bits} for _ in range(2))
    record(model, batches, inputs, outputs)
    grid = lambda seen: around(torch.maximum(seen.high.max(), -seen.low.min()), 8)
    make = lambda name, b: IntegerLinear(model.get_submodule(name), b, grid(inputs[name]), grid(outputs[name]), width)
    return swap(model, {name: make(name, b) for name, b in bits.items()})
