"""Chapter 05 on one film: fixed patterns, retrieval and few bits, each alone, by twos and all at once, in rollouts of `block`.

Films A B A C A B ... of 24 chunks: every scene is true once, then the model goes on, 8 steps a chunk, guidance 2, all of the past
in its cache. Patterns: as in Sparse-vDiT each head computes all pairs, none, those of its own and the last chunk, or those of its
own row in all frames; searched once on four films of the training split so that half of the pairs are left (stripes are missing:
which frames matter changes from film to film). Retrieval: LouisKV with 128 tokens and the last 64, looking when the query turns.
Bits: VidKV's cache with centred 1.5-bit keys, kept before their rotary turn, and 2-bit values in groups of 256.

"body": colour error of the body, mean over made chunks; "sharp": gradient energy over the true film's, the last four chunks;
"psnr": in dB to the rollout with nothing left out, same noise, first four made chunks. "pairs": share of all pairs that is
computed (by masks, so nothing is timed here); "moved": kilobytes of keys and values that a call to the model brings in, each as
it is stored; "held": kilobytes stored in the end. Heads that stay near look at no memory, so nothing is moved for them.
A seed is another set of films and noises.

Outcome: the savings multiply, since each is of another kind. All three compute 11 % of the pairs, bring in a thousandth of the
bytes and hold 15 %, a quarter of that LouisKV's index of mean keys, which stays in fp16. Of the losses one is small and one is
not. Few bits hold an eighth and cost 0.007 of colour error (0.162 for 0.155). Patterns cost 0.046, but from one set of films to
another between 0.01 and 0.08, and with few bits beside them 0.016: three sets can't tell these apart. Retrieval costs 0.071 in
every set and a quarter of the sharpness (0.54 for 0.74), and what stands beside it then hardly matters: all three cost 0.103,
where their parts sum to 0.123. 128 of the 1,000 tokens that lie behind on average
keep most of a scene's colour, not its edges, and what is blurred becomes the past of the next chunk.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from minivid import world
from minivid.claims.blockvid import CHUNK, FILES, films, loaded, series, told
from minivid.claims.vidkv import OURS, built
from minivid.core import sample
from minivid.core.attention import dense, grouped, rotary_pairs, rotate
from minivid.core.cache import Cache, Entry
from minivid.core.where import Where, visible
from minivid.lab.claims import Arm, Claims, Compare, Floor
from minivid.sparse_attention import sparse_vdit as patterns
from minivid.sparse_attention.louiskv import LouisKV
from minivid.sparse_attention.sparse_vdit import FULL, SKIP, Mode, Table
from minivid.sparse_attention.vidkv import VidKV
from minivid.world.scores import psnr

FILMS, CHUNKS, STEPS, GUIDANCE = 4, 24, 8, 2.0
MODES = (FULL, SKIP, Mode("diagonal", 1), Mode("multi-diagonal", 0))
NEAR = ("skip", "diagonal")  # heads that need no memory


# --- patterns over a past ------------------------------------------------------------------------------------------------


def reaches(mode: Mode, q: Tensor, k: Tensor) -> Tensor:
    """Which keys at `k` (... m 3) a head of this mode reads from `q` (n 3): `... n m`. Blocks are chunks, and rows of a frame."""
    gap = lambda axis, size: (q[:, None, axis] // size - k[..., None, :, axis] // size).abs()
    window = {"diagonal": (0, CHUNK), "multi-diagonal": (1, 1)}
    if mode.kind in window:
        return gap(*window[mode.kind]) <= mode.width
    return torch.full((*k.shape[:-2], len(q), k.shape[-2]), mode.kind == "full")


class Fixed:
    """The attention of one layer over its own tokens and whatever a cache gives: a mode a head. Counts pairs."""

    def __init__(self, modes):
        self.modes, self.pairs, self.all = tuple(modes), 0, 0

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, where: Where) -> Tensor:
        keys = where.keys or where
        coords = keys.coords if keys.coords.ndim == 4 else keys.coords[:, None]  # b k m 3, of one head or all
        coords = coords.expand(-1, q.shape[1], -1, -1)
        mask = torch.stack([reaches(mode, where.coords[0], coords[:, i]) for i, mode in enumerate(self.modes)], 1)
        seen = visible(where)
        mask = mask if seen is None else mask & (seen if seen.ndim == 4 else seen[:, None])
        mask = mask.expand(len(q), -1, -1, -1)
        self.pairs += int(mask.sum())
        self.all += mask[..., 0].numel() * int((where.coords[0, -1, 0] + 1) * q.shape[2] / CHUNK)  # tokens of the film so far
        o = F.scaled_dot_product_attention(q, grouped(q, k), grouped(q, v), attn_mask=mask | ~mask.any(-1, keepdim=True))
        return o * mask.any(-1, keepdim=True)


def patterned(table: Table):
    """`block` with these modes, and its layers' plugs."""
    plugs = [Fixed(row) for row in table]
    named = {f"{name}.attend": plug for (name, _), plug in zip(patterns.layers(loaded("block")), plugs, strict=True)}
    return patterns.swap(loaded("block"), named), plugs


