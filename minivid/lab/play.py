"""Widgets from pure functions: a slider for each parameter, a picture that follows, and three settled frames under it.

    def render(bits):
        return show.clip(quantise(x, bits))

    play.knobs(render, bits=IntRange(2, 8, 4), settled=[{"bits": 2}, {"bits": 4}, {"bits": 8}])

`render` must be pure: the same parameters, the same picture. So each picture is drawn once and kept, a test can drive
every knob through its whole range, and readers without a kernel see the settled pictures instead. All knobs are the
browser's own controls or take arrow keys, so a keyboard is enough.
"""

import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from minivid.lab.canvas import DENSITY, INK, PAPER, TEXT, WIDTH, Picture, few_colours, font, wrap
from minivid.lab.plots import attention as attention_picture

Number = float | int
LARGE = 3_000_000  # drawn pixels of a page of stills from which on 128 colours must do


@dataclass(frozen=True)
class IntRange:
    """Whole numbers from `low` to `high`, starting at `value`."""

    low: int
    high: int
    value: int
    step: int = 1


@dataclass(frozen=True)
class FloatRange:
    """Numbers from `low` to `high` in steps, starting at `value`."""

    low: Number
    high: Number
    value: Number
    step: Number = 0.1


class Choice:
    """One of several values, shown by their names; starts at the first."""

    def __init__(self, options: Sequence[Any]):
        if not options:
            raise ValueError("a Choice needs at least one option.")
        self.options = list(options)


class Toggle(Choice):
    """Off or on, starting off."""

    def __init__(self) -> None:
        super().__init__([False, True])


Knob = IntRange | FloatRange | Choice


class Display:
    """Something with a live widget and a still for readers without a kernel; each is an output of its own.

    `widget` is the live part (an ipywidget), `still` the Picture shown under it, `text` the stable plain-text form.
    """

    def __init__(self, widget: Any, still: Picture | None, text: str):
        self.widget, self.still, self.text = widget, still, text

    def __repr__(self) -> str:
        return self.text

    def _ipython_display_(self) -> None:
        from IPython.display import display

        data = self.widget._repr_mimebundle_()
        data = dict(data[0] if isinstance(data, tuple) else data)
        data["text/plain"] = self.text  # ipywidgets' own lists every child, and changes with its versions
        display(data, raw=True)
        if self.still is not None:
            display(self.still)


def knobs(
    render: Callable[..., Picture], *, settled: Sequence[Mapping[str, Any]], width: int | None = None, **knob: Knob
) -> Display:
    """A live picture with a knob for each parameter of `render`, and the three `settled` pictures under it.

    render   pure function of the knobs' values to a Picture
    settled  three settings, each a dict with a value for every knob: the story's before, between and after
    width    shown pixels of the live picture; by default that of the first picture
    knob     name = IntRange(...), FloatRange(...), Choice([...]) or Toggle(), named like render's parameters

    Raises ValueError when settings and knobs don't match.
    """
    import ipywidgets as W

    _check(render, settled, knob)
    drawn: dict[tuple, Picture] = {}

    def picture(**values: Any) -> Picture:
        key = tuple(sorted(values.items()))
        if key not in drawn:
            drawn[key] = render(**values)
        return drawn[key]

    controls = {name: _control(W, name, one) for name, one in knob.items()}
    first = picture(**{name: control.value for name, control in controls.items()})
    # A fixed width: in a box an image would stretch to the page, and blur.
    image = W.Image(value=first.png, format="png", layout=W.Layout(width=f"{width or first.width}px"))
    if first.places:
        image = _touched(first.png, width or first.width)
    caption = W.Label(first.alt)
    now = lambda: picture(**{name: control.value for name, control in controls.items()})
    busy = []

    def follow(_: Any) -> None:
        if not busy:
            image.value, caption.value = now().png, now().alt

    def touched(change: Any) -> None:
        busy.append(True)  # one drawing for all knobs that a click turns
        for name, value in _at(now(), *change["new"]).items():
            controls[name].value = value
        busy.clear()
        follow(None)

    for control in controls.values():
        control.observe(follow, names="value")
    if first.places:
        image.observe(touched, names="place")
    stills = [(_setting(values), picture(**values)) for values in settled]
    text = f"knobs {', '.join(knob)}"
    return Display(W.VBox([*controls.values(), image, caption]), _beside(stills, text), text)


def _at(picture: Picture, right: Number, down: Number) -> Mapping[str, Any]:
    """What a click stands for. right, down: how far it is into the picture, as shares of its width and height."""
    x, y = right * picture.width, down * picture.image.height / DENSITY
    return next((what for (a, b, c, d), what in picture.places.items() if a <= x < c and b <= y < d), {})


