"""BlockVid: keep of each old chunk what was looked at, and read back the chunks whose caption resembles the new one.

Paper:   BlockVid: Block Diffusion for High-Quality and Consistent Minute-Long Video Generation (2025), arXiv 2511.22973
Kind:    procedure (a cache, a training loss and the noise of one rollout)
Equal:   the full cache, with tau = 1 and as many retrieved chunks as there are; a window, with none; the plain block loss, with
         every setting of `Forcing` at its default; fresh noise shuffled in windows of one frame is itself
Claim:   when a scene comes back, retrieval halves the error of its untold colour against a window that reads as many tokens,
         and loses at most a tenth of that with the salient tokens alone; training on own chunks lowers the error at the end of a
         rollout of 8 times the training length by 30 %; a little velocity forcing helps consistency without losing motion
Differs: pixels of 32 x 32 through `tok-f`, chunks of 4 frames. The truth of every chunk is known, so the distribution-matching
         side of Self Forcing (a critic) is left out: own chunks are context, the target is the true clip. Inferred, since neither
         paper nor code gives them: l = 2, gamma, x_cond (the mean of the l retrieved chunks), the cosine, what the schedule
         noises (the unknown chunks, from a drawn level up to 1). A chunk's salience is counted among its own tokens. What
         captions are compared by is the bag of words that name a scene or a look, not the model's text encoder, which
         confuses scenes more often. Of equally similar chunks the oldest are read: they have the fewest errors. What is read
         stays at its own times, or within a number of chunks from the open one: both were tried

    keep  smallest set S of a chunk's tokens with  sum_{j in S} a_j >= tau sum_j a_j,     a_j: attention that token j receives
    read  the l chunks i with the largest cos(E_c, E_i), sparse; the latest chunk, whole; the chunk itself
    L_BF  = E || v(x_t, t, ctx) - (eps - gamma x_cond) ||^2        x_t = (1-t) x + t eps
    level(c) = low + (1 - cos(pi c/n))/2 (high - low)

What is unusual here: adding L_BF to the plain loss needs no second pass. Both ask the same v, so their sum is one loss whose
target is the mean of the two. That also shows what it does: it mixes the retrieved chunks into the clip that v points to.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..core import fit, noise
from ..core.attention import rotary_pairs, rotate, scores
from ..core.cache import Cache, Entry, pick, together
from ..core.model import Cond
from ..core.rollout import Plan, block_times, rollout
from ..core.text import NULL, NUMBER, VOCABULARY
from ..core.where import HIDDEN, Where
from ..world import COLOURS, SHAPES

NAMES = (*COLOURS, *SHAPES, "first", "second", "third", "last")  # words that name a scene or a look


# --- what a cache keeps, and what it reads ----------------------------------------------------------------------------


def bag(text: Int[Tensor, "b l"], words: Sequence[str] = NAMES) -> Float[Tensor, "b e"]:
    """E_c: how often each of `words` stands in a caption of word numbers, as a unit vector (0 where none does)."""
    counts = F.one_hot(text, VOCABULARY).sum(1)[:, [NUMBER[word] for word in words]]
    return F.normalize(counts.float(), dim=-1)


def alike(new: Float[Tensor, "b e"], old: Float[Tensor, "b n e"], l: int) -> Int[Tensor, "b m"]:
    """Numbers of the l old captions with the largest cosine to the new one, the most alike first; of equals the oldest first."""
    similar = F.cosine_similarity(new[:, None], old, dim=-1)
    return (-similar).argsort(dim=-1, stable=True)[:, :l]


def received(q: Float[Tensor, "b k n d"], k: Float[Tensor, "b g n d"], where: Where) -> Float[Tensor, "b n"]:
    """Attention that each token of a chunk receives from the chunk's own queries: mean over heads and queries, sum 1."""
    axis, freq = (pairs.to(q.device) for pairs in rotary_pairs(q.shape[-1]))
    q, k = rotate(q, where.coords, axis, freq), rotate(k, where.coords, axis, freq)
    return scores(q, k, Where(where.coords)).mean((1, 2))


