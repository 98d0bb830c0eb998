"""Films of several parts: scripts of events, cuts and cross-fades, and the endless film whose first scene comes back."""

import math
from dataclasses import replace

import numpy as np

from .parts import COLOURS, DIRECTIONS, MOTIONS, REACH, SIZES, Body, Camera, Cut, Event, Leg, Scene, held_out
from .physics import later
from .recipes import Recipe, background, base, body, look, pick, texture

SCRIPT_FRAMES = 64  # every event of a script ends by then


def script(rng: np.random.Generator, split: str, seed: int, index: int) -> dict:
    """2 to 12 events in 64 frames, bursty or evenly spaced, that happen to one or two bodies and, once at most, the camera.

    A body appears, leaves, returns, moves L/R/U/D, turns another colour, grows, shrinks, turns round or bounces.
    """
    count = int(rng.integers(2, 13))
    weight = np.ones(count + 1) if rng.random() < 0.5 else rng.random(count + 1) ** 4
    gaps = 3 + (SCRIPT_FRAMES - 3 * (count + 1)) * weight / weight.sum()
    times = [*np.floor(np.cumsum(gaps)[:-1]).tolist(), float(SCRIPT_FRAMES)]
    people, flights, colours, met = [], [], [], []
    for k in range(1 + (rng.random() < 0.4)):
        allowed = split if k == 0 or split == "all" else "train"
        colour, shape = look(rng, "script", allowed, tuple(colours))
        person = body(colour, shape, "small", "script", x=0.3 + 0.4 * rng.random(), y=0.28 + 0.46 * k)
        met.append(rng.random() < 0.7)
        people.append(person), colours.append(colour), flights.append([person.legs[0]._replace(shown=float(met[k]))])
    lens, events = Camera(), []
    for number, (start, stop) in enumerate(zip(times, times[1:], strict=False)):
        stop = min(stop, start + 8)
        if number and lens.word == "still" and rng.random() < 0.08:
            word = pick(rng, MOTIONS[:4])
            lens = Camera(word, *(0.012 * d for d in DIRECTIONS[word]), start=start, stop=stop)
            events.append(Event(start, stop, -1, "camera", word))
            continue
        k = number if number < len(people) else int(rng.integers(len(people)))
        kind, word, legs = _act(rng, flights[k][-1], (colours, k, people[k].shape, met[k]), (start, stop), split)
        met[k], colours[k] = True, word if kind == "recolour" else colours[k]
        events.append(Event(start, start if kind in _AT_ONCE else stop, k, kind, word))
        flights[k] += legs
    bodies = tuple(replace(person, legs=tuple(flight)) for person, flight in zip(people, flights, strict=True))
    return {"bodies": bodies, "events": tuple(events), "camera": lens, "background": background(rng, plain=0.7)}


_AT_ONCE = ("appear", "return", "leave", "recolour")


def _act(
    rng: np.random.Generator, leg: Leg, who: tuple[list[str], int, str, bool], when: tuple[float, float], split: str
) -> tuple[str, str, list[Leg]]:
    """What a body does next: the event's kind and word, and its legs. `who`: all colours, its number, shape, met."""
    (colours, k, shape, met), (start, stop) = who, when
    length = stop - start
    rest = later(leg, start)._replace(vx=0.0, vy=0.0, grow=0.0, spin=0.0)
    if not rest.shown:
        return "return" if met else "appear", "", [rest._replace(shown=1.0)]
    kinds = ["move"] * 5 + ["recolour", "leave", "bounce", "grow" if rest.radius < 0.11 else "shrink"]
    kind = pick(rng, [*kinds, "spin"] if shape != "circle" else kinds)
    if kind == "leave":
        return kind, "", [rest._replace(shown=0.0)]
    if kind == "recolour":
        free = [c for c in COLOURS if c not in colours and (split != "train" or not held_out(c, shape, "script"))]
        word = pick(rng, free)
        red, green, blue = COLOURS[word]
        return kind, word, [rest._replace(red=red, green=green, blue=blue)]
    word, margin, reach = "", rest.radius * REACH[shape], 0.022 * length
    if kind == "move":
        free = [
            m for m in MOTIONS[:4]
            if all(margin < p + d * reach < 1 - margin for p, d in zip((rest.x, rest.y), DIRECTIONS[m], strict=True))
            and (split != "train" or not held_out(colours[k], shape, m))
        ]  # fmt: skip
        word = pick(rng, free) if free else ""
        kind = kind if free else "bounce"
    if kind == "move":
        dx, dy = DIRECTIONS[word]
        legs = [rest._replace(vx=0.022 * dx, vy=0.022 * dy)]
    elif kind == "bounce":
        way = -0.02 if rest.y - margin > 0.01 * length else 0.02
        legs = [rest._replace(vy=way)]
        legs.append(later(legs[0], start + length / 2)._replace(vy=-way))
    elif kind == "spin":
        legs = [rest._replace(spin=2 * math.pi / length)]
    else:
        legs = [rest._replace(grow=(0.04 if kind == "grow" else -0.04) / length)]
    return kind, word, [*legs, later(legs[-1], stop)._replace(vx=0.0, vy=0.0, grow=0.0, spin=0.0)]


