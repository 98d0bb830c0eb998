"""The judge: reads colour, shape, size, place and motion of every body back from the pixels, with rules, no network.

What is unusual: it may say "unsure". Backgrounds of the world are muted and bodies saturated, so in the colour plane
(RGB without its grey part) a pixel of a body with coverage a lies at a times the body's colour. That makes coverage
soft, centres exact to a tenth of a pixel, and shapes comparable with the exact anti-aliased drawings of all four.
Where blur or noise leaves two answers nearly equal, the reading is None, and a rate counts it as not right, never as
right.

`read` and `read_many` look at pixels only; `score` and `judge` compare with the scene that was asked for.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from .files import check_clip
from .parts import COLOURS, DIAGONALS, DIRECTIONS, SHAPES, SIZES, Body, Scene
from .regions import HUES, LENGTH, PLANE, Regions, coverage, regions, tracks
from .render import distance, edge

_STILL = 0.004  # sides per frame; the slowest mover has 0.012
_TRIED = (0.9, 1.0, 1.1)  # times the radius that the area gives


@dataclass(frozen=True)
class Seen:
    """One body as read. None means unsure. Places are in pixels as in Truth (the centre of pixel i is i + .5)."""

    colour: str | None
    shape: str | None
    size: str | None
    motion: str | None  # left, right, up, down, still, a diagonal such as up-left, grows or shrinks
    path: Float[Tensor, "f xy"]  # px; NaN in frames where it is not seen
    velocity: Float[Tensor, "xy"]  # px per frame, of the straight line fitted to the path
    radius: float  # px, nominal as in SIZES; NaN where the shape is unsure
    rgb: Float[Tensor, "f c"]  # mean colour of its inside in [0, 1]; NaN where it is not seen
    confidence: float  # in [0, 1]: how much better the best shape fits than the second


@dataclass(frozen=True)
class Reading:
    """All bodies of a clip. `sure` is False when colours are so noisy that nothing was read."""

    bodies: tuple[Seen, ...]
    counts: tuple[int, ...]  # connected saturated regions in every frame
    sure: bool = True

    @property
    def persistent(self) -> bool:
        """Something is there, and in every frame exactly that: nothing appears, breaks, dies or changes its colour."""
        return self.sure and len(set(self.counts)) == 1 and self.counts[0] == len(self.bodies) > 0

    @property
    def torn(self) -> float:
        """Mean number of regions beyond the bodies, per frame; 0 is whole."""
        return float(np.mean([max(count - len(self.bodies), 0) for count in self.counts]))


def read(clip: Float[Tensor, "c f h w"]) -> Reading:
    """Read one clip in [-1, 1] (values up to 1.5 are clamped: decoders overshoot). Raises ValueError or TypeError for
    no clip.
    """
    check_clip(clip, "c f h w", slack=0.5)
    return read_many(clip[None])[0]


def read_many(clips: Float[Tensor, "b c f h w"]) -> list[Reading]:
    """Read a batch, 64 clips at a time; much faster than one by one."""
    check_clip(clips, "b c f h w", slack=0.5)
    if clips.shape[-1] != clips.shape[-2] or clips.shape[-1] < 16:
        raise ValueError(f"The judge reads square clips of at least 16 px, got {tuple(clips.shape)}.")
    return [reading for part in clips.split(64) for reading in _read(part)]


def _read(clips: Tensor) -> list[Reading]:
    pixels = np.ascontiguousarray(clips.detach().float().cpu().clamp(-1, 1).permute(0, 2, 3, 4, 1).numpy()) / 2 + 0.5
    b, f, size, _, _ = pixels.shape
    cover, hue, clear = coverage(pixels)
    found = regions(pixels, cover, hue, clear)
    paths = tracks(found, f, size)
    counts = np.zeros((b, f), int)
    np.add.at(counts, (found.clip, found.frame), 1)
    bodies: list[list[Seen]] = [[] for _ in range(b)]
    for track, shape in zip(paths, _shapes(found, paths), strict=True):
        bodies[found.clip[track.max()]].append(_seen(found, track, size, *shape))
    return [
        Reading(tuple(seen) if ok else (), tuple(count.tolist()), bool(ok))
        for seen, count, ok in zip(bodies, counts, clear, strict=True)
    ]


@lru_cache
def _areas() -> dict[str, float]:
    """Area of each shape in radii^2, counted on its drawing."""
    ray = (torch.arange(600) + 0.5) / 200 - 1.5
    return {s: float(edge(distance(s, ray[None], ray[:, None], 1.0), 200.0).sum() / 200**2) for s in SHAPES}


def _shapes(found: Regions, tracks: list[np.ndarray]) -> list[tuple[str | None, float, float]]:
    """Best shape (None: unsure), its radius in px, and the confidence, for each track."""
    if not tracks:
        return []
    chosen = [seen[np.linspace(0, len(seen) - 1, min(8, len(seen))).round().astype(int)] for seen in (t[t >= 0] for t in tracks)]
    rows = np.concatenate(chosen)
    owner = torch.from_numpy(np.repeat(np.arange(len(tracks)), [len(c) for c in chosen]))
    window = torch.from_numpy(found.window[rows])
    side = window.shape[-1]
    x, y = (torch.from_numpy(p[rows] - found.corner[rows, k]).float() for k, p in enumerate((found.x, found.y)))
    px, py = (torch.arange(side) + 0.5 - x[:, None])[:, None, :], (torch.arange(side) + 0.5 - y[:, None])[:, :, None]
    inside = window.flatten(1).topk(10).values.mean(1)
    mass = torch.from_numpy(found.mass[rows]).float() / inside
    error, radii = torch.zeros(len(SHAPES), len(_TRIED), len(tracks)), torch.zeros(len(SHAPES), len(tracks))
    number = torch.bincount(owner, minlength=len(tracks))
    for i, shape in enumerate(SHAPES):
        radius = (mass / _areas()[shape]).sqrt()
        for j, factor in enumerate(_TRIED):
            drawn = edge(distance(shape, px, py, (radius * factor)[:, None, None]), 1.0)
            fit = (drawn * window).sum((1, 2)) ** 2 / (drawn.square().sum((1, 2)) * window.square().sum((1, 2)))
            error[i, j].index_add_(0, owner, 1 - fit)
        radii[i].index_add_(0, owner, radius)
    error, radii = error / number, radii / number
    best, at = error.min(1)
    ranked = best.sort(0)
    margin = 1 - ranked.values[0] / ranked.values[1]
    out = []
    for k in range(len(tracks)):
        i = int(ranked.indices[0, k])
        sure = ranked.values[0, k] < 0.1 and margin[k] > max(0.25, 6 * ranked.values[0, k])
        out.append((SHAPES[i] if sure else None, float(radii[i, k] * _TRIED[int(at[i, k])]), float(margin[k])))
    return out


def _seen(found: Regions, track: np.ndarray, size: int, shape: str | None, radius: float, confidence: float) -> Seen:
    there = track >= 0
    rows = track[there]
    path, rgb = np.full((len(track), 2), np.nan, np.float32), np.full((len(track), 3), np.nan, np.float32)
    path[there], rgb[there] = np.stack((found.x[rows], found.y[rows]), 1), found.rgb[rows]
    motion, velocity = _motion(path, size)
    growth = _growth(found.mass[rows])
    if motion == "still" and abs(growth) > 0.25:
        motion = "grows" if growth > 0 else "shrinks"
    gap = {name: abs(radius / size - r) for name, r in SIZES.items()}
    word = min(gap, key=lambda name: gap[name])
    return Seen(
        colour=_colour(rgb[there]),
        shape=shape,
        size=word if shape and gap[word] < 0.016 and abs(growth) < 0.25 else None,  # sides; the sizes are 0.04 apart
        motion=motion,
        path=torch.from_numpy(path),
        velocity=torch.from_numpy(velocity),
        radius=radius if shape else float("nan"),
        rgb=torch.from_numpy(rgb),
        confidence=confidence,
    )


def _growth(mass: np.ndarray) -> float:
    """Growth of the width over the clip, from the straight line through it, as a share of the mean width."""
    width, times = np.sqrt(mass.clip(0)), np.arange(len(mass))
    return float(np.polyfit(times, width, 1)[0] * len(mass) / width.mean()) if len(mass) > 2 else 0.0


def _colour(rgb: np.ndarray) -> str | None:
    """The nearest of the six hues; None when the second is nearly as near."""
    plane = rgb.mean(0) @ PLANE
    cosine = HUES @ plane / (LENGTH * max(np.linalg.norm(plane), 1e-6))
    first, second = np.argsort(-cosine)[:2]
    near, next_ = np.arccos(cosine[[first, second]].clip(-1, 1))
    return list(COLOURS)[first] if near < 0.6 * next_ else None


_WAYS = {word: np.array(way) / max(np.hypot(*way), 1) for word, way in {**DIRECTIONS, **DIAGONALS}.items()}


def _motion(path: np.ndarray, size: int) -> tuple[str | None, np.ndarray]:
    """The word of a straight uniform path (None: curved, between two directions, too short), and its velocity in px."""
    times = np.nonzero(~np.isnan(path[:, 0]))[0]
    if len(times) < 3:
        return None, np.full(2, np.nan, np.float32)
    basis = np.stack((times, np.ones(len(times))), 1)
    fit, *_ = np.linalg.lstsq(basis, path[times], rcond=None)
    wobble = np.sqrt(((path[times] - basis @ fit) ** 2).sum(1).mean()) / size
    velocity = fit[0].astype(np.float32)
    speed = float(np.hypot(*velocity)) / size
    if wobble > 0.02:
        return None, velocity
    if speed < _STILL:
        return "still", velocity
    cosine = {word: float(velocity @ way) / (speed * size) for word, way in _WAYS.items() if word != "still"}
    word = max(cosine, key=lambda name: cosine[name])
    return (word if cosine[word] > 0.97 and speed > 1.5 * _STILL else None), velocity


def readable(scene: Scene, body: Body) -> bool:
    """Whether the judge speaks the body's motion word: straight lines, grows and shrinks, under a camera that rests."""
    return body.motion in (*_WAYS, "grows", "shrinks") and scene.camera.word == "still"


