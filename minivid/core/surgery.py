"""Surgery: reading and replacing parts of a trained model from outside, ours or anybody's.

Nothing here edits a model's code or looks at a class of ours: blocks are found by how they are held and roles by what layers
are called, so all of it works on PyTorch's own transformer too. What is unusual here: a swapped model *shares* its untouched
parts with the original, and a `Clock` tells the new parts the diffusion time of the call that they are in.
"""

import difflib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
HOLDERS = (nn.ModuleList, nn.Sequential)
CALLED = {
    "q": "q to_q q_proj query wq", "k": "k to_k k_proj key wk", "v": "v to_v v_proj value wv", "o": "o to_out o_proj out_proj wo",
    "fc1": "fc1 linear1 up_proj", "fc2": "fc2 linear2 down_proj", "mod": "mod time adaLN_modulation",
}
ROLE = {word: role for role, words in CALLED.items() for word in words.split()}


def parts(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield (name, module, role) of every block, linear and convolutional layer, in order of depth.

    role: "block" (what a list holds and has layers of its own); "q", "k", "v", "o" of attention, with "cross-" before where it
    is to other tokens; "fc1", "fc2" of a block's feed-forward; "mod" (time modulation); "attention" for PyTorch's fused one,
    whose layers are not parts, since it never calls them; "linear" or "conv" for the rest.
    """
    inside = lambda m: not isinstance(m, (*HOLDERS, nn.MultiheadAttention)) and any(True for _ in m.children())
    kinds = {type(m) for holder in model.modules() if isinstance(holder, HOLDERS) for m in holder.children() if inside(m)}
    blocks, fused = [], []
    for name, module in model.named_modules():
        if type(module) in kinds:
            blocks.append(name + ".")
            yield name, module, "block"
        elif isinstance(module, nn.MultiheadAttention):
            fused.append(name + ".")
            yield name, module, "attention"
        elif isinstance(module, LAYERS) and not name.startswith(tuple(fused)):
            yield name, module, _role(name, module, name.startswith(tuple(blocks)))


def _role(name: str, module: nn.Module, in_block: bool) -> str:
    words = [word for word in name.split(".") if not word.isdigit()]
    role = ROLE.get(words[-1]) if words and isinstance(module, nn.Linear) else None
    if role is None or role[:2] == "fc" and not in_block:
        return "linear" if isinstance(module, nn.Linear) else "conv"
    return "cross-" + role if role in "qkvo" and any(word.startswith("cross") for word in words) else role


def _part(model: nn.Module, name: str) -> nn.Module:
    modules = {name: module for name, module in model.named_modules() if name}
    if name not in modules:
        near = ", ".join(difflib.get_close_matches(name, modules, 3, 0.5)) or "none"
        raise ValueError(f"the model has no part {name!r}; nearest: {near}. `parts(model)` lists them all")
    return modules[name]


@contextmanager
def _hooked(hooks: list[tuple[nn.Module, Callable]]):
    """Hooks `(module, args, kwargs, output)` for a while, with PyTorch's fused encoder path (which calls no parts) off."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    handles = [module.register_forward_hook(hook, with_kwargs=True) for module, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        torch.backends.mha.set_fastpath_enabled(fused)


@contextmanager
def tap(model: nn.Module, names: Iterable[str]):
    """`with tap(model, names) as features: model(...)`: then features[name] is what the part said, with its graph.

    Of several calls (of the model, or of a part within one) the last counts. Raises ValueError for an unknown name.
    """
    features: dict = {}
    keep = lambda name: lambda module, args, kwargs, output: features.__setitem__(name, output)
    with _hooked([(_part(model, name), keep(name)) for name in names]):
        yield features


@torch.no_grad()
def record(model: nn.Module, batches: Iterable, inputs: dict[str, object], outputs: dict[str, object] | None = None) -> None:
    """Run the model over the batches and give what the named parts get (`inputs`) and say (`outputs`) to their accumulators.

    batches: one call each: a tuple or list of arguments, a dict of keyword arguments, or a single argument
    inputs, outputs: {name: accumulator}; an accumulator is any object with `add(x)`, x the part's first tensor
    The model runs in evaluation mode without gradient and is left as it was. Raises ValueError for an unknown name and
    for a part that no batch called.
    """
    silent = {*inputs, *(outputs or {})}

    def give(name, accumulator, of):
        def hook(module, args, kwargs, output):
            silent.discard(name)
            told = (*args, *kwargs.values()) if of is inputs else output if isinstance(output, tuple) else (output,)
            accumulator.add(next(x for x in told if isinstance(x, Tensor)))

        return _part(model, name), hook

    hooks = [give(name, accumulator, of) for of in (inputs, outputs or {}) for name, accumulator in of.items()]
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        with _hooked(hooks):
            for batch in batches:
                if isinstance(batch, dict):
                    model(**batch)
                else:
                    model(*(batch if isinstance(batch, (tuple, list)) else (batch,)))
    finally:
        for m in training:
            m.training = True
    if silent:
        raise ValueError(f"these parts were never called: {', '.join(sorted(silent))}; a fused module doesn't call what is in it")


class Gram:
    """X'X `d d` in float64, and the number of rows n. dim: the axis of channels (-1 for tokens, 1 for pictures and clips)."""

    def __init__(self, dim: int = -1):
        self.dim, self.n, self.xx = dim, 0, torch.zeros(())

    def add(self, x: Float[Tensor, "..."]) -> None:
        x = _rows(x, self.dim).double()
        self.n, self.xx = self.n + len(x), self.xx.to(x) + x.T @ x


class Range:
    """Smallest and largest value `d` of every channel. dim as in `Gram`."""

    def __init__(self, dim: int = -1):
        self.dim, self.low, self.high = dim, torch.tensor(torch.inf), torch.tensor(-torch.inf)

    def add(self, x: Float[Tensor, "..."]) -> None:
        low, high = _rows(x, self.dim).aminmax(dim=0)
        self.low, self.high = low.minimum(self.low.to(low)), high.maximum(self.high.to(high))


class Histogram:
    """How many values fall into each of `bins` equal intervals of [low, high]; what lies outside counts at the ends."""

    def __init__(self, low: float | int, high: float | int, bins: int = 256):
        if not low < high:
            raise ValueError(f"a histogram needs low < high, got {low} and {high}")
        self.low, self.high, self.counts = low, high, torch.zeros(bins, dtype=torch.long)

    def add(self, x: Float[Tensor, "..."]) -> None:
        place = (x.detach().flatten().double() - self.low) / (self.high - self.low) * len(self.counts)
        self.counts += place.long().clamp(0, len(self.counts) - 1).bincount(minlength=len(self.counts)).cpu()


def _rows(x: Tensor, dim: int) -> Tensor:
    return x.detach().movedim(dim, -1).reshape(-1, x.shape[dim])


class Clock:
    """Holds in `t` the time of the model's current call, as it was given; `swap(model, new, clock)` sets it going.

    name, place: what the model calls this argument, and where it stands when it comes without a name
    """

    def __init__(self, name: str = "t", place: int = 1):
        self.name, self.place, self.t = name, place, None

    def __call__(self, module, args, kwargs) -> None:
        self.t = args[self.place] if len(args) > self.place else kwargs.get(self.name)


def swap(model: nn.Module, new: dict[str, nn.Module | Callable], clock: Clock | None = None) -> nn.Module:
    """A model like `model` in which the named parts are others. The original stays as it is.

    new:   {name: module}, or a function in the place of a function (`"trunk.blocks.0.attention.attend"`)
    clock: the one that the new parts were given
    Untouched parts are shared with the original, so training one trains both: `copy.deepcopy` parts them. Raises
    ValueError for an unknown name, and for parts of PyTorch's fused attention, which it never calls.
    """
    modules = dict(model.named_modules())
    for name, part in new.items():
        parent, _, last = name.rpartition(".")
        if not callable(part):
            raise TypeError(f"{name!r} can be replaced by a module or a function, got a {type(part).__name__}")
        if not callable(getattr(modules.get(parent), last, None)):
            _part(model, name)  # raises
        if isinstance(modules[parent], nn.MultiheadAttention):
            raise ValueError(f"{name!r} belongs to a fused attention, which never calls it: replace {parent!r} as a whole")
    model = _swapped(model, new)
    if clock is not None:
        model.register_forward_pre_hook(clock, with_kwargs=True)
    return model


def _swapped(model: nn.Module, new: dict) -> nn.Module:
    inner: dict[str, dict] = {}
    for name, part in new.items():
        head, _, rest = name.partition(".")
        inner.setdefault(head, {})[rest] = part
    result = model.__new__(type(model))  # the same parameters and children in a module of its own
    result.__dict__ = {k: v.copy() if isinstance(v, (dict, set)) else v for k, v in model.__dict__.items()}
    result.register_forward_pre_hook(lambda *_: None)  # PyTorch's encoder takes its fused path unless something is hooked
    if hasattr(result, "use_nested_tensor"):
        result.use_nested_tensor = False
    for head, below in inner.items():
        part = below.pop("") if "" in below else getattr(result, head)
        setattr(result, head, _swapped(part, below) if below else part)
    return result
