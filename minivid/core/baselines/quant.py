"""Few bits: grids of values, rounding onto them, storing codes in packed bytes, and sharing out a budget of bits.

    value = step * code + offset,   code = clamp(round((x - offset) / step), low, high)

What is unusual here: a tensor, a channel, a group and a token differ only in the *shape* of step and offset, so one function
serves all; the learnt step size (LSQ) is nothing but the gradient of that formula; and bytes are counted on integers that are
really packed, with steps that are really fp16. Arithmetic on a CPU gets no faster by it: nothing here claims so.

    per tensor   symmetric(w, 8)           per output channel   symmetric(w, 4, dim=1)              w: `o i`
    per token    minmax(x, 8, dim=-1)      per group of 64      symmetric(w.unflatten(1, (-1, 64)), 4, dim=-1)
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Integer, UInt8
from torch import Tensor, nn

from .vq import straight


class Steps(NamedTuple):
    """An even grid of values. step, offset: of shapes that broadcast with what they are for; codes: low ... high."""

    step: Tensor
    offset: Tensor
    low: int
    high: int

    def scaled(self, p) -> "Steps":
        """The same codes on a grid p times as wide."""
        return self._replace(step=self.step * p, offset=self.offset * p)

    def stored(self) -> "Steps":
        """With step and offset as fp16 keeps them: round with these, and storing them loses nothing."""
        step, offset = self.step.half().to(self.step), self.offset.half().to(self.offset)
        if not (torch.isfinite(step).all() and torch.isfinite(offset).all() and (step > 0).all()):
            raise ValueError(f"steps from {self.step.min():.3g} to {self.step.max():.3g} don't fit into fp16: scale the weights")
        return self._replace(step=step, offset=offset)

    def each(self, w: Tensor) -> "Steps":
        """With one step and offset for every number of the matrix w `o i`, from those of rows `o 1` or groups `o g 1`."""
        wide = lambda t: t.expand(*t.shape[:-1], w.numel() // t.numel()).reshape(w.shape)
        return self._replace(step=wide(self.step), offset=wide(self.offset.expand(self.step.shape)))


def _bits(bits: int, least: int, most: int = 16) -> int:
    if not least <= bits <= most:
        raise ValueError(f"bits go from {least} to {most} here, got {bits}")
    return bits


def between(low: Float[Tensor, "..."], high: Float[Tensor, "..."], bits: int) -> Steps:
    """A grid of 2^bits values from low to high (a grid of width 0 gets step 1)."""
    step = (high - low) / (2 ** _bits(bits, 1) - 1)
    return Steps(torch.where(step > 0, step, 1.0), low, 0, 2**bits - 1)


def around(most: Float[Tensor, "..."], bits: int) -> Steps:
    """A grid around 0, which is on it, as are +-most: step = most / (2^(bits-1) - 1); at least 2 bits."""
    step = most / (2 ** (_bits(bits, 2) - 1) - 1)
    return Steps(torch.where(step > 0, step, 1.0), torch.zeros_like(step), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def minmax(x: Float[Tensor, "..."], bits: int, dim: int | tuple[int, ...] = ()) -> Steps:
    """`between` the smallest and the largest number. dim: axes that share a step (kept, with size 1); () is all of them."""
    return between(x.amin(dim, keepdim=True), x.amax(dim, keepdim=True), bits)


def symmetric(x: Float[Tensor, "..."], bits: int, dim: int | tuple[int, ...] = ()) -> Steps:
    """`around` 0 as far as the number of largest size. dim as in `minmax`."""
    return around(x.abs().amax(dim, keepdim=True), bits)


def quantise(x: Float[Tensor, "..."], s: Steps) -> Int[Tensor, "..."]:
    """The codes of the nearest values (ties to even codes, as everywhere in PyTorch)."""
    return ((x - s.offset) / s.step).round().clamp(s.low, s.high).to(torch.int32)


def dequantise(codes: Integer[Tensor, "..."], s: Steps) -> Float[Tensor, "..."]:
    """The values that codes stand for."""
    return codes * s.step + s.offset


def fake_quantise(x: Float[Tensor, "..."], s: Steps) -> Float[Tensor, "..."]:
    """Values on the grid, with a gradient: 1 to x where its code wasn't clamped, else 0; to step and offset that of LSQ.

    Esser et al. 2020, arXiv 1902.08153, eq. 3: d value / d step = code - (x - offset) / step inside, the end's code outside.
    A grid made from x itself hands its gradient on to the ends of x's range; make it from `x.detach()` where that isn't meant.
    """
    v = (x - s.offset) / s.step
    return straight(v.round(), v).clamp(s.low, s.high) * s.step + s.offset


def search(x: Float[Tensor, "..."], s: Steps, dim: int | tuple[int, ...] = (), power: float | int = 2, tries: int = 80) -> Steps:
    """Of the grid scaled by 1, 0.99, 0.98 ... the one with the least sum of |error|^power over the axes `dim`, each by itself.

    A few large numbers may be worth clipping. dim, as `s` was made with; power 2.4 is GPTQ's and QVGen's.
    """
    error = lambda p: (dequantise(quantise(x, s.scaled(p)), s.scaled(p)) - x).abs().pow(power).sum(dim, keepdim=True)
    best, least = torch.ones_like(s.step), error(1.0)
    for k in range(1, tries):
        now = error(1 - k / 100)
        best, least = torch.where(now < least, 1 - k / 100, best), torch.minimum(now, least)
    return s.scaled(best)


class LearnedSteps(nn.Module):
    """A grid whose step learns, and its offset too if it has one (LSQ; LSQ+, Bhalgat et al. 2020, arXiv 2004.09576).

    n: how many numbers share a step; the gradient is scaled by 1 / sqrt(n high), section 2.2, to keep pace with the weights'
    """

    def __init__(self, start: Steps, n: int):
        super().__init__()
        self.low, self.high, self.scale = start.low, start.high, 1 / math.sqrt(n * start.high)
        self.step = nn.Parameter(start.step.clone())
        self.offset = nn.Parameter(start.offset.clone(), requires_grad=start.low == 0)

    @property
    def steps(self) -> Steps:
        """The grid as it is now, with its scaled gradient."""
        slow = lambda p: straight(p, p * self.scale)
        return Steps(slow(self.step), slow(self.offset), self.low, self.high)

    @property
    @torch.no_grad()
    def learnt(self) -> Steps:
        """The grid for keeps. A step that learning took across 0 makes its values run downwards from the offset: turned round."""
        down, top = (self.step < 0) & (self.low == 0), self.offset + self.high * self.step
        return Steps(torch.where(down, -self.step, self.step), torch.where(down, top, self.offset), self.low, self.high)

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        return fake_quantise(x, self.steps)


def smoothing(inputs: Float[Tensor, "i"], weights: Float[Tensor, "i"], alpha: float | int = 0.5) -> Float[Tensor, "i"]:
    """SmoothQuant's factors s: the layer takes x / s and its weight's columns times s, and says what it said.

    inputs, weights: the largest size of each input channel, and of the weight's column that meets it. alpha 1 makes all
    inputs equally large, 0 all columns. Xiao et al. 2022, arXiv 2211.10438, eq. 4.
    """
    return (inputs.clamp(min=1e-5) ** alpha / weights.clamp(min=1e-5) ** (1 - alpha)).clamp(min=1e-5)


def hadamard(x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
    """x H / sqrt(d): an orthogonal mix of all channels with entries +-1 / sqrt(d), which spreads an outlier over all of them.

    d = m 2^j takes j passes of sums and differences (the fast Walsh-Hadamard transform) and one product with a matrix of
    size m: 1, or a number like 12, 20, 44 (Paley 1933: m - 1 a prime, 3 modulo 4). For powers of two it is its own inverse.
    A random rotation is `hadamard(x * signs)`.
    """
    d = x.shape[-1]
    m = next((m for m in (d >> j for j in reversed(range(d.bit_length())) if d % (1 << j) == 0) if _paley(m)), None)
    if m is None:
        raise ValueError(f"no Hadamard matrix of size {d} is known here: take 2^j, or 2^j times 12, 20, 44 ...")
    y = x.unflatten(-1, (-1, m))
    y = y @ _mixer(m).to(x) if m > 1 else y
    for j in range((d // m).bit_length() - 1):
        pairs = y.unflatten(-2, (-1, 2, 1 << j))
        one, two = pairs[..., 0, :, :], pairs[..., 1, :, :]
        y = torch.stack([one + two, one - two], -3).flatten(-4, -2)
    return y.flatten(-2) * d**-0.5


def _paley(m: int) -> bool:
    q = m - 1
    return m == 1 or q % 4 == 3 and all(q % p for p in range(2, math.isqrt(q) + 1))


def _mixer(m: int) -> Float[Tensor, "m m"]:
    """Paley's matrix: 1 + [[0, 1], [-1, chi(i - j)]], where chi says whether a number is a square modulo m - 1."""
    q, i = m - 1, torch.arange(m - 1)
    chi = torch.full((q,), -1.0).index_fill(0, i * i % q, 1.0).index_fill(0, i[:1], 0.0)
    h = torch.eye(m)
    h[0, 1:], h[1:, 0] = 1, -1
    h[1:, 1:] += chi[(i[:, None] - i) % q]
    return h


