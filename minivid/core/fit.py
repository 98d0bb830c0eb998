"""The one training loop.

    fit(step, state, batches, n)        step(state, batch, generator) -> losses, and it does its own updates

What is unusual here: nothing is kept outside `state` but the number of the step. Batches and random numbers are functions of
that number, so a run killed at any moment and resumed gives the weights of an uninterrupted one, and so a run on 2 processes
(`torchrun`) gives the weights of one: every rank draws the random numbers of the *whole* batch and takes its share.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm.auto import tqdm

from . import weights


class Draws(torch.Generator):
    """The generator of one step. It knows which share of the batch this process has; `normal` and `uniform` respect it."""

    rank, world = 0, 1


def draws(seed: int, i: int, device="cpu") -> Draws:
    """The generator of step i: a function of (seed, i) alone."""
    g = Draws(device=device)
    g.manual_seed((seed * 1_000_003 + i) * 2 + 1)
    if dist.is_initialized():
        g.rank, g.world = dist.get_rank(), dist.get_world_size()
    return g


def share(x: Tensor, generator: torch.Generator) -> Tensor:
    """This process's rows of a tensor that was drawn for the whole batch."""
    return x.chunk(getattr(generator, "world", 1))[getattr(generator, "rank", 0)]


def normal(b: int, *shape: int, generator: torch.Generator) -> Tensor:
    """Normal numbers `b *shape` for the b samples of this process: the same a sample, however many processes there are."""
    n = b * getattr(generator, "world", 1)
    return share(torch.randn(n, *shape, generator=generator, device=generator.device), generator)


def uniform(b: int, *shape: int, generator: torch.Generator) -> Tensor:
    """Uniform numbers in [0, 1), as `normal`."""
    n = b * getattr(generator, "world", 1)
    return share(torch.rand(n, *shape, generator=generator, device=generator.device), generator)


def average(module: nn.Module) -> None:
    """Average the gradients over processes (does nothing in one). Call it between backward and the optimiser's step."""
    if not dist.is_initialized():
        return
    grads = [p.grad for p in module.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in grads])  # one message: a hundred small ones take longer than the step
    dist.all_reduce(flat)
    for g, mean in zip(grads, (flat / dist.get_world_size()).split([g.numel() for g in grads]), strict=True):
        g.copy_(mean.view_as(g))


class Ema(nn.Module):
    """A slow copy of a model's floating-point parameters and buffers: p <- decay p + (1 - decay) p_model.

    The decay warms up as (1 + i) / (10 + i), so that the copy forgets its random start.
    """

    def __init__(self, model: nn.Module, decay: float = 0.999):
        super().__init__()
        self.decay, self.slow = decay, {k: v.detach().clone() for k, v in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, i: int) -> None:
        decay = min(self.decay, (1 + i) / (10 + i))
        new = model.state_dict()
        mine = [k for k, v in new.items() if v.is_floating_point()]
        torch._foreach_lerp_([self.slow[k] for k in mine], [new[k] for k in mine], 1 - decay)

    def state_dict(self, *args, **kwargs):
        return dict(self.slow)

    def load_state_dict(self, state, *args, **kwargs):
        for k, v in state.items():
            self.slow[k].copy_(v)


@dataclass
class State:
    """What training changes: named things with a state dict (models, optimisers, averages, schedules) and the step number."""

    parts: dict[str, Any] = field(default_factory=dict)
    i: int = 0

    def __getattr__(self, name):
        parts = self.__dict__.get("parts", {})
        if name in parts:
            return parts[name]
        raise AttributeError(f"the state has no part {name!r}; it has {sorted(parts)}")


def save(state: State, path: Path, note: dict) -> None:
    """Write the state as one safetensors file, atomically. note: what must agree before anyone resumes from it."""
    tensors, plain = {}, {"i": state.i, "note": note}
    for name, part in state.parts.items():
        _flatten(part.state_dict(), name, tensors, plain)
    weights.write(path, tensors, {"state": json.dumps(plain)})


def load(state: State, path: Path, note: dict) -> None:
    """Read what `save` wrote into a state of the same parts. Raises ValueError when the note differs or a part is missing."""
    tensors, header = weights.read(path)
    plain = json.loads(header["state"])
    if plain["note"] != note:
        said = f"it says {plain['note']}, this one {note}"
        raise ValueError(f"{path} belongs to another run: {said}. Remove it or run without --resume.")
    for name, part in state.parts.items():
        part.load_state_dict(_unflatten(name, tensors, plain))
    state.i = plain["i"]


