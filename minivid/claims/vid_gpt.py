"""ViD-GPT from scratch on latents of `tok-f`: is the cache free, what does a long context see, what does causality cost?

Films A B A B ... of the recipe "recurrent" (one body that goes to and fro on one clock), cut so that every shot holds for 4
frames, from the last frame of the first A on: so a chunk of l = 4 is a shot, and each shows the scene that was last seen five
to eight frames before. No words are told. All models have 1.0 M parameters (width 96, four blocks of attention in space, in
time, and a feed-forward) and the same initial values, clips (4,096) and steps (800 of 16), Muon and AdamW; a clip has 17
frames. They differ in who sees whom along time and in the prompts that they meet: 1, 5, 9 or 13 frames, or 4 ("full, 4"). A
seed is a draw of initial values, of the order of clips and of 64 held-out films (colours of shapes in directions that training
lacks), and the noise that samples begin with. 12 steps a chunk, no guidance.

1. "speed": wall time of a chunk after 13 frames, computed anew over with a cache, 20 steps, batch 4, one thread, one run; and of
   the 24th chunk over the 4th, both with the queue full. "same": largest difference of what is made, in the latent.
2. "body_c": colour error of the body in the first made chunk after 9 true frames (B is back), with a context of c frames;
   "astray_c": its distance from where it should be, in pixels. Causal models see their own queue, full ones are shown c frames
   anew. "body", "astray": with the largest context that the model was trained for; "forgets": body_4 over body.
3. "mse": squared error of the output on the noisy chunk, mean over P and t = 0.2, 0.5, 0.8; prompts are shown as in generation.
   "late": colour error of the body in the 9th and 10th chunk of a rollout after 9 true frames. t' is the noise of the prompt in
   training, half as much in generation.

Outcome: the cache is free and the past is used, but noise on the prompt is no remedy here. Cached and computed anew differ by
2e-6; a chunk is 2.7 times as fast (4.0 in frames), the 24th as fast as the 4th. When B is back, a causal model with 13 frames
errs by 0.14 in the body's colour, one of the last four frames by 0.45 (it goes on with the colour that it sees, so it is
right in every second chunk without knowing anything), and the same causal model with a queue of 4 by 0.42. Causality costs
what the paper gives up: the noisy chunk is told 18 % better with full attention, 17 % better if only the chunk's own frames
see each other. Yet it isn't paid for in memory: full and partial models bring the body back worse (0.21) than the causal one,
in every seed; perhaps frames of a chunk that see each other agree with each other first, and with the past afterwards. All
lose the scene: ten chunks on the error is 0.35, with hardly a difference between levels of the prompt's noise (0, 0.1, 0.25:
0.33, 0.34, 0.37); whoever errs hands it on, and B is only known from what was made of it. Places come back less well than
colours (5.8 of 11.4 pixels).
"""

import math
from dataclasses import replace
from functools import lru_cache
from statistics import fmean

import numpy as np
import torch
from torch import Tensor

from minivid import world
from minivid.block_diffusion import vid_gpt as paper
from minivid.block_diffusion.vid_gpt import Anew, Queue, Shown, ViDGPT
from minivid.claims.blockvid import apart
from minivid.core import corpus, fit, noise, sample, weights
from minivid.core.model import Cond
from minivid.core.rollout import Plan, denoise, remember, rollout
from minivid.lab import measure
from minivid.lab.claims import Arm, Claims, Compare, Floor
from minivid.training.command import optimisers, stepper
from minivid.training.recipe import Recipe, pick
from minivid.world.judge import read_many

FILES = ["minivid/weights/tok-f.safetensors"]
L, ROOM, FRAMES, GIVEN, MADE = 4, 13, 17, 9, 10
STEPS, TRAIN, FILMS, K, BATCH = (800, 2), (4096, 8), (64, 1), (12, 1), (16, 2)  # full, fast
RATES, SHIFT = (2e-3, 1e-2), 3.0  # of AdamW, of Muon
PATH = noise.flow()
loaded = lru_cache(None)(weights.load)


# --- films ----------------------------------------------------------------------------------------------------------------


def quick(index: int, seed: int = 0, split: str = "train"):
    """A B A B ...: its shots hold for 4 frames."""
    film = world.draw(seed, index, "recurrent", split)
    return replace(film, cuts=tuple(replace(cut, start=L * i) for i, cut in enumerate(film.cuts[:2])), period=2 * L)


def drawn(index: int) -> np.ndarray:
    return corpus.bytes_of(world.batch([quick(index)], 32, FRAMES, L - 1))[0].numpy()


@lru_cache(1)
def clips(fast: bool) -> Tensor:
    n = TRAIN[fast]
    data = corpus.by_all_cores(f"quick-{n}x{FRAMES}", (n, 3, FRAMES, 32, 32), drawn, list(range(n)), np.uint8)
    return corpus.latents(loaded("tok-f"), f"quick-{n}x{FRAMES}", data.numpy()).float()