def _check(render: Callable[..., Picture], settled: Sequence[Mapping[str, Any]], knob: Mapping[str, Knob]) -> None:
    takes = inspect.signature(render).parameters
    unknown = [name for name in knob if name not in takes and not any(p.kind == p.VAR_KEYWORD for p in takes.values())]
    if not knob or unknown:
        raise ValueError(f"knobs needs a knob for each parameter of render ({', '.join(takes)}), got {list(knob)}.")
    if len(settled) != 3 or any(set(values) != set(knob) for values in settled):
        raise ValueError(f"settled must be three dicts, each with a value for {', '.join(knob)}; got {list(settled)}.")
    for values, (name, one) in itertools.product(settled, knob.items()):
        ok = values[name] in one.options if isinstance(one, Choice) else one.low <= values[name] <= one.high
        if not ok:
            raise ValueError(f"settled {name}={values[name]!r} is not a value that the knob {one} can take.")


def _control(W: Any, name: str, knob: Knob) -> Any:
    label = {"description": name.replace("_", " "), "style": {"description_width": "8em"}}
    if isinstance(knob, Toggle):
        return W.Checkbox(value=False, **label)
    if isinstance(knob, Choice):
        return W.Dropdown(options=[(str(option), option) for option in knob.options], **label)
    kind = W.IntSlider if isinstance(knob, IntRange) else W.FloatSlider
    return kind(value=knob.value, min=knob.low, max=knob.high, step=knob.step, layout=W.Layout(width="28em"), **label)


def _setting(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} = {value}" for name, value in values.items())


