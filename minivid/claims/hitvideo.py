"""HiTVideo from scratch: what are layers of codes worth at equal bits, who decides in it, is it easier to write?

Clips of 9 x 32 x 32, `base` on plain grounds (half of 12,288), every second of 17 frames. All tokenizers have the same layers
(0.14 M parameters, cells of 4 x 4 x 4 pixels: 3 x 8 x 8 of them), 1,000 steps of 16 clips in the same order, Adam at 3e-3, errors
by L1, squares and edges, and books that follow running means with restart; the weight of commitment, 1, was found in trials of
250 steps on a seed that isn't used here, where with 0.25 layers drifted away. A layered code has 2 x 4 x 4 tokens of 256 on
top (256 bits) and 192 below of 2, 8 or 64: 448, 832 and 1,408 bits. Its flat twins have 192 tokens of 5, 20 and 161 codes (445.8,
829.8, 1,407.5 bits) and the same residual blocks beside the book, on the finest grid, which costs them more arithmetic. Rivals
at 832 bits: residual VQ on the one grid (5 and 4 codes), and 128 tokens of 90 codes, twice as long in time ("long", 830.9 bits).
At 448 bits a flat book of 5 codes is no rival, which the first seed showed; "wide" was added then: 3 x 4 x 4 tokens of 645 codes.
A seed is a draw of initial values and of the order of clips, and of what is looked at. Measured on 512 other clips:

1. "psnr". The published 70 % is asked as: is the layered code at 832 (59 %), at 448 bits (32 %), at most 0.5 dB below flat 161?
   "bits_used" is what the codes would cost by their frequencies, each layer by itself.
2. Who decides, at 832 bits, dropping the bottom in a quarter of the clips (and random cells in another) against never. "swap":
   the top of one clip with the bottom of another, decoded and read by the judge; of the answers that agree with one of the two,
   the share that the top gives, for "colour", "shape", "motion", "place" (a body within 3 pixels of the path) and "count".
   "probe": accuracy of linear maps from the codes' vectors, averaged over each frame of tokens, to colour, shape, motion (of
   single bodies) and count; on top and below.
   "flowing" is never dropped, and gradients go through what the bottom is told (added when a trial showed how much hangs on it).
3. A transformer of 0.3 M parameters writes 256 clips from their captions, guidance 2, temperature 1: flat 20, layered 8 (top,
   then bottom), top alone (the mask vectors stand for the bottom), and as a control a flat code of 2 x 4 x 4 tokens ("coarse").
   All have the arithmetic of 700 steps of 16 flat clips; short rows come in larger batches. "caption": mean share of
   colour, shape, motion (of bodies) and count (of clips) that the judge reads as asked; "frechet" by the features of `feat-b`.

Outcome: dropping decides who decides; at equal bits, layers don't pay here. At 832 bits layers are level with the flat twin
(25.87 and 25.90 dB) and 0.5 dB ahead of residual VQ, at 1,408 bits 0.16 dB behind. At 448 bits they beat a flat book of 5
codes by 3.8 dB, but that rival is made of straw: 48 tokens of 645 codes at the same bits reach 26.06 dB, 0.8 dB more than the
layers there and more than the layers at 832. So the 70 % aren't reproduced: at 59 % of the bits 0.82 dB are missing, at 32 %
1.4 dB, and a coarser grid with a larger book misses 0.6 dB at 32 %. Trained with dropping, the top gives 97 to 100 % of the
answers on motion, place and count; without, 48, 67 and 63 %, so the bottom doesn't take all either. It costs 0.13 dB and
gives the top alone 2.1 dB. Where gradients flow through what the bottom is told, the top gives 80 %, but 1 dB is lost. Linear
probes don't agree with the swap: they read a little more from the bottom (0.52) than from the top (0.48), twice as much a bit
from the top, not four times: what decides the picture needn't lie on a line. Clips written from captions: flat 40.5 % right,
layers 41.4 %, the plan alone 49 %, a coarse flat code 51 %, in a fifteenth of the time: fine tokens drawn one after another
by so small a model spoil the plan (motion 21 to 3 %). No arm keeps shapes at this size, not even by reconstruction. "seconds"
shared its cores with other arms.
"""

