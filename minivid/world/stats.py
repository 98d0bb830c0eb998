"""Scores of numbers, feature sets, codes and rankings, with the uncertainty that belongs to them.

What is unusual: the checks. A Frechet distance on too few samples, a usage on too few tokens, a correlation of a
constant all give a number that means nothing, so they raise instead.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

# scipy's parts are imported where they are used: together they take seconds.

Numbers = Tensor | np.ndarray | Sequence[float | int]  # a list of numbers, in any of its forms


def vde(values: Numbers, log: bool = False) -> float:
    """Video drift error of the qualities m_1 ... m_N of equal chunks; lower is steadier, 0 is constant (BlockVid,
    LV-Bench).

        VDE = sum over i = 2 .. N of w_i |m_i - m_1| / m_1,   w_i = N - i + 1, or its logarithm

    N is 10 by convention and part of the number. Fewer than 2 chunks give 0, m_1 = 0 gives inf. Early chunks count
    most and improvement counts as drift: always show the m_i too.
    """
    m = torch.as_tensor(values, dtype=torch.float64)
    if len(m) < 2:
        return 0.0
    if m[0] == 0:
        return math.inf
    weight = torch.arange(len(m) - 1, 0, -1, dtype=torch.float64)
    return float(((weight.log() if log else weight) * (m[1:] - m[0]).abs() / m[0]).sum())


def chunk_means(values: Float[Tensor, "f"], n: int = 10) -> Float[Tensor, "n"]:
    """Means of n equal chunks of a value per frame; the remainder is dropped."""
    if len(values) < n:
        raise ValueError(f"{len(values)} values do not fill {n} chunks.")
    return values[: len(values) // n * n].view(n, -1).mean(1)


def frechet(a: Float[Tensor, "n d"], b: Float[Tensor, "m d"], least: int = 256) -> float:
    """Frechet distance of two sets of features as Gaussians: |mu_a - mu_b|^2 + tr(A + B - 2 (A B)^(1/2)); 0 is equal.

    It is biased by n: give every arm the same n. At most 32 features and at least `least` samples, else the
    covariances are noise (lower `least` only in tests). The features must come from a net that no loss has used.
    """
    from scipy.linalg import sqrtm

    x, y = (np.asarray(t.detach().cpu(), np.float64) for t in (a, b))
    if x.shape[1] != y.shape[1] or not 1 <= x.shape[1] <= 32:
        raise ValueError(f"Both sets need the same 1 to 32 features, got {x.shape[1]} and {y.shape[1]}.")
    if len(x) != len(y) or len(x) < least:
        raise ValueError(f"Both sets need the same n >= {least}, got {len(x)} and {len(y)}.")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("The features have NaN or infinite values.")
    ca, cb = (np.atleast_2d(np.cov(t, rowvar=False)) for t in (x, y))
    root = sqrtm(ca @ cb)
    distance = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(ca + cb) - 2 * np.trace(np.real(root))
    return max(float(distance), 0.0)


def usage(codes: Int[Tensor, "*n"], size: int, least: int = 1) -> float:
    """Share in [0, 1] of the `size` entries of a codebook that occur; needs >= `least` codes (20,000 in claims)."""
    return float((_histogram(codes, size, least) > 0).float().mean())


def entropy(codes: Int[Tensor, "*n"], size: int, least: int = 1) -> float:
    """Entropy in bits of the codes' histogram: what an ideal coder without context pays a code; at most log2 size."""
    p = _histogram(codes, size, least).double()
    p = p / p.sum()
    return float(-(p * p.clamp(min=1e-300).log2()).sum())


def perplexity(codes: Int[Tensor, "*n"], size: int, least: int = 1) -> float:
    """2^entropy: how many equally frequent entries would be as diverse; 1 to size."""
    return 2 ** entropy(codes, size, least)


def _histogram(codes: Tensor, size: int, least: int) -> Tensor:
    flat = codes.flatten()
    if len(flat) < max(least, 1):
        raise ValueError(f"Expected at least {max(least, 1)} codes, got {len(flat)}: encode more held-out clips.")
    if flat.min() < 0 or flat.max() >= size:
        raise ValueError(f"{size} entries have codes in [0, {size - 1}], got {int(flat.min())} to {int(flat.max())}.")
    return torch.bincount(flat, minlength=size)


def bits_per_pixel(grids: Sequence[Sequence[int]], sizes: Sequence[float | int], clip: Sequence[int]) -> float:
    """Sum over the code grids t x h x w of t h w log2 K, divided by the clip's F H W pixels.

    sizes: the codebook sizes K; give 2^entropy instead for what an ideal coder would pay.
    """
    if len(grids) != len(sizes) or len(clip) != 3:
        raise ValueError(f"Expected one K a grid and a clip (F, H, W), got {len(grids)}, {len(sizes)}, {len(clip)}.")
    bits = sum(math.prod(grid) * math.log2(k) for grid, k in zip(grids, sizes, strict=True))
    return bits / math.prod(clip)


