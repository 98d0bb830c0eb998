"""The layers: their grids, the bottleneck that asks one after the other, the tokenizer around it, and what they cost."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import log2, prod
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from ...core.baselines.unet import zero
from ...core.baselines.vq import VQ, Codes
from ...core.tokenizer import Norm, Residual, Stream, Tokenizer, check_clip
from ...core.where import Where


@dataclass(frozen=True)
class Level:
    """One layer of tokens. k codes of d numbers; a token stands for t x s x s cells of the finest grid; `depth` residual blocks
    of `width` channels lie beside the linear way down to the codes and up again."""

    k: int
    t: int = 1
    s: int = 1
    d: int = 8
    depth: int = 0
    width: int = 32

    def grid(self, f: int, h: int, w: int) -> tuple[int, int, int]:
        """Frames, rows and columns of tokens on f x h x w cells. The first frame fills a group of its own."""
        if (f - 1) % self.t or h % self.s or w % self.s:
            raise ValueError(f"1 + {self.t}k frames and multiples of {self.s} rows and columns of cells, got {(f, h, w)}")
        return 1 + (f - 1) // self.t, h // self.s, w // self.s

    def places(self, f: int, h: int, w: int, device=None) -> Where:
        """Each of f x h x w tokens at the centre of its cells: distances to the finer tokens below it are symmetric."""
        frame = torch.arange(f, device=device) * self.t - (self.t - 1) / 2
        rows, columns = (torch.arange(n, device=device) * self.s + (self.s - 1) / 2 for n in (h, w))
        axes = torch.meshgrid(frame.clamp_min(0), rows, columns, indexing="ij")
        return Where(torch.stack([a.reshape(-1) for a in axes], -1)[None], grid=(f, h, w))


class Way(nn.Module):
    """From c channels on the finest grid to d on a level's, or (`up`) back: a linear path, causal residual blocks beside it."""

    def __init__(self, c: int, level: Level, up: bool = False):
        super().__init__()
        self.t, self.s, self.up = level.t, level.s, up
        ends = (c * level.t * level.s**2, level.d)
        ends = ends[::-1] if up else ends
        self.linear = nn.Conv2d(*ends, 1)
        self.start = nn.Conv2d(ends[0], level.width, 3, padding=1) if level.depth else None
        self.blocks = nn.ModuleList(Residual(level.width, True, True) for _ in range(level.depth))
        if level.depth:
            self.norm, self.end = Norm(level.width), zero(nn.Conv2d(level.width, ends[1], 1))

    def folded(self, x: Tensor, fresh: bool) -> Tensor:
        """The cells of each token as its channels; the first frame is repeated to fill a group."""
        if fresh:
            x = torch.cat([x[:, :, :1].expand(-1, -1, self.t - 1, -1, -1), x], 2)
        if x.shape[2] % self.t:
            raise ValueError(f"later chunks have a multiple of {self.t} frames of cells, got {x.shape[2]}")
        return rearrange(x, "b c (f t) (h p) (w q) -> b (c t p q) f h w", t=self.t, p=self.s, q=self.s)

    def forward(self, x: Float[Tensor, "b c f h w"], stream: Stream | None = None) -> Float[Tensor, "b d g i j"]:
        b, fresh = len(x), stream is None or self not in stream.kept
        if stream is not None:
            stream.kept[self] = x[:, :, :0]
        x = rearrange(x if self.up else self.folded(x, fresh), "b c f h w -> (b f) c h w")
        y = self.linear(x)
        if self.start is not None:
            x = self.start(x)
            for block in self.blocks:
                x = block(x, b, stream)
            y = y + self.end(F.silu(self.norm(x)))
        y = rearrange(y, "(b f) c h w -> b c f h w", b=b)
        if self.up:
            y = rearrange(y, "b (c t p q) f h w -> b c (f t) (h p) (w q)", t=self.t, p=self.s, q=self.s)
        return y[:, :, self.t - 1 :].contiguous() if self.up and fresh else y