import math
import time
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from minivid import world
from minivid.core import corpus, fit, text, weights
from minivid.core.baselines.vq import VQ, Codes, ResidualVQ
from minivid.core.cache import Cache
from minivid.core.codes import generate, nll
from minivid.core.model import Cond
from minivid.lab.claims import Arm, Claims, Compare, Floor
from minivid.tokenizers import hitvideo as paper
from minivid.tokenizers.hitvideo import HiTVideo, Level, Steered, Writer
from minivid.training.command import optimisers, stepper
from minivid.training.recipe import Recipe, pick
from minivid.world.judge import read_many, score
from minivid.world.scores import entropy, frechet, psnr

FILES = ["minivid/weights/feat-b.safetensors"]
CELLS, FRAMES, BATCH = (3, 8, 8), 9, 16
STEPS, WRITES = (1000, 3), (700, 3)  # full, fast
RATE, COMMIT = 3e-3, 4.0
DRAWN, SEEN, MADE = (12288, 64), (512, 8), (256, 2)
loaded = lru_cache(None)(weights.load)


def levels(how: str, k: int) -> list[Level]:
    """The layers of an arm."""
    match how:
        case "layers":
            return [Level(256, 2, 2, 12, 1), Level(k)]
        case "coarse":
            return [Level(256, 2, 2, 12, 1)]
        case "long":
            return [Level(k, 2, 1, 8, 1, 48)]
    return [Level(k, depth=1, width=48)]  # as many parameters as two layers have


class Stages(ResidualVQ):
    """Residual VQ that names its grids alone: a rival's book in the place of one."""

    def __init__(self, d: int, *sizes: int, seed: int = 0):
        super().__init__(*(VQ(k, d, decay=0.99, restart=0.1, seed=seed + i) for i, k in enumerate(sizes)))


# --- material -----------------------------------------------------------------------------------------------------------


def plain(scenes) -> list[int]:
    return [i for i, scene in enumerate(scenes) if scene.background.texture.kind == "plain"]


@lru_cache(1)
def material(fast: bool) -> tuple[Tensor, Tensor]:
    """Clips as bytes `n 3 9 32 32` and their captions `n 16`."""
    scenes = corpus.scenes("base", DRAWN[fast])
    rows = plain(scenes)
    said = text.tokens([world.caption(scenes[i]) for i in rows])
    return torch.from_numpy(np.array(corpus.clips("base", DRAWN[fast])[rows, :, ::2])), said


@lru_cache(1)
def unseen(seed: int, n: int) -> tuple[list, Tensor]:
    """n scenes that training lacks, and their clips."""
    scenes = corpus.scenes("base", 3 * n + 8, 600 + seed)
    scenes = [scenes[i] for i in plain(scenes)[:n]]
    return scenes, world.batch(scenes, 32, 2 * FRAMES - 1)[:, :, ::2]


# --- tokenizers -----------------------------------------------------------------------------------------------------------


def tokenizer(seed: int, fast: bool, how: str, k: int, drop: float, folder) -> HiTVideo:
    """A trained tokenizer; a killed run goes on from its checkpoint."""
    torch.manual_seed(seed)
    tok = HiTVideo(levels(how, k), drop, 16, (16, 32), (1, 1), seed)
    if how == "residual":
        tok.bottleneck.layers[0].book = Stages(8, 5, 4, seed=seed)
    return train(tok, material(fast)[0], STEPS[fast], seed, folder / "tokenizer.safetensors", 4 if fast else BATCH)


def train(tok: HiTVideo, data: Tensor, steps: int, seed: int, path=None, batch: int = BATCH) -> HiTVideo:
    """As every tokenizer is trained, on clips as bytes."""
    tok.begin(corpus.clip_of(data[:512]))
    adam = torch.optim.Adam(tok.parameters(), RATE, (0.9, 0.99), fused=True)

    def step(state, some, generator):
        adam.param_groups[0]["lr"] = RATE * fit.cosine(state.i, steps)
        clip = corpus.clip_of(some)
        back, _, losses = tok(clip)
        error = back - clip
        edges = sum(error.diff(dim=d).abs().mean() for d in (-1, -2))
        loss = error.abs().mean() + 10 * error.square().mean() + 0.3 * edges + COMMIT * losses["commit"]
        adam.zero_grad()
        loss.backward()
        adam.step()
        return {"loss": loss}

    order = lambda i: data[pick(i, len(data), batch, 40 + seed)]
    fit.fit(step, fit.State({"tok": tok, "adam": adam}), order, steps, seed, path, 300)
    return tok.eval()