def score(clip: Float[Tensor, "c f h w"] | Reading, scene: Scene) -> dict:
    """A clip, or its reading, against the scene it should show: each answer True, False or None (unsure).

    bodies: a dict of colour, shape, size and motion for each body of the scene, matched one to one by how much
    agrees. A body that is not there is False in all. colour, shape, size, motion: all bodies together; binding: every
    body has its own colour, shape and motion; count: as many bodies as in the scene; persistent: see Reading. The
    motion of a body whose word the judge does not speak (see `readable`) is None.
    """
    if scene.cuts:
        raise ValueError("The judge scores one shot; read a film with cuts shot by shot.")
    reading = clip if isinstance(clip, Reading) else read(clip)
    names = ("colour", "shape", "size", "motion")
    answers = [{name: False if reading.sure else None for name in names} for _ in scene.bodies]
    if reading.bodies:
        from scipy.optimize import linear_sum_assignment

        table = [[_compare(seen, body) for seen in reading.bodies] for body in scene.bodies]
        worth = {"colour": 4, "shape": 2, "motion": 1, "size": 0.5}
        value = [[sum(worth[n] * (0.5 if v is None else v) for n, v in cell.items()) for cell in row] for row in table]
        for i, j in zip(*linear_sum_assignment(value, maximize=True), strict=True):
            answers[i] = table[i][j]
    for answer, body in zip(answers, scene.bodies, strict=True):
        if not readable(scene, body):
            answer["motion"] = None
    out = {name: _every(answer[name] for answer in answers) for name in names}
    out["binding"] = _every(answer[name] for answer in answers for name in ("colour", "shape", "motion"))
    out["count"] = len(reading.bodies) == len(scene.bodies) if reading.sure else None
    return out | {"persistent": reading.persistent if reading.sure else None, "bodies": answers}


