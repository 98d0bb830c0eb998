"""A network twice: as it trains, on floats that stand on grids, and as it runs, on integers alone.

Every part that trains has `integer(...)`, which makes the part that runs. What a training part does to a float, floor(x / step
+ 1/2), the running part does to an accumulator with a dyadic factor. Float tensors exist only before `Integers.enter` and after
`Integers.leave`.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int8, Integer
from torch import Tensor, nn

from ...core.baselines.quant import Steps, around, between, fake_quantise, quantise, symmetric
from ...core.baselines.vq import straight
from .dyadic import WIDTH, Dyadic, Rescale, dyadic, nearest, pack4, unpack4

WIDE = 16  # bits of a residual sum before it is brought back to the next layer's bits


class Codes(nn.Module):
    """A static grid for activations, its range a moving average of batches' ends while training.

    bits: None leaves floats alone. 8 and more are signed around 0; fewer are unsigned from 0 on, so they must follow a ReLU.
    The gradient is 1 everywhere, for clamped values too.
    """

    def __init__(self, bits: int | None = None, momentum: float = 0.95):
        super().__init__()
        self.bits, self.momentum = bits, momentum
        self.register_buffer("range", torch.full((2,), torch.nan))

    @property
    def steps(self) -> Steps:
        """The grid. Raises ValueError while no batch was seen."""
        if self.range.isnan().any():
            raise ValueError("a grid for activations has no range yet: run some batches in training mode")
        low, high = self.range
        return around(self.range.abs().max(), self.bits) if self.bits >= 8 else between(torch.zeros_like(low), high, self.bits)

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        if self.training:
            self.watch(x)
        return self.snap(x)

    def snap(self, x: Float[Tensor, "..."], clamp: bool = True) -> Float[Tensor, "..."]:
        """The nearest value of the grid; without `clamp` the grid goes on beyond its ends."""
        if self.bits is None:
            return x
        s = self.steps
        codes = nearest(x / s.step)
        return s.step * (straight(codes.clamp(s.low, s.high), codes) if clamp else codes)

    @torch.no_grad()
    def watch(self, x: Float[Tensor, "..."]) -> None:
        """Let the range follow a batch."""
        if self.bits is None:
            return
        now = torch.stack([x.min(), x.max()])
        keep = torch.where(self.range.isnan(), 0.0, self.momentum)
        self.range.copy_(keep * self.range.nan_to_num() + (1 - keep) * now)


class Layer(nn.Module):
    """Convolution, batch norm, perhaps ReLU, then its grid `out` (None: the accumulator itself is wanted).

    Until `folded`, the norm works on batches as ever. From then on it is frozen and lives in weights and bias.
    """

    def __init__(self, i: int, o: int, kernel: int, stride: int = 1, relu: bool = True, out: Codes | None = None):
        super().__init__()
        self.conv = nn.Conv2d(i, o, kernel, stride, kernel // 2, bias=False)
        self.norm, self.relu, self.out = nn.BatchNorm2d(o), relu, out
        self.bits, self.folded = None, False

    def folds(self) -> tuple[Float[Tensor, "o i k l"], Float[Tensor, "o"]]:
        """Weights and bias with the frozen norm in them: W gamma / sigma and beta - mu gamma / sigma."""
        factor = self.norm.weight * (self.norm.running_var + self.norm.eps).rsqrt()
        return self.conv.weight * factor[:, None, None, None], self.norm.bias - self.norm.running_mean * factor

    def forward(self, x: Tensor, step: Tensor | None = None) -> Tensor:
        """x, and the step of the grid that it stands on."""
        weight, bias = self.folds() if self.folded else (self.conv.weight, None)
        if self.bits is not None:
            s = self.grid(weight)
            weight = fake_quantise(weight, s)
            if bias is not None:
                unit = s.step.flatten() * step
                bias = nearest(bias / unit) * unit
        y = F.conv2d(x, weight, bias, self.conv.stride, self.conv.padding)
        y = y if self.folded else self.norm(y)
        y = F.relu(y) if self.relu else y
        return y if self.out is None else self.out(y)

    def grid(self, weight: Tensor) -> Steps:
        """One step an output channel, as far as its largest weight."""
        return symmetric(weight.detach(), self.bits, (1, 2, 3))

    @torch.no_grad()
    def integer(self, step: Tensor, width: int = WIDTH) -> "IntegerConv":
        """The layer that runs on codes of this step."""
        if self.bits is None or not self.folded:
            raise ValueError("only a quantised layer with its batch norm folded becomes integer: call `quantise_all` and `fold`")
        weight, bias = self.folds()
        s = self.grid(weight)
        unit = (s.step.flatten() * step)[:, None, None]
        codes, offset = quantise(weight, s), torch.floor(bias[:, None, None] / unit + 0.5)
        out = None if self.out is None else self.out.steps
        return IntegerConv(codes, offset, self.conv, unit, out, self.relu, self.bits, width)


class IntegerConv(nn.Module):
    """acc = sum q_w q_x + q_b in int32, ReLU, one dyadic factor an output channel, clamp to int8.

    unit: the real worth of an accumulator, S_w S_x `o 1 1`; out: the grid of its codes, or None to hand out accumulators
    bits: of the weight's codes; four and fewer are kept eight in an int32
    """

    packed: Tensor

    def __init__(self, weight, bias, conv: nn.Conv2d, unit: Tensor, out: Steps | None, relu: bool, bits: int, width: int):
        super().__init__()
        most = weight.abs().flatten(1).sum(1).double() * 128 + bias.flatten().abs().double()
        if most.max() >= 2**31:
            raise ValueError(f"an accumulator may reach {most.max():.3g}, beyond int32: fewer inputs, or a smaller bias")
        self.stride, self.padding, self.relu, self.unit, self.shape = conv.stride, conv.padding, relu, unit, weight.shape
        self.register_buffer("packed", pack4(weight) if bits <= 4 else weight.to(torch.int8))
        self.register_buffer("bias", bias.to(torch.int32))
        self.by = None if out is None else Rescale(dyadic(unit / out.step, width))
        self.ends = None if out is None else (out.low, out.high)

    @property
    def weight(self) -> Int8[Tensor, "o i k l"]:
        """Its codes, one in a byte."""
        return unpack4(self.packed).view(self.shape) if self.packed.dtype == torch.int32 else self.packed

    def forward(self, x: Integer[Tensor, "b i h w"]) -> Integer[Tensor, "b o p q"]:
        acc = F.conv2d(x.to(torch.int32), self.weight.to(torch.int32), None, self.stride, self.padding) + self.bias
        acc = acc.clamp(min=0) if self.relu else acc
        return acc if self.by is None else self.by(acc).clamp(*self.ends).to(torch.int8)


class Join(nn.Module):
    """A residual sum on a wide grid, then ReLU and the next layer's grid: both branches are rounded onto the wide one."""

    def __init__(self, out: Codes):
        super().__init__()
        self.wide, self.out = Codes(), out

    def forward(self, main: Tensor, branch: Tensor) -> Tensor:
        if self.training:
            self.wide.watch(main + branch)
        return self.out(F.relu(self.wide.snap(main, clamp=False) + self.wide.snap(branch, clamp=False)))

    def integer(self, main: Tensor, branch: Tensor, width: int = WIDTH) -> "IntegerJoin":
        """main, branch: the real worth of a unit of either, S_m (by channel, of an accumulator) and S_r."""
        wide, out = self.wide.steps, self.out.steps
        onward = dyadic(wide.step / out.step, width)
        return IntegerJoin(dyadic(main / wide.step, width), dyadic(branch / wide.step, width), onward, out)


