"""Pictures for notebooks: a clip, a latent, a mask, a codebook, an attention map, each the last expression of a cell.

    show.clip(x, "a red circle moves left")
    show.clips([x, y], titles=["before", "after"], difference=True)

Every function returns a `Picture`: a still that everybody sees, a film in a closed fold where something moves, a text
description for those who can't see it, and `.save(path)`. Wrong shapes, ranges and NaN raise, they are never shown.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
from IPython.display import Markdown
from PIL import Image, ImageDraw
from torch import Tensor

from minivid.lab import claims, papers
from minivid.lab.canvas import (
    DENSITY,
    INK,
    PALE,
    PALETTE,
    PAPER,
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
    signed,
    wrap,
)
from minivid.lab.plots import attention, bars, claim, lines, scatter

__all__ = [
    "PALETTE",
    "Picture",
    "attention",
    "bars",
    "claim",
    "clip",
    "clips",
    "codebook",
    "latent",
    "lines",
    "mask",
    "source",
    "strip",
    "verdict",
]

Array = Tensor | np.ndarray


class Source:
    """Code that displays itself, highlighted where a notebook can."""

    def __init__(self, code: str):
        self.code = code

    def __repr__(self) -> str:
        return self.code

    def _repr_mimebundle_(self, include=None, exclude=None):
        return {"text/plain": self.code, "text/markdown": f"```python\n{self.code}\n```"}


def source(*things: Any) -> Source:
    """The package's own source of functions and classes, one after the other: a lesson never shows a copy."""
    return Source("\n\n".join(inspect.getsource(thing).rstrip() for thing in things))


def clip(x: Array, caption: str = "", *, scale: int | None = None, fps: int = 8, alt: str = "") -> Picture:
    """A clip `c f h w` in [-1, 1]: a strip of up to 18 numbered frames, and the film.

    scale  whole number of shown pixels a video pixel; by default large enough to see
    """
    return _clips([clip_bytes(x)], [], caption, scale, 18, fps, alt, text="clip " + _size(x))


def strip(
    x: Array, caption: str = "", *, frames: int = 8, scale: int | None = None, labels: Sequence[str] = (), alt: str = ""
) -> Picture:
    """The still alone: `frames` evenly spread frames of a clip `c f h w`, without a film.

    labels  what stands under the frames; by default their numbers
    """
    pixels = clip_bytes(x)
    chosen = pick(len(pixels), frames)
    if labels and len(labels) != len(chosen):
        raise ValueError(f"strip shows {len(chosen)} frames and needs as many labels, got {len(labels)}.")
    factor = (scale or scale_for(pixels.shape[2], 96)) * DENSITY
    sheet = Sheet()
    if caption:
        sheet.text(caption, bold=True)
    sheet.tiles([enlarge(pixels[k], factor) for k in chosen], list(labels) or [str(k) for k in chosen])
    said = f": {', '.join(labels)}" if labels else ""
    alt = alt or f"{caption + ': ' if caption else ''}{len(chosen)} frames in order from left to right{said}."
    return Picture(sheet.image(), "strip " + _size(x), alt)


def clips(
    xs: Sequence[Array], titles: Sequence[str] = (), caption: str = "", *, difference: bool = False,
    scale: int | None = None, fps: int = 8, alt: str = "",
) -> Picture:  # fmt: skip
    """Several clips under one another (8 frames each) as a still, side by side as a film.

    difference  with two clips of one shape: adds the mean absolute difference of each pixel on a dark-to-bright map
    """
    if not len(xs) or (titles and len(titles) != len(xs)):
        raise ValueError(f"clips needs at least one clip and as many titles as clips, got {len(xs)} and {len(titles)}.")
    names = [str(title) for title in titles] or [f"clip {i + 1}" for i in range(len(xs))]
    pixels = [clip_bytes(x) for x in xs]
    text = f"{len(xs)} clips: " + ", ".join(_size(x) for x in xs)
    if difference:
        if len(xs) != 2 or pixels[0].shape != pixels[1].shape:
            raise ValueError(f"a difference needs two clips of one shape, got {', '.join(_size(x) for x in xs)}.")
        gap = np.abs(pixels[0].astype(np.float32) - pixels[1]).mean(-1) / 255
        pixels.append(magnitude(gap, float(gap.max())))
        names.append(f"difference (dark: 0, bright: {100 * gap.max():.2g} % of the range)")
    return _clips(pixels, names, caption, scale, 8, fps, alt, text)


