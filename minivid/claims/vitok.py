"""ViTok on clips of 16 x 32 x 32: which of its sizes decides how well it draws, and what a generator can do with the code?

Clips of `base` and `textured`, 2,048 to learn from, 128 held-out ones to measure on. Width 96, three heads, 600 steps of 8 clips
in the same order, AdamW and Muon; "(q, p, c)" are frames and pixels of a tubelet and channels of its code. A seed is a draw of
initial values, of the order of clips and of the held-out clips. One seed was first measured with width 64 and a code of 128
channels, which is more than a token can carry there: width and codes were changed after that, and no margin.

1. "sweep": fifteen codes, E from 64 to 4,096 numbers in groups of equal E, depth (2, 2). PSNR = a + b log2 E: "r2" of this line,
   "slope" b in dB per doubling; the same r2 with log2 of tokens, of FLOPs of a clip, and of both together ("r2 others");
   "spread": range of PSNR within a group of equal E, mean over groups, in units of b. "bend": the slope from 1,024
   numbers on over that up to there. "equal work": PSNR of (8, 8, 32) trained until it has used as much arithmetic as
   (4, 4, 4) at the same E, less the PSNR of that.
2. "depths": (4, 8, 16), five pairs of depths from 1 to 4; PSNR's regression on log2 of both: dB per doubling of either.
3. "c = ...": the code (4, 8, c), a video transformer of 0.3 M parameters on its means, brought to unit variance a channel; 1,200
   steps of 32 clips of `base` with captions. 256 held-out captions, 20 steps, guidance 2: Frechet distance of `feat-b` to
   held-out clips, and the judge's rates. "ceiling": both for true clips through the tokenizer.
4. "price": frame-wise codes (1, 8, 4) against tubelets (4, 8, 16), equal E; the frame-wise one with attention within the frame,
   and with full attention. "gain": PSNR of tubelets less that of frames, on clips that move and on clips of shuffled frames.

Outcome: the number of numbers decides most, and not all. A doubling of E is worth 1.1 dB and explains 77 % of what fifteen
codes differ in (90 were asked for); tokens or arithmetic alone explain 13 and 14 %. But codes of equal E lie 2.4 doublings
apart, not half of one, and their order turns: of 256 numbers, long tokens make the most (23 dB in 32 or 64 tokens, 20.6 in
256), of 1,024 and more, many tokens (25.8 dB in 256, 23.5 in 32). A token of one number says little, and one of 32 and more
can't be filled by a network of this size: each kind of tubelet has its own curve, which rises and then bends, on the whole to
half its slope at 1,024 numbers. Arithmetic is not the reason: with as much of it, few long tokens remain 0.6 dB behind many
short ones. Depth hardly counts here: 0.07 dB per doubling of the encoder, 0.06 of the decoder, less than seeds differ by, so
which side it should go to can't be told. Generation does want a middle: reconstruction rises up to c = 16 and stays, while
what a generator of one size draws is as told in 11, 44, 38 and 30 of 100 respects for c = 1, 4, 16, 64 (true clips through
the same tokenizers: 14, 55, 61, 61), and its Frechet distance is least at 16. The judge can't read shapes behind any of these
codes, 0 to 2 % even of true clips, which leaves colour, motion and count. Tubelets are worth 1.6 dB at equal E where things
move, and cost 0.3 dB where frames are shuffled, as the paper says. The seconds of seed 0 lack what was done before its run
was interrupted, some ten minutes.
"""

from functools import lru_cache
from statistics import fmean

import numpy as np
import torch
from torch import Tensor

from minivid import world
from minivid.core import corpus, fit, noise, sample, text, weights
from minivid.core.model import Cond, Guided, VideoModel
from minivid.lab import measure
from minivid.lab.claims import Arm, Claims, Compare, Floor
from minivid.tokenizers import vitok as paper
from minivid.tokenizers.vitok import ViTok
from minivid.training.command import optimisers, stepper
from minivid.training.recipe import Recipe, pick
from minivid.world.judge import judge
from minivid.world.scores import frechet, psnr

