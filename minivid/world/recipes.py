"""How scenes are drawn from chance: one function per recipe, each (rng, split, seed, index) -> the fields of a Scene.

The single rule that binds all: colours and shapes are chosen after the motion, from the combinations that the split allows.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from .parts import (
    COLOURS,
    DIAGONALS,
    DIRECTIONS,
    EXTENT,
    MOTIONS,
    REACH,
    SHAPES,
    SIZES,
    TONES,
    Background,
    Body,
    Camera,
    Leg,
    Light,
    Occluder,
    Texture,
    held_out,
    states,
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
    period = {"gradient": 2.0, "noisy": 0.2}.get(kind, 0.22 + 0.14 * rng.random())
    angle = math.pi * rng.random() if kind in ("gradient", "noisy") else pick(rng, (0.0, math.pi / 2, math.pi / 4, -math.pi / 4))
    return Background(tone, Texture(kind, period, angle, rng.random(), int(rng.integers(1 << 30))), first, second)


def straight(rng: np.random.Generator, shape: str, radius: float, motion: str, speed: float) -> dict[str, float]:
    """A straight uniform path that keeps the whole body in the frame for 17 frames, uniform among those."""
    margin = radius * REACH[shape] + 0.01
    dx, dy = DIRECTIONS[motion] if motion in DIRECTIONS else DIAGONALS[motion]
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
    for attempt in range(10_000):
        first = not bodies
        motion = pick(rng, motions[:4]) if rng.random() > 0.1 or (first and split == "held-out") else "still"
        colour, shape = look(rng, motion, split if first or split == "all" else "train", tuple(b.colour for b in bodies))
        sizes = ("small", "medium", "medium", "large") if count == 1 else ("small", "medium") if count == 2 else ("small",)
        size = pick(rng, sizes if attempt < 100 else ("small",))
        speed = (0.012 + 0.016 * rng.random()) * (1 if count < 3 else 0.6)
        path = straight(rng, shape, SIZES[size], motion, speed)
        new = body(colour, shape, size, motion, **path)
        if all(apart(new, old) for old in bodies):
            bodies.append(new)
        if len(bodies) == count:
            return tuple(bodies)
        if attempt % 20 == 19:  # a bad first placement: begin again
            bodies = []
    raise RuntimeError(f"Found no place for {count} bodies that never touch. Ask for fewer.")


def base(rng: np.random.Generator, split: str, seed: int, index: int) -> dict:
    """The training world: one body (60 %) or two, four directions or still, plain or textured muted ground."""
    count = 1 if rng.random() < 0.6 else 2
    return {"bodies": some_bodies(rng, split, count), "background": background(rng), "told": rng.random() < 0.3}


def two(rng: np.random.Generator, split: str, seed: int, index: int) -> dict:
    """Two bodies, each with its own colour, shape, size and direction: binding."""
    return {"bodies": some_bodies(rng, split, 2), "background": background(rng), "told": rng.random() < 0.3}


def many(rng: np.random.Generator, split: str, seed: int, index: int) -> dict:
    """One to four small bodies (as many as index % 4 + 1): counting."""
    return {"bodies": some_bodies(rng, split, index % 4 + 1), "background": background(rng)}


def varied(rng: np.random.Generator, split: str, seed: int, index: int) -> dict:
    """One body that moves diagonally, bounces between the walls for ever, orbits, turns round, grows or shrinks."""
    motion = pick(rng, (*DIAGONALS, "bounces", "orbits", "turns", "grows", "shrinks"))
    colour, shape = look(rng, motion, split)
    texture = Texture("striped", 0.1) if motion == "turns" and shape == "circle" else Texture()  # else nothing is seen to turn
    size = {"grows": "small", "shrinks": "large"}.get(motion) or pick(rng, ("small", "medium"))
    radius, speed, way = SIZES[size], 0.014 + 0.014 * rng.random(), pick(rng, (-1, 1))
    margin = radius * REACH[shape] + 0.01
    if motion in DIAGONALS:
        path = straight(rng, shape, radius, motion, speed)
    elif motion == "orbits":
        orbit = 0.5 - margin
        path = {"orbit": orbit, "omega": way * speed / orbit, "phase": 2 * math.pi * rng.random()}
    else:
        path = {name: margin + (1 - 2 * margin) * rng.random() for name in "xy"}
        if motion == "bounces":
            turn = 2 * math.pi * rng.random()
            path |= {"walls": margin, "vx": 1.5 * speed * math.cos(turn), "vy": 1.5 * speed * math.sin(turn)}
        elif motion == "turns":
            path |= {"spin": way * (0.06 + 0.06 * rng.random())}
        else:
            rate = 0.0055 if motion == "grows" else -0.0065
            path = {name: 0.3 + 0.4 * rng.random() for name in "xy"} | {"grow": rate}
    return {
        "bodies": (body(colour, shape, size, motion, texture, **path),),
        "background": background(rng),
        "told": rng.random() < 0.3,
    }


def texture(rng: np.random.Generator) -> Texture:
    """A texture for a body; its phase is drawn per video and can't be known from a caption. `lined` is 1 px wide at 64 px."""
    kind = pick(rng, ("striped", "checked", "dotted", "lined", "numbered"))
    period = {"striped": 0.11, "checked": 0.13, "dotted": 0.1, "lined": 0.0625}.get(kind, 0.1)
    angle = 0.0 if kind == "numbered" else pick(rng, (0.0, math.pi / 4, math.pi / 2, -math.pi / 4))
    return Texture(kind, period, angle, rng.random(), int(rng.integers(10)))


