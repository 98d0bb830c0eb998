"""What a rollout remembers: keys and values of what was already made, so that nothing is computed twice.

A rollout calls `open(block, cond)` when it begins a block and `close(block)` when it is done; in between every
attention layer calls `through`: it reads the past and, where `writing` is on, adds the keys of its own tokens. What is
unusual here: keys are kept *unrotated* and turned after `read` (unless `rotated` says otherwise), so a cache may drop,
move and merge entries; and it counts the bytes that it holds (`nbytes`) and that reading copied (`moved`), because the
second is often the real cost. A paper overrides one method: retrieval changes `read`, quantisation changes `add`,
eviction changes `close`.
"""

from dataclasses import dataclass

import torch
from einops import rearrange, reduce
from jaxtyping import Float, Int
from torch import Tensor

from .attention import grouped
from .model import Cond
from .where import Where


@dataclass
class Entry:
    """Keys and values `b k n d` of one layer in one block, and where their tokens stand."""

    block: int
    k: Tensor
    v: Tensor
    where: Where


class Cache:
    """Keeps everything. This is the default, and what every other cache is measured against."""

    rotated = False

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        """Forget everything, the counters too."""
        self.kept: dict[int, list[Entry]] = {}
        self.block, self.cond, self.writing, self.moved = -1, Cond(), False, 0

    def open(self, block: int, cond: Cond) -> None:
        """A block begins; `cond` is what the model will be told in it. Nothing is written until `writing` is set."""
        self.block, self.cond, self.writing = block, cond, False

    def close(self, block: int) -> None:
        """The block is done. The place for eviction."""
        self.writing = False

    def add(self, layer: int, q: Tensor, k: Tensor, v: Tensor, where: Where) -> None:
        """Keep this block's keys and values. A second pass over the same block replaces the first."""
        entries = self.kept.setdefault(layer, [])
        if entries and entries[-1].block == self.block:
            entries.pop()
        entries.append(Entry(self.block, k, v, Where(where.coords, where.block)))

    def past(self, layer: int) -> list[Entry]:
        """What was kept before the open block."""
        return [e for e in self.kept.get(layer, []) if e.block != self.block]

    def read(self, layer: int, q: Tensor, where: Where) -> tuple[Tensor, Tensor, Where] | None:
        """Keys, values and places of the past for the queries `q` (rotated if the keys are); None while there is no past."""
        entries = self.past(layer)
        if not entries:
            return None
        k, v, places = together(entries)
        self.moved += _bytes(k) + _bytes(v)
        return k, v, places

    def through(self, layer: int, q: Tensor, k: Tensor, v: Tensor, where: Where) -> tuple[Tensor, Tensor, Where]:
        """What an attention layer calls: the past's keys, values and places, followed by its own."""
        past = self.read(layer, q, where)
        if self.writing:
            self.add(layer, q, k, v, where)
        own = Where(where.coords, where.block)
        if past is None:
            return k, v, own
        return torch.cat([past[0], k], 2), torch.cat([past[1], v], 2), past[2].join(own)

    def detach(self) -> None:
        """Cut the gradient into what is held."""
        for e in (e for entries in self.kept.values() for e in entries):
            e.k, e.v = e.k.detach(), e.v.detach()

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values held now."""
        return sum(_bytes(e.k) + _bytes(e.v) for entries in self.kept.values() for e in entries)

    @property
    def tokens(self) -> int:
        """Tokens held in the first layer."""
        return sum(e.k.shape[2] for e in self.kept.get(0, []))


class Window(Cache):
    """Keeps the last `last` blocks and the first `sink` (Xiao et al. 2023, arXiv 2309.17453)."""

    def __init__(self, last: int, sink: int = 0):
        if last < 1 or sink < 0:
            raise ValueError(f"a window keeps the last block at least (last >= 1, sink >= 0), got {last=}, {sink=}")
        super().__init__()
        self.last, self.sink = last, sink

    def close(self, block: int) -> None:
        super().close(block)
        for layer, entries in self.kept.items():
            old = len(entries) - self.last
            self.kept[layer] = [e for i, e in enumerate(entries) if i < self.sink or i >= old]


class Stride(Cache):
    """Keeps everything and reads `n` blocks, evenly spread over the past; the last one is always among them."""

    def __init__(self, n: int):
        if n < 1:
            raise ValueError(f"a stride reads at least one block (n >= 1), got {n=}")
        super().__init__()
        self.n = n

    def past(self, layer: int) -> list[Entry]:
        entries = super().past(layer)
        end = len(entries) - 1
        if end < self.n:
            return entries
        return [entries[end - i * end // max(1, self.n - 1)] for i in reversed(range(self.n))]


class Retrieve(Cache):
    """Keeps everything and reads the `n` pages that the queries score highest, a set for each sample and key head.

    A page is `page` tokens in a row (a block's worth, to read whole blocks); what fills no page yet is always read. Its score
    is the mean of its keys' exact scores, q . mean(k). Where several queries share one reading (those of the call, and the
    heads of a group) each spreads one vote by a softmax over the pages.
    """

    rotated = True  # only then are the scores those that the attention will give

    def __init__(self, n: int, page: int):
        if n < 1 or page < 1:
            raise ValueError(f"retrieval reads n >= 1 pages of page >= 1 tokens, got {n=}, {page=}")
        super().__init__()
        self.n, self.page = n, page

    def reset(self) -> None:
        super().reset()
        self.pages: dict[int, Tensor] = {}

    @staticmethod
    def summary(k: Float[Tensor, "b g u p d"]) -> Float[Tensor, "b g u s d"]:
        """What is remembered of each of u pages."""
        return k.mean(3, keepdim=True)

    @staticmethod
    def score(q: Float[Tensor, "b k n d"], pages: Float[Tensor, "b g u s d"]) -> Float[Tensor, "b k n u"]:
        return torch.einsum("bknd,bkud->bknu", q, grouped(q, pages[..., 0, :]))

    def close(self, block: int) -> None:
        super().close(block)
        for layer, entries in self.kept.items():
            k, v, where = together(entries)
            self.kept[layer] = [Entry(block, k, v, where)]
            old = self.pages.get(layer)
            done = 0 if old is None else old.shape[2]
            new = self.summary(rearrange(k[:, :, done * self.page : k.shape[2] // self.page * self.page].detach(),
                                         "b g (u p) d -> b g u p d", p=self.page))
            self.pages[layer] = new if old is None else torch.cat([old, new], 2)

    def read(self, layer: int, q: Tensor, where: Where) -> tuple[Tensor, Tensor, Where] | None:
        pages = self.pages.get(layer)
        if pages is None or pages.shape[2] <= self.n:
            return super().read(layer, q, where)
        (past,) = self.past(layer)
        votes = self.score(q * q.shape[-1] ** -0.5, pages).softmax(-1)
        best = reduce(votes, "b (g r) n u -> b g u", "mean", g=pages.shape[1]).topk(self.n).indices.sort(-1).values
        inside = torch.arange(self.page, device=best.device)
        tail = torch.arange(pages.shape[2] * self.page, past.k.shape[2], device=best.device)
        index = torch.cat([(best[..., None] * self.page + inside).flatten(-2), tail.expand(*best.shape[:2], -1)], -1)
        k, v, places = pick(past.k, past.v, past.where, index)
        self.moved += _bytes(k) + _bytes(v) + _bytes(pages)
        return k, v, places

    @property
    def nbytes(self) -> int:
        return super().nbytes + sum(map(_bytes, self.pages.values()))


class Quest(Retrieve):
    """Scores a page by what its best key could at most score (Tang et al. 2024, arXiv 2406.10774).

    From the smallest and largest value of every channel: sum over channels of max(q min, q max) >= q . k for every k of the page.
    """

    @staticmethod
    def summary(k: Float[Tensor, "b g u p d"]) -> Float[Tensor, "b g u s d"]:
        return torch.stack([k.amin(3), k.amax(3)], 3)

    @staticmethod
    def score(q: Float[Tensor, "b k n d"], pages: Float[Tensor, "b g u s d"]) -> Float[Tensor, "b k n u"]:
        low, high = (grouped(q, pages[..., i, :]) for i in (0, 1))
        return torch.einsum("bknd,bkud->bknu", q.clamp_max(0), low) + torch.einsum("bknd,bkud->bknu", q.clamp_min(0), high)


def together(entries: list[Entry]) -> tuple[Tensor, Tensor, Where]:
    """Keys, values and places of all entries, one after the other."""
    where = entries[0].where
    for e in entries[1:]:
        where = where.join(e.where)
    return torch.cat([e.k for e in entries], 2), torch.cat([e.v for e in entries], 2), where


def pick(k: Float[Tensor, "b g n d"], v: Float[Tensor, "b g n e"], where: Where, index: Int[Tensor, "b g m"]):
    """The tokens `index` of keys, values and places: others for each sample and key head."""

    def take(x, axes):
        x = x if x.ndim == axes else x[:, None]
        x = x.expand(*index.shape[:2], *x.shape[2:])
        return x.gather(2, index if axes == 3 else index[..., None].expand(*index.shape, x.shape[-1]))

    block = None if where.block is None else take(where.block, 3)
    return take(k, 4), take(v, 4), Where(take(where.coords, 4), block)


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()