def _beside(stills: Sequence[tuple[str, Picture]], text: str) -> Picture:
    """Pictures under one another, or side by side where they fit, each under its setting."""
    columns = len(stills) if sum(still.width + 12 for _, still in stills) <= WIDTH else 1
    head = TEXT + 10
    width = max(still.width for _, still in stills)
    cells = [(wrap(name, width, bold=True), still.image) for name, still in stills]
    tall = [len(lines) * head + image.height // DENSITY for lines, image in cells]
    size = ((width + 12) * columns, max(tall)) if columns > 1 else (width, sum(tall))
    page = Image.new("RGB", (size[0] * DENSITY, size[1] * DENSITY), PAPER)
    pen, x, y = ImageDraw.Draw(page), 0, 0
    for (lines, image), high in zip(cells, tall, strict=True):
        for i, line in enumerate(lines):
            pen.text(((x + 4) * DENSITY, (y + 4 + i * head) * DENSITY), line, font=font(bold=True), fill=INK)
        page.paste(image, (x * DENSITY, (y + len(lines) * head) * DENSITY))
        x, y = (x + width + 12, y) if columns > 1 else (x, y + high)
    alt = " ".join(f"With {name}: {still.alt}" for name, still in stills)
    return Picture(few_colours(page) if page.width * page.height > LARGE else page, f"settled {text}", alt)


def upload(render: Callable[[Tensor], Picture], sample: Tensor, *, size: int = 64, frames: int = 17) -> Display:
    """A button that takes the reader's own video: the clip read from it goes through `render`, as `sample` does below it.

    render  function of a clip `3 f h w` in [-1, 1] to a Picture
    size, frames  what the video is read as: a centred square of `size` pixels, the first `frames` frames

    A file that is no video, is empty or cut off is answered with a sentence, not with a traceback.
    """
    import ipywidgets as W

    from minivid.world.files import VideoError, read_video

    first = render(sample)
    button = W.FileUpload(accept="video/*", multiple=False, description="your video")
    caption = W.Label("Choose a video file: what is made of it appears here. Below: a sample.")
    box = W.VBox([button, caption])  # the sample stands under it as the still, so there is no live picture yet

    def take(change: Any) -> None:
        if not change["new"]:
            return
        file = change["new"][0]
        with TemporaryDirectory() as folder:
            path = Path(folder) / Path(file["name"]).name
            try:
                path.write_bytes(bytes(file["content"]))
                now = render(read_video(path, size=size, frames=frames).clip)
            except (VideoError, ValueError, OSError) as error:
                caption.value = f"This file could not be used: {str(error).replace(str(path), path.name)}"
                return
        caption.value = now.alt
        image = W.Image(value=now.png, format="png", layout=W.Layout(width=f"{now.width}px"))
        box.children = [button, image, caption]

    button.observe(take, names="value")
    return Display(box, first, "upload a video")


# --- a picture that is clicked ------------------------------------------------------------------------------------------

_TOUCHED = """
function render({ model, el }) {
  const image = document.createElement("img");
  image.className = "widget-image";
  image.style.width = model.get("width") + "px";
  image.style.cursor = "pointer";
  function draw() {
    URL.revokeObjectURL(image.src);
    image.src = URL.createObjectURL(new Blob([model.get("value")], { type: "image/png" }));
  }
  image.addEventListener("click", e => {
    model.set("place", [e.offsetX / image.clientWidth, e.offsetY / image.clientHeight]);
    model.save_changes();
  });
  model.on("change:value", draw);
  draw();
  el.append(image);
}
export default { render };
"""


def _touched(png: bytes, width: int) -> Any:
    """A live picture that says where it was clicked, `place`, as shares of its width and height."""
    import anywidget
    import traitlets

    class Touched(anywidget.AnyWidget):
        _esm = _TOUCHED
        value = traitlets.Bytes().tag(sync=True)
        width = traitlets.Int().tag(sync=True)
        place = traitlets.List().tag(sync=True)

    return Touched(value=png, width=width)


# --- an attention map to walk through ---------------------------------------------------------------------------------

_SCRIPT = """
function render({ model, el }) {
  const [frames, rows, columns] = model.get("grid"), n = frames * rows * columns;
  const weights = new Float32Array(model.get("weights").buffer.slice(0));
  const side = model.get("side"), gap = 6, table = model.get("colours");
  const canvas = document.createElement("canvas");
  canvas.width = frames * (columns * side + gap);
  canvas.height = rows * side;
  canvas.tabIndex = 0;
  canvas.setAttribute("role", "img");
  canvas.style.cursor = "crosshair";
  const line = document.createElement("div");
  line.setAttribute("aria-live", "polite");
  const pen = canvas.getContext("2d");
  const place = i => [Math.floor(i / (rows * columns)), Math.floor(i / columns) % rows, i % columns];
  function draw() {
    const query = model.get("query"), [qf, qr, qc] = place(query);
    let top = 0;
    for (let i = 0; i < n; i++) top = Math.max(top, weights[query * n + i]);
    pen.clearRect(0, 0, canvas.width, canvas.height);
    for (let i = 0; i < n; i++) {
      const [f, r, c] = place(i), level = Math.sqrt(weights[query * n + i] / (top || 1));
      pen.fillStyle = table[Math.round(level * (table.length - 1))];
      pen.fillRect(f * (columns * side + gap) + c * side, r * side, side, side);
    }
    pen.lineWidth = 3; pen.strokeStyle = "#fff";
    pen.strokeRect(qf * (columns * side + gap) + qc * side + 1.5, qr * side + 1.5, side - 3, side - 3);
    pen.lineWidth = 1; pen.strokeStyle = "#000";
    pen.strokeRect(qf * (columns * side + gap) + qc * side + .5, qr * side + .5, side - 1, side - 1);
    const text = `query: frame ${qf}, row ${qr}, column ${qc}; brightest weight ${top.toPrecision(2)}`;
    line.textContent = text;
    canvas.setAttribute("aria-label", text);
  }
  function go(query) { model.set("query", query); model.save_changes(); }
  canvas.addEventListener("mousemove", e => {
    const wide = columns * side + gap, f = Math.floor(e.offsetX / wide);
    const c = Math.floor((e.offsetX - f * wide) / side), r = Math.floor(e.offsetY / side);
    if (f >= 0 && f < frames && c >= 0 && c < columns && r >= 0 && r < rows) {
      const query = (f * rows + r) * columns + c;
      if (query !== model.get("query")) go(query);
    }
  });
  canvas.addEventListener("keydown", e => {
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns,
                   PageUp: -rows * columns, PageDown: rows * columns }[e.key];
    if (step === undefined) return;
    e.preventDefault(); e.stopPropagation();
    go(Math.min(n - 1, Math.max(0, model.get("query") + step)));
  });
  model.on("change:query", draw);
  draw();
  el.append(canvas, line);
}
export default { render };
"""


def _map_widget(weights: np.ndarray, grid: tuple[int, int, int], query: int) -> Any:
    import anywidget
    import matplotlib
    import traitlets

    class AttentionMap(anywidget.AnyWidget):
        _esm = _SCRIPT
        weights = traitlets.Bytes().tag(sync=True)
        grid = traitlets.List().tag(sync=True)
        side = traitlets.Int().tag(sync=True)
        colours = traitlets.List().tag(sync=True)
        query = traitlets.Int(0).tag(sync=True)

    steps = matplotlib.colormaps["cividis"](np.linspace(0, 1, 64), bytes=True)[:, :3]
    side = max(4, min(24, (WIDTH // grid[0] - 6) // grid[2]))
    return AttentionMap(
        weights=weights.astype(np.float32).tobytes(), grid=list(grid), side=side, query=query,
        colours=["#" + bytes(step).hex() for step in steps],
    )  # fmt: skip


def attention(weights: Tensor | np.ndarray, frames: int, rows: int, columns: int, *, query: int | None = None) -> Display:
    """An attention map `n n` over a grid of frames x rows x columns: point at a token, see where it looks.

    Mouse or arrow keys move the query (page up and down change the frame). Under it stands the whole map as a still.
    Raises ValueError when n is not frames * rows * columns.
    """
    still = attention_picture(weights, frames, "the whole map")
    n = weights.shape[-1]
    if weights.ndim != 2 or n != frames * rows * columns:
        raise ValueError(f"got weights of shape {tuple(weights.shape)} for {frames} x {rows} x {columns} tokens.")
    values = weights.detach().cpu().float().numpy() if isinstance(weights, Tensor) else weights
    middle = (frames // 2 * rows + rows // 2) * columns + columns // 2
    widget = _map_widget(values, (frames, rows, columns), middle if query is None else query)
    return Display(widget, still, f"attention over {frames} x {rows} x {columns} tokens")
