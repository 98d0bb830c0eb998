"""Fewer weights: factors of a matrix, masks on it, and small corrections beside it.

    w ~ a b     w: `o i` (as nn.Linear keeps it, y = x w'),  a: `o r`,  b: `r i`

What is unusual here: the best factors in the weight's own norm and those in the norm of the layer's *outputs* (given X'X of
its inputs) are one function; a head is a row of a batch, so `svd(rearrange(w, "(k d) i -> k d i", k=heads), r)` is the
decomposition per head; and every changed layer can be merged back into a plain one, which must say the same.
"""

import copy
import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.utils import skip_init


@torch.no_grad()
def svd(
    w: Float[Tensor, "*k o i"], rank: int, gram: Float[Tensor, "... i i"] | None = None, ridge: float = 1e-8
) -> tuple[Float[Tensor, "*k o r"], Float[Tensor, "*k r i"]]:
    """The best factors of rank r: a b minimises |w - a b| (Eckart & Young 1936) or, with X'X, |X (w - a b)'|; in float64.

    With gram = S S: the plain factors of w S, then b S^-1 (activation-whitened SVD: SVD-LLM, Wang et al. 2024, arXiv
    2403.07378, with the symmetric root for S, whose eigenvalues are held above `ridge` times their mean so that directions
    without inputs stay finite). Each factor carries the root of the singular values, the largest first: the first terms of a
    and b are the best factors of a lower rank.
    """
    if not 0 <= rank <= min(w.shape[-2:]):
        raise ValueError(f"a matrix {tuple(w.shape[-2:])} has ranks 0 to {min(w.shape[-2:])}, got {rank}")
    wide, back = w.double(), None
    if gram is not None:
        value, vector = torch.linalg.eigh(gram.double())
        least = ridge * value.mean(-1, keepdim=True)
        if not (least > 0).all():
            raise ValueError("X'X must be finite and not all 0: were inputs recorded?")
        scaled = lambda p: vector * value.maximum(least).pow(p).unsqueeze(-2) @ vector.mT
        wide, back = wide @ scaled(0.5), scaled(-0.5)
    u, s, v = torch.linalg.svd(wide, full_matrices=False)
    root = s[..., :rank].sqrt()
    a, b = u[..., :rank] * root[..., None, :], root[..., None] * v[..., :rank, :]
    return a.to(w.dtype), (b if back is None else b @ back).to(w.dtype)


