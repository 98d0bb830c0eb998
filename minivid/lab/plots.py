"""Plots on axes: bars, lines, maps and the picture of a claim. Drawn off screen, without pyplot's global state.

Rules kept here, so that no notebook has to think of them: colours of Okabe and Ito with a second sign (marker, dash,
direct label), cividis for magnitude, text of 9 points or more, axes with names and units, the same bytes every time.
"""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from minivid.lab.canvas import DENSITY, INK, PALETTE, Picture, checked

CYCLE = [PALETTE[name] for name in ("blue", "orange", "purple", "sky", "black", "green")]
MARKERS = "osD^vP"
DASHES = ["-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1))]
STYLE = {
    "font.family": "DejaVu Sans", "font.size": 9, "axes.titlesize": 10, "axes.titleweight": "bold",
    "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False, "text.color": INK,
    "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.edgecolor": "#888888",
}  # fmt: skip
Number = float | int


def figure(
    draw: Callable[[Any], None], size: tuple[float, float], text: str, alt: str, grid: tuple[int, int] = (1, 1)
) -> Picture:
    """A plot of `size` inches as a Picture: `draw(axes)` gets one axes, or a list for a grid of rows x columns."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE}):
        fig = Figure(figsize=size, dpi=96 * DENSITY, layout="constrained")
        FigureCanvasAgg(fig)
        axes = fig.subplots(*grid, squeeze=False).ravel().tolist()
        draw(axes if len(axes) > 1 else axes[0])
        for ax in axes:
            ax._left_title.set_wrap(True)  # what is too long for the figure goes on below
        out = io.BytesIO()
        fig.savefig(out, format="png")
    return Picture(Image.open(out), text, alt)


def bars(
    values: Mapping[str, Number | Sequence[Number]], label: str, caption: str = "", *, digits: int = 3, colours: int = len(CYCLE),
    alt: str = "",
) -> Picture:  # fmt: skip
    """A horizontal bar a name, its value written at its end. A list gives the mean, and a dot for each of its values.

    label    name and unit of what is measured
    colours  so many take turns: 2 for bars that come in pairs
    """
    each = {name: np.atleast_1d(np.asarray(v, float)) for name, v in values.items()}
    _finite(each)
    written = {name: f"{v.mean():.{digits}g}" for name, v in each.items()}

    def draw(ax: Any) -> None:
        ends = [max(float(v.max()), 0.0) for v in each.values()]
        for i, (name, v) in enumerate(each.items()):
            ax.barh(i, v.mean(), color=CYCLE[i % colours], height=0.62)
            if len(v) > 1:
                ax.plot(v, np.full(len(v), i), "o", ms=5, mfc="white", mec=INK)
            ax.annotate(written[name], (ends[i], i), (5, 0), textcoords="offset points", va="center")
        ax.set_yticks(range(len(each)), list(each))
        ax.invert_yaxis()
        ax.margins(x=0.12)
        ax.set_xlabel(label)
        ax.set_title(caption)

    alt = alt or f"{caption or 'Bars'}: {label}: " + ", ".join(f"{n} {w}" for n, w in written.items()) + "."
    return figure(draw, (6.5, 1.0 + 0.36 * len(each)), f"bars {len(each)}", alt)


def lines(
    series: Mapping[str, tuple[Sequence[Number], Sequence[Number]]], x: str, y: str, caption: str = "", *,
    log: str = "", alt: str = "",
) -> Picture:  # fmt: skip
    """A line a name, from (xs, ys), each with a colour, a dash and a marker of its own and its name at its end.

    x, y  name and unit of the axes      log  "x", "y" or "xy" for logarithmic axes
    """
    _finite({name: np.concatenate([np.asarray(v, float) for v in xy]) for name, xy in series.items()})

    def draw(ax: Any) -> None:
        for i, (xs, ys) in enumerate(series.values()):
            ax.plot(xs, ys, **_look(i), ms=4, lw=1.6)
        if "x" in log:
            ax.set_xscale("log")
            places = sorted({float(v) for xs, _ in series.values() for v in xs})
            ax.set_xticks(marks := _marks(places), [f"{v:g}" for v in marks])
            ax.minorticks_off()
        if "y" in log:
            ax.set_yscale("log")
        ax.set(xlabel=x, ylabel=y, title=caption)
        _name_ends(ax, series)

    alt = alt or f"{caption or 'Lines'}: {y} against {x} for {', '.join(series)}."
    return figure(draw, (6.5, 3.2), f"lines {len(series)}", alt)


def _look(i: int) -> dict[str, Any]:
    """Colour, dash and marker of the i-th line: after six the colours come again, with the next dash and marker."""
    second = (i + i // 6) % 6
    return {"color": CYCLE[i % 6], "ls": DASHES[second], "marker": MARKERS[second]}


def _marks(places: Sequence[Number]) -> list[Number]:
    """Where a logarithmic axis is marked: at the values that were measured, or, when they are many, at 1, 2 and 5."""
    if len(places) <= 8 or places[0] <= 0:
        return list(places)
    decades = range(math.floor(math.log10(places[0])), math.ceil(math.log10(places[-1])) + 1)
    return [v for d in decades for v in (10.0**d, 2 * 10.0**d, 5 * 10.0**d) if places[0] <= v <= places[-1]]


def _name_ends(ax: Any, series: Mapping[str, tuple]) -> None:
    """Write each line's name at its right end, names pushed apart where ends meet."""
    ax.figure.draw_without_rendering()
    to_screen, to_data = ax.transAxes.inverted(), ax.transData
    ends = [to_screen.transform(to_data.transform((xy[0][-1], xy[1][-1])))[1] for xy in series.values()]
    order, free, top = sorted(range(len(ends)), key=ends.__getitem__), -1.0, 1.0
    for i in order:  # upwards, each clear of the one below
        free = ends[i] = max(ends[i], free + 0.08)
    for i in reversed(order):  # and down again, if that went beyond the picture
        ends[i] = min(ends[i], top)
        top = ends[i] - 0.08
    for i in order:
        ax.plot([1.01, 1.035, 1.06], [ends[i]] * 3, transform=ax.transAxes, clip_on=False, **_look(i), ms=4, markevery=[1])
        ax.annotate(list(series)[i], (1.07, ends[i]), xycoords="axes fraction", va="center")


def attention(
    weights: Tensor | np.ndarray,
    frames: int | None = None,
    caption: str = "",
    *,
    titles: Sequence[str] = (),
    alt: str = "",
) -> Picture:
    """An attention map `n n` (rows are queries), or one a head `k n n`; brighter is more weight.

    frames  how many frames the n tokens are: draws the frame borders
    """
    if isinstance(weights, (Tensor, np.ndarray)) and weights.ndim == 2:
        weights = weights[None]
    maps = checked(weights, "k n n", "attention weights")
    k, n, m = maps.shape
    if n != m or k > 8 or maps.min() < 0 or (frames and n % frames):
        raise ValueError(
            f"attention takes up to 8 square maps of weights >= 0 whose side divides by frames, "
            f"got shape {maps.shape}, least value {maps.min():.3g}, frames {frames}."
        )
    names = list(titles) or ([f"head {i}" for i in range(k)] if k > 1 else [""])
    columns = min(k, 4)

    def draw(axes: Any) -> None:
        from matplotlib import colormaps
        from matplotlib.colors import PowerNorm

        few = colormaps["cividis"].resampled(24)  # noise in 256 colours would be half the bytes of a notebook
        axes = axes if isinstance(axes, list) else [axes]
        # Weights span orders of magnitude: the square root keeps the faint ones visible.
        scale = PowerNorm(0.5, vmin=0, vmax=float(maps.max()) or 1.0)
        for ax in axes[k:]:
            ax.set_visible(False)
        for i, ax in enumerate(axes[:k]):
            image = ax.imshow(_shrunk(maps[i]), cmap=few, norm=scale, extent=(0, n, n, 0), interpolation="nearest")
            _frame_borders(ax, n, frames)
            ax.set_title(names[i] or caption)
            ax.set_xlabel("key")
            ax.set_ylabel("query" if i % columns == 0 else "")
        top = float(maps.max()) or 1.0
        bar = axes[0].figure.colorbar(image, ax=axes[:k], label="weight", shrink=0.8, ticks=[0, top / 16, top / 4, top])
        bar.ax.set_yticklabels([f"{v:.2g}" for v in bar.get_ticks()])
        if k > 1 and caption:
            axes[0].figure.suptitle(caption, x=0.01, ha="left", fontsize=10, weight="bold")

    size = (4.9, 4.0) if k == 1 else (1.95 * columns + 0.7, 2.15 * -(-k // columns) + 0.3)
    alt = alt or f"{caption or 'Attention'}: {k} map(s) of {n} queries by {n} keys, brighter is more weight."
    return figure(draw, size, f"attention {k}x{n}x{n}", alt, grid=(-(-k // columns), columns))


def _shrunk(x: np.ndarray, most: int = 512) -> np.ndarray:
    """Block maxima of a large map, so that a thin diagonal can't vanish between drawn pixels."""
    step = -(-len(x) // most)
    pad = -len(x) % step
    x = np.pad(x, ((0, pad), (0, pad)))
    return x.reshape(len(x) // step, step, -1, step).max((1, 3))


def _frame_borders(ax: Any, n: int, frames: int | None) -> None:
    if not frames:
        return
    step = n // frames
    for place in range(step, n, step):
        ax.axhline(place, color="white", lw=0.6, alpha=0.7)
        ax.axvline(place, color="white", lw=0.6, alpha=0.7)
    shown = range(0, frames, -(-frames // 8))
    middles = [(f + 0.5) * step for f in shown]
    ax.set_xticks(middles, [f"f{f}" for f in shown])
    ax.set_yticks(middles, [f"f{f}" for f in shown])


def scatter(table: np.ndarray, alive: np.ndarray, caption: str, note: str, alt: str) -> Picture:
    """Vectors `k d` on their two main axes; used ones as blue dots, unused ones as grey crosses."""
    centred = table - table.mean(0)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    signs = np.where(axes[:2, np.abs(axes[:2]).argmax(1)].diagonal() < 0, -1, 1)  # svd leaves the sign open: fix it
    flat = centred @ (axes[:2] * signs[: len(axes[:2]), None]).T
    flat = np.pad(flat, ((0, 0), (0, 2 - flat.shape[1])))

    def draw(ax: Any) -> None:
        ax.plot(*flat[~alive].T, "x", color="#999999", ms=5, label="unused", zorder=1)
        ax.plot(*flat[alive].T, "o", color=PALETTE["blue"], ms=4, label="in use", zorder=2)
        ax.set(xlabel="first main axis", ylabel="second main axis", title=f"{caption}\n{note}" if caption else note)
        ax.set_aspect("equal", "datalim")
        if not alive.all():
            ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)

    return figure(draw, (5.2, 4.0), f"codebook {table.shape[0]}x{table.shape[1]}", alt)


def claim(result: Mapping[str, Any], *, alt: str = "") -> Picture:
    """The result of a claim (from `claims.read`): a row a test, a dot a seed, difference and verdict in words."""
    tests = result["tests"]

    def draw(axes: Any) -> None:
        axes = axes if isinstance(axes, list) else [axes]
        axes[0].figure.suptitle(f"{result['slug']}: {result['verdict']}", x=0.01, ha="left", fontsize=11, weight="bold")
        for ax, test in zip(axes, tests, strict=True):
            _claim_row(ax, test, result["arms"])

    sums = "; ".join(f"{test['claim']}: {test['verdict']}" for test in tests)
    alt = alt or f"Claim of {result['slug']}: {result['verdict']}. {sums}."
    return figure(draw, (7.5, 0.5 + 1.6 * len(tests)), f"claim {result['slug']}: {result['verdict']}", alt, (len(tests), 1))


def _claim_row(ax: Any, test: Mapping[str, Any], arms: Mapping[str, Any]) -> None:
    names = [test["baseline"], test["method"]] if test["kind"] == "compare" else [test["arm"]]
    for i, name in enumerate(names):
        values = arms[name]["values"][test["metric"]]
        colour = PALETTE["blue"] if name == names[-1] else PALETTE["orange"]
        ax.plot(values, [i] * len(values), "os"[i], color=colour, ms=7, alpha=0.75, mew=0)
        ax.plot([sum(values) / len(values)], [i], "|", color=INK, ms=16, mew=2)
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(-0.6, len(names) - 0.4)
    ax.margins(x=0.08)
    ax.grid(axis="x", color="#DDDDDD", lw=0.8)
    found = f"{test['verdict']}{'' if test['counts'] else ' (does not count)'}"
    if test["kind"] == "compare":
        d = test["difference"]
        span = f" [{d['low']:.2g}, {d['high']:.2g}]" if d["low"] is not None else " (one seed)"
        ax.set_title(f"{found}: gain {d['mean']:+.2g}{span}, asked for {test['margin']:+.2g}", fontsize=9)
    else:
        bound = test["at_least"] if test["at_least"] is not None else test["at_most"]
        ax.axvline(bound, color=PALETTE["vermillion"], ls="--")
        ax.set_title(f"{found}: {test['claim']}", fontsize=9)
    ax.set_xlabel(test["metric"])


def _finite(values: Mapping[str, np.ndarray]) -> None:
    bad = [name for name, v in values.items() if not v.size or not np.isfinite(v).all()]
    if bad or not values:
        raise ValueError(f"nothing to draw, or NaN, infinite or missing values in: {', '.join(bad) or 'an empty dict'}.")