@torch.no_grad()
def coded(tok: HiTVideo, clips: Tensor) -> list[Codes]:
    parts = [tok.bottleneck(tok.features(some))[1] for some in clips.split(64)]
    return [Codes(torch.cat([p[i].index for p in parts]), parts[0][i].where) for i in range(len(parts[0]))]


@torch.no_grad()
def decoded(tok: HiTVideo, codes: list[Codes]) -> Tensor:
    """Clips of the first few grids, or of all."""
    rows = torch.arange(len(codes[0].index)).split(64)
    return torch.cat([tok.decode(tok.bottleneck.lookup([Codes(c.index[i], c.where) for c in codes])) for i in rows])


@torch.no_grad()
def quality(tok: HiTVideo, clips: Tensor, residual: bool) -> dict[str, float]:
    """PSNR of all that is said and of the top alone, parameters, and bits a clip: of the books, and by the codes' frequencies."""
    found: dict[str, float] = {"parameters": sum(p.numel() for p in tok.parameters())}
    back: list[Tensor] = []
    grids: list[list[Tensor]] = []
    for some in clips.split(64):
        z = tok.features(some)
        out, codes, _ = tok.bottleneck(z)
        if residual:  # the layer names the first of its stages only
            layer = tok.bottleneck.layers[0]
            codes = layer.book(layer.down(z))[1]
        back.append(tok.decode(out)), grids.append([grid.index for grid in codes])
    whole = [torch.cat(parts) for parts in zip(*grids, strict=True)]
    sizes = [5, 4] if residual else [level.k for level in tok.levels]
    found |= {"psnr": psnr(torch.cat(back), clips).mean().item()}
    found |= {"bits": sum(grid[0].numel() * math.log2(k) for grid, k in zip(whole, sizes, strict=True))}
    used = [grid[0].numel() * entropy(grid, k) for grid, k in zip(whole, sizes, strict=True)]
    found |= {"bits_used": sum(used), "bits_used_top": used[0]}
    return found


# --- who decides ------------------------------------------------------------------------------------------------------------


def swaps(tok: HiTVideo, codes: list[Codes], scenes: list) -> dict[str, float]:
    """The top layer's share of the answers, top of one clip under the bottom of the next."""
    single = [i for i, scene in enumerate(scenes) if len(scene.bodies) == 1]
    looks = lambda i: [getattr(scenes[i].bodies[0], name) for name in ("colour", "shape", "motion")]
    pairs = [(i, j) for i, j in pairwise(single) if all(a != b for a, b in zip(looks(i), looks(j), strict=True))]
    double = [i for i, scene in enumerate(scenes) if len(scene.bodies) == 2]
    mixed = [pair for i, j in zip(single, double, strict=False) for pair in ((i, j), (j, i))]
    top, bottom = (list(side) for side in zip(*pairs, *mixed, strict=True))
    made = decoded(tok, [Codes(codes[0].index[top], codes[0].where), Codes(codes[1].index[bottom], codes[1].where)])
    won = {name: [0, 0] for name in ("colour", "shape", "motion", "place", "count")}
    paths = {i: world.truth(scenes[i], 32, 2 * FRAMES - 1).centres[0, ::2] for i in single}
    near = lambda seen, i: bool((seen.path - paths[i]).norm(dim=-1).nanmean() < 3)
    for pair, reading in zip(pairs, readings := read_many(made), strict=False):
        for side, i in enumerate(pair):
            body = scenes[i].bodies[0]
            for name in ("colour", "shape", "motion"):
                won[name][side] += any(getattr(seen, name) == getattr(body, name) for seen in reading.bodies)
            won["place"][side] += any(near(seen, i) for seen in reading.bodies)
    for pair, reading in zip(mixed, readings[len(pairs) :], strict=True):
        for side, i in enumerate(pair):
            won["count"][side] += len(reading.bodies) == len(scenes[i].bodies)
    share = {name: a / (a + b) if a + b else 0.5 for name, (a, b) in won.items()}
    found = {f"swap_{name}": value for name, value in share.items()}
    found["swap"] = sum(share[name] for name in ("motion", "place", "count")) / 3
    answered = [(a + b) / len(mixed if name == "count" else pairs) for name, (a, b) in won.items()]
    return found | {"swap_answered": sum(answered) / 5}