@lru_cache(2)
@torch.no_grad()
def searched(fast: bool) -> Table:
    """The table of half of the pairs."""
    found: dict[int, list[Tensor]] = {}
    cost: list[list[float]] = []

    def look(i, q, k, v, where):
        full = dense(q, k, v, where)
        made, plugs = zip(*((plug(q, k, v, where), plug) for plug in (Fixed([m] * q.shape[1]) for m in MODES)), strict=True)
        gap = torch.stack([(o - full).square().mean((0, 2, 3)) for o in made], -1)
        found.setdefault(i, []).append(gap / full.square().mean())
        cost.append([plug.pairs / plug.all for plug in plugs])

    model = patterns.watched(loaded("block"), look)
    some = [world.draw(99, i, "recurrent") for i in range(1 if fast else 4)]
    for film in some:
        rolled(film, model, Cache(), 99, 3 if fast else 12, 1 if fast else 4)
    error = torch.stack([torch.stack(found[i]).mean(0) for i in sorted(found)])
    price = torch.tensor(cost).mean(0)
    choice = patterns.search(error, price, epsilon=patterns.tolerance(error, price, 0.5))
    return [[MODES[i] for i in row] for row in choice.tolist()]


# --- what is kept, and what of it is brought in --------------------------------------------------------------------------


class Kept(Cache):
    """All of the past, as `store` keeps it (as it is, without one). Counts what heads that look back bring in."""

    rotated = True
    store: VidKV | None = None
    table: Table = [[FULL] * 4] * 6

    def open(self, block, cond):
        super().open(block, cond)
        if self.store:
            self.store.open(block, cond)

    def add(self, layer, q, k, v, where):
        super().add(layer, q, k, v, where)
        if self.store:  # whose keys aren't turned yet
            self.store.add(layer, q, rotate(k, -where.coords, *rotary_pairs(k.shape[-1])), v, where)

    def close(self, block):
        if self.store:  # from now on the model sees what was stored
            self.store.close(block)
            self.store.open(block + 1, self.cond)
            for layer, entries in self.kept.items():
                k, v, where = self.store.read(layer, entries[0].k, entries[0].where)
                entries[:] = [Entry(block, rotate(k, where.coords, *rotary_pairs(k.shape[-1])), v, where)]
        super().close(block)

    def heads(self, layer: int) -> list[int]:
        """Those that look into memory."""
        return [i for i, mode in enumerate(self.table[layer]) if mode.kind not in NEAR]

    @property
    def held(self) -> float:
        """Bytes stored; in fp16 what isn't packed."""
        return self.store.nbytes if self.store else sum(2 * (e.k.numel() + e.v.numel()) for e in sum(self.kept.values(), []))

    def brought(self, layer: int, tokens: float) -> None:
        """So many tokens of a head came in, each in as many bytes as it has in store."""
        self.moved += tokens * self.held / sum(e.k.shape[0] * e.k.shape[1] * e.k.shape[2] for e in sum(self.kept.values(), []))


class Whole(Kept):
    """Brings in all of the past at every call."""

    def read(self, layer, q, where):
        moved, past = self.moved, super().read(layer, q, where)
        if past is not None:
            self.moved = moved
            self.brought(layer, len(q) * len(self.heads(layer)) * past[0].shape[2])
        return past


class Sought(Kept, LouisKV):
    """Brings in what is retrieved, when it is, and the mean keys to choose by."""

    def __init__(self):
        LouisKV.__init__(self, 128, 0.7, 0, 64, 64, 64)

    def fetch(self, m, q, past, look):
        moved, layer = self.moved, next(i for i, other in self.memory.items() if other is m)
        super().fetch(m, q, past, look)
        self.moved = moved + m.keys[look][:, self.heads(layer)].nbytes / 2
        self.brought(layer, int((m.index[look][:, self.heads(layer)] >= 0).sum()))

    @property
    def held(self):
        return super().held + sum(m.keys.nbytes / 2 + m.unit.nbytes for m in self.memory.values())