@torch.no_grad()
def gptq(w: Float[Tensor, "o i"], gram: Float[Tensor, "i i"], s: Steps, damp: float | int = 0.01) -> Int[Tensor, "o i"]:
    """Codes of w that keep X w' (not w): column by column, what one rounds wrong is made good by those not yet rounded.

        err = (w_j - q_j) / U_jj,   w_later -= err U_j,later,   U'U = (X'X + damp mean diag)^-1, U upper triangular

    Frantar et al. 2022, arXiv 2210.17323, algorithm 1, in float64 and without its blocks, the largest diagonal first (the
    authors' act-order). gram: X'X of the inputs; s: a grid for each row `o 1` or group `o g 1`, fixed beforehand.
    """
    order = gram.diagonal().argsort(descending=True)
    h, rest = gram.double()[order][:, order], w.double()[:, order]
    if not (torch.isfinite(h).all() and h[0, 0] > 0):
        raise ValueError("X'X must be finite and not all 0: were inputs recorded?")
    h = h + damp * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype, device=h.device)
    u = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    step, offset = (t.double()[:, order] for t in s.each(w)[:2])
    codes = torch.zeros_like(w, dtype=torch.int32)
    for j, place in enumerate(order):
        here = s._replace(step=step[:, j], offset=offset[:, j])
        codes[:, place] = quantise(rest[:, j], here)
        error = (rest[:, j] - dequantise(codes[:, place], here)) / u[j, j]
        rest[:, j + 1 :] -= torch.outer(error, u[j, j + 1 :])
    return codes