FEATURES = ["minivid/weights/feat-b.safetensors"]
FRAMES, SIDE = 16, 32
STEPS, GENERATE = (600, 2), (1200, 2)  # full, fast
TRAIN, HELD, CAPTIONS = (2048, 16), (128, 4), (256, 4)
RATES = (4e-3, 1e-2)  # of AdamW, of Muon
CODES = [(8, 8, 8), (8, 8, 32), (8, 8, 64), (4, 8, 1), (4, 8, 4), (4, 8, 16), (4, 8, 64), (2, 8, 2), (2, 8, 8), (2, 8, 16),
         (2, 8, 32), (4, 4, 1), (4, 4, 4), (4, 4, 8), (4, 4, 16)]  # fmt: skip
WIDTH, HEADS = 96, 3  # more than any c, or E would count numbers that can't be said
DEPTHS = [(1, 1), (1, 4), (2, 2), (4, 1), (4, 4)]
loaded = lru_cache(None)(weights.load)


# --- clips ----------------------------------------------------------------------------------------------------------------


@lru_cache(2)
def clips(fast: bool, recipes: tuple[str, ...] = ("base", "textured")) -> Tensor:
    """Clips in bytes to learn from."""
    n = TRAIN[fast] // len(recipes)
    return torch.cat([torch.from_numpy(np.array(corpus.clips(r, n, SIDE, 17)[:, :, :FRAMES])) for r in recipes])