def salient(mass: Float[Tensor, "b n"], tau: float | int) -> Bool[Tensor, "b n"]:
    """Which tokens are kept: the fewest whose mass reaches tau of the whole."""
    if tau >= 1:
        return torch.ones_like(mass, dtype=torch.bool)
    order = mass.argsort(dim=-1, descending=True, stable=True)
    ranked = mass.gather(1, order)
    before = ranked.cumsum(-1) - ranked
    return torch.zeros_like(mass, dtype=torch.bool).scatter(1, order, before < tau * mass.sum(-1, keepdim=True))


def compact(k: Tensor, v: Tensor, where: Where, keep: Bool[Tensor, "b n"]) -> tuple[Tensor, Tensor, Where]:
    """The tokens that are to be kept, in order. A sample that keeps fewer than another is padded by tokens that nobody sees."""
    index = (~keep).int().argsort(dim=-1, stable=True)[:, : int(keep.sum(-1).max())]
    block = where.block if where.block is not None else torch.zeros(where.coords.shape[:2], dtype=torch.long, device=k.device)
    k, v, places = pick(k, v, Where(where.coords, block), index[:, None].expand(-1, k.shape[1], -1))
    return k, v, Where(places.coords[:, 0], places.block[:, 0].masked_fill(~keep.gather(1, index), HIDDEN))


