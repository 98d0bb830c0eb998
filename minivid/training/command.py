"""The one command behind each file of shipped weights: `python -m minivid train NAME`."""

import platform
import subprocess
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..core import corpus, fit, weights
from ..core.attention import Attention
from . import generators, tokenizers, tokens
from .recipe import Recipe

EVERY = 250  # steps between two checkpoints
RECIPES: dict[str, Recipe] = {**tokenizers.RECIPES, **generators.RECIPES, **tokens.RECIPES}


def optimisers(model: nn.Module, recipe: Recipe) -> dict[str, torch.optim.Optimizer]:
    """AdamW, where norms and biases don't decay; with `recipe.muon`, Muon for the matrices inside transformer blocks.

    Muon makes the momentum of a matrix orthogonal before it steps (Jordan et al. 2024, kellerjordan.github.io/posts/muon);
    scaled as in Liu et al. 2025 (arXiv 2502.16982) it takes AdamW's decay. On `video` it halves the steps to a given loss.
    """
    attends = lambda m: isinstance(m, nn.TransformerEncoderLayer) or any(isinstance(part, Attention) for part in m.children())
    blocks = [m for m in model.modules() if attends(m)] if recipe.muon else []
    inside = {id(p): p for b in blocks for name, p in b.named_parameters() if p.ndim == 2 and name != "table"}
    rest = [p for p in model.parameters() if id(p) not in inside]
    groups = [{"params": [p for p in rest if p.ndim >= 2], "weight_decay": recipe.decay, "peak": recipe.lr},
              {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0, "peak": recipe.lr}]
    found: dict[str, torch.optim.Optimizer] = {"opt": torch.optim.AdamW(groups, recipe.lr, (0.9, 0.99), fused=True)}
    if inside:
        group = {"params": list(inside.values()), "peak": recipe.muon}
        found["muon"] = torch.optim.Muon([group], recipe.muon, recipe.decay, adjust_lr_fn="match_rms_adamw")
    return found


def multiplies(device: str) -> torch.dtype:
    """The type in which to multiply matrices: bfloat16 where the hardware does that (on CPUs with it four times as fast)."""
    cpu = torch.cpu.get_capabilities()
    return torch.bfloat16 if device == "cuda" or cpu.get("avx512_bf16") or cpu.get("amx_bf16") else torch.float32


def stepper(recipe: Recipe, steps: int, fast: torch.dtype) -> Callable:
    """One update of a recipe's model: loss, gradient (averaged over processes, clipped), the optimisers, slow copy."""

    def step(state, batch, generator):
        device = generator.device.type
        active = [part for part in state.parts.values() if isinstance(part, torch.optim.Optimizer)]
        for group in (g for part in active for g in part.param_groups):
            group["lr"] = group["peak"] * fit.cosine(state.i, steps)
        # Where a CPU multiplies tiles of bfloat16, fused attention doesn't use them; written out it is three times as fast.
        tiles = device == "cpu" and fast == torch.bfloat16 and torch.cpu.get_capabilities().get("amx_bf16")
        written_out = sdpa_kernel(SDPBackend.MATH) if tiles else nullcontext()
        with written_out, torch.autocast(device, fast, enabled=fast != torch.float32):
            losses = recipe.objective(state.model, batch, generator)
        state.model.zero_grad(set_to_none=True)
        next(iter(losses.values())).backward()
        fit.average(state.model)
        nn.utils.clip_grad_norm_(state.model.parameters(), 1.0)
        for part in active:
            part.step()
        state.ema.update(state.model, state.i)
        return losses

    return step


def train(name: str, steps: int | None = None, seed: int = 0, device: str | None = None, resume: bool = False,
          out: Path | None = None, compiled: bool = False) -> Path:
    """Make the weights `name`: train, then ship the slow copy to `out` (default: the package's weights folder).

    Under `torchrun --nproc-per-node 2 -m minivid train NAME` two processes share the batch (on two cores the fastest way).
    steps: fewer (or more) than the recipe's. resume: go on from the run's checkpoint in `runs/`; without it a run starts anew.
    compiled: join elementwise steps by torch.compile (needs a C++ compiler; a minute to begin with, then 1.4x as fast).
    Raises ValueError for an unknown name, and when a checkpoint belongs to other settings.
    """
    if name not in RECIPES:
        raise ValueError(f"no recipe called {name!r}; there are {', '.join(RECIPES)}")
    fit.processes()
    recipe, device = RECIPES[name], device or ("cuda" if torch.cuda.is_available() else "cpu")
    steps, title = steps or recipe.steps, f"{name}-{seed}" if seed else name
    torch.manual_seed(seed)  # only the initial values come from it
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    model = weights.build(recipe.kind, recipe.settings).train().to(device)
    if recipe.start:
        model.load_state_dict(weights.load(recipe.start).state_dict())
    path = corpus.runs() / f"{title}.safetensors"
    if not resume and fit.first():
        path.unlink(missing_ok=True)
    batches, began = recipe.material(device), time.time()
    if recipe.begin and not path.exists():
        recipe.begin(model, batches)
    if compiled:
        for part in model.children():
            part.compile(dynamic=False)
    fast = multiplies(device) if recipe.half or device != "cpu" else torch.float32
    state = fit.State({"model": model, **optimisers(model, recipe), "ema": fit.Ema(model)})
    note = {"name": name, "steps": steps, "settings": str(recipe.settings)}
    step = stepper(recipe, steps, fast)
    log = fit.fit(step, state, batches, steps, seed, path, EVERY, note)
    model.load_state_dict(state.ema.state_dict())
    if recipe.end:
        recipe.end(model.eval(), batches)
    made = {
        "command": f"python -m minivid train {name} --seed {seed} --steps {steps}{' --compile' * compiled}",
        "steps": steps, "batch": recipe.batch, "final": log[-1] if log else {},
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": round(time.time() - began), "resumed_from": log[0]["step"] if log else steps,
        "torch": torch.__version__, "products": str(fast).removeprefix("torch."), "commit": _commit(),
        "device": torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} x {fit.processes()}",
    }
    target = Path(out or weights.FOLDER) / f"{title}.safetensors"
    if fit.first():
        weights.save(target, model, recipe.kind, recipe.settings, made)
    return target


def _commit() -> str:
    here = Path(__file__).parent
    said = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True)
    return said.stdout.strip() or "unknown"
