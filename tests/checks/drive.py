"""Set every widget of a notebook to its extremes and every option; errors that nbval can't see are found here.

nbval runs each cell once, at the sliders' first values. When it has come to the end of a notebook, one more test (`Widgets`)
drives what the cells have left in the kernel. An error at another value of an `interact` is printed by
`get_ipython().showtraceback`, one in an observer is raised where the value is set: both are recorded.
"""

import json

import pytest

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


def drive(kernel, timeout: int = 120) -> dict[str, list[str]]:
    """`driven`: every (widget, value) that was set in the kernel (nbval's); `errors`: what went wrong."""
    said, number = "", kernel.execute_cell_input(DRIVER)
    while True:
        message = kernel.get_message("iopub", timeout)
        kind, content = message["msg_type"], message["content"]
        if message["parent_header"].get("msg_id") != number:
            continue
        if kind == "stream":
            said += content["text"]
        elif kind == "error":
            raise RuntimeError("\n".join(content["traceback"]))
        elif kind == "status" and content["execution_state"] == "idle":
            break
    line = next(line for line in said.splitlines() if line.startswith("DRIVEN "))
    return json.loads(line.removeprefix("DRIVEN "))


class Widgets(pytest.Item):
    """The last test of a notebook: its widgets work everywhere, and a lesson has one."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.add_marker(pytest.mark.timeout(600))

    def runtest(self):
        result = drive(self.parent.kernel)
        problems = result["errors"]
        if not result["driven"] and (self.path.parent.name == "papers" or self.path.stem == "00_start"):
            problems = ["a lesson has a knob to turn, but no widget was found"]
        if problems:
            pytest.fail("\n".join(problems), pytrace=False)

    def reportinfo(self):
        return self.path, None, f"{self.path.name}::widgets"