def mutual_information(a: Int[Tensor, "n"], b: Int[Tensor, "n"], seed: int = 0, shuffles: int = 20) -> float:
    """Bits that a tells of b, minus the mean over `shuffles` of b: small samples make unrelated labels look related."""
    if a.shape != b.shape or a.ndim != 1 or len(a) < 2:
        raise ValueError(f"Expected two lists of labels of one length, got {(*a.shape,)} and {(*b.shape,)}.")
    x, y = (np.unique(np.asarray(t.cpu()), return_inverse=True)[1] for t in (a, b))
    rng = np.random.default_rng(seed)
    return _information(x, y) - float(np.mean([_information(x, rng.permutation(y)) for _ in range(shuffles)]))


def _information(x: np.ndarray, y: np.ndarray) -> float:
    joint = np.zeros((x.max() + 1, y.max() + 1))
    np.add.at(joint, (x, y), 1 / len(x))
    apart = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    some = joint > 0
    return float((joint[some] * np.log2(joint[some] / apart[some])).sum())


def recall_at(similarity: Float[Tensor, "q n"], target: Int[Tensor, "q"], k: int = 1) -> float:
    """Share of queries whose target is among the k most similar; among equals the target comes last (R@k)."""
    own = similarity.gather(1, target[:, None])
    return float(((similarity >= own).sum(1) <= k).float().mean())


def auroc(scores: Float[Tensor, "n"], labels: Bool[Tensor, "n"]) -> float:
    """Area under the ROC curve in [0, 1]: the chance that a positive scores above a negative, ties half; .5 is
    chance.
    """
    from scipy.stats import rankdata

    positive = labels.bool()
    n, p = len(scores), int(positive.sum())
    if p in (0, n):
        raise ValueError(f"AUROC needs both labels, got {p} positive of {n}.")
    rank = torch.as_tensor(rankdata(scores.detach().cpu().numpy()))
    return float((rank[positive.cpu()].sum() - p * (p + 1) / 2) / (p * (n - p)))


def average_precision(scores: Float[Tensor, "n"], labels: Bool[Tensor, "n"]) -> float:
    """Mean over the positives of the precision at their rank, in (0, 1]; its chance level is the share of positives."""
    if not labels.any():
        raise ValueError("Average precision needs a positive.")
    hit = labels[scores.argsort(descending=True, stable=True)].double()
    return float((hit.cumsum(0) / torch.arange(1, len(hit) + 1))[hit > 0].mean())


def iou(a: Bool[Tensor, "*b h w"], b: Bool[Tensor, "*b h w"]) -> Float[Tensor, "*b"]:
    """Intersection over union in [0, 1] of two masks; 1 where both are empty."""
    both, either = (a & b).sum((-2, -1)).float(), (a | b).sum((-2, -1)).float()
    return torch.where(either > 0, both / either.clamp(min=1), torch.ones_like(both))


def bootstrap(
    values: Numbers, level: float = 0.95, n: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """(mean, low, high): the percentile interval of a mean. For two methods on the same clips give the differences."""
    x = torch.as_tensor(values, dtype=torch.float64)
    if len(x) < 2 or not torch.isfinite(x).all():
        raise ValueError(f"A bootstrap needs at least two finite values, got {len(x)}.")
    rows = torch.randint(len(x), (n, len(x)), generator=torch.Generator().manual_seed(seed))
    tail = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.quantile(x[rows].mean(1), tail)
    return float(x.mean()), float(low), float(high)


def pearson(a: Numbers, b: Numbers) -> float:
    """Linear correlation in [-1, 1]."""
    from scipy.stats import pearsonr

    return float(pearsonr(*_pair(a, b)).statistic)


def spearman(a: Numbers, b: Numbers) -> float:
    """Rank correlation in [-1, 1]."""
    from scipy.stats import spearmanr

    return float(spearmanr(*_pair(a, b)).statistic)


def _pair(a, b) -> tuple[np.ndarray, np.ndarray]:
    x, y = (np.asarray(torch.as_tensor(t).detach().cpu(), np.float64) for t in (a, b))
    if x.shape != y.shape or x.ndim != 1 or len(x) < 3:
        raise ValueError(f"A correlation needs two lists of one length >= 3, got {x.shape} and {y.shape}.")
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        raise ValueError("A correlation with a constant is not defined.")
    return x, y