def _flatten(x, name: str, tensors: dict, plain: dict) -> None:
    """Tensors of a nested state dict into `tensors`, everything else into `plain`, under slash-separated names."""
    if isinstance(x, Tensor):
        tensors[name] = x
    elif isinstance(x, dict):
        plain[name] = {"keys": [[k, type(k).__name__] for k in x]}
        for k, v in x.items():
            _flatten(v, f"{name}/{k}", tensors, plain)
    elif isinstance(x, (list, tuple)):
        plain[name] = {"length": len(x)}
        for k, v in enumerate(x):
            _flatten(v, f"{name}/{k}", tensors, plain)
    else:
        plain[name] = {"value": x}


def _unflatten(name: str, tensors: dict, plain: dict):
    if name in tensors:
        return tensors[name]
    if name not in plain:
        raise ValueError(f"the checkpoint has no part {name!r}")
    entry = plain[name]
    if "keys" in entry:
        key = {"int": int, "str": str}
        return {key[kind](k): _unflatten(f"{name}/{k}", tensors, plain) for k, kind in entry["keys"]}
    if "length" in entry:
        return [_unflatten(f"{name}/{k}", tensors, plain) for k in range(entry["length"])]
    return entry["value"]


def fit(
    step: Callable, state: State, batches: Callable[[int], object], n: int, seed: int = 0,
    path: Path | None = None, every: int = 200, note: dict | None = None,
) -> list[dict]:
    """Train from step state.i to step n.

    step:    `step(state, batch, generator) -> {name: loss}`; updates the state itself, calls `average` before its optimisers
    batches: `batches(i)`, the whole batch of step i, a function of i alone; tensors in it are cut to this process's share
    path:    checkpoint file; if it exists training goes on from it, every `every` steps it is replaced atomically
    note:    settings that a checkpoint must share to be resumed from
    Returns the losses of every tenth step and the last. Raises FloatingPointError as soon as a loss is not finite.
    """
    note = {"seed": seed, "n": n, **(note or {})}
    if path is not None and path.exists():
        load(state, path, note)
    device = next((p.device for m in state.parts.values() if isinstance(m, nn.Module) for p in m.parameters()), "cpu")
    log: list[dict] = []
    quiet = not first() or n < 50 or "TQDM_DISABLE" in os.environ  # which tqdm itself does not heed in a notebook
    bar = tqdm(range(state.i, n), initial=state.i, total=n, mininterval=2, disable=quiet)
    for i in bar:
        generator = draws(seed, i, device)
        losses = step(state, _cut(batches(i), generator), generator)
        state.i = i + 1
        if i % 10 == 0 or i == n - 1:
            log.append({"step": i, **{k: float(v.detach()) for k, v in losses.items()}})
            bar.set_postfix({k: f"{v:.3g}" for k, v in list(log[-1].items())[1:]}, refresh=False)
            if not all(map(torch.isfinite, map(torch.tensor, log[-1].values()))):
                raise FloatingPointError(f"step {i}: a loss is not finite: {log[-1]}; the last checkpoint is kept")
        if path is not None and first() and (state.i % every == 0 or state.i == n):
            save(state, path, note)
    return log


def _cut(batch, generator):
    if isinstance(batch, Tensor):
        return share(batch, generator)
    if isinstance(batch, dict):
        return {k: _cut(v, generator) for k, v in batch.items()}
    if isinstance(batch, (list, tuple)):
        return type(batch)(_cut(v, generator) for v in batch)
    return batch


def processes() -> int:
    """Join the others when started under `torchrun` (gloo); returns their number, 1 when alone."""
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        dist.init_process_group("gloo")
    return dist.get_world_size() if dist.is_initialized() else 1


def first() -> bool:
    """Whether this is the process that writes (the only one, or rank 0)."""
    return not dist.is_initialized() or dist.get_rank() == 0


def cosine(i: int, n: int, warm: int = 100) -> float:
    """Learning-rate factor of step i of n: a linear warm-up, then a cosine to 0."""
    done = max(0.0, (i - warm) / max(1, n - warm))
    return min(1.0, (i + 1) / warm) * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * done)).item())
