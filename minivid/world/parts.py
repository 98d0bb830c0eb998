"""What a scene is made of: frozen records, the vocabulary of looks and motions, and one held-out rule.

Nothing here draws or samples. The one idea: a body is a list of *legs*. A leg is the complete state of the body (place,
velocity, acceleration, size, colour, spin ...) at its first frame, valid until the next leg starts, so every quantity at
any time, also between frames, is a closed formula. That is what makes the truth exact and any chunk renderable on its own.

Units: lengths in sides of the frame (x right, y down, the centre of the frame is .5), times in frames, angles in radians.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

# Saturated and far apart in hue. Backgrounds and occluders are muted, so that a pixel's saturation tells object from ground.
COLOURS = {
    "red": (0.90, 0.10, 0.10), "green": (0.08, 0.70, 0.15), "blue": (0.12, 0.22, 0.95),
    "yellow": (0.98, 0.86, 0.08), "magenta": (0.92, 0.14, 0.86), "cyan": (0.08, 0.84, 0.92),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "star")
SIZES = {"small": 0.13, "medium": 0.17, "large": 0.22}  # nominal radius in sides; 4.2, 5.4 and 7 px at 32
REACH = {"circle": 0.93, "square": 1.28, "triangle": 1.25, "star": 1.22}  # farthest point of the shape, in radii
EXTENT = {  # half width, height above and depth below the centre, in radii: where a shape touches walls and floor
    "circle": (0.93, 0.93, 0.93), "square": (0.9, 0.9, 0.9), "triangle": (1.0825, 1.25, 0.625), "star": (1.16, 1.22, 0.987),
}  # fmt: skip
MOTIONS = ("left", "right", "up", "down", "still")
DIRECTIONS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0), "still": (0.0, 0.0)}
DIAGONALS = {
    "up-left": (-0.75, -0.75), "up-right": (0.75, -0.75), "down-left": (-0.75, 0.75), "down-right": (0.75, 0.75),
}  # fmt: skip
OTHER = ("bounces", "orbits", "turns", "grows", "shrinks", "falls", "wanders", "curves", "collides", "script")
ALL_MOTIONS = MOTIONS + tuple(DIAGONALS) + OTHER
TEXTURES = ("plain", "striped", "checked", "dotted", "lined", "numbered", "gradient", "noisy")
TONES = {  # muted colours of backgrounds: (main, second), the second is what a texture is drawn with
    "dark": ((0.12, 0.12, 0.14), (0.24, 0.24, 0.26)), "grey": ((0.42, 0.42, 0.43), (0.53, 0.53, 0.53)),
    "light": ((0.80, 0.80, 0.78), (0.68, 0.68, 0.67)), "brown": ((0.34, 0.28, 0.23), (0.45, 0.39, 0.34)),
    "slate": ((0.26, 0.30, 0.35), (0.36, 0.40, 0.45)), "cream": ((0.80, 0.76, 0.68), (0.69, 0.65, 0.58)),
}  # fmt: skip


class Leg(NamedTuple):
    """Full state of a body at frame `start`; it holds until the next leg. `walls` > 0 folds the straight path between the
    walls `walls` and 1 - `walls` (an endless bounce); `orbit`, `omega`, `phase` add a circle; `shown` is its opacity."""

    start: float = 0.0
    x: float = 0.5
    y: float = 0.5
    vx: float = 0.0
    vy: float = 0.0
    ax: float = 0.0
    ay: float = 0.0
    radius: float = 0.17
    grow: float = 0.0
    angle: float = 0.0
    spin: float = 0.0
    red: float = 1.0
    green: float = 1.0
    blue: float = 1.0
    shown: float = 1.0
    walls: float = 0.0
    orbit: float = 0.0
    omega: float = 0.0
    phase: float = 0.0


@dataclass(frozen=True)
class Texture:
    """A pattern: `period` of its cells (sides), `angle`, `phase` (shift in cells), `value` (noise seed or digit)."""

    kind: str = "plain"
    period: float = 0.12
    angle: float = 0.0
    phase: float = 0.0
    value: int = 0


@dataclass(frozen=True)
class Body:
    """One object. `colour`, `shape`, `size`, `motion` are the words that the captions use; `legs` is what is drawn."""

    colour: str
    shape: str
    size: str
    motion: str
    legs: tuple[Leg, ...]
    texture: Texture = Texture()

    @property
    def radius(self) -> float:
        """Nominal radius at the start, in sides."""
        return self.legs[0].radius

    @property
    def reach(self) -> float:
        """Distance from the centre to the farthest point of the shape, in sides."""
        return self.legs[0].radius * REACH[self.shape]

    @property
    def speed(self) -> float:
        """Speed at the start, in sides per frame."""
        return float(np.hypot(self.legs[0].vx, self.legs[0].vy))


@dataclass(frozen=True)
class Background:
    """A muted ground. `first` and `second` are the colours in [0, 1] of the field and of the pattern on it."""

    tone: str = "grey"
    texture: Texture = Texture()
    first: tuple[float, float, float] = TONES["grey"][0]
    second: tuple[float, float, float] = TONES["grey"][1]


@dataclass(frozen=True)
class Camera:
    """`word` is still, left, right, up, down (pan), in, out (zoom) or shake. Pans in sides, `zoom` in log-gain per frame.

    It moves between the frames `start` and `stop` and rests before and after.
    """

    word: str = "still"
    vx: float = 0.0
    vy: float = 0.0
    zoom: float = 0.0
    shake: float = 0.0
    phase: float = 0.0
    start: float = 0.0
    stop: float = math.inf

    def at(self, times: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Offsets x and y (sides) and magnification at `times`: screen = (world - .5 - offset) * zoom + .5."""
        times = times.clip(self.start, self.stop) - self.start
        shake_x = np.sin(2.1 * times + self.phase) + np.sin(3.7 * times + 2 * self.phase)
        shake_y = np.sin(2.5 * times + 3 * self.phase) + np.sin(4.3 * times + self.phase)
        return (
            self.vx * times + 0.5 * self.shake * shake_x,
            self.vy * times + 0.5 * self.shake * shake_y,
            np.exp(self.zoom * times),
        )


