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
from torch import Tensor

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

    def read(self, layer: int, q: Tensor, where: Where) -> tuple[Tensor, Tensor, Where] | None:
        """Keys, values and places of the past for the queries `q` at `where`; None while there is no past."""
        entries = [e for e in self.kept.get(layer, []) if e.block != self.block]
        if not entries:
            return None
        places = entries[0].where
        for e in entries[1:]:
            places = places.join(e.where)
        k, v = torch.cat([e.k for e in entries], 2), torch.cat([e.v for e in entries], 2)
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


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()
