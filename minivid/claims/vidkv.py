"""VidKV on `qa`, which answers questions about 1,024 visual tokens, and in rollouts of `block`.

"1.5/1.58" is bits of a key code / of a value code. "bits" are all bits that a cache holds for a key or value, codes, steps,
offsets and lists together, measured on the packed bytes; so "1.5/1.58" in groups of 32 is 2.2. KIVI-style is 2 bits for keys a
channel and for values a token, uniform is 2 bits a token for both. In groups of 32 these hold 3 bits, so at equal bits they get
groups of 128 (of 96 where a token has no more channels), which is 2.25 to 2.33, a little in their favour.

1. Keys, with values kept in 8 bits: shares k of the channels in 2 bits, chosen by range, variance, number of outliers or at
   random, the others in one bit after the Fourier transform. "error" is |o - o'|^2 / |o|^2 of what attention takes from the
   cache, with the true queries, mean over layers and calls; "right" the share of right answers. Synthetic, as no giant channels
   arose: two pairs of channels in every head times 8 in the keys ("planted"), or that with the queries divided by 8, where the
   model says the same ("hidden"); then k = 1/8 is room for just these four channels.
2. One bit for the normal channels (k = 0.5) or for all: min-max, signs, signs after Fourier or Hadamard, centred signs, which
   cost half a bit more, and nothing more in groups of 64.
3. Values with keys kept in 8 bits: 2 bits and ternary, a channel or a token. Protected tokens, a fifth: those relevant to the
   question, as many at random, or those that the question's attention will look at most (the oracle).
4. Rollouts: six films of one scene without end, one chunk true, 19 made, 8 steps, guidance 2. "judge": mean share of right
   colour, shape, size and count over four windows of 16 made frames. "smaller": bytes of the same cache in fp16 over those held
   when the film is over. "psnr": to the rollout with the cache in fp16, same noise, over the first four made chunks. Beside the
   paper's caches one of ours, found on the films of seeds 0 and 99: keys before
   the rotary turn, centred signs, values in 2 bits, groups of 256.
   "Latest chunk in fp16" packs only what is older, as KIVI does. Another noise says how far apart two films in fp16 are.
   VDE-Subject takes 1 - colour error of the body over ten parts of a film, VDE-Clarity its gradient energy.
A seed is another set of clips, questions, films and noises.

Outcome: what the paper sees in keys and values is here; its one bit and its ternary codes are another matter. A scale a channel
beats a scale a token by 34 to 84 %. Half of the channels by range err 58 % less in `block` than half at random; in `qa`, where
no channel is a giant, 14 to 48 %, and four planted giants are always found. A fifth of the tokens, chosen by the question's
words, halves the error of ternary values and brings 85 right answers of 100 back to 98 (the attention itself would choose twice
as well). But signs after a Fourier transform are no better than signs: 1.5 % in both models, since channels of small range have
no heavy tails; 14 % if all channels get one bit. The paper's 1.5/1.58 answers 85 %, whereas plain 2 bits in groups of 128,
which store as much, answer all. That is the ternary values' doing, with keys in 8 bits it is the same 85 %: the mean of all
sizes is too small a scale, the best one halves the error and answers 89 %. Rollouts read again what they wrote, and there it is
fatal: after 19 chunks a third of the edges is left, and few shapes with them (4 % right, for 71 in fp16). The judge's scores
fall by 38 %; by 24 with KIVI's codes. Not so where keys are packed before their rotary turn: 2 bits are level with fp16 (1 %
lower), and with centred signs for half of the channels, 8.5 times smaller, all counted, the scores are 4 % lower, 9 to nothing
from seed to seed, where another noise alone moves them by as much.
"""

import copy
from dataclasses import replace
from functools import lru_cache

import torch

from minivid import world
from minivid.claims.blockvid import CHUNK, drift, endless, films, series, told
from minivid.core import sample, text, weights
from minivid.core.attention import Attention, dense, rotary_pairs, rotate, scores
from minivid.core.cache import Cache
from minivid.core.model import Cond
from minivid.core.rollout import remember
from minivid.core.where import Where
from minivid.lab.claims import Arm, Claims, Compare, Floor
from minivid.sparse_attention import vidkv as paper
from minivid.sparse_attention.vidkv import Scheme, Setting, VidKV
from minivid.world import questions
from minivid.world.judge import judge
from minivid.world.scores import psnr

