"""FQGAN: give every place several codes from small codebooks of their own, and see to it that they say different things.

Paper:   Factorized Visual Tokenization and Generation (2024), arXiv 2411.16681
Kind:    part (a bottleneck), and a model that writes its codes
Equal:   one codebook behind an adapter without blocks is the plain unit-norm VQ; the writer's logits step by step are those of
         one pass; codes with lambda = 0 and no teacher are several codebooks and nothing else
Claim:   with 12 bits a place two books of 64 are 0.3 dB ahead of one of 4,096 with restarts; at 8 and 10 bits level. L_dis
         halves the squared cosine and lowers mutual information; a head that follows captions tells 10 points more of them
Differs: frames of 32 x 32, an 8 x 8 grid, adapters of one block of width 64; no GAN, no LPIPS (L1 and differences of gradients);
         the teacher is the caption's bag of words instead of CLIP, and three books have none (the paper's middle one follows
         DINO). RoPE for the slots begins at angle 0, where the authors' code zeroes the first slot. The layer after the codes
         begins so that its channels have variance 1. Sizes, steps and rates are inferred

    head a:  z_a = adapter_a(h) / |.|,  q_a = nearest of K unit codes,  decoder sees [q_1 .. q_k]          K^k, for k K distances
    L_vq  = |sg z - e|^2 + 0.25 |z - sg e|^2 + 0.03 (E_i H(p_i) - H(E_i p_i)),     p_i = softmax(-|z_i - e|^2 / 0.01)
    L_dis = lambda mean_i <q_a,i , q_b,i>^2               L_sem = -mean_i log softmax_j <s_i, v_j>, unit vectors, no temperature

What is unusual here: L_dis sees straight-through values, so it moves the heads and never the codes.
"""

import math
from collections.abc import Sequence
from itertools import combinations

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..core.attention import Attention
from ..core.baselines.critics import info_nce
from ..core.baselines.vq import VQ, Codes
from ..core.codes import TokenModel, check_codes
from ..core.model import Cond
from ..core.where import Where, grid

# --- the bottleneck -----------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    """A pre-norm block with full (or, by `where`, causal) attention and a GELU feed-forward."""

    def __init__(self, d: int, heads: int = 2):
        super().__init__()
        self.norm1, self.attention, self.norm2 = nn.LayerNorm(d), Attention(d, heads), nn.LayerNorm(d)
        self.feed = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))

    def forward(self, x: Float[Tensor, "b n d"], where: Where) -> Float[Tensor, "b n d"]:
        x = x + self.attention(self.norm1(x), where)
        return x + self.feed(self.norm2(x))


class Adapter(nn.Module):
    """Features -> one head's d numbers: positions, blocks within a frame, a 3 x 3 convolution. depth 0: the convolution alone."""

    def __init__(self, c: int, d: int, depth: int = 1, width: int = 64, side: tuple[int, int] = (8, 8)):
        super().__init__()
        self.side = tuple(side)
        if depth:
            self.place, self.enter = nn.Parameter(0.02 * torch.randn(side[0] * side[1], width)), nn.Linear(c, width)
            self.blocks, self.norm = nn.ModuleList(Layer(width) for _ in range(depth)), nn.LayerNorm(width)
        self.depth, self.out = depth, nn.Conv2d(width if depth else c, d, 3 if depth else 1, padding=1 if depth else 0)

    def forward(self, z: Float[Tensor, "b c f h w"]) -> Float[Tensor, "b d f h w"]:
        b, _, f, h, w = z.shape
        if self.depth and (h, w) != self.side:
            raise ValueError(f"positions belong to frames of {self.side} cells, got {(h, w)}")
        x = rearrange(z, "b c f h w -> (b f) (h w) c")
        if self.depth:
            x, where = self.enter(x) + self.place, grid(1, h, w, device=z.device)
            for block in self.blocks:
                x = block(x, where)
            x = self.norm(x)
        return rearrange(self.out(rearrange(x, "n (h w) c -> n c h w", h=h)), "(b f) d h w -> b d f h w", b=b)


def entropies(x: Float[Tensor, "n d"], table: Float[Tensor, "k d"], temperature: float = 0.01) -> Float[Tensor, ""]:
    """E_i H(p_i) - H(E_i p_i) in nats, p_i = softmax(-|x_i - e|^2 / T): sure of each place, even over all. At least -log k."""
    p = (-torch.cdist(x, table).square() / temperature).softmax(-1)
    entropy = lambda q: -(q * q.clamp_min(1e-12).log()).sum(-1)
    return entropy(p).mean() - entropy(p.mean(0))