def pack(codes: Integer[Tensor, "*n"], bits: int) -> UInt8[Tensor, "m"]:
    """Codes in [0, 2^bits), bits 1 to 8, as a stream of bits in ceil(n bits / 8) bytes, the lowest bit first."""
    _within(codes, 2 ** _bits(bits, 1, 8))
    places = torch.arange(8, dtype=torch.uint8, device=codes.device)
    stream = (codes.reshape(-1, 1).to(torch.uint8) >> places[:bits] & 1).flatten()
    return (F.pad(stream, (0, -len(stream) % 8)).view(-1, 8) << places).sum(1, dtype=torch.uint8)


def unpack(packed: UInt8[Tensor, "m"], bits: int, n: int) -> UInt8[Tensor, "n"]:
    """The n codes that `pack` wrote."""
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    stream = (packed[:, None] >> places & 1).flatten()[: n * bits]
    return (stream.view(n, bits) << places[:bits]).sum(1, dtype=torch.uint8)


def pack3(codes: Integer[Tensor, "*n"]) -> UInt8[Tensor, "m"]:
    """Codes 0, 1, 2, five in a byte (3^5 = 243): 1.6 bits each, where log2 3 = 1.585 is the least."""
    _within(codes, 3)
    powers = 3 ** torch.arange(5, device=codes.device)
    return (F.pad(codes.flatten(), (0, -codes.numel() % 5)).view(-1, 5) * powers).sum(1).to(torch.uint8)