class IntegerJoin(nn.Module):
    """q_a = DN(S_m / S_a) q_m + DN(S_r / S_a) q_r, unclamped; then ReLU, DN(S_a / S_out), clamp."""

    def __init__(self, main: Dyadic, branch: Dyadic, onward: Dyadic, out: Steps):
        super().__init__()
        self.main, self.branch, self.onward = Rescale(main), Rescale(branch), Rescale(onward)
        self.ends = out.low, out.high

    def sum(self, main: Integer[Tensor, "b c h w"], branch: Integer[Tensor, "b c h w"]) -> Integer[Tensor, "b c h w"]:
        """The wide code, before it goes on."""
        return (self.main(main) + self.branch(branch)).to(torch.int32)

    def forward(self, main: Tensor, branch: Tensor) -> Tensor:
        return self.onward(self.sum(main, branch).clamp(min=0)).clamp(*self.ends).to(torch.int8)


class Pool(nn.Module):
    """The mean of n x n places: a whole-number sum, and one factor in which 1 / n^2 and both steps stand together."""

    def __init__(self, n: int, out: Codes):
        super().__init__()
        self.n, self.out = n, out

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.avg_pool2d(x, self.n))

    def integer(self, step: Tensor, width: int = WIDTH) -> "IntegerPool":
        s = self.out.steps
        return IntegerPool(self.n, dyadic(step / s.step / self.n**2, width), (s.low, s.high))


class IntegerPool(nn.Module):
    def __init__(self, n: int, by: Dyadic, ends: tuple[int, int]):
        super().__init__()
        self.n, self.by, self.ends = n, Rescale(by), ends

    def forward(self, x: Integer[Tensor, "b c h w"]) -> Integer[Tensor, "b c p q"]:
        total = x.to(torch.int32).unflatten(2, (-1, self.n)).unflatten(4, (-1, self.n)).sum((3, 5), dtype=torch.int32)
        return self.by(total).clamp(*self.ends).to(torch.int8)