@torch.no_grad()
def pooled(tok: HiTVideo, codes: list[Codes], i: int) -> Tensor:
    vectors = tok.bottleneck.layers[i].book.lookup([codes[i]])
    return vectors.mean((3, 4)).flatten(1)


def asked(scenes: list) -> dict[str, list]:
    """Answers by question, None where a scene has none."""
    one = lambda scene, name: getattr(scene.bodies[0], name) if len(scene.bodies) == 1 else None
    return {name: [one(s, name) for s in scenes] for name in ("colour", "shape", "motion")} | {
        "count": [str(len(s.bodies)) for s in scenes]
    }


def probes(tok: HiTVideo, few: tuple, many: tuple) -> dict[str, float]:
    """Accuracy on `few` of ridge regressions from pooled codes of `many` to each answer; both are (scenes, codes)."""
    found, questions = {}, [asked(scenes) for scenes, _ in (many, few)]
    for i, layer in enumerate(("top", "bottom")):
        x, y = (pooled(tok, codes, i).double() for _, codes in (many, few))
        mean, std = x.mean(0), x.std(0) + 1e-6
        x, y = (nn.functional.pad((v - mean) / std, (0, 1), value=1) for v in (x, y))
        for name in questions[0]:
            words = sorted({w for w in questions[0][name] if w})
            rows, test = ([j for j, w in enumerate(q[name]) if w in words] for q in questions)
            goal = torch.tensor([[w == questions[0][name][j] for w in words] for j in rows]).double()
            a = x[rows]
            weight = torch.linalg.solve(a.T @ a + torch.eye(a.shape[1]).double(), a.T @ goal)
            said = (y[test] @ weight).argmax(1).tolist()
            right = [words[w] == questions[1][name][j] for w, j in zip(said, test, strict=True)]
            found[f"probe_{layer}_{name}"] = sum(right) / len(right)
    for layer in ("top", "bottom"):
        found[f"probe_{layer}"] = sum(found[f"probe_{layer}_{name}"] for name in questions[0]) / 4
    each = [found[f"probe_{layer}"] / used for layer, used in (("top", 256), ("bottom", 192 * math.log2(tok.levels[1].k)))]
    return found | {"probe_lead": found["probe_top"] - found["probe_bottom"], "probe_per_bit": each[0] / each[1]}


# --- text to video ------------------------------------------------------------------------------------------------------------


def work(n: int, d: int = 64, depth: int = 3) -> float:
    """Multiplications of a forward pass over n tokens: matrices, and the two products of attention."""
    return depth * n * (4 * d * d + 2 * d * d + 6 * d * d + 2 * n * d)


def writer(seed: int, fast: bool, part: list[Level], codes: list[Codes], folder) -> Writer:
    """Trained to the arithmetic of `WRITES` steps of flat rows."""
    torch.manual_seed(seed)
    model, said = Writer(part, CELLS), material(fast)[1]
    row, n = model.row(codes[: len(part)]), model.inlet.side[1]
    share = work(192) / work(n)
    batch = 2 if fast else BATCH * max(1, round(share))
    steps = WRITES[1] if fast else round(WRITES[0] * share * BATCH / batch)

    def objective(model, some, generator):
        tokens, words = some
        gone = fit.uniform(len(tokens), generator=generator) < 0.1
        return {"nll": nll(model.predict(tokens, Cond(text=words).drop(gone)).float(), tokens).mean()}

    recipe = Recipe("tokens", {}, None, objective, steps, 1e-2, muon=2e-2)
    state = fit.State({"model": model, **optimisers(model, recipe), "ema": fit.Ema(model)})

    def batches(i):
        rows = pick(i, len(row), batch, 70 + seed)
        return row[rows], said[rows]

    fit.fit(stepper(recipe, steps, torch.float32), state, batches, steps, seed, folder / f"writer-{n}.safetensors", 200)
    return model.eval()