def disentangled(heads: Sequence[Float[Tensor, "b d f h w"]]) -> Float[Tensor, ""]:
    """Squared cosine between the unit vectors that two heads say of a place, mean over places and pairs of heads."""
    return torch.stack([(a * b).sum(1).square().mean() for a, b in combinations(heads, 2)]).mean()


class Factorised(nn.Module):
    """Several codebooks at every place: a bottleneck for `Tokenizer`.

    c: channels of the latent.  k, d: codes of each book and numbers of each code.  heads: books.  lam, even: weights of L_dis
    and of the entropies.  adapter: settings of every `Adapter`.  more: settings of every `VQ` (such as decay and restart)
    """

    def __init__(self, c: int = 32, k: int = 64, d: int = 8, heads: int = 2, lam: float | int = 0.1,
                 even: float | int = 0.03, seed: int = 0, adapter: dict | None = None, **more):
        super().__init__()
        self.adapters = nn.ModuleList(Adapter(c, d, **(adapter or {})) for _ in range(heads))
        self.books = nn.ModuleList(VQ(k, d, unit=True, seed=seed + i, **more) for i in range(heads))
        self.up, self.lam, self.even = nn.Conv3d(heads * d, c, 1), lam, even
        nn.init.normal_(self.up.weight, std=heads**-0.5)  # from unit vectors to channels of variance 1

    @property
    def size(self) -> int:
        """Number of combinations."""
        return math.prod(book.size for book in self.books)

    def said(self, z: Float[Tensor, "b c f h w"]) -> tuple[list[Tensor], list[Codes], dict[str, Tensor]]:
        """Each head's quantised unit vectors (straight-through), the codes, and losses, weighted."""
        out, grids, losses = [], [], {}
        for adapter, book in zip(self.adapters, self.books, strict=True):
            x = adapter(z)
            value, codes, more = book(x)
            if self.even:
                more["even"] = self.even * entropies(book.cells(x), book.table)
            out, grids = [*out, value], grids + codes
            losses = {name: losses.get(name, 0) + loss for name, loss in more.items()}
        if self.lam and len(out) > 1:
            losses["dis"] = self.lam * disentangled(out)
        return out, grids, losses

    def forward(self, z: Float[Tensor, "b c f h w"]):
        out, grids, losses = self.said(z)
        return self.up(torch.cat(out, 1)), grids, losses

    def lookup(self, codes: list[Codes]) -> Float[Tensor, "b c f h w"]:
        """What the codes of all heads stand for together."""
        return self.up(torch.cat([book.lookup([one]) for book, one in zip(self.books, codes, strict=True)], 1))


class Reader(nn.Module):
    """Reads a meaning from one head's codes: a class token before the grid, blocks, a vector as long as the teacher's."""

    def __init__(self, d: int, out: int, depth: int = 1, width: int = 64):
        super().__init__()
        self.enter = nn.Sequential(nn.Linear(d, width), nn.ReLU(), nn.Linear(width, width))
        self.token, self.blocks = nn.Parameter(0.02 * torch.randn(width)), nn.ModuleList(Layer(width) for _ in range(depth))
        self.leave = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, out))

    def forward(self, q: Float[Tensor, "b d f h w"]) -> Float[Tensor, "b e"]:
        b, _, f, h, w = q.shape
        x = self.enter(rearrange(q, "b d f h w -> b (f h w) d"))
        x = torch.cat([self.token.expand(b, 1, -1), x], 1)
        where = Where(torch.cat([torch.full((1, 1, 3), -1.0, device=q.device), grid(f, h, w, device=q.device).coords], 1))
        for block in self.blocks:
            x = block(x, where)
        return self.leave(x[:, 0])

    def loss(self, q: Float[Tensor, "b d f h w"], teacher: Float[Tensor, "b e"]) -> Float[Tensor, ""]:
        """InfoNCE over the batch without a temperature: at least log(1 + (B-1) exp(-1 - 1/(B-1)))."""
        return info_nce(self(q), teacher)


# --- the writer ---------------------------------------------------------------------------------------------------------