def cuts(rng: np.random.Generator, split: str, seed: int, index: int) -> dict:
    """Two or three base shots; even indices are cut hard, odd ones fade over 3 frames. The first change is in frames 5 ... 12.

    The control without a cut is the recipe base. Shots differ in everything.
    """
    fade, start, shots = 3 * (index % 2), 0, []
    for number in range(2 + (rng.random() < 0.5)):
        parts = base(rng, split if number == 0 or split == "all" else "train", seed, index) | {"told": False}
        shots.append(Cut(start, Scene((seed, index), "base", **parts), fade if number else 0, "ABC"[number]))
        start += int(rng.integers(5, 13))
    kind = "fade" if fade else "cut"
    events = tuple(Event(float(cut.start - cut.fade), float(cut.start), -1, kind) for cut in shots[1:])
    return {"bodies": shots[0].shot.bodies, "background": shots[0].shot.background, "cuts": tuple(shots), "events": events}


def recurrent(rng: np.random.Generator, split: str, seed: int, index: int) -> dict:
    """A film without end, A B A C A B A C ...: scene A keeps coming back, and no caption tells its colours or textures.

    Every shot holds for 8, 12 or 16 frames (whole chunks of 4) and has one body that goes to and fro between the walls for ever,
    on one clock, so the path goes on behind the back. At odd indices C is a look-alike of A that differs in one attribute only.
    """
    shots = {}
    for name in "ABC":
        allowed = split if name == "A" or split == "all" else "train"
        motion = pick(rng, MOTIONS[:4])
        colour, shape = look(rng, motion, allowed)
        size, speed = pick(rng, ("small", "medium")), 0.014 + 0.014 * rng.random()
        margin = SIZES[size] * REACH[shape] + 0.01
        dx, dy = DIRECTIONS[motion]
        x, y = (margin + (1 - 2 * margin) * rng.random() for _ in range(2))
        one = body(colour, shape, size, motion, x=x, y=y, vx=dx * speed, vy=dy * speed, walls=margin)
        one = replace(one, texture=texture(rng)) if rng.random() < 0.3 else one
        shots[name] = Scene((seed, index), "recurrent", (one,), background(rng, plain=0.3))
    if index % 2:
        shots["C"] = _look_alike(rng, shots["A"], split)
    start, film = 0, []
    for name in "ABAC":
        film.append(Cut(start, shots[name], 0, name))
        start += 4 * int(rng.integers(2, 5))
    first = shots["A"]
    return {"bodies": first.bodies, "background": first.background, "cuts": tuple(film), "period": start}


def _look_alike(rng: np.random.Generator, scene: Scene, split: str) -> Scene:
    """The same scene but for one of: the colour of its body, its texture, or the ground."""
    one: Body = scene.bodies[0]
    what = pick(rng, ("colour", "texture", "ground"))
    if what == "ground":
        ground = scene.background
        while ground.tone == scene.background.tone:
            ground = replace(background(rng, plain=1.0), texture=ground.texture)
        return replace(scene, background=ground)
    if what == "texture":
        new = one.texture
        while new.kind == one.texture.kind:
            new = texture(rng)
        return replace(scene, bodies=(replace(one, texture=new),))
    allowed = [c for c in COLOURS if c != one.colour and (split != "train" or not held_out(c, one.shape, one.motion))]
    colour = pick(rng, allowed)
    red, green, blue = COLOURS[colour]
    legs = tuple(leg._replace(red=red, green=green, blue=blue) for leg in one.legs)
    return replace(scene, bodies=(replace(one, colour=colour, legs=legs),))


FILMS: dict[str, Recipe] = {"script": script, "cuts": cuts, "recurrent": recurrent}
