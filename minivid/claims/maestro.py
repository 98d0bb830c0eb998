"""Maestro: do ordered terms become SVD and PCA, does an ordered model stand cutting, and are found ranks better than even ones?

"svd", "pca": one linear layer without bias in factors. SVD: y = A x, A 16 x 16, singular values 0.85^i, x uniform in the unit
ball (64 a step; "exact": the expected loss). PCA: pictures of digits (64-d) say themselves through 16 terms. "angle" is the
largest principal angle in degrees between the first b columns and the true ones, at the worst b whose singular value is 10 %
above the next ("any": at the worst of all; for digits b <= 8).
"excess" is the error of A cut to 8 terms, relative to the best, less 1. 5,000 steps of Adam with a cosine. "plain" has full width
at every step.

"small": a generator of two blocks, width 64, 20 tokens, trained from scratch on 2,048 clips, 800 steps of 32; all arms have the
same clips, times, noise and rate. A share is that of the numbers in the twenty matrices of attention, attention to words and
feed-forward; the rest stays. "loss_50" is the flow matching loss on 256 held-out clips when every matrix is cut to half of its
numbers at no retraining ("loss_100": none is). "dense" is cut by the SVD whitened by inputs, its "svd_50" by the plain one.
"greedy_50": ranks found by `greedy` on 64 further training clips, for the ordered and the whitened dense alike. "factors" has
full width at every step.

"ranks": training with lasso and shrinking, "found" (strength 0.3: in trials of 150 steps on seed 0, 1.0 left 56 % and was still
falling, 0.3 all); then, at the same steps, a fresh model in factors with one share for all ("uniform") at no fewer numbers, one
with the found ranks ("again"), a dense one of width 48, with as many numbers x steps in all as Maestro, at most twice the
steps ("narrow"). "over_uniform" is by what share of uniform's loss found's is lower, "worked" the mean of numbers in a step.

"video": the shared generator, 60 matrices, begun at the SVD whitened by its inputs, 150 steps of 8 clips: at random widths it
learns to say what it says whole. "rise" is the loss less that of the whole one on 128 held-out clips. "start" is no tuning: the
whitened SVD. "specialists" share the same steps among three models, tuned at one size each from the same start: a rival.

A seed is a draw of initial weights, of the order of clips, of times and noise, and of held-out clips; the clips to train on are
the same. Of digits the worst of all b <= 8 was to be counted at first; a trial gave 24 degrees (two components of nearly equal
variance may swap), so "angle" became that of clear gaps, as for A.

Outcome: for a linear target the terms are the SVD's (3.5 degrees at the worst of 15 cuts, 0.01 on the exact loss, 90 with plain
training), and for digits the principal components. In a generator it depends on who draws. The paper's sampler, one layer a
step, gives each layer some twenty narrow passes in all here, and that is too few: the shared generator, cut to half of its
numbers, loses 3 % less than without tuning, where 10 % were asked for. Widths for all layers at once, the authors' other
sampler, lower the rise by 36 % at half and by 30 % at a quarter of the numbers; three specialists with as many steps in all are
better still at each size. The small generator has little to say about it: after 800 steps it hardly uses its matrices. Cut by
whitened SVD to half it loses 0.1 %, the ordered one 9 % (plain factors 24 %), and one share of 36 % for all layers trains as
well as all of them; ranks that were found are 0.4 % worse than that, and 5 % better than a narrow dense model of as much
arithmetic.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from scipy.linalg import subspace_angles
from sklearn.datasets import load_digits
from torch import Tensor, nn

from minivid import world
from minivid.core import corpus, fit, noise, text, weights
from minivid.core.baselines.lowrank import rank_for
from minivid.core.model import Cond, VideoModel
from minivid.core.surgery import Gram, record, swap
from minivid.lab import measure
from minivid.lab.claims import Arm, Claims, Compare, Floor
from minivid.low_rank import maestro as paper
from minivid.low_rank.maestro import Ordered, Settings
from minivid.training.recipe import pick

FILES = [f"minivid/weights/{name}.safetensors" for name in ("video", "tok-v")]
CLIPS, HELD, SIGHT = (2048, 8), (256, 4), (64, 4)  # full, fast: to train on, held out, to choose by
STEPS, TUNE, LINEAR = (800, 3), (150, 3), (5000, 100)
RATE, SLOW, STRENGTH = 3e-3, 5e-4, 0.3  # from scratch, tuning, lasso
SHARES = {"100": 1.0, "75": 0.75, "50": 0.5, "25": 0.25}
Call = tuple[Tensor, Tensor, Cond]

# --- linear targets -----------------------------------------------------------------------------------------------------


def degrees(a: Tensor, b: Tensor) -> float:
    return torch.tensor(subspace_angles(a.detach().double().numpy(), b.double().numpy())).max().rad2deg().item()


def orthogonal(n: int, dice: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(n, n, generator=dice, dtype=torch.float64)).Q


def taught(n: int, terms: int, batches, loss, seed: int, fast: bool, sampler: str) -> Ordered:
    """A layer of n x n in factors, trained."""
    torch.manual_seed(seed)
    model = nn.Sequential(Ordered.of(nn.Linear(n, n, bias=False), terms))
    paper.train(model, loss, batches, LINEAR[fast], 1e-2, Settings(sampler, 1, seed=seed))
    return paper.layers(model)["0"]


def svd(seed, fast, sampler, exact):
    """Angles to the singular vectors of A, and what a cut errs."""
    dice, n = torch.Generator().manual_seed(seed), 16
    u, v = orthogonal(n, dice), orthogonal(n, dice)
    a = u * 0.85 ** torch.arange(n) @ v.T
    every = torch.cat([torch.eye(n), -torch.eye(n)])

    def batches(i):
        dice = fit.draws(seed, i)
        x = F.normalize(fit.normal(64, n, generator=dice), dim=1)
        return every if exact else x * fit.uniform(64, 1, generator=dice) ** (1 / n)

    one = taught(n, n, batches, lambda m, x: F.mse_loss(m(x), x @ a.T.float()), seed, fast, sampler)
    angles = torch.tensor([degrees(one.a[:, :b], u[:, :b]) for b in range(1, n)])
    best = (0.85 ** torch.arange(8, n)).square().sum().sqrt()
    excess = (a - (one.a[:, :8] @ one.b[:8]).detach().double()).norm() / best - 1
    return {"angle": angles.max().item(), "median": angles.median().item(), "excess": excess.item()}


def pca(seed, fast, sampler):
    """Angles to the principal components of digits."""
    x = torch.tensor(load_digits().data / 16, dtype=torch.float32)
    x = x - x.mean(0)
    _, value, true = torch.linalg.svd(x.double(), full_matrices=False)
    one = taught(64, 16, lambda i: x[pick(i, len(x), 256, seed)], lambda m, x: F.mse_loss(m(x), x), seed, fast, sampler)
    angles = torch.tensor([degrees(one.a[:, :b], true[:b].T) for b in range(1, 9)])
    clear = angles[value[:8] > 1.1 * value[1:9]]
    return {"angle": clear.max().item(), "any": angles.max().item(), "median": angles.median().item()}


# --- material -----------------------------------------------------------------------------------------------------------


@lru_cache(4)
def clips(seed: int, n: int, split: str, first: int = 0) -> tuple[Tensor, Tensor]:
    """Latents and words of n clips."""
    tok, asked = weights.load("tok-v"), corpus.scenes("base", n, 40_000 + seed, split, first)
    with torch.no_grad():
        latent = torch.cat([tok.encode(world.batch(asked[i : i + 32], 32, 17)) for i in range(0, n, 32)])
    return latent, text.tokens([world.caption(scene) for scene in asked])


@lru_cache(1)
def training(fast: bool) -> tuple[Tensor, Tensor]:
    """Latents and words to train on, the same for all seeds."""
    n = CLIPS[fast]
    if fast:
        return clips(0, n, "train")
    data = corpus.latents(weights.load("tok-v"), f"base-{n}x17x32", corpus.clips("base", n, 32, 17))
    return data.float(), corpus.captions("base", n)


def noisy(latent: Tensor, words: Tensor, dice: torch.Generator) -> tuple[Call, Tensor]:
    """A call with times, noise and empty captions as in training, and what the model should say."""
    path, t = noise.flow(), noise.logit_normal(len(latent), latent.shape[2], dice, 2.0)
    eps = fit.normal(*latent.shape, generator=dice)
    told = Cond(text=words).drop(fit.uniform(len(latent), generator=dice) < 0.1)
    return (path.at(latent, eps, t), t, told), path.target(latent, eps, t)


def lessons(seed: int, fast: bool, size: int):
    """batches(i) of training."""
    latent, words = training(fast)

    def batches(i):
        rows = pick(i, len(latent), size, seed)
        return noisy(latent[rows], words[rows], fit.draws(seed, i))

    return batches


@lru_cache(4)
def held(seed: int, fast: bool, n: int, split: str = "held-out") -> list[tuple[Call, Tensor]]:
    """Calls to measure on; of split "train" those to choose ranks by."""
    latent, words = clips(seed, n, split, 0 if split == "held-out" else 10_000)
    return [noisy(latent[i : i + 32], words[i : i + 32], fit.draws(1000 + seed, i)) for i in range(0, n, 32)]


@torch.no_grad()
def loss(model: nn.Module, calls: list) -> float:
    return torch.cat([(model(*call) - target).square().flatten(1).mean(1) for call, target in calls]).mean().item()


def mse(model: nn.Module, batch: tuple[Call, Tensor]) -> Tensor:
    return F.mse_loss(model(*batch[0]), batch[1])


def whitened(model: nn.Module, seed: int, fast: bool) -> nn.Module:
    """The model in factors of full rank, begun at the SVD whitened by what enters on 256 training clips."""
    found = {name: Gram() for name in paper.layers(paper.ordered(model, None, "trunk"))}
    record(model, [lessons(seed, fast, 32)(90_000 + i)[0] for i in range(1 if fast else 8)], found)
    return paper.ordered(model, {name: gram.xx for name, gram in found.items()}, "trunk")


def at(model: nn.Module, share: float) -> dict[str, int]:
    """The rank of each layer at one share for all."""
    return {name: x.rank if share == 1 else rank_for(len(x.a), x.b.shape[1], share) for name, x in paper.layers(model).items()}


def cut(model: nn.Module, calls: list, name: str = "loss") -> dict[str, float]:
    """The loss at every share of `SHARES`."""
    return {f"{name}_{key}": loss(paper.pruned(model, at(model, share)), calls) for key, share in SHARES.items()}


def sought(model: nn.Module, seed: int, fast: bool, calls: list) -> dict[str, float]:
    """The loss at half of the numbers, ranks found greedily."""
    sight = held(seed, fast, SIGHT[fast], "train")
    ranks = paper.greedy(model, lambda m: loss(m, sight), 0.9 if fast else 0.5, 32 if fast else 8)
    return {"greedy_50": loss(paper.pruned(model, ranks), calls)}


# --- from scratch -------------------------------------------------------------------------------------------------------


def fresh(seed: int, d: int = 64) -> nn.Module:
    torch.manual_seed(seed)
    return VideoModel(10, d, 2, 2, patch=4)


def curve(seed, fast, how, folder):
    """What a model loses, cut at no retraining."""
    model, calls, sampler = fresh(seed), held(seed, fast, HELD[fast]), "none" if how in ("dense", "factors") else how
    if how != "dense":
        model = paper.ordered(model, None, "trunk")
    state = folder / "state.safetensors"
    paper.train(model, mse, lessons(seed, fast, 32), STEPS[fast], RATE, Settings(sampler, seed=seed), path=state)
    if how == "dense":
        plain, model = paper.ordered(model, None, "trunk"), whitened(model, seed, fast)
        return cut(model, calls) | cut(plain, calls, "svd") | sought(model, seed, fast, calls)
    return cut(model, calls) | sought(model, seed, fast, calls)


def ranks(seed, fast, folder):
    """Ranks that were found, against one share for all, the same ranks from scratch, and a narrow dense model."""
    calls, batches = held(seed, fast, HELD[fast]), lessons(seed, fast, 32)

    def trained(model, steps, name, **s):
        used = paper.train(model, mse, batches, steps, RATE, Settings(seed=seed, **s), path=folder / f"{name}.safetensors")
        return loss(model, calls), used

    def thin(some):  # a fresh model whose layers have these ranks
        model = paper.ordered(fresh(seed + 100), None, "trunk")
        return swap(model, {name: x.cut(some[name]) for name, x in paper.layers(model).items()})

    model = paper.ordered(fresh(seed), None, "trunk")
    own, total = paper.layers(model), sum(len(x.a) * x.b.shape[1] for x in paper.layers(model).values())
    found, used = trained(model, STEPS[fast], "found", strength=STRENGTH)
    worked = sum(used) / max(1, len(used))  # numbers in a step, on average
    live = {name: int(x.live) for name, x in own.items()}
    numbers = sum(live[name] * x.ends for name, x in own.items())
    even = {name: min(x.rank, -(-numbers * len(x.a) * x.b.shape[1] // (total * x.ends))) for name, x in own.items()}
    uniform, _ = trained(thin(even), STEPS[fast], "uniform", sampler="none")
    again, _ = trained(thin(live), STEPS[fast], "again", sampler="none")
    small = fresh(seed, 48)
    steps = min(2 * STEPS[fast], round(STEPS[fast] * worked / (total * (48 / 64) ** 2)))
    narrow, _ = trained(small, steps, "narrow", sampler="none")
    return {
        "found": found, "uniform": uniform, "again": again, "narrow": narrow, "share": numbers / total,
        "over_uniform": 1 - found / uniform, "over_again": 1 - found / again, "over_narrow": 1 - found / narrow,
        "worked": worked / total,
    }  # fmt: skip


def cost(seed, fast):
    """Multiplications of a call: in factors of full rank, and at half the numbers, relative to the dense model."""
    model, (call, _) = fresh(seed), held(seed, True, HELD[True])[0]
    factors = paper.ordered(model, None, "trunk")
    work = lambda m: measure.flops(lambda: m(*call))
    half = paper.pruned(factors, at(factors, 0.5))
    return {"full": work(factors) / work(model), "half": work(half) / work(model)}


# --- the shared generator -----------------------------------------------------------------------------------------------


def tuned(seed, fast, how, folder):
    """Rise of the loss when the shared generator is cut."""
    whole, calls = weights.load("video"), held(seed, fast, 128 if not fast else 4)
    start, before = whitened(whole, seed, fast), loss(whole, calls)
    batches = lessons(seed, fast, 8)

    def taught(model, batch):
        with torch.no_grad():
            said = whole(*batch[0])
        return F.mse_loss(model(*batch[0]), said)

    def learn(model, steps, sampler, name):  # the factors alone learn: all else is frozen
        s = Settings(sampler, 16, seed=seed)
        paper.train(model, taught, batches, steps, SLOW, s, path=folder / f"{name}.safetensors")
        return model

    if how in SAMPLERS:
        learn(start, TUNE[fast], how, "state")
    found = {}
    for key in ("75", "50", "25"):
        small = paper.pruned(start, at(start, SHARES[key]))
        if how == "specialists":
            learn(small, TUNE[fast] // 3, "none", key)
        found[f"rise_{key}"] = loss(small, calls) - before
    return found


# --- what is decided before the run -------------------------------------------------------------------------------------

SAMPLERS = ("single", "independent")
ARMS = {
    "svd: ordered": Arm(svd, sampler="single", exact=False), "svd: plain": Arm(svd, sampler="none", exact=False),
    "svd: ordered, exact": Arm(svd, sampler="single", exact=True),
    "pca: ordered": Arm(pca, sampler="single"), "pca: plain": Arm(pca, sampler="none"),
    **{f"small: {how}": Arm(curve, FILES[1:], how=how) for how in ("dense", "factors", *SAMPLERS)},
    "ranks": Arm(ranks, FILES[1:]), "cost": Arm(cost, FILES[1:]),
    **{f"video: {how}": Arm(tuned, FILES, how=how) for how in ("start", *SAMPLERS, "specialists")},
}  # fmt: skip


def less(metric: str, method: str, baseline: str, margin: float, counts: bool = True) -> Compare:
    return Compare(f"{metric}: {method} under {baseline}", metric, method, baseline, margin, False, True, counts)


CLAIMS = Claims(
    "maestro",
    arms=ARMS,
    tests=[
        # 1: SVD and PCA
        Floor("svd: angles", "angle", "svd: ordered", at_most=5.0), Floor("pca: angles", "angle", "pca: ordered", at_most=15.0),
        Floor("svd: angles of the exact loss", "angle", "svd: ordered, exact", at_most=0.1),
        *(less("angle", f"{kind}: ordered", f"{kind}: plain", 0.8) for kind in ("svd", "pca")),
        less("excess", "svd: ordered", "svd: plain", 0.9),
        # 2: cut at no retraining; the paper's sampler, then the authors' other one
        *(less(f"loss_{key}", "small: single", "small: dense", 0.0) for key in ("50", "25")),
        less("loss_100", "small: single", "small: dense", -0.03),
        *(less(f"loss_{key}", "small: independent", "small: dense", 0.0, counts=False) for key in ("50", "25")),
        less("loss_100", "small: independent", "small: dense", -0.03, counts=False),
        less("loss_50", "small: single", "small: factors", 0.2),
        less("greedy_50", "small: single", "small: dense", 0.0, counts=False),
        less("rise_50", "video: single", "video: start", 0.1), less("rise_25", "video: single", "video: start", 0.1),
        *(less(f"rise_{key}", "video: independent", "video: start", 0.1, counts=False) for key in ("50", "25")),
        *(less(f"rise_{key}", f"video: {how}", "video: specialists", 0.0, counts=False)
          for key in ("50", "25") for how in SAMPLERS),
        # 3: ranks
        Floor("found ranks under even ones", "over_uniform", "ranks", at_least=0.0),
        Floor("found ranks under a narrow model", "over_narrow", "ranks", at_least=0.0, counts=False),
        Floor("training under the same ranks from scratch", "over_again", "ranks", at_least=0.0, counts=False),
        # 4: cost
        Floor("full rank costs at most twice", "full", "cost", at_most=2.0),
    ],
    minutes=60,
    tolerance=0.1,
)  # fmt: skip
