"""Scenes from seeds: `draw` one, `stream` many, `vary` one attribute. Everything is a pure function of the seed."""

from collections.abc import Iterator
from dataclasses import replace

from .parts import (
    ALL_MOTIONS, COLOURS, DIRECTIONS, HELD_OUT, MOTIONS, SHAPES, SIZES, TEXTURES, TONES,
    Background, Body, Camera, Cut, Event, Leg, Light, Occluder, Physics, Scene, State, Texture, held_out, source, states,
)  # fmt: skip
from .films import FILMS
from .physics import PHYSICAL
from .recipes import SIMPLE, SPLITS

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
