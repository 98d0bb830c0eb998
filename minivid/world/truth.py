"""What is really in a clip: places, masks, depth order, exact flow, point tracks, plates, events - computed, never estimated.

Flow and tracks follow *points of surfaces*: a point keeps its place on its body (which may move, turn and grow) or on the ground,
and the camera projects it. Positions are in pixels of the clip, x right and y down; the centre of pixel i is i + .5.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .parts import Body, Event, Physics, Scene, Texture, states
from .render import bar, camera, clock, distance, ground, lighting, look, screen_grid, shots


@dataclass(frozen=True)
class Truth:
    """Ground truth of one clip: k bodies, f frames, n tracked points. "seen" arrays say where the vectors mean something."""

    bodies: tuple[Body, ...]
    centres: Float[Tensor, "k f xy"]  # px
    velocity: Float[Tensor, "k f xy"]  # px per frame: the centre's displacement to the next frame
    full: Float[Tensor, "k f h w"]  # coverage in [0, 1] as if nothing were in front
    visible: Float[Tensor, "k f h w"]  # coverage that is left behind nearer bodies and the occluder
    order: Int[Tensor, "f h w"]  # nearest surface at the pixel's centre: -1 ground, body number, k occluder
    forward: Float[Tensor, "xy f h w"]  # px; where the surface point of a pixel is in the next frame
    backward: Float[Tensor, "xy f h w"]  # px; the same for the frame before
    forward_seen: Bool[Tensor, "f h w"]  # the point is in view and uncovered in the next frame, and no cut lies between
    backward_seen: Bool[Tensor, "f h w"]
    tracks: Float[Tensor, "n f xy"]  # px; points of a regular grid in the first frame
    tracks_seen: Bool[Tensor, "n f"]
    plate: Float[Tensor, "c f h w"]  # in [-1, 1]: the clip without bodies and occluder
    shot: Int[Tensor, "f"]  # number of the shot on screen; it changes at a cut (in a fade: half-way)
    events: tuple[Event, ...]  # all that overlap the clip, contacts included
    physics: Physics | None

    @property
    def contacts(self) -> tuple[Event, ...]:
        """Touches of walls, floor, or one another, at exact times."""
        return tuple(event for event in self.events if event.kind == "contact")


def truth(scene: Scene, size: int = 32, frames: int = 16, start: int = 0, grid: int = 8) -> Truth:
    """The truth of render(scene, size, frames, start), with grid x grid tracked points."""
    if grid < 1:
        raise ValueError(f"Expected grid >= 1 points a side, got {grid}.")
    times = clock(1, size, frames, start)[0]
    around = np.arange(start - 1, start + frames + 1, dtype=float)
    parts = shots(scene, around)
    weights = np.stack([weight for _, weight in parts])
    which = weights.argmax(0)
    many = [_shot(shot, size, times, grid) for shot, _ in parts]
    bodies = tuple(body for shot, _ in parts for body in shot.bodies)
    first = np.cumsum([0] + [len(shot.bodies) for shot, _ in parts])
    now = torch.from_numpy(which[1:-1])
    on = [now == i for i in range(len(parts))]

    def choose(key: str, dim: int) -> Tensor:
        """Frames (at `dim`) of each shot's array, taken where that shot is on screen."""
        return torch.stack([m[key].movedim(dim, 0)[f] for f, i in enumerate(now.tolist()) for m in [many[i]]]).movedim(0, dim)

    def gated(key: str) -> Tensor:
        return torch.cat([m[key] * flag[None, :, None, None] for m, flag in zip(many, on, strict=True)])

    for i, m in enumerate(many):  # body numbers of this shot -> numbers in the whole film
        count = len(parts[i][0].bodies)
        order = m["order"]
        m["order"] = torch.where(order == count, len(bodies), torch.where(order >= 0, order + int(first[i]), order))
    stays_next, stays_last = (torch.from_numpy(a)[:, None, None] for a in (which[1:-1] == which[2:], which[1:-1] == which[:-2]))
    lead = int(now[0])
    plate = sum(m["plate"] * torch.from_numpy(w[1:-1]).float()[:, None, None] for m, w in zip(many, weights, strict=True))
    return Truth(
        bodies=bodies, centres=torch.cat([m["centres"] for m in many]), velocity=torch.cat([m["velocity"] for m in many]),
        full=gated("full"), visible=gated("visible"), order=choose("order", 0),
        forward=choose("forward", 1), backward=choose("backward", 1),
        forward_seen=choose("forward_seen", 0) & stays_next, backward_seen=choose("backward_seen", 0) & stays_last,
        tracks=many[lead]["tracks"], tracks_seen=many[lead]["tracks_seen"] & on[lead],
        plate=plate, shot=now, physics=scene.physics,
        events=tuple(event for event in scene.events if event.stop >= times[0] and event.start <= times[-1]),
    )  # fmt: skip