QA = ["minivid/weights/qa.safetensors"]
BLOCK = ["minivid/weights/block.safetensors", "minivid/weights/tok-f.safetensors"]
RECIPES, CLIPS, EACH = ("base", "two", "many"), 60, 4  # clips a seed, questions a clip
FILMS, CHUNKS, STEPS, GUIDANCE = 6, 20, 8, 2.0
PLANTED = (3, 9)  # pairs of channels: the rotary turn mixes channel i with i + 16


@lru_cache(4)
def loaded(name):
    return weights.load(name)


def built(one="fft", bits=2, value="2", size=32, by="channel", keys="channel", **more):
    """A setting from plain values. size: of all groups; or of those of a channel and of those of a token."""
    size, wide = (size, size) if isinstance(size, int) else size
    one_bit = {"minmax": Scheme(bits=1), "sign": Scheme("sign"), "fft": Scheme("sign", mix="fft"),
               "hadamard": Scheme("sign", mix="hadamard"), "centred": Scheme("sign", centred=True)}  # fmt: skip
    kinds = {"8": Scheme(bits=8), "2": Scheme(), "1.58": Scheme("ternary"), "1.58, gamma 0.5": Scheme("ternary", gamma=0.5),
             "1.58, fitted": Scheme("ternary", fitted=True)}  # fmt: skip
    of = lambda scheme, by: replace(scheme, by=by, size=wide if by == "token" else size)
    key, other = dict(hot=of(Scheme(bits=bits), keys), cold=of(one_bit[one], "channel")), of(kinds[value], by)
    return Setting(**{"k": 1.0} | key | more, safe=of(Scheme(), by), rest=other)


class Beside(Cache):
    """Keeps everything, shows all of it to another cache too, and measures how far off the attention is that that one gives."""

    def __init__(self, other):
        self.other, self.rotated, self.errors = other, other.rotated, []
        super().__init__()

    def open(self, block, cond):
        super().open(block, cond), self.other.open(block, cond)

    def close(self, block):
        super().close(block), self.other.close(block)

    def add(self, layer, q, k, v, where):
        super().add(layer, q, k, v, where), self.other.add(layer, q, k, v, where)

    def read(self, layer, q, where):
        past = super().read(layer, q, where)
        if past is not None:
            true = self.attended(q, where, past)
            gap = self.attended(q, where, self.other.read(layer, q, where)) - true
            self.errors.append(float(gap.square().sum() / true.square().sum()))
        return past

    def attended(self, q, where, past):
        k, v, places = past
        if not self.rotated:
            pairs = rotary_pairs(q.shape[-1])
            q, k = rotate(q, where.coords, *pairs), rotate(k, places.coords, *pairs)
        return dense(q, k, v, Where(where.coords, where.block, places))

    @property
    def error(self):
        return sum(self.errors) / len(self.errors)


def true_bits(cache, b, d, layers):
    """Bits that are held for a key or value of d channels."""
    return 8 * cache.nbytes / (2 * layers * b * cache.tokens * d)


# --- questions ----------------------------------------------------------------------------------------------------------