def unpack3(packed: UInt8[Tensor, "m"], n: int) -> UInt8[Tensor, "n"]:
    """The n codes that `pack3` wrote."""
    return (packed[:, None] // 3 ** torch.arange(5, device=packed.device) % 3).flatten()[:n].to(torch.uint8)


def _within(codes: Tensor, limit: int) -> None:
    if codes.numel() and not (0 <= int(codes.min()) and int(codes.max()) < limit):
        raise ValueError(f"codes lie in [0, {limit}), got {int(codes.min())} to {int(codes.max())}")


class QuantisedLinear(nn.Module):
    """A linear layer that keeps its weight as packed codes, its steps (and offsets, if any) in fp16, its bias as it was.

    codes:  `o i` in the range of s; s: a grid for each row `o 1` or group `o g 1`, rounded by `Steps.stored` beforehand
    inputs: None, or what the input goes through first: a fake quantiser (`lambda x: fake_quantise(x, minmax(x, 8, -1))`)
    """

    def __init__(self, codes: Int[Tensor, "o i"], s: Steps, bias: Tensor | None = None, inputs: Callable | None = None):
        super().__init__()
        self.shape, self.low, self.high, self.inputs = tuple(codes.shape), s.low, s.high, inputs
        self.register_buffer("packed", pack(codes - s.low, self.bits))
        self.register_buffer("step", s.step.half())
        self.register_buffer("offset", s.offset.half() if s.offset.any() else None)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    @classmethod
    @torch.no_grad()
    def of(cls, linear: nn.Linear, s: Steps, gram: Tensor | None = None, inputs: Callable | None = None) -> "QuantisedLinear":
        """A trained layer on the grid s: to the nearest codes, or by `gptq` where X'X of its inputs is given."""
        s = s.stored()
        codes = quantise(linear.weight, s.each(linear.weight)) if gram is None else gptq(linear.weight, gram, s)
        return cls(codes, s, linear.bias, inputs)

    @property
    def bits(self) -> int:
        """Bits a code."""
        return (self.high - self.low).bit_length()

    @property
    def nbytes(self) -> int:
        """Bytes of everything the layer keeps: codes, steps, offsets, bias."""
        return sum(t.nbytes for t in (*self.buffers(), *self.parameters()))

    @property
    def weight(self) -> Float[Tensor, "o i"]:
        """The weight that the codes stand for, in float32."""
        codes = unpack(self.packed, self.bits, math.prod(self.shape)).view(self.shape).int() + self.low
        offset = torch.zeros_like(self.step) if self.offset is None else self.offset
        return dequantise(codes, Steps(self.step.float(), offset.float(), self.low, self.high).each(codes))

    def forward(self, x: Float[Tensor, "*n i"]) -> Float[Tensor, "*n o"]:
        return F.linear(x if self.inputs is None else self.inputs(x), self.weight, self.bias)


class CodebookLinear(nn.Module):
    """A linear layer that keeps which codewords its weight is made of as packed bits, and its bias as it was.

    shape: `o i` of the weight; index: `o i/d`, or flat, codewords of its groups of d, row after row
    codes: `k d` in fp16, k up to 256. It isn't copied: layers that are given the same tensor share it, and it is stored once
    """

    def __init__(self, shape: tuple[int, int], index: Integer[Tensor, "*m"], codes: Float[Tensor, "k d"], bias: Tensor | None):
        super().__init__()
        self.shape = tuple(shape)
        self.register_buffer("codes", codes)
        self.register_buffer("packed", pack(index, self.bits))
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    @property
    def bits(self) -> int:
        """Bits of a codeword's number."""
        return max(1, (len(self.codes) - 1).bit_length())

    @property
    def weight(self) -> Float[Tensor, "o i"]:
        """The weight that the codewords make, in float32."""
        index = unpack(self.packed, self.bits, math.prod(self.shape) // self.codes.shape[1])
        return self.codes.float()[index.long()].view(self.shape)

    def forward(self, x: Float[Tensor, "*n i"]) -> Float[Tensor, "*n o"]:
        return F.linear(x, self.weight, self.bias)


def allocate(
    cost: Float[Tensor, "l k"], limits: list[tuple[Float[Tensor, "l k"], float | int]], ties: tuple[tuple[int, int], ...] = ()
) -> Int[Tensor, "l"]:
    """Which of k options each of l layers takes, at the least sum of costs, with every budget kept (an integer program).

    limits: pairs (what option k of layer l uses, the most that all may use together): bytes, operations, seconds
    ties:   pairs of layers that take the same option
    The program of HAWQ-V3 (Yao et al. 2021, arXiv 2011.10680), solved by HiGHS. Raises ValueError when no choice fits.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    l, k = cost.shape
    flat = lambda t: t.detach().double().cpu().numpy().reshape(-1)
    rows = [LinearConstraint(np.kron(np.eye(l), np.ones(k)), 1, 1)]  # one option a layer
    unit = [max(float(use.abs().max()), 1e-300) for use, _ in limits]  # its tolerance is absolute: 1e-6 of a billion is noise
    rows += [LinearConstraint(flat(use)[None] / u, -np.inf, most / u) for (use, most), u in zip(limits, unit, strict=True)]
    rows += [LinearConstraint(np.kron(np.eye(l)[a] - np.eye(l)[b], np.eye(k)), 0, 0) for a, b in ties]
    goal = flat(cost) / max(float(cost.abs().max()), 1e-300)  # the solver takes differences below 1e-6 for nothing
    found = milp(goal, integrality=np.ones(l * k), bounds=Bounds(0, 1), constraints=rows, options={"mip_rel_gap": 0})
    if found.x is None:
        raise ValueError(f"no choice keeps all budgets {[most for _, most in limits]} ({found.message})")
    return torch.from_numpy(found.x.reshape(l, k).argmax(1))


Operator = Callable[[list[Tensor]], list[Tensor]]


def _dot(a: list[Tensor], b: list[Tensor]) -> list[float]:
    return [float((x * y).sum()) for x, y in zip(a, b, strict=True)]


def hessian(loss: Float[Tensor, ""], weights: list[Tensor]) -> Operator:
    """v -> H v of a loss with its graph, in one backward pass of the backward pass (Pearlmutter 1994).

    The network must be differentiable twice: attention is `core.attention.unfused`, not the fused kernel.
    """
    first = torch.autograd.grad(loss, weights, create_graph=True, materialize_grads=True)
    return lambda v: list(torch.autograd.grad(first, weights, v, retain_graph=True, materialize_grads=True))


def traces(apply: Operator, like: list[Tensor], generator: torch.Generator, probes: int = 32) -> Float[Tensor, "p"]:
    """Trace of a symmetric operator's block of each tensor in `like`: the mean of v'Hv over vectors v of random signs.

    Hutchinson 1990. One probe is exact where the operator is diagonal; elsewhere the error falls as 1 / sqrt(probes).
    """
    total = torch.zeros(len(like), dtype=torch.float64)
    for _ in range(probes):
        v = [torch.randint(0, 2, p.shape, generator=generator, device=p.device).to(p) * 2 - 1 for p in like]
        total += torch.tensor(_dot(v, apply(v)))
    return total / probes


def largest(apply: Operator, like: list[Tensor], generator: torch.Generator, rounds: int = 100) -> tuple[float, list[Tensor]]:
    """The eigenvalue of largest size of a symmetric operator and its vector of length 1, by power iteration.

    The top singular value of a matrix w is the root of that of `lambda v: [w.T @ (w @ v[0])]`.
    """
    value, w = 0.0, [torch.randn(p.shape, generator=generator, device=p.device).to(p) for p in like]
    for _ in range(rounds):
        size = math.sqrt(sum(_dot(w, w))) or 1.0
        v = [a / size for a in w]
        w = apply(v)
        value = sum(_dot(v, w))
    return value, v
