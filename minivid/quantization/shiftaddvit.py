"""ShiftAddViT: attention by additions, layers by bit shifts, and a router that says which tokens may still multiply.

Paper:   ShiftAddViT: Mixture of Multiplication Primitives Towards Efficient Vision Transformer (2023), arXiv 2306.06446
Kind:    surgery (a trained model in, one of cheaper primitives out; tuned by distillation)
Equal:   weights that are powers of two are the layer itself; two experts alike are the dense layer, however tokens are routed
Claim:   additive attention costs less quality than shifted feed-forward layers; the share of tokens that shift follows the
         latencies within 5 points; at one share, a learnt router loses 10 % less of the gap than a random one
Differs: a video generator of 1.9 M parameters, tuned by distillation in some hundred steps. Thresholds of codes are running
         means of each head, not means over the batch, which made a clip depend on its neighbours. A gain of each head makes
         good the scale that the normalisation takes, and the convolution starts at 0. The gate is 1 forwards and p_i backwards:
         the released router's constant 1 gives the task no say, and the plain product (`Mixture.product`) halves a trained
         layer's output at p = 1/2. Linear form only, thresholds only (no learnt hashing); shift layers keep float weights behind
         their codes (DeepShift's Q, not PS). Inferred: how L_imp and L_load are written, that both experts start from the
         trained weights, that no noise is added to logits

    codes b = 1[x > threshold],   o = norm(v / 2 + b_q (b_k' v) / pi) + conv(v),   w ~ sign(w) 2^round(log2 |w|)

What is unusual here: no processor is faster by any of this, so operations are counted and weighed with a table of energies; and
the integer engine at the end proves that shifts and additions alone give the layer's numbers, exactly.
"""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ..core import fit
from ..core.attention import dense, grouped
from ..core.baselines.quant import pack, unpack
from ..core.baselines.vq import straight
from ..core.surgery import swap
from ..core.where import Where, visible

BITS, LOWEST, POINT = 5, -14, 16  # of a code; least exponent, the greatest is 0; binary places of a fixed-point number
PICOJOULE = {"multiply": 3.7, "add": 0.9, "shift": 0.13}  # 32-bit, one operation; memory isn't in it


# --- additions --------------------------------------------------------------------------------------------------------


def binary(x: Float[Tensor, "*n"], threshold: Float[Tensor, "..."]) -> Float[Tensor, "*n"]:
    """Codes 1[x > threshold]; backwards clip(x, 0, 1): gradient 1 for x inside (0, 1), 0 outside."""
    return straight((x > threshold).to(x), x.clamp(0, 1))


def linear_angular(
    q: Float[Tensor, "b k n d"], k: Float[Tensor, "b k n d"], v: Float[Tensor, "b k n e"]
) -> Float[Tensor, "b k n e"]:
    """v / 2 + q (k' v) / pi: the angular kernel without its higher terms, `n d e` operations instead of `n n d`."""
    return 0.5 * v + q @ (k.transpose(-1, -2) @ v) / math.pi


class Additive(nn.Module):
    """An attention `(q, k, v, where) -> o` over all tokens that reads binary codes of queries and keys.

    heads:  of the queries. coded: False is the same with the unit vectors themselves, the float baseline
    The first call in training mode sets thresholds and gains from what it sees; later ones move the thresholds slowly.
    """

    def __init__(self, heads: int, coded: bool = True, momentum: float = 0.05):
        super().__init__()
        self.heads, self.coded, self.momentum = heads, coded, momentum
        self.gain = nn.Parameter(torch.ones(heads, 1, 1))
        self.filter = nn.Parameter(torch.zeros(heads, 1, 9, 1))  # along tokens, one a head
        self.register_buffer("threshold", torch.zeros(2, heads, 1, 1))
        self.register_buffer("begun", torch.tensor(False))

    def forward(
        self, q: Float[Tensor, "b k n d"], k: Float[Tensor, "b g n d"], v: Float[Tensor, "b g n e"], where: Where
    ) -> Float[Tensor, "b k n e"]:
        if visible(where) is not None or k.shape[2] != q.shape[2]:
            raise ValueError("additive attention sums over all tokens of one call: it takes no mask and no cached keys")
        exact = (q, k, v)
        q, k, v = F.normalize(q, dim=-1), F.normalize(grouped(q, k), dim=-1), grouped(q, v)
        if self.training:
            self._follow(q, k, v, exact, where)
        if self.coded:
            q, k = binary(q, self.threshold[0]), binary(k, self.threshold[1])
        y = F.normalize(linear_angular(q, k, v), dim=-1) * self.gain
        return y + F.conv2d(v, self.filter, padding=(4, 0), groups=self.heads)

    @torch.no_grad()
    def _follow(self, q: Tensor, k: Tensor, v: Tensor, exact: tuple, where: Where) -> None:
        now = torch.stack([q.mean((0, 2, 3)), k.mean((0, 2, 3))])[..., None, None]
        self.threshold.lerp_(now, self.momentum if self.begun else 1.0)
        if not self.begun:
            q, k, v = exact
            self.gain.copy_(dense(q, k, v, where).norm(dim=-1).mean((0, 2))[:, None, None])
            self.begun.fill_(True)


