"""The speeds that a reader feels, measured on this machine: printed beside what they should be, never asserted.

Each is the median of a few runs on one thread. Seconds depend on the machine and on what else it does; what a claim
says about speed is a ratio (`measure.ratio`).
"""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Speed:
    """A measured speed: its target is an upper bound, or a lower one where `more` is better."""

    name: str
    value: float
    unit: str
    target: float
    more: bool = False

    @property
    def met(self) -> bool:
        return self.value >= self.target if self.more else self.value <= self.target


def run() -> list[Speed]:
    """All speeds, in the order in which a reader meets them. Takes about half a minute."""
    return [_imports(), _first_picture(), _world(), _slider()]


def _median(fn: Callable[[], object], runs: int) -> float:
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        fn()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _fresh(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def _imports() -> Speed:
    """A new interpreter that imports world, core and lab."""
    code = "import minivid.world, minivid.core.model, minivid.core.sample, minivid.lab.show, minivid.lab.measure"
    return Speed("import minivid and its parts", _median(lambda: _fresh(code), 3), "s", 4.0)


def _first_picture() -> Speed:
    """A new interpreter up to the bytes of the first clip: what the start notebook's first picture needs."""
    code = (
        "from minivid.lab import show; from minivid.world import draw, render;show.clip(render(draw(0, 0)))._repr_mimebundle_()"
    )
    return Speed("first picture from a cold start", _median(lambda: _fresh(code), 3), "s", 15.0)


def _world() -> Speed:
    """Clips of 16 x 32 x 32 drawn in a batch of 64."""
    from minivid.world import batch, draw

    scenes = [draw(0, i) for i in range(64)]
    batch(scenes)
    return Speed("world, 16 x 32 x 32", 64 / _median(lambda: batch(scenes), 7), "clips/s", 400.0, more=True)


def _slider() -> Speed:
    """What a knob costs between two pictures: draw a scene, enlarge, label, encode."""
    from minivid.lab import show
    from minivid.world import draw, render

    seen = iter(range(100))
    seconds = _median(lambda: show.strip(render(draw(0, next(seen)))).png, 15)
    return Speed("a slider's new picture", 1000 * seconds, "ms", 150.0)
