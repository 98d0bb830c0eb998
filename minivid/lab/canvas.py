"""Drawing pixel pictures: crisp up-scaling, labelled strips, colour maps, and the object that a notebook displays.

Pictures are drawn at twice the size at which they are shown, so that text is sharp on a dense screen, and video pixels
are enlarged by whole numbers only: a reader should see the model's pixels, not the browser's interpolation.
"""

import base64
import html
import importlib.util
import io
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

DENSITY = 2  # drawn pixels per shown pixel
WIDTH = 820  # shown pixels: what fits beside a notebook's prompt column
TEXT = 12  # shown pixels = 9 points, the smallest text used anywhere

# Okabe and Ito's colours: told apart with every common kind of colour vision.
PALETTE = {
    "blue": "#0072B2", "orange": "#E69F00", "purple": "#CC79A7", "sky": "#56B4E9", "black": "#000000",
    "green": "#009E73", "yellow": "#F0E442", "vermillion": "#D55E00",
}  # fmt: skip
INK, PALE, PAPER = "#222222", "#DDDDDD", "#FFFFFF"

_SIGNED = np.array([[0, 60, 110], [0, 114, 178], [247, 247, 247], [230, 140, 0], [120, 62, 0]], float)


Box = tuple[float | int, float | int, float | int, float | int]


class Picture:
    """A picture that displays itself as the last expression of a cell.

    What everybody sees, with or without a kernel, trusted or not, is a still PNG with a text description. Where there
    is a film it waits in a closed fold under the still: nothing moves until the reader opens it, with mouse or
    keyboard, and closing it stops it. No script is involved.

    text  one short stable line, the plain-text form       alt   the description for those who can't see the picture
    film  a function giving the frames (called only when the film is shown)   fps  frames a second
    places  boxes (left, top, right, bottom) in shown pixels, and the settings of knobs that a click there stands for
    """

    def __init__(
        self, image: Image.Image, text: str, alt: str, film: Callable[[], list[Image.Image]] | None = None, fps: int = 8,
        places: Mapping[Box, Mapping[str, Any]] | None = None,
    ):  # fmt: skip
        self.image, self.text, self.alt, self._film, self.fps = image, text, alt, film, fps
        self.places = dict(places or {})
        if image.mode != "P":  # an image in few colours stays so
            self.image = image.convert("RGB")

    def __repr__(self) -> str:
        return self.text

    @property
    def width(self) -> int:
        """Width in shown pixels."""
        return self.image.width // DENSITY

    @cached_property
    def png(self) -> bytes:
        """The still as PNG bytes, the same on every run."""
        few = self.image.getcolors(256)  # then a byte a pixel does, and the file is a third as large
        image = self.image.convert("P", palette=Image.Palette.ADAPTIVE, colors=len(few)) if few else self.image
        out = io.BytesIO()
        image.save(out, "PNG")  # optimize=True saves 3 % of the bytes and takes 8 times as long: knobs would lag
        return out.getvalue()

    @cached_property
    def webp(self) -> bytes:
        """The film as lossless animated WebP bytes; empty where nothing moves. The last frame stays a little longer."""
        if self._film is None:
            return b""
        frames = self._film()
        out, each = io.BytesIO(), round(1000 / self.fps)
        pauses = [each] * (len(frames) - 1) + [each + 500]
        how = {"duration": pauses, "loop": 0, "lossless": True, "quality": 50, "method": 2}
        frames[0].save(out, "WEBP", save_all=True, append_images=frames[1:], **how)
        return out.getvalue()

    def save(self, path: str | Path) -> None:
        """Write the still (.png) or the film (.webp). Raises ValueError for another ending or where nothing moves."""
        data = {".png": self.png, ".webp": self.webp}.get(Path(path).suffix)
        if not data:
            raise ValueError(f"{path}: a picture is saved as .png, its film, if it has one, as .webp.")
        Path(path).write_bytes(data)

    def _html(self) -> str:
        alt = html.escape(self.alt)
        still = f'<img src="{_url("png", self.png)}" width="{self.width}" alt="{alt}">'
        if not self.webp:
            return still
        film = f'<img src="{_url("webp", self.webp)}" alt="The same, moving.">'
        return f"{still}<details><summary>Play ({self.fps} frames a second)</summary>{film}</details>"

    def _repr_mimebundle_(self, include=None, exclude=None):
        return {"text/plain": self.text, "text/html": self._html()}  # stored once: as image/png it would be there twice


