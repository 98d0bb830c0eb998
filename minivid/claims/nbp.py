"""NBP from scratch on the codes of `tok-q`: what blocks cost in likelihood, what they gain in time, what they do to what is made.

All arms have the same 0.3 M parameters and initial values (width 64, three layers of two heads; BOV and 63 middle tokens), 800
steps of 8 clips in the same order (4,096 of `base`, every second of 16 frames: 512 tokens), AdamW and Muon at the better of two
pairs of rates, tried on a seed that isn't used here. They differ in the order of the cells, the mask and the target. No words are
told. L = 4 and 8 are half a row and a row, 16 two rows, 64 a frame; at L = 8 also 2 x 4 cells of a frame ("patch") and half a row
of two frames ("two frames"). A seed is a draw of initial values, of the order of clips, of 256 held-out clips (colours and shapes
in motions that training lacks), and of one number for each cell that decides what is drawn there, the same in all arms.

1. "bits": of a code of frames 4 to 7, given all before its block, teacher-forced: the exact likelihood of these four frames given
   the first four, for all arms. "bits_all" counts all eight frames; the hybrid start says the first L tokens one by one, which
   gives L = 64 all of its first frame. "bits_200" and so on: of 64 of the clips after so many steps of the same training.
2. Time of saying 1,024 tokens from nothing, next tokens over blocks, one thread, batch 1, with a cache that keeps rotated keys in
   one piece of memory, so that nothing is computed or copied again; the same for the last 768 of them after four given frames
   ("given"); and rows at batch 16. "calls" are passes: from nothing the hybrid start says the first L tokens in single ones.
3. Four true frames, four made: 256 tokens. "frechet" is over the features of `feat-b`, all 8 frames, between what is made and
   the same clips' true codes, both decoded. By the judge, on the made frames: "torn" is the share of frames with more regions
   than the scene has bodies, "lost" of those with fewer; "count": right number, a share of clips; "shape", "colour": shares of
   bodies; "astray": a body's displacement from frame to frame less the true one, in pixels (bodies are found by their colour).
   _1, _0.7, _0: temperature, 0 takes the likeliest; _top: the paper's filter at temperature 1 (a quarter of the codes, of these
   the fewest that hold 0.9). "truth" is the true codes decoded, its frechet that between two draws of 256 clips;
   "still" is the last given frame for ever.

Outcome: the time is as promised, the order isn't. Of runs a token costs most with blocks of 4 (2.10 bits) and least with whole
frames (1.77; next tokens 1.91, rows 1.88), though who sees more can't know less: after 800 steps what counts is what is easy to
learn. A whole frame's cell is asked for by the same cell of the frame before, a row's by the cell above, a next token's by the
cell to the left; in a world that moves by a fraction of a cell the first of these nearly is the answer. At 200 steps whole
frames lead by 0.44 bits, at 800 by 0.14. Shapes are as foreseen: rows cost 9 % less than patches and 23 % less than half rows
of two frames, whose second frame can't see the first. Rows are 6.4 times as fast as single tokens (7.6 times fewer passes), 4.6
times at batch 16; whole frames, once four are given, 25 times (64). What is made freely follows the bits, not the block: whole
frames are a third nearer to the true clips, and tear no more often (4 frames in 100; single tokens 7). Straight motion that
four frames have shown leaves cells little to agree on; what is wrong is what these small models don't know, and 256 draws in a
row add more to it than four. Patches draw no worse than rows as far as three seeds can tell. A still picture is far off (18.9
where these have 5 to 9).
"""

import json
import math
from functools import lru_cache, partial

import numpy as np
import torch
from torch import Tensor

from minivid import world
from minivid.block_diffusion import nbp as paper
from minivid.block_diffusion.nbp import Flat, NextBlock, Sampling
from minivid.core import corpus, fit, weights
from minivid.core.baselines.vq import Codes
from minivid.core.codes import nll
from minivid.core.model import Cond
from minivid.core.where import grid
from minivid.lab import jobs, measure
from minivid.lab.claims import Arm, Claims, Compare, Floor
from minivid.training.command import multiplies, optimisers, stepper
from minivid.training.recipe import Recipe, pick
from minivid.training.tokens import codes_of
from minivid.world.judge import read_many, score
from minivid.world.scores import entropy, frechet

