"""Scenes from seeds: `draw` one, `stream` many, `vary` one attribute. Everything is a pure function of the seed."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from .films import FILMS
from .parts import (
    COLOURS,
    DIAGONALS,
    DIRECTIONS,
    MOTIONS,
    SHAPES,
    SIZES,
    TEXTURES,
    TONES,
    Body,
    Scene,
    source,
    states,
)  # fmt: skip
from .physics import PHYSICAL
from .recipes import CAMERAS, LIGHTS, SIMPLE, SPLITS, pick

RECIPES = {**SIMPLE, **PHYSICAL, **FILMS}


def draw(seed: int, index: int = 0, recipe: str = "base", split: str = "train") -> Scene:
    """Scene number `index` of the endless list named by (seed, recipe, split); any order, no state.

    `split` is "train" (no held-out colour-shape-motion combination), "held-out" (the first body is one) or "all".
    """
    if recipe not in RECIPES:
        raise ValueError(f"Unknown recipe {recipe!r}. Use one of: {', '.join(RECIPES)}.")
    if split not in SPLITS:
        raise ValueError(f"Unknown split {split!r}. Use one of: {', '.join(SPLITS)}.")
    rng = source(seed, index, recipe, split)
    return Scene(seed=(seed, index), recipe=recipe, **RECIPES[recipe](rng, split, seed, index))


def stream(seed: int, recipe: str = "base", split: str = "train") -> Iterator[Scene]:
    """draw(seed, 0), draw(seed, 1), ... without end."""
    index = 0
    while True:
        yield draw(seed, index, recipe, split)
        index += 1


VARIABLE = ("colour", "shape", "size", "motion", "speed", "place", "texture", "tone", "ground", "light", "camera")


def vary(scene: Scene, field: str, seed: int = 0, index: int = 0, value: str | None = None) -> Scene:
    """The scene with exactly one attribute changed, to `value` or else to one chosen by `seed`.

    `field` is one of VARIABLE: of body number `index` its colour (to one that no other body has), shape, size, motion (of a
    straight mover: it starts from the same place, so frame 0 stays equal, and stays in the frame if it can), speed, place or
    texture; or of the scene its background tone, ground texture, light or camera. Held-out combinations may result.
    """
    if field not in VARIABLE:
        raise ValueError(f"Unknown field {field!r}. Use one of: {', '.join(VARIABLE)}.")
    if scene.cuts:
        raise ValueError(
            "A film with cuts has no single attribute to vary. Vary one of its shots: vary(scene.cuts[0].shot, ...)."
        )
    if not 0 <= index < len(scene.bodies):
        raise ValueError(f"Expected a body number below {len(scene.bodies)}, got {index}.")
    rng = source(seed, "vary", field)
    if field in _OF_SCENE:
        return replace(scene, **_OF_SCENE[field](scene, rng, value))
    others = [body for i, body in enumerate(scene.bodies) if i != index]
    changed = _OF_BODY[field](scene.bodies[index], others, rng, value)
    return replace(scene, bodies=tuple(changed if i == index else body for i, body in enumerate(scene.bodies)))


def _choose(
    what: str, options: Sequence[str], old: str, rng: np.random.Generator, value: str | None, free: Sequence[str] = ()
) -> str:
    """`value` if it is allowed, else one of `free` (by default of all `options`) that differs from `old`."""
    if value is not None and value not in options:
        raise ValueError(f"Unknown {what} {value!r}. Use one of: {', '.join(options)}.")
    return value if value is not None else pick(rng, [option for option in free or options if option != old])


def _each(body: Body, **change) -> Body:
    return replace(body, legs=tuple(leg._replace(**{k: v(leg) for k, v in change.items()}) for leg in body.legs))


def _colour(body: Body, others: list[Body], rng: np.random.Generator, value: str | None) -> Body:
    taken = [other.colour for other in others]
    new = _choose("colour", tuple(COLOURS), body.colour, rng, value, [c for c in COLOURS if c not in taken])
    old, (red, green, blue) = COLOURS[body.colour], COLOURS[new]
    legs = tuple(
        leg._replace(red=red, green=green, blue=blue) if (leg.red, leg.green, leg.blue) == old else leg for leg in body.legs
    )
    return replace(body, colour=new, legs=legs)


def _shape(body: Body, others: list[Body], rng: np.random.Generator, value: str | None) -> Body:
    return replace(body, shape=_choose("shape", SHAPES, body.shape, rng, value))


def _size(body: Body, others: list[Body], rng: np.random.Generator, value: str | None) -> Body:
    new = _choose("size", tuple(SIZES), body.size, rng, value)
    ratio = SIZES[new] / SIZES[body.size]
    return replace(_each(body, radius=lambda leg: leg.radius * ratio), size=new)


def _motion(body: Body, others: list[Body], rng: np.random.Generator, value: str | None) -> Body:
    ways = DIRECTIONS | DIAGONALS
    if body.motion not in ways or len(body.legs) > 1:
        raise ValueError(
            f"The motion of a body that {body.motion!r} describes can't be varied. Use a straight mover, as in base."
        )
    leg, margin, speed = body.legs[0], body.reach, body.speed or 0.02
    free = [
        m for m in MOTIONS
        if all(margin < p + 16 * speed * d < 1 - margin for p, d in zip((leg.x, leg.y), ways[m], strict=True))
    ]  # fmt: skip
    options = [m for m in free if m != body.motion] or [m for m in ("still", "left", "right") if m != body.motion]
    new = _choose("motion", tuple(ways), body.motion, rng, value, options)
    dx, dy = (speed * d for d in ways[new])
    return replace(body, motion=new, legs=(leg._replace(vx=dx, vy=dy),))


def _speed(body: Body, others: list[Body], rng: np.random.Generator, value: str | None) -> Body:
    factor = {"slower": 0.5, "faster": 2.0}[_choose("speed", ("slower", "faster"), "", rng, value)]
    if len(body.legs) > 1 or not body.speed:
        raise ValueError("Only the speed of a body that moves without contacts can be varied. Use a straight mover, as in base.")
    return _each(body, vx=lambda leg: leg.vx * factor, vy=lambda leg: leg.vy * factor)


def _place(body: Body, others: list[Body], rng: np.random.Generator, value: str | None) -> Body:
    if value is not None:
        raise ValueError("A place has no name. Leave `value` out and choose it by the seed.")
    dx, dy = (low + (high - low) * rng.random() for low, high in (_room(body, "x"), _room(body, "y")))
    return _each(body, x=lambda leg: leg.x + dx, y=lambda leg: leg.y + dy)


def _room(body: Body, axis: str) -> tuple[float, float]:
    """How far a body may be shifted along an axis so that it stays in the frame for 17 frames."""
    state = states([body], np.arange(17.0)[None])
    path = getattr(state, axis)[0]
    return min(body.reach - path.min(), 0.0), max(1 - body.reach - path.max(), 0.0)


def _texture(body: Body, others: list[Body], rng: np.random.Generator, value: str | None) -> Body:
    new = _choose("texture", TEXTURES, body.texture.kind, rng, value)
    return replace(body, texture=replace(body.texture, kind=new))


def _tone(scene: Scene, rng: np.random.Generator, value: str | None) -> dict:
    new = _choose("tone", tuple(TONES), scene.background.tone, rng, value)
    return {"background": replace(scene.background, tone=new, first=TONES[new][0], second=TONES[new][1])}


def _ground(scene: Scene, rng: np.random.Generator, value: str | None) -> dict:
    old = scene.background.texture
    new = _choose("ground", ("plain", "striped", "checked", "dotted", "noisy", "gradient"), old.kind, rng, value)
    return {"background": replace(scene.background, texture=replace(old, kind=new, period=2.0 if new == "gradient" else 0.2))}


def _light(scene: Scene, rng: np.random.Generator, value: str | None) -> dict:
    return {"light": LIGHTS[_choose("light", tuple(LIGHTS), scene.light.word, rng, value)]}


def _camera(scene: Scene, rng: np.random.Generator, value: str | None) -> dict:
    return {"camera": CAMERAS[_choose("camera", tuple(CAMERAS), scene.camera.word, rng, value)]}


_OF_BODY = {
    "colour": _colour, "shape": _shape, "size": _size, "motion": _motion, "speed": _speed, "place": _place, "texture": _texture,
}  # fmt: skip
_OF_SCENE = {"tone": _tone, "ground": _ground, "light": _light, "camera": _camera}
