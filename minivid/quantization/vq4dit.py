"""VQ4DiT: groups of weights become codewords, and each group learns which of its nearest ones it wants.

Paper:   VQ4DiT: Efficient Post-Training Vector Quantization for Diffusion Transformers (2024), arXiv 2408.17131
Kind:    surgery (a trained model in, one of codewords and indices out; calibrated without data)
Equal:   the model, where there are as many codewords as different groups; with one candidate, classic codebook tuning
Claim:   at 2.1 bits, codebooks counted, 15 % less output error than GPTQ at 2.12 to 2.5 bits, and less than GPTQ with tuned
         steps; two or three candidates 10 % less than one at equal steps; calibration on the model's own trajectories within
         10 % of one on real clips
Differs: a video generator of 1.9 M parameters, no guidance, 500 steps of 2 clips instead of up to 1000 runs of 50 steps; k = 128
         codewords a layer, for at this size the paper's 256 cost 0.7 bits a weight. The time modulation, one layer for all
         blocks here, is quantised as the authors' are. Inferred: both losses are means over numbers, the ratio loss over all
         groups of all layers; what hasn't settled at the end takes its largest ratio; codebooks are then rounded to fp16. The
         student's blocks run end to end, as in the authors' code (the text suggests each gets the float block's input). Text and
         code disagree on more, and both are here: `Settings.released` is the code's form, which does better. Codebooks and
         biases learn at 3e-3 (paper: 1e-4) and lambda_r is 100 (1), both from trials

    w ~ sum_j r_j C[a_j],   r = softmax(z),   a_1 ... a_n: the n codewords nearest to w

What is unusual here: the float model walks its own sampling trajectory, and `calibrate` sees nothing but what its blocks say
there, pairs (call, outputs), so anything with trainable numbers can be calibrated by the same loop: other candidates, other
data, the steps of an even grid.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..core import noise
from ..core.baselines.quant import CodebookLinear
from ..core.baselines.vq import kmeans, nearest
from ..core.surgery import parts, swap, tap

SURE, DONE, FAR = 0.99, 0.99, 1e4  # a group freezes beyond this ratio, a layer beyond this share; logit of what is frozen
Pair = tuple[tuple, list[Tensor]]  # arguments of a call of the model, and what its blocks said to it


@dataclass(frozen=True)
class Settings:
    """How layers are cut and calibrated.

    d, k:     weights in a group, codewords in a book (as far as `limit` allows)
    n:        candidates of each group; 1 moves the codebook alone
    shared:   one codebook for all layers of a role (all queries, all fc1 ...), not one a layer
    released: as the authors' code has it: ratios start at 1 / distance (not equal), a codebook learns only after its layers
              have settled (not from the first step), and L_r = n mean r(1-r) over what isn't frozen counts only in steps in
              which it rose (not: mean 1 - |2r - 1|, always)
    quick, slow: learning rates of logits, and of codebooks and biases
    weight:   lambda_r, of the ratio loss
    again:    every so many steps the groups take the nearest codewords anew (0: never; only where n is 1)
    """

    d: int = 4
    k: int = 128
    n: int = 2
    shared: bool = False
    released: bool = False
    quick: float = 5e-2
    slow: float = 1e-4
    weight: float | int = 1.0
    again: int = 0

    def __post_init__(self):
        if self.again and self.n > 1:
            raise ValueError(f"groups with {self.n} candidates choose by themselves: `again` is for n = 1")


def groups(w: Float[Tensor, "o i"], d: int) -> Float[Tensor, "m d"]:
    """The weight's rows cut into groups of d."""
    if w.shape[1] % d:
        raise ValueError(f"rows of {w.shape[1]} weights can't be cut into groups of {d}: take a divisor")
    return w.reshape(-1, d)


