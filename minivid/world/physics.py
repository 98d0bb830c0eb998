"""Bodies that bounce, collide, or meet chance: the recipes whose paths come from a small event-driven simulation.

Between two contacts everything is an exact parabola, so each contact starts a new leg and its time is known to rounding error.
"""

import math
from dataclasses import replace

import numpy as np

from .parts import EXTENT, REACH, SIZES, Body, Event, Leg, Physics, source
from .recipes import Recipe, background, body, look, looks, pick

LAST = 512  # frames for which paths are worked out; afterwards the last leg goes on


def hit(p: float, v: float, a: float, low: float, high: float) -> float:
    """Time until the coordinate p + v s + a s^2 / 2 reaches `low` going down or `high` going up; inf if never."""
    best = math.inf
    for wall, side in ((low, -1), (high, 1)):
        gap = p - wall
        if a == 0:
            roots = (-gap / v,) if v else ()
        else:
            under = v * v - 2 * a * gap
            roots = ((-v - math.sqrt(under)) / a, (-v + math.sqrt(under)) / a) if under >= 0 else ()
        best = min([best, *(s for s in roots if s > -1e-9 and side * (v + a * s) > 1e-12)])
    return max(best, 0.0)


def meet(a: Leg, b: Leg, touch: float) -> float:
    """Time until two uniformly moving discs come to the distance `touch`; inf if they miss."""
    x, y, vx, vy = b.x - a.x, b.y - a.y, b.vx - a.vx, b.vy - a.vy
    closing, speed = x * vx + y * vy, vx * vx + vy * vy
    if closing >= 0:
        return math.inf
    under = closing * closing - speed * (x * x + y * y - touch * touch)
    return max((-closing - math.sqrt(under)) / speed, 0.0) if under >= 0 else math.inf


def later(leg: Leg, time: float) -> Leg:
    """The same flight, restarted at `time`."""
    s = time - leg.start
    return leg._replace(
        start=time, x=leg.x + leg.vx * s + 0.5 * leg.ax * s * s, y=leg.y + leg.vy * s + 0.5 * leg.ay * s * s,
        vx=leg.vx + leg.ax * s, vy=leg.vy + leg.ay * s,
        radius=leg.radius + leg.grow * s, angle=leg.angle + leg.spin * s,
    )  # fmt: skip


def simulate(bodies: tuple[Body, ...], physics: Physics, last: int = LAST) -> tuple[tuple[Body, ...], tuple[Event, ...]]:
    """Let bodies fly until frame `last` between walls, floor and ceiling; equal masses; discs hit each other elastically.

    Body against body needs gravity 0 (then relative motion is uniform) and circles, so that contact is exact on the pixels.
    """
    legs = [[one.legs[0]] for one in bodies]
    events: list[Event] = []
    for _ in range(2000):
        options = []
        for i, one in enumerate(bodies):
            now, (wide, high, deep) = legs[i][-1], (e * one.radius for e in EXTENT[one.shape])
            options.append((now.start + hit(now.x, now.vx, now.ax, wide, 1 - wide), i, -1))
            options.append((now.start + hit(now.y, now.vy, now.ay, high, 1 - deep), i, -2))
            for j in range(i):
                start = max(now.start, legs[j][-1].start)
                touch = (one.radius + bodies[j].radius) * EXTENT["circle"][0]
                options.append((start + meet(later(legs[j][-1], start), later(now, start), touch), i, j))
        time, i, other = min(options)
        if time >= last:
            break
        now = later(legs[i][-1], time)
        if other >= 0:
            _exchange(legs, i, other, time)
        elif other == -1:
            legs[i].append(now._replace(vx=-physics.restitution * now.vx))
        else:
            floor = now.vy > 0
            up = -physics.restitution * now.vy
            rests = floor and physics.gravity > 0 and -up < 1.5 * physics.gravity  # flights under 3 frames: lie still
            legs[i].append(now._replace(vy=0.0 if rests else up, ay=0.0 if rests else now.ay))
        word = "other" if other >= 0 else "wall" if other == -1 or not floor else "floor"
        events.append(Event(time, time, i, "contact", word))
    return tuple(replace(one, legs=tuple(flight)) for one, flight in zip(bodies, legs, strict=True)), tuple(events)


def _exchange(legs: list[list[Leg]], i: int, j: int, time: float) -> None:
    """Elastic collision of equal masses: the velocities along the line of centres change places."""
    a, b = later(legs[i][-1], time), later(legs[j][-1], time)
    nx, ny = b.x - a.x, b.y - a.y
    norm = math.hypot(nx, ny)
    nx, ny = nx / norm, ny / norm
    pass_on = (a.vx - b.vx) * nx + (a.vy - b.vy) * ny
    legs[i].append(a._replace(vx=a.vx - pass_on * nx, vy=a.vy - pass_on * ny))
    legs[j].append(b._replace(vx=b.vx + pass_on * nx, vy=b.vy + pass_on * ny))


def gravity(rng: np.random.Generator, split: str, seed: int, index: int) -> dict:
    """One thrown body under gravity g in .001 ... .004 sides/frame^2 that bounces with restitution .6 ... 1."""
    colour, shape = look(rng, "falls", split)
    laws = Physics(0.001 + 0.003 * rng.random(), 0.6 + 0.4 * rng.random())
    size = pick(rng, ("small", "medium"))
    margin = SIZES[size] * REACH[shape] + 0.01
    x, y = margin + (1 - 2 * margin) * rng.random(), margin + 0.25 * rng.random()
    one = body(colour, shape, size, "falls", x=x, y=y, vx=0.04 * (rng.random() - 0.5), vy=0.01 * rng.random(), ay=laws.gravity)
    bodies, events = simulate((one,), laws)
    return {"bodies": bodies, "events": events, "physics": laws, "background": background(rng, plain=0.8)}


