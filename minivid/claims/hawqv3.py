"""HAWQ-V3: does an integer network say what its simulation says, and do bits shared out by curvature cost less loss than others?

Numbers. A million random accumulators and factors; `changed_w` is the share (in %) of int8 codes that a multiplier of w bits
changes, beside round(M acc) in float64.

Network. A seed trains a frame autoencoder of its own: 600 steps in floating point, then 200 on grids, norms folded half way.
`differ` counts the output codes, of `codes` million on held-out frames, in which the integer network and the same network
simulated in float64 differ, `hidden` all codes of hidden layers; `changed_w` is the share (in %) of output codes that multipliers
of w bits change, `float32` that by which a simulation in float32 differs. `psnr` is in dB to the frames; `psnr_gap` between
integers and simulation. "float" is the trained network before its grids.

Bits. On `video` a seed is a draw of clips, times and noise; in "small models" each seed also trains a generator (width 64, 400
steps). Bits are 2, 3, 4 or 8 for each linear layer of the six blocks and the shared modulation, rounded to nearest, one step a
row; q, k, v of a block are tied, as they are one product. Budgets: size and bit operations of 4 bits everywhere, a modelled
latency a quarter of the way from there to 8 bits everywhere. `rise_how` is by how much the flow matching loss of 32 held-out
clips grows at fixed times and noise, `error_how` |y - y'|^2 / |y|^2 of the outputs. Ways: "omega" (the program with curvature, by
32 probes on 16 training clips), "errors" (the same without curvature), "uniform" (4 bits), "greedy" (lower bits where the loss,
measured layer by layer on 32 training clips, rises least for the room) and "measured" (the program with those measured rises).
200 random allocations use up the same budgets: `beaten_by` is the share of them that are better than "omega", `spearman` the rank
correlation of predicted and true rise over the first 100. `negative` counts layers with a trace below 0. `integer_how`: the rise
when linear layers also run on 8-bit activations and integers, all at 8 bits or as "omega" says.

Outcome: the arithmetic holds to the last code: of 7 million output codes, at 8 and at 4 bits, not one differs from the
simulation, nor any hidden one; multipliers of 16 bits change 3.4 and 0.5 % of them, those of 8 bits 43 and 71 %, and a
simulation in float32 is itself off in up to 0.1 %. After 200 steps on their grids, which the float network did not have,
8 bits are 0.54 dB above it and 4 bits level with it: at equal training 4 bits are 0.57 dB under 8. Bits by curvature: on
`video` they cost 17 % less loss than 4 bits everywhere under the same three budgets, 5 % less than the program fed with
measured rises and 6 % less than the greedy search; without curvature the program finds nothing better than 4 bits everywhere.
Random allocations lose by far, even the luckiest of 200, so they are no rival. On the small generators the gain over 4 bits
everywhere is lost in the draws (-3 to 7 %). Ranks of predicted and true rise agree to 0.50 on `video`, where 0.7 was asked
for, and to 0.89 on the small generators.
"""

import copy
from dataclasses import dataclass
from functools import lru_cache

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from minivid import world
from minivid.core import corpus, fit, noise, text, weights
from minivid.core.baselines.quant import allocate
from minivid.core.model import Cond
from minivid.core.surgery import record
from minivid.lab.claims import Arm, Claims, Compare, Floor
from minivid.quantization import hawqv3 as paper
from minivid.training.command import multiplies, optimisers, stepper
from minivid.training.generators import generate_loss
from minivid.training.recipe import Recipe, pick
from minivid.world.scores import psnr

FILES = [f"minivid/weights/{name}.safetensors" for name in ("video", "tok-v")]
WIDTHS = (8, 12, 16, 31)

# --- numbers ------------------------------------------------------------------------------------------------------------


def numbers(seed, fast):
    dice, n = torch.Generator().manual_seed(seed), 2**14 if fast else 2**20
    real = 10 ** (-6 + 5 * torch.rand(n, generator=dice, dtype=torch.float64))
    acc = ((torch.rand(n, generator=dice, dtype=torch.float64) * 2 - 1) * 128 / real).round().long()
    want = torch.floor(acc * real + 0.5)
    changed = lambda width: (paper.rescale(acc, paper.dyadic(real, width)) != want).double().mean().item()
    return {f"changed_{width}": 100 * changed(width) for width in WIDTHS}