@lru_cache(2)
def held(seed: int, fast: bool, frames: int = GIVEN + L * MADE) -> tuple[Tensor, Tensor]:
    """Held-out films `n 3 f 32 32` and their latents."""
    films = [quick(i, 7000 + seed, "held-out") for i in range(FILMS[fast])]
    clip = world.batch(films, 32, frames, L - 1)
    with torch.no_grad():
        return clip, torch.cat([loaded("tok-f").encode(part) for part in clip.split(8)])


# --- training -------------------------------------------------------------------------------------------------------------


def trained(seed, fast, folder, mode, slight, lengths):
    """As every arm is trained; a killed run goes on from its checkpoint."""
    torch.manual_seed(seed)
    model, lengths = ViDGPT(mode=mode), lengths or paper.prompts(FRAMES, L)
    data = clips(fast)[:, :, : max(lengths) + L]
    objective = lambda model, x, generator: {"loss": paper.loss(model, PATH, x, Cond(), generator, lengths, slight, SHIFT)}
    recipe = Recipe("video", {}, None, objective, STEPS[fast], RATES[0], muon=RATES[1])
    state = fit.State({"model": model, **optimisers(model, recipe), "ema": fit.Ema(model, 0.99)})
    batches = lambda i: data[pick(i, len(data), BATCH[fast], 80 + seed)]
    fit.fit(stepper(recipe, STEPS[fast], torch.float32), state, batches, STEPS[fast], seed, folder / "state.safetensors", 100)
    model.load_state_dict(state.ema.state_dict())
    return model.eval()


@torch.no_grad()
def denoising(model, x: Tensor, slight: float) -> float:
    """Mean squared error on the noisy chunk, over prompts and three times, the same noise for all models."""
    shown, errors = Shown(model, PATH, slight / 2), []
    for P in paper.prompts(FRAMES, L):
        clean = x[:, :, : P + L]
        eps = sample.start(len(x), clean.shape[1:], 50 + P)
        for at in (0.2, 0.5, 0.8):
            t = torch.full((len(x), P + L), at)
            t[:, :P] = 0
            out = shown(torch.where((t == 0)[:, None, :, None, None], clean, PATH.at(clean, eps, t)), t, Cond())
            errors.append((out - PATH.target(clean, eps, t))[:, :, P:].square().mean().item())
    return fmean(errors)


# --- what is made -----------------------------------------------------------------------------------------------------------


def plan(steps: int, room: int, cached: bool) -> Plan:
    table = noise.table(steps, L, SHIFT)
    return Plan(PATH, table) if cached else Plan(PATH, table, write="none", context=paper.past(room))


