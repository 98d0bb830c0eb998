"""Where a token stands, and who may see whom.

Every token carries float coordinates (frame, row, column) and an integer *block*. One rule decides visibility:

    a key is visible to a query  iff  block(key) <= block(query)

Equal blocks are bidirectional attention; one block a token in order is causal; one a frame or a chunk is block-causal.
A condition gets block -1 (seen by all, sees only itself), padding a block beyond every other (seen by nobody but itself).
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool
from torch import Tensor

HIDDEN = 2**40  # block number of padding: beyond every query's


@dataclass(frozen=True)
class Where:
    """Places of the tokens of one call.

    coords: `b n 3` float (frame, row, column), or `b k n 3` where heads differ; a batch of 1 broadcasts
    block:  `b n` (or `b k n`) integers, or None when all tokens share one block
    keys:   places of the keys where these aren't the queries' own (a cache was read); None means the same tokens
    grid:   (f, h, w) when the tokens fill a grid in frame-major order: what structured sparse patterns need to know
    """

    coords: Tensor
    block: Tensor | None = None
    keys: "Where | None" = None
    grid: tuple[int, int, int] | None = None

    def join(self, later: "Where") -> "Where":
        """The places of these tokens followed by `later`'s (batch sizes broadcast)."""
        a, b = _alike(self.coords, later.coords, 2)
        if self.block is None and later.block is None:
            return Where(torch.cat([a, b], -2))
        pa, pb = _alike(_blocks(self), _blocks(later), 1)
        return Where(torch.cat([a, b], -2), torch.cat([pa, pb], -1))

    def seen_from(self, keys: "Where") -> "Where":
        """The same queries, looking at `keys`."""
        return replace(self, keys=keys)


def _blocks(where: Where) -> Tensor:
    if where.block is not None:
        return where.block
    return torch.zeros(where.coords.shape[:-1], dtype=torch.long, device=where.coords.device)


def _alike(a: Tensor, b: Tensor, tail: int) -> tuple[Tensor, Tensor]:
    """Both with the same batch and heads; the last `tail` axes are left alone. `b n ...` gets a heads axis beside `b k n ...`."""
    most = max(a.ndim, b.ndim)
    a, b = (x if x.ndim == most else x.unsqueeze(1) for x in (a, b))
    lead = torch.broadcast_shapes(a.shape[:-tail], b.shape[:-tail])
    return a.expand(*lead, *a.shape[-tail:]), b.expand(*lead, *b.shape[-tail:])


def grid(f: int, h: int, w: int, start: float | int = 0, block: int | None = None, device=None) -> Where:
    """Places of an f x h x w grid in frame-major order, batch 1.

    start: frame number of the first frame (a later block of a rollout doesn't begin at 0)
    block: frames a block (None: one block for all); blocks are numbered from the start of the rollout, so `start` counts
    """
    frame = torch.arange(f, device=device, dtype=torch.float) + start
    rows, columns = torch.arange(h, device=device, dtype=torch.float), torch.arange(w, device=device, dtype=torch.float)
    axes = torch.meshgrid(frame, rows, columns, indexing="ij")
    coords = torch.stack([a.reshape(-1) for a in axes], -1)[None]
    blocks = (coords[..., 0] // block).long() if block else None
    return Where(coords, blocks, grid=(f, h, w))


def visible(where: Where) -> Bool[Tensor, "..."] | None:
    """The mask `b nq nk` (or `b k nq nk`) of the visibility rule; None when everything is visible (no mask is cheaper)."""
    keys = where.keys if where.keys is not None else where
    if where.block is None and keys.block is None:
        return None
    k, q = _alike(_blocks(keys), _blocks(where), 1)
    return k[..., None, :] <= q[..., :, None]