FILES = [f"minivid/weights/{name}.safetensors" for name in ("tok-q", "feat-b")]
SHAPES = {"L = 1": (1, 1, 1), "L = 4": (1, 1, 4), "L = 8": (1, 1, 8), "L = 16": (1, 2, 8), "L = 64": (1, 8, 8),
          "patch": (1, 2, 4), "two frames": (2, 1, 4)}  # fmt: skip
SIZES = tuple(SHAPES)[:5]
FRAMES, GIVEN, BATCH = 8, 4, 8
STEPS = (800, 3)  # full, fast
RATES = (1e-2, 2e-2)  # of AdamW, of Muon
TRAIN, HELD = (4096, 32), (256, 2)
WAYS = {"1": Sampling(), "0.7": Sampling(0.7), "0": Sampling(0), "top": Sampling(1.0, 64, 0.9)}
loaded = lru_cache(None)(weights.load)


# --- codes ----------------------------------------------------------------------------------------------------------------


@lru_cache(1)
def train_codes(fast: bool) -> Tensor:
    """`n 8 8 8` of training clips, every second frame."""
    data, tok = corpus.clips("base", TRAIN[fast])[:, :, : 2 * FRAMES : 2], loaded("tok-q")
    name = f"codes-by-2-base-{TRAIN[fast]}"
    return corpus.encoded(tok, name, data, ((FRAMES, 8, 8), np.uint8), lambda some: codes_of(tok, some)).long()


@lru_cache(2)
def held(seed: int, fast: bool) -> tuple[list, Tensor]:
    """Held-out scenes and the codes `n 8 8 8` of every second frame."""
    asked = corpus.scenes("base", HELD[fast], 600 + seed, "held-out")
    return asked, codes_of(loaded("tok-q"), corpus.bytes_of(world.batch(asked, 32, 2 * FRAMES)[:, :, ::2]), 32).long()


# --- training -------------------------------------------------------------------------------------------------------------


def objective(model, codes, generator):
    return {"nll": nll(model.predict(codes, Cond()).float(), codes).mean()}


def fresh(seed: int, shape: tuple[int, int, int]) -> NextBlock:
    torch.manual_seed(seed)
    return NextBlock(heads=2, shape=shape)


def trained(seed, fast, shape, folder) -> NextBlock:
    """As every arm is trained; a killed run goes on from its checkpoint."""
    model, codes, (rate, muon) = fresh(seed, shape), train_codes(fast), RATES
    recipe, batch = Recipe("tokens", {}, None, objective, STEPS[fast], rate, muon=muon), 2 if fast else BATCH
    state = fit.State({"model": model, **optimisers(model, recipe), "ema": fit.Ema(model)})
    step = stepper(recipe, STEPS[fast], torch.float32 if fast else multiplies("cpu"))
    batches, unseen = lambda i: codes[pick(i, len(codes), batch, 70 + seed)], held(seed, fast)[1][:64]

    def watched(state, batch, generator):
        if state.i % 200 == 0 and state.i:
            jobs.write_json(folder / f"bits_{state.i}.json", bits_of(model, unseen)[:, GIVEN:].mean().item())
        return step(state, batch, generator)

    fit.fit(watched, state, batches, STEPS[fast], seed, folder / "state.safetensors", 100)
    return model.eval()


@torch.no_grad()
def bits_of(model, codes: Tensor) -> Tensor:
    return torch.cat([nll(model.predict(some, Cond()), some) for some in codes.split(32)]) / math.log(2)


# --- what is made ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def decoded(codes: Tensor) -> Tensor:
    tok = loaded("tok-q")
    return torch.cat([tok.decode(tok.bottleneck.lookup([Codes(some, grid(*some.shape[1:]))])) for some in codes.split(32)])


@torch.no_grad()
def features(clips: Tensor) -> Tensor:
    return torch.cat([loaded("feat-b")(some.clamp(-1, 1)) for some in clips.split(64)])


