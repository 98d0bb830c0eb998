"""LouisKV: fetch from a long memory only when the query turns elsewhere, and then whole units of tokens that belong together.

Paper:   LouisKV: Efficient KV Cache Retrieval for Long Input-Output Sequences (2025), arXiv 2510.11292
Kind:    part (a cache; no training)
Equal:   the full cache, with a budget of all tokens; retrieval at every step, with tau above 1; the exact best tokens, with units
         of one token and a query head for each key head
Claim:   at equal budget and equal numbers of retrievals, looking when the query turns is nearer to the full cache than looking at
         every s-th step, and than looking at random; on the prompt clusters beat pages, on what was made segments do
Differs: the memory of a model of video codes: one step is a row of 8 codes, so the query of a step is the mean over its row, and
         units are voted for by all of its queries. There is no slow link: what would be copied is counted, and the gather is
         timed. Clustering and gathering are a few tensor operations, not kernels. Inferred: each layer decides for itself; the
         test looks at queries before their rotary turn (`bare`; after it, places count as well), while units are grouped and
         scored by rotated keys, less their mean; the buffer holds only what was generated; a unit that is too large for what is
         left of the budget is skipped, smaller ones after it are not; segments have at most `longest` tokens

    r_t = mean over heads of cos(q_{t-1}, q_t)          look again where r_t < tau
    read  [first tokens | whole units by mean softmax(q mu / sqrt d), up to B tokens | what was just made | the step itself]

What is unusual here: samples of a batch turn at different times and have units of different sizes. All of it is kept in
rectangles of numbers, with a unit for each token and padding that nobody sees, so there is no loop over samples or units.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from einops import reduce
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..core.attention import grouped, rotary_pairs, rotate
from ..core.baselines.vq import kmeans
from ..core.cache import Cache, Entry, pick, together
from ..core.where import HIDDEN, Where

SINK, LOCAL = -1, -2  # instead of a unit: among the first tokens, in the buffer

# --- units ------------------------------------------------------------------------------------------------------------


def clusters(k: Float[Tensor, "b g n d"], size: int = 16, rounds: int = 8) -> Int[Tensor, "b g n"]:
    """The cluster of each key, n / size of them for every sample and head: k-means from keys far from each other.

    The mean of all keys is taken off first: it is large, and adds the same to all scores of a query. The first start is the key
    farthest from it, each next one the farthest from those before, so the order of the keys makes no difference.
    """
    x = (k - k.mean(2, keepdim=True)).flatten(0, 1)
    far, starts = x.square().sum(-1), []
    for _ in range(max(1, x.shape[1] // size)):
        starts.append(x[torch.arange(len(x)), far.argmax(1)])
        far = torch.minimum(far, (x - starts[-1][:, None]).square().sum(-1))
    return kmeans(x, len(starts), torch.Generator(), rounds, torch.stack(starts, 1))[1].view(k.shape[:3])


def leaving(segment: Int[Tensor, "b m"], local: int) -> Int[Tensor, "b"]:
    """How many of m generated tokens have left the buffer: closed segments, the oldest first, until `local` tokens are left."""
    if not segment.shape[1]:
        return segment.new_zeros(len(segment))
    place = torch.arange(segment.shape[1], device=segment.device)
    begins = F.pad(segment.diff(dim=1) != 0, (1, 0), value=True)
    late = begins & (place >= len(place) - local)
    return torch.where(late.any(1), late.int().argmax(1), (place * begins).amax(1))  # else up to the open segment


def means(k: Float[Tensor, "b g n d"], unit: Int[Tensor, "b g n"], count: int):
    """Mean key `b g u d` and size `b g u` of each of `count` units; 0 of a unit that has no tokens."""
    slot = torch.where(unit < 0, count, unit).long()
    size = k.new_zeros(*k.shape[:2], count + 1).scatter_add(2, slot, torch.ones_like(slot, dtype=k.dtype))
    total = k.new_zeros(*size.shape, k.shape[-1]).scatter_add(2, slot[..., None].expand_as(k), k)
    return (total / size.clamp_min(1)[..., None])[:, :, :count], size[..., :count].long()


def votes(q: Float[Tensor, "b k n d"], keys: Float[Tensor, "b g u d"], size: Int[Tensor, "b g u"]) -> Float[Tensor, "b g u"]:
    """How much a step wants each unit: softmax(q mu / sqrt d) over units, mean over its queries and the heads of a group."""
    score = torch.einsum("bknd,bkud->bknu", q * q.shape[-1] ** -0.5, grouped(q, keys))
    share = score.masked_fill(grouped(q, size)[:, :, None] == 0, -torch.inf).softmax(-1)
    return reduce(share, "b (g r) n u -> b g u", "mean", g=keys.shape[1])


def fill(vote: Float[Tensor, "b g u"], size: Int[Tensor, "b g u"], budget: int) -> Bool[Tensor, "b g u"]:
    """Whole units, the most wanted first, up to `budget` tokens; what doesn't fit is skipped."""
    order = vote.argsort(dim=-1, descending=True, stable=True)
    ranked = size.gather(-1, order)
    fits = ranked > 0
    while True:
        used = (ranked * fits).cumsum(-1)
        inside = fits & (used <= budget)
        if torch.equal(inside, fits):
            return torch.zeros_like(fits).scatter(-1, order, fits)
        left = budget - (ranked * inside).sum(-1, keepdim=True)
        fits = inside | fits & (ranked <= left)


