"""Marks on frames: walls of clips, exact truth, flow, tracks, what the judge reads, and the times of events.

Positions are in pixels of the clip as in `minivid.world.Truth`: x right, y down, the centre of pixel i is i + .5. Every mark
is black with a white rim, so that no colour of a clip can hide it, and kinds of marks differ in form, not in colour.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from minivid.lab.canvas import (
    DENSITY,
    INK,
    TEXT,
    WIDTH,
    Picture,
    Sheet,
    checked,
    clip_bytes,
    enlarge,
    font,
    pick,
    scale_for,
)
from minivid.world import recipes
from minivid.world.judge import Reading
from minivid.world.parts import COLOURS, MOTIONS, SHAPES, TONES, Background, Scene, Texture, held_out
from minivid.world.render import batch
from minivid.world.truth import Truth

Array = Tensor | np.ndarray
Point = Array | Sequence[float]
Number = float | int


class Pen:
    """Draws on one enlarged frame, in pixels of the clip."""

    def __init__(self, pixels: np.ndarray, factor: int):
        self.page, self.factor = Image.fromarray(enlarge(pixels, factor)), factor
        self.draw = ImageDraw.Draw(self.page)

    def _at(self, point: Point) -> tuple[float, float]:
        return float(point[0]) * self.factor, float(point[1]) * self.factor

    def path(self, points: Array | Sequence[Point], width: Number = 1.5) -> None:
        """A line through the points."""
        if len(points) > 1:
            for colour, extra in (("white", 2), (INK, 0)):
                self.draw.line([self._at(p) for p in points], colour, round((width + extra) * DENSITY), joint="curve")

    def arrow(self, start: Point, by: Point, width: Number = 1.5) -> None:
        """An arrow; below a third of a pixel it is a dot."""
        (x, y), (dx, dy) = self._at(start), self._at(by)
        if math.hypot(dx, dy) < self.factor / 3:
            return self.dot(start, 1.5)
        turn = math.atan2(dy, dx)
        head = min((2.5 + 1.5 * width) * DENSITY, 0.6 * math.hypot(dx, dy))
        wings = [(x + dx - head * math.cos(turn + s), y + dy - head * math.sin(turn + s)) for s in (-0.5, 0.5)]
        for colour, extra in (("white", 2), (INK, 0)):
            self.draw.line([(x, y), (x + dx, y + dy)], colour, round((width + extra) * DENSITY))
            self.draw.line([wings[0], (x + dx, y + dy), wings[1]], colour, round((width + extra) * DENSITY), joint="curve")

    def dot(self, point: Point, radius: Number = 3, hollow: bool = False) -> None:
        """A black disc of `radius` shown pixels, or a white one with a black rim."""
        (x, y), r = self._at(point), radius * DENSITY
        rim = DENSITY
        self.draw.ellipse([x - r - rim, y - r - rim, x + r + rim, y + r + rim], "white")
        self.draw.ellipse([x - r, y - r, x + r, y + r], "white" if hollow else INK, INK, rim)

    def cross(self, point: Point, arm: Number = 5) -> None:
        """An upright cross with arms of `arm` shown pixels."""
        (x, y), a = self._at(point), arm * DENSITY
        for colour, width in (("white", 4 * DENSITY), (INK, round(1.5 * DENSITY))):
            self.draw.line([(x - a, y), (x + a, y)], colour, width)
            self.draw.line([(x, y - a), (x, y + a)], colour, width)

    def outline(self, inside: np.ndarray) -> None:
        """A line round the True pixels of a mask `h w`."""
        big = np.pad(enlarge(inside, self.factor), 2 * DENSITY)
        rim = np.zeros_like(big)
        for step in (-DENSITY, DENSITY):
            for axis in (0, 1):
                rim |= big & ~np.roll(big, step, axis)
        wide = rim.copy()
        for axis in (0, 1):
            wide |= np.roll(wide, DENSITY, axis) | np.roll(wide, -DENSITY, axis)
        keep = slice(2 * DENSITY, -2 * DENSITY)
        pixels = np.asarray(self.page).copy()
        pixels[wide[keep, keep]], pixels[rim[keep, keep]] = 255, 34
        self.page = Image.fromarray(pixels)
        self.draw = ImageDraw.Draw(self.page)

    def label(self, point: Point, text: str) -> None:
        """A line of writing on white, centred below `point` and moved into the frame."""
        (x, y), face = self._at(point), font()
        wide, high, (full, tall) = face.getlength(text), (TEXT + 2) * DENSITY, self.page.size
        x, y = min(max(x - wide / 2, 3), full - wide - 3), min(max(y, 2), tall - high - 2)
        self.draw.rectangle([x - 3, y, x + wide + 3, y + high], "white", INK)
        self.draw.text((x, y - 1), text, INK, face)


def marked(
    x: Array, mark: Callable[[Pen, int], None], caption: str = "", key: str = "", *, frames: int = 6, shown: int = 128,
    names: Sequence[str] = (), text: str = "",
) -> Picture:  # fmt: skip
    """`frames` evenly spread frames of a clip `c f h w`, each passed with its number to `mark`, which draws on it.

    key  the legend: what the marks mean, in words      shown  least width of a frame in shown pixels
    names  what is written under the frames, by default "frame 0" and so on
    """
    pixels, sheet = clip_bytes(x), Sheet()
    factor, chosen, tiles = scale_for(pixels.shape[2], shown) * DENSITY, pick(len(pixels), frames), []
    for k in chosen:
        pen = Pen(pixels[k], factor)
        mark(pen, k)
        tiles.append(np.asarray(pen.page))
    if caption:
        sheet.text(caption, bold=True)
    if key:
        sheet.text(key)
    sheet.tiles(tiles, names or [f"frame {k}" for k in chosen])
    size = "x".join(map(str, x.shape))
    return Picture(sheet.image(), text or f"marked clip {size}", f"{caption}: frames of a clip. {key}.")


def truth(x: Array, known: Truth, caption: str = "Truth", *, frames: int = 4, shown: int = 192) -> Picture:
    """The bodies of a clip: outline of what is visible, centre, and where the centre will be four frames later."""

    def mark(pen: Pen, k: int) -> None:
        for body in range(len(known.bodies)):
            if known.visible[body, k].max() > 0.5:
                pen.outline(known.visible[body, k].numpy() > 0.5)
        for centre, velocity in zip(known.centres[:, k].tolist(), known.velocity[:, k].tolist(), strict=True):
            pen.arrow(centre, [4 * v for v in velocity], 2)
            pen.cross(centre)

    key = "outline: visible part, cross: centre, arrow: velocity x 4 (where the centre is four frames on)"
    return marked(x, mark, caption, key, frames=frames, shown=shown, text=f"truth of {len(known.bodies)} bodies")


def flow(
    x: Array, field: Array, seen: Array | None = None, caption: str = "Flow", *, every: int = 6, gain: Number = 1,
    frames: int = 4, shown: int = 192,
) -> Picture:  # fmt: skip
    """Flow `2 f h w` in px as arrows from every `every`-th pixel, `gain` times as long; black where `seen` (f h w) is False."""
    vectors = checked(field, "2 f h w", "a flow")
    there = np.ones(vectors.shape[1:], bool) if seen is None else checked(seen, "f h w", "seen", 0.0, 1.0) > 0.5
    if vectors.shape[1:] != tuple(x.shape[1:]) or there.shape != vectors.shape[1:]:
        raise ValueError(f"flow '2 f h w' must fit the clip 'c f h w', got {vectors.shape} and {tuple(x.shape)}.")

    def mark(pen: Pen, k: int) -> None:
        for row in range(every // 2, vectors.shape[2], every):
            for column in range(every // 2, vectors.shape[3], every):
                place = column + 0.5, row + 0.5
                if not there[k, row, column]:
                    continue
                if math.hypot(*vectors[:, k, row, column]) < 0.05:
                    pen.dot(place, 0.5)
                else:
                    pen.arrow(place, gain * vectors[:, k, row, column], 1)

    pale = np.where(there, checked(x, "c f h w", "a clip", -1.0, 1.0) * 0.6 + 0.4, -1).astype(np.float32)
    key = f"arrow: where that point goes{f' (drawn {gain:g} times as long)' if gain != 1 else ''}, dot: it stays"
    key += ", black: it will be out of sight" if not there.all() else ""
    return marked(pale, mark, caption, key, frames=frames, shown=shown, text=f"flow {'x'.join(map(str, vectors.shape))}")


def tracks(
    x: Array, known: Truth, caption: str = "Points of the first frame, followed", *, frames: int = 4, shown: int = 192
) -> Picture:
    """Tracked points with the way they have come: black where the point is visible, white where it is covered."""
    points, seen = known.tracks.numpy(), known.tracks_seen.numpy()
    side = x.shape[-1]

    def mark(pen: Pen, k: int) -> None:
        for path, on in zip(points, seen, strict=True):
            if (0 <= path[k]).all() and (path[k] <= side).all():
                pen.path(path[: k + 1], 0.75)
                pen.dot(path[k], 2 if on[k] else 2.5, hollow=not on[k])

    key = "black: a visible point, white: it is covered, line: the way it has come"
    return marked(x, mark, caption, key, frames=frames, shown=shown, text=f"tracks of {len(points)} points")


def reading(x: Array, found: Reading, caption: str = "What the judge reads", *, frames: int = 4, shown: int = 190) -> Picture:
    """The judge's reading of a clip: each body's number, centre and way so far, and the words, "?" where it is unsure."""
    words = [" ".join(word or "?" for word in (body.colour, body.shape, body.motion)) for body in found.bodies]
    listed = "; ".join(f"({i}) {word}" for i, word in enumerate(words, 1))
    says = listed or ("nothing is there" if found.sure else "unsure of everything")
    away = 14 / scale_for(x.shape[-1], shown)

    def mark(pen: Pen, k: int) -> None:
        for number, seen in enumerate(found.bodies, 1):
            path = seen.path.numpy()
            if np.isfinite(path[k]).all():
                pen.path(path[: k + 1][np.isfinite(path[: k + 1, 0])], 1)
                pen.cross(path[k])
                pen.label(path[k] + np.array([away, -1.6 * away]), f"({number})")

    key = f"The judge says: {says}"
    return marked(x, mark, caption, key, frames=frames, shown=shown, text=f"reading: {says}")


def wall(
    xs: Sequence[Array], titles: Sequence[str] = (), caption: str = "", *, columns: int = 8, shown: int = 96, fps: int = 8,
    alt: str = "",
) -> Picture:  # fmt: skip
    """Many clips of one shape, `columns` a row: one frame of each as a still (the middle one), all frames as a film."""
    if not len(xs) or (titles and len(titles) != len(xs)):
        raise ValueError(f"wall needs at least one clip and as many titles as clips, got {len(xs)} and {len(titles)}.")
    pixels = [clip_bytes(x) for x in xs]
    if len({p.shape for p in pixels}) > 1:
        raise ValueError(f"wall needs clips of one shape, got {', '.join(sorted({str(tuple(x.shape)) for x in xs}))}.")
    length, _, side, _ = pixels[0].shape
    factor = max(1, min(scale_for(side, shown), (WIDTH // columns - 4) // side)) * DENSITY

    def page(k: int) -> Image.Image:
        sheet = Sheet()
        if caption:
            sheet.text(caption, bold=True)
        for row in range(0, len(pixels), columns):
            tiles = [enlarge(p[k], factor) for p in pixels[row : row + columns]]
            sheet.tiles(tiles, titles[row : row + columns], gap=4)
        return sheet.image()

    def film() -> list[Image.Image]:
        pages = [page(k) for k in range(length)]
        return [p.resize((p.width // DENSITY, p.height // DENSITY), Image.Resampling.BOX) for p in pages]

    named = f" ({', '.join(titles)})" if titles else ""
    alt = alt or f"{caption or 'A wall of clips'}: the middle frame of each of {len(xs)} clips{named}."
    return Picture(page(length // 2), f"wall of {len(xs)} clips", alt, film if length > 1 else None, fps)


def timeline(x: Array, events: Sequence[tuple[Number, Number, str]], caption: str = "", *, frames: int = 8) -> Picture:
    """Frames of a clip above a time axis (in frames), and under it a bar for each event (start, stop, what happens)."""
    pixels = clip_bytes(x)
    side = pixels.shape[2]
    factor = max(1, (WIDTH // frames - 4) // side)
    chosen = pick(len(pixels), min(frames, (WIDTH - 4) // (side * factor + 4)))  # one row, or the axis would not fit
    sheet = Sheet()
    if caption:
        sheet.text(caption, bold=True)
    sheet.tiles([enlarge(pixels[k], factor * DENSITY) for k in chosen], [f"frame {k}" for k in chosen])
    step, row = side * factor + 4, TEXT + 6
    scale = step * (len(chosen) - 1) / max(len(pixels) - 1, 1)  # shown pixels a frame: bars stand under their frames
    bars = Image.new("RGB", ((sheet.right + 4) * DENSITY, (row * len(events) + 6) * DENSITY), "white")
    draw, middle = ImageDraw.Draw(bars), 4 + side * factor / 2
    for k in range(len(chosen)):
        draw.line([((middle + k * step) * DENSITY, 0), ((middle + k * step) * DENSITY, bars.height)], "#DDDDDD", DENSITY)
    for i, (start, stop, what) in enumerate(events):
        x0, x1 = (middle + scale * start) * DENSITY, (middle + scale * max(stop, start + 0.7)) * DENSITY
        y, length = (i * row + 4) * DENSITY, font().getlength(what)
        draw.rectangle([x0, y + 4, x1, y + (TEXT - 1) * DENSITY], "#0072B2")
        side = x1 + 8 if x1 + 8 + length < bars.width else x0 - 8 - length
        draw.rectangle([side - 2, y, side + length + 2, y + (TEXT + 3) * DENSITY], "white")
        draw.text((side, y - 2), what, INK, font())
    top = sheet.image()
    out = Image.new("RGB", (max(top.width, bars.width), top.height + bars.height), "white")
    out.paste(top, (0, 0)), out.paste(bars, (0, top.height))
    says = "; ".join(f"frames {start:g} to {stop:g} {what}" for start, stop, what in events)
    return Picture(out, f"timeline of {len(events)} events", f"{caption}: {says}.")


def combinations() -> Picture:
    """All colours x shapes x directions, one block of pictures a direction; the held-out combinations are framed."""
    ground = Background("light", Texture(), *TONES["light"])
    sheet = Sheet()
    looks = [recipes.body(colour, shape, "large", "still") for shape in SHAPES for colour in COLOURS]
    pictures = batch([Scene((0, 0), "combinations", (one,), ground) for one in looks], 32, 1)
    blocks, held = [], []
    for motion in MOTIONS[:4]:
        rows = []
        for one, x in zip(looks, pictures, strict=True):
            pen = Pen(clip_bytes(x)[0], DENSITY)
            if held_out(one.colour, one.shape, motion):
                held.append(f"{one.colour} {one.shape} {motion}")
                for edge, ink in ((0, "white"), (2, INK), (6, "white")):
                    pen.draw.rectangle([edge, edge, 63 - edge, 63 - edge], None, ink, 4)
            rows.append(np.asarray(pen.page))
        lines = [np.concatenate(rows[n : n + len(COLOURS)], 1) for n in range(0, len(rows), len(COLOURS))]
        blocks.append(np.concatenate(lines, 0))
    sheet.text("framed: held out, never in a training scene", bold=True)
    sheet.tiles(blocks, [f"moves {motion}" for motion in MOTIONS[:4]], gap=10)
    alt = f"Four grids, one for each direction, of {len(SHAPES)} shapes by {len(COLOURS)} colours. Framed, held out: "
    return Picture(sheet.image(), f"{len(held)} held-out combinations", alt + ", ".join(held) + ".")