class Semantic(Cache):
    """A bank of all chunks: reads `l` old ones by caption, sparse, and the latest `local` whole.

    l:     old chunks that are read; a number beyond their count reads all
    tau:   share of the attention that a chunk's kept tokens received (paper: 0.97, 0.98)
    embed: word numbers `b l` -> vectors `b e` that captions are compared by
    within: how many chunks back the first that is read may stand; it is moved up if it is older, those after it follow.
            None leaves all at their own times
    Without captions all chunks are equally alike, and the oldest are read. A batch may be larger than the captions by a whole
    factor (guidance): its parts then share what they read.
    """

    def __init__(self, l: int = 2, tau: float = 0.97, local: int = 1, embed: Callable = bag, within: int | None = None):
        if l < 0 or local < 1 or not 0 < tau <= 1:
            raise ValueError(f"the bank reads l >= 0 old and local >= 1 latest chunks, 0 < tau <= 1; got {l=}, {local=}, {tau=}")
        self.l, self.tau, self.local, self.embed, self.within = l, tau, local, embed, within
        super().__init__()

    def reset(self) -> None:
        super().reset()
        self.told: dict[int, Tensor] = {}
        self.began: dict[int, float | int] = {}
        self.mass: dict[tuple[int, int], Tensor] = {}
        self.context: dict[int, tuple[Tensor, Tensor, Where]] = {}

    def open(self, block: int, cond: Cond) -> None:
        super().open(block, cond)
        text = cond.text if cond.text is not None else torch.tensor([[NULL]])
        self.told[block], self.began[block], self.context = self.embed(text), cond.start, {}

    def add(self, layer: int, q: Tensor, k: Tensor, v: Tensor, where: Where) -> None:
        super().add(layer, q, k, v, where)
        self.mass[layer, self.block] = received(q.detach(), k.detach(), where)

    def close(self, block: int) -> None:
        """Chunks that are no longer among the latest lose all but their salient tokens."""
        super().close(block)
        for layer, entries in self.kept.items():
            for i, e in enumerate(entries[: -self.local]):
                if (mass := self.mass.pop((layer, e.block), None)) is not None:
                    entries[i] = Entry(e.block, *compact(e.k, e.v, e.where, salient(mass, self.tau)))

    def retrieved(self) -> Int[Tensor, "b m"]:
        """Which blocks each sample reads back in the open one, in order of time; `b 0` while there are none."""
        old = [e.block for e in self.past(0)][: -self.local]
        if not old or not self.l:
            return torch.empty(len(self.told[self.block]), 0, dtype=torch.long)
        best = alike(self.told[self.block], torch.stack([self.told[i] for i in old], 1), self.l)
        return torch.tensor(old)[best.cpu()].sort(-1).values

    def read(self, layer: int, q: Tensor, where: Where) -> tuple[Tensor, Tensor, Where] | None:
        """What the open chunk reads of the past: put together at its first step, the same in all others."""
        entries = self.past(layer)
        if not entries:
            return None
        if layer not in self.context:
            self.context[layer] = self.gathered(entries)
        k, v, places = self.context[layer]
        self.moved += (k.numel() + v.numel()) * k.element_size()
        return k, v, places

    def gathered(self, entries: list[Entry]) -> tuple[Tensor, Tensor, Where]:
        """The latest chunks, and before them for each sample those that it retrieves."""
        new, old = entries[-self.local :], {e.block: e for e in entries[: -self.local]}
        mine = self.retrieved()
        if not mine.numel():
            return together(new)
        some = [old[block] for block in mine.unique().tolist()]
        k, v, where = together(some)
        mine = mine.repeat(len(k) // len(mine), 1).to(k.device)
        chunk = torch.cat([torch.full((e.k.shape[2],), e.block, device=k.device) for e in some])
        found = mine[:, :, None] == chunk
        coords = where.coords.expand(len(k), -1, -1)
        if self.within is not None:
            began = torch.tensor([self.began[i] for i in range(self.block + 1)], device=k.device)
            nearest = (self.block - self.within + torch.arange(mine.shape[1], device=k.device)).clamp_min(0)
            move = (began[nearest] - began[mine]).clamp_min(0)
            coords = torch.cat([coords[..., :1] + (found * move[:, :, None]).sum(1)[..., None], coords[..., 1:]], -1)
        keep = found.any(1) & (where.block < HIDDEN)
        return together([Entry(0, *compact(k, v, Where(coords, where.block), keep)), *new])

    @property
    def reads(self) -> float:
        """Tokens of the past that a layer reads in the open chunk: mean over layers and samples, without padding."""
        seen = [(places.block < HIDDEN).sum(-1).float().mean() for *_, places in self.context.values()]
        return float(torch.stack(seen).mean()) if seen else 0.0


# --- noise ------------------------------------------------------------------------------------------------------------


def rise(x: Tensor, form: str) -> Tensor:
    """From 0 to 1 as x does, "linear" or by a "cosine"."""
    if form not in ("linear", "cosine"):
        raise ValueError(f"levels rise 'linear' or by a 'cosine', got {form!r}")
    return x if form == "linear" else (1 - torch.cos(math.pi * x)) / 2


def levels(n: int, low: float | int = 0.0, high: float | int = 1.0, form: str = "cosine") -> Float[Tensor, "m"]:
    """Noise levels of chunks c = 0 ... n, from low to high, never falling."""
    if n < 1 or not 0 <= low <= high <= 1:
        raise ValueError(f"levels of n >= 1 chunks rise within [0, 1], got {n=}, {low=}, {high=}")
    return low + rise(torch.arange(n + 1) / n, form) * (high - low)


def rising(t: Float[Tensor, "b n"], noised: Bool[Tensor, "b n"], form: str) -> Float[Tensor, "b n"]:
    """Times of chunks in which the first that is noised keeps its own, and those after it rise from there towards 1."""
    first, n = (~noised).sum(1, keepdim=True), t.shape[1]
    along = (torch.arange(n, device=t.device) - first).clamp_min(0) / (n - first)
    own = t.gather(1, first)
    return torch.where(noised, own + rise(along, form) * (1 - own), t)


def shuffled(eps: Float[Tensor, "b c f h w"], s: int, generator: torch.Generator) -> Float[Tensor, "b c f h w"]:
    """The same noise, its frames permuted within windows of s (the last may be shorter): every frame stays normal."""
    if s < 1:
        raise ValueError(f"a window of noise has at least one frame, got {s}")
    f = eps.shape[2]
    orders = [i + torch.randperm(min(s, f - i), generator=generator, device=generator.device) for i in range(0, f, s)]
    return eps[:, :, torch.cat(orders).to(eps.device)]


def shared(eps: Float[Tensor, "b c f h w"], n: int, s: int, generator: torch.Generator) -> list[Tensor]:
    """Noise of n chunks, each the one before it shuffled: what a rollout takes for `ends`."""
    ends = [eps]
    while len(ends) < n:
        ends.append(shuffled(ends[-1], s, generator))
    return ends


# --- training ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Forcing:
    """What a chunk of training sees and is asked for; as it stands it is the plain loss (teacher forcing).

    slight: the past is noised up to this time
    own:    sampling steps of the model's own chunks that stand in for the true past; 0 keeps it true
    form:   how the levels of noised chunks rise, "linear" or "cosine"; "" leaves each a level of its own
    gamma:  share of the retrieved chunks in the clip that L_BF's velocity points to
    scaled: as published, eps - gamma x_cond; else the safe form, eps - ((1 - gamma) x + gamma x_cond)
    l:      how many chunks are retrieved
    """

    slight: float | int = 0.0
    own: int = 0
    form: str = ""
    gamma: float | int | None = None
    scaled: bool = False
    l: int = 2
    embed: Callable = bag


def goal(x: Tensor, x_cond: Tensor, gamma: float | int, scaled: bool = False) -> Tensor:
    """The clip that L_BF's velocity points to from the noise."""
    return gamma * x_cond if scaled else (1 - gamma) * x + gamma * x_cond


def retrieved_mean(x: Float[Tensor, "b n *rest"], told: Float[Tensor, "b n e"], l: int) -> Float[Tensor, "b n *rest"]:
    """x_cond: for each chunk the mean of the l earlier ones whose captions are most alike; the first has itself."""
    rows, mean = torch.arange(len(x), device=x.device)[:, None], [x[:, 0]]
    for c in range(1, x.shape[1]):
        mean.append(x[rows, alike(told[:, c], told[:, :c], l)].mean(1))
    return torch.stack(mean, 1)


@torch.no_grad()
def own_past(model, path: noise.Path, clean: Float[Tensor, "b c f h w"], cond: Cond, generator, steps: int):
    """The clip as the model itself goes on from its first chunk, in a few steps; the last chunk, nobody's past, stays true."""
    first, *others = clean.split(model.block, 2)
    ends = [fit.normal(*x.shape, generator=generator) for x in others[:-1]]
    plan = Plan(path, noise.table(steps, model.block, shift=3.0))
    return torch.cat([rollout(model, plan, ends, cond, Cache(), first=[first]), *others[-1:]], 2)


def forcing_loss(
    model, path: noise.Path, clean: Float[Tensor, "b c f h w"], cond: Cond, generator, s: Forcing = Forcing()
) -> Float[Tensor, ""]:
    """L_SF without its critic, and with gamma L_SF + L_BF, each counted half: squared error on noised chunks, as `block_loss`."""
    b, _, f = clean.shape[:3]
    if not model.block or f % model.block:
        raise ValueError(f"{f} frames don't divide into chunks of {model.block}")
    n = f // model.block
    t, noised = block_times(b, n, model.block, generator, s.slight)
    if s.form:
        t = rising(t[:, :: model.block], noised, s.form).repeat_interleave(model.block, 1)
    eps = fit.normal(*clean.shape, generator=generator)
    ahead = noised.repeat_interleave(model.block, 1)
    seen = clean
    if s.own:
        seen = torch.where(ahead[:, None, :, None, None], clean, own_past(model, path, clean, cond, generator, s.own))
    target = path.target(clean, eps, t)
    if s.gamma is not None:
        told = torch.stack([s.embed(cond.at(i, 0).text) for i in range(n)], 1)
        chunks = lambda x: x.unflatten(2, (n, -1)).transpose(1, 2)
        x_cond = retrieved_mean(chunks(seen), told, s.l).transpose(1, 2).flatten(2, 3)
        target = (target + path.target(goal(clean, x_cond, s.gamma, s.scaled), eps, t)) / 2
    error = (model(path.at(seen, eps, t), t, cond) - target).square().mean((1, 3, 4)) * ahead
    return (error.sum(1) / ahead.sum(1)).mean()
