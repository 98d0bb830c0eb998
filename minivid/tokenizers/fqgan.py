"""FQGAN: instead of one number from a large codebook every cell gets several, each from a small book with a head of its own.

Paper:   Factorized Visual Tokenization and Generation (2024), arXiv 2411.16681
Kind:    part (a bottleneck of the tokenizer, and a head for the generator of its codes)
Equal:   one book is plain VQ of unit vectors, in the forward pass and in every gradient, where its head is the identity
Claim:   two books of 2^(b/2) codes against one of 2^b: level within 0.3 dB at 8 and 10 bits, ahead by 0.3 dB at 12; the penalty
         on cosines makes the books say different things; a teacher of one head puts meaning into that head's codes
Differs: one block of width 64 in each head, not six of 512; frames of 32 x 32, 8 x 8 cells; at most 4,096 codes. Teacher: an
         embedding of the caption (CLIP's place). Codes begin as random directions of a sphere, not of a cube. L1 with a
         difference of gradients instead of L2, LPIPS and the adversary. FAR's transformers are this package's (LayerNorm,
         GELU, no class token, a learnt vector for what stands first).

A cell's features h go through k heads. Head j gives a direction z_j of d numbers, its book the nearest direction q_j, and the
decoder reads q_1 ... q_k side by side. K codes in each make K^k words out of k K comparisons: 2 x 16,384 comparisons instead of
268 million. That is no free lunch: at equal bits the best joint book is never worse than the best product of books. What
can be gained is that small books are easier to learn. Heads that say the same waste the bits of one, so for each pair

    apart = lambda mean <q_a, q_b>^2          in [0, lambda]; random directions give lambda / d

and some heads are pulled towards a frozen teacher v of the whole picture, s being a small transformer's summary of their codes:

    InfoNCE = -mean_i log( exp <s_i, v_i> / sum_j exp <s_i, v_j> )          unit vectors, no temperature: never near 0
"""

import itertools
import math

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..core.baselines.vq import VQ, Codes, ResidualVQ
from ..core.codes import choose
from ..core.model import Context, Trunk
from ..core.where import Where, grid

SHARP = 0.01  # the temperature of p


def comparisons(k: int, size: int) -> tuple[int, int]:
    """Distances a cell: of k books of `size` codes, and of one book with as many words."""
    return k * size, size**k


def apart(a: Float[Tensor, "b d f h w"], b: Float[Tensor, "b d f h w"]) -> Float[Tensor, ""]:
    """Mean squared cosine of two maps of unit vectors: 0 for right angles, 1 for parallel or opposite ones."""
    return (a * b).sum(1).square().mean()


def sure(x: Float[Tensor, "n d"], table: Float[Tensor, "k d"]) -> Float[Tensor, ""]:
    """mean_i H(p_i) - H(mean_i p_i), p_i = softmax(-|x_i - e|^2 / 0.01): each cell decided, all codes in use. At least -log k."""
    p = (-torch.cdist(x, table, compute_mode="use_mm_for_euclid_dist").square() / SHARP).softmax(-1)
    entropy = lambda p: -torch.xlogy(p, p.clamp(min=1e-12)).sum(-1)
    return entropy(p).mean() - entropy(p.mean(0))


def infonce(s: Float[Tensor, "b d"], v: Float[Tensor, "b d"]) -> Float[Tensor, ""]:
    """Each s should be nearer to its own v than to the others' (cosines as logits, no temperature)."""
    return F.cross_entropy(F.normalize(s, dim=-1) @ F.normalize(v, dim=-1).T, torch.arange(len(s), device=s.device))


def least(b: int) -> float:
    """The least value that `infonce` can have for b samples: all vectors in the corners of a simplex."""
    return math.log(1 + (b - 1) * math.exp(-1 - 1 / (b - 1)))


def layers(d: int, depth: int, heads: int = 4) -> nn.Module:
    """Transformer blocks in which every token sees every other, and a norm."""
    one = nn.TransformerEncoderLayer(d, heads, 4 * d, 0.0, "gelu", batch_first=True, norm_first=True)
    return nn.TransformerEncoder(one, depth, nn.LayerNorm(d), enable_nested_tensor=False)


