"""Marks on frames: at the right places, told apart without colour, refused where shapes don't fit."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from minivid import world
from minivid.lab import canvas, overlay
from minivid.world.judge import Reading

SCENE = world.draw(2, 2, "two")
CLIP, KNOWN = world.render(SCENE), world.truth(SCENE)
SCRIPT = world.draw(2, 0, "script")

PICTURES = {
    "truth of 2 bodies": lambda: overlay.truth(CLIP, KNOWN),
    "flow 2x16x32x32": lambda: overlay.flow(CLIP, KNOWN.forward, KNOWN.forward_seen, gain=3),
    "tracks of 64 points": lambda: overlay.tracks(CLIP, KNOWN),
    "reading: (1) magenta triangle down; (2) cyan star up": lambda: overlay.reading(CLIP, world.judge.read(CLIP)),
    "wall of 3 clips": lambda: overlay.wall([CLIP] * 3, ["a", "b", "c"], "three", columns=2),
    "timeline of 8 events": lambda: overlay.timeline(world.render(SCRIPT, 32, 64), world.event_captions(SCRIPT)),
    "12 held-out combinations": overlay.combinations,
}


@pytest.mark.parametrize("text", PICTURES)
def test_every_picture_says_what_it_is_and_fits_a_page(text):
    picture = PICTURES[text]()
    assert repr(picture) == text
    assert len(picture.alt) > 20
    assert picture.width <= 830
    assert PICTURES[text]().png == picture.png


def changed(picture, plain):
    """Pixels (drawn) in which two pictures of one size differ."""
    a, b = (np.asarray(p.image).astype(int) for p in (picture, plain))
    return np.argwhere(np.abs(a - b).sum(-1) > 0)


def test_a_mark_lies_where_the_truth_says():
    """One cross on one frame: what differs from the unmarked frame is centred on the body's centre."""
    first = CLIP[:, :1]
    centre = KNOWN.centres[0, 0]
    plain = overlay.marked(first, lambda pen, k: None)
    crossed = overlay.marked(first, lambda pen, k: pen.cross(centre))
    factor = canvas.scale_for(32, 128) * canvas.DENSITY
    found = changed(crossed, plain).astype(float)
    row, column = (found.min(0) + found.max(0)) / 2
    assert abs(column - 4 * canvas.DENSITY - factor * float(centre[0])) <= 2, "the tile begins 4 shown pixels from the left"
    assert abs(row - 6 * canvas.DENSITY - factor * float(centre[1])) <= 2, "and 6 from the top"


def test_what_goes_out_of_sight_is_black():
    hidden = torch.ones(16, 32, 32, dtype=torch.bool)
    hidden[:, 8:24, 8:24] = False
    still = torch.zeros(2, 16, 32, 32)
    frame = np.asarray(overlay.flow(CLIP, still, hidden, frames=1).image)
    assert (frame == 0).all(-1).sum() >= (16 * canvas.scale_for(32, 192) * canvas.DENSITY) ** 2


def test_unsure_is_a_question_mark_and_said_in_the_description():
    noisy = world.corrupt(CLIP, "noise", 1.0)[0]
    assert "unsure of everything" in overlay.reading(noisy, world.judge.read(noisy)).alt
    blurred = world.corrupt(CLIP, "blur", 0.8)[0]
    assert "magenta ? down" in overlay.reading(blurred, world.judge.read(blurred)).alt
    assert "nothing is there" in overlay.reading(CLIP, Reading((), (0,) * 16)).alt


def test_a_film_of_the_wall_has_every_frame():
    picture = overlay.wall([CLIP, CLIP.flip(1)], columns=2)
    film = Image.open(io.BytesIO(picture.webp))
    assert film.n_frames == 16 and film.width == picture.width


def test_every_held_out_combination_is_named():
    held = [f"{c} {s} {m}" for c in world.COLOURS for s in world.SHAPES for m in world.MOTIONS[:4] if world.held_out(c, s, m)]
    assert len(held) == 12 and all(text in overlay.combinations().alt for text in held)


@pytest.mark.parametrize(
    "call, complaint",
    [
        (lambda: overlay.flow(CLIP, torch.zeros(2, 15, 32, 32)), "must fit the clip"),
        (lambda: overlay.flow(CLIP, KNOWN.forward * float("nan")), "NaN"),
        (lambda: overlay.wall([]), "at least one clip"),
        (lambda: overlay.wall([CLIP], ["a", "b"]), "as many titles"),
        (lambda: overlay.wall([CLIP, CLIP[:, :4]]), "one shape"),
        (lambda: overlay.truth(CLIP + 3, KNOWN), "must lie in"),
    ],
)
def test_wrong_input_is_refused(call, complaint):
    with pytest.raises(ValueError, match=complaint):
        call()
