"""Memory as pictures: what is alive while a block runs, and how tiles are rebuilt from thin strips and thrown away.

    memory.timeline({"dense": measure.lives(lambda: block(x, ctx))}, tokens=1024, width=128)
    memory.tiles()

Boxes and text only, as in `maps`: they are redrawn at every turn of a knob.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw

from minivid.lab.canvas import DENSITY, INK, PALE, PALETTE, PAPER, TEXT, WIDTH, Picture, font, rgb
from minivid.lab.measure import Life

KINDS = {"x, which the caller holds": "#999999", "as wide as x": "sky", "wider": "blue", "narrower, as strips are": "orange",
         "tiles and the rest": "purple"}  # fmt: skip
Number = float | int
HIGH, LEFT = 92, 34  # shown pixels of a panel, and of what stands left of it


def kind(life: Life, tokens: int, width: int) -> str:
    """Which of KINDS a storage is: full length or not, and how many columns it has."""
    _, wide, tall, thin, rest = KINDS
    split = len(life.shape) == 4 and life.shape[1] * life.shape[2] == tokens and life.shape[3] == width  # frames apart
    if tokens not in life.shape and not split:
        return rest
    columns = life.bytes / 4 / tokens
    return tall if columns > width else wide if columns == width else thin


def levels(lives: Sequence[Life], tokens: int, width: int, columns: int) -> np.ndarray:
    """`KINDS columns`: what is alive, in units of tokens x width float32 numbers, at `columns` moments in order of operations.

    A moment stands for many operations and shows the one at which most was alive, so that no peak is lost.
    """
    names, ops = list(KINDS), max((life.died for life in lives), default=1)
    change = np.zeros((len(names), ops + 2))
    for life in lives:
        row = names.index(kind(life, tokens, width))
        change[row, life.born] += life.bytes
        change[row, life.died + 1] -= life.bytes
    alive = change.cumsum(1)[:, 1:-1] / (4 * tokens * width)
    alive[0] = 1.0
    edges = np.linspace(0, ops, columns + 1).astype(int)
    at = [low + int(alive[:, low : max(high, low + 1)].sum(0).argmax()) for low, high in zip(edges, edges[1:], strict=False)]
    return alive[:, np.minimum(at, ops - 1)]


def timeline(
    ways: Mapping[str, Sequence[Life]], tokens: int, width: int, caption: str = "", *, top: Number = 10, alt: str = ""
) -> Picture:
    """A panel a way: storages that are alive while it runs, stacked by kind, on one scale; the peak is written and dashed.

    tokens, width  of the input x (one sample)      top  end of the scale, in units of tokens x width numbers
    """
    wide = WIDTH - LEFT - 8
    head = 2 * (TEXT + 8) + (TEXT + 8 if caption else 0)
    page = Image.new("RGB", (WIDTH * DENSITY, (head + len(ways) * (HIGH + TEXT + 16)) * DENSITY), PAPER)
    pen, y = ImageDraw.Draw(page), 4
    text = lambda x, y, said, bold=False: pen.text((x * DENSITY, y * DENSITY), said, INK, font(bold))
    if caption:
        text(4, y, caption, True)
        y += TEXT + 8
    x = 4
    for name, ink in KINDS.items():
        pen.rectangle([x * DENSITY, (y + 2) * DENSITY, (x + 11) * DENSITY, (y + 13) * DENSITY], PALETTE.get(ink, ink), INK)
        text(x + 16, y, name)
        x += 30 + int(font().getlength(name) / DENSITY)
    y += TEXT + 8
    peaks = {}
    for name, lives in ways.items():
        values = levels(lives, tokens, width, wide)
        peaks[name] = values.sum(0).max()
        text(4, y, f"{name}: {peaks[name]:.1f} M d = {peaks[name] * tokens * width * 4 / 1e6:.2g} MB", True)
        y += TEXT + 6
        page.paste(Image.fromarray(_area(values, top)), (LEFT * DENSITY, y * DENSITY))
        for level in (0, top / 2):
            text(4, y + HIGH - level / top * HIGH - TEXT / 2 - 2, f"{level:2.0f}")
        line = (y + HIGH - peaks[name] / top * HIGH) * DENSITY
        for dash in range(LEFT, WIDTH - 8, 10):
            pen.line([dash * DENSITY, line, (dash + 5) * DENSITY, line], INK, DENSITY)
        y += HIGH + 10
    text(LEFT, y - 6, "operations in order; up: numbers alive, in units of M d (tokens times width)")
    said = ", ".join(f"{name} {peak:.1f}" for name, peak in peaks.items())
    return Picture(page, f"timeline of {len(ways)} ways", alt or f"{caption or 'Live memory'}. Peaks in units of M d: {said}.")


def _area(values: np.ndarray, top: Number) -> np.ndarray:
    """Stacked columns as bytes `h w 3`."""
    high = HIGH * DENSITY
    out = np.full((high, values.shape[1] * DENSITY, 3), 246, np.uint8)
    edges = np.vstack([np.zeros(values.shape[1]), values.cumsum(0)]) / top * high
    rows = np.arange(high)[::-1, None]
    for i, ink in enumerate(KINDS.values()):
        inside = (rows >= edges[i].round()) & (rows < edges[i + 1].round())
        out[inside.repeat(DENSITY, 1)] = rgb(ink)
    return out


# --- the film of tiles ----------------------------------------------------------------------------------------------------


class _Board:
    """A page on which boxes are drawn in shown pixels, scaled by `density`."""

    def __init__(self, size: tuple[int, int], density: int):
        self.scale, self.page = density, Image.new("RGB", (size[0] * density, size[1] * density), PAPER)
        self.pen = ImageDraw.Draw(self.page)

    def box(self, x: Number, y: Number, w: Number, h: Number, fill: str | None = None, edge: str = INK) -> None:
        corners = [v * self.scale for v in (x, y, x + w, y + h)]
        self.pen.rectangle(corners, PALETTE.get(fill, fill) if fill else None, edge, self.scale)

    def ghost(self, x: Number, y: Number, w: Number, h: Number, said: str = "") -> None:
        """What never exists: a dashed outline."""
        for i in range(0, int(max(w, h)), 8):
            for a, b, c, d in ((x + i, y, x + i + 4, y), (x + i, y + h, x + i + 4, y + h)) if i < w else ():
                self.pen.line([v * self.scale for v in (a, b, min(c, x + w), d)], "#888888", self.scale)
            for a, b, c, d in ((x, y + i, x, y + i + 4), (x + w, y + i, x + w, y + i + 4)) if i < h else ():
                self.pen.line([v * self.scale for v in (a, b, c, min(d, y + h))], "#888888", self.scale)
        self.text(x + 6, y + h - TEXT - 8, said, "#888888")

    def text(self, x: Number, y: Number, said: str, ink: str = INK, bold: bool = False) -> None:
        face = font(bold, TEXT if self.scale == DENSITY else TEXT * self.scale // DENSITY)
        self.pen.text((x * self.scale, y * self.scale), said, ink, face)

    def strip(self, x: Number, y: Number, w: Number, h: Number, cells: int, lit: int, name: str, fill: str = "orange") -> None:
        """A strip of cells along its longer side, the one numbered `lit` with a thick edge."""
        for i in range(cells):
            a, b, c, d = (x + i * w / cells, y, w / cells, h) if w > h else (x, y + i * h / cells, w, h / cells)
            self.box(a, b, c, d, fill)
        if 0 <= lit < cells:
            a, b, c, d = (x + lit * w / cells, y, w / cells, h) if w > h else (x, y + lit * h / cells, w, h / cells)
            for grow in (1, 2):
                self.box(a - grow, b - grow, c + 2 * grow, d + 2 * grow)
        self.text(x, y - TEXT - 6, name)


SIZE, TOP = (560, 264), 92


def _attention(row: int, key: int, rows: int, keys: int, density: int) -> Image.Image:
    board, high, wide = _Board(SIZE, density), 150 / rows, 220 / keys
    board.text(4, 4, f"Attention: rows {row + 1} of {rows}, keys {key + 1} of {keys}", bold=True)
    board.strip(10, TOP, 14, 150, rows, row, "P_q")
    board.box(34, TOP + row * high, 14, 24, PALE)
    board.text(32, TOP + row * high + 24, "V_q")
    board.box(60, TOP + row * high, 34, high, "purple")
    board.text(66, TOP + row * high + high / 2 - 8, "q")
    for y, name in ((26, "P_k"), (54, "P_v")):
        board.text(104, y, name)
        board.strip(134, y + 3, 220, 12, keys, key, "")
    board.ghost(134, TOP, 220, 150, "scores, M x M: never exist")
    board.box(134 + key * wide, TOP + row * high, wide, high, "purple")
    board.text(368, 26, "V_k:  tile k")
    board.text(368, 54, "V_v:  tile v")
    for y in (27, 55):
        board.box(446, y, 34, 16, "purple")
    board.box(372, TOP + row * high, 46, high, "purple")
    board.text(374, TOP + row * high + high / 2 - 8, "m l acc")
    for i in range(rows):
        board.box(446, TOP + i * high, 60, high, "sky" if i < row or (i == row and key == keys - 1) else PALE)
    board.text(446, TOP + 152, "y, M x d")
    return board.page


def _feed(row: int, piece: int, rows: int, pieces: int, density: int) -> Image.Image:
    board, high, wide = _Board(SIZE, density), 150 / rows, 240 / pieces
    board.text(4, 4, f"Feed-forward, variant 1: rows {row + 1} of {rows}, columns {piece + 1} of {pieces}", bold=True)
    board.strip(10, TOP, 18, 150, rows, row, "P")
    board.text(58, 38, "V_1")
    board.text(58, 62, "U_2")
    for y in (40, 64):
        board.strip(94, y, 240, 12, pieces, piece, "", PALE)
    board.ghost(94, TOP, 240, 150, "hidden layer, M x D: never exists")
    board.box(94 + piece * wide, TOP + row * high, wide, high, "purple")
    board.text(94 + piece * wide + 6, TOP + row * high + high / 2 - 8, "act")
    board.text(356, TOP - TEXT - 6, "S")
    for i in range(rows):
        board.box(356, TOP + i * high, 18, high, "orange" if i <= row else PALE)
        board.box(446, TOP + i * high, 60, high, "sky")
    board.text(388, TOP + row * high + high / 2 - 8, "+=")
    board.text(446, TOP + 152, "y, M x d")
    return board.page


def tiles(rows: int = 4, keys: int = 5, pieces: int = 4) -> Picture:
    """The film: strips at full length (orange), tiles that are rebuilt and thrown away (purple), what never exists (dashed).

    The still shows one moment of attention and one of the feed-forward.
    """
    halves = _attention(1, 3, rows, keys, DENSITY), _feed(2, 1, rows, pieces, DENSITY)
    still = Image.new("RGB", (halves[0].width, 2 * halves[0].height), PAPER)
    for i, half in enumerate(halves):
        still.paste(half, (0, i * half.height))

    def film() -> list[Image.Image]:
        first = [_attention(i, j, rows, keys, 1) for i in range(rows) for j in range(keys)]
        return first + [_feed(i, j, rows, pieces, 1) for i in range(rows) for j in range(pieces)]

    alt = "Thin strips P of queries, keys, values at full length; for some rows and some keys small tiles of q, k, v and scores "
    alt += "are rebuilt from them and folded into running sums; the full scores and hidden layer are dashed: they never exist."
    return Picture(still, "film of tiles", alt, film, fps=4)