class Head(nn.Module):
    """What one book is told: features `b c f h w` -> `b d f h w`, through attention within each frame.

    c, d:  channels in and out; width and depth of the blocks; side: rows and columns of the grid, to which places are tied
    """

    def __init__(self, c: int, d: int, width: int = 64, depth: int = 1, side: tuple[int, int] = (8, 8)):
        super().__init__()
        self.start, self.side = nn.Linear(c, width), tuple(side)
        self.place = nn.Parameter(0.02 * torch.randn(side[0] * side[1], width))
        self.norm, self.layers = nn.LayerNorm(width), layers(width, depth)
        self.end = nn.Sequential(nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, d, 1))

    def forward(self, z: Float[Tensor, "b c f h w"]) -> Float[Tensor, "b d f h w"]:
        b, _, _, h, w = z.shape
        if (h, w) != self.side:
            raise ValueError(f"the places of this head are those of {self.side} cells, got {(h, w)}")
        x = self.layers(self.norm(self.start(rearrange(z, "b c f h w -> (b f) (h w) c")) + self.place))
        return rearrange(self.end(rearrange(x, "n (h w) c -> n c h w", h=h)), "(b f) d h w -> b d f h w", b=b)


class Factorized(nn.Module):
    """The bottleneck `(z) -> z_q, codes, losses`: head j, book j, and one linear map from all of them back to the channels of z.

    heads, books: as many modules as books; a book is anything that quantises, `VQ(k, d, unit=True)` is the paper's
    join:  the map from the concatenated codes to the channels of z (`nn.Conv3d(k d, c, 1)`)
    apart: lambda, weight of the mean `apart` of all pairs of books of equal width
    sure:  weight of the entropy term of every single book
    """

    def __init__(self, heads: list[nn.Module], books: list[nn.Module], join: nn.Module, apart: float | int = 0.1,
                 sure: float | int = 0.03):
        super().__init__()
        if len(heads) != len(books) or not books:
            raise ValueError(f"every book has a head: got {len(heads)} heads and {len(books)} books")
        self.heads, self.books, self.join = nn.ModuleList(heads), nn.ModuleList(books), join
        self.apart, self.sure = apart, sure

    @property
    def size(self) -> int:
        """Number of words: combinations of codes."""
        return math.prod(book.size for book in self.books)

    def split(self, z: Float[Tensor, "b c f h w"]) -> tuple[list[Tensor], list[Codes], dict[str, Tensor]]:
        """The sub-vectors of each book (straight-through), their codes, the losses."""
        parts, grids, losses = [], [], {}
        for head, book in zip(self.heads, self.books, strict=True):
            x = head(z)
            part, codes, more = book(x)
            if self.sure and isinstance(book, VQ):
                more["sure"] = self.sure * (sure(book.cells(x), book.table) + math.log(book.size))  # a constant: none is negative
            parts, grids = [*parts, part], grids + codes
            losses |= {name: losses.get(name, 0) + value for name, value in more.items()}
        if self.apart and len(parts) > 1:
            losses["apart"] = self.apart * torch.stack([apart(a, b) for a, b in itertools.combinations(parts, 2)]).mean()
        return parts, grids, losses

    def forward(self, z: Float[Tensor, "b c f h w"]):
        parts, grids, losses = self.split(z)
        return self.join(torch.cat(parts, 1)), grids, losses

    def parts(self, codes: list[Codes]) -> list[Tensor]:
        """What each book's grids stand for, in the order of the books."""
        out, at = [], 0
        for book in self.books:
            n = len(book.stages) if isinstance(book, ResidualVQ) else 1
            out.append(book.lookup(codes[at : at + n]))
            at += n
        return out

    def lookup(self, codes: list[Codes]) -> Float[Tensor, "b c f h w"]:
        """The latent that the codes stand for."""
        return self.join(torch.cat(self.parts(codes), 1))


class Meaning(nn.Module):
    """A summary of one book's map, as wide as its teacher: learnt class token, blocks, norm."""

    def __init__(self, d: int, width: int, depth: int = 1, side: tuple[int, int] = (8, 8)):
        super().__init__()
        self.start = nn.Sequential(nn.Linear(d, width), nn.ReLU(), nn.Linear(width, width))
        self.token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.place = nn.Parameter(0.02 * torch.randn(1 + side[0] * side[1], width))
        self.norm, self.layers = nn.LayerNorm(width), layers(width, depth)

    def forward(self, part: Float[Tensor, "b d f h w"]) -> Float[Tensor, "b width"]:
        x = self.start(rearrange(part, "b d f h w -> (b f) (h w) d"))
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.place
        return self.layers(self.norm(x))[:, 0].unflatten(0, (len(part), -1)).mean(1)


# --- looking at it ----------------------------------------------------------------------------------------------------------


def mutual(a: Int[Tensor, "*n"], b: Int[Tensor, "*n"], shuffles: int = 8, seed: int = 0) -> float:
    """Nats that two streams of codes say of each other: counted, less what shuffled ones seem to say (the bias of counting)."""
    dice, a, b = torch.Generator().manual_seed(seed), a.flatten(), b.flatten()

    def joint(b):
        p = (a * (int(b.max()) + 1) + b).unique(return_counts=True)[1].double() / len(a)
        return -(p * p.log()).sum()

    shuffled = [joint(b[torch.randperm(len(b), generator=dice)]) for _ in range(shuffles)]
    return (torch.stack(shuffled).mean() - joint(b)).item()  # entropies of a and b alone cancel


