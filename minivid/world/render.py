"""Scenes to pixels: sub-pixel, anti-aliased, vectorised over clips x frames, any size and any stretch of time.

Coverage comes from signed distance: a pixel is `clamp(.5 - distance in pixels, 0, 1)` inside. Only a small window round each
object is touched, so a clip of 16x32x32 costs less than a millisecond. Pixel i spans [i, i + 1]; its centre is i + .5.
Every frame is computed from its own time alone, so a chunk equals the slice of the long film.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from .parts import REACH, SHAPES, TEXTURES, Body, Scene, Texture, source, states

_FONT = (  # 5 x 7 digits, one string of rows each
    "01110 10001 10011 10101 11001 10001 01110", "00100 01100 00100 00100 00100 00100 01110",
    "01110 10001 00001 00110 01000 10000 11111", "11110 00001 00001 01110 00001 00001 11110",
    "00010 00110 01010 10010 11111 00010 00010", "11111 10000 11110 00001 00001 10001 01110",
    "01110 10000 10000 11110 10001 10001 01110", "11111 00001 00010 00100 01000 01000 01000",
    "01110 10001 10001 01110 10001 10001 01110", "01110 10001 10001 01111 00001 00001 01110",
)  # fmt: skip
FONT = torch.tensor([[[float(bit) for bit in row] for row in digit.split()] for digit in _FONT])
_PEN = 1 / 64  # thickness of a line and of a digit's dot: one pixel at 64


def render(scene: Scene, size: int = 32, frames: int = 16, start: int = 0) -> Float[Tensor, "c f h w"]:
    """One clip in [-1, 1]: `frames` frames of `size` x `size` pixels from frame `start` on."""
    return batch([scene], size, frames, start)[0]


def batch(
    scenes: Sequence[Scene], size: int = 32, frames: int = 16, start: int | Sequence[int] = 0
) -> Float[Tensor, "b c f h w"]:
    """Clips in [-1, 1] of many scenes at once; `start` may differ per scene."""
    times = clock(len(scenes), size, frames, start)
    jobs, weights, owner = [], [], []
    for i, scene in enumerate(scenes):
        for shot, weight in shots(scene, times[i]):
            jobs.append(shot), weights.append(weight), owner.append(i)
    canvas = paint(jobs, size, times[owner])
    if len(jobs) > len(scenes) or any(scene.cuts for scene in scenes):
        weight = torch.from_numpy(np.stack(weights)).float()[:, :, None, None, None]
        canvas = torch.zeros(len(scenes), *canvas.shape[1:]).index_add_(0, torch.tensor(owner), canvas * weight)
    return canvas.permute(0, 4, 1, 2, 3).mul(2).sub_(1).contiguous()


def clock(count: int, size: int, frames: int, start: int | Sequence[int] = 0) -> np.ndarray:
    """Frame times, count x frames; checks the request."""
    if size < 8:
        raise ValueError(f"Expected size >= 8 pixels, got {size}. Shapes cannot be told apart below that; render larger.")
    if frames < 1:
        raise ValueError(f"Expected frames >= 1, got {frames}. Ask for at least one frame.")
    if count < 1:
        raise ValueError("Expected at least one scene, got none. Draw some first, e.g. draw(seed=0, index=0).")
    first = np.broadcast_to(np.asarray(start, dtype=np.float64), (count,))
    if (first < 0).any():
        raise ValueError(f"Expected start >= 0, got {start}. A film begins at frame 0.")
    return first[:, None] + np.arange(frames)


def shots(scene: Scene, times: np.ndarray) -> list[tuple[Scene, np.ndarray]]:
    """The shots on screen at `times` and the weight of each at each time; the weights sum to 1."""
    if not scene.cuts:
        return [(scene, np.ones(len(times)))]
    weights = np.zeros((len(scene.cuts), len(times)))
    when = times % scene.period if scene.period else times
    for k, cut in enumerate(scene.cuts):
        if k == 0:
            rise = np.ones(len(times))
        elif cut.fade:
            rise = ((when - cut.start + cut.fade + 1) / (cut.fade + 1)).clip(0, 1)
        else:
            rise = (when >= cut.start).astype(float)
        weights *= 1 - rise
        weights[k] = rise
    total: dict[str, np.ndarray] = {}
    for cut, weight in zip(scene.cuts, weights, strict=True):
        total[cut.name] = total.get(cut.name, 0) + weight
    named = {cut.name: cut.shot for cut in scene.cuts}
    return [(named[name], weight) for name, weight in total.items() if weight.any()]


def paint(scenes: Sequence[Scene], size: int, times: np.ndarray) -> Float[Tensor, "s f h w c"]:
    """Frames of single-shot scenes in [0, 1], colour last: ground, bodies back to front, occluder, light."""
    view = camera(scenes, times)
    canvas = ground(scenes, size, view)
    flat = canvas.view(-1, 3)
    for depth in range(max(len(scene.bodies) for scene in scenes)):
        rows = [i for i, scene in enumerate(scenes) if len(scene.bodies) > depth]
        _stamp(flat, [scenes[i].bodies[depth] for i in rows], np.array(rows), size, times[rows], view[:, rows])
    for i, scene in enumerate(scenes):
        if scene.occluder is not None:
            cover = bar(scene, *screen_grid(size, view[:, i : i + 1]), size * view[2, i])[0, ..., None]
            canvas[i] += cover * (scene.occluder.level - canvas[i])
        if scene.light.gain != 1 or scene.light.vignette:
            canvas[i] *= lighting(scene, size)[:, :, None]
    return canvas.clamp_(0, 1)


def lighting(scene: Scene, size: int) -> Float[Tensor, "h w"]:
    """The factor of gain and vignette at each pixel."""
    ray = (torch.arange(size) + 0.5) / size - 0.5
    return scene.light.gain * (1 - 2 * scene.light.vignette * (ray[:, None] ** 2 + ray**2))


def camera(scenes: Sequence[Scene], times: np.ndarray) -> np.ndarray:
    """Camera offsets x, y and magnification: 3 x scenes x frames."""
    return np.stack([scene.camera.at(t) for scene, t in zip(scenes, times, strict=True)], axis=1)


def screen_grid(size: int, view: np.ndarray) -> tuple[Tensor, Tensor]:
    """World coordinates of the pixel centres, each s f h w (with h or w of 1), for the camera `view` (3 x s x f)."""
    dx, dy, zoom = (torch.from_numpy(v)[:, :, None, None] for v in view)
    ray = (torch.arange(size, dtype=torch.float64) + 0.5) / size - 0.5
    return (ray / zoom + 0.5 + dx).float(), (ray[:, None] / zoom + 0.5 + dy).float()


def bar(scene: Scene, x: Tensor, y: Tensor, sharp: np.ndarray) -> Float[Tensor, "s f h w"]:
    """Coverage of the scene's occluder; `sharp` (per frame) is pixels per side times zoom."""
    block = scene.occluder
    sharp = torch.as_tensor(sharp, dtype=torch.float32)[:, None, None]
    return edge((x - block.x).abs() - block.half_width, sharp) * edge((y - block.y).abs() - block.half_height, sharp)


