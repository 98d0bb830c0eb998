"""Attention as pixels: where a head looks, what a pattern keeps of it, what each head of a model does.

Boxes, tiles and text only, no plotting library: these are redrawn at every turn of a knob, and a plot alone takes longer than
a reader waits. Weights are shown by their square root, so that faint ones stay visible; what a pattern doesn't compute is
washed out.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from minivid.lab.canvas import (
    DENSITY,
    INK,
    PALETTE,
    TEXT,
    WIDTH,
    Picture,
    Sheet,
    checked,
    clip_bytes,
    enlarge,
    font,
    magnitude,
    pick,
    rgb,
    scale_for,
)

Array = Tensor | np.ndarray
Number = float | int
FRAME = 4  # shown pixels of a coloured frame


def _shaded(weights: np.ndarray, kept: np.ndarray | None = None, top: float = 1.0) -> np.ndarray:
    """Weights as bytes `... 3`, brightest from the quantile `top` on; where `kept` is False they are washed out."""
    levels = np.sqrt(weights / (np.quantile(weights, top) or 1.0)).clip(0, 1)
    pixels = magnitude((levels * 16).round() / 16, 1.0)  # few colours: a page of maps is then a sixth of the bytes
    return pixels if kept is None else np.where(kept[..., None], pixels, 255 - (255 - pixels) // 5).astype(np.uint8)


def square(weights: Array, kept: Array | None = None, side: int = 256) -> np.ndarray:
    """A map `n n` (rows are queries) as about `side` shown pixels; of a larger one the largest weight of each place is shown."""
    x, mask = checked(weights, "n n", "attention weights"), None if kept is None else checked(kept, "n n", "kept", 0.0, 1.0) > 0.5
    step = -(-len(x) // side)
    if step > 1:
        pad = ((0, -len(x) % step),) * 2
        fold = lambda y: np.pad(y, pad).reshape(-(-len(x) // step), step, -1, step).max((1, 3))
        x, mask = fold(x), None if mask is None else fold(mask)
    return enlarge(_shaded(x, mask, 0.99), max(1, side // len(x)) * DENSITY)


def volume(weights: Array, grid: tuple[int, int, int], query: int, kept: Array | None = None, side: int = 44) -> list[np.ndarray]:
    """What one query takes from each key, `n` weights, as a tile of rows x columns a frame; the query's own place is boxed."""
    f, h, w = grid
    x = checked(weights, "n", "attention weights")
    if len(x) != f * h * w:
        raise ValueError(f"volume takes a weight for each of {f} x {h} x {w} tokens, got {len(x)}.")
    mask = None if kept is None else checked(kept, "n", "kept", 0.0, 1.0) > 0.5
    pixels, factor = _shaded(x, mask).reshape(f, h, w, 3), max(1, side // w) * DENSITY
    tiles = [enlarge(frame, factor).copy() for frame in pixels]
    row, column = query // w % h, query % w
    box = tiles[query // (h * w)][row * factor : (row + 1) * factor, column * factor : (column + 1) * factor]
    for depth, ink in ((0, 0), (DENSITY, 255)):
        inner = box[depth : len(box) - depth, depth : len(box) - depth]
        inner[:DENSITY], inner[-DENSITY:], inner[:, :DENSITY], inner[:, -DENSITY:] = ink, ink, ink, ink
    return tiles


def head(
    caption: str, squares: Mapping[str, np.ndarray], volumes: Mapping[str, list[np.ndarray]], clips: Mapping[str, Array],
    facts: Sequence[str] = (), *, frames: int = 8, alt: str = "",
) -> Picture:  # fmt: skip
    """One head on one page: maps side by side, what one query takes from each frame, clips under one another, facts in words."""
    sheet = Sheet()
    sheet.text(caption, bold=True)
    for fact in facts:
        sheet.text(fact)
    if squares:
        sheet.tiles(list(squares.values()), list(squares), gap=12)
    for name, tiles in volumes.items():
        sheet.text(name)
        sheet.tiles(tiles, [str(i) for i in range(len(tiles))] if name == list(volumes)[-1] else ())
    for name, clip in clips.items():
        sheet.text(name)
        pixels = clip_bytes(clip)
        chosen = pick(len(pixels), frames)
        sheet.tiles([enlarge(pixels[k], scale_for(pixels.shape[2], 64) * DENSITY) for k in chosen])
    return Picture(sheet.image(), f"head: {caption}", alt or f"{caption}. {' '.join(facts)}")


def board(
    maps: Array, kinds: Sequence[Sequence[str]], colours: Mapping[str, str], caption: str = "", *,
    chosen: tuple[int, int] | None = None, sides: Sequence[Image.Image] = (), alt: str = "",
) -> Picture:  # fmt: skip
    """All heads of a model: thumbnails `l k n n` of their maps, each framed in the colour of its kind, which is written under it.

    colours  kind -> colour of the palette      chosen  (layer, head) with a double frame; as a live picture of knobs called
    layer and head, a click on another chooses that
    sides    what stands under one another on the right, as `bars` and `curve` draw it
    """
    values = checked(maps, "l k n m", "attention maps")
    if [len(row) for row in kinds] != [values.shape[1]] * values.shape[0]:
        raise ValueError(f"board needs a kind for each of {values.shape[:2]} heads, got {[len(row) for row in kinds]}.")
    sheet = Sheet(WIDTH)
    if caption:
        sheet.text(caption, bold=True)
    places = {}
    for layer, row in enumerate(kinds):
        tiles = [_framed(square(x, side=64), colours[kind], (layer, i) == chosen)
                 for i, (x, kind) in enumerate(zip(values[layer], row, strict=True))]  # fmt: skip
        for i, box in enumerate(sheet.tiles(tiles, list(row), left=f"layer {layer}", gap=40)):
            places[box] = {"layer": layer, "head": i}
    page = sheet.image()
    high, wide = max(page.height, sum(x.height for x in sides)), page.width + max((x.width for x in sides), default=0)
    both = Image.new("RGB", (wide, high), "white")
    both.paste(page, (0, 0))
    for i, side in enumerate(sides):
        both.paste(side, (page.width, sum(x.height for x in sides[:i])))
    said = "; ".join(f"layer {i}: {', '.join(row)}" for i, row in enumerate(kinds))
    return Picture(both, f"board of {values.shape[0]} x {values.shape[1]} heads", alt or f"{caption}: {said}.", places=places)


def _framed(tile: np.ndarray, colour: str, double: bool) -> np.ndarray:
    """A tile in a frame; the chosen one has a black line round it."""
    edge, rim = FRAME * DENSITY, 2 * DENSITY
    high, wide = tile.shape[:2]
    out = np.full((high + 2 * (edge + rim), wide + 2 * (edge + rim), 3), 255, np.uint8)
    if double:
        out[:] = rgb(INK)
    out[rim : rim + high + 2 * edge, rim : rim + wide + 2 * edge] = rgb(colour)
    out[rim + edge : rim + edge + high, rim + edge : rim + edge + wide] = tile
    return out


def bars(values: Mapping[str, Sequence[Number]], parts: Sequence[str] = (), limit: Number | None = None) -> Image.Image:
    """Upright bars, each stacked of up to two `parts`, names under them and sums on top; the limit is a dashed line."""
    wide, high, foot = 66 * len(values) + 60, 300, 40
    page = Image.new("RGB", (wide * DENSITY, high * DENSITY), "white")
    draw = ImageDraw.Draw(page)
    top = max([sum(v) for v in values.values()] + [limit or 0]) * 1.05 or 1.0
    level = lambda v: (high - foot - v / top * (high - foot - 62)) * DENSITY
    for i, (name, v) in enumerate(values.items()):
        left, low = 20 + 66 * i, 0.0
        for part, ink in zip(v, ("blue", "orange"), strict=False):
            draw.rectangle([left * DENSITY, level(low + part), (left + 40) * DENSITY, level(low)], PALETTE[ink], INK)
            low += part
        draw.text((left * DENSITY, level(low) - (TEXT + 5) * DENSITY), f"{low:.2f}", fill=INK, font=font())
        for j, word in enumerate(name.split("-")):
            draw.text(((left - 4) * DENSITY, level(0) + (3 + j * (TEXT + 3)) * DENSITY), word, INK, font())
    if limit is not None:
        for x in range(10, wide - 10, 12):
            draw.line([x * DENSITY, level(limit), (x + 7) * DENSITY, level(limit)], INK, DENSITY)
        draw.text(((wide - 40) * DENSITY, level(limit) - (TEXT + 4) * DENSITY), "limit", INK, font())
    for j, (word, ink) in enumerate(zip(parts, ("blue", "orange"), strict=False)):
        draw.rectangle([20 * DENSITY, (6 + 18 * j) * DENSITY, 32 * DENSITY, (18 + 18 * j) * DENSITY], PALETTE[ink], INK)
        draw.text((38 * DENSITY, (4 + 18 * j) * DENSITY), word, INK, font())
    return page


def curve(xs: Sequence[Number], ys: Sequence[Number], at: int, x: str, y: str) -> Image.Image:
    """A line through points, the one numbered `at` marked and in words; x, y: names and units of the axes."""
    wide, high, left, foot = 330, 230, 24, 42
    page = Image.new("RGB", (wide * DENSITY, high * DENSITY), "white")
    draw = ImageDraw.Draw(page)
    (x0, x1), (y0, y1) = ((min(v), max(v) if max(v) > min(v) else min(v) + 1) for v in (xs, ys))
    place = lambda a, b: ((left + 10 + (a - x0) / (x1 - x0) * (wide - left - 60)) * DENSITY,
                          (high - foot - 10 - (b - y0) / (y1 - y0) * (high - foot - 70)) * DENSITY)  # fmt: skip
    for line in ([(left, 40), (left, high - foot)], [(left, high - foot), (wide - 10, high - foot)]):
        draw.line([(a * DENSITY, b * DENSITY) for a, b in line], "#888888", DENSITY)
    points = sorted((place(a, b) for a, b in zip(xs, ys, strict=True)), key=lambda p: p[0])
    draw.line(points, PALETTE["blue"], 2 * DENSITY)
    for a, b in points:
        draw.ellipse([a - 2 * DENSITY, b - 2 * DENSITY, a + 2 * DENSITY, b + 2 * DENSITY], PALETTE["blue"])
    a, b = place(xs[at], ys[at])
    draw.ellipse([a - 6 * DENSITY, b - 6 * DENSITY, a + 6 * DENSITY, b + 6 * DENSITY], PALETTE["orange"], INK, DENSITY)
    draw.text(((left + 10) * DENSITY, 36 * DENSITY), f"now {ys[at]:.3g} at {xs[at]:.3g}", INK, font())
    draw.text((left * DENSITY, (high - foot + 4) * DENSITY), f"{x0:.2g}", INK, font())
    end = f"{x1:.2g}"
    draw.text(((wide - 50) * DENSITY - font().getlength(end) / 2, (high - foot + 4) * DENSITY), end, INK, font())
    draw.text(((wide / 2) * DENSITY - font().getlength(x) / 2, (high - 20) * DENSITY), x, INK, font())
    draw.text((4 * DENSITY, 16 * DENSITY), f"{y} ({y0:.3g} to {y1:.3g})", INK, font())
    return page


def page(caption: str, rows: Sequence[Sequence[Image.Image]], facts: Sequence[str] = (), *, alt: str = "") -> Picture:
    """Pieces as `bars` and `curve` draw them, side by side and row under row, below a caption and facts in words."""
    sheet = Sheet()
    sheet.text(caption, bold=True)
    for fact in facts:
        sheet.text(fact)
    every = [[sheet.image()], *rows]
    wide, high = [sum(x.width for x in row) for row in every], [max(x.height for x in row) for row in every]
    whole = Image.new("RGB", (max(wide), sum(high)), "white")
    for j, row in enumerate(every):
        for i, piece in enumerate(row):
            whole.paste(piece, (sum(x.width for x in row[:i]), sum(high[:j])))
    return Picture(whole, f"page: {caption}", alt or f"{caption}. {' '.join(facts)}")
