"""What a model costs: work, weights, bytes and time, each measured rather than estimated.

Two rules run through this file. Memory is counted in live bytes of tensor storage, not in resident memory of the
process, so that a number is the same on every machine. Time is only ever a ratio of two things run alternately in one
process: a bare second on one laptop says nothing about another.

The scores of a clip (PSNR, SSIM, drift, Frechet distance ...) live in `minivid.world.scores`, the judge in
`minivid.world.judge`; both are here as `scores` and `judge`, so that one import serves a claim.
"""

import itertools
import statistics
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from minivid.world import judge, scores  # noqa: F401  handed on


def flops(fn: Callable[[], Any]) -> int:
    """Floating-point operations of one call of `fn`; a multiply-add counts as 2.

    Counted from the shapes of the matrix products, convolutions and attention calls that really ran, so a part that is
    skipped costs nothing. Elementwise work is left out, as is usual. Backward passes inside `fn` are counted too.
    """
    from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # torch counts only the GPU's kernels by itself
    formulas = {
        fused: lambda q, k, v, *rest, **named: sdpa_flop_count(q, k, v),
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
            lambda grad, q, k, v, *rest, **named: sdpa_backward_flop_count(grad, q, k, v)
        ),
    }
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        fn()
    return counter.get_total_flops()


def parameters(module: nn.Module) -> int:
    """Number of values in the module's parameters; tied weights count once, buffers don't count."""
    return sum(p.numel() for p in module.parameters())


def stored_bytes(thing: Any) -> int:
    """Bytes that `thing` takes when it is stored: what a compression claim may call its size.

    A path is the size of the file (or of all files of a folder), bytes their length, a tensor or array its elements
    times their width, a module its state dict; dicts, lists and tuples are summed. A tensor met twice counts once.

    Raises FileNotFoundError for a path that does not exist, TypeError for anything else.
    """
    return _stored(thing, set())


def _stored(thing: Any, seen: set[tuple]) -> int:
    if isinstance(thing, (str, Path)):
        path = Path(thing)
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist, so its size can't be measured.")
        return path.stat().st_size if path.is_file() else sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
    if isinstance(thing, (bytes, bytearray)):
        return len(thing)
    if isinstance(thing, nn.Module):
        return _stored(thing.state_dict(), seen)
    if isinstance(thing, Tensor):
        key = (thing.data_ptr(), thing.shape, thing.stride(), thing.dtype)
        if thing.numel() and key in seen:
            return 0
        seen.add(key)
        return thing.numel() * thing.element_size()
    if hasattr(thing, "nbytes"):  # numpy arrays and their like
        return int(thing.nbytes)
    if isinstance(thing, Mapping):
        return sum(_stored(value, seen) for value in thing.values())
    if isinstance(thing, (list, tuple)):
        return sum(_stored(value, seen) for value in thing)
    raise TypeError(
        f"stored_bytes takes a path, bytes, a tensor, an array, a module or a dict or list of them, not {type(thing).__name__}."
    )


@dataclass
class Life:
    """A storage that was born during a measured call. It is alive while operations `born` to `died` run (the first is 1)."""

    op: str  # what made it, such as "addmm"
    shape: tuple[int, ...]  # of the first tensor that looked at it
    bytes: int
    born: int
    died: int