@dataclass(frozen=True)
class Light:
    """`gain` multiplies every colour; `vignette` darkens the corners by that share."""

    word: str = "normal"
    gain: float = 1.0
    vignette: float = 0.0


@dataclass(frozen=True)
class Occluder:
    """An upright opaque bar in world coordinates, in front of every body: centre, half width, half height, grey level."""

    x: float
    y: float
    half_width: float
    half_height: float
    level: float = 0.6


@dataclass(frozen=True)
class Event:
    """Something that happens to `body` (an index) from `start` to `stop` (frames). `kind` names it, `word` details it."""

    start: float
    stop: float
    body: int
    kind: str
    word: str = ""


@dataclass(frozen=True)
class Physics:
    """`gravity` in sides per frame^2 (down), `restitution` = speed after / before a bounce."""

    gravity: float = 0.0
    restitution: float = 1.0


@dataclass(frozen=True)
class Scene:
    """A whole film: what is in it and how it moves, for every frame >= 0. Immutable and hashable.

    `cuts` is empty for one shot. Else it lists shots (each a Scene with its own bodies), and the outer scene's bodies are those
    of the first shot; with `period` > 0 the list repeats for ever. All shots run on the one clock of the film.
    """

    seed: tuple[int, int]
    recipe: str
    bodies: tuple[Body, ...]
    background: Background = Background()
    camera: Camera = Camera()
    light: Light = Light()
    occluder: Occluder | None = None
    events: tuple[Event, ...] = ()
    physics: Physics | None = None
    cuts: tuple["Cut", ...] = ()
    period: int = 0
    told: bool = False  # whether the short caption speaks of the background