def rank_for(o: int, i: int, share: float | int) -> int:
    """The largest rank whose factors have at most this share of the matrix's numbers: r (o + i) <= share o i."""
    return min(int(share * o * i / (o + i) + 1e-9), o, i)


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A plain layer of these numbers (copied)."""
    layer = skip_init(nn.Linear, weight.shape[1], weight.shape[0], bias is not None, device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer


class Factored(nn.Module):
    """A linear layer as two thin ones, y = (x b') a' + bias. Of rank 0 it says its bias.

    a `o r`, b `r i`: begun with `Factored.of(linear, rank)`, or any factors
    """

    def __init__(self, a: Float[Tensor, "o r"], b: Float[Tensor, "r i"], bias: Float[Tensor, "o"] | None = None):
        super().__init__()
        self.a, self.b = nn.Parameter(a.detach().clone()), nn.Parameter(b.detach().clone())
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    @classmethod
    def of(cls, linear: nn.Linear, rank: int, gram: Tensor | None = None) -> "Factored":
        """The best of this rank for a trained layer, in the norm of its outputs where X'X of its inputs is given."""
        return cls(*svd(linear.weight.detach(), rank, gram), linear.bias)

    @property
    def rank(self) -> int:
        return self.a.shape[1]

    def forward(self, x: Float[Tensor, "*n i"], rank: int | None = None) -> Float[Tensor, "*n o"]:
        """rank: how many leading terms speak (all by default)."""
        return F.linear(F.linear(x, self.b[:rank]), self.a[:, :rank], self.bias)

    def cut(self, rank: int) -> "Factored":
        """A layer of the leading terms alone."""
        return Factored(self.a[:, :rank], self.b[:rank], self.bias)

    def merge(self) -> nn.Linear:
        """The plain layer that says the same; it is the smaller one once r (o + i) >= o i."""
        return linear(self.a @ self.b, self.bias)


def keep_largest(w: Float[Tensor, "*shape"], share: float | int) -> Bool[Tensor, "*shape"]:
    """Magnitude pruning: True for this share of the numbers, the largest in size (Han et al. 2015, arXiv 1506.02626)."""
    gone = w.abs().flatten().topk(w.numel() - round(share * w.numel()), largest=False).indices
    return torch.ones(w.numel(), dtype=torch.bool, device=w.device).index_fill(0, gone, False).view_as(w)


def keep_rows(w: Float[Tensor, "..."], share: float | int, dim: int = 0) -> Bool[Tensor, "n"]:
    """Structured pruning: True for this share of the slices along `dim`, those with the largest norms (Li et al. 2016,
    arXiv 1608.08710, with the Euclidean norm). Cutting them out (`w[mask]`) makes a smaller layer; so must its neighbours be."""
    return keep_largest(w.movedim(dim, 0).flatten(1).norm(dim=1), share)


def keep_n_of_m(w: Float[Tensor, "o i"], n: int = 2, m: int = 4) -> Bool[Tensor, "o i"]:
    """True for the n largest in size of every m neighbours in a row: the 2:4 pattern that GPUs skip zeros of (Mishra et al.
    2021, arXiv 2104.08378). Stored, it costs n / m of the numbers and, at 2:4, two bits of place for each."""
    if w.shape[1] % m or not 0 <= n <= m:
        raise ValueError(f"rows of {w.shape[1]} must divide into groups of {m}, of which 0 to {m} stay; got n = {n}")
    best = w.abs().unflatten(1, (-1, m)).topk(n, -1).indices
    return torch.zeros_like(w, dtype=torch.bool).unflatten(1, (-1, m)).scatter(-1, best, True).flatten(1)


class LoRA(nn.Module):
    """A frozen copy of a linear or 2-D convolutional layer with a low-rank correction: base(x) + strength up(down(x)).

    Hu et al. 2021, arXiv 2106.09685. `up` begins at 0, so at first it is the layer. There is one number, `strength`, which
    may be changed at any time (the paper's alpha / r is its value); 0 switches the correction off. generator: draws `down`.
    """

    def __init__(self, base: nn.Linear | nn.Conv2d, rank: int, generator: torch.Generator, strength: float | int = 1):
        super().__init__()
        self.base, self.strength = copy.deepcopy(base).requires_grad_(False), strength
        like = dict(bias=False, device=base.weight.device, dtype=base.weight.dtype)
        if isinstance(base, nn.Conv2d) and base.groups == 1:
            window = (base.kernel_size, base.stride, base.padding, base.dilation)
            self.down = skip_init(nn.Conv2d, base.in_channels, rank, *window, padding_mode=base.padding_mode, **like)
            self.up = skip_init(nn.Conv2d, rank, base.out_channels, 1, **like)
        elif isinstance(base, nn.Linear):
            self.down, self.up = (skip_init(nn.Linear, *ends, **like) for ends in
                                  ((base.in_features, rank), (rank, base.out_features)))
        else:
            raise TypeError(f"LoRA goes beside nn.Linear, or nn.Conv2d without groups, got {base}")
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5), generator=generator)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        return self.base(x) + self.strength * self.up(self.down(x))

    @torch.no_grad()
    def merge(self) -> nn.Linear | nn.Conv2d:
        """A plain layer with the correction in its weight. The base stays as it was, so merging twice adds it once."""
        layer = copy.deepcopy(self.base).requires_grad_(True)
        more = self.up.weight.flatten(1) @ self.down.weight.flatten(1)
        layer.weight += self.strength * more.view_as(layer.weight)
        return layer