def planted(kind):
    """`qa` with channels of its keys times 8, the same in all layers and heads; "hidden": its queries by 8."""
    model = copy.deepcopy(loaded("qa"))
    for layer in (part for part in model.modules() if isinstance(part, Attention)):
        rows = [h * layer.width + i + half for h in range(layer.heads) for i in PLANTED for half in (0, layer.width // 2)]
        for part, factor in ((layer.k, 8.0), (layer.q, 1 / 8 if kind == "hidden" else 1.0)):
            part.weight[rows] *= factor
            part.bias[rows] *= factor
    return model


@lru_cache(2)
@torch.no_grad()
def watched(seed, fast, kind, rotated):
    """The model, and batches of clips, questions with answers `b each 9`, and what its layers keep of the clips."""
    model, batches = planted(kind) if kind else loaded("qa"), []
    for recipe in RECIPES[-1:] if fast else RECIPES:
        some = [world.draw(8000 + seed, i, recipe, "held-out") for i in range(1 if fast else CLIPS // len(RECIPES))]
        pairs = [[questions.ask(scene, j) for j in range(1 if fast else EACH)] for scene in some]
        said = [torch.cat([text.tokens([q for q, _ in row], 8), text.tokens([a for _, a in row], 1)], 1) for row in pairs]
        clip, cache = world.batch(some, 32, 16), Cache()
        cache.rotated = rotated
        model.watch(clip, cache)
        batches.append((clip, torch.stack(said), cache.kept))
    return model, batches


class Looking(Cache):
    """Keeps everything, and adds up the attention that each old token receives from the words of the question."""

    rotated = True

    def through(self, layer, q, k, v, where):
        k, v, places = super().through(layer, q, k, v, where)
        n, asks = k.shape[2] - q.shape[2], (where.block == 1).float()
        self.mass = getattr(self, "mass", 0) + torch.einsum("bknm,bn->bm", scores(q, k, where.seen_from(places)), asks)[:, :n]
        return k, v, places


def filled(cache, kept):
    """The cache after it was shown a clip that was watched with everything at hand, as in the paper."""
    cache.open(0, Cond())
    for layer, (entry,) in kept.items():
        cache.add(layer, entry.k[:, :, :0], entry.k, entry.v, entry.where)
    cache.close(0)
    return cache


def relevances(how, model, clip, asked, kept, seed):
    """How relevant each visual token is to the question."""
    if how == "random":
        return torch.rand(len(clip), 1024, generator=torch.Generator().manual_seed(seed))
    if how == "oracle":
        looking = filled(Looking(), kept)
        model.answer(asked, looking)
        return looking.mass
    return paper.relevance(model.see(clip)[0], model.word(asked), asked > 0)


@torch.no_grad()
def answer(seed, fast, kind="", protect="", fp16=False, **cache):
    """Share of right answers and error of the attention with a cache; with "protect", one cache a question."""
    setting = Setting(residual=10**6) if fp16 else built(**cache)
    model, batches = watched(seed, fast, kind, setting.rotated)
    right, errors, bits = [], [], []
    for clip, said, kept in batches:
        held = None if protect else filled(VidKV(setting, seed=seed), kept)
        for j, words in enumerate(said.unbind(1)):
            asked = words[:, :8]
            if protect:
                held = filled(VidKV(setting, relevances(protect, model, clip, asked, kept, 100 * seed + j), seed), kept)
            beside = Beside(held)
            beside.kept = dict(kept)
            model.answer(asked, beside)
            errors.append(beside.error)
            right.append(model.answer(asked, held).argmax(-1) == words[:, 8])
        bits.append(true_bits(held, len(clip), 96, 3))
    return {"right": torch.cat(right).float().mean().item(), "error": sum(errors) / len(errors), "bits": sum(bits) / len(bits)}


# --- rollouts -----------------------------------------------------------------------------------------------------------


@lru_cache(2)
@torch.no_grad()
def given(seed, n, chunks):
    """n films of one scene without end, and latents of their first chunks."""
    some = [endless(film) for film in films("any", n, seed)]
    return some, loaded("tok-f").encode(world.batch(some, 32, CHUNK * chunks))


@torch.no_grad()
def shown(seed, fast, **cache):
    """Error of the attention in `block`, when true chunks are shown to it: it looks back once from the middle of its noise."""
    n, chunks = (1, 2) if fast else (FILMS, 8)
    some, x = given(seed, n, chunks)
    model, beside = loaded("block"), Beside(VidKV(built(**cache), seed=seed))
    words = torch.stack([text.tokens(row) for row in told(some, chunks)])
    for i, chunk in enumerate(x.split(CHUNK, 2)):
        cond = Cond(text=words[:, i], start=float(CHUNK * i))
        beside.open(i, cond)
        model((chunk + sample.start(n, chunk.shape[1:], seed)) / 2, torch.full((n, CHUNK), 0.5), cond, beside)
        seen, beside.errors = beside.errors, []
        remember(model, chunk, 0.0, cond, beside)
        beside.errors = seen
        beside.close(i)
    return {"error": beside.error, "bits": true_bits(beside.other, n, 128, 6)}


class Quick(VidKV):
    """Unpacks once a block, not at every step: the same numbers, sooner."""

    def open(self, block, cond):
        super().open(block, cond)
        self.unpacked = {}

    def read(self, layer, q, where):
        if layer not in self.unpacked:
            self.unpacked[layer] = super().read(layer, q, where)
        return self.unpacked[layer]


class Unpacked(Quick):
    """Everything in fp16."""

    def __init__(self):
        super().__init__(Setting(residual=10**6, rotated=False))


def rolled(seed, fast, cache, noise):
    """Clips of films of which one chunk was given, and the scenes that they should show."""
    n, chunks = (1, 3) if fast else (FILMS, CHUNKS)
    some, first = given(seed, n, 1)
    made = sample.film(told(some, chunks), first, cache, noise, 1 if fast else STEPS, GUIDANCE, model=loaded("block"))
    return torch.cat([loaded("tok-f").decode(part) for part in made.split(64, 2)], 2), some


@lru_cache(1)
def reference(seed, fast):
    """The rollout with the cache in fp16."""
    return rolled(seed, fast, Unpacked(), seed)[0]


@torch.no_grad()
def roll(seed, fast, fp16=False, other=0, **cache):
    held = Unpacked() if fp16 else Quick(built(**cache), seed=seed)
    clips, some = rolled(seed, fast, held, seed + other)
    shots, made = [film.cuts[0].shot for film in some], clips[:, :, CHUNK:] if fast else clips[:, :, 16:]
    found = [judge(part, shots) for part in made.split(16, 2)]
    rates = {name: sum(one[name] for one in found) / len(found) for name in ("colour", "shape", "size", "count")}
    bits, early = true_bits(held, 2 * len(some), 128, 6), slice(CHUNK, 5 * CHUNK)  # guidance asks for every sample twice
    return {
        **rates, "judge": sum(rates.values()) / 4, "bits": bits, "smaller": 16 / bits,
        "psnr": psnr(clips[:, :, early], reference(seed, fast)[:, :, early]).mean().item(),
        **drift(series(clips, world.batch(some, 32, clips.shape[2]))),
    }  # fmt: skip


# --- what is decided before the run -------------------------------------------------------------------------------------

KEYS = dict(value="8")  # how keys are kept is what differs
VALUES = dict(k=1.0, bits=8)  # and values
PAPER, BEFORE = dict(k=0.5, value="1.58"), dict(rotated=False)
OURS = dict(k=0.5, one="centred", value="2", size=256, **BEFORE)
SHARES, SELECTORS = (0.25, 0.5, 0.75), ("range", "variance", "outliers", "random")
ONES = ("minmax", "sign", "fft", "hadamard", "centred")
TABLE = {
    "2/2": {}, "KIVI 2/2": dict(by="token"), "uniform 2/2": dict(by="token", keys="token"),
    "1.5/2": dict(k=0.5), "1.5/2, no FFT": dict(k=0.5, one="sign"), "1.5/2, centred": dict(k=0.5, one="centred"),
    "1.5/1.58": PAPER, "1.25/1.58": dict(k=0.25, one="sign", value="1.58"), "1.5/1.58, before": PAPER | BEFORE,
    "KIVI 2/2, equal bits": dict(by="token", size=(128, 96)), "2/2, equal bits": dict(size=128), "ours": OURS,
    "uniform 2/2, equal bits": dict(by="token", keys="token", size=(32, 96)),
}  # fmt: skip
KIVI = dict(by="token", size=128)
ROLLS = {
    "fp16": dict(fp16=True), "another noise": dict(fp16=True, other=50), "1.5/1.58": PAPER,
    "1.5/1.58, groups of 64": PAPER | dict(size=64), "1.5/1.58, before": PAPER | dict(size=64) | BEFORE, "KIVI 2/2": KIVI,
    "1.5/1.58, latest chunk in fp16": PAPER | dict(size=64, recent=64),
    "KIVI 2/2, before": KIVI | BEFORE, "uniform 2/2": KIVI | dict(keys="token"), "2/2, before": dict(size=128) | BEFORE,
    "ours": OURS,
}  # fmt: skip
CHOICES = {
    "keys: all 1 bit": dict(k=0.0), "keys: all 2 bit": dict(k=1.0), "keys: 0.25 by range, no FFT": dict(k=0.25, one="sign"),
    **{f"keys: {k} by {how}": dict(k=k, select=how) for k in SHARES for how in SELECTORS},
    **{f"one bit: {one}": dict(k=0.5, one=one) for one in ONES},
    "one bit: centred, groups of 64": dict(k=0.5, one="centred", size=64),
    **{f"one bit for all: {one}": dict(k=0.0, one=one) for one in ONES},
}  # fmt: skip
OF_VALUES = {
    **{f"values: {bits} a {by}": dict(value=bits, by=by) for bits in ("2", "1.58") for by in ("channel", "token")},
    **{f"values: {kind}": dict(value=kind) for kind in ("1.58, fitted", "1.58, gamma 0.5")},
}
WAYS = {name: KEYS | choice for name, choice in CHOICES.items()} | {name: VALUES | choice for name, choice in OF_VALUES.items()}
SHOWN = [name for name in WAYS if name.startswith(("keys: 0.5", "one bit: ", "values"))]
PLANTS = {f"{kind}: {how}": dict(kind=kind, k=0.125, select=how) for kind in ("planted", "hidden") for how in SELECTORS}
PLANTS |= {f"{kind}: none": dict(kind=kind, k=0.0) for kind in ("planted", "hidden")}
SAFE = dict(value="1.58", p=0.2)
ARMS = {
    "fp16": Arm(answer, QA, fp16=True),
    **{name: Arm(answer, QA, **way) for name, way in WAYS.items()},
    **{name: Arm(answer, QA, **way, **KEYS) for name, way in PLANTS.items()},
    **{f"protected: {how}": Arm(answer, QA, protect=how, **SAFE, **VALUES) for how in ("relevance", "random", "oracle")},
    **{name: Arm(answer, QA, **way) for name, way in TABLE.items()},
    "1.5/1.66": Arm(answer, QA, protect="relevance", **PAPER | SAFE),
    **{f"block, {name}": Arm(shown, BLOCK, **WAYS[name]) for name in SHOWN},
    **{f"roll: {name}": Arm(roll, BLOCK, **way) for name, way in ROLLS.items()},
}


def less(method, baseline, margin=0.1, counts=True, metric="error"):
    """The method's error is lower, by a share of the baseline's."""
    return Compare(f"{metric}: {method} under {baseline}", metric, method, baseline, margin, False, True, counts)


def right(method, baseline, margin, counts=True):
    return Compare(f"right: {method} against {baseline}", "right", method, baseline, margin, counts=counts)


def rolls(method, margin=-0.05, counts=True):
    name = f"judge: {method} as good as fp16"
    return Compare(name, "judge", f"roll: {method}", "roll: fp16", margin, relative=True, counts=counts)


def steady(method):
    """VDE-Subject, in its own units, a fifth of one at most above."""
    return Compare(f"VDE: {method} as steady as fp16", "vde_subject", f"roll: {method}", "roll: fp16", -0.2, False, counts=False)


CLAIMS = Claims(
    "vidkv",
    arms=ARMS,
    tests=[
        # 1: which channels
        less("keys: 0.5 by range", "keys: 0.5 by random"),
        right("keys: 0.5 by range", "keys: 0.5 by random", 0.01),
        less("block, keys: 0.5 by range", "block, keys: 0.5 by random"),
        less("planted: range", "planted: random"),
        less("hidden: range", "hidden: random", counts=False),
        *(less(f"keys: {k} by range", f"keys: {k} by random", counts=False) for k in (0.25, 0.75)),
        *(less("keys: 0.5 by range", f"keys: 0.5 by {how}", 0.0, False) for how in ("variance", "outliers")),
        *(less("block, keys: 0.5 by range", f"block, keys: 0.5 by {how}", 0.0, False) for how in ("variance", "outliers")),
        *(less("planted: range", f"planted: {how}", 0.0, False) for how in ("variance", "outliers", "none")),
        # 2: what the transform buys
        less("one bit: fft", "one bit: minmax"),
        less("one bit: fft", "one bit: sign"),
        less("block, one bit: fft", "block, one bit: sign"),
        less("one bit: centred, groups of 64", "one bit: fft", 0.1, False),
        less("block, one bit: centred, groups of 64", "block, one bit: fft", 0.1, False),
        less("one bit: fft", "one bit: hadamard", 0.0, False),
        less("one bit for all: fft", "one bit for all: sign", 0.1, False),
        less("one bit for all: centred", "one bit for all: fft", 0.1, False),
        right("1.5/2", "1.5/2, no FFT", 0.0, False),
        # 3: values, and protected tokens
        less("values: 2 a channel", "values: 2 a token", 0.0),
        less("values: 1.58 a channel", "values: 1.58 a token", 0.0),
        less("block, values: 2 a channel", "block, values: 2 a token", 0.0),
        less("block, values: 1.58 a channel", "block, values: 1.58 a token", 0.0),
        less("values: 1.58, fitted", "values: 1.58 a channel", 0.1, False),
        less("protected: relevance", "protected: random", 0.0),
        less("protected: oracle", "protected: relevance", 0.0, False),
        right("protected: relevance", "protected: random", 0.0, False),
        # at equal bits, and in whole
        right("1.5/1.58", "fp16", -0.05),
        right("1.5/1.58", "KIVI 2/2, equal bits", 0.0, False),
        right("1.5/1.58", "uniform 2/2, equal bits", 0.0, False),
        right("2/2", "fp16", -0.01, False),
        # rollouts
        Floor("1.5/1.58 is 8 times smaller", "smaller", "roll: 1.5/1.58, groups of 64", at_least=8.0),
        rolls("1.5/1.58, groups of 64"),
        Floor("ours is 8 times smaller", "smaller", "roll: ours", at_least=8.0),
        rolls("ours"),
        *(rolls(name, counts=False) for name in ROLLS if name not in ("fp16", "1.5/1.58, groups of 64", "ours")),
        *(steady(name) for name in ("1.5/1.58, groups of 64", "KIVI 2/2", "2/2, before", "ours")),
    ],
    seeds=(1, 2, 3),
    minutes=10,
)