class _Live(TorchDispatchMode):
    """Follows every storage that is born under it until it dies, and remembers the highest sum."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, Life | None] = {}  # None: was there before, as weights and inputs are
        self.lives: list[Life] = []
        self.now = self.peak = self.ops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for tensor in _tensors((args, kwargs)):
            self._follow(tensor)
        out = func(*args, **(kwargs or {}))
        self.ops += 1
        for tensor in _tensors(out):
            self._follow(tensor, func.overloadpacket.__name__)
        return out

    def _follow(self, tensor: Tensor, born_of: str = "") -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata  # one number per storage, however many views look at it
        if key in self.held:
            return
        weakref.finalize(storage, self._forget, key)
        self.held[key] = Life(born_of, tuple(tensor.shape), storage.nbytes(), self.ops, self.ops) if born_of else None
        if born_of:
            self.lives.append(self.held[key])
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)

    def _forget(self, key: int) -> None:
        life = self.held.pop(key)
        if life:
            life.died = self.ops
            self.now -= life.bytes


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_iter(tree) if isinstance(leaf, Tensor)]


def peak(fn: Callable[[], Any]) -> int:
    """Peak bytes of tensors alive at once during `fn()`, without those that existed before it (weights, inputs).

    Every operation that reaches the dispatcher is seen, in the backward pass too; a view adds nothing, an in-place
    operation adds nothing. Scratch memory inside one fused kernel is not seen: compare like with like.
    """
    with _Live() as live:
        result = fn()
    del result
    return live.peak


def allocated(fn: Callable[[], Any]) -> int:
    """The same peak as PyTorch's own profiler sees it, in bytes: with the scratch memory inside kernels. A check on `peak`."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        result = fn()
    del result
    found = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(found, key=lambda event: event.start_ns())), default=0)


def lives(fn: Callable[[], Any]) -> list[Life]:
    """What `peak` adds up, tensor by tensor in order of birth: who was alive while what ran. What `fn` returns outlives it."""
    with _Live() as live:
        result = fn()
    for life in live.held.values():
        if life:
            life.died = live.ops
    found = live.lives
    del result
    return found


def live_bytes(found: Sequence[Life]) -> list[int]:
    """Bytes alive while each operation ran, from the first that allocated to the last; the highest is the peak."""
    change = [0] * (max((life.died for life in found), default=0) + 2)
    for life in found:
        change[life.born] += life.bytes
        change[life.died + 1] -= life.bytes
    return list(itertools.accumulate(change[1:-1]))


def saved_for_backward(fn: Callable[[], Any]) -> int:
    """Bytes of the distinct storages that autograd keeps for the backward pass of what `fn()` computes.

    Parameters are not counted: they are in memory anyway. A storage kept by several operations counts once, and it
    counts whole even where only a slice of it is needed, because the slice keeps all of it alive.
    """
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        root = tensor if tensor._base is None else tensor._base
        if not isinstance(root, nn.Parameter):
            kept[tensor.untyped_storage()._cdata] = tensor.detach()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        fn()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@dataclass(frozen=True)
class Ratio:
    """How many times as long `a` takes as `b`: the median over interleaved runs, and its quartiles."""

    median: float
    low: float
    high: float
    runs: tuple[tuple[float, float], ...]  # seconds of (a, b), pair by pair
    threads: int

    def __str__(self) -> str:
        return f"{self.median:.2g}x ({self.low:.2g}-{self.high:.2g}, {len(self.runs)} runs, {self.threads} threads)"


def ratio(a: Callable[[], Any], b: Callable[[], Any], repeats: int = 7) -> Ratio:
    """Time of `a()` divided by time of `b()`, from `repeats` pairs of alternating runs after one warm-up each.

    Alternating is the point: a machine that slows down for a second slows both. On one thread the processor's own time is
    counted, which other programs don't lengthen; on several, the time on the wall. A speed-up is ratio(baseline, method).
    Raises ValueError for fewer than 5 repeats, of which a median would say too little.
    """
    if repeats < 5:
        raise ValueError(f"ratio needs at least 5 repeats for its median to mean something, got {repeats}.")
    a(), b()
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    runs = tuple((_seconds(a, clock), _seconds(b, clock)) for _ in range(repeats))
    low, middle, high = statistics.quantiles([x / y for x, y in runs], n=4, method="inclusive")
    return Ratio(middle, low, high, runs, torch.get_num_threads())


def _seconds(fn: Callable[[], Any], clock: Callable[[], float]) -> float:
    start = clock()
    fn()
    return max(clock() - start, 1e-9)
