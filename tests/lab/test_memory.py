"""Pictures of memory: every storage in its kind, no peak lost on the way to pixels, the film shows every tile once."""

import io

import numpy as np
import pytest
from PIL import Image

from minivid.lab import memory
from minivid.lab.canvas import DENSITY, rgb
from minivid.lab.measure import Life

M, D = 64, 8
LIVES = [
    Life("empty", (1, M, D), 4 * M * D, 1, 100),  # as wide as x
    Life("mm", (1, M, 3 * D), 12 * M * D, 40, 40),  # wider, for one of 100 operations
    Life("mm", (2, 1, M, 2), 16 * M, 10, 60),  # a strip: 4 of 8 columns
    Life("bmm", (2, 4, 4), 128, 20, 20),
]


def test_kinds_are_told_by_shape():
    names = list(memory.KINDS)
    shapes = {(1, M, D): 1, (1, 4, 16, D): 1, (1, M, 9): 2, (M, 2): 3, (2, 1, M, 3): 3, (2, 16, 16): 4, (1, 4, 16, 2): 4}
    for shape, want in shapes.items():
        assert memory.kind(Life("", shape, 4 * int(np.prod(shape)), 1, 1), M, D) == names[want], shape


@pytest.mark.parametrize("columns", [7, 100, 333])
def test_levels_add_up_and_lose_no_peak(columns):
    values = memory.levels(LIVES, M, D, columns)
    assert values.shape == (5, columns) and (values[0] == 1).all() and (values[1] == 1).all()
    assert values.sum(0).max() == 1 + 1 + 3 + 0.5
    assert values[2].max() == 3 and values[3, -1] == 0


def test_a_timeline_says_its_peaks_and_draws_them():
    picture = memory.timeline({"one": LIVES, "none": []}, M, D, "a block", top=10)
    assert "one 5.5, none 1.0" in picture.alt and picture.alt.startswith("a block.") and picture.width == 820
    assert Image.open(io.BytesIO(picture.png)).size == picture.image.size
    pixels = np.asarray(picture.image)
    for ink in ("sky", "orange", "blue"):
        assert (pixels == rgb(ink)).all(-1).any(), ink
    assert memory.timeline({"one": LIVES}, M, D, alt="told").alt == "told"


def test_the_area_is_as_high_as_its_values():
    area = memory._area(np.array([[1.0, 2.0], [3.0, 0.0], [0, 0], [0, 0], [0, 0]]), top=8)
    used = (area != 246).any(-1).sum(0)
    assert used[0] == memory.HIGH * DENSITY // 2 and used[-1] == memory.HIGH * DENSITY // 4


def test_the_film_shows_every_tile_once():
    picture = memory.tiles(3, 4, 2)
    frames = picture._film()
    assert len(frames) == 3 * 4 + 3 * 2 and len({frame.tobytes() for frame in frames}) == len(frames)
    assert {frame.size for frame in frames} == {memory.SIZE} and len(picture.webp) < 100_000
    assert picture.image.size == (memory.SIZE[0] * DENSITY, 2 * memory.SIZE[1] * DENSITY) and "never exist" in picture.alt