@torch.no_grad()
def written(tok: HiTVideo, model: Writer, part: list[Level], seed: int, fast: bool) -> dict[str, float]:
    """What the judge reads in clips made from captions, and how far their features are from those of true clips."""
    scenes, clips = unseen(seed, SEEN[fast])
    scenes, clips = scenes[: MADE[fast]], clips[: MADE[fast]]
    cond = Cond(text=text.tokens([world.caption(scene) for scene in scenes]))
    if fast and model.inlet.side[1] > 32:
        return {}
    dice, guided = torch.Generator().manual_seed(seed), Steered(model, 2.0)
    began = time.perf_counter()
    row = generate(guided, 1, cond, None, Cache(), 1.0, dice)
    seconds = time.perf_counter() - began
    made = decoded(tok, model.layers(row, part))
    found = read(made, scenes) | ({} if fast else {"seconds": seconds})
    if not fast:
        feat = loaded("feat-b")
        found["frechet"] = frechet(feat(made), feat(clips))
    return found


def read(clips: Tensor, scenes: list) -> dict[str, float]:
    """Shares of right answers: colour, shape, motion of bodies, count of clips, and the mean of the four."""
    answers = [score(reading, scene) for reading, scene in zip(read_many(clips), scenes, strict=True)]
    bodies = [body for answer in answers for body in answer["bodies"]]
    found = {name: sum(body[name] is True for body in bodies) / len(bodies) for name in ("colour", "shape", "motion")}
    found["count"] = sum(answer["count"] is True for answer in answers) / len(answers)
    return found | {"caption": sum(found.values()) / 4}


# --- arms -----------------------------------------------------------------------------------------------------------------


def arm(seed, fast, how, k, folder, drop=0.0, look=False, write=False):
    """A tokenizer; with `look` who decides in it; with `write` models that say its tokens."""
    tok = tokenizer(seed, fast, how, k, drop, folder)
    scenes, clips = unseen(seed, SEEN[fast])
    found = quality(tok, clips, how == "residual")
    codes = coded(tok, clips)
    if how == "layers":
        found["psnr_top"] = psnr(decoded(tok, codes[:1]), clips).mean().item()
    if not (look or write):
        return found
    found |= {f"kept_{name}": value for name, value in read(decoded(tok, codes), scenes).items()}
    data, n = material(fast)[0], 32 if fast else 2048
    if look and not fast:
        known = corpus.scenes("base", DRAWN[fast])
        known = [known[i] for i in plain(known)[:n]]
        found |= swaps(tok, codes, scenes) | probes(tok, (scenes, codes), (known, coded(tok, corpus.clip_of(data[:n]))))
    if write:
        whole = coded(tok, corpus.clip_of(data))
        model = writer(seed, fast, tok.levels, whole, folder)
        found |= written(tok, model, tok.levels, seed, fast)
        if how == "layers" and not fast:
            plan = tok.levels[:1]
            more = written(tok, writer(seed, fast, plan, whole, folder), plan, seed, fast)
            found |= {f"plan_{name}": value for name, value in more.items()}
            found["plan_lead"] = found["plan_caption"] - found["caption"]
            found["plan_speed"] = found["seconds"] / found["plan_seconds"]
    return found


class Flowing(paper.Layers):
    """Layers where gradients do go through what a layer is told."""

    @staticmethod
    def _before(layer, z, known):
        return z if known is None else layer.told(torch.cat([z, known], 1))


def flowing(seed, fast, folder):
    """Never dropped, at 832 bits, with these gradients: VQ-VAE-2's way, from the same start."""
    torch.manual_seed(seed)
    tok = HiTVideo(levels("layers", 8), 0.0, 16, (16, 32), (1, 1), seed)
    tok.bottleneck.__class__ = Flowing
    train(tok, material(fast)[0], STEPS[fast], seed, folder / "tokenizer.safetensors", 4 if fast else BATCH)
    scenes, clips = unseen(seed, SEEN[fast])
    codes = coded(tok, clips)
    found = quality(tok, clips, False) | {"psnr_top": psnr(decoded(tok, codes[:1]), clips).mean().item()}
    return found if fast else found | swaps(tok, codes, scenes)