def _url(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def few_colours(image: Image.Image, colours: int = 128) -> Image.Image:
    """The same in a few colours: a fifth of the bytes in a notebook, and in drawings the eye sees no difference."""
    return image.quantize(colours, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).convert("RGB")


# --- values to colours ------------------------------------------------------------------------------------------------


def rgb(name: str) -> np.ndarray:
    """A colour of the palette, or '#rrggbb', as three bytes."""
    code = PALETTE.get(name, name)
    return np.array([int(code[i : i + 2], 16) for i in (1, 3, 5)], np.uint8)


def checked(x: Tensor | np.ndarray, axes: str, what: str, low: float | None = None, high: float | None = None) -> np.ndarray:
    """`x` as a float32 array with the given axes ('c f h w'), finite, within [low, high] up to a twentieth.

    Raises TypeError for something that is no tensor, ValueError for a wrong number of axes, NaN or the wrong range.
    """
    if isinstance(x, Tensor):
        x = x.detach().cpu().float().numpy()
    if not isinstance(x, np.ndarray):
        raise TypeError(f"{what} must be a tensor or array with axes '{axes}', got {type(x).__name__}.")
    if x.ndim != len(axes.split()) or 0 in x.shape:
        raise ValueError(f"{what} must have axes '{axes}', got shape {tuple(x.shape)}.")
    x = x.astype(np.float32)
    if not np.isfinite(x).all():
        raise ValueError(f"{what} has NaN or infinite values in {int((~np.isfinite(x)).sum())} of {x.size} places.")
    if low is not None and high is not None:
        if x.min() < low - 0.05 or x.max() > high + 0.05:
            raise ValueError(
                f"{what} must lie in [{low:g}, {high:g}], got {x.min():.3g} to {x.max():.3g}; "
                f"rescale it, or use .clamp({low:g}, {high:g}) where an overshoot is expected."
            )
        x = x.clip(low, high)
    return x


def clip_bytes(x: Tensor | np.ndarray) -> np.ndarray:
    """A clip `c f h w` in [-1, 1] as bytes `f h w 3`; one channel is shown grey."""
    if isinstance(x, (Tensor, np.ndarray)) and x.ndim == 5:
        raise ValueError(f"got a batch of shape {tuple(x.shape)}; show one clip x[0], or several with clips(list(x)).")
    x = checked(x, "c f h w", "a clip", -1.0, 1.0)
    if x.shape[0] not in (1, 3):
        raise ValueError(f"a clip has 1 or 3 channels first ('c f h w'), got shape {x.shape}.")
    x = np.broadcast_to(x, (3, *x.shape[1:]))
    return ((x + 1) * 127.5).round().astype(np.uint8).transpose(1, 2, 3, 0)


def signed(x: np.ndarray, limit: float) -> np.ndarray:
    """Values in [-limit, limit] as bytes `... 3`: blue below 0, white at 0, orange above."""
    place = np.clip(x / (limit or 1.0), -1, 1) * 2 + 2
    stops = np.arange(5)
    return np.stack([np.interp(place, stops, _SIGNED[:, c]) for c in range(3)], -1).round().astype(np.uint8)


def magnitude(x: np.ndarray, limit: float) -> np.ndarray:
    """Values in [0, limit] as bytes `... 3` on cividis: dark blue is 0, yellow the limit."""
    import matplotlib

    return matplotlib.colormaps["cividis"](np.clip(x / (limit or 1.0), 0, 1), bytes=True)[..., :3]


# --- layout -----------------------------------------------------------------------------------------------------------


@lru_cache
def font(bold: bool = False, size: int = TEXT) -> ImageFont.FreeTypeFont:
    """The typeface that comes with matplotlib, so that pictures look the same everywhere."""
    spec = importlib.util.find_spec("matplotlib")
    folder = Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf"  # type: ignore[union-attr,arg-type]
    return ImageFont.truetype(str(folder / f"DejaVuSans{'-Bold' if bold else ''}.ttf"), size * DENSITY)


def enlarge(pixels: np.ndarray, factor: int) -> np.ndarray:
    """`h w 3` with every pixel made a square of `factor` x `factor`."""
    return pixels.repeat(factor, 0).repeat(factor, 1)


def pick(frames: int, at_most: int) -> list[int]:
    """Numbers of at most `at_most` frames, evenly spread, first and last included."""
    if frames <= at_most:
        return list(range(frames))
    return [int(i) for i in np.linspace(0, frames - 1, at_most).round()]


def scale_for(side: int, shown: int) -> int:
    """The smallest whole factor that makes `side` pixels at least `shown` wide."""
    return max(1, -(-shown // side))


def wrap(text: str, width: int, bold: bool = False) -> list[str]:
    """`text` in lines of at most `width` shown pixels."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font(bold).getlength(longer) <= width * DENSITY:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


class Sheet:
    """A white page that grows downwards: lines of text and rows of tiles. All sizes in shown pixels."""

    def __init__(self, width: int = WIDTH):
        self.width, self.height, self.items = width, 6, []
        self.right = 0  # the rightmost pixel used

    def text(self, text: str, bold: bool = False, colour: str = INK) -> None:
        """Write `text`, wrapped."""
        for line in wrap(text, self.width - 8, bold):
            self.items.append((4, self.height, line, font(bold), colour))
            self.right = max(self.right, 4 + int(font(bold).getlength(line) / DENSITY))
            self.height += TEXT + 6

    def tiles(self, tiles: Sequence[np.ndarray], labels: Sequence[str] = (), left: str = "", gap: int = 4) -> list[Box]:
        """Place tiles (`h w 3`, already enlarged to drawn pixels) in rows of equal length, labels under them. Returns where."""
        indent = 4 + (int(font().getlength(left) / DENSITY) + 8 if left else 0)
        high, wide = tiles[0].shape[0] // DENSITY, tiles[0].shape[1] // DENSITY
        most = max(1, (self.width - indent) // (wide + gap))
        rows = -(-len(tiles) // most)
        columns = -(-len(tiles) // rows)
        boxes: list[Box] = []
        for start in range(0, len(tiles), columns):
            if left and start == 0:
                self.items.append((4, self.height + high // 2 - TEXT // 2 - 1, left, font(), INK))
            for i, tile in enumerate(tiles[start : start + columns]):
                x = indent + i * (wide + gap)
                self.items.append((x, self.height, tile, None, ""))
                boxes.append((x, self.height, x + wide, self.height + high))
                if labels:
                    self._label(labels[start + i], x + wide / 2, self.height + high + 1)
                self.right = max(self.right, x + wide)
            self.height += high + (TEXT + 8 if labels else gap)
        return boxes

    def _label(self, text: str, middle: float, y: int) -> None:
        self.items.append((middle - font().getlength(text) / DENSITY / 2, y, text, font(), INK))

    def space(self, amount: int = 4) -> None:
        self.height += amount

    def image(self) -> Image.Image:
        """Draw everything."""
        page = Image.new("RGB", ((self.right + 4) * DENSITY, (self.height + 4) * DENSITY), PAPER)
        pen = ImageDraw.Draw(page)
        for x, y, thing, face, colour in self.items:
            if face is None:
                page.paste(Image.fromarray(thing), (int(x * DENSITY), int(y * DENSITY)))
            else:
                pen.text((int(x * DENSITY), int(y * DENSITY)), thing, font=face, fill=colour)
        return page