# --- the cache --------------------------------------------------------------------------------------------------------


@dataclass
class Memory:
    """What one layer knows about its tokens.

    first: tokens of the prompt; segment: `b m` of generated tokens; unit: `b g n` of all (or SINK, LOCAL); keys, size: of units
    last: mean query `b k d` of the step before; turned: `b`, whether one came since the last token was kept
    index: `b g B` tokens that were fetched, -1 for none; read: these, as keys, values and places
    """

    first: int
    unit: Tensor
    segment: Tensor
    keys: Tensor
    size: Tensor
    turned: Tensor
    last: Tensor | None = None
    index: Tensor | None = None
    read: tuple[Tensor, Tensor, Where] | None = None
    agreed: list = field(default_factory=list)  # r_t of every step, `b`
    looked: list = field(default_factory=list)  # whether it was fetched, `b`


class LouisKV(Cache):
    """Keeps all, reads few: the block that comes first is the prompt, every later one a step.

    budget:  tokens that are fetched at most, B
    tau:     look again when the mean cosine of a step's queries to the last step's is below; a tuple gives each layer its own
    sink, local, size, longest: first tokens, tokens of the buffer, tokens a cluster on average, tokens a segment at most
    bare:    compare queries without their rotary turn
    """

    rotated = True  # only then are the scores those that the attention will give

    def __init__(self, budget: int = 128, tau: float | int | tuple[float | int, ...] = 0.7, sink: int = 4, local: int = 64,
                 size: int = 16, longest: int = 32, bare: bool = True):  # fmt: skip
        if min(budget, local, size, longest) < 1 or sink < 0:
            raise ValueError(f"budget, local, size and longest are 1 at least, got {budget}, {local}, {size}, {longest}; {sink=}")
        self.budget, self.tau, self.sink, self.local = budget, tau, sink, local
        self.size, self.longest, self.bare = size, longest, bare
        super().__init__()

    def reset(self) -> None:
        super().reset()
        self.memory: dict[int, Memory] = {}

    # what a rival may do otherwise: when to look, and how tokens are grouped

    def looks(self, layer: int, turned: Bool[Tensor, "b"]) -> Bool[Tensor, "b"]:
        """Which samples look again, given whose query has turned."""
        return turned

    def grouping(self, k: Float[Tensor, "b g n d"]) -> Int[Tensor, "b g n"]:
        """The units of the prompt."""
        return clusters(k, self.size)

    def later(self, m: Memory, k: Tensor) -> Int[Tensor, "b g m"]:
        """The units of what was generated, from 0; LOCAL in the buffer."""
        gone = leaving(m.segment, self.local)
        place = torch.arange(m.segment.shape[1], device=k.device)
        return torch.where(place < gone[:, None], m.segment, LOCAL)[:, None].expand(-1, k.shape[1], -1)

    def wanted(self, m: Memory, q: Tensor, k: Tensor) -> Float[Tensor, "b g u"]:
        """How much a step wants each unit."""
        return votes(q, m.keys, m.size)

    # what comes in

    def close(self, block: int) -> None:
        super().close(block)
        for layer, entries in self.kept.items():
            k, v, where = together(entries)
            self.kept[layer] = [Entry(block, k, v, where)]
            self.memory[layer] = self.grown(self.memory[layer], k.detach()) if layer in self.memory else self.begun(k.detach())

    def begun(self, k: Float[Tensor, "b g n d"]) -> Memory:
        """The prompt: its first tokens stay, the others are grouped once and for all."""
        sink, (b, g, n, _) = min(self.sink, k.shape[2]), k.shape
        unit = torch.full((b, g, n), SINK, device=k.device, dtype=torch.int32)
        if n > sink:
            unit[:, :, sink:] = self.grouping(k[:, :, sink:]).int()
        none = torch.zeros(b, 0, dtype=torch.long, device=k.device)
        keys, size = means(k, unit, int(unit.max()) + 1)
        return Memory(n, unit, none, keys, size, torch.ones(b, dtype=torch.bool, device=k.device))

    def grown(self, m: Memory, k: Float[Tensor, "b g n d"]) -> Memory:
        """A step's tokens go on with the open segment, or begin one where the query turned or the segment is full."""
        new = k.shape[2] - m.first - m.segment.shape[1]
        current = m.segment[:, -1:] if m.segment.shape[1] else torch.full_like(m.turned[:, None], -1, dtype=torch.long)
        full = (m.segment == current).sum(1) + new > self.longest
        current = (current + (m.turned | full)[:, None]).clamp_min(0)
        m.segment = torch.cat([m.segment, current.expand(-1, new)], 1)
        prompt, generated = m.unit[:, :, : m.first], self.later(m, k)
        count = max(0, int(prompt.max()) + 1)  # units of the prompt
        m.unit = torch.cat([prompt, torch.where(generated < 0, LOCAL, generated + count).int()], 2)
        m.keys, m.size = means(k, m.unit, max(count, int(m.unit.max()) + 1))
        m.turned = torch.zeros_like(m.turned)
        return m

    # what goes out

    def read(self, layer: int, q: Tensor, where: Where) -> tuple[Tensor, Tensor, Where] | None:
        past = self.past(layer)
        if not past:
            return None
        m, (all_,) = self.memory[layer], past
        now = self.direction(q, where)
        agreed = torch.full_like(now[:, 0, 0], -1) if m.last is None else F.cosine_similarity(now, m.last, dim=-1).mean(1)
        tau = self.tau[layer] if isinstance(self.tau, tuple) else self.tau
        turned = (agreed < tau) | (m.last is None)
        look = self.looks(layer, turned) | (m.last is None)
        m.agreed.append(agreed), m.looked.append(look)
        m.last, m.turned = now, m.turned | turned
        if look.any():
            self.fetch(m, q, all_, look)
        return together([*self.nearby(m, all_), Entry(0, *m.read)])

    def direction(self, q: Float[Tensor, "b k n d"], where: Where) -> Float[Tensor, "b k d"]:
        """The mean query of a step."""
        if self.bare:
            axis, freq = (pairs.to(q.device) for pairs in rotary_pairs(q.shape[-1]))
            q = rotate(q, -where.coords, axis, freq)
        return q.detach().mean(2)

    def fetch(self, m: Memory, q: Tensor, past: Entry, look: Bool[Tensor, "b"]) -> None:
        """New units for the samples that look; the others keep theirs. What is copied and compared is counted."""
        n = past.k.shape[2]
        index = torch.full((*m.unit.shape[:2], min(self.budget, n)), -1, device=q.device)
        if m.size.shape[-1]:
            taken = fill(self.wanted(m, q.detach(), past.k.detach()), m.size, self.budget)
            mine = taken.gather(2, m.unit.clamp_min(0).long()) & (m.unit >= 0)
            first = (~mine).int().argsort(dim=-1, stable=True)[..., : index.shape[-1]]
            index = torch.where(mine.gather(-1, first), first, -1)
        if m.index is not None:
            old = F.pad(m.index, (0, index.shape[-1] - m.index.shape[-1]), value=-1)
            index = torch.where(look[:, None, None], index, old)
        m.index = index
        k, v, places = pick(past.k, past.v, seen(past.where, past.k), index.clamp_min(0))
        m.read = k, v, Where(places.coords, places.block.masked_fill(index < 0, HIDDEN))
        width = (k.shape[-1] + v.shape[-1]) * k.element_size()
        self.moved += int((index[look] >= 0).sum()) * width + m.keys[look].nbytes

    def nearby(self, m: Memory, past: Entry) -> list[Entry]:
        """The first tokens, and the buffer."""
        where, sink, near = seen(past.where, past.k), min(self.sink, m.first), (m.unit[:, 0] == LOCAL).any(0)
        block = torch.where(m.unit[:, 0] >= 0, HIDDEN, where.block)  # one sample's buffer may begin before another's
        parts = slice(0, sink), slice(int(near.int().argmax()) if near.any() else len(near), None)
        return [Entry(0, past.k[:, :, p], past.v[:, :, p], Where(where.coords[:, p], block[:, p])) for p in parts]

    @property
    def nbytes(self) -> int:
        return super().nbytes + sum(m.keys.nbytes + m.unit.nbytes for m in self.memory.values())

    @property
    def rate(self) -> float:
        """Retrievals a step, mean over samples and layers."""
        every = [look for m in self.memory.values() for look in m.looked]
        return float(torch.stack(every).float().mean()) if every else 0.0


def seen(where: Where, k: Tensor) -> Where:
    """Places with a block for each sample's token."""
    block = torch.zeros(where.coords.shape[:2], dtype=torch.long, device=k.device) if where.block is None else where.block
    return Where(where.coords.expand(len(k), -1, -1), block.expand(len(k), -1))