@dataclass(frozen=True)
class Cut:
    """From frame `start` on, `shot` is on screen; it fades in over the `fade` frames before (0: a hard cut).

    Cuts with the same `name` show the same shot.
    """

    start: int
    shot: Scene
    fade: int = 0
    name: str = "A"


class State(NamedTuple):
    """The bodies at given times: arrays of bodies x times, `colour` with a last axis of 3."""

    x: np.ndarray
    y: np.ndarray
    vx: np.ndarray
    vy: np.ndarray
    radius: np.ndarray
    angle: np.ndarray
    colour: np.ndarray
    shown: np.ndarray


def states(bodies: Sequence[Body], times: np.ndarray) -> State:
    """Evaluate the legs of n bodies at `times` (n x f, in frames)."""
    most = max(len(body.legs) for body in bodies)
    legs = np.zeros((len(bodies), most, len(Leg._fields)))
    legs[:, :, 0] = np.inf
    for row, body in zip(legs, bodies, strict=True):
        row[: len(body.legs)] = body.legs
    if most == 1:
        now = np.broadcast_to(legs, (*times.shape, legs.shape[-1]))
    else:
        which = (legs[:, :, 0, None] <= times[:, None]).sum(1) - 1
        now = legs[np.arange(len(bodies))[:, None], which.clip(min=0)]
    leg: Any = Leg(*np.moveaxis(now, -1, 0))  # every field an array
    s = times - leg.start
    x, vx = _fold(leg.x + leg.vx * s + 0.5 * leg.ax * s * s, leg.vx + leg.ax * s, leg.walls)
    y, vy = _fold(leg.y + leg.vy * s + 0.5 * leg.ay * s * s, leg.vy + leg.ay * s, leg.walls)
    if leg.orbit.any():
        turn = leg.omega * s + leg.phase
        x, vx = x + leg.orbit * np.cos(turn), vx - leg.orbit * leg.omega * np.sin(turn)
        y, vy = y + leg.orbit * np.sin(turn), vy + leg.orbit * leg.omega * np.cos(turn)
    radius = (leg.radius + leg.grow * s).clip(min=0.01)
    return State(x, y, vx, vy, radius, leg.angle + leg.spin * s, now[..., 11:14], leg.shown)


def _fold(p: np.ndarray, v: np.ndarray, wall: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Reflect the coordinate p (velocity v) between `wall` and 1 - `wall`; where `wall` is 0 nothing changes."""
    if not wall.any():
        return p, v
    u = (p - wall) / (1 - 2 * wall)
    lap = np.floor(u)
    odd = lap % 2 == 1
    folded = np.where(odd, 1 - (u - lap), u - lap) * (1 - 2 * wall) + wall
    return np.where(wall > 0, folded, p), np.where((wall > 0) & odd, -v, v)


def held_out(colour: str, shape: str, motion: str) -> bool:
    """Whether a colour-shape-motion combination is kept from training.

    1 of 8 combinations of the four directions: every colour occurs in 2 of the 12, every shape and every direction in 3, and no
    pair of attributes is held out as a whole. Standing still is never held out; other motions take turns by their number.
    """
    c, s, m = list(COLOURS).index(colour), SHAPES.index(shape), ALL_MOTIONS.index(motion)
    if motion == "still":
        return False
    m = m if m < 4 else m - 5
    return (s - c) % 2 == 0 and m % 4 == (s + c // 2) % 4


HELD_OUT = held_out


def source(*words: int | str) -> np.random.Generator:
    """A random generator that is a pure function of its arguments (non-negative integers and strings)."""
    numbers = [int.from_bytes(word.encode(), "little") if isinstance(word, str) else int(word) for word in words]
    if any(number < 0 for number in numbers):
        raise ValueError(f"Seeds and indices must be >= 0, got {words}. Use a non-negative integer.")
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(numbers)))