def _compare(seen: Seen, body: Body) -> dict[str, bool | None]:
    pairs = {name: (getattr(seen, name), getattr(body, name)) for name in ("colour", "shape", "size", "motion")}
    return {name: None if found is None else found == wanted for name, (found, wanted) in pairs.items()}


def _every(answers: Iterable[bool | None]) -> bool | None:
    """All of them, in three values: one wrong is wrong, else one unsure is unsure."""
    answers = list(answers)
    return False if False in answers else None if None in answers else True


def judge(clips: Float[Tensor, "b c f h w"], scenes: Sequence[Scene]) -> dict[str, float]:
    """Rates of right answers over a batch; unsure counts as not right.

    colour, shape, size, motion: shares of bodies (motion: of those with a `readable` one). binding: share of clips
    with two bodies or more in which every one is right (NaN without any). count, persistent: shares of clips. unsure:
    share of None among the bodies' colours, shapes and motions. clips, bodies: how many there were. A rate p of n has
    the standard error sqrt(p (1 - p) / n).
    """
    if len(clips) != len(scenes):
        raise ValueError(f"Expected one scene a clip, got {len(clips)} clips and {len(scenes)} scenes.")
    scores = [score(reading, scene) for reading, scene in zip(read_many(clips), scenes, strict=True)]
    told = [answer for one in scores for answer in one["bodies"]]
    speaks = [readable(scene, body) for scene in scenes for body in scene.bodies]
    moves = [answer["motion"] for answer, can in zip(told, speaks, strict=True) if can]
    three = [answer[name] for answer in told for name in ("colour", "shape")] + moves
    return {
        **{name: _rate([answer[name] for answer in told]) for name in ("colour", "shape", "size")},
        "motion": _rate(moves),
        "binding": _rate([one["binding"] for one in scores if len(one["bodies"]) > 1]),
        **{name: _rate([one[name] for one in scores]) for name in ("count", "persistent")},
        "unsure": sum(answer is None for answer in three) / len(three),
        "clips": len(clips),
        "bodies": len(told),
    }


def _rate(answers: list[bool | None]) -> float:
    return sum(answer is True for answer in answers) / len(answers) if answers else float("nan")