def _size(x: Array) -> str:
    return "x".join(map(str, x.shape))


def _clips(
    pixels: list[np.ndarray],
    names: list[str],
    caption: str,
    scale: int | None,
    most: int,
    fps: int,
    alt: str,
    text: str,
) -> Picture:
    sheet = Sheet()
    if caption:
        sheet.text(caption, bold=True)
    for i, frames in enumerate(pixels):
        factor = scale or scale_for(frames.shape[2], 96)
        chosen = pick(len(frames), most)
        if names:
            sheet.text(names[i])
        sheet.tiles([enlarge(frames[k], factor * DENSITY) for k in chosen], [str(k) for k in chosen])
    what = f"Frames of a clip of {len(pixels[0])} frames" if not names else f"Frames of {', '.join(names)}"
    alt = alt or f"{caption + ': ' if caption else ''}{what}, in order from left to right."
    moving = max(len(frames) for frames in pixels) > 1
    return Picture(sheet.image(), text, alt, (lambda: _film(pixels, names)) if moving else None, fps)


def _film(pixels: list[np.ndarray], names: list[str]) -> list[Image.Image]:
    """All clips side by side under their names, frame by frame; a shorter one waits on its last frame."""
    factors = [scale_for(frames.shape[1], 192) for frames in pixels]
    wide = [frames.shape[2] * factor for frames, factor in zip(pixels, factors, strict=True)]
    titles = [wrap(name, width) for name, width in zip(names, wide, strict=False)]
    top = max((len(lines) for lines in titles), default=0) * (TEXT + 6)
    high = max(frames.shape[1] * factor for frames, factor in zip(pixels, factors, strict=True))
    plain = font(size=TEXT // DENSITY)  # a film is drawn at the size at which it is shown
    out = []
    for k in range(max(map(len, pixels))):
        page = Image.new("RGB", (sum(wide) + 12 * (len(wide) - 1), top + high), PAPER)
        x = 0
        for i, frames in enumerate(pixels):
            for row, line in enumerate(titles[i] if titles else ()):
                ImageDraw.Draw(page).text((x, row * (TEXT + 6)), line, font=plain, fill=INK)
            page.paste(Image.fromarray(enlarge(frames[min(k, len(frames) - 1)], factors[i])), (x, top))
            x += wide[i] + 12
        out.append(page)
    return out


def latent(z: Array, caption: str = "", *, frames: int = 8, alt: str = "") -> Picture:
    """A latent `c f h w`: a row a channel, a column a frame; blue below 0, white at 0, orange above."""
    z = checked(z, "c f h w", "a latent")
    limit = float(np.abs(z).max())
    chosen = pick(z.shape[1], frames)
    factor = scale_for(z.shape[3], 48) * DENSITY
    sheet = Sheet()
    if caption:
        sheet.text(caption, bold=True)
    sheet.text(f"a row is a channel, a column a frame; blue {-limit:.2g}, white 0, orange +{limit:.2g}")
    for c in range(z.shape[0]):
        last = c == z.shape[0] - 1
        tiles = [enlarge(signed(z[c, k], limit), factor) for k in chosen]
        sheet.tiles(tiles, [str(k) for k in chosen] if last else (), left=f"{c:2d}")
    alt = alt or f"{caption or 'Latent'}: {z.shape[0]} channels of {z.shape[1]} frames, values within {limit:.2g} of 0."
    return Picture(sheet.image(), "latent " + _size(z), alt)


def mask(m: Array, over: Array | None = None, caption: str = "", *, scale: int | None = None, alt: str = "") -> Picture:
    """A mask `f h w` with values in [0, 1] (or True and False): blue is 1, grey is 0.

    over  a clip `c f h w`: then the clip is shown, pale outside the mask, with a black and white line around it
    """
    m = checked(m, "f h w", "a mask", 0.0, 1.0)
    if over is None:
        frames = (m[..., None] * rgb("blue") + (1 - m[..., None]) * rgb(PALE)).round().astype(np.uint8)
    else:
        frames = clip_bytes(over)
        if frames.shape[:3] != m.shape:
            raise ValueError(f"mask 'f h w' and clip 'c f h w' must agree, got {m.shape} and {_size(over)}.")
    factor = (scale or scale_for(m.shape[2], 96)) * DENSITY
    chosen = pick(len(m), 18)
    sheet = Sheet()
    if caption:
        sheet.text(caption, bold=True)
    sheet.text("blue: in the mask, grey: outside" if over is None else "outlined: in the mask, pale: outside")
    tiles = [enlarge(frames[k], factor) for k in chosen]
    if over is not None:
        tiles = [_outlined(tile, enlarge(m[k] > 0.5, factor)) for tile, k in zip(tiles, chosen, strict=True)]
    sheet.tiles(tiles, [str(k) for k in chosen])
    alt = alt or f"{caption or 'Mask'}: {100 * m.mean():.0f} % of the pixels of {len(m)} frames are in the mask."
    return Picture(sheet.image(), "mask " + _size(m), alt)


def _outlined(tile: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Pale outside; just inside the border a white and a black line, which no colour of a clip can hide."""
    out = np.where(inside[..., None], tile, (255 - (255 - tile.astype(int)) * 0.35).astype(np.uint8)).astype(np.uint8)
    for depth, colour in ((2 * DENSITY, 255), (DENSITY, 0)):
        padded, core = np.pad(inside, depth), inside.copy()
        for step in (-depth, depth):
            for axis in (0, 1):
                core &= np.roll(padded, step, axis)[depth:-depth, depth:-depth]
        out[inside & ~core] = colour
    return out


def codebook(table: Array, used: Array | None = None, caption: str = "", *, alt: str = "") -> Picture:
    """A codebook: patches `k c h w` in [-1, 1] as a sheet of tiles, or vectors `k d` as a map of their two main axes.

    used  `k` counts: a code that was never used is crossed out (tiles) or drawn as a grey cross (map)
    """
    shape = tuple(table.shape)
    alive = np.ones(shape[0], bool) if used is None else checked(used, "k", "the counts of use") > 0
    if len(alive) != shape[0]:
        raise ValueError(f"the table has {shape[0]} codes, but there are {len(alive)} counts of use.")
    note = f"{int(alive.sum())} of {shape[0]} codes in use" if used is not None else f"{shape[0]} codes"
    alt = alt or f"{caption or 'Codebook'}: {note}."
    if len(shape) == 2:
        return scatter(checked(table, "k d", "a codebook"), alive, caption, note, alt)
    patches = checked(table, "k c h w", "a codebook of patches", -1.0, 1.0)
    pixels = clip_bytes(patches.transpose(1, 0, 2, 3))
    side = scale_for(pixels.shape[2], 28) * DENSITY
    sheet = Sheet(WIDTH)
    if caption:
        sheet.text(caption, bold=True)
    sheet.text(note + (" (unused ones are crossed out)" if not alive.all() else ""))
    sheet.tiles([_crossed(enlarge(p, side), bool(ok)) for p, ok in zip(pixels, alive, strict=True)])
    return Picture(sheet.image(), "codebook " + _size(table), alt)


def _crossed(tile: np.ndarray, used: bool) -> np.ndarray:
    if used:
        return tile
    page = Image.fromarray(tile)
    end = tile.shape[1] - 1, tile.shape[0] - 1
    pen = ImageDraw.Draw(page)
    for colour, width in ((PALE, 3 * DENSITY), (INK, DENSITY)):
        pen.line([(0, 0), end], fill=colour, width=width)
        pen.line([(0, end[1]), (end[0], 0)], fill=colour, width=width)
    return np.asarray(page)


def verdict(slug: str) -> Markdown:
    """A measured claim in words: verdict and outcome, each test that counts with its verdict, and where the paper differs."""
    result = claims.read(slug)
    rows = [f"| {test['claim']} | {test['verdict']} |" for test in result["tests"] if test["counts"]]
    outcome = claims.outcome(slug)
    said = [f"**{result['verdict']}**, {len(result['seeds'])} seeds. {outcome[:1].upper()}{outcome[1:]}", ""]
    table = ["| decided before the run | verdict |", "|---|---|", *rows, ""]
    return Markdown("\n".join([*said, *table, f"Where we differ: {papers.find(slug).card().differs}"]))