def _shot(scene: Scene, size: int, times: np.ndarray, grid: int) -> dict[str, Tensor]:
    """Truth of a scene without cuts at `times`."""
    f, k = len(times), len(scene.bodies)
    step = np.arange(size) + 0.5
    y, x = np.broadcast_arrays(*np.meshgrid(step, step, indexing="ij"))
    x, y = (np.broadcast_to(p, (f, size, size)) for p in (x, y))
    order, x_world, y_world = _surface(scene, x, y, times, size)
    out: dict[str, Tensor] = {"order": torch.from_numpy(order)}
    for name, side in (("forward", 1), ("backward", -1)):
        to_x, to_y = _carry(scene, order, x_world, y_world, times, times + side, size)
        there = _surface(scene, to_x, to_y, times + side, size)[0]
        out[name] = torch.from_numpy(np.stack([to_x - x, to_y - y])).float()
        out[name + "_seen"] = torch.from_numpy((there == order) & _inside(to_x, to_y, size))
    now, after = (_centres(scene, t, size) for t in (times, times + 1))
    out["centres"], out["velocity"] = torch.from_numpy(now).float(), torch.from_numpy(after - now).float()
    out |= _masks(scene, size, times)
    out |= _tracks(scene, size, times, grid)
    view = camera([scene], times[None])
    plate = ground([scene], size, view)[0]
    if scene.light.gain != 1 or scene.light.vignette:
        plate = plate * lighting(scene, size)[:, :, None]
    out["plate"] = plate.clamp(0, 1).permute(3, 0, 1, 2) * 2 - 1
    assert out["centres"].shape == (k, f, 2)
    return out


def _inside(x: np.ndarray, y: np.ndarray, size: int) -> np.ndarray:
    return (x >= 0) & (x <= size) & (y >= 0) & (y <= size)


def _lens(scene: Scene, times: np.ndarray, ndim: int) -> tuple[np.ndarray, ...]:
    """Camera offsets and zoom at `times`, shaped to broadcast over f x ... arrays of `ndim` axes."""
    return tuple(p.reshape(-1, *[1] * (ndim - 1)) for p in scene.camera.at(times))


def _centres(scene: Scene, times: np.ndarray, size: int) -> np.ndarray:
    """Body centres on screen in px, k x f x 2."""
    state = states(scene.bodies, np.broadcast_to(times, (len(scene.bodies), len(times))))
    dx, dy, zoom = scene.camera.at(times)
    return size * np.stack([(state.x - 0.5 - dx) * zoom + 0.5, (state.y - 0.5 - dy) * zoom + 0.5], -1)


