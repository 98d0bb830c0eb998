"""The shared weights and the one command that makes each: `python -m minivid train NAME`.

A recipe says which model, on what, for how many steps. Everything runs on two CPU cores, resumably; on a GPU the same
command is some hundred times faster, and the header of every shipped file says where it ran and for how long.
"""

import os
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import world
from . import corpus, fit, noise, weights
from .model import Cond
from .zoo import BUILDERS


@dataclass(frozen=True)
class Recipe:
    """How one file of shipped weights is made.

    kind, settings: what the model is (see zoo)
    material:       `material(device) -> batches`, where `batches(i)` is the batch of step i
    objective:      `objective(model, batch, generator) -> {name: loss}`; the first is minimised
    steps, batch, lr: length, clips a step, peak learning rate (warm-up, then cosine to 0)
    start:          shipped weights to begin from, instead of from random ones
    """

    kind: str
    settings: dict
    material: Callable
    objective: Callable
    steps: int
    lr: float = 1e-3
    batch: int = 64
    decay: float = 0.01
    start: str | None = None
    notes: dict = field(default_factory=dict)


def pick(i: int, n: int, batch: int, seed: int = 0) -> Tensor:
    """Which of n samples the step i sees: `batch` numbers, a function of (seed, i) alone."""
    return torch.randint(n, (batch,), generator=torch.Generator().manual_seed(seed * 1_000_003 + i))


# ---------------------------------------------------------------------------------------------------- tokenizers

SEEN = ("base", "textured", "varied", "camera", "light", "recurrent")  # worlds that the tokenizers learn to draw