class Layer(nn.Module):
    """One level: W before its codebook, J behind it, and the vector that stands for a token that isn't there."""

    def __init__(self, c: int, level: Level, seed: int = 0):
        super().__init__()
        self.level, self.book = level, VQ(level.k, level.d, decay=0.99, restart=0.1, seed=seed)
        self.down, self.up = Way(c, level), Way(c, level, up=True)
        self.told, self.join = nn.Conv3d(2 * c, c, 1), nn.Conv3d(2 * c, c, 1)
        self.gone = nn.Parameter(torch.zeros(level.d, 1, 1, 1))
        one = torch.eye(c)[..., None, None, None]
        for layer, sign in ((self.told, -1), (self.join, 1)):
            layer.weight.data = torch.cat([one, sign * one], 1)
            nn.init.zeros_(layer.bias)

    @torch.no_grad()
    def begin(self, x: Float[Tensor, "b c f h w"]) -> None:
        """The linear paths become the principal components of these cells, the codes the centres of clusters."""
        cells = rearrange(self.down.folded(x, True), "b c f h w -> (b f h w) c")
        mean = cells.mean(0)
        basis = torch.linalg.eigh((cells - mean).T.double().cov())[1].flip(1)[:, : self.level.d].float()
        if basis.shape[1] < self.level.d:
            raise ValueError(f"codes of {self.level.d} numbers can't come from {len(mean)} numbers a token")
        self.down.linear.weight.copy_(basis.T[..., None, None]), self.down.linear.bias.copy_(-mean @ basis)
        self.up.linear.weight.copy_(basis[..., None, None]), self.up.linear.bias.copy_(mean)
        self.book.begin(self.down(x))