def wide(seed, fast, folder):
    """A flat rival at 448 bits whose book isn't tiny: 3 x 4 x 4 tokens of 645 codes."""
    torch.manual_seed(seed)
    tok = HiTVideo([Level(645, 1, 2, 12, 1, 40)], 0.0, 16, (16, 32), (1, 1), seed)
    train(tok, material(fast)[0], STEPS[fast], seed, folder / "tokenizer.safetensors", 4 if fast else BATCH)
    return quality(tok, unseen(seed, SEEN[fast])[1], False)


# --- what is decided before the run -----------------------------------------------------------------------------------------

RATES = {2: 5, 8: 20, 64: 161}  # codes below the top, and of the flat twin
ARMS = {
    **{f"layers {k}": Arm(arm, FILES if k == 8 else (), how="layers", k=k, drop=0.25, look=k == 8, write=k == 8) for k in RATES},
    **{f"flat {k}": Arm(arm, FILES if k == 20 else (), how="flat", k=k, write=k == 20) for k in RATES.values()},
    "never dropped": Arm(arm, how="layers", k=8, look=True),
    "flowing": Arm(flowing),
    "wide": Arm(wide),
    "coarse": Arm(arm, FILES, how="coarse", k=256, write=True),
    "residual": Arm(arm, how="residual", k=20),
    "long": Arm(arm, how="long", k=90),
}
KEPT, NEVER, PLAIN, WHERE = "layers 8", "never dropped", "flat 20", ("motion", "place", "count")


def over(metric: str, method: str, baseline: str, margin: float, counts: bool = True, **rest) -> Compare:
    return Compare(f"{metric}: {method} over {baseline}", metric, method, baseline, margin, counts=counts, **rest)


CLAIMS = Claims(
    "hitvideo",
    arms=ARMS,
    tests=[
        # 1: rate and distortion
        over("psnr", "layers 2", "flat 5", 0.3),
        over("psnr", "layers 2", "wide", 0.3),
        over("psnr", "layers 8", "flat 20", -0.3),
        over("psnr", "layers 64", "flat 161", -0.3),
        Compare("59 % of the bits, at most 0.5 dB", "psnr", "layers 8", "flat 161", -0.5),
        Compare("32 % of the bits, at most 0.5 dB", "psnr", "layers 2", "flat 161", -0.5, counts=False),
        *(over("psnr", "layers 8", rival, 0.0, False) for rival in ("residual", "long")),
        over("psnr", NEVER, "flat 20", 0.0, False),
        # 2: who decides
        *(Floor(f"dropping: the top decides {name}", f"swap_{name}", KEPT, at_least=0.8, counts=name in WHERE)
          for name in (*WHERE, "colour", "shape")),
        *(Floor(f"never: the top doesn't decide {name}", f"swap_{name}", NEVER, at_most=0.6) for name in WHERE),
        over("swap", KEPT, NEVER, 0.2),
        Floor("the top tells more of what is seen", "probe_lead", KEPT, at_least=0.0),
        Floor("and four times as much a bit", "probe_per_bit", KEPT, at_least=4.0, counts=False),
        over("swap", NEVER, "flowing", 0.2, False),
        over("psnr", NEVER, "flowing", 0.0, False),
        over("probe_top", KEPT, NEVER, 0.0, False),
        # 3: easier to write
        over("caption", KEPT, "flat 20", 0.05),
        over("frechet", KEPT, "flat 20", 0.05, higher=False, relative=True),
        Floor("the plan alone follows as well", "plan_lead", KEPT, at_least=-0.05, counts=False),
        Floor("the plan alone is written 5 times as fast", "plan_speed", KEPT, at_least=5.0, counts=False),
        over("caption", KEPT, "coarse", 0.0, False),
        over("psnr", KEPT, "coarse", 2.0),
        # 4: the price of dropping
        over("psnr", KEPT, NEVER, -0.3),
        over("psnr_top", KEPT, NEVER, 3.0),
    ],
    minutes=60,
    tolerance=0.1,
)
