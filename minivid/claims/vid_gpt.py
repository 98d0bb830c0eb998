"""ViD-GPT from scratch on latents of `tok-f`: is the cache free, what does a long context see, what does causality cost?

Films A B A B ... of the recipe "recurrent" (one body that goes to and fro on one clock), cut so that every shot holds for 4 frames,
from the last frame of the first A on: so a chunk of l = 4 is a shot, and each shows the scene that was last seen five to eight
frames before. No words are told. All models have 1.0 M parameters (width 96, four blocks of attention in space, in time, and a
feed-forward) and the same initial values, clips (4,096) and steps (800 of 16), Muon and AdamW; a clip has 17 frames. They differ
in who sees whom along time and in the prompts that they meet: 1, 5, 9 or 13 frames, or 4 ("full, 4"). A seed is a draw of
initial values, of the order of clips and of 64 held-out films (colours of shapes in directions that training lacks), and the
noise that samples begin with. 12 steps a chunk, no guidance.

1. "speed": wall time of a chunk after 13 frames, computed anew over with a cache, 20 steps, batch 4, one thread, one run; and of
   the 24th chunk over the 4th, both with the queue full. "same": largest difference of what is made, in the latent.
2. "body_c": colour error of the body in the first made chunk after 9 true frames (B is back), with a context of c frames; "astray_c":
   its distance from where it should be, in pixels. Causal models see their own queue, full ones are shown c frames anew.
3. "mse": squared error of the output on the noisy chunk, mean over P and t = 0.2, 0.5, 0.8; prompts are shown as in generation.
   "late": colour error of the body in the 9th and 10th chunk of a rollout after 9 true frames. t' is the noise of the prompt in
   training, half as much in generation.
"""

from functools import lru_cache
from statistics import fmean

import numpy as np
import torch
from dataclasses import replace
from torch import Tensor

from minivid import world
from minivid.block_diffusion import vid_gpt as paper
from minivid.block_diffusion.vid_gpt import Anew, Queue, Shown, ViDGPT
from minivid.claims.blockvid import apart
from minivid.core import corpus, fit, noise, sample, weights
from minivid.core.model import Cond
from minivid.core.rollout import Plan, rollout
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
    model, data = ViDGPT(mode=mode), clips(fast)
    objective = lambda model, x, generator: {"loss": paper.loss(model, PATH, x, Cond(), generator, L, slight, SHIFT, lengths)}
    recipe = Recipe("video", {}, None, objective, STEPS[fast], RATES[0], muon=RATES[1])
    state = fit.State({"model": model, **optimisers(model, recipe), "ema": fit.Ema(model, 0.99)})
    batches = lambda i: data[pick(i, len(data), BATCH[fast], 80 + seed)]
    fit.fit(stepper(recipe, STEPS[fast], torch.float32), state, batches, STEPS[fast], seed, folder / "state.safetensors", 100)
    model.load_state_dict(state.ema.state_dict())
    return model.eval()
