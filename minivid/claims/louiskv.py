"""LouisKV on `codes`: 16 frames of 64 codes, a row of 8 a step; and in rollouts of `block`.

Unless told otherwise the prompt is the first 8 frames of held-out films that are cut in the other 8, which the model is given
row by row. 64 tokens are fetched, besides the first 8 and the last 64 or so that were generated. "kl" is KL(full cache || this
cache) in nats a token, mean over all rows after the prompt; "rate" retrievals a row (of a layer); "moved" kilobytes copied or
compared a row. A rival has the same budget, sink and buffer, and looks at every s-th row, or at random as often. tau is the
quantile of the agreement of 8 films of the training split at which one row in s turns: a single number for all layers, as in
the paper, or, since layers turned out to agree with themselves so differently that some would look always and some never, each
its "own".

1. Locality: of the sets of 64 prompt tokens that a row's attention weighs most, how alike (Jaccard) those of rows so many apart
   are, mean over layers, key heads and films; two random sets would have "chance". "spearman" is the rank correlation of that at
   lag 1 with the agreement of the queries, after their rotary turn ("places") or without it; agreement at the first row after a
   cut, of a frame, and at all others.
2. How often to look: "greedy" is the PSNR of clips that go on by the likeliest codes, to those of the full cache.
3. What to fetch, looking at every row. Prompt: 12 frames, and the buffer holds what comes. Output: two frames are the prompt and
   stay, 14 come. Pages are 16 tokens in a row, scored by their mean key or by the bound of Quest; ClusterKV clusters all keys
   anew after every 320. "speed": how much longer Quest's reads take that look at every row, same tokens, one run; each sample of
   the median of 5.
4. Films of `block`: colour error ("body") of the first chunk of a scene that returns, as in the claim of BlockVid, when 128
   tokens are fetched by queries beside the last 64, against a window of as many.
A seed is another set of 8 films (24 in 4).

Outcome: the premise is missing in rows of codes. A row wants what the same row of the frame before wanted (0.60 shared, and
still 0.41 two frames back) more than what the row above wants (0.44), so there is no thought within which neighbours want the
same. A clock is nearer to the full cache than looking when the query turns. Held-out queries turn less often than those that
tau was taken from, so at the rates that are really reached, between the clock's points: by 22 to 125 %. A part of it is the
single limit: the first layer agrees with itself so little, and the middle ones so well, that the first looks nearly always and
those never. With a limit each it is level with the clock to 13 % behind. Cuts don't turn queries more than any frame's first
row does. All of this is hardest for a buffer of just one frame, which the most wanted row has just left: with two frames all
are three times nearer to the full cache, in the same order.

What to fetch: pages beat clusters and segments, as neighbours on the raster are neighbours in the picture; single tokens are
best, and three to five times as much to compare. LouisKV's reads take twice as long as Quest's that fetch as many tokens, and
half as long again as Quest's that read as many (sink and buffer are copied at every step): in memory that is fast, that costs
more than looking less often saves.

In films of `block` turning works: a scene that returns gets its colour back (error 0.08; window 0.43, all of the past 0.04),
where a clock that looks oftener leaves 0.16 and chance 0.28. The layers turn at the first step of a chunk, and a clock that
knows where chunks begin is as good as always, at half of its bytes. What is fetched is a sixteenth of what looking at every
step fetches ("moved" counts all that is read of `full` and `window`, so it can't be compared with theirs).
"""

import time
from functools import lru_cache

import torch
from scipy.stats import spearmanr
from torch import Tensor

from minivid import world
from minivid.claims import blockvid as films
from minivid.core import text, weights
from minivid.core.attention import grouped
from minivid.core.baselines.vq import Codes
from minivid.core.cache import Cache, Quest, Window
from minivid.core.codes import generate, shift
from minivid.core.corpus import bytes_of
from minivid.core.model import Cond
from minivid.core.where import grid
from minivid.lab.claims import Arm, Claims, Compare, Floor
from minivid.sparse_attention.louiskv import LOCAL, LouisKV, Memory, clusters, means
from minivid.training.tokens import codes_of
from minivid.world.scores import psnr