def edge(distance: Tensor, sharp: Tensor | float) -> Tensor:
    """Coverage of a pixel at a signed distance (sides, negative inside) from an edge, `sharp` pixels a side."""
    return (0.5 - distance * sharp).clamp_(0, 1)


def ground(scenes: Sequence[Scene], size: int, view: np.ndarray) -> Float[Tensor, "s f h w c"]:
    """The background plates in [0, 1], colour last, without objects and light."""
    still = (view == view[:, :, :1]).all()
    seen = view[:, :, :1] if still else view
    first = torch.tensor([scene.background.first for scene in scenes])[:, None, None, None]
    second = torch.tensor([scene.background.second for scene in scenes])[:, None, None, None]
    mix = torch.zeros(len(scenes), seen.shape[2], size, size)
    kinds = [scene.background.texture.kind for scene in scenes]
    for kind in set(kinds) - {"plain"}:
        rows = [i for i, k in enumerate(kinds) if k == kind]
        x, y = screen_grid(size, seen[:, rows])
        sharp = torch.from_numpy(size * seen[2, rows]).float()[:, :, None, None]
        mix[rows] = pattern(kind, x - 0.5, y - 0.5, [scenes[i].background.texture for i in rows], sharp)
    plate = first + mix[..., None] * (second - first)
    return plate.expand(-1, view.shape[2], -1, -1, -1).contiguous() if still else plate