# --- network ------------------------------------------------------------------------------------------------------------


def frames(seed: int, n: int, split: str) -> Tensor:
    """All frames of n clips of the world, `b 3 h w`."""
    return world.batch(corpus.scenes("base", n, 30_000 + seed, split), 32, 16).movedim(1, 2).flatten(0, 1)


@torch.enable_grad()
def train(net: paper.Network, data: Tensor, steps: int, lr: float, seed: int, fold_at: int | None = None) -> paper.Network:
    """Mean squared error on batches of 32 frames, in place; batch norms are folded at a step."""
    optimiser = torch.optim.AdamW(net.parameters(), lr, weight_decay=0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda i: min(1, (i + 1) / 20) * (1 - i / steps))
    net.train()
    for i in range(steps):
        if i == fold_at:
            paper.fold(net)
        x = data[pick(i, len(data), 32, seed)]
        optimiser.zero_grad()
        (net(x) - x).square().mean().backward()
        optimiser.step(), schedule.step()
    return net.eval()


@lru_cache(2)
def in_floats(seed: int, fast: bool) -> tuple[paper.Network, Tensor]:
    """A network trained without grids, and its frames."""
    torch.manual_seed(seed)
    data = frames(seed, 4 if fast else 96, "train")
    return train(paper.Network(), data, 8 if fast else 600, 4e-3, seed), data


def hidden_codes(model: nn.Module, call) -> list[Tensor]:
    """What the layers within say during a call, in order."""
    said: list[Tensor] = []
    names = ("first", "one", "join", "pool", "narrow", "widen", "more")
    hooks = [getattr(model, name).register_forward_hook(lambda part, args, out: said.append(out)) for name in names]
    call()
    for hook in hooks:
        hook.remove()
    return said


