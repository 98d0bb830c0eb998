"""Which clips to calibrate on: none whose deep features are abnormal, and of the rest some of every kind.

    abnormal: mean or standard deviation outside [Q1 - 1.5 IQR, Q3 + 1.5 IQR] of its category, in any of the deep layers
    kind:     v = (cos(frame f, frame 1))_f=2..S, a mean over tokens, by k-means
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ...core.surgery import record


class Each:
    """For `record`: keeps a function of what a part gets or says, `clips tokens... d`, whether or not its frames lie apart."""

    def __init__(self, of, clips: int):
        self.of, self.clips, self.found = of, clips, []

    def add(self, x: Tensor) -> None:
        self.found.append(self.of(x.unflatten(0, (self.clips, -1))))


def deep(
    model: nn.Module, blocks: Iterable[str], last: str, clips: Tensor, frames: int, batch: int = 4
) -> tuple[Float[Tensor, "b l two"], Float[Tensor, "b f"]]:
    """Mean and standard deviation of what each of the deep blocks gets, and the `similarity` of what the last one says."""
    stats = lambda x: torch.stack([x.flatten(1).mean(1), x.flatten(1).std(1)], -1)
    views = lambda x: similarity(x.reshape(len(x), frames, -1, x.shape[-1]))
    watch, end = {name: Each(stats, batch) for name in blocks}, Each(views, batch)
    record(model, clips.split(batch), watch, {last: end})
    return torch.stack([torch.cat(one.found) for one in watch.values()], 1), torch.cat(end.found)


def similarity(features: Float[Tensor, "b f n d"]) -> Float[Tensor, "b g"]:
    """How much each later frame is like the first: the cosine of tokens at the same place, a mean over tokens; g = f - 1."""
    return F.cosine_similarity(features[:, 1:], features[:, :1], dim=-1).mean(-1)


def normal(stats: Float[Tensor, "b l two"], category: Int[Tensor, "b"], reach: float = 1.5) -> Bool[Tensor, "b"]:
    """Which clips stay. A category of fewer than 4 has no quartiles worth the name, so it stays whole."""
    stay = torch.ones(len(stats), dtype=torch.bool)
    for one in category.unique():
        rows = category == one
        if rows.sum() >= 4:
            low, high = torch.quantile(stats[rows], torch.tensor([0.25, 0.75], dtype=stats.dtype), 0)
            far = reach * (high - low)
            stay[rows] = ((stats[rows] >= low - far) & (stats[rows] <= high + far)).flatten(1).all(1)
    return stay


def kinds(vectors: Float[Tensor, "b g"], stay: Bool[Tensor, "b"], k: int = 5, seed: int = 0) -> Int[Tensor, "b"]:
    """The cluster of each clip that stays, by k-means (the best of 50 beginnings), and -1 for the others, which aren't looked at.

    The authors' script works out who is abnormal and then clusters all clips; here the filter has its effect.
    """
    from sklearn.cluster import KMeans

    kind = torch.full((len(stay),), -1)
    kind[stay] = torch.from_numpy(KMeans(k, n_init=50, random_state=seed).fit_predict(vectors[stay].double().numpy())).long()
    return kind


def draw(kind: Int[Tensor, "b"], n: int, seed: int) -> Int[Tensor, "n"]:
    """n clips at random, equally many of each kind from 0 on, topped up from the rest; in random order.

    All zeros is a plain draw; what is below 0 is never drawn. Raises ValueError where there aren't n.
    """
    dice = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(kind), generator=dice)
    order = order[kind[order] >= 0]
    if len(order) < n:
        raise ValueError(f"{n} clips are wanted, {len(order)} are left to draw from: take a larger pool or fewer clips")
    found = kind[order].unique()
    first = torch.cat([order[kind[order] == one][: n // len(found)] for one in found])
    rest = order[~torch.isin(order, first)][: n - len(first)]
    return torch.cat([first, rest])[torch.randperm(n, generator=dice)]


# --- tails -----------------------------------------------------------------------------------------------------------------


def kurtosis(x: Float[Tensor, "..."]) -> float:
    """Fourth moment over squared second, around the mean: 3 for a normal distribution, more for heavier tails."""
    x = x.double().flatten()
    x = x - x.mean()
    return (x.pow(4).mean() / x.square().mean().square()).item()


def peak(x: Float[Tensor, "..."]) -> float:
    """The largest size beside the median size."""
    x = x.abs().flatten()
    return (x.max() / x.median()).item()