class Network(nn.Module):
    """Frames in, the same frames out, through a bottleneck of 16 channels at a quarter of the side: 91,000 weights.

    Everything that HAWQ-V3 speaks of: convolutions with batch norm and ReLU, one residual block, one average pool.
    Enlarging repeats codes and the last layer's channels become pixels, neither of which computes anything.
    """

    def __init__(self, d: int = 32):
        super().__init__()
        self.enter = Codes()
        self.first = Layer(3, d, 3, 2, out=Codes())
        self.one, self.two = Layer(d, d, 3, out=Codes()), Layer(d, d, 3, relu=False)
        self.join, self.pool = Join(Codes()), Pool(2, Codes())
        self.narrow = Layer(d, d // 2, 1, out=Codes())
        self.widen, self.more = Layer(d // 2, 2 * d, 3, out=Codes()), Layer(2 * d, 2 * d, 3, out=Codes())
        self.last = Layer(2 * d, 48, 3, relu=False, out=Codes())

    @property
    def layers(self) -> dict[str, Layer]:
        """By name, in order."""
        return {name: part for name, part in self.named_children() if isinstance(part, Layer)}

    def forward(self, x: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        step = lambda codes: None if codes.bits is None else codes.steps.step
        x = self.enter(x)
        x = self.first(x, step(self.enter))
        y = self.one(x, step(self.first.out))
        x = self.join(self.two(y, step(self.one.out)), x)
        x = self.pool(x)
        x = self.narrow(x, step(self.pool.out))
        x = self.widen(x, step(self.narrow.out))
        x = self.more(x, step(self.widen.out))
        return F.pixel_shuffle(self.last(x, step(self.more.out)), 4)

    def integer(self, width: int = WIDTH) -> "Integers":
        """The network that runs, with multipliers of `width` bits."""
        return Integers(self, width)


def quantise_all(net: Network, bits: int, momentum: float = 0.95) -> Network:
    """The same network on grids, in place: the first and last layer, and what enters and leaves them, stay at 8 bits."""
    ends = {net.enter, net.more.out, net.last.out}
    for part in net.modules():
        if isinstance(part, Codes):
            part.bits, part.momentum = 8 if part in ends else bits, momentum
        if isinstance(part, Layer):
            part.bits = 8 if part in (net.first, net.last) else bits
    net.join.wide.bits = WIDE
    return net


def fold(net: Network) -> Network:
    """Freeze every batch norm and let it live in weights and bias from now on, in place."""
    for layer in net.layers.values():
        layer.folded = True
    return net


class Integers(nn.Module):
    """The network that runs. `forward` is integers from end to end; `enter` and `leave` are its two doors."""

    def __init__(self, net: Network, width: int = WIDTH):
        super().__init__()
        step = lambda codes: codes.steps.step
        self.ends = net.enter.steps.low, net.enter.steps.high
        self.register_buffer("door", step(net.enter)), self.register_buffer("exit", step(net.last.out))
        self.first = net.first.integer(step(net.enter), width)
        self.one, self.two = net.one.integer(step(net.first.out), width), net.two.integer(step(net.one.out), width)
        self.join = net.join.integer(self.two.unit, step(net.first.out), width)
        self.pool = net.pool.integer(step(net.join.out), width)
        self.narrow = net.narrow.integer(step(net.pool.out), width)
        self.widen, self.more = net.widen.integer(step(net.narrow.out), width), net.more.integer(step(net.widen.out), width)
        self.last = net.last.integer(step(net.more.out), width)

    def enter(self, x: Float[Tensor, "b 3 h w"]) -> Int8[Tensor, "b 3 h w"]:
        return torch.floor(x / self.door + 0.5).clamp(*self.ends).to(torch.int8)

    def leave(self, codes: Int8[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        return codes * self.exit

    def forward(self, x: Int8[Tensor, "b 3 h w"]) -> Int8[Tensor, "b 3 h w"]:
        x = self.first(x)
        x = self.join(self.two(self.one(x)), x)
        x = self.narrow(self.pool(x))
        x = self.more(self.widen(x))
        return pixels(self.last(x), 4)


def pixels(x: Integer[Tensor, "b c h w"], n: int) -> Integer[Tensor, "b d p q"]:
    """Channels become pixels, as `torch.pixel_shuffle` does, but for integers too."""
    b, c, h, w = x.shape
    return x.view(b, c // n**2, n, n, h, w).permute(0, 1, 4, 2, 5, 3).reshape(b, c // n**2, h * n, w * n)