# --- shifts -----------------------------------------------------------------------------------------------------------


def power(w: Float[Tensor, "*n"]) -> tuple[Float[Tensor, "*n"], Int[Tensor, "*n"]]:
    """Sign (0 for a zero) and exponent in [-14, 0] of the power of two that is nearest in the logarithm."""
    p = w.abs().clamp_min(2.0 ** (LOWEST - 1)).log2().round().clamp(LOWEST, 0)
    return w.sign(), p.int()


def fixed(x: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """The fixed-point number with 16 binary places below or at x; gradient 1."""
    return straight((x * 2**POINT).floor() / 2**POINT, x)


class Shift(nn.Module):
    """A linear layer whose weights are 0 or +-2^p. It learns the float weights behind them, straight through the rounding."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.latent = nn.Parameter(linear.weight.detach().clone())
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().clone())

    @property
    def weight(self) -> Float[Tensor, "o i"]:
        """The weights of sign and shift."""
        sign, p = power(self.latent.detach())
        return straight(torch.ldexp(sign, p), self.latent)

    def forward(self, x: Float[Tensor, "*n i"]) -> Float[Tensor, "*n o"]:
        return F.linear(fixed(x), self.weight, None if self.bias is None else fixed(self.bias))

    def packed(self) -> "PackedShift":
        """The layer as it is stored."""
        return PackedShift(self)


class PackedShift(nn.Module):
    """A shift layer as bytes: five bits a weight, 0 for a zero, else exponent + 15, and 16 more for a minus."""

    packed: Tensor

    def __init__(self, layer: Shift):
        super().__init__()
        sign, p = power(layer.latent.detach())
        codes = torch.where(sign == 0, 0, p - LOWEST + 1 + 16 * (sign < 0).int())
        self.shape = tuple(codes.shape)
        self.register_buffer("packed", pack(codes, BITS))
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone())

    def parts(self) -> tuple[Int[Tensor, "o i"], Int[Tensor, "o i"]]:
        """Signs and exponents."""
        codes = unpack(self.packed, BITS, math.prod(self.shape)).view(self.shape).int()
        return torch.where(codes == 0, 0, 1 - 2 * (codes >> 4)), (codes & 15) - 1 + LOWEST

    def forward(self, x: Float[Tensor, "*n i"]) -> Float[Tensor, "*n o"]:
        sign, p = self.parts()
        return F.linear(fixed(x), torch.ldexp(sign.to(x), p), None if self.bias is None else fixed(self.bias))


def engine(x: Int[Tensor, "n i"], sign: Int[Tensor, "o i"], p: Int[Tensor, "o i"], truncate: bool = False) -> Int[Tensor, "n o"]:
    """A shift layer in integers: nothing but <<, >>, + and -. x: fixed point, 16 binary places.

    Sums have 30 binary places, and nothing is lost; with `truncate` each term is shifted right first, as cheap hardware does:
    sums of 16 places, each term up to 2^-16 too small or too large.
    """
    x, p = x.long()[:, None], p.long()[None]
    terms = x >> -p if truncate else x << (p - LOWEST)
    return torch.where(sign > 0, terms, torch.where(sign < 0, -terms, 0)).sum(-1)


# --- the mixture ------------------------------------------------------------------------------------------------------


class Mixture(nn.Module):
    """Two experts of one layer, a real product and a shift; each token goes to one of them.

    product: weigh the expert's output by p_i, as a plain mixture does; else by 1 with the gradient of p_i
    chance:  None, or the share of tokens that shift at random instead, by `dice`
    After a call `logits` `n 2` and `shifted` `n` tell of its tokens.
    """

    def __init__(self, linear: nn.Linear, generator: torch.Generator, product: bool = False, chance: float | None = None):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(linear.in_features, linear.out_features, linear.bias is not None), Shift(linear)])
        self.experts[0].load_state_dict(linear.state_dict())
        self.router = nn.Linear(linear.in_features, 2)
        with torch.no_grad():  # wide enough that tokens differ: at 0 all would change sides together
            self.router.weight.copy_(torch.randn(self.router.weight.shape, generator=generator) * linear.in_features**-0.5)
            self.router.bias.zero_()
        self.product, self.chance, self.dice = product, chance, generator
        self.logits: Tensor | None = None
        self.shifted: Tensor | None = None

    def route(self, logits: Float[Tensor, "n 2"]) -> Bool[Tensor, "n"]:
        """Which tokens shift."""
        if self.chance is not None:
            return torch.rand(len(logits), generator=self.dice) < self.chance
        return logits[:, 1] > logits[:, 0]

    def forward(self, x: Float[Tensor, "*n i"]) -> Float[Tensor, "*n o"]:
        flat = x.flatten(0, -2)
        self.logits = self.router(flat)
        self.shifted = self.route(self.logits)
        p = self.logits.softmax(-1).gather(1, self.shifted.long()[:, None])
        gate = p if self.product else p / p.detach()
        y = flat.new_zeros(len(flat), len(self.experts[0].weight))
        for expert, mine in zip(self.experts, (~self.shifted, self.shifted), strict=True):
            y = y.index_copy(0, mine.nonzero()[:, 0], expert(flat[mine]))
        return (y if self.chance is not None else gate * y).unflatten(0, x.shape[:-1])


def scv(v: Float[Tensor, "n"]) -> Float[Tensor, ""]:
    """Squared coefficient of variation: 0 iff all are equal, and the same for any scale."""
    return v.var(correction=0) / (v.mean().square() + 1e-10)


def balance(logits: Float[Tensor, "n 2"], latency: Sequence[float | int]) -> Float[Tensor, ""]:
    """L_imp + L_load: 0 where latency_i times the tokens of expert i are alike, in probabilities and in (soft) counts.

    latency: of product and shift, in any unit. A count is Phi((own logit - other) / std), std = 1 / 2: who would win under noise.
    """
    alpha = torch.as_tensor(latency, dtype=logits.dtype)
    if alpha.shape != (2,) or not (alpha > 0).all():
        raise ValueError(f"latencies are two positive numbers, of product and shift, got {list(latency)}")
    alpha = alpha / alpha.sum()
    wins = torch.special.ndtr((logits - logits.flip(-1)) * 2)
    return scv(alpha * logits.softmax(-1).sum(0)) + scv(alpha * wins.sum(0))


def mixtures(model: nn.Module) -> dict[str, Mixture]:
    """The mixtures of a model, by name."""
    return {name: part for name, part in model.named_modules() if isinstance(part, Mixture)}


def converted(model: nn.Module, names: Iterable[str], make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """The model with each named linear layer made anew from the old; all else is shared with the model."""
    found = {name: model.get_submodule(name) for name in names}
    if wrong := [name for name, part in found.items() if not isinstance(part, nn.Linear)]:
        raise ValueError(f"only linear layers can be shifted; these are none: {', '.join(wrong)}")
    return swap(model, {name: make(part) for name, part in found.items()})


def distil(student: nn.Module, pairs: Iterable[tuple[tuple, Tensor]], rate: float = 1e-4,
           latency: Sequence[float | int] | None = None, weight: float | int = 0.01, steps: int = 0) -> list[float]:  # fmt: skip
    """One step of Adam for each pair (call, what the teacher said); returns the relative squared errors.

    rate: of all that can learn but routers, which learn ten times as fast, for they begin with no skill at all
    steps: how many pairs there are, over which rates warm up and fall to 0 by a cosine; 0 leaves them alone
    latency: None for no balance, else `weight` times the mean balance of all mixtures is added
    """
    student.train()
    routers = {id(p) for one in mixtures(student).values() for p in one.router.parameters()}
    groups: tuple[list, list] = [], []
    for p in student.parameters():
        if p.requires_grad:
            groups[id(p) in routers].append(p)
    rates = [{"params": some, "lr": lr, "peak": lr} for some, lr in zip(groups, (rate, 10 * rate), strict=True) if some]
    optimiser, told = torch.optim.Adam(rates), []
    for i, (call, said) in enumerate(pairs):
        for group in optimiser.param_groups if steps else ():
            group["lr"] = group["peak"] * fit.cosine(i, steps, max(1, steps // 10))
        loss = (student(*call) - said).square().mean() / said.square().mean()
        told.append(loss.item())
        if latency is not None:
            each = [balance(one.logits, latency) for one in mixtures(student).values() if one.logits is not None]
            loss = loss + weight * torch.stack(each).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    student.eval()
    return told


# --- the bill ---------------------------------------------------------------------------------------------------------


def energy(multiply: float | int = 0, add: float | int = 0, shift: float | int = 0) -> float:
    """Picojoules of so many 32-bit operations; the sum that follows a shift is an `add`, and charged."""
    return PICOJOULE["multiply"] * multiply + PICOJOULE["add"] * add + PICOJOULE["shift"] * shift


def layer_energy(n: int, i: int, o: int, shifted: float | int = 0.0, routed: bool = False) -> float:
    """Of n tokens through a layer i -> o of which a share shifts; `routed` adds the router's own products."""
    router = 2 * n * i * routed
    return energy((1 - shifted) * n * i * o + router, n * i * o + router, shifted * n * i * o)


def attention_energy(n: int, d: int, heads: int, kind: str) -> float:
    """Of heads of width d over n tokens, both products: "dense" (n n d each), "linear" (n d d) or "additive" (only sums)."""
    if kind not in ("dense", "linear", "additive"):
        raise ValueError(f"attention is 'dense', 'linear' or 'additive', got {kind!r}")
    sums = 2 * heads * n * d * (n if kind == "dense" else d)
    return energy(0 if kind == "additive" else sums, sums)
