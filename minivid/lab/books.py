"""A codebook at work, in two dimensions: vectors in grey, codes in use as dots, the others as crosses that fade with their age.

    looks = {"plain VQ": list(chase(...)), "SimVQ": list(chase(...))}
    books.picture(looks)            what was there at the last look, the way that each code came, usage over steps
    books.picture(looks, 10)        the same at look number 10

A *look* is anything with `step`, `x` (vectors `n 2`), `table` (codes `k 2`) and `age` (`k`, steps since a code was last chosen).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from minivid.lab.canvas import DENSITY, Picture, few_colours
from minivid.lab.plots import CYCLE, DASHES, MARKERS, figure

Looks = Mapping[str, Sequence[Any]]
FRAMES = 16  # of a film


def picture(looks: Looks, at: int = -1, *, film: bool = False, alt: str = "") -> Picture:
    """Codebooks side by side, and below them the share of their codes in use at every step.

    looks  the looks of each codebook by its name, at the same steps
    at     number of the look that is drawn
    film   adds all looks up to this one, moving, in a closed fold
    Raises ValueError where there is nothing to draw, or not in two dimensions.
    """
    if not looks or not all(looks.values()) or len({tuple(one.step for one in row) for row in looks.values()}) > 1:
        counts = ", ".join(f"{len(row)} of {name}" for name, row in looks.items())
        raise ValueError(f"picture needs looks of each codebook at the same steps, got {counts or 'none'}.")
    if any(one.table.shape[1:] != (2,) or one.x.shape[1:] != (2,) for row in looks.values() for one in row):
        raise ValueError("picture draws vectors 'n 2' and codes 'k 2': chase a codebook with d = 2.")
    steps = len(next(iter(looks.values())))
    at = range(steps)[at]
    box = _box(looks)

    def draw(ax: Any) -> None:
        fig, names = ax.figure, list(looks)
        ax.remove()
        axes = fig.subplot_mosaic([names, ["usage"] * len(names)], height_ratios=[height - 1.9, 1.0])
        for i, name in enumerate(names):
            _book(axes[name], looks[name][: at + 1], box, CYCLE[i % 6], name)
        _usage(axes["usage"], looks, at)

    said = ", ".join(f"{name} {_used(row[at])} of {len(row[at].age)}" for name, row in looks.items())
    alt = alt or f"Step {next(iter(looks.values()))[at].step}. Codes in use: {said}."
    width = min(8.2, 0.8 + 3.0 * len(looks))
    height = 1.9 + (width / len(looks) - 0.7) * float(np.divide(*(box[1] - box[0])[::-1]))
    moving = (lambda: _film(looks, at, box)) if film and at else None
    still = few_colours(figure(draw, (width, height), "", "").image, 48)
    return Picture(still, f"codebooks {', '.join(looks)}", alt, moving, fps=6)


def _film(looks: Looks, at: int, box: np.ndarray) -> list[Image.Image]:
    """The upper row alone, at the size at which it is shown."""

    def frame(i: int) -> Image.Image:
        def draw(axes: Any) -> None:
            for ax, (j, name) in zip(axes if isinstance(axes, list) else [axes], enumerate(looks), strict=True):
                _book(ax, looks[name][: i + 1], box, CYCLE[j % 6], name)

        image = figure(draw, (3.0 * len(looks), 0.9 + 2.2 * tall), "", "", (1, len(looks))).image
        return few_colours(image.resize((image.width // DENSITY, image.height // DENSITY)), 24)

    tall = float(np.divide(*(box[1] - box[0])[::-1]))
    return [frame(int(i)) for i in np.linspace(0, at, min(at + 1, FRAMES)).round()]


def _used(look: Any) -> int:
    return int((np.asarray(look.age) == 0).sum())


def _box(looks: Looks) -> np.ndarray:
    """Corners `2 2` of a box that holds the codes' beginning and nearly all vectors, with a margin."""
    some = [np.asarray(one.x) for row in looks.values() for one in (row[0], row[-1])]
    some += [np.asarray(row[0].table) for row in looks.values()]
    low, high = np.percentile(np.concatenate(some), (0.5, 99.5), axis=0)
    middle, half = (low + high) / 2, 0.58 * np.maximum(high - low, 0.75 * (high - low).max())
    return np.stack([middle - half, middle + half])


def _book(ax: Any, row: Sequence[Any], box: np.ndarray, colour: str, name: str) -> None:
    """One codebook: vectors, the way of each code so far, codes in use, codes left behind."""
    from matplotlib.collections import LineCollection

    now, tables = row[-1], np.stack([np.asarray(one.table) for one in row])
    x, age, table = np.asarray(now.x), np.asarray(now.age), tables[-1]
    ax.plot(*x.T, "o", color="#BBBBBB", ms=2.5, mew=0, zorder=1)
    ax.add_collection(LineCollection(tables.swapaxes(0, 1), colors=colour, linewidths=0.6, alpha=0.35, zorder=2))
    left = age > 0
    fade = np.stack([np.zeros(left.sum())] * 3 + [0.25 + 0.65 * 0.97 ** age[left]], -1)  # black, ever more transparent
    ax.scatter(*table[left].T, 28, fade, marker="x", linewidths=1.1, zorder=3)
    ax.plot(*table[age == 0].T, "o", color=colour, mec="white", mew=0.5, ms=5.5, zorder=4)
    ax.set(xlim=box[:, 0], ylim=box[:, 1], aspect="equal", xlabel="first number", ylabel="second number")
    ax.set_title(f"{name}, step {now.step}: {_used(now)} of {len(age)}")


def _usage(ax: Any, looks: Looks, at: int) -> None:
    for i, (name, row) in enumerate(looks.items()):
        steps, share = [one.step for one in row], [100 * _used(one) / len(one.age) for one in row]
        ax.plot(steps, share, color=CYCLE[i % 6], ls=DASHES[i % 6], lw=1.6, label=name)
        ax.plot(steps[at], share[at], MARKERS[i % 6], color=CYCLE[i % 6], ms=6)
    ax.set(xlabel="step", ylabel="codes in use, %", ylim=(-4, 104))
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