# --- films --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def rolled(film, model, cache, seed, chunks, steps):
    """A film of which every scene is given once, as clip `1 3 f h w`, and how many chunks were given."""
    known = min(film.period // CHUNK, chunks - 2)
    first = loaded("tok-f").encode(world.batch([film], 32, CHUNK * known))
    made = sample.film(told([film], chunks), first, cache, seed, steps, GUIDANCE, model=model)
    return torch.cat([loaded("tok-f").decode(part) for part in made.split(64, 2)], 2), known


def sizes(fast):
    """Films, chunks, steps."""
    return (1, 4, 1) if fast else (FILMS, CHUNKS, STEPS)


@lru_cache(1)
def everything(seed, fast):
    """The films with nothing left out."""
    n, chunks, steps = sizes(fast)
    return [rolled(film, loaded("block"), Cache(), seed, chunks, steps) for film in films("any", n, seed)]


@torch.no_grad()
def roll(seed, fast, pattern=False, seek=False, few=False):
    n, chunks, steps = sizes(fast)
    rows, near, total = [], [], {"moved": 0.0, "held": 0.0, "pairs": 0, "all": 0}
    for film, (best, known) in zip(films("any", n, seed), everything(seed, fast), strict=True):
        table = searched(fast) if pattern else [[FULL] * 4] * 6
        model, plugs = patterned(table)
        cache = Sought() if seek else Whole()
        cache.table, cache.store = table, VidKV(built(**OURS)) if few else None
        clip, _ = rolled(film, model, cache, seed, chunks, steps)
        body, _, sharp, _ = series(clip, world.batch([film], 32, CHUNK * chunks))
        first = slice(CHUNK * known, CHUNK * (known + 4))
        rows.append((body[known:].mean(), sharp[-4:].mean()))
        near.append(psnr(clip[:, :, first], best[:, :, first]).clamp(max=60).mean())
        calls = (chunks - known) * (steps + 1) + known
        total["moved"] += cache.moved / calls / n / 1024
        total["held"] += cache.held / n / 1024
        total["pairs"] += sum(plug.pairs for plug in plugs)
        total["all"] += sum(plug.all for plug in plugs)
    body, sharp = (sum(column) / n for column in zip(*rows, strict=True))
    return {"body": float(body), "sharp": float(sharp), "psnr": float(sum(near) / n), "moved": total["moved"],
            "held": total["held"], "pairs": total["pairs"] / total["all"]}  # fmt: skip


# --- what is decided before the run -------------------------------------------------------------------------------------

SOURCES = ["vidkv", "louiskv", "sparse_vdit"]
USES = [*FILES, *(f"minivid/sparse_attention/{name}.py" for name in SOURCES)]
WAYS = {
    "all of it": {}, "patterns": dict(pattern=True), "retrieval": dict(seek=True), "few bits": dict(few=True),
    "patterns + retrieval": dict(pattern=True, seek=True), "patterns + few bits": dict(pattern=True, few=True),
    "retrieval + few bits": dict(seek=True, few=True), "all three": dict(pattern=True, seek=True, few=True),
}  # fmt: skip
REST = [name for name in WAYS if name != "all of it"]


def colours(method, baseline, margin, counts=True):
    return Compare(f"colours: {method} against {baseline}", "body", method, baseline, -margin, False, counts=counts)


CLAIMS = Claims(
    "one_film",
    arms={name: Arm(roll, USES, **way) for name, way in WAYS.items()},
    tests=[
        *(colours(name, "all of it", 0.03) for name in ("patterns", "retrieval", "few bits")),
        *(colours(name, "all of it", 0.06) for name in REST[3:]),
        Floor("patterns leave half of the pairs", "pairs", "patterns", at_most=0.6),
        Floor("together they leave less", "pairs", "all three", at_most=0.3),
        Compare("few bits hold an eighth", "held", "few bits", "all of it", 0.83, False, True),
        Compare("retrieval moves a tenth", "moved", "retrieval", "all of it", 0.9, False, True),
        Compare("all three move a hundredth", "moved", "all three", "all of it", 0.99, False, True),
        Floor("all three don't blur", "sharp", "all three", at_least=0.7),
    ],
    sources=["minivid/claims/vidkv.py", *USES[len(FILES) :]],
    seeds=(1, 2, 3),
    minutes=10,
)