def limit(k: int, m: int) -> int:
    """The largest power of two that is at most k and at most a quarter of the m groups (1 at least)."""
    return 1 << (max(1, min(k, m // 4)).bit_length() - 1)


def candidates(x: Float[Tensor, "m d"], codes: Float[Tensor, "k d"], n: int) -> Int[Tensor, "n m"]:
    """The n codewords nearest to each group, the nearest in the first row."""
    if not 1 <= n <= len(codes):
        raise ValueError(f"a book of {len(codes)} codewords offers 1 to {len(codes)} candidates, not {n}")
    first = nearest(x, codes)[:, None]  # so that n = 1 is k-means' own choice, ties included
    far = torch.cat([torch.cdist(p, codes) for p in x.split(4096)]).scatter(1, first, torch.inf)
    return torch.cat([first, far.topk(n - 1, largest=False).indices], 1).T.contiguous()


def ratio_loss(r: Float[Tensor, "n m"], released: bool = False) -> Float[Tensor, ""]:
    """L_r: 0 where all ratios are 0 or 1, most where they are even."""
    return len(r) * (r * (1 - r)).mean() if released else (1 - (2 * r - 1).abs()).mean()


# --- a layer ----------------------------------------------------------------------------------------------------------


class VQLinear(nn.Module):
    """A linear layer whose weight is made of codewords: of a mixture of candidates at first, of one each when settled.

    codes: `k d`, which other layers may share; options: candidates `n m` of the groups; z: logits `n m`, None when settled;
    index: `m`, the codewords taken once settled; frozen: `m`, which groups have made up their minds
    """

    def __init__(self, linear: nn.Linear, codes: nn.Parameter, n: int = 2, released: bool = False):
        super().__init__()
        w = linear.weight.detach()
        self.shape, self.codes, self.whole = w.shape, codes, w  # the float weights are the model's own, and not stored
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().clone())
        x = groups(w, codes.shape[1])
        options = candidates(x, codes.detach(), n)
        self.register_buffer("options", options), self.register_buffer("index", options[0].clone())
        self.register_buffer("frozen", torch.zeros(len(x), dtype=torch.bool))
        start = torch.zeros(n, len(x))
        if released:
            far = (x - codes.detach()[options]).norm(dim=-1)
            start = (far[-1].clamp_min(1e-5) / (far + 1e-5)).log()
            start[-1] = 0
        self.z = nn.Parameter(start) if n > 1 else None

    @property
    def settled(self) -> bool:
        """Whether every group is one codeword."""
        return self.z is None

    @property
    def ratios(self) -> Float[Tensor, "n m"]:
        """How much of each candidate is in a group's weights."""
        return torch.ones_like(self.index, dtype=self.codes.dtype)[None] if self.z is None else self.z.softmax(0)

    @property
    def weight(self) -> Float[Tensor, "o i"]:
        """The weights that codewords and ratios stand for."""
        if self.z is None:
            return self.codes.index_select(0, self.index).reshape(self.shape)
        each = (r[:, None] * self.codes.index_select(0, a) for r, a in zip(self.ratios, self.options, strict=True))
        return sum(each, torch.zeros(())).reshape(self.shape)

    @torch.no_grad()
    def freeze(self) -> None:
        """Groups with a ratio beyond SURE stay with it; when DONE of them do, the layer settles."""
        if self.z is None:
            return
        top, at = self.ratios.max(0)
        self.frozen |= top > SURE
        one = torch.zeros_like(self.z).scatter(0, at[None], FAR)
        self.z.copy_(torch.where(self.frozen, one, self.z))
        if self.frozen.float().mean() > DONE:
            self.settle()

    @torch.no_grad()
    def settle(self) -> None:
        """Every group takes the candidate of its largest ratio; ratios are gone."""
        if self.z is not None:
            self.index.copy_(self.options.gather(0, self.z.argmax(0, keepdim=True))[0])
            self.z = None

    def plain(self) -> nn.Linear:
        """An ordinary layer of the same weights, parted from the codebook."""
        linear = nn.utils.skip_init(nn.Linear, self.shape[1], self.shape[0], bias=self.bias is not None)
        linear.weight = nn.Parameter(self.weight.detach().clone())
        linear.bias = None if self.bias is None else nn.Parameter(self.bias.detach().clone())
        return linear

    def forward(self, x: Float[Tensor, "*n i"]) -> Float[Tensor, "*n o"]:
        return F.linear(x, self.weight, self.bias)


def layers(model: nn.Module) -> dict[str, VQLinear]:
    """The layers of codewords of a model, by name."""
    return {name: part for name, part in model.named_modules() if isinstance(part, VQLinear)}


def books(
    model: nn.Module, names: Sequence[str], s: Settings, generator: torch.Generator, rounds: int = 100
) -> dict[str, Float[Tensor, "k d"]]:
    """The codebook of each named linear layer, by k-means++ and Lloyd's rounds; layers that share one get the same tensor.

    Raises ValueError where a name is no linear layer.
    """
    role = {name: role for name, _, role in parts(model)}
    found = {name: model.get_submodule(name) for name in names}
    if wrong := [name for name, part in found.items() if not isinstance(part, nn.Linear)]:
        raise ValueError(f"only linear layers are cut into groups; these are none: {', '.join(wrong)}")
    together: dict[str, list[str]] = {}
    for name in names:
        together.setdefault(role[name] if s.shared else name, []).append(name)
    made = {}
    for some in together.values():
        x = torch.cat([groups(found[name].weight.detach(), s.d) for name in some])
        made |= dict.fromkeys(some, kmeans(x, limit(s.k, len(x)), generator, rounds)[0])
    return made


def quantised(model: nn.Module, codes: dict[str, Float[Tensor, "k d"]], s: Settings) -> nn.Module:
    """The model with layers made of codewords, from `books`, which are copied; all else is shared with the model."""
    own = {id(book): nn.Parameter(book.detach().clone()) for book in codes.values()}
    return swap(model, {name: VQLinear(model.get_submodule(name), own[id(book)], min(s.n, len(book)), s.released)
                        for name, book in codes.items()})  # fmt: skip


def shipped(model: nn.Module) -> nn.Module:
    """The model with its settled layers packed: numbers of log2 k bits, and codebooks in fp16, a shared one kept once."""
    own = layers(model)
    half = {layer.codes: layer.codes.detach().half() for layer in own.values()}
    return swap(model, {name: CodebookLinear(a.shape, a.index, half[a.codes], a.bias) for name, a in own.items()})


def bits(model: nn.Module) -> dict[str, float]:
    """Bits a weight, over all layers of codewords: of the indices, of the codebooks (fp16, shared ones once), and in all."""
    own = layers(model).values()
    books, weights = {id(layer.codes): layer.codes for layer in own}, sum(layer.shape.numel() for layer in own)
    index = sum(len(layer.index) * (len(layer.codes) - 1).bit_length() for layer in own) / weights
    book = 16 * sum(codes.numel() for codes in books.values()) / weights
    return {"index": index, "codebook": book, "total": index + book}


# --- calibration ------------------------------------------------------------------------------------------------------


def walk(
    model: nn.Module, x: Float[Tensor, "b c f h w"], cond: Any, times: Float[Tensor, "steps f"], blocks: Sequence[str],
    path: noise.Path = noise.flow(),
) -> Iterator[Pair]:
    """Sample with the model from noise x, and hand out each of its calls with what its blocks said: data from nothing.

    The way is the float model's own: whoever learns from it is teacher-forced, so its errors never pile up.
    """
    for t, s in zip(times[:-1], times[1:], strict=True):
        call = x, t.expand(len(x), -1), cond
        said, out = heard(model, call, blocks)
        yield call, said
        x = noise.remix(path, x, path.clean(x, t, out), t, s)


@torch.no_grad()
def heard(model: nn.Module, call: tuple, blocks: Sequence[str]) -> tuple[list[Tensor], Any]:
    """What the blocks say to a call, and what the model does."""
    with tap(model, blocks) as features:
        out = model(*call)
    return [features[name] for name in blocks], out


def block_loss(model: nn.Module, pair: Pair, blocks: Sequence[str]) -> Float[Tensor, ""]:
    """L_d: mean squared difference to what the float model's blocks said, averaged over the blocks."""
    call, said = pair
    with tap(model, blocks) as features:
        model(*call)
    return torch.stack([(features[name] - one).square().mean() for name, one in zip(blocks, said, strict=True)]).mean()


def calibrate(
    student: nn.Module, pairs: Iterable[Pair], blocks: Sequence[str], s: Settings, look: Callable | None = None
) -> list[dict[str, float]]:
    """One step of RMSprop for each pair; at the end all groups have settled and codebooks hold fp16 values.

    student: from `quantised`, or any model with something to learn. look: called as look(step) before each step.
    Returns both losses and the share of frozen groups, step by step. Raises ValueError when nothing can learn.
    """
    own = list(layers(student).values())
    logits = [layer.z for layer in own if layer.z is not None]
    rest = [p for p in student.parameters() if p.requires_grad and not any(p is z for z in logits)]
    if not logits and not rest:
        raise ValueError("nothing in this model can learn: its layers are frozen, or `quantised` was given no names")
    optimiser = torch.optim.RMSprop([dict(params=logits, lr=s.quick), dict(params=rest, lr=s.slow)], alpha=0.9)
    before, told = float("inf"), []
    for step, pair in enumerate(pairs):
        if look is not None:
            look(step)
        if s.released:
            _wait(own)
        apart = block_loss(student, pair, blocks)
        undecided = _ratio_loss(own, s.released)
        counts = not s.released or undecided.item() > before
        before = undecided.item()
        optimiser.zero_grad()
        (apart + s.weight * undecided if counts else apart).backward()
        optimiser.step()
        for layer in own:
            layer.freeze()
        if s.again and (step + 1) % s.again == 0:
            for layer in own:
                layer.index.copy_(nearest(groups(layer.whole, s.d), layer.codes.detach()))
        frozen = sum(len(a.index) if a.settled else int(a.frozen.sum()) for a in own) / max(1, sum(len(a.index) for a in own))
        told.append({"apart": apart.item(), "ratios": before, "frozen": frozen})
    for layer in own:
        layer.settle()
        layer.codes.data = layer.codes.data.half().to(layer.codes)
    return told


def _ratio_loss(own: Sequence[VQLinear], released: bool) -> Tensor:
    """Over all groups, those of settled layers (at 0) included; as released, over those that aren't frozen."""
    open_ = [layer for layer in own if not layer.settled]
    if not open_:
        return torch.zeros(())
    if released:
        r = torch.cat([layer.ratios[:, ~layer.frozen] for layer in open_], 1)
        return ratio_loss(r, True) if r.numel() else torch.zeros(())
    r = torch.cat([layer.ratios for layer in open_], 1)
    return ratio_loss(r) * r.shape[1] / sum(len(layer.index) for layer in own)


def _wait(own: Sequence[VQLinear]) -> None:
    """A codebook learns when all layers that read it have settled."""
    waits = {layer.codes for layer in own if not layer.settled}
    for layer in own:
        layer.codes.requires_grad_(layer.codes not in waits)


def agreement(g: Float[Tensor, "m d"], index: Int[Tensor, "m"], k: int) -> Float[Tensor, "k"]:
    """Mean cosine between the gradients of any two groups that share a codeword: 1 all pull one way, 0 no common way.

    With unit vectors u of c groups it is (|sum u|^2 - c) / (c (c - 1)), so no pair is ever formed. NaN for fewer than two.
    """
    u = F.normalize(g, dim=-1)
    total = u.new_zeros(k, u.shape[1]).index_add_(0, index, u)
    c = u.new_zeros(k).index_add_(0, index, (u.norm(dim=-1) > 0).to(u))
    return torch.where(c > 1, (total.square().sum(-1) - c) / (c * (c - 1)), torch.nan)


def pulls(student: nn.Module, pairs: Iterable[Pair], blocks: Sequence[str]) -> dict[str, Float[Tensor, "m d"]]:
    """dL_d / dw of every group, by layer: where each would go if it were free."""
    own = layers(student)
    free = {name: layer.plain() for name, layer in own.items()}
    model = swap(student, free)
    for pair in pairs:
        block_loss(model, pair, blocks).backward()
    return {name: groups(free[name].weight.grad, layer.codes.shape[1]) for name, layer in own.items()}