@torch.no_grad()
def network(seed, fast, bits):
    held = frames(seed, 1 if fast else 24, "held-out")
    plain, data = in_floats(seed, fast)
    if bits is None:
        return {"psnr": psnr(plain(held), held).mean().item()}
    steps = 6 if fast else 200
    net = train(paper.quantise_all(copy.deepcopy(plain), bits), data, steps, 1e-3, 1000 + seed, steps // 2)
    exact, x = copy.deepcopy(net).double(), held.double()
    grids = [getattr(exact, name).out.steps.step for name in ("first", "one", "join", "pool", "narrow", "widen", "more", "last")]
    want, said = [], {}
    want += hidden_codes(exact, lambda: said.update(simulation=exact(x)))
    codes = torch.round(said["simulation"] / grids[-1])
    engines = {width: exact.integer(width) for width in WIDTHS}
    enters = engines[31].enter(x)
    ran = hidden_codes(engines[31], lambda: said.update(integers=engines[31](enters)))
    hidden = sum((torch.round(a / step) != b).sum().item() for a, step, b in zip(want, grids[:-1], ran, strict=True))
    changed = {f"changed_{w}": 100 * (engine(enters) != codes).double().mean().item() for w, engine in engines.items()}
    single = torch.round(net(held) / net.last.out.steps.step)
    near, same = psnr(engines[31].leave(said["integers"]), x).mean(), psnr(said["simulation"], x).mean()
    return changed | {
        "codes": codes.numel() / 1e6, "differ": (said["integers"] != codes).sum().item(), "hidden": hidden,
        "float32": 100 * (single != codes).double().mean().item(), "psnr": near.item(), "psnr_gap": (near - same).abs().item(),
    }  # fmt: skip


# --- bits ---------------------------------------------------------------------------------------------------------------

OPTIONS = (2, 3, 4, 8)
RHO = {"size": 0.0, "bops": 0.0, "latency": 0.25}
STEPS, CLIPS = 400, 1024  # of a small model's training


def calls(seed: int, n: int, split: str) -> list:
    """One call of n clips with times, noise and emptied captions as in training, and what the model should say."""
    asked = corpus.scenes("base", n, 31_000 + seed, split)
    tok, dice, path = weights.load("tok-v"), fit.draws(seed, n), noise.flow()
    with torch.no_grad():
        x = tok.encode(world.batch(asked, 32, 17))
    t = noise.logit_normal(n, x.shape[2], dice, 2.0)
    eps, gone = fit.normal(*x.shape, generator=dice), fit.uniform(n, generator=dice) < 0.1
    cond = Cond(text=text.tokens([world.caption(scene) for scene in asked])).drop(gone)
    return [(path.at(x, eps, t), t, cond), path.target(x, eps, t)]


def first(call: list, n: int) -> list:
    """The same for its first n clips."""
    (x, t, cond), target = call
    return [(x[:n], t[:n], Cond(text=cond.text[:n])), target[:n]]


@dataclass
class Bench:
    """A model, its layers in groups that are tied, their budgets, and what it is measured on."""

    model: nn.Module
    names: list[str]
    groups: list[list[int]]  # numbers of layers
    limits: list[tuple[Tensor, float]]
    train: list
    held: list

    @classmethod
    def of(cls, model: nn.Module, seed: int, fast: bool) -> "Bench":
        train, held = (calls(seed, 2 if fast else 32, split) for split in ("train", "held-out"))
        names = [name for name, part in model.named_modules()
                 if isinstance(part, nn.Linear) and name.startswith("trunk.blocks.0" if fast else ("trunk.", "mod"))]  # fmt: skip
        tied: dict[str, list[int]] = {}
        for i, name in enumerate(names):  # q, k, v of self-attention; of attention to words k and v alone, as q sees other rows
            above, _, last = name.rpartition(".")
            whole = last in ("k", "v") or last == "q" and above.endswith("attention")
            tied.setdefault(above + ".qkv" if whole else name, []).append(i)
        rows = {name: paper.Rows() for name in names}
        record(model, [train[0]], rows)
        numbers = [model.get_submodule(name).weight.numel() for name in names]
        use = paper.Use.of(numbers, [n * rows[name].n for n, name in zip(numbers, names, strict=True)], OPTIONS)
        limits = [(getattr(use, what), paper.limit(getattr(use, what), OPTIONS, rho)) for what, rho in RHO.items()]
        return cls(model, names, list(tied.values()), limits, train, held)

    @property
    def ties(self) -> tuple[tuple[int, int], ...]:
        return tuple(pair for group in self.groups for pair in zip(group, group[1:], strict=False))

    def bits(self, choice: Tensor) -> dict[str, int]:
        """Bits by name, from the option of each layer; the first and last layer of all keep 8."""
        ends = {"inlet.project": 8, "head.project": 8}
        return ends | {name: OPTIONS[k] for name, k in zip(self.names, choice.tolist(), strict=True)}

    def spread(self, by_group: list[int]) -> Tensor:
        """The option of each layer, from that of each group."""
        choice = torch.zeros(len(self.names), dtype=torch.long)
        for group, k in zip(self.groups, by_group, strict=True):
            choice[group] = k
        return choice

    def fits(self, by_group: list[int]) -> bool:
        at = self.spread(by_group)[:, None]
        return all(use.gather(1, at).sum().item() <= most * (1 + 1e-9) for use, most in self.limits)

    def filled(self, by_group: list[int], order: list[int]) -> list[int]:
        """Bits raised, in this order of groups and round after round, wherever the budgets allow it."""
        raised = True
        while raised:
            raised = False
            for g in order:
                more = [k + (i == g) for i, k in enumerate(by_group)]
                if more[g] < len(OPTIONS) and self.fits(more):
                    by_group, raised = more, True
        return by_group


@torch.no_grad()
def loss(model: nn.Module, call: list) -> float:
    return (model(*call[0]) - call[1]).double().square().mean().item()


def drawn(b: Bench, dice: torch.Generator) -> list[int]:
    """A random allocation that keeps the budgets and leaves nothing of them over."""
    n = len(b.groups)
    choice = torch.randint(len(OPTIONS), (n,), generator=dice).tolist()
    while not b.fits(choice):
        g = int(torch.randint(n, (1,), generator=dice))
        choice[g] = max(choice[g] - 1, 0)
    return b.filled(choice, torch.randperm(n, generator=dice).tolist())


def rises(b: Bench) -> Tensor:
    """By how much the training clips' loss rises when one group alone gets few bits, `g k`."""
    before = loss(b.model, b.train)
    alone = lambda group, bits: paper.allocated(b.model, {b.names[i]: bits for i in group})
    return torch.tensor([[loss(alone(group, bits), b.train) - before for bits in OPTIONS] for group in b.groups])


def greedy(b: Bench, cost: Tensor) -> list[int]:
    """From 8 bits everywhere, one option down wherever that costs least for the room it makes; what is left over is used."""
    choice = [len(OPTIONS) - 1] * len(b.groups)
    size = torch.stack([b.limits[0][0][group].sum(0) for group in b.groups])
    while not b.fits(choice):
        price = lambda g: ((cost[g, choice[g] - 1] - cost[g, choice[g]]) / (size[g, choice[g]] - size[g, choice[g] - 1])).item()
        lowest = min((g for g in range(len(choice)) if choice[g]), key=price)
        choice[lowest] -= 1
    return b.filled(choice, sorted(range(len(choice)), key=lambda g: -(cost[g, choice[g]] / size[g, choice[g]]).item()))


def ways(b: Bench, seed: int, fast: bool) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """The option of each layer by every way, Omega, and the traces."""
    call = first(b.train, 2 if fast else 16)
    objective = lambda: (b.model(*call[0]) - call[1]).square().mean()
    trace = paper.curvature(objective, b.model, b.names, torch.Generator().manual_seed(seed), 1 if fast else 32)
    matrices = [b.model.get_submodule(name).weight.detach() for name in b.names]
    omega, squares = paper.sensitivity(trace, matrices, OPTIONS), paper.squares(matrices, OPTIONS)
    by_group = rises(b)
    measured = torch.zeros_like(omega)
    measured[[group[0] for group in b.groups]] = by_group.double()  # ties carry it to the others
    costs = {"omega": omega, "errors": squares, "measured": measured}
    choices = {how: allocate(cost, b.limits, b.ties) for how, cost in costs.items()}
    uniform = torch.full((len(b.names),), OPTIONS.index(4))
    return choices | {"uniform": uniform, "greedy": b.spread(greedy(b, by_group))}, omega, trace


def compared(model: nn.Module, seed: int, fast: bool) -> dict[str, float]:
    b = Bench.of(model, seed, fast)
    before, dice, at = loss(model, b.held), torch.Generator().manual_seed(seed), lambda choice: choice[:, None]
    choices, omega, trace = ways(b, seed, fast)
    rise = lambda choice: loss(paper.allocated(model, b.bits(choice)), b.held) - before
    found = {f"rise_{how}": rise(choice) for how, choice in choices.items()}
    with torch.no_grad():
        said = model(*b.held[0])
        errors = {f"error_{how}": paper.allocated(model, b.bits(choice))(*b.held[0]) - said for how, choice in choices.items()}
    found |= {name: (gap.square().sum() / said.square().sum()).item() for name, gap in errors.items()}
    random = [b.spread(drawn(b, dice)) for _ in range(6 if fast else 200)]
    true = torch.tensor([rise(choice) for choice in random], dtype=torch.float64)
    predicted = [omega.gather(1, at(choice)).sum().item() / 2 for choice in random]
    for how, choice in (("omega", choices["omega"]), ("all8", torch.full((len(b.names),), OPTIONS.index(8)))):
        found[f"integer_{how}"] = loss(paper.integer_layers(model, b.bits(choice), [b.train[0]]), b.held) - before
    ours = found["rise_omega"]
    under = {f"under_{how}": 1 - ours / found[f"rise_{how}"] for how in ("uniform", "errors", "measured")}
    return found | under | {
        "rise_random": true.median().item(), "rise_luckiest": true.min().item(),
        "beaten_by": (true < ours).double().mean().item(), "under_random": 1 - ours / true.median().item(),
        "over_greedy": ours / max(found["rise_greedy"], 1e-6),  # a search without any rise must not look weak
        "spearman": spearmanr(predicted[:100], true[:100].tolist()).statistic, "scale": sum(predicted) / true.sum().item(),
        "negative": (trace < 0).sum().item(), "loss": before,
    }  # fmt: skip


def video(seed, fast):
    return compared(weights.load("video"), seed, fast)


def small(seed, fast, folder):
    """A small generator, trained as `video` is; in the fast form random, with open gates."""
    torch.manual_seed(seed)
    settings = dict(channels=10, d=64, heads=2)
    model = weights.build("video", settings)
    if fast:
        for p in model.parameters():
            nn.init.normal_(p, std=0.2)
        return compared(model.eval().requires_grad_(False), seed, fast)
    data = corpus.latents(weights.load("tok-v"), f"base-{CLIPS}x17x32", corpus.clips("base", CLIPS, 32, 17))
    words = corpus.captions("base", CLIPS)

    def batches(i):
        rows = pick(i, CLIPS, 32, seed)
        return data[rows].float(), words[rows]

    recipe = Recipe("video", settings, lambda device: batches, generate_loss(2.0), STEPS, 3e-3, 32, muon=1e-2)
    state = fit.State({"model": model, **optimisers(model, recipe), "ema": fit.Ema(model)})
    fit.fit(stepper(recipe, STEPS, multiplies("cpu")), state, batches, STEPS, seed, folder / "model.safetensors", 100)
    model.load_state_dict(state.ema.state_dict())
    return compared(model.eval().requires_grad_(False), seed, fast)


# --- what is decided before the run -------------------------------------------------------------------------------------

ARMS = {
    "numbers": Arm(numbers),
    "float": Arm(network, bits=None), "W8A8": Arm(network, bits=8), "W4A4": Arm(network, bits=4),
    "video": Arm(video, FILES), "small models": Arm(small, FILES[1:]),
}  # fmt: skip


def floor(arm: str, metric: str, what: str, counts: bool = True, **bound: float) -> Floor:
    return Floor(f"{arm}: {what}", metric, arm, counts=counts, **bound)


def bits(arm: str) -> list[Floor]:
    return [
        # 2: allocations
        floor(arm, "beaten_by", "curvature beats 95 % of random allocations", at_most=0.05),
        floor(arm, "under_random", "curvature under the median random allocation", at_least=0.0),
        floor(arm, "under_uniform", "curvature no worse than 4 bits everywhere", at_least=0.0),
        floor(arm, "over_greedy", "curvature at most twice the measured greedy search", at_most=2.0),
        floor(arm, "under_errors", "curvature under weight errors alone", counts=False, at_least=0.0),
        floor(arm, "under_measured", "curvature under the program with measured rises", counts=False, at_least=0.0),
        # 3: additivity
        floor(arm, "spearman", "costs add up", at_least=0.7),
        floor(arm, "spearman", "costs add up at all", counts=False, at_least=0.4),
    ]


CLAIMS = Claims(
    "hawqv3",
    arms=ARMS,
    tests=[
        # 1: integers
        floor("numbers", "changed_31", "none changes at 31 bits", at_most=0.0),
        *(floor(arm, "differ", "no output code differs", at_most=0.0) for arm in ("W8A8", "W4A4")),
        *(floor(arm, "psnr_gap", "the same PSNR", at_most=1e-6) for arm in ("W8A8", "W4A4")),
        *(floor(arm, "codes", "a million codes at least", at_least=1.0) for arm in ("W8A8", "W4A4")),
        *(floor(arm, "hidden", "no hidden code differs", counts=False, at_most=0.0) for arm in ("W8A8", "W4A4")),
        Compare("W8A8 as good as float", "psnr", "W8A8", "float", -0.5, counts=False),
        Compare("W4A4 as good as float", "psnr", "W4A4", "float", -1.0, counts=False),
        *bits("video"), *bits("small models"),
    ],
    minutes=30,
    tolerance=0.1,
)  # fmt: skip