def looked_at(clips: Tensor, scenes: list) -> dict[str, float]:
    """What the judge says of the made frames, which it reads with the last given one before them."""
    readings = read_many(clips[:, :, GIVEN - 1 :])
    told, counts, more, fewer, gaps = [], [], [], [], []
    for made, scene in zip(readings, scenes, strict=True):
        answer, bodies = score(made, scene), len(scene.bodies)
        told += answer["bodies"]
        counts.append(answer["count"] is True)
        more += [count > bodies for count in made.counts[1:]]
        fewer += [count < bodies for count in made.counts[1:]]
        centres = world.truth(scene, 32, 2 * FRAMES).centres[:, 2 * GIVEN - 2 :: 2]
        for body, true in zip(scene.bodies, centres, strict=True):
            for seen in [seen for seen in made.bodies if seen.colour == body.colour][:1]:
                gaps.append((seen.path - true[: len(seen.path)]).diff(dim=0).norm(dim=-1))
    apart, mean = torch.cat([*gaps, torch.full((1,), torch.nan)]), lambda some: sum(some) / len(some)
    found = {name: mean([answer[name] is True for answer in told]) for name in ("shape", "colour")}
    found |= {"count": mean(counts), "torn": mean(more), "lost": mean(fewer)}
    return found | {"astray": 32.0 if apart.isnan().all() else apart.nanmean().item()}


def made_freely(model, seed, fast, ways) -> dict[str, float]:
    scenes, codes = held(seed, fast)
    frames = GIVEN + 2 if fast else FRAMES
    u = torch.rand(len(codes), frames, 8, 8, generator=torch.Generator().manual_seed(seed))
    true, found = features(decoded(codes)[:, :, :frames]), {}
    for way in ways[:1] if fast else ways:
        parts = zip(codes.split(64), u.split(64), strict=True)
        go_on = partial(paper.generate, model, frames, Cond(), how=WAYS[way])
        made = [go_on(some[:, :GIVEN], Flat(FRAMES * 64), dice) for some, dice in parts]
        clips = decoded(torch.cat(made))
        values = looked_at(clips, scenes) | ({} if fast else {"frechet": frechet(features(clips), true)})
        found |= {f"{name}_{way}": value for name, value in values.items()}
    return found


# --- arms -----------------------------------------------------------------------------------------------------------------


def arm(seed, fast, shape, folder, ways=None):
    """Bits of a held-out code, then what is made freely."""
    model, (_, codes) = trained(seed, fast, tuple(shape), folder), held(seed, fast)
    bits = bits_of(model, codes)
    found = {file.stem: json.loads(file.read_text()) for file in sorted(folder.glob("bits_*.json"))}
    found |= {"bits": bits[:, GIVEN:].mean().item(), "bits_all": bits.mean().item(), "bits_first": bits[:, 0].mean().item()}
    return found | made_freely(model, seed, fast, ways or list(WAYS))


def truth(seed, fast):
    """The true codes, looked at in the same way; and the bits of a code by its frequency alone, or if it could only stay."""
    (scenes, codes), (_, others) = held(seed, fast), held(seed + 100, fast)
    clips = decoded(codes)
    values = looked_at(clips, scenes) | ({} if fast else {"frechet": frechet(features(clips), features(decoded(others)))})
    stay = (codes[:, GIVEN:] == codes[:, GIVEN - 1 : -1]).float().mean().item()
    return values | {"unigram": entropy(codes[:, GIVEN:], 256), "stay": stay}


def still(seed, fast):
    """The last given frame for ever."""
    scenes, codes = held(seed, fast)
    clips, true = (
        decoded(torch.cat([codes[:, :GIVEN], codes[:, GIVEN - 1 : GIVEN].expand_as(codes[:, GIVEN:])], 1)), decoded(codes),
    )  # fmt: skip
    return looked_at(clips, scenes) | ({} if fast else {"frechet": frechet(features(clips), features(true))})


