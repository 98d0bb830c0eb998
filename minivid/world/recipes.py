"""How scenes are drawn from chance: one function per recipe, each (rng, split, index) -> the fields of a Scene.

The single rule that binds all: colours and shapes are chosen after the motion, from the combinations that the split allows.
"""

import math
from collections.abc import Callable

import numpy as np

from .parts import (
    COLOURS, DIRECTIONS, MOTIONS, REACH, SHAPES, SIZES, TONES,
    Background, Body, Leg, Texture, held_out,
)  # fmt: skip

SPLITS = ("train", "held-out", "all")
_SEEN = 17  # frames over which the simple recipes keep their bodies wholly inside the frame


def pick(rng: np.random.Generator, options):
    """One of `options`, each equally likely."""
    return options[int(rng.random() * len(options))]


def looks(motion: str, split: str) -> list[tuple[str, str]]:
    """The (colour, shape) pairs that `split` allows for `motion`."""
    if (motion, split) not in _LOOKS:
        pairs = [(colour, shape) for colour in COLOURS for shape in SHAPES]
        if split != "all":
            pairs = [pair for pair in pairs if held_out(*pair, motion) == (split == "held-out")]
        _LOOKS[motion, split] = pairs
    return _LOOKS[motion, split]


_LOOKS: dict[tuple[str, str], list[tuple[str, str]]] = {}


def look(rng: np.random.Generator, motion: str, split: str, taken: tuple[str, ...] = ()) -> tuple[str, str]:
    """A colour (none of `taken`) and a shape for a body that moves by `motion`."""
    return pick(rng, [pair for pair in looks(motion, split) if pair[0] not in taken])


def body(colour: str, shape: str, size: str, motion: str, texture: Texture = Texture(), **leg: float) -> Body:
    """A body with one leg; `leg` gives what is not at its default."""
    red, green, blue = COLOURS[colour]
    return Body(colour, shape, size, motion, (Leg(red=red, green=green, blue=blue, radius=SIZES[size], **leg),), texture)


def background(rng: np.random.Generator, plain: float = 0.5) -> Background:
    """A muted ground, plain with probability `plain`, else striped, checked, dotted, noisy or shaded."""
    tone = pick(rng, tuple(TONES))
    first, second = TONES[tone]
    if rng.random() < plain:
        return Background(tone, Texture(), first, second)
    kind = pick(rng, ("striped", "checked", "dotted", "noisy", "gradient"))
    period = {"gradient": 2.0, "noisy": 0.2}.get(kind, 0.16 + 0.14 * rng.random())
    angle = math.pi * rng.random() if kind in ("gradient", "noisy") else pick(rng, (0, math.pi / 2, math.pi / 4, -math.pi / 4))
    return Background(tone, Texture(kind, period, angle, rng.random(), int(rng.integers(1 << 30))), first, second)


def straight(rng: np.random.Generator, shape: str, radius: float, motion: str, speed: float) -> dict[str, float]:
    """A straight uniform path that keeps the whole body in the frame for 17 frames, uniform among those."""
    margin = radius * REACH[shape] + 0.01
    dx, dy = DIRECTIONS[motion]
    speed = min(speed, (1 - 2 * margin) / (_SEEN - 1))
    path = {}
    for name, d in (("x", dx), ("y", dy)):
        travel = d * speed * (_SEEN - 1)
        low, high = margin - min(travel, 0), 1 - margin - max(travel, 0)
        path[name], path["v" + name] = low + (high - low) * rng.random(), d * speed
    return path


def apart(one: Body, two: Body, frames: int = _SEEN) -> bool:
    """Whether two straight-moving bodies never touch within `frames`."""
    a, b = one.legs[0], two.legs[0]
    x, y, vx, vy = b.x - a.x, b.y - a.y, b.vx - a.vx, b.vy - a.vy
    speed = vx * vx + vy * vy
    t = min(max(-(x * vx + y * vy) / speed, 0), frames - 1) if speed else 0
    return math.hypot(x + vx * t, y + vy * t) > one.reach + two.reach


def some_bodies(rng: np.random.Generator, split: str, count: int, motions: tuple[str, ...] = MOTIONS) -> tuple[Body, ...]:
    """`count` straight movers of different colours that never touch. The first is from `split`, the others never held out."""
    bodies: list[Body] = []
    for attempt in range(200):
        first = not bodies
        motion = pick(rng, motions[:4]) if rng.random() > 0.1 or (first and split == "held-out") else "still"
        colour, shape = look(rng, motion, split if first or split == "all" else "train", tuple(b.colour for b in bodies))
        sizes = ("small", "medium", "medium", "large") if count == 1 else ("small", "medium") if count == 2 else ("small",)
        size = pick(rng, sizes if attempt < 100 else ("small",))
        path = straight(rng, shape, SIZES[size], motion, 0.012 + 0.016 * rng.random())
        new = body(colour, shape, size, motion, **path)
        if all(apart(new, old) for old in bodies):
            bodies.append(new)
        if len(bodies) == count:
            return tuple(bodies)
        if attempt % 40 == 39:  # a bad first placement: begin again
            bodies = []
    raise RuntimeError(f"Found no place for {count} bodies; this seed needs a smaller count.")


def base(rng: np.random.Generator, split: str, index: int) -> dict:
    """The training world: one body (60 %) or two, four directions or still, plain or textured muted ground."""
    count = 1 if rng.random() < 0.6 else 2
    return {"bodies": some_bodies(rng, split, count), "background": background(rng), "told": rng.random() < 0.3}


RECIPES: dict[str, Callable[[np.random.Generator, str, int], dict]] = {"base": base}