def clip_material(batch: int, frames: int, every: int | None = None) -> Callable:
    """Batches of 32 x 32 crops: half world at 32 px, a quarter world at 64 px, a quarter natural clips and panned photographs.

    every: None for whole clips of 17 frames, or how many frames to keep of each (a per-frame tokenizer needs no neighbours)
    """

    def material(device):
        small = [corpus.clips(r, 1024, 32, frames) for r in SEEN]
        large = [corpus.clips(r, 256, 64, frames) for r in SEEN]
        real = [corpus.natural(1024, size, frames) for size in (32, 64)]
        pools = [torch.from_numpy(np.concatenate([np.asarray(a) for a in g])).to(device) for g in (small, large)]
        pools += [torch.from_numpy(np.array(a)).to(device) for a in real]
        parts = (batch // 2, batch // 4, batch // 8, batch // 8)

        def batches(i):
            dice = torch.Generator().manual_seed(i)
            out = []
            for pool, n in zip(pools, parts, strict=True):
                chosen = pool[torch.randint(len(pool), (n,), generator=dice).to(device)]
                y, x = (int(torch.randint(s - 31, (1,), generator=dice)) for s in chosen.shape[-2:])
                chosen = chosen[..., y : y + 32, x : x + 32]
                if every:
                    chosen = chosen[:, :, torch.randint(frames, (every,), generator=dice).to(device)]
                out.append(corpus.clip_of(chosen))
            return torch.cat(out)

        return batches

    return material


def reconstruct(model, clip: Tensor, generator) -> dict[str, Tensor]:
    """Tokenizer loss: L1, squared error (what PSNR counts) and L1 of the spatial differences (edges)."""
    back, _, extra = model(clip, generator)
    error = back - clip
    edges = sum((error.diff(dim=d)).abs().mean() for d in (-1, -2))
    parts = {"l1": error.abs().mean(), "mse": error.square().mean(), "edges": edges, **extra}
    total = parts["l1"] + 4 * parts["mse"] + 0.5 * edges + sum(extra.values())
    return {"loss": total, "mse": parts["mse"]}


# ------------------------------------------------------------------------------------------------------ features


def labelled(batch: int, n: int = 8192) -> Callable:
    """Clips of 16 frames with what the feature networks are asked: per colour, presence, shape, velocity."""

    def material(device):
        clips = torch.from_numpy(np.array(corpus.clips("base", n, 32, 17))).to(device)
        labels = torch.stack([_answers(s) for s in corpus.scenes("base", n)]).to(device)

        def batches(i):
            rows = pick(i, n, batch, 5).to(device)
            return corpus.clip_of(clips[rows]), labels[rows]

        return batches

    return material


def _answers(scene) -> Tensor:
    """One row a colour: presence, shape number, velocity x and y in sides per 16 frames."""
    rows = torch.zeros(len(world.COLOURS), 4)
    for body in scene.bodies:
        rows[list(world.COLOURS).index(body.colour)] = torch.tensor(
            [1.0, list(world.SHAPES).index(body.shape), 16 * body.legs[0].vx, 16 * body.legs[0].vy]
        )
    return rows


def recognise(model, batch, generator) -> dict[str, Tensor]:
    """Presence by logistic loss; shape and velocity only of the bodies that are there. A little noise and blur keeps it honest."""
    clip, labels = batch
    clip = clip + 0.1 * fit.uniform(len(clip), 1, 1, 1, 1, generator=generator) * torch.randn_like(clip)
    said = model.answers(clip)
    there = labels[..., 0] > 0
    presence = F.binary_cross_entropy_with_logits(said[..., 0], labels[..., 0])
    shape = F.cross_entropy(said[..., 1:-2][there], labels[..., 1][there].long())
    speed = F.smooth_l1_loss(said[..., -2:][there], labels[..., 2:][there])
    return {"loss": presence + 0.5 * shape + speed, "shape": shape, "speed": speed}


# ---------------------------------------------------------------------------------------------------- generators


def told(tokenizer: str, recipe: str, n: int, frames: int, batch: int, size: int = 32) -> Callable:
    """Latents of n clips of a recipe with their short captions."""

    def material(device):
        tok = weights.load(tokenizer, device)
        name = f"{recipe}-{n}x{frames}x{size}"
        data = corpus.latents(tok, name, corpus.clips(recipe, n, size, frames), device).to(device)
        words = corpus.captions(recipe, n).to(device)

        def batches(i):
            rows = pick(i, n, batch, 7).to(device)
            return data[rows].float(), words[rows]

        return batches

    return material


def generate_loss(shift: float = 1.0) -> Callable:
    """Flow matching with one time a clip, one caption in ten emptied (for guidance)."""

    def objective(model, batch, generator):
        latent, words = batch
        b, _, f = latent.shape[:3]
        dropped = fit.uniform(b, generator=generator) < 0.1
        t = fit.normal(b, 1, generator=generator).sigmoid()
        t = (shift * t / (1 + (shift - 1) * t)).expand(b, f)
        eps = fit.normal(*latent.shape, generator=generator)
        return {"loss": noise.loss(model, noise.flow(), latent, t, Cond(text=words).drop(dropped), eps).mean()}

    return objective


TOK_V = dict(channels=10, time_stride=4)
TOK_F = dict(channels=4, time_stride=1)
TOK_Q = dict(channels=4, time_stride=1, levels=[4, 4, 4, 4], noise=0.0)

RECIPES: dict[str, Recipe] = {
    "tok-v": Recipe("tokenizer", TOK_V, clip_material(16, 17), reconstruct, 5000, 2e-3, 16),
    "tok-f": Recipe("tokenizer", TOK_F, clip_material(16, 17, every=4), reconstruct, 5000, 2e-3, 16),
    "tok-q": Recipe("tokenizer", TOK_Q, clip_material(16, 17, every=4), reconstruct, 5000, 2e-3, 16),
    "feat-a": Recipe("features", dict(time=1), labelled(32), recognise, 2500, 2e-3, 32),
    "feat-b": Recipe("features", dict(time=3, widths=[24, 40, 56]), labelled(32), recognise, 2500, 2e-3, 32),
    "video": Recipe("video", dict(channels=10), told("tok-v", "base", 24576, 17, 32), generate_loss(), 8000, 1.5e-3, 32),
}


# -------------------------------------------------------------------------------------------------- the one command


def optimiser(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW; norms, biases and tables don't decay."""
    flat = [p for p in model.parameters() if p.ndim < 2]
    full = [p for p in model.parameters() if p.ndim >= 2]
    groups = [{"params": full, "weight_decay": recipe.decay}, {"params": flat, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.99), fused=True)


def stepper(recipe: Recipe, steps: int, fast: torch.dtype | None) -> Callable:
    """One update of a recipe's model: loss, gradient (averaged over processes, clipped), AdamW, slow copy."""

    def step(state, batch, generator):
        for group in state.opt.param_groups:
            group["lr"] = recipe.lr * fit.cosine(state.i, steps)
        with torch.autocast(generator.device.type, fast, enabled=fast is not None):
            losses = recipe.objective(state.model, batch, generator)
        state.opt.zero_grad(set_to_none=True)
        next(iter(losses.values())).backward()
        fit.average(state.model)
        nn.utils.clip_grad_norm_(state.model.parameters(), 1.0)
        state.opt.step()
        state.ema.update(state.model, state.i)
        return losses

    return step


def train(name: str, steps: int | None = None, seed: int = 0, device: str | None = None, resume: bool = False,
          out: Path | None = None) -> Path:
    """Make the weights `name`: train, then ship the slow copy to `out` (default: the package's weights folder).

    Under `torchrun --nproc-per-node 2 -m minivid train NAME` the batch is shared by two processes (on two cores the fastest way).
    steps: fewer (or more) than the recipe's. resume: go on from the run's checkpoint in `runs/`; without it a run starts anew.
    Raises ValueError for an unknown name, and when a checkpoint belongs to other settings.
    """
    if name not in RECIPES:
        raise ValueError(f"no recipe called {name!r}; there are {', '.join(RECIPES)}")
    fit.processes()
    recipe, device = RECIPES[name], device or ("cuda" if torch.cuda.is_available() else "cpu")
    steps, title = steps or recipe.steps, f"{name}-{seed}" if seed else name
    torch.manual_seed(seed)  # only the initial values come from it
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    model = weights.load(recipe.start) if recipe.start else BUILDERS[recipe.kind](**recipe.settings)
    model = model.requires_grad_(True).train().to(device)
    state = fit.State({"model": model, "opt": optimiser(model, recipe), "ema": fit.Ema(model)})
    path = Path(os.environ.get("MINIVID_RUNS", "runs")) / f"{title}.safetensors"
    if not resume and fit.first():
        path.unlink(missing_ok=True)
    batches, began, first = recipe.material(device), time.time(), state.i
    note = {"name": name, "steps": steps, "settings": str(recipe.settings)}
    log = fit.fit(stepper(recipe, steps, torch.bfloat16 if device == "cuda" else None), state, batches, steps, seed, path, 250, note)
    model.load_state_dict(state.ema.state_dict())
    made = {
        "command": f"python -m minivid train {name}" + (f" --seed {seed}" if seed else "") + (f" --steps {steps}" if steps != recipe.steps else ""),
        "steps": steps, "batch": recipe.batch, "seconds": round(time.time() - began), "resumed_from": first,
        "device": torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__, "commit": _commit(), "final": log[-1] if log else {}, "parameters": sum(p.numel() for p in model.parameters()),
    }
    target = Path(out or weights.FOLDER) / f"{title}.safetensors"
    if fit.first():
        weights.save(target, model, recipe.kind, recipe.settings, made)
    return target


def _commit() -> str:
    said = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return said.stdout.strip() or "unknown"