def _surface(
    scene: Scene, x: np.ndarray, y: np.ndarray, times: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The nearest surface at screen points x, y (f x ..., px) and the points' world coordinates."""
    dx, dy, zoom = _lens(scene, times, x.ndim)
    x, y = (x / size - 0.5) / zoom + 0.5 + dx, (y / size - 0.5) / zoom + 0.5 + dy
    order = np.full(x.shape, -1)
    for number, body in enumerate(scene.bodies):
        state = [np.asarray(p[0]).reshape(len(times), *[1] * (x.ndim - 1)) for p in _plain(body, times)]
        cx, cy, radius, angle, shown = state
        c, s = np.cos(angle), np.sin(angle)
        local = ((x - cx) * c + (y - cy) * s, (y - cy) * c - (x - cx) * s, radius)
        inside = distance(body.shape, *(torch.from_numpy(np.ascontiguousarray(p)) for p in local)).numpy() < 0
        order[inside & (shown >= 0.5)] = number
    if scene.occluder is not None:
        block = scene.occluder
        order[(abs(x - block.x) < block.half_width) & (abs(y - block.y) < block.half_height)] = len(scene.bodies)
    return order, x, y


def _plain(body: Body, times: np.ndarray) -> Sequence[np.ndarray]:
    state = states([body], times[None])
    return state.x, state.y, state.radius, state.angle, state.shown


def _carry(
    scene: Scene, order: np.ndarray, x: np.ndarray, y: np.ndarray, times: np.ndarray, to: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Screen places (px) at the times `to` of the surface points that are at world places x, y at `times`."""
    x, y = x.copy(), y.copy()
    for number, body in enumerate(scene.bodies):
        cx, cy, r, a, _ = (np.broadcast_to(p[0].reshape(-1, *[1] * (x.ndim - 1)), x.shape) for p in _plain(body, times))
        dx, dy, q, b, _ = (np.broadcast_to(p[0].reshape(-1, *[1] * (x.ndim - 1)), x.shape) for p in _plain(body, to))
        u, v, c, s = (x - cx) * q / r, (y - cy) * q / r, np.cos(b - a), np.sin(b - a)
        mine = order == number
        x, y = np.where(mine, dx + u * c - v * s, x), np.where(mine, dy + u * s + v * c, y)
    dx, dy, zoom = _lens(scene, to, x.ndim)
    return size * ((x - 0.5 - dx) * zoom + 0.5), size * ((y - 0.5 - dy) * zoom + 0.5)


def _masks(scene: Scene, size: int, times: np.ndarray) -> dict[str, Tensor]:
    """Coverage of every body alone (full) and behind what is nearer (visible)."""
    view = camera([scene], times[None])
    x, y = (p[0].double() for p in screen_grid(size, view))
    sharp = torch.from_numpy(size * view[2, 0])
    full = []
    for body in scene.bodies:
        cx, cy, radius, angle, shown = (torch.from_numpy(np.array(p[0])) for p in _plain(body, times))
        grey = torch.zeros(len(times), 3, dtype=torch.float64)
        rel = x - cx[:, None, None], y - cy[:, None, None]
        plain = replace(body, texture=Texture())
        cover = look([plain] * len(times), *rel, radius, angle, grey, sharp)[0]
        full.append((cover * shown[:, None, None]).float())
    left = torch.ones(len(times), size, size)
    if scene.occluder is not None:
        left = 1 - bar(scene, x.float()[None], y.float()[None], view[2, 0] * size)[0]
    visible = []
    for cover in reversed(full):
        visible.append(cover * left)
        left = left * (1 - cover)
    return {"full": torch.stack(full), "visible": torch.stack(visible[::-1])}


def _tracks(scene: Scene, size: int, times: np.ndarray, grid: int) -> dict[str, Tensor]:
    """grid x grid points of the first frame, followed on their surfaces."""
    step = (np.arange(grid) + 0.5) * size / grid
    y, x = (p.reshape(1, -1) for p in np.meshgrid(step, step, indexing="ij"))
    own, x_world, y_world = _surface(scene, x, y, times[:1], size)
    many = len(times)
    own, x_world, y_world = (np.repeat(p, many, 0) for p in (own, x_world, y_world))
    x, y = _carry(scene, own, x_world, y_world, np.full(many, times[0]), times, size)
    seen = (_surface(scene, x, y, times, size)[0] == own) & _inside(x, y, size)
    return {"tracks": torch.from_numpy(np.stack([x, y], -1)).movedim(0, 1).float(), "tracks_seen": torch.from_numpy(seen.T)}