ROW, FRAME, FRAMES = 8, 64, 16
BUDGET, BUFFER, FIRST, PAGE = 64, 64, 8, 16
RATES = (2, 4, 8, 16)

# --- films, and a pass through a cache ----------------------------------------------------------------------------------


@lru_cache(4)
def loaded(name: str):
    return weights.load(name)


@lru_cache(8)
def material(seed: int, n: int, split: str = "held-out") -> tuple[Tensor, Tensor, list]:
    """Codes `b f h w` of films that are cut after the first half, their captions, and the films."""
    found, i = [], 0
    while len(found) < n:
        film = world.draw(8000 + seed, i, "cuts", split)
        found += [film] if any(FRAMES // 2 < cut.start < FRAMES - 1 for cut in film.cuts) else []
        i += 1
    codes = codes_of(loaded("tok-q"), bytes_of(world.batch(found, 32, FRAMES)), 4).long()
    return codes, text.tokens([world.caption(film) for film in found], 48), found


@torch.no_grad()
def forced(cache: Cache, codes: Tensor, said: Tensor, known: int, frames: int) -> Tensor:
    """Log-probabilities `rows b K 8` of every row from frame `known` on, given the true codes before it through the cache."""
    model, out = loaded("codes"), []
    fed = shift(codes, ROW, model.codes).flatten(1)
    for at in range(known * FRAME, frames * FRAME, ROW):
        first = 0 if at == known * FRAME else at
        told = Cond(text=said).at(at // ROW, first / FRAME)
        cache.open(at // ROW, told)
        cache.writing = True
        logits = model(fed[:, first : at + ROW].reshape(len(fed), 1, -1, ROW), None, told, cache)
        cache.close(at // ROW)
        out.append(logits.flatten(2)[..., -ROW:].log_softmax(1))
    return torch.stack(out)


def sizes(fast: bool) -> tuple[int, int, int]:
    """Films, frames of the prompt, frames in all."""
    return (1, 1, 2) if fast else (8, FRAMES // 2, FRAMES)


def share(fast: bool, every: int) -> float:
    """Of the rows after the first, which is always looked at, those that must be so that one in `every` is in all."""
    rows = (sizes(fast)[2] - sizes(fast)[1]) * FRAME // ROW - 1  # the first comes with the prompt, and reads nothing
    return max(0.0, rows / every - 1) / (rows - 1)


@lru_cache(8)
def whole(seed: int, fast: bool, known: int, frames: int) -> Tensor:
    codes, said, _ = material(seed, sizes(fast)[0])
    return forced(Cache(), codes, said, known, frames)


def apart(seed: int, fast: bool, cache: LouisKV, known: int, frames: int) -> dict[str, float]:
    codes, said, _ = material(seed, sizes(fast)[0])
    q, p = forced(cache, codes, said, known, frames), whole(seed, fast, known, frames)
    steps = (frames - known) * FRAME // ROW
    return {"kl": (p.exp() * (p - q)).sum(2).mean().item(), "rate": cache.rate, "moved": cache.moved / len(codes) / steps / 1024}


# --- rivals -------------------------------------------------------------------------------------------------------------


class Rival(LouisKV):
    """Looks by another rule, and groups tokens otherwise. units: of the prompt, of what is generated."""

    def __init__(self, when: str = "turns", every: int = 1, units=("clusters", "segments"), seed: int = 0, share=1.0, **how):
        self.when, self.every, self.units, self.seed, self.share = when, every, units, seed, share
        super().__init__(**how)

    def looks(self, layer: int, turned: Tensor) -> Tensor:
        step = len(self.memory[layer].looked)
        if self.when == "random":
            dice = torch.Generator().manual_seed(997 * self.seed + 13 * step + layer)
            return torch.rand(len(turned), generator=dice) < self.share
        return turned if self.when == "turns" else torch.full_like(turned, step % self.every == 0)

    def grouping(self, k: Tensor) -> Tensor:
        if self.units[0] == "clusters":
            return super().grouping(k)
        return (torch.arange(k.shape[2]) // (1 if self.units[0] == "tokens" else PAGE)).expand(k.shape[:3])

    def later(self, m: Memory, k: Tensor) -> Tensor:
        if self.units[1] == "segments":
            return super().later(m, k)
        size, n = 1 if self.units[1] == "tokens" else PAGE, m.segment.shape[1]
        gone, place = max(0, n - self.local) // size * size, torch.arange(n)
        return torch.where(place < gone, place // size, LOCAL).expand(*k.shape[:2], -1)

    def grown(self, m: Memory, k: Tensor) -> Memory:
        m = super().grown(m, k)
        if self.units[1] != "clusters":
            return m
        pool = (m.unit[0, 0] != LOCAL).nonzero()[:, 0][min(self.sink, m.first) :]  # pages leave all samples' buffers at once
        again = (len(pool) - (m.first - min(self.sink, m.first))) // 320 * 320 + m.first - min(self.sink, m.first)
        if again > m.first:
            m.unit[:, :, pool[:again]] = clusters(k[:, :, pool[:again]], self.size).int()
            m.unit[:, :, pool[again:]] = (torch.arange(len(pool) - again) // PAGE + again // self.size).int()
            m.keys, m.size = means(k, m.unit, int(m.unit.max()) + 1)
        return m

    def wanted(self, m: Memory, q: Tensor, k: Tensor) -> Tensor:
        if "bounds" not in self.units:
            return super().wanted(m, q, k)
        slot = torch.where(m.unit < 0, m.keys.shape[2], m.unit).long()[..., None].expand_as(k)
        blank = k.new_zeros(*m.size.shape[:2], m.keys.shape[2] + 1, k.shape[-1])
        ends = [blank.scatter_reduce(2, slot, k, how, include_self=False) for how in ("amin", "amax")]
        bound = Quest.score(q * q.shape[-1] ** -0.5, torch.stack(ends, 3)[:, :, :-1])
        share = bound.masked_fill(grouped(q, m.size)[:, :, None] == 0, -torch.inf).softmax(-1)
        return share.unflatten(1, (m.size.shape[1], -1)).mean((2, 3))


def rival(fast: bool, **how) -> Rival:
    few = dict(budget=BUDGET // 2, local=BUFFER // 4, longest=16) if fast else dict(budget=BUDGET, local=BUFFER, longest=32)
    return Rival(**(dict(sink=FIRST, size=PAGE) | few | how))


@lru_cache(8)
def turning(fast: bool, every: int, bare: bool, own: bool = False):
    """tau at which one row in `every` turns, on films of the training split; own: for each layer."""
    n, known, frames = sizes(fast)
    codes, said, _ = material(99, n, "train")
    cache = rival(fast, tau=1.01, bare=bare)
    forced(cache, codes, said, known, frames)
    seen = torch.stack([torch.stack(cache.memory[layer].agreed[1:]).flatten() for layer in sorted(cache.memory)])
    taus = seen.quantile(share(fast, every), dim=1) if own else seen.flatten().quantile(share(fast, every))
    return tuple(taus.tolist()) if own else taus.item()


# --- arms ---------------------------------------------------------------------------------------------------------------


class Watching(Cache):
    """The full cache that tells what its layers compare."""

    rotated = True

    def __init__(self, watch):
        self.watch = watch
        super().__init__()

    def read(self, layer, q, where):
        past = super().read(layer, q, where)
        if past is not None:
            self.watch(layer, q, past[0], where)
        return past


def locality(seed, fast):
    n, known, frames = sizes(fast)
    codes, said, some = material(seed, n)
    best, agreed, last = {}, {True: {}, False: {}}, {}
    test = {bare: LouisKV(bare=bare) for bare in (True, False)}
    of_prompt = known * FRAME + ROW

    def watch(layer, q, k, where):
        mass = (q @ grouped(q, k[:, :, :of_prompt]).mT * q.shape[-1] ** -0.5).softmax(-1).mean(2)
        top = mass.unflatten(1, (k.shape[1], -1)).mean(2).topk(BUDGET).indices
        best.setdefault(layer, []).append(torch.zeros(*top.shape[:2], of_prompt).scatter(-1, top, 1.0))
        for bare, cache in test.items():
            now = cache.direction(q, where)
            if (layer, bare) in last:
                agreed[bare].setdefault(layer, []).append(torch.cosine_similarity(now, last[layer, bare], dim=-1).mean(1))
            last[layer, bare] = now

    forced(Watching(watch), codes, said, known, frames)
    sets = torch.stack([torch.stack(best[layer]) for layer in sorted(best)])  # layers, rows, samples, heads, tokens

    def alike(lag):
        both = (sets[:, lag:] * sets[:, :-lag]).sum(-1)
        return both / (2 * BUDGET - both)

    r = {bare: torch.stack([torch.stack(agreed[bare][layer]) for layer in sorted(best)]) for bare in agreed}
    rows = torch.arange(1, sets.shape[1]) + known * ROW + 1  # the row that each agreement is of
    begins = (rows % ROW == 0)[:, None]
    cut = begins & torch.stack([torch.isin(rows // ROW, torch.tensor([c.start for c in film.cuts])) for film in some], 1)
    new = begins & ~cut  # rows and films
    lags = [lag for lag in (1, 2, 4, 8, 16, 32) if lag < sets.shape[1]]
    found = {f"lag {lag}": alike(lag).mean().item() for lag in lags}
    share = BUDGET / of_prompt
    found |= {"chance": share / (2 - share), "nearer": found["lag 1"] - found[f"lag {lags[-1]}"]}
    for bare, name in ((True, "content"), (False, "places")):
        ranks = lambda a, b: float(spearmanr(a.flatten(), b.flatten()).statistic)
        found[f"spearman, {name}"] = ranks(r[bare], alike(1).mean(-1))
        each = [ranks(*one) for one in zip(r[bare], alike(1).mean(-1), strict=True)]
        found[f"spearman in a layer, {name}"] = sum(each) / len(each)
        places = {"a new frame": new, "after a cut": cut, "within": ~new & ~cut}
        found |= {f"{name}, {place}": r[bare][:, rows].mean().item() for place, rows in places.items() if rows.any()}
    return found


def looking(seed, fast, when, every=1, bare=True, own=False):
    n, known, frames = sizes(fast)
    tau = turning(fast, every, bare, own) if when == "turns" else turning(fast, 4, True)  # the latter: where segments end
    make = lambda: rival(fast, when=when, every=every, tau=tau, bare=bare, seed=seed, share=share(fast, every))
    found = apart(seed, fast, make(), known, frames)
    codes, said, _ = material(seed, n)
    drawn = lambda cache: continued(cache, codes, said, known, frames)
    return found | {"greedy": psnr(drawn(make()), drawn(Cache())).clamp(max=60).mean().item()}


def continued(cache, codes, said, known, frames):
    """What comes after the prompt, by the likeliest codes."""
    tok, cond = loaded("tok-q"), Cond(text=said)
    made = generate(loaded("codes"), frames, cond, codes[:, :known], cache, temperature=0)[:, known:]
    return tok.decode(tok.bottleneck.lookup([Codes(made, grid(*made.shape[1:]))]))


def grouped_by(seed, fast, part, units):
    """Always looking; only the prompt, or only what is generated, is fetched from."""
    known, frames = (1, 2) if fast else {"prompt": (12, 16), "output": (2, 16)}[part]
    keep = dict(local=10_000) if part == "prompt" else dict(sink=10_000)
    both = (units, "segments") if part == "prompt" else ("pages", units)
    cache = rival(fast, when="always", units=both, **keep, tau=turning(fast, 4, True))
    return apart(seed, fast, cache, known, frames)


def speed(seed, fast):
    """Seconds in `read` of Quest, which looks at every row, over those of LouisKV, which looks at one in four.

    "ratio": as many tokens fetched, "same": as many read (LouisKV also reads its first tokens and its buffer)
    """
    n, known, frames = sizes(fast)
    codes, said, _ = material(seed, n)

    def seconds(cache):
        spent, read = [], cache.read

        def timed(*args):
            start = time.perf_counter()
            past = read(*args)
            spent.append(time.perf_counter() - start)
            return past

        cache.read = timed
        forced(cache, codes, said, known, frames)
        return sum(spent)

    tau, ratios = turning(fast, 4, True), []
    for _ in range(1 if fast else 5):
        mine, fetched, same = (seconds(cache) for cache in (rival(fast, tau=tau), Quest(BUDGET // PAGE, PAGE), Quest(8, PAGE)))
        ratios.append((fetched / mine, same / mine))
    fetched, same = (sorted(column)[len(ratios) // 2] for column in zip(*ratios, strict=True))
    return {"ratio": fetched, "same": same}


ROLLS = {"full": Cache, "window": lambda: Window(3), "louiskv": lambda: LouisKV(128, 0.7, 0, 64, 64, 64),
         "always": lambda: LouisKV(128, 1.01, 0, 64, 64, 64)}  # fmt: skip


def returning(seed, fast, cache):
    held = []
    films.CACHES["asked"] = lambda: held.append(ROLLS[cache]()) or held[-1]
    found = films.recall(seed, fast, "asked")
    moved = sum(one.moved for one in held) / 1e6 / (1 if fast else 24)
    return {"body": found["body"], "ground": found["ground"], "moved": moved} | (
        {"rate": sum(one.rate for one in held) / len(held)} if isinstance(held[0], LouisKV) else {}
    )


class Clock(LouisKV):
    """In films: looks at every so-manyth read from a phase on, or (0) at the first read of every block; chance: at random."""

    def __init__(self, every: int, phase: int = 0, chance: float = 0.0):
        self.every, self.phase, self.chance, self.seen = every, phase, chance, {}
        super().__init__(128, 0.7, 0, 64, 64, 64)

    def looks(self, layer, turned):
        step = len(self.memory[layer].looked)
        if self.chance:
            return torch.rand(len(turned), generator=torch.Generator().manual_seed(13 * step + layer + self.phase)) < self.chance
        if self.every:
            return torch.full_like(turned, (step + self.phase) % self.every == 0)
        before, self.seen[layer] = self.seen.get(layer), self.block
        return torch.full_like(turned, before != self.block)


def clocked(seed, fast, every, chance=0.0):
    """`returning` with a clock; over three phases where it has one."""
    found = []
    for phase in (0, 4, 8) if every or chance else (0,):
        held = []
        films.CACHES["asked"] = lambda phase=phase, held=held: held.append(Clock(every, phase, chance)) or held[-1]
        one = films.recall(seed, fast, "asked")
        found.append({"body": one["body"], "moved": sum(x.moved for x in held) / 1e6 / (1 if fast else 24),
                      "rate": sum(x.rate for x in held) / len(held)})  # fmt: skip
    return {name: sum(one[name] for one in found) / len(found) for name in found[0]}


def buffered(seed, fast, when, every, own=False):
    """`looking` with a buffer of two frames."""
    _, known, frames = sizes(fast)
    tau = turning(fast, every, True, own)
    return apart(seed, fast, rival(fast, when=when, every=every, tau=tau, seed=seed, local=2 * BUFFER), known, frames)


# --- what is decided before the run -------------------------------------------------------------------------------------

FILES = [f"minivid/{name}" for name in ("sparse_attention/louiskv.py", "weights/codes.safetensors", "weights/tok-q.safetensors")]
BLOCK = ["minivid/sparse_attention/louiskv.py", "minivid/weights/block.safetensors", "minivid/weights/tok-f.safetensors"]
PROMPT, OUTPUT = ("clusters", "pages", "bounds", "tokens"), ("segments", "pages", "bounds", "clusters", "tokens")
ARMS = {
    "locality": Arm(locality, FILES),
    "always": Arm(looking, FILES, when="always"),
    **{f"{when}, {every}": Arm(looking, FILES, when=when, every=every)
       for when in ("turns", "stride", "random") for every in RATES},
    **{f"turns with places, {every}": Arm(looking, FILES, when="turns", every=every, bare=False) for every in RATES},
    **{f"turns, own tau, {every}": Arm(looking, FILES, when="turns", every=every, own=True) for every in RATES},
    **{f"turns with places, own tau, {every}": Arm(looking, FILES, when="turns", every=every, bare=False, own=True)
       for every in RATES},
    **{f"prompt: {units}": Arm(grouped_by, FILES, part="prompt", units=units) for units in PROMPT},
    **{f"output: {units}": Arm(grouped_by, FILES, part="output", units=units) for units in OUTPUT},
    "speed": Arm(speed, FILES),
    **{f"returns: {cache}": Arm(returning, BLOCK, cache=cache) for cache in ROLLS},
    # added after the first run, so they don't count
    "returns: clock": Arm(clocked, BLOCK, every=11), "returns: random": Arm(clocked, BLOCK, every=0, chance=0.09),
    "returns: at every block": Arm(clocked, BLOCK, every=0),
    "turns, own tau, 4, two frames": Arm(buffered, FILES, when="turns", every=4, own=True),
    "stride, 4, two frames": Arm(buffered, FILES, when="stride", every=4),
    "always, two frames": Arm(buffered, FILES, when="always", every=1),
}


def nearer(method: str, baseline: str, counts: bool = True, margin: float = 0.0) -> Compare:
    return Compare(f"{method} nearer than {baseline}", "kl", method, baseline, margin, False, True, counts)


CLAIMS = Claims(
    "louiskv",
    arms=ARMS,
    tests=[
        # 1: neighbours want the same
        Floor("neighbouring rows want the same tokens", "lag 1", "locality", at_least=0.6),
        Floor("rows further apart want others", "nearer", "locality", at_least=0.0),
        Floor("agreement of queries tells", "spearman, content", "locality", at_least=0.5),
        Floor("agreement of turned queries tells", "spearman, places", "locality", at_least=0.5, counts=False),
        # 2: when to look
        *(nearer(f"turns, {every}", f"{rival}, {every}") for rival in ("stride", "random") for every in RATES),
        *(nearer(f"{how}, {every}", f"stride, {every}", False)
          for how in ("turns with places", "turns, own tau", "turns with places, own tau") for every in RATES),
        *(nearer(f"turns, {every}", "always", False, -0.1) for every in RATES),
        # 3: what to fetch
        nearer("turns, own tau, 4, two frames", "stride, 4, two frames", False),
        nearer("prompt: clusters", "prompt: pages"), nearer("prompt: clusters", "prompt: bounds"),
        nearer("output: segments", "output: pages"), nearer("output: segments", "output: bounds"),
        nearer("output: segments", "output: clusters"),
        nearer("prompt: tokens", "prompt: clusters", False), nearer("output: tokens", "output: segments", False),
        Floor("reading is faster than Quest's at every row", "ratio", "speed", at_least=2.0),
        # 4: in films
        Compare("a returning body has its colour", "body", "returns: louiskv", "returns: window", 0.3, False, True),
        Compare("turning against a clock", "body", "returns: louiskv", "returns: clock", 0.0, False, True, counts=False),
        Compare("turning against chance", "body", "returns: louiskv", "returns: random", 0.0, False, True, counts=False),
        Compare("as if all were read", "body", "returns: louiskv", "returns: full", -0.2, False, True, counts=False),
    ],
    minutes=15,
    tolerance={"ratio": float("inf"), "same": float("inf")},
)  # fmt: skip