def pattern(kind: str, x: Tensor, y: Tensor, textures: Sequence[Texture], sharp: Tensor) -> Tensor:
    """Share of the second colour in [0, 1] at the points x, y (s ... in sides), for textures of one kind."""
    if kind not in TEXTURES:
        raise ValueError(f"Unknown texture {kind!r}. Use one of: {', '.join(TEXTURES)}.")

    def field(name: str) -> Tensor:
        return torch.tensor([float(getattr(t, name)) for t in textures]).view(-1, *[1] * (x.dim() - 1))

    period, angle, phase = field("period"), field("angle"), field("phase")
    u, v = x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()
    if kind == "numbered":
        return _digit(u, v, torch.tensor([t.value for t in textures]))
    u = u / period + phase
    if kind == "gradient":  # a slow triangle wave: smooth however far the camera pans
        return 1 - 2 * ((u % 1) - 0.5).abs()
    v = v / period + phase * 1.618
    if kind == "noisy":
        return _noise(u, v, textures)
    sharp = sharp * period
    if kind == "lined":
        return edge(((u % 1) - 0.5).abs() - 0.5 * _PEN / period, sharp)
    if kind == "dotted":
        return edge(torch.hypot((u % 1) - 0.5, (v % 1) - 0.5) - 0.3, sharp)
    a = edge(((u % 1) - 0.5).abs() - 0.25, sharp)
    if kind == "striped":
        return a
    b = edge(((v % 1) - 0.5).abs() - 0.25, sharp)
    return a + b - 2 * a * b


def _noise(u: Tensor, v: Tensor, textures: Sequence[Texture]) -> Tensor:
    """Value noise: random levels on a 16 x 16 lattice that repeats, smoothly interpolated."""
    levels = torch.from_numpy(np.stack([source("noise", t.value).random((16, 16)) for t in textures])).float()
    u, v = torch.broadcast_tensors(u, v)
    row = torch.arange(len(textures)).view(-1, *[1] * (u.dim() - 1)) * 256
    column0, row0 = u.floor().long(), v.floor().long()
    a, b = u - column0, v - row0
    a, b = a * a * (3 - 2 * a), b * b * (3 - 2 * b)
    c0, c1, r0, r1 = column0 % 16, (column0 + 1) % 16, row0 % 16 * 16, (row0 + 1) % 16 * 16
    n00, n01, n10, n11 = (levels.view(-1)[row + r + c] for r in (r0, r1) for c in (c0, c1))
    return (n00 * (1 - a) + n01 * a) * (1 - b) + (n10 * (1 - a) + n11 * a) * b


def _digit(u: Tensor, v: Tensor, values: Tensor) -> Tensor:
    """A 5 x 7 digit round the origin, dots of one pixel at 64 px, bilinear between dots."""
    u, v = torch.broadcast_tensors(u / _PEN + 2.5, v / _PEN + 3.5)
    font = torch.nn.functional.pad(FONT, (2, 2, 2, 2))[values]
    grid = torch.stack(((u + 2) / 9 * 2 - 1, (v + 2) / 11 * 2 - 1), -1).reshape(len(values), 1, -1, 2)
    out = torch.nn.functional.grid_sample(font[:, None], grid, align_corners=False)
    return out.view(u.shape)


