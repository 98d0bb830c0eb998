"""The one command behind each file of shipped weights: `python -m minivid train NAME`."""

import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from ..core import corpus, fit, weights
from . import generators, tokenizers, tokens
from .recipe import Recipe

EVERY = 250  # steps between two checkpoints
RECIPES: dict[str, Recipe] = {**tokenizers.RECIPES, **generators.RECIPES, **tokens.RECIPES}


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

    Under `torchrun --nproc-per-node 2 -m minivid train NAME` two processes share the batch (on two cores the fastest way).
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
    model = weights.load(recipe.start) if recipe.start else weights.build(recipe.kind, recipe.settings)
    model = model.requires_grad_(True).train().to(device)
    path = corpus.runs() / f"{title}.safetensors"
    if not resume and fit.first():
        path.unlink(missing_ok=True)
    batches, began = recipe.material(device), time.time()
    if recipe.begin and not path.exists():
        recipe.begin(model, batches)
    state = fit.State({"model": model, "opt": optimiser(model, recipe), "ema": fit.Ema(model)})
    note = {"name": name, "steps": steps, "settings": str(recipe.settings)}
    step = stepper(recipe, steps, torch.bfloat16 if device == "cuda" else None)
    log = fit.fit(step, state, batches, steps, seed, path, EVERY, note)
    model.load_state_dict(state.ema.state_dict())
    if recipe.end:
        recipe.end(model.eval(), batches)
    made = {
        "command": f"python -m minivid train {name} --seed {seed} --steps {steps}", "steps": steps, "batch": recipe.batch,
        "parameters": sum(p.numel() for p in model.parameters()), "final": log[-1] if log else {},
        "seconds": round(time.time() - began), "resumed_from": log[0]["step"] if log else steps,
        "torch": torch.__version__, "commit": _commit(),
        "device": torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} x {fit.processes()}",
    }
    target = Path(out or weights.FOLDER) / f"{title}.safetensors"
    if fit.first():
        weights.save(target, model, recipe.kind, recipe.settings, made)
    return target


def _commit() -> str:
    said = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return said.stdout.strip() or "unknown"