@lru_cache(4)
def held(seed: int, fast: bool, recipes: tuple[str, ...] = ("base", "textured")) -> tuple[list, Tensor]:
    some = [s for r in recipes for s in corpus.scenes(r, HELD[fast] // len(recipes), 800 + seed, "held-out")]
    return some, world.batch(some, SIDE, FRAMES)


def shuffled(clip: Tensor) -> Tensor:
    """The same frames in another order, the same for all clips."""
    return clip[:, :, torch.randperm(clip.shape[2], generator=torch.Generator().manual_seed(0))]


# --- tokenizers -----------------------------------------------------------------------------------------------------------


def trained(seed, fast, folder, shape, depth=(2, 2), steps=None, frames=False, change=lambda x: x) -> ViTok:
    """As every tokenizer is trained; a killed run goes on from its checkpoint."""
    torch.manual_seed(seed)
    tok, data, steps = ViTok(*shape, WIDTH, depth, HEADS, frames), clips(fast), steps or STEPS[fast]  # type: ignore[call-arg]
    tok.begin(change(corpus.clip_of(data[:256])))
    recipe = Recipe("tokenizer", {}, None, paper.loss, steps, RATES[0], muon=RATES[1])
    state = fit.State({"model": tok, **optimisers(tok, recipe), "ema": fit.Ema(tok, 0.99)})
    batches = lambda i: change(corpus.clip_of(data[pick(i, len(data), 2 if fast else 8, 90 + seed)]))
    name = "-".join(map(str, (*shape, *depth, steps, frames, change.__name__ if change is shuffled else "")))
    fit.fit(stepper(recipe, steps, torch.float32), state, batches, steps, seed, folder / f"{name}.safetensors", 250)
    tok.load_state_dict(state.ema.state_dict())
    return tok.eval()


@torch.no_grad()
def quality(tok: ViTok, clip: Tensor) -> float:
    back = torch.cat([tok.decode(tok.encode(part)) for part in clip.split(16)])
    return psnr(back.clamp(-1, 1), clip).mean().item()


def line(x: list, y: list[float]) -> tuple[np.ndarray, float]:
    """Least squares of y on the rows of x and a constant: the slopes, and R^2."""
    a, b = np.column_stack([np.array(x), np.ones(len(y))]), np.array(y)
    beta = np.linalg.lstsq(a, b, rcond=None)[0]
    return beta[:-1], float(1 - ((b - a @ beta) ** 2).sum() / ((b - b.mean()) ** 2).sum())


def sweep(seed, fast, folder):
    codes, (_, clip) = CODES[::6] if fast else CODES, held(seed, fast)
    found, rows = {}, {}
    for shape in codes:
        tok = trained(seed, fast, folder, shape)
        flops = measure.flops(lambda tok=tok: tok.decode(tok.encode(clip[:1])))
        c, *size = tok.latent_shape(FRAMES, SIDE, SIDE)
        rows[shape] = np.log2([c * np.prod(size), np.prod(size), flops])
        found[f"psnr {shape}"] = quality(tok, clip)
    of, values = np.array(list(rows.values())), list(found.values())
    (slope,), r2 = line(of[:, :1].tolist(), values)
    groups = [[v for v, row in zip(values, of, strict=True) if row[0] == e] for e in np.unique(of[:, 0])]
    found |= {f"flops {shape}": float(2 ** rows[shape][2]) for shape in codes}
    found |= {"r2": r2, "slope": float(slope), "r2 tokens": line(of[:, 1:2].tolist(), values)[1],
              "r2 flops": line(of[:, 2:].tolist(), values)[1], "r2 others": line(of[:, 1:].tolist(), values)[1]}  # fmt: skip
    if fast:
        return found
    parts = [line(of[rows, :1].tolist(), np.array(values)[rows].tolist())[0][0] for rows in (of[:, 0] > 9, of[:, 0] < 11)]
    spread = fmean(max(g) - min(g) for g in groups if len(g) > 1) / slope
    steps = round(STEPS[0] * 2 ** (rows[4, 4, 4][2] - rows[8, 8, 32][2]))
    long = quality(trained(seed, fast, folder, (8, 8, 32), steps=steps), clip)
    return found | {"bend": float(parts[0] / parts[1]), "spread": float(spread), "equal work": long - found["psnr (4, 4, 4)"]}


def depths(seed, fast, folder):
    pairs, clip = DEPTHS[:2] if fast else DEPTHS, held(seed, fast)[1]
    values = [quality(trained(seed, fast, folder, (4, 8, 16), depth), clip) for depth in pairs]
    slopes, _ = line([list(np.log2(pair)) for pair in pairs], values)
    found = {f"psnr {pair}": value for pair, value in zip(pairs, values, strict=True)}
    return found | {"encoder": float(slopes[0]), "decoder": float(slopes[1]), "ratio": float(slopes[0] / slopes[1])}


def price(seed, fast, folder):
    found = {}
    for name, change in (("moving", lambda x: x), ("shuffled", shuffled)):
        clip = change(held(seed, fast)[1])
        ways = {"tubelets": ((4, 8, 16), False), "frames": ((1, 8, 4), True), "frames, full": ((1, 8, 4), False)}
        learnt = lambda shape, one, change=change: trained(seed, fast, folder, shape, frames=one, change=change)
        got = {way: quality(learnt(*how), clip) for way, how in ways.items()}
        found |= {f"{way}, {name}": value for way, value in got.items()} | {f"gain, {name}": got["tubelets"] - got["frames"]}
    return found


# --- generation -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def features(clip: Tensor) -> Tensor:
    return torch.cat([loaded("feat-b")(part.clamp(-1, 1)) for part in clip.split(32)])


def seen(clip: Tensor, scenes: list, true: Tensor, fast: bool) -> dict[str, float]:
    rates = judge(clip, scenes)
    told = {name: rates[name] for name in ("colour", "shape", "motion", "count") if name in rates}
    return told | ({} if fast else {"frechet": frechet(features(clip), true), "told": fmean(told.values())})


def generation(seed, fast, folder, c):
    tok = trained(seed, fast, folder, (4, 8, c))
    data, steps = clips(fast, ("base",)), GENERATE[fast]
    with torch.no_grad():
        z = torch.cat([tok.encode(corpus.clip_of(part)) for part in data.split(32)])
    mean, spread = z.mean((0, 2, 3, 4), keepdim=True), z.std((0, 2, 3, 4), keepdim=True)
    z, said = (z - mean) / spread, corpus.captions("base", len(data))
    torch.manual_seed(seed)
    model = VideoModel(c, d=64, depth=3, heads=2, patch=1)

    def objective(model, batch, generator):
        x, words = batch
        told = Cond(text=words).drop(fit.uniform(len(x), generator=generator) < 0.1)
        t, eps = noise.logit_normal(*x.shape[::2][:2], generator, 2.0), fit.normal(*x.shape, generator=generator)
        return {"loss": noise.loss(model, noise.flow(), x, t, told, eps).mean()}

    recipe = Recipe("video", {}, None, objective, steps, RATES[0], muon=RATES[1])
    state = fit.State({"model": model, **optimisers(model, recipe), "ema": fit.Ema(model, 0.99)})
    rows = lambda i: pick(i, len(z), 2 if fast else 32, 95 + seed)
    fit.fit(stepper(recipe, steps, torch.float32), state, lambda i: (z[rows(i)], said[rows(i)]), steps, seed,
            folder / "generator.safetensors", 250)  # fmt: skip
    model.load_state_dict(state.ema.state_dict())
    scenes = corpus.scenes("base", CAPTIONS[fast], 800 + seed, "held-out")
    clip, words = world.batch(scenes, SIDE, FRAMES), text.tokens([world.caption(scene) for scene in scenes])
    x = sample.start(len(scenes), tok.latent_shape(FRAMES, SIDE, SIDE), seed)
    times = noise.table(2 if fast else 20, x.shape[2], 2.0)
    with torch.no_grad():
        made = noise.sample(Guided(model.eval(), 2.0), noise.flow(), x, Cond(text=words), times) * spread + mean
        made, back = (torch.cat([tok.decode(p).clamp(-1, 1) for p in some.split(16)]) for some in (made, tok.encode(clip)))
    true = None if fast else features(world.batch(corpus.scenes("base", len(scenes), 900 + seed, "held-out"), SIDE, FRAMES))
    found = {"psnr": psnr(back, clip).mean().item()} | seen(made, scenes, true, fast)
    return found | {f"ceiling, {name}": value for name, value in seen(back, scenes, true, fast).items()}


# --- what is decided before the run -------------------------------------------------------------------------------------

CHANNELS = (1, 4, 16, 64)
CLAIMS = Claims(
    "vitok",
    arms={
        "sweep": Arm(sweep), "depths": Arm(depths), "price": Arm(price),
        **{f"c = {c}": Arm(generation, FEATURES, c=c) for c in CHANNELS},
    },
    tests=[
        # 1: E rules
        Floor("a line in log2 E", "r2", "sweep", at_least=0.9),
        Floor("at least 1 dB per doubling", "slope", "sweep", at_least=1.0),
        Floor("shapes of equal E are within half a doubling", "spread", "sweep", at_most=0.5),
        Floor("tokens alone don't fit", "r2 tokens", "sweep", at_most=0.6),
        Floor("FLOPs alone don't fit", "r2 flops", "sweep", at_most=0.6),
        Floor("with equal work few tokens draw as well", "equal work", "sweep", at_least=0.0, counts=False),
        Floor("the line doesn't bend", "bend", "sweep", at_least=0.5, counts=False),
        # 2: decoder over encoder
        Floor("0.1 dB per doubling of the decoder", "decoder", "depths", at_least=0.1),
        Floor("half of it at most per doubling of the encoder", "ratio", "depths", at_most=0.5),
        # 3: generation wants a middle c
        *(Compare(f"frechet: c = {c} under c = {other}", "frechet", f"c = {c}", f"c = {other}", 0.05, False, True,
                  counts=c == 16) for c in (4, 16) for other in (1, 64)),
        *(Compare(f"told: c = {c} over c = {other}", "told", f"c = {c}", f"c = {other}", 0.0, counts=False)
          for c in (4, 16) for other in (1, 64)),
        *(Compare(f"psnr: c = {b} over c = {a}", "psnr", f"c = {b}", f"c = {a}", 0.5)
          for a, b in zip(CHANNELS, CHANNELS[1:], strict=False)),
        # 4: video is cheaper
        Floor("tubelets gain 1 dB where things move", "gain, moving", "price", at_least=1.0),
        Floor("and nothing where frames are shuffled", "gain, shuffled", "price", at_most=0.3),
    ],
    minutes=60,
)  # fmt: skip