def distance(shape: str, x: Tensor, y: Tensor, radius: Tensor | float) -> Tensor:
    """Signed distance (sides; exact near straight edges) from the outline of a shape of nominal `radius` at the origin."""
    if shape == "circle":
        return torch.hypot(x, y) - 0.93 * radius
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.9 * radius
    if shape == "triangle":  # equilateral, tip up, centroid at the origin
        return torch.maximum(y, x.abs() * (math.sqrt(3) / 2) - y * 0.5) - 0.625 * radius
    if shape != "star":
        raise ValueError(f"Unknown shape {shape!r}. Use one of: {', '.join(SHAPES)}.")
    # Reflections fold the five-fold symmetry onto half a spike; its edge is then one straight line from tip to notch.
    c, s, tip, notch = math.cos(math.pi / 5), math.sin(math.pi / 5), 1.22, 0.56
    x, y = x.abs(), -y
    for side in (1, -1):
        over = (side * c * x - s * y).clamp(min=0)
        x, y = x - 2 * side * c * over, y + 2 * s * over
    nx, ny = tip - notch * c, notch * s
    return (x.abs() * nx + (y - tip * radius) * ny) / math.hypot(nx, ny)


def _stamp(flat: Tensor, bodies: Sequence[Body], rows: np.ndarray, size: int, times: np.ndarray, view: np.ndarray) -> None:
    """Draw one body into each of the scenes `rows` of the canvas `flat` (pixels x 3), in place."""
    state = states(bodies, times)
    on = state.shown > 0
    kinds = np.array([SHAPES.index(body.shape) for body in bodies])
    for kind in np.unique(kinds):
        item, frame = np.nonzero(on & (kinds == kind)[:, None])
        if not len(item):
            continue
        now = [torch.from_numpy(np.ascontiguousarray(part[item, frame])) for part in (*state, *view)]
        x, y, _, _, radius, angle, colour, shown, dx, dy, zoom = now
        wide = min(size, 2 * math.ceil(float((radius * zoom).max()) * REACH[SHAPES[kind]] * size) + 2)
        corner = [  # top left pixel of the window, kept inside the frame, so no pixel is written twice
            (((p - 0.5 - d) * zoom + 0.5) * size - wide / 2).round().long().clamp(0, size - wide) for p, d in ((x, dx), (y, dy))
        ]
        reach = torch.arange(wide)
        column, row = corner[0][:, None] + reach, corner[1][:, None] + reach
        px = (((column + 0.5) / size - 0.5) / zoom[:, None] + (0.5 + dx - x)[:, None]).float()[:, None, :]
        py = (((row + 0.5) / size - 0.5) / zoom[:, None] + (0.5 + dy - y)[:, None]).float()[:, :, None]
        cover, paint = look(
            [bodies[i] for i in item.tolist()], px, py, radius.float(), angle.float(), colour.float(), (zoom * size).float()
        )
        frame_row = torch.from_numpy(rows[item] * times.shape[1] + frame)[:, None] * size + row
        where = (frame_row[:, :, None] * size + column[:, None, :]).view(-1)
        cover = (cover * shown.float()[:, None, None]).view(-1, 1)
        flat.index_add_(0, where, cover * (paint.expand(-1, wide, wide, 3).reshape(-1, 3) - flat[where]))


def look(
    bodies: Sequence[Body], x: Tensor, y: Tensor, radius: Tensor, angle: Tensor, colour: Tensor, sharp: Tensor
) -> tuple[Float[Tensor, "n h w"], Float[Tensor, "n #h #w c"]]:
    """Coverage and colour of n bodies of one shape at offsets x, y (sides) from their centres; `sharp` is pixels per side."""
    if angle.any():
        c, s = angle.cos()[:, None, None], angle.sin()[:, None, None]
        x, y = x * c + y * s, y * c - x * s
    cover = edge(distance(bodies[0].shape, x, y, radius[:, None, None]), sharp[:, None, None])
    paint = colour[:, None, None]
    kinds = [body.texture.kind for body in bodies]
    if any(kind != "plain" for kind in kinds):
        paint = paint.repeat(1, *cover.shape[1:], 1)
        scale = torch.tensor([body.radius for body in bodies]) / radius  # the pattern grows with its body
        for kind in set(kinds) - {"plain"}:
            at = [i for i, k in enumerate(kinds) if k == kind]
            k = scale[at][:, None, None]
            mix = pattern(
                kind,
                x.expand_as(cover)[at] * k,
                y.expand_as(cover)[at] * k,
                [bodies[i].texture for i in at],
                sharp[at][:, None, None] / k,
            )
            paint[at] *= 1 - 0.5 * mix[..., None]
    return cover, paint