def textured(rng: np.random.Generator, split: str, seed: int, index: int) -> dict:
    """Base with textured bodies on textured ground: striped, checked, dotted, thin lines, or a drawn 5 x 7 digit."""
    bodies = some_bodies(rng, split, 1 if rng.random() < 0.6 else 2)
    bodies = tuple(replace(one, texture=texture(rng)) for one in bodies)
    return {"bodies": bodies, "background": background(rng, plain=0.0)}


def light(rng: np.random.Generator, split: str, seed: int, index: int) -> dict:
    """Base in very dim light, in bright light, or lit in the middle only."""
    word = pick(rng, ("dim", "bright", "spot"))
    return base(rng, split, seed, index) | {"light": LIGHTS[word], "told": False}


LIGHTS = {"normal": Light(), "dim": Light("dim", 0.3), "bright": Light("bright", 1.3), "spot": Light("spot", 1.0, 0.9)}


def occluded(rng: np.random.Generator, split: str, seed: int, index: int) -> dict:
    """One small body that an upright or flat bar hides completely for 8 to 12 frames, again and again as it moves to and fro.

    Made for 40 frames and more: its colour, shape and speed can be seen before it goes behind the bar only.
    """
    motion = pick(rng, MOTIONS[:4])
    colour, shape = look(rng, motion, split)
    radius, speed, hidden = 0.09, 0.011 + 0.002 * rng.random(), 8 + 3.9 * rng.random()
    margin = radius * REACH[shape] + 0.01
    wide, high, deep = EXTENT[shape]  # the extent along the motion, not the reach: a square's corners lie across it
    half = radius * (wide if motion in ("left", "right") else (high + deep) / 2) + 0.5 * hidden * speed
    along, across, bar = 0.5 + 0.02 * (rng.random() - 0.5), margin + (1 - 2 * margin) * rng.random(), 2.0
    dx, dy = DIRECTIONS[motion]
    start = margin + 0.02 * rng.random()
    start = 1 - start if dx + dy < 0 else start
    x, y = (start, across) if dx else (across, start)
    path = body(colour, shape, "small", motion, x=x, y=y, vx=dx * speed, vy=dy * speed, walls=margin)
    path = replace(path, legs=(path.legs[0]._replace(radius=radius),))
    ground = background(rng)
    level = 0.92 if ground.first[0] < 0.5 else 0.08
    block = Occluder(along, 0.5, half, bar, level) if dx else Occluder(0.5, along, bar, half, level)
    return {"bodies": (path,), "background": ground, "occluder": block}


def camera(rng: np.random.Generator, split: str, seed: int, index: int) -> dict:
    """A textured world under a camera that is still, pans, zooms or shakes; the body stays in view for 17 frames."""
    lens, rate = CAMERAS[pick(rng, tuple(CAMERAS))], 0.6 + 0.8 * rng.random()
    lens = replace(lens, vx=lens.vx * rate, vy=lens.vy * rate, zoom=lens.zoom * rate, phase=2 * math.pi * rng.random())
    times = np.arange(_SEEN, dtype=float)
    for _ in range(500):
        bodies = some_bodies(rng, split, 1)
        state, (ox, oy, gain) = states(bodies, times[None]), lens.at(times)
        off = np.maximum(np.abs(state.x - 0.5 - ox), np.abs(state.y - 0.5 - oy)) * gain
        if (off + bodies[0].reach * gain).max() < 0.52:
            break
    return {"bodies": bodies, "background": background(rng, plain=0.0), "camera": lens}


CAMERAS = {
    "still": Camera(), "left": Camera("left", vx=-0.014), "right": Camera("right", vx=0.014), "up": Camera("up", vy=-0.014),
    "down": Camera("down", vy=0.014), "in": Camera("in", zoom=0.02), "out": Camera("out", zoom=-0.02),
    "shake": Camera("shake", shake=0.03),
}  # fmt: skip


SPEEDS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)  # px per frame at 32 px


def speed(rng: np.random.Generator, split: str, seed: int, index: int) -> dict:
    """The speed ladder: the ground flows by at SPEEDS[index % 6] px a frame (of 32 px); one body keeps its place on screen."""
    motion = pick(rng, MOTIONS[:4])
    colour, shape = look(rng, motion, split)
    dx, dy = (d * SPEEDS[index % 6] / 32 for d in DIRECTIONS[motion])
    margin = SIZES["medium"] * REACH[shape]
    one = body(colour, shape, "medium", motion, x=margin + (1 - 2 * margin) * rng.random(), y=0.5, vx=dx, vy=dy)
    return {"bodies": (one,), "background": background(rng, plain=0.0), "camera": Camera(motion, dx, dy)}


Recipe = Callable[[np.random.Generator, str, int, int], dict]
SIMPLE: dict[str, Recipe] = {
    "base": base, "two": two, "many": many, "varied": varied, "textured": textured, "light": light, "occluded": occluded,
    "camera": camera, "speed": speed,
}  # fmt: skip
