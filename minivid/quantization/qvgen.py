"""QVGen: while a model learns to live with few bits, a helper carries what the bits can't say, and then fades away.

Paper:   QVGen: Pushing the Limit of Quantized Video Generative Models (2025), arXiv 2505.11497
Kind:    surgery (a trained model in, one with few bits for weights and inputs out; tuned on clips, taught by itself)
Equal:   with helpers of full rank, the float model with rounded inputs; with rank 0, ordinary quantisation-aware training
Claim:   in 3 bits, gradients 20 % smaller and a lower loss while helpers are there; 5 % less output error than the same
         training without them once they are gone, 1.15 times as many steps included; and halving their rank under an SVD, phase
         by phase, beats fading them as a whole, which beats dropping them
Differs: a video generator of 1.9 M parameters, batches of 8, hundreds of steps instead of thousands; rank 16 and five phases
         instead of 32 and six; 10 groups of times instead of 50, each an interval (in the authors' training code they are
         timestep modulo 50). Quantised are the linear layers of the blocks; time modulation, embeddings, first and last layer
         stay (their code has options for that). Weights, biases, grids and helpers of those layers learn, nothing else does.
         Offsets learn in units of weights (LSQ+ as its paper has it), not of steps, and stay real: an integer engine
         needs them rounded. The learning rate is swept, as a small model needs a larger one. Inferred: no gradient runs through
         a token's own minimum and maximum; the constants of the regret bound. After each SVD Adam starts anew for the
         helpers (the authors' code keeps moments of the old basis)

    y = Q_a(x) (Q_w(W) + L diag(gamma) R)' + bias

What is unusual here: helpers are on in training mode and off in evaluation, so what is measured is always what is shipped.
How they vanish is a function (layer, step, steps), of which the paper's is one.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..core import fit, noise
from ..core.baselines.lowrank import svd
from ..core.baselines.quant import LearnedSteps, QuantisedLinear, between, fake_quantise, minmax, quantise, search
from ..core.model import Cond
from ..core.surgery import Clock, swap

START = math.log(0.95 / 0.05)  # logit of the share of a token's range that is kept at first


@dataclass(frozen=True)
class Bits:
    """How layers are quantised. weights, inputs: bits; rank: of the helpers; groups: intervals of time with a clipping each."""

    weights: int = 3
    inputs: int = 3
    rank: int = 16
    groups: int = 10


# --- a layer ----------------------------------------------------------------------------------------------------------


class ClippedInputs(nn.Module):
    """Inputs on a grid a token, from its own minimum and maximum, each times a learnt share that depends on the diffusion time.

    clock: tells the time of the model's call; without one, or before it ticks, everything is in the first group
    """

    def __init__(self, bits: int, groups: int = 1, clock: Clock | None = None):
        super().__init__()
        self.bits, self.groups, self.clock = bits, groups, clock
        self.clip = nn.Parameter(torch.full((groups, 2), START))

    def group(self, b: int) -> Int[Tensor, "b"]:
        """Which interval of [0, 1] the time of each sample lies in; of times by frame, the mean counts."""
        t = None if self.clock is None else self.clock.t
        if t is None:
            return torch.zeros(b, dtype=torch.long, device=self.clip.device)
        if len(t) != b:
            raise ValueError(f"the model was called with {len(t)} times, this layer with {b} samples")
        return (t.reshape(b, -1).mean(1) * self.groups).long().clamp(0, self.groups - 1)

    def forward(self, x: Float[Tensor, "b *n i"]) -> Float[Tensor, "b *n i"]:
        low, high = x.detach().aminmax(dim=-1, keepdim=True)
        share = self.clip.sigmoid()[self.group(len(x))].view(len(x), *[1] * (x.ndim - 2), 2)
        return fake_quantise(x, between(low * share[..., :1], high * share[..., 1:], self.bits))


class QVLinear(nn.Module):
    """A linear layer in few bits, in training with a helper of low rank beside its weight.

    left `o r`, right `r i`: the helper's factors, None when it is gone; gamma `r`: how much of each component counts
    """

    def __init__(self, layer: nn.Linear, bits: Bits, clock: Clock | None = None):
        super().__init__()
        w = layer.weight.detach().clone()
        self.grid = LearnedSteps(search(w, minmax(w, bits.weights, 1), 1, 2.4), w.shape[1])
        self.inputs = ClippedInputs(bits.inputs, bits.groups, clock)
        self.weight = nn.Parameter(w)
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone())
        self.start = min(bits.rank, *w.shape)
        self.register_buffer("gamma", None)
        self.begin(*svd(w - self.grid(w).detach(), self.start))

    def begin(self, left: Float[Tensor, "o r"], right: Float[Tensor, "r i"]) -> None:
        """A helper of these factors, all of which counts; of rank 0, none."""
        self.left, self.right = (nn.Parameter(p) if p.numel() else None for p in (left, right))
        self.gamma = left.new_ones(left.shape[1])

    @property
    def rank(self) -> int:
        """How many components the helper has."""
        return len(self.gamma)

    @property
    def helper(self) -> Float[Tensor, "o i"]:
        """L diag(gamma) R."""
        return torch.zeros_like(self.weight) if self.left is None else (self.left * self.gamma) @ self.right

    def fade(self, u: float | int, last: int) -> None:
        """The last so many components count u."""
        self.gamma[self.rank - last :] = u

    @torch.no_grad()
    def halve(self) -> None:
        """Drop the weaker half (of one component: that one), and give the rest a basis of its own singular vectors again."""
        keep = self.rank // 2
        if not keep:
            return self.drop()
        (tall, a), (wide, b) = torch.linalg.qr(self.left[:, :keep]), torch.linalg.qr(self.right[:keep].T)
        a, b = svd(a @ b.T, keep)  # of a small matrix: rotations don't change singular values
        self.begin(tall @ a, b @ wide.T)

    def drop(self) -> None:
        """The helper is gone."""
        self.begin(self.weight[:, :0], self.weight[:0])

    def forward(self, x: Float[Tensor, "b *n i"]) -> Float[Tensor, "b *n o"]:
        w = self.grid(self.weight)
        return F.linear(self.inputs(x), w + self.helper if self.training and self.rank else w, self.bias)

    @torch.no_grad()
    def packed(self) -> QuantisedLinear:
        """What is shipped: codes, steps and offsets in fp16, and the clipping of the inputs."""
        s = self.grid.learnt  # codes by the grid as learnt: weights end up halfway between two, and fp16 decides otherwise
        return QuantisedLinear(quantise(self.weight, s), s.stored(), self.bias, self.inputs)


def layers(model: nn.Module) -> dict[str, QVLinear]:
    """The layers with few bits, by name."""
    return {name: part for name, part in model.named_modules() if isinstance(part, QVLinear)}


def quantised(model: nn.Module, names: Iterable[str], bits: Bits) -> nn.Module:
    """The model with the named linear layers in few bits; these are copies, all else is shared with the model.

    Raises ValueError where a name is no linear layer.
    """
    found, clock = {name: model.get_submodule(name) for name in names}, Clock()
    if wrong := [name for name, part in found.items() if not isinstance(part, nn.Linear)]:
        raise ValueError(f"only linear layers get few bits; these are none: {', '.join(wrong)}")
    return swap(model, {name: QVLinear(part, bits, clock) for name, part in found.items()}, clock).eval()


def shipped(model: nn.Module) -> nn.Module:
    """The model with packed layers."""
    return swap(model, {name: layer.packed() for name, layer in layers(model).items()})


# --- how helpers vanish -----------------------------------------------------------------------------------------------

Removal = Callable[[QVLinear, int, int], None]  # (layer, step, steps): called before each step, and once with step = steps


def annealed(step: int, steps: int) -> float:
    """u = (1 + cos(pi step / steps)) / 2, from 1 to 0."""
    return (1 + math.cos(math.pi * step / steps)) / 2


def ranks(r: int) -> list[int]:
    """The rank in each phase: r, half of it, ... 1."""
    return [r >> k for k in range(r.bit_length())]


def by_rank(layer: QVLinear, step: int, steps: int) -> None:
    """The paper's: in each phase the weaker half fades by a cosine, then goes, and the rest is factored anew."""
    phases = ranks(layer.start)
    if not phases:
        return
    if steps < len(phases):
        raise ValueError(f"rank {layer.start} takes {len(phases)} phases, so at least as many steps; got {steps}")
    phase, within = divmod(step, steps // len(phases))
    while layer.rank > (phases[phase] if phase < len(phases) else 0):
        layer.halve()
    if layer.rank:
        layer.fade(annealed(within, steps // len(phases)), layer.rank - layer.rank // 2)


def as_one(layer: QVLinear, step: int, steps: int) -> None:
    """The whole helper fades, evenly."""
    layer.fade(1 - step / steps, layer.rank)
    if step == steps:
        layer.drop()


def at_once(layer: QVLinear, step: int, steps: int) -> None:
    """Four fifths with the whole helper, the last fifth without."""
    if layer.rank and step >= 0.8 * steps:
        layer.drop()


def never(layer: QVLinear, step: int, steps: int) -> None:
    """The helper stays: a bound for the others, and nothing that could be shipped as it is."""


# --- training -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tuning:
    """How long and how fast. lr: of weights, biases, grids and helpers; clip: of the inputs' clipping. Cosine to 0 both."""

    steps: int = 500
    lr: float = 3e-4
    clip: float = 1e-2
    seed: int = 0

    @property
    def warm(self) -> int:
        """Steps of warm-up: a tenth."""
        return max(1, self.steps // 10)


def noised(batch: tuple, generator: torch.Generator) -> tuple:
    """A call of a video model: latents with noise at times as `video` was trained with, one caption in twenty emptied."""
    latent, words = batch
    gone = fit.uniform(len(latent), generator=generator) < 0.05
    t = noise.logit_normal(len(latent), latent.shape[2], generator, 3.0)
    eps = fit.normal(*latent.shape, generator=generator)
    return noise.flow().at(latent, eps, t), t, Cond(text=words).drop(gone)


def distil(
    student: nn.Module, teacher: nn.Module, batches: Callable, s: Tuning, removal: Removal = by_rank,
    call: Callable = noised, look: Callable[[int], object] | None = None,
) -> list[dict[str, float]]:  # fmt: skip
    """Train the student's layers of few bits to say what the float teacher says.

    batches: `batches(i)` is what `call(batch, generator)` makes the models' arguments of at step i
    look:    called as look(step) before each step and at the end
    Returns, step by step, the loss and the norm of the gradient of the *weights* alone, before it is clipped: helpers have
    gradients too, and a norm over different sets of numbers compares nothing. Raises ValueError when nothing can learn.
    """
    own, told = list(layers(student).values()), []
    if not own:
        raise ValueError("this model has no layers of few bits: make some with `quantised`")
    clips = {id(layer.inputs.clip) for layer in own}
    helpers = lambda: [p for layer in own for p in (layer.left, layer.right) if p is not None]
    gone = {id(p) for p in helpers()}
    rest = [p for layer in own for p in layer.parameters() if id(p) not in gone]
    adam = lambda groups: torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=1e-4)
    main = adam([dict(params=[p for p in rest if id(p) not in clips], rate=s.lr),
                 dict(params=[layer.inputs.clip for layer in own], rate=s.clip)])  # fmt: skip
    beside = [adam([dict(params=helpers() or [nn.Parameter(torch.zeros(()))], rate=s.lr)])]

    def remove(i: int) -> None:
        before = [layer.left for layer in own]
        for layer in own:
            removal(layer, i, s.steps)
        if helpers() and any(a is not layer.left for a, layer in zip(before, own, strict=True)):
            beside[0] = adam([dict(params=helpers(), rate=s.lr)])  # moments of the old basis would point anywhere
        if look is not None:
            look(i)

    def step(state, batch, generator):
        remove(state.i)
        args = call(batch, generator)
        with torch.no_grad():
            want = teacher(*args)
        student.zero_grad()
        loss = (student(*args) - want).square().mean()
        loss.backward()
        fit.average(student)
        norm = torch.stack([layer.weight.grad.norm() for layer in own]).norm()
        nn.utils.clip_grad_norm_([*rest, *helpers()], 1.0)
        for optimiser in (main, *beside):
            for group in optimiser.param_groups:
                group["lr"] = group["rate"] * fit.cosine(state.i, s.steps, s.warm)
            optimiser.step()
        told.append({"loss": loss.item(), "norm": norm.item()})
        return {"loss": loss}

    student.train()
    fit.fit(step, fit.State({"student": student}), batches, s.steps, s.seed)
    remove(s.steps)
    student.eval()
    return told
