"""Run a notebook, then set every widget to its extremes and every option; errors that nbval can't see are found here.

nbval and nbclient run each cell once, at the sliders' first values. An error at another value of an `interact` is
printed by `get_ipython().showtraceback`, one in an observer is raised where the value is set: both are recorded.
"""

import json
from pathlib import Path

import nbclient
import nbformat

# Runs in the notebook's kernel, after its last cell. Names are private to one function, so that nothing is overwritten.
DRIVER = '''
def _drive():
    import datetime, json, sys
    import ipywidgets as W
    errors, driven, shown = [], [], []
    shell = get_ipython()
    recorder = lambda exc=None, *a, **k: shown.append((exc if isinstance(exc, tuple) else sys.exc_info())[:2])
    shell.showtraceback = recorder

    def values(w):
        """Values to try, as (trait, value)."""
        if isinstance(w, (W.IntProgress, W.FloatProgress)) or getattr(w, "disabled", False):
            return []
        if isinstance(w, W.FileUpload):
            junk = dict(name="not a video.txt", type="text/plain", size=3, content=memoryview(b"???"),
                        last_modified=datetime.datetime(2026, 1, 1))
            return [("value", (junk,))]
        if isinstance(w, W.FloatLogSlider):
            return [("value", w.base ** w.min), ("value", w.base ** w.max)]
        if isinstance(w, (W.IntRangeSlider, W.FloatRangeSlider)):
            return [("value", pair) for pair in ((w.min, w.min), (w.max, w.max), (w.min, w.max))]
        if isinstance(w, W.SelectMultiple):
            every = tuple(range(len(w.options)))
            return [("index", (i,)) for i in every] + [("index", every), ("index", ())]
        if isinstance(w, W.SelectionRangeSlider):
            last = len(w.options) - 1
            return [("index", (0, 0)), ("index", (last, last)), ("index", (0, last))]
        if hasattr(w, "options") and w.has_trait("index"):
            return [("index", i) for i in range(len(w.options))]
        if isinstance(w, (W.Checkbox, W.ToggleButton)):
            return [("value", True), ("value", False)]
        if w.has_trait("min") and w.has_trait("max") and w.has_trait("value"):
            return [("value", w.min), ("value", w.max)]
        return []

    def attempt(w, what, act):
        shown.clear()
        label = f"{type(w).__name__}({getattr(w, 'description', '')!r}) at {what}"
        driven.append(label)
        try:
            act()
        except Exception as e:
            errors.append(f"{label}: {type(e).__name__}: {e}")
        errors.extend(f"{label}: {kind.__name__}: {e}" for kind, e in shown if kind is not None)

    for w in [w for w in list(W.widgets.widget._instances.values()) if isinstance(w, W.DOMWidget)]:
        if isinstance(w, W.Button):
            attempt(w, "a click", w.click)
        steps = values(w)
        before = {trait: getattr(w, trait) for trait, _ in steps}
        for trait, value in steps + list(before.items()):
            attempt(w, repr(value)[:60], lambda: setattr(w, trait, value))
    print("DRIVEN " + json.dumps({"driven": driven, "errors": errors}))
_drive()
'''


def drive(path: Path, timeout: int = 120) -> dict[str, list[str]]:
    """`driven`: every (widget, value) that was set; `errors`: what went wrong. An error in a cell itself is raised."""
    book = nbformat.read(path, 4)
    book.cells.append(nbformat.v4.new_code_cell(DRIVER))
    book.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbclient.NotebookClient(book, timeout=timeout, resources={"metadata": {"path": str(path.parent)}}).execute()
    printed = "".join(o.get("text", "") for o in book.cells[-1].outputs)
    line = next(line for line in printed.splitlines() if line.startswith("DRIVEN "))
    return json.loads(line.removeprefix("DRIVEN "))