@torch.no_grad()
def speed(seed, fast):
    """How many times as long next tokens take, from nothing and after four given frames, and passes of the model for each."""
    frames, dice, found = (5 if fast else 16), torch.Generator().manual_seed(seed), {}

    def say(name, b=1, given=0):
        model, u = fresh(seed, SHAPES[name]).eval(), torch.rand(b, frames, 8, 8, generator=dice)
        prompt = torch.randint(256, (b, given, 8, 8), generator=dice) if given else None
        return lambda: paper.generate(model, frames, Cond(), prompt, Flat(frames * 64), u)

    for name in ("L = 8",) if fast else SIZES[1:]:
        n, length = frames * 64, math.prod(SHAPES[name])
        found[f"calls, {name}"], found[f"calls, {name}, given"] = paper.steps(n, length), paper.steps(n - 256, length, 256)
        found[f"{name}, given"] = measure.ratio(say("L = 1", 1, GIVEN), say(name, 1, GIVEN), 5).median
        if not fast:
            found[name] = measure.ratio(say("L = 1"), say(name), 5).median
    return found if fast else found | {"L = 8, batch 16": measure.ratio(say("L = 1", 16), say("L = 8", 16), 5).median}


# --- what is decided before the run ---------------------------------------------------------------------------------------

TIMED = [*SIZES[1:], *(f"{name}, given" for name in SIZES[1:]), "L = 8, batch 16"]
ONE = ["1"]
ARMS = {**{name: Arm(arm, FILES, shape=list(SHAPES[name])) for name in SIZES if name != "L = 16"},
        "patch": Arm(arm, FILES, shape=list(SHAPES["patch"]), ways=ONE), "truth": Arm(truth, FILES), "still": Arm(still, FILES),
        "speed": Arm(speed), "two frames": Arm(arm, FILES, shape=list(SHAPES["two frames"]), ways=ONE),
        "L = 16": Arm(arm, FILES, shape=list(SHAPES["L = 16"]))}  # fmt: skip


def less(metric, method, baseline, margin, counts=True):
    """`margin` is a share of the baseline's value."""
    return Compare(f"{metric}: {method} under {baseline}", metric, method, baseline, margin, False, True, counts)


CLAIMS = Claims(
    "nbp",
    arms=ARMS,
    tests=[
        # 1: likelihood against the size of a block
        *(less("bits", small, large, 0.0) for small, large in zip(SIZES, SIZES[1:], strict=False)),
        less("bits", "L = 1", "L = 64", 0.1),
        less("bits", "L = 8", "L = 1", -0.15),
        *(less("bits", "L = 8", other, 0.0) for other in ("patch", "two frames")),
        *(less("bits_all", small, large, 0.0, False) for small, large in zip(SIZES, SIZES[1:], strict=False)),
        # 2: time
        Floor("rows of 8 are 3 times as fast", "L = 8", "speed", at_least=3.0),
        *(Floor(f"{name}, given four frames, reaches half of L", f"{name}, given", "speed", at_least=half, counts=False)
          for name, half in zip(SIZES[1:], (2.0, 4.0, 8.0, 32.0), strict=True)),
        Floor("rows of 8 at batch 16 reach half of L", "L = 8, batch 16", "speed", at_least=4.0, counts=False),
        # 3: what is made freely
        less("frechet_1", "L = 8", "L = 1", 0.05),
        less("frechet_1", "L = 8", "L = 64", 0.1),
        less("torn_1", "L = 8", "L = 64", 0.1),
        *(less("frechet_1", name, "L = 1", 0.05, False) for name in ("L = 4", "L = 16")),
        *(less(f"frechet_{way}", "L = 8", other, 0.05, False) for way in ("0.7", "0", "top") for other in ("L = 1", "L = 64")),
        *(Compare(f"torn_{way}: L = 8 under L = 1", f"torn_{way}", "L = 8", "L = 1", 0.0, False, counts=False)
          for way in ("1", "0.7", "0", "top")),
        *(less("frechet_1", "L = 8", other, 0.05, False) for other in ("patch", "two frames")),
    ],
    minutes=60,
    tolerance={metric: math.inf for metric in TIMED},
)  # fmt: skip