@torch.no_grad()
def made(model, x: Tensor, chunks: int, seed: int, room: int, slight: float, steps: int, given: int = GIVEN) -> Tensor:
    """Latents of films of which so many true frames are given; causal models cache them, full ones see them anew."""
    cached = model.trunk.mode != "full"
    shown = Shown(model, PATH, slight / 2, seed)
    ends = sample.start(len(x), (4, L * chunks, *x.shape[3:]), seed).split(L, 2)
    first = x[:, :, :given].split([1] + [L] * (given // L), 2)
    return rollout(shown if cached else Anew(shown), plan(steps, room, cached), ends, Cond(), Queue(room) if cached else None,
                   first=first)  # fmt: skip


@torch.no_grad()
def drawn_as(latent: Tensor) -> Tensor:
    return torch.cat([loaded("tok-f").decode(part) for part in latent.split(16)])


def seen(latent: Tensor, truth: Tensor) -> tuple[float, float]:
    """Colour error of the body, and how far it is from where it should be (pixels, where it is seen in both)."""
    clip, gaps = drawn_as(latent), []
    for one, other in zip(read_many(clip), read_many(truth), strict=True):
        if len(one.bodies) and len(other.bodies):
            gaps.append((one.bodies[0].path - other.bodies[0].path).norm(dim=-1).nanmean().item())
    return apart(clip, truth)[:, 0].mean().item(), float(np.nanmean(gaps or [np.nan]))


def arm(seed, fast, folder, mode="causal", slight=0.1, lengths=(), contexts=(4, 8, 13)):
    model, (truth, x) = trained(seed, fast, folder, mode, slight, tuple(lengths)), held(seed, fast)
    found = {} if lengths else {"mse": denoising(model, x, slight)}
    for room in contexts:
        latent = made(model, x, 1, seed, room, slight, K[fast])[:, :, GIVEN:]
        body, astray = seen(latent, truth[:, :, GIVEN : GIVEN + L])
        found |= {f"body_{room}": body, f"astray_{room}": astray}
    found |= {"body": body, "astray": astray, "forgets": found[f"body_{contexts[0]}"] / body}
    chunks = 2 if fast else MADE
    latent = made(model, x, chunks, seed, contexts[-1], slight, K[fast])
    for i in range(chunks):
        part = slice(GIVEN + L * i, GIVEN + L * (i + 1))
        found[f"at {i:02d}"] = seen(latent[:, :, part], truth[:, :, part])[0]
    return found | {"late": (found[f"at {chunks - 2:02d}"] + found[f"at {chunks - 1:02d}"]) / 2}


# --- time -------------------------------------------------------------------------------------------------------------------


def filled(model, x: Tensor, chunks: int) -> Queue:
    """The queue after a frame and so many chunks."""
    cache = Queue(ROOM)
    for i in range(chunks + 1):
        told = Cond(start=1 + L * (i - 1) if i else 0)
        cache.open(i - 1, told)
        remember(model, x[:, :, 1 : 1 + L] if i else x[:, :, :1], 0.0, told, cache)
        cache.close(i - 1)
    return cache


def speed(seed, fast):
    """Models of random values: what is computed doesn't depend on them."""
    torch.manual_seed(seed)
    model, steps = ViDGPT(d=32, depth=1) if fast else ViDGPT(), 2 if fast else 20
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn(p.shape))
    x = sample.start(1 if fast else 4, (4, ROOM + L, 8, 8), seed)
    whole = lambda cached: rollout(shown if cached else Anew(shown), plan(steps, ROOM, cached), x[:, :, 1:].split(L, 2), Cond(),
                                   Queue(ROOM) if cached else None, first=[x[:, :, :1]])  # fmt: skip
    shown = Shown(model.eval(), PATH, 0.05, seed)
    with torch.no_grad():
        same = (whole(True) - whole(False)).abs().max().item()
        queues = {i: filled(shown, x, i) for i in (4, 24)}
        how, past = plan(steps, ROOM, True), paper.past(ROOM)(x[:, :, :ROOM], Cond(start=1 + 4 * L))

        def chunk(i):
            cache, told = Queue(ROOM), Cond(start=1 + L * i)
            cache.kept = {layer: list(entries) for layer, entries in queues[i].kept.items()}
            cache.open(i, told)
            remember(shown, denoise(shown, how, 0, x[:, :, -L:], told, cache), 0.0, told, cache)
            cache.close(i)

        anew = lambda: denoise(Anew(shown), how, 0, x[:, :, -L:], past)
        faster, flat = measure.ratio(anew, lambda: chunk(4), 5), measure.ratio(lambda: chunk(24), lambda: chunk(4), 5)
    return {"same": same, "faster": faster.median, "24th over 4th": flat.median, "bound": (ROOM + L) * steps / (L * (steps + 1))}


# --- what is decided before the run -------------------------------------------------------------------------------------

USES = [*FILES]
ARMS = {
    "causal": Arm(arm, USES, mode="causal"),
    "partial": Arm(arm, USES, mode="partial"),
    "full": Arm(arm, USES, mode="full"),
    "full, 4": Arm(arm, USES, mode="full", lengths=[4], contexts=[4]),
    "no noise": Arm(arm, USES, mode="causal", slight=0.0),
    "more noise": Arm(arm, USES, mode="causal", slight=0.25),
    "speed": Arm(speed),
}


def better(metric, method, baseline, margin, counts=True, relative=True):
    return Compare(f"{metric}: {method} under {baseline}", metric, method, baseline, margin, False, relative, counts)


CLAIMS = Claims(
    "vid-gpt",
    arms=ARMS,
    tests=[
        # 1: the cache
        Floor("the cache changes nothing", "same", "speed", at_most=1e-4),
        Floor("a cached chunk is half as much faster as its frames promise", "faster", "speed", at_least=2.0),
        Floor("a chunk costs the same late in the film", "24th over 4th", "speed", at_most=1.1),
        # 2: a scene that comes back
        better("body", "causal", "full, 4", 0.3),
        better("body", "causal", "full", -0.1),
        better("astray", "causal", "full, 4", 0.1, False),
        better("body", "full", "full, 4", 0.3, False),
        Floor("with a queue of 4 the same model forgets", "forgets", "causal", at_least=1.4, counts=False),
        # 3: the price of causality, and the prompt's noise
        better("mse", "partial", "causal", 0.01),
        better("mse", "full", "causal", 0.01, False),
        better("body", "partial", "causal", -0.1, False),
        better("late", "causal", "no noise", 0.05),
        better("late", "more noise", "no noise", 0.05, False),
        better("mse", "no noise", "causal", 0.0, False),
        better("late", "causal", "full", -0.1, False),
    ],
    minutes=60,
    tolerance={"faster": math.inf, "24th over 4th": math.inf},
)