class Tables(nn.Module):
    """Numbers of combinations -> vectors: a table for each head's code, joined by a linear layer."""

    def __init__(self, k: int, heads: int, d: int):
        super().__init__()
        self.k, self.tables, self.join = k, nn.ModuleList(nn.Embedding(k, d) for _ in range(heads)), nn.Linear(heads * d, d)

    def forward(self, ids: Int[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        digits = split(ids, self.k, len(self.tables))
        return self.join(torch.cat([table(digit) for table, digit in zip(self.tables, digits, strict=True)], -1))


def split(ids: Int[Tensor, "*b"], k: int, heads: int) -> list[Int[Tensor, "*b"]]:
    """The codes of a combination's number: the first head's is the highest digit."""
    return [ids // k ** (heads - 1 - i) % k for i in range(heads)]


def joined(codes: Sequence[Int[Tensor, "*b"]], k: int) -> Int[Tensor, "*b"]:
    """The number of a combination."""
    whole = torch.zeros_like(codes[0])
    for one in codes:
        whole = whole * k + one
    return whole


class Writer(TokenModel):
    """FAR: a causal transformer over places, and at each place a small one over its k codes (slot 0 sees the context alone).

    alone: every code from the context by itself, with as many parameters; the twin that the small transformer is compared with
    """

    def __init__(self, k: int = 64, heads: int = 2, d: int = 64, depth: int = 3, side: tuple[int, int] = (8, 8),
                 alone: bool = False):
        super().__init__(2, d, depth, 2, 2, side, 1)
        self.codes, self.k, self.heads, self.alone = k**heads, k, heads, alone
        self.inlet.codes, self.inlet.code, self.head = self.codes, Tables(k, heads, d), nn.Identity()
        self.slots, self.norms = nn.ModuleList([Layer(d)]), nn.LayerNorm(d)
        self.told = nn.ModuleList(nn.Embedding(k, d) for _ in range(heads - 1))
        self.says = nn.ModuleList(nn.Linear(d, k) for _ in range(heads))
        for layer in self.says:
            nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)

    def context(self, ids: Int[Tensor, "b f h w"], cond: Cond, cache=None) -> Float[Tensor, "b n d"]:
        """What is known of each place from those before it; `ids` are inputs, moved by one place (see `codes.shift`)."""
        return rearrange(self(ids, None, cond, cache), "b d f h w -> b (f h w) d")

    def slot(self, context: Float[Tensor, "b n d"], codes: Sequence[Int[Tensor, "b n"]]) -> list[Float[Tensor, "b n K"]]:
        """Logits of the first len(codes) + 1 heads at every place, each given the codes before it."""
        b, n, d = context.shape
        told = [table(code) for table, code in zip(self.told, codes, strict=False)]
        if self.alone:
            told = [torch.zeros_like(x) for x in told]
        x = rearrange(torch.stack([context, *told], 2), "b n s d -> (b n) s d")
        s = torch.arange(x.shape[1], device=x.device)
        where = Where(torch.stack([s.float(), 0 * s.float(), 0 * s.float()], -1)[None], s[None])
        for block in self.slots:
            x = block(x, where)
        x = rearrange(self.norms(x), "(b n) s d -> s b n d", b=b)
        return [say(y) for say, y in zip(self.says, x, strict=False)]

    def nll(self, codes: Sequence[Int[Tensor, "b f h w"]], cond: Cond) -> Float[Tensor, "b n s"]:
        """Negative log-likelihood in nats of each code at each place; their mean trains, their sum over s is a place's."""
        for one in codes:
            check_codes(one, self.k)
        ids = joined(list(codes), self.k)
        start = torch.full_like(ids.flatten(1)[:, :1], self.codes)
        fed = torch.cat([start, ids.flatten(1)[:, :-1]], 1).view_as(ids)
        flat = [one.flatten(1) for one in codes]
        logits = self.slot(self.context(fed, cond), flat[:-1])
        return torch.stack([F.cross_entropy(y.mT, one, reduction="none") for y, one in zip(logits, flat, strict=True)], -1)

    @torch.no_grad()
    def generate(self, frames: int, cond: Cond, u: Float[Tensor, "b n s"], cache=None,
                 temperature: float | int = 1.0) -> list[Tensor]:
        """Codes of all heads, `b f h w` each. u: a number in [0, 1) for each code, which decides what is drawn."""
        h, w = self.inlet.side
        b, n = len(u), frames * h * w
        fed, found = torch.full((b, n + 1), self.codes, device=u.device), []
        for i in range(n):
            first = i if cache is not None else 0
            told = cond.at(i, first / (h * w))
            if cache is not None:
                cache.open(i, told)
                cache.writing = True
            context = self.context(fed[:, first : i + 1][:, None, None], told, cache)[:, -1:]
            if cache is not None:
                cache.close(i)
            codes: list[Tensor] = []
            for s in range(self.heads):
                p = (self.slot(context, codes)[s] / temperature).double().softmax(-1).cumsum(-1)
                codes.append((p <= u[:, i : i + 1, s : s + 1] * p[..., -1:]).sum(-1))
            fed[:, i + 1 : i + 2] = joined(codes, self.k)
            found.append(torch.stack(codes, -1))
        return [x.view(b, frames, h, w) for x in torch.cat(found, 1).unbind(-1)]
