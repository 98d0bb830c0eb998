"""DSFormer: a small dense matrix times a wide sparse one, whose places are learnt together with its numbers.

Paper:   DSFormer: Effective Compression of Text-Transformers by Dense-Sparse Weight Factorization (2023), arXiv 2312.13211
Kind:    surgery (a trained model in, a smaller one out, tuned for some hundred steps)
Equal:   with groups of one it is the low-rank layer, with D = 1 and a full S the layer itself
Claim:   of a feed-forward's matrices at half the storage, places counted, D S errs less than the SVD (by 15 % where places are
         free); places learnt straight through leave 20 % less of the loss than fixed ones; no more loss than low rank, nor than
         two of every four numbers kept
Differs: a video generator of 1.9 M parameters and its loss, not language models and their tasks. Only the abstract is at hand,
         so all of this is inferred: one number in each group of each column, the start by matching pursuit, what resting
         numbers begin as, the straight-through estimator with Adam at one rate, unit columns of D after every step, places
         frozen for the last fifth, the pattern of each matrix chosen by its error (so square ones are often low rank), the
         teacher's output as the only target, biases tuned along, no decay. The start minds the inputs, as good low rank does

Low rank forces all columns of a matrix into one small subspace. Here every column takes a few columns of D, each column others:

    W ~ D S      W: `m n`, n >= m,  D: `m r`,  S: `r n`, sparse;      y = (x D) S      (5)

The r rows of S are split into groups, and in each column each group holds one number (or `keep`): a place costs log2(group) bits
and no column waits for another. Matrices stand as in the paper, y = x W; where `nn.Linear` is narrower than its input, its
transpose is factored, so that the sparse factor lies along the longer side.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ..core import fit
from ..core.baselines.lowrank import linear, svd
from ..core.surgery import Gram, parts, record, swap

ROLES = (*"qkvo", *("cross-" + role for role in "qkvo"), "fc1", "fc2")

# --- what is stored -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pattern:
    """r rows of S in groups of `group`; in every column `keep` numbers a group.

    group 1: low rank. group = r: k = keep numbers anywhere, the pattern without structure
    """

    r: int
    group: int = 1
    keep: int = 1

    def __post_init__(self):
        if self.r < 1 or self.r % self.group or not 1 <= self.keep <= self.group:
            raise ValueError(f"groups of {self.group} must divide r = {self.r} and hold 1 to all of theirs, not {self.keep}")

    @property
    def k(self) -> int:
        """Numbers in a column of S."""
        return self.r // self.group * self.keep

    @property
    def place(self) -> int:
        """Bits of one place within its group."""
        return (self.group - 1).bit_length() if self.keep < self.group else 0

    def bits(self, m: int, n: int, width: int = 16) -> int:
        """Of storage, at `width` bits a number: m r numbers of D, n k of S, n k places."""
        return width * m * self.r + n * self.k * (width + self.place)


def fitting(m: int, n: int, share: float, group: int, width: int = 16) -> Pattern | None:
    """The largest one-of-`group` pattern that is stored in this share of m n numbers; None where not one group is."""
    most, one = share * width * m * n, Pattern(group, group).bits(m, n, width)
    r = group * min(int(most / one + 1e-9), n // group)
    return Pattern(r, group) if r else None


def support(s: Float[Tensor, "r n"], p: Pattern) -> Bool[Tensor, "r n"]:
    """The largest `keep` in size of each group of each column; of equals the upper. `s * support(s, p)` is the projection."""
    size = s.abs().unflatten(0, (-1, p.group))
    best = size.argmax(1, True) if p.keep == 1 else size.argsort(dim=1, descending=True, stable=True)[:, : p.keep]
    return torch.zeros_like(size, dtype=torch.bool).scatter_(1, best, True).flatten(0, 1)


# --- the start: matching pursuit ----------------------------------------------------------------------------------------


def pursue(w: Float[Tensor, "m n"], d: Float[Tensor, "m r"], p: Pattern) -> Int[Tensor, "n k"]:
    """Rows of S that every column of w shall use, in order: orthogonal matching pursuit, all columns at once.

    d: columns of length 1
    Each step takes the column of d that is nearest to what is left of w, from a group that isn't full, and makes what is left
    orthogonal to all that were taken. In float32: places need no more.
    """
    rest, d, n, each = w.T.float(), d.float(), w.shape[1], torch.arange(w.shape[1])
    basis, used = torch.zeros(n, p.k, len(w)), torch.zeros(n, p.r // p.group, p.group, dtype=torch.bool)
    for i in range(p.k):
        closed = used | (used.sum(2, keepdim=True) == p.keep)
        best = (rest @ d).abs().masked_fill(closed.flatten(1), -1).argmax(1)
        used[each, best // p.group, best % p.group] = True
        new, before = d.T[best][..., None], basis[:, :i]
        for _ in range(2):  # once isn't orthogonal enough where columns of d are alike
            new = new - before.mT @ (before @ new)
        new = F.normalize(new[..., 0], dim=1, eps=1e-6)
        basis[:, i], rest = new, rest - (rest * new).sum(1, keepdim=True) * new
    return used.flatten(1).nonzero()[:, 1].view(n, p.k)


def refit(w: Float[Tensor, "m n"], d: Float[Tensor, "m r"], index: Int[Tensor, "n k"], c=None, start=None):
    """S `r n` whose rows are known: least squares, column by column, or in the norm tr(E C E') of E = w - d S, with C `n n`.

    There columns hang together, and 30 steps of conjugate gradients go on from `start`, or from the answer without C.
    """
    gram, right = d.T @ d, d.T @ w
    own = gram[index[:, :, None], index[:, None]] + 1e-9 * torch.eye(index.shape[1]).to(w)  # columns of d have length 1
    values = torch.linalg.solve(own, right.T.gather(1, index))
    s = torch.zeros_like(right).scatter_(0, index.T, values.T)
    if c is None:
        return s
    s = s if start is None else start
    mask, size = torch.zeros_like(s).scatter_(0, index.T, 1.0), c.diagonal().clamp_min(1e-12 * c.diagonal().mean())
    rest = mask * (d.T @ ((w - d @ s) @ c))
    way, before = torch.zeros_like(s), 1.0
    for _ in range(30):
        now = (rest.square() / size).sum()
        way = rest / size + now / before * way
        bent = mask * (gram @ way @ c)
        step = now / (way * bent).sum().clamp_min(1e-30)
        s, rest, before = s + step * way, rest - step * bent, now.clamp_min(1e-30)
    return s


def unit(d: Float[Tensor, "m r"], s: Float[Tensor, "r n"]) -> tuple[Float[Tensor, "m r"], Float[Tensor, "r n"]]:
    """The same product with columns of d of length 1: only then do sizes in S say what a place is worth."""
    size = d.norm(dim=0).clamp_min(1e-12)
    return d / size, s * size[:, None]


@torch.no_grad()
def factor(w: Float[Tensor, "m n"], p: Pattern, seed: int = 0, c=None, rounds: int = 5) -> tuple:
    """D `m r`, S `r n` that make |w - D S|, or tr(E C E'), small; and that error, squared, after each round.

    D begins as columns of w, drawn by `seed`. A round finds places by pursuit and numbers by least squares, keeps what was there
    (of each column, or with C of all) where that is no better, and then fits D to S. So the error never rises.
    """
    if p.r > w.shape[1]:
        raise ValueError(f"D begins as {p.r} columns of a matrix that has {w.shape[1]}; factor the transpose or ask for fewer")
    dice = torch.Generator().manual_seed(seed)
    d = F.normalize(w[:, torch.randperm(w.shape[1], generator=dice)[: p.r]], dim=0)
    weigh = (lambda e: e) if c is None else (lambda e: e @ c)
    gaps = lambda s: ((e := w - d @ s) * weigh(e)).sum(0)
    index, s, errors = None, None, []
    for _ in range(rounds):
        new = pursue(w, d, p)
        index = new if index is None else index
        s, other = refit(w, d, index, c, s), refit(w, d, new, c)
        better = gaps(other) < gaps(s) if c is None else (gaps(other).sum() < gaps(s).sum()).expand(w.shape[1])
        index, s = torch.where(better[:, None], new, index), torch.where(better, other, s)
        d, s = unit((torch.linalg.pinv(weigh(s) @ s.T, hermitian=True) @ weigh(s) @ w.T).T, s)
        errors.append(gaps(s).sum().item())
    return d, s, errors


def wake(w: Float[Tensor, "m n"], d: Float[Tensor, "m r"], s: Float[Tensor, "r n"], p: Pattern) -> Float[Tensor, "r n"]:
    """The dense shadow that S begins with: a number that rests is what it would be if it spoke alone in its group, but at most
    nine tenths of the least that speaks there. d: columns of length 1."""
    numbers, groups = s.unflatten(0, (-1, p.group)), d.unflatten(1, (-1, p.group))
    alone = (d.T @ (w - d @ s)).view_as(numbers) + torch.einsum("mgi,mgj,gjn->gin", groups, groups, numbers)
    least = 0.9 * numbers.abs().masked_fill(numbers == 0, torch.inf).amin(1, keepdim=True)
    return torch.where(numbers == 0, alone.clamp(-least, least), numbers).flatten(0, 1)


# --- the layer ----------------------------------------------------------------------------------------------------------


class DenseSparse(nn.Module):
    """A linear layer as y = (x D) S + bias, or, `turned`, y = (x S') D' + bias.

    d: `m r`; shadow: `r n`, dense; what speaks is S, the shadow where `mask` is True
    free: whether the places are being learnt. Then the mask follows the largest numbers of the shadow at every call, and the
    gradient of S goes straight through to all of the shadow, so a number that rests can grow and swap in
    """

    def __init__(self, d: Float[Tensor, "m r"], s: Float[Tensor, "r n"], pattern: Pattern, bias=None, turned: bool = False):
        super().__init__()
        d, s = unit(d.detach(), s.detach())
        self.pattern, self.turned, self.free = pattern, turned, False
        self.d, self.shadow = nn.Parameter(d.clone()), nn.Parameter(s.clone())
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        self.mask = nn.Buffer(support(s, pattern))

    @classmethod
    @torch.no_grad()
    def of(cls, layer: nn.Linear, p: Pattern, gram: Float[Tensor, "i i"] | None = None, seed: int = 0) -> "DenseSparse":
        """Begun for a trained layer, in the norm of its outputs where X'X of its inputs is given."""
        w, turned = layer.weight.double().T, layer.in_features > layer.out_features
        if p.group == 1:
            a, b = (x.double() for x in svd(layer.weight.double(), p.r, gram))
            d, s = (a, b) if turned else (b.T, a.T)
        elif turned or gram is None:
            d, s, _ = factor(w.T if turned else w, p, seed, gram)
        else:
            value, vector = torch.linalg.eigh(gram)
            root = value.clamp_min(1e-8 * value.mean()).sqrt()
            d, s, _ = factor((vector * root) @ vector.T @ w, p, seed)
            d = (vector / root) @ vector.T @ d
        shadow = wake(w.T if turned else w, *unit(d, s), p)
        return cls(unit(d, s)[0].to(layer.weight), shadow.to(layer.weight), p, layer.bias, turned)

    def sparse(self) -> Float[Tensor, "r n"]:
        """S."""
        if not self.free:
            return self.shadow * self.mask
        self.mask = support(self.shadow, self.pattern)
        return self.shadow - (self.shadow * ~self.mask).detach()

    def forward(self, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
        s = self.sparse()
        y = (x @ s.T) @ self.d.T if self.turned else (x @ self.d) @ s
        return y if self.bias is None else y + self.bias

    @torch.no_grad()
    def settle(self, shadow: bool = True) -> None:
        """After a step: columns of D get length 1 again, what they lose goes into the shadow. shadow False forgets what rests."""
        d, s = unit(self.d, self.shadow)
        self.d.copy_(d), self.shadow.copy_(s if shadow else s * support(s, self.pattern))

    def index(self) -> Int[Tensor, "k n"]:
        """Rows of the numbers of each column, in order."""
        return self.mask.T.nonzero()[:, 1].view(-1, self.pattern.k).T

    def gathered(self, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
        """The same without a product with a zero: m r + n k multiplies. Slower than a dense product on most processors."""
        index = self.index()
        values, bias = self.shadow.gather(0, index), 0 if self.bias is None else self.bias
        if not self.turned:
            return ((x @ self.d)[..., index] * values).sum(-2) + bias
        z = x.new_zeros(*x.shape[:-1], self.pattern.r)
        return z.index_add_(-1, index.flatten(), (x[..., None, :] * values).flatten(-2)) @ self.d.T + bias

    def merge(self) -> nn.Linear:
        """The plain layer that says the same."""
        w = self.d @ self.sparse()
        return linear(w if self.turned else w.T, self.bias)

    @torch.no_grad()
    def pack(self) -> dict[str, Tensor]:
        """What has to be stored beside the bias: d and values in fp16, places within their groups bit by bit."""
        index, p = self.index(), self.pattern
        bits = (index.cpu().numpy()[..., None] % p.group >> np.arange(p.place)) & 1
        places, values = torch.from_numpy(np.packbits(bits)), self.shadow.gather(0, index)
        return {"d": self.d.half(), "values": values.half(), "places": places}

    @classmethod
    def unpack(cls, packed: dict[str, Tensor], p: Pattern, bias: Tensor | None = None, turned: bool = False) -> "DenseSparse":
        """The layer that was packed, with numbers rounded to fp16."""
        values = packed["values"].float()
        bits = np.unpackbits(packed["places"].numpy())[: values.numel() * p.place].reshape(*values.shape, p.place)
        place = torch.from_numpy((bits.astype(int) << np.arange(p.place)).sum(-1))
        index = place + p.group * (torch.arange(p.k) // p.keep)[:, None]
        return cls(packed["d"].float(), torch.zeros(p.r, values.shape[1]).scatter_(0, index, values), p, bias, turned)


# --- whole models -------------------------------------------------------------------------------------------------------


def find(model: nn.Module, within: str = "") -> dict:
    """The linear layers of attention and feed-forward, by name. Raises ValueError where there are none."""
    found = {name: part for name, part, role in parts(model) if role in ROLES and name.startswith(within)}
    if not found:
        raise ValueError(f"no part within {within!r} is a linear layer of an attention or a feed-forward")
    return found


def inputs(model: nn.Module, names: Iterable[str], batches: Iterable) -> dict[str, Tensor]:
    """X'X `i i` of what enters the layers. batches: calls, as `record` takes them."""
    grams = {name: Gram() for name in names}
    record(model, batches, grams)
    return {name: gram.xx for name, gram in grams.items()}


def error(layer: nn.Linear, w: Float[Tensor, "o i"], gram: Float[Tensor, "i i"] | None = None) -> float:
    """|X (W - w)'|^2 / |X W'|^2 of a layer's weight W, without X'X that of the weights."""
    full = layer.weight.double()
    size = lambda e: (e * (e if gram is None else e @ gram)).sum().item()
    return size(full - w) / size(full)


def choose(layer: nn.Linear, share: float, gram: Tensor | None = None, groups=(1, 2, 4, 8), width: int = 16, seed: int = 0):
    """The layer of the least error among one-of-`group` patterns that are stored in this share. Low rank is group 1."""
    m, n = sorted(layer.weight.shape)
    made = [DenseSparse.of(layer, p, gram, seed) for group in groups if (p := fitting(m, n, share, group, width))]
    if not made:
        raise ValueError(f"a matrix of {m} x {n} can't be stored in {share} of its numbers as D S; ask for more")
    return min(made, key=lambda new: error(layer, new.merge().weight, gram))


def compress(model: nn.Module, batches: Iterable, share: float, within: str = "", groups=(1, 2, 4, 8), seed: int = 0):
    """The model with every matrix of `find` stored in this share of its bits. batches: calls, thousands of tokens."""
    grams = inputs(model, layers := find(model, within), batches)
    return swap(model, {name: choose(layer, share, grams[name], groups, seed=seed) for name, layer in layers.items()})


# --- the straight-through factorizer ------------------------------------------------------------------------------------


def tune(model: nn.Module, layers: Sequence, loss: Callable, batches: Callable, steps: int, rate: float, how="shadow", path=None):
    """Train the layers of the model, jointly, in place; nothing else learns. Returns the churn of every step.

    loss, batches: `loss(model, batches(i))` of step i
    rate: of Adam, without decay; ten steps of warm-up, then a cosine to 0
    how: "shadow": places are learnt straight through, until four fifths of the steps are done; "projected": the same with what
         rests set to 0 after each step; "fixed": places stay. Layers of another kind just learn
    churn: share of the numbers of S whose place is new since the step before
    """
    if how not in ("shadow", "projected", "fixed"):
        raise ValueError(f"places are learnt by 'shadow' or 'projected', or 'fixed', not {how!r}")
    learners, churn = nn.ModuleList(layers).requires_grad_(True), []
    moving = [layer for layer in learners if isinstance(layer, DenseSparse) and layer.pattern.place]

    def step(state, batch, generator):
        for group in state.opt.param_groups:
            group["lr"] = rate * fit.cosine(state.i, steps, 10)
        before, learning = [layer.mask for layer in moving], how != "fixed" and state.i < 0.8 * (steps - 1)
        for layer in moving:
            layer.free = learning
        value, learnt = loss(model, batch), list(learners.parameters())
        for parameter, grad in zip(learnt, torch.autograd.grad(value, learnt), strict=True):
            parameter.grad = grad
        state.opt.step()
        for layer in moving:
            layer.settle(how != "projected")
        new = sum((layer.mask & ~old).sum().item() for layer, old in zip(moving, before, strict=True))
        churn.append(new / max(1, sum(old.sum().item() for old in before)))
        return {"loss": value.detach()}

    state = fit.State({"layers": learners, "opt": torch.optim.Adam(learners.parameters(), rate, (0.9, 0.99))})
    fit.fit(step, state, batches, steps, 0, path, note={"rate": rate, "how": how})
    learners.requires_grad_(False)
    return churn