class Layers(nn.Module):
    """The bottleneck: levels from coarse to fine. Codes are one grid a level; `lookup` of the first m gives what these say alone.

    drop: in training, how often a clip loses all layers but the first few, and how often (of the rest) random cells of them
    """

    def __init__(self, c: int, levels: Sequence[Level], drop: float = 0.0, seed: int = 0):
        super().__init__()
        if not 0 <= drop <= 0.5:
            raise ValueError(f"layers are dropped from a share of 0 to 0.5 of the clips, got {drop}")
        self.layers = nn.ModuleList(Layer(c, level, seed + i) for i, level in enumerate(levels))
        self.channels, self.drop, self.seed = c, drop, seed
        self.register_buffer("passes", torch.tensor(0))  # random choices are functions of it, so a resumed training repeats them

    @property
    def levels(self) -> list[Level]:
        return [layer.level for layer in self.layers]

    @torch.no_grad()
    def begin(self, z: Float[Tensor, "b c f h w"]) -> None:
        """`Layer.begin` of each on what it will be told."""
        known = None
        for layer in self.layers:
            layer.begin(self._before(layer, z, known))
            known = self._behind(layer, layer.book(layer.down(self._before(layer, z, known)))[0], known, None)

    @staticmethod
    def _before(layer, z, known):
        return z if known is None else layer.told(torch.cat([z, known.detach()], 1))

    @staticmethod
    def _behind(layer, q, known, stream):
        u = layer.up(q.contiguous(), stream)
        return u if known is None else layer.join(torch.cat([known, u], 1))

    def masks(self, z: Tensor) -> list[Tensor | None]:
        """For each layer `b 1 f h w`, which of its tokens are kept; None for all. The first layer is never dropped."""
        if not (self.training and self.drop):
            return [None] * len(self.layers)
        dice = torch.Generator().manual_seed(self.seed * 1_000_003 + int(self.passes))
        self.passes += 1
        u, v = torch.rand(2, len(z), 1, 1, 1, 1, generator=dice)
        depth = torch.randint(1, max(2, len(self.layers)), (len(z), 1, 1, 1, 1), generator=dice)
        kept: list[Tensor | None] = [None]
        for i, layer in enumerate(self.layers[1:], 1):
            cells = torch.rand(len(z), 1, *layer.level.grid(*z.shape[2:]), generator=dice) >= v
            whole = (u < self.drop) & (depth <= i)
            some = (u >= self.drop) & (u < 2 * self.drop)
            kept.append((~whole & (~some | cells)).to(z.device))
        return kept

    def forward(self, z: Float[Tensor, "b c f h w"], stream: Stream | None = None):
        if z.ndim != 5 or z.shape[1] != self.channels:
            raise ValueError(f"this bottleneck takes 'b {self.channels} f h w', got {tuple(z.shape)}")
        known: Any = None
        grids: list[Codes] = []
        losses: dict[str, Tensor] = {}
        for layer, kept in zip(self.layers, self.masks(z), strict=True):
            q, codes, more = layer.book(layer.down(self._before(layer, z, known), stream))
            index = codes[0].index
            grids.append(Codes(index, layer.level.places(*index.shape[1:], device=z.device)))
            q = q if kept is None else torch.where(kept, q, layer.gone)
            known = self._behind(layer, q, known, stream)
            losses = {name: losses.get(name, 0.0) + value for name, value in more.items()}
        return known, grids, losses

    def lookup(self, codes: list[Codes], stream: Stream | None = None) -> Float[Tensor, "b c f h w"]:
        """What the codes stand for. A code below 0 isn't there, nor are grids behind the last: the learnt vectors stand in."""
        known: Any = None
        for i, layer in enumerate(self.layers):
            if i < len(codes):
                index = codes[i].index
            else:
                fresh, one = stream is None or layer.up not in stream.kept, layer.level
                b, _, f, h, w = known.shape
                index = torch.full((b, (f + one.t - 1 if fresh else f) // one.t, h // one.s, w // one.s), -1, device=known.device)
            q = layer.book.lookup([Codes(index.clamp_min(0), None)])
            known = self._behind(layer, torch.where(index[:, None] < 0, layer.gone, q), known, stream)
        return known


class HiTVideo(Tokenizer):
    """The package's causal tokenizer with `Layers` between its halves. Frames: 1 + a multiple of 4 times the longest level's."""

    def __init__(self, levels: Sequence[Level], drop: float = 0.0, channels: int = 12, widths=(24, 48), depths=(1, 1), seed=0):
        super().__init__(channels, 4, widths, depths, bottleneck=Layers(channels, levels, drop, seed), noise=0.0)
        self.levels = list(levels)

    def frames(self, n: int) -> bool:
        return n >= 1 and (n - 1) % (4 * max(level.t for level in self.levels)) == 0

    @torch.no_grad()
    def begin(self, clips: Float[Tensor, "b 3 f h w"]) -> None:
        """Principal components of the patches, but not of equal variance: the books' distances should be those of pixels."""
        super().begin(clips)
        spread = self.direct_out.weight.norm(dim=0)
        spread = spread / spread.max()
        self.direct_in.weight.mul_(spread[:, None]), self.direct_in.bias.mul_(spread)
        self.direct_out.weight.div_(spread)
        self.bottleneck.begin(self.features(clips))

    def encode(self, clip: Float[Tensor, "b 3 f h w"], stream: Stream | None = None, generator=None) -> Tensor:
        """As the package's; a stream also passes through the layers."""
        check_clip(clip, 4)
        return self.bottleneck(self.features(clip, stream), stream)[0]

    def codes(self, clip: Float[Tensor, "b 3 f h w"], stream: Stream | None = None) -> list[Codes]:
        """One grid of codes a level, coarse to fine."""
        check_clip(clip, 4)
        return self.bottleneck(self.features(clip, stream), stream)[1]


# --- rate -----------------------------------------------------------------------------------------------------------------


def bits(levels: Sequence[Level], f: int, h: int, w: int) -> float:
    """Bits of all tokens on f x h x w cells: the sum over levels of tokens times log2 K."""
    return sum(prod(level.grid(f, h, w)) * log2(level.k) for level in levels)


def packed(codes: list[Codes], levels: Sequence[Level]) -> list[bytes]:
    """Each clip's tokens as one number, digit by digit in base K of their layer: no more than a byte above `bits`."""
    out = []
    for rows in zip(*(grid.index.flatten(1).tolist() for grid in codes), strict=True):
        number, size = 0, 1
        for row, level in zip(rows, levels, strict=True):
            for digit in row:
                number, size = number * level.k + digit, size * level.k
        out.append(number.to_bytes(((size - 1).bit_length() + 7) // 8, "big"))
    return out


def unpacked(data: list[bytes], levels: Sequence[Level], f: int, h: int, w: int) -> list[Codes]:
    """The tokens of `packed` clips of f x h x w cells of the finest grid."""
    grids = [level.grid(f, h, w) for level in levels]
    rows: list[list[list[int]]] = [[] for _ in levels]
    for number in (int.from_bytes(one, "big") for one in data):
        for level, grid, row in reversed(list(zip(levels, grids, rows, strict=True))):
            digits = []
            for _ in range(prod(grid)):
                number, digit = divmod(number, level.k)
                digits.append(digit)
            row.append(digits[::-1])
    parts = zip(rows, levels, grids, strict=True)
    return [Codes(torch.tensor(row).view(len(data), *grid), level.places(*grid)) for row, level, grid in parts]