def collide(rng: np.random.Generator, split: str, seed: int, index: int) -> dict:
    """Two discs without gravity: at even indices they touch within 16 frames, at odd ones they don't ("will touch")."""
    wanted, laws = index % 2 == 0, Physics(0.0, 1.0)
    words = ("collides", "collides") if wanted else ("right", "left")
    while True:
        discs: list[Body] = []
        for k, motion in enumerate(words):
            pairs = looks(motion, split if k == 0 or split == "all" else "train")
            colour = pick(rng, [c for c, shape in pairs if shape == "circle" and c not in [d.colour for d in discs]])
            x, y = 0.2 + 0.15 * rng.random() + 0.45 * k, 0.2 + 0.6 * rng.random()
            speed, turn = 0.012 + 0.014 * rng.random(), math.pi * k + 1.2 * (rng.random() - 0.5)
            discs.append(body(colour, "circle", "small", motion, x=x, y=y, vx=speed * math.cos(turn), vy=speed * math.sin(turn)))
        if (meet(discs[0].legs[0], discs[1].legs[0], 2 * EXTENT["circle"][0] * SIZES["small"]) < 15) != wanted:
            continue
        early = [event.word for event in simulate(tuple(discs), laws, last=16)[1]]
        if early == ["other"] or (not wanted and not early):  # no wall spoils the question
            bodies, events = simulate(tuple(discs), laws)
            return {"bodies": bodies, "events": events, "physics": laws, "background": background(rng, plain=0.8)}


def futures(rng: np.random.Generator, split: str, seed: int, index: int) -> dict:
    """One body that leaves every wall with a new random velocity: nothing in the past tells it, nor does the caption."""
    colour, shape = look(rng, "wanders", split)
    wide, high, deep = (SIZES["small"] * e for e in EXTENT[shape])
    speed, turn = 0.016 + 0.02 * rng.random(), 2 * math.pi * rng.random()
    one = body(colour, shape, "small", "wanders", x=0.3 + 0.4 * rng.random(), y=0.3 + 0.4 * rng.random())
    legs, events = [one.legs[0]._replace(vx=speed * math.cos(turn), vy=speed * math.sin(turn))], []
    while True:
        now = legs[-1]
        times = (hit(now.x, now.vx, 0.0, wide, 1 - wide), hit(now.y, now.vy, 0.0, high, 1 - deep))
        time = now.start + min(times)
        if time >= LAST:
            break
        inward = math.atan2(0, -now.vx) if times[0] < times[1] else math.atan2(-now.vy, 0)
        speed, turn = 0.016 + 0.02 * rng.random(), inward + 2.4 * (rng.random() - 0.5)
        legs.append(later(now, time)._replace(vx=speed * math.cos(turn), vy=speed * math.sin(turn)))
        events.append(Event(time, time, 0, "contact", "wall"))
    return {"bodies": (replace(one, legs=tuple(legs)),), "events": tuple(events), "background": background(rng, plain=0.8)}


def bridge(rng: np.random.Generator, split: str, seed: int, index: int) -> dict:
    """All indices of one seed share the look, frame 0 and frame 15; the index picks the curved path and its speed between.

    Two parabolas joined without a kink at a random place and moment. Read backwards, the family has the same law.
    """
    common = source(seed, "bridge", split)
    colour, shape = look(common, "curves", split)
    ground, size = background(common, plain=0.8), "small"
    margin = SIZES[size] * REACH[shape] + 0.01
    ends = margin + (1 - 2 * margin) * common.random((2, 2)) * ((0.2, 1), (0.2, 1)) + ((0, 0), (0.8 * (1 - 2 * margin), 0))
    ends = ends if common.random() < 0.5 else ends[::-1]
    while True:
        middle = margin + (1 - 2 * margin) * rng.random(2)
        first = 5 + 5 * rng.random()
        second = 15 - first
        pass_by = (ends[1] - ends[0]) / 15 * (0.4 + 1.2 * rng.random()) + 0.01 * (rng.random(2) - 0.5)
        v0, v1 = 2 * (middle - ends[0]) / first - pass_by, 2 * (ends[1] - middle) / second - pass_by
        a0, a1 = (pass_by - v0) / first, (v1 - pass_by) / second
        s = np.linspace(0, 1, 9)[:, None]
        path = np.concatenate(
            [ends[0] + v0 * s * first + a0 * (s * first) ** 2 / 2, middle + pass_by * s * second + a1 * (s * second) ** 2 / 2]
        )
        if path.min() > margin - 0.01 and path.max() < 1.01 - margin and max(np.hypot(*v0), np.hypot(*v1)) < 0.1:
            break
    one = body(colour, shape, size, "curves")
    begin, turn, rest = (
        (*place, *v, *a) for place, v, a in ((ends[0], v0, a0), (middle, pass_by, a1), (ends[1], (0, 0), (0, 0)))
    )
    names = ("x", "y", "vx", "vy", "ax", "ay")
    legs = tuple(
        one.legs[0]._replace(start=start, **{n: float(v) for n, v in zip(names, values, strict=True)})
        for start, values in ((0.0, begin), (first, turn), (15.0, rest))
    )
    return {"bodies": (replace(one, legs=legs),), "background": ground}


PHYSICAL: dict[str, Recipe] = {"gravity": gravity, "collide": collide, "futures": futures, "bridge": bridge}