# --- the generator of such codes ------------------------------------------------------------------------------------------


def open_trunk(d: int, depth: int, heads: int) -> Trunk:
    """A plain pre-norm transformer: no time to modulate by, gates start open."""
    trunk = Trunk(d, depth, heads, ratio=4, text=False)
    for layer in trunk.blocks:
        nn.init.ones_(layer.table[2]), nn.init.ones_(layer.table[5])
    return trunk


class FAR(nn.Module):
    """How likely is each code, given all cells before (raster order) and, in the same cell, the books before?

    sizes:    codes of each book, in the order of generation
    parallel: the twin, with as many parameters: books of one cell are told nothing of each other
    """

    def __init__(self, sizes: tuple[int, ...], d: int = 64, depth: int = 2, head_depth: int = 1, heads: int = 4,
                 side: tuple[int, int] = (8, 8), parallel: bool = False):
        super().__init__()
        self.sizes, self.side, self.parallel = tuple(sizes), tuple(side), parallel
        self.code = nn.ModuleList(nn.Embedding(size, d) for size in sizes)
        self.slot = nn.ModuleList(nn.Embedding(size, d) for size in sizes[:-1])
        self.inlet, self.start = nn.Linear(len(sizes) * d, d), nn.Parameter(0.5 * torch.randn(side[0] * side[1], d))
        self.trunk, self.small = open_trunk(d, depth, heads), open_trunk(d, head_depth, heads)
        self.norm, self.ends = nn.LayerNorm(d), nn.ModuleList(nn.Linear(d, size) for size in sizes)
        for end in self.ends:
            nn.init.zeros_(end.weight), nn.init.zeros_(end.bias)

    def context(self, codes: Int[Tensor, "b k n"]) -> Float[Tensor, "b n d"]:
        """What is known before each cell. The last cell's codes are never looked at."""
        x = self.inlet(torch.cat([code(codes[:, j, :-1]) for j, code in enumerate(self.code)], -1))
        places = grid(1, *self.side, device=codes.device).coords[:, : codes.shape[2]]
        x = F.pad(x, (0, 0, 1, 0)) + self.start[: codes.shape[2]]
        return self.trunk(x, Context(Where(places, torch.arange(codes.shape[2], device=codes.device)[None])))

    def slots(self, h: Float[Tensor, "n d"], said: list[Int[Tensor, "n"]]) -> Float[Tensor, "n slots d"]:
        """The small transformer of one cell: [h, code 1, code 2, ...]; the first slot is at place 0."""
        told = [slot(0 * code if self.parallel else code) for slot, code in zip(self.slot, said, strict=False)]
        x = torch.stack([h, *told], 1)
        place = torch.arange(x.shape[1], device=h.device)
        where = Where(F.pad(place[None, :, None].float(), (0, 2)), place[None])
        return self.norm(self.small(x, Context(where)))

    def forward(self, codes: Int[Tensor, "b k n"]) -> list[Float[Tensor, "b n _"]]:
        """Logits of every code, teacher-forced: one tensor a book."""
        h = self.context(codes)
        y = self.slots(h.flatten(0, 1), [*rearrange(codes, "b k n -> k (b n)")[:-1]])
        return [end(y[:, j]).unflatten(0, h.shape[:2]) for j, end in enumerate(self.ends)]

    def nll(self, codes: Int[Tensor, "b k n"]) -> Float[Tensor, "k"]:
        """Nats a cell, of each book."""
        return torch.stack([F.cross_entropy(x.transpose(1, 2), codes[:, j]) for j, x in enumerate(self(codes))])

    @torch.no_grad()
    def sample(self, b: int, temperatures: tuple[float | int, ...], generator=None) -> Int[Tensor, "b k n"]:
        """Draw b grids of codes, cell by cell and book by book; every book has its own temperature."""
        n = self.side[0] * self.side[1]
        codes = torch.zeros(b, len(self.sizes), n, dtype=torch.long, device=self.start.device)
        for i in range(n):
            h, said = self.context(codes[:, :, : i + 1])[:, -1], []
            for end, temperature in zip(self.ends, temperatures, strict=True):
                logits = end(self.slots(h, said)[:, len(said)])
                said.append(choose(logits[..., None], temperature, generator)[:, 0])
            codes[:, :, i] = torch.stack(said, 1)
        return codes
