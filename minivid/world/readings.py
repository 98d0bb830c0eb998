"""Exact readings of paths and colours: how far a body is from where it should be, how it falls, bounces and comes back.

What is unusual: nothing is estimated from pictures here. Paths come from `judge.read` (Seen.path) or from Truth.centres,
so the same function measures a generated clip and proves itself on a rendered one. Units are pixels and frames; NaN
places (frames in which a body is not seen) are left out.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

Path = Float[Tensor, "f xy"]


def trajectory_error(path: Path, truth: Path, inner: bool = False) -> float:
    """Mean distance of the centres in px, 0 is exact; `inner` leaves out the first and the last frame (they were given)."""
    if path.shape != truth.shape:
        raise ValueError(f"Expected two paths of one length, got {tuple(path.shape)} and {tuple(truth.shape)}.")
    far = (path - truth).norm(dim=-1)
    return _mean(far[1:-1] if inner else far)


def dynamic_degree(path: Path) -> float:
    """Mean speed of the centre in px per frame; 0 is a still picture."""
    return _mean((path[1:] - path[:-1]).norm(dim=-1))


def gravity_residual(path: Path, gravity: float, contacts: Sequence[float] = ()) -> float:
    """Mean |second difference - (0, gravity)| in px per frame^2 over free flight; 0 obeys.

    gravity: px per frame^2, downwards. contacts: times of touches; second differences that span one are left out.
    """
    second = path[2:] - 2 * path[1:-1] + path[:-2]
    error = (second - torch.tensor([0.0, gravity])).norm(dim=-1)
    middle = torch.arange(1, len(path) - 1)
    free = torch.ones(len(second), dtype=torch.bool)
    for time in contacts:
        free &= (middle - time).abs() >= 1
    return _mean(error[free])


def bounce(path: Path, time: float, gravity: float = 0.0, axis: str = "y") -> tuple[float, float]:
    """(restitution, slip) of a touch at `time` on a wall across `axis`: both from parabolas through the frames beside it.

    restitution: speed away over speed towards the wall; slip: change of the speed along it, px per frame (0 without
    friction). Up to four frames a side are used; fewer than two raise.
    """
    if axis not in ("x", "y"):
        raise ValueError(f"axis is x or y, got {axis!r}.")
    fall = torch.tensor([0.0, gravity])
    times = torch.arange(len(path), dtype=torch.float32)
    known = ~path.isnan().any(-1)
    speeds = []
    for side in (known & (times <= time) & (times > time - 4), known & (times > time) & (times <= time + 4)):
        t, p = times[side] - time, path[side]
        if len(t) < 2:
            raise ValueError(f"A bounce at {time} needs two frames on either side of it, got {len(t)}.")
        p = p - 0.5 * fall * t[:, None] ** 2  # leaves the straight line of the speed at the touch
        speeds.append(torch.linalg.lstsq(torch.stack((t, torch.ones_like(t)), 1), p).solution[0])
    (bx, by), (ax, ay) = speeds
    towards, away, slip = (by, ay, ax - bx) if axis == "y" else (bx, ax, ay - by)
    return float(-away / towards) if float(towards.abs()) > 1e-6 else math.nan, float(slip)


def penetration(paths: Float[Tensor, "k f xy"], radii: Float[Tensor, "k"]) -> float:
    """Greatest overlap of any two round bodies in px: max of r_i + r_j - distance, at least 0."""
    if len(paths) < 2:
        return 0.0
    i, j = torch.triu_indices(len(paths), len(paths), 1)
    depth = (radii[i] + radii[j])[:, None] - (paths[i] - paths[j]).norm(dim=-1)
    return max(float(depth.nan_to_num(-math.inf).max()), 0.0)


def colour_error(rgb: Float[Tensor, "f c"], first: slice, later: slice) -> float:
    """Identity: distance of the mean colours (Seen.rgb, in [0, 1]) of two spans of frames, root mean square over RGB."""
    a, b = (rgb[span][~rgb[span].isnan().any(-1)] for span in (first, later))
    if not len(a) or not len(b):
        return math.nan
    return float((a.mean(0) - b.mean(0)).square().mean().sqrt())


def event_f1(found: Sequence[tuple[float, str]], true: Sequence[tuple[float, str]], within: float = 2.0) -> float:
    """F1 in [0, 1] of (frame, name) events: one found matches one true of the same name at most `within` frames away."""
    if not found and not true:
        return 1.0
    left, hits = list(true), 0
    for time, name in found:
        near = [event for event in left if event[1] == name and abs(event[0] - time) <= within]
        if near:
            left.remove(min(near, key=lambda event: abs(event[0] - time)))
            hits += 1
    return 2 * hits / (len(found) + len(true))


def order_share(found: Sequence[str], true: Sequence[str]) -> float:
    """Share of the pairs of true events that are found in the right order, in [0, 1]; a missing event breaks its pairs."""
    if len(set(true)) != len(true):
        raise ValueError("The events need different names; number those that repeat.")
    pairs = [(a, b) for i, a in enumerate(true) for b in true[i + 1 :]]
    if not pairs:
        return 1.0
    place = {name: i for i, name in enumerate(found)}
    return sum(a in place and b in place and place[a] < place[b] for a, b in pairs) / len(pairs)


def _mean(values: Tensor) -> float:
    values = values[~values.isnan()]
    return float(values.mean()) if len(values) else math.nan
